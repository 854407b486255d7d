/* cli_graph.c - graph.json of what a command is given: a model's graphs, built, planned, run. */
#include <stdlib.h>
#include <string.h>
#include "cli_view.h"

int cli_choice(const cli *c, int option, int n, const char *const *words, int otherwise)
{
    const char *text = cli_text(c, option);
    if (!text) return otherwise;
    for (int i = 0; i < n; i++) if (!strcmp(text, words[i])) return i;
    char list[200] = "";
    for (int i = 0; i < n; i++)
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s%s",
                 !i ? "" : i < n - 1 ? ", " : " or ", words[i]);
    cli_fail(c, CLI_USAGE, "--%s is %s, not '%s'", cli_options[option].name, list, text);
    return -1;
}

bool cli_read_graph_wish(const cli *c, bool whole, cli_graph_wish *w)
{
    static const char *const stages[] = { "built", "gradient", "lowered", "planned" };
    static const char *const passes[] = { "forward", "train", "opt", "all" };
    *w = (cli_graph_wish){ .c = c, .stage_given = cli_has(c, OPT_stage) };
    w->stage = cli_choice(c, OPT_stage, 4, stages, CLI_BUILT);
    w->pass = cli_choice(c, OPT_pass, 4, passes, whole || w->stage == CLI_GRADIENT ? CLI_PASS_ALL
                                                 : CLI_FORWARD);
    if (w->stage < 0 || w->pass < 0) return false;
    if (w->stage != CLI_GRADIENT || w->pass != CLI_FORWARD) return true;
    cli_fail(c, CLI_USAGE, "--stage gradient has nothing to do with --pass forward");
    return false;
}

/* ---- a model's graphs ------------------------------------------------------------------------ */

typedef struct { fg_graph *graph[2]; fg_plan *plan[2]; fg_store *store; fg_backend *backend; } made;

static void unmake(made *x)
{
    for (int i = 0; i < 2; i++) fg_plan_free(x->plan[i]);
    fg_store_free(x->store);
    fg_backend_close(x->backend);
    for (int i = 0; i < 2; i++) fg_graph_free(x->graph[i]);
}

static int plan_graphs(const cli_graph_wish *w, const cli_model *m, made *x)
{
    int status;
    x->backend = cli_backend(w->c, &status);
    if (!x->backend) return status;
    if (w->run) x->store = cli_store(w->c, m, x->backend, x->graph[0], &status);
    else x->store = fg_store_new(x->backend);
    if (x->store) cli_precision(w->c, x->store, x->backend);
    if (status) return status;
    for (int i = 0; i < 2 && x->graph[i]; i++) {
        x->plan[i] = x->store ? fg_plan_new(x->graph[i], x->store) : NULL;
        const fg_status e = x->plan[i] ? fg_plan_status(x->plan[i]) : FG_ERR_MEMORY;
        if (e)
            return cli_fail(w->c, cli_exit_of(e), "%s",
                            x->plan[i] ? fg_plan_message(x->plan[i]) : "out of memory");
    }
    return CLI_OK;
}

/* Tokens for a run that only measures: every id below the vocabulary, in a fixed disorder. */
static fg_status write_tokens(fg_plan *p, fg_tensor t, int64_t vocab)
{
    const int64_t n = fg_count(t);
    int32_t *ids = malloc((size_t)n * sizeof *ids);
    if (!ids) return FG_ERR_MEMORY;
    uint64_t state = 0x9e3779b97f4a7c15u;
    for (int64_t i = 0; i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        ids[i] = (int32_t)((state >> 33) % (uint64_t)(vocab > 0 ? vocab : 1));
    }
    const fg_status s = fg_write(p, t, ids, (size_t)n * sizeof *ids);
    free(ids);
    return s;
}

static fg_status write_inputs(const cli_model *m, fg_plan *p, const fg_graph *g, int64_t vocab)
{
    const char *const tokens[] = { "tokens", "labels" };
    const struct { const char *name; float value; } number[] = {
        { "lr", (float)m->recipe.lr }, { "step", 1 } };
    fg_status s = FG_OK;
    if (!m->model.build && m->model.feed && !fg_absent(fg_find(g, "loss")))
        s = m->model.feed(m->model.self, p, g, &m->recipe, 0, false);
    for (int i = 0; i < 2 && !s && m->model.build; i++)
        if (!fg_absent(fg_find(g, tokens[i]))) s = write_tokens(p, fg_find(g, tokens[i]), vocab);
    for (int i = 0; i < 2 && !s; i++)
        if (!fg_absent(fg_find(g, number[i].name)))
            s = fg_write(p, fg_find(g, number[i].name), &number[i].value, sizeof(float));
    return s;
}

