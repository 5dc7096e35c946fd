// The shapes that blocks are built for, and what has to hold for each of them, as the compiler checks it.
#pragma once

#include "schedule.h"

namespace dspa {

// Widths of residuals; bytes of shared memory that a block can have on an A100, on smaller Ampere and Ada devices, and
// on an H100.
constexpr int WIDTHS[] = {768, 2048, 2304, 3072, 3584, 4096, 5120, 8192};
constexpr int SHARED_80 = 163 * 1024, SHARED_86 = 99 * 1024, SHARED_90 = 227 * 1024;
// Bytes that are to be on their way to each multiprocessor of an H100, at any time.
constexpr int IN_FLIGHT = 64 * 1024;

// The fewest bytes of `stages` copies in a row: they begin with the last chunk of a tile, which may be narrower.
constexpr int least_in_flight(Shape shape, int n_rows, int d_in, int stages) {
  const int chunks = n_chunks(d_in, shape.block_k);
  const int column = shape.latents() * shape.weight_bytes + (shape.resident ? 0 : n_rows * shape.row_bytes);
  int bytes = 0;
  for (int i = 0; i < stages; i++) bytes += column * chunk_width(d_in, shape.block_k, (chunks - 1 + i) % chunks);
  return bytes;
}

// Whether a block has room for any number of rows that it multiplies, and keeps so many bytes in flight.
constexpr bool is_supported(Shape shape, int shared, int in_flight) {
  for (int d_in : WIDTHS)
    for (int n_rows = 1; n_rows <= shape.rows; n_rows++) {
      const int stages = stages_of(shape, n_rows, d_in, shared);
      if (!stages || shared_bytes(shape, n_rows, d_in, stages) > shared) return false;
      if (least_in_flight(shape, n_rows, d_in, stages) < in_flight) return false;
    }
  return true;
}

static_assert(is_supported(few_rows(2), SHARED_90, IN_FLIGHT));
static_assert(is_supported(many_rows(2), SHARED_90, IN_FLIGHT));
static_assert(is_supported(full_precision(2), SHARED_90, IN_FLIGHT));
static_assert(is_supported(full_precision(4), SHARED_90, IN_FLIGHT));
// The screen; where rows are in fp32, its stages are too small for as much.
static_assert(is_supported(few_rows(1), SHARED_90, IN_FLIGHT));
static_assert(is_supported(many_rows(1), SHARED_90, IN_FLIGHT));
static_assert(is_supported(full_precision(1), SHARED_90, IN_FLIGHT / 2));

// On an A100 there has to be room. Where few_rows has none, many_rows multiplies few rows too.
static_assert(is_supported(many_rows(1), SHARED_80, 0) && is_supported(many_rows(2), SHARED_80, 0));
static_assert(is_supported(full_precision(1), SHARED_80, 0) && is_supported(full_precision(2), SHARED_80, 0));
static_assert(is_supported(full_precision(4), SHARED_80, 0));

// Elsewhere for a tile of rows at least: a batch then takes several turns.
constexpr bool has_room(Shape shape) {
  for (int d_in : WIDTHS) {
    const int rows = rows_at_once(shape, shape.rows, d_in, SHARED_86);
    if (rows < TILE_N || !stages_of(shape, rows, d_in, SHARED_86)) return false;
  }
  return true;
}
static_assert(has_room(many_rows(1)) && has_room(many_rows(2)));
static_assert(has_room(full_precision(1)) && has_room(full_precision(2)) && has_room(full_precision(4)));

}  // namespace dspa
