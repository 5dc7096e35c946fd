"""Arguments that are no tensors, no whole numbers, or of kinds that an op would convert in silence."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dspa_kernels import (
    BackendError,
    EncoderStream,
    InputError,
    MapWeights,
    SAEWeights,
    SteeringPlan,
    activation_counts,
    fsrl_residual,
    map_lookup,
    sparse_encode,
    steer,
)
from dspa_kernels.nn import FusedSAE

N, D_IN, D_SAE, C = 3, 8, 16, 4
G = torch.Generator().manual_seed(0)
H, ROWS, BIAS = torch.randn(N, D_IN, generator=G), torch.randn(D_SAE, D_IN, generator=G), torch.zeros(D_SAE)
SAE = SAEWeights(ROWS, BIAS, BIAS, ROWS)
COLUMNS, VALUES = torch.arange(C), torch.randn(5, C, generator=G)
MAP = MapWeights.gather(COLUMNS, VALUES, SAE)
PLAN = SteeringPlan(torch.zeros(N, 1, dtype=torch.int32), torch.ones(N, 1, dtype=torch.int8))
COUNTS = torch.ones(1, 5, dtype=torch.int32)
SEQUENCES = torch.zeros(N, dtype=torch.int32)

CALLS: dict[str, tuple[Callable[[Any], object], tuple[Any, ...]]] = {
    "h": (lambda h: steer(h, SAE, MAP, PLAN), (H.tolist(), None, "h", H.numpy(), H.to(torch.complex64))),
    "alpha": (lambda alpha: steer(H, SAE, MAP, PLAN, alpha=alpha), ("0.2", None, 1j, [0.2], float("nan"))),
    "backend": (lambda backend: steer(H, SAE, MAP, PLAN, backend=backend), (["triton"], None, {}, "Triton")),
    "encoder_rows": (lambda rows: SAEWeights(rows, BIAS, BIAS, ROWS), (ROWS.tolist(), None)),
    "b_enc": (lambda bias: SAEWeights(ROWS, bias, BIAS, ROWS), (None, 0.0, BIAS.tolist())),
    "k": (lambda k: SAEWeights(ROWS, BIAS, BIAS, ROWS, k=k), (1.5, True, "3", None, -1, D_SAE + 1)),
    "columns": (lambda columns: MapWeights.gather(columns, VALUES, SAE), (COLUMNS + 0.7, COLUMNS > 1, [0, 1, 2, 3])),
    "values": (lambda values: MapWeights.gather(COLUMNS, values, SAE), (VALUES.to(torch.complex64), VALUES > 0)),
    "hot": (lambda hot: EncoderStream.of(SAE, hot=hot), (torch.tensor([1.5]), [1], torch.ones(D_SAE) > 0)),
    "n_large": (lambda n: EncoderStream.of(SAE, hot=COLUMNS, n_large=n), (-3, 1.5, True, "4")),
    "mean": (lambda mean: EncoderStream.of(SAE, mean=mean), (H[0].to(torch.complex64), [0.0] * D_IN)),
    "capacity": (lambda n: sparse_encode(H, SAE, capacity=n), (True, 2.5, "4", 0, D_SAE + 1)),
    "capacity ": (lambda n: FusedSAE(SAE, capacity=n), (True, 2.5, "4", 0, D_SAE + 1)),
    "n_sequences": (lambda n: activation_counts(H, SAE, SEQUENCES, n), (3.5, True, "3", None, -1)),
    "k_prompt": (lambda k: map_lookup(COUNTS, VALUES, k_prompt=k), (3.0, True, "3", 6)),
    "k_diff": (lambda k: map_lookup(COUNTS, VALUES, k_prompt=1, k_diff=k), (True, 1.0, None)),
}
CASES = [(name, number) for name, (_, values) in CALLS.items() for number in range(len(values))]


@pytest.mark.parametrize(("name", "number"), CASES)
def test_an_argument_of_another_kind_is_refused_by_name(name: str, number: int) -> None:
    call, values = CALLS[name]
    with pytest.raises(InputError, match=f"{re.escape(name.strip())}` is .*; accepted: "):
        call(values[number])


@pytest.mark.parametrize("shape", [(0, D_IN), (D_SAE, 0), (0, 0)])
def test_an_sae_without_latents_or_width_is_refused(shape: tuple[int, int]) -> None:
    rows = torch.zeros(shape)
    with pytest.raises(InputError, match=r"encoder_rows` is of shape .* both >= 1"):
        SAEWeights(rows, rows.new_zeros(shape[0]), rows.new_zeros(shape[0]), rows)


def test_whole_numbers_of_other_types() -> None:
    assert sparse_encode(H, SAE, capacity=torch.tensor(D_SAE)).counts.shape == (N,)  # type: ignore[arg-type]
    assert MapWeights.gather(COLUMNS.to(torch.uint8), VALUES, SAE).columns.tolist() == COLUMNS.tolist()


def adapted(h: Tensor) -> Tensor:
    return fsrl_residual(h, SAE, torch.zeros(D_SAE, D_IN), BIAS, BIAS).h


def steered(h: Tensor) -> Tensor:
    return steer(h, SAE, MAP, PLAN)


def encoded(h: Tensor) -> Tensor:
    return sparse_encode(h, SAE, capacity=D_SAE).values


@pytest.mark.parametrize("function", [adapted, steered, encoded, FusedSAE(SAE)])
def test_a_forward_mode_derivative_is_refused_and_never_0(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(BackendError, match="no forward-mode derivative"):
        torch.func.jvp(function, (H,), (torch.ones_like(H),))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(BackendError, match="no forward-mode derivative"),
    ):
        function(torch.autograd.forward_ad.make_dual(H, torch.ones_like(H)))


def test_constants_within_a_forward_mode_derivative() -> None:
    _, tangent = torch.func.jvp(lambda x: x * steered(H), (H,), (torch.ones_like(H),))
    assert torch.equal(tangent, steered(H))
