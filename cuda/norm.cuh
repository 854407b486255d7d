/* norm.cuh - what rms_norm.cu, gated_norm.cu and norm_of_gated.cu share: a norm of groups of a row,
 * and its gradient.
 *
 *     y = x rstd w [sigmoid(g)],   rstd = 1 / sqrt(mean(x^2) + eps)   over each group of n elements
 *     y = u rstd w,   u = x silu(g),   rstd = 1 / sqrt(mean(u^2) + eps)
 *
 * Rows of D elements are cut in segments, each held in registers by THREADS threads, VECS vectors
 * of 8 elements a thread: every input is read once and every output written once.  A segment is
 *   - one group, n <= 4096: all its threads sum;
 *   - or 512 elements of several groups of n = 8, 16, .. 256: n / 8 neighbouring lanes sum.
 * Any other n goes element by element, one warp to a group, and reads its inputs twice.
 * The gradient's blocks walk the rows they are given, in order; the next row is on its way while
 * the present one is summed.  Each leaves one row of partial sums of gw, and a second kernel adds
 * those.  Blocks and rows are set by the shape alone. */
#ifndef FG_NORM_CUH
#define FG_NORM_CUH
#include "kernel.cuh"

enum norm_gate { NORM_PLAIN, NORM_GATED, NORM_OF_GATED };    /* no gate, behind, before the norm */

enum {
    NORM_WARPS = 4,              /* of a block, where a warp holds a segment */
    NORM_FEW = 512,              /* elements of a segment of several groups */
    NORM_PROCESSORS = 132,       /* that the gradient's rows are shared among, on any card */
    NORM_ROWS = 4                /* that a block of the gradient walks at the least */
};

/* Blocks of the gradient that a processor holds, by the threads of a segment and their vectors:
 * what registers allow.  H100, 2026-11. */
template <int THREADS, int VECS> constexpr int norm_backward_blocks =
    THREADS == 32 ? (VECS == 1 ? 5 : 3) : THREADS == 128 ? 4
    : THREADS == 192 ? (VECS == 1 ? 3 : 2) : THREADS == 256 ? 2 : 1;

/* Row r of a tensor of rows of D elements begins at r / per * pitch + r % per * D. */
struct norm_rows { int64_t per, pitch, D; };

static inline norm_rows norm_rows_of(const fg_rows *r, int64_t D)
{
    if (!fg_is_pitched(r) || r->width <= D) return { 1, fg_pitch_of(r, D), D };
    return { r->width / D, r->pitch, D };
}
static __device__ __forceinline__ int64_t norm_row(const norm_rows &m, int64_t r)
{
    return m.per == 1 ? r * m.pitch : r / m.per * m.pitch + r % m.per * m.D;
}

struct norm_size {
    int64_t rows, D, n, groups;
    int64_t n_w;                 /* elements of the gain: D, or n where the groups share it */
    int64_t segment, segments;   /* elements of a segment, segments of a row */
    int lanes;                   /* that sum one group; 0: all threads of the segment */
    bool whole;                  /* segments fit in registers; false: element by element */
};
/* Chooses the threads and vectors that hold a segment: USE(THREADS, VECS) for the first that do. */
#define NORM_FORMS(segment, USE) \
    do { \
        if ((segment) <= 256) { USE(32, 1); } \
        else if ((segment) <= 512) { USE(32, 2); } \
        else if ((segment) <= 1024) { USE(128, 1); } \
        else if ((segment) <= 1536) { USE(192, 1); } \
        else if ((segment) <= 2048) { USE(256, 1); } \
        else if ((segment) <= 3072) { USE(192, 2); } \
        else { USE(512, 1); } \
    } while (0)

static inline norm_size norm_size_of(const fg_shape *x, const fg_shape *w, int64_t groups)
{
    norm_size s = {};
    s.rows = 1;
    for (int i = 0; i + 1 < x->rank; i++) s.rows *= x->dim[i];
    s.D = fg_last_of(x), s.groups = groups, s.n = s.D / groups, s.n_w = fg_last_of(w);
    s.whole = s.n % 8 == 0 && s.n <= 4096 && s.D < 1 << 30;
    const bool few = s.whole && groups > 1 && s.n <= 256 && (s.n & (s.n - 1)) == 0;
    s.lanes = few ? (int)(s.n / 8) : 0;
    s.segment = s.n;
    if (few) s.segment = NORM_FEW;
    s.segments = (s.D + s.segment - 1) / s.segment;
    s.whole = s.whole && s.segments < 65536;     /* what a grid's second axis takes */
    return s;
}

