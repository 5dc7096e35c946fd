// Definitions of the functions in c_api.h.
#include "c_api.h"

#include <initializer_list>

#include "steer.cuh"

namespace {

using namespace dspa;

constexpr int MIN_CAPABILITY = 80;
// Far above any model, and far below what would overflow the index arithmetic.
constexpr int MAX_D_IN = 1 << 20, MAX_D_SAE = 1 << 28;

int check(const Arguments &a) {
  const int sizes[] = {a.n_prompts, a.n_columns, a.n_slots, a.n_large, a.k, a.n_rows};
  for (int size : sizes)
    if (size < 0) return DSPA_BAD_SIZE;
  if (a.d_in < 1 || a.d_in > MAX_D_IN || a.d_sae < 1 || a.d_sae > MAX_D_SAE) return DSPA_BAD_SIZE;
  if (a.n_large > a.d_sae || a.k > a.d_sae) return DSPA_BAD_SIZE;
  if (a.counts && (a.d_sae_in < 1 || a.k_prompt < 1 || a.k_prompt > a.d_sae_in || a.k_diff < 1)) return DSPA_BAD_SIZE;
  if (a.counts && int64_t(a.k_diff) * ((a.augment != 0) + (a.ablate != 0)) != a.n_slots) return DSPA_BAD_SIZE;
  // Tasks of all rows are counted in 32 bits, and loops step past the last.
  if (a.n_rows * (int64_t(1) + a.n_slots + a.n_large) > 1 << 30) return DSPA_BAD_SIZE;
  if (int64_t(a.n_rows) * ceil_div(a.d_in, 32 * COLUMNS_PER_THREAD) > 1 << 30) return DSPA_BAD_SIZE;
  if (a.normalize < DSPA_NONE || a.normalize > DSPA_CONSTANT_NORM_RESCALE) return DSPA_BAD_SIZE;
  for (int dtype : {a.h_dtype, a.W_dtype})
    if (dtype != DSPA_FP32 && dtype != DSPA_BF16 && dtype != DSPA_FP16) return DSPA_BAD_DTYPE;
  return 0;
}

}  // namespace

DSPA_EXPORT int dspa_steer(const dspa_steer_arguments *arguments, void *stream) {
  if (!arguments) return DSPA_BAD_SIZE;
  Arguments a = *arguments;
  if (int error = check(a)) return error;
  Device device;
  if (int error = current_device(&device)) return error;
  if (device.capability < MIN_CAPABILITY) return DSPA_OLD_DEVICE;
  if (!is_native(a) && !dspa_steer_x_rows(&a)) a.x = static_cast<float *>(const_cast<void *>(a.h));
  return a.screen_rows ? launch_int8(a, device, stream) : launch_plain(a, device, stream);
}

DSPA_EXPORT int dspa_steer_arguments_size(void) { return sizeof(dspa_steer_arguments); }

DSPA_EXPORT int dspa_steer_x_rows(const dspa_steer_arguments *a) {
  const bool no_conversion = is_native(*a) || (a->h_dtype == DSPA_FP32 && a->normalize == DSPA_NONE);
  return no_conversion ? 0 : a->n_rows;
}

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
    case DSPA_BAD_SIZE: return "a size is negative or does not fit the others";
    case DSPA_BAD_DTYPE: return "a dtype is not fp32, bf16 or fp16";
    case DSPA_OLD_DEVICE: return "the device is older than compute capability 8.0";
    case DSPA_NO_SHARED_MEMORY: return "the pipeline does not fit into shared memory";
    default: return error_text(code);
  }
}
