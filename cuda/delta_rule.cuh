/* delta_rule.cuh - the delta rule in chunks on tensor cores, for delta_rule.cu and
 * unit_delta_rule.cu; delta_rule_grad.cuh has its gradient.
 *
 *     e_t = v_t - S_(t-1)^T k_t,   S_t = S_(t-1) + beta_t k_t e_t^T,   o_t = scale S_t^T q_t
 *
 * bf16, K = V = 128, 64 rows or more: chunks of 64 rows (linear_attention.cuh).  With N the part of
 * K K^T below the diagonal, e of a chunk solves (I + N diag(beta)) e = V - K S, so
 *     M = (I + N diag(beta))^-1,  W = M K,  U = M V,  A = Q K^T on and below the diagonal
 * M, in blocks of 16 x 16: substitution in f32 on the diagonal, then column by column of blocks
 * X_ij = -X_ii sum_(j<=k<i) L_ik X_kj, factors split in two bf16 each.  (A series for the inverse
 * fails for identical keys.)  In the gradient, gu from the chain:
 *     ge = (diag(beta) M)^T gu,   y = gu - N^T ge = ge / beta,   gbeta_t = y_t.e_t,   gv = ge
 *     P_ts = go_t.u_s (s <= t),   X_ts = ge_t.u_s (s < t),   u = diag(beta) e
 *     gq = scale (go S^T + P K),  gk = u R^T - ge S^T + scale P^T Q - X K - X^T K
 * UNIT: q and k are scaled to unit length first.
 *
 * Bytes of 1 x 16384 rows, 12 heads, a unit is 50 MB: forward 11, UNIT 14 (least 4), gradient 30,
 * UNIT, which finds all prepared, 23 (least 8). */
#ifndef FG_DELTA_RULE_CUH
#define FG_DELTA_RULE_CUH
#include "linear_attention_chain.cuh"

#define DIAGONAL 18                              /* floats from row to row of prepared.D */

struct operands {                                /* of all chunks, what prepare writes */
    bf16 *w, *u;                                 /* [B,H,chunks*64,128] */
    bf16 *A;                                     /* [B,H,chunks,64,64] */
    bf16 *M;                                     /* the same: diag(beta) M, or NULL */
    bf16 *q, *k;                                 /* [B,H,chunks*64,128] of UNIT, scaled; or NULL */
    float *beta;                                 /* [B,H,chunks*64] */
    float *q_scale, *k_scale;                    /* [B,H,chunks*64] of UNIT, or NULL */
    float *keep;                                 /* [B,chunks]: 1, or 0 where a document starts */
    uint8_t *flags;                              /* [B,chunks*64] */
    float *ends, *through;                       /* as la_chain has them, forward */
};

static operands cut_operands(char *base, size_t *used, const la_task &z, bool back, bool unit)
{
    const size_t rows = (size_t)(z.B * z.H * z.chunks) * LA_ROWS;
    const size_t panel = rows * LA_WIDTH * sizeof(bf16);
    operands s = {};
    s.w = (bf16 *)la_cut(base, used, panel);
    s.u = (bf16 *)la_cut(base, used, panel);
    if (unit) s.q = (bf16 *)la_cut(base, used, panel);
    if (unit) s.k = (bf16 *)la_cut(base, used, panel);
    s.A = (bf16 *)la_cut(base, used, panel / 2);
    if (back) s.M = (bf16 *)la_cut(base, used, panel / 2);
    s.beta = (float *)la_cut(base, used, rows * sizeof(float));
    if (unit) s.q_scale = (float *)la_cut(base, used, rows * sizeof(float));
    if (unit) s.k_scale = (float *)la_cut(base, used, rows * sizeof(float));
    s.keep = (float *)la_cut(base, used, (size_t)(z.B * z.chunks) * sizeof(float));
    s.flags = (uint8_t *)la_cut(base, used, (size_t)(z.B * z.chunks) * LA_ROWS);
    return s;
}
static void cut_ends(char *base, size_t *used, const la_task &z, operands *s)
{
    la_cut_ends(base, used, z, false, true, &s->ends, &s->through);
}

struct inputs {                                  /* row t of head h: t row + 128 h behind q */
    const bf16 *q, *k, *v;
    int64_t q_row, k_row, v_row;
    fg_in beta;                                  /* [B,T,H] */
    float eps;                                   /* of UNIT */
};

