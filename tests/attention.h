/* attention.h - forgetting attention for tests: inputs of many kinds, the exact result row by row,
 * the same with every step rounded, and the ops' own on a device.
 *
 * The reference knows no tiles: a row is its scores, their softmax and two sums, in double, and so
 * is a column of the gradient.  Rounded, it is the definition of ops/forget_attention.c and the
 * formulas of ops/forget_attention_grad.c with sums in f32 and each step's result rounded as a
 * graph of plain ops would (products, weights, o: bf16; all else f32; f32 throughout where q is
 * f32).  So the gradient meets o as the op does, rounded: in a row with one great weight, where ds
 * is the small difference of go.v and go.o, that is what most of its error comes from. */
#ifndef FG_TEST_ATTENTION_H
#define FG_TEST_ATTENTION_H
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "fox_core.h"
#include "ops.h"
#include "plan.h"

typedef enum { NO_GATES, NORMAL_GATES, LONG_GATES, MEMORY_4, MEMORY_32, ONES, TWENTIES,
               TENTHOUSANDS, ONE_RESET, ALTERNATING, NOTHING, GATE_KINDS } gate_kind;
typedef enum { NORMAL, CONSTANT, GROWING, SHRINKING, OUTLIER, ZERO_Q, MEAN_V, VALUE_KINDS }
    value_kind;
typedef enum { ONE_DOCUMENT, MANY, GIANT, PADDED, ENDED, DOCUMENT_KINDS } document_kind;
static const char *const gate_names[] = { "no gates", "gates", "long gates", "memory of 4",
    "memory of 32", "gates of 1", "logits +-20", "logits +-1e4", "one reset", "alternating gates",
    "gates of 0" };
static const char *const value_names[] = { "", ", equal keys", ", growing logits",
    ", shrinking logits", ", an outlier", ", q = 0", ", v of mean 0.5" };
static const char *const document_names[] = { "", ", documents", ", a giant and many tiny ones",
    ", padding in front", ", padding behind" };

enum { SLACK = 5 };                      /* positions of a cache behind the last query: NaN */
enum { NO_CACHE = -1, FORWARD_ONLY = -2 };                   /* in the place of past */

typedef struct {
    int64_t B, M, past, H, Hkv, D, window;       /* past: what a cache holds; gradients without */
    gate_kind gates;
    value_kind values;
    document_kind documents;
    bool bf16, pitched;
} setting;

typedef struct {
    setting s;
    int64_t N, past;                     /* positions of k; of the first query */
    double scale;
    float *q, *k, *v, *log_f, *go, *glse;        /* log_f: NULL without gates */
    int32_t *first;                      /* NULL: one document */
} problem;

/* What is compared, and where its rows lie. */
enum { O, LSE, GQ, GK, GV, GLOG_F, RESULTS };
static const char *const result_names[] = { "o", "lse", "gq", "gk", "gv", "glog_f" };

static int64_t count_of(const problem *p, int i)
{
    const setting *s = &p->s;
    if (i == LSE) return s->B * s->M * s->H;
    if (i == GLOG_F) return s->B * p->N * s->H;
    return i == O || i == GQ ? s->B * s->M * s->H * s->D : s->B * p->N * s->Hkv * s->D;
}
static int results_of(const problem *p) { return p->s.past == NO_CACHE ? RESULTS : GQ; }

/* ---- inputs --------------------------------------------------------------------------------- */

static float as_bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    if ((u & 0x7fffffffu) <= 0x7f800000u) u = (u + 0x7fffu + ((u >> 16) & 1)) & 0xffff0000u;
    memcpy(&x, &u, sizeof x);
    return x;
}

static uint64_t seed = 1;
static double uniform(void)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (double)(seed >> 11) / 9007199254740992.0;
}
/* Of mean 0 and variance 1, near enough to normal: the sum of four numbers of 16 bits. */
static double normal(void)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    uint64_t z = (seed ^ seed >> 30) * 0xbf58476d1ce4e5b9u;
    z ^= z >> 27;
    const uint64_t sum = (z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48);
    return ((double)sum / 65535 - 2) * sqrt(3);
}

