/* test_f64_cuda_linear_attention.c - gated linear attention, its form for HGRN2, and the delta rule
 * on tensor cores against the CPU in double, with their gradients; skipped, with the reason, where
 * there is no GPU.
 *
 * q, k and v are columns of one matrix, as after a joined product, and bf16 holds them exactly.
 * The yardstick is the definition in chunks with the rounding of bf16 (chunks.h) on the same
 * inputs: a result may be twice as far from the exact one at most, and in the root of the mean
 * square 1.5 times (o and the state) or twice (gradients), and 1e-5 more.  Where the definition
 * keeps to these parts of the norm, so must a result: 4e-3 for o and the state, 8e-3 for gradients.
 * Gradients of gates: 1.5e-2 of the norm or 1.5 times the definition's error, in the root of the
 * mean square alone.  FG_TEST_LENGTH bounds T. */
#include <criterion/criterion.h>
#include <math.h>
#include "chunks.h"
#include "device_cuda.h"
#include "scan_run.h"

typedef enum { GATED, HGRN2, DELTA, UNIT_DELTA } family;
typedef enum { USUAL, NO_DECAY, BELOW_GUARD, ABOVE_GUARD, ONE_STRONG, MIXED,       /* gates */
               SAME_ONCE, SAME_TWICE, UNIT_ONCE, UNIT_TWICE, CLOSE, NO_KEYS,       /* keys */
               NO_BETA } kind;
static const char *const families[] = { "gated", "hgrn2", "delta", "unit delta" };
static const char *const kinds[] = {
    "usual", "no decay", "below the guard", "above the guard", "one strong channel", "mixed",
    "one key, beta 1", "one key, beta 2", "one key of length 1, beta 1",
    "one key of length 1, beta 2", "keys of cosine 0.9", "no keys", "beta 0",
};

enum { X, GATE, STATE, INPUTS };                 /* x: [q | k | v]; of HGRN2, z for k */
enum { Y = INPUTS, END, RESULTS };
typedef struct { int64_t B, T, H, D; family of; kind is; bool documents, state; } trial;

static fg_shape shape_of(const trial *s, int i)
{
    switch (i) {
    case X: return FG_DIMS(s->B, s->T, 3 * s->H * s->D);
    case GATE: return s->of >= DELTA ? FG_DIMS(s->B, s->T, s->H)
                    : s->of == HGRN2 ? FG_DIMS(1, s->H * s->D) : FG_DIMS(s->B, s->T, s->H, s->D);
    case Y: return FG_DIMS(s->B, s->T, s->H, s->D);
    default: return FG_DIMS(s->B, s->H, s->D, s->D);
    }
}

/* Sixteenths in [-1,1] */
static float sixteenths(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return (float)((int)(*seed >> 40) % 33 - 16) / 16;
}

/* Natural log of the decay of channel d */
static float log_decay(kind is, int64_t d, float x)
{
    static const float mixed[] = { 0, -0.01f, -5.3f, -5.4f, -100, -INFINITY, -1, -1e4f };
    switch (is) {
    case NO_DECAY: return 0;
    case BELOW_GUARD: return -5.31f;             /* 15 rows: 79.65 and 79.8 nats */
    case ABOVE_GUARD: return -5.32f;
    case ONE_STRONG: return d == 7 ? -100 : -0.1f * (1 + x);
    case MIXED: return mixed[d % 8];
    default: return -logf(1 + expf(-3 * x - 1));
    }
}

/* Keys of the delta rule are at most 1 long; v of one part in 8 is added to a common key. */
static float key_of(kind is, int64_t d, float x)
{
    const float common = d % 2 ? 0.0625f : -0.0625f;         /* length 0.71 */
    if (is == UNIT_ONCE || is == UNIT_TWICE) return d % 2 ? 0 : 0.125f;
    return is == NO_KEYS ? 0 : is == SAME_ONCE || is == SAME_TWICE ? common * (d % 3 ? 1 : 1.5f)
         : is == CLOSE ? common + x / 32 : x / 8;
}

