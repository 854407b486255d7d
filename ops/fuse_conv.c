/* fuse_conv.c - the rules for convolutions whose inputs lie side by side.
 *
 *   causal_conv(x[a:b], w1), causal_conv(x[b:c], w2), ...     one convolution of x[a:c], with the
 *                                                  weights joined; its columns are the results.
 *                                                  The same for their gradients
 *   y[a:b] and y[b:c] joined                       y[a:c]
 *
 * Queries, keys and values of one product are such inputs; a third of the launches do the same
 * work in grids three times as wide.  Every channel's sums stay as they were. */
#include "internal.h"
#include "rewrite.h"

enum { MEMBERS = 8, REACH = 4096 };      /* of a run; nodes between the first and the last */

static bool is_op(const fg_node *n, int id) { return n->op == &fg_op_table[id]; }

/* Convolutions of neighbouring spans of `whole`, by their spans. */
typedef struct {
    bool grad;
    int n;
    uint32_t whole, node[MEMBERS];
    int64_t start[MEMBERS + 1];          /* the last: where the last one stops */
} run;

/* v is a span of *whole; false if it is not. */
static bool is_span(const fg_rewrite *r, uint32_t v, uint32_t *whole, struct fg_attr_slice *a)
{
    const uint32_t k = v ? r->g->values[fg__now(r, v)].node : FG_NO_NODE;
    if (k == FG_NO_NODE || !is_op(&r->g->nodes[k], FG_OP_slice)) return false;
    *whole = fg__now(r, r->g->nodes[k].in[0]);
    *a = *(const struct fg_attr_slice *)r->g->nodes[k].attr;
    return true;
}

static fg_tensor span(fg_tensor whole, int axis, int64_t start, int64_t stop)
{
    const bool all = start == 0 && stop == fg_dim(whole, axis);
    return all ? whole : fg_slice(whole, axis, start, stop);
}

static bool same(const fg_rewrite *r, uint32_t a, uint32_t b)
{
    return fg__now(r, a) == fg__now(r, b);
}

/* n may join the run that a begins: all but channels are equal, and no cache is in use. */
static bool alike(const fg_rewrite *r, const fg_node *a, const fg_node *n, bool grad)
{
    const fg_value *v = r->g->values;
    const int x = grad;
    const struct fg_attr_causal_conv *p = a->attr, *q = n->attr;      /* both ops' are the same */
    if (n->op != a->op || n->pass != a->pass || n->recomputed != a->recomputed) return false;
    if (fg__now(r, n->out[0]) != n->out[0] || p->silu != q->silu) return false;
    for (int i = 0; i < x + 3; i++) {
        if (!a->in[i] != !n->in[i]) return false;
        if (a->in[i] && v[fg__now(r, a->in[i])].type != v[fg__now(r, n->in[i])].type) return false;
    }
    if (fg_dim(fg__now_tensor(r, a->in[x + 1]), -1) != fg_dim(fg__now_tensor(r, n->in[x + 1]), -1))
        return false;
    if (fg_shape_of(fg__now_tensor(r, a->in[x + 1])).rank !=
        fg_shape_of(fg__now_tensor(r, n->in[x + 1])).rank) return false;
    for (int i = x + 4; i < n->n_in; i++) if (n->in[i]) return false;
    return same(r, a->in[x + 3], n->in[x + 3]);
}

/* Convolutions from node k on; false if there is one only, or something lies between them. */
static bool find_run(const fg_rewrite *r, uint32_t k, run *m)
{
    const fg_node *first = &r->g->nodes[k];
    struct fg_attr_slice a;
    uint32_t whole;
    *m = (run){ .grad = is_op(first, FG_OP_causal_conv_grad) };
    int64_t stop[MEMBERS];
    if (!is_span(r, first->in[m->grad], &m->whole, &a)) return false;
    for (uint32_t i = k; i < r->n_nodes && i < k + REACH && m->n < MEMBERS; i++) {
        const fg_node *n = &r->g->nodes[i];
        if (n->op != first->op || !alike(r, first, n, m->grad)) continue;
        if (!is_span(r, n->in[m->grad], &whole, &a) || whole != m->whole || a.axis != 2) continue;
        int at = m->n++;
        for (; at > 0 && m->start[at - 1] > a.start; at--) {
            m->start[at] = m->start[at - 1], stop[at] = stop[at - 1];
            m->node[at] = m->node[at - 1];
        }
        m->start[at] = a.start, stop[at] = a.stop, m->node[at] = i;
    }
    for (int j = 1; j < m->n; j++) if (m->start[j] != stop[j - 1]) return false;
    if (m->n) m->start[m->n] = stop[m->n - 1];
    return m->n > 1;
}

