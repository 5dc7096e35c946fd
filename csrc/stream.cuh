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

// Relative rounding error per term, truncation included, of two sums of products together.
constexpr float ROUNDING = 1.f / (1 << 22);

// Bits of the rows for which `m_row` is true.
template <class F> __device__ inline unsigned ballot_rows(int n_rows, F &&m_row) {
  return ballot(lane() < n_rows && m_row(lane()));
}

// Summarises each row in shared memory; returns the bits of those that need the encoder.
template <class Mma> __device__ unsigned find_waiting_rows(const Arguments &a, const SharedStorage<Mma> &storage) {
  for (int r = warp(); r < a.n_rows; r += n_threads() / 32) {
    const int plan = active_plan(a, r);
    const Summary s = summarise(a, r, plan);
    const bool settled = can_settle(a) && !(s.required_shift > a.alpha * s.lower_bound);
    if (lane() == 0) {
      storage.plan[r] = plan;
      storage.required_shift[r] = settled ? 0.f : s.required_shift;
      storage.lower_bound[r] = s.lower_bound;
      storage.min_active[r] = s.min_active;
    }
  }
  block_barrier();
  return ballot_rows(a.n_rows, [&](int r) { return storage.required_shift[r] > 0.f; });
}

// Copies the rows into shared memory with zeros after their end. By the consumer warps.
template <class Mma> __device__ void load_resident_rows(const Arguments &a, const SharedStorage<Mma> &storage) {
  using T = typename Mma::Element;
  const int n_threads = 32 * Mma::TRAITS.consumer_warps(), stride = row_stride(a.d_in);
  const bool aligned = is_aligned(a);
  for (int r = 0; r < a.n_rows; r++) {
    const T *from = static_cast<const T *>(a.h) + int64_t(r) * a.d_in;
    for (int o_k = 8 * thread(); o_k * ROW_BYTES < stride; o_k += 8 * n_threads) {
      Vec8<T> vec;
      if (aligned) vec.template load<true>(from + o_k, a.d_in - o_k);
      else vec.template load<false>(from + o_k, a.d_in - o_k);
      memcpy(__builtin_assume_aligned(storage.resident_rows + r * stride + o_k * ROW_BYTES, 16), &vec, 16);
    }
  }
  named_barrier(RESIDENT_ROWS_BARRIER, n_threads);
}

// The producer warp: loads the work tiles of this block as long as a row waits. Returns the number of latents read.
template <class Mma>
__device__ int produce(const Arguments &a, const SharedStorage<Mma> &storage, unsigned waiting) {
  const bool aligned = is_aligned(a);
  const int n_prefetched = n_prefetched_stages(a, storage);
  PipelineState state = {0, 0};
  int n_read = 0, i = 0;
  for (;; i++, state.advance(storage.stages)) {
    const KTile k_tile = k_tile_of<Mma>(a, i);
    if (i >= n_prefetched) mbarrier_wait(storage.empty_barriers + state.index, state.phase ^ 1);
    if (k_tile.index == 0 && can_settle(a))
      waiting = ballot_rows(a.n_rows, [&](int r) {
        if (!(waiting >> r & 1)) return false;  // its running maximum may never have been written
        const float running_max = float_of(load_relaxed(a.running_max + r));
        return storage.required_shift[r] > a.alpha * fmaxf(storage.lower_bound[r], running_max);
      });
    if (!k_tile.tile.count || !waiting) break;
    if (i >= n_prefetched && aligned) load_k_tile<Mma, true>(a, storage, state, k_tile);
    if (i >= n_prefetched && !aligned) load_k_tile<Mma, false>(a, storage, state, k_tile);
    producer_commit(storage, state, {k_tile.tile.first, k_tile.tile.count, k_tile.index, waiting});
    n_read += k_tile.index == 0 ? k_tile.tile.count : 0;
  }
  if (i >= n_prefetched) mbarrier_arrive(storage.full_barriers + state.index);
  producer_commit(storage, state, {0, 0, 0, 0});
  drain_prefetched(storage, i + 1, n_prefetched);
  return n_read;
}

