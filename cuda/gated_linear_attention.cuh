/* gated_linear_attention.cuh - gated linear attention in chunks on tensor cores, for
 * gated_linear_attention.cu and hgrn2_scan.cu.
 *
 *     S_t = diag(e^(g_t)) S_(t-1) + k_t v_t^T,   o_t = scale S_t^T q_t
 *
 * bf16, K = V = 128, 64 rows or more: chunks of 64 rows (linear_attention.cuh) with, per channel,
 *     Q_t = q_t e^(b_t),  K_s = k_s e^(b_end - b_s),  A_ts = sum_d q_td k_sd e^(b_td - b_sd)
 * and b the sum of g from the chunk's start.  A falls in blocks of 16 x 16.  Left of the diagonal
 * both factors are taken relative to the first row of the block's queries and are <= 1.  On the
 * diagonal the keys' factor grows: up to 80 nats it is taken so too, beyond, pair by pair.  Sums of
 * g are kept relative to every 16th row, so that one strong gate costs others no digits; g is taken
 * as -110 at least, where e^g is 0 in f32.
 * RAW: q is taken before its silu, and in the place of k and g stands z, the logit of the gate
 * f = low + (1 - low) sigmoid(z), k = 1 - f, g = ln f.
 *
 * Bytes of 1 x 16384 rows, 12 heads, a unit is 50 MB: forward 13, RAW 11 (least 6, 4); gradient 30,
 * RAW 24 (least 12, 7). */
#ifndef FG_GATED_LINEAR_ATTENTION_CUH
#define FG_GATED_LINEAR_ATTENTION_CUH
#include "linear_attention_chain.cuh"

#define BLOCKS (LA_ROWS / 16)
#define GUARD  115.0f                            /* 80 nats in units of log2 */
#define STRONGEST (-110.0f * (float)FG_LOG2_E)

/* Gates of a chunk and W channels in units of log2, by blocks of 16 rows. */
template <int W> struct gates {
    static constexpr int lane = W + 8;           /* floats from row to row of lambda */
    float lambda[LA_ROWS * lane];                /* from the first row of its block to row t */
    float first[BLOCKS][W];                      /* g of the first row */
    float total[BLOCKS - 1][W];                  /* from first row to first row */
    float before[BLOCKS][W];                     /* from the chunk's start to and with first rows */
    float behind[BLOCKS][W];                     /* from the first row to the chunk's last */
};

struct inputs {                                  /* row t of head h: t row + 128 h behind q */
    const bf16 *q, *k, *v;
    int64_t q_row, k_row, v_row;
    const float *g;                              /* [B,T,H,128]; of RAW, NULL */
    const float *low;                            /* of RAW: [H,128], or NULL: 0 */
};

/* s = sigmoid(z) and 1 - s, each without a subtraction */
static __device__ __forceinline__ void split(float z, float &s, float &rest)
{
    const float e = __expf(-fabsf(z)), big = __fdividef(1.0f, 1.0f + e), small = e * big;
    s = z >= 0 ? big : small;
    rest = z >= 0 ? small : big;
}
/* log2 of f = low + (1 - low) sigmoid(z), and k = 1 - f; near 1 by the series of ln(1 - k). */
static __device__ __forceinline__ float gate_of(float z, float low, float &k)
{
    float s, rest;
    split(z, s, rest);
    k = (1 - low) * rest;
    const float x = fmaf(k, fmaf(k, 1 / 3.0f, 1 / 2.0f), 1.0f);
    return k < 1 / 64.0f ? -(float)FG_LOG2_E * k * x : __log2f(fmaf(1 - low, s, low));
}
template <int W> static __device__ __forceinline__ bf16 *element(bf16 *x, int r, int d)
{
    return (bf16 *)la_pair<W>(x, r, d & ~1) + (d & 1);
}
/* x = silu(x), in place */
template <int THREADS, int W> static __device__ __forceinline__ void activate(bf16 *x)
{
#pragma unroll
    for (int i = threadIdx.x; i < LA_ROWS * W / 8; i += THREADS) {
        float v[8];
        fg_unpack(((const uint4 *)x)[i], v);
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] *= __fdividef(1.0f, 1.0f + __expf(-v[e]));
        ((uint4 *)x)[i] = make_uint4(fg_pack2(v[0], v[1]), fg_pack2(v[2], v[3]),
                                     fg_pack2(v[4], v[5]), fg_pack2(v[6], v[7]));
    }
}

