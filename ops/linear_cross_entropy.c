/* linear_cross_entropy.c - the loss of every position from the last hidden state and the matrix of
 * the vocabulary, without the logits ever being whole.
 *
 *     z = x w^T     loss_t = lse_t - z_(t,label_t),  lse_t = ln sum_c e^(z_(t,c))
 *     gz_(t,c) = gloss_t (e^(z_(t,c) - lse_t) - [c = label_t])     gx = gz w     gw = gz^T x
 *
 * x, gx: [...,N]   w, gw: [V,N]   labels: i32[...]   loss, lse, gloss: f32[...]
 * Rows go in slices of equal length, so that z of one slice fits in scratch; gw sums the slices in
 * order.  The gradient computes z again: 8 instead of 6 operations for each element of z and N, for
 * memory of one slice instead of all rows.  linear_cross_entropy_both gives loss and gradients of a
 * slice while it is there: 6 operations; lowering puts it where gloss is known before the loss, as
 * it is where that is a mean.
 * Labels and loss as in cross_entropy.c. */
#include "cross_entropy.h"
#include "gemm.h"
#include "internal.h"

enum {
    LOGITS = 1 << 25,        /* logits of one slice, at most: 128 MiB.  A slice moves gw once, so */
    LEAST = 64, MOST = 1024  /* longer slices move less; above 1024 rows nothing is won           */
};

static int64_t slice_rows(int64_t rows, int64_t V)
{
    int64_t most = LOGITS / (V > 0 ? V : 1);
    most = most < LEAST ? LEAST : most > MOST ? MOST : most;
    const int64_t slices = (rows + most - 1) / most;
    return slices > 0 ? (rows + slices - 1) / slices : 1;
}

/* Inputs x, w, labels, the first of them at index `at`. */
static fg_status need_product(fg_infer *c, int at)
{
    const fg_shape *x = &c->in[at], *w = x + 1, *labels = x + 2;
    if (fg__need_reals(c, at, at + 2)) return FG_ERR_DTYPE;
    FG_REQUIRE(c, x->rank == labels->rank + 1, SHAPE,
               "x must have the axes of labels (rank %d) and one more", labels->rank);
    FG_REQUIRE(c, w->rank == 2 && w->dim[0] > 0 && fg__last(x) == w->dim[1], SHAPE,
               "w must be [V,%lld] with V at least 1", (long long)fg__last(x));
    for (int i = 0; i < labels->rank; i++)
        FG_REQUIRE(c, x->dim[i] == labels->dim[i], SHAPE,
                   "axis %d is %lld in x and %lld in labels", i, (long long)x->dim[i],
                   (long long)labels->dim[i]);
    return FG_OK;
}

static fg_status infer(fg_infer *c)
{
    const fg_status s = need_product(c, 0);
    c->out[0] = c->out[1] = c->in[2];
    c->out_type[0] = c->out_type[1] = FG_F32;
    return s ? s : fg__check_labels(c, 2, fg__rows(&c->in[0]), -1, -1);
}

static size_t slice_bytes(const fg_shape *x, const fg_shape *w)
{
    return (size_t)(slice_rows(fg__rows(x), w->dim[0]) * w->dim[0]) * sizeof(fg_real);
}

static size_t scratch(const fg_infer *c, int threads)
{
    (void)threads;
    return slice_bytes(&c->in[0], &c->in[1]);
}

static void cpu(const fg_exec *e)
{
    const fg_shape *shape = &e->in_shape[1];
    const int64_t rows = fg__rows(&e->in_shape[0]), V = shape->dim[0], N = shape->dim[1];
    const int64_t step = slice_rows(rows, V);
    const fg_real *x = e->in[0], *w = e->in[1];
    const int32_t *labels = e->in[2];
    fg_real *loss = e->out[0], *lse = e->out[1], *z = e->scratch;
    for (int64_t from = 0; from < rows; from += step) {
        const int64_t n = rows - from < step ? rows - from : step;
        fg__gemm(false, true, n, V, N, 1, x + from * N, N, w, N, 0, z, V, e->threads);
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, n * V))
        for (int64_t t = 0; t < n; t++)
            loss[from + t] = fg__row_loss(z + t * V, V, labels[from + t], lse + from + t);
    }
}

