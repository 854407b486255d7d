/* forget_attention.c - causal softmax attention with a data-dependent forget gate.
 *
 *     s_ij  = scale q_i.k_j + log_f_(j+1) + ... + log_f_i       for the keys j that query i sees
 *     lse_i = ln sum_j e^(s_ij),   o_i = sum_j e^(s_ij - lse_i) v_j
 *
 * q, o: [B,M,H,D]   k, v: [B,N,Hkv,D], H a multiple of Hkv   log_f: f32[B,N,H] or absent: no gate
 * lse: f32[B,M,H]   first: i32[B,M]   past: i32[1]; without past M = N
 *
 * Query row t stands at p = past + t and sees keys j with max(first_t, p - window + 1) <= j <= p.
 * A row with first_t > p is padding: o = 0, lse = -inf.
 * Source: Lin et al. 2025, "Forgetting Transformer: Softmax Attention with a Forget Gate", eq. 4-6,
 * arXiv 2503.02130.  The tiled sum with a running maximum is that of Dao et al. 2022,
 * "FlashAttention".
 * Memory beyond inputs and outputs: O(B H N + threads), never M x N.
 *
 * q and gates that are not finite stay with the queries that see them.  k and v must be finite: a
 * weight of 0 does not keep a NaN of v from the other queries of its tile.
 *
 * Tiles walk from the diagonal to the left, so the running maximum is nearly final at once, and
 * tiles whose weights have all faded to 0 are passed over: that changes no bit, and a head that
 * forgets fast costs little.  Few queries against a cache go key by key instead (few_queries). */
#include <math.h>
#include <omp.h>
#include "attention_tile.h"
#include "internal.h"

#define FEW   8                          /* fewer queries than this against a cache: few_queries */
#define CHUNK 64                         /* keys of one task there */
#define SLACK 8                          /* e^8 times as many keys as memory holds is no overflow */

fg_tensor (fg_forget_attention)(fg_loc at, fg_tensor q, fg_tensor k, fg_tensor v, fg_tensor log_f,
                                double scale, int64_t window)
{
    const fg_sequence s = fg_sequence_of(q.graph);
    if (!fg_absent(s.past) && fg_ok(q) && fg_ok(k) && fg_ok(v)) {
        k = fg__cache(at, k, "k", s);
        v = fg__cache(at, v, "v", s);
        if (!fg_absent(log_f)) log_f = fg__cache(at, log_f, "log_f", s);
    }
    const fg_tensor in[] = { q, k, v, log_f, s.first, s.past };
    return FG_APPLY(forget_attention, at, in, scale, window);
}

static fg_status infer(fg_infer *c)
{
    const struct fg_attr_forget_attention *a = c->attr;
    const fg_shape *q = &c->in[0], *k = &c->in[1], *v = &c->in[2], *f = &c->in[3];
    FG_REQUIRE(c, q->rank == 4 && k->rank == 4, SHAPE, "q must be [B,T,H,D], k and v [B,T,Hkv,D]");
    FG_REQUIRE(c, fg_shape_equal(*k, *v), SHAPE, "k and v must have one shape");
    FG_REQUIRE(c, q->dim[0] == k->dim[0] && q->dim[3] == k->dim[3], SHAPE,
               "q and k must agree in B and D: q has %lld and %lld, k %lld and %lld",
               (long long)q->dim[0], (long long)q->dim[3], (long long)k->dim[0],
               (long long)k->dim[3]);
    FG_REQUIRE(c, k->dim[2] > 0 && q->dim[2] % k->dim[2] == 0, SHAPE,
               "q's %lld heads must be a multiple of k's %lld", (long long)q->dim[2],
               (long long)k->dim[2]);
    FG_REQUIRE(c, c->given[5] ? q->dim[1] <= k->dim[1] : q->dim[1] == k->dim[1], SHAPE,
               "q has %lld positions, k %lld", (long long)q->dim[1], (long long)k->dim[1]);
    FG_REQUIRE(c,
               fg__is_real(c->in_type[0]) && c->in_type[1] == c->in_type[0]
                   && c->in_type[2] == c->in_type[0],
               DTYPE, "q, k and v must have one dtype, f32 or bf16");
    FG_REQUIRE(c, !c->given[3] || fg_shape_equal(*f, FG_DIMS(k->dim[0], k->dim[1], q->dim[2])),
               SHAPE,
               "log_f must be [B,T,H] = [%lld,%lld,%lld], one gate per query head and position",
               (long long)k->dim[0], (long long)k->dim[1], (long long)q->dim[2]);
    FG_REQUIRE(c, !c->given[3] || c->in_type[3] == FG_F32, DTYPE,
               "log_f must be f32: its running sum loses too much in bf16");
    if (fg__check_sequence(c, 4, 5)) return FG_ERR_SHAPE;
    FG_REQUIRE(c, a->window >= 0, USAGE, "window is %lld; it must be positive, or 0 for all keys",
               (long long)a->window);
    c->out[0] = *q;
    c->out[1] = FG_DIMS(q->dim[0], q->dim[1], q->dim[2]);
    c->out_type[1] = FG_F32;
    return FG_OK;
}

