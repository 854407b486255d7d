/* view.c - the same elements seen or laid out in another way.
 *
 *     reshape:  y = x in the same memory                       [any] -> to
 *     permute:  y's axis i is x's axis order[i]
 *     slice:    y = x[start:stop] along an axis                [...,N,...] -> [...,stop-start,...]
 *     concat:   y = a followed by b along an axis
 *
 * Every dtype.  Copies only: each element is read and written once.  A permutation that keeps the
 * last axis copies whole runs, in tiles that go through both tensors in long stretches; any other
 * goes in square tiles over the two axes that are innermost in x and in y. */
#include <string.h>
#include "internal.h"

fg_tensor (fg_reshape)(fg_loc at, fg_tensor x, fg_shape to)
{
    if (fg_ok(x) && fg_shape_equal(fg_shape_of(x), to)) return x;
    return FG_APPLY(reshape, at, ((const fg_tensor[]){ x }), to);
}

fg_tensor (fg_permute)(fg_loc at, fg_tensor x, fg_shape order)
{
    return FG_APPLY(permute, at, ((const fg_tensor[]){ x }), order);
}

fg_tensor (fg_slice)(fg_loc at, fg_tensor x, int axis, int64_t start, int64_t stop)
{
    if (axis < 0 && fg_ok(x)) axis += fg_shape_of(x).rank;
    return FG_APPLY(slice, at, ((const fg_tensor[]){ x }), axis, start, stop);
}

fg_tensor fg__slice_grad(fg_loc at, fg_tensor gy, int axis, int64_t start, int64_t extent)
{
    return FG_APPLY(slice_grad, at, ((const fg_tensor[]){ gy }), axis, start, extent);
}

fg_tensor (fg_concat)(fg_loc at, fg_tensor a, fg_tensor b, int axis)
{
    if (axis < 0 && fg_ok(a)) axis += fg_shape_of(a).rank;
    return FG_APPLY(concat, at, ((const fg_tensor[]){ a, b }), axis);
}

/* ---- infer ---------------------------------------------------------------------------------- */

static fg_status reshape_infer(fg_infer *c)
{
    const struct fg_attr_reshape *a = c->attr;
    const fg_status s = fg__check_shape(c, &a->to);
    if (s) return s;
    FG_REQUIRE(c, fg_shape_count(a->to) == fg_shape_count(c->in[0]), SHAPE,
               "x has %lld elements, the other shape %lld; they must be equal",
               (long long)fg_shape_count(c->in[0]), (long long)fg_shape_count(a->to));
    c->out[0] = a->to;
    return FG_OK;
}

static fg_status permute_infer(fg_infer *c)
{
    const struct fg_attr_permute *a = c->attr;
    const int rank = c->in[0].rank;
    FG_REQUIRE(c, a->order.rank == rank, SHAPE, "order names %d axes, x has %d", a->order.rank,
               rank);
    c->out[0].rank = rank;
    bool seen[FG_MAX_RANK] = { false };
    for (int i = 0; i < rank; i++) {
        const int64_t k = a->order.dim[i];
        FG_REQUIRE(c, k >= 0 && k < rank, SHAPE, "order names axis %lld of a tensor of rank %d",
                   (long long)k, rank);
        FG_REQUIRE(c, !seen[k], SHAPE, "order names axis %lld twice", (long long)k);
        seen[k] = true;
        c->out[0].dim[i] = c->in[0].dim[k];
    }
    return FG_OK;
}

static fg_status need_axis(fg_infer *c, int axis)
{
    FG_REQUIRE(c, axis >= 0 && axis < c->in[0].rank, SHAPE, "axis %d of a tensor of rank %d", axis,
               c->in[0].rank);
    return FG_OK;
}

