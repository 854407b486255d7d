/* test_cuda_decode.c - one token after another on a GPU in bf16: as near to the exact logits as the
 * full pass in bf16 is, with padding and documents, one sequence or several, and the same bits with
 * and without recordings; skipped where there is no GPU. */
#include <criterion/criterion.h>
#include <math.h>
#include "device_cuda.h"
#include "fox_models.h"

enum { B = 3, T = 40, V = 61, CAPACITY = 48 };

typedef struct { int heads, batch; bool pad, documents; } kind;

static fg_tensor build(const kind *k, fg_tensor tokens)
{
    const fox_config c = fox_pro_config(V, 128, 2, k->heads);
    return fox_lm(tokens, &c);
}

static fg_store *store_for(const kind *k, fg_backend *b, fg_dtype precision)
{
    fg_graph *g = fg_graph_new();
    fg_store *s = fg_store_new(b);
    fg_param_info p;
    build(k, fg_input(g, "tokens", FG_I32, FG_DIMS(1, 1)));
    fg_store_precision(s, precision);
    cr_assert_eq(fg_store_init(s, g, 3), FG_OK, "%s", fg_store_message(s));
    for (int i = 0; fg_param_at(g, i, &p); i++) {            /* attention far from uniform */
        const int64_t n = fg_shape_count(p.shape);
        float *w = malloc((size_t)n * sizeof *w);
        fg_store_get(s, p.name, w, (size_t)n * 4);
        for (int64_t j = 0; j < n; j++) {
            if (p.init.kind == FG_NORMAL) w[j] *= 5;
            w[j] += 0.2f * sinf(1.3f * (float)j + (float)i);
        }
        fg_store_put(s, p.name, FG_F32, p.shape, w);
        free(w);
    }
    fg_graph_free(g);
    return s;
}

static int32_t first_of(const kind *k, int b, int t)
{
    const int low = k->pad ? 3 * b : 0;
    return k->documents && t >= low + 17 ? low + 17 : low;
}

static int32_t token_of(int b, int t) { return (17 * t + 5 * b * b + 3 * t * t + 1) % V; }

/* Positions in pieces of n; the logits of all, in order of sequence and position. */
static float *run(const kind *k, fg_store *s, int n, bool caches)
{
    float *all = malloc((size_t)(k->batch * T * V) * sizeof *all);
    float *out = malloc((size_t)(k->batch * n * V) * sizeof *out);
    int32_t piece[B * T], starts[B * T];
    fg_sequence q = { { 0 }, { 0 }, CAPACITY };
    fg_graph *g = fg_graph_new();
    const fg_tensor x = fg_input(g, "tokens", FG_I32, FG_DIMS(k->batch, n));
    if (k->pad || k->documents) q.first = fg_input(g, "first", FG_I32, FG_DIMS(k->batch, n));
    if (caches) q.past = fg_input(g, "past", FG_I32, FG_DIMS(1));
    fg_graph_sequence(g, q);
    const fg_tensor y = fg_output(build(k, x), "logits");
    fg_plan *p = fg_plan_new(g, s);
    fg_store_zero(s, "@cache.");
    for (int32_t at = 0; at < T; at += n) {
        for (int b = 0; b < k->batch; b++)
            for (int t = 0; t < n; t++) {
                piece[b * n + t] = token_of(b, at + t);
                starts[b * n + t] = first_of(k, b, at + t);
            }
        fg_write(p, x, piece, (size_t)(k->batch * n) * 4);
        if (!fg_absent(q.first)) fg_write(p, q.first, starts, (size_t)(k->batch * n) * 4);
        if (caches) fg_write(p, q.past, &at, 4);
        cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
        fg_read(p, y, out, (size_t)(k->batch * n * V) * 4);
        for (int b = 0; b < k->batch; b++)
            memcpy(all + (b * T + at) * V, out + b * n * V, (size_t)(n * V) * sizeof *out);
    }
    fg_plan_free(p);
    fg_graph_free(g);
    fg_store_remove(s, "@cache.");
    free(out);
    return all;
}

static double farthest(const kind *k, const float *x, const float *y)
{
    double worst = 0;
    for (int b = 0; b < k->batch; b++)
        for (int t = 0; t < T; t++)
            for (int c = 0; c < V && first_of(k, b, t) <= t; c++) {
                const int i = (b * T + t) * V + c;
                const double d = fabs((double)x[i] - (double)y[i]);
                if (!(d <= worst)) worst = d;            /* NaN stays */
            }
    return worst;
}

static void check(const kind *k, fg_backend *gpu, fg_backend *cpu)
{
    fg_store *s = store_for(k, gpu, FG_BF16), *exact = store_for(k, cpu, FG_F32);
    float *want = run(k, exact, T, false), *full = run(k, s, T, false);
    float *steps = run(k, s, 1, true);
    setenv("FG_NO_GRAPHS", "1", 1);
    float *plain = run(k, s, 1, true);
    unsetenv("FG_NO_GRAPHS");
    const double base = farthest(k, full, want), far = farthest(k, steps, want);
    fprintf(stderr, "%d heads, batch %d%s%s: steps off by %.2e, the full pass by %.2e\n", k->heads,
            k->batch, k->pad ? ", padded" : "", k->documents ? ", documents" : "", far, base);
    cr_expect_leq(far, 2 * base, "%d heads, batch %d, pad %d, documents %d: %g and %g", k->heads,
                  k->batch, k->pad, k->documents, far, base);
    cr_expect(!memcmp(steps, plain, (size_t)(k->batch * T * V) * sizeof *steps),
              "%d heads, batch %d: other bits without recordings", k->heads, k->batch);
    free(want); free(full); free(steps); free(plain);
    fg_store_free(s);
    fg_store_free(exact);
}

Test(cuda_decode, steps_are_as_near_to_exact_as_the_full_pass)
{
    static const kind kinds[] = {
        { 2, 1, false, false }, { 2, 1, false, true }, { 2, 3, true, false }, { 2, 2, true, true },
        { 1, 1, false, false }, { 1, 3, true, true }, { 4, 2, true, false },
    };
    fg_backend *gpu = fg__cuda_or_skip(true), *cpu = fg_backend_open("cpu", 0);
    for (size_t i = 0; gpu && i < sizeof kinds / sizeof kinds[0]; i++) check(&kinds[i], gpu, cpu);
    cr_expect_eq(fg__traps.broken, 0, "%d allocations were overrun", fg__traps.broken);
    fg_backend_close(gpu);
    fg_backend_close(cpu);
}
