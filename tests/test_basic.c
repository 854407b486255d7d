/* test_basic.c - elementwise ops, sums, views and softmax at sizes that are split among threads, on
 * special values, and where they refuse. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "fox_autodiff.h"
#include "internal.h"

enum { MAX_FEED = 4 };

/* A graph with inputs, and the values they are fed. */
typedef struct {
    fg_graph *g;
    int n;
    fg_tensor input[MAX_FEED];
    void *data[MAX_FEED];
} feed;

/* Values in [-2, 2) that repeat only after a long time. */
static float value_at(int64_t i, int salt)
{
    uint64_t u = (uint64_t)i * 0x9e3779b97f4a7c15u + (uint64_t)salt * 0xd1b54a32d192ed03u;
    u = (u ^ u >> 29) * 0xbf58476d1ce4e5b9u;
    return (float)((double)(u >> 40) / 4194304.0 - 2);
}

static fg_tensor give(feed *f, fg_dtype t, fg_shape s)
{
    const int64_t n = fg_shape_count(s);
    const int k = f->n++;
    f->input[k] = fg_input(f->g, fg_name(f->g, "in%d", k), t, s);
    f->data[k] = malloc((size_t)n * 4);
    for (int64_t i = 0; i < n; i++) {
        if (t == FG_I32) ((int32_t *)f->data[k])[i] = (int32_t)i;
        else ((float *)f->data[k])[i] = value_at(i, k);
    }
    return f->input[k];
}

/* Runs f's graph; y's value in new memory. */
static float *run_on(feed *f, fg_tensor y, int threads)
{
    const char *name = fg_name(f->g, "out%u", y.id);
    if (fg_absent(fg_find(f->g, name))) fg_output(y, name);
    cr_assert_eq(fg_graph_status(f->g), FG_OK, "%s", fg_graph_message(f->g));
    fg_backend *b = fg_backend_open("cpu", threads);
    fg_store *s = fg_store_new(b);
    fg_plan *p = fg_plan_new(f->g, s);
    cr_assert_eq(fg_plan_status(p), FG_OK, "%s", fg_plan_message(p));
    for (int i = 0; i < f->n; i++)
        fg_write(p, f->input[i], f->data[i], (size_t)fg_count(f->input[i]) * 4);
    cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
    const size_t bytes = (size_t)fg_count(y) * 4;
    float *out = malloc(bytes);
    cr_assert_eq(fg_read(p, y, out, bytes), FG_OK, "%s", fg_plan_message(p));
    fg_plan_free(p);
    fg_store_free(s);
    fg_backend_close(b);
    return out;
}

static void end(feed *f)
{
    for (int i = 0; i < f->n; i++) free(f->data[i]);
    fg_graph_free(f->g);
}

static void expect_same_bits(const float *a, const float *b, int64_t n, const char *what)
{
    cr_expect(!memcmp(a, b, (size_t)n * sizeof *a), "%s: the bits depend on the threads", what);
}

/* Index into an array of shape s of element i of an array of shape y that s broadcasts to. */
static int64_t source(fg_shape s, fg_shape y, int64_t i)
{
    int64_t at = 0, stride = 1;
    for (int k = 1; k <= y.rank; k++) {
        const int64_t n = y.dim[y.rank - k], j = i % n;
        i /= n;
        if (k > s.rank) continue;
        if (s.dim[s.rank - k] > 1) at += j * stride;
        stride *= s.dim[s.rank - k];
    }
    return at;
}

static const fg_shape pairs[][2] = {                   /* big, and what broadcasts to it */
    { { 2, { 4099, 300 } }, { 1, { 300 } } },
    { { 1, { 100003 } }, { 0, { 0 } } },
    { { 3, { 3, 5003, 7 } }, { 3, { 3, 1, 7 } } },
    { { 5, { 2, 40, 3, 50, 61 } }, { 5, { 1, 40, 1, 50, 1 } } },
    { { 4, { 5, 200, 3, 64 } }, { 2, { 3, 1 } } },
    { { 2, { 70001, 2 } }, { 1, { 2 } } },
    { { 2, { 2, 90001 } }, { 2, { 2, 1 } } },
    { { 2, { 9, 10007 } }, { 1, { 10007 } } },
    { { 3, { 1, 300, 513 } }, { 3, { 1, 300, 513 } } },
    { { 2, { 1, 40009 } }, { 1, { 40009 } } },
    { { 6, { 2, 3, 5, 7, 11, 13 } }, { 6, { 2, 1, 5, 1, 11, 1 } } },
};
enum { PAIRS = sizeof pairs / sizeof pairs[0] };

