/* delta_rule.cuh - the delta rule in chunks on tensor cores, for delta_rule.cu and
 * unit_delta_rule.cu; delta_rule_grad.cuh has its gradient.
 *
 *     e_t = v_t - S_(t-1)^T k_t,   S_t = S_(t-1) + beta_t k_t e_t^T,   o_t = scale S_t^T q_t
 *
 * bf16, K = V = 128, 64 rows or more: chunks of 64 rows (linear_attention.cuh).  With N the part of
 * K K^T below the diagonal, e of a chunk solves (I + N diag(beta)) e = V - K S, so
 *     M = (I + N diag(beta))^-1,  W = M K,  U = M V,  A = Q K^T on and below the diagonal
 * M in f32: substitution in blocks of 16 x 16, then [X11 0; -X22 L21 X11  X22] twice.  (A series
 * for the inverse fails for identical keys.)  In the gradient, gu from the chain:
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

#define LANE 68                                  /* floats from row to row of L and M */

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

/* ---- preparing a chunk ----------------------------------------------------------------------- */

struct prepared {                                /* small enough for three blocks at a time */
    bf16 k[LA_ROWS * LA_WIDTH], v[LA_ROWS * LA_WIDTH];
    union alignas(1024) {
        bf16 q[LA_ROWS * LA_WIDTH];              /* until A is there */
        float X[LA_ROWS * LANE];                 /* M; above the diagonal: products on the way */
    };
    union alignas(1024) {
        float L[LA_ROWS * LANE];                 /* N diag(beta) */
        bf16 M[LA_ROWS * LA_ROWS];               /* when L has been used */
    };
    float beta[LA_ROWS];
    int start[LA_ROWS];
    uint32_t marks[2];
};

/* Rows of x to unit length, in place, and by: what they were scaled by; four threads a row. */
static __device__ __forceinline__ void scale_rows(bf16 *x, float *by, int n, float eps)
{
    const int r = threadIdx.x / 4, c = threadIdx.x % 4;
    float v[4][8], sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        fg_unpack(*(const uint4 *)((const char *)x + fg_swizzle<LA_WIDTH>(r, c + 4 * i)), v[i]);
#pragma unroll
        for (int e = 0; e < 8; e++) sum = fmaf(v[i][e], v[i][e], sum);
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const float scale = r < n ? rsqrtf(sum + eps) : 0;
    if (c == 0) by[r] = scale;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int e = 0; e < 8; e++) v[i][e] *= scale;
        *(uint4 *)((char *)x + fg_swizzle<LA_WIDTH>(r, c + 4 * i)) =
            make_uint4(fg_pack2(v[i][0], v[i][1]), fg_pack2(v[i][2], v[i][3]),
                       fg_pack2(v[i][4], v[i][5]), fg_pack2(v[i][6], v[i][7]));
    }
}

/* A 16 x 16 block of x y^T. */
static __device__ __forceinline__ void products(float acc[2][4], const bf16 *x, int m,
                                                const bf16 *y, int n)
{
    la_zero<2>(acc);
#pragma unroll
    for (int k = 0; k < LA_WIDTH; k += 16) {
        uint32_t a[4], b[4];
        la_a<LA_WIDTH>(a, fg_shared(x), m, k);
        la_b<LA_WIDTH>(b, fg_shared(y), k, n);
        la_mma2(acc, a, b);
    }
}

/* L and A, ten blocks of 16 x 16 each, by eight warps. */
static __device__ __forceinline__ void pairs(prepared *sm, bf16 *A)
{
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
    for (int p = threadIdx.x / 32; p < 20; p += 8) {
        const int block = p % 10, i = block < 4 ? 3 : block < 7 ? 2 : block < 9 ? 1 : 0;
        const int j = block < 4 ? block : block < 7 ? block - 4 : block < 9 ? block - 7 : 0;
        float acc[2][4];
        products(acc, p < 10 ? sm->k : sm->q, 16 * i, sm->k, 16 * j);
#pragma unroll
        for (int y = 0; y < 2; y++)
#pragma unroll
            for (int x = 0; x < 2; x++) {
                const int t = 16 * i + g + 8 * x, s = 16 * j + 8 * y + c, from = sm->start[t];
                const float u = acc[y][2 * x], v = acc[y][2 * x + 1];
                if (p < 10) {
                    sm->L[t * LANE + s] = s < t && s >= from ? u * sm->beta[s] : 0;
                    sm->L[t * LANE + s + 1] = s + 1 < t && s + 1 >= from ? v * sm->beta[s + 1] : 0;
                } else {
                    *(uint32_t *)(A + t * LA_ROWS + s) =
                        fg_pack2(s <= t && s >= from ? u : 0.0f,
                                 s + 1 <= t && s + 1 >= from ? v : 0.0f);
                }
            }
    }
}