struct alignas(1024) prepared {                  /* small enough for three blocks at a time */
    bf16 k[LA_ROWS * LA_WIDTH], v[LA_ROWS * LA_WIDTH];       /* in the end W, U */
    union {
        bf16 q[LA_ROWS * LA_WIDTH];              /* until A is there */
        struct { bf16 M[LA_ROWS * LA_ROWS], beta_M[LA_ROWS * LA_ROWS]; };
    };
    bf16 high[LA_ROWS * LA_ROWS], low[LA_ROWS * LA_ROWS];    /* N diag(beta) below the diagonal's */
    float D[LA_ROWS * DIAGONAL];                 /* blocks, these, and, in high, low: inverses */
    float beta[LA_ROWS];
    int start[LA_ROWS];
    uint32_t marks[2];
};

/* ---- products of matrices in panels (wgmma.cuh), 64 x 64 of them by a warpgroup -------------- */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
/* What a thread has of a warpgroup's 64 x 64: rows `row` and row + 8, two columns of every 8. */
static __device__ __forceinline__ int own_row()
{
    return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
}
static __device__ __forceinline__ int own_column() { return threadIdx.x % 4 * 2; }

/* d = x y^T over 128 columns of both */
static __device__ __forceinline__ void by_columns(float (&d)[8][4], const bf16 *x, const bf16 *y)
{
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const int at = k / 4 * LA_PANEL + k % 4 * 32;
        product(d, matrix_at(fg_shared(x) + at, 16), matrix_at(fg_shared(y) + at, 16), k);
    }
}
/* d += a x, or a^T x, over 64 rows of 64 columns of x */
template <bool TURNED>
static __device__ __forceinline__ void by_rows(float (&d)[8][4], const bf16 *a, const bf16 *x,
                                               bool add)
{
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const uint32_t at = fg_shared(a) + k * (TURNED ? 2048 : 32);
        product_rows<TURNED>(d, matrix_at(at, TURNED ? LA_PANEL : 16),
                             matrix_at(fg_shared(x) + k * 2048, LA_PANEL), add || k);
    }
}

/* ---- preparing a chunk ----------------------------------------------------------------------- */

/* Rows of x to unit length, in place and to memory, and by: what they were scaled by. */
static __device__ __forceinline__ void scale_rows(bf16 *x, float *by, bf16 *to, int n, float eps)
{
    const int c = threadIdx.x % 8;
#pragma unroll
    for (int p = 0; p < 2; p++) {
        const int r = threadIdx.x / 8 + 32 * p;
        float v[2][8], sum = 0;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            fg_unpack(*(const uint4 *)((const char *)x + la_panel(r, c + 8 * i)), v[i]);
#pragma unroll
            for (int e = 0; e < 8; e++) sum = fmaf(v[i][e], v[i][e], sum);
        }
        sum = fg_warp_sum<8>(sum);
        const float scale = r < n ? rsqrtf(sum + eps) : 0;
        if (c == 0) by[r] = scale;
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int e = 0; e < 8; e++) v[i][e] *= scale;
            const uint4 y = make_uint4(fg_pack2(v[i][0], v[i][1]), fg_pack2(v[i][2], v[i][3]),
                                       fg_pack2(v[i][4], v[i][5]), fg_pack2(v[i][6], v[i][7]));
            *(uint4 *)((char *)x + la_panel(r, c + 8 * i)) = y;
            *(uint4 *)(to + r * LA_WIDTH + 8 * (c + 8 * i)) = y;
        }
    }
}

/* 0 where s > t - gap or not both are of one document */
static __device__ __forceinline__ void mask_pairs(float (&d)[8][4], const int *start, int gap)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int t = own_row() + 8 * i, from = start[t];
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int s = 8 * j + own_column() + c;
                if (s > t - gap || s < from) d[j][2 * i + c] = 0;
            }
    }
}

/* a = high + low, in two bf16 each */
static __device__ __forceinline__ void split_up(uint32_t (&high)[4], uint32_t (&low)[4],
                                                const float (&x)[2][4])
{
    la_operand(high, x[0], x[1]);
#pragma unroll
    for (int i = 0; i < 4; i++) low[i] = la_rest(&x[i / 2][i % 2 * 2], high[i]);
}
/* acc += a b of such, all but what is smaller than either's rounding; b a block of high and low
 * that stands turned */
