/* device_cpu.h - the CPU as a device with fused nodes and rows of any pitch: what lowering and
 * planning do for a GPU, run where there is none.
 *
 * A kernel of the CPU takes contiguous tensors, so every launch here first copies pitched inputs
 * and afterwards spreads pitched outputs; every output is filled with NaN before. */
#ifndef FG_DEVICE_CPU_H
#define FG_DEVICE_CPU_H
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "backend.h"

static const fg_backend_ops *fg__plain_ops;

static int64_t fg__place(const fg_rows *r, int64_t i)
{
    return i / r->width * r->pitch + i % r->width;
}

static void *fg__gather(const void *from, const fg_rows *r, int64_t n, size_t size)
{
    char *to = malloc((size_t)n * size + 64);
    for (int64_t i = 0; to && i < n; i++)
        memcpy(to + (size_t)i * size, (const char *)from + (size_t)fg__place(r, i) * size, size);
    return to;
}

static fg_status fg__launch_pitched(fg_backend *b, const fg_op *op, const fg_exec *e)
{
    fg_exec flat = *e;
    const bool overwrites = op->code->memory == FG_MUTATE;
    for (int i = 0; i < e->n_in; i++) {
        if (!e->in[i] || e->in_rows[i].width == e->in_rows[i].pitch || overwrites) continue;
        flat.in[i] = fg__gather(e->in[i], &e->in_rows[i], fg_shape_count(e->in_shape[i]),
                                b->size_of[e->in_type[i]]);
    }
    for (int o = 0; o < e->n_out; o++) {
        const bool pitched = e->out_rows[o].width != e->out_rows[o].pitch;
        const int64_t n = fg_shape_count(e->out_shape[o]);
        if (pitched) flat.out[o] = malloc((size_t)n * sizeof(double) + 64);
        bool aliased = overwrites || e->out_type[o] == FG_I32;
        for (int i = 0; i < e->n_in; i++) aliased = aliased || flat.in[i] == flat.out[o];
        for (int64_t i = 0; i < n && !aliased; i++) ((fg_real *)flat.out[o])[i] = (fg_real)NAN;
    }
    const fg_status s = fg__plain_ops->launch(b, op, &flat);
    for (int o = 0; o < e->n_out; o++) {
        if (flat.out[o] == e->out[o]) continue;
        const size_t size = b->size_of[e->out_type[o]];
        for (int64_t i = 0; i < fg_shape_count(e->out_shape[o]); i++)
            memcpy((char *)e->out[o] + (size_t)fg__place(&e->out_rows[o], i) * size,
                   (char *)flat.out[o] + (size_t)i * size, size);
        free(flat.out[o]);
    }
    for (int i = 0; i < e->n_in; i++)
        if (flat.in[i] != e->in[i]) free((void *)(uintptr_t)flat.in[i]);
    return s;
}

/* If set, what the gradients of mixers write is contiguous, as with a kernel that has no pitch. */
static bool fg__plain_mixers;

static bool fg__any_pitch(fg_backend *b, const fg_op *op, int i, bool output)
{
    static const char *const mixers[] = { "ssd_scan_grad", "gated_linear_attention_grad",
                                          "delta_rule_grad", "causal_conv_grad" };
    (void)b; (void)i;
    for (int k = 0; output && fg__plain_mixers && k < 4; k++)
        if (!strcmp(op->name, mixers[k])) return false;
    return op->code->memory != FG_MUTATE;
}

static fg_backend *fg__device_open(void)
{
    static fg_backend_ops ops;
    fg_backend *b = fg_backend_open("cpu", 1);
    if (!b || !b->ops) return b;
    fg__plain_ops = b->ops;
    ops = *b->ops;
    ops.launch = fg__launch_pitched;
    ops.pitched = fg__any_pitch;
    b->ops = &ops;
    b->fuses = true;
    return b;
}
#endif
