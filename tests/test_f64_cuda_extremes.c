/* test_f64_cuda_extremes.c - AdamW and the losses on a GPU where numbers are hard: gradients that
 * are 0, infinite or no number, moments below the smallest normal number, first and late steps;
 * logits of +-1e4, equal logits, labels that are ignored or outside; against the CPU in double;
 * skipped, with the reason, where there is no GPU. */
#include <math.h>
#include "device_cuda.h"
#include "fox_autodiff.h"
#include "ops.h"
#include "scan_run.h"

static float as_bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    u = (u + 0x7fffu + (u >> 16 & 1)) & 0xffff0000u;
    memcpy(&x, &u, sizeof x);
    return x;
}

static uint64_t seed;
static double uniform(void)              /* in (-1, 1) */
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (double)(seed >> 11) / 4503599627370496.0 - 1;
}

/* ---- AdamW ---------------------------------------------------------------------------------- */

enum { COUNT = 5003, P = 0, M, V, G, P16 = G, PARTS };       /* of the states; g is an input */
static const char *const names[] = { "p", "m", "v", "p16" };

/* Random p; m, v and g of these sizes, random in sign. */
typedef struct {
    const char *what;
    double m, v, g, lr, step, beta1, beta2, eps;
    float bad;                           /* g's last element, if it is not 0 */
} update;

static void draw_update(const update *u, float **x)
{
    seed = 7;
    for (int i = P; i <= G; i++) x[i] = malloc(COUNT * sizeof *x[i]);
    for (int64_t k = 0; k < COUNT; k++) {
        x[P][k] = (float)(3 * uniform());
        x[M][k] = (float)(u->m * uniform());
        x[V][k] = (float)(u->v * (1.5 + uniform()));
        x[G][k] = (float)(u->g * uniform());
    }
    if (u->bad != 0) x[G][COUNT - 1] = u->bad;
}

/* The states after one step. */
static void step(const update *u, fg_backend *device, bool with_bf16, float **y)
{
    float *x[G + 1], *narrow = malloc(COUNT * sizeof *narrow);
    const float lr = (float)u->lr, at = (float)u->step;
    const fg_shape s = FG_DIMS(COUNT), one = FG_DIMS(1);
    fg_graph *g = fg_graph_new();
    fg_tensor t[PARTS];
    draw_update(u, x);
    for (int i = P; i <= P16; i++)
        t[i] = fg_state(g, names[i], i == P16 ? FG_BF16 : FG_F32, s);
    const fg_tensor grad = fg_input(g, "g", FG_F32, s), rate = fg_input(g, "lr", FG_F32, one);
    const fg_tensor number = fg_input(g, "step", FG_F32, one);
    const fg_tensor squares = FG_APPLY(sum_squares, FG_HERE, ((const fg_tensor[]){ grad }), 0);
    const fg_tensor clip = FG_APPLY(clip_factor, FG_HERE, ((const fg_tensor[]){ squares }), 1.0);
    const fg_tensor plain[] = { t[P], t[M], t[V], grad, clip, rate, number };
    const fg_tensor both[] = { t[P], t[M], t[V], t[P16], grad, clip, rate, number };
    if (with_bf16) FG_APPLY(adamw_bf16, FG_HERE, both, u->beta1, u->beta2, u->eps, 0.1);
    else FG_APPLY(adamw, FG_HERE, plain, u->beta1, u->beta2, u->eps, 0.1);
    cr_assert_eq(fg_graph_status(g), FG_OK, "%s", fg_graph_message(g));
    fg_store *store = fg_store_new(device);
    for (int64_t k = 0; k < COUNT; k++) narrow[k] = as_bf16(x[P][k]);
    for (int i = P; i <= V; i++) fg_store_put(store, names[i], FG_F32, s, x[i]);
    fg_store_put(store, names[P16], FG_BF16, s, narrow);
    fg_plan *p = fg_plan_new(g, store);
    fg_write(p, grad, x[G], COUNT * sizeof(float));
    fg_write(p, rate, &lr, sizeof lr), fg_write(p, number, &at, sizeof at);
    cr_assert_eq(fg_run(p), FG_OK, "%s: %s", u->what, fg_plan_message(p));
    for (int i = P; i < (with_bf16 ? PARTS : P16); i++) {
        y[i] = malloc(COUNT * sizeof *y[i]);
        cr_assert_eq(fg_store_get(store, names[i], y[i], COUNT * sizeof *y[i]), FG_OK, "%s",
                     fg_store_message(store));
    }
    for (int i = P; i <= G; i++) free(x[i]);
    free(narrow);
    fg_plan_free(p), fg_store_free(store), fg_graph_free(g);
}

/* m, v and p have some 4 roundings each; below 2^-126 a rounding is of 2^-149.  What that leaves of
 * v passes to p: half of it, of the change. */
