/* forget_decode.c - all that one new token does in the heads of a FoX (Pro) layer, between the
 * joined projection and the one behind the heads.
 *
 *     k' = shift_mix(k, sigmoid(ka)),  v' = shift_mix(v, sigmoid(va))       with k_last and v_last
 *     row past:  k_cache = rms_norm(k', wk),  v_cache = v',  f_cache = log_sigmoid(f + fb)
 *     k_last = k,  v_last = v
 *     y = gated_norm(forget_attention(rms_norm(q, wq), k_cache, v_cache, f_cache), wo, g)
 *
 * q, k, v, g, y: [B,1,H D]   ka, va, f: [B,1,H]   fb: [H]   wq, wk, wo: [H D], or [D] for all heads
 * k_cache, v_cache: [B,C,H,D]   f_cache: f32[B,C,H]   k_last, v_last: [B,H,D]
 * first: i32[B,1]   past: i32[1]; a row that would lie outside the caches is dropped.
 * One launch instead of twenty, of which only the attention moves more than a few KB: lowering
 * makes it (fuse_few.c), models do not. Bytes: the visible rows of the caches once; all else is as
 * good as free. */
#include "internal.h"

enum { K_CACHE, V_CACHE, F_CACHE, K_LAST, V_LAST, Q, K, V, KA, VA, F, G, FB, WQ, WK, WO, FIRST,
       PAST };

static fg_status check_rows(fg_infer *c, int64_t B, int64_t H, int64_t D)
{
    const int rows[] = { Q, K, V, G }, gates[] = { KA, VA, F };
    for (int i = 0; i < 4; i++)
        FG_REQUIRE(c, fg_shape_equal(c->in[rows[i]], FG_DIMS(B, 1, H * D)), SHAPE,
                   "q, k, v and g must be [B,1,H D] = [%lld,1,%lld]", (long long)B,
                   (long long)(H * D));
    for (int i = 0; i < 3; i++)
        FG_REQUIRE(c, fg_shape_equal(c->in[gates[i]], FG_DIMS(B, 1, H)), SHAPE,
                   "ka, va and f must be [B,1,H] = [%lld,1,%lld]", (long long)B, (long long)H);
    for (int i = WQ; i <= WO; i++)
        FG_REQUIRE(c, c->in[i].rank == 1 && (c->in[i].dim[0] == H * D || c->in[i].dim[0] == D),
                   SHAPE, "wq, wk and wo must have one axis of %lld, or of %lld",
                   (long long)(H * D), (long long)D);
    FG_REQUIRE(c, fg_shape_equal(c->in[FB], FG_DIMS(H)), SHAPE, "fb must be [%lld], one per head",
               (long long)H);
    return FG_OK;
}

static fg_status check_caches(fg_infer *c, int64_t B, int64_t H, int64_t D)
{
    const fg_shape *s = &c->in[K_CACHE];
    for (int i = K_LAST; i <= V_LAST; i++)
        FG_REQUIRE(c, fg_shape_equal(c->in[i], FG_DIMS(B, H, D)), SHAPE,
                   "k_last and v_last must be [B,H,D], with k_cache's extents");
    FG_REQUIRE(c, fg_shape_equal(*s, c->in[V_CACHE]), SHAPE,
               "k_cache and v_cache must have one shape");
    FG_REQUIRE(c, fg_shape_equal(c->in[F_CACHE], FG_DIMS(B, s->dim[1], H))
               && c->in_type[F_CACHE] == FG_F32, SHAPE,
               "f_cache must be f32[B,C,H], with k_cache's extents");
    FG_REQUIRE(c, !c->given[FIRST] || (c->in_type[FIRST] == FG_I32
                                       && fg_shape_equal(c->in[FIRST], FG_DIMS(B, 1))), SHAPE,
               "first must be i32[%lld,1]", (long long)B);
    FG_REQUIRE(c, c->in_type[PAST] == FG_I32 && fg_shape_count(c->in[PAST]) == 1, SHAPE,
               "past must be i32[1]");
    return FG_OK;
}

