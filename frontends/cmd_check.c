/* cmd_check.c - fox-graph check: every problem of a model's graphs at once, without computing. */
#include "cli.h"

static double count_parameters(const fg_graph *g)
{
    fg_param_info p;
    double n = 0;
    for (int i = 0; fg_param_at(g, i, &p); i++) n += (double)fg_shape_count(p.shape);
    return n;
}

static json_t *errors_of(const fg_graph *g)
{
    json_t *list = json_array();
    for (int i = 0; g && i < fg_graph_errors(g); i++)
        json_array_append_new(list, cli_json_text(fg_graph_error(g, i)));
    return list;
}

/* A graph's errors on stderr, or as JSON on stdout. */
static int judge(const cli *c, const fg_graph *g, const char *what)
{
    if (!c->json || !g || !fg_graph_status(g)) return cli_check_graph(c, g, what);
    int status = cli_print_json(
        c, json_pack("{s:b, s:s, s:o}", "ok", 0, "graph", what, "errors", errors_of(g)));
    return status ? status : cli_exit_of(fg_graph_status(g));
}

static int check_training(const cli *c, const cli_model *m)
{
    char message[FG_MESSAGE] = "";
    fg_graph *update = NULL;
    if (fg_recipe_check(&m->recipe, message)) return cli_fail(c, CLI_USAGE, "%s", message);
    fg_graph *g = fg_model_training(&m->model, &m->recipe, &update);
    int status = judge(c, g, "training graph");
    if (!status && update) status = judge(c, update, "update graph");
    if (!status) status = cli_check_trained(c, m, g);
    fg_graph_free(update);
    fg_graph_free(g);
    return status;
}

int cmd_check(const cli *c)
{
    cli_model m;
    char count[32];
    int status = cli_open(c, c->args[0], &m);
    fg_graph *g = NULL;
    const int64_t batch = m.recipe.micro_batch > 0 ? m.recipe.micro_batch : m.recipe.batch;
    if (!status) {
        g = m.model.build ? fg_model_forward(&m.model, &m.recipe, batch, m.recipe.context)
                          : fg_model_loss(&m.model, &m.recipe, batch, m.recipe.context);
        status = judge(c, g, "forward graph");
    }
    if (!status) status = cli_check_settings(c, g);
    if (!status) status = check_training(c, &m);
    if (!status && c->json)
        status = cli_print_json(c, json_pack("{s:b, s:i, s:f, s:[]}", "ok", 1, "tensors",
                                             fg_param_count(g), "parameters", count_parameters(g),
                                             "errors"));
    else if (!status)
        printf("%s: no problems; %s parameters in %d tensors\n", m.path,
               cli_amount(count, count_parameters(g)), fg_param_count(g));
    fg_graph_free(g);
    cli_close(&m);
    return status;
}
