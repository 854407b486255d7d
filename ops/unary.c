/* unary.c - elementwise functions of one tensor, and their gradients.
 *
 *     y_i = f(x_i),   gx_i = gy_i f'(x_i)
 *
 * x, y, gy, gx: one shape, any.  The formula of each op is in ops.def.  Where a gradient would take
 * a chain of passes over memory it is one op (NAME_grad), of y where that is cheaper than of x.
 * All are memory-bound but for exp, log and what is built on them: 2 or 3 n elements moved. */
#include "internal.h"
#include "vec.h"

#define BUILD(name)                                                                 \
    fg_tensor (fg_##name)(fg_loc at, fg_tensor x)                                   \
    {                                                                               \
        return FG_APPLY(name, at, ((const fg_tensor[]){ x }), 0);                   \
    }
#define BUILD_GRAD(name)                                                            \
    fg_tensor fg__##name##_grad(fg_loc at, fg_tensor gy, fg_tensor u)               \
    {                                                                               \
        return FG_APPLY(name##_grad, at, ((const fg_tensor[]){ gy, u }), 0);        \
    }
BUILD(neg)
BUILD(exp)
BUILD(log)
BUILD(sqrt)
BUILD(rsqrt)
BUILD(sigmoid)
BUILD_GRAD(sigmoid)
BUILD(log_sigmoid)
BUILD_GRAD(log_sigmoid)
BUILD(softplus)
BUILD_GRAD(softplus)
BUILD(silu)
BUILD_GRAD(silu)
BUILD(tanh)
BUILD_GRAD(tanh)
BUILD(relu)
BUILD_GRAD(relu)

fg_tensor (fg_scale)(fg_loc at, fg_tensor x, double s, double b)
{
    return FG_APPLY(scale, at, ((const fg_tensor[]){ x }), s, b);
}

fg_tensor fg__cast(fg_tensor x, fg_dtype to) { return fg_cast(x, to); }
fg_tensor (fg_cast)(fg_loc at, fg_tensor x, fg_dtype to)
{
    if (fg_ok(x) && fg_dtype_of(x) == to) return x;
    return FG_APPLY(cast, at, ((const fg_tensor[]){ x }), to);
}

fg_tensor (fg_fill)(fg_loc at, fg_graph *g, fg_shape s, double value)
{
    const struct fg_attr_fill attr = { s, value };
    return fg__apply(&fg_op_table[FG_OP_fill], at, g, 0, NULL, &attr);
}

/* ---- infer ---------------------------------------------------------------------------------- */

static fg_status infer(fg_infer *c)
{
    FG_REQUIRE(c, fg__is_real(c->in_type[0]), DTYPE, "x is %s; it must be f32 or bf16",
               fg_dtype_name(c->in_type[0]));
    c->out[0] = c->in[0];
    return FG_OK;
}

static fg_status infer_grad(fg_infer *c)
{
    FG_REQUIRE(c, fg_shape_equal(c->in[0], c->in[1]), SHAPE,
               "gy has %lld elements and the value %lld; they must have one shape",
               (long long)fg_shape_count(c->in[0]), (long long)fg_shape_count(c->in[1]));
    c->out[0] = c->in[0];
    return fg__need_reals(c, 0, 2);
}

static fg_status infer_cast(fg_infer *c)
{
    const struct fg_attr_cast *a = c->attr;
    FG_REQUIRE(c, fg__is_real(a->to), DTYPE, "to is %s; a cast goes to f32 or bf16",
               a->to == FG_I32 ? "i32" : "no dtype");
    c->out[0] = c->in[0];
    c->out_type[0] = a->to;
    return FG_OK;
}

static fg_status infer_fill(fg_infer *c)
{
    const struct fg_attr_fill *a = c->attr;
    const fg_status s = fg__check_shape(c, &a->shape);
    c->out[0] = a->shape;
    c->out_type[0] = FG_F32;
    return s;
}

/* ---- cpu ------------------------------------------------------------------------------------ */

typedef void (*span_fn)(fg_real *y, const fg_real *u, const fg_real *v, int64_t n);

static void over_spans(const fg_exec *e, span_fn span)
{
    const int64_t n = fg_shape_count(e->out_shape[0]), step = 8192, steps = (n + step - 1) / step;
    const fg_real *u = e->in[0], *v = e->n_in > 1 ? e->in[1] : e->in[0];
    fg_real *y = e->out[0];
    if (fg__threads(e, n) == 1) {
        span(y, u, v, n);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(e->threads)
    for (int64_t s = 0; s < steps; s++) {
        const int64_t i = s * step;
        span(y + i, u + i, v + i, n - i < step ? n - i : step);
    }
}

/* The kernel of an op from its function of one vector, or of two. */
#define CPU(name)                                                                              \
    static void name##_span(fg_real *y, const fg_real *u, const fg_real *v, int64_t n)         \
    {                                                                                          \
        int64_t i = 0;                                                                         \
        for (; i + FG_LANES <= n; i += FG_LANES) fg_vstore(y + i, name##_of(fg_vload(u + i))); \
        if (i < n) fg_vstore_n(y + i, name##_of(fg_vload_n(u + i, n - i)), n - i);             \
        (void)v;                                                                               \
    }                                                                                          \
    static void name##_cpu(const fg_exec *e)                                                   \
    {                                                                                          \
        over_spans(e, name##_span);                                                            \
    }
#define CPU_GRAD(name)                                                                         \
    static void name##_grad_span(fg_real *y, const fg_real *u, const fg_real *v, int64_t n)    \
    {                                                                                          \
        int64_t i = 0;                                                                         \
        for (; i + FG_LANES <= n; i += FG_LANES)                                               \
            fg_vstore(y + i, name##_grad_of(fg_vload(u + i), fg_vload(v + i)));                \
        if (i < n)                                                                             \
            fg_vstore_n(y + i, name##_grad_of(fg_vload_n(u + i, n - i),                        \
                                              fg_vload_n(v + i, n - i)), n - i);               \
    }                                                                                          \
    static void name##_grad_cpu(const fg_exec *e)                                              \
    {                                                                                          \
        over_spans(e, name##_grad_span);                                                       \
    }

static inline fg_vec neg_of(fg_vec x) { return -x; }
static inline fg_vec exp_of(fg_vec x) { return fg_vexp(x); }
static inline fg_vec log_of(fg_vec x) { return fg_vlog(x); }
static inline fg_vec sqrt_of(fg_vec x) { return fg_vsqrt(x); }
static inline fg_vec rsqrt_of(fg_vec x) { return 1 / fg_vsqrt(x); }
static inline fg_vec sigmoid_of(fg_vec x) { return fg_vsigmoid(x); }
static inline fg_vec sigmoid_grad_of(fg_vec gy, fg_vec y) { return gy * (y * (1 - y)); }
static inline fg_vec log_sigmoid_of(fg_vec x) { return fg_vlog_sigmoid(x); }
static inline fg_vec log_sigmoid_grad_of(fg_vec gy, fg_vec x) { return gy * fg_vsigmoid(-x); }
static inline fg_vec softplus_of(fg_vec x) { return -fg_vlog_sigmoid(-x); }
static inline fg_vec softplus_grad_of(fg_vec gy, fg_vec x) { return gy * fg_vsigmoid(x); }
static inline fg_vec silu_of(fg_vec x) { return x * fg_vsigmoid(x); }
static inline fg_vec silu_grad_of(fg_vec gy, fg_vec x)
{
    const fg_vec s = fg_vsigmoid(x);
    return gy * (s * fg_vfma(x, 1 - s, fg_vset(1)));
}
static inline fg_vec tanh_of(fg_vec x) { return fg_vtanh(x); }
static inline fg_vec tanh_grad_of(fg_vec gy, fg_vec y) { return gy * ((1 - y) * (1 + y)); }
static inline fg_vec relu_of(fg_vec x)                 /* NaN stays NaN */
{
    return fg_vselect((fg_vint)(x < fg_vset(0)), fg_vset(0), x);
}
static inline fg_vec relu_grad_of(fg_vec gy, fg_vec x)
{
    return fg_vselect((fg_vint)(x > fg_vset(0)), gy, fg_vset(0));
}
CPU(neg)
CPU(exp)
CPU(log)
CPU(sqrt)
CPU(rsqrt)
CPU(sigmoid)
CPU_GRAD(sigmoid)
CPU(log_sigmoid)
CPU_GRAD(log_sigmoid)
CPU(softplus)
CPU_GRAD(softplus)
CPU(silu)
CPU_GRAD(silu)
CPU(tanh)
CPU_GRAD(tanh)
CPU(relu)
CPU_GRAD(relu)

static void scale_cpu(const fg_exec *e)
{
    const struct fg_attr_scale *a = e->attr;
    const fg_vec s = fg_vset((fg_real)a->s), b = fg_vset((fg_real)a->b);
    const int64_t n = fg_shape_count(e->out_shape[0]), whole = n / FG_LANES * FG_LANES;
    const fg_real *x = e->in[0];
    fg_real *y = e->out[0];
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, n))
    for (int64_t i = 0; i < whole; i += FG_LANES) fg_vstore(y + i, fg_vfma(s, fg_vload(x + i), b));
    const int64_t rest = n - whole;
    if (rest > 0) fg_vstore_n(y + whole, fg_vfma(s, fg_vload_n(x + whole, rest), b), rest);
}

static void cast_cpu(const fg_exec *e)
{
    const int64_t n = fg_shape_count(e->out_shape[0]);
    const bool whole = e->in_type[0] == FG_I32, narrow = e->out_type[0] == FG_BF16;
    const fg_real *x = e->in[0];
    const int32_t *k = e->in[0];
    fg_real *y = e->out[0];
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, n))
    for (int64_t i = 0; i < n; i++) {
        const fg_real u = whole ? (fg_real)k[i] : x[i];
        y[i] = narrow ? fg__as_bf16(u) : u;
    }
}

static void fill_cpu(const fg_exec *e)
{
    const struct fg_attr_fill *a = e->attr;
    const int64_t n = fg_shape_count(e->out_shape[0]);
    fg_real *y = e->out[0];
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, n))
    for (int64_t i = 0; i < n; i++) y[i] = (fg_real)a->value;
}

/* ---- vjp ------------------------------------------------------------------------------------ */

static void neg_vjp(fg_vjp *v) { v->gin[0] = fg_neg(v->gout[0]); }

static void exp_vjp(fg_vjp *v) { v->gin[0] = fg_mul(v->gout[0], v->out[0]); }

static void log_vjp(fg_vjp *v) { v->gin[0] = fg_div(v->gout[0], v->in[0]); }

static void sqrt_vjp(fg_vjp *v)                        /* gx = gy / (2 y) */
{
    const fg_tensor t = fg_div(v->gout[0], v->out[0]);
    v->gin[0] = fg_scale(t, 0.5, 0);
}

static void rsqrt_vjp(fg_vjp *v)                       /* gx = -gy y^3 / 2 */
{
    const fg_tensor square = fg_mul(v->out[0], v->out[0]);
    const fg_tensor cube = fg_mul(square, v->out[0]);
    const fg_tensor t = fg_mul(v->gout[0], cube);
    v->gin[0] = fg_scale(t, -0.5, 0);
}

static void sigmoid_vjp(fg_vjp *v)
{
    v->gin[0] = fg__sigmoid_grad(FG_HERE, v->gout[0], v->out[0]);
}

static void log_sigmoid_vjp(fg_vjp *v)
{
    v->gin[0] = fg__log_sigmoid_grad(FG_HERE, v->gout[0], v->in[0]);
}

static void softplus_vjp(fg_vjp *v)
{
    v->gin[0] = fg__softplus_grad(FG_HERE, v->gout[0], v->in[0]);
}

static void silu_vjp(fg_vjp *v) { v->gin[0] = fg__silu_grad(FG_HERE, v->gout[0], v->in[0]); }

static void tanh_vjp(fg_vjp *v) { v->gin[0] = fg__tanh_grad(FG_HERE, v->gout[0], v->out[0]); }

/* relu and its gradient are gates of x's sign, whose own slope is 0. */
static void relu_vjp(fg_vjp *v) { v->gin[0] = fg__relu_grad(FG_HERE, v->gout[0], v->in[0]); }

static void relu_grad_vjp(fg_vjp *v)
{
    if (v->wants[0]) v->gin[0] = fg__relu_grad(FG_HERE, v->gout[0], v->in[1]);
}

static void scale_vjp(fg_vjp *v)
{
    const struct fg_attr_scale *a = v->attr;
    v->gin[0] = fg_scale(v->gout[0], a->s, 0);
}

static void cast_vjp(fg_vjp *v)
{
    const fg_dtype from = fg_dtype_of(v->in[0]);
    if (fg__is_real(from)) v->gin[0] = fg_cast(v->gout[0], from);
}

static void fill_vjp(fg_vjp *v) { (void)v; }           /* no inputs */

/* ---- decompose ------------------------------------------------------------------------------ */

static void silu_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor s = fg_sigmoid(in[0]);
    out[0] = fg_mul(in[0], s);
    (void)attr;
}

