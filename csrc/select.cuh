// The select phase of `steer`: everything about a row that does not need a pass over the encoder.
#pragma once

#include "common.cuh"

namespace dspa {

// finite = isfinite(h) everywhere, running_max = 0 and rank = 0. Where needed also x = n(h) in fp32, its scale, and
// norms = ||n(h) - mean||, ||n(h)||. By one warp.
template <class H, bool ALIGNED> __device__ void prepare_row(const Arguments &a, int i_row) {
  const ResidualRow<H, ALIGNED> row(a, i_row);
  const Norm<H> norm = norm_of(row, a);
  int is_infinite = 0;
  float centered_square = 0.f, sum_of_squares = 0.f;
  row.for_each_vec([&](int o_k, int n, const typename ResidualRows<H>::Vec &x) {
    Vec8<float> mean;
    if (a.norms) mean.template load<ALIGNED>(a.screen_mean + o_k, n);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i >= n) break;
      is_infinite |= !(fabsf(x[i]) < INF);  // a NaN compares false
      const float normal = norm.apply(x[i]);
      if (a.x && a.x != a.h) a.x[row.begin + o_k + i] = normal;
      if (a.norms) {
        const float centered = normal - mean[i];
        centered_square = fmaf(centered, centered, centered_square);
        sum_of_squares = fmaf(normal, normal, sum_of_squares);
      }
    }
  });
  fence_proxy_async();
  is_infinite = warp_max(is_infinite);
  if (a.norms) {
    centered_square = warp_sum(centered_square);
    sum_of_squares = warp_sum(sum_of_squares);
  }
  if (lane() == 0) {
    a.finite[i_row] = !is_infinite;
    a.running_max[i_row] = 0;
    if (a.scale) a.scale[i_row] = norm.scale;
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
template <class W> struct Encoder {
  const W *encoder_rows;
  const float *b_enc, *threshold;
};

// f = pre if pre > 0 and pre > threshold, else 0, for latent i of an encoder; top-k: if pre > 0. By one warp.
template <class H, class W, bool ALIGNED>
__device__ float latent_value(const Arguments &a, int i_row, Encoder<W> encoder, int i) {
  using Residual = ResidualRow<H, ALIGNED>;
  constexpr int N_VECS = Residual::N_VECS;
  const Residual row(a, i_row);
  const W *weights = encoder.encoder_rows + int64_t(i) * a.d_in;
  const Norm<H> norm = norm_of(row, a);
  const float bias = encoder.b_enc[i], threshold = encoder.threshold[i];
  float sum = 0.f;
  for (int o = 8 * lane(); o < a.d_in; o += 256 * N_VECS) {
    Vec8<W> w[N_VECS];
    typename ResidualRows<H>::Vec x[N_VECS];
#pragma unroll
    for (int j = 0; j < N_VECS; j++) {
      const int o_k = o + 256 * j;
      w[j].template load<ALIGNED>(weights + o_k, a.d_in - o_k);
      row.rows.template load<ALIGNED>(x[j], row.begin + o_k, a.d_in - o_k);
    }
#pragma unroll
    for (int j = 0; j < N_VECS; j++)
#pragma unroll
      for (int n = 0; n < 8; n++)
        if (o + 256 * j + (ALIGNED ? 0 : n) < a.d_in) sum = fmaf(w[j][n], norm.apply(x[j][n]), sum);
  }
  const float pre = warp_sum(sum) + bias;
  return pre > 0.f && (a.k || pre > threshold) ? pre : 0.f;
}

// One task of a row: its preparation (-1), one of its selected latents or, after these, one of the large latents.
template <class H, class W, bool ALIGNED> __device__ void select_one(const Arguments &a, int i_row, int i_task) {
  const int plan = assigned_plan(a, i_row);
  if (plan < 0) return;
  const bool is_slot = i_task >= 0 && i_task < a.n_slots;
  const int slot = is_slot ? a.slots[int64_t(plan) * a.n_slots + i_task] : i_task - a.n_slots;
  if (!is_past_start(a, i_row, plan)) return;
  if (i_task < 0) return prepare_row<H, ALIGNED>(a, i_row);
  const Encoder<W> columns = {static_cast<const W *>(a.columns_encoder_rows), a.columns_b_enc, a.columns_threshold};
  const Encoder<W> large = {static_cast<const W *>(a.encoder_rows), a.b_enc, a.threshold};
  const float f = slot < 0 ? 0.f : latent_value<H, W, ALIGNED>(a, i_row, is_slot ? columns : large, slot);
  if (lane() == 0) latent_values_of(a, i_row)[i_task] = f;
  // The tail will read its decoder row.
  const W *row = static_cast<const W *>(a.columns_W_dec) + int64_t(slot) * a.d_in;
  if (is_slot && f > 0.f) prefetch_lines(row, a.d_in * sizeof(W), lane(), 32);
}

// One task per warp.
template <class H, class W> __device__ void select(const Arguments &a) {
  const bool aligned = is_aligned(a);
  const int n_tasks = 1 + a.n_slots + a.n_large, n_warps = n_threads() / 32;
  for (int i = block() + warp() * n_blocks(); i < a.n_rows * n_tasks; i += n_blocks() * n_warps) {
    const int i_row = i / n_tasks, i_task = i % n_tasks - 1;
    if (aligned) select_one<H, W, true>(a, i_row, i_task);
    else select_one<H, W, false>(a, i_row, i_task);
  }
}

}  // namespace dspa