/* ---- tiles ---------------------------------------------------------------------------------- */

typedef struct {
    fg__queries w;
    fg_real *q, *k, *v, *s, *o;          /* q: [D][FG_TILE]; k, v, o: [FG_TILE][Dp]; s: a tile */
    fg_real max[FG_TILE], sum[FG_TILE], keep[FG_TILE], rows[FG_TILE];
} work;

static work *work_cut(char *base, size_t *used, const fg__sizes *z)
{
    work *w = fg__cut(base, used, 1, sizeof *w), none;
    work *to = w ? w : &none;
    to->q = fg__cut(base, used, z->D * FG_TILE, sizeof(fg_real));
    to->k = fg__cut(base, used, FG_TILE * z->Dp, sizeof(fg_real));
    to->v = fg__cut(base, used, FG_TILE * z->Dp, sizeof(fg_real));
    to->o = fg__cut(base, used, FG_TILE * z->Dp, sizeof(fg_real));
    to->s = fg__cut(base, used, FG_TILE * FG_TILE, sizeof(fg_real));
    return w;
}

/* Scores of keys [j0,j1) to weights e^(s - max), lane by lane; keep: what the sums so far are worth
 * under the new maximum.  max follows the greatest score only when that is SLACK ahead: sums stay
 * far from overflow, o need hardly ever be scaled, and the last division makes good for all. */
static void softmax_tile(work *u, int64_t j0, int64_t j1, bool diagonal)
{
    const int64_t wide = 2 * FG_LANES;
    for (int64_t n = u->w.n0; n < u->w.n1; n += wide) {
        const int64_t end = diagonal ? fg__least(j1, n + wide + FG_TILE_ROWS - 1) : j1;
        fg_vec less[2], sum[2] = { { 0 }, { 0 } };
        fg_vec most[2] = { fg_vset(-INFINITY), fg_vset(-INFINITY) };
        fg_real *s = u->s + n;
        for (int64_t j = j0; j < end; j++)
            for (int v = 0; v < 2; v++)
                most[v] = fg_vmax(fg_vload(s + j * FG_TILE + v * FG_LANES), most[v]);
        for (int v = 0; v < 2; v++) {
            const int64_t at = n + v * FG_LANES;
            const fg_vec before = fg_vload(u->max + at), rows = fg_vload(u->rows + at),
                         now = most[v] + rows;
            const fg_vec max = fg_vselect((fg_vint)(now > before + SLACK), now, before);
            /* no key yet: any finite pivot will do */
            const fg_vec pivot = fg_vselect((fg_vint)(max == fg_vset(-INFINITY)), fg_vset(0), max);
            less[v] = pivot - rows;
            fg_vstore(u->max + at, max);
            fg_vstore(u->keep + at, fg__weight(before - pivot));
        }
        for (int64_t j = j0; j < end; j++)
            for (int v = 0; v < 2; v++) {
                fg_real *at = s + j * FG_TILE + v * FG_LANES;
                const fg_vec p = fg__weight(fg_vload(at) - less[v]);
                sum[v] = sum[v] + p;
                fg_vstore(at, p);
            }
        for (int v = 0; v < 2; v++) {
            fg_real *at = u->sum + n + v * FG_LANES;
            fg_vstore(at, fg_vfma(fg_vload(at), fg_vload(u->keep + n + v * FG_LANES), sum[v]));
        }
    }
}

