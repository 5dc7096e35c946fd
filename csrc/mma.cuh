// Products of encoder rows with residual rows, a part at a time, as one of four warps sums it.
//
// Stages are in shared memory; `gather` reads chosen latents from memory instead, in the same order, so to the same
// bits.
#pragma once

#include "common.cuh"

namespace dspa {

// Rows in shared memory that are multiplied, of the encoder or of the residual.
struct Operand {
  const char *p;
  int stride;
};

template <class T> __device__ inline const T *row_of(Operand o, int i) {
  return reinterpret_cast<const T *>(o.p + i * o.stride);
}

template <class T> __device__ inline uint32_t pair_of(float x, float y) {
  T two[2] = {rounded<T>(x), rounded<T>(y)};
  uint32_t word;
  memcpy(&word, two, 4);
  return word;
}

// An int8 in fp32: its bits, with the sign turned, are the last of a number of 2^23, from which that is subtracted.
__device__ inline float small_integer(uint32_t word, int i) {
  return float_of(int(select_bytes(word ^ 0x80808080, 0x4b000000, 0x7440 + i))) - 8388736.f;
}

// Operands of one 16-bit dtype, on tensor cores with the weights as first operand; one row takes the same instructions
// as 64 do, hence the same bits. Weights may be int8 (S), which are exact in 16 bits.
template <class T, class S, bool FEW> struct TensorCore {
  using Weight = T;
  using Stored = S;
  using Row = T;
  static constexpr bool SCREENED = sizeof(S) == 1;
  static constexpr Shape SHAPE = FEW ? few_rows(sizeof(S)) : many_rows(sizeof(S));
  static constexpr int M = SHAPE.m_tiles, J = SHAPE.rows / TILE_N;
  // Of each tile of 16 latents and 8 rows, thread 4 g + t has latents g, g, g + 8, g + 8 and rows 2 t, 2 t + 1 twice.
  float acc[M][J][4];

  __device__ void clear() {
    for (int m = 0; m < M; m++)
      for (int j = 0; j < J; j++)
        for (int i = 0; i < 4; i++) acc[m][j][i] = 0.f;
  }

  // Adds what a stage of `width` numbers of d_in gives to slice `i_slice`; latents from the operand's first on.
  __device__ void stage(Operand weights, Operand rows, int width, int i_slice, int n_rows) {
    for (int o_k = SLICE * i_slice; o_k < width; o_k += ROUND) {
      if constexpr (SCREENED) screened_slice(weights, rows, o_k, o_k + STEP < width, n_rows);
      else slice(weights, rows, o_k, o_k + STEP < width, n_rows);
    }
  }

  // Latents `m_latent` of 16 M from row `first` on of W_enc; rows from `p` on, of which `n_rows` exist.
  __device__ void gather(const T *W_enc, int64_t first, const uint32_t (&m_latent)[M], const T *p, int d_in, int n_rows,
                         int i_slice, bool aligned) {
    const int g = lane() / 4, n_steps = 2 * ceil_div(d_in, ROUND);
    for (int begin = 0; begin < n_steps; begin += AHEAD) {
      uint32_t a[AHEAD][M][4];
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        const int o_k = step_at(begin + i, i_slice) + 2 * (lane() % 4);
        const T *weights = W_enc + (first + g) * d_in;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int half = 0; half < 2; half++, weights += 8 * d_in) {
            const int n = m_latent[m] >> (g + 8 * half) & 1 ? d_in : 0;
            a[i][m][half] = pair_before(n, weights, o_k, aligned);
            a[i][m][half + 2] = pair_before(n, weights, o_k + 8, aligned);
          }
      }
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        if (step_at(begin + i, i_slice) >= d_in) break;
        const int o_k = step_at(begin + i, i_slice) + 2 * (lane() % 4);
        const T *row = p + int64_t(g) * d_in;
#pragma unroll
        for (int j = 0; j < J; j++, row += TILE_N * d_in) {
          if (TILE_N * j >= n_rows) break;
          const int n = TILE_N * j + g < n_rows ? d_in : 0;
          const uint32_t b0 = pair_before(n, row, o_k, aligned), b1 = pair_before(n, row, o_k + 8, aligned);
          warp_barrier();  // those that had something to load have come back to those that had not
#pragma unroll
          for (int m = 0; m < M; m++) multiply_add<T>(acc[m][j], a[i][m], b0, b1);
        }
      }
    }
  }

  // What this thread knows of tile (m, j), for whoever adds up the slices.
  __device__ void leave(float *partial, int m, int j) const {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int i_m = 0; i_m < M; i_m++)
