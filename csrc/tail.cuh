// The tail of `steer`: the edits of a row, and the residual that follows from them.
#pragma once

#include "common.cuh"

namespace dspa {

// Columns that a thread writes, and decoder rows whose loads are in flight together.
constexpr int COLUMNS_PER_THREAD = 2, DECODER_ROWS_IN_FLIGHT = 8;

// f' = f + alpha M (augment) or max(f - alpha M, 0) (ablate), where f > 0.
__device__ inline float edited(float f, int sign, float shift) {
  if (!(f > 0.f)) return 0.f;
  return sign > 0 ? f + shift : fmaxf(f - shift, 0.f);
}

// The index in `paths` of what happened to a row.
__device__ inline int path_of(const Arguments &a, int plan, bool finite, const Summary &s) {
  if (plan < 0) return 0;
  if (!finite) return 1;
  if (!(s.required_shift > 0.f)) return 2;
  return can_settle(a) && s.required_shift <= a.alpha * s.lower_bound ? 3 : 4;
}

// out = h + sum_j (f'_j - f_j) W_dec[j] at 32 COLUMNS_PER_THREAD columns, summed in the order of the slots. By
// one warp. The first column tile of a row also records the edits and counts the row in `paths`.
template <class T> __device__ void edit_row(const Arguments &a, int i_row, int i_column_tile) {
  const int plan = active_plan(a, i_row);
  const Summary s = summarise(a, i_row, plan);
  const bool finite = plan >= 0 && a.finite[i_row];
  const float maximum = finite ? fmaxf(float_of(load_relaxed(a.running_max + i_row)), s.lower_bound) : 0.f;
  const float shift = a.alpha * maximum;
  const bool is_first = i_column_tile == 0;

  const T *W_dec = static_cast<const T *>(a.columns_W_dec);
  const int o_d = i_column_tile * 32 * COLUMNS_PER_THREAD + lane();
  float delta[COLUMNS_PER_THREAD] = {};
  bool changed = false, active = false;
  for (int i = 0; finite && i < a.n_slots; i += 32) {
    const int i_slot = i + lane();
    float f = 0.f, change = 0.f;
    int slot = -1;
    if (i_slot < a.n_slots) {
      const int64_t o_slot = int64_t(plan) * a.n_slots + i_slot;
      f = latent_values_of(a, i_row)[i_slot];
      if (a.k && load_relaxed(a.rank + int64_t(i_row) * a.n_slots + i_slot) >= a.k) f = 0.f;
      slot = a.slots[o_slot];
      const float after = edited(f, a.signs[o_slot], shift);
      change = after - f;
      if (a.record && is_first) {
        a.before[int64_t(i_row) * a.n_slots + i_slot] = f;
        a.after[int64_t(i_row) * a.n_slots + i_slot] = after;
      }
    }
    active |= ballot(f > 0.f) != 0;
    changed |= ballot(change != 0.f) != 0;
    for (int j = 0; j < min(32, a.n_slots - i); j += DECODER_ROWS_IN_FLIGHT) {
      float delta_f[DECODER_ROWS_IN_FLIGHT], w[DECODER_ROWS_IN_FLIGHT][COLUMNS_PER_THREAD];
#pragma unroll
      for (int s = 0; s < DECODER_ROWS_IN_FLIGHT; s++) {
        delta_f[s] = shuffle(change, j + s);
        const T *row = W_dec + int64_t(shuffle(slot, j + s)) * a.d_in;
#pragma unroll
        for (int c = 0; c < COLUMNS_PER_THREAD; c++)
          w[s][c] = delta_f[s] != 0.f && o_d + 32 * c < a.d_in ? to_float(row[o_d + 32 * c]) : 0.f;
      }
#pragma unroll
      for (int s = 0; s < DECODER_ROWS_IN_FLIGHT; s++)
#pragma unroll
        for (int c = 0; c < COLUMNS_PER_THREAD; c++) delta[c] = fmaf(delta_f[s], w[s][c], delta[c]);
    }
  }

  const T *h = static_cast<const T *>(a.h) + int64_t(i_row) * a.d_in;
  T *out = static_cast<T *>(a.out) + int64_t(i_row) * a.d_in;
#pragma unroll
  for (int c = 0; c < COLUMNS_PER_THREAD; c++) {
    const int i_d = o_d + 32 * c;
    if (i_d < a.d_in) out[i_d] = changed ? rounded<T>(to_float(h[i_d]) + delta[c]) : h[i_d];
  }
  if (!is_first) return;
  if (a.record && !finite)
    for (int i = lane(); i < a.n_slots; i += 32) {
      a.before[int64_t(i_row) * a.n_slots + i] = 0.f;
      a.after[int64_t(i_row) * a.n_slots + i] = 0.f;
    }
  if (lane() == 0) {
    if (a.record) a.maximum[i_row] = plan >= 0 && !finite ? float_of(0x7fc00000) : active ? maximum : 0.f;
    if (a.paths) atomic_add(a.paths + path_of(a, plan, finite, s), int64_t(1));
  }
}

template <class T> __device__ void tail(const Arguments &a) {
  const int n_column_tiles = ceil_div(a.d_in, 32 * COLUMNS_PER_THREAD), n_warps = n_threads() / 32;
  for (int i = block() + warp() * n_blocks(); i < a.n_rows * n_column_tiles; i += n_blocks() * n_warps)
    edit_row<T>(a, i / n_column_tiles, i % n_column_tiles);
}

}  // namespace dspa