static fg_status slice_infer(fg_infer *c)
{
    const struct fg_attr_slice *a = c->attr;
    const fg_status s = need_axis(c, a->axis);
    if (s) return s;
    const int64_t extent = c->in[0].dim[a->axis];
    FG_REQUIRE(c, a->start >= 0 && a->start < a->stop && a->stop <= extent, SHAPE,
               "[%lld:%lld] is not a part of axis %d of extent %lld", (long long)a->start,
               (long long)a->stop, a->axis, (long long)extent);
    c->out[0] = c->in[0];
    c->out[0].dim[a->axis] = a->stop - a->start;
    return FG_OK;
}

static fg_status slice_grad_infer(fg_infer *c)
{
    const struct fg_attr_slice_grad *a = c->attr;
    const fg_status s = need_axis(c, a->axis);
    if (s) return s;
    const int64_t n = c->in[0].dim[a->axis];
    FG_REQUIRE(c, a->start >= 0 && a->start <= a->extent - n, SHAPE,
               "%lld elements from %lld do not fit an axis of extent %lld", (long long)n,
               (long long)a->start, (long long)a->extent);
    c->out[0] = c->in[0];
    c->out[0].dim[a->axis] = a->extent;
    return FG_OK;
}

static void slice_span(const void *attr, int *axis, int64_t *start)
{
    const struct fg_attr_slice *a = attr;
    *axis = a->axis;
    *start = a->start;
}

static void concat_span(const void *attr, int *axis, int64_t *start)
{
    const struct fg_attr_concat *a = attr;
    *axis = a->axis;
    *start = 0;
}

static fg_status concat_infer(fg_infer *c)
{
    const struct fg_attr_concat *a = c->attr;
    const fg_status s = need_axis(c, a->axis);
    if (s) return s;
    FG_REQUIRE(c, c->in_type[0] == c->in_type[1], DTYPE, "a is %s and b is %s; they must be equal",
               fg_dtype_name(c->in_type[0]), fg_dtype_name(c->in_type[1]));
    FG_REQUIRE(c, c->in[0].rank == c->in[1].rank, SHAPE, "a has %d axes, b %d; they must be equal",
               c->in[0].rank, c->in[1].rank);
    for (int i = 0; i < c->in[0].rank; i++)
        FG_REQUIRE(c, i == a->axis || c->in[0].dim[i] == c->in[1].dim[i], SHAPE,
                   "axis %d is %lld in a and %lld in b; only axis %d may differ", i,
                   (long long)c->in[0].dim[i], (long long)c->in[1].dim[i], a->axis);
    c->out[0] = c->in[0];
    c->out[0].dim[a->axis] += c->in[1].dim[a->axis];
    return FG_OK;
}

/* ---- copies of stretches -------------------------------------------------------------------- */

/* rows times n bytes, from rows that lie from_pitch bytes apart to rows to_pitch apart; from = NULL
 * writes zeros. */
static void copy_rows(const fg_exec *e, void *to, int64_t to_pitch, const void *from,
                      int64_t from_pitch, int64_t n, int64_t rows)
{
    const int64_t width = n > 65536 ? 32768 : n > 0 ? n : 1, pieces = (n + width - 1) / width;
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, n * rows / 4))
    for (int64_t t = 0; t < rows * pieces; t++) {
        const int64_t row = t / pieces, start = t % pieces * width;
        const size_t bytes = (size_t)(n - start < width ? n - start : width);
        char *y = (char *)to + row * to_pitch + start;
        if (from) memcpy(y, (const char *)from + row * from_pitch + start, bytes);
        else memset(y, 0, bytes);
    }
}

/* Elements before and inside an axis. */
static int64_t outside(const fg_shape *s, int axis)
{
    int64_t n = 1;
    for (int i = 0; i < axis; i++) n *= s->dim[i];
    return n;
}
static int64_t inside(const fg_shape *s, int axis)
{
    int64_t n = 1;
    for (int i = axis + 1; i < s->rank; i++) n *= s->dim[i];
    return n;
}

static void reshape_cpu(const fg_exec *e)
{
    const int64_t bytes = fg_shape_count(e->in_shape[0]) * (int64_t)fg__cpu_size(e->in_type[0]);
    if (e->out[0] != e->in[0]) copy_rows(e, e->out[0], bytes, e->in[0], bytes, bytes, 1);
}

