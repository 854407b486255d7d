/* graph.c - building: values, nodes, scopes, names, settings and facts. */
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "fox_json.h"
#include "graph.h"
#include "rng.h"

#define GROW(array, n, cap) fg__grow((void **)&(array), &(cap), (n), sizeof *(array))

fg_graph *fg_graph_new(void)
{
    fg_graph *g = calloc(1, sizeof *g);
    if (!g) return NULL;
    g->pair = FG_NO_NODE;
    if (!GROW(g->values, 0, g->cap_values) || !GROW(g->scopes, 0, g->cap_scopes)) {
        fg_graph_free(g);
        return NULL;
    }
    g->n_values = g->n_scopes = 1;
    memset(g->values, 0, sizeof *g->values);
    memset(g->scopes, 0, sizeof *g->scopes);
    g->values[0].node = FG_NO_NODE;
    return g;
}

void fg_graph_free(fg_graph *g)
{
    if (!g) return;
    for (fg_block *b = g->arena, *next; b; b = next) { next = b->next; free(b); }
    free(g->values); free(g->nodes); free(g->scopes); free(g->outputs);
    free(g->settings);
    free(g->asked);
    free(g->facts);
    free(g->errors);
    free(g->slots);
    free(g->params);
    free(g);
}

const char *fg_version(void)
{
#define TEXT2(x) #x
#define TEXT(x) TEXT2(x)
    return TEXT(FG_VERSION_MAJOR) "." TEXT(FG_VERSION_MINOR) "." TEXT(FG_VERSION_PATCH);
}

/* ---- names ---------------------------------------------------------------------------------- */

static uint32_t slot_of(const fg_graph *g, const char *name)
{
    uint32_t i = (uint32_t)fg__hash(name) & (g->cap_slots - 1);
    while (g->slots[i] && strcmp(g->values[g->slots[i]].name, name))
        i = (i + 1) & (g->cap_slots - 1);
    return i;
}

uint32_t fg__find_name(const fg_graph *g, const char *name)
{
    return g->cap_slots ? g->slots[slot_of(g, name)] : 0;
}

static bool add_name(fg_graph *g, uint32_t id)
{
    if (2 * (g->n_named + 1) > g->cap_slots) {
        const uint32_t cap = g->cap_slots ? 2 * g->cap_slots : 64, old_cap = g->cap_slots;
        uint32_t *old = g->slots, *slots = calloc(cap, sizeof *slots);
        if (!slots) return false;
        g->slots = slots;
        g->cap_slots = cap;
        for (uint32_t i = 0; i < old_cap; i++)
            if (old[i]) slots[slot_of(g, g->values[old[i]].name)] = old[i];
        free(old);
    }
    const uint32_t s = slot_of(g, g->values[id].name);
    if (!g->slots[s]) { g->slots[s] = id; g->n_named++; }
    return true;
}

void fg__scope_path(const fg_graph *g, uint32_t s, char *buf, size_t size)
{
    if (!s) { if (size) buf[0] = 0; return; }
    fg__scope_path(g, g->scopes[s].parent, buf, size);
    const size_t n = strlen(buf);
    const char *dot = n && g->scopes[s].name[0] ? "." : "";
    snprintf(buf + n, size - n, "%s%s", dot, g->scopes[s].name);
}

/* The scope's path in front; a state "@kind.rest" becomes "@kind.path.rest", so that all states of
 * one kind have one prefix. */
const char *fg__full_name(fg_graph *g, const char *name)
{
    char path[700];
    const char *rest = name[0] == '@' ? strchr(name, '.') : NULL;
    const size_t kind = rest ? (size_t)(rest + 1 - name) : name[0] == '@';
    snprintf(path, sizeof path, "%.*s", (int)kind, name);
    const size_t before = strlen(path);
    fg__scope_path(g, g->scope, path + before, sizeof path - before);
    const size_t n = strlen(path);
    snprintf(path + n, sizeof path - n, "%s%s", n > before ? "." : "", name + kind);
    return fg__strdup(g, path);
}

const char *fg_name(fg_graph *g, const char *fmt, ...)
{
    char text[300];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    const char *p = g ? fg__strdup(g, text) : NULL;
    return p ? p : "";
}

