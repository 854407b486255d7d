/* test_forget_attention.c - forgetting attention and its gradient against a plain loop over rows in
 * double. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "ops.h"
#include "fox_graph.h"

typedef struct {
    int64_t B, T, H, Hkv, D, window;
    fg_real *q, *k, *v, *log_f, *go, *glse;    /* log_f, glse: or NULL */
    int32_t *first;                          /* or NULL */
} problem;
typedef struct { double *o, *lse, *gq, *gk, *gv, *gf; } truth;
typedef struct { fg_real *o, *lse, *gq, *gk, *gv, *gf; } result;

/* ---- numbers -------------------------------------------------------------------------------- */

static double uniform(uint64_t *s)           /* splitmix64, in [0,1) */
{
    uint64_t z = *s += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (double)((z ^ (z >> 31)) >> 11) * 0x1p-53;
}
static double normal(uint64_t *s)
{
    const double u = 1 - uniform(s), a = 6.283185307179586 * uniform(s);
    return sqrt(-2 * log(u)) * cos(a);
}
static fg_real *normals(int64_t n, double mean, uint64_t seed)
{
    fg_real *x = malloc((size_t)(n + 1) * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = (fg_real)(mean + normal(&seed));
    return x;
}
static fg_real log_sigmoid(double x)
{
    return (fg_real)(x < 0 ? x - log1p(exp(x)) : -log1p(exp(-x)));
}
static void *zeros(int64_t n, size_t size) { return calloc((size_t)(n + 1), size); }

static problem make(int64_t B, int64_t T, int64_t H, int64_t Hkv, int64_t D, int64_t window)
{
    const uint64_t seed = (uint64_t)(((((B * 31 + T) * 31 + H) * 31 + Hkv) * 31 + D) * 31 + window);
    problem p = { B, T, H, Hkv, D, window, 0, 0, 0, 0, 0, 0, 0 };
    p.q = normals(B * T * H * D, 0, seed + 1);
    p.k = normals(B * T * Hkv * D, 0, seed + 2);
    p.v = normals(B * T * Hkv * D, 0, seed + 3);
    p.go = normals(B * T * H * D, 0, seed + 4);
    p.glse = normals(B * T * H, 0, seed + 5);
    p.log_f = normals(B * T * H, 2, seed + 6);
    for (int64_t i = 0; i < B * T * H; i++) p.log_f[i] = log_sigmoid(2 * p.log_f[i]);
    return p;
}
static void drop(problem *p)
{
    free(p->q); free(p->k); free(p->v); free(p->log_f); free(p->go); free(p->glse); free(p->first);
}
static void drop_truth(truth *t)
{
    free(t->o);
    free(t->lse);
    free(t->gq);
    free(t->gk);
    free(t->gv);
    free(t->gf);
}
static void drop_result(result *r)
{
    free(r->o);
    free(r->lse);
    free(r->gq);
    free(r->gk);
    free(r->gv);
    free(r->gf);
}
static double scale_of(const problem *p) { return 1 / sqrt((double)p->D); }

/* ---- the plain loop ------------------------------------------------------------------------- */

/* Four sums: one would be a chain of additions, and most of what this test takes. */
static double dot(const fg_real *a, const fg_real *b, int64_t n)
{
    double s[4] = { 0 };
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        for (int k = 0; k < 4; k++) s[k] += (double)a[i + k] * (double)b[i + k];
    for (; i < n; i++) s[0] += (double)a[i] * (double)b[i];
    return s[0] + s[1] + s[2] + s[3];
}

static void row_truth(const problem *p, truth *t, int64_t b, int64_t h, int64_t i, double *w,
                      double *ds)
{
    const int64_t D = p->D, kv = h / (p->H / p->Hkv), r = (b * p->T + i) * p->H + h;
    const fg_real *q = p->q + r * D, *go = p->go + r * D;
    int64_t low = p->first ? p->first[b * p->T + i] : 0;
    if (low > i) { t->lse[r] = -INFINITY; return; }
    if (p->window && i - p->window + 1 > low) low = i - p->window + 1;
    double bias = 0, max = -INFINITY, sum = 0, delta = -(p->glse ? (double)p->glse[r] : 0), run = 0;
    for (int64_t j = i; j >= low; j--) {
        w[j] = scale_of(p) * dot(q, p->k + ((b * p->T + j) * p->Hkv + kv) * D, D) + bias;
        if (w[j] > max) max = w[j];
        if (p->log_f) bias += fmax((double)p->log_f[(b * p->T + j) * p->H + h], -100);
    }
    for (int64_t j = low; j <= i; j++) sum += exp(w[j] - max);
    t->lse[r] = max + log(sum);
    for (int64_t j = low; j <= i; j++) {
        const int64_t at = ((b * p->T + j) * p->Hkv + kv) * D;
        w[j] = exp(w[j] - t->lse[r]);
        ds[j] = dot(go, p->v + at, D);
        delta += w[j] * ds[j];
        for (int64_t d = 0; d < D; d++) {
            t->o[r * D + d] += w[j] * (double)p->v[at + d];
            t->gv[at + d] += w[j] * (double)go[d];
        }
    }
    for (int64_t j = low; j <= i; j++) {
        const int64_t at = ((b * p->T + j) * p->Hkv + kv) * D;
        if (j > low) t->gf[(b * p->T + j) * p->H + h] += run;
        ds[j] = w[j] * (ds[j] - delta);
        run += ds[j];
        for (int64_t d = 0; d < D; d++) {
            t->gq[r * D + d] += scale_of(p) * ds[j] * (double)p->k[at + d];
            t->gk[at + d] += scale_of(p) * ds[j] * (double)q[d];
        }
    }
}

static truth know(const problem *p)
{
    const int64_t n = p->B * p->T * p->H, m = p->B * p->T * p->Hkv;
    truth t = { zeros(n * p->D, 8), zeros(n, 8),        zeros(n * p->D, 8),
                zeros(m * p->D, 8), zeros(m * p->D, 8), zeros(n, 8) };
    double *w = zeros(p->T, 8), *ds = zeros(p->T, 8);
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++)
            for (int64_t i = 0; i < p->T; i++) row_truth(p, &t, b, h, i, w, ds);
    for (int64_t i = 0; i < n; i++) if (!p->log_f || p->log_f[i] < -100) t.gf[i] = 0;
    free(w); free(ds);
    return t;
}

