/* test_store.c - parameters and states by name: first values, putting, getting, zeroing, errors. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "fox_graph.h"

static fg_backend *cpu;
static void open_cpu(void) { cpu = fg_backend_open("cpu", 2); }
static void close_cpu(void) { fg_backend_close(cpu); }
TestSuite(store, .init = open_cpu, .fini = close_cpu);

enum { N = 40000 };

/* The first values of one parameter of n elements; static, so one call at a time. */
static const float *first_values(fg_init init, int64_t n, uint64_t seed)
{
    static float x[N];
    fg_store *s = fg_store_new(cpu);
    fg_graph *g = fg_graph_new();
    fg_param(g, "p", FG_DIMS(n), init);
    cr_assert_eq(fg_store_init(s, g, seed), FG_OK, "%s", fg_store_message(s));
    cr_assert_eq(fg_store_get(s, "p", x, (size_t)n * 4), FG_OK);
    fg_graph_free(g);
    fg_store_free(s);
    return x;
}

static void moments(const float *x, double *mean, double *deviation)
{
    double sum = 0, squares = 0;
    for (int i = 0; i < N; i++) { sum += (double)x[i]; squares += (double)x[i] * (double)x[i]; }
    *mean = sum / N;
    *deviation = sqrt(squares / N - *mean * *mean);
}

/* ---- first values --------------------------------------------------------------------------- */

static void make(fg_graph *g, int which)
{
    static const char *const name[] = { "a", "b", "c" };
    fg_param(g, name[which], FG_DIMS(100, 100), ((fg_init){ .kind = FG_NORMAL, .a = 1 }));
}

Test(store, first_values_depend_on_seed_and_name_alone)
{
    static float x[2][10000], y[10000];
    fg_backend *alone = fg_backend_open("cpu", 1);
    for (int k = 0; k < 2; k++) {
        fg_store *s = fg_store_new(k ? alone : cpu);
        fg_graph *g = fg_graph_new();
        for (int i = 0; i < 3; i++) make(g, k ? 2 - i : i);      /* another order */
        if (k) fg_param(g, "more", FG_DIMS(7), ((fg_init){ .kind = FG_NORMAL, .a = 1 }));
        cr_assert_eq(fg_store_init(s, g, 9), FG_OK);
        fg_store_get(s, "b", x[k], sizeof x[k]);
        if (k) fg_store_get(s, "a", y, sizeof y);
        fg_graph_free(g);
        fg_store_free(s);
    }
    cr_expect(!memcmp(x[0], x[1], sizeof x[0]), "order or threads changed the values");
    cr_expect(memcmp(x[0], y, sizeof y), "two names have one stream");
    const float *other = first_values((fg_init){ .kind = FG_NORMAL, .a = 1 }, 10, 9);
    const float ninth = other[3];
    cr_expect_neq(first_values((fg_init){ .kind = FG_NORMAL, .a = 1 }, 10, 10)[3], ninth);
    fg_backend_close(alone);
}

/* The shape does not enter: element i is a function of (seed, name, i), so the first 10 of 40000
 * are the 10 of 10. */
Test(store, a_longer_parameter_begins_like_a_shorter_one)
{
    float ten[10];
    memcpy(ten, first_values((fg_init){ .kind = FG_UNIFORM, .a = 1 }, 10, 3), sizeof ten);
    const float *long_one = first_values((fg_init){ .kind = FG_UNIFORM, .a = 1 }, N, 3);
    cr_expect(!memcmp(ten, long_one, sizeof ten));
}

/* Limits are five standard errors: of a mean s / sqrt(N), of a deviation s / sqrt(2 N) for the
 * normal and less for the uniform distribution. */
Test(store, normal_and_uniform_have_their_moments)
{
    double mean, deviation;
    const float *x = first_values((fg_init){ .kind = FG_NORMAL, .a = 0.02 }, N, 1);
    moments(x, &mean, &deviation);
    cr_expect_float_eq(mean, 0, 5 * 0.02 / sqrt(N));
    cr_expect_float_eq(deviation, 0.02, 5 * 0.02 / sqrt(2.0 * N));
    int beyond = 0;
    for (int i = 0; i < N; i++) beyond += fabs((double)x[i]) > 2 * 0.02;
    cr_expect_float_eq((double)beyond / N, 0.0455, 5 * sqrt(0.0455 / N));    /* P(|z| > 2) */
    x = first_values((fg_init){ .kind = FG_UNIFORM, .a = 3 }, N, 1);
    moments(x, &mean, &deviation);
    cr_expect_float_eq(mean, 0, 5 * sqrt(3.0) / sqrt(N));
    cr_expect_float_eq(deviation, sqrt(3.0), 5 * sqrt(3.0) / sqrt(2.0 * N));
    for (int i = 0; i < N; i++) cr_assert(x[i] >= -3 && x[i] <= 3);
}

