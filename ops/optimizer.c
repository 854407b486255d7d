/* optimizer.c - what happens to parameters after the gradients: norm, clipping, sums, AdamW.
 *
 *     sum_squares   y = sum of x^2, over up to 18 tensors: sum in double, in order, of parts, the
 *                   sums of 16384 elements
 *     clip_factor   y = min(1, limit / (sqrt(squares) + 1e-6)); NaN where squares is not finite
 *     accumulate    sum = sum + s x
 *     adamw         p = p (1 - lr decay)
 *                   m = beta1 m + (1 - beta1) g',  v = beta2 v + (1 - beta2) g'^2,  g' = clip g
 *                   p = p - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
 *     adamw_bf16    adamw, and p16 = p rounded to bf16, the weight that products read: lowering
 *                   puts it where that copy was a cast at the start of every step (ops/fuse.c)
 *
 * x, sum, p, m, v, p16, g: any shape, f32 (p16 bf16; x, g also bf16)   parts: f32[n]
 * y, squares, clip, lr, step: f32[1]
 * step counts updates from 1.  A clip that is not finite leaves p, m, v and p16 as they are, so a
 * gradient with NaN or infinity anywhere costs one step and harms nothing.
 * Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2, without
 * the schedule; arithmetic in this order.  Bytes of adamw: p, m, v in and out and g in, 28 an
 * element in f32, which is the least possible; of adamw_bf16 two more. */
#include "internal.h"
#include "vec.h"

static fg_status need_real(fg_infer *c, int from, int to, bool only_f32)
{
    for (int k = from; k < to; k++)
        FG_REQUIRE(c, c->in_type[k] == FG_F32 || (!only_f32 && c->in_type[k] == FG_BF16), DTYPE,
                   "input %d is %s; it must be f32%s", k, fg_dtype_name(c->in_type[k]),
                   only_f32 ? "" : " or bf16");
    return FG_OK;
}

static fg_status need_one(fg_infer *c, int from, int to)
{
    for (int k = from; k < to; k++)
        FG_REQUIRE(c, fg_shape_count(c->in[k]) == 1, SHAPE,
                   "input %d has %lld elements; it must have 1", k,
                   (long long)fg_shape_count(c->in[k]));
    return need_real(c, from, to, true);
}

/* Work is cut into blocks of this many elements, whatever the number of threads. */
enum { BLOCK = 1 << 14 };
static int64_t blocks_of(const fg_shape *x) { return (fg_shape_count(*x) + BLOCK - 1) / BLOCK; }
static int64_t block_length(int64_t count, int64_t i)
{
    return count - i * BLOCK < BLOCK ? count - i * BLOCK : BLOCK;
}

/* ---- sum_squares ---------------------------------------------------------------------------- */

static fg_status squares_infer(fg_infer *c)
{
    int64_t parts = 0;
    for (int k = 0; k < c->n_in; k++) parts += c->given[k] ? blocks_of(&c->in[k]) : 0;
    const fg_status s = fg__need_reals(c, 0, c->n_in);
    c->out[0] = FG_DIMS(1);
    c->out[1] = FG_DIMS(parts);
    c->out_type[0] = c->out_type[1] = FG_F32;
    return s ? FG_ERR_DTYPE : FG_OK;
}

static fg_real squares_of(const fg_real *x, int64_t n)
{
    fg_vec s[4] = { { 0 } };
    int64_t i = 0;
    for (; i + 4 * FG_LANES <= n; i += 4 * FG_LANES)
        for (int k = 0; k < 4; k++) {
            const fg_vec v = fg_vload(x + i + k * FG_LANES);
            s[k] = fg_vfma(v, v, s[k]);
        }
    for (; i < n; i += FG_LANES) {
        const fg_vec v = fg_vload_n(x + i, n - i < FG_LANES ? n - i : FG_LANES);
        s[0] = fg_vfma(v, v, s[0]);
    }
    return fg_vsum((s[0] + s[1]) + (s[2] + s[3]));
}

/* Blocks in fg_real, each lane 512 squares; their sums in double, in order. */
static void squares_cpu(const fg_exec *e)
{
    fg_real *part = e->out[1];
    double sum = 0;
    for (int k = 0; k < e->n_in; k++) {
        if (!e->in[k]) continue;
        const int64_t count = fg_shape_count(e->in_shape[k]), blocks = blocks_of(&e->in_shape[k]);
        const fg_real *x = e->in[k];
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, count))
        for (int64_t i = 0; i < blocks; i++)
            part[i] = squares_of(x + i * BLOCK, block_length(count, i));
        for (int64_t i = 0; i < blocks; i++) sum += (double)part[i];
        part += blocks;
    }
    *(fg_real *)e->out[0] = (fg_real)sum;
}

static fg_cost squares_cost(const fg_infer *c)
{
    fg_cost cost = { 0 };
    for (int k = 0; k < c->n_in; k++) {
        const double n = c->given[k] ? (double)fg_shape_count(c->in[k]) : 0;
        cost.flops += 2 * n;
        cost.bytes += n * (c->in_type[k] == FG_BF16 ? 2 : 4);
    }
    return cost;
}

