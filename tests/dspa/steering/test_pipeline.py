"""A transformers pipeline with a steered model gives the tokens that the same row gives alone in a plain loop."""

from __future__ import annotations

from transformers import pipeline

import dspa
from dspa.models.layers import decoder_layers
from dspa.testing import word_tokenizer

from ..support.plain import Plain


def test_pipeline(model, sae_in, sae_out, cdmap):
    config = dspa.SteeringConfig(alpha=0.6, k_diff=8, mode="both")
    tokenizer = word_tokenizer()
    texts = ["the cat is a dog", "run to my", "we see the old red tree by home"]
    loop = Plain(model, decoder_layers(model), sae_in, sae_out, cdmap, config)
    wanted = [
        tokenizer.decode(loop.generate(tokenizer(text)["input_ids"], 5), skip_special_tokens=True) for text in texts
    ]
    with dspa.Steering(sae_in, sae_out, cdmap, config).attach(model):
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        for batch_size in (1, 3):
            answers = pipe(texts, batch_size=batch_size, max_new_tokens=5, do_sample=False, return_full_text=False)
            assert [answer[0]["generated_text"].split() for answer in answers] == [text.split() for text in wanted]
