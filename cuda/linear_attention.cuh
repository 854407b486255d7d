/* linear_attention.cuh - what gated_linear_attention.cu and delta_rule.cu share: which rows belong
 * together, fragments, and the two kernels that carry the state from chunk to chunk.
 *
 * Heads of 128 x 128, rows in chunks of 64.  Everything that does not need the state is prepared
 * chunk by chunk, all chunks at once; what is left for the chain is products alone (W, diag(beta)
 * of the delta rule only):
 *
 *     e = U - W S,  u = diag(beta) e       o = scale (Q S + A u)       S' = diag(decay) S + K^T u
 *     gu = scale A^T go + K R              R before = diag(decay) R + scale Q^T go - W^T diag(beta) gu
 *
 * S and R, its gradient, stay in registers in f32; operands are rounded to bf16.  A block of threads
 * has 32 columns of one head, so a head is four blocks, which read the same Q, K, W, A from L2.
 * Rows that a document's start cuts off from the state are 0 in Q and W, rows that do not reach the
 * next chunk are 0 in K, and decay is 0 where a document starts within the chunk. */
#ifndef FG_LINEAR_ATTENTION_CUH
#define FG_LINEAR_ATTENTION_CUH
#include "attention.cuh"

#define LA_ROWS    64                            /* of a chunk */
#define LA_WIDTH   128                           /* of keys and of values */
#define LA_COLUMNS 32                            /* of values, of a block of the chain */
#define LA_STAGES  3

struct la_task {
    int64_t B, T, H, chunks;
    const int32_t *first, *past;
    const float *state;                          /* S before the first row, or NULL */
    float scale;
};

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

/* ---- fragments of matrices in shared memory, swizzled rows of WIDTH bf16 ---------------------- */

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

/* 64 rows of WIDTH, `row` elements apart, on their way to shared memory; 0 from row n on, and for
 * rows whose flag has not the bit. */
template <int WIDTH, int THREADS>
static __device__ __forceinline__ void la_load(void *to, const bf16 *from, int64_t row, int n,
                                               const uint8_t *flags = nullptr, int bit = 0)
{
    const uint32_t x = fg_shared(to);
    for (int i = threadIdx.x; i < LA_ROWS * WIDTH / 8; i += THREADS) {
        const int r = i / (WIDTH / 8), c = i % (WIDTH / 8);
        const bool real = r < n && (!flags || (flags[r] & bit));
        fg_copy_async(x + fg_swizzle<WIDTH>(r, c), from + (real ? r * row + c * 8 : 0), real);
    }
}

/* ---- the chain ------------------------------------------------------------------------------- */

/* A matrix of rows: row t of head bh stands at p + b batch + h head + t row. */
struct la_rows_of { const bf16 *p; int64_t batch, head, row; };
struct la_rows_to { bf16 *p; int64_t batch, head, row; };

#define LA_REACHED 1                             /* flags of a row: the state reaches it, */
#define LA_PASSES  2                             /* it reaches the next chunk */

struct la_chain {
    la_task z;
    la_rows_of q, k, w, u;                       /* u: U of the delta rule, else v; back: go */
    const bf16 *A;                               /* [B,H,chunks,64,64] */
    const float *decay;                          /* [B,H,chunks,128], or per chunk [B,chunks] */
    const float *beta;                           /* [B,H,chunks*64] */
    const uint8_t *flags;                        /* [B,chunks*64] for q and k, or NULL: all set */
    la_rows_to o, e;                             /* o; e of the delta rule, if kept; back: gu */
    bf16 *kept;                                  /* [B,H,chunks,128,128]: S before, R behind */
    const float *from;                           /* gradient of the last state, or NULL */
    float *to;                                   /* [B,H,128,128]: the last state; gradient of the
                                                    first */
};

template <bool DELTA> struct alignas(1024) la_stage {
    bf16 q[LA_ROWS * LA_WIDTH], k[LA_ROWS * LA_WIDTH], A[LA_ROWS * LA_ROWS];
    bf16 u[LA_ROWS * LA_COLUMNS];
    bf16 w[DELTA ? LA_ROWS * LA_WIDTH : 64];
    float beta[LA_ROWS];
};
template <bool DELTA> struct la_shared {
    la_stage<DELTA> stage[LA_STAGES];
    bf16 S[LA_WIDTH * LA_COLUMNS], u[LA_ROWS * LA_COLUMNS];
};

