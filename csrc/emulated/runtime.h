// Shared by the files of the emulator: threads, warps, blocks and the launch to which they belong.
#pragma once

#include <setjmp.h>

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "primitives.cuh"

namespace dspa::emulated {

constexpr uint32_t ALL_LANES = ~0u;

// A condition that a thread waits for, which the scheduler can check without waking it.
struct Wait {
  bool (*is_done)(const Wait &);
  std::string (*describe)(const Wait &);
  const void *what;
  int value;
};

struct Block;
struct Warp;

// A fiber: its stack, and the points on it where it resumes and where it starts.
struct Thread : ThreadIndex {
  jmp_buf resume_point, entry_point;
  std::unique_ptr<char[]> stack;
  Warp *warp;
  Wait wait;
  uint32_t bit() const { return 1u << thread % 32; }
};

// Each lane runs, or is in one of these masks: ready; waiting for a condition of its own; arrived at a collective of
// the warp; asleep until no other thread can run; ended.
struct Warp {
  Block *block;
  int index;
  Thread *threads[32];
  uint32_t ready, waiting, arrived, asleep, ended;
  const Collective *collective;  // at which lanes have arrived
  void *parts[32];
  int barrier;  // the block's barrier at which all lanes wait, or -1
  // A warp of even priority sleeps where others only yield.
  uint64_t priority;
};

// `members` are the warps that used this barrier since the last barrier of the whole block.
struct Barrier {
  int count;
  uint32_t waiting, members;
};

struct MbarrierState {
  int offset;  // in shared memory
  int count, pending;
  int64_t bytes;  // expected and not yet copied
  int phase;
  int copied, seen;  // number of phases up to the last with copies, and up to the last that a thread waited for
};

struct Block {
  int index;
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::deque<MbarrierState> mbarriers;
  char *shared;
  int shared_bytes;
};

struct Launch {
  void (*kernel)(const void *);
  const void *call;
  int n_threads;
  std::vector<Block> blocks;
};

// launch.cpp

extern Launch launched;

__attribute__((format(printf, 1, 2))) std::string text(const char *format, ...);

void reset_launches();

// Ends the launch ahead, if there is one.
bool end_launch_ahead();

// fibers.cpp

// Creates the stack on which thread `index` of a launch starts.
void create(Thread &thread, int index);

Thread &self();

// Runs threads of this warp until one of them returns to the scheduler.
void run(Warp &warp);

// Blocks this thread until the scheduler finds that the condition holds.
void wait_until(const Wait &wait);

// scheduler.cpp

void start_random(uint64_t seed);
uint64_t random_bits();
// A number in [0, n).
int random_below(int n);
// A number in [0, 32) that changes now and then.
int random_lane();

// Runs until all threads have ended.
void run_all();

// copies.cpp

int n_copies_in_flight();
void complete_copies(int n);
void drop_copies();
// Fails the launch if there were copies that no thread waited for.
void check_copies();

// Fails the launch unless these bytes lie in the block's shared memory at a multiple of `alignment`.
void check_shared(const char *what, const Block &block, const void *p, int bytes, int alignment);

}  // namespace dspa::emulated