/* log_f of a position, as a model makes it: log_sigmoid of a logit. */
static float draw_gate(gate_kind kind, int64_t i, int64_t N)
{
    const double side = uniform() < 0.5 ? -1 : 1;
    double x = 0;
    switch (kind) {
    case NORMAL_GATES: x = 2 + normal(); break;
    case LONG_GATES: x = 7 + normal(); break;
    case MEMORY_4: return (float)(-0.25 * (0.5 + uniform()));
    case MEMORY_32: return (float)(-0.03125 * (0.5 + uniform()));
    case TWENTIES: x = 20 * side; break;
    case TENTHOUSANDS: x = 1e4 * side; break;
    case ONE_RESET: return i == 2 * N / 3 ? -INFINITY : logf(0.999f);
    case ALTERNATING: return logf(i % 2 ? 0.999f : 1e-6f);
    case NOTHING: x = -60; break;
    default: return 0;
    }
    return (float)(fmin(x, 0) - log1p(exp(-fabs(x))));
}

/* A direction that all vectors of a head may have in common, its length sqrt(D). */
static double common(int64_t d) { return (d * 7 + d / 3) % 5 < 2 ? -1 : 1; }

static double draw_key(const setting *s, int64_t h, int64_t d, int64_t i, int64_t N)
{
    const double most = 60 / sqrt((double)s->D), at = (double)i / (double)N;
    switch (s->values) {
    case CONSTANT: return sin(1.7 * (double)d + (double)h);
    case GROWING: return 0.2 * normal() + common(d) * most * at;
    case SHRINKING: return 0.2 * normal() + common(d) * most * (1 - at);
    case OUTLIER:
        if (i == N / 3) return common(d) * 100 / sqrt((double)s->D) * (h % 2 ? -1 : 1);
        return normal();
    default: return normal();
    }
}

static double draw_query(const setting *s, int64_t d)
{
    if (s->values == ZERO_Q) return 0;
    if (s->values == GROWING || s->values == SHRINKING || s->values == OUTLIER)
        return common(d) + 0.3 * normal();
    return normal();
}

/* The first position that the document of position i has; more than i: padding. */
static int64_t start_of(document_kind kind, int64_t b, int64_t i, int64_t N)
{
    static const int64_t lengths[] = { 1, 127, 128, 129, 1, 5000 };
    int64_t start = 0, length;
    if (kind == PADDED) return b ? (41 * b) % (N + 3) : 3 % (N + 1);
    if (kind == ENDED && i >= N - 1 - N / 4) return N + 7;
    for (int64_t k = b;; k++, start += length) {
        length = kind == GIANT ? (k == b + 2 ? N / 2 + 1 : 1 + k % 3) : lengths[k % 6];
        if (i < start + length) return start;
    }
}

