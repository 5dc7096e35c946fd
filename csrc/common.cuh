// Shared by the phases: vector loads, warp reductions, the plan of a row, the grid barrier.
//
// Indices are i_, offsets o_ and masks m_, as in the Triton kernels. Products and sums are fused only where fmaf says
// so (--fmad=false), because values that are compared with each other have to be rounded in the same way.
#pragma once

#include <cstdint>
#include <cstring>

#include "c_api.h"
#include "primitives.cuh"
#include "schedule.h"

namespace dspa {

using Arguments = dspa_steer_arguments;

constexpr float INF = __builtin_huge_valf();
// Residuals are smaller than this, since the squares that a norm sums up would overflow.
constexpr float RESIDUAL_LIMIT = 0x1p56f;

__device__ inline int bits_of(float x) {
  int bits;
  memcpy(&bits, &x, 4);
  return bits;
}
__device__ inline float float_of(int bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Eight consecutive numbers of a row, at a multiple of 16 bytes.
template <class T> struct Vec8 {
  T x[8];
  __device__ float operator[](int i) const { return to_float(x[i]); }

  __device__ void load(const T *p) {
    uint4 words[sizeof(T) / 2];
#pragma unroll
    for (int i = 0; i < int(sizeof(T)) / 2; i++) words[i] = load16(reinterpret_cast<const char *>(p) + 16 * i);
    memcpy(x, words, sizeof(x));
  }
  __device__ void store(T *p) const {
    memcpy(__builtin_assume_aligned(reinterpret_cast<char *>(p), 16), x, sizeof(x));
  }
  // Sums rounded to T.
  __device__ void add(const Vec8 &other) {
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = rounded<T>(to_float(x[i]) + other[i]);
  }
  // The first `left` of them, number by number, and zeros.
  __device__ void load_part(const T *p, int left) {
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = i < left ? p[i] : rounded<T>(0.f);
  }
  __device__ void store_part(T *p, int left) const {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (i < left) p[i] = x[i];
  }
};

// Reductions over a warp, always in the same order; every thread gets the result.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
// Over `width` consecutive threads, a power of two.
__device__ inline float warp_max(float x, int width = 32) {
  for (int mask = width / 2; mask; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}
__device__ inline float warp_min(float x, int width = 32) { return -warp_max(-x, width); }

// True if all rows can be loaded and copied 16 bytes at a time.
__device__ inline bool is_aligned(const Arguments &a) {
  const auto bits = reinterpret_cast<uintptr_t>(a.h) | reinterpret_cast<uintptr_t>(a.residual) |
                    reinterpret_cast<uintptr_t>(a.out) | reinterpret_cast<uintptr_t>(a.encoder_rows) | reinterpret_cast<uintptr_t>(a.columns_encoder_rows) |
                    reinterpret_cast<uintptr_t>(a.columns_W_dec);
  return bits % 16 == 0 && a.d_in % MMA_K == 0;
}

// The plan row that steers a residual row, or -1.
__device__ inline int active_plan(const Arguments &a, int i_row) {
  const int plan = a.rows ? a.rows[i_row] : i_row;
  return plan >= 0 && (!a.positions || a.positions[i_row] >= a.start[plan]) ? plan : -1;
}

__device__ inline float *slot_values_of(const Arguments &a, int i_row) {
  return a.slot_values + int64_t(i_row) * a.n_slots;
}

// Bits of the rows for which `m_row` is true. By a warp.
template <class F> __device__ inline unsigned ballot_rows(const Arguments &a, F &&m_row) {
  return ballot(lane() < a.n_rows && m_row(lane()));
}

// Summary of up to 16 selected or large latents for a row, as in RowState.
struct Summary {
  float required_shift, min_active, lower_bound;
};

// True if a lower bound on M can settle a row. It cannot if M itself is recorded, or if ranks decide what is active.
__device__ inline bool can_settle(const Arguments &a) { return !a.record && !a.k; }

// alpha of a row: the number of the launch, or that of its plan.
__device__ inline float strength_of(const Arguments &a, const RowState &row) {
  return a.alphas && row.plan >= 0 ? a.alphas[row.plan] : a.alpha;
}

// True if M is still needed for a row with M >= bound.
__device__ inline bool is_waiting(const Arguments &a, const RowState &row, float bound) {
  return row.required_shift > (can_settle(a) ? strength_of(a, row) * bound : 0.f);
}

// Arrives at the grid barrier and releases everything that this block has written. Thread 0 gets the token to wait
// with.
__device__ inline int grid_arrive(const Arguments &a) {
  block_barrier();
  return thread() == 0 ? atomic_add_release(a.barrier, barrier_increment(block(), n_blocks())) : 0;
}

// Waits until all blocks have arrived. They have to be resident together, as in a cooperative launch.
__device__ inline void grid_wait(const Arguments &a, int token) {
  if (thread() == 0) wait_for_sign_flip(a.barrier, token);
  block_barrier();
}

}  // namespace dspa
