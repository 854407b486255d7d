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
 * From j to an i in a later block of 16 tokens the decay is tail_j e^(sum_i - sum_last), with the
 * last token of j's block between them and tail_j = e^(sum_last - sum_j): one product a pair.
 *
 * States pass from chunk to chunk in f32, in registers, and go to the other kernels as bf16. */
#ifndef FG_SSD_CUH
#define FG_SSD_CUH
#include "attention.cuh"
#include "wgmma.cuh"

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

/* dt, with `row` elements between tokens, and a: [H].  With a bias, [H], softplus(dt + bias) stands
 * for dt and -e^a for a. */
struct fg_ssd_steps { fg_in dt; int64_t row; const float *a, *bias; };

/* softplus(x), and its slope by its value */
static __device__ __forceinline__ float fg_step_of(float x)
{
    return fmaxf(x, 0) + log1pf(expf(-fabsf(x)));
}
static __device__ __forceinline__ float fg_step_slope(float step) { return -expm1f(-step); }

/* Per sequence and head, of tokens padded to whole chunks.  push = left dt. */
struct fg_decays {
    float2 *sum;                                 /* high and low part, log2 */
    float *dt, *tail, *keep, *left, *push, *whole;         /* whole: [B,H,chunks] */
    float *rate;                                 /* [H] */
    int32_t *segment;                            /* [B,padded]; below 0: padding */
    int64_t chunks, padded;
};

