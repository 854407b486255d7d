/* run.c - plans from outside: making, writing inputs, running, reading outputs, timing. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "plan.h"

static bool asked(const char *variable)
{
    const char *s = getenv(variable);
    return s && s[0] && strcmp(s, "0");
}

fg_plan *fg_plan_new(const fg_graph *g, fg_store *s)
{
    fg_plan *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->graph = g;
    p->store = s;
    p->check = asked("FG_CHECK");
    p->profile = asked("FG_PROFILE");
    p->sync = asked("FG_SYNC");
    p->plain = asked("FG_NO_GRAPHS");
    if (!g || fg_graph_status(g)) {
        fg__plan_fail(p, fg_graph_status(g), "%s", fg_graph_message(g));
        return p;
    }
    if (!s || !s->backend || !s->backend->ops) {
        fg__plan_fail(p, FG_ERR_USAGE, "a plan needs a store with an open device");
        return p;
    }
    p->n_map = g->n_values;
    p->low = fg__lower(g, s->backend, s->precision, &p->map);
    if (!p->low) fg__plan_fail(p, FG_ERR_MEMORY, "out of memory while lowering the graph");
    else if (p->low->status) fg__plan_fail(p, p->low->status, "%s", fg_graph_message(p->low));
    for (uint32_t k = 0; p->low && !p->status && k < p->low->n_nodes; k++) {
        fg_infer c;
        const fg_node *n = &p->low->nodes[k];
        fg__infer_of(p->low, n, &c);
        const char *why = s->backend->ops->unfit(s->backend, n->op, &c);
        if (why)
            fg__plan_fail(p, FG_ERR_NO_KERNEL, "%s:%d: %s: %s", fg__base(n->at.file), n->at.line,
                          n->op->name, why);
    }
    if (!p->status) fg__lay_out(p);
    if (!p->status && asked("FG_RECORD")) fg_plan_record(p, FG_RECORD_TIMES);
    return p;
}

void fg_plan_free(fg_plan *p)
{
    if (!p) return;
    if (p->store && p->store->backend && p->store->backend->ops) {
        fg_backend *b = p->store->backend;
        if (p->recording) b->ops->forget(b, p->recording);
        b->ops->free(b, p->arena);
        b->ops->free(b, p->io);
        b->ops->free(b, p->scratch);
    }
    fg_graph_free(p->low);
    free(p->map); free(p->slots); free(p->execs); free(p->shapes); free(p->types); free(p->timings);
    free(p->rows); free(p->quiet); free(p->fixed); free(p->records);
    free(p);
}

fg_status   fg_plan_status(const fg_plan *p) { return p ? p->status : FG_ERR_MEMORY; }
const char *fg_plan_message(const fg_plan *p)
{
    return !p ? fg_status_text(FG_ERR_MEMORY) : p->status ? p->message : fg_status_text(FG_OK);
}
fg_plan_info fg_plan_describe(const fg_plan *p) { return p ? p->info : (fg_plan_info){ 0 }; }

/* The lowered value of t, or 0 with an error. */
static uint32_t find(fg_plan *p, fg_tensor t, size_t bytes, const char *act)
{
    if (t.graph != p->graph || !t.id || t.id >= p->n_map) {
        fg__plan_fail(p, FG_ERR_USAGE, "%s: the tensor %s", act, t.graph == p->graph && t.id
                      ? "was made after the plan" : "does not belong to this plan's graph");
        return 0;
    }
    const fg_value *v = &p->graph->values[t.id];
    const int64_t want = fg_shape_count(v->shape) * 4;
    if (bytes == (size_t)want) return t.id;
    fg__plan_fail(p, FG_ERR_USAGE, "%s: %s takes %lld bytes, not %zu", act,
                  v->name ? v->name : "the tensor", (long long)want, bytes);
    return 0;
}

fg_status fg_write(fg_plan *p, fg_tensor t, const void *data, size_t bytes)
{
    if (!p) return FG_ERR_MEMORY;
    if (p->status || fg__prepare(p)) return p->status;
    const uint32_t id = find(p, t, bytes, "write");
    if (!id) return p->status;
    const fg_value *v = &p->graph->values[id];
    if (v->kind != FG_OF_INPUT)
        return fg__plan_fail(p, FG_ERR_USAGE, "write: only inputs can be written");
    if (!p->map[id]) return FG_OK;
    fg_backend *b = p->store->backend;
    const fg_status s = b->ops->upload(b, fg__plan_data(p, t), data, fg_shape_count(v->shape),
                                       v->type);
    return s ? fg__plan_fail(p, s, "write: %s: %s", v->name, fg_backend_message(b)) : FG_OK;
}

