/* test_f64_golden_ops.c - ops of the model families against numbers of the official code in f64.
 *
 * A wave with seed s holds sin(0.7 n + s), n the row-major index; gains are 1 + 0.1 wave.  Every
 * result is reduced to sum_n value[n] cos(0.3 n); cos(0.3 n) is also the gradient that comes in.
 * Values enter as pairs of floats, high and low, and leave as their distance from the golden
 * number, so nothing is lost on the way.  Tolerance: half a unit of the last digit known. */
#include <criterion/criterion.h>
#include <math.h>
#include "fox_autodiff.h"
#include "fox_ops.h"

enum { MAX_VALUES = 64, MAX_PAIRS = 20, MAX_EXPECTED = 8 };

typedef struct { fg_tensor high, low; int64_t n; float h[MAX_VALUES], l[MAX_VALUES]; } pair;
typedef struct { const char *what; fg_tensor distance; double tolerance; } expected;
typedef struct {
    fg_graph *g;
    int n_pairs, n_expected;
    pair pairs[MAX_PAIRS];
    expected expect[MAX_EXPECTED];
} world;

static fg_tensor exact(world *w, const double *value, fg_shape s)
{
    pair *p = &w->pairs[w->n_pairs++];
    p->n = fg_shape_count(s);
    cr_assert(w->n_pairs <= MAX_PAIRS && p->n <= MAX_VALUES);
    for (int64_t i = 0; i < p->n; i++) {
        p->h[i] = (float)value[i];
        p->l[i] = (float)(value[i] - (double)p->h[i]);
    }
    p->high = fg_input(w->g, fg_name(w->g, "high%d", w->n_pairs), FG_F32, s);
    p->low = fg_input(w->g, fg_name(w->g, "low%d", w->n_pairs), FG_F32, s);
    return fg_add(p->high, p->low);
}

static fg_tensor wave(world *w, int seed, double base, double factor, fg_shape s)
{
    double v[MAX_VALUES] = { 0 };
    const int64_t n = fg_shape_count(s);
    for (int64_t i = 0; i < n && i < MAX_VALUES; i++)
        v[i] = base + factor * sin(0.7 * (double)i + seed);
    return exact(w, v, s);
}
static fg_tensor values(world *w, int seed, fg_shape s) { return wave(w, seed, 0, 1, s); }
static fg_tensor gain(world *w, int seed, fg_shape s) { return wave(w, seed, 1, 0.1, s); }

/* sum_n t[n] cos(0.3 n) */
static fg_tensor checksum(world *w, fg_tensor t)
{
    double v[MAX_VALUES] = { 0 };
    const int64_t n = fg_count(t);
    for (int64_t i = 0; i < n && i < MAX_VALUES; i++) v[i] = cos(0.3 * (double)i);
    const fg_tensor c = exact(w, v, fg_shape_of(t));
    const fg_tensor product = fg_mul(t, c);
    return fg_sum(product);
}

static void expect(world *w, const char *what, fg_tensor sum, double golden, double unit)
{
    const fg_tensor d = fg_scale(sum, 1, -golden);
    fg_output(d, what);
    w->expect[w->n_expected++] = (expected){ what, d, 0.51 * unit };
}

/* The checksums of y and of its gradients at in[0 .. n), named by `what`, against `golden`. */
static void check(world *w, fg_tensor y, int n, const fg_tensor *in, const char *const *what,
                  const double *golden)
{
    fg_tensor grad[MAX_EXPECTED];
    const fg_tensor loss = checksum(w, y);
    fg_grad(loss, n, in, grad);
    expect(w, "y", loss, golden[0], 1e-8);
    for (int i = 0; i < n; i++) {
        const fg_tensor sum = checksum(w, grad[i]);
        expect(w, what[i], sum, golden[i + 1], 1e-7);
    }
    cr_assert_eq(fg_graph_status(w->g), FG_OK, "%s", fg_graph_message(w->g));

    fg_backend *cpu = fg_backend_open("cpu", 2);
    fg_store *s = fg_store_new(cpu);
    fg_plan *p = fg_plan_new(w->g, s);
    cr_assert_eq(fg_plan_status(p), FG_OK, "%s", fg_plan_message(p));
    for (int i = 0; i < w->n_pairs; i++) {
        const pair *q = &w->pairs[i];
        fg_write(p, q->high, q->h, (size_t)q->n * sizeof(float));
        fg_write(p, q->low, q->l, (size_t)q->n * sizeof(float));
    }
    cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
    for (int i = 0; i < w->n_expected; i++) {
        const expected *e = &w->expect[i];
        float d = NAN;
        cr_expect_eq(fg_read(p, e->distance, &d, sizeof d), FG_OK, "%s", fg_plan_message(p));
        cr_expect(fabs((double)d) <= e->tolerance, "%s is %.3e from the golden number, over %.1e",
                  e->what, (double)d, e->tolerance);
    }
    fg_plan_free(p);
    fg_store_free(s);
    fg_backend_close(cpu);
    fg_graph_free(w->g);
}