/* ---- a segment in registers ----------------------------------------------------------------- */

/* VECS vectors of 8 floats.  Between fetch and widen a bf16 vector lies packed in its first half:
 * so all loads are on their way before the first value is needed. */
template <int VECS> struct norm_values { float v[VECS][8]; };

template <int VECS>
static __device__ __forceinline__ void norm_fetch(norm_values<VECS> &r, const fg_in &x, int64_t row,
                                                  const int *at, const bool *ok)
{
    if (x.narrow) {
#pragma unroll
        for (int i = 0; i < VECS; i++)
            *(uint4 *)r.v[i] = ok[i] ? *(const uint4 *)((const bf16 *)x.p + row + at[i])
                                     : make_uint4(0, 0, 0, 0);
    } else {
#pragma unroll
        for (int i = 0; i < VECS; i++) {
            const float4 *q = (const float4 *)((const float *)x.p + row + at[i]);
            *(float4 *)r.v[i] = ok[i] ? q[0] : make_float4(0, 0, 0, 0);
            *(float4 *)(r.v[i] + 4) = ok[i] ? q[1] : make_float4(0, 0, 0, 0);
        }
    }
}

template <int VECS>
static __device__ __forceinline__ void norm_widen(norm_values<VECS> &r, bool narrow)
{
    if (!narrow) return;
#pragma unroll
    for (int i = 0; i < VECS; i++) fg_unpack(*(const uint4 *)r.v[i], r.v[i]);
}

template <int VECS>
static __device__ __forceinline__ void norm_put(const norm_values<VECS> &r, const fg_out &y,
                                                int64_t row, const int *at, const bool *ok)
{
#pragma unroll
    for (int i = 0; i < VECS; i++) {
        if (!ok[i]) continue;
        fg_vec8 x;
#pragma unroll
        for (int k = 0; k < 8; k++) x[k] = r.v[i][k];
        fg_store8(y, row + at[i], x);
    }
}

/* The sum over a block; calls take turns between two slots, so that one barrier is enough. */
template <int THREADS> static __device__ __forceinline__ float norm_block_sum(float x, int slot)
{
    __shared__ float part[2][THREADS / 32];
    x = fg_warp_sum(x);
    if (threadIdx.x % 32 == 0) part[slot][threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) x += part[slot][i];
    return x;
}

/* part[i], one for each vector, becomes the sum over the group that the vector lies in. */
template <int THREADS, int VECS>
static __device__ __forceinline__ void norm_group_sums(float (&part)[VECS], int lanes, int slot)
{
    if (THREADS == 32 && lanes > 0) {
#pragma unroll
        for (int i = 0; i < VECS; i++)
            for (int k = lanes / 2; k > 0; k /= 2) part[i] += __shfl_xor_sync(~0u, part[i], k);
        return;
    }
    float sum = part[0];
#pragma unroll
    for (int i = 1; i < VECS; i++) sum += part[i];
    sum = THREADS == 32 ? fg_warp_sum(sum) : norm_block_sum<THREADS>(sum, slot);
#pragma unroll
    for (int i = 0; i < VECS; i++) part[i] = sum;
}

/* Where a thread's vectors lie. */
template <int THREADS, int VECS> struct norm_place {
    int at[VECS], w[VECS], group[VECS];          /* in the row, in the gain; its group */
    bool ok[VECS], first[VECS];  /* inside the segment; first vector of its group */
    __device__ __forceinline__ norm_place(const norm_size &s, int segment)
    {
        const int from = segment * (int)s.segment, n = (int)s.n;
        const int to = from + s.segment < s.D ? from + (int)s.segment : (int)s.D;
#pragma unroll
        for (int i = 0; i < VECS; i++) {
            at[i] = from + (i * THREADS + threadIdx.x % THREADS) * 8;
            ok[i] = at[i] < to;
            const int inside = s.lanes ? at[i] & (n - 1) : at[i] - from;
            first[i] = ok[i] && inside == 0;
            w[i] = !ok[i] ? 0 : s.n_w == s.D ? at[i] : inside;
            group[i] = ok[i] ? at[i] / n : 0;
        }
    }
};

