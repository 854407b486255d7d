/* reduce.c - sums down to smaller shapes, their adjoint, and sums, means, maxima of rows.
 *
 *     sum_to:   y_k = sum of x_i over the elements i that broadcasting maps to k
 *     row_sum:  y_r = sum_d x_rd           row_mean: / D           row_max: max_d x_rd
 *     cumsum:   y_t = sum_(s<=t) x_s
 *
 * x: any shape; y of sum_to: a shape that broadcasts to x's.
 * A sum is split into blocks by its shape alone; each block is added up in memory order by one
 * thread, then the blocks in order: the same bits for any number of threads.  Memory-bound: x is
 * read once.  row_max's gradient goes to the first of equal maxima. */
#include "internal.h"
#include "vec.h"

fg_tensor (fg_sum_to)(fg_loc at, fg_tensor x, fg_shape to)
{
    if (fg_ok(x) && fg_shape_equal(fg_shape_of(x), to)) return x;
    return FG_APPLY(sum_to, at, ((const fg_tensor[]){ x }), to);
}

fg_tensor (fg_sum)(fg_loc at, fg_tensor x)
{
    return (fg_sum_to)(at, x, (fg_shape){ 0 });
}

fg_tensor (fg_mean)(fg_loc at, fg_tensor x)
{
    const fg_tensor sum = (fg_sum)(at, x);
    return fg_ok(sum) ? (fg_scale)(at, sum, 1.0 / (double)fg_count(x), 0) : sum;
}

fg_tensor (fg_broadcast_to)(fg_loc at, fg_tensor x, fg_shape to)
{
    if (fg_ok(x) && fg_shape_equal(fg_shape_of(x), to)) return x;
    return FG_APPLY(broadcast_to, at, ((const fg_tensor[]){ x }), to);
}

