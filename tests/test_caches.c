/* test_caches.c - attention, token shift and rotary positions over a sequence cut in chunks, with
 * caches, equal one pass over the whole sequence; and the two small ops equal their formulas. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "fox_autodiff.h"
#include "fox_ops.h"

enum { B = 2, T = 150, H = 4, HKV = 2, D = 24 };
typedef struct {
    float q[B * T * H * D], k[B * T * HKV * D], v[B * T * HKV * D], a[B * T * HKV], f[B * T * H];
} tokens;
typedef struct {
    float o[B * T * H * D], lse[B * T * H];
} answer;
typedef struct {
    bool gate, shift;
    int64_t window;
    const int32_t *first;
} mode;

static float number(uint64_t *s)             /* in [-1,1) */
{
    *s = *s * 6364136223846793005u + 1442695040888963407u;
    return (float)(*s >> 40) * 0x1p-23f - 1;
}
static void draw(tokens *x)
{
    uint64_t s = 5;
    for (size_t i = 0; i < sizeof x->q / 4; i++) x->q[i] = 2 * number(&s);
    for (size_t i = 0; i < sizeof x->k / 4; i++) x->k[i] = 2 * number(&s);
    for (size_t i = 0; i < sizeof x->v / 4; i++) x->v[i] = number(&s);
    for (size_t i = 0; i < sizeof x->a / 4; i++) x->a[i] = (number(&s) + 1) / 2;
    for (size_t i = 0; i < sizeof x->f / 4; i++) x->f[i] = (number(&s) - 1) * (i % 13 ? 0.05f : 3);
}

/* Rows [t0, t0 + n) of [B,T,row]. */
static void cut(float *to, const float *from, int64_t t0, int64_t n, int64_t row)
{
    for (int64_t b = 0; b < B; b++)
        memcpy(to + b * n * row, from + (b * T + t0) * row, (size_t)(n * row) * 4);
}
static void paste(float *to, const float *from, int64_t t0, int64_t n, int64_t row)
{
    for (int64_t b = 0; b < B; b++)
        memcpy(to + (b * T + t0) * row, from + b * n * row, (size_t)(n * row) * 4);
}

/* Tokens [t0, t0 + n), with caches if asked, through shift, rope and attention: a layer's own
 * order. */
static void run(fg_store *s, const tokens *x, const mode *m, bool caches, int64_t t0, int64_t n,
                answer *y)
{
    fg_graph *g = fg_graph_new();
    fg_tensor past = { 0 }, first = { 0 };
    if (caches) past = fg_input(g, "past", FG_I32, FG_DIMS(1));
    if (m->first) first = fg_input(g, "first", FG_I32, FG_DIMS(B, n));
    fg_graph_sequence(g, (fg_sequence){ .first = first, .past = past, .capacity = T + 7 });
    const fg_tensor in[] = {
        fg_input(g, "q", FG_F32, FG_DIMS(B, n, H, D)),
        fg_input(g, "k", FG_F32, FG_DIMS(B, n, HKV, D)),
        fg_input(g, "v", FG_F32, FG_DIMS(B, n, HKV, D)),
        fg_input(g, "a", FG_F32, FG_DIMS(B, n, HKV)),
        fg_input(g, "f", FG_F32, FG_DIMS(B, n, H)),
    };
    fg_tensor q = in[0], k = in[1], v = in[2];
    fg_scope_push(g, "layer");
    if (m->shift) k = fg_shift_mix(k, in[3]);
    if (m->shift) v = fg_shift_mix(v, in[3]);
    q = fg_rope(q, 100);
    k = fg_rope(k, 100);
    const fg_tensor o =
        fg_forget_attention(q, k, v, m->gate ? in[4] : (fg_tensor){ 0 }, 0.3, m->window);
    fg_scope_pop(g);
    fg_output(o, "o");
    const fg_tensor lse = fg_result(o, 1);
    fg_output(lse, "lse");
    cr_assert_eq(fg_graph_status(g), FG_OK, "%s", fg_graph_message(g));
    fg_plan *p = fg_plan_new(g, s);
    cr_assert_eq(fg_plan_status(p), FG_OK, "%s", fg_plan_message(p));
    const int64_t row[] = { H * D, HKV * D, HKV * D, HKV, H };
    const float *from[] = { x->q, x->k, x->v, x->a, x->f };
    float *buffer = malloc(sizeof *y);
    for (int i = 0; i < 5; i++) {
        if ((i == 3 && !m->shift) || (i == 4 && !m->gate)) continue;
        cut(buffer, from[i], t0, n, row[i]);
        cr_assert_eq(fg_write(p, in[i], buffer, (size_t)(B * n * row[i]) * 4), FG_OK, "%s",
                     fg_plan_message(p));
    }
    const int32_t at = (int32_t)t0;
    if (caches) cr_assert_eq(fg_write(p, past, &at, 4), FG_OK);
    if (m->first) {
        int32_t rows[B * T];
        for (int64_t b = 0; b < B; b++) memcpy(rows + b * n, m->first + b * T + t0, (size_t)n * 4);
        cr_assert_eq(fg_write(p, first, rows, (size_t)(B * n) * 4), FG_OK);
    }
    cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
    cr_assert_eq(fg_read(p, o, buffer, (size_t)(B * n * H * D) * 4), FG_OK);
    paste(y->o, buffer, t0, n, H * D);
    cr_assert_eq(fg_read(p, lse, buffer, (size_t)(B * n * H) * 4), FG_OK);
    paste(y->lse, buffer, t0, n, H);
    free(buffer);
    fg_plan_free(p);
    fg_graph_free(g);
}