/* Chunks of R tokens, `each` times a whole number of them. */
static inline fg_decays fg_decays_cut(void *base, size_t *used, const fg_ssd &z, int R, int each)
{
    fg_decays d;
    d.chunks = (z.T + each * R - 1) / (each * R) * each;
    d.padded = d.chunks * R;
    const int64_t n = z.B * z.H * d.padded;
    d.sum = (float2 *)fg_ssd_cut(base, used, n, sizeof(float2));
    d.dt = (float *)fg_ssd_cut(base, used, n, sizeof(float));
    d.tail = (float *)fg_ssd_cut(base, used, n, sizeof(float));
    d.keep = (float *)fg_ssd_cut(base, used, n, sizeof(float));
    d.left = (float *)fg_ssd_cut(base, used, n, sizeof(float));
    d.push = (float *)fg_ssd_cut(base, used, n, sizeof(float));
    d.whole = (float *)fg_ssd_cut(base, used, z.B * z.H * d.chunks, sizeof(float));
    d.rate = (float *)fg_ssd_cut(base, used, z.H, sizeof(float));
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

static __device__ __forceinline__ void fg_put4(float *to, const float *x)
{
    *(float4 *)to = make_float4(x[0], x[1], x[2], x[3]);
}

/* The sum of x over this lane and the lower ones of its LANES neighbours. */
template <int LANES, typename T> static __device__ __forceinline__ T fg_sum_upto(T x)
{
#pragma unroll
    for (int k = 1; k < LANES; k *= 2) {
        const T y = __shfl_up_sync(~0u, x, k, LANES);
        if ((int)threadIdx.x % LANES >= k) x += y;
    }
    return x;
}

/* A block per 128 tokens of a sequence and eight heads, a warp each; a lane has four neighbouring
 * tokens, R / 4 lanes a chunk, `final` the last token of its block of 16. */
template <int R>
static __global__ void __launch_bounds__(256, 5)
fg_decays_fill(fg_ssd z, fg_ssd_steps steps, fg_decays d)
{
    constexpr int LANES = R / 4;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, final = lane | 3;
    const unsigned blocks = (unsigned)(d.padded + 127) / 128;
    const int b = blockIdx.x / blocks, t0 = blockIdx.x % blocks * 128 + 4 * lane, chunk = t0 / R;
    const int past = z.past ? *z.past : 0;
    const int h = blockIdx.y * 8 + warp;
    const bool there = h < z.H && chunk < d.chunks;
    alignas(16) int segment[4];
    int total = 0;
    float step[4];
#pragma unroll
    for (int e = 0; e < 4; e++)
        step[e] = there && t0 + e < z.T ? steps.dt[(b * z.T + t0 + e) * steps.row + h] : 0.0f;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int t = t0 + e;
        const int low = t < z.T ? (int)fg_ssd_low(z, b, t) : -1;
        total += t < z.T && low >= past + t;
        segment[e] = t < z.T && low > past + t ? -1 - total : total;
    }
    const int upto = fg_sum_upto<LANES>(total), last = __shfl_sync(~0u, upto, LANES - 1, LANES);
#pragma unroll
    for (int e = 0; e < 4; e++) segment[e] += segment[e] < 0 ? total - upto : upto - total;
    if (warp == 0 && blockIdx.y == 0 && chunk < d.chunks)
        *(int4 *)(d.segment + b * d.padded + t0) = *(const int4 *)segment;
    const int block = __shfl_sync(~0u, segment[3], final);
    const float a = h >= z.H ? 0.0f : steps.bias ? -expf(steps.a[h]) : steps.a[h];
    const float bias = steps.bias && h < z.H ? steps.bias[h] : 0.0f;
    const double rate = (double)a * FG_LOG2_E, floor = -1e4 * FG_LOG2_E;
    double all = 0;
    const auto log_of = [&](float x) {
        const double l = (double)x * rate;
        return l < floor ? floor : l;
    };
#pragma unroll
    for (int e = 0; e < 4; e++) {
        if (t0 + e >= z.T || segment[e] < 0) step[e] = 0;
        else if (steps.bias) step[e] = fg_step_of(step[e] + bias);
        all += log_of(step[e]);
    }
    const double here = fg_sum_upto<LANES>(all);
    const float2 whole = fg_two(__shfl_sync(~0u, here, LANES - 1, LANES));
    const float2 to = fg_two(__shfl_sync(~0u, here, final));
    if (!there) return;
    const int64_t row = b * z.H + h, at = row * d.padded + t0;
    double sum = here - all;
    float2 s[4];
    float x[4];
#pragma unroll
    for (int e = 0; e < 4; e++) s[e] = fg_two(sum += log_of(step[e]));
    fg_put4((float *)(d.sum + at), (const float *)s);
    fg_put4((float *)(d.sum + at + 2), (const float *)(s + 2));
    fg_put4(d.dt + at, step);
#pragma unroll
    for (int e = 0; e < 4; e++) x[e] = segment[e] == 0 ? fg_exp2(s[e].x) : 0.0f;
    fg_put4(d.keep + at, x);
#pragma unroll
    for (int e = 0; e < 4; e++)
        x[e] = segment[e] == block && block >= 0 ? fg_exp2(fg_two_diff(to, s[e])) : 0.0f;
    fg_put4(d.tail + at, x);
#pragma unroll
    for (int e = 0; e < 4; e++)
        x[e] = segment[e] == last ? fg_exp2(fg_two_diff(whole, s[e])) : 0.0f;
    fg_put4(d.left + at, x);
#pragma unroll
    for (int e = 0; e < 4; e++) x[e] *= step[e];
    fg_put4(d.push + at, x);
    if (lane == 0 && blockIdx.x == 0) d.rate[h] = a;
    if (lane % LANES == 0)
        d.whole[row * d.chunks + chunk] = last == 0 ? fg_exp2(whole.x) : 0.0f;
}

