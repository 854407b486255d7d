/* rows.cuh - kernels that sum or compare along rows: teams of threads, and rows of any length read
 * 16 bytes at a time.
 *
 * A row of a contiguous [rows, n] tensor is seen as those eights of the whole tensor that overlap
 * it.  Eights inside are one access; of the first and the last only the row's own elements are
 * touched.  A team of T threads (a power of two) shares a row; below 32, several share a warp. */
#ifndef FG_ROWS_CUH
#define FG_ROWS_CUH
#include "elementwise.cuh"

struct fg_row {
    int64_t from, to;                            /* elements */
    int64_t first;                               /* eights, of the tensor */
    int64_t eights;                              /* how many overlap */
};
static __device__ __forceinline__ fg_row fg_row_at(int64_t from, int64_t to)
{
    return { from, to, from / 8, from < to ? (to + 7) / 8 - from / 8 : 0 };
}

/* Eight k of the row; what lies outside is fill, which must be a bf16 number. */
static __device__ __forceinline__ fg_raw8 fg_load_row8(const fg_in &x, const fg_row &r, int64_t k,
                                                       float fill)
{
    const int64_t i = 8 * (r.first + k);
    if (k < r.eights && i >= r.from && i + 8 <= r.to) return fg_load_raw8(x, i);
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; j++)
        v[j] = k < r.eights && i + j >= r.from && i + j < r.to ? x[i + j] : fill;
    fg_raw8 raw;
    if (x.narrow) {
        raw.a = make_uint4(fg_pack2(v[0], v[1]), fg_pack2(v[2], v[3]), fg_pack2(v[4], v[5]),
                           fg_pack2(v[6], v[7]));
        raw.b = make_uint4(0, 0, 0, 0);
    } else {
        raw.a = *(const uint4 *)v;
        raw.b = *(const uint4 *)(v + 4);
    }
    return raw;
}
static __device__ __forceinline__ void fg_store_row8(const fg_out &y, const fg_row &r, int64_t k,
                                                     const fg_vec8 &v)
{
    const int64_t i = 8 * (r.first + k);
    if (k >= r.eights) return;
    if (i >= r.from && i + 8 <= r.to) {
        fg_store8(y, i, v);
        return;
    }
#pragma unroll
    for (int j = 0; j < 8; j++)
        if (i + j >= r.from && i + j < r.to) y.put(i + j, v[j]);
}

/* ---- teams ---------------------------------------------------------------------------------- */

template <int T> static __device__ __forceinline__ float fg_team_sum(float x)
{
    if constexpr (T <= 32) return fg_warp_sum<T>(x);
    else return fg_block_sum<T>(x);
}
/* The greatest that is a number. */
template <int T> static __device__ __forceinline__ float fg_team_max(float x)
{
    if constexpr (T <= 32) return fg_warp_max<T>(x);
    else {
        __shared__ float part[T / 32];
        x = fg_warp_max(x);
        __syncthreads();
        if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
        __syncthreads();
        x = part[0];
#pragma unroll
        for (int i = 1; i < T / 32; i++) x = fmaxf(x, part[i]);
        return x;
    }
}
/* Threads of a block of teams of T, rows of a block. */
template <int T> constexpr int fg_team_block = T <= 32 ? 128 : T;
template <int T> constexpr int fg_team_rows = fg_team_block<T> / T;

/* ---- sums of exponentials over a growing set: max m, sum of e^(x - m) ------------------------ */

struct fg_exp_sum { float m, s; };

/* 0 where there is no number yet, so that e^(-inf - 0) = 0 and NaN stays NaN. */
static __device__ __forceinline__ float fg_center(float m) { return m > -INFINITY ? m : 0; }

static __device__ __forceinline__ void fg_exp_add8(fg_exp_sum *a, const fg_vec8 &x)
{
    float m = a->m;
#pragma unroll
    for (int j = 0; j < 8; j++) m = fmaxf(m, x[j]);
    const float c = fg_center(m);
    float s = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) s += __expf(x[j] - c);
    a->s = fmaf(a->s, __expf(a->m - c), s);
    a->m = m;
}
/* Every thread of the team gets the sum over all of them. */
template <int T> static __device__ __forceinline__ fg_exp_sum fg_team_exp_sum(fg_exp_sum a)
{
    const float m = fg_team_max<T>(a.m);
    const float s = fg_team_sum<T>(a.s * __expf(a.m - fg_center(m)));
    return { m, s };
}
/* All of one row of x, several loads in flight. */
template <int T>
static __device__ __forceinline__ fg_exp_sum fg_row_exp_sum(const fg_in &x, const fg_row &r)
{
    constexpr int U = T < 32 ? 1 : 4;
    const int lane = threadIdx.x % T;
    fg_exp_sum a = { -INFINITY, 0 };
    for (int64_t k = lane; k < r.eights; k += U * T) {
        fg_raw8 raw[U];
#pragma unroll
        for (int u = 0; u < U; u++)
            if (k + u * T < r.eights) raw[u] = fg_load_row8(x, r, k + u * T, -INFINITY);
#pragma unroll
        for (int u = 0; u < U; u++)
            if (k + u * T < r.eights) fg_exp_add8(&a, fg_floats(x, raw[u]));
    }
    return fg_team_exp_sum<T>(a);
}
/* ln of the sum; +inf where some x is, as e^(inf - inf) says nothing. */
static __device__ __forceinline__ float fg_log_of(const fg_exp_sum &a)
{
    return a.m == INFINITY ? a.m : fg_center(a.m) + logf(a.s);
}
#endif
