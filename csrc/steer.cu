// `steer` over the encoder itself.
#include "steer.cuh"

namespace dspa {

int launch_plain(const Arguments &a, const Device &device, void *stream) {
  return a.dtype == DSPA_BF16 ? launch_steer<Mma<bf16, bf16>>(a, device, stream)
                              : launch_steer<Mma<fp16, fp16>>(a, device, stream);
}

}  // namespace dspa
