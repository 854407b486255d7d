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

/* ---- the chain ------------------------------------------------------------------------------- */

/* A matrix of rows: row t of head bh stands at p + b batch + h head + t row. */
struct la_rows_of { const bf16 *p; int64_t batch, head, row; };
struct la_rows_to { bf16 *p; int64_t batch, head, row; };
static __device__ __forceinline__ const bf16 *la_at(const la_rows_of &x, int64_t b, int64_t h,
                                                    int64_t t)
{
    return x.p + b * x.batch + h * x.head + t * x.row;
}

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

/* What a step needs: of the chain, and of those who write o one step behind it. */
/* How a chain runs: columns of values of a block, chunks in shared memory at a time.  The gradient
 * of the delta rule has the longest steps and gains nothing from segments. */
template <bool DELTA, int COLUMNS, int STAGES> struct la_form {
    static constexpr bool delta = DELTA;
    static constexpr int columns = COLUMNS, stages = STAGES, carriers = COLUMNS / 16;
};
using la_gated = la_form<false, 64, 3>;
using la_delta = la_form<true, 64, 2>;
using la_delta_back = la_form<true, 32, 3>;
template <class F> struct alignas(1024) la_stage {
    bf16 k[LA_ROWS * LA_WIDTH], w[F::delta ? LA_ROWS * LA_WIDTH : 64];
    bf16 u[LA_ROWS * F::columns];
    float factor[LA_WIDTH];                      /* beta of rows, or decay of channels */
};
struct alignas(1024) la_late { bf16 q[LA_ROWS * LA_WIDTH], A[LA_ROWS * LA_ROWS]; };
template <class F> struct la_shared {
    la_stage<F> stage[F::stages];
    la_late late[F::stages];
    bf16 S[2][F::columns * LA_WIDTH];     /* [value][key] */
    bf16 u[2][F::columns * LA_ROWS];      /* [value][row] */
};

/* What the chain is run for: o, what the gradient wants kept, or the end of a segment alone. */
enum la_purpose { LA_OUT, LA_KEEP, LA_END };

/* The first warps carry 16 columns of values each, transposed: S^T is the operand of W S as it
 * stands in registers, and u^T that of K^T u, so nothing passes between warps on the way.  The next
 * two fetch; the last write o, or what is kept, one step behind.  (Warp w runs on scheduler w % 4:
 * where two carry, the two that write leave those schedulers to them, and two have no work.) */
template <class F, la_purpose FOR>
constexpr int la_writers = FOR == LA_END ? 0 : FOR == LA_KEEP || F::delta ? 2 : 4;
template <class F, la_purpose FOR>
constexpr int la_threads =
    32 * (F::carriers + 2 + la_writers<F, FOR> + (F::carriers == 2 && FOR == LA_KEEP ? 2 : 0));
template <class F> static __device__ __forceinline__ bool la_is_chain()
{
    return threadIdx.x / 32 < F::carriers;
}
template <class F> static __device__ __forceinline__ bool la_is_fetcher()
{
    return threadIdx.x / 32 - F::carriers < 2;
}
/* Below 0: does not write. */
template <class F, la_purpose FOR> static __device__ __forceinline__ int la_writer()
{
    return (int)threadIdx.x / 32 - (la_threads<F, FOR> / 32 - la_writers<F, FOR>);
}

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

