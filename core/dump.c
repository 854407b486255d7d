/* dump.c - a graph as text, DOT or JSON. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include "plan.h"

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

/* A JSON or DOT string: quotes, backslashes and control characters escaped. */
static void quoted(const writer *w, const char *s)
{
    w->put(w->to, "\"");
    for (; s && *s; s++) {
        const unsigned char c = (unsigned char)*s;
        char piece[8];
        if (c == '"' || c == '\\') snprintf(piece, sizeof piece, "\\%c", c);
        else if (c < 32 || c == 127) snprintf(piece, sizeof piece, "\\u%04x", c);
        else snprintf(piece, sizeof piece, "%c", c);
        w->put(w->to, piece);
    }
    w->put(w->to, "\"");
}

static const char *attr_text(const fg_attr_field *f, const void *at, char *buf, size_t size)
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

/* Calls visit for every attribute of a node. */
static void each_attr(const writer *w, const fg_node *n, const char *between, bool json)
{
    size_t at = 0;
    for (const fg_attr_field *f = n->op->attrs; f->name; f++) {
        char value[200];
        at = (at + f->align - 1) & ~(f->align - 1);
        attr_text(f, (const char *)n->attr + at, value, sizeof value);
        const bool real = !strcmp(f->type, "float") || !strcmp(f->type, "double");
        const bool bare = !json || (strcmp(f->type, "fg_dtype") && !(real && strchr(value, 'n')));
        if (f != n->op->attrs) w->put(w->to, between);
        if (json) out(w, bare ? "\"%s\":%s" : "\"%s\":\"%s\"", f->name, value);
        else out(w, "%s=%s", f->name, value);
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

static const char *pass_name(fg_pass p)
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
    each_attr(w, n, ", ", false);
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
        if ((int)g->nodes[k].pass != pass) out(w, "%s:\n", pass_name(g->nodes[k].pass));
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

static void dot(const writer *w)
{
    const fg_graph *g = w->g;
    char label[400], shape[160];
    out(w, "digraph fox_graph {\n  rankdir=TB;\n"
           "  node [shape=box, fontname=\"sans-serif\", fontsize=10];\n");
    for (uint32_t v = 1; v < g->n_values; v++) {
        const fg_value *x = &g->values[v];
        if (x->kind == FG_OF_NODE || !x->name) continue;
        fg__value_text(x, shape, sizeof shape);
        snprintf(label, sizeof label, "%s %s", x->name, shape);
        out(w, "  v%u [shape=ellipse, label=", v);
        quoted(w, label);
        out(w, "];\n");
    }
    for (uint32_t k = 0; k < g->n_nodes; k++) {
        const fg_node *n = &g->nodes[k];
        char path[200];
        fg__scope_path(g, n->scope, path, sizeof path);
        fg__value_text(&g->values[n->out[0]], shape, sizeof shape);
        snprintf(label, sizeof label, "%s %s %s", n->op->name, shape, path);
        out(w, "  n%u [label=", k);
        quoted(w, label);
        out(w, "%s];\n", n->pass == FG_PASS_FORWARD ? "" : ", style=dashed");
        for (int i = 0; i < n->n_in; i++) {
            const fg_value *x = &g->values[n->in[i]];
            if (!n->in[i]) continue;
            if (x->node != FG_NO_NODE) out(w, "  n%u -> n%u;\n", x->node, k);
            else out(w, "  v%u -> n%u;\n", n->in[i], k);
        }
    }
    out(w, "}\n");
}

static void json_value(const writer *w, uint32_t v)
{
    const fg_value *x = &w->g->values[v];
    static const char *const kind[] = { "node", "input", "param", "state" };
    out(w, "{\"id\":%u,\"kind\":\"%s\",\"dtype\":\"%s\",\"shape\":[", v, kind[x->kind],
        fg_dtype_name(x->type));
    for (int i = 0; i < x->shape.rank; i++)
        out(w, i ? ",%lld" : "%lld", (long long)x->shape.dim[i]);
    out(w, "]");
    if (x->kind != FG_OF_NODE && x->name) { out(w, ",\"name\":"); quoted(w, x->name); }
    if (w->plan) {
        const fg_slot *s = &w->plan->slots[v];
        out(w, ",\"root\":%u,\"bytes\":%zu", s->root, s->bytes);
        if (s->place == FG_IN_ARENA && s->root == v)
            out(w, ",\"offset\":%zu,\"from\":%lld,\"to\":%lld", s->offset, (long long)s->from,
                (long long)s->to);
    }
    out(w, "}");
}

static void json_node(const writer *w, uint32_t k)
{
    const fg_node *n = &w->g->nodes[k];
    const fg_cost c = fg__cost_of(w->g, n);
    out(w, "{\"id\":%u,\"op\":\"%s\",\"pass\":\"%s\",\"scope\":%u,\"in\":[", k, n->op->name,
        pass_name(n->pass), n->scope);
    for (int i = 0; i < n->n_in; i++) out(w, i ? ",%u" : "%u", n->in[i]);
    out(w, "],\"out\":[");
    for (int o = 0; o < n->n_out; o++) out(w, o ? ",%u" : "%u", n->out[o]);
    out(w, "],\"attrs\":{");
    each_attr(w, n, ",", true);
    out(w, "},\"flops\":%.17g,\"bytes\":%.17g,\"pair\":", c.flops, c.bytes);
    if (n->pair == FG_NO_NODE) out(w, "null");
    else out(w, "%u", n->pair);
    out(w, ",\"recomputed\":%s,\"src\":", n->recomputed ? "true" : "false");
    char at[200];
    snprintf(at, sizeof at, "%.180s:%d", fg__base(n->at.file), n->at.line);
    quoted(w, at);
    out(w, "}");
}

static void json(const writer *w)
{
    const fg_graph *g = w->g;
    out(w, "{\"fox_graph\":1,\"scopes\":[");
    for (uint32_t s = 1; s < g->n_scopes; s++) {
        char path[300];
        fg__scope_path(g, s, path, sizeof path);
        out(w, "%s{\"id\":%u,\"parent\":%u,\"path\":", s > 1 ? ",\n" : "", s, g->scopes[s].parent);
        quoted(w, path);
        out(w, "}");
    }
    out(w, "],\n\"values\":[");
    for (uint32_t v = 1; v < g->n_values; v++) { if (v > 1) out(w, ",\n"); json_value(w, v); }
    out(w, "],\n\"nodes\":[");
    for (uint32_t k = 0; k < g->n_nodes; k++) { if (k) out(w, ",\n"); json_node(w, k); }
    out(w, "],\n\"outputs\":[");
    for (uint32_t i = 0; i < g->n_outputs; i++) {
        out(w, "%s{\"value\":%u,\"name\":", i ? "," : "", g->outputs[i].id);
        quoted(w, g->outputs[i].name);
        out(w, "}");
    }
    out(w, "]");
    if (w->plan)
        out(w, ",\n\"plan\":{\"arena\":%zu,\"params\":%zu,\"states\":%zu,\"inputs\":%zu,"
               "\"scratch\":%zu}",
            w->plan->arena_bytes, w->plan->info.params, w->plan->info.states, w->plan->io_bytes,
            w->plan->scratch_bytes);
    out(w, "}\n");
}

static fg_status dump(const writer *w, fg_dump_format f)
{
    if (f == FG_DUMP_TEXT) text(w);
    else if (f == FG_DUMP_DOT) dot(w);
    else if (f == FG_DUMP_JSON) json(w);
    else return FG_ERR_USAGE;
    return FG_OK;
}

fg_status fg_graph_dump(const fg_graph *g, fg_dump_format f, fg_put put, void *to)
{
    if (!g) return FG_ERR_USAGE;
    const writer w = { g, NULL, put, to };
    return dump(&w, f);
}

fg_status fg_plan_dump(const fg_plan *p, fg_stage stage, fg_dump_format f, fg_put put, void *to)
{
    if (!p || !p->graph || (stage != FG_STAGE_BUILT && !p->low)) return FG_ERR_USAGE;
    const bool laid = stage == FG_STAGE_PLANNED && p->slots && !p->status;
    const writer w = { stage == FG_STAGE_BUILT ? p->graph : p->low, laid ? p : NULL, put, to };
    return dump(&w, f);
}