/* ---- values --------------------------------------------------------------------------------- */

uint32_t fg__new_value(fg_graph *g, fg_value v)
{
    if (!GROW(g->values, g->n_values, g->cap_values)) { fg__out_of_memory(g); return 0; }
    g->values[g->n_values] = v;
    if (v.name && !add_name(g, g->n_values)) { fg__out_of_memory(g); return 0; }
    return g->n_values++;
}

uint32_t fg__new_node(fg_graph *g, fg_node n)
{
    if (!GROW(g->nodes, g->n_nodes, g->cap_nodes)) { fg__out_of_memory(g); return FG_NO_NODE; }
    g->nodes[g->n_nodes] = n;
    return g->n_nodes++;
}

/* NULL if a value may have that shape, else why not: there are no empty tensors in a graph. */
static const char *shape_fault(fg_shape s)
{
    const char *fault = fg__shape_fault(s);
    for (int i = 0; !fault && i < s.rank; i++)
        if (s.dim[i] == 0) fault = "an axis cannot have an extent of 0";
    return fault;
}

/* NULL if v may be so called, else why not.  States have room for "@kind." in front. */
static const char *fault_of(const fg_value *v, const char *name)
{
    if (!name || !name[0]) return "a name is needed";
    if (v->name && strlen(v->name) > (v->kind == FG_OF_STATE ? 256 : 200))
        return "a name has at most 200 bytes, scopes included";
    if (!fg_text_is_utf8(name)) return "a name must be UTF-8";
    if ((unsigned)v->type >= FG_DTYPE_COUNT) return "a dtype is f32, bf16 or i32";
    return shape_fault(v->shape);
}

static fg_tensor named(fg_loc at, fg_graph *g, fg_value v, const char *name, const char *maker)
{
    fg_tensor none = { g, 0 };
    if (!g || g->status == FG_ERR_MEMORY) return none;
    v.name = name ? fg__full_name(g, name) : NULL;
    const char *fault = fault_of(&v, name);
    if (!v.name && !fault) return none;
    v.node = FG_NO_NODE;
    v.at = at;
    if (fault) {
        fg__error(g, FG_ERR_USAGE, maker, "", at, 0, NULL, fault);
        v.name = NULL;
        v.failed = true;
        v.shape = (fg_shape){ 0 };
        return (fg_tensor){ g, fg__new_value(g, v) };
    }
    const uint32_t before = fg__find_name(g, v.name);
    if (before && v.kind == FG_OF_STATE && g->values[before].kind == FG_OF_STATE &&
        g->values[before].type == v.type && fg_shape_equal(g->values[before].shape, v.shape))
        return (fg_tensor){ g, before };
    if (before) {
        char rule[500];
        snprintf(rule, sizeof rule, "\"%.200s\" is already the name of a value made at %s:%d",
                 v.name, fg__base(g->values[before].at.file), g->values[before].at.line);
        fg__error(g, FG_ERR_USAGE, maker, "", at, 0, NULL, rule);
        v.name = NULL;
        v.failed = true;
    }
    return (fg_tensor){ g, fg__new_value(g, v) };
}

fg_tensor (fg_input)(fg_loc at, fg_graph *g, const char *name, fg_dtype t, fg_shape s)
{
    return named(at, g, (fg_value){ .type = t, .shape = s, .kind = FG_OF_INPUT }, name, "input");
}

fg_tensor (fg_param)(fg_loc at, fg_graph *g, const char *name, fg_shape s, fg_init init)
{
    fg_value v = { .type = FG_F32, .shape = s, .kind = FG_OF_PARAM, .init = init };
    return named(at, g, v, name, "param");
}

fg_tensor (fg_state)(fg_loc at, fg_graph *g, const char *name, fg_dtype t, fg_shape s)
{
    return named(at, g, (fg_value){ .type = t, .shape = s, .kind = FG_OF_STATE }, name, "state");
}

