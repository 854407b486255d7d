/* ssd_tile.h - what ssd_scan.c and ssd_scan_grad.c share: chunks, pieces, decays, scores.
 *
 * A sequence falls in chunks of FG_CHUNK tokens, and a chunk in pieces: runs of tokens of one
 * document.  So the state that enters a piece is that of the chunk before for a chunk's first
 * piece, and 0 for the others.  Tiles of pairs are stored as w[j][i], source j before target i.
 *
 * A decay over several tokens is e to a sum of dt_t a, in double, so neither a short memory beside
 * a long one nor a million tokens cost accuracy.  Between pairs it is made so for every
 * FG_ANCHOR-th source, and by single factors e^(dt_t a) for those between.  Decays below FG_GONE
 * count as 0: products of subnormal numbers are slow, and a float holds nothing of them beside
 * others. */
#ifndef FG_SSD_TILE_H
#define FG_SSD_TILE_H
#include "internal.h"
#include "product.h"

enum { FG_CHUNK = 64, FG_CHUNK_ROW = FG_CHUNK + FG_VEC_BYTES / sizeof(fg_real) };
enum { FG_ANCHOR = 16 };
#define FG_LOG_GONE (-1e4)               /* of one token: e to that is 0, and sums stay finite */
#ifdef FG_DOUBLE
#define FG_GONE 1e-300
#else
#define FG_GONE 1e-30f
#endif

typedef struct {
    int64_t B, T, H, P, G, N;
    int64_t Pp, Np;                      /* rounded up to whole vectors */
    int64_t chunks;                      /* of a sequence */
    int64_t past;
    bool resets;                         /* first or past is given */
    const fg_real *x, *dt, *a, *b, *c, *d;
    const int32_t *first;
} fg__ssd;

static inline fg__ssd fg__ssd_of(const fg_shape *x, const fg_shape *b)
{
    fg__ssd z = { .B = x->dim[0], .T = x->dim[1], .H = x->dim[2], .P = x->dim[3], .G = b->dim[2],
                  .N = b->dim[3] };
    z.Pp = fg__round_up(z.P, FG_LANES);
    z.Np = fg__round_up(z.N, FG_LANES);
    z.chunks = (z.T + FG_CHUNK - 1) / FG_CHUNK;
    return z;
}

/* The first position that row (b,t) sees, or -1 where everything before it counts. */
static inline int64_t fg__ssd_low(const fg__ssd *z, int64_t b, int64_t t)
{
    if (z->first) return z->first[b * z->T + t];
    return z->resets ? 0 : -1;
}

typedef struct { int64_t t0, t1; bool fresh, pad; } fg__piece;    /* fresh: begins with state 0 */

/* The piece that begins at t; t is a chunk's start or the end of the piece before. */
static inline fg__piece fg__piece_at(const fg__ssd *z, int64_t b, int64_t t)
{
    const int64_t end = fg__least((t / FG_CHUNK + 1) * FG_CHUNK, z->T);
    const int64_t low = fg__ssd_low(z, b, t), p = z->past + t;
    fg__piece k = { t, t + 1, low >= p, low > p };
    while (k.t1 < end) {
        const int64_t next = fg__ssd_low(z, b, k.t1), at = z->past + k.t1;
        if (k.pad ? next <= at : next >= at) break;
        k.t1++;
    }
    return k;
}

/* Rows [t0,t1) of one head of x [B,T,heads,n], filled up with 0 to width np. */
static inline void fg__ssd_rows(const fg_real *x, int64_t heads, int64_t h, int64_t n, int64_t np,
                                int64_t row0, int64_t rows, fg_real *to)
{
    for (int64_t r = 0; r < rows; r++, to += np) {
        const fg_real *from = x + ((row0 + r) * heads + h) * n;
        int64_t i = 0;
        for (; i + FG_LANES <= n; i += FG_LANES) fg_vstore(to + i, fg_vload(from + i));
        if (i < n) fg_vstore(to + i, fg_vload_n(from + i, n - i));
    }
}

