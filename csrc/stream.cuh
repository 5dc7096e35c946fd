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

// Residual rows that share one pass over the encoder.
template <class Mma> struct RowTile {
  const Arguments &a;
  int i_first, n_rows;
  uint64_t waiting;

  __device__ const typename Mma::ElementRow *rows() const {
    const void *p = sizeof(typename Mma::ElementRow) == 4 ? a.x : a.h;
    return static_cast<const typename Mma::ElementRow *>(p) + int64_t(i_first) * a.d_in;
  }
};

// Bits of the rows for which `m_row` is true. Thread i of a warp evaluates rows i and i + 32.
template <class F> __device__ inline uint64_t ballot_rows(int n_rows, F &&m_row) {
  uint64_t mask = 0;
  for (int i = 0; i < n_rows; i += 32) {
    const int r = i + lane();
    mask |= uint64_t(ballot(r < n_rows && m_row(r))) << i;
  }
  return mask;
}

// Summarises each row in shared memory; returns the bits of those that need the encoder.
template <class Mma>
__device__ uint64_t find_waiting_rows(const RowTile<Mma> &row_tile, const SharedStorage<Mma> &storage) {
  const Arguments &a = row_tile.a;
  for (int r = warp(); r < row_tile.n_rows; r += n_threads() / 32) {
    const int plan = active_plan(a, row_tile.i_first + r);
    const Summary s = summarise(a, row_tile.i_first + r, plan);
    const bool settled = can_settle(a) && !(s.required_shift > a.alpha * s.lower_bound);
    if (lane() == 0) {
      storage.plan[r] = plan;
      storage.required_shift[r] = settled ? 0.f : s.required_shift;
      storage.lower_bound[r] = s.lower_bound;
      storage.min_active[r] = s.min_active;
    }
  }
  block_barrier();
  return ballot_rows(row_tile.n_rows, [&](int r) { return storage.required_shift[r] > 0.f; });
}

// Copies the rows into shared memory with zeros after their end. By the consumer warps.
template <class Mma>
__device__ void load_resident_rows(const RowTile<Mma> &row_tile, const SharedStorage<Mma> &storage) {
  using Row = typename Mma::ElementRow;
  const int d_in = row_tile.a.d_in, n_threads = 32 * Mma::TRAITS.consumer_warps();
  const bool aligned = is_aligned(row_tile.a);
  for (int r = 0; r < row_tile.n_rows; r++) {
    const Row *from = row_tile.rows() + int64_t(r) * d_in;
    for (int o_k = 8 * thread(); o_k * int(sizeof(Row)) < storage.row_stride; o_k += 8 * n_threads) {
      Vec8<Row> vec;
      if (aligned) vec.template load<true>(from + o_k, d_in - o_k);
      else vec.template load<false>(from + o_k, d_in - o_k);
      char *to = storage.resident_rows + r * storage.row_stride + o_k * sizeof(Row);
      memcpy(__builtin_assume_aligned(to, 16), &vec, 16);
    }
  }
  named_barrier(RESIDENT_ROWS_BARRIER, n_threads);
}

// The producer warp: loads the work tiles of this block as long as a row waits. Returns the number of latents read.
template <class Mma>
__device__ int produce(const RowTile<Mma> &row_tile, const SharedStorage<Mma> &storage, PipelineState &state) {
  const Arguments &a = row_tile.a;
  const bool aligned = is_aligned(a);
  const int n_prefetched = n_prefetched_stages(a, storage);
  if (!Mma::TRAITS.rows_resident) fence_proxy_async();  // rows in fp32 were written by other blocks
  uint64_t waiting = row_tile.waiting;
  int n_read = 0, i = 0;
  for (;; i++, state.advance(storage.stages)) {
    const KTile k_tile = k_tile_of<Mma>(a, i);
    if (i >= n_prefetched) mbarrier_wait(storage.empty_barriers + state.index, state.phase ^ 1);
    if (k_tile.index == 0 && can_settle(a))
      waiting = ballot_rows(row_tile.n_rows, [&](int r) {
        const float running_max = float_of(load_relaxed(a.running_max + row_tile.i_first + r));
        return storage.required_shift[r] > a.alpha * fmaxf(storage.lower_bound[r], running_max);
      });
    if (!k_tile.tile.count || !waiting) break;
    if (i >= n_prefetched && aligned)
      load_k_tile<Mma, true>(a, storage, state, k_tile, row_tile.rows(), row_tile.n_rows);
    if (i >= n_prefetched && !aligned)
      load_k_tile<Mma, false>(a, storage, state, k_tile, row_tile.rows(), row_tile.n_rows);
    producer_commit(storage, state, {k_tile.tile.first, k_tile.tile.count, k_tile.index, 0, waiting});
    n_read += k_tile.index == 0 ? k_tile.tile.count : 0;
  }
  if (i >= n_prefetched) mbarrier_arrive(storage.full_barriers + state.index);
  producer_commit(storage, state, {0, 0, 0, 0, 0});
  state.advance(storage.stages);
  drain_prefetched(storage, i + 1, n_prefetched);
  return n_read;
}

