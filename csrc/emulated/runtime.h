// What the files of the emulator share: threads, warps, blocks and the launch that they are of.
#pragma once

#include <setjmp.h>

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "primitives.cuh"

namespace dspa::emulated {

constexpr uint32_t ALL_LANES = ~0u;

// What a thread waits for, in a form that the scheduler can look at without waking it.
struct Wait {
  bool (*over)(const Wait &);
  std::string (*text)(const Wait &);
  const void *what;
  int value;
};

struct Block;
struct Warp;

// A stack of its own, and the places on it from which to go on and to begin.
struct Thread : Identity {
  jmp_buf here, start;
  std::unique_ptr<char[]> stack;
  Warp *warp;
  Wait wait;
  uint32_t bit() const { return 1u << thread % 32; }
};

// Each lane runs, or is in one of the masks: ready; waiting by itself; arrived at what the warp does together; asleep
// until nobody else can run; ended.
struct Warp {
  Block *block;
  int index;
  Thread *threads[32];
  uint32_t ready, waiting, arrived, asleep, ended;
  const Operation *operation;  // at which lanes have arrived
  void *parts[32];
  int barrier;  // of the block, at which all lanes wait, or -1
  // One that is even falls asleep where others only let somebody else run.
  uint64_t priority;
};

// `members` are the warps that met here since the last barrier of the whole block.
struct Barrier {
  int count;
  uint32_t waiting, members;
};

struct MbarrierState {
  int offset;  // in shared memory
  int count, pending;
  int64_t bytes;  // that are expected and have not come
  int phase;
  int copied, seen;  // phases, to the last with copies, and to the last that somebody waited for
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

// fibers.cpp

// Makes the stack on which thread `index` of a launch begins.
void create(Thread &thread, int index);

Thread &self();

// Runs threads of this warp, until one of them comes back.
void run(Warp &warp);

// Blocks this thread; the scheduler wakes it.
void wait_until(const Wait &wait);

// scheduler.cpp

void start_random(uint64_t seed);
uint64_t random_bits();
// From 0 to below n.
int random_below(int n);
// A number that changes now and then, from 0 to 31.
int random_lane();

// Until all threads have ended.
void run_all();

// copies.cpp

int copies_in_flight();
void land_copies(int n);
void drop_copies();
// Ends the launch if there were copies that nobody waited for.
void check_copies();

// Ends the launch unless these bytes lie in the block's shared memory, at a multiple of `alignment`.
void check_shared(const char *what, const Block &block, const void *p, int bytes, int alignment);

}  // namespace dspa::emulated
