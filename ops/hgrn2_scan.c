/* hgrn2_scan.c - the recurrence of HGRN2 from what its projections give: queries and gates with
 * their activations, and gated linear attention.
 *
 *     f = low + (1 - low) sigmoid(z),   k = 1 - f
 *     S_t = diag(f_t) S_(t-1) + k_t v_t^T,   o_t = scale S_t^T silu(q_t)
 *
 * q, z: [B,T,H,K]   v, o: [B,T,H,V]   low: H*K numbers in [0,1), absent: 0   first: i32[B,T]
 * past: i32[1]   state: f32[B,H,K,V], S before row 0; absent: 0.  Second output: S after the last
 * row.  Third: what a device's kernel keeps for the gradient, 324 numbers of bf16 for each row and
 * head of 128 channels; elsewhere a single 0.
 * On a device forward reads q, z, v and writes o, the gradient reads q, z, v, go and writes gq, gz,
 * gv: silu(q), k and ln f are never in memory.  The CPU runs the definition.
 * Source: Qin et al. 2024, "HGRN2: Gated Linear RNNs with State Expansion" (arXiv 2404.07904),
 * section 3. */
#include "linear_attention.h"

fg_tensor (fg_hgrn2_scan)(fg_loc at, fg_tensor q, fg_tensor z, fg_tensor v, fg_tensor low,
                          double scale, fg_tensor state)
{
    const struct fg_attr_hgrn2_scan a = { scale };
    return fg__scan_build(at, &fg_op_table[FG_OP_hgrn2_scan], &a, q, z, v, low, state);
}

static fg_status infer(fg_infer *c)
{
    if (fg__scan_check(c, 4)) return FG_ERR_SHAPE;
    const int64_t n = c->in[1].dim[2] * c->in[1].dim[3];
    FG_REQUIRE(c, !c->given[3] || fg_shape_count(c->in[3]) == n, SHAPE,
               "low must hold %lld numbers, one per head and key channel", (long long)n);
    FG_REQUIRE(c, !c->given[3] || fg__is_real(c->in_type[3]), DTYPE, "low must be f32 or bf16");
    fg__scan_keeps(c, fg__scan_tiles(&c->in[1], &c->in[2]) * FG_HGRN2_KEPT);
    return FG_OK;
}

static void vjp(fg_vjp *v) { fg__scan_vjp(v, &fg_op_table[FG_OP_hgrn2_scan_grad]); }

/* gate: z [B,T,H*K] and low [H*K], as forget_gate wants them;  x: silu(q) and k, of v's dtype, and
 * in x[3] ln f */
static void activate(fg_tensor q, fg_tensor z, fg_tensor low, fg_dtype type, fg_tensor *gate,
                     fg_tensor *x)
{
    const fg_shape s = fg_shape_of(z);
    const int64_t n = s.dim[2] * s.dim[3];
    gate[0] = fg_reshape(z, FG_DIMS(s.dim[0], s.dim[1], n));
    gate[1] = fg_absent(low) ? low : fg_reshape(low, FG_DIMS(n));
    const fg_tensor k = fg_forget_gate(gate[0], gate[1]);
    x[0] = fg_silu(q);
    x[0] = fg_cast(x[0], type);
    x[1] = fg_reshape(k, s);
    x[1] = fg_cast(x[1], type);
    x[3] = fg_reshape(fg_result(k, 1), s);
}

static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_hgrn2_scan *a = attr;
    fg_tensor x[] = { in[0], in[1], in[2], in[3], in[4], in[5], in[6] }, gate[2];
    activate(in[0], in[1], in[3], fg_dtype_of(in[2]), gate, x);
    out[0] = FG_APPLY(gated_linear_attention, FG_HERE, x, a->scale);
    out[1] = fg_result(out[0], 1);
    out[2] = fg_fill(in[0].graph, FG_DIMS(1), 0);
}

/* As gated_linear_attention, silu and forget_gate. */
static fg_cost cost(const fg_infer *c)
{
    const double K = (double)c->in[1].dim[3], V = (double)c->in[2].dim[3];
    const double rows = (double)fg_shape_count(c->in[1]) / K;
    return (fg_cost){ .flops = rows * (4 * K * V + FG_CHUNK * (K + V) + 18 * K),
                      .bytes = fg__bytes_moved(c) };
}

