/* unit_delta_rule.cu - ops/unit_delta_rule.c on a GPU: the delta rule in chunks that scales q and k
 * by itself (delta_rule.cuh).  Rows of q, k, v and of their gradients may be pitched.  Other shapes
 * run as the definition. */
#include "delta_rule_grad.cuh"

static int64_t row_of(const fg_rows *r, const la_task &z) { return fg_pitch_of(r, z.H * LA_WIDTH); }

/* q, k, v from input i on, beta behind them */
static inputs inputs_of(const fg_exec *e, int i, const la_task &z, double eps)
{
    return { (const bf16 *)e->in[i], (const bf16 *)e->in[i + 1], (const bf16 *)e->in[i + 2],
             row_of(&e->in_rows[i], z), row_of(&e->in_rows[i + 1], z),
             row_of(&e->in_rows[i + 2], z), fg_input_of(e, i + 3), (float)eps };
}
static const char *why_not(bool fits)
{
    return fits ? nullptr : "not in chunks: bf16, K = V = 128, T >= 64";
}

static const char *unfit(const fg_infer *c)
{
    if (c->given[5]) return "with caches it runs as its definition";
    return why_not(la_in_chunks(&c->in[1], &c->in[2], c->in_type, 0) && c->out_type[0] == FG_BF16);
}

static size_t scratch(const fg_infer *c)
{
    size_t used = 0;
    operands s = {};
    cut_ends(nullptr, &used, la_task_of(&c->in[1], 1, nullptr, nullptr, nullptr), &s);
    return used;
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_unit_delta_rule *a = (const struct fg_attr_unit_delta_rule *)e->attr;
    const la_task z = la_task_of(&e->in_shape[1], a->scale, e->in[4], nullptr, e->in[6]);
    size_t kept = 0, used = 0;
    operands s = cut_operands((char *)e->out[2], &kept, z, true, true);
    cut_ends((char *)e->scratch, &used, z, &s);
    launch_forward<true>(z, inputs_of(e, 0, z, a->eps), s, (bf16 *)e->out[0], (float *)e->out[1],
                         stream);
}

FG_KERNEL(unit_delta_rule) = {
    .launch = launch, .unfit = unfit, .scratch = scratch, .pitched_in = 7,
};

/* ---- gradient -------------------------------------------------------------------------------- */

static size_t grad_scratch(const fg_infer *c)
{
    size_t used = 0;
    cut_way_back(nullptr, &used, la_task_of(&c->in[3], 1, nullptr, nullptr, nullptr));
    return used;
}

static void grad_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_unit_delta_rule_grad *a =
        (const struct fg_attr_unit_delta_rule_grad *)e->attr;
    const la_task z = la_task_of(&e->in_shape[3], a->scale, e->in[6], nullptr, e->in[7]);
    const gradients to = { (bf16 *)e->out[0], (bf16 *)e->out[1], (bf16 *)e->out[2],
                           row_of(&e->out_rows[0], z), row_of(&e->out_rows[1], z),
                           row_of(&e->out_rows[2], z), fg_output_of(e, 3) };
    size_t used = 0, kept = 0;
    way_back w = cut_way_back((char *)e->scratch, &used, z);
    w.s = cut_operands((char *)e->in[8], &kept, z, true, true);
    launch_backward<true>(z, inputs_of(e, 2, z, a->eps), (const bf16 *)e->in[0],
                          (const float *)e->in[1], w, to, (float *)e->out[4], stream);
}

static const char *grad_unfit(const fg_infer *c)
{
    const struct fg_attr_unit_delta_rule_grad *a =
        (const struct fg_attr_unit_delta_rule_grad *)c->attr;
    size_t kept = 0;
    cut_operands(nullptr, &kept, la_task_of(&c->in[3], 1, nullptr, nullptr, nullptr), true, true);
    if (!c->given[8] || kept > (size_t)fg_count_of(&c->in[8]) * sizeof(bf16))
        return "nothing is kept of the scan";
    return why_not(la_back_in_chunks(a->scale, c->in, c->in_type, c->out_type));
}

FG_KERNEL(unit_delta_rule_grad) = {
    .launch = grad_launch, .unfit = grad_unfit, .scratch = grad_scratch,
    .pitched_in = 7u << 2, .pitched_out = 7,
};
