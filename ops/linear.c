/* linear.c - a product with a weight matrix, and its gradients.
 *
 *     y = x w^T + b        gx = gy w        gw = gy^T x, summed over all rows
 *
 * x: [...,N]   w: [M,N]   b: [M] or absent   y, gy: [...,M]   gx: [...,N]   gw: [M,N]
 * The leading axes of x are rows, R of them: each of the three is one matrix product of 2 R M N
 * operations.  The bias is added tile by tile, before the tile leaves the cache. */
#include "gemm.h"
#include "internal.h"

fg_tensor (fg_linear)(fg_loc at, fg_tensor x, fg_tensor w, fg_tensor b)
{
    return FG_APPLY(linear, at, ((const fg_tensor[]){ x, w, b }), 0);
}

fg_tensor fg__linear_dx(fg_loc at, fg_tensor gy, fg_tensor w)
{
    return FG_APPLY(linear_dx, at, ((const fg_tensor[]){ gy, w }), 0);
}

fg_tensor fg__linear_dw(fg_loc at, fg_tensor gy, fg_tensor x)
{
    return FG_APPLY(linear_dw, at, ((const fg_tensor[]){ gy, x }), 0);
}

static fg_status infer(fg_infer *c)
{
    const fg_shape *x = &c->in[0], *w = &c->in[1], *b = &c->in[2];
    FG_REQUIRE(c, w->rank == 2, SHAPE, "w has rank %d; it must be [out,in]", w->rank);
    FG_REQUIRE(c, x->rank >= 1, SHAPE, "x needs a last axis of %lld, w's", (long long)w->dim[1]);
    FG_REQUIRE(c, fg__last(x) == w->dim[1], SHAPE, "x's last axis is %lld and w's is %lld",
               (long long)fg__last(x), (long long)w->dim[1]);
    FG_REQUIRE(c, !c->given[2] || (b->rank == 1 && b->dim[0] == w->dim[0]), SHAPE,
               "b must be [%lld], as many as w has rows", (long long)w->dim[0]);
    c->out[0] = *x;
    c->out[0].dim[x->rank - 1] = w->dim[0];
    return fg__need_reals(c, 0, c->n_in);
}

static void cpu(const fg_exec *e)
{
    const fg_shape *w = &e->in_shape[1];
    const int64_t rows = fg__rows(&e->in_shape[0]), M = w->dim[0], N = w->dim[1];
    fg__gemm_bias(false, true, rows, M, N, 1, e->in[0], N, e->in[1], N, 0, e->out[0], M, e->in[2],
                  e->threads);
}

static void vjp(fg_vjp *v)
{
    const fg_tensor gy = v->gout[0];
    if (v->wants[0]) v->gin[0] = fg__linear_dx(FG_HERE, gy, v->in[1]);
    if (v->wants[1]) v->gin[1] = fg__linear_dw(FG_HERE, gy, v->in[0]);
    if (v->wants[2]) v->gin[2] = gy;
}

/* x as [rows, last axis]. */
static fg_tensor as_matrix(fg_tensor x)
{
    const fg_shape s = fg_shape_of(x);
    return fg_reshape(x, FG_DIMS(fg__rows(&s), fg__last(&s)));
}

static fg_tensor as_rows_of(fg_tensor y, fg_tensor like)
{
    fg_shape s = fg_shape_of(like);
    s.dim[s.rank - 1] = fg_dim(y, -1);
    return fg_reshape(y, s);
}

static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor x = as_matrix(in[0]), y = fg_matmul(x, in[1], false, true);
    const fg_tensor whole = as_rows_of(y, in[0]);
    out[0] = fg_absent(in[2]) ? whole : fg_add(whole, in[2]);
    (void)attr;
}

/* Operations of a product of R rows with a matrix; every tensor moves once. */
static fg_cost product_cost(const fg_infer *c, double rows, double M, double N)
{
    double elements = 0;
    for (int k = 0; k < c->n_in; k++)
        if (c->given[k]) elements += (double)fg_shape_count(c->in[k]);
    elements += (double)fg_shape_count(c->out[0]);
    return (fg_cost){ .flops = 2 * rows * M * N,
                      .bytes = elements * (c->in_type[0] == FG_BF16 ? 2 : 4) };
}

static fg_cost cost(const fg_infer *c)
{
    const fg_shape *w = &c->in[1];
    return product_cost(c, (double)fg__rows(&c->in[0]), (double)w->dim[0], (double)w->dim[1]);
}