fg_tensor (fg_output)(fg_loc at, fg_tensor t, const char *name)
{
    fg_graph *g = t.graph;
    if (!g || !fg_ok(t)) return t;
    if (!name || !name[0]) {
        fg__error(g, FG_ERR_USAGE, "output", "", at, 0, NULL, "a name is needed");
        return t;
    }
    for (uint32_t i = 0; i < g->n_outputs; i++) {
        if (strcmp(g->outputs[i].name, name)) continue;
        if (g->outputs[i].id != t.id)
            fg__error(g, FG_ERR_USAGE, "output", "", at, 0, NULL, "two outputs have one name");
        return t;
    }
    const char *copy = fg__strdup(g, name);
    if (!copy || !GROW(g->outputs, g->n_outputs, g->cap_outputs)) {
        fg__out_of_memory(g);
        return t;
    }
    g->outputs[g->n_outputs++] = (fg_mark){ copy, t.id };
    return t;
}

static bool valid(fg_tensor t) { return t.graph && t.id && t.id < t.graph->n_values; }

bool        fg_ok(fg_tensor t) { return valid(t) && !t.graph->values[t.id].failed; }
bool        fg_absent(fg_tensor t) { return !t.graph; }
fg_shape    fg_shape_of(fg_tensor t)
{
    return valid(t) ? t.graph->values[t.id].shape : (fg_shape){ 0 };
}
fg_dtype    fg_dtype_of(fg_tensor t) { return valid(t) ? t.graph->values[t.id].type : FG_F32; }
int64_t     fg_count(fg_tensor t)
{
    return valid(t) ? fg_shape_count(t.graph->values[t.id].shape) : 0;
}

int64_t fg_dim(fg_tensor t, int axis)
{
    const fg_shape s = fg_shape_of(t);
    if (axis < 0) axis += s.rank;
    return axis >= 0 && axis < s.rank ? s.dim[axis] : 0;
}

/* Output k of a failed op, whose guessed outputs stand side by side; t itself if there is none. */
static fg_tensor guess(fg_graph *g, uint32_t t, int k)
{
    const int64_t at = (int64_t)t - g->values[t].out + k;
    const fg_value *v = at > 0 && at < g->n_values ? &g->values[at] : NULL;
    const bool found = v && v->kind == FG_OF_NODE && v->node == FG_NO_NODE && v->out == k;
    return (fg_tensor){ g, found ? (uint32_t)at : t };
}

fg_tensor fg_result(fg_tensor t, int k)
{
    if (!valid(t)) return t;
    fg_graph *g = t.graph;
    const fg_value *v = &g->values[t.id];
    const fg_node *n = v->node == FG_NO_NODE ? NULL : &g->nodes[v->node];
    if (n && k >= 0 && k < n->n_out) return (fg_tensor){ g, n->out[k] };
    if (!n && v->kind == FG_OF_NODE) return guess(g, t.id, k);
    if (!n && k == 0) return t;
    char rule[100];
    snprintf(rule, sizeof rule, "the tensor's maker has %d outputs; output %d is asked for",
             n ? n->n_out : 0, k);
    fg__error(g, FG_ERR_USAGE, n ? n->op->name : "result", "", n ? n->at : v->at, 0, NULL, rule);
    return (fg_tensor){ g, fg__new_value(g, (fg_value){ .node = FG_NO_NODE, .failed = true }) };
}

const fg_op *fg__producer(fg_tensor t, fg_tensor in[FG_MAX_IN], int *n_in, const void **attr)
{
    if (!fg_ok(t) || t.graph->values[t.id].node == FG_NO_NODE) return NULL;
    const fg_node *n = &t.graph->nodes[t.graph->values[t.id].node];
    for (int i = 0; i < n->n_in; i++)
        in[i] = n->in[i] ? (fg_tensor){ t.graph, n->in[i] } : (fg_tensor){ 0 };
    *n_in = n->n_in;
    if (attr) *attr = n->attr;
    return n->op;
}

fg_tensor (fg_random)(fg_loc at, fg_graph *g, fg_shape s)
{
    const char *name = fg_name(g, "random%u", g->n_random++);
    return (fg_param)(at, g, name, s, (fg_init){ .kind = FG_NORMAL, .a = 1 });
}

fg_tensor (fg_given_int)(fg_loc at, fg_graph *g, fg_shape s, const int32_t *values)
{
    const char *name = fg_name(g, "given%u", g->n_random++);
    fg_tensor t = (fg_input)(at, g, name, FG_I32, s);
    const size_t bytes = (size_t)fg_count(t) * sizeof *values;
    int32_t *copy = fg__alloc(g, bytes ? bytes : 1);
    if (!copy || !fg_ok(t)) return t;
    if (bytes) memcpy(copy, values, bytes);
    g->values[t.id].given = copy;
    return t;
}

