/* forget_attention_grad.c - gradient of forget_attention.
 *
 *     p_ij     = e^(s_ij - lse_i)                       computed again, tile by tile
 *     delta_i  = go_i.o_i - glse_i
 *     ds_ij    = p_ij (go_i.v_j - delta_i)
 *     gq_i     = scale sum_j ds_ij k_j,   gk_j = scale sum_i ds_ij q_i,   gv_j = sum_i p_ij go_i
 *     glog_f_t = sum over pairs j < t <= i of ds_ij = sum_(m>=t) (sum_j ds_mj - sum_i ds_im)
 *
 * go, gq: as q   gk, gv: as k   glse: as lse, or absent: 0   glog_f: as log_f (zeros if that is
 * absent) Source: as forget_attention; the flow over tiles is that of Dao et al. 2022,
 * "FlashAttention".
 *
 * The gate's gradient takes the sums over rows as well as over columns.  In exact arithmetic a row
 * sums to glse_i; rounding leaves a residue, and the long sum over m would make a random walk of
 * those residues, which with a short memory drowns the few pairs that count.  Taken from the same
 * ds, the two sums cancel. Sums over more than a tile are in double.  Where no pair straddles a
 * token, at a document's start, the sum is 0 and begins anew.  Where log_f is below the clamp its
 * gradient is 0.
 *
 * A row whose lse is NaN makes NaN of its gq and of what the keys and gates get that it sees.
 *
 * A task is a key head, with all query heads that share it, and every parts-th block of queries.
 * Its gk, gv and column sums are its own; they are added up in order afterwards. */
#include <math.h>
#include <omp.h>
#include "attention_tile.h"
#include "internal.h"

#define TASKS     16                     /* blocks of queries are dealt out to this many tasks */
#define PARTS_MAX 4                      /* but no further: each part holds its own gk and gv */

enum { GO, GLSE, Q, K, V, LOG_F, O, LSE, FIRST };

static fg_status infer(fg_infer *c)
{
    const fg_shape *q = &c->in[Q], *k = &c->in[K];
    FG_REQUIRE(c, fg_shape_equal(c->in[GO], *q), SHAPE, "go must have q's shape");
    c->out[0] = *q;
    c->out[1] = c->out[2] = *k;
    c->out[3] = FG_DIMS(k->dim[0], k->dim[1], q->dim[2]);
    c->out_type[0] = c->in_type[Q];
    c->out_type[1] = c->out_type[2] = c->in_type[K];
    c->out_type[3] = FG_F32;
    return FG_OK;
}

typedef struct {                         /* shared */
    fg__gates g;
    int64_t parts;
    fg_real *gk, *gv;                    /* parts 1, 2, ...; part 0 is the output */
    double *column;                      /* [parts,B,H,N] */
    double *row;                         /* [B,H,N] */
} totals;

typedef struct {                         /* a thread's own */
    fg__queries w;
    fg_real *qt, *got;                   /* [D][FG_TILE]: scale q, go */
    fg_real *q, *go, *k, *v;             /* [FG_TILE][Dp]; q scaled */
    fg_real *gq, *gk, *gv;
    fg_real *p, *ds;                     /* tiles */
    fg_real lse[FG_TILE], delta[FG_TILE], rows[FG_TILE];
    double row[FG_TILE];
    bool bad[FG_TILE], any_bad;          /* rows whose lse is NaN */
} work;

static totals totals_cut(char *base, size_t *used, const fg__sizes *z)
{
    totals t;
    const int64_t tasks = fg__most(1, z->B * z->Hkv);
    t.parts = fg__most(1, fg__least(fg__least((TASKS + tasks - 1) / tasks, PARTS_MAX), z->blocks));
    t.g = fg__gates_cut(base, used, z);
    t.gk = fg__cut(base, used, (t.parts - 1) * z->B * z->N * z->Hkv * z->D, sizeof *t.gk);
    t.gv = fg__cut(base, used, (t.parts - 1) * z->B * z->N * z->Hkv * z->D, sizeof *t.gv);
    t.column = fg__cut(base, used, t.parts * z->B * z->H * z->N, sizeof *t.column);
    t.row = fg__cut(base, used, z->B * z->H * z->N, sizeof *t.row);
    return t;
}