template <bool DELTA, bool Q, bool A>
static __device__ __forceinline__ void la_fetch(const la_chain &c, la_stage<DELTA> *s, int64_t bh,
                                                int64_t chunk)
{
    const int64_t b = bh / c.z.H, h = bh % c.z.H, t = chunk * LA_ROWS;
    const int n = la_rows(c.z, chunk);
    const uint8_t *flags = c.flags ? c.flags + (b * c.z.chunks + chunk) * LA_ROWS : nullptr;
    const la_rows_of *q = &c.q, *k = &c.k, *w = &c.w, *u = &c.u;
    if (Q) la_load<LA_WIDTH, 256>(s->q, q->p + b * q->batch + h * q->head + t * q->row, q->row, n,
                                  flags, LA_REACHED);
    la_load<LA_WIDTH, 256>(s->k, k->p + b * k->batch + h * k->head + t * k->row, k->row, n, flags,
                           LA_PASSES);
    la_load<LA_COLUMNS, 256>(s->u, u->p + b * u->batch + h * u->head + t * u->row
                             + blockIdx.x * LA_COLUMNS, u->row, n);
    if (A) la_load<LA_ROWS, 256>(s->A, c.A + (bh * c.z.chunks + chunk) * LA_ROWS * LA_ROWS, LA_ROWS,
                                 LA_ROWS);
    if (DELTA) {
        la_load<LA_WIDTH, 256>(s->w, w->p + b * w->batch + h * w->head + t * w->row, w->row, n);
        if (threadIdx.x < LA_ROWS / 4)
            fg_copy_async(fg_shared(s->beta + 4 * threadIdx.x),
                          c.beta + (bh * c.z.chunks + chunk) * LA_ROWS + 4 * threadIdx.x, true);
    }
}

/* The block's columns of a [128,128] matrix in f32, to fragments and back: warp w has rows 16 w on. */
static __device__ __forceinline__ void la_state_in(float S[4][4], const float *from)
{
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
    la_zero<4>(S);
    if (!from) return;
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            S[j][i] = from[(16 * warp + g + i / 2 * 8) * LA_WIDTH + blockIdx.x * LA_COLUMNS + 8 * j
                           + c + i % 2];
}
static __device__ __forceinline__ void la_state_out(const float S[4][4], float *to)
{
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            *(float2 *)&to[(16 * warp + g + i * 8) * LA_WIDTH + blockIdx.x * LA_COLUMNS + 8 * j + c] =
                make_float2(S[j][2 * i], S[j][2 * i + 1]);
}
/* The same as bf16 in shared memory. */
static __device__ __forceinline__ void la_state_share(const float S[4][4], bf16 *to)
{
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            *la_pair<LA_COLUMNS>(to, 16 * warp + g + i * 8, 8 * j + c) =
                fg_pack2(S[j][2 * i], S[j][2 * i + 1]);
}
/* ... and from there to its place among kept states. */
static __device__ __forceinline__ void la_state_keep(const bf16 *S, bf16 *to)
{
    for (int i = threadIdx.x; i < LA_WIDTH * LA_COLUMNS / 8; i += 256) {
        const int r = i / (LA_COLUMNS / 8), c = i % (LA_COLUMNS / 8);
        *(uint4 *)(to + r * LA_WIDTH + blockIdx.x * LA_COLUMNS + c * 8) =
            *(const uint4 *)((const char *)S + fg_swizzle<LA_COLUMNS>(r, c));
    }
}

/* decay of rows g and g + 8 of this warp */
static __device__ __forceinline__ float2 la_decay(const la_chain &c, bool delta, int64_t bh,
                                                  int64_t chunk)
{
    if (!c.decay) return make_float2(1, 1);
    if (delta) {
        const float d = c.decay[bh / c.z.H * c.z.chunks + chunk];
        return make_float2(d, d);
    }
    const float *d = c.decay + (bh * c.z.chunks + chunk) * LA_WIDTH + threadIdx.x / 32 * 16
                     + threadIdx.x % 32 / 4;
    return make_float2(d[0], d[8]);
}
static __device__ __forceinline__ void la_decay_state(float S[4][4], float2 d)
{
#pragma unroll
    for (int j = 0; j < 4; j++) {
        S[j][0] *= d.x;
        S[j][1] *= d.x;
        S[j][2] *= d.y;
        S[j][3] *= d.y;
    }
}

/* acc += x^T y over the 64 rows: 16 rows of the state by the block's columns */
static __device__ __forceinline__ void la_outer(float acc[4][4], uint32_t x, uint32_t y)
{
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int k = 0; k < LA_ROWS; k += 16) {
        uint32_t a[4], b[4];
        la_a_turned<LA_WIDTH>(a, x, 16 * warp, k);
        la_b_turned<LA_COLUMNS>(b, y, k, 0);
        la_mma2(acc, a, b);
        la_b_turned<LA_COLUMNS>(b, y, k, 16);
        la_mma2(acc + 2, a, b);
    }
}

