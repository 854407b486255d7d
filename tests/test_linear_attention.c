/* test_linear_attention.c - gated linear attention and the delta rule in float: strong gates, hard
 * keys, long carries, causality, documents and determinism to the bit. */
#include <stdio.h>
#include "linear_attention.h"

/* Outputs and gradients against the recurrence in double. */
static void expect_close(const char *what, const problem *p, numbers *x, double bound)
{
    static const char *const names[] = { "q", "k", "v", "gate", "state" };
    numbers y = numbers_new(p, 1);
    reference(p, x, true);
    library(p, x, &y, true, 2);
    double d = distance(y.o, x->o, count_of(p, VALUE));
    cr_expect(d < bound, "%s, %s: o differs by %.1e", kind_name[p->what], what, d);
    d = distance(y.S, x->S, count_of(p, STATE));
    cr_expect(d < bound, "%s, %s: S differs by %.1e", kind_name[p->what], what, d);
    for (int i = 0; i < (p->state ? 5 : 4); i++) {
        double most = 0;
        for (int64_t k = 0; k < count_of(p, i); k++) most = fmax(most, fabs(x->grad[i][k]));
        d = most > 0 ? distance(y.grad[i], x->grad[i], count_of(p, i)) : 0;
        cr_expect(d < bound, "%s, %s: gradient of %s differs by %.1e", kind_name[p->what], what,
                  names[i], d);
    }
    numbers_free(&y);
}

/* ---- gates ----------------------------------------------------------------------------------- */

typedef double (*gate_rule)(int64_t t, int64_t d, double old);
static double none(int64_t t, int64_t d, double old) { return 0 * ((double)(t + d) + old); }
static double one_channel(int64_t t, int64_t d, double old) { return t > 0 && d == 3 ? -100 : old; }
static double one_reset(int64_t t, int64_t d, double old) { return d && t == 37 ? -1e4 : old; }
static double infinite(int64_t t, int64_t d, double old) { return (t + d) % 5 ? old : -INFINITY; }
static double all_strong(int64_t t, int64_t d, double old)
{
    return old - 20 - (double)(0 * t * d);
}
static double alternate(int64_t t, int64_t d, double old)
{
    return (t + d) % 2 ? -1e-3 : -13.8 + 0 * old;
}
static double mixed(int64_t t, int64_t d, double old)
{
    return t % 3 ? old : -6 * (double)d - 0.01 * old;
}
static double at_80_nats(int64_t t, int64_t d, double old)   /* over 16 rows, less and more */
{
    return -(80.0 / 15) * (1 + (d % 2 ? 1e-3 : -1e-3)) + 0 * ((double)t + old);
}

Test(linear_attention, gates_from_0_to_minus_infinity_give_what_the_recurrence_gives)
{
    static const struct { const char *what; gate_rule rule; } cases[] = {
        { "as drawn", NULL }, { "no decay", none }, { "-100 in one channel", one_channel },
        { "one row of -1e4", one_reset }, { "-inf here and there", infinite },
        { "all at -20", all_strong }, { "alternating", alternate }, { "mixed channels", mixed },
        { "80 nats in 15 rows", at_80_nats },
    };
    const problem p = { GLA, 1, 150, 2, 16, 16, 16, 0.25, false, true };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        numbers x = numbers_new(&p, 11 + i);
        for (int64_t t = 0; t < p.T && cases[i].rule; t++)
            for (int64_t j = 0; j < p.H * p.K; j++) {
                double *g = x.in[GATE] + t * p.H * p.K + j;
                *g = (double)(float)cases[i].rule(t, j % p.K, *g);
            }
        expect_close(cases[i].what, &p, &x, 2e-5);
        numbers_free(&x);
    }
}

/* ---- keys ------------------------------------------------------------------------------------ */

/* Keys: x + a * k, of length 1; betas all b, or as drawn where b < 0. */
static void expect_keys(const char *what, double common, double own, double b, double bound)
{
    const problem p = { DELTA, 1, 150, 2, 16, 16, 1, 0.25, false, true };
    numbers x = numbers_new(&p, 23);
    for (int64_t r = 0; r < p.T * p.H; r++) {
        double *k = x.in[KEY] + r * p.K, sum = 0;
        for (int64_t d = 0; d < p.K; d++) {
            k[d] = own * k[d] + common * 0.25;
            sum += k[d] * k[d];
        }
        for (int64_t d = 0; d < p.K; d++) k[d] = sum > 0 ? (double)(float)(k[d] / sqrt(sum)) : 0;
        if (b >= 0) x.in[GATE][r] = b;
    }
    expect_close(what, &p, &x, bound);
    numbers_free(&x);
}

