/* cross_entropy.c - the loss of every position, from logits.
 *
 *     lse_t = ln sum_c e^(x_(t,c))      loss_t = lse_t - x_(t,label_t)
 *     gx_(t,c) = gloss_t (e^(x_(t,c) - lse_t) - [c = label_t])
 *
 * x, gx: [...,V]   labels: i32[...]   loss, lse, gloss: f32[...]
 * Label -100: loss 0, gradient 0.  Any other label outside [0,V): loss and gradient NaN, since a
 * kernel cannot fail.  Each kernel walks x once: the greatest logit is found and the sum rescaled
 * block by block, while the block is in the first cache. */
#include "cross_entropy.h"
#include "internal.h"
#include "vec.h"

fg_tensor fg__cross_entropy(fg_loc at, fg_tensor logits, fg_tensor labels)
{
    return FG_APPLY(cross_entropy, at, ((const fg_tensor[]){ logits, labels }), 0);
}

fg_tensor fg__cross_entropy_grad(fg_loc at, fg_tensor gloss, fg_tensor logits, fg_tensor labels,
                                 fg_tensor lse)
{
    return FG_APPLY(cross_entropy_grad, at, ((const fg_tensor[]){ gloss, logits, labels, lse }), 0);
}

/* Logits straight from a product with a matrix: the product and the loss become one op, and the
 * product itself is dead unless something else uses it. */
fg_tensor (fg_cross_entropy)(fg_loc at, fg_tensor logits, fg_tensor labels)
{
    fg_tensor in[FG_MAX_IN];
    int n_in = 0;
    const fg_op *op = fg__producer(logits, in, &n_in, NULL);
    if (op != &fg_op_table[FG_OP_linear] || !fg_absent(in[2]))
        return fg__cross_entropy(at, logits, labels);
    return FG_APPLY(linear_cross_entropy, at, ((const fg_tensor[]){ in[0], in[1], labels }), 0);
}

/* ---- one row -------------------------------------------------------------------------------- */

static fg_real greatest(const fg_real *x, int64_t n)
{
    fg_vec m = fg_vset(-(fg_real)INFINITY);
    int64_t i = 0;
    for (; i + FG_LANES <= n; i += FG_LANES) m = fg_vmax(fg_vload(x + i), m);
    fg_real y = fg_vgreatest(m);
    for (; i < n; i++) y = x[i] > y ? x[i] : y;
    return y;
}

static fg_real sum_of_exp(const fg_real *x, int64_t n, fg_real shift)
{
    const fg_vec m = fg_vset(shift);
    fg_vec a = { 0 }, b = { 0 };
    int64_t i = 0;
    for (; i + 2 * FG_LANES <= n; i += 2 * FG_LANES) {
        a += fg_vexp(fg_vload(x + i) - m);
        b += fg_vexp(fg_vload(x + i + FG_LANES) - m);
    }
    for (; i < n; i += FG_LANES) {
        const int64_t k = n - i < FG_LANES ? n - i : FG_LANES;
        fg_real lanes[FG_VEC_BYTES / sizeof(fg_real)] = { 0 };
        fg_vstore_n(lanes, fg_vexp(fg_vload_n(x + i, k) - m), k);
        a += fg_vload(lanes);
    }
    return fg_vsum(a + b);
}

fg_real fg__row_loss(const fg_real *x, int64_t n, int32_t label, fg_real *lse)
{
    enum { BLOCK = 2048 };
    fg_real m = -(fg_real)INFINITY, sum = 0;
    for (int64_t i = 0; i < n; i += BLOCK) {
        const int64_t k = n - i < BLOCK ? n - i : BLOCK;
        const fg_real here = greatest(x + i, k);
        if (here > m) {
            if (sum > 0) sum *= fg_exp1(m - here);
            m = here;
        }
        sum += sum_of_exp(x + i, k, m == -(fg_real)INFINITY ? 0 : m);    /* NaN in x is kept */
    }
    *lse = m == -(fg_real)INFINITY ? m + sum : m + (fg_real)log((double)sum);
    if (label == FG_NO_LABEL) return 0;
    return label >= 0 && label < n ? *lse - x[label] : (fg_real)NAN;
}

void fg__row_loss_grad(fg_real gloss, const fg_real *x, int64_t n, int32_t label, fg_real lse,
                       fg_real *gx)
{
    if (label == FG_NO_LABEL) {
        memset(gx, 0, (size_t)n * sizeof *gx);
        return;
    }
    const bool valid = label >= 0 && label < n;
    const fg_vec g = fg_vset(valid ? gloss : (fg_real)NAN), m = fg_vset(lse);
    int64_t i = 0;
    for (; i + FG_LANES <= n; i += FG_LANES) fg_vstore(gx + i, g * fg_vexp(fg_vload(x + i) - m));
    if (i < n) fg_vstore_n(gx + i, g * fg_vexp(fg_vload_n(x + i, n - i) - m), n - i);
    if (valid) gx[label] -= gloss;
}

