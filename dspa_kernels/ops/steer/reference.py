"""The specification of `steer`, in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from dspa_kernels.formulas import (
    AUGMENT_ALWAYS,
    CLAMP,
    CLAMP_ALWAYS,
    compute_dtype,
    is_active,
    is_finite,
    latent_blocks,
    normalise,
    pre_activations,
)


def _stream(
    hn: Tensor,
    encoder_rows: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    k: int,
    order: Tensor,
    picked: Tensor,
    latents: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the largest latent of each row [N], and the number of latents that beat each picked one [N, S].

    The encoder is read once, block by block. Only a top-k SAE needs the second result.
    """
    running_max = hn.new_zeros(len(hn))
    beaten = torch.zeros_like(latents)
    for block in latent_blocks(len(hn), len(encoder_rows)):
        pre = pre_activations(hn, encoder_rows[block], b_enc[block])
        if not k:
            pre = torch.where(is_active(pre, threshold[block]), pre, 0)
        running_max = torch.maximum(running_max, pre.amax(dim=1))
        index = order[block]
        for slot in range(latents.shape[1]) if k else ():
            own, value = latents[:, slot, None], picked[:, slot, None]
            ahead = (pre > value) | ((pre == value) & (index < own))
            beaten[:, slot] += (ahead & (index != own)).sum(dim=1)
    return running_max, beaten


def steered_rows(n_rows: int, rows: Tensor | None, positions: Tensor | None, start: Tensor | None) -> Tensor:
    """Return the plan row of each residual row [N] int64, -1 where it is not steered."""
    device = None if start is None else start.device
    prompt = torch.arange(n_rows, device=device) if rows is None else rows.long()
    if positions is None or start is None:
        return prompt
    # A negative row takes the last one, which is arbitrary.
    first = torch.cat([start, start.new_zeros(1)])[prompt]
    return torch.where(positions >= first, prompt, -1)


def _moved(f: Tensor, sign: Tensor, s: Tensor) -> Tensor:
    """Return f': max(f - s, 0) (ABLATE), max(f + s, 0) (AUGMENT), f + s (AUGMENT_ALWAYS) or s (both CLAMP)."""
    summed = torch.where(sign < 0, f - s, f + s)
    summed = torch.where(sign == AUGMENT_ALWAYS, summed, summed.clamp(min=0))
    return torch.where((sign == CLAMP) | (sign == CLAMP_ALWAYS), s, summed)


