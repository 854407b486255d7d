/* cache.c - what a layer remembers of earlier tokens while decoding: rows appended to a state, and
 * the last row, or the last few, kept in one.
 *
 *     cache_write   cache[b, past + t] = x[b, t]    cache: [B,C,...]   x: [B,T,...]   past: i32[1]
 *     cache_last    last[b] = x[b, T - 1]           last:  [B,...]
 *     cache_rows    rows[b] = the last K rows of rows[b] followed by x[b]     rows: [B,K,...]
 *
 * Rows that would lie outside the cache are dropped; whoever sets past keeps past + T <= C.
 * All overwrite a state and have no gradient: caches are for inference. */
#include <string.h>
#include "internal.h"

/* A layer may call one builder twice in a scope: the second call's states are cache.k.1 and so on,
 * in the order of building, so every graph of a model finds its own. */
static const char *unused_name(fg_graph *g, const char *what)
{
    const char *name = fg_name(g, "@cache.%s", what);
    for (int i = 1; !fg_absent(fg_find(g, fg__full_name(g, name))); i++)
        name = fg_name(g, "@cache.%s.%d", what, i);
    return name;
}

fg_tensor fg__cache(fg_loc at, fg_tensor x, const char *what, fg_sequence s)
{
    if (!fg_ok(x)) return x;
    fg_shape shape = fg_shape_of(x);
    if (s.capacity < 1)
        return (fg_fail)(at, x, FG_ERR_USAGE, "past is given, but the caches' capacity is %lld",
                         (long long)s.capacity);
    if (shape.rank > 1) shape.dim[1] = s.capacity;
    const fg_tensor cache =
        (fg_state)(at, x.graph, unused_name(x.graph, what), fg_dtype_of(x), shape);
    const fg_tensor in[] = { cache, x, s.past };
    return FG_APPLY(cache_write, at, in, 0);
}

fg_tensor fg__cache_row(fg_loc at, fg_tensor x, const char *what)
{
    fg_shape shape = fg_shape_of(x);
    for (int i = 1; i + 1 < shape.rank; i++) shape.dim[i] = shape.dim[i + 1];
    if (shape.rank > 1) shape.rank--;
    return (fg_state)(at, x.graph, unused_name(x.graph, what), fg_dtype_of(x), shape);
}

fg_tensor fg__cache_last(fg_loc at, fg_tensor last, fg_tensor x)
{
    const fg_tensor in[] = { last, x };
    return FG_APPLY(cache_last, at, in, 0);
}

fg_tensor fg__cache_state(fg_loc at, fg_graph *g, const char *what, fg_dtype t, fg_shape s)
{
    return (fg_state)(at, g, unused_name(g, what), t, s);
}

/* The last row of one row. */
fg_tensor fg__cache_put(fg_loc at, fg_tensor state, fg_tensor value)
{
    fg_shape s = fg_shape_of(value);
    for (int i = s.rank++; i > 1; i--) s.dim[i] = s.dim[i - 1];
    s.dim[1] = 1;
    const fg_tensor x = fg_reshape(value, s);
    return fg__cache_last(at, state, x);
}

fg_tensor fg__cache_rows(fg_loc at, fg_tensor rows, fg_tensor x)
{
    const fg_tensor in[] = { rows, x };
    return FG_APPLY(cache_rows, at, in, 0);
}

fg_status fg__check_sequence(fg_infer *c, int first, int past)
{
    const fg_shape *x = &c->in[0];
    FG_REQUIRE(c, !c->given[first]
               || (c->in_type[first] == FG_I32
                   && fg_shape_equal(c->in[first], FG_DIMS(x->dim[0], x->dim[1]))), SHAPE,
               "first must be i32[B,T] = i32[%lld,%lld]", (long long)x->dim[0],
               (long long)x->dim[1]);
    FG_REQUIRE(c, !c->given[past]
               || (c->in_type[past] == FG_I32 && fg_shape_count(c->in[past]) == 1), SHAPE,
               "past must be i32[1]");
    return FG_OK;
}

/* ---- cache_write ---------------------------------------------------------------------------- */

/* cache and x agree in every axis from `axis` on, and in B. */
static bool agree(const fg_shape *a, int axis_a, const fg_shape *b, int axis_b)
{
    if (a->rank - axis_a != b->rank - axis_b || a->dim[0] != b->dim[0]) return false;
    for (int i = 0; axis_a + i < a->rank; i++)
        if (a->dim[axis_a + i] != b->dim[axis_b + i]) return false;
    return true;
}

static fg_status infer_write(fg_infer *c)
{
    const fg_shape *cache = &c->in[0], *x = &c->in[1];
    FG_REQUIRE(c, cache->rank >= 2 && x->rank >= 2 && agree(cache, 2, x, 2), SHAPE,
               "cache must be [B,C,...] and x [B,T,...], alike but for axis 1");
    FG_REQUIRE(c, x->dim[1] <= cache->dim[1], SHAPE,
               "x has %lld positions, the cache room for %lld", (long long)x->dim[1],
               (long long)cache->dim[1]);
    FG_REQUIRE(c, c->in_type[0] == c->in_type[1], DTYPE, "cache and x must have one dtype");
    FG_REQUIRE(c, c->in_type[2] == FG_I32 && fg_shape_count(c->in[2]) == 1, SHAPE,
               "past must be i32[1]");
    c->out[0] = *cache;
    return FG_OK;
}

