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
DSPA_HOST_DEVICE int min(int a, int b) { return a < b ? a : b; }
DSPA_HOST_DEVICE int max(int a, int b) { return a > b ? a : b; }
DSPA_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
DSPA_HOST_DEVICE int round_up(int a, int b) { return ceil_div(a, b) * b; }

// Residual rows of a launch at most: those of one instruction.
constexpr int MAX_ROWS = MMA_N;
// Bytes of a number of an encoder row or a residual row.
constexpr int NUMBER_BYTES = 2;
// The int5 copy of the encoder: bytes of a block of numbers, the last of which may be padding.
constexpr int SCREEN_BLOCK = 256, SCREEN_BLOCK_BYTES = 160;

// Rows of the encoder, or of its copy, in a stage of the pipeline: a k tile of `block_bytes` of each, `stride` bytes
// apart, so that warps read them without bank conflicts.
struct StageLayout {
  int latents, block_bytes, stride;

  DSPA_HOST_DEVICE int bytes() const { return latents * stride; }
  // Number of k tiles of a row of `row_bytes`, and the bytes of one of them.
  DSPA_HOST_DEVICE int n_k_tiles(int row_bytes) const { return ceil_div(row_bytes, block_bytes); }
  DSPA_HOST_DEVICE int k_tile_bytes(int row_bytes, int k_tile) const {
    return min(block_bytes, row_bytes - k_tile * block_bytes);
  }
};

// Encoder rows, for one warpgroup, and rows of the int5 copy, for two. Eight rows of 16 bytes, and four rows of 32
// bytes, lie in different banks.
DSPA_HOST_DEVICE StageLayout row_layout() { return {MMA_M, 1024, 1024 + 16}; }
DSPA_HOST_DEVICE StageLayout code_layout() { return {2 * MMA_M, 5 * SCREEN_BLOCK_BYTES, 5 * SCREEN_BLOCK_BYTES}; }

// The compile-time choices of a kernel. A block has `warpgroups` consumer warpgroups, each of which multiplies 16
// latents with all residual rows, and one producer warp that fills the pipeline. `streamed` is what it streams.
// Selected latents, and candidates of the screen, come through the same pipeline in row_layout, for the first
// warpgroup.
struct KernelTraits {
  int warpgroups, max_stages;
  StageLayout streamed;
  bool is_screened;

  DSPA_HOST_DEVICE int consumer_warps() const { return warpgroups * SLICES; }
  DSPA_HOST_DEVICE int threads() const { return 32 * (consumer_warps() + 1); }
  DSPA_HOST_DEVICE int stage_bytes() const { return max(streamed.bytes(), row_layout().bytes()); }
  // Bytes of a streamed row in global memory.
  DSPA_HOST_DEVICE int row_bytes(int d_in) const {
    return is_screened ? ceil_div(d_in, SCREEN_BLOCK) * SCREEN_BLOCK_BYTES : d_in * NUMBER_BYTES;
  }
  // Numbers of a resident row, with zeros after its end, and bytes between two.
  DSPA_HOST_DEVICE int padded_width(int d_in) const { return round_up(d_in, is_screened ? SCREEN_BLOCK : SLICE); }
  DSPA_HOST_DEVICE int row_stride(int d_in) const {
    return padded_width(d_in) * NUMBER_BYTES + (is_screened ? 64 : 16);
  }
};
// The codes take longer to multiply than to arrive, so that two warpgroups share them.
DSPA_HOST_DEVICE KernelTraits kernel_traits(bool is_screened) {
  return is_screened ? KernelTraits{2, 8, code_layout(), true} : KernelTraits{1, 12, row_layout(), false};
}

// Offsets into shared memory in bytes. The stages of the pipeline come last.
struct SharedLayout {
  int resident_rows, partials, row_states, exchange, tile_infos, barriers, stages;
};

// What a block knows of a residual row.
struct RowState {
  int plan;    // the plan row that steers it, or -1
  int finite;  // false: the row is returned unchanged
  float norm, centered_norm;  // with a screen: ||h|| and ||h - mean||, rounded up
  // The smallest alpha M that sets all active selected latents to 0 (infinite if one of them is augmented, 0 if none is
  // active), the smallest active selected value, and a lower bound on M.
  float required_shift, min_active, lower_bound;

  DSPA_HOST_DEVICE bool is_steered() const { return plan >= 0 && finite; }
};

// What the producer commits along with a stage.
struct WorkTileInfo {
  int first;         // of the latents of the work tile, or of its places in the list of candidates
  unsigned latents;  // bits of the latents that it has; 0 ends the stream
  int n_vain;        // at the end of the stream: number of stages after this one that were filled in vain
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
  layout.resident_rows = end, end += round_up(MAX_ROWS * traits.row_stride(d_in), 128);
  layout.partials = end, end += round_up(partial_bytes(traits), 128);
  layout.row_states = end, end += MAX_ROWS * int(sizeof(RowState));
  layout.exchange = end, end += 4 * (traits.consumer_warps() + traits.warpgroups);
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

// What a block adds to the word of the grid barrier. Its sign flips once all blocks have arrived, and its other bits
// are then as before.
DSPA_HOST_DEVICE int barrier_increment(int block, int n_blocks) {
  return block == 0 ? int(0x80000000u - uint32_t(n_blocks - 1)) : 1;
}

}  // namespace dspa
