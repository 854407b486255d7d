/* test_f64_cuda_attention.c - forgetting attention and its gradient on a GPU, over shapes, masks,
 * gates and values that are hard, against sums row by row in double; skipped, with the reason,
 * where there is no GPU.
 *
 * Settings are drawn until every two that can go together have done so.  Each runs three times,
 * alone and from a CUDA graph, and must give the same bits; memory is NaN before.  What is asked is
 * said in attention_judge.h.  FG_TEST_CASE=N runs setting N alone, FG_TEST_LENGTH bounds T and the
 * caches. */
#include "attention_judge.h"

static void compare(const problem *p, fg_backend *gpu, bool all)
{
    const int64_t n = count_of(p, LSE);
    const bool gradient = p->s.past < 0;
    reference exact = reference_new(p, false, gradient), base = reference_new(p, true, gradient);
    float *y[RESULTS];
    reference *const both[] = { &exact, &base };
    run(p, gpu, y);
    for (int k = 0; k < 2; k++) {
        reference_rows(both[k], all ? 1 : (n / 64) | 1);
        if (all && gradient) reference_columns(both[k]);
    }
    const allowance of = allowance_of(&exact);
    for (int i = 0; i < (all ? results_of(p) : gradient ? GK : GQ); i++)
        judge_result(p, i, &exact, &base, y, i <= GQ ? exact.known : NULL, &of);
    if (all && gradient) compare_logits(p, &exact, &base, y, &of);
    free_results(y);
    reference_free(&exact);
    reference_free(&base);
}

/* ---- settings, every two together ----------------------------------------------------------- */

enum { LENGTH, WIDTH, HEADS, GROUP, WINDOW, DOCUMENTS, GATES, VALUES, TYPE, PITCH, PAST, FACTORS };
static const int64_t lengths[] = { 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255,
    257, 1000, 2047, 4096, 4097, 16384 };
static const int64_t widths[] = { 32, 64, 96, 128, 256, 20 }, groups[] = { 1, 2, 3, 8 };
static const int64_t heads[][2] = { { 1, 1 }, { 1, 3 }, { 2, 2 }, { 3, 1 }, { 9, 17 } }; /* B Hkv */
static const int64_t windows[] = { 0, 1, 64, 100, 4096 }, pasts[] = { -1, 1, 37, 128 };
static const int levels[FACTORS] = { 21, 6, 5, 4, 5, DOCUMENT_KINDS, GATE_KINDS, VALUE_KINDS, 2, 2,
    4 };
typedef struct { bool of[FACTORS][21][FACTORS][21]; } pairs;

static setting setting_of(const int *x)
{
    setting s = { .B = heads[x[HEADS]][0], .M = lengths[x[LENGTH]], .Hkv = heads[x[HEADS]][1],
                  .D = widths[x[WIDTH]], .window = windows[x[WINDOW]], .past = pasts[x[PAST]],
                  .gates = (gate_kind)x[GATES], .values = (value_kind)x[VALUES],
                  .documents = (document_kind)x[DOCUMENTS], .bf16 = x[TYPE] == 0,
                  .pitched = x[PITCH] == 1 };
    s.H = s.Hkv * groups[x[GROUP]];
    while (s.B * s.M * s.H * s.D < 4096) s.B *= 2;           /* enough for a fair measure */
    return s;
}

/* Pitched rows are those of one product, so not of a cache; not too much for a test. */
static bool can_be(const int *x)
{
    const setting s = setting_of(x);
    return !(s.pitched && s.past >= 0) && s.B * (s.M + 128) * s.H * s.D <= 6000000;
}

static int news_of(const pairs *done, const int *x)
{
    int n = 0;
    for (int f = 0; f < FACTORS; f++)
        for (int g = 0; g < f; g++) n += !done->of[f][x[f]][g][x[g]];
    return n;
}

static int below(int n) { return (int)(uniform() * n); }

/* A setting with levels a of factor f and b of g, of those drawn the one with most new pairs. */
static bool draw_setting(const pairs *done, int f, int a, int g, int b, int *best)
{
    int most = 0, x[FACTORS];
    for (int k = 0; k < 200; k++) {
        for (int i = 0; i < FACTORS; i++) x[i] = below(levels[i]);
        x[f] = a, x[g] = b;
        const int n = can_be(x) ? news_of(done, x) : 0;
        if (n > most) most = n, memcpy(best, x, sizeof x);
    }
    return most > 0;
}

