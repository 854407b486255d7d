/* linear_attention.cuh - what the kernels of gated linear attention and of the delta rule share:
 * which rows belong together, and fragments of matrices in shared memory.
 *
 * Heads of 128 x 128, rows in chunks of 64.  Everything that does not need the state is prepared
 * chunk by chunk, all chunks at once; what is left is linear_attention_step.cuh.
 * Rows that a document's start cuts off from the state are 0 in Q and W, rows that do not reach the
 * next chunk are 0 in K, and decay is 0 where a document starts within the chunk. */
#ifndef FG_LINEAR_ATTENTION_CUH
#define FG_LINEAR_ATTENTION_CUH
#include <math.h>
#include "attention.cuh"
#include "tensor_map.cuh"

#define LA_ROWS    64                            /* of a chunk */
#define LA_WIDTH   128                           /* of keys and of values */

struct la_task {
    int64_t B, T, H, chunks;
    const int32_t *first, *past;
    const float *state;                          /* S before the first row, or NULL */
    float scale;
};

static inline la_task la_task_of(const fg_shape *k, double scale, const void *first,
                                 const void *past, const void *state)
{
    la_task z = {};
    z.B = k->dim[0], z.T = k->dim[1], z.H = k->dim[2];
    z.chunks = (z.T + LA_ROWS - 1) / LA_ROWS;
    z.first = (const int32_t *)first;
    z.past = (const int32_t *)past;
    z.state = (const float *)state;
    z.scale = (float)scale;
    return z;
}
/* Chunks in flight take more shared memory than cards before Hopper have, and the chain is compiled
 * for that alone. */
static inline bool la_is_hopper()
{
    int device = 0, major = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    return major == 9 && fg_encoder();
}
/* What works in chunks: q, k, v from input i on, and o. */
static inline bool la_in_chunks(const fg_shape *k, const fg_shape *v, const fg_dtype *type, int i)
{
    return k->dim[1] >= LA_ROWS && k->dim[3] == LA_WIDTH && v->dim[3] == LA_WIDTH
           && k->dim[0] * k->dim[2] <= 65535 && la_is_hopper()
           && type[i] == FG_BF16 && type[i + 1] == FG_BF16 && type[i + 2] == FG_BF16;
}
/* The same of the gradient, inputs go gstate q k v ...; the chain goes back in units of scale. */
static inline bool la_back_in_chunks(double scale, const fg_shape *shape, const fg_dtype *type,
                                     const fg_dtype *out)
{
    return fabs(scale) > 1e-6 && la_in_chunks(&shape[3], &shape[4], type, 2)
           && type[0] == FG_BF16 && out[0] == FG_BF16 && out[1] == FG_BF16 && out[2] == FG_BF16;
}

static __device__ __forceinline__ int64_t la_low(const la_task &z, int64_t b, int64_t t)
{
    const int64_t low = z.first ? z.first[b * z.T + t] : 0;
    return low > 0 ? low : 0;
}
static __device__ __forceinline__ int64_t la_past(const la_task &z) { return z.past ? *z.past : 0; }
/* The given state is what comes before row 0 of sequence b. */
static __device__ __forceinline__ bool la_carried(const la_task &z, int64_t b)
{
    return z.state && la_low(z, b, 0) < (z.past ? la_past(z) : 1);
}

/* start[r]: the row of the chunk where the document of row r starts, -1: before the chunk, LA_NONE:
 * padding, or behind the last row.  Threads 0 to 63 work, all must call it. */
#define LA_NONE 127
static __device__ __forceinline__ void la_starts(const la_task &z, int64_t b, int64_t chunk,
                                                 int *start, uint32_t *marks)
{
    const int r = threadIdx.x;
    const int64_t t = chunk * LA_ROWS + r, past = la_past(z);
    bool padding = false;
    if (r < LA_ROWS) {
        bool begins = false;
        padding = t >= z.T;
        if (t < z.T) {
            const int64_t ahead = la_low(z, b, t) - past - t;
            padding = ahead > 0;
            begins = t == 0 ? !la_carried(z, b)
                            : ahead == 0 || (z.first && la_low(z, b, t - 1) > past + t - 1);
        }
        const uint32_t mark = __ballot_sync(~0u, begins && !padding);
        if (r % 32 == 0) marks[r / 32] = mark;
    }
    __syncthreads();
    if (r < LA_ROWS) {
        const uint64_t all = (uint64_t)marks[1] << 32 | marks[0];
        const uint64_t seen = all & (r == 63 ? ~0ull : (2ull << r) - 1);
        start[r] = padding ? LA_NONE : seen ? 63 - __clzll((long long)seen) : -1;
    }
    __syncthreads();
}
/* Rows of chunk that there are. */
static __device__ __forceinline__ int la_rows(const la_task &z, int64_t chunk)
{
    return (int)min((int64_t)LA_ROWS, z.T - chunk * LA_ROWS);
}
/* Row s goes on into the state behind the chunk; last = start[the last row]. */
static __device__ __forceinline__ bool la_passes(int s, int n, int last)
{
    return last != LA_NONE && s >= last && s < n;
}

