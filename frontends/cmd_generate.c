/* cmd_generate.c - fox-graph generate: prompts in, continuations out.  Bytes are tokens. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "cli.h"

typedef struct { int n; fg_prompt *prompt; } prompts;

static void free_prompts(prompts *p)
{
    for (int i = 0; i < p->n; i++) free((void *)p->prompt[i].tokens);
    free(p->prompt);
}

static int add_prompt(const cli *c, prompts *p, const char *text, size_t length)
{
    fg_prompt *grown = realloc(p->prompt, ((size_t)p->n + 1) * sizeof *grown);
    int32_t *tokens = malloc((length + 1) * sizeof *tokens);
    if (grown) p->prompt = grown;
    if (!grown || !tokens) {
        free(tokens);
        return cli_fail(c, CLI_DEVICE, "out of memory");
    }
    for (size_t i = 0; i < length; i++) tokens[i] = (unsigned char)text[i];
    p->prompt[p->n++] = (fg_prompt){ tokens, (int64_t)length };
    return CLI_OK;
}

static int add_file(const cli *c, prompts *p, const char *path)
{
    FILE *f = strcmp(path, "-") ? fopen(path, "rb") : stdin;
    size_t length = 0, capacity = 0;
    char *text = NULL;
    int status = f ? CLI_OK : cli_fail(c, CLI_FILE, "%s cannot be read: %s", path, strerror(errno));
    while (!status && !feof(f) && !ferror(f)) {
        if (capacity < length + 65536) {
            char *grown = realloc(text, capacity = 2 * capacity + 65536);
            if (!grown) status = cli_fail(c, CLI_DEVICE, "out of memory");
            else text = grown;
        }
        if (!status) length += fread(text + length, 1, 65536, f);
    }
    if (!status && ferror(f))
        status = cli_fail(c, CLI_FILE, "%s cannot be read: %s", path, strerror(errno));
    if (f && f != stdin) fclose(f);
    if (!status) status = add_prompt(c, p, text, length);
    free(text);
    return status;
}

/* Prompts in the order of the command line; without any, one that is empty. */
static int collect(const cli *c, prompts *p)
{
    int status = CLI_OK;
    for (int i = 0; !status && i < c->n_given; i++) {
        const char *value = c->given[i].value;
        if (c->given[i].option == OPT_prompt) status = add_prompt(c, p, value, strlen(value));
        if (c->given[i].option == OPT_prompt_file) status = add_file(c, p, value);
    }
    if (!status && !p->n) status = add_prompt(c, p, "", 0);
    return status;
}

static int read_options(const cli *c, const cli_model *m, fg_generate_options *o)
{
    *o = fg_generate_default();
    o->max_tokens = 128;
    o->temperature = 1;
    o->top_k = 0;
    o->top_p = 0;
    o->seed = m->recipe.seed;
    o->bos = m->recipe.bos;
    o->end_token = -1;
    o->vocab = m->recipe.vocab ? m->recipe.vocab : 256;
    if (!cli_int(c, OPT_max_tokens, 1, 1 << 24, &o->max_tokens) ||
        !cli_int(c, OPT_top_k, 1, INT32_MAX, &o->top_k) ||
        !cli_real(c, OPT_temperature, 0, 1e6, &o->temperature) ||
        !cli_real(c, OPT_top_p, 0, 1, &o->top_p))
        return CLI_USAGE;
    if (cli_has(c, OPT_greedy)) {
        if (cli_has(c, OPT_temperature) || cli_has(c, OPT_top_k) || cli_has(c, OPT_top_p))
            return cli_fail(
                c, CLI_USAGE,
                "--greedy leaves nothing to sample: not with --temperature, --top-k or --top-p");
        o->temperature = 0;
    }
    return CLI_OK;
}

/* One prompt alone is shown as it grows. */
static bool show_token(void *to, int sequence, int32_t token)
{
    (void)to;
    (void)sequence;
    putchar((unsigned char)token);
    fflush(stdout);
    return true;
}

static void put_tokens(const int32_t *tokens, int64_t n)
{
    for (int64_t i = 0; i < n; i++) putchar((unsigned char)tokens[i]);
}

