// Launches: the state they start from, and the checks when they end.
#undef _FORTIFY_SOURCE  // its longjmp rejects a jump to another stack
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <mutex>

#include "runtime.h"

namespace dspa::emulated {

Launch launched;

namespace {

constexpr int MULTIPROCESSORS = 3, MAX_SHARED = 227 * 1024, MAX_THREADS = 1024, CAPABILITY = 90;
constexpr int GUARD = 4096, ALIGNMENT = 128;

enum Code { INVALID_VALUE = 1, LAUNCH_FAILURE = 719 };

std::mutex one_launch;
std::vector<std::unique_ptr<Thread>> threads;
std::vector<std::unique_ptr<char[]>> shared_memories;
jmp_buf failure;
std::string failure_text;
int64_t launches;
int partition;

struct {
  void *to;
  const void *from;
  int64_t bytes;
} write_ahead;

uint64_t seed() {
  const char *given = getenv("DSPA_EMULATED_SEED");
  return given ? strtoull(given, nullptr, 0) : 0;
}

char *shared_memory_of(int block) {
  while (int(shared_memories.size()) <= block)
    shared_memories.emplace_back(new char[MAX_SHARED + 2 * GUARD + 3 * ALIGNMENT]);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(shared_memories[block].get()) + GUARD;
  // Aligned to exactly what device/primitives.cuh asks for, and no further.
  return reinterpret_cast<char *>(begin + 2 * ALIGNMENT - begin % (2 * ALIGNMENT) + ALIGNMENT);
}

void prepare_warp(Warp &warp, Block &block, int index) {
  warp.block = &block;
  warp.index = index;
  warp.ready = ALL_LANES;
  warp.barrier = -1;
  warp.priority = random_bits();
  for (int lane = 0; lane < 32; ++lane) {
    const int i = 32 * index + lane;
    Thread &thread = *(warp.threads[lane] = threads[block.index * launched.n_threads + i].get());
    const int n_blocks = int(launched.blocks.size());
    static_cast<ThreadIndex &>(thread) = {i, launched.n_threads, block.index, n_blocks, block.shared};
    memcpy(&thread.resume_point, &thread.entry_point, sizeof thread.resume_point);
    thread.warp = &warp;
  }
}

void prepare_block(Block &block, int index, int shared) {
  block.index = index;
  block.shared = shared_memory_of(index);
  block.shared_bytes = shared;
  memset(block.shared - GUARD, 0xA5, GUARD);
  memset(block.shared, 0xFF, shared);  // NaN in every dtype
  memset(block.shared + shared, 0xA5, GUARD);
  block.warps.resize(launched.n_threads / 32);
  for (size_t w = 0; w < block.warps.size(); ++w) prepare_warp(block.warps[w], block, int(w));
}

void prepare(int blocks, int n_threads, int shared) {
  start_random(seed() * 0x2545f4914f6cdd1dull + launches);
  drop_copies();
  for (int i = int(threads.size()); i < blocks * n_threads; ++i) {
    threads.emplace_back(new Thread());
    create(*threads.back(), i);
  }
  launched.n_threads = n_threads;
  launched.blocks.assign(blocks, Block());
  for (int i = 0; i < blocks; ++i) prepare_block(launched.blocks[i], i, shared);
}

bool is_untouched(const char *guard) { return uint8_t(guard[0]) == 0xA5 && !memcmp(guard, guard + 1, GUARD - 1); }

void check_guards() {
  for (const Block &block : launched.blocks)
    if (!is_untouched(block.shared - GUARD) || !is_untouched(block.shared + block.shared_bytes))
      fail("block %d wrote outside its %d bytes of shared memory", block.index, block.shared_bytes);
}

int run_launch() {
  if (_setjmp(failure)) {
    running = nullptr;
    return LAUNCH_FAILURE;
  }
  run_all();
  check_guards();
  return 0;
}

int refuse(int code, const std::string &why) {
  failure_text = why;
  return code;
}

}  // namespace

std::string text(const char *format, ...) {
  char buffer[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

void fail(const char *format, ...) {
  static char buffer[8000];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  failure_text = text("launch %lld: ", static_cast<long long>(launches));
  if (running) failure_text += text("block %d, thread %d: ", running->block, running->thread);
  failure_text += buffer;
  _longjmp(failure, 1);
}

void reset_launches() { launches = 0; }

bool end_launch_ahead() {
  if (!write_ahead.bytes) return false;
  memcpy(write_ahead.to, write_ahead.from, write_ahead.bytes);
  write_ahead.bytes = 0;
  return true;
}

void wait_for_launch_ahead() {
  const auto is_done = [](const Wait &) { return !write_ahead.bytes; };
  const auto describe = [](const Wait &) { return text("wait for the launch ahead"); };
  wait_until({is_done, describe, nullptr, 0});
}

int launch(void (*kernel)(const void *), const void *call, int blocks, int n_threads, int shared, bool programmatic) {
  const std::lock_guard<std::mutex> lock(one_launch);
  ++launches;
  if (n_threads < 32 || n_threads > MAX_THREADS || n_threads % 32 || blocks < 1 || shared < 0 || shared > MAX_SHARED)
    return refuse(INVALID_VALUE, text("%d blocks of %d threads and %d bytes", blocks, n_threads, shared));
  if (blocks > (partition ? partition : MULTIPROCESSORS))
    return refuse(TOO_LARGE, text("%d blocks do not run at one time", blocks));
  if (!programmatic) end_launch_ahead();
  launched.kernel = kernel;
  launched.call = call;
  prepare(blocks, n_threads, shared);
  return run_launch();
}

}  // namespace dspa::emulated

namespace dspa {

using namespace emulated;

int current_device(Device *properties) {
  *properties = {MULTIPROCESSORS, MAX_SHARED, CAPABILITY};
  return 0;
}

const char *error_name(int code) {
  switch (code) {
    case 0: return "cudaSuccess";
    case INVALID_VALUE: return "cudaErrorInvalidValue";
    case LAUNCH_FAILURE: return "cudaErrorLaunchFailure";
    case TOO_LARGE: return "cudaErrorCooperativeLaunchTooLarge";
    default: return "unrecognized error code";
  }
}

const char *error_text(int code) { return code ? failure_text.c_str() : "no error"; }

}  // namespace dspa

int64_t dspa_emulated_launches() { return dspa::emulated::launches; }

void dspa_emulated_partition(int blocks) { dspa::emulated::partition = blocks; }

void dspa_emulated_write_ahead(void *to, const void *from, int64_t bytes) {
  dspa::emulated::write_ahead = {to, from, bytes};
}