/* What is below 2^-126 counts as 0: that saves the scaling around both approximations. */
static __device__ __forceinline__ float norm_sigmoid(float x)
{
    float e, s;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-1.4426950408889634f * x));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + e));
    return s;
}

static __device__ __forceinline__ float norm_silu(float x) { return x * norm_sigmoid(x); }

/* 1 / sqrt(x) to the last place: the processor's own, and a step of Newton's. */
static __device__ __forceinline__ float norm_rsqrt(float x)
{
    const float r = rsqrtf(x), e = fmaf(-x * r, r, 1.0f);
    return isfinite(r) ? fmaf(0.5f * r, e, r) : r;
}

/* Threads of a block; a block of THREADS > 32 holds one segment. */
template <int THREADS> constexpr int norm_block = THREADS == 32 ? 32 * NORM_WARPS : THREADS;

/* ---- forward -------------------------------------------------------------------------------- */

struct norm_forward {
    norm_size s;
    fg_in x, more, w, g;         /* more: added to x before the norm; more.p, g.p NULL: none */
    fg_out y, sum;               /* sum = x + more, where there is more */
    float *rstd;
    norm_rows x_rows, g_rows, y_rows;            /* more and sum are contiguous */
    float eps;
};

template <norm_gate GATED, int THREADS, int VECS>
static __global__ void __launch_bounds__(norm_block<THREADS>) norm_whole(const norm_forward a)
{
    const int64_t row = THREADS == 32
                      ? blockIdx.x * (int64_t)NORM_WARPS + threadIdx.x / 32 : blockIdx.x;
    if (row >= a.s.rows) return;
    const norm_place<THREADS, VECS> place(a.s, blockIdx.y);
    norm_values<VECS> x, other;
    norm_fetch(x, a.x, norm_row(a.x_rows, row), place.at, place.ok);
    if (GATED) norm_fetch(other, a.g, norm_row(a.g_rows, row), place.at, place.ok);
    else if (a.more.p) norm_fetch(other, a.more, row * a.s.D, place.at, place.ok);
    norm_widen(x, a.x.narrow);
    if (GATED) norm_widen(other, a.g.narrow);
    if (GATED == NORM_OF_GATED) {
#pragma unroll
        for (int i = 0; i < VECS; i++)
#pragma unroll
            for (int k = 0; k < 8; k++)
                x.v[i][k] *= norm_silu(other.v[i][k]);
    }
    if (!GATED && a.more.p) {
        norm_widen(other, a.more.narrow);
#pragma unroll
        for (int i = 0; i < VECS; i++)
#pragma unroll
            for (int k = 0; k < 8; k++) x.v[i][k] += other.v[i][k];
        norm_put(x, a.sum, row * a.s.D, place.at, place.ok);
    }
    float rstd[VECS];
#pragma unroll
    for (int i = 0; i < VECS; i++) {
        rstd[i] = 0;
#pragma unroll
        for (int k = 0; k < 8; k++) rstd[i] += x.v[i][k] * x.v[i][k];
    }
    norm_group_sums<THREADS>(rstd, a.s.lanes, 0);
#pragma unroll
    for (int i = 0; i < VECS; i++) {
        rstd[i] = 1.0f / sqrtf(rstd[i] / (float)a.s.n + a.eps);
        if (place.first[i]) a.rstd[row * a.s.groups + place.group[i]] = rstd[i];
        const fg_vec8 w = fg_load8(a.w, place.w[i]);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            x.v[i][k] = x.v[i][k] * rstd[i] * w[k];
            if (GATED == NORM_GATED) x.v[i][k] *= norm_sigmoid(other.v[i][k]);
        }
    }
    norm_put(x, a.y, norm_row(a.y_rows, row), place.at, place.ok);
}