static float *room(int64_t n)
{
    float *x = malloc((size_t)(n + 1) * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = NAN;
    return x;
}

static void draw_tokens(problem *p)
{
    const setting *s = &p->s;
    const int64_t keys = p->past + s->M;
    for (int64_t b = 0; b < s->B; b++)
        for (int64_t i = 0; i < keys; i++) {
            for (int64_t h = 0; h < s->Hkv; h++)
                for (int64_t d = 0; d < s->D; d++) {
                    const int64_t at = ((b * p->N + i) * s->Hkv + h) * s->D + d;
                    p->k[at] = (float)draw_key(s, h, d, i, keys);
                    p->v[at] = (float)(normal() + (s->values == MEAN_V ? 0.5 : 0));
                    if (s->bf16) p->k[at] = as_bf16(p->k[at]), p->v[at] = as_bf16(p->v[at]);
                }
        }
}

static void draw_gates(problem *p)       /* last: the rest is the same without them */
{
    const int64_t H = p->s.H, keys = p->past + p->s.M;
    for (int64_t i = 0; p->log_f && i < p->s.B * keys; i++)
        for (int64_t h = 0; h < H; h++)
            p->log_f[(i / keys * p->N + i % keys) * H + h] = draw_gate(p->s.gates, i % keys, keys);
}

static problem problem_new(setting s)
{
    problem p = { .s = s, .past = s.past < 0 ? 0 : s.past, .scale = 1 / sqrt((double)s.D) };
    p.N = p.past + s.M + (s.past < 0 ? 0 : SLACK);
    p.q = room(count_of(&p, O)), p.go = room(count_of(&p, O)), p.glse = room(count_of(&p, LSE));
    p.k = room(count_of(&p, GK)), p.v = room(count_of(&p, GV));
    p.log_f = s.gates == NO_GATES ? NULL : room(count_of(&p, GLOG_F));
    p.first = s.documents == ONE_DOCUMENT ? NULL : malloc((size_t)(s.B * s.M) * sizeof *p.first);
    draw_tokens(&p);
    for (int64_t i = 0; i < count_of(&p, O); i++) {
        p.q[i] = (float)draw_query(&s, i % s.D), p.go[i] = (float)normal();
        if (s.bf16) p.q[i] = as_bf16(p.q[i]), p.go[i] = as_bf16(p.go[i]);
    }
    for (int64_t i = 0; i < count_of(&p, LSE); i++) p.glse[i] = (float)(0.5 * normal());
    for (int64_t i = 0; p.first && i < s.B * s.M; i++)
        p.first[i] = (int32_t)start_of(s.documents, i / s.M, p.past + i % s.M, p.past + s.M);
    draw_gates(&p);
    return p;
}

static void problem_free(problem *p)
{
    free(p->q), free(p->k), free(p->v), free(p->log_f), free(p->go), free(p->glse), free(p->first);
}

/* ---- the reference -------------------------------------------------------------------------- */

typedef struct { double max, sum, dot; } row_state;          /* dot: go.o */

typedef struct {
    const problem *p;
    bool rounded;
    double *out[RESULTS];
    bool *known;                         /* [B,M,H]: rows that were computed */
    row_state *state;
    double *c;                           /* [B,H,N]: sums of log_f */
    double *row, *column;                /* [B,H,N]: sums of ds */
} reference;

static double wide(const reference *r, double x) { return r->rounded ? (double)(float)x : x; }
static double narrow(const reference *r, double x)
{
    if (!r->rounded) return x;
    return (double)(r->p->s.bf16 ? as_bf16((float)x) : (float)x);
}

static double dot(const reference *r, const float *x, const float *y, int64_t n)
{
    double part[4] = { 0 };
    float sum = 0;
    for (int64_t i = 0; r->rounded && i < n; i++) sum += x[i] * y[i];
    if (r->rounded) return (double)sum;
    for (int64_t i = 0; i < n; i += 4)   /* D is a multiple of 4 */
        for (int k = 0; k < 4; k++) part[k] += (double)x[i + k] * (double)y[i + k];
    return (part[0] + part[1]) + (part[2] + part[3]);
}
static void add_row(const reference *r, double *to, double w, const float *x, int64_t n)
{
    if (r->rounded)
        for (int64_t i = 0; i < n; i++) to[i] = (double)(float)(to[i] + w * (double)x[i]);
    else for (int64_t i = 0; i < n; i++) to[i] += w * (double)x[i];
}

static const float *query_at(const problem *p, const float *x, int64_t b, int64_t t, int64_t h)
{
    return x + ((b * p->s.M + t) * p->s.H + h) * p->s.D;
}
static const float *key_at(const problem *p, const float *x, int64_t b, int64_t j, int64_t h)
{
    return x + ((b * p->N + j) * p->s.Hkv + h / (p->s.H / p->s.Hkv)) * p->s.D;
}

/* The first key that query t sees; past its own position: none. */
static int64_t first_key(const problem *p, int64_t b, int64_t t)
{
    const int64_t at = p->past + t, from = p->first ? p->first[b * p->s.M + t] : 0;
    const int64_t least = p->s.window && at - p->s.window + 1 > 0 ? at - p->s.window + 1 : 0;
    return from > least ? from : least;
}

static double score(const reference *r, int64_t b, int64_t h, int64_t t, int64_t j)
{
    const problem *p = r->p;
    const double z = dot(r, query_at(p, p->q, b, t, h), key_at(p, p->k, b, j, h), p->s.D);
    const double s = wide(r, p->scale * narrow(r, z));
    if (!p->log_f) return s;
    const double *c = r->c + (b * p->s.H + h) * p->N;
    if (!r->rounded) return s + (c[p->past + t] - c[j]);
    return wide(r, wide(r, s + c[p->past + t]) - c[j]);
}

/* p_ij from lse, as the gradient makes it */
static double weight_of(const reference *r, int64_t b, int64_t h, int64_t t, int64_t j)
{
    const double lse = r->out[LSE][(b * r->p->s.M + t) * r->p->s.H + h];
    return wide(r, exp(wide(r, score(r, b, h, t, j) - lse)));
}

/* ds of a pair from its weight and its go.v */
static double pair(const reference *r, const row_state *u, double w, double dp, double glse)
{
    if (!r->rounded) return w * (dp - u->dot + glse);
    return wide(r, wide(r, w * (dp - u->dot)) + wide(r, w * glse));
}

static void row_gradient(reference *r, int64_t b, int64_t h, int64_t t, int64_t low, double *w)
{
    const problem *p = r->p;
    const int64_t D = p->s.D, at = (b * p->s.M + t) * p->s.H + h, end = p->past + t + 1;
    const float *go = query_at(p, p->go, b, t, h);
    row_state *u = &r->state[at];
    double *gq = r->out[GQ] + at * D, *row = r->row + (b * p->s.H + h) * p->N + t;
    u->dot = *row = 0;
    for (int64_t d = 0; d < D; d++) u->dot += (double)go[d] * r->out[O][at * D + d];
    for (int64_t j = low; j < end; j++) {
        const double dp = narrow(r, dot(r, go, key_at(p, p->v, b, j, h), D));
        const double weight = r->rounded ? weight_of(r, b, h, t, j) : w[j];
        const double ds = pair(r, u, weight, dp, (double)p->glse[at]);
        *row += ds;
        add_row(r, gq, narrow(r, wide(r, p->scale * ds)), key_at(p, p->k, b, j, h), D);
    }
    for (int64_t d = 0; d < D; d++) gq[d] = narrow(r, gq[d]);
}

/* w: room for N */
static void row_of(reference *r, int64_t b, int64_t h, int64_t t, double *w)
{
    const problem *p = r->p;
    const int64_t D = p->s.D, at = (b * p->s.M + t) * p->s.H + h, end = p->past + t + 1;
    const int64_t low = first_key(p, b, t);
    double *o = r->out[O] + at * D;
    row_state *u = &r->state[at];
    r->known[at] = true;
    *u = (row_state){ -INFINITY, 0, 0 };
    for (int64_t d = 0; d < D; d++) o[d] = 0;
    for (int64_t d = 0; r->out[GQ] && d < D; d++) r->out[GQ][at * D + d] = 0;
    for (int64_t j = low; j < end; j++) u->max = fmax(u->max, w[j] = score(r, b, h, t, j));
    for (int64_t j = low; j < end; j++) u->sum += w[j] = exp(w[j] - u->max);
    r->out[LSE][at] = low < end ? wide(r, u->max + log(u->sum)) : -INFINITY;
    for (int64_t j = low; j < end; j++) {
        w[j] = wide(r, w[j] / u->sum);
        add_row(r, o, narrow(r, w[j]), key_at(p, p->v, b, j, h), D);
    }
    for (int64_t d = 0; d < D; d++) o[d] = narrow(r, o[d]);
    if (r->out[GQ] && low < end) row_gradient(r, b, h, t, low, w);
}

/* gk and gv of key j, and the sums of its ds, from the rows' states.  own: room for 2 D */
static void column_of(reference *r, int64_t b, int64_t kv, int64_t j, double *own)
{
    const problem *p = r->p;
    const int64_t D = p->s.D, group = p->s.H / p->s.Hkv, at = (b * p->N + j) * p->s.Hkv + kv;
    double *gk = r->out[GK] + at * D, *gv = r->out[GV] + at * D;
    for (int64_t d = 0; d < D; d++) gk[d] = gv[d] = 0;
    for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
        double column = 0;
        for (int64_t d = 0; d < 2 * D; d++) own[d] = 0;
        for (int64_t t = j; t < p->s.M; t++) {
            if (first_key(p, b, t) > j) continue;
            const int64_t row = (b * p->s.M + t) * p->s.H + h;
            const float *go = query_at(p, p->go, b, t, h);
            const row_state *u = &r->state[row];
            const double w = weight_of(r, b, h, t, j);
            const double dp = narrow(r, dot(r, go, key_at(p, p->v, b, j, h), D));
            const double ds = pair(r, u, w, dp, (double)p->glse[row]);
            column += ds;
            add_row(r, own, narrow(r, wide(r, p->scale * ds)), query_at(p, p->q, b, t, h), D);
            add_row(r, own + D, narrow(r, w), go, D);
        }
        r->column[(b * p->s.H + h) * p->N + j] = column;
        for (int64_t d = 0; d < D; d++)
            gk[d] += narrow(r, own[d]), gv[d] += narrow(r, own[D + d]);
    }
    for (int64_t d = 0; d < D; d++) gk[d] = narrow(r, gk[d]), gv[d] = narrow(r, gv[d]);
}