const fg_op_code fg_code_sum_squares = {
    .infer = squares_infer, .cpu = squares_cpu, .cost = squares_cost, .no_grad = true,
    .bf16 = { .wide_out = 3 },
};

/* ---- clip_factor ---------------------------------------------------------------------------- */

static fg_status clip_infer(fg_infer *c)
{
    const struct fg_attr_clip_factor *a = c->attr;
    FG_REQUIRE(c, a->limit > 0, USAGE, "the norm's limit is %g; it must be positive", a->limit);
    c->out[0] = FG_DIMS(1);
    return need_one(c, 0, 1);
}

static void clip_cpu(const fg_exec *e)
{
    const struct fg_attr_clip_factor *a = e->attr;
    const double squares = (double)*(const fg_real *)e->in[0];
    const double factor = a->limit / (sqrt(squares) + 1e-6);
    const double y = !isfinite(squares) ? (double)NAN : factor < 1 ? factor : 1;
    *(fg_real *)e->out[0] = (fg_real)y;
}

const fg_op_code fg_code_clip_factor = { .infer = clip_infer, .cpu = clip_cpu, .no_grad = true };

/* ---- accumulate ----------------------------------------------------------------------------- */

static fg_status accumulate_infer(fg_infer *c)
{
    FG_REQUIRE(c, fg_shape_equal(c->in[0], c->in[1]), SHAPE, "x must have sum's shape");
    const fg_status s = need_real(c, 0, 1, true);
    c->out[0] = c->in[0];
    return s ? s : need_real(c, 1, 2, false);
}

static void accumulate_cpu(const fg_exec *e)
{
    const struct fg_attr_accumulate *a = e->attr;
    const int64_t count = fg_shape_count(e->in_shape[0]), blocks = blocks_of(&e->in_shape[0]);
    const fg_real *x = e->in[1];
    fg_real *sum = e->out[0];
    const fg_vec s = fg_vset((fg_real)a->s);
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, count))
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t i = b * BLOCK, end = i + block_length(count, b); i < end; i += FG_LANES) {
            const int64_t n = end - i < FG_LANES ? end - i : FG_LANES;
            if (n == FG_LANES) fg_vstore(sum + i, fg_vfma(s, fg_vload(x + i), fg_vload(sum + i)));
            else fg_vstore_n(sum + i, fg_vfma(s, fg_vload_n(x + i, n), fg_vload_n(sum + i, n)), n);
        }
}

const fg_op_code fg_code_accumulate = {
    .infer = accumulate_infer, .cpu = accumulate_cpu, .memory = FG_MUTATE, .no_grad = true,
};

/* ---- adamw ---------------------------------------------------------------------------------- */

enum { P, M, V, G, CLIP, LR, STEP };

static fg_status adamw_infer(fg_infer *c)
{
    const struct fg_attr_adamw *a = c->attr;
    FG_REQUIRE(c, a->beta1 >= 0 && a->beta1 < 1 && a->beta2 >= 0 && a->beta2 < 1, USAGE,
               "the betas are %g and %g; they must lie in [0, 1)", a->beta1, a->beta2);
    for (int k = M; k <= G; k++)
        FG_REQUIRE(c, fg_shape_equal(c->in[k], c->in[P]), SHAPE, "m, v and g must have p's shape");
    for (int k = P; k <= V; k++) c->out[k] = c->in[k];
    const fg_status s = need_real(c, P, G, true), t = need_real(c, G, CLIP, false);
    return s ? s : t ? t : need_one(c, CLIP, STEP + 1);
}

typedef struct { fg_vec clip, keep, beta1, rest1, beta2, rest2, rate, root, eps; } factors;

static inline void update(const factors *f, fg_vec g, fg_vec *p, fg_vec *m, fg_vec *v)
{
    g = f->clip * g;
    *m = f->beta1 * *m + f->rest1 * g;
    *v = f->beta2 * *v + f->rest2 * g * g;
    *p = *p * f->keep - f->rate * *m / (fg_vsqrt(*v) / f->root + f->eps);
}

static void update_block(const factors *f, const fg_real *g, fg_real *p, fg_real *m, fg_real *v,
                         int64_t n)
{
    int64_t i = 0;
    for (; i + FG_LANES <= n; i += FG_LANES) {
        fg_vec pi = fg_vload(p + i), mi = fg_vload(m + i), vi = fg_vload(v + i);
        update(f, fg_vload(g + i), &pi, &mi, &vi);
        fg_vstore(p + i, pi);
        fg_vstore(m + i, mi);
        fg_vstore(v + i, vi);
    }
    if (i < n) {
        const int64_t k = n - i;
        fg_vec pi = fg_vload_n(p + i, k), mi = fg_vload_n(m + i, k), vi = fg_vload_n(v + i, k);
        update(f, fg_vload_n(g + i, k), &pi, &mi, &vi);
        fg_vstore_n(p + i, pi, k);
        fg_vstore_n(m + i, mi, k);
        fg_vstore_n(v + i, vi, k);
    }
}