/* One run to warm up, three that count; the values are those of the last. */
static int run_graphs(const cli_graph_wish *w, const cli_model *m, made *x)
{
    const int64_t vocab = cli_vocab(m);
    for (int turn = 0; turn < 4; turn++)
        for (int i = 0; i < 2 && x->plan[i]; i++) {
            fg_plan *p = x->plan[i];
            const unsigned what = FG_RECORD_TIMES | (w->values && turn == 3 ? FG_RECORD_VALUES
                                                     : 0u);
            fg_status s = turn ? FG_OK : write_inputs(m, p, x->graph[i], vocab);
            if (!s && turn) s = fg_plan_record(p, what);
            if (!s) s = fg_run(p);
            if (s) return cli_fail(w->c, cli_exit_of(s), "%s", fg_plan_message(p));
        }
    return CLI_OK;
}

static int build_graphs(const cli_graph_wish *w, const cli_model *m, made *x)
{
    const int64_t batch = m->recipe.micro_batch > 0 ? m->recipe.micro_batch : m->recipe.batch;
    if (w->pass != CLI_FORWARD)
        x->graph[0] = fg_model_training(&m->model, &m->recipe, &x->graph[1]);
    else if (m->model.build)
        x->graph[0] = fg_model_forward(&m->model, &m->recipe, batch, m->recipe.context);
    else x->graph[0] = fg_model_loss(&m->model, &m->recipe, batch, m->recipe.context);
    int errors = x->graph[0] ? CLI_OK : cli_fail(w->c, CLI_DEVICE, "out of memory");
    if (errors) return errors;
    errors = cli_check_graph(w->c, x->graph[0], "graph");
    if (!errors) errors = cli_check_settings(w->c, x->graph[0]);
    if (!errors && x->graph[1]) errors = cli_check_graph(w->c, x->graph[1], "update graph");
    return errors;
}

/* graph.json of a model.  A graph with errors is written as it was built; the errors decide the
 * exit status all the same. */
static int model_json(const cli_graph_wish *w, const char *path, cli_buffer *json)
{
    static const unsigned passes[] = { 7, 3, 4, 7 };
    cli_model m;
    made x = { 0 };
    int status = cli_open(w->c, path, &m);
    if (!status) {
        int errors = build_graphs(w, &m, &x);
        const bool planned = (w->stage == CLI_LOWERED || w->stage == CLI_PLANNED) && !errors;
        const bool write = x.graph[0] && (!errors || (errors == CLI_GRAPH && !(w->stage_given &&
                           (w->stage == CLI_LOWERED || w->stage == CLI_PLANNED))));
        if (planned) errors = plan_graphs(w, &m, &x);
        if (planned && !errors && w->run) errors = run_graphs(w, &m, &x);
        const fg_stage stage = !planned ? FG_STAGE_BUILT : w->stage == CLI_LOWERED
            ? FG_STAGE_LOWERED
                             : FG_STAGE_PLANNED;
        const fg_json_part parts[2] = { { x.graph[0], x.plan[0], stage },
                                        { x.graph[1], x.plan[1], stage } };
        const char *slash = strrchr(m.path, '/');
        const fg_json_options o = { slash && slash[1] ? slash + 1 : m.path, x.backend && !w->stable
                                    ? fg_backend_name(x.backend)
                                    : NULL, passes[w->pass], w->stable };
        fg_status e = FG_OK;
        if (write && (!planned || !errors))
            e = fg_graph_json(x.graph[1] ? 2 : 1, parts, &o, cli_add, json);
        status = e ? cli_fail(w->c, cli_exit_of(e), "%s", fg_status_text(e)) : errors;
    }
    unmake(&x);
    cli_close(&m);
    return status;
}

int cli_graph_json(const cli *c, const char *path, const cli_graph_wish *w, cli_buffer *json)
{
    return cli_is_graph(path) ? cli_read_file(c, path, json) : model_json(w, path, json);
}
