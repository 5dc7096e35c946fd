"""Totals of rows per sequence and latent: what `activation_counts` and `activation_sums` have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dspa_kernels.backends import choose, define_op
from dspa_kernels.checks import check_contiguous, check_device, check_dtype, check_shape, check_whole, refuse
from dspa_kernels.formulas import compute_dtype
from dspa_kernels.weights import ENCODER, FLOATS, SAEWeights


def _fake(**_: object) -> None:
    return None


def define_totals(op: str, totals: str) -> Callable[..., Any]:
    """Register an op that adds to its argument `totals` [S, d_sae], and return a function that calls it."""
    schema = f"(Tensor h, {ENCODER}, Tensor sequences, Tensor(a!) {totals}) -> ()"
    return define_op(op, schema, _fake, mutates=(totals,))


def prepare_totals(
    op: str,
    dtype: torch.dtype,
    h: Tensor,
    sae: SAEWeights,
    sequences: Tensor,
    n_sequences: int,
    out: Tensor | None,
    accumulate: bool,
    backend: str,
) -> tuple[Tensor, str]:
    """Check the arguments of `op`, and return the totals [S, d_sae] of `dtype` to add to, with the backend to run.

    Raises:
        InputError: an invalid shape, dtype or device.
        BackendError: the named backend cannot run.
    """
    check_shape("h", h, ("N", sae.d_in), "Flatten batch and sequence into one dimension.")
    check_dtype("h", h, FLOATS)
    check_device("sae", sae.encoder_rows, h, "h")
    check_shape("sequences", sequences, (h.shape[0],))
    check_dtype("sequences", sequences, (torch.int32,))
    check_device("sequences", sequences, h, "h")
    check_whole("n_sequences", n_sequences, 0)
    chosen = choose(op, h.device, backend, compute_dtype(h, sae.encoder_rows))
    if out is not None:
        check_shape("out", out, (n_sequences, sae.d_sae))
        check_dtype("out", out, (dtype,))
        check_device("out", out, h, "h")
        check_contiguous("out", out, "Pass a tensor of its own.")
        return (out if accumulate else out.zero_()), chosen
    if accumulate:
        raise refuse("accumulate", True, "False without `out`", "Pass the totals to add to as `out`.")
    return torch.zeros(n_sequences, sae.d_sae, dtype=dtype, device=h.device), chosen