static float *draw(const trial *s, int i, uint64_t *seed)
{
    const int64_t n = fg_shape_count(shape_of(s, i)), own = s->H * s->D;
    float *x = malloc((size_t)n * sizeof *x);
    for (int64_t k = 0; k < n; k++) {
        const int64_t part = k / own % 3, d = k % s->D;
        x[k] = sixteenths(seed);
        if (i == X && part == 1 && s->of == DELTA) x[k] = key_of(s->is, d, x[k]);
        if (i == X && part == 1 && s->of == HGRN2 && s->is == MIXED)
            x[k] = d % 5 == 0 ? 30 : d % 5 == 1 ? -30 : 4 * x[k];
        if (i == GATE && s->of == GATED) x[k] = log_decay(s->is, d, x[k]);
        if (i == GATE && s->of == HGRN2)
            x[k] = d % 4 ? 0.4f * (1 + x[k]) : s->is == MIXED ? 0.03f : 0;
        if (i == GATE && s->of >= DELTA)
            x[k] = s->is == SAME_ONCE || s->is == UNIT_ONCE ? 1 : s->is == NO_BETA ? 0
                 : s->is == SAME_TWICE || s->is == UNIT_TWICE ? 2 : 0.5f + x[k] / 2;
    }
    return x;
}

/* Documents of 3, 1, 80, 1, 80, ...; 9 rows of padding before the second sequence's, and nothing
 * but padding in the third. */
static void fill_first(const trial *s, int32_t *first)
{
    for (int64_t b = 0; b < s->B; b++) {
        int32_t start = b % 3 == 0 ? 0 : b % 3 == 1 ? 9 : (int32_t)s->T, next = start + 3;
        for (int32_t t = 0, k = 0; t < s->T; t++) {
            if (t == next) start = t, next += k++ % 2 ? 80 : 1;
            first[b * s->T + t] = start;
        }
    }
}

/* Values of all inputs, and first. */
static int32_t *draw_all(const trial *s, float **values)
{
    int32_t *first = malloc((size_t)(s->B * s->T) * sizeof *first);
    uint64_t seed = 1;
    for (int i = 0; i < RESULTS; i++) values[i] = draw(s, i, &seed);
    fill_first(s, first);
    return first;
}

static fg_tensor scan(const trial *s, fg_tensor x, fg_tensor gate, fg_tensor state)
{
    const int64_t n = s->H * s->D;
    const double scale = 1 / sqrt((double)s->D);
    fg_tensor p[3];
    for (int i = 0; i < 3; i++) {
        p[i] = fg_slice(x, 2, i * n, i * n + n);
        p[i] = fg_reshape(p[i], FG_DIMS(s->B, s->T, s->H, s->D));
    }
    if (s->of == GATED) return fg_gated_linear_attention(p[0], p[1], p[2], gate, scale, state);
    if (s->of == HGRN2) return fg_hgrn2_scan(p[0], p[1], p[2], gate, scale, state);
    if (s->of == DELTA) return fg_delta_rule(p[0], p[1], p[2], gate, scale, state);
    return fg_unit_delta_rule(p[0], p[1], p[2], gate, scale, 1e-6, state);
}

/* y, end and the gradients of all inputs, on a device. */
static void run(const trial *s, fg_backend *device, float **out)
{
    static const char *const names[] = { "x", "gate", "state", "y", "end" };
    fg_graph *g = fg_graph_new();
    fg_tensor in[RESULTS], to[RESULTS], first = { 0 };
    for (int i = 0; i < RESULTS; i++) in[i] = fg_input(g, names[i], FG_F32, shape_of(s, i));
    if (s->documents) first = fg_input(g, "first", FG_I32, FG_DIMS(s->B, s->T));
    fg_graph_sequence(g, (fg_sequence){ .first = first });
    const fg_tensor narrow = fg_cast(in[X], FG_BF16), none = { 0 };
    to[Y] = scan(s, narrow, in[GATE], s->state ? in[STATE] : none);
    to[END] = fg_result(to[Y], 1);
    const fg_tensor on_y = weighted(to[Y], in[Y]), on_end = weighted(to[END], in[END]);
    fg_tensor loss = fg_add(on_y, on_end);
    if (!s->state) loss = fg_add(loss, fg_sum(in[STATE]));
    cr_assert_eq(fg_grad(loss, INPUTS, in, to), FG_OK, "%s", fg_graph_message(g));
    to[Y] = fg_cast(to[Y], FG_F32);
    float *values[RESULTS];
    int32_t *starts = draw_all(s, values);
    const scan_case c = { g, RESULTS, in, to, values, first, starts };
    scan_run(&c, device, out);
    free(starts);
    fg_graph_free(g);
}

/* ---- the definition in chunks ---------------------------------------------------------------- */

static const double eps = 1e-6;
static double sigmoid(double x) { return 1 / (1 + exp(-x)); }

/* Rows [from, from + n) of head h of a tensor whose rows have `row` numbers; at: of row 0. */
static double *gather(const float *x, int64_t at, int64_t row, int64_t n, int64_t D)
{
    double *y = zeros(n * D);
    for (int64_t i = 0; i < n * D; i++) y[i] = (double)x[at + i / D * row + i % D];
    return y;
}
static void scatter(const double *x, double *to, int64_t at, int64_t row, int64_t n, int64_t D)
{
    for (int64_t i = 0; i < n * D; i++) to[at + i / D * row + i % D] = x[i];
}

