"""The specification of `steer`, in plain PyTorch."""

import torch
from torch import Tensor

from dspa_kernels.ops.common import compute_dtype, is_active, latent_blocks, normalise, pre_activations


def _stream(
    hn: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k: int, picked: Tensor, latents: Tensor
) -> tuple[Tensor, Tensor]:
    """The largest latent of each row [N], and by how many others each picked latent is beaten [N, S].

    Reads the encoder once, block by block. Only a top-k SAE needs the second answer.
    """
    maximum = hn.new_zeros(len(hn))
    beaten = torch.zeros_like(latents)
    for block in latent_blocks(len(hn), len(W_enc)):
        pre = pre_activations(hn, W_enc[block], b_enc[block])
        if not k:
            pre = torch.where(is_active(pre, threshold[block]), pre, 0)
        maximum = torch.maximum(maximum, pre.amax(dim=1))
        index = torch.arange(block.start, block.stop, device=hn.device)
        for slot in range(latents.shape[1]) if k else ():
            own, value = latents[:, slot, None], picked[:, slot, None]
            ahead = (pre > value) | ((pre == value) & (index < own))
            beaten[:, slot] += (ahead & (index != own)).sum(dim=1)
    return maximum, beaten


def steer(
    h: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    k: int,
    normalize: str,
    columns: Tensor,
    columns_W_enc: Tensor,
    columns_b_enc: Tensor,
    columns_threshold: Tensor,
    columns_W_dec: Tensor,
    slots: Tensor,
    signs: Tensor,
    rows: Tensor,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h'_n = h_n + scale_n sum_j (f'_j - f_j) W_dec[j] over the active latents j of plan row rows[n].

    f'_j = f_j + alpha M (sign +1) or max(f_j - alpha M, 0) (sign -1), M = max over all latents of f.
    A row with rows[n] < 0, without an active selected latent, or without a change is copied. A steered row
    that is not finite is copied too, and its maximum is NaN.
    """
    dtype = compute_dtype(h, W_enc)
    out = h.clone(memory_format=torch.contiguous_format)
    before = torch.zeros(len(h), slots.shape[1], dtype=dtype, device=h.device)
    after = torch.zeros_like(before)
    maximum = torch.zeros(len(h), dtype=dtype, device=h.device)

    row = (rows >= 0).nonzero().flatten()
    finite = h[row].isfinite().all(dim=1)
    maximum[row[~finite]] = float("nan")
    row = row[finite]
    if not columns.numel():
        return out, before, after, maximum
    hn, scale = normalise(h[row], normalize, dtype)
    slot, sign = slots[rows[row].long()].long(), signs[rows[row].long()]
    chosen, slot = slot >= 0, slot.clamp(min=0)
    f = pre_activations(hn, columns_W_enc, columns_b_enc).gather(1, slot)
    active = chosen & (f > 0 if k else is_active(f, columns_threshold[slot]))
    # Only rows with an active selected latent need the maximum, so only they read the whole encoder.
    needed = active.any(dim=1)
    if not needed.any():
        return out, before, after, maximum
    row, hn, scale, slot, sign, f, active = (each[needed] for each in (row, hn, scale, slot, sign, f, active))

    largest, beaten = _stream(hn, W_enc, b_enc, threshold, k, f, columns.long()[slot])
    if k:
        active &= beaten < k
    f = torch.where(active, f, 0)
    largest = torch.maximum(largest, f.amax(dim=1))
    step = alpha * largest[:, None]
    edited = torch.where(sign > 0, f + step, (f - step).clamp(min=0))
    edited = torch.where(active, edited, 0)
    before[row], after[row] = f, edited
    maximum[row] = torch.where(active.any(dim=1), largest, 0)

    change = torch.zeros(len(row), len(columns), dtype=dtype, device=h.device)
    change.scatter_add_(1, slot, edited - f)
    changed = (edited != f).any(dim=1)
    delta = change[changed] @ columns_W_dec.to(dtype) * scale[changed]
    out[row[changed]] = (h[row[changed]].to(dtype) + delta).to(h.dtype)
    return out, before, after, maximum