static void gates_of(reference *r, int64_t b, int64_t h)
{
    const problem *p = r->p;
    const int64_t head = (b * p->s.H + h) * p->N;
    double sum = 0;
    for (int64_t t = p->N - 1; t >= 0; t--) {
        const int64_t at = (b * p->N + t) * p->s.H + h;
        sum += wide(r, wide(r, r->row[head + t]) - wide(r, r->column[head + t]));
        r->out[GLOG_F][at] = p->log_f && p->log_f[at] >= -100 ? wide(r, sum) : 0;
    }
}

static double *numbers(int64_t n) { return calloc((size_t)n + 1, sizeof(double)); }

static reference reference_new(const problem *p, bool rounded, bool gradient)
{
    const setting *s = &p->s;
    reference r = { .p = p, .rounded = rounded };
    for (int i = 0; i < (gradient ? RESULTS : GQ); i++) r.out[i] = numbers(count_of(p, i));
    r.known = calloc((size_t)count_of(p, LSE) + 1, sizeof *r.known);
    r.state = calloc((size_t)count_of(p, LSE) + 1, sizeof *r.state);
    r.c = numbers(s->B * s->H * p->N);
    r.row = numbers(s->B * s->H * p->N), r.column = numbers(s->B * s->H * p->N);
    for (int64_t i = 0; p->log_f && i < s->B * s->H; i++) {
        double sum = 0;
        for (int64_t t = 0; t < p->past + s->M; t++) {
            sum += fmax((double)p->log_f[(i / s->H * p->N + t) * s->H + i % s->H], -100);
            r.c[i * p->N + t] = wide(&r, sum);
        }
    }
    return r;
}

