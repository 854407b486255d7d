/* grad.c - the reverse sweep: walk nodes backwards, ask each op for its gradient, add up.
 *
 * For a node y = f(x) and D[v] = d loss / d v:  D[x] += (dy/dx)^T D[y].  Broadcasting is undone
 * here, once: what an op returns is summed down to its input's shape.  The order of the sweep, and
 * so of every sum, follows from the graph alone (core/schedule.c), not from the order of creation.
 *
 * A scope marked for recomputation is computed again, from what enters it, just before its first
 * node is differentiated; its gradients then read the copies, so the originals die early. */
#include <stdio.h>
#include <stdlib.h>
#include "graph.h"
#include "ops.h"
#include "fox_autodiff.h"

typedef struct {
    fg_graph *g;
    uint32_t cap;                        /* values that the tables cover */
    uint32_t *grad;                      /* value -> its gradient so far */
    uint32_t *copy;                      /* value -> its recomputation, 0 if none */
    bool *on_path;                       /* does a wanted value reach this one? */
    uint8_t *copied;                     /* scope -> its nodes have been computed again */
    const uint32_t *order;               /* forward nodes in running order */
    int64_t n_order;
} sweep;

static bool cover(sweep *w)
{
    const uint32_t n = w->g->cap_values;
    if (n <= w->cap) return true;
    uint32_t *grad = realloc(w->grad, n * sizeof *grad);
    if (grad) w->grad = grad;
    uint32_t *copy = realloc(w->copy, n * sizeof *copy);
    if (copy) w->copy = copy;
    bool *on_path = realloc(w->on_path, n * sizeof *on_path);
    if (on_path) w->on_path = on_path;
    if (!grad || !copy || !on_path) { fg__out_of_memory(w->g); return false; }
    for (uint32_t i = w->cap; i < n; i++) { grad[i] = copy[i] = 0; on_path[i] = false; }
    w->cap = n;
    return true;
}

/* The outermost marked scope that node n lies in, 0 if none. */
static uint32_t marked_scope(const fg_graph *g, const fg_node *n)
{
    uint32_t found = 0;
    for (uint32_t s = n->scope; s; s = g->scopes[s].parent) if (g->scopes[s].recompute) found = s;
    return found;
}

static bool copy_node(sweep *w, uint32_t k)
{
    fg_graph *g = w->g;
    fg_node n = g->nodes[k];
    n.pass = FG_PASS_BACKWARD;
    n.recomputed = true;
    n.pair = k;
    for (int i = 0; i < n.n_in; i++) if (w->copy[n.in[i]]) n.in[i] = w->copy[n.in[i]];
    for (int o = 0; o < n.n_out; o++) {
        fg_value v = g->values[n.out[o]];
        v.node = g->n_nodes;
        const uint32_t id = fg__new_value(g, v);
        if (!id || !cover(w)) return false;
        w->copy[n.out[o]] = id;
        n.out[o] = id;
    }
    return fg__new_node(g, n) != FG_NO_NODE;
}

static bool recompute(sweep *w, uint32_t scope)
{
    if (!scope || w->copied[scope]) return true;
    w->copied[scope] = 1;
    for (int64_t i = 0; i < w->n_order; i++) {
        const fg_node *n = &w->g->nodes[w->order[i]];
        if (n->op->code->memory == FG_MUTATE || marked_scope(w->g, n) != scope) continue;
        if (!copy_node(w, w->order[i])) return false;
    }
    return true;
}

static fg_tensor seen(const sweep *w, uint32_t v)
{
    return (fg_tensor){ w->g, w->copy[v] ? w->copy[v] : v };
}

static void add_gradient(sweep *w, uint32_t v, fg_tensor gradient)
{
    fg_graph *g = w->g;
    const fg_shape shape = g->values[v].shape;
    fg_tensor sum = gradient;
    if (!fg_shape_equal(fg_shape_of(gradient), shape)) sum = fg_sum_to(gradient, shape);
    if (w->grad[v]) sum = fg_add(((fg_tensor){ g, w->grad[v] }), sum);
    if (cover(w)) w->grad[v] = sum.id;
}

static void run_nodes(sweep *w, const uint32_t *order, int64_t n);

/* The op has no gradient of its own: put its definition here and differentiate that. */
static void through_definition(sweep *w, const fg_node *node, const fg_vjp *v)
{
    fg_graph *g = w->g;
    const uint32_t first = g->n_nodes;
    fg_tensor out[FG_MAX_OUT] = { { 0 } };
    for (int i = 0; i < node->n_in; i++)
        if (node->in[i]) w->on_path[v->in[i].id] = w->on_path[node->in[i]];
    node->op->code->decompose(v->in, node->attr, out);
    const uint32_t n = g->n_nodes - first;
    uint32_t *order = malloc(((size_t)n + 1) * sizeof *order);
    if (!order || !cover(w)) { fg__out_of_memory(g); free(order); return; }
    for (uint32_t i = 0; i < n; i++) {
        order[i] = first + i;
        for (int k = 0; k < g->nodes[first + i].n_in; k++)
            if (w->on_path[g->nodes[first + i].in[k]])
                for (int o = 0; o < g->nodes[first + i].n_out; o++)
                    w->on_path[g->nodes[first + i].out[o]] = true;
    }
    for (int o = 0; o < node->n_out; o++)
        if (fg_ok(out[o]) && fg_ok(v->gout[o])) add_gradient(w, out[o].id, v->gout[o]);
    run_nodes(w, order, n);
    free(order);
    for (int i = 0; i < node->n_in; i++) {       /* what a recomputed input got is its original's */
        const uint32_t copy = v->in[i].id;
        if (!node->in[i] || copy == node->in[i] || !w->grad[copy]) continue;
        const fg_tensor gradient = { g, w->grad[copy] };
        w->grad[copy] = 0;
        add_gradient(w, node->in[i], gradient);
    }
}

