/* plan.c - memory: which values share, where each lies, how much it takes at most.
 *
 * Values that nodes make live in one arena.  A value's memory is taken from the node that makes it
 * to the last node that reads it or a view of it; offsets are given largest first, each at the
 * lowest gap among those that live at the same time. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "plan.h"

fg_status fg__plan_fail(fg_plan *p, fg_status s, const char *fmt, ...)
{
    if (p->status) return p->status;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(p->message, sizeof p->message, fmt, ap);
    va_end(ap);
    return p->status = s;
}

static size_t round_up(size_t n) { return (n + 63) & ~(size_t)63; }

static void share(fg_plan *p, uint32_t v, uint32_t with, const char *why)
{
    p->slots[v].root = fg__root_of(p, with);
    p->slots[v].reused = why;
}

static bool is_output(const fg_graph *g, uint32_t v)
{
    for (uint32_t i = 0; i < g->n_outputs; i++) if (g->outputs[i].id == v) return true;
    return false;
}

/* Memory is overwritten at one step, so whoever reads the value before must come before that. */
static fg_status find_late_readers(fg_plan *p)
{
    const fg_graph *g = p->low;
    uint32_t *base = malloc(g->n_values * sizeof *base);
    uint32_t *by = malloc(g->n_values * sizeof *by);     /* who has overwritten the value */
    if (!by || !fg__bases(g, base)) {
        free(base);
        free(by);
        return fg__plan_fail(p, FG_ERR_MEMORY, "out of memory");
    }
    for (uint32_t v = 0; v < g->n_values; v++) by[v] = FG_NO_NODE;
    for (uint32_t k = 0; k < g->n_nodes && !p->status; k++) {
        const fg_node *n = &g->nodes[k];
        for (int i = 0; i < n->n_in && n->op->code->memory != FG_VIEW; i++) {
            const fg_node *before = by[base[n->in[i]]] == FG_NO_NODE ? NULL
                                  : &g->nodes[by[base[n->in[i]]]];
            const char *name = g->values[fg__root_of(p, n->in[i])].name;
            if (before)
                fg__plan_fail(p, FG_ERR_USAGE, "%s:%d: %s: reads %s as it was before %s at %s:%d "
                              "overwrote it, yet must run after that", fg__base(n->at.file),
                              n->at.line, n->op->name, name ? name : "a value", before->op->name,
                              fg__base(before->at.file), before->at.line);
        }
        for (int o = 0; o < fg__overwritten(n); o++)
            by[base[n->in[o]]] = k;
    }
    free(base);
    free(by);
    return p->status;
}

/* What changes in a run: moves[v] > 0 where v is, or lies in, a parameter or a copy of one that
 * nodes of the plan overwrite, and of parameters says how many do; kept[v] of such copies. */
typedef struct { uint32_t *moves; bool *kept; } changes;

/* False if out of memory. */
static bool find_changes(fg_plan *p, changes *c)
{
    const fg_graph *g = p->low;
    *c = (changes){ calloc(g->n_values, sizeof *c->moves), calloc(g->n_values, 1) };
    if (!c->moves || !c->kept) return false;
    for (uint32_t k = 0; k < g->n_nodes; k++) {
        const fg_node *n = &g->nodes[k];
        for (int o = 0; o < fg__overwritten(n); o++) {
            const uint32_t root = fg__root_of(p, n->in[o]);
            p->changes_params |= g->values[root].kind == FG_OF_PARAM;
            c->kept[n->in[o]] |= fg__is_copy(g, n, o);
            c->moves[root]++;
            if (n->in[o] != root) c->moves[n->in[o]]++;
        }
    }
    for (uint32_t k = 0; k < g->n_nodes; k++) {
        const fg_node *n = &g->nodes[k];
        for (int i = 0; i < n->n_in && p->quiet[k]; i++)
            if (n->in[i] && (c->moves[n->in[i]] || c->moves[fg__root_of(p, n->in[i])]))
                c->moves[n->out[0]] = 1;
    }
    return true;
}

/* All that node k reads is fixed, and stays as it is in a run or k's copy of it is kept up to date;
 * and no other node's memory is where k writes, but for the place of a part in a join that does not
 * copy. */