static void slice_cpu(const fg_exec *e)
{
    const struct fg_attr_slice *a = e->attr;
    const fg_shape *x = &e->in_shape[0];
    const int64_t step = inside(x, a->axis) * (int64_t)fg__cpu_size(e->in_type[0]);
    const int64_t n = (a->stop - a->start) * step;
    copy_rows(e, e->out[0], n, (const char *)e->in[0] + a->start * step, x->dim[a->axis] * step, n,
              outside(x, a->axis));
}

static void slice_grad_cpu(const fg_exec *e)
{
    const struct fg_attr_slice_grad *a = e->attr;
    const fg_shape *gy = &e->in_shape[0];
    const int64_t step = inside(gy, a->axis) * (int64_t)fg__cpu_size(e->in_type[0]);
    const int64_t n = gy->dim[a->axis] * step, pitch = a->extent * step;
    const int64_t rows = outside(gy, a->axis);
    const int64_t before = a->start * step, after = pitch - before - n;
    char *gx = e->out[0];
    copy_rows(e, gx + before, pitch, e->in[0], n, n, rows);
    if (before > 0) copy_rows(e, gx, pitch, NULL, 0, before, rows);
    if (after > 0) copy_rows(e, gx + before + n, pitch, NULL, 0, after, rows);
}

static void concat_cpu(const fg_exec *e)
{
    const struct fg_attr_concat *at = e->attr;
    const fg_shape *a = &e->in_shape[0], *b = &e->in_shape[1];
    const int64_t step = inside(a, at->axis) * (int64_t)fg__cpu_size(e->in_type[0]);
    const int64_t na = a->dim[at->axis] * step, nb = b->dim[at->axis] * step;
    const int64_t rows = outside(a, at->axis);
    copy_rows(e, e->out[0], na + nb, e->in[0], na, na, rows);
    copy_rows(e, (char *)e->out[0] + na, na + nb, e->in[1], nb, nb, rows);
}

/* ---- permute -------------------------------------------------------------------------------- */

/* y's axes, outermost first, axes that stay neighbours merged, the last one taken out as a run of
 * n elements if it is x's last one too.  move: elements of x, pitch: of y, between neighbours. */
typedef struct {
    int rank;
    int64_t n, dim[FG_MAX_RANK], move[FG_MAX_RANK], pitch[FG_MAX_RANK];
} layout;

static layout layout_of(const fg_shape *x, const fg_shape *order)
{
    layout l = { .n = 1 };
    int64_t stride[FG_MAX_RANK], s = 1;
    for (int i = x->rank - 1; i >= 0; i--) {
        stride[i] = s;
        s *= x->dim[i];
    }
    for (int i = 0; i < x->rank; i++) {
        const int64_t axis = order->dim[i], n = x->dim[axis];
        if (n == 1) continue;
        if (l.rank > 0 && l.move[l.rank - 1] == n * stride[axis]) {
            l.dim[l.rank - 1] *= n;
        } else {
            l.dim[l.rank++] = n;
        }
        l.move[l.rank - 1] = stride[axis];
    }
    if (l.rank > 0 && l.move[l.rank - 1] == 1) l.n = l.dim[--l.rank];
    int64_t pitch = l.n;
    for (int i = l.rank - 1; i >= 0; i--) {
        l.pitch[i] = pitch;
        pitch *= l.dim[i];
    }
    return l;
}

/* One tile of runs of `bytes`: count, y's pitch and x's move in bytes along the tile's two axes. */
static inline void copy_runs(char *y, const char *x, const int64_t count[2], const int64_t pitch[2],
                             const int64_t move[2], size_t bytes)
{
    for (int64_t i = 0; i < count[0]; i++)
        for (int64_t j = 0; j < count[1]; j++)
            memcpy(y + i * pitch[0] + j * pitch[1], x + i * move[0] + j * move[1], bytes);
}
static void copy_tile(char *y, const char *x, const int64_t count[2], const int64_t pitch[2],
                      const int64_t move[2], size_t bytes)
{
    if (bytes == 4) copy_runs(y, x, count, pitch, move, 4);
    else if (bytes == 8) copy_runs(y, x, count, pitch, move, 8);
    else copy_runs(y, x, count, pitch, move, bytes);
}

