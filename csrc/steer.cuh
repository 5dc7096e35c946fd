// h'_n = h_n + scale_n sum_j (f'_j - f_j) W_dec[j] over the active selected latents j of row n, where
// f'_j = f_j + alpha M (augment) or max(f_j - alpha M, 0) (ablate) and M = max over all latents of f.
//
// One cooperative launch with one block per multiprocessor, and grid barriers between the phases: lookup (with counts),
// select, stream, tail. The phases hand results on in scratch that is written before it is read, so nothing is cleared.
// schedule.h lays out shared memory.
#pragma once

#include "lookup.cuh"
#include "select.cuh"
#include "stream.cuh"
#include "supported.h"
#include "tail.cuh"

namespace dspa {

struct Launch {
  Arguments a;
  int tile_rows, stages;
};

// Prefetches weights that the select phase reads and that no earlier launch writes: the columns' and the large
// latents'.
template <class W> __device__ void prefetch_weights(const Arguments &a) {
  const int64_t row_bytes = int64_t(a.d_in) * sizeof(W);
  const int i = block() * n_threads() + thread(), n = n_blocks() * n_threads();
  prefetch_lines(a.columns_encoder_rows, a.n_columns * row_bytes, i, n);
  prefetch_lines(a.encoder_rows, a.n_large * row_bytes, i, n);
}

template <class Mma, class H> __global__ void __launch_bounds__(Mma::TRAITS.threads(), 1) steer_kernel(Launch launch) {
  using W = typename Mma::ElementWeight;
  const Arguments &a = launch.a;
  const SharedStorage<Mma> storage(a, launch.tile_rows, launch.stages);
  storage.init_barriers();
  prefetch_stages(a, storage);
  if (a.programmatic) prefetch_weights<W>(a);
  wait_on_dependent_grids();
  if (a.counts) {
    lookup(a);
    grid_wait(a, grid_arrive(a));
    grid_wait(a, grid_arrive(a));  // an even number of rounds restores the barrier's word
  }
  select<H, W>(a);
  grid_wait(a, grid_arrive(a));
  const int n_waiting = stream<Mma>(a, storage);
  const int token = grid_arrive(a);
  // The same in every block. If no row needed the stream, there is nothing to wait for.
  if (n_waiting) grid_wait(a, token);
  tail<H, W>(a);
}

template <class Mma, class H> int launch_steer(const Arguments &a, const Device &device, void *stream) {
  constexpr KernelTraits traits = Mma::TRAITS;
  const int tile_rows = rows_per_tile(traits, a.n_rows, a.d_in, device.shared);
  if (!tile_rows) return DSPA_NO_SHARED_MEMORY;
  const int stages = stage_count(traits, tile_rows, a.d_in, device.shared);
  return launch_cooperative(steer_kernel<Mma, H>, Launch{a, tile_rows, stages}, device, traits.threads(),
                            shared_bytes(traits, tile_rows, a.d_in, stages), stream, a.programmatic != 0);
}

// Operands of one 16-bit dtype: tensor cores, and up to eight rows resident in shared memory if they fit.
template <class T, class S> int launch_native(const Arguments &a, const Device &device, void *stream) {
  using Few = TensorCoreMma<T, S, true>;
  using Many = TensorCoreMma<T, S, false>;
  const bool few = a.n_rows <= rows_per_tile(Few::TRAITS, a.n_rows, a.d_in, device.shared);
  return few ? launch_steer<Few, T>(a, device, stream) : launch_steer<Many, T>(a, device, stream);
}

// True if rows multiply without normalisation or conversion.
inline bool is_native(const Arguments &a) {
  return a.h_dtype == a.W_dtype && a.W_dtype != DSPA_FP32 && a.normalize == DSPA_NONE;
}

template <class W, bool SCREENED> int launch_weights(const Arguments &a, const Device &device, void *stream) {
  using Stored = std::conditional_t<SCREENED, int8_t, W>;
  if constexpr (sizeof(W) == 2)
    if (is_native(a)) return launch_native<W, Stored>(a, device, stream);
  return launch_steer<SimtMma<W, Stored>, void>(a, device, stream);
}

template <bool SCREENED> int launch_dtype(const Arguments &a, const Device &device, void *stream) {
  switch (a.W_dtype) {
    case DSPA_BF16: return launch_weights<bf16, SCREENED>(a, device, stream);
    case DSPA_FP16: return launch_weights<fp16, SCREENED>(a, device, stream);
    default: return launch_weights<float, SCREENED>(a, device, stream);
  }
}

// Each in a file of its own, because they take the compiler longest.
int launch_plain(const Arguments &a, const Device &device, void *stream);
int launch_int8(const Arguments &a, const Device &device, void *stream);

}  // namespace dspa
