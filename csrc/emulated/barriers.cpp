// Barriers of a warp and of a block, votes and elections.
#include "runtime.h"

namespace dspa {

namespace emulated {

namespace {

struct Meeting {
  int id, count;
};

// Warps arrive at a block's barrier as a whole, as bar.sync has it.
void meet(const char *name, Warp &warp, Meeting meeting) {
  Block &block = *warp.block;
  Barrier &barrier = block.barriers[meeting.id];
  const uint32_t bit = 1u << warp.index;
  if (barrier.waiting && barrier.count != meeting.count)
    fail("%s %d for %d threads, where others wait for %d", name, meeting.id, meeting.count, barrier.count);
  if (barrier.members && !(barrier.members & bit))
    fail("%s %d, which has been one of the warps %x alone", name, meeting.id, barrier.members);
  barrier.count = meeting.count;
  barrier.waiting |= bit;
  warp.barrier = meeting.id;
  if (32 * __builtin_popcount(barrier.waiting) < meeting.count) return;
  for (uint32_t left = barrier.waiting; left; left &= left - 1) {
    Warp &other = block.warps[__builtin_ctz(left)];
    other.barrier = -1;
    other.ready = ALL_LANES;
  }
  barrier.members = barrier.waiting;
  barrier.waiting = 0;
  if (meeting.id == 0)
    for (Barrier &each : block.barriers) each.members = 0;
}

bool meet_all(void *const *parts) {
  const Meeting first = *static_cast<const Meeting *>(parts[0]);
  for (int i = 1; i < 32; ++i) {
    const Meeting other = *static_cast<const Meeting *>(parts[i]);
    if (other.id != first.id || other.count != first.count)
      fail("named barrier %d of %d threads in lane 0, %d of %d in lane %d", first.id, first.count, other.id,
           other.count, i);
  }
  meet(first.id ? "named barrier" : "block barrier", *self().warp, first);
  return false;  // were the last to come first to go on, it would be so at every barrier
}

}  // namespace

bool is_elected() {
  static constexpr Operation operation = {"copy_rows", [](void *const *parts) {
    *static_cast<bool *>(parts[random_below(32)]) = true;
    return true;
  }};
  bool elected = false;
  together(operation, &elected);
  return elected;
}

}  // namespace emulated

using namespace emulated;

void block_barrier() {
  static constexpr Operation operation = {"block barrier", meet_all};
  Meeting meeting = {0, n_threads()};
  together(operation, &meeting);
}

void named_barrier(int id, int count) {
  static constexpr Operation operation = {"named barrier", meet_all};
  if (id < 1 || id > 15) fail("named barrier %d: ids are 1 to 15", id);
  if (count < 32 || count > n_threads() || count % 32)
    fail("named barrier %d of %d threads, in a block of %d", id, count, n_threads());
  Meeting meeting = {id, count};
  together(operation, &meeting);
}

void warp_barrier() {
  static constexpr Operation operation = {"warp barrier", [](void *const *) { return true; }};
  together(operation, nullptr);
}

unsigned ballot(bool value) {
  struct Part {
    bool value;
    unsigned result;
  } part = {value, 0};
  static constexpr Operation operation = {"ballot", [](void *const *parts) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) votes |= unsigned(static_cast<Part *>(parts[i])->value) << i;
    for (int i = 0; i < 32; ++i) static_cast<Part *>(parts[i])->result = votes;
    return true;
  }};
  together(operation, &part);
  return part.result;
}

}  // namespace dspa