static void softplus_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor n = fg_neg(in[0]), l = fg_log_sigmoid(n);
    out[0] = fg_neg(l);
    (void)attr;
}

static void sigmoid_grad_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor rest = fg_scale(in[1], -1, 1), t = fg_mul(in[1], rest);
    out[0] = fg_mul(in[0], t);
    (void)attr;
}

static void log_sigmoid_grad_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor n = fg_neg(in[1]), s = fg_sigmoid(n);
    out[0] = fg_mul(in[0], s);
    (void)attr;
}

static void softplus_grad_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor s = fg_sigmoid(in[1]);
    out[0] = fg_mul(in[0], s);
    (void)attr;
}

static void silu_grad_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor s = fg_sigmoid(in[1]), rest = fg_scale(s, -1, 1);
    const fg_tensor t = fg_mul(in[1], rest), u = fg_scale(t, 1, 1), w = fg_mul(s, u);
    out[0] = fg_mul(in[0], w);
    (void)attr;
}

static void tanh_grad_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor square = fg_mul(in[1], in[1]), t = fg_scale(square, -1, 1);
    out[0] = fg_mul(in[0], t);
    (void)attr;
}

/* ---- cost: an exponential or logarithm counts as 8 ------------------------------------------ */

static fg_cost cost_of(const fg_infer *c, double flops)
{
    const double n = (double)fg_shape_count(c->out[0]);
    return (fg_cost){ .flops = flops * n, .bytes = (c->n_in + 1) * n * sizeof(float) };
}
static fg_cost cost_simple(const fg_infer *c) { return cost_of(c, 1); }
static fg_cost cost_curve(const fg_infer *c) { return cost_of(c, 10); }

