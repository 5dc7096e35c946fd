// The tile scheduler and the layout of shared memory: index arithmetic that the kernels share with the tests on the
// host. Nothing here touches memory.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DSPA_HOST_DEVICE __host__ __device__ constexpr
#else
#define DSPA_HOST_DEVICE constexpr
#endif

namespace dspa {

// One tensor-core instruction: latents, rows and numbers of d_in.
constexpr int MMA_M = 16, MMA_N = 8, MMA_K = 16;
// Sliced K: the four warps of a warpgroup split a sum over d_in, and each takes every fourth slice of 32. An element is
// summed within its slices first and then over the four warps. This order does not depend on the tile, so the bits of
// an element depend only on its row and its latent.
constexpr int SLICES = 4, SLICE = 32, ROUND = SLICES * SLICE;
// Bytes between rows in shared memory that put eight of them into different banks.
constexpr int PAD = 16;

DSPA_HOST_DEVICE int min(int a, int b) { return a < b ? a : b; }
DSPA_HOST_DEVICE int max(int a, int b) { return a > b ? a : b; }
DSPA_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
DSPA_HOST_DEVICE int round_up(int a, int b) { return ceil_div(a, b) * b; }

// Residual rows of a launch at most: those of one instruction.
constexpr int MAX_ROWS = MMA_N;
// Bytes of a number of a residual row.
constexpr int ROW_BYTES = 2;

// The compile-time choices of a kernel. A block has `warpgroups` consumer warpgroups, each of which multiplies 16
// latents with all residual rows, and one producer warp that fills the pipeline. Residual rows are resident in shared
// memory.
struct KernelTraits {
  int warpgroups, block_k, max_stages;
  int weight_bytes;  // per number

  DSPA_HOST_DEVICE int tile_latents() const { return warpgroups * MMA_M; }
  DSPA_HOST_DEVICE int consumer_warps() const { return warpgroups * SLICES; }
  DSPA_HOST_DEVICE int threads() const { return 32 * (consumer_warps() + 1); }
  DSPA_HOST_DEVICE int weight_stride() const { return block_k * weight_bytes + PAD; }
  DSPA_HOST_DEVICE int stage_bytes() const { return tile_latents() * weight_stride(); }
};

DSPA_HOST_DEVICE int row_stride(int d_in) { return round_up(d_in, SLICE) * ROW_BYTES + PAD; }

// Offsets into shared memory in bytes. The stages of the pipeline come last.
struct SharedLayout {
  int resident_rows, partials, barriers, tile_infos, required_shift, lower_bound, min_active, plan, candidates, stages;
};

// What the producer commits along with a stage.
struct WorkTileInfo {
  int first, count;  // latents of the work tile; a count of 0 ends the stream
  int k_tile;
  unsigned waiting;  // bits of the rows that still wait for their maximum
};

// Fewer stages would not keep memory busy.
constexpr int MIN_STAGES = 2;

DSPA_HOST_DEVICE int partial_bytes(KernelTraits traits) {
  return 2 * traits.warpgroups * SLICES * MMA_M * (MMA_N + 1) * int(sizeof(float));
}

DSPA_HOST_DEVICE SharedLayout shared_layout(KernelTraits traits, int d_in) {
  SharedLayout layout = {};
  int end = 0;
  layout.resident_rows = end, end += round_up(MAX_ROWS * row_stride(d_in), 128);
  layout.partials = end, end += round_up(partial_bytes(traits), 128);
  layout.required_shift = end, end += 4 * MAX_ROWS;
  layout.lower_bound = end, end += 4 * MAX_ROWS;
  layout.min_active = end, end += 4 * MAX_ROWS;
  layout.plan = end, end += 4 * MAX_ROWS;
  layout.candidates = end, end += 4 * traits.consumer_warps();
  layout.tile_infos = end = round_up(end, 128), end += traits.max_stages * int(sizeof(WorkTileInfo));
  layout.barriers = end = round_up(end, 128), end += 2 * 8 * traits.max_stages;
  layout.stages = round_up(end, 128);
  return layout;
}

// Number of stages that fit into `shared` bytes, or 0 if they are too few.
DSPA_HOST_DEVICE int stage_count(KernelTraits traits, int d_in, int shared) {
  const int left = shared - shared_layout(traits, d_in).stages;
  const int stages = left < 0 ? 0 : min(traits.max_stages, left / traits.stage_bytes());
  return stages < MIN_STAGES ? 0 : stages;
}

DSPA_HOST_DEVICE int shared_bytes(KernelTraits traits, int d_in, int stages) {
  return shared_layout(traits, d_in).stages + stages * traits.stage_bytes();
}

// Latents that a block processes in one wave. Full waves give each block one whole tile in the order of the encoder, so
// that all blocks start with the latents that come first. The last wave is split evenly.
struct WorkTile {
  int first, count;
};

DSPA_HOST_DEVICE int n_waves(int d_sae, int latents, int n_blocks) { return ceil_div(d_sae, latents * n_blocks); }

DSPA_HOST_DEVICE WorkTile work_tile_of(int d_sae, int latents, int n_blocks, int wave, int block) {
  const int begin = wave * latents * n_blocks;
  const int left = d_sae - begin;
  if (left >= latents * n_blocks) return {begin + block * latents, latents};
  const int share = left / n_blocks, more = left % n_blocks;
  return {begin + block * share + min(block, more), share + (block < more ? 1 : 0)};
}

// Position in the pipeline: the index of a stage and the parity of its phase.
struct PipelineState {
  int index, phase;
  DSPA_HOST_DEVICE void advance(int stages) {
    if (++index == stages) index = 0, phase ^= 1;
  }
};

// Number of k tiles of d_in, and the width of one of them.
DSPA_HOST_DEVICE int n_k_tiles(int d_in, int block_k) { return ceil_div(d_in, block_k); }
DSPA_HOST_DEVICE int k_tile_width(int d_in, int block_k, int k_tile) { return min(block_k, d_in - k_tile * block_k); }

// What a block adds to the word of the grid barrier. The sign flips once all blocks have arrived, and an even number of
// rounds restores the word.
DSPA_HOST_DEVICE int barrier_increment(int block, int n_blocks) {
  return block == 0 ? int(0x80000000u - uint32_t(n_blocks - 1)) : 1;
}

// The kernels' traits: with the encoder itself, and with its int8 copy, whose weights arrive sooner but take longer to
// multiply, so that two warpgroups share the work.
constexpr KernelTraits PLAIN = {1, 512, 12, 2}, SCREENED = {2, 512, 6, 1};

}  // namespace dspa
