/* cross_entropy.h - loss and gradient of one row of logits, for the two ops of cross entropy.
 *
 * A label of FG_NO_LABEL gives loss 0 and gradient 0, any other outside [0,n) gives NaN. */
#ifndef FG_CROSS_ENTROPY_H
#define FG_CROSS_ENTROPY_H
#include "op.h"

#define FG_NO_LABEL (-100)

/* The loss; *lse = ln sum_c e^(x_c). */
fg_real fg__row_loss(const fg_real *x, int64_t n, int32_t label, fg_real *lse);
/* gx_c = gloss (e^(x_c - lse) - [c = label]); gx may be x. */
void    fg__row_loss_grad(fg_real gloss, const fg_real *x, int64_t n, int32_t label, fg_real lse,
                          fg_real *gx);
/* In infer: input `labels` is i32 with one label a row; inputs gloss and lse, -1 for none, are f32
 * of its shape. */
fg_status fg__check_labels(fg_infer *c, int labels, int64_t rows, int gloss, int lse);
#endif