#pragma unroll
      for (int i_j = 0; i_j < J; i_j++)
        if (i_m == m && i_j == j)  // registers have no index
          for (int i = 0; i < 4; i++) partial[(g + 8 * (i / 2)) * (TILE_N + 1) + 2 * t + i % 2] = acc[i_m][i_j][i];
  }

 private:
  // Steps of 16 whose weights are under way together when latents are gathered.
  static constexpr int AHEAD = FEW ? 9 : 1;

  // Where the i-th step of a slice begins.
  __device__ static int step_at(int i, int i_slice) { return ROUND * (i / 2) + SLICE * i_slice + STEP * (i % 2); }

  // Numbers o_k and o_k + 1 of a row of n, zeros after its end.
  __device__ static uint32_t pair_before(int n, const T *row, int o_k, bool aligned) {
    if (aligned && o_k < n) return *reinterpret_cast<const uint32_t *>(row + o_k);
    const T none = rounded<T>(0.f);
    const T two[2] = {o_k < n ? row[o_k] : none, o_k + 1 < n ? row[o_k + 1] : none};
    uint32_t word;
    memcpy(&word, two, 4);
    return word;
  }

  // One slice, in two steps of which the second may lie beyond the end.
  __device__ void slice(Operand weights, Operand rows, int o_k, bool both, int n_rows) {
    uint32_t a[M][2][4];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const T *row = row_of<T>(weights, TILE_L * m + lane() % 16);
        load_matrices(a[m][i], row + o_k + STEP * i + 8 * (lane() / 16));
      }
#pragma unroll
    for (int j = 0; j < J; j++) {
      if (TILE_N * j >= n_rows) break;
      uint32_t b[4];
      load_matrices(b, row_of<T>(rows, TILE_N * j + lane() % 8) + o_k + 8 * (lane() / 8));
#pragma unroll
      for (int m = 0; m < M; m++) {
        multiply_add<T>(acc[m][j], a[m][0], b[0], b[1]);
        if (both) multiply_add<T>(acc[m][j], a[m][1], b[2], b[3]);
      }
    }
  }

  // The same of int8 rows. Thread t of four takes numbers 4 t to 4 t + 3 of a step, where a tensor core means 2 t,
  // 2 t + 1, 2 t + 8 and 2 t + 9, in both operands.
  __device__ void screened_slice(Operand weights, Operand rows, int o_k, bool both, int n_rows) {
    const int g = lane() / 4, o = o_k + 4 * (lane() % 4);
    uint32_t q[2][M][2], a[2][M][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int8_t *row = row_of<int8_t>(weights, TILE_L * m + g + 8 * half) + o + STEP * i;
          memcpy(&q[i][m][half], __builtin_assume_aligned(row, 4), 4);
          a[i][m][half] = pair_of<T>(small_integer(q[i][m][half], 0), small_integer(q[i][m][half], 1));
          a[i][m][half + 2] = pair_of<T>(small_integer(q[i][m][half], 2), small_integer(q[i][m][half], 3));
        }
#pragma unroll
    for (int j = 0; j < J; j++) {
      if (TILE_N * j >= n_rows) break;
      uint32_t b[2][2];
#pragma unroll
      for (int i = 0; i < 2; i++)
        memcpy(b[i], __builtin_assume_aligned(row_of<T>(rows, TILE_N * j + g) + o + STEP * i, 8), 8);
#pragma unroll
      for (int m = 0; m < M; m++) {
        multiply_add<T>(acc[m][j], a[0][m], b[0][0], b[0][1]);
        if (both) multiply_add<T>(acc[m][j], a[1][m], b[1][0], b[1][1]);
      }
    }
  }
};

