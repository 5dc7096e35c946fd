"""`sparse_encode`: the active latents of each row, without a dense `[N, d_sae]` result."""

import torch
from torch import Tensor

from dspa_kernels.backends import choose, define_op, refuse_backward
from dspa_kernels.checks import check_device, check_dtype, check_shape, refuse
from dspa_kernels.formulas import compute_dtype
from dspa_kernels.weights import ENCODER, FLOATS, SAEWeights, SparseLatents, check_k


def sparse_encode(h: Tensor, sae: SAEWeights, *, capacity: int | None = None, backend: str = "auto") -> SparseLatents:
    """Encode residual rows to their active latents.

    Args:
        h: residual rows [N, d_in], any floating dtype; N may be 0.
        sae: the SAE.
        capacity: places per row, 1 to d_sae, by default k of a top-k SAE. The values of a row with more active latents
            are all NaN, and its count shows how many there are.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        `SparseLatents` of `capacity` places per row, with values in at least fp32. Not differentiable.

    Raises:
        InputError: an invalid shape, dtype, device or capacity.
        BackendError: the named backend cannot run.
    """
    check_shape("h", h, ("N", sae.d_in), "Flatten batch and sequence into one dimension.")
    check_dtype("h", h, FLOATS)
    check_device("sae", sae.encoder_rows, h, "h")
    if capacity is None:
        if not sae.k:
            raise refuse("capacity", None, "1 to d_sae", "Only a top-k SAE bounds its active latents by itself.")
        capacity = sae.k
    check_k("capacity", capacity, sae.d_sae)
    backend = choose("sparse_encode", h.device, backend, compute_dtype(h, sae.encoder_rows))
    return SparseLatents(*_sparse_encode(h=h, **sae.encoder(), capacity=capacity, backend=backend))


def _fake(h: Tensor, encoder_rows: Tensor, capacity: int, **_: object) -> tuple[Tensor, Tensor, Tensor]:
    indices = h.new_empty(h.shape[0], capacity, dtype=torch.int32)
    values = h.new_empty(indices.shape, dtype=compute_dtype(h, encoder_rows))
    return indices, values, h.new_empty(h.shape[0], dtype=torch.int32)


_sparse_encode = define_op("sparse_encode", f"(Tensor h, {ENCODER}, int capacity) -> (Tensor, Tensor, Tensor)", _fake)
refuse_backward("sparse_encode")
