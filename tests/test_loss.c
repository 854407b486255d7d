/* test_loss.c - tables, losses and gradients: at sizes that are cut into blocks and slices, and on
 * tokens and labels outside the vocabulary. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "fox_autodiff.h"
#include "internal.h"

static fg_init normal(double a) { return (fg_init){ .kind = FG_NORMAL, .a = a }; }

/* Value of t after one run of its graph; parameters from seed 7. */
static float *value_of(fg_tensor t, int threads)
{
    fg_graph *g = t.graph;
    const char *name = fg_name(g, "out%u", t.id);
    if (fg_absent(fg_find(g, name))) fg_output(t, name);
    cr_assert_eq(fg_graph_status(g), FG_OK, "%s", fg_graph_message(g));
    fg_backend *b = fg_backend_open("cpu", threads);
    fg_store *s = fg_store_new(b);
    cr_assert_eq(fg_store_init(s, g, 7), FG_OK, "%s", fg_store_message(s));
    fg_plan *p = fg_plan_new(g, s);
    cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
    const size_t bytes = (size_t)fg_count(t) * sizeof(float);
    float *y = malloc(bytes + 1);
    cr_assert_eq(fg_read(p, t, y, bytes), FG_OK, "%s", fg_plan_message(p));
    fg_plan_free(p);
    fg_store_free(s);
    fg_backend_close(b);
    return y;
}

static void expect_same_bits(fg_tensor t)
{
    float *one = value_of(t, 1);
    for (int threads = 2; threads <= 3; threads++) {
        float *many = value_of(t, threads);
        cr_expect_eq(memcmp(one, many, (size_t)fg_count(t) * sizeof *one), 0,
                     "1 and %d threads differ", threads);
        free(many);
    }
    free(one);
}

static bool made_by(fg_tensor t, int op)
{
    fg_tensor in[FG_MAX_IN];
    int n;
    return fg__producer(t, in, &n, NULL) == &fg_op_table[op];
}

Test(embedding, a_token_outside_the_table_gives_nan_and_no_gradient)
{
    static const int32_t tokens[] = { 2, -1, 5, 2, 2147483647 };
    fg_graph *g = fg_graph_new();
    const fg_tensor t = fg_given_int(g, FG_DIMS(5), tokens), w = fg_random(g, 5, 3);
    const fg_tensor y = fg_embedding(t, w);
    const fg_tensor ones = fg_fill(g, FG_DIMS(5, 3), 1);
    const fg_tensor gw = FG_APPLY(embedding_grad, FG_HERE, ((const fg_tensor[]){ ones, t }), 5);
    float *v = value_of(y, 2), *d = value_of(gw, 2);
    for (int i = 0; i < 15; i++) {
        cr_expect_eq(isnan(v[i]) != 0, tokens[i / 3] != 2, "element %d", i);
        cr_expect_eq(d[i], i / 3 == 2 ? 2 : 0, "gradient %d", i);
    }
    free(v);
    free(d);
    fg_graph_free(g);
}

Test(embedding, the_gradient_sums_in_the_order_of_positions)
{
    enum { T = 3000, V = 700, D = 33 };
    fg_graph *g = fg_graph_new();
    const fg_tensor tokens = fg_random_int(g, 0, V / 2, T);           /* half the table is unused */
    const fg_tensor gy = fg_random(g, T, D);
    const fg_tensor gw = FG_APPLY(embedding_grad, FG_HERE, ((const fg_tensor[]){ gy, tokens }), V);
    const fg_tensor token_of = fg_cast(tokens, FG_F32);
    float *d = value_of(gw, 3), *rows = value_of(gy, 1), *at = value_of(token_of, 1);
    float *sum = calloc(V * D, sizeof *sum);
    bool *used = calloc(V, sizeof *used);
    for (int t = 0; t < T; t++) {
        const int c = (int)at[t];
        for (int i = 0; i < D; i++) {
            float *to = &sum[c * D + i];
            *to = used[c] ? *to + rows[t * D + i] : rows[t * D + i];
        }
        used[c] = true;
    }
    cr_expect_eq(memcmp(d, sum, V * D * sizeof *d), 0);
    expect_same_bits(gw);
    free(d); free(rows); free(at); free(sum); free(used);
    fg_graph_free(g);
}

/* exp is within 2 ulp, a lane adds 128 terms of a block, 25 blocks are added: lse = ln(sum) is off
 * by at most 155 roundings of 2^-24, and its own of 2^-21: 1e-5. */
Test(cross_entropy, rows_of_many_blocks_agree_with_double)
{
    enum { T = 5, V = 50257 };
    static const int32_t at[T] = { 0, V - 1, -100, 2048, 77 };
    fg_graph *g = fg_graph_new();
    const fg_tensor x = fg_param(g, "x", FG_DIMS(T, V), normal(3));
    const fg_tensor labels = fg_given_int(g, FG_DIMS(T), at);
    const fg_tensor loss = fg_cross_entropy(x, labels);
    const fg_tensor lse = fg_result(loss, 1);
    float *z = value_of(x, 1), *y = value_of(loss, 2), *l = value_of(lse, 2);
    for (int t = 0; t < T; t++) {
        double sum = 0;
        for (int c = 0; c < V; c++) sum += exp((double)z[t * V + c]);
        const double whole = log(sum), label = at[t] < 0 ? whole : (double)z[t * V + at[t]];
        cr_expect_float_eq(l[t], whole, 1e-5, "lse of row %d: %g, not %g", t, (double)l[t], whole);
        cr_expect_float_eq(y[t], whole - label, 1e-5, "loss of row %d", t);
    }
    cr_expect_eq(y[2], 0);
    free(z); free(y); free(l);
    fg_graph_free(g);
}

