// The screen of `steer`: two passes in place of the stream.
//
//   z = s (h . q) + offset,   E = slack + error ||h - mu|| + g size ||h||,   z - E <= h . W + b <= z + E
//
// The first pass streams the int5 copy q of the encoder. It raises the bound on M to z - E where that shows that a
// latent is active, and lists the latents whose z + E is not below the bound. The second evaluates those of them that
// the final bound leaves, spread over all blocks. dspa_kernels/screen.py has the format and the proof.
#pragma once

#include "stream.cuh"

namespace dspa {

// Relative rounding error per term, truncation included, of two sums of products together.
constexpr float ROUNDING = 1.f / (1 << 22);

// Scale, offset, slack, error and size of a latent, and its threshold.
struct ScreenedLatent {
  float scale, offset, slack, error, size, threshold;

  __device__ ScreenedLatent(const Arguments &a, int i_latent, bool exists) {
    float *fields[] = {&scale, &offset, &slack, &error, &size};
#pragma unroll
    for (int i = 0; i < 5; i++) *fields[i] = exists ? a.screen_latents[int64_t(i) * a.d_sae + i_latent] : 0.f;
    threshold = exists ? a.threshold[i_latent] : 0.f;
  }
};

// Lists the latents of this warpgroup that are a candidate for any row, with their upper bounds for all rows. Each
// thread passes those of its latent and row.
template <class Storage>
__device__ void list_candidates(const Arguments &a, const Storage &storage, const Consumer &consumer, int i_latent,
                                bool is_candidate, float upper) {
  const unsigned listed = ballot(is_candidate);
  if (lane() == 0) storage.candidates[warp()] = (listed | listed >> MMA_M) & 0xffff;
  consumer.barrier();
  unsigned candidates = 0;
  for (int s = 0; s < SLICES; s++) candidates |= storage.candidates[consumer.i_warpgroup * SLICES + s];
  if (!candidates) return;
  if (thread() % (32 * SLICES) == 0)
    storage.position[consumer.i_warpgroup] = atomic_add(a.n_candidates, popcount(candidates));
  consumer.barrier();
  if (!(candidates >> consumer.l & 1)) return;
  const int position = storage.position[consumer.i_warpgroup] + popcount(candidates & ((1u << consumer.l) - 1));
  if (consumer.r == 0) a.candidates[position] = i_latent;
  if (consumer.r < a.n_rows) a.upper[int64_t(position) * a.n_rows + consumer.r] = is_candidate ? upper : -INF;
}

// The consumer warps: the first pass. Comparisons are negated so that a NaN is a candidate, and bounds nothing.
template <class Storage>
__device__ void screen_stream(const Arguments &a, const Storage &storage, PipelineState &state, Consumer &consumer) {
  const RowState &row = storage.row_states[consumer.r];
  const float rounding_loss = float(a.d_in + 32) * ROUNDING;
  for_each_tile(storage, state, [&](const WorkTileInfo &tile) {
    const int l = consumer.i_warpgroup * MMA_M + consumer.l, i_latent = tile.first + l;
    const bool m_latent = tile.latents >> l & 1, m_row = m_latent && (tile.waiting >> consumer.r & 1);
    const ScreenedLatent latent(a, i_latent, m_latent);
    // Older than the products, and a bound nevertheless.
    const float bound = m_row ? fmaxf(row.lower_bound, float_of(load_relaxed(a.screen_bound + consumer.r))) : 0.f;
    Mma<typename Storage::T> mma;
    multiply_codes(a, storage, state, consumer, mma);
    const float z = latent.scale * consumer.reduce_slices(storage, mma) + latent.offset;
    const float E = latent.slack + latent.error * row.centered_norm + latent.size * (row.norm * rounding_loss);
    const float upper = z + E, lower = z - E;
    const float certain = warp_max(m_row && lower > fmaxf(latent.threshold, 0.f) ? lower : 0.f, MMA_M);
    if (consumer.l == 0 && !a.k && certain > bound) atomic_max(a.screen_bound + consumer.r, bits_of(certain));
    bool is_candidate = m_row;
    if (a.k) is_candidate &= !(upper < row.min_active);
    else is_candidate &= !(upper < fmaxf(bound, certain)) && !(upper <= fmaxf(row.lower_bound, latent.threshold));
    list_candidates(a, storage, consumer, i_latent, is_candidate, upper);
  });
}

// Raises the lower bound of each row to that of the screen; returns the bits of the rows that still wait.
template <class Storage>
__device__ unsigned raise_bounds(const Arguments &a, const Storage &storage, unsigned waiting) {
  if (thread() < a.n_rows) {
    RowState &row = storage.row_states[thread()];
    row.lower_bound = fmaxf(row.lower_bound, float_of(a.screen_bound[thread()]));
  }
  block_barrier();
  return ballot_rows(a, [&](int r) {
    return (waiting >> r & 1) && is_waiting(a, storage.row_states[r], storage.row_states[r].lower_bound);
  });
}

// The producer warp: the second pass. Loads the candidates that some waiting row needs. Returns their number.
template <class Storage>
__device__ int load_candidates(const Arguments &a, const Storage &storage, PipelineState &state, int n_candidates,
                               unsigned waiting) {
  const int share = min(ceil_div(n_candidates, n_blocks()), MMA_M);
  int n_read = 0;
  for (int first = block() * share; first < n_candidates; first += n_blocks() * share) {
    const int i = first + lane();
    bool is_needed = false;
    if (lane() < share && i < n_candidates)
      for (int r = 0; r < a.n_rows; r++) {
        const float bound = a.k ? 0.f : storage.row_states[r].lower_bound;
        is_needed |= (waiting >> r & 1) && !(a.upper[int64_t(i) * a.n_rows + r] < bound);
      }
    const unsigned needed = ballot(is_needed);
    if (!needed) continue;
    const int64_t i_latent = is_needed ? a.candidates[i] : 0;
    const char *row = static_cast<const char *>(a.encoder_rows) + i_latent * a.d_in * NUMBER_BYTES;
    load_tile(a, storage, state, row, {first, needed, 0, waiting});
    n_read += popcount(needed);
  }
  wait_for_empty(storage, state);
  mbarrier_arrive(storage.full_barriers + state.index);
  commit(storage, state, {0, 0, 0, 0});
  return n_read;
}

}  // namespace dspa