static double apart(const float *x, const float *y, size_t n)
{
    double d = 0;
    for (size_t i = 0; i < n; i++) {
        if (x[i] == y[i]) continue;
        const double e = fabs((double)x[i] - (double)y[i]);
        if (!(e <= d)) d = e;
    }
    return d;
}

/* The whole at once against chunks of the given lengths, 0 for one token at a time to the end. */
static void compare(const char *what, mode m, const int *length, double limit)
{
    fg_backend *b = fg_backend_open("cpu", 2);
    tokens *x = malloc(sizeof *x);
    answer *whole = calloc(1, sizeof *whole), *parts = calloc(1, sizeof *parts);
    draw(x);
    fg_store *s = fg_store_new(b), *other = fg_store_new(b);
    run(other, x, &m, false, 0, T, whole);
    for (int64_t t = 0, n; t < T; t += n) {
        n = *length ? *length++ : 1;
        run(s, x, &m, true, t, n < T - t ? n : T - t, parts);
    }
    const double o = apart(whole->o, parts->o, B * T * H * D),
                 lse = apart(whole->lse, parts->lse, B * T * H);
    cr_expect(o <= limit, "%s: o differs by %.1e", what, o);
    cr_expect(lse <= 2 * limit, "%s: lse differs by %.1e", what, lse);
    fg_store_free(s);
    fg_store_free(other);
    fg_backend_close(b);
    free(x);
    free(whole);
    free(parts);
}

static const mode plain = { true, true, 0, NULL };

Test(caches, long_chunks_change_no_bit)
{
    compare("chunks", plain, (const int[]){ 37, 64, 8, 41 }, 0);
}
Test(caches, one_chunk_of_all_changes_no_bit)
{
    compare("one chunk", plain, (const int[]){ T }, 0);
}
/* |o| <= 1; f32 sums of up to 150 keys in another order */
Test(caches, prefill_and_single_steps_equal_the_whole)
{
    compare("steps", plain, (const int[]){ 61, 0 }, 2e-6);
}
Test(caches, single_steps_from_nothing_equal_the_whole)
{
    compare("steps", plain, (const int[]){ 0 }, 2e-6);
}
Test(caches, short_chunks_equal_the_whole)
{
    compare("short chunks", plain, (const int[]){ 3, 7, 60, 2, 5, 7, 7, 30, 4, 6, 0 }, 2e-6);
}
Test(caches, no_gate_no_shift_and_window)
{
    compare("no gate", (mode){ false, false, 0, NULL }, (const int[]){ 33, 5, 0 }, 2e-6);
    compare("window", (mode){ true, true, 20, NULL }, (const int[]){ 33, 5, 40, 0 }, 2e-6);
    compare("window of one", (mode){ true, false, 1, NULL }, (const int[]){ 33, 5, 40, 0 }, 2e-6);
}
Test(caches, left_padding_and_documents)
{
    int32_t first[B * T];
    for (int t = 0; t < T; t++)
        first[t] = 0, first[T + t] = 70; /* row 1: 70 positions of padding */
    compare("padding", (mode){ true, true, 0, first }, (const int[]){ 100, 3, 0 }, 2e-6);
    compare("padding, steps", (mode){ true, true, 0, first }, (const int[]){ 0 }, 2e-6);
    for (int t = 0; t < T; t++)
        first[t] = t < 90 ? 0 : 90, first[T + t] = t < 64 ? 3 : t < 65 ? 64 : 65;
    compare("documents", (mode){ true, true, 0, first }, (const int[]){ 80, 9, 3, 20, 0 }, 2e-6);
}

