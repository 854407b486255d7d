/* shift_norm.c - the token shift with its gate, alone (values) and followed by a norm of every head
 * (keys): what stands behind the projections of FoX (Pro), in one pass over memory.
 *
 *     s_t = a_t x_(t-1) + (1 - a_t) x_t,   a_t = sigmoid(logit_t)                     shift_gate
 *     y_t = (s_t * rstd_t) * w,   rstd_t = 1 / sqrt(mean(s_t^2) + eps)   each head    shift_norm
 *
 * x, y: [B,T,H,D];  logit: [B,T,H];  w: [H*D], or [D] shared by the heads;  rstd: f32[B,T,H];
 * first, past, prev: as in shift_mix.c.
 * No model builds these ops: lowering puts them in the place of sigmoid, shift_mix and rms_norm
 * (fuse.c) on devices that fuse.  There is no kernel for the CPU; it runs the definitions.
 * Forward reads x once and writes y once; the gradients read gy and x, shift x again and write gx:
 * the shifted row is never stored.
 * Source: Lin et al. 2025, "Forgetting Transformer", arXiv 2503.02130, section 3: KV-shift and
 * QK-norm. */
#include "norm.h"

static double size_of(fg_dtype t) { return t == FG_BF16 ? 2 : 4; }

/* `over` operations for each element of x, and every tensor moved once. */
static fg_cost cost_of(const fg_infer *c, double over)
{
    double bytes = 0;
    for (int i = 0; i < c->n_in; i++)
        if (c->given[i]) bytes += (double)fg_shape_count(c->in[i]) * size_of(c->in_type[i]);
    for (int o = 0; o < c->n_out; o++)
        bytes += (double)fg_shape_count(c->out[o]) * size_of(c->out_type[o]);
    return (fg_cost){ .flops = over * (double)fg_shape_count(c->in[0]), .bytes = bytes };
}

static fg_tensor gate_of(fg_tensor logit)
{
    const fg_tensor z = fg_cast(logit, FG_F32);
    return fg_sigmoid(z);
}

static fg_tensor shifted(fg_tensor x, fg_tensor a, const fg_tensor *sequence)
{
    const fg_tensor in[] = { x, a, sequence[0], sequence[1], sequence[2] };
    return FG_APPLY(shift_mix, FG_HERE, in, 0);
}

/* Test inputs. */
static const struct { int64_t B, T, H, D; bool first, shared; } cases[] = {
    { 2, 3, 2, 5, false, false },
    { 2, 5, 1, 3, true, true },
    { 1, 70, 3, 8, false, false },
    { 2, 5, 3, 16, true, true },       /* one gain shared by the heads */
    { 1, 3, 2, 64, false, false },
    { 1, 1, 5, 64, false, false },     /* more than a warp's heads */
};
enum { CASES = sizeof cases / sizeof cases[0] };

typedef struct { fg_tensor x, logit, w, first; } inputs;

static inputs inputs_of(fg_graph *g, int i, bool gain)
{
    static const int32_t first[10] = { 0, 0, 2, 3, 3, 2, 2, 2, 2, 2 };
    const int64_t B = cases[i].B, T = cases[i].T, H = cases[i].H, D = cases[i].D;
    inputs s = { .x = fg_random(g, B, T, H, D) };
    s.logit = fg_random(g, B, T, H);
    if (gain) s.w = fg_random(g, cases[i].shared ? D : H * D);
    if (cases[i].first) s.first = fg_given_int(g, FG_DIMS(B, T), first);
    return s;
}

/* ---- shift_gate ----------------------------------------------------------------------------- */

static fg_status infer(fg_infer *c)
{
    c->out[0] = c->in[0];
    return fg__check_shift(c, 2);
}

static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    (void)attr;
    const fg_tensor a = gate_of(in[1]);
    out[0] = shifted(in[0], a, in + 2);
}

