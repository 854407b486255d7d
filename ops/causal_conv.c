/* causal_conv.c - short causal depthwise convolution: every channel mixes its own last W inputs.
 *
 *     u_(t,c) = bias_c + sum_(k<W) w_(c,W-1-k) x_(t-k,c),   y = u, or u / (1 + e^-u) if act = 1
 *
 * x, y: [B,T,C]   w: [C,W] or [C,1,W], 1 <= W <= 8, the last column for the current token
 * bias: [C] or absent   first: i32[B,T]   past: i32[1]   prev: [B,W-1,C], the inputs before row 0
 * Row t stands at position p = past + t and sees x of positions in [first_t, p] (0 if absent);
 * inputs before that count as 0, padding rows (first_t > p) give 0.  Decoding keeps the last W - 1
 * inputs.  Sums begin with the bias and go from the oldest input to the newest.
 * Forward reads x and writes y, the gradient reads gy and x and writes gx: once.
 * Source: Dao and Gu 2024, "Transformers are SSMs" (arXiv 2405.21060), section 7; Yang et al. 2024
 * (arXiv 2406.06484) use it without a bias. */
#include <omp.h>
#include "product.h"
#include "internal.h"

enum { MAX_WIDTH = 8, SPAN = 256, ROWS = 64 };   /* channels and rows of a gradient's task */

fg_tensor (fg_causal_conv)(fg_loc at, fg_tensor x, fg_tensor w, fg_tensor bias, bool silu)
{
    const fg_sequence s = fg_sequence_of(x.graph);
    const int64_t W = fg_dim(w, -1);
    const bool decoding = !fg_absent(s.past) && fg_ok(x) && fg_ok(w) && W > 1 && W <= MAX_WIDTH;
    fg_tensor prev = { 0 };
    if (decoding) {
        const fg_shape kept = FG_DIMS(fg_dim(x, 0), W - 1, fg_dim(x, 2));
        prev = fg__cache_state(at, x.graph, "conv", fg_dtype_of(x), kept);
    }
    const fg_tensor in[] = { x, w, bias, s.first, s.past, prev };
    const fg_tensor y = FG_APPLY(causal_conv, at, in, silu);
    if (decoding) fg__cache_rows(at, prev, x);
    return y;
}

/* x, w and bias from input i on. */
static fg_status check(fg_infer *c, int i)
{
    const fg_shape *x = &c->in[i], *w = &c->in[i + 1];
    FG_REQUIRE(c, x->rank == 3, SHAPE, "x must be [B,T,C]");
    FG_REQUIRE(c, (w->rank == 2 || (w->rank == 3 && w->dim[1] == 1)) && w->dim[0] == x->dim[2],
               SHAPE, "w must be [C,W] or [C,1,W] with C = %lld", (long long)x->dim[2]);
    FG_REQUIRE(c, fg__last(w) >= 1 && fg__last(w) <= MAX_WIDTH, SHAPE,
               "w has a width of %lld; it must be in [1, %d]", (long long)fg__last(w), MAX_WIDTH);
    FG_REQUIRE(c, !c->given[i + 2] || fg_shape_equal(c->in[i + 2], FG_DIMS(x->dim[2])), SHAPE,
               "bias must have one axis of %lld", (long long)x->dim[2]);
    for (int k = i; k < i + 3; k++)
        FG_REQUIRE(c, !c->given[k] || fg__is_real(c->in_type[k]), DTYPE,
                   "x, w and bias must be f32 or bf16");
    return FG_OK;
}

static fg_status infer(fg_infer *c)
{
    const fg_shape *x = &c->in[0];
    if (check(c, 0)) return FG_ERR_SHAPE;
    if (fg__check_sequence(c, 3, 4)) return FG_ERR_SHAPE;
    const int64_t K = fg__last(&c->in[1]) - 1;
    FG_REQUIRE(c, !c->given[5] || (fg_shape_equal(c->in[5], FG_DIMS(x->dim[0], K, x->dim[2]))
                                   && fg__is_real(c->in_type[5])), SHAPE,
               "prev must be [B,W-1,C] = [%lld,%lld,%lld], f32 or bf16", (long long)x->dim[0],
               (long long)K, (long long)x->dim[2]);
    c->out[0] = *x;
    return FG_OK;
}

