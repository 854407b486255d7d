/* chunks.h - gated linear attention and the delta rule in chunks of 64 rows, forward and backward,
 * in double; or with what enters a product rounded to bf16 before it, as models in bf16 are defined
 * to round: decayed queries and keys, scores, the inverse, W, new values, and the states and their
 * gradients at the borders of chunks.  Sums are exact: f32 would add nothing to see.
 *
 * One head and one document at a time, its chunks those of the sequence: n rows of D numbers, S
 * before it and behind it, R the gradient of S behind it and before it.  With b the sum of g from
 * the chunk's start:
 *     GLA     A_ts = sum_d q_td k_sd e^(b_td - b_sd),   o_t = scale (S^T (q_t e^(b_t)) + sum A v)
 *             S' = diag(e^(b_end)) S + sum_s (k_s e^(b_end - b_s)) v_s^T
 *     delta   M = stril(diag(beta) K K^T),  T = (I + M)^-1,  U = T diag(beta) V,
 *             W = T diag(beta) K,  N = U - W S,  o = scale (Q S + tril(Q K^T) N),  S' = S + K^T N
 * A in blocks of 16 x 16: left of the diagonal both factors are relative to the first row of the
 * block's queries, on it they are taken pair by pair.
 * Source: Yang et al. 2024, arXiv 2312.06635, section 4, and arXiv 2406.06484, section 3. */
#ifndef FG_TEST_CHUNKS_H
#define FG_TEST_CHUNKS_H
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "internal.h"

enum { ROWS = 64, BLOCK = 16 };

typedef struct {
    bool rounded, delta;
    int64_t n, D, skew;                      /* skew: rows of the first chunk that lie before */
    double scale;
    const double *q, *k, *v, *gate, *go;     /* gate: g, as q; of the delta rule beta, one a row */
    double *o, *gq, *gk, *gv, *ggate;
    double *S, *R;                           /* [D,D] */
} run_of_rows;

static double narrow(const run_of_rows *w, double x) { return w->rounded ? fg__as_bf16(x) : x; }

static double *zeros(int64_t n) { return calloc((size_t)n + 1, sizeof(double)); }

/* y [n,m] += factor a b, a [n,k] or turned [k,n], b [k,m] or turned [m,k]; rows of y lie `row`
 * apart, those of a matrix with ROWS columns too. */
typedef struct { const double *x; int64_t row; bool turned; } factor_of;
static void multiply(const run_of_rows *w, factor_of a, factor_of b, int64_t n, int64_t k,
                     int64_t m, double factor, double *y, int64_t row)
{
    double *right = zeros(k * m);
    for (int64_t l = 0; l < k; l++)
        for (int64_t j = 0; j < m; j++)
            right[l * m + j] = narrow(w, b.turned ? b.x[j * b.row + l] : b.x[l * b.row + j]);
    for (int64_t i = 0; i < n; i++)
        for (int64_t l = 0; l < k; l++) {
            const double x = factor * narrow(w, a.turned ? a.x[l * a.row + i] : a.x[i * a.row + l]);
            for (int64_t j = 0; j < m && x != 0; j++) y[i * row + j] += x * right[l * m + j];
        }
    free(right);
}
static factor_of as_is(const double *x, int64_t row) { return (factor_of){ x, row, false }; }
static factor_of turned(const double *x, int64_t row) { return (factor_of){ x, row, true }; }

/* 0 above the diagonal; strict: and on it. */
static void lower(double *A, int64_t n, bool strict)
{
    for (int64_t t = 0; t < n; t++)
        for (int64_t s = t + !strict; s < n; s++) A[t * ROWS + s] = 0;
}

/* ---- gated linear attention ------------------------------------------------------------------ */

/* to_t = x_t e^(sign (b_t - from)); from NULL: 0 */
static void decay(const double *x, const double *b, const double *from, double sign, int64_t n,
                  int64_t D, double *to)
{
    for (int64_t i = 0; i < n * D; i++)
        to[i] = x[i] * exp(sign * (b[i] - (from ? from[i % D] : 0)));
}

