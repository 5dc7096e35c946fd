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

// Eight consecutive numbers of a row, with zeros after its end.
template <class T> struct Vec8 {
  T x[8];
  __device__ float operator[](int i) const { return to_float(x[i]); }

  // ALIGNED: the address is a multiple of 16 bytes, and the row's length is a multiple of eight.
  template <bool ALIGNED> __device__ void load(const T *p, int left) {
    if constexpr (ALIGNED) {
      uint4 words[sizeof(T) / 2];
#pragma unroll
      for (int i = 0; i < int(sizeof(T)) / 2; i++)
        words[i] = left > 0 ? load16(reinterpret_cast<const char *>(p) + 16 * i) : uint4{0, 0, 0, 0};
      memcpy(x, words, sizeof(x));
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) x[i] = i < left ? p[i] : rounded<T>(0.f);
    }
  }
};

// Reductions over a warp, always in the same order; every thread gets the result.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
template <class T> __device__ inline T warp_max(T x) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) {
    const T other = shuffle_xor(x, mask);
    x = other > x ? other : x;
  }
  return x;
}
template <class T> __device__ inline T warp_min(T x) { return -warp_max(-x); }

// True if all rows can be loaded and copied 16 bytes at a time.
__device__ inline bool is_aligned(const Arguments &a) {
  const auto bits = reinterpret_cast<uintptr_t>(a.h) | reinterpret_cast<uintptr_t>(a.encoder_rows) |
                   reinterpret_cast<uintptr_t>(a.columns_encoder_rows) |
                   reinterpret_cast<uintptr_t>(a.screen_rows) | reinterpret_cast<uintptr_t>(a.screen_mean);
  return bits % 16 == 0 && a.d_in % MMA_K == 0;
}

// The plan row that a residual row is assigned to, and whether the row's position is past the plan's start.
__device__ inline int assigned_plan(const Arguments &a, int i_row) { return a.rows ? a.rows[i_row] : i_row; }
__device__ inline bool is_past_start(const Arguments &a, int i_row, int plan) {
  return !a.positions || a.positions[i_row] >= a.start[plan];
}
// The plan row that steers a residual row, or -1.
__device__ inline int active_plan(const Arguments &a, int i_row) {
  const int plan = assigned_plan(a, i_row);
  return plan >= 0 && is_past_start(a, i_row, plan) ? plan : -1;
}

__device__ inline float *latent_values_of(const Arguments &a, int i_row) {
  return a.latent_values + int64_t(i_row) * (a.n_slots + a.n_large);
}

// Summary of a row's selected and large latents:
//
//   required_shift   the smallest alpha M that sets all active selected latents to 0; infinite if one of them is
//                    augmented, 0 if none is active
//   min_active       the smallest active selected value
//   lower_bound      a lower bound on M
struct Summary {
  float required_shift, min_active, lower_bound;
};

// By one warp.
__device__ inline Summary summarise(const Arguments &a, int i_row, int plan) {
  float required_shift = 0.f, min_active = INF, lower_bound = 0.f;
  if (plan >= 0 && a.finite[i_row]) {
    const float *value = latent_values_of(a, i_row);
    const int8_t *sign = a.signs + int64_t(plan) * a.n_slots;
    for (int i = lane(); i < a.n_slots + a.n_large; i += 32) {
      const float f = value[i];
      lower_bound = fmaxf(lower_bound, f);
      if (i < a.n_slots && f > 0.f) {
        required_shift = fmaxf(required_shift, sign[i] > 0 ? INF : f);
        min_active = fminf(min_active, f);
      }
    }
  }
  return {warp_max(required_shift), warp_min(min_active), warp_max(lower_bound)};
}

// Prefetches cache lines into the L2 cache; thread `i` of `n` takes every n-th.
__device__ inline void prefetch_lines(const void *p, int64_t bytes, int i, int n) {
  constexpr int line = 128;
  for (int64_t o = int64_t(line) * i; o < bytes; o += int64_t(line) * n) prefetch_l2(static_cast<const char *>(p) + o);
}

// True if a lower bound on M can settle a row. It cannot if M itself is recorded, or if ranks decide what is active.
__device__ inline bool can_settle(const Arguments &a) { return !a.record && !a.k; }

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
