// What the phases share: numbers of any dtype, sums over a warp, normalised rows, the plan of a row, the grid barrier.
//
// Indices are i_, offsets o_ and masks m_, as in the Triton kernels. Sums are written with fmaf where they are meant to
// be fused, since the compiler fuses nothing by itself (--fmad=false): what is compared has to round one way.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "c_api.h"
#include "primitives.cuh"
#include "schedule.h"

namespace dspa {

using Arguments = dspa_steer_arguments;

constexpr float INFINITE = __builtin_huge_valf();

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

// Eight numbers as they lie in memory, zeros where fewer are left.
template <class T> struct Eight {
  T x[8];
  __device__ float operator[](int i) const { return to_float(x[i]); }

  // ALIGNED: to 16 bytes, and of rows that end at a multiple of eight.
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

// Residual rows, whose dtype is a constant where they multiply as they are (H) and a number elsewhere (void).
template <class H> struct Rows {
  using Loaded = Eight<H>;
  static constexpr int UNDER_WAY = 5;
  const H *p;
  __device__ Rows(const void *base, int) : p(static_cast<const H *>(base)) {}
  __device__ float at(int64_t i) const { return to_float(p[i]); }
  template <bool ALIGNED> __device__ void load(Loaded &to, int64_t i, int left) const {
    to.template load<ALIGNED>(p + i, left);
  }
  __device__ static void store(void *to, int64_t i, float value, int) { static_cast<H *>(to)[i] = rounded<H>(value); }
  __device__ static void copy(void *to, const void *from, int64_t i, int) {
    static_cast<H *>(to)[i] = static_cast<const H *>(from)[i];
  }
};
template <> struct Rows<void> {
  using Loaded = Eight<float>;
  static constexpr int UNDER_WAY = 2;
  const void *p;
  int dtype;
  __device__ Rows(const void *base, int dtype) : p(base), dtype(dtype) {}
  __device__ float at(int64_t i) const {
    if (dtype == DSPA_BF16) return to_float(static_cast<const bf16 *>(p)[i]);
    if (dtype == DSPA_FP16) return to_float(static_cast<const fp16 *>(p)[i]);
    return static_cast<const float *>(p)[i];
  }
  template <bool ALIGNED> __device__ void load(Loaded &to, int64_t i, int left) const {
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

// Over the 32 threads of a warp, in one order whatever the block is; all of them get the result.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
template <class T> __device__ inline T warp_most(T x) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) {
    const T other = shuffle_xor(x, mask);
    x = other > x ? other : x;
  }
  return x;
}
template <class T> __device__ inline T warp_least(T x) { return -warp_most(-x); }

// Whether rows can be read in pieces of 16 bytes, and copied so.
__device__ inline bool is_aligned(const Arguments &a) {
  const auto low = reinterpret_cast<uintptr_t>(a.h) | reinterpret_cast<uintptr_t>(a.W_enc) |
                   reinterpret_cast<uintptr_t>(a.columns_W_enc) | reinterpret_cast<uintptr_t>(a.x) |
                   reinterpret_cast<uintptr_t>(a.screen_W_enc) | reinterpret_cast<uintptr_t>(a.screen_mean);
  return low % 16 == 0 && a.d_in % STEP == 0;
}

// n(h) = (h - mean) / divisor, and an edit is multiplied by scale.
//
// layer_norm: divisor std + 1e-5, scale std; constant_norm_rescale: both ||h|| / sqrt(d_in); none: both 1.
// Rows that multiply as they are have none.
template <class H> struct Norm {
  float mean, divisor, scale;
  int normalize;
  __device__ float apply(float x) const {
    if constexpr (!std::is_void_v<H>) return x;
    return normalize == DSPA_NONE ? x : (x - mean) / divisor;
  }
};

// A residual row as a warp reads it: a thread takes eight numbers of every 256, of which several are under way.
template <class H, bool ALIGNED> struct Row {
  static constexpr int EIGHTS = ALIGNED ? Rows<H>::UNDER_WAY : 1;
  Rows<H> rows;
  int64_t begin;
  int d_in;

  __device__ Row(const Arguments &a, int i_row) : rows(a.h, a.h_dtype), begin(int64_t(i_row) * a.d_in), d_in(a.d_in) {}

  // f(where, how many there are, eight numbers), in order.
  template <class F> __device__ void for_eights(F &&f) const {
    for (int o = 8 * lane(); o < d_in; o += 256 * EIGHTS) {
      typename Rows<H>::Loaded x[EIGHTS];
#pragma unroll
      for (int i = 0; i < EIGHTS; i++) rows.template load<ALIGNED>(x[i], begin + o + 256 * i, d_in - o - 256 * i);
#pragma unroll
      for (int i = 0; i < EIGHTS; i++)
        if (o + 256 * i < d_in) f(o + 256 * i, ALIGNED ? 8 : least(8, d_in - o - 256 * i), x[i]);
    }
  }
};

template <class H, bool ALIGNED>
__device__ inline Norm<H> norm_of(const Row<H, ALIGNED> &row, const Arguments &a) {
  using Loaded = typename Rows<H>::Loaded;
  Norm<H> norm = {0.f, 1.f, 1.f, a.normalize};
  if (!std::is_void_v<H> || a.normalize == DSPA_NONE) return norm;
  if (a.normalize == DSPA_LAYER_NORM) {
    float sum = 0.f;
    row.for_eights([&](int, int, const Loaded &x) {
      for (int i = 0; i < 8; i++) sum += x[i];
    });
    norm.mean = warp_sum(sum) / float(a.d_in);
  }
  float square = 0.f;
  row.for_eights([&](int, int n, const Loaded &x) {
    for (int i = 0; i < 8; i++) {
      const float off = i < n ? x[i] - norm.mean : 0.f;
      square = fmaf(off, off, square);
    }
  });
  square = warp_sum(square);
  if (a.normalize == DSPA_LAYER_NORM) {
    norm.scale = sqrtf(square / float(a.d_in - 1));
    norm.divisor = norm.scale + 1e-5f;
  } else {
    norm.scale = norm.divisor = sqrtf(square / float(a.d_in));
  }
  return norm;
}

// Plan row that a residual row names, and whether it has come to where it is steered.
__device__ inline int named_plan(const Arguments &a, int i_row) { return a.rows ? a.rows[i_row] : i_row; }
__device__ inline bool has_begun(const Arguments &a, int i_row, int plan) {
  return !a.positions || a.positions[i_row] >= a.start[plan];
}
// Plan row of a residual row, -1 where it is not steered.
__device__ inline int plan_of(const Arguments &a, int i_row) {
  const int plan = named_plan(a, i_row);
  return plan >= 0 && has_begun(a, i_row, plan) ? plan : -1;
}

__device__ inline float *values_of(const Arguments &a, int i_row) {
  return a.value + int64_t(i_row) * (a.n_slots + a.n_large);
}

// Of a row, found by one warp. need: what alpha M has to reach to send all its active latents to 0, infinite where one
// augments, 0 where none is active; low: its least active value; bound: a lower bound on M.
struct Summary {
  float need, low, bound;
};

__device__ inline Summary summarise(const Arguments &a, int i_row, int plan) {
  float need = 0.f, low = INFINITE, bound = 0.f;
  if (plan >= 0 && a.finite[i_row]) {
    const float *value = values_of(a, i_row);
    const int8_t *sign = a.signs + int64_t(plan) * a.n_slots;
    for (int i = lane(); i < a.n_slots + a.n_large; i += 32) {
      const float f = value[i];
      bound = fmaxf(bound, f);
      if (i < a.n_slots && f > 0.f) {
        need = fmaxf(need, sign[i] > 0 ? INFINITE : f);
        low = fminf(low, f);
      }
    }
  }
  return {warp_most(need), warp_least(low), warp_most(bound)};
}

// Brings weights nearer: line after line, of which thread `i` of `n` takes every n-th.
__device__ inline void prefetch_lines(const void *p, int64_t bytes, int i, int n) {
  constexpr int line = 128;
  for (int64_t o = int64_t(line) * i; o < bytes; o += int64_t(line) * n) prefetch(static_cast<const char *>(p) + o);
}

// Whether a lower bound on M can settle a row: not if M is told, nor by a bound on a rank.
__device__ inline bool can_settle(const Arguments &a) { return !a.record && !a.k; }

// Announces, after everything that this block wrote, that it came this far; one thread gets what to wait on.
__device__ inline int grid_arrive(const Arguments &a) {
  block_barrier();
  return thread() == 0 ? arrive_at(a.barrier, arrival(block(), n_blocks())) : 0;
}

// Until all blocks have arrived, which run at one time.
__device__ inline void grid_wait(const Arguments &a, int ticket) {
  if (thread() == 0) wait_for_sign(a.barrier, ticket);
  block_barrier();
}

}  // namespace dspa
