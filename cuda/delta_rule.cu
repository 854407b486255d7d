/* delta_rule.cu - ops/delta_rule.c on a GPU.
 *
 *     e_t = v_t - S_(t-1)^T k_t,   S_t = S_(t-1) + beta_t k_t e_t^T,   o_t = scale S_t^T q_t
 *
 * bf16, K = V = 128, 64 rows or more: chunks of 64 rows (linear_attention.cuh).  With N the part of
 * K K^T below the diagonal, e of a chunk solves (I + N diag(beta)) e = V - K S, so
 *     M = (I + N diag(beta))^-1,  W = M K,  U = M V,  A = Q K^T on and below the diagonal
 * M in f32: substitution in blocks of 16 x 16, then [X11 0; -X22 L21 X11  X22] twice.  (A series
 * for the inverse fails for identical keys.)  In the gradient, gu from the chain:
 *     ge = (diag(beta) M)^T gu,   y = gu - N^T ge,   gbeta_t = y_t.e_t,   gv = ge
 *     P_ts = go_t.u_s (s <= t),   X_ts = ge_t.u_s (s < t),   u = diag(beta) e
 *     gq = scale (go S^T + P K),  gk = u R^T - ge S^T + scale P^T Q - X K - X^T K
 * Anything else: row by row (linear_attention_rows.cuh).
 *
 * Bytes of 1 x 16384 rows, 12 heads, a unit is 50 MB: forward 11 (least 4), gradient 30 (least 8).
 */
#include "linear_attention.cuh"
#include "linear_attention_rows.cuh"

#define LANE 68                                  /* floats from row to row of L and M */

struct operands {                                /* of all chunks, in scratch */
    bf16 *w, *u;                                 /* [B,H,chunks*64,128] */
    bf16 *A;                                     /* [B,H,chunks,64,64] */
    bf16 *M;                                     /* the same: diag(beta) M, or NULL */
    float *beta;                                 /* [B,H,chunks*64] */
    float *keep;                                 /* [B,chunks]: 1, or 0 where a document starts */
    uint8_t *flags;                              /* [B,chunks*64] */
};

static operands cut_operands(char *base, size_t *used, const la_task &z, bool back)
{
    const size_t rows = (size_t)(z.B * z.H * z.chunks) * LA_ROWS;
    operands s;
    s.w = (bf16 *)la_cut(base, used, rows * LA_WIDTH * sizeof(bf16));
    s.u = (bf16 *)la_cut(base, used, rows * LA_WIDTH * sizeof(bf16));
    s.A = (bf16 *)la_cut(base, used, rows * LA_ROWS * sizeof(bf16));
    s.M = back ? (bf16 *)la_cut(base, used, rows * LA_ROWS * sizeof(bf16)) : nullptr;
    s.beta = (float *)la_cut(base, used, rows * sizeof(float));
    s.keep = (float *)la_cut(base, used, (size_t)(z.B * z.chunks) * sizeof(float));
    s.flags = (uint8_t *)la_cut(base, used, (size_t)(z.B * z.chunks) * LA_ROWS);
    return s;
}

struct inputs { const bf16 *q, *k, *v; fg_in beta; };        /* [B,T,H,128], beta: [B,T,H] */

/* ---- preparing a chunk ----------------------------------------------------------------------- */

struct prepared {
    bf16 q[LA_ROWS * LA_WIDTH], k[LA_ROWS * LA_WIDTH], v[LA_ROWS * LA_WIDTH];
    bf16 M[LA_ROWS * LA_ROWS];
    float L[LA_ROWS * LANE];                     /* N diag(beta) */
    float X[LA_ROWS * LANE];                     /* M; above the diagonal: products on the way */
    float beta[LA_ROWS];
    int start[LA_ROWS];
    uint32_t marks[2];
};

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

