// The shapes that the kernels support, and compile-time checks of what has to hold for each of them.
#pragma once

#include "schedule.h"

namespace dspa {

// Supported d_in. Bytes of shared memory per block on an A100, on smaller Ampere and Ada devices, and on an H100.
constexpr int WIDTHS[] = {768, 2048, 2304, 3072, 3584, 4096, 5120, 8192};
constexpr int SHARED_80 = 163 * 1024, SHARED_86 = 99 * 1024, SHARED_90 = 227 * 1024;
// Bytes that should be in flight to each multiprocessor of an H100 at any time.
constexpr int MIN_IN_FLIGHT = 64 * 1024;

// The fewest bytes that `stages` consecutive copies have. They start with the last k tile of a work tile, which may be
// narrower.
constexpr int min_bytes_in_flight(KernelTraits traits, int n_rows, int d_in, int stages) {
  const int k_tiles = n_k_tiles(d_in, traits.block_k);
  const int row_bytes = traits.rows_resident ? 0 : n_rows * traits.row_bytes;
  const int bytes_per_k = traits.tile_latents() * traits.weight_bytes + row_bytes;
  int bytes = 0;
  for (int i = 0; i < stages; i++)
    bytes += bytes_per_k * k_tile_width(d_in, traits.block_k, (k_tiles - 1 + i) % k_tiles);
  return bytes;
}

// True if every number of rows up to max_rows fits into `shared` bytes with at least `in_flight` bytes in flight.
constexpr bool is_supported(KernelTraits traits, int shared, int in_flight) {
  for (int d_in : WIDTHS)
    for (int n_rows = 1; n_rows <= traits.max_rows; n_rows++) {
      const int stages = stage_count(traits, n_rows, d_in, shared);
      if (!stages || shared_bytes(traits, n_rows, d_in, stages) > shared) return false;
      if (min_bytes_in_flight(traits, n_rows, d_in, stages) < in_flight) return false;
    }
  return true;
}

static_assert(is_supported(few_rows(2), SHARED_90, MIN_IN_FLIGHT));
static_assert(is_supported(many_rows(2), SHARED_90, MIN_IN_FLIGHT));
static_assert(is_supported(full_precision(2), SHARED_90, MIN_IN_FLIGHT));
static_assert(is_supported(full_precision(4), SHARED_90, MIN_IN_FLIGHT));
// With the int8 screen. Where rows are in fp32, its stages are too small for the full figure.
static_assert(is_supported(few_rows(1), SHARED_90, MIN_IN_FLIGHT));
static_assert(is_supported(many_rows(1), SHARED_90, MIN_IN_FLIGHT));
static_assert(is_supported(full_precision(1), SHARED_90, MIN_IN_FLIGHT / 2));

// On an A100 all rows have to fit. Where few_rows does not, many_rows multiplies few rows too.
static_assert(is_supported(many_rows(1), SHARED_80, 0) && is_supported(many_rows(2), SHARED_80, 0));
static_assert(is_supported(full_precision(1), SHARED_80, 0) && is_supported(full_precision(2), SHARED_80, 0));
static_assert(is_supported(full_precision(4), SHARED_80, 0));

// On other devices at least MMA_N rows have to fit. More rows are then processed tile after tile.
constexpr bool fits_a_tile(KernelTraits traits) {
  for (int d_in : WIDTHS) {
    const int rows = rows_per_tile(traits, traits.max_rows, d_in, SHARED_86);
    if (rows < MMA_N || !stage_count(traits, rows, d_in, SHARED_86)) return false;
  }
  return true;
}
static_assert(fits_a_tile(many_rows(1)) && fits_a_tile(many_rows(2)));
static_assert(fits_a_tile(full_precision(1)) && fits_a_tile(full_precision(2)) && fits_a_tile(full_precision(4)));

}  // namespace dspa
