"""Inputs of the ops in odd sizes, and how far rounding may move their results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspa_kernels import MapWeights, SAEWeights, SteeringPlan
from dspa_kernels.testing import random_map, random_plan, random_sae

from ..rounding import rounding

D_IN, D_SAE, D_SAE_IN, N_COLUMNS, N_SLOTS, N_PROMPTS = 19, 67, 31, 23, 6, 3
# Roundings in a row of an op: mean and scale of a row, both applied, the products with their sum and the bias; the edit
# with its sum, and the scale that is put back.
ROUNDINGS = 8
# No pre-activation may be nearer to its threshold, so that rounding decides no latent. Pre-activations are below 5.
MARGIN = rounding(3, D_IN**0.5 * 5)
# (residual, weights)
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float64),
    (torch.float64, torch.float32),
]
# A strength for each prompt, for the sums of integers exact.
PER_PLAN = torch.tensor([3, 0.125, 1])
# The one of a decoding step, which every backend takes.
BF16 = DTYPES[1]


@dataclass(frozen=True)
class Case:
    """Arguments of `steer`, by name."""

    h: Tensor
    sae: SAEWeights
    cdmap: MapWeights
    plan: SteeringPlan
    rows: Tensor

    def arguments(self, **others: Any) -> dict[str, Any]:
        return vars(self) | others


def integer_tensor(low: int, high: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def residual(n: int, dtype: torch.dtype, *, integers: bool = False, seed: int = 0, d_in: int = D_IN) -> Tensor:
    if integers:
        return integer_tensor(-2, 3, (n, d_in), seed).to(dtype)
    g = torch.Generator().manual_seed(seed)
    return (0.3 + torch.randn(n, d_in, generator=g, dtype=torch.float64)).to(dtype)


def make_case(
    kind: str = "jumprelu",
    dtypes: tuple[torch.dtype, torch.dtype] = DTYPES[0],
    *,
    n: int = 8,
    n_columns: int = N_COLUMNS,
    mode: str = "both",
    normalize: str = "none",
    integers: bool = False,
    k: int | None = None,
    seed: int = 0,
    d_in: int = D_IN,
) -> Case:
    """Return rows of three prompts and unsteered rows in turn. The last prompt steers nothing."""
    h_dtype, W_dtype = dtypes
    sae = random_sae(kind, d_in, D_SAE, dtype=W_dtype, seed=seed, normalize=normalize, integers=integers, k=k)
    plan = random_plan(N_PROMPTS, N_SLOTS, n_columns, mode=mode, seed=seed)
    plan.slots[-1], plan.signs[-1] = -1, 0
    return Case(
        h=residual(n, h_dtype, integers=integers, seed=seed, d_in=d_in),
        sae=sae,
        cdmap=random_map(sae, D_SAE_IN, n_columns, seed),
        plan=plan,
        rows=(torch.arange(n) % (N_PROMPTS + 1) - 1).to(torch.int32),
    )


# The same rows [N, d] in other layouts.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda h: h.T.contiguous().T,
    "every second row": lambda h: h.repeat_interleave(2, dim=0)[::2],
    "columns of a wider": lambda h: torch.cat([h, h, h], dim=1)[:, h.shape[1] : 2 * h.shape[1]],
    "every second column": lambda h: h.repeat_interleave(2, dim=1)[:, 1::2],
}
