/* views.c - which values lie in the memory of others.
 *
 * A view is its input's memory; what overwrites a state is the state's.  A span of a tensor along
 * one axis (FG_PART) is read in place where every reader takes rows of that pitch, and the parts
 * of a join (FG_JOIN) are made in place where their makers do: then neither is copied.  That is
 * how the products of one input become one product without a copy on either side.
 *
 * Where a value lies: element i at i / width * pitch + i % width behind its start, which is `shift`
 * bytes behind its root's.  An outer axis taken apart leaves both ends contiguous. */
#include <stdio.h>
#include <stdlib.h>
#include "plan.h"

enum { ALIGNED = 16 };                   /* bytes at which a row may begin */

typedef struct { uint32_t node; int at; bool made; } touch;    /* input or output `at` of a node */

typedef struct {
    fg_plan *p;
    uint32_t *base;                      /* per value: what it is a view of, or itself */
    uint32_t *start;                     /* touches of v: touches[start[v] .. start[v+1]) */
    touch *touches;                      /* of the value or of a view of it */
} finder;

uint32_t fg__root_of(const fg_plan *p, uint32_t v)
{
    while (p->slots[v].root != v) v = p->slots[v].root;
    return v;
}

/* v lies at `shift` bytes in `with`, whose own place may be found later. */
static void share(fg_plan *p, uint32_t v, uint32_t with, size_t shift, const char *why)
{
    p->slots[v].root = with;
    p->slots[v].shift = shift;
    p->slots[v].reused = why;
}

bool fg__is_copy(const fg_graph *g, const fg_node *n, int i)
{
    const fg_value *v = &g->values[n->in[i]];
    const fg_node *made = v->kind == FG_OF_NODE ? &g->nodes[v->node] : NULL;
    if (!made || made->op->code->memory != FG_FRESH) return false;
    if (made->n_in != 1 || made->n_out != 1) return false;
    for (int o = 0; o < fg__overwritten(n); o++)
        if (n->in[o] == made->in[0]) return g->values[n->in[o]].kind == FG_OF_PARAM;
    return false;
}

static bool overwrites(finder *f, uint32_t k)
{
    fg_plan *p = f->p;
    const fg_node *n = &p->low->nodes[k];
    for (int o = 0; o < fg__overwritten(n); o++) {
        if (p->slots[fg__root_of(p, n->in[o])].place != FG_IN_STORE &&
            !fg__is_copy(p->low, n, o)) {
            fg__plan_fail(p, FG_ERR_USAGE,
                          "%s:%d: %s: overwrites its input %d, which is neither a parameter nor a "
                          "state", fg__base(n->at.file), n->at.line, n->op->name, o);
            return false;
        }
        share(p, n->out[o], n->in[o], 0, "overwrites");
    }
    return true;
}

static bool list_touches(finder *f)
{
    const fg_graph *g = f->p->low;
    size_t total = 0;
    f->base = malloc(g->n_values * sizeof *f->base);
    f->start = calloc((size_t)g->n_values + 2, sizeof *f->start);
    if (!fg__bases(g, f->base) || !f->start) return false;
    for (int fill = 0; fill < 2; fill++) {
        for (uint32_t k = 0; k < g->n_nodes; k++) {
            const fg_node *n = &g->nodes[k];
            if (n->op->code->memory == FG_VIEW) continue;
            for (int i = 0; i < n->n_in + n->n_out; i++) {
                const bool made = i >= n->n_in;
                const int at = made ? i - n->n_in : i;
                const uint32_t v = f->base[made ? n->out[at] : n->in[at]];
                if (fill) f->touches[f->start[v + 1]++] = (touch){ k, at, made };
                else { f->start[v + 2]++; total++; }
            }
        }
        if (fill) break;
        f->touches = malloc((total + 1) * sizeof *f->touches);
        if (!f->touches) return false;
        for (uint32_t v = 1; v < g->n_values + 2; v++) f->start[v] += f->start[v - 1];
    }
    return true;
}

/* Do all that read or make base take rows of a pitch?  Its joiner or parter does by nature. */
static bool all_take(const finder *f, uint32_t base, uint32_t except)
{
    const fg_plan *p = f->p;
    fg_backend *b = p->store->backend;
    for (uint32_t i = 0; i < p->low->n_outputs; i++)         /* they are read as a whole */
        if (f->base[p->low->outputs[i].id] == base) return false;
    for (uint32_t t = f->start[base]; t < f->start[base + 1]; t++) {
        const touch *x = &f->touches[t];
        const fg_op *op = p->low->nodes[x->node].op;
        if (x->node == except) continue;
        if (!b->ops->pitched(b, op, x->at, x->made)) return false;
    }
    return true;
}

/* Where a span of n elements that starts at `start` of an axis of `whole` lies; in: the value's
 * own rows.  Returns false if no single width and pitch say so. */
static bool span_rows(const fg_value *whole, const fg_value *part, int axis, int64_t start,
                      fg_rows in, fg_rows *rows, int64_t *first)
{
    int64_t outer = 1, inner = 1;
    for (int i = 0; i < axis; i++) outer *= whole->shape.dim[i];
    for (int i = axis + 1; i < whole->shape.rank; i++) inner *= whole->shape.dim[i];
    const int64_t line = whole->shape.dim[axis] * inner, width = part->shape.dim[axis] * inner;
    *first = start * inner;
    if (outer == 1 && in.width == in.pitch) { *rows = (fg_rows){ 0, 0 }; return true; }
    if (in.width != in.pitch && in.width != line) return false;
    *rows = (fg_rows){ width, in.width == in.pitch ? line : in.pitch };
    return true;
}

