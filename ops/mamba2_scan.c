/* mamba2_scan.c - the state space scan from what Mamba-2's projection and parameters give.
 *
 *     y = ssd_scan(x, softplus(dt + bias), -e^a_log, b, c, d)
 *
 * Shapes as in ssd_scan.c; bias, a_log: [H].  Third output: what a device's kernel keeps for the
 * gradient, the states that enter every 128 tokens, bf16; elsewhere a single 0.
 * On a device the time steps, their rates and the gradients of both are made by the kernels of the
 * scan, and the gradient reads the states instead of making them again.  The CPU runs the
 * definition.
 * Source: Dao and Gu 2024, "Transformers are SSMs" (arXiv 2405.21060), section 7. */
#include "ssd_tile.h"

enum { BIAS = FG_SSD_PAST + 1, INPUTS };
enum { BACK_BIAS = FG_SSD_BACK + FG_SSD_FIRST + 1, BACK_KEPT, BACK_INPUTS };

fg_tensor (fg_mamba2_scan)(fg_loc at, fg_tensor x, fg_tensor dt, fg_tensor bias, fg_tensor a_log,
                           fg_tensor b, fg_tensor c, fg_tensor d, fg_tensor state)
{
    fg_tensor in[] = { x, dt, a_log, b, c, d, state, { 0 }, { 0 }, bias };
    return fg__ssd_build(at, &fg_op_table[FG_OP_mamba2_scan], INPUTS, in);
}

/* Elements of the states that the kernels keep, of heads that they take. */
static int64_t kept(const fg_shape *x, const fg_shape *b)
{
    const int64_t P = x->dim[3], N = b->dim[3];
    const bool fits = P == 64 && (N == 64 || N == 128) && x->dim[1] > 16;
    return fits ? x->dim[0] * x->dim[2] * ((x->dim[1] + 127) / 128) * P * N : 1;
}

static fg_status infer(fg_infer *c)
{
    const fg_status s = fg__ssd_infer(c);
    if (s) return s;
    FG_REQUIRE(c, fg_shape_equal(c->in[BIAS], c->in[FG_SSD_A]), SHAPE,
               "bias must be [H] = [%lld], one number per head", (long long)c->in[0].dim[2]);
    FG_REQUIRE(c, fg__is_real(c->in_type[BIAS]), DTYPE, "bias must be f32 or bf16");
    c->out[2] = FG_DIMS(kept(&c->in[FG_SSD_X], &c->in[FG_SSD_B]));
    c->out_type[2] = FG_BF16;
    return FG_OK;
}

static void vjp(fg_vjp *v)
{
    fg__ssd_vjp(v, &fg_op_table[FG_OP_mamba2_scan_grad], BACK_INPUTS, v->in[BIAS], v->out[2]);
}

/* s = dt + bias, so that the scan's dt is softplus(s) and its a is *rate */
static fg_tensor step_of(fg_tensor dt, fg_tensor bias, fg_tensor a_log, fg_tensor *rate)
{
    const fg_tensor wide = fg_cast(dt, FG_F32), wide_bias = fg_cast(bias, FG_F32);
    const fg_tensor log = fg_cast(a_log, FG_F32), size = fg_exp(log);
    *rate = fg_neg(size);
    return fg_add(wide, wide_bias);
}

static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    fg_tensor x[FG_SSD_PAST + 1];
    (void)attr;
    for (int i = 0; i <= FG_SSD_PAST; i++) x[i] = in[i];
    const fg_tensor s = step_of(in[FG_SSD_DT], in[BIAS], in[FG_SSD_A], &x[FG_SSD_A]);
    x[FG_SSD_DT] = fg_softplus(s);
    out[0] = FG_APPLY(ssd_scan, FG_HERE, x, 0);
    out[1] = fg_result(out[0], 1);
    out[2] = fg_fill(in[0].graph, FG_DIMS(1), 0);
}

/* As add, softplus, exp, neg and ssd_scan. */
static fg_cost cost(const fg_infer *c)
{
    fg_cost all = fg__ssd_cost(c);
    const double steps = (double)fg_shape_count(c->in[FG_SSD_DT]);
    all.flops += 11 * steps + 11 * (double)fg_shape_count(c->in[FG_SSD_A]);
    all.bytes += 2 * (steps + (double)fg_shape_count(c->out[2]));
    return all;
}

