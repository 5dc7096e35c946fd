// h'_n = h_n + sum_j (f'_j - f_j) W_dec[j] over the active selected latents j of row n, where
// f'_j = f_j + alpha M (augment) or max(f_j - alpha M, 0) (ablate) and M = max over all latents of f.
//
// One cooperative launch with one block per multiprocessor, and grid barriers between the phases: select, stream, tail.
// The phases hand results on in scratch that is written before it is read, so nothing is cleared. schedule.h lays out
// shared memory.
#pragma once

#include "select.cuh"
#include "stream.cuh"
#include "supported.h"
#include "tail.cuh"

namespace dspa {

struct Launch {
  Arguments a;
  int stages;
};

// Prefetches weights that the select phase reads and that no earlier launch writes: the columns' and the large
// latents'.
template <class T> __device__ void prefetch_weights(const Arguments &a) {
  const int64_t row_bytes = int64_t(a.d_in) * sizeof(T);
  const int i = block() * n_threads() + thread(), n = n_blocks() * n_threads();
  prefetch_lines(a.columns_encoder_rows, a.n_columns * row_bytes, i, n);
  prefetch_lines(a.encoder_rows, a.n_large * row_bytes, i, n);
}

template <class Mma> __global__ void __launch_bounds__(Mma::TRAITS.threads(), 1) steer_kernel(Launch launch) {
  using T = typename Mma::Element;
  const Arguments &a = launch.a;
  const SharedStorage<Mma> storage(a, launch.stages);
  storage.init_barriers();
  prefetch_stages(a, storage);
  if (a.programmatic) prefetch_weights<T>(a);
  wait_on_dependent_grids();
  select<T>(a);
  grid_wait(a, grid_arrive(a));
  const bool is_needed = stream<Mma>(a, storage);
  const int token = grid_arrive(a);
  // The same in every block. If no row needed the stream, there is nothing to wait for.
  if (is_needed) grid_wait(a, token);
  tail<T>(a);
}

template <class Mma> int launch_steer(const Arguments &a, const Device &device, void *stream) {
  constexpr KernelTraits traits = Mma::TRAITS;
  const int stages = stage_count(traits, a.d_in, device.shared);
  if (!stages) return DSPA_NO_SHARED_MEMORY;
  return launch_cooperative(steer_kernel<Mma>, Launch{a, stages}, device, traits.threads(),
                            shared_bytes(traits, a.d_in, stages), stream, a.programmatic != 0);
}

// Each in a file of its own, because they take the compiler longest.
int launch_plain(const Arguments &a, const Device &device, void *stream);
int launch_int8(const Arguments &a, const Device &device, void *stream);

}  // namespace dspa
