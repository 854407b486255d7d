/* linear_attention_chain.cuh - the two kernels that carry the state of linear attention from chunk
 * to chunk: products alone (W, diag(beta) of the delta rule only):
 *
 *     e = U - W S,  u = diag(beta) e       o = scale (Q S + A u)       S' = diag(decay) S + K^T u
 *     gu = scale A^T go + K R           R' = diag(decay) R + scale Q^T go - W^T diag(beta) gu
 *
 * R, the gradient of S, goes from the last chunk to the first.  Both stay in registers in f32;
 * operands are rounded to bf16.  A block of threads has 32 or 64 columns of one head; the blocks of
 * a head read the same Q, K, W, A from L2.  The chain falls in segments that run at once: first
 * what each makes of S = 0 (and, with W, of S = 1), then all, each from the state that those before
 * it add up to. */
#ifndef FG_LINEAR_ATTENTION_CHAIN_CUH
#define FG_LINEAR_ATTENTION_CHAIN_CUH
#include "linear_attention.cuh"
#include "wgmma.cuh"

/* ---- the chain ------------------------------------------------------------------------------- */

/* A matrix of rows: row t of head bh stands at p + b batch + h head + t row. */
struct la_rows_of { const bf16 *p; int64_t batch, head, row; };
struct la_rows_to { bf16 *p; int64_t batch, head, row; };
static __device__ __forceinline__ const bf16 *la_at(const la_rows_of &x, int64_t b, int64_t h,
                                                    int64_t t)
{
    return x.p + b * x.batch + h * x.head + t * x.row;
}

#define LA_COLUMNS 64                            /* of values, of a block */
#define LA_STAGES  3                             /* chunks in shared memory at a time */
#define LA_REACHED 1                             /* flags of a row: the state reaches it, */
#define LA_PASSES  2                             /* it reaches the next chunk */

struct la_chain {
    la_task z;
    la_rows_of q, k, w, u;                       /* u: U of the delta rule, else v; back: go */
    const bf16 *A;                               /* [B,H,chunks,64,64] */
    const float *decay;                          /* [B,H,chunks,128]; of the delta rule, [B,chunks]
                                                    or NULL: 1 */
    const float *beta;                           /* [B,H,chunks*64] */
    const uint8_t *flags;                        /* [B,chunks*64] for q and k, or NULL: all set */
    la_rows_to o;                                /* forward: o, or e if kept; back: gu */
    bf16 *kept;                                  /* [B,H,chunks,128,128], [value][key]: S before, or
                                                    R / scale behind the chunk */
    const float *from;                           /* gradient of the last state, or NULL */
    float *to;                                   /* [B,H,128,128]: the last state; back: gradient of
                                                    the first */
    int64_t segments, per;                       /* the chain falls in segments of per chunks */
    float *ends;                                 /* [segments,B,H,128,128]: what a segment adds */
    float *through;                              /* [segments,B,H,128]: the product of its decays;
                                                    of the delta rule [segments,B,H,128,128] */
};

/* What a step needs: of the chain, and of those who write o. */
template <bool DELTA> struct alignas(1024) la_stage {
    bf16 k[LA_ROWS * LA_WIDTH], w[DELTA ? LA_ROWS * LA_WIDTH : 64];      /* in panels */
    bf16 u[LA_ROWS * LA_COLUMNS];
    float factor[LA_WIDTH];                      /* beta of rows, or decay of channels */
};
struct alignas(1024) la_late { bf16 q[LA_ROWS * LA_WIDTH], A[LA_ROWS * LA_ROWS]; };
template <bool DELTA> struct la_shared {
    la_stage<DELTA> stage[LA_STAGES];
    la_late late[LA_STAGES];
    bf16 S[LA_COLUMNS * LA_WIDTH];               /* [value][key] in panels */
    bf16 u[LA_COLUMNS * LA_ROWS];                /* [value][row] */
};

/* What the chain is run for: o, what the gradient wants kept, or the end of a segment alone. */
enum la_purpose { LA_OUT, LA_KEEP, LA_END };

/* The first warpgroup carries 64 columns of values, transposed: S^T is the operand of W S as it
 * stands in registers, and u^T that of K^T u, so nothing passes between warps on the way.  The
 * second writes o, or what is kept, from copies; the third fetches. */
#define LA_THREADS 384
static __device__ __forceinline__ bool la_is_chain() { return threadIdx.x < 128; }
static __device__ __forceinline__ bool la_is_writer() { return threadIdx.x < 256; }

/* A block's segment of the chain: chunks [from,to) of a head. */
struct la_span { int64_t bh, b, h, segment, from, to; };
static __device__ __forceinline__ la_span la_own_span(const la_chain &c)
{
    la_span s;
    const int64_t heads = c.z.B * c.z.H;
    s.segment = blockIdx.y / heads, s.bh = blockIdx.y - s.segment * heads;
    s.b = s.bh / c.z.H, s.h = s.bh % c.z.H;
    s.from = s.segment * c.per, s.to = min(c.z.chunks, s.from + c.per);
    return s;
}

