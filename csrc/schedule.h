// Who reads what, and where it lies: the index arithmetic of the stream, in functions that the kernels and the tests on
// the host share. None of it touches memory.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DSPA_INDEX __host__ __device__ constexpr
#else
#define DSPA_INDEX constexpr
#endif

namespace dspa {

// A sum over d_in is split among four warps, each of which takes every fourth SLICE of it; an element is summed within
// slices, then over the four, whatever the tile, so that its bits depend on its row and its latent alone.
constexpr int SLICES = 4, SLICE = 32, ROUND = SLICES * SLICE, STEP = 16;
// Latents that a tensor core takes together, and rows.
constexpr int TILE_L = 16, TILE_N = 8;
// Between rows of shared memory, so that eight of them lie in different banks.
constexpr int PAD = 16;

DSPA_INDEX int least(int a, int b) { return a < b ? a : b; }
DSPA_INDEX int most(int a, int b) { return a > b ? a : b; }
DSPA_INDEX int ceil_div(int a, int b) { return (a + b - 1) / b; }
DSPA_INDEX int round_up(int a, int b) { return ceil_div(a, b) * b; }

// How a block is built: GROUPS of four warps, each of which multiplies m_tiles * 16 latents with up to `rows` residual
// rows, and one more warp that fills the ring. Residual rows stay in shared memory, or come along with each stage.
struct Shape {
  int groups, m_tiles, rows, block_k, max_stages;
  bool resident;
  int weight_bytes, row_bytes;  // of a number

  DSPA_INDEX int latents() const { return groups * m_tiles * TILE_L; }
  DSPA_INDEX int consumers() const { return groups * SLICES; }
  DSPA_INDEX int threads() const { return 32 * (consumers() + 1); }
  DSPA_INDEX int weight_stride() const { return block_k * weight_bytes + PAD; }
  DSPA_INDEX int row_stride(int d_in) const { return (resident ? round_up(d_in, SLICE) : block_k) * row_bytes + PAD; }
  // Rows of a launch that are multiplied together.
  DSPA_INDEX int tile_rows(int n_rows) const { return least(rows, round_up(most(n_rows, 1), TILE_N)); }
  DSPA_INDEX int stage_bytes(int n_rows, int d_in) const {
    return latents() * weight_stride() + (resident ? 0 : tile_rows(n_rows) * row_stride(d_in));
  }
};

// Of shared memory, in bytes from its beginning. The stages of the ring come last.
struct Layout {
  int resident, partial, barriers, headers, need, bound, low, plan, candidates, ring;
};

// What a stage tells the warps that multiply it.
struct Header {
  int first, count;  // latents of the tile; a count of 0 ends the stream
  int chunk, padding;
  uint64_t open;  // rows that still wait for their maximum
};

// Fewer stages than this do not keep memory busy.
constexpr int MIN_STAGES = 2;

DSPA_INDEX int partial_bytes(Shape shape) {
  return 2 * shape.groups * SLICES * TILE_L * (TILE_N + 1) * int(sizeof(float));
}

DSPA_INDEX Layout layout_of(Shape shape, int n_rows, int d_in) {
  Layout at = {};
  int end = 0;
  at.resident = end, end += shape.resident ? round_up(shape.tile_rows(n_rows) * shape.row_stride(d_in), 128) : 0;
  at.partial = end, end += round_up(partial_bytes(shape), 128);
  at.need = end, end += 4 * shape.rows;
  at.bound = end, end += 4 * shape.rows;
  at.low = end, end += 4 * shape.rows;
  at.plan = end, end += 4 * shape.rows;
  at.candidates = end, end += 4 * shape.consumers() * shape.m_tiles;
  at.headers = end = round_up(end, 128), end += shape.max_stages * int(sizeof(Header));
  at.barriers = end = round_up(end, 128), end += 2 * 8 * shape.max_stages;
  at.ring = round_up(end, 128);
  return at;
}

// Stages for which there is room in `shared` bytes; 0 where too few.
DSPA_INDEX int stages_of(Shape shape, int n_rows, int d_in, int shared) {
  const int left = shared - layout_of(shape, n_rows, d_in).ring;
  const int stages = left < 0 ? 0 : least(shape.max_stages, left / shape.stage_bytes(n_rows, d_in));
  return stages < MIN_STAGES ? 0 : stages;
}

// Rows that can be multiplied together in `shared` bytes, as many as there are or a block takes; 0 if none.
DSPA_INDEX int rows_at_once(Shape shape, int n_rows, int d_in, int shared) {
  int rows = shape.tile_rows(n_rows);
  while (rows > 0 && !stages_of(shape, rows, d_in, shared)) rows -= TILE_N;
  return rows;
}

DSPA_INDEX int shared_bytes(Shape shape, int n_rows, int d_in, int stages) {
  return layout_of(shape, n_rows, d_in).ring + stages * shape.stage_bytes(n_rows, d_in);
}

// Latents in the wave `wave` of a block. Whole waves give every block one tile, in the order of the encoder, so that
// what is read first is read by all; the last is shared out evenly.
struct Tile {
  int first, count;
};

DSPA_INDEX int n_waves(int d_sae, int latents, int n_blocks) { return ceil_div(d_sae, latents * n_blocks); }

DSPA_INDEX Tile tile_of(int d_sae, int latents, int n_blocks, int wave, int block) {
  const int begin = wave * latents * n_blocks;
  const int left = d_sae - begin;
  if (left >= latents * n_blocks) return {begin + block * latents, latents};
  const int each = left / n_blocks, more = left % n_blocks;
  return {begin + block * each + least(block, more), each + (block < more ? 1 : 0)};
}

// Position in a ring: the stage, and the parity of the phase in which it is.
struct Place {
  int stage, parity;
  DSPA_INDEX void advance(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// Chunks of d_in, and the numbers in one of them.
DSPA_INDEX int n_chunks(int d_in, int block_k) { return ceil_div(d_in, block_k); }
DSPA_INDEX int chunk_width(int d_in, int block_k, int chunk) { return least(block_k, d_in - chunk * block_k); }

// What a block adds to the word of the grid barrier: the sign turns when all have, and two rounds leave it as it was.
DSPA_INDEX int arrival(int block, int n_blocks) {
  return block == 0 ? int(0x80000000u - uint32_t(n_blocks - 1)) : 1;
}

// Shapes of blocks, by how they multiply.
constexpr Shape few_rows(int weight_bytes) {
  // int8 takes longer to multiply and is there sooner, so that two groups of warps have to share it.
  const int groups = weight_bytes == 1 ? 2 : 1;
  return {groups, 1, 8, 1024 / weight_bytes / groups, 6, true, weight_bytes, 2};
}
constexpr Shape many_rows(int weight_bytes) {
  return {2, 2, weight_bytes == 1 ? 32 : 64, 256, 6, false, weight_bytes, 2};
}
constexpr Shape full_precision(int weight_bytes) { return {2, 1, 32, 128, 8, false, weight_bytes, 4}; }

}  // namespace dspa
