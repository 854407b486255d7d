/* linear_attention_step.cuh - one chunk of the chain that carries the state of linear attention:
 * products alone (W, diag(beta) of the delta rule only):
 *
 *     e = U - W S,  u = diag(beta) e       o = scale (Q S + A u)       S' = diag(decay) S + K^T u
 *     gu = scale A^T go + K R           R' = diag(decay) R + scale Q^T go - W^T diag(beta) gu
 *
 * R, the gradient of S, goes from the last chunk to the first.  Both stay in registers in f32;
 * operands are rounded to bf16, and come by the copy engine. */
#ifndef FG_LINEAR_ATTENTION_STEP_CUH
#define FG_LINEAR_ATTENTION_STEP_CUH
#include "linear_attention.cuh"
#include "tensor_map.cuh"
#include "wgmma.cuh"

/* A matrix of rows: row t of head bh stands at p + b batch + h head + t row. */
struct la_rows_of { const bf16 *p; int64_t batch, head, row; };
struct la_rows_to { bf16 *p; int64_t batch, head, row; };

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
    bf16 k[LA_ROWS * LA_WIDTH], w[DELTA ? LA_ROWS * LA_WIDTH : 512];     /* in panels */
    bf16 u[LA_ROWS * LA_COLUMNS];
    float factor[LA_WIDTH];                      /* beta of rows, or decay of channels */
};
struct alignas(1024) la_late { bf16 q[LA_ROWS * LA_WIDTH], A[LA_ROWS * LA_ROWS]; };
template <bool DELTA> struct la_shared {
    la_stage<DELTA> stage[LA_STAGES];
    la_late late[LA_STAGES];
    bf16 S[LA_COLUMNS * LA_WIDTH];               /* [value][key] in panels */
    bf16 u[LA_COLUMNS * LA_ROWS];                /* [row][value] */
    uint64_t come[LA_STAGES];                    /* barriers: a chunk is there */
};
/* For the copy engine. */
struct la_maps { CUtensorMap k, w, u, q, A, o, kept; };

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

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
/* Boxes of the rows of a chunk on their way, by one thread: WIDTH columns from d on. */
template <int WIDTH>
static __device__ __forceinline__ void la_box(bf16 *to, const CUtensorMap *map,
                                              const la_rows_of &x, const la_span &s, int64_t chunk,
                                              int d, uint32_t bar)
{
    const bool mixed = x.head == LA_WIDTH;       /* rows of all heads lie side by side */
#pragma unroll
    for (int i = 0; i < WIDTH / 64; i++)
        fg_box_load(fg_shared(to) + i * LA_PANEL, map, d + 64 * i, mixed ? (int)s.h : 0,
                    (int)chunk * LA_ROWS, (int)(mixed ? s.b : s.bh), bar);
}
template <bool DELTA>
static __device__ __forceinline__ void la_fetch(const la_chain &c, const la_maps &m,
                                                const la_span &s, int64_t chunk,
                                                la_stage<DELTA> *to, la_late *late, uint32_t bar)
{
    const int rows = LA_PANEL * 2, factors = (DELTA ? LA_ROWS : LA_WIDTH) * (int)sizeof(float);
    const la_rows_of A = { c.A, 0, 0, LA_ROWS };
    fg_expect(bar, (DELTA ? 2 : 1) * rows + LA_PANEL + factors + (late ? rows + LA_PANEL : 0));
    la_box<LA_WIDTH>(to->k, &m.k, c.k, s, chunk, 0, bar);
    if (DELTA) la_box<LA_WIDTH>(to->w, &m.w, c.w, s, chunk, 0, bar);
    la_box<LA_COLUMNS>(to->u, &m.u, c.u, s, chunk, blockIdx.x * LA_COLUMNS, bar);
    const int64_t at = s.bh * c.z.chunks + chunk;
    fg_bulk_load(fg_shared(to->factor), DELTA ? c.beta + at * LA_ROWS : c.decay + at * LA_WIDTH,
                 factors, bar);
    if (!late) return;
    la_box<LA_WIDTH>(late->q, &m.q, c.q, s, chunk, 0, bar);
    la_box<LA_ROWS>(late->A, &m.A, A, s, chunk, 0, bar);
}
/* Rows without the flag to 0, by two threads a row. */
static __device__ __forceinline__ void la_hide(bf16 *x, const uint8_t *flags, int bit)
{
    const int r = threadIdx.x % 128 / 2, panel = threadIdx.x % 2;
    if (flags[r] & bit) return;
#pragma unroll
    for (int i = 0; i < 8; i++)
        *(uint4 *)((char *)x + panel * LA_PANEL + r * 128 + i * 16) = make_uint4(0, 0, 0, 0);
}
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
/* Sums of two neighbouring tiles as an operand A of 16 columns. */
static __device__ __forceinline__ void la_operand(uint32_t a[4], const float x[4], const float y[4])
{
    a[0] = fg_pack2(x[0], x[1]);
    a[1] = fg_pack2(x[2], x[3]);
    a[2] = fg_pack2(y[0], y[1]);
    a[3] = fg_pack2(y[2], y[3]);
}
/* x - a, a being what bf16 holds of it */
static __device__ __forceinline__ uint32_t la_rest(const float *x, uint32_t a)
{
    return fg_pack2(x[0] - la_low_half(a), x[1] - la_high_half(a));
}
/* Such an operand, columns from k on, to rows m of a matrix in shared memory. */
template <int WIDTH>
static __device__ __forceinline__ void la_share(const uint32_t a[4], bf16 *to, int m, int k)
{
    const int q = threadIdx.x % 32 / 8, i = threadIdx.x % 8;
    const uint32_t at = fg_shared(to) + fg_swizzle<WIDTH>(m + (q & 1) * 8 + i, k / 8 + (q >> 1));
    store_matrices(at, a[0], a[1], a[2], a[3]);
}

