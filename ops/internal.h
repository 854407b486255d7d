/* internal.h - builders of ops that are not public: gradients, masks, selections.  For vjp and
 * decompose functions; shapes and formulas are in ops.def and on the op's page. */
#ifndef FG_INTERNAL_H
#define FG_INTERNAL_H
#include <string.h>
#include "ops.h"

/* Threads for a kernel that handles so many elements: below 32768, starting them costs more than
 * they save. */
static inline int fg__threads(const fg_exec *e, int64_t elements)
{
    return elements < 32768 ? 1 : e->threads;
}
static inline bool fg__is_real(fg_dtype t) { return t == FG_F32 || t == FG_BF16; }
/* Bytes of an element as the CPU backend stores it. */
static inline size_t fg__cpu_size(fg_dtype t)
{
    return t == FG_I32 ? sizeof(int32_t) : sizeof(fg_real);
}
/* The nearest of the numbers with 8 significant bits, ties to even; NaN stays NaN. */
static inline fg_real fg__as_bf16(fg_real x)
{
    const float f = (float)x;
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    bits = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
    float y;
    memcpy(&y, &bits, sizeof y);
    return x != x ? x : (fg_real)y;
}
/* Bytes of all that a node reads and writes, once. */
static inline double fg__bytes_moved(const fg_infer *c)
{
    double bytes = 0;
    for (int i = 0; i < c->n_in; i++)
        if (c->given[i])
            bytes += (double)fg_shape_count(c->in[i]) * (c->in_type[i] == FG_BF16 ? 2 : 4);
    for (int o = 0; o < c->n_out; o++)
        bytes += (double)fg_shape_count(c->out[o]) * (c->out_type[o] == FG_BF16 ? 2 : 4);
    return bytes;
}
/* For a vjp whose node has `past` as that input: refuses where it is given. */
static inline bool fg__reads_caches(fg_vjp *v, int past)
{
    if (fg_absent(v->in[past])) return false;
    v->gin[0] = fg_fail(v->in[0], FG_ERR_NO_VJP, "no gradient flows through caches: past is given");
    return true;
}
/* The gradient of the first output, or 0 where only others are used. */
static inline fg_tensor fg__gout_or_zero(const fg_vjp *v)
{
    if (!fg_absent(v->gout[0])) return v->gout[0];
    const fg_tensor zero = fg_fill(v->out[0].graph, fg_shape_of(v->out[0]), 0);
    return fg_cast(zero, fg_dtype_of(v->out[0]));
}
/* Refuses those of inputs from .. to-1 that are there and not real.  out_type[0] becomes the widest
 * of them: f32 and bf16 mix, and give f32. */
fg_status fg__need_reals(fg_infer *c, int from, int to);
/* Refuses an attribute that is not a shape: rank in [0, 6], extents of at least 1. */
fg_status fg__check_shape(fg_infer *c, const fg_shape *s);

/* ---- unary.c -------------------------------------------------------------------------------- */

fg_tensor fg__sigmoid_grad(fg_loc at, fg_tensor gy, fg_tensor y);
fg_tensor fg__log_sigmoid_grad(fg_loc at, fg_tensor gy, fg_tensor x);
fg_tensor fg__softplus_grad(fg_loc at, fg_tensor gy, fg_tensor x);
fg_tensor fg__silu_grad(fg_loc at, fg_tensor gy, fg_tensor x);
fg_tensor fg__tanh_grad(fg_loc at, fg_tensor gy, fg_tensor y);
fg_tensor fg__relu_grad(fg_loc at, fg_tensor gy, fg_tensor x);

/* ---- binary.c, reduce.c, view.c ------------------------------------------------------------- */

/* x where a >= b, else 0; the three broadcast. */
fg_tensor fg__where_ge(fg_loc at, fg_tensor a, fg_tensor b, fg_tensor x);
fg_tensor fg__row_max_grad(fg_loc at, fg_tensor gy, fg_tensor x);
/* gy at [start, start + its extent) of an axis of the given extent, else 0. */
fg_tensor fg__slice_grad(fg_loc at, fg_tensor gy, int axis, int64_t start, int64_t extent);

/* ---- softmax.c ------------------------------------------------------------------------------ */

fg_tensor fg__softmax_grad(fg_loc at, fg_tensor gy, fg_tensor y);
fg_tensor fg__log_sum_exp_grad(fg_loc at, fg_tensor gy, fg_tensor x, fg_tensor y);
/* s: [B,H,M,N], scores of M queries and N keys.  Query i stands at absolute position p = past + i
 * (past: i32[1]; absent: p = i, and M = N is required), key j at j.  y_ij = s_ij where j <= p and
 * j >= first_(b,i) (first: i32[B,M]; absent: 0) and, if window > 0, p - j < window; else -inf. */
fg_tensor fg__attention_mask(fg_loc at, fg_tensor s, fg_tensor first, fg_tensor past,
                             int64_t window);

/* ---- linear.c, cross_entropy.c -------------------------------------------------------------- */

fg_tensor fg__linear_dx(fg_loc at, fg_tensor gy, fg_tensor w);
fg_tensor fg__linear_dw(fg_loc at, fg_tensor gy, fg_tensor x);
/* The op itself, however its logits were made. */
fg_tensor fg__cross_entropy(fg_loc at, fg_tensor logits, fg_tensor labels);
fg_tensor fg__cross_entropy_grad(fg_loc at, fg_tensor gloss, fg_tensor logits, fg_tensor labels,
                                 fg_tensor lse);
/* What a gradient of lse adds to that of the logits. */
fg_tensor fg__lse_grad(fg_tensor glse, fg_tensor logits, fg_tensor lse);

/* ---- rms_norm.c ----------------------------------------------------------------------------- */

/* fg_rms_norm(a + b, w, eps, 1) with fg_result(y, 1) = a + b. */
fg_tensor fg__add_rms_norm(fg_loc at, fg_tensor a, fg_tensor b, fg_tensor w, double eps);

/* ---- shift_mix.c, shift_norm.c -------------------------------------------------------------- */

/* Refuses x = input 0 unless [B,T,H,D], a = input 1 unless [B,T,H], and the optional inputs first,
 * past and prev that stand from input `first` on. */
fg_status fg__check_shift(fg_infer *c, int first);

/* Refuses inputs first and past of x = input 0, [B,T,...], unless absent or i32[B,T] and i32[1]. */
fg_status fg__check_sequence(fg_infer *c, int first, int past);

/* ---- cache.c: states of the current scope, "@cache.WHAT", or "@cache.WHAT.1", ... if taken --- */

/* x [B,T,...] written at s.past of a state [B,s.capacity,...]: the whole cache. */
fg_tensor fg__cache(fg_loc at, fg_tensor x, const char *what, fg_sequence s);
/* A state of that shape: what a layer keeps between calls. */
fg_tensor fg__cache_state(fg_loc at, fg_graph *g, const char *what, fg_dtype t, fg_shape s);
/* Such a state takes a new value of its own shape. */
fg_tensor fg__cache_put(fg_loc at, fg_tensor state, fg_tensor value);
/* rows [B,K,...] becomes the last K rows of rows followed by x [B,T,...]. */
fg_tensor fg__cache_rows(fg_loc at, fg_tensor rows, fg_tensor x);
/* A state [B,...] for one row of x [B,T,...]; fg__cache_last then makes it x's last row. */
fg_tensor fg__cache_row(fg_loc at, fg_tensor x, const char *what);
fg_tensor fg__cache_last(fg_loc at, fg_tensor last, fg_tensor x);

#endif