/* A of n rows; with dA: instead, its gradients by q and k, added to gq and gk. */
static void scores(const run_of_rows *w, int64_t n, const double *q, const double *k,
                   const double *b, double *A, const double *dA, double *gq, double *gk)
{
    const int64_t D = w->D;
    double *qs = zeros(BLOCK * D), *ks = zeros(ROWS * D), *gqs = zeros(BLOCK * D);
    double *gks = zeros(ROWS * D);
    for (int64_t i = 0; i < n; i += BLOCK) {
        const int64_t m = n - i < BLOCK ? n - i : BLOCK;
        const double *from = b + i * D, *dAi = dA ? dA + i * ROWS : NULL;
        decay(q + i * D, from, from, 1, m, D, qs);
        decay(k, b, from, -1, i, D, ks);
        if (!dA) multiply(w, as_is(qs, D), turned(ks, D), m, D, i, 1, A + i * ROWS, ROWS);
        memset(gqs, 0, (size_t)(BLOCK * D) * sizeof *gqs);
        memset(gks, 0, (size_t)(ROWS * D) * sizeof *gks);
        if (dA) multiply(w, as_is(dAi, ROWS), as_is(ks, D), m, i, D, 1, gqs, D);
        if (dA) multiply(w, turned(dAi, ROWS), as_is(qs, D), i, m, D, 1, gks, D);
        for (int64_t e = 0; e < m * D && dA; e++)
            gq[i * D + e] += gqs[e] * exp(from[e] - from[e % D]);
        for (int64_t e = 0; e < i * D && dA; e++) gk[e] += gks[e] * exp(from[e % D] - b[e]);
        for (int64_t t = i; t < i + m; t++)
            for (int64_t s = i; s <= t; s++)
                for (int64_t d = 0; d < D; d++) {
                    const double x = exp(b[t * D + d] - b[s * D + d]);
                    if (!dA) A[t * ROWS + s] += q[t * D + d] * k[s * D + d] * x;
                    else gq[t * D + d] += narrow(w, dA[t * ROWS + s]) * k[s * D + d] * x;
                    if (dA) gk[s * D + d] += narrow(w, dA[t * ROWS + s]) * q[t * D + d] * x;
                }
    }
    free(qs), free(ks), free(gqs), free(gks);
}

/* b; g is taken as -110 at least, where e^g is 0 in f32. */
static void sum_gates(const double *g, int64_t n, int64_t D, double *b)
{
    for (int64_t i = 0; i < n * D; i++) b[i] = fmax(g[i], -110) + (i < D ? 0 : b[i - D]);
}

static void gla_chunk(const run_of_rows *w, int64_t at, int64_t n, double *S)
{
    const int64_t D = w->D, x = at * D;
    double *A = zeros(ROWS * ROWS), *b = zeros(n * D), *qs = zeros(n * D), *ks = zeros(n * D);
    const double *end = b + (n - 1) * D;
    sum_gates(w->gate + x, n, D, b);
    decay(w->q + x, b, NULL, 1, n, D, qs);
    decay(w->k + x, b, end, -1, n, D, ks);
    scores(w, n, w->q + x, w->k + x, b, A, NULL, NULL, NULL);
    multiply(w, as_is(qs, D), as_is(S, D), n, D, D, w->scale, w->o + x, D);
    multiply(w, as_is(A, ROWS), as_is(w->v + x, D), n, n, D, w->scale, w->o + x, D);
    for (int64_t i = 0; i < D * D; i++) S[i] *= exp(end[i / D]);
    multiply(w, turned(ks, D), as_is(w->v + x, D), D, n, D, 1, S, D);
    free(A), free(b), free(qs), free(ks);
}

/* S: before the chunk. */
static void gla_chunk_back(const run_of_rows *w, int64_t at, int64_t n, const double *S, double *R)
{
    const int64_t D = w->D, x = at * D, last = n - 1;
    const double *q = w->q + x, *k = w->k + x, *v = w->v + x, *go = w->go + x;
    double *gq = w->gq + x, *gk = w->gk + x, *gv = w->gv + x, *gg = w->ggate + x;
    double *A = zeros(ROWS * ROWS), *dA = zeros(ROWS * ROWS), *b = zeros(n * D);
    double *qs = zeros(n * D), *ks = zeros(n * D);
    sum_gates(w->gate + x, n, D, b);
    const double *end = b + last * D;
    decay(q, b, NULL, 1, n, D, qs);
    decay(k, b, end, -1, n, D, ks);
    scores(w, n, q, k, b, A, NULL, NULL, NULL);
    multiply(w, as_is(go, D), turned(v, D), n, D, n, w->scale, dA, ROWS);
    lower(dA, n, false);
    multiply(w, turned(A, ROWS), as_is(go, D), n, n, D, w->scale, gv, D);
    multiply(w, as_is(ks, D), as_is(R, D), n, D, D, 1, gv, D);
    multiply(w, as_is(go, D), turned(S, D), n, D, D, w->scale, gq, D);
    multiply(w, as_is(v, D), turned(R, D), n, D, D, 1, gk, D);
    for (int64_t i = 0; i < n * D; i++) {
        gq[i] *= exp(b[i]), gk[i] *= exp(end[i % D] - b[i]);
        gg[last * D + i % D] += k[i] * gk[i];
    }
    for (int64_t i = 0; i < D * D; i++) gg[last * D + i / D] += exp(end[i / D]) * R[i] * S[i];
    scores(w, n, q, k, b, NULL, dA, gq, gk);
    for (int64_t t = last; t >= 0; t--)
        for (int64_t i = t * D; i < (t + 1) * D; i++)
            gg[i] += q[i] * gq[i] - k[i] * gk[i] + (t < last ? gg[i + D] : 0);
    for (int64_t i = 0; i < D * D; i++) R[i] *= exp(end[i / D]);
    multiply(w, turned(qs, D), as_is(go, D), D, n, D, w->scale, R, D);
    free(A), free(dA), free(b), free(qs), free(ks);
}