template <class F>
static __device__ __forceinline__ void la_fetch(const la_chain &c, la_stage<F> *s, int64_t bh,
                                                int64_t chunk)
{
    const int64_t b = bh / c.z.H, h = bh % c.z.H, t = chunk * LA_ROWS;
    const int n = la_rows(c.z, chunk), i = threadIdx.x % 64;
    const uint8_t *flags = c.flags ? c.flags + (b * c.z.chunks + chunk) * LA_ROWS : nullptr;
    la_load<LA_WIDTH, 64>(s->k, la_at(c.k, b, h, t), c.k.row, n, i, flags, LA_PASSES);
    const bf16 *u = la_at(c.u, b, h, t) + blockIdx.x * F::columns;
    if (c.u.p) la_load<F::columns, 64>(s->u, u, c.u.row, n, i);
    if (F::delta) la_load<LA_WIDTH, 64>(s->w, la_at(c.w, b, h, t), c.w.row, n, i);
    const float *factor = F::delta ? c.beta + (bh * c.z.chunks + chunk) * LA_ROWS
                                : c.decay + (bh * c.z.chunks + chunk) * LA_WIDTH;
    if (i < (F::delta ? LA_ROWS : LA_WIDTH) / 4)
        fg_copy_async(fg_shared(s->factor + 4 * i), factor + 4 * i, true);
}
static __device__ __forceinline__ void la_fetch_late(const la_chain &c, la_late *s, int64_t bh,
                                                     int64_t chunk)
{
    const int64_t b = bh / c.z.H, h = bh % c.z.H, t = chunk * LA_ROWS;
    const int n = la_rows(c.z, chunk), i = threadIdx.x % 64;
    const uint8_t *flags = c.flags ? c.flags + (b * c.z.chunks + chunk) * LA_ROWS : nullptr;
    la_load<LA_WIDTH, 64>(s->q, la_at(c.q, b, h, t), c.q.row, n, i, flags, LA_REACHED);
    la_load<LA_ROWS, 64>(s->A, c.A + (bh * c.z.chunks + chunk) * LA_ROWS * LA_ROWS, LA_ROWS,
                         LA_ROWS, i);
}

/* A warp's columns of a [key][value] matrix in f32 to fragments of its transpose, and back. */
template <class F>
static __device__ __forceinline__ int la_state_at()
{
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
    return c * LA_WIDTH + blockIdx.x * F::columns + threadIdx.x / 32 * 16 + g;
}
template <class F>
static __device__ __forceinline__ void la_state_in(float S[16][4], const float *from, float scale)
{
    la_zero<16>(S);
    if (!from) return;
    from += la_state_at<F>();
#pragma unroll
    for (int j = 0; j < 16; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) S[j][i] = scale * from[(8 * j + i % 2) * LA_WIDTH + i / 2 * 8];
}
template <class F>
static __device__ __forceinline__ void la_state_out(const float S[16][4], float *to, float scale)
{
    to += la_state_at<F>();
#pragma unroll
    for (int j = 0; j < 16; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) to[(8 * j + i % 2) * LA_WIDTH + i / 2 * 8] = scale * S[j][i];
}
/* 0, or 1 on the diagonal */
template <class F>
static __device__ __forceinline__ void la_start(float S[16][4], bool unit)
{
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
    const int v = blockIdx.x * F::columns + threadIdx.x / 32 * 16 + g;
#pragma unroll
    for (int j = 0; j < 16; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            S[j][i] = unit && 8 * j + c + i % 2 == v + i / 2 * 8 ? 1 : 0;
}
/* S = diag(through) S + what a segment adds, for segments from first on to last, step by step, of
 * a chain whose decays are known. */
template <class F>
static __device__ __forceinline__ void la_pass(float S[16][4], const la_chain &c, int64_t bh,
                                               int64_t first, int64_t count, int64_t step)
{
    const int64_t heads = c.z.B * c.z.H;
    const float *add = c.ends + (first * heads + bh) * LA_WIDTH * LA_WIDTH + la_state_at<F>();
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
#if __CUDA_ARCH__ >= 900
    const int q = threadIdx.x % 32 / 8, i = threadIdx.x % 8;
    const uint32_t at = fg_shared(to) + fg_swizzle<WIDTH>(m + (q & 1) * 8 + i, k / 8 + (q >> 1));
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
                 :: "r"(at), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]) : "memory");
#else
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
    *la_pair<WIDTH>(to, m + g, k + c) = a[0];
    *la_pair<WIDTH>(to, m + g + 8, k + c) = a[1];
    *la_pair<WIDTH>(to, m + g, k + 8 + c) = a[2];
    *la_pair<WIDTH>(to, m + g + 8, k + 8 + c) = a[3];
#endif
}

/* acc += a x: 16 columns of values by 64 rows, or by 128 keys.  A warp is alone with its tensor
 * core here: operands are fetched LA_AHEAD products early, to hide what shared memory takes. */
