// The tail of `steer`: the edits of a row, and the residual that follows from them.
#pragma once

#include "pipeline.cuh"

namespace dspa {

// Columns that a warp writes, eight per thread, and decoder rows whose loads are in flight together.
constexpr int TAIL_COLUMNS = 256, DECODER_ROWS_IN_FLIGHT = 8;

// f' = f + alpha M (augment) or max(f - alpha M, 0) (ablate), where f > 0.
__device__ inline float edited(float f, int sign, float shift) {
  if (!(f > 0.f)) return 0.f;
  return sign > 0 ? f + shift : fmaxf(f - shift, 0.f);
}

// The index in `paths` of what happened to a row.
__device__ inline int path_of(const RowState &row, bool was_waiting) {
  if (row.plan < 0) return 0;
  if (!row.finite) return 1;
  if (!(row.required_shift > 0.f)) return 2;
  return was_waiting ? 4 : 3;
}

// Calls f(i_row, o_d) for each row and first column of this warp.
template <class F> __device__ void for_each_column_tile(const Arguments &a, F &&f) {
  const int n_column_tiles = ceil_div(a.d_in, TAIL_COLUMNS);
  for (int i = block() + warp() * n_blocks(); i < a.n_rows * n_column_tiles; i += n_threads() / 32 * n_blocks())
    f(i / n_column_tiles, i % n_column_tiles * TAIL_COLUMNS);
}

// Prefetches the decoder rows of active selected latents, while M is not yet known.
template <class Storage> __device__ void prefetch_tail(const Arguments &a, const Storage &storage) {
  constexpr int line = 128;
  for_each_column_tile(a, [&](int i_row, int o_d) {
    const RowState &row = storage.row_states[i_row];
    if (!row.is_steered()) return;
    for (int i = lane(); i < a.n_slots; i += 32) {
      const int64_t slot = a.slots[int64_t(row.plan) * a.n_slots + i];
      if (!(slot_values_of(a, i_row)[i] > 0.f)) continue;
      const char *columns = static_cast<const char *>(a.columns_W_dec) + (slot * a.d_in + o_d) * NUMBER_BYTES;
      const int bytes = min(TAIL_COLUMNS, a.d_in - o_d) * NUMBER_BYTES;
      for (int o = 0; o < bytes; o += line) prefetch_l2(columns + o);
    }
  });
}

// A lane's slot of 32: its column, f, f' and their difference.
struct SlotEdit {
  int slot = -1;
  float before = 0.f, after = 0.f;
  __device__ float change() const { return after - before; }
};

__device__ inline SlotEdit edit_slot(const Arguments &a, const RowState &row, int i_row, int i_slot, float shift) {
  SlotEdit edit;
  if (i_slot >= a.n_slots) return edit;
  const int64_t o_slot = int64_t(row.plan) * a.n_slots + i_slot;
  edit.slot = a.slots[o_slot];
  edit.before = slot_values_of(a, i_row)[i_slot];
  if (a.k && load_relaxed(a.rank + int64_t(i_row) * a.n_slots + i_slot) >= a.k) edit.before = 0.f;
  edit.after = edited(edit.before, a.signs[o_slot], shift);
  return edit;
}

// delta += (f'_j - f_j) W_dec[j] over the slots from j on that are in flight together.
template <class T>
__device__ void add_decoder_rows(float (&delta)[8], const SlotEdit &edit, const T *W_dec, int j, int d_in, int n_left,
                                 bool aligned) {
  Vec8<T> w[DECODER_ROWS_IN_FLIGHT] = {};
  float change[DECODER_ROWS_IN_FLIGHT];
  if (aligned) {
#pragma unroll
    for (int s = 0; s < DECODER_ROWS_IN_FLIGHT; s++) {
      change[s] = shuffle(edit.change(), j + s);
      const T *row = W_dec + int64_t(shuffle(edit.slot, j + s)) * d_in;
      if (change[s] != 0.f && n_left > 0) w[s].load(row);
    }
#pragma unroll
    for (int s = 0; s < DECODER_ROWS_IN_FLIGHT; s++)
#pragma unroll
      for (int c = 0; c < 8; c++) delta[c] = fmaf(change[s], w[s][c], delta[c]);
  } else {
#pragma unroll 1
    for (int s = 0; s < DECODER_ROWS_IN_FLIGHT; s++) {
      change[0] = shuffle(edit.change(), j + s);
      const T *row = W_dec + int64_t(shuffle(edit.slot, j + s)) * d_in;
      w[0].load_part(row, change[0] != 0.f ? n_left : 0);
#pragma unroll
      for (int c = 0; c < 8; c++) delta[c] = fmaf(change[0], w[0][c], delta[c]);
    }
  }
}

// out = h + sum_j (f'_j - f_j) W_dec[j] at TAIL_COLUMNS columns, summed in the order of the slots. By one warp. In
// place, a row that does not change is not written. The first column tile of a row also records the edits and counts
// the row in `paths`. Each tile that is not finite once edited counts there as not finite.
template <class Storage>
__device__ void edit_row(const Arguments &a, const Storage &storage, unsigned waiting, int i_row, int o_d) {
  using T = typename Storage::T;
  const RowState &row = storage.row_states[i_row];
  const bool is_steered = row.is_steered(), is_first = o_d == 0, aligned = is_aligned(a);
  const float maximum = is_steered ? fmaxf(float_of(load_relaxed(a.running_max + i_row)), row.lower_bound) : 0.f;
  const int n_left = a.d_in - o_d - 8 * lane();

  const T *W_dec = static_cast<const T *>(a.columns_W_dec) + o_d + 8 * lane();
  float delta[8] = {};
  bool changed = false, active = false;
  for (int i = 0; i < a.n_slots; i += 32) {
    const SlotEdit edit = is_steered ? edit_slot(a, row, i_row, i + lane(), strength_of(a, row) * maximum) : SlotEdit();
    if (a.record && is_first && i + lane() < a.n_slots) {
      a.before[int64_t(i_row) * a.n_slots + i + lane()] = edit.before;
      a.after[int64_t(i_row) * a.n_slots + i + lane()] = edit.after;
    }
    active |= ballot(edit.before > 0.f) != 0;
    changed |= ballot(edit.change() != 0.f) != 0;
    for (int j = 0; j < min(32, a.n_slots - i); j += DECODER_ROWS_IN_FLIGHT)
      add_decoder_rows<T>(delta, edit, W_dec, j, a.d_in, n_left, aligned);
  }

  Vec8<T> x = {};
  if (n_left > 0) x.load(storage.template resident_row<T>(i_row) + o_d + 8 * lane());
#pragma unroll
  for (int c = 0; c < 8; c++)
    if (changed) x.x[c] = rounded<T>(x[c] + delta[c]);
  if (a.paths && changed) {
    bool is_finite = true;
#pragma unroll
    for (int c = 0; c < 8; c++) is_finite &= fabsf(x[c]) < RESIDUAL_LIMIT || c >= n_left;  // a NaN compares false
    if (ballot(!is_finite) && lane() == 0) atomic_add(a.paths + 1, int64_t(1));
  }
  const auto store = [&](const Vec8<T> &numbers, void *rows) {
    T *to = static_cast<T *>(rows) + int64_t(i_row) * a.d_in + o_d + 8 * lane();
    if (!aligned) numbers.store_part(to, n_left);
    else if (n_left > 0) numbers.store(to);
  };
  if (changed || a.out != a.h) store(x, a.out);
  if (changed && a.residual) store({}, a.residual);
  if (!is_first || lane() != 0) return;
  if (a.record) a.maximum[i_row] = row.plan >= 0 && !row.finite ? float_of(0x7fc00000) : active ? maximum : 0.f;
  if (a.paths) atomic_add(a.paths + path_of(row, waiting >> i_row & 1), int64_t(1));
}

template <class Storage> __device__ void tail(const Arguments &a, const Storage &storage, unsigned waiting) {
  for_each_column_tile(a, [&](int i_row, int o_d) { edit_row(a, storage, waiting, i_row, o_d); });
}

}  // namespace dspa