/* By the last BY threads of the block. */
template <bool DELTA, int BY>
static __device__ __forceinline__ void la_fetch(const la_chain &c, la_stage<DELTA> *s, int64_t bh,
                                                int64_t chunk)
{
    const int64_t b = bh / c.z.H, h = bh % c.z.H, t = chunk * LA_ROWS;
    const int n = la_rows(c.z, chunk), i = threadIdx.x % BY;
    const uint8_t *flags = c.flags ? c.flags + (b * c.z.chunks + chunk) * LA_ROWS : nullptr;
    la_load<LA_WIDTH, BY, true>(s->k, la_at(c.k, b, h, t), c.k.row, n, i, flags, LA_PASSES);
    const bf16 *u = la_at(c.u, b, h, t) + blockIdx.x * LA_COLUMNS;
    if (c.u.p) la_load<LA_COLUMNS, BY>(s->u, u, c.u.row, n, i);
    if (DELTA) la_load<LA_WIDTH, BY, true>(s->w, la_at(c.w, b, h, t), c.w.row, n, i);
    const float *factor = DELTA ? c.beta + (bh * c.z.chunks + chunk) * LA_ROWS
                                : c.decay + (bh * c.z.chunks + chunk) * LA_WIDTH;
    if (i < (DELTA ? LA_ROWS : LA_WIDTH) / 4)
        fg_copy_async(fg_shared(s->factor + 4 * i), factor + 4 * i, true);
}
/* A: the blocks of 16 x 16 that prepare wrote, 0 above. */
static __device__ __forceinline__ void la_fetch_late(const la_chain &c, la_late *s, int64_t bh,
                                                     int64_t chunk)
{
    const int64_t b = bh / c.z.H, h = bh % c.z.H, t = chunk * LA_ROWS;
    const int n = la_rows(c.z, chunk), i = threadIdx.x % 128;
    const uint8_t *flags = c.flags ? c.flags + (b * c.z.chunks + chunk) * LA_ROWS : nullptr;
    la_load<LA_WIDTH, 128, true>(s->q, la_at(c.q, b, h, t), c.q.row, n, i, flags, LA_REACHED);
    const bf16 *A = c.A + (bh * c.z.chunks + chunk) * LA_ROWS * LA_ROWS + i * 8;
    const uint32_t to = fg_shared(s->A) + fg_swizzle<LA_ROWS>(i / 8, i % 8);
#pragma unroll
    for (int k = 0; k < 4; k++)
        fg_copy_async(to + k * 16 * LA_ROWS * 2, A + k * 16 * LA_ROWS, i % 8 / 2 <= k);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
/* A warp's columns of a [key][value] matrix in f32 to fragments of its transpose, and back. */
static __device__ __forceinline__ int la_own_values() { return threadIdx.x % 128 / 32 * 16; }
static __device__ __forceinline__ int la_state_at()
{
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
    return c * LA_WIDTH + blockIdx.x * LA_COLUMNS + la_own_values() + g;
}
static __device__ __forceinline__ void la_state_in(float S[16][4], const float *from, float scale)
{
    la_zero<16>(S);
    if (!from) return;
    from += la_state_at();
#pragma unroll
    for (int j = 0; j < 16; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) S[j][i] = scale * from[(8 * j + i % 2) * LA_WIDTH + i / 2 * 8];
}
static __device__ __forceinline__ void la_state_out(const float S[16][4], float *to, float scale)
{
    to += la_state_at();
#pragma unroll
    for (int j = 0; j < 16; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) to[(8 * j + i % 2) * LA_WIDTH + i / 2 * 8] = scale * S[j][i];
}
/* 0, or 1 on the diagonal */
static __device__ __forceinline__ void la_start(float S[16][4], bool unit)
{
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
    const int v = blockIdx.x * LA_COLUMNS + la_own_values() + g;
#pragma unroll
    for (int j = 0; j < 16; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            S[j][i] = unit && 8 * j + c + i % 2 == v + i / 2 * 8 ? 1 : 0;
}
/* S = diag(through) S + what a segment adds, for segments from first on to last, step by step, of
 * a chain whose decays are known. */
static __device__ __forceinline__ void la_pass(float S[16][4], const la_chain &c, int64_t bh,
                                               int64_t first, int64_t count, int64_t step)
{
    const int64_t heads = c.z.B * c.z.H;
    const float *add = c.ends + (first * heads + bh) * LA_WIDTH * LA_WIDTH + la_state_at();
    const float *through = c.through + (first * heads + bh) * LA_WIDTH + threadIdx.x % 4 * 2;
#pragma unroll 1
    for (; count > 0; count--) {
#pragma unroll
        for (int j = 0; j < 16; j++) {
            const float2 decay = *(const float2 *)(through + 8 * j);
#pragma unroll
            for (int i = 0; i < 4; i++)
                S[j][i] = fmaf(S[j][i], i % 2 ? decay.y : decay.x,
                               add[(8 * j + i % 2) * LA_WIDTH + i / 2 * 8]);
        }
        add += step * heads * LA_WIDTH * LA_WIDTH;
        through += step * heads * LA_WIDTH;
    }
}

/* Sums of two neighbouring tiles as an operand A of 16 columns. */
static __device__ __forceinline__ void la_operand(uint32_t a[4], const float x[4], const float y[4])
{
    a[0] = fg_pack2(x[0], x[1]);
    a[1] = fg_pack2(x[2], x[3]);
    a[2] = fg_pack2(y[0], y[1]);
    a[3] = fg_pack2(y[2], y[3]);
}
/* Such an operand, columns from k on, to rows m of a matrix in shared memory. */
template <int WIDTH>
static __device__ __forceinline__ void la_share(const uint32_t a[4], bf16 *to, int m, int k)
{
    const int q = threadIdx.x % 32 / 8, i = threadIdx.x % 8;
    const uint32_t at = fg_shared(to) + fg_swizzle<WIDTH>(m + (q & 1) * 8 + i, k / 8 + (q >> 1));
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
                 :: "r"(at), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]) : "memory");
}

