/* view_text.c - a view as a tree for a terminal: scopes with what they sum up to, nodes below. */
#include <inttypes.h>
#include "view.h"

typedef struct { view_out out; const fg_view *v; const fg_view_options *o; const bool *open; } page;

static void indent(const page *p, int n)
{
    for (int i = 0; i < n; i++) fg__view_say(&p->out, "  ");
}

static void plain(const page *p, const char *s)
{
    for (; *s; s++) {
        const char one[2] = { (unsigned char)*s < 32 || *s == 127 ? '?' : *s, 0 };
        p->out.put(p->out.to, one);
    }
}

static void value_name(const page *p, int32_t x)
{
    const view_value *y = x < 0 ? NULL : &p->v->value[x];
    if (!y) fg__view_say(&p->out, "-");
    else if (y->name[0]) plain(p, y->name);
    else fg__view_say(&p->out, "%%%" PRId64, y->id);
}

static void costs(const page *p, double flops, double bytes, double time)
{
    view_words words;
    if (flops > 0) {
        fg__view_heat_words(flops, FG_HEAT_FLOPS, words);
        fg__view_say(&p->out, "  %s", words);
    }
    if (bytes > 0) {
        fg__view_bytes(bytes, words);
        fg__view_say(&p->out, "  %s", words);
    }
    if (time >= 0) {
        fg__view_heat_words(time, FG_HEAT_TIME, words);
        fg__view_say(&p->out, "  %s", words);
    }
}

static void statistics(const page *p, const view_value *x)
{
    if (!x->seen) return;
    fg__view_say(&p->out, "  [%.4g, %.4g] mean %.4g rms %.4g", x->least, x->greatest, x->mean,
                 x->rms);
    if (x->not_finite) fg__view_say(&p->out, " NOT FINITE: %" PRId64, x->not_finite);
}

static void node(const page *p, int32_t k, int depth)
{
    static const char *const mark[] = { "", "backward ", "update " };
    const view_node *n = &p->v->node[k];
    view_words words;
    indent(p, depth);
    for (int o = 0; o < n->n_out; o++) {
        fg__view_say(&p->out, o ? ", " : "");
        value_name(p, n->out[o]);
    }
    fg__view_say(&p->out, "%s%s", n->n_out ? " = " : "", n->recomputed ? "recomputed "
                 : mark[n->pass]);
    plain(p, n->op);
    fg__view_say(&p->out, "(");
    for (int i = 0; i < n->n_in; i++) {
        fg__view_say(&p->out, i ? ", " : "");
        value_name(p, n->in[i]);
    }
    fg__view_attrs(n, words);
    fg__view_say(&p->out, words[0] ? "; " : "");
    plain(p, words);
    fg__view_say(&p->out, ")");
    const view_value *x = n->n_out ? &p->v->value[n->out[0]] : NULL;
    if (x) {
        fg__view_shape(x, words);
        fg__view_say(&p->out, " -> %.20s %s", x->dtype, words);
    }
    costs(p, n->flops, n->bytes, n->time);
    if (x && x->laid && x->root == n->out[0])
        fg__view_say(&p->out, "  @%" PRId64 "+%" PRId64, x->offset, x->bytes);
    if (x && x->reused[0]) {
        fg__view_say(&p->out, "  (");
        plain(p, x->reused);
        fg__view_say(&p->out, ")");
    }
    if (x) statistics(p, x);
    fg__view_say(&p->out, "  ");
    plain(p, n->user[0] ? n->user : n->src);
    fg__view_say(&p->out, "\n");
    if (!n->error[0]) return;
    indent(p, depth + 1);
    fg__view_say(&p->out, "error: ");
    for (const char *s = n->error; *s; s++) {
        const char one[2] = { *s == '\n' || (unsigned char)*s >= 32 ? *s : '?', 0 };
        p->out.put(p->out.to, one);
    }
    fg__view_say(&p->out, "\n");
}