Test(golden_ops, token_shift_equals_the_official_kv_shift)
{
    static world w;
    w.g = fg_graph_new();
    const fg_tensor x = values(&w, 0, FG_DIMS(1, 5, 2, 3));
    const fg_tensor z = values(&w, 1, FG_DIMS(1, 5, 2));
    const fg_tensor a = fg_sigmoid(z), y = fg_shift_mix(x, a);
    check(&w, y, 2, (const fg_tensor[]){ x, z }, (const char *const[]){ "dx", "dz" },
          (const double[]){ -0.60928259, 5.0966787, -0.4493579 });
}

Test(golden_ops, rms_norm_in_two_groups_equals_the_official_grouped_norm)
{
    static world w;
    w.g = fg_graph_new();
    const fg_tensor x = values(&w, 0, FG_DIMS(4, 6));
    const fg_tensor m = gain(&w, 1, FG_DIMS(6));
    const fg_tensor y = fg_rms_norm(x, m, 1e-5, 2);
    check(&w, y, 2, (const fg_tensor[]){ x, m }, (const char *const[]){ "dx", "dw" },
          (const double[]){ 4.85181430, 9.0796764, 4.9277340 });
}

Test(golden_ops, gated_norm_in_two_groups_equals_the_official_output_norm_of_fox)
{
    static world w;
    w.g = fg_graph_new();
    const fg_tensor x = values(&w, 0, FG_DIMS(4, 6));
    const fg_tensor m = gain(&w, 1, FG_DIMS(6));
    const fg_tensor g = values(&w, 2, FG_DIMS(4, 6));
    const fg_tensor y = fg_gated_norm(x, m, g, 1e-6, 2);
    check(&w, y, 3, (const fg_tensor[]){ x, m, g }, (const char *const[]){ "dx", "dw", "dg" },
          (const double[]){ 2.35975394, 4.5392841, 2.5866552, 2.0929113 });
}

Test(golden_ops, gated_norm_times_its_gate_equals_the_official_norm_and_swish_gate)
{
    static world w;
    w.g = fg_graph_new();
    const fg_tensor x = values(&w, 0, FG_DIMS(4, 6));
    const fg_tensor m = gain(&w, 1, FG_DIMS(6));
    const fg_tensor g = values(&w, 2, FG_DIMS(4, 6));
    const fg_tensor n = fg_gated_norm(x, m, g, 1e-6, 1), y = fg_mul(n, g);
    check(&w, y, 3, (const fg_tensor[]){ x, m, g }, (const char *const[]){ "dx", "dw", "dg" },
          (const double[]){ 0.26927329, 2.2976386, 0.5559499, 2.7318946 });
}

Test(golden_ops, rms_norm_of_a_gated_value_equals_the_official_norm_of_mamba2)
{
    static world w;
    w.g = fg_graph_new();
    const fg_tensor x = values(&w, 0, FG_DIMS(4, 6));
    const fg_tensor m = gain(&w, 1, FG_DIMS(6));
    const fg_tensor z = values(&w, 2, FG_DIMS(4, 6));
    const fg_tensor s = fg_silu(z), v = fg_mul(x, s), y = fg_rms_norm(v, m, 1e-5, 1);
    check(&w, y, 3, (const fg_tensor[]){ x, m, z }, (const char *const[]){ "dx", "dw", "dz" },
          (const double[]){ 0.05591539, 7.9655318, 1.2760391, 14.6675849 });
}

/* The official numbers are for 4 queries at the end of 6 keys: two rows of zeros stand in front of
 * q, and their outputs are not looked at. */
Test(golden_ops, forget_attention_equals_the_official_attention)
{
    static world w;
    w.g = fg_graph_new();
    const double zeros[6] = { 0 };
    const fg_tensor none = exact(&w, zeros, FG_DIMS(1, 2, 1, 3));
    const fg_tensor q = values(&w, 0, FG_DIMS(1, 4, 1, 3));
    const fg_tensor k = values(&w, 1, FG_DIMS(1, 6, 1, 3));
    const fg_tensor v = values(&w, 2, FG_DIMS(1, 6, 1, 3));
    const fg_tensor z = values(&w, 3, FG_DIMS(1, 6, 1));
    const fg_tensor rows = fg_concat(none, q, 1), log_f = fg_log_sigmoid(z);
    const fg_tensor o = fg_forget_attention(rows, k, v, log_f, 1 / sqrt(3), 0);
    const fg_tensor y = fg_slice(o, 1, 2, 6);
    check(&w, y, 4, (const fg_tensor[]){ q, k, v, z },
          (const char *const[]){ "dq", "dk", "dv", "dz" },
          (const double[]){ 1.64714277, 0.6155531, -0.5125659, 0.4459706, -0.3276990 });
}