/* The same turned, to columns m of rows k on. */
template <int WIDTH>
static __device__ __forceinline__ void la_share_turned(const uint32_t a[4], bf16 *to, int m, int k)
{
    const int q = threadIdx.x % 32 / 8, i = threadIdx.x % 8;
    const uint32_t at = fg_shared(to) + fg_swizzle<WIDTH>(k + (q >> 1) * 8 + i, m / 8 + (q & 1));
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
                 :: "r"(at), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]) : "memory");
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

/* sm->S to its place among the kept, and sm->u to its rows; by one thread. */
static __device__ __forceinline__ void la_store_state(const bf16 *S, const la_maps &m, int64_t tile)
{
#pragma unroll
    for (int i = 0; i < 2; i++)
        fg_box_store(&m.kept, 64 * i, 0, blockIdx.x * LA_COLUMNS, (int)tile,
                     fg_shared(S) + i * LA_PANEL);
}
static __device__ __forceinline__ void la_store_rows(const bf16 *u, const la_maps &m,
                                                     const la_rows_to &to, const la_span &s,
                                                     int64_t chunk)
{
    const bool mixed = to.head == LA_WIDTH;
    fg_box_store(&m.o, blockIdx.x * LA_COLUMNS, mixed ? (int)s.h : 0, (int)chunk * LA_ROWS,
                 (int)(mixed ? s.b : s.bh), fg_shared(u));
}

/* o = scale (Q S + A u), by the warpgroup that writes, to where u was */
template <bool DELTA>
static __device__ __forceinline__ void la_make_out(const la_late *late, la_shared<DELTA> *sm,
                                                   float scale)
{
    const uint32_t q = fg_shared(late->q), S = fg_shared(sm->S);
    const uint32_t A = fg_shared(late->A), u = fg_shared(sm->u);
    float o[8][4];
    la_await(LA_STATE_THERE);
    proxy_fence();
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const int at = k / 4 * LA_PANEL + k % 4 * 32;
        product(o, matrix_at(q + at, 16), matrix_at(S + at, 16), k);
    }
    wgmma_commit();
    la_await(LA_ROWS_THERE);
#pragma unroll
    for (int k = 0; k < 4; k++)
        product_rows<false>(o, matrix_at(A + 32 * k, 16), matrix_at(u + k * 2048, LA_PANEL), 1);
    wgmma_commit();
    wgmma_wait<0>();
    pin(o);
    asm volatile("bar.sync 3, 128;" ::: "memory");
#pragma unroll
    for (int k = 0; k < 4; k++) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 8; i++) o[2 * k + i / 4][i % 4] *= scale;
        la_operand(a, o[2 * k], o[2 * k + 1]);
        la_share<64>(a, sm->u, threadIdx.x % 128 / 32 * 16, 16 * k);
    }
    proxy_fence();
    asm volatile("bar.sync 3, 128;" ::: "memory");
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
            if (FOR == LA_KEEP) la_share_turned<LA_COLUMNS>(u[k], u_to, m, 16 * k);
            la_operand(u[k], e[2 * k], e[2 * k + 1]);
        }
    } else {
        la_given(u, s->u);
    }
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (FOR == LA_OUT) la_share_turned<LA_COLUMNS>(u[k], u_to, m, 16 * k);
    if (FOR != LA_END) la_there(LA_ROWS_THERE);
    la_decay<DELTA>(S, s->factor, keep);
    pin(S), pin(u);
    wgmma_begin();
    la_to_keys(S, u, s->k);
    wgmma_commit();
    wgmma_wait<0>();
    pin(S), pin(u);
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
        la_share_turned<LA_COLUMNS>(x, u_to, m, 16 * k);
    }
    la_there(LA_ROWS_THERE);
    wgmma_wait<0>();
    pin(R), pin(go), pin(u);
}
#endif
#endif
