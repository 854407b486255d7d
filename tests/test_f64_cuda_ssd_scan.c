/* test_f64_cuda_ssd_scan.c - the state space scan on tensor cores against the CPU in double, with
 * its gradient; skipped, with the reason, where there is no GPU.
 *
 * Inputs are sixteenths, which bf16 holds exactly, so all that differs is what the kernel rounds:
 * weights, states and results, to 8 bits.  Bounds are relative to the norm: a result rounded once
 * is off by 1.7e-3; 4e-3 for y and the state, 8e-3 for gradients, 1.5e-2 for those of decays. */
#include <criterion/criterion.h>
#include <math.h>
#include "device_cuda.h"
#include "scan_run.h"

enum { X, DT, A, B, C, D, STATE, BIAS, INPUTS };
enum { Y = INPUTS, END, RESULTS };
static const char *const names[] = { "x", "dt", "a", "b", "c", "d", "state", "bias", "y",
                                     "end" };
static const double bounds[] = { 8e-3, 1.5e-2, 1.5e-2, 8e-3, 8e-3, 1e-3, 8e-3, 1.5e-2, 4e-3,
                                 4e-3 };

enum { AS_TRAINED, EXTREME };            /* dt and a */
/* mamba: mamba2_scan, which makes dt and a itself; its x, dt, b and c are columns of one matrix, as
 * behind a projection */
typedef struct { int64_t B, T, H, G, N; bool documents; int rates; bool mamba; } size;

static fg_shape shape_of(const size *s, int i)
{
    switch (i) {
    case X: case Y: return FG_DIMS(s->B, s->T, s->H, 64);
    case DT: return FG_DIMS(s->B, s->T, s->H);
    case B: case C: return FG_DIMS(s->B, s->T, s->G, s->N);
    case STATE: case END: return FG_DIMS(s->B, s->H, 64, s->N);
    default: return FG_DIMS(s->H);               /* A, D, BIAS */
    }
}

/* Sixteenths in [-1,1]; dt and a as training starts with, or extreme: dt = softplus(+-30), a of
 * -1e-4 and -1e3 in turn. */
static float *draw(const size *s, int i, uint64_t *seed)
{
    const int64_t n = fg_shape_count(shape_of(s, i));
    float *x = malloc((size_t)n * sizeof *x);
    for (int64_t k = 0; k < n; k++) {
        *seed = *seed * 6364136223846793005u + 1442695040888963407u;
        x[k] = (float)((int)(*seed >> 40) % 33 - 16) / 16;
        if (s->mamba && (i == DT || i == A)) { x[k] *= 2; continue; }
        if (s->mamba && i == BIAS) x[k] -= 4;
        if (i == DT) x[k] = expf(-4.5f + 2 * x[k]);
        if (i == A) x[k] = -expf(1.4f + 1.4f * x[k]);
        if (i == DT && s->rates == EXTREME) x[k] = *seed >> 63 ? 30 : expf(-30);
        if (i == A && s->rates == EXTREME) x[k] = k % 2 ? -1e3f : -1e-4f;
    }
    return x;
}

/* Padding in front of the second sequence; documents of 3, 1, 80, 1, 80, ... */
static void fill_first(const size *s, int32_t *first)
{
    for (int64_t b = 0; b < s->B; b++) {
        int32_t start = b ? 9 : 0, next = start + 3;
        for (int32_t t = 0, k = 0; t < s->T; t++) {
            if (t == next) start = t, next += k++ % 2 ? 80 : 1;
            first[b * s->T + t] = start;
        }
    }
}

/* What is read of [x | dt | b | c]: a part of it, with its own last two axes. */
static fg_tensor part(const size *s, fg_tensor all, int i, int64_t *at)
{
    const fg_shape own = shape_of(s, i);
    const int64_t n = fg_shape_count(own) / (s->B * s->T), from = *at;
    *at += (n + 7) / 8 * 8;
    return fg_reshape(fg_slice(all, 2, from, from + n), own);
}

static fg_tensor scan_of_columns(const size *s, const fg_tensor *in)
{
    static const int parts[] = { X, DT, B, C };
    fg_tensor all = { 0 }, own[INPUTS];
    int64_t at = 0;
    for (int k = 0; k < 4; k++) {
        const fg_shape of = shape_of(s, parts[k]);
        const int64_t n = fg_shape_count(of) / (s->B * s->T), wide = (n + 7) / 8 * 8;
        fg_tensor x = fg_reshape(in[parts[k]], FG_DIMS(s->B, s->T, n));
        if (wide > n) x = fg_concat(x, fg_fill(x.graph, FG_DIMS(s->B, s->T, wide - n), 0), 2);
        all = k ? fg_concat(all, x, 2) : x;
    }
    all = fg_cast(all, FG_BF16);
    for (int k = 0; k < 4; k++) own[parts[k]] = part(s, all, parts[k], &at);
    return fg_mamba2_scan(own[X], own[DT], in[BIAS], in[A], own[B], own[C], in[D], in[STATE]);
}

