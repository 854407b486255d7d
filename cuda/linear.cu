/* linear.cu - a product with a weight matrix, and its gradients, through cuBLASLt.
 *
 *     y = x w^T + b        gx = gy w        gw = gy^T x, summed over all rows
 *
 * x: [...,N]   w: [M,N]   b: [M] or absent   y, gy: [...,M]: R rows.  Rows of x, y, gy and gx may
 * be pitched.  Each is one product of 2 R M N operations; the bias is added in its epilogue,
 * rounded to y's dtype first.  Where y is bf16 and M or N no multiple of 8, cuBLASLt may round the
 * product before it adds the bias: there the product is f32, and a second kernel adds. */
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

/* Rows of the f32 product whose bias is added apart begin at multiples of 16 bytes. */
static int64_t pitch_apart(int64_t M) { return (M + 7) / 8 * 8; }
static bool is_apart(fg_dtype y, const fg_shape *w)
{
    return y == FG_BF16 && (w->dim[0] % 8 != 0 || w->dim[1] % 8 != 0);
}

static size_t scratch(const fg_infer *c)
{
    if (c->n_in < 3 || !c->given[2]) return FG_GEMM_WORK;
    const int64_t M = c->in[1].dim[0], rows = rows_of(&c->in[0]);
    if (is_apart(c->out_type[0], &c->in[1]))
        return FG_GEMM_WORK + (size_t)(rows * pitch_apart(M)) * sizeof(float);
    return FG_GEMM_WORK + (c->in_type[2] != c->out_type[0] ? (size_t)M * sizeof(float) : 0);
}

static __global__ void add_bias(const float *x, int64_t x_pitch, fg_in b, fg_out y, int64_t y_pitch,
                                int64_t rows, int64_t M)
{
    const int64_t j = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (j >= M) return;
    for (int64_t row = blockIdx.y; row < rows; row += gridDim.y)
        y.put(row * y_pitch + j, x[row * x_pitch + j] + b[j]);
}

static void launch_apart(const fg_exec *e, fg_gemm_call g, cudaStream_t stream)
{
    const int64_t M = g.N, rows = g.M, y_pitch = g.pitch_y;
    float *x = (float *)((char *)e->scratch + FG_GEMM_WORK);
    g.y = x, g.y_type = FG_F32, g.pitch_y = pitch_apart(M), g.bias = nullptr;
    fg_gemm(&g, stream);
    if (rows == 0 || M == 0) return;
    const dim3 grid(fg_blocks(M, 256), (unsigned)(rows < 65535 ? rows : 65535));
    add_bias<<<grid, 256, 0, stream>>>(x, g.pitch_y, fg_input_of(e, 2), fg_output_of(e, 0), y_pitch,
                                       rows, M);
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const int64_t M = e->in_shape[1].dim[0], N = e->in_shape[1].dim[1];
    fg_gemm_call g = fg_gemm_of(rows_of(&e->in_shape[0]), M, N, false, true);
    g.a = e->in[0], g.b = e->in[1], g.y = e->out[0], g.work = e->scratch;
    g.type = e->in_type[0], g.y_type = e->out_type[0];
    g.pitch_a = fg_pitch_of(&e->in_rows[0], N);
    g.pitch_y = fg_pitch_of(&e->out_rows[0], M);
    g.bias = e->n_in > 2 ? e->in[2] : nullptr;
    if (g.bias && is_apart(g.y_type, &e->in_shape[1])) {
        launch_apart(e, g, stream);
        return;
    }
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
