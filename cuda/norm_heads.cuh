/* norm_heads.cuh - norm.cuh's norm and its gradient where a row is many short groups, heads, and
 * all is bf16: for rms_norm.cu and gated_norm.cu.
 *
 *     y = x rstd w s;   m = w s gy, h = x rstd:  gx = rstd (m - h mean(m h)),
 *     gw = sum over rows of gy s h,  gg = gy h w s (1 - s);   s = sigmoid(g), 1 without a gate
 *
 * A lane holds eight channels, a head of n = 8, 16 .. 256 is n / 8 neighbouring lanes.  Forward, a
 * thread is done with that.  Backward, a warp has 256 channels; the warps of a block take turns at
 * the block's rows, the next AHEAD of a warp on their way.  Elements stay packed until they are
 * needed: that is what lets so many warps be there. */
#ifndef FG_NORM_HEADS_CUH
#define FG_NORM_HEADS_CUH
#include "elementwise.cuh"
#include "norm.cuh"

/* H100, 2026-11: one more block and one row more or less on their way cost up to 6 %. */
constexpr int HEADS_THREADS = 256;               /* forward: of a block */
constexpr int HEADS_CHANNELS = 256, AHEAD = 2;   /* backward: of a warp; its rows on their way */
template <norm_gate GATED> constexpr int heads_blocks = GATED ? 4 : 6;        /* of a processor */

static inline bool heads_even(const norm_rows &m) { return m.per == 1 && m.pitch < INT32_MAX; }
static __device__ __forceinline__ int64_t heads_at(const norm_rows &m, int row, int column)
{
    return (int64_t)row * (int)m.pitch + column;
}
template <int LANES> static __device__ __forceinline__ float heads_sum(float x, int lanes)
{
    if constexpr (LANES > 0) return fg_warp_sum<LANES>(x);
    else {
        for (int k = lanes / 2; k > 0; k /= 2) x += __shfl_xor_sync(~0u, x, k);
        return x;
    }
}

/* ---- forward -------------------------------------------------------------------------------- */

template <norm_gate GATED> static bool heads_fit(const norm_forward &a)
{
    const bool gate = !GATED || (a.g.narrow && heads_even(a.g_rows));
    return a.s.lanes && a.s.rows > 0 && a.s.rows * a.s.D < INT32_MAX * (int64_t)8 && gate &&
           a.x.narrow && a.y.narrow && !a.more.p && heads_even(a.x_rows) && heads_even(a.y_rows);
}

template <norm_gate GATED, int LANES>
static __global__ void __launch_bounds__(HEADS_THREADS)
heads_norm(const norm_forward a, fg_divisor eights)
{
    const int64_t i = (int64_t)blockIdx.x * HEADS_THREADS + threadIdx.x;
    const int row = (int)fg_divide(i, eights), n = (int)a.s.n;
    const int column = (int)(i - row * eights.d) * 8, inside = column & (n - 1);
    const bool ok = row < a.s.rows;
    uint4 raw = make_uint4(0, 0, 0, 0), gate = raw;
    if (ok) raw = *(const uint4 *)((const bf16 *)a.x.p + heads_at(a.x_rows, row, column));
    if (GATED && ok)
        gate = *(const uint4 *)((const bf16 *)a.g.p + heads_at(a.g_rows, row, column));
    const fg_vec8 w = fg_load8(a.w, a.s.n_w == a.s.D ? column : inside);
    fg_vec8 x, g;
    fg_unpack(raw, x.v);
    float sum = 0;
#pragma unroll
    for (int k = 0; k < 8; k++) sum = fmaf(x[k], x[k], sum);
    sum = heads_sum<LANES>(sum, a.s.lanes);
    const float rstd = norm_rsqrt(fmaf(sum, 1.0f / (float)n, a.eps));
    if (!ok) return;
    if (inside == 0) a.rstd[(int64_t)row * (int)a.s.groups + column / n] = rstd;
    if (GATED) fg_unpack(gate, g.v);
#pragma unroll
    for (int k = 0; k < 8; k++) {
        x[k] = x[k] * rstd * w[k];
        if (GATED) x[k] *= norm_sigmoid(g[k]);
    }
    fg_store8(fg_out{ a.y.p, true }, heads_at(a.y_rows, row, column), x);
}

template <norm_gate GATED> static void heads_launch(const norm_forward &a, cudaStream_t stream)
{
    const int64_t threads = a.s.rows * (a.s.D / 8);
    const fg_divisor eights = fg_divisor_of(a.s.D / 8, threads + HEADS_THREADS);
    const unsigned blocks = fg_blocks(threads, HEADS_THREADS);
    if (a.s.lanes == 8) heads_norm<GATED, 8><<<blocks, HEADS_THREADS, 0, stream>>>(a, eights);
    else if (a.s.lanes == 16)
        heads_norm<GATED, 16><<<blocks, HEADS_THREADS, 0, stream>>>(a, eights);
    else heads_norm<GATED, 0><<<blocks, HEADS_THREADS, 0, stream>>>(a, eights);
}

/* ---- gradient ------------------------------------------------------------------------------- */