/* How many multiply-adds a row's sums take, all rows together. */
static double work_of(const setting *s)
{
    const double M = (double)s->M, past = s->past < 0 ? 0 : (double)s->past, w = (double)s->window;
    const double keys = past + M / 2 + 1;
    return (double)(s->B * s->M * s->H * s->D) * (w > 0 && w < keys ? w : keys);
}

static void check_setting(const int *x, int at, fg_backend *gpu)
{
    const char *only = getenv("FG_TEST_CASE");
    if ((only && atoi(only) != at) || lengths[x[LENGTH]] > fg__longest()) return;
    seed = (uint64_t)at + 1;
    problem p = problem_new(setting_of(x));
    if (only) fprintf(stderr, "%d: %s\n", at, words(&p.s));
    compare(&p, gpu, work_of(&p.s) <= 2e8);
    problem_free(&p);
}

Test(cuda_attention, is_as_good_as_its_definition_whatever_meets)
{
    fg_backend *gpu = fg__cuda_or_skip(true);
    pairs *done = calloc(1, sizeof *done);
    int x[FACTORS] = { 0 }, n = 0;
    for (int f = 0; gpu && f < FACTORS; f++)
        for (int g = 0; g < f; g++)
            for (int i = 0; i < levels[f] * levels[g]; i++) {
                const int a = i % levels[f], b = i / levels[f];
                const uint64_t kept = seed = (uint64_t)(n + 7) * 77;
                if (done->of[f][a][g][b] || !draw_setting(done, f, a, g, b, x)) continue;
                for (int u = 0; u < FACTORS; u++)
                    for (int v = 0; v < FACTORS; v++) done->of[u][x[u]][v][x[v]] = true;
                check_setting(x, n++, gpu);
                seed = kept;
            }
    fprintf(stderr, "%d settings\n", n);
    if (gpu) print_worst();
    cr_expect_eq(fg__traps.broken, 0, "%d allocations were overrun", fg__traps.broken);
    free(done);
    fg_backend_close(gpu);
}

/* ---- the gate's gradient -------------------------------------------------------------------- */

/* Where sums over columns alone would fail: short memory, v with a mean, many tokens. */
Test(cuda_attention, gradients_of_gates_that_forget_fast_keep_their_digits)
{
    static const setting kinds[] = {
        { 1, 4096, -1, 1, 1, 64, 0, MEMORY_4, NORMAL, ONE_DOCUMENT, true, false },
        { 1, 4096, -1, 1, 1, 64, 0, MEMORY_32, MEAN_V, ONE_DOCUMENT, true, false },
        { 1, 4097, -1, 1, 1, 128, 0, MEMORY_4, MEAN_V, ONE_DOCUMENT, true, false },
        { 1, 4097, -1, 1, 1, 128, 0, MEMORY_32, NORMAL, MANY, true, false },
        { 1, 2047, -1, 8, 2, 64, 0, LONG_GATES, MEAN_V, GIANT, true, false },
        { 1, 2047, -1, 2, 1, 64, 0, ALTERNATING, MEAN_V, ONE_DOCUMENT, true, false },
        { 1, 2047, -1, 1, 1, 256, 0, MEMORY_4, MEAN_V, ONE_DOCUMENT, true, false },
    };
    fg_backend *gpu = fg__cuda_or_skip(true);
    for (size_t i = 0; gpu && i < sizeof kinds / sizeof kinds[0]; i++) {
        if (kinds[i].M > fg__longest()) continue;
        seed = 11 + i;
        problem p = problem_new(kinds[i]);
        compare(&p, gpu, true);
        problem_free(&p);
    }
    cr_expect_eq(fg__traps.broken, 0, "%d allocations were overrun", fg__traps.broken);
    fg_backend_close(gpu);
}

/* ---- what must hold to the bit -------------------------------------------------------------- */

