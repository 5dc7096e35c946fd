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
constexpr int min_bytes_in_flight(KernelTraits traits, int d_in, int stages) {
  const StageLayout layout = traits.streamed;
  const int row_bytes = traits.row_bytes(d_in), k_tiles = layout.n_k_tiles(row_bytes);
  int bytes = 0;
  for (int i = 0; i < stages; i++)
    bytes += layout.latents * layout.k_tile_bytes(row_bytes, (k_tiles - 1 + i) % k_tiles);
  return bytes;
}

constexpr KernelTraits PLAIN = kernel_traits(false), SCREENED = kernel_traits(true);

// True if every width up to max_d_in fits into `shared` bytes with at least `in_flight` bytes in flight.
constexpr bool is_supported(KernelTraits traits, int max_d_in, int shared, int in_flight) {
  for (int d_in : WIDTHS) {
    if (d_in > max_d_in) continue;
    const int stages = stage_count(traits, d_in, shared);
    if (!stages || shared_bytes(traits, d_in, stages) > shared) return false;
    if (min_bytes_in_flight(traits, d_in, stages) < in_flight) return false;
  }
  return true;
}

static_assert(is_supported(PLAIN, 8192, SHARED_90, MIN_IN_FLIGHT));
static_assert(is_supported(SCREENED, 5120, SHARED_90, MIN_IN_FLIGHT) && is_supported(SCREENED, 8192, SHARED_90, 60000));
// Eight resident rows take more than half of a smaller shared memory. Wider rows are refused there.
static_assert(is_supported(PLAIN, 5120, SHARED_80, 0) && is_supported(SCREENED, 5120, SHARED_80, 0));
static_assert(is_supported(PLAIN, 3584, SHARED_86, 0) && is_supported(SCREENED, 2304, SHARED_86, 0));

}  // namespace dspa
