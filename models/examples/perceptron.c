/* perceptron.c - two spirals told apart by a perceptron of two layers: the tutorial.
 *
 *     fox-graph run perceptron.c                     trains, and tests on points of its own
 *     fox-graph run perceptron.c --set hidden=4      too small a network, on purpose
 *
 * A model that is no language model gives fox-graph two functions: fg_loss builds the graph down to
 * one number, and fg_feed writes the inputs of one batch.  Building computes nothing: fg_loss is
 * called once or twice, the graph that it leaves runs thousands of times. */
#include <math.h>
#include <fox_graph.h>

/* How to train; the command line can override each of these (--set lr=0.003). */
void fg_configure(fg_recipe *r)
{
    r->batch = 128;                      /* points per step */
    r->context = 1;
    r->steps = 2000;
    r->lr = 3e-2;
    r->lr_end = 1e-3;
    r->weight_decay = 0;
    r->log_every = 200;
    r->eval_every = 500;
    r->eval_batches = 8;
}

/* y = W x + b.  A parameter has a name, a shape and a rule for its first values; the values live in
 * a store, apart from the graph.  The scope puts "hidden." in front of the names. */
static fg_tensor layer(fg_tensor x, const char *name, int64_t n_out)
{
    const int64_t n_in = fg_dim(x, -1);
    const fg_init normal = { FG_NORMAL, .a = 1 / sqrt((double)n_in) }, zeros = { .kind = FG_ZEROS };
    fg_scope_push(x.graph, name);
    fg_tensor w = fg_param(x.graph, "weight", FG_DIMS(n_out, n_in), normal);
    fg_tensor b = fg_param(x.graph, "bias", FG_DIMS(n_out), zeros);
    fg_scope_pop(x.graph);
    return fg_linear(x, w, b);
}

/* The whole graph.  Gradients and the optimizer are added to it by fox-graph. */
fg_tensor fg_loss(fg_graph *g, const fg_recipe *r)
{
    const int64_t N = r->batch, hidden = fg_setting_int(g, "hidden", 64);
    fg_tensor x = fg_input(g, "points", FG_F32, FG_DIMS(N, 2));        /* [N,2]      */
    fg_tensor side = fg_input(g, "side", FG_I32, FG_DIMS(N));          /* [N], 0 or 1 */

    x = fg_tanh(layer(x, "hidden", hidden));                           /* [N,hidden] */
    fg_tensor logits = layer(x, "out", 2);                             /* [N,2]      */
    return fg_mean(fg_cross_entropy(logits, side));                    /* one number */
}

/* Uniform in [0,1), the same for the same n: a run can be repeated exactly. */
static double uniform(uint64_t n)
{
    n = (n ^ n >> 30) * 0xbf58476d1ce4e5b9u;
    n = (n ^ n >> 27) * 0x94d049bb133111ebu;
    return (double)((n ^ n >> 31) >> 11) / 9007199254740992.0;
}

/* Point i lies on arm i % 2 at radius r: angle 9 r, the other arm opposite, with a little noise. */
fg_status fg_feed(fg_plan *p, const fg_graph *g, const fg_recipe *r, int64_t batch, bool eval)
{
    enum { MOST = 4096 };
    float points[MOST][2];
    int32_t side[MOST];
    const int64_t N = r->batch;
    uint64_t n = ((uint64_t)r->seed * 2 + eval) << 40 | (uint64_t)(batch * N * 3);
    if (N > MOST) return FG_ERR_USAGE;

    for (int64_t i = 0; i < N; i++) {
        const double radius = 0.1 + 0.9 * uniform(++n);
        const double angle = 9 * radius + 3.14159265358979 * (double)(i % 2);
        points[i][0] = (float)(radius * cos(angle) + 0.1 * (uniform(++n) - 0.5));
        points[i][1] = (float)(radius * sin(angle) + 0.1 * (uniform(++n) - 0.5));
        side[i] = (int32_t)(i % 2);
    }
    const fg_status s = fg_write(p, fg_find(g, "points"), points, (size_t)N * sizeof points[0]);
    return s ? s : fg_write(p, fg_find(g, "side"), side, (size_t)N * sizeof side[0]);
}