/* Every path: wgmma of 64 and 128, tiles of 256 and of odd widths, f32; and many of them. */
static const setting paths[] = {
    { 2, 1000, -1, 4, 2, 64, 0, NORMAL_GATES, NORMAL, ONE_DOCUMENT, true, false },
    { 1, 1000, -1, 3, 3, 128, 0, NORMAL_GATES, NORMAL, ONE_DOCUMENT, true, false },
    { 1, 1000, -1, 3, 1, 256, 0, NORMAL_GATES, NORMAL, ONE_DOCUMENT, true, false },
    { 1, 1000, -1, 3, 1, 20, 0, NORMAL_GATES, NORMAL, ONE_DOCUMENT, true, false },
    { 1, 1000, -1, 2, 1, 96, 0, NORMAL_GATES, NORMAL, ONE_DOCUMENT, false, false },
    { 1, 16384, -1, 24, 24, 64, 0, NORMAL_GATES, NORMAL, ONE_DOCUMENT, true, false },
    { 1, 16384, -1, 12, 12, 128, 0, NORMAL_GATES, NORMAL, ONE_DOCUMENT, true, false },
};

typedef void (*claim)(const setting *s, fg_backend *gpu);
static void for_all_paths(claim f)
{
    fg_backend *gpu = fg__cuda_or_skip(true);
    for (size_t i = 0; gpu && i < sizeof paths / sizeof paths[0]; i++) {
        if (paths[i].M > fg__longest()) continue;
        seed = 101 + i;
        f(&paths[i], gpu);
    }
    cr_expect_eq(fg__traps.broken, 0, "%d allocations were overrun", fg__traps.broken);
    fg_backend_close(gpu);
}

static void same(const problem *p, int i, const float *x, const float *y, int64_t from, int64_t to)
{
    const size_t row = (size_t)(count_of(p, i) / p->N * 4);  /* B = 1, or all rows */
    cr_expect(!memcmp((const char *)x + (size_t)from * row, (const char *)y + (size_t)from * row,
                      (size_t)(to - from) * row),
              "%s: %s of tokens %lld to %lld has other bits", words(&p->s), result_names[i],
              (long long)from, (long long)to - 1);
}

static void ones_are_none(const setting *s, fg_backend *gpu)
{
    setting with = *s, without = *s;
    with.gates = ONES, without.gates = NO_GATES;
    const uint64_t kept = seed;
    problem p = problem_new(with);
    seed = kept;
    problem q = problem_new(without);
    float *x[RESULTS], *y[RESULTS];
    run(&p, gpu, x), run(&q, gpu, y);
    for (int i = O; i < GLOG_F; i++) same(&p, i, x[i], y[i], 0, p.N);
    free_results(x), free_results(y);
    problem_free(&p), problem_free(&q);
}
Test(cuda_attention, gates_of_one_are_no_gates) { for_all_paths(ones_are_none); }

static void later_tokens_change_nothing(const setting *s, fg_backend *gpu)
{
    setting one = *s;
    one.B = 1;
    problem p = problem_new(one);
    const int64_t at = p.N / 2 - 3;
    float *x[RESULTS], *y[RESULTS];
    run(&p, gpu, x);
    for (int64_t i = 0; i < count_of(&p, O); i++)
        if (i >= count_of(&p, O) / p.N * at) p.q[i] *= -2, p.go[i] *= -2;
    for (int64_t i = 0; i < count_of(&p, GK); i++)
        if (i >= count_of(&p, GK) / p.N * at) p.k[i] *= 2, p.v[i] *= 8;
    for (int64_t i = one.H * at; i < count_of(&p, GLOG_F); i++) p.log_f[i] *= 0.5f;
    run(&p, gpu, y);
    for (int i = O; i <= GQ; i++) same(&p, i, x[i], y[i], 0, at);
    free_results(x), free_results(y);
    problem_free(&p);
}
Test(cuda_attention, later_tokens_change_nothing_before) {
    for_all_paths(later_tokens_change_nothing);
}

/* The first gate lies between no two tokens; go and glse twice as large are gradients twice as
 * large, v twice as large is o twice as large. */
static void factors_of_two(const setting *s, fg_backend *gpu)
{
    problem p = problem_new(*s);
    float *x[RESULTS], *y[RESULTS];
    run(&p, gpu, x);
    for (int64_t b = 0; b < s->B; b++) p.log_f[b * p.N * s->H] = -5;
    for (int64_t i = 0; i < count_of(&p, O); i++) p.go[i] *= 2;
    for (int64_t i = 0; i < count_of(&p, LSE); i++) p.glse[i] *= 2;
    run(&p, gpu, y);
    for (int i = O; i < RESULTS; i++) {
        for (int64_t e = 0; i >= GQ && e < count_of(&p, i); e++) x[i][e] *= 2;
        same(&p, i, x[i], y[i], 0, p.N);
    }
    free_results(y);
    for (int64_t i = 0; i < count_of(&p, GK); i++) p.v[i] *= 2;
    run(&p, gpu, y);
    for (int64_t e = 0; e < count_of(&p, O); e++) x[O][e] *= 2;
    for (int i = O; i <= LSE; i++) same(&p, i, x[i], y[i], 0, p.N);
    free_results(x), free_results(y);
    problem_free(&p);
}
Test(cuda_attention, factors_of_two_come_through) { for_all_paths(factors_of_two); }