static void reference_free(reference *r)
{
    for (int i = 0; i < RESULTS; i++) free(r->out[i]);
    free(r->known), free(r->state), free(r->c), free(r->row), free(r->column);
}

/* Every step-th row of all, from the last on. */
static void reference_rows(reference *r, int64_t step)
{
    const problem *p = r->p;
    const int64_t n = p->s.B * p->s.M * p->s.H;
#pragma omp parallel
    {
        double *w = numbers(p->N);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < n; i += step) {
            const int64_t at = n - 1 - i, t = at / p->s.H % p->s.M;
            row_of(r, at / p->s.H / p->s.M, at % p->s.H, t, w);
        }
        free(w);
    }
}

static void reference_columns(reference *r)
{
    const problem *p = r->p;
#pragma omp parallel
    {
        double *own = numbers(2 * p->s.D);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < p->s.B * p->N * p->s.Hkv; i++)
            column_of(r, i / p->s.Hkv / p->N, i % p->s.Hkv, i / p->s.Hkv % p->N, own);
        free(own);
    }
    for (int64_t i = 0; i < p->s.B * p->s.H; i++) gates_of(r, i / p->s.H, i % p->s.H);
}

/* The greatest sum of gates of a block of 128 positions, and of |lse|: exponents are differences of
 * f32 numbers that large. */
