"""Whether a model still writes coherently with an adapter: texts of the base model and of the steered one, compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.evaluate.responses import Response, batches, log_probabilities
from dspa.models.attachment import Attachable
from dspa.models.layers import CausalLM, base_model, check_eval, context_length, device_of

Values: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

# What is measured of each text. distinct_n: of its n-grams, the share of different ones; repetition: of its 4-grams,
# the share that stood in it before; length in tokens; ended: 1 where it ends by itself, before the limit.
METRICS = ("distinct_1", "distinct_2", "distinct_3", "repetition", "length", "ended", "perplexity")
REPEATED = 4
RESAMPLES = 9999


@dataclass(frozen=True)
class MetricChange:
    """A measure of the texts of the base model and of the steered one: means over the `n` prompts of which both have
    it, and the mean of the paired differences, steered less base, with its percentile bootstrap interval."""

    metric: str
    n: int
    base: float
    steered: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Coherence:
    """Texts for the same prompts, and each text's measures by name, [N] fp64 each; NaN where a text is too short."""

    base_texts: list[str]
    steered_texts: list[str]
    base: dict[str, Values]
    steered: dict[str, Values]

    def compare(self, metric: str, *, confidence: float = 0.95, seed: int = 0) -> MetricChange:
        """One measure. Raises `ValueError` where fewer than two prompts have it, of which no interval can be told."""
        base, steered = self.base[metric], self.steered[metric]
        both = ~(np.isnan(base) | np.isnan(steered))
        base, steered = base[both], steered[both]
        if len(base) < 2:
            raise ValueError(
                f"{len(base)} of {len(both)} prompts have two texts that are long enough for {metric}; accepted: 2 or "
                "more. Use more prompts or longer texts."
            )
        change = steered - base
        generator = np.random.default_rng(seed)
        found = stats.bootstrap(
            (change,),
            np.mean,
            n_resamples=RESAMPLES,
            batch=1000,
            confidence_level=confidence,
            method="percentile",
            random_state=generator,
        )
        low, high = found.confidence_interval
        means = [float(each.mean()) for each in (base, steered, change)]
        return MetricChange(metric, len(base), means[0], means[1], means[2], float(low), float(high))


def compare_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Attachable,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    batch_tokens: int = 8192,
    progress: bool = True,
) -> Coherence:
    """Continue prompts without and with the adapter, which is attached to the model, and measure the texts.

    Args:
        prompts: token ids of each.
        max_new_tokens, batch_size: tokens a text at most, and texts that are generated at once.
        temperature: 0 is greedy. Otherwise the draws depend on `batch_size`.
        seed: of the draws, the same for both.
        batch_tokens: tokens of a batch, padding counted, as the base model rates texts.

    Raises:
        ModelError: an adapter that is not attached to the model, a model in training mode.
        ValueError: fewer than two prompts, or an empty one; more tokens than the model has positions.
    """
    inner = base_model(model)
    check_eval(inner)
    adapter.check_attached(inner)
    if len(prompts) < 2 or not all(prompts):
        raise ValueError(f"`prompts` are {len(prompts)}; accepted: two or more for an interval, none of them empty.")
    context, needed = context_length(inner), max(map(len, prompts)) + max_new_tokens
    if context is not None and needed > context:
        raise ValueError(
            f"The longest prompt and `max_new_tokens` are {needed} tokens; accepted: {context}, the model's positions."
        )
    sampling: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    ends = _end_tokens(inner, tokenizer)
    with tqdm(total=2 * len(prompts), unit="text", desc="generate", leave=False, disable=not progress) as bar:

        def texts() -> list[Response]:
            torch.manual_seed(seed)
            found = []
            for start in range(0, len(prompts), batch_size):
                found += _continued(inner, tokenizer, prompts[start : start + batch_size], ends, sampling)
                bar.update(len(prompts[start : start + batch_size]))
            return found

        with adapter.disabled():
            base = texts()
        steered = texts()
    with adapter.disabled():
        before, after = (_measures(inner, each, ends, batch_tokens) for each in (base, steered))
    written = [[str(tokenizer.decode(text.ids, skip_special_tokens=True)) for text in each] for each in (base, steered)]
    return Coherence(written[0], written[1], before, after)


def distinct(tokens: Sequence[int], n: int) -> float:
    """Of the n-grams of a text, the share of different ones; NaN where it has none."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition(tokens: Sequence[int], n: int = REPEATED) -> float:
    """Of the n-grams of a text, the share that stood in it before; NaN where it has none."""
    return 1 - distinct(tokens, n)


def _continued(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    ends: set[int],
    sampling: dict[str, Any],
) -> list[Response]:
    """Prompts and what the model says next, up to and with the first end token."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    width = max(map(len, prompts))
    rows = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = device_of(model.get_input_embeddings())
    output: Tensor = model.generate(rows.to(device), attention_mask=mask.to(device), pad_token_id=pad, **sampling)
    found = []
    for prompt, ids in zip(prompts, output[:, width:].tolist(), strict=True):
        last = next((n for n, token in enumerate(ids, start=1) if token in ends), len(ids))
        found.append(Response(list(prompt), ids[:last]))
    return found


def _measures(model: CausalLM, texts: Sequence[Response], ends: set[int], batch_tokens: int) -> dict[str, Values]:
    """All measures of texts; their perplexity is under the model as it is now, the end token counted."""
    words = [text.ids[:-1] if text.ids[-1] in ends else text.ids for text in texts]
    perplexity = torch.empty(len(texts), dtype=torch.float64)
    for numbers in batches(texts, batch_tokens):
        perplexity[numbers] = (-log_probabilities(model, [texts[n] for n in numbers]).double()).exp()
    found = {f"distinct_{n}": [distinct(each, n) for each in words] for n in (1, 2, 3)}
    found["repetition"] = [repetition(each) for each in words]
    found["length"] = [float(len(each)) for each in words]
    found["ended"] = [float(text.ids[-1] in ends) for text in texts]
    return {name: np.asarray(values) for name, values in (found | {"perplexity": perplexity.tolist()}).items()}


def _end_tokens(model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """At what generation stops."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