static double bound_of(const update *u, int i, float before, double want)
{
    const double unit = 0x1p-22, least = 0x1p-147;
    if (i == M) return unit * (fabs((double)before) + fabs(want) + u->g) + least;
    if (i == V) return unit * want + least;
    const double v = u->v > 0 ? u->v / 2 : u->g * u->g;
    const double more = v > 0 && v < 0x1p-126 ? least / v : 0;
    return unit * (fabs((double)before) + fabs(want)) + more * fabs(want - (double)before);
}

static void check_update(const update *u, fg_backend *gpu, fg_backend *cpu, bool with_bf16)
{
    float *x[G + 1], *want[PARTS], *got[PARTS];
    const bool skipped = u->bad != 0;
    draw_update(u, x);
    step(u, cpu, with_bf16, want), step(u, gpu, with_bf16, got);
    for (int i = P; i <= V; i++)
        for (int64_t k = 0; k < COUNT; k++) {
            const float should = skipped ? x[i][k] : want[i][k];     /* f64: a norm that fits */
            const double d = fabs((double)got[i][k] - (double)should);
            const double may = skipped ? 0 : bound_of(u, i, x[i][k], (double)should);
            cr_assert(d <= may && isfinite(got[i][k]), "%s%s: %s[%lld] is %.9g, not %.9g, before "
                      "%.9g", u->what, with_bf16 ? ", with p in bf16" : "", names[i], (long long)k,
                      (double)got[i][k], (double)should, (double)x[i][k]);
        }
    for (int64_t k = 0; k < COUNT && with_bf16; k++)
        cr_assert(got[P16][k] == as_bf16(got[P][k]), "%s: p16[%lld] is %.9g, p is %.9g", u->what,
                  (long long)k, (double)got[P16][k], (double)got[P][k]);
    for (int i = P; i <= G; i++) free(x[i]);
    for (int i = P; i < (with_bf16 ? PARTS : P16); i++) free(want[i]), free(got[i]);
}

Test(cuda_extremes, adamw_keeps_its_head)
{
    static const update updates[] = {
        { "no gradient at all", 0, 0, 0, 1e-3, 1, 0.9, 0.95, 1e-8, 0 },
        { "no gradient", 0.1, 0.1, 0, 1e-3, 1000, 0.9, 0.95, 1e-8, 0 },
        { "v below 2^-126", 1e-21, 1e-40, 1e-22, 1e-3, 1000, 0.9, 0.95, 1e-20, 0 },
        { "v below 2^-126, no gradient", 1e-21, 1e-40, 0, 1e-3, 1, 0.9, 0.95, 1e-8, 0 },
        { "g^2 below 2^-126", 0, 0, 1e-20, 1e-3, 1, 0.9, 0.95, 1e-8, 0 },
        { "first step", 0, 0, 1e-3, 1e-3, 1, 0.9, 0.95, 1e-8, 0 },
        { "first step, clipped", 0, 0, 1e3, 1e-3, 1, 0.9, 0.95, 1e-8, 0 },
        { "step 2^24", 0.1, 0.1, 0.1, 1e-3, 16777216, 0.9, 0.999, 1e-8, 0 },
        { "step 1e9", 0.1, 0.1, 0.1, 1e-3, 1e9, 0.9, 0.95, 1e-8, 0 },
        { "step 1e30", 0.1, 0.1, 0.1, 1e-3, 1e30, 0.999, 0.99999, 1e-8, 0 },
        { "betas of 0", 0.1, 0.1, 0.1, 1e-3, 3, 0, 0, 1e-8, 0 },
        { "a rate of 0", 0.1, 0.1, 0.1, 0, 3, 0.9, 0.95, 1e-8, 0 },
        { "NaN", 0.1, 0.1, 0.1, 1e-3, 3, 0.9, 0.95, 1e-8, NAN },
        { "infinity", 0.1, 0.1, 0.1, 1e-3, 3, 0.9, 0.95, 1e-8, -INFINITY },
        { "a norm that overflows", 0.1, 0.1, 0.1, 1e-3, 3, 0.9, 0.95, 1e-8, 3e38f },
    };
    fg_backend *gpu = fg__cuda_or_skip(true), *cpu = gpu ? exact_cpu() : NULL;
    for (size_t i = 0; gpu && i < sizeof updates / sizeof updates[0]; i++)
        for (int with_bf16 = 0; with_bf16 < 2; with_bf16++)
            check_update(&updates[i], gpu, cpu, with_bf16);
    cr_expect_eq(fg__traps.broken, 0, "%d allocations were overrun", fg__traps.broken);
    fg_backend_close(gpu);
    fg_backend_close(cpu);
}

/* ---- losses --------------------------------------------------------------------------------- */

