/* forget_gate.cu - the forget gate of HGRN2, and its gradient.
 *
 *     s = sigmoid(z), f = low + (1 - low) s:   k = (1 - low) (1 - s),   log_f = ln f
 *     gz = (1 - low) s (1 - s) (glog_f / f - gk)
 *     glow = sum over rows of (1 - s) (glog_f / f - gk)
 *
 * z, k, log_f, gz, gk, glog_f: [...,D], D a multiple of 8;  low, glow: D numbers.
 * Rows of z and gz may be pitched.  Every element is read once and written once.  A thread holds 8
 * columns; in the gradient it walks the rows of its part and leaves a row of partial sums of glow,
 * which a second kernel adds.  Parts are set by the shape alone. */
#include "norm.cuh"

enum { THREADS = 64, WALKED = 16, MOST_PARTS = 1024 };       /* rows of a part, at the least */

struct gates {
    fg_in z, low, gk, glog_f;            /* p NULL: absent */
    fg_out k, log_f, gz;
    float *part;
    int64_t rows, D, parts;
    norm_rows z_rows, gz_rows;
};

/* s and 1 - s, each without a subtraction */
static __device__ __forceinline__ void split(float z, float &s, float &rest)
{
    const float e = __expf(-fabsf(z)), big = __fdividef(1.0f, 1.0f + e), small = e * big;
    s = z >= 0 ? big : small;
    rest = z >= 0 ? small : big;
}

static __device__ __forceinline__ fg_vec8 load_or(const fg_in &x, int64_t at, float otherwise)
{
    fg_vec8 v;
    if (x.p) return fg_load8(x, at);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = otherwise;
    return v;
}

static __global__ void __launch_bounds__(THREADS) forward(const gates a)
{
    const int64_t j = (blockIdx.x * (int64_t)THREADS + threadIdx.x) * 8;
    if (j >= a.D) return;
    const fg_vec8 low = load_or(a.low, j, 0);
    for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
        fg_vec8 z = fg_load8(a.z, norm_row(a.z_rows, row) + j), k;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float s, rest;
            split(z[i], s, rest);
            k[i] = (1 - low[i]) * rest;
            if (a.low.p) z[i] = logf(low[i] + (1 - low[i]) * s);
            else z[i] = fminf(z[i], 0) - log1pf(__expf(-fabsf(z[i])));
        }
        fg_store8(a.k, row * a.D + j, k);
        fg_store8(a.log_f, row * a.D + j, z);
    }
}

static __global__ void __launch_bounds__(THREADS) backward(const gates a)
{
    const int64_t j = (blockIdx.x * (int64_t)THREADS + threadIdx.x) * 8;
    if (j >= a.D) return;
    const fg_vec8 low = load_or(a.low, j, 0);
    fg_vec8 sum = {};
    const int64_t last = norm_first(a.rows, a.parts, blockIdx.y + 1);
    for (int64_t row = norm_first(a.rows, a.parts, blockIdx.y); row < last; row++) {
        fg_vec8 z = fg_load8(a.z, norm_row(a.z_rows, row) + j);
        const fg_vec8 gk = load_or(a.gk, row * a.D + j, 0);
        const fg_vec8 gl = load_or(a.glog_f, row * a.D + j, 0);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float s, rest;
            split(z[i], s, rest);
            if (a.low.p) {
                const float room = 1 - low[i];
                const float each = rest * (__fdividef(gl[i], low[i] + room * s) - gk[i]);
                sum[i] += each;
                z[i] = room * s * each;
            } else {
                z[i] = rest * (gl[i] - gk[i] * s);
            }
        }
        fg_store8(a.gz, norm_row(a.gz_rows, row) + j, z);
    }
    if (!a.low.p) return;
#pragma unroll
    for (int i = 0; i < 8; i++) a.part[blockIdx.y * a.D + j + i] = sum[i];
}

static int64_t parts_of(int64_t rows)
{
    const int64_t parts = (rows + WALKED - 1) / WALKED;
    return parts < 1 ? 1 : parts < MOST_PARTS ? parts : (int64_t)MOST_PARTS;
}

static const char *unfit(const fg_infer *c)
{
    return fg_last_of(&c->in[0]) % 8 ? "the last axis is not a multiple of 8" : nullptr;
}

static gates gates_of(const fg_exec *e)
{
    gates a = {};
    a.D = fg_last_of(&e->in_shape[0]);
    a.rows = a.D ? fg_count_of(&e->in_shape[0]) / a.D : 0;
    a.parts = parts_of(a.rows);
    a.z = fg_input_of(e, 0);
    a.z_rows = norm_rows_of(&e->in_rows[0], a.D);
    a.low = fg_input_of(e, 1);
    return a;
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    gates a = gates_of(e);
    a.k = fg_output_of(e, 0), a.log_f = fg_output_of(e, 1);
    if (a.rows == 0) return;
    const dim3 grid(fg_blocks(a.D, 8 * THREADS), (unsigned)(a.rows < 65535 ? a.rows : 65535));
    forward<<<grid, THREADS, 0, stream>>>(a);
}

FG_KERNEL(forget_gate) = { .launch = launch, .unfit = unfit, .pitched_in = 1u << 0 };

static size_t grad_scratch(const fg_infer *c)
{
    const int64_t D = fg_last_of(&c->in[0]);
    if (!c->given[1] || D == 0) return 0;
    return (size_t)(parts_of(fg_count_of(&c->in[0]) / D) * D) * sizeof(float);
}

static void grad_launch(const fg_exec *e, cudaStream_t stream)
{
    gates a = gates_of(e);
    a.gk = fg_input_of(e, 2), a.glog_f = fg_input_of(e, 3);
    a.gz = fg_output_of(e, 0), a.gz_rows = norm_rows_of(&e->out_rows[0], a.D);
    a.part = (float *)e->scratch;
    if (a.D == 0) return;
    const dim3 grid(fg_blocks(a.D, 8 * THREADS), (unsigned)a.parts), block(32, 32);
    backward<<<grid, THREADS, 0, stream>>>(a);
    if (a.low.p)
        norm_add_parts<<<fg_blocks(a.D, 32), block, 0, stream>>>(a.part, a.parts, a.D,
                                                                 fg_output_of(e, 1));
    else cudaMemsetAsync(e->out[1], 0, e->out_type[1] == FG_BF16 ? 2 : 4, stream);
}

FG_KERNEL(forget_gate_grad) = {
    .launch = grad_launch, .unfit = unfit, .scratch = grad_scratch,
    .pitched_in = 1u << 0, .pitched_out = 1u << 0,
};
