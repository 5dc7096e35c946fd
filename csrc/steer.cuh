// h'_n = h_n + sum_j (f'_j - f_j) W_dec[j] over the active selected latents j of row n, where
// f'_j = f_j + alpha M (augment) or max(f_j - alpha M, 0) (ablate) and M = max over all latents of f.
//
// One cooperative launch with one block per multiprocessor, and grid barriers between the phases: select, stream (with
// a screen: two passes), tail. The phases hand results on in scratch that is written before it is read, so nothing is
// cleared. schedule.h lays out shared memory.
#pragma once

#include "screen.cuh"
#include "select.cuh"
#include "supported.h"
#include "tail.cuh"

namespace dspa {

struct Launch {
  Arguments a;
  int stages;
};

// Prefetches weights that the select phase reads: the columns' and the large latents'.
__device__ inline void prefetch_weights(const Arguments &a) {
  constexpr int line = 128;
  const int64_t row_bytes = int64_t(a.d_in) * NUMBER_BYTES, step = int64_t(line) * n_blocks() * n_threads();
  const int64_t first = int64_t(line) * (block() * n_threads() + thread());
  const char *columns = static_cast<const char *>(a.columns_encoder_rows);
  const char *large = static_cast<const char *>(a.encoder_rows);
#pragma unroll 1
  for (int64_t o = first; o < a.n_columns * row_bytes; o += step) prefetch_l2(columns + o);
#pragma unroll 1
  for (int64_t o = first; o < a.n_large * row_bytes; o += step) prefetch_l2(large + o);
}

// The second pass of the screen. Returns the number of encoder rows that this block read.
template <class Storage>
__device__ int evaluate_candidates(const Arguments &a, const Storage &storage, PipelineState &state, Consumer &consumer,
                                   unsigned waiting) {
  grid_wait(a, grid_arrive(a));
  waiting = raise_bounds(a, storage, waiting);
  if (storage.is_producer()) return load_candidates(a, storage, state, *a.n_candidates, waiting);
  evaluate_stream(a, storage, state, consumer);
  return 0;
}

// The stream phase for rows that wait. Returns the number of encoder rows that this block read in full.
template <class Storage>
__device__ int stream(const Arguments &a, const Storage &storage, PipelineState &state, Consumer &consumer, int n_ahead,
                      unsigned waiting) {
  const int *bound = Storage::IS_SCREENED ? a.screen_bound : a.running_max;
  int n_read = 0;
  if (storage.is_producer()) n_read = load_stream(a, storage, state, n_ahead, waiting, bound);
  else if (Storage::IS_SCREENED) screen_stream(a, storage, state, consumer);
  else evaluate_stream(a, storage, state, consumer);
  return Storage::IS_SCREENED ? evaluate_candidates(a, storage, state, consumer, waiting) : n_read;
}

template <class T, bool IS_SCREENED>
__global__ void __launch_bounds__(kernel_traits(IS_SCREENED).threads(), 1) steer_kernel(Launch launch) {
  const Arguments &a = launch.a;
  const SharedStorage<T, IS_SCREENED> storage(a, launch.stages);
  const bool is_producer = storage.is_producer(), selects = block() < n_select_items(a);
  PipelineState state = {0, 0};
  Consumer consumer;
  int n_ahead = 0;
  storage.init_barriers();
  if (is_producer && !selects) n_ahead = fill_ahead(a, storage, state, 0);
  if (a.programmatic) prefetch_weights(a);
  wait_on_dependent_grids();

  prepare_rows(a, storage);
  if (!is_producer) {
    evaluate_selected(a, storage, state, consumer);
  } else if (selects) {
    const int n_used = load_selected(a, storage, state);
    n_ahead = fill_ahead(a, storage, state, n_used);
  }
  grid_wait(a, grid_arrive(a));

  const unsigned waiting = find_waiting_rows(a, storage);  // the same in every block
  if (waiting) {
    const int n_read = stream(a, storage, state, consumer, n_ahead, waiting);
    if (a.paths && is_producer && lane() == 0 && n_read) atomic_add(a.paths + 5, int64_t(n_read));
    const int token = grid_arrive(a);
    prefetch_tail(a, storage);
    grid_wait(a, token);
  } else if (is_producer) {
    drain(storage, state, n_ahead);
  }
  tail(a, storage, waiting);
}

template <class T, bool IS_SCREENED> int launch_steer(const Arguments &a, const Device &device, void *stream) {
  constexpr KernelTraits traits = kernel_traits(IS_SCREENED);
  const int stages = stage_count(traits, a.d_in, device.shared);
  if (!stages) return DSPA_NO_SHARED_MEMORY;
  const Launch launch = {a, stages};
  const int shared = shared_bytes(traits, a.d_in, stages);
  // In a green context or an MPS partition fewer blocks fit than the device has multiprocessors.
  for (int blocks = device.multiprocessors;; blocks /= 2) {
    const int error = launch_cooperative<steer_kernel<T, IS_SCREENED>>(launch, device, blocks, traits.threads(), shared,
                                                                       stream, a.programmatic != 0);
    if (error != TOO_LARGE || blocks == 1) return error;
  }
}

template <bool IS_SCREENED> int launch_dtype(const Arguments &a, const Device &device, void *stream) {
  return a.dtype == DSPA_BF16 ? launch_steer<bf16, IS_SCREENED>(a, device, stream)
                              : launch_steer<fp16, IS_SCREENED>(a, device, stream);
}

// Each in a file of its own, because they take the compiler longest.
int launch_plain(const Arguments &a, const Device &device, void *stream);
int launch_int5(const Arguments &a, const Device &device, void *stream);

}  // namespace dspa