/* ---- the kernels, called directly ----------------------------------------------------------- */

static void call(const fg_op *op, const void *attr, int n_in, const void *const *in,
                 const fg_shape *shape, const fg_dtype *type, int n_out, void *const *out,
                 int threads)
{
    fg_infer c = { .attr = attr, .n_in = n_in, .n_out = n_out };
    fg_exec e = { .attr = attr, .n_in = n_in, .n_out = n_out, .threads = threads, .in_shape = c.in,
                  .out_shape = c.out, .in_type = c.in_type, .out_type = c.out_type };
    for (int i = 0; i < n_in; i++) {
        c.given[i] = in[i] != NULL;
        c.in[i] = in[i] ? shape[i] : (fg_shape){ 0 };
        c.in_type[i] = type[i];
        e.in[i] = in[i];
    }
    for (int i = 0; i < n_out; i++) { c.out_type[i] = type[0]; e.out[i] = out[i]; }
    cr_assert_eq(op->code->infer(&c), FG_OK);
    const size_t bytes = op->code->scratch(&c, threads);
    e.scratch = aligned_alloc(64, (bytes + 127) / 64 * 64);
    memset(e.scratch, 0xff, (bytes + 127) / 64 * 64);    /* NaN: not to be read before written */
    op->code->cpu(&e);
    free(e.scratch);
}

static result forward(const problem *p, int threads)
{
    const int64_t n = p->B * p->T * p->H;
    result r = { zeros(n * p->D, sizeof(fg_real)), zeros(n, sizeof(fg_real)), 0, 0, 0, 0 };
    memset(r.o, 0xff, (size_t)(n * p->D) * sizeof(fg_real));
    const struct fg_attr_forget_attention a = { scale_of(p), p->window };
    const void *in[] = { p->q, p->k, p->v, p->log_f, p->first, NULL };
    const fg_shape q = FG_DIMS(p->B, p->T, p->H, p->D), k = FG_DIMS(p->B, p->T, p->Hkv, p->D);
    const fg_shape shape[] = {
        q, k, k, FG_DIMS(p->B, p->T, p->H), FG_DIMS(p->B, p->T), FG_DIMS(1)
    };
    const fg_dtype type[] = { FG_F32, FG_F32, FG_F32, FG_F32, FG_I32, FG_I32 };
    void *out[] = { r.o, r.lse };
    call(&fg_op_table[FG_OP_forget_attention], &a, 6, in, shape, type, 2, out, threads);
    return r;
}