/* Two calls in one scope have caches of their own, found again by the next graph. */
Test(caches, two_calls_in_one_scope_do_not_share)
{
    fg_backend *b = fg_backend_open("cpu", 1);
    fg_store *s = fg_store_new(b);
    float y[2][2] = { { 0 } };
    for (int step = 0; step < 2; step++) {
        fg_graph *g = fg_graph_new();
        const fg_tensor past = fg_input(g, "past", FG_I32, FG_DIMS(1));
        fg_graph_sequence(g, (fg_sequence){ .past = past, .capacity = 4 });
        const fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(1, 1, 1, 1));
        const fg_tensor z = fg_scale(x, -2, 0);
        const fg_tensor none = { 0 };
        const fg_tensor a = fg_forget_attention(x, x, x, none, 0, 0);
        const fg_tensor c = fg_forget_attention(x, x, z, none, 0, 0);
        fg_output(a, "a");
        fg_output(c, "c");
        fg_plan *p = fg_plan_new(g, s);
        const float value = step ? 3 : 1;
        const int32_t at = step;
        fg_write(p, x, &value, 4);
        fg_write(p, past, &at, 4);
        cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
        fg_read(p, a, &y[step][0], 4);
        fg_read(p, c, &y[step][1], 4);
        fg_plan_free(p);
        fg_graph_free(g);
    }
    cr_assert_float_eq(y[0][0], 1, 1e-6);
    cr_assert_float_eq(y[0][1], -2, 1e-6);
    cr_assert_float_eq(y[1][0], 2, 1e-6, "the mean of values 1 and 3 is 2, not %g", y[1][0]);
    cr_assert_float_eq(y[1][1], -4, 1e-6, "the mean of values -2 and -6 is -4, not %g", y[1][1]);
    fg_store_entry e;
    cr_assert(fg_store_find(s, "@cache.v", &e) && fg_store_find(s, "@cache.v.1", &e));
    cr_assert(!fg_store_find(s, "@cache.v.2", &e));
    fg_store_free(s);
    fg_backend_close(b);
}

Test(caches, without_room_are_refused)
{
    fg_graph *g = fg_graph_new();
    const fg_tensor past = fg_input(g, "past", FG_I32, FG_DIMS(1));
    fg_graph_sequence(g, (fg_sequence){ .past = past });
    const fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(1, 1, 1, 2)), none = { 0 };
    fg_forget_attention(x, x, x, none, 1, 0);
    cr_assert_eq(fg_graph_status(g), FG_ERR_USAGE);
    cr_assert(strstr(fg_graph_message(g), "capacity is 0"), "%s", fg_graph_message(g));
    fg_graph_free(g);
}

Test(caches, let_no_gradient_through)
{
    for (int shift = 0; shift < 2; shift++) {
        fg_graph *g = fg_graph_new();
        const fg_tensor past = fg_input(g, "past", FG_I32, FG_DIMS(1));
        fg_graph_sequence(g, (fg_sequence){ .past = past, .capacity = 4 });
        const fg_tensor x = fg_param(g, "x", FG_DIMS(1, 1, 1, 2), ((fg_init){ .kind = FG_ONES })),
                        none = { 0 };
        const fg_tensor a = fg_input(g, "a", FG_F32, FG_DIMS(1, 1, 1));
        fg_tensor grad;
        const fg_tensor y = shift ? fg_shift_mix(x, a) : fg_forget_attention(x, x, x, none, 1, 0);
        const fg_tensor loss = fg_sum(y);
        cr_assert_eq(fg_graph_status(g), FG_OK, "%s", fg_graph_message(g));
        cr_assert_eq(fg_grad(loss, 1, &x, &grad), FG_ERR_NO_VJP);
        cr_assert(strstr(fg_graph_message(g), "caches"), "%s", fg_graph_message(g));
        fg_graph_free(g);
    }
}

/* Far positions, in double by the C library. */
Test(rope, equals_its_formula_far_into_a_sequence)
{
    enum { N = 200, W = 6 };
    fg_backend *b = fg_backend_open("cpu", 2);
    fg_store *s = fg_store_new(b);
    for (int few = 0; few < 2; few++) {
        const int64_t n = few ? 5 : N;
        const int32_t at = 1000000;
        fg_graph *g = fg_graph_new();
        const fg_tensor past = fg_input(g, "past", FG_I32, FG_DIMS(1));
        fg_graph_sequence(g, (fg_sequence){ .past = past, .capacity = 1 });
        const fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(1, n, 2, W));
        const fg_tensor y = fg_rope(x, 500000);
        fg_output(y, "y");
        fg_plan *p = fg_plan_new(g, s);
        float *in = malloc(sizeof(float) * N * 2 * W), *out = malloc(sizeof(float) * N * 2 * W);
        uint64_t seed = 9;
        for (int i = 0; i < N * 2 * W; i++) in[i] = number(&seed);
        fg_write(p, x, in, (size_t)(n * 2 * W) * 4);
        fg_write(p, past, &at, 4);
        cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
        fg_read(p, y, out, (size_t)(n * 2 * W) * 4);
        for (int64_t r = 0; r < n * 2; r++)
            for (int i = 0; i < W / 2; i++) {
                const double a = (double)(at + r / 2) * pow(500000, -2.0 * i / W);
                const double u = (double)in[r * W + i], w = (double)in[r * W + i + W / 2];
                cr_assert_float_eq((double)out[r * W + i], u * cos(a) - w * sin(a), 3e-7);
                cr_assert_float_eq((double)out[r * W + i + W / 2], u * sin(a) + w * cos(a), 3e-7);
            }
        free(in);
        free(out);
        fg_plan_free(p);
        fg_graph_free(g);
    }
    fg_store_free(s);
    fg_backend_close(b);
}
