// The pipeline of a block: its shared memory, and the stages that a producer warp fills with k tiles of encoder rows by
// asynchronous copies while the consumer warps multiply earlier ones.
#pragma once

#include "mma.cuh"

namespace dspa {

// Named barriers: one for all consumer warps, and from WARPGROUP_BARRIER on one per warpgroup.
constexpr int RESIDENT_ROWS_BARRIER = 1, WARPGROUP_BARRIER = 2;

// Pointers into shared memory. full_barriers and empty_barriers are those of the stages.
template <class Mma> struct SharedStorage {
  char *stages_begin, *resident_rows;
  float *partials, *required_shift, *lower_bound, *min_active;
  int *plan;
  unsigned *candidates;
  WorkTileInfo *tile_infos;
  Mbarrier *full_barriers, *empty_barriers;
  int stages;

  __device__ SharedStorage(const Arguments &a, int stages) : stages(stages) {
    const SharedLayout layout = shared_layout(Mma::TRAITS, a.d_in);
    char *base = shared_memory();
    stages_begin = base + layout.stages;
    resident_rows = base + layout.resident_rows;
    partials = reinterpret_cast<float *>(base + layout.partials);
    required_shift = reinterpret_cast<float *>(base + layout.required_shift);
    lower_bound = reinterpret_cast<float *>(base + layout.lower_bound);
    min_active = reinterpret_cast<float *>(base + layout.min_active);
    plan = reinterpret_cast<int *>(base + layout.plan);
    candidates = reinterpret_cast<unsigned *>(base + layout.candidates);
    tile_infos = reinterpret_cast<WorkTileInfo *>(base + layout.tile_infos);
    full_barriers = reinterpret_cast<Mbarrier *>(base + layout.barriers);
    empty_barriers = full_barriers + Mma::TRAITS.max_stages;
  }

  // A stage is full once each thread of the producer warp has arrived, and its first thread again with the commit. It
  // is empty once each consumer warp has arrived.
  __device__ void init_barriers() const {
    if (thread() == 0) {
      for (int i = 0; i < stages; i++) {
        mbarrier_init(full_barriers + i, 32 + 1);
        mbarrier_init(empty_barriers + i, Mma::TRAITS.consumer_warps());
      }
      fence_mbarrier_init();
    }
    block_barrier();
  }

  __device__ char *stage(PipelineState state) const { return stages_begin + state.index * Mma::TRAITS.stage_bytes(); }
};

// Copies `n` unaligned rows number by number, with zeros up to a multiple of MMA_K. By one warp.
template <class T>
__device__ void load_unaligned(char *to, int to_stride, const T *from, int d_in, int n, int width) {
  const int padded = round_up(width, MMA_K);
  for (int i = lane(); i < n * padded; i += 32) {
    const int r = i / padded, o_k = i % padded;
    T number;
    memset(&number, 0, sizeof(T));
    if (o_k < width) number = from[int64_t(r) * d_in + o_k];
    reinterpret_cast<T *>(to + r * to_stride)[o_k] = number;
  }
}

// One k tile of a work tile, which fills one stage.
struct KTile {
  WorkTile tile;
  int index;
};

// The i-th k tile that a block reads; its count is 0 after the last.
template <class Mma> __device__ inline KTile k_tile_of(const Arguments &a, int i) {
  constexpr KernelTraits traits = Mma::TRAITS;
  const int k_tile_count = n_k_tiles(a.d_in, traits.block_k), wave = i / k_tile_count;
  if (wave >= n_waves(a.d_sae, traits.tile_latents(), n_blocks())) return {{0, 0}, 0};
  return {work_tile_of(a.d_sae, traits.tile_latents(), n_blocks(), wave, block()), i % k_tile_count};
}

// Loads a k tile into a stage. Each thread of the producer warp arrives.
template <class Mma, bool ALIGNED>
__device__ void load_k_tile(const Arguments &a, const SharedStorage<Mma> &storage, PipelineState state, KTile k_tile) {
  using Stored = typename Mma::Stored;
  constexpr KernelTraits traits = Mma::TRAITS;
  Mbarrier *full_barrier = storage.full_barriers + state.index;
  const int width = k_tile_width(a.d_in, traits.block_k, k_tile.index), o_k = k_tile.index * traits.block_k;
  const void *base = Mma::IS_SCREENED ? static_cast<const void *>(a.screen_rows) : a.encoder_rows;
  const Stored *weights = static_cast<const Stored *>(base) + int64_t(k_tile.tile.first) * a.d_in + o_k;
  char *to = storage.stage(state);
  if constexpr (ALIGNED) {
    const int bytes = width * int(sizeof(Stored));
    if (lane() == 0) mbarrier_expect_tx(full_barrier, k_tile.tile.count * bytes);
    warp_barrier();
    async_copy_rows(to, traits.weight_stride(), reinterpret_cast<const char *>(weights),
                    int64_t(a.d_in) * sizeof(Stored), k_tile.tile.count, bytes, full_barrier);
    mbarrier_arrive_on_copies(full_barrier);
  } else {
    load_unaligned(to, traits.weight_stride(), weights, a.d_in, k_tile.tile.count, width);
    mbarrier_arrive(full_barrier);
  }
}

// Commits a stage: stores its tile info and makes the last of its arrivals.
template <class Mma>
__device__ void producer_commit(const SharedStorage<Mma> &storage, PipelineState state, const WorkTileInfo &info) {
  if (lane() != 0) return;
  storage.tile_infos[state.index] = info;
  mbarrier_arrive(storage.full_barriers + state.index);
}

// Number of stages that a block prefetches before it is known whether any row needs the encoder: 0 unless the launch
// asks for it (a.ahead).
template <class Mma>
__device__ inline int n_prefetched_stages(const Arguments &a, const SharedStorage<Mma> &storage) {
  if (!a.ahead || !is_aligned(a)) return 0;
  int n = 0;
  while (n < storage.stages && k_tile_of<Mma>(a, n).tile.count) n++;
  return n;
}

// The pipeline's prologue, by the producer warp.
template <class Mma> __device__ void prefetch_stages(const Arguments &a, const SharedStorage<Mma> &storage) {
  if (warp() != Mma::TRAITS.consumer_warps()) return;
  const int n = n_prefetched_stages(a, storage);
  for (int i = 0; i < n; i++) load_k_tile<Mma, true>(a, storage, {i, 0}, k_tile_of<Mma>(a, i));
}

// Drains the prefetched stages from `first` on, which no consumer reads: a block must not exit while copies into its
// shared memory are in flight.
template <class Mma>
__device__ void drain_prefetched(const SharedStorage<Mma> &storage, int first, int n_prefetched) {
  for (int i = first; i < n_prefetched; i++) {
    producer_commit(storage, {i, 0}, {0, 0, 0, 0});
    mbarrier_wait(storage.full_barriers + i, 0);
  }
}

}  // namespace dspa
