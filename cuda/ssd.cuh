/* ssd.cuh - what ssd_scan.cu and its gradient share: decays of chunks, states between chunks.
 *
 * A chunk is R tokens.  Inside it, with l_t = dt_t a and sum_i = l_1 + ... + l_i,
 *
 *     decay from j to i   e^(sum_i - sum_j)      keep_i = e^(sum_i)     left_j = e^(sum_R - sum_j)
 *
 * Sums are made in double and kept as two floats in units of log2, so a difference is good to the
 * last bit of a float however far both have gone; l is clamped at -1e4.  Where a document begins,
 * the segment number goes up: decays between different segments, keep after the first and left
 * before the last are 0.  Padding is a segment of its own with dt = 0.
 *
 * States enter and leave chunks in f32, in registers, and go to the other kernels as bf16 [P,N]. */
#ifndef FG_SSD_CUH
#define FG_SSD_CUH
#include "attention.cuh"

struct fg_ssd {
    const int32_t *first, *past;
    int64_t B, T, H, P, G, N;
    bool resets;                                 /* first or past is given */
};

static inline fg_ssd fg_ssd_of(const fg_shape *x, const fg_shape *b)
{
    return { nullptr, nullptr, x->dim[0], x->dim[1], x->dim[2], x->dim[3], b->dim[2], b->dim[3],
             false };
}

/* The first position that row (b,t) sees; -1: every row continues the one before. */
static __device__ __forceinline__ int64_t fg_ssd_low(const fg_ssd &z, int64_t b, int64_t t)
{
    return z.first ? z.first[b * z.T + t] : z.resets ? 0 : -1;
}

/* Cuts count * size bytes off scratch, to whole 256 bytes; with base NULL only counts. */
static inline void *fg_ssd_cut(void *base, size_t *used, int64_t count, size_t size)
{
    void *p = base ? (char *)base + *used : nullptr;
    *used += ((size_t)count * size + 255) / 256 * 256;
    return p;
}

/* ---- decays --------------------------------------------------------------------------------- */

/* Per sequence and head, of tokens padded to whole chunks.  push = left dt. */
struct fg_decays {
    float2 *sum;                                 /* high and low part, log2 */
    float *dt, *keep, *left, *push, *whole;      /* whole: [B,H,chunks] */
    int32_t *segment;                            /* [B,padded]; below 0: padding */
    int64_t chunks, padded;
};

static inline fg_decays fg_decays_cut(void *base, size_t *used, const fg_ssd &z, int R)
{
    fg_decays d;
    d.chunks = (z.T + R - 1) / R;
    d.padded = d.chunks * R;
    const int64_t n = z.B * z.H * d.padded;
    d.sum = (float2 *)fg_ssd_cut(base, used, n, sizeof(float2));
    d.dt = (float *)fg_ssd_cut(base, used, n, sizeof(float));
    d.keep = (float *)fg_ssd_cut(base, used, n, sizeof(float));
    d.left = (float *)fg_ssd_cut(base, used, n, sizeof(float));
    d.push = (float *)fg_ssd_cut(base, used, n, sizeof(float));
    d.whole = (float *)fg_ssd_cut(base, used, z.B * z.H * d.chunks, sizeof(float));
    d.segment = (int32_t *)fg_ssd_cut(base, used, z.B * d.padded, sizeof(int32_t));
    return d;
}

static __device__ __forceinline__ float fg_two_diff(float2 x, float2 y)
{
    return (x.x - y.x) + (x.y - y.y);
}
static __device__ __forceinline__ float2 fg_two(double x)
{
    const float high = (float)x;
    return make_float2(high, (float)(x - (double)high));
}