// The epilogue of a work tile, by one warpgroup. Each thread has latent l of 16 and row n of 8.
template <class Mma> struct Epilogue {
  const RowTile<Mma> &row_tile;
  const SharedStorage<Mma> &storage;
  int i_warpgroup = warp() / SLICES, i_slice = warp() % SLICES;
  int l = thread() % MMA_M, n = thread() / MMA_M % MMA_N;
  int buffer = 0;
  float bias[Mma::M_TILES], threshold[Mma::M_TILES];

  __device__ Epilogue(const RowTile<Mma> &row_tile, const SharedStorage<Mma> &storage)
      : row_tile(row_tile), storage(storage) {}
  __device__ void barrier() const { named_barrier(WARPGROUP_BARRIER + i_warpgroup, 32 * SLICES); }

  // Offset in the work tile of this thread's latent of MMA tile m.
  __device__ int latent_offset(int m) const { return MMA_M * (i_warpgroup * Mma::M_TILES + m) + l; }

  // Called at the start of a work tile, so that the loads overlap with the products.
  __device__ void load_bias(const WorkTileInfo &tile) {
#pragma unroll
    for (int m = 0; m < Mma::M_TILES; m++) {
      const bool exists = latent_offset(m) < tile.count;
      bias[m] = exists ? row_tile.a.b_enc[tile.first + latent_offset(m)] : 0.f;
      threshold[m] = exists ? row_tile.a.threshold[tile.first + latent_offset(m)] : 0.f;
    }
  }

  // The sum over all slices for this thread's latent and row of MMA tile (m, j).
  __device__ float reduce_slices(const Mma &mma, int m, int j) {
    constexpr int partial_size = MMA_M * (MMA_N + 1);
    float *partial = storage.partials + (buffer * Mma::TRAITS.warpgroups + i_warpgroup) * SLICES * partial_size;
    mma.store_partials(partial + i_slice * partial_size, m, j);
    barrier();
    buffer ^= 1;  // slower warps may still be reading this one
    float total = 0.f;
    for (int s = 0; s < SLICES; s++) total += partial[s * partial_size + l * (MMA_N + 1) + n];
    return total;
  }

  // Updates the running maximum of row r. For top-k also adds to the rank of each selected latent of the row.
  __device__ void update_maximum(float pre, float latent_threshold, int i_latent, bool m_latent, int r,
                                 uint64_t waiting) const {
    const Arguments &a = row_tile.a;
    const bool m_row = m_latent && (waiting >> r & 1);
    float f = m_row && pre > 0.f && (a.k || pre > latent_threshold) ? pre : 0.f;
#pragma unroll
    for (int mask = MMA_M / 2; mask; mask /= 2) f = fmaxf(f, shuffle_xor(f, mask));
    const int i_row = row_tile.i_first + r;
    // Non-negative floats order like their bits, and an integer maximum does not depend on the order of the blocks.
    if (l == 0 && (waiting >> r & 1) && f > storage.lower_bound[r]) atomic_max(a.running_max + i_row, bits_of(f));
    // No latent below the smallest active selected one can be ahead of any.
    if (!a.k || !ballot(m_row && pre >= storage.min_active[r])) return;
    const int index = m_latent ? (a.order ? a.order[i_latent] : i_latent) : 0;
    for (int i = 0; i < a.n_slots; i++) {
      bool ahead = false;
      if (m_row) {
        const float selected = latent_values_of(a, i_row)[i];
        const int slot = a.slots[int64_t(storage.plan[r]) * a.n_slots + i];
        const int own = slot >= 0 ? a.columns[slot] : -1;
        ahead = selected > 0.f && index != own && (pre > selected || (pre == selected && index < own));
      }
      const int n_ahead = popcount(ballot(ahead) >> (lane() / MMA_M * MMA_M) & 0xffff);
      if (l == 0 && n_ahead) atomic_add(a.rank + int64_t(i_row) * a.n_slots + i, n_ahead);
    }
  }

  // True unless the screened value z shows that the exact value of a latent cannot matter to row r. The comparisons are
  // negated so that a NaN is a candidate.
  __device__ bool is_candidate(float z, float latent_threshold, float running_max, int i_latent, int r) const {
    const Arguments &a = row_tile.a;
    const float *screen = a.screen_latents + i_latent;
    const float *norms = a.norms + 2 * (row_tile.i_first + r);
    const float rounding_loss = float(a.d_in + 32) * ROUNDING;
    float upper = z * screen[0] + screen[a.d_sae];
    upper += screen[2 * int64_t(a.d_sae)] * norms[0] + screen[3 * int64_t(a.d_sae)] * (norms[1] * rounding_loss);
    if (a.k) return !(upper < storage.min_active[r]);
    return !(upper <= fmaxf(fmaxf(storage.lower_bound[r], running_max), latent_threshold));
  }

  // Updates all rows with the latents in the bits `m_latent` of this warpgroup's part of a work tile.
  __device__ void update_maxima(const Mma &mma, const WorkTileInfo &tile, const uint32_t (&m_latent)[Mma::M_TILES]) {
#pragma unroll
    for (int m = 0; m < Mma::M_TILES; m++)
      for (int j = 0; MMA_N * j < row_tile.n_rows; j++) {
        const float total = reduce_slices(mma, m, j);
        const bool is_selected = m_latent[m] >> l & 1;
        update_maximum(total + bias[m], threshold[m], tile.first + latent_offset(m), is_selected, MMA_N * j + n,
                       tile.waiting);
      }
  }

  // m_latent = the bits of the latents of this warpgroup's part that exist and, with a screen, are candidates.
  __device__ void find_candidates(const Mma &mma, const WorkTileInfo &tile, uint32_t (&m_latent)[Mma::M_TILES]) {
#pragma unroll
    for (int m = 0; m < Mma::M_TILES; m++) {
      const int count = tile.count - MMA_M * (i_warpgroup * Mma::M_TILES + m);
      m_latent[m] = count >= MMA_M ? 0xffff : count > 0 ? (1u << count) - 1 : 0;
    }
    if constexpr (Mma::SCREENED) {
#pragma unroll
      for (int m = 0; m < Mma::M_TILES; m++) {
        unsigned m_candidate = 0;
        for (int j = 0; MMA_N * j < row_tile.n_rows; j++) {
          const int r = MMA_N * j + n;
          const bool is_waiting = (m_latent[m] >> l & 1) && (tile.waiting >> r & 1);
          const float running_max =
              is_waiting ? float_of(load_relaxed(row_tile.a.running_max + row_tile.i_first + r)) : 0.f;
          const float z = reduce_slices(mma, m, j);
          m_candidate |= ballot(
              is_waiting && is_candidate(z, threshold[m], running_max, tile.first + latent_offset(m), r));
        }
        if (lane() == 0) storage.candidates[warp() * Mma::M_TILES + m] = (m_candidate | m_candidate >> 16) & 0xffff;
      }
      barrier();
#pragma unroll
      for (int m = 0; m < Mma::M_TILES; m++) {
        m_latent[m] = 0;
        for (int s = 0; s < SLICES; s++)
          m_latent[m] |= storage.candidates[(i_warpgroup * SLICES + s) * Mma::M_TILES + m];
      }
    }
  }

  // Finishes a work tile whose products are complete. Returns the number of candidates that were read in full.
  __device__ int run(Mma &mma, const WorkTileInfo &tile) {
    uint32_t m_latent[Mma::M_TILES];
    find_candidates(mma, tile, m_latent);
    int n_read = 0;
    if constexpr (Mma::SCREENED) {
#pragma unroll
      for (int m = 0; m < Mma::M_TILES; m++) n_read += popcount(m_latent[m]);
      if (!n_read) return 0;
      using Weight = typename Mma::ElementWeight;
      const int64_t first = tile.first + MMA_M * i_warpgroup * Mma::M_TILES;
      mma.clear();
      mma.multiply_gathered(static_cast<const Weight *>(row_tile.a.encoder_rows), first, m_latent, row_tile.rows(),
                            row_tile.a.d_in, row_tile.n_rows, i_slice, is_aligned(row_tile.a));
    }
    update_maxima(mma, tile, m_latent);
    return n_read;
  }
};

