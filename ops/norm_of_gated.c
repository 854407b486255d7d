/* norm_of_gated.c - RMS norm of a gated tensor: the output norm of Mamba-2.
 *
 *     u = x * silu(g),   y = (u * rstd) * w,   rstd = 1 / sqrt(mean(u^2) + eps)   over each group
 *
 * x, g, y: [..., D], D = groups * n;  w: [D], or [n] shared by the groups;  rstd: f32[..., groups].
 * The gate comes first and the norm after it; the other way round is gated_norm.
 * On a device forward reads x and g and writes y, the gradient reads gy, x and g and writes gx and
 * gg: once.  The CPU runs the definition.
 * Source: Dao and Gu 2024, "Transformers are SSMs" (arXiv 2405.21060), section 7.1. */
#include "norm_gate.h"

fg_tensor (fg_norm_of_gated)(fg_loc at, fg_tensor x, fg_tensor w, fg_tensor g, double eps,
                             int64_t groups)
{
    return FG_APPLY(norm_of_gated, at, ((const fg_tensor[]){ x, w, g }), eps, groups);
}

static fg_status infer(fg_infer *c)
{
    const struct fg_attr_norm_of_gated *a = c->attr;
    return norm_gate_infer(c, a->eps, a->groups);
}

/* With s = sigmoid(g), gu as in rms_norm at u:  gx = gu g s,  gg = gu x s (1 + g (1 - s)). */
static void vjp(fg_vjp *v)
{
    const struct fg_attr_norm_of_gated *a = v->attr;
    const fg_tensor x = v->in[0], w = v->in[1], g = v->in[2], rstd = v->out[1];
    if (!fg_absent(v->gout[0])) {
        const fg_tensor in[] = { v->gout[0], x, w, g, rstd };
        v->gin[0] = FG_APPLY(norm_of_gated_grad, FG_HERE, in, a->groups);
        v->gin[1] = fg_result(v->gin[0], 1);
        v->gin[2] = fg_result(v->gin[0], 2);
    }
    if (!fg_absent(v->gout[1])) {
        const fg_tensor s = fg_silu(g), u = fg_mul(x, s);
        const fg_tensor gu = norm_rstd_grad(v->gout[1], u, rstd, a->groups), gs = fg_mul(gu, x);
        const fg_tensor more = fg_mul(gu, s), more_g = fg__silu_grad(FG_HERE, gs, g);
        v->gin[0] = fg_absent(v->gin[0]) ? more : fg_add(v->gin[0], more);
        v->gin[2] = fg_absent(v->gin[2]) ? more_g : fg_add(v->gin[2], more_g);
    }
}

static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_norm_of_gated *a = attr;
    const fg_tensor s = fg_silu(in[2]), u = fg_mul(in[0], s);
    out[0] = fg_rms_norm(u, in[1], a->eps, a->groups);
    out[1] = fg_result(out[0], 1);
}

static fg_cost cost(const fg_infer *c)
{
    return (fg_cost){ .flops = 10 * (double)fg_shape_count(c->in[0]), .bytes = fg__bytes_moved(c) };
}

static fg_tensor example(fg_graph *g, int i)
{
    static const norm_gate_case cases[] = {
        { 1, 3, 5, 5, 1, 1e-5 },
        { 2, 3, 16, 16, 2, 1e-6 },     /* a gain for every element */
        { 2, 3, 27, 9, 3, 1e-5 },      /* one gain shared by three groups */
        { 1, 37, 24, 24, 1, 1e-5 },    /* more than one block of rows */
        { 1, 1, 1, 1, 1, 1e-2 },
    };
    if (i >= (int)(sizeof cases / sizeof cases[0])) return (fg_tensor){ 0 };
    const norm_gate_inputs in = norm_gate_example(g, &cases[i]);
    return fg_norm_of_gated(in.x, in.w, in.g, cases[i].eps, cases[i].groups);
}

const fg_op_code fg_code_norm_of_gated = {
    .infer = infer, .vjp = vjp, .cost = cost, .decompose = decompose, .example = example,
    .reuse = 1u << 0 | 1u << 2,
    .bf16 = { .narrow_out = 1, .wide_out = 2 },
};

/* ---- norm_of_gated_grad --------------------------------------------------------------------- */

static fg_status grad_infer(fg_infer *c)
{
    const struct fg_attr_norm_of_gated_grad *a = c->attr;
    return norm_gate_grad_infer(c, a->groups);
}

static void grad_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_norm_of_gated_grad *a = attr;
    const fg_tensor s = fg_silu(in[3]), u = fg_mul(in[1], s);
    const fg_tensor norm[] = { in[0], u, in[2], in[4], { 0 } };
    const fg_tensor gu = FG_APPLY(rms_norm_grad, FG_HERE, norm, a->groups);
    const fg_tensor gs = fg_mul(gu, in[1]);
    out[0] = fg_mul(gu, s);
    out[1] = fg_result(gu, 1);
    out[2] = fg__silu_grad(FG_HERE, gs, in[3]);
}

static fg_cost grad_cost(const fg_infer *c)
{
    return (fg_cost){ .flops = 22 * (double)fg_shape_count(c->in[1]), .bytes = fg__bytes_moved(c) };
}

static fg_tensor grad_example(fg_graph *g, int i)
{
    static const norm_gate_case cases[] = {
        { 1, 3, 5, 5, 1, 0 }, { 1, 35, 16, 16, 2, 0 }, { 1, 5, 27, 9, 3, 0 },
    };
    if (i >= (int)(sizeof cases / sizeof cases[0])) return (fg_tensor){ 0 };
    const norm_gate_inputs k = norm_gate_grad_example(g, &cases[i]);
    const fg_tensor in[] = { k.gy, k.x, k.w, k.g, k.rstd };
    return FG_APPLY(norm_of_gated_grad, FG_HERE, in, cases[i].groups);
}

/* No vjp: gradients of gradients go through the definition. */
const fg_op_code fg_code_norm_of_gated_grad = {
    .infer = grad_infer, .cost = grad_cost, .decompose = grad_decompose, .example = grad_example,
    .reuse = 1u << 0 | 1u << 1 | 1u << 3,
    .bf16 = { .wide_in = 16, .like = { 2, 0, 4 }, .wide_out = 2 },
};
