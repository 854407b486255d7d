/* few_rows.cu - products of at most eight rows with a weight matrix: ops/few_rows.c on a GPU.
 *
 *     y = x m^T,    x = rms_norm(a + b, w), swiglu(x) or x itself, rounded to bf16
 *
 * A warp multiplies one row of m, or a part of it (a power of two of parts), with all rows of x,
 * which lie in shared memory; every block makes them there for itself.  The next row of m is on its
 * way while sums are taken.  In a chain (chain.cuh) the first row of m is read before the wait;
 * calling more to the L2 cache was slower. Bytes: m once; x once for every block, from the L2
 * cache. The sum of a row of y depends on N alone, neither on the other rows nor on M. */
#include "chain.cuh"

/* H100 SXM, 2026-11.  EACH: blocks of a multiprocessor; DEEP: loads of a thread on their way. */
enum { THREADS = 256, WARPS = THREADS / 32, EACH = 4, DEEP = 8 };
enum { ROWS = 8, WIDEST = 16384 };               /* of x; of a row of m */

enum kind { PLAIN, NORM, SWIGLU };

struct few {
    fg_in a, b, w;                       /* b.p: NULL if absent */
    const uint4 *m;
    fg_out y, sum;
    int64_t y_pitch;
    int N, M, rows;                      /* x: [rows,N]   m: [M,N] */
    int parts;                           /* of a row of m */
    float eps;
    bool silu, early;
};

static __device__ __forceinline__ uint4 load_stream(const uint4 *p)
{
    uint4 r;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
    return r;
}

static __device__ __forceinline__ uint4 pack8(const fg_vec8 &v)
{
    return make_uint4(fg_pack2(v[0], v[1]), fg_pack2(v[2], v[3]), fg_pack2(v[4], v[5]),
                      fg_pack2(v[6], v[7]));
}

/* ---- the rows of x -------------------------------------------------------------------------- */

static __device__ void make_plain(const few &k, uint4 *x)
{
    const int chunks = k.N / 8;
    for (int i = threadIdx.x; i < k.rows * chunks; i += THREADS)
        x[i] = pack8(fg_load8(k.a, 8 * (int64_t)i));
}

static __device__ void make_swiglu(const few &k, uint4 *x)
{
    const int chunks = k.N / 8;
    for (int i = threadIdx.x; i < k.rows * chunks; i += THREADS) {
        const int r = i / chunks, c = i % chunks;
        const fg_vec8 g = fg_load8(k.a, 2 * (int64_t)r * k.N + 8 * c);
        fg_vec8 p = fg_load8(k.a, (2 * (int64_t)r + 1) * k.N + 8 * c);
#pragma unroll
        for (int j = 0; j < 8; j++) p[j] *= (k.silu ? g[j] : 1) / (1 + __expf(-g[j]));
        x[i] = pack8(p);
    }
}

static __device__ __forceinline__ fg_vec8 load_sum(const few &k, int64_t i)
{
    fg_vec8 v = fg_load8(k.a, i);
    if (!k.b.p) return v;
    const fg_vec8 u = fg_load8(k.b, i);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] += u[j];
    return v;
}

/* The gains to shared memory, behind the rows: a thread reads there what it wrote itself. */
static __device__ __forceinline__ float4 *gains_of(const few &k, uint4 *x)
{
    return (float4 *)(x + k.rows * (k.N / 8));
}
static __device__ void load_gains(const few &k, uint4 *x)
{
    float4 *to = gains_of(k, x);
    for (int c = threadIdx.x; c < k.N / 8; c += THREADS) {
        const fg_vec8 w = fg_load8(k.w, 8 * c);
        to[2 * c] = *(const float4 *)w.v;
        to[2 * c + 1] = *(const float4 *)(w.v + 4);
    }
}