typedef enum { BOTH_SIGNS, ONE_GREAT, EQUAL, ZERO, USUAL, LOGITS } logits;
typedef enum { VALID, IGNORED, SOME_IGNORED, OUTSIDE, LABELS } label_kind;
typedef enum { WHOLE, MEAN, SQUARES } form;      /* logits; a product, its loss a mean; or not */
static const char *const logit_names[] = { "logits of +-9984", "one of 9984 among -9984",
    "all of 9984", "all 0", "usual logits" };
static const char *const label_names[] = { "", ", ignored", ", some ignored", ", one outside" };

enum { N = 64, RESULTS = 3 };            /* the rows' losses; gradients of x (or logits) and w */
typedef struct { int64_t T, V; form how; logits is; label_kind labels; bool bf16; } trial;

/* x_t = 128 e_(t mod 64), w = +-78: products of +-9984, which bf16 holds. */
static void fill_product(const trial *s, float *x, float *w)
{
    seed = 3;
    for (int64_t i = 0; i < s->T * N; i++)
        x[i] = s->is == ZERO ? 0 : s->is == USUAL ? as_bf16((float)uniform())
             : i / N % N == i % N ? 128.0f : 0.0f;
    for (int64_t i = 0; i < s->V * N; i++)
        w[i] = s->is == USUAL ? as_bf16((float)uniform()) : s->is == EQUAL ? 78.0f
             : s->is == ONE_GREAT ? (i / N == i % N * 17 % s->V ? 78.0f : -78.0f)
             : uniform() < 0 ? 78.0f : -78.0f;
}

static void fill_labels(const trial *s, int32_t *l)
{
    for (int64_t t = 0; t < s->T; t++) {
        l[t] = (int32_t)(t % 3 ? t * 7919 % s->V : t % N * 17 % s->V);
        if (s->labels == IGNORED || (s->labels == SOME_IGNORED && t % 2)) l[t] = -100;
    }
    if (s->labels == OUTSIDE) l[s->T / 2] = (int32_t)s->V;
}

static double *product_of(const trial *s, const float *x, const float *w)
{
    double *z = calloc((size_t)(s->T * s->V), sizeof *z);
#pragma omp parallel for
    for (int64_t t = 0; t < s->T; t++)
        for (int64_t c = 0; c < s->V; c++)
            for (int64_t k = 0; k < N; k++)
                z[t * s->V + c] += (double)x[t * N + k] * (double)w[c * N + k];
    return z;
}

/* The gradient by x, or by the logits, is out[1]; by w, out[2], or NULL. */
static void run(const trial *s, fg_backend *device, float **out)
{
    const fg_dtype type = s->bf16 ? FG_BF16 : FG_F32;
    float *x = malloc((size_t)(s->T * N) * 4), *w = malloc((size_t)(s->V * N) * 4), *z = NULL;
    int32_t *l = malloc((size_t)s->T * 4);
    fg_graph *g = fg_graph_new();
    const fg_tensor labels = fg_input(g, "labels", FG_I32, FG_DIMS(s->T)), none = { 0 };
    fg_tensor in[2] = { { 0 } }, to[RESULTS] = { { 0 } }, grad[2];
    fill_product(s, x, w), fill_labels(s, l);
    in[0] = fg_input(g, "x", type, FG_DIMS(s->T, s->how == WHOLE ? s->V : N));
    if (s->how != WHOLE) in[1] = fg_input(g, "w", type, FG_DIMS(s->V, N));
    const fg_tensor y = s->how == WHOLE ? in[0] : fg_linear(in[0], in[1], none);
    to[0] = fg_cross_entropy(y, labels);
    const fg_tensor loss = s->how == SQUARES ? weighted(to[0], to[0]) : fg_mean(to[0]);
    cr_assert_eq(fg_grad(loss, s->how == WHOLE ? 1 : 2, in, grad), FG_OK, "%s",
                 fg_graph_message(g));
    for (int i = 1; i < (s->how == WHOLE ? 2 : 3); i++) to[i] = grad[i - 1];
    for (int i = 0; i < RESULTS; i++)
        if (!fg_absent(to[i])) fg_output(to[i], fg_name(g, "out%d", i));
    fg_store *store = fg_store_new(device);
    fg_plan *p = fg_plan_new(g, store);
    if (s->how == WHOLE) {
        double *exact = product_of(s, x, w);
        z = malloc((size_t)(s->T * s->V) * 4);
        for (int64_t i = 0; i < s->T * s->V; i++)
            z[i] = s->bf16 ? as_bf16((float)exact[i]) : (float)exact[i];
        free(exact);
    }
    fg_write(p, in[0], z ? z : x, (size_t)fg_count(in[0]) * 4);
    if (!z) fg_write(p, in[1], w, (size_t)fg_count(in[1]) * 4);
    fg_write(p, labels, l, (size_t)s->T * 4);
    cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
    for (int i = 0; i < RESULTS; i++) {
        const size_t bytes = fg_absent(to[i]) ? 0 : (size_t)fg_count(to[i]) * 4;
        out[i] = bytes ? malloc(bytes) : NULL;
        if (bytes) cr_assert_eq(fg_read(p, to[i], out[i], bytes), FG_OK, "%s", fg_plan_message(p));
    }
    free(x), free(w), free(l), free(z);
    fg_plan_free(p), fg_store_free(store), fg_graph_free(g);
}

