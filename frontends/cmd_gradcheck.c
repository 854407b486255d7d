/* cmd_gradcheck.c - fox-graph gradcheck: gradients against central differences.
 *
 * In f32 the differences would drown in rounding, so the command becomes its twin fox-graph-f64:
 * these same sources on the library that computes in double. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "cli.h"

#ifndef FG_DOUBLE

/* The twin lies beside this program (build tree) or in ../libexec/fox-graph (installed). */
int cmd_gradcheck(const cli *c)
{
    static const char *const places[] = { "/fox-graph-f64", "/../libexec/fox-graph/fox-graph-f64" };
    char path[4200];
    ssize_t n = readlink("/proc/self/exe", path, 4096);
    while (n > 0 && path[n - 1] != '/') n--;
    if (n <= 0)
        return cli_fail(c, CLI_DEVICE, "the program does not know its own folder: %s",
                        strerror(errno));
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        snprintf(path + n - 1, sizeof path - (size_t)n, "%s", places[i]);
        if (!access(path, X_OK)) execv(path, c->argv);
    }
    return cli_fail(c, CLI_DEVICE,
                    "fox-graph-f64, which computes in double, is not beside this program");
}

#else

enum { BATCH = 2, CONTEXT = 12 };

typedef struct {
    double worst, limit;
    char where[300];
    int64_t checked, samples;
    json_t *list;
    bool json;
} tally;

typedef struct {
    const cli_model *m;
    const fg_graph  *g;
    int32_t *tokens, *labels;
    int64_t  count;
} batch;

/* Numbers from 0 to limit - 1 with every bit of a counter stirred in; no two neighbours alike. */
static void fill_ids(int32_t *ids, int64_t n, int64_t limit, uint64_t seed)
{
    for (int64_t i = 0; i < n; i++) {
        uint64_t x = (seed + (uint64_t)i + 1) * 0x9e3779b97f4a7c15u;
        x = (x ^ (x >> 31)) * 0xbf58476d1ce4e5b9u;
        ids[i] = (int32_t)((x >> 33) % (uint64_t)limit);
    }
}

static fg_status fill(void *of, fg_plan *p)
{
    const batch *b = of;
    const size_t bytes = (size_t)b->count * sizeof(int32_t);
    if (!b->m->model.build)
        return b->m->model.feed(b->m->model.self, p, b->g, &b->m->recipe, 0, false);
    fg_status s = fg_write(p, fg_find(b->g, "tokens"), b->tokens, bytes);
    return s ? s : fg_write(p, fg_find(b->g, "labels"), b->labels, bytes);
}

/* A line of fg_gradcheck: passed on, or taken apart for JSON. */
static void on_line(void *to, const char *line)
{
    tally *t = to;
    char name[256];
    long long checked, count;
    double worst;
    if (!t->json) fputs(line, stdout);
    else if (sscanf(line, "%255s %lld of %lld worst relative error %lf", name, &checked, &count,
                    &worst) == 4)
        json_array_append_new(t->list, json_pack("{s:s, s:I, s:I, s:o}", "name", name, "checked",
                                                 (json_int_t)checked, "elements", (json_int_t)count,
                                                 "worst", cli_json_real(worst)));
}

static int check(const cli *c, fg_tensor loss, fg_store *s, batch *b, tally *t)
{
    fg_gradcheck_result r = { 0 };
    fg_status e = fg_gradcheck_filled(loss, s, t->samples, b ? fill : NULL, b, on_line, t, &r);
    if (e) {
        const char *text = fg_graph_status(loss.graph) ? fg_graph_message(loss.graph)
                         : fg_store_status(s) ? fg_store_message(s) : fg_status_text(e);
        return cli_fail(c, cli_exit_of(e), "%s", text);
    }
    t->checked += r.checked;
    if (r.where && !(r.worst <= t->worst)) {
        t->worst = r.worst;
        snprintf(t->where, sizeof t->where, "%s", r.where);
    }
    return CLI_OK;
}

/* ---- models ---------------------------------------------------------------------------------- */

/* A small batch, unless the user wants another. */
static void shrink(cli_model *m)
{
    const char *key;
    for (int i = 0; i < CLI_MAX_KEYS && (key = fg_recipe_key(i)); i++) {
        if (m->recipe_origin[i] >= CLI_FROM_CONFIG) continue;
        if (!strcmp(key, "batch") && m->recipe.batch > BATCH) m->recipe.batch = BATCH;
        if (!strcmp(key, "micro_batch")) m->recipe.micro_batch = 0;
        if (!strcmp(key, "context") && m->recipe.context > CONTEXT) m->recipe.context = CONTEXT;
    }
}

/* How many entries of each parameter can be checked in most of a minute: two runs for each. */
static int64_t affordable(const cli *c, fg_store *s, batch *b)
{
    fg_plan *p = fg_plan_new(b->g, s);
    double start = cli_now(), seconds;
    const int n = fg_param_count(b->g);
    fg_status e = p ? fg_plan_status(p) : FG_ERR_MEMORY;
    if (!e) e = fill(b, p);
    if (!e) e = fg_run(p);
    seconds = cli_now() - start;
    fg_plan_free(p);
    if (e) return 1;
    int64_t samples = (int64_t)(40 / (2 * seconds * (n ? n : 1)));
    if (samples < 1)
        cli_note(c, "this takes about %.0f s; a smaller model (--set) shows the same",
                 2 * seconds * n);
    return samples < 1 ? 1 : samples > 4 ? 4 : samples;
}

/* A model's own loss, or the mean of the losses of all tokens. */
static fg_tensor scalar(const fg_graph *g)
{
    const fg_tensor loss = fg_find(g, "loss"), losses = fg_find(g, "losses");
    return fg_absent(loss) ? fg_mean(losses) : loss;
}

