// Definitions of the functions in c_api.h.
#include "c_api.h"

#include "steer.cuh"

namespace {

using namespace dspa;

constexpr int MIN_CAPABILITY = 80;
// Far above any model, and far below what would overflow the index arithmetic.
constexpr int MAX_D_IN = 1 << 20, MAX_D_SAE = 1 << 28;

int check(const Arguments &a) {
  const int sizes[] = {a.n_columns, a.n_slots, a.n_large, a.k};
  for (int size : sizes)
    if (size < 0) return DSPA_BAD_SIZE;
  if (a.n_rows < 1 || a.n_rows > MAX_ROWS) return DSPA_BAD_SIZE;
  if (a.d_in < 1 || a.d_in > MAX_D_IN || a.d_sae < 1 || a.d_sae > MAX_D_SAE) return DSPA_BAD_SIZE;
  if (a.n_large > a.d_sae || a.k > a.d_sae || a.n_slots > MAX_D_SAE / MAX_ROWS) return DSPA_BAD_SIZE;
  return a.dtype == DSPA_BF16 || a.dtype == DSPA_FP16 ? 0 : DSPA_BAD_DTYPE;
}

}  // namespace

DSPA_EXPORT int dspa_steer(const dspa_steer_arguments *arguments, void *stream) {
  if (!arguments) return DSPA_BAD_SIZE;
  const Arguments &a = *arguments;
  if (int error = check(a)) return error;
  Device device;
  if (int error = current_device(&device)) return error;
  if (device.capability < MIN_CAPABILITY) return DSPA_OLD_DEVICE;
  return a.screen_rows ? launch_int5(a, device, stream) : launch_plain(a, device, stream);
}

DSPA_EXPORT int dspa_steer_arguments_size(void) { return sizeof(dspa_steer_arguments); }

DSPA_EXPORT const char *dspa_error_name(int code) {
  switch (code) {
    case DSPA_BAD_SIZE: return "DSPA_BAD_SIZE";
    case DSPA_BAD_DTYPE: return "DSPA_BAD_DTYPE";
    case DSPA_OLD_DEVICE: return "DSPA_OLD_DEVICE";
    case DSPA_NO_SHARED_MEMORY: return "DSPA_NO_SHARED_MEMORY";
    default: return error_name(code);
  }
}

DSPA_EXPORT const char *dspa_error_text(int code) {
  switch (code) {
    case DSPA_BAD_SIZE: return "a size is out of range or does not fit the others";
    case DSPA_BAD_DTYPE: return "the dtype is neither bf16 nor fp16";
    case DSPA_OLD_DEVICE: return "the device is older than compute capability 8.0";
    case DSPA_NO_SHARED_MEMORY: return "rows of this width do not fit into the shared memory of this device";
    default: return error_text(code);
  }
}

DSPA_EXPORT int dspa_driver_version(void) { return driver_version(); }

DSPA_EXPORT int dspa_runtime_version(void) { return runtime_version(); }
