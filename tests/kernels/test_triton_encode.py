"""The GEMM of `sparse_encode` and `activation_counts` with tensor descriptors, which only sm_90 uses by default."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from dspa_kernels import SAEWeights, activation_counts, sparse_encode
from dspa_kernels.launch import Launch
from dspa_kernels.testing import KINDS, random_sae, run_on, same_bits

from . import oracle
from .cases import D_SAE, integer_tensor

pytest.importorskip("triton", reason="Triton is not installed")
from dspa_kernels.ops.shared import triton_encode

# Rows of 48 bytes, which descriptors take, in steps of 16 numbers that do not divide them.
D_IN, N, N_SEQUENCES = 24, 83, 5
SEQUENCES = {
    "ragged": integer_tensor(-1, N_SEQUENCES, (N,), seed=1),
    "sorted": integer_tensor(-1, N_SEQUENCES, (N,), seed=1).sort().values,
    "one": torch.full((N,), 2, dtype=torch.int32),
    "none": torch.full((N,), -1, dtype=torch.int32),
    "beyond the last": integer_tensor(-1, 9, (N,), seed=1),
}


class Descriptors:
    """Launches with small tiles, through tensor descriptors or not, and the number of descriptors that were made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.made = mock.Mock(wraps=triton_encode.TensorDescriptor.from_tensor)
        monkeypatch.setattr(triton_encode, "TensorDescriptor", mock.Mock(from_tensor=self.made))
        monkeypatch.setattr(triton_encode, "GROUP_SIZE", 2)
        self.use(True)

    def use(self, descriptors: bool, rows: int = 16) -> None:
        launch = Launch(rows, 16, 16, num_warps=4, num_stages=2, programs=1, descriptors=descriptors)
        self.monkeypatch.setattr(triton_encode, "launch_parameters", lambda *_: launch)


@pytest.fixture
def descriptors(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> Descriptors:
    return Descriptors(monkeypatch)


def rows_of(dtype: torch.dtype) -> Tensor:
    return integer_tensor(-2, 3, (N, D_IN)).to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize("sequences", SEQUENCES)
def test_counts(descriptors: Descriptors, sequences: str, rows: int) -> None:
    """Tiles that end within all dimensions, with rows of one and of several words of bits."""
    descriptors.use(True, rows)
    sae = random_sae("jumprelu", D_IN, D_SAE, dtype=torch.bfloat16, integers=True)
    h, s = rows_of(torch.bfloat16), SEQUENCES[sequences]
    expected = oracle.counts(h, sae, torch.where(s < N_SEQUENCES, s, -1), N_SEQUENCES)
    assert expected.any() == (sequences != "none")
    assert torch.equal(run_on("triton", activation_counts, h, sae, s, N_SEQUENCES), expected)
    assert descriptors.made.call_count == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_latents_have_the_bits_that_pointers_give(descriptors: Descriptors, kind: str, dtype: torch.dtype) -> None:
    sae = random_sae(kind, D_IN, D_SAE, dtype=dtype)
    h = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(0)).to(dtype)
    h[5] = float("nan")
    with_descriptors = run_on("triton", sparse_encode, h, sae, capacity=D_SAE)
    assert descriptors.made.call_count == 2
    descriptors.use(False)
    with_pointers = run_on("triton", sparse_encode, h, sae, capacity=D_SAE)
    assert descriptors.made.call_count == 2 and with_pointers.counts[:5].all()
    for name in ("indices", "values", "counts"):
        assert same_bits(getattr(with_descriptors, name), getattr(with_pointers, name)), name


def offset(tensor: Tensor) -> Tensor:
    """A copy that begins 2 bytes after a multiple of 16."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor)


def narrow(h: Tensor, sae: SAEWeights) -> tuple[Tensor, SAEWeights]:
    """Rows and weights of 40 bytes a row."""
    return h[:, :20].clone(), random_sae("jumprelu", 20, D_SAE, dtype=h.dtype, integers=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "change",
    [
        narrow,
        lambda h, sae: (offset(h), sae),
        lambda h, sae: (h.float(), sae),
        lambda h, sae: (h, random_sae("jumprelu", D_IN, D_SAE, integers=True)),
    ],
    ids=["rows of 40 bytes", "an odd address", "fp32 rows", "fp32 weights"],
)
def test_other_operands_are_read_through_pointers(descriptors: Descriptors, change: Any) -> None:
    sae = random_sae("jumprelu", D_IN, D_SAE, dtype=torch.bfloat16, integers=True)
    h, sae = change(rows_of(torch.bfloat16), sae)
    expected = oracle.counts(h, sae, SEQUENCES["ragged"], N_SEQUENCES)
    assert torch.equal(run_on("triton", activation_counts, h, sae, SEQUENCES["ragged"], N_SEQUENCES), expected)
    assert not descriptors.made.called