/* ---- the delta rule -------------------------------------------------------------------------- */

typedef struct {
    double *T, *A;                           /* [.,ROWS] */
    double *bk, *bv, *W, *N;                 /* [.,D]; bk = diag(beta) K */
} delta_parts;

static delta_parts delta_prepare(const run_of_rows *w, int64_t at, int64_t n, const double *S)
{
    const int64_t D = w->D, x = at * D;
    delta_parts p = { zeros(ROWS * ROWS), zeros(ROWS * ROWS), zeros(n * D), zeros(n * D),
                      zeros(n * D), zeros(n * D) };
    double *M = zeros(ROWS * ROWS);
    for (int64_t i = 0; i < n * D; i++) p.bk[i] = w->gate[at + i / D] * w->k[x + i];
    for (int64_t i = 0; i < n * D; i++) p.bv[i] = w->gate[at + i / D] * w->v[x + i];
    multiply(w, as_is(w->k + x, D), turned(w->k + x, D), n, D, n, 1, M, ROWS);
    for (int64_t t = 0; t < n; t++) {        /* T (I + M) = I, row by row */
        p.T[t * ROWS + t] = 1;
        for (int64_t s = 0; s < t; s++)
            for (int64_t j = 0; j <= s; j++)
                p.T[t * ROWS + j] -= w->gate[at + t] * M[t * ROWS + s] * p.T[s * ROWS + j];
    }
    multiply(w, as_is(p.T, ROWS), as_is(p.bk, D), n, n, D, 1, p.W, D);
    multiply(w, as_is(p.T, ROWS), as_is(p.bv, D), n, n, D, 1, p.N, D);
    for (int64_t i = 0; i < n * D; i++) p.N[i] = narrow(w, p.N[i]);          /* U */
    multiply(w, as_is(p.W, D), as_is(S, D), n, D, D, -1, p.N, D);
    multiply(w, as_is(w->q + x, D), turned(w->k + x, D), n, D, n, 1, p.A, ROWS);
    lower(p.A, n, false);
    free(M);
    return p;
}
static void delta_free(delta_parts *p)
{
    free(p->T), free(p->A), free(p->bk), free(p->bv), free(p->W), free(p->N);
}

static void delta_chunk(const run_of_rows *w, int64_t at, int64_t n, double *S)
{
    const int64_t D = w->D, x = at * D;
    delta_parts p = delta_prepare(w, at, n, S);
    multiply(w, as_is(w->q + x, D), as_is(S, D), n, D, D, w->scale, w->o + x, D);
    multiply(w, as_is(p.A, ROWS), as_is(p.N, D), n, n, D, w->scale, w->o + x, D);
    multiply(w, turned(w->k + x, D), as_is(p.N, D), D, n, D, 1, S, D);
    delta_free(&p);
}

