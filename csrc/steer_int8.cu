// `steer` over an int8 copy of the encoder, and of the encoder only the rows that could hold a maximum:
//
//   h W + b <= s (h Q) + [b + <mu, r>] + ||h - mu|| ||r|| + g ||h|| (||W|| + s ||Q||),    r = W - s Q
//
// where g covers what both sums of products can lose.
#include "steer.cuh"

namespace dspa {

int launch_int8(const Arguments &a, const Device &device, void *stream) {
  switch (a.W_dtype) {
    case DSPA_BF16:
      return is_native(a) ? launch_native<bf16, int8_t>(a, device, stream)
                          : launch_full<bf16, int8_t>(a, device, stream);
    case DSPA_FP16:
      return is_native(a) ? launch_native<fp16, int8_t>(a, device, stream)
                          : launch_full<fp16, int8_t>(a, device, stream);
    default:
      return launch_full<float, int8_t>(a, device, stream);
  }
}

}  // namespace dspa
