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

#define HALF   64                                /* channels of a block of join */
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

/* ---- gradient -------------------------------------------------------------------------------- */

struct gradients {                               /* rows as those of inputs */
    bf16 *q, *k, *v;                             /* RAW: k is that of z */
    int64_t q_row, k_row, v_row;
    float *g;                                    /* [B,T,H,128]; of RAW, NULL */
    float *low;                                  /* of RAW: [B,chunks,H,128] parts, or NULL */
};

/* Of half the channels: two blocks share a multiprocessor. */
struct joined {
    bf16 v[LA_ROWS * LA_WIDTH], go[LA_ROWS * LA_WIDTH];
    bf16 q[LA_ROWS * HALF], k[LA_ROWS * HALF];
    bf16 S[LA_WIDTH * HALF], R[LA_WIDTH * HALF];         /* [value][channel] */
    bf16 gA[LA_ROWS * LA_ROWS];                  /* scale go_t.v_s for s < t, else 0 */
    float own[LA_ROWS];                          /* scale go_t.v_t */
    gates<HALF> z;
    int start[LA_ROWS];
    uint32_t marks[2];
};

/* Block (i,j) of gA, at or below the diagonal, by one warp. */
static __device__ __forceinline__ void pair_gradients(joined *sm, int i, int j, float scale)
{
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
    float acc[2][4];
    la_zero<2>(acc);
#pragma unroll
    for (int k = 0; k < LA_WIDTH; k += 16) {
        uint32_t a[4], b[4];
        la_a<LA_WIDTH>(a, fg_shared(sm->go), 16 * i, k);
        la_b<LA_WIDTH>(b, fg_shared(sm->v), k, 16 * j);
        la_mma2(acc, a, b);
    }
#pragma unroll
    for (int y = 0; y < 2; y++)
#pragma unroll
        for (int x = 0; x < 2; x++) {
            const int t = 16 * i + g + 8 * x, s = 16 * j + 8 * y + c, from = sm->start[t];
            float v[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float p = scale * acc[y][2 * x + e];
                v[e] = s + e < t && s + e >= from ? p : 0;
                if (s + e == t) sm->own[t] = from == LA_NONE ? 0 : p;
            }
            *la_pair<LA_ROWS>(sm->gA, t, s) = fg_pack2(v[0], v[1]);
        }
}

/* out[4][4]: 64 rows by this warp's 8 channels of x M, M: [value][channel] */
static __device__ __forceinline__ void through_state(float out[4][4], uint32_t x, uint32_t M)
{
    const int d0 = threadIdx.x / 32 * 8, q = threadIdx.x % 32 / 8, i = threadIdx.x % 8;
    la_zero<4>(out);
#pragma unroll 1
    for (int k = 0; k < LA_WIDTH; k += 32) {
        uint32_t a[4], b[4];
        fg_ldmatrix_trans(b, M + fg_swizzle<HALF>(k + 8 * q + i, d0 / 8));
#pragma unroll
        for (int m = 0; m < 4; m++) {
            la_a<LA_WIDTH>(a, x, 16 * m, k);
            fg_mma(out[m], a, b[0], b[1]);
            la_a<LA_WIDTH>(a, x, 16 * m, k + 16);
            fg_mma(out[m], a, b[2], b[3]);
        }
    }
}

