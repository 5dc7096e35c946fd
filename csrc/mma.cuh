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

// Tensor cores, for operands of one 16-bit dtype, with the weights as operand A. One row takes the same instructions as
// 64, so a row has the same bits in any batch. Weights may be int8 (S), which 16 bits hold exactly.
template <class T, class S, bool FEW_ROWS> struct TensorCoreMma {
  using ElementWeight = T;
  using ElementStored = S;
  using ElementRow = T;
  static constexpr bool SCREENED = sizeof(S) == 1;
  static constexpr KernelTraits TRAITS = FEW_ROWS ? few_rows(sizeof(S)) : many_rows(sizeof(S));
  static constexpr int M_TILES = TRAITS.m_tiles, N_TILES = TRAITS.max_rows / MMA_N;
  // Accumulator fragments. In each MMA tile, thread 4 g + t holds latents g, g, g + 8, g + 8 and rows 2 t, 2 t + 1
  // twice.
  float acc[M_TILES][N_TILES][4];

  __device__ void clear() {
    for (int m = 0; m < M_TILES; m++)
      for (int j = 0; j < N_TILES; j++)
        for (int i = 0; i < 4; i++) acc[m][j][i] = 0.f;
  }

  // Adds the products of slice `i_slice` of a stage that holds `width` numbers of d_in.
  __device__ void multiply_stage(Operand weights, Operand rows, int width, int i_slice, int n_rows) {
    for (int o_k = SLICE * i_slice; o_k < width; o_k += ROUND) {
      if constexpr (SCREENED) multiply_int8_slice(weights, rows, o_k, o_k + MMA_K < width, n_rows);
      else multiply_slice(weights, rows, o_k, o_k + MMA_K < width, n_rows);
    }
  }

  // Adds the products of the n_rows rows at p with the latents in the bits m_latent, counted from encoder row `first`.
  __device__ void multiply_gathered(const T *encoder_rows, int64_t first, const uint32_t (&m_latent)[M_TILES],
                                    const T *p, int d_in, int n_rows, int i_slice, bool aligned) {
    const int g = lane() / 4, n_steps = 2 * ceil_div(d_in, ROUND);
    for (int begin = 0; begin < n_steps; begin += STEPS_IN_FLIGHT) {
      uint32_t a[STEPS_IN_FLIGHT][M_TILES][4];
#pragma unroll
      for (int i = 0; i < STEPS_IN_FLIGHT; i++) {
        const int o_k = k_step_offset(begin + i, i_slice) + 2 * (lane() % 4);
        const T *weights = encoder_rows + (first + g) * d_in;
#pragma unroll
        for (int m = 0; m < M_TILES; m++)
#pragma unroll
          for (int half = 0; half < 2; half++, weights += 8 * d_in) {
            const int n = m_latent[m] >> (g + 8 * half) & 1 ? d_in : 0;
            a[i][m][half] = load_pair(n, weights, o_k, aligned);
            a[i][m][half + 2] = load_pair(n, weights, o_k + 8, aligned);
          }
      }
#pragma unroll
      for (int i = 0; i < STEPS_IN_FLIGHT; i++) {
        if (k_step_offset(begin + i, i_slice) >= d_in) break;
        const int o_k = k_step_offset(begin + i, i_slice) + 2 * (lane() % 4);
        const T *row = p + int64_t(g) * d_in;
#pragma unroll
        for (int j = 0; j < N_TILES; j++, row += MMA_N * d_in) {
          if (MMA_N * j >= n_rows) break;
          const int n = MMA_N * j + g < n_rows ? d_in : 0;
          const uint32_t b0 = load_pair(n, row, o_k, aligned), b1 = load_pair(n, row, o_k + 8, aligned);
          warp_barrier();  // reconverges the lanes that loaded with those that did not
#pragma unroll
          for (int m = 0; m < M_TILES; m++) mma_16x8x16<T>(acc[m][j], a[i][m], b0, b1);
        }
      }
    }
  }

  // Stores this thread's part of MMA tile (m, j) for the reduction over slices.
  __device__ void store_partials(float *partials, int m, int j) const {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int i_m = 0; i_m < M_TILES; i_m++)
#pragma unroll
      for (int i_j = 0; i_j < N_TILES; i_j++)
        if (i_m == m && i_j == j)  // registers cannot be indexed at run time
          for (int i = 0; i < 4; i++) partials[(g + 8 * (i / 2)) * (MMA_N + 1) + 2 * t + i % 2] = acc[i_m][i_j][i];
  }

 private:
  // Number of MMA_K steps whose gathered weights are in flight together.
  static constexpr int STEPS_IN_FLIGHT = FEW_ROWS ? 9 : 1;

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
  __device__ void multiply_slice(Operand weights, Operand rows, int o_k, bool both, int n_rows) {
    uint32_t a[M_TILES][2][4];
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const T *row = row_at<T>(weights, MMA_M * m + lane() % 16);
        ldmatrix(a[m][i], row + o_k + MMA_K * i + 8 * (lane() / 16));
      }
