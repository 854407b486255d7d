/* shift_mix.c - data-dependent token shift: the key and value shift of FoX (Pro).
 *
 *     y_t = a_t x_(t-1) + (1 - a_t) x_t
 *
 * x, y: [B,T,H,D]   a: [B,T,H], in (0,1)   first: i32[B,T]   past: i32[1]   prev: [B,H,D], x before
 * row 0 Row t stands at position p = past + t.  x_(t-1) counts as 0 where p - 1 < first_t (0 if
 * absent), that is for a document's first token; padding rows (first_t > p) give 0.
 * Source: Lin et al. 2025, "Forgetting Transformer: Softmax Attention with a Forget Gate", arXiv
 * 2503.02130, the KV-shift of section 3; x is the projection before shifting, and that is what
 * decoding keeps. */
#include "vec.h"
#include "internal.h"

fg_tensor (fg_shift_mix)(fg_loc at, fg_tensor x, fg_tensor a)
{
    const fg_sequence s = fg_sequence_of(x.graph);
    const bool decoding = !fg_absent(s.past) && fg_ok(x);
    const fg_tensor prev = decoding ? fg__cache_row(at, x, "shift") : (fg_tensor){ 0 };
    const fg_tensor in[] = { x, a, s.first, s.past, prev };
    const fg_tensor y = FG_APPLY(shift_mix, at, in, 0);
    if (decoding) fg__cache_last(at, prev, x);
    return y;
}

fg_status fg__check_shift(fg_infer *c, int first)
{
    const fg_shape *x = &c->in[0];
    const int prev = first + 2;
    FG_REQUIRE(c, x->rank == 4, SHAPE, "x must be [B,T,H,D]");
    FG_REQUIRE(c, fg_shape_equal(c->in[1], FG_DIMS(x->dim[0], x->dim[1], x->dim[2])), SHAPE,
               "a must be [B,T,H] = [%lld,%lld,%lld], one gate per head and position",
               (long long)x->dim[0], (long long)x->dim[1], (long long)x->dim[2]);
    FG_REQUIRE(c, fg__is_real(c->in_type[0]) && fg__is_real(c->in_type[1]), DTYPE,
               "x and a must be f32 or bf16");
    if (fg__check_sequence(c, first, first + 1)) return FG_ERR_SHAPE;
    FG_REQUIRE(c, !c->given[prev] ||
               fg_shape_equal(c->in[prev], FG_DIMS(x->dim[0], x->dim[2], x->dim[3])),
               SHAPE, "prev must be [B,H,D] = [%lld,%lld,%lld]", (long long)x->dim[0],
               (long long)x->dim[2], (long long)x->dim[3]);
    return FG_OK;
}

static fg_status infer(fg_infer *c)
{
    c->out[0] = c->in[0];
    return fg__check_shift(c, 2);
}

/* What row (b,t) is: PAD gives 0, START has nothing before it. */
typedef enum { PAD, START, INSIDE } place;
static place place_of(const int32_t *first, int64_t past, int64_t row, int64_t t)
{
    const int64_t low = first && first[row] > 0 ? first[row] : 0, p = past + t;
    return low > p ? PAD : low == p ? START : INSIDE;
}

/* y = a p + (1 - a) x; p NULL: 0. */
static void mix(fg_real a, const fg_real *p, const fg_real *x, int64_t n, fg_real *y)
{
    const fg_vec av = fg_vset(a), rest = fg_vset(1 - a);
    int64_t i = 0;
    for (; i + FG_LANES <= n; i += FG_LANES) {
        const fg_vec keep = rest * fg_vload(x + i);
        fg_vstore(y + i, p ? fg_vfma(av, fg_vload(p + i), keep) : keep);
    }
    for (; i < n; i += FG_LANES) {
        const fg_vec keep = rest * fg_vload_n(x + i, n - i);
        fg_vstore_n(y + i, p ? fg_vfma(av, fg_vload_n(p + i, n - i), keep) : keep, n - i);
    }
}