static work *work_cut(char *base, size_t *used, const fg__sizes *z)
{
    work *w = fg__cut(base, used, 1, sizeof *w), none;
    work *to = w ? w : &none;
    const int64_t tall = z->D * FG_TILE, wide = FG_TILE * z->Dp;
    to->qt = fg__cut(base, used, tall, sizeof(fg_real));
    to->got = fg__cut(base, used, tall, sizeof(fg_real));
    fg_real **tiles[] = { &to->q, &to->go, &to->k, &to->v, &to->gq, &to->gk, &to->gv };
    for (size_t i = 0; i < sizeof tiles / sizeof tiles[0]; i++)
        *tiles[i] = fg__cut(base, used, wide, sizeof(fg_real));
    to->p = fg__cut(base, used, FG_TILE * FG_TILE, sizeof(fg_real));
    to->ds = fg__cut(base, used, FG_TILE * FG_TILE, sizeof(fg_real));
    return w;
}

/* p: scores to weights; ds: go.v to p (go.v - delta); sums of ds over keys to row, over queries to
 * column. */
static void weights_tile(work *u, int64_t j0, int64_t j1, bool diagonal, double *column)
{
    const fg__queries *w = &u->w;
    const int64_t wide = 2 * FG_LANES;
    fg_real less[FG_TILE], row[FG_TILE];
    for (int64_t i = w->n0; i < w->n1; i++)
        less[i] = u->bad[i] ? (fg_real)INFINITY : u->lse[i] - u->rows[i], row[i] = 0;
    for (int64_t j = j0; j < j1; j++) {
        /* on the diagonal, the first register block of lanes that reaches down to key j */
        const int64_t from = diagonal ? (j - FG_TILE_ROWS + 1) / wide * wide : 0;
        fg_vec sum = { 0 };
        for (int64_t n = fg__most(w->n0, from); n < w->n1; n += FG_LANES) {
            fg_real *at = u->p + j * FG_TILE + n, *ds = u->ds + j * FG_TILE + n;
            const fg_vec p = fg__weight(fg_vload(at) - fg_vload(less + n));
            const fg_vec d = p * (fg_vload(ds) - fg_vload(u->delta + n));
            sum = sum + d;
            fg_vstore(at, p);
            fg_vstore(ds, d);
            fg_vstore(row + n, fg_vload(row + n) + d);
        }
        column[j] += (double)fg_vsum(sum);
    }
    for (int64_t i = w->i0; i < w->i1; i++) u->row[i] += (double)row[i];
}

/* Rows that are NaN make NaN of the keys that they see, and of no others. */
static void spoil_tile(work *u, int64_t block, int64_t j0, int64_t j1, double *column)
{
    const fg__queries *w = &u->w;
    for (int64_t i = w->i0; i < w->i1; i++)
        for (int64_t j = j0; u->bad[i] && j < j1; j++) {
            const int64_t key = block * FG_TILE + j;
            if (key < w->low[i] || key > w->block * FG_TILE + i) continue;
            u->p[j * FG_TILE + i] = u->ds[j * FG_TILE + i] = (fg_real)NAN;
            column[j] = u->row[i] = (double)NAN;
        }
}

static void add_rows(const fg_real *x, int64_t r0, int64_t r1, int64_t D, int64_t Dp, fg_real *to,
                     int64_t row)
{
    for (int64_t r = r0; r < r1; r++)
        for (int64_t d = 0; d < D; d += FG_LANES) {
            const int64_t n = D - d;
            fg_real *y = to + r * row + d;
            if (n >= FG_LANES) fg_vstore(y, fg_vload(y) + fg_vload(x + r * Dp + d));
            else fg_vstore_n(y, fg_vload_n(y, n) + fg_vload_n(x + r * Dp + d, n), n);
        }
}