template <int R>
static void fg_decays_launch(const fg_ssd &z, const fg_ssd_steps &steps, const fg_decays &d,
                             cudaStream_t stream)
{
    const dim3 blocks(fg_blocks(d.padded, 128) * (unsigned)z.B, (unsigned)((z.H + 7) / 8));
    fg_decays_fill<R><<<blocks, 256, 0, stream>>>(z, steps, d);
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
template <int WIDTH, int ROWS, int THREADS>
static __device__ __forceinline__ void fg_tile_load(bf16 *to, const bf16 *from, int64_t row,
                                                    int real)
{
    constexpr int EIGHTS = WIDTH / 8, STEP = THREADS / EIGHTS;
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "");
    const int r0 = threadIdx.x / EIGHTS, c = threadIdx.x % EIGHTS;
    const uint32_t m = fg_shared(to) + fg_swizzle<WIDTH>(r0, c);
    const bf16 *p = from + r0 * row + c * 8;
#pragma unroll
    for (int k = 0; k < ROWS / STEP; k++) {
        const bool in = r0 + k * STEP < real;
        fg_copy_async(m + k * STEP * WIDTH * 2, in ? p + k * STEP * row : from, in);
    }
}
/* The same rows one behind the other. */
template <int WIDTH, int ROWS, int THREADS>
static __device__ __forceinline__ void fg_tile_load(bf16 *to, const bf16 *from)
{
    constexpr int EIGHTS = WIDTH / 8, STEP = THREADS / EIGHTS;
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "");
    const int r0 = threadIdx.x / EIGHTS, c = threadIdx.x % EIGHTS;
    const uint32_t m = fg_shared(to) + fg_swizzle<WIDTH>(r0, c);
    const bf16 *p = from + threadIdx.x * 8;
#pragma unroll
    for (int k = 0; k < ROWS / STEP; k++)
        fg_copy_async(m + k * STEP * WIDTH * 2, p + k * STEP * WIDTH, true);
}
/* What this thread copied and waited for is there for wgmma, behind a barrier. */
static __device__ __forceinline__ void fg_async_fence()
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    proxy_fence();
#endif
}
/* N floats, a multiple of 4. */
template <int N>
static __device__ __forceinline__ void fg_floats_load(float *to, const float *from)
{
    const int i = threadIdx.x * 4;
    if (i < N) fg_copy_async(fg_shared(to + i), from + i, true);
}

/* Lane q of four gets word q of each: v[k] becomes what lane k had in v[q].  So four columns of 16
 * bits a lane and tile become eight of one tile: one store instead of four. */
static __device__ __forceinline__ void fg_quad_turn(uint32_t *v)
{
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    uint32_t s = odd ? v[0] : v[1], t = odd ? v[2] : v[3];
    s = __shfl_xor_sync(~0u, s, 1);
    t = __shfl_xor_sync(~0u, t, 1);
    if (odd) v[0] = s, v[2] = t;
    else v[1] = s, v[3] = t;
    s = high ? v[0] : v[2];
    t = high ? v[1] : v[3];
    s = __shfl_xor_sync(~0u, s, 2);
    t = __shfl_xor_sync(~0u, t, 2);
    if (high) v[0] = s, v[1] = t;
    else v[2] = s, v[3] = t;
}
static __device__ __forceinline__ void fg_store4(bf16 *to, const uint32_t *v)
{
    *(uint4 *)to = make_uint4(v[0], v[1], v[2], v[3]);
}

/* ---- states between chunks ------------------------------------------------------------------ */

/* state = whole state + sum_j u_j weight_j v_j^T over a chunk, in both directions of time:
 *     forward   u = x, v = b, weight = push: the states that enter chunks
 *     back      u = gy, v = c, weight = keep: the gradients of the states that leave them
 * A block walks all chunks with some columns of one head's state in registers. */
struct fg_states {
    const bf16 *u, *v;
    int64_t u_row, v_row;                        /* elements between tokens */
    const float *weight;
    const float *from;                           /* f32[B,H,P,N]; NULL: 0 */
    float *to;                                   /* the same after the last chunk, or NULL */
    bf16 *kept;                                  /* [B,H,chunks/each,N/64,P,64], before `each`
                                                    chunks, each row as fg_swizzle<64> has it */
    int each;
    bool back;
};
struct fg_both_states { fg_states s[2]; };       /* one direction for each gridDim.y */

#define FG_STATE_P 64                            /* head width of the tensor core kernels */
#define FG_STATE_COLUMNS 64                      /* of a block */
template <int R> constexpr int fg_state_stages = R > 64 ? 3 : 4;    /* 99 KiB at most */

template <int R> struct fg_state_tile {
    alignas(1024) bf16 u[R * FG_STATE_P];
    alignas(1024) bf16 v[R * FG_STATE_COLUMNS];
    alignas(16) float weight[R];
};