/* Such an operand, every 8 x 8 of it turned, to 8 rows each, this thread's at `to`. */
static __device__ __forceinline__ void la_share_turned(const uint32_t a[4], uint32_t to)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
                 :: "r"(to), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]) : "memory");
}

/* e += a x^T: 64 values by the 64 rows of x, over 128 keys */
static __device__ __forceinline__ void la_to_rows(float (&e)[8][4], const uint32_t (&a)[8][4],
                                                  const bf16 *x)
{
    const uint32_t at = fg_shared(x);
#pragma unroll
    for (int k = 0; k < 8; k++)
        product_turned(e, a[k], matrix_at(at + k / 4 * LA_PANEL + k % 4 * 32, 16));
}
/* S += u x: 64 values by 128 keys, over the 64 rows of x */
static __device__ __forceinline__ void la_to_keys(float (&S)[16][4], const uint32_t (&u)[4][4],
                                                  const bf16 *x)
{
    const uint32_t at = fg_shared(x);
#pragma unroll
    for (int k = 0; k < 4; k++) product(S, u[k], matrix_at(at + k * 2048, LA_PANEL));
}

/* decay of the delta rule's chunk, 1 where there are no documents */
static __device__ __forceinline__ float la_keep(const la_chain &c, int64_t b, int64_t chunk)
{
    return c.decay && chunk >= 0 && chunk < c.z.chunks ? c.decay[b * c.z.chunks + chunk] : 1.0f;
}
template <bool DELTA>
static __device__ __forceinline__ void la_decay(float (&S)[16][4], const float *factor, float keep)
{
    const int c = threadIdx.x % 4 * 2;
    if (DELTA && keep == 1) return;
#pragma unroll
    for (int j = 0; j < 16; j++) {
        const float2 d = DELTA ? make_float2(keep, keep) : *(const float2 *)&factor[8 * j + c];
        S[j][0] *= d.x;
        S[j][1] *= d.y;
        S[j][2] *= d.x;
        S[j][3] *= d.y;
    }
}

/* A writer's share of S to its place among the kept. */
static __device__ __forceinline__ void la_keep_state(const bf16 *S, bf16 *to)
{
    const int i = threadIdx.x % 128;
    const char *from = (const char *)S + la_panel(i / 16, i % 16);       /* again every 8 rows */
    to += blockIdx.x * LA_COLUMNS * LA_WIDTH + i * 8;
#pragma unroll
    for (int k = 0; k < LA_COLUMNS / 8; k++)
        *(uint4 *)(to + 8 * k * LA_WIDTH) = *(const uint4 *)(from + k * 1024);
}
/* A warp's 16 rows of x [value][row], turned, to memory. */
static __device__ __forceinline__ void la_keep_rows(const bf16 *x, const la_rows_to &to, int64_t b,
                                                    int64_t h, int64_t t, int n)
{
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2, m = threadIdx.x % 128 / 32 * 16;
    bf16 *p = to.p + b * to.batch + h * to.head + t * to.row + blockIdx.x * LA_COLUMNS + c;
#pragma unroll
    for (int v = 0; v < LA_COLUMNS; v += 16) {
        uint32_t a[4];
        la_a_turned<LA_ROWS>(a, fg_shared(x), m, v);
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (m + g + i % 2 * 8 < n)
                *(uint32_t *)(p + (m + g + i % 2 * 8) * to.row + v + i / 2 * 8) = a[i];
    }
}

/* Between the chain and those who write: S is there, then u.  The fence is for what was fetched
 * too: a thread that fetches would wait there for all that is still on its way. */
