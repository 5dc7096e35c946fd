"""The specification of `sparse_decode`, in plain PyTorch."""

from torch import Tensor

from dspa_kernels.formulas import compute_dtype


def sparse_decode(indices: Tensor, values: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """Return b_dec + sum_s values[n, s] W_dec[indices[n, s]], summed from the first place to the last."""
    dtype = compute_dtype(values, W_dec)
    out = values.new_zeros(len(indices), W_dec.shape[1], dtype=dtype)
    if b_dec is not None:
        out += b_dec.to(dtype)
    for latent, value in zip(indices.long().unbind(1), values.to(dtype).unbind(1), strict=True):
        present = latent[:, None] >= 0
        out += (value[:, None] * W_dec[latent.clamp(min=0)].to(dtype)).where(present, 0)
    return out.to(W_dec.dtype)
