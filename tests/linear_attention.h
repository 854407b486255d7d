/* linear_attention.h - gated linear attention and the delta rule written out row by row in double,
 * forward and backward, and runs of the library's ops, for tests of either build.
 *
 * One sequence and head at a time:
 *     GLA     S = diag(e^g) S + k v^T              delta rule   S = S + beta k (v - S^T k)^T
 *     o = scale S^T q,  S = 0 at a document's start and in padding */
#ifndef LINEAR_ATTENTION_H
#define LINEAR_ATTENTION_H
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "fox_autodiff.h"
#include "ops.h"
#include "plan.h"

typedef enum { GLA, DELTA } kind;
static const char *const kind_name[] = { "gated_linear_attention", "delta_rule" };

/* Gates are [B,T,H,G], G = K for GLA and 1 for the delta rule. */
typedef struct {
    kind what;
    int64_t B, T, H, K, V, G;
    double scale;
    bool documents, state;
} problem;

enum { Q, KEY, VALUE, GATE, STATE, GO, GSTATE, ARRAYS };  /* inputs, gradients of outputs */
typedef struct { double *in[ARRAYS], *o, *S, *grad[5]; int32_t *first; } numbers;

static int64_t count_of(const problem *p, int i)
{
    const int64_t rows = p->B * p->T * p->H;
    return i == VALUE || i == GO ? rows * p->V : i == GATE ? rows * p->G
         : i == STATE || i == GSTATE ? p->B * p->H * p->K * p->V : rows * p->K;
}

static double *zeros(int64_t n) { return calloc((size_t)n, sizeof(double)); }

/* Numbers in (-1,1) that no seed of the library knows. */
static double draw(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (double)(*state >> 33) / 1073741824.0 - 1;
}

/* Documents of lengths 1, 2, 70, 1, 33, ..., with padding between some. */
static void fill_documents(const problem *p, int32_t *first)
{
    static const int lengths[] = { 1, 2, 70, 1, 33, 16, 17, 64, 5, 1100 };
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t t = 0, i = b; t < p->T; i++) {
            const int64_t end = t + lengths[i % 10], pad = i % 3 == 2 ? 3 : 0, start = t + pad;
            for (; t < p->T && t < start; t++) first[b * p->T + t] = (int32_t)start;
            for (; t < p->T && t < end + pad; t++)
                first[b * p->T + t] = i == b ? 0 : (int32_t)start;
        }
}

static numbers numbers_new(const problem *p, uint64_t seed)
{
    numbers x = { .o = zeros(count_of(p, VALUE)), .S = zeros(count_of(p, STATE)) };
    for (int i = 0; i < ARRAYS; i++) {
        x.in[i] = zeros(count_of(p, i));
        for (int64_t j = 0; j < count_of(p, i); j++) x.in[i][j] = (double)(float)draw(&seed);
        if (i < 5) x.grad[i] = zeros(count_of(p, i));
    }
    for (int64_t j = 0; j < count_of(p, GATE); j++) {
        const double z = 3 * x.in[GATE][j];
        x.in[GATE][j] = (double)(float)(p->what == GLA ? -log1p(exp(-z)) : 1 / (1 + exp(-z)));
    }
    for (int64_t r = 0; p->what == DELTA && r < p->B * p->T * p->H; r++) {
        double sum = 0, *k = x.in[KEY] + r * p->K;
        for (int64_t d = 0; d < p->K; d++) sum += k[d] * k[d];
        for (int64_t d = 0; d < p->K; d++) k[d] = (double)(float)(k[d] / sqrt(sum + 1e-6));
    }
    x.first = calloc((size_t)(p->B * p->T), sizeof *x.first);
    if (p->documents) fill_documents(p, x.first);
    return x;
}

static void numbers_free(numbers *x)
{
    for (int i = 0; i < ARRAYS; i++) free(x->in[i]);
    for (int i = 0; i < 5; i++) free(x->grad[i]);
    free(x->o);
    free(x->S);
    free(x->first);
}

/* ---- the recurrence -------------------------------------------------------------------------- */

/* Row t: padding, at the start of a document, or inside one. */
static int place_of(const problem *p, const numbers *x, int64_t b, int64_t t)
{
    const int64_t ahead = p->documents ? x->first[b * p->T + t] - t : -t;
    return ahead > 0 ? 0 : ahead < 0 || (t == 0 && p->state) ? 2 : 1;
}

static const double *row_of(const problem *p, const numbers *x, int i, int64_t b, int64_t t,
                            int64_t h)
{
    return x->in[i] + ((b * p->T + t) * p->H + h) * (count_of(p, i) / (p->B * p->T * p->H));
}

