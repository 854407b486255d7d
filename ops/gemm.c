/* gemm.c - matrix products, row-major: c = alpha op(a) op(b) + beta c.
 *
 * Three ways, chosen by shape alone:
 *   dots   rows of a against rows of b, where either are few: decoding, gates.  Every element of
 *          the long operand is read once, so time is its bytes over memory bandwidth.
 *   loops  register tiles of 4 rows x 3 vectors over packed columns of b: small products, and the
 *          double build whole.
 *   sgemm  oneDNN, for the rest of the float build.
 *
 * c is cut into tiles by its shape, tiles go to threads as they come free, and the whole sum over k
 * belongs to one tile: any number of threads gives the same bits. */
#include "gemm.h"
#include "vec.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifndef FG_DOUBLE
#include <oneapi/dnnl/dnnl.h>
#endif

enum {                            /* measured on Zen 1 (AVX2), 2 cores, oneDNN 2.6 */
    TILE_M = 128, TILE_N = 256,   /* c's tile, halved while there are fewer than TILES ...        */
    TILES = 12, LEAST = 64 * 128, /* ... and it has more elements than this                       */
    SKINNY = 8, NARROW = 15,      /* rows of a, of b, up to which dots beat sgemm                 */
    SMALL = 1 << 14,              /* m n k up to which loops beat a call of oneDNN (0.6 us)       */
    ALONE = 1 << 18,              /* m n k below which waking threads costs more than it saves    */
    CACHED = 1 << 16,             /* elements of b that stay in the second cache                  */
    ROWS = 4, VECTORS = 3,        /* register tile: 12 sums, 3 of b, 1 of a fill 16 registers     */
    DEPTH = 256, PANEL = 6        /* rows and vectors of b packed at once: 48 KiB                 */
};
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    bool ta, tb;
    int64_t m, n, k, lda, ldb, ldc;
    fg_real alpha, beta;
    const fg_real *a, *b, *bias;      /* bias: NULL, or one number for each column of c */
    fg_real *c;
} product;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* c = alpha s + beta c + bias; c is not read if beta is 0. */
INLINE fg_real blend(fg_real s, const product *p, fg_real c, int64_t column)
{
    fg_real y = p->alpha * s;
    if (p->beta != 0) y += p->beta * c;
    return p->bias ? y + p->bias[column] : y;
}

/* ---- dots ----------------------------------------------------------------------------------- */

/* The sums of the lanes of four vectors. */
INLINE void four_sums(const fg_vec v[4], fg_real s[4])
{
#if defined(__AVX__) && !defined(__AVX512F__) && !defined(FG_DOUBLE)
    const __m256 low = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]);
    const __m256 high = _mm256_hadd_ps((__m256)v[2], (__m256)v[3]);
    const __m256 both = _mm256_hadd_ps(low, high);
    _mm_storeu_ps(s, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
#else
    for (int j = 0; j < 4; j++) s[j] = fg_vsum(v[j]);
#endif
}

/* s[i][j] = x_i . w_j, both with rows of k contiguous elements. */
INLINE void dot_block(const int nx, const int nw, int64_t k, const fg_real *x, int64_t ldx,
                      const fg_real *w, int64_t ldw, fg_real s[2][4])
{
    fg_vec sum[2][4] = { { { 0 } } };
    int64_t at = 0;
    for (; at + FG_LANES <= k; at += FG_LANES) {
        fg_vec wv[4];
        for (int j = 0; j < nw; j++) wv[j] = fg_vload(w + j * ldw + at);
        for (int i = 0; i < nx; i++) {
            const fg_vec xv = fg_vload(x + i * ldx + at);
            for (int j = 0; j < nw; j++) sum[i][j] = fg_vfma(xv, wv[j], sum[i][j]);
        }
    }
    if (at < k)
        for (int i = 0; i < nx; i++) {
            const fg_vec xv = fg_vload_n(x + i * ldx + at, k - at);
            for (int j = 0; j < nw; j++)
                sum[i][j] = fg_vfma(xv, fg_vload_n(w + j * ldw + at, k - at), sum[i][j]);
        }
    for (int i = 0; i < nx; i++) four_sums(sum[i], s[i]);
}

/* Few rows x against rows [from, to) of the long operand w; c's element of x's row i and w's row j
 * lies at i * cx + j * cw.  by_x: the column of c is i, not j. */
