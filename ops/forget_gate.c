/* forget_gate.c - the forget gate of HGRN2, bounded from below, and the keys it leaves.
 *
 *     f = low + (1 - low) sigmoid(z),   k = 1 - f = (1 - low) sigmoid(-z),   log_f = ln f
 *
 * z, k: [..., D];  low: D numbers in [0, 1), which all rows share; absent: 0;  log_f: f32[..., D].
 * k is computed without the subtraction, and without a bound log_f is log_sigmoid(z): both are
 * exact where f is near 1, which is where a gate remembers.  k may be bf16; log_f is summed over
 * positions and stays f32.
 * On a device forward reads z and writes k and log_f, the gradient reads z, gk and glog_f and
 * writes gz: once.  The CPU runs the definition.
 * Source: Qin et al. 2024, "HGRN2: Gated Linear RNNs with State Expansion" (arXiv 2404.07904),
 * section 3. */
#include "internal.h"

fg_tensor (fg_forget_gate)(fg_loc at, fg_tensor z, fg_tensor low)
{
    return FG_APPLY(forget_gate, at, ((const fg_tensor[]){ z, low }), 0);
}

static fg_status check(fg_infer *c)
{
    const fg_shape *z = &c->in[0];
    FG_REQUIRE(c, fg__is_real(c->in_type[0]), DTYPE, "z must be f32 or bf16");
    FG_REQUIRE(c, z->rank >= 1, SHAPE, "z needs at least one axis");
    if (!c->given[1]) return FG_OK;
    FG_REQUIRE(c, fg__is_real(c->in_type[1]), DTYPE, "low must be f32 or bf16");
    FG_REQUIRE(c, c->in[1].rank <= z->rank && fg__last(&c->in[1]) == fg__last(z) &&
               fg_shape_count(c->in[1]) == fg__last(z), SHAPE,
               "low must hold %lld numbers, the extent of z's last axis, along its own last",
               (long long)fg__last(z));
    return FG_OK;
}

static fg_status infer(fg_infer *c)
{
    c->out[0] = c->out[1] = c->in[0];
    c->out_type[0] = c->in_type[0];
    c->out_type[1] = FG_F32;
    return check(c);
}

/* With s = sigmoid(z):  gz = (1 - low) s (1 - s) (glog_f / f - gk),
 * glow = sum over rows of (1 - s) (glog_f / f - gk). */
static void vjp(fg_vjp *v)
{
    const fg_tensor in[] = { v->in[0], v->in[1], v->gout[0], v->gout[1] };
    v->gin[0] = FG_APPLY(forget_gate_grad, FG_HERE, in, 0);
    if (!fg_absent(v->in[1])) v->gin[1] = fg_result(v->gin[0], 1);
}

static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    (void)attr;
    const fg_tensor z = fg_cast(in[0], FG_F32), minus = fg_neg(z), rest = fg_sigmoid(minus);
    if (fg_absent(in[1])) {
        out[0] = fg_cast(rest, fg_dtype_of(in[0]));
        out[1] = fg_log_sigmoid(z);
        return;
    }
    const fg_tensor low = fg_cast(in[1], FG_F32), room = fg_scale(low, -1, 1), s = fg_sigmoid(z);
    const fg_tensor above = fg_mul(room, s), f = fg_add(above, low), k = fg_mul(room, rest);
    out[0] = fg_cast(k, fg_dtype_of(in[0]));
    out[1] = fg_log(f);
}

static fg_cost cost(const fg_infer *c)
{
    return (fg_cost){ .flops = 8 * (double)fg_shape_count(c->in[0]), .bytes = fg__bytes_moved(c) };
}

/* Numbers in (0, 1), [1,D] */
static fg_tensor example_low(fg_graph *g, int64_t D)
{
    const fg_tensor raw = fg_random(g, 1, D);
    return fg_sigmoid(raw);
}