/* ---- kernel --------------------------------------------------------------------------------- */

typedef struct {
    int64_t B, T, C, W, past;
    const fg_real *x, *bias, *prev;
    const int32_t *first;
    fg_real *w;                          /* [W][C], scratch: row k is for the input k tokens ago */
    bool silu;
} conv;

/* The inputs before its own that row (b,t) sees, at most W - 1; -1: a padding row. */
static int64_t reach(const conv *z, int64_t b, int64_t t)
{
    const int64_t start = z->first ? z->first[b * z->T + t] : 0, p = z->past + t;
    const int64_t low = start > 0 ? start : 0;
    const int64_t stored = t + (z->prev ? z->W - 1 : 0);
    return low > p ? -1 : fg__least(fg__least(p - low, stored), z->W - 1);
}

static const fg_real *input(const conv *z, int64_t b, int64_t t)
{
    const int64_t K = z->W - 1;
    return t >= 0 ? z->x + (b * z->T + t) * z->C : z->prev + (b * K + K + t) * z->C;
}

static void transpose_weights(const conv *z, const fg_real *w)
{
    for (int64_t c = 0; c < z->C; c++)
        for (int64_t k = 0; k < z->W; k++) z->w[k * z->C + c] = w[c * z->W + z->W - 1 - k];
}

static inline fg_vec load(const fg_real *p, int64_t n)
{
    return n < FG_LANES ? fg_vload_n(p, n) : fg_vload(p);
}
static inline void store(fg_real *p, fg_vec v, int64_t n)
{
    if (n < FG_LANES) fg_vstore_n(p, v, n);
    else fg_vstore(p, v);
}

/* u of n <= FG_LANES channels from c on, of a row that sees `seen` earlier inputs, row[k] each. */
__attribute__((always_inline))
static inline fg_vec mix(const conv *z, const fg_real *const *row, int64_t seen, int64_t c,
                         int64_t n)
{
    fg_vec u = z->bias ? load(z->bias + c, n) : fg_vset(0);
    for (int64_t k = seen; k >= 0; k--)
        u = fg_vfma(load(z->w + k * z->C + c, n), load(row[k] + c, n), u);
    return u;
}

__attribute__((always_inline))
static inline void mix_row(const conv *z, const fg_real *const *row, int64_t seen, fg_real *y)
{
    for (int64_t c = 0; c < z->C; c += FG_LANES) {
        const int64_t n = fg__least(FG_LANES, z->C - c);
        const fg_vec u = mix(z, row, seen, c, n);
        store(y + c, z->silu ? u * fg_vsigmoid(u) : u, n);
    }
}

static void cpu(const fg_exec *e)
{
    const struct fg_attr_causal_conv *a = e->attr;
    const fg_shape *s = &e->in_shape[0];
    const conv z = { s->dim[0], s->dim[1], s->dim[2], fg__last(&e->in_shape[1]),
                     e->in[4] ? *(const int32_t *)e->in[4] : 0, e->in[0], e->in[2], e->in[5],
                     e->in[3], e->scratch, a->silu };
    fg_real *y = e->out[0];
    const int threads = fg__threads(e, 4 * z.B * z.T * z.C);
    transpose_weights(&z, e->in[1]);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < z.B * z.T; i++) {
        const int64_t b = i / z.T, t = i % z.T, seen = reach(&z, b, t);
        const fg_real *row[MAX_WIDTH];
        for (int64_t k = 0; k <= seen; k++) row[k] = input(&z, b, t - k);
        if (seen < 0) memset(y + i * z.C, 0, (size_t)z.C * sizeof *y);
        else if (seen == 3) mix_row(&z, row, 3, y + i * z.C);
        else mix_row(&z, row, seen, y + i * z.C);
    }
}

static size_t scratch(const fg_infer *c, int threads)
{
    (void)threads;
    return (size_t)fg_shape_count(c->in[1]) * sizeof(fg_real);
}

/* With gu = gy act'(u): gx_s = sum_k w_(W-1-k) gu_(s+k) over the rows s + k that see s,
 * gw_(W-1-k) = sum over rows t that see t - k of gu_t x_(t-k), gbias = sum of gu_t. */