static void accumulate(const fg__sizes *z, work *u, int64_t j0, int64_t j1, bool diagonal)
{
    const fg__queries *w = &u->w;
    for (int64_t i = w->n0; !diagonal && i < w->n1; i++)
        for (int64_t d = 0; u->keep[i] != 1 && d < z->Dp; d += FG_LANES)
            fg_vstore(u->o + i * z->Dp + d, fg_vload(u->o + i * z->Dp + d) * fg_vset(u->keep[i]));
    fg__multiply(&(fg__product){ .r0 = w->n0, .r1 = w->n1, .n1 = z->Dp, .k0 = j0, .k1 = j1,
                                 .part = diagonal ? FG_K_UP_TO_R : FG_WHOLE,
                                 .a = u->s, .a_row = 1, .a_col = FG_TILE, .b = u->v, .b_row = z->Dp,
                                 .c = u->o, .c_row = z->Dp, .add = !diagonal });
}

static void tile(const fg_exec *e, const fg__sizes *z, const fg__gates *g, work *u, int64_t block,
                 double between)
{
    const fg__queries *w = &u->w;
    const bool diagonal = block == w->block, gate = e->in[3];
    const int64_t key0 = block * FG_TILE, kv = w->h / (z->H / z->Hkv), row = z->Hkv * z->D;
    const int64_t j0 = fg__most(0, w->low_min - key0), j1 = fg__least(FG_TILE, z->keys - key0);
    const int64_t from = ((w->b * z->N + key0) * z->Hkv + kv) * z->D;
    if (!diagonal) {
        double floor = INFINITY;
        for (int64_t i = w->i0; i < w->i1; i++)
            if (w->low[i] != INT64_MAX && (double)u->max[i] < floor) floor = (double)u->max[i];
        if (fg__faded(z, g, w, block, between, gate, floor)) return;
    }
    fg__copy_rows((const fg_real *)e->in[1] + from, row, j0, j1, z->D, z->Dp, u->k);
    fg__copy_rows((const fg_real *)e->in[2] + from, row, j0, j1, z->D, z->Dp, u->v);
    const fg_real *tail = !diagonal && gate
                        ? g->tail + ((w->b * z->H + w->h) * z->blocks + block) * FG_TILE : NULL;
    fg__multiply(&(fg__product){ .r0 = j0, .r1 = j1, .n0 = w->n0, .n1 = w->n1, .k1 = z->D,
                                 .part = diagonal ? FG_R_UP_TO_N : FG_WHOLE,
                                 .a = u->k, .a_row = z->Dp, .a_col = 1, .b = u->q, .b_row = FG_TILE,
                                 .c = u->s, .c_row = FG_TILE, .start = tail });
    if (diagonal || w->low_max > key0 + j0) fg__tile_mask(w, u->s, block, j0, j1, gate);
    fg__tile_rows(w, block, between, gate && !diagonal, u->rows);
    softmax_tile(u, j0, j1, diagonal);
    accumulate(z, u, j0, j1, diagonal);
}

