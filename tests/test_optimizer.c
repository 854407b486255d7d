/* test_optimizer.c - AdamW, clipping and sums of gradients against their definitions in double. */
#include <criterion/criterion.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "ops.h"

/* More than one block of work, and a length that is no multiple of a vector. */
enum { COUNT = 40003, STEPS = 10 };
static const double BETA1 = 0.9, BETA2 = 0.95, EPS = 1e-3, DECAY = 0.1, LIMIT = 1.0, LR = 0.01;

typedef struct {
    fg_graph *g;
    fg_backend *b;
    fg_store *s;
    fg_plan *plan;
    fg_tensor grad, lr, step, squares, clip;
} trainer;

static trainer trainer_new(int threads)
{
    trainer t = { .g = fg_graph_new(), .b = fg_backend_open("cpu", threads) };
    t.s = fg_store_new(t.b);
    const fg_init normal = { .kind = FG_NORMAL, .a = 1 };
    const fg_tensor p = fg_param(t.g, "p", FG_DIMS(COUNT), normal);
    const fg_tensor m = fg_state(t.g, "@m", FG_F32, FG_DIMS(COUNT));
    const fg_tensor v = fg_state(t.g, "@v", FG_F32, FG_DIMS(COUNT));
    t.grad = fg_input(t.g, "g", FG_F32, FG_DIMS(COUNT));
    t.lr = fg_input(t.g, "lr", FG_F32, FG_DIMS(1));
    t.step = fg_input(t.g, "step", FG_F32, FG_DIMS(1));
    t.squares = FG_APPLY(sum_squares, FG_HERE, ((const fg_tensor[]){ t.grad }), 0);
    t.clip = FG_APPLY(clip_factor, FG_HERE, ((const fg_tensor[]){ t.squares }), LIMIT);
    FG_APPLY(adamw, FG_HERE, ((const fg_tensor[]){ p, m, v, t.grad, t.clip, t.lr, t.step }), BETA1,
             BETA2, EPS, DECAY);
    fg_output(t.squares, "squares");
    fg_output(t.clip, "clip");
    cr_assert_eq(fg_graph_status(t.g), FG_OK, "%s", fg_graph_message(t.g));
    cr_assert_eq(fg_store_init(t.s, t.g, 3), FG_OK, "%s", fg_store_message(t.s));
    t.plan = fg_plan_new(t.g, t.s);
    cr_assert_eq(fg_plan_status(t.plan), FG_OK, "%s", fg_plan_message(t.plan));
    return t;
}

static void trainer_free(trainer *t)
{
    fg_plan_free(t->plan);
    fg_store_free(t->s);
    fg_backend_close(t->b);
    fg_graph_free(t->g);
}

/* Gradients of step k, from small to large ones. */
static float gradient(int64_t i, int k)
{
    const uint64_t u = ((uint64_t)i * 2654435761u + (uint64_t)k * 40503u) * 0x9e3779b97f4a7c15u;
    return (float)(((double)(u >> 40) / 8388608.0 - 1) * (k % 3 == 0 ? 1e-3 : 2.0));
}

static void step(trainer *t, int k, int64_t bad, float value)
{
    float *g = malloc(COUNT * sizeof *g);
    for (int64_t i = 0; i < COUNT; i++) g[i] = i == bad ? value : gradient(i, k);
    const float lr = (float)LR, at = (float)k;
    fg_write(t->plan, t->grad, g, COUNT * sizeof *g);
    fg_write(t->plan, t->lr, &lr, sizeof lr);
    fg_write(t->plan, t->step, &at, sizeof at);
    cr_assert_eq(fg_run(t->plan), FG_OK, "%s", fg_plan_message(t->plan));
    free(g);
}

static float *values(trainer *t, const char *name)
{
    float *x = malloc(COUNT * sizeof *x);
    const fg_status s = fg_store_get(t->s, name, x, COUNT * sizeof *x);
    cr_assert_eq(s, FG_OK, "%s", fg_store_message(t->s));
    return x;
}

static float number(trainer *t, fg_tensor of)
{
    float y;
    cr_assert_eq(fg_read(t->plan, of, &y, sizeof y), FG_OK, "%s", fg_plan_message(t->plan));
    return y;
}

/* Loshchilov and Hutter's algorithm 2 as printed, with corrected moments, all in double. */
static void reference_step(double *p, double *m, double *v, int k)
{
    double squares = 0;
    for (int64_t i = 0; i < COUNT; i++) squares += (double)gradient(i, k) * gradient(i, k);
    const double clip = fmin(1, LIMIT / (sqrt(squares) + 1e-6)), lr = (double)(float)LR;
    for (int64_t i = 0; i < COUNT; i++) {
        const double g = clip * gradient(i, k);
        m[i] = BETA1 * m[i] + (1 - BETA1) * g;
        v[i] = BETA2 * v[i] + (1 - BETA2) * g * g;
        const double corrected_m = m[i] / (1 - pow(BETA1, k));
        const double corrected_v = v[i] / (1 - pow(BETA2, k));
        p[i] -= lr * DECAY * p[i];
        p[i] -= lr * corrected_m / (sqrt(corrected_v) + EPS);
    }
}

/* Each step rounds p three times; m and v carry errors of a few roundings a step, m's relative to
 * the largest g', at most some 30 times sqrt(v) + eps here: so 100 roundings of lr a step. */
