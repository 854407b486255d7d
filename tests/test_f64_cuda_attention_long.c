/* test_f64_cuda_attention_long.c - forgetting attention on a GPU where the reference cannot be
 * whole: 65536 tokens with gradients, a million forward, tensors of more than 2^31 elements;
 * skipped, with the reason, where there is no GPU.  FG_TEST_LENGTH bounds T.
 *
 * Rows of o, lse and gq are compared with sums in double for these rows alone.  A key's gradient
 * needs lse and go.o of every row behind it: it is that of the op, given o and lse as the forward
 * pass gave them, which is what the op itself is given.  A gate's gradient is the sum of ds over
 * all pairs that its token lies between, i >= t > j:
 *     glog_f_t = sum_(i >= t) sum_(j < t) ds_ij
 * taken where these pairs are few: at both ends, and anywhere with a window or a short memory.
 * What is asked is said in attention_judge.h. */
#include "attention_judge.h"

enum { SAMPLES = 64 };
static const double FORGOTTEN = 80;      /* nats: e^-80 of a weight is nothing to a double */

/* ---- 65536 tokens and a million ------------------------------------------------------------- */

/* Rows are o's, lse and go.o as the device has them; all known from here on. */
static void take_forward(reference *r, float *const *y)
{
    const problem *p = r->p;
    for (int64_t i = 0; i < count_of(p, LSE); i++) {
        r->known[i] = true;
        r->out[LSE][i] = (double)y[LSE][i];
        r->state[i].dot = 0;
        for (int64_t e = i * p->s.D; e < (i + 1) * p->s.D; e++) {
            r->out[O][e] = (double)y[O][e];
            r->state[i].dot += (double)p->go[e] * r->out[O][e];
        }
    }
}

static double ds_of(const reference *r, int64_t b, int64_t h, int64_t i, int64_t j)
{
    const problem *p = r->p;
    const int64_t row = (b * p->s.M + i) * p->s.H + h;
    const double dp = dot(r, query_at(p, p->go, b, i, h), key_at(p, p->v, b, j, h), p->s.D);
    return pair(r, &r->state[row], weight_of(r, b, h, i, j), dp, (double)p->glse[row]);
}

/* Of token t; false where there are too many pairs. */
static bool gate_of(const reference *r, int64_t b, int64_t h, int64_t t, double *to)
{
    const problem *p = r->p;
    const double *c = r->c + (b * p->s.H + h) * p->N;
    int64_t pairs = 0;
    for (int count = 1; count >= 0; count--) {
        *to = 0;
        for (int64_t i = t; i < p->N && c[t] - c[i] < FORGOTTEN; i++) {
            if (first_key(p, b, i) >= t && p->s.window && !p->first) break;
            for (int64_t j = t - 1; j >= first_key(p, b, i) && c[j] - c[i] < FORGOTTEN; j--) {
                if (!count) *to += ds_of(r, b, h, i, j);
                else if (pairs++ > 1 << 23) return false;
            }
        }
    }
    return true;
}

/* Sampled keys and gates: the first and the last eight and, between, at odd distances. */
static bool is_sample(int64_t i, int64_t n, int64_t step)
{
    return i < 8 || i >= n - 8 || i % step == step / 3;
}

static void sample_columns(reference *r, bool *keys)
{
    const problem *p = r->p;
    const int64_t n = p->s.B * p->N * p->s.Hkv, step = p->N / (SAMPLES / 2) | 1;
#pragma omp parallel
    {
        double *own = numbers(2 * p->s.D);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < n; i++) {
            const int64_t j = i / p->s.Hkv % p->N;
            keys[i] = is_sample(j, p->N, step);
            if (keys[i]) column_of(r, i / p->s.Hkv / p->N, i % p->s.Hkv, j, own);
        }
        free(own);
    }
}

static void sample_gates(reference *r, bool *gates)
{
    const problem *p = r->p;
    const int64_t n = p->s.B * p->N * p->s.H, step = p->N / (SAMPLES / 2) | 1;
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < n; i++) {
        const int64_t t = i / p->s.H % p->N;
        gates[i] = p->log_f && is_sample(t, p->N, step) && (p->log_f[i] >= -100) &&
                   gate_of(r, i / p->s.H / p->N, i % p->s.H, t, &r->out[GLOG_F][i]);
    }
}