static __global__ void __launch_bounds__(256, 2)
prepare(const __grid_constant__ la_task z, inputs x, operands s)
{
    extern __shared__ __align__(1024) char memory[];
    prepared *sm = (prepared *)memory;
    const int64_t chunk = blockIdx.x, bh = blockIdx.y, b = bh / z.H, h = bh % z.H;
    const int64_t at = ((b * z.T + chunk * LA_ROWS) * z.H + h) * LA_WIDTH, row = z.H * LA_WIDTH;
    const int64_t tile = bh * z.chunks + chunk, mine = (b * z.chunks + chunk) * LA_ROWS;
    const int n = la_rows(z, chunk), r = threadIdx.x;
    la_load<LA_WIDTH, 256>(sm->k, x.k + at, row, n, threadIdx.x);
    la_load<LA_WIDTH, 256>(sm->q, x.q + at, row, n, threadIdx.x);
    la_load<LA_WIDTH, 256>(sm->v, x.v + at, row, n, threadIdx.x);
    fg_copy_commit();
    if (r < LA_ROWS) {
        const float beta = r < n ? x.beta[(b * z.T + chunk * LA_ROWS + r) * z.H + h] : 0;
        sm->beta[r] = beta;
        s.beta[tile * LA_ROWS + r] = beta;
    }
    la_starts(z, b, chunk, sm->start, sm->marks);
    if (r < LA_ROWS && h == 0) {
        const int last = sm->start[n - 1];
        s.flags[mine + r] = (uint8_t)((sm->start[r] == -1 ? LA_REACHED : 0)
                                      | (la_passes(r, n, last) ? LA_PASSES : 0));
        if (r == 0) s.keep[b * z.chunks + chunk] = last == -1 ? 1 : 0;
    }
    fg_copy_wait<0>();
    __syncthreads();
    pairs(sm, s.A + tile * LA_ROWS * LA_ROWS);
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

static void launch_prepare(const la_task &z, const inputs &x, const operands &s,
                           cudaStream_t stream)
{
    const int bytes = (int)sizeof(prepared);
    cudaFuncSetAttribute(prepare, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    prepare<<<dim3((unsigned)z.chunks, (unsigned)(z.B * z.H)), 256, bytes, stream>>>(z, x, s);
}

/* ---- forward --------------------------------------------------------------------------------- */

static la_chain chain_of(const la_task &z, const operands &s, const inputs &x)
{
    const int64_t own = z.chunks * LA_ROWS * LA_WIDTH, row = z.H * LA_WIDTH;
    la_chain c = {};
    c.z = z;
    c.q = { x.q, z.T * row, LA_WIDTH, row };
    c.k = { x.k, z.T * row, LA_WIDTH, row };
    c.w = { s.w, z.H * own, own, LA_WIDTH };
    c.u = { s.u, z.H * own, own, LA_WIDTH };
    c.A = s.A, c.beta = s.beta;
    if (z.first) c.flags = s.flags, c.decay = s.keep;
    return c;
}

static size_t scratch(const fg_infer *c)
{
    const la_task z = la_task_of(&c->in[1], 1, nullptr, nullptr, nullptr);
    size_t used = 0;
    if (la_in_chunks(&c->in[1], &c->in[2], c->in_type, 0) && c->out_type[0] == FG_BF16)
        cut_operands(nullptr, &used, z, false);
    return used;
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_delta_rule *a = (const struct fg_attr_delta_rule *)e->attr;
    const la_task z = la_task_of(&e->in_shape[1], a->scale, e->in[4], e->in[5], e->in[6]);
    if (!la_in_chunks(&e->in_shape[1], &e->in_shape[2], e->in_type, 0)
        || e->out_type[0] != FG_BF16) {
        rows_forward<true>(e, z, stream);
        return;
    }
    size_t used = 0;
    const operands s = cut_operands((char *)e->scratch, &used, z, false);
    const inputs x = { (const bf16 *)e->in[0], (const bf16 *)e->in[1], (const bf16 *)e->in[2],
                       fg_input_of(e, 3) };
    const int64_t row = z.H * LA_WIDTH;
    launch_prepare(z, x, s, stream);
    la_chain c = chain_of(z, s, x);
    c.o = { (bf16 *)e->out[0], z.T * row, LA_WIDTH, row };
    c.to = (float *)e->out[1];
    la_run_forward<true>(c, stream);
}

static const char *unfit(const fg_infer *c) { return rows_unfit(&c->in[1], &c->in[2]); }

FG_KERNEL(delta_rule) = { .launch = launch, .unfit = unfit, .scratch = scratch };

/* ---- gradient -------------------------------------------------------------------------------- */

struct way_back {
    operands s;
    bf16 *e, *gu;                                /* [B,H,chunks*64,128] */
    bf16 *S, *R;                                 /* [B,H,chunks,128,128] */
};

static way_back cut_way_back(char *base, size_t *used, const la_task &z)
{
    const size_t tiles = (size_t)(z.B * z.H * z.chunks);
    way_back w;
    w.s = cut_operands(base, used, z, true);
    w.e = (bf16 *)la_cut(base, used, tiles * LA_ROWS * LA_WIDTH * sizeof(bf16));
    w.gu = (bf16 *)la_cut(base, used, tiles * LA_ROWS * LA_WIDTH * sizeof(bf16));
    w.S = (bf16 *)la_cut(base, used, tiles * LA_WIDTH * LA_WIDTH * sizeof(bf16));
    w.R = (bf16 *)la_cut(base, used, tiles * LA_WIDTH * LA_WIDTH * sizeof(bf16));
    return w;
}

struct gradients { bf16 *q, *k, *v; fg_out beta; };

struct joined {
    bf16 q[LA_ROWS * LA_WIDTH], k[LA_ROWS * LA_WIDTH], go[LA_ROWS * LA_WIDTH];
    bf16 e[LA_ROWS * LA_WIDTH], gu[LA_ROWS * LA_WIDTH], ge[LA_ROWS * LA_WIDTH];
    bf16 S[LA_WIDTH * LA_WIDTH], R[LA_WIDTH * LA_WIDTH];
    bf16 M[LA_ROWS * LA_ROWS], N[LA_ROWS * LA_ROWS];         /* diag(beta) M */
    bf16 P[LA_ROWS * LA_ROWS], X[LA_ROWS * LA_ROWS];         /* X with a minus */
    float beta[LA_ROWS], part[4][LA_ROWS];
    int start[LA_ROWS];
    uint32_t marks[2];
};

/* acc += a x over k0 <= k < k1, 16 rows by 32 columns from n; a: [64,64], turned or not */
template <bool TURNED>
static __device__ __forceinline__ void by_rows(float acc[4][4], const bf16 *a, int m, const bf16 *x,
                                               int n, int k0, int k1)
{
    for (int k = k0; k < k1; k += 16) {
        uint32_t u[4], b[4];
        if (TURNED) la_a_turned<LA_ROWS>(u, fg_shared(a), m, k);
        else la_a<LA_ROWS>(u, fg_shared(a), m, k);
        la_b_turned<LA_WIDTH>(b, fg_shared(x), k, n);
        la_mma2(acc, u, b);
        la_b_turned<LA_WIDTH>(b, fg_shared(x), k, n + 16);
        la_mma2(acc + 2, u, b);
    }
}
/* acc = x M, M: [value][key] */
static __device__ __forceinline__ void by_state(float acc[4][4], const bf16 *x, int m,
                                                const bf16 *M, int n)
{
    la_zero<4>(acc);
#pragma unroll
    for (int k = 0; k < LA_WIDTH; k += 16) {
        uint32_t a[4], b[4];
        la_a<LA_WIDTH>(a, fg_shared(x), m, k);
        la_b_turned<LA_WIDTH>(b, fg_shared(M), k, n);
        la_mma2(acc, a, b);
        la_b_turned<LA_WIDTH>(b, fg_shared(M), k, n + 16);
        la_mma2(acc + 2, a, b);
    }
}
static __device__ __forceinline__ void put_rows(bf16 *to, int64_t row, int m, int n, int rows,
                                                const float acc[4][4])
{
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (m + g + 8 * i < rows)
                *(uint32_t *)(to + (m + g + 8 * i) * row + n + 8 * j + c) =
                    fg_pack2(acc[j][2 * i], acc[j][2 * i + 1]);
}

/* A block of x y^T, columns times factor[s], where s <= t - gap and both are of one document. */
static __device__ __forceinline__ void pair_block(const joined *sm, const bf16 *x, int m,
                                                  const bf16 *y, int n, int gap,
                                                  const float *factor, float sign, bf16 *to)
{
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
    float acc[2][4];
    products(acc, x, m, y, n);
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int t = m + g + 8 * i, s = n + 8 * j + c, from = sm->start[t];
            float u = acc[j][2 * i] * sign, v = acc[j][2 * i + 1] * sign;
            if (factor) u *= factor[s], v *= factor[s + 1];
            *la_pair<LA_ROWS>(to, t, s) = fg_pack2(s <= t - gap && s >= from ? u : 0.0f,
                                                   s + 1 <= t - gap && s + 1 >= from ? v : 0.0f);
        }
}

/* ge to shared memory and gv; then the products y.e, 32 columns of them, to part. */
static __device__ __forceinline__ void errors(joined *sm, int m, int n)
{
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
    float acc[4][4], sum[2] = { 0, 0 };
    la_zero<4>(acc);
    by_rows<true>(acc, sm->N, m, sm->ge, n, m, LA_ROWS);
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint32_t u = *la_pair<LA_WIDTH>(sm->gu, m + g + 8 * i, n + 8 * j + c);
            const uint32_t e = *la_pair<LA_WIDTH>(sm->e, m + g + 8 * i, n + 8 * j + c);
            sum[i] = fmaf(la_low_half(u) - acc[j][2 * i], la_low_half(e), sum[i]);
            sum[i] = fmaf(la_high_half(u) - acc[j][2 * i + 1], la_high_half(e), sum[i]);
        }
        sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
        sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
        if (threadIdx.x % 4 == 0) sm->part[n / 32][m + g + 8 * i] = sum[i];
    }
}

