/* cmd_bench.c - fox-graph bench: the time of a training step and of decoding, beside the rate of
 * one large matrix product on the same device.
 *
 * Every time is the median of --repeat runs after one that does not count. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "cli.h"

enum { DECODED = 64, KINDS = 96 };

typedef struct { const char *op; double seconds, flops, bytes; int64_t calls; } kind;

typedef struct {
    double   sgemm;                      /* floating-point operations a second of the product */
    double   copy;                       /* bytes a second of a large copy, in and out */
    double peak; /* operations a second by the card's datasheet; 0: unknown */
    double   step, step_flops, tokens;   /* seconds, operations and tokens of an update */
    double   first, slow;                /* seconds of the first update; 95 of 100 take at most */
    double   decode;                     /* seconds a token, one sequence; 0: not measured */
    fg_plan_info info;
    kind     kinds[KINDS];
    int      n_kinds;
    int64_t  repeat, side;               /* side: of the matrices of the product */
} figures;

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x, int64_t n)
{
    qsort(x, (size_t)n, sizeof *x, ascending);
    return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

static int plan_failed(const cli *c, fg_status e, const fg_plan *p)
{
    return cli_fail(c, cli_exit_of(e), "%s", p ? fg_plan_message(p) : "out of memory");
}

/* ---- the product ----------------------------------------------------------------------------- */

static double cube(int64_t n) { return (double)n * (double)n * (double)n; }

/* Seconds spent in nodes of that op so far. */
static double op_seconds(const fg_plan *p, const char *op)
{
    kind k;
    for (int i = 0; fg_plan_profile_at(p, i, &k.op, &k.seconds, &k.calls, &k.flops, &k.bytes); i++)
        if (!strcmp(k.op, op)) return k.seconds;
    return 0;
}

/* Seconds that the op's nodes take in a run of g, the median of five; data: for input `in`. */
static int time_op(const cli *c, fg_backend *b, const fg_graph *g, const char *op, fg_tensor in,
                   const void *data, double *median_seconds)
{
    double seconds[5];
    fg_store *s = fg_store_new(b);
    fg_status e = s ? fg_store_init(s, g, 1) : FG_ERR_MEMORY;
    if (s) cli_precision(c, s, b);
    fg_plan *p = e ? NULL : fg_plan_new(g, s);
    if (!e) e = p ? fg_plan_status(p) : FG_ERR_MEMORY;
    if (!e) e = fg_write(p, in, data, (size_t)fg_count(in) * 4);
    fg_plan_profile(p, true);
    for (int i = 0; !e && i < 6; i++) {
        const double before = op_seconds(p, op);
        e = fg_run(p);
        if (i) seconds[i - 1] = op_seconds(p, op) - before;
    }
    const int status = e ? plan_failed(c, e, p) : CLI_OK;
    if (!e) *median_seconds = median(seconds, 5);
    fg_plan_free(p);
    fg_store_free(s);
    return status;
}

static int time_product(const cli *c, fg_backend *b, figures *f)
{
    const fg_init random = { .kind = FG_NORMAL, .a = 1 };
    const int64_t side = f->side, square[] = { side, side };
    double seconds = 0;
    int32_t *ids = malloc((size_t)side * sizeof *ids);
    fg_graph *g = fg_graph_new();
    if (!ids || !g) {
        free(ids);
        fg_graph_free(g);
        return cli_fail(c, CLI_DEVICE, "out of memory");
    }
    for (int32_t i = 0; i < side; i++) ids[i] = i;
    fg_tensor rows = fg_input(g, "rows", FG_I32, fg_dims(1, &side));
    fg_tensor table = fg_param(g, "x", fg_dims(2, square), random);
    fg_tensor x = fg_embedding(rows, table);           /* from outside, or it would run once */
    fg_tensor w = fg_param(g, "w", fg_dims(2, square), random);
    fg_tensor y = fg_linear(x, w, (fg_tensor){ 0 });
    fg_output(y, "y");
    const int status = time_op(c, b, g, "linear", rows, ids, &seconds);
    f->sgemm = seconds > 0 ? 2.0 * cube(side) / seconds : 0;
    free(ids);
    fg_graph_free(g);
    return status;
}

/* y = 2 x over 256 MiB: every byte is read once and written once. */
static int time_copy(const cli *c, fg_backend *b, figures *f)
{
    const int64_t n = (int64_t)1 << 26;
    double seconds = 0;
    float *data = malloc((size_t)n * sizeof *data);
    fg_graph *g = fg_graph_new();
    if (!data || !g) {
        free(data);
        fg_graph_free(g);
        return cli_fail(c, CLI_DEVICE, "out of memory");
    }
    for (int64_t i = 0; i < n; i++) data[i] = (float)(i % 1021) - 510.5f;
    fg_tensor x = fg_input(g, "x", FG_F32, fg_dims(1, &n));
    fg_tensor y = fg_scale(x, 2, 0);
    fg_output(y, "y");
    const int status = time_op(c, b, g, "scale", x, data, &seconds);
    f->copy = seconds > 0 ? 8.0 * (double)n / seconds : 0;
    free(data);
    fg_graph_free(g);
    return status;
}

/* Dense bf16, from NVIDIA's datasheets of 2020 to 2024. */
static double peak_of(const char *device)
{
    static const struct { const char *name; double peak; } cards[] = {
        { "H100 PCIe", 756e12 }, { "H100", 989.4e12 }, { "H200", 989.4e12 }, { "A100", 312e12 },
    };
    for (size_t i = 0; i < sizeof cards / sizeof cards[0]; i++)
        if (strstr(device, cards[i].name)) return cards[i].peak;
    return 0;
}

/* ---- training -------------------------------------------------------------------------------- */

/* Any tokens do for timing, as long as they do not repeat at once. */
static fg_status write_tokens(const cli_model *m, const fg_graph *g, fg_plan *p)
{
    fg_tensor tokens = fg_find(g, "tokens"), labels = fg_find(g, "labels");
    const int64_t n = fg_count(tokens), vocab = cli_vocab(m);
    if (!m->model.build) return m->model.feed(m->model.self, p, g, &m->recipe, 0, false);
    int32_t *ids = malloc((size_t)(n + 1) * sizeof *ids);
    if (!ids) return FG_ERR_MEMORY;
    for (int64_t i = 0; i <= n; i++)
        ids[i] = (int32_t)((i * 7919 + i / 64) % vocab);
    fg_status e = fg_write(p, tokens, ids, (size_t)n * sizeof *ids);
    if (!e) e = fg_write(p, labels, ids + 1, (size_t)n * sizeof *ids);
    free(ids);
    return e;
}

/* The learning rate and the number of the update, on whichever graph holds the update. */
static fg_status write_step(const fg_graph *g, fg_plan *p, float step)
{
    const float lr = 1e-5f;
    fg_tensor t = fg_find(g, "lr");
    fg_status e = fg_absent(t) ? FG_OK : fg_write(p, t, &lr, sizeof lr);
    t = fg_find(g, "step");
    return e || fg_absent(t) ? e : fg_write(p, t, &step, sizeof step);
}

static void collect_kinds(fg_plan *p, figures *f)
{
    kind k;
    for (int i = 0; f->n_kinds < KINDS; i++) {
        if (!fg_plan_profile_at(p, i, &k.op, &k.seconds, &k.calls, &k.flops, &k.bytes)) break;
        int at = 0;
        while (at < f->n_kinds && strcmp(f->kinds[at].op, k.op)) at++;
        if (at == f->n_kinds) {
            f->kinds[f->n_kinds++] = k;
            continue;
        }
        f->kinds[at].seconds += k.seconds;
        f->kinds[at].calls += k.calls;
        f->kinds[at].flops += k.flops;
        f->kinds[at].bytes += k.bytes;
    }
}

typedef struct {
    fg_graph *graph, *update;
    fg_plan *plan, *update_plan;
    int64_t micro_batches;
} step;

static fg_status run_step(step *t)
{
    fg_status e = FG_OK;
    for (int64_t i = 0; !e && i < t->micro_batches; i++)
        e = i + 1 < t->micro_batches ? fg_run_later(t->plan) : fg_run(t->plan);
    return e || !t->update ? e : fg_run(t->update_plan);
}

/* Times whole updates, then one more with a clock at every node. */
static int time_steps(const cli *c, step *t, figures *f)
{
    double *seconds = calloc((size_t)f->repeat, sizeof *seconds);
    const double begin = cli_now();
    fg_status e = seconds ? run_step(t) : FG_ERR_MEMORY;
    f->first = cli_now() - begin;
    if (!e) e = run_step(t);                 /* a device records here what it replays later */
    for (int64_t i = 0; !e && i < f->repeat; i++) {
        const double start = cli_now();
        e = run_step(t);
        seconds[i] = cli_now() - start;
        cli_more(c, "update %lld: %.1f ms", (long long)i, 1e3 * seconds[i]);
    }
    if (!e) {
        f->step = median(seconds, f->repeat);
        f->slow = seconds[(f->repeat * 95 + 99) / 100 - 1];
        fg_plan_profile(t->plan, true);
        if (t->update) fg_plan_profile(t->update_plan, true);
        e = run_step(t);
        collect_kinds(t->plan, f);
        if (t->update) collect_kinds(t->update_plan, f);
    }
    free(seconds);
    return e ? plan_failed(c, e, t->plan) : CLI_OK;
}

static int time_training(const cli *c, const cli_model *m, step *t, fg_store *s, figures *f)
{
    const int64_t micro = m->recipe.micro_batch > 0 ? m->recipe.micro_batch : m->recipe.batch;
    t->micro_batches = m->recipe.batch / micro;
    t->plan = fg_plan_new(t->graph, s);
    fg_status e = t->plan ? fg_plan_status(t->plan) : FG_ERR_MEMORY;
    if (!e) e = write_tokens(m, t->graph, t->plan);
    if (!e) e = write_step(t->graph, t->plan, 1);
    if (e) return plan_failed(c, e, t->plan);
    f->info = fg_plan_describe(t->plan);
    f->step_flops = f->info.flops * (double)t->micro_batches;
    f->tokens = (double)(m->recipe.batch * m->recipe.context);
    if (t->update) {
        t->update_plan = fg_plan_new(t->update, s);
        e = t->update_plan ? fg_plan_status(t->update_plan) : FG_ERR_MEMORY;
        if (!e) e = write_step(t->update, t->update_plan, 1);
        if (e) return plan_failed(c, e, t->update_plan);
        f->step_flops += fg_plan_describe(t->update_plan).flops;
    }
    return time_steps(c, t, f);
}

/* ---- decoding -------------------------------------------------------------------------------- */

typedef struct { double at[DECODED]; int n; } ticks;

static bool on_token(void *to, int sequence, int32_t token)
{
    ticks *t = to;
    (void)sequence;
    (void)token;
    if (t->n < DECODED) t->at[t->n++] = cli_now();
    return true;
}

/* One sequence, one token after the other; the first token pays for the plan and does not count. */
static int time_decoding(const cli *c, const cli_model *m, fg_store *s, figures *f)
{
    char message[FG_MESSAGE] = "";
    const int32_t start[4] = { 1, 2, 3, 4 };
    const fg_prompt prompt = { start, 4 };
    int32_t out[DECODED];
    int64_t n;
    double gaps[DECODED];
    ticks t = { .n = 0 };
    fg_generate_options o = fg_generate_default();
    o.max_tokens = DECODED;
    o.temperature = 0;
    o.end_token = -1;
    o.token = on_token;
    o.to = &t;
    fg_status e = fg_generate(&m->model, s, 1, &prompt, &o, out, &n, message);
    if (e) return cli_fail(c, cli_exit_of(e), "decoding: %s", message);
    for (int i = 1; i < t.n; i++) gaps[i - 1] = t.at[i] - t.at[i - 1];
    if (t.n > 2) f->decode = median(gaps, t.n - 1);
    return CLI_OK;
}

/* ---- results --------------------------------------------------------------------------------- */

static int slower(const void *a, const void *b)
{
    const kind *x = a, *y = b;
    return (x->seconds < y->seconds) - (x->seconds > y->seconds);
}

/* Seconds below which a kind's bytes or its arithmetic cannot go. */
static double floor_of(const figures *f, const kind *k)
{
    const double moved = f->copy > 0 ? k->bytes / f->copy : 0;
    const double computed = f->sgemm > 0 ? k->flops / f->sgemm : 0;
    return moved > computed ? moved : computed;
}

static int print_json(const cli *c, const cli_model *m, const fg_backend *b, const figures *f)
{
    json_t *kinds = json_array();
    for (int i = 0; i < f->n_kinds; i++)
        json_array_append_new(kinds, json_pack("{s:s, s:I, s:o, s:o, s:o, s:o}", "op",
                                               f->kinds[i].op,
                                               "calls", (json_int_t)f->kinds[i].calls,
                                               "seconds", cli_json_real(f->kinds[i].seconds),
                                               "flops", cli_json_real(f->kinds[i].flops),
                                               "bytes", cli_json_real(f->kinds[i].bytes),
                                               "floor", cli_json_real(floor_of(f, &f->kinds[i]))));
    return cli_print_json(
        c, json_pack("{s:o, s:s, s:i, s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, "
                     "s:o, s:o}",
                     "model", cli_json_text(m->path),
                     "device", fg_backend_name(b),
                     "threads", fg_backend_threads(b),
                     "batch", (json_int_t)m->recipe.batch,
                     "context", (json_int_t)m->recipe.context,
                     "step_seconds", cli_json_real(f->step),
                     "step_seconds_p95", cli_json_real(f->slow),
                     "first_step_seconds", cli_json_real(f->first),
                     "copy_bytes_per_s", f->copy > 0 ? cli_json_real(f->copy) : json_null(),
                     "mfu", f->peak > 0 ? cli_json_real(f->step_flops / f->step / f->peak)
                                        : json_null(),
                     "tokens_per_s", cli_json_real(f->tokens / f->step),
                     "flops_per_s", cli_json_real(f->step_flops / f->step),
                     "sgemm_flops_per_s", cli_json_real(f->sgemm),
                     "share", cli_json_real(f->step_flops / f->step / f->sgemm),
                     "decode_seconds", f->decode > 0 ? cli_json_real(f->decode) : json_null(),
                     "memory", cli_plan_json(&f->info),
                     "kinds", kinds));
}

static void print_text(const cli_model *m, const fg_backend *b, const figures *f)
{
    double total = 0;
    char text[32];
    printf("%s on %s, %d threads, batch %lld x %lld tokens, median of %lld\n", m->path,
           fg_backend_name(b), fg_backend_threads(b), (long long)m->recipe.batch,
           (long long)m->recipe.context, (long long)f->repeat);
    printf("  training step   %10.2f ms   %9s tokens/s", 1e3 * f->step,
           cli_amount(text, f->tokens / f->step));
    printf("   %8.1f GFLOP/s, %.0f%% of the product's", 1e-9 * f->step_flops / f->step,
           100 * f->step_flops / f->step / f->sgemm);
    if (f->peak > 0) printf(", MFU %.1f%%", 100 * f->step_flops / f->step / f->peak);
    printf("\n  95%% of them     %10.2f ms   the first, with all choices made, %.2f s\n",
           1e3 * f->slow, f->first);
    if (f->decode > 0)
        printf("  decoding        %10.2f ms   %9s tokens/s, one sequence\n", 1e3 * f->decode,
               cli_amount(text, 1 / f->decode));
    printf("  product         %10.2f ms   %9s           %8.1f GFLOP/s, %lld x %lld x %lld\n",
           1e3 * 2.0 * cube(f->side) / f->sgemm, "", 1e-9 * f->sgemm, (long long)f->side,
           (long long)f->side, (long long)f->side);
    if (f->copy > 0)
        printf("  copy            %10.2f ms   %9s           %8.1f GB/s, 256 MiB in and out\n",
               1e3 * (double)(1 << 29) / f->copy, "", 1e-9 * f->copy);
    for (int i = 0; i < f->n_kinds; i++) total += f->kinds[i].seconds;
    printf("\n  %-26s %7s %10s %7s %9s %8s%s\n", "node kind", "calls", "ms", "share", "GFLOP/s",
           "GB/s", f->copy > 0 ? "  floor ms  reached" : "");
    for (int i = 0; i < f->n_kinds; i++) {
        const kind *k = &f->kinds[i];
        const double s = k->seconds > 0 ? k->seconds : 1e-12;
        printf("  %-26s %7lld %10.3f %6.1f%% %9.1f %8.1f", k->op, (long long)k->calls,
               1e3 * k->seconds, total > 0 ? 100 * k->seconds / total : 0, 1e-9 * k->flops / s,
               1e-9 * k->bytes / s);
        if (f->copy > 0) printf("  %8.3f  %6.0f%%", 1e3 * floor_of(f, k), 100 * floor_of(f, k) / s);
        printf("\n");
    }
}

int cmd_bench(const cli *c)
{
    cli_model m;
    step t = { 0 };
    figures f = { .repeat = 5 };
    int64_t behind = 0;
    if (!cli_int(c, OPT_decode_at, 1, INT32_MAX / 2, &behind)) return CLI_USAGE;
    if (behind) return cli_bench_decoding(c, behind);
    int status = cli_open(c, c->args[0], &m);
    if (!status && !cli_int(c, OPT_repeat, 1, 10000, &f.repeat)) status = CLI_USAGE;
    if (!status) t.graph = cli_training(c, &m, &t.update, &status);
    fg_backend *b = t.graph ? cli_backend(c, &status) : NULL;
    fg_store *s = b ? cli_store(c, &m, b, t.graph, &status) : NULL;
    f.side = b && strcmp(fg_backend_name(b), "cpu") ? 8192 : 1536;
    if (s) status = time_product(c, b, &f);
    if (s && !status) status = time_training(c, &m, &t, s, &f);
    if (s && !status && cli_has(c, OPT_bench_ops)) status = time_copy(c, b, &f);
    if (b) f.peak = peak_of(fg_backend_device(b));
    if (s && !status && m.model.build && !cli_has(c, OPT_bench_step))
        status = time_decoding(c, &m, s, &f);
    qsort(f.kinds, (size_t)f.n_kinds, sizeof f.kinds[0], slower);
    if (s && !status && c->json) status = print_json(c, &m, b, &f);
    else if (s && !status) print_text(&m, b, &f);
    fg_plan_free(t.plan);
    fg_plan_free(t.update_plan);
    fg_store_free(s);
    fg_backend_close(b);
    fg_graph_free(t.update);
    fg_graph_free(t.graph);
    cli_close(&m);
    return status;
}
