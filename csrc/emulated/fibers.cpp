// Threads of a launch as fibers, which one thread of the host runs in turn.
#undef _FORTIFY_SOURCE  // whose longjmp takes another stack for a mistake
#include <ucontext.h>

#include "runtime.h"

namespace dspa::emulated {

namespace {

// Most of a stack is never touched, and a thread that comes near its end is stopped. Colours put the stacks' tops into
// different sets of the cache.
constexpr size_t STACK = 256 * 1024, NEAR_END = 64 * 1024, COLOURS = 64, COLOUR = 17 * 64;

jmp_buf scheduler, creator;
Thread *entering;

// What calls _setjmp returns when somebody switches back, so it keeps nothing in local variables.

void switch_to(Thread &thread) {
  running = &thread;
  _longjmp(thread.here, 1);
}

// Lanes go round from a place that changes, so that none is always ahead of its neighbour.
Thread &take_lane(Warp &warp) {
  const int first = random_lane();
  const uint32_t turned = warp.ready >> first | (warp.ready << 1) << (31 - first);
  const int lane = (__builtin_ctz(turned) + first) % 32;
  warp.ready &= ~(1u << lane);
  return *warp.threads[lane];
}

// To another thread of the warp, or to the scheduler.
void leave() {
  if (self().warp->ready) switch_to(take_lane(*self().warp));
  _longjmp(scheduler, 1);
}

// Until somebody makes this thread ready again.
void suspend() {
  if (!_setjmp(self().here)) leave();
}

void go_to_scheduler() {
  if (!_setjmp(self().here)) _longjmp(scheduler, 1);
}

void check_stack() {
  char here;
  if (&here < self().stack.get() + NEAR_END) fail("needs more than the %zu KB of its stack", (STACK - NEAR_END) / 1024);
}

void end() {
  Warp &warp = *self().warp;
  if (warp.arrived)
    fail("ends, while lanes %08x of its warp wait for the others at: %s", warp.arrived, warp.operation->name);
  warp.ended |= self().bit();
  leave();
}

void run_kernel() {
  if (!_setjmp(entering->start)) _longjmp(creator, 1);
  launched.kernel(launched.call);
  end();
}

}  // namespace

const Identity *running;
int turns_left;

Thread &self() { return *const_cast<Thread *>(static_cast<const Thread *>(running)); }

void create(Thread &thread, int index) {
  static ucontext_t context;
  thread.stack.reset(new char[STACK + COLOURS * COLOUR]);
  getcontext(&context);
  context.uc_stack.ss_sp = thread.stack.get();
  context.uc_stack.ss_size = STACK + index % COLOURS * COLOUR;
  makecontext(&context, run_kernel, 0);
  entering = &thread;
  if (!_setjmp(creator)) setcontext(&context);
}

void run(Warp &warp) {
  if (!_setjmp(scheduler)) switch_to(take_lane(warp));
  running = nullptr;
}

void let_others_run() {
  check_stack();
  turns_left = random_below(2 << random_below(8));  // soon, or not for long
  Warp &warp = *self().warp;
  (warp.priority % 2 ? warp.ready : warp.asleep) |= self().bit();
  go_to_scheduler();
}

void wait_until(const Wait &wait) {
  if (wait.over(wait)) return others_may_run();
  check_stack();
  self().wait = wait;
  self().warp->waiting |= self().bit();
  suspend();
}

void wait_for_sign(const int *p, int ticket) {
  const auto over = [](const Wait &wait) { return (*static_cast<const int *>(wait.what) ^ wait.value) < 0; };
  const auto told = [](const Wait &wait) {
    const int now = *static_cast<const int *>(wait.what);
    return text("wait for another sign than that of %d, at a word that is %d", wait.value, now);
  };
  wait_until({over, told, p, ticket});
}

void together(const Operation &operation, void *part) {
  check_stack();
  Thread &thread = self();
  Warp &warp = *thread.warp;
  if (warp.ended) fail("%s, which lanes %08x of its warp never reach, as they have ended", operation.name, warp.ended);
  if (warp.arrived && warp.operation != &operation)
    fail("%s, while lanes %08x of its warp are at: %s", operation.name, warp.arrived, warp.operation->name);
  warp.operation = &operation;
  warp.parts[thread.thread % 32] = part;
  warp.arrived |= thread.bit();
  if (warp.arrived != ALL_LANES) return suspend();
  warp.arrived = 0;
  if (!operation.complete(warp.parts)) return go_to_scheduler();
  warp.ready = ALL_LANES ^ thread.bit();
  others_may_run();
}

}  // namespace dspa::emulated
