/* evaluate.c - held-out loss, as a mean and by position.
 *
 * Every scored window stands alone (bos in front).  Losses of single positions come back as f32 and
 * are summed in double, in the order of the text, so the mean does not depend on the size of a
 * batch. */
#include <stdlib.h>
#include "training.h"

struct fg__evaluator {
    const struct fg_model *model;
    const fg_recipe *recipe;
    const fg_data *data;
    fg_graph *graph;
    fg_plan  *plan;
    int64_t   batch, windows;
    int32_t  *tokens, *labels;           /* [batch,context] each */
    float    *losses;
    double   *sums;                      /* [context] */
};

static fg_status make_plan(fg__evaluator *e, fg_store *s, char message[FG_MESSAGE])
{
    e->graph = fg_model_loss(e->model, e->recipe, e->batch, e->recipe->context);
    if (!e->graph)
        return FG_ERR_MEMORY;
    if (fg_graph_status(e->graph) != FG_OK)
        return fg__say(message, fg_graph_status(e->graph), "%s", fg_graph_message(e->graph));
    if (fg_store_init(s, e->graph, (uint64_t)e->recipe->seed) != FG_OK)
        return fg__say(message, fg_store_status(s), "%s", fg_store_message(s));
    e->plan = fg_plan_new(e->graph, s);
    if (!e->plan)
        return FG_ERR_MEMORY;
    if (fg_plan_status(e->plan) != FG_OK)
        return fg__say(message, fg_plan_status(e->plan), "%s", fg_plan_message(e->plan));
    return FG_OK;
}

fg_status fg__evaluator_new(fg__evaluator **out, const struct fg_model *m, const fg_recipe *r,
                            fg_store *s, const fg_data *d, char message[FG_MESSAGE])
{
    fg__evaluator *e = calloc(1, sizeof *e);
    fg_status status = e ? FG_OK : FG_ERR_MEMORY;

    *out = NULL;
    if (m->build && (!d || fg_data_windows(d, true) < 1))
        status = fg__say(message, FG_ERR_USAGE, "no held-out text: set eval_fraction or eval_data");
    if (status == FG_OK) {
        e->model = m;
        e->recipe = r;
        e->data = d;
        e->batch = r->micro_batch ? r->micro_batch : r->batch;
        e->windows = m->build ? fg_data_eval_windows(d, r) : r->eval_batches ? r->eval_batches : 1;
        if (m->build && e->batch > e->windows)
            e->batch = e->windows;
        const size_t n = (size_t)(e->batch * r->context);
        e->tokens = malloc(n * sizeof *e->tokens);
        e->labels = malloc(n * sizeof *e->labels);
        e->losses = malloc(n * sizeof *e->losses);
        e->sums = malloc((size_t)r->context * sizeof *e->sums);
        status = e->tokens && e->labels && e->losses && e->sums ? make_plan(e, s, message)
                                                                : FG_ERR_MEMORY;
    }
    if (status != FG_OK)
        fg__evaluator_free(e);
    else
        *out = e;
    return status == FG_ERR_MEMORY ? fg__say(message, status, "out of memory for the evaluation")
                                   : status;
}

void fg__evaluator_free(fg__evaluator *e)
{
    if (!e)
        return;
    fg_plan_free(e->plan);
    fg_graph_free(e->graph);
    free(e->tokens);
    free(e->labels);
    free(e->losses);
    free(e->sums);
    free(e);
}

/* Windows first .. first + batch - 1 added to the sums. */
static fg_status score(fg__evaluator *e, int64_t first)
{
    const int64_t T = e->recipe->context, left = e->windows - first;
    const int64_t n = left < e->batch ? left : e->batch;
    const size_t bytes = (size_t)(e->batch * T) * sizeof *e->tokens;
    const fg_tensor tokens = fg_find(e->graph, "tokens"), labels = fg_find(e->graph, "labels");
    fg_status s;

    fg_data_eval_batch(e->data, e->windows, first, e->batch, e->tokens, e->labels);
    s = fg_write(e->plan, tokens, e->tokens, bytes);
    if (s == FG_OK)
        s = fg_write(e->plan, labels, e->labels, bytes);
    if (s == FG_OK)
        s = fg_run(e->plan);
    if (s == FG_OK)
        s = fg_read(e->plan, fg_find(e->graph, "losses"), e->losses, bytes);
    for (int64_t i = 0; s == FG_OK && i < n; i++)
        for (int64_t t = 0; t < T; t++)
            e->sums[t] += e->losses[i * T + t];
    return s;
}

/* A model with inputs of its own: the mean of its loss over the batches that feed gives. */
static fg_status score_fed(fg__evaluator *e, int64_t batch, double *sum)
{
    float loss = 0;
    fg_status s = e->model->feed(e->model->self, e->plan, e->graph, e->recipe, batch, true);
    if (s == FG_OK)
        s = fg_run(e->plan);
    if (s == FG_OK)
        s = fg_read(e->plan, fg_find(e->graph, "loss"), &loss, sizeof loss);
    *sum += loss;
    return s;
}

fg_status fg__evaluator_run(fg__evaluator *e, const volatile sig_atomic_t *stop,
                            fg_eval_result *out, double *by_position, char message[FG_MESSAGE])
{
    const bool words = e->model->build != NULL;
    const int64_t T = e->recipe->context;
    const double start = fg__seconds();
    double sum = 0;
    fg_status s = FG_OK;

    for (int64_t t = 0; t < T; t++)
        e->sums[t] = 0;
    for (int64_t i = 0; i < e->windows && s == FG_OK; i += words ? e->batch : 1) {
        if (stop && *stop)
            return fg__say(message, FG_ERR_STOPPED, "stopped during evaluation");
        s = words ? score(e, i) : score_fed(e, i, &sum);
    }
    if (s != FG_OK)
        return fg__say(message, s, "%s", fg_plan_message(e->plan));
    for (int64_t t = 0; words && t < T; t++) {
        sum += e->sums[t];
        if (by_position)
            by_position[t] = e->sums[t] / (double)e->windows;
    }
    out->tokens = words ? e->windows * T : e->windows * e->batch * T;
    out->loss = sum / (double)(words ? out->tokens : e->windows);
    out->seconds = fg__seconds() - start;
    return fg__say(message, FG_OK, "%s", "");
}

fg_status fg_evaluate(const struct fg_model *m, const fg_recipe *r, fg_store *s, const fg_data *d,
                      const volatile sig_atomic_t *stop, fg_eval_result *out, double *by_position,
                      char message[FG_MESSAGE])
{
    fg__evaluator *e;
    fg_status status = fg_recipe_check(r, message);
    if (status == FG_OK)
        status = fg__evaluator_new(&e, m, r, s, d, message);
    if (status != FG_OK)
        return status;
    status = fg__evaluator_run(e, stop, out, by_position, message);
    fg__evaluator_free(e);
    return status;
}
