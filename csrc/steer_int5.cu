// `steer` screened by an int5 copy of the encoder.
#include "steer.cuh"

namespace dspa {

int launch_int5(const Arguments &a, const Device &device, void *stream) {
  return launch_dtype<true>(a, device, stream);
}

}  // namespace dspa
