/* embedding.c - rows of a table, and the table's gradient.
 *
 *     y_t = w_(tokens_t)          gw_c = sum over t with tokens_t = c of gy_t
 *
 * tokens: i32[...]   w, gw: [V,D]   y, gy: [...,D]
 * A kernel cannot fail: a token outside [0,V) gives a row of NaN and no gradient.  Who feeds tokens
 * from outside checks them first.
 * The gradient sorts the positions by token (counting, so in order of t) and every row of gw is
 * summed by one thread: bytes are gy once and gw once, and no order depends on threads. */
#include "internal.h"
#include "vec.h"

fg_tensor (fg_embedding)(fg_loc at, fg_tensor tokens, fg_tensor w)
{
    return FG_APPLY(embedding, at, ((const fg_tensor[]){ tokens, w }), 0);
}

static fg_status infer(fg_infer *c)
{
    const fg_shape *tokens = &c->in[0], *w = &c->in[1];
    FG_REQUIRE(c, c->in_type[0] == FG_I32, DTYPE, "tokens are %s; they must be i32",
               fg_dtype_name(c->in_type[0]));
    FG_REQUIRE(c, fg__is_real(c->in_type[1]), DTYPE, "w is %s; it must be f32 or bf16",
               fg_dtype_name(c->in_type[1]));
    FG_REQUIRE(c, w->rank == 2, SHAPE, "w has rank %d; it must be [V,D]", w->rank);
    FG_REQUIRE(c, tokens->rank < FG_MAX_RANK, SHAPE, "tokens have rank %d; at most %d fits",
               tokens->rank, FG_MAX_RANK - 1);
    c->out[0] = *tokens;
    c->out[0].dim[c->out[0].rank++] = w->dim[1];
    c->out_type[0] = c->in_type[1];
    return FG_OK;
}

static void cpu(const fg_exec *e)
{
    const fg_shape *table = &e->in_shape[1];
    const int64_t T = fg_shape_count(e->in_shape[0]), V = table->dim[0], D = table->dim[1];
    const int32_t *tokens = e->in[0];
    const fg_real *w = e->in[1];
    fg_real *y = e->out[0];
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, T * D))
    for (int64_t t = 0; t < T; t++) {
        const int64_t c = tokens[t];
        if (c >= 0 && c < V) memcpy(y + t * D, w + c * D, (size_t)D * sizeof *y);
        else
            for (int64_t i = 0; i < D; i++) y[t * D + i] = (fg_real)NAN;
    }
}

static void vjp(fg_vjp *v)
{
    const fg_tensor in[] = { v->gout[0], v->in[0] };
    if (v->wants[1]) v->gin[1] = FG_APPLY(embedding_grad, FG_HERE, in, fg_dim(v->in[1], 0));
}

static fg_cost cost(const fg_infer *c)
{
    const double T = (double)fg_shape_count(c->in[0]), n = (double)fg_shape_count(c->out[0]);
    return (fg_cost){ .bytes = 4 * T + 2 * n * (c->out_type[0] == FG_BF16 ? 2 : 4) };
}

static fg_tensor example(fg_graph *g, int i)
{
    fg_tensor tokens, w;
    switch (i) {
    case 0: tokens = fg_random_int(g, 0, 5, 2, 3); w = fg_random(g, 5, 3); break;
    case 1: tokens = fg_random_int(g, 0, 3, 9);    w = fg_random(g, 3, 17); break;   /* repeated */
    case 2: tokens = fg_random_int(g, 0, 1, 1);    w = fg_random(g, 1, 1); break;
    default: return (fg_tensor){ 0 };
    }
    return fg_embedding(tokens, w);
}

const fg_op_code fg_code_embedding = {
    .infer = infer, .cpu = cpu, .vjp = vjp, .cost = cost, .example = example,
};

/* ---- embedding_grad ------------------------------------------------------------------------- */

static fg_status grad_infer(fg_infer *c)
{
    const struct fg_attr_embedding_grad *a = c->attr;
    const fg_shape *gy = &c->in[0], *tokens = &c->in[1];
    FG_REQUIRE(c, fg__is_real(c->in_type[0]) && c->in_type[1] == FG_I32, DTYPE,
               "gy is %s and tokens are %s; they must be f32 or bf16, and i32",
               fg_dtype_name(c->in_type[0]), fg_dtype_name(c->in_type[1]));
    FG_REQUIRE(c, gy->rank == tokens->rank + 1 && fg__rows(gy) == fg_shape_count(*tokens), SHAPE,
               "gy must have a row for each of %lld tokens", (long long)fg_shape_count(*tokens));
    FG_REQUIRE(c, a->vocab >= 0, SHAPE, "a table cannot have %lld rows", (long long)a->vocab);
    c->out[0] = FG_DIMS(a->vocab, fg__last(gy));
    return FG_OK;
}

/* end[V] and place[T]: the positions sorted by token, token c's before place[end[c]]. */
static size_t grad_scratch(const fg_infer *c, int threads)
{
    const struct fg_attr_embedding_grad *a = c->attr;
    (void)threads;
    return (size_t)(a->vocab + fg_shape_count(c->in[1])) * sizeof(int64_t);
}

static void sort_by_token(const int32_t *tokens, int64_t T, int64_t V, int64_t *end, int64_t *place)
{
    memset(end, 0, (size_t)V * sizeof *end);
    for (int64_t t = 0; t < T; t++)
        if (tokens[t] >= 0 && tokens[t] < V) end[tokens[t]]++;
    int64_t before = 0;
    for (int64_t c = 0; c < V; c++) {
        const int64_t n = end[c];
        end[c] = before;                    /* where token c starts; moves on as places are taken */
        before += n;
    }
    for (int64_t t = 0; t < T; t++)
        if (tokens[t] >= 0 && tokens[t] < V) place[end[tokens[t]]++] = t;
}

static void sum_rows(const fg_real *gy, const int64_t *place, int64_t n, int64_t D, fg_real *gw)
{
    if (n == 0) {
        memset(gw, 0, (size_t)D * sizeof *gw);
        return;
    }
    memcpy(gw, gy + place[0] * D, (size_t)D * sizeof *gw);
    for (int64_t k = 1; k < n; k++) {
        const fg_real *row = gy + place[k] * D;
        for (int64_t i = 0; i < D; i++) gw[i] += row[i];
    }
}

static void grad_cpu(const fg_exec *e)
{
    const struct fg_attr_embedding_grad *a = e->attr;
    const int64_t T = fg_shape_count(e->in_shape[1]), V = a->vocab, D = fg__last(&e->in_shape[0]);
    int64_t *end = e->scratch, *place = end + V;
    fg_real *gw = e->out[0];
    sort_by_token(e->in[1], T, V, end, place);
#pragma omp parallel for schedule(dynamic, 64) num_threads(fg__threads(e, (T + V) * D))
    for (int64_t c = 0; c < V; c++) {
        const int64_t from = c > 0 ? end[c - 1] : 0;
        sum_rows(e->in[0], place + from, end[c] - from, D, gw + c * D);
    }
}

/* ggy_t = ggw_(tokens_t) */
static void grad_vjp(fg_vjp *v)
{
    if (v->wants[0]) v->gin[0] = fg_embedding(v->in[1], v->gout[0]);
}

const fg_op_code fg_code_embedding_grad = {
    .infer = grad_infer, .cpu = grad_cpu, .vjp = grad_vjp, .scratch = grad_scratch,
    .bf16 = { .wide_out = 1 },
};
