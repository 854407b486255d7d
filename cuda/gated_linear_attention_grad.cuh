/* gated_linear_attention_grad.cuh - the gradient of gated linear attention in chunks, of what
 * prepare of gated_linear_attention.cuh has written: the chain both ways, then `join`, which needs
 * no chunk but its own. */
#ifndef FG_GATED_LINEAR_ATTENTION_GRAD_CUH
#define FG_GATED_LINEAR_ATTENTION_GRAD_CUH
#include "gated_linear_attention.cuh"

#define HALF 64                                  /* channels of a block of join */

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
