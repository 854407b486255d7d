/* swiglu.c - the gate of the MLP, on the two halves of one projection.
 *
 *     x = [g | p]:   y = silu(g) * p,  silu(g) = g sigmoid(g)      act = FG_ACT_SILU
 *                    y = sigmoid(g) * p                            act = FG_ACT_SIGMOID
 *
 * x: [..., 2I], g its first half (the first I rows of gate_proj), p its second;  y: [..., I].
 * Forward moves 3 I elements a row, the gradient 5 I: the least possible.
 * Source: Shazeer 2020, "GLU Variants Improve Transformer", eq. 5-6; one fused projection with the
 * gate first, as in the official FoX code. */
#include "internal.h"
#include "vec.h"

fg_tensor (fg_swiglu)(fg_loc at, fg_tensor x, fg_act act)
{
    return FG_APPLY(swiglu, at, ((const fg_tensor[]){ x }), (int)act);
}

static fg_status infer(fg_infer *c)
{
    const struct fg_attr_swiglu *a = c->attr;
    const fg_shape *x = &c->in[0];
    FG_REQUIRE(c, fg__is_real(c->in_type[0]), DTYPE, "x must be f32 or bf16");
    FG_REQUIRE(c, x->rank >= 1 && fg__last(x) % 2 == 0, SHAPE,
               "x's last axis is %lld and must fall in two halves", (long long)fg__last(x));
    FG_REQUIRE(c, a->act == FG_ACT_SILU || a->act == FG_ACT_SIGMOID, USAGE,
               "act is %d, neither FG_ACT_SILU nor FG_ACT_SIGMOID", a->act);
    c->out[0] = *x;
    c->out[0].dim[x->rank - 1] /= 2;
    return FG_OK;
}

static inline fg_vec gate(fg_vec g, fg_vec p, bool silu)
{
    const fg_vec s = fg_vsigmoid(g);
    return (silu ? g * s : s) * p;
}

static inline void row(const fg_real *g, const fg_real *p, fg_real *y, int64_t n, bool silu)
{
    int64_t i = 0;
    for (; i + FG_LANES <= n; i += FG_LANES)
        fg_vstore(y + i, gate(fg_vload(g + i), fg_vload(p + i), silu));
    if (i < n) {
        const int64_t k = n - i;
        fg_vstore_n(y + i, gate(fg_vload_n(g + i, k), fg_vload_n(p + i, k), silu), k);
    }
}

static void cpu(const fg_exec *e)
{
    const struct fg_attr_swiglu *a = e->attr;
    const int64_t rows = fg__rows(&e->in_shape[0]), n = fg__last(&e->in_shape[0]) / 2;
    const fg_real *x = e->in[0];
    fg_real *y = e->out[0];
    const int threads = fg__threads(e, 4 * rows * n);           /* an exp is worth several sums */
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const fg_real *g = x + 2 * r * n;
        if (a->act == FG_ACT_SILU) row(g, g + n, y + r * n, n, true);
        else row(g, g + n, y + r * n, n, false);
    }
}

/* With s = sigmoid(g), silu:     gg = gy p s (1 + g (1 - s)),  gp = gy g s;
 *                      sigmoid:  gg = gy p s (1 - s),          gp = gy s. */
static void vjp(fg_vjp *v)
{
    const struct fg_attr_swiglu *a = v->attr;
    const fg_tensor in[] = { v->gout[0], v->in[0] };
    v->gin[0] = FG_APPLY(swiglu_grad, FG_HERE, in, a->act);
}

static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_swiglu *a = attr;
    const int axis = fg_shape_of(in[0]).rank - 1;
    const int64_t n = fg_dim(in[0], -1) / 2;
    const fg_tensor g = fg_slice(in[0], axis, 0, n), p = fg_slice(in[0], axis, n, 2 * n);
    const fg_tensor s = a->act == FG_ACT_SILU ? fg_silu(g) : fg_sigmoid(g);
    out[0] = fg_mul(s, p);
}

static fg_cost cost(const fg_infer *c)
{
    return (fg_cost){ .flops = 6 * (double)fg_shape_count(c->out[0]), .bytes = fg__bytes_moved(c) };
}

static fg_tensor example(fg_graph *g, int i)
{
    static const struct { int64_t T, n; fg_act act; } cases[] = {
        { 3, 5, FG_ACT_SILU }, { 3, 5, FG_ACT_SIGMOID },
        { 2, 35, FG_ACT_SILU }, { 1, 1, FG_ACT_SILU },
    };
    if (i >= (int)(sizeof cases / sizeof cases[0])) return (fg_tensor){ 0 };
    const fg_tensor x = fg_random(g, cases[i].T, 2 * cases[i].n);
    return fg_swiglu(x, cases[i].act);
}