#define BUILD(name)                                                                 \
    fg_tensor (fg_##name)(fg_loc at, fg_tensor x)                                   \
    {                                                                               \
        return FG_APPLY(name, at, ((const fg_tensor[]){ x }), 0);                   \
    }
BUILD(row_sum)
BUILD(row_mean)
BUILD(row_max)

fg_tensor fg__row_max_grad(fg_loc at, fg_tensor gy, fg_tensor x)
{
    return FG_APPLY(row_max_grad, at, ((const fg_tensor[]){ gy, x }), 0);
}

fg_tensor (fg_cumsum)(fg_loc at, fg_tensor x, int axis, bool reverse)
{
    if (axis < 0 && fg_ok(x)) axis += fg_shape_of(x).rank;
    return FG_APPLY(cumsum, at, ((const fg_tensor[]){ x }), axis, reverse);
}

/* ---- infer ---------------------------------------------------------------------------------- */

fg_status fg__check_shape(fg_infer *c, const fg_shape *s)
{
    FG_REQUIRE(c, s->rank >= 0 && s->rank <= FG_MAX_RANK, SHAPE, "rank %d is not in 0..%d", s->rank,
               FG_MAX_RANK);
    for (int i = 0; i < s->rank; i++)
        FG_REQUIRE(c, s->dim[i] >= 1, SHAPE, "extent %lld of axis %d is below 1",
                   (long long)s->dim[i], i);
    return FG_OK;
}

fg_status fg__need_reals(fg_infer *c, int from, int to)
{
    bool wide = false;
    for (int i = from; i < to; i++) {
        FG_REQUIRE(c, !c->given[i] || fg__is_real(c->in_type[i]), DTYPE,
                   "input %d is %s; it must be f32 or bf16", i, fg_dtype_name(c->in_type[i]));
        wide = wide || (c->given[i] && c->in_type[i] == FG_F32);
    }
    c->out_type[0] = wide ? FG_F32 : FG_BF16;
    return FG_OK;
}

static fg_status need_real(fg_infer *c)
{
    FG_REQUIRE(c, fg__is_real(c->in_type[0]), DTYPE, "x is %s; it must be f32 or bf16",
               fg_dtype_name(c->in_type[0]));
    return FG_OK;
}

/* Extent of the i-th axis from the end, 1 = last; 1 past the first. */
static int64_t from_end(const fg_shape *s, int i) { return i <= s->rank ? s->dim[s->rank - i] : 1; }

/* small must broadcast to big. */
static fg_status need_broadcast(fg_infer *c, const fg_shape *small, const fg_shape *big)
{
    FG_REQUIRE(c, small->rank <= big->rank, SHAPE, "%d axes do not broadcast to %d", small->rank,
               big->rank);
    for (int i = 1; i <= small->rank; i++)
        FG_REQUIRE(c, from_end(small, i) == 1 || from_end(small, i) == from_end(big, i), SHAPE,
                   "axis -%d of extent %lld does not broadcast to %lld; it must be equal or 1", i,
                   (long long)from_end(small, i), (long long)from_end(big, i));
    return FG_OK;
}

static fg_status sum_to_infer(fg_infer *c)
{
    const struct fg_attr_sum_to *a = c->attr;
    fg_status s = need_real(c);
    if (!s) s = fg__check_shape(c, &a->to);
    if (!s) s = need_broadcast(c, &a->to, &c->in[0]);
    c->out[0] = a->to;
    return s;
}

static fg_status broadcast_to_infer(fg_infer *c)
{
    const struct fg_attr_broadcast_to *a = c->attr;
    fg_status s = need_real(c);
    if (!s) s = fg__check_shape(c, &a->to);
    if (!s) s = need_broadcast(c, &c->in[0], &a->to);
    c->out[0] = a->to;
    return s;
}

static fg_status row_infer(fg_infer *c)
{
    FG_REQUIRE(c, c->in[0].rank >= 1, SHAPE, "x has rank 0; a row needs at least one axis");
    c->out[0] = c->in[0];
    c->out[0].dim[c->in[0].rank - 1] = 1;
    return need_real(c);
}

static fg_status row_max_grad_infer(fg_infer *c)
{
    const fg_shape *gy = &c->in[0], *x = &c->in[1];
    FG_REQUIRE(c, x->rank >= 1, SHAPE, "x has rank 0; a row needs at least one axis");
    FG_REQUIRE(c, fg_shape_count(*gy) == fg__rows(x), SHAPE,
               "gy has %lld elements and x %lld rows; they must be equal",
               (long long)fg_shape_count(*gy), (long long)fg__rows(x));
    c->out[0] = *x;
    return need_real(c);
}

static fg_status cumsum_infer(fg_infer *c)
{
    const struct fg_attr_cumsum *a = c->attr;
    FG_REQUIRE(c, a->axis >= 0 && a->axis < c->in[0].rank, SHAPE, "axis %d of a tensor of rank %d",
               a->axis, c->in[0].rank);
    c->out[0] = c->in[0];
    return need_real(c);
}

/* ---- sums ----------------------------------------------------------------------------------- */

/* Four sums side by side hide the latency of an addition. */
static fg_real sum_of(const fg_real *x, int64_t n)
{
    fg_vec s0 = fg_vset(0), s1 = s0, s2 = s0, s3 = s0;
    int64_t i = 0;
    for (; i + 4 * FG_LANES <= n; i += 4 * FG_LANES) {
        s0 += fg_vload(x + i);
        s1 += fg_vload(x + i + FG_LANES);
        s2 += fg_vload(x + i + 2 * FG_LANES);
        s3 += fg_vload(x + i + 3 * FG_LANES);
    }
    for (; i + FG_LANES <= n; i += FG_LANES) s0 += fg_vload(x + i);
    if (i < n) s1 += fg_vload_n(x + i, n - i);
    return fg_vsum((s0 + s1) + (s2 + s3));
}

/* Adds to y the rows x_0 .. x_(rows-1) of n elements, pitch apart. */
static void add_rows(fg_real *y, const fg_real *x, int64_t pitch, int64_t rows, int64_t n)
{
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4, x += 4 * pitch) {
        const fg_real *p = x + pitch, *q = p + pitch, *s = q + pitch;
        int64_t i = 0;
        for (; i + FG_LANES <= n; i += FG_LANES)
            fg_vstore(y + i, (((fg_vload(y + i) + fg_vload(x + i)) + fg_vload(p + i)) +
                              fg_vload(q + i)) + fg_vload(s + i));
        for (; i < n; i++) y[i] = (((y[i] + x[i]) + p[i]) + q[i]) + s[i];
    }
    for (; r < rows; r++, x += pitch) {
        int64_t i = 0;
        for (; i + FG_LANES <= n; i += FG_LANES)
            fg_vstore(y + i, fg_vload(y + i) + fg_vload(x + i));
        for (; i < n; i++) y[i] += x[i];
    }
}