static fg_cost cost(const fg_infer *c) { return cost_of(c, 3); }

static fg_tensor example(fg_graph *g, int i)
{
    if (i >= CASES) return (fg_tensor){ 0 };
    const inputs s = inputs_of(g, i, false);
    const fg_tensor in[] = { s.x, s.logit, s.first, { 0 }, { 0 } };
    return FG_APPLY(shift_gate, FG_HERE, in, 0);
}

/* No vjp here and below: it goes through the definition, and is fused in its turn. */
const fg_op_code fg_code_shift_gate = {
    .infer = infer, .decompose = decompose, .cost = cost, .example = example,
    .bf16 = { .like = { 1 } },
};

/* ---- shift_gate_grad ------------------------------------------------------------------------ */

static fg_status grad_infer(fg_infer *c)
{
    FG_REQUIRE(c, fg_shape_equal(c->in[0], c->in[1]), SHAPE, "gy must have x's shape");
    c->out[0] = c->in[1];
    c->out[1] = c->in[2];
    c->out_type[0] = c->in_type[1];
    c->out_type[1] = c->in_type[2];
    return FG_OK;
}

/* The gradients by x and logit of s, given gs. */
static void through_gate(fg_tensor gs, fg_tensor x, fg_tensor a, fg_tensor first, fg_tensor *gx,
                         fg_tensor *glogit)
{
    const fg_tensor in[] = { gs, x, a, first };
    *gx = FG_APPLY(shift_mix_grad, FG_HERE, in, 0);
    *glogit = fg__sigmoid_grad(FG_HERE, fg_result(*gx, 1), a);
}

static void grad_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    (void)attr;
    const fg_tensor a = gate_of(in[2]);
    through_gate(in[0], in[1], a, in[3], &out[0], &out[1]);
}

static fg_cost grad_cost(const fg_infer *c) { return cost_of(c, 6); }

static fg_tensor grad_example(fg_graph *g, int i)
{
    if (i >= CASES) return (fg_tensor){ 0 };
    const inputs s = inputs_of(g, i, false);
    const fg_tensor gy = (fg_random)(FG_HERE, g, fg_shape_of(s.x));
    const fg_tensor in[] = { gy, s.x, s.logit, s.first };
    return FG_APPLY(shift_gate_grad, FG_HERE, in, 0);
}

/* no_grad: made by lowering alone, behind all gradients. */
const fg_op_code fg_code_shift_gate_grad = {
    .infer = grad_infer, .decompose = grad_decompose, .cost = grad_cost, .example = grad_example,
    .no_grad = true, .bf16 = { .like = { 2, 3 } },
};

/* ---- shift_norm ----------------------------------------------------------------------------- */

static fg_status check_gain(fg_infer *c, const fg_shape *x, int w)
{
    const int64_t D = x->dim[3], n = x->dim[2] * D;
    FG_REQUIRE(c, fg__is_real(c->in_type[w]), DTYPE, "w must be f32 or bf16");
    FG_REQUIRE(c, n > 0 && c->in[w].rank == 1 && (c->in[w].dim[0] == n || c->in[w].dim[0] == D),
               SHAPE, "w must have one axis of %lld, or of %lld for all heads", (long long)n,
               (long long)D);
    return FG_OK;
}

static fg_status norm_op_infer(fg_infer *c)
{
    const struct fg_attr_shift_norm *a = c->attr;
    const fg_status s = fg__check_shift(c, 3);
    if (s) return s;
    FG_REQUIRE(c, a->eps >= 0, USAGE, "eps is %g and must not be negative", a->eps);
    c->out[0] = c->in[0];
    c->out[1] = c->in[1];
    c->out_type[1] = FG_F32;
    return check_gain(c, &c->in[0], 2);
}

/* x [B,T,H,D] as rows [B,T,H*D] of H groups, which rms_norm takes. */
static fg_tensor merged(fg_tensor x)
{
    return fg_reshape(x, FG_DIMS(fg_dim(x, 0), fg_dim(x, 1), fg_dim(x, 2) * fg_dim(x, 3)));
}