/* Rows of one 16 x 16 tile to memory as bf16: rows m + g, m + g + 8 below n. */
static __device__ __forceinline__ void la_put(const la_rows_to &to, int64_t b, int64_t h, int64_t t,
                                              int m, int column, int n, const float acc[2][4],
                                              float scale)
{
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
    bf16 *p = to.p + b * to.batch + h * to.head + t * to.row + column + c;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 2; j++)
            if (m + g + 8 * i < n)
                *(uint32_t *)(p + (m + g + 8 * i) * to.row + 8 * j) =
                    fg_pack2(scale * acc[j][2 * i], scale * acc[j][2 * i + 1]);
}

/* From the first chunk to the last; OUT: writes o, KEEP: the states, and e of the delta rule. */
template <bool DELTA, bool OUT, bool KEEP>
static __global__ void __launch_bounds__(256, 1) la_forward(const __grid_constant__ la_chain c)
{
    extern __shared__ __align__(1024) char memory[];
    la_shared<DELTA> *sm = (la_shared<DELTA> *)memory;
    const int warp = threadIdx.x / 32, m = warp % 4 * 16, n0 = warp / 4 * 16;
    const int g = threadIdx.x % 32 / 4, cc = threadIdx.x % 4 * 2;
    const int64_t bh = blockIdx.y, b = bh / c.z.H, h = bh % c.z.H, size = LA_WIDTH * LA_WIDTH;
    float S[4][4];
    la_state_in(S, la_carried(c.z, b) ? c.z.state + bh * size : nullptr);
    la_state_share(S, sm->S);
    for (int64_t i = 0; i < LA_STAGES - 1; i++) {
        if (i < c.z.chunks) la_fetch<DELTA, OUT, OUT>(c, &sm->stage[i], bh, i);
        fg_copy_commit();
    }
    for (int64_t i = 0; i < c.z.chunks; i++) {
        fg_copy_wait<LA_STAGES - 2>();
        __syncthreads();                         /* this stage and S are there for all */
        const int64_t next = i + LA_STAGES - 1;
        if (next < c.z.chunks)
            la_fetch<DELTA, OUT, OUT>(c, &sm->stage[next % LA_STAGES], bh, next);
        fg_copy_commit();
        la_stage<DELTA> *s = &sm->stage[i % LA_STAGES];
        const uint32_t Ss = fg_shared(sm->S), us = fg_shared(DELTA ? sm->u : s->u);
        const int64_t t = i * LA_ROWS;
        const int n = la_rows(c.z, i);
        const float2 d = la_decay(c, DELTA, bh, i);
        float o[2][4], e[2][4];
        la_zero<2>(o);
        la_zero<2>(e);
        if (KEEP) la_state_keep(sm->S, c.kept + (bh * c.z.chunks + i) * size);
#pragma unroll
        for (int k = 0; k < LA_WIDTH; k += 16) {
            uint32_t a[4], x[4];
            if (DELTA || OUT) la_b_turned<LA_COLUMNS>(x, Ss, k, n0);
            if (DELTA) {
                la_a<LA_WIDTH>(a, fg_shared(s->w), m, k);
                la_mma2(e, a, x);
            }
            if (OUT) {
                la_a<LA_WIDTH>(a, fg_shared(s->q), m, k);
                la_mma2(o, a, x);
            }
        }
        if (DELTA) {
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const int r = m + g + 8 * k, column = n0 + 8 * j + cc;
                    const uint32_t u = *la_pair<LA_COLUMNS>(s->u, r, column);
                    const float beta = s->beta[r];
                    e[j][2 * k] = la_low_half(u) - e[j][2 * k];
                    e[j][2 * k + 1] = la_high_half(u) - e[j][2 * k + 1];
                    *la_pair<LA_COLUMNS>(sm->u, r, column) =
                        fg_pack2(beta * e[j][2 * k], beta * e[j][2 * k + 1]);
                }
            if (KEEP) la_put(c.e, b, h, t, m, blockIdx.x * LA_COLUMNS + n0, n, e, 1);
        }
        __syncthreads();                         /* S has been read, u is there */
        if (OUT) {
            for (int k = 0; k <= m; k += 16) {
                uint32_t a[4], x[4];
                la_a<LA_ROWS>(a, fg_shared(s->A), m, k);
                la_b_turned<LA_COLUMNS>(x, us, k, n0);
                la_mma2(o, a, x);
            }
            la_put(c.o, b, h, t, m, blockIdx.x * LA_COLUMNS + n0, n, o, c.z.scale);
        }
        la_decay_state(S, d);
        la_outer(S, fg_shared(s->k), us);
        la_state_share(S, sm->S);
    }
    if (c.to) la_state_out(S, c.to + bh * size);
}

