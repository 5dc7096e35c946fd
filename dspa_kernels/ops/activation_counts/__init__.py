"""`activation_counts`: the number of rows of each sequence on which each latent is active."""

import torch
from torch import Tensor

from dspa_kernels.backends import choose, define_op
from dspa_kernels.checks import check_device, check_dtype, check_shape, check_whole
from dspa_kernels.formulas import compute_dtype
from dspa_kernels.weights import ENCODER, FLOATS, SAEWeights


def activation_counts(
    h: Tensor, sae: SAEWeights, sequences: Tensor, n_sequences: int, *, backend: str = "auto"
) -> Tensor:
    """Count, for each sequence and latent, the rows on which the latent is active (`T_x rho`, DSPA).

    Args:
        h: residual rows [N, d_in], any floating dtype; N may be 0.
        sae: the SAE that reads them.
        sequences: [N] int32, the sequence of each row, below `n_sequences`. A row with a negative one is not counted.
        n_sequences: number of sequences S.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        counts [S, d_sae] int32. Not differentiable.

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
    counts: Tensor = _activation_counts(
        h=h,
        **sae.encoder(),
        sequences=sequences,
        n_sequences=n_sequences,
        backend=choose("activation_counts", h.device, backend, compute_dtype(h, sae.encoder_rows)),
    )
    return counts


def _fake(h: Tensor, encoder_rows: Tensor, n_sequences: int, **_: object) -> Tensor:
    return torch.empty(n_sequences, encoder_rows.shape[0], dtype=torch.int32, device=h.device)


_activation_counts = define_op(
    "activation_counts", f"(Tensor h, {ENCODER}, Tensor sequences, int n_sequences) -> Tensor", _fake
)
