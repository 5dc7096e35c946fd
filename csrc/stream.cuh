// The stream phase of `steer`: the running maximum of each row that needs it, over the encoder, until all are settled.
//
//   running_max_n = max(running_max_n, f_nj)       over the latents j of a work tile
//
// A producer warp fills the pipeline. Each consumer warpgroup multiplies, with a quarter of d_in per warp, reduces the
// partials through shared memory, and updates the running maxima. Before each work tile the producer checks which rows
// still wait and commits the answer with the tile, so that all warps of the block take the same branch.
#pragma once

#include "pipeline.cuh"

namespace dspa {

// The producer warp: streams the encoder, or its int5 copy, as long as a row waits. The first n_ahead stages are
// filled. `bound` are the bits of lower bounds on M, which rise meanwhile. Returns the number of latents read.
template <class Storage>
__device__ int load_stream(const Arguments &a, const Storage &storage, PipelineState &state, int n_ahead,
                           unsigned waiting, const int *bound) {
  int n_read = 0, i = 0;
  for (;; i++, state.advance(storage.stages)) {
    const KTile k_tile = k_tile_of(a, storage, i);
    if (i >= n_ahead) wait_for_empty(storage, state);
    if (k_tile.index == 0 && can_settle(a))
      waiting = ballot_rows(a, [&](int r) {
        const RowState &row = storage.row_states[r];
        return (waiting >> r & 1) && is_waiting(a, row, fmaxf(row.lower_bound, float_of(load_relaxed(bound + r))));
      });
    if (!k_tile.tile.count || !waiting) break;
    if (i >= n_ahead && is_stream_aligned<Storage>(a)) load_streamed<true>(a, storage, state, k_tile);
    else if (i >= n_ahead) load_streamed<Storage::IS_SCREENED>(a, storage, state, k_tile);
    commit(storage, state, {k_tile.tile.first, ~0u >> (32 - k_tile.tile.count), 0, waiting});
    n_read += k_tile.index == 0 ? k_tile.tile.count : 0;
  }
  const int n_vain = max(n_ahead - i - 1, 0);
  if (i >= n_ahead) mbarrier_arrive(storage.full_barriers + state.index);
  commit(storage, state, {0, 0, n_vain, 0});
  state.advance(storage.stages);
  drain(storage, state, n_vain);
  return n_read;
}

// Updates the running maximum of this thread's row with its latent. For top-k also adds to the rank of each selected
// latent of the row.
template <class Storage>
__device__ void update_maximum(const Arguments &a, const Storage &storage, const Consumer &consumer, float pre,
                               float threshold, int i_latent, bool m_row) {
  const int l = consumer.l, r = consumer.r;
  const RowState &row = storage.row_states[r];
  const float f = warp_max(m_row && pre > 0.f && (a.k || pre > threshold) ? pre : 0.f, MMA_M);
  // Non-negative floats order like their bits, and an integer maximum does not depend on the order of the blocks.
  if (l == 0 && f > 0.f && f > row.lower_bound) atomic_max(a.running_max + r, bits_of(f));
  // No latent below the smallest active selected one can be ahead of any.
  if (!a.k || !ballot(m_row && pre >= row.min_active)) return;
  const int index = m_row ? (a.order ? a.order[i_latent] : i_latent) : 0;
  for (int i = 0; i < a.n_slots; i++) {
    bool ahead = false;
    if (m_row) {
      const float selected = slot_values_of(a, r)[i];
      const int slot = a.slots[int64_t(row.plan) * a.n_slots + i];
      const int own = slot >= 0 ? a.columns[slot] : -1;
      ahead = selected > 0.f && (pre > selected || (pre == selected && index < own));
    }
    const int n_ahead = popcount(ballot(ahead) >> (lane() / MMA_M * MMA_M) & 0xffff);
    if (l == 0 && n_ahead) atomic_add(a.rank + int64_t(r) * a.n_slots + i, n_ahead);
  }
}

// The consumer warps: evaluate encoder rows until the end of the stream. With a screen these are candidates.
template <class Storage>
__device__ void evaluate_stream(const Arguments &a, const Storage &storage, PipelineState &state, Consumer &consumer) {
  for_each_tile(storage, state, [&](const WorkTileInfo &tile) {
    const bool m_latent = tile.latents >> consumer.l & 1;
    const int position = tile.first + consumer.l;
    const int i_latent = !m_latent ? 0 : Storage::IS_SCREENED ? a.candidates[position] : position;
    const float bias = m_latent ? a.b_enc[i_latent] : 0.f, threshold = m_latent ? a.threshold[i_latent] : 0.f;
    Mma<typename Storage::T> mma;
    multiply_rows(a, storage, state, consumer, mma);
    if (consumer.i_warpgroup != 0) return;
    const float pre = consumer.reduce_slices(storage, mma) + bias;
    update_maximum(a, storage, consumer, pre, threshold, i_latent, m_latent && (tile.waiting >> consumer.r & 1));
  });
}

}  // namespace dspa
