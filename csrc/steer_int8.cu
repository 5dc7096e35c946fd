// `steer` over an int8 copy of the encoder, and of the encoder only the rows that could hold a maximum:
//
//   h W + b <= s (h Q) + [b + <mu, r>] + ||h - mu|| ||r|| + g ||h|| (||W|| + s ||Q||),    r = W - s Q
//
// where g covers what both sums of products can lose.
#include "steer.cuh"

namespace dspa {

int launch_int8(const Arguments &a, const Device &device, void *stream) {
  return launch_dtype<true>(a, device, stream);
}

}  // namespace dspa
