/* cmd_logits.c - fox-graph logits: a checkpoint's logits, loss of every token and gradients, in
 * f32.
 *
 * Gradients are those of the mean loss over all labels that are not -100, as the usual training
 * code has it; so they can be laid beside another implementation's. */
#include <stdlib.h>
#include <string.h>
#include "cli.h"

typedef struct {
    fg_shape shape;                      /* of the tokens: [B,T] */
    int32_t *tokens, *labels;            /* labels NULL: not in the file */
    int64_t  counted;                    /* labels that are not -100 */
} token_file;

typedef struct {
    fg_graph *graph;
    fg_tensor tokens, labels, logits, losses, *grad;
    int n_grad;
} work;

static int read_ids(const cli *c, fg_file *f, const char *name, fg_shape *shape, int32_t **ids)
{
    const char *path = cli_text(c, OPT_token_file);
    char text[128];
    fg_file_entry e;
    if (!fg_file_find(f, name, &e)) return cli_fail(c, CLI_FILE, "%s holds no %s", path, name);
    if (e.shape.rank != 2 || !fg_shape_count(e.shape))
        return cli_fail(c, CLI_FILE, "%s: %s must be [B,T], it is %s", path, name,
                        cli_shape(text, e.shape));
    if (shape->rank && !fg_shape_equal(*shape, e.shape))
        return cli_fail(c, CLI_FILE, "%s: labels must have input_ids' shape, they are %s", path,
                        cli_shape(text, e.shape));
    *shape = e.shape;
    const size_t bytes = (size_t)fg_shape_count(e.shape) * sizeof **ids;
    *ids = malloc(bytes);
    if (!*ids) return cli_fail(c, CLI_DEVICE, "out of memory");
    fg_status s = fg_file_read(f, name, FG_I32, *ids, bytes);
    return s ? cli_fail(c, cli_exit_of(s), "%s: %s", path, fg_file_message(f)) : CLI_OK;
}

static int read_tokens(const cli *c, token_file *t)
{
    const char *path = cli_text(c, OPT_token_file);
    fg_file_entry e;
    if (!path) return cli_fail(c, CLI_USAGE, "logits needs --tokens FILE");
    if (!cli_text(c, OPT_logits_out)) return cli_fail(c, CLI_USAGE, "logits needs --out FILE");
    fg_file *f = fg_file_open(path);
    if (!f || fg_file_status(f)) {
        int status = cli_fail(c, f ? cli_exit_of(fg_file_status(f)) : CLI_DEVICE, "%s",
                              f ? fg_file_message(f) : "out of memory");
        fg_file_close(f);
        return status;
    }
    int status = read_ids(c, f, "input_ids", &t->shape, &t->tokens);
    if (!status && fg_file_find(f, "labels", &e))
        status = read_ids(c, f, "labels", &t->shape, &t->labels);
    for (int64_t i = 0; !status && t->labels && i < fg_shape_count(t->shape); i++)
        t->counted += t->labels[i] != -100;
    if (!status && cli_has(c, OPT_grad) && !t->labels)
        status = cli_fail(c, CLI_FILE, "%s holds no labels, which --grad needs", path);
    if (!status && cli_has(c, OPT_grad) && !t->counted)
        status = cli_fail(c, CLI_FILE, "%s: every label is -100, there is no loss to differentiate",
                          path);
    fg_file_close(f);
    return status;
}

/* Token ids outside the model's table would fail in the middle of the run; say it before. */
static int check_range(const cli *c, const char *name, const int32_t *ids, int64_t n, int64_t vocab,
                       bool ignored)
{
    for (int64_t i = 0; ids && i < n; i++)
        if (!(ids[i] >= 0 && ids[i] < vocab) && !(ignored && ids[i] == -100))
            return cli_fail(c, CLI_FILE, "%s: %s[%lld] is %d, the model knows 0 to %lld",
                            cli_text(c, OPT_token_file), name, (long long)i, ids[i],
                            (long long)vocab - 1);
    return CLI_OK;
}

/* Gradients of the mean loss for every parameter that is trained. */
static void build_gradients(work *w, int64_t counted)
{
    fg_tensor total = fg_sum(w->losses);
    fg_tensor mean = fg_scale(total, 1.0 / (double)counted, 0);
    const int n = fg_param_count(w->graph);
    fg_tensor *wrt = calloc((size_t)n + 1, sizeof *wrt);
    w->grad = calloc((size_t)n + 1, sizeof *w->grad);
    fg_param_info p;
    for (int i = 0; wrt && w->grad && fg_param_at(w->graph, i, &p); i++)
        if (!p.init.frozen) wrt[w->n_grad++] = p.tensor;
    if (wrt && w->grad) fg_grad(mean, w->n_grad, wrt, w->grad);
    for (int i = 0; w->grad && i < w->n_grad; i++)
        if (!fg_absent(w->grad[i]))
            w->grad[i] = fg_output(w->grad[i], fg_name(w->graph, "grad.%d", i));
    free(wrt);
}

