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

/* ---- gradient, in bf16, by way of a ring in shared memory ------------------------------------ */

/* Pairs of rows: one is summed, the others are on their way.  Two rows share a barrier.  On an H100
 * 80GB HBM3, 2026-11-26, 197 us for [16384,3072] in a step. */
enum { PAIRS = 2 };

/* A thread's vector of a row. */
static __device__ __forceinline__ bf16 *vector_at(const void *p, const norm_rows &m, int row,
                                                  int at)
{
    return (bf16 *)p + ((int64_t)row * (int)m.pitch + at);
}
/* Its vectors of two rows, which it alone will read; 0 where `left` are fewer. */
static __device__ __forceinline__ void load_pair(uint4 *to, int threads, const norm_backward &a,
                                                 int row, int at, int left)
{
#pragma unroll
    for (int k = 0; k < 2; k++, row++) {
        const bf16 *from[3] = { vector_at(a.gy.p, a.gy_rows, row, at),
                                vector_at(a.x.p, a.x_rows, row, at),
                                vector_at(a.g.p, a.g_rows, row, at) };
#pragma unroll
        for (int i = 0; i < 3; i++, to += threads)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                         :: "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from[i]),
                            "r"(k < left ? 16 : 0) : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

static __device__ __forceinline__ uint4 pack(const float *x)
{
    return make_uint4(fg_pack2(x[0], x[1]), fg_pack2(x[2], x[3]), fg_pack2(x[4], x[5]),
                      fg_pack2(x[6], x[7]));
}

/* norm_block_sum of two. */
template <int THREADS> static __device__ __forceinline__ void pair_sum(float (&x)[2], int slot)
{
    __shared__ float2 part[2][THREADS / 32];
    x[0] = fg_warp_sum(x[0]), x[1] = fg_warp_sum(x[1]);
    if (threadIdx.x % 32 == 0) part[slot][threadIdx.x / 32] = make_float2(x[0], x[1]);
    __syncthreads();
    x[0] = x[1] = 0;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) {
        const float2 p = part[slot][i];
        x[0] += p.x, x[1] += p.y;
    }
}

/* As norm_grad_whole; a thread has one vector of a group. */
template <int THREADS>
static __global__ void __launch_bounds__(THREADS, THREADS < 512 ? 2 : 1)
grad_ring(const __grid_constant__ norm_backward a)
{
    extern __shared__ uint4 ring[];
    const norm_place<THREADS, 1> place(a.s, blockIdx.y);
    const int first = (int)norm_first(a.s.rows, a.parts, blockIdx.x);
    const int last = (int)norm_first(a.s.rows, a.parts, blockIdx.x + 1), at = place.at[0];
    const int there = place.ok[0] ? last : first;            /* rows that the thread sees */
    const int groups = (int)a.s.groups;
    const float share = 1 / (float)a.s.n;
    uint4 *own = ring + threadIdx.x;
    float gw[8] = {}, next[2];
#pragma unroll
    for (int i = 0; i < PAIRS - 1; i++)
        load_pair(own + 6 * i * THREADS, THREADS, a, first + 2 * i, at, there - first - 2 * i);
#pragma unroll
    for (int k = 0; k < 2; k++)
        next[k] = first + k < last ? a.rstd[(int64_t)(first + k) * groups + blockIdx.y] : 0;
    for (int row = first, pair = 0; row < last; row += 2, pair++) {
        float now[2], gy[2][8], sum[2];
        asm volatile("cp.async.wait_group %0;" :: "n"(PAIRS - 2) : "memory");
        const uint4 *mine = own + pair % PAIRS * 6 * THREADS;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const int64_t coming = (int64_t)(row + 2 + k) * groups + blockIdx.y;
            float x[8], g[8];
            now[k] = next[k];
            next[k] = row + 2 + k < last ? a.rstd[coming] : 0;
            fg_unpack(mine[3 * k * THREADS], gy[k]);
            fg_unpack(mine[(3 * k + 1) * THREADS], x);
            fg_unpack(mine[(3 * k + 2) * THREADS], g);
            sum[k] = norm_gate_terms<1>(gy[k], x, g, now[k], fg_load8(a.w, place.w[0]), gw);
        }
        const int far = row + 2 * (PAIRS - 1);
        load_pair(own + (pair + PAIRS - 1) % PAIRS * 6 * THREADS, THREADS, a, far, at, there - far);
        pair_sum<THREADS>(sum, pair & 1);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const float mean = sum[k] * share;
            float x[8], g[8];
            fg_unpack(mine[(3 * k + 1) * THREADS], x);       /* again: registers are few */
            fg_unpack(mine[(3 * k + 2) * THREADS], g);
#pragma unroll
            for (int j = 0; j < 8; j++) norm_gate_back(gy[k][j], x[j], g[j], now[k], mean);
            if (row + k >= there) continue;
            *(uint4 *)vector_at(a.gx.p, a.gx_rows, row + k, at) = pack(gy[k]);
            *(uint4 *)vector_at(a.gg.p, a.gg_rows, row + k, at) = pack(g);
        }
    }
    float *part = (float *)ring;
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    if (place.ok[0])
#pragma unroll
        for (int k = 0; k < 8; k++) part[at - (int)(blockIdx.y * a.s.segment) + k] = gw[k];
    __syncthreads();
    norm_leave<THREADS>(a, part);
}

static bool takes_ring(const norm_backward &a)
{
    const norm_rows *rows[] = { &a.gy_rows, &a.x_rows, &a.g_rows, &a.gx_rows, &a.gg_rows };
    bool plain = true;
    for (int i = 0; i < 5; i++)
        plain = plain && rows[i]->per == 1 && rows[i]->pitch < INT32_MAX;
    return plain && a.s.rows < INT32_MAX && a.s.whole && !a.s.lanes && a.s.segment > 512 &&
           a.gy.narrow && a.x.narrow && a.g.narrow && a.gx.narrow && a.gg.narrow;
}
template <int THREADS> static void ring_start(const norm_backward &a, cudaStream_t stream)
{
    const dim3 grid((unsigned)a.parts, (unsigned)a.s.segments);
    const int bytes = PAIRS * 6 * THREADS * (int)sizeof(uint4);
    cudaFuncSetAttribute(grad_ring<THREADS>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    grad_ring<THREADS><<<grid, THREADS, bytes, stream>>>(a);
}
static void ring_launch(norm_backward &a, const fg_out &gw, cudaStream_t stream)
{
    a.parts = norm_parts(a.s);
    if (a.s.segment <= 1024) ring_start<128>(a, stream);
    else if (a.s.segment <= 1536) ring_start<192>(a, stream);
    else if (a.s.segment <= 2048) ring_start<256>(a, stream);
    else if (a.s.segment <= 3072) ring_start<384>(a, stream);
    else ring_start<512>(a, stream);
    norm_add_all(a, gw, stream);
}

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
    if (takes_ring(a)) ring_launch(a, fg_output_of(e, 1), stream);
    else norm_grad_launch<NORM_OF_GATED>(a, fg_output_of(e, 1), stream);
}

FG_KERNEL(norm_of_gated_grad) = {
    .launch = grad_launch, .scratch = grad_scratch,
    .pitched_in = 1u << 0 | 1u << 1 | 1u << 3, .pitched_out = 1u << 0 | 1u << 2,
};