/* x's axes, neighbours of a kind merged, in the order kept, summed, kept, ...; the first kept one
 * has extent 1 if x begins with a summed one.  A task is one index of axis 0, one block of axis 1
 * and, where axis 2 is the last one, a piece of it. */
typedef struct {
    int rank;
    int64_t dim[FG_MAX_RANK + 1], in_move[FG_MAX_RANK + 1], out_move[FG_MAX_RANK + 1];
    int64_t out_count, blocks, block, pieces, piece;
} sum_plan;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

static sum_plan plan_of(const fg_shape *x, const fg_shape *y)
{
    sum_plan p = { .rank = 1, .dim = { 1 }, .out_count = fg_shape_count(*y) };
    for (int i = x->rank; i >= 1; i--) {
        const int64_t n = from_end(x, i);
        if (n == 1) continue;
        const bool summed = from_end(y, i) == 1;
        if (summed != ((p.rank - 1) % 2 == 1)) p.dim[p.rank++] = 1;
        p.dim[p.rank - 1] *= n;
    }
    if (p.rank == 1) {                                 /* nothing is summed: one row */
        p.rank = 3;
        p.dim[2] = p.dim[0];
        p.dim[0] = p.dim[1] = 1;
    }
    int64_t in = 1, out = 1;
    for (int i = p.rank - 1; i >= 0; i--) {
        p.in_move[i] = in;
        p.out_move[i] = i % 2 ? 0 : out;
        in *= p.dim[i];
        if (i % 2 == 0) out *= p.dim[i];
    }
    /* At most 64 tasks from blocks of at least 16384 elements; their sums never over 2^20 elements
     * nor over an eighth of x. */
    int64_t blocks = least(64 / p.dim[0], p.dim[1] * p.in_move[1] / 16384);
    blocks = least(blocks, least((1 << 20) / p.out_count, in / p.out_count / 8));
    blocks = greatest(1, least(blocks, p.dim[1]));
    p.block = (p.dim[1] + blocks - 1) / blocks;
    p.blocks = (p.dim[1] + p.block - 1) / p.block;
    p.piece = p.rank == 3 ? least(p.dim[2], 4096) : 1;
    p.pieces = p.rank == 3 ? (p.dim[2] + p.piece - 1) / p.piece : 1;
    return p;
}

static size_t plan_bytes(const sum_plan *p)
{
    return p->blocks > 1 ? (size_t)(p->blocks * p->out_count) * sizeof(fg_real) : 0;
}

/* The axes from 2 on, for index s of axis 1: rows along the last axis, added where they belong. */
static void sum_inner(const sum_plan *p, const fg_real *x, fg_real *y)
{
    const int last = p->rank - 1;
    const int64_t n = p->dim[last];
    int64_t index[FG_MAX_RANK + 1] = { 0 };
    for (;;) {
        if (last % 2) *y += sum_of(x, n);
        else add_rows(y, x, 0, 1, n);
        x += n;
        int i = last - 1;
        for (; i >= 2; i--) {
            y += p->out_move[i];
            if (++index[i] < p->dim[i]) break;
            y -= p->out_move[i] * p->dim[i];
            index[i] = 0;
        }
        if (i < 2) return;
    }
}

static void sum_task(const sum_plan *p, const fg_real *x, fg_real *y, int64_t task)
{
    if (p->rank == 2 && p->blocks == 1) {              /* short rows: spare them the divisions */
        y[task] = sum_of(x + task * p->dim[1], p->dim[1]);
        return;
    }
    const int64_t piece = task % p->pieces, block = task / p->pieces % p->blocks;
    const int64_t k = task / p->pieces / p->blocks, first = block * p->block;
    const int64_t rows = least(p->block, p->dim[1] - first);
    x += k * p->in_move[0] + first * p->in_move[1];
    y += block * p->out_count + k * p->out_move[0];
    if (p->rank == 2) {
        *y = sum_of(x, rows);
    } else if (p->rank == 3) {
        const int64_t start = piece * p->piece;
        const int64_t n = least(p->piece, p->dim[2] - start);
        memset(y + start, 0, (size_t)n * sizeof *y);
        add_rows(y + start, x + start, p->dim[2], rows, n);
    } else {
        memset(y, 0, (size_t)p->out_move[0] * sizeof *y);
        for (int64_t s = 0; s < rows; s++, x += p->in_move[1]) sum_inner(p, x, y);
    }
}

