/* lower.c - a graph for a backend: kernel or definition for every node, dead nodes dropped, equal
 * nodes merged, in the order in which they will run. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "plan.h"
#include "rewrite.h"

void fg__infer_of(const fg_graph *g, const fg_node *n, fg_infer *c)
{
    *c = (fg_infer){ .graph = (fg_graph *)(uintptr_t)g, .attr = n->attr, .n_in = n->n_in,
                     .n_out = n->n_out };
    for (int i = 0; i < n->n_in; i++) {
        c->given[i] = n->in[i] != 0;
        c->in[i] = g->values[n->in[i]].shape;
        c->in_type[i] = g->values[n->in[i]].type;
    }
    for (int o = 0; o < n->n_out; o++) {
        c->out[o] = g->values[n->out[o]].shape;
        c->out_type[o] = g->values[n->out[o]].type;
    }
}

/* What a pass over the graph does: gives every value its dtype in bf16; copies it for fusing; puts
 * definitions where there is no kernel. */
enum { NARROW, FUSE, DEFINE };

typedef struct {
    const fg_graph *from;
    fg_graph *to;
    uint32_t *value, *node;              /* from -> to */
    uint32_t *table, cap;                /* equal nodes: hash -> node of `to` + 1 */
    int stage;
    uint32_t *casts, cap_casts; /* per value of `to`: itself in the other dtype, 0 if none */
    bool again;                         /* a definition was put in: its nodes must be lowered too */
} lowering;

static uint64_t mix(uint64_t h, uint64_t x)
{
    h ^= x + 0x9e3779b97f4a7c15ULL + (h << 6) + (h >> 2);
    return h * 0xff51afd7ed558ccdULL;
}

static uint64_t node_hash(const fg_node *n)
{
    uint64_t h = mix((uint64_t)(uintptr_t)n->op, 0);
    for (int i = 0; i < n->n_in; i++) h = mix(h, n->in[i]);
    for (size_t i = 0; i < n->op->attr_size; i++) h = mix(h, ((const unsigned char *)n->attr)[i]);
    return h ^ (h >> 31);
}

/* What is made of weights alone may be shared by the passes: that prolongs no activation's life. */
static bool of_weights(const fg_graph *g, const fg_node *n, int depth)
{
    for (int i = 0; i < n->n_in; i++) {
        const fg_value *v = &g->values[n->in[i]];
        if (!n->in[i] || v->kind == FG_OF_PARAM) continue;
        if (v->kind != FG_OF_NODE || depth > 2 * FG_MAX_IN) return false;
        if (!of_weights(g, &g->nodes[v->node], depth + 1)) return false;
    }
    return true;
}

static bool node_equal(const fg_graph *g, const fg_node *a, const fg_node *b)
{
    return a->op == b->op && (a->pass == b->pass || of_weights(g, a, 0)) && a->n_in == b->n_in &&
           a->recomputed == b->recomputed &&
           !memcmp(a->in, b->in, sizeof *a->in * (size_t)a->n_in) &&
           !memcmp(a->attr, b->attr, a->op->attr_size);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const fg_mark *)a)->name, ((const fg_mark *)b)->name);
}

static bool copy_names(lowering *w)
{
    const fg_graph *g = w->from;
    fg_graph *h = w->to;
    for (uint32_t s = 1; s < g->n_scopes; s++) {
        if (!fg__grow((void **)&h->scopes, &h->cap_scopes, h->n_scopes, sizeof *h->scopes))
            return false;
        h->scopes[h->n_scopes] = g->scopes[s];
        h->scopes[h->n_scopes++].name = fg__strdup(h, g->scopes[s].name);
    }
    fg_mark *marks = malloc(g->n_values * sizeof *marks);
    uint32_t n = 0;
    for (uint32_t v = 1; marks && v < g->n_values; v++)
        if (g->values[v].kind != FG_OF_NODE && g->values[v].name)
            marks[n++] = (fg_mark){ g->values[v].name, v };
    if (n) qsort(marks, n, sizeof *marks, by_name);    /* the order of creation is the compiler's */
    for (uint32_t i = 0; i < n; i++) {
        fg_value copy = g->values[marks[i].id];
        copy.name = fg__strdup(h, copy.name);
        w->value[marks[i].id] = copy.name ? fg__new_value(h, copy) : 0;
    }
    const bool ok = marks && !h->status;
    free(marks);
    return ok;
}