static void tile(const fg_exec *e, const fg__sizes *z, const totals *t, work *u, int64_t block,
                 double between, fg_real *gk, fg_real *gv, double *column)
{
    const fg__queries *w = &u->w;
    const bool diagonal = block == w->block, gate = e->in[LOG_F];
    const int64_t key0 = block * FG_TILE, kv = w->h / (z->H / z->Hkv), row = z->Hkv * z->D;
    const int64_t j0 = fg__most(0, w->low_min - key0), j1 = fg__least(FG_TILE, z->keys - key0);
    const int64_t from = ((w->b * z->N + key0) * z->Hkv + kv) * z->D;
    const fg_real *tail = !diagonal && gate
                        ? t->g.tail + ((w->b * z->H + w->h) * z->blocks + block) * FG_TILE : NULL;
    fg__copy_rows((const fg_real *)e->in[K] + from, row, j0, j1, z->D, z->Dp, u->k);
    fg__copy_rows((const fg_real *)e->in[V] + from, row, j0, j1, z->D, z->Dp, u->v);
    fg__product s = { .r0 = j0, .r1 = j1, .n0 = w->n0, .n1 = w->n1, .k1 = z->D,
                      .part = diagonal ? FG_R_UP_TO_N : FG_WHOLE,
                      .a = u->k, .a_row = z->Dp, .a_col = 1, .b = u->qt, .b_row = FG_TILE,
                      .c = u->p, .c_row = FG_TILE, .start = tail };
    fg__multiply(&s);
    s.a = u->v, s.b = u->got, s.c = u->ds, s.start = NULL;
    fg__multiply(&s);
    if (diagonal || w->low_max > key0 + j0) fg__tile_mask(w, u->p, block, j0, j1, gate);
    fg__tile_rows(w, block, between, gate && !diagonal, u->rows);
    weights_tile(u, j0, j1, diagonal, column + key0);
    if (u->any_bad) spoil_tile(u, block, j0, j1, column + key0);
    fg__multiply(&(fg__product){ .r0 = w->n0, .r1 = w->n1, .n1 = z->Dp, .k0 = j0, .k1 = j1,
                                 .part = diagonal ? FG_K_UP_TO_R : FG_WHOLE,
                                 .a = u->ds, .a_row = 1, .a_col = FG_TILE,
                                 .b = u->k, .b_row = z->Dp,
                                 .c = u->gq, .c_row = z->Dp, .add = !diagonal });
    fg__product g = { .r0 = j0, .r1 = j1, .n1 = z->Dp, .k0 = w->i0, .k1 = w->i1,
                      .part = diagonal ? FG_K_FROM_R : FG_WHOLE,
                      .a = u->ds, .a_row = FG_TILE, .a_col = 1, .b = u->q, .b_row = z->Dp,
                      .c = u->gk, .c_row = z->Dp };
    fg__multiply(&g);
    g.a = u->p, g.b = u->go, g.c = u->gv;
    fg__multiply(&g);
    add_rows(u->gk, j0, j1, z->D, z->Dp, gk + from, row);
    add_rows(u->gv, j0, j1, z->D, z->Dp, gv + from, row);
}