Test(linear_attention, hard_keys_give_what_the_recurrence_gives)
{
    expect_keys("as drawn", 0, 1, -1, 2e-5);
    expect_keys("identical keys", 1, 0, 1, 2e-5);
    expect_keys("identical keys, beta 2", 1, 0, 2, 2e-5);
    expect_keys("keys of cosine 0.9", 3, 1, 1, 1e-4);
    expect_keys("keys of cosine 0.9, beta 2", 3, 1, 2, 1e-4);
    expect_keys("keys of 0", 0, 0, -1, 2e-5);
    expect_keys("beta 0", 0, 1, 0, 2e-5);
}

/* ---- long carries ---------------------------------------------------------------------------- */

/* The state after a million rows, handed on a hundred times. */
static void expect_carried(kind what, bool decay, double bound)
{
    const problem p = { what, 1, 10000, 1, 4, 4, what == GLA ? 4 : 1, 0.5, false, true };
    numbers x = numbers_new(&p, 1), y = numbers_new(&p, 1);
    double S[16] = { 0 }, T[16] = { 0 }, greatest = 0, d = 0;
    for (int i = 0; i < 100; i++) {
        numbers_free(&x);
        x = numbers_new(&p, (uint64_t)i);
        if (what == GLA && !decay) memset(x.in[GATE], 0, sizeof(double) * 40000);
        memcpy(x.in[STATE], S, sizeof S);
        reference(&p, &x, false);
        memcpy(S, x.S, sizeof S);
        memcpy(x.in[STATE], T, sizeof T);
        library(&p, &x, &y, false, 1);
        memcpy(T, y.S, sizeof T);
        for (int j = 0; j < 16; j++) greatest = fmax(greatest, fabs(S[j]));
    }
    for (int j = 0; j < 16; j++) d = fmax(d, fabs(S[j] - T[j]) / greatest);
    if (getenv("FG_TEST_REPORT")) fprintf(stderr, "%g of %g\n", d, greatest);
    cr_expect(d < bound, "%s: after a million rows the state is off by %.1e", kind_name[what], d);
    numbers_free(&x);
    numbers_free(&y);
}

/* Without decay a rounding of 3e-8 in each of 62500 chunks adds up as a random walk: 7.5e-6 of the
 * state's greatest size on the way, and twice that at the worst of 16 elements. */
Test(linear_attention, a_state_is_right_after_a_million_rows)
{
    expect_carried(GLA, false, 1.5e-5);
    expect_carried(GLA, true, 1e-6);
    expect_carried(DELTA, true, 1e-6);
}

/* ---- to the bit ------------------------------------------------------------------------------ */

static void expect_same(const char *what, kind k, const double *x, const double *y, int64_t n)
{
    cr_expect_eq(memcmp(x, y, (size_t)n * sizeof *x), 0, "%s: %s", kind_name[k], what);
}

Test(linear_attention, later_rows_change_no_bit_of_earlier_ones)
{
    for (int k = GLA; k <= DELTA; k++) {
        const problem p = { (kind)k, 1, 100, 1, 8, 8, k == GLA ? 8 : 1, 0.5, false, true };
        numbers x = numbers_new(&p, 4), y = numbers_new(&p, 1), z = numbers_new(&p, 1);
        library(&p, &x, &y, false, 1);
        for (int64_t cut = 1; cut < p.T; cut += 7) {
            numbers w = numbers_new(&p, 4), other = numbers_new(&p, 99);
            for (int i = Q; i <= GATE; i++) {
                const int64_t n = count_of(&p, i) / p.T * cut, all = count_of(&p, i);
                memcpy(w.in[i] + n, other.in[i] + n, (size_t)(all - n) * sizeof(double));
            }
            library(&p, &w, &z, false, 1);
            expect_same("later rows changed earlier ones", p.what, y.o, z.o, cut * p.V);
            numbers_free(&w);
            numbers_free(&other);
        }
        numbers_free(&x);
        numbers_free(&y);
        numbers_free(&z);
    }
}

Test(linear_attention, threads_and_runs_change_no_bit)
{
    for (int k = GLA; k <= DELTA; k++) {
        const problem p = { (kind)k, 3, 130, 3, 16, 24, k == GLA ? 16 : 1, 0.5, true, true };
        numbers x = numbers_new(&p, 4), y = numbers_new(&p, 1), z = numbers_new(&p, 1);
        library(&p, &x, &y, true, 1);
        for (int threads = 1; threads < 6; threads++) {
            library(&p, &x, &z, true, threads);
            expect_same("o depends on the threads", p.what, y.o, z.o, count_of(&p, VALUE));
            expect_same("S depends on the threads", p.what, y.S, z.S, count_of(&p, STATE));
            for (int i = 0; i < 5; i++)
                expect_same("a gradient depends on the threads", p.what, y.grad[i], z.grad[i],
                            count_of(&p, i));
        }
        numbers_free(&x);
        numbers_free(&y);
        numbers_free(&z);
    }
}

