// The functions of device/primitives.cuh on the CPU, so that kernels can be tested without a GPU. Threads of a launch
// run in an adverse order that is random but repeatable. Whatever a GPU leaves undefined is an error or NaN here.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ __inline__
#define __launch_bounds__(...)
#define DSPA_EXPORT extern "C" __attribute__((visibility("default")))

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace dspa {

// Numbers

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return float_of_bits(uint32_t(x.bits) << 16); }
inline float to_float(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff) << 13;
  if (magnitude >= 0x7c00 << 13) return float_of_bits(sign | magnitude | 0x7f800000);
  return float_of_bits(sign | bits_of_float(float_of_bits(magnitude) * 0x1p112f));
}
template <class T> T rounded(float x);
template <> inline float rounded<float>(float x) { return x; }
template <> inline bf16 rounded<bf16>(float x) {
  if (x != x) return {0x7fff};
  const uint32_t bits = bits_of_float(x);
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <> inline fp16 rounded<fp16>(float x) {
  if (x != x) return {0x7fff};
  const uint32_t sign = bits_of_float(x) >> 16 & 0x8000, magnitude = bits_of_float(x) & 0x7fffffff;
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  // Below 2^-14 the spacing of fp16 is that of fp32 at 0.5.
  if (magnitude < 0x38800000) return {uint16_t(sign | (bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000))};
  return {uint16_t(sign | (((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10)))};
}

inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t y) { return (x & mask) | y; }
// Two numbers in a word minus two others.
template <class T> uint32_t subtract_pair(uint32_t x, uint32_t y) {
  const auto half = [](uint32_t word, int i) {
    T number;
    number.bits = uint16_t(word >> 16 * i);
    return to_float(number);
  };
  const T low = rounded<T>(half(x, 0) - half(y, 0)), high = rounded<T>(half(x, 1) - half(y, 1));
  return low.bits | uint32_t(high.bits) << 16;
}

// What the functions below need of the runtime.
namespace emulated {

struct ThreadIndex {
  int thread, n_threads, block, n_blocks;
  char *shared;
};
// The thread that runs now, null in the scheduler.
extern const ThreadIndex *running;

// Ends the launch with this message.
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

// An operation of a whole warp. Each lane passes a part on its stack. The last lane to arrive completes the operation
// for all; `complete` returns true if the lanes continue at once.
struct Collective {
  const char *name;
  bool (*complete)(void *const *parts);
};
void run_collective(const Collective &collective, void *part);

// True in one random lane of the warp.
bool elect_one();

// Blocks this thread until the sign of *p differs from that of `token`.
void wait_for_sign_flip(const int *p, int token);

// Copies one row asynchronously.
void copy(char *to, const char *from, int bytes, uint64_t *bar);

// Called after every effect that other threads can see: now and then they run before this one continues.
extern int steps_until_yield;
void yield_thread();
inline void maybe_yield() {
  if (--steps_until_yield < 0) yield_thread();
}

inline uint4 load16(const void *p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) fail("load of 16 bytes at %p, which is not aligned to 16", p);
  return *static_cast<const uint4 *>(p);
}

// Blocks this thread until the launch ahead has ended.
void wait_for_launch_ahead();

int launch(void (*kernel)(const void *call), const void *call, int blocks, int threads, int shared, bool programmatic);

}  // namespace emulated

// Threads

inline int thread() { return emulated::running->thread; }
inline int n_threads() { return emulated::running->n_threads; }
inline int block() { return emulated::running->block; }
inline int n_blocks() { return emulated::running->n_blocks; }
inline int lane() { return thread() % 32; }
inline int warp() { return thread() / 32; }
inline char *shared_memory() { return emulated::running->shared; }