static void check_sum_to(fg_shape big, fg_shape small)
{
    feed f = { .g = fg_graph_new() };
    const fg_tensor x = give(&f, FG_F32, big);
    const fg_tensor y = fg_sum_to(x, small);
    const int64_t n = fg_shape_count(big), m = fg_shape_count(small);
    double *want = calloc((size_t)m, sizeof *want), *size = calloc((size_t)m, sizeof *size);
    for (int64_t i = 0; i < n; i++) {
        const double v = ((float *)f.data[0])[i];
        want[source(small, big, i)] += v;
        size[source(small, big, i)] += fabs(v);
    }
    float *got = run_on(&f, y, 1);
    for (int64_t i = 0; i < m; i++)                    /* 1e-6: blocks of 512 roundings of 6e-8 */
        cr_assert(fabs(got[i] - want[i]) <= 1e-6 * size[i], "element %lld of %lld: %g, not %g",
                  (long long)i, (long long)m, got[i], want[i]);
    for (int threads = 2; threads <= 5; threads += 3) {
        float *other = run_on(&f, y, threads);
        expect_same_bits(got, other, m, "sum_to");
        free(other);
    }
    free(got);
    free(want);
    free(size);
    end(&f);
}

Test(basic, sum_to_is_right_and_the_same_for_any_number_of_threads)
{
    for (int i = 0; i < PAIRS; i++) check_sum_to(pairs[i][0], pairs[i][1]);
}

Test(basic, broadcast_to_repeats)
{
    for (int i = 0; i < PAIRS; i++) {
        feed f = { .g = fg_graph_new() };
        const fg_tensor x = give(&f, FG_F32, pairs[i][1]);
        const fg_tensor y = fg_broadcast_to(x, pairs[i][0]);
        float *got = run_on(&f, y, 3);
        for (int64_t k = 0; k < fg_count(y); k++)
            cr_assert(got[k] == ((float *)f.data[0])[source(pairs[i][1], pairs[i][0], k)]);
        free(got);
        end(&f);
    }
}

/* b - a and a - b: either side may be the one that is repeated. */
Test(basic, binary_ops_broadcast_either_side)
{
    for (int i = 0; i < 2 * PAIRS; i++) {
        const fg_shape sa = pairs[i / 2][i % 2], sb = pairs[i / 2][1 - i % 2], sy = pairs[i / 2][0];
        feed f = { .g = fg_graph_new() };
        const fg_tensor a = give(&f, FG_F32, sa);
        const fg_tensor b = give(&f, FG_F32, sb);
        const fg_tensor y = fg_sub(a, b);
        float *got = run_on(&f, y, 2);
        for (int64_t k = 0; k < fg_count(y); k++) {
            const float u = ((float *)f.data[0])[source(sa, sy, k)];
            const float v = ((float *)f.data[1])[source(sb, sy, k)];
            cr_assert(got[k] == u - v, "pair %d, element %lld", i, (long long)k);
        }
        free(got);
        end(&f);
    }
}

Test(basic, both_sides_may_be_repeated)
{
    const fg_shape sa = FG_DIMS(7, 1, 50, 1, 9), sb = FG_DIMS(30, 1, 11, 9);
    const fg_shape sx = FG_DIMS(7, 1, 1, 11, 1), sy = FG_DIMS(7, 30, 50, 11, 9);
    feed f = { .g = fg_graph_new() };
    const fg_tensor a = give(&f, FG_F32, sa);
    const fg_tensor b = give(&f, FG_F32, sb);
    const fg_tensor x = give(&f, FG_F32, sx);
    const fg_tensor y = fg__where_ge(FG_HERE, a, b, x);
    float *got = run_on(&f, y, 2);
    for (int64_t k = 0; k < fg_count(y); k++) {
        const float u = ((float *)f.data[0])[source(sa, sy, k)];
        const float v = ((float *)f.data[1])[source(sb, sy, k)];
        const float w = ((float *)f.data[2])[source(sx, sy, k)];
        cr_assert(got[k] == (u >= v ? w : 0));
    }
    free(got);
    end(&f);
}