#define LA_AHEAD 5
static __device__ __forceinline__ void la_to_rows(float acc[8][4], const uint32_t a[8][4],
                                                  uint32_t x)
{
    uint32_t b[LA_AHEAD][4];
#pragma unroll
    for (int i = 0; i < LA_AHEAD; i++) la_b<LA_WIDTH>(b[i], x, i / 4 * 16, i % 4 * 16);
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const int next = i + LA_AHEAD;
        la_mma2(acc + i % 4 * 2, a[i / 4], b[i % LA_AHEAD]);
        if (next < 32) la_b<LA_WIDTH>(b[i % LA_AHEAD], x, next / 4 * 16, next % 4 * 16);
    }
}
static __device__ __forceinline__ void la_to_keys(float acc[16][4], const uint32_t a[4][4],
                                                  uint32_t x)
{
    uint32_t b[LA_AHEAD][4];
#pragma unroll
    for (int i = 0; i < LA_AHEAD; i++) la_b_turned<LA_WIDTH>(b[i], x, i / 8 * 16, i % 8 * 16);
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const int next = i + LA_AHEAD;
        la_mma2(acc + i % 8 * 2, a[i / 8], b[i % LA_AHEAD]);
        if (next < 32) la_b_turned<LA_WIDTH>(b[i % LA_AHEAD], x, next / 8 * 16, next % 8 * 16);
    }
}

/* decay of the delta rule's chunk, 1 where there are no documents */
static __device__ __forceinline__ float la_keep(const la_chain &c, int64_t b, int64_t chunk)
{
    return c.decay && chunk >= 0 && chunk < c.z.chunks ? c.decay[b * c.z.chunks + chunk] : 1.0f;
}
template <class F>
static __device__ __forceinline__ void la_decay(float S[16][4], const float *factor, float keep)
{
    const int c = threadIdx.x % 4 * 2;
    if (F::delta && keep == 1) return;
#pragma unroll
    for (int j = 0; j < 16; j++) {
        const float2 d = F::delta ? make_float2(keep, keep) : *(const float2 *)&factor[8 * j + c];
        S[j][0] *= d.x;
        S[j][1] *= d.y;
        S[j][2] *= d.x;
        S[j][3] *= d.y;
    }
}

/* A writer's share of S [columns][128] to its place among the kept. */
template <class F>
static __device__ __forceinline__ void la_keep_state(const bf16 *S, bf16 *to, int writer)
{
    const int i = writer * 32 + threadIdx.x % 32, r = i / 16, c = i % 16;
    const char *even = (const char *)S + fg_swizzle<LA_WIDTH>(r, c);
    const char *odd = (const char *)S + fg_swizzle<LA_WIDTH>(r + 4, c);   /* again every 8 rows */
    to += blockIdx.x * F::columns * LA_WIDTH + i * 8;
#pragma unroll
    for (int k = 0; k < F::columns / 4; k++)
        *(uint4 *)(to + 4 * k * LA_WIDTH) =
            *(const uint4 *)((k % 2 ? odd : even) + k / 2 * 8 * LA_WIDTH * (int)sizeof(bf16));
}
/* 16 rows of x [columns][64], turned, to memory. */
template <class F>
static __device__ __forceinline__ void la_keep_rows(const bf16 *x, const la_rows_to &to, int64_t b,
                                                    int64_t h, int64_t t, int m, int n)
{
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
    bf16 *p = to.p + b * to.batch + h * to.head + t * to.row + blockIdx.x * F::columns + c;
#pragma unroll
    for (int v = 0; v < F::columns; v += 16) {
        uint32_t a[4];
        la_a_turned<LA_ROWS>(a, fg_shared(x), m, v);
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (m + g + i % 2 * 8 < n)
                *(uint32_t *)(p + (m + g + i % 2 * 8) * to.row + v + i / 2 * 8) = a[i];
    }
}

/* o = scale (Q S + A u) of 16 rows, by one writer */
template <class F>
static __device__ __forceinline__ void la_write_out(const la_chain &c, const la_late *s,
                                                    const bf16 *S, const bf16 *u, int64_t b,
                                                    int64_t h, int64_t t, int m, int n)
{
    constexpr int N = F::columns / 8;
    const int g = threadIdx.x % 32 / 4, cc = threadIdx.x % 4 * 2;
    float o[N][4];
    la_zero<N>(o);
#pragma unroll
    for (int k = 0; k < LA_WIDTH; k += 16) {
        uint32_t a[4], x[4];
        la_a<LA_WIDTH>(a, fg_shared(s->q), m, k);
#pragma unroll
        for (int v = 0; v < N; v += 2) {
            la_b<LA_WIDTH>(x, fg_shared(S), k, 8 * v);
            la_mma2(o + v, a, x);
        }
    }
#pragma unroll
    for (int k = 0; k < LA_ROWS; k += 16) {
        uint32_t a[4], x[4];
        if (k > m) break;
        la_a<LA_ROWS>(a, fg_shared(s->A), m, k);
#pragma unroll
        for (int v = 0; v < N; v += 2) {
            la_b<LA_ROWS>(x, fg_shared(u), k, 8 * v);
            la_mma2(o + v, a, x);
        }
    }
    bf16 *p = c.o.p + b * c.o.batch + h * c.o.head + t * c.o.row
              + blockIdx.x * F::columns + cc;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < N; j++)
            if (m + g + 8 * i < n)
                *(uint32_t *)(p + (m + g + 8 * i) * c.o.row + 8 * j) =
                    fg_pack2(c.z.scale * o[j][2 * i], c.z.scale * o[j][2 * i + 1]);
}