Test(optimizer, adamw_follows_a_double_reference_for_ten_steps)
{
    trainer t = trainer_new(2);
    float *start = values(&t, "p");
    double *p = malloc(COUNT * sizeof *p);
    double *m = calloc(COUNT, sizeof *m), *v = calloc(COUNT, sizeof *v);
    for (int64_t i = 0; i < COUNT; i++) p[i] = start[i];
    bool clipped = false, whole = false;
    for (int k = 1; k <= STEPS; k++) {
        step(&t, k, -1, 0);
        reference_step(p, m, v, k);
        clipped = clipped || number(&t, t.clip) < 1;
        whole = whole || number(&t, t.clip) == 1;
    }
    cr_assert(clipped && whole, "both clipped and unclipped steps must occur");
    float *end = values(&t, "p");
    const double u = FLT_EPSILON / 2;
    for (int64_t i = 0; i < COUNT; i++) {
        const double bound = STEPS * u * (3 * fmax(fabs(p[i]), fabs((double)start[i])) + 100 * LR);
        cr_assert(fabs(end[i] - p[i]) <= bound, "entry %lld is %.9g, not %.9g within %.2g",
                  (long long)i, (double)end[i], p[i], bound);
        cr_assert(end[i] != start[i], "entry %lld did not move", (long long)i);
    }
    free(start); free(end); free(p); free(m); free(v);
    trainer_free(&t);
}

static void expect_untouched(float value)
{
    static const char *const names[] = { "p", "@m", "@v" };
    trainer t = trainer_new(2);
    float *before[3];
    step(&t, 1, -1, 0);
    for (int i = 0; i < 3; i++) before[i] = values(&t, names[i]);
    step(&t, 2, COUNT - 1, value);
    cr_expect(isnan(number(&t, t.clip)));
    for (int i = 0; i < 3; i++) {
        float *after = values(&t, names[i]);
        cr_expect_eq(memcmp(before[i], after, COUNT * sizeof *after), 0, "%s changed", names[i]);
        free(after);
        free(before[i]);
    }
    step(&t, 2, -1, 0);                                     /* and training goes on */
    float *after = values(&t, "p");
    for (int64_t i = 0; i < COUNT; i++) cr_assert(isfinite(after[i]));
    free(after);
    trainer_free(&t);
}

Test(optimizer, a_gradient_with_nan_leaves_everything_untouched) { expect_untouched(NAN); }
Test(optimizer, an_infinite_gradient_leaves_everything_untouched) { expect_untouched(-INFINITY); }

Test(optimizer, a_norm_that_overflows_leaves_everything_untouched) { expect_untouched(3e38f); }

Test(optimizer, any_number_of_threads_gives_the_same_bits)
{
    static const char *const names[] = { "p", "@m", "@v" };
    trainer one = trainer_new(1), three = trainer_new(3);
    for (int k = 1; k <= 3; k++) {
        step(&one, k, -1, 0);
        step(&three, k, -1, 0);
    }
    const float a = number(&one, one.squares), b = number(&three, three.squares);
    cr_expect_eq(memcmp(&a, &b, sizeof a), 0);
    for (int i = 0; i < 3; i++) {
        float *x = values(&one, names[i]), *y = values(&three, names[i]);
        cr_expect_eq(memcmp(x, y, COUNT * sizeof *x), 0, "%s differs", names[i]);
        free(x);
        free(y);
    }
    trainer_free(&one);
    trainer_free(&three);
}

/* A lane sums 512 squares in f32 and 32 lanes are added in 5 more; sums of blocks are f64. */
Test(optimizer, sum_squares_is_within_rounding_of_the_sum)
{
    trainer t = trainer_new(2);
    step(&t, 1, -1, 0);
    double squares = 0;
    for (int64_t i = 0; i < COUNT; i++) squares += (double)gradient(i, 1) * gradient(i, 1);
    cr_expect(fabs(number(&t, t.squares) - squares) <= 518 * FLT_EPSILON / 2 * squares);
    trainer_free(&t);
}

Test(optimizer, accumulate_adds_a_multiple)
{
    fg_graph *g = fg_graph_new();
    fg_backend *b = fg_backend_open("cpu", 2);
    fg_store *s = fg_store_new(b);
    const fg_tensor sum = fg_state(g, "@sum", FG_F32, FG_DIMS(COUNT));
    const fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(COUNT));
    FG_APPLY(accumulate, FG_HERE, ((const fg_tensor[]){ sum, x }), 0.25);
    fg_plan *plan = fg_plan_new(g, s);
    cr_assert_eq(fg_plan_status(plan), FG_OK, "%s", fg_plan_message(plan));
    float *v = malloc(COUNT * sizeof *v);
    for (int k = 1; k <= 3; k++) {
        for (int64_t i = 0; i < COUNT; i++) v[i] = (float)(i % 1024) + (float)k;  /* exact in f32 */
        fg_write(plan, x, v, COUNT * sizeof *v);
        cr_assert_eq(fg_run(plan), FG_OK, "%s", fg_plan_message(plan));
    }
    cr_assert_eq(fg_store_get(s, "@sum", v, COUNT * sizeof *v), FG_OK, "%s", fg_store_message(s));
    for (int64_t i = 0; i < COUNT; i++)
        cr_assert_eq(v[i], 0.25f * (3 * (float)(i % 1024) + 6), "entry %lld", (long long)i);
    free(v);
    fg_plan_free(plan);
    fg_store_free(s);
    fg_backend_close(b);
    fg_graph_free(g);
}