/* What pairs of one block add to its queries' and keys' gradients, gates too strong to factor. */
static __device__ void block_exactly(joined *sm, int i, int d, float gq[4], float gk[4])
{
    const int g = threadIdx.x % 32 / 4;
    for (int x = 0; x < 2; x++) {
        const int t = 16 * i + g + 8 * x;
        const float2 own = lambda_at(&sm->z, t, d);
        for (int r = 16 * i; r < 16 * i + 16; r++) {
            const float2 l = lambda_at(&sm->z, r, d);
            const float from = __bfloat162float(
                ((const bf16 *)la_pair<LA_ROWS>(sm->gA, t, r & ~1))[r & 1]);
            const float to = __bfloat162float(
                ((const bf16 *)la_pair<LA_ROWS>(sm->gA, r, t & ~1))[t & 1]);
            const uint32_t k = *la_pair<HALF>(sm->k, r, d), q = *la_pair<HALF>(sm->q, r, d);
            if (r < t) {
                gq[2 * x] = fmaf(from * la_low_half(k), fg_exp2(own.x - l.x), gq[2 * x]);
                gq[2 * x + 1] = fmaf(from * la_high_half(k), fg_exp2(own.y - l.y), gq[2 * x + 1]);
            } else if (r > t) {
                gk[2 * x] = fmaf(to * la_low_half(q), fg_exp2(l.x - own.x), gk[2 * x]);
                gk[2 * x + 1] = fmaf(to * la_high_half(q), fg_exp2(l.y - own.y), gk[2 * x + 1]);
            }
        }
    }
}

/* Sums of a channel along the 64 rows, in fragments: row 16 m + 8 x + g is v[m][2 x + e]. */
static __device__ __forceinline__ void sums_from_behind(float v[4][4])       /* inclusive */
{
    const int g = threadIdx.x % 32 / 4;
    float carry[2] = { 0, 0 };
#pragma unroll
    for (int p = 7; p >= 0; p--)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float x = v[p / 2][p % 2 * 2 + e];
#pragma unroll
            for (int k = 1; k < 8; k *= 2) {
                const float y = __shfl_down_sync(~0u, x, 4 * k);
                if (g + k < 8) x += y;
            }
            const float all = __shfl_sync(~0u, x, threadIdx.x % 4);
            v[p / 2][p % 2 * 2 + e] = x + carry[e];
            carry[e] += all;
        }
}
static __device__ __forceinline__ void sums_before(float v[4][4])            /* exclusive */
{
    const int g = threadIdx.x % 32 / 4;
    float carry[2] = { 0, 0 };
#pragma unroll
    for (int p = 0; p < 8; p++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const float own = v[p / 2][p % 2 * 2 + e];
            float x = own;
#pragma unroll
            for (int k = 1; k < 8; k *= 2) {
                const float y = __shfl_up_sync(~0u, x, 4 * k);
                if (g >= k) x += y;
            }
            const float all = __shfl_sync(~0u, x, 28 + threadIdx.x % 4);
            const float before = __shfl_up_sync(~0u, x, 4);
            v[p / 2][p % 2 * 2 + e] = carry[e] + (g ? before : 0.0f);
            carry[e] += all;
        }
}

/* sum_j S_jd R_jd for the two channels of this thread's fragments */
static __device__ __forceinline__ float2 state_products(const joined *sm)
{
    const int lane = threadIdx.x % 32, chunk = threadIdx.x / 32;
    float sum[8] = { 0, 0, 0, 0, 0, 0, 0, 0 };
#pragma unroll
    for (int p = 0; p < 4; p++) {
        const uint32_t at = fg_swizzle<HALF>(lane + 32 * p, chunk);
        float x[8], y[8];
        fg_unpack(*(const uint4 *)((const char *)sm->S + at), x);
        fg_unpack(*(const uint4 *)((const char *)sm->R + at), y);
#pragma unroll
        for (int e = 0; e < 8; e++) sum[e] = fmaf(x[e], y[e], sum[e]);
    }
    float2 mine = make_float2(0, 0);
#pragma unroll
    for (int e = 0; e < 8; e++) {
        sum[e] = fg_warp_sum(sum[e]);
        if (lane % 4 == e / 2) (e % 2 ? mine.y : mine.x) = sum[e];
    }
    return mine;
}

/* sum += a's two halves times x and y */
static __device__ __forceinline__ void add_both(float *sum, uint32_t a, float x, float y)
{
    sum[0] = fmaf(la_low_half(a), x, sum[0]);
    sum[1] = fmaf(la_high_half(a), y, sum[1]);
}

/* The pairs of the chunk; gq, gk: fragments of 64 rows by this warp's channels, added to.
 * gg: q gq - k gk of the same, with q and k rounded as the products of the other side have them:
 * what a pair adds to one row it takes from the other, so that the sum over the chunk is 0 but for
 * f32's rounding.  With q and k as they are it would be the noise of 64 rows. */