Test(store, kinds_without_chance_have_their_values)
{
    cr_expect_eq(first_values((fg_init){ .kind = FG_ZEROS }, 3, 1)[2], 0);
    cr_expect_eq(first_values((fg_init){ .kind = FG_ONES }, 3, 1)[2], 1);
    cr_expect_eq(first_values((fg_init){ .kind = FG_CONSTANT, .a = -2.5 }, 3, 1)[2], -2.5f);
    const float *x = first_values((fg_init){ .kind = FG_LOG_RANGE }, 5, 1);
    for (int i = 0; i < 5; i++) cr_expect_eq(x[i], (float)log(1.0 + i));
}

/* softplus(y) lies in [a, b] and its logarithm is uniform there; c is the least. */
Test(store, inverse_softplus_is_log_uniform)
{
    const fg_init init = { .kind = FG_INV_SOFTPLUS, .a = 1e-3, .b = 0.1, .c = 1e-2 };
    const float *x = first_values(init, N, 1);
    int least = 0;
    double sum = 0;
    for (int i = 0; i < N; i++) {
        const double t = log1p(exp((double)x[i]));
        cr_assert(t > 1e-2 * (1 - 1e-5) && t < 0.1 * (1 + 1e-5), "%g", t);
        least += t < 1e-2 * (1 + 1e-5);
        sum += log(t > 1e-2 ? t : 1e-2);
    }
    cr_expect_float_eq((double)least / N, 0.5, 5 * 0.5 / sqrt(N));       /* half of the decades */
    const double want = 0.5 * log(1e-2) + 0.5 * (log(1e-2) + log(0.1)) / 2;
    cr_expect_float_eq(sum / N, want, 5 * log(10) / sqrt(N));
}

/* sigmoid(y_i) = e^(-1/tau_i), tau from a to b in equal ratios. */
Test(store, log_decay_spaces_time_constants_evenly)
{
    const float *x = first_values((fg_init){ .kind = FG_LOG_DECAY, .a = 2, .b = 512 }, 9, 1);
    for (int i = 0; i < 9; i++) {
        const double f = 1 / (1 + exp(-(double)x[i]));
        cr_expect_float_eq(-1 / log(f), 2 * pow(2, i), 1e-4 * pow(2, i), "tau_%d", i);
    }
    cr_expect_float_eq(first_values((fg_init){ .kind = FG_LOG_DECAY, .a = 2, .b = 9 }, 1, 1)[0],
                       -log(expm1(0.5)), 1e-6);
}

Test(store, values_that_are_there_stay)
{
    fg_store *s = fg_store_new(cpu);
    fg_graph *g = fg_graph_new();
    const float mine[2] = { 5, 6 };
    float got[2];
    fg_param(g, "w", FG_DIMS(2), ((fg_init){ .kind = FG_ONES }));
    fg_param(g, "v", FG_DIMS(2), ((fg_init){ .kind = FG_ONES }));
    fg_store_put(s, "w", FG_F32, FG_DIMS(2), mine);
    cr_expect_eq(fg_store_init(s, g, 1), FG_OK);
    fg_store_get(s, "w", got, sizeof got);
    cr_expect(got[0] == 5 && got[1] == 6);
    fg_store_get(s, "v", got, sizeof got);
    cr_expect(got[0] == 1 && got[1] == 1);
    fg_graph_free(g);
    fg_store_free(s);
}

/* ---- entries -------------------------------------------------------------------------------- */

Test(store, what_is_put_is_got_and_sorted)
{
    fg_store *s = fg_store_new(cpu);
    const float x[3] = { 1, 1.0f / 3, -2 };
    const int32_t n[2] = { -7, INT32_MAX };
    float f[3];
    int32_t i[2];
    cr_expect_eq(fg_store_put(s, "z", FG_F32, FG_DIMS(3), x), FG_OK);
    cr_expect_eq(fg_store_put(s, "half", FG_BF16, FG_DIMS(3), x), FG_OK);
    cr_expect_eq(fg_store_put(s, "@n", FG_I32, FG_DIMS(2), n), FG_OK);
    cr_expect_eq(fg_store_get(s, "z", f, sizeof f), FG_OK);
    cr_expect(!memcmp(f, x, sizeof x));
    cr_expect_eq(fg_store_get(s, "half", f, sizeof f), FG_OK);
    cr_expect_eq(f[1], 0.333984375f, "bf16 of 1/3, to nearest even");
    cr_expect_eq(fg_store_get(s, "@n", i, sizeof i), FG_OK);
    cr_expect(!memcmp(i, n, sizeof n));
    static const char *const order[] = { "@n", "half", "z" };
    fg_store_entry e;
    cr_assert_eq(fg_store_count(s), 3);
    for (int k = 0; k < 3; k++) {
        cr_assert(fg_store_at(s, k, &e));
        cr_expect_str_eq(e.name, order[k]);
        cr_expect_eq(e.state, k == 0);
    }
    cr_expect(!fg_store_at(s, 3, &e) && !fg_store_at(s, -1, &e) && !fg_store_find(s, "y", &e));
    fg_store_free(s);
}

