/* linear_attention.h - what gated_linear_attention.c and delta_rule.c share: sizes, the runs of
 * rows that one state passes through, chunks of a run, and their panels.
 *
 * A sequence falls in runs: padding, or rows of one document.  The state before a run is 0, except
 * before the run at row 0 that goes on from what the given state has seen.  A run is worked through
 * in chunks of FG_CHUNK rows, counted from its own start, so that a document gives the same bits
 * wherever it stands.  Short chunks suit a CPU: the work on the state is the same for any length,
 * that inside a chunk grows with it. */
#ifndef FG_LINEAR_ATTENTION_H
#define FG_LINEAR_ATTENTION_H
#include <omp.h>
#include "internal.h"
#include "product.h"

#define FG_CHUNK 16                      /* a multiple of FG_LANES on every machine */
#define FG_BLOCK 64                      /* chunks whose states the gradient keeps at a time */

typedef struct {
    int64_t B, T, H, K, V;               /* q, k: [B,T,H,K]   v: [B,T,H,V]   state: [B,H,K,V] */
    int64_t Kp, Vp;                      /* rounded up to whole vectors */
    int64_t past, known;                 /* position of row 0; the state has seen those below */
    const int32_t *first;
    double scale;
} fg__scan;

/* first, past, state: inputs of a kernel, or NULL. */
static inline fg__scan fg__scan_of(const fg_shape *k, const fg_shape *v, double scale,
                                   const int32_t *first, const int32_t *past, const void *state)
{
    fg__scan z = { k->dim[0], k->dim[1], k->dim[2], k->dim[3], v->dim[3], 0, 0, 0, 0, first,
                   scale };
    z.Kp = fg__round_up(z.K, FG_LANES);
    z.Vp = fg__round_up(z.V, FG_LANES);
    if (past) z.past = z.known = *past;
    else z.known = state != NULL;        /* without caches: all that comes before position 0 */
    if (!state) z.known = 0;
    return z;
}

/* Rules of q k v in inputs 0, 1, 2 and of the sequence and the state in i, i + 1, i + 2. */
static inline fg_status fg__scan_check(fg_infer *c, int i)
{
    const fg_shape *q = &c->in[0], *k = &c->in[1], *v = &c->in[2];
    FG_REQUIRE(c, k->rank == 4 && fg_shape_equal(*q, *k), SHAPE, "q and k must both be [B,T,H,K]");
    FG_REQUIRE(c, v->rank == 4 && v->dim[0] == k->dim[0] && v->dim[1] == k->dim[1]
               && v->dim[2] == k->dim[2], SHAPE, "v must be [B,T,H,V] with k's B, T and H");
    for (int n = 0; n < 3; n++)
        FG_REQUIRE(c, fg__is_real(c->in_type[n]), DTYPE, "q, k and v must be f32 or bf16");
    if (fg__check_sequence(c, i, i + 1)) return FG_ERR_SHAPE;
    const fg_shape s = FG_DIMS(k->dim[0], k->dim[2], k->dim[3], v->dim[3]);
    FG_REQUIRE(c, !c->given[i + 2]
               || (c->in_type[i + 2] == FG_F32 && fg_shape_equal(c->in[i + 2], s)), SHAPE,
               "state must be f32[B,H,K,V] = f32[%lld,%lld,%lld,%lld]", (long long)s.dim[0],
               (long long)s.dim[1], (long long)s.dim[2], (long long)s.dim[3]);
    c->out[0] = *v;
    c->out[1] = s;
    c->out_type[0] = c->in_type[2];
    c->out_type[1] = FG_F32;
    return FG_OK;
}

static inline const fg_real *fg__in(const fg_exec *e, int i, int64_t at)
{
    return (const fg_real *)e->in[i] + at;
}
static inline fg_real *fg__out(const fg_exec *e, int i, int64_t at)
{
    return (fg_real *)e->out[i] + at;
}

/* ---- builders and gradients ------------------------------------------------------------------ */

/* A scan op, whose inputs are q k v gate first past state: while decoding, the caches hold the
 * state. */
