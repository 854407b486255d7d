/* few_rows.c - products of few rows with a weight matrix, together with what makes the rows.
 *
 *     few_linear      y = x m^T
 *     norm_linear     sum = a + b,  y = rms_norm(sum, w) m^T
 *     swiglu_linear   y = swiglu(x) m^T
 *
 * a, b, sum: [...,N]   w: [N]   x: [...,N], of swiglu_linear [...,2N]   m: [M,N]   y: [...,M];
 * without b, sum = a
 * For a token or a few, m is what has to be read, and the rows are so short that whoever multiplies
 * with a part of m makes them again at no cost: one launch instead of two or three.  Lowering makes
 * these ops (fuse_few.c), models do not.
 * Bytes: m once; the rows are read once for every part of m, from cache. */
#include "internal.h"

/* Rows of x, which is [...,n]. */
static double products(const fg_shape *x, const fg_shape *m)
{
    return 2 * (double)fg__rows(x) * (double)m->dim[0] * (double)m->dim[1];
}

/* ---- few_linear ----------------------------------------------------------------------------- */

/* in[0] is x, n times as wide as m; fills out[0]. */
static fg_status product_infer(fg_infer *c, int64_t n)
{
    const fg_shape *x = &c->in[0], *m = &c->in[1];
    FG_REQUIRE(c, fg__is_real(c->in_type[0]) && fg__is_real(c->in_type[1]), DTYPE,
               "x and m must be f32 or bf16");
    FG_REQUIRE(c, x->rank >= 1 && fg__last(x) % n == 0, SHAPE,
               "x's last axis is %lld and must fall in %lld equal parts", (long long)fg__last(x),
               (long long)n);
    FG_REQUIRE(c, m->rank == 2 && n * m->dim[1] == fg__last(x), SHAPE, "m must be [out,%lld]",
               (long long)(fg__last(x) / n));
    c->out[0] = *x;
    c->out[0].dim[x->rank - 1] = m->dim[0];
    c->out_type[0] = c->in_type[1];
    return FG_OK;
}

static fg_status few_infer(fg_infer *c) { return product_infer(c, 1); }

static void few_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor none = { 0 }, x = fg_cast(in[0], fg_dtype_of(in[1]));
    (void)attr;
    out[0] = fg_linear(x, in[1], none);
}

static fg_cost few_cost(const fg_infer *c)
{
    return (fg_cost){ .flops = products(&c->in[0], &c->in[1]) };
}

static fg_tensor few_example(fg_graph *g, int i)
{
    static const struct { int64_t rows, n, m; } cases[] = {
        { 3, 5, 4 }, { 1, 1536, 100 }, { 4, 264, 65 }, { 6, 4100, 7 }, { 2, 8200, 3 },
    };
    if (i >= (int)(sizeof cases / sizeof cases[0])) return (fg_tensor){ 0 };
    const fg_tensor x = fg_random(g, cases[i].rows, cases[i].n);
    const fg_tensor m = fg_random(g, cases[i].m, cases[i].n);
    const fg_tensor in[] = { x, m };
    return FG_APPLY(few_linear, FG_HERE, in, false);
}

const fg_op_code fg_code_few_linear = {
    .infer = few_infer, .cost = few_cost, .decompose = few_decompose, .example = few_example,
    .no_grad = true, .bf16 = { .narrow_in = 2, .narrow_out = 1 },
};

/* ---- norm_linear ---------------------------------------------------------------------------- */

enum { A, B, W, M };

static fg_status norm_infer(fg_infer *c)
{
    const struct fg_attr_norm_linear *at = c->attr;
    const fg_shape *a = &c->in[A], *w = &c->in[W], *m = &c->in[M];
    FG_REQUIRE(c, a->rank >= 1 && fg__last(a) > 0, SHAPE,
               "a needs at least one axis to normalize over");
    FG_REQUIRE(c, !c->given[B] || fg_shape_equal(*a, c->in[B]), SHAPE,
               "a and b must have one shape");
    FG_REQUIRE(c, w->rank == 1 && w->dim[0] == fg__last(a), SHAPE,
               "w must have one axis of %lld, the extent of a's last", (long long)fg__last(a));
    FG_REQUIRE(c, m->rank == 2 && m->dim[1] == fg__last(a), SHAPE,
               "m must be [out,in] with in = %lld, the extent of a's last", (long long)fg__last(a));
    FG_REQUIRE(c, fg__is_real(c->in_type[W]) && fg__is_real(c->in_type[M]), DTYPE,
               "w and m must be f32 or bf16");
    if (fg__need_reals(c, A, W)) return FG_ERR_DTYPE;
    FG_REQUIRE(c, at->eps >= 0, USAGE, "eps is %g and must not be negative", at->eps);
    c->out[0] = c->out[1] = *a;
    c->out[0].dim[a->rank - 1] = m->dim[0];
    c->out_type[1] = c->out_type[0];
    c->out_type[0] = c->in_type[M];
    return FG_OK;
}