#define LA_STATE_THERE 1
#define LA_ROWS_THERE  2
static __device__ __forceinline__ void la_there(int which)
{
    proxy_fence();
    asm volatile("bar.arrive %0, 256;" :: "r"(which) : "memory");
}
static __device__ __forceinline__ void la_await(int which)
{
    asm volatile("bar.sync %0, 256;" :: "r"(which) : "memory");
}

/* o = scale (Q S + A u) by the warpgroup that writes */
template <bool DELTA>
static __device__ __forceinline__ void la_write_out(const la_chain &c, const la_late *late,
                                                    const la_shared<DELTA> *sm, const la_span &s,
                                                    int64_t t, int n)
{
    const int g = threadIdx.x % 32 / 4, m = threadIdx.x % 128 / 32 * 16, cc = threadIdx.x % 4 * 2;
    const uint32_t q = fg_shared(late->q), S = fg_shared(sm->S);
    const uint32_t A = fg_shared(late->A), u = fg_shared(sm->u);
    float o[8][4];
    la_zero<8>(o);
    la_await(LA_STATE_THERE);
    proxy_fence();
    pin(o);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const int at = k / 4 * LA_PANEL + k % 4 * 32;
        product(o, matrix_at(q + at, 16), matrix_at(S + at, 16), 1);
    }
    wgmma_commit();
    la_await(LA_ROWS_THERE);
#pragma unroll
    for (int k = 0; k < 4; k++)
        product(o, matrix_at(A + 32 * k, 16), matrix_at(u + 32 * k, 16), 1);
    wgmma_commit();
    wgmma_wait<0>();
    pin(o);
    bf16 *p = c.o.p + s.b * c.o.batch + s.h * c.o.head + t * c.o.row + blockIdx.x * LA_COLUMNS + cc;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (m + g + 8 * i < n)
                *(uint32_t *)(p + (m + g + 8 * i) * c.o.row + 8 * j) =
                    fg_pack2(c.z.scale * o[j][2 * i], c.z.scale * o[j][2 * i + 1]);
}

/* 16 columns of the rows that are given, turned; 0 where none are. */
static __device__ __forceinline__ void la_given(uint32_t (&u)[4][4], const bf16 *from)
{
#pragma unroll
    for (int k = 0; k < 4; k++) {
        u[k][0] = u[k][1] = u[k][2] = u[k][3] = 0;
        if (from) la_a_turned<LA_COLUMNS>(u[k], fg_shared(from), la_own_values(), 16 * k);
    }
}
/* The state as an operand, and a copy of it. */
static __device__ __forceinline__ void la_take(uint32_t (&a)[8][4], const float (&S)[16][4],
                                               bf16 *to)
{
#pragma unroll
    for (int k = 0; k < 8; k++) {
        la_operand(a[k], S[2 * k], S[2 * k + 1]);
        if (to) la_share<64>(a[k], to + k / 4 * (LA_PANEL / 2), la_own_values(), k % 4 * 16);
    }
    if (to) la_there(LA_STATE_THERE);
    else proxy_fence();
}

/* One chunk on the way forward: shares S before it, and u (or e), leaves S behind it. */
template <bool DELTA, la_purpose FOR>
static __device__ __forceinline__ void la_step(float (&S)[16][4], la_stage<DELTA> *s, bf16 *S_to,
                                               bf16 *u_to, float keep, bool given)
{
    const int m = la_own_values(), c = threadIdx.x % 4 * 2;
    uint32_t u[4][4];
    uint32_t a[8][4];
    if (DELTA || FOR != LA_END) la_take(a, S, FOR == LA_END ? nullptr : S_to);
    else proxy_fence();
    if (DELTA) {
        float e[8][4];
        la_zero<8>(e);
        pin(e), pin(a);
        wgmma_begin();
        la_to_rows(e, a, s->w);
        wgmma_commit();
        la_given(u, given ? s->u : nullptr);
        wgmma_wait<0>();
        pin(e), pin(a);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 beta = *(const float2 *)&s->factor[8 * j + c];
            const uint32_t x = u[j / 2][j % 2 * 2], y = u[j / 2][j % 2 * 2 + 1];
            e[j][0] = la_low_half(x) - e[j][0];
            e[j][1] = la_high_half(x) - e[j][1];
            e[j][2] = la_low_half(y) - e[j][2];
            e[j][3] = la_high_half(y) - e[j][3];
            if (FOR == LA_KEEP) {
                u[j / 2][j % 2 * 2] = fg_pack2(e[j][0], e[j][1]);
                u[j / 2][j % 2 * 2 + 1] = fg_pack2(e[j][2], e[j][3]);
            }
            e[j][0] *= beta.x;
            e[j][1] *= beta.y;
            e[j][2] *= beta.x;
            e[j][3] *= beta.y;
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (FOR == LA_KEEP) la_share<LA_ROWS>(u[k], u_to, m, 16 * k);
            la_operand(u[k], e[2 * k], e[2 * k + 1]);
        }
    } else {
        la_given(u, s->u);
    }
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (FOR == LA_OUT) la_share<LA_ROWS>(u[k], u_to, m, 16 * k);
    if (FOR != LA_END) la_there(LA_ROWS_THERE);
    la_decay<DELTA>(S, s->factor, keep);
    pin(S), pin(u);
    wgmma_begin();
    la_to_keys(S, u, s->k);
    wgmma_commit();
    wgmma_wait<0>();
    pin(S), pin(u);
}