static fg_tensor example(fg_graph *g, int i)
{
    static const struct { int64_t B, T, H, P, G, N; bool d, state, documents; } cases[] = {
        { 1, 5, 2, 3, 1, 2, true, false, false },
        { 2, 20, 2, 3, 1, 5, true, false, true },        /* documents, padding, in chunks */
        { 1, 67, 3, 2, 1, 3, false, true, false },       /* more than a chunk */
        { 1, 1, 1, 1, 1, 1, true, true, false },
    };
    if (i >= (int)(sizeof cases / sizeof cases[0])) return (fg_tensor){ 0 };
    const int64_t B = cases[i].B, T = cases[i].T, H = cases[i].H, P = cases[i].P, N = cases[i].N;
    const fg_tensor x = fg_random(g, B, T, H, P);
    const fg_tensor dt = fg_random(g, B, T, H);
    const fg_tensor bias = fg_random(g, H);
    const fg_tensor a_log = fg_random(g, H);
    const fg_tensor b = fg_random(g, B, T, cases[i].G, N);
    const fg_tensor c = fg_random(g, B, T, cases[i].G, N);
    const fg_tensor d = cases[i].d ? fg_random(g, H) : (fg_tensor){ 0 };
    const fg_tensor state = cases[i].state ? fg_random(g, B, H, P, N) : (fg_tensor){ 0 };
    if (cases[i].documents) fg__ssd_documents(g);
    return fg_mamba2_scan(x, dt, bias, a_log, b, c, d, state);
}

const fg_op_code fg_code_mamba2_scan = {
    .infer = infer, .vjp = vjp, .decompose = decompose, .cost = cost, .example = example,
    .bf16 = { .narrow_in = 1u << FG_SSD_X | 1u << FG_SSD_B | 1u << FG_SSD_C,
              .wide_in = 1u << FG_SSD_A | 1u << FG_SSD_D | 1u << FG_SSD_STATE | 1u << BIAS,
              .narrow_out = 1 | 1u << 2, .wide_out = 2 },
};

/* ---- mamba2_scan_grad ----------------------------------------------------------------------- */

static fg_status grad_infer(fg_infer *c)
{
    const fg_status s = fg__ssd_grad_infer(c);
    c->out[7] = c->in[BACK_BIAS];
    c->out_type[7] = c->in_type[BACK_BIAS];
    return s;
}

static void grad_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const int dt = FG_SSD_BACK + FG_SSD_DT, a = FG_SSD_BACK + FG_SSD_A;
    fg_tensor x[BACK_BIAS];
    (void)attr;
    for (int i = 0; i < BACK_BIAS; i++) x[i] = in[i];
    const fg_tensor s = step_of(in[dt], in[BACK_BIAS], in[a], &x[a]);
    x[dt] = fg_softplus(s);
    const fg_tensor g = FG_APPLY(ssd_scan_grad, FG_HERE, x, 0);
    for (int i = 0; i < 7; i++) out[i] = fg_result(g, i);
    out[1] = fg__softplus_grad(FG_HERE, out[1], s);
    out[2] = fg_mul(out[2], x[a]);
    out[7] = fg_sum_to(out[1], fg_shape_of(in[BACK_BIAS]));
}

static fg_cost grad_cost(const fg_infer *c)
{
    fg_cost all = fg__ssd_grad_cost(c);
    const double steps = (double)fg_shape_count(c->in[FG_SSD_BACK + FG_SSD_DT]);
    all.flops += 21 * steps + 12 * (double)fg_shape_count(c->in[FG_SSD_BACK + FG_SSD_A]);
    all.bytes += 2 * (2 * steps + (double)fg_shape_count(c->in[BACK_KEPT]));
    return all;
}

const fg_op_code fg_code_mamba2_scan_grad = {
    .infer = grad_infer, .cost = grad_cost, .decompose = grad_decompose,
    .bf16 = { .narrow_in = 1 | (1u << FG_SSD_X | 1u << FG_SSD_B | 1u << FG_SSD_C) << FG_SSD_BACK,
              .wide_in = 2 | 1u << BACK_BIAS
                  | (1u << FG_SSD_A | 1u << FG_SSD_D | 1u << FG_SSD_STATE) << FG_SSD_BACK,
              .like = { 0, 1 + FG_SSD_BACK + FG_SSD_DT },
              .narrow_out = 1u << 0 | 1u << 3 | 1u << 4,
              .wide_out = 1u << 2 | 1u << 5 | 1u << 6 | 1u << 7 },
};