static void block_of_queries(const fg_exec *e, const fg__sizes *z, const fg__gates *g, work *u,
                             int64_t b, int64_t h, int64_t block)
{
    const fg__queries *w = &u->w;
    const fg_real *q = e->in[0];
    fg_real *o = e->out[0], *lse = e->out[1];
    fg__queries_fill(&u->w, z, g, b, h, block, q, e->in[3], e->in[4]);
    for (int64_t i = 0; i < FG_TILE; i++) u->max[i] = -INFINITY, u->sum[i] = 0;
    if (w->any) {
        const int64_t t0 = block * FG_TILE - z->past;     /* lane i is row t0 + i */
        fg__copy_transposed(q + ((b * z->M + t0) * z->H + h) * z->D, z->H * z->D, w, z->D,
                            (fg_real)z->scale, u->q);
        double between = 0;
        for (int64_t j = block; j >= w->low_min / FG_TILE; j--) {
            if (e->in[3] && j < block - 1) between += g->total[(b * z->H + h) * z->blocks + j + 1];
            tile(e, z, g, u, j, between);
        }
    }
    for (int64_t i = w->i0; i < w->i1; i++) {
        const int64_t r = (b * z->M + block * FG_TILE + i - z->past) * z->H + h;
        const bool sees = w->low[i] != INT64_MAX;
        if (sees) fg__put_row(u->o + i * z->Dp, 1 / u->sum[i], z->D, o + r * z->D);
        else memset(o + r * z->D, 0, (size_t)z->D * sizeof *o);
        lse[r] = sees ? u->max[i] + fg_log1(u->sum[i]) : (fg_real)-INFINITY;
    }
}

static void tiles(const fg_exec *e, const fg__sizes *z)
{
    size_t used = 0;
    fg__gates g = fg__gates_cut(e->scratch, &used, z);
    fg__gates_fill(&g, z, e->in[1], e->in[3], e->threads);
    const int64_t block0 = z->past / FG_TILE, blocks = (z->past + z->M - 1) / FG_TILE - block0 + 1;
    size_t each = 0;
    work_cut(NULL, &each, z);
    /* Tasks share nothing, so the order in which threads take them changes no bit. */
#pragma omp parallel num_threads(e->threads)
    {
        size_t mine = used + each * (size_t)omp_get_thread_num();
        work *u = work_cut(e->scratch, &mine, z);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < z->B * z->H * blocks; task++) {
            const int64_t bh = task / blocks, block = block0 + blocks - 1 - task % blocks;
            block_of_queries(e, z, &g, u, bh / z->H, bh % z->H, block);
        }
    }
}

/* ---- few queries, many keys ----------------------------------------------------------------- */

/* One task: CHUNK keys of a sequence, all heads at once, so that the cache is read from front to
 * back.  What it finds for a row (h,t) of q goes to part: D sums of weighted values, the sum of
 * weights, the maximum; few_join puts the chunks together. */
typedef struct {
    int64_t chunks, row;                 /* row: elements of one part, Dp + 2 */
    double  *later;                      /* [B,chunks,H]: log_f summed over the chunks behind */
    fg_real *part;                       /* [B,chunks,H,M,row] */
} few;
typedef struct {                         /* a thread's own */
    fg_real *s;                          /* [H,M,CHUNK]: scores, then weights */
    fg_real *bias;                       /* [H,CHUNK]: log_f_(j+1) + ... + log_f_past */
    double  *sum;                        /* [H] */
} few_work;

static few few_cut(char *base, size_t *used, const fg__sizes *z)
{
    few f = { .chunks = (z->N + CHUNK - 1) / CHUNK, .row = z->Dp + 2 };
    f.later = fg__cut(base, used, z->B * f.chunks * z->H, sizeof *f.later);
    f.part = fg__cut(base, used, z->B * f.chunks * z->H * z->M * f.row, sizeof *f.part);
    return f;
}

static few_work few_work_cut(char *base, size_t *used, const fg__sizes *z)
{
    few_work w;
    w.s = fg__cut(base, used, z->H * z->M * CHUNK, sizeof *w.s);
    w.bias = fg__cut(base, used, z->H * CHUNK, sizeof *w.bias);
    w.sum = fg__cut(base, used, z->H, sizeof *w.sum);
    return w;
}

/* Adds log_f of keys j1 - 1 down to j0, as far as they are at most past, to sum[h]; what the sum
 * was before key j goes to bias, if that is wanted. */
static void few_gates(const fg__sizes *z, const fg_real *log_f, int64_t j0, int64_t j1, double *sum,
                      fg_real *bias)
{
    for (int64_t j = fg__least(j1, z->past + 1) - 1; j >= j0; j--)
        for (int64_t h = 0; h < z->H; h++) {
            if (bias) bias[h * CHUNK + j - j0] = (fg_real)sum[h];
            sum[h] += (double)fg__clamped(log_f[j * z->H + h]);
        }
}