/* X = (I + L)^-1 of every block on the diagonal: a warp a block, a lane a column. */
static __device__ __forceinline__ void invert_blocks(prepared *sm)
{
    const int at = threadIdx.x / 32 * 16, c = threadIdx.x % 32;
    if (threadIdx.x >= 128 || c >= 16) return;
    float x[16];
#pragma unroll
    for (int r = 0; r < 16; r++) {
        float sum = r == c ? 1.0f : 0.0f;
#pragma unroll
        for (int s = 0; s < 16; s++)
            if (s < r) sum = fmaf(-sm->L[(at + r) * LANE + at + s], x[s], sum);
        x[r] = sum;
        sm->X[(at + r) * LANE + at + c] = sum;
    }
}

/* Four neighbours of a product of N x N blocks: sign sum_(k0<=k<k1) a_rk b_k(c..c+3) */
static __device__ __forceinline__ float4 four(const float *a, const float *b, int k0, int k1,
                                              float sign)
{
    float4 sum = make_float4(0, 0, 0, 0);
    for (int k = k0; k < k1; k++) {
        const float x = sign * a[k];
        const float4 y = *(const float4 *)&b[k * LANE];
        sum.x = fmaf(x, y.x, sum.x);
        sum.y = fmaf(x, y.y, sum.y);
        sum.z = fmaf(x, y.z, sum.z);
        sum.w = fmaf(x, y.w, sum.w);
    }
    return sum;
}

/* Joins inverses of N x N blocks to such of 2N x 2N: X21 = -X22 (L21 X11).  The product in the
 * middle stands where X12 would. */
template <int N> static __device__ __forceinline__ void join_blocks(prepared *sm)
{
    const int pairs = LA_ROWS / (2 * N), each = N * N / 4, i = threadIdx.x / each;
    const int r = threadIdx.x % each / (N / 4), c = threadIdx.x % (N / 4) * 4;
    const int one = 2 * N * i, two = one + N;
    if (i < pairs)
        *(float4 *)&sm->X[(one + r) * LANE + two + c] =
            four(&sm->L[(two + r) * LANE + one], &sm->X[one * LANE + one + c], c / 16 * 16, N, 1);
    __syncthreads();
    if (i < pairs)
        *(float4 *)&sm->X[(two + r) * LANE + one + c] =
            four(&sm->X[(two + r) * LANE + two], &sm->X[one * LANE + two + c], 0, r / 16 * 16 + 16,
                 -1);
    __syncthreads();
}

/* M to bf16, for the products here and, times beta, for the gradient; above the diagonal 0. */
static __device__ __forceinline__ void round_inverse(prepared *sm, bf16 *M)
{
    for (int p = threadIdx.x; p < LA_ROWS * LA_ROWS / 2; p += 256) {
        const int t = p / 32, s = p % 32 * 2;
        const float u = s <= t ? sm->X[t * LANE + s] : 0;
        const float v = s + 1 <= t ? sm->X[t * LANE + s + 1] : 0;
        const float beta = sm->beta[t];
        *la_pair<LA_ROWS>(sm->M, t, s) = fg_pack2(u, v);
        if (M) *(uint32_t *)(M + t * LA_ROWS + s) = fg_pack2(beta * u, beta * v);
    }
}

