/* swiglu.cu - the gate of the MLP, on the two halves of one projection, and its gradient.
 *
 *     x = [g | p], s = sigmoid(g):
 *     act = FG_ACT_SILU      y = g s p    gg = gy p s (1 + g (1 - s))    gp = gy g s
 *     act = FG_ACT_SIGMOID   y = s p      gg = gy p s (1 - s)            gp = gy s
 *
 * x, gx: [...,2I]   y, gy: [...,I].  Forward moves 3 I elements a row, the gradient 5 I: the least
 * possible.  Where I is no multiple of 8 it goes element by element. */
#include "kernel.cuh"

enum { THREADS = 256 };

struct gates {
    fg_in x, gy;
    fg_out y;                        /* y, or gx */
    int64_t rows, I;
    bool silu;
};

static __device__ __forceinline__ float sigmoid(float x)
{
    return __fdividef(1.0f, 1.0f + __expf(-x));
}
static __device__ __forceinline__ float gate(float g, float p, bool silu)
{
    const float s = sigmoid(g);
    return (silu ? g * s : s) * p;
}
/* g becomes gg, p becomes gp. */
static __device__ __forceinline__ void gate_grad(float gy, float &g, float &p, bool silu)
{
    const float s = sigmoid(g), r = 1 - s, gys = gy * s, gp = silu ? gys * g : gys;
    g = gys * p * (silu ? 1 + g * r : r);
    p = gp;
}

/* Thread x of the grid's first axis takes one vector of the row, its second axis the rows. */
static __global__ void __launch_bounds__(THREADS) forward8(const gates a)
{
    const int64_t j = (blockIdx.x * (int64_t)THREADS + threadIdx.x) * 8;
    if (j >= a.I) return;
    for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
        fg_vec8 g = fg_load8(a.x, row * 2 * a.I + j);
        const fg_vec8 p = fg_load8(a.x, row * 2 * a.I + a.I + j);
#pragma unroll
        for (int k = 0; k < 8; k++) g[k] = gate(g[k], p[k], a.silu);
        fg_store8(a.y, row * a.I + j, g);
    }
}

static __global__ void __launch_bounds__(THREADS) backward8(const gates a)
{
    const int64_t j = (blockIdx.x * (int64_t)THREADS + threadIdx.x) * 8;
    if (j >= a.I) return;
    for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
        fg_vec8 g = fg_load8(a.x, row * 2 * a.I + j), p = fg_load8(a.x, row * 2 * a.I + a.I + j);
        const fg_vec8 gy = fg_load8(a.gy, row * a.I + j);
#pragma unroll
        for (int k = 0; k < 8; k++) gate_grad(gy[k], g[k], p[k], a.silu);
        fg_store8(a.y, row * 2 * a.I + j, g);
        fg_store8(a.y, row * 2 * a.I + a.I + j, p);
    }
}

static __global__ void __launch_bounds__(THREADS) forward1(const gates a)
{
    const int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x;
    if (i >= a.rows * a.I) return;
    const int64_t at = i / a.I * 2 * a.I + i % a.I;
    a.y.put(i, gate(a.x[at], a.x[at + a.I], a.silu));
}

static __global__ void __launch_bounds__(THREADS) backward1(const gates a)
{
    const int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x;
    if (i >= a.rows * a.I) return;
    const int64_t at = i / a.I * 2 * a.I + i % a.I;
    float g = a.x[at], p = a.x[at + a.I];
    gate_grad(a.gy[i], g, p, a.silu);
    a.y.put(at, g);
    a.y.put(at + a.I, p);
}

static dim3 grid_of(const gates &a)
{
    return dim3(fg_blocks(a.I / 8, THREADS), (unsigned)(a.rows < 65535 ? a.rows : 65535));
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_swiglu *at = (const struct fg_attr_swiglu *)e->attr;
    gates a = {};
    a.x = fg_input_of(e, 0), a.y = fg_output_of(e, 0), a.silu = at->act == FG_ACT_SILU;
    a.I = fg_last_of(&e->out_shape[0]);
    if (a.I == 0) return;
    a.rows = fg_count_of(&e->out_shape[0]) / a.I;
    if (a.rows == 0) return;
    if (a.I % 8 == 0) forward8<<<grid_of(a), THREADS, 0, stream>>>(a);
    else forward1<<<fg_blocks(a.rows * a.I, THREADS), THREADS, 0, stream>>>(a);
}

FG_KERNEL(swiglu) = { .launch = launch };

static void grad_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_swiglu_grad *at = (const struct fg_attr_swiglu_grad *)e->attr;
    gates a = {};
    a.gy = fg_input_of(e, 0), a.x = fg_input_of(e, 1), a.y = fg_output_of(e, 0);
    a.silu = at->act == FG_ACT_SILU;
    a.I = fg_last_of(&e->in_shape[0]);
    if (a.I == 0) return;
    a.rows = fg_count_of(&e->in_shape[0]) / a.I;
    if (a.rows == 0) return;
    if (a.I % 8 == 0) backward8<<<grid_of(a), THREADS, 0, stream>>>(a);
    else backward1<<<fg_blocks(a.rows * a.I, THREADS), THREADS, 0, stream>>>(a);
}

FG_KERNEL(swiglu_grad) = { .launch = grad_launch };