/* to[j][i] = from[i][j], i < rows, j < columns; lanes of `to` from rows on become 0 up to pad. */
static inline void fg__ssd_turn(const fg_real *from, int64_t from_row, int64_t rows,
                                int64_t columns, int64_t pad, fg_real *to, int64_t to_row)
{
    enum { SIDE = 16 };
    for (int64_t i0 = 0; i0 < rows; i0 += SIDE)
        for (int64_t j0 = 0; j0 < columns; j0 += SIDE) {
            const int64_t i1 = fg__least(i0 + SIDE, rows), j1 = fg__least(j0 + SIDE, columns);
            for (int64_t j = j0; j < j1; j++)
                for (int64_t i = i0; i < i1; i++) to[j * to_row + i] = from[i * from_row + j];
        }
    for (int64_t j = 0; j < columns; j++)
        for (int64_t i = rows; i < pad; i++) to[j * to_row + i] = 0;
}

/* s[n][p] = state[p][n], or back; s has rows of Pp, filled up with 0. */
static inline void fg__ssd_enter(const fg__ssd *z, const fg_real *state, fg_real *s)
{
    if (state) fg__ssd_turn(state, z->N, z->P, z->N, z->Pp, s, z->Pp);
    else memset(s, 0, (size_t)(z->N * z->Pp) * sizeof *s);
}
static inline void fg__ssd_leave(const fg__ssd *z, const fg_real *s, fg_real *state)
{
    fg__ssd_turn(s, z->Pp, z->N, z->P, z->N, state, z->N);
}

/* Scores b_j . c_i of all pairs j <= i of a chunk, for every group: [B,chunks,G][j][i], rows of
 * FG_CHUNK_ROW.  turned: scratch of N rows. */
static inline void fg__ssd_scores(const fg__ssd *z, int64_t task, fg_real *scores, fg_real *turned)
{
    const int64_t g = task % z->G, chunk = task / z->G % z->chunks, b = task / z->G / z->chunks;
    const int64_t t0 = chunk * FG_CHUNK, n = fg__least(FG_CHUNK, z->T - t0);
    const int64_t row = z->G * z->N, at = ((b * z->T + t0) * z->G + g) * z->N;
    fg__ssd_turn(z->c + at, row, n, z->N, FG_CHUNK_ROW, turned, FG_CHUNK_ROW);
    const fg__product p = { .r1 = n, .n1 = fg__round_up(n, FG_LANES), .k1 = z->N,
        .part = FG_R_UP_TO_N, .a = z->b + at, .a_row = row, .a_col = 1, .b = turned,
        .b_row = FG_CHUNK_ROW, .c = scores + task * FG_CHUNK * FG_CHUNK_ROW,
        .c_row = FG_CHUNK_ROW };
    fg__multiply(&p);
}

/* ---- one piece of one head ------------------------------------------------------------------ */

/* keep: from the piece's start through i; left: from after j to the end; whole: all of it. */
typedef struct {
    int64_t n;
    double  sum[FG_CHUNK];               /* of dt a through i */
    fg_real dt[FG_CHUNK], a[FG_CHUNK], keep[FG_CHUNK], left[FG_CHUNK], whole;
} fg__decay;

/* e^x, 0 below FG_GONE */
static inline void fg__decay_exp(fg_real *x, int64_t n)
{
    for (int64_t i = 0; i < n; i += FG_LANES) {
        const fg_vec v = fg_vexp(fg_vload(x + i));
        fg_vstore(x + i, fg_vselect((fg_vint)(v < fg_vset(FG_GONE)), fg_vset(0), v));
    }
}