/* ---- cross_entropy -------------------------------------------------------------------------- */

fg_status fg__check_labels(fg_infer *c, int labels, int64_t rows, int gloss, int lse)
{
    FG_REQUIRE(c, c->in_type[labels] == FG_I32, DTYPE, "labels are %s; they must be i32",
               fg_dtype_name(c->in_type[labels]));
    FG_REQUIRE(c, fg_shape_count(c->in[labels]) == rows, SHAPE,
               "there are %lld labels for %lld rows of logits",
               (long long)fg_shape_count(c->in[labels]), (long long)rows);
    const int more[] = { gloss, lse };
    for (int i = 0; i < 2; i++) {
        if (more[i] < 0) continue;
        FG_REQUIRE(c, c->in_type[more[i]] == FG_F32, DTYPE, "input %d is %s; it must be f32",
                   more[i], fg_dtype_name(c->in_type[more[i]]));
        FG_REQUIRE(c, fg_shape_equal(c->in[more[i]], c->in[labels]), SHAPE,
                   "input %d must have the shape of labels", more[i]);
    }
    return FG_OK;
}

static fg_status need_logits(fg_infer *c, int logits, int labels)
{
    FG_REQUIRE(c, fg__is_real(c->in_type[logits]), DTYPE, "logits are %s; they must be f32 or bf16",
               fg_dtype_name(c->in_type[logits]));
    const fg_shape *x = &c->in[logits], *t = &c->in[labels];
    FG_REQUIRE(c, x->rank == t->rank + 1 && fg__last(x) > 0, SHAPE,
               "logits must have the axes of labels (rank %d) and one of classes, at least 1",
               t->rank);
    for (int i = 0; i < t->rank; i++)
        FG_REQUIRE(c, x->dim[i] == t->dim[i], SHAPE,
                   "axis %d is %lld in logits and %lld in labels", i, (long long)x->dim[i],
                   (long long)t->dim[i]);
    return FG_OK;
}

static fg_status infer(fg_infer *c)
{
    const fg_status s = need_logits(c, 0, 1);
    c->out[0] = c->out[1] = c->in[1];
    c->out_type[0] = c->out_type[1] = FG_F32;
    return s ? s : fg__check_labels(c, 1, fg__rows(&c->in[0]), -1, -1);
}

static void cpu(const fg_exec *e)
{
    const int64_t rows = fg__rows(&e->in_shape[0]), V = fg__last(&e->in_shape[0]);
    const fg_real *x = e->in[0];
    const int32_t *labels = e->in[1];
    fg_real *loss = e->out[0], *lse = e->out[1];
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, rows * V))
    for (int64_t t = 0; t < rows; t++) loss[t] = fg__row_loss(x + t * V, V, labels[t], lse + t);
}

fg_tensor fg__lse_grad(fg_tensor glse, fg_tensor logits, fg_tensor lse)
{
    fg_shape column = fg_shape_of(lse);
    column.dim[column.rank++] = 1;
    const fg_dtype type = fg_dtype_of(logits);
    const fg_tensor x = fg_cast(logits, FG_F32);
    const fg_tensor g = fg_reshape(glse, column), y = fg_reshape(lse, column);
    const fg_tensor gx = fg__log_sum_exp_grad(FG_HERE, g, x, y);
    return fg_cast(gx, type);
}

/* gx = gloss (p - [c = label]) + glse p, p = e^(x - lse) */
static void vjp(fg_vjp *v)
{
    const fg_tensor x = v->in[0], labels = v->in[1], lse = v->out[1];
    if (!fg_absent(v->gout[0]))
        v->gin[0] = fg__cross_entropy_grad(FG_HERE, v->gout[0], x, labels, lse);
    if (!fg_absent(v->gout[1])) {
        const fg_tensor more = fg__lse_grad(v->gout[1], x, lse);
        v->gin[0] = fg_absent(v->gin[0]) ? more : fg_add(v->gin[0], more);
    }
}

/* ---- the definition ------------------------------------------------------------------------- */

/* Labels as numbers [...,1]; exact below 2^24. */
static fg_tensor label_column(fg_tensor labels)
{
    fg_shape column = fg_shape_of(labels);
    column.dim[column.rank++] = 1;
    const fg_tensor number = fg_cast(labels, FG_F32);
    return fg_reshape(number, column);
}