/* x - a, a being what bf16 holds of it */
static __device__ __forceinline__ uint32_t la_rest(const float *x, uint32_t a)
{
    return fg_pack2(x[0] - la_low_half(a), x[1] - la_high_half(a));
}
/* Byte offset, in what passes through a segment, of keys k, k + 1 of row v of P^T. */
#define LA_THROUGH (LA_WIDTH * LA_WIDTH)         /* bf16; behind P^T the rest of its rounding */
static __device__ __forceinline__ uint32_t la_through_at(int v, int k)
{
    return (uint32_t)(k / 64 * (2 * LA_PANEL)) + fg_swizzle<64>(v, k % 64 / 8) + k % 8 * 2;
}

/* S = P S + what a segment adds, for the first segments of a chain of the delta rule.  P and S are
 * split in two bf16 each, so that next to nothing is lost.  P goes through where the last chunk of
 * all stages will be. */
static __device__ __forceinline__ void la_pass(float (&S)[16][4], const la_chain &c,
                                               la_shared<true> *sm, int64_t bh, int64_t count)
{
    const int64_t heads = c.z.B * c.z.H;
    const uint32_t P = fg_shared(&sm->stage[LA_STAGES - 1]);
    const uint32_t rest = fg_shared(&sm->late[LA_STAGES - 1]);
#pragma unroll 1
    for (int64_t n = 0; n < count; n++) {
        const bf16 *from = (const bf16 *)c.through + (n * heads + bh) * 2 * LA_THROUGH
                           + threadIdx.x * 8;
        for (int i = 0; i < LA_THROUGH; i += 128 * 8) {
            fg_copy_async(P + (threadIdx.x * 8 + i) * 2, from + i, true);
            fg_copy_async(rest + (threadIdx.x * 8 + i) * 2, from + LA_THROUGH + i, true);
        }
        fg_copy_commit();
        uint32_t high[8][4], low[8][4];
#pragma unroll
        for (int k = 0; k < 8; k++) {
            la_operand(high[k], S[2 * k], S[2 * k + 1]);
#pragma unroll
            for (int i = 0; i < 4; i++)
                low[k][i] = la_rest(&S[2 * k + i / 2][i % 2 * 2], high[k][i]);
        }
        la_state_in(S, c.ends + (n * heads + bh) * LA_WIDTH * LA_WIDTH, 1);
        fg_copy_wait<0>();
        proxy_fence();
        asm volatile("bar.sync 3, 128;" ::: "memory");
        pin(S), pin(high), pin(low);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < 8; k++) {
            product(S, high[k], matrix_at(P + k * 2048, 2 * LA_PANEL));
            product(S, low[k], matrix_at(P + k * 2048, 2 * LA_PANEL));
            product(S, high[k], matrix_at(rest + k * 2048, 2 * LA_PANEL));
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin(S), pin(high), pin(low);
        asm volatile("bar.sync 3, 128;" ::: "memory");
    }
}