/* ---- examples ------------------------------------------------------------------------------- */

/* 0: every axis odd; 1: rank 0; 2: longer than a vector, with a tail. */
static fg_tensor sample(fg_graph *g, int i)
{
    switch (i) {
    case 0: return fg_random(g, 3, 1, 5);
    case 1: return (fg_random)(FG_HERE, g, (fg_shape){ 0 });
    case 2: return fg_random(g, 37);
    default: return (fg_tensor){ 0 };
    }
}

#define EXAMPLE(name)                                                               \
    static fg_tensor name##_example(fg_graph *g, int i)                             \
    {                                                                               \
        const fg_tensor x = sample(g, i);                                           \
        return fg_absent(x) ? x : fg_##name(x);                                     \
    }
#define EXAMPLE_POSITIVE(name)                                                      \
    static fg_tensor name##_example(fg_graph *g, int i)                             \
    {                                                                               \
        const fg_tensor x = sample(g, i);                                           \
        if (fg_absent(x)) return x;                                                 \
        const fg_tensor positive = fg_exp(x);                                       \
        return fg_##name(positive);                                                 \
    }
#define EXAMPLE_GRAD(name)                                                          \
    static fg_tensor name##_grad_example(fg_graph *g, int i)                        \
    {                                                                               \
        const fg_tensor gy = sample(g, i);                                          \
        const fg_tensor u = sample(g, i);                                           \
        return fg_absent(u) ? u : fg__##name##_grad(FG_HERE, gy, u);                \
    }