/* x / sqrt(sum(x^2) + eps) of n rows, and the factor of each. */
static void unit(const run_of_rows *w, double *x, double *by)
{
    for (int64_t t = 0; t < w->n; t++) {
        double sum = eps;
        for (int64_t d = 0; d < w->D; d++) sum += x[t * w->D + d] * x[t * w->D + d];
        by[t] = 1 / sqrt(sum);
        for (int64_t d = 0; d < w->D; d++) x[t * w->D + d] *= by[t];
    }
}
static void unit_back(const run_of_rows *w, const double *x, const double *by, double *gx)
{
    for (int64_t t = 0; t < w->n; t++) {
        double *g = gx + t * w->D, along = 0;
        const double *y = x + t * w->D;
        for (int64_t d = 0; d < w->D; d++) along += g[d] * y[d];
        for (int64_t d = 0; d < w->D; d++) g[d] = narrow(w, by[t] * (g[d] - y[d] * along));
    }
}

/* q, z and low are HGRN2's inputs; w's q, k and gate become the scan's, w's gq and gk afterwards
 * those of q and z, and glow grows. */
static void gates_of(const run_of_rows *w, const double *z, const double *low, double *q, double *k,
                     double *g)
{
    for (int64_t i = 0; i < w->n * w->D; i++) {
        const double b = low[i % w->D], rest = (1 - b) * sigmoid(-z[i]);
        g[i] = rest < 0.5 ? log1p(-rest) : log(b + (1 - b) * sigmoid(z[i]));
        k[i] = narrow(w, rest);
        q[i] = narrow(w, q[i] * sigmoid(q[i]));
    }
}
static void gates_back(const run_of_rows *w, const double *q, const double *z, const double *low,
                       double *glow)
{
    for (int64_t i = 0; i < w->n * w->D; i++) {
        const double s = sigmoid(z[i]), rest = sigmoid(-z[i]), b = low[i % w->D], a = sigmoid(q[i]);
        const double gf = w->ggate[i] / (b + (1 - b) * s) - w->gk[i];
        glow[i % w->D] += rest * gf;
        w->gk[i] = narrow(w, (1 - b) * s * rest * gf);
        w->gq[i] = narrow(w, w->gq[i] * a * (1 + q[i] * (1 - a)));
    }
}

/* Rows [from, to) of a head: one document.  bound: of HGRN2, [D]. */
static void document(const trial *s, float *const *in, int64_t b, int64_t h, int64_t from,
                     int64_t to, bool carried, bool rounded, double *const *out)
{
    const int64_t D = s->D, own = s->H * D, at = (b * s->T + from) * s->H + h, n = to - from;
    const int64_t x = (b * s->T + from) * 3 * own + h * D, G = s->of >= DELTA ? 1 : D;
    const int64_t state = (b * s->H + h) * D * D;
    double *q = gather(in[X], x, 3 * own, n, D), *k = gather(in[X], x + own, 3 * own, n, D);
    double *v = gather(in[X], x + 2 * own, 3 * own, n, D), *go = gather(in[Y], at * D, own, n, D);
    double *gate = s->of == HGRN2 ? zeros(n * D) : gather(in[GATE], at * G, s->H * G, n, G);
    double *low = gather(in[GATE], s->of == HGRN2 ? h * D : 0, 0, 1, s->of == HGRN2 ? D : 0);
    double *raw[2] = { gather(in[X], x, 3 * own, n, D), gather(in[X], x + own, 3 * own, n, D) };
    double *by[2] = { zeros(n), zeros(n) }, *S = zeros(D * D), *R = zeros(D * D);
    run_of_rows w = { rounded, s->of >= DELTA, n, D, from % ROWS, 1 / sqrt((double)D), q, k, v,
                      gate, go, zeros(n * D), zeros(n * D), zeros(n * D), zeros(n * D),
                      zeros(n * D), S, R };
    for (int64_t i = 0; i < D * D; i++) {
        S[i] = carried ? (double)in[STATE][state + i] : 0;
        R[i] = to == s->T ? (double)in[END][state + i] : 0;
    }
    if (s->of == HGRN2) gates_of(&w, raw[1], low, q, k, gate);
    if (s->of == UNIT_DELTA) {
        unit(&w, raw[0], by[0]), unit(&w, raw[1], by[1]);
        for (int64_t i = 0; i < n * D; i++)
            q[i] = narrow(&w, raw[0][i]), k[i] = narrow(&w, raw[1][i]);
    }
    chunks(&w);
    if (s->of == HGRN2) gates_back(&w, raw[0], raw[1], low, out[GATE] + b * own + h * D);
    else scatter(w.ggate, out[GATE], at * G, s->H * G, n, G);
    if (s->of == UNIT_DELTA)
        unit_back(&w, raw[0], by[0], w.gq), unit_back(&w, raw[1], by[1], w.gk);
    scatter(w.o, out[Y], at * D, own, n, D), scatter(w.gq, out[X], x, 3 * own, n, D);
    scatter(w.gk, out[X], x + own, 3 * own, n, D);
    scatter(w.gv, out[X], x + 2 * own, 3 * own, n, D);
    if (carried) scatter(R, out[STATE], state, D, D, D);
    if (to == s->T) scatter(S, out[END], state, D, D, D);
    double *const all[] = { q, k, v, go, gate, low, raw[0], raw[1], by[0], by[1], S, R, w.o, w.gq,
                            w.gk, w.gv, w.ggate };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
}