/* S from row t - 1 to row t; e: v - S^T k, of the delta rule */
static void advance(const problem *p, const numbers *x, int64_t b, int64_t t, int64_t h, double *S,
                    double *e)
{
    const double *k = row_of(p, x, KEY, b, t, h), *v = row_of(p, x, VALUE, b, t, h);
    const double *g = row_of(p, x, GATE, b, t, h);
    const int place = place_of(p, x, b, t);
    if (place < 2) memset(S, 0, (size_t)(p->K * p->V) * sizeof *S);
    for (int64_t j = 0; j < p->V; j++) {
        e[j] = v[j];
        for (int64_t d = 0; p->what == DELTA && d < p->K; d++) e[j] -= k[d] * S[d * p->V + j];
    }
    for (int64_t d = 0; d < p->K && place; d++)
        for (int64_t j = 0; j < p->V; j++)
            S[d * p->V + j] = p->what == GLA ? exp(g[d]) * S[d * p->V + j] + k[d] * v[j]
                                             : S[d * p->V + j] + g[0] * k[d] * e[j];
}

static void recur(const problem *p, const numbers *x, int64_t b, int64_t h)
{
    const int64_t own = (b * p->H + h) * p->K * p->V;
    double *S = x->S + own, *e = zeros(p->V);
    if (p->state) memcpy(S, x->in[STATE] + own, (size_t)(p->K * p->V) * sizeof *S);
    for (int64_t t = 0; t < p->T; t++) {
        double *o = x->o + ((b * p->T + t) * p->H + h) * p->V;
        advance(p, x, b, t, h, S, e);
        for (int64_t j = 0; j < p->V; j++) {
            o[j] = 0;
            for (int64_t d = 0; d < p->K; d++)
                o[j] += p->scale * row_of(p, x, Q, b, t, h)[d] * S[d * p->V + j];
        }
    }
    free(e);
}

/* Gradients of row t; S before it, S1 behind it, R the gradient of S1 without o_t's part; R becomes
 * that of S. */
static void recur_back(const problem *p, const numbers *x, int64_t b, int64_t t, int64_t h,
                       const double *S, const double *S1, const double *e, double *R)
{
    const int64_t row = (b * p->T + t) * p->H + h, K = p->K, V = p->V;
    const double *q = row_of(p, x, Q, b, t, h), *k = row_of(p, x, KEY, b, t, h);
    const double *v = row_of(p, x, VALUE, b, t, h), *g = row_of(p, x, GATE, b, t, h);
    const double *go = row_of(p, x, GO, b, t, h);
    double *gq = x->grad[Q] + row * K, *gk = x->grad[KEY] + row * K;
    double *gv = x->grad[VALUE] + row * V, *gg = x->grad[GATE] + row * p->G;
    for (int64_t d = 0; d < K; d++)
        for (int64_t j = 0; j < V; j++) {
            gq[d] += p->scale * S1[d * V + j] * go[j];
            R[d * V + j] += p->scale * q[d] * go[j];
        }
    for (int64_t j = 0; j < V; j++) {                    /* y: gradient of beta e */
        double y = 0;
        for (int64_t d = 0; d < K; d++) y += R[d * V + j] * k[d];
        gv[j] = p->what == GLA ? y : g[0] * y;
        if (p->what == DELTA) gg[0] += y * e[j];
    }
    for (int64_t d = 0; d < K; d++)
        for (int64_t j = 0; j < V; j++) {
            double *r = R + d * V + j, s = S[d * V + j];
            if (p->what == GLA) {
                gk[d] += *r * v[j];
                gg[d] += exp(g[d]) * *r * s;
                *r *= exp(g[d]);
            } else {
                gk[d] += *r * g[0] * e[j] - s * gv[j];
                *r -= k[d] * gv[j];
            }
        }
}

static void head_back(const problem *p, const numbers *x, int64_t b, int64_t h)
{
    const int64_t n = p->K * p->V, own = (b * p->H + h) * n;
    double *S = zeros((p->T + 1) * n), *R = zeros(n), *e = zeros(p->V), *at = zeros(2 * n);
    if (p->state) memcpy(S, x->in[STATE] + own, (size_t)n * sizeof *S);
    for (int64_t t = 0; t < p->T; t++) {
        memcpy(S + (t + 1) * n, S + t * n, (size_t)n * sizeof *S);
        advance(p, x, b, t, h, S + (t + 1) * n, e);
    }
    memcpy(R, x->in[GSTATE] + own, (size_t)n * sizeof *R);
    for (int64_t t = p->T - 1; t >= 0; t--) {
        const int place = place_of(p, x, b, t);
        memset(at, 0, (size_t)n * sizeof *at);
        if (place == 2) memcpy(at, S + t * n, (size_t)n * sizeof *at);
        if (place) {
            memcpy(at + n, at, (size_t)n * sizeof *at);
            advance(p, x, b, t, h, at + n, e);
            recur_back(p, x, b, t, h, at, at + n, e, R);
        }
        if (place < 2) memset(R, 0, (size_t)n * sizeof *R);
    }
    if (p->state) memcpy(x->grad[STATE] + own, R, (size_t)n * sizeof *R);
    free(S);
    free(R);
    free(e);
    free(at);
}

