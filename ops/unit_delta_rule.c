/* unit_delta_rule.c - the delta rule with queries and keys scaled to unit length: DeltaNet's mixer.
 *
 *     o = delta_rule(l2_norm(q), l2_norm(k), v, beta),   l2_norm(x) = x / sqrt(sum(x^2) + eps)
 *
 * Shapes as in delta_rule.c; q and k of any length.  Third output: what a device's kernel keeps for
 * the gradient, 650 numbers of bf16 for each row and head of 128 channels; elsewhere a single 0.
 * On a device forward reads q, k, v and writes o and what it keeps, the gradient reads that and go
 * and writes gq, gk, gv.  The CPU runs the definition.
 * Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence
 * Length" (arXiv 2406.06484), section 3.3. */
#include "linear_attention.h"

fg_tensor (fg_unit_delta_rule)(fg_loc at, fg_tensor q, fg_tensor k, fg_tensor v, fg_tensor beta,
                               double scale, double eps, fg_tensor state)
{
    const struct fg_attr_unit_delta_rule a = { scale, eps };
    return fg__scan_build(at, &fg_op_table[FG_OP_unit_delta_rule], &a, q, k, v, beta, state);
}

static fg_status infer(fg_infer *c)
{
    const struct fg_attr_unit_delta_rule *a = c->attr;
    FG_REQUIRE(c, a->eps >= 0, USAGE, "eps is %g and must not be negative", a->eps);
    if (fg__delta_check(c)) return FG_ERR_SHAPE;
    fg__scan_keeps(c, fg__scan_tiles(&c->in[1], &c->in[2]) * FG_UNIT_DELTA_KEPT);
    return FG_OK;
}

static void vjp(fg_vjp *v) { fg__scan_vjp(v, &fg_op_table[FG_OP_unit_delta_rule_grad]); }

static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_unit_delta_rule *a = attr;
    const fg_tensor unit_q = fg_l2_norm(in[0], a->eps);
    const fg_tensor unit_k = fg_l2_norm(in[1], a->eps);
    const fg_tensor q = fg_cast(unit_q, fg_dtype_of(in[2]));
    const fg_tensor k = fg_cast(unit_k, fg_dtype_of(in[2]));
    const fg_tensor x[] = { q, k, in[2], in[3], in[4], in[5], in[6] };
    out[0] = FG_APPLY(delta_rule, FG_HERE, x, a->scale);
    out[1] = fg_result(out[0], 1);
    out[2] = fg_fill(in[0].graph, FG_DIMS(1), 0);
}

/* As l2_norm and delta_rule. */
static fg_cost cost(const fg_infer *c)
{
    const double rows = (double)fg_shape_count(c->in[3]);
    const double K = (double)c->in[1].dim[3], V = (double)c->in[2].dim[3];
    return (fg_cost){ .flops = rows * (6 * K * V + FG_CHUNK * (2 * K + 2 * V) + 6 * K),
                      .bytes = fg__bytes_moved(c) };
}

static fg_tensor example(fg_graph *g, int i)
{
    static const struct { int64_t B, T, H, K, V; bool state, first; } e[] = {
        { 2, 5, 2, 3, 4, false, false }, { 1, 1, 2, 5, 3, true, false },
        { 2, 6, 1, 2, 3, true, true }, { 1, 1, 1, 1, 1, false, false },
    };
    static const int32_t first[12] = { 0, 0, 2, 2, 5, 5, 1, 1, 1, 5, 5, 5 };
    if (i >= (int)(sizeof e / sizeof e[0])) return (fg_tensor){ 0 };
    const fg_tensor q = fg_random(g, e[i].B, e[i].T, e[i].H, e[i].K);
    const fg_tensor k = fg_random(g, e[i].B, e[i].T, e[i].H, e[i].K);
    const fg_tensor v = fg_random(g, e[i].B, e[i].T, e[i].H, e[i].V);
    fg_tensor beta = fg_random(g, e[i].B, e[i].T, e[i].H), state = { 0 };
    beta = fg_sigmoid(beta);
    if (e[i].state) state = fg_random(g, e[i].B, e[i].H, e[i].K, e[i].V);
    if (e[i].first) {
        const fg_tensor f = fg_given_int(g, FG_DIMS(2, 6), first);
        fg_graph_sequence(g, (fg_sequence){ .first = f });
    }
    return fg_unit_delta_rule(q, k, v, beta, 0.7, 1e-2, state);
}

const fg_op_code fg_code_unit_delta_rule = {
    .infer = infer, .vjp = vjp, .cost = cost, .decompose = decompose, .example = example,
    .bf16 = { .narrow_in = 4, .wide_in = 1u << 6, .narrow_out = 5, .wide_out = 2 },
};

/* ---- unit_delta_rule_grad ------------------------------------------------------------------- */

static void grad_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_unit_delta_rule_grad *a = attr;
    const fg_tensor unit_q = fg_l2_norm(in[2], a->eps);
    const fg_tensor unit_k = fg_l2_norm(in[3], a->eps);
    const fg_tensor q = fg_cast(unit_q, fg_dtype_of(in[4]));
    const fg_tensor k = fg_cast(unit_k, fg_dtype_of(in[4]));
    const fg_tensor x[] = { in[0], in[1], q, k, in[4], in[5], in[6], in[7] };
    const fg_tensor g = FG_APPLY(delta_rule_grad, FG_HERE, x, a->scale);
    const fg_tensor by_q[] = { g, unit_q, fg_result(unit_q, 1) };
    const fg_tensor by_k[] = { fg_result(g, 1), unit_k, fg_result(unit_k, 1) };
    out[0] = FG_APPLY(l2_norm_grad, FG_HERE, by_q, 0);
    out[1] = FG_APPLY(l2_norm_grad, FG_HERE, by_k, 0);
    for (int i = 2; i < 5; i++) out[i] = fg_result(g, i);
}

static fg_cost grad_cost(const fg_infer *c)
{
    const double rows = (double)fg_shape_count(c->in[5]);
    const double K = (double)c->in[3].dim[3], V = (double)c->in[4].dim[3];
    return (fg_cost){ .flops = rows * (18 * K * V + FG_CHUNK * (8 * K + 8 * V) + 16 * K),
                      .bytes = fg__bytes_moved(c) };
}

const fg_op_code fg_code_unit_delta_rule_grad = {
    .infer = fg__scan_grad_infer, .cost = grad_cost, .decompose = grad_decompose,
    .bf16 = { .narrow_in = 1 | 1u << 4, .wide_in = 1u << 1 | 1u << 7, .narrow_out = 4,
              .wide_out = 1u << 4, .like = { 3, 4, 0, 6 } },
};
