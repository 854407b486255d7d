/* test_f64_cuda_linear_attention.c - gated linear attention, its form for HGRN2, and the delta rule
 * on tensor cores against the CPU in double, with their gradients; skipped, with the reason, where
 * there is no GPU.
 *
 * q, k and v are columns of one matrix, as after a joined product.  They hold few enough digits for
 * bf16, so all that differs is what the kernels round: weights, states and results, to 8 bits.
 * Bounds are relative to the norm: a result rounded once is off by 1.7e-3; 4e-3 for o and the
 * state, of the delta rule 6e-3 (W, U, u, A, S and o are each rounded: sqrt(6) 1.7e-3 = 4.2e-3, and
 * what S has lost comes again); 8e-3 for gradients, 1.5e-2 for those of gates.  Two sums cancel by
 * nature.  The bound of HGRN2's gates has a gradient summed over all rows: what rounding k does has
 * one sign for one z, the sum itself has not, so that its share grows with the root of the rows.
 * And of the up to 64 rows of a chunk with one key, each rounded, one row's worth is left: eight
 * times the error; twice, where keys are only alike. */
#include <criterion/criterion.h>
#include <math.h>
#include "device_cuda.h"
#include "scan_run.h"
#include "internal.h"

typedef enum { GATED, HGRN2, DELTA, UNIT_DELTA } family;
typedef enum { USUAL, NO_DECAY, BELOW_GUARD, ABOVE_GUARD, ONE_STRONG, MIXED,       /* gates */
               SAME_ONCE, SAME_TWICE, CLOSE, NO_KEYS, NO_BETA } kind;              /* keys */
static const char *const families[] = { "gated", "hgrn2", "delta", "unit delta" };
static const char *const kinds[] = {
    "usual", "no decay", "below the guard", "above the guard", "one strong channel", "mixed",
    "one key, beta 1", "one key, beta 2", "keys of cosine 0.9", "no keys", "beta 0",
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
            x[k] = s->is == SAME_ONCE ? 1 : s->is == SAME_TWICE ? 2 : s->is == NO_BETA ? 0
                 : 0.5f + x[k] / 2;
    }
    return x;
}

/* Documents of 3, 1, 80, 1, 80, ...; 9 rows of padding before the second sequence's, and nothing
 * but padding in the third. */
static void fill_first(const trial *s, int32_t *first)
{
    for (int64_t b = 0; b < s->B; b++) {
        int32_t start = b == 0 ? 0 : b == 1 ? 9 : (int32_t)s->T, next = start + 3;
        for (int32_t t = 0, k = 0; t < s->T; t++) {
            if (t == next) start = t, next += k++ % 2 ? 80 : 1;
            first[b * s->T + t] = start;
        }
    }
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
    uint64_t seed = 1;
    for (int i = 0; i < RESULTS; i++) values[i] = draw(s, i, &seed);
    int32_t *starts = malloc((size_t)(s->B * s->T) * 4);
    fill_first(s, starts);
    const scan_case c = { g, RESULTS, in, to, values, first, starts };
    scan_run(&c, device, out);
    free(starts);
    fg_graph_free(g);
}

static void check(const trial *s, const char *what, double far, double bound)
{
    bound *= s->is == SAME_ONCE || s->is == SAME_TWICE ? 8 : s->is == CLOSE ? 2 : 1;
    cr_expect(far <= bound, "%s, %s, T = %d%s%s: %s is off by %.1e", families[s->of], kinds[s->is],
              (int)s->T, s->documents ? ", documents" : "", s->state ? ", state" : "", what, far);
    if (getenv("FG_TEST_VERBOSE"))
        fprintf(stderr, "%s, %s, T = %d%s%s: %s %.2e\n", families[s->of], kinds[s->is], (int)s->T,
                s->documents ? ", documents" : "", s->state ? ", state" : "", what, far);
}

static void compare(trial s, fg_backend *gpu, fg_backend *cpu)
{
    static const char *const parts[] = { "gradient of q", "gradient of k or z", "gradient of v" };
    static const char *const whats[] = { "", "gradient of gates", "gradient of state", "o",
                                         "last state" };
    const double of_o = s.of >= DELTA ? 6e-3 : 4e-3, rows = sqrt((double)(s.B * s.T));
    const double bounds[] = { 0, s.of == HGRN2 ? fmax(1.5e-2, 1.5e-3 * rows) : 1.5e-2, 8e-3, of_o,
                              of_o };
    const int64_t own = s.H * s.D;
    float *want[RESULTS], *got[RESULTS], *again[RESULTS];
    run(&s, cpu, want);
    run(&s, gpu, got);
    run(&s, gpu, again);
    for (int i = 0; i < RESULTS; i++) {
        const int64_t n = fg_shape_count(shape_of(&s, i));
        for (int p = 0; p < 3 && i == X; p++)
            check(&s, parts[p], off_part(got[X], want[X], n, own, 3, p),
                  p == 1 && s.of == HGRN2 ? 1.5e-2 : 8e-3);
        if (i != X) check(&s, whats[i], off(got[i], want[i], n), bounds[i]);
        cr_expect(!memcmp(got[i], again[i], (size_t)n * 4), "result %d changed from run to run", i);
        free(want[i]);
        free(got[i]);
        free(again[i]);
    }
}

/* Runs f with a GPU whose memory is full of NaN and with a CPU, if there is a GPU. */
static void with_devices(void (*f)(fg_backend *gpu, fg_backend *cpu))
{
    fg_backend *gpu = fg__cuda_or_skip(true), *cpu = gpu ? fg_backend_open("cpu", 0) : NULL;
    if (gpu) f(gpu, cpu);
    cr_expect_eq(fg__traps.broken, 0, "%d allocations were overrun", fg__traps.broken);
    fg_backend_close(gpu);
    fg_backend_close(cpu);
}

static void all_lengths(fg_backend *gpu, fg_backend *cpu)
{
    static const int64_t lengths[] = { 1, 63, 64, 65, 127, 1000, 4097 };
    for (int i = 0; i < 7; i++)
        for (family of = GATED; of <= UNIT_DELTA; of++) {
            const trial plain = { 1, lengths[i], 2, 128, of, USUAL, false, false };
            const trial cut = { 3, lengths[i], 1, 128, of, USUAL, true, false };
            const trial on = { 2, lengths[i], 1, 128, of, USUAL, true, true };
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
