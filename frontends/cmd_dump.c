/* cmd_dump.c - fox-graph dump: a model's graphs as graph.json, and every picture made from that. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "cli_view.h"

enum { TEXT, DOT, SVG, JSON, HTML, FORMATS };

typedef struct {
    const cli *c;
    int        format;
    cli_graph_wish graph;
    fg_view_options view;
    char       focus[300];
    const char *profile;
} wish;

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
    static const char *const values[] = { "stats" };
    const char *heats[FG_HEAT_COUNT];
    int64_t depth = -1;
    for (int i = 0; i < FG_HEAT_COUNT; i++) heats[i] = fg_heat_name((fg_heat)i);
    *w = (wish){ .c = c };
    w->format = cli_choice(c, OPT_format, FORMATS, formats, c->json ? JSON : TEXT);
    const int heat = cli_choice(c, OPT_heat, FG_HEAT_COUNT, heats, 0);
    const int stats = cli_choice(c, OPT_values, 1, values, -2);
    if (w->format < 0 || heat < 0 || stats == -1) return false;
    if (!cli_read_graph_wish(c, w->format == HTML, &w->graph)) return false;
    if (!cli_int(c, OPT_depth, 0, 1000, &depth) || !read_focus(c, w)) return false;
    w->graph.stable = cli_has(c, OPT_stable);
    w->profile = cli_text(c, OPT_profile);
    w->graph.values = stats == 0 || heat == FG_HEAT_ABSMAX || heat == FG_HEAT_GRADNORM;
    w->graph.run = w->graph.values || (heat == FG_HEAT_TIME && !w->profile);
    w->view.heat = (fg_heat)heat;
    w->view.depth = (int)depth;
    w->view.memory = cli_has(c, OPT_memory);
    const bool plan = cli_has(c, OPT_memory) || w->graph.run || w->profile || w->format == HTML;
    if (!w->graph.stage_given && plan) w->graph.stage = CLI_PLANNED;
    return true;
}

/* What contradicts itself. */
static int check_wish(const cli *c, const wish *w, bool file)
{
    if (file && (cli_has(c, OPT_stage) || cli_has(c, OPT_pass)))
        return cli_fail(c, CLI_USAGE, "--stage and --pass say what to make of a model; %s is made",
                        c->args[0]);
    if (file && cli_has(c, OPT_values))
        return cli_fail(c, CLI_USAGE, "--values needs a model to run; %s is only its graph",
                        c->args[0]);
    if (w->graph.stage != CLI_PLANNED && w->graph.run && !file)
        return cli_fail(c, CLI_USAGE, "what a run measures needs --stage planned");
    if (w->graph.stage != CLI_PLANNED && cli_has(c, OPT_memory) && !file)
        return cli_fail(c, CLI_USAGE, "--memory needs --stage planned");
    if (w->graph.stable && w->graph.run)
        return cli_fail(c, CLI_USAGE, "--stable leaves out what a run measures");
    if (w->profile && w->format == JSON)
        return cli_fail(c, CLI_USAGE, "--profile is for pictures; its graph.json has the times");
    return CLI_OK;
}

/* ---- output ---------------------------------------------------------------------------------- */

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
    if (s) return cli_fail(w->c, cli_exit_of(s), "%s: %s", w->c->args[0], message);
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
    if (!status) status = cli_graph_json(c, path, &w.graph, &json);
    if (!status && json.failed) status = cli_fail(c, CLI_DEVICE, "out of memory");
    if (json.n && !json.failed) {
        const int written = write_to(&w, &json);
        if (!status) status = written;
    }
    free(json.text);
    return status;
}