/* y = (the sums of x) * factor, elements of y in memory order. */
static void sum_run(const fg_exec *e, fg_real factor)
{
    const sum_plan p = plan_of(&e->in_shape[0], &e->out_shape[0]);
    const fg_real *x = e->in[0];
    fg_real *y = e->out[0], *sums = p.blocks > 1 ? e->scratch : y;
    const int64_t tasks = p.dim[0] * p.blocks * p.pieces;
    const int threads = fg__threads(e, p.dim[0] * p.in_move[0]);
    if (threads == 1) {
        for (int64_t t = 0; t < tasks; t++) sum_task(&p, x, sums, t);
    } else {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t t = 0; t < tasks; t++) sum_task(&p, x, sums, t);
    }
    if (p.blocks > 1) {
        memset(y, 0, (size_t)p.out_count * sizeof *y);
        add_rows(y, sums, p.out_count, p.blocks, p.out_count);
    }
    if (factor != 1)
        for (int64_t i = 0; i < p.out_count; i++) y[i] *= factor;
}

static size_t scratch(const fg_infer *c, int threads)
{
    const sum_plan p = plan_of(&c->in[0], &c->out[0]);
    (void)threads;
    return plan_bytes(&p);
}

static void sum_cpu(const fg_exec *e) { sum_run(e, 1); }

static void row_mean_cpu(const fg_exec *e)
{
    sum_run(e, 1 / (fg_real)fg__last(&e->in_shape[0]));
}

/* ---- the other kernels ---------------------------------------------------------------------- */

/* y = x at every element; the innermost axes that x lacks or has whole are runs. */
static void broadcast_to_cpu(const fg_exec *e)
{
    const sum_plan p = plan_of(&e->out_shape[0], &e->in_shape[0]);
    const int last = p.rank - 1;
    const int64_t n = p.dim[last], rows = p.dim[0] * p.in_move[0] / n;
    const fg_real *x = e->in[0];
    fg_real *y = e->out[0];
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, rows * n))
    for (int64_t r = 0; r < rows; r++) {
        int64_t rest = r, at = 0;
        for (int i = last - 1; i >= 0; i--) {
            at += rest % p.dim[i] * p.out_move[i];
            rest /= p.dim[i];
        }
        fg_real *to = y + r * n;
        if (last % 2 == 0) memcpy(to, x + at, (size_t)n * sizeof *to);
        else for (int64_t i = 0; i < n; i++) to[i] = x[at];
    }
}

/* NaN if any element is. */
static fg_real max_of(const fg_real *x, int64_t n)
{
    fg_vec m = fg_vset(x[0]);
    fg_vint bad = (fg_vint)(m != m);
    int64_t i = 0;
    for (; i + FG_LANES <= n; i += FG_LANES) {
        const fg_vec u = fg_vload(x + i);
        m = fg_vmax(u, m);
        bad |= (fg_vint)(u != u);
    }
    for (; i < n; i++) {
        const fg_vec u = fg_vset(x[i]);
        m = fg_vmax(u, m);
        bad |= (fg_vint)(u != u);
    }
    m = fg_vselect(bad, fg_vset(NAN), m);
    fg_real y = m[0];
    for (int64_t k = 1; k < FG_LANES; k++) y = m[k] > y || m[k] != m[k] ? m[k] : y;
    return y;
}

static void row_max_cpu(const fg_exec *e)
{
    const int64_t D = fg__last(&e->in_shape[0]), rows = fg__rows(&e->in_shape[0]);
    const fg_real *x = e->in[0];
    fg_real *y = e->out[0];
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, rows * D))
    for (int64_t r = 0; r < rows; r++) y[r] = max_of(x + r * D, D);
}

static void row_max_grad_cpu(const fg_exec *e)
{
    const int64_t D = fg__last(&e->in_shape[1]), rows = fg__rows(&e->in_shape[1]);
    const fg_real *gy = e->in[0], *x = e->in[1];
    fg_real *gx = e->out[0];
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, rows * D))
    for (int64_t r = 0; r < rows; r++) {
        const fg_real *row = x + r * D, top = max_of(row, D);
        int64_t first = 0;
        while (first < D - 1 && row[first] != top && row[first] == row[first]) first++;
        memset(gx + r * D, 0, (size_t)D * sizeof *gx);
        gx[r * D + first] = gy[r];
    }
}

