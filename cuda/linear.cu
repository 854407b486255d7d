/* linear.cu - a product with a weight matrix, and its gradients, through cuBLASLt; few rows of bf16
 * through few_rows.cu.
 *
 *     y = x w^T + b        gx = gy w        gw = gy^T x, summed over all rows
 *
 * x: [...,N]   w: [M,N]   b: [M] or absent   y, gy: [...,M]: R rows.  Rows of x, y, gy and gx may
 * be pitched.  Each is one product of 2 R M N operations; the bias is added in its epilogue,
 * rounded to y's dtype first. */
#include "few_rows.cuh"
#include "gemm.cuh"

static int64_t rows_of(const fg_shape *s)
{
    int64_t n = 1;
    for (int i = 0; i + 1 < s->rank; i++) n *= s->dim[i];
    return n;
}

static const char *unfit(const fg_infer *c)
{
    return fg_gemm_unfit(c->in_type[0], c->in_type[1], c->out_type[0]);
}

static size_t gradient_scratch(const fg_infer *) { return FG_GEMM_WORK; }

static size_t scratch(const fg_infer *c)
{
    const bool round = c->n_in > 2 && c->given[2] && c->in_type[2] != c->out_type[0];
    return FG_GEMM_WORK + (round ? (size_t)c->in[1].dim[0] * 4 : 0);
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    if (fg_few_linear(e, stream)) return;
    const int64_t M = e->in_shape[1].dim[0], N = e->in_shape[1].dim[1];
    fg_gemm_call g = fg_gemm_of(rows_of(&e->in_shape[0]), M, N, false, true);
    g.a = e->in[0], g.b = e->in[1], g.y = e->out[0], g.work = e->scratch;
    g.type = e->in_type[0], g.y_type = e->out_type[0];
    g.pitch_a = fg_pitch_of(&e->in_rows[0], N);
    g.pitch_y = fg_pitch_of(&e->out_rows[0], M);
    g.bias = e->n_in > 2 ? e->in[2] : nullptr;
    if (g.bias && e->in_type[2] != g.y_type) {
        const fg_out rounded = { (char *)e->scratch + FG_GEMM_WORK, g.y_type == FG_BF16 };
        fg_convert(fg_input_of(e, 2), rounded, M, stream);
        g.bias = rounded.p;
    }
    fg_gemm(&g, stream);
}

FG_KERNEL(linear) = {
    .launch = launch, .unfit = unfit, .scratch = scratch, .pitched_in = 1u << 0,
    .pitched_out = 1u << 0,
};

static void launch_dx(const fg_exec *e, cudaStream_t stream)
{
    const int64_t M = e->in_shape[1].dim[0], N = e->in_shape[1].dim[1];
    fg_gemm_call g = fg_gemm_of(rows_of(&e->in_shape[0]), N, M, false, false);
    g.a = e->in[0], g.b = e->in[1], g.y = e->out[0], g.work = e->scratch;
    g.type = e->in_type[0], g.y_type = e->out_type[0];
    g.pitch_a = fg_pitch_of(&e->in_rows[0], M);
    g.pitch_y = fg_pitch_of(&e->out_rows[0], N);
    fg_gemm(&g, stream);
}

FG_KERNEL(linear_dx) = {
    .launch = launch_dx, .unfit = unfit, .scratch = gradient_scratch, .pitched_in = 1u << 0,
    .pitched_out = 1u << 0,
};

static void launch_dw(const fg_exec *e, cudaStream_t stream)
{
    const int64_t M = fg_last_of(&e->in_shape[0]), N = fg_last_of(&e->in_shape[1]);
    fg_gemm_call g = fg_gemm_of(M, N, rows_of(&e->in_shape[0]), true, false);
    g.a = e->in[0], g.b = e->in[1], g.y = e->out[0], g.work = e->scratch;
    g.type = e->in_type[0], g.y_type = e->out_type[0];
    g.pitch_a = fg_pitch_of(&e->in_rows[0], M);
    g.pitch_b = fg_pitch_of(&e->in_rows[1], N);
    fg_gemm(&g, stream);
}

FG_KERNEL(linear_dw) = {
    .launch = launch_dw, .unfit = unfit, .scratch = gradient_scratch,
    .pitched_in = 1u << 0 | 1u << 1,
};