/* 16 columns of the rows that are given, turned; 0 where none are. */
template <class F>
static __device__ __forceinline__ void la_given(uint32_t u[4][4], const bf16 *from, int m)
{
#pragma unroll
    for (int k = 0; k < 4; k++) {
        u[k][0] = u[k][1] = u[k][2] = u[k][3] = 0;
        if (from) la_a_turned<F::columns>(u[k], fg_shared(from), m, 16 * k);
    }
}

/* One chunk on the way forward: shares S before it, and u (or e), leaves S behind it. */
template <class F, la_purpose FOR>
static __device__ __forceinline__ void la_step(float S[16][4], la_stage<F> *s, bf16 *S_to,
                                               bf16 *u_to, float keep, bool given)
{
    const int m = threadIdx.x / 32 * 16, c = threadIdx.x % 4 * 2;
    uint32_t u[4][4];
    uint32_t a[8][4];
#pragma unroll
    for (int k = 0; k < 8; k++) {
        la_operand(a[k], S[2 * k], S[2 * k + 1]);
        if (FOR != LA_END) la_share<LA_WIDTH>(a[k], S_to, m, 16 * k);
    }
    if (FOR != LA_END) la_given<F>(u, s->u, m);
    if (F::delta) {
        float e[8][4];
        la_zero<8>(e);
        la_to_rows(e, a, fg_shared(s->w));
        if (FOR == LA_END) la_given<F>(u, given ? s->u : nullptr, m);
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
    }
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (FOR == LA_OUT) la_share<LA_ROWS>(u[k], u_to, m, 16 * k);
    la_decay<F>(S, s->factor, keep);
    la_to_keys(S, u, fg_shared(s->k));
}

/* The state with which segment s begins, where the states of all are known. */
static __device__ __forceinline__ const float *la_entered(const la_chain &c, int64_t bh, int64_t s)
{
    return c.ends + (s * c.z.B * c.z.H + bh) * LA_WIDTH * LA_WIDTH;
}

/* From the first chunk of the segment to its last.  LA_KEEP: the states, and e of the delta rule;
 * LA_OUT: o; LA_END: the state behind it from 0, or, if u is not there, from 1. */