static __device__ __forceinline__ void split_product(float (&acc)[2][4], const uint32_t (&high)[4],
                                                     const uint32_t (&low)[4], const prepared *sm,
                                                     int k, int n)
{
    uint32_t b[4], rest[4];
    la_b<LA_ROWS>(b, fg_shared(sm->high), k, n);
    la_b<LA_ROWS>(rest, fg_shared(sm->low), k, n);
    la_mma2(acc, high, b);
    la_mma2(acc, low, b);
    la_mma2(acc, high, rest);
}

/* N diag(beta), of what is left of K K^T: below the diagonal's blocks in two bf16, these in f32. */
static __device__ __forceinline__ void keep_L(prepared *sm, float (&d)[8][4])
{
    const int w = threadIdx.x / 32, c = own_column();
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) d[j][i] *= sm->beta[8 * j + c + i % 2];
#pragma unroll
    for (int b = 0; b < 4; b++) {
        if (b < w) {
            const float x[2][4] = { { d[2 * b][0], d[2 * b][1], d[2 * b][2], d[2 * b][3] },
                                    { d[2 * b + 1][0], d[2 * b + 1][1], d[2 * b + 1][2],
                                      d[2 * b + 1][3] } };
            uint32_t high[4], low[4];
            split_up(high, low, x);
            la_share<LA_ROWS>(high, sm->high, 16 * w, 16 * b);
            la_share<LA_ROWS>(low, sm->low, 16 * w, 16 * b);
        } else if (b == w) {
#pragma unroll
            for (int i = 0; i < 8; i += 2)
                *(float2 *)&sm->D[(own_row() + i / 2 % 2 * 8) * DIAGONAL + i / 4 * 8 + c] =
                    make_float2(d[2 * b + i / 4][i % 4], d[2 * b + i / 4][i % 4 + 1]);
        }
    }
}

/* (I + L)^-1 of a warp's block on the diagonal, a lane a column. */
static __device__ __forceinline__ void invert_block(prepared *sm)
{
    const int at = threadIdx.x / 32 * 16, c = threadIdx.x % 16;
    float x[16];
#pragma unroll
    for (int r = 0; r < 16; r++) x[r] = r == c ? 1.0f : 0.0f;
#pragma unroll
    for (int s = 0; s < 15; s++)                 /* when x[s] is known it goes to all below */
#pragma unroll
        for (int r = s + 1; r < 16; r++)
            x[r] = fmaf(-sm->D[(at + r) * DIAGONAL + s], x[s], x[r]);
    if (threadIdx.x % 32 >= 16) return;
#pragma unroll
    for (int r = 0; r < 16; r++) {
        const uint32_t to = fg_swizzle<LA_ROWS>(at + r, (at + c) / 8) + c % 8 * 2;
        const bf16 high = __float2bfloat16_rn(x[r]);
        *(bf16 *)((char *)sm->high + to) = high;
        *(bf16 *)((char *)sm->low + to) = __float2bfloat16_rn(x[r] - __bfloat162float(high));
    }
}

/* A turned 16 x 16 block of M, rows t of it, to shared memory, and times beta. */
static __device__ __forceinline__ void keep_M(prepared *sm, const float (&x)[2][4], int t, int s)
{
    const int c = t + own_column();
    const float b[4] = { sm->beta[c], sm->beta[c + 1], sm->beta[c + 8], sm->beta[c + 9] };
    const float y[2][4] = { { b[0] * x[0][0], b[1] * x[0][1], b[0] * x[0][2], b[1] * x[0][3] },
                            { b[2] * x[1][0], b[3] * x[1][1], b[2] * x[1][2], b[3] * x[1][3] } };
    uint32_t a[4];
    la_operand(a, x[0], x[1]);
    la_share_turned<LA_ROWS>(a, sm->M, s, t);
    la_operand(a, y[0], y[1]);
    la_share_turned<LA_ROWS>(a, sm->beta_M, s, t);
}

/* A warp's column j of blocks of M = X:  X_ij = -X_ii (L_ij X_jj + ... + L_i(i-1) X_(i-1)j),
 * turned: what has been found stands in registers as the operand of what follows. */