EXAMPLE(neg)
EXAMPLE(exp)
EXAMPLE_POSITIVE(log)
EXAMPLE_POSITIVE(sqrt)
EXAMPLE_POSITIVE(rsqrt)
EXAMPLE(sigmoid)
EXAMPLE_GRAD(sigmoid)
EXAMPLE(log_sigmoid)
EXAMPLE_GRAD(log_sigmoid)
EXAMPLE(softplus)
EXAMPLE_GRAD(softplus)
EXAMPLE(silu)
EXAMPLE_GRAD(silu)
EXAMPLE(tanh)
EXAMPLE_GRAD(tanh)
EXAMPLE(relu)
EXAMPLE_GRAD(relu)

static fg_tensor scale_example(fg_graph *g, int i)
{
    const fg_tensor x = sample(g, i);
    return fg_absent(x) ? x : fg_scale(x, i == 1 ? 3 : -2.5, i == 2 ? 0 : 0.75);
}

/* Rounding has no slope for central differences to see, so only integers here. */
static fg_tensor cast_example(fg_graph *g, int i)
{
    if (i > 1) return (fg_tensor){ 0 };
    const fg_tensor k = fg_random_int(g, -300, 300, 3, 5);
    const fg_tensor y = fg_cast(k, i ? FG_BF16 : FG_F32);
    return fg_cast(y, FG_F32);
}

