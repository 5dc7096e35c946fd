// Who runs next, and when copies land. The warp of the highest priority runs as long as it can, and priorities change
// now and then: so some warps get far ahead, and others fall behind.
#include <map>

#include "runtime.h"

namespace dspa::emulated {

namespace {

// Below this, a warp runs only when no other can.
constexpr uint64_t STARVED = ~0ull / 8;

uint64_t random_state;
int haste;

bool can_run(Warp &warp) {
  for (uint32_t left = warp.waiting; left; left &= left - 1) {
    const Thread &thread = *warp.threads[__builtin_ctz(left)];
    if (!thread.wait.over(thread.wait)) continue;
    warp.waiting ^= thread.bit();
    warp.ready |= thread.bit();
  }
  return warp.ready;
}

// Runs the best of the warps above a priority, if one of them can.
bool run_best(uint64_t priority) {
  Warp *best = nullptr;
  for (Block &block : launched.blocks)
    for (Warp &warp : block.warps)
      if (warp.priority >= priority && can_run(warp)) best = &warp, priority = warp.priority;
  if (!best) return false;
  run(*best);
  if (!random_below(16)) best->priority = random_bits();
  return true;
}

// One sleeper.
bool wake_sleeper() {
  Warp *found = nullptr;
  int n = 0;
  for (Block &block : launched.blocks)
    for (Warp &warp : block.warps)
      if (warp.asleep && !random_below(++n)) found = &warp;
  if (!found) return false;
  const uint32_t lowest = found->asleep & -found->asleep;
  found->asleep ^= lowest;
  found->ready |= lowest;
  return true;
}

// Copies land when nothing else can happen, now and then, one by one or at once; which of these changes too.
void land_some_copies() {
  if (!random_below(16)) haste = random_below(4);
  const int n = copies_in_flight();
  if (!n || !haste || (haste == 1 && random_below(16))) return;
  land_copies(haste == 3 ? n : 1);
}

bool land_any_copies() {
  const int n = copies_in_flight();
  if (n) land_copies(1 + random_below(n));
  return n;
}

bool all_ended() {
  for (const Block &block : launched.blocks)
    for (const Warp &warp : block.warps)
      if (warp.ended != ALL_LANES) return false;
  return true;
}

// Which lanes of a warp are where.
std::map<std::string, uint32_t> places(const Warp &warp) {
  std::map<std::string, uint32_t> lanes;
  if (warp.ended) lanes["ended"] = warp.ended;
  if (warp.arrived) lanes[text("at: %s", warp.operation->name)] = warp.arrived;
  if (warp.barrier >= 0) {
    const Barrier &at = warp.block->barriers[warp.barrier];
    lanes[text("at barrier %d of %d threads, as are warps %x", warp.barrier, at.count, at.waiting)] = ALL_LANES;
  }
  for (uint32_t left = warp.waiting; left; left &= left - 1) {
    const Thread &thread = *warp.threads[__builtin_ctz(left)];
    lanes[thread.wait.text(thread.wait)] |= thread.bit();
  }
  return lanes;
}

std::string list_of_places() {
  std::map<std::string, std::string> warps;
  for (const Block &block : launched.blocks)
    for (const Warp &warp : block.warps)
      for (const auto &[place, lanes] : places(warp))
        warps[text("\n  block %d, lanes %08x ", block.index, lanes) + place] += text(" %d", warp.index);
  std::string all;
  for (const auto &[where, which] : warps) all += where + "; warps" + which;
  return all;
}

[[noreturn]] void deadlock() {
  static std::string list;  // what ends the launch destroys nothing
  list = list_of_places();
  fail("deadlock: no thread can go on%s", list.c_str());
}

}  // namespace

void start_random(uint64_t seed) {
  random_state = seed;
  haste = random_below(4);
  turns_left = random_below(32);
}

uint64_t random_bits() {  // splitmix64
  uint64_t x = random_state += 0x9e3779b97f4a7c15ull;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

int random_below(int n) { return int((random_bits() >> 32) * uint64_t(n) >> 32); }

int random_lane() { return random_state >> 32 & 31; }

void run_all() {
  const auto step = [](int i) { return i == 0 ? wake_sleeper() : i == 1 ? land_any_copies() : run_best(0); };
  for (;;) {
    land_some_copies();
    // Whoever looks at a word again and again would keep sleepers asleep.
    if (!random_below(256)) wake_sleeper();
    if (run_best(STARVED)) continue;
    const int first = random_below(3);
    if (step(first) || step((first + 1) % 3) || step((first + 2) % 3)) continue;
    if (all_ended()) return check_copies();
    deadlock();
  }
}

}  // namespace dspa::emulated