static bool stays_fixed(const fg_plan *p, const changes *c, uint32_t k)
{
    const fg_graph *g = p->low;
    const fg_node *n = &g->nodes[k];
    for (int i = 0; i < n->n_in; i++) {
        const fg_value *v = &g->values[n->in[i]];
        if (!n->in[i]) continue;
        const bool follows = c->kept[n->out[0]] && c->moves[n->in[i]] == 1;
        if (c->moves[n->in[i]] && !p->quiet[k] && !follows) return false;
        if (v->kind == FG_OF_PARAM) continue;
        if (v->kind != FG_OF_NODE || !p->fixed[v->node]) return false;
    }
    for (int o = 0; o < n->n_out; o++) {
        const uint32_t by = g->values[fg__root_of(p, n->out[o])].node;
        if (by != FG_NO_NODE && !p->fixed[by] && !p->quiet[by]) return false;
    }
    return true;
}

/* Casts and joins of weights, and what else depends on parameters alone, run again only when these
 * have changed from outside: in no step of decoding, once in several micro batches, and never in
 * training where what changes a parameter keeps its copy up to date. */
static fg_status find_fixed(fg_plan *p)
{
    const fg_graph *g = p->low;
    changes c;
    const bool ok = find_changes(p, &c);
    for (uint32_t k = 0; k < g->n_nodes && p->store->backend->fuses; k++)
        p->fixed[k] = ok && g->nodes[k].op->code->memory != FG_MUTATE;
    for (bool changed = ok; changed; ) {
        changed = false;
        for (uint32_t k = 0; k < g->n_nodes; k++) {
            if (!p->fixed[k] || stays_fixed(p, &c, k)) continue;
            p->fixed[k] = false;
            changed = true;
        }
    }
    free(c.moves);
    free(c.kept);
    return ok ? FG_OK : fg__plan_fail(p, FG_ERR_MEMORY, "out of memory");
}

static void find_lives(fg_plan *p)
{
    const fg_graph *g = p->low;
    for (uint32_t k = 0; k < g->n_nodes; k++) {
        const fg_node *n = &g->nodes[k];
        for (int o = 0; o < n->n_out; o++) {
            fg_slot *s = &p->slots[fg__root_of(p, n->out[o])];
            if (s->from < 0) s->from = k;
            if (s->to < (int64_t)k) s->to = k;
        }
        for (int i = 0; i < n->n_in; i++)
            if (n->in[i]) p->slots[fg__root_of(p, n->in[i])].to = k;
    }
    for (uint32_t i = 0; i < g->n_outputs; i++)
        p->slots[fg__root_of(p, g->outputs[i].id)].to = g->n_nodes;
    for (uint32_t k = 0; k < g->n_nodes; k++)
        for (int o = 0; o < g->nodes[k].n_out && p->fixed[k]; o++) {
            fg_slot *s = &p->slots[fg__root_of(p, g->nodes[k].out[o])];
            s->from = 0;
            s->to = g->n_nodes;
        }
}

/* May node k's output 0 take the memory of its input i? */
static bool fits_in_place(const fg_plan *p, uint32_t k, int i)
{
    const fg_node *n = &p->low->nodes[k];
    const uint32_t v = n->in[i], r = v ? fg__root_of(p, v) : 0;
    if (!v || p->slots[r].place != FG_IN_ARENA || p->slots[r].to != (int64_t)k) return false;
    const fg_value *from = &p->low->values[v], *to = &p->low->values[n->out[0]];
    const size_t *size = p->store->backend->size_of;
    if (fg_shape_count(from->shape) != fg_shape_count(to->shape)) return false;   /* broadcast */
    if (size[from->type] != size[to->type]) return false;
    if (p->slots[v].rows.width || p->slots[v].shift || p->slots[v].bytes != p->slots[r].bytes)
        return false;                                                      /* a part of something */
    for (int j = 0; j < n->n_in; j++) {
        if (!n->in[j] || fg__root_of(p, n->in[j]) != r) continue;
        if (n->in[j] != v || !(n->op->code->reuse >> j & 1)) return false;
    }
    return true;
}

static void reuse_in_place(fg_plan *p)
{
    const fg_graph *g = p->low;
    for (uint32_t k = 0; k < g->n_nodes; k++) {
        const fg_node *n = &g->nodes[k];
        if (!n->op->code->reuse || p->slots[n->out[0]].root != n->out[0]) continue;
        for (int i = 0; i < n->n_in; i++) {
            if (!(n->op->code->reuse >> i & 1) || !fits_in_place(p, k, i)) continue;
            const int64_t to = p->slots[n->out[0]].to;
            share(p, n->out[0], n->in[i], "in place");
            p->slots[p->slots[n->out[0]].root].to = to;
            break;
        }
    }
}

typedef struct { uint32_t id; size_t bytes; int64_t from; } item;

static int larger_first(const void *a, const void *b)
{
    const item *x = a, *y = b;
    if (x->bytes != y->bytes) return x->bytes < y->bytes ? 1 : -1;
    if (x->from != y->from) return x->from < y->from ? -1 : 1;
    return x->id < y->id ? -1 : x->id > y->id;
}