Test(golden_ops, causal_conv_equals_the_official_convolution_of_width_4)
{
    static world w;
    w.g = fg_graph_new();
    const fg_tensor x = values(&w, 0, FG_DIMS(1, 7, 2));
    const fg_tensor k = values(&w, 1, FG_DIMS(2, 4));
    const fg_tensor bias = values(&w, 2, FG_DIMS(2));
    const fg_tensor y = fg_causal_conv(x, k, bias, true);
    check(&w, y, 3, (const fg_tensor[]){ x, k, bias },
          (const char *const[]){ "dx", "dw", "dbias" },
          (const double[]){ -1.26196265, -1.8999204, 1.0468821, -1.5047195 });
}

Test(golden_ops, gated_linear_attention_equals_the_official_one)
{
    static world w;
    w.g = fg_graph_new();
    const fg_tensor q = values(&w, 0, FG_DIMS(1, 7, 1, 3));
    const fg_tensor k = values(&w, 1, FG_DIMS(1, 7, 1, 3));
    const fg_tensor v = values(&w, 2, FG_DIMS(1, 7, 1, 2));
    const fg_tensor f = values(&w, 3, FG_DIMS(1, 7, 1, 3));
    const fg_tensor log_a = fg_log_sigmoid(f), none = { 0 };
    const fg_tensor y = fg_gated_linear_attention(q, k, v, log_a, 1 / sqrt(3), none);
    check(&w, y, 4, (const fg_tensor[]){ q, k, v, f },
          (const char *const[]){ "dq", "dk", "dv", "df" },
          (const double[]){ 0.68710653, 4.3267337, 1.5862859, 4.6790058, 0.1690782 });
}

Test(golden_ops, delta_rule_equals_the_official_one)
{
    static world w;
    w.g = fg_graph_new();
    const fg_tensor q = values(&w, 0, FG_DIMS(1, 7, 1, 3));
    const fg_tensor k = values(&w, 1, FG_DIMS(1, 7, 1, 3));
    const fg_tensor v = values(&w, 2, FG_DIMS(1, 7, 1, 2));
    const fg_tensor b = values(&w, 4, FG_DIMS(1, 7, 1));
    const fg_tensor qn = fg_l2_norm(q, 1e-6), kn = fg_l2_norm(k, 1e-6), beta = fg_sigmoid(b);
    const fg_tensor none = { 0 }, y = fg_delta_rule(qn, kn, v, beta, 1 / sqrt(3), none);
    check(&w, y, 4, (const fg_tensor[]){ q, k, v, b },
          (const char *const[]){ "dq", "dk", "dv", "db" },
          (const double[]){ 0.02917260, 0.1622897, 0.1620578, 1.9500346, -0.0238229 });
}

Test(golden_ops, ssd_scan_equals_the_official_scan_of_mamba2)
{
    static world w;
    w.g = fg_graph_new();
    const fg_tensor x = values(&w, 0, FG_DIMS(1, 7, 2, 3));
    const fg_tensor raw = values(&w, 1, FG_DIMS(1, 7, 2));
    const fg_tensor rate = values(&w, 2, FG_DIMS(2));
    const fg_tensor b = values(&w, 3, FG_DIMS(1, 7, 1, 2));
    const fg_tensor c = values(&w, 4, FG_DIMS(1, 7, 1, 2));
    const fg_tensor d = values(&w, 5, FG_DIMS(2));
    const fg_tensor bias = values(&w, 6, FG_DIMS(2));
    const fg_tensor sum = fg_add(raw, bias), dt = fg_softplus(sum);
    const fg_tensor e = fg_exp(rate), a = fg_neg(e);
    const fg_tensor y = fg_ssd_scan(x, dt, a, b, c, d, (fg_tensor){ 0 });
    check(&w, y, 7, (const fg_tensor[]){ x, raw, rate, b, c, d, bias },
          (const char *const[]){ "dx", "ddtraw", "dA_log", "dB", "dC", "dD", "ddt_bias" },
          (const double[]){ 1.62781332, -1.1834184, -1.5402304, 0.1166305, -2.2294557, 1.8694128,
                            2.8615229, 2.4352507 });
}
