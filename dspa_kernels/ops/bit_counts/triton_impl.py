"""`bit_counts` in Triton: one program for some words of a row, which passes over the row's tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# A byte counts the tokens of a block.
BLOCK_TOKENS, BLOCK_WORDS = 64, 16


@triton.jit(
    do_not_specialize=["d_sae", "n_words", "block_size", "block_stride"],
    do_not_specialize_on_alignment=["p_blocks", "p_n_tokens", "p_rows"],
)
def bit_counts_kernel(
    p_bits,
    p_blocks,
    p_n_tokens,
    p_rows,
    p_counts,
    d_sae,
    n_words,
    block_size,
    block_stride,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """counts_rj = sum over t < n_tokens_r of bit j of the slot of t: block t // block_size of r, and in it the rest.

    Bits b, b + 8, b + 16 and b + 24 of a word are the lowest bits of the bytes of word >> b, which are summed together.
    """
    tl.static_assert(BLOCK_TOKENS < 256, "a byte counts the tokens of a block")
    i_row = tl.load(p_rows + tl.program_id(0)).to(tl.int64)
    if i_row >= 0:
        o_word = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
        o_bit, o_byte = tl.arange(0, 8), tl.arange(0, 4)
        b_n_tokens = tl.load(p_n_tokens + i_row)
        b_counts = tl.zeros([BLOCK_WORDS, 8, 4], dtype=tl.int32)
        for i in range(0, b_n_tokens, BLOCK_TOKENS):
            o_token = i + tl.arange(0, BLOCK_TOKENS)
            m_token = o_token < b_n_tokens
            b_block = tl.load(p_blocks + i_row * block_stride + o_token // block_size, mask=m_token, other=0)
            o_slot = b_block.to(tl.int64) * block_size + o_token % block_size
            m_word = m_token[:, None] & (o_word < n_words)[None, :]
            b_words = tl.load(p_bits + o_slot[:, None] * n_words + o_word[None, :], mask=m_word, other=0)
            b_bytes = tl.sum(b_words[:, :, None] >> o_bit[None, None, :] & 0x01010101, axis=0)
            b_counts += b_bytes[:, :, None] >> (8 * o_byte)[None, None, :] & 0xFF
        o_latent = (o_word * 32)[:, None, None] + o_bit[None, :, None] + (8 * o_byte)[None, None, :]
        tl.store(p_counts + i_row * d_sae + o_latent, b_counts, mask=o_latent < d_sae)


def bit_counts(bits: Tensor, blocks: Tensor, block_size: int, n_tokens: Tensor, rows: Tensor, counts: Tensor) -> None:
    """Overwrite the named rows of counts [R, d_sae]."""
    n_words = bits.shape[1]
    if len(rows):
        bit_counts_kernel[(len(rows), triton.cdiv(n_words, BLOCK_WORDS))](
            bits,
            blocks,
            n_tokens,
            rows,
            counts,
            counts.shape[1],
            n_words,
            block_size,
            blocks.stride(0),
            BLOCK_TOKENS=BLOCK_TOKENS,
            BLOCK_WORDS=BLOCK_WORDS,
            num_warps=4,
        )
