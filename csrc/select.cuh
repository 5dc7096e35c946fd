// The select phase of `steer`: everything about a row that does not need a pass over the encoder.
#pragma once

#include "common.cuh"

namespace dspa {

// finite = isfinite(h) everywhere, running_max = 0 and rank = 0; with a screen norms = ||h - mean||, ||h||. By one warp.
template <class T, bool ALIGNED> __device__ void prepare_row(const Arguments &a, int i_row) {
  const T *row = static_cast<const T *>(a.h) + int64_t(i_row) * a.d_in;
  int is_infinite = 0;
  float centered_square = 0.f, sum_of_squares = 0.f;
  for (int o_k = 8 * lane(); o_k < a.d_in; o_k += 256) {
    Vec8<T> x;
    Vec8<float> mean;
    x.template load<ALIGNED>(row + o_k, a.d_in - o_k);
    if (a.norms) mean.template load<ALIGNED>(a.screen_mean + o_k, a.d_in - o_k);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      is_infinite |= !(fabsf(x[i]) < INF);  // a NaN compares false
      if (a.norms) {
        const float centered = x[i] - mean[i];
        centered_square = fmaf(centered, centered, centered_square);
        sum_of_squares = fmaf(x[i], x[i], sum_of_squares);
      }
    }
  }
  is_infinite = warp_max(is_infinite);
  if (a.norms) {
    centered_square = warp_sum(centered_square);
    sum_of_squares = warp_sum(sum_of_squares);
  }
  if (lane() == 0) {
    a.finite[i_row] = !is_infinite;
    a.running_max[i_row] = 0;
    if (a.norms) {
      // Rounded up, for the relative error of the sums and for squares that underflow.
      a.norms[2 * i_row] = sqrtf(centered_square) * 1.001f + 1e-17f;
      a.norms[2 * i_row + 1] = sqrtf(sum_of_squares) * 1.001f + 1e-17f;
    }
  }
  if (a.k)
    for (int i = lane(); i < a.n_slots; i += 32) a.rank[int64_t(i_row) * a.n_slots + i] = 0;
}

// Encoder rows with their biases and thresholds.
template <class T> struct Encoder {
  const T *encoder_rows;
  const float *b_enc, *threshold;
};

// f = pre if pre > 0 and pre > threshold, else 0, for latent i of an encoder; top-k: if pre > 0. By one warp.
template <class T, bool ALIGNED>
__device__ float latent_value(const Arguments &a, int i_row, Encoder<T> encoder, int i) {
  constexpr int N_VECS = ALIGNED ? 5 : 1;
  const T *row = static_cast<const T *>(a.h) + int64_t(i_row) * a.d_in;
  const T *weights = encoder.encoder_rows + int64_t(i) * a.d_in;
  const float bias = encoder.b_enc[i], threshold = encoder.threshold[i];
  float sum = 0.f;
  for (int o = 8 * lane(); o < a.d_in; o += 256 * N_VECS) {
    Vec8<T> w[N_VECS], x[N_VECS];
#pragma unroll
    for (int j = 0; j < N_VECS; j++) {
      const int o_k = o + 256 * j;
      w[j].template load<ALIGNED>(weights + o_k, a.d_in - o_k);
      x[j].template load<ALIGNED>(row + o_k, a.d_in - o_k);
    }
#pragma unroll
    for (int j = 0; j < N_VECS; j++)
#pragma unroll
      for (int n = 0; n < 8; n++) sum = fmaf(w[j][n], x[j][n], sum);
  }
  const float pre = warp_sum(sum) + bias;
  return pre > 0.f && (a.k || pre > threshold) ? pre : 0.f;
}

// One task of a row: its preparation (-1), one of its selected latents or, after these, one of the large latents.
template <class T, bool ALIGNED> __device__ void select_one(const Arguments &a, int i_row, int i_task) {
  const int plan = assigned_plan(a, i_row);
  if (plan < 0) return;
  const bool is_slot = i_task >= 0 && i_task < a.n_slots;
  const int slot = is_slot ? a.slots[int64_t(plan) * a.n_slots + i_task] : i_task - a.n_slots;
  if (!is_past_start(a, i_row, plan)) return;
  if (i_task < 0) return prepare_row<T, ALIGNED>(a, i_row);
  const Encoder<T> columns = {static_cast<const T *>(a.columns_encoder_rows), a.columns_b_enc, a.columns_threshold};
  const Encoder<T> large = {static_cast<const T *>(a.encoder_rows), a.b_enc, a.threshold};
  const float f = slot < 0 ? 0.f : latent_value<T, ALIGNED>(a, i_row, is_slot ? columns : large, slot);
  if (lane() == 0) latent_values_of(a, i_row)[i_task] = f;
  // The tail will read its decoder row.
  const T *row = static_cast<const T *>(a.columns_W_dec) + int64_t(slot) * a.d_in;
  if (is_slot && f > 0.f) prefetch_lines(row, a.d_in * sizeof(T), lane(), 32);
}

// One task per warp.
template <class T> __device__ void select(const Arguments &a) {
  const bool aligned = is_aligned(a);
  const int n_tasks = 1 + a.n_slots + a.n_large, n_warps = n_threads() / 32;
  for (int i = block() + warp() * n_blocks(); i < a.n_rows * n_tasks; i += n_blocks() * n_warps) {
    const int i_row = i / n_tasks, i_task = i % n_tasks - 1;
    if (aligned) select_one<T, true>(a, i_row, i_task);
    else select_one<T, false>(a, i_row, i_task);
  }
}

}  // namespace dspa
