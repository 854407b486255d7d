/* softmax.c - softmax and ln-sum-exp of rows, and the causal mask of attention scores.
 *
 *     softmax:       y_j = e^(x_j - m) / sum_k e^(x_k - m),   m = max_k x_k
 *     log_sum_exp:   y = m + ln sum_k e^(x_k - m)
 *     attention_mask: y_ij = s_ij where query i may see key j, else -inf
 *
 * x: [...,N], y of log_sum_exp: [...,1]; s: [B,H,M,N].
 * A row of -inf alone (a query that sees nothing) has softmax 0 and log_sum_exp -inf, and no
 * gradient; NaN goes through.  A row is read from memory once; later passes find it in cache. */
#include "internal.h"
#include "vec.h"

/* Below every value a score takes, within the range of bf16: tells -inf from the rest. */
static const double LOWEST = -1e38;

fg_tensor (fg_softmax)(fg_loc at, fg_tensor x)
{
    return FG_APPLY(softmax, at, ((const fg_tensor[]){ x }), 0);
}

fg_tensor fg__softmax_grad(fg_loc at, fg_tensor gy, fg_tensor y)
{
    return FG_APPLY(softmax_grad, at, ((const fg_tensor[]){ gy, y }), 0);
}

fg_tensor (fg_log_sum_exp)(fg_loc at, fg_tensor x)
{
    return FG_APPLY(log_sum_exp, at, ((const fg_tensor[]){ x }), 0);
}

fg_tensor fg__log_sum_exp_grad(fg_loc at, fg_tensor gy, fg_tensor x, fg_tensor y)
{
    return FG_APPLY(log_sum_exp_grad, at, ((const fg_tensor[]){ gy, x, y }), 0);
}

fg_tensor fg__attention_mask(fg_loc at, fg_tensor s, fg_tensor first, fg_tensor past,
                             int64_t window)
{
    return FG_APPLY(attention_mask, at, ((const fg_tensor[]){ s, first, past }), window);
}

/* ---- infer ---------------------------------------------------------------------------------- */

static fg_status need_rows(fg_infer *c, const fg_shape *x)
{
    FG_REQUIRE(c, fg__is_real(c->in_type[0]), DTYPE, "input 0 is %s; it must be f32 or bf16",
               fg_dtype_name(c->in_type[0]));
    FG_REQUIRE(c, x->rank >= 1, SHAPE, "x has rank 0; a row needs at least one axis");
    return FG_OK;
}

static fg_status softmax_infer(fg_infer *c)
{
    c->out[0] = c->in[0];
    return need_rows(c, &c->in[0]);
}

static fg_status softmax_grad_infer(fg_infer *c)
{
    FG_REQUIRE(c, fg_shape_equal(c->in[0], c->in[1]), SHAPE,
               "gy has %lld elements and y %lld; they must have one shape",
               (long long)fg_shape_count(c->in[0]), (long long)fg_shape_count(c->in[1]));
    c->out[0] = c->in[0];
    return need_rows(c, &c->in[0]);
}

static fg_status log_sum_exp_infer(fg_infer *c)
{
    const fg_status s = need_rows(c, &c->in[0]);
    if (s) return s;
    c->out[0] = c->in[0];
    c->out[0].dim[c->in[0].rank - 1] = 1;
    return FG_OK;
}

static fg_status log_sum_exp_grad_infer(fg_infer *c)
{
    const fg_shape *x = &c->in[1];
    for (int k = 0; k < 3; k++) {
        FG_REQUIRE(c, k == 1 || fg_shape_count(c->in[k]) == fg__rows(x), SHAPE,
                   "input %d has %lld elements and x %lld rows; they must be equal", k,
                   (long long)fg_shape_count(c->in[k]), (long long)fg__rows(x));
    }
    c->out[0] = *x;
    return need_rows(c, x);
}

