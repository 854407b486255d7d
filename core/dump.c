/* dump.c - a graph as text: one line for every input, parameter, state and node, in order. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include "dump.h"

typedef struct {
    const fg_graph *g;
    const fg_plan *plan;                 /* NULL: only the graph is known */
    fg_put put;
    void *to;
} writer;

static void FG_PRINTF(2, 3) out(const writer *w, const char *fmt, ...)
{
    char text[1500];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    w->put(w->to, text);
}

const char *fg__attr_text(const fg_attr_field *f, const void *at, char *buf, size_t size)
{
    buf[0] = 0;
    if (!strcmp(f->type, "int")) snprintf(buf, size, "%d", *(const int *)at);
    else if (!strcmp(f->type, "bool"))
        snprintf(buf, size, "%s", *(const bool *)at ? "true" : "false");
    else if (!strcmp(f->type, "int64_t"))
        snprintf(buf, size, "%lld", (long long)*(const int64_t *)at);
    else if (!strcmp(f->type, "float")) snprintf(buf, size, "%.9g", (double)*(const float *)at);
    else if (!strcmp(f->type, "double")) snprintf(buf, size, "%.17g", *(const double *)at);
    else if (!strcmp(f->type, "fg_dtype"))
        snprintf(buf, size, "%s", fg_dtype_name(*(const fg_dtype *)at));
    else if (!strcmp(f->type, "fg_shape")) {
        const fg_shape *s = at;
        size_t n = (size_t)snprintf(buf, size, "[");
        for (int i = 0; i < s->rank && n < size; i++)
            n += (size_t)snprintf(buf + n, size - n, i ? ",%lld" : "%lld", (long long)s->dim[i]);
        if (n < size) snprintf(buf + n, size - n, "]");
    }
    return buf;
}

static void each_attr(const writer *w, const fg_node *n)
{
    size_t at = 0;
    for (const fg_attr_field *f = n->op->attrs; f->name; f++) {
        char value[200];
        at = (at + f->align - 1) & ~(f->align - 1);
        fg__attr_text(f, (const char *)n->attr + at, value, sizeof value);
        out(w, f != n->op->attrs ? ", %s=%s" : "%s=%s", f->name, value);
        at += f->size;
    }
}

static void value_name(const writer *w, uint32_t v, char *buf, size_t size)
{
    const fg_value *x = &w->g->values[v];
    if (!v) snprintf(buf, size, "-");
    else if (x->kind != FG_OF_NODE && x->name) snprintf(buf, size, "%s", x->name);
    else snprintf(buf, size, "%%%u", v);
}

const char *fg__pass_name(fg_pass p)
{
    return p == FG_PASS_FORWARD ? "forward" : p == FG_PASS_BACKWARD ? "backward" : "update";
}

static void text_node(const writer *w, const fg_node *n)
{
    const fg_graph *g = w->g;
    char name[256], shape[160], path[300];
    out(w, "  ");
    for (int o = 0; o < n->n_out; o++) out(w, o ? ", %%%u" : "%%%u", n->out[o]);
    out(w, " = %s(", n->op->name);
    for (int i = 0; i < n->n_in; i++) {
        value_name(w, n->in[i], name, sizeof name);
        out(w, i ? ", %s" : "%s", name);
    }
    if (n->op->attrs->name && n->n_in) out(w, "; ");
    each_attr(w, n);
    fg__value_text(&g->values[n->out[0]], shape, sizeof shape);
    fg__scope_path(g, n->scope, path, sizeof path);
    out(w, ") -> %s  %s:%d%s%s", shape, fg__base(n->at.file), n->at.line, path[0] ? "  " : "",
        path);
    if (w->plan) {
        const fg_slot *s = &w->plan->slots[n->out[0]];
        if (s->reused) out(w, "  (%s)", s->reused);
        else if (s->place == FG_IN_ARENA) out(w, "  @%zu+%zu", s->offset, s->bytes);
    }
    out(w, "%s\n", n->recomputed ? "  (recomputed)" : "");
}

static void text(const writer *w)
{
    const fg_graph *g = w->g;
    char shape[160];
    for (int kind = FG_OF_INPUT; kind <= FG_OF_STATE; kind++)
        for (uint32_t v = 1; v < g->n_values; v++) {
            static const char *const what[] = { "", "input", "param", "state" };
            if ((int)g->values[v].kind != kind || !g->values[v].name) continue;
            fg__value_text(&g->values[v], shape, sizeof shape);
            out(w, "%s %s %s\n", what[kind], g->values[v].name, shape);
        }
    int pass = -1;
    for (uint32_t k = 0; k < g->n_nodes; k++) {
        if ((int)g->nodes[k].pass != pass) out(w, "%s:\n", fg__pass_name(g->nodes[k].pass));
        pass = (int)g->nodes[k].pass;
        text_node(w, &g->nodes[k]);
    }
    for (uint32_t i = 0; i < g->n_outputs; i++)
        out(w, "output %s = %%%u\n", g->outputs[i].name, g->outputs[i].id);
    for (uint32_t i = 0; i < g->n_errors; i++) {
        w->put(w->to, "error ");
        w->put(w->to, g->errors[i].text);
        w->put(w->to, "\n");
    }
}

fg_status fg_graph_dump(const fg_graph *g, fg_dump_format f, fg_put put, void *to)
{
    if (!g) return FG_ERR_USAGE;
    const fg_json_part part = { g, NULL, FG_STAGE_BUILT };
    if (f == FG_DUMP_JSON) return fg_graph_json(1, &part, NULL, put, to);
    const writer w = { g, NULL, put, to };
    text(&w);
    return FG_OK;
}

fg_status fg_plan_dump(const fg_plan *p, fg_stage stage, fg_dump_format f, fg_put put, void *to)
{
    const fg_json_part part = { NULL, p, stage };
    if (!p || !p->graph || (stage != FG_STAGE_BUILT && !p->low)) return FG_ERR_USAGE;
    if (f == FG_DUMP_JSON) return fg_graph_json(1, &part, NULL, put, to);
    const bool laid = stage == FG_STAGE_PLANNED && p->slots && !p->status;
    const writer w = { stage == FG_STAGE_BUILT ? p->graph : p->low, laid ? p : NULL, put, to };
    text(&w);
    return FG_OK;
}
