"""Hugging Face `generate()` with and without steering: a model of Gemma-2-2B's size with random weights.

Time between tokens is read off the device, at each token's logits, so that the prompt's passes are left out.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import dspa
from bench.conftest import Record
from bench.harness.cases import ON_GPU
from bench.harness.measure import DEVICE, Times
from dspa.maps.cdmap import MapMeta

TINY: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "query_pre_attn_scalar": 16}
L_IN, L_OUT = (7, 24) if ON_GPU else (1, 2)
D_SAE, N_WORDS = (16384, 2048) if ON_GPU else (256, 200)
# Tokens of a prompt; tokens generated; of those the first, which are not timed.
PROMPT, NEW, WARM = (64, 256, 16) if ON_GPU else (8, 12, 4)
BATCHES = [1, 8] if ON_GPU else [1]
# Thresholds in units of a pre-activation's spread: 0.4 % of the latents are active above 2.6 of it. At 0 half of
# them are, and with both signs no step is settled early: each token reads the whole encoder.
STEERED = {"steered": (2.6, "ablate"), "steered, whole encoder at each token": (0.0, "both")}


@cache
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Gemma2Config(**({} if ON_GPU else TINY))
    with DEVICE:
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if ON_GPU else torch.float32)
    made.generation_config.eos_token_id = None
    return made.eval()


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<bos>": 1} | {f"w{n}": n + 2 for n in range(N_WORDS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", pad_token="<pad>", padding_side="left")


def text(g: torch.Generator, length: int) -> str:
    return " ".join(f"w{n}" for n in torch.randint(N_WORDS, (length,), generator=g).tolist())


def random_sae(layer: int, h: Tensor, spread: float) -> dspa.FrozenSAE:
    """Random unit rows, with thresholds at `spread` times the spread of their pre-activations on `h`."""
    g = torch.Generator(DEVICE).manual_seed(layer)
    W = torch.nn.functional.normalize(torch.randn(D_SAE, h.shape[-1], generator=g, device=DEVICE))
    level = spread * float((h.float() @ W[:256].T).std())
    return dspa.FrozenSAE(
        "jumprelu",
        W_enc=W.T.to(h.dtype),
        b_enc=torch.zeros(D_SAE, device=DEVICE),
        W_dec=W.to(h.dtype),
        threshold=torch.full((D_SAE,), level, device=DEVICE),
        layer=layer,
    )


def random_map(sae_in: dspa.FrozenSAE, sae_out: dspa.FrozenSAE, h: Tensor) -> dspa.ConditionalDifferenceMap:
    """Random entries in as many columns as published ones have, calibrated on residuals `h` [N, d_in]."""
    g = torch.Generator().manual_seed(0)
    n_columns, n_triples = min(160, D_SAE // 2), 24
    held = torch.bincount(sae_out.encode(h).argmax(dim=1), minlength=D_SAE).cpu()
    hot = held.argsort(descending=True, stable=True)[: int((held > 0).sum())]
    meta = MapMeta(
        sae_in=sae_in.fingerprint,
        sae_out=sae_out.fingerprint,
        model_name="",
        package=dspa.__version__,
        layer_in=L_IN,
        layer_out=L_OUT,
        d_sae_in=D_SAE,
        d_sae_out=D_SAE,
        n_triples=n_triples,
        n_cut=0,
        count_tokens="all",
        max_length=None,
        percentile=90.0,
        gate_rule="published",
        k_diff=16,
        sparsify=True,
    )
    return dspa.ConditionalDifferenceMap(
        torch.randperm(D_SAE, generator=g)[:n_columns].sort().values.to(torch.int32),
        torch.randn(D_SAE, n_columns, generator=g),
        n_open=torch.full((D_SAE,), n_triples, dtype=torch.int32),
        variance=torch.ones(n_columns),
        gate_latents=torch.zeros(0, dtype=torch.int32),
        gates=torch.zeros(0, -(-n_triples // 8), dtype=torch.uint8),
        meta=meta,
        hot=hot.to(torch.int32),
        hot_counts=held[hot],
        mean=h.float().mean(dim=0).cpu(),
    )


@lru_cache(maxsize=1)
def steering(case: str) -> dspa.Steering:
    """Random SAEs and a random map, of a realistic number of active latents."""
    ids = tokenizer()(text(torch.Generator().manual_seed(0), PROMPT), return_tensors="pt").input_ids.to(DEVICE)
    hidden = model()(ids, output_hidden_states=True).hidden_states
    spread, mode = STEERED[case]
    sae_in, sae_out = (random_sae(layer, hidden[layer + 1][0], spread) for layer in (L_IN, L_OUT))
    cdmap = random_map(sae_in, sae_out, hidden[L_OUT + 1][0])
    return dspa.Steering(sae_in, sae_out, cdmap, dspa.SteeringConfig(mode=mode))


class Clock(LogitsProcessor):
    """Notes when the logits of each token are there, without waiting for them."""

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
    """Time between tokens, and seconds in all."""
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