/* The tile's axes: y's last one, and the one along which x is nearest to contiguous. */
static void permute_cpu(const fg_exec *e)
{
    const struct fg_attr_permute *a = e->attr;
    const layout l = layout_of(&e->in_shape[0], &a->order);
    const int64_t size = (int64_t)fg__cpu_size(e->in_type[0]);
    const int64_t count = fg_shape_count(e->in_shape[0]);
    if (l.rank < 2) {                                  /* the same order in memory */
        copy_rows(e, e->out[0], 0, e->in[0], 0, count * size, 1);
        return;
    }
    const int q = l.rank - 1;
    int p = 0;
    for (int i = 1; i < q; i++)
        if (l.move[i] < l.move[p]) p = i;
    const int64_t side = l.n > 1 ? 32 : 16;
    int64_t tiles = 1, grid[FG_MAX_RANK];
    for (int i = 0; i < l.rank; i++) {
        grid[i] = i == p || i == q ? (l.dim[i] + side - 1) / side : l.dim[i];
        tiles *= grid[i];
    }
#pragma omp parallel for schedule(static) num_threads(fg__threads(e, count))
    for (int64_t t = 0; t < tiles; t++) {
        int64_t rest = t, to = 0, from = 0, part[2] = { 0, 0 };
        for (int i = l.rank - 1; i >= 0; i--) {
            const bool tiled = i == p || i == q;
            const int64_t k = rest % grid[i] * (tiled ? side : 1);
            rest /= grid[i];
            to += k * l.pitch[i];
            from += k * l.move[i];
            if (tiled) part[i == q] = l.dim[i] - k < side ? l.dim[i] - k : side;
        }
        const int64_t pitch[] = { l.pitch[p] * size, l.pitch[q] * size };
        const int64_t move[] = { l.move[p] * size, l.move[q] * size };
        copy_tile((char *)e->out[0] + to * size, (const char *)e->in[0] + from * size, part, pitch,
                  move, (size_t)(l.n * size));
    }
}

/* ---- vjp ------------------------------------------------------------------------------------ */

static void reshape_vjp(fg_vjp *v)
{
    v->gin[0] = (fg_reshape)(FG_HERE, v->gout[0], fg_shape_of(v->in[0]));
}

static void permute_vjp(fg_vjp *v)                     /* the inverse order */
{
    const struct fg_attr_permute *a = v->attr;
    fg_shape back = { .rank = a->order.rank };
    for (int i = 0; i < back.rank; i++) back.dim[a->order.dim[i]] = i;
    v->gin[0] = fg_permute(v->gout[0], back);
}

static void slice_vjp(fg_vjp *v)
{
    const struct fg_attr_slice *a = v->attr;
    v->gin[0] = fg__slice_grad(FG_HERE, v->gout[0], a->axis, a->start, fg_dim(v->in[0], a->axis));
}

static void slice_grad_vjp(fg_vjp *v)
{
    const struct fg_attr_slice_grad *a = v->attr;
    v->gin[0] = fg_slice(v->gout[0], a->axis, a->start, a->start + fg_dim(v->in[0], a->axis));
}

static void concat_vjp(fg_vjp *v)
{
    const struct fg_attr_concat *a = v->attr;
    const int64_t na = fg_dim(v->in[0], a->axis), nb = fg_dim(v->in[1], a->axis);
    if (v->wants[0]) v->gin[0] = fg_slice(v->gout[0], a->axis, 0, na);
    if (v->wants[1]) v->gin[1] = fg_slice(v->gout[0], a->axis, na, na + nb);
}

static fg_cost cost_none(const fg_infer *c)
{
    (void)c;
    return (fg_cost){ 0 };
}

/* ---- examples ------------------------------------------------------------------------------- */