static void dot_rows(const product *p, bool by_x, int64_t from, int64_t to)
{
    const fg_real *x = by_x ? p->b : p->a, *w = by_x ? p->a : p->b;
    const int64_t ldx = by_x ? p->ldb : p->lda, ldw = by_x ? p->lda : p->ldb;
    const int64_t cx = by_x ? 1 : p->ldc, cw = by_x ? p->ldc : 1;
    const int64_t nx = by_x ? p->n : p->m, k = p->k;
    for (int64_t j = from; j < to; j += 4) {
        const int nw = (int)least(4, to - j);
        for (int64_t i = 0; i < nx; i += 2) {
            const int rows = (int)least(2, nx - i);
            const fg_real *xi = x + i * ldx, *wj = w + j * ldw;
            fg_real s[2][4];
            if (nw == 4 && rows == 2) dot_block(2, 4, k, xi, ldx, wj, ldw, s);
            else if (nw == 4) dot_block(1, 4, k, xi, ldx, wj, ldw, s);
            else
                for (int b = 0; b < nw; b++)
                    for (int a = 0; a < rows; a++) {
                        fg_real one[2][4];
                        dot_block(1, 1, k, xi + a * ldx, ldx, wj + b * ldw, ldw, one);
                        s[a][b] = one[0][0];
                    }
            for (int a = 0; a < rows; a++)
                for (int b = 0; b < nw; b++) {
                    fg_real *c = p->c + (i + a) * cx + (j + b) * cw;
                    *c = blend(s[a][b], p, *c, by_x ? i + a : j + b);
                }
        }
    }
}

/* ---- loops ---------------------------------------------------------------------------------- */

/* c's tile of nr rows and nv vectors of columns (`last` lanes of the last one) gets
 * alpha sum over k of a_(i,k) b_(k,j) in one sweep of k.  b's rows are whole vectors. */
INLINE void register_tile(const product *p, const int nr, const int nv, int64_t last, int64_t k,
                          const fg_real *a, const fg_real *b, int64_t ldb, fg_real *c,
                          const fg_real *bias)
{
    fg_vec sum[ROWS][VECTORS] = { { { 0 } } }, kept[ROWS][VECTORS];
    const int64_t row = p->ta ? 1 : p->lda, step = p->ta ? p->lda : 1;
    for (int64_t at = 0; at < k; at++) {
        fg_vec bv[VECTORS];
        for (int v = 0; v < nv; v++) bv[v] = fg_vload(b + at * ldb + v * FG_LANES);
        for (int r = 0; r < nr; r++) {
            const fg_vec av = fg_vset(a[r * row + at * step]);
            for (int v = 0; v < nv; v++) sum[r][v] = fg_vfma(av, bv[v], sum[r][v]);
        }
    }
    for (int r = 0; r < nr; r++)             /* so that the sums stay in registers until here */
        for (int v = 0; v < nv; v++) kept[r][v] = p->alpha * sum[r][v];
    for (int r = 0; r < nr; r++)
        for (int v = 0; v < nv; v++) {
            fg_real *to = c + r * p->ldc + v * FG_LANES;
            const int64_t at = v * FG_LANES, lanes = v < nv - 1 ? FG_LANES : last;
            fg_vec y = kept[r][v];
            if (p->beta != 0)
                y += p->beta * (lanes == FG_LANES ? fg_vload(to) : fg_vload_n(to, lanes));
            if (bias) y += lanes == FG_LANES ? fg_vload(bias + at) : fg_vload_n(bias + at, lanes);
            if (lanes == FG_LANES) fg_vstore(to, y);
            else fg_vstore_n(to, y, lanes);
        }
}

INLINE void tile_columns(const product *p, const int nv, int64_t last, int64_t k, const fg_real *a,
                         const fg_real *b, int64_t ldb, fg_real *c, const fg_real *bias)
{
    const int64_t row = p->ta ? 1 : p->lda;
    int64_t i = 0;
    for (; i + ROWS <= p->m; i += ROWS)
        register_tile(p, ROWS, nv, last, k, a + i * row, b, ldb, c + i * p->ldc, bias);
    for (; i < p->m; i++)
        register_tile(p, 1, nv, last, k, a + i * row, b, ldb, c + i * p->ldc, bias);
}