static inline int64_t heads_segments(const norm_size &s)
{
    return (s.D + HEADS_CHANNELS - 1) / HEADS_CHANNELS;
}
/* Blocks that share the rows. */
template <norm_gate GATED> static int64_t heads_parts(const norm_size &s)
{
    const int64_t most = NORM_PROCESSORS * heads_blocks<GATED> / heads_segments(s);
    const int64_t parts = (s.rows + NORM_ROWS * NORM_WARPS - 1) / (NORM_ROWS * NORM_WARPS);
    return parts < most ? (parts > 1 ? parts : 1) : most > 1 ? most : 1;
}
template <norm_gate GATED> static size_t heads_scratch(const norm_size &s)
{
    return s.lanes ? (size_t)(heads_parts<GATED>(s) * s.D) * sizeof(float) : 0;
}

template <norm_gate GATED> static bool heads_fit(const norm_backward &a)
{
    const bool gate = !GATED || (a.g.narrow && a.gg.narrow && heads_even(a.g_rows) &&
                                 heads_even(a.gg_rows));
    return a.s.lanes && a.s.rows > 0 && a.s.rows < INT32_MAX && gate && a.gy.narrow &&
           a.x.narrow && a.gx.narrow && !a.more.p && !a.gx16.p && heads_even(a.gy_rows) &&
           heads_even(a.x_rows) && heads_even(a.gx_rows);
}

/* What one row needs from memory. */
template <norm_gate GATED> struct heads_row {
    uint4 gy, x, g;
    float rstd;
    __device__ __forceinline__ void fetch(const norm_backward &a, int row, int column, int head)
    {
        gy = *(const uint4 *)((const bf16 *)a.gy.p + heads_at(a.gy_rows, row, column));
        x = *(const uint4 *)((const bf16 *)a.x.p + heads_at(a.x_rows, row, column));
        if (GATED) g = *(const uint4 *)((const bf16 *)a.g.p + heads_at(a.g_rows, row, column));
        rstd = a.rstd[(int64_t)row * (int)a.s.groups + head];
    }
};

/* Lanes behind the last channel do as the last head's, and keep it to themselves. */
template <norm_gate GATED, int LANES>
static __global__ void __launch_bounds__(32 * NORM_WARPS, (heads_blocks<GATED>))
heads_grad(const norm_backward a)
{
    __shared__ float part[NORM_WARPS][HEADS_CHANNELS];
    const int n = (int)a.s.n, D = (int)a.s.D, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int own = blockIdx.y * HEADS_CHANNELS + lane * 8, inside = own & (n - 1);
    const bool ok = own < D;
    const int column = ok ? own : D - n + inside, head = column / n;
    const int last = (int)norm_first(a.s.rows, a.parts, blockIdx.x + 1);
    int row = (int)norm_first(a.s.rows, a.parts, blockIdx.x) + warp;
    const fg_vec8 w = fg_load8(a.w, a.s.n_w == a.s.D ? column : inside);
    const float share = 1.0f / (float)n;                     /* exactly */
    fg_vec8 gw = {};
    heads_row<GATED> next[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (row + i * NORM_WARPS < last) next[i].fetch(a, row + i * NORM_WARPS, column, head);
    for (; row < last; row += NORM_WARPS) {
        const heads_row<GATED> r = next[0];
#pragma unroll
        for (int i = 1; i < AHEAD; i++) next[i - 1] = next[i];
        if (row + AHEAD * NORM_WARPS < last)
            next[AHEAD - 1].fetch(a, row + AHEAD * NORM_WARPS, column, head);
        fg_vec8 gy, h, g;
        fg_unpack(r.gy, gy.v);
        fg_unpack(r.x, h.v);
        if (GATED) fg_unpack(r.g, g.v);
#pragma unroll
        for (int k = 0; k < 8; k++) h[k] *= r.rstd;
        const float sum = norm_terms<GATED>(gy.v, h.v, g.v, w, gw.v);
        const float mean = heads_sum<LANES>(sum, a.s.lanes) * share;
#pragma unroll
        for (int k = 0; k < 8; k++) gy[k] = r.rstd * (gy[k] - h[k] * mean);
        if (!ok) continue;
        fg_store8(fg_out{ a.gx.p, true }, heads_at(a.gx_rows, row, column), gy);
        if (GATED) fg_store8(fg_out{ a.gg.p, true }, heads_at(a.gg_rows, row, column), g);
    }
#pragma unroll
    for (int k = 0; k < 8; k++) part[warp][lane * 8 + k] = gw[k];
    __syncthreads();
    for (int j = threadIdx.x; j < HEADS_CHANNELS; j += 32 * NORM_WARPS) {
        float sum = 0;
        for (int i = 0; i < NORM_WARPS; i++) sum += part[i][j];
        const int64_t to = blockIdx.y * HEADS_CHANNELS + j;
        if (to < D) a.part[blockIdx.x * a.s.D + to] = sum;
    }
}

/* Where heads share the gain, a block's row of partial sums is D / n rows. */
template <norm_gate GATED>
static void heads_launch(norm_backward &a, const fg_out &gw, cudaStream_t stream)
{
    const norm_size &s = a.s;
    a.parts = heads_parts<GATED>(s);
    const dim3 grid((unsigned)a.parts, (unsigned)heads_segments(s)), block(32, 32);
    if (s.lanes == 8) heads_grad<GATED, 8><<<grid, 32 * NORM_WARPS, 0, stream>>>(a);
    else if (s.lanes == 16) heads_grad<GATED, 16><<<grid, 32 * NORM_WARPS, 0, stream>>>(a);
    else heads_grad<GATED, 0><<<grid, 32 * NORM_WARPS, 0, stream>>>(a);
    norm_add_parts<<<fg_blocks(s.n_w, 32), block, 0, stream>>>(a.part, a.parts * (s.D / s.n_w),
                                                               s.n_w, gw);
}
#endif