fg_tensor (fg_random_int)(fg_loc at, fg_graph *g, int64_t lo, int64_t hi, fg_shape s)
{
    const int64_t n = fg_shape_count(s);
    int32_t *values = fg__alloc(g, (size_t)n * sizeof *values + 1);
    if (!values) return (fg_tensor){ g, 0 };
    for (int64_t i = 0; i < n; i++) {
        const double u = fg__random_uniform(g->n_random, (uint64_t)i);
        values[i] = (int32_t)(lo + (int64_t)(u * (double)(hi - lo)));
    }
    return (fg_given_int)(at, g, s, values);
}

/* ---- scopes --------------------------------------------------------------------------------- */

void (fg_scope_push)(fg_loc at, fg_graph *g, const char *name)
{
    if (!g) return;
    if (name && !fg_text_is_utf8(name)) {
        fg__error(g, FG_ERR_USAGE, "scope_push", "", at, 0, NULL, "a name must be UTF-8");
        name = "";
    }
    char *copy = fg__strdup(g, name ? name : "");
    if (!copy || !GROW(g->scopes, g->n_scopes, g->cap_scopes)) { fg__out_of_memory(g); return; }
    g->scopes[g->n_scopes] = (fg_scope){ .name = copy, .at = at, .parent = g->scope };
    g->scope = g->n_scopes++;
}

void fg_scope_pop(fg_graph *g)
{
    if (g) g->scope = g->scopes[g->scope].parent;
}

void fg_scope_recompute(fg_graph *g)
{
    if (g && g->scope) g->scopes[g->scope].recompute = true;
}

void        fg_graph_sequence(fg_graph *g, fg_sequence s) { if (g) g->sequence = s; }
fg_sequence fg_sequence_of(const fg_graph *g) { return g ? g->sequence : (fg_sequence){ 0 }; }

/* ---- settings and facts --------------------------------------------------------------------- */

static fg_pair *find_pair(fg_pair *p, uint32_t n, const char *key)
{
    for (uint32_t i = 0; i < n; i++) if (!strcmp(p[i].key, key)) return &p[i];
    return NULL;
}

static fg_status put_pair(fg_graph *g, fg_pair **list, uint32_t *n, uint32_t *cap, const char *key,
                          const char *value)
{
    if (!key || !value) return FG_ERR_USAGE;
    fg_pair *p = find_pair(*list, *n, key);
    const char *copy = fg__strdup(g, value);
    if (!copy) return FG_ERR_MEMORY;
    if (p) { p->value = copy; return FG_OK; }
    const char *name = fg__strdup(g, key);
    if (!name || !fg__grow((void **)list, cap, *n, sizeof **list)) {
        fg__out_of_memory(g);
        return FG_ERR_MEMORY;
    }
    (*list)[(*n)++] = (fg_pair){ name, copy, false };
    return FG_OK;
}

fg_status fg_graph_set(fg_graph *g, const char *key, const char *value)
{
    if (!g) return FG_ERR_USAGE;
    return put_pair(g, &g->settings, &g->n_settings, &g->cap_settings, key, value);
}

static const char *setting(fg_graph *g, const char *key)
{
    fg_pair *p = g ? find_pair(g->settings, g->n_settings, key) : NULL;
    if (g) put_pair(g, &g->asked, &g->n_asked, &g->cap_asked, key, "");
    if (p) p->used = true;
    return p ? p->value : NULL;
}

static void setting_error(fg_loc at, fg_graph *g, const char *key, const char *value,
                          const char *what)
{
    char rule[400];
    snprintf(rule, sizeof rule, "%.100s=%.100s is not %s", key, value, what);
    fg__error(g, FG_ERR_USAGE, "setting", "", at, 0, NULL, rule);
}

int64_t (fg_setting_int)(fg_loc at, fg_graph *g, const char *key, int64_t otherwise)
{
    const char *s = setting(g, key);
    if (!s) return otherwise;
    char *end;
    errno = 0;
    const long long v = strtoll(s, &end, 10);
    if (end == s || *end || errno) { setting_error(at, g, key, s, "an integer"); return otherwise; }
    return v;
}

