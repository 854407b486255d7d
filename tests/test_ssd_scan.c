/* test_ssd_scan.c - the state space scan and the short convolution in single precision against
 * their recurrences in double: lengths around a chunk, documents, states, decays from nothing to
 * everything; cut in pieces; causal and the same for any number of threads, to the bit. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "fox_autodiff.h"
#include "fox_ops.h"

/* ---- a scan's arguments, results and gradients ----------------------------------------------- */

enum { X, DT, A, BS, CS, D, STATE, INPUTS };
enum { Y = INPUTS, END, ARRAYS };

typedef struct {
    int64_t B, T, H, P, G, N;
    int32_t *first;                      /* or NULL */
    float *in[INPUTS];
    float *wy, *wend;                    /* weights of the loss */
} scan;

typedef struct { float *y, *end, *grad[INPUTS]; } answer;
typedef struct { double *y, *end, *grad[INPUTS]; } truth;

static fg_shape shape_of(const scan *s, int i)
{
    switch (i) {
    case X: case Y: return FG_DIMS(s->B, s->T, s->H, s->P);
    case DT: return FG_DIMS(s->B, s->T, s->H);
    case BS: case CS: return FG_DIMS(s->B, s->T, s->G, s->N);
    case STATE: case END: return FG_DIMS(s->B, s->H, s->P, s->N);
    default: return FG_DIMS(s->H);
    }
}
static size_t count_of(const scan *s, int i) { return (size_t)fg_shape_count(shape_of(s, i)); }

static float number(uint64_t *s)             /* in [-1,1) */
{
    *s = *s * 6364136223846793005u + 1442695040888963407u;
    return (float)(*s >> 40) * 0x1p-23f - 1;
}
static float *draw(size_t n, uint64_t *seed)
{
    float *x = malloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = number(seed);
    return x;
}

/* a in -[1,16], dt about 0.01, as at the start of training. */
static scan new_scan(int64_t B, int64_t T, int64_t H, int64_t P, int64_t G, int64_t N)
{
    scan s = { B, T, H, P, G, N, NULL, { NULL }, NULL, NULL };
    uint64_t seed = (uint64_t)(T + 1000 * N);
    for (int i = 0; i < INPUTS; i++) s.in[i] = draw(count_of(&s, i), &seed);
    for (size_t i = 0; i < count_of(&s, DT); i++) s.in[DT][i] = expf(-4.5f + 2 * s.in[DT][i]);
    for (size_t i = 0; i < count_of(&s, A); i++) s.in[A][i] = -expf(1.4f + 1.4f * s.in[A][i]);
    s.wy = draw(count_of(&s, Y), &seed);
    s.wend = draw(count_of(&s, END), &seed);
    return s;
}

/* Documents of lengths 1, 2, 70, 1, 190, ...; sequence 1 begins with padding, as `left` says. */
static void cut_documents(scan *s, int32_t left)
{
    static const int32_t lengths[] = { 1, 2, 70, 1, 190, 5, 64, 33 };
    s->first = malloc((size_t)(s->B * s->T) * sizeof *s->first);
    for (int64_t b = 0; b < s->B; b++) {
        int32_t start = b == 1 ? left : -1, next = b == 1 ? left + 7 : 3;
        for (int32_t t = 0, k = 0; t < s->T; t++) {
            if (t == next) start = t, next += lengths[k++ % 8];
            s->first[b * s->T + t] = start;
        }
    }
}

static void free_scan(scan *s)
{
    for (int i = 0; i < INPUTS; i++) free(s->in[i]);
    free(s->first);
    free(s->wy);
    free(s->wend);
}

/* ---- the recurrence in double ---------------------------------------------------------------- */

