// h'_n = h_n + scale_n sum_j (f'_j - f_j) W_dec[j] over the active selected latents j of row n, where
// f'_j = f_j + alpha M (augment) or max(f_j - alpha M, 0) (ablate) and M = max over all latents of f.
//
// One launch of as many blocks as the device has multiprocessors, which wait for each other between the phases:
// lookup (with counts), select, stream, tail. What a phase leaves for the next lies in scratch that is written before
// it is read, so nothing is cleared. Shared memory is the ring of the stream and what schedule.h lays out before it.
#pragma once

#include "lookup.cuh"
#include "select.cuh"
#include "stream.cuh"
#include "supported.h"
#include "tail.cuh"

namespace dspa {

struct Launch {
  Arguments a;
  int rows, stages;  // rows that are multiplied together
};

// What the select phase will read, whatever the launch before this one leaves: the columns and the large latents.
template <class W> __device__ void prefetch_weights(const Arguments &a) {
  const int64_t row_bytes = int64_t(a.d_in) * sizeof(W);
  const int i = block() * n_threads() + thread(), n = n_blocks() * n_threads();
  prefetch_lines(a.columns_W_enc, a.n_columns * row_bytes, i, n);
  prefetch_lines(a.W_enc, a.n_large * row_bytes, i, n);
}

template <class P, class H> __global__ void __launch_bounds__(P::SHAPE.threads(), 1) steer_kernel(Launch launch) {
  using W = typename P::Weight;
  const Arguments &a = launch.a;
  const Room<P> room(a, launch.rows, launch.stages);
  room.init();
  fill_ahead(a, room);
  if (a.programmatic) prefetch_weights<W>(a);
  wait_for_dependency();
  if (a.counts) {
    lookup(a);
    grid_wait(a, grid_arrive(a));
    grid_wait(a, grid_arrive(a));  // an even number of rounds leaves the word as it was
  }
  select<H, W>(a);
  grid_wait(a, grid_arrive(a));
  const int n_waiting = stream<P>(a, room);
  const int ticket = grid_arrive(a);
  // Every block finds the same: where no row waited for a stream there is nothing to wait for.
  if (n_waiting) grid_wait(a, ticket);
  tail<H, W>(a);
}

template <class P, class H> int launch_steer(const Arguments &a, const Device &device, void *stream) {
  constexpr Shape shape = P::SHAPE;
  const int rows = rows_at_once(shape, a.n_rows, a.d_in, device.shared);
  if (!rows) return DSPA_NO_ROOM;
  const int stages = stages_of(shape, rows, a.d_in, device.shared);
  return launch_together(steer_kernel<P, H>, Launch{a, rows, stages}, device, shape.threads(),
                         shared_bytes(shape, rows, a.d_in, stages), stream, a.programmatic != 0);
}

// Operands of one 16-bit dtype: tensor cores, and up to eight rows kept in shared memory where they leave room.
template <class T, class S> int launch_native(const Arguments &a, const Device &device, void *stream) {
  using Few = TensorCore<T, S, true>;
  using Many = TensorCore<T, S, false>;
  const bool few = a.n_rows <= rows_at_once(Few::SHAPE, a.n_rows, a.d_in, device.shared);
  return few ? launch_steer<Few, T>(a, device, stream) : launch_steer<Many, T>(a, device, stream);
}

// Whether rows multiply as they are.
inline bool is_native(const Arguments &a) {
  return a.h_dtype == a.W_dtype && a.W_dtype != DSPA_FP32 && a.normalize == DSPA_NONE;
}

template <class W, bool SCREENED> int launch_weights(const Arguments &a, const Device &device, void *stream) {
  using Stored = std::conditional_t<SCREENED, int8_t, W>;
  if constexpr (sizeof(W) == 2)
    if (is_native(a)) return launch_native<W, Stored>(a, device, stream);
  return launch_steer<FullPrecision<W, Stored>, void>(a, device, stream);
}

template <bool SCREENED> int launch_dtype(const Arguments &a, const Device &device, void *stream) {
  switch (a.W_dtype) {
    case DSPA_BF16: return launch_weights<bf16, SCREENED>(a, device, stream);
    case DSPA_FP16: return launch_weights<fp16, SCREENED>(a, device, stream);
    default: return launch_weights<float, SCREENED>(a, device, stream);
  }
}

// Defined in a file each, since they take the compiler longest.
int launch_plain(const Arguments &a, const Device &device, void *stream);
int launch_int8(const Arguments &a, const Device &device, void *stream);

}  // namespace dspa