// Rows in fp32 with weights of any dtype, by fused multiply-adds. Thread 2 l + i of a warp sums half i of a slice for
// latent l and all rows.
template <class W, class S> struct FullPrecision {
  using Weight = W;
  using Stored = S;
  using Row = float;
  static constexpr bool SCREENED = sizeof(S) == 1;
  static constexpr Shape SHAPE = full_precision(sizeof(S));
  static constexpr int M = 1, J = SHAPE.rows / TILE_N;
  float acc[J][TILE_N];

  __device__ void clear() {
    for (int j = 0; j < J; j++)
      for (int n = 0; n < TILE_N; n++) acc[j][n] = 0.f;
  }

  __device__ void stage(Operand weights, Operand rows, int width, int i_slice, int n_rows) {
    for (int o_slice = SLICE * i_slice; o_slice < width; o_slice += ROUND) {
      const int o_k = o_slice + STEP * (lane() % 2);
      if (o_k >= width) break;
      const S *weight = row_of<S>(weights, lane() / 2) + o_k;
#pragma unroll
      for (int i = 0; i < STEP; i += 4) {
        float w[4];
        four_weights(w, weight + i);
#pragma unroll
        for (int j = 0; j < J; j++) {
          if (TILE_N * j >= n_rows) break;
#pragma unroll
          for (int n = 0; n < TILE_N; n++) {
            if (TILE_N * j + n >= n_rows) break;
            float x[4];
            memcpy(x, __builtin_assume_aligned(row_of<float>(rows, TILE_N * j + n) + o_k + i, 16), 16);
#pragma unroll
            for (int k = 0; k < 4; k++) acc[j][n] = fmaf(w[k], x[k], acc[j][n]);
          }
        }
      }
    }
  }

  __device__ void gather(const W *W_enc, int64_t first, const uint32_t (&m_latent)[M], const float *p, int d_in,
                         int n_rows, int i_slice, bool) {
    const int l = lane() / 2;
    if (!(m_latent[0] >> l & 1)) return;
    const W *weights = W_enc + (first + l) * d_in;
    for (int o_slice = SLICE * i_slice; o_slice < d_in; o_slice += ROUND)
      for (int i = 0; i < STEP; i++) {
        const int o_k = o_slice + STEP * (lane() % 2) + i;
        if (o_k >= d_in) break;
        const float w = to_float(weights[o_k]);
        const float *x = p + o_k;
#pragma unroll
        for (int j = 0; j < J; j++) {
          if (TILE_N * j >= n_rows) break;
#pragma unroll
          for (int n = 0; n < TILE_N; n++, x += d_in)
            if (TILE_N * j + n < n_rows) acc[j][n] = fmaf(w, *x, acc[j][n]);
        }
      }
  }

  __device__ void leave(float *partial, int, int j) const {
#pragma unroll
    for (int i_j = 0; i_j < J; i_j++) {
      if (i_j != j) continue;  // registers have no index
#pragma unroll
      for (int n = 0; n < TILE_N; n++) {
        const float sum = acc[i_j][n] + shuffle_xor(acc[i_j][n], 1);
        if (lane() % 2 == 0) partial[lane() / 2 * (TILE_N + 1) + n] = sum;
      }
    }
  }

 private:
  __device__ static void four_weights(float (&w)[4], const S *p) {
    S numbers[4];
    memcpy(numbers, __builtin_assume_aligned(p, sizeof(numbers)), sizeof(numbers));
    uint32_t word;
    memcpy(&word, numbers, 4);
#pragma unroll
    for (int i = 0; i < 4; i++)
      if constexpr (SCREENED) w[i] = small_integer(word, i);
      else w[i] = to_float(numbers[i]);
  }
};

}  // namespace dspa
