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

static inline bool heads_even(const norm_rows &m) { return m.per == 1 && m.pitch < INT32_MAX / 2; }
/* A thread's eight channels of every row, from `column` on.  The address of row 0 is hidden from
 * the compiler, which else would add its parts up anew for every row. */
struct heads_lane {
    char *top;
    __device__ __forceinline__ heads_lane(const void *p, int column)
    {
        top = (char *)p + 2 * (int64_t)column;
        asm("" : "+l"(top));
        __builtin_assume(__isGlobal(top));
    }
    __device__ __forceinline__ char *at(const norm_rows &m, int row) const
    {
        return top + (int64_t)row * (2 * (int)m.pitch);
    }
    __device__ __forceinline__ uint4 load(const norm_rows &m, int row) const
    {
        return *(const uint4 *)at(m, row);
    }
    __device__ __forceinline__ void store(const norm_rows &m, int row, const fg_vec8 &x) const
    {
        fg_store8(fg_out{ at(m, row), true }, 0, x);
    }
};
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
    return a.s.lanes && a.s.rows > 0 && a.s.rows * (a.s.D / 8) < INT32_MAX - HEADS_THREADS &&
           gate &&
           a.x.narrow && a.y.narrow && !a.more.p && heads_even(a.x_rows) && heads_even(a.y_rows);
}

template <norm_gate GATED, int LANES>
static __global__ void __launch_bounds__(HEADS_THREADS)
heads_norm(const __grid_constant__ norm_forward a, fg_divisor eights)
{
    const unsigned i = blockIdx.x * HEADS_THREADS + threadIdx.x;
    const int q = fg_divide_few(i, eights), n = (int)a.s.n, last = (int)a.s.rows - 1;
    const int row = q < last ? q : last;
    const int column = (int)(i - (unsigned)q * (unsigned)eights.d) * 8, inside = column & (n - 1);
    const uint4 raw = heads_lane(a.x.p, column).load(a.x_rows, row);
    uint4 gate;
    if (GATED) gate = heads_lane(a.g.p, column).load(a.g_rows, row);
    const fg_raw8 gains = fg_load_raw8(a.w, a.s.n_w == a.s.D ? column : inside);
    fg_vec8 x, g;
    fg_unpack(raw, x.v);
    float sum = 0;
#pragma unroll
    for (int k = 0; k < 8; k++) sum = fmaf(x[k], x[k], sum);
    sum = heads_sum<LANES>(sum, a.s.lanes);
    const float rstd = norm_rsqrt(fmaf(sum, 1.0f / (float)n, a.eps));
    if (q > last) return;
    if (inside == 0) a.rstd[(int64_t)row * (int)a.s.groups + column / n] = rstd;
    if (GATED) fg_unpack(gate, g.v);
    const fg_vec8 w = fg_floats(a.w, gains);
#pragma unroll
    for (int k = 0; k < 8; k++) {
        x[k] = x[k] * rstd * w[k];
        if (GATED) x[k] *= norm_sigmoid(g[k]);
    }
    heads_lane(a.y.p, column).store(a.y_rows, row, x);
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

/* Where a thread's channels lie. */
template <norm_gate GATED> struct heads_lanes {
    heads_lane gy, x, g, gx, gg;
    const float *rstd;
    __device__ __forceinline__ heads_lanes(const norm_backward &a, int column, int head) :
        gy(a.gy.p, column), x(a.x.p, column), g(a.g.p, column), gx(a.gx.p, column),
        gg(a.gg.p, column), rstd(a.rstd + head) { }
};

/* What one row needs from memory. */
template <norm_gate GATED> struct heads_row {
    uint4 gy, x, g;
    float rstd;
    __device__ __forceinline__ void fetch(const norm_backward &a, const heads_lanes<GATED> &to,
                                          int row)
    {
        gy = to.gy.load(a.gy_rows, row);
        x = to.x.load(a.x_rows, row);
        if (GATED) g = to.g.load(a.g_rows, row);
        rstd = to.rstd[(int64_t)row * (int)a.s.groups];
    }
};

/* gw's term gy s h and rstd m = rstd w s gy, of one vector, the latter in gy; g becomes
 * gg = gy s (1 - s) h w.  Returns the vector's part of the sum of m h.
 * A rounding more than norm_terms has, in front of the difference: for what becomes bf16. */
template <norm_gate GATED>
static __device__ __forceinline__ float heads_terms(float *gy, const float *x, float *g,
                                                    float rstd, const fg_vec8 &w, float *gw)
{
    float sum = 0;
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const float s = GATED ? norm_sigmoid(g[k]) : 1;
        float gn = gy[k] * rstd;
        if (GATED) gn *= s;
        gw[k] = fmaf(gn, x[k], gw[k]);
        gy[k] = gn * w[k];
        const float mh = gy[k] * x[k];
        if (GATED) g[k] = fmaf(-s, mh, mh);
        sum += mh;
    }
    return sum;
}

/* Lanes behind the last channel do as the last head's, and write the same. */
template <norm_gate GATED, int LANES>
static __global__ void __launch_bounds__(32 * NORM_WARPS, (heads_blocks<GATED>))
heads_grad(const __grid_constant__ norm_backward a)
{
    __shared__ float part[NORM_WARPS][HEADS_CHANNELS];
    const int n = (int)a.s.n, D = (int)a.s.D, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int own = blockIdx.y * HEADS_CHANNELS + lane * 8, inside = own & (n - 1);
    const int column = own < D ? own : D - n + inside;
    const int last = (int)norm_first(a.s.rows, a.parts, blockIdx.x + 1), pace = NORM_WARPS;
    int row = (int)norm_first(a.s.rows, a.parts, blockIdx.x) + warp;
    const fg_vec8 w = fg_load8(a.w, a.s.n_w == a.s.D ? column : inside);
    const float share = 1.0f / (float)n;                     /* exactly */
    const heads_lanes<GATED> to(a, column, column / n);
    fg_vec8 gw = {};
    heads_row<GATED> next[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (row + i * pace < last) next[i].fetch(a, to, row + i * pace);
    for (; row < last; row += pace) {
        const heads_row<GATED> r = next[0];
#pragma unroll
        for (int i = 1; i < AHEAD; i++) next[i - 1] = next[i];
        if (row + AHEAD * pace < last) next[AHEAD - 1].fetch(a, to, row + AHEAD * pace);
        fg_vec8 gy, x, g;
        fg_unpack(r.gy, gy.v);
        fg_unpack(r.x, x.v);
        if (GATED) fg_unpack(r.g, g.v);
        const float sum = heads_terms<GATED>(gy.v, x.v, g.v, r.rstd, w, gw.v);
        const float turn = -heads_sum<LANES>(sum, a.s.lanes) * share * r.rstd * r.rstd;
#pragma unroll
        for (int k = 0; k < 8; k++) gy[k] = fmaf(turn, x[k], gy[k]);
        to.gx.store(a.gx_rows, row, gy);
        if (GATED) to.gg.store(a.gg_rows, row, g);
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
