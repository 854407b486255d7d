/* test_gemm.c - matrix products: right within a derived bound, the same bits for any threads. */
#include <criterion/criterion.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "gemm.h"

#ifdef FG_DOUBLE
#define ROUNDING (DBL_EPSILON / 2)
#else
#define ROUNDING (FLT_EPSILON / 2)
#endif

typedef struct { bool ta, tb; int64_t m, n, k, more; fg_real alpha, beta; bool bias; } product;

static fg_real *random_reals(int64_t n, uint64_t seed)
{
    fg_real *x = malloc((size_t)(n + 1) * sizeof *x);
    for (int64_t i = 0; i < n; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        x[i] = (fg_real)((double)(seed >> 40) / 8388608.0 - 1);
    }
    return x;
}

/* The operands of p; pitches are `more` longer than rows. */
typedef struct { int64_t lda, ldb, ldc, size_c; fg_real *a, *b, *c, *bias; } operands;

static operands operands_of(const product *p)
{
    operands o = { .lda = (p->ta ? p->m : p->k) + p->more, .ldb = (p->tb ? p->k : p->n) + p->more,
                   .ldc = p->n + p->more };
    o.size_c = p->m * o.ldc;
    o.a = random_reals((p->ta ? p->k : p->m) * o.lda, 1);
    o.b = random_reals((p->tb ? p->n : p->k) * o.ldb, 2);
    o.c = random_reals(o.size_c, 3);
    o.bias = p->bias ? random_reals(p->n, 4) : NULL;
    return o;
}

static void free_operands(operands *o)
{
    free(o->a); free(o->b); free(o->c); free(o->bias);
}

static fg_real *run(const product *p, const operands *o, int threads)
{
    fg_real *c = malloc((size_t)(o->size_c + 1) * sizeof *c);
    memcpy(c, o->c, (size_t)o->size_c * sizeof *c);
    for (int64_t i = 0; p->beta == 0 && i < p->m; i++)       /* beta 0: c must not even be read */
        for (int64_t j = 0; j < p->n; j++) c[i * o->ldc + j] = (fg_real)NAN;
    fg__gemm_bias(p->ta, p->tb, p->m, p->n, p->k, p->alpha, o->a, o->lda, o->b, o->ldb, p->beta, c,
                  o->ldc, o->bias, threads);
    return c;
}

/* A sum of k products, in any order, is within k roundings of the sum of their magnitudes; scaling
 * by alpha, beta c and the bias add four more. */
static void check_entry(const product *p, const operands *o, int64_t i, int64_t j, fg_real y)
{
    long double sum = 0, size = 0;
    for (int64_t t = 0; t < p->k; t++) {
        const long double a = p->ta ? o->a[t * o->lda + i] : o->a[i * o->lda + t];
        const long double b = p->tb ? o->b[j * o->ldb + t] : o->b[t * o->ldb + j];
        sum += a * b;
        size += fabsl(a * b);
    }
    sum *= p->alpha;
    size *= fabsl(p->alpha);
    const long double more[] = { p->beta == 0 ? 0 : (long double)p->beta * o->c[i * o->ldc + j],
                                 o->bias ? o->bias[j] : 0 };
    for (int q = 0; q < 2; q++) {
        sum += more[q];
        size += fabsl(more[q]);
    }
    const long double bound = (long double)(p->k + 4) * ROUNDING * size;
    cr_assert(fabsl(sum - y) <= bound,
              "ta %d, tb %d, %lld x %lld x %lld, entry (%lld, %lld): %.9Lg, not %.9Lg within %.2Lg",
              p->ta, p->tb, (long long)p->m, (long long)p->n, (long long)p->k, (long long)i,
              (long long)j, (long double)y, sum, bound);
}