static __device__ __forceinline__ void chunk_pairs(joined *sm, float gq[4][4], float gk[4][4],
                                                   float gg[4][4])
{
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4 * 2, d0 = threadIdx.x / 32 * 8;
    const int d = d0 + c;                        /* of sums; of operands it is d0 + g */
    const uint32_t gA = fg_shared(sm->gA);
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        const bool tame = is_tame(&sm->z, i, d0, d0 + 8);
        float sum[4] = { 0, 0, 0, 0 }, off = 0;
        uint32_t bq[2];
#pragma unroll
        for (int x = 0; x < 2; x++) {            /* Q relative to the block's first row */
            const int r = 16 * i + c + 8 * x;
            const bf16 *q0 = (const bf16 *)la_pair<HALF>(sm->q, r, d0) + g;
            const bf16 *q1 = (const bf16 *)la_pair<HALF>(sm->q, r + 1, d0) + g;
            const float *l = &sm->z.lambda[r * gates<HALF>::lane + d0 + g];
            bq[x] = fg_pack2(__bfloat162float(*q0) * fg_exp2(l[0]),
                             __bfloat162float(*q1) * fg_exp2(l[gates<HALF>::lane]));
        }
#pragma unroll
        for (int j = i; j >= 0; j--) {
            if (j < i) off += sm->z.total[j][d0 + g];
            if (i == j && !tame) {
                block_exactly(sm, i, d, gq[i], gk[i]);       /* the first that these get */
#pragma unroll
                for (int x = 0; x < 2; x++) {
                    const uint32_t q = *la_pair<HALF>(sm->q, 16 * i + g + 8 * x, d);
                    const uint32_t k = *la_pair<HALF>(sm->k, 16 * i + g + 8 * x, d);
                    add_both(&gg[i][2 * x], q, gq[i][2 * x], gq[i][2 * x + 1]);
                    add_both(&gg[i][2 * x], k, -gk[i][2 * x], -gk[i][2 * x + 1]);
                }
                continue;
            }
            uint32_t a[4], b[2];
#pragma unroll
            for (int x = 0; x < 2; x++) {
                const int r = 16 * j + c + 8 * x;
                const bf16 *k0 = (const bf16 *)la_pair<HALF>(sm->k, r, d0) + g;
                const bf16 *k1 = (const bf16 *)la_pair<HALF>(sm->k, r + 1, d0) + g;
                const float l0 = sm->z.lambda[r * gates<HALF>::lane + d0 + g];
                const float l1 = sm->z.lambda[(r + 1) * gates<HALF>::lane + d0 + g];
                b[x] = fg_pack2(__bfloat162float(*k0) * fg_exp2(off - l0),
                                __bfloat162float(*k1) * fg_exp2(off - l1));
            }
            la_a<LA_ROWS>(a, gA, 16 * i, 16 * j);
            fg_mma(sum, a, b[0], b[1]);
            float to[4] = { 0, 0, 0, 0 };
            la_a_turned<LA_ROWS>(a, gA, 16 * j, 16 * i);
            fg_mma(to, a, bq[0], bq[1]);
            const float2 gap = apart(&sm->z, i, j, d);
#pragma unroll
            for (int x = 0; x < 2; x++) {
                const float2 l = lambda_at(&sm->z, 16 * j + g + 8 * x, d);
                const float e0 = fg_exp2(gap.x - l.x), e1 = fg_exp2(gap.y - l.y);
                const uint32_t k = *la_pair<HALF>(sm->k, 16 * j + g + 8 * x, d);
                gk[j][2 * x] = fmaf(to[2 * x], e0, gk[j][2 * x]);
                gk[j][2 * x + 1] = fmaf(to[2 * x + 1], e1, gk[j][2 * x + 1]);
                add_both(&gg[j][2 * x], fg_pack2(la_low_half(k) * e0, la_high_half(k) * e1),
                         -to[2 * x], -to[2 * x + 1]);
            }
        }
#pragma unroll
        for (int x = 0; x < 2; x++) {
            const float2 l = lambda_at(&sm->z, 16 * i + g + 8 * x, d);
            const float e0 = fg_exp2(l.x), e1 = fg_exp2(l.y);
            const uint32_t q = *la_pair<HALF>(sm->q, 16 * i + g + 8 * x, d);
            gq[i][2 * x] = fmaf(sum[2 * x], e0, gq[i][2 * x]);
            gq[i][2 * x + 1] = fmaf(sum[2 * x + 1], e1, gq[i][2 * x + 1]);
            add_both(&gg[i][2 * x], fg_pack2(la_low_half(q) * e0, la_high_half(q) * e1),
                     sum[2 * x], sum[2 * x + 1]);
        }
    }
}