static void vjp(fg_vjp *v)
{
    const struct fg_attr_causal_conv *a = v->attr;
    if (fg__reads_caches(v, 4)) return;
    const fg_tensor in[] = { v->gout[0], v->in[0], v->in[1], v->in[2], v->in[3] };
    const fg_tensor g = FG_APPLY(causal_conv_grad, FG_HERE, in, a->silu);
    v->gin[0] = g;
    v->gin[1] = fg_result(g, 1);
    if (!fg_absent(v->in[2])) v->gin[2] = fg_result(g, 2);
}

/* Positions + 1 as f32[1,T,1]. */
static fg_tensor positions(fg_graph *g, int64_t T, fg_tensor past)
{
    fg_tensor p = fg_fill(g, FG_DIMS(1, T), 1);
    p = fg_cumsum(p, 1, false);
    if (!fg_absent(past)) {
        past = fg_cast(past, FG_F32);
        past = fg_reshape(past, FG_DIMS(1, 1));
        p = fg_add(p, past);
    }
    return fg_reshape(p, FG_DIMS(1, T, 1));
}

/* x moved by k along T for every k, each weighted, where the row may see that far back. */
static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_causal_conv *a = attr;
    fg_graph *g = in[0].graph;
    const int64_t T = fg_dim(in[0], 1), C = fg_dim(in[0], 2), W = fg_dim(in[1], -1), K = W - 1;
    const fg_tensor x = fg_cast(in[0], FG_F32), w = fg_reshape(in[1], FG_DIMS(C, W));
    fg_tensor rows = x, low = fg_fill(g, FG_DIMS(1, 1), 0), p = positions(g, T, in[4]);
    if (K > 0) {
        fg_tensor before = fg_fill(g, FG_DIMS(fg_dim(x, 0), K, C), 0);
        if (!fg_absent(in[5])) before = fg_cast(in[5], FG_F32);
        rows = fg_concat(before, x, 1);
    }
    if (!fg_absent(in[3])) low = fg_cast(in[3], FG_F32);
    const int64_t B = fg_dim(low, 0), N = fg_dim(low, 1);
    low = fg_reshape(low, FG_DIMS(B, N, 1));
    const fg_tensor zero = fg_fill(g, FG_DIMS(1, 1, 1), 0);
    low = fg_max(low, zero);
    fg_tensor u = fg_fill(g, fg_shape_of(x), 0);
    if (!fg_absent(in[2])) u = fg_add(u, in[2]);
    for (int64_t k = K; k >= 0; k--) {
        const fg_tensor moved = fg_slice(rows, 1, K - k, K - k + T);
        const fg_tensor column = fg_slice(w, 1, K - k, K - k + 1);
        const fg_tensor weights = fg_reshape(column, FG_DIMS(C));
        const fg_tensor term = fg_mul(moved, weights), from = fg_scale(low, 1, (double)k + 1);
        const fg_tensor seen = fg__where_ge(FG_HERE, p, from, term);
        u = fg_add(u, seen);
    }
    if (a->silu) u = fg_silu(u);
    const fg_tensor own = fg_scale(low, 1, 1), y = fg__where_ge(FG_HERE, p, own, u);
    out[0] = fg_cast(y, fg_dtype_of(in[0]));
}

static double size_of(fg_dtype t) { return t == FG_BF16 ? 2 : 4; }

static fg_cost cost(const fg_infer *c)
{
    const double n = (double)fg_shape_count(c->in[0]), W = (double)fg__last(&c->in[1]);
    return (fg_cost){ .flops = n * (2 * W + 4), .bytes = 2 * n * size_of(c->in_type[0]) };
}