/* Placed values are kept sorted by offset; walk over those alive at the same time. */
static size_t lowest_gap(const fg_plan *p, const uint32_t *placed, uint32_t n, const fg_slot *s)
{
    size_t at = 0;
    for (uint32_t i = 0; i < n; i++) {
        const fg_slot *o = &p->slots[placed[i]];
        if (o->to < s->from || s->to < o->from) continue;
        if (at + s->bytes <= o->offset) break;
        if (o->offset + o->bytes > at) at = o->offset + o->bytes;
    }
    return at;
}

static fg_status place_arena(fg_plan *p)
{
    const fg_graph *g = p->low;
    item *items = malloc(g->n_values * sizeof *items);
    uint32_t *placed = malloc(g->n_values * sizeof *placed), n = 0;
    if (!items || !placed) {
        free(items);
        free(placed);
        return fg__plan_fail(p, FG_ERR_MEMORY, "out of memory");
    }
    for (uint32_t v = 1; v < g->n_values; v++)
        if (p->slots[v].place == FG_IN_ARENA && p->slots[v].root == v && p->slots[v].from >= 0)
            items[n++] = (item){ v, p->slots[v].bytes, p->slots[v].from };
    qsort(items, n, sizeof *items, larger_first);
    for (uint32_t i = 0; i < n; i++) {
        fg_slot *s = &p->slots[items[i].id];
        s->offset = lowest_gap(p, placed, i, s);
        if (s->offset + s->bytes > p->arena_bytes) p->arena_bytes = s->offset + s->bytes;
        uint32_t at = i;
        for (; at > 0 && p->slots[placed[at - 1]].offset > s->offset; at--)
            placed[at] = placed[at - 1];
        placed[at] = items[i].id;
    }
    free(items);
    free(placed);
    return FG_OK;
}

/* The step at which most bytes are alive, for the report. */
static fg_status find_peak(fg_plan *p)
{
    const fg_graph *g = p->low;
    int64_t *change = calloc((size_t)g->n_nodes + 2, sizeof *change), live = 0, most = -1;
    if (!change) return fg__plan_fail(p, FG_ERR_MEMORY, "out of memory");
    for (uint32_t v = 1; v < g->n_values; v++) {
        const fg_slot *s = &p->slots[v];
        if (s->place != FG_IN_ARENA || s->root != v || s->from < 0) continue;
        change[s->from] += (int64_t)s->bytes;
        change[s->to + 1 <= g->n_nodes ? s->to + 1 : g->n_nodes + 1] -= (int64_t)s->bytes;
    }
    for (uint32_t k = 0; k < g->n_nodes; k++) {
        live += change[k];
        if (live <= most) continue;
        most = live;
        char path[120];
        const fg_node *n = &g->nodes[k];
        fg__scope_path(g, n->scope, path, sizeof path);
        snprintf(p->info.peak_node, sizeof p->info.peak_node, "%s%s%s%s", path, path[0] ? "." : "",
                 n->op->name, n->pass == FG_PASS_BACKWARD ? " (backward)" : "");
    }
    free(change);
    return FG_OK;
}

/* Bytes that are there behind the last forward node, copies of weights apart. */
static void count_saved(fg_plan *p)
{
    const fg_graph *g = p->low;
    int64_t last = -1, backward = 0;
    for (uint32_t k = 0; k < g->n_nodes; k++) {
        if (g->nodes[k].pass == FG_PASS_FORWARD && !p->fixed[k]) last = k;
        backward += g->nodes[k].pass == FG_PASS_BACKWARD;
    }
    for (uint32_t v = 1; v < g->n_values && backward; v++) {
        const fg_slot *s = &p->slots[v];
        if (s->place != FG_IN_ARENA || s->root != v || p->fixed[g->values[v].node]) continue;
        if (s->from >= 0 && s->from <= last && s->to > last) p->info.saved += s->bytes;
    }
}

static fg_status count_costs(fg_plan *p)
{
    const fg_graph *g = p->low;
    fg_backend *b = p->store->backend;
    count_saved(p);
    for (uint32_t k = 0; k < g->n_nodes; k++) {
        fg_infer c;
        fg__infer_of(g, &g->nodes[k], &c);
        if (p->quiet[k]) continue;
        const fg_cost cost = fg__cost_of(g, &g->nodes[k]);
        if (!p->fixed[k]) p->info.flops += cost.flops;
        if (!p->fixed[k]) p->info.bytes += cost.bytes;
        if (g->nodes[k].recomputed) p->info.again_flops += cost.flops;
        const size_t need = round_up(b->ops->scratch(b, g->nodes[k].op, &c));
        if (need > p->scratch_bytes) p->scratch_bytes = need;
    }
    return FG_OK;
}

