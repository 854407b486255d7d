/* test_f64_cuda_large.c - ops that walk rows, and their gradients, over more than 2^31 elements on
 * a GPU; skipped, with the reason, where there is no GPU.
 *
 * x [R,P,C] is a pattern [P,C] times a factor that repeats after 7 of R, made on the device: an
 * index that lost its upper half finds another factor.  R's at both ends and on both sides of
 * element 2^31 of x and of y are compared with the CPU in double on these alone: off by at most
 * 2^-7 of the greatest, two roundings to bf16.  A weight's gradient is a sum over all R, which on
 * the CPU is one over 7 of them, each as many times as it occurs. */
#include <math.h>
#include "device_cuda.h"
#include "fox_autodiff.h"
#include "fox_ops.h"

enum { PERIOD = 7, AT = 7, VOCABULARY = 50257 };
static const int64_t LIMIT = (int64_t)1 << 31;

/* What an op has besides x: w [.,C] or [C], labels i32[R,P]. */
typedef fg_tensor (*row_op)(fg_tensor x, fg_tensor w, fg_tensor labels);
typedef struct {
    const char *name;
    row_op f;
    int64_t P, C, out;                   /* elements of a row of x, of y; out 0: y is [R,P] */
    int64_t rows_of_w;                   /* 0: w is [C]; < 0: there is none */
    bool wide;                           /* x is f32 */
} large;

static fg_tensor half_more(fg_tensor x, fg_tensor w, fg_tensor l)
{
    (void)w, (void)l;
    const fg_tensor half = fg_scale(x, 0.5, 0.25);
    return fg_add(x, half);
}
static fg_tensor to_bf16(fg_tensor x, fg_tensor w, fg_tensor l)
{
    (void)w, (void)l;
    return fg_cast(x, FG_BF16);
}
static fg_tensor silu(fg_tensor x, fg_tensor w, fg_tensor l)
{
    (void)w, (void)l;
    return fg_silu(x);
}
static fg_tensor softmax(fg_tensor x, fg_tensor w, fg_tensor l)
{
    (void)w, (void)l;
    return fg_softmax(x);
}
static fg_tensor swiglu(fg_tensor x, fg_tensor w, fg_tensor l)
{
    (void)w, (void)l;
    return fg_swiglu(x, FG_ACT_SILU);
}
static fg_tensor rms_norm(fg_tensor x, fg_tensor w, fg_tensor l)
{
    (void)l;
    return fg_rms_norm(x, w, 1e-5, 1);
}
static fg_tensor l2_norm(fg_tensor x, fg_tensor w, fg_tensor l)
{
    (void)w, (void)l;
    return fg_l2_norm(x, 1e-5);
}
static fg_tensor linear(fg_tensor x, fg_tensor w, fg_tensor l)
{
    const fg_tensor none = { 0 };
    (void)l;
    return fg_linear(x, fg_cast(w, FG_BF16), none);
}
static fg_tensor cross_entropy(fg_tensor x, fg_tensor w, fg_tensor l)
{
    (void)w;
    return fg_cross_entropy(x, l);
}
static fg_tensor loss_of_product(fg_tensor x, fg_tensor w, fg_tensor l)
{
    const fg_tensor none = { 0 }, small = fg_scale(w, 1.0 / 16, 0);      /* logits below 4 */
    return fg_cross_entropy(fg_linear(x, fg_cast(small, FG_BF16), none), l);
}

static const large ops[] = {
    { "add", half_more, 64, 1024, 1024, -1, false },
    { "cast", to_bf16, 64, 1024, 1024, -1, true },
    { "silu", silu, 63, 1001, 1001, -1, false },
    { "softmax", softmax, 64, 1000, 1000, -1, false },
    { "swiglu", swiglu, 64, 4096, 2048, -1, false },
    { "rms_norm", rms_norm, 64, 1536, 1536, 0, false },
    { "l2_norm", l2_norm, 64, 128, 128, -1, false },
    { "linear to 64", linear, 64, 1024, 64, 64, false },
    { "linear to 1024", linear, 64, 64, 1024, 1024, false },
    { "cross_entropy", cross_entropy, 8, VOCABULARY, 0, -1, false },
    { "linear_cross_entropy", loss_of_product, 64, 1024, 0, 97, false },
};

