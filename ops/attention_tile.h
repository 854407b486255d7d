/* attention_tile.h - what forget_attention.c and forget_attention_grad.c share: sizes, gates,
 * and masks.  Products of tiles are in product.h.
 *
 * Queries and keys fall in blocks of FG_TILE, aligned to absolute position 0, so that what a query
 * gets depends neither on T nor on how a sequence is cut in chunks.  A tile is one block of queries
 * against one block of keys, stored as s[key][query]: the lanes of a vector are queries, so maxima
 * and sums over keys never cross lanes, and a tile is ready for both products that follow.
 *
 * The bias b_ij = log_f_(j+1) + ... + log_f_i is never a difference of long sums (no cancellation):
 *   in one block    summed up key by key, backwards from the query           (fg__tile_mask)
 *   across blocks   head_i + between + tail_j: head_i from the start of i's block to i, tail_j from
 *                   j + 1 to the end of j's block, between over the blocks in the middle, in double
 * log_f is clamped to at least -100, where e^log_f is 0 for every purpose and sums stay finite. */
#ifndef FG_ATTENTION_TILE_H
#define FG_ATTENTION_TILE_H
#include "product.h"

#define FG_TILE      64
#define FG_LOG_F_MIN (-100)

#ifdef FG_DOUBLE
#define FG_EXP_MIN (-708)                /* e^x is normal from here on */
#else
#define FG_EXP_MIN (-50)
#endif

/* e^x for x <= 88, and 0 below FG_EXP_MIN.  A weight below e^-50 = 2e-22 does not count beside the
 * row's sum, which is 1 and known to 6e-8; kept, it would make products that are subnormal, and one
 * subnormal operand costs some processors over a hundred cycles (the gradient ran four times slower
 * on an Intel Xeon with gates that start at 1/2).  float: within 2 ulp; a polynomial of degree 6
 * for |r| <= ln(2)/2, interpolated at the Chebyshev points (1.1e-8), and 2^n made of bits. */
static inline fg_vec fg__weight(fg_vec x)
{
#ifdef FG_DOUBLE
    return fg_vselect((fg_vint)(x < fg_vset(FG_EXP_MIN)), fg_vset(0), fg_vexp(x));
#else
    const fg_vint gone = (fg_vint)(x < fg_vset(FG_EXP_MIN));
    x = fg_vmax(fg_vset(FG_EXP_MIN), x);                 /* this order keeps NaN */
    const fg_vec magic = fg_vset(12582912.0f);           /* 1.5 * 2^23 rounds to an integer */
    const fg_vec n = fg_vfma(x, fg_vset(1.44269504088896341f), magic) - magic;
    fg_vec r = fg_vfma(n, fg_vset(-0.693359375f), x);
    r = fg_vfma(n, fg_vset(2.12194440e-4f), r);
    fg_vec p = fg_vset(0.0013926213f);
    p = fg_vfma(p, r, fg_vset(0.0083632031f));
    p = fg_vfma(p, r, fg_vset(0.041666556f));
    p = fg_vfma(p, r, fg_vset(0.16666576f));
    p = fg_vfma(p, r, fg_vset(0.5f));
    p = fg_vfma(p, r * r, r) + 1;
    p = p * (fg_vec)((__builtin_convertvector(n, fg_vint) + 127) << 23);
    return fg_vselect(gone, fg_vset(0), p);
#endif
}

/* ---- sizes and scratch ---------------------------------------------------------------------- */

typedef struct {
    int64_t B, M, N, H, Hkv, D;          /* q: [B,M,H,D]   k, v: [B,N,Hkv,D] */
    int64_t Dp;                          /* D rounded up to whole vectors */
    int64_t past, keys;                  /* position of the first query; keys in use, at most N */
    int64_t blocks;                      /* of keys */
    int64_t window;                      /* INT64_MAX: none */
    double scale;
} fg__sizes;

static inline fg__sizes fg__attention_sizes(const fg_shape *q, const fg_shape *k, int64_t past,
                                            double scale, int64_t window)
{
    fg__sizes z = { q->dim[0], q->dim[1], k->dim[1], q->dim[2], k->dim[2], q->dim[3], 0, past, 0, 0,
                    window ? window : INT64_MAX, scale };
    z.Dp = fg__round_up(z.D, FG_LANES);
    z.keys = fg__least(past + z.M, z.N);
    z.blocks = (z.N + FG_TILE - 1) / FG_TILE;
    return z;
}

