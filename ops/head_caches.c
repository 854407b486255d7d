/* head_caches.c - what a new token leaves behind for later ones, in all heads of a layer.
 *
 *     k' = shift_mix(k, sigmoid(ka)),  v' = shift_mix(v, sigmoid(va))       with k_last and v_last
 *     row past:  k_cache = rms_norm(k', w),  v_cache = v',  f_cache = log_sigmoid(f + fb)
 *     k_last = k,  v_last = v
 *
 * k, v: [B,1,H D]   ka, va, f: [B,1,H]   fb: [H]   w: [H D], or [D] shared by the heads
 * k_cache, v_cache: [B,C,H,D]   f_cache: f32[B,C,H]   k_last, v_last: [B,H,D]
 * first: i32[B,1]   past: i32[1]; a row that would lie outside the caches is dropped.
 * One launch instead of a dozen on rows of a few KB: lowering makes it (fuse_few.c), models do not. */
#include "internal.h"

enum { K_CACHE, V_CACHE, F_CACHE, K_LAST, V_LAST, K, V, KA, VA, F, FB, W, FIRST, PAST };

static fg_status infer(fg_infer *c)
{
    const struct fg_attr_head_caches *a = c->attr;
    const fg_shape *s = &c->in[K_CACHE];
    FG_REQUIRE(c, s->rank == 4, SHAPE, "k_cache must be [B,C,H,D]");
    const int64_t B = s->dim[0], H = s->dim[2], D = s->dim[3];
    const fg_shape row = FG_DIMS(B, 1, H * D), gate = FG_DIMS(B, 1, H), last = FG_DIMS(B, H, D);
    FG_REQUIRE(c, fg_shape_equal(*s, c->in[V_CACHE]), SHAPE,
               "k_cache and v_cache must have one shape");
    FG_REQUIRE(c, fg_shape_equal(c->in[F_CACHE], FG_DIMS(B, s->dim[1], H)), SHAPE,
               "f_cache must be [B,C,H], with k_cache's extents");
    FG_REQUIRE(c, fg_shape_equal(c->in[K], row) && fg_shape_equal(c->in[V], row), SHAPE,
               "k and v must be [B,1,H D] = [%lld,1,%lld]", (long long)B, (long long)(H * D));
    FG_REQUIRE(c, fg_shape_equal(c->in[K_LAST], last) && fg_shape_equal(c->in[V_LAST], last), SHAPE,
               "k_last and v_last must be [B,H,D], with k_cache's extents");
    for (int i = KA; i <= F; i++)
        FG_REQUIRE(c, fg_shape_equal(c->in[i], gate), SHAPE, "ka, va and f must be [B,1,H]");
    FG_REQUIRE(c, fg_shape_equal(c->in[FB], FG_DIMS(H)), SHAPE, "fb must be [%lld], one per head",
               (long long)H);
    FG_REQUIRE(c, c->in[W].rank == 1 && (c->in[W].dim[0] == H * D || c->in[W].dim[0] == D), SHAPE,
               "w must have one axis of %lld, or of %lld", (long long)(H * D), (long long)D);
    FG_REQUIRE(c, !c->given[FIRST] || (c->in_type[FIRST] == FG_I32
                                       && fg_shape_equal(c->in[FIRST], FG_DIMS(B, 1))), SHAPE,
               "first must be i32[%lld,1]", (long long)B);
    FG_REQUIRE(c, c->in_type[PAST] == FG_I32 && fg_shape_count(c->in[PAST]) == 1, SHAPE,
               "past must be i32[1]");
    for (int i = K_CACHE; i <= W; i++)
        FG_REQUIRE(c, fg__is_real(c->in_type[i]), DTYPE, "all but first and past must be real");
    FG_REQUIRE(c, c->in_type[K_LAST] == c->in_type[K] && c->in_type[V_LAST] == c->in_type[V], DTYPE,
               "k_last and v_last must have the dtypes of k and v");
    FG_REQUIRE(c, a->eps >= 0, USAGE, "eps is %g and must not be negative", a->eps);
    for (int o = 0; o < c->n_out; o++) {
        c->out[o] = c->in[o];
        c->out_type[o] = c->in_type[o];
    }
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
    const struct fg_attr_head_caches *at = attr;
    const int64_t B = fg_dim(in[K_CACHE], 0), H = fg_dim(in[K_CACHE], 2);
    const int64_t D = fg_dim(in[K_CACHE], 3);
    const fg_tensor k = fg_reshape(in[K], FG_DIMS(B, 1, H, D));
    const fg_tensor v = fg_reshape(in[V], FG_DIMS(B, 1, H, D));
    fg_tensor ks = shifted(in, k, KA, K_LAST);
    const fg_tensor vs = shifted(in, v, VA, V_LAST);
    ks = fg_reshape(ks, FG_DIMS(B, 1, H * D));
    ks = fg_rms_norm(ks, in[W], at->eps, H);
    ks = fg_reshape(ks, FG_DIMS(B, 1, H, D));
    fg_tensor f = fg_add(in[F], in[FB]);
    f = fg_log_sigmoid(fg_cast(f, FG_F32));
    out[0] = written(in[K_CACHE], ks, in[PAST]);
    out[1] = written(in[V_CACHE], vs, in[PAST]);
    out[2] = written(in[F_CACHE], f, in[PAST]);
    out[3] = fg__cache_last(FG_HERE, in[K_LAST], k);
    out[4] = fg__cache_last(FG_HERE, in[V_LAST], v);
}

/* A row of each cache and of each row kept, read or made and written. */
static fg_cost cost(const fg_infer *c)
{
    const double n = (double)fg_shape_count(c->in[K]), heads = (double)fg_shape_count(c->in[F]);
    return (fg_cost){ .flops = 12 * n, .bytes = 16 * n + 20 * heads };
}

const fg_op_code fg_code_head_caches = {
    .infer = infer, .cost = cost, .decompose = decompose, .memory = FG_MUTATE, .no_grad = true,
    .bf16 = { .like = { 1 + K, 1 + V, 0, 1 + K, 1 + V } },
};
