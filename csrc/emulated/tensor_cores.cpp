// Tensor cores: ldmatrix.x4 and mma.m16n8k16 with the fragment layouts of the PTX ISA.
#include "runtime.h"

namespace dspa {

namespace emulated {

namespace {

struct Load {
  const char *row;
  uint32_t *r;
};

bool load_all(void *const *parts) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const char *row = static_cast<const Load *>(parts[8 * i + lane / 4])->row;
      memcpy(&static_cast<const Load *>(parts[lane])->r[i], row + 4 * (lane % 4), 4);
    }
  return true;
}

struct Multiply {
  float *acc;
  const uint32_t *a;
  uint32_t b0, b1;
};

template <class T> float half_of(uint32_t pair, int i) {
  const uint16_t bits = pair >> 16 * i;
  T x;
  memcpy(&x, &bits, sizeof x);
  return to_float(x);
}

// Eight columns at once, which is fast even without auto-vectorisation.
typedef float Row __attribute__((vector_size(32)));

template <class T> bool multiply_all(void *const *parts) {
  float a[16][16];
  Row b[16], acc[16];
  for (int lane = 0; lane < 32; ++lane) {
    const Multiply &part = *static_cast<const Multiply *>(parts[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      a[group][pair + i] = half_of<T>(part.a[0], i);
      a[group + 8][pair + i] = half_of<T>(part.a[1], i);
      a[group][pair + 8 + i] = half_of<T>(part.a[2], i);
      a[group + 8][pair + 8 + i] = half_of<T>(part.a[3], i);
      b[pair + i][group] = half_of<T>(part.b0, i);
      b[pair + 8 + i][group] = half_of<T>(part.b1, i);
      acc[group][pair + i] = part.acc[i];
      acc[group + 8][pair + i] = part.acc[2 + i];
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k) acc[row] += a[row][k] * b[k];
  for (int lane = 0; lane < 32; ++lane) {
    const Multiply &part = *static_cast<const Multiply *>(parts[lane]);
    for (int i = 0; i < 4; ++i) part.acc[i] = acc[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
  return true;
}

}  // namespace

}  // namespace emulated

using namespace emulated;

void ldmatrix(uint32_t (&r)[4], const void *row) {
  static constexpr Collective collective = {"ldmatrix", load_all};
  check_shared("ldmatrix", *self().warp->block, row, 16, 16);
  Load load = {static_cast<const char *>(row), r};
  run_collective(collective, &load);
}

template <class T> void mma_16x8x16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static constexpr Collective collective = {"mma_16x8x16", multiply_all<T>};
  Multiply multiply = {acc, a, b0, b1};
  run_collective(collective, &multiply);
}
template void mma_16x8x16<bf16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);
template void mma_16x8x16<fp16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);

}  // namespace dspa
