// Chooses which warp runs next and when copies complete. The warp of highest priority runs as long as it can, and
// priorities change now and then, so that some warps get far ahead and others fall behind.
#include <map>

#include "runtime.h"

namespace dspa::emulated {

namespace {

// A warp below this priority runs only when no other can.
constexpr uint64_t STARVED = ~0ull / 8;

uint64_t random_state;
int completion_rate;

bool can_run(Warp &warp) {
  for (uint32_t left = warp.waiting; left; left &= left - 1) {
    const Thread &thread = *warp.threads[__builtin_ctz(left)];
    if (!thread.wait.is_done(thread.wait)) continue;
    warp.waiting ^= thread.bit();
    warp.ready |= thread.bit();
  }
  return warp.ready;
}

// Runs the warp of highest priority from `priority` on, if one can run.
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

// Wakes one random lane of those asleep.
bool wake_sleeping_lane() {
  Warp *chosen = nullptr;
  int n = 0;
  for (Block &block : launched.blocks)
    for (Warp &warp : block.warps)
      if (warp.asleep && !random_below(++n)) chosen = &warp;
  if (!chosen) return false;
  const uint32_t lowest = chosen->asleep & -chosen->asleep;
  chosen->asleep ^= lowest;
  chosen->ready |= lowest;
  return true;
}

// Copies complete late, now and then, one by one or all at once; the rate changes at random.
void complete_some_copies() {
  if (!random_below(16)) completion_rate = random_below(4);
  const int n = n_copies_in_flight();
  if (!n || !completion_rate || (completion_rate == 1 && random_below(16))) return;
  complete_copies(completion_rate == 3 ? n : 1);
}

bool complete_any_copies() {
  const int n = n_copies_in_flight();
  if (n) complete_copies(1 + random_below(n));
  return n;
}

bool all_ended() {
  for (const Block &block : launched.blocks)
    for (const Warp &warp : block.warps)
      if (warp.ended != ALL_LANES) return false;
  return true;
}

// The lanes of a warp by what they are doing.
std::map<std::string, uint32_t> lane_states(const Warp &warp) {
  std::map<std::string, uint32_t> lanes;
  if (warp.ended) lanes["ended"] = warp.ended;
  if (warp.arrived) lanes[text("at: %s", warp.collective->name)] = warp.arrived;
  if (warp.barrier >= 0) {
    const Barrier &at = warp.block->barriers[warp.barrier];
    lanes[text("at barrier %d of %d threads, as are warps %x", warp.barrier, at.count, at.waiting)] = ALL_LANES;
  }
  for (uint32_t left = warp.waiting; left; left &= left - 1) {
    const Thread &thread = *warp.threads[__builtin_ctz(left)];
    lanes[thread.wait.describe(thread.wait)] |= thread.bit();
  }
  return lanes;
}

std::string describe_warps() {
  std::map<std::string, std::string> warps;
  for (const Block &block : launched.blocks)
    for (const Warp &warp : block.warps)
      for (const auto &[state, lanes] : lane_states(warp))
        warps[text("\n  block %d, lanes %08x ", block.index, lanes) + state] += text(" %d", warp.index);
  std::string all;
  for (const auto &[state_text, warp_list] : warps) all += state_text + "; warps" + warp_list;
  return all;
}

[[noreturn]] void deadlock() {
  static std::string list;  // fail() jumps away without destructors
  list = describe_warps();
  fail("deadlock: no thread can go on%s", list.c_str());
}

}  // namespace

void start_random(uint64_t seed) {
  random_state = seed;
  completion_rate = random_below(4);
  steps_until_yield = random_below(32);
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
  const auto step = [](int i) { return i == 0 ? wake_sleeping_lane() : i == 1 ? complete_any_copies() : run_best(0); };
  for (;;) {
    complete_some_copies();
    // A thread that polls a word could otherwise keep the sleeping lanes asleep forever.
    if (!random_below(256)) wake_sleeping_lane();
    if (run_best(STARVED)) continue;
    const int first = random_below(3);
    if (step(first) || step((first + 1) % 3) || step((first + 2) % 3) || end_launch_ahead()) continue;
    if (all_ended()) return check_copies();
    deadlock();
  }
}

}  // namespace dspa::emulated