/* False, with an error, if a definition left out an output that n reads. */
static bool inputs_there(lowering *w, const fg_node *n)
{
    for (int i = 0; i < n->n_in; i++) {
        if (!n->in[i] || w->value[n->in[i]]) continue;
        const fg_value *v = &w->from->values[n->in[i]];
        char rule[200];
        snprintf(rule, sizeof rule, "needs output %d of %.80s, which its definition does not give",
                 v->out, w->from->nodes[v->node].op->name);
        fg__error(w->to, FG_ERR_NO_KERNEL, n->op->name, "", n->at, 0, NULL, rule);
        return false;
    }
    return true;
}

/* What is built until leave_node belongs to node n of `from`. */
static void enter_node(lowering *w, const fg_node *n)
{
    fg_graph *h = w->to;
    h->scope = n->scope;
    h->pass = n->pass;
    h->forward_at = n->at;
    h->pair = n->pair == FG_NO_NODE ? FG_NO_NODE : w->node[n->pair];
}

static void leave_node(lowering *w, const fg_node *n, uint32_t first)
{
    fg_graph *h = w->to;
    for (uint32_t i = first; i < h->n_nodes; i++) {
        h->nodes[i].at = n->at;
        h->nodes[i].recomputed = n->recomputed;
    }
    h->scope = 0;
    h->pass = FG_PASS_FORWARD;
    h->pair = FG_NO_NODE;
}

static uint32_t cast_to(lowering *w, uint32_t v, fg_dtype t)
{
    const fg_dtype is = w->to->values[v].type;
    return is == t || is == FG_I32 ? v : fg__cast((fg_tensor){ w->to, v }, t).id;
}

/* The same, once for every value: what is cast in the forward pass serves the backward pass too. */
static uint32_t cast_once(lowering *w, uint32_t v, fg_dtype t)
{
    const fg_dtype is = w->to->values[v].type;
    if (is == t || is == FG_I32) return v;
    if (v < w->cap_casts && w->casts[v]) return w->casts[v];
    const uint32_t cast = cast_to(w, v, t), n = w->to->n_values + w->to->n_values / 4;
    if (v >= w->cap_casts) {
        uint32_t *more = realloc(w->casts, n * sizeof *more);
        if (!more) { fg__out_of_memory(w->to); return v; }
        memset(more + w->cap_casts, 0, (n - w->cap_casts) * sizeof *more);
        w->casts = more;
        w->cap_casts = n;
    }
    return w->casts[v] = cast;
}

/* n has its inputs in `to`: casts those that its op wants in another dtype. */
static void cast_inputs(lowering *w, fg_node *n)
{
    const fg_bf16_rule *r = &n->op->code->bf16;
    const uint32_t first = w->to->n_nodes;
    enter_node(w, n);
    for (int i = 0; i < n->n_in; i++) {
        if (!n->in[i]) continue;
        if (r->narrow_in >> i & 1) n->in[i] = cast_once(w, n->in[i], FG_BF16);
        if (r->wide_in >> i & 1) n->in[i] = cast_once(w, n->in[i], FG_F32);
    }
    leave_node(w, n, first);
}

static fg_dtype widest(const fg_graph *h, const fg_node *n, fg_dtype otherwise)
{
    fg_dtype t = FG_I32;
    for (int i = 0; i < n->n_in; i++) {
        const fg_dtype is = n->in[i] ? h->values[n->in[i]].type : FG_I32;
        if (is == FG_F32 || (is == FG_BF16 && t == FG_I32)) t = is;
    }
    return t == FG_I32 ? otherwise : t;
}

/* The dtype of output o in bf16; n has its inputs in `to`, `was` is the dtype in f32. */
static fg_dtype narrowed(lowering *w, const fg_node *n, int o, fg_dtype was)
{
    const fg_bf16_rule *r = &n->op->code->bf16;
    fg_value *values = w->to->values;
    if (was == FG_I32 || r->as_inferred) return was;
    if (o < fg__overwritten(n)) {
        fg_value *state = &values[n->in[o]];
        if (r->like[o] && state->kind == FG_OF_STATE)
            state->type = values[n->in[r->like[o] - 1]].type;
        return state->type;
    }
    if (r->like[o] && n->in[r->like[o] - 1]) return values[n->in[r->like[o] - 1]].type;
    return r->narrow_out >> o & 1 ? FG_BF16 : r->wide_out >> o & 1 ? FG_F32
         : widest(w->to, n, was);
}