Test(cross_entropy, a_label_outside_the_vocabulary_gives_nan_and_minus_100_gives_0)
{
    static const int32_t at[] = { 5, -1, -100, 4 };
    for (int fused = 0; fused < 2; fused++) {
        fg_graph *g = fg_graph_new();
        const fg_tensor x = fg_random(g, 4, 3), w = fg_random(g, 5, 3);
        const fg_tensor logits = fused ? fg_linear(x, w, (fg_tensor){ 0 }) : fg_random(g, 4, 5);
        const fg_tensor loss = fg_cross_entropy(logits, fg_given_int(g, FG_DIMS(4), at));
        const fg_tensor sum = fg_sum(loss);
        fg_tensor gx;
        const fg_tensor wrt = fused ? x : logits;
        cr_assert_eq(fg_grad(sum, 1, &wrt, &gx), FG_OK, "%s", fg_graph_message(g));
        float *y = value_of(loss, 2), *d = value_of(gx, 2);
        const int n = fused ? 3 : 5;
        cr_expect(isnan(y[0]) && isnan(y[1]) && y[2] == 0 && isfinite(y[3]));
        for (int i = 0; i < n; i++) {
            cr_expect(isnan(d[i]) && isnan(d[n + i]));
            cr_expect(d[2 * n + i] == 0 && isfinite(d[3 * n + i]));
        }
        free(y);
        free(d);
        fg_graph_free(g);
    }
}

Test(cross_entropy, logits_of_a_product_without_bias_are_never_whole)
{
    fg_graph *g = fg_graph_new();
    const fg_tensor x = fg_random(g, 2, 3, 4), w = fg_random(g, 5, 4), b = fg_random(g, 5);
    const fg_tensor labels = fg_random_int(g, 0, 5, 2, 3);
    const fg_tensor plain = fg_linear(x, w, (fg_tensor){ 0 }), biased = fg_linear(x, w, b);
    const fg_tensor first = fg_cross_entropy(plain, labels);
    const fg_tensor second = fg_cross_entropy(biased, labels);
    cr_expect(made_by(first, FG_OP_linear_cross_entropy));
    cr_expect(made_by(second, FG_OP_cross_entropy));
    fg_graph_free(g);
}

/* Three slices of at most 1024 rows.  Parts and whole differ by the order of sums alone: losses
 * below 20 by 107 terms; gx by 101 terms of magnitudes that add to at most 2 |w| / T, |w| < 5; gw
 * by T terms of magnitudes that add to some 0.1; times 2^-24 each. */
Test(cross_entropy, slices_agree_with_the_whole)
{
    enum { T = 2501, V = 101, N = 6 };
    const double bound[] = { 1e-4, 1e-7, 2e-5 };
    fg_graph *g = fg_graph_new();
    const fg_tensor x = fg_param(g, "x", FG_DIMS(T, N), normal(1));
    const fg_tensor w = fg_param(g, "w", FG_DIMS(V, N), normal(1));
    const fg_tensor labels = fg_random_int(g, 0, V, T);
    const fg_tensor z = fg_linear(x, w, (fg_tensor){ 0 });
    const fg_tensor sliced = fg_cross_entropy(z, labels);
    const fg_tensor whole = fg__cross_entropy(FG_HERE, z, labels);
    const fg_tensor wrt[] = { x, w }, pair[] = { fg_mean(sliced), fg_mean(whole) };
    fg_tensor grad[2][2];
    for (int i = 0; i < 2; i++)
        cr_assert_eq(fg_grad(pair[i], 2, wrt, grad[i]), FG_OK, "%s", fg_graph_message(g));
    const fg_tensor both[][2] = {
        { sliced, whole }, { grad[0][0], grad[1][0] }, { grad[0][1], grad[1][1] },
    };
    for (int k = 0; k < 3; k++) {
        float *a = value_of(both[k][0], 2), *b = value_of(both[k][1], 2);
        for (int64_t i = 0; i < fg_count(both[k][0]); i++)
            cr_assert(fabs((double)a[i] - (double)b[i]) <= bound[k],
                      "value %d, element %lld: %.9g in slices, %.9g whole", k, (long long)i,
                      (double)a[i], (double)b[i]);
        free(a);
        free(b);
    }
    fg_graph_free(g);
}

Test(cross_entropy, any_number_of_threads_gives_the_same_bits)
{
    enum { T = 50, V = 3001, N = 40 };
    fg_graph *g = fg_graph_new();
    const fg_tensor x = fg_random(g, T, N), w = fg_random(g, V, N);
    const fg_tensor labels = fg_random_int(g, 0, V, T);
    const fg_tensor z = fg_linear(x, w, (fg_tensor){ 0 });
    const fg_tensor loss = fg_cross_entropy(z, labels), mean = fg_mean(loss);
    const fg_tensor wrt[] = { x, w };
    fg_tensor grad[2];
    cr_assert_eq(fg_grad(mean, 2, wrt, grad), FG_OK, "%s", fg_graph_message(g));
    expect_same_bits(loss);
    expect_same_bits(grad[0]);
    expect_same_bits(grad[1]);
    fg_graph_free(g);
}

Test(linear, shapes_that_do_not_fit_are_refused)
{
    fg_graph *g = fg_graph_new();
    const fg_tensor x = fg_random(g, 2, 4), w = fg_random(g, 3, 5);
    cr_expect_not(fg_ok(fg_linear(x, w, (fg_tensor){ 0 })));
    cr_expect_eq(fg_graph_status(g), FG_ERR_SHAPE);
    const char *said = fg_graph_message(g);
    cr_expect(strstr(said, "x's last axis is 4 and w's is 5"), "%s", said);
    fg_graph_free(g);
}