void block_barrier();
void named_barrier(int id, int count);
void warp_barrier();
template <class T> T shuffle(T value, int from) {
  static_assert(std::is_arithmetic<T>::value && sizeof(T) >= 4, "what __shfl_sync takes");
  struct Part {
    T value, result;
    int from;
  } part = {value, value, from};
  static constexpr emulated::Collective collective = {"shuffle", [](void *const *parts) {
    for (int i = 0; i < 32; ++i) {
      Part &to = *static_cast<Part *>(parts[i]);
      to.result = static_cast<Part *>(parts[to.from & 31])->value;
    }
    return true;
  }};
  emulated::run_collective(collective, &part);
  return part.result;
}
inline const char *shuffle(const char *p, int from) {
  return reinterpret_cast<const char *>(shuffle(reinterpret_cast<uintptr_t>(p), from));
}
template <class T> T shuffle_xor(T value, int mask) { return shuffle(value, lane() ^ mask); }
unsigned ballot(bool value);
inline int popcount(unsigned mask) { return __builtin_popcount(mask); }
inline uint32_t byte_perm(uint32_t x, uint32_t y, uint32_t which) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  uint32_t selected = 0;
  for (int i = 0; i < 4; ++i) selected |= uint32_t(bytes >> 8 * (which >> 4 * i & 7) & 0xff) << 8 * i;
  return selected;
}

// Memory

inline uint4 load16(const void *p) { return emulated::load16(p); }
inline int load_relaxed(const int *p) {
  const int value = *p;
  emulated::maybe_yield();
  return value;
}
inline void atomic_max(int *p, int value) {
  if (*p < value) *p = value;
  emulated::maybe_yield();
}
inline int atomic_add(int *p, int value) {
  const int before = *p;
  *p = int(unsigned(before) + unsigned(value));
  emulated::maybe_yield();
  return before;
}
inline void atomic_add(int64_t *p, int64_t value) {
  *p = int64_t(uint64_t(*p) + uint64_t(value));
  emulated::maybe_yield();
}
inline int atomic_add_release(int *p, int value) { return atomic_add(p, value); }
inline void wait_for_sign_flip(const int *p, int token) { emulated::wait_for_sign_flip(p, token); }
inline void prefetch_l2(const void *) {}
inline void wait_on_dependent_grids() { emulated::wait_for_launch_ahead(); }

// Asynchronous copies

using Mbarrier = uint64_t;

void mbarrier_init(Mbarrier *bar, int count);
inline void fence_mbarrier_init() {}
void mbarrier_arrive(Mbarrier *bar);
void mbarrier_wait(Mbarrier *bar, int parity);
void mbarrier_expect_tx(Mbarrier *bar, int bytes);
inline void async_copy_rows(char *to, int to_stride, const char *from, int64_t from_stride, int n, int bytes,
                            Mbarrier *bar) {
  if (!emulated::elect_one()) return;
  for (int i = 0; i < n; ++i) emulated::copy(to + i * to_stride, from + i * from_stride, bytes, bar);
}
inline void async_copy_gathered(char *to, int to_stride, const char *from, unsigned m_rows, int bytes, Mbarrier *bar) {
  const bool elected = emulated::elect_one();
  for (int i = 0; i < 32; ++i)
    if (const char *row = shuffle(from, i); elected && m_rows >> i & 1)
      emulated::copy(to + i * to_stride, row, bytes, bar);
}
inline void mbarrier_arrive_on_copies(Mbarrier *bar) { mbarrier_arrive(bar); }

// Tensor cores

void ldmatrix(uint32_t (&r)[4], const void *row);
template <class T> void mma_16x8x16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// Launches

struct Device {
  int multiprocessors, shared, capability;
};

int current_device(Device *properties);

constexpr int TOO_LARGE = 720;

template <auto KERNEL, class A>
int launch_cooperative(const A &arguments, const Device &, int blocks, int threads, int shared, void *,
                       bool programmatic) {
  const auto run = [](const void *arguments) { KERNEL(*static_cast<const A *>(arguments)); };
  return emulated::launch(run, &arguments, blocks, threads, shared, programmatic);
}

const char *error_name(int code);
const char *error_text(int code);

inline int driver_version() { return 0; }
inline int runtime_version() { return 0; }

}  // namespace dspa

// Bytes that asynchronous copies brought and number of launches, since the last reset. The order of a launch follows
// from DSPA_EMULATED_SEED and its number since the last reset.
DSPA_EXPORT int64_t dspa_emulated_bytes_copied();
DSPA_EXPORT int64_t dspa_emulated_launches();
DSPA_EXPORT void dspa_emulated_reset();
// Number of blocks that fit at one time, as in a partition of the device, of which the device itself shows nothing; 0
// is all of it.
DSPA_EXPORT void dspa_emulated_partition(int blocks);
// A write by the launch ahead. It ends before the next launch begins or, if that is programmatic, when nothing of it
// can go on without.
DSPA_EXPORT void dspa_emulated_write_ahead(void *to, const void *from, int64_t bytes);
