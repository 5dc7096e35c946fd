"""Cases of `activation_counts` and `activation_sums` on a ragged batch, compared with a dense formulation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.harness.cases import N_ROWS, Case, Shape, Steps, activity_of
from bench.harness.measure import DEVICE
from bench.ops.dense import dense_counts
from dspa_kernels import activation_counts, activation_sums
from dspa_kernels.launch import NATIVE, launch_parameters

N_SEQUENCES = 12


def ragged(n_rows: int) -> Tensor:
    """The sequence of each row: long and short ones, and rows of no sequence."""
    g = torch.Generator().manual_seed(0)
    ends = torch.randperm(n_rows - 1, generator=g)[: N_SEQUENCES - 1].sort().values
    sequences = torch.bucketize(torch.arange(n_rows), ends).to(torch.int32)
    return torch.where(torch.rand(n_rows, generator=g) < 0.02, -1, sequences)


def count(case: Case, backend: str) -> Steps:
    """One call over all rows."""
    activity = activity_of(case.shape)
    h, sae = activity.h, activity.sae
    sequences = ragged(len(h)).to(h.device)

    def run() -> Any:
        if backend == "torch":
            return dense_counts(h, sae, sequences, N_SEQUENCES)
        return activation_counts(h, sae, sequences, N_SEQUENCES, backend=backend)

    def check() -> None:
        wanted = activation_counts(h, sae, sequences, N_SEQUENCES, backend="reference")
        # Rounding decides whether a few are active; with 16-bit pre-activations, more.
        allowed = 0.05 if backend == "torch" else 1e-4
        different = float((run() - wanted).abs().sum())
        assert different <= allowed * float(wanted.sum()), f"{different:.0f} counts differ"

    n_flops = 2.0 * len(h) * sae.encoder_rows.numel()
    return Steps([run], check, capture=backend != "reference", n_flops=n_flops)


def add(case: Case, backend: str) -> Steps:
    """One call of `activation_sums` over all rows."""
    activity = activity_of(case.shape)
    h, sae = activity.h, activity.sae
    sequences = ragged(len(h)).to(h.device)

    def run(backend: str = backend) -> Any:
        return activation_sums(h, sae, sequences, N_SEQUENCES, backend=backend)

    def check() -> None:
        wanted = run("reference")
        # Rounding decides whether a few are active.
        different = float((run() - wanted).abs().sum())
        assert different <= 1e-3 * float(wanted.sum()), f"sums differ by {different:.3g}"

    n_flops = 2.0 * len(h) * sae.encoder_rows.numel()
    return Steps([run], check, capture=backend != "reference", n_flops=n_flops)


def cases(backends: Iterable[str], shape: Shape) -> Iterator[Case]:
    """One case per backend, "torch" for the dense formulation, and Triton with and without tensor descriptors."""
    for backend in backends:
        name = "dense PyTorch, eager" if backend == "torch" else "counts"
        yield Case("activation_counts", name, backend, shape, N_ROWS, count)
        if backend != "torch":
            yield Case("activation_sums", "sums", backend, shape, N_ROWS, add)
    present = launch_parameters("encode", N_ROWS, *shape, NATIVE, DEVICE)
    for parameters in (present, replace(present, descriptors=not present.descriptors)):
        yield Case("activation_counts", "counts", "triton", shape, N_ROWS, count, launch=parameters)