def steer(h: Tensor, **arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return h', in which only the rows that change differ from h, and before, after and maximum as `edits_of`."""
    out = h.clone(memory_format=torch.contiguous_format)
    changed, rows, before, after, maximum = edits_of(h, **arguments)
    out[changed] = rows
    return out, before, after, maximum


def steer_(h: Tensor, residual: Tensor | None, **arguments: Any) -> None:
    """Set the rows of h that change to (h + residual)', and those of the residual to 0. Others keep their bits."""
    changed, rows, *_ = edits_of(h if residual is None else h + residual, **arguments, record=False)
    h[changed] = rows
    if residual is not None:
        residual[changed] = 0


def edits_of(
    h: Tensor,
    encoder_rows: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    k: int,
    normalize: str,
    order: Tensor | None,
    n_large: int,
    columns: Tensor,
    columns_encoder_rows: Tensor,
    columns_b_enc: Tensor,
    columns_threshold: Tensor,
    columns_W_dec: Tensor,
    slots: Tensor,
    signs: Tensor,
    rows: Tensor | None,
    positions: Tensor | None,
    start: Tensor | None,
    paths: Tensor | None,
    alpha: float,
    alphas: Tensor | None,
    record: bool,
    strengths: Tensor | None = None,
    **_screen: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return h'_n = h_n + scale_n sum_j (f'_j - f_j) W_dec[j], over the active latents j of plan row rows[n].

    f'_j = f_j + alpha M (sign +1) or max(f_j - alpha M, 0) (sign -1), with M the maximum of all latents of the row
    and alpha = alphas[rows[n]] if there are `alphas`. With `strengths`, f'_j is that of `_moved`.
    A row with rows[n] < 0, without an active selected latent, or without a change stays. So does a steered row that is
    not finite, and its maximum is NaN. A row that is not finite once edited counts in paths[1] as well. The selected
    and the first `n_large` latents give a lower bound on M. Unless recorded, the encoder is not read for a row whose
    active selected latents all go to 0 by that bound, nor with `strengths` except for the ranks of top-k latents.

    Returns:
        the rows that change [E] int64, their h' [E, d_in], and before, after and maximum.
    """
    dtype = compute_dtype(h, encoder_rows)
    before = torch.zeros(len(h) if record else 0, slots.shape[1], dtype=dtype, device=h.device)
    after = torch.zeros_like(before)
    maximum = torch.zeros(len(before), dtype=dtype, device=h.device)

    prompt = steered_rows(len(h), rows, positions, start).to(h.device)
    row = (prompt >= 0).nonzero().flatten()
    finite = is_finite(h[row])
    if record:
        maximum[row[~finite]] = float("nan")
    counts = [len(h) - len(row), int((~finite).sum())]
    row = row[finite]
    hn, _, scale = normalise(h[row], normalize, dtype)
    slot, sign = slots[prompt[row]].long(), signs[prompt[row]]
    chosen, slot = slot >= 0, slot.clamp(min=0)
    strength: float | Tensor = alpha if alphas is None else alphas[prompt[row], None].to(dtype)
    if columns.numel():
        f = pre_activations(hn, columns_encoder_rows, columns_b_enc).gather(1, slot)
        active = chosen & (f > 0 if k else is_active(f, columns_threshold[slot]))
        f = torch.where(active, f, 0)
    else:
        f = hn.new_zeros(slot.shape)
        active = torch.zeros_like(chosen)

    # Only rows with an active selected latent need the maximum, and only some of those read the encoder.
    always = sign >= AUGMENT_ALWAYS
    open_rows = (active | always).any(dim=1)
    large = pre_activations(hn, encoder_rows[:n_large], b_enc[:n_large])
    large = large.clamp(min=0) if k else torch.where(is_active(large, threshold[:n_large]), large, 0)
    bound = torch.cat([f, large], dim=1).amax(dim=1) if f.shape[1] + n_large else hn.new_zeros(len(hn))
    if strengths is None:
        gone = ~active | ((sign < 0) & (f <= strength * bound[:, None]))
        settled = open_rows & gone.all(dim=1) & (not record and not k)
    else:
        # What is added in every row needs no rank of its latent, unless its value is recorded.
        ranked = active & (record | (sign != AUGMENT_ALWAYS)) & (k > 0)
        settled = open_rows & ~ranked.any(dim=1)
    streamed = open_rows & ~settled
    counts += [int(path.sum()) for path in (~open_rows, settled, streamed)]
    if paths is not None:
        read = len(encoder_rows) if counts[-1] else 0
        paths += torch.tensor([*counts, read], device=paths.device)
    if not open_rows.any():
        return row[:0], h[:0], before, after, maximum

    at = streamed.nonzero().flatten()
    if len(at):
        index = torch.arange(len(encoder_rows), device=h.device) if order is None else order.long()
        latents = columns.long()[slot[at]]
        largest, beaten = _stream(hn[at], encoder_rows, b_enc, threshold, k, index, f[at], latents)
        bound[at] = torch.maximum(bound[at], largest)
        if k:
            active[at] &= beaten < k
    f = torch.where(active, f, 0)
    if strengths is None:
        step = strength * bound[:, None]
        edited = torch.where(sign > 0, f + step, (f - step).clamp(min=0))
    else:
        edited = _moved(f, sign, strengths[prompt[row]].to(dtype))
    edited = torch.where(active | always, edited, 0)
    if record:
        before[row], after[row] = f, edited
        maximum[row] = torch.where(active.any(dim=1), bound, 0)

    changed = (edited != f).any(dim=1)
    change = torch.zeros(len(row), len(columns), dtype=dtype, device=h.device)
    change.scatter_add_(1, slot, edited - f)
    delta = change[changed] @ columns_W_dec.to(dtype) * scale[changed]
    steered = (h[row[changed]].to(dtype) + delta).to(h.dtype)
    if paths is not None:
        paths[1] += (~is_finite(steered)).sum()
    return row[changed], steered, before, after, maximum
