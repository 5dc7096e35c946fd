// The lookup phase of `lookup_and_steer`: the latents that each prompt steers.
#pragma once

#include "common.cuh"

namespace dspa {

// Scans and reductions over a block, with one aggregate per warp in shared memory.
struct BlockScan {
  int *warp_aggregates;

  // Number of threads before this one whose flag is set; total = number of all threads whose flag is set.
  __device__ int exclusive_count(bool flag, int &total) const {
    const unsigned mask = ballot(flag);
    if (lane() == 0) warp_aggregates[warp()] = popcount(mask);
    block_barrier();
    int count = popcount(mask & ((1u << lane()) - 1));
    total = 0;
    for (int w = 0; w < n_threads() / 32; w++) {
      if (w < warp()) count += warp_aggregates[w];
      total += warp_aggregates[w];
    }
    block_barrier();
    return count;
  }

  template <class F> __device__ int reduce(int value, F &&combine) const {
    for (int mask = 16; mask; mask /= 2) value = combine(value, shuffle_xor(value, mask));
    if (lane() == 0) warp_aggregates[warp()] = value;
    block_barrier();
    int result = warp_aggregates[0];
    for (int w = 1; w < n_threads() / 32; w++) result = combine(result, warp_aggregates[w]);
    block_barrier();
    return result;
  }
};

__device__ inline int count_above(const int *key, int n, int pivot, BlockScan block) {
  int count = 0;
  for (int i = thread(); i < n; i += n_threads()) count += key[i] > pivot;
  return block.reduce(count, [](int x, int y) { return x + y; });
}

// The k-th largest key, or 0 if fewer than k keys are positive: by bisection, the smallest pivot >= 0 that fewer than k
// keys exceed.
__device__ inline int kth_largest(const int *key, int n, int k, BlockScan block) {
  int high = 0;
  for (int i = thread(); i < n; i += n_threads()) high = max(high, key[i]);
  high = block.reduce(high, [](int x, int y) { return max(x, y); });
  int low = 0;
  while (low < high) {
    const int mid = low + (high - low) / 2;
    if (count_above(key, n, mid, block) < k) high = mid;
    else low = mid + 1;
  }
  return low;
}

// index = indices of the k largest positive keys, largest first, ties by smaller index, padded with -1. Returns their
// number. unsorted [k] is scratch.
__device__ inline int top_k(const int *key, int n, int k, int *unsorted, int *index, BlockScan block) {
  const int pivot = kth_largest(key, n, k, block);
  const int n_ties_selected = k - count_above(key, n, pivot, block);
  int n_selected = 0, n_ties = 0;
  for (int i = 0; i < n; i += n_threads()) {
    const int i_key = i + thread(), value = i_key < n ? key[i_key] : 0;
    const bool is_tie = value == pivot && value > 0;
    int ties, selected;
    const int tie_rank = n_ties + block.exclusive_count(is_tie, ties);
    const bool is_selected = value > pivot || (is_tie && tie_rank < n_ties_selected);
    const int o_selected = n_selected + block.exclusive_count(is_selected, selected);
    if (is_selected) unsorted[o_selected] = i_key;
    n_ties += ties;
    n_selected += selected;
  }
  block_barrier();
  for (int i = thread(); i < k; i += n_threads()) {
    if (i >= n_selected) {
      index[i] = -1;
      continue;
    }
    int rank = 0;
    for (int j = 0; j < n_selected; j++)  // unsorted is in order of index, so j < i breaks ties
      rank += key[unsorted[j]] > key[unsorted[i]] || (key[unsorted[j]] == key[unsorted[i]] && j < i);
    index[rank] = unsorted[i];
  }
  block_barrier();
  return n_selected;
}

// score_c = sum of values[i, c] over the k_prompt largest counts i (> 0), largest first. slots = the k_diff columns of
// largest score > 0 (augment, sign 1), then those of smallest score < 0 (ablate, sign -1).
__device__ inline void lookup_prompt(const Arguments &a, int i_prompt, BlockScan block) {
  int *unsorted_latents = a.lookup_scratch + int64_t(i_prompt) * (2 * a.k_prompt + a.k_diff + a.n_columns);
  int *latents = unsorted_latents + a.k_prompt, *unsorted_slots = latents + a.k_prompt;
  int *key = unsorted_slots + a.k_diff;
  const int *counts = a.counts + int64_t(i_prompt) * a.d_sae_in;
  const int n_latents = top_k(counts, a.d_sae_in, a.k_prompt, unsorted_latents, latents, block);
  int *slots = a.slots + int64_t(i_prompt) * a.n_slots;
  int8_t *signs = a.signs + int64_t(i_prompt) * a.n_slots;
  for (int sign = 1; sign >= -1; sign -= 2) {
    if (!(sign > 0 ? a.augment : a.ablate)) continue;
    for (int i = thread(); i < a.n_columns; i += n_threads()) {
      float score = 0.f;
      for (int j = 0; j < n_latents; j++) score += a.values[int64_t(latents[j]) * a.n_columns + i];
      // Positive floats order like their bits.
      key[i] = sign * score > 0.f ? bits_of(sign * score) : 0;
    }
    block_barrier();
    top_k(key, a.n_columns, a.k_diff, unsorted_slots, slots, block);
    for (int i = thread(); i < a.k_diff; i += n_threads()) signs[i] = slots[i] < 0 ? 0 : sign;
    block_barrier();
    slots += a.k_diff;
    signs += a.k_diff;
  }
}

__device__ inline void lookup(const Arguments &a) {
  const BlockScan block_scan = {reinterpret_cast<int *>(shared_memory())};
  for (int i = block(); i < a.n_prompts; i += n_blocks()) lookup_prompt(a, i, block_scan);
}

}  // namespace dspa