/* States before every token, then the same backwards.  One head of one sequence. */
static void recur(const scan *s, int64_t b, int64_t h, truth *r)
{
    const int64_t P = s->P, N = s->N, n = P * N, g = h / (s->H / s->G);
    const double a = (double)s->in[A][h], d = (double)s->in[D][h];
    double *S = calloc((size_t)((s->T + 1) * n), sizeof *S);
    double *R = calloc((size_t)n, sizeof *R);
    const int64_t at = (b * s->H + h) * n;
    for (int64_t i = 0; i < n; i++) S[i] = (double)s->in[STATE][at + i];
    for (int64_t t = 0; t < s->T; t++) {
        const int64_t row = b * s->T + t, x = (row * s->H + h) * P, k = (row * s->G + g) * N;
        const double dt = (double)s->in[DT][row * s->H + h], decay = exp(dt * a);
        const int low = s->first ? s->first[row] : -1;
        double *now = S + (t + 1) * n;
        for (int64_t p = 0; p < P; p++) {
            double y = d * (double)s->in[X][x + p];
            for (int64_t i = 0; i < N; i++) {
                const double u = dt * (double)s->in[X][x + p] * (double)s->in[BS][k + i];
                const double old = low >= t ? 0 : now[p * N + i - n];
                now[p * N + i] = low > t ? 0 : decay * old + u;
                y += now[p * N + i] * (double)s->in[CS][k + i];
            }
            r->y[x + p] = low > t ? 0 : y;
        }
    }
    for (int64_t i = 0; i < n; i++) {
        r->end[at + i] = S[s->T * n + i];
        R[i] = (double)s->wend[at + i];
    }
    for (int64_t t = s->T - 1; t >= 0; t--) {
        const int64_t row = b * s->T + t, x = (row * s->H + h) * P, k = (row * s->G + g) * N;
        const double dt = (double)s->in[DT][row * s->H + h], decay = exp(dt * a);
        const int low = s->first ? s->first[row] : -1;
        const double *now = S + (t + 1) * n, *old = now - n;
        double direct = 0, gl = 0;
        for (int64_t p = 0; p < P && low <= t; p++) {
            const double gy = (double)s->wy[x + p], xv = (double)s->in[X][x + p];
            double to_x = 0;
            for (int64_t i = 0; i < N; i++) {
                double *q = &R[p * N + i];
                *q += gy * (double)s->in[CS][k + i];
                r->grad[CS][k + i] += now[p * N + i] * gy;
                r->grad[BS][k + i] += dt * *q * xv;
                to_x += *q * (double)s->in[BS][k + i];
                gl += low >= t ? 0 : decay * *q * old[p * N + i];
                *q *= decay;
            }
            r->grad[X][x + p] += dt * to_x + d * gy;
            r->grad[D][h] += gy * xv;
            direct += xv * to_x;
        }
        r->grad[DT][row * s->H + h] += direct + a * gl;
        r->grad[A][h] += dt * gl;
        if (low >= t) memset(R, 0, (size_t)n * sizeof *R);
    }
    for (int64_t i = 0; i < n; i++) r->grad[STATE][at + i] = R[i];
    free(S);
    free(R);
}

static truth expected(const scan *s)
{
    truth r;
    r.y = calloc(count_of(s, Y), sizeof *r.y);
    r.end = calloc(count_of(s, END), sizeof *r.end);
    for (int i = 0; i < INPUTS; i++) r.grad[i] = calloc(count_of(s, i), sizeof *r.grad[i]);
    for (int64_t b = 0; b < s->B; b++) for (int64_t h = 0; h < s->H; h++) recur(s, b, h, &r);
    return r;
}
static void free_truth(truth *r)
{
    free(r->y);
    free(r->end);
    for (int i = 0; i < INPUTS; i++) free(r->grad[i]);
}

/* ---- the library ----------------------------------------------------------------------------- */

static float *fetch(fg_plan *p, fg_tensor t)
{
    const size_t bytes = (size_t)fg_count(t) * sizeof(float);
    float *x = malloc(bytes);
    cr_assert_eq(fg_read(p, t, x, bytes), FG_OK, "%s", fg_plan_message(p));
    return x;
}