/* The first chunk of a row stays in a thread's registers, others are read twice. */
static __device__ void make_norm(const few &k, uint4 *x)
{
    const int chunks = k.N / 8;
    const float4 *gains = gains_of(k, x);
    for (int r = 0; r < k.rows; r++) {
        const int64_t at = (int64_t)r * k.N;
        fg_vec8 kept = {};
        float squares = 0;
        for (int c = threadIdx.x; c < chunks; c += THREADS) {
            const fg_vec8 v = load_sum(k, at + 8 * c);
#pragma unroll
            for (int j = 0; j < 8; j++) squares = fmaf(v[j], v[j], squares);
            if (c < THREADS) kept = v;
        }
        const float rstd = rsqrtf(fg_block_sum<THREADS>(squares) / k.N + k.eps);
        for (int c = threadIdx.x; c < chunks; c += THREADS) {
            const fg_vec8 v = c < THREADS ? kept : load_sum(k, at + 8 * c);
            fg_vec8 w, y;
            *(float4 *)w.v = gains[2 * c];
            *(float4 *)(w.v + 4) = gains[2 * c + 1];
#pragma unroll
            for (int j = 0; j < 8; j++) y[j] = v[j] * rstd * w[j];
            x[r * chunks + c] = pack8(y);
            if (blockIdx.x == 0) fg_store8(k.sum, at + 8 * c, v);
        }
    }
}

/* ---- products ------------------------------------------------------------------------------- */

/* Chunks c0 + lane, + 32, ... below c1 of row n of m. */
template <int U>
static __device__ __forceinline__ void load_row(uint4 (&raw)[U], const few &k, int n, int c0,
                                                int c1)
{
    const uint4 *m = k.m + (int64_t)n * (k.N / 8);
#pragma unroll
    for (int u = 0; u < U; u++) {
        const int c = c0 + 32 * u + (int)threadIdx.x % 32;
        if (n < k.M && c < c1) raw[u] = load_stream(m + c);
        else raw[u] = make_uint4(0, 0, 0, 0);
    }
}

template <int U, int R>
static __device__ __forceinline__ void multiply(float (&sum)[R], const uint4 (&raw)[U],
                                                const uint4 *x, const few &k, int c0, int c1)
{
    const int chunks = k.N / 8;
#pragma unroll
    for (int r = 0; r < R; r++) sum[r] = 0;
#pragma unroll
    for (int u = 0; u < U; u++) {
        const int c = c0 + 32 * u + (int)threadIdx.x % 32;
        if (c >= c1) continue;
        float m[8];
        fg_unpack(raw[u], m);
#pragma unroll
        for (int r = 0; r < R; r++) {
            if (R > 1 && r >= k.rows) continue;
            float v[8];
            fg_unpack(x[r * chunks + c], v);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[r] = fmaf(m[j], v[j], sum[r]);
        }
    }
}

template <int KIND, int U, int R>
static __global__ void __launch_bounds__(THREADS, EACH) few_rows(const __grid_constant__ few k)
{
    extern __shared__ __align__(16) uint4 rows_shared[];
    __shared__ float part[2][WARPS][R];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, side = WARPS / k.parts;
    const int chunks = k.N / 8, wide = (chunks + k.parts - 1) / k.parts;
    const int c0 = warp % k.parts * wide, c1 = min(c0 + wide, chunks), step = gridDim.x * side;
    int n0 = blockIdx.x * side;                  /* of the block's first row */
    const int mine = n0 + warp / k.parts;
    uint4 raw[U];
    fg_chain_next();
    if (!k.early) fg_chain_wait();
    load_row<U>(raw, k, mine, c0, c1);
    if (KIND == NORM) load_gains(k, rows_shared);
    if (k.early) fg_chain_wait();
    if (KIND == PLAIN) make_plain(k, rows_shared);
    else if (KIND == NORM) make_norm(k, rows_shared);
    else make_swiglu(k, rows_shared);
    __syncthreads();
    for (int turn = 0; n0 < k.M; n0 += step, turn ^= 1) {
        const int n = n0 + warp / k.parts;
        float sum[R];
        multiply<U, R>(sum, raw, rows_shared, k, c0, c1);
        if (n0 + step < k.M) load_row<U>(raw, k, n + step, c0, c1);
#pragma unroll
        for (int r = 0; r < R; r++) sum[r] = fg_warp_sum(sum[r]);
        if (k.parts == 1) {
#pragma unroll
            for (int r = 0; r < R; r++)
                if (lane == r && r < k.rows && n < k.M) k.y.put(r * k.y_pitch + n, sum[r]);
            continue;
        }
        if (lane == 0)
#pragma unroll
            for (int r = 0; r < R; r++) part[turn][warp][r] = sum[r];
        __syncthreads();
        const int r = threadIdx.x / side, to = n0 + threadIdx.x % side;
        if (r >= k.rows || to >= k.M) continue;
        float y = 0;
        for (int p = 0; p < k.parts; p++) y += part[turn][threadIdx.x % side * k.parts + p][r];
        k.y.put(r * k.y_pitch + to, y);
    }
}

