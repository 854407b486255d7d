/* scan_run.h - a recurrence with its gradients, run once on a device; a CPU that rounds nothing;
 * how far two results are from each other. */
#ifndef FG_SCAN_RUN_H
#define FG_SCAN_RUN_H
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "backend.h"
#include "fox_autodiff.h"
#include "fox_ops.h"

/* The CPU in double; what is bf16 is not rounded either. */
static inline fg_status launch_exactly(fg_backend *b, const fg_op *op, const fg_exec *e)
{
    const bool narrows = !strcmp(op->name, "cast") && e->out_type[0] == FG_BF16;
    (void)b;
    if (narrows && e->in_type[0] != FG_I32)
        memmove(e->out[0], e->in[0], (size_t)fg_shape_count(e->out_shape[0]) * sizeof(fg_real));
    else op->code->cpu(e);
    return FG_OK;
}
static inline fg_backend *exact_cpu(void)
{
    static fg_backend_ops ops;
    fg_backend *b = fg_backend_open("cpu", 0);
    ops = *b->ops;
    ops.launch = launch_exactly;
    b->ops = &ops;
    return b;
}

/* The sum of all y w */
static inline fg_tensor weighted(fg_tensor y, fg_tensor w)
{
    const fg_tensor wide = fg_cast(y, FG_F32), each = fg_mul(wide, w);
    return fg_sum(each);
}

/* The n inputs' values, malloced and freed here; first and starts: of documents, or absent. */
typedef struct {
    fg_graph *g;
    int n;
    const fg_tensor *in, *to;
    float **values;
    fg_tensor first;
    const int32_t *starts;
} scan_case;

/* out[i]: to[i]'s value, malloced */
static inline void scan_run(const scan_case *c, fg_backend *device, float **out)
{
    for (int i = 0; i < c->n; i++) fg_output(c->to[i], fg_name(c->g, "out%d", i));
    fg_store *store = fg_store_new(device);
    fg_plan *p = fg_plan_new(c->g, store);
    for (int i = 0; i < c->n; i++) {
        fg_write(p, c->in[i], c->values[i], (size_t)fg_count(c->in[i]) * 4);
        free(c->values[i]);
    }
    if (!fg_absent(c->first)) fg_write(p, c->first, c->starts, (size_t)fg_count(c->first) * 4);
    cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
    for (int i = 0; i < c->n; i++) {
        const size_t bytes = (size_t)fg_count(c->to[i]) * 4;
        out[i] = malloc(bytes);
        cr_assert_eq(fg_read(p, c->to[i], out[i], bytes), FG_OK, "%s", fg_plan_message(p));
    }
    fg_plan_free(p);
    fg_store_free(store);
}

/* |got - want| / |want|, of those of n elements whose index / width is `part` among `parts`; of no
 * norm: |got| */
static inline double off_part(const float *got, const float *want, int64_t n, int64_t width,
                              int parts, int part)
{
    double diff = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        if (i / width % parts != part) continue;
        diff += ((double)got[i] - (double)want[i]) * ((double)got[i] - (double)want[i]);
        norm += (double)want[i] * (double)want[i];
    }
    return norm > 0 ? sqrt(diff / norm) : sqrt(diff);
}
static inline double off(const float *got, const float *want, int64_t n)
{
    return off_part(got, want, n, 1, 1, 0);
}
#endif
