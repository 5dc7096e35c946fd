// `steer` screened by an int8 copy Q of the encoder. Of the encoder itself only rows are read whose upper bound
//
//   h W + b <= s (h Q) + [b + <mu, r>] + ||h - mu|| ||r|| + g ||h|| (||W|| + s ||Q||),    r = W - s Q
//
// could raise a maximum. g covers the rounding errors of both sums of products.
#include "steer.cuh"

namespace dspa {

int launch_int8(const Arguments &a, const Device &device, void *stream) {
  return a.dtype == DSPA_BF16 ? launch_steer<Mma<bf16, int8_t>>(a, device, stream)
                              : launch_steer<Mma<fp16, int8_t>>(a, device, stream);
}

}  // namespace dspa
