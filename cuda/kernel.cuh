/* kernel.cuh - what every file of cuda/ includes: the kernel record, typed pointers, vectors, sums.
 *
 * A file has the name of its page in ops/ and defines one record per op of that page,
 *
 *     FG_KERNEL(rms_norm) = { .launch = launch, .unfit = unfit };
 *
 * and nothing else has to be said: the table finds the records of ops.def by name.  An op without
 * a record, or one that does not fit, runs as its definition.
 *
 * What a kernel may count on:
 *   - f32 values are float, bf16 values __nv_bfloat16, i32 values int32_t, all on the device; every
 *     allocation is 256-byte aligned.  Unless its unfit() says otherwise, an op takes any mixture
 *     of f32 and bf16 inputs, sums in f32, and writes outputs of the dtypes it is told.
 *   - tensors are contiguous, but for those whose bit is set in pitched_in or pitched_out: they may
 *     be columns of a wider matrix (fg_rows), every row then begins at a multiple of 16 bytes.
 *   - outputs and scratch hold garbage, perhaps NaN; every element of every output is written.
 *   - an absent optional input is NULL.  Counts may pass 2^31: indices into tensors are int64_t.
 * What it must do: enqueue its work on the stream and nothing more (no synchronisation, no
 * allocation, no host copy: launches are captured in CUDA graphs), and give the same bits every
 * time: no float atomics, every sum in one fixed order. */
#ifndef FG_KERNEL_CUH
#define FG_KERNEL_CUH
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include "ops.h"

typedef struct fg_kernel {
    void        (*launch)(const fg_exec *e, cudaStream_t stream);
    const char *(*unfit)(const fg_infer *c) = nullptr;    /* why it does not fit these shapes and
                                                             dtypes; NULL: fits */
    size_t      (*scratch)(const fg_infer *c) = nullptr;  /* bytes of e->scratch */
    unsigned      pitched_in = 0, pitched_out = 0;        /* bit i: may be pitched */
    /* Nodes that follow each other and have this same function, in place of launch. */
    void        (*launch_many)(const fg_exec *const *e, int n, cudaStream_t stream) = nullptr;
} fg_kernel;

#define FG_KERNEL(op) extern "C" const fg_kernel fg_kernel_##op; \
    extern "C" const fg_kernel fg_kernel_##op

typedef __nv_bfloat16 bf16;

/* ---- host side ------------------------------------------------------------------------------ */

static inline int64_t fg_count_of(const fg_shape *s)
{
    int64_t n = 1;
    for (int i = 0; i < s->rank; i++) n *= s->dim[i];
    return n;
}
static inline int64_t fg_last_of(const fg_shape *s) { return s->rank ? s->dim[s->rank - 1] : 1; }
/* Elements from one row of n elements to the next. */
static inline int64_t fg_pitch_of(const fg_rows *r, int64_t n)
{
    return r->width == r->pitch ? n : r->pitch;
}
static inline bool fg_is_pitched(const fg_rows *r) { return r->width != r->pitch; }
static inline unsigned fg_blocks(int64_t n, int64_t per) { return (unsigned)((n + per - 1) / per); }
static inline const char *fg_type_name(fg_dtype t)
{
    return t == FG_F32 ? "f32" : t == FG_BF16 ? "bf16" : "i32";
}
/* Bytes from the first element of a tensor to behind its last. */
static inline size_t fg_span_of(const fg_shape *s, const fg_rows *r, fg_dtype t)
{
    const int64_t n = fg_count_of(s), last = fg_is_pitched(r) && n
                    ? (n - 1) / r->width * r->pitch + (n - 1) % r->width : n - 1;
    return (size_t)(last + 1) * (t == FG_BF16 ? 2 : 4);
}
static inline bool fg_overlap(const void *a, size_t a_bytes, const void *b, size_t b_bytes)
{
    return a && b && (const char *)a < (const char *)b + b_bytes &&
           (const char *)b < (const char *)a + a_bytes;
}
/* Does x write anything that y touches? */
static inline bool fg_disturbs(const fg_exec *x, const fg_exec *y)
{
    for (int o = 0; o < x->n_out; o++) {
        const size_t bytes = fg_span_of(&x->out_shape[o], &x->out_rows[o], x->out_type[o]);
        for (int i = 0; i < y->n_in; i++)
            if (fg_overlap(x->out[o], bytes, y->in[i],
                           fg_span_of(&y->in_shape[i], &y->in_rows[i], y->in_type[i]))) return true;
        for (int i = 0; i < y->n_out; i++)
            if (fg_overlap(x->out[o], bytes, y->out[i], fg_span_of(
                           &y->out_shape[i], &y->out_rows[i], y->out_type[i]))) return true;
    }
    return false;
}
/* How many of the n nodes, from the first on, may run at once; at most `most`. */
static inline int fg_at_once(const fg_exec *const *e, int n, int most)
{
    int k = n > 0;
    for (; k < n && k < most; k++)
        for (int i = 0; i < k; i++)
            if (fg_disturbs(e[i], e[k]) || fg_disturbs(e[k], e[i])) return k;
    return k;
}
/* Multiprocessors of the current device. */
static inline int fg_processors()
{
    int device = 0, n = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device);
    return n > 0 ? n : 1;
}

