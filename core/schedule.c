/* schedule.c - the order in which nodes run.
 *
 * C leaves the order of f(make(), make()) open, so gcc and clang may build one model in two orders.
 * Forward nodes are therefore ordered by the graph alone: depth first from the roots, inputs in
 * order.  The backward and update nodes are made by the library, in one order, and keep it, but for
 * sums into states: in the end these run as soon as what they add is there, which then need not be
 * kept. */
#include <stdlib.h>
#include "graph.h"

typedef struct {
    const fg_graph *g;
    uint8_t *mark;                       /* per node: 0 unseen, 1 open, 2 placed */
    uint32_t *stack, *order;
    uint32_t *base;                      /* per value: the one that it is a view of, or itself */
    uint32_t *reader_at, *readers; /* readers of value v: readers[reader_at[v] .. reader_at[v+1]) */
    int64_t n;
} walk;

/* Every node that must run before node k, one at a time; FG_NO_NODE past the last. */
static uint32_t before(const walk *w, uint32_t k, uint32_t *cursor)
{
    const fg_node *n = &w->g->nodes[k];
    while (*cursor < (uint32_t)n->n_in) {
        const uint32_t v = n->in[(*cursor)++];
        if (v && w->g->values[v].node != FG_NO_NODE) return w->g->values[v].node;
    }
    uint32_t skip = *cursor - (uint32_t)n->n_in;  /* then the other readers of what it overwrites */
    for (int o = 0; o < fg__overwritten(n); o++)
        for (uint32_t v = w->base[n->in[o]], r = w->reader_at[v]; r < w->reader_at[v + 1]; r++)
            if (w->readers[r] != k && skip-- == 0) { ++*cursor; return w->readers[r]; }
    return FG_NO_NODE;
}

static bool place(walk *w, uint32_t root, uint32_t *cursor, const uint8_t *wanted)
{
    uint32_t top = 0;
    if (w->mark[root]) return true;
    w->stack[top++] = root;
    w->mark[root] = 1;
    cursor[root] = 0;
    while (top) {
        const uint32_t k = w->stack[top - 1], next = before(w, k, &cursor[k]);
        if (next == FG_NO_NODE) { w->mark[k] = 2; w->order[w->n++] = k; top--; continue; }
        if (!wanted[next] || w->mark[next] == 2) continue;
        if (w->mark[next] == 1) continue;      /* it reads the new value too: plan.c refuses that */
        w->mark[next] = 1;
        cursor[next] = 0;
        w->stack[top++] = next;
    }
    return true;
}

bool fg__bases(const fg_graph *g, uint32_t *base)
{
    if (!base) return false;
    for (uint32_t v = 0; v < g->n_values; v++) base[v] = v;
    for (uint32_t k = 0; k < g->n_nodes; k++) {
        const fg_node *n = &g->nodes[k];
        if (n->op->code->memory == FG_VIEW) base[n->out[0]] = base[n->in[0]];
    }
    return true;
}

/* A node reads a value when it reads the value or a view of it. */
static bool list_readers(walk *w)
{
    const fg_graph *g = w->g;
    w->base = malloc(g->n_values * sizeof *w->base);
    if (!fg__bases(g, w->base)) return false;
    w->reader_at = calloc((size_t)g->n_values + 2, sizeof *w->reader_at);
    uint64_t total = 0;
    for (uint32_t k = 0; k < g->n_nodes; k++) total += (uint64_t)g->nodes[k].n_in;
    w->readers = malloc((size_t)(total + 1) * sizeof *w->readers);
    if (!w->reader_at || !w->readers) return false;
    for (uint32_t k = 0; k < g->n_nodes; k++)
        for (int i = 0; i < g->nodes[k].n_in; i++)
            w->reader_at[w->base[g->nodes[k].in[i]] + 2]++;
    for (uint32_t v = 1; v < g->n_values + 2; v++) w->reader_at[v] += w->reader_at[v - 1];
    for (uint32_t k = 0; k < g->n_nodes; k++)
        for (int i = 0; i < g->nodes[k].n_in; i++)
            w->readers[w->reader_at[w->base[g->nodes[k].in[i]] + 1]++] = k;
    return true;
}