static result both(const problem *p, int threads)
{
    const int64_t n = p->B * p->T * p->H, m = p->B * p->T * p->Hkv;
    result r = forward(p, threads);
    r.gq = zeros(n * p->D, sizeof(fg_real));
    r.gk = zeros(m * p->D, sizeof(fg_real));
    r.gv = zeros(m * p->D, sizeof(fg_real));
    r.gf = zeros(n, sizeof(fg_real));
    memset(r.gk, 0xff, (size_t)(m * p->D) * sizeof(fg_real));
    memset(r.gq, 0xff, (size_t)(n * p->D) * sizeof(fg_real));
    const struct fg_attr_forget_attention_grad a = { scale_of(p), p->window };
    const void *in[] = { p->go, p->glse, p->q, p->k, p->v, p->log_f, r.o, r.lse, p->first };
    const fg_shape q = FG_DIMS(p->B, p->T, p->H, p->D), k = FG_DIMS(p->B, p->T, p->Hkv, p->D);
    const fg_shape f = FG_DIMS(p->B, p->T, p->H);
    const fg_shape shape[] = { q, f, q, k, k, f, q, f, FG_DIMS(p->B, p->T) };
    const fg_dtype type[] = {
        FG_F32, FG_F32, FG_F32, FG_F32, FG_F32, FG_F32, FG_F32, FG_F32, FG_I32
    };
    void *out[] = { r.gq, r.gk, r.gv, r.gf };
    call(&fg_op_table[FG_OP_forget_attention_grad], &a, 9, in, shape, type, 4, out, threads);
    return r;
}

static bool same(const fg_real *x, const fg_real *y, size_t n)
{
    return !memcmp(x, y, n * sizeof *x);
}

/* ---- comparing ------------------------------------------------------------------------------ */

/* ||x - y|| / ||y||, or against floor where y is all but 0; NaN and a misplaced infinity give
 * infinity. */
static double distance(const fg_real *x, const double *y, int64_t n, double floor)
{
    double d = 0, s = 0;
    for (int64_t i = 0; i < n; i++) {
        if (isinf(y[i]) && (double)x[i] == y[i]) continue;
        if (!isfinite(x[i]) || !isfinite(y[i])) return INFINITY;
        d += ((double)x[i] - y[i]) * ((double)x[i] - y[i]);
        s += y[i] * y[i];
    }
    return n ? sqrt(d) / fmax(sqrt(s), floor * sqrt((double)n)) : 0;
}

static void expect(const char *what, const problem *p, double forward_limit, double gradient_limit,
                   double floor)
{
    truth t = know(p);
    result r = both(p, 2);
    const int64_t n = p->B * p->T * p->H, m = p->B * p->T * p->Hkv * p->D;
    const struct { const char *name; double off, limit; } all[] = {
        { "o", distance(r.o, t.o, n * p->D, floor), forward_limit },
        { "lse", distance(r.lse, t.lse, n, 1), forward_limit },
        { "gq", distance(r.gq, t.gq, n * p->D, floor), gradient_limit },
        { "gk", distance(r.gk, t.gk, m, floor), gradient_limit },
        { "gv", distance(r.gv, t.gv, m, floor), gradient_limit },
        { "glog_f", distance(r.gf, t.gf, n, floor), gradient_limit },
    };
    for (int i = 0; i < 6; i++) {
        if (getenv("FG_TEST_PRINT"))
            fprintf(stderr, "%-28s B%lld T%-5lld H%lld/%lld D%-3lld window %-4lld %-6s %.1e\n",
                    what, (long long)p->B, (long long)p->T, (long long)p->H, (long long)p->Hkv,
                    (long long)p->D, (long long)p->window, all[i].name, all[i].off);
        cr_expect(all[i].off <= all[i].limit,
                  "%s: T %lld, H %lld/%lld, D %lld, window %lld: %s is off by %.2e, limit %.0e",
                  what, (long long)p->T, (long long)p->H, (long long)p->Hkv, (long long)p->D,
                  (long long)p->window, all[i].name, all[i].off, all[i].limit);
    }
    drop_truth(&t);
    drop_result(&r);
}

/* Rounding of sums.  Measured on all of these: at most 1.0e-6 forward and 5.5e-6 backward in float,
 * 1.7e-15 and 2.5e-14 in double.  A gradient that is 0 by itself (a row that sees one key) is held
 * against 0.1, a tenth of what its terms are. */
