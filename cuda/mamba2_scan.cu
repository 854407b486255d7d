/* mamba2_scan.cu - ops/mamba2_scan.c on a GPU: the state space scan in chunks (ssd_scan.cu) with
 * time steps and rates made where decays are, and its gradient with the states that the forward
 * pass kept.  Other shapes run as the definition. */
#include "ssd.cuh"

enum { BIAS = FG_SSD_PAST + 1 };
enum { BACK_BIAS = FG_SSD_BACK + FG_SSD_FIRST + 1, BACK_KEPT };
enum { GBIAS = 7 };

static const char *why_not(const fg_infer *c, int x, int bias, int y)
{
    if (!fg_ssd_fits(c, x) || c->in_type[bias] != FG_F32)
        return "not in chunks: bf16, P = 64, N = 64 or 128, T > 16, parameters f32";
    return y ? nullptr : "gradients and results must be bf16";
}

static const char *unfit(const fg_infer *c)
{
    if (c->given[FG_SSD_PAST]) return "with caches it runs as its definition";
    return why_not(c, 0, BIAS, c->out_type[0] == FG_BF16);
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    fg_ssd_forward(e, fg_steps_of(e, 0, BIAS), (bf16 *)e->out[2], stream);
}

static size_t scratch(const fg_infer *c) { return fg_ssd_forward_scratch(c, true); }

FG_KERNEL(mamba2_scan) = {
    .launch = launch, .unfit = unfit, .scratch = scratch,
    .pitched_in = 1u << FG_SSD_X | 1u << FG_SSD_DT | 1u << FG_SSD_B | 1u << FG_SSD_C,
};

/* ---- gradient -------------------------------------------------------------------------------- */

static const char *grad_unfit(const fg_infer *c)
{
    return why_not(c, FG_SSD_BACK, BACK_BIAS,
                   c->given[0] && c->in_type[0] == FG_BF16 && c->out_type[0] == FG_BF16);
}

/* A single 0 stands for states that the forward pass did not keep. */
static bool is_kept(bool given, const fg_shape *kept) { return given && fg_count_of(kept) > 1; }

static size_t grad_scratch(const fg_infer *c)
{
    return fg_ssd_backward_scratch(c, is_kept(c->given[BACK_KEPT], &c->in[BACK_KEPT]));
}

static void grad_launch(const fg_exec *e, cudaStream_t stream)
{
    const bool kept = is_kept(e->in[BACK_KEPT], &e->in_shape[BACK_KEPT]);
    fg_ssd_backward(e, fg_steps_of(e, FG_SSD_BACK, BACK_BIAS),
                    kept ? (const bf16 *)e->in[BACK_KEPT] : nullptr, fg_output_of(e, GBIAS),
                    stream);
}

FG_KERNEL(mamba2_scan_grad) = {
    .launch = grad_launch, .unfit = grad_unfit, .scratch = grad_scratch,
    .pitched_in = 1 | (1u << FG_SSD_X | 1u << FG_SSD_DT | 1u << FG_SSD_B | 1u << FG_SSD_C)
                << FG_SSD_BACK,
    .pitched_out = 1u << 0 | 1u << 1 | 1u << 3 | 1u << 4,
};