static __device__ __forceinline__ void load_half(bf16 *to, const bf16 *from)
{
    la_load<HALF, 256>(to, from, LA_WIDTH, LA_ROWS, threadIdx.x);
    la_load<HALF, 256>(to + LA_ROWS * HALF, from + LA_ROWS * LA_WIDTH, LA_WIDTH, LA_ROWS,
                       threadIdx.x);
}

/* The slope of silu at two neighbours */
static __device__ __forceinline__ float2 slopes(uint32_t x)
{
    float s, rest, t, other;
    split(la_low_half(x), s, rest);
    split(la_high_half(x), t, other);
    return make_float2(s * fmaf(la_low_half(x), rest, 1.0f),
                       t * fmaf(la_high_half(x), other, 1.0f));
}
/* The gradient by z from those by k = (1 - low) (1 - sigmoid(z)) and by ln f, and f in units of
 * log2; glow gets its share. */
static __device__ __forceinline__ float gate_gradient(float log2_f, float k, float low, float room,
                                                      float gk, float gg, float &glow)
{
    const float f = fg_exp2(log2_f), by_f = f > 1e-30f ? __fdividef(gg, f) : 0.0f;
    const float each = k * room * (by_f - gk);   /* room: 1 / (1 - low) */
    glow += each;
    return (f - low) * each;
}