static __device__ __forceinline__ uint32_t fg_scale2(uint32_t x, float a, float b)
{
    return fg_pack2(__uint_as_float(x << 16) * a, __uint_as_float(x & 0xffff0000u) * b);
}

/* u^T weight of a warp's 16 rows p, in fragments. */
template <int R>
static __device__ __forceinline__ void fg_weigh_rows(uint32_t (*a)[4], const bf16 *u,
                                                     const float *weight, int p)
{
    const int c = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int j = 0; j < R / 16; j++) {
        fg_a_trans<64>(a[j], fg_shared(u), p, 16 * j);
        const float2 w0 = *(const float2 *)&weight[16 * j + c];
        const float2 w1 = *(const float2 *)&weight[16 * j + 8 + c];
        a[j][0] = fg_scale2(a[j][0], w0.x, w0.y);
        a[j][1] = fg_scale2(a[j][1], w0.x, w0.y);
        a[j][2] = fg_scale2(a[j][2], w1.x, w1.y);
        a[j][3] = fg_scale2(a[j][3], w1.x, w1.y);
    }
}

/* sum += a v, on its way until fg_states_done. */
template <int R>
static __device__ __forceinline__ void fg_states_add(uint32_t (&a)[R / 16][4], const bf16 *v,
                                                     float (&sum)[8][4])
{
    const uint32_t at = fg_shared(v);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    pin(sum), pin(a);
    wgmma_begin();
#pragma unroll
    for (int j = 0; j < R / 16; j++) product(sum, a[j], matrix_at(at + 2048 * j, 0));
    wgmma_commit();
#else
#pragma unroll
    for (int j = 0; j < R / 16; j++)
#pragma unroll
        for (int n = 0; n < FG_STATE_COLUMNS / 16; n++) {
            uint32_t q[4];
            fg_b<FG_STATE_COLUMNS>(q, at, 16 * j, 16 * n);
            fg_mma(sum[2 * n], a[j], q[0], q[1]);
            fg_mma(sum[2 * n + 1], a[j], q[2], q[3]);
        }
#endif
}
template <int R>
static __device__ __forceinline__ void fg_states_done(uint32_t (&a)[R / 16][4], float (&sum)[8][4])
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    wgmma_wait<0>();
    pin(sum), pin(a);
#endif
}

/* Rows p + g and p + g + 8 of 64 columns of a state to bf16. */
static __device__ __forceinline__ void fg_states_keep(bf16 *to, int p, const float (*sum)[4])
{
    const int r = p + threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < FG_STATE_COLUMNS / 8; n += 4)
#pragma unroll
        for (int low = 0; low < 2; low++) {
            uint32_t v[4];
#pragma unroll
            for (int k = 0; k < 4; k++)
                v[k] = fg_pack2(sum[n + k][2 * low], sum[n + k][2 * low + 1]);
            fg_quad_turn(v);
            const int row = r + 8 * low;
            fg_store4(to + row * 64 + 8 * ((n + q) ^ (row & 7)), v);
        }
}

/* Where element (n, e) of a thread's sums lies in a head's state. */
static __device__ __forceinline__ int64_t fg_state_at(int p, int n, int e, int64_t N)
{
    const int lane = threadIdx.x % 32;
    return (p + lane / 4 + e / 2 * 8) * N + 8 * n + 2 * (lane % 4) + e % 2;
}

/* A thread's share of a tile's 16-byte copies; rows behind the last token become 0. */
template <int R> struct fg_state_loader {
    const bf16 *u, *v;
    const float *weight;
    int64_t u_row, v_row, T;
    uint32_t to;
    int r0;
    __device__ __forceinline__ void load(fg_state_tile<R> *m, int64_t t) const
    {
        const int64_t left = T - t;
        const int real = left < 0 ? 0 : left < R ? (int)left : R;
        const bf16 *p = u + (real ? t : 0) * u_row, *q = v + (real ? t : 0) * v_row;
        const uint32_t at = fg_shared(m->u) + to, other = fg_shared(m->v) + to;
#pragma unroll
        for (int k = 0; k < R / 16; k++) {
            const bool in = r0 + 16 * k < real;
            fg_copy_async(at + k * 2048, in ? p + 16 * k * u_row : u, in);
            fg_copy_async(other + k * 2048, in ? q + 16 * k * v_row : v, in);
        }
        fg_floats_load<R>(m->weight, weight + t);
    }
};

