"""The int5 copy of an encoder by which `steer` screens latents: its format, and the proof of its bounds.

A row W of the encoder is `W = s q + r`, with integers q from -15 to 15, one fp32 scale s and a remainder r. For any mu

    h . W + b = s (h . q) + b + <mu, r> + <h - mu, r>,    |<h - mu, r>| <= ||h - mu|| ||r||

so that z = s (h . q) + offset, with offset = b + <mu, r>, is near the pre-activation. Kernels compute z, and then
`U = z + E` and `L = z - E` with

    E = slack + error ||h - mu|| + g size ||h||,    g = (d_in + 32) 2^-22, or 2^-20 where rows are split into parts

They rely on L <= p <= U, where p is the pre-activation as they compute it from W, in fp32 and with any order of sums.
Proof, for d_in <= 2^20. Rounding to nearest is off by a share u = 2^-24 at most. No number is flushed to zero.

1. *Sums of products.* q is exact in 16 bits, and so are products of 16-bit numbers in fp32. A tensor core adds m >= 4
   products to the sum so far. It cuts each of these m + 1 terms below a share 2 u of the largest one, and the result
   below 2 u of itself. With T = sum |h_k w_k|, a step loses 2 u (m + 2) <= 3 u m times what T and the errors before it
   add up to, so that all steps lose (e^x - 1) T, x = 3 u (d_in + 16) <= 0.19, which is less than 3.3 u (d_in + 16) T.
   Multiplying and adding numbers one by one, rounded to nearest, loses less. A split row is exactly three times as many
   terms, of which the second and third are small: x <= 9.2 u (d_in + 16) <= 0.58, which loses 12.5 u (d_in + 16) T.
   As T <= ||h|| ||w||, g has 4 u (d_in + 32), or 16 u (d_in + 32), for each of the sums h . W and s (h . q). At least
   64 u size ||h|| are left.
2. *Scale and offset.* The product with s, the sum with b and the sum with the offset are off by u times their terms.
   What is relative to sums is less than 4 u size ||h|| together, and is covered by what step 1 left. The rest, with the
   offset as it is stored, is at most 2 u (|b| + |offset|), of slack >= 16 u (|b| + |offset|). Scale, offset, remainder
   and norms are computed in fp64. In <mu, r> this loses at most 2^-33 ||mu|| ||r|| <= 2^-33 (||h|| + ||h - mu||) ||r||.
3. *E itself.* error >= ||r|| (1 + 2^-21) and size >= (||W|| + s ||q||) (1 + 2^-21). Both norms of a row h are computed
   in fp32 with at most 2^13 additions in a row, and multiplied by 1.001. This covers the roundings of E, and those of
   steps 1 and 2 that were relative to its second and third term.
4. *U and L.* z + E >= p before it is rounded. Rounding keeps order, and p is an fp32 number, so U >= p. L likewise.
5. *Small numbers.* Below 2^-126, products and sums lose 2^-149 each and third parts of split rows lose 2^-134. 1e-17 is
   added to both norms of a row, so that E has more than 2^-79 d_in ||W|| to spare for parts and squares, and 1e-30
   (1 + s) to slack, for products and for what E itself loses.
6. *Large numbers.* slack is infinite where size >= 2^60, where |b| + |offset| >= 2^120, and where W, b or mu are not
   finite. Otherwise nothing can overflow in a row whose ||h||^2 does not. In any other case E is infinite or NaN. Then
   L is -inf or NaN, which bounds nothing, and U is inf or NaN, which kernels take as possible.

So M is at least every L above the latent's threshold and 0. Only a latent whose U is above its threshold, and not below
that bound, can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers of a row that are packed together, in BLOCK / 2 bytes of nibbles and BLOCK / 8 bytes of fifth bits.
BLOCK, BLOCK_BYTES = 256, 160
LARGEST = 15
# Largest number that a scale reaches, as shares of the largest in its row. The least square error chooses.
CLIPS = (1.0, 0.9, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)
# g / (d_in + 32), for rows that are multiplied as they are and for those that are split into parts.
ROUNDING, SPLIT_ROUNDING = 2.0**-22, 2.0**-20
# Rows that are quantised together.
HEIGHT = 4096


def quantise_rows(encoder_rows: Tensor, b_enc: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise an encoder.

    Args:
        encoder_rows: [d_sae, d_in], any floating dtype.
        b_enc: [d_sae].
        mean: [d_in] fp32, roughly the mean of the rows that will be encoded.

    Returns:
        screen_rows [d_sae, 160 ceil(d_in / 256)] uint8, see `pack`, and screen_latents [5, d_sae] fp32: scale, offset,
        slack, error and size.
    """
    packed, latents = [], []
    for W, b in zip(encoder_rows.split(HEIGHT), b_enc.split(HEIGHT), strict=True):
        q, scale = quantise(W)
        packed.append(pack(q))
        latents.append(bounds(W, b, mean, q, scale))
    return torch.cat(packed), torch.cat(latents, dim=1)