/* ---- fragments of matrices in shared memory, swizzled rows of WIDTH bf16 --------------------- */

/* A: 16 x 16 at (m,k), stored [m][k] or, turned, [k][m]. */
template <int WIDTH>
static __device__ __forceinline__ void la_a(uint32_t *r, uint32_t x, int m, int k)
{
    const int q = threadIdx.x % 32 / 8, i = threadIdx.x % 8;
    fg_ldmatrix(r, x + fg_swizzle<WIDTH>(m + (q & 1) * 8 + i, k / 8 + (q >> 1)));
}
template <int WIDTH>
static __device__ __forceinline__ void la_a_turned(uint32_t *r, uint32_t x, int m, int k)
{
    const int q = threadIdx.x % 32 / 8, i = threadIdx.x % 8;
    fg_ldmatrix_trans(r, x + fg_swizzle<WIDTH>(k + (q >> 1) * 8 + i, m / 8 + (q & 1)));
}
/* B: two of 16 x 8 at (k,n) and (k,n+8), stored [n][k] or, turned, [k][n]. */
template <int WIDTH>
static __device__ __forceinline__ void la_b(uint32_t *r, uint32_t x, int k, int n)
{
    const int q = threadIdx.x % 32 / 8, i = threadIdx.x % 8;
    fg_ldmatrix(r, x + fg_swizzle<WIDTH>(n + (q >> 1) * 8 + i, k / 8 + (q & 1)));
}
template <int WIDTH>
static __device__ __forceinline__ void la_b_turned(uint32_t *r, uint32_t x, int k, int n)
{
    const int q = threadIdx.x % 32 / 8, i = threadIdx.x % 8;
    fg_ldmatrix_trans(r, x + fg_swizzle<WIDTH>(k + (q & 1) * 8 + i, n / 8 + (q >> 1)));
}
/* acc[0], acc[1] += a b of 16 x 16 */
static __device__ __forceinline__ void la_mma2(float acc[][4], const uint32_t *a, const uint32_t *b)
{
    fg_mma(acc[0], a, b[0], b[1]);
    fg_mma(acc[1], a, b[2], b[3]);
}
template <int N> static __device__ __forceinline__ void la_zero(float acc[N][4])
{
#pragma unroll
    for (int j = 0; j < N; j++) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0;
}

static __device__ __forceinline__ float la_low_half(uint32_t u) { return __uint_as_float(u << 16); }
static __device__ __forceinline__ float la_high_half(uint32_t u)
{
    return __uint_as_float(u & 0xffff0000u);
}
/* Two neighbours at (r,c), c even, of a swizzled matrix. */
template <int WIDTH>
static __device__ __forceinline__ uint32_t *la_pair(void *x, int r, int c)
{
    return (uint32_t *)((char *)x + fg_swizzle<WIDTH>(r, c / 8) + c % 8 * 2);
}

/* wgmma's layout: panels of 64 columns of 64 rows.  Byte offset of 16-byte chunk c of row r: */
#define LA_PANEL (LA_ROWS * 64 * 2)
static __device__ __forceinline__ uint32_t la_panel(int r, int c)
{
    return (uint32_t)(c / 8 * LA_PANEL) + fg_swizzle<64>(r, c % 8);
}

/* 64 rows of WIDTH, `row` elements apart, on their way to shared memory, by THREADS threads; this
 * is number `thread`.  0 from row n on. */
template <int WIDTH, int THREADS, bool PANELS = false>
static __device__ __forceinline__ void la_load(void *to, const bf16 *from, int64_t row, int n,
                                               int thread)
{
    constexpr int ROW = WIDTH / 8, STEP = THREADS / ROW, BYTES = STEP * (PANELS ? 64 : WIDTH) * 2;
    static_assert(THREADS % ROW == 0 && LA_ROWS % STEP == 0 && STEP % 4 == 0, "");
    const int r0 = thread / ROW, c = thread % ROW;
    const uint32_t x = fg_shared(to);            /* the swizzle comes again every 8 rows */
    const uint32_t even = x + (PANELS ? la_panel(r0, c) : fg_swizzle<WIDTH>(r0, c));
    const uint32_t odd = x + (PANELS ? la_panel(r0 + STEP, c) : fg_swizzle<WIDTH>(r0 + STEP, c));
    const bf16 *p = from + r0 * row + c * 8;
    if (n == LA_ROWS) {
#pragma unroll
        for (int k = 0; k < LA_ROWS / STEP; k++, p += STEP * row)
            fg_copy_async((k % 2 ? odd - BYTES : even) + k * BYTES, p, true);
        return;
    }
    for (int k = 0; k < LA_ROWS / STEP; k++, p += STEP * row) {
        const int r = r0 + k * STEP;
        fg_copy_async((k % 2 ? odd - BYTES : even) + k * BYTES, r < n ? p : from, r < n);
    }
}
#endif