static inline void fg__decay_fill(const fg__ssd *z, int64_t b, int64_t h, const fg__piece *k,
                                  fg__decay *w)
{
    const fg_real *dt = z->dt + (b * z->T + k->t0) * z->H + h;
    double sum = 0;
    w->n = k->t1 - k->t0;
    for (int64_t i = 0; i < FG_CHUNK; i++) {
        const double l = i < w->n ? (double)dt[i * z->H] * (double)z->a[h] : 0;
        const double kept = l < FG_LOG_GONE ? FG_LOG_GONE : l;
        w->dt[i] = i < w->n ? dt[i * z->H] : 0;
        w->sum[i] = sum += kept;
        w->a[i] = (fg_real)kept;
        w->keep[i] = (fg_real)sum;
    }
    for (int64_t j = 0; j < FG_CHUNK; j++) w->left[j] = (fg_real)(sum - w->sum[j]);
    fg__decay_exp(w->a, w->n);
    fg__decay_exp(w->keep, w->n);
    fg__decay_exp(w->left, w->n);
    w->whole = w->keep[w->n - 1];
}

/* Row j of decays from the row of j + 1: d[i] = e^(sum of dt a over (j,i]) for i >= j, else 0. */
static inline void fg__decay_row(const fg__decay *w, int64_t j, fg_real *d)
{
    const int64_t from = j / FG_LANES * FG_LANES;
    if (j % FG_ANCHOR == FG_ANCHOR - 1) {
        const int64_t end = fg__round_up(w->n, FG_LANES);
        for (int64_t i = from; i < end; i++) d[i] = (fg_real)(w->sum[i] - w->sum[j]);
        fg__decay_exp(d + from, end - from);
        for (int64_t i = from; i < j; i++) d[i] = 0;
        for (int64_t i = w->n; i < end; i++) d[i] = 0;
    } else {
        const fg_vec a = fg_vset(j + 1 < w->n ? w->a[j + 1] : 0), gone = fg_vset(FG_GONE);
        for (int64_t i = from; i < w->n; i += FG_LANES) {
            const fg_vec old = fg_vload(d + i), v = old * a;
            const fg_vint none = (fg_vint)(fg_vabs(v) < gone) | (fg_vint)(old == fg_vset(0));
            fg_vstore(d + i, fg_vselect(none, fg_vset(0), v));   /* 0, though a be NaN */
        }
    }
    d[j] = 1;
}

/* s[n][p] = whole s[n][p] + sum_j b_jn scaled_jp, scaled_j = left_j dt_j x_j.  The sum is made
 * first, in `update`: small terms are not lost one by one beside a large state. */
static inline void fg__ssd_advance(const fg__ssd *z, const fg__decay *w, const fg_real *b,
                                   const fg_real *x, fg_real *scaled, fg_real *update, fg_real *s)
{
    for (int64_t j = 0; j < w->n; j++)
        for (int64_t p = 0; p < z->Pp; p += FG_LANES)
            fg_vstore(scaled + j * z->Pp + p,
                      fg_vload(x + j * z->Pp + p) * fg_vset(w->left[j] * w->dt[j]));
    const fg__product p = { .r1 = z->N, .n1 = z->Pp, .k1 = w->n, .a = b, .a_row = 1,
        .a_col = z->G * z->N, .b = scaled, .b_row = z->Pp, .c = update, .c_row = z->Pp };
    fg__multiply(&p);
    for (int64_t i = 0; i < z->N * z->Pp; i += FG_LANES)
        fg_vstore(s + i, fg_vfma(fg_vload(s + i), fg_vset(w->whole), fg_vload(update + i)));
}

/* ---- the ops: ssd_scan and mamba2_scan, x dt a b c d? state? first? past?, and their gradients,
 * gy? gend? x dt a b c d? state? first? -> gx gdt ga gb gc gd gstate --------------------------- */

enum { FG_SSD_X, FG_SSD_DT, FG_SSD_A, FG_SSD_B, FG_SSD_C, FG_SSD_D, FG_SSD_STATE, FG_SSD_FIRST,
       FG_SSD_PAST };
#define FG_SSD_BACK 2                    /* where they begin among the gradient's inputs */

/* in: the op's inputs, whose first and past are put here; while decoding, the caches hold the
 * state. */
