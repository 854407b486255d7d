/* status.c - error texts: an op states its rule, this file adds the user's line, inputs, scopes. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include "graph.h"

const char *fg_status_text(fg_status s)
{
    static const char *const text[FG_STATUS_COUNT] = {
#define X(name, t) t,
        FG_STATUS_MAP(X)
#undef X
    };
    return (unsigned)s < FG_STATUS_COUNT ? text[s] : "unknown status";
}

const char *fg__base(const char *path)
{
    const char *s = path ? strrchr(path, '/') : NULL;
    return s ? s + 1 : path ? path : "?";
}

fg_status fg__fail(fg_infer *c, fg_status s, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(c->graph->rule, sizeof c->graph->rule, fmt, ap);
    va_end(ap);
    return s;
}

typedef struct { char text[2400]; size_t n; } page;

static void FG_PRINTF(2, 3) say(page *p, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    const int n = vsnprintf(p->text + p->n, sizeof p->text - p->n, fmt, ap);
    va_end(ap);
    p->n = n < 0 ? p->n : p->n + (size_t)n < sizeof p->text ? p->n + (size_t)n : sizeof p->text - 1;
}

/* The innermost line that is not the library's own: the call itself, or a scope around it; the
 * call's, marked as ours, if there is none. */
static fg_loc users_line(const fg_graph *g, fg_loc at)
{
    for (uint32_t s = g->scope; s && at.ours; s = g->scopes[s].parent) at = g->scopes[s].at;
    return at;
}

static void say_input(page *p, const fg_graph *g, const char *name, int len, const fg_value *v)
{
    char shape[160];
    fg__value_text(v, shape, sizeof shape);
    say(p, "\n    %-7.*s %-22s ", len, name, shape);
    if (v->name) say(p, "%s", v->name);
    else if (v->failed) say(p, "from an earlier error");
    else if (v->node < g->n_nodes)
        say(p, "%s at %s:%d", g->nodes[v->node].op->name, fg__base(g->nodes[v->node].at.file),
            g->nodes[v->node].at.line);
}

void fg__error(fg_graph *g, fg_status s, const char *op, const char *names, fg_loc at, int n_in,
               const fg_tensor *in, const char *rule)
{
    if (g->silent) return;
    page p = { .n = 0 };
    const fg_loc user = users_line(g, at);
    if (!user.ours) say(&p, "%s:%d: ", fg__base(user.file), user.line);
    say(&p, "%s: %s", op, rule);
    for (int i = 0; i < n_in; i++) {
        int len = (int)strcspn(names, " ");
        if (in[i].graph == g && in[i].id && in[i].id < g->n_values)
            say_input(&p, g, names, len - (len && names[len - 1] == '?'), &g->values[in[i].id]);
        names += len;
        while (*names == ' ') names++;
    }
    if (at.ours && !user.ours)
        say(&p, "\n    by %s:%d in %s", fg__base(at.file), at.line, at.func);
    for (uint32_t sc = g->scope; sc; sc = g->scopes[sc].parent) {
        char path[300];
        if (!g->scopes[sc].name[0]) continue;
        fg__scope_path(g, sc, path, sizeof path);
        say(&p, "\n    in %s, opened at %s:%d", path, fg__base(g->scopes[sc].at.file),
            g->scopes[sc].at.line);
    }
    if (!g->status) g->status = s;
    if (!fg__grow((void **)&g->errors, &g->cap_errors, g->n_errors, sizeof *g->errors)) return;
    fg_error e = { .status = s, .text = fg__strdup(g, p.text), .op = fg__strdup(g, op), .at = at,
                   .scope = g->scope, .pass = g->pass, .n_in = n_in };
    for (int i = 0; i < n_in; i++)
        if (in[i].graph == g && in[i].id < g->n_values) e.in[i] = in[i].id;
    if (e.text && e.op) g->errors[g->n_errors++] = e;
}

fg_tensor (fg_fail)(fg_loc at, fg_tensor x, fg_status s, const char *fmt, ...)
{
    fg_graph *g = x.graph;
    if (!g || !x.id || x.id >= g->n_values) return x;
    if (!g->values[x.id].failed) {
        char rule[600];
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(rule, sizeof rule, fmt, ap);
        va_end(ap);
        fg__error(g, s, at.func, "", at, 0, NULL, rule);
    }
    fg_value v = g->values[x.id];
    v.failed = true;
    v.kind = FG_OF_NODE;
    v.name = NULL;
    v.node = FG_NO_NODE;
    v.out = 0;
    return (fg_tensor){ g, fg__new_value(g, v) };
}

fg_status   fg_graph_status(const fg_graph *g) { return g ? g->status : FG_ERR_MEMORY; }
int         fg_graph_errors(const fg_graph *g) { return g ? (int)g->n_errors : 0; }

const char *fg_graph_error(const fg_graph *g, int i)
{
    return g && i >= 0 && (uint32_t)i < g->n_errors ? g->errors[i].text : NULL;
}

const char *fg_graph_message(const fg_graph *g)
{
    if (!g) return fg_status_text(FG_ERR_MEMORY);
    return g->n_errors ? g->errors[0].text : fg_status_text(g->status);
}