static answer run(const scan *s, int threads, bool gradients)
{
    static const char *const names[] = { "x", "dt", "a", "b", "c", "d", "state" };
    answer r = { NULL, NULL, { NULL } };
    fg_graph *g = fg_graph_new();
    fg_tensor in[INPUTS], grad[INPUTS], first = { 0 };
    for (int i = 0; i < INPUTS; i++) in[i] = fg_input(g, names[i], FG_F32, shape_of(s, i));
    if (s->first) first = fg_input(g, "first", FG_I32, FG_DIMS(s->B, s->T));
    fg_graph_sequence(g, (fg_sequence){ .first = first });
    const fg_tensor y = fg_ssd_scan(in[X], in[DT], in[A], in[BS], in[CS], in[D], in[STATE]);
    const fg_tensor end = fg_result(y, 1), wy = fg_input(g, "wy", FG_F32, shape_of(s, Y));
    const fg_tensor wend = fg_input(g, "wend", FG_F32, shape_of(s, END));
    fg_output(y, "y");
    fg_output(end, "end");
    if (gradients) {
        const fg_tensor py = fg_mul(y, wy), pend = fg_mul(end, wend);
        const fg_tensor a = fg_sum(py), b = fg_sum(pend), loss = fg_add(a, b);
        cr_assert_eq(fg_grad(loss, INPUTS, in, grad), FG_OK, "%s", fg_graph_message(g));
        for (int i = 0; i < INPUTS; i++) fg_output(grad[i], fg_name(g, "grad%d", i));
    }
    cr_assert_eq(fg_graph_status(g), FG_OK, "%s", fg_graph_message(g));
    fg_backend *cpu = fg_backend_open("cpu", threads);
    fg_store *store = fg_store_new(cpu);
    fg_plan *p = fg_plan_new(g, store);
    for (int i = 0; i < INPUTS; i++) fg_write(p, in[i], s->in[i], count_of(s, i) * 4);
    if (s->first) fg_write(p, first, s->first, (size_t)(s->B * s->T) * 4);
    if (gradients) fg_write(p, wy, s->wy, count_of(s, Y) * 4);
    if (gradients) fg_write(p, wend, s->wend, count_of(s, END) * 4);
    cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
    r.y = fetch(p, y);
    r.end = fetch(p, end);
    for (int i = 0; gradients && i < INPUTS; i++) r.grad[i] = fetch(p, grad[i]);
    fg_plan_free(p);
    fg_store_free(store);
    fg_backend_close(cpu);
    fg_graph_free(g);
    return r;
}
static void free_answer(answer *r)
{
    free(r->y);
    free(r->end);
    for (int i = 0; i < INPUTS; i++) free(r->grad[i]);
}

/* |got - want| / |want|, in norm */
static double off(const float *got, const double *want, size_t n)
{
    double diff = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        diff += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        norm += want[i] * want[i];
    }
    return norm > 0 ? sqrt(diff / norm) : sqrt(diff);
}

/* Bounds: single precision has 6e-8; sums of up to 4097 terms with signs lose up to two digits. */
static void expect_recurrence(const char *what, const scan *s)
{
    static const char *const names[] = { "x", "dt", "a", "b", "c", "d", "state" };
    truth want = expected(s);
    answer got = run(s, 2, true);
    const double y = off(got.y, want.y, count_of(s, Y));
    const double end = off(got.end, want.end, count_of(s, END));
    cr_expect(y < 2e-6, "%s, T = %d: y is off by %.1e", what, (int)s->T, y);
    cr_expect(end < 2e-6, "%s, T = %d: the state is off by %.1e", what, (int)s->T, end);
    for (int i = 0; i < INPUTS; i++) {
        const double g = off(got.grad[i], want.grad[i], count_of(s, i));
        cr_expect(g < 1e-5, "%s, T = %d: gradient of %s is off by %.1e", what, (int)s->T, names[i],
                  g);
    }
    free_answer(&got);
    free_truth(&want);
}