/* Groups of any length: one warp to a group, element by element. */
template <norm_gate GATED>
static __global__ void __launch_bounds__(32 * NORM_WARPS) norm_elements(const norm_forward a)
{
    const int64_t k = blockIdx.x * (int64_t)NORM_WARPS + threadIdx.x / 32, n = a.s.n;
    if (k >= a.s.rows * a.s.groups) return;
    const int64_t row = k / a.s.groups, from = k % a.s.groups * n, lane = threadIdx.x % 32;
    const int64_t x_at = norm_row(a.x_rows, row) + from, w_at = a.s.n_w == a.s.D ? from : 0;
    const int64_t y_at = norm_row(a.y_rows, row) + from, more_at = row * a.s.D + from;
    const int64_t g_at = GATED ? norm_row(a.g_rows, row) + from : 0;
    float sum = 0;
    for (int64_t i = lane; i < n; i += 32) {
        float x = a.x[x_at + i];
        if (GATED == NORM_OF_GATED) x *= norm_silu(a.g[g_at + i]);
        if (!GATED && a.more.p) {
            x += a.more[more_at + i];
            a.sum.put(more_at + i, x);
        }
        sum += x * x;
    }
    const float rstd = 1.0f / sqrtf(fg_warp_sum(sum) / (float)n + a.eps);
    if (lane == 0) a.rstd[k] = rstd;
    for (int64_t i = lane; i < n; i += 32) {
        float x = a.x[x_at + i];
        if (GATED == NORM_OF_GATED) x *= norm_silu(a.g[g_at + i]);
        if (!GATED && a.more.p) x += a.more[more_at + i];
        x = x * rstd * a.w[w_at + i];
        if (GATED == NORM_GATED) x *= norm_sigmoid(a.g[g_at + i]);
        a.y.put(y_at + i, x);
    }
}

template <norm_gate GATED, int THREADS, int VECS>
static void norm_start(const norm_forward &a, cudaStream_t stream)
{
    const dim3 grid(fg_blocks(a.s.rows, THREADS == 32 ? NORM_WARPS : 1), (unsigned)a.s.segments);
    norm_whole<GATED, THREADS, VECS><<<grid, norm_block<THREADS>, 0, stream>>>(a);
}

template <norm_gate GATED> static void norm_launch(const norm_forward &a, cudaStream_t stream)
{
    const norm_size &s = a.s;
    if (s.rows == 0 || s.D == 0) return;
    if (!s.whole) {
        norm_elements<GATED><<<fg_blocks(s.rows * s.groups, NORM_WARPS), 32 * NORM_WARPS, 0,
                               stream>>>(a);
        return;
    }
#define USE(threads, vecs) norm_start<GATED, threads, vecs>(a, stream)
    NORM_FORMS(s.segment, USE);
#undef USE
}

/* ---- gradient ------------------------------------------------------------------------------- */

struct norm_backward {
    norm_size s;
    fg_in gy, x, w, g, more;     /* more: added to gx; g.p, more.p NULL: none */
    fg_out gx, gg, gx16;         /* gx16: gx once more; gx16.p NULL: none */
    const float *rstd;
    float *part;                 /* rows of partial sums of gw */
    int64_t parts;               /* blocks that share the rows */
    norm_rows gy_rows, x_rows, g_rows, more_rows, gx_rows, gg_rows, gx16_rows;
};

/* Rows [first, last) of one of `parts` blocks. */
static __device__ __forceinline__ int64_t norm_first(int64_t rows, int64_t parts, int64_t i)
{
    return rows / parts * i + (i < rows % parts ? i : rows % parts);
}

/* m = w s gy and gw's term gy s h, of one vector; gg = gy s (1 - s) h w. */
template <norm_gate GATED>
static __device__ __forceinline__ float norm_terms(float *gy, const float *h, float *g,
                                                   const fg_vec8 &w, float *gw)
{
    float sum = 0;
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const float s = GATED ? norm_sigmoid(g[k]) : 1, gn = GATED ? gy[k] * s : gy[k];
        gy[k] = gn * w[k];
        gw[k] += gn * h[k];
        sum += gy[k] * h[k];
        if (GATED) g[k] = gy[k] * h[k] * (1 - s);
    }
    return sum;
}