/* The sum over all pairs that straddle the first token is empty; what is left of it is rounding. */
static void nothing_straddles_the_first(const setting *s, fg_backend *gpu)
{
    setting mean = *s;
    mean.gates = MEMORY_32, mean.values = MEAN_V;
    problem p = problem_new(mean);
    float *x[RESULTS];
    double norm = 0;
    memset(p.glse, 0, (size_t)count_of(&p, LSE) * 4);
    run(&p, gpu, x);
    for (int64_t i = 0; i < count_of(&p, GLOG_F); i++)
        norm += (double)x[GLOG_F][i] * (double)x[GLOG_F][i] / (double)count_of(&p, GLOG_F);
    for (int64_t i = 0; i < s->B * s->H; i++) {
        const double first = (double)x[GLOG_F][i / s->H * p.N * s->H + i % s->H];
        cr_expect(fabs(first) <= 3 * 1.5e-2 * sqrt(norm), "%s: %g is left of the first, of %g",
                  words(&p.s), first, sqrt(norm));
    }
    free_results(x);
    problem_free(&p);
}
Test(cuda_attention, nothing_straddles_the_first_token)
{
    for_all_paths(nothing_straddles_the_first);
}

static void nothing_is_kept(const setting *s, fg_backend *gpu)
{
    setting alone = *s;
    alone.gates = NOTHING;
    problem p = problem_new(alone);
    float *x[RESULTS];
    run(&p, gpu, x);
    const int64_t group = s->H / s->Hkv;
    int64_t others = 0;
    for (int64_t i = 0; i < count_of(&p, O); i++) {
        const int64_t row = i / s->D / s->H, h = i / s->D % s->H / group;
        const float v = p.v[(row * s->Hkv + h) * s->D + i % s->D];
        others += fabsf(x[O][i] - v) > 1e-20f;               /* e^-60 of the token before */
    }
    cr_expect_eq(others, 0, "%s: %lld elements of o are not v", words(&p.s), (long long)others);
    free_results(x);
    problem_free(&p);
}
Test(cuda_attention, gates_of_zero_leave_each_token_itself) { for_all_paths(nothing_is_kept); }

/* All values of a head alike: o is that value, weights and o being rounded by 2^-8 at most, and
 * nothing else matters. */
static void equal_values(const setting *s, fg_backend *gpu)
{
    problem p = problem_new(*s);
    float *x[RESULTS], *y[RESULTS];
    double far = 0, before[RESULTS] = { 0 }, now[RESULTS] = { 0 };
    memset(p.glse, 0, (size_t)count_of(&p, LSE) * 4);
    run(&p, gpu, x);
    const int64_t line = s->Hkv * s->D, group = s->H / s->Hkv;
    for (int64_t i = 0; i < count_of(&p, GK); i++) p.v[i] = p.v[i % line];
    run(&p, gpu, y);
    for (int64_t i = 0; i < count_of(&p, O); i++) {
        const float v = p.v[i / s->D % s->H / group * s->D + i % s->D];
        far = fmax(far, fabs((double)(y[O][i] - v)) / fabs((double)v));
    }
    cr_expect(far <= (s->bf16 ? 0x1p-7 : 1e-5), "%s: o is off by %g of v", words(&p.s), far);
    for (int i = GQ; i < RESULTS; i++)
        for (int64_t e = 0; i != GV && e < count_of(&p, i); e++) {
            before[i] += (double)x[i][e] * (double)x[i][e];
            now[i] += (double)y[i][e] * (double)y[i][e];
        }
    for (int i = GQ; i < RESULTS; i++)
        cr_expect(now[i] <= 1.5e-2 * 1.5e-2 * before[i], "%s: %s is %g, %g with other values",
                  words(&p.s), result_names[i], sqrt(now[i]), sqrt(before[i]));
    free_results(x), free_results(y);
    problem_free(&p);
}
Test(cuda_attention, equal_values_are_the_result) { for_all_paths(equal_values); }