double (fg_setting_real)(fg_loc at, fg_graph *g, const char *key, double otherwise)
{
    const char *s = setting(g, key);
    if (!s) return otherwise;
    char *end;
    const double v = strtod(s, &end);
    if (end == s || *end || !isfinite(v)) {
        setting_error(at, g, key, s, "a finite number");
        return otherwise;
    }
    return v;
}

const char *fg_setting_text(fg_graph *g, const char *key, const char *otherwise)
{
    const char *s = setting(g, key);
    return s ? s : otherwise;
}

const char *fg_graph_unused_setting(const fg_graph *g, int i)
{
    for (uint32_t k = 0; g && k < g->n_settings; k++)
        if (!g->settings[k].used && i-- == 0) return g->settings[k].key;
    return NULL;
}

const char *fg_graph_asked_setting(const fg_graph *g, int i)
{
    return g && i >= 0 && (uint32_t)i < g->n_asked ? g->asked[i].key : NULL;
}

fg_status fg_graph_set_fact(fg_graph *g, const char *key, const char *json)
{
    return g ? put_pair(g, &g->facts, &g->n_facts, &g->cap_facts, key, json) : FG_ERR_USAGE;
}

const char *fg_graph_fact(const fg_graph *g, const char *key)
{
    const fg_pair *p = g ? find_pair(g->facts, g->n_facts, key) : NULL;
    return p ? p->value : NULL;
}

bool fg_graph_fact_at(const fg_graph *g, int i, const char **key, const char **json)
{
    if (!g || i < 0 || (uint32_t)i >= g->n_facts) return false;
    *key = g->facts[i].key;
    *json = g->facts[i].value;
    return true;
}

/* ---- looking ------------------------------------------------------------------------------- */

int fg_param_count(const fg_graph *g)
{
    int n = 0;
    for (uint32_t i = 1; g && i < g->n_values; i++)
        n += g->values[i].kind == FG_OF_PARAM && g->values[i].name;
    return n;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const fg_mark *)a)->name, ((const fg_mark *)b)->name);
}

/* The sorted list is kept with the graph until another value is made. */
static bool sort_params(fg_graph *g)
{
    if (g->params_of == g->n_values) return true;
    g->n_params = 0;
    for (uint32_t i = 1; i < g->n_values; i++) {
        if (g->values[i].kind != FG_OF_PARAM || !g->values[i].name) continue;
        if (!GROW(g->params, g->n_params, g->cap_params)) return false;
        g->params[g->n_params++] = (fg_mark){ g->values[i].name, i };
    }
    if (g->n_params) qsort(g->params, g->n_params, sizeof *g->params, by_name);
    g->params_of = g->n_values;
    return true;
}

bool fg_param_at(const fg_graph *g, int k, fg_param_info *out)
{
    fg_graph *open = (fg_graph *)(uintptr_t)g;
    if (!g || k < 0 || !sort_params(open) || (uint32_t)k >= g->n_params) return false;
    const fg_value *v = &g->values[g->params[k].id];
    *out = (fg_param_info){ v->name, v->shape, v->init, { open, g->params[k].id } };
    return true;
}

fg_tensor fg_find(const fg_graph *g, const char *name)
{
    fg_graph *open = (fg_graph *)(uintptr_t)g;
    if (!g || !name) return (fg_tensor){ 0 };
    for (uint32_t i = 0; i < g->n_outputs; i++)
        if (!strcmp(g->outputs[i].name, name)) return (fg_tensor){ open, g->outputs[i].id };
    const uint32_t id = fg__find_name(g, name);
    return id ? (fg_tensor){ open, id } : (fg_tensor){ 0 };
}

/* ---- nodes --------------------------------------------------------------------------------- */

const void *fg__copy_attr(fg_graph *g, const fg_op *op, const void *attr)
{
    char *copy = fg__alloc(g, op->attr_size);
    size_t at = 0;
    for (const fg_attr_field *f = op->attrs; copy && f->name; f++) {
        at = (at + f->align - 1) & ~(f->align - 1);
        memcpy(copy + at, (const char *)attr + at, f->size);
        at += f->size;
    }
    return copy;
}