// The epilogue of a work tile, by one warpgroup. Each thread has latent l of 16 and row r of 8.
template <class Mma> struct Epilogue {
  const Arguments &a;
  const SharedStorage<Mma> &storage;
  int i_warpgroup = warp() / SLICES, i_slice = warp() % SLICES;
  int l = thread() % MMA_M, r = thread() / MMA_M % MMA_N;
  int buffer = 0;
  float bias, threshold;

  __device__ Epilogue(const Arguments &a, const SharedStorage<Mma> &storage) : a(a), storage(storage) {}
  __device__ void barrier() const { named_barrier(WARPGROUP_BARRIER + i_warpgroup, 32 * SLICES); }

  // Offset in the work tile of this thread's latent.
  __device__ int latent_offset() const { return MMA_M * i_warpgroup + l; }

  // Called at the start of a work tile, so that the loads overlap with the products.
  __device__ void load_bias(const WorkTileInfo &tile) {
    const bool exists = latent_offset() < tile.count;
    bias = exists ? a.b_enc[tile.first + latent_offset()] : 0.f;
    threshold = exists ? a.threshold[tile.first + latent_offset()] : 0.f;
  }

  // The sum over all slices for this thread's latent and row.
  __device__ float reduce_slices(const Mma &mma) {
    constexpr int partial_size = MMA_M * (MMA_N + 1);
    float *partial = storage.partials + (buffer * Mma::TRAITS.warpgroups + i_warpgroup) * SLICES * partial_size;
    mma.store_partials(partial + i_slice * partial_size);
    barrier();
    buffer ^= 1;  // slower warps may still be reading this one
    float total = 0.f;
    for (int s = 0; s < SLICES; s++) total += partial[s * partial_size + l * (MMA_N + 1) + r];
    return total;
  }

  // Updates the running maximum of this thread's row. For top-k also adds to the rank of each selected latent of the
  // row.
  __device__ void update_maximum(float pre, int i_latent, bool m_latent, unsigned waiting) const {
    const bool m_row = m_latent && (waiting >> r & 1);
    float f = m_row && pre > 0.f && (a.k || pre > threshold) ? pre : 0.f;
#pragma unroll
    for (int mask = MMA_M / 2; mask; mask /= 2) f = fmaxf(f, shuffle_xor(f, mask));
    // Non-negative floats order like their bits, and an integer maximum does not depend on the order of the blocks.
    if (l == 0 && (waiting >> r & 1) && f > storage.lower_bound[r]) atomic_max(a.running_max + r, bits_of(f));
    // No latent below the smallest active selected one can be ahead of any.
    if (!a.k || !ballot(m_row && pre >= storage.min_active[r])) return;
    const int index = m_latent ? (a.order ? a.order[i_latent] : i_latent) : 0;
    for (int i = 0; i < a.n_slots; i++) {
      bool ahead = false;
      if (m_row) {
        const float selected = latent_values_of(a, r)[i];
        const int slot = a.slots[int64_t(storage.plan[r]) * a.n_slots + i];
        const int own = slot >= 0 ? a.columns[slot] : -1;
        ahead = selected > 0.f && index != own && (pre > selected || (pre == selected && index < own));
      }
      const int n_ahead = popcount(ballot(ahead) >> (lane() / MMA_M * MMA_M) & 0xffff);
      if (l == 0 && n_ahead) atomic_add(a.rank + int64_t(r) * a.n_slots + i, n_ahead);
    }
  }

  // True unless the screened value z shows that the exact value of a latent cannot matter to this thread's row. The
  // comparisons are negated so that a NaN is a candidate.
  __device__ bool is_candidate(float z, int i_latent) const {
    const float *screen = a.screen_latents + i_latent;
    const float rounding_loss = float(a.d_in + 32) * ROUNDING;
    float upper = z * screen[0] + screen[a.d_sae];
    upper += screen[2 * int64_t(a.d_sae)] * a.norms[2 * r];
    upper += screen[3 * int64_t(a.d_sae)] * (a.norms[2 * r + 1] * rounding_loss);
    if (a.k) return !(upper < storage.min_active[r]);
    const float running_max = float_of(load_relaxed(a.running_max + r));
    return !(upper <= fmaxf(fmaxf(storage.lower_bound[r], running_max), threshold));
  }

  // The bits of the latents of this warpgroup's part that exist and, with a screen, are candidates.
  __device__ unsigned find_candidates(const Mma &mma, const WorkTileInfo &tile) {
    const int count = tile.count - MMA_M * i_warpgroup;
    const unsigned m_latent = count >= MMA_M ? 0xffff : count > 0 ? (1u << count) - 1 : 0;
    if constexpr (Mma::IS_SCREENED) {
      const float z = reduce_slices(mma);
      const bool is_waiting = (m_latent >> l & 1) && (tile.waiting >> r & 1);
      const unsigned m_candidate = ballot(is_waiting && is_candidate(z, tile.first + latent_offset()));
      if (lane() == 0) storage.candidates[warp()] = (m_candidate | m_candidate >> 16) & 0xffff;
      barrier();
      unsigned m_any = 0;
      for (int s = 0; s < SLICES; s++) m_any |= storage.candidates[i_warpgroup * SLICES + s];
      return m_any;
    } else {
      return m_latent;
    }
  }

  // Finishes a work tile whose products are complete. Returns the number of candidates that were read in full.
  __device__ int run(Mma &mma, const WorkTileInfo &tile) {
    using T = typename Mma::Element;
    const unsigned m_latent = find_candidates(mma, tile);
    const int n_read = Mma::IS_SCREENED ? popcount(m_latent) : 0;
    if constexpr (Mma::IS_SCREENED) {
      if (!n_read) return 0;
      mma.clear();
      mma.multiply_gathered(static_cast<const T *>(a.encoder_rows), tile.first + MMA_M * i_warpgroup, m_latent,
                            static_cast<const T *>(a.h), a.d_in, a.n_rows, i_slice, is_aligned(a));
    }
    update_maximum(reduce_slices(mma) + bias, tile.first + latent_offset(), m_latent >> l & 1, tile.waiting);
    return n_read;
  }
};

