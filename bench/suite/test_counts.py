"""`activation_counts` on a ragged batch, compared with a dense formulation and the rate of a matrix product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.conftest import Measure
from bench.harness.cases import backends
from dspa_kernels import SAEWeights, activation_counts
from dspa_kernels.testing import Activity

N_SEQUENCES = 12


def ragged(n_rows: int) -> Tensor:
    """The sequence of each row: long and short ones, and rows of no sequence."""
    g = torch.Generator().manual_seed(0)
    ends = torch.randperm(n_rows - 1, generator=g)[: N_SEQUENCES - 1].sort().values
    sequences = torch.bucketize(torch.arange(n_rows), ends).to(torch.int32)
    return torch.where(torch.rand(n_rows, generator=g) < 0.02, -1, sequences)


def dense_counts(h: Tensor, sae: SAEWeights, sequences: Tensor) -> Tensor:
    counts = torch.zeros(N_SEQUENCES + 1, sae.d_sae, dtype=torch.int32, device=h.device)
    for rows, sequence in zip(h.split(512), sequences.split(512), strict=True):
        pre = rows @ sae.W_enc + sae.b_enc.to(h.dtype)
        counts.index_add_(0, sequence % (N_SEQUENCES + 1), ((pre > sae.threshold) & (pre > 0)).to(torch.int32))
    return counts[:-1]


@pytest.mark.parametrize("backend", [*backends("activation_counts"), "torch"])
def test_activation_counts(measure: Measure, activity: Activity, backend: str) -> None:
    h, sae = activity.h, activity.sae
    sequences = ragged(len(h)).to(h.device)
    wanted = activation_counts(h, sae, sequences, N_SEQUENCES, backend="reference")

    def run() -> Any:
        if backend == "torch":
            return dense_counts(h, sae, sequences)
        return activation_counts(h, sae, sequences, N_SEQUENCES, backend=backend)

    # Rounding decides whether a few are active; with 16-bit pre-activations, more.
    allowed = 0.05 if backend == "torch" else 1e-4
    assert float((run() - wanted).abs().sum()) <= allowed * float(wanted.sum())
    measure(
        [run],
        capture=backend != "reference",
        n_flops=2 * len(h) * sae.encoder_rows.numel(),
        op="activation_counts",
        case="counts" if backend != "torch" else "dense PyTorch, eager",
        backend=backend,
        shape=(sae.d_in, sae.d_sae),
        rows=len(h),
    )
