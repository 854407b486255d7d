/* test_f64_cuda_forget_decode.c - one new token against a long cache in one launch, for all numbers
 * of blocks that share a head, against the formulas in double; skipped where there is no GPU.
 *
 * y is rounded once to bf16, which is 1.7e-3 of its norm; 4e-3 is allowed. */
#include <criterion/criterion.h>
#include <math.h>
#include "device_cuda.h"
#include "ops.h"

enum { K_CACHE, V_CACHE, F_CACHE, K_LAST, V_LAST, Q, K, V, KA, VA, F, G, FB, WQ, WK, WO, INPUTS };
static const char *const names[] = { "k_cache", "v_cache", "f_cache", "k_last", "v_last", "q", "k",
    "v", "ka", "va", "f", "g", "fb", "wq", "wk", "wo" };

typedef struct { int64_t B, C, H, D, window, past, first; bool forgets; } setting;
static const double scale = 0.3, eps = 1e-5;

static fg_shape shape_of(const setting *s, int i)
{
    if (i <= V_CACHE) return FG_DIMS(s->B, s->C, s->H, s->D);
    if (i == F_CACHE) return FG_DIMS(s->B, s->C, s->H);
    if (i <= V_LAST) return FG_DIMS(s->B, s->H, s->D);
    if (i == FB) return FG_DIMS(s->H);
    if (i >= WQ) return FG_DIMS(s->D);
    return i >= KA && i <= F ? FG_DIMS(s->B, 1, s->H) : FG_DIMS(s->B, 1, s->H * s->D);
}
static bool is_bf16(int i) { return i <= V_CACHE || (i >= K_LAST && i <= V) || i == G; }

/* Sixty-fourths in [-2,2], which bf16 holds; gains around 1, gates of a memory of some thousand. */
static float *draw(const setting *s, int i, uint64_t *seed)
{
    const int64_t n = fg_shape_count(shape_of(s, i));
    float *x = malloc((size_t)n * sizeof *x);
    for (int64_t k = 0; k < n; k++) {
        *seed = *seed * 6364136223846793005u + 1442695040888963407u;
        x[k] = (float)((int)(*seed >> 40) % 257 - 128) / 64;
        if (i == F_CACHE) x[k] = -expf(2 * x[k] - (s->forgets ? 2.0f : 9.0f));
        if (i == F || i == FB) x[k] = 3 + x[k];
        if (i >= WQ) x[k] = 1 + x[k] / 8;
    }
    return x;
}

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }

/* y = rms_norm(x) w, n of them */
static void norm(const double *x, const float *w, int64_t n, double *y)
{
    double squares = 0;
    for (int64_t d = 0; d < n; d++) squares += x[d] * x[d];
    for (int64_t d = 0; d < n; d++)
        y[d] = x[d] / sqrt(squares / (double)n + eps) * (double)w[d];
}

/* The new token's row of k or v, before its norm. */
static void shifted(const setting *s, float *const *in, int x, int64_t head, double *y)
{
    const int64_t D = s->D;
    const double a = sigmoid((double)in[x == K ? KA : VA][head]);
    const float *before = in[x == K ? K_LAST : V_LAST];
    for (int64_t d = 0; d < D; d++)
        y[d] = (s->past > s->first ? a * (double)before[head * D + d] : 0)
             + (1 - a) * (double)in[x][head * D + d];
}

static void head_of(const setting *s, float *const *in, int64_t head, double *y)
{
    const int64_t D = s->D, b = head / s->H, h = head % s->H;
    const int64_t least = s->window && s->past - s->window + 1 > s->first
                        ? s->past - s->window + 1 : s->first;
    double q[128], k[128], v[128], o[128] = { 0 }, sum = 0, most = -INFINITY, later = 0;
    double *score = malloc((size_t)s->C * sizeof *score);
    for (int64_t d = 0; d < D; d++) q[d] = (double)in[Q][head * D + d];
    norm(q, in[WQ], D, q);
    shifted(s, in, K, head, k), shifted(s, in, V, head, v);
    norm(k, in[WK], D, k);
    const double f = (double)in[F][head] + (double)in[FB][h];
    for (int64_t j = s->past; j >= least; j--) {
        const int64_t at = (b * s->C + j) * s->H + h;
        double z = 0;
        for (int64_t d = 0; d < D; d++)
            z += q[d] * (j == s->past ? k[d] : (double)in[K_CACHE][at * D + d]);
        score[j] = scale * z + later;
        most = fmax(most, score[j]);
        later += j == s->past ? fmin(f, 0) - log1p(exp(-fabs(f))) : (double)in[F_CACHE][at];
    }
    for (int64_t j = least; j <= s->past; j++) {
        const double w = exp(score[j] - most);
        const float *row = in[V_CACHE] + ((b * s->C + j) * s->H + h) * D;
        sum += w;
        for (int64_t d = 0; d < D; d++) o[d] += w * (j == s->past ? v[d] : (double)row[d]);
    }
    for (int64_t d = 0; d < D; d++) o[d] /= sum;
    norm(o, in[WO], D, o);
    for (int64_t d = 0; d < D; d++) y[d] = o[d] * sigmoid((double)in[G][head * D + d]);
    free(score);
}

