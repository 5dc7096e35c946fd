// `steer` over the encoder itself.
#include "steer.cuh"

namespace dspa {

int launch_plain(const Arguments &a, const Device &device, void *stream) {
  switch (a.W_dtype) {
    case DSPA_BF16:
      return is_native(a) ? launch_native<bf16, bf16>(a, device, stream) : launch_full<bf16, bf16>(a, device, stream);
    case DSPA_FP16:
      return is_native(a) ? launch_native<fp16, fp16>(a, device, stream) : launch_full<fp16, fp16>(a, device, stream);
    default:
      return launch_full<float, float>(a, device, stream);
  }
}

}  // namespace dspa