/* ---- device side: an input or output of either float type ----------------------------------- */

/* The branch on the type is the same for the whole grid: it costs an instruction, no divergence. */
struct fg_in {
    const void *p;
    bool narrow;                                 /* bf16, else f32 */
    __device__ float operator[](int64_t i) const
    {
        return narrow ? __bfloat162float(((const bf16 *)p)[i]) : ((const float *)p)[i];
    }
};
struct fg_out {
    void *p;
    bool narrow;
    __device__ void put(int64_t i, float x) const
    {
        if (narrow) ((bf16 *)p)[i] = __float2bfloat16_rn(x);
        else ((float *)p)[i] = x;
    }
};
static inline fg_in fg_input_of(const fg_exec *e, int i)
{
    return { e->in[i], e->in_type[i] == FG_BF16 };
}
static inline fg_out fg_output_of(const fg_exec *e, int o)
{
    return { e->out[o], e->out_type[o] == FG_BF16 };
}

/* Eight elements in registers, as float; i must be a multiple of 8 and p 16-byte aligned. */
struct fg_vec8 {
    float v[8];
    __device__ float &operator[](int i) { return v[i]; }
    __device__ const float &operator[](int i) const { return v[i]; }
};

static __device__ __forceinline__ void fg_unpack(uint4 u, float *v)
{
    const unsigned w[4] = { u.x, u.y, u.z, u.w };
#pragma unroll
    for (int k = 0; k < 4; k++) {
        v[2 * k] = __uint_as_float(w[k] << 16);
        v[2 * k + 1] = __uint_as_float(w[k] & 0xffff0000u);
    }
}
static __device__ __forceinline__ unsigned fg_pack2(float a, float b)
{
    const __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
    return *(const unsigned *)&h;
}

static __device__ __forceinline__ fg_vec8 fg_load8(const fg_in &x, int64_t i)
{
    fg_vec8 r;
    if (x.narrow) fg_unpack(*(const uint4 *)((const bf16 *)x.p + i), r.v);
    else {
        const float4 *q = (const float4 *)((const float *)x.p + i);
        *(float4 *)r.v = q[0];
        *(float4 *)(r.v + 4) = q[1];
    }
    return r;
}
static __device__ __forceinline__ void fg_store8(const fg_out &y, int64_t i, const fg_vec8 &x)
{
    if (y.narrow) {
        uint4 u = { fg_pack2(x[0], x[1]), fg_pack2(x[2], x[3]), fg_pack2(x[4], x[5]),
                    fg_pack2(x[6], x[7]) };
        *(uint4 *)((bf16 *)y.p + i) = u;
    } else {
        float4 *q = (float4 *)((float *)y.p + i);
        q[0] = *(const float4 *)x.v;
        q[1] = *(const float4 *)(x.v + 4);
    }
}

/* ---- sums: every thread gets the same value, in one fixed order ------------------------------ */

template <int LANES = 32> static __device__ __forceinline__ float fg_warp_sum(float x)
{
#pragma unroll
    for (int k = LANES / 2; k > 0; k /= 2) x += __shfl_xor_sync(~0u, x, k);
    return x;
}
template <int LANES = 32> static __device__ __forceinline__ float fg_warp_max(float x)
{
#pragma unroll
    for (int k = LANES / 2; k > 0; k /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, k));
    return x;
}
/* All THREADS threads of the block call it; may be called again and again. */
template <int THREADS> static __device__ __forceinline__ float fg_block_sum(float x)
{
    __shared__ float part[THREADS / 32];
    x = fg_warp_sum(x);
    __syncthreads();                             /* the last call's readers are done */
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) x += part[i];
    return x;
}
#endif