/* [outer, T, inner] summed along T, for columns of inner side by side; in double, since gates are
 * summed over long T and differences of the sums are wanted. */
static void cumsum_cpu(const fg_exec *e)
{
    enum { WIDTH = 64 };
    const struct fg_attr_cumsum *a = e->attr;
    const fg_shape *s = &e->in_shape[0];
    const int64_t T = s->dim[a->axis];
    int64_t inner = 1;
    for (int i = a->axis + 1; i < s->rank; i++) inner *= s->dim[i];
    const int64_t count = fg_shape_count(*s), pieces = (inner + WIDTH - 1) / WIDTH;
    const int64_t tasks = count / T / inner * pieces, step = a->reverse ? -inner : inner;
    const fg_real *x = e->in[0];
    fg_real *y = e->out[0];
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, count))
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t start = task % pieces * WIDTH, n = least(WIDTH, inner - start);
        int64_t at = task / pieces * T * inner + start + (a->reverse ? (T - 1) * inner : 0);
        double sum[WIDTH] = { 0 };
        for (int64_t t = 0; t < T; t++, at += step)
            for (int64_t i = 0; i < n; i++) {
                sum[i] += x[at + i];
                y[at + i] = (fg_real)sum[i];
            }
    }
}

/* ---- vjp ------------------------------------------------------------------------------------ */

static void spread_vjp(fg_vjp *v)                      /* sum_to, row_sum: gx_i = gy_k */
{
    v->gin[0] = (fg_broadcast_to)(FG_HERE, v->gout[0], fg_shape_of(v->in[0]));
}

static void broadcast_to_vjp(fg_vjp *v) { v->gin[0] = v->gout[0]; }    /* autodiff sums it down */

static void row_mean_vjp(fg_vjp *v)
{
    const fg_tensor share = fg_scale(v->gout[0], 1.0 / (double)fg_dim(v->in[0], -1), 0);
    v->gin[0] = (fg_broadcast_to)(FG_HERE, share, fg_shape_of(v->in[0]));
}

static void row_max_vjp(fg_vjp *v)
{
    v->gin[0] = fg__row_max_grad(FG_HERE, v->gout[0], v->in[0]);
}

static void cumsum_vjp(fg_vjp *v)                      /* gx_s = sum_(t>=s) gy_t */
{
    const struct fg_attr_cumsum *a = v->attr;
    v->gin[0] = fg_cumsum(v->gout[0], a->axis, !a->reverse);
}

/* ---- decompose ------------------------------------------------------------------------------ */

static void row_sum_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    fg_shape s = fg_shape_of(in[0]);
    s.dim[s.rank - 1] = 1;
    out[0] = fg_sum_to(in[0], s);
    (void)attr;
}

static void row_mean_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    fg_tensor sum;
    row_sum_decompose(in, attr, &sum);
    out[0] = fg_scale(sum, 1.0 / (double)fg_dim(in[0], -1), 0);
}

static fg_cost cost(const fg_infer *c)
{
    const double n = (double)fg_shape_count(c->in[0]), m = (double)fg_shape_count(c->out[0]);
    return (fg_cost){ .flops = n > m ? n : m, .bytes = (n + m) * sizeof(float) };
}
static fg_cost cost_copy(const fg_infer *c)
{
    const double n = (double)fg_shape_count(c->in[0]), m = (double)fg_shape_count(c->out[0]);
    return (fg_cost){ .flops = 0, .bytes = (n + m) * sizeof(float) };
}

/* ---- examples ------------------------------------------------------------------------------- */

/* A big shape and one that broadcasts to it: leading axes, last axis, all, axes in the middle, and
 * kept, summed, kept, summed. */