/* THREADS a multiple of W.  g: of the first row and channel; RAW: low instead, and k is z first. */
template <int THREADS, int W, bool RAW>
static __device__ __forceinline__ void fill_gates(gates<W> *z, bf16 *k, const float *g, int64_t row,
                                                  int n)
{
    constexpr int LANE = gates<W>::lane;
    const int d = threadIdx.x % W;
    const float low = RAW && g ? g[d] : 0.0f;
    for (int i = threadIdx.x / W; i < BLOCKS; i += THREADS / W) {
        float x[16], sum = 0;
#pragma unroll
        for (int r = 0; r < 16; r++) {
            if (!RAW) {
                x[r] = 16 * i + r < n ? g[(16 * i + r) * row + d] : 0.0f;
                continue;
            }
            bf16 *at = element<W>(k, 16 * i + r, d);
            float key;
            x[r] = gate_of(__bfloat162float(*at), low, key);
            *at = __float2bfloat16_rn(16 * i + r < n ? key : 0.0f);
            x[r] = 16 * i + r < n ? x[r] : 0.0f;
        }
#pragma unroll
        for (int r = 0; r < 16; r++) {
            const float unit = RAW ? 1.0f : (float)FG_LOG2_E, least = STRONGEST / unit;
            const float y = (x[r] < least ? least : x[r]) * unit;
            if (r) sum += y;
            else z->first[i][d] = y;
            z->lambda[(16 * i + r) * LANE + d] = sum;
        }
    }
    __syncthreads();
    if (threadIdx.x < W) {
        float sum = z->first[0][d], total[BLOCKS - 1];
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            z->before[i][d] = sum;
            if (i == BLOCKS - 1) break;
            total[i] = z->lambda[(16 * i + 15) * LANE + d] + z->first[i + 1][d];
            z->total[i][d] = total[i];
            sum += total[i];
        }
        sum = z->lambda[(LA_ROWS - 1) * LANE + d];
#pragma unroll
        for (int i = BLOCKS - 1; i >= 0; i--) {
            z->behind[i][d] = sum;
            if (i) sum += total[i - 1];
        }
    }
    __syncthreads();
}

/* From the first row of block j to that of block i, j <= i. */
template <int W>
static __device__ __forceinline__ float2 apart(const gates<W> *z, int i, int j, int d)
{
    float2 sum = make_float2(0, 0);
    for (int k = j; k < i; k++) {
        const float2 x = *(const float2 *)&z->total[k][d];
        sum.x += x.x;
        sum.y += x.y;
    }
    return sum;
}
template <int W>
static __device__ __forceinline__ float2 lambda_at(const gates<W> *z, int r, int d)
{
    return *(const float2 *)&z->lambda[r * gates<W>::lane + d];
}
/* Two bf16 times 2^x, 2^y. */
static __device__ __forceinline__ uint32_t turned_down(uint32_t u, float x, float y)
{
    return fg_pack2(la_low_half(u) * fg_exp2(x), la_high_half(u) * fg_exp2(y));
}
/* The keys' factor of block i stays below e^80 in the channels [d0,d1). */
template <int W>
static __device__ __forceinline__ bool is_tame(const gates<W> *z, int i, int d0, int d1)
{
    float worst = 0;
    for (int d = d0 + (int)threadIdx.x % 32; d < d1; d += 32) {
        const float x = -z->lambda[(16 * i + 15) * gates<W>::lane + d];
        worst = x <= worst ? worst : x;          /* NaN is not tame */
    }
    return !__any_sync(~0u, !(worst <= GUARD));
}

struct operands {                                /* of all chunks, in scratch */
    bf16 *q, *k;                                 /* [B,H,chunks*64,128]: Q and K of the chain */
    bf16 *A;                                     /* [B,H,chunks,64,64] */
    float *decay;                                /* [B,H,chunks,128] */
    float *ends[2], *through;                    /* as la_chain has them, forth and back */
};

/* What prepare writes, and what segments of the chain add. */
static void cut_prepared(char *base, size_t *used, const la_task &z, operands *s)
{
    const size_t tiles = (size_t)(z.B * z.H * z.chunks), panel = tiles * LA_ROWS * sizeof(bf16);
    s->q = (bf16 *)la_cut(base, used, panel * LA_WIDTH);
    s->k = (bf16 *)la_cut(base, used, panel * LA_WIDTH);
    s->A = (bf16 *)la_cut(base, used, panel * LA_ROWS);
    s->decay = (float *)la_cut(base, used, tiles * LA_WIDTH * sizeof(float));
}
static void cut_ends(char *base, size_t *used, const la_task &z, bool back, operands *s)
{
    la_cut_ends(base, used, z, back, false, s->ends, &s->through);
}