static inline fg_tensor fg__scan_build(fg_loc at, const fg_op *op, const void *attr, fg_tensor q,
                                       fg_tensor k, fg_tensor v, fg_tensor gate, fg_tensor state)
{
    const fg_sequence s = fg_sequence_of(q.graph);
    const bool decoding = !fg_absent(s.past) && fg_ok(k) && fg_ok(v) && fg_shape_of(k).rank == 4;
    if (decoding && !fg_absent(state))
        return (fg_fail)(at, v, FG_ERR_USAGE, "a state is given, but the caches hold it already");
    if (decoding) {
        const fg_shape kept = FG_DIMS(fg_dim(k, 0), fg_dim(k, 2), fg_dim(k, 3), fg_dim(v, -1));
        state = fg__cache_state(at, q.graph, "state", FG_F32, kept);
    }
    const fg_tensor in[] = { q, k, v, gate, s.first, s.past, state };
    const fg_tensor o = fg__apply(op, at, NULL, 7, in, attr);
    if (decoding && fg_ok(o)) fg__cache_put(at, state, fg_result(o, 1));
    return o;
}

/* Its gradient is the op `grad`, go gstate q k v gate first state -> gq gk gv ggate gstate, with
 * the attributes of the scan itself; a third output of the scan is its ninth input. */
static inline void fg__scan_vjp(fg_vjp *v, const fg_op *grad)
{
    if (fg__reads_caches(v, 5)) return;
    const fg_tensor go = fg__gout_or_zero(v);
    const fg_tensor none = { 0 }, kept = v->n_out > 2 ? v->out[2] : none;
    const fg_tensor in[] = { go, v->gout[1], v->in[0], v->in[1], v->in[2], v->in[3], v->in[4],
                             v->in[6], kept };
    const fg_tensor g = fg__apply(grad, FG_HERE, NULL, v->n_out > 2 ? 9 : 8, in, v->attr);
    for (int i = 0; i < 4; i++) if (!fg_absent(v->in[i])) v->gin[i] = fg_result(g, i);
    if (!fg_absent(v->in[6])) v->gin[6] = fg_result(g, 4);
}

/* Shapes and dtypes of such a gradient whose gate has one of its own */
static inline fg_status fg__scan_grad_infer(fg_infer *c)
{
    FG_REQUIRE(c, fg_shape_equal(c->in[0], c->in[4]), SHAPE, "go must have v's shape");
    for (int i = 0; i < 4; i++) {
        c->out[i] = c->in[2 + i];
        c->out_type[i] = c->in_type[2 + i];
    }
    const fg_shape *k = &c->in[3];
    c->out[4] = FG_DIMS(k->dim[0], k->dim[2], k->dim[3], c->in[4].dim[3]);
    c->out_type[4] = FG_F32;
    return FG_OK;
}

/* Rules of q k v beta first past state */
static inline fg_status fg__delta_check(fg_infer *c)
{
    if (fg__scan_check(c, 4)) return FG_ERR_SHAPE;
    const fg_shape *k = &c->in[1];
    FG_REQUIRE(c, fg_shape_equal(c->in[3], FG_DIMS(k->dim[0], k->dim[1], k->dim[2])), SHAPE,
               "beta must be [B,T,H] = [%lld,%lld,%lld], one number per head and position",
               (long long)k->dim[0], (long long)k->dim[1], (long long)k->dim[2]);
    FG_REQUIRE(c, fg__is_real(c->in_type[3]), DTYPE, "beta must be f32 or bf16");
    return FG_OK;
}

/* What the kernels of a device keep of a scan for its gradient is output 2, elements of bf16 in an
 * order of their own.  Where there are no such kernels it is a single 0, which nothing reads. */
