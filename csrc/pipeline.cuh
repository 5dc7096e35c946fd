// The pipeline of a block: its shared memory, and the stages that a producer warp fills by asynchronous copies while
// the consumer warps multiply earlier ones. Each stage is a k tile of encoder rows, or of rows of their int5 copy.
#pragma once

#include "mma.cuh"

namespace dspa {

// Named barriers from this one on, one per warpgroup.
constexpr int WARPGROUP_BARRIER = 1;

// Pointers into shared memory. full_barriers and empty_barriers are those of the stages.
template <class T_, bool IS_SCREENED_> struct SharedStorage {
  using T = T_;
  static constexpr bool IS_SCREENED = IS_SCREENED_;
  DSPA_HOST_DEVICE static KernelTraits traits() { return kernel_traits(IS_SCREENED); }

  char *stages_begin, *resident_rows_begin;
  float *partials;
  RowState *row_states;
  unsigned *candidates;  // by consumer warp
  int *position;         // by warpgroup
  WorkTileInfo *tile_infos;
  Mbarrier *full_barriers, *empty_barriers;
  int stages, d_in;

  __device__ SharedStorage(const Arguments &a, int stages) : stages(stages), d_in(a.d_in) {
    const SharedLayout layout = shared_layout(traits(), a.d_in);
    char *base = shared_memory();
    stages_begin = base + layout.stages;
    resident_rows_begin = base + layout.resident_rows;
    partials = reinterpret_cast<float *>(base + layout.partials);
    row_states = reinterpret_cast<RowState *>(base + layout.row_states);
    candidates = reinterpret_cast<unsigned *>(base + layout.exchange);
    position = reinterpret_cast<int *>(candidates + traits().consumer_warps());
    tile_infos = reinterpret_cast<WorkTileInfo *>(base + layout.tile_infos);
    full_barriers = reinterpret_cast<Mbarrier *>(base + layout.barriers);
    empty_barriers = full_barriers + traits().max_stages;
  }

  // A stage is full once each thread of the producer warp has arrived, and its first thread again with the commit. It
  // is empty once each consumer warp has arrived.
  __device__ void init_barriers() const {
    if (thread() == 0) {
      for (int i = 0; i < stages; i++) {
        mbarrier_init(full_barriers + i, 32 + 1);
        mbarrier_init(empty_barriers + i, traits().consumer_warps());
      }
      fence_mbarrier_init();
    }
    block_barrier();
  }

  __device__ bool is_producer() const { return warp() == traits().consumer_warps(); }
  template <class T> __device__ T *resident_row(int i) const {
    return reinterpret_cast<T *>(resident_rows_begin + i * traits().row_stride(d_in));
  }
  __device__ Operand resident_rows() const { return {resident_rows_begin, traits().row_stride(d_in)}; }
  __device__ char *stage(PipelineState state) const { return stages_begin + state.index * traits().stage_bytes(); }
};

// The producer's side, by one warp

template <class Storage> __device__ void wait_for_empty(const Storage &storage, PipelineState state) {
  mbarrier_wait(storage.empty_barriers + state.index, state.phase ^ 1);
}

// Commits a stage: stores its tile info and makes the last of its arrivals.
template <class Storage>
__device__ void commit(const Storage &storage, PipelineState state, const WorkTileInfo &info) {
  if (lane() != 0) return;
  storage.tile_infos[state.index] = info;
  mbarrier_arrive(storage.full_barriers + state.index);
}

// Copies `bytes` of a row number by number, with zeros up to a multiple of MMA_K.
template <class T> __device__ void load_unaligned(char *to, const char *from, int bytes) {
  const int width = bytes / NUMBER_BYTES;
#pragma unroll 1
  for (int i = lane(); i < round_up(width, MMA_K); i += 32)
    reinterpret_cast<T *>(to)[i] = i < width ? reinterpret_cast<const T *>(from)[i] : rounded<T>(0.f);
}

// Loads a k tile of the rows in the bits `m_rows`, at `row` of each thread. Each thread of the warp arrives.
template <class Storage>
__device__ void load_gathered(const Arguments &a, const Storage &storage, PipelineState state, const char *row,
                              unsigned m_rows, int k_tile) {
  Mbarrier *full_barrier = storage.full_barriers + state.index;
  const int bytes = row_layout().k_tile_bytes(a.d_in * NUMBER_BYTES, k_tile);
  const char *from = row + k_tile * row_layout().block_bytes;
  char *to = storage.stage(state);
  if (is_aligned(a)) {
    if (lane() == 0) mbarrier_expect_tx(full_barrier, popcount(m_rows) * bytes);
    warp_barrier();
    async_copy_gathered(to, row_layout().stride, from, m_rows, bytes, full_barrier);
    mbarrier_arrive_on_copies(full_barrier);
  } else {
#pragma unroll 1
    for (int i = 0; i < row_layout().latents; i++) {
      const char *other = shuffle(from, i);
      if (m_rows >> i & 1) load_unaligned<typename Storage::T>(to + i * row_layout().stride, other, bytes);
    }
    mbarrier_arrive(full_barrier);
  }
}

// One k tile of a work tile of the stream.
struct KTile {
  WorkTile tile;
  int index;
};

// The i-th k tile that a block streams; its count is 0 after the last.
template <class Storage> __device__ KTile k_tile_of(const Arguments &a, const Storage &, int i) {
  constexpr StageLayout streamed = Storage::traits().streamed;
  const int k_tile_count = streamed.n_k_tiles(Storage::traits().row_bytes(a.d_in)), wave = i / k_tile_count;
  if (wave >= n_waves(a.d_sae, streamed.latents, n_blocks())) return {{0, 0}, 0};
  return {work_tile_of(a.d_sae, streamed.latents, n_blocks(), wave, block()), i % k_tile_count};
}

// True if rows of the stream can be copied 16 bytes at a time.
template <class Storage> __device__ bool is_stream_aligned(const Arguments &a) {
  return Storage::IS_SCREENED || is_aligned(a);
}

// Loads a k tile of consecutive rows of the stream. Each thread of the warp arrives.
template <bool ALIGNED, class Storage>
__device__ void load_streamed(const Arguments &a, const Storage &storage, PipelineState state, KTile k_tile) {
  constexpr StageLayout streamed = Storage::traits().streamed;
  Mbarrier *full_barrier = storage.full_barriers + state.index;
  const int row_bytes = Storage::traits().row_bytes(a.d_in), bytes = streamed.k_tile_bytes(row_bytes, k_tile.index);
  const char *from = static_cast<const char *>(Storage::IS_SCREENED ? a.screen_rows : a.encoder_rows) +
                     int64_t(k_tile.tile.first) * row_bytes + k_tile.index * streamed.block_bytes;
  char *to = storage.stage(state);
  if constexpr (ALIGNED) {
    if (lane() == 0) mbarrier_expect_tx(full_barrier, k_tile.tile.count * bytes);
    warp_barrier();
    async_copy_rows(to, streamed.stride, from, row_bytes, k_tile.tile.count, bytes, full_barrier);
    mbarrier_arrive_on_copies(full_barrier);
  } else {
#pragma unroll 1
    for (int i = 0; i < k_tile.tile.count; i++)
      load_unaligned<typename Storage::T>(to + i * streamed.stride, from + int64_t(i) * row_bytes, bytes);
    mbarrier_arrive(full_barrier);
  }
}

// Loads all k tiles of gathered rows. Returns their number.
template <class Storage>
__device__ int load_tile(const Arguments &a, const Storage &storage, PipelineState &state, const char *row,
                         const WorkTileInfo &info) {
  const int k_tile_count = row_layout().n_k_tiles(a.d_in * NUMBER_BYTES);
  for (int i = 0; i < k_tile_count; i++, state.advance(storage.stages)) {
    wait_for_empty(storage, state);
    load_gathered(a, storage, state, row, info.latents, i);
    commit(storage, state, info);
  }
  return k_tile_count;
}

// Fills the stages that are still free with the first k tiles of the stream, before it is known whether any row needs
// them. Returns how many; 0 unless the launch asks for it. `n_used` stages have been filled before.
template <class Storage>
__device__ int fill_ahead(const Arguments &a, const Storage &storage, PipelineState state, int n_used) {
  if (!a.ahead || !is_stream_aligned<Storage>(a)) return 0;
  int n = 0;
  for (KTile k_tile; n + n_used < storage.stages && (k_tile = k_tile_of(a, storage, n)).tile.count; n++) {
    load_streamed<true>(a, storage, state, k_tile);
    state.advance(storage.stages);
  }
  return n;
}

// Waits for stages that were filled in vain: a block must not exit while copies into its shared memory are in flight.
template <class Storage>
__device__ void drain(const Storage &storage, PipelineState &state, int n) {
  for (int i = 0; i < n; i++, state.advance(storage.stages)) {
    commit(storage, state, {0, 0, 0, 0});
    mbarrier_wait(storage.full_barriers + state.index, state.phase);
  }
}

// The consumers' side, by all consumer warps

template <class Storage> __device__ void release(const Storage &storage, PipelineState &state) {
  warp_barrier();
  if (lane() == 0) mbarrier_arrive(storage.empty_barriers + state.index);
  state.advance(storage.stages);
}

// Calls f(tile) for each work tile until the end of the stream. f releases the stages of the tile.
template <class Storage, class F> __device__ void for_each_tile(const Storage &storage, PipelineState &state, F &&f) {
  for (;;) {
    mbarrier_wait(storage.full_barriers + state.index, state.phase);
    const WorkTileInfo tile = storage.tile_infos[state.index];
    if (tile.latents) {
      f(tile);
    } else {
      for (int i = 0; i <= tile.n_vain; i++) release(storage, state);
      return;
    }
  }
}

// A thread of a consumer warp: its warpgroup, its slice of d_in, and its latent l of 16 and row r of 8 in an epilogue.
struct Consumer {
  int i_warpgroup = warp() / SLICES, i_slice = warp() % SLICES;
  int l = thread() % MMA_M, r = thread() / MMA_M % MMA_N;
  int buffer = 0;