/* Input i of all members behind each other; absent if they have none. */
static fg_tensor joined(const fg_rewrite *r, const run *m, int i, int axis)
{
    fg_tensor all = { 0 };
    for (int j = 0; j < m->n; j++) {
        const fg_tensor t = fg__now_tensor(r, r->g->nodes[m->node[j]].in[i]);
        all = fg_absent(all) ? t : fg_concat(all, t, axis);
    }
    return all;
}

/* No member's gradient comes out of another's: they can be one. */
static bool apart(const fg_rewrite *r, const run *m)
{
    for (int i = 0; i < m->n; i++)
        for (int j = 0; j < m->n; j++)
            if (i != j && fg__depends(r, r->g->nodes[m->node[i]].in[0], m->node[j])) return false;
    return true;
}

/* Each member's results are its channels of those of t. */
static void part(fg_rewrite *r, const run *m, fg_tensor t)
{
    static const int axis[] = { 2, 0, 0 };                   /* y or gx, gw, gbias */
    for (int j = 0; j < m->n; j++) {
        const fg_node own = r->g->nodes[m->node[j]];
        const int64_t start = m->start[j] - m->start[0], stop = m->start[j + 1] - m->start[0];
        const uint32_t first = fg__build_as(r, m->node[j]);
        fg_tensor mine[3];
        for (int o = 0; o < own.n_out; o++)
            mine[o] = fg_slice(fg_result(t, o), axis[o], start, stop);
        fg__built(r, m->node[j], first);
        for (int o = 0; o < own.n_out; o++) fg__instead(r, own.out[o], mine[o]);
    }
}

/* The first member's slot, of gradients the last one's. */
static void merge(fg_rewrite *r, const run *m)
{
    fg_graph *g = r->g;
    const int x = m->grad;
    uint32_t place = m->node[0];
    for (int j = 1; j < m->n; j++)
        if ((m->node[j] > place) == m->grad) place = m->node[j];
    if (m->grad && !apart(r, m)) return;
    const fg_node old = g->nodes[place];
    const uint32_t weights = old.recomputed && old.pair != FG_NO_NODE ? old.pair : place;
    uint32_t first = fg__build_as(r, weights);     /* one for what is computed again, too */
    const fg_tensor w = joined(r, m, x + 1, 0), bias = joined(r, m, x + 2, 0);
    fg__built(r, weights, first);
    first = fg__build_as(r, place);
    const struct fg_attr_causal_conv *a = old.attr;
    const fg_tensor whole = { g, m->whole }, seen = fg__now_tensor(r, old.in[x + 3]), none = { 0 };
    const fg_tensor xs = span(whole, 2, m->start[0], m->start[m->n]);
    fg_tensor t;
    if (m->grad) {
        const fg_tensor in[] = { joined(r, m, 0, 2), xs, w, bias, seen };
        t = FG_APPLY(causal_conv_grad, FG_HERE, in, a->silu);
    } else {
        const fg_tensor in[] = { xs, w, bias, seen, none, none };
        t = FG_APPLY(causal_conv, FG_HERE, in, a->silu);
    }
    for (int o = 0; o < old.n_out && fg_ok(t); o++)
        g->values[fg_result(t, o).id].type = g->values[old.out[o]].type;
    fg__built(r, place, first);
    if (!fg_ok(t)) return;
    part(r, m, t);
    fg__take_slot(r, place, t);
}

/* Neighbouring spans of one tensor, joined. */
static void join_spans(fg_rewrite *r, uint32_t k)
{
    const fg_node n = r->g->nodes[k];
    const struct fg_attr_concat *c = n.attr;
    struct fg_attr_slice a, b;
    uint32_t whole, other;
    if (!is_span(r, n.in[0], &whole, &a) || !is_span(r, n.in[1], &other, &b)) return;
    if (whole != other || a.axis != c->axis || b.axis != c->axis || a.stop != b.start) return;
    const uint32_t first = fg__build_as(r, k);
    const fg_tensor t = span((fg_tensor){ r->g, whole }, c->axis, a.start, b.stop);
    fg__built(r, k, first);
    fg__instead(r, n.out[0], t);
}

void fg__fuse_convs(fg_rewrite *r)
{
    fg_graph *g = r->g;
    run m;
    for (uint32_t k = 0; k < r->n_nodes && !g->status; k++)
        if ((is_op(&g->nodes[k], FG_OP_causal_conv) || is_op(&g->nodes[k], FG_OP_causal_conv_grad))
            && alike(r, &g->nodes[k], &g->nodes[k], is_op(&g->nodes[k], FG_OP_causal_conv_grad))
            && find_run(r, k, &m)) merge(r, &m);
    for (uint32_t k = 0; k < g->n_nodes && !g->status; k++)
        if (is_op(&g->nodes[k], FG_OP_concat)) join_spans(r, k);
}
