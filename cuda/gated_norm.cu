/* gated_norm.cu - RMS norm followed by a sigmoid gate, and its gradient.
 *
 *     y = (x rstd) w s,   s = sigmoid(g),   rstd = 1 / sqrt(mean(x^2) + eps)   over each group
 *     h = x rstd, m = w s gy:
 *     gx = rstd (m - h mean(m h)),   gw = sum over rows of gy s h,   gg = gy h w s (1 - s)
 *
 * x, g, y, gy, gx, gg: [...,D], D = groups * n;  w, gw: [D] or [n];  rstd: f32[...,groups].
 * Rows of all but w and rstd may be pitched.  Every element is read once and written once, and the
 * partial sums of gw besides (norm.cuh). */
#include "norm_heads.cuh"

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_gated_norm *at = (const struct fg_attr_gated_norm *)e->attr;
    const norm_forward a = norm_gate_forward(e, at->groups, at->eps);
    if (heads_fit<NORM_GATED>(a)) heads_launch<NORM_GATED>(a, stream);
    else norm_launch<NORM_GATED>(a, stream);
}

FG_KERNEL(gated_norm) = {
    .launch = launch, .pitched_in = 1u << 0 | 1u << 2, .pitched_out = 1u << 0,
};

static size_t grad_scratch(const fg_infer *c)
{
    const struct fg_attr_gated_norm_grad *at = (const struct fg_attr_gated_norm_grad *)c->attr;
    const norm_size s = norm_size_of(&c->in[1], &c->in[2], at->groups);
    const size_t a = norm_grad_scratch(s), b = heads_scratch<NORM_GATED>(s);
    return a > b ? a : b;
}

static void grad_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_gated_norm_grad *at = (const struct fg_attr_gated_norm_grad *)e->attr;
    norm_backward a = norm_gate_backward(e, at->groups);
    if (heads_fit<NORM_GATED>(a)) heads_launch<NORM_GATED>(a, fg_output_of(e, 1), stream);
    else norm_grad_launch<NORM_GATED>(a, fg_output_of(e, 1), stream);
}

FG_KERNEL(gated_norm_grad) = {
    .launch = grad_launch, .scratch = grad_scratch,
    .pitched_in = 1u << 0 | 1u << 1 | 1u << 3, .pitched_out = 1u << 0 | 1u << 2,
};