static void tile_panel(const product *p, int64_t columns, int64_t k, const fg_real *a,
                       const fg_real *b, int64_t ldb, fg_real *c, const fg_real *bias)
{
    for (int64_t j = 0; j < columns; j += VECTORS * FG_LANES) {
        const int64_t here = least(VECTORS * FG_LANES, columns - j), nv = over(here, FG_LANES);
        const int64_t last = here - (nv - 1) * FG_LANES;
        const fg_real *g = bias ? bias + j : NULL;
        if (nv == 3) tile_columns(p, 3, last, k, a, b + j, ldb, c + j, g);
        else if (nv == 2) tile_columns(p, 2, last, k, a, b + j, ldb, c + j, g);
        else tile_columns(p, 1, last, k, a, b + j, ldb, c + j, g);
    }
}

/* panel[t][j] = op(b)[from + t][j], columns padded with zeros to whole vectors. */
static void pack(const product *p, int64_t from, int64_t depth, int64_t column, int64_t columns,
                 int64_t pitch, fg_real *panel)
{
    for (int64_t t = 0; t < depth; t++) {
        fg_real *row = panel + t * pitch;
        if (!p->tb) memcpy(row, p->b + (from + t) * p->ldb + column, (size_t)columns * sizeof *row);
        for (int64_t j = columns; j < pitch; j++) row[j] = 0;
    }
    if (p->tb)
        for (int64_t j = 0; j < columns; j++) {
            const fg_real *w = p->b + (column + j) * p->ldb + from;
            for (int64_t t = 0; t < depth; t++) panel[t * pitch + j] = w[t];
        }
}

/* Few rows of c, whole vectors of columns and a b that fits the cache: b is used where it lies,
 * since packing would cost as much as the product. */
static bool direct(const product *p)
{
    return !p->tb && p->m <= SKINNY && p->n % FG_LANES == 0 && p->n * p->k <= CACHED;
}

static void loops(const product *p)
{
    fg_real panel[DEPTH * PANEL * FG_VEC_BYTES / sizeof(fg_real)] __attribute__((aligned(64)));
    const bool in_place = direct(p);
    const int64_t most = in_place ? DEPTH / 4 : DEPTH;   /* in place, a row of b is a page away */
    for (int64_t from = 0; from < p->k; from += most)
        for (int64_t j = 0; j < p->n; j += PANEL * FG_LANES) {
            const int64_t columns = least(PANEL * FG_LANES, p->n - j);
            const int64_t depth = least(most, p->k - from);
            const int64_t pitch = in_place ? p->ldb : over(columns, FG_LANES) * FG_LANES;
            const fg_real *a = p->a + (p->ta ? from * p->lda : from);
            const fg_real *b = in_place ? p->b + from * p->ldb + j : panel;
            const fg_real *bias = p->bias && from == 0 ? p->bias + j : NULL;
            product part = *p;
            if (from > 0) part.beta = 1;
            if (!in_place) pack(p, from, depth, j, columns, pitch, panel);
            tile_panel(&part, columns, depth, a, b, pitch, p->c + j, bias);
        }
}

/* ---- one tile ------------------------------------------------------------------------------- */

#ifndef FG_DOUBLE
/* oneDNN asks OpenMP how many threads to use: one, whether or not this is a parallel region. */
static bool sgemm(const product *p)
{
#ifdef _OPENMP
    const int threads = omp_get_max_threads();
    if (threads != 1) omp_set_num_threads(1);
#endif
    const dnnl_status_t status =
        dnnl_sgemm(p->ta ? 'T' : 'N', p->tb ? 'T' : 'N', p->m, p->n, p->k, p->alpha, p->a, p->lda,
                   p->b, p->ldb, p->beta, p->c, p->ldc);
#ifdef _OPENMP
    if (threads != 1) omp_set_num_threads(threads);
#endif
    if (status != dnnl_success) return false;
    if (p->bias)
        for (int64_t i = 0; i < p->m; i++)
            for (int64_t j = 0; j < p->n; j++) p->c[i * p->ldc + j] += p->bias[j];
    return true;
}
#endif

/* oneDNN refuses only when it is out of memory, and then before it writes. */
static void tile(const product *p)
{
#ifndef FG_DOUBLE
    if (!direct(p) && sgemm(p)) return;
#endif
    loops(p);
}