/* ---- the scan -------------------------------------------------------------------------------- */

static const int64_t lengths[] = { 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000, 4097 };
enum { LENGTHS = sizeof lengths / sizeof lengths[0] };

Test(ssd_scan, every_length_is_the_recurrence)
{
    for (int i = 0; i < LENGTHS; i++) {
        scan s = new_scan(2, lengths[i], 4, 24, 2, 19);
        expect_recurrence("plain", &s);
        free_scan(&s);
    }
}

Test(ssd_scan, documents_and_padding_begin_with_an_empty_state)
{
    for (int i = 0; i < LENGTHS; i++)
        for (int32_t left = 0; left <= 70; left += 35) {
            scan s = new_scan(2, lengths[i], 2, 7, 1, 16);
            cut_documents(&s, left);
            expect_recurrence("documents", &s);
            free_scan(&s);
        }
}

Test(ssd_scan, the_paper_s_head_is_the_recurrence)
{
    scan s = new_scan(1, 300, 3, 64, 1, 128);
    expect_recurrence("64 x 128", &s);
    free_scan(&s);
}

/* dt from softplus(+-30), a from -1e-4 to -1e3: decays from 1 to 0, alone and beside each other. */
Test(ssd_scan, decays_from_one_to_nothing_are_exact)
{
    static const float rates[] = { -1e-4f, -1e3f, -1, -30 };
    static const float steps[] = { 30, 9.4e-14f, 1e-3f, 30, 9.4e-14f };
    for (int kind = 0; kind < 6; kind++) {
        scan s = new_scan(1, 200, 4, 9, 1, 13);
        for (int h = 0; h < 4; h++) s.in[A][h] = rates[h];
        for (size_t i = 0; i < count_of(&s, DT); i++) {
            if (kind < 3) s.in[DT][i] = steps[kind];
            if (kind == 3 && i / 4 % 50 == 17) s.in[DT][i] = 30;         /* one that forgets */
            if (kind == 4) s.in[DT][i] = steps[i / 4 % 2];               /* alternating */
            if (kind == 5) s.in[DT][i] = steps[i * 7 % 5];
        }
        expect_recurrence("extremes", &s);
        free_scan(&s);
    }
}

/* Decay 1 loses nothing of the first token; then a millionth is added a million times. */
Test(ssd_scan, a_state_is_carried_over_a_million_tokens)
{
    scan s = new_scan(1, 1000000, 1, 1, 1, 1);
    for (int64_t t = 0; t < s.T; t++) {
        s.in[DT][t] = t == 0 ? 1 : 1e-6f;
        s.in[X][t] = t == 0 ? 3 : 0;
        s.in[BS][t] = s.in[CS][t] = 1;
    }
    s.in[A][0] = s.in[D][0] = s.in[STATE][0] = 0;
    answer r = run(&s, 2, false);
    for (int64_t t = 0; t < s.T; t += 99991) cr_expect_eq(r.y[t], 3, "token %d", (int)t);
    cr_expect_eq(r.end[0], 3);
    free_answer(&r);
    for (int64_t t = 0; t < s.T; t++) s.in[X][t] = 1;
    r = run(&s, 1, false);               /* each chunk rounds by half a unit of 1.2e-7 */
    cr_expect_lt(fabs((double)r.end[0] - 1.999999), 1e6 / 64 * 0.6e-7, "%g", (double)r.end[0]);
    free_answer(&r);
    free_scan(&s);
}

