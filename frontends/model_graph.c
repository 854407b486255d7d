/* model_graph.c - from a model as the tools see it to the graphs that they run. */
#include <inttypes.h>
#include "training.h"

/* A language model's logits on new tokens; refuses what is not one row of logits per token. */
static fg_tensor logits_of(const struct fg_model *m, const fg_recipe *r, fg_graph *g,
                           fg_shape shape, int64_t *vocab)
{
    const fg_tensor tokens = fg_input(g, "tokens", FG_I32, shape);
    const fg_tensor logits = m->build(m->self, tokens);

    if (fg_graph_status(g) != FG_OK)
        return logits;
    if (fg_absent(logits) || logits.graph != g)
        return fg_fail(tokens, FG_ERR_USAGE, "the model must return a tensor made from tokens");
    if (fg_shape_of(logits).rank != 3 || fg_dim(logits, 0) != shape.dim[0] ||
        fg_dim(logits, 1) != shape.dim[1] || fg_dtype_of(logits) == FG_I32)
        return fg_fail(logits, FG_ERR_SHAPE,
                       "the model must return logits [%" PRId64 ",%" PRId64 ",V] "
                       "for tokens [%" PRId64 ",%" PRId64 "], it returned %s of rank %d",
                       shape.dim[0], shape.dim[1], shape.dim[0], shape.dim[1],
                       fg_dtype_name(fg_dtype_of(logits)), fg_shape_of(logits).rank);
    *vocab = fg_dim(logits, 2);
    if (r && r->vocab > *vocab)
        return fg_fail(logits, FG_ERR_SHAPE, "logits have %" PRId64 " columns, vocab is %" PRId64,
                       *vocab, r->vocab);
    return logits;
}

fg_graph *fg__model_graph(const struct fg_model *m, const fg_recipe *r, int64_t batch,
                          int64_t context, fg__goal goal, fg_tensor *result, int64_t *vocab)
{
    fg_graph *g = fg_graph_new();
    *result = (fg_tensor){ 0 };
    *vocab = 0;
    if (!g)
        return NULL;
    for (int i = 0; i < m->n_settings; i++)
        fg_graph_set(g, m->settings[i].key, m->settings[i].value);
    if (!m->build) {
        *result = m->loss(m->self, g, r);
        if (fg_graph_status(g) == FG_OK && (fg_absent(*result) || fg_count(*result) != 1))
            *result = fg_fail(fg_absent(*result) ? fg_fill(g, FG_DIMS(1), 0) : *result,
                              FG_ERR_SHAPE, "the model must return its loss, one number");
        return g;
    }
    const fg_shape shape = FG_DIMS(batch, context);
    const fg_tensor logits = logits_of(m, r, g, shape, vocab);
    *result = logits;
    if (goal == FG__FORWARD || fg_graph_status(g) != FG_OK)
        return g;
    const fg_tensor labels = fg_input(g, "labels", FG_I32, shape);
    *result = goal == FG__LOSS ? fg_nn_loss(logits, labels) : fg_cross_entropy(logits, labels);
    return g;
}

fg_graph *fg_model_forward(const struct fg_model *m, const fg_recipe *r, int64_t batch,
                           int64_t context)
{
    fg_tensor out;
    int64_t vocab;
    fg_graph *g = fg__model_graph(m, r, batch, context, FG__FORWARD, &out, &vocab);
    if (g && fg_graph_status(g) == FG_OK)
        fg_output(out, m->build ? "logits" : "loss");
    return g;
}

fg_graph *fg_model_loss(const struct fg_model *m, const fg_recipe *r, int64_t batch,
                        int64_t context)
{
    fg_tensor out;
    int64_t vocab;
    fg_graph *g = fg__model_graph(m, r, batch, context, FG__LOSSES, &out, &vocab);
    if (g && fg_graph_status(g) == FG_OK)
        fg_output(out, m->build ? "losses" : "loss");
    return g;
}

fg_graph *fg__training_graph(const struct fg_model *m, const fg_recipe *r, fg_graph **update,
                             int64_t *vocab)
{
    const int64_t micro = r->micro_batch ? r->micro_batch : r->batch;
    const fg_optimizer o = { r->beta1, r->beta2, r->eps, r->weight_decay, r->clip,
                             (int)(r->batch / micro) };
    fg_tensor loss;
    fg_graph *g = fg__model_graph(m, r, micro, r->context, FG__LOSS, &loss, vocab);

    *update = NULL;
    if (g && fg_graph_status(g) == FG_OK)
        fg_train_graph(loss, &o, update);
    return g;
}

fg_graph *fg_model_training(const struct fg_model *m, const fg_recipe *r, fg_graph **update)
{
    int64_t vocab;
    return fg__training_graph(m, r, update, &vocab);
}

fg_status fg_model_settings_read(const fg_graph *g, char message[FG_MESSAGE])
{
    const char *key = fg_graph_unused_setting(g, 0);
    return key ? fg__say(message, FG_ERR_USAGE,
                         "neither the recipe nor the model reads a setting '%s'", key)
               : fg__say(message, FG_OK, "%s", "");
}