static fg_status attention_mask_infer(fg_infer *c)
{
    const struct fg_attr_attention_mask *a = c->attr;
    const fg_shape *s = &c->in[0], *first = &c->in[1];
    FG_REQUIRE(c, s->rank == 4, SHAPE, "s has rank %d; it must be [B,H,M,N]", s->rank);
    FG_REQUIRE(c, a->window >= 0, USAGE, "window is %lld; it must be at least 0",
               (long long)a->window);
    FG_REQUIRE(c, c->given[2] || s->dim[2] == s->dim[3], SHAPE,
               "%lld queries and %lld keys; without past they must be equal",
               (long long)s->dim[2], (long long)s->dim[3]);
    if (c->given[1]) {
        FG_REQUIRE(c, c->in_type[1] == FG_I32, DTYPE, "first is %s; it must be i32",
                   fg_dtype_name(c->in_type[1]));
        FG_REQUIRE(c, first->rank == 2 && first->dim[0] == s->dim[0] && first->dim[1] == s->dim[2],
                   SHAPE, "first must be [%lld,%lld], one entry a query", (long long)s->dim[0],
                   (long long)s->dim[2]);
    }
    if (c->given[2]) {
        FG_REQUIRE(c, c->in_type[2] == FG_I32, DTYPE, "past is %s; it must be i32",
                   fg_dtype_name(c->in_type[2]));
        FG_REQUIRE(c, fg_shape_count(c->in[2]) == 1, SHAPE,
                   "past has %lld elements; it must have 1", (long long)fg_shape_count(c->in[2]));
    }
    c->out[0] = *s;
    return need_rows(c, s);
}

/* ---- cpu ------------------------------------------------------------------------------------ */

static fg_real max_of(const fg_real *x, int64_t n)
{
    fg_vec m = fg_vset(-INFINITY), m1 = m;
    int64_t i = 0;
    for (; i + 2 * FG_LANES <= n; i += 2 * FG_LANES) {
        m = fg_vmax(m, fg_vload(x + i));
        m1 = fg_vmax(m1, fg_vload(x + i + FG_LANES));
    }
    if (i + FG_LANES <= n) {
        m = fg_vmax(m, fg_vload(x + i));
        i += FG_LANES;
    }
    fg_real y = fg_vgreatest(fg_vmax(m, m1));
    for (; i < n; i++) y = x[i] > y ? x[i] : y;
    return y;
}

/* The greatest finite one; 0 where there is none, so that e^(-inf - 0) = 0 and NaN stays NaN. */
static fg_real center_of(const fg_real *x, int64_t n)
{
    const fg_real m = max_of(x, n);
    return m > -INFINITY ? m : 0;
}

static void softmax_row(fg_real *y, const fg_real *x, int64_t n)
{
    const fg_vec m = fg_vset(center_of(x, n));
    fg_vec sums = fg_vset(0);
    int64_t i = 0;
    for (; i + FG_LANES <= n; i += FG_LANES) {
        const fg_vec u = fg_vexp(fg_vload(x + i) - m);
        fg_vstore(y + i, u);
        sums += u;
    }
    fg_real sum = 0;
    if (i < n) {
        fg_vstore_n(y + i, fg_vexp(fg_vload_n(x + i, n - i) - m), n - i);
        sum = fg_vsum(fg_vload_n(y + i, n - i));
    }
    sum += fg_vsum(sums);
    const fg_vec share = fg_vset(sum == 0 ? 0 : 1 / sum);
    for (i = 0; i + FG_LANES <= n; i += FG_LANES) fg_vstore(y + i, fg_vload(y + i) * share);
    if (i < n) fg_vstore_n(y + i, fg_vload_n(y + i, n - i) * share, n - i);
}

static void softmax_cpu(const fg_exec *e)
{
    const int64_t n = fg__last(&e->in_shape[0]), rows = fg__rows(&e->in_shape[0]);
    const fg_real *x = e->in[0];
    fg_real *y = e->out[0];
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, rows * n))
    for (int64_t r = 0; r < rows; r++) softmax_row(y + r * n, x + r * n, n);
}