/* ---- preparing a chunk ----------------------------------------------------------------------- */

struct prepared {
    bf16 q[LA_ROWS * LA_WIDTH], k[LA_ROWS * LA_WIDTH];
    gates<LA_WIDTH> z;
    int start[LA_ROWS];
    uint32_t marks[2];
};

/* Block (i,j) of A, by one warp. */
static __device__ __forceinline__ void pairs_block(const prepared *sm, int i, int j, bf16 *A)
{
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
    float acc[2][4];
    la_zero<2>(acc);
    for (int k = 0; k < LA_WIDTH; k += 16) {
        uint32_t a[4], b[4];
        const float2 near = apart(&sm->z, i, j, k + c), far = apart(&sm->z, i, j, k + c + 8);
        la_a<LA_WIDTH>(a, fg_shared(sm->q), 16 * i, k);
        la_b<LA_WIDTH>(b, fg_shared(sm->k), k, 16 * j);
#pragma unroll
        for (int x = 0; x < 4; x++) {            /* rows g, g + 8; columns c, then c + 8 */
            const float2 l = lambda_at(&sm->z, 16 * i + g + x % 2 * 8, k + c + x / 2 * 8);
            a[x] = turned_down(a[x], l.x, l.y);
        }
#pragma unroll
        for (int x = 0; x < 4; x++) {            /* columns c, c + 8 of row g, then of row g + 8 */
            const float2 l = lambda_at(&sm->z, 16 * j + g + x / 2 * 8, k + c + x % 2 * 8);
            const float2 off = x % 2 ? far : near;
            b[x] = turned_down(b[x], off.x - l.x, off.y - l.y);
        }
        la_mma2(acc, a, b);
    }
#pragma unroll
    for (int y = 0; y < 2; y++)
#pragma unroll
        for (int x = 0; x < 2; x++) {
            const int t = 16 * i + g + 8 * x, s = 16 * j + 8 * y + c, from = sm->start[t];
            const bool first = s <= t && s >= from, second = s + 1 <= t && s + 1 >= from;
            *(uint32_t *)(A + t * LA_ROWS + s) = fg_pack2(first ? acc[y][2 * x] : 0.0f,
                                                          second ? acc[y][2 * x + 1] : 0.0f);
        }
}

/* A block on the diagonal whose factors would overflow: pair by pair. */
static __device__ void pairs_exactly(prepared *sm, int i, bf16 *A)
{
    for (int p = threadIdx.x % 32; p < 256; p += 32) {
        const int t = 16 * i + p / 16, s = 16 * i + p % 16;
        float sum = 0;
        for (int d = 0; s <= t && s >= sm->start[t] && d < LA_WIDTH; d += 2) {
            const uint32_t q = *la_pair<LA_WIDTH>(sm->q, t, d), k = *la_pair<LA_WIDTH>(sm->k, s, d);
            const float2 x = lambda_at(&sm->z, t, d), y = lambda_at(&sm->z, s, d);
            sum = fmaf(la_low_half(q) * la_low_half(k), fg_exp2(x.x - y.x), sum);
            sum = fmaf(la_high_half(q) * la_high_half(k), fg_exp2(x.y - y.y), sum);
        }
        A[t * LA_ROWS + s] = __float2bfloat16_rn(sum);
    }
}

