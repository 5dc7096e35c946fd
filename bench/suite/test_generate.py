"""Hugging Face `generate()` with and without steering, on a model of Gemma-2-2B's size with random weights.

The time between tokens is read off the device, at each token's logits, so that the prompt's passes are left out.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerFast

import dspa
from bench.conftest import Record
from bench.harness.cases import ON_GPU
from bench.harness.measure import DEVICE, Times
from dspa.testing import make_map, make_model, make_sae_for, make_tokenizer, with_tensors

GEMMA_2_2B = {
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256_000,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
    "initializer_range": 0.02,
}
L_IN, L_OUT = (7, 24) if ON_GPU else (1, 2)
D_SAE, N_COLUMNS, N_WORDS = (16384, 160, 2048) if ON_GPU else (256, 128, 61)
# Tokens of a prompt; tokens generated; the number of them that are not timed, the first.
PROMPT, NEW, WARM = (64, 256, 16) if ON_GPU else (8, 12, 4)
BATCHES = [1, 8] if ON_GPU else [1]
# The share of latents that are active, and the mode. With half of them active and both signs no step is settled early:
# each token reads the whole encoder.
STEERED = {"steered": (0.004, "ablate"), "steered, whole encoder at each token": (0.5, "both")}


@cache
def model() -> PreTrainedModel:
    with DEVICE:
        dtype = torch.bfloat16 if ON_GPU else torch.float32
        return make_model("gemma2", dtype=dtype, **(GEMMA_2_2B if ON_GPU else {}))


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(vocab_size=N_WORDS)


def text(g: torch.Generator, length: int) -> str:
    return " ".join(f"w{n}" for n in torch.randint(3, N_WORDS, (length,), generator=g).tolist())


@lru_cache(maxsize=1)
def steering(case: str) -> dspa.Steering:
    """Random SAEs with a realistic number of active latents, and a random map, calibrated on their residuals."""
    ids = tokenizer()(text(torch.Generator().manual_seed(0), PROMPT), return_tensors="pt").input_ids.to(DEVICE)
    hidden = model()(ids, output_hidden_states=True).hidden_states
    active, mode = STEERED[case]
    sae_in, sae_out = (make_sae_for(hidden[layer + 1][0], layer, D_SAE, active, seed=layer) for layer in (L_IN, L_OUT))
    h = hidden[L_OUT + 1][0]
    held = torch.bincount(sae_out.encode(h).argmax(dim=1), minlength=D_SAE).cpu()
    hot = held.argsort(descending=True, stable=True)[: int((held > 0).sum())]
    cdmap = with_tensors(
        make_map(sae_in, sae_out, n_columns=N_COLUMNS),
        hot=hot.to(torch.int32),
        hot_counts=held[hot],
        mean=h.float().mean(dim=0).cpu(),
    )
    return dspa.Steering(sae_in, sae_out, cdmap, dspa.SteeringConfig(mode=mode))


class Clock(LogitsProcessor):
    """Records when the logits of each token are computed, without waiting for them."""

    def __init__(self) -> None:
        self.ticks: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tick: Any = time.perf_counter()
        if ON_GPU:
            tick = torch.cuda.Event(enable_timing=True)
            tick.record()
        self.ticks.append(tick)
        return scores

    def intervals(self) -> list[float]:
        """Seconds between tokens."""
        pairs = itertools.pairwise(self.ticks[WARM:])
        if not ON_GPU:
            return [after - before for before, after in pairs]
        torch.cuda.synchronize()
        return [1e-3 * before.elapsed_time(after) for before, after in pairs]


def generate(ids: Tensor) -> tuple[Times, float]:
    """The time between tokens, and seconds in total."""
    clock = Clock()
    start = time.perf_counter()
    out = model().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        cache_implementation="static",
        logits_processor=LogitsProcessorList([clock]),
    )
    assert out.shape[1] == ids.shape[1] + NEW
    return Times.of(clock.intervals()), time.perf_counter() - start


@pytest.mark.parametrize("case", ["unsteered", *STEERED])
@pytest.mark.parametrize("n_rows", BATCHES)
def test_generate(record: Record, n_rows: int, case: str) -> None:
    g = torch.Generator().manual_seed(1)
    ids = tokenizer()([text(g, PROMPT) for _ in range(n_rows)], return_tensors="pt").input_ids.to(DEVICE)
    torch.compiler.reset()
    steer = None if case == "unsteered" else steering(case).attach(model())
    try:
        # The first call compiles.
        runs = [generate(ids) for _ in range(4)][1:]
    finally:
        if steer is not None:
            steer.detach()
    times, seconds = min(runs, key=lambda run: run[0].mean)
    record.add(
        {
            "op": "generate",
            "case": case,
            "backend": "auto",
            "shape": (model().config.num_hidden_layers, model().config.hidden_size),
            "rows": n_rows,
            "device_us": asdict(times) if ON_GPU else None,
            "wall_us": asdict(Times.of([seconds / NEW])),
            "tokens_a_second": n_rows * 1e6 / times.mean,
        }
    )