template <int R>
static __device__ __forceinline__ fg_state_loader<R> fg_loader_of(const fg_ssd &z,
                                                                  const fg_states &s, int64_t b,
                                                                  int64_t h, int64_t n0,
                                                                  const float *weight)
{
    const int r = threadIdx.x / 8, c = threadIdx.x % 8;
    const int64_t g = h / (z.H / z.G), token = b * z.T + (r < z.T ? r : 0);
    return { s.u + token * s.u_row + h * FG_STATE_P + 8 * c,
             s.v + token * s.v_row + g * z.N + n0 + 8 * c, weight, s.u_row, s.v_row, z.T,
             fg_swizzle<64>(r, c), r };
}

/* A block of 128 threads has a head and FG_STATE_COLUMNS of its state; a warp 16 rows. */
template <int R>
static __global__ void __launch_bounds__(128)
fg_states_walk(fg_ssd z, fg_decays d, fg_both_states both)
{
    extern __shared__ __align__(1024) char fg_state_memory[];
    fg_state_tile<R> *m = (fg_state_tile<R> *)fg_state_memory;
    const fg_states s = both.s[blockIdx.y];
    const int parts = (int)z.N / FG_STATE_COLUMNS, n0 = blockIdx.x % parts * FG_STATE_COLUMNS;
    const int64_t row = blockIdx.x / parts, chunks = d.chunks, size = FG_STATE_P * z.N;
    const int p = threadIdx.x / 32 * 16, step = s.back ? -1 : 1;
    const float *whole = d.whole + row * chunks;
    const fg_state_loader<R> l = fg_loader_of<R>(z, s, row / z.H, row % z.H, n0,
                                                 s.weight + row * d.padded);
    bf16 *kept = s.kept + row * (chunks / s.each) * size + n0 * FG_STATE_P;
    uint32_t a[R / 16][4];
    float sum[8][4] = {};
    if (s.from)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                sum[n][e] = s.from[row * size + n0 + fg_state_at(p, n, e, z.N)];
    int64_t at = s.back ? chunks - 1 : 0;
#pragma unroll
    for (int i = 0; i < fg_state_stages<R> - 1; i++) {
        if (i < chunks) l.load(m + i, (at + i * step) * R);
        fg_copy_commit();
    }
    fg_copy_wait<fg_state_stages<R> - 2>();
    fg_async_fence();
    __syncthreads();
    fg_weigh_rows<R>(a, m->u, m->weight, p);
    float decay = whole[at];
    for (int64_t i = 0; i < chunks; i++, at += step) {
        if (i % s.each == 0) fg_states_keep(kept + at / s.each * size, p, sum);
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) sum[n][e] *= decay;
        fg_states_add<R>(a, m[i % fg_state_stages<R>].v, sum);
        uint32_t next[R / 16][4];
        fg_copy_wait<fg_state_stages<R> - 3>();
        fg_async_fence();
        __syncthreads();
        if (i + fg_state_stages<R> - 1 < chunks)
            l.load(m + (i + fg_state_stages<R> - 1) % fg_state_stages<R>,
                   (at + (fg_state_stages<R> - 1) * step) * R);
        fg_copy_commit();
        if (i + 1 < chunks) {
            const fg_state_tile<R> *tile = m + (i + 1) % fg_state_stages<R>;
            decay = whole[at + step];
            fg_weigh_rows<R>(next, tile->u, tile->weight, p);
        }
        fg_states_done<R>(a, sum);
#pragma unroll
        for (int j = 0; j < R / 16; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) a[j][e] = next[j][e];
    }
    if (!s.to) return;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            s.to[row * size + n0 + fg_state_at(p, n, e, z.N)] = sum[n][e];
}

