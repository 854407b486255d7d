/* cmd_info.c - fox-graph info: what a model is and what it costs, from its graphs alone. */
#include <string.h>
#include "cli.h"

typedef struct {
    double parameters, embedding, frozen, decayed;
    int    tensors;
    fg_plan_info forward, training;      /* of one micro batch */
    double update_flops;                 /* of the graph that applies several micro batches */
    double tokens;                       /* in one micro batch */
    const char *no_cuda;                 /* why there is none; NULL: there is */
    char   no_cuda_text[300], device[64], gpu[128];
    int    threads;
} facts;

static const char *init_name(fg_init i, char buffer[96])
{
    switch (i.kind) {
    case FG_ZEROS:        return "zeros";
    case FG_ONES:         return "ones";
    case FG_CONSTANT:     snprintf(buffer, 96, "constant %g", i.a); break;
    case FG_NORMAL:       snprintf(buffer, 96, "normal %g", i.a); break;
    case FG_UNIFORM:      snprintf(buffer, 96, "uniform %g", i.a); break;
    case FG_LOG_RANGE:    return "log(1 + index)";
    case FG_INV_SOFTPLUS: snprintf(buffer, 96, "inverse softplus %g..%g", i.a, i.b); break;
    case FG_LOG_DECAY:    snprintf(buffer, 96, "time constants %g..%g", i.a, i.b); break;
    }
    return buffer;
}

static const char *group_of(fg_init i)
{
    return i.frozen ? "frozen" : i.no_decay ? "no decay" : "decay";
}

/* A table with one row for each token: the embedding, and the head where it is one of its own. */
static bool is_table(const fg_param_info *p, int64_t vocab)
{
    return p->shape.rank == 2 && vocab > 0 && p->shape.dim[0] == vocab &&
           (strstr(p->name, "embed") || strstr(p->name, "head"));
}

static void count(const fg_graph *g, facts *f)
{
    const int64_t vocab = fg_dim(fg_find(g, "logits"), -1);
    fg_param_info p;
    for (int i = 0; fg_param_at(g, i, &p); i++) {
        const double n = (double)fg_shape_count(p.shape);
        f->parameters += n;
        f->tensors++;
        if (is_table(&p, vocab)) f->embedding += n;
        if (p.init.frozen) f->frozen += n;
        else if (!p.init.no_decay) f->decayed += n;
    }
}

static int plan(const cli *c, const fg_graph *g, fg_store *s, fg_plan_info *info)
{
    fg_plan *p = fg_plan_new(g, s);
    fg_status e = p ? fg_plan_status(p) : FG_ERR_MEMORY;
    int status = e ? cli_fail(c, cli_exit_of(e), "%s", p ? fg_plan_message(p) : "out of memory")
                   : CLI_OK;
    if (!e) *info = fg_plan_describe(p);
    fg_plan_free(p);
    return status;
}

static void look_for_cuda(facts *f)
{
    fg_backend *b = fg_backend_open("cuda", 0);
    const bool there = b && !fg_backend_status(b);
    snprintf(f->no_cuda_text, sizeof f->no_cuda_text, "%s",
             b ? fg_backend_message(b) : "out of memory");
    f->no_cuda = there ? NULL : f->no_cuda_text;
    if (there) snprintf(f->gpu, sizeof f->gpu, "%s", fg_backend_device(b));
    fg_backend_close(b);
}

static int gather(const cli *c, const cli_model *m, const fg_graph *forward, facts *f)
{
    int status;
    fg_graph *update = NULL;
    fg_graph *training = cli_training(c, m, &update, &status);
    fg_backend *b = training ? cli_backend(c, &status) : NULL;
    fg_store *s = b ? fg_store_new(b) : NULL;
    fg_plan_info updating = { 0 };
    if (s) cli_precision(c, s, b);
    if (b && !s) status = cli_fail(c, CLI_DEVICE, "out of memory");
    if (!status) status = plan(c, forward, s, &f->forward);
    if (!status) status = plan(c, training, s, &f->training);
    if (!status && update) status = plan(c, update, s, &updating);
    f->update_flops = updating.flops;
    if (!status) snprintf(f->device, sizeof f->device, "%s", fg_backend_name(b));
    f->threads = b ? fg_backend_threads(b) : 0;
    fg_store_free(s);
    fg_backend_close(b);
    fg_graph_free(update);
    fg_graph_free(training);
    count(forward, f);
    look_for_cuda(f);
    return status;
}

static json_t *params_json(const fg_graph *g)
{
    json_t *list = json_array();
    fg_param_info p;
    char buffer[96];
    for (int i = 0; fg_param_at(g, i, &p); i++) {
        json_t *shape = json_array();
        for (int k = 0; k < p.shape.rank; k++)
            json_array_append_new(shape, json_integer(p.shape.dim[k]));
        json_array_append_new(list, json_pack("{s:o, s:o, s:s, s:s, s:s}",
                                              "name", cli_json_text(p.name),
                                              "shape", shape,
                                              "dtype", "f32",
                                              "init", init_name(p.init, buffer),
                                              "group", group_of(p.init)));
    }
    return list;
}

