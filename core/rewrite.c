/* rewrite.c - replacing nodes of a lowered graph by others. */
#include <stdlib.h>
#include <string.h>
#include "rewrite.h"

/* Values that were made since get entries of their own; false if out of memory. */
static bool keep_up(fg_rewrite *r)
{
    const uint32_t n = r->g->n_values;
    if (n <= r->cap) return true;
    const uint32_t cap = n + n / 4 + 64;
    uint32_t *now = realloc(r->now, cap * sizeof *now);
    if (now) r->now = now;
    uint32_t *uses = realloc(r->uses, cap * sizeof *uses);
    if (uses) r->uses = uses;
    if (!now || !uses) { fg__out_of_memory(r->g); return false; }
    for (uint32_t v = r->cap; v < cap; v++) { r->now[v] = v; r->uses[v] = 0; }
    r->cap = cap;
    return true;
}

bool fg__rewrite_open(fg_rewrite *r, fg_graph *g)
{
    *r = (fg_rewrite){ .g = g, .n_nodes = g->n_nodes };
    if (!keep_up(r)) return false;
    for (uint32_t k = 0; k < g->n_nodes; k++)
        for (int i = 0; i < g->nodes[k].n_in; i++) r->uses[g->nodes[k].in[i]]++;
    for (uint32_t i = 0; i < g->n_outputs; i++) r->uses[g->outputs[i].id]++;
    return true;
}

uint32_t fg__now(const fg_rewrite *r, uint32_t v)
{
    while (v < r->cap && r->now[v] != v) v = r->now[v];
    return v;
}

uint32_t fg__uses(const fg_rewrite *r, uint32_t v)
{
    v = fg__now(r, v);
    return v < r->cap ? r->uses[v] : 0;
}

bool fg__depends(const fg_rewrite *r, uint32_t v, uint32_t k)
{
    const fg_graph *g = r->g;
    const size_t n = (size_t)g->n_nodes + 1;
    uint8_t *seen = calloc(n, 1);
    uint32_t *waiting = malloc(n * sizeof *waiting), count = 0;
    bool found = !seen || !waiting;
    const uint32_t last = g->values[fg__now(r, v)].node;
    if (!found && last != FG_NO_NODE) seen[waiting[count++] = last] = 1;
    while (count && !found) {
        const fg_node *by = &g->nodes[waiting[--count]];
        found = by == &g->nodes[k];
        for (int i = 0; i < by->n_in; i++) {
            const uint32_t in = by->in[i] ? g->values[fg__now(r, by->in[i])].node : FG_NO_NODE;
            if (in != FG_NO_NODE && !seen[in]) seen[waiting[count++] = in] = 1;
        }
    }
    if (!seen || !waiting) fg__out_of_memory(r->g);
    free(seen);
    free(waiting);
    return found;
}

void fg__rewrite_close(fg_rewrite *r)
{
    fg_graph *g = r->g;
    for (uint32_t k = 0; k < g->n_nodes; k++)
        for (int i = 0; i < g->nodes[k].n_in; i++)
            g->nodes[k].in[i] = fg__now(r, g->nodes[k].in[i]);
    for (uint32_t i = 0; i < g->n_outputs; i++)
        g->outputs[i].id = fg__now(r, g->outputs[i].id);
}

uint32_t fg__build_as(fg_rewrite *r, uint32_t k)
{
    const fg_node *n = &r->g->nodes[k];
    r->g->scope = n->scope;
    r->g->pass = n->pass;
    r->g->forward_at = n->at;
    r->g->pair = n->pair;
    return r->g->n_nodes;
}

void fg__built(fg_rewrite *r, uint32_t k, uint32_t first)
{
    fg_graph *g = r->g;
    for (uint32_t i = first; i < g->n_nodes; i++) {
        g->nodes[i].at = g->nodes[k].at;
        g->nodes[i].recomputed = g->nodes[k].recomputed;
    }
    if (keep_up(r))
        for (uint32_t i = first; i < g->n_nodes; i++)
            for (int j = 0; j < g->nodes[i].n_in; j++) r->uses[g->nodes[i].in[j]]++;
    g->scope = 0;
    g->pass = FG_PASS_FORWARD;
    g->pair = FG_NO_NODE;
}

static void own_outputs(fg_graph *g, uint32_t k)
{
    for (int o = 0; o < g->nodes[k].n_out; o++) g->values[g->nodes[k].out[o]].node = k;
}

void fg__take_slot(fg_rewrite *r, uint32_t k, fg_tensor t)
{
    fg_graph *g = r->g;
    const uint32_t m = fg_ok(t) ? g->values[t.id].node : FG_NO_NODE;
    if (m == FG_NO_NODE || m == k) return;
    const fg_node old = g->nodes[k];
    g->nodes[k] = g->nodes[m];
    g->nodes[m] = old;
    own_outputs(g, k);
    own_outputs(g, m);
}

void fg__instead(fg_rewrite *r, uint32_t old, fg_tensor t)
{
    if (!old || !fg_ok(t) || !keep_up(r)) return;
    old = fg__now(r, old);
    const uint32_t v = fg__now(r, t.id);
    if (old == v) return;
    r->now[old] = v;
    r->uses[v] += r->uses[old];
    r->uses[old] = 0;
}

void fg__unread(fg_rewrite *r, uint32_t k)
{
    fg_node *n = &r->g->nodes[k];
    for (int i = 0; i < n->n_in; i++) {
        const uint32_t v = fg__now(r, n->in[i]);
        if (v && v < r->cap && r->uses[v]) r->uses[v]--;
        n->in[i] = 0;
    }
}

void fg__drop(fg_rewrite *r, uint32_t k) { r->g->nodes[k].dropped = true; }