template <class F, la_purpose FOR>
static __device__ __forceinline__ void la_forward_chain(const la_chain &c, la_shared<F> *sm)
{
    constexpr int STAGES = F::stages, AHEAD = STAGES - 1;
    const la_span s = la_own_span(c);
    const int64_t bh = s.bh, size = LA_WIDTH * LA_WIDTH;
    const int chunks = (int)(s.to - s.from);
    float S[16][4];
    float keep = 1;
    if (la_is_chain<F>()) {
        if (FOR == LA_END) la_start<F>(S, !c.u.p);
        else if (F::delta && s.segment) la_state_in<F>(S, la_entered(c, bh, s.segment - 1), 1);
        else la_state_in<F>(S, la_carried(c.z, s.b) ? c.z.state + bh * size : nullptr, 1);
        if (F::delta) keep = la_keep(c, s.b, s.from);
        else la_pass<F>(S, c, bh, 0, s.segment, 1);
    } else if (la_is_fetcher<F>()) {
        for (int i = 0; i < AHEAD; i++) {
            if (i < chunks) la_fetch<F>(c, &sm->stage[i], bh, s.from + i);
            if (FOR == LA_OUT && i && i <= chunks)
                la_fetch_late(c, &sm->late[i - 1], bh, s.from + i - 1);
            fg_copy_commit();
        }
        fg_copy_wait<AHEAD - 1>();
    }
    __syncthreads();
    for (int i = 0; i <= chunks; i++) {      /* step i: chunk i; what is written is i - 1's */
        if (la_is_chain<F>()) {
            if (i < chunks) {
                const float next = F::delta ? la_keep(c, s.b, s.from + i + 1) : 1;
                la_step<F, FOR>(S, &sm->stage[i % STAGES], sm->S[i % 2], sm->u[i % 2], keep,
                                    c.u.p);
                keep = next;
            }
        } else if (la_is_fetcher<F>()) {
            const int j = i + AHEAD;
            if (j < chunks) la_fetch<F>(c, &sm->stage[j % STAGES], bh, s.from + j);
            if (FOR == LA_OUT && j - 1 < chunks)
                la_fetch_late(c, &sm->late[(j - 1) % STAGES], bh, s.from + j - 1);
            fg_copy_commit();
            fg_copy_wait<AHEAD - 1>();           /* what the next step needs is there */
        } else if (FOR != LA_END && i > 0) {
            constexpr int WRITERS = la_writers<F, FOR>;
            const int j = i - 1;
            const int64_t chunk = s.from + j, t = chunk * LA_ROWS;
            const int n = la_rows(c.z, chunk), writer = la_writer<F, FOR>();
            if (FOR == LA_KEEP && writer >= 0)
                la_keep_state<F>(sm->S[j % 2], c.kept + (bh * c.z.chunks + chunk) * size, writer);
            for (int m = 16 * writer; writer >= 0 && m < LA_ROWS; m += 16 * WRITERS) {
                if (FOR == LA_OUT)
                    la_write_out<F>(c, &sm->late[j % STAGES], sm->S[j % 2], sm->u[j % 2], s.b, s.h,
                                    t, m, n);
                else if (F::delta) la_keep_rows<F>(sm->u[j % 2], c.o, s.b, s.h, t, m, n);
            }
        }
        __syncthreads();
    }
    if (!la_is_chain<F>()) return;
    if (FOR == LA_END) la_state_out<F>(S, c.ends + (s.segment * c.z.B * c.z.H + bh) * size, 1);
    else if (c.to && s.segment == c.segments - 1) la_state_out<F>(S, c.to + bh * size, 1);
}

/* One chunk on the way back, in units of scale: shares R behind it, and gu, leaves R before it. */
template <class F>
static __device__ __forceinline__ void la_step_back(float R[16][4], la_stage<F> *s,
                                                    la_late *late, bf16 *R_to, bf16 *u_to,
                                                    float keep, float scale)
{
    const int m = threadIdx.x / 32 * 16, c = threadIdx.x % 4 * 2;
    uint32_t go[4][4], u[4][4];
    float gu[8][4];
    la_zero<8>(gu);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        la_a_turned<F::columns>(go[k], fg_shared(s->u), m, 16 * k);
#pragma unroll
        for (int j = 0; j <= k; j++) {
            uint32_t b[4];
            la_b_turned<LA_ROWS>(b, fg_shared(late->A), 16 * k, 16 * j);
            la_mma2(gu + 2 * j, go[k], b);
        }
    }
    {
        uint32_t a[8][4];
#pragma unroll
        for (int k = 0; k < 8; k++) {
            la_operand(a[k], R[2 * k], R[2 * k + 1]);
            la_share<LA_WIDTH>(a[k], R_to, m, 16 * k);
        }
        la_to_rows(gu, a, fg_shared(s->k));
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float2 beta = F::delta ? *(const float2 *)&s->factor[8 * j + c] : make_float2(0, 0);
        u[j / 2][j % 2 * 2] = fg_pack2(-beta.x * gu[j][0], -beta.y * gu[j][1]);
        u[j / 2][j % 2 * 2 + 1] = fg_pack2(-beta.x * gu[j][2], -beta.y * gu[j][3]);
#pragma unroll
        for (int f = 0; f < 4; f++) gu[j][f] *= scale;
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
        uint32_t a[4];
        la_operand(a, gu[2 * k], gu[2 * k + 1]);
        la_share<LA_ROWS>(a, u_to, m, 16 * k);
    }
    la_decay<F>(R, s->factor, keep);
    la_to_keys(R, go, fg_shared(late->q));
    if (F::delta) la_to_keys(R, u, fg_shared(s->w));
}