static void norm_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_shift_norm *at = attr;
    const fg_tensor a = gate_of(in[1]), s = shifted(in[0], a, in + 3), rows = merged(s);
    const fg_tensor y = fg_rms_norm(rows, in[2], at->eps, fg_dim(in[0], 2));
    out[0] = fg_reshape(y, fg_shape_of(in[0]));
    out[1] = fg_result(y, 1);
}

static fg_cost norm_cost(const fg_infer *c) { return cost_of(c, 7); }

static fg_tensor norm_example(fg_graph *g, int i)
{
    if (i >= CASES) return (fg_tensor){ 0 };
    const inputs s = inputs_of(g, i, true);
    const fg_tensor in[] = { s.x, s.logit, s.w, s.first, { 0 }, { 0 } };
    return FG_APPLY(shift_norm, FG_HERE, in, 1e-5);
}

const fg_op_code fg_code_shift_norm = {
    .infer = norm_op_infer, .decompose = norm_decompose, .cost = norm_cost,
    .example = norm_example, .bf16 = { .narrow_out = 1, .wide_out = 2 },
};

/* ---- shift_norm_grad ------------------------------------------------------------------------ */

static fg_status norm_grad_op_infer(fg_infer *c)
{
    const fg_shape *x = &c->in[1];
    FG_REQUIRE(c, fg_shape_equal(c->in[0], *x), SHAPE, "gy must have x's shape");
    FG_REQUIRE(c, fg_shape_equal(c->in[4], c->in[2]), SHAPE, "rstd must have logit's shape");
    c->out[0] = *x;
    c->out[1] = c->in[3];
    c->out[2] = c->in[2];
    c->out_type[0] = c->in_type[1];
    c->out_type[1] = c->in_type[3];
    c->out_type[2] = c->in_type[2];
    return check_gain(c, x, 3);
}

/* s = shift_gate(x), h = s rstd:  gs = rstd (w gy - h mean(w gy h)),  gw = sum of gy h;  then gs
 * goes through the shift and its gate. */
static void norm_grad_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor none[2] = { { 0 } }, x = in[1], sequence[3] = { in[5], none[0], none[1] };
    (void)attr;
    const fg_tensor a = gate_of(in[2]), s = shifted(x, a, sequence), rows = merged(s);
    const fg_tensor gy = merged(in[0]), norm[] = { gy, rows, in[3], in[4], none[0] };
    const fg_tensor gs = FG_APPLY(rms_norm_grad, FG_HERE, norm, fg_dim(x, 2));
    const fg_tensor heads = fg_reshape(gs, fg_shape_of(x));
    through_gate(heads, x, a, in[5], &out[0], &out[2]);
    out[1] = fg_result(gs, 1);
}

static fg_cost norm_grad_cost(const fg_infer *c) { return cost_of(c, 20); }

static fg_tensor norm_grad_example(fg_graph *g, int i)
{
    if (i >= CASES) return (fg_tensor){ 0 };
    const inputs s = inputs_of(g, i, true);
    const fg_tensor gy = (fg_random)(FG_HERE, g, fg_shape_of(s.x));
    const fg_tensor rstd = (fg_random)(FG_HERE, g, fg_shape_of(s.logit));
    const fg_tensor in[] = { gy, s.x, s.logit, s.w, rstd, s.first };
    return FG_APPLY(shift_norm_grad, FG_HERE, in, 0);
}

const fg_op_code fg_code_shift_norm_grad = {
    .infer = norm_grad_op_infer, .decompose = norm_grad_decompose, .cost = norm_grad_cost,
    .example = norm_grad_example, .no_grad = true,
    .bf16 = { .wide_in = 16, .like = { 2, 0, 3 }, .wide_out = 2 },
};