// A consumer warp: multiplies every stage until the end of the stream. Returns the number of latents that its warpgroup
// read in full itself.
template <class Mma>
__device__ int consume(const RowTile<Mma> &row_tile, const SharedStorage<Mma> &storage, PipelineState &state) {
  using Row = typename Mma::ElementRow;
  constexpr KernelTraits traits = Mma::TRAITS;
  const int k_tile_count = n_k_tiles(row_tile.a.d_in, traits.block_k);
  Epilogue<Mma> epilogue(row_tile, storage);
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
      char *stage = storage.stage(state);
      const Operand weights = {stage + epilogue.i_warpgroup * Mma::M_TILES * MMA_M * traits.weight_stride(),
                               traits.weight_stride()};
      const char *rows = traits.rows_resident
                             ? storage.resident_rows + tile.k_tile * traits.block_k * int(sizeof(Row))
                             : stage + traits.tile_latents() * traits.weight_stride();
      const int width = k_tile_width(row_tile.a.d_in, traits.block_k, tile.k_tile);
      mma.multiply_stage(weights, {rows, storage.row_stride}, width, epilogue.i_slice, row_tile.n_rows);
    }
    warp_barrier();
    if (lane() == 0) mbarrier_arrive(storage.empty_barriers + state.index);
    state.advance(storage.stages);
    if (!tile.count) return n_read;
    if (tile.k_tile == k_tile_count - 1) n_read += epilogue.run(mma, tile);
  }
}

