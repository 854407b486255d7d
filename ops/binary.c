/* binary.c - elementwise functions of two or three tensors of shapes that broadcast.
 *
 *     y_i = f(a_i, b_i)
 *
 * a, b (and x): aligned at the last axis, extents equal or 1; y: the greater extents.
 * Axes are merged where every input walks them as one; what is left is rows along the last merged
 * axis, where each input moves by 1 or stands still.  So equal shapes are one row, a bias is R rows
 * of one input standing still from row to row, a [...,1] column stands still within a row. */
#include "internal.h"
#include "vec.h"

#define BUILD(name)                                                                 \
    fg_tensor (fg_##name)(fg_loc at, fg_tensor a, fg_tensor b)                      \
    {                                                                               \
        return FG_APPLY(name, at, ((const fg_tensor[]){ a, b }), 0);                \
    }
BUILD(add)
BUILD(sub)
BUILD(mul)
BUILD(div)
BUILD(max)

fg_tensor fg__where_ge(fg_loc at, fg_tensor a, fg_tensor b, fg_tensor x)
{
    return FG_APPLY(where_ge, at, ((const fg_tensor[]){ a, b, x }), 0);
}

/* ---- infer ---------------------------------------------------------------------------------- */

/* Extent of the i-th axis from the end, 1 = last; 1 past the first. */
static int64_t from_end(const fg_shape *s, int i) { return i <= s->rank ? s->dim[s->rank - i] : 1; }

static fg_status infer(fg_infer *c)
{
    fg_shape y = c->in[0];
    for (int k = 0; k < c->n_in; k++) {
        if (c->in[k].rank > y.rank) y.rank = c->in[k].rank;
    }
    for (int i = 1; i <= y.rank; i++) {
        int64_t extent = 1;
        for (int k = 0; k < c->n_in; k++) {
            const int64_t n = from_end(&c->in[k], i);
            FG_REQUIRE(c, n == extent || n == 1 || extent == 1, SHAPE,
                       "axis -%d is %lld in input %d, %lld before it; they must be equal or 1",
                       i, (long long)n, k, (long long)extent);
            if (n != 1) extent = n;
        }
        y.dim[y.rank - i] = extent;
    }
    c->out[0] = y;
    return fg__need_reals(c, 0, c->n_in);
}

/* ---- cpu ------------------------------------------------------------------------------------ */

enum { MAX_IN = 3 };

/* y's axes after merging, outermost first, and how far each input moves along each. */
typedef struct {
    int n_in, rank;
    int64_t dim[FG_MAX_RANK], move[MAX_IN][FG_MAX_RANK];
} walk;

/* Adds an axis inside those of w, or makes the innermost one longer. */
static void add_axis(walk *w, int64_t extent, const int64_t *move)
{
    bool one = w->rank > 0;
    for (int k = 0; k < w->n_in; k++)
        one = one && w->move[k][w->rank - 1] == move[k] * extent;
    if (!one) w->dim[w->rank++] = 1;
    w->dim[w->rank - 1] *= extent;
    for (int k = 0; k < w->n_in; k++) w->move[k][w->rank - 1] = move[k];
}

static walk walk_of(const fg_exec *e)
{
    const fg_shape *y = &e->out_shape[0];
    walk w = { .n_in = e->n_in };
    int64_t left[MAX_IN];                              /* elements of input k inside axis i */
    for (int k = 0; k < e->n_in; k++) left[k] = fg_shape_count(e->in_shape[k]);
    for (int i = y->rank; i >= 1; i--) {
        int64_t move[MAX_IN];
        for (int k = 0; k < e->n_in; k++) {
            const int64_t n = from_end(&e->in_shape[k], i);
            left[k] /= n;
            move[k] = n == 1 ? 0 : left[k];
        }
        if (y->dim[y->rank - i] != 1) add_axis(&w, y->dim[y->rank - i], move);
    }
    if (w.rank == 0) w.dim[w.rank++] = 1;
    return w;
}

/* One row: y and every input that moves hold n elements, the others one. */
typedef void (*row_fn)(fg_real *y, const fg_real *const *in, const bool *moves, int64_t n);

/* Rows [from, to) of the walk, elements [start, start + n) of each. */
static void rows_of(const fg_exec *e, const walk *w, row_fn row, int64_t from, int64_t to,
                    int64_t start, int64_t n)
{
    const int last = w->rank - 1;
    int64_t index[FG_MAX_RANK], rest = from;
    const fg_real *in[MAX_IN];
    bool moves[MAX_IN];
    for (int k = 0; k < w->n_in; k++) {
        moves[k] = w->move[k][last] != 0;
        in[k] = (const fg_real *)e->in[k] + (moves[k] ? start : 0);
    }
    for (int i = last - 1; i >= 0; i--) {
        index[i] = rest % w->dim[i];
        rest /= w->dim[i];
        for (int k = 0; k < w->n_in; k++) in[k] += index[i] * w->move[k][i];
    }
    fg_real *y = (fg_real *)e->out[0] + from * w->dim[last] + start;
    for (int64_t r = from; r < to; r++, y += w->dim[last]) {
        row(y, in, moves, n);
        for (int i = last - 1; i >= 0; i--) {
            const bool wraps = ++index[i] == w->dim[i];
            for (int k = 0; k < w->n_in; k++)
                in[k] += w->move[k][i] * (wraps ? 1 - w->dim[i] : 1);
            if (!wraps) break;
            index[i] = 0;
        }
    }
}

static void over_rows(const fg_exec *e, row_fn row)
{
    const walk w = walk_of(e);
    const int64_t n = w.dim[w.rank - 1], count = fg_shape_count(e->out_shape[0]), rows = count / n;
    if (fg__threads(e, count) == 1) {
        rows_of(e, &w, row, 0, rows, 0, n);
        return;
    }
    /* Tasks of about 8192 elements: several rows, or a piece of one. */
    const int64_t width = n > 16384 ? 8192 : n, pieces = (n + width - 1) / width;
    const int64_t group = n < 8192 ? 8192 / n : 1, groups = (rows + group - 1) / group;
#pragma omp parallel for schedule(static) num_threads(e->threads)
    for (int64_t t = 0; t < groups * pieces; t++) {
        const int64_t from = t / pieces * group, to = from + group < rows ? from + group : rows;
        const int64_t start = t % pieces * width;
        rows_of(e, &w, row, from, to, start, n - start < width ? n - start : width);
    }
}

/* The kernel of an op from its function of two vectors. */
#define CPU(name)                                                                              \
    static inline void name##_loop(fg_real *y, const fg_real *a, const fg_real *b, int64_t n,  \
                                   bool a_moves, bool b_moves)                                 \
    {                                                                                          \
        const fg_vec a0 = fg_vset(*a), b0 = fg_vset(*b);                                       \
        int64_t i = 0;                                                                         \
        for (; i + FG_LANES <= n; i += FG_LANES)                                               \
            fg_vstore(y + i, name##_of(a_moves ? fg_vload(a + i) : a0,                         \
                                       b_moves ? fg_vload(b + i) : b0));                       \
        if (i < n)                                                                             \
            fg_vstore_n(y + i, name##_of(a_moves ? fg_vload_n(a + i, n - i) : a0,              \
                                         b_moves ? fg_vload_n(b + i, n - i) : b0), n - i);     \
    }                                                                                          \
    static void name##_row(fg_real *y, const fg_real *const *in, const bool *moves, int64_t n) \
    {                                                                                          \
        if (moves[0] && moves[1]) name##_loop(y, in[0], in[1], n, true, true);                 \
        else if (moves[0]) name##_loop(y, in[0], in[1], n, true, false);                       \
        else name##_loop(y, in[0], in[1], n, false, moves[1]);                                 \
    }                                                                                          \
    static void name##_cpu(const fg_exec *e)                                                   \
    {                                                                                          \
        over_rows(e, name##_row);                                                              \
    }

static inline fg_vec add_of(fg_vec a, fg_vec b) { return a + b; }
static inline fg_vec sub_of(fg_vec a, fg_vec b) { return a - b; }
static inline fg_vec mul_of(fg_vec a, fg_vec b) { return a * b; }
static inline fg_vec div_of(fg_vec a, fg_vec b) { return a / b; }
static inline fg_vec max_of(fg_vec a, fg_vec b) { return fg_vselect((fg_vint)(a >= b), a, b); }
CPU(add)
CPU(sub)
CPU(mul)
CPU(div)
CPU(max)

static void where_ge_row(fg_real *y, const fg_real *const *in, const bool *moves, int64_t n)
{
    for (int64_t i = 0; i < n; i += FG_LANES) {
        const int64_t lanes = n - i < FG_LANES ? n - i : FG_LANES;
        fg_vec v[MAX_IN];
        for (int k = 0; k < MAX_IN; k++)
            v[k] = !moves[k] ? fg_vset(*in[k]) : lanes == FG_LANES ? fg_vload(in[k] + i)
                                                                   : fg_vload_n(in[k] + i, lanes);
        const fg_vec u = fg_vselect((fg_vint)(v[0] >= v[1]), v[2], fg_vset(0));
        if (lanes == FG_LANES) fg_vstore(y + i, u);
        else fg_vstore_n(y + i, u, lanes);
    }
}

static void where_ge_cpu(const fg_exec *e) { over_rows(e, where_ge_row); }

/* ---- vjp: autodiff sums each gradient down to its input's shape ----------------------------- */

static void add_vjp(fg_vjp *v) { v->gin[0] = v->gin[1] = v->gout[0]; }

static void sub_vjp(fg_vjp *v)
{
    v->gin[0] = v->gout[0];
    if (v->wants[1]) v->gin[1] = fg_neg(v->gout[0]);
}

static void mul_vjp(fg_vjp *v)
{
    if (v->wants[0]) v->gin[0] = fg_mul(v->gout[0], v->in[1]);
    if (v->wants[1]) v->gin[1] = fg_mul(v->gout[0], v->in[0]);
}

static void div_vjp(fg_vjp *v)                         /* ga = gy / b, gb = -ga y */
{
    const fg_tensor ga = fg_div(v->gout[0], v->in[1]);
    v->gin[0] = ga;
    if (!v->wants[1]) return;
    const fg_tensor t = fg_mul(ga, v->out[0]);
    v->gin[1] = fg_neg(t);
}

static void max_vjp(fg_vjp *v)
{
    const fg_tensor ga = fg__where_ge(FG_HERE, v->in[0], v->in[1], v->gout[0]);
    v->gin[0] = ga;
    if (v->wants[1]) v->gin[1] = fg_sub(v->gout[0], ga);
}

static void where_ge_vjp(fg_vjp *v)
{
    if (v->wants[2]) v->gin[2] = fg__where_ge(FG_HERE, v->in[0], v->in[1], v->gout[0]);
}

static fg_cost cost(const fg_infer *c)
{
    double elements = (double)fg_shape_count(c->out[0]);
    const double flops = elements;
    for (int k = 0; k < c->n_in; k++) elements += (double)fg_shape_count(c->in[k]);
    return (fg_cost){ .flops = flops, .bytes = elements * sizeof(float) };
}

/* ---- examples ------------------------------------------------------------------------------- */

/* Shapes of a and b: equal, both scalars, a bias, a column, a scalar on either side, an outer
 * product, both repeated along axes in the middle. */
static bool sample(fg_graph *g, int i, fg_tensor *a, fg_tensor *b)
{
    static const fg_shape shapes[][2] = {
        { { 2, { 3, 5 } }, { 2, { 3, 5 } } },
        { { 0, { 0 } }, { 0, { 0 } } },
        { { 3, { 2, 3, 5 } }, { 1, { 5 } } },
        { { 3, { 2, 3, 5 } }, { 3, { 2, 3, 1 } } },
        { { 0, { 0 } }, { 2, { 3, 11 } } },
        { { 2, { 1, 9 } }, { 1, { 1 } } },
        { { 2, { 5, 1 } }, { 2, { 1, 3 } } },
        { { 4, { 2, 1, 3, 1 } }, { 3, { 3, 1, 9 } } },
    };
    if (i >= (int)(sizeof shapes / sizeof shapes[0])) return false;
    *a = (fg_random)(FG_HERE, g, shapes[i][0]);
    *b = (fg_random)(FG_HERE, g, shapes[i][1]);
    return true;
}

#define EXAMPLE(name)                                                               \
    static fg_tensor name##_example(fg_graph *g, int i)                             \
    {                                                                               \
        fg_tensor a, b;                                                             \
        return sample(g, i, &a, &b) ? fg_##name(a, b) : (fg_tensor){ 0 };           \
    }
EXAMPLE(add)
EXAMPLE(sub)
EXAMPLE(mul)
EXAMPLE(max)

static fg_tensor div_example(fg_graph *g, int i)
{
    fg_tensor a, b;
    if (!sample(g, i, &a, &b)) return (fg_tensor){ 0 };
    const fg_tensor positive = fg_exp(b);
    return fg_div(a, positive);
}

static fg_tensor where_ge_example(fg_graph *g, int i)
{
    fg_tensor a, b;
    if (!sample(g, i, &a, &b)) return (fg_tensor){ 0 };
    if (i != 3 && i != 5) return fg__where_ge(FG_HERE, a, b, a);
    const fg_tensor x = fg_random(g, 3, 1);
    return fg__where_ge(FG_HERE, b, a, x);
}

#define CODE(name)                                                                      \
    const fg_op_code fg_code_##name = {                                                 \
        .infer = infer, .cpu = name##_cpu, .vjp = name##_vjp, .cost = cost,             \
        .example = name##_example, .reuse = 3 };
CODE(add)
CODE(sub)
CODE(mul)
CODE(div)
CODE(max)

const fg_op_code fg_code_where_ge = {
    .infer = infer, .cpu = where_ge_cpu, .vjp = where_ge_vjp, .cost = cost,
    .example = where_ge_example, .reuse = 7
};