static __device__ __forceinline__ void invert_column(prepared *sm)
{
    const int j = threadIdx.x / 32;
    uint32_t high[3][4], low[3][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float x[2][4] = {};
        if (i == j) {
            uint32_t a[4], rest[4];
            la_a_turned<LA_ROWS>(a, fg_shared(sm->high), 16 * i, 16 * i);
            la_a_turned<LA_ROWS>(rest, fg_shared(sm->low), 16 * i, 16 * i);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                x[e / 2][e % 2 * 2] = la_low_half(a[e]) + la_low_half(rest[e]);
                x[e / 2][e % 2 * 2 + 1] = la_high_half(a[e]) + la_high_half(rest[e]);
            }
        } else if (i > j) {
            float sum[2][4] = {};
            uint32_t a[4], rest[4];
#pragma unroll
            for (int k = 0; k < i; k++)
                if (k >= j) split_product(sum, high[k], low[k], sm, 16 * k, 16 * i);
            split_up(a, rest, sum);
            split_product(x, a, rest, sm, 16 * i, 16 * i);
#pragma unroll
            for (int e = 0; e < 8; e++) x[e / 4][e % 4] = -x[e / 4][e % 4];
        }
        if (i < 3) split_up(high[i], low[i], x);
        keep_M(sm, x, 16 * i, 16 * j);
    }
}

/* M x in the place of x, by a warpgroup; rows not reached are 0 if asked. */
static __device__ __forceinline__ void solve(const prepared *sm, bf16 *x, bool reached)
{
    const int group = threadIdx.x / 128;
#pragma unroll 1
    for (int half = 0; half < 2; half++, x += LA_PANEL / 2) {
        float d[8][4];
        wgmma_begin();
        by_rows<false>(d, sm->M, x, false);
        wgmma_commit();
        wgmma_wait<0>();
        pin(d);
        asm volatile("bar.sync %0, 128;" :: "r"(1 + group) : "memory");
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (reached && sm->start[own_row() + 8 * i] != -1)
#pragma unroll
                for (int j = 0; j < 8; j++) d[j][2 * i] = d[j][2 * i + 1] = 0;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            uint32_t a[4];
            la_operand(a, d[2 * k], d[2 * k + 1]);
            la_share<64>(a, x, threadIdx.x % 128 / 32 * 16, 16 * k);
        }
    }
}
/* Such a tile, rows of WIDTH, to memory; by THREADS threads. */
template <int WIDTH, int THREADS>
static __device__ __forceinline__ void put_tile(const bf16 *x, bf16 *to)
{
#pragma unroll
    for (int k = 0; k < LA_ROWS * WIDTH / 8 / THREADS; k++) {
        const int i = threadIdx.x % THREADS + k * THREADS;
        const int r = i / (WIDTH / 8), c = i % (WIDTH / 8);
        *(uint4 *)(to + i * 8) = *(const uint4 *)((const char *)x + la_panel(r, c));
    }
}

/* A = Q K^T to memory, by a warpgroup. */
static __device__ __forceinline__ void put_A(const float (&d)[8][4], bf16 *A)
{
    A += own_row() * LA_ROWS + own_column();
#pragma unroll
    for (int j = 0; j < 8; j++) {
        *(uint32_t *)(A + 8 * j) = fg_pack2(d[j][0], d[j][1]);
        *(uint32_t *)(A + 8 * LA_ROWS + 8 * j) = fg_pack2(d[j][2], d[j][3]);
    }
}

