/* test_f64_linear_attention.c - gated linear attention and the delta rule in double: chunks, steps
 * and the recurrence written out agree, gradients too, whatever the length, the documents and the
 * state before. */
#include "linear_attention.h"

static const int64_t lengths[] = { 1, 15, 16, 17, 63, 64, 65, 127, 1000, 1024, 1025, 4097 };
enum { LENGTHS = sizeof lengths / sizeof lengths[0] };

static problem problem_of(kind what, int64_t T, int bits)
{
    problem p = { what, 2, T, 2, 5, 9, what == GLA ? 5 : 1, 0.6, bits & 1, bits & 2 };
    if (T > 500) p.B = p.H = 1;
    return p;
}

/* Measured: at most 2e-13 (sums of 4097 rows). */
static void expect_agreement(kind what, int64_t T, int bits)
{
    static const char *const names[] = { "q", "k", "v", "gate", "state" };
    const problem p = problem_of(what, T, bits);
    numbers x = numbers_new(&p, 7 + (uint64_t)T), y = numbers_new(&p, 1);
    reference(&p, &x, true);
    library(&p, &x, &y, true, 2);
    double d = distance(y.o, x.o, count_of(&p, VALUE));
    cr_expect(d < 1e-11, "%s, %d rows, %d: o differs by %.1e", kind_name[what], (int)T, bits, d);
    d = distance(y.S, x.S, count_of(&p, STATE));
    cr_expect(d < 1e-11, "%s, %d rows, %d: S differs by %.1e", kind_name[what], (int)T, bits, d);
    for (int i = 0; i < (p.state ? 5 : 4); i++) {
        d = distance(y.grad[i], x.grad[i], count_of(&p, i));
        cr_expect(d < 1e-11, "%s, %d rows, %d: gradient of %s differs by %.1e", kind_name[what],
                  (int)T, bits, names[i], d);
    }
    numbers_free(&x);
    numbers_free(&y);
}

Test(f64_linear_attention, chunks_are_the_recurrence_and_so_are_their_gradients)
{
    for (int i = 0; i < LENGTHS; i++)
        for (int bits = 0; bits < 4; bits++) {
            expect_agreement(GLA, lengths[i], bits);
            expect_agreement(DELTA, lengths[i], bits);
        }
}

/* Row after row, the state handed on by the caller. */
static void expect_steps(kind what, int64_t T)
{
    const problem p = problem_of(what, T, 2);
    problem one = p;
    one.T = 1;
    numbers x = numbers_new(&p, 3), s = numbers_new(&one, 1), t1 = numbers_new(&one, 1);
    reference(&p, &x, false);
    memcpy(s.in[STATE], x.in[STATE], (size_t)count_of(&p, STATE) * sizeof(double));
    double worst = 0;
    for (int64_t t = 0; t < T; t++) {
        for (int i = Q; i <= GATE; i++) {
            const int64_t n = count_of(&one, i) / p.B;
            for (int64_t b = 0; b < p.B; b++)
                memcpy(s.in[i] + b * n, x.in[i] + (b * T + t) * n, (size_t)n * sizeof(double));
        }
        library(&one, &s, &t1, false, 1);
        for (int64_t b = 0; b < p.B; b++) {
            const int64_t n = p.H * p.V;
            worst = fmax(worst, distance(t1.o + b * n, x.o + (b * T + t) * n, n));
        }
        memcpy(s.in[STATE], t1.S, (size_t)count_of(&p, STATE) * sizeof(double));
    }
    /* a state passes from one step to the next as float: 2e-7 of it is lost each time */
    cr_expect(worst < 1e-4, "%s: steps differ by %.1e", kind_name[what], worst);
    numbers_free(&x);
    numbers_free(&s);
    numbers_free(&t1);
}

Test(f64_linear_attention, steps_are_the_recurrence)
{
    expect_steps(GLA, 65);
    expect_steps(DELTA, 65);
}

/* A gradient of the state alone, and of the output alone. */
Test(f64_linear_attention, either_output_may_be_the_only_one_with_a_gradient)
{
    for (int what = GLA; what <= DELTA; what++)
        for (int only = 0; only < 2; only++) {
            const problem p = problem_of((kind)what, 37, 2);
            numbers x = numbers_new(&p, 5), y = numbers_new(&p, 1);
            const int off = only ? GO : GSTATE;
            memset(x.in[off], 0, (size_t)count_of(&p, off) * sizeof(double));
            reference(&p, &x, true);
            library(&p, &x, &y, true, 1);
            for (int i = only ? 1 : 0; i < 5; i++) {     /* q has no part in the state */
                const double d = distance(y.grad[i], x.grad[i], count_of(&p, i));
                cr_expect(d < 1e-12, "%s: gradient %d differs by %.1e", kind_name[what], i, d);
            }
            numbers_free(&x);
            numbers_free(&y);
        }
}
