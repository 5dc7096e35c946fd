"""Kernel microbenchmarks: every op on every backend that can run here, beside a dense PyTorch formulation.

`make bench` writes JSON. A result that differs from the dense one fails instead of being timed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dspa_kernels import MapWeights, SAEWeights, SteeringPlan, activation_counts, available_backends, steer
from dspa_kernels.testing import random_map, random_sae

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name, status in available_backends().items() if status.available]
SHAPES = [(2304, 16384)]
ROWS = [1, 8, 64]
ALPHA = 0.2


def timed(benchmark, run: Callable[[], object]) -> None:
    def synchronised() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=10, warmup_rounds=2)


def dense_steer(h: Tensor, sae: SAEWeights, cdmap: MapWeights, plan: SteeringPlan) -> Tensor:
    """Encode everything, edit, decode everything: what a script does without the package."""
    pre = h @ sae.W_enc.T + sae.b_enc
    f = pre * ((pre > sae.threshold) & (pre > 0))
    ablated = torch.zeros_like(f, dtype=torch.bool).scatter_(1, plan.latents(cdmap.columns).long(), True)
    edited = torch.where(ablated & (f > 0), (f - ALPHA * f.amax(dim=1, keepdim=True)).clamp(min=0), f)
    return h + (edited - f) @ sae.W_dec


def setting(shape: tuple[int, int], n_rows: int) -> tuple[Tensor, SAEWeights, MapWeights, SteeringPlan, Tensor]:
    d_in, d_sae = shape
    sae = random_sae("jumprelu", d_in, d_sae, dtype=torch.float32, seed=0).to(DEVICE)
    cdmap = random_map(sae, d_sae, 160, seed=1).to(DEVICE)
    generator = torch.Generator().manual_seed(2)
    h = torch.randn(n_rows, d_in, generator=generator).to(DEVICE)
    slots = torch.stack([torch.randperm(160, generator=generator)[:16] for _ in range(n_rows)]).to(torch.int32)
    plan = SteeringPlan(slots=slots, signs=torch.full_like(slots, -1, dtype=torch.int8)).to(DEVICE)
    return h, sae, cdmap, plan, torch.arange(n_rows, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("n_rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "dense"])
def test_steer(benchmark, backend, shape, n_rows):
    h, sae, cdmap, plan, rows = setting(shape, n_rows)
    benchmark.group = f"steer {shape}, {n_rows} rows, {DEVICE}"
    dense = dense_steer(h, sae, cdmap, plan)
    if backend == "dense":
        timed(benchmark, lambda: dense_steer(h, sae, cdmap, plan))
        return
    out = steer(h, sae, cdmap, plan, rows, alpha=ALPHA, backend=backend)
    torch.testing.assert_close(out, dense, atol=1e-3, rtol=1e-3)
    timed(benchmark, lambda: steer(h, sae, cdmap, plan, rows, alpha=ALPHA, backend=backend))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_counts(benchmark, backend, shape):
    h, sae, *_ = setting(shape, 512)
    sequences = torch.arange(512, dtype=torch.int32, device=DEVICE) // 128
    benchmark.group = f"activation_counts {shape}, 512 rows, {DEVICE}"
    timed(benchmark, lambda: activation_counts(h, sae, sequences, 4, backend=backend))