static inline fg_tensor fg__ssd_build(fg_loc at, const fg_op *op, int n, fg_tensor *in)
{
    const fg_tensor x = in[FG_SSD_X], b = in[FG_SSD_B];
    const fg_sequence s = fg_sequence_of(x.graph);
    const bool decoding = !fg_absent(s.past) && fg_ok(x) && fg_ok(b);
    if (decoding && !fg_absent(in[FG_SSD_STATE]))
        return (fg_fail)(at, x, FG_ERR_USAGE, "a state is given, but past too: caches hold it");
    const fg_shape whole = FG_DIMS(fg_dim(x, 0), fg_dim(x, 2), fg_dim(x, 3), fg_dim(b, 3));
    if (decoding) in[FG_SSD_STATE] = fg__cache_state(at, x.graph, "ssd", FG_F32, whole);
    in[FG_SSD_FIRST] = s.first, in[FG_SSD_PAST] = s.past;
    const fg_tensor y = fg__apply(op, at, NULL, n, in, &(struct fg_attr_ssd_scan){ 0 });
    if (!decoding) return y;
    const fg_tensor end = fg_result(y, 1);
    const fg_tensor row =
        (fg_reshape)(at, end, FG_DIMS(whole.dim[0], 1, whole.dim[1], whole.dim[2], whole.dim[3]));
    fg__cache_last(at, in[FG_SSD_STATE], row);
    return y;
}

static inline fg_status fg__ssd_infer(fg_infer *c)
{
    const fg_shape *x = &c->in[FG_SSD_X], *b = &c->in[FG_SSD_B];
    FG_REQUIRE(c, x->rank == 4, SHAPE, "x must be [B,T,H,P]");
    const int64_t B = x->dim[0], T = x->dim[1], H = x->dim[2], P = x->dim[3];
    FG_REQUIRE(c, fg_shape_equal(c->in[FG_SSD_DT], FG_DIMS(B, T, H)), SHAPE,
               "dt must be [B,T,H] = [%lld,%lld,%lld]", (long long)B, (long long)T, (long long)H);
    FG_REQUIRE(c, fg_shape_equal(c->in[FG_SSD_A], FG_DIMS(H)), SHAPE,
               "a must be [H] = [%lld], one rate per head", (long long)H);
    FG_REQUIRE(c, b->rank == 4 && b->dim[0] == B && b->dim[1] == T && b->dim[2] > 0
               && H % b->dim[2] == 0 && fg_shape_equal(*b, c->in[FG_SSD_C]), SHAPE,
               "b and c must be [B,T,G,N] with B = %lld, T = %lld, and G dividing %lld heads",
               (long long)B, (long long)T, (long long)H);
    const fg_shape state = FG_DIMS(B, H, P, b->dim[3]);
    FG_REQUIRE(c, !c->given[FG_SSD_D] || fg_shape_equal(c->in[FG_SSD_D], FG_DIMS(H)), SHAPE,
               "d must be [H] = [%lld]", (long long)H);
    FG_REQUIRE(c, !c->given[FG_SSD_STATE] || fg_shape_equal(c->in[FG_SSD_STATE], state), SHAPE,
               "state must be [B,H,P,N] = [%lld,%lld,%lld,%lld]", (long long)B, (long long)H,
               (long long)P, (long long)b->dim[3]);
    for (int k = 0; k < FG_SSD_STATE; k++)
        FG_REQUIRE(c, !c->given[k] || fg__is_real(c->in_type[k]), DTYPE,
                   "x, dt, a, b, c and d must be f32 or bf16");
    FG_REQUIRE(c, !c->given[FG_SSD_STATE] || c->in_type[FG_SSD_STATE] == FG_F32, DTYPE,
               "state must be f32");
    if (fg__check_sequence(c, FG_SSD_FIRST, FG_SSD_PAST)) return FG_ERR_SHAPE;
    c->out[0] = *x;
    c->out[1] = state;
    c->out_type[1] = FG_F32;
    return FG_OK;
}