/* The rows of a block of queries, and both transposed; a row that sees nothing, or is bad, is 0. */
static void rows_fill(const fg_exec *e, const fg__sizes *z, work *u)
{
    const fg__queries *w = &u->w;
    const fg_real *glse = e->in[GLSE], *lse = e->in[LSE];
    u->any_bad = false;
    for (int64_t i = w->n0; i < w->n1; i++) {
        fg_real *q = u->q + i * z->Dp, *go = u->go + i * z->Dp;
        const bool sees = w->low[i] != INT64_MAX;
        const int64_t r = (w->b * z->M + w->block * FG_TILE + i) * z->H + w->h;
        for (int64_t d = 0; d < z->Dp; d++) q[d] = go[d] = 0;
        u->lse[i] = u->delta[i] = 0;
        u->bad[i] = sees && isnan(lse[r]);
        u->any_bad |= u->bad[i];
        if (!sees || u->bad[i]) continue;
        for (int64_t d = 0; d < z->D; d++)
            q[d] = (fg_real)z->scale * ((const fg_real *)e->in[Q])[r * z->D + d];
        memcpy(go, (const fg_real *)e->in[GO] + r * z->D, (size_t)z->D * sizeof *go);
        u->lse[i] = lse[r];
        u->delta[i] =
            fg__dot(go, (const fg_real *)e->in[O] + r * z->D, z->D) - (glse ? glse[r] : 0);
    }
    fg__copy_transposed(u->q, z->Dp, w, z->D, 1, u->qt);
    fg__copy_transposed(u->go, z->Dp, w, z->D, 1, u->got);
}

static void block_of_queries(const fg_exec *e, const fg__sizes *z, const totals *t, work *u,
                             int64_t b, int64_t h, int64_t block, fg_real *gk, fg_real *gv,
                             double *column)
{
    const fg__queries *w = &u->w;
    fg__queries_fill(&u->w, z, &t->g, b, h, block, e->in[Q], e->in[LOG_F], e->in[FIRST]);
    for (int64_t i = 0; i < FG_TILE; i++) u->row[i] = 0;
    if (w->any) {
        double between = 0, floor = INFINITY;
        rows_fill(e, z, u);
        for (int64_t i = w->i0; i < w->i1; i++)
            if (w->low[i] != INT64_MAX && (double)u->lse[i] < floor) floor = (double)u->lse[i];
        if (u->any_bad) floor = -INFINITY;
        for (int64_t j = block; j >= w->low_min / FG_TILE; j--) {
            if (e->in[LOG_F] && j < block - 1)
                between += t->g.total[(b * z->H + h) * z->blocks + j + 1];
            if (j < block && fg__faded(z, &t->g, w, j, between, e->in[LOG_F], floor)) continue;
            tile(e, z, t, u, j, between, gk, gv, column);
        }
    }
    fg_real *gq = e->out[0];
    for (int64_t i = w->i0; i < w->i1; i++) {
        const int64_t p = block * FG_TILE + i, r = (b * z->M + p) * z->H + h;
        const bool sees = w->low[i] != INT64_MAX;
        if (sees) fg__put_row(u->gq + i * z->Dp, (fg_real)z->scale, z->D, gq + r * z->D);
        else memset(gq + r * z->D, 0, (size_t)z->D * sizeof *gq);
        t->row[(b * z->H + h) * z->N + p] = u->row[i];
    }
}

static void task(const fg_exec *e, const fg__sizes *z, const totals *t, work *u, int64_t b,
                 int64_t kv, int64_t part)
{
    const int64_t group = z->H / z->Hkv, size = z->B * z->N * z->Hkv * z->D;
    fg_real *gk = part ? t->gk + (part - 1) * size : e->out[1];
    fg_real *gv = part ? t->gv + (part - 1) * size : e->out[2];
    for (int64_t j = 0; j < z->N; j++) {
        const int64_t at = ((b * z->N + j) * z->Hkv + kv) * z->D;
        for (int64_t d = 0; d < z->D; d++) gk[at + d] = gv[at + d] = 0;
    }
    for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
        double *column = t->column + ((part * z->B + b) * z->H + h) * z->N;
        for (int64_t j = 0; j < z->N; j++) column[j] = 0;
        for (int64_t block = part; block < z->blocks; block += t->parts)
            block_of_queries(e, z, t, u, b, h, block, gk, gv, column);
    }
}