/* On wgmma, with a state kept for every 128 tokens; whether this device and this build have it. */
void fg_states_sm90(const fg_ssd &z, const fg_decays &d, const fg_both_states &s, int directions,
                    cudaStream_t stream);
bool fg_states_have_sm90();

template <int R>
static void fg_states_launch(const fg_ssd &z, const fg_decays &d, const fg_both_states &s,
                             int directions, cudaStream_t stream)
{
    if (R * s.s[0].each == 128 && fg_states_have_sm90()) {
        fg_states_sm90(z, d, s, directions, stream);
        return;
    }
    const int bytes = fg_state_stages<R> * (int)sizeof(fg_state_tile<R>);
    const dim3 blocks((unsigned)(z.B * z.H * z.N / FG_STATE_COLUMNS), (unsigned)directions);
    cudaFuncSetAttribute(fg_states_walk<R>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    fg_states_walk<R><<<blocks, 128, bytes, stream>>>(z, d, s);
}

/* ---- the chunks of ssd_scan ------------------------------------------------------------------ */

struct fg_ssd_chunks {
    fg_ssd z;
    fg_decays d;
    const bf16 *x, *b, *c, *states;
    const float *skip;                           /* d; NULL: absent */
    bf16 *y;
    int64_t x_row, b_row, c_row, parts;          /* parts: blocks that share a group's heads */
};
/* On wgmma, for chunks of 128; whether this device and this build have it. */
void fg_ssd_scan_sm90(const fg_ssd_chunks &k, cudaStream_t stream);
bool fg_ssd_scan_has_sm90();

/* Blocks that share a group's heads, so that there are about `blocks`. */
static inline int64_t fg_ssd_parts(const fg_ssd &z, int64_t chunks, int64_t blocks)
{
    const int64_t each = z.B * chunks * z.G, M = z.H / z.G, parts = (blocks + each - 1) / each;
    return parts < M ? parts : M;
}

/* ---- ssd_scan and mamba2_scan, on tensor cores ----------------------------------------------- */

enum { FG_SSD_X, FG_SSD_DT, FG_SSD_A, FG_SSD_B, FG_SSD_C, FG_SSD_D, FG_SSD_STATE, FG_SSD_FIRST,
       FG_SSD_PAST };                            /* inputs; of the gradients from FG_SSD_BACK on */
#define FG_SSD_BACK 2

/* Whether they take these shapes and dtypes, of the inputs from x on. */
static inline bool fg_ssd_fits(const fg_infer *c, int x)
{
    const fg_dtype *type = c->in_type + x;
    const int64_t N = c->in[x + FG_SSD_B].dim[3];
    return c->in[x].dim[1] > 16 && c->in[x].dim[3] == FG_STATE_P && (N == 64 || N == 128)
           && type[FG_SSD_X] == FG_BF16 && type[FG_SSD_B] == FG_BF16 && type[FG_SSD_C] == FG_BF16
           && type[FG_SSD_A] == FG_F32 && (!c->given[x + FG_SSD_D] || type[FG_SSD_D] == FG_F32);
}
static inline fg_ssd_steps fg_steps_of(const fg_exec *e, int x, int bias)
{
    return { fg_input_of(e, x + FG_SSD_DT),
             fg_pitch_of(&e->in_rows[x + FG_SSD_DT], e->in_shape[x].dim[2]),
             (const float *)e->in[x + FG_SSD_A], bias ? (const float *)e->in[bias] : nullptr };
}

/* kept: the states before every 128 tokens, for the gradient; else in e->scratch. */
void fg_ssd_forward(const fg_exec *e, const fg_ssd_steps &steps, bf16 *kept, cudaStream_t stream);
size_t fg_ssd_forward_scratch(const fg_infer *c, bool kept);
/* gbias: with steps.bias. */
void fg_ssd_backward(const fg_exec *e, const fg_ssd_steps &steps, const bf16 *kept,
                     const fg_out &gbias, cudaStream_t stream);
size_t fg_ssd_backward_scratch(const fg_infer *c, bool kept);
#endif