template <bool RAW>
static __global__ void __launch_bounds__(256)
prepare(const __grid_constant__ la_task z, const __grid_constant__ inputs x, operands s)
{
    extern __shared__ __align__(1024) char memory[];
    prepared *sm = (prepared *)memory;
    const int64_t chunk = blockIdx.x, bh = blockIdx.y, b = bh / z.H, h = bh % z.H;
    const int64_t token = b * z.T + chunk * LA_ROWS, row = z.H * LA_WIDTH;
    const int64_t to = (bh * z.chunks + chunk) * LA_ROWS;
    const int n = la_rows(z, chunk), warp = threadIdx.x / 32;
    la_load<LA_WIDTH, 256>(sm->k, x.k + token * x.k_row + h * LA_WIDTH, x.k_row, n, threadIdx.x);
    fg_copy_commit();
    la_load<LA_WIDTH, 256>(sm->q, x.q + token * x.q_row + h * LA_WIDTH, x.q_row, n, threadIdx.x);
    fg_copy_commit();
    la_starts(z, b, chunk, sm->start, sm->marks);
    if (RAW) {
        fg_copy_wait<1>();
        __syncthreads();
        fill_gates<256, LA_WIDTH, true>(&sm->z, sm->k, x.low ? x.low + h * LA_WIDTH : nullptr, 0,
                                        n);
    } else {
        fill_gates<256, LA_WIDTH, false>(&sm->z, sm->k, x.g + token * row + h * LA_WIDTH, row, n);
    }
    fg_copy_wait<0>();
    __syncthreads();
    if (RAW) {
        activate<256, LA_WIDTH>(sm->q);
        __syncthreads();
    }
    bf16 *A = s.A + to * LA_ROWS;
    for (int p = warp; p < 10; p += 8) {         /* from the last row of blocks */
        const int i = p < 4 ? 3 : p < 7 ? 2 : p < 9 ? 1 : 0, j = p < 4 ? p : p < 7 ? p - 4
                    : p < 9 ? p - 7 : 0;
        if (i == j && !is_tame(&sm->z, i, 0, LA_WIDTH)) pairs_exactly(sm, i, A);
        else pairs_block(sm, i, j, A);
    }
    if (warp >= 2) {                             /* six blocks above the diagonal */
        const int i = warp < 5 ? 0 : warp < 7 ? 1 : 2, j = warp < 5 ? warp - 1 : warp < 7
                    ? warp - 3 : 3, r = threadIdx.x % 32 / 2, d = threadIdx.x % 2 * 8;
        *(uint4 *)(A + (16 * i + r) * LA_ROWS + 16 * j + d) = make_uint4(0, 0, 0, 0);
    }
    const int last = sm->start[n - 1];
    for (int p = threadIdx.x; p < LA_ROWS * LA_WIDTH / 8; p += 256) {
        const int r = p / 16, d = p % 16 * 8, i = r / 16;
        const bool reached = sm->start[r] == -1, passes = la_passes(r, n, last);
        uint32_t q[4], k[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float2 l = lambda_at(&sm->z, r, d + 2 * e);
            const float2 in = *(const float2 *)&sm->z.before[i][d + 2 * e];
            const float2 out = *(const float2 *)&sm->z.behind[i][d + 2 * e];
            q[e] = turned_down(*la_pair<LA_WIDTH>(sm->q, r, d + 2 * e), in.x + l.x, in.y + l.y);
            k[e] = turned_down(*la_pair<LA_WIDTH>(sm->k, r, d + 2 * e), out.x - l.x, out.y - l.y);
            q[e] = reached ? q[e] : 0;
            k[e] = passes ? k[e] : 0;
        }
        *(uint4 *)(s.q + (to + r) * LA_WIDTH + d) = make_uint4(q[0], q[1], q[2], q[3]);
        *(uint4 *)(s.k + (to + r) * LA_WIDTH + d) = make_uint4(k[0], k[1], k[2], k[3]);
    }
    if (threadIdx.x < LA_WIDTH) {
        const int d = threadIdx.x;
        s.decay[(bh * z.chunks + chunk) * LA_WIDTH + d] =
            last == -1 ? fg_exp2(sm->z.first[0][d] + sm->z.behind[0][d]) : 0;
    }
}

template <bool RAW>
static void launch_prepare(const la_task &z, const inputs &x, const operands &s,
                           cudaStream_t stream)
{
    const int bytes = (int)sizeof(prepared);
    cudaFuncSetAttribute(prepare<RAW>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    prepare<RAW><<<dim3((unsigned)z.chunks, (unsigned)(z.B * z.H)), 256, bytes, stream>>>(z, x, s);
}

/* ---- forward --------------------------------------------------------------------------------- */

static la_chain chain_of(const la_task &z, const operands &s, const bf16 *u, int64_t u_row,
                         bool back)
{
    const int64_t own = z.chunks * LA_ROWS * LA_WIDTH;
    la_chain c = {};
    c.z = z;
    c.q = { s.q, z.H * own, own, LA_WIDTH };
    c.k = { s.k, z.H * own, own, LA_WIDTH };
    c.u = { u, z.T * u_row, LA_WIDTH, u_row };
    c.A = s.A, c.decay = s.decay;
    la_cut_up(&c, z, s.ends[back], s.through);
    return c;
}

/* o [B,T,H,128] and the last state, of s with all in its place */
template <bool RAW>
static void launch_forward(const la_task &z, const inputs &x, const operands &s, bf16 *o,
                           float *last, cudaStream_t stream)
{
    const int64_t row = z.H * LA_WIDTH;
    launch_prepare<RAW>(z, x, s, stream);
    la_chain c = chain_of(z, s, x.v, x.v_row, false);
    c.o = { o, z.T * row, LA_WIDTH, row };
    c.to = last;
    la_run_forward<false>(c, stream);
}
#endif
