/* cmd_dump.c - fox-graph dump: a graph as text, DOT or JSON, at one of three stages. */
#include <errno.h>
#include <string.h>
#include <unistd.h>
#include "cli.h"

/* The place of an option's value in a list of words; `otherwise` if the option is not given, -1 if
 * the value is none of them. */
static int choice(const cli *c, int option, int n, const char *const *words, int otherwise)
{
    const char *text = cli_text(c, option);
    if (!text) return otherwise;
    for (int i = 0; i < n; i++) if (!strcmp(text, words[i])) return i;
    cli_fail(c, CLI_USAGE, "--%s is %s%s%s%s%s, not '%s'", cli_options[option].name, words[0],
             n > 2 ? ", " : " or ", words[1], n > 2 ? " or " : "", n > 2 ? words[2] : "", text);
    return -1;
}

/* Lowers and plans g on the device; nothing is run. */
static int dump_plan(const cli *c, const fg_graph *g, fg_stage stage, fg_dump_format format,
                     FILE *to)
{
    int status;
    fg_backend *b = cli_backend(c, &status);
    if (status) return status;
    fg_store *s = fg_store_new(b);
    cli_precision(c, s, b);
    fg_plan *p = s ? fg_plan_new(g, s) : NULL;
    fg_status e = p ? fg_plan_status(p) : FG_ERR_MEMORY;
    if (!e) e = fg_plan_dump(p, stage, format, cli_put, to);
    if (e) status = cli_fail(c, cli_exit_of(e), "%s", p ? fg_plan_message(p) : "out of memory");
    fg_plan_free(p);
    fg_store_free(s);
    fg_backend_close(b);
    return status;
}

/* A graph with errors can be dumped as it was built; the errors decide the exit status all the
 * same. */
static int dump(const cli *c, const fg_graph *g, fg_stage stage, fg_dump_format format, FILE *to)
{
    int errors = g ? CLI_OK : cli_fail(c, CLI_DEVICE, "out of memory");
    if (errors) return errors;
    errors = cli_check_graph(c, g, "graph");
    if (!errors) errors = cli_check_settings(c, g);
    if (!errors && stage != FG_STAGE_BUILT) return dump_plan(c, g, stage, format, to);
    if (stage != FG_STAGE_BUILT) return errors;
    fg_status e = fg_graph_dump(g, format, cli_put, to);
    if (e && !errors) return cli_fail(c, cli_exit_of(e), "%s", fg_status_text(e));
    return errors;
}

static int dump_to_file(const cli *c, const fg_graph *g, fg_stage stage, fg_dump_format format)
{
    const char *path = cli_text(c, OPT_dump_out);
    if (!path || !strcmp(path, "-")) return dump(c, g, stage, format, stdout);
    FILE *to = fopen(path, "w");
    if (!to) return cli_fail(c, CLI_FILE, "%s cannot be written: %s", path, strerror(errno));
    int status = dump(c, g, stage, format, to);
    bool bad = ferror(to);
    if (fclose(to) || bad)
        status = cli_fail(c, CLI_FILE, "%s cannot be written: %s", path, strerror(errno));
    return status;
}

int cmd_dump(const cli *c)
{
    static const char *const formats[] = { "text", "dot", "json" };
    static const char *const stages[] = { "built", "lowered", "planned" };
    static const char *const passes[] = { "forward", "train" };
    const int format = choice(c, OPT_format, 3, formats, c->json ? FG_DUMP_JSON : FG_DUMP_TEXT);
    const int stage = choice(c, OPT_stage, 3, stages, FG_STAGE_BUILT);
    const int pass = choice(c, OPT_pass, 2, passes, 0);
    cli_model m;
    if (format < 0 || stage < 0 || pass < 0) return CLI_USAGE;
    int status = cli_open(c, c->args[0], &m);
    if (!status) {
        const int64_t batch = m.recipe.micro_batch > 0 ? m.recipe.micro_batch : m.recipe.batch;
        fg_graph *update = NULL;
        fg_graph *g = pass ? fg_model_training(&m.model, &m.recipe, &update)
                    : m.model.build ? fg_model_forward(&m.model, &m.recipe, batch, m.recipe.context)
                    : fg_model_loss(&m.model, &m.recipe, batch, m.recipe.context);
        status = dump_to_file(c, g, (fg_stage)stage, (fg_dump_format)format);
        fg_graph_free(update);
        fg_graph_free(g);
    }
    cli_close(&m);
    return status;
}
