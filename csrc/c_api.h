/* The library as C sees it: device pointers, sizes, a stream, error codes. No torch, no C++, no Python.
 *
 * Functions return 0 or an error code for dspa_error_name and dspa_error_text. Nothing is allocated, nothing waits
 * for the device, so that a launch can be captured into a graph. Tensors are contiguous; shapes are given as
 * [rows, columns]; a pointer that a call does not need is null. No address and no index is checked. */
#ifndef DSPA_C_API_H
#define DSPA_C_API_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum dspa_dtype { DSPA_FP32 = 0, DSPA_BF16 = 1, DSPA_FP16 = 2 };
enum dspa_normalize { DSPA_NONE = 0, DSPA_LAYER_NORM = 1, DSPA_CONSTANT_NORM_RESCALE = 2 };

/* The library's own codes, beside those of CUDA. */
enum dspa_error { DSPA_BAD_SIZE = 10001, DSPA_BAD_DTYPE = 10002, DSPA_OLD_DEVICE = 10003, DSPA_NO_ROOM = 10004 };

/* Arguments of `steer`, and, with counts, of `lookup_and_steer`. */
typedef struct {
  /* residual rows [n_rows, d_in] in h_dtype, and where they go */
  const void *h;
  void *out;
  /* the encoder in the order in which it is read [d_sae, d_in] in W_dtype; which latent each row is, for top-k */
  const void *W_enc;
  const float *b_enc;
  const float *threshold;
  const int32_t *order;
  /* a screen: int8 rows [d_sae, d_in], scale, offset, error and size of each [4, d_sae], the mean row [d_in] */
  const int8_t *screen_W_enc;
  const float *screen_latents;
  const float *screen_mean;
  /* latents that can be steered, rows [n_columns, d_in] in W_dtype */
  const int32_t *columns;
  const void *columns_W_enc;
  const float *columns_b_enc;
  const float *columns_threshold;
  const void *columns_W_dec;
  /* plans [n_prompts, n_slots], written first where there are counts */
  int32_t *slots;
  int8_t *signs;
  /* which rows are steered, by which plan */
  const int32_t *rows;
  const int64_t *positions;
  const int64_t *start;
  /* six tallies, added to */
  int64_t *paths;
  /* what was edited, if recorded: [n_rows, n_slots] twice, [n_rows] */
  float *before;
  float *after;
  float *most;
  /* scratch: rows in fp32 [n_rows, d_in] unless they multiply as they are; [n_rows]; [n_rows, 2] with a screen;
   * [n_rows, n_slots + n_large]; [n_rows]; [n_rows]; [n_rows, n_slots] for top-k */
  float *x;
  float *scale;
  float *norms;
  float *value;
  int32_t *finite;
  int32_t *maximum;
  int32_t *beaten;
  /* a word that is 0 and that no other launch uses at the same time; it is left as it was found */
  int32_t *barrier;
  /* the lookup: counts [n_prompts, d_sae_in], the map [d_sae_in, n_columns], scratch
   * [n_prompts, 2 k_prompt + k_diff + n_columns] */
  const int32_t *counts;
  const float *values;
  int32_t *found;
  int32_t d_in, d_sae, d_sae_in, n_rows, n_prompts, n_columns, n_slots, n_large;
  int32_t k, k_prompt, k_diff;
  int32_t h_dtype, W_dtype, normalize;
  int32_t augment, ablate, record;
  /* may begin before the launch ahead of it on the stream has ended */
  int32_t programmatic;
  /* reads the first of the encoder before it is known whether a row needs it: sooner, and sometimes in vain */
  int32_t ahead;
  float alpha;
} dspa_steer_arguments;

/* Apply the edits of DSPA to residual rows, in one launch. `stream` is a cudaStream_t. */
int dspa_steer(const dspa_steer_arguments *arguments, void *stream);

/* Bytes of dspa_steer_arguments, for whoever declares it in another language. */
int dspa_steer_arguments_size(void);

/* Fp32 rows that `x` has to have room for: n_rows or 0. */
int dspa_steer_x_rows(const dspa_steer_arguments *arguments);

const char *dspa_error_name(int code);
const char *dspa_error_text(int code);

#ifdef __cplusplus
}
#endif

#endif