/* later: each chunk's own sum, then summed up from behind. */
static void few_later(const fg_exec *e, const fg__sizes *z, const few *f, int64_t chunks)
{
    const fg_real *log_f = e->in[3];
    for (int64_t i = 0; i < z->B * f->chunks * z->H; i++) f->later[i] = 0;
#pragma omp parallel for schedule(static) num_threads(e->threads)
    for (int64_t i = 0; i < z->B * (chunks - 1); i++) {
        const int64_t b = i / (chunks - 1), c = i % (chunks - 1) + 1;
        few_gates(z, log_f + b * z->N * z->H, c * CHUNK, fg__least(c * CHUNK + CHUNK, z->keys),
                  f->later + (b * f->chunks + c - 1) * z->H, NULL);
    }
    for (int64_t b = 0; b < z->B; b++)
        for (int64_t c = chunks - 2; c >= 0; c--)
            for (int64_t h = 0; h < z->H; h++)
                f->later[(b * f->chunks + c) * z->H + h] +=
                    f->later[(b * f->chunks + c + 1) * z->H + h];
}

/* Sum of log_f over (max(j, past), past + t]. */
static double few_late(const fg__sizes *z, const fg_real *log_f, int64_t h, int64_t j, int64_t t)
{
    double sum = 0;
    for (int64_t i = fg__most(j, z->past) + 1; i <= z->past + t; i++)
        sum += (double)fg__clamped(log_f[i * z->H + h]);
    return sum;
}

static void few_scores(const fg_exec *e, const fg__sizes *z, const few_work *w, int64_t b,
                       int64_t j0, int64_t j1)
{
    const int64_t group = z->H / z->Hkv;
    const fg_real *q = (const fg_real *)e->in[0] + b * z->M * z->H * z->D;
    const fg_real *k = (const fg_real *)e->in[1] + (b * z->N + j0) * z->Hkv * z->D;
    for (int64_t j = 0; j < j1 - j0; j++)
        for (int64_t kv = 0; kv < z->Hkv; kv++, k += z->D)
            for (int64_t h = kv * group; h < (kv + 1) * group; h++)
                for (int64_t t = 0; t < z->M; t++)
                    w->s[(h * z->M + t) * CHUNK + j] = fg__dot(q + (t * z->H + h) * z->D, k, z->D);
}

/* Scores of row (h,t) to weights; what the row does not see gets 0. */
static void few_weights(const fg_exec *e, const fg__sizes *z, const few_work *w, int64_t b,
                        int64_t h, int64_t t, int64_t j0, int64_t j1, fg_real *part)
{
    const fg_real *log_f = e->in[3] ? (const fg_real *)e->in[3] + b * z->N * z->H : NULL;
    const int32_t *first = e->in[4];
    const int64_t p = z->past + t;
    int64_t low = first ? fg__most(0, first[b * z->M + t]) : 0;
    if (p - low >= z->window) low = p - z->window + 1;
    fg_real *s = w->s + (h * z->M + t) * CHUNK;
    const fg_real late = log_f ? (fg_real)few_late(z, log_f, h, z->past, t) : 0;
    for (int64_t j = 0; j < CHUNK; j++) {
        const int64_t at = j0 + j;
        if (at >= j1 || at < low || at > p) { s[j] = -INFINITY; continue; }
        s[j] *= (fg_real)z->scale;
        if (log_f)
            s[j] += at <= z->past ? w->bias[h * CHUNK + j] + late
                                  : (fg_real)few_late(z, log_f, h, at, t);
    }
    fg_vec most = fg_vset(-INFINITY), sum = { 0 };
    for (int64_t j = 0; j < CHUNK; j += FG_LANES) most = fg_vmax(fg_vload(s + j), most);
    const fg_real top = fg_vgreatest(most), pivot = top > (fg_real)-INFINITY ? top : 0;
    for (int64_t j = 0; j < CHUNK; j += FG_LANES) {
        const fg_vec x = fg__weight(fg_vload(s + j) - fg_vset(pivot));
        sum = sum + x;
        fg_vstore(s + j, x);
    }
    part[z->Dp] = fg_vsum(sum);
    part[z->Dp + 1] = top;
}