static bool keep_node(lowering *w, uint32_t k)
{
    fg_graph *h = w->to;
    fg_node n = w->from->nodes[k];
    const bool fresh = n.op->code->memory != FG_MUTATE && !n.recomputed;
    if (!inputs_there(w, &n)) return false;
    for (int i = 0; i < n.n_in; i++) n.in[i] = n.in[i] ? w->value[n.in[i]] : 0;
    if (w->stage == NARROW) cast_inputs(w, &n);
    n.attr = fg__copy_attr(h, n.op, n.attr);
    if (!n.attr || h->status) return false;
    n.pair = n.pair == FG_NO_NODE ? FG_NO_NODE : w->node[n.pair];
    uint32_t at = (uint32_t)node_hash(&n) & (w->cap - 1);
    for (; fresh && w->table[at]; at = (at + 1) & (w->cap - 1)) {
        const uint32_t twin = w->table[at] - 1;
        if (!node_equal(h, &h->nodes[twin], &n)) continue;
        for (int o = 0; o < n.n_out; o++) w->value[n.out[o]] = h->nodes[twin].out[o];
        w->node[k] = twin;
        return true;
    }
    for (int o = 0; o < n.n_out; o++) {
        fg_value v = w->from->values[n.out[o]];
        v.node = h->n_nodes;
        if (w->stage == NARROW) v.type = narrowed(w, &n, o, v.type);
        const uint32_t id = fg__new_value(h, v);
        if (!id) return false;
        w->value[n.out[o]] = id;
        n.out[o] = id;
    }
    w->node[k] = fg__new_node(h, n);
    if (fresh && w->node[k] != FG_NO_NODE) w->table[at] = w->node[k] + 1;
    return w->node[k] != FG_NO_NODE;
}

static bool define_node(lowering *w, uint32_t k)
{
    fg_graph *h = w->to;
    const fg_node *n = &w->from->nodes[k];
    fg_tensor in[FG_MAX_IN] = { { 0 } }, out[FG_MAX_OUT] = { { 0 } };
    if (!inputs_there(w, n)) return false;
    for (int i = 0; i < n->n_in; i++)
        if (n->in[i]) in[i] = (fg_tensor){ h, w->value[n->in[i]] };
    const uint32_t first = h->n_nodes;
    enter_node(w, n);
    n->op->code->decompose(in, n->attr, out);
    for (int o = 0; o < n->n_out; o++)       /* a definition may end in another dtype than its op */
        if (fg_ok(out[o])) out[o].id = cast_to(w, out[o].id, w->from->values[n->out[o]].type);
    leave_node(w, n, first);
    for (int o = 0; o < n->n_out; o++) w->value[n->out[o]] = fg_ok(out[o]) ? out[o].id : 0;
    w->node[k] = h->n_nodes > first ? h->n_nodes - 1 : FG_NO_NODE;
    w->again = true;
    return !h->status;
}

/* The name of what node k overwrites. */
static const char *overwritten(const fg_graph *g, uint32_t k)
{
    uint32_t v = g->nodes[k].in[0];
    while (g->values[v].node != FG_NO_NODE) v = g->nodes[g->values[v].node].in[g->values[v].out];
    return g->values[v].name ? g->values[v].name : "";
}

/* The makers of outputs in order, then what overwrites something by the name of that: the order of
 * creation is the compiler's.  Returns how many; -1 if out of memory. */
static int list_roots(const fg_graph *g, uint32_t *roots)
{
    fg_mark *marks = malloc(((size_t)g->n_nodes + 1) * sizeof *marks);
    uint32_t n = 0;
    int n_roots = 0;
    if (!roots || !marks) { free(marks); return -1; }
    for (uint32_t i = 0; i < g->n_outputs; i++)
        if (g->values[g->outputs[i].id].node != FG_NO_NODE)
            roots[n_roots++] = g->values[g->outputs[i].id].node;
    for (uint32_t k = 0; k < g->n_nodes; k++)
        if (g->nodes[k].op->code->memory == FG_MUTATE && !g->nodes[k].dropped)
            marks[n++] = (fg_mark){ overwritten(g, k), k };
    if (n) qsort(marks, n, sizeof *marks, by_name);
    for (uint32_t i = 0; i < n; i++) roots[n_roots++] = marks[i].id;
    free(marks);
    return n_roots;
}

