"""Ranks of numbers: the k largest of a row, by bisection of their bit patterns."""

from __future__ import annotations

import triton
import triton.language as tl

# Selections this wide are ordered by comparing them with each other.
MAX_SELECTED = 4096


@triton.jit
def rank_cut(p_key, width, k, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Level and room of a row: its active latents are those above the level, and the first `room` at it."""
    b_level, b_room = tl.zeros([], dtype=tl.int32), tl.zeros([], dtype=tl.int32)
    if TOP_K:
        b_level = level_of(p_key, width, k, BLOCK)
        b_room = k - count_above(p_key, width, b_level, BLOCK)
    return b_level, b_room


@triton.jit
def active_block(p_key, i, width, b_level, b_room, b_ties, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Keys of a block of latents, which of them are active, and the latents at the level so far."""
    o_latent = tl.arange(0, BLOCK)
    b_key = tl.load(p_key + i + o_latent, mask=o_latent < width - i, other=0)
    m_active = b_key > b_level
    if TOP_K:
        m_tie = (b_key == b_level) & (b_key > 0)
        m_active = m_active | (m_tie & (tl.cumsum(m_tie.to(tl.int32), axis=0) + b_ties <= b_room))
        b_ties += tl.sum(m_tie.to(tl.int32), axis=0)
    return b_key, m_active, b_ties


@triton.jit
def count_above(p_key, n, b_level, BLOCK: tl.constexpr):
    """How many of n keys are above a level."""
    b_count = tl.zeros([BLOCK], dtype=tl.int32)
    o_key = tl.arange(0, BLOCK)
    for i in range(0, n, BLOCK):
        b_key = tl.load(p_key + i + o_key, mask=o_key < n - i, other=0)
        b_count += (b_key > b_level).to(tl.int32)
    return tl.sum(b_count, axis=0)


@triton.jit
def level_of(p_key, n, k, BLOCK: tl.constexpr):
    """The smallest level >= 0 with fewer than k keys above it: the k-th largest key, or 0 if k are not positive."""
    b_most = tl.zeros([BLOCK], dtype=tl.int32)
    o_key = tl.arange(0, BLOCK)
    for i in range(0, n, BLOCK):
        b_most = tl.maximum(b_most, tl.load(p_key + i + o_key, mask=o_key < n - i, other=0))
    b_low = tl.zeros([], dtype=tl.int32)
    b_high = tl.max(b_most, axis=0)
    while b_low < b_high:
        b_middle = b_low + (b_high - b_low) // 2
        if count_above(p_key, n, b_middle, BLOCK) < k:
            b_high = b_middle
        else:
            b_low = b_middle + 1
    return b_low


@triton.jit
def largest(p_key, p_index, n, k, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr):
    """index = the k largest positive keys, largest first, ties to the smaller index, then -1; returns how many.

    Keys are int32 >= 0, k <= BLOCK_K. `p_index` needs k places, and holds them in order of index for a while.
    """
    b_level = level_of(p_key, n, k, BLOCK)
    b_room = k - count_above(p_key, n, b_level, BLOCK)
    b_taken, b_ties = tl.zeros([], dtype=tl.int32), tl.zeros([], dtype=tl.int32)
    o_key = tl.arange(0, BLOCK)
    for i in range(0, n, BLOCK):
        b_key = tl.load(p_key + i + o_key, mask=o_key < n - i, other=0)
        m_tie = (b_key == b_level) & (b_key > 0)
        b_tie = tl.cumsum(m_tie.to(tl.int32), axis=0) + b_ties
        m_take = (b_key > b_level) | (m_tie & (b_tie <= b_room))
        b_place = tl.cumsum(m_take.to(tl.int32), axis=0) + b_taken - 1
        tl.store(p_index + b_place, i + o_key, mask=m_take)
        b_taken += tl.sum(m_take.to(tl.int32), axis=0)
        b_ties += tl.sum(m_tie.to(tl.int32), axis=0)
    tl.debug_barrier()

    o_place = tl.arange(0, BLOCK_K)
    m_place = o_place < b_taken
    b_index = tl.load(p_index + o_place, mask=m_place, other=0)
    b_key = tl.load(p_key + b_index, mask=m_place, other=0)
    b_rank = tl.zeros([BLOCK_K], dtype=tl.int32)
    for i in range(0, b_taken, CHUNK):
        o_other = i + tl.arange(0, CHUNK)
        m_other = o_other < b_taken
        b_other = tl.load(p_index + o_other, mask=m_other, other=0)
        b_their = tl.load(p_key + b_other, mask=m_other, other=0)
        m_ahead = (b_their[None, :] > b_key[:, None]) | (
            (b_their[None, :] == b_key[:, None]) & (b_other[None, :] < b_index[:, None])
        )
        b_rank += tl.sum((m_ahead & m_other[None, :]).to(tl.int32), axis=1)
    tl.debug_barrier()
    tl.store(p_index + tl.where(m_place, b_rank, o_place), tl.where(m_place, b_index, -1), mask=o_place < k)
    tl.debug_barrier()
    return b_taken


def selection_blocks(name: str, k: int) -> dict[str, int]:
    """Constants of `largest` for k selected."""
    block = max(16, triton.next_power_of_2(k))
    return {f"BLOCK_{name}": block, f"CHUNK_{name}": max(1, min(block, MAX_SELECTED // block))}