fg_cost fg__cost_of(const fg_graph *g, const fg_node *n)
{
    static const double size[FG_DTYPE_COUNT] = { 4, 2, 4 };
    fg_infer c;
    fg__infer_of(g, n, &c);
    fg_cost cost = { 0 };
    if (n->op->code->memory == FG_VIEW) return cost;
    if (n->op->code->cost) cost = n->op->code->cost(&c);
    if (cost.bytes > 0) return cost;
    for (int i = 0; i < c.n_in; i++)
        if (c.given[i]) cost.bytes += (double)fg_shape_count(c.in[i]) * size[c.in_type[i]];
    for (int o = 0; o < c.n_out; o++)
        cost.bytes += (double)fg_shape_count(c.out[o]) * size[c.out_type[o]];
    return cost;
}

/* No sum of sizes below may pass what a size_t holds. */
static fg_status check_total(fg_plan *p)
{
    double total = 0;
    for (uint32_t v = 1; v < p->low->n_values; v++) total += (double)p->slots[v].bytes;
    if (total < (double)(SIZE_MAX / 4)) return FG_OK;
    return fg__plan_fail(p, FG_ERR_MEMORY, "out of memory: %.3g bytes of values", total);
}

fg_status fg__lay_out(fg_plan *p)
{
    const fg_graph *g = p->low;
    const fg_backend *b = p->store->backend;
    p->slots = calloc(g->n_values, sizeof *p->slots);
    if (!p->slots) return fg__plan_fail(p, FG_ERR_MEMORY, "out of memory");
    for (uint32_t v = 1; v < g->n_values; v++) {
        const fg_value *x = &g->values[v];
        fg_slot *s = &p->slots[v];
        *s = (fg_slot){ .root = v, .from = -1, .to = -1 };
        s->bytes = round_up((size_t)fg_shape_count(x->shape) * b->size_of[x->type]);
        s->place = x->kind == FG_OF_NODE ? FG_IN_ARENA
                 : x->kind == FG_OF_INPUT ? FG_IN_IO : FG_IN_STORE;
        if (x->kind == FG_OF_INPUT) { s->offset = p->io_bytes; p->io_bytes += s->bytes; }
        if (x->kind == FG_OF_PARAM) p->info.params += s->bytes;
        if (x->kind == FG_OF_STATE) p->info.states += s->bytes;
    }
    fg_status st;
    if ((st = check_total(p)) || (st = fg__find_views(p)) || (st = find_late_readers(p))) return st;
    p->fixed = calloc((size_t)g->n_nodes + 1, sizeof *p->fixed);
    if (!p->fixed) return fg__plan_fail(p, FG_ERR_MEMORY, "out of memory");
    if (find_fixed(p)) return p->status;
    find_lives(p);
    reuse_in_place(p);
    if ((st = place_arena(p)) || (st = find_peak(p)) || (st = count_costs(p))) return st;
    p->info.inputs = p->io_bytes;
    p->info.activations = p->arena_bytes;
    p->info.scratch = p->scratch_bytes;
    p->info.total =
        p->info.params + p->info.states + p->io_bytes + p->arena_bytes + p->scratch_bytes;
    p->info.nodes = g->n_nodes;
    return FG_OK;
}

static void *place_of(const fg_plan *p, uint32_t v)
{
    size_t shift = 0;
    if (!v) return NULL;
    for (; p->slots[v].root != v; v = p->slots[v].root) shift += p->slots[v].shift;
    const fg_slot *s = &p->slots[v];
    switch (s->place) {
    case FG_IN_ARENA: return p->arena ? p->arena + s->offset + shift : NULL;
    case FG_IN_IO:    return p->io ? p->io + s->offset + shift : NULL;
    case FG_IN_STORE: return s->entry ? (char *)s->entry->data + shift : NULL;
    default:          return NULL;
    }
}

static fg_rows rows_of(const fg_plan *p, uint32_t v)
{
    const int64_t n = fg_shape_count(p->low->values[v].shape);
    return p->slots[v].rows.width ? p->slots[v].rows : (fg_rows){ n, n };
}

