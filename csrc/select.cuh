// The select phase of `steer`: what is known of a row before the encoder is read.
#pragma once

#include "common.cuh"

namespace dspa {

// finite = all of h is; rows in fp32, their scale, ||n(h) - mean|| and ||n(h)|| where needed; maximum and beaten 0.
template <class H, bool ALIGNED> __device__ void prepare_row(const Arguments &a, int i_row) {
  const Row<H, ALIGNED> row(a, i_row);
  const Norm<H> norm = norm_of(row, a);
  int infinite = 0;
  float near = 0.f, size = 0.f;
  row.for_eights([&](int o_k, int n, const typename Rows<H>::Loaded &x) {
    Eight<float> mean;
    if (a.norms) mean.template load<ALIGNED>(a.screen_mean + o_k, n);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i >= n) break;
      infinite |= !(fabsf(x[i]) < INFINITE);  // a NaN compares false
      const float normal = norm.apply(x[i]);
      if (a.x && a.x != a.h) a.x[row.begin + o_k + i] = normal;
      if (a.norms) {
        const float off = normal - mean[i];
        near = fmaf(off, off, near);
        size = fmaf(normal, normal, size);
      }
    }
  });
  fence_copies();
  infinite = warp_most(infinite);
  if (a.norms) {
    near = warp_sum(near);
    size = warp_sum(size);
  }
  if (lane() == 0) {
    a.finite[i_row] = !infinite;
    a.maximum[i_row] = 0;
    if (a.scale) a.scale[i_row] = norm.scale;
    if (a.norms) {
      // Upwards: the relative error of the sums, and what squares lose that are too small to be numbers.
      a.norms[2 * i_row] = sqrtf(near) * 1.001f + 1e-17f;
      a.norms[2 * i_row + 1] = sqrtf(size) * 1.001f + 1e-17f;
    }
  }
  if (a.k)
    for (int i = lane(); i < a.n_slots; i += 32) a.beaten[int64_t(i_row) * a.n_slots + i] = 0;
}

// Encoder rows of which a latent is one.
template <class W> struct Encoder {
  const W *W_enc;
  const float *b_enc, *threshold;
};

// f = pre where latent i of the encoder is active, else 0; for top-k where pre > 0. By one warp.
template <class H, class W, bool ALIGNED>
__device__ float latent_value(const Arguments &a, int i_row, Encoder<W> encoder, int i) {
  using Residual = Row<H, ALIGNED>;
  constexpr int EIGHTS = Residual::EIGHTS;
  const Residual row(a, i_row);
  const W *weights = encoder.W_enc + int64_t(i) * a.d_in;
  const Norm<H> norm = norm_of(row, a);
  const float bias = encoder.b_enc[i], threshold = encoder.threshold[i];
  float sum = 0.f;
  for (int o = 8 * lane(); o < a.d_in; o += 256 * EIGHTS) {
    Eight<W> w[EIGHTS];
    typename Rows<H>::Loaded x[EIGHTS];
#pragma unroll
    for (int j = 0; j < EIGHTS; j++) {
      const int o_k = o + 256 * j;
      w[j].template load<ALIGNED>(weights + o_k, a.d_in - o_k);
      row.rows.template load<ALIGNED>(x[j], row.begin + o_k, a.d_in - o_k);
    }
#pragma unroll
    for (int j = 0; j < EIGHTS; j++)
#pragma unroll
      for (int n = 0; n < 8; n++)
        if (o + 256 * j + (ALIGNED ? 0 : n) < a.d_in) sum = fmaf(w[j][n], norm.apply(x[j][n]), sum);
  }
  const float pre = warp_sum(sum) + bias;
  return pre > 0.f && (a.k || pre > threshold) ? pre : 0.f;
}

// Preparation of a row (-1), one of its selected latents or, after them, one of the large ones.
template <class H, class W, bool ALIGNED> __device__ void select_one(const Arguments &a, int i_row, int i_task) {
  const int plan = named_plan(a, i_row);
  if (plan < 0) return;
  const bool is_slot = i_task >= 0 && i_task < a.n_slots;
  const int slot = is_slot ? a.slots[int64_t(plan) * a.n_slots + i_task] : i_task - a.n_slots;
  if (!has_begun(a, i_row, plan)) return;
  if (i_task < 0) return prepare_row<H, ALIGNED>(a, i_row);
  const Encoder<W> columns = {static_cast<const W *>(a.columns_W_enc), a.columns_b_enc, a.columns_threshold};
  const Encoder<W> large = {static_cast<const W *>(a.W_enc), a.b_enc, a.threshold};
  const float f = slot < 0 ? 0.f : latent_value<H, W, ALIGNED>(a, i_row, is_slot ? columns : large, slot);
  if (lane() == 0) values_of(a, i_row)[i_task] = f;
  // The tail will want its decoder row.
  const W *row = static_cast<const W *>(a.columns_W_dec) + int64_t(slot) * a.d_in;
  if (is_slot && f > 0.f) prefetch_lines(row, a.d_in * sizeof(W), lane(), 32);
}

// A warp takes a task of a row.
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
