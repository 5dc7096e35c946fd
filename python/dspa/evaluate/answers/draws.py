"""Sampling with random numbers of each answer's own, whatever else is in its batch."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# Below it, FastChat decodes greedily.
GREEDY_BELOW = 1e-4
# transformers' own, for a generation config that does not say.
TOP_K = 50


class RowDraws(LogitsProcessor):
    """Sampling of one token per row: the first v with p_0 + ... + p_v > x.

    The number x of a row and step is uniform in [0, 1), from a generator of the row's own. All other tokens get -inf,
    so that decoding is greedy after it.

    Args:
        names: what seeds each row's generator.
        n_tokens: largest number of steps.
        warpers: what changes the logits before, such as a temperature.
    """

    def __init__(self, names: Sequence[str], n_tokens: int, warpers: LogitsProcessorList) -> None:
        generators = [Random(name) for name in names]
        self._numbers = torch.tensor(
            [[generator.random() for _ in range(n_tokens)] for generator in generators], dtype=torch.float64
        )
        self._step, self._warpers = 0, warpers

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return the logits [B, vocab_size] of the next token, 0 for the one that is drawn."""
        self._numbers = self._numbers.to(scores.device)
        reached: Tensor = self._warpers(input_ids, scores).double().softmax(-1).cumsum(-1)
        wanted = self._numbers[:, self._step, None] * reached[:, -1:]
        drawn = torch.searchsorted(reached, wanted, right=True)
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def sampling_settings(config: GenerationConfig, top_p: float | None) -> dict[str, Any]:
    """Return what sampling keeps of the next token's distribution, as `generate()` would by a generation config.

    Args:
        config: the model's.
        top_p: in place of the config's; None for that.
    """
    top_p = config.top_p if top_p is None else top_p
    return {
        "top_k": TOP_K if config.top_k is None else config.top_k,
        "top_p": 1.0 if top_p is None else top_p,
        "min_p": config.min_p,
    }


def decoding(temperature: float, settings: dict[str, Any], names: Sequence[str], n_tokens: int) -> dict[str, Any]:
    """Return the arguments of `generate()` for a batch.

    Args:
        temperature: of all rows; greedy decoding below 1e-4.
        settings: as from `sampling_settings`.
        names: what seeds the draws of each row.
        n_tokens: largest number of tokens per answer.
    """
    arguments: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": n_tokens}
    if temperature < GREEDY_BELOW:
        return arguments
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if settings["top_k"]:
        warpers.append(TopKLogitsWarper(settings["top_k"]))
    if settings["top_p"] < 1:
        warpers.append(TopPLogitsWarper(settings["top_p"]))
    if settings["min_p"] is not None:
        warpers.append(MinPLogitsWarper(settings["min_p"]))
    return arguments | {"logits_processor": LogitsProcessorList([RowDraws(names, n_tokens, warpers)])}