/* The op on states; y. */
static float *run(const setting *s, float *const *in, fg_backend *gpu)
{
    fg_graph *g = fg_graph_new();
    fg_tensor t[INPUTS + 2];
    for (int i = 0; i < INPUTS; i++) {
        const fg_dtype type = is_bf16(i) ? FG_BF16 : FG_F32;
        t[i] = i < Q ? fg_state(g, names[i], type, shape_of(s, i))
             : fg_input(g, names[i], type, shape_of(s, i));
    }
    t[INPUTS] = fg_input(g, "first", FG_I32, FG_DIMS(s->B, 1));
    t[INPUTS + 1] = fg_input(g, "past", FG_I32, FG_DIMS(1));
    const fg_tensor all = FG_APPLY(forget_decode, FG_HERE, t, scale, s->window, eps, eps, eps,
                                   false);
    const fg_tensor y = fg_output(fg_result(all, 5), "y");
    cr_assert_eq(fg_graph_status(g), FG_OK, "%s", fg_graph_message(g));
    fg_store *store = fg_store_new(gpu);
    for (int i = 0; i < Q; i++)
        cr_assert_eq(fg_store_put(store, names[i], is_bf16(i) ? FG_BF16 : FG_F32, shape_of(s, i),
                                  in[i]), FG_OK, "%s", fg_store_message(store));
    fg_plan *p = fg_plan_new(g, store);
    for (int i = Q; i < INPUTS; i++)
        fg_write(p, t[i], in[i], (size_t)fg_count(t[i]) * 4);
    int32_t first[16], past = (int32_t)s->past;
    for (int64_t b = 0; b < s->B; b++) first[b] = (int32_t)s->first;
    fg_write(p, t[INPUTS], first, (size_t)s->B * 4);
    fg_write(p, t[INPUTS + 1], &past, 4);
    cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
    float *out = malloc((size_t)fg_count(y) * 4);
    fg_read(p, y, out, (size_t)fg_count(y) * 4);
    fg_plan_free(p);
    fg_store_free(store);
    fg_graph_free(g);
    return out;
}

static void check(const setting *s, fg_backend *gpu)
{
    const int64_t heads = s->B * s->H, n = heads * s->D;
    uint64_t seed = 5;
    float *in[INPUTS];
    for (int i = 0; i < INPUTS; i++) in[i] = draw(s, i, &seed);
    float *y = run(s, in, gpu), *again = run(s, in, gpu);
    double *want = malloc((size_t)n * sizeof *want), far = 0, norms = 0;
    cr_expect(!memcmp(y, again, (size_t)n * 4), "other bits from run to run");
#pragma omp parallel for schedule(dynamic)
    for (int64_t head = 0; head < heads; head++) head_of(s, in, head, want + head * s->D);
    for (int64_t i = 0; i < n; i++) {
        far += ((double)y[i] - want[i]) * ((double)y[i] - want[i]);
        norms += want[i] * want[i];
    }
    cr_expect(sqrt(far / norms) <= 4e-3, "B %d, %d heads of %d, past %d, window %d, first %d: off "
              "by %.1e of the norm", (int)s->B, (int)s->H, (int)s->D, (int)s->past, (int)s->window,
              (int)s->first, sqrt(far / norms));
    for (int i = 0; i < INPUTS; i++) free(in[i]);
    free(y), free(again), free(want);
}

Test(cuda_forget_decode, long_caches_lose_nothing)
{
    static const setting settings[] = {
        { 1, 8200, 24, 64, 0, 8199, 0, false }, { 1, 8400, 12, 128, 0, 8300, 0, false },
        { 1, 70000, 3, 64, 0, 69999, 0, false }, { 1, 70000, 1, 128, 0, 66000, 5000, false },
        { 1, 9000, 40, 64, 0, 8999, 0, true }, { 2, 9000, 20, 128, 8500, 8700, 100, false },
        { 1, 8300, 80, 64, 0, 8299, 3, false }, { 1, 8300, 140, 64, 0, 8250, 0, false },
        { 1, 70000, 2, 64, 9000, 69000, 0, false }, { 3, 70000, 1, 128, 0, 69000, 68999, true },
        { 1, 9000, 1, 64, 0, 8999, 8999, false }, { 1, 9000, 1, 128, 1, 8000, 0, false },
    };
    fg_backend *gpu = fg__cuda_or_skip(true);
    for (size_t i = 0; gpu && i < sizeof settings / sizeof settings[0]; i++)
        check(&settings[i], gpu);
    cr_expect_eq(fg__traps.broken, 0, "%d allocations were overrun", fg__traps.broken);
    fg_backend_close(gpu);
}