static fg_tensor example(fg_graph *g, int i)
{
    static const int32_t first[18] = { 0, 0, 2, 3, 3, 3, 3, 3, 8, 3, 3, 3, 3, 3, 3, 3, 3, 3 };
    static const struct { int64_t B, T, C, W; bool bias, silu, documents, flat; } cases[] = {
        { 1, 7, 5, 4, true, true, false, false },
        { 2, 9, 35, 4, true, true, true, false },        /* documents; padding of 3 rows */
        { 2, 9, 3, 8, false, false, true, true },
        { 1, 70, 3, 3, true, false, false, true },       /* more rows than a task has */
        { 2, 2, 4, 5, false, true, false, true },        /* shorter than the window */
        { 1, 1, 1, 1, true, true, false, false },
        { 1, 53, 8, 4, true, true, false, false },       /* eight channels at a time */
        { 2, 9, 8, 4, true, true, true, false },
    };
    if (i >= (int)(sizeof cases / sizeof cases[0])) return (fg_tensor){ 0 };
    const int64_t B = cases[i].B, T = cases[i].T, C = cases[i].C, W = cases[i].W;
    const fg_tensor x = fg_random(g, B, T, C);
    const fg_tensor w = cases[i].flat ? fg_random(g, C, W) : fg_random(g, C, 1, W);
    const fg_tensor bias = cases[i].bias ? fg_random(g, C) : (fg_tensor){ 0 };
    if (cases[i].documents) {
        const fg_tensor f = fg_given_int(g, FG_DIMS(2, 9), first);
        fg_graph_sequence(g, (fg_sequence){ .first = f });
    }
    return fg_causal_conv(x, w, bias, cases[i].silu);
}

const fg_op_code fg_code_causal_conv = {
    .infer = infer, .cpu = cpu, .vjp = vjp, .decompose = decompose, .cost = cost,
    .example = example, .scratch = scratch, .bf16 = { .wide_in = 6, .like = { 1 } },
};

/* ---- causal_conv_grad ----------------------------------------------------------------------- */

static fg_status grad_infer(fg_infer *c)
{
    if (check(c, 1)) return FG_ERR_SHAPE;
    FG_REQUIRE(c, fg_shape_equal(c->in[0], c->in[1]), SHAPE, "gy must have x's shape");
    c->out[0] = c->in[1];
    c->out[1] = c->in[2];
    c->out[2] = FG_DIMS(c->in[1].dim[2]);
    c->out_type[0] = c->in_type[1];
    c->out_type[1] = c->in_type[2];
    c->out_type[2] = c->given[3] ? c->in_type[3] : FG_F32;
    return FG_OK;
}

/* One task is ROWS rows of a sequence and SPAN channels.  It leaves its part of gw and gbias in
 * sums[block]: [W + 1][C], row k for the input k tokens ago, row W for the bias. */
typedef struct {
    conv z;
    const fg_real *gy;
    fg_real *gx, *sums, *gu;             /* gu: [threads][ROWS + W - 1][SPAN] */
    int64_t blocks, parts;               /* of a sequence, of the channels */
} job;

static job cut_scratch(char *base, size_t *used, const fg_shape *x, int64_t W, int threads)
{
    job j = { .z = { .B = x->dim[0], .T = x->dim[1], .C = x->dim[2], .W = W } };
    j.blocks = (j.z.T + ROWS - 1) / ROWS;
    j.parts = (j.z.C + SPAN - 1) / SPAN;
    j.z.w = fg__cut(base, used, W * j.z.C, sizeof(fg_real));
    j.sums = fg__cut(base, used, j.z.B * j.blocks * (W + 1) * j.z.C, sizeof(fg_real));
    j.gu = fg__cut(base, used, (int64_t)threads * (ROWS + MAX_WIDTH) * SPAN, sizeof(fg_real));
    return j;
}

static size_t grad_scratch(const fg_infer *c, int threads)
{
    size_t used = 0;
    cut_scratch(NULL, &used, &c->in[1], fg__last(&c->in[2]), threads);
    return used;
}

/* gu of row (b,t), channels c .. c + n; the row's parts of gw and gbias are added to sums. */
static void pull_row(const job *j, int64_t b, int64_t t, int64_t c0, int64_t c1, fg_real *gu,
                     fg_real *sums)
{
    const conv *z = &j->z;
    const int64_t seen = reach(z, b, t), C = z->C;
    const fg_real *row[MAX_WIDTH], *gy = j->gy + (b * z->T + t) * C;
    for (int64_t k = 0; k <= seen; k++) row[k] = input(z, b, t - k);
    for (int64_t c = c0; c < c1; c += FG_LANES) {
        const int64_t n = fg__least(FG_LANES, c1 - c);
        fg_vec g = seen < 0 ? fg_vset(0) : load(gy + c, n);
        if (z->silu && seen >= 0) {
            const fg_vec u = mix(z, row, seen, c, n), s = fg_vsigmoid(u);
            g = g * s * (1 + u * (1 - s));
        }
        store(gu + c - c0, g, n);
        for (int64_t k = 0; sums && k <= seen; k++) {
            fg_real *to = sums + k * C + c;
            store(to, fg_vfma(g, load(row[k] + c, n), load(to, n)), n);
        }
        if (sums) store(sums + z->W * C + c, load(sums + z->W * C + c, n) + g, n);
    }
}

