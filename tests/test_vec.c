/* test_vec.c - the elementary functions of vec.h against libm in double, over dense sweeps. */
#include <criterion/criterion.h>
#include <float.h>
#include <stdio.h>
#include "vec.h"

typedef fg_vec (*vector_fn)(fg_vec);
typedef double (*exact_fn)(double);

static float from_bits(uint32_t u) { float x; memcpy(&x, &u, sizeof x); return x; }
static uint32_t to_bits(float x) { uint32_t u; memcpy(&u, &x, sizeof u); return u; }
static float first_lane(vector_fn f, float x) { return f(fg_vset(x))[0]; }

/* |got - want| in units of the spacing of floats at want, which subnormals share. */
static double ulps(double got, double want)
{
    if (isnan(want)) return isnan(got) ? 0 : INFINITY;
    if (fabs(want) > FLT_MAX) return got == (double)(float)want ? 0 : INFINITY;
    int e;
    frexp(want, &e);
    return fabs(got - want) / ldexp(1, (e < -125 ? -125 : e) - 24);
}

/* The worst error of f over every step-th float between the bit patterns from and to. */
static double sweep(vector_fn f, exact_fn exact, uint32_t from, uint32_t to, uint32_t step)
{
    double worst = 0;
    float x[FG_VEC_BYTES / sizeof(float)];
    for (uint64_t b = from; b <= to; b += (uint64_t)step * (uint64_t)FG_LANES) {
        for (int64_t i = 0; i < FG_LANES; i++) {
            const uint64_t u = b + (uint64_t)i * step;
            x[i] = from_bits((uint32_t)(u < to ? u : to));
        }
        const fg_vec y = f(fg_vload(x));
        for (int64_t i = 0; i < FG_LANES; i++) {
            const double d = ulps(y[i], exact(x[i]));
            worst = d > worst ? d : worst;
        }
    }
    return worst;
}

/* Over all finite floats of both signs. */
static double sweep_all(vector_fn f, exact_fn exact, uint32_t step)
{
    const uint32_t top = to_bits(FLT_MAX);
    return fmax(sweep(f, exact, 0, top, step), sweep(f, exact, 1u << 31, top | 1u << 31, step));
}

static double exact_sigmoid(double x) { return 1 / (1 + exp(-x)); }
static double exact_log_sigmoid(double x) { return x < 0 ? x - log1p(exp(x)) : -log1p(exp(-x)); }

Test(vec, exp_is_within_2_ulp)
{
    const double worst = fmax(sweep_all(fg_vexp, exp, 997),
                              sweep(fg_vexp, exp, to_bits(80), to_bits(89), 1));
    const double under = sweep(fg_vexp, exp, to_bits(-87), to_bits(-105), 1);
    cr_expect(worst <= 2 && under <= 2, "worst %.3f, subnormal results %.3f ulp", worst, under);
}

Test(vec, log_is_within_2_ulp)
{
    const double worst = fmax(sweep(fg_vlog, log, 1, to_bits(FLT_MAX), 499),
                              sweep(fg_vlog, log, to_bits(0.7f), to_bits(1.5f), 1));
    cr_expect(worst <= 2, "worst %.3f ulp", worst);
}

Test(vec, log1p_is_within_2_ulp_on_the_unit_interval)
{
    const double worst = sweep(fg_vlog1p, log1p, 0, to_bits(1), 97);
    cr_expect(worst <= 2, "worst %.3f ulp", worst);
}

Test(vec, sigmoid_is_within_4_ulp)
{
    const double worst = sweep_all(fg_vsigmoid, exact_sigmoid, 997);
    cr_expect(worst <= 4, "worst %.3f ulp", worst);
}

Test(vec, log_sigmoid_is_within_4_ulp)
{
    const double worst = sweep_all(fg_vlog_sigmoid, exact_log_sigmoid, 997);
    cr_expect(worst <= 4, "worst %.3f ulp", worst);
}

Test(vec, tanh_is_within_2_ulp)
{
    const double worst = sweep_all(fg_vtanh, tanh, 997);
    cr_expect(worst <= 2, "worst %.3f ulp", worst);
}

Test(vec, special_values)
{
    cr_expect(first_lane(fg_vexp, 0) == 1 && first_lane(fg_vexp, -0.0f) == 1);
    cr_expect(first_lane(fg_vexp, INFINITY) == INFINITY && first_lane(fg_vexp, -INFINITY) == 0);
    cr_expect(first_lane(fg_vexp, 88.72283f) <= FLT_MAX, "the last finite one");
    cr_expect(first_lane(fg_vexp, 88.72284f) == INFINITY);
    cr_expect(first_lane(fg_vexp, -103.97f) == from_bits(1) && first_lane(fg_vexp, -104) == 0);
    cr_expect(isnan(first_lane(fg_vexp, NAN)));

    cr_expect(first_lane(fg_vlog, 1) == 0 && first_lane(fg_vlog, INFINITY) == INFINITY);
    cr_expect(first_lane(fg_vlog, 0) == -INFINITY && first_lane(fg_vlog, -0.0f) == -INFINITY);
    cr_expect(isnan(first_lane(fg_vlog, -1)) && isnan(first_lane(fg_vlog, -INFINITY)));
    cr_expect(isnan(first_lane(fg_vlog, NAN)));

    cr_expect(first_lane(fg_vsigmoid, INFINITY) == 1 && first_lane(fg_vsigmoid, -INFINITY) == 0);
    cr_expect(first_lane(fg_vsigmoid, 0) == 0.5f && isnan(first_lane(fg_vsigmoid, NAN)));
    cr_expect(first_lane(fg_vlog_sigmoid, INFINITY) == 0);
    cr_expect(first_lane(fg_vlog_sigmoid, -INFINITY) == -INFINITY);
    cr_expect(isnan(first_lane(fg_vlog_sigmoid, NAN)));
    cr_expect(first_lane(fg_vtanh, INFINITY) == 1 && first_lane(fg_vtanh, -INFINITY) == -1);
    cr_expect(isnan(first_lane(fg_vtanh, NAN)));
}

Test(vec, one_number_gives_the_bits_of_a_vector)
{
    for (float x = -20; x < 20; x += 0.37f) {
        fg_vec v = fg_vset(3);
        v[FG_LANES - 1] = x;
        cr_assert(fg_exp1(x) == fg_vexp(v)[FG_LANES - 1]);
        cr_assert(fg_sigmoid1(x) == fg_vsigmoid(v)[FG_LANES - 1]);
        cr_assert(x <= 0 || fg_log1(x) == fg_vlog(v)[FG_LANES - 1]);
    }
}

Test(vec, sums_and_greatest_see_every_lane)
{
    fg_vec v;
    for (int64_t i = 0; i < FG_LANES; i++) v[i] = (float)(i + 1);
    cr_expect(fg_vsum(v) == (float)(FG_LANES * (FG_LANES + 1) / 2));
    cr_expect(fg_vgreatest(v) == (float)FG_LANES && fg_vgreatest(-v) == -1);
    const float row[3] = { 5, 6, 7 };
    const fg_vec tail = fg_vload_n(row, 3);
    cr_expect(fg_vsum(tail) == 18, "lanes past the tail are 0");
}