static void check_permute(fg_dtype t, fg_shape s, fg_shape order)
{
    feed f = { .g = fg_graph_new() };
    const fg_tensor x = give(&f, t, s);
    const fg_tensor y = fg_permute(x, order);
    const fg_shape sy = fg_shape_of(y);
    int32_t *got = (int32_t *)run_on(&f, y, 2);
    int64_t stride[FG_MAX_RANK], n = 1;
    for (int i = s.rank - 1; i >= 0; i--) {
        stride[i] = n;
        n *= s.dim[i];
    }
    for (int64_t k = 0; k < n; k++) {
        int64_t rest = k, from = 0;
        for (int i = sy.rank - 1; i >= 0; i--) {
            from += rest % sy.dim[i] * stride[order.dim[i]];
            rest /= sy.dim[i];
        }
        cr_assert(got[k] == ((int32_t *)f.data[0])[from], "element %lld", (long long)k);
    }
    free(got);
    end(&f);
}

Test(basic, permute_moves_every_element_to_its_place)
{
    check_permute(FG_F32, FG_DIMS(2, 100, 12, 64), FG_DIMS(0, 2, 1, 3));
    check_permute(FG_I32, FG_DIMS(3, 333, 5), FG_DIMS(0, 2, 1));
    check_permute(FG_F32, FG_DIMS(300, 401), FG_DIMS(1, 0));
    check_permute(FG_F32, FG_DIMS(7, 1, 33, 20, 17), FG_DIMS(4, 2, 0, 1, 3));
    check_permute(FG_I32, FG_DIMS(40, 3, 50, 2), FG_DIMS(2, 0, 1, 3));
}

Test(basic, slice_concat_and_reshape_keep_integers)
{
    feed f = { .g = fg_graph_new() };
    const fg_tensor x = give(&f, FG_I32, FG_DIMS(100, 20, 30));
    const fg_tensor left = fg_slice(x, 1, 0, 7);
    const fg_tensor right = fg_slice(x, 1, 7, 20);
    const fg_tensor back = fg_concat(left, right, -2);
    const fg_tensor y = fg_reshape(back, FG_DIMS(60000));
    int32_t *got = (int32_t *)run_on(&f, y, 2);
    for (int32_t k = 0; k < 60000; k++) cr_assert(got[k] == k);
    free(got);
    end(&f);
}

Test(basic, cumsum_keeps_the_precision_of_double)
{
    for (int axis = 0; axis < 3; axis++) {
        feed f = { .g = fg_graph_new() };
        const fg_shape s = FG_DIMS(50, 211, 70);
        const fg_tensor x = give(&f, FG_F32, s);
        const fg_tensor y = fg_cumsum(x, axis, axis == 1);
        float *got = run_on(&f, y, 2);
        const int64_t T = s.dim[axis], inner = axis == 0 ? 211 * 70 : axis == 1 ? 70 : 1;
        for (int64_t k = 0; k < fg_count(y); k++) {
            const int64_t t = k / inner % T, first = k - t * inner;
            double sum = 0;
            const int64_t from = axis == 1 ? T - 1 : 0, step = axis == 1 ? -1 : 1;
            for (int64_t u = from; u != t + step; u += step)
                sum += ((float *)f.data[0])[first + u * inner];
            cr_assert(got[k] == (float)sum);
        }
        free(got);
        end(&f);
    }
}