static void gate_gradient(const fg_exec *e, const fg__sizes *z, const totals *t, int64_t b,
                          int64_t h)
{
    const fg_real *log_f = e->in[LOG_F];
    const int32_t *first = e->in[FIRST];
    const int64_t head = b * z->H + h;
    fg_real *g = e->out[3];
    double sum = 0;
    int64_t least = z->N;
    for (int64_t j = z->N - 1; j >= 0; j--) {
        const int64_t at = (b * z->N + j) * z->H + h;
        const int64_t low = fg__most(first ? first[b * z->N + j] : 0, j - z->window + 1);
        if (low <= j) least = fg__least(least, low);
        sum += t->row[head * z->N + j];
        for (int64_t part = 0; part < t->parts; part++)
            sum -= t->column[(part * z->B * z->H + head) * z->N + j];
        if (j > 0 && least >= j) sum = 0;
        g[at] = !log_f || log_f[at] < FG_LOG_F_MIN ? 0 : (fg_real)sum;
    }
}

static void cpu(const fg_exec *e)
{
    const struct fg_attr_forget_attention_grad *a = e->attr;
    const fg__sizes z =
        fg__attention_sizes(&e->in_shape[Q], &e->in_shape[K], 0, a->scale, a->window);
    size_t used = 0, each = 0;
    totals t = totals_cut(e->scratch, &used, &z);
    work_cut(NULL, &each, &z);
    fg__gates_fill(&t.g, &z, e->in[K], e->in[LOG_F], e->threads);
#pragma omp parallel num_threads(e->threads)
    {
        size_t mine = used + each * (size_t)omp_get_thread_num();
        work *u = work_cut(e->scratch, &mine, &z);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < z.B * z.Hkv * t.parts; i++)
            task(e, &z, &t, u, i / t.parts / z.Hkv, i / t.parts % z.Hkv, t.parts - 1 - i % t.parts);
    }
    const int64_t size = z.N * z.Hkv * z.D;
    fg_real *gk = e->out[1], *gv = e->out[2];
#pragma omp parallel for schedule(static) num_threads(e->threads)
    for (int64_t i = 0; i < z.B * z.N; i++) {
        const int64_t row = z.Hkv * z.D;
        for (int64_t part = 1; part < t.parts; part++) {
            add_rows(t.gk + (part - 1) * z.B * size + i * row, 0, 1, row, row, gk + i * row, row);
            add_rows(t.gv + (part - 1) * z.B * size + i * row, 0, 1, row, row, gv + i * row, row);
        }
    }
#pragma omp parallel for schedule(static) num_threads(e->threads)
    for (int64_t i = 0; i < z.B * z.H; i++) gate_gradient(e, &z, &t, i / z.H, i % z.H);
}

static size_t scratch(const fg_infer *c, int threads)
{
    const fg__sizes z = fg__attention_sizes(&c->in[Q], &c->in[K], 0, 1, 0);
    size_t used = 0;
    totals_cut(NULL, &used, &z);
    for (int i = 0; i < threads; i++) work_cut(NULL, &used, &z);
    return used;
}

/* Five products of D multiply-adds for each pair that may meet. */
static fg_cost cost(const fg_infer *c)
{
    const struct fg_attr_forget_attention_grad *a = c->attr;
    const fg_shape *q = &c->in[Q];
    const double pairs = fg__pairs(q->dim[1], q->dim[1], a->window, false);
    const double rows = (double)(q->dim[0] * q->dim[2]);
    double elements = 0;
    for (int i = 0; i < c->n_in; i++)
        elements += c->given[i] ? (double)fg_shape_count(c->in[i]) : 0;
    for (int i = 0; i < c->n_out; i++) elements += (double)fg_shape_count(c->out[i]);
    return (fg_cost){ .flops = 10 * rows * pairs * (double)q->dim[3],
                      .bytes = elements * (double)sizeof(float) };
}

const fg_op_code fg_code_forget_attention_grad = {
    .infer = infer, .cpu = cpu, .cost = cost, .scratch = scratch,
    .bf16 = { .narrow_in = 1u << GO | 1u << Q | 1u << K | 1u << V | 1u << O,
              .wide_in = 1u << GLSE | 1u << LOG_F | 1u << LSE, .narrow_out = 7, .wide_out = 8 },
};