static void check_product(const product *p)
{
    operands o = operands_of(p);
    fg_real *c = run(p, &o, 2);
    for (int64_t i = 0; i < p->m; i++)
        for (int64_t j = 0; j < o.ldc; j++) {
            if (j < p->n) check_entry(p, &o, i, j, c[i * o.ldc + j]);
            else cr_assert_eq(c[i * o.ldc + j], o.c[i * o.ldc + j], "wrote beside c");
        }
    free(c);
    free_operands(&o);
}

Test(gemm, every_shape_and_transposition_is_within_rounding_of_the_sum)
{
    static const int64_t extent[] = { 0, 1, 2, 5, 9, 17, 33, 70 };
    const int n = sizeof extent / sizeof extent[0];
    for (int i = 0; i < 4 * n * n * n; i++) {
        product p = { .ta = i & 1, .tb = i & 2, .m = extent[i / 4 % n], .n = extent[i / 4 / n % n],
                      .k = extent[i / 4 / n / n], .alpha = 1 };
        check_product(&p);
        p.alpha = (fg_real)0.5; p.beta = (fg_real)-0.25; p.more = 3; p.bias = true;
        check_product(&p);
    }
}

Test(gemm, sizes_that_are_cut_into_tiles_are_within_rounding_of_the_sum)
{
    static const product cases[] = {
        { .m = 300, .n = 131, .k = 77, .alpha = 1 },
        { .m = 33, .n = 300, .k = 600, .alpha = 2, .beta = 1, .more = 1, .bias = true },
        { .m = 3, .n = 500, .k = 301, .alpha = 1, .bias = true },
        { .m = 501, .n = 11, .k = 300, .alpha = 1, .beta = 1 },
        { .m = 8, .n = 64, .k = 300, .alpha = 1 },
    };
    for (size_t i = 0; i < 4 * sizeof cases / sizeof cases[0]; i++) {
        product p = cases[i / 4];
        p.ta = i & 1;
        p.tb = i & 2;
        check_product(&p);
    }
}

Test(gemm, any_number_of_threads_gives_the_same_bits)
{
    static const int64_t shape[][3] = {
        { 520, 300, 200 }, { 96, 64, 3000 }, { 1, 1000, 768 }, { 7, 999, 301 }, { 1500, 4, 256 },
        { 1500, 12, 256 }, { 12, 256, 2000 }, { 70, 70, 70 }, { 8, 512, 128 },
    };
    for (size_t i = 0; i < 4 * sizeof shape / sizeof shape[0]; i++) {
        const int64_t *s = shape[i / 4];
        const product p = { .ta = i & 1, .tb = i & 2, .m = s[0], .n = s[1], .k = s[2], .alpha = 1 };
        operands o = operands_of(&p);
        fg_real *one = run(&p, &o, 1);
        for (int threads = 2; threads <= 5; threads++) {
            fg_real *many = run(&p, &o, threads);
            cr_expect_eq(memcmp(one, many, (size_t)o.size_c * sizeof *one), 0,
                         "%lld x %lld x %lld differs between 1 and %d threads", (long long)s[0],
                         (long long)s[1], (long long)s[2], threads);
            free(many);
        }
        free(one);
        free_operands(&o);
    }
}

Test(gemm, a_product_inside_a_parallel_region_gives_the_same_bits)
{
    const product p = { .tb = true, .m = 150, .n = 200, .k = 90, .alpha = 1 };
    operands o = operands_of(&p);
    fg_real *one = run(&p, &o, 2), *inside[4];
#pragma omp parallel for num_threads(3)
    for (int i = 0; i < 4; i++) {
        inside[i] = malloc((size_t)o.size_c * sizeof **inside);
        fg__gemm_serial(p.ta, p.tb, p.m, p.n, p.k, p.alpha, o.a, o.lda, o.b, o.ldb, 0, inside[i],
                        o.ldc);
    }
    for (int i = 0; i < 4; i++) {
        cr_expect_eq(memcmp(one, inside[i], (size_t)o.size_c * sizeof *one), 0);
        free(inside[i]);
    }
    free(one);
    free_operands(&o);
}