static int check_model(const cli *c, const char *path, tally *t)
{
    cli_model m;
    batch b = { .m = &m };
    int status = cli_open(c, path, &m);
    if (!status) shrink(&m);
    fg_graph *g = status ? NULL : cli_loss(c, &m, m.recipe.batch, m.recipe.context, &status);
    fg_backend *device = g ? cli_backend(c, &status) : NULL;
    fg_store *s = device ? cli_store(c, &m, device, g, &status) : NULL;
    if (s) {
        const int64_t vocab = cli_vocab(&m);
        b.g = g;
        b.count = m.recipe.batch * m.recipe.context;
        b.tokens = malloc((size_t)b.count * sizeof *b.tokens);
        b.labels = malloc((size_t)b.count * sizeof *b.labels);
        if (!b.tokens || !b.labels) status = cli_fail(c, CLI_DEVICE, "out of memory");
        if (!status && m.model.build) fill_ids(b.tokens, b.count, vocab, 1);
        if (!status && m.model.build) fill_ids(b.labels, b.count, vocab, 1000003);
        if (!status && t->samples < 0) t->samples = affordable(c, s, &b);
        if (!status) status = check(c, scalar(g), s, &b, t);
        free(b.labels);
        free(b.tokens);
    }
    fg_store_free(s);
    fg_backend_close(device);
    fg_graph_free(g);
    cli_close(&m);
    return status;
}

/* ---- ops ------------------------------------------------------------------------------------- */

static int find_op(const char *name)
{
    fg_op_info op;
    for (int i = 0; fg_op_at(i, &op); i++) if (!strcmp(op.name, name)) return i;
    return -1;
}

/* sum of y times fixed random weights, so that no gradient cancels by symmetry */
static fg_tensor weighted_sum(fg_tensor y)
{
    const fg_init random = { .kind = FG_NORMAL, .a = 1, .frozen = true };
    fg_tensor w = fg_param(y.graph, "gradcheck.weights", fg_shape_of(y), random);
    fg_tensor product = fg_mul(y, w);
    return fg_sum(product);
}

/* One example; *last: there is none of that number. */
static int check_example(const cli *c, fg_backend *device, int op, int k, tally *t, bool *last)
{
    fg_graph *g = fg_graph_new();
    fg_tensor y = fg_op_example(g, op, k);
    *last = !y.graph;
    fg_store *s = *last ? NULL : fg_store_new(device);
    int status = CLI_OK;
    if (s) {
        fg_tensor loss = weighted_sum(y);
        fg_op_info info;
        if (!c->json && fg_op_at(op, &info)) printf("%s, example %d\n", info.name, k);
        status = cli_check_graph(c, g, "example");
        fg_status e = status ? FG_OK : fg_store_init(s, g, 7);
        if (e) status = cli_fail(c, cli_exit_of(e), "%s", fg_store_message(s));
        if (!status) status = check(c, loss, s, NULL, t);
    }
    fg_store_free(s);
    fg_graph_free(g);
    return status;
}

static int check_op(const cli *c, int i, tally *t)
{
    fg_op_info op;
    int status;
    fg_op_at(i, &op);
    if (!op.differentiable)
        return cli_fail(c, CLI_GRAPH, "%s has no gradient by its nature", op.name);
    fg_backend *device = cli_backend(c, &status);
    bool last = false;
    int k = 0;
    for (; !status && !last; k++) status = check_example(c, device, i, k, t, &last);
    if (!status && k == 1)
        status = cli_fail(c, CLI_GRAPH, "%s has no examples: it is checked through its op",
                          op.name);
    fg_backend_close(device);
    return status;
}

/* ---- verdict --------------------------------------------------------------------------------- */

static int verdict(const cli *c, const tally *t)
{
    const bool good = t->checked > 0 && t->worst <= t->limit;
    if (c->json) {
        int status = cli_print_json(c, json_pack("{s:b, s:o, s:f, s:s, s:I, s:O}",
                                                 "ok", (int)good,
                                                 "worst", cli_json_real(t->worst),
                                                 "limit", t->limit,
                                                 "where", t->where,
                                                 "checked", (json_int_t)t->checked,
                                                 "parameters", t->list));
        return status ? status : good ? CLI_OK : CLI_DIFFERENT;
    }
    if (!t->checked)
        return cli_fail(c, CLI_DIFFERENT, "the loss has no trained parameter: nothing was checked");
    printf("%s: %lld entries, worst relative error %.1e in %s, limit %.0e\n",
           good ? "good" : "wrong", (long long)t->checked, t->worst, t->where, t->limit);
    return good ? CLI_OK : CLI_DIFFERENT;
}

int cmd_gradcheck(const cli *c)
{
    tally t = { .worst = -1, .limit = 1e-6, .samples = -1, .json = c->json };
    int status = CLI_OK;
    if (!cli_int(c, OPT_samples, 0, INT64_MAX, &t.samples) ||
        !cli_real(c, OPT_limit, 0, 1, &t.limit))
        return CLI_USAGE;
    t.list = json_array();
    for (int i = 0; !status && i < c->n_args; i++) {
        const int op = access(c->args[i], F_OK) ? find_op(c->args[i]) : -1;
        tally one = t;
        if (op >= 0 && one.samples < 0) one.samples = 0;
        status = op >= 0 ? check_op(c, op, &one) : check_model(c, c->args[i], &one);
        one.samples = t.samples;
        t = one;
    }
    if (!status) status = verdict(c, &t);
    json_decref(t.list);
    return status;
}

#endif