/* [...,V]: 1 where c = label, from c >= label and label >= c. */
static fg_tensor one_hot(fg_tensor label, int64_t V)
{
    const fg_tensor ones = fg_fill(label.graph, FG_DIMS(V), 1), count = fg_cumsum(ones, 0, false);
    const fg_tensor c = fg_scale(count, 1, -1);
    const fg_tensor below = fg__where_ge(FG_HERE, label, c, ones);
    return fg__where_ge(FG_HERE, c, label, below);
}

/* [...,1]: 1 where there is a label, else 0. */
static fg_tensor is_label(fg_tensor label)
{
    const fg_tensor zero = fg_fill(label.graph, FG_DIMS(1), 0);
    const fg_tensor one = fg_fill(label.graph, FG_DIMS(1), 1);
    return fg__where_ge(FG_HERE, label, zero, one);
}

static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_shape s = fg_shape_of(in[1]);
    const fg_tensor x = fg_cast(in[0], FG_F32), label = label_column(in[1]);
    const fg_tensor hot = one_hot(label, fg_dim(x, -1)), picked = fg_mul(x, hot);
    const fg_tensor lse = fg_log_sum_exp(x), at_label = fg_row_sum(picked);
    const fg_tensor loss = fg_sub(lse, at_label), there = is_label(label);
    const fg_tensor masked = fg_mul(loss, there);
    out[0] = fg_reshape(masked, s);
    out[1] = fg_reshape(lse, s);
    (void)attr;
}

static fg_cost cost(const fg_infer *c)
{
    const double n = (double)fg_shape_count(c->in[0]);
    return (fg_cost){ .flops = 3 * n, .bytes = n * (c->in_type[0] == FG_BF16 ? 2 : 4) };
}

static fg_tensor example(fg_graph *g, int i)
{
    static const int32_t some[] = { 3, -100, 0 };
    fg_tensor x, labels;
    switch (i) {
    case 0: x = fg_random(g, 2, 3, 5); labels = fg_random_int(g, 0, 5, 2, 3); break;
    case 1: x = fg_random(g, 3, 17); labels = fg_given_int(g, FG_DIMS(3), some); break;
    case 2: x = fg_random(g, 1, 1); labels = fg_random_int(g, 0, 1, 1); break;
    default: return (fg_tensor){ 0 };
    }
    return fg_cross_entropy(x, labels);
}

const fg_op_code fg_code_cross_entropy = {
    .infer = infer, .cpu = cpu, .vjp = vjp, .cost = cost, .decompose = decompose,
    .example = example, .bf16 = { .wide_out = 3 },
};

/* ---- cross_entropy_grad --------------------------------------------------------------------- */

static fg_status grad_infer(fg_infer *c)
{
    const fg_status s = need_logits(c, 1, 2);
    c->out[0] = c->in[1];
    c->out_type[0] = c->in_type[1];
    return s ? s : fg__check_labels(c, 2, fg__rows(&c->in[1]), 0, 3);
}

static void grad_cpu(const fg_exec *e)
{
    const int64_t rows = fg__rows(&e->in_shape[1]), V = fg__last(&e->in_shape[1]);
    const fg_real *gloss = e->in[0], *x = e->in[1], *lse = e->in[3];
    const int32_t *labels = e->in[2];
    fg_real *gx = e->out[0];
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, rows * V))
    for (int64_t t = 0; t < rows; t++)
        fg__row_loss_grad(gloss[t], x + t * V, V, labels[t], lse[t], gx + t * V);
}

static void grad_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    fg_shape column = fg_shape_of(in[2]);
    column.dim[column.rank++] = 1;
    const fg_tensor x = fg_cast(in[1], FG_F32), label = label_column(in[2]);
    const fg_tensor there = is_label(label);
    const fg_tensor gloss = fg_reshape(in[0], column), lse = fg_reshape(in[3], column);
    const fg_tensor away = fg_sub(x, lse), p = fg_exp(away), hot = one_hot(label, fg_dim(x, -1));
    const fg_tensor off = fg_sub(p, hot), g = fg_mul(gloss, there), gx = fg_mul(g, off);
    out[0] = fg_cast(gx, fg_dtype_of(in[1]));
    (void)attr;
}

static fg_cost grad_cost(const fg_infer *c)
{
    const double n = (double)fg_shape_count(c->in[1]);
    return (fg_cost){ .flops = 3 * n, .bytes = 2 * n * (c->in_type[1] == FG_BF16 ? 2 : 4) };
}

const fg_op_code fg_code_cross_entropy_grad = {
    .infer = grad_infer, .cpu = grad_cpu, .cost = grad_cost, .decompose = grad_decompose,
    .reuse = 1u << 1, .bf16 = { .like = { 2 } },
};