static void run_task(const job *j, int64_t b, int64_t block, int64_t part, fg_real *gu)
{
    const conv *z = &j->z;
    const int64_t t0 = block * ROWS, t1 = fg__least(t0 + ROWS, z->T), C = z->C;
    const int64_t c0 = part * SPAN, c1 = fg__least(c0 + SPAN, C);
    const int64_t end = fg__least(t1 + z->W - 1, z->T);
    fg_real *sums = j->sums + (b * j->blocks + block) * (z->W + 1) * C;
    for (int64_t k = 0; k <= z->W; k++)
        memset(sums + k * C + c0, 0, (size_t)(c1 - c0) * sizeof *sums);
    for (int64_t t = t0; t < end; t++)
        pull_row(j, b, t, c0, c1, gu + (t - t0) * SPAN, t < t1 ? sums : NULL);
    for (int64_t t = t0; t < t1; t++) {
        const fg_real *row[MAX_WIDTH];
        fg_real *gx = j->gx + (b * z->T + t) * C;
        for (int64_t k = 0; k < z->W; k++) {
            const bool seen = t + k < z->T && reach(z, b, t + k) >= k;
            row[k] = seen ? gu + (t + k - t0) * SPAN : NULL;
        }
        for (int64_t c = c0; c < c1; c += FG_LANES) {
            const int64_t n = fg__least(FG_LANES, c1 - c);
            fg_vec sum = { 0 };
            for (int64_t k = 0; k < z->W; k++)
                if (row[k]) sum = fg_vfma(load(z->w + k * C + c, n), load(row[k] + c - c0, n), sum);
            store(gx + c, sum, n);
        }
    }
}

/* gw[c][W-1-k] and gbias[c] are the sums over blocks, in order. */
static void add_blocks(const job *j, int64_t c, fg_real *gw, fg_real *gb)
{
    const int64_t W = j->z.W, C = j->z.C;
    for (int64_t k = 0; k <= W; k++) {
        fg_real sum = 0;
        for (int64_t i = 0; i < j->z.B * j->blocks; i++) sum += j->sums[(i * (W + 1) + k) * C + c];
        if (k < W) gw[c * W + W - 1 - k] = sum;
        else gb[c] = sum;
    }
}

static void grad_cpu(const fg_exec *e)
{
    const struct fg_attr_causal_conv_grad *a = e->attr;
    size_t used = 0;
    job j = cut_scratch(e->scratch, &used, &e->in_shape[1], fg__last(&e->in_shape[2]), e->threads);
    j.gy = e->in[0], j.gx = e->out[0];
    j.z.x = e->in[1], j.z.bias = e->in[3], j.z.first = e->in[4], j.z.silu = a->silu;
    const int threads = fg__threads(e, 8 * j.z.B * j.z.T * j.z.C);
    const int64_t tasks = j.z.B * j.blocks * j.parts;
    transpose_weights(&j.z, e->in[2]);
#pragma omp parallel num_threads(threads)
    {
        fg_real *gu = j.gu + (int64_t)omp_get_thread_num() * (ROWS + MAX_WIDTH) * SPAN;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tasks; i++) {
            const int64_t row = i / j.parts;
            run_task(&j, row / j.blocks, row % j.blocks, i % j.parts, gu);
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < j.z.C; c++) add_blocks(&j, c, e->out[1], e->out[2]);
    }
}

static fg_cost grad_cost(const fg_infer *c)
{
    const double n = (double)fg_shape_count(c->in[1]), W = (double)fg__last(&c->in[2]);
    return (fg_cost){ .flops = n * (6 * W + 8), .bytes = 3 * n * size_of(c->in_type[1]) };
}

const fg_op_code fg_code_causal_conv_grad = {
    .infer = grad_infer, .cpu = grad_cpu, .cost = grad_cost, .scratch = grad_scratch,
    .bf16 = { .wide_in = 12, .like = { 2 }, .wide_out = 6 },
};