/* The same where the gate comes first: x and g stay as they are; gw's elements lie STEP apart. */
template <int STEP>
static __device__ __forceinline__ float norm_gate_terms(float *gy, const float *x, const float *g,
                                                        float rstd, const fg_vec8 &w, float *gw)
{
    float sum = 0;
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const float h = x[k] * norm_silu(g[k]) * rstd;
        gw[k * STEP] += gy[k] * h;
        gy[k] *= w[k];
        sum += gy[k] * h;
    }
    return sum;
}
/* And behind the sum: gu = rstd (m - h mean), gx = gu g s, gg = gu x s (1 + g (1 - s)); m is in gy,
 * which becomes gx; g becomes gg. */
static __device__ __forceinline__ void norm_gate_back(float &gy, float x, float &g, float rstd,
                                                      float mean)
{
    const float s = norm_sigmoid(g), silu = g * s;
    const float gu = rstd * (gy - x * silu * rstd * mean);
    gy = gu * silu;
    g = gu * x * s * (1 + g * (1 - s));
}

/* The block's sums of gw to its row of a.part: `part` has one row of the segment's width for every
 * warp (every block, where THREADS > 32).  Where groups share the gain, they are added here. */
template <int THREADS>
static __device__ __forceinline__ void norm_leave(const norm_backward &a, const float *part)
{
    const norm_size &s = a.s;
    const int64_t from = blockIdx.y * s.segment, left = s.D - from;
    const int width = (int)(s.segment < left ? s.segment : left);
    const int held = THREADS == 32 ? NORM_WARPS : 1;
    const bool fold = s.lanes > 0 && s.n_w != s.D;
    const int columns = fold ? (int)s.n : width;
    float *to = s.n_w == s.D ? a.part + blockIdx.x * s.D + from
                             : a.part + (blockIdx.x * s.segments + blockIdx.y) * s.n;
    for (int j = threadIdx.x; j < columns; j += norm_block<THREADS>) {
        float sum = 0;
        for (int warp = 0; warp < held; warp++)
            for (int k = j; k < width; k += columns) sum += part[warp * s.segment + k];
        to[j] = sum;
    }
}

/* What one row needs from memory. */
template <int VECS> struct norm_backward_row {
    norm_values<VECS> gy, x, other;
    float rstd[VECS];
};

template <norm_gate GATED, int THREADS, int VECS>
static __device__ __forceinline__ void
norm_backward_fetch(norm_backward_row<VECS> &r, const norm_backward &a, int64_t row,
                    const norm_place<THREADS, VECS> &place)
{
    norm_fetch(r.x, a.x, norm_row(a.x_rows, row), place.at, place.ok);
    norm_fetch(r.gy, a.gy, norm_row(a.gy_rows, row), place.at, place.ok);
    if (GATED) norm_fetch(r.other, a.g, norm_row(a.g_rows, row), place.at, place.ok);
    else if (a.more.p)
        norm_fetch(r.other, a.more, norm_row(a.more_rows, row), place.at, place.ok);
#pragma unroll
    for (int i = 0; i < VECS; i++) r.rstd[i] = a.rstd[row * a.s.groups + place.group[i]];
}

template <norm_gate GATED, int THREADS, int VECS>
static __global__ void
__launch_bounds__(norm_block<THREADS>,
                  (GATED == NORM_OF_GATED ? 1 : norm_backward_blocks<THREADS, VECS>))