Test(basic, unary_ops_do_not_depend_on_threads_or_place)
{
    feed f = { .g = fg_graph_new() };
    const fg_tensor x = give(&f, FG_F32, FG_DIMS(40961));
    const fg_tensor a = fg_silu(x);
    const fg_tensor b = fg_tanh(a);
    const fg_tensor c = fg_softplus(b);
    const fg_tensor d = fg_log_sigmoid(c);
    const fg_tensor y = fg_scale(d, 3, -0.5);
    float *one = run_on(&f, y, 1), *five = run_on(&f, y, 5);
    expect_same_bits(one, five, 40961, "a chain of unary ops");
    for (int64_t k = 0; k < 40961; k++) {
        const double v = ((float *)f.data[0])[k], t = tanh(v / (1 + exp(-v)));
        const double want = -3 * log1p(exp(-log1p(exp(t)))) - 0.5;
        cr_assert(fabs(one[k] - want) < 2e-6, "%g, not %g", one[k], want);   /* values near 2 */
    }
    free(one);
    free(five);
    end(&f);
}

Test(basic, cast_to_bf16_rounds_to_nearest_even)
{
    static const float in[] = { 1, 1.00390625f, 1.01171875f, 1.003907f, -3.1415927f, 3.4e38f,
                                INFINITY, -INFINITY, NAN, 1e-40f, 0 };
    static const float out[] = { 1, 1, 1.015625f, 1.0078125f, -3.140625f, INFINITY, INFINITY,
                                 -INFINITY, NAN, 9.18355e-41f, 0 };
    enum { N = sizeof in / sizeof in[0] };
    feed f = { .g = fg_graph_new() };
    const fg_tensor x = give(&f, FG_F32, FG_DIMS(N));
    memcpy(f.data[0], in, sizeof in);
    const fg_tensor half = fg_cast(x, FG_BF16);
    cr_expect_eq(fg_dtype_of(half), FG_BF16);
    float *got = run_on(&f, fg_cast(half, FG_F32), 1);
    for (int i = 0; i < N; i++)
        cr_expect(got[i] == out[i] || (isnan(out[i]) && isnan(got[i])) ||
                  fabsf(got[i] - out[i]) < 1e-43f, "%.9g gave %.9g, not %.9g", in[i], got[i],
                  out[i]);
    free(got);
    end(&f);
}

/* The gradient of sum(y w) with respect to x, where w is f's last input. */
static float *gradient(feed *f, fg_tensor y, fg_tensor x)
{
    const fg_tensor w = give(f, FG_F32, fg_shape_of(y));
    const fg_tensor t = fg_mul(y, w);
    const fg_tensor loss = fg_sum(t);
    fg_tensor g;
    cr_assert_eq(fg_grad(loss, 1, &x, &g), FG_OK, "%s", fg_graph_message(f->g));
    return run_on(f, g, 1);
}

Test(basic, gradient_of_a_cast_is_cast_back)
{
    feed f = { .g = fg_graph_new() };
    const fg_tensor x = give(&f, FG_F32, FG_DIMS(5));
    const fg_tensor half = fg_cast(x, FG_BF16);
    const fg_tensor whole = fg_cast(half, FG_F32);
    float *g = gradient(&f, whole, x);
    for (int i = 0; i < 5; i++)                        /* one rounding to 8 bits */
        cr_expect(fabsf(g[i] - value_at(i, 1)) <= fabsf(value_at(i, 1)) / 256);
    free(g);
    end(&f);
}

Test(basic, gradient_of_row_max_goes_to_the_first_of_equals)
{
    static const float in[] = { 1, 7, 3, 7, 7,   -INFINITY, -INFINITY, -1, -1, -2 };
    feed f = { .g = fg_graph_new() };
    const fg_tensor x = give(&f, FG_F32, FG_DIMS(2, 5));
    memcpy(f.data[0], in, sizeof in);
    float *g = gradient(&f, fg_row_max(x), x);
    for (int i = 0; i < 10; i++)
        cr_expect(g[i] == (i == 1 ? value_at(0, 1) : i == 7 ? value_at(1, 1) : 0), "element %d", i);
    free(g);
    end(&f);
}