template <bool UNIT>
static __device__ __forceinline__ void prepare_chunk(prepared *sm, const la_task &z,
                                                     const inputs &x, const operands &s)
{
    const int64_t chunk = blockIdx.x, bh = blockIdx.y, b = bh / z.H, h = bh % z.H;
    const int64_t token = b * z.T + chunk * LA_ROWS, tile = bh * z.chunks + chunk;
    const int64_t mine = (b * z.chunks + chunk) * LA_ROWS, own = tile * LA_ROWS * LA_WIDTH;
    const int n = la_rows(z, chunk), r = threadIdx.x, at = (int)h * LA_WIDTH;
    const bool first = r < 128;
    la_load<LA_WIDTH, 256, true>(sm->k, x.k + token * x.k_row + at, x.k_row, n, r);
    la_load<LA_WIDTH, 256, true>(sm->q, x.q + token * x.q_row + at, x.q_row, n, r);
    la_load<LA_WIDTH, 256, true>(sm->v, x.v + token * x.v_row + at, x.v_row, n, r);
    fg_copy_commit();
    if (r < LA_ROWS) {
        sm->beta[r] = r < n ? x.beta[(token + r) * z.H + h] : 0;
        s.beta[tile * LA_ROWS + r] = sm->beta[r];
    }
    la_starts(z, b, chunk, sm->start, sm->marks);
    if (r < LA_ROWS && h == 0) {
        const int last = sm->start[n - 1];
        s.flags[mine + r] = (uint8_t)((sm->start[r] == -1 ? LA_REACHED : 0)
                                      | (la_passes(r, n, last) ? LA_PASSES : 0));
        if (r == 0) s.keep[b * z.chunks + chunk] = last == -1 ? 1 : 0;
    }
    fg_copy_wait<0>();
    if (UNIT) {
        __syncthreads();
        scale_rows(sm->k, s.k_scale + tile * LA_ROWS, s.k + own, n, x.eps);
        scale_rows(sm->q, s.q_scale + tile * LA_ROWS, s.q + own, n, x.eps);
    }
    proxy_fence();
    __syncthreads();
    float d[8][4];
    wgmma_begin();
    by_columns(d, first ? sm->k : sm->q, sm->k);
    wgmma_commit();
    wgmma_wait<0>();
    pin(d);
    __syncthreads();                             /* q has been used */
    mask_pairs(d, sm->start, first ? 1 : 0);
    if (first) {
        keep_L(sm, d);
        __syncwarp();
        invert_block(sm);
        asm volatile("bar.sync 1, 128;" ::: "memory");
        invert_column(sm);
    } else {
        put_A(d, s.A + tile * LA_ROWS * LA_ROWS);
    }
    proxy_fence();
    __syncthreads();
    solve(sm, first ? sm->k : sm->v, first);
    if (s.M) put_tile<LA_ROWS, 256>(sm->beta_M, s.M + tile * LA_ROWS * LA_ROWS);
    asm volatile("bar.sync %0, 128;" :: "r"(first ? 1 : 2) : "memory");
    put_tile<LA_WIDTH, 128>(first ? sm->k : sm->v, (first ? s.w : s.u) + own);
}
#endif

template <bool UNIT>
static __global__ void __launch_bounds__(256, 3)
prepare(const __grid_constant__ la_task z, const __grid_constant__ inputs x,
        const __grid_constant__ operands s)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) char memory[];
    prepare_chunk<UNIT>((prepared *)memory, z, x, s);
#endif
}

template <bool UNIT>
static void launch_prepare(const la_task &z, const inputs &x, const operands &s,
                           cudaStream_t stream)
{
    const int bytes = (int)sizeof(prepared);
    cudaFuncSetAttribute(prepare<UNIT>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    prepare<UNIT><<<dim3((unsigned)z.chunks, (unsigned)(z.B * z.H)), 256, bytes, stream>>>(z, x, s);
}

/* ---- forward --------------------------------------------------------------------------------- */

static la_chain chain_of(const la_task &z, const operands &s, const inputs &x)
{
    const int64_t own = z.chunks * LA_ROWS * LA_WIDTH;
    la_chain c = {};
    c.z = z;
    c.q = { x.q, z.T * x.q_row, LA_WIDTH, x.q_row };
    c.k = { x.k, z.T * x.k_row, LA_WIDTH, x.k_row };
    la_cut_up(&c, z, s.ends, s.through);
    if (s.q) c.q = { s.q, z.H * own, own, LA_WIDTH };
    if (s.k) c.k = { s.k, z.H * own, own, LA_WIDTH };
    c.w = { s.w, z.H * own, own, LA_WIDTH };
    c.u = { s.u, z.H * own, own, LA_WIDTH };
    c.A = s.A, c.beta = s.beta;
    if (z.first) c.flags = s.flags, c.decay = s.keep;
    return c;
}

/* o [B,T,H,128] and the last state */
template <bool UNIT>
static void launch_forward(const la_task &z, const inputs &x, const operands &s, bf16 *o,
                           float *last, cudaStream_t stream)
{
    const int64_t row = z.H * LA_WIDTH;
    launch_prepare<UNIT>(z, x, s, stream);
    la_chain c = chain_of(z, s, x);
    c.o = { o, z.T * row, LA_WIDTH, row };
    c.to = last;
    la_run_forward<true>(c, stream);
}
#endif