/* From the first chunk of the segment to its last: the warpgroup that carries the state, */
template <bool DELTA, la_purpose FOR>
static __device__ __forceinline__ void la_carry(const la_chain &c, la_shared<DELTA> *sm)
{
    const la_span s = la_own_span(c);
    const int64_t size = LA_WIDTH * LA_WIDTH;
    const int chunks = (int)(s.to - s.from);
    float S[16][4];
    float keep = DELTA ? la_keep(c, s.b, s.from) : 1;
    la_state_in(S, la_carried(c.z, s.b) ? c.z.state + s.bh * size : nullptr, 1);
    if constexpr (DELTA) la_pass(S, c, sm, s.bh, s.segment);
    else la_pass(S, c, s.bh, 0, s.segment, 1);
    __syncthreads();
    for (int i = 0; i < chunks; i++) {
        const float next = DELTA ? la_keep(c, s.b, s.from + i + 1) : 1;
        la_step<DELTA, FOR>(S, &sm->stage[i % LA_STAGES], sm->S, sm->u, keep, true);
        keep = next;
        __syncthreads();
    }
    if (c.to && s.segment == c.segments - 1) la_state_out(S, c.to + s.bh * size, 1);
}
/* and those who write o or, LA_KEEP, the states, and e of the delta rule. */
template <bool DELTA, la_purpose FOR>
static __device__ __forceinline__ void la_write(const la_chain &c, const la_shared<DELTA> *sm)
{
    const la_span s = la_own_span(c);
    const int chunks = (int)(s.to - s.from);
    __syncthreads();
    for (int i = 0; i < chunks; i++) {
        const int64_t chunk = s.from + i, t = chunk * LA_ROWS;
        const int n = la_rows(c.z, chunk);
        if (FOR == LA_OUT) {
            la_write_out<DELTA>(c, &sm->late[i % LA_STAGES], sm, s, t, n);
        } else {
            la_await(LA_STATE_THERE);
            la_keep_state(sm->S, c.kept + (s.bh * c.z.chunks + chunk) * LA_WIDTH * LA_WIDTH);
            la_await(LA_ROWS_THERE);
            if (DELTA) la_keep_rows(sm->u, c.o, s.b, s.h, t, n);
        }
        __syncthreads();
    }
}
/* The last BY threads fetch chunk after chunk; late: q and A too, or NULL. */
template <bool DELTA, int BY>
static __device__ __forceinline__ void la_supply(const la_chain &c, la_stage<DELTA> *stage,
                                                 la_late *late, bool back)
{
    const la_span s = la_own_span(c);
    const int chunks = (int)(s.to - s.from);
    for (int j = 0; j < chunks + LA_STAGES - 1; j++) {
        const int64_t chunk = back ? s.to - 1 - j : s.from + j;
        if (j < chunks) {
            la_fetch<DELTA, BY>(c, &stage[j % LA_STAGES], s.bh, chunk);
            if (BY == 128 && late) la_fetch_late(c, &late[j % LA_STAGES], s.bh, chunk);
        }
        fg_copy_commit();
        if (j < LA_STAGES - 2) continue;
        fg_copy_wait<LA_STAGES - 2>();           /* what the next step needs is there */
        __syncthreads();
    }
}

/* One chunk on the way back, in units of scale: shares R behind it, and gu, leaves R before it. */
template <bool DELTA>
static __device__ __forceinline__ void la_step_back(float (&R)[16][4], la_stage<DELTA> *s,
                                                    la_late *late, bf16 *R_to, bf16 *u_to,
                                                    float keep, float scale)
{
    const int m = la_own_values(), c = threadIdx.x % 4 * 2;
    uint32_t go[4][4], u[4][4], a[8][4];
    float gu[8][4];
    la_take(a, R, R_to);
    la_given(go, s->u);
    la_zero<8>(gu);
    la_decay<DELTA>(R, s->factor, keep);
    pin(gu), pin(go), pin(a), pin(R);
    wgmma_begin();
    const uint32_t A = fg_shared(late->A);
#pragma unroll
    for (int k = 0; k < 4; k++) product(gu, go[k], matrix_at(A + k * 2048, LA_PANEL));
    la_to_rows(gu, a, s->k);
    wgmma_commit();
    la_to_keys(R, go, late->q);
    wgmma_commit();
    wgmma_wait<1>();
    pin(gu), pin(a);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float2 beta = DELTA ? *(const float2 *)&s->factor[8 * j + c] : make_float2(0, 0);
        u[j / 2][j % 2 * 2] = fg_pack2(-beta.x * gu[j][0], -beta.y * gu[j][1]);
        u[j / 2][j % 2 * 2 + 1] = fg_pack2(-beta.x * gu[j][2], -beta.y * gu[j][3]);
#pragma unroll
        for (int f = 0; f < 4; f++) gu[j][f] *= scale;
    }
    if (DELTA) {
        pin(u);
        wgmma_begin();
        la_to_keys(R, u, s->w);
        wgmma_commit();
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
        uint32_t x[4];
        la_operand(x, gu[2 * k], gu[2 * k + 1]);
        la_share<LA_ROWS>(x, u_to, m, 16 * k);
    }
    la_there(LA_ROWS_THERE);
    wgmma_wait<0>();
    pin(R), pin(go), pin(u);
}

/* From the last chunk of the segment to its first. */
template <bool DELTA>
static __device__ __forceinline__ void la_carry_back(const la_chain &c, la_shared<DELTA> *sm)
{
    const la_span s = la_own_span(c);
    const int64_t size = LA_WIDTH * LA_WIDTH;
    const int chunks = (int)(s.to - s.from);
    float R[16][4];
    float keep = DELTA ? la_keep(c, s.b, s.to - 1) : 1;
    la_state_in(R, c.from ? c.from + s.bh * size : nullptr, 1 / c.z.scale);
    if (!DELTA) la_pass(R, c, s.bh, c.segments - 1, c.segments - 1 - s.segment, -1);
    __syncthreads();
    for (int i = 0; i < chunks; i++) {
        const int at = i % LA_STAGES;
        const float before = DELTA ? la_keep(c, s.b, s.to - 2 - i) : 1;
        la_step_back<DELTA>(R, &sm->stage[at], &sm->late[at], sm->S, sm->u, keep, c.z.scale);
        keep = before;
        __syncthreads();
    }
    if (s.segment > 0) return;
    if (!la_carried(c.z, s.b)) la_zero<16>(R);
    la_state_out(R, c.to + s.bh * size, c.z.scale);
}
template <bool DELTA>
static __device__ __forceinline__ void la_write_back(const la_chain &c, const la_shared<DELTA> *sm)
{
    const la_span s = la_own_span(c);
    const int chunks = (int)(s.to - s.from);
    __syncthreads();
    for (int i = 0; i < chunks; i++) {
        const int64_t chunk = s.to - 1 - i;
        la_await(LA_STATE_THERE);
        la_keep_state(sm->S, c.kept + (s.bh * c.z.chunks + chunk) * LA_WIDTH * LA_WIDTH);
        la_await(LA_ROWS_THERE);
        la_keep_rows(sm->u, c.o, s.b, s.h, chunk * LA_ROWS, la_rows(c.z, chunk));
        __syncthreads();
    }
}
#endif