static fg_status take_memory(fg_plan *p)
{
    fg_backend *b = p->store->backend;
    struct { char **at; size_t bytes; const char *what; } need[] = {
        { &p->arena, p->arena_bytes, "activations" },
        { &p->io, p->io_bytes, "inputs" },
        { &p->scratch, p->scratch_bytes, "scratch" },
    };
    for (int i = 0; i < 3; i++) {
        if (!*need[i].at) *need[i].at = b->ops->alloc(b, need[i].bytes);
        if (!*need[i].at)
            return fg__plan_fail(p, FG_ERR_MEMORY,
                                 "out of memory: %zu bytes of %s on %s (%zu in all; most are "
                                 "alive at %s)", need[i].bytes, need[i].what, b->name,
                                 p->info.total, p->info.peak_node);
    }
    return FG_OK;
}

static fg_status take_entries(fg_plan *p)
{
    const fg_graph *g = p->low;
    for (uint32_t v = 1; v < g->n_values; v++) {
        const fg_value *x = &g->values[v];
        if (p->slots[v].place != FG_IN_STORE || x->kind == FG_OF_NODE) continue;
        const fg_entry *there = fg__store_entry(p->store, x->name);
        if (!there && x->kind == FG_OF_PARAM)
            return fg__plan_fail(p, FG_ERR_USAGE, "the store has no value for parameter %s",
                                 x->name);
        p->slots[v].entry = fg__store_need(p->store, x->name, x->type, x->shape);
        if (!p->slots[v].entry) {
            fg__plan_fail(p, fg_store_status(p->store), "%s", fg_store_message(p->store));
            fg_store_clear_error(p->store);
            return p->status;
        }
    }
    return FG_OK;
}

fg_status fg__prepare(fg_plan *p)
{
    if (p->status || p->ready) return p->status;
    const fg_graph *g = p->low;
    fg_backend *b = p->store->backend;
    if (take_entries(p) || take_memory(p)) return p->status;
    const size_t per = FG_MAX_IN + FG_MAX_OUT;
    if (!p->execs) p->execs = calloc((size_t)g->n_nodes + 1, sizeof *p->execs);
    if (!p->shapes) p->shapes = calloc((size_t)g->n_nodes * per + 1, sizeof *p->shapes);
    if (!p->types) p->types = calloc((size_t)g->n_nodes * per + 1, sizeof *p->types);
    if (!p->rows) p->rows = calloc((size_t)g->n_nodes * per + 1, sizeof *p->rows);
    if (!p->execs || !p->shapes || !p->types || !p->rows)
        return fg__plan_fail(p, FG_ERR_MEMORY, "out of memory");
    for (uint32_t k = 0; k < g->n_nodes; k++) {
        const fg_node *n = &g->nodes[k];
        fg_shape *shape = p->shapes + k * per;
        fg_dtype *type = p->types + k * per;
        fg_rows *rows = p->rows + k * per;
        fg_exec *e = &p->execs[k];
        *e = (fg_exec){ .attr = n->attr, .n_in = n->n_in, .n_out = n->n_out, .threads = b->threads,
                        .in_shape = shape, .out_shape = shape + FG_MAX_IN, .in_type = type,
                        .out_type = type + FG_MAX_IN, .in_rows = rows,
                        .out_rows = rows + FG_MAX_IN, .scratch = p->scratch };
        for (int i = 0; i < n->n_in; i++) {
            e->in[i] = place_of(p, n->in[i]);
            shape[i] = g->values[n->in[i]].shape;
            type[i] = g->values[n->in[i]].type;
            rows[i] = rows_of(p, n->in[i]);
        }
        for (int o = 0; o < n->n_out; o++) {
            e->out[o] = place_of(p, n->out[o]);
            shape[FG_MAX_IN + o] = g->values[n->out[o]].shape;
            type[FG_MAX_IN + o] = g->values[n->out[o]].type;
            rows[FG_MAX_IN + o] = rows_of(p, n->out[o]);
        }
    }
    for (uint32_t v = 1; v < g->n_values; v++) {
        const fg_value *x = &g->values[v];
        if (!x->given) continue;
        const fg_status s = b->ops->upload(b, place_of(p, v), x->given, fg_shape_count(x->shape),
                                           FG_I32);
        if (s) return fg__plan_fail(p, s, "%s: %s", x->name, fg_backend_message(b));
    }
    p->ready = true;
    return FG_OK;
}

void *fg__plan_data(fg_plan *p, fg_tensor t)
{
    if (!p || t.graph != p->graph || !t.id || t.id >= p->n_map || fg__prepare(p)) return NULL;
    return place_of(p, p->map[t.id]);
}

bool fg__plan_keeps(const fg_plan *p, uint32_t low_id)
{
    if (!low_id) return false;
    const fg_slot *s = &p->slots[fg__root_of(p, low_id)];
    return s->place != FG_IN_ARENA || is_output(p->low, low_id);
}