/* o += p_0 v_0 + ... + p_3 v_3 for four keys; n of them are there, the rows `row` apart. */
static inline void few_values(const fg_real *p, int64_t n, const fg_real *v, int64_t row, int64_t D,
                              fg_real *o)
{
    for (int64_t d = 0; d < D; d += FG_LANES) {
        const int64_t m = fg__least(FG_LANES, D - d);
        fg_vec sum = fg_vload(o + d);
        for (int64_t i = 0; i < n; i++) {
            const fg_vec x =
                m == FG_LANES ? fg_vload(v + i * row + d) : fg_vload_n(v + i * row + d, m);
            sum = fg_vfma(fg_vset(p[i]), x, sum);
        }
        fg_vstore(o + d, sum);
    }
}

static void few_chunk(const fg_exec *e, const fg__sizes *z, const few *f, const few_work *w,
                      int64_t b, int64_t c)
{
    const int64_t j0 = c * CHUNK, j1 = fg__least(j0 + CHUNK, z->keys), group = z->H / z->Hkv,
                  row = z->Hkv * z->D;
    fg_real *part = f->part + (b * f->chunks + c) * z->H * z->M * f->row;
    if (e->in[3]) {
        const fg_real *log_f = (const fg_real *)e->in[3] + b * z->N * z->H;
        for (int64_t h = 0; h < z->H; h++) w->sum[h] = f->later[(b * f->chunks + c) * z->H + h];
        few_gates(z, log_f, j0, j1, w->sum, w->bias);
    }
    few_scores(e, z, w, b, j0, j1);
    for (int64_t i = 0; i < z->H * z->M; i++) {
        few_weights(e, z, w, b, i / z->M, i % z->M, j0, j1, part + i * f->row);
        for (int64_t d = 0; d < z->Dp; d++) part[i * f->row + d] = 0;
    }
    const fg_real *v = (const fg_real *)e->in[2] + (b * z->N + j0) * row;
    for (int64_t j = 0; j < j1 - j0; j += 4)
        for (int64_t i = 0; i < z->H * z->M; i++) {
            const fg_real *from = v + j * row + i / z->M / group * z->D;
            if (j + 4 <= j1 - j0)
                few_values(w->s + i * CHUNK + j, 4, from, row, z->D, part + i * f->row);
            else few_values(w->s + i * CHUNK + j, j1 - j0 - j, from, row, z->D, part + i * f->row);
        }
}

static void few_join(const fg__sizes *z, const few *f, int64_t chunks, const fg_real *part,
                     fg_real *o, fg_real *lse)
{
    const int64_t step = z->H * z->M * f->row;
    fg_real most = -INFINITY, sum = 0;
    for (int64_t c = 0; c < chunks; c++)
        if (!(part[c * step + z->Dp + 1] <= most)) most = part[c * step + z->Dp + 1];
    for (int64_t d = 0; d < z->D; d++) o[d] = 0;
    for (int64_t c = 0; c < chunks; c++) {
        const fg_real *p = part + c * step;
        if (p[z->Dp + 1] == (fg_real)-INFINITY) continue;
        const fg_real keep = fg__weight(fg_vset(p[z->Dp + 1] - most))[0];
        sum += keep * p[z->Dp];
        for (int64_t d = 0; d < z->D; d++) o[d] += keep * p[d];
    }
    for (int64_t d = 0; d < z->D; d++) o[d] = sum == 0 ? 0 : o[d] / sum;
    *lse = sum == 0 ? (fg_real)-INFINITY : most + fg_log1(sum);
}

