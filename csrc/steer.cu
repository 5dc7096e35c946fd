// `steer` over the encoder itself.
#include "steer.cuh"

namespace dspa {

int launch_plain(const Arguments &a, const Device &device, void *stream) {
  return launch_dtype<false>(a, device, stream);
}

}  // namespace dspa
