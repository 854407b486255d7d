/* norm_of_gated.cu - RMS norm of a tensor behind a silu gate, and its gradient.
 *
 *     u = x g s,   y = (u rstd) w,   s = sigmoid(g),   rstd = 1 / sqrt(mean(u^2) + eps)
 *     h = u rstd, m = w gy, gu = rstd (m - h mean(m h)):
 *     gx = gu g s,   gw = sum over rows of gy h,   gg = gu x s (1 + g (1 - s))
 *
 * x, g, y, gy, gx, gg: [...,D], D = groups * n;  w, gw: [D] or [n];  rstd: f32[...,groups].
 * Rows of all but w and rstd may be pitched.  Every element is read once and written once, and the
 * partial sums of gw besides (norm.cuh). */
#include "norm.cuh"

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_norm_of_gated *at = (const struct fg_attr_norm_of_gated *)e->attr;
    const norm_forward a = norm_gate_forward(e, at->groups, at->eps);
    norm_launch<NORM_OF_GATED>(a, stream);
}

FG_KERNEL(norm_of_gated) = {
    .launch = launch, .pitched_in = 1u << 0 | 1u << 2, .pitched_out = 1u << 0,
};

static size_t grad_scratch(const fg_infer *c)
{
    typedef struct fg_attr_norm_of_gated_grad attr;
    const attr *at = (const attr *)c->attr;
    return norm_grad_scratch(norm_size_of(&c->in[1], &c->in[2], at->groups));
}

static void grad_launch(const fg_exec *e, cudaStream_t stream)
{
    typedef struct fg_attr_norm_of_gated_grad attr;
    const attr *at = (const attr *)e->attr;
    norm_backward a = norm_gate_backward(e, at->groups);
    norm_grad_launch<NORM_OF_GATED>(a, fg_output_of(e, 1), stream);
}

FG_KERNEL(norm_of_gated_grad) = {
    .launch = grad_launch, .scratch = grad_scratch,
    .pitched_in = 1u << 0 | 1u << 1 | 1u << 3, .pitched_out = 1u << 0 | 1u << 2,
};
