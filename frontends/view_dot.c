/* view_dot.c - a view for Graphviz: a cluster for every open box, one edge between two things. */
#include <inttypes.h>
#include "view.h"

typedef struct { view_out out; const fg_view *v; const bool *open; int32_t top; } page;
typedef struct { int64_t from, to; } arrow;          /* a node k is k, a closed box b is -1 - b */

/* A text in quotes.  "\n" begins a new line; no other escape comes through. */
static void quoted(const page *p, const char *s)
{
    fg__view_say(&p->out, "\"");
    for (; *s; s++) {
        char piece[4] = { *s, 0, 0, 0 };
        if (*s == '"' || *s == '\\') snprintf(piece, sizeof piece, "\\%c", *s);
        else if (*s == '\n') snprintf(piece, sizeof piece, "\\n");
        else if ((unsigned char)*s < 32 || *s == 127) piece[0] = '?';
        p->out.put(p->out.to, piece);
    }
    fg__view_say(&p->out, "\"");
}

static void name_of(int64_t what, view_words to)
{
    if (what < 0) snprintf(to, VIEW_WORDS, "s%" PRId64, -1 - what);
    else snprintf(to, VIEW_WORDS, "n%" PRId64, what);
}

static void node(const page *p, int32_t k)
{
    static const char *const color[] = { "#2f6fdd", "#d55e00", "#009e73" };
    const view_node *n = &p->v->node[k];
    view_words shape = "", name, label;
    fg__view_label(p->v, k, name);
    if (n->n_out) fg__view_shape(&p->v->value[n->out[0]], shape);
    snprintf(label, sizeof label, "%.60s%s%.60s\n%.60s", n->op, name[0] ? "  " : "", name, shape);
    if (!fg_text_is_utf8(label)) snprintf(label, sizeof label, "%.60s", shape);
    fg__view_say(&p->out, "n%d [color=\"%s\"%s, label=", (int)k, n->error[0] ? "#c9182b"
                 : color[n->pass],
                 n->recomputed ? ", style=dashed" : n->error[0]
                     ? ", style=filled, fillcolor=\"#fbd5d9\""
                 : n->view ? ", style=rounded" : "");
    quoted(p, label);
    if (n->error[0]) { fg__view_say(&p->out, ", tooltip="); quoted(p, n->error); }
    fg__view_say(&p->out, "];\n");
}

static void box(const page *p, int32_t at, int32_t count)
{
    const fg_view *v = p->v;
    const view_box *b = &v->box[at];
    view_words label, times = "";
    if (count > 1) snprintf(times, sizeof times, "  x %d", (int)count);
    snprintf(label, sizeof label, "%.180s%.20s", b->name, times);
    if (!fg_text_is_utf8(label)) snprintf(label, sizeof label, "...%.20s", times);
    if (!p->open[at]) {
        fg__view_say(&p->out, "s%d [shape=box3d, label=", (int)at);
        quoted(p, label);
        fg__view_say(&p->out, "];\n");
        return;
    }
    if (at) {
        fg__view_say(&p->out, "subgraph cluster_%d {\nlabel=", (int)at);
        quoted(p, label);
        fg__view_say(&p->out, ";\n");
    }
    for (int32_t i = 0; i < b->n_items; i++) {
        const view_item *x = &b->item[i];
        const int32_t inner = fg__view_shown(v, b, x);
        if (inner >= 0) box(p, inner, x->count);
        if (x->kind == ITEM_INPUT) {
            fg__view_say(&p->out, "v%d [shape=ellipse, label=", (int)x->ref);
            quoted(p, v->value[x->ref].name);
            fg__view_say(&p->out, "];\n");
        }
        if (x->kind == ITEM_OUTPUT) {
            fg__view_say(&p->out, "o%d [shape=ellipse, label=", (int)x->ref);
            quoted(p, v->output[x->ref].name);
            fg__view_say(&p->out, "];\n");
        }
        if (x->kind != ITEM_NODE) continue;
        node(p, x->ref);
        for (int32_t a = v->first_attached[x->ref]; a >= 0; a = v->node[a].next) node(p, a);
    }
    if (at) fg__view_say(&p->out, "}\n");
}

