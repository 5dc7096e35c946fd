// The lookup of `lookup_and_steer`: which latents a prompt steers.
#pragma once

#include "common.cuh"

namespace dspa {

// Sums over a block, through a number a warp in shared memory.
struct BlockSum {
  int *of_warp;

  // How many threads before this one say yes; `total` of all.
  __device__ int before(bool yes, int &total) const {
    const unsigned mask = ballot(yes);
    if (lane() == 0) of_warp[warp()] = count_bits(mask);
    block_barrier();
    int count = count_bits(mask & ((1u << lane()) - 1));
    total = 0;
    for (int w = 0; w < n_threads() / 32; w++) {
      if (w < warp()) count += of_warp[w];
      total += of_warp[w];
    }
    block_barrier();
    return count;
  }

  template <class F> __device__ int all(int own, F &&combine) const {
    for (int mask = 16; mask; mask /= 2) own = combine(own, shuffle_xor(own, mask));
    if (lane() == 0) of_warp[warp()] = own;
    block_barrier();
    int result = of_warp[0];
    for (int w = 1; w < n_threads() / 32; w++) result = combine(result, of_warp[w]);
    block_barrier();
    return result;
  }
};

__device__ inline int count_above(const int *key, int n, int level, BlockSum block) {
  int count = 0;
  for (int i = thread(); i < n; i += n_threads()) count += key[i] > level;
  return block.all(count, [](int x, int y) { return x + y; });
}

// The smallest level >= 0 with fewer than k keys above it: the k-th largest key, or 0 if k are not positive.
__device__ inline int level_of(const int *key, int n, int k, BlockSum block) {
  int high = 0;
  for (int i = thread(); i < n; i += n_threads()) high = most(high, key[i]);
  high = block.all(high, [](int x, int y) { return most(x, y); });
  int low = 0;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (count_above(key, n, middle, block) < k) high = middle;
    else low = middle + 1;
  }
  return low;
}

// index = places of the k largest positive keys, largest first, ties to the smaller place, then -1; returns how many.
// `found` [k] holds them in their own order for a while.
__device__ inline int largest(const int *key, int n, int k, int *found, int *index, BlockSum block) {
  const int level = level_of(key, n, k, block);
  const int room = k - count_above(key, n, level, block);
  int n_taken = 0, n_ties = 0;
  for (int i = 0; i < n; i += n_threads()) {
    const int place = i + thread(), own = place < n ? key[place] : 0;
    const bool tie = own == level && own > 0;
    int ties, taken;
    const int rank = n_ties + block.before(tie, ties);
    const bool take = own > level || (tie && rank < room);
    const int to = n_taken + block.before(take, taken);
    if (take) found[to] = place;
    n_ties += ties;
    n_taken += taken;
  }
  block_barrier();
  for (int i = thread(); i < k; i += n_threads()) {
    if (i >= n_taken) {
      index[i] = -1;
      continue;
    }
    int rank = 0;
    for (int j = 0; j < n_taken; j++)  // of equal keys, the one that was found first
      rank += key[found[j]] > key[found[i]] || (key[found[j]] == key[found[i]] && j < i);
    index[rank] = found[i];
  }
  block_barrier();
  return n_taken;
}

// s = sum of values[i] over the k_prompt largest counts (> 0), largest first; the k_diff extremes of s.
__device__ inline void lookup_prompt(const Arguments &a, int i_prompt, BlockSum block) {
  int *found = a.found + int64_t(i_prompt) * (2 * a.k_prompt + a.k_diff + a.n_columns);
  int *prompt = found + a.k_prompt, *extreme = prompt + a.k_prompt, *key = extreme + a.k_diff;
  const int present = largest(a.counts + int64_t(i_prompt) * a.d_sae_in, a.d_sae_in, a.k_prompt, found, prompt, block);
  int *slots = a.slots + int64_t(i_prompt) * a.n_slots;
  int8_t *signs = a.signs + int64_t(i_prompt) * a.n_slots;
  for (int sign = 1; sign >= -1; sign -= 2) {
    if (!(sign > 0 ? a.augment : a.ablate)) continue;
    for (int i = thread(); i < a.n_columns; i += n_threads()) {
      float score = 0.f;
      for (int j = 0; j < present; j++) score += a.values[int64_t(prompt[j]) * a.n_columns + i];
      // Positive numbers order like their bits.
      key[i] = sign * score > 0.f ? bits_of(sign * score) : 0;
    }
    block_barrier();
    largest(key, a.n_columns, a.k_diff, extreme, slots, block);
    for (int i = thread(); i < a.k_diff; i += n_threads()) signs[i] = slots[i] < 0 ? 0 : sign;
    block_barrier();
    slots += a.k_diff;
    signs += a.k_diff;
  }
}

__device__ inline void lookup(const Arguments &a) {
  const BlockSum block_sum = {reinterpret_cast<int *>(shared_memory())};
  for (int i = block(); i < a.n_prompts; i += n_blocks()) lookup_prompt(a, i, block_sum);
}

}  // namespace dspa
