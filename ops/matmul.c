/* matmul.c - products of matrices, one for each index of the leading axes.
 *
 *     y = op(a) op(b) over the last two axes, where op transposes if asked
 *
 * op(a): [...,M,K]   op(b): [...,K,N]   y: [...,M,N];  the leading axes of a and b are equal. */
#include "gemm.h"
#include "internal.h"

fg_tensor (fg_matmul)(fg_loc at, fg_tensor a, fg_tensor b, bool ta, bool tb)
{
    return FG_APPLY(matmul, at, ((const fg_tensor[]){ a, b }), ta, tb);
}

typedef struct { int64_t batch, M, N, K, inner; } extents;

static extents extents_of(const fg_shape *a, const fg_shape *b, bool ta, bool tb)
{
    const int r = a->rank;
    extents x = { .batch = 1, .M = a->dim[ta ? r - 1 : r - 2], .N = b->dim[tb ? r - 2 : r - 1],
                  .K = a->dim[ta ? r - 2 : r - 1], .inner = b->dim[tb ? r - 1 : r - 2] };
    for (int i = 0; i + 2 < r; i++) x.batch *= a->dim[i];
    return x;
}

static fg_status infer(fg_infer *c)
{
    const struct fg_attr_matmul *t = c->attr;
    const fg_shape *a = &c->in[0], *b = &c->in[1];
    FG_REQUIRE(c, a->rank >= 2 && a->rank == b->rank, SHAPE,
               "a has rank %d and b %d; they must be equal and at least 2", a->rank, b->rank);
    for (int i = 0; i + 2 < a->rank; i++)
        FG_REQUIRE(c, a->dim[i] == b->dim[i], SHAPE, "axis %d is %lld in a and %lld in b", i,
                   (long long)a->dim[i], (long long)b->dim[i]);
    const extents x = extents_of(a, b, t->ta, t->tb);
    FG_REQUIRE(c, x.K == x.inner, SHAPE, "op(a) has %lld columns and op(b) %lld rows",
               (long long)x.K, (long long)x.inner);
    c->out[0] = *a;
    c->out[0].dim[a->rank - 2] = x.M;
    c->out[0].dim[a->rank - 1] = x.N;
    return fg__need_reals(c, 0, 2);
}

static void one_product(const fg_exec *e, const extents *x, int64_t i, int threads)
{
    const struct fg_attr_matmul *t = e->attr;
    const fg_real *a = e->in[0], *b = e->in[1];
    fg_real *y = e->out[0];
    fg__gemm(t->ta, t->tb, x->M, x->N, x->K, 1, a + i * x->M * x->K, t->ta ? x->M : x->K,
             b + i * x->K * x->N, t->tb ? x->K : x->N, 0, y + i * x->M * x->N, x->N, threads);
}

/* A product gives the same bits on any number of threads, so threads take whole products where
 * there are enough of them. */
static void cpu(const fg_exec *e)
{
    const struct fg_attr_matmul *t = e->attr;
    const extents x = extents_of(&e->in_shape[0], &e->in_shape[1], t->ta, t->tb);
    const int threads = fg__threads(e, x.batch * x.M * x.N * (x.K / 8 + 1));
    if (threads == 1 || x.batch < 2 * threads) {
        for (int64_t i = 0; i < x.batch; i++) one_product(e, &x, i, e->threads);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < x.batch; i++) one_product(e, &x, i, 1);
}

/* d op(a) = gy op(b)^T and d op(b) = op(a)^T gy, transposed where the input was. */
static void vjp(fg_vjp *v)
{
    const struct fg_attr_matmul *t = v->attr;
    const fg_tensor a = v->in[0], b = v->in[1], gy = v->gout[0];
    if (v->wants[0] && t->ta) v->gin[0] = fg_matmul(b, gy, t->tb, true);
    else if (v->wants[0]) v->gin[0] = fg_matmul(gy, b, false, !t->tb);
    if (v->wants[1] && t->tb) v->gin[1] = fg_matmul(gy, a, true, t->ta);
    else if (v->wants[1]) v->gin[1] = fg_matmul(a, gy, !t->ta, false);
}

static fg_cost cost(const fg_infer *c)
{
    const struct fg_attr_matmul *t = c->attr;
    const extents x = extents_of(&c->in[0], &c->in[1], t->ta, t->tb);
    const double elements = (double)fg_shape_count(c->in[0]) + (double)fg_shape_count(c->in[1]) +
                            (double)fg_shape_count(c->out[0]);
    return (fg_cost){ .flops = 2 * (double)x.batch * (double)x.M * (double)x.N * (double)x.K,
                      .bytes = elements * (c->in_type[0] == FG_BF16 ? 2 : 4) };
}

static fg_tensor example(fg_graph *g, int i)
{
    fg_tensor a, b;
    switch (i) {
    case 0: a = fg_random(g, 3, 5); b = fg_random(g, 5, 4); break;
    case 1: a = fg_random(g, 2, 3, 5); b = fg_random(g, 2, 4, 5); break;
    case 2: a = fg_random(g, 2, 5, 3); b = fg_random(g, 2, 5, 4); break;
    case 3: a = fg_random(g, 5, 3); b = fg_random(g, 4, 5); break;
    case 4: a = fg_random(g, 2, 1, 3, 1); b = fg_random(g, 2, 1, 1, 5); break;
    default: return (fg_tensor){ 0 };
    }
    return fg_matmul(a, b, i == 2 || i == 3, i == 1 || i == 3);
}

const fg_op_code fg_code_matmul = {
    .infer = infer, .cpu = cpu, .vjp = vjp, .cost = cost, .example = example,
    .bf16 = { .narrow_in = 3, .narrow_out = 1 },
};