#pragma unroll
    for (int j = 0; j < N_TILES; j++) {
      if (MMA_N * j >= n_rows) break;
      uint32_t b[4];
      ldmatrix(b, row_at<T>(rows, MMA_N * j + lane() % 8) + o_k + 8 * (lane() / 8));
#pragma unroll
      for (int m = 0; m < M_TILES; m++) {
        mma_16x8x16<T>(acc[m][j], a[m][0], b[0], b[1]);
        if (both) mma_16x8x16<T>(acc[m][j], a[m][1], b[2], b[3]);
      }
    }
  }

  // One slice of int8 weights. Thread t of four loads numbers 4 t to 4 t + 3 of a step in place of the fragment's 2 t,
  // 2 t + 1, 2 t + 8 and 2 t + 9. Both operands are permuted in the same way, so the sum has the same terms.
  __device__ void multiply_int8_slice(Operand weights, Operand rows, int o_k, bool both, int n_rows) {
    const int g = lane() / 4, o = o_k + 4 * (lane() % 4);
    uint32_t q[2][M_TILES][2], a[2][M_TILES][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int8_t *row = row_at<int8_t>(weights, MMA_M * m + g + 8 * half) + o + MMA_K * i;
          memcpy(&q[i][m][half], __builtin_assume_aligned(row, 4), 4);
          a[i][m][half] = pack_pair<T>(int8_to_float(q[i][m][half], 0), int8_to_float(q[i][m][half], 1));
          a[i][m][half + 2] = pack_pair<T>(int8_to_float(q[i][m][half], 2), int8_to_float(q[i][m][half], 3));
        }
#pragma unroll
    for (int j = 0; j < N_TILES; j++) {
      if (MMA_N * j >= n_rows) break;
      uint32_t b[2][2];
#pragma unroll
      for (int i = 0; i < 2; i++)
        memcpy(b[i], __builtin_assume_aligned(row_at<T>(rows, MMA_N * j + g) + o + MMA_K * i, 8), 8);
#pragma unroll
      for (int m = 0; m < M_TILES; m++) {
        mma_16x8x16<T>(acc[m][j], a[0][m], b[0][0], b[0][1]);
        if (both) mma_16x8x16<T>(acc[m][j], a[1][m], b[1][0], b[1][1]);
      }
    }
  }
};

// Fused multiply-adds, for rows in fp32 with weights of any dtype. Thread 2 l + i of a warp sums half i of each slice
// for latent l and all rows.
template <class W, class S> struct SimtMma {
  using ElementWeight = W;
  using ElementStored = S;
  using ElementRow = float;
  static constexpr bool SCREENED = sizeof(S) == 1;
  static constexpr KernelTraits TRAITS = full_precision(sizeof(S));
  static constexpr int M_TILES = 1, N_TILES = TRAITS.max_rows / MMA_N;
  float acc[N_TILES][MMA_N];

  __device__ void clear() {
    for (int j = 0; j < N_TILES; j++)
      for (int n = 0; n < MMA_N; n++) acc[j][n] = 0.f;
  }

  __device__ void multiply_stage(Operand weights, Operand rows, int width, int i_slice, int n_rows) {
    for (int o_slice = SLICE * i_slice; o_slice < width; o_slice += ROUND) {
      const int o_k = o_slice + MMA_K * (lane() % 2);
      if (o_k >= width) break;
      const S *weight = row_at<S>(weights, lane() / 2) + o_k;
#pragma unroll
      for (int i = 0; i < MMA_K; i += 4) {
        float w[4];
        load_four(w, weight + i);
#pragma unroll
        for (int j = 0; j < N_TILES; j++) {
          if (MMA_N * j >= n_rows) break;
#pragma unroll
          for (int n = 0; n < MMA_N; n++) {
            if (MMA_N * j + n >= n_rows) break;
            float x[4];
            memcpy(x, __builtin_assume_aligned(row_at<float>(rows, MMA_N * j + n) + o_k + i, 16), 16);
#pragma unroll
            for (int k = 0; k < 4; k++) acc[j][n] = fmaf(w[k], x[k], acc[j][n]);
          }
        }
      }
    }
  }

  __device__ void multiply_gathered(const W *encoder_rows, int64_t first, const uint32_t (&m_latent)[M_TILES],
                                    const float *p, int d_in, int n_rows, int i_slice, bool) {
    const int l = lane() / 2;
    if (!(m_latent[0] >> l & 1)) return;
    const W *weights = encoder_rows + (first + l) * d_in;
    for (int o_slice = SLICE * i_slice; o_slice < d_in; o_slice += ROUND)
      for (int i = 0; i < MMA_K; i++) {
        const int o_k = o_slice + MMA_K * (lane() % 2) + i;
        if (o_k >= d_in) break;
        const float w = to_float(weights[o_k]);
        const float *x = p + o_k;
#pragma unroll
        for (int j = 0; j < N_TILES; j++) {
          if (MMA_N * j >= n_rows) break;
#pragma unroll
          for (int n = 0; n < MMA_N; n++, x += d_in)
            if (MMA_N * j + n < n_rows) acc[j][n] = fmaf(w, *x, acc[j][n]);
        }
      }
  }

  __device__ void store_partials(float *partials, int, int j) const {
#pragma unroll
    for (int i_j = 0; i_j < N_TILES; i_j++) {
      if (i_j != j) continue;  // registers cannot be indexed at run time
#pragma unroll
      for (int n = 0; n < MMA_N; n++) {
        const float sum = acc[i_j][n] + shuffle_xor(acc[i_j][n], 1);
        if (lane() % 2 == 0) partials[lane() / 2 * (MMA_N + 1) + n] = sum;
      }
    }
  }

 private:
  __device__ static void load_four(float (&w)[4], const S *p) {
    S numbers[4];
    memcpy(numbers, __builtin_assume_aligned(p, sizeof(numbers)), sizeof(numbers));
    uint32_t word;
    memcpy(&word, numbers, 4);
#pragma unroll
    for (int i = 0; i < 4; i++)
      if constexpr (SCREENED) w[i] = int8_to_float(word, i);
      else w[i] = to_float(numbers[i]);
  }
};

}  // namespace dspa