template <bool RAW>
static __global__ void __launch_bounds__(256, 2)
join(const __grid_constant__ la_task z, const __grid_constant__ inputs x, const bf16 *go,
     const bf16 *S, const bf16 *R, const __grid_constant__ gradients to)
{
    extern __shared__ __align__(1024) char memory[];
    joined *sm = (joined *)memory;
    const int64_t chunk = blockIdx.x / 2, bh = blockIdx.y, b = bh / z.H, h = bh % z.H;
    const int64_t token = b * z.T + chunk * LA_ROWS, row = z.H * LA_WIDTH;
    const int64_t half = h * LA_WIDTH + blockIdx.x % 2 * HALF;
    const int64_t state = (bh * z.chunks + chunk) * LA_WIDTH * LA_WIDTH + blockIdx.x % 2 * HALF;
    const int64_t q_row = x.q_row;
    const bf16 *own_q = x.q + token * q_row + half, *own_k = x.k + token * x.k_row + half;
    const int n = la_rows(z, chunk), g = threadIdx.x % 32 / 4;
    const int d = threadIdx.x / 32 * 8 + threadIdx.x % 4 * 2;
    la_load<HALF, 256>(sm->k, own_k, x.k_row, n, threadIdx.x);
    la_load<HALF, 256>(sm->q, own_q, x.q_row, n, threadIdx.x);
    fg_copy_commit();
    la_load<LA_WIDTH, 256>(sm->go, go + token * row + h * LA_WIDTH, row, n, threadIdx.x);
    la_load<LA_WIDTH, 256>(sm->v, x.v + token * x.v_row + h * LA_WIDTH, x.v_row, n, threadIdx.x);
    fg_copy_commit();
    load_half(sm->S, S + state);
    load_half(sm->R, R + state);
    fg_copy_commit();
    la_starts(z, b, chunk, sm->start, sm->marks);
    if (RAW) {
        fg_copy_wait<2>();
        __syncthreads();
        activate<256, HALF>(sm->q);
        fill_gates<256, HALF, true>(&sm->z, sm->k, x.low ? x.low + half : nullptr, 0, n);
    } else {
        fill_gates<256, HALF, false>(&sm->z, sm->k, x.g + token * row + half, row, n);
    }
    fg_copy_wait<1>();
    __syncthreads();
    for (int p = threadIdx.x / 32; p < 10; p += 8) {
        const int i = p < 4 ? 3 : p < 7 ? 2 : p < 9 ? 1 : 0;
        pair_gradients(sm, i, p < 4 ? p : p < 7 ? p - 4 : p < 9 ? p - 7 : 0, z.scale);
    }
    fg_copy_wait<0>();
    __syncthreads();

    float X[4][4], Y[4][4], inner_q[4][4], inner_k[4][4], inner[4][4];
    la_zero<4>(inner_q);
    la_zero<4>(inner_k);
    la_zero<4>(inner);
    chunk_pairs(sm, inner_q, inner_k, inner);
    if (RAW) {                                   /* gA has been used: q as it came in its place */
        __syncthreads();
        la_load<HALF, 256>(sm->gA, own_q, q_row, n, threadIdx.x);
        fg_copy_commit();
    }
    through_state(X, fg_shared(sm->go), fg_shared(sm->S));
    if (RAW) {
        fg_copy_wait<0>();
        __syncthreads();
    }
    const int last = sm->start[n - 1];
#pragma unroll
    for (int p = 0; p < 8; p++) {
        const int i = p / 2, r = 8 * p + g, f = p % 2 * 2;
        const bool reached = sm->start[r] == -1;
        const float2 l = lambda_at(&sm->z, r, d), in = *(const float2 *)&sm->z.before[i][d];
        const uint32_t qs = *la_pair<HALF>(sm->q, r, d), ks = *la_pair<HALF>(sm->k, r, d);
        const float x = reached ? z.scale * fg_exp2(in.x + l.x) * X[i][f] : 0;
        const float y = reached ? z.scale * fg_exp2(in.y + l.y) * X[i][f + 1] : 0;
        const float u = x + inner_q[i][f], v = y + inner_q[i][f + 1], own = sm->own[r];
        X[i][f] = fmaf(la_low_half(qs), x, inner[i][f]);
        X[i][f + 1] = fmaf(la_high_half(qs), y, inner[i][f + 1]);
        inner_k[i][f] = fmaf(own, la_low_half(qs), inner_k[i][f]);
        inner_k[i][f + 1] = fmaf(own, la_high_half(qs), inner_k[i][f + 1]);
        if (r >= n) continue;
        float2 gq = make_float2(fmaf(own, la_low_half(ks), u), fmaf(own, la_high_half(ks), v));
        if (RAW) {
            const float2 slope = slopes(*la_pair<HALF>(sm->gA, r, d));
            gq.x *= slope.x;
            gq.y *= slope.y;
        }
        *(uint32_t *)(to.q + (token + r) * to.q_row + half + d) = fg_pack2(gq.x, gq.y);
    }
    through_state(Y, fg_shared(sm->v), fg_shared(sm->R));
#pragma unroll
    for (int p = 0; p < 8; p++) {
        const int i = p / 2, r = 8 * p + g, f = p % 2 * 2;
        const bool passes = la_passes(r, n, last);
        const float2 l = lambda_at(&sm->z, r, d), out = *(const float2 *)&sm->z.behind[i][d];
        const uint32_t ks = *la_pair<HALF>(sm->k, r, d);
        const float x = passes ? z.scale * fg_exp2(out.x - l.x) * Y[i][f] : 0;
        const float y = passes ? z.scale * fg_exp2(out.y - l.y) * Y[i][f + 1] : 0;
        Y[i][f] = la_low_half(ks) * x;
        Y[i][f + 1] = la_high_half(ks) * y;
        inner_k[i][f] += x;
        inner_k[i][f + 1] += y;
        if (!RAW && r < n)
            *(uint32_t *)(to.k + (token + r) * to.k_row + half + d) =
                fg_pack2(inner_k[i][f], inner_k[i][f + 1]);
    }
    sums_from_behind(X);
    sums_before(Y);
    const float2 both = state_products(sm), first = *(const float2 *)&sm->z.first[0][d];
    const float2 rest = *(const float2 *)&sm->z.behind[0][d];
    const float through = last == -1 ? z.scale * both.x * fg_exp2(first.x + rest.x) : 0;
    const float through1 = last == -1 ? z.scale * both.y * fg_exp2(first.y + rest.y) : 0;
    const float2 low = RAW && x.low ? *(const float2 *)(x.low + half + d) : make_float2(0, 0);
    const float2 room = make_float2(1 / (1 - low.x), 1 / (1 - low.y));
    float2 glow = make_float2(0, 0);
#pragma unroll
    for (int p = 0; p < 8; p++) {
        const int i = p / 2, r = 8 * p + g, f = p % 2 * 2;
        if (r >= n) continue;
        const bool padding = sm->start[r] == LA_NONE;
        const float u = padding ? 0 : X[i][f] + Y[i][f] + through;
        const float v = padding ? 0 : X[i][f + 1] + Y[i][f + 1] + through1;
        if (!RAW) {
            *(float2 *)(to.g + (token + r) * row + half + d) = make_float2(u, v);
            continue;
        }
        const uint32_t ks = *la_pair<HALF>(sm->k, r, d);
        float2 l = *(const float2 *)&sm->z.first[i][d];
        if (r % 16) {
            const float2 now = lambda_at(&sm->z, r, d), was = lambda_at(&sm->z, r - 1, d);
            l = make_float2(now.x - was.x, now.y - was.y);
        }
        *(uint32_t *)(to.k + (token + r) * to.k_row + half + d) = fg_pack2(
            gate_gradient(l.x, la_low_half(ks), low.x, room.x, inner_k[i][f], u, glow.x),
            gate_gradient(l.y, la_high_half(ks), low.y, room.y, inner_k[i][f + 1], v, glow.y));
    }
    if constexpr (RAW) {
#pragma unroll
        for (int k = 4; k < 32; k *= 2) {
            glow.x += __shfl_xor_sync(~0u, glow.x, k);
            glow.y += __shfl_xor_sync(~0u, glow.y, k);
        }
        if (to.low && g == 0)
            *(float2 *)(to.low + (b * z.chunks + chunk) * row + half + d) = glow;
    }
}