static void run_node(sweep *w, uint32_t k)
{
    fg_graph *g = w->g;
    const fg_node node = g->nodes[k];                    /* a copy: the table grows below */
    bool reached = false, wanted = false;
    fg_vjp v = { .attr = node.attr, .n_in = node.n_in, .n_out = node.n_out };
    for (int o = 0; o < node.n_out; o++) {
        reached |= w->grad[node.out[o]] != 0;
        if (w->grad[node.out[o]]) v.gout[o] = (fg_tensor){ g, w->grad[node.out[o]] };
    }
    for (int i = 0; i < node.n_in; i++) wanted |= v.wants[i] = node.in[i] && w->on_path[node.in[i]];
    if (!reached || !wanted) return;
    g->forward_at = node.at;
    g->scope = node.scope;
    g->pair = k;
    if (node.pass == FG_PASS_FORWARD && !recompute(w, marked_scope(g, &node))) return;
    for (int o = 0; o < node.n_out; o++) v.out[o] = seen(w, node.out[o]);
    for (int i = 0; i < node.n_in; i++) if (node.in[i]) v.in[i] = seen(w, node.in[i]);
    if (node.op->code->vjp) node.op->code->vjp(&v);
    else if (node.op->code->decompose && !node.op->code->no_grad) {
        through_definition(w, &node, &v);
        return;
    } else {
        fg__error(g, FG_ERR_NO_VJP, node.op->name, "", node.at, 0, NULL,
                  "has no gradient, yet the loss depends on a parameter through it");
        return;
    }
    if (!cover(w)) return;
    for (int i = 0; i < node.n_in; i++)
        if (v.wants[i] && fg_ok(v.gin[i])) add_gradient(w, node.in[i], v.gin[i]);
}

static void run_nodes(sweep *w, const uint32_t *order, int64_t n)
{
    for (int64_t i = n; i-- > 0 && w->g->status != FG_ERR_MEMORY; ) run_node(w, order[i]);
}

static void free_sweep(sweep *w, uint32_t *order)
{
    free(w->grad); free(w->copy); free(w->on_path); free(w->copied); free(order);
}

fg_status (fg_grad)(fg_loc at, fg_tensor loss, int n, const fg_tensor *wrt, fg_tensor *grad)
{
    fg_graph *g = loss.graph;
    for (int i = 0; i < n; i++) grad[i] = (fg_tensor){ 0 };
    if (!g) return FG_ERR_USAGE;
    if (g->status) return g->status;
    if (!fg_ok(loss)) return FG_ERR_USAGE;
    if (fg_count(loss) != 1) {
        fg__error(g, FG_ERR_SHAPE, "grad", "loss", at, 1, &loss,
                  "the loss must have exactly one element");
        return g->status;
    }
    if (fg_dtype_of(loss) == FG_I32) {
        fg__error(g, FG_ERR_DTYPE, "grad", "loss", at, 1, &loss, "the loss must be f32 or bf16");
        return g->status;
    }
    for (int i = 0; i < n; i++) {
        if (fg_absent(wrt[i]) || wrt[i].graph == g) continue;
        char rule[100];
        snprintf(rule, sizeof rule, "tensor %d belongs to another graph than the loss", i);
        fg__error(g, FG_ERR_USAGE, "grad", "", at, 0, NULL, rule);
        return g->status;
    }
    const uint32_t root = g->values[loss.id].node;
    uint32_t *order = malloc(((size_t)g->n_nodes + 1) * sizeof *order);
    sweep w = { .g = g, .order = order, .copied = calloc(g->n_scopes, 1) };
    w.n_order = !order ? -1 : root == FG_NO_NODE ? 0 : fg__order(g, 1, &root, false, order);
    if (!w.copied || w.n_order < 0 || !cover(&w)) {
        fg__out_of_memory(g);
        free_sweep(&w, order);
        return g->status;
    }
    for (int i = 0; i < n; i++) if (fg_ok(wrt[i])) w.on_path[wrt[i].id] = true;
    for (int64_t i = 0; i < w.n_order; i++) {
        const fg_node *node = &g->nodes[order[i]];
        bool reached = false;
        for (int k = 0; k < node->n_in; k++) reached |= node->in[k] && w.on_path[node->in[k]];
        for (int o = 0; reached && o < node->n_out; o++) w.on_path[node->out[o]] = true;
    }
    const uint32_t scope = g->scope;
    g->pass = FG_PASS_BACKWARD;
    g->forward_at = at;
    fg_tensor one = fg_fill(g, fg_shape_of(loss), 1);
    if (fg_dtype_of(loss) != FG_F32) one = fg_cast(one, fg_dtype_of(loss));
    if (cover(&w)) w.grad[loss.id] = one.id;
    run_nodes(&w, order, w.n_order);
    g->pass = FG_PASS_FORWARD;
    g->scope = scope;
    g->pair = FG_NO_NODE;
    for (int i = 0; i < n; i++)
        if (!g->status && fg_ok(wrt[i]) && w.grad[wrt[i].id])
            grad[i] = (fg_tensor){ g, w.grad[wrt[i].id] };
    free_sweep(&w, order);
    return g->status;
}
