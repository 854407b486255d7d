/* unary.cu - ops/unary.c on a GPU: elementwise functions of one tensor, and their gradients.
 *
 * Bytes: every input and the output once, which is the least.  The formulas are those of the C
 * page; exponentials are of -|x|, so none overflows. */
#include "elementwise.cuh"

static __device__ __forceinline__ float sigmoid(float x)
{
    const float u = expf(-fabsf(x)), s = __fdividef(1.0f, 1.0f + u);
    return x < 0 ? u * s : s;
}
/* ln(1 + u), 0 <= u <= 1, as 2 artanh z = 2 (z + z^3/3 + z^5/5 + ...), z = u / (2 + u) <= 1/3:
 * what is left out is below 2^-30 of it. */
static __device__ __forceinline__ float log_1_plus(float u)
{
    const float z = __fdividef(u, 2.0f + u), w = z * z;
    float s = 2.0f / 17;
    s = fmaf(s, w, 2.0f / 15);
    s = fmaf(s, w, 2.0f / 13);
    s = fmaf(s, w, 2.0f / 11);
    s = fmaf(s, w, 2.0f / 9);
    s = fmaf(s, w, 2.0f / 7);
    s = fmaf(s, w, 2.0f / 5);
    s = fmaf(s, w, 2.0f / 3);
    return fmaf(s * w, z, 2 * z);
}
static __device__ __forceinline__ float log_sigmoid(float x)
{
    return (x < 0 ? x : 0) - log_1_plus(expf(-fabsf(x)));
}

/* The record of an op from its formula: of x, or of gy and u, the value that its gradient needs. */
#define FORMULA(name, ...)                                                              \
    struct name##_of {                                                                  \
        __device__ __forceinline__ float operator()(const float *in) const              \
        {                                                                               \
            const float x = in[0];                                                      \
            return __VA_ARGS__;                                                         \
        }                                                                               \
    };                                                                                  \
    static void name##_launch(const fg_exec *e, cudaStream_t stream)                    \
    {                                                                                   \
        fg_map<name##_of, 1>(e, stream, name##_of());                                   \
    }                                                                                   \
    FG_KERNEL(name) = { .launch = name##_launch, .pitched_in = 1, .pitched_out = 1 };
#define GRADIENT(name, ...)                                                             \
    struct name##_of {                                                                  \
        __device__ __forceinline__ float operator()(const float *in) const              \
        {                                                                               \
            const float gy = in[0], u = in[1];                                          \
            return __VA_ARGS__;                                                         \
        }                                                                               \
    };                                                                                  \
    static void name##_launch(const fg_exec *e, cudaStream_t stream)                    \
    {                                                                                   \
        fg_map<name##_of, 2>(e, stream, name##_of());                                   \
    }                                                                                   \
    FG_KERNEL(name) = { .launch = name##_launch, .pitched_in = 3, .pitched_out = 1 };

FORMULA(neg, -x)
FORMULA(exp, expf(x))
FORMULA(log, logf(x))
FORMULA(sqrt, sqrtf(x))
FORMULA(rsqrt, rsqrtf(x))
FORMULA(sigmoid, sigmoid(x))
FORMULA(log_sigmoid, log_sigmoid(x))
FORMULA(softplus, -log_sigmoid(-x))
FORMULA(silu, x * sigmoid(x))
FORMULA(tanh, tanhf(x))
FORMULA(relu, x < 0 ? 0 : x)                             /* NaN stays NaN */

static __device__ __forceinline__ float silu_slope(float x)
{
    const float s = sigmoid(x);
    return s * fmaf(x, 1 - s, 1.0f);
}
GRADIENT(sigmoid_grad, gy * (u * (1 - u)))
GRADIENT(log_sigmoid_grad, gy * sigmoid(-u))
GRADIENT(softplus_grad, gy * sigmoid(u))
GRADIENT(silu_grad, gy * silu_slope(u))
GRADIENT(tanh_grad, gy * ((1 - u) * (1 + u)))
GRADIENT(relu_grad, u > 0 ? gy : 0)

/* ---- with attributes ------------------------------------------------------------------------ */

struct scale_of {
    float s, b;
    __device__ __forceinline__ float operator()(const float *in) const
    {
        return fmaf(s, in[0], b);
    }
};
static void scale_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_scale *a = (const struct fg_attr_scale *)e->attr;
    fg_map<scale_of, 1>(e, stream, scale_of{ (float)a->s, (float)a->b });
}
FG_KERNEL(scale) = { .launch = scale_launch, .pitched_in = 1, .pitched_out = 1 };