/* From the last chunk to the first. */
template <bool DELTA>
static __global__ void __launch_bounds__(256, 1) la_backward(const __grid_constant__ la_chain c)
{
    extern __shared__ __align__(1024) char memory[];
    la_shared<DELTA> *sm = (la_shared<DELTA> *)memory;
    const int warp = threadIdx.x / 32, m = warp % 4 * 16, n0 = warp / 4 * 16;
    const int g = threadIdx.x % 32 / 4, cc = threadIdx.x % 4 * 2;
    const int64_t bh = blockIdx.y, b = bh / c.z.H, h = bh % c.z.H, size = LA_WIDTH * LA_WIDTH;
    float R[4][4];
    la_state_in(R, c.from ? c.from + bh * size : nullptr);
    la_state_share(R, sm->S);
    for (int64_t i = 0; i < LA_STAGES - 1; i++) {
        if (i < c.z.chunks)
            la_fetch<DELTA, true, true>(c, &sm->stage[i], bh, c.z.chunks - 1 - i);
        fg_copy_commit();
    }
    for (int64_t i = 0; i < c.z.chunks; i++) {
        const int64_t chunk = c.z.chunks - 1 - i, next = i + LA_STAGES - 1, t = chunk * LA_ROWS;
        fg_copy_wait<LA_STAGES - 2>();
        __syncthreads();
        if (next < c.z.chunks)
            la_fetch<DELTA, true, true>(c, &sm->stage[next % LA_STAGES], bh, c.z.chunks - 1 - next);
        fg_copy_commit();
        la_stage<DELTA> *s = &sm->stage[i % LA_STAGES];
        const uint32_t Rs = fg_shared(sm->S), gos = fg_shared(s->u);
        const int n = la_rows(c.z, chunk);
        const float2 d = la_decay(c, DELTA, bh, chunk);
        float gu[2][4], add[4][4];
        la_zero<2>(gu);
        la_zero<4>(add);
        la_state_keep(sm->S, c.kept + (bh * c.z.chunks + chunk) * size);
        for (int k = m; k < LA_ROWS; k += 16) {
            uint32_t a[4], x[4];
            la_a_turned<LA_ROWS>(a, fg_shared(s->A), m, k);
            la_b_turned<LA_COLUMNS>(x, gos, k, n0);
            la_mma2(gu, a, x);
        }
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int k = 0; k < 4; k++) gu[j][k] *= c.z.scale;
#pragma unroll
        for (int k = 0; k < LA_WIDTH; k += 16) {
            uint32_t a[4], x[4];
            la_a<LA_WIDTH>(a, fg_shared(s->k), m, k);
            la_b_turned<LA_COLUMNS>(x, Rs, k, n0);
            la_mma2(gu, a, x);
        }
        la_put(c.e, b, h, t, m, blockIdx.x * LA_COLUMNS + n0, n, gu, 1);
        if (DELTA) {
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const int r = m + g + 8 * k;
                    const float minus = -s->beta[r];
                    *la_pair<LA_COLUMNS>(sm->u, r, n0 + 8 * j + cc) =
                        fg_pack2(minus * gu[j][2 * k], minus * gu[j][2 * k + 1]);
                }
        }
        __syncthreads();                         /* R has been read, -beta gu is there */
        la_outer(add, fg_shared(s->q), gos);
        la_decay_state(R, d);
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int k = 0; k < 4; k++) R[j][k] = fmaf(c.z.scale, add[j][k], R[j][k]);
        if (DELTA) la_outer(R, fg_shared(s->w), fg_shared(sm->u));
        la_state_share(R, sm->S);
    }
    const bool carried = la_carried(c.z, b);
    if (!carried) la_zero<4>(R);
    la_state_out(R, c.to + bh * size);
}

static inline dim3 la_chain_grid(const la_task &z)
{
    return dim3(LA_WIDTH / LA_COLUMNS, (unsigned)(z.B * z.H));
}
template <bool DELTA, typename K>
static void la_chain_launch(K *kernel, const la_chain &c, cudaStream_t stream)
{
    const int bytes = (int)sizeof(la_shared<DELTA>);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    kernel<<<la_chain_grid(c.z), 256, bytes, stream>>>(c);
}

/* Cuts bytes off scratch, 256-byte aligned; base NULL: only counts. */
static inline void *la_cut(char *base, size_t *used, size_t bytes)
{
    void *p = base ? base + *used : nullptr;
    *used += (bytes + 255) / 256 * 256;
    return p;
}
#endif