  __device__ void barrier() const { named_barrier(WARPGROUP_BARRIER + i_warpgroup, 32 * SLICES); }

  // The sum over all slices for this thread's latent and row.
  template <class Storage, class T> __device__ float reduce_slices(const Storage &storage, const Mma<T> &mma) {
    constexpr int partial_size = MMA_M * (MMA_N + 1);
    float *partial = storage.partials + (buffer * Storage::traits().warpgroups + i_warpgroup) * SLICES * partial_size;
    mma.store_partials(partial + i_slice * partial_size);
    barrier();
    buffer ^= 1;  // slower warps may still be reading this one
    float total = 0.f;
    for (int s = 0; s < SLICES; s++) total += partial[s * partial_size + l * (MMA_N + 1) + r];
    return total;
  }
};

// Multiplies the encoder rows of a tile, whose k tiles are in the next stages, with all residual rows. By the first
// warpgroup; others release the stages.
template <class Storage>
__device__ void multiply_rows(const Arguments &a, const Storage &storage, PipelineState &state, Consumer consumer,
                              Mma<typename Storage::T> &mma) {
  constexpr StageLayout layout = row_layout();
  constexpr int tile_width = layout.block_bytes / NUMBER_BYTES;
  mma.clear();
  Operand rows = storage.resident_rows();
  for (int left = a.d_in; left > 0; left -= tile_width, rows.p += layout.block_bytes) {
    mbarrier_wait(storage.full_barriers + state.index, state.phase);
    if (consumer.i_warpgroup == 0)
      mma.multiply_rows({storage.stage(state), layout.stride}, rows, min(left, tile_width), consumer.i_slice);
    release(storage, state);
  }
}

// Multiplies rows of the int5 copy likewise, 16 per warpgroup.
template <class Storage>
__device__ void multiply_codes(const Arguments &a, const Storage &storage, PipelineState &state, Consumer consumer,
                               Mma<typename Storage::T> &mma) {
  constexpr int blocks_per_tile = code_layout().block_bytes / SCREEN_BLOCK_BYTES;
  mma.clear();
  Operand rows = storage.resident_rows();
  for (int left = ceil_div(a.d_in, SCREEN_BLOCK); left > 0; left -= blocks_per_tile) {
    mbarrier_wait(storage.full_barriers + state.index, state.phase);
    const char *codes = storage.stage(state) + consumer.i_warpgroup * MMA_M * code_layout().stride;
    mma.multiply_codes({codes, code_layout().stride}, rows, min(left, blocks_per_tile), consumer.i_slice);
    rows.p += blocks_per_tile * SCREEN_BLOCK * NUMBER_BYTES;
    release(storage, state);
  }
}

}  // namespace dspa