static __device__ __forceinline__ void load_matrix(bf16 *to, const bf16 *from)
{
    const uint32_t x = fg_shared(to);
    for (int i = threadIdx.x; i < LA_WIDTH * LA_WIDTH / 8; i += 512)
        fg_copy_async(x + fg_swizzle<LA_WIDTH>(i / 16, i % 16), from + i * 8, true);
}

static __global__ void __launch_bounds__(512, 1)
join(const __grid_constant__ la_task z, inputs x, const bf16 *go, way_back w, gradients to)
{
    extern __shared__ __align__(1024) char memory[];
    joined *sm = (joined *)memory;
    const int64_t chunk = blockIdx.x, bh = blockIdx.y, b = bh / z.H, h = bh % z.H;
    const int64_t at = ((b * z.T + chunk * LA_ROWS) * z.H + h) * LA_WIDTH, row = z.H * LA_WIDTH;
    const int64_t tile = bh * z.chunks + chunk, own = tile * LA_ROWS * LA_WIDTH;
    const int n = la_rows(z, chunk), warp = threadIdx.x / 32, m = warp % 4 * 16;
    const int wide = warp / 4 * 32, narrow = warp / 4 * 16, g = threadIdx.x % 32 / 4;
    la_load<LA_WIDTH, 512>(sm->k, x.k + at, row, n, threadIdx.x);
    la_load<LA_WIDTH, 512>(sm->gu, w.gu + own, LA_WIDTH, n, threadIdx.x);
    la_load<LA_ROWS, 512>(sm->M, w.s.M + tile * LA_ROWS * LA_ROWS, LA_ROWS, LA_ROWS, threadIdx.x);
    fg_copy_commit();
    la_load<LA_WIDTH, 512>(sm->e, w.e + own, LA_WIDTH, n, threadIdx.x);
    la_load<LA_WIDTH, 512>(sm->go, go + at, row, n, threadIdx.x);
    fg_copy_commit();
    la_load<LA_WIDTH, 512>(sm->q, x.q + at, row, n, threadIdx.x);
    load_matrix(sm->S, w.S + tile * LA_WIDTH * LA_WIDTH);
    load_matrix(sm->R, w.R + tile * LA_WIDTH * LA_WIDTH);
    fg_copy_commit();
    if (threadIdx.x < LA_ROWS) sm->beta[threadIdx.x] = w.s.beta[tile * LA_ROWS + threadIdx.x];
    la_starts(z, b, chunk, sm->start, sm->marks);
    fg_copy_wait<2>();
    __syncthreads();

    float gk[4][4], gq[4][4];
    if (narrow <= m) pair_block(sm, sm->k, m, sm->k, narrow, 1, nullptr, 1, sm->N);
    la_zero<4>(gk);
    by_rows<true>(gk, sm->M, m, sm->gu, wide, m, LA_ROWS);          /* ge */
    put_rows(to.v + at, row, m, wide, n, gk);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            *la_pair<LA_WIDTH>(sm->ge, m + g + 8 * i, wide + 8 * j + threadIdx.x % 4 * 2) =
                fg_pack2(gk[j][2 * i], gk[j][2 * i + 1]);
    fg_copy_wait<1>();
    __syncthreads();
    errors(sm, m, wide);
    if (narrow <= m) {
        pair_block(sm, sm->go, m, sm->e, narrow, 0, sm->beta, 1, sm->P);
        pair_block(sm, sm->ge, m, sm->e, narrow, 1, sm->beta, -1, sm->X);
    }
    fg_copy_wait<0>();
    __syncthreads();
    if (threadIdx.x < n) {
        const int r = threadIdx.x;
        to.beta.put((b * z.T + chunk * LA_ROWS + r) * z.H + h,
                    (sm->part[0][r] + sm->part[1][r]) + (sm->part[2][r] + sm->part[3][r]));
    }
    const int last = sm->start[n - 1];
    bool reached[2];
    float passes[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = m + g + 8 * i;
        reached[i] = sm->start[r] == -1;
        passes[i] = la_passes(r, n, last) ? z.scale * sm->beta[r] : 0;
    }
    by_state(gq, sm->go, m, sm->S, wide);
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int f = 0; f < 4; f++) gq[j][f] = reached[f / 2] ? gq[j][f] : 0;
    by_rows<false>(gq, sm->P, m, sm->k, wide, 0, m + 16);
    la_zero<4>(gk);
    by_rows<true>(gk, sm->P, m, sm->q, wide, m, LA_ROWS);
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int f = 0; f < 4; f++) {
            gq[j][f] *= z.scale;
            gk[j][f] *= z.scale;
        }
    put_rows(to.q + at, row, m, wide, n, gq);
    by_rows<false>(gk, sm->X, m, sm->k, wide, 0, m + 16);
    by_rows<true>(gk, sm->X, m, sm->k, wide, m, LA_ROWS);
    by_state(gq, sm->ge, m, sm->S, wide);
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int f = 0; f < 4; f++) gk[j][f] -= reached[f / 2] ? gq[j][f] : 0;
    by_state(gq, sm->e, m, sm->R, wide);
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int f = 0; f < 4; f++)
            gk[j][f] += passes[f / 2] != 0 ? passes[f / 2] * gq[j][f] : 0;
    put_rows(to.k + at, row, m, wide, n, gk);
}

