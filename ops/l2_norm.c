/* l2_norm.c - rows scaled to unit length: the keys and queries of DeltaNet.
 *
 *     y = x * rstd,   rstd = 1 / sqrt(sum(x^2) + eps)     over x's last axis
 *
 * x, y: [..., D]   rstd: f32[..., 1].  eps stands beside the sum, not the mean.
 * Sums are f32 (f64 in the double build).  Forward reads x once and writes y once; the gradient
 * reads gy and y once and writes gx once.
 * Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence
 * Length" (arXiv 2406.06484), section 3.3. */
#include "norm.h"

fg_tensor (fg_l2_norm)(fg_loc at, fg_tensor x, double eps)
{
    return FG_APPLY(l2_norm, at, ((const fg_tensor[]){ x }), eps);
}

static fg_status infer(fg_infer *c)
{
    const struct fg_attr_l2_norm *a = c->attr;
    const fg_shape *x = &c->in[0];
    FG_REQUIRE(c, fg__is_real(c->in_type[0]), DTYPE, "x must be f32 or bf16");
    FG_REQUIRE(c, x->rank >= 1 && fg__last(x) > 0, SHAPE,
               "x needs at least one axis to normalize over");
    FG_REQUIRE(c, a->eps >= 0, USAGE, "eps is %g and must not be negative", a->eps);
    c->out[0] = c->out[1] = *x;
    c->out[1].dim[x->rank - 1] = 1;
    c->out_type[1] = FG_F32;
    return FG_OK;
}

/* y = s x */
static inline void scale_row(const fg_real *x, fg_real s, int64_t n, fg_real *y)
{
    int64_t i = 0;
    for (; i + FG_LANES <= n; i += FG_LANES) fg_vstore(y + i, fg_vload(x + i) * s);
    if (i < n) fg_vstore_n(y + i, fg_vload_n(x + i, n - i) * s, n - i);
}

static void cpu(const fg_exec *e)
{
    const struct fg_attr_l2_norm *a = e->attr;
    const int64_t rows = fg__rows(&e->in_shape[0]), D = fg__last(&e->in_shape[0]);
    const fg_real *x = e->in[0];
    fg_real *y = e->out[0], *rstd = e->out[1];
    const int threads = fg__threads(e, rows * D);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const fg_real sum = norm_sum_squares(x + r * D, D) + (fg_real)a->eps;
        rstd[r] = 1 / (fg_real)sqrt((double)sum);
        scale_row(x + r * D, rstd[r], D, y + r * D);
    }
}

/* gx = rstd (gy - y sum(y gy));  d rstd / dx = -rstd^2 y, for gradients of gradients */
static void vjp(fg_vjp *v)
{
    const fg_tensor y = v->out[0], rstd = v->out[1];
    if (!fg_absent(v->gout[0])) {
        const fg_tensor in[] = { v->gout[0], y, rstd };
        v->gin[0] = FG_APPLY(l2_norm_grad, FG_HERE, in, 0);
    }
    if (!fg_absent(v->gout[1])) {
        const fg_tensor square = fg_mul(rstd, rstd), slope = fg_mul(v->gout[1], square);
        const fg_tensor along = fg_mul(slope, y), more = fg_scale(along, -1, 0);
        v->gin[0] = fg_absent(v->gin[0]) ? more : fg_add(v->gin[0], more);
    }
}

static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_l2_norm *a = attr;
    const fg_tensor x = fg_cast(in[0], FG_F32), square = fg_mul(x, x), sum = fg_row_sum(square);
    const fg_tensor shifted = fg_scale(sum, 1, a->eps);
    out[1] = fg_rsqrt(shifted);
    const fg_tensor y = fg_mul(x, out[1]);
    out[0] = fg_cast(y, fg_dtype_of(in[0]));
}

static fg_cost cost(const fg_infer *c)
{
    return (fg_cost){ .flops = 3 * (double)fg_shape_count(c->in[0]), .bytes = fg__bytes_moved(c) };
}

