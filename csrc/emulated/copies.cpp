// Mbarriers and asynchronous copies, by the rules of the PTX ISA.
#include <algorithm>

#include "runtime.h"

namespace dspa {

namespace emulated {

namespace {

struct Copy {
  Block *block;
  char *to;
  const char *from;
  int bytes;
  MbarrierState *state;
};

std::vector<Copy> copies;
int64_t bytes_copied;

// The word of an mbarrier holds the index of its state, unless a thread overwrites it.
constexpr Mbarrier TAG = 0x6d62617272690000ull;
constexpr int MAX_COUNT = (1 << 20) - 1;  // the most arrivals or bytes that an mbarrier can count

int offset_of(const Block &block, const void *p) { return int(static_cast<const char *>(p) - block.shared); }

MbarrierState *find_state(Block &block, const Mbarrier *bar) {
  const Mbarrier index = *bar ^ TAG;
  if (index >= block.mbarriers.size() || block.mbarriers[index].offset != offset_of(block, bar)) return nullptr;
  return &block.mbarriers[index];
}

MbarrierState &state_of(const char *what, const Mbarrier *bar) {
  Block &block = *self().warp->block;
  check_shared(what, block, bar, sizeof *bar, sizeof *bar);
  MbarrierState *state = find_state(block, bar);
  if (!state) fail("%s: there is no mbarrier at %d of shared memory", what, offset_of(block, bar));
  return *state;
}

void update_phase(MbarrierState &state) {
  const long long bytes = state.bytes;
  if (bytes < -MAX_COUNT || bytes > MAX_COUNT) fail("the mbarrier at %d cannot count %lld bytes", state.offset, bytes);
  if (state.pending) return;
  if (bytes < 0) fail("%lld bytes more than expected came in a phase of the mbarrier at %d", -bytes, state.offset);
  if (state.bytes > 0) return;
  ++state.phase;
  state.pending = state.count;
}

void complete_copy(const Copy &copy) {
  // The destination must still hold the 0xFF that copy() below has put there.
  if (copy.bytes && (uint8_t(copy.to[0]) != 0xFF || memcmp(copy.to, copy.to + 1, copy.bytes - 1)))
    fail("block %d wrote to %d of shared memory, where a copy was about to arrive", copy.block->index,
         offset_of(*copy.block, copy.to));
  memcpy(copy.to, copy.from, copy.bytes);
  copy.state->bytes -= copy.bytes;
  update_phase(*copy.state);
}

void wait_for_next_phase(const MbarrierState &state) {
  const auto is_done = [](const Wait &wait) {
    return static_cast<const MbarrierState *>(wait.what)->phase != wait.value;
  };
  const auto describe = [](const Wait &wait) {
    const MbarrierState &state = *static_cast<const MbarrierState *>(wait.what);
    return text("wait for phase %d of the mbarrier at %d, which lacks %d of %d arrivals and %lld bytes", wait.value,
                state.offset, state.pending, state.count, static_cast<long long>(state.bytes));
  };
  const int phase = state.phase;
  wait_until({is_done, describe, &state, phase});
  if (state.phase > phase + 1) fail("mbarrier_wait: the mbarrier went on by two phases, so this wait may never end");
}

}  // namespace

void check_shared(const char *what, const Block &block, const void *p, int bytes, int alignment) {
  const char *begin = static_cast<const char *>(p);
  const long long offset = begin - block.shared;
  if (begin < block.shared || begin + bytes > block.shared + block.shared_bytes)
    fail("%s: %d bytes at %lld of shared memory, which has %d", what, bytes, offset, block.shared_bytes);
  if (reinterpret_cast<uintptr_t>(p) % alignment)
    fail("%s: %lld of shared memory is not aligned to %d", what, offset, alignment);
}

int n_copies_in_flight() { return int(copies.size()); }

void drop_copies() { copies.clear(); }

void check_copies() {
  for (const Block &block : launched.blocks)
    for (const MbarrierState &state : block.mbarriers)
      if (state.copied > state.seen)
        fail("block %d ended, and nobody waited for copies by the mbarrier at %d", block.index, state.offset);
}

void complete_copies(int n) {
  for (; n; --n) {
    std::swap(copies[random_below(int(copies.size()))], copies.back());
    const Copy copy = copies.back();
    copies.pop_back();
    complete_copy(copy);
  }
}

void copy(char *to, const char *from, int bytes, uint64_t *bar) {
  Block &block = *self().warp->block;
  if (bytes < 0 || bytes % 16) fail("copy of %d bytes, which is no multiple of 16", bytes);
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("copy from %p, which is not aligned to 16", from);
  check_shared("copy", block, to, bytes, 16);
  MbarrierState &state = state_of("copy", bar);
  bytes_copied += bytes;
  state.copied = state.phase + 1;
  // Until the copy completes, the destination holds neither the old bytes nor the new ones.
  memset(to, 0xFF, bytes);
  copies.push_back({&block, to, from, bytes, &state});
  maybe_yield();
}

}  // namespace emulated

using namespace emulated;

void mbarrier_init(Mbarrier *bar, int count) {
  Block &block = *self().warp->block;
  check_shared("mbarrier_init", block, bar, sizeof *bar, sizeof *bar);
  if (find_state(block, bar)) fail("mbarrier_init of what is an mbarrier already");
  if (count < 1 || count > MAX_COUNT) fail("mbarrier_init for %d arrivals", count);
  *bar = TAG ^ block.mbarriers.size();
  block.mbarriers.push_back({offset_of(block, bar), count, count, 0, 0, 0, 0});
}

void mbarrier_arrive(Mbarrier *bar) {
  MbarrierState &state = state_of("mbarrier_arrive", bar);
  if (!state.pending) fail("mbarrier_arrive: more than %d arrivals in a phase, at %d", state.count, state.offset);
  --state.pending;
  update_phase(state);
  maybe_yield();
}

void mbarrier_expect_tx(Mbarrier *bar, int bytes) {
  MbarrierState &state = state_of("mbarrier_expect_tx", bar);
  if (bytes < 0) fail("mbarrier_expect_tx of %d bytes", bytes);
  state.bytes += bytes;
  update_phase(state);
}

void mbarrier_wait(Mbarrier *bar, int parity) {
  MbarrierState &state = state_of("mbarrier_wait", bar);
  if (parity != 0 && parity != 1) fail("mbarrier_wait for the parity %d", parity);
  if (state.phase % 2 == parity) wait_for_next_phase(state);
  state.seen = state.phase;
  maybe_yield();
}

}  // namespace dspa

int64_t dspa_emulated_bytes_copied() { return dspa::emulated::bytes_copied; }

void dspa_emulated_reset() {
  dspa::emulated::bytes_copied = 0;
  dspa::emulated::reset_launches();
}
