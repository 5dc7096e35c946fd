"""`activation_counts`: the number of rows of each sequence on which each latent is active."""

import torch
from torch import Tensor

from dspa_kernels.backends import choose, define_op
from dspa_kernels.checks import check_contiguous, check_device, check_dtype, check_shape, check_whole, refuse
from dspa_kernels.formulas import compute_dtype
from dspa_kernels.weights import ENCODER, FLOATS, SAEWeights


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
    check_shape("h", h, ("N", sae.d_in), "Flatten batch and sequence into one dimension.")
    check_dtype("h", h, FLOATS)
    check_device("sae", sae.encoder_rows, h, "h")
    check_shape("sequences", sequences, (h.shape[0],))
    check_dtype("sequences", sequences, (torch.int32,))
    check_device("sequences", sequences, h, "h")
    check_whole("n_sequences", n_sequences, 0)
    chosen = choose("activation_counts", h.device, backend, compute_dtype(h, sae.encoder_rows))
    if out is not None:
        check_shape("out", out, (n_sequences, sae.d_sae))
        check_dtype("out", out, (torch.int32,))
        check_device("out", out, h, "h")
        check_contiguous("out", out, "Pass a tensor of its own.")
    elif accumulate:
        raise refuse("accumulate", True, "False without `out`", "Pass the counts to add to as `out`.")
    if out is None:
        counts = torch.zeros(n_sequences, sae.d_sae, dtype=torch.int32, device=h.device)
    else:
        counts = out if accumulate else out.zero_()
    _activation_counts(h=h, **sae.encoder(), sequences=sequences, counts=counts, backend=chosen)
    return counts


def _fake(**_: object) -> None:
    return None


_activation_counts = define_op(
    "activation_counts",
    f"(Tensor h, {ENCODER}, Tensor sequences, Tensor(a!) counts) -> ()",
    _fake,
    mutates=("counts",),
)