static void norm_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_norm_linear *at = attr;
    const fg_tensor none = { 0 };
    fg_tensor x;
    if (fg_absent(in[B])) {
        x = fg_rms_norm(in[A], in[W], at->eps, 1);
        out[1] = in[A];
    } else {
        x = fg__add_rms_norm(FG_HERE, in[A], in[B], in[W], at->eps);
        out[1] = fg_result(x, 1);
    }
    x = fg_cast(x, fg_dtype_of(in[M]));
    out[0] = fg_linear(x, in[M], none);
}

static fg_cost norm_cost(const fg_infer *c)
{
    return (fg_cost){ .flops = products(&c->in[A], &c->in[M])
                               + 5 * (double)fg_shape_count(c->in[A]) };
}

static fg_tensor norm_example(fg_graph *g, int i)
{
    static const struct { int64_t rows, n, m; bool sum; } cases[] = {
        { 3, 5, 4, true }, { 1, 8, 3, false }, { 1, 1536, 100, true }, { 2, 264, 65, true },
        { 5, 512, 33, false }, { 8, 2048, 1, true },
    };
    if (i >= (int)(sizeof cases / sizeof cases[0])) return (fg_tensor){ 0 };
    fg_tensor b = { 0 };
    const fg_tensor a = fg_random(g, cases[i].rows, cases[i].n);
    if (cases[i].sum) b = fg_random(g, cases[i].rows, cases[i].n);
    const fg_tensor w = fg_random(g, cases[i].n);
    const fg_tensor m = fg_random(g, cases[i].m, cases[i].n);
    const fg_tensor in[] = { a, b, w, m };
    return FG_APPLY(norm_linear, FG_HERE, in, 1e-5, false);
}

const fg_op_code fg_code_norm_linear = {
    .infer = norm_infer, .cost = norm_cost, .decompose = norm_decompose, .example = norm_example,
    .no_grad = true, .bf16 = { .narrow_in = 1u << M, .narrow_out = 1, .like = { 0, 1 + A } },
};

/* ---- swiglu_linear -------------------------------------------------------------------------- */

static fg_status swiglu_infer(fg_infer *c)
{
    const struct fg_attr_swiglu_linear *at = c->attr;
    FG_REQUIRE(c, at->act == FG_ACT_SILU || at->act == FG_ACT_SIGMOID, USAGE,
               "act is %d, neither FG_ACT_SILU nor FG_ACT_SIGMOID", at->act);
    return product_infer(c, 2);
}

static void swiglu_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_swiglu_linear *at = attr;
    const fg_tensor none = { 0 };
    fg_tensor x = fg_swiglu(in[0], (fg_act)at->act);
    x = fg_cast(x, fg_dtype_of(in[1]));
    out[0] = fg_linear(x, in[1], none);
}

static fg_cost swiglu_cost(const fg_infer *c)
{
    return (fg_cost){ .flops = products(&c->in[0], &c->in[1])
                               + 3 * (double)fg_shape_count(c->in[0]) };
}

static fg_tensor swiglu_example(fg_graph *g, int i)
{
    static const struct { int64_t rows, n, m; int act; } cases[] = {
        { 3, 5, 4, FG_ACT_SILU }, { 1, 8, 3, FG_ACT_SIGMOID }, { 1, 4096, 100, FG_ACT_SILU },
        { 3, 2752, 9, FG_ACT_SILU }, { 7, 520, 130, FG_ACT_SIGMOID },
    };
    if (i >= (int)(sizeof cases / sizeof cases[0])) return (fg_tensor){ 0 };
    const fg_tensor x = fg_random(g, cases[i].rows, 2 * cases[i].n);
    const fg_tensor m = fg_random(g, cases[i].m, cases[i].n);
    const fg_tensor in[] = { x, m };
    return FG_APPLY(swiglu_linear, FG_HERE, in, cases[i].act, false);
}

const fg_op_code fg_code_swiglu_linear = {
    .infer = swiglu_infer, .cost = swiglu_cost, .decompose = swiglu_decompose,
    .example = swiglu_example, .no_grad = true, .bf16 = { .narrow_in = 2, .narrow_out = 1 },
};