/* The span of `whole` as the place of `part`: true if that place is aligned and all may use it. */
static bool fits_span(const finder *f, uint32_t whole, uint32_t part, int axis, int64_t start,
                      uint32_t except, fg_rows *rows, size_t *shift)
{
    const fg_plan *p = f->p;
    const fg_value *w = &p->low->values[whole], *v = &p->low->values[part];
    const size_t size = p->store->backend->size_of[w->type];
    int64_t first;
    if (w->type != v->type) return false;
    if (!span_rows(w, v, axis, start, p->slots[whole].rows, rows, &first)) return false;
    *shift = (size_t)first * size;
    if (*shift % ALIGNED || (size_t)rows->pitch * size % ALIGNED) return false;
    return rows->width == rows->pitch || all_take(f, f->base[part], except);
}

/* The value with which the chain of views of v begins, and v's own views, get v's place. */
static void place_views(finder *f, uint32_t base, fg_rows rows)
{
    const fg_graph *g = f->p->low;
    for (uint32_t v = 1; v < g->n_values; v++)
        if (f->base[v] == base) f->p->slots[v].rows = rows;
}

static void part_in_place(finder *f, uint32_t k)
{
    fg_plan *p = f->p;
    const fg_node *n = &p->low->nodes[k];
    int axis;
    int64_t start;
    fg_rows rows;
    size_t shift;
    n->op->code->span(n->attr, &axis, &start);
    if (!fits_span(f, n->in[0], n->out[0], axis, start, k, &rows, &shift)) return;
    share(p, n->out[0], n->in[0], shift, "part");
    place_views(f, n->out[0], rows);
    p->quiet[k] = true;
}

/* May base, part of a join, be made elsewhere than in memory of its own? */
static bool may_move(const finder *f, uint32_t base)
{
    const fg_plan *p = f->p;
    const fg_value *v = &p->low->values[base];
    int joins = 0;
    if (p->slots[base].place != FG_IN_ARENA || p->slots[base].root != base) return false;
    if (v->kind != FG_OF_NODE || v->node == FG_NO_NODE) return false;
    const fg_memory_use use = p->low->nodes[v->node].op->code->memory;
    if (use != FG_FRESH && use != FG_JOIN) return false;
    for (uint32_t t = f->start[base]; t < f->start[base + 1]; t++) {
        const touch *x = &f->touches[t];
        if (!x->made && p->low->nodes[x->node].op->code->memory == FG_JOIN) joins++;
        if (!x->made && p->low->nodes[x->node].op->code->memory == FG_PART) return false;
    }
    for (uint32_t i = 0; i < p->low->n_outputs; i++)
        if (f->base[p->low->outputs[i].id] == base) return false;
    return joins == 1;
}

/* The parts that can are made in place; if not all can, the join copies the others to theirs. */
static void join_in_place(finder *f, uint32_t k)
{
    fg_plan *p = f->p;
    const fg_node *n = &p->low->nodes[k];
    fg_rows rows[FG_MAX_IN];
    size_t shift[FG_MAX_IN];
    bool fits[FG_MAX_IN], all = true;
    int axis;
    int64_t start;
    n->op->code->span(n->attr, &axis, &start);
    for (int i = 0; i < n->n_in; i++) {
        fits[i] = n->in[i] && may_move(f, f->base[n->in[i]]) &&
                  fits_span(f, n->out[0], n->in[i], axis, start, k, &rows[i], &shift[i]);
        all = all && fits[i];
        start += p->low->values[n->in[i]].shape.dim[axis];
    }
    for (int i = 0; i < n->n_in; i++) {
        if (!fits[i] || (!all && rows[i].width == rows[i].pitch)) continue;
        if (!all && !p->store->backend->ops->pitched(p->store->backend, n->op, i, false)) continue;
        share(p, f->base[n->in[i]], n->out[0], shift[i], "joined");
        place_views(f, f->base[n->in[i]], rows[i]);
    }
    p->quiet[k] = all;
}

fg_status fg__find_views(fg_plan *p)
{
    const fg_graph *g = p->low;
    finder f = { .p = p };
    bool ok = true;
    p->quiet = calloc((size_t)g->n_nodes + 1, sizeof *p->quiet);
    if (!p->quiet || !list_touches(&f)) {
        free(f.base); free(f.start); free(f.touches);
        return fg__plan_fail(p, FG_ERR_MEMORY, "out of memory");
    }
    for (uint32_t k = 0; ok && k < g->n_nodes; k++) {
        const fg_node *n = &g->nodes[k];
        p->quiet[k] = n->op->code->memory == FG_VIEW;
        if (p->quiet[k]) share(p, n->out[0], n->in[0], 0, "view");
        if (n->op->code->memory == FG_MUTATE) ok = overwrites(&f, k);
    }
    const bool pitches = ok && p->store->backend->ops->pitched;
    for (uint32_t k = g->n_nodes; pitches && k-- > 0;)       /* what joins joins first */
        if (g->nodes[k].op->code->memory == FG_JOIN) join_in_place(&f, k);
    for (uint32_t k = 0; pitches && k < g->n_nodes; k++)
        if (g->nodes[k].op->code->memory == FG_PART) part_in_place(&f, k);
    free(f.base); free(f.start); free(f.touches);
    return p->status;
}
