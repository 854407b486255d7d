/* norm.h - what the norms share: groups of a row, sums over them, and the gain's
 * gradient, which is summed over rows in blocks fixed by the shape.
 *
 * x: [..., D], seen as rows of `groups` groups of n = D / groups elements; the gain w has D
 * elements, or n, which all groups share; rstd has one number per row and group. */
#ifndef FG_NORM_H
#define FG_NORM_H
#include <math.h>
#include "internal.h"
#include "vec.h"

typedef struct {
    int64_t rows, groups, n;
    int64_t n_w, step_w;                 /* elements of w; group g's begin at g * step_w */
} norm_size;

static inline norm_size norm_size_of(const fg_shape *x, const fg_shape *w, int64_t groups)
{
    const int64_t n = fg__last(x) / groups, n_w = fg__last(w);
    return (norm_size){ fg__rows(x), groups, n, n_w, n_w == n ? 0 : n };
}

static inline int64_t norm_elements(norm_size s) { return s.rows * s.groups * s.n; }

/* ---- kernels -------------------------------------------------------------------------------- */

/* Four accumulators hide the latency of the multiply-add; they are added in one fixed order. */
static inline fg_real norm_sum_squares(const fg_real *x, int64_t n)
{
    fg_vec a = { 0 }, b = { 0 }, c = { 0 }, d = { 0 };
    int64_t i = 0;
    for (; i + 4 * FG_LANES <= n; i += 4 * FG_LANES) {
        const fg_vec xa = fg_vload(x + i), xb = fg_vload(x + i + FG_LANES);
        const fg_vec xc = fg_vload(x + i + 2 * FG_LANES), xd = fg_vload(x + i + 3 * FG_LANES);
        a = fg_vfma(xa, xa, a);
        b = fg_vfma(xb, xb, b);
        c = fg_vfma(xc, xc, c);
        d = fg_vfma(xd, xd, d);
    }
    for (; i + FG_LANES <= n; i += FG_LANES) {
        const fg_vec v = fg_vload(x + i);
        a = fg_vfma(v, v, a);
    }
    if (i < n) {
        const fg_vec v = fg_vload_n(x + i, n - i);
        b = fg_vfma(v, v, b);
    }
    return fg_vsum((a + b) + (c + d));
}

static inline fg_real norm_rstd(fg_real sum_squares, int64_t n, double eps)
{
    return 1 / (fg_real)sqrt((double)(sum_squares / (fg_real)n + (fg_real)eps));
}

/* Rows are summed in blocks of at least 16, at most 128 blocks: each block into a row of its own of
 * partial sums, then the blocks in order.  Any number of threads adds in the same order. */
static inline int64_t norm_blocks(int64_t rows)
{
    const int64_t blocks = (rows + 15) / 16;
    return blocks < 128 ? blocks : 128;
}
static inline int64_t norm_block_start(int64_t rows, int64_t blocks, int64_t i)
{
    return rows / blocks * i + (i < rows % blocks ? i : rows % blocks);
}

/* to[j] = sum over blocks of from[block][j]. */
static inline void norm_add_blocks(const fg_real *from, int64_t blocks, fg_real *to, int64_t n,
                                   int threads)
{
    const int64_t width = 8 * FG_LANES, parts = (n + width - 1) / width;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < parts; part++) {
        const int64_t start = part * width, end = start + width < n ? start + width : n;
        memset(to + start, 0, (size_t)(end - start) * sizeof *to);
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t j = start; j < end; j++) to[j] += from[b * n + j];
    }
}

/* ---- rules and definitions ------------------------------------------------------------------ */

