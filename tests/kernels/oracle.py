"""SPEC.md, sections 1 and 3, in loops over rows and latents: the oracle of every op's tests.

It shares nothing with the package's references. In fp64 it gives the exact answer, and in fp32 the plain computation
whose error an op may have.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspa_kernels import MapWeights, SAEWeights, SteeringPlan

Array = np.ndarray[Any, np.dtype[Any]]
Latents = dict[int, float]
EXACT = np.float64


def array(tensor: Tensor, dtype: Any = EXACT) -> Array:
    return tensor.detach().double().numpy().astype(dtype)


def plain_dtype(h: Tensor, sae: SAEWeights) -> Any:
    """Return the dtype that an op computes in."""
    return np.float64 if torch.float64 in (h.dtype, sae.encoder_rows.dtype) else np.float32


def pre_activations(row: Array, sae: SAEWeights, dtype: Any = EXACT) -> tuple[Array, float]:
    """Return the pre-activations [d_sae] of one row, and the scale that normalising it took out."""
    scale = dtype(1)
    if sae.normalize == "layer_norm":
        row = row - row.mean()
        scale = row.std(ddof=1)
        row = row / (scale + dtype(1e-5))
    elif sae.normalize == "constant_norm_rescale":
        scale = np.sqrt((row * row).sum()) / dtype(np.sqrt(len(row)))
        row = row / scale
    encoder_rows, b_enc = array(sae.encoder_rows, dtype), array(sae.b_enc, dtype)
    return np.array([np.dot(row, encoder_rows[j]) + b_enc[j] for j in range(sae.d_sae)], dtype), scale


def active(pre: Array, sae: SAEWeights) -> Latents:
    """Return the values of the active latents of one row, by index."""
    if sae.k:
        ranked = sorted(range(len(pre)), key=lambda j: (-pre[j], j))
        return {j: pre[j] for j in sorted(ranked[: sae.k]) if pre[j] > 0}
    threshold = array(sae.threshold, pre.dtype)
    return {j: pre[j] for j in range(len(pre)) if pre[j] > threshold[j] and pre[j] > 0}


def margin(h: Tensor, sae: SAEWeights) -> float:
    """Return the least distance of a latent from the other side of its threshold, over all rows."""
    nearest = np.inf
    for row in array(h):
        pre, _ = pre_activations(row, sae)
        decided = [abs(pre).min()]
        if 0 < sae.k < sae.d_sae:
            ranked = np.sort(pre)[::-1]
            decided.append(ranked[sae.k - 1] - ranked[sae.k])
        if not sae.k:
            decided.append(abs(pre - array(sae.threshold)).min())
        nearest = min(nearest, *decided)
    return float(nearest)


def encode(h: Tensor, sae: SAEWeights, dtype: Any = EXACT) -> list[Latents]:
    return [active(pre_activations(row, sae, dtype)[0], sae) for row in array(h, dtype)]


def counts(h: Tensor, sae: SAEWeights, sequences: Tensor, n_sequences: int) -> Tensor:
    result = torch.zeros(n_sequences, sae.d_sae, dtype=torch.int32)
    for latents, sequence in zip(encode(h, sae), sequences.tolist(), strict=True):
        for j in latents if sequence >= 0 else ():
            result[sequence, j] += 1
    return result


def lookup(
    counts: Tensor, values: Tensor, k_prompt: int, k_diff: int, mode: str
) -> tuple[list[list[int]], list[list[int]]]:
    """Return slots and signs of a plan. Scores are summed in fp32 from the largest count to the smallest."""
    A = values.numpy()
    slots, signs = [], []
    for prompt in counts.tolist():
        ranked = sorted(range(len(prompt)), key=lambda i: (-prompt[i], i))
        score = np.zeros(A.shape[1], np.float32)
        for i in ranked[:k_prompt]:
            if prompt[i] > 0:
                score += A[i]
        slots.append([])
        signs.append([])
        for sign in {"augment": (1,), "ablate": (-1,), "both": (1, -1)}[mode]:
            best = sorted(range(len(score)), key=lambda c: (-sign * score[c], c))
            best = [c for c in best if sign * score[c] > 0][:k_diff]
            empty = k_diff - len(best)
            slots[-1] += best + [-1] * empty
            signs[-1] += [sign] * len(best) + [0] * empty
    return slots, signs


def steer(
    h: Tensor,
    sae: SAEWeights,
    cdmap: MapWeights,
    plan: SteeringPlan,
    rows: Tensor,
    alpha: float | Tensor,
    dtype: Any = EXACT,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return h', before, after and maximum in `dtype`. An unedited row of h' is the row of h."""
    out, W_dec, columns = array(h, dtype), array(sae.W_dec, dtype), cdmap.columns.tolist()
    before = np.zeros((len(h), plan.slots.shape[1]), dtype)
    after, maximum = np.zeros_like(before), np.zeros(len(h), dtype)
    for n, prompt in enumerate(rows.tolist()):
        if prompt < 0:
            continue
        if not np.isfinite(out[n]).all():
            maximum[n] = np.nan
            continue
        pre, scale = pre_activations(out[n], sae, dtype)
        latents = active(pre, sae)
        for s, (slot, sign) in enumerate(zip(plan.slots[prompt].tolist(), plan.signs[prompt].tolist(), strict=True)):
            if slot < 0 or columns[slot] not in latents:
                continue
            f = latents[columns[slot]]
            maximum[n] = max(latents.values())
            strength = alpha[prompt].item() if isinstance(alpha, Tensor) else alpha
            edited = f + dtype(strength) * maximum[n] * sign
            before[n, s], after[n, s] = f, max(edited, 0)
            out[n] += scale * (after[n, s] - f) * W_dec[columns[slot]]
    return tuple(torch.from_numpy(result) for result in (out, before, after, maximum))


def decode(indices: Tensor, values: Tensor, W_dec: Tensor, b_dec: Tensor | None, dtype: Any = EXACT) -> Tensor:
    f, W = array(values, dtype), array(W_dec, dtype)
    out = np.zeros((len(f), W.shape[1]), dtype)
    for n, row in enumerate(indices.tolist()):
        if b_dec is not None:
            out[n] += array(b_dec, dtype)
        for place, j in enumerate(row):
            if j >= 0:
                out[n] += f[n, place] * W[j]
    return torch.from_numpy(out)