Test(ssd_scan, later_tokens_change_no_bit_of_earlier_results)
{
    scan s = new_scan(2, 200, 2, 20, 1, 9);
    answer before = run(&s, 2, false);
    for (int64_t cut = 1; cut < s.T; cut += 9) {
        scan c = new_scan(2, 200, 2, 20, 1, 9);
        for (int i = 0; i < INPUTS; i++) {
            if (i != X && i != DT && i != BS && i != CS) continue;
            const int64_t row = (int64_t)count_of(&c, i) / c.B / c.T;
            for (int64_t b = 0; b < c.B; b++)
                for (int64_t k = cut * row; k < c.T * row; k++)
                    c.in[i][b * c.T * row + k] = (k % 3 ? 5.0f : 900.0f);
        }
        answer after = run(&c, 2, false);
        for (int64_t b = 0; b < s.B; b++)
            cr_expect_eq(memcmp(before.y + b * s.T * 40, after.y + b * s.T * 40,
                                (size_t)(cut * 40) * 4), 0, "tokens from %d on", (int)cut);
        free_answer(&after);
        free_scan(&c);
    }
    free_answer(&before);
    free_scan(&s);
}

Test(ssd_scan, threads_change_no_bit)
{
    scan s = new_scan(3, 333, 10, 17, 2, 21);
    cut_documents(&s, 40);
    answer one = run(&s, 1, true);
    for (int threads = 2; threads <= 7; threads += 5) {
        answer many = run(&s, threads, true);
        cr_expect_eq(memcmp(one.y, many.y, count_of(&s, Y) * 4), 0, "%d threads: y", threads);
        cr_expect_eq(memcmp(one.end, many.end, count_of(&s, END) * 4), 0);
        for (int i = 0; i < INPUTS; i++)
            cr_expect_eq(memcmp(one.grad[i], many.grad[i], count_of(&s, i) * 4), 0,
                         "%d threads: gradient %d", threads, i);
        free_answer(&many);
    }
    free_answer(&one);
    free_scan(&s);
}

/* What a document gives does not depend on what stands before it, be it not a number. */
Test(ssd_scan, a_document_of_nan_stays_alone)
{
    scan s = new_scan(1, 200, 2, 20, 1, 9);
    s.first = malloc(200 * sizeof *s.first);
    for (int t = 0; t < 200; t++) s.first[t] = t < 70 ? 0 : t < 100 ? 70 : 100;
    for (int i = 0; i < INPUTS; i++) {
        if (i != X && i != DT && i != BS && i != CS) continue;
        const int64_t row = (int64_t)count_of(&s, i) / s.T;
        for (int64_t k = 70 * row; k < 100 * row; k++) s.in[i][k] = NAN;
    }
    answer r = run(&s, 2, true);
    for (int64_t k = 0; k < 200 * 40; k++) {
        const bool inside = k / 40 >= 70 && k / 40 < 100;
        cr_expect_eq(isnan(r.y[k]) != 0, inside, "y of token %d", (int)(k / 40));
        cr_expect_eq(isnan(r.grad[X][k]) != 0, inside, "gradient of token %d", (int)(k / 40));
    }
    cr_expect_not(isnan(r.end[0]));
    free_answer(&r);
    free_scan(&s);
}

/* ---- in pieces, through caches --------------------------------------------------------------- */

enum { PB = 2, PT = 150, PC = 37, PH = 2, PP = 11, PN = 13 };

