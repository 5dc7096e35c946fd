// Barriers of a warp and of a block, ballots and elections.
#include "runtime.h"

namespace dspa {

namespace emulated {

namespace {

struct BarrierCall {
  int id, count;
};

// Warps arrive at a barrier of the block as a whole, as with bar.sync.
void arrive_at_barrier(const char *name, Warp &warp, BarrierCall call) {
  Block &block = *warp.block;
  Barrier &barrier = block.barriers[call.id];
  const uint32_t bit = 1u << warp.index;
  if (barrier.waiting && barrier.count != call.count)
    fail("%s %d for %d threads, where others wait for %d", name, call.id, call.count, barrier.count);
  if (barrier.members && !(barrier.members & bit))
    fail("%s %d, which has been one of the warps %x alone", name, call.id, barrier.members);
  barrier.count = call.count;
  barrier.waiting |= bit;
  warp.barrier = call.id;
  if (32 * __builtin_popcount(barrier.waiting) < call.count) return;
  for (uint32_t left = barrier.waiting; left; left &= left - 1) {
    Warp &other = block.warps[__builtin_ctz(left)];
    other.barrier = -1;
    other.ready = ALL_LANES;
  }
  barrier.members = barrier.waiting;
  barrier.waiting = 0;
  if (call.id == 0)
    for (Barrier &named : block.barriers) named.members = 0;
}

bool arrive_with_warp(void *const *parts) {
  const BarrierCall first = *static_cast<const BarrierCall *>(parts[0]);
  for (int i = 1; i < 32; ++i) {
    const BarrierCall other = *static_cast<const BarrierCall *>(parts[i]);
    if (other.id != first.id || other.count != first.count)
      fail("named barrier %d of %d threads in lane 0, %d of %d in lane %d", first.id, first.count, other.id,
           other.count, i);
  }
  arrive_at_barrier(first.id ? "named barrier" : "block barrier", *self().warp, first);
  return false;  // else the last thread to arrive would be the first to continue, at every barrier
}

}  // namespace

bool elect_one() {
  static constexpr Collective collective = {"asynchronous copy", [](void *const *parts) {
    *static_cast<bool *>(parts[random_below(32)]) = true;
    return true;
  }};
  bool elected = false;
  run_collective(collective, &elected);
  return elected;
}

}  // namespace emulated

using namespace emulated;

void block_barrier() {
  static constexpr Collective collective = {"block barrier", arrive_with_warp};
  BarrierCall call = {0, n_threads()};
  run_collective(collective, &call);
}

void named_barrier(int id, int count) {
  static constexpr Collective collective = {"named barrier", arrive_with_warp};
  if (id < 1 || id > 15) fail("named barrier %d: ids are 1 to 15", id);
  if (count < 32 || count > n_threads() || count % 32)
    fail("named barrier %d of %d threads, in a block of %d", id, count, n_threads());
  BarrierCall call = {id, count};
  run_collective(collective, &call);
}

void warp_barrier() {
  static constexpr Collective collective = {"warp barrier", [](void *const *) { return true; }};
  run_collective(collective, nullptr);
}

unsigned ballot(bool value) {
  struct Part {
    bool value;
    unsigned result;
  } part = {value, 0};
  static constexpr Collective collective = {"ballot", [](void *const *parts) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) votes |= unsigned(static_cast<Part *>(parts[i])->value) << i;
    for (int i = 0; i < 32; ++i) static_cast<Part *>(parts[i])->result = votes;
    return true;
  }};
  run_collective(collective, &part);
  return part.result;
}

}  // namespace dspa