static fg_tensor example(fg_graph *g, int i)
{
    static const struct { int64_t T, D; double eps; } cases[] = {
        { 3, 5, 1e-6 }, { 2, 70, 1e-2 }, { 1, 1, 1e-2 },
    };
    if (i >= (int)(sizeof cases / sizeof cases[0])) return (fg_tensor){ 0 };
    const fg_tensor x = fg_random(g, 2, cases[i].T, cases[i].D);
    return fg_l2_norm(x, cases[i].eps);
}

const fg_op_code fg_code_l2_norm = {
    .infer = infer, .cpu = cpu, .vjp = vjp, .cost = cost, .decompose = decompose,
    .example = example, .reuse = 1u << 0, .bf16 = { .like = { 1 }, .wide_out = 2 },
};

/* ---- l2_norm_grad --------------------------------------------------------------------------- */

static fg_status grad_infer(fg_infer *c)
{
    FG_REQUIRE(c, fg_shape_equal(c->in[0], c->in[1]), SHAPE, "gy must have y's shape");
    FG_REQUIRE(c, fg_shape_count(c->in[2]) == fg__rows(&c->in[1]), SHAPE,
               "rstd must hold one number for each row");
    c->out[0] = c->in[1];
    c->out_type[0] = c->in_type[1];
    return FG_OK;
}

static inline void grad_row(const fg_real *gy, const fg_real *y, fg_real rstd, int64_t n,
                            fg_real *gx)
{
    fg_vec sum = { 0 };
    int64_t i = 0;
    for (; i + FG_LANES <= n; i += FG_LANES) sum = fg_vfma(fg_vload(gy + i), fg_vload(y + i), sum);
    if (i < n) sum = fg_vfma(fg_vload_n(gy + i, n - i), fg_vload_n(y + i, n - i), sum);
    const fg_vec along = fg_vset(-fg_vsum(sum));
    for (i = 0; i + FG_LANES <= n; i += FG_LANES)
        fg_vstore(gx + i, fg_vfma(along, fg_vload(y + i), fg_vload(gy + i)) * rstd);
    if (i < n) {
        const fg_vec g = fg_vload_n(gy + i, n - i);
        fg_vstore_n(gx + i, fg_vfma(along, fg_vload_n(y + i, n - i), g) * rstd, n - i);
    }
}

static void grad_cpu(const fg_exec *e)
{
    const int64_t rows = fg__rows(&e->in_shape[1]), D = fg__last(&e->in_shape[1]);
    const fg_real *gy = e->in[0], *y = e->in[1], *rstd = e->in[2];
    fg_real *gx = e->out[0];
    const int threads = fg__threads(e, rows * D);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) grad_row(gy + r * D, y + r * D, rstd[r], D, gx + r * D);
}

static void grad_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor gy = fg_cast(in[0], FG_F32), y = fg_cast(in[1], FG_F32), p = fg_mul(gy, y);
    const fg_tensor sum = fg_row_sum(p), along = fg_mul(y, sum), across = fg_sub(gy, along);
    const fg_tensor gx = fg_mul(across, in[2]);
    (void)attr;
    out[0] = fg_cast(gx, fg_dtype_of(in[1]));
}

static fg_cost grad_cost(const fg_infer *c)
{
    return (fg_cost){ .flops = 5 * (double)fg_shape_count(c->in[1]), .bytes = fg__bytes_moved(c) };
}

static fg_tensor grad_example(fg_graph *g, int i)
{
    if (i > 1) return (fg_tensor){ 0 };
    const int64_t D = i ? 35 : 3;
    const fg_tensor gy = fg_random(g, 3, D);
    const fg_tensor y = fg_random(g, 3, D);
    const fg_tensor rstd = fg_random(g, 3, 1);
    const fg_tensor in[] = { gy, y, rstd };
    return FG_APPLY(l2_norm_grad, FG_HERE, in, 0);
}

/* No vjp: gradients of gradients go through the definition. */
const fg_op_code fg_code_l2_norm_grad = {
    .infer = grad_infer, .cpu = grad_cpu, .cost = grad_cost, .decompose = grad_decompose,
    .example = grad_example, .reuse = 1u << 0 | 1u << 1, .bf16 = { .wide_in = 4, .like = { 2 } },
};
