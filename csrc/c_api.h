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

enum dspa_dtype { DSPA_BF16 = 1, DSPA_FP16 = 2 };

/* The library's own codes, in addition to those of CUDA. */
enum dspa_error {
  DSPA_BAD_SIZE = 10001,
  DSPA_BAD_DTYPE = 10002,
  DSPA_OLD_DEVICE = 10003,
  DSPA_NO_SHARED_MEMORY = 10004
};

/* Arguments of `steer`. */
typedef struct {
  /* residual rows [n_rows, d_in], input and output, for 1 to 8 rows; rows and weights have the same `dtype`. `out` may
   * be `h`: then only the rows that change are written. With a `residual` [n_rows, d_in] it has to be: h + residual is
   * steered, and a row that changes becomes h' and its residual 0 */
  const void *h;
  void *residual;
  void *out;
  /* the encoder's rows [d_sae, d_in], in the order in which they are read; for top-k the latent of each */
  const void *encoder_rows;
  const float *b_enc;
  const float *threshold;
  const int32_t *order;
  /* the int5 screen: rows [d_sae, 160 ceil(d_in / 256)]; per row scale, offset, slack, error and size [5, d_sae]; the
   * mean row [d_in]; all aligned to 16 bytes */
  const uint8_t *screen_rows;
  const float *screen_latents;
  const float *screen_mean;
  /* the latents that can be steered, with rows [n_columns, d_in] */
  const int32_t *columns;
  const void *columns_encoder_rows;
  const float *columns_b_enc;
  const float *columns_threshold;
  const void *columns_W_dec;
  /* plans [n_prompts, n_slots] */
  const int32_t *slots;
  const int8_t *signs;
  /* the plan row of each residual row [n_rows]; steered from positions [n_rows] >= start [n_prompts] on */
  const int32_t *rows;
  const int64_t *positions;
  const int64_t *start;
  /* null, or the strength of each plan [n_prompts], in place of `alpha` */
  const float *alphas;
  /* six counters that are added to */
  int64_t *paths;
  /* the edits, if recorded: values [n_rows, n_slots] before and after, the maximum [n_rows] */
  float *before;
  float *after;
  float *maximum;
  /* scratch: values of the selected latents [n_rows, n_slots]; summaries of selected and large latents
   * [n_rows, ceil(n_slots / 16) + ceil(n_large / 16), 3]; bits of the running maximum [n_rows]; for top-k the number of
   * latents ahead of each selected one [n_rows, n_slots] */
  float *slot_values;
  float *summaries;
  int32_t *running_max;
  int32_t *rank;
  /* scratch of the screen: bits of its lower bound on the maximum [n_rows]; number of candidates [1]; candidates
   * [d_sae] with their upper bounds [d_sae, n_rows] */
  int32_t *screen_bound;
  int32_t *n_candidates;
  int32_t *candidates;
  float *upper;
  /* the word of the grid barrier, not shared with a concurrent launch: 0 but for its sign, which turns */
  int32_t *barrier;
  int32_t d_in, d_sae, n_rows, n_columns, n_slots, n_large;
  int32_t k;
  int32_t dtype;
  int32_t record;
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

const char *dspa_error_name(int code);
const char *dspa_error_text(int code);

/* CUDA versions, such as 13000 for 13.0: the newest that the driver supports, 0 without a driver; and the one with which
 * the library was built. */
int dspa_driver_version(void);
int dspa_runtime_version(void);

#ifdef __cplusplus
}
#endif

#endif