static size_t grad_scratch(const fg_infer *c)
{
    const struct fg_attr_delta_rule_grad *a = (const struct fg_attr_delta_rule_grad *)c->attr;
    const la_task z = la_task_of(&c->in[3], 1, nullptr, nullptr, nullptr);
    size_t used = 0;
    if (la_back_in_chunks(a->scale, c->in, c->in_type, c->out_type))
        cut_way_back(nullptr, &used, z);
    else used = rows_grad_scratch(&c->in[3], &c->in[4]);
    return used;
}

static void grad_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_delta_rule_grad *a = (const struct fg_attr_delta_rule_grad *)e->attr;
    const la_task z = la_task_of(&e->in_shape[3], a->scale, e->in[6], nullptr, e->in[7]);
    if (!la_back_in_chunks(a->scale, e->in_shape, e->in_type, e->out_type)) {
        rows_backward<true>(e, z, stream);
        return;
    }
    size_t used = 0;
    const way_back w = cut_way_back((char *)e->scratch, &used, z);
    const inputs x = { (const bf16 *)e->in[2], (const bf16 *)e->in[3], (const bf16 *)e->in[4],
                       fg_input_of(e, 5) };
    const bf16 *go = (const bf16 *)e->in[0];
    const int64_t own = z.chunks * LA_ROWS * LA_WIDTH, row = z.H * LA_WIDTH;
    const int bytes = (int)sizeof(joined);
    launch_prepare(z, x, w.s, stream);
    la_chain forth = chain_of(z, w.s, x), back = forth;
    forth.kept = w.S;
    forth.o = { w.e, z.H * own, own, LA_WIDTH };
    back.kept = w.R;
    back.u = { go, z.T * row, LA_WIDTH, row };
    back.o = { w.gu, z.H * own, own, LA_WIDTH };
    back.from = (const float *)e->in[1], back.to = (float *)e->out[4];
    la_run_both_ways<true>(forth, back, stream);
    cudaFuncSetAttribute(join, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    join<<<dim3((unsigned)z.chunks, (unsigned)(z.B * z.H)), 512, bytes, stream>>>(
        z, x, go, w, { (bf16 *)e->out[0], (bf16 *)e->out[1], (bf16 *)e->out[2],
                       fg_output_of(e, 3) });
}

static const char *grad_unfit(const fg_infer *c) { return rows_unfit(&c->in[3], &c->in[4]); }

FG_KERNEL(delta_rule_grad) = {
    .launch = grad_launch, .unfit = grad_unfit, .scratch = grad_scratch,
};