static void want(const fg_graph *g, uint32_t root, uint8_t *wanted, uint32_t *stack)
{
    uint32_t top = 0;
    if (wanted[root]) return;
    wanted[root] = 1;
    stack[top++] = root;
    while (top) {
        const fg_node *n = &g->nodes[stack[--top]];
        for (int i = 0; i < n->n_in; i++) {
            const uint32_t k = n->in[i] ? g->values[n->in[i]].node : FG_NO_NODE;
            if (k != FG_NO_NODE && !wanted[k]) { wanted[k] = 1; stack[top++] = k; }
        }
    }
}

/* Node k, not yet placed, changes states alone in the update, and needs nothing that is not there.
 */
static bool is_due(const walk *w, uint32_t k)
{
    const fg_node *n = &w->g->nodes[k];
    if (w->mark[k] || n->pass != FG_PASS_UPDATE || fg__overwritten(n) != n->n_out) return false;
    for (int o = 0; o < n->n_out; o++) {
        const uint32_t v = w->base[n->in[o]];
        if (w->g->values[v].kind != FG_OF_STATE) return false;
        if (w->reader_at[v + 1] - w->reader_at[v] != 1) return false;
    }
    for (int i = 0; i < n->n_in; i++) {
        uint32_t v = n->in[i], by = v ? w->g->values[v].node : FG_NO_NODE;
        while (by != FG_NO_NODE && !w->mark[by] && (w->g->nodes[by].op->code->memory == FG_VIEW ||
                                                    w->g->nodes[by].op->code->memory == FG_PART)) {
            v = w->g->nodes[by].in[0];
            by = v ? w->g->values[v].node : FG_NO_NODE;
        }
        if (by != FG_NO_NODE && w->mark[by] != 2) return false;
    }
    return true;
}

/* Places what is due now that value v is there; what it reads of v may be a part of it. */
static void place_due(walk *w, uint32_t v, uint32_t *cursor, const uint8_t *wanted)
{
    const uint32_t base = w->base[v];
    for (uint32_t r = w->reader_at[base]; r < w->reader_at[base + 1]; r++) {
        const uint32_t k = w->readers[r];
        if (!wanted[k] || w->mark[k]) continue;
        if (w->g->nodes[k].op->code->memory == FG_PART)
            place_due(w, w->g->nodes[k].out[0], cursor, wanted);
        else if (is_due(w, k)) place(w, k, cursor, wanted);
    }
}

int64_t fg__order(const fg_graph *g, int n_roots, const uint32_t *roots, bool sums_soon,
                  uint32_t *order)
{
    const size_t n = g->n_nodes ? g->n_nodes : 1;
    walk w = { .g = g, .order = order, .mark = calloc(n, 1),
               .stack = malloc(n * sizeof(uint32_t)) };
    uint8_t *wanted = calloc(n, 1);
    uint32_t *cursor = calloc(n, sizeof *cursor);
    const bool ok = w.mark && w.stack && wanted && cursor && list_readers(&w);
    for (int i = 0; ok && i < n_roots; i++) want(g, roots[i], wanted, w.stack);
    int64_t settled = 0;                     /* of the order: what adds to states has followed */
    for (int i = 0; ok && i < n_roots; i++)
        if (g->nodes[roots[i]].pass == FG_PASS_FORWARD) place(&w, roots[i], cursor, wanted);
    for (uint32_t k = 0; ok && k < g->n_nodes; k++) {
        for (; sums_soon && settled < w.n; settled++) {
            const fg_node *made = &g->nodes[order[settled]];
            for (int o = 0; o < made->n_out; o++) place_due(&w, made->out[o], cursor, wanted);
        }
        if (wanted[k]) place(&w, k, cursor, wanted);
    }
    free(w.mark); free(w.stack); free(w.base); free(w.reader_at); free(w.readers);
    free(wanted); free(cursor);
    return ok ? w.n : -1;
}