static void softmax_grad_row(fg_real *gx, const fg_real *gy, const fg_real *y, int64_t n)
{
    fg_vec s = fg_vset(0), s1 = s;
    int64_t i = 0;
    for (; i + 2 * FG_LANES <= n; i += 2 * FG_LANES) {
        s = fg_vfma(fg_vload(gy + i), fg_vload(y + i), s);
        s1 = fg_vfma(fg_vload(gy + i + FG_LANES), fg_vload(y + i + FG_LANES), s1);
    }
    for (; i < n; i += FG_LANES) {
        const int64_t k = n - i < FG_LANES ? n - i : 0;
        s = k ? fg_vfma(fg_vload_n(gy + i, k), fg_vload_n(y + i, k), s)
              : fg_vfma(fg_vload(gy + i), fg_vload(y + i), s);
    }
    const fg_vec dot = fg_vset(fg_vsum(s + s1));
    for (i = 0; i + FG_LANES <= n; i += FG_LANES)
        fg_vstore(gx + i, fg_vload(y + i) * (fg_vload(gy + i) - dot));
    const int64_t k = n - i;
    if (k) fg_vstore_n(gx + i, fg_vload_n(y + i, k) * (fg_vload_n(gy + i, k) - dot), k);
}

static void softmax_grad_cpu(const fg_exec *e)
{
    const int64_t n = fg__last(&e->in_shape[0]), rows = fg__rows(&e->in_shape[0]);
    const fg_real *gy = e->in[0], *y = e->in[1];
    fg_real *gx = e->out[0];
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, rows * n))
    for (int64_t r = 0; r < rows; r++) softmax_grad_row(gx + r * n, gy + r * n, y + r * n, n);
}

static fg_real log_sum_exp_of(const fg_real *x, int64_t n)
{
    const fg_real center = center_of(x, n);
    if (center == (fg_real)INFINITY) return center;
    const fg_vec m = fg_vset(center);
    fg_vec s = fg_vset(0), s1 = s;
    int64_t i = 0;
    for (; i + 2 * FG_LANES <= n; i += 2 * FG_LANES) {
        s += fg_vexp(fg_vload(x + i) - m);
        s1 += fg_vexp(fg_vload(x + i + FG_LANES) - m);
    }
    if (i + FG_LANES <= n) {
        s += fg_vexp(fg_vload(x + i) - m);
        i += FG_LANES;
    }
    fg_real sum = fg_vsum(s + s1);
    for (; i < n; i++) sum += fg_exp1(x[i] - center);
    return center + fg_log1(sum);
}

static void log_sum_exp_cpu(const fg_exec *e)
{
    const int64_t n = fg__last(&e->in_shape[0]), rows = fg__rows(&e->in_shape[0]);
    const fg_real *x = e->in[0];
    fg_real *y = e->out[0];
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, rows * n))
    for (int64_t r = 0; r < rows; r++) y[r] = log_sum_exp_of(x + r * n, n);
}

static void log_sum_exp_grad_cpu(const fg_exec *e)
{
    const int64_t n = fg__last(&e->in_shape[1]), rows = fg__rows(&e->in_shape[1]);
    const fg_real *gy = e->in[0], *x = e->in[1], *y = e->in[2];
    fg_real *gx = e->out[0];
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, rows * n))
    for (int64_t r = 0; r < rows; r++) {
        const fg_vec g = fg_vset(gy[r]), m = fg_vset(y[r] == -(fg_real)INFINITY ? 0 : y[r]);
        const fg_real *p = x + r * n;
        fg_real *q = gx + r * n;
        int64_t i = 0;
        for (; i + FG_LANES <= n; i += FG_LANES)
            fg_vstore(q + i, g * fg_vexp(fg_vload(p + i) - m));
        if (i < n) fg_vstore_n(q + i, g * fg_vexp(fg_vload_n(p + i, n - i) - m), n - i);
    }
}