/* A block per chunk of a sequence, a warp per head; a lane has R / 32 neighbouring tokens. */
template <int R>
static __global__ void __launch_bounds__(256)
fg_decays_fill(fg_ssd z, const float *dt, const float *a, fg_decays d)
{
    constexpr int E = R / 32;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t b = blockIdx.x / d.chunks, chunk = blockIdx.x % d.chunks, t0 = chunk * R;
    const int64_t past = z.past ? *z.past : 0;
    int count[E], total = 0;
    bool pad[E];
#pragma unroll
    for (int e = 0; e < E; e++) {
        const int64_t t = t0 + E * lane + e;
        const int64_t low = t < z.T ? fg_ssd_low(z, b, t) : -1;
        pad[e] = t < z.T && low > past + t;
        total += t < z.T && low >= past + t;
        count[e] = total;
    }
    int before = total;
#pragma unroll
    for (int k = 1; k < 32; k *= 2) {
        const int y = __shfl_up_sync(~0u, before, k);
        if (lane >= k) before += y;
    }
    const int last = __shfl_sync(~0u, before, 31);
    before -= total;
#pragma unroll
    for (int e = 0; e < E; e++) {
        count[e] += before;
        if (warp == 0)
            d.segment[b * d.padded + t0 + E * lane + e] = pad[e] ? -1 - count[e] : count[e];
    }
    for (int64_t h = warp; h < z.H; h += 8) {
        const double rate = (double)a[h] * FG_LOG2_E;
        const int64_t at = (b * z.H + h) * d.padded + t0 + E * lane;
        double sum[E], all = 0;
        float step[E];
#pragma unroll
        for (int e = 0; e < E; e++) {
            const int64_t t = t0 + E * lane + e;
            const float v = t < z.T && !pad[e] ? dt[(b * z.T + t) * z.H + h] : 0.0f;
            const double l = (double)v * rate, floor = -1e4 * FG_LOG2_E;
            sum[e] = all += l < floor ? floor : l;
            step[e] = v;
        }
        const double upto = fg_warp_prefix(all), whole = __shfl_sync(~0u, upto, 31);
#pragma unroll
        for (int e = 0; e < E; e++) {
            const double s = upto - all + sum[e];
            const float keep = count[e] == 0 ? fg_exp2((float)s) : 0.0f;
            const float left = count[e] == last && !pad[e] ? fg_exp2((float)(whole - s)) : 0.0f;
            d.sum[at + e] = fg_two(s);
            d.dt[at + e] = step[e];
            d.keep[at + e] = keep;
            d.left[at + e] = left;
            d.push[at + e] = left * step[e];
        }
        if (lane == 0)
            d.whole[(b * z.H + h) * d.chunks + chunk] = last == 0 ? fg_exp2((float)whole) : 0.0f;
    }
}

/* ---- states between chunks ------------------------------------------------------------------ */

/* state = whole state + sum_j u_j weight_j v_j^T over the chunk, in both directions of time:
 *     forward   u = x, v = b, weight = push: the states that enter chunks
 *     back      u = gy, v = c, weight = keep: the gradients of the states that leave them */
struct fg_states {
    const bf16 *u, *v;
    int64_t u_row, v_row;                        /* elements between tokens */
    const float *weight;
    const float *from;                           /* f32[B,H,P,N]; NULL: 0 */
    float *to;                                   /* the same after the last chunk */
    bf16 *kept;                                  /* [B,H,chunks,P,N] before each chunk */
    bool back;
};

#define FG_STATE_P 64                            /* head width of the tensor core kernels */
#define FG_STATE_N 32                            /* columns of a block */
#define FG_STATE_STAGES 3

template <int R> struct fg_state_tile {
    alignas(128) bf16 u[R * FG_STATE_P];
    alignas(128) bf16 v[R * FG_STATE_N];
    alignas(16) float weight[R];
};

template <int R>
static __device__ __forceinline__ void fg_state_load(const fg_ssd &z, const fg_decays &d,
                                                     const fg_states &s, fg_state_tile<R> *m,
                                                     int64_t b, int64_t h, int64_t n0,
                                                     int64_t chunk)
{
    const int64_t t0 = chunk * R, g = h / (z.H / z.G);
    const bf16 *u = s.u + (b * z.T + t0) * s.u_row + h * FG_STATE_P;
    const bf16 *v = s.v + (b * z.T + t0) * s.v_row + g * z.N + n0;
    const uint32_t to_u = fg_shared(m->u), to_v = fg_shared(m->v);
#pragma unroll
    for (int i = threadIdx.x; i < R * 8; i += 128) {
        const int r = i / 8, c = i % 8;
        const bool real = t0 + r < z.T;
        fg_copy_async(to_u + fg_swizzle<64>(r, c), real ? u + r * s.u_row + c * 8 : u, real);
    }
#pragma unroll
    for (int i = threadIdx.x; i < R * 4; i += 128) {
        const int r = i / 4, c = i % 4;
        const bool real = t0 + r < z.T;
        fg_copy_async(to_v + fg_swizzle<32>(r, c), real ? v + r * s.v_row + c * 8 : v, real);
    }
    if ((int)threadIdx.x < R / 4)
        fg_copy_async(fg_shared(m->weight) + threadIdx.x * 16,
                      s.weight + (b * z.H + h) * d.padded + t0 + threadIdx.x * 4, true);
}