norm_grad_whole(const norm_backward a)
{
    extern __shared__ float part[];
    const int held = THREADS == 32 ? NORM_WARPS : 1, warp = THREADS == 32 ? threadIdx.x / 32 : 0;
    const norm_place<THREADS, VECS> place(a.s, blockIdx.y);
    const int64_t last = norm_first(a.s.rows, a.parts, blockIdx.x + 1);
    int64_t row = norm_first(a.s.rows, a.parts, blockIdx.x) + warp;
    /* w and gw stay in registers, where those do; else gw is in shared memory, an element of all
     * threads after the other. */
    const bool kept = GATED != NORM_OF_GATED;
    fg_vec8 w[VECS];
#pragma unroll
    for (int i = 0; i < VECS; i++)
        if (kept) w[i] = fg_load8(a.w, place.w[i]);
    norm_values<VECS> gw = {};
    const int64_t from = blockIdx.y * a.s.segment;
    float *own = part + warp * a.s.segment - from;
    float *turned = part + warp * VECS * 8 * 32 + threadIdx.x % THREADS;
    if (!kept)
#pragma unroll
        for (int j = 0; j < VECS * 8; j++) turned[j * THREADS] = 0;
    norm_backward_row<VECS> next;
    if (row < last) norm_backward_fetch<GATED>(next, a, row, place);
    for (int slot = 0; row < last; row += held, slot ^= 1) {
        norm_backward_row<VECS> r = next;
        if (row + held < last) norm_backward_fetch<GATED>(next, a, row + held, place);
        norm_widen(r.x, a.x.narrow);
        norm_widen(r.gy, a.gy.narrow);
        if (GATED) norm_widen(r.other, a.g.narrow);
        else if (a.more.p) norm_widen(r.other, a.more.narrow);
        float sum[VECS];
#pragma unroll
        for (int i = 0; i < VECS; i++) {
            if constexpr (GATED == NORM_OF_GATED) {
                sum[i] = norm_gate_terms<THREADS>(r.gy.v[i], r.x.v[i], r.other.v[i], r.rstd[i],
                                                  fg_load8(a.w, place.w[i]),
                                                  turned + i * 8 * THREADS);
            } else {
#pragma unroll
                for (int k = 0; k < 8; k++) r.x.v[i][k] *= r.rstd[i];
                sum[i] = norm_terms<GATED>(r.gy.v[i], r.x.v[i], r.other.v[i], w[i], gw.v[i]);
            }
        }
        norm_group_sums<THREADS>(sum, a.s.lanes, slot);
#pragma unroll
        for (int i = 0; i < VECS; i++) {
            const float mean = sum[i] / (float)a.s.n;
#pragma unroll
            for (int k = 0; k < 8; k++) {
                if (GATED == NORM_OF_GATED) {
                    norm_gate_back(r.gy.v[i][k], r.x.v[i][k], r.other.v[i][k], r.rstd[i], mean);
                    continue;
                }
                r.gy.v[i][k] = r.rstd[i] * (r.gy.v[i][k] - r.x.v[i][k] * mean);
                if (!GATED && a.more.p) r.gy.v[i][k] += r.other.v[i][k];
            }
        }
        norm_put(r.gy, a.gx, norm_row(a.gx_rows, row), place.at, place.ok);
        if (GATED) norm_put(r.other, a.gg, norm_row(a.gg_rows, row), place.at, place.ok);
        else if (a.gx16.p)
            norm_put(r.gy, a.gx16, norm_row(a.gx16_rows, row), place.at, place.ok);
    }
    if (!kept)
#pragma unroll
        for (int i = 0; i < VECS; i++)
#pragma unroll
            for (int k = 0; k < 8; k++) gw.v[i][k] = turned[(i * 8 + k) * THREADS];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < VECS; i++)
        if (place.ok[i])
#pragma unroll
            for (int k = 0; k < 8; k++) own[place.at[i] + k] = gw.v[i][k];
    __syncthreads();
    norm_leave<THREADS>(a, part);
}

/* By which gate g multiplies what goes through it. */
template <norm_gate GATED> static __device__ __forceinline__ float norm_factor(float g)
{
    return GATED == NORM_PLAIN ? 1 : GATED == NORM_GATED ? norm_sigmoid(g) : norm_silu(g);
}

