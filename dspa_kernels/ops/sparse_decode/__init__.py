"""`sparse_decode`: residual rows from their active latents."""

import torch
from torch import Tensor

from dspa_kernels.backends import choose, define_op, refuse_backward
from dspa_kernels.checks import check_device, check_dtype, check_shape
from dspa_kernels.formulas import compute_dtype
from dspa_kernels.weights import FLOATS, SparseLatents


def sparse_decode(
    latents: SparseLatents, W_dec: Tensor, b_dec: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Decode sparse latents: `b_dec + sum_j f_j W_dec[j]`.

    Args:
        latents: N rows of at most K active latents; an index of -1 marks an empty place. Kernels do not check indices,
            and read other memory if one is d_sae or more.
        W_dec: [d_sae, d_out], one contiguous row per latent.
        b_dec: [d_out] or None.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        [N, d_out] in the dtype of W_dec, summed in at least fp32. Rows that exceeded their capacity when they were
        encoded are NaN. The normalisation of an SAE is not undone. Not differentiable.

    Raises:
        InputError: an invalid shape, dtype or device.
        BackendError: the named backend cannot run.
    """
    check_shape("W_dec", W_dec, ("d_sae", "d_out"))
    check_dtype("W_dec", W_dec, FLOATS)
    check_shape("latents.indices", latents.indices, ("N", "K"))
    check_dtype("latents.indices", latents.indices, (torch.int32,))
    check_shape("latents.values", latents.values, latents.indices.shape)
    check_dtype("latents.values", latents.values, FLOATS)
    check_device("latents.indices", latents.indices, W_dec, "W_dec")
    check_device("latents.values", latents.values, W_dec, "W_dec")
    if b_dec is not None:
        check_shape("b_dec", b_dec, (W_dec.shape[1],))
        check_dtype("b_dec", b_dec, FLOATS)
        check_device("b_dec", b_dec, W_dec, "W_dec")
    out: Tensor = _sparse_decode(
        indices=latents.indices,
        values=latents.values,
        W_dec=W_dec,
        b_dec=b_dec,
        backend=choose("sparse_decode", W_dec.device, backend, compute_dtype(latents.values, W_dec)),
    )
    return out


def _fake(indices: Tensor, W_dec: Tensor, **_: object) -> Tensor:
    return W_dec.new_empty(indices.shape[0], W_dec.shape[1])


_sparse_decode = define_op(
    "sparse_decode", "(Tensor indices, Tensor values, Tensor W_dec, Tensor? b_dec) -> Tensor", _fake
)
refuse_backward("sparse_decode")