/* The first document and padding hold NaN: the second is what it is alone. */
Test(linear_attention, a_document_among_others_has_the_bits_that_it_has_alone)
{
    enum { BEFORE = 21, PAD = 4, OWN = 50, T = BEFORE + PAD + OWN };
    for (int k = GLA; k <= DELTA; k++) {
        const problem p = { (kind)k, 1, T, 1, 8, 8, k == GLA ? 8 : 1, 0.5, true, true };
        problem alone = p;
        alone.T = OWN;
        alone.documents = alone.state = false;
        numbers x = numbers_new(&p, 4), y = numbers_new(&p, 1);
        numbers a = numbers_new(&alone, 1), b = numbers_new(&alone, 1);
        for (int64_t t = 0; t < T; t++) x.first[t] = t < BEFORE ? 0 : BEFORE + PAD;
        for (int i = Q; i <= GO; i++) {
            const int64_t n = count_of(&p, i) / T, at = (BEFORE + PAD) * n;
            if (i == STATE) continue;
            memcpy(a.in[i], x.in[i] + at, (size_t)(OWN * n) * sizeof(double));
            for (int64_t j = 0; j < at; j++) x.in[i][j] = NAN;
        }
        memcpy(a.in[GSTATE], x.in[GSTATE], (size_t)count_of(&p, GSTATE) * sizeof(double));
        library(&p, &x, &y, true, 1);
        library(&alone, &a, &b, true, 1);
        expect_same("o of a document depends on others", p.what, y.o + (BEFORE + PAD) * p.V, b.o,
                    OWN * p.V);
        expect_same("S depends on others", p.what, y.S, b.S, count_of(&p, STATE));
        for (int i = Q; i <= GATE; i++) {
            const int64_t n = count_of(&p, i) / T;
            expect_same("a gradient depends on others", p.what, y.grad[i] + (BEFORE + PAD) * n,
                        b.grad[i], OWN * n);
            for (int64_t j = BEFORE * n; j < (BEFORE + PAD) * n; j++)
                cr_expect_eq(y.grad[i][j], 0, "padding has a gradient");
        }
        for (int64_t j = BEFORE * p.V; j < (BEFORE + PAD) * p.V; j++) cr_expect_eq(y.o[j], 0);
        numbers_free(&x);
        numbers_free(&y);
        numbers_free(&a);
        numbers_free(&b);
    }
}

/* ---- refusals -------------------------------------------------------------------------------- */

static void expect_refusal(fg_graph *g, fg_tensor y, const char *says)
{
    cr_expect_not(fg_ok(y));
    cr_expect_not_null(strstr(fg_graph_message(g), says), "%s", fg_graph_message(g));
    fg_graph_free(g);
}

Test(linear_attention, what_does_not_fit_is_refused)
{
    const fg_tensor none = { 0 };
    fg_graph *g = fg_graph_new();
    fg_tensor q = fg_input(g, "q", FG_F32, FG_DIMS(1, 3, 2, 4)), v = fg_input(g, "v", FG_F32,
                                                                           FG_DIMS(1, 3, 2, 5));
    fg_tensor a = fg_input(g, "a", FG_F32, FG_DIMS(1, 3, 2));
    expect_refusal(g, fg_gated_linear_attention(q, q, v, a, 1, none),
                   "log_a must have k's shape, one gate per channel");
    g = fg_graph_new();
    q = fg_input(g, "q", FG_F32, FG_DIMS(1, 3, 2, 4));
    v = fg_input(g, "v", FG_F32, FG_DIMS(1, 3, 2, 5));
    expect_refusal(g, fg_delta_rule(q, q, v, q, 1, none), "beta must be [B,T,H] = [1,3,2]");
    g = fg_graph_new();
    q = fg_input(g, "q", FG_F32, FG_DIMS(1, 3, 2, 4));
    a = fg_input(g, "a", FG_F32, FG_DIMS(1, 3, 2));
    expect_refusal(g, fg_delta_rule(q, q, q, a, 1, q), "state must be f32[B,H,K,V]");
    g = fg_graph_new();
    q = fg_input(g, "q", FG_F32, FG_DIMS(1, 3, 2, 4));
    a = fg_input(g, "a", FG_F32, FG_DIMS(1, 3, 2));
    v = fg_input(g, "v", FG_F32, FG_DIMS(1, 4, 2, 5));
    expect_refusal(g, fg_delta_rule(q, q, v, a, 1, none), "v must be [B,T,H,V]");
    g = fg_graph_new();
    q = fg_input(g, "q", FG_F32, FG_DIMS(1, 3, 2, 4));
    a = fg_input(g, "a", FG_F32, FG_DIMS(1, 3, 2));
    fg_tensor s = fg_input(g, "s", FG_F32, FG_DIMS(1, 2, 4, 4));
    fg_tensor past = fg_input(g, "past", FG_I32, FG_DIMS(1));
    fg_graph_sequence(g, (fg_sequence){ .past = past, .capacity = 9 });
    expect_refusal(g, fg_delta_rule(q, q, q, a, 1, s), "the caches hold it already");
}
