"""Cases of decoding with and without steering, on a model of Gemma-2-2B's size with random weights.

A decoding step is timed twice: as one CUDA graph of the model on a static cache, and within Hugging Face `generate()`,
which compiles it. There the time between tokens is read off the device, at each token's logits, so that the prompt's
passes are left out.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerFast, StaticCache

import dspa
from bench.harness.cases import ON_GPU, Case, Steps
from bench.harness.measure import DEVICE, Times
from dspa.models.prompts import Prompts
from dspa.testing import (
    COMMON,
    cache_names,
    make_map,
    make_model,
    make_sae_for,
    make_tokenizer,
    with_tensors,
)

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
STEP = "one step"
# Tokens of a prompt; tokens generated; the number of them that are not timed, the first.
PROMPT, NEW, WARM = (64, 256, 16) if ON_GPU else (8, 12, 4)
BATCHES = [1, 8] if ON_GPU else [1]
# Steps of a CUDA graph. The cache grows by one token per step, and has room for all replays.
N_STEPS = 4
CONFIG = COMMON | (GEMMA_2_2B if ON_GPU else {})
SHAPE = (CONFIG["num_hidden_layers"], CONFIG["hidden_size"])
# The share of latents that are active, and the mode. With half of them active and both signs no step is settled early:
# each token reads the whole encoder.
STEERED = {"steered": (0.004, "ablate"), "steered, whole encoder at each token": (0.5, "both")}


@cache
def model() -> PreTrainedModel:
    with DEVICE:
        config: dict[str, Any] = GEMMA_2_2B if ON_GPU else {}
        return make_model("gemma2", dtype=torch.bfloat16 if ON_GPU else torch.float32, **config)


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


def prompts(n_rows: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    ids: Tensor = tokenizer()([text(g, PROMPT) for _ in range(n_rows)], return_tensors="pt").input_ids.to(DEVICE)
    return ids


def attached(name: str) -> dspa.Steering | None:
    """The steering of a case, attached to the model instead of that of an earlier case."""
    dspa.detach(model())
    if name not in STEERED:
        return None
    steer = steering(name)
    steer.attach(model())
    return steer


def decoding_step(case: Case, _backend: str) -> Steps:
    """The model's pass over one token of each row, on a static cache."""
    name = case.name.removeprefix(f"{STEP}, ")
    steer = attached(name)
    ids = prompts(case.rows)
    positions = torch.arange(ids.shape[1], device=DEVICE).expand(ids.shape)
    inputs: dict[str, Any] = {cache_names()[-1]: StaticCache(model().config, max_cache_len=ids.shape[1] + NEW)}
    with steer.checked_call() if steer is not None else nullcontext():
        if steer is not None:
            inputs |= steer.call_keywords(Prompts({"input_ids": ids}, torch.ones_like(ids).bool(), positions))
        model()(input_ids=ids, position_ids=positions, use_cache=True, **inputs)
    token = {"input_ids": ids[:, -1:], "position_ids": positions[:, -1:] + 1}

    def step() -> Tensor:
        logits: Tensor = model()(**token, use_cache=True, **inputs).logits
        return logits

    def check() -> None:
        before = steer.paths if steer else {}
        assert bool(step().isfinite().all()), "logits are not finite"
        if steer is not None:
            counts = {path: n - before[path] for path, n in steer.paths.items()}
            steered = counts["inactive"] + counts["settled"] + counts["streamed"]
            assert steered == case.rows, f"{steered} of {case.rows} rows were steered"

    n_bytes = float(sum(parameter.nbytes for parameter in model().parameters()))
    return Steps([step] * N_STEPS, check, n_bytes=n_bytes)


def generate(ids: Tensor) -> tuple[Times, Times]:
    """The time between tokens, and that of a token in total."""
    clock = Clock()
    start = time.perf_counter()
    out = model().generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        cache_implementation="static",
        logits_processor=LogitsProcessorList([clock]),
    )
    assert out.shape[1] == ids.shape[1] + NEW
    return Times.of(clock.intervals()), Times.of([(time.perf_counter() - start) / NEW])


def generating(case: Case, _backend: str) -> Steps:
    """A call of generate(), the best of three after one that compiles."""
    attached(case.name)
    ids = prompts(case.rows)

    def times() -> tuple[Times | None, Times]:
        torch.compiler.reset()
        runs = [generate(ids) for _ in range(4)][1:]
        between, total = min(runs, key=lambda run: run[0].mean)
        return (between, total) if ON_GPU else (None, between)

    return Steps([], times=times)


def cases(rows: Iterable[int]) -> Iterator[Case]:
    """The decoding steps, which need no compilation, before all calls of generate()."""
    names = ("unsteered", *STEERED)
    for n_rows, name in itertools.product(rows, names):
        yield Case("generate", f"{STEP}, {name}", "auto", SHAPE, n_rows, decoding_step)
    for n_rows, name in itertools.product(rows, names):
        yield Case("generate", name, "auto", SHAPE, n_rows, generating)