#ifdef FG_DOUBLE
#define NEAR      4e-15
#define NEAR_GRAD 5e-14
#else
#define NEAR      2e-6
#define NEAR_GRAD 1e-5
#endif

/* Of those over 17 rows a third, in which any two of T, D, heads and window still meet. */
Test(forget_attention, equals_plain_loop_for_every_shape)
{
    static const int64_t T[] = { 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129 },
                         D[] = { 1, 3, 16, 64, 80, 128 };
    static const int64_t heads[][2] = { { 1, 1 }, { 2, 1 }, { 6, 2 } }, window[] = { 0, 1, 7, 100 };
    for (size_t t = 0; t < 11; t++)
        for (size_t d = 0; d < 6; d++)
            for (size_t h = 0; h < 3; h++)
                for (size_t w = 0; w < 4; w++) {
                    if (T[t] > 17 && (t + d + h + w) % 3) continue;
                    problem p = make(1, T[t], heads[h][0], heads[h][1], D[d], window[w]);
                    expect("shape", &p, NEAR, NEAR_GRAD, 0.1);
                    drop(&p);
                }
}

Test(forget_attention, equals_plain_loop_over_many_tiles)
{
    static const struct { int64_t B, T, H, Hkv, D, window; } s[] = {
        { 2, 257, 6, 2, 64, 0 },    { 1, 257, 2, 1, 128, 100 }, { 1, 1000, 2, 1, 64, 0 },
        { 2, 1000, 1, 1, 80, 100 }, { 1, 1000, 6, 2, 3, 7 },    { 1, 1000, 1, 1, 16, 1 },
    };
    for (size_t i = 0; i < sizeof s / sizeof s[0]; i++) {
        problem p = make(s[i].B, s[i].T, s[i].H, s[i].Hkv, s[i].D, s[i].window);
        expect("tiles", &p, NEAR, NEAR_GRAD, 0.1);
        free(p.log_f), p.log_f = NULL;
        expect("tiles, no gate", &p, NEAR, NEAR_GRAD, 0.1);
        free(p.glse), p.glse = NULL;
        expect("tiles, no glse", &p, NEAR, NEAR_GRAD, 0.1);
        drop(&p);
    }
}

/* Documents of these lengths one after another; the first `pad` positions are padding. */
static void documents(problem *p, const int64_t *length, int n, int64_t pad)
{
    p->first = zeros(p->B * p->T, sizeof *p->first);
    for (int64_t b = 0; b < p->B; b++) {
        int64_t t = 0;
        for (int d = 0; t < p->T; d++) {
            const int64_t start = t, end = t + length[(d + b) % n];
            for (; t < end && t < p->T; t++)
                p->first[b * p->T + t] = (int32_t)(start < pad ? pad : start);
        }
    }
}

Test(forget_attention, documents_and_padding_equal_plain_loop)
{
    static const int64_t a[] = { 1, 63, 1, 64, 2, 129, 17 }, b[] = { 200, 1, 1, 1, 0, 70 },
                         c[] = { 5 }, d[] = { 1 };
    static const struct { const int64_t *length; int n; int64_t pad; } s[] = {
        { a, 7, 0 }, { b, 6, 0 },   { c, 1, 0 },   { d, 1, 0 },
        { a, 7, 3 }, { b, 6, 100 }, { c, 1, 299 }, { c, 1, 1000 },
    };
    for (size_t i = 0; i < sizeof s / sizeof s[0]; i++)
        for (int64_t window = 0; window < 100; window += 33) {
            problem p = make(2, 300, 2, 1, 16, window);
            documents(&p, s[i].length, s[i].n, s[i].pad);
            expect("documents", &p, NEAR, NEAR_GRAD, 0.1);
            drop(&p);
        }
}

Test(forget_attention, padding_rows_are_zero_and_take_part_in_nothing)
{
    problem p = make(1, 150, 2, 1, 16, 0);
    const int64_t whole[] = { 150 };
    documents(&p, whole, 1, 70);
    result r = both(&p, 2);
    for (int64_t i = 0; i < 70 * 2; i++) cr_assert(isinf(r.lse[i]) && r.lse[i] < 0);
    for (int64_t i = 0; i < 70 * 2 * 16; i++) cr_assert(r.o[i] == 0 && r.gq[i] == 0);
    for (int64_t i = 0; i < 70 * 16; i++) cr_assert(r.gk[i] == 0 && r.gv[i] == 0);
    for (int64_t i = 0; i < 70 * 2; i++) p.log_f[i] = NAN;   /* a gate of the padding */
    result s = both(&p, 2);
    cr_assert(same(r.o, s.o, 150 * 2 * 16), "a gate of the padding reached an output");
    drop_result(&r); drop_result(&s); drop(&p);
}