Test(store, a_prefix_is_zeroed_or_removed_and_no_other)
{
    fg_store *s = fg_store_new(cpu);
    static const char *const name[] = { "@grad.a", "@grad.b", "@gradient", "a" };
    const float x[2] = { 3, 4 };
    float got[2];
    fg_store_entry e;
    for (int i = 0; i < 4; i++) fg_store_put(s, name[i], FG_F32, FG_DIMS(2), x);
    cr_expect_eq(fg_store_zero(s, "@grad."), FG_OK);
    for (int i = 0; i < 4; i++) {
        fg_store_get(s, name[i], got, sizeof got);
        cr_expect_eq(got[1], i < 2 ? 0 : 4, "%s", name[i]);
    }
    fg_store_remove(s, "@grad.");
    cr_expect(!fg_store_find(s, "@grad.a", &e) && fg_store_find(s, "@gradient", &e));
    cr_expect_eq(fg_store_count(s), 2);
    fg_store_remove(s, "nothing");
    fg_store_remove(s, "");
    cr_expect_eq(fg_store_count(s), 0);
    fg_store_free(s);
}

/* ---- errors --------------------------------------------------------------------------------- */

static void expect_error(fg_store *s, fg_status got, fg_status want, const char *text)
{
    cr_expect_eq(got, want, "status %d: %s", (int)got, fg_store_message(s));
    cr_expect(strstr(fg_store_message(s), text), "got: %s\nwanted: %s", fg_store_message(s), text);
    fg_store_clear_error(s);
    cr_expect_eq(fg_store_status(s), FG_OK);
}

Test(store, misuse_is_a_status_with_the_numbers)
{
    fg_store *s = fg_store_new(cpu);
    const float x[6] = { 0 };
    float got[2];
    const int64_t seven[7] = { 1, 1, 1, 1, 1, 1, 1 };
    fg_store_put(s, "w", FG_F32, FG_DIMS(2, 3), x);
    expect_error(s, fg_store_get(s, "v", got, 8), FG_ERR_USAGE, "the store has no entry v");
    expect_error(s, fg_store_get(s, "w", got, 8), FG_ERR_USAGE, "w has 24 bytes, not 8");
    expect_error(s, fg_store_put(s, "w", FG_F32, FG_DIMS(6), x), FG_ERR_SHAPE,
                 "w is f32[2,3] in the store but f32[6]");
    expect_error(s, fg_store_put(s, "w", FG_BF16, FG_DIMS(2, 3), x), FG_ERR_SHAPE, "bf16[2,3]");
    expect_error(s, fg_store_put(s, "", FG_F32, FG_DIMS(1), x), FG_ERR_USAGE, "a name is needed");
    expect_error(s, fg_store_put(s, NULL, FG_F32, FG_DIMS(1), x), FG_ERR_USAGE, "a name is needed");
    expect_error(s, fg_store_put(s, "n", FG_F32, fg_dims(7, seven), x), FG_ERR_USAGE, "6 axes");
    expect_error(s, fg_store_put(s, "n", FG_F32, FG_DIMS(-1), x), FG_ERR_USAGE, "negative extent");
    expect_error(s, fg_store_put(s, "n", FG_F32, FG_DIMS(1LL << 40, 1LL << 40), x), FG_ERR_USAGE,
                 "too many elements");
    expect_error(s, fg_store_put(s, "n", (fg_dtype)3, FG_DIMS(1), x), FG_ERR_USAGE, "a dtype is");
    cr_expect_eq(fg_store_count(s), 1);
    fg_store_free(s);
}

Test(store, the_first_error_stays_until_it_is_cleared)
{
    fg_store *s = fg_store_new(cpu);
    float x;
    fg_store_get(s, "first", &x, 4);
    fg_store_get(s, "second", &x, 4);
    cr_expect_str_eq(fg_store_message(s), "the store has no entry first");
    fg_store_clear_error(s);
    cr_expect_str_eq(fg_store_message(s), "no error");
    fg_store_free(s);
}

Test(store, no_device_is_an_error_not_a_crash)
{
    fg_backend *b = fg_backend_open("cpu", -3);
    cr_expect_str_eq(fg_backend_message(b), "-3 threads: the number must be between 0 and 4096");
    fg_store *s = fg_store_new(b), *none = fg_store_new(NULL);
    const float x = 1;
    cr_expect_eq(fg_store_status(s), FG_ERR_USAGE);
    cr_expect_eq(fg_store_status(none), FG_ERR_USAGE);
    cr_expect_eq(fg_store_put(s, "x", FG_F32, FG_DIMS(1), &x), FG_ERR_USAGE);
    cr_expect_eq(fg_store_count(none), 0);
    fg_store_free(s);
    fg_store_free(none);
    fg_store_free(NULL);
    fg_backend_close(b);
    cr_expect_eq(fg_store_status(NULL), FG_ERR_MEMORY);
}