/* ---- launch --------------------------------------------------------------------------------- */

template <int KIND, int U, int R> static void start(const few &k, cudaStream_t stream)
{
    const int side = WARPS / k.parts, steps = (k.M + side - 1) / side;
    const int most = EACH * fg_processors(), blocks = steps < most ? steps : most;
    const size_t shared = (size_t)k.rows * k.N * 2 + (KIND == NORM ? (size_t)k.N * 4 : 0);
    if (shared > 40 << 10)
        cudaFuncSetAttribute(few_rows<KIND, U, R>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)shared);
    fg_chain_launch(few_rows<KIND, U, R>, (unsigned)blocks, THREADS, shared, 1, stream, k);
}

template <int KIND, int U> static void start_rows(const few &k, cudaStream_t stream)
{
    if (k.rows == 1) start<KIND, U, 1>(k, stream);
    else if (k.rows == 2) start<KIND, U, 2>(k, stream);
    else if (k.rows <= 4) start<KIND, U, 4>(k, stream);
    else start<KIND, U, ROWS>(k, stream);
}

template <int KIND> static void start_kind(few k, cudaStream_t stream)
{
    for (k.parts = 1; k.parts * 32 * DEEP < k.N / 8;) k.parts *= 2;
    const int each = (k.N / 8 + k.parts - 1) / k.parts;
    if (each <= 6 * 32) start_rows<KIND, 6>(k, stream);
    else start_rows<KIND, DEEP>(k, stream);
}

static int64_t rows_of(const fg_shape *s) { return fg_count_of(s) / fg_last_of(s); }

/* x: [...,?], m: [M,N] */
static const char *unfit_rows(const fg_shape *x, const fg_shape *m, fg_dtype type)
{
    if (type != FG_BF16) return "the matrix is not bf16";
    if (m->dim[1] % 8 || m->dim[1] > WIDEST)
        return "the matrix' rows are no multiples of 8, or long";
    if (rows_of(x) > ROWS || rows_of(x) * m->dim[1] > 100 << 9) return "too many rows";
    return m->dim[0] > 1 << 30 ? "the matrix has too many rows" : nullptr;
}

static few few_of(const fg_exec *e, int m)
{
    few k = {};
    k.a = fg_input_of(e, 0);
    k.m = (const uint4 *)e->in[m];
    k.y = fg_output_of(e, 0);
    k.M = (int)e->in_shape[m].dim[0], k.N = (int)e->in_shape[m].dim[1];
    k.rows = (int)rows_of(&e->in_shape[0]);
    k.y_pitch = fg_pitch_of(&e->out_rows[0], k.M);
    return k;
}

static const char *few_unfit(const fg_infer *c)
{
    return unfit_rows(&c->in[0], &c->in[1], c->in_type[1]);
}

static void few_launch(const fg_exec *e, cudaStream_t stream)
{
    few k = few_of(e, 1);
    k.early = ((const struct fg_attr_few_linear *)e->attr)->early;
    start_kind<PLAIN>(k, stream);
}
FG_KERNEL(few_linear) = { .launch = few_launch, .unfit = few_unfit, .pitched_out = 1 };

static const char *norm_unfit(const fg_infer *c)
{
    return unfit_rows(&c->in[0], &c->in[3], c->in_type[3]);
}

static void norm_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_norm_linear *a = (const struct fg_attr_norm_linear *)e->attr;
    few k = few_of(e, 3);
    if (e->in[1]) k.b = fg_input_of(e, 1);
    k.w = fg_input_of(e, 2);
    k.sum = fg_output_of(e, 1);
    k.eps = (float)a->eps;
    k.early = a->early;
    start_kind<NORM>(k, stream);
}
FG_KERNEL(norm_linear) = { .launch = norm_launch, .unfit = norm_unfit, .pitched_out = 1 };

static void swiglu_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_swiglu_linear *a = (const struct fg_attr_swiglu_linear *)e->attr;
    few k = few_of(e, 1);
    k.silu = a->act == FG_ACT_SILU;
    k.early = a->early;
    start_kind<SWIGLU>(k, stream);
}
FG_KERNEL(swiglu_linear) = { .launch = swiglu_launch, .unfit = few_unfit, .pitched_out = 1 };
