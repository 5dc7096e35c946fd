"""`activation_sums`: the sum of each latent over the rows of each sequence."""

import torch
from torch import Tensor

from dspa_kernels.ops.shared.totals import define_totals, prepare_totals
from dspa_kernels.weights import SAEWeights


def activation_sums(
    h: Tensor,
    sae: SAEWeights,
    sequences: Tensor,
    n_sequences: int,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Sum the latents of each sequence, `sums[s, j] = sum of f[n, j] over its rows n`. The mean is that over rows.

    Triton adds with atomics, in an order that changes from call to call, so that the last bits of a sum may, too. The
    reference always gives the same bits.

    Args:
        h: residual rows [N, d_in], any floating dtype; N may be 0. A latent that is NaN is not active and adds nothing.
        sae: the SAE that reads them.
        sequences: [N] int32, the sequence of each row, below `n_sequences`. A row with a negative one is not summed.
        n_sequences: number of sequences S.
        out: [S, d_sae] fp32, contiguous, to write the sums to; by default a new tensor.
        accumulate: add to `out` in place of overwriting it. Tiles of rows that are not summed are skipped, as in
            `activation_counts`.
        backend: "auto", "reference" or "triton".

    Returns:
        sums [S, d_sae] fp32, `out` if it was passed. Not differentiable.

    Raises:
        InputError: an invalid shape, dtype or device.
        BackendError: the named backend cannot run.
    """
    sums, chosen = prepare_totals(
        "activation_sums", torch.float32, h, sae, sequences, n_sequences, out, accumulate, backend
    )
    _activation_sums(h=h, **sae.encoder(), sequences=sequences, sums=sums, backend=chosen)
    return sums


_activation_sums = define_totals("activation_sums", "sums")
