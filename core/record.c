/* record.c - what runs note of every node for graph.json: its time, and statistics of its
 * values. */
#include <math.h>
#include <stdlib.h>
#include "plan.h"

fg_status fg_plan_record(fg_plan *p, unsigned what)
{
    if (!p) return FG_ERR_MEMORY;
    if (p->status) return p->status;
    if (what && !p->records) p->records = calloc(p->low->n_values, sizeof *p->records);
    if (what && !p->records) return fg__plan_fail(p, FG_ERR_MEMORY, "out of memory");
    p->record = what;
    return FG_OK;
}

bool fg_plan_recorded(const fg_plan *p) { return p && p->records && p->runs > 0; }

/* How many elements behind the first element i lies. */
static int64_t lies_at(const fg_rows *rows, int64_t i)
{
    return i / rows->width * rows->pitch + i % rows->width;
}

float *fg__copy_output(fg_plan *p, uint32_t k, int o)
{
    fg_backend *b = p->store->backend;
    const fg_value *v = &p->low->values[p->low->nodes[k].out[o]];
    const fg_rows *rows = &p->execs[k].out_rows[o];
    const int64_t count = fg_shape_count(v->shape), all = count ? lies_at(rows, count - 1) + 1 : 0;
    float *x = malloc((size_t)(all + 1) * sizeof *x);
    if (!x) { fg__plan_fail(p, FG_ERR_MEMORY, "out of memory for a copy of values"); return NULL; }
    const fg_status s = b->ops->download(b, x, p->execs[k].out[o], all, v->type);
    for (int64_t i = 0; i < count && all != count; i++) x[i] = x[lies_at(rows, i)];
    if (!s) return x;
    fg__plan_fail(p, s, "%s", fg_backend_message(b));
    free(x);
    return NULL;
}

/* Sums in double, in the order of the elements; values that are not finite are counted apart. */
static void measure(fg_record *r, const float *x, int64_t n)
{
    double sum = 0, squares = 0;
    int64_t finite = 0;
    r->not_finite = 0;
    r->least = r->greatest = r->mean = r->rms = 0;
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) { r->not_finite++; continue; }
        if (!finite || x[i] < r->least) r->least = x[i];
        if (!finite || x[i] > r->greatest) r->greatest = x[i];
        sum += x[i];
        squares += (double)x[i] * x[i];
        finite++;
    }
    if (finite) r->mean = sum / (double)finite;
    if (finite) r->rms = sqrt(squares / (double)finite);
    r->seen = true;
}

fg_status fg__record_node(fg_plan *p, uint32_t k, double seconds)
{
    const fg_node *n = &p->low->nodes[k];
    for (int o = 0; o < n->n_out; o++) {
        const fg_value *v = &p->low->values[n->out[o]];
        fg_record *r = &p->records[n->out[o]];
        const int64_t count = fg_shape_count(v->shape);
        if (p->record & FG_RECORD_TIMES && (!r->timed || seconds < r->seconds)) {
            r->seconds = seconds;
            r->timed = true;
        }
        if (!(p->record & FG_RECORD_VALUES) || v->type == FG_I32) continue;
        float *x = fg__copy_output(p, k, o);
        if (!x) return p->status;
        measure(r, x, count);
        free(x);
    }
    return FG_OK;
}