/* A gradient of lse itself is rare and takes the logits whole. */
static void vjp(fg_vjp *v)
{
    const fg_tensor x = v->in[0], w = v->in[1], labels = v->in[2], lse = v->out[1];
    if (!fg_absent(v->gout[0])) {
        const fg_tensor in[] = { v->gout[0], x, w, labels, lse };
        v->gin[0] = FG_APPLY(linear_cross_entropy_grad, FG_HERE, in, 0);
        v->gin[1] = fg_result(v->gin[0], 1);
    }
    if (!fg_absent(v->gout[1])) {
        const fg_tensor z = fg_linear(x, w, (fg_tensor){ 0 });
        const fg_tensor gz = fg__lse_grad(v->gout[1], z, lse);
        const fg_tensor gx = fg__linear_dx(FG_HERE, gz, w), gw = fg__linear_dw(FG_HERE, gz, x);
        v->gin[0] = fg_absent(v->gin[0]) ? gx : fg_add(v->gin[0], gx);
        v->gin[1] = fg_absent(v->gin[1]) ? gw : fg_add(v->gin[1], gw);
    }
}

static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor z = fg_linear(in[0], in[1], (fg_tensor){ 0 });
    out[0] = fg__cross_entropy(FG_HERE, z, in[2]);
    out[1] = fg_result(out[0], 1);
    (void)attr;
}

static fg_cost cost(const fg_infer *c)
{
    const double V = (double)c->in[1].dim[0], N = (double)c->in[1].dim[1];
    const double rows = (double)fg__rows(&c->in[0]);
    const double size = c->in_type[0] == FG_BF16 ? 2 : 4;
    return (fg_cost){ .flops = rows * V * (2 * N + 3),
                      .bytes = size * (rows * N + V * N) + 12 * rows };
}

static fg_tensor example(fg_graph *g, int i)
{
    static const int32_t some[] = { 3, -100, 0 };
    static const struct { int64_t T, N, V; } cases[] = { { 3, 5, 7 }, { 3, 4, 5 }, { 1, 1, 3 } };
    if (i >= (int)(sizeof cases / sizeof cases[0])) return (fg_tensor){ 0 };
    const int64_t T = cases[i].T, V = cases[i].V;
    const fg_tensor x = i == 0 ? fg_random(g, 2, 3, 5) : fg_random(g, T, cases[i].N);
    const fg_tensor w = fg_random(g, V, cases[i].N);
    const fg_tensor labels = i == 0 ? fg_random_int(g, 0, V, 2, 3)
                           : i == 1 ? fg_given_int(g, FG_DIMS(T), some) : fg_random_int(g, 0, V, T);
    const fg_tensor z = fg_linear(x, w, (fg_tensor){ 0 });
    return fg_cross_entropy(z, labels);
}

const fg_op_code fg_code_linear_cross_entropy = {
    .infer = infer, .cpu = cpu, .vjp = vjp, .cost = cost, .decompose = decompose,
    .example = example, .scratch = scratch,
    .bf16 = { .narrow_in = 3, .wide_out = 3 },
};

/* ---- linear_cross_entropy_grad -------------------------------------------------------------- */

static fg_status grad_infer(fg_infer *c)
{
    const fg_status s = need_product(c, 1);
    c->out[0] = c->in[1];
    c->out[1] = c->in[2];
    c->out_type[0] = c->out_type[1] = c->in_type[1];
    return s ? s : fg__check_labels(c, 3, fg__rows(&c->in[1]), 0, 4);
}

static size_t grad_scratch(const fg_infer *c, int threads)
{
    (void)threads;
    return slice_bytes(&c->in[1], &c->in[2]);
}

static void grad_cpu(const fg_exec *e)
{
    const fg_shape *shape = &e->in_shape[2];
    const int64_t rows = fg__rows(&e->in_shape[1]), V = shape->dim[0], N = shape->dim[1];
    const int64_t step = slice_rows(rows, V);
    const fg_real *gloss = e->in[0], *x = e->in[1], *w = e->in[2], *lse = e->in[4];
    const int32_t *labels = e->in[3];
    fg_real *gx = e->out[0], *gw = e->out[1], *z = e->scratch;
    for (int64_t from = 0; from < rows; from += step) {
        const int64_t n = rows - from < step ? rows - from : step;
        fg__gemm(false, true, n, V, N, 1, x + from * N, N, w, N, 0, z, V, e->threads);
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, n * V))
        for (int64_t t = 0; t < n; t++) {
            const int64_t at = from + t;
            fg__row_loss_grad(gloss[at], z + t * V, V, labels[at], lse[at], z + t * V);
        }
        fg__gemm(false, false, n, N, V, 1, z, V, w, N, 0, gx + from * N, N, e->threads);
        fg__gemm(true, false, V, N, n, 1, z, V, x + from * N, N, from > 0, gw, N, e->threads);
    }
    if (rows == 0)
        for (int64_t i = 0; i < V * N; i++) gw[i] = 0;
}

