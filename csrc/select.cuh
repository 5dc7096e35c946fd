// The select phase of `steer`: everything about rows that does not need a pass over the encoder.
//
//   summary of a row   its selected latents by blocks of 16, and the large latents, which bound M from below
//
// Both are evaluated through the same pipeline and products as the stream, so that M is one number wherever it is
// found.
#pragma once

#include "pipeline.cuh"

namespace dspa {

// Copies a row, 16 bytes at a time, and adds another to it if there is one, with zeros after their end.
template <bool IS_SUM, class T>
__device__ void copy_aligned(T *to, const T *row, const T *other, int d_in, int width) {
  constexpr int N_VECS = IS_SUM ? 4 : 8;  // of a row, so that a thread has eight loads in flight
  for (int o = 8 * lane(); o < width; o += 256 * N_VECS) {
    Vec8<T> x[N_VECS] = {}, y[N_VECS] = {};
#pragma unroll
    for (int i = 0; i < N_VECS; i++) {
      if (o + 256 * i >= d_in) continue;
      x[i].load(row + o + 256 * i);
      if (IS_SUM) y[i].load(other + o + 256 * i);
    }
#pragma unroll
    for (int i = 0; i < N_VECS; i++) {
      if (IS_SUM) x[i].add(y[i]);
      if (o + 256 * i < width) x[i].store(to + o + 256 * i);
    }
  }
}

// Copies a row of h, or of h + residual, into shared memory, with zeros after its end. By one warp.
template <class Storage> __device__ void copy_row(const Arguments &a, const Storage &storage, int i_row) {
  using T = typename Storage::T;
  const T *row = static_cast<const T *>(a.h) + int64_t(i_row) * a.d_in;
  const T *other = a.residual ? static_cast<const T *>(a.residual) + int64_t(i_row) * a.d_in : nullptr;
  T *to = storage.template resident_row<T>(i_row);
  const int width = Storage::traits().padded_width(a.d_in);
  if (is_aligned(a)) {
    if (other) copy_aligned<true>(to, row, other, a.d_in, width);
    else copy_aligned<false>(to, row, other, a.d_in, width);
    return;
  }
#pragma unroll 1
  for (int i = lane(); i < width; i += 32) {
    to[i] = i < a.d_in ? row[i] : rounded<T>(0.f);
    if (other && i < a.d_in) to[i] = rounded<T>(to_float(row[i]) + to_float(other[i]));
  }
}

// finite = |h| < RESIDUAL_LIMIT everywhere; with a screen the norms of a row, rounded up for the relative error of the sums and
// for squares that underflow. By the warp that copied the row.
template <class Storage> __device__ void measure_row(const Arguments &a, const Storage &storage, int i_row) {
  using T = typename Storage::T;
  bool is_finite = true;
  float squares = 0.f, centered_squares = 0.f;
#pragma unroll 1
  for (int o_k = 8 * lane(); o_k < a.d_in; o_k += 256) {
    Vec8<T> x;
    Vec8<float> mean = {};
    x.load(storage.template resident_row<T>(i_row) + o_k);
    if (Storage::IS_SCREENED) {
      if (o_k + 8 <= a.d_in) mean.load(a.screen_mean + o_k);
      else mean.load_part(a.screen_mean + o_k, a.d_in - o_k);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      is_finite &= fabsf(x[i]) < RESIDUAL_LIMIT;  // a NaN compares false
      const float centered = x[i] - mean[i];
      squares = fmaf(x[i], x[i], squares);
      centered_squares = fmaf(centered, centered, centered_squares);
    }
  }
  RowState &state = storage.row_states[i_row];
  state.finite = !ballot(!is_finite);
  if (Storage::IS_SCREENED) {
    state.norm = sqrtf(warp_sum(squares)) * 1.001f + 1e-17f;
    state.centered_norm = sqrtf(warp_sum(centered_squares)) * 1.001f + 1e-17f;
  }
}

// Prepares all rows in every block. One block zeroes what the others raise after the next grid barrier.
template <class Storage> __device__ void prepare_rows(const Arguments &a, const Storage &storage) {
  if (storage.is_producer()) {
    if (lane() < a.n_rows) storage.row_states[lane()].plan = active_plan(a, lane());
  } else {
    for (int r = warp(); r < a.n_rows; r += Storage::traits().consumer_warps()) {
      copy_row(a, storage, r);
      warp_barrier();
      measure_row(a, storage, r);
    }
  }
  if (block() == n_blocks() - 1) {
    for (int i = thread(); i < a.n_rows; i += n_threads()) {
      a.running_max[i] = 0;
      if (Storage::IS_SCREENED) a.screen_bound[i] = 0;
    }
#pragma unroll 1
    for (int i = thread(); a.k && i < a.n_rows * a.n_slots; i += n_threads()) a.rank[i] = 0;
    if (Storage::IS_SCREENED && thread() == 0) *a.n_candidates = 0;
  }
  block_barrier();
}

// 16 slots of a row or, with i_row = -1, 16 of the large latents for all rows; `first` is the first of them.
struct SelectItem {
  int i_row, first;
};

__device__ inline int n_slot_blocks(const Arguments &a) { return ceil_div(a.n_slots, MMA_M); }
__device__ inline int n_large_blocks(const Arguments &a) { return ceil_div(a.n_large, MMA_M); }
__device__ inline int n_summaries(const Arguments &a) { return n_slot_blocks(a) + n_large_blocks(a); }
__device__ inline Summary *summaries_of(const Arguments &a, int i_row) {
  return reinterpret_cast<Summary *>(a.summaries) + i_row * n_summaries(a);
}
__device__ inline int n_select_items(const Arguments &a) { return a.n_rows * n_slot_blocks(a) + n_large_blocks(a); }
__device__ inline SelectItem select_item(const Arguments &a, int i) {
  const int n = n_slot_blocks(a), i_large = i - a.n_rows * n;
  return i_large < 0 ? SelectItem{i / n, i % n * MMA_M} : SelectItem{-1, i_large * MMA_M};
}

// Calls f(item) for each item of this block that some steered row needs. By whole warps.
template <class Storage, class F>
__device__ void for_each_item(const Arguments &a, const Storage &storage, F &&f) {
  const unsigned steered = ballot_rows(a, [&](int r) { return storage.row_states[r].is_steered(); });
  for (int i = block(); i < n_select_items(a); i += n_blocks()) {
    const SelectItem item = select_item(a, i);
    if (item.i_row < 0 ? steered : steered >> item.i_row & 1) f(item);
  }
}

// The l-th latent of an item: its column, or its encoder row; -1 if there is none.
template <class Storage>
__device__ int selected_latent(const Arguments &a, const Storage &storage, SelectItem item, int l) {
  const int i = item.first + l;
  if (l >= MMA_M || i >= (item.i_row < 0 ? a.n_large : a.n_slots)) return -1;
  return item.i_row < 0 ? i : a.slots[int64_t(storage.row_states[item.i_row].plan) * a.n_slots + i];
}

// The producer warp: loads the encoder rows of this block's items. Returns the number of stages that it filled.
template <class Storage>
__device__ int load_selected(const Arguments &a, const Storage &storage, PipelineState &state) {
  int n = 0;
  for_each_item(a, storage, [&](SelectItem item) {
    const int latent = selected_latent(a, storage, item, lane());
    const void *rows = item.i_row < 0 ? a.encoder_rows : a.columns_encoder_rows;
    const char *row = static_cast<const char *>(rows) + int64_t(max(latent, 0)) * a.d_in * NUMBER_BYTES;
    n += load_tile(a, storage, state, row, {0, ballot(latent >= 0), 0, 0});
  });
  return n;
}

// The consumer warps: evaluate the items, and leave the values of slots and a summary per item and row.
template <class Storage>
__device__ void evaluate_selected(const Arguments &a, const Storage &storage, PipelineState &state,
                                  Consumer &consumer) {
  for_each_item(a, storage, [&](SelectItem item) {
    const bool is_large = item.i_row < 0;
    const int latent = selected_latent(a, storage, item, consumer.l), i = item.first + consumer.l;
    const float bias = latent < 0 ? 0.f : (is_large ? a.b_enc : a.columns_b_enc)[latent];
    const float threshold = latent < 0 ? 0.f : (is_large ? a.threshold : a.columns_threshold)[latent];
    Mma<typename Storage::T> mma;
    multiply_rows(a, storage, state, consumer, mma);
    if (consumer.i_warpgroup != 0) return;
    const float pre = consumer.reduce_slices(storage, mma) + bias;
    const float f = latent >= 0 && pre > 0.f && (a.k || pre > threshold) ? pre : 0.f;

    const bool m_row = is_large ? consumer.r < a.n_rows : consumer.r == item.i_row;
    Summary summary = {0.f, INF, f};
    if (m_row && !is_large && i < a.n_slots) {
      const int64_t o_plan = int64_t(storage.row_states[item.i_row].plan) * a.n_slots;
      slot_values_of(a, item.i_row)[i] = f;
      if (f > 0.f) summary = {a.signs[o_plan + i] > 0 ? INF : f, f, f};
    }
    summary.required_shift = warp_max(summary.required_shift, MMA_M);
    summary.min_active = warp_min(summary.min_active, MMA_M);
    summary.lower_bound = warp_max(summary.lower_bound, MMA_M);
    const int i_summary = item.first / MMA_M + (is_large ? n_slot_blocks(a) : 0);
    if (consumer.l == 0 && m_row) summaries_of(a, consumer.r)[i_summary] = summary;
  });
}

// Summarises each row in shared memory; returns the bits of those that need the encoder.
template <class Storage> __device__ unsigned find_waiting_rows(const Arguments &a, const Storage &storage) {
  for (int r = warp(); r < a.n_rows; r += n_threads() / 32) {
    RowState &state = storage.row_states[r];
    Summary all = {0.f, INF, 0.f};
    for (int i = lane(); state.is_steered() && i < n_summaries(a); i += 32) {
      const Summary summary = summaries_of(a, r)[i];
      all.required_shift = fmaxf(all.required_shift, summary.required_shift);
      all.min_active = fminf(all.min_active, summary.min_active);
      all.lower_bound = fmaxf(all.lower_bound, summary.lower_bound);
    }
    state.required_shift = warp_max(all.required_shift);
    state.min_active = warp_min(all.min_active);
    state.lower_bound = warp_max(all.lower_bound);
  }
  block_barrier();
  return ballot_rows(a, [&](int r) { return is_waiting(a, storage.row_states[r], storage.row_states[r].lower_bound); });
}

}  // namespace dspa