static uint64_t seed;
static float sixteenths(void)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (float)((int)(seed >> 40) % 33 - 16) / 16;
}
static double factor(int64_t r) { return (double)(1 + r % PERIOD) / 8; }

/* One graph: R rows of P of the factors and labels of `at`, or of 0 .. R - 1. */
typedef struct {
    const large *of;
    int64_t R;
    const int64_t *at;                   /* NULL: all */
    fg_graph *g;
    fg_tensor small, by, w, labels, weights, times, y, gx, gw;
} trial;

static fg_shape shape_of_w(const large *o)
{
    return o->rows_of_w > 0 ? FG_DIMS(o->rows_of_w, o->C) : FG_DIMS(o->C);
}

/* times: each R's share of the loss is taken that many times. */
static trial build(const large *o, int64_t R, const int64_t *at, bool times)
{
    trial t = { .of = o, .R = R, .at = at, .g = fg_graph_new() };
    const fg_dtype type = o->wide ? FG_F32 : FG_BF16;
    t.small = fg_input(t.g, "small", type, FG_DIMS(1, o->P, o->C));
    t.by = fg_input(t.g, "by", type, FG_DIMS(R, 1, 1));
    t.labels = fg_input(t.g, "labels", FG_I32, FG_DIMS(R, o->P));
    t.w = fg_input(t.g, "w", FG_F32, shape_of_w(o));
    t.times = fg_input(t.g, "times", FG_F32, o->out ? FG_DIMS(R, 1, 1) : FG_DIMS(R, 1));
    const fg_tensor x = fg_mul(t.small, t.by);
    t.y = o->f(x, t.w, t.labels);
    t.weights = fg_input(t.g, "weights", fg_dtype_of(t.y),
                         o->out ? FG_DIMS(1, o->P, o->out) : FG_DIMS(1, o->P));
    fg_tensor each = fg_mul(t.y, t.weights), wrt[] = { x, t.w }, grad[2];
    if (times) each = fg_mul(each, t.times);
    const fg_tensor loss = fg_sum(each);
    cr_assert_eq(fg_grad(loss, o->rows_of_w < 0 ? 1 : 2, wrt, grad), FG_OK, "%s: %s", o->name,
                 fg_graph_message(t.g));
    t.gx = grad[0], t.gw = o->rows_of_w < 0 ? (fg_tensor){ 0 } : grad[1];
    return t;
}

static void put(fg_plan *p, fg_tensor t, const void *x)
{
    cr_assert_eq(fg_write(p, t, x, (size_t)fg_count(t) * 4), FG_OK, "%s", fg_plan_message(p));
}

/* How often r and its like occur among n. */
static int64_t occurs(int64_t r, int64_t n) { return (n - 1 - r) / PERIOD + 1; }

static void put_pattern(fg_plan *p, fg_tensor t)
{
    float *x = malloc((size_t)fg_count(t) * sizeof *x);
    for (int64_t i = 0; i < fg_count(t); i++) x[i] = sixteenths();
    put(p, t, x);
    free(x);
}

static fg_plan *plan_of(const trial *t, fg_store *store, int64_t n)
{
    fg_plan *p = fg_plan_new(t->g, store);
    const int64_t P = t->of->P, V = t->of->rows_of_w > 0 ? t->of->rows_of_w : t->of->C;
    float *by = malloc((size_t)t->R * sizeof *by), *times = malloc((size_t)t->R * sizeof *times);
    int32_t *labels = malloc((size_t)(t->R * P) * sizeof *labels);
    for (int64_t r = 0; r < t->R; r++) {
        const int64_t at = t->at ? t->at[r] : r;
        by[r] = (float)factor(at), times[r] = (float)occurs(r, n);
        for (int64_t i = 0; i < P; i++)          /* repeat after 7 as well */
            labels[r * P + i] = (int32_t)((at % PERIOD * 31 + i * 5) % V);
    }
    seed = 1;
    put_pattern(p, t->small), put_pattern(p, t->w), put_pattern(p, t->weights);
    put(p, t->by, by), put(p, t->times, times), put(p, t->labels, labels);
    free(by), free(times), free(labels);
    return p;
}

static float *result(fg_plan *p, fg_tensor t)
{
    float *x = malloc((size_t)fg_count(t) * sizeof *x);
    cr_assert_eq(fg_read(p, t, x, (size_t)fg_count(t) * 4), FG_OK, "%s", fg_plan_message(p));
    return x;
}

