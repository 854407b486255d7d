/* optimizer.c - clipping, decay groups and AdamW for all parameters, as nodes.
 *
 *     norm = sqrt(sum over parameters of |g|^2),  g' = g min(1, clip / (norm + 1e-6)),
 *     AdamW as in ops.def
 *
 * Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"; decay groups as in
 * the forgetting transformer's trainer: every weight and table decays, biases and gains do not. */
#include <stdlib.h>
#include "graph.h"
#include "ops.h"
#include "fox_autodiff.h"

typedef struct { int n; fg_param_info *info; fg_tensor *param, *grad; } group;

static bool trained(const fg_param_info *p) { return !p->init.frozen; }

/* Gradients in the order of names, as many to a node as it takes; then the nodes' sums in order.
 * The nodes stand together: a device may run them at once. */
static fg_tensor global_squares(fg_graph *g, const group *all)
{
    fg_tensor sum = { 0 }, *part = malloc(((size_t)all->n + 1) * sizeof *part);
    int n_parts = 0;
    if (!part) { fg__out_of_memory(g); return sum; }
    for (int i = 0; i < all->n; ) {
        fg_tensor in[FG_MAX_IN] = { { 0 } };
        int n = 0;
        for (; i < all->n && n < FG_MAX_IN; i++)
            if (fg_ok(all->grad[i])) in[n++] = all->grad[i];
        if (n) part[n_parts++] = FG_APPLY(sum_squares, FG_HERE, in, 0);
    }
    for (int i = 0; i < n_parts; i++) sum = i ? fg_add(sum, part[i]) : part[i];
    free(part);
    return n_parts ? sum : fg_fill(g, FG_DIMS(1), 0);
}

static fg_tensor moment(fg_graph *g, char which, const fg_param_info *p)
{
    return fg_state(g, fg_name(g, "@adam.%c.%s", which, p->name), FG_F32, p->shape);
}

static void update_all(fg_graph *g, const group *all, const fg_optimizer *o)
{
    fg_tensor lr = fg_input(g, "lr", FG_F32, FG_DIMS(1));
    fg_tensor step = fg_input(g, "step", FG_F32, FG_DIMS(1));
    fg_tensor squares = global_squares(g, all);
    fg_tensor norm = fg_sqrt(squares);
    fg_output(norm, "grad_norm");
    const double limit = o->clip > 0 ? o->clip : 1e300;
    fg_tensor clip = FG_APPLY(clip_factor, FG_HERE, ((const fg_tensor[]){ squares }), limit);
    /* Weights, then gains and biases: nodes of a kind together, which a device may run at once. */
    for (int last = 0; last < 2; last++)
        for (int i = 0; i < all->n; i++) {
            if (!fg_ok(all->grad[i]) || all->info[i].init.no_decay != last) continue;
            const double decay = last ? 0 : o->weight_decay;
            const fg_tensor m = moment(g, 'm', &all->info[i]);
            const fg_tensor v = moment(g, 'v', &all->info[i]);
            const fg_tensor in[] = { all->param[i], m, v, all->grad[i], clip, lr, step };
            FG_APPLY(adamw, FG_HERE, in, o->beta1, o->beta2, o->eps, decay);
        }
}

/* Lists g's trained parameters; false if out of memory. */
static bool list_params(const fg_graph *g, group *all)
{
    const int n = fg_param_count(g);
    const size_t room = (size_t)(n ? n : 1);
    *all = (group){ 0, malloc(room * sizeof *all->info), malloc(room * sizeof *all->param),
                    calloc(room, sizeof *all->grad) };
    if (!all->info || !all->param || !all->grad) return false;
    for (int i = 0; i < n; i++) {
        fg_param_info p;
        if (!fg_param_at(g, i, &p)) return false;
        if (!trained(&p)) continue;
        all->info[all->n] = p;
        all->param[all->n++] = p.tensor;
    }
    return true;
}

static void free_group(group *all)
{
    free(all->info); free(all->param); free(all->grad);
}

/* The same parameters, gradients' sums as states, in a graph of their own. */
static fg_graph *update_graph(const group *all, const fg_optimizer *o)
{
    fg_graph *u = fg_graph_new();
    if (!u) return NULL;
    group twin = { all->n, all->info, malloc((size_t)(all->n + 1) * sizeof *twin.param),
                   calloc((size_t)all->n + 1, sizeof *twin.grad) };
    for (int i = 0; twin.param && twin.grad && i < all->n; i++) {
        const fg_param_info *p = &all->info[i];
        twin.param[i] = fg_param(u, p->name, p->shape, p->init);
        if (fg_ok(all->grad[i]))
            twin.grad[i] = fg_state(u, fg_name(u, "@grad.%s", p->name), FG_F32, p->shape);
    }
    u->pass = FG_PASS_UPDATE;
    u->forward_at = FG_HERE;
    if (twin.param && twin.grad) update_all(u, &twin, o);
    else fg__out_of_memory(u);
    u->pass = FG_PASS_FORWARD;
    free(twin.param);
    free(twin.grad);
    return u;
}

fg_status fg_train_graph(fg_tensor loss, const fg_optimizer *o, fg_graph **update)
{
    fg_graph *g = loss.graph;
    if (update) *update = NULL;
    if (!g) return FG_ERR_USAGE;
    if (g->status) return g->status;
    if (o->micro_batches > 1 && !update) return FG_ERR_USAGE;
    group all;
    const uint32_t scope = g->scope;
    g->scope = 0;
    if (!list_params(g, &all)) fg__out_of_memory(g);
    else if (!fg_grad(loss, all.n, all.param, all.grad)) {
        fg_output(loss, "loss");
        g->pass = FG_PASS_UPDATE;
        g->forward_at = FG_HERE;
        for (int i = 0; o->micro_batches > 1 && i < all.n; i++) {
            if (!fg_ok(all.grad[i])) continue;
            fg_tensor sum = fg_state(g, fg_name(g, "@grad.%s", all.info[i].name), FG_F32,
                                     all.info[i].shape);
            FG_APPLY(accumulate, FG_HERE, ((const fg_tensor[]){ sum, all.grad[i] }),
                     1.0 / o->micro_batches);
        }
        if (o->micro_batches > 1) {
            *update = update_graph(&all, o);
            if (!*update) fg__out_of_memory(g);
        } else update_all(g, &all, o);
        g->pass = FG_PASS_FORWARD;
    }
    g->scope = scope;
    free_group(&all);
    return g->status || !update || !*update ? g->status : fg_graph_status(*update);
}