/* The examples' documents, in two sequences of 20: of 1 to 7 tokens, the second behind padding. */
static inline void fg__ssd_documents(fg_graph *g)
{
    static const int32_t first[40] = { 0, 0, 2, 2, 2, 5, 6, 6, 6, 6, 6, 11, 11, 11, 11, 11, 11, 11,
        18, 19, 4, 4, 4, 4, 4, 4, 4, 7, 7, 7, 10, 10, 10, 10, 10, 10, 10, 17, 17, 17 };
    const fg_tensor f = fg_given_int(g, FG_DIMS(2, 20), first);
    fg_graph_sequence(g, (fg_sequence){ .first = f });
}

/* Applies the op `grad` with n inputs, the last two more and kept. */
static inline void fg__ssd_vjp(fg_vjp *v, const fg_op *grad, int n, fg_tensor more, fg_tensor kept)
{
    if (fg__reads_caches(v, FG_SSD_PAST)) return;
    const fg_tensor in[] = { v->gout[0], v->gout[1], v->in[0], v->in[1], v->in[2], v->in[3],
                             v->in[4], v->in[5], v->in[6], v->in[7], more, kept };
    const fg_tensor g = fg__apply(grad, FG_HERE, NULL, n, in, v->attr);
    for (int i = 0; i < 7; i++) if (!fg_absent(v->in[i])) v->gin[i] = fg_result(g, i);
    if (!fg_absent(more)) v->gin[FG_SSD_PAST + 1] = fg_result(g, 7);
}

static inline fg_status fg__ssd_grad_infer(fg_infer *c)
{
    const fg_shape *x = &c->in[FG_SSD_BACK + FG_SSD_X];
    FG_REQUIRE(c, !c->given[0] || fg_shape_equal(c->in[0], *x), SHAPE, "gy must have x's shape");
    for (int i = 0; i < 5; i++) {
        c->out[i] = c->in[FG_SSD_BACK + i];
        c->out_type[i] = c->in_type[FG_SSD_BACK + i];
    }
    c->out[5] = c->in[FG_SSD_BACK + FG_SSD_A];
    c->out_type[5] =
        c->given[FG_SSD_BACK + FG_SSD_D] ? c->in_type[FG_SSD_BACK + FG_SSD_D] : FG_F32;
    c->out[6] =
        FG_DIMS(x->dim[0], x->dim[2], x->dim[3], c->in[FG_SSD_BACK + FG_SSD_B].dim[3]);
    c->out_type[6] = FG_F32;
    return FG_OK;
}

/* Products inside chunks, with the state, and scores. */
static inline fg_cost fg__ssd_cost(const fg_infer *c)
{
    const fg__ssd z = fg__ssd_of(&c->in[FG_SSD_X], &c->in[FG_SSD_B]);
    const double P = (double)z.P, N = (double)z.N, R = FG_CHUNK, rows = (double)(z.B * z.T);
    const double x = rows * (double)z.H * P, bc = rows * (double)z.G * N;
    const double size = c->in_type[FG_SSD_X] == FG_BF16 ? 2 : 4;
    return (fg_cost){ .flops = x * (R + 4 * N) + bc * R, .bytes = size * (2 * x + 2 * bc) };
}

/* The forward pass's states once more, then two products for each of its own. */
static inline fg_cost fg__ssd_grad_cost(const fg_infer *c)
{
    const fg__ssd z =
        fg__ssd_of(&c->in[FG_SSD_BACK + FG_SSD_X], &c->in[FG_SSD_BACK + FG_SSD_B]);
    const double P = (double)z.P, N = (double)z.N, R = FG_CHUNK, rows = (double)(z.B * z.T);
    const double x = rows * (double)z.H * P, bc = rows * (double)z.G * N;
    const double size = c->in_type[FG_SSD_BACK + FG_SSD_X] == FG_BF16 ? 2 : 4;
    return (fg_cost){ .flops = x * (2 * R + 10 * N) + rows * (double)z.H * N * 2 * R + bc * R,
                      .bytes = size * (3 * x + 4 * bc) };
}
#endif