static fg_tensor example(fg_graph *g, int i)
{
    static const int64_t rows[] = { 3, 3, 37, 2, 1 }, extent[] = { 5, 5, 16, 24, 1 };
    if (i >= (int)(sizeof rows / sizeof rows[0])) return (fg_tensor){ 0 };
    const fg_tensor z = fg_random(g, rows[i], extent[i]);
    fg_tensor low = { 0 };
    if (i % 2 == 0) low = example_low(g, extent[i]);
    return fg_forget_gate(z, low);
}

const fg_op_code fg_code_forget_gate = {
    .infer = infer, .vjp = vjp, .cost = cost, .decompose = decompose, .example = example,
    .bf16 = { .wide_in = 2, .narrow_out = 1, .wide_out = 2 },
};

/* ---- forget_gate_grad ----------------------------------------------------------------------- */

/* glow is one zero where there is no bound. */
static fg_status grad_infer(fg_infer *c)
{
    for (int i = 2; i < 4; i++)
        FG_REQUIRE(c, !c->given[i] || fg_shape_equal(c->in[i], c->in[0]), SHAPE,
                   "gk and glog_f must have z's shape");
    c->out[0] = c->in[0];
    c->out_type[0] = c->in_type[0];
    c->out[1] = c->given[1] ? c->in[1] : (fg_shape){ .rank = 0 };
    c->out_type[1] = c->given[1] ? c->in_type[1] : FG_F32;
    return check(c);
}

static void grad_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    (void)attr;
    const bool bound = !fg_absent(in[1]);
    const fg_tensor z = fg_cast(in[0], FG_F32), s = fg_sigmoid(z);
    const fg_tensor minus = fg_neg(z), rest = fg_sigmoid(minus);
    const fg_tensor low = bound ? fg_cast(in[1], FG_F32) : (fg_tensor){ 0 };
    const fg_tensor room = bound ? fg_scale(low, -1, 1) : low;
    fg_tensor d = { 0 }, f = s;                   /* d = glog_f / f - gk */
    if (bound) {
        f = fg_mul(room, s);
        f = fg_add(f, low);
    }
    if (!fg_absent(in[3])) d = fg_div(in[3], f);
    if (!fg_absent(in[2])) {
        const fg_tensor gk = fg_cast(in[2], FG_F32);
        d = fg_absent(d) ? fg_neg(gk) : fg_sub(d, gk);
    }
    if (fg_absent(d)) d = fg_scale(z, 0, 0);
    const fg_tensor each = fg_mul(rest, d);
    fg_tensor gz = fg_mul(s, each);
    if (bound) gz = fg_mul(gz, room);
    out[0] = fg_cast(gz, fg_dtype_of(in[0]));
    if (!bound) {
        out[1] = fg_fill(z.graph, (fg_shape){ .rank = 0 }, 0);
        return;
    }
    const fg_tensor glow = fg_sum_to(each, fg_shape_of(in[1]));
    out[1] = fg_cast(glow, fg_dtype_of(in[1]));
}

static fg_cost grad_cost(const fg_infer *c)
{
    return (fg_cost){ .flops = 12 * (double)fg_shape_count(c->in[0]), .bytes = fg__bytes_moved(c) };
}

static fg_tensor grad_example(fg_graph *g, int i)
{
    static const int64_t rows[] = { 3, 3, 37, 2, 1 }, extent[] = { 5, 5, 16, 24, 1 };
    if (i >= (int)(sizeof rows / sizeof rows[0])) return (fg_tensor){ 0 };
    const fg_tensor z = fg_random(g, rows[i], extent[i]);
    fg_tensor low = { 0 }, gk = { 0 };
    if (i % 2 == 0) low = example_low(g, extent[i]);
    if (i != 4) gk = fg_random(g, rows[i], extent[i]);
    const fg_tensor glog_f = fg_random(g, rows[i], extent[i]);
    const fg_tensor in[] = { z, low, gk, glog_f };
    return FG_APPLY(forget_gate_grad, FG_HERE, in, 0);
}

/* No vjp: gradients of gradients go through the definition. */
const fg_op_code fg_code_forget_gate_grad = {
    .infer = grad_infer, .cost = grad_cost, .decompose = grad_decompose, .example = grad_example,
    .bf16 = { .wide_in = 2, .like = { 1 }, .wide_out = 2 },
};