/* M x for 16 rows and 64 columns of one warp, to memory; rows not reached are 0 if asked. */
static __device__ __forceinline__ void solve(const prepared *sm, const bf16 *x, bf16 *to,
                                             bool reached)
{
    const int warp = threadIdx.x / 32, m = warp % 4 * 16, n0 = warp / 4 * 64;
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
    float acc[8][4];
    la_zero<8>(acc);
    for (int k = 0; k <= m; k += 16) {
        uint32_t a[4], b[4];
        la_a<LA_ROWS>(a, fg_shared(sm->M), m, k);
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            la_b_turned<LA_WIDTH>(b, fg_shared(x), k, n0 + 8 * j);
            la_mma2(acc + j, a, b);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = m + g + 8 * i;
        const bool real = !reached || sm->start[r] == -1;
#pragma unroll
        for (int j = 0; j < 8; j++)
            *(uint32_t *)(to + r * LA_WIDTH + n0 + 8 * j + c) =
                real ? fg_pack2(acc[j][2 * i], acc[j][2 * i + 1]) : 0;
    }
}

/* A tile in shared memory to rows of 128 in memory. */
static __device__ __forceinline__ void put_tile(const bf16 *x, bf16 *to)
{
    for (int i = threadIdx.x; i < LA_ROWS * LA_WIDTH / 8; i += 256)
        *(uint4 *)(to + i * 8) =
            *(const uint4 *)((const char *)x + fg_swizzle<LA_WIDTH>(i / 16, i % 16));
}

template <bool UNIT>
static __global__ void __launch_bounds__(256, 3)
prepare(const __grid_constant__ la_task z, const __grid_constant__ inputs x,
        const __grid_constant__ operands s)
{
    extern __shared__ __align__(1024) char memory[];
    prepared *sm = (prepared *)memory;
    const int64_t chunk = blockIdx.x, bh = blockIdx.y, b = bh / z.H, h = bh % z.H;
    const int64_t token = b * z.T + chunk * LA_ROWS, tile = bh * z.chunks + chunk;
    const int64_t mine = (b * z.chunks + chunk) * LA_ROWS;
    const int n = la_rows(z, chunk), r = threadIdx.x;
    la_load<LA_WIDTH, 256>(sm->k, x.k + token * x.k_row + h * LA_WIDTH, x.k_row, n, threadIdx.x);
    la_load<LA_WIDTH, 256>(sm->q, x.q + token * x.q_row + h * LA_WIDTH, x.q_row, n, threadIdx.x);
    fg_copy_commit();
    la_load<LA_WIDTH, 256>(sm->v, x.v + token * x.v_row + h * LA_WIDTH, x.v_row, n, threadIdx.x);
    fg_copy_commit();
    if (r < LA_ROWS) sm->beta[r] = r < n ? x.beta[(token + r) * z.H + h] : 0;
    la_starts(z, b, chunk, sm->start, sm->marks);
    if (r < LA_ROWS && h == 0) {
        const int last = sm->start[n - 1];
        s.flags[mine + r] = (uint8_t)((sm->start[r] == -1 ? LA_REACHED : 0)
                                      | (la_passes(r, n, last) ? LA_PASSES : 0));
        if (r == 0) s.keep[b * z.chunks + chunk] = last == -1 ? 1 : 0;
    }
    fg_copy_wait<1>();
    __syncthreads();
    if (r < LA_ROWS) s.beta[tile * LA_ROWS + r] = sm->beta[r];
    if (UNIT) {
        scale_rows(sm->k, s.k_scale + tile * LA_ROWS, n, x.eps);
        scale_rows(sm->q, s.q_scale + tile * LA_ROWS, n, x.eps);
        __syncthreads();
        put_tile(sm->k, s.k + tile * LA_ROWS * LA_WIDTH);
        put_tile(sm->q, s.q + tile * LA_ROWS * LA_WIDTH);
    }
    pairs(sm, s.A + tile * LA_ROWS * LA_ROWS);
    fg_copy_wait<0>();
    __syncthreads();
    invert_blocks(sm);
    __syncthreads();
    join_blocks<16>(sm);
    join_blocks<32>(sm);
    round_inverse(sm, s.M ? s.M + tile * LA_ROWS * LA_ROWS : nullptr);
    __syncthreads();
    solve(sm, sm->k, s.w + tile * LA_ROWS * LA_WIDTH, true);
    solve(sm, sm->v, s.u + tile * LA_ROWS * LA_WIDTH, false);
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