/* Groups of any length: gx (and gg), one warp to a group. */
template <norm_gate GATED>
static __global__ void __launch_bounds__(32 * NORM_WARPS) norm_grad_elements(const norm_backward a)
{
    const int64_t k = blockIdx.x * (int64_t)NORM_WARPS + threadIdx.x / 32, n = a.s.n;
    if (k >= a.s.rows * a.s.groups) return;
    const int64_t row = k / a.s.groups, from = k % a.s.groups * n, lane = threadIdx.x % 32;
    const int64_t gy_at = norm_row(a.gy_rows, row) + from, x_at = norm_row(a.x_rows, row) + from;
    const int64_t w_at = a.s.n_w == a.s.D ? from : 0;
    const int64_t g_at = GATED ? norm_row(a.g_rows, row) + from : 0;
    const bool more = !GATED && a.more.p;
    const int64_t more_at = more ? norm_row(a.more_rows, row) + from : 0;
    const int64_t gx_at = norm_row(a.gx_rows, row) + from;
    const int64_t gg_at = GATED ? norm_row(a.gg_rows, row) + from : 0;
    const float rstd = a.rstd[k];
    float sum = 0;
    for (int64_t i = lane; i < n; i += 32) {
        const float g = GATED ? a.g[g_at + i] : 0, s = norm_factor<GATED>(g);
        sum += a.gy[gy_at + i] * s * a.w[w_at + i] * (a.x[x_at + i] * rstd);
    }
    const float mean = fg_warp_sum(sum) / (float)n;
    for (int64_t i = lane; i < n; i += 32) {
        float g = GATED ? a.g[g_at + i] : 0;
        const float x = a.x[x_at + i], h = x * rstd;
        float m = a.gy[gy_at + i] * a.w[w_at + i];
        if (GATED == NORM_OF_GATED) {
            norm_gate_back(m, x, g, rstd, mean);
            a.gx.put(gx_at + i, m);
            a.gg.put(gg_at + i, g);
            continue;
        }
        const float s = norm_factor<GATED>(g);
        m *= s;
        const float gx = rstd * (m - h * mean) + (more ? a.more[more_at + i] : 0);
        a.gx.put(gx_at + i, gx);
        if (!GATED && a.gx16.p) a.gx16.put(norm_row(a.gx16_rows, row) + from + i, gx);
        if (GATED) a.gg.put(gg_at + i, m * h * (1 - s));
    }
}

/* Rows of partial sums of gw for norm_grad_elements; it goes first: gx may overwrite gy or x. */
template <norm_gate GATED>
static __global__ void norm_gain_elements(const norm_backward a)
{
    const int64_t j = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
    if (j >= a.s.D) return;
    const int64_t last = norm_first(a.s.rows, a.parts, blockIdx.y + 1);
    float sum = 0;
    for (int64_t row = norm_first(a.s.rows, a.parts, blockIdx.y); row < last; row++) {
        const float g = GATED ? a.g[norm_row(a.g_rows, row) + j] : 0, s = norm_factor<GATED>(g);
        const float h = a.x[norm_row(a.x_rows, row) + j] * a.rstd[row * a.s.groups + j / a.s.n];
        sum += a.gy[norm_row(a.gy_rows, row) + j] * s * h;
    }
    a.part[blockIdx.y * a.s.D + j] = sum;
}