static json_t *config_json(const cli_model *m)
{
    json_t *object = json_object();
    char value[1200];
    const char *key;
    for (int i = 0; i < CLI_MAX_KEYS && (key = fg_recipe_key(i)); i++) {
        fg_recipe_get(&m->recipe, key, value, sizeof value);
        json_object_set_new(object, key,
                            json_pack("{s:o, s:s}", "value", cli_json_text(value), "origin",
                                      cli_origin_name(m->recipe_origin[i])));
    }
    for (int i = 0; i < m->model.n_settings; i++)
        json_object_set_new(object, m->settings[i].key,
                            json_pack("{s:o, s:s}", "value", cli_json_text(m->settings[i].value),
                                      "origin", cli_origin_name(m->setting_origin[i])));
    return object;
}

static int print_json(const cli *c, const cli_model *m, const fg_graph *g, const facts *f)
{
    json_t *o = json_pack("{s:o, s:f, s:f, s:f, s:i, s:o, s:o, s:o, s:o, s:s, s:i, s:o}",
                          "model", cli_json_text(m->path),
                          "parameters", f->parameters,
                          "non_embedding", f->parameters - f->embedding,
                          "frozen", f->frozen,
                          "tensors", f->tensors,
                          "forward_flops_per_token", cli_json_real(f->forward.flops / f->tokens),
                          "training_flops_per_token", cli_json_real(f->training.flops / f->tokens),
                          "forward", cli_plan_json(&f->forward),
                          "training", cli_plan_json(&f->training),
                          "device", f->device,
                          "threads", f->threads,
                          "no_cuda", f->no_cuda ? cli_json_text(f->no_cuda) : json_null());
    if (o && cli_has(c, OPT_params)) json_object_set_new(o, "params", params_json(g));
    if (o && cli_has(c, OPT_show_config)) json_object_set_new(o, "config", config_json(m));
    return cli_print_json(c, o);
}

static void print_params(const fg_graph *g)
{
    fg_param_info p;
    char shape[128], init[96];
    for (int i = 0; fg_param_at(g, i, &p); i++)
        printf("%-56s %-16s f32  %-24s %s\n", p.name, cli_shape(shape, p.shape),
               init_name(p.init, init), group_of(p.init));
}

static void print_config(const cli_model *m)
{
    char value[1200];
    const char *key;
    for (int i = 0; i < CLI_MAX_KEYS && (key = fg_recipe_key(i)); i++) {
        fg_recipe_get(&m->recipe, key, value, sizeof value);
        printf("%-16s %-24s %s\n", key, value, cli_origin_name(m->recipe_origin[i]));
    }
    for (int i = 0; i < m->model.n_settings; i++)
        printf("%-16s %-24s %s\n", m->settings[i].key, m->settings[i].value,
               cli_origin_name(m->setting_origin[i]));
}

static void print_text(const cli *c, const cli_model *m, const fg_graph *g, const facts *f)
{
    char a[32], b[32];
    printf("%s\n", m->path);
    printf("  parameters                 %12s in %d tensors, %s without embedding and head\n",
           cli_amount(a, f->parameters), f->tensors, cli_amount(b, f->parameters - f->embedding));
    printf("  forward                    %12s floating-point operations a token\n",
           cli_amount(a, f->forward.flops / f->tokens));
    printf("  training                   %12s floating-point operations a token\n",
           cli_amount(a, f->training.flops / f->tokens));
    if (f->training.again_flops > 0)
        printf("    of these, done again     %12s, to keep less for the backward pass\n",
               cli_amount(a, f->training.again_flops / f->tokens));
    printf("  nodes                      %12lld forward, %lld training\n",
           (long long)f->forward.nodes, (long long)f->training.nodes);
    printf("memory of training, %s tokens a run\n", cli_amount(a, f->tokens));
    cli_print_plan(stdout, &f->training);
    printf("device\n  %s, %d threads\n  %s%s\n", f->device, f->threads,
           f->no_cuda ? "" : "CUDA: ", f->no_cuda ? f->no_cuda : f->gpu);
    if (cli_has(c, OPT_params)) {
        printf("\n");
        print_params(g);
    }
    if (cli_has(c, OPT_show_config)) {
        printf("\n");
        print_config(m);
    }
}

int cmd_info(const cli *c)
{
    cli_model m;
    facts f = { 0 };
    int status = cli_open(c, c->args[0], &m);
    const int64_t batch = m.recipe.micro_batch > 0 ? m.recipe.micro_batch : m.recipe.batch;
    f.tokens = (double)(batch * m.recipe.context);
    fg_graph *g = status ? NULL : cli_forward(c, &m, batch, m.recipe.context, &status);
    if (g) status = gather(c, &m, g, &f);
    if (!status && c->json) status = print_json(c, &m, g, &f);
    else if (!status) print_text(c, &m, g, &f);
    fg_graph_free(g);
    cli_close(&m);
    return status;
}
