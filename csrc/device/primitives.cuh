// Functions that need GPU instructions: atomics, barriers, asynchronous copies, tensor cores, launches. The folder
// emulated/ has a header of the same name with the same functions for the CPU. Everything else in csrc/ uses only
// these.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#define DSPA_EXPORT extern "C" __attribute__((visibility("default")))

namespace dspa {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// Numbers

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(fp16 x) { return __half2float(x); }
// (x & mask) | y in one instruction, where the compiler makes two of two constants.
__device__ inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t y) {
  asm("lop3.b32 %0, %0, %1, %2, 0xea;" : "+r"(x) : "r"(mask), "r"(y));
  return x;
}
// Two numbers in a word minus two others.
template <class T> __device__ uint32_t subtract_pair(uint32_t x, uint32_t y);
template <> __device__ inline uint32_t subtract_pair<bf16>(uint32_t x, uint32_t y) {
  using Pair = __nv_bfloat162;
  const Pair difference = __hsub2(reinterpret_cast<Pair &>(x), reinterpret_cast<Pair &>(y));
  return reinterpret_cast<const uint32_t &>(difference);
}
template <> __device__ inline uint32_t subtract_pair<fp16>(uint32_t x, uint32_t y) {
  const __half2 difference = __hsub2(reinterpret_cast<__half2 &>(x), reinterpret_cast<__half2 &>(y));
  return reinterpret_cast<const uint32_t &>(difference);
}
// x rounded to T, to nearest, ties to even.
template <class T> __device__ T rounded(float x);
template <> __device__ inline float rounded<float>(float x) { return x; }
template <> __device__ inline bf16 rounded<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ inline fp16 rounded<fp16>(float x) { return __float2half_rn(x); }

// Threads

__device__ inline int thread() { return threadIdx.x; }
__device__ inline int n_threads() { return blockDim.x; }
__device__ inline int block() { return blockIdx.x; }
__device__ inline int n_blocks() { return gridDim.x; }
__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int warp() { return threadIdx.x / 32; }

extern __shared__ __align__(128) char dynamic_shared[];
__device__ inline char *shared_memory() { return dynamic_shared; }

__device__ inline void block_barrier() { __syncthreads(); }
// A barrier of `count` threads; ids are 1 to 15.
__device__ inline void named_barrier(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
__device__ inline void warp_barrier() { __syncwarp(); }
template <class T> __device__ T shuffle(T value, int from) { return __shfl_sync(~0u, value, from); }
__device__ inline const char *shuffle(const char *p, int from) {
  return reinterpret_cast<const char *>(shuffle(reinterpret_cast<uintptr_t>(p), from));
}
template <class T> __device__ T shuffle_xor(T value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
__device__ inline unsigned ballot(bool value) { return __ballot_sync(~0u, value); }
__device__ inline int popcount(unsigned mask) { return __popc(mask); }
// Four of the eight bytes of x and y, selected by the hexadecimal digits of `which`.
__device__ inline uint32_t byte_perm(uint32_t x, uint32_t y, uint32_t which) { return __byte_perm(x, y, which); }

// Memory

__device__ inline uint4 load16(const void *p) { return *static_cast<const uint4 *>(p); }
// Loads a word that other blocks may be writing, past the L1 cache.
__device__ inline int load_relaxed(const int *p) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
__device__ inline void atomic_max(int *p, int value) { atomicMax(p, value); }
// Returns the old value.
__device__ inline int atomic_add(int *p, int value) { return atomicAdd(p, value); }
__device__ inline void atomic_add(int64_t *p, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long *>(p), static_cast<unsigned long long>(value));
}
// Adds and returns the old value. Releases what the block wrote before its last barrier to threads that acquire the
// sum.
__device__ inline int atomic_add_release(int *p, int value) {
  int before;
  asm volatile("atom.release.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(value) : "memory");
  return before;
}
// Waits until the sign of *p differs from that of `token`, and acquires what others wrote before they arrived.
__device__ inline void wait_for_sign_flip(const int *p, int token) {
  int value;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  } while ((value ^ token) >= 0);
}
__device__ inline void prefetch_l2(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Waits for the results of the previous launch on the stream, if this one was allowed to begin before it has ended.
__device__ inline void wait_on_dependent_grids() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Asynchronous copies into shared memory, whose completion an mbarrier tracks

using Mbarrier = uint64_t;

__device__ inline uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ inline void mbarrier_init(Mbarrier *bar, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}
// Makes initialised mbarriers visible to asynchronous copies, once the block has passed a barrier.
__device__ inline void fence_mbarrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ inline void mbarrier_arrive(Mbarrier *bar) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(bar)) : "memory");
}
// Waits until the phase of this parity has completed.
__device__ inline void mbarrier_wait(Mbarrier *bar, int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .pred done;\n"
               "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
               "@!done bra again; }" ::"r"(shared_address(bar)),
               "r"(parity)
               : "memory");
#else
  int done = 0;
  while (!done)
    asm volatile("{ .reg .pred done; mbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n"
                 "selp.b32 %0, 1, 0, done; }"
                 : "=r"(done)
                 : "r"(shared_address(bar)), "r"(parity)
                 : "memory");
#endif
}
// Adds to the bytes that the current phase waits for. One thread of a warp calls it before the warp copies.
__device__ inline void mbarrier_expect_tx(Mbarrier *bar, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
#endif
}
// The bulk copy of a row, by one thread. Weights are read once per launch, so they are the first to leave the L2 cache.
__device__ inline void bulk_copy(uint32_t to, uint64_t from, int bytes, uint32_t bar) {
#if __CUDA_ARCH__ >= 900
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
               "[%3], %4;" ::"r"(to),
               "l"(from), "r"(bytes), "r"(bar), "l"(policy)
               : "memory");