/* k = 0 or alpha = 0: no products at all. */
static void no_sum(const product *p)
{
    for (int64_t i = 0; i < p->m; i++)
        for (int64_t j = 0; j < p->n; j++) {
            fg_real *c = p->c + i * p->ldc + j;
            *c = blend(0, p, *c, j);
        }
}

/* ---- the whole ------------------------------------------------------------------------------ */

/* The i-th task of a product that dots() cuts into chunks of the long operand. */
static void dot_chunk(const product *p, int64_t chunk, int64_t i)
{
    const bool by_x = p->m > SKINNY;
    dot_rows(p, by_x, i * chunk, least(by_x ? p->m : p->n, (i + 1) * chunk));
}

static void dots(const product *p, int threads)
{
    const int64_t rows = p->m > SKINNY ? p->m : p->n;
    const int64_t chunk = over(over(1 << 14, p->k), 4) * 4;  /* about 64 KiB of the long operand */
    const int64_t chunks = over(rows, chunk);
    if (threads == 1 || chunks == 1) {                   /* a region of one thread costs 0.5-2 us */
        for (int64_t i = 0; i < chunks; i++) dot_chunk(p, chunk, i);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < chunks; i++) dot_chunk(p, chunk, i);
}

/* The t-th tile of tm x tn.  The longer operand is walked once, in the outer order. */
static void tile_at(const product *p, int64_t tm, int64_t tn, int64_t t)
{
    const int64_t down = over(p->m, tm), across = over(p->n, tn);
    const bool wide = p->n > p->m;
    const int64_t i = (wide ? t % down : t / across) * tm, j = (wide ? t / down : t % across) * tn;
    product part = *p;
    part.m = least(tm, p->m - i);
    part.n = least(tn, p->n - j);
    part.a += p->ta ? i : i * p->lda;
    part.b += p->tb ? j * p->ldb : j;
    part.c += i * p->ldc + j;
    if (p->bias) part.bias += j;
    tile(&part);
}

static void tiles(const product *p, int threads)
{
    int64_t tm = least(TILE_M, p->m), tn = least(TILE_N, p->n);
    while (over(p->m, tm) * over(p->n, tn) < TILES && tm * tn > LEAST) {
        if (tn >= tm) tn = over(tn, 2);
        else tm = over(tm, 2);
    }
    tm = over(tm, 4) * 4;
    tn = over(tn, 16) * 16;
    const int64_t count = over(p->m, tm) * over(p->n, tn);
    if (threads == 1 || count == 1) {
        for (int64_t t = 0; t < count; t++) tile_at(p, tm, tn, t);
        return;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t t = 0; t < count; t++) tile_at(p, tm, tn, t);
}

static void multiply(const product *p, int threads)
{
    if (p->m <= 0 || p->n <= 0) return;
    const double work = (double)p->m * (double)p->n * (double)p->k;
    if (work < ALONE) threads = 1;
    if (p->k <= 0 || p->alpha == 0) no_sum(p);
    else if (work <= SMALL) loops(p);
    else if (!p->ta && p->tb && (p->m <= SKINNY || p->n <= NARROW)) dots(p, threads);
    else tiles(p, threads);
}

void fg__gemm_bias(bool ta, bool tb, int64_t m, int64_t n, int64_t k, fg_real alpha,
                   const fg_real *a, int64_t lda, const fg_real *b, int64_t ldb,
                   fg_real beta, fg_real *c, int64_t ldc, const fg_real *bias, int threads)
{
    const product p = { .ta = ta, .tb = tb, .m = m, .n = n, .k = k, .lda = lda, .ldb = ldb,
                        .ldc = ldc, .alpha = alpha, .beta = beta, .a = a, .b = b, .bias = bias,
                        .c = c };
    multiply(&p, threads);
}

void fg__gemm(bool ta, bool tb, int64_t m, int64_t n, int64_t k, fg_real alpha,
              const fg_real *a, int64_t lda, const fg_real *b, int64_t ldb,
              fg_real beta, fg_real *c, int64_t ldc, int threads)
{
    fg__gemm_bias(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc, NULL, threads);
}

void fg__gemm_serial(bool ta, bool tb, int64_t m, int64_t n, int64_t k, fg_real alpha,
                     const fg_real *a, int64_t lda, const fg_real *b, int64_t ldb,
                     fg_real beta, fg_real *c, int64_t ldc)
{
    fg__gemm_bias(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc, NULL, 1);
}