// A consumer warp: multiplies every stage until the end of the stream. Returns the number of latents that its warpgroup
// read in full itself.
template <class Mma> __device__ int consume(const Arguments &a, const SharedStorage<Mma> &storage) {
  constexpr KernelTraits traits = Mma::TRAITS;
  const int k_tile_count = n_k_tiles(a.d_in, traits.block_k);
  PipelineState state = {0, 0};
  Epilogue<Mma> epilogue(a, storage);
  Mma mma;
  int n_read = 0;
  for (;;) {
    mbarrier_wait(storage.full_barriers + state.index, state.phase);
    const WorkTileInfo tile = storage.tile_infos[state.index];
    if (tile.count) {
      if (tile.k_tile == 0) {
        mma.clear();
        epilogue.load_bias(tile);
      }
      const char *weights = storage.stage(state) + epilogue.i_warpgroup * MMA_M * traits.weight_stride();
      const char *rows = storage.resident_rows + tile.k_tile * traits.block_k * ROW_BYTES;
      mma.multiply_stage({weights, traits.weight_stride()}, {rows, row_stride(a.d_in)},
                         k_tile_width(a.d_in, traits.block_k, tile.k_tile), epilogue.i_slice);
    }
    warp_barrier();
    if (lane() == 0) mbarrier_arrive(storage.empty_barriers + state.index);
    state.advance(storage.stages);
    if (!tile.count) return n_read;
    if (tile.k_tile == k_tile_count - 1) n_read += epilogue.run(mma, tile);
  }
}

// Streams the encoder for all rows that need it. Returns true if any did, which is the same in every block.
template <class Mma> __device__ bool stream(const Arguments &a, const SharedStorage<Mma> &storage) {
  const bool is_producer = warp() == Mma::TRAITS.consumer_warps();
  const unsigned waiting = find_waiting_rows(a, storage);
  int n_read = 0;
  if (!waiting) {
    if (is_producer) drain_prefetched(storage, 0, n_prefetched_stages(a, storage));
    return false;
  }
  if (is_producer) {
    const int streamed = produce(a, storage, waiting);
    n_read = Mma::IS_SCREENED ? 0 : streamed;
  } else {
    load_resident_rows(a, storage);
    n_read = consume(a, storage);
  }
  // The producer warp and each warpgroup are counted by one thread.
  const bool is_counting = is_producer ? lane() == 0 : thread() % (32 * SLICES) == 0;
  if (a.paths && is_counting && n_read) atomic_add(a.paths + 5, int64_t(n_read));
  return true;
}

}  // namespace dspa