static int build(const cli *c, const cli_model *m, const token_file *t, work *w)
{
    if (!m->model.build)
        return cli_fail(c, CLI_USAGE, "%s is not a language model: it has no logits", m->path);
    w->graph = fg_graph_new();
    if (!w->graph) return cli_fail(c, CLI_DEVICE, "out of memory");
    for (int i = 0; i < m->model.n_settings; i++)
        fg_graph_set(w->graph, m->settings[i].key, m->settings[i].value);
    w->tokens = fg_input(w->graph, "tokens", FG_I32, t->shape);
    w->logits = m->model.build(m->model.self, w->tokens);
    w->logits = fg_output(w->logits, "logits");
    if (t->labels) {
        w->labels = fg_input(w->graph, "labels", FG_I32, t->shape);
        w->losses = fg_cross_entropy(w->logits, w->labels);
        w->losses = fg_output(w->losses, "loss");
        if (cli_has(c, OPT_grad)) build_gradients(w, t->counted);
    }
    int status = cli_check_graph(c, w->graph, "graph");
    if (!status) status = cli_check_settings(c, w->graph);
    const int64_t n = fg_shape_count(t->shape), vocab = fg_dim(w->logits, -1);
    if (!status) status = check_range(c, "input_ids", t->tokens, n, vocab, false);
    return status ? status : check_range(c, "labels", t->labels, n, vocab, true);
}

/* The trained parameter behind the i-th gradient. */
static fg_param_info trained(const fg_graph *g, int i)
{
    fg_param_info p;
    for (int k = 0; fg_param_at(g, k, &p); k++) if (!p.init.frozen && i-- == 0) break;
    return p;
}

/* One output as an array to write; zeros where the loss does not depend on a parameter. */
static fg_status take(fg_plan *p, fg_tensor t, fg_shape shape, const char *name, fg_array *a)
{
    const size_t bytes = (size_t)fg_shape_count(shape) * sizeof(float);
    float *data = calloc(1, bytes ? bytes : 1);
    if (!data) return FG_ERR_MEMORY;
    *a = (fg_array){ name, FG_F32, shape, data };
    return fg_absent(t) ? FG_OK : fg_read(p, t, data, bytes);
}

static int write_results(const cli *c, fg_plan *p, const work *w)
{
    fg_array *arrays = calloc((size_t)w->n_grad + 2, sizeof *arrays);
    char message[400] = "";
    int n = 0;
    fg_status s = arrays ? take(p, w->logits, fg_shape_of(w->logits), "logits", &arrays[n++])
                         : FG_ERR_MEMORY;
    if (!s && !fg_absent(w->losses))
        s = take(p, w->losses, fg_shape_of(w->losses), "loss", &arrays[n++]);
    for (int i = 0; !s && i < w->n_grad; i++) {
        fg_param_info info = trained(w->graph, i);
        s = take(p, w->grad[i], info.shape, fg_name(w->graph, "grad.%s", info.name), &arrays[n++]);
    }
    int status = s ? cli_fail(c, cli_exit_of(s), "%s", fg_plan_message(p)) : CLI_OK;
    if (!s) s = fg_file_write(cli_text(c, OPT_logits_out), n, arrays, message);
    if (!status && s) status = cli_fail(c, cli_exit_of(s), "%s", message);
    if (!status) cli_note(c, "wrote %d tensors to %s", n, cli_text(c, OPT_logits_out));
    for (int i = 0; arrays && i < n; i++) free((void *)arrays[i].data);
    free(arrays);
    return status;
}

static int compute(const cli *c, const cli_model *m, const token_file *t, const work *w)
{
    int status;
    fg_backend *b = cli_backend(c, &status);
    fg_store *s = b ? cli_store(c, m, b, w->graph, &status) : NULL;
    fg_plan *p = s ? fg_plan_new(w->graph, s) : NULL;
    const size_t bytes = (size_t)fg_shape_count(t->shape) * sizeof(int32_t);
    if (s) {
        fg_status e = p ? fg_plan_status(p) : FG_ERR_MEMORY;
        if (!e) e = fg_write(p, w->tokens, t->tokens, bytes);
        if (!e && t->labels) e = fg_write(p, w->labels, t->labels, bytes);
        if (!e) e = fg_run(p);
        status = e ? cli_fail(c, cli_exit_of(e), "%s", p ? fg_plan_message(p) : "out of memory")
                   : write_results(c, p, w);
    }
    fg_plan_free(p);
    fg_store_free(s);
    fg_backend_close(b);
    return status;
}

int cmd_logits(const cli *c)
{
    cli_model m;
    token_file t = { 0 };
    work w = { 0 };
    int status = cli_open(c, c->args[0], &m);
    if (!status) status = read_tokens(c, &t);
    if (!status) status = build(c, &m, &t, &w);
    if (!status) status = compute(c, &m, &t, &w);
    free(w.grad);
    fg_graph_free(w.graph);
    free(t.tokens);
    free(t.labels);
    cli_close(&m);
    return status;
}