static void run(const char *name, fg_plan *p)
{
    cr_assert_eq(fg_run(p), FG_OK, "%s: %s", name, fg_plan_message(p));
}

static void expect_near(const char *name, const char *what, int64_t at, const float *got,
                        const float *want, int64_t n, double part)
{
    double most = 0, far = 0;
    for (int64_t i = 0; i < n; i++) most = fmax(most, fabs((double)want[i]));
    for (int64_t i = 0; i < n; i++) {
        const double d = fabs((double)got[i] - (double)want[i]);
        if (!(d <= far)) far = isnan(d) ? INFINITY : d;
    }
    cr_expect(far <= part * most, "%s: %s at %lld is off by %.3g of %.3g", name, what,
              (long long)at, far, most);
    if (getenv("FG_TEST_VERBOSE"))
        fprintf(stderr, "%s: %s at %lld: off by %.1e of %.1e\n", name, what, (long long)at, far,
                most);
}

/* y and gx at `at`, of the whole on the GPU. */
static void compare_parts(const large *o, trial *big, fg_plan *p, fg_tensor part[AT][2],
                          fg_backend *cpu)
{
    fg_store *store = fg_store_new(cpu);
    trial few = build(o, AT, big->at, false);
    fg_output(few.y, "y"), fg_output(few.gx, "gx");
    fg_plan *q = plan_of(&few, store, AT);
    run(o->name, q);
    float *want[] = { result(q, few.y), result(q, few.gx) };
    for (int k = 0; k < AT; k++)
        for (int i = 0; i < 2; i++) {
            const int64_t n = fg_count(part[k][i]);
            float *got = result(p, part[k][i]);
            expect_near(o->name, i ? "gx" : "y", big->at[k], got, want[i] + k * n, n, 0x1p-7);
            free(got);
        }
    free(want[0]), free(want[1]);
    fg_plan_free(q), fg_graph_free(few.g), fg_store_free(store);
}

static void compare_weights(const large *o, const trial *big, fg_plan *p, fg_backend *cpu)
{
    fg_store *store = fg_store_new(cpu);
    trial few = build(o, PERIOD, NULL, true);
    fg_output(few.gw, "gw");
    fg_plan *q = plan_of(&few, store, big->R);
    run(o->name, q);
    float *want = result(q, few.gw), *got = result(p, big->gw);
    expect_near(o->name, "gw", 0, got, want, fg_count(few.gw), 0x1p-6);
    free(want), free(got);
    fg_plan_free(q), fg_graph_free(few.g), fg_store_free(store);
}

static void check(const large *o, fg_backend *gpu, fg_backend *cpu)
{
    const int64_t most = o->C > o->out ? o->C : o->out;
    const int64_t R = LIMIT / (o->P * most) + 20, x = LIMIT / (o->P * o->C);
    const int64_t y = o->out ? LIMIT / (o->P * o->out) : R, last = R - 1;
    const int64_t at[AT] = { 0, R / 3, x < R ? x - 1 : 1, x < R ? x : 2, y < R ? y - 1 : last - 2,
                             y < R ? y : last - 1, last };
    trial big = build(o, R, NULL, false);
    fg_tensor part[AT][2];
    for (int k = 0; k < AT; k++)
        for (int i = 0; i < 2; i++)
            part[k][i] = fg_output(fg_slice(i ? big.gx : big.y, 0, at[k], at[k] + 1),
                                   fg_name(big.g, "part%d.%d", k, i));
    if (!fg_absent(big.gw)) fg_output(big.gw, "gw");
    fg_store *store = fg_store_new(gpu);
    fg_plan *p = plan_of(&big, store, R);
    run(o->name, p);
    float *first = result(p, part[AT - 1][1]);
    run(o->name, p);
    float *again = result(p, part[AT - 1][1]);
    cr_expect(!memcmp(first, again, (size_t)fg_count(part[AT - 1][1]) * 4),
              "%s: gx changed from run to run", o->name);
    big.at = at;
    compare_parts(o, &big, p, part, cpu);
    if (!fg_absent(big.gw)) compare_weights(o, &big, p, cpu);
    free(first), free(again);
    fg_plan_free(p), fg_graph_free(big.g), fg_store_free(store);
}

