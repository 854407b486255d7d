/* l2_norm.cu - rows scaled to unit length, and the gradient: ops/l2_norm.c on a GPU.
 *
 *     y = x rstd,  rstd = 1 / sqrt(sum(x^2) + eps)   over the last axis
 *     gx = rstd (gy - y sum(y gy))
 *
 * A warp a row; heads of up to 256 stay in registers, so every element is read and written once. */
#include "rows.cuh"

#define THREADS 256
#define HELD    256                              /* channels that a warp holds */

/* Eight channels a lane, from 8 lane on; n at most HELD. */
static __device__ __forceinline__ void load_row(const fg_in &x, int64_t row, int64_t n, float *v)
{
    const int64_t i = 8 * (threadIdx.x % 32);
    if (i + 8 <= n && n % 8 == 0) {
        const fg_vec8 e = fg_load8(x, row * n + i);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = e[j];
        return;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = i + j < n ? x[row * n + i + j] : 0.0f;
}

static __device__ __forceinline__ void store_row(const fg_out &y, int64_t row, int64_t n,
                                                 const float *v)
{
    const int64_t i = 8 * (threadIdx.x % 32);
    if (i + 8 <= n && n % 8 == 0) {
        fg_vec8 e;
#pragma unroll
        for (int j = 0; j < 8; j++) e[j] = v[j];
        fg_store8(y, row * n + i, e);
        return;
    }
#pragma unroll
    for (int j = 0; j < 8; j++)
        if (i + j < n) y.put(row * n + i + j, v[j]);
}

static __global__ void __launch_bounds__(THREADS)
norm(fg_in x, fg_out y, float *rstd, int64_t rows, int64_t n, float eps)
{
    const int64_t row = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    float v[8], sum = 0;
    if (n <= HELD) {
        load_row(x, row, n, v);
#pragma unroll
        for (int j = 0; j < 8; j++) sum = fmaf(v[j], v[j], sum);
    } else {
        for (int64_t i = threadIdx.x % 32; i < n; i += 32) {
            const float e = x[row * n + i];
            sum = fmaf(e, e, sum);
        }
    }
    const float r = 1 / sqrtf(fg_warp_sum(sum) + eps);
    if (threadIdx.x % 32 == 0) rstd[row] = r;
    if (n <= HELD) {
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] *= r;
        store_row(y, row, n, v);
    } else {
        for (int64_t i = threadIdx.x % 32; i < n; i += 32) y.put(row * n + i, x[row * n + i] * r);
    }
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_l2_norm *a = (const struct fg_attr_l2_norm *)e->attr;
    const int64_t n = fg_last_of(&e->in_shape[0]), rows = fg_count_of(&e->in_shape[0]) / n;
    norm<<<fg_blocks(rows, THREADS / 32), THREADS, 0, stream>>>(
        fg_input_of(e, 0), fg_output_of(e, 0), (float *)e->out[1], rows, n, (float)a->eps);
}

FG_KERNEL(l2_norm) = { .launch = launch };

static __global__ void __launch_bounds__(THREADS)
norm_grad(fg_in gy, fg_in y, const float *rstd, fg_out gx, int64_t rows, int64_t n)
{
    const int64_t row = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    float g[8], v[8], sum = 0;
    if (n <= HELD) {
        load_row(gy, row, n, g);
        load_row(y, row, n, v);
#pragma unroll
        for (int j = 0; j < 8; j++) sum = fmaf(g[j], v[j], sum);
    } else {
        for (int64_t i = threadIdx.x % 32; i < n; i += 32)
            sum = fmaf(gy[row * n + i], y[row * n + i], sum);
    }
    sum = fg_warp_sum(sum);
    const float r = rstd[row];
    if (n <= HELD) {
#pragma unroll
        for (int j = 0; j < 8; j++) g[j] = fmaf(-sum, v[j], g[j]) * r;
        store_row(gx, row, n, g);
    } else {
        for (int64_t i = threadIdx.x % 32; i < n; i += 32)
            gx.put(row * n + i, fmaf(-sum, y[row * n + i], gy[row * n + i]) * r);
    }
}

static void grad_launch(const fg_exec *e, cudaStream_t stream)
{
    const int64_t n = fg_last_of(&e->in_shape[1]), rows = fg_count_of(&e->in_shape[1]) / n;
    norm_grad<<<fg_blocks(rows, THREADS / 32), THREADS, 0, stream>>>(
        fg_input_of(e, 0), fg_input_of(e, 1), (const float *)e->in[2], fg_output_of(e, 0), rows, n);
}

FG_KERNEL(l2_norm_grad) = { .launch = grad_launch };