static fg_status read_value(fg_plan *p, fg_tensor t, void *data, size_t bytes, bool later)
{
    if (!p) return FG_ERR_MEMORY;
    if (p->status || fg__prepare(p)) return p->status;
    const uint32_t id = find(p, t, bytes, "read");
    if (!id) return p->status;
    if (!fg__plan_keeps(p, p->map[id]))
        return fg__plan_fail(p, FG_ERR_USAGE,
                             "read: the tensor is not an output (fg_output keeps it)");
    const fg_value *v = &p->graph->values[id];
    fg_backend *b = p->store->backend;
    const fg_dtype type = p->low->values[p->map[id]].type;
    const fg_status s = (later && b->ops->download_later ? b->ops->download_later
                                                         : b->ops->download)(
        b, data, fg__plan_data(p, t), fg_shape_count(v->shape), type);
    return s ? fg__plan_fail(p, s, "read: %s", fg_backend_message(b)) : FG_OK;
}

fg_status fg_read(fg_plan *p, fg_tensor t, void *data, size_t bytes)
{
    return read_value(p, t, data, bytes, false);
}

fg_status fg_read_later(fg_plan *p, fg_tensor t, void *data, size_t bytes)
{
    return read_value(p, t, data, bytes, true);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void add_timing(fg_plan *p, const fg_node *n, double seconds)
{
    uint32_t i = 0;
    while (i < p->n_timings && strcmp(p->timings[i].op, n->op->name)) i++;
    if (i == p->n_timings) {
        fg_timing *more = realloc(p->timings, (i + 1) * sizeof *more);
        if (!more) return;
        p->timings = more;
        p->timings[p->n_timings++] = (fg_timing){ .op = n->op->name };
    }
    const fg_cost c = fg__cost_of(p->low, n);
    fg_timing *t = &p->timings[i];
    t->seconds += seconds;
    t->calls++;
    t->flops += c.flops;
    t->bytes += c.bytes;
}

/* NaN and infinity stop the run and name their node.  -infinity does not: it is what a masked score
 * and the log-sum-exp of nothing are. */
static fg_status check_values(fg_plan *p, uint32_t k)
{
    const fg_node *n = &p->low->nodes[k];
    for (int o = 0; o < n->n_out; o++) {
        const fg_value *v = &p->low->values[n->out[o]];
        const int64_t count = fg_shape_count(v->shape);
        if (v->type == FG_I32 || !count) continue;
        float *x = fg__copy_output(p, k, o);
        if (!x) return p->status;
        int64_t bad = 0;
        while (bad < count && x[bad] < INFINITY) bad++;
        const float value = bad < count ? x[bad] : 0;
        free(x);
        if (bad == count) continue;
        char path[200], shape[160];
        fg__scope_path(p->low, n->scope, path, sizeof path);
        fg__value_text(v, shape, sizeof shape);
        return fg__plan_fail(p, FG_ERR_NUMERIC,
                             "%s:%d: %s%s: element %lld of output %d, %s, is %g%s%s",
                             fg__base(n->at.file), n->at.line, n->op->name,
                             n->pass == FG_PASS_BACKWARD ? " (backward)" : "", (long long)bad, o,
                             shape,
                             (double)value, path[0] ? "\n    in " : "", path);
    }
    return FG_OK;
}

static fg_status launch(fg_plan *p, uint32_t k)
{
    fg_backend *b = p->store->backend;
    const fg_node *n = &p->low->nodes[k];
    fg_status s = b->ops->launch(b, n->op, &p->execs[k]);
    if (!s && p->sync) s = b->ops->sync(b);
    if (!s) return FG_OK;
    return fg__plan_fail(p, s, "%s:%d: %s: %s", fg__base(n->at.file), n->at.line, n->op->name,
                         fg_backend_message(b));
}

/* What node k, started then, took and made. */
static fg_status note(fg_plan *p, uint32_t k, double start)
{
    fg_backend *b = p->store->backend;
    const fg_status s = b->ops->sync(b);
    if (s) return fg__plan_fail(p, s, "%s", fg_backend_message(b));
    return fg__record_node(p, k, now() - start);
}

static fg_status launch_all(fg_plan *p, bool fixed)
{
    for (uint32_t k = 0; k < p->low->n_nodes; k++) {
        if (p->quiet[k] || p->fixed[k] != fixed) continue;
        const double start = p->record ? now() : 0;
        if (launch(p, k)) return p->status;
        if (p->record && note(p, k, start)) return p->status;
        if (p->check && check_values(p, k)) return p->status;
    }
    return FG_OK;
}

/* The first of the nodes from k on that is launched; n_nodes if none is. */
static uint32_t next_launched(const fg_plan *p, uint32_t k)
{
    while (k < p->low->n_nodes && (p->quiet[k] || p->fixed[k])) k++;
    return k;
}

/* Nodes of one op that follow each other, between two marks of the device's own clock: a device may
 * launch them together. */
static fg_status launch_marked(fg_plan *p)
{
    fg_backend *b = p->store->backend;
    const uint32_t n = p->low->n_nodes;
    const fg_op *last = NULL;
    fg_status s = FG_OK;
    for (uint32_t k = next_launched(p, 0); k < n && !s; k = next_launched(p, k + 1)) {
        if (p->low->nodes[k].op != last) s = b->ops->mark(b, (int)k);
        last = p->low->nodes[k].op;
        if (!s && launch(p, k)) return p->status;
    }
    if (!s) s = b->ops->mark(b, (int)n);
    if (!s) s = b->ops->sync(b);
    if (s) return fg__plan_fail(p, s, "%s", fg_backend_message(b));
    for (uint32_t k = next_launched(p, 0), end; k < n; k = end) {
        const fg_op *op = p->low->nodes[k].op;
        for (end = k; end < n && p->low->nodes[end].op == op; end = next_launched(p, end + 1)) { }
        const double seconds = b->ops->elapsed(b, (int)k, (int)end);
        for (uint32_t i = k; i < end; i = next_launched(p, i + 1))
            add_timing(p, &p->low->nodes[i], i == k ? seconds : 0);
    }
    return FG_OK;
}

/* The time of every node, between two marks of the device's own clock. */
static fg_status note_marked(fg_plan *p)
{
    fg_backend *b = p->store->backend;
    const uint32_t n = p->low->n_nodes;
    fg_status s = FG_OK;
    for (uint32_t k = next_launched(p, 0); k < n && !s; k = next_launched(p, k + 1)) {
        s = b->ops->mark(b, (int)k);
        if (!s && launch(p, k)) return p->status;
    }
    if (!s) s = b->ops->mark(b, (int)n);
    if (!s) s = b->ops->sync(b);
    if (s) return fg__plan_fail(p, s, "%s", fg_backend_message(b));
    for (uint32_t k = next_launched(p, 0), next; k < n; k = next) {
        next = next_launched(p, k + 1);
        if (fg__record_node(p, k, b->ops->elapsed(b, (int)k, (int)next))) return p->status;
    }
    return FG_OK;
}

static fg_status launch_timed(fg_plan *p)
{
    fg_backend *b = p->store->backend;
    if (b->ops->mark) return launch_marked(p);
    for (uint32_t k = next_launched(p, 0); k < p->low->n_nodes; k = next_launched(p, k + 1)) {
        const double start = now();
        if (launch(p, k)) return p->status;
        const fg_status s = b->ops->sync(b);
        if (s) return fg__plan_fail(p, s, "%s", fg_backend_message(b));
        add_timing(p, &p->low->nodes[k], now() - start);
    }
    return FG_OK;
}

/* The first run launches node by node, so that kernels can make their choices; the second is
 * recorded; from then on the recording is replayed. */
static fg_status launch_recorded(fg_plan *p)
{
    fg_backend *b = p->store->backend;
    fg_status s = FG_OK;
    if (!p->recording) {
        if ((s = b->ops->record(b))) return fg__plan_fail(p, s, "%s", fg_backend_message(b));
        const fg_status mine = launch_all(p, false);
        s = b->ops->recorded(b, &p->recording);
        if (mine) return mine;
    }
    if (!s) s = b->ops->replay(b, p->recording);
    return s ? fg__plan_fail(p, s, "%s", fg_backend_message(b)) : FG_OK;
}

fg_status fg_plan_reserve(fg_plan *p) { return p ? fg__prepare(p) : FG_ERR_MEMORY; }

fg_status fg_run_later(fg_plan *p)
{
    if (!p) return FG_ERR_MEMORY;
    if (p->status || fg__prepare(p)) return p->status;
    fg_backend *b = p->store->backend;
    const bool whole = b->ops->record && p->runs > 0 && !p->check && !p->sync && !p->plain &&
                       !p->record;
    p->runs++;
    if (!p->fixed_ran || p->version != p->store->version) {
        if (launch_all(p, true)) return p->status;
        p->version = p->store->version;
        p->fixed_ran = true;
    }
    if (p->changes_params) p->version = ++p->store->version;     /* its own copies are up to date */
    if (p->record == FG_RECORD_TIMES && b->ops->mark) return note_marked(p);
    if (p->profile && !p->record) return launch_timed(p);
    return whole ? launch_recorded(p) : launch_all(p, false);
}

fg_status fg_run(fg_plan *p)
{
    if (fg_run_later(p)) return p ? p->status : FG_ERR_MEMORY;
    fg_backend *b = p->store->backend;
    const fg_status s = b->ops->sync(b);
    return s ? fg__plan_fail(p, s, "%s", fg_backend_message(b)) : FG_OK;
}

void fg_plan_profile(fg_plan *p, bool on) { if (p) p->profile = on; }

bool fg_plan_profile_at(const fg_plan *p, int i, const char **op, double *seconds, int64_t *calls,
                        double *flops, double *bytes)
{
    if (!p || i < 0 || (uint32_t)i >= p->n_timings) return false;
    const fg_timing *t = &p->timings[i];
    *op = t->op;
    *seconds = t->seconds;
    *calls = t->calls;
    *flops = t->flops;
    *bytes = t->bytes;
    return true;
}