/* Registers of a thread of the three warpgroups: 384 have 168 each. */
#define LA_CARRIES registers_up<240>()
#define LA_WRITES  registers_down<136>()
#define LA_FETCHES registers_down<128>()

template <bool DELTA>
static __global__ void __launch_bounds__(LA_THREADS, 1)
la_forward(const __grid_constant__ la_chain c)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) char memory[];
    la_shared<DELTA> *sm = (la_shared<DELTA> *)memory;
    if (la_is_chain()) {
        LA_CARRIES;
        la_carry<DELTA, LA_OUT>(c, sm);
    } else if (la_is_writer()) {
        LA_WRITES;
        la_write<DELTA, LA_OUT>(c, sm);
    } else {
        LA_FETCHES;
        la_supply<DELTA, 128>(c, sm->stage, sm->late, false);
    }
#endif
}
/* The two ways of the gradient do not need each other: half the blocks go forth, half back. */
template <bool DELTA>
static __global__ void __launch_bounds__(LA_THREADS, 1)
la_both_ways(const __grid_constant__ la_chain forth, const __grid_constant__ la_chain back)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) char memory[];
    la_shared<DELTA> *sm = (la_shared<DELTA> *)memory;
    if (la_is_chain()) {
        LA_CARRIES;
        if (blockIdx.z) la_carry<DELTA, LA_KEEP>(forth, sm);
        else la_carry_back<DELTA>(back, sm);
    } else if (la_is_writer()) {
        LA_WRITES;
        if (blockIdx.z) la_write<DELTA, LA_KEEP>(forth, sm);
        else la_write_back<DELTA>(back, sm);
    } else {
        LA_FETCHES;
        if (blockIdx.z) la_supply<DELTA, 128>(forth, sm->stage, nullptr, false);
        else la_supply<DELTA, 128>(back, sm->stage, sm->late, true);
    }
#endif
}

/* ---- segments: what each adds to a state of 0 ------------------------------------------------ */

/* Of the delta rule two warpgroups carry, what a segment adds to 0 and what it makes of 1; of the
 * others there are two blocks, forth and back. */
template <bool DELTA> constexpr int la_end_carriers = DELTA ? 2 : 1;
template <bool DELTA> constexpr int la_end_fetchers = DELTA ? 128 : 64;
template <bool DELTA>
constexpr int la_end_threads = 128 * la_end_carriers<DELTA> + la_end_fetchers<DELTA>;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
/* S^T of a segment that began with 1, in two bf16, as wgmma reads it. */
static __device__ __forceinline__ void la_through_out(const float (&S)[16][4], bf16 *to)
{
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
    const int v = blockIdx.x * LA_COLUMNS + la_own_values() + g;
#pragma unroll
    for (int j = 0; j < 16; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t at = la_through_at(v + 8 * i, 8 * j + c) / 2;
            const uint32_t high = fg_pack2(S[j][2 * i], S[j][2 * i + 1]);
            *(uint32_t *)(to + at) = high;
            *(uint32_t *)(to + LA_THROUGH + at) = la_rest(&S[j][2 * i], high);
        }
}

/* Of the way back, k and u are q and go. */
template <bool DELTA>
static __device__ __forceinline__ void la_carry_end(const la_chain &c, la_stage<DELTA> *stage)
{
    const la_span s = la_own_span(c);
    const int64_t at = s.segment * c.z.B * c.z.H + s.bh;
    const int chunks = (int)(s.to - s.from);
    const bool unit = threadIdx.x >= 128;
    float S[16][4];
    float keep = DELTA ? la_keep(c, s.b, s.from) : 1;
    la_start(S, unit);
    __syncthreads();
    for (int i = 0; i < chunks; i++) {
        const float next = DELTA ? la_keep(c, s.b, s.from + i + 1) : 1;
        la_step<DELTA, LA_END>(S, &stage[i % LA_STAGES], nullptr, nullptr, keep, !unit);
        keep = next;
        __syncthreads();
    }
    if (!unit) la_state_out(S, c.ends + at * LA_WIDTH * LA_WIDTH, 1);
    else la_through_out(S, (bf16 *)c.through + at * 2 * LA_THROUGH);
    if (DELTA || blockIdx.x) return;
    const float *decay = c.decay + (s.bh * c.z.chunks + s.from) * LA_WIDTH + threadIdx.x;
    float all = 1;
    for (int i = 0; i < chunks; i++) all *= decay[i * LA_WIDTH];
    c.through[at * LA_WIDTH + threadIdx.x] = all;
}
#endif