enum {                                           /* elements of 64 rows of a head */
    FG_HGRN2_KEPT = 64 * 324,                    /* decayed q and k, weights, decays */
    FG_UNIT_DELTA_KEPT = 64 * 650                /* q, k, W, U, weights, inverse, beta, scales */
};
static inline void fg__scan_keeps(fg_infer *c, int64_t elements)
{
    c->out[2] = FG_DIMS(elements > 1 ? elements : 1);
    c->out_type[2] = FG_BF16;
}
/* Chunks of 64 rows of all heads, where heads are such that kernels work in chunks: 128 wide. */
static inline int64_t fg__scan_tiles(const fg_shape *k, const fg_shape *v)
{
    const bool fits = k->dim[3] == 128 && v->dim[3] == 128 && k->dim[1] >= 64;
    return fits ? k->dim[0] * k->dim[2] * ((k->dim[1] + 63) / 64) : 0;
}

/* ---- runs ----------------------------------------------------------------------------------- */

typedef struct { int64_t t0, t1; bool padding, carried; } fg__run;    /* rows [t0,t1) */

/* The first position that row t of sequence b sees, less its own: above 0 for padding, 0 at the
 * start of a document. */
static inline int64_t fg__ahead(const fg__scan *z, int64_t b, int64_t t)
{
    return (z->first ? fg__most(0, z->first[b * z->T + t]) : 0) - (z->past + t);
}

static inline bool fg__carried(const fg__scan *z, int64_t b)
{
    return fg__ahead(z, b, 0) + z->past < z->known;
}

static inline fg__run fg__run_from(const fg__scan *z, int64_t b, int64_t t)
{
    fg__run r = { t, t + 1, fg__ahead(z, b, t) > 0, t == 0 && fg__carried(z, b) };
    for (; r.t1 < z->T; r.t1++) {
        const int64_t ahead = fg__ahead(z, b, r.t1);
        if (r.padding ? ahead <= 0 : ahead >= 0) break;
    }
    return r;
}

static inline fg__run fg__run_before(const fg__scan *z, int64_t b, int64_t t1)
{
    fg__run r = { t1 - 1, t1, fg__ahead(z, b, t1 - 1) > 0, false };
    while (r.t0 > 0) {
        const bool before = fg__ahead(z, b, r.t0 - 1) > 0;
        if (before != r.padding || (!r.padding && fg__ahead(z, b, r.t0) == 0)) break;
        r.t0--;
    }
    r.carried = r.t0 == 0 && fg__carried(z, b);
    return r;
}

/* ---- panels --------------------------------------------------------------------------------- */

/* to[t][0..Dp) = x_t, n rows `row` elements apart, filled up with 0 */
static inline void fg__load_rows(const fg_real *x, int64_t row, int64_t n, int64_t D, int64_t Dp,
                                 fg_real *to)
{
    for (int64_t t = 0; t < n; t++) {
        int64_t d = 0;
        for (; d + FG_LANES <= D; d += FG_LANES)
            fg_vstore(to + t * Dp + d, fg_vload(x + t * row + d));
        if (d < D) fg_vstore(to + t * Dp + d, fg_vload_n(x + t * row + d, D - d));
    }
}

static inline void fg__store_rows(const fg_real *from, int64_t Dp, int64_t n, int64_t D,
                                  fg_real *x, int64_t row)
{
    for (int64_t t = 0; t < n; t++) {
        int64_t d = 0;
        for (; d + FG_LANES <= D; d += FG_LANES)
            fg_vstore(x + t * row + d, fg_vload(from + t * Dp + d));
        if (d < D) fg_vstore_n(x + t * row + d, fg_vload(from + t * Dp + d), D - d);
    }
}

static inline void fg__clear_rows(fg_real *x, int64_t row, int64_t n, int64_t D)
{
    for (int64_t t = 0; t < n; t++) memset(x + t * row, 0, (size_t)D * sizeof *x);
}

/* to[d][t] = x[t][d] for t < n, 0 for the other lanes; rows of `to` are `wide` elements apart */
static inline void fg__turn(const fg_real *x, int64_t row, int64_t n, int64_t D, fg_real *to,
                            int64_t wide)
{
    for (int64_t d = 0; d < D; d++) {
        for (int64_t t = 0; t < n; t++) to[d * wide + t] = x[t * row + d];
        for (int64_t t = n; t < FG_CHUNK; t++) to[d * wide + t] = 0;
    }
}