/* From the last chunk of the segment to its first. */
template <class F>
static __device__ __forceinline__ void la_backward_chain(const la_chain &c, la_shared<F> *sm)
{
    constexpr int STAGES = F::stages, AHEAD = STAGES - 1;
    const la_span s = la_own_span(c);
    const int64_t bh = s.bh, size = LA_WIDTH * LA_WIDTH;
    const int chunks = (int)(s.to - s.from);
    float R[16][4];
    float keep = 1;
    if (la_is_chain<F>()) {
        la_state_in<F>(R, c.from ? c.from + bh * size : nullptr, 1 / c.z.scale);
        if (F::delta) keep = la_keep(c, s.b, s.to - 1);
        else la_pass<F>(R, c, bh, c.segments - 1, c.segments - 1 - s.segment, -1);
    } else if (la_is_fetcher<F>()) {
        for (int i = 0; i < AHEAD; i++) {
            if (i < chunks) {
                la_fetch<F>(c, &sm->stage[i], bh, s.to - 1 - i);
                la_fetch_late(c, &sm->late[i], bh, s.to - 1 - i);
            }
            fg_copy_commit();
        }
        fg_copy_wait<AHEAD - 1>();
    }
    __syncthreads();
    for (int i = 0; i <= chunks; i++) {
        const int64_t chunk = s.to - 1 - i;
        if (la_is_chain<F>()) {
            if (i < chunks) {
                const float next = F::delta ? la_keep(c, s.b, chunk - 1) : 1;
                la_step_back<F>(R, &sm->stage[i % STAGES], &sm->late[i % STAGES], sm->S[i % 2],
                                sm->u[i % 2], keep, c.z.scale);
                keep = next;
            }
        } else if (la_is_fetcher<F>()) {
            if (i + AHEAD < chunks) {
                const int at = (i + AHEAD) % STAGES;
                la_fetch<F>(c, &sm->stage[at], bh, chunk - AHEAD);
                la_fetch_late(c, &sm->late[at], bh, chunk - AHEAD);
            }
            fg_copy_commit();
            fg_copy_wait<AHEAD - 1>();
        } else if (i > 0) {
            const int writer = la_writer<F, LA_KEEP>();
            if (writer >= 0)
                la_keep_state<F>(sm->S[(i - 1) % 2], c.kept + (bh * c.z.chunks + chunk + 1) * size,
                                 writer);
            for (int m = 16 * writer; writer >= 0 && m < LA_ROWS; m += 32)
                la_keep_rows<F>(sm->u[(i - 1) % 2], c.o, s.b, s.h, (chunk + 1) * LA_ROWS, m,
                             la_rows(c.z, chunk + 1));
        }
        __syncthreads();
    }
    if (!la_is_chain<F>() || s.segment > 0) return;
    if (!la_carried(c.z, s.b)) la_zero<16>(R);
    la_state_out<F>(R, c.to + bh * size, c.z.scale);
}

template <class F>
static __global__ void __launch_bounds__(la_threads<F, LA_OUT>, 1)
la_forward(const __grid_constant__ la_chain c)
{
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(1024) char memory[];
    la_forward_chain<F, LA_OUT>(c, (la_shared<F> *)memory);
#endif
}
/* The two ways of the gradient do not need each other: half the blocks go forth, half back. */
template <class F>
static __global__ void __launch_bounds__(la_threads<F, LA_KEEP>, 1)
la_both_ways(const __grid_constant__ la_chain forth, const __grid_constant__ la_chain back)
{
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(1024) char memory[];
    if (blockIdx.z) la_forward_chain<F, LA_KEEP>(forth, (la_shared<F> *)memory);
    else la_backward_chain<F>(back, (la_shared<F> *)memory);
#endif
}

/* ---- segments: what each adds to a state of 0 ------------------------------------------------ */

