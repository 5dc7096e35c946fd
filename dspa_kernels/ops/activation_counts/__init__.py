"""`activation_counts`: the number of rows of each sequence on which each latent is active."""

import torch
from torch import Tensor

from dspa_kernels.ops.shared.totals import define_totals, prepare_totals
from dspa_kernels.weights import SAEWeights


def activation_counts(
    h: Tensor,
    sae: SAEWeights,
    sequences: Tensor,
    n_sequences: int,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Count, for each sequence and latent, the rows on which the latent is active (`T_x rho`, DSPA).

    Args:
        h: residual rows [N, d_in], any floating dtype; N may be 0.
        sae: the SAE that reads them.
        sequences: [N] int32, the sequence of each row, below `n_sequences`. A row with a negative one is not counted.
        n_sequences: number of sequences S.
        out: [S, d_sae] int32, contiguous, to write the counts to; by default a new tensor.
        accumulate: add to `out` in place of overwriting it. Triton then writes counts of active latents alone, skips
            tiles of rows that are not counted, and reads nothing on the host, so that a captured graph can serve steps
            with and without rows to count.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        counts [S, d_sae] int32, `out` if it was passed. Not differentiable.

    Raises:
        InputError: an invalid shape, dtype or device.
        BackendError: the named backend cannot run.
    """
    counts, chosen = prepare_totals(
        "activation_counts", torch.int32, h, sae, sequences, n_sequences, out, accumulate, backend
    )
    _activation_counts(h=h, **sae.encoder(), sequences=sequences, counts=counts, backend=chosen)
    return counts


_activation_counts = define_totals("activation_counts", "counts")