/* to[t][d] = x[d][t] for t < n */
static inline void fg__turn_back(const fg_real *x, int64_t wide, int64_t n, int64_t D, fg_real *to,
                                 int64_t Dp)
{
    for (int64_t t = 0; t < n; t++)
        for (int64_t d = 0; d < D; d++) to[t * Dp + d] = x[d * wide + t];
}

/* [K,V] to rows of Vp and back; from NULL: zeros */
static inline void fg__load_state(const fg__scan *z, const fg_real *from, fg_real *S)
{
    if (from) fg__load_rows(from, z->V, z->K, z->V, z->Vp, S);
    else memset(S, 0, (size_t)(z->K * z->Vp) * sizeof *S);
}

/* ---- the gradient's way back ----------------------------------------------------------------- */

/* Of one sequence and head.  Chunks are rows [t,t+n); the state S before a chunk is computed again
 * from the start of its run, FG_BLOCK chunks at a time, and R, the gradient of the state, goes from
 * behind the chunk to before it. */
typedef struct {
    const fg__scan *z;
    int64_t b, h;
    fg_real *S, *R;                      /* [K,Vp] */
    fg_real *kept, *blocks;              /* S before the chunks of a block, before the blocks */
    void *self;
    void (*pass)(void *self, int64_t t, int64_t n, fg_real *S);          /* S to behind the chunk */
    void (*back)(void *self, int64_t t, int64_t n, const fg_real *S);    /* writes n rows, R */
    void (*clear)(void *self, int64_t t, int64_t n);                     /* rows of padding */
} fg__way_back;

static inline void fg__way_back_cut(fg__way_back *w, char *base, size_t *used, const fg__scan *z)
{
    const int64_t size = z->K * z->Vp, chunks = (z->T + FG_CHUNK - 1) / FG_CHUNK;
    w->z = z;
    w->S = fg__cut(base, used, size, sizeof *w->S);
    w->R = fg__cut(base, used, size, sizeof *w->R);
    w->kept = fg__cut(base, used, fg__least(FG_BLOCK, chunks) * size, sizeof *w->kept);
    w->blocks = fg__cut(base, used, (chunks - 1) / FG_BLOCK * size, sizeof *w->blocks);
}

/* S from row t0 to row t1; with kept, S before every chunk goes there. */
static inline void fg__keep_states(const fg__way_back *w, int64_t t0, int64_t t1, fg_real *kept)
{
    const size_t size = (size_t)(w->z->K * w->z->Vp) * sizeof *w->S;
    for (int64_t t = t0; t < t1; t += FG_CHUNK) {
        if (kept) memcpy((char *)kept + (size_t)((t - t0) / FG_CHUNK) * size, w->S, size);
        if (kept && t + FG_CHUNK >= t1) break;           /* behind the last one nobody asks */
        w->pass(w->self, t, fg__least(FG_CHUNK, t1 - t), w->S);
    }
}

static inline void fg__run_back(const fg__way_back *w, const fg__run *r, const fg_real *state)
{
    const int64_t size = w->z->K * w->z->Vp, rows = FG_BLOCK * FG_CHUNK;
    const int64_t blocks = (r->t1 - r->t0 + rows - 1) / rows;
    fg__load_state(w->z, state, w->S);
    for (int64_t i = 0; i + 1 < blocks; i++) {
        memcpy(w->blocks + i * size, w->S, (size_t)size * sizeof *w->S);
        fg__keep_states(w, r->t0 + i * rows, r->t0 + (i + 1) * rows, NULL);
    }
    for (int64_t i = blocks - 1; i >= 0; i--) {
        const int64_t t0 = r->t0 + i * rows, t1 = fg__least(t0 + rows, r->t1);
        if (i + 1 < blocks) memcpy(w->S, w->blocks + i * size, (size_t)size * sizeof *w->S);
        fg__keep_states(w, t0, t1, w->kept);
        for (int64_t c = (t1 - t0 - 1) / FG_CHUNK; c >= 0; c--) {
            const int64_t t = t0 + c * FG_CHUNK;
            w->back(w->self, t, fg__least(FG_CHUNK, t1 - t), w->kept + c * size);
        }
    }
}