static void cpu(const fg_exec *e)
{
    const fg_shape *s = &e->in_shape[0];
    const int64_t B = s->dim[0], T = s->dim[1], H = s->dim[2], D = s->dim[3];
    const fg_real *x = e->in[0], *a = e->in[1], *prev = e->in[4];
    const int64_t past = e->in[3] ? *(const int32_t *)e->in[3] : 0;
    fg_real *y = e->out[0];
    const int threads = fg__threads(e, B * T * H * D);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < B * T; row++) {
        const int64_t b = row / T, t = row % T;
        const place is = place_of(e->in[2], past, row, t);
        for (int64_t h = 0; h < H; h++) {
            const int64_t at = (row * H + h) * D;
            const fg_real *before = t ? x + at - H * D : prev ? prev + (b * H + h) * D : NULL;
            if (is == PAD) for (int64_t i = 0; i < D; i++) y[at + i] = 0;
            else mix(a[row * H + h], is == INSIDE ? before : NULL, x + at, D, y + at);
        }
    }
}

/* gx_t = (1 - a_t) gy_t + a_(t+1) gy_(t+1),  ga_t = sum over channels of gy_t (x_(t-1) - x_t). */
static void vjp(fg_vjp *v)
{
    if (fg__reads_caches(v, 3)) return;
    const fg_tensor in[] = { v->gout[0], v->in[0], v->in[1], v->in[2] };
    const fg_tensor g = FG_APPLY(shift_mix_grad, FG_HERE, in, 0);
    v->gin[0] = g;
    v->gin[1] = fg_result(g, 1);
}

/* x_(t-1) is x moved by one along T; positions and first, as numbers, say where it counts. */
static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const fg_tensor x = in[0];
    fg_graph *g = x.graph;
    const int64_t B = fg_dim(x, 0), T = fg_dim(x, 1), H = fg_dim(x, 2), D = fg_dim(x, 3);
    (void)attr;
    fg_tensor before = fg_fill(g, FG_DIMS(B, 1, H, D), 0);
    before = fg_cast(before, fg_dtype_of(x));
    if (!fg_absent(in[4])) before = fg_reshape(in[4], FG_DIMS(B, 1, H, D));
    if (T > 1) {
        const fg_tensor earlier = fg_slice(x, 1, 0, T - 1);
        before = fg_concat(before, earlier, 1);
    }
    fg_tensor a = fg_reshape(in[1], FG_DIMS(B, T, H, 1));
    fg_tensor p = fg_fill(g, FG_DIMS(1, T), 1);              /* position + 1 */
    p = fg_cumsum(p, 1, false);
    if (!fg_absent(in[3])) {
        fg_tensor past = fg_cast(in[3], FG_F32);
        past = fg_reshape(past, FG_DIMS(1, 1));
        p = fg_add(p, past);
    }
    p = fg_reshape(p, FG_DIMS(1, T, 1, 1));
    fg_tensor low = fg_fill(g, FG_DIMS(1, 1), 0);
    if (!fg_absent(in[2])) low = fg_cast(in[2], FG_F32);
    const int64_t rows = fg_dim(low, 0), columns = fg_dim(low, 1);
    low = fg_reshape(low, FG_DIMS(rows, columns, 1, 1));
    const fg_tensor inside = fg_scale(low, 1, 2), seen = fg_scale(low, 1, 1);
    before = fg__where_ge(FG_HERE, p, inside, before);
    const fg_tensor moved = fg_mul(a, before);
    a = fg_scale(a, -1, 1);
    const fg_tensor kept = fg_mul(a, x);
    fg_tensor y = fg_add(moved, kept);
    out[0] = fg__where_ge(FG_HERE, p, seen, y);
}

static fg_cost cost(const fg_infer *c)
{
    const double n = (double)fg_shape_count(c->in[0]), heads = (double)fg_shape_count(c->in[1]);
    return (fg_cost){ .flops = 3 * n, .bytes = (double)sizeof(float) * (2 * n + heads) };
}