#endif
}
// True in one thread of a warp. With elect.sync the compiler knows that one thread issues the copies. Otherwise it
// compiles a loop over the warp.
__device__ inline bool elect_one() {
  uint32_t is_elected = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p; }" : "=r"(is_elected));
#endif
  return is_elected;
}
// The copy of a row by a warp, 16 bytes per thread.
__device__ inline void warp_copy(uint32_t to, uint64_t from, int bytes) {
  for (int o = 16 * lane(); o < bytes; o += 16 * 32)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + o), "l"(from + o) : "memory");
}
// Copies `n` rows of `bytes` each, by one warp. Sizes and addresses are multiples of 16.
__device__ inline void async_copy_rows(char *to, int to_stride, const char *from, int64_t from_stride, int n, int bytes,
                                       Mbarrier *bar) {
  const uint32_t shared = shared_address(to), shared_bar = shared_address(bar);
  const uint64_t global = __cvta_generic_to_global(from);
#if __CUDA_ARCH__ >= 900
  if (!elect_one()) return;
#pragma unroll 4
  for (int i = 0; i < n; i++) bulk_copy(shared + i * to_stride, global + i * from_stride, bytes, shared_bar);
#else
  for (int i = 0; i < n; i++) warp_copy(shared + i * to_stride, global + i * from_stride, bytes);
#endif
}
// Copies likewise the rows i in the bits `m_rows`, each from the address that thread i passes.
__device__ inline void async_copy_gathered(char *to, int to_stride, const char *from, unsigned m_rows, int bytes,
                                           Mbarrier *bar) {
  const uint32_t shared = shared_address(to), shared_bar = shared_address(bar);
  const bool is_elected = elect_one();
#pragma unroll 1
  for (unsigned left = m_rows; left; left &= left - 1) {
    const int i = __ffs(left) - 1;
    const uint64_t row = __cvta_generic_to_global(shuffle(from, i));
#if __CUDA_ARCH__ >= 900
    if (is_elected) bulk_copy(shared + i * to_stride, row, bytes, shared_bar);
#else
    warp_copy(shared + i * to_stride, row, bytes);
#endif
  }
}
// Each thread of the warp arrives: at once where the mbarrier counts bytes, else once its own copies have completed.
__device__ inline void mbarrier_arrive_on_copies(Mbarrier *bar) {
#if __CUDA_ARCH__ >= 900
  mbarrier_arrive(bar);
#else
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(bar)) : "memory");
#endif
}

// Tensor cores

// ldmatrix.x4: four 8 x 8 matrices of 16-bit numbers. Thread i passes the address of row i % 8 of matrix i / 8.
__device__ inline void ldmatrix(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// acc [16, 8] += a [16, 16] b [16, 8], accumulated in fp32.
template <class T>
__device__ inline void mma_16x8x16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void mma_16x8x16<bf16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma_16x8x16<fp16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Launches, on the host. Functions return 0 or a CUDA error code.

struct Device {
  int multiprocessors, shared, capability;  // shared: the most bytes per block
};

inline int current_device(Device *properties) {
  int device, major, minor;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&properties->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (!error) error = cudaDeviceGetAttribute(&properties->shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (!error) properties->capability = 10 * major + minor;
  return error;
}

constexpr int TOO_LARGE = cudaErrorCooperativeLaunchTooLarge;

// The PTX version of a kernel on the current device, after its first call there has set its attributes; negative: a
// CUDA error code. Launches from several host threads, and graphs, share the attribute, so it is always the device's
// limit.
template <auto KERNEL> int prepare_kernel(const Device &device) {
  constexpr int MAX_DEVICES = 64;
  static std::atomic<int> versions[MAX_DEVICES];
  int i_device;
  cudaError_t error = cudaGetDevice(&i_device);
  if (!error && i_device < MAX_DEVICES && versions[i_device]) return versions[i_device];
  cudaFuncAttributes compiled;
  if (!error) error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared);
  if (!error) error = cudaFuncGetAttributes(&compiled, KERNEL);
  if (error) return -error;
  if (i_device < MAX_DEVICES) versions[i_device] = compiled.ptxVersion;
  return compiled.ptxVersion;
}

// Launches blocks that are all resident at the same time, so that they can wait for each other. Returns TOO_LARGE if
// they do not fit.
template <auto KERNEL, class A>
int launch_cooperative(const A &arguments, const Device &device, int blocks, int threads, int shared, void *stream,
                       bool programmatic) {
  const int ptx_version = prepare_kernel<KERNEL>(device);
  if (ptx_version < 0) return -ptx_version;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  // Code for older devices has no instruction that waits for the previous launch.
  config.numAttrs = programmatic && device.capability >= 90 && ptx_version >= 90 ? 2 : 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, KERNEL, arguments);
  if (error) cudaGetLastError();  // or the next call that asks for it would report this error as its own
  return error;
}

inline const char *error_name(int code) { return cudaGetErrorName(static_cast<cudaError_t>(code)); }
inline const char *error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

inline int driver_version() {
  int version;
  return cudaDriverGetVersion(&version) ? 0 : version;
}
inline int runtime_version() { return CUDART_VERSION; }

}  // namespace dspa