static fg_tensor example(fg_graph *g, int i)
{
    static const struct { int64_t B, T, H, K, V; bool low, state, first; } e[] = {
        { 2, 5, 2, 3, 4, false, false, false }, { 1, 1, 2, 5, 3, true, true, false },
        { 1, 19, 1, 3, 2, true, true, false }, { 2, 6, 1, 2, 3, true, true, true },
        { 1, 1, 1, 1, 1, false, false, false },
    };
    static const int32_t first[12] = { 0, 0, 2, 2, 5, 5, 1, 1, 1, 5, 5, 5 };
    if (i >= (int)(sizeof e / sizeof e[0])) return (fg_tensor){ 0 };
    const fg_tensor q = fg_random(g, e[i].B, e[i].T, e[i].H, e[i].K);
    const fg_tensor z = fg_random(g, e[i].B, e[i].T, e[i].H, e[i].K);
    const fg_tensor v = fg_random(g, e[i].B, e[i].T, e[i].H, e[i].V);
    fg_tensor low = { 0 }, state = { 0 };
    if (e[i].low) {
        low = fg_random(g, 1, e[i].H * e[i].K);
        low = fg_sigmoid(low);
    }
    if (e[i].state) state = fg_random(g, e[i].B, e[i].H, e[i].K, e[i].V);
    if (e[i].first) {
        const fg_tensor f = fg_given_int(g, FG_DIMS(2, 6), first);
        fg_graph_sequence(g, (fg_sequence){ .first = f });
    }
    return fg_hgrn2_scan(q, z, v, low, 0.7, state);
}

const fg_op_code fg_code_hgrn2_scan = {
    .infer = infer, .vjp = vjp, .cost = cost, .decompose = decompose, .example = example,
    .bf16 = { .narrow_in = 4, .wide_in = 1u << 3 | 1u << 6, .narrow_out = 5, .wide_out = 2 },
};

/* ---- hgrn2_scan_grad ------------------------------------------------------------------------ */

/* glow is one zero where there is no bound. */
static fg_status grad_infer(fg_infer *c)
{
    if (fg__scan_grad_infer(c)) return FG_ERR_SHAPE;
    c->out[3] = c->given[5] ? c->in[5] : (fg_shape){ .rank = 0 };
    c->out_type[3] = c->given[5] ? c->in_type[5] : FG_F32;
    return FG_OK;
}

static void grad_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_hgrn2_scan_grad *a = attr;
    fg_tensor a_of[4], gate[2];
    activate(in[2], in[3], in[5], fg_dtype_of(in[4]), gate, a_of);
    const fg_tensor x[] = { in[0], in[1], a_of[0], a_of[1], in[4], a_of[3], in[6], in[7] };
    const fg_tensor g = FG_APPLY(gated_linear_attention_grad, FG_HERE, x, a->scale);
    const fg_tensor gk = fg_reshape(fg_result(g, 1), fg_shape_of(gate[0]));
    const fg_tensor glog_f = fg_reshape(fg_result(g, 3), fg_shape_of(gate[0]));
    const fg_tensor y[] = { gate[0], gate[1], gk, glog_f };
    const fg_tensor gz = FG_APPLY(forget_gate_grad, FG_HERE, y, 0);
    out[0] = fg__silu_grad(FG_HERE, g, in[2]);
    out[1] = fg_reshape(gz, fg_shape_of(in[3]));
    out[2] = fg_result(g, 2);
    out[3] = fg_result(gz, 1);
    if (!fg_absent(in[5])) out[3] = fg_reshape(out[3], fg_shape_of(in[5]));
    out[4] = fg_result(g, 4);
}

static fg_cost grad_cost(const fg_infer *c)
{
    const double K = (double)c->in[3].dim[3], V = (double)c->in[4].dim[3];
    const double rows = (double)fg_shape_count(c->in[3]) / K;
    return (fg_cost){ .flops = rows * (10 * K * V + FG_CHUNK * (3 * K + 2 * V) + 30 * K),
                      .bytes = fg__bytes_moved(c) };
}

const fg_op_code fg_code_hgrn2_scan_grad = {
    .infer = grad_infer, .cost = grad_cost, .decompose = grad_decompose,
    .bf16 = { .narrow_in = 1 | 1u << 4, .wide_in = 1u << 1 | 1u << 5 | 1u << 7, .like = { 3, 4 },
              .narrow_out = 4, .wide_out = 3u << 3 },
};
