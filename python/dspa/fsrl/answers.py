"""A few answers without and with an adapter, and warnings about an adapter that spoils them or is not sparse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from dspa.evaluate.coherence import compare_texts
from dspa.evaluate.responses import Response
from dspa.fsrl.adapter import FSRLAdapter
from dspa.intervals import Values
from dspa.models.layers import CausalLM, context_length

# A look, not a measurement: `dspa fsrl analyse coherence` takes any number of prompts and adds intervals.
N_ANSWERS = 8
# Enough for 61 4-grams.
ANSWER_TOKENS = 64
# Above one half, a latent is moved more often than not, so that the effect is one of all latents together.
MOST_MOVED = 0.5
# Answers in another style cost the base model up to about one nat per token more than its own, a factor e. Text that
# has fallen apart costs several.
MOST_PERPLEXITY = 3.0
# Further share of 4-grams that stood in an answer before. Greedy answers of the base model may repeat, too: what counts
# is what the adapter adds.
MOST_REPETITION = 0.2


@dataclass(frozen=True)
class Answers:
    """Means over answers to the same prompts.

    Attributes:
        perplexity: perplexity under the base model.
        repetition: share of 4-grams that stood in the answer before; NaN if all answers are too short.
    """

    perplexity: float
    repetition: float


def compare_answers(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, adapter: FSRLAdapter, responses: Sequence[Response]
) -> tuple[Answers, Answers] | None:
    """Generate greedy answers without and with an attached adapter to the first few different prompts.

    Args:
        model: the model, in evaluation mode.
        tokenizer: the model's tokenizer.
        adapter: the adapter, attached to the model.
        responses: responses to the prompts, as `responses_of` returns them.

    Returns:
        The base model's answers and the adapter's, or None if fewer than two prompts leave room for an answer.
    """
    prompts = list(islice(_prompts(model, responses), N_ANSWERS))
    if len(prompts) < 2:
        return None
    texts = compare_texts(model, tokenizer, adapter, prompts, max_new_tokens=ANSWER_TOKENS)
    base, steered = (Answers(_mean(m["perplexity"]), _mean(m["repetition"])) for m in (texts.base, texts.steered))
    return base, steered


def _prompts(model: CausalLM, responses: Sequence[Response]) -> Iterator[list[int]]:
    context = context_length(model)
    for prompt in dict.fromkeys(tuple(response.prompt) for response in responses):
        if context is None or len(prompt) + ANSWER_TOKENS <= context:
            yield list(prompt)


def _mean(values: Values) -> float:
    return float(np.mean(values[~np.isnan(values)])) if not np.isnan(values).all() else float("nan")


def warnings_about(l0: float, d_sae: int, answers: tuple[Answers, Answers] | None) -> list[str]:
    """Return warnings about an adapter, each one or two sentences.

    Args:
        l0: number of latents that it moves per token.
        d_sae: number of latents of its SAE.
        answers: what `compare_answers` returned.
    """
    warnings = []
    if l0 > MOST_MOVED * d_sae:
        warnings.append(
            f"The adapter is not sparse: it moves {l0:.0f} of {d_sae} latents per token, so its effect cannot be read "
            "latent by latent. A larger `l1` or more steps make it sparser."
        )
    if answers is None:
        return warnings
    base, steered = answers
    advice = "Read some answers before you use it; a lower `lr`, fewer steps or a larger `l1` change the model less."
    if steered.perplexity > MOST_PERPLEXITY * base.perplexity:
        warnings.append(
            f"The adapter's answers may be broken: their perplexity under the base model is {steered.perplexity:.3g}, "
            f"and that of its own answers {base.perplexity:.3g}. {advice}"
        )
    if steered.repetition > base.repetition + MOST_REPETITION:
        warnings.append(
            f"The adapter's answers repeat themselves: {steered.repetition:.0%} of their 4-grams stood there before, "
            f"and {base.repetition:.0%} of those of the base model's answers. {advice}"
        )
    return warnings