/* What a node is drawn as: itself, or the outermost closed box around it; INT64_MIN: not drawn. */
static int64_t drawn_as(const page *p, int32_t k)
{
    k = fg__view_stand_in(p->v, k);
    int64_t as = k;
    bool inside = p->top == 0;
    for (int32_t b = p->v->drawn_in[k]; b > 0; b = p->v->box[b].parent) {
        if (!p->open[b]) as = -1 - (int64_t)b;
        inside |= b == p->top;
        if (b == p->top) break;
    }
    return inside ? as : INT64_MIN;
}

static int by_ends(const void *a, const void *b)
{
    const arrow *x = a, *y = b;
    if (x->from != y->from) return x->from < y->from ? -1 : 1;
    return x->to < y->to ? -1 : x->to > y->to;
}

static bool arrows(const page *p)
{
    fg_view *v = (fg_view *)(uintptr_t)p->v;
    int64_t total = 0;
    for (int32_t k = 0; k < v->n_nodes; k++) total += v->node[k].n_in;
    arrow *list = fg__view_alloc(v, (size_t)total + 1, sizeof *list);
    int64_t n = 0;
    view_words from, to;
    if (!list) return false;
    for (int32_t k = 0; k < v->n_nodes; k++) {
        const int64_t end = drawn_as(p, k);
        for (int i = 0; i < v->node[k].n_in && end != INT64_MIN; i++) {
            const view_value *x = v->node[k].in[i] < 0 ? NULL : &v->value[v->node[k].in[i]];
            const int64_t start = x && x->maker >= 0 ? drawn_as(p, x->maker) : INT64_MIN;
            if (start != INT64_MIN && start != end) list[n++] = (arrow){ start, end };
            if (x && x->kind == VIEW_INPUT && !p->top && fg__view_flows(v, v->node[k].in[i]))
                list[n++] = (arrow){ INT64_MAX / 2 + v->node[k].in[i], end };
        }
    }
    qsort(list, (size_t)n, sizeof *list, by_ends);
    for (int64_t i = 0; i < n; i++) {
        if (i && !by_ends(&list[i], &list[i - 1])) continue;
        if (list[i].from >= INT64_MAX / 2)
            snprintf(from, sizeof from, "v%" PRId64, list[i].from - INT64_MAX / 2);
        else name_of(list[i].from, from);
        name_of(list[i].to, to);
        fg__view_say(&p->out, "%s -> %s;\n", from, to);
    }
    for (int32_t i = 0; i < v->n_outputs && !p->top; i++) {
        const int32_t m = v->value[v->output[i].value].maker;
        if (m < 0 || v->node[m].home != m) continue;
        name_of(drawn_as(p, m), from);
        fg__view_say(&p->out, "%s -> o%d;\n", from, (int)i);
    }
    return true;
}

fg_status fg_view_dot(const fg_view *view, const fg_view_options *o, fg_put put, void *to)
{
    fg_view *v = (fg_view *)(uintptr_t)view;
    bool *open = fg__view_alloc(v, (size_t)v->n_boxes + 1, sizeof *open);
    if (!open) return FG_ERR_MEMORY;
    const page p = { { put, to }, v, open, fg__view_open(v, o, open) };
    fg__view_say(&p.out,
                 "digraph fox_graph {\nrankdir=TB;\nnode [shape=box, fontname=\"sans-serif\", "
                 "fontsize=10];\nedge [arrowsize=0.6];\n");
    box(&p, p.top, 1);
    if (!arrows(&p)) return FG_ERR_MEMORY;
    fg__view_say(&p.out, "}\n");
    return FG_OK;
}