/* Tokens [t0, t0 + n) through a convolution of width W and a scan; with caches if asked. */
static void run_part(fg_store *store, int64_t W, const scan *s, const float *w, bool caches,
                     int64_t t0, int64_t n, float *conv, float *y)
{
    fg_graph *g = fg_graph_new();
    fg_tensor in[INPUTS], past = { 0 }, first = { 0 };
    static const char *const names[] = { "x", "dt", "a", "b", "c", "d", "state" };
    for (int i = 0; i < STATE; i++) {
        fg_shape shape = shape_of(s, i);
        if (shape.rank > 1) shape.dim[1] = n;
        in[i] = fg_input(g, names[i], FG_F32, shape);
    }
    const fg_tensor k = fg_input(g, "w", FG_F32, FG_DIMS(PH * PP, W));
    if (caches) past = fg_input(g, "past", FG_I32, FG_DIMS(1));
    if (s->first) first = fg_input(g, "first", FG_I32, FG_DIMS(PB, n));
    fg_graph_sequence(g, (fg_sequence){ first, past, PT });
    const fg_tensor x = fg_reshape(in[X], FG_DIMS(PB, n, PH * PP));
    const fg_tensor u = fg_causal_conv(x, k, (fg_tensor){ 0 }, true);
    const fg_tensor o = fg_ssd_scan(in[X], in[DT], in[A], in[BS], in[CS], in[D], (fg_tensor){ 0 });
    fg_output(u, "u");
    fg_output(o, "y");
    cr_assert_eq(fg_graph_status(g), FG_OK, "%s", fg_graph_message(g));
    fg_plan *p = fg_plan_new(g, store);
    float *part = malloc(sizeof(float[PB * PT * PC]));
    for (int i = 0; i < STATE; i++) {
        const bool rows = i == X || i == DT || i == BS || i == CS;
        const int64_t row = rows ? (int64_t)count_of(s, i) / PB / PT : 0;
        for (int64_t b = 0; b < PB && rows; b++)
            memcpy(part + b * n * row, s->in[i] + (b * PT + t0) * row, (size_t)(n * row) * 4);
        fg_write(p, in[i], rows ? part : s->in[i], (size_t)fg_count(in[i]) * 4);
    }
    fg_write(p, k, w, (size_t)(PH * PP * W) * 4);
    const int32_t at = (int32_t)t0;
    if (caches) fg_write(p, past, &at, 4);
    int32_t starts[PB * PT];
    for (int64_t b = 0; b < PB && s->first; b++)
        memcpy(starts + b * n, s->first + b * PT + t0, (size_t)n * 4);
    if (s->first) fg_write(p, first, starts, (size_t)(PB * n) * 4);
    cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
    const int64_t row = PH * PP;
    for (int out = 0; out < 2; out++) {
        cr_assert_eq(fg_read(p, out ? o : u, part, (size_t)(PB * n * row) * 4), FG_OK);
        for (int64_t b = 0; b < PB; b++)
            memcpy((out ? y : conv) + (b * PT + t0) * row, part + b * n * row,
                   (size_t)(n * row) * 4);
    }
    free(part);
    fg_plan_free(p);
    fg_graph_free(g);
}

static double apart(const float *x, const float *y, int64_t n)
{
    double worst = 0;
    for (int64_t i = 0; i < n; i++) {
        const double d = fabs((double)x[i] - (double)y[i]);
        if (!(d <= worst)) worst = d;
    }
    return worst;
}

/* Caches hold what an earlier run left, which a new sequence must not see. */
static void expect_pieces(int64_t W, const int *pieces, bool documents)
{
    enum { ROW = PH * PP, ALL = PB * PT * ROW };
    static float u[ALL], y[ALL], pu[ALL], py[ALL];
    scan s = new_scan(PB, PT, PH, PP, 1, PN);
    if (documents) cut_documents(&s, 9);
    for (int64_t i = 0; documents && i < PT; i++) if (s.first[i] < 0) s.first[i] = 0;
    uint64_t seed = 3;
    float *w = draw((size_t)(ROW * W), &seed);
    fg_backend *cpu = fg_backend_open("cpu", 2);
    fg_store *store = fg_store_new(cpu);
    run_part(store, W, &s, w, false, 0, PT, u, y);
    for (int twice = 0; twice < 2; twice++) {
        int64_t t = 0;
        for (int i = 0; t < PT; i++) {
            const int64_t n = pieces[i] && t + pieces[i] < PT ? pieces[i] : i ? 1 : PT - t;
            run_part(store, W, &s, w, true, t, pieces[i] ? n : 1, pu, py);
            t += pieces[i] ? n : 1;
            if (!pieces[i]) i--;
        }
        cr_expect_eq(apart(u, pu, ALL), 0, "width %d: the convolution is off by %.1e", (int)W,
                     apart(u, pu, ALL));
        cr_expect_lt(apart(y, py, ALL), 1e-5, "the scan is off by %.1e", apart(y, py, ALL));
    }
    fg_store_free(store);
    fg_backend_close(cpu);
    free(w);
    free_scan(&s);
}

