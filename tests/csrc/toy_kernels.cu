// Small kernels, correct and faulty, with which test_emulated.py tests csrc/emulated.
#include "primitives.cuh"

namespace dspa {

namespace {

template <auto KERNEL, class A> int start(const A &arguments, int blocks, int threads, int shared) {
  return launch_cooperative<KERNEL>(arguments, Device{blocks, shared, 90}, blocks, threads, shared, nullptr, false);
}

// Column sums of a matrix: by shuffles within a warp, through shared memory within a block.
enum SumBug { SUM_RIGHT, NO_WARP_BARRIER, NO_BARRIER_BEFORE_READING, NO_BARRIER_BEFORE_WRITING };

struct SumArguments {
  const float *x;  // [n_rows, n]
  float *sums;     // [n_blocks, n]
  int n_rows, n, bug;
};

__device__ float sum_of_warp(float mine, bool barrier) {
  float *half = reinterpret_cast<float *>(shared_memory()) + 32 + 16 * warp();
  if (lane() >= 16) half[lane() - 16] = mine;
  if (barrier) warp_barrier();
  if (lane() < 16) mine += half[lane()];
#pragma unroll
  for (int mask = 8; mask; mask /= 2) mine += shuffle_xor(mine, mask);
  return shuffle(mine, 0);
}

__device__ float sum_of_block(float mine, int bug) {
  float *partial = reinterpret_cast<float *>(shared_memory());
  const float ours = sum_of_warp(mine, bug != NO_WARP_BARRIER);
  if (lane() == 0) partial[warp()] = ours;
  if (bug != NO_BARRIER_BEFORE_READING) named_barrier(1, n_threads());
  float all = 0;
  for (int w = 0; w < n_threads() / 32; ++w) all += partial[w];
  if (bug != NO_BARRIER_BEFORE_WRITING) named_barrier(2, n_threads());
  return popcount(ballot(shuffle(all, 31) == all)) == 32 ? all : NAN;
}

__global__ void __launch_bounds__(1024) sum(SumArguments p) {
  for (int column = 0; column < p.n; ++column) {
    float mine = 0;
    for (int i = block() * n_threads() + thread(); i < p.n_rows; i += n_blocks() * n_threads())
      mine += p.x[i * p.n + column];
    const float all = sum_of_block(mine, p.bug);
    if (thread() == n_threads() - 1) p.sums[block() * p.n + column] = all;
  }
}

// Column sums of a matrix: a producer warp copies rows into a ring of stages, four consumer warps add them up.
enum RingBug { RING_RIGHT, NO_WAIT_FOR_FULL, NO_WAIT_FOR_EMPTY, ARRIVE_EARLY, FORGETS_A_ROW, NO_FIRST_PARITY };

constexpr int STAGES = 3, ROWS = 8, CONSUMERS = 4;

struct RingArguments {
  const float *x;  // [n_rows, width]
  float *sums;     // [n_blocks, width]
  int n_rows, width, bug;
};

struct Ring {
  Mbarrier full[STAGES], empty[STAGES];
};

__device__ void fill_ring(const RingArguments &p, Ring *ring, char *stages) {
  const int bytes = p.width * 4;
  for (int i = 0, first = block() * ROWS; first < p.n_rows; ++i, first += n_blocks() * ROWS) {
    const int stage = i % STAGES, n = p.n_rows - first < ROWS ? p.n_rows - first : ROWS;
    const int parity = i / STAGES % 2 ^ (p.bug == NO_FIRST_PARITY ? 0 : 1);
    if (p.bug != NO_WAIT_FOR_EMPTY) mbarrier_wait(&ring->empty[stage], parity);
    if (lane() == 0) mbarrier_expect_tx(&ring->full[stage], n * bytes);
    warp_barrier();
    async_copy_rows(stages + stage * ROWS * bytes, bytes,
                          reinterpret_cast<const char *>(p.x) + int64_t(first) * bytes, bytes,
                          p.bug == FORGETS_A_ROW ? n - 1 : n, bytes, &ring->full[stage]);
    mbarrier_arrive_on_copies(&ring->full[stage]);
  }
}

__device__ void drain_ring(const RingArguments &p, Ring *ring, char *stages) {
  float *sums = p.sums + block() * p.width;
  for (int i = 0, first = block() * ROWS; first < p.n_rows; ++i, first += n_blocks() * ROWS) {
    const int stage = i % STAGES, n = p.n_rows - first < ROWS ? p.n_rows - first : ROWS;
    const float *rows = reinterpret_cast<float *>(stages + stage * ROWS * p.width * 4);
    if (p.bug != NO_WAIT_FOR_FULL) mbarrier_wait(&ring->full[stage], i / STAGES % 2);
    if (p.bug == ARRIVE_EARLY) mbarrier_arrive(&ring->empty[stage]);
    for (int c = thread(); c < p.width; c += 32 * CONSUMERS)
      for (int r = 0; r < n; ++r) sums[c] += rows[r * p.width + c];
    if (p.bug != ARRIVE_EARLY) mbarrier_arrive(&ring->empty[stage]);
  }
}

__global__ void add_rows(RingArguments p) {
  Ring *ring = reinterpret_cast<Ring *>(shared_memory());
  char *stages = shared_memory() + 128;
  if (thread() == 0)
    for (int i = 0; i < STAGES; ++i) mbarrier_init(&ring->full[i], 32), mbarrier_init(&ring->empty[i], 32 * CONSUMERS);
  block_barrier();
  if (warp() == CONSUMERS)
    fill_ring(p, ring, stages);
  else
    drain_ring(p, ring, stages);
  block_barrier();
}

// c [16, 8] = a [16, depth] b [8, depth], by one warp.
template <class T> struct ProductArguments {
  const T *a, *b;
  float *c;
  int depth;  // a multiple of 32
};

template <class T> __global__ void multiply(ProductArguments<T> p) {
  const int stride = p.depth + 8;
  T *a = reinterpret_cast<T *>(shared_memory()), *b = a + 16 * stride;
  for (int i = lane(); i < 16 * p.depth; i += 32) a[i / p.depth * stride + i % p.depth] = p.a[i];
  for (int i = lane(); i < 8 * p.depth; i += 32) b[i / p.depth * stride + i % p.depth] = p.b[i];
  warp_barrier();
  float acc[4] = {};
  for (int k = 0; k < p.depth; k += 32) {
    uint32_t a0[4], a1[4], b01[4];
    ldmatrix(a0, a + lane() % 16 * stride + k + lane() / 16 * 8);
    ldmatrix(a1, a + lane() % 16 * stride + k + 16 + lane() / 16 * 8);
    ldmatrix(b01, b + lane() % 8 * stride + k + lane() / 8 * 8);
    mma_16x8x16<T>(acc, a0, b01[0], b01[1]);
    mma_16x8x16<T>(acc, a1, b01[2], b01[3]);
  }
  for (int i = 0; i < 4; ++i) p.c[(lane() / 4 + i / 2 * 8) * 8 + lane() % 4 * 2 + i % 2] = acc[i];
}

// Rounds of a grid barrier: each block adds up what all blocks wrote in the previous round.
struct RoundsArguments {
  int *word, *values;  // values [rounds, n_blocks], the first round given
  int rounds;
  bool wait;
};

__device__ void grid_barrier(int *word, bool wait) {
  block_barrier();
  if (thread() == 0) {
    const int token = atomic_add_release(word, block() == 0 ? int(0x80000000u - unsigned(n_blocks() - 1)) : 1);
    if (wait) wait_for_sign_flip(word, token);
  }
  block_barrier();
}

__global__ void add_in_rounds(RoundsArguments p) {
  for (int i = 1; i < p.rounds; ++i) {
    if (thread() < n_blocks())
      atomic_add(&p.values[i * n_blocks() + block()], p.values[(i - 1) * n_blocks() + thread()]);
    grid_barrier(p.word, p.wait);
  }
}

// Kernels with one mistake each.
enum Mistake {
  COPY_OUT_OF_RANGE,
  COPY_MISALIGNED,
  COPY_NEVER_AWAITED,
  WRITE_UNDER_COPY,
  COPIES_OVERLAP,
  COPY_BY_ONE_LANE,
  TOO_MANY_ARRIVALS,
  TOO_MANY_BYTES,
  TOO_FEW_BYTES,
  NO_MBARRIER,
  OVERWRITTEN_MBARRIER,
  OTHER_BARRIER_IN_BLOCK,
  OTHER_BARRIER_IN_WARP,
  OTHER_ID_IN_WARP,
  OTHER_COUNT,
  ONE_WARP_TOO_MANY,
  LANES_ENDED,
  WARP_ENDED,
  OTHER_OPERATION,
  MATRIX_OUT_OF_RANGE,
  LOAD_MISALIGNED,
  WRITE_BEYOND,
  WAIT_FOR_NOBODY,
  STACK_TOO_SMALL,
  PHASE_MISSED,
};

struct MistakeArguments {
  const char *from;  // 64 bytes
  char *out;
  int which;
};

constexpr int MISTAKE_SHARED = 1024;

__device__ void mistake_with_copies(int which, const char *from, char *out) {
  Mbarrier *bar = reinterpret_cast<Mbarrier *>(shared_memory());
  char *to = shared_memory() + 128;
  if (thread() == 0) mbarrier_init(bar, 1);
  block_barrier();
  if (warp()) return;
  if (which == COPY_OUT_OF_RANGE) to = shared_memory() + MISTAKE_SHARED - 8;
  if (which == COPY_MISALIGNED) ++from;
  if (which == COPY_BY_ONE_LANE && lane()) return;
  if (lane() == 0)
    mbarrier_expect_tx(bar, which == TOO_MANY_BYTES ? 8 : which == TOO_FEW_BYTES || which == COPIES_OVERLAP ? 32 : 16);
  if (lane() == 0 && which == OVERWRITTEN_MBARRIER) *bar = 0;
  warp_barrier();
  async_copy_rows(to, 0, from, 0, 1, 16, bar);
  if (which == COPIES_OVERLAP) async_copy_rows(to, 0, from + 16, 0, 1, 16, bar);
  warp_barrier();
  if (which == COPY_NEVER_AWAITED || lane()) return;
  if (which == WRITE_UNDER_COPY) to[3] = 0;
  mbarrier_arrive(bar);
  if (which == TOO_MANY_ARRIVALS) mbarrier_arrive(bar);
  mbarrier_wait(bar, 0);
  out[0] = to[0];
}

__device__ void miss_a_phase() {
  Mbarrier *bar = reinterpret_cast<Mbarrier *>(shared_memory());
  if (thread() == 0) mbarrier_init(bar, 1);
  block_barrier();
  if (warp() == 1) mbarrier_wait(bar, 0);
  if (thread() == 0)
    for (int i = 0; i < 64; ++i) mbarrier_arrive(bar);
}

__device__ void mistake_at_barriers(int which) {
  switch (which) {
    case OTHER_BARRIER_IN_BLOCK: return warp() ? block_barrier() : named_barrier(1, 64);
    case OTHER_BARRIER_IN_WARP: return lane() ? block_barrier() : named_barrier(1, 64);
    case OTHER_ID_IN_WARP: return named_barrier(lane() ? 1 : 2, 32);
    case OTHER_COUNT: return named_barrier(1, warp() ? 64 : 96);
    case ONE_WARP_TOO_MANY: return warp() < 3 ? named_barrier(1, 64) : (void)0;
    case LANES_ENDED: return lane() < 7 ? warp_barrier() : (void)0;
    case WARP_ENDED: return warp() ? block_barrier() : (void)0;
    case OTHER_OPERATION: return lane() < 7 ? warp_barrier() : (void)ballot(true);
  }
}

__device__ int recurse(volatile int *p, int depth) {
  volatile char buffer[1024];
  buffer[depth % 1024] = char(*p);
  if (!depth) warp_barrier();
  return depth ? recurse(p, depth - 1) + buffer[depth % 1024] : 0;
}

__device__ void mistake_with_memory(int which, const char *from, char *out) {
  uint32_t r[4] = {};
  Mbarrier *bar = reinterpret_cast<Mbarrier *>(shared_memory());
  switch (which) {
    case NO_MBARRIER: return mbarrier_wait(bar, 0);
    case MATRIX_OUT_OF_RANGE: ldmatrix(r, shared_memory() + (thread() + 40) * 16); break;
    case LOAD_MISALIGNED: r[0] = load16(from + 8).x; break;
    case WRITE_BEYOND: shared_memory()[MISTAKE_SHARED] = 0; break;
    case STACK_TOO_SMALL: r[0] = recurse(reinterpret_cast<int *>(out), 205); break;
    case WAIT_FOR_NOBODY:
      if (thread() == 5) mbarrier_init(bar, 3), mbarrier_arrive(bar), mbarrier_wait(bar, 0);
  }
  out[0] = char(r[0]);
}

__global__ void mistake(MistakeArguments p) {
  if (p.which <= OVERWRITTEN_MBARRIER && p.which != NO_MBARRIER) return mistake_with_copies(p.which, p.from, p.out);
  if (p.which == PHASE_MISSED) return miss_a_phase();
  mistake_at_barriers(p.which);
  mistake_with_memory(p.which, p.from, p.out);
}

// Conversion to 16 bits and back.
struct RoundArguments {
  const float *x;
  bf16 *to_bf16;
  fp16 *to_fp16;
  float *from_bf16, *from_fp16;
  int n;
};

__global__ void round_all(RoundArguments p) {
  for (int i = thread(); i < p.n; i += n_threads()) {
    p.to_bf16[i] = rounded<bf16>(p.x[i]);
    p.to_fp16[i] = rounded<fp16>(p.x[i]);
    p.from_bf16[i] = to_float(p.to_bf16[i]);
    p.from_fp16[i] = to_float(p.to_fp16[i]);
  }
}

}  // namespace

DSPA_EXPORT int toy_sum(SumArguments p, int blocks, int threads) {
  return start<sum>(p, blocks, threads, (32 + threads / 2) * 4);
}

DSPA_EXPORT int toy_add_rows(RingArguments p, int blocks) {
  const int shared = 128 + STAGES * ROWS * p.width * 4;
  return start<add_rows>(p, blocks, 32 * (CONSUMERS + 1), shared);
}

DSPA_EXPORT int toy_multiply_bf16(ProductArguments<bf16> p) {
  return start<multiply<bf16>>(p, 1, 32, 24 * (p.depth + 8) * 2);
}

DSPA_EXPORT int toy_multiply_fp16(ProductArguments<fp16> p) {
  return start<multiply<fp16>>(p, 1, 32, 24 * (p.depth + 8) * 2);
}

DSPA_EXPORT int toy_add_in_rounds(RoundsArguments p, int blocks) {
  return start<add_in_rounds>(p, blocks, 64, 0);
}

DSPA_EXPORT int toy_mistake(MistakeArguments p) {
  return start<mistake>(p, 1, 96, MISTAKE_SHARED);
}

DSPA_EXPORT int toy_round(RoundArguments p) { return start<round_all>(p, 1, 32, 0); }

DSPA_EXPORT const char *toy_error_name(int code) { return error_name(code); }
DSPA_EXPORT const char *toy_error_text(int code) { return error_text(code); }

}  // namespace dspa