/* In the second of three documents; what it counts as is -100. */
Test(forget_attention, a_gate_that_is_no_number_stays_in_its_document)
{
    const int64_t lengths[] = { 70, 51, 80 }, H = 2, D = 16;
    problem p = make(1, 201, H, 1, D, 0);
    documents(&p, lengths, 3, 0);
    for (int64_t h = 0; h < H; h++) p.log_f[100 * H + h] = -100;
    result r = both(&p, 2);
    for (int64_t h = 0; h < H; h++) p.log_f[100 * H + h] = NAN;
    result s = both(&p, 2);
    for (int64_t t = 0; t < 201; t++) {
        const size_t q = (size_t)(H * D), k = (size_t)D;
        if (t >= 100 && t < 121) cr_expect(isnan(s.o[t * H * D]) && isnan(s.gq[t * H * D]));
        if (t >= 70 && t < 121) continue;
        cr_expect(same(r.o + t * H * D, s.o + t * H * D, q), "o of token %lld", (long long)t);
        cr_expect(same(r.gq + t * H * D, s.gq + t * H * D, q), "gq of token %lld", (long long)t);
        cr_expect(same(r.gk + t * D, s.gk + t * D, k), "gk of token %lld", (long long)t);
        cr_expect(same(r.gv + t * D, s.gv + t * D, k), "gv of token %lld", (long long)t);
        cr_expect(same(r.gf + t * H, s.gf + t * H, (size_t)H), "glog_f of token %lld",
                  (long long)t);
    }
    drop_result(&r); drop_result(&s); drop(&p);
}

/* ---- gates ---------------------------------------------------------------------------------- */

static void gates(problem *p, int kind)
{
    uint64_t s = (uint64_t)kind;
    for (int64_t i = 0; i < p->B * p->T * p->H; i++) {
        const int64_t t = i / p->H;
        const double u = uniform(&s);
        const double logit = kind == 0 ? (u < 0.5 ? 20 : -20) : u < 0.9 ? 1e4 : -1e4;
        p->log_f[i] = kind < 2 ? log_sigmoid(logit)
                    : kind == 2 ? log(t % 2 ? 0.999 : 1e-6)
                    : kind == 3 ? (t == 200 ? -INFINITY : 0)
                    : kind == 4 ? -5 : -0.01;
    }
}

Test(forget_attention, strong_gates_equal_plain_loop)
{
    for (int kind = 0; kind < 6; kind++) {
        problem p = make(1, 300, 2, 1, 16, 0);
        gates(&p, kind);
        expect("gates", &p, NEAR, NEAR_GRAD, 0.1);
        drop(&p);
    }
}

Test(forget_attention, forgetting_all_leaves_the_own_value)
{
    problem p = make(1, 200, 2, 1, 16, 0);
    for (int64_t i = 0; i < 200 * 2; i++) p.log_f[i] = i % 3 ? -1e4f : -INFINITY;
    result r = forward(&p, 2);
    for (int64_t i = 0; i < 200 * 2 * 16; i++)
        cr_assert_eq(r.o[i], p.v[i / 32 * 16 + i % 16], "element %lld", (long long)i);
    drop_result(&r); drop(&p);
}

Test(forget_attention, forgetting_nothing_equals_no_gate_to_the_bit)
{
    problem p = make(2, 200, 2, 1, 16, 0);
    for (int64_t i = 0; i < 2 * 200 * 2; i++) p.log_f[i] = 0;
    result r = both(&p, 2);
    free(p.log_f), p.log_f = NULL;
    result s = both(&p, 2);
    const size_t n = 2 * 200 * 2 * 16;
    cr_assert(same(r.o, s.o, n) && same(r.gq, s.gq, n) && same(r.gk, s.gk, n / 2)
              && same(r.gv, s.gv, n / 2));
    drop_result(&r); drop_result(&s); drop(&p);
}

