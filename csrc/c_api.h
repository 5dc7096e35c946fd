/* The library's C interface: device pointers, sizes, a stream, error codes. It uses no torch, no C++, no Python.
 *
 * Functions return 0 or an error code for dspa_error_name and dspa_error_text. Nothing is allocated and nothing waits
 * for the device, so launches can be captured into a graph. Tensors are contiguous and shapes are [rows, columns].
 * A pointer that a call does not need is null. Addresses and indices are not checked. */
#ifndef DSPA_C_API_H
#define DSPA_C_API_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum dspa_dtype { DSPA_FP32 = 0, DSPA_BF16 = 1, DSPA_FP16 = 2 };
enum dspa_normalize { DSPA_NONE = 0, DSPA_LAYER_NORM = 1, DSPA_CONSTANT_NORM_RESCALE = 2 };

/* The library's own codes, in addition to those of CUDA. */
enum dspa_error {
  DSPA_BAD_SIZE = 10001,
  DSPA_BAD_DTYPE = 10002,
  DSPA_OLD_DEVICE = 10003,
  DSPA_NO_SHARED_MEMORY = 10004
};

/* Arguments of `steer` and, with counts, of `lookup_and_steer`. */
typedef struct {
  /* residual rows [n_rows, d_in] in h_dtype, input and output */
  const void *h;
  void *out;
  /* the encoder's rows [d_sae, d_in] in W_dtype, in the order in which they are read; for top-k the latent of each */
  const void *encoder_rows;
  const float *b_enc;
  const float *threshold;
  const int32_t *order;
  /* the int8 screen: rows [d_sae, d_in]; per row scale, offset, error and norm [4, d_sae]; the mean row [d_in] */
  const int8_t *screen_rows;
  const float *screen_latents;
  const float *screen_mean;
  /* the latents that can be steered, with rows [n_columns, d_in] in W_dtype */
  const int32_t *columns;
  const void *columns_encoder_rows;
  const float *columns_b_enc;
  const float *columns_threshold;
  const void *columns_W_dec;
  /* plans [n_prompts, n_slots]; an output of the lookup if there are counts */
  int32_t *slots;
  int8_t *signs;
  /* the plan row of each residual row [n_rows]; steered from positions [n_rows] >= start [n_prompts] on */
  const int32_t *rows;
  const int64_t *positions;
  const int64_t *start;
  /* six counters that are added to */
  int64_t *paths;
  /* the edits, if recorded: values [n_rows, n_slots] before and after, the maximum [n_rows] */
  float *before;
  float *after;
  float *maximum;
  /* scratch: normalised rows in fp32 [dspa_steer_x_rows, d_in]; their scale [n_rows]; norms [n_rows, 2] with a screen;
   * values of the selected and the large latents [n_rows, n_slots + n_large]; finite [n_rows]; bits of the running
   * maximum [n_rows]; for top-k the number of latents ahead of each selected one [n_rows, n_slots] */
  float *x;
  float *scale;
  float *norms;
  float *latent_values;
  int32_t *finite;
  int32_t *running_max;
  int32_t *rank;
  /* the word of the grid barrier: 0 before and after, and not shared with a concurrent launch */
  int32_t *barrier;
  /* the lookup: counts [n_prompts, d_sae_in], the map [d_sae_in, n_columns], scratch
   * [n_prompts, 2 k_prompt + k_diff + n_columns] */
  const int32_t *counts;
  const float *values;
  int32_t *lookup_scratch;
  int32_t d_in, d_sae, d_sae_in, n_rows, n_prompts, n_columns, n_slots, n_large;
  int32_t k, k_prompt, k_diff;
  int32_t h_dtype, W_dtype, normalize;
  int32_t augment, ablate, record;
  /* programmatic stream serialization: may begin before the previous launch on the stream has ended */
  int32_t programmatic;
  /* prefetches the first encoder rows before it is known whether any row needs them */
  int32_t ahead;
  float alpha;
} dspa_steer_arguments;

/* Apply the edits of DSPA to residual rows, in one launch. `stream` is a cudaStream_t. */
int dspa_steer(const dspa_steer_arguments *arguments, void *stream);

/* sizeof(dspa_steer_arguments), to check declarations in other languages. */
int dspa_steer_arguments_size(void);

/* Number of fp32 rows that `x` has to hold: n_rows or 0. */
int dspa_steer_x_rows(const dspa_steer_arguments *arguments);

const char *dspa_error_name(int code);
const char *dspa_error_text(int code);

#ifdef __cplusplus
}
#endif

#endif
