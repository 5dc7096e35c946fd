"""Training of the demo's model and its two SAEs, and generation of its preference data."""

import random
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from dspa.demo import language
from dspa.errors import require_package
from dspa.saes.config import SAETrainingConfig
from dspa.saes.training import train_sae

SEED = 20
DRIFT = 0.12
MODEL_NAME = "dspa-demo"

LAYER_IN = 1
LAYER_OUT = 4
D_SAE_IN = 512
D_SAE_OUT = 256
L0_IN = 12.0
L0_OUT = 8.0

LM_STEPS = 900
LM_BATCH = 32
LM_RATE = 3e-3
SAE_STEPS = 1200
SAE_BATCH = 1024
SAE_RATE = 1e-3
SAE_DOCUMENTS = 3000

TRIPLES = 400
HELD_OUT = 100


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per word or punctuation mark, with `<bos>` in front."""
    vocabulary = {word: index for index, word in enumerate(language.vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=True), decoders.Replace(Regex(" :"), ":")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Gemma2ForCausalLM:
    """Return an untrained Gemma-2 of about 0.5 M parameters."""
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        query_pre_attn_scalar=24,
        sliding_window=128,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model = Gemma2ForCausalLM(config)
    # PyTorch's own attention leaves out Gemma-2's soft-capping.
    model.set_attn_implementation("eager")
    return model


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask, both [B, T], padded on the right; each text ends with `<eos>`."""
    batch = tokenizer([f"{text} <eos>" for text in texts], padding=True, padding_side="right", return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def train_language_model(
    model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random, progress: bool
) -> None:
    """Train next-word prediction, over prompts and answers alike."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LM_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LM_RATE, total_steps=LM_STEPS, pct_start=0.05)
    documents = language.corpus(rng, drift=DRIFT)
    bar = tqdm(range(LM_STEPS), desc="language model", disable=not progress)
    model.train()
    for _ in bar:
        ids, mask = encode(tokenizer, list(islice(documents, LM_BATCH)))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def train_saes(
    model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random, out: Path, progress: bool
) -> None:
    """Train `sae_in/` and `sae_out/` on fresh documents."""
    with TemporaryDirectory() as folder:
        texts = Path(folder) / "corpus.txt"
        documents = islice(language.corpus(rng, drift=DRIFT), SAE_DOCUMENTS)
        texts.write_text("".join(f"{text} <eos>\n" for text in documents), encoding="utf-8")
        for name, layer, d_sae, l0 in (
            ("sae_in", LAYER_IN, D_SAE_IN, L0_IN),
            ("sae_out", LAYER_OUT, D_SAE_OUT, L0_OUT),
        ):
            config = SAETrainingConfig(
                n_tokens=SAE_STEPS * SAE_BATCH,
                batch_size=SAE_BATCH,
                lr=SAE_RATE,
                dead_feature_window=200,
                exclude_special_tokens=False,
                seed=SEED + layer,
            )
            train_sae(
                model,
                tokenizer,
                texts,
                layer,
                out / name,
                d_sae=d_sae,
                k=l0,
                config=config,
                progress=progress,
                model_name=MODEL_NAME,
            )


def write_preferences(out: Path) -> None:
    """Write `preferences.jsonl`, and `heldout.jsonl` with prompts that are not in it."""
    triples = list(language.preferences(random.Random(SEED + 2), TRIPLES))
    seen = frozenset(triple["prompt"] for triple in triples)
    language.write_json_lines(out / "preferences.jsonl", iter(triples))
    language.write_json_lines(out / "heldout.jsonl", language.held_out(random.Random(SEED + 3), HELD_OUT, unlike=seen))


def train(out: Path, progress: bool = True) -> None:
    """Train the demo's model and SAEs, and write them and the data to `out`.

    The folder gets the model and its tokenizer (`dspa-demo/`), `sae_in/`, `sae_out/`, `preferences.jsonl` and
    `heldout.jsonl`.

    Raises:
        RuntimeError: sae-lens, whose trainer makes the SAEs, is not installed.
    """
    require_package("sae-lens", "Training the demo's SAEs")
    torch.manual_seed(SEED)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train_language_model(model, tokenizer, random.Random(SEED), progress)
    # The SAEs are trained on the model as it will be loaded: weights rounded to bf16, arithmetic in fp32.
    model.bfloat16().save_pretrained(out / MODEL_NAME)
    tokenizer.save_pretrained(out / MODEL_NAME)
    model.float()
    train_saes(model, tokenizer, random.Random(SEED + 1), out, progress)
    write_preferences(out)