/* in[0] is x, in[1] is w; fills out[0] = y like x, out[1] = rstd. */
static inline fg_status norm_infer(fg_infer *c, double eps, int64_t groups)
{
    const fg_shape *x = &c->in[0], *w = &c->in[1];
    FG_REQUIRE(c, fg__is_real(c->in_type[0]) && fg__is_real(c->in_type[1]), DTYPE,
               "x and w must be f32 or bf16");
    FG_REQUIRE(c, x->rank >= 1, SHAPE, "x needs at least one axis to normalize over");
    const int64_t D = fg__last(x);
    FG_REQUIRE(c, groups >= 1 && D > 0 && D % groups == 0, SHAPE,
               "x's last axis is %lld, which does not fall in %lld groups of equal length",
               (long long)D, (long long)groups);
    FG_REQUIRE(c, w->rank == 1 && (w->dim[0] == D || w->dim[0] == D / groups), SHAPE,
               "w must have one axis of %lld%s", (long long)D,
               groups == 1 ? ", the extent of x's last" : ", or of one group's length");
    FG_REQUIRE(c, eps >= 0, USAGE, "eps is %g and must not be negative", eps);
    c->out[0] = c->out[1] = *x;
    c->out[1].dim[x->rank - 1] = groups;
    c->out_type[0] = c->in_type[0];
    c->out_type[1] = FG_F32;
    return FG_OK;
}

/* in[1] is x, in[2] is w, in[i_rstd] is rstd; fills out[0] = gx, out[1] = gw. */
static inline fg_status norm_grad_infer(fg_infer *c, int i_rstd, int64_t groups)
{
    const fg_shape *x = &c->in[1], *w = &c->in[2];
    const int64_t D = fg__last(x);
    FG_REQUIRE(c, groups >= 1 && D > 0 && D % groups == 0, SHAPE,
               "x's last axis is %lld, which does not fall in %lld groups of equal length",
               (long long)D, (long long)groups);
    FG_REQUIRE(c, w->rank == 1 && (w->dim[0] == D || w->dim[0] == D / groups), SHAPE,
               "w must have one axis, as long as x's last or one group of it");
    FG_REQUIRE(c, fg_shape_count(c->in[i_rstd]) == fg__rows(x) * groups, SHAPE,
               "rstd must hold one number for each group");
    c->out[0] = *x;
    c->out[1] = *w;
    c->out_type[0] = c->in_type[1];
    c->out_type[1] = c->in_type[2];
    return FG_OK;
}

/* x as f32[rows, groups, n], and back to the shape and dtype of `like`. */
static inline fg_tensor norm_split(fg_tensor x, int64_t groups)
{
    const int64_t D = fg_dim(x, -1);
    x = fg_cast(x, FG_F32);
    return fg_reshape(x, FG_DIMS(D ? fg_count(x) / D : 0, groups, D / groups));
}
static inline fg_tensor norm_join(fg_tensor x, fg_tensor like)
{
    x = fg_reshape(x, fg_shape_of(like));
    return fg_cast(x, fg_dtype_of(like));
}
/* The gain as f32[1, groups, n], or [1, 1, n] where it is shared. */
static inline fg_tensor norm_gain(fg_tensor w, fg_tensor x, int64_t groups)
{
    const int64_t n = fg_dim(x, -1) / groups, n_w = fg_dim(w, 0);
    w = fg_cast(w, FG_F32);
    return fg_reshape(w, FG_DIMS(1, n_w / n, n));
}

/* The part of x's gradient that comes through rstd: d rstd / dx = -rstd^3 x / n.  Only a loss that
 * reads rstd itself has it: gradients of gradients do. */
static inline fg_tensor norm_rstd_grad(fg_tensor grstd, fg_tensor x, fg_tensor rstd, int64_t groups)
{
    const fg_tensor square = fg_mul(rstd, rstd), cube = fg_mul(square, rstd);
    const fg_tensor flat = fg_mul(grstd, cube);
    const fg_tensor t = fg_reshape(flat, FG_DIMS(fg_count(rstd) / groups, groups, 1));
    const fg_tensor parts = norm_split(x, groups);
    const fg_tensor product = fg_mul(parts, t);
    return norm_join(fg_scale(product, -(double)groups / (double)fg_dim(x, -1), 0), x);
}
#endif