/* With decays of channels alone.  Of the way back, k and u are q and go. */
template <class F>
static __device__ __forceinline__ void la_end_chain(const la_chain &c, la_stage<F> *stage,
                                                    bool back)
{
    constexpr int STAGES = F::stages;
    const la_span s = la_own_span(c);
    const int64_t chunks = s.to - s.from, at = s.segment * c.z.B * c.z.H + s.bh;
    const int m = threadIdx.x / 32 * 16;
    float S[16][4];
    la_zero<16>(S);
    if (la_is_fetcher<F>())
        for (int64_t i = 0; i < 2; i++) {
            if (i < chunks) la_fetch<F>(c, &stage[i], s.bh, back ? s.to - 1 - i : s.from + i);
            fg_copy_commit();
            if (i == 1) fg_copy_wait<1>();
        }
    __syncthreads();
    for (int64_t i = 0; i < chunks; i++) {
        if (la_is_chain<F>()) {
            la_stage<F> *now = &stage[i % STAGES];
            uint32_t u[4][4];
#pragma unroll
            for (int k = 0; k < 4; k++) la_a_turned<F::columns>(u[k], fg_shared(now->u), m, 16 * k);
            la_decay<F>(S, now->factor, 1);
            la_to_keys(S, u, fg_shared(now->k));
        } else {
            const int64_t ahead = back ? s.to - 3 - i : s.from + i + 2;
            if (i + 2 < chunks) la_fetch<F>(c, &stage[(i + 2) % STAGES], s.bh, ahead);
            fg_copy_commit();
            fg_copy_wait<1>();
        }
        __syncthreads();
    }
    if (la_is_chain<F>()) la_state_out<F>(S, c.ends + at * LA_WIDTH * LA_WIDTH, 1);
    if (blockIdx.x || threadIdx.x >= LA_WIDTH) return;
    const float *decay = c.decay + (s.bh * c.z.chunks + s.from) * LA_WIDTH + threadIdx.x;
    float all = 1;
    for (int64_t i = 0; i < chunks; i++) all *= decay[i * LA_WIDTH];
    c.through[at * LA_WIDTH + threadIdx.x] = all;
}

/* Forth and back, or, of the delta rule, forth and what passes through.  The first segment of all
 * is not needed back, the last not forth. */
template <class F>
static __global__ void __launch_bounds__(la_threads<F, LA_END>, 2)
la_ends(const __grid_constant__ la_chain forth, const __grid_constant__ la_chain other)
{
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(1024) char memory[];
    const int64_t segment = la_own_span(forth).segment;
    if (!F::delta && blockIdx.z ? segment == 0 : segment == forth.segments - 1) return;
    const la_chain &c = blockIdx.z ? other : forth;
    if constexpr (F::delta) la_forward_chain<F, LA_END>(c, (la_shared<F> *)memory);
    else la_end_chain<F>(c, (la_stage<F> *)memory, blockIdx.z);
#endif
}

/* Of the delta rule, a segment takes S to P S + what it adds: puts in the place of the latter the
 * state behind the segment.  P and S are split in two bf16 each, so that next to nothing is lost.
 * A block has a head, a warp 16 values. */
struct la_split { bf16 high[LA_WIDTH * LA_WIDTH], low[LA_WIDTH * LA_WIDTH]; };

static __device__ __forceinline__ void la_split_up(const float *P, la_split *sm)
{
#pragma unroll 1
    for (int at = threadIdx.x; at < LA_WIDTH * LA_WIDTH / 4; at += 8 * 256) {
        float4 x[8];
#pragma unroll
        for (int k = 0; k < 8; k++) x[k] = ((const float4 *)P)[at + 256 * k];
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const int i = at + 256 * k, r = i / 32, d = i % 32 * 4;
            const uint2 high = make_uint2(fg_pack2(x[k].x, x[k].y), fg_pack2(x[k].z, x[k].w));
            const uint2 low = make_uint2(
                fg_pack2(x[k].x - la_low_half(high.x), x[k].y - la_high_half(high.x)),
                fg_pack2(x[k].z - la_low_half(high.y), x[k].w - la_high_half(high.y)));
            const uint32_t to = fg_swizzle<LA_WIDTH>(r, d / 8) + d % 8 * 2;
            *(uint2 *)((char *)sm->high + to) = high;
            *(uint2 *)((char *)sm->low + to) = low;
        }
    }
}