static double params_of(const page *p, const view_box *b)
{
    double sum = 0;
    const size_t n = strlen(b->path);
    for (int32_t i = 0; i < p->v->n_values; i++) {
        const view_value *x = &p->v->value[i];
        if (x->kind != VIEW_PARAM || strncmp(x->name, b->path, n) || (n && x->name[n] != '.'))
            continue;
        double count = 1;
        for (int k = 0; k < x->rank; k++) count *= (double)x->dim[k];
        sum += count;
    }
    return sum;
}

static void box(const page *p, int32_t at, int32_t count, const char *last, int depth)
{
    const fg_view *v = p->v;
    const view_box *b = &v->box[at];
    view_words words;
    double flops = 0, bytes = 0, time = v->timed ? 0 : -1;
    double again = 0, again_time = time;
    for (int32_t i = b->first; i < b->end; i++) {
        const view_node *n = &v->node[v->drawn[i]];
        flops += n->flops;
        bytes += n->bytes;
        if (n->time > 0) time += n->time;
        if (n->recomputed) again += n->flops;
        if (n->recomputed && n->time > 0) again_time += n->time;
    }
    indent(p, depth);
    plain(p, at ? b->name : v->model[0] ? v->model : "graph");
    if (count > 1) { fg__view_say(&p->out, " .. "); plain(p, last); }
    if (count > 1) fg__view_say(&p->out, "  x %d, each", (int)count);
    fg__view_say(&p->out, "  %d nodes", (int)(b->end - b->first));
    const double params = params_of(p, b);
    fg__view_amount(params, words);
    if (params > 0) fg__view_say(&p->out, "  %s parameters", words);
    costs(p, flops, bytes, time);
    fg__view_bytes((double)b->saved, words);
    if (b->saved) fg__view_say(&p->out, "  %s saved", words);
    if (again > 0) {
        costs(p, again, 0, again_time);
        fg__view_say(&p->out, " computed again");
    }
    fg__view_say(&p->out, "\n");
    if (!p->open[at]) return;
    for (int32_t i = 0; i < b->n_items; i++) {
        const view_item *x = &b->item[i];
        const int32_t inner = fg__view_shown(v, b, x);
        if (inner >= 0) {
            const char *end = x->kind == ITEM_RUN ? v->box[b->child[x->ref + x->count - 1]].name
                : "";
            box(p, inner, x->count, end, depth + 1);
        } else if (x->kind == ITEM_NODE) {
            node(p, x->ref, depth + 1);
            for (int32_t a = v->first_attached[x->ref]; a >= 0; a = v->node[a].next)
                node(p, a, depth + 2);
        } else {
            const int32_t value = x->kind == ITEM_INPUT ? x->ref : v->output[x->ref].value;
            indent(p, depth + 1);
            fg__view_say(&p->out, x->kind == ITEM_INPUT ? "input " : "output ");
            plain(p, x->kind == ITEM_INPUT ? v->value[value].name : v->output[x->ref].name);
            fg__view_shape(&v->value[value], words);
            fg__view_say(&p->out, " %.20s %s", v->value[value].dtype, words);
            if (x->kind == ITEM_OUTPUT) { fg__view_say(&p->out, " = "); value_name(p, value); }
            fg__view_say(&p->out, "\n");
        }
    }
}

fg_status fg_view_text(const fg_view *view, const fg_view_options *o, fg_put put, void *to)
{
    fg_view *v = (fg_view *)(uintptr_t)view;
    bool *open = fg__view_alloc(v, (size_t)v->n_boxes + 1, sizeof *open);
    view_words words;
    if (!open) return FG_ERR_MEMORY;
    const page p = { { put, to }, v, o, open };
    box(&p, fg__view_open(v, o, open), 1, "", 0);
    for (int32_t i = 0; i < v->n_plans && o->memory; i++) {
        const view_plan *q = &v->plan[i];
        const struct { const char *name; int64_t bytes; } part[] = {
            { "parameters", q->params }, { "states", q->states }, { "inputs", q->inputs },
            { "arena", q->arena }, { "scratch", q->scratch }, { "total", q->total } };
        fg__view_say(&p.out, "plan %d\n", (int)i);
        for (int k = 0; k < 6; k++) {
            fg__view_bytes((double)part[k].bytes, words);
            fg__view_say(&p.out, "  %-12s %12s\n", part[k].name, words);
        }
    }
    return FG_OK;
}