static void reference(const problem *p, const numbers *x, bool gradients)
{
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            recur(p, x, b, h);
            if (gradients) head_back(p, x, b, h);
        }
}

/* ---- the library ----------------------------------------------------------------------------- */

static fg_shape shape_of(const problem *p, int i)
{
    if (i == STATE || i == GSTATE) return FG_DIMS(p->B, p->H, p->K, p->V);
    if (i == GATE && p->what == DELTA) return FG_DIMS(p->B, p->T, p->H);
    return FG_DIMS(p->B, p->T, p->H, i == VALUE || i == GO ? p->V : p->K);
}

/* Writes doubles as what fg_write takes. */
static void write_numbers(fg_plan *plan, fg_tensor t, const double *x)
{
    const int64_t n = fg_count(t);
    float *f = malloc((size_t)n * sizeof *f);
    for (int64_t i = 0; i < n; i++) f[i] = (float)x[i];
    fg_write(plan, t, f, (size_t)n * sizeof *f);
    free(f);
}

static void read_numbers(fg_plan *plan, fg_tensor t, double *x)
{
    const fg_real *from = fg__plan_data(plan, t);
    cr_assert_not_null(from);
    for (int64_t i = 0; i < fg_count(t); i++) x[i] = (double)from[i];
}

static fg_tensor apply(const problem *p, const fg_tensor in[ARRAYS], fg_tensor state)
{
    return p->what == GLA
         ? fg_gated_linear_attention(in[Q], in[KEY], in[VALUE], in[GATE], p->scale, state)
         : fg_delta_rule(in[Q], in[KEY], in[VALUE], in[GATE], p->scale, state);
}

/* Outputs, and gradients of sum(o go) + sum(S gstate) if asked for, of the numbers in x to y. */
static void library(const problem *p, const numbers *x, numbers *y, bool gradients, int threads)
{
    fg_graph *g = fg_graph_new();
    fg_tensor in[ARRAYS], grad[5], first = { 0 };
    const int n = p->state ? 5 : 4;
    for (int i = 0; i < ARRAYS; i++)
        in[i] = fg_input(g, fg_name(g, "in%d", i), FG_F32, shape_of(p, i));
    if (p->documents) {
        first = fg_input(g, "first", FG_I32, FG_DIMS(p->B, p->T));
        fg_graph_sequence(g, (fg_sequence){ .first = first });
    }
    fg_tensor o = apply(p, in, p->state ? in[STATE] : (fg_tensor){ 0 });
    fg_tensor S = fg_result(o, 1);
    fg_tensor one = fg_sum(fg_mul(o, in[GO])), two = fg_sum(fg_mul(S, in[GSTATE]));
    fg_tensor loss = fg_add(one, two);
    if (gradients) cr_assert_eq(fg_grad(loss, n, in, grad), FG_OK, "%s", fg_graph_message(g));
    for (int i = 0; i < n && gradients; i++) fg_output(grad[i], fg_name(g, "grad%d", i));
    fg_output(o, "o");
    fg_output(S, "S");
    cr_assert_eq(fg_graph_status(g), FG_OK, "%s", fg_graph_message(g));
    fg_backend *b = fg_backend_open("cpu", threads);
    fg_store *s = fg_store_new(b);
    fg_plan *plan = fg_plan_new(g, s);
    for (int i = 0; i < ARRAYS; i++)
        if ((i < n || i >= GO) && (gradients || i < GO)) write_numbers(plan, in[i], x->in[i]);
    if (p->documents) fg_write(plan, first, x->first, (size_t)(p->B * p->T) * sizeof(int32_t));
    cr_assert_eq(fg_run(plan), FG_OK, "%s", fg_plan_message(plan));
    read_numbers(plan, o, y->o);
    read_numbers(plan, S, y->S);
    for (int i = 0; i < n && gradients; i++) read_numbers(plan, grad[i], y->grad[i]);
    fg_plan_free(plan);
    fg_store_free(s);
    fg_backend_close(b);
    fg_graph_free(g);
}

/* Greatest difference of two arrays, by the root mean square of the second. */
static double distance(const double *x, const double *y, int64_t n)
{
    double worst = 0, sum = 0;
    for (int64_t i = 0; i < n; i++) {
        const double d = fabs(x[i] - y[i]);
        if (!(d <= worst)) worst = d;                    /* NaN stays */
        sum += y[i] * y[i];
    }
    return worst / (sqrt(sum / (double)n) + 1e-30);
}
#endif