static fg_tensor example(fg_graph *g, int i)
{
    static const struct { int64_t B, T, N, M; bool bias; } cases[] = {
        { 2, 3, 5, 3, false }, { 1, 3, 4, 5, true }, { 1, 1, 1, 1, true }, { 3, 5, 9, 17, true },
    };
    if (i >= (int)(sizeof cases / sizeof cases[0])) return (fg_tensor){ 0 };
    const fg_tensor x = fg_random(g, cases[i].B, cases[i].T, cases[i].N);
    const fg_tensor w = fg_random(g, cases[i].M, cases[i].N);
    fg_tensor b = { 0 };
    if (cases[i].bias) b = fg_random(g, cases[i].M);
    return fg_linear(x, w, b);
}

const fg_op_code fg_code_linear = {
    .infer = infer, .cpu = cpu, .vjp = vjp, .cost = cost, .decompose = decompose,
    .example = example, .bf16 = { .narrow_in = 3, .narrow_out = 1 },
};

/* ---- linear_dx: gx = gy w ------------------------------------------------------------------- */

static fg_status dx_infer(fg_infer *c)
{
    const fg_shape *gy = &c->in[0], *w = &c->in[1];
    FG_REQUIRE(c, w->rank == 2 && gy->rank >= 1 && fg__last(gy) == w->dim[0], SHAPE,
               "gy's last axis is %lld; w must be [%lld,in]", (long long)fg__last(gy),
               (long long)fg__last(gy));
    c->out[0] = *gy;
    c->out[0].dim[gy->rank - 1] = w->dim[1];
    return fg__need_reals(c, 0, c->n_in);
}

static void dx_cpu(const fg_exec *e)
{
    const fg_shape *w = &e->in_shape[1];
    const int64_t rows = fg__rows(&e->in_shape[0]), M = w->dim[0], N = w->dim[1];
    fg__gemm(false, false, rows, N, M, 1, e->in[0], M, e->in[1], N, 0, e->out[0], N, e->threads);
}

/* ggy = ggx w^T, gw = gy^T ggx */
static void dx_vjp(fg_vjp *v)
{
    if (v->wants[0]) v->gin[0] = fg_linear(v->gout[0], v->in[1], (fg_tensor){ 0 });
    if (v->wants[1]) v->gin[1] = fg__linear_dw(FG_HERE, v->in[0], v->gout[0]);
}

static void dx_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor gy = as_matrix(in[0]), gx = fg_matmul(gy, in[1], false, false);
    out[0] = as_rows_of(gx, in[0]);
    (void)attr;
}

const fg_op_code fg_code_linear_dx = {
    .infer = dx_infer, .cpu = dx_cpu, .vjp = dx_vjp, .cost = cost, .decompose = dx_decompose,
    .bf16 = { .narrow_in = 3, .narrow_out = 1 },
};

/* ---- linear_dw: gw = gy^T x ----------------------------------------------------------------- */

static fg_status dw_infer(fg_infer *c)
{
    const fg_shape *gy = &c->in[0], *x = &c->in[1];
    FG_REQUIRE(c, gy->rank >= 1 && x->rank >= 1 && fg__rows(gy) == fg__rows(x), SHAPE,
               "gy has %lld rows and x %lld", (long long)fg__rows(gy), (long long)fg__rows(x));
    c->out[0] = FG_DIMS(fg__last(gy), fg__last(x));
    return fg__need_reals(c, 0, c->n_in);
}

static void dw_cpu(const fg_exec *e)
{
    const int64_t rows = fg__rows(&e->in_shape[0]), M = fg__last(&e->in_shape[0]);
    const int64_t N = fg__last(&e->in_shape[1]);
    fg__gemm(true, false, M, N, rows, 1, e->in[0], M, e->in[1], N, 0, e->out[0], N, e->threads);
}

/* ggy = x ggw^T, gx = gy ggw */
static void dw_vjp(fg_vjp *v)
{
    if (v->wants[0]) v->gin[0] = fg_linear(v->in[1], v->gout[0], (fg_tensor){ 0 });
    if (v->wants[1]) v->gin[1] = fg__linear_dx(FG_HERE, v->in[0], v->gout[0]);
}

static void dw_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor gy = as_matrix(in[0]), x = as_matrix(in[1]);
    out[0] = fg_matmul(gy, x, true, false);
    (void)attr;
}

static fg_cost dw_cost(const fg_infer *c)
{
    return product_cost(c, (double)fg__rows(&c->in[0]), (double)fg__last(&c->in[0]),
                        (double)fg__last(&c->in[1]));
}

const fg_op_code fg_code_linear_dw = {
    .infer = dw_infer, .cpu = dw_cpu, .vjp = dw_vjp, .cost = dw_cost, .decompose = dw_decompose,
    .bf16 = { .narrow_in = 3, .wide_out = 1 },
};