/* ---- gates that are no numbers -------------------------------------------------------------- */

/* A NaN and -inf in the second of three documents. */
static void bad_gates(const setting *s, fg_backend *gpu)
{
    setting one = *s;
    one.B = 1, one.documents = MANY;
    problem p = problem_new(one);
    const int64_t H = one.H, first = p.N / 3, second = 2 * p.N / 3, bad = (first + second) / 2;
    float *x[RESULTS], *y[RESULTS];
    for (int64_t i = 0; i < p.N; i++)
        p.first[i] = (int32_t)(i < first ? 0 : i < second ? first : second);
    for (int64_t h = 0; h < H; h++)      /* what they count as */
        p.log_f[bad * H + h] = p.log_f[(bad - 5) * H + h] = -100;
    run(&p, gpu, x);
    for (int64_t h = 0; h < H; h++)
        p.log_f[bad * H + h] = NAN, p.log_f[(bad - 5) * H + h] = -INFINITY;
    p.log_f[bad * H] = INFINITY;
    run(&p, gpu, y);
    for (int i = O; i <= GQ; i++) {
        int64_t numbers = 0, none = 0;
        const int64_t row = count_of(&p, i) / p.N;
        same(&p, i, x[i], y[i], 0, first), same(&p, i, x[i], y[i], second, p.N);
        for (int64_t e = first * row; e < bad * row; e++) none += !isfinite(y[i][e]);
        for (int64_t e = bad * row; e < second * row; e++) numbers += !isnan(y[i][e]);
        cr_expect(numbers == 0 && none == 0, "%s: %s has %lld numbers behind a NaN, %lld NaN "
                  "before", words(&p.s), result_names[i], (long long)numbers, (long long)none);
    }
    for (int i = GK; i <= GV; i++)
        same(&p, i, x[i], y[i], 0, first), same(&p, i, x[i], y[i], second, p.N);
    /* sums over 16 rows that hold some of both documents are lost to the second: a rounding */
    int64_t none = 0;
    for (int64_t e = second * H; e < count_of(&p, GLOG_F); e++) none += !isfinite(y[GLOG_F][e]);
    cr_expect_eq(none, 0, "%s: %lld of glog_f are no numbers", words(&p.s), (long long)none);
    same(&p, GLOG_F, x[GLOG_F], y[GLOG_F], 0, first);
    same(&p, GLOG_F, x[GLOG_F], y[GLOG_F], (second + 15) / 16 * 16, p.N);
    free_results(x), free_results(y);
    problem_free(&p);
}
Test(cuda_attention, bad_gates_stay_in_their_document) { for_all_paths(bad_gates); }

/* ---- long caches ---------------------------------------------------------------------------- */

/* Few queries, whose keys are split, and a tile of them; every width. */
Test(cuda_attention, long_caches_lose_nothing)
{
    static const int64_t caches[] = { 8200, 8192 + 1025, 66000 }, rows[] = { 1, 3, 16, 40 };
    static const gate_kind gates[] = { LONG_GATES, NO_GATES, ONE_RESET, MEMORY_32, NORMAL_GATES };
    fg_backend *gpu = fg__cuda_or_skip(true);
    for (int i = 0; gpu && i < 3 * 6 * 4; i++) {
        if (caches[i / 6 % 3] > fg__longest()) continue;
        const int64_t D = widths[i % 6], M = rows[i / 18], group = groups[(i + i / 6) % 4];
        const setting s = { .B = D < 64 ? 2 : 1, .M = M, .past = caches[i / 6 % 3] - M,
                            .H = group, .Hkv = 1, .D = D, .window = i % 7 == 3 ? 8500 : 0,
                            .gates = gates[i % 5], .values = i % 11 == 5 ? GROWING : NORMAL,
                            .documents = i % 4 == 1 ? PADDED : ONE_DOCUMENT, .bf16 = i % 13 != 7 };
        seed = 1001 + (uint64_t)i;
        problem p = problem_new(s);
        compare(&p, gpu, true);
        problem_free(&p);
    }
    if (gpu) print_worst();
    cr_expect_eq(fg__traps.broken, 0, "%d allocations were overrun", fg__traps.broken);
    fg_backend_close(gpu);
}