def quantise(W: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers q from -15 to 15 [n, d_in] int8 and scales s [n] fp32 such that s q is near the rows of W."""
    largest = W.abs().amax(dim=1, keepdim=True).float()
    # Relative to the largest number, no square overflows.
    X = torch.where(largest > 0, W.float() / largest, 0)
    clip, least = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    for share in CLIPS:
        step = share / LARGEST
        lost = (X - (X / step).round_().clamp_(-LARGEST, LARGEST) * step).square_().sum(dim=1, keepdim=True)
        clip = torch.where(lost < least, share, clip)
        least = torch.minimum(lost, least)
    scale = (largest * (clip / LARGEST)).clamp(min=torch.finfo(torch.float32).tiny)
    q = (W / scale).round_().clamp_(-LARGEST, LARGEST).nan_to_num_(0)
    return q.to(torch.int8), scale.flatten()


def pack(q: Tensor) -> Tensor:
    """Pack integers q from -15 to 15, [n, d_in], to [n, 160 ceil(d_in / 256)] uint8, five bits per number.

    A block of 256 codes q + 16, those after d_in for q = 0, has 128 bytes and then 32. Number i of a block has its low
    four bits in byte i % 128, in its low half if i < 128, and its fifth bit in bit i // 32 of byte 128 + i % 32.
    """
    code = torch.nn.functional.pad(q + 16, (0, -q.shape[1] % BLOCK), value=16).to(torch.uint8)
    code = code.view(len(q), -1, BLOCK)
    low, fifth = (code & 15).unflatten(2, (2, BLOCK // 2)), (code >> 4).unflatten(2, (8, BLOCK // 8))
    nibbles = low[:, :, 0] | low[:, :, 1] << 4
    places = torch.arange(8, dtype=torch.uint8, device=q.device)[:, None]
    planes = (fifth << places).sum(dim=2, dtype=torch.uint8)
    return torch.cat([nibbles, planes], dim=2).flatten(1)


def bounds(W: Tensor, b: Tensor, mean: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Return scale, offset, slack, error and size of each row, [5, n] fp32; see the formulas of this module."""
    W, b, mean, q, scale = (tensor.double() for tensor in (W, b, mean, q, scale))
    r = W - q * scale[:, None]
    offset = b + r @ mean
    slack = 2.0**-20 * (b.abs() + offset.abs()) + 1e-30 * (1 + scale)
    size = W.norm(dim=1) + scale * q.norm(dim=1)
    is_safe = (size < 2.0**60) & (b.abs() + offset.abs() < 2.0**120)
    up = 1 + 2.0**-20  # more than rounding to fp32 can lose
    slack = torch.where(is_safe, slack * up, torch.inf)
    return torch.stack([scale, offset, slack, r.norm(dim=1) * up, size * up]).float()
