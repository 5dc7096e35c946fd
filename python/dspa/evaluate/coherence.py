"""Coherence of generated texts: those of the base model compared with those of the steered one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.errors import refusal
from dspa.evaluate.generation import check_prompts, continue_prompts, decode, end_tokens
from dspa.evaluate.responses import Response, batches, log_probabilities
from dspa.intervals import Values, bootstrap
from dspa.models.attachment import Attachable
from dspa.models.layers import CausalLM, base_model, check_eval

# Measures of a text. distinct_n: the number of different n-grams per n-gram; repetition: the share of its 4-grams that
# stood in it before; length: in tokens; ended: 1 if it ends by itself, before the limit.
METRICS = ("distinct_1", "distinct_2", "distinct_3", "repetition", "length", "ended", "perplexity")
REPEATED = 4


@dataclass(frozen=True)
class MetricChange:
    """Change of one measure from the base model's texts to the steered ones.

    Attributes:
        metric: one of `METRICS`.
        n: number of prompts for which both texts have the measure; all means are over these.
        base: mean over the base model's texts.
        steered: mean over the steered texts.
        difference: mean of the paired differences, steered minus base.
        low: lower end of the difference's percentile bootstrap interval.
        high: upper end of this interval.
    """

    metric: str
    n: int
    base: float
    steered: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Coherence:
    """Texts for N prompts, and each text's measures by name, [N] fp64 each; NaN if a text is too short."""

    base_texts: list[str]
    steered_texts: list[str]
    base: dict[str, Values]
    steered: dict[str, Values]

    def compare(self, metric: str, *, confidence: float = 0.95, seed: int = 0) -> MetricChange:
        """Return the change of one measure.

        Raises:
            ValueError: fewer than two prompts have it, too few for an interval.
        """
        base, steered = self.base[metric], self.steered[metric]
        both = ~(np.isnan(base) | np.isnan(steered))
        base, steered = base[both], steered[both]
        if len(base) < 2:
            what = f"The number of prompts with two texts that are long enough for {metric}"
            advice = "Use more prompts or longer texts."
            raise refusal(ValueError, what, f"{len(base)} of {len(both)}", "2 or more", advice)
        differences = steered - base
        low, high = bootstrap([differences], np.mean, confidence, seed)
        means = {"base": base.mean(), "steered": steered.mean(), "difference": differences.mean()}
        ends = {"low": low, "high": high}
        return MetricChange(metric, len(base), **{name: float(value) for name, value in (means | ends).items()})


def compare_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Attachable,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    batch_tokens: int = 8192,
    progress: bool = True,
) -> Coherence:
    """Continue prompts without and with the adapter, and measure the texts.

    Args:
        model: a transformers causal language model in evaluation mode.
        tokenizer: the model's tokenizer.
        adapter: what steers, attached to the model.
        prompts: token ids of N prompts.
        max_new_tokens: largest number of tokens per text; None: as `check_prompts` chooses.
        temperature: 0 for greedy decoding. Otherwise the draws depend on `batch_size`.
        seed: seed of the draws, the same for both models.
        batch_size: number of texts that are generated together.
        batch_tokens: tokens per batch, padding included, when the base model rates the texts.
        progress: show a bar.

    Raises:
        ModelError: an adapter that is not attached to the model, or a model in training mode.
        ValueError: fewer than two prompts, an empty one, or more tokens than the model has positions.
    """
    inner = base_model(model)
    check_eval(inner)
    adapter.check_attached(inner)
    if len(prompts) < 2 or not all(prompts):
        got = f"{sum(map(bool, prompts))} of {len(prompts)}"
        raise refusal(
            ValueError, "The number of `prompts` that are not empty", got, "all, and 2 or more for an interval"
        )
    max_new_tokens = check_prompts(inner, prompts, max_new_tokens)
    sampling: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    ends = end_tokens(inner, tokenizer)
    with tqdm(total=2 * len(prompts), unit="text", desc="generate", leave=False, disable=not progress) as bar:

        def generate() -> list[Response]:
            torch.manual_seed(seed)
            texts = []
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size]
                texts += continue_prompts(inner, tokenizer, batch, ends, **sampling)
                bar.update(len(batch))
            return texts

        with adapter.disabled():
            base = generate()
        steered = generate()
    with adapter.disabled():
        base_measures, steered_measures = (_measure(inner, texts, ends, batch_tokens) for texts in (base, steered))
    base_texts, steered_texts = ([decode(tokenizer, text.ids) for text in texts] for texts in (base, steered))
    return Coherence(base_texts, steered_texts, base_measures, steered_measures)


def distinct(tokens: Sequence[int], n: int) -> float:
    """Return the number of different n-grams of a text per n-gram; NaN if it has none."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition(tokens: Sequence[int], n: int = REPEATED) -> float:
    """Return the share of n-grams of a text that stood in it before; NaN if it has none."""
    return 1 - distinct(tokens, n)


def _measure(model: CausalLM, texts: Sequence[Response], ends: set[int], batch_tokens: int) -> dict[str, Values]:
    """Return all measures of texts. Perplexity is under the model as it is now and includes the end token."""
    written = [text.ids[:-1] if text.ids[-1] in ends else text.ids for text in texts]
    perplexity = torch.empty(len(texts), dtype=torch.float64)
    for numbers in batches(texts, batch_tokens):
        perplexity[numbers] = (-log_probabilities(model, [texts[n] for n in numbers]).double()).exp()
    measures = {f"distinct_{n}": [distinct(ids, n) for ids in written] for n in (1, 2, 3)}
    measures["repetition"] = [repetition(ids) for ids in written]
    measures["length"] = [float(len(ids)) for ids in written]
    measures["ended"] = [float(text.ids[-1] in ends) for text in texts]
    measures["perplexity"] = perplexity.tolist()
    return {name: np.asarray(values) for name, values in measures.items()}
