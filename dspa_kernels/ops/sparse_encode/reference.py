"""The specification of `sparse_encode`, in plain PyTorch."""

import torch
from torch import Tensor

from dspa_kernels.formulas import active_latents, compute_dtype, normalise, pre_activations, row_blocks


def sparse_encode(
    h: Tensor, encoder_rows: Tensor, b_enc: Tensor, threshold: Tensor, k: int, normalize: str, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return indices, values and counts of the active latents of each row, in order of index.

    The values are NaN where the latents exceed the capacity, or the row is not finite.
    """
    dtype = compute_dtype(h, encoder_rows)
    hn = normalise(h, normalize, dtype).rows
    indices = torch.full((len(h), capacity), -1, dtype=torch.int32, device=h.device)
    values = torch.zeros(len(h), capacity, dtype=dtype, device=h.device)
    counts = torch.zeros(len(h), dtype=torch.int32, device=h.device)
    for rows in row_blocks(len(h), len(encoder_rows)):
        pre = pre_activations(hn[rows], encoder_rows, b_enc)
        active = active_latents(pre, threshold, k)
        counts[rows] = active.sum(dim=1, dtype=torch.int32)
        place = active.cumsum(dim=1) - 1
        row, latent = (active & (place < capacity)).nonzero(as_tuple=True)
        slot = place[row, latent]
        indices[rows][row, slot] = latent.to(torch.int32)
        values[rows][row, slot] = pre[row, latent]
    values[(counts > capacity) | ~h.isfinite().all(dim=1)] = float("nan")
    return indices, values, counts