static fg_tensor example(fg_graph *g, int i)
{
    static const int32_t first[10] = { 0, 0, 2, 3, 3, 2, 2, 2, 2, 2 };
    fg_tensor x, a;
    switch (i) {
    case 0: case 1: x = fg_random(g, 2, i ? 1 : 3, 2, 5); break;
    case 2: x = fg_random(g, 2, 5, 1, 3); break;
    default: return (fg_tensor){ 0 };
    }
    if (i == 2) {
        const fg_tensor f = fg_given_int(g, FG_DIMS(2, 5), first);
        fg_graph_sequence(g, (fg_sequence){ .first = f });
    }
    a = fg_random(g, fg_dim(x, 0), fg_dim(x, 1), fg_dim(x, 2));
    a = fg_sigmoid(a);
    return fg_shift_mix(x, a);
}

const fg_op_code fg_code_shift_mix = {
    .infer = infer, .cpu = cpu, .vjp = vjp, .decompose = decompose, .cost = cost,
    .example = example, .bf16 = { .like = { 1 } },
};

/* ---- shift_mix_grad ------------------------------------------------------------------------- */

static fg_status grad_infer(fg_infer *c)
{
    FG_REQUIRE(c, fg_shape_equal(c->in[0], c->in[1]), SHAPE, "gy must have x's shape");
    c->out[0] = c->in[1];
    c->out[1] = c->in[2];
    c->out_type[0] = c->in_type[1];
    c->out_type[1] = c->in_type[2];
    return FG_OK;
}

/* sum of gy (p - x); p NULL: 0. */
static fg_real gate_gradient(const fg_real *gy, const fg_real *p, const fg_real *x, int64_t n)
{
    fg_vec sum = { 0 };
    for (int64_t i = 0; i < n; i += FG_LANES) {
        const int64_t m = n - i < FG_LANES ? n - i : FG_LANES;
        const bool whole = m == FG_LANES;
        const fg_vec xv = whole ? fg_vload(x + i) : fg_vload_n(x + i, m);
        const fg_vec gv = whole ? fg_vload(gy + i) : fg_vload_n(gy + i, m);
        const fg_vec pv = !p ? fg_vset(0) : whole ? fg_vload(p + i) : fg_vload_n(p + i, m);
        sum = fg_vfma(gv, pv - xv, sum);
    }
    return fg_vsum(sum);
}

static void grad_cpu(const fg_exec *e)
{
    const fg_shape *s = &e->in_shape[1];
    const int64_t B = s->dim[0], T = s->dim[1], H = s->dim[2], D = s->dim[3];
    const fg_real *gy = e->in[0], *x = e->in[1], *a = e->in[2];
    fg_real *gx = e->out[0], *ga = e->out[1];
    const int threads = fg__threads(e, B * T * H * D);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < B * T; row++) {
        const int64_t t = row % T;
        const place is = place_of(e->in[3], 0, row, t);
        const bool next = t + 1 < T && place_of(e->in[3], 0, row + 1, t + 1) == INSIDE;
        for (int64_t h = 0; h < H; h++) {
            const int64_t at = (row * H + h) * D, gate = row * H + h, later = at + H * D;
            const fg_real keep = is == PAD ? 0 : 1 - a[gate], pass = next ? a[gate + H] : 0;
            for (int64_t i = 0; i < D; i++)
                gx[at + i] = keep * gy[at + i] + (next ? pass * gy[later + i] : 0);
            const fg_real *before = is == INSIDE ? x + at - H * D : NULL;
            ga[gate] = is == PAD ? 0 : gate_gradient(gy + at, before, x + at, D);
        }
    }
}

static fg_cost grad_cost(const fg_infer *c)
{
    const double n = (double)fg_shape_count(c->in[1]), heads = (double)fg_shape_count(c->in[2]);
    return (fg_cost){ .flops = 6 * n, .bytes = (double)sizeof(float) * (3 * n + 2 * heads) };
}

const fg_op_code fg_code_shift_mix_grad = {
    .infer = grad_infer, .cpu = grad_cpu, .cost = grad_cost,
    .bf16 = { .like = { 2, 3 } },
};