static void compare_samples(const setting *s, fg_backend *gpu)
{
    problem p = problem_new(*s);
    const bool gradient = s->past == NO_CACHE;
    reference exact = reference_new(&p, false, gradient), base = reference_new(&p, true, gradient);
    float *y[RESULTS];
    run(&p, gpu, y);
    reference_rows(&exact, count_of(&p, LSE) / SAMPLES | 1);
    reference_rows(&base, count_of(&p, LSE) / SAMPLES | 1);
    const allowance plain = { 0x1p-22 * reach_of(&exact), 0, 0 };
    for (int i = O; i <= (gradient ? GQ : LSE); i++)
        judge_result(&p, i, &exact, &base, y, exact.known, &plain);
    if (gradient) {
        bool *keys = calloc((size_t)(s->B * p.N * s->Hkv), sizeof *keys);
        bool *gates = calloc((size_t)(s->B * p.N * s->H), sizeof *gates);
        take_forward(&exact, y), take_forward(&base, y);
        const allowance of = allowance_of(&exact);
        sample_columns(&exact, keys), sample_columns(&base, keys);
        judge_result(&p, GK, &exact, &base, y, keys, &of);
        judge_result(&p, GV, &exact, &base, y, keys, &of);
        sample_gates(&exact, gates), sample_gates(&base, gates);
        judge_result(&p, GLOG_F, &exact, &base, y, gates, &of);
        free(keys), free(gates);
    }
    free_results(y);
    reference_free(&exact), reference_free(&base);
    problem_free(&p);
}

Test(cuda_attention_long, sampled_rows_keys_and_gates_are_as_good_as_their_definition)
{
    static const setting settings[] = {
        { 1, 65536, NO_CACHE, 2, 1, 64, 0, LONG_GATES, NORMAL, ONE_DOCUMENT, true, false },
        { 1, 65536, NO_CACHE, 1, 1, 128, 0, MEMORY_32, MEAN_V, ONE_DOCUMENT, true, false },
        { 1, 65536, NO_CACHE, 2, 2, 64, 4096, MEMORY_4, NORMAL, MANY, true, true },
        { 1, 65536, NO_CACHE, 2, 1, 128, 100, LONG_GATES, NORMAL, GIANT, true, false },
        { 1, 65536, NO_CACHE, 1, 1, 32, 0, MEMORY_32, NORMAL, ONE_DOCUMENT, false, false },
        { 1, 1 << 20, FORWARD_ONLY, 1, 1, 64, 0, LONG_GATES, NORMAL, ONE_DOCUMENT, true, false },
        { 1, 1 << 20, FORWARD_ONLY, 1, 1, 128, 4096, NO_GATES, NORMAL, MANY, true, false },
    };
    fg_backend *gpu = fg__cuda_or_skip(true);
    for (size_t i = 0; gpu && i < sizeof settings / sizeof settings[0]; i++) {
        seed = 301 + i;
        if (settings[i].M <= fg__longest()) compare_samples(&settings[i], gpu);
    }
    if (gpu) print_worst();
    cr_expect_eq(fg__traps.broken, 0, "%d allocations were overrun", fg__traps.broken);
    fg_backend_close(gpu);
}

/* ---- more than 2^31 elements ---------------------------------------------------------------- */

/* Sequence b of every input is one pattern times a factor that repeats after 7, 5 or 3 sequences:
 * sixteenths times quarters or eighths, which bf16 holds.  So the inputs are made on the device,
 * and an index that lost its upper half finds another sequence. */
enum { Q_IN, K_IN, V_IN, GO_IN, F_IN, GLSE_IN, INS };
static double factor(int i, int64_t b)
{
    static const int64_t period[] = { 7, 5, 3, 5, 3, 7 };
    return (double)(1 + b % period[i]) / (i == V_IN || i == GO_IN ? 4 : 8);
}
static int64_t width_of(const setting *s, int i)
{
    return i >= F_IN ? s->H : (i == K_IN || i == V_IN ? s->Hkv : s->H) * s->D;
}

static float *pattern(const setting *s, int i)
{
    const int64_t n = s->M * width_of(s, i);
    float *x = malloc((size_t)n * sizeof *x);
    for (int64_t k = 0; k < n; k++) {
        const double u = floor(33 * uniform()) - 16;
        x[k] = (float)(i == F_IN ? -fabs(u) / 256 : u / 16);
    }
    return x;
}

/* [B, T, heads, D] or [B, T, H] */
static fg_tensor big_input(fg_graph *g, const setting *s, int i, fg_tensor *small, fg_tensor *by)
{
    const int64_t H = i == K_IN || i == V_IN ? s->Hkv : s->H;
    const bool wide = i >= F_IN;
    *small = fg_input(g, fg_name(g, "small%d", i), wide ? FG_F32 : FG_BF16,
                      wide ? FG_DIMS(1, s->M, H) : FG_DIMS(1, s->M, H, s->D));
    *by = fg_input(g, fg_name(g, "by%d", i), wide ? FG_F32 : FG_BF16,
                   wide ? FG_DIMS(s->B, 1, 1) : FG_DIMS(s->B, 1, 1, 1));
    return fg_mul(*small, *by);
}

/* One sequence of it, on the host. */
static problem problem_of(setting s, float *const *in, int64_t b)
{
    problem p;
    s.B = 1;
    p = problem_new(s);
    float *const to[INS] = { p.q, p.k, p.v, p.go, p.log_f, p.glse };
    for (int i = 0; i < INS; i++)
        for (int64_t k = 0; k < s.M * width_of(&s, i); k++)
            to[i][k] = (float)((double)in[i][k] * factor(i, b));
    return p;
}