/* ---- gates ---------------------------------------------------------------------------------- */

typedef struct {
    fg_real *head, *tail;                /* [B,H,blocks*FG_TILE], as explained on top */
    fg_real *tail_max;                   /* [B,H,blocks] */
    double  *total;                      /* [B,H,blocks]: sum of log_f over a block */
    fg_real *k_norm;                     /* [B,Hkv,blocks]: greatest |k_j| of a block */
} fg__gates;

static inline fg__gates fg__gates_cut(char *base, size_t *used, const fg__sizes *z)
{
    const int64_t heads = z->B * z->H * z->blocks;
    fg__gates g;
    g.head = fg__cut(base, used, heads * FG_TILE, sizeof *g.head);
    g.tail = fg__cut(base, used, heads * FG_TILE, sizeof *g.tail);
    g.tail_max = fg__cut(base, used, heads, sizeof *g.tail_max);
    g.total = fg__cut(base, used, heads, sizeof *g.total);
    g.k_norm = fg__cut(base, used, z->B * z->Hkv * z->blocks, sizeof *g.k_norm);
    return g;
}

static inline fg_real fg__clamped(fg_real log_f)
{
    return log_f < FG_LOG_F_MIN ? FG_LOG_F_MIN : log_f;
}

static inline fg_real fg__dot(const fg_real *a, const fg_real *b, int64_t n)
{
    fg_vec sum = { 0 }, more = { 0 };
    int64_t i = 0;
    for (; i + 2 * FG_LANES <= n; i += 2 * FG_LANES) {
        sum = fg_vfma(fg_vload(a + i), fg_vload(b + i), sum);
        more = fg_vfma(fg_vload(a + i + FG_LANES), fg_vload(b + i + FG_LANES), more);
    }
    for (; i < n; i += FG_LANES) {
        const int64_t m = fg__least(FG_LANES, n - i);
        sum = m < FG_LANES ? fg_vfma(fg_vload_n(a + i, m), fg_vload_n(b + i, m), sum)
                           : fg_vfma(fg_vload(a + i), fg_vload(b + i), sum);
    }
    return fg_vsum(sum + more);
}
static inline double fg__square(const fg_real *x, int64_t n) { return (double)fg__dot(x, x, n); }

static void fg__gates_fill(fg__gates *g, const fg__sizes *z, const fg_real *k, const fg_real *log_f,
                           int threads)
{
    const int64_t used = (z->keys + FG_TILE - 1) / FG_TILE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < z->B * used; task++) {
        const int64_t b = task / used, block = task % used, j0 = block * FG_TILE;
        const int64_t n = fg__least(FG_TILE, z->keys - j0);
        for (int64_t h = 0; log_f && h < z->H; h++) {
            const int64_t row = (b * z->H + h) * z->blocks + block;
            fg_real *head = g->head + row * FG_TILE, *tail = g->tail + row * FG_TILE,
                    most = -INFINITY;
            const fg_real *f = log_f + (b * z->N + j0) * z->H + h;
            double sum = 0;
            for (int64_t j = 0; j < n; j++)
                head[j] = (fg_real)(sum += (double)fg__clamped(f[j * z->H]));
            g->total[row] = sum;
            sum = 0;
            for (int64_t j = n - 1; j >= 0; j--) {
                tail[j] = (fg_real)sum;
                most = tail[j] > most ? tail[j] : most;
                sum += (double)fg__clamped(f[j * z->H]);
            }
            for (int64_t j = n; j < FG_TILE; j++) head[j] = tail[j] = 0;
            g->tail_max[row] = most;
        }
        for (int64_t h = 0; h < z->Hkv; h++) {
            double most = 0;
            for (int64_t j = 0; j < n; j++) {
                const double s = fg__square(k + ((b * z->N + j0 + j) * z->Hkv + h) * z->D, z->D);
                most = s > most || s != s ? s : most;
            }
            g->k_norm[(b * z->Hkv + h) * z->blocks + block] = (fg_real)sqrt(most);
        }
    }
}