static __device__ __forceinline__ uint32_t fg_scale2(uint32_t x, float a, float b)
{
    return fg_pack2(__uint_as_float(x << 16) * a, __uint_as_float(x & 0xffff0000u) * b);
}

/* A block per sequence, head and 32 columns; a warp has 16 rows.  Sums of a chunk start at 0 and
 * are then added: tensor cores cut off what is small beside a large sum. */
template <int R>
static __global__ void __launch_bounds__(128)
fg_states_run(fg_ssd z, fg_decays d, fg_states s)
{
    extern __shared__ __align__(128) char memory[];
    fg_state_tile<R> *tiles = (fg_state_tile<R> *)memory;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = 2 * (lane % 4);
    const int64_t parts = z.N / FG_STATE_N, row = blockIdx.x / parts;
    const int64_t n0 = blockIdx.x % parts * FG_STATE_N, b = row / z.H, h = row % z.H;
    const int64_t at = (row * FG_STATE_P + 16 * warp + g) * z.N + n0 + c;
    float state[4][4];
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            state[k][e] = s.from ? s.from[at + (e / 2) * 8 * z.N + 8 * k + e % 2] : 0.0f;
#pragma unroll
    for (int i = 0; i < FG_STATE_STAGES - 1; i++) {
        if (i < d.chunks)
            fg_state_load<R>(z, d, s, &tiles[i], b, h, n0, s.back ? d.chunks - 1 - i : i);
        fg_copy_commit();
    }
    for (int64_t i = 0; i < d.chunks; i++) {
        const int64_t chunk = s.back ? d.chunks - 1 - i : i, next = i + FG_STATE_STAGES - 1;
        fg_copy_wait<FG_STATE_STAGES - 2>();
        __syncthreads();
        if (next < d.chunks)
            fg_state_load<R>(z, d, s, &tiles[next % FG_STATE_STAGES], b, h, n0,
                             s.back ? d.chunks - 1 - next : next);
        fg_copy_commit();
        const fg_state_tile<R> *m = &tiles[i % FG_STATE_STAGES];
        bf16 *kept = s.kept + ((row * d.chunks + chunk) * FG_STATE_P + 16 * warp + g) * z.N + n0
            + c;
        const float whole = d.whole[row * d.chunks + chunk];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            *(uint32_t *)(kept + 8 * k) = fg_pack2(state[k][0], state[k][1]);
            *(uint32_t *)(kept + 8 * z.N + 8 * k) = fg_pack2(state[k][2], state[k][3]);
        }
        float sum[4][4] = {};
        const uint32_t u = fg_shared(m->u), v = fg_shared(m->v);
#pragma unroll
        for (int j = 0; j < R; j += 16) {
            uint32_t a[4], q[2][4];
            fg_ldmatrix_trans(a, u + fg_swizzle<64>(j + lane / 16 * 8 + lane % 8,
                                                    2 * warp + lane / 8 % 2));
#pragma unroll
            for (int k = 0; k < 2; k++)
                fg_ldmatrix_trans(q[k], v + fg_swizzle<32>(j + lane / 8 % 2 * 8 + lane % 8,
                                                           2 * k + lane / 16));
            const float2 w0 = *(const float2 *)(m->weight + j + c);
            const float2 w1 = *(const float2 *)(m->weight + j + 8 + c);
            a[0] = fg_scale2(a[0], w0.x, w0.y);
            a[1] = fg_scale2(a[1], w0.x, w0.y);
            a[2] = fg_scale2(a[2], w1.x, w1.y);
            a[3] = fg_scale2(a[3], w1.x, w1.y);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                fg_mma(sum[2 * k], a, q[k][0], q[k][1]);
                fg_mma(sum[2 * k + 1], a, q[k][2], q[k][3]);
            }
        }
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int e = 0; e < 4; e++) state[k][e] = fmaf(state[k][e], whole, sum[k][e]);
    }
    if (!s.to) return;
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
        for (int e = 0; e < 4; e++) s.to[at + (e / 2) * 8 * z.N + 8 * k + e % 2] = state[k][e];
}

