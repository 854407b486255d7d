/* cmd_bench_decode.c - fox-graph bench --decode-at N: the time of a token behind N others, beside
 * the time in which the device copies as many bytes as the token has to read.
 *
 * One sequence, greedy, through fg_generate as `fox-graph generate` does it: choosing the token is
 * part of the time.  The prompt is N tokens, read in pieces; the first tokens pay for plans and
 * recordings and do not count. */
#include <stdlib.h>
#include <string.h>
#include "cli.h"

enum { WARM = 8, TIMED = 64 };           /* tokens */

typedef struct { double at[WARM + TIMED]; int n; } ticks;

typedef struct {
    double token, bytes, rate;           /* seconds; bytes it has to move; bytes a second copied */
    int64_t behind;                      /* tokens in the caches */
} figures;

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static bool on_token(void *to, int sequence, int32_t token)
{
    ticks *t = to;
    (void)sequence;
    (void)token;
    if (t->n < WARM + TIMED) t->at[t->n++] = cli_now();
    return true;
}

static int time_tokens(const cli *c, const cli_model *m, fg_store *s, figures *f)
{
    char message[FG_MESSAGE] = "";
    int32_t out[WARM + TIMED];
    int64_t n;
    double gaps[TIMED];
    ticks t = { .n = 0 };
    int32_t *start = malloc((size_t)f->behind * sizeof *start);
    const fg_prompt prompt = { start, f->behind };
    const int64_t vocab = cli_vocab(m);
    fg_generate_options o = fg_generate_default();
    o.max_tokens = WARM + TIMED;
    o.temperature = 0;
    o.end_token = -1;
    o.token = on_token;
    o.to = &t;
    for (int64_t i = 0; start && i < f->behind; i++)
        start[i] = (int32_t)((i * 7919 + i / 64) % vocab);
    const fg_status e = start ? fg_generate(&m->model, s, 1, &prompt, &o, out, &n, message)
                              : FG_ERR_MEMORY;
    free(start);
    if (e) return cli_fail(c, cli_exit_of(e), "decoding: %s", message);
    for (int i = 0; i < TIMED; i++) gaps[i] = t.at[WARM + i] - t.at[WARM + i - 1];
    qsort(gaps, TIMED, sizeof *gaps, ascending);
    f->token = (gaps[TIMED / 2 - 1] + gaps[TIMED / 2]) / 2;
    return CLI_OK;
}

/* What the nodes of the graph for one token have to move, whose caches hold all the tokens. */
static int count_bytes(const cli *c, const cli_model *m, fg_store *s, figures *f)
{
    fg_graph *g = fg_graph_new();
    int status = CLI_OK;
    if (!g) return cli_fail(c, cli_exit_of(FG_ERR_MEMORY), "out of memory");
    for (int i = 0; i < m->model.n_settings; i++)
        fg_graph_set(g, m->model.settings[i].key, m->model.settings[i].value);
    const fg_tensor tokens = fg_input(g, "tokens", FG_I32, fg_dims(2, (const int64_t[]){ 1, 1 }));
    const fg_tensor past = fg_input(g, "past", FG_I32, fg_dims(1, (const int64_t[]){ 1 }));
    const fg_tensor none = { 0 };
    fg_graph_sequence(g, (fg_sequence){ none, past, f->behind });
    fg_output(m->model.build(m->model.self, tokens), "logits");
    fg_plan *p = fg_plan_new(g, s);
    if (!p || fg_plan_status(p))
        status = cli_fail(c, p ? cli_exit_of(fg_plan_status(p)) : cli_exit_of(FG_ERR_MEMORY), "%s",
                          p ? fg_plan_message(p) : "out of memory");
    else f->bytes = fg_plan_describe(p).bytes;
    fg_plan_free(p);
    fg_graph_free(g);
    return status;
}

/* Bytes read and written a second by a copy too large for any cache. */
static int time_copy(const cli *c, fg_backend *b, figures *f)
{
    const int64_t n = strcmp(fg_backend_name(b), "cpu") ? (int64_t)1 << 27 : (int64_t)1 << 24;
    double best = 0;
    fg_graph *g = fg_graph_new();
    const fg_tensor x = fg_input(g, "x", FG_F32, fg_dims(1, (const int64_t[]){ n }));
    fg_output(fg_scale(x, 1, 0), "y");
    fg_store *s = fg_store_new(b);
    fg_plan *p = s ? fg_plan_new(g, s) : NULL;
    float *zeros = calloc((size_t)n, sizeof *zeros);
    fg_status e = p && zeros ? fg_write(p, x, zeros, (size_t)n * sizeof *zeros) : FG_ERR_MEMORY;
    for (int i = 0; !e && i < 8; i++) {
        const double start = cli_now();
        e = fg_run(p);
        const double rate = 8 * (double)n / (cli_now() - start);
        if (rate > best) best = rate;
    }
    f->rate = best;
    const int status = !e ? CLI_OK : cli_fail(c, cli_exit_of(e), "copy: %s", fg_plan_message(p));
    free(zeros);
    fg_plan_free(p);
    fg_store_free(s);
    fg_graph_free(g);
    return status;
}

static int print(const cli *c, const cli_model *m, const fg_backend *b, const figures *f)
{
    char rate[32], bytes[32];
    const double least = f->bytes / f->rate;
    if (c->json)
        return cli_print_json(c, json_pack("{s:o, s:s, s:I, s:o, s:o, s:o, s:o, s:o}",
                                           "model", cli_json_text(m->path),
                                           "device", fg_backend_name(b),
                                           "decode_at", (json_int_t)f->behind,
                                           "decode_seconds", cli_json_real(f->token),
                                           "bytes", cli_json_real(f->bytes),
                                           "copy_bytes_per_s", cli_json_real(f->rate),
                                           "least_seconds", cli_json_real(least),
                                           "share", cli_json_real(least / f->token)));
    printf("%s on %s, one sequence, %lld tokens in the caches, median of %d tokens\n", m->path,
           fg_backend_name(b), (long long)f->behind, TIMED);
    printf("  decoding        %10.3f ms   %9s tokens/s\n", 1e3 * f->token,
           cli_amount(rate, 1 / f->token));
    printf("  to move         %10.3f ms   %s at the %.2f TB/s of a copy: %.0f%% of the time\n",
           1e3 * least, cli_bytes(bytes, f->bytes), 1e-12 * f->rate, 100 * least / f->token);
    return CLI_OK;
}

int cli_bench_decoding(const cli *c, int64_t behind)
{
    cli_model m;
    figures f = { .behind = behind };
    int status = cli_open(c, c->args[0], &m);
    if (!status && !m.model.build)
        status = cli_fail(c, CLI_USAGE, "%s is not a language model: it does not decode", m.path);
    fg_graph *g = status ? NULL : cli_forward(c, &m, 1, m.recipe.context, &status);
    fg_backend *b = g ? cli_backend(c, &status) : NULL;
    fg_store *s = b ? cli_store(c, &m, b, g, &status) : NULL;
    if (s && !status) status = time_copy(c, b, &f);
    if (s && !status) status = count_bytes(c, &m, s, &f);
    if (s && !status) status = time_tokens(c, &m, s, &f);
    if (s && !status) status = print(c, &m, b, &f);
    fg_store_free(s);
    fg_backend_close(b);
    fg_graph_free(g);
    cli_close(&m);
    return status;
}