static double reach_of(const reference *r)
{
    const problem *p = r->p;
    double gates = 0, most = 0;
    for (int64_t i = 0; p->log_f && i < p->s.B * p->s.H; i++)
        for (int64_t t = 0; t < p->past + p->s.M; t += 128) {
            const int64_t end = t + 127 < p->past + p->s.M ? t + 127 : p->past + p->s.M - 1;
            gates = fmax(gates, r->c[i * p->N + t] - r->c[i * p->N + end]);
        }
    for (int64_t i = 0; i < count_of(p, LSE); i++)
        if (r->known[i] && isfinite(r->out[LSE][i])) most = fmax(most, fabs(r->out[LSE][i]));
    return gates + most;
}

/* ---- the ops on a device -------------------------------------------------------------------- */

typedef struct {
    fg_graph *g;
    fg_tensor qkv, q, k, v, log_f, first, past, go, glse, out[RESULTS];
    fg_tensor wide_f;                    /* what log_f is columns of */
} attention;

static fg_tensor columns(fg_tensor x, int64_t from, int64_t heads, int64_t D)
{
    x = fg_slice(x, 2, from, from + heads * D);
    return fg_reshape(x, FG_DIMS(fg_dim(x, 0), fg_dim(x, 1), heads, D));
}
static fg_tensor flat(fg_tensor x)
{
    return fg_reshape(x, FG_DIMS(fg_dim(x, 0), fg_dim(x, 1), fg_dim(x, 2) * fg_dim(x, 3)));
}

static void add_inputs(attention *a, const problem *p)
{
    const setting *s = &p->s;
    const fg_dtype t = s->bf16 ? FG_BF16 : FG_F32;
    const fg_shape q = FG_DIMS(s->B, s->M, s->H, s->D), k = FG_DIMS(s->B, p->N, s->Hkv, s->D);
    const int64_t qs = s->H * s->D, ks = s->Hkv * s->D;
    if (s->pitched) {
        a->qkv = fg_input(a->g, "qkv", t, FG_DIMS(s->B, p->N, qs + 2 * ks));
        a->q = columns(a->qkv, 0, s->H, s->D), a->k = columns(a->qkv, qs, s->Hkv, s->D);
        a->v = columns(a->qkv, qs + ks, s->Hkv, s->D);
    } else {
        a->q = fg_input(a->g, "q", t, q);
        a->k = fg_input(a->g, "k", t, k);
        a->v = fg_input(a->g, "v", t, k);
    }
    if (p->log_f) {                      /* columns of a wider matrix, if all of it is pitched */
        const int64_t H = s->H, more = s->pitched ? 8 - H % 4 : 0;
        a->wide_f = a->log_f = fg_input(a->g, "log_f", FG_F32, FG_DIMS(s->B, p->N, H + more));
        if (more) a->log_f = fg_slice(a->wide_f, 2, 4, 4 + H);
    }
    if (p->first) a->first = fg_input(a->g, "first", FG_I32, FG_DIMS(s->B, s->M));
    if (s->past >= 0) a->past = fg_input(a->g, "past", FG_I32, FG_DIMS(1));
    a->go = fg_input(a->g, "go", t, q);
    a->glse = fg_input(a->g, "glse", FG_F32, FG_DIMS(s->B, s->M, s->H));
}