struct way_back { operands s; bf16 *S, *R; };

/* All but what prepare writes. */
static void cut_way_back(char *base, size_t *used, const la_task &z, way_back *w)
{
    const size_t states = (size_t)(z.B * z.H * z.chunks) * LA_WIDTH * LA_WIDTH * sizeof(bf16);
    cut_ends(base, used, z, true, &w->s);
    w->S = (bf16 *)la_cut(base, used, states);
    w->R = (bf16 *)la_cut(base, used, states);
}

/* Of what prepare has written.  last: gradient of the last state, or NULL; to_first: of the
 * first. */
template <bool RAW>
static void launch_backward(const la_task &z, const inputs &x, const bf16 *go, const float *last,
                            const way_back &w, const gradients &to, float *to_first,
                            cudaStream_t stream)
{
    const int64_t row = z.H * LA_WIDTH;
    const int bytes = (int)sizeof(joined);
    la_chain forth = chain_of(z, w.s, x.v, x.v_row, false);
    la_chain back = chain_of(z, w.s, go, row, true);
    forth.kept = w.S;
    back.kept = w.R;
    back.o = { to.v, z.T * to.v_row, LA_WIDTH, to.v_row };
    back.from = last, back.to = to_first;
    la_run_both_ways<false>(forth, back, stream);
    cudaFuncSetAttribute(join<RAW>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    join<RAW><<<dim3(2 * (unsigned)z.chunks, (unsigned)(z.B * z.H)), 256, bytes, stream>>>(
        z, x, go, w.S, w.R, to);
}
#endif
