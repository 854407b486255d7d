/* product.h - products of small matrices that lie in cache, for kernels that work in tiles.
 *
 * Rows are as wide as whole vectors, filled up with 0; the sum over k runs in order, so the bits of
 * a result depend on its own row and column alone, not on how large the tile is. */
#ifndef FG_PRODUCT_H
#define FG_PRODUCT_H
#include "vec.h"

#define FG_TILE_ROWS 6                   /* rows of a register block, 2 vectors wide */

static inline int64_t fg__least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t fg__most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t fg__round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* Cuts count * size bytes off scratch; with base NULL only counts. */
static inline void *fg__cut(char *base, size_t *used, int64_t count, size_t size)
{
    void *p = base ? base + *used : NULL;
    *used += (size_t)fg__round_up((int64_t)((size_t)count * size), 64);
    return p;
}

/* c[r][n] = sum_k a[r,k] b[k][n], r in [r0,r1), n in [n0,n1), k in [k0,k1);
 * a[r,k] = a[r * a_row + k * a_col]; n0 and n1 are multiples of FG_LANES.  c starts at 0, at
 * start[r], or at what it holds (add).
 * The other half of a tile on the diagonal is skipped, to the width of a register block:
 *   FG_K_UP_TO_R     only k <= r counts           FG_K_FROM_R   only k >= r counts
 *   FG_R_UP_TO_N     only r <= n is needed, or read by the products above */
enum { FG_WHOLE, FG_K_UP_TO_R, FG_K_FROM_R, FG_R_UP_TO_N };
typedef struct {
    int64_t r0, r1, n0, n1, k0, k1;
    int part;
    const fg_real *a; int64_t a_row, a_col;
    const fg_real *b; int64_t b_row;
    fg_real *c;       int64_t c_row;
    const fg_real *start;
    bool add;
} fg__product;

__attribute__((always_inline))
static inline void fg__product_block(const fg__product *p, int rows, int vecs, int64_t r0,
                                     int64_t n0, int64_t k0, int64_t k1)
{
    const int64_t a_row = p->a_row, a_col = p->a_col, b_row = p->b_row;
    const fg_real *a = p->a + r0 * a_row + k0 * a_col, *b = p->b + k0 * b_row + n0;
    fg_real *c = p->c + r0 * p->c_row + n0;
    fg_vec sum[FG_TILE_ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vecs; v++)
            sum[r][v] = p->add ? fg_vload(c + r * p->c_row + v * FG_LANES)
                               : fg_vset(p->start ? p->start[r0 + r] : 0);
    for (int64_t k = k0; k < k1; k++, a += a_col, b += b_row) {
        fg_vec bv[2];
#pragma GCC unroll 2
        for (int v = 0; v < vecs; v++) bv[v] = fg_vload(b + v * FG_LANES);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            const fg_vec x = fg_vset(a[r * a_row]);
#pragma GCC unroll 2
            for (int v = 0; v < vecs; v++) sum[r][v] = fg_vfma(x, bv[v], sum[r][v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vecs; v++) fg_vstore(c + r * p->c_row + v * FG_LANES, sum[r][v]);
}

static inline void fg__multiply(const fg__product *p)
{
    const int64_t wide = 2 * FG_LANES;
    for (int64_t n = p->n0; n < p->n1; n += wide) {
        const bool two = n + wide <= p->n1;
        const int64_t r1 =
            p->part == FG_R_UP_TO_N ? fg__least(p->r1, n + wide + FG_TILE_ROWS - 1) : p->r1;
        for (int64_t r = p->r0; r < r1; r += FG_TILE_ROWS) {
            const int64_t k0 = p->part == FG_K_FROM_R ? fg__most(p->k0, r) : p->k0;
            const int64_t k1 = p->part == FG_K_UP_TO_R ? fg__least(p->k1, r + FG_TILE_ROWS) : p->k1;
            switch ((two ? 8 : 0) + fg__least(r1 - r, FG_TILE_ROWS)) {
            case 14: fg__product_block(p, 6, 2, r, n, k0, k1); break;
            case 13: fg__product_block(p, 5, 2, r, n, k0, k1); break;
            case 12: fg__product_block(p, 4, 2, r, n, k0, k1); break;
            case 11: fg__product_block(p, 3, 2, r, n, k0, k1); break;
            case 10: fg__product_block(p, 2, 2, r, n, k0, k1); break;
            case 9:  fg__product_block(p, 1, 2, r, n, k0, k1); break;
            case 6:  fg__product_block(p, 6, 1, r, n, k0, k1); break;
            case 5:  fg__product_block(p, 5, 1, r, n, k0, k1); break;
            case 4:  fg__product_block(p, 4, 1, r, n, k0, k1); break;
            case 3:  fg__product_block(p, 3, 1, r, n, k0, k1); break;
            case 2:  fg__product_block(p, 2, 1, r, n, k0, k1); break;
            default: fg__product_block(p, 1, 1, r, n, k0, k1); break;
            }
        }
    }
}
#endif