Test(cuda_large, rows_beyond_element_2_to_the_31)
{
    fg_backend *gpu = fg__longest() < 65536 ? NULL : fg__cuda_or_skip(true);
    fg_backend *cpu = gpu ? fg_backend_open("cpu", 0) : NULL;
    for (size_t i = 0; gpu && i < sizeof ops / sizeof ops[0]; i++) check(&ops[i], gpu, cpu);
    cr_expect_eq(fg__traps.broken, 0, "%d allocations were overrun", fg__traps.broken);
    fg_backend_close(gpu);
    fg_backend_close(cpu);
}

/* ---- embedding ------------------------------------------------------------------------------ */

enum { E_P = 64, E_C = 1024, E_V = 1000 };
static int32_t token_at(int64_t r, int64_t p) { return (int32_t)((r % 11 * 31 + p * 7) % E_V); }

/* Sum over R of the weights of the rows that have the token. */
static float *table_gradient(const float *weights, int64_t R)
{
    float *g = malloc((size_t)E_V * E_C * sizeof *g);
    double *sum = calloc((size_t)E_V * E_C, sizeof *sum);
    for (int64_t r = 0; r < 11; r++)
        for (int64_t p = 0; p < E_P; p++)
            for (int64_t c = 0; c < E_C; c++)
                sum[token_at(r, p) * E_C + c] += (double)weights[p * E_C + c]
                                               * (double)((R - 1 - r) / 11 + 1);
    for (int64_t i = 0; i < E_V * E_C; i++) g[i] = (float)sum[i];
    free(sum);
    return g;
}

static void check_embedding(fg_backend *gpu)
{
    const int64_t R = LIMIT / (E_P * E_C) + 20;
    const int64_t at[] = { 0, R / 3, R - 21, R - 20, R - 1 };
    fg_graph *g = fg_graph_new();
    const fg_tensor tokens = fg_input(g, "tokens", FG_I32, FG_DIMS(R, E_P));
    const fg_tensor table = fg_input(g, "table", FG_BF16, FG_DIMS(E_V, E_C));
    const fg_tensor weights = fg_input(g, "weights", FG_BF16, FG_DIMS(1, E_P, E_C));
    const fg_tensor y = fg_embedding(tokens, table), each = fg_mul(y, weights);
    const fg_tensor loss = fg_sum(each);
    fg_tensor gw, part[5];
    cr_assert_eq(fg_grad(loss, 1, &table, &gw), FG_OK, "%s", fg_graph_message(g));
    for (int k = 0; k < 5; k++)
        part[k] = fg_output(fg_slice(y, 0, at[k], at[k] + 1), fg_name(g, "part%d", k));
    gw = fg_output(gw, "gw");
    fg_store *store = fg_store_new(gpu);
    fg_plan *p = fg_plan_new(g, store);
    int32_t *t = malloc((size_t)(R * E_P) * sizeof *t);
    float *rows = malloc((size_t)(E_V * E_C) * sizeof *rows);
    float *gy = malloc((size_t)(E_P * E_C) * sizeof *gy);
    for (int64_t i = 0; i < R * E_P; i++) t[i] = token_at(i / E_P, i % E_P);
    for (int64_t i = 0; i < E_V * E_C; i++) rows[i] = sixteenths();
    for (int64_t i = 0; i < E_P * E_C; i++) gy[i] = sixteenths();
    put(p, tokens, t), put(p, table, rows), put(p, weights, gy);
    run("embedding", p);
    for (int k = 0; k < 5; k++) {
        float *got = result(p, part[k]);
        for (int64_t i = 0; i < E_P; i++)
            expect_near("embedding", "y", at[k], got + i * E_C, rows + token_at(at[k], i) * E_C,
                        E_C, 0);
        free(got);
    }
    float *want = table_gradient(gy, R), *got = result(p, gw);
    expect_near("embedding", "gw", 0, got, want, E_V * E_C, 0x1p-7);
    free(want), free(got), free(t), free(rows), free(gy);
    fg_plan_free(p), fg_store_free(store), fg_graph_free(g);
}

Test(cuda_large, tables_read_and_summed_beyond_element_2_to_the_31)
{
    fg_backend *gpu = fg__longest() < 65536 ? NULL : fg__cuda_or_skip(true);
    if (gpu) check_embedding(gpu);
    cr_expect_eq(fg__traps.broken, 0, "%d allocations were overrun", fg__traps.broken);
    fg_backend_close(gpu);
}