/* As run, by the definition. */
static void define(const trial *s, bool rounded, double **out)
{
    float *in[RESULTS];
    int32_t *first = draw_all(s, in);
    const int64_t bound = s->H * s->D;
    for (int i = 0; i < RESULTS; i++)
        out[i] = zeros(fg_shape_count(shape_of(s, i)) * (i == GATE && s->of == HGRN2 ? s->B : 1));
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < s->B * s->H; i++)
        for (int64_t b = i / s->H, t = 0, to; t < s->T; t = to) {
            const int64_t start = s->documents ? first[b * s->T + t] : 0;
            for (to = t + 1; to < s->T; to++)
                if (s->documents && (start > t || first[b * s->T + to] == to)) break;
            if (start <= t)
                document(s, in, b, i % s->H, t, to, s->state && t == 0 && start == 0, rounded, out);
        }
    for (int64_t i = bound; i < bound * s->B && s->of == HGRN2; i++)
        out[GATE][i % bound] += out[GATE][i];
    for (int i = 0; i < RESULTS; i++) free(in[i]);
    free(first);
}

/* ---- comparing ------------------------------------------------------------------------------- */

typedef struct { double far, base, far2, base2, norm2; int64_t n; } tally;
static struct { double max, rms, norm; } worst[UNIT_DELTA + 1][RESULTS + 2];

/* Of elements whose index / width is `part` among `parts`. */
static tally tally_of(const float *exact, const double *base, const float *got, int64_t n,
                      int64_t width, int parts, int part)
{
    tally a = { 0 };
    for (int64_t i = 0; i < n; i++) {
        if (i / width % parts != part) continue;
        const double want = (double)exact[i], e = fabs(base[i] - want);
        double d = fabs((double)got[i] - want);
        if (!(d <= INFINITY)) d = INFINITY;
        a.far = fmax(a.far, d), a.base = fmax(a.base, e), a.n++;
        a.far2 += d * d, a.base2 += e * e, a.norm2 += want * want;
    }
    return a;
}

static void judge(const trial *s, const char *what, int at, const tally *a, double bound)
{
    const double n = (double)(a->n + !a->n), far = sqrt(a->far2 / n), base = sqrt(a->base2 / n);
    const double norm = sqrt(a->norm2 / n), more = 1e-5;
    const bool gates = at == GATE, forward = at == Y || at == END, keeps = base <= bound * norm;
    const double most = 2 * a->base + more, part = bound * norm + more;
    const double mean = (forward || gates ? 1.5 : 2) * base + more;
    const double may = gates ? fmax(mean, part) : keeps ? fmin(mean, part) : mean;
    cr_expect(gates || a->far <= most, "%s, %s, T = %d%s%s: %s is off by %.3g, the definition by "
              "%.3g", families[s->of], kinds[s->is], (int)s->T, s->documents ? ", documents" : "",
              s->state ? ", state" : "", what, a->far, a->base);
    cr_expect(far <= may, "%s, %s, T = %d%s%s: %s is off by %.3g (root of mean squares) of %.3g, "
              "the definition by %.3g", families[s->of], kinds[s->is], (int)s->T,
              s->documents ? ", documents" : "", s->state ? ", state" : "", what, far, norm, base);
    if (getenv("FG_TEST_VERBOSE"))
        fprintf(stderr, "%s, %s, T = %d%s%s: %s: most %.2f, rms %.2f of the definition's, %.1e of "
                "the norm, the definition %.1e\n", families[s->of], kinds[s->is], (int)s->T,
                s->documents ? ", documents" : "", s->state ? ", state" : "", what,
                a->far / (a->base + more), far / (base + more), far / norm, base / norm);
    if (!gates) worst[s->of][at].max = fmax(worst[s->of][at].max, a->far / most);
    worst[s->of][at].rms = fmax(worst[s->of][at].rms, far / mean);
    worst[s->of][at].norm = fmax(worst[s->of][at].norm, far / may);
}