/* All runs, from the last; state and gstate: [B,H,K,V] or NULL, to: gradient of the state. */
static inline void fg__head_back(const fg__way_back *w, const fg_real *state, const fg_real *gstate,
                                 fg_real *to)
{
    const fg__scan *z = w->z;
    const int64_t own = (w->b * z->H + w->h) * z->K * z->V;
    fg__run r = { .t0 = z->T };
    while (r.t0 > 0) {
        const bool last = r.t0 == z->T;
        r = fg__run_before(z, w->b, r.t0);
        fg__load_state(z, last && gstate ? gstate + own : NULL, w->R);
        if (r.padding) w->clear(w->self, r.t0, r.t1 - r.t0);
        else fg__run_back(w, &r, r.carried ? state + own : NULL);
    }
    if (!r.carried) fg__load_state(z, NULL, w->R);
    fg__store_rows(w->R, z->Vp, z->K, z->V, to + own, z->V);
}

/* ---- all heads of a kernel, shared out ------------------------------------------------------- */

/* f for head h of sequence b; own: memory of the thread, as much as the op's cut() takes. */
typedef void fg__head_of(const fg_exec *e, const fg__scan *z, int64_t b, int64_t h, char *own);
typedef void fg__cut_of(char *base, size_t *used, const fg__scan *z);

static inline void fg__all_heads(const fg_exec *e, const fg__scan *z, fg__cut_of *cut,
                                 fg__head_of *f)
{
    const int threads = fg__threads(e, z->B * z->T * z->H * z->K * z->V);
    size_t each = 0;
    cut(NULL, &each, z);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < z->B * z->H; i++) {
        char *own = (char *)e->scratch + each * (size_t)omp_get_thread_num();
        f(e, z, i / z->H, i % z->H, own);
    }
}

/* k and v: inputs of the op. */
static inline size_t fg__heads_scratch(const fg_shape *k, const fg_shape *v, int threads,
                                       fg__cut_of *cut)
{
    const fg__scan z = fg__scan_of(k, v, 1, NULL, NULL, NULL);
    size_t each = 0;
    cut(NULL, &each, &z);
    return each * (size_t)threads;
}

/* ---- the definition's parts ----------------------------------------------------------------- */

/* x where row t of every sequence sees position t + past + at, else 0; x: [B,H,...], past: i32[1]
 * or absent, first: i32[B,T] or absent.  What comes before row 0 is position -1, seen where first
 * is at most 0; with a cache it is past - 1. */
static inline fg_tensor fg__where_seen(fg_tensor x, fg_tensor first, fg_tensor past, int64_t t,
                                       int64_t at)
{
    fg_graph *g = x.graph;
    const bool before = t + at < 0 && fg_absent(past);
    fg_tensor p = fg_fill(g, FG_DIMS(1), before ? 0 : (double)(t + at));
    if (!fg_absent(past)) {
        fg_tensor more = fg_cast(past, FG_F32);
        more = fg_reshape(more, FG_DIMS(1));
        p = fg_add(p, more);
    }
    fg_tensor low = fg_fill(g, FG_DIMS(1, 1, 1, 1), 0);
    if (!fg_absent(first)) {
        fg_tensor f = fg_cast(first, FG_F32);
        f = fg_slice(f, 1, t, t + 1);
        f = fg_reshape(f, FG_DIMS(fg_dim(x, 0), 1, 1, 1));
        low = fg_max(f, low);
    }
    return fg__where_ge(FG_HERE, p, low, x);
}

/* Row t of x [B,T,H,D] as f32[B,H,1,D] (or [B,H,D,1] if column). */
static inline fg_tensor fg__row_of(fg_tensor x, int64_t t, bool column)
{
    const int64_t B = fg_dim(x, 0), H = fg_dim(x, 2), D = fg_dim(x, 3);
    x = fg_slice(x, 1, t, t + 1);
    x = fg_cast(x, FG_F32);
    return fg_reshape(x, column ? FG_DIMS(B, H, D, 1) : FG_DIMS(B, H, 1, D));
}
#endif