/* The keys that a query sees are one stretch, [low, high). */
static void attention_mask_cpu(const fg_exec *e)
{
    const struct fg_attr_attention_mask *a = e->attr;
    const fg_shape *shape = &e->in_shape[0];
    const int64_t H = shape->dim[1], M = shape->dim[2], N = shape->dim[3];
    const int64_t rows = shape->dim[0] * H * M;
    const fg_real *s = e->in[0];
    const int32_t *first = e->in[1], *past = e->in[2];
    fg_real *y = e->out[0];
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, rows * N))
    for (int64_t r = 0; r < rows; r++) {
        const int64_t i = r % M, p = i + (past ? *past : 0);
        int64_t low = first ? first[r / M / H * M + i] : 0, high = p + 1 < N ? p + 1 : N;
        if (a->window > 0 && p - a->window + 1 > low) low = p - a->window + 1;
        if (low < 0) low = 0;
        if (low >= high) low = high = N;
        const fg_real *x = s + r * N;
        fg_real *to = y + r * N;
        for (int64_t j = 0; j < low; j++) to[j] = -(fg_real)INFINITY;
        if (to != x) memcpy(to + low, x + low, (size_t)(high - low) * sizeof *to);
        for (int64_t j = high; j < N; j++) to[j] = -(fg_real)INFINITY;
    }
}

/* ---- vjp ------------------------------------------------------------------------------------ */

static void softmax_vjp(fg_vjp *v)
{
    v->gin[0] = fg__softmax_grad(FG_HERE, v->gout[0], v->out[0]);
}

static void log_sum_exp_vjp(fg_vjp *v)
{
    v->gin[0] = fg__log_sum_exp_grad(FG_HERE, v->gout[0], v->in[0], v->out[0]);
}

/* gs = gy where y is not -inf, else 0. */
static void attention_mask_vjp(fg_vjp *v)
{
    const fg_tensor lowest = (fg_fill)(FG_HERE, v->in[0].graph, (fg_shape){ 0 }, LOWEST);
    const fg_tensor bound = fg_cast(lowest, fg_dtype_of(v->in[0]));
    v->gin[0] = fg__where_ge(FG_HERE, v->out[0], bound, v->gout[0]);
}

/* ---- decompose ------------------------------------------------------------------------------ */

/* max(x, value), for a value that keeps -inf and 0 out of a difference or a quotient. */
static fg_tensor at_least(fg_tensor x, double value)
{
    const fg_tensor number = (fg_fill)(FG_HERE, x.graph, (fg_shape){ 0 }, value);
    const fg_tensor bound = fg_cast(number, fg_dtype_of(x));
    return fg_max(x, bound);
}

static void softmax_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor top = fg_row_max(in[0]), center = at_least(top, LOWEST);
    const fg_tensor below = fg_sub(in[0], center), u = fg_exp(below);
    const fg_tensor sum = fg_row_sum(u), whole = at_least(sum, 1e-30);
    out[0] = fg_div(u, whole);
    (void)attr;
}

static void softmax_grad_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor products = fg_mul(in[0], in[1]), dot = fg_row_sum(products);
    const fg_tensor rest = fg_sub(in[0], dot);
    out[0] = fg_mul(in[1], rest);
    (void)attr;
}

static void log_sum_exp_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor top = fg_row_max(in[0]), center = at_least(top, LOWEST);
    const fg_tensor below = fg_sub(in[0], center), u = fg_exp(below), sum = fg_row_sum(u);
    const fg_tensor l = fg_log(sum);
    out[0] = fg_add(center, l);
    (void)attr;
}

static void log_sum_exp_grad_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor center = at_least(in[2], LOWEST), below = fg_sub(in[1], center);
    const fg_tensor share = fg_exp(below);
    out[0] = fg_mul(in[0], share);
    (void)attr;
}

static fg_cost cost(const fg_infer *c)                 /* an exponential counts as 8 */
{
    const double n = (double)fg_shape_count(c->in[0]), m = (double)fg_shape_count(c->out[0]);
    return (fg_cost){ .flops = 12 * (n > m ? n : m), .bytes = (n + m) * sizeof(float) };
}
static fg_cost cost_grad(const fg_infer *c)
{
    const double n = (double)fg_shape_count(c->out[0]);
    return (fg_cost){ .flops = 4 * n, .bytes = 3 * n * sizeof(float) };
}