/* What is compared: parts of x one by one, then the rest. */
static const char *const whats[RESULTS + 2] = { "gradient of q", "gradient of gates",
    "gradient of state", "o", "last state", "gradient of k or z", "gradient of v" };

static void compare(trial s, fg_backend *gpu, fg_backend *cpu)
{
    static const double bounds[] = { 8e-3, 1.5e-2, 8e-3, 4e-3, 4e-3 };
    float *want[RESULTS], *got[RESULTS], *again[RESULTS];
    double *base[RESULTS];
    if (s.T > fg__longest()) return;
    run(&s, cpu, want);
    run(&s, gpu, got);
    run(&s, gpu, again);
    define(&s, true, base);
    for (int i = 0; i < RESULTS; i++) {
        const int64_t n = fg_shape_count(shape_of(&s, i));
        for (int p = 0; p < (i == X ? 3 : 1); p++) {
            const tally a = tally_of(want[i], base[i], got[i], n, i == X ? s.H * s.D : 1,
                                     i == X ? 3 : 1, p);
            const int at = i == X && p ? END + p : i;
            judge(&s, whats[at], at, &a, bounds[i]);
        }
        cr_expect(!memcmp(got[i], again[i], (size_t)n * 4), "result %d changed from run to run", i);
        free(want[i]), free(got[i]), free(again[i]), free(base[i]);
    }
}

static void print_worst(void)
{
    for (family of = GATED; of <= UNIT_DELTA; of++)
        for (int i = 0; i < RESULTS + 2; i++)
            fprintf(stderr, "%-10s %-18s of what is allowed: %.2f most, %.2f rms, %.2f of the "
                    "norm\n", families[of], whats[i], worst[of][i].max, worst[of][i].rms,
                    worst[of][i].norm);
}

/* Runs f with a GPU whose memory is full of NaN and with a CPU, if there is a GPU. */
static void with_devices(void (*f)(fg_backend *gpu, fg_backend *cpu))
{
    fg_backend *gpu = fg__cuda_or_skip(true), *cpu = gpu ? exact_cpu() : NULL;
    if (gpu) f(gpu, cpu), print_worst();
    cr_expect_eq(fg__traps.broken, 0, "%d allocations were overrun", fg__traps.broken);
    fg_backend_close(gpu);
    fg_backend_close(cpu);
}

static void all_lengths(fg_backend *gpu, fg_backend *cpu)
{
    static const int64_t lengths[] = { 1, 63, 64, 65, 127, 1000, 4097 };
    for (int i = 0; i < 7; i++)
        for (family of = GATED; of <= UNIT_DELTA; of++) {
            const int64_t more = lengths[i] < 16 ? 64 : 1;   /* enough for a fair measure */
            const trial plain = { 1 * more, lengths[i], 2, 128, of, USUAL, false, false };
            const trial cut = { 3 * more, lengths[i], 1, 128, of, USUAL, true, false };
            const trial on = { 2 * more, lengths[i], 1, 128, of, USUAL, true, true };
            compare(plain, gpu, cpu);
            compare(cut, gpu, cpu);
            compare(on, gpu, cpu);
        }
}

Test(cuda_linear_attention, chunks_on_tensor_cores_are_the_recurrence)
{
    with_devices(all_lengths);
}

static void all_kinds(fg_backend *gpu, fg_backend *cpu)
{
    for (kind is = NO_DECAY; is <= NO_BETA; is++)
        for (int documents = 0; documents < 2; documents++) {
            const trial s = { 2, 300, 2, 128, is <= MIXED ? GATED : DELTA, is, documents, true };
            compare(s, gpu, cpu);
        }
    const trial strong = { 2, 300, 2, 128, HGRN2, MIXED, true, true };
    compare(strong, gpu, cpu);
}

Test(cuda_linear_attention, strong_gates_and_like_keys_cost_no_digits)
{
    with_devices(all_kinds);
}

static void odd_heads(fg_backend *gpu, fg_backend *cpu)
{
    for (family of = GATED; of <= UNIT_DELTA; of++) {
        const trial s = { 2, 130, 3, 24, of, USUAL, true, true };
        compare(s, gpu, cpu);
    }
}

Test(cuda_linear_attention, heads_of_other_widths_go_row_by_row) { with_devices(odd_heads); }
