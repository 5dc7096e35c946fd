// Shared by the phases: vector loads, warp reductions, normalised rows, the plan of a row, the grid barrier.
//
// Indices are i_, offsets o_ and masks m_, as in the Triton kernels. Products and sums are fused only where fmaf says
// so (--fmad=false), because values that are compared with each other have to be rounded in the same way.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

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

// Access to residual rows. Their dtype is known at compile time (H) where they multiply without conversion, and at run
// time (void) elsewhere.
template <class H> struct ResidualRows {
  using Vec = Vec8<H>;
  static constexpr int LOADS_IN_FLIGHT = 5;
  const H *p;
  __device__ ResidualRows(const void *base, int) : p(static_cast<const H *>(base)) {}
  __device__ float at(int64_t i) const { return to_float(p[i]); }
  template <bool ALIGNED> __device__ void load(Vec &to, int64_t i, int left) const {
    to.template load<ALIGNED>(p + i, left);
  }
  __device__ static void store(void *to, int64_t i, float value, int) { static_cast<H *>(to)[i] = rounded<H>(value); }
  __device__ static void copy(void *to, const void *from, int64_t i, int) {
    static_cast<H *>(to)[i] = static_cast<const H *>(from)[i];
  }
};
template <> struct ResidualRows<void> {
  using Vec = Vec8<float>;
  static constexpr int LOADS_IN_FLIGHT = 2;
  const void *p;
  int dtype;
  __device__ ResidualRows(const void *base, int dtype) : p(base), dtype(dtype) {}
  __device__ float at(int64_t i) const {
    if (dtype == DSPA_BF16) return to_float(static_cast<const bf16 *>(p)[i]);
    if (dtype == DSPA_FP16) return to_float(static_cast<const fp16 *>(p)[i]);
    return static_cast<const float *>(p)[i];
  }
  template <bool ALIGNED> __device__ void load(Vec &to, int64_t i, int left) const {
    if (dtype == DSPA_FP32) return to.load<ALIGNED>(static_cast<const float *>(p) + i, left);
    for (int j = 0; j < 8; j++) to.x[j] = j < left ? at(i + j) : 0.f;
  }
  __device__ static void store(void *to, int64_t i, float value, int dtype) {
    if (dtype == DSPA_BF16) static_cast<bf16 *>(to)[i] = rounded<bf16>(value);
    else if (dtype == DSPA_FP16) static_cast<fp16 *>(to)[i] = rounded<fp16>(value);
    else static_cast<float *>(to)[i] = value;
  }
  __device__ static void copy(void *to, const void *from, int64_t i, int dtype) {
    if (dtype == DSPA_FP32) static_cast<float *>(to)[i] = static_cast<const float *>(from)[i];
    else static_cast<uint16_t *>(to)[i] = static_cast<const uint16_t *>(from)[i];
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
                   reinterpret_cast<uintptr_t>(a.columns_encoder_rows) | reinterpret_cast<uintptr_t>(a.x) |
                   reinterpret_cast<uintptr_t>(a.screen_rows) | reinterpret_cast<uintptr_t>(a.screen_mean);
  return bits % 16 == 0 && a.d_in % MMA_K == 0;
}

// n(h) = (h - mean) / divisor. An edit is multiplied by scale before it is added to h.
//
//   layer_norm               divisor = std + 1e-5             scale = std
//   constant_norm_rescale    divisor = ||h|| / sqrt(d_in)     scale = divisor
//   none                     divisor = 1                      scale = 1
//
// With H a dtype, rows are not normalised.
template <class H> struct Norm {
  float mean, divisor, scale;
  int normalize;
  __device__ float apply(float x) const {
    if constexpr (!std::is_void_v<H>) return x;
    return normalize == DSPA_NONE ? x : (x - mean) / divisor;
  }
};

// A residual row as a warp reads it: eight of every 256 numbers per thread, with N_VECS loads in flight.
template <class H, bool ALIGNED> struct ResidualRow {
  static constexpr int N_VECS = ALIGNED ? ResidualRows<H>::LOADS_IN_FLIGHT : 1;
  ResidualRows<H> rows;
  int64_t begin;
  int d_in;

  __device__ ResidualRow(const Arguments &a, int i_row)
      : rows(a.h, a.h_dtype), begin(int64_t(i_row) * a.d_in), d_in(a.d_in) {}

  // Calls f(offset, number of valid elements, vector) in order.
  template <class F> __device__ void for_each_vec(F &&f) const {
    for (int o = 8 * lane(); o < d_in; o += 256 * N_VECS) {
      typename ResidualRows<H>::Vec x[N_VECS];
#pragma unroll
      for (int i = 0; i < N_VECS; i++) rows.template load<ALIGNED>(x[i], begin + o + 256 * i, d_in - o - 256 * i);
#pragma unroll
      for (int i = 0; i < N_VECS; i++)
        if (o + 256 * i < d_in) f(o + 256 * i, ALIGNED ? 8 : min(8, d_in - o - 256 * i), x[i]);
    }
  }
};

template <class H, bool ALIGNED>
__device__ inline Norm<H> norm_of(const ResidualRow<H, ALIGNED> &row, const Arguments &a) {
  using Vec = typename ResidualRows<H>::Vec;
  Norm<H> norm = {0.f, 1.f, 1.f, a.normalize};
  if (!std::is_void_v<H> || a.normalize == DSPA_NONE) return norm;
  if (a.normalize == DSPA_LAYER_NORM) {
    float sum = 0.f;
    row.for_each_vec([&](int, int, const Vec &x) {
      for (int i = 0; i < 8; i++) sum += x[i];
    });
    norm.mean = warp_sum(sum) / float(a.d_in);
  }
  float sum_of_squares = 0.f;
  row.for_each_vec([&](int, int n, const Vec &x) {
    for (int i = 0; i < 8; i++) {
      const float centered = i < n ? x[i] - norm.mean : 0.f;
      sum_of_squares = fmaf(centered, centered, sum_of_squares);
    }
  });
  sum_of_squares = warp_sum(sum_of_squares);
  if (a.normalize == DSPA_LAYER_NORM) {
    norm.scale = sqrtf(sum_of_squares / float(a.d_in - 1));
    norm.divisor = norm.scale + 1e-5f;
  } else {
    norm.scale = norm.divisor = sqrtf(sum_of_squares / float(a.d_in));
  }
  return norm;
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