/* y, end and the gradients of all inputs, on a device. */
static void run(const size *s, fg_backend *device, float **out)
{
    fg_graph *g = fg_graph_new();
    fg_tensor in[RESULTS], to[RESULTS], narrow[INPUTS], first = { 0 };
    for (int i = 0; i < RESULTS; i++) in[i] = fg_input(g, names[i], FG_F32, shape_of(s, i));
    if (s->documents) first = fg_input(g, "first", FG_I32, FG_DIMS(s->B, s->T));
    fg_graph_sequence(g, (fg_sequence){ .first = first });
    for (int i = 0; i < INPUTS; i++)
        narrow[i] = i == X || i == B || i == C ? fg_cast(in[i], FG_BF16) : in[i];
    to[Y] = s->mamba ? scan_of_columns(s, in)
          : fg_ssd_scan(narrow[X], narrow[DT], narrow[A], narrow[B], narrow[C], narrow[D],
                        narrow[STATE]);
    to[END] = fg_result(to[Y], 1);
    const fg_tensor on_y = weighted(to[Y], in[Y]), on_end = weighted(to[END], in[END]);
    fg_tensor loss = fg_add(on_y, on_end);
    if (!s->mamba) loss = fg_add(loss, fg_sum(in[BIAS]));
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

static void compare(const size *s, fg_backend *gpu, fg_backend *cpu)
{
    float *want[RESULTS], *got[RESULTS], *again[RESULTS];
    run(s, cpu, want);
    run(s, gpu, got);
    run(s, gpu, again);
    for (int i = 0; i < RESULTS; i++) {
        const int64_t n = fg_shape_count(shape_of(s, i));
        const double far = off(got[i], want[i], n);
        cr_expect(far <= bounds[i], "%sT = %d, N = %d%s: %s%s is off by %.1e",
                  s->mamba ? "mamba2, " : "", (int)s->T, (int)s->N,
                  s->documents ? ", documents" : "", i < INPUTS ? "gradient of " : "", names[i],
                  far);
        cr_expect(!memcmp(got[i], again[i], (size_t)n * 4), "%s changed from run to run", names[i]);
        free(want[i]);
        free(got[i]);
        free(again[i]);
    }
}

Test(cuda_ssd_scan, chunks_on_tensor_cores_are_the_recurrence)
{
    static const int64_t lengths[] = { 1, 17, 63, 64, 65, 127, 128, 129, 300, 1000, 4097 };
    fg_backend *gpu = fg__cuda_or_skip(true), *cpu = gpu ? fg_backend_open("cpu", 2) : NULL;
    for (int i = 0; gpu && i < 11; i++)
        for (int documents = 0; documents < 2; documents++) {
            const size wide = { 2, lengths[i], 4, 2, 128, documents, AS_TRAINED, false };
            const size small = { 2, lengths[i], 3, 1, 64, documents, AS_TRAINED, false };
            size mamba = wide, odd = small;
            mamba.mamba = odd.mamba = true;
            compare(&wide, gpu, cpu);
            compare(&small, gpu, cpu);
            compare(&mamba, gpu, cpu);
            compare(&odd, gpu, cpu);
        }
    cr_expect_eq(fg__traps.broken, 0, "%d allocations were overrun", fg__traps.broken);
    fg_backend_close(gpu);
    fg_backend_close(cpu);
}

/* What neither forgets nor is forgotten beside what is forgotten at once. */
Test(cuda_ssd_scan, extreme_rates)
{
    static const int64_t lengths[] = { 64, 65, 300 };
    fg_backend *gpu = fg__cuda_or_skip(true), *cpu = gpu ? fg_backend_open("cpu", 2) : NULL;
    for (int i = 0; gpu && i < 3; i++) {
        const size s = { 2, lengths[i], 4, 1, 128, i == 2, EXTREME, false };
        compare(&s, gpu, cpu);
    }
    fg_backend_close(gpu);
    fg_backend_close(cpu);
}

/* More heads than a block on wgmma takes, and one. */
Test(cuda_ssd_scan, any_number_of_heads)
{
    fg_backend *gpu = fg__cuda_or_skip(true), *cpu = gpu ? fg_backend_open("cpu", 2) : NULL;
    const size many = { 1, 200, 131, 1, 64, false, AS_TRAINED, false };
    const size one = { 3, 200, 1, 1, 128, true, AS_TRAINED, false };
    if (gpu) compare(&many, gpu, cpu), compare(&one, gpu, cpu);
    fg_backend_close(gpu);
    fg_backend_close(cpu);
}

/* ---- a million tokens ----------------------------------------------------------------------- */

enum { LONG = 1000003, NARROW = 64 };

/* x of row p is (p + 1) / 64 everywhere; token t < 64 writes column t and no later token writes;
 * all read the mean of the columns.  The loss is the last token's y times (p + 1) / 64. */
static float long_value(int i, int64_t t, int64_t n)
{
    switch (i) {
    case X: return (float)(n + 1) / NARROW;
    case B: return t == n ? 1.0f : 0.0f;
    case C: return 1.0f / NARROW;
    default: return t == LONG - 1 ? (float)(n + 1) / NARROW : 0.0f;
    }
}

static void write_long(fg_plan *p, fg_tensor t, int which)
{
    float *x = malloc((size_t)LONG * NARROW * sizeof *x);
    for (int64_t i = 0; i < (int64_t)LONG * NARROW; i++)
        x[i] = long_value(which, i / NARROW, i % NARROW);
    cr_assert_eq(fg_write(p, t, x, (size_t)LONG * NARROW * sizeof *x), FG_OK, "%s",
                 fg_plan_message(p));
    free(x);
}

static void check_long(fg_plan *p, fg_tensor y, fg_tensor gx)
{
    float *got = malloc((size_t)LONG * NARROW * sizeof *got);
    int64_t wrong = 0;
    fg_read(p, y, got, (size_t)LONG * NARROW * sizeof *got);
    for (int64_t t = NARROW - 1; t < LONG; t++)
        for (int64_t n = 0; n < NARROW; n++)
            wrong += got[t * NARROW + n] != long_value(X, t, n);
    cr_expect_eq(wrong, 0, "%lld of y are not what was stored", (long long)wrong);
    wrong = 0;
    fg_read(p, gx, got, (size_t)LONG * NARROW * sizeof *got);
    for (int64_t t = 0; t < LONG; t++)
        for (int64_t n = 0; n < NARROW; n++)
            wrong += got[t * NARROW + n] != (t < NARROW ? (float)(n + 1) / NARROW / NARROW : 0.0f);
    cr_expect_eq(wrong, 0, "%lld of gx are not what was asked", (long long)wrong);
    free(got);
}

/* Decay 1: what the first tokens store is there to the bit a million tokens on, and so is what
 * their gradient is. */
Test(cuda_ssd_scan, a_million_tokens_lose_nothing)
{
    fg_backend *gpu = fg__cuda_or_skip(true);
    if (!gpu) return;
    fg_graph *g = fg_graph_new();
    const fg_shape rows = FG_DIMS(1, LONG, 1, NARROW);
    const fg_tensor x = fg_input(g, "x", FG_F32, rows), b = fg_input(g, "b", FG_F32, rows);
    const fg_tensor c = fg_input(g, "c", FG_F32, rows), w = fg_input(g, "w", FG_F32, rows);
    const fg_tensor dt = fg_fill(g, FG_DIMS(1, LONG, 1), 1), a = fg_fill(g, FG_DIMS(1), 0);
    const fg_tensor none = { 0 }, xs = fg_cast(x, FG_BF16), bs = fg_cast(b, FG_BF16);
    const fg_tensor cs = fg_cast(c, FG_BF16);
    const fg_tensor y = fg_ssd_scan(xs, dt, a, bs, cs, none, none), loss = weighted(y, w);
    fg_tensor gx;
    cr_assert_eq(fg_grad(loss, 1, &x, &gx), FG_OK, "%s", fg_graph_message(g));
    const fg_tensor wide = fg_output(fg_cast(y, FG_F32), "y");
    gx = fg_output(gx, "gx");
    fg_store *store = fg_store_new(gpu);
    fg_plan *p = fg_plan_new(g, store);
    write_long(p, x, X);
    write_long(p, b, B);
    write_long(p, c, C);
    write_long(p, w, Y);
    cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
    check_long(p, wide, gx);
    fg_plan_free(p);
    fg_store_free(store);
    fg_graph_free(g);
    fg_backend_close(gpu);
}