/* What T passes on: to beta, k and v. */
static void inverse_back(const run_of_rows *w, int64_t at, int64_t n, const delta_parts *p,
                         const double *dN, const double *dW)
{
    const int64_t D = w->D, x = at * D;
    double *dT = zeros(ROWS * ROWS), *half = zeros(ROWS * ROWS), *dM = zeros(ROWS * ROWS);
    double *X1 = zeros(n * D), *X2 = zeros(n * D), *X3 = zeros(n * D);
    multiply(w, as_is(dN, D), turned(p->bv, D), n, D, n, 1, dT, ROWS);
    multiply(w, as_is(dW, D), turned(p->bk, D), n, D, n, 1, dT, ROWS);
    lower(dT, n, true);
    multiply(w, turned(p->T, ROWS), as_is(dN, D), n, n, D, 1, X1, D);
    multiply(w, turned(p->T, ROWS), as_is(dW, D), n, n, D, 1, X2, D);
    multiply(w, turned(p->T, ROWS), as_is(dT, ROWS), n, n, n, 1, half, ROWS);
    multiply(w, as_is(half, ROWS), turned(p->T, ROWS), n, n, n, -1, dM, ROWS);
    lower(dM, n, true);
    multiply(w, as_is(dM, ROWS), as_is(w->k + x, D), n, n, D, 1, X3, D);
    for (int64_t i = 0; i < n * D; i++) {
        const int64_t t = at + i / D;
        w->gv[x + i] += w->gate[t] * X1[i];
        w->gk[x + i] += w->gate[t] * (X2[i] + X3[i]);
        w->ggate[t] += X1[i] * w->v[x + i] + (X2[i] + X3[i]) * w->k[x + i];
    }
    multiply(w, turned(dM, ROWS), as_is(p->bk, D), n, n, D, 1, w->gk + x, D);
    free(dT), free(half), free(dM), free(X1), free(X2), free(X3);
}

static void delta_chunk_back(const run_of_rows *w, int64_t at, int64_t n, const double *S,
                             double *R)
{
    const int64_t D = w->D, x = at * D;
    const double *q = w->q + x, *k = w->k + x, *go = w->go + x;
    delta_parts p = delta_prepare(w, at, n, S);
    double *dN = zeros(n * D), *dP = zeros(ROWS * ROWS), *dW = zeros(n * D);
    multiply(w, turned(p.A, ROWS), as_is(go, D), n, n, D, w->scale, dN, D);
    multiply(w, as_is(k, D), as_is(R, D), n, D, D, 1, dN, D);
    multiply(w, as_is(go, D), turned(p.N, D), n, D, n, w->scale, dP, ROWS);
    lower(dP, n, false);
    multiply(w, as_is(go, D), turned(S, D), n, D, D, w->scale, w->gq + x, D);
    multiply(w, as_is(dP, ROWS), as_is(k, D), n, n, D, 1, w->gq + x, D);
    multiply(w, as_is(p.N, D), turned(R, D), n, D, D, 1, w->gk + x, D);
    multiply(w, turned(dP, ROWS), as_is(q, D), n, n, D, 1, w->gk + x, D);
    multiply(w, as_is(dN, D), turned(S, D), n, D, D, -1, dW, D);
    inverse_back(w, at, n, &p, dN, dW);
    multiply(w, turned(q, D), as_is(go, D), D, n, D, w->scale, R, D);
    multiply(w, turned(p.W, D), as_is(dN, D), D, n, D, -1, R, D);
    free(dN), free(dP), free(dW);
    delta_free(&p);
}

/* ---- a document ------------------------------------------------------------------------------ */

/* The first row of chunk c. */
static int64_t start_of(const run_of_rows *w, int64_t c)
{
    const int64_t at = c * ROWS - w->skew;
    return at < 0 ? 0 : at < w->n ? at : w->n;
}

/* o, gq, gk, gv and ggate are 0 before.  S and R become those behind and before the rows; what a
 * model stores in bf16 is rounded: o, gq, gk and gv. */
static void chunks(const run_of_rows *w)
{
    const int64_t D = w->D, all = (w->skew + w->n + ROWS - 1) / ROWS;
    double *before = zeros(all * D * D);
    for (int64_t c = 0; c < all; c++) {
        const int64_t at = start_of(w, c), n = start_of(w, c + 1) - at;
        memcpy(before + c * D * D, w->S, (size_t)(D * D) * sizeof *before);
        (w->delta ? delta_chunk : gla_chunk)(w, at, n, w->S);
    }
    for (int64_t c = all - 1; c >= 0; c--) {
        const int64_t at = start_of(w, c), n = start_of(w, c + 1) - at;
        (w->delta ? delta_chunk_back : gla_chunk_back)(w, at, n, before + c * D * D, w->R);
    }
    for (int64_t i = 0; i < w->n * D; i++) {
        w->o[i] = narrow(w, w->o[i]), w->gv[i] = narrow(w, w->gv[i]);
        w->gq[i] = narrow(w, w->gq[i]), w->gk[i] = narrow(w, w->gk[i]);
    }
    free(before);
}
#endif