template <int R>
static void fg_states_launch(const fg_ssd &z, const fg_decays &d, const fg_states &s,
                             cudaStream_t stream)
{
    const int bytes = FG_STATE_STAGES * (int)sizeof(fg_state_tile<R>);
    cudaFuncSetAttribute(fg_states_run<R>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    fg_states_run<R><<<(unsigned)(z.B * z.H * (z.N / FG_STATE_N)), 128, bytes, stream>>>(z, d, s);
}

/* ---- fragments of matrices in shared memory, WIDTH bf16 a row, swizzled ---------------------- */

/* A = rows [r, r+16) x columns [k, k+16) of m. */
template <int WIDTH>
static __device__ __forceinline__ void fg_a(uint32_t *a, uint32_t m, int r, int k)
{
    const int lane = threadIdx.x % 32;
    fg_ldmatrix(a, m + fg_swizzle<WIDTH>(r + lane / 8 % 2 * 8 + lane % 8, k / 8 + lane / 16));
}
/* A = the transpose of rows [k, k+16) x columns [r, r+16). */
template <int WIDTH>
static __device__ __forceinline__ void fg_a_trans(uint32_t *a, uint32_t m, int r, int k)
{
    const int lane = threadIdx.x % 32;
    fg_ldmatrix_trans(a, m + fg_swizzle<WIDTH>(k + lane / 16 * 8 + lane % 8, r / 8 + lane / 8 % 2));
}
/* B of two 16 x 8 products, b[0..1] and b[2..3]: rows [k, k+16) x columns [n, n+16) of m. */
template <int WIDTH>
static __device__ __forceinline__ void fg_b(uint32_t *b, uint32_t m, int k, int n)
{
    const int lane = threadIdx.x % 32;
    fg_ldmatrix_trans(b, m + fg_swizzle<WIDTH>(k + lane / 8 % 2 * 8 + lane % 8, n / 8 + lane / 16));
}
/* The same of the transpose: rows [n, n+16) x columns [k, k+16) of m. */
template <int WIDTH>
static __device__ __forceinline__ void fg_b_trans(uint32_t *b, uint32_t m, int k, int n)
{
    const int lane = threadIdx.x % 32;
    fg_ldmatrix(b, m + fg_swizzle<WIDTH>(n + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
}
/* Columns c, c+1 of row r, c even. */
template <int WIDTH>
static __device__ __forceinline__ float2 fg_pair(const bf16 *m, int r, int c)
{
    const uint32_t at = fg_swizzle<WIDTH>(r, c / 8) + c % 8 * 2;
    const uint32_t u = *(const uint32_t *)((const char *)m + at);
    return make_float2(__uint_as_float(u << 16), __uint_as_float(u & 0xffff0000u));
}

/* ROWS tokens of WIDTH columns to shared memory; tokens from `real` on become 0. */
template <int WIDTH, int THREADS>
static __device__ __forceinline__ void fg_tile_load(bf16 *to, const bf16 *from, int64_t row,
                                                    int rows, int64_t real)
{
    const uint32_t m = fg_shared(to);
    for (int i = threadIdx.x; i < rows * (WIDTH / 8); i += THREADS) {
        const int r = i / (WIDTH / 8), c = i % (WIDTH / 8);
        fg_copy_async(m + fg_swizzle<WIDTH>(r, c), r < real ? from + r * row + c * 8 : from,
                      r < real);
    }
}
template <int THREADS>
static __device__ __forceinline__ void fg_floats_load(float *to, const float *from, int n)
{
    for (int i = threadIdx.x; i < n / 4; i += THREADS)
        fg_copy_async(fg_shared(to) + i * 16, from + i * 4, true);
}

/* Whether the tensor core kernels take these shapes and dtypes. */
static inline bool fg_ssd_fits(const fg_infer *c, int x, int b)
{
    return c->in[x].dim[3] == FG_STATE_P && (c->in[b].dim[3] == 64 || c->in[b].dim[3] == 128)
           && c->in_type[x] == FG_BF16 && c->in_type[b] == FG_BF16 && c->in_type[b + 1] == FG_BF16;
}
#endif
