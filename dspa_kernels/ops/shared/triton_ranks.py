"""Top-k selection: the k largest keys of a row, by bisection over their bit patterns."""

from __future__ import annotations

import triton
import triton.language as tl

# The most comparisons at a time when selected keys are ordered by comparing them with each other.
MAX_SELECTED = 4096


@triton.jit
def top_k_pivot(p_key, width, k, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Return the pivot of a row and n_ties: the keys above the pivot are active, and the first n_ties equal to it."""
    b_pivot, b_n_ties = tl.zeros([], dtype=tl.int32), tl.zeros([], dtype=tl.int32)
    if TOP_K:
        b_pivot = kth_largest(p_key, width, k, BLOCK)
        b_n_ties = k - count_above(p_key, width, b_pivot, BLOCK)
    return b_pivot, b_n_ties


@triton.jit
def active_keys(p_key, i, width, b_pivot, b_n_ties, b_ties_seen, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Return a block of keys, which of them are active, and the number of ties seen so far."""
    o_latent = tl.arange(0, BLOCK)
    b_key = tl.load(p_key + i + o_latent, mask=o_latent < width - i, other=0)
    m_active = b_key > b_pivot
    if TOP_K:
        m_tie = (b_key == b_pivot) & (b_key > 0)
        m_active = m_active | (m_tie & (tl.cumsum(m_tie.to(tl.int32), axis=0) + b_ties_seen <= b_n_ties))
        b_ties_seen += tl.sum(m_tie.to(tl.int32), axis=0)
    return b_key, m_active, b_ties_seen


@triton.jit
def count_above(p_key, n, b_pivot, BLOCK: tl.constexpr):
    """Return the number of keys above a pivot."""
    b_count = tl.zeros([BLOCK], dtype=tl.int32)
    o_key = tl.arange(0, BLOCK)
    for i in range(0, n, BLOCK):
        b_key = tl.load(p_key + i + o_key, mask=o_key < n - i, other=0)
        b_count += (b_key > b_pivot).to(tl.int32)
    return tl.sum(b_count, axis=0)


@triton.jit
def kth_largest(p_key, n, k, BLOCK: tl.constexpr):
    """Return the k-th largest key, or 0 if fewer than k keys are positive.

    By bisection: the smallest pivot >= 0 that fewer than k keys exceed.
    """
    b_max = tl.zeros([BLOCK], dtype=tl.int32)
    o_key = tl.arange(0, BLOCK)
    for i in range(0, n, BLOCK):
        b_max = tl.maximum(b_max, tl.load(p_key + i + o_key, mask=o_key < n - i, other=0))
    b_low = tl.zeros([], dtype=tl.int32)
    b_high = tl.max(b_max, axis=0)
    while b_low < b_high:
        b_mid = b_low + (b_high - b_low) // 2
        if count_above(p_key, n, b_mid, BLOCK) < k:
            b_high = b_mid
        else:
            b_low = b_mid + 1
    return b_low


@triton.jit
def top_k(p_key, p_index, n, k, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr):
    """index = indices of the k largest positive keys, largest first, ties by smaller index, padded with -1.

    Returns the number of indices. Keys are int32 >= 0 and k <= BLOCK_K. `p_index` [k] is also scratch, in which the
    indices are in ascending order until they are ranked.
    """
    b_pivot = kth_largest(p_key, n, k, BLOCK)
    b_n_ties = k - count_above(p_key, n, b_pivot, BLOCK)
    b_n_selected, b_ties_seen = tl.zeros([], dtype=tl.int32), tl.zeros([], dtype=tl.int32)
    o_key = tl.arange(0, BLOCK)
    for i in range(0, n, BLOCK):
        b_key = tl.load(p_key + i + o_key, mask=o_key < n - i, other=0)
        m_tie = (b_key == b_pivot) & (b_key > 0)
        b_tie_rank = tl.cumsum(m_tie.to(tl.int32), axis=0) + b_ties_seen
        m_selected = (b_key > b_pivot) | (m_tie & (b_tie_rank <= b_n_ties))
        b_position = tl.cumsum(m_selected.to(tl.int32), axis=0) + b_n_selected - 1
        tl.store(p_index + b_position, i + o_key, mask=m_selected)
        b_n_selected += tl.sum(m_selected.to(tl.int32), axis=0)
        b_ties_seen += tl.sum(m_tie.to(tl.int32), axis=0)
    tl.debug_barrier()

    o_position = tl.arange(0, BLOCK_K)
    m_filled = o_position < b_n_selected
    b_index = tl.load(p_index + o_position, mask=m_filled, other=0)
    b_key = tl.load(p_key + b_index, mask=m_filled, other=0)
    b_rank = tl.zeros([BLOCK_K], dtype=tl.int32)
    for i in range(0, b_n_selected, CHUNK):
        o_other = i + tl.arange(0, CHUNK)
        m_other = o_other < b_n_selected
        b_other_index = tl.load(p_index + o_other, mask=m_other, other=0)
        b_other_key = tl.load(p_key + b_other_index, mask=m_other, other=0)
        m_ahead = (b_other_key[None, :] > b_key[:, None]) | (
            (b_other_key[None, :] == b_key[:, None]) & (b_other_index[None, :] < b_index[:, None])
        )
        b_rank += tl.sum((m_ahead & m_other[None, :]).to(tl.int32), axis=1)
    tl.debug_barrier()
    tl.store(p_index + tl.where(m_filled, b_rank, o_position), tl.where(m_filled, b_index, -1), mask=o_position < k)
    tl.debug_barrier()
    return b_n_selected


def selection_blocks(name: str, k: int) -> dict[str, int]:
    """Return the block sizes of `top_k` for k, with the names of a kernel's constants."""
    block = max(16, triton.next_power_of_2(k))
    return {f"BLOCK_{name}": block, f"CHUNK_{name}": max(1, min(block, MAX_SELECTED // block))}
