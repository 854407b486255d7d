/* dump_json.c - graph.json: one or several graphs as JSON, the source of every picture and report.
 *
 * docs/graph.schema.json is the format, docs/viewer.md explains it.  Several graphs become one:
 * ids of a later graph's values, nodes and scopes follow on those of the earlier ones, and a named
 * value that an earlier graph has, too, keeps its id there. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "dump.h"
#include "fox_json.h"

typedef struct {
    const fg_graph *g;
    const fg_plan *plan;                 /* NULL: only the graph is known */
    uint32_t *id;                        /* value -> its id in the file, 0: left out */
    bool     *new;                       /* value -> this part is the one that writes it */
    uint32_t first_node, first_scope;
} part;

typedef struct {
    part    *parts;
    int      n;
    unsigned passes;
    bool     stable;
    uint32_t errors_at;                  /* id of the first node that was not made */
    fg_put   put;
    void    *to;
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

/* Bytes of the UTF-8 character at s; 0 if it is none, and "?" is written for the byte. */
static int character(const char *s)
{
    const int n = (*s & 0x80) == 0 ? 1 : (*s & 0xe0) == 0xc0 ? 2 : (*s & 0xf0) == 0xe0 ? 3 : 4;
    char one[5] = "";
    for (int i = 0; i < n && s[i]; i++) one[i] = s[i];
    return (int)strlen(one) == n && fg_text_is_utf8(one) ? n : 0;
}

static void quoted(const writer *w, const char *s)
{
    w->put(w->to, "\"");
    while (s && *s) {
        const unsigned char c = (unsigned char)*s;
        const int n = character(s);
        char piece[8];
        if (c == '"' || c == '\\') snprintf(piece, sizeof piece, "\\%c", c);
        else if (c < 32 || c == 127) snprintf(piece, sizeof piece, "\\u%04x", c);
        else snprintf(piece, sizeof piece, "%.*s", n ? n : 1, n ? s : "?");
        w->put(w->to, piece);
        s += n ? n : 1;
    }
    w->put(w->to, "\"");
}

static void field(const writer *w, const char *key, const char *value)
{
    if (!value || !value[0]) return;
    out(w, ",\"%s\":", key);
    quoted(w, value);
}

static void real(const writer *w, const char *key, double x)
{
    if (isfinite(x)) out(w, "\"%s\":%.10g", key, x);
    else out(w, "\"%s\":null", key);
}

static bool shown(const writer *w, const fg_node *n)
{
    return w->passes >> n->pass & 1;
}

/* "fox.c:12", the line in the caller's own file where the library was called from, or "". */
static void place(const writer *w, const char *key, fg_loc at)
{
    char text[200];
    if (!at.file) return;
    snprintf(text, sizeof text, "%.180s:%d", fg__base(at.file), at.line);
    field(w, key, text);
}

static fg_loc users_line(const fg_graph *g, uint32_t scope, fg_loc at)
{
    for (uint32_t s = scope; s && at.ours; s = g->scopes[s].parent) at = g->scopes[s].at;
    return at.ours ? (fg_loc){ 0 } : at;
}

/* ---- scopes, values -------------------------------------------------------------------------- */

static void scopes(const writer *w)
{
    bool first = true;
    for (int i = 0; i < w->n; i++) {
        const part *p = &w->parts[i];
        for (uint32_t s = 1; s < p->g->n_scopes; s++) {
            const fg_scope *x = &p->g->scopes[s];
            char path[300];
            fg__scope_path(p->g, s, path, sizeof path);
            out(w, "%s{\"id\":%u,\"parent\":%u,\"path\":", first ? "" : ",\n", p->first_scope + s,
                x->parent ? p->first_scope + x->parent : 0);
            quoted(w, path);
            field(w, "name", x->name);
            place(w, "src", x->at);
            out(w, "%s}", x->recompute ? ",\"recompute\":true" : "");
            first = false;
        }
    }
}

static void slot(const writer *w, const part *p, uint32_t v)
{
    static const char *const where[] = { "arena", "io", "store", "none" };
    const uint32_t root = fg__root_of(p->plan, v);
    const fg_slot *s = &p->plan->slots[v], *r = &p->plan->slots[root];
    out(w, ",\"root\":%u,\"place\":\"%s\"", p->id[root], where[r->place]);
    if (s->shift) out(w, ",\"shift\":%zu", s->shift);
    if (s->reused) field(w, "reused", s->reused);
    if (root != v || r->place != FG_IN_ARENA || r->from < 0) return;
    const int64_t last = p->g->n_nodes ? (int64_t)p->g->n_nodes - 1 : 0;
    out(w, ",\"offset\":%zu,\"from\":%lld,\"to\":%lld", r->offset,
        (long long)p->first_node + (long long)r->from,
        (long long)p->first_node + (long long)(r->to > last ? last : r->to));
}

static void statistics(const writer *w, const fg_record *r)
{
    out(w, ",\"stats\":{");
    real(w, "min", r->least);
    w->put(w->to, ",");
    real(w, "max", r->greatest);
    w->put(w->to, ",");
    real(w, "mean", r->mean);
    w->put(w->to, ",");
    real(w, "rms", r->rms);
    out(w, ",\"not_finite\":%lld}", (long long)r->not_finite);
}

static void value(const writer *w, const part *p, uint32_t v)
{
    static const char *const kind[] = { "node", "input", "param", "state" };
    static const size_t size[FG_DTYPE_COUNT] = { 4, 2, 4 };
    const fg_value *x = &p->g->values[v];
    const size_t bytes = p->plan ? p->plan->slots[v].bytes
                                 : (size_t)fg_shape_count(x->shape) * size[x->type];
    out(w, "{\"id\":%u,\"kind\":\"%s\",\"dtype\":\"%s\",\"shape\":[", p->id[v], kind[x->kind],
        fg_dtype_name(x->type));
    for (int i = 0; i < x->shape.rank; i++)
        out(w, i ? ",%lld" : "%lld", (long long)x->shape.dim[i]);
    out(w, "],\"bytes\":%zu", bytes);
    if (x->kind != FG_OF_NODE) field(w, "name", x->name);
    if (x->kind == FG_OF_PARAM && x->init.frozen) out(w, ",\"frozen\":true");
    if (x->failed) out(w, ",\"failed\":true");
    if (p->plan) slot(w, p, v);
    const fg_record *r = p->plan && p->plan->records ? &p->plan->records[v] : NULL;
    if (r && r->seen && !w->stable) statistics(w, r);
    out(w, "}");
}

static void values(const writer *w)
{
    bool first = true;
    for (int i = 0; i < w->n; i++)
        for (uint32_t v = 1; v < w->parts[i].g->n_values; v++) {
            if (!w->parts[i].new[v]) continue;
            if (!first) out(w, ",\n");
            value(w, &w->parts[i], v);
            first = false;
        }
}

/* ---- nodes ----------------------------------------------------------------------------------- */

static void attributes(const writer *w, const fg_node *n)
{
    size_t at = 0;
    for (const fg_attr_field *f = n->op->attrs; f->name; f++) {
        char value_text[200];
        at = (at + f->align - 1) & ~(f->align - 1);
        fg__attr_text(f, (const char *)n->attr + at, value_text, sizeof value_text);
        const bool of_real = !strcmp(f->type, "float") || !strcmp(f->type, "double");
        const bool bare = strcmp(f->type, "fg_dtype") && !(of_real && strchr(value_text, 'n'));
        out(w, bare ? "%s\"%s\":%s" : "%s\"%s\":\"%s\"", f != n->op->attrs ? "," : "", f->name,
            value_text);
        at += f->size;
    }
}

static void ids(const writer *w, const char *key, const part *p, const uint32_t *v, int n)
{
    out(w, "\"%s\":[", key);
    for (int i = 0; i < n; i++) out(w, i ? ",%u" : "%u", p->id[v[i]]);
    out(w, "]");
}

static void node(const writer *w, const part *p, uint32_t k)
{
    const fg_node *n = &p->g->nodes[k];
    const fg_cost c = fg__cost_of(p->g, n);
    out(w, "{\"id\":%u,\"op\":\"%s\",\"pass\":\"%s\",\"scope\":%u,", p->first_node + k, n->op->name,
        fg__pass_name(n->pass), n->scope ? p->first_scope + n->scope : 0);
    ids(w, "in", p, n->in, n->n_in);
    w->put(w->to, ",");
    ids(w, "out", p, n->out, n->n_out);
    out(w, ",\"attrs\":{");
    attributes(w, n);
    out(w, "},\"flops\":%.17g,\"bytes\":%.17g,\"pair\":", c.flops, c.bytes);
    if (n->pair == FG_NO_NODE) out(w, "null");
    else out(w, "%u", p->first_node + n->pair);
    static const char *const memory[] = { "", "view", "part", "join", "overwrites" };
    field(w, "memory", memory[n->op->code->memory]);
    if (p->plan && p->plan->fixed && p->plan->fixed[k]) out(w, ",\"fixed\":true");
    out(w, ",\"recomputed\":%s", n->recomputed ? "true" : "false");
    place(w, "src", n->at);
    place(w, "user", users_line(p->g, n->scope, n->at));
    const fg_record *r = p->plan && p->plan->records ? &p->plan->records[n->out[0]] : NULL;
    if (r && r->timed && !w->stable) out(w, ",\"time_us\":%.6g", r->seconds * 1e6);
    out(w, "}");
}

/* A node that an error kept from being made: its inputs as far as they are there, no output. */
static void failed_node(const writer *w, const part *p, uint32_t e, uint32_t id)
{
    const fg_error *x = &p->g->errors[e];
    out(w, "{\"id\":%u,\"op\":", id);
    quoted(w, x->op);
    out(w, ",\"pass\":\"%s\",\"scope\":%u,", fg__pass_name(x->pass),
        x->scope ? p->first_scope + x->scope : 0);
    ids(w, "in", p, x->in, x->n_in);
    out(w, ",\"out\":[],\"attrs\":{},\"flops\":0,\"bytes\":0,\"pair\":null,\"recomputed\":false");
    place(w, "src", x->at);
    place(w, "user", users_line(p->g, x->scope, x->at));
    field(w, "error", x->text);
    out(w, "}");
}

static void nodes(const writer *w)
{
    bool first = true;
    uint32_t id = w->errors_at;
    for (int i = 0; i < w->n; i++)
        for (uint32_t k = 0; k < w->parts[i].g->n_nodes; k++) {
            if (!shown(w, &w->parts[i].g->nodes[k])) continue;
            if (!first) out(w, ",\n");
            node(w, &w->parts[i], k);
            first = false;
        }
    for (int i = 0; i < w->n; i++)
        for (uint32_t e = 0; e < w->parts[i].g->n_errors; e++) {
            out(w, first ? "" : ",\n");
            failed_node(w, &w->parts[i], e, id++);
            first = false;
        }
}

/* The lines of ops.def that the graphs use. */
static void ops(const writer *w)
{
    const fg_op *seen[512];
    int n = 0;
    for (int i = 0; i < w->n; i++)
        for (uint32_t k = 0; k < w->parts[i].g->n_nodes; k++) {
            const fg_op *op = w->parts[i].g->nodes[k].op;
            int at = 0;
            while (at < n && seen[at] != op) at++;
            if (at < n || n == 512 || !shown(w, &w->parts[i].g->nodes[k])) continue;
            out(w, "%s{\"name\":\"%s\",\"ins\":", n ? ",\n" : "", op->name);
            seen[n++] = op;
            quoted(w, op->ins);
            out(w, ",\"outs\":");
            quoted(w, op->outs);
            out(w, ",\"formula\":");
            quoted(w, op->formula);
            out(w, "}");
        }
}

/* ---- totals, plans --------------------------------------------------------------------------- */

static void totals(const writer *w)
{
    fg_cost sum[3] = { { 0, 0 } };
    for (int i = 0; i < w->n; i++)
        for (uint32_t k = 0; k < w->parts[i].g->n_nodes; k++) {
            const fg_node *n = &w->parts[i].g->nodes[k];
            const fg_cost c = fg__cost_of(w->parts[i].g, n);
            const fg_plan *p = w->parts[i].plan;
            if (!shown(w, n) || (p && p->fixed && p->fixed[k])) continue;
            sum[n->pass].flops += c.flops;
            sum[n->pass].bytes += c.bytes;
        }
    for (int i = 0; i < 3; i++)
        out(w, "%s\"%s\":{\"flops\":%.17g,\"bytes\":%.17g}", i ? "," : "",
            fg__pass_name((fg_pass)i), sum[i].flops, sum[i].bytes);
}

static void plans(const writer *w)
{
    for (int i = 0; i < w->n; i++) {
        const fg_plan *p = w->parts[i].plan;
        if (!p) continue;
        out(w, "%s{\"first_node\":%u,\"nodes\":%u,\"arena\":%zu,\"params\":%zu,\"states\":%zu,"
               "\"inputs\":%zu,\"scratch\":%zu,\"total\":%zu", i ? ",\n" : "",
            w->parts[i].first_node, w->parts[i].g->n_nodes, p->arena_bytes, p->info.params,
            p->info.states, p->io_bytes, p->scratch_bytes, p->info.total);
        field(w, "peak_node", p->info.peak_node);
        out(w, "}");
    }
}

static void outputs(const writer *w)
{
    bool first = true;
    for (int i = 0; i < w->n; i++)
        for (uint32_t k = 0; k < w->parts[i].g->n_outputs; k++) {
            const fg_mark *x = &w->parts[i].g->outputs[k];
            if (!w->parts[i].id[x->id]) continue;
            out(w, "%s{\"value\":%u,\"name\":", first ? "" : ",", w->parts[i].id[x->id]);
            quoted(w, x->name);
            out(w, "}");
            first = false;
        }
}

static void write_all(const writer *w, const fg_json_options *o, const char *stage)
{
    out(w, "{\"fox_graph\":1,\"library\":\"%s\",\"stage\":\"%s\"", fg_version(), stage);
    field(w, "model", o->model);
    field(w, "device", o->device);
    out(w, ",\n\"scopes\":[");
    scopes(w);
    out(w, "],\n\"values\":[");
    values(w);
    out(w, "],\n\"nodes\":[");
    nodes(w);
    out(w, "],\n\"outputs\":[");
    outputs(w);
    out(w, "],\n\"ops\":[");
    ops(w);
    out(w, "],\n\"totals\":{");
    totals(w);
    out(w, "},\n\"plans\":[");
    plans(w);
    out(w, "]}\n");
}

/* ---- ids ------------------------------------------------------------------------------------- */

/* The id of a named value that an earlier part writes, 0 if there is none. */
static uint32_t earlier(const writer *w, int i, const fg_value *v)
{
    for (int k = 0; k < i && v->name && v->kind != FG_OF_NODE; k++) {
        const uint32_t id = fg__find_name(w->parts[k].g, v->name);
        if (id && w->parts[k].id[id]) return w->parts[k].id[id];
    }
    return 0;
}

/* Values are written whose maker is shown, and what shown nodes read. */
static bool number_values(writer *w, int i, uint32_t *next)
{
    part *p = &w->parts[i];
    const fg_graph *g = p->g;
    const bool all = w->passes == 7;
    p->id = calloc(g->n_values, sizeof *p->id);
    p->new = calloc(g->n_values, sizeof *p->new);
    if (!p->id || !p->new) return false;
    for (uint32_t v = 1; v < g->n_values && all; v++) p->new[v] = true;
    for (uint32_t k = 0; k < g->n_nodes; k++) {
        if (!shown(w, &g->nodes[k])) continue;
        for (int j = 0; j < g->nodes[k].n_in; j++) p->new[g->nodes[k].in[j]] = true;
        for (int j = 0; j < g->nodes[k].n_out; j++) p->new[g->nodes[k].out[j]] = true;
    }
    for (uint32_t e = 0; e < g->n_errors; e++)
        for (int j = 0; j < g->errors[e].n_in; j++) p->new[g->errors[e].in[j]] = true;
    for (uint32_t v = 1; p->plan && v < g->n_values; v++)
        if (p->new[v]) p->new[fg__root_of(p->plan, v)] = true;
    p->new[0] = false;
    for (uint32_t v = 1; v < g->n_values; v++, ++*next) {
        if (!p->new[v]) continue;
        const uint32_t there = earlier(w, i, &g->values[v]);
        p->id[v] = there ? there : *next;
        p->new[v] = !there;
    }
    return true;
}

fg_status fg_graph_json(int n, const fg_json_part *parts, const fg_json_options *o, fg_put put,
                        void *to)
{
    static const fg_json_options none = { 0 };
    static const char *const stage[] = { "built", "lowered", "planned" };
    if (n < 1 || !parts) return FG_ERR_USAGE;
    if (!o) o = &none;
    writer w = { .n = n, .passes = o->passes & 7 ? o->passes & 7 : 7, .stable = o->stable,
                 .put = put, .to = to };
    w.parts = calloc((size_t)n, sizeof *w.parts);
    fg_status status = w.parts ? FG_OK : FG_ERR_MEMORY;
    uint32_t next = 1, scope = 0;
    for (int i = 0; !status && i < n; i++) {
        const fg_plan *p = parts[i].plan;
        part *x = &w.parts[i];
        x->g = !p ? parts[i].graph : parts[i].stage == FG_STAGE_BUILT ? p->graph : p->low;
        if (!x->g) { status = FG_ERR_USAGE; break; }
        const bool laid = p && parts[i].stage == FG_STAGE_PLANNED && p->slots && !p->status;
        x->plan = laid ? p : NULL;
        x->first_node = w.errors_at;
        x->first_scope = scope;
        w.errors_at += x->g->n_nodes;
        scope += x->g->n_scopes - 1;
        if (!number_values(&w, i, &next)) status = FG_ERR_MEMORY;
    }
    if (!status) write_all(&w, o, stage[parts[0].plan ? parts[0].stage : FG_STAGE_BUILT]);
    for (int i = 0; w.parts && i < n; i++) { free(w.parts[i].id); free(w.parts[i].new); }
    free(w.parts);
    return status;
}