static json_t *bytes_as_json(const int32_t *tokens, int64_t n)
{
    char *text = malloc((size_t)n + 1);
    if (!text) return NULL;
    for (int64_t i = 0; i < n; i++) text[i] = tokens[i] ? (char)tokens[i] : '?';
    text[n] = 0;
    json_t *s = cli_json_text(text);
    free(text);
    return s;
}

static json_t *ids_as_json(const int32_t *tokens, int64_t n)
{
    json_t *list = json_array();
    for (int64_t i = 0; i < n; i++) json_array_append_new(list, json_integer(tokens[i]));
    return list;
}

static int print_all(const cli *c, const prompts *p, const int32_t *out, const int64_t *counts,
                     int64_t max_tokens)
{
    json_t *list = c->json ? json_array() : NULL;
    for (int i = 0; i < p->n; i++) {
        const int32_t *tokens = out + i * max_tokens;
        if (c->json) {
            json_array_append_new(list,
                                  json_pack("{s:o, s:o, s:o}", "prompt",
                                            bytes_as_json(p->prompt[i].tokens, p->prompt[i].count),
                                            "text", bytes_as_json(tokens, counts[i]), "tokens",
                                            ids_as_json(tokens, counts[i])));
        } else if (p->n > 1) {
            put_tokens(p->prompt[i].tokens, p->prompt[i].count);
            put_tokens(tokens, counts[i]);
            puts(i + 1 < p->n ? "\n--------" : "");
        } else {
            putchar('\n');
        }
    }
    return c->json ? cli_print_json(c, list) : CLI_OK;
}

static int generate(const cli *c, const cli_model *m, fg_store *s, const prompts *p,
                    fg_generate_options *o)
{
    char message[FG_MESSAGE] = "";
    char rate[32];
    int32_t *out = calloc((size_t)(p->n * o->max_tokens), sizeof *out);
    int64_t *counts = calloc((size_t)p->n, sizeof *counts), total = 0;
    const double start = cli_now();
    o->stop = cli_catch_signals();
    if (p->n == 1 && !c->json) {
        put_tokens(p->prompt[0].tokens, p->prompt[0].count);
        o->token = show_token;
    }
    fg_status e = out && counts
                      ? fg_generate(&m->model, s, p->n, p->prompt, o, out, counts, message)
                      : FG_ERR_MEMORY;
    int status = CLI_OK;
    if (e && e != FG_ERR_STOPPED)
        status = cli_fail(c, e == FG_ERR_USAGE ? CLI_USAGE : cli_exit_of(e), "%s",
                          message[0] ? message : fg_status_text(e));
    else
        status = print_all(c, p, out, counts, o->max_tokens);
    for (int i = 0; !status && i < p->n; i++) total += counts[i];
    const double seconds = cli_now() - start;
    if (!status) cli_note(c, "%lld tokens in %.2f s, %s tokens/s", (long long)total, seconds,
                          cli_amount(rate, (double)total / seconds));
    if (!status && e == FG_ERR_STOPPED) status = 128 + (int)*o->stop;
    free(counts);
    free(out);
    return status;
}

int cmd_generate(const cli *c)
{
    cli_model m;
    prompts p = { 0 };
    fg_generate_options o;
    int status = cli_open(c, c->args[0], &m);
    if (!status && !m.model.build)
        status = cli_fail(c, CLI_USAGE, "%s is not a language model: it cannot continue text",
                          m.path);
    if (!status) status = read_options(c, &m, &o);
    if (!status) status = collect(c, &p);
    fg_graph *g = status ? NULL : cli_forward(c, &m, 1, m.recipe.context, &status);
    fg_backend *b = g ? cli_backend(c, &status) : NULL;
    fg_store *s = b ? cli_store(c, &m, b, g, &status) : NULL;
    if (s && !m.weights) cli_note(c, "%s has no weights: these are the initial parameters", m.path);
    if (s) status = generate(c, &m, s, &p, &o);
    fg_store_free(s);
    fg_backend_close(b);
    fg_graph_free(g);
    free_prompts(&p);
    cli_close(&m);
    return status;
}
