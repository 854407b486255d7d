/* cmd_dump.c - fox-graph dump: a model's graphs as graph.json, and every picture made from that. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "cli.h"
#include "cli_view.h"

enum { TEXT, DOT, SVG, JSON, HTML, FORMATS };
enum { BUILT, GRADIENT, LOWERED, PLANNED };
enum { FORWARD, TRAIN, OPT, ALL };

typedef struct {
    const cli *c;
    int        format, stage, pass;
    bool       stage_given, run, values, stable;
    fg_view_options view;
    char       focus[300];
    const char *profile;
} wish;

/* The place of an option's value in a list of words; `otherwise` if the option is not given, -1 if
 * the value is none of them. */
static int choice(const cli *c, int option, int n, const char *const *words, int otherwise)
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

/* PATH or PATH:RADIUS */
static bool read_focus(const cli *c, wish *w)
{
    const char *text = cli_text(c, OPT_focus);
    if (!text) return true;
    snprintf(w->focus, sizeof w->focus, "%s", text);
    char *colon = strrchr(w->focus, ':'), *end;
    if (colon) {
        const long radius = strtol(colon + 1, &end, 10);
        if (end == colon + 1 || *end || radius < 0 || radius > 100) {
            cli_fail(c, CLI_USAGE, "--focus is PATH or PATH:RADIUS with a radius from 0 to 100, "
                     "not '%s'", text);
            return false;
        }
        *colon = 0;
        w->view.radius = (int)radius;
    }
    w->view.focus = w->focus;
    return true;
}

static bool read_wish(const cli *c, wish *w)
{
    static const char *const formats[] = { "text", "dot", "svg", "json", "html" };
    static const char *const stages[] = { "built", "gradient", "lowered", "planned" };
    static const char *const passes[] = { "forward", "train", "opt", "all" };
    static const char *const values[] = { "stats" };
    const char *heats[FG_HEAT_COUNT];
    int64_t depth = -1;
    for (int i = 0; i < FG_HEAT_COUNT; i++) heats[i] = fg_heat_name((fg_heat)i);
    *w = (wish){ .c = c };
    w->format = choice(c, OPT_format, FORMATS, formats, c->json ? JSON : TEXT);
    w->stage = choice(c, OPT_stage, 4, stages, BUILT);
    w->pass = choice(c, OPT_pass, 4, passes, w->format == HTML || w->stage == GRADIENT ? ALL
                                             : FORWARD);
    const int heat = choice(c, OPT_heat, FG_HEAT_COUNT, heats, 0);
    const int stats = choice(c, OPT_values, 1, values, -2);
    if (w->format < 0 || w->stage < 0 || w->pass < 0 || heat < 0 || stats == -1) return false;
    if (!cli_int(c, OPT_depth, 0, 1000, &depth) || !read_focus(c, w)) return false;
    w->stage_given = cli_has(c, OPT_stage);
    w->stable = cli_has(c, OPT_stable);
    w->profile = cli_text(c, OPT_profile);
    w->values = stats == 0 || heat == FG_HEAT_ABSMAX || heat == FG_HEAT_GRADNORM;
    w->run = w->values || (heat == FG_HEAT_TIME && !w->profile);
    w->view.heat = (fg_heat)heat;
    w->view.depth = (int)depth;
    w->view.memory = cli_has(c, OPT_memory) || w->format == HTML;
    const bool plan = cli_has(c, OPT_memory) || w->run || w->profile || w->format == HTML;
    if (!w->stage_given && plan) w->stage = PLANNED;
    return true;
}

/* What contradicts itself. */
static int check_wish(const cli *c, const wish *w, bool file)
{
    if (w->stage == GRADIENT && w->pass == FORWARD)
        return cli_fail(c, CLI_USAGE, "--stage gradient has nothing to do with --pass forward");
    if (w->stage != PLANNED && w->run && !file)
        return cli_fail(c, CLI_USAGE, "what a run measures needs --stage planned");
    if (w->stage != PLANNED && cli_has(c, OPT_memory) && !file)
        return cli_fail(c, CLI_USAGE, "--memory needs --stage planned");
    if (w->stable && w->run)
        return cli_fail(c, CLI_USAGE, "--stable leaves out what a run measures");
    if (w->profile && w->format == JSON)
        return cli_fail(c, CLI_USAGE, "--profile is for pictures; its graph.json has the times");
    return CLI_OK;
}

/* ---- a model's graphs ------------------------------------------------------------------------- */

typedef struct { fg_graph *graph[2]; fg_plan *plan[2]; fg_store *store; fg_backend *backend; } made;

static void unmake(made *x)
{
    for (int i = 0; i < 2; i++) fg_plan_free(x->plan[i]);
    fg_store_free(x->store);
    fg_backend_close(x->backend);
    for (int i = 0; i < 2; i++) fg_graph_free(x->graph[i]);
}