static bool lower_nodes(lowering *w, fg_backend *b)
{
    const fg_graph *g = w->from;
    uint32_t *roots = malloc(((size_t)g->n_outputs + g->n_nodes + 1) * sizeof *roots);
    uint32_t *order = malloc(((size_t)g->n_nodes + 1) * sizeof *order);
    const int n_roots = list_roots(g, roots);
    const bool soon = w->stage == DEFINE;        /* before, sums would part what can merge */
    const int64_t n = n_roots < 0 || !order ? -1 : fg__order(g, n_roots, roots, soon, order);
    bool ok = n >= 0;
    for (int64_t i = 0; ok && i < n; i++) {
        fg_infer c;
        const fg_node *node = &g->nodes[order[i]];
        fg__infer_of(g, node, &c);
        const char *why = w->stage != DEFINE ? NULL : b->ops->unfit(b, node->op, &c);
        ok = why && node->op->code->decompose ? define_node(w, order[i]) : keep_node(w, order[i]);
    }
    free(roots);
    free(order);
    return ok;
}

static fg_graph *lower_once(const fg_graph *g, fg_backend *b, uint32_t *value, int stage,
                            bool *again)
{
    lowering w = { .from = g, .to = fg_graph_new(), .value = value, .cap = 64, .stage = stage };
    while (w.cap < 2 * g->n_nodes + 2) w.cap *= 2;
    w.table = calloc(w.cap, sizeof *w.table);
    w.node = malloc(((size_t)g->n_nodes + 1) * sizeof *w.node);
    memset(value, 0, g->n_values * sizeof *value);
    for (uint32_t k = 0; w.node && k < g->n_nodes; k++) w.node[k] = FG_NO_NODE;
    bool ok = w.to && w.table && w.node && copy_names(&w) && lower_nodes(&w, b);
    for (uint32_t i = 0; ok && i < g->n_outputs; i++) {
        const uint32_t id = value[g->outputs[i].id];
        if (id) (fg_output)(FG_HERE, (fg_tensor){ w.to, id }, g->outputs[i].name);
        ok = !w.to->status;
    }
    free(w.table);
    free(w.node);
    free(w.casts);
    *again = w.again;
    if (!ok && w.to && w.to->status != FG_OK && w.to->status != FG_ERR_MEMORY) return w.to;
    if (!ok) { fg_graph_free(w.to); return NULL; }
    return w.to;
}

static bool fuse(fg_graph *g, uint32_t *map, uint32_t n_map)
{
    fg_rewrite r;
    const bool ok = fg__rewrite_open(&r, g);
    if (ok) {
        fg__fuse(&r);
        fg__rewrite_close(&r);
        for (uint32_t v = 0; v < n_map; v++) map[v] = fg__now(&r, map[v]);
    }
    free(r.now);
    free(r.uses);
    return ok && g->status != FG_ERR_MEMORY;
}

/* First dtypes, if the graph is to be narrowed; then fused ops, on a device that has them; then
 * definitions, until every node has a kernel. */
fg_graph *fg__lower(const fg_graph *g, fg_backend *b, fg_dtype precision, uint32_t **map)
{
    *map = malloc(g->n_values * sizeof **map);
    if (!*map) return NULL;
    for (uint32_t v = 0; v < g->n_values; v++) (*map)[v] = v;
    const fg_graph *from = g;
    fg_graph *to = NULL;
    bool again = true;
    int stage = precision == FG_BF16 ? NARROW : b->fuses ? FUSE : DEFINE;
    for (int depth = 0; again && depth < 10; depth++) {
        uint32_t *value = malloc(from->n_values * sizeof *value);
        to = value ? lower_once(from, b, value, stage, &again) : NULL;
        for (uint32_t v = 0; to && v < g->n_values; v++) (*map)[v] = value[(*map)[v]];
        free(value);
        if (from != g) fg_graph_free((fg_graph *)(uintptr_t)from);
        if (!to || to->status) return to;
        if (stage == FUSE && !fuse(to, *map, g->n_values)) { fg_graph_free(to); return NULL; }
        again = again || stage != DEFINE;
        stage = stage == NARROW && b->fuses ? FUSE : DEFINE;
        from = to;
    }
    return to;
}