/* Storing rounds; an i32 comes as the bits of a float of the same size. */
struct same {
    __device__ __forceinline__ float operator()(const float *in) const { return in[0]; }
};
struct number {
    __device__ __forceinline__ float operator()(const float *in) const
    {
        return (float)__float_as_int(in[0]);
    }
};
static void cast_launch(const fg_exec *e, cudaStream_t stream)
{
    if (e->in_type[0] == FG_I32) fg_map<number, 1>(e, stream, number());
    else fg_map<same, 1>(e, stream, same());
}

/* The weights of a model at once: eight elements a thread, and what is left of a tensor. */
struct casting { fg_in x; fg_out y; int64_t n; unsigned first; };
enum { CASTS = 80, CAST_CHUNK = 8 * FG_MAP_THREADS }; /* of a launch: 4 KB; elements of a block */
struct castings { casting of[CASTS]; int count; };

static __global__ void __launch_bounds__(FG_MAP_THREADS)
cast_many(const __grid_constant__ castings list)
{
    const casting &t = list.of[fg_item_at(list, blockIdx.x)];
    const int64_t i = (int64_t)(blockIdx.x - t.first) * CAST_CHUNK + 8 * (int)threadIdx.x;
    if (i + 8 <= t.n) fg_store8(t.y, i, fg_load8(t.x, i));
    else
        for (int64_t k = i; k < t.n; k++) t.y.put(k, t.x[k]);
}

static bool is_plain_cast(const fg_exec *e)
{
    return e->in_type[0] != FG_I32 && !fg_is_pitched(&e->in_rows[0]) &&
           !fg_is_pitched(&e->out_rows[0]);
}

static void cast_launch_many(const fg_exec *const *e, int n, cudaStream_t stream)
{
    for (int i = 0; i < n; ) {
        const int end = i + fg_at_once(e + i, n - i, CASTS);
        castings list = {};
        unsigned blocks = 0;
        for (; i < end && is_plain_cast(e[i]); i++) {
            const int64_t size = fg_count_of(&e[i]->in_shape[0]);
            list.of[list.count++] = { fg_input_of(e[i], 0), fg_output_of(e[i], 0), size, blocks };
            blocks += fg_blocks(size, CAST_CHUNK);
        }
        if (list.count > 1) cast_many<<<blocks, FG_MAP_THREADS, 0, stream>>>(list);
        else if (list.count == 1) cast_launch(e[i - 1], stream);
        if (i < end) cast_launch(e[i++], stream);            /* the first of another kind */
    }
}
FG_KERNEL(cast) = { .launch = cast_launch, .pitched_in = 1, .pitched_out = 1,
                    .launch_many = cast_launch_many };

/* Only writes, so in stretches of 16 bytes that a warp stores side by side: V = 16 / size. */
template <int V>
static __global__ void __launch_bounds__(FG_MAP_THREADS) fill_all(fg_out y, float value, int64_t n)
{
    float v[V];
#pragma unroll
    for (int j = 0; j < V; j++) v[j] = value;
#pragma unroll
    for (int u = 0; u < 4; u++) {
        const int64_t k = ((int64_t)blockIdx.x * 4 + u) * FG_MAP_THREADS + threadIdx.x, i = V * k;
        if (i + V <= n) fg_store_some<V>(y, i, v);
        else
            for (int64_t j = i; j < n; j++) y.put(j, value);
    }
}
static void fill_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_fill *a = (const struct fg_attr_fill *)e->attr;
    const int64_t n = fg_count_of(&e->out_shape[0]), per = 4 * FG_MAP_THREADS;
    const fg_out y = fg_output_of(e, 0);
    const float value = (float)a->value;
    if (y.narrow) fill_all<8><<<fg_blocks(n, 8 * per), FG_MAP_THREADS, 0, stream>>>(y, value, n);
    else fill_all<4><<<fg_blocks(n, 4 * per), FG_MAP_THREADS, 0, stream>>>(y, value, n);
}
FG_KERNEL(fill) = { .launch = fill_launch };