static attention attention_new(const problem *p)
{
    attention a = { .g = fg_graph_new() };
    add_inputs(&a, p);
    const fg_tensor in[] = { a.q, a.k, a.v, a.log_f, a.first, a.past };
    a.out[O] = FG_APPLY(forget_attention, FG_HERE, in, p->scale, p->s.window);
    a.out[LSE] = fg_result(a.out[O], 1);
    if (results_of(p) == RESULTS) {
        const fg_tensor back[] = { a.go, a.glse, a.q, a.k, a.v, a.log_f, a.out[O], a.out[LSE],
                                   a.first };
        a.out[GQ] = FG_APPLY(forget_attention_grad, FG_HERE, back, p->scale, p->s.window);
        for (int i = GK; i < RESULTS; i++) a.out[i] = fg_result(a.out[GQ], i - GQ);
    }
    if (p->s.pitched && results_of(p) == RESULTS) {          /* gradients as columns of one too */
        fg_tensor all = fg_concat(flat(a.out[GQ]), flat(a.out[GK]), 2);
        a.out[GQ] = fg_concat(all, flat(a.out[GV]), 2);
    }
    for (int i = 0; i < results_of(p); i++)
        if (!p->s.pitched || i < GK || i == GLOG_F)
            fg_output(a.out[i], fg_name(a.g, "%s", result_names[i]));
    return a;
}

static void put(fg_plan *plan, fg_tensor t, const void *x)
{
    if (!fg_absent(t)) fg_write(plan, t, x, (size_t)fg_count(t) * 4);
}

/* Columns [from, from + n) of rows of `all`, to or from a matrix of n columns. */
static void move_columns(float *all, int64_t width, int64_t from, int64_t n, float *x, int64_t rows,
                         bool out)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i++)
            if (out) x[r * n + i] = all[r * width + from + i];
            else all[r * width + from + i] = x[r * n + i];
}

static void write_inputs(const attention *a, fg_plan *plan, const problem *p)
{
    const setting *s = &p->s;
    const int64_t rows = s->B * p->N, qs = s->H * s->D, ks = s->Hkv * s->D;
    const int32_t past = (int32_t)p->past;
    put(plan, a->first, p->first), put(plan, a->past, &past);
    put(plan, a->go, p->go), put(plan, a->glse, p->glse);
    if (!s->pitched) {
        put(plan, a->q, p->q), put(plan, a->k, p->k), put(plan, a->v, p->v);
        put(plan, a->log_f, p->log_f);
        return;
    }
    float *all = room(rows * (qs + 2 * ks));
    move_columns(all, qs + 2 * ks, 0, qs, p->q, rows, false);
    move_columns(all, qs + 2 * ks, qs, ks, p->k, rows, false);
    move_columns(all, qs + 2 * ks, qs + ks, ks, p->v, rows, false);
    put(plan, a->qkv, all);
    free(all);
    if (!p->log_f) return;
    const int64_t width = fg_dim(a->wide_f, 2);
    all = room(rows * width);
    move_columns(all, width, 4, s->H, p->log_f, rows, false);
    put(plan, a->wide_f, all);
    free(all);
}

static void read_results(const attention *a, fg_plan *plan, const problem *p, float **y)
{
    const setting *s = &p->s;
    const bool joined = s->pitched && results_of(p) == RESULTS;
    const int64_t rows = s->B * p->N, qs = s->H * s->D, ks = s->Hkv * s->D;
    for (int i = 0; i < results_of(p); i++) {
        y[i] = room(count_of(p, i));
        if (!joined || i < GQ || i == GLOG_F)
            fg_read(plan, a->out[i], y[i], (size_t)count_of(p, i) * 4);
    }
    if (!joined) return;
    float *all = room(rows * (qs + 2 * ks));
    fg_read(plan, a->out[GQ], all, (size_t)(rows * (qs + 2 * ks)) * 4);
    move_columns(all, qs + 2 * ks, 0, qs, y[GQ], rows, true);
    move_columns(all, qs + 2 * ks, qs, ks, y[GK], rows, true);
    move_columns(all, qs + 2 * ks, qs + ks, ks, y[GV], rows, true);
    free(all);
}

/* Is input i of the node of forget_attention rows of a pitch in the plan? */
static bool reads_pitched(const fg_plan *plan, int i)
{
    for (uint32_t k = 0; k < plan->low->n_nodes; k++) {
        const fg_node *n = &plan->low->nodes[k];
        if (strcmp(n->op->name, "forget_attention")) continue;
        return plan->slots[n->in[i]].rows.width != plan->slots[n->in[i]].rows.pitch;
    }
    return false;
}
#endif