/* ---- one block of queries ------------------------------------------------------------------- */

typedef struct {
    int64_t b, h, block;
    int64_t i0, i1;                      /* the queries there are: lanes [i0,i1) */
    int64_t n0, n1;                      /* the same, rounded to register blocks */
    int64_t low[FG_TILE];                /* the first key that each sees; INT64_MAX: none */
    int64_t low_min, low_max;            /* over those that see any */
    bool any;
    double q_norm, head_max;             /* greatest |scale q_i|, head_i */
    fg_real head[FG_TILE];
    fg_real log_f[FG_TILE];              /* of this block's own positions, clamped */
} fg__queries;

static void fg__queries_fill(fg__queries *w, const fg__sizes *z, const fg__gates *g, int64_t b,
                             int64_t h, int64_t block, const fg_real *q, const fg_real *log_f,
                             const int32_t *first)
{
    const int64_t p0 = block * FG_TILE, wide = 2 * FG_LANES;
    w->b = b, w->h = h, w->block = block;
    w->i0 = fg__most(0, z->past - p0), w->i1 = fg__least(FG_TILE, z->past + z->M - p0);
    w->n0 = w->i0 / wide * wide, w->n1 = fg__round_up(w->i1, wide);
    w->low_min = INT64_MAX, w->low_max = 0, w->any = false;
    w->q_norm = 0, w->head_max = -INFINITY;
    for (int64_t i = 0; i < FG_TILE; i++) w->low[i] = INT64_MAX, w->head[i] = w->log_f[i] = 0;
    double norm = 0;
    for (int64_t i = w->i0; i < w->i1; i++) {
        const int64_t p = p0 + i, t = p - z->past;
        int64_t low = first ? fg__most(0, first[b * z->M + t]) : 0;
        if (low > p || p >= z->keys) continue;
        if (p - low >= z->window) low = p - z->window + 1;
        w->low[i] = low;
        w->low_min = fg__least(w->low_min, low), w->low_max = fg__most(w->low_max, low);
        const double s = fg__square(q + ((b * z->M + t) * z->H + h) * z->D, z->D);
        norm = s > norm || s != s ? s : norm;
        if (log_f && low < p0) {
            const fg_real head = g->head[((b * z->H + h) * z->blocks + block) * FG_TILE + i];
            w->head[i] = head;
            if ((double)head > w->head_max || head != head) w->head_max = (double)head;
        }
        w->any = true;
    }
    w->q_norm = sqrt(norm) * fabs(z->scale);
    if (log_f)
        for (int64_t i = 0; i < fg__least(FG_TILE, z->keys - p0); i++)
            w->log_f[i] = fg__clamped(log_f[(b * z->N + p0 + i) * z->H + h]);
}

/* What the bias of a tile to the left of the diagonal owes to the query alone: head_i + between; 0
 * for queries that see no key of it (their gates may belong to others, and be NaN). */
static inline void fg__tile_rows(const fg__queries *w, int64_t block, double between, bool gate,
                                 fg_real *r)
{
    const int64_t end = (block + 1) * FG_TILE;
    for (int64_t i = w->n0; i < w->n1; i++)
        r[i] = gate ? (fg_real)((double)w->head[i] + between) : 0;
    for (int64_t i = w->n0; i < w->n1 && w->low_max >= end; i++) if (w->low[i] >= end) r[i] = 0;
}

/* No score of the tile reaches floor + FG_EXP_MIN, so every weight in it is exactly 0: by
 * |q.k| <= |q| |k| and the greatest bias.  False where anything is NaN. */
static inline bool fg__faded(const fg__sizes *z, const fg__gates *g, const fg__queries *w,
                             int64_t block, double between, bool gate, double floor)
{
    const int64_t kv = w->h / (z->H / z->Hkv);
    double most =
        w->q_norm * (double)g->k_norm[(w->b * z->Hkv + kv) * z->blocks + block] * 1.001 + 0.001;
    const int64_t head = (w->b * z->H + w->h) * z->blocks + block;
    if (gate) most += w->head_max + between + (double)g->tail_max[head];
    return most < floor + FG_EXP_MIN - 1;
}