// Streams the encoder for all rows, tile after tile of them. Returns the number of rows that needed it, which is the
// same in every block.
template <class Mma> __device__ int stream(const Arguments &a, const SharedStorage<Mma> &storage) {
  constexpr KernelTraits traits = Mma::TRAITS;
  PipelineState state = {0, 0};
  int n_waiting = 0, n_read = 0;
  for (int i_first = 0; i_first < a.n_rows; i_first += storage.tile_rows) {
    RowTile<Mma> row_tile = {a, i_first, min(storage.tile_rows, a.n_rows - i_first), 0};
    row_tile.waiting = find_waiting_rows(row_tile, storage);
    if (row_tile.waiting) {
      n_waiting += popcount(unsigned(row_tile.waiting)) + popcount(unsigned(row_tile.waiting >> 32));
      if (warp() == traits.consumer_warps()) {
        const int streamed = produce(row_tile, storage, state);
        n_read += Mma::SCREENED ? 0 : streamed;
      } else {
        if constexpr (traits.rows_resident) load_resident_rows(row_tile, storage);
        n_read += consume(row_tile, storage, state);
      }
    } else if (warp() == traits.consumer_warps()) {
      drain_prefetched(storage, 0, n_prefetched_stages(a, storage));
    }
    block_barrier();
  }
  // The producer warp and each warpgroup are counted by one thread.
  const bool is_counting = warp() == traits.consumer_warps() ? lane() == 0 : thread() % (32 * SLICES) == 0;
  if (a.paths && is_counting && n_read) atomic_add(a.paths + 5, int64_t(n_read));
  return n_waiting;
}

}  // namespace dspa