Test(basic, softmax_of_an_empty_row_is_0_and_nan_goes_through)
{
    feed f = { .g = fg_graph_new() };
    const fg_tensor x = give(&f, FG_F32, FG_DIMS(3, 19));
    float *in = f.data[0];
    for (int i = 0; i < 19; i++) in[i] = -INFINITY;
    for (int i = 19; i < 38; i++) in[i] = i == 25 ? 1000 : -INFINITY;
    in[50] = NAN;
    float *y = run_on(&f, fg_softmax(x), 1);
    for (int i = 0; i < 38; i++) cr_expect(y[i] == (i == 25), "element %d is %g", i, y[i]);
    for (int i = 38; i < 57; i++) cr_expect(isnan(y[i]));
    free(y);
    float *l = run_on(&f, fg_log_sum_exp(x), 1);
    cr_expect(l[0] == -INFINITY && l[1] == 1000 && isnan(l[2]), "%g %g %g", l[0], l[1], l[2]);
    free(l);
    float *m = run_on(&f, fg_row_max(x), 1);
    cr_expect(m[0] == -INFINITY && m[1] == 1000 && isnan(m[2]), "%g %g %g", m[0], m[1], m[2]);
    free(m);
    float *g = gradient(&f, fg_log_sum_exp(x), x);
    for (int i = 0; i < 38; i++) cr_expect(isfinite(g[i]), "gradient %d is %g", i, g[i]);
    free(g);
    end(&f);
}

static void check_mask(bool with_first, bool with_past, int64_t window)
{
    enum { B = 2, H = 3, M = 70 };
    const int64_t N = with_past ? 100 : M, held = with_past ? 25 : 0;
    feed f = { .g = fg_graph_new() };
    const fg_tensor s = give(&f, FG_F32, FG_DIMS(B, H, M, N));
    fg_tensor first = { 0 }, past = { 0 };
    int32_t *starts = NULL;
    if (with_first) {
        first = give(&f, FG_I32, FG_DIMS(B, M));
        starts = f.data[f.n - 1];
        for (int i = 0; i < B * M; i++) starts[i] = i % 9 == 0 ? 200 : i % M / 20 * 20;
    }
    if (with_past) {
        past = give(&f, FG_I32, FG_DIMS(1));
        *(int32_t *)f.data[f.n - 1] = (int32_t)held;
    }
    const fg_tensor y = fg__attention_mask(FG_HERE, s, first, past, window);
    float *got = run_on(&f, y, 2), *g = gradient(&f, y, s);
    for (int64_t k = 0; k < B * H * M * N; k++) {
        const int64_t j = k % N, i = k / N % M, p = held + i, b = k / N / M / H;
        const bool late = starts && j < starts[b * M + i], far = window && p - j >= window;
        const bool sees = j <= p && !late && !far;
        const float want = sees ? ((float *)f.data[0])[k] : -INFINITY;
        cr_assert(got[k] == want, "element %lld", (long long)k);
        cr_assert(g[k] == (sees ? value_at(k, f.n - 1) : 0), "gradient %lld", (long long)k);
    }
    free(got);
    free(g);
    end(&f);
}

Test(basic, attention_mask_leaves_what_a_query_may_see)
{
    check_mask(false, false, 0);
    check_mask(true, false, 0);
    check_mask(false, true, 0);
    check_mask(true, true, 13);
    check_mask(false, false, 1);
}

/* ---- refusals ------------------------------------------------------------------------------- */