const fg_op_code fg_code_swiglu = {
    .infer = infer, .cpu = cpu, .vjp = vjp, .cost = cost, .decompose = decompose,
    .example = example,
};

/* ---- swiglu_grad ---------------------------------------------------------------------------- */

static fg_status grad_infer(fg_infer *c)
{
    const fg_shape *gy = &c->in[0], *x = &c->in[1];
    FG_REQUIRE(c, fg__rows(gy) == fg__rows(x) && 2 * fg__last(gy) == fg__last(x), SHAPE,
               "gy must have x's shape with half its last axis");
    c->out[0] = *x;
    c->out_type[0] = c->in_type[1];
    return FG_OK;
}

typedef struct { fg_vec g, p; } halves;

static inline halves gate_grad(fg_vec gy, fg_vec g, fg_vec p, bool silu)
{
    const fg_vec s = fg_vsigmoid(g), gys = gy * s, r = 1 - s;
    return silu ? (halves){ gys * p * fg_vfma(g, r, fg_vset(1)), gys * g }
                : (halves){ gys * p * r, gys };
}

static inline void grad_row(const fg_real *gy, const fg_real *x, fg_real *gx, int64_t n, bool silu)
{
    int64_t i = 0;
    for (; i + FG_LANES <= n; i += FG_LANES) {
        const halves t = gate_grad(fg_vload(gy + i), fg_vload(x + i), fg_vload(x + n + i), silu);
        fg_vstore(gx + i, t.g);
        fg_vstore(gx + n + i, t.p);
    }
    if (i < n) {
        const int64_t k = n - i;
        const fg_vec g = fg_vload_n(x + i, k), p = fg_vload_n(x + n + i, k);
        const halves t = gate_grad(fg_vload_n(gy + i, k), g, p, silu);
        fg_vstore_n(gx + i, t.g, k);
        fg_vstore_n(gx + n + i, t.p, k);
    }
}

static void grad_cpu(const fg_exec *e)
{
    const struct fg_attr_swiglu_grad *a = e->attr;
    const int64_t rows = fg__rows(&e->in_shape[0]), n = fg__last(&e->in_shape[0]);
    const fg_real *gy = e->in[0], *x = e->in[1];
    fg_real *gx = e->out[0];
    const int threads = fg__threads(e, 4 * rows * n);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        if (a->act == FG_ACT_SILU) grad_row(gy + r * n, x + 2 * r * n, gx + 2 * r * n, n, true);
        else grad_row(gy + r * n, x + 2 * r * n, gx + 2 * r * n, n, false);
    }
}

static void grad_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_swiglu_grad *a = attr;
    const fg_tensor gy = in[0];
    const int axis = fg_shape_of(in[1]).rank - 1;
    const int64_t n = fg_dim(in[1], -1) / 2;
    const fg_tensor g = fg_slice(in[1], axis, 0, n), p = fg_slice(in[1], axis, n, 2 * n);
    const fg_tensor s = fg_sigmoid(g), rest = fg_scale(s, -1, 1);
    const fg_tensor gys = fg_mul(gy, s), both = fg_mul(gys, p);
    fg_tensor gp = gys, slope = rest;
    if (a->act == FG_ACT_SILU) {
        const fg_tensor bend = fg_mul(g, rest);
        slope = fg_scale(bend, 1, 1);
        gp = fg_mul(gys, g);
    }
    const fg_tensor gg = fg_mul(both, slope);
    out[0] = fg_concat(gg, gp, axis);
}

static fg_cost grad_cost(const fg_infer *c)
{
    return (fg_cost){ .flops = 11 * (double)fg_shape_count(c->in[0]), .bytes = fg__bytes_moved(c) };
}

static fg_tensor grad_example(fg_graph *g, int i)
{
    if (i > 1) return (fg_tensor){ 0 };
    const fg_tensor gy = fg_random(g, 3, 5);
    const fg_tensor x = fg_random(g, 3, 10);
    const fg_tensor in[] = { gy, x };
    return FG_APPLY(swiglu_grad, FG_HERE, in, i == 0 ? FG_ACT_SILU : FG_ACT_SIGMOID);
}

/* No vjp: gradients of gradients go through the definition. */
const fg_op_code fg_code_swiglu_grad = {
    .infer = grad_infer, .cpu = grad_cpu, .cost = grad_cost, .decompose = grad_decompose,
    .example = grad_example, .reuse = 1u << 1,
    .bf16 = { .like = { 2 } },
};