Test(ssd_scan, pieces_through_caches_are_the_whole)
{
    static const int steps[] = { 0 }, prompt[] = { 70, 0 }, mixed[] = { 1, 2, 65, 3, 17, 0 };
    for (int64_t W = 1; W <= 8; W++) {
        expect_pieces(W, steps, W % 2);
        expect_pieces(W, prompt, W % 3 == 1);
        expect_pieces(W, mixed, W % 2 == 0);
    }
}

/* ---- refusals -------------------------------------------------------------------------------- */

Test(ssd_scan, shapes_that_do_not_fit_are_refused_by_name)
{
    static const struct { int input; fg_shape shape; const char *says; } rows[] = {
        { DT, { 3, { 2, 5, 3 } }, "dt must be [B,T,H] = [2,5,4]" },
        { A, { 1, { 3 } }, "a must be [H] = [4]" },
        { BS, { 4, { 2, 5, 3, 7 } }, "G dividing 4 heads" },
        { CS, { 4, { 2, 5, 2, 8 } }, "b and c must be [B,T,G,N]" },
        { D, { 1, { 5 } }, "d must be [H] = [4]" },
        { STATE, { 4, { 2, 4, 6, 8 } }, "state must be [B,H,P,N] = [2,4,6,7]" },
    };
    static const char *const names[] = { "x", "dt", "a", "b", "c", "d", "state" };
    const scan s = { 2, 5, 4, 6, 2, 7, NULL, { NULL }, NULL, NULL };
    for (size_t k = 0; k < sizeof rows / sizeof rows[0]; k++) {
        fg_graph *g = fg_graph_new();
        fg_tensor in[INPUTS];
        for (int i = 0; i < INPUTS; i++)
            in[i] = fg_input(g, names[i], FG_F32, i == rows[k].input ? rows[k].shape
                                                                      : shape_of(&s, i));
        const fg_tensor y = fg_ssd_scan(in[X], in[DT], in[A], in[BS], in[CS], in[D], in[STATE]);
        cr_expect_not(fg_ok(y));
        cr_expect_not_null(strstr(fg_graph_message(g), rows[k].says), "%s", fg_graph_message(g));
        fg_graph_free(g);
    }
}

Test(ssd_scan, a_width_over_eight_and_a_state_beside_caches_are_refused)
{
    fg_graph *g = fg_graph_new();
    const fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(1, 4, 3));
    const fg_tensor w = fg_input(g, "w", FG_F32, FG_DIMS(3, 9));
    cr_expect_not(fg_ok(fg_causal_conv(x, w, (fg_tensor){ 0 }, false)));
    cr_expect_not_null(strstr(fg_graph_message(g), "w has a width of 9; it must be in [1, 8]"));
    fg_graph_free(g);
    const scan s = { 1, 4, 2, 3, 1, 5, NULL, { NULL }, NULL, NULL };
    fg_tensor in[INPUTS];
    g = fg_graph_new();
    for (int i = 0; i < INPUTS; i++)
        in[i] = fg_input(g, fg_name(g, "in%d", i), FG_F32, shape_of(&s, i));
    const fg_tensor past = fg_input(g, "past", FG_I32, FG_DIMS(1));
    fg_graph_sequence(g, (fg_sequence){ .past = past, .capacity = 9 });
    cr_expect_not(fg_ok(fg_ssd_scan(in[X], in[DT], in[A], in[BS], in[CS], in[D], in[STATE])));
    cr_expect_not_null(strstr(fg_graph_message(g), "caches hold it"), "%s", fg_graph_message(g));
    fg_graph_free(g);
}