static void few_queries(const fg_exec *e, const fg__sizes *z)
{
    size_t used = 0, each = 0;
    const few f = few_cut(e->scratch, &used, z);
    const int64_t chunks = (z->keys + CHUNK - 1) / CHUNK;
    few_work_cut(NULL, &each, z);
    if (e->in[3]) few_later(e, z, &f, chunks);
#pragma omp parallel num_threads(e->threads)
    {
        size_t mine = used + each * (size_t)omp_get_thread_num();
        const few_work w = few_work_cut(e->scratch, &mine, z);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < z->B * chunks; i++) few_chunk(e, z, &f, &w, i / chunks, i % chunks);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < z->B * z->H * z->M; i++) {
            const int64_t b = i / z->M / z->H, h = i / z->M % z->H, t = i % z->M,
                          to = (b * z->M + t) * z->H + h;
            few_join(z, &f, chunks, f.part + (b * f.chunks * z->H * z->M + h * z->M + t) * f.row,
                     (fg_real *)e->out[0] + to * z->D, (fg_real *)e->out[1] + to);
        }
    }
}

static void cpu(const fg_exec *e)
{
    const struct fg_attr_forget_attention *a = e->attr;
    const int32_t *past = e->in[5];
    const fg__sizes z = fg__attention_sizes(&e->in_shape[0], &e->in_shape[1], past ? past[0] : 0,
                                            a->scale, a->window);
    if (past && z.M < FEW) few_queries(e, &z);
    else tiles(e, &z);
}

static size_t scratch(const fg_infer *c, int threads)
{
    const fg__sizes z = fg__attention_sizes(&c->in[0], &c->in[1], 0, 1, 0);
    size_t used = 0;
    if (c->given[5] && z.M < FEW) {
        few_cut(NULL, &used, &z);
        for (int i = 0; i < threads; i++) few_work_cut(NULL, &used, &z);
    } else {
        fg__gates_cut(NULL, &used, &z);
        for (int i = 0; i < threads; i++) work_cut(NULL, &used, &z);
    }
    return used;
}

/* One fused node, forget_attention_grad; its page has the formulas. */
static void vjp(fg_vjp *v)
{
    const struct fg_attr_forget_attention *a = v->attr;
    if (fg__reads_caches(v, 5)) return;
    const fg_tensor go = fg__gout_or_zero(v);
    const fg_tensor in[] = { go, v->gout[1], v->in[0], v->in[1], v->in[2], v->in[3],
                             v->out[0], v->out[1], v->in[4] };
    const fg_tensor g = FG_APPLY(forget_attention_grad, FG_HERE, in, a->scale, a->window);
    for (int i = 0; i < 3; i++) v->gin[i] = fg_result(g, i);
    if (!fg_absent(v->in[3])) v->gin[3] = fg_result(g, 3);
}

/* [B,N,Hkv,D] -> [B,H,N,D], each key head repeated for the query heads that share it. */
static fg_tensor heads_first(fg_tensor x, int64_t H)
{
    const int64_t B = fg_dim(x, 0), N = fg_dim(x, 1), Hkv = fg_dim(x, 2), D = fg_dim(x, 3);
    x = fg_permute(x, FG_DIMS(0, 2, 1, 3));
    if (Hkv == H) return x;
    x = fg_reshape(x, FG_DIMS(B, Hkv, 1, N, D));
    x = fg_broadcast_to(x, FG_DIMS(B, Hkv, H / Hkv, N, D));
    return fg_reshape(x, FG_DIMS(B, H, N, D));
}

