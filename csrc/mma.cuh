// acc[l, n] += sum_k W[l, k] x[n, k]: products of encoder rows with residual rows, by one of a warpgroup's four warps.
//
// multiply_stage reads both operands from a stage in shared memory. multiply_gathered reads selected latents from
// global memory in the same order of k, so its sums have the same bits.
#pragma once

#include "common.cuh"

namespace dspa {

// Rows of one operand in shared memory.
struct Operand {
  const char *p;
  int stride;
};

template <class T> __device__ inline const T *row_at(Operand o, int i) {
  return reinterpret_cast<const T *>(o.p + i * o.stride);
}

template <class T> __device__ inline uint32_t pack_pair(float x, float y) {
  T two[2] = {rounded<T>(x), rounded<T>(y)};
  uint32_t word;
  memcpy(&word, two, 4);
  return word;
}

// Byte i of `word`, an int8, in fp32. With its sign bit flipped it becomes the last bits of a float from 2^23 on, from
// which 2^23 + 128 is subtracted.
__device__ inline float int8_to_float(uint32_t word, int i) {
  return float_of(int(byte_perm(word ^ 0x80808080, 0x4b000000, 0x7440 + i))) - 8388736.f;
}

// Operands of one 16-bit dtype, with the weights as operand A. One row takes the same instructions as eight, so a row
// has the same bits in any batch. Weights may be int8 (S), which 16 bits hold exactly.
template <class T, class S> struct Mma {
  using Element = T;
  using Stored = S;
  static constexpr bool IS_SCREENED = sizeof(S) == 1;
  static constexpr KernelTraits TRAITS = IS_SCREENED ? SCREENED : PLAIN;
  // Accumulator fragment: thread 4 g + t holds latents g, g, g + 8, g + 8 and rows 2 t, 2 t + 1 twice.
  float acc[4];

  __device__ void clear() {
    for (int i = 0; i < 4; i++) acc[i] = 0.f;
  }

  // Adds the products of slice `i_slice` of a stage that holds `width` numbers of d_in.
  __device__ void multiply_stage(Operand weights, Operand rows, int width, int i_slice) {
    for (int o_k = SLICE * i_slice; o_k < width; o_k += ROUND) {
      if constexpr (IS_SCREENED) multiply_int8_slice(weights, rows, o_k, o_k + MMA_K < width);
      else multiply_slice(weights, rows, o_k, o_k + MMA_K < width);
    }
  }

  // Adds the products of the n_rows rows at p with the latents in the bits m_latent, counted from encoder row `first`.
  __device__ void multiply_gathered(const T *encoder_rows, int64_t first, uint32_t m_latent, const T *p, int d_in,
                                    int n_rows, int i_slice, bool aligned) {
    const int g = lane() / 4, n_steps = 2 * ceil_div(d_in, ROUND);
    const T *weights = encoder_rows + (first + g) * d_in, *row = p + int64_t(g) * d_in;
    const int n_weights[2] = {m_latent >> g & 1 ? d_in : 0, m_latent >> (g + 8) & 1 ? d_in : 0};
    const int n_row = g < n_rows ? d_in : 0;
    for (int begin = 0; begin < n_steps; begin += STEPS_IN_FLIGHT) {
      uint32_t a[STEPS_IN_FLIGHT][4];
#pragma unroll
      for (int i = 0; i < STEPS_IN_FLIGHT; i++) {
        const int o_k = k_step_offset(begin + i, i_slice) + 2 * (lane() % 4);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          a[i][half] = load_pair(n_weights[half], weights + 8 * half * d_in, o_k, aligned);
          a[i][half + 2] = load_pair(n_weights[half], weights + 8 * half * d_in, o_k + 8, aligned);
        }
      }
#pragma unroll
      for (int i = 0; i < STEPS_IN_FLIGHT; i++) {
        if (k_step_offset(begin + i, i_slice) >= d_in) break;
        const int o_k = k_step_offset(begin + i, i_slice) + 2 * (lane() % 4);
        const uint32_t b0 = load_pair(n_row, row, o_k, aligned), b1 = load_pair(n_row, row, o_k + 8, aligned);
        warp_barrier();  // reconverges the lanes that loaded with those that did not
        mma_16x8x16<T>(acc, a[i], b0, b1);
      }
    }
  }

  // Stores this thread's part of the tile for the reduction over slices.
  __device__ void store_partials(float *partials) const {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) partials[(g + 8 * (i / 2)) * (MMA_N + 1) + 2 * t + i % 2] = acc[i];
  }

 private:
  // Number of MMA_K steps whose gathered weights are in flight together.
  static constexpr int STEPS_IN_FLIGHT = 9;

  // Offset in d_in of the i-th MMA_K step of a slice.
  __device__ static int k_step_offset(int i, int i_slice) {
    return ROUND * (i / 2) + SLICE * i_slice + MMA_K * (i % 2);
  }

  // Numbers o_k and o_k + 1 of a row with n numbers, with zeros after its end.
  __device__ static uint32_t load_pair(int n, const T *row, int o_k, bool aligned) {
    if (aligned && o_k < n) return *reinterpret_cast<const uint32_t *>(row + o_k);
    const T none = rounded<T>(0.f);
    const T two[2] = {o_k < n ? row[o_k] : none, o_k + 1 < n ? row[o_k + 1] : none};
    uint32_t word;
    memcpy(&word, two, 4);
    return word;
  }

  // One slice, in two MMA_K steps; the second is skipped unless `both`.
  __device__ void multiply_slice(Operand weights, Operand rows, int o_k, bool both) {
    uint32_t a[2][4], b[4];
#pragma unroll
    for (int i = 0; i < 2; i++)
      ldmatrix(a[i], row_at<T>(weights, lane() % 16) + o_k + MMA_K * i + 8 * (lane() / 16));
    ldmatrix(b, row_at<T>(rows, lane() % 8) + o_k + 8 * (lane() / 8));
    mma_16x8x16<T>(acc, a[0], b[0], b[1]);
    if (both) mma_16x8x16<T>(acc, a[1], b[2], b[3]);
  }

  // One slice of int8 weights. Thread t of four loads numbers 4 t to 4 t + 3 of a step in place of the fragment's 2 t,
  // 2 t + 1, 2 t + 8 and 2 t + 9. Both operands are permuted in the same way, so the sum has the same terms.
  __device__ void multiply_int8_slice(Operand weights, Operand rows, int o_k, bool both) {
    const int g = lane() / 4, o = o_k + 4 * (lane() % 4);
    uint32_t a[2][4], b[2][2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t q;
        memcpy(&q, __builtin_assume_aligned(row_at<int8_t>(weights, g + 8 * half) + o + MMA_K * i, 4), 4);
        a[i][half] = pack_pair<T>(int8_to_float(q, 0), int8_to_float(q, 1));
        a[i][half + 2] = pack_pair<T>(int8_to_float(q, 2), int8_to_float(q, 3));
      }
      memcpy(b[i], __builtin_assume_aligned(row_at<T>(rows, g) + o + MMA_K * i, 8), 8);
    }
    mma_16x8x16<T>(acc, a[0], b[0][0], b[0][1]);
    if (both) mma_16x8x16<T>(acc, a[1], b[1][0], b[1][1]);
  }
};

}  // namespace dspa