static fg_tensor fill_example(fg_graph *g, int i)
{
    switch (i) {
    case 0: return fg_fill(g, FG_DIMS(3, 5), 0.25);
    case 1: return fg_fill(g, (fg_shape){ 0 }, -1);
    default: return (fg_tensor){ 0 };
    }
}

/* ---- records -------------------------------------------------------------------------------- */

#define CODE(name, its_cost, its_decompose)                                                     \
    const fg_op_code fg_code_##name = {                                                         \
        .infer = infer, .cpu = name##_cpu, .vjp = name##_vjp, .cost = its_cost,                 \
        .decompose = its_decompose, .example = name##_example, .reuse = 1 };
/* What gates and decays are made of stays f32. */
#define CODE_WIDE(name, its_decompose)                                                          \
    const fg_op_code fg_code_##name = {                                                         \
        .infer = infer, .cpu = name##_cpu, .vjp = name##_vjp, .cost = cost_curve,               \
        .decompose = its_decompose, .example = name##_example, .reuse = 1,                      \
        .bf16 = { .wide_out = 1 } };
#define CODE_GRAD(name)                                                                         \
    const fg_op_code fg_code_##name##_grad = {                                                  \
        .infer = infer_grad, .cpu = name##_grad_cpu, .cost = cost_curve,                        \
        .decompose = name##_grad_decompose, .example = name##_grad_example, .reuse = 3 };
CODE(neg, cost_simple, NULL)
CODE_WIDE(exp, NULL)
CODE_WIDE(log, NULL)
CODE(sqrt, cost_simple, NULL)
CODE(rsqrt, cost_simple, NULL)
CODE_WIDE(sigmoid, NULL)
CODE_GRAD(sigmoid)
CODE_WIDE(log_sigmoid, NULL)
CODE_GRAD(log_sigmoid)
CODE_WIDE(softplus, softplus_decompose)
CODE_GRAD(softplus)
CODE(silu, cost_curve, silu_decompose)
CODE_GRAD(silu)
CODE(tanh, cost_curve, NULL)
CODE_GRAD(tanh)
CODE(relu, cost_simple, NULL)
CODE(scale, cost_simple, NULL)

const fg_op_code fg_code_relu_grad = {
    .infer = infer_grad, .cpu = relu_grad_cpu, .vjp = relu_grad_vjp, .cost = cost_simple,
    .example = relu_grad_example, .reuse = 3
};
const fg_op_code fg_code_cast = {
    .infer = infer_cast, .cpu = cast_cpu, .vjp = cast_vjp, .example = cast_example,
    .bf16 = { .as_inferred = true }
};
const fg_op_code fg_code_fill = {
    .infer = infer_fill, .cpu = fill_cpu, .vjp = fill_vjp, .example = fill_example
};
