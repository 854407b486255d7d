/* test_f64_cuda_rows.c - kernels that walk rows, with as many rows as a block walks and more, and
 * with parts of wider rows in place, against the CPU in double; skipped, with the reason, where
 * there is no GPU.
 *
 * Inputs are sixteenths, which bf16 holds exactly.  Bounds are relative to the norm: a result
 * rounded once to bf16 is off by 1.7e-3; 4e-3 for results, 8e-3 for gradients. */
#include <criterion/criterion.h>
#include <math.h>
#include "device_cuda.h"
#include "fox_autodiff.h"
#include "fox_ops.h"

typedef enum { NORM_OF_GATED, NORM_OF_HEADS, CAUSAL_CONV, FORGET_GATE } kind;
typedef struct { kind k; int64_t T, D, groups; bool documents; } size;

enum { IN, WEIGHT, BIAS, OUT_WEIGHT, INPUTS };       /* IN: two parts of D columns */
enum { RESULTS = 4 };                                /* y, and the gradients of the first three */

static fg_shape shape_of(const size *s, int i)
{
    switch (i) {
    case IN: return FG_DIMS(1, s->T, 2 * s->D);
    case WEIGHT: return s->k == CAUSAL_CONV ? FG_DIMS(s->D, 1, 4)
                      : FG_DIMS(s->k == NORM_OF_HEADS ? s->D / s->groups : s->D);
    case BIAS: return FG_DIMS(s->D);
    default: return FG_DIMS(1, s->T, s->D);
    }
}

static float *draw(const size *s, int i, uint64_t *seed)
{
    const int64_t n = fg_shape_count(shape_of(s, i));
    float *x = malloc((size_t)n * sizeof *x);
    for (int64_t k = 0; k < n; k++) {
        *seed = *seed * 6364136223846793005u + 1442695040888963407u;
        x[k] = (float)((int)(*seed >> 40) % 33 - 16) / 16;
        if (s->k == FORGET_GATE && i == WEIGHT) x[k] = 0.4f + 0.25f * x[k];      /* a bound */
    }
    return x;
}

/* The op on parts of one bf16 tensor. */
static fg_tensor apply(const size *s, const fg_tensor *in)
{
    const fg_tensor all = fg_cast(in[IN], FG_BF16);
    const fg_tensor one = fg_slice(all, -1, 0, s->D), other = fg_slice(all, -1, s->D, 2 * s->D);
    if (s->k == NORM_OF_GATED) return fg_norm_of_gated(other, in[WEIGHT], one, 1e-5, s->groups);
    if (s->k == NORM_OF_HEADS) {
        const fg_tensor x = fg_reshape(other, FG_DIMS(1, s->T, s->groups, s->D / s->groups));
        const fg_tensor y = fg_rms_norm(x, in[WEIGHT], 1e-5, 1);
        return fg_reshape(y, FG_DIMS(1, s->T, s->D));
    }
    if (s->k == CAUSAL_CONV) return fg_causal_conv(other, in[WEIGHT], in[BIAS], true);
    const fg_tensor k = fg_forget_gate(other, in[WEIGHT]), wide = fg_cast(k, FG_F32);
    return fg_add(wide, fg_result(k, 1));
}

