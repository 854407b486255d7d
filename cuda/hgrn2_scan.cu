/* hgrn2_scan.cu - ops/hgrn2_scan.c on a GPU: gated linear attention in chunks that takes q and z
 * before their activations (gated_linear_attention.cuh).  Rows of q, z, v and of their gradients
 * may be pitched; what prepare writes is kept for the gradient.  Other shapes run as the
 * definition. */
#include "gated_linear_attention_grad.cuh"
#include "norm.cuh"

static int64_t row_of(const fg_rows *r, const la_task &z) { return fg_pitch_of(r, z.H * LA_WIDTH); }

/* q, z, v from input i on, low behind them */
static inputs inputs_of(const fg_exec *e, int i, const la_task &z)
{
    return { (const bf16 *)e->in[i], (const bf16 *)e->in[i + 1], (const bf16 *)e->in[i + 2],
             row_of(&e->in_rows[i], z), row_of(&e->in_rows[i + 1], z),
             row_of(&e->in_rows[i + 2], z), nullptr, (const float *)e->in[i + 3] };
}

static const char *why_not(const fg_infer *c, bool fits, int low)
{
    return !fits ? "not in chunks: bf16, K = V = 128, T >= 64"
         : c->given[low] && c->in_type[low] != FG_F32 ? "low must be f32" : nullptr;
}

static const char *unfit(const fg_infer *c)
{
    if (c->given[5]) return "with caches it runs as its definition";
    return why_not(c, la_in_chunks(&c->in[1], &c->in[2], c->in_type, 0) &&
                      c->out_type[0] == FG_BF16, 3);
}

static size_t scratch(const fg_infer *c)
{
    size_t used = 0;
    operands s = {};
    cut_ends(nullptr, &used, la_task_of(&c->in[1], 1, nullptr, nullptr, nullptr), false, &s);
    return used;
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_hgrn2_scan *a = (const struct fg_attr_hgrn2_scan *)e->attr;
    const la_task z = la_task_of(&e->in_shape[1], a->scale, e->in[4], nullptr, e->in[6]);
    size_t kept = 0, used = 0;
    operands s = {};
    cut_prepared((char *)e->out[2], &kept, z, &s);
    cut_ends((char *)e->scratch, &used, z, false, &s);
    launch_forward<true>(z, inputs_of(e, 0, z), s, (bf16 *)e->out[0], (float *)e->out[1], stream);
}

FG_KERNEL(hgrn2_scan) = {
    .launch = launch, .unfit = unfit, .scratch = scratch, .pitched_in = 7,
};

/* ---- gradient -------------------------------------------------------------------------------- */

static way_back cut_back(char *base, size_t *used, const la_task &z, bool low, float **parts)
{
    const int64_t n = z.B * z.chunks * z.H * LA_WIDTH;
    way_back w = {};
    cut_way_back(base, used, z, &w);
    *parts = low ? (float *)la_cut(base, used, (size_t)n * sizeof(float)) : nullptr;
    return w;
}

static size_t grad_scratch(const fg_infer *c)
{
    size_t used = 0;
    float *parts;
    cut_back(nullptr, &used, la_task_of(&c->in[3], 1, nullptr, nullptr, nullptr), c->given[5],
             &parts);
    return used;
}

static void grad_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_hgrn2_scan_grad *a = (const struct fg_attr_hgrn2_scan_grad *)e->attr;
    const la_task z = la_task_of(&e->in_shape[3], a->scale, e->in[6], nullptr, e->in[7]);
    const int64_t n = z.H * LA_WIDTH;
    size_t used = 0, kept = 0;
    float *parts;
    way_back w = cut_back((char *)e->scratch, &used, z, e->in[5], &parts);
    cut_prepared((char *)e->in[8], &kept, z, &w.s);
    const gradients to = { (bf16 *)e->out[0], (bf16 *)e->out[1], (bf16 *)e->out[2],
                           row_of(&e->out_rows[0], z), row_of(&e->out_rows[1], z),
                           row_of(&e->out_rows[2], z), nullptr, parts };
    launch_backward<true>(z, inputs_of(e, 2, z), (const bf16 *)e->in[0], (const float *)e->in[1], w,
                          to, (float *)e->out[4], stream);
    if (!parts) cudaMemsetAsync(e->out[3], 0, e->out_type[3] == FG_BF16 ? 2 : 4, stream);
    else norm_add_parts<<<fg_blocks(n, 32), dim3(32, 32), 0, stream>>>(
        parts, z.B * z.chunks, n, fg_output_of(e, 3));
}

static const char *grad_unfit(const fg_infer *c)
{
    const struct fg_attr_hgrn2_scan_grad *a = (const struct fg_attr_hgrn2_scan_grad *)c->attr;
    size_t kept = 0;
    operands s = {};
    cut_prepared(nullptr, &kept, la_task_of(&c->in[3], 1, nullptr, nullptr, nullptr), &s);
    if (!c->given[8] || kept > (size_t)fg_count_of(&c->in[8]) * sizeof(bf16))
        return "nothing is kept of the scan";
    return why_not(c, la_back_in_chunks(a->scale, c->in, c->in_type, c->out_type), 5);
}

FG_KERNEL(hgrn2_scan_grad) = {
    .launch = grad_launch, .unfit = grad_unfit, .scratch = grad_scratch,
    .pitched_in = 7u << 2, .pitched_out = 7,
};