static __global__ void __launch_bounds__(256, 1)
la_add_segments(const __grid_constant__ la_chain c)
{
    extern __shared__ __align__(1024) char memory[];
    la_split *sm = (la_split *)memory;
    const int64_t heads = c.z.B * c.z.H, size = LA_WIDTH * LA_WIDTH, bh = blockIdx.x;
    const int g = threadIdx.x % 32 / 4, cc = threadIdx.x % 4 * 2, v = threadIdx.x / 32 * 16 + g;
    const float *first = la_carried(c.z, bh / c.z.H) ? c.z.state + bh * size : nullptr;
    const int64_t own = cc * LA_WIDTH + v;
    float S[16][4];
#pragma unroll
    for (int j = 0; j < 16; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            S[j][i] = first ? first[own + (8 * j + i % 2) * LA_WIDTH + i / 2 * 8] : 0;
    for (int64_t n = 0; n < c.segments - 1; n++) {
        const int64_t at = (n * heads + bh) * size;
        float *ends = c.ends + at + own;
        uint32_t high[8][4], low[8][4];
#pragma unroll
        for (int k = 0; k < 8; k++) {
            la_operand(high[k], S[2 * k], S[2 * k + 1]);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *x = &S[2 * k + i / 2][i % 2 * 2];
                low[k][i] = fg_pack2(x[0] - la_low_half(high[k][i]),
                                     x[1] - la_high_half(high[k][i]));
            }
        }
        __syncthreads();
        la_split_up(c.through + at, sm);
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 16; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) S[j][i] = ends[(8 * j + i % 2) * LA_WIDTH + i / 2 * 8];
#pragma unroll
        for (int k = 0; k < 8; k++)
#pragma unroll
            for (int j = 0; j < 16; j += 2) {
                uint32_t a[4], b[4];
                la_b<LA_WIDTH>(a, fg_shared(sm->high), 16 * k, 8 * j);
                la_b<LA_WIDTH>(b, fg_shared(sm->low), 16 * k, 8 * j);
                la_mma2(S + j, high[k], a);
                la_mma2(S + j, low[k], a);
                la_mma2(S + j, high[k], b);
            }
#pragma unroll
        for (int j = 0; j < 16; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) ends[(8 * j + i % 2) * LA_WIDTH + i / 2 * 8] = S[j][i];
    }
}

/* The ends of a chain, or of one forth and one back. */
template <class F>
static void la_run_ends(const la_chain &forth, const la_chain *back, cudaStream_t stream)
{
    la_chain other = back ? *back : forth;
    const int64_t heads = forth.z.B * forth.z.H;
    const int bytes = (int)sizeof(la_stage<F>) * F::stages, split = (int)sizeof(la_split);
    const dim3 grid(LA_WIDTH / F::columns, (unsigned)(heads * forth.segments),
                    back || F::delta ? 2 : 1);
    if (F::delta) {
        other.u.p = nullptr;
        other.ends = forth.through;
    } else {
        other.k = other.q;
    }
    cudaFuncSetAttribute(la_ends<F>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    la_ends<F><<<grid, la_threads<F, LA_END>, bytes, stream>>>(forth, other);
    if (!F::delta) return;
    cudaFuncSetAttribute(la_add_segments, cudaFuncAttributeMaxDynamicSharedMemorySize, split);
    la_add_segments<<<(unsigned)heads, 256, split, stream>>>(forth);
}

/* As many segments as give every multiprocessor a block, if they are not too short to pay. */
static inline int64_t la_segments(const la_task &z)
{
    const int64_t wanted = fg_processors() / (z.B * z.H * (LA_WIDTH / la_gated::columns));
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

template <class F> static void la_run_forward(const la_chain &c, cudaStream_t stream)
{
    const int bytes = (int)sizeof(la_shared<F>);
    const dim3 grid(LA_WIDTH / F::columns, (unsigned)(c.z.B * c.z.H * c.segments));
    if (c.segments > 1) la_run_ends<F>(c, nullptr, stream);
    cudaFuncSetAttribute(la_forward<F>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    la_forward<F><<<grid, la_threads<F, LA_OUT>, bytes, stream>>>(c);
}
/* Of the delta rule in one segment: three ends more would cost what the chain gains. */
template <class F>
static void la_run_both_ways(const la_chain &forth, const la_chain &back, cudaStream_t stream)
{
    const int bytes = (int)sizeof(la_shared<F>);
    const dim3 grid(LA_WIDTH / F::columns, (unsigned)(forth.z.B * forth.z.H * forth.segments), 2);
    if constexpr (!F::delta) if (forth.segments > 1) la_run_ends<F>(forth, &back, stream);
    cudaFuncSetAttribute(la_both_ways<F>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    la_both_ways<F><<<grid, la_threads<F, LA_KEEP>, bytes, stream>>>(forth, back);
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