static bool pair(int i, fg_shape *big, fg_shape *small)
{
    static const fg_shape shapes[][2] = {
        { { 2, { 3, 5 } }, { 1, { 5 } } },
        { { 3, { 2, 3, 5 } }, { 3, { 2, 3, 1 } } },
        { { 2, { 3, 11 } }, { 0, { 0 } } },
        { { 4, { 2, 3, 1, 5 } }, { 4, { 2, 1, 1, 5 } } },
        { { 5, { 2, 3, 2, 5, 3 } }, { 5, { 1, 3, 1, 5, 1 } } },
        { { 4, { 3, 2, 3, 9 } }, { 4, { 3, 1, 3, 1 } } },
        { { 3, { 2, 3, 3 } }, { 2, { 1, 1 } } },
    };
    if (i >= (int)(sizeof shapes / sizeof shapes[0])) return false;
    *big = shapes[i][0];
    *small = shapes[i][1];
    return true;
}

static fg_tensor sum_to_example(fg_graph *g, int i)
{
    fg_shape big, small;
    if (!pair(i, &big, &small)) return (fg_tensor){ 0 };
    const fg_tensor x = (fg_random)(FG_HERE, g, big);
    return fg_sum_to(x, small);
}

static fg_tensor broadcast_to_example(fg_graph *g, int i)
{
    fg_shape big, small;
    if (!pair(i, &big, &small)) return (fg_tensor){ 0 };
    const fg_tensor x = (fg_random)(FG_HERE, g, small);
    return fg_broadcast_to(x, big);
}

static fg_tensor row_sample(fg_graph *g, int i)
{
    switch (i) {
    case 0: return fg_random(g, 3, 5);
    case 1: return fg_random(g, 2, 1, 37);
    case 2: return fg_random(g, 5, 1);
    case 3: return fg_random(g, 8);
    default: return (fg_tensor){ 0 };
    }
}

#define EXAMPLE(name)                                                               \
    static fg_tensor name##_example(fg_graph *g, int i)                             \
    {                                                                               \
        const fg_tensor x = row_sample(g, i);                                       \
        return fg_absent(x) ? x : fg_##name(x);                                     \
    }
EXAMPLE(row_sum)
EXAMPLE(row_mean)
EXAMPLE(row_max)

static fg_tensor cumsum_example(fg_graph *g, int i)
{
    if (i > 4) return (fg_tensor){ 0 };
    const fg_tensor x = i == 4 ? fg_random(g, 7) : fg_random(g, 3, 5, 2);
    switch (i) {
    case 0: return fg_cumsum(x, 1, false);
    case 1: return fg_cumsum(x, -1, false);
    case 2: return fg_cumsum(x, 0, true);
    case 3: return fg_cumsum(x, 2, true);
    default: return fg_cumsum(x, 0, false);
    }
}

/* ---- records -------------------------------------------------------------------------------- */

const fg_op_code fg_code_sum_to = {
    .infer = sum_to_infer, .cpu = sum_cpu, .vjp = spread_vjp, .cost = cost,
    .example = sum_to_example, .scratch = scratch,
    .bf16 = { .wide_out = 1 }
};
const fg_op_code fg_code_broadcast_to = {
    .infer = broadcast_to_infer, .cpu = broadcast_to_cpu, .vjp = broadcast_to_vjp,
    .cost = cost_copy, .example = broadcast_to_example
};
const fg_op_code fg_code_row_sum = {
    .infer = row_infer, .cpu = sum_cpu, .vjp = spread_vjp, .cost = cost,
    .decompose = row_sum_decompose, .example = row_sum_example, .scratch = scratch,
    .bf16 = { .wide_out = 1 }
};
const fg_op_code fg_code_row_mean = {
    .infer = row_infer, .cpu = row_mean_cpu, .vjp = row_mean_vjp, .cost = cost,
    .decompose = row_mean_decompose, .example = row_mean_example, .scratch = scratch,
    .bf16 = { .wide_out = 1 }
};
const fg_op_code fg_code_row_max = {
    .infer = row_infer, .cpu = row_max_cpu, .vjp = row_max_vjp, .cost = cost,
    .example = row_max_example
};
const fg_op_code fg_code_row_max_grad = {
    .infer = row_max_grad_infer, .cpu = row_max_grad_cpu, .cost = cost_copy,
    .bf16 = { .like = { 2 } }
};
const fg_op_code fg_code_cumsum = {
    .infer = cumsum_infer, .cpu = cumsum_cpu, .vjp = cumsum_vjp, .cost = cost,
    .example = cumsum_example, .reuse = 1, .bf16 = { .wide_out = 1 }
};
