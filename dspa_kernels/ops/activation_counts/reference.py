"""The specification of `activation_counts`, in plain PyTorch."""

from torch import Tensor

from dspa_kernels.ops.shared.reference import add_totals


def activation_counts(
    h: Tensor,
    encoder_rows: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    k: int,
    normalize: str,
    sequences: Tensor,
    counts: Tensor,
) -> None:
    """counts[s, j] += number of rows n with sequences[n] = s on which latent j is active."""
    add_totals(h, encoder_rows, b_enc, threshold, k, normalize, sequences, counts, lambda _, active: active)
