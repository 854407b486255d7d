/* rope.c - rotary positions: pairs of channels turned by an angle that grows with the position.
 *
 *     y_i       = x_i cos a - x_(i+D/2) sin a
 *     y_(i+D/2) = x_i sin a + x_(i+D/2) cos a,   a = position * base^(-2i/D), i in [0, D/2)
 *
 * x, y: [B,T,H,D], D even   first: i32[B,T]   past: i32[1]   inverse: turns back by a
 * position = past + t - first_(b,t), or past + t in padding (first > past + t).
 * Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv
 * 2104.09864; channels paired by halves as in GPT-NeoX and in the official FoX code, which rounds
 * base^(-2i/D) and a to f32: far into a sequence our angles, taken in double, are the more exact
 * ones.
 *
 * cos and sin of p = 64 m + r come from those of 64 m and of r by the addition theorem, in double:
 * about 64 + T/64 calls of the C library a channel instead of T, and the same bits however a
 * sequence is cut. */
#include <math.h>
#include <omp.h>
#include "vec.h"
#include "internal.h"

#define RUN 64                           /* positions that share the angles of their first */
#define FEW 16                           /* rows for which the table over r pays */

fg_tensor (fg_rope)(fg_loc at, fg_tensor x, double base)
{
    const fg_sequence s = fg_sequence_of(x.graph);
    const fg_tensor in[] = { x, s.first, s.past };
    return FG_APPLY(rope, at, in, base, false);
}

static fg_status infer(fg_infer *c)
{
    const struct fg_attr_rope *a = c->attr;
    const fg_shape *x = &c->in[0];
    FG_REQUIRE(c, x->rank == 4 && x->dim[3] % 2 == 0, SHAPE, "x must be [B,T,H,D] with D even");
    FG_REQUIRE(c, fg__is_real(c->in_type[0]), DTYPE, "x must be f32 or bf16");
    FG_REQUIRE(c, a->base > 0, USAGE, "base is %g; it must be positive", a->base);
    if (fg__check_sequence(c, 1, 2)) return FG_ERR_SHAPE;
    c->out[0] = *x;
    return FG_OK;
}

/* cos and sin of p * base^(-2i/D), i < half, to c[0..half) and c[half..2 half). */
static void angles(int64_t p, double base, int64_t half, double *c)
{
    for (int64_t i = 0; i < half; i++) {
        const double a = (double)p * pow(base, -(double)i / (double)half);
        c[i] = cos(a), c[half + i] = sin(a);
    }
}

static void turn(const fg_real *x, const fg_real *c, int64_t half, fg_real *y)
{
    const fg_real *s = c + half;
    int64_t i = 0;
    for (; i + FG_LANES <= half; i += FG_LANES) {
        const fg_vec a = fg_vload(x + i), b = fg_vload(x + half + i), cv = fg_vload(c + i),
                     sv = fg_vload(s + i);
        fg_vstore(y + i, fg_vfma(a, cv, -(b * sv)));
        fg_vstore(y + half + i, fg_vfma(a, sv, b * cv));
    }
    const int64_t n = half - i;
    if (!n) return;
    const fg_vec a = fg_vload_n(x + i, n), b = fg_vload_n(x + half + i, n);
    const fg_vec cv = fg_vload_n(c + i, n), sv = fg_vload_n(s + i, n);
    fg_vstore_n(y + i, fg_vfma(a, cv, -(b * sv)), n);
    fg_vstore_n(y + half + i, fg_vfma(a, sv, b * cv), n);
}

static size_t table_size(int64_t D) { return (size_t)(RUN * D); }
static size_t own_size(int64_t D) { return (size_t)(3 * D); }

static void cpu(const fg_exec *e)
{
    const struct fg_attr_rope *a = e->attr;
    const fg_shape *s = &e->in_shape[0];
    const int64_t B = s->dim[0], T = s->dim[1], H = s->dim[2], D = s->dim[3], half = D / 2;
    const int64_t past = e->in[2] ? *(const int32_t *)e->in[2] : 0, runs = (T + RUN - 1) / RUN;
    const int32_t *first = e->in[1];
    const int threads = fg__threads(e, B * T * H * D);
    double *table = e->scratch;                          /* [RUN][D]: cos | sin of r */
    if (T >= FEW) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t r = 0; r < RUN; r++) angles(r, a->base, half, table + r * D);
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < B * runs; task++) {
        const int64_t b = task / runs, t0 = task % runs * RUN, t1 = t0 + RUN < T ? t0 + RUN : T;
        double *start = table + table_size(D) + own_size(D) * (size_t)omp_get_thread_num(),
               *own = start + D;
        fg_real *c = (fg_real *)(own + D);
        int64_t at = -1;
        for (int64_t t = t0; t < t1; t++) {
            const int64_t row = b * T + t, skip = first && first[row] <= past + t ? first[row] : 0;
            const int64_t p = past + t - skip, r = p % RUN;
            const double *rest = table + r * D;
            if (T < FEW) { angles(r, a->base, half, own); rest = own; }
            if (p / RUN != at) { at = p / RUN; angles(at * RUN, a->base, half, start); }
            for (int64_t i = 0; i < half; i++) {
                const double cm = start[i], sm = start[half + i], cr = rest[i], sr = rest[half + i];
                const double sine = sm * cr + cm * sr;
                c[i] = (fg_real)(cm * cr - sm * sr);
                c[half + i] = (fg_real)(a->inverse ? -sine : sine);
            }
            for (int64_t h = 0; h < H; h++) {
                const int64_t from = (row * H + h) * D;
                turn((const fg_real *)e->in[0] + from, c, half, (fg_real *)e->out[0] + from);
            }
        }
    }
}

static size_t scratch(const fg_infer *c, int threads)
{
    const int64_t D = c->in[0].dim[3];
    return sizeof(double) * (table_size(D) + own_size(D) * (size_t)threads);
}

/* A rotation's transpose is its inverse. */
static void vjp(fg_vjp *v)
{
    const struct fg_attr_rope *a = v->attr;
    const fg_tensor in[] = { v->gout[0], v->in[1], v->in[2] };
    v->gin[0] = FG_APPLY(rope, FG_HERE, in, a->base, !a->inverse);
}

static fg_cost cost(const fg_infer *c)
{
    const double n = (double)fg_shape_count(c->in[0]);
    return (fg_cost){ .flops = 3 * n, .bytes = 2 * (double)sizeof(float) * n };
}

static fg_tensor example(fg_graph *g, int i)
{
    static const int32_t first[6] = { 0, 0, 2, 3, 3, 1 };
    fg_tensor x, f;
    switch (i) {
    case 0: x = fg_random(g, 2, 3, 2, 6); return fg_rope(x, 10);
    case 1: x = fg_random(g, 1, 1, 1, 2); return fg_rope(x, 500000);
    case 2:
        f = fg_given_int(g, FG_DIMS(2, 3), first);
        fg_graph_sequence(g, (fg_sequence){ .first = f });
        x = fg_random(g, 2, 3, 1, 4);
        return fg_rope(x, 3);
    default: return (fg_tensor){ 0 };
    }
}

const fg_op_code fg_code_rope = {
    .infer = infer, .cpu = cpu, .vjp = vjp, .cost = cost, .example = example, .scratch = scratch,
    .bf16 = { .like = { 1 } },
};
