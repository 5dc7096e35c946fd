// Threads of a launch as fibers, which one host thread runs in turn.
#undef _FORTIFY_SOURCE  // its longjmp rejects a jump to another stack
#include <ucontext.h>

#include "runtime.h"

namespace dspa::emulated {

namespace {

// Most of a stack is never touched, and a thread that comes near its end fails. Colours place the tops of the stacks in
// different sets of the cache.
constexpr size_t STACK = 256 * 1024, NEAR_END = 64 * 1024, COLOURS = 64, COLOUR = 17 * 64;

jmp_buf scheduler, creator;
Thread *starting_thread;

// A function that calls _setjmp continues when it is switched back to, so it must not rely on local variables.

void switch_to(Thread &thread) {
  running = &thread;
  _longjmp(thread.resume_point, 1);
}

// Lanes run round-robin from a lane that changes, so that none is always ahead of its neighbour.
Thread &next_lane(Warp &warp) {
  const int first = random_lane();
  const uint32_t turned = warp.ready >> first | (warp.ready << 1) << (31 - first);
  const int lane = (__builtin_ctz(turned) + first) % 32;
  warp.ready &= ~(1u << lane);
  return *warp.threads[lane];
}

// Switches to another thread of the warp, or to the scheduler.
void switch_away() {
  if (self().warp->ready) switch_to(next_lane(*self().warp));
  _longjmp(scheduler, 1);
}

// Blocks this thread until another one makes it ready again.
void suspend() {
  if (!_setjmp(self().resume_point)) switch_away();
}

void return_to_scheduler() {
  if (!_setjmp(self().resume_point)) _longjmp(scheduler, 1);
}

void check_stack() {
  char top;
  if (&top < self().stack.get() + NEAR_END) fail("needs more than the %zu KB of its stack", (STACK - NEAR_END) / 1024);
}

void exit_thread() {
  Warp &warp = *self().warp;
  if (warp.arrived)
    fail("ends, while lanes %08x of its warp wait for the others at: %s", warp.arrived, warp.collective->name);
  warp.ended |= self().bit();
  switch_away();
}

void run_kernel() {
  if (!_setjmp(starting_thread->entry_point)) _longjmp(creator, 1);
  launched.kernel(launched.call);
  exit_thread();
}

}  // namespace

const ThreadIndex *running;
int steps_until_yield;

Thread &self() { return *const_cast<Thread *>(static_cast<const Thread *>(running)); }

void create(Thread &thread, int index) {
  static ucontext_t context;
  thread.stack.reset(new char[STACK + COLOURS * COLOUR]);
  getcontext(&context);
  context.uc_stack.ss_sp = thread.stack.get();
  context.uc_stack.ss_size = STACK + index % COLOURS * COLOUR;
  makecontext(&context, run_kernel, 0);
  starting_thread = &thread;
  if (!_setjmp(creator)) setcontext(&context);
}

void run(Warp &warp) {
  if (!_setjmp(scheduler)) switch_to(next_lane(warp));
  running = nullptr;
}

void yield_thread() {
  check_stack();
  steps_until_yield = random_below(2 << random_below(8));  // sometimes few, sometimes many
  Warp &warp = *self().warp;
  (warp.priority % 2 ? warp.ready : warp.asleep) |= self().bit();
  return_to_scheduler();
}

void wait_until(const Wait &wait) {
  if (wait.is_done(wait)) return maybe_yield();
  check_stack();
  self().wait = wait;
  self().warp->waiting |= self().bit();
  suspend();
}

void wait_for_sign_flip(const int *p, int token) {
  const auto is_done = [](const Wait &wait) { return (*static_cast<const int *>(wait.what) ^ wait.value) < 0; };
  const auto describe = [](const Wait &wait) {
    const int now = *static_cast<const int *>(wait.what);
    return text("wait for another sign than that of %d, at a word that is %d", wait.value, now);
  };
  wait_until({is_done, describe, p, token});
}

void run_collective(const Collective &collective, void *part) {
  check_stack();
  Thread &thread = self();
  Warp &warp = *thread.warp;
  if (warp.ended) fail("%s, which lanes %08x of its warp never reach, as they have ended", collective.name, warp.ended);
  if (warp.arrived && warp.collective != &collective)
    fail("%s, while lanes %08x of its warp are at: %s", collective.name, warp.arrived, warp.collective->name);
  warp.collective = &collective;
  warp.parts[thread.thread % 32] = part;
  warp.arrived |= thread.bit();
  if (warp.arrived != ALL_LANES) return suspend();
  warp.arrived = 0;
  if (!collective.complete(warp.parts)) return return_to_scheduler();
  warp.ready = ALL_LANES ^ thread.bit();
  maybe_yield();
}

}  // namespace dspa::emulated
