/* gated_linear_attention.cu - ops/gated_linear_attention.c on a GPU: in chunks on tensor cores
 * (gated_linear_attention.cuh) or row by row (linear_attention_rows.cuh). */
#include "gated_linear_attention_grad.cuh"
#include "linear_attention_rows.cuh"

static bool in_chunks(const fg_shape *shape, const fg_dtype *type, const fg_dtype *out)
{
    return la_in_chunks(&shape[1], &shape[2], type, 0) && out[0] == FG_BF16;
}
/* q, k, v from input i on, g behind them */
static inputs inputs_of(const fg_exec *e, int i)
{
    const int64_t row = e->in_shape[i].dim[2] * LA_WIDTH;
    return { (const bf16 *)e->in[i], (const bf16 *)e->in[i + 1], (const bf16 *)e->in[i + 2], row,
             row, row, (const float *)e->in[i + 3], nullptr };
}

static operands cut(char *base, size_t *used, const la_task &z)
{
    operands s = {};
    cut_prepared(base, used, z, &s);
    cut_ends(base, used, z, false, &s);
    return s;
}

static size_t scratch(const fg_infer *c)
{
    size_t used = 0;
    if (in_chunks(c->in, c->in_type, c->out_type))
        cut(nullptr, &used, la_task_of(&c->in[1], 1, nullptr, nullptr, nullptr));
    return used;
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_gated_linear_attention *a =
        (const struct fg_attr_gated_linear_attention *)e->attr;
    const la_task z = la_task_of(&e->in_shape[1], a->scale, e->in[4], e->in[5], e->in[6]);
    size_t used = 0;
    if (in_chunks(e->in_shape, e->in_type, e->out_type))
        launch_forward<false>(z, inputs_of(e, 0), cut((char *)e->scratch, &used, z),
                              (bf16 *)e->out[0], (float *)e->out[1], stream);
    else rows_forward<false>(e, z, stream);
}

static const char *unfit(const fg_infer *c) { return rows_unfit(&c->in[1], &c->in[2]); }

FG_KERNEL(gated_linear_attention) = { .launch = launch, .unfit = unfit, .scratch = scratch };

/* ---- gradient -------------------------------------------------------------------------------- */

static way_back cut_back(char *base, size_t *used, const la_task &z)
{
    way_back w = {};
    cut_prepared(base, used, z, &w.s);
    cut_way_back(base, used, z, &w);
    return w;
}

static size_t grad_scratch(const fg_infer *c)
{
    const struct fg_attr_gated_linear_attention_grad *a =
        (const struct fg_attr_gated_linear_attention_grad *)c->attr;
    const la_task z = la_task_of(&c->in[3], a->scale, nullptr, nullptr, nullptr);
    size_t used = 0;
    if (!la_back_in_chunks(a->scale, c->in, c->in_type, c->out_type))
        return rows_grad_scratch(&c->in[3], &c->in[4]);
    cut_back(nullptr, &used, z);
    return used;
}

static void grad_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_gated_linear_attention_grad *a =
        (const struct fg_attr_gated_linear_attention_grad *)e->attr;
    const la_task z = la_task_of(&e->in_shape[3], a->scale, e->in[6], nullptr, e->in[7]);
    if (!la_back_in_chunks(a->scale, e->in_shape, e->in_type, e->out_type)) {
        rows_backward<false>(e, z, stream);
        return;
    }
    const int64_t row = z.H * LA_WIDTH;
    size_t used = 0;
    const way_back w = cut_back((char *)e->scratch, &used, z);
    const inputs x = inputs_of(e, 2);
    const gradients to = { (bf16 *)e->out[0], (bf16 *)e->out[1], (bf16 *)e->out[2], row, row, row,
                           (float *)e->out[3], nullptr };
    launch_prepare<false>(z, x, w.s, stream);
    launch_backward<false>(z, x, (const bf16 *)e->in[0], (const float *)e->in[1], w,
                           to, (float *)e->out[4], stream);
}

static const char *grad_unfit(const fg_infer *c) { return rows_unfit(&c->in[3], &c->in[4]); }

FG_KERNEL(gated_linear_attention_grad) = {
    .launch = grad_launch, .unfit = grad_unfit, .scratch = grad_scratch,
};
