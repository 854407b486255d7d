/* forget_decode.c - attention of one new token to the caches, from the query's norm to the output
 * gate.
 *
 *     y = gated_norm(forget_attention(rms_norm(q, wq), k, v, log_f), wo, g)      head by head
 *
 * q, g, y: [B,1,H D]   wq, wo: [H D], or [D] shared by the heads   k, v: [B,C,H,D]
 * log_f: f32[B,C,H]   first: i32[B,1]   past: i32[1], the token's position
 * Lowering makes it (fuse_few.c), models do not.
 * Bytes: the visible rows of k, v and log_f once; the query is as good as free. */
#include "internal.h"

enum { Q, WQ, K, V, LOG_F, FIRST, PAST, G, WO };

static fg_status infer(fg_infer *c)
{
    const struct fg_attr_forget_decode *a = c->attr;
    const fg_shape *k = &c->in[K];
    FG_REQUIRE(c, k->rank == 4 && fg_shape_equal(*k, c->in[V]), SHAPE,
               "k and v must be [B,C,H,D], of one shape");
    const int64_t B = k->dim[0], H = k->dim[2], D = k->dim[3];
    const fg_shape row = FG_DIMS(B, 1, H * D);
    FG_REQUIRE(c, fg_shape_equal(c->in[Q], row) && fg_shape_equal(c->in[G], row), SHAPE,
               "q and g must be [B,1,H D] = [%lld,1,%lld]", (long long)B, (long long)(H * D));
    for (int i = WQ; i <= WO; i += WO - WQ)
        FG_REQUIRE(c, c->in[i].rank == 1 && (c->in[i].dim[0] == H * D || c->in[i].dim[0] == D),
                   SHAPE, "wq and wo must have one axis of %lld, or of %lld", (long long)(H * D),
                   (long long)D);
    FG_REQUIRE(c, fg_shape_equal(c->in[LOG_F], FG_DIMS(B, k->dim[1], H))
               && c->in_type[LOG_F] == FG_F32, SHAPE, "log_f must be f32[B,C,H]");
    FG_REQUIRE(c, !c->given[FIRST] || (c->in_type[FIRST] == FG_I32
                                       && fg_shape_equal(c->in[FIRST], FG_DIMS(B, 1))), SHAPE,
               "first must be i32[%lld,1]", (long long)B);
    FG_REQUIRE(c, c->in_type[PAST] == FG_I32 && fg_shape_count(c->in[PAST]) == 1, SHAPE,
               "past must be i32[1]");
    for (int i = Q; i <= WO; i++)
        FG_REQUIRE(c, i == FIRST || i == PAST || fg__is_real(c->in_type[i]), DTYPE,
                   "all but first and past must be real");
    FG_REQUIRE(c, c->in_type[V] == c->in_type[K], DTYPE, "k and v must have one dtype");
    FG_REQUIRE(c, a->window >= 0 && a->eps >= 0 && a->q_eps >= 0, USAGE,
               "window, eps and q_eps must not be negative");
    c->out[0] = row;
    return FG_OK;
}

static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_forget_decode *a = attr;
    const int64_t B = fg_dim(in[K], 0), H = fg_dim(in[K], 2), D = fg_dim(in[K], 3);
    fg_tensor q = fg_rms_norm(in[Q], in[WQ], a->q_eps, H);
    q = fg_cast(q, fg_dtype_of(in[K]));
    q = fg_reshape(q, FG_DIMS(B, 1, H, D));
    const fg_tensor parts[] = { q, in[K], in[V], in[LOG_F], in[FIRST], in[PAST] };
    fg_tensor o = FG_APPLY(forget_attention, FG_HERE, parts, a->scale, a->window);
    o = fg_reshape(o, FG_DIMS(B, 1, H * D));
    out[0] = fg_gated_norm(o, in[WO], in[G], a->eps, H);
}

static fg_cost cost(const fg_infer *c)
{
    const double keys = (double)fg_shape_count(c->in[K]), gates = (double)fg_shape_count(c->in[LOG_F]);
    return (fg_cost){ .flops = 4 * keys + 4 * gates };
}

static fg_tensor example(fg_graph *g, int i)
{
    static const struct { int64_t B, C, H, D; bool pad, shared; int64_t window; int32_t past; }
    cases[] = {
        { 1, 5, 2, 3, false, false, 0, 3 },   { 1, 100, 3, 64, false, true, 0, 99 },
        { 2, 70, 2, 64, true, false, 0, 40 }, { 1, 3000, 2, 64, false, false, 0, 2600 },
        { 2, 300, 1, 128, true, false, 100, 257 }, { 2, 9, 1, 64, true, false, 0, 1 },
        { 1, 20000, 1, 64, false, false, 0, 19999 },
    };
    if (i >= (int)(sizeof cases / sizeof cases[0])) return (fg_tensor){ 0 };
    const int64_t B = cases[i].B, C = cases[i].C, H = cases[i].H, D = cases[i].D;
    static const int32_t first[2] = { 0, 6 };
    fg_tensor pad = { 0 };
    const fg_tensor q = fg_random(g, B, 1, H * D);
    const fg_tensor wq = fg_random(g, cases[i].shared ? D : H * D);
    const fg_tensor k = fg_random(g, B, C, H, D);
    const fg_tensor v = fg_random(g, B, C, H, D);
    const fg_tensor f = fg_random(g, B, C, H);
    const fg_tensor log_f = fg_log_sigmoid(fg_scale(f, 1, 4));
    if (cases[i].pad) pad = fg_given_int(g, FG_DIMS(B, 1), first);
    const fg_tensor past = fg_given_int(g, FG_DIMS(1), &cases[i].past);
    const fg_tensor gate = fg_random(g, B, 1, H * D);
    const fg_tensor wo = fg_random(g, cases[i].shared ? D : H * D);
    const fg_tensor in[] = { q, wq, k, v, log_f, pad, past, gate, wo };
    return FG_APPLY(forget_decode, FG_HERE, in, 1 / (double)D, cases[i].window, 1e-5, 1e-6,
                    false);
}

const fg_op_code fg_code_forget_decode = {
    .infer = infer, .cost = cost, .decompose = decompose, .example = example, .no_grad = true,
    .bf16 = { .narrow_in = 1u << Q | 1u << K | 1u << V, .wide_in = 1u << LOG_F, .narrow_out = 1 },
};