/* The definition, with the M x N scores written out: s + c_i - c_j, c the running sum of log_f. */
static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_forget_attention *a = attr;
    fg_graph *g = in[0].graph;
    const int64_t B = fg_dim(in[0], 0), M = fg_dim(in[0], 1), H = fg_dim(in[0], 2),
                  N = fg_dim(in[1], 1);
    const fg_tensor q = heads_first(in[0], H), k = heads_first(in[1], H), v = heads_first(in[2], H);
    fg_tensor s = fg_matmul(q, k, false, true);
    s = fg_cast(s, FG_F32);
    s = fg_scale(s, a->scale, 0);
    if (!fg_absent(in[3])) {
        const fg_tensor least = fg_fill(g, FG_DIMS(1), FG_LOG_F_MIN);
        fg_tensor c = fg_max(in[3], least);
        c = fg_permute(c, FG_DIMS(0, 2, 1));
        c = fg_cumsum(c, 2, false);
        /* c_i is c at the query's own position: picked by a row of weights that sees only itself */
        fg_tensor own = fg_fill(g, FG_DIMS(B, H, M, N), 0);
        own = fg__attention_mask(FG_HERE, own, (fg_tensor){ 0 }, in[5], 1);
        own = fg_softmax(own);
        const fg_tensor column = fg_reshape(c, FG_DIMS(B, H, N, 1));
        const fg_tensor ci = fg_matmul(own, column, false, false);
        const fg_tensor cj = fg_reshape(c, FG_DIMS(B, H, 1, N));
        s = fg_add(s, ci);
        s = fg_sub(s, cj);
    }
    s = fg__attention_mask(FG_HERE, s, in[4], in[5], a->window);
    fg_tensor p = fg_softmax(s);
    p = fg_cast(p, fg_dtype_of(in[0]));
    const fg_tensor o = fg_matmul(p, v, false, false);
    fg_tensor lse = fg_log_sum_exp(s);
    lse = fg_reshape(lse, FG_DIMS(B, H, M));
    out[0] = fg_permute(o, FG_DIMS(0, 2, 1, 3));
    out[1] = fg_permute(lse, FG_DIMS(0, 2, 1));
}

/* Two products of D multiply-adds for each pair that may meet; documents are not known here, and
 * with a cache every key counts. */
static fg_cost cost(const fg_infer *c)
{
    const struct fg_attr_forget_attention *a = c->attr;
    const double rows = (double)(c->in[0].dim[0] * c->in[0].dim[2]);
    const double pairs = fg__pairs(c->in[0].dim[1], c->in[1].dim[1], a->window, c->given[5]);
    return (fg_cost){ .flops = 4 * rows * pairs * (double)c->in[0].dim[3],
                      .bytes = (double)sizeof(float) * (double)(2 * fg_shape_count(c->in[0])
                               + 2 * fg_shape_count(c->in[1]) + fg_shape_count(c->out[1])
                               + (c->given[3] ? fg_shape_count(c->in[3]) : 0)) };
}

static fg_tensor example(fg_graph *g, int i)
{
    static const struct { int64_t B, T, H, Hkv, D, window; bool gate, first; } e[] = {
        { 2, 5, 2, 2, 3, 0, true, false }, { 1, 1, 1, 1, 1, 0, true, false },
        { 1, 7, 4, 2, 5, 3, true, false }, { 2, 6, 3, 1, 3, 0, false, false },
        { 2, 6, 2, 1, 3, 2, true, true },
    };
    static const int32_t first[12] = { 0, 0, 0, 3, 3, 5, 0, 0, 2, 2, 2, 2 };
    if (i >= (int)(sizeof e / sizeof e[0])) return (fg_tensor){ 0 };
    const fg_tensor q = fg_random(g, e[i].B, e[i].T, e[i].H, e[i].D);
    const fg_tensor k = fg_random(g, e[i].B, e[i].T, e[i].Hkv, e[i].D);
    const fg_tensor v = fg_random(g, e[i].B, e[i].T, e[i].Hkv, e[i].D);
    fg_tensor log_f = { 0 };
    if (e[i].gate) {
        log_f = fg_random(g, e[i].B, e[i].T, e[i].H);
        log_f = fg_log_sigmoid(log_f);
    }
    if (e[i].first) {
        const fg_tensor f = fg_given_int(g, FG_DIMS(2, 6), first);
        fg_graph_sequence(g, (fg_sequence){ .first = f });
    }
    return fg_forget_attention(q, k, v, log_f, 0.6, e[i].window);
}

const fg_op_code fg_code_forget_attention = {
    .infer = infer, .cpu = cpu, .vjp = vjp, .cost = cost, .decompose = decompose,
    .example = example, .scratch = scratch,
    .bf16 = { .narrow_in = 7, .wide_in = 8, .narrow_out = 1, .wide_out = 2 },
};