static fg_tensor refused(fg_graph *g, int i)
{
    const fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(3, 5));
    const fg_tensor k = fg_input(g, "k", FG_I32, FG_DIMS(3, 5));
    const fg_tensor one = fg_input(g, "one", FG_F32, (fg_shape){ 0 });
    const fg_tensor four = fg_input(g, "four", FG_F32, FG_DIMS(1, 2, 3, 5));
    switch (i) {
    case 0: return fg_add(x, fg_slice(x, 1, 0, 2));
    case 1: return fg_mul(x, k);
    case 2: return fg_exp(k);
    case 3: return fg_cast(x, FG_I32);
    case 4: return fg_sum_to(x, FG_DIMS(4));
    case 5: return fg_sum_to(x, FG_DIMS(1, 3, 5));
    case 6: return fg_broadcast_to(x, FG_DIMS(3, 6));
    case 7: return fg_row_max(one);
    case 8: return fg_cumsum(x, 2, false);
    case 9: return fg_reshape(x, FG_DIMS(4, 4));
    case 10: return fg_permute(x, FG_DIMS(1, 1));
    case 11: return fg_permute(x, FG_DIMS(1, 2));
    case 12: return fg_permute(x, FG_DIMS(0));
    case 13: return fg_slice(x, 1, 2, 6);
    case 14: return fg_slice(x, -3, 0, 1);
    case 15: return fg_slice(x, 0, 2, 2);
    case 16: return fg_concat(x, one, 0);
    case 17: return fg_concat(x, k, 0);
    case 18: return fg_concat(x, fg_reshape(x, FG_DIMS(5, 3)), 0);
    case 19: return fg_fill(g, FG_DIMS(3, 0), 1);
    case 20: return fg_softmax(one);
    case 21: return fg__attention_mask(FG_HERE, four, (fg_tensor){ 0 }, (fg_tensor){ 0 }, 0);
    case 22: return fg__attention_mask(FG_HERE, x, (fg_tensor){ 0 }, (fg_tensor){ 0 }, 0);
    default: return (fg_tensor){ 0 };
    }
}

Test(basic, refusals_state_rule_and_numbers)
{
    static const struct { fg_status status; const char *text; } want[] = {
        { FG_ERR_SHAPE, "axis -1 is 2 in input 1, 5 before it; they must be equal or 1" },
        { FG_ERR_DTYPE, "input 1 is i32; it must be f32 or bf16" },
        { FG_ERR_DTYPE, "x is i32; it must be f32 or bf16" },
        { FG_ERR_DTYPE, "to is i32; a cast goes to f32 or bf16" },
        { FG_ERR_SHAPE, "axis -1 of extent 4 does not broadcast to 5; it must be equal or 1" },
        { FG_ERR_SHAPE, "3 axes do not broadcast to 2" },
        { FG_ERR_SHAPE, "axis -1 of extent 5 does not broadcast to 6; it must be equal or 1" },
        { FG_ERR_SHAPE, "x has rank 0; a row needs at least one axis" },
        { FG_ERR_SHAPE, "axis 2 of a tensor of rank 2" },
        { FG_ERR_SHAPE, "x has 15 elements, the other shape 16; they must be equal" },
        { FG_ERR_SHAPE, "order names axis 1 twice" },
        { FG_ERR_SHAPE, "order names axis 2 of a tensor of rank 2" },
        { FG_ERR_SHAPE, "order names 1 axes, x has 2" },
        { FG_ERR_SHAPE, "[2:6] is not a part of axis 1 of extent 5" },
        { FG_ERR_SHAPE, "axis -1 of a tensor of rank 2" },
        { FG_ERR_SHAPE, "[2:2] is not a part of axis 0 of extent 3" },
        { FG_ERR_SHAPE, "a has 2 axes, b 0; they must be equal" },
        { FG_ERR_DTYPE, "a is f32 and b is i32; they must be equal" },
        { FG_ERR_SHAPE, "axis 1 is 5 in a and 3 in b; only axis 0 may differ" },
        { FG_ERR_SHAPE, "extent 0 of axis 1 is below 1" },
        { FG_ERR_SHAPE, "x has rank 0; a row needs at least one axis" },
        { FG_ERR_SHAPE, "3 queries and 5 keys; without past they must be equal" },
        { FG_ERR_SHAPE, "s has rank 2; it must be [B,H,M,N]" },
    };
    for (int i = 0; i < (int)(sizeof want / sizeof want[0]); i++) {
        fg_graph *g = fg_graph_new();
        const fg_tensor y = refused(g, i);
        cr_expect(!fg_ok(y), "case %d is not refused", i);
        cr_expect_eq(fg_graph_status(g), want[i].status, "case %d: %s", i, fg_graph_message(g));
        cr_expect(strstr(fg_graph_message(g), want[i].text) != NULL, "case %d: %s lacks \"%s\"", i,
                  fg_graph_message(g), want[i].text);
        cr_expect_eq(fg_graph_errors(g), 1, "case %d", i);
        fg_graph_free(g);
    }
}