static void grad_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor z = fg_linear(in[1], in[2], (fg_tensor){ 0 });
    const fg_tensor gz = fg__cross_entropy_grad(FG_HERE, in[0], z, in[3], in[4]);
    out[0] = fg__linear_dx(FG_HERE, gz, in[2]);
    out[1] = fg__linear_dw(FG_HERE, gz, in[1]);
    (void)attr;
}

static fg_cost grad_cost(const fg_infer *c)
{
    const double V = (double)c->in[2].dim[0], N = (double)c->in[2].dim[1];
    const double rows = (double)fg__rows(&c->in[1]);
    const double size = c->in_type[1] == FG_BF16 ? 2 : 4;
    return (fg_cost){ .flops = rows * V * (6 * N + 3), .bytes = 2 * size * (rows * N + V * N) };
}

const fg_op_code fg_code_linear_cross_entropy_grad = {
    .infer = grad_infer, .cpu = grad_cpu, .cost = grad_cost, .decompose = grad_decompose,
    .scratch = grad_scratch, .bf16 = { .narrow_in = 6, .narrow_out = 1, .wide_out = 2 },
};

/* ---- linear_cross_entropy_both -------------------------------------------------------------- */

enum { BOTH_GLOSS = 3 };

static fg_status both_infer(fg_infer *c)
{
    const fg_status s = need_product(c, 0);
    c->out[0] = c->out[1] = c->in[2];
    c->out[2] = c->in[0];
    c->out[3] = c->in[1];
    c->out_type[0] = c->out_type[1] = FG_F32;
    c->out_type[2] = c->out_type[3] = c->in_type[0];
    return s ? s : fg__check_labels(c, 2, fg__rows(&c->in[0]), BOTH_GLOSS, -1);
}

static void both_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor forward[] = { in[0], in[1], in[2] };
    out[0] = FG_APPLY(linear_cross_entropy, FG_HERE, forward, 0);
    out[1] = fg_result(out[0], 1);
    const fg_tensor back[] = { in[BOTH_GLOSS], in[0], in[1], in[2], out[1] };
    out[2] = FG_APPLY(linear_cross_entropy_grad, FG_HERE, back, 0);
    out[3] = fg_result(out[2], 1);
    (void)attr;
}

static fg_cost both_cost(const fg_infer *c)
{
    const double V = (double)c->in[1].dim[0], N = (double)c->in[1].dim[1];
    const double rows = (double)fg__rows(&c->in[0]);
    const double size = c->in_type[0] == FG_BF16 ? 2 : 4;
    return (fg_cost){ .flops = rows * V * (6 * N + 6),
                      .bytes = 2 * size * (rows * N + V * N) + 16 * rows };
}

static fg_tensor both_example(fg_graph *g, int i)
{
    static const int32_t some[] = { 3, -100, 0 };
    static const struct {
        int64_t T, N, V;
    } cases[] = { { 3, 5, 7 }, { 3, 4, 5 }, { 150, 16, 90 } };
    if (i >= (int)(sizeof cases / sizeof cases[0])) return (fg_tensor){ 0 };
    const int64_t T = cases[i].T, V = cases[i].V;
    const fg_tensor x = fg_random(g, T, cases[i].N);
    const fg_tensor w = fg_random(g, V, cases[i].N);
    const fg_tensor labels = i == 1 ? fg_given_int(g, FG_DIMS(T), some)
                                    : fg_random_int(g, 0, V, T);
    const fg_tensor gloss = fg_random(g, T);
    const fg_tensor in[] = { x, w, labels, gloss };
    return FG_APPLY(linear_cross_entropy_both, FG_HERE, in, 0);
}

/* Made by lowering alone, behind all gradients. */
const fg_op_code fg_code_linear_cross_entropy_both = {
    .infer = both_infer, .cost = both_cost, .decompose = both_decompose, .example = both_example,
    .no_grad = true, .bf16 = { .narrow_in = 3, .narrow_out = 4, .wide_out = 11 },
};