static fg_status infer(fg_infer *c)
{
    const struct fg_attr_forget_decode *a = c->attr;
    const fg_shape *s = &c->in[K_CACHE];
    FG_REQUIRE(c, s->rank == 4, SHAPE, "k_cache must be [B,C,H,D]");
    const int64_t B = s->dim[0], H = s->dim[2], D = s->dim[3];
    fg_status bad = check_rows(c, B, H, D);
    if (bad || (bad = check_caches(c, B, H, D))) return bad;
    for (int i = K_CACHE; i < FIRST; i++)
        FG_REQUIRE(c, fg__is_real(c->in_type[i]), DTYPE, "all but first and past must be real");
    FG_REQUIRE(c, c->in_type[V_CACHE] == c->in_type[K_CACHE] && c->in_type[K_LAST] == c->in_type[K]
               && c->in_type[V_LAST] == c->in_type[V], DTYPE,
               "the caches must have one dtype, k_last and v_last those of k and v");
    FG_REQUIRE(c, a->window >= 0 && a->eps >= 0 && a->q_eps >= 0 && a->k_eps >= 0, USAGE,
               "window, eps, q_eps and k_eps must not be negative");
    for (int o = 0; o < Q; o++) {
        c->out[o] = c->in[o];
        c->out_type[o] = c->in_type[o];
    }
    c->out[Q] = c->in[Q];
    c->out_type[Q] = c->in_type[Q];
    return FG_OK;
}

static fg_tensor written(fg_tensor cache, fg_tensor x, fg_tensor past)
{
    x = fg_cast(x, fg_dtype_of(cache));
    const fg_tensor in[] = { cache, x, past };
    return FG_APPLY(cache_write, FG_HERE, in, 0);
}

/* x: [B,1,H,D]. */
static fg_tensor shifted(const fg_tensor *in, fg_tensor x, int gate, int last)
{
    const fg_tensor a = fg_sigmoid(fg_cast(in[gate], FG_F32));
    const fg_tensor parts[] = { x, a, in[FIRST], in[PAST], in[last] };
    return FG_APPLY(shift_mix, FG_HERE, parts, 0);
}

static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_forget_decode *a = attr;
    const int64_t B = fg_dim(in[K_CACHE], 0), H = fg_dim(in[K_CACHE], 2);
    const int64_t D = fg_dim(in[K_CACHE], 3);
    const fg_shape heads = FG_DIMS(B, 1, H, D), row = FG_DIMS(B, 1, H * D);
    const fg_tensor k = fg_reshape(in[K], heads), v = fg_reshape(in[V], heads);
    fg_tensor ks = shifted(in, k, KA, K_LAST);
    const fg_tensor vs = shifted(in, v, VA, V_LAST);
    ks = fg_reshape(ks, row);
    ks = fg_rms_norm(ks, in[WK], a->k_eps, H);
    ks = fg_reshape(ks, heads);
    fg_tensor f = fg_add(in[F], in[FB]);
    f = fg_log_sigmoid(fg_cast(f, FG_F32));
    out[0] = written(in[K_CACHE], ks, in[PAST]);
    out[1] = written(in[V_CACHE], vs, in[PAST]);
    out[2] = written(in[F_CACHE], f, in[PAST]);
    out[3] = fg__cache_last(FG_HERE, in[K_LAST], k);
    out[4] = fg__cache_last(FG_HERE, in[V_LAST], v);
    fg_tensor q = fg_rms_norm(in[Q], in[WQ], a->q_eps, H);
    q = fg_cast(q, fg_dtype_of(in[K_CACHE]));
    q = fg_reshape(q, heads);
    const fg_tensor parts[] = { q, out[0], out[1], out[2], in[FIRST], in[PAST] };
    fg_tensor o = FG_APPLY(forget_attention, FG_HERE, parts, a->scale, a->window);
    o = fg_reshape(o, row);
    out[5] = fg_gated_norm(o, in[WO], in[G], a->eps, H);
}

static fg_cost cost(const fg_infer *c)
{
    const double keys = (double)fg_shape_count(c->in[K_CACHE]);
    const double gates = (double)fg_shape_count(c->in[F_CACHE]);
    const double size = c->in_type[K_CACHE] == FG_BF16 ? 2 : 4;
    return (fg_cost){ .flops = 4 * keys + 4 * gates, .bytes = 2 * size * keys + 4 * gates };
}

const fg_op_code fg_code_forget_decode = {
    .infer = infer, .cost = cost, .decompose = decompose, .memory = FG_MUTATE, .fresh = 1,
    .no_grad = true,
    .bf16 = { .narrow_out = 1u << 5, .like = { 1 + K, 1 + V, 0, 1 + K, 1 + V } },
};