static void run(const size *s, fg_backend *device, float **out)
{
    static const char *const names[] = { "in", "weight", "bias", "out_weight" };
    fg_graph *g = fg_graph_new();
    fg_tensor in[INPUTS], to[RESULTS], first = { 0 };
    for (int i = 0; i < INPUTS; i++) in[i] = fg_input(g, names[i], FG_F32, shape_of(s, i));
    if (s->documents) first = fg_input(g, "first", FG_I32, FG_DIMS(1, s->T));
    fg_graph_sequence(g, (fg_sequence){ .first = first });
    to[0] = fg_cast(apply(s, in), FG_F32);
    const fg_tensor each = fg_mul(to[0], in[OUT_WEIGHT]), loss = fg_sum(each);
    cr_assert_eq(fg_grad(loss, 3, in, to + 1), FG_OK, "%s", fg_graph_message(g));
    for (int i = 0; i < RESULTS; i++)
        if (fg_ok(to[i])) to[i] = fg_output(to[i], fg_name(g, "out%d", i));
    fg_store *store = fg_store_new(device);
    fg_plan *p = fg_plan_new(g, store);
    uint64_t seed = 1;
    for (int i = 0; i < INPUTS; i++) {
        float *x = draw(s, i, &seed);
        fg_write(p, in[i], x, (size_t)fg_count(in[i]) * 4);
        free(x);
    }
    int32_t *starts = malloc((size_t)s->T * 4);
    for (int64_t t = 0; t < s->T; t++) starts[t] = (int32_t)(t / 7 * 7);
    if (s->documents) fg_write(p, first, starts, (size_t)s->T * 4);
    free(starts);
    cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
    for (int i = 0; i < RESULTS; i++) {
        const size_t bytes = fg_ok(to[i]) ? (size_t)fg_count(to[i]) * 4 : 0;
        out[i] = bytes ? malloc(bytes) : NULL;
        if (bytes) cr_assert_eq(fg_read(p, to[i], out[i], bytes), FG_OK, "%s", fg_plan_message(p));
    }
    fg_plan_free(p);
    fg_store_free(store);
    fg_graph_free(g);
}

static double off(const float *got, const float *want, int64_t n)
{
    double diff = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        diff += ((double)got[i] - (double)want[i]) * ((double)got[i] - (double)want[i]);
        norm += (double)want[i] * (double)want[i];
    }
    return norm > 0 ? sqrt(diff / norm) : sqrt(diff);
}

static void compare(const size *s, fg_backend *gpu, fg_backend *cpu)
{
    static const char *const names[] = { "y", "gradient of x", "gradient of w", "gradient of b" };
    float *want[RESULTS], *got[RESULTS], *again[RESULTS];
    run(s, cpu, want);
    run(s, gpu, got);
    run(s, gpu, again);
    for (int i = 0; i < RESULTS; i++) {
        const int64_t n = fg_shape_count(shape_of(s, i ? i - 1 : OUT_WEIGHT));
        if (!want[i]) continue;
        const double far = off(got[i], want[i], n);
        cr_expect(far <= (i ? 8e-3 : 4e-3), "kind %d, %d x %d: %s is off by %.1e", (int)s->k,
                  (int)s->T, (int)s->D, names[i], far);
        cr_expect(!memcmp(got[i], again[i], (size_t)n * 4), "%s changed from run to run", names[i]);
        free(want[i]);
        free(got[i]);
        free(again[i]);
    }
}

Test(cuda_rows, blocks_that_walk_many_rows_and_parts_in_place)
{
    static const size cases[] = {
        { NORM_OF_GATED, 2500, 3072, 1, false }, { NORM_OF_GATED, 1700, 2080, 2, false },
        { NORM_OF_GATED, 1200, 4096, 1, false }, { NORM_OF_GATED, 130, 512, 4, false },
        { NORM_OF_HEADS, 2500, 1536, 12, false }, { NORM_OF_HEADS, 403, 192, 3, false },
        { NORM_OF_HEADS, 130, 64, 1, false }, { NORM_OF_HEADS, 130, 96, 2, false },
        { CAUSAL_CONV, 1000, 264, 1, false }, { CAUSAL_CONV, 403, 3328, 1, true },
        { CAUSAL_CONV, 47, 8, 1, false }, { FORGET_GATE, 1100, 264, 1, false },
    };
    fg_backend *gpu = fg__cuda_or_skip(true), *cpu = gpu ? fg_backend_open("cpu", 2) : NULL;
    for (int i = 0; gpu && i < (int)(sizeof cases / sizeof cases[0]); i++)
        compare(&cases[i], gpu, cpu);
    cr_expect_eq(fg__traps.broken, 0, "%d allocations were overrun", fg__traps.broken);
    fg_backend_close(gpu);
    fg_backend_close(cpu);
}