static void write_cpu(const fg_exec *e)
{
    const fg_shape *cache = &e->in_shape[0], *x = &e->in_shape[1];
    const int64_t B = x->dim[0], C = cache->dim[1], T = x->dim[1],
                  past = *(const int32_t *)e->in[2];
    const int64_t t0 = past < 0 ? -past : 0, t1 = past + T > C ? C - past : T;
    if (!B || t0 >= t1) return;
    const size_t row = (size_t)(fg_shape_count(*x) / B / T) * fg__cpu_size(e->in_type[0]);
    char *to = e->out[0];
    const char *from = e->in[1];
    for (int64_t b = 0; b < B; b++)
        memcpy(to + (size_t)(b * C + past + t0) * row, from + (size_t)(b * T + t0) * row,
               (size_t)(t1 - t0) * row);
}

static fg_cost write_cost(const fg_infer *c)
{
    return (fg_cost){ .bytes = 2.0 * (double)sizeof(float) * (double)fg_shape_count(c->in[1]) };
}

const fg_op_code fg_code_cache_write = {
    .infer = infer_write, .cpu = write_cpu, .cost = write_cost,
    .memory = FG_MUTATE, .no_grad = true, .bf16 = { .like = { 2 } },
};

/* ---- cache_last ----------------------------------------------------------------------------- */

static fg_status infer_last(fg_infer *c)
{
    FG_REQUIRE(c, c->in[0].rank >= 1 && c->in[1].rank >= 2 && agree(&c->in[0], 1, &c->in[1], 2),
               SHAPE, "x must be [B,T,...] and last [B,...], alike but for x's axis 1");
    FG_REQUIRE(c, c->in[1].dim[1] > 0, SHAPE, "x has no positions");
    FG_REQUIRE(c, c->in_type[0] == c->in_type[1], DTYPE, "last and x must have one dtype");
    c->out[0] = c->in[0];
    return FG_OK;
}

static void last_cpu(const fg_exec *e)
{
    const fg_shape *x = &e->in_shape[1];
    const int64_t B = x->dim[0], T = x->dim[1];
    const size_t row =
        B ? (size_t)(fg_shape_count(e->in_shape[0]) / B) * fg__cpu_size(e->in_type[0]) : 0;
    char *to = e->out[0];
    const char *from = e->in[1];
    for (int64_t b = 0; row && b < B; b++)
        memcpy(to + (size_t)b * row, from + (size_t)(b * T + T - 1) * row, row);
}

static fg_cost last_cost(const fg_infer *c)
{
    return (fg_cost){ .bytes = 2.0 * (double)sizeof(float) * (double)fg_shape_count(c->in[0]) };
}

const fg_op_code fg_code_cache_last = {
    .infer = infer_last, .cpu = last_cpu, .cost = last_cost, .memory = FG_MUTATE, .no_grad = true,
    .bf16 = { .like = { 2 } },
};

/* ---- cache_rows ----------------------------------------------------------------------------- */

static fg_status infer_rows(fg_infer *c)
{
    FG_REQUIRE(c, c->in[0].rank >= 2 && c->in[1].rank >= 2 && agree(&c->in[0], 2, &c->in[1], 2),
               SHAPE, "rows must be [B,K,...] and x [B,T,...], alike but for axis 1");
    FG_REQUIRE(c, c->in_type[0] == c->in_type[1], DTYPE, "rows and x must have one dtype");
    c->out[0] = c->in[0];
    return FG_OK;
}

static void rows_cpu(const fg_exec *e)
{
    const fg_shape *rows = &e->in_shape[0];
    const int64_t B = rows->dim[0], K = rows->dim[1], T = e->in_shape[1].dim[1];
    const int64_t fresh = T < K ? T : K, kept = K - fresh;
    if (!B || !K) return;
    const size_t row = (size_t)(fg_shape_count(*rows) / B / K) * fg__cpu_size(e->in_type[0]);
    for (int64_t b = 0; b < B; b++) {
        char *to = (char *)e->out[0] + (size_t)(b * K) * row;
        const char *from = (const char *)e->in[1] + (size_t)(b * T + T - fresh) * row;
        memmove(to, to + (size_t)fresh * row, (size_t)kept * row);
        memcpy(to + (size_t)kept * row, from, (size_t)fresh * row);
    }
}

static fg_cost rows_cost(const fg_infer *c)
{
    return (fg_cost){ .bytes = 2.0 * (double)sizeof(float) * (double)fg_shape_count(c->in[0]) };
}

const fg_op_code fg_code_cache_rows = {
    .infer = infer_rows, .cpu = rows_cpu, .cost = rows_cost, .memory = FG_MUTATE, .no_grad = true,
    .bf16 = { .like = { 2 } },
};