static fg_tensor reshape_example(fg_graph *g, int i)
{
    if (i > 2) return (fg_tensor){ 0 };
    const fg_tensor x = i < 2 ? fg_random(g, 3, 2, 5) : fg_random(g, 1, 1);
    switch (i) {
    case 0: return fg_reshape(x, FG_DIMS(5, 6));
    case 1: return fg_reshape(x, FG_DIMS(30));
    default: return fg_reshape(x, (fg_shape){ 0 });
    }
}

static fg_tensor permute_example(fg_graph *g, int i)
{
    static const fg_shape cases[][2] = {               /* a shape and an order */
        { { 4, { 2, 3, 5, 3 } }, { 4, { 0, 2, 1, 3 } } },
        { { 2, { 3, 5 } }, { 2, { 1, 0 } } },
        { { 3, { 2, 3, 5 } }, { 3, { 2, 0, 1 } } },
        { { 4, { 3, 2, 5, 3 } }, { 4, { 3, 1, 0, 2 } } },
        { { 3, { 1, 17, 19 } }, { 3, { 2, 0, 1 } } },
        { { 3, { 3, 1, 5 } }, { 3, { 1, 0, 2 } } },
        { { 0, { 0 } }, { 0, { 0 } } },
        { { 6, { 2, 3, 1, 2, 3, 2 } }, { 6, { 4, 2, 0, 5, 3, 1 } } },
    };
    if (i >= (int)(sizeof cases / sizeof cases[0])) return (fg_tensor){ 0 };
    const fg_tensor x = (fg_random)(FG_HERE, g, cases[i][0]);
    return fg_permute(x, cases[i][1]);
}

static fg_tensor slice_example(fg_graph *g, int i)
{
    if (i > 3) return (fg_tensor){ 0 };
    const fg_tensor x = fg_random(g, 3, 5, 2);
    switch (i) {
    case 0: return fg_slice(x, 1, 1, 4);
    case 1: return fg_slice(x, -1, 1, 2);
    case 2: return fg_slice(x, 0, 0, 1);
    default: return fg_slice(x, 0, 0, 3);
    }
}

static fg_tensor slice_grad_example(fg_graph *g, int i)
{
    if (i > 2) return (fg_tensor){ 0 };
    const fg_tensor gy = fg_random(g, 3, 5, 2);
    switch (i) {
    case 0: return fg__slice_grad(FG_HERE, gy, 1, 2, 9);
    case 1: return fg__slice_grad(FG_HERE, gy, 0, 0, 4);
    default: return fg__slice_grad(FG_HERE, gy, 2, 1, 3);
    }
}

static fg_tensor concat_example(fg_graph *g, int i)
{
    if (i > 2) return (fg_tensor){ 0 };
    const fg_tensor a = fg_random(g, 3, 5, 1);
    const fg_tensor b = i == 0 ? fg_random(g, 1, 5, 1) : i == 1 ? fg_random(g, 3, 2, 1)
                                                                : fg_random(g, 3, 5, 3);
    return fg_concat(a, b, i == 2 ? -1 : i);
}

/* ---- records -------------------------------------------------------------------------------- */

const fg_op_code fg_code_reshape = {
    .infer = reshape_infer, .cpu = reshape_cpu, .vjp = reshape_vjp, .cost = cost_none,
    .example = reshape_example, .memory = FG_VIEW
};
const fg_op_code fg_code_permute = {
    .infer = permute_infer, .cpu = permute_cpu, .vjp = permute_vjp, .example = permute_example
};
const fg_op_code fg_code_slice = {
    .infer = slice_infer, .cpu = slice_cpu, .vjp = slice_vjp, .example = slice_example,
    .memory = FG_PART, .span = slice_span
};
const fg_op_code fg_code_slice_grad = {
    .infer = slice_grad_infer, .cpu = slice_grad_cpu, .vjp = slice_grad_vjp,
    .example = slice_grad_example
};
const fg_op_code fg_code_concat = {
    .infer = concat_infer, .cpu = concat_cpu, .vjp = concat_vjp, .example = concat_example,
    .memory = FG_JOIN, .span = concat_span
};