/* ---- examples ------------------------------------------------------------------------------- */

static fg_tensor sample(fg_graph *g, int i)
{
    switch (i) {
    case 0: return fg_random(g, 3, 5);
    case 1: return fg_random(g, 2, 1, 37);
    case 2: return fg_random(g, 3, 1);
    case 3: return fg_random(g, 1, 1, 16);
    default: return (fg_tensor){ 0 };
    }
}

static fg_tensor softmax_example(fg_graph *g, int i)
{
    const fg_tensor x = sample(g, i);
    return fg_absent(x) ? x : fg_softmax(x);
}

static fg_tensor softmax_grad_example(fg_graph *g, int i)
{
    const fg_tensor gy = sample(g, i);
    const fg_tensor y = sample(g, i);
    return fg_absent(y) ? y : fg__softmax_grad(FG_HERE, gy, y);
}

static fg_tensor log_sum_exp_example(fg_graph *g, int i)
{
    const fg_tensor x = sample(g, i);
    return fg_absent(x) ? x : fg_log_sum_exp(x);
}

static fg_tensor log_sum_exp_grad_example(fg_graph *g, int i)
{
    const fg_tensor x = sample(g, i);
    if (fg_absent(x)) return x;
    fg_shape column = fg_shape_of(x);
    column.dim[column.rank - 1] = 1;
    const fg_tensor gy = (fg_random)(FG_HERE, g, column);
    const fg_tensor y = (fg_random)(FG_HERE, g, column);
    return fg__log_sum_exp_grad(FG_HERE, gy, x, y);
}

/* -inf has no difference quotient, so the softmax of what the mask leaves. */
static fg_tensor attention_mask_example(fg_graph *g, int i)
{
    static const int32_t starts[10] = { 0, 0, 2, 2, 2, 1, 1, 1, 9, 1 };   /* 9: sees nothing */
    static const int32_t held[1] = { 3 };
    if (i > 4) return (fg_tensor){ 0 };
    const bool cached = i == 2 || i == 4;
    const fg_tensor s = fg_random(g, 2, 1, 5, cached ? 9 : 5);
    fg_tensor first = { 0 }, past = { 0 };
    if (i == 1 || i == 4) first = fg_given_int(g, FG_DIMS(2, 5), starts);
    if (cached) past = fg_given_int(g, FG_DIMS(1), held);
    const fg_tensor y = fg__attention_mask(FG_HERE, s, first, past, i >= 3 ? 3 : 0);
    return fg_softmax(y);
}

/* ---- records -------------------------------------------------------------------------------- */

const fg_op_code fg_code_softmax = {
    .infer = softmax_infer, .cpu = softmax_cpu, .vjp = softmax_vjp, .cost = cost,
    .decompose = softmax_decompose, .example = softmax_example, .reuse = 1
};
const fg_op_code fg_code_softmax_grad = {
    .infer = softmax_grad_infer, .cpu = softmax_grad_cpu, .cost = cost_grad,
    .decompose = softmax_grad_decompose, .example = softmax_grad_example, .reuse = 3
};
const fg_op_code fg_code_log_sum_exp = {
    .infer = log_sum_exp_infer, .cpu = log_sum_exp_cpu, .vjp = log_sum_exp_vjp, .cost = cost,
    .decompose = log_sum_exp_decompose, .example = log_sum_exp_example,
    .bf16 = { .wide_out = 1 }
};
const fg_op_code fg_code_log_sum_exp_grad = {
    .infer = log_sum_exp_grad_infer, .cpu = log_sum_exp_grad_cpu, .cost = cost,
    .decompose = log_sum_exp_grad_decompose, .example = log_sum_exp_grad_example, .reuse = 2,
    .bf16 = { .like = { 2 } }
};
const fg_op_code fg_code_attention_mask = {
    .infer = attention_mask_infer, .cpu = attention_mask_cpu, .vjp = attention_mask_vjp,
    .example = attention_mask_example, .reuse = 1
};