/* Adds the bias within a block (on the diagonal) and turns the scores that a query may not see into
 * -inf.  s: rows [j0,j1) of a tile whose keys begin at key0, lanes [w->n0,w->n1).  On the diagonal
 * lanes reach only FG_TILE_ROWS - 1 keys beyond themselves: no product reads further. */
static void fg__tile_mask(const fg__queries *w, fg_real *s, int64_t block, int64_t j0, int64_t j1,
                          bool gate)
{
    const bool diagonal = block == w->block;
    const int64_t key0 = block * FG_TILE, wide = 2 * FG_LANES;
    fg_real low[FG_TILE], lane[FG_TILE];
    for (int64_t i = 0; i < FG_TILE; i++) {
        low[i] =
            (fg_real)(w->low[i] > key0 + FG_TILE ? FG_TILE + 1 : fg__most(w->low[i] - key0, -1));
        lane[i] = (fg_real)(diagonal ? i : FG_TILE);
    }
    for (int64_t n = w->n0; n < w->n1; n += FG_LANES) {
        const fg_vec from = fg_vload(low + n), to = fg_vload(lane + n);
        const int64_t end =
            diagonal ? fg__least(j1, n / wide * wide + wide + FG_TILE_ROWS - 1) : j1;
        fg_vec bias = { 0 };
        for (int64_t j = end - 1; j >= j0; j--) {
            const fg_vec at = fg_vset((fg_real)j);
            fg_vec x = fg_vload(s + j * FG_TILE + n);
            if (diagonal && gate) {
                const fg_vec next = fg_vset(j + 1 < FG_TILE ? w->log_f[j + 1] : 0);
                bias = bias + fg_vselect((fg_vint)(to > at), next, fg_vset(0));
                x = x + bias;
            }
            x = fg_vselect((fg_vint)(at >= from) & (fg_vint)(at <= to), x, fg_vset(-INFINITY));
            fg_vstore(s + j * FG_TILE + n, x);
        }
    }
}

/* Rows [r0,r1) of x, each `row` elements apart, to rows of width Dp filled up with 0. */
static inline void fg__copy_rows(const fg_real *x, int64_t row, int64_t r0, int64_t r1, int64_t D,
                                 int64_t Dp, fg_real *to)
{
    for (int64_t r = r0; r < r1; r++) {
        const fg_real *from = x + r * row;
        fg_real *at = to + r * Dp;
        int64_t d = 0;
        for (; d + FG_LANES <= D; d += FG_LANES) fg_vstore(at + d, fg_vload(from + d));
        if (d < D) fg_vstore(at + d, fg_vload_n(from + d, D - d));
    }
}
/* to = scale * x, n elements, x padded to whole vectors */
static inline void fg__put_row(const fg_real *x, fg_real scale, int64_t n, fg_real *to)
{
    int64_t d = 0;
    for (; d + FG_LANES <= n; d += FG_LANES) fg_vstore(to + d, fg_vload(x + d) * fg_vset(scale));
    if (d < n) fg_vstore_n(to + d, fg_vload(x + d) * fg_vset(scale), n - d);
}
/* to[d][i] = scale * x_i[d] for i in [i0,i1), 0 for the other lanes of [n0,n1). */
static inline void fg__copy_transposed(const fg_real *x, int64_t row, const fg__queries *w,
                                       int64_t D, fg_real scale, fg_real *to)
{
    for (int64_t d = 0; d < D; d++) {
        for (int64_t i = w->n0; i < w->i0; i++) to[d * FG_TILE + i] = 0;
        for (int64_t i = w->i1; i < w->n1; i++) to[d * FG_TILE + i] = 0;
    }
    for (int64_t i = w->i0; i < w->i1; i++)
        for (int64_t d = 0; d < D; d++) to[d * FG_TILE + i] = scale * x[i * row + d];
}

/* Pairs (query, key) that the causal rule and the window let meet; with a cache all it can hold. */
static inline double fg__pairs(int64_t M, int64_t N, int64_t window, bool cache)
{
    const double m = (double)M, w = (double)(window && window < N ? window : N);
    return cache ? m * w : w * (w + 1) / 2 + (m - w) * w;
}
#endif