/* The first segment of all is not needed back, the last not forth. */
template <bool DELTA>
static __global__ void __launch_bounds__(la_end_threads<DELTA>, DELTA ? 1 : 2)
la_ends(const __grid_constant__ la_chain forth, const __grid_constant__ la_chain back)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) char memory[];
    la_stage<DELTA> *stage = (la_stage<DELTA> *)memory;
    const int64_t segment = la_own_span(forth).segment;
    if (blockIdx.z ? segment == 0 : segment == forth.segments - 1) return;
    if (threadIdx.x < 128 * la_end_carriers<DELTA>)
        la_carry_end<DELTA>(blockIdx.z ? back : forth, stage);
    else
        la_supply<DELTA, la_end_fetchers<DELTA>>(blockIdx.z ? back : forth, stage, nullptr,
                                                 blockIdx.z);
#endif
}

/* The ends of a chain, or of one forth and one back. */
template <bool DELTA>
static void la_run_ends(const la_chain &forth, const la_chain *back, cudaStream_t stream)
{
    la_chain other = back ? *back : forth;
    const int64_t heads = forth.z.B * forth.z.H;
    const int bytes = (int)sizeof(la_stage<DELTA>) * LA_STAGES;
    const dim3 grid(LA_WIDTH / LA_COLUMNS, (unsigned)(heads * forth.segments), back ? 2 : 1);
    other.k = other.q;
    cudaFuncSetAttribute(la_ends<DELTA>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    la_ends<DELTA><<<grid, la_end_threads<DELTA>, bytes, stream>>>(forth, other);
}

/* As many segments as give every multiprocessor a block, if they are not too short to pay. */
static inline int64_t la_segments(const la_task &z)
{
    const int64_t wanted = fg_processors() / (z.B * z.H * (LA_WIDTH / LA_COLUMNS));
    const int64_t most = z.chunks / 8;
    return wanted < 1 || most < 1 ? 1 : wanted < most ? wanted : most;
}
/* Segments of a chain; ends NULL: one. */
static inline void la_cut_up(la_chain *c, const la_task &z, float *ends, float *through)
{
    c->segments = ends ? la_segments(z) : 1;
    c->per = (z.chunks + c->segments - 1) / c->segments;
    c->segments = (z.chunks + c->per - 1) / c->per;
    c->ends = ends, c->through = through;
}

template <bool DELTA> static void la_run_forward(const la_chain &c, cudaStream_t stream)
{
    const int bytes = (int)sizeof(la_shared<DELTA>);
    const dim3 grid(LA_WIDTH / LA_COLUMNS, (unsigned)(c.z.B * c.z.H * c.segments));
    if (c.segments > 1) la_run_ends<DELTA>(c, nullptr, stream);
    cudaFuncSetAttribute(la_forward<DELTA>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    la_forward<DELTA><<<grid, LA_THREADS, bytes, stream>>>(c);
}
/* Of the delta rule in one segment: three ends more would cost what the chain gains. */
template <bool DELTA>
static void la_run_both_ways(const la_chain &forth, const la_chain &back, cudaStream_t stream)
{
    const int bytes = (int)sizeof(la_shared<DELTA>);
    const dim3 grid(LA_WIDTH / LA_COLUMNS, (unsigned)(forth.z.B * forth.z.H * forth.segments), 2);
    if constexpr (!DELTA) if (forth.segments > 1) la_run_ends<DELTA>(forth, &back, stream);
    cudaFuncSetAttribute(la_both_ways<DELTA>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    la_both_ways<DELTA><<<grid, LA_THREADS, bytes, stream>>>(forth, back);
}

/* Cuts bytes off scratch, 256-byte aligned; base NULL: only counts. */
static inline void *la_cut(char *base, size_t *used, size_t bytes)
{
    void *p = base ? base + *used : nullptr;
    *used += (bytes + 255) / 256 * 256;
    return p;
}
/* Room for ends, of the way back too, and for what passes through: decays, or matrices. */
static inline void la_cut_ends(char *base, size_t *used, const la_task &z, bool back, bool matrices,
                               float **ends, float **through)
{
    const int64_t segments = la_segments(z);
    const size_t row = (size_t)(segments * z.B * z.H) * LA_WIDTH * sizeof(float);
    for (int i = 0; i <= back; i++) ends[i] = (float *)la_cut(base, used, row * LA_WIDTH);
    *through = (float *)la_cut(base, used, matrices ? row * LA_WIDTH : row);
}
#endif