/* lse is a sum in f32 of what lies around the greatest logit: four roundings of that; a logit of
 * usual size is rounded to bf16 itself, 2^-9 of at most 16.  Gradients: of what is added, two
 * roundings to bf16 and what the logits' is to e^z; in f32 the loss's error alone. */
static double bound_of_loss(const trial *s, int i)
{
    const bool usual = s->is == USUAL, rounds = usual && s->bf16 && s->how != WHOLE;
    const double z = usual ? 16 : 9984, lse = 4 * 0x1p-24 * z + 1e-6 + (rounds ? z * 0x1p-9 : 0);
    const double gloss = s->how == SQUARES ? 2 * (2 * z + 12) : 1.0 / (double)s->T;
    const double factor = s->how == WHOLE ? 1 : i == 1 ? (usual ? 1 : 78) : usual ? 1 : 128;
    const double part = (s->bf16 ? 0x1p-7 : 1e-6) + 2 * lse;
    if (i == 0) return lse;
    return part * 2 * gloss * factor * (i == 2 ? ceil((double)s->T / N) * 2 : 1);
}

static void compare(const trial *s, fg_backend *gpu, fg_backend *cpu)
{
    const int64_t count[] = { s->T, s->T * (s->how == WHOLE ? s->V : N), s->V * N };
    static const char *const parts[] = { "loss", "gradient of x", "gradient of w" };
    float *want[RESULTS], *got[RESULTS], *again[RESULTS];
    run(s, cpu, want), run(s, gpu, got), run(s, gpu, again);
    for (int i = 0; i < RESULTS; i++) {
        const double may = s->labels == IGNORED ? 0 : bound_of_loss(s, i);
        int64_t bad = 0, at = 0, none = 0;
        for (int64_t k = 0; got[i] && k < count[i]; k++) {
            const bool as_asked = isnan(want[i][k]) ? isnan(got[i][k])
                                : fabs((double)got[i][k] - (double)want[i][k]) <= may;
            if (!as_asked && !bad++) at = k;
            none += isnan(got[i][k]) != 0;
        }
        cr_expect_eq(bad, 0, "T = %d, V = %d, %s, %s%s%s: %s: %lld are wrong, first %lld: %.9g, "
                     "not %.9g", (int)s->T, (int)s->V, s->bf16 ? "bf16" : "f32",
                     logit_names[s->is], label_names[s->labels], s->how == WHOLE ? "" :
                     s->how == MEAN ? ", mean of a product's" : ", squares of a product's",
                     parts[i], (long long)bad, (long long)at,
                     bad ? (double)got[i][at] : 0, bad ? (double)want[i][at] : 0);
        cr_expect(s->labels == OUTSIDE || none == 0, "%lld of %s are NaN", (long long)none,
                  parts[i]);
        cr_expect(!got[i] || !memcmp(got[i], again[i], (size_t)count[i] * 4),
                  "%s changed from run to run", parts[i]);
        free(want[i]), free(got[i]), free(again[i]);
    }
}

/* Rows that fit in a warp, in a block's shared memory, and in neither. */
Test(cuda_extremes, losses_are_finite_whatever_the_logits)
{
    static const int64_t vocabularies[] = { 5, 1000, 50257, 60001 }, rows[] = { 37, 140 };
    fg_backend *gpu = fg__cuda_or_skip(true), *cpu = gpu ? exact_cpu() : NULL;
    int n = 0;
    for (int v = 0; gpu && v < 4; v++)
        for (int how = WHOLE; how <= SQUARES; how++)
            for (int is = 0; is < LOGITS; is++)
                for (int labels = 0; labels < LABELS; labels++) {
                    if (labels == OUTSIDE && (how != WHOLE || is != USUAL)) continue;
                    if (labels != VALID && is != USUAL && (v > 1 || is != BOTH_SIGNS)) continue;
                    trial s = { rows[n % 2], vocabularies[v], how, is, labels, n / 2 % 2 == 0 };
                    n++;
                    compare(&s, gpu, cpu);
                    s.bf16 = !s.bf16;
                    if (v < 2) compare(&s, gpu, cpu);
                }
    cr_expect_eq(fg__traps.broken, 0, "%d allocations were overrun", fg__traps.broken);
    fg_backend_close(gpu);
    fg_backend_close(cpu);
}