static int plan_graphs(const wish *w, const cli_model *m, made *x)
{
    int status;
    x->backend = cli_backend(w->c, &status);
    if (!x->backend) return status;
    if (w->run) x->store = cli_store(w->c, m, x->backend, x->graph[0], &status);
    else x->store = fg_store_new(x->backend);
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
static int run_graphs(const wish *w, const cli_model *m, made *x)
{
    const int64_t vocab = cli_vocab(m);
    for (int turn = 0; turn < 4; turn++)
        for (int i = 0; i < 2 && x->plan[i]; i++) {
            fg_plan *p = x->plan[i];
            const unsigned what = FG_RECORD_TIMES | (w->values && turn == 3 ? FG_RECORD_VALUES : 0u);
            fg_status s = turn ? FG_OK : write_inputs(m, p, x->graph[i], vocab);
            if (!s && turn) s = fg_plan_record(p, what);
            if (!s) s = fg_run(p);
            if (s) return cli_fail(w->c, cli_exit_of(s), "%s", fg_plan_message(p));
        }
    return CLI_OK;
}

static int build_graphs(const wish *w, const cli_model *m, made *x)
{
    const int64_t batch = m->recipe.micro_batch > 0 ? m->recipe.micro_batch : m->recipe.batch;
    if (w->pass != FORWARD) x->graph[0] = fg_model_training(&m->model, &m->recipe, &x->graph[1]);
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
static int model_json(const wish *w, const char *path, cli_buffer *json)
{
    static const unsigned passes[] = { 7, 3, 4, 7 };
    cli_model m;
    made x = { 0 };
    int status = cli_open(w->c, path, &m);
    if (!status) {
        int errors = build_graphs(w, &m, &x);
        const bool planned = (w->stage == LOWERED || w->stage == PLANNED) && !errors;
        const bool write = x.graph[0] && (!errors || (errors == CLI_GRAPH && !(w->stage_given &&
                           (w->stage == LOWERED || w->stage == PLANNED))));
        if (planned) errors = plan_graphs(w, &m, &x);
        if (planned && !errors && w->run) errors = run_graphs(w, &m, &x);
        const fg_stage stage = !planned ? FG_STAGE_BUILT : w->stage == LOWERED ? FG_STAGE_LOWERED
                             : FG_STAGE_PLANNED;
        const fg_json_part parts[2] = { { x.graph[0], x.plan[0], stage },
                                        { x.graph[1], x.plan[1], stage } };
        const fg_json_options o = { m.path, x.backend && !w->stable ? fg_backend_name(x.backend)
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

/* ---- output ----------------------------------------------------------------------------------- */

static int take_profile(const wish *w, fg_view *v)
{
    char message[400], path[1100];
    struct stat st;
    fg_view *run = NULL;
    snprintf(path, sizeof path, "%s", w->profile);
    if (!stat(path, &st) && S_ISDIR(st.st_mode))
        snprintf(path, sizeof path, "%.1000s/graph.json", w->profile);
    int status = cli_read_view(w->c, path, &run);
    if (!status && fg_view_take_times(v, run, message))
        status = cli_fail(w->c, CLI_USAGE, "--profile %s: %s", w->profile, message);
    fg_view_free(run);
    return status;
}

static int write_view(const wish *w, const cli_buffer *json, FILE *to)
{
    fg_view *v = NULL;
    char message[400];
    if (w->format == JSON) {
        fputs(json->text, to);
        return CLI_OK;
    }
    fg_status s = fg_view_read(json->text, json->n, &v, message);
    if (s) return cli_fail(w->c, cli_exit_of(s), "%s", message);
    int status = w->profile ? take_profile(w, v) : CLI_OK;
    if (!status && fg_view_check(v, &w->view, message))
        status = cli_fail(w->c, CLI_USAGE, "%s", message);
    if (!status) {
        s = w->format == TEXT ? fg_view_text(v, &w->view, cli_put, to)
          : w->format == DOT ? fg_view_dot(v, &w->view, cli_put, to)
          : w->format == SVG ? fg_view_svg(v, &w->view, cli_put, to)
          : fg_view_html(v, &w->view, cli_put, to);
        if (s) status = cli_fail(w->c, cli_exit_of(s), "%s", fg_status_text(s));
    }
    fg_view_free(v);
    return status;
}

static int write_to(const wish *w, const cli_buffer *json)
{
    const char *path = cli_text(w->c, OPT_dump_out);
    if (!path || !strcmp(path, "-")) {
        const int status = write_view(w, json, stdout);
        return status ? status : cli_flush(w->c);
    }
    FILE *to = fopen(path, "w");
    if (!to) return cli_fail(w->c, CLI_FILE, "%s cannot be written: %s", path, strerror(errno));
    int status = write_view(w, json, to);
    const bool bad = ferror(to);
    if (fclose(to) || bad)
        status = cli_fail(w->c, CLI_FILE, "%s cannot be written: %s", path, strerror(errno));
    return status;
}

int cmd_dump(const cli *c)
{
    wish w;
    cli_buffer json = { 0 };
    const char *path = c->args[0];
    const bool file = cli_is_graph(path);
    if (!read_wish(c, &w)) return CLI_USAGE;
    int status = check_wish(c, &w, file);
    if (!status) status = file ? cli_read_file(c, path, &json) : model_json(&w, path, &json);
    if (!status && json.failed) status = cli_fail(c, CLI_DEVICE, "out of memory");
    if (json.n && !json.failed) {
        const int written = write_to(&w, &json);
        if (!status) status = written;
    }
    free(json.text);
    return status;
}