static void adamw_cpu(const fg_exec *e)
{
    const struct fg_attr_adamw *a = e->attr;
    const fg_real clip = *(const fg_real *)e->in[CLIP];
    if (!isfinite(clip)) return;
    const double lr = (double)*(const fg_real *)e->in[LR];
    const double step = (double)*(const fg_real *)e->in[STEP];
    const factors f = {
        .clip = fg_vset(clip), .keep = fg_vset((fg_real)(1 - lr * a->decay)),
        .beta1 = fg_vset((fg_real)a->beta1), .rest1 = fg_vset((fg_real)(1 - a->beta1)),
        .beta2 = fg_vset((fg_real)a->beta2), .rest2 = fg_vset((fg_real)(1 - a->beta2)),
        .rate = fg_vset((fg_real)(lr / (1 - pow(a->beta1, step)))),
        .root = fg_vset((fg_real)sqrt(1 - pow(a->beta2, step))), .eps = fg_vset((fg_real)a->eps),
    };
    const int64_t count = fg_shape_count(e->in_shape[P]), blocks = blocks_of(&e->in_shape[P]);
    const fg_real *g = e->in[G];
    fg_real *p = e->out[P], *m = e->out[M], *v = e->out[V];
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, count))
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t i = b * BLOCK;
        update_block(&f, g + i, p + i, m + i, v + i, block_length(count, b));
    }
}

static fg_cost adamw_cost(const fg_infer *c)
{
    const double n = (double)fg_shape_count(c->in[P]);
    return (fg_cost){ .flops = 14 * n, .bytes = n * (24 + (c->in_type[G] == FG_BF16 ? 2 : 4)) };
}

const fg_op_code fg_code_adamw = {
    .infer = adamw_infer, .cpu = adamw_cpu, .cost = adamw_cost, .memory = FG_MUTATE,
    .no_grad = true,
};

/* ---- adamw_bf16 ----------------------------------------------------------------------------- */

enum { P16 = 3, AND_16 = 8 };                    /* inputs of it; the others of adamw in order */

static fg_status and_16_infer(fg_infer *c)
{
    FG_REQUIRE(c, fg_shape_equal(c->in[P16], c->in[P]) && c->in_type[P16] == FG_BF16, SHAPE,
               "p16 must be bf16 of p's shape");
    fg_infer plain = *c;
    const struct fg_attr_adamw_bf16 *a = c->attr;
    const struct fg_attr_adamw same = { a->beta1, a->beta2, a->eps, a->decay };
    plain.attr = &same;
    for (int k = P16 + 1; k < AND_16; k++) {
        plain.in[k - 1] = c->in[k];
        plain.in_type[k - 1] = c->in_type[k];
    }
    const fg_status s = adamw_infer(&plain);
    for (int k = P; k <= P16; k++) c->out[k] = c->in[P];
    c->out_type[P16] = FG_BF16;
    return s;
}

static void and_16_cpu(const fg_exec *e)
{
    const struct fg_attr_adamw_bf16 *a = e->attr;
    const struct fg_attr_adamw same = { a->beta1, a->beta2, a->eps, a->decay };
    fg_exec plain = *e;
    plain.attr = &same;
    for (int k = P16 + 1; k < AND_16; k++) plain.in[k - 1] = e->in[k];
    if (!isfinite(*(const fg_real *)plain.in[CLIP])) return;
    adamw_cpu(&plain);
    const int64_t n = fg_shape_count(e->in_shape[P]);
    const fg_real *p = e->out[P];
    fg_real *p16 = e->out[P16];
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, n))
    for (int64_t i = 0; i < n; i++) p16[i] = fg__as_bf16(p[i]);
}

/* p16 is made of the new p, not overwritten: whoever reads it in the next step has it made anew. */
static void and_16_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_adamw_bf16 *a = attr;
    const fg_tensor plain[] = { in[0], in[1], in[2], in[4], in[5], in[6], in[7] };
    out[0] = FG_APPLY(adamw, FG_HERE, plain, a->beta1, a->beta2, a->eps, a->decay);
    for (int k = M; k <= V; k++) out[k] = fg_result(out[0], k);
    out[P16] = fg_cast(out[0], FG_BF16);
}

static fg_cost and_16_cost(const fg_infer *c)
{
    const double n = (double)fg_shape_count(c->in[P]);
    const double g = c->in_type[P16 + 1] == FG_BF16 ? 2 : 4;
    return (fg_cost){ .flops = 14 * n, .bytes = n * (24 + g + 2) };
}

const fg_op_code fg_code_adamw_bf16 = {
    .infer = and_16_infer, .cpu = and_16_cpu, .cost = and_16_cost,
    .decompose = and_16_decompose, .memory = FG_MUTATE, .no_grad = true,
};
