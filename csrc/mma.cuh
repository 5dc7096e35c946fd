// acc[l, n] += sum_k W[l, k] x[n, k]: products of encoder rows, or of their int5 copies, with residual rows on tensor
// cores, by one of a warpgroup's four warps. Weights are operand A, so a single row wastes the narrow side. One row
// takes the same instructions as eight, and a latent the same wherever it comes from, so their bits are always the
// same.
#pragma once

#include "common.cuh"

namespace dspa {

// Rows of one operand in shared memory.
struct Operand {
  const char *p;
  int stride;
};

// A 16-bit number whose last bits count by ones, so that a code below them is added to it.
template <class T> inline constexpr uint32_t CODE_BASE = 0;
template <> inline constexpr uint32_t CODE_BASE<bf16> = 0x4300;  // 128
template <> inline constexpr uint32_t CODE_BASE<fp16> = 0x6400;  // 1024

template <class T> struct Mma {
  // Accumulator fragment: thread 4 g + t holds latents g, g, g + 8, g + 8 and rows 2 t, 2 t + 1 twice.
  float acc[4];

  __device__ void clear() {
    for (int i = 0; i < 4; i++) acc[i] = 0.f;
  }

  // Adds the products of slice `i_slice` of `width` numbers of encoder rows.
  __device__ void multiply_rows(Operand weights, Operand rows, int width, int i_slice) {
    const char *weight = weights.p + lane() % 16 * weights.stride + lane() / 16 * 16;
    const char *row = rows.p + lane() % 8 * rows.stride + lane() / 8 * 16;
    for (int o_k = SLICE * i_slice; o_k < width; o_k += ROUND) {
      uint32_t a[2][4], b[4];
      ldmatrix(a[0], weight + o_k * NUMBER_BYTES);
      ldmatrix(a[1], weight + (o_k + MMA_K) * NUMBER_BYTES);
      ldmatrix(b, row + o_k * NUMBER_BYTES);
      mma_16x8x16<T>(acc, a[0], b[0], b[1]);
      if (o_k + MMA_K < width) mma_16x8x16<T>(acc, a[1], b[2], b[3]);
    }
  }

  // Adds the products of part `i_slice` of n_codes blocks of the int5 copy. A warp takes nibbles 32 i_slice to
  // 32 i_slice + 31 of a block, which belong to numbers 32 i_slice on and 128 + 32 i_slice on. Thread t of four takes
  // eight nibble bytes c = 8 t to 8 t + 7, in products that pair numbers c and c + 2. Both operands are permuted in the
  // same way, so the sum has the same terms.
  __device__ void multiply_codes(Operand codes, Operand rows, int n_codes, int i_slice) {
    const int g = lane() / 4, t = lane() % 4;
    const char *nibbles = codes.p + g * codes.stride + SLICE * i_slice + 8 * t;
    const char *planes = codes.p + g * codes.stride + SCREEN_BLOCK / 2 + 8 * t;
    const char *row = rows.p + g * rows.stride + (SLICE * i_slice + 8 * t) * NUMBER_BYTES;
    for (int i = 0; i < n_codes; i++) {
      uint32_t low[2][2], fifth[2][2], x[2][4];  // by half of the tile's latents, by half of the block's numbers
#pragma unroll
      for (int half = 0; half < 2; half++) {
        memcpy(low[half], __builtin_assume_aligned(nibbles + half * 8 * codes.stride, 8), 8);
        memcpy(fifth[half], __builtin_assume_aligned(planes + half * 8 * codes.stride, 8), 8);
        memcpy(x[half], __builtin_assume_aligned(row + half * SCREEN_BLOCK / 2 * NUMBER_BYTES, 16), 16);
      }
#pragma unroll
      for (int v = 0; v < 2; v++) {
        uint32_t q[2][4];
#pragma unroll
        for (int half = 0; half < 2; half++) dequantise(q[half], low[half][v], fifth[half][v] >> i_slice);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const uint32_t a[4] = {q[0][2 * half], q[1][2 * half], q[0][2 * half + 1], q[1][2 * half + 1]};
          const uint32_t b0 = byte_perm(x[half][2 * v], x[half][2 * v + 1], 0x5410);
          const uint32_t b1 = byte_perm(x[half][2 * v], x[half][2 * v + 1], 0x7632);
          mma_16x8x16<T>(acc, a, b0, b1);
        }
      }
      nibbles += SCREEN_BLOCK_BYTES, planes += SCREEN_BLOCK_BYTES, row += SCREEN_BLOCK * NUMBER_BYTES;
    }
  }

  // Stores this thread's part of the tile for the reduction over slices.
  __device__ void store_partials(float *partials) const {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) partials[(g + 8 * (i / 2)) * (MMA_N + 1) + 2 * t + i % 2] = acc[i];
  }

 private:
  // Numbers (c, c + 2), (c + 1, c + 3), and the same 128 further on, of four bytes of nibbles and their fifth bits,
  // which are bits 0 and 4 of the bytes of `fifth`. q is code - 16, without rounding.
  __device__ static void dequantise(uint32_t (&q)[4], uint32_t low, uint32_t fifth) {
    constexpr uint32_t m_low = 0x000f000f, m_fifth = 0x00100010;
    constexpr uint32_t base = CODE_BASE<T> * 0x00010001u, zero = (CODE_BASE<T> + 16) * 0x00010001u;
    const auto decoded = [&](uint32_t low, uint32_t fifth) {
      return subtract_pair<T>(and_or(low, m_low, and_or(fifth, m_fifth, base)), zero);
    };
    q[0] = decoded(low, fifth << 4);
    q[1] = decoded(low >> 8, fifth >> 4);
    q[2] = decoded(low >> 4, fifth);
    q[3] = decoded(low >> 12, fifth >> 8);
  }
};

}  // namespace dspa