typedef struct { fg_graph *g; fg_tensor small[INS], by[INS], out[RESULTS]; } big;

static big big_new(const setting *s)
{
    big a = { .g = fg_graph_new() };
    fg_tensor in[INS];
    for (int i = 0; i < INS; i++) in[i] = big_input(a.g, s, i, &a.small[i], &a.by[i]);
    const double scale = 1 / sqrt((double)s->D);
    const fg_tensor none = { 0 }, front[] = { in[Q_IN], in[K_IN], in[V_IN], in[F_IN], none, none };
    a.out[O] = FG_APPLY(forget_attention, FG_HERE, front, scale, 0);
    a.out[LSE] = fg_result(a.out[O], 1);
    const fg_tensor back[] = { in[GO_IN], in[GLSE_IN], in[Q_IN], in[K_IN], in[V_IN], in[F_IN],
                               a.out[O], a.out[LSE], none };
    a.out[GQ] = FG_APPLY(forget_attention_grad, FG_HERE, back, scale, 0);
    for (int i = GK; i < RESULTS; i++) a.out[i] = fg_result(a.out[GQ], i - GQ);
    return a;
}

static void compare_sequence(const setting *s, float *const *in, int64_t b, float **y)
{
    problem p = problem_of(*s, in, b);
    reference exact = reference_new(&p, false, true), base = reference_new(&p, true, true);
    reference_rows(&exact, 1), reference_rows(&base, 1);
    reference_columns(&exact), reference_columns(&base);
    const allowance of = allowance_of(&exact);
    for (int i = 0; i < RESULTS; i++) judge_result(&p, i, &exact, &base, y, NULL, &of);
    reference_free(&exact), reference_free(&base);
    problem_free(&p);
}

/* Both ends, both sides of element 2^31, and one between. */
static void compare_big(const setting *s, fg_backend *gpu)
{
    const int64_t per = s->M * s->H * s->D, edge = ((int64_t)1 << 31) / per;
    const int64_t at[] = { 0, s->B / 3, edge - 1, edge, s->B - 1 };
    enum { AT = sizeof at / sizeof at[0] };
    big a = big_new(s);
    fg_tensor part[AT][RESULTS];
    float *in[INS], *y[RESULTS];
    for (int k = 0; k < AT; k++)
        for (int i = 0; i < RESULTS; i++) {
            part[k][i] = fg_slice(a.out[i], 0, at[k], at[k] + 1);
            fg_output(part[k][i], fg_name(a.g, "%s%d", result_names[i], k));
        }
    cr_assert_eq(fg_graph_status(a.g), FG_OK, "%s", fg_graph_message(a.g));
    fg_store *store = fg_store_new(gpu);
    fg_plan *plan = fg_plan_new(a.g, store);
    for (int i = 0; i < INS; i++) {
        float *by = malloc((size_t)s->B * sizeof *by);
        in[i] = pattern(s, i);
        for (int64_t b = 0; b < s->B; b++) by[b] = (float)factor(i, b);
        put(plan, a.small[i], in[i]), put(plan, a.by[i], by);
        free(by);
    }
    cr_assert_eq(fg_run(plan), FG_OK, "%s", fg_plan_message(plan));
    for (int k = 0; k < AT; k++) {
        for (int i = 0; i < RESULTS; i++) {
            y[i] = room(fg_count(part[k][i]));
            fg_read(plan, part[k][i], y[i], (size_t)fg_count(part[k][i]) * 4);
        }
        compare_sequence(s, in, at[k], y);
        free_results(y);
    }
    for (int i = 0; i < INS; i++) free(in[i]);
    fg_plan_free(plan);
    fg_store_free(store);
    fg_graph_free(a.g);
}

/* B H is above 65535 too, the most blocks along two of a grid's axes. */
Test(cuda_attention_long, tensors_of_more_than_2_to_the_31_elements)
{
    static const setting settings[] = {
        { 4099, 512, NO_CACHE, 16, 16, 64, 0, NORMAL_GATES, NORMAL, ONE_DOCUMENT, true, false },
        { 4099, 256, NO_CACHE, 16, 16, 128, 0, NORMAL_GATES, NORMAL, ONE_DOCUMENT, true, false },
    };
    fg_backend *gpu = fg__longest() < 65536 ? NULL : fg__cuda_or_skip(true);
    for (size_t i = 0; gpu && i < sizeof settings / sizeof settings[0]; i++) {
        seed = 401 + i;
        compare_big(&settings[i], gpu);
    }
    cr_expect_eq(fg__traps.broken, 0, "%d allocations were overrun", fg__traps.broken);
    fg_backend_close(gpu);
}