Test(forget_attention, gate_of_the_first_token_is_irrelevant_to_the_bit)
{
    problem p = make(1, 200, 2, 1, 16, 0);
    const int64_t length[] = { 90, 1, 109 };
    documents(&p, length, 3, 0);
    result r = both(&p, 2);
    p.log_f[0] = -3;                                         /* the first of each document */
    p.log_f[90 * 2] = NAN;
    p.log_f[91 * 2 + 1] = -70;
    result s = both(&p, 2);
    cr_assert(same(r.o, s.o, 200 * 2 * 16) && same(r.lse, s.lse, 200 * 2));
    cr_assert(same(r.gq, s.gq, 200 * 2 * 16) && same(r.gk, s.gk, 200 * 16));
    cr_assert(same(r.gv, s.gv, 200 * 16) && same(r.gf, s.gf, 200 * 2));
    drop_result(&r); drop_result(&s); drop(&p);
}

/* ---- logits --------------------------------------------------------------------------------- */

Test(forget_attention, extreme_logits_equal_plain_loop)
{
    for (int kind = 0; kind < 4; kind++) {
        problem p = make(1, 300, 2, 1, 16, 0);
        for (int64_t j = 0; j < 300; j++)
            for (int64_t d = 0; d < 16; d++) {
                fg_real *k = &p.k[j * 16 + d];
                if (kind == 0) *k += d ? 0 : (fg_real)j * (fg_real)0.2; /* growing with the key */
                if (kind == 1) *k += d ? 0 : (fg_real)(60 - 0.2 * (double)j);   /* backwards */
                if (kind == 2 && (j == 70 || j == 201)) *k = j == 70 ? 100 : -100;
                if (kind == 3) *k = 0;
            }
        for (int64_t i = 0; kind < 2 && i < 300 * 2; i++) p.q[i * 16] = (fg_real)fabs(p.q[i * 16]);
        expect("logits", &p, NEAR, NEAR_GRAD, 0.1);
        drop(&p);
    }
}

/* ---- gate gradient with a short memory ------------------------------------------------------ */

Test(forget_attention, gate_gradient_is_right_at_short_memory)
{
    static const double memory[] = { 4, 32 };
    for (int i = 0; i < 2; i++)
        for (int mean = 0; mean < 2; mean++) {
            problem p = make(1, 2048, 1, 1, 64, 0);
            free(p.v), free(p.glse), p.glse = NULL;
            p.v = normals(2048 * 64, 0.5 * mean, 77);
            for (int64_t t = 0; t < 2048; t++) p.log_f[t] = (fg_real)(-1 / memory[i]);
            expect(i ? "memory 32" : "memory 4", &p, NEAR, NEAR_GRAD, 0);
            drop(&p);
        }
}

/* ---- bits ----------------------------------------------------------------------------------- */

Test(forget_attention, threads_change_no_bit)
{
    problem p = make(2, 300, 4, 2, 24, 0);
    result r = both(&p, 1);
    for (int threads = 2; threads <= 3; threads++) {
        result s = both(&p, threads);
        const size_t n = 2 * 300 * 4 * 24, m = 2 * 300 * 4;
        cr_assert(same(r.o, s.o, n) && same(r.lse, s.lse, m));
        cr_assert(same(r.gq, s.gq, n) && same(r.gk, s.gk, n / 2)
                  && same(r.gv, s.gv, n / 2));
        cr_assert(same(r.gf, s.gf, m));
        drop_result(&s);
    }
    drop_result(&r); drop(&p);
}

Test(forget_attention, later_tokens_and_the_length_change_no_bit_of_earlier_rows)
{
    problem p = make(1, 300, 2, 1, 16, 0);
    result r = forward(&p, 2);
    for (int64_t t = 1; t < 300; t += 37) {
        problem c = make(1, 300 - t % 50, 2, 1, 16, 0);
        for (int64_t i = 0; i < c.T * 2 * 16; i++) c.q[i] = i < t * 2 * 16 ? p.q[i] : 3 * c.q[i];
        for (int64_t i = 0; i < c.T * 16; i++) c.k[i] = i < t * 16 ? p.k[i] : 10 * c.k[i];
        for (int64_t i = 0; i < c.T * 16; i++) c.v[i] = i < t * 16 ? p.v[i] : -9 * c.v[i];
        for (int64_t i = 0; i < c.T * 2; i++) c.log_f[i] = i < t * 2 ? p.log_f[i] : -20;
        result s = forward(&c, 1);
        const int64_t n = t < c.T ? t : c.T;
        cr_assert(same(r.o, s.o, (size_t)n * 2 * 16),
                  "a token from %lld on changed an earlier row", (long long)t);
        cr_assert(same(r.lse, s.lse, (size_t)n * 2));
        drop_result(&s); drop(&c);
    }
    drop_result(&r); drop(&p);
}