static int count_words(const char *s)
{
    int n = 0;
    for (bool in = false; *s; s++) { if (*s != ' ' && !in) n++; in = *s != ' '; }
    return n;
}

/* Is the i-th word of names marked optional? */
static bool optional(const char *names, int i)
{
    for (; i > 0; i--) { names += strcspn(names, " "); while (*names == ' ') names++; }
    const size_t n = strcspn(names, " ");
    return n && names[n - 1] == '?';
}

/* After an error, values that go on with the likeliest shape, so that the next independent error is
 * found too.  Where a good value of the same shape took part (a residual), the doubt ends. */
static fg_tensor guessed(fg_graph *g, const fg_infer *c, bool inferred, int n_in,
                         const fg_tensor *in)
{
    bool healed = false;
    for (int i = 0; inferred && i < n_in; i++)
        healed |= fg_ok(in[i]) && g->values[in[i].id].kind != FG_OF_PARAM &&
                  fg_shape_equal(c->in[i], c->out[0]);
    uint32_t first = 0;
    for (int i = 0; i < c->n_out; i++) {
        fg_value v = { .type = c->out_type[i], .node = FG_NO_NODE, .out = i, .failed = !healed };
        if (!shape_fault(c->out[i])) v.shape = c->out[i];
        const uint32_t id = fg__new_value(g, v);
        if (!i) first = id;
    }
    return (fg_tensor){ g, first };
}

fg_tensor fg__apply(const fg_op *op, fg_loc at, fg_graph *g, int n_in, const fg_tensor *in,
                    const void *attr)
{
    for (int i = 0; i < n_in && !g; i++) g = in[i].graph;
    fg_tensor none = { g, 0 };
    if (!g || g->status == FG_ERR_MEMORY) return none;
    if (g->pass != FG_PASS_FORWARD) at = g->forward_at;

    fg_infer c = { .graph = g, .attr = attr, .n_in = n_in, .n_out = count_words(op->outs) };
    bool doubt = false;
    char rule[200] = "";
    if (!op->code) snprintf(rule, sizeof rule, "this op is not part of the library");
    for (int i = 0; i < n_in; i++) {
        c.given[i] = in[i].graph != NULL;
        if (!c.given[i] && !optional(op->ins, i))
            snprintf(rule, sizeof rule, "input %d is missing", i);
        if (!c.given[i]) continue;
        if (in[i].graph != g) {
            snprintf(rule, sizeof rule, "input %d belongs to another graph", i);
            continue;
        }
        if (!valid(in[i])) return none;
        doubt |= g->values[in[i].id].failed;
        c.in[i] = g->values[in[i].id].shape;
        c.in_type[i] = g->values[in[i].id].type;
    }
    for (int i = 0; i < c.n_out; i++) { c.out[i] = c.in[0]; c.out_type[i] = c.in_type[0]; }
    if (rule[0]) {
        if (!doubt) fg__error(g, FG_ERR_USAGE, op->name, op->ins, at, n_in, in, rule);
        return guessed(g, &c, false, n_in, in);
    }
    fg_status s = op->code->infer(&c);
    for (int i = 0; !s && i < c.n_out; i++) {
        const char *fault = shape_fault(c.out[i]);
        if (fault) s = fg__fail(&c, FG_ERR_SHAPE, "%s", fault);
    }
    if (s && !doubt) fg__error(g, s, op->name, op->ins, at, n_in, in, g->rule);
    if (s || doubt) return guessed(g, &c, !s, n_in, in);

    fg_node n = { .op = op, .attr = fg__copy_attr(g, op, attr), .at = at, .scope = g->scope,
                  .n_in = n_in, .n_out = c.n_out, .pass = g->pass, .pair = g->pair };
    if (!n.attr) return none;
    for (int i = 0; i < n_in; i++) n.in[i] = in[i].id;
    for (int i = 0; i < n.n_out; i++) {
        const fg_value v = { .type = c.out_type[i], .shape = c.out[i], .node = g->n_nodes,
                             .out = i };
        n.out[i] = fg__new_value(g, v);
        if (!n.out[i]) return none;
    }
    return fg__new_node(g, n) == FG_NO_NODE ? none : (fg_tensor){ g, n.out[0] };
}