/* to[j] = the sum over rows of from[row][j]: 32 threads to a column, added in order. */
static __global__ void __launch_bounds__(1024)
norm_add_parts(const float *from, int64_t rows, int64_t n, fg_out to)
{
    __shared__ float part[32][33];
    const int64_t j = blockIdx.x * (int64_t)32 + threadIdx.x;
    float sum = 0;
    if (j < n)
        for (int64_t i = threadIdx.y; i < rows; i += 32) sum += from[i * n + j];
    part[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    sum = fg_warp_sum(part[threadIdx.x][threadIdx.y]);
    const int64_t column = blockIdx.x * (int64_t)32 + threadIdx.y;
    if (threadIdx.x == 0 && column < n) to.put(column, sum);
}

/* Blocks that share the rows: as many as NORM_PROCESSORS hold at once, each with NORM_ROWS rows for
 * every segment it holds; element by element at most 64, with 32 rows. */
static inline int64_t norm_parts(const norm_size &s)
{
    int64_t most = 64, least = 32;
    if (s.whole) {
#define USE(threads, vecs) \
        most = NORM_PROCESSORS * norm_backward_blocks<threads, vecs> / s.segments; \
        least = NORM_ROWS * (threads == 32 ? NORM_WARPS : 1)
        NORM_FORMS(s.segment, USE);
#undef USE
    }
    const int64_t parts = (s.rows + least - 1) / least;
    if (parts < most) most = parts;
    return most > 1 ? most : 1;
}
/* Rows of partial sums, each as long as the gain. */
static inline int64_t norm_part_rows(const norm_size &s)
{
    const int64_t each = s.n_w == s.D ? 1 : s.whole ? s.segments : s.groups;
    return norm_parts(s) * each;
}
static inline size_t norm_grad_scratch(const norm_size &s)
{
    return (size_t)(norm_part_rows(s) * s.n_w) * sizeof(float);
}

template <norm_gate GATED, int THREADS, int VECS>
static void norm_grad_start(const norm_backward &a, cudaStream_t stream)
{
    const dim3 grid((unsigned)a.parts, (unsigned)a.s.segments);
    const size_t shared = norm_block<THREADS> * VECS * 8 * sizeof(float);
    norm_grad_whole<GATED, THREADS, VECS><<<grid, norm_block<THREADS>, shared, stream>>>(a);
}

static inline void norm_add_all(const norm_backward &a, const fg_out &gw, cudaStream_t stream)
{
    const dim3 block(32, 32);
    norm_add_parts<<<fg_blocks(a.s.n_w, 32), block, 0, stream>>>(a.part, norm_part_rows(a.s),
                                                                 a.s.n_w, gw);
}

template <norm_gate GATED>
static void norm_grad_launch(norm_backward &a, const fg_out &gw, cudaStream_t stream)
{
    const norm_size &s = a.s;
    if (s.D == 0) return;
    a.parts = norm_parts(s);
    if (!s.whole) {
        const dim3 grid(fg_blocks(s.D, 128), (unsigned)a.parts);
        norm_gain_elements<GATED><<<grid, 128, 0, stream>>>(a);
        if (s.rows > 0)
            norm_grad_elements<GATED><<<fg_blocks(s.rows * s.groups, NORM_WARPS), 32 * NORM_WARPS,
                                        0, stream>>>(a);
    } else {
#define USE(threads, vecs) norm_grad_start<GATED, threads, vecs>(a, stream)
        NORM_FORMS(s.segment, USE);
#undef USE
    }
    norm_add_all(a, gw, stream);
}

/* What both norms with a gate take: x, w, g -> y, rstd; and gy, x, w, g, rstd -> gx, gw, gg. */
static inline norm_forward norm_gate_forward(const fg_exec *e, int64_t groups, double eps)
{
    norm_forward a = {};
    a.s = norm_size_of(&e->in_shape[0], &e->in_shape[1], groups);
    a.x = fg_input_of(e, 0), a.w = fg_input_of(e, 1), a.g = fg_input_of(e, 2);
    a.y = fg_output_of(e, 0), a.rstd = (float *)e->out[1], a.eps = (float)eps;
    a.x_rows = norm_rows_of(&e->in_rows[0], a.s.D);
    a.g_rows = norm_rows_of(&e->in_rows[2], a.s.D);
    a.y_rows = norm_rows_of(&e->out_rows[0], a.s.D);
    return a;
}
static inline norm_backward norm_gate_backward(const fg_exec *e, int64_t groups)
{
    norm_backward a = {};
    a.s = norm_size_of(&e->in_shape[1], &e->in_shape[2], groups);
    a.gy = fg_input_of(e, 0), a.x = fg_input_of(e, 1), a.w = fg_input_of(e, 2);
    a.g = fg_input_of(e, 3), a.rstd = (const float *)e->in[4];
    a.gx = fg_output_of(e, 0), a.gg = fg_output_of(e, 2), a.part = (float *)e->scratch;
    a.gy_rows = norm_rows_of(&e->in_rows[0], a.s.D);
    a.x_rows = norm_rows_of(&e->in_rows[1], a.s.D);
    a.g_rows = norm_rows_of(&e->in_rows[3], a.s.D);
    a.gx_rows = norm_rows_of(&e->out_rows[0], a.s.D);
    a.gg_rows = norm_rows_of(&e->out_rows[2], a.s.D);
    return a;
}
#endif
