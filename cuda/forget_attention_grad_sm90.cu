/* forget_attention_grad_sm90.cu - the five products of forget_attention_grad on Hopper's wgmma.
 *
 * A block of threads keeps 128 keys and walks the tiles of queries below the diagonal, 128 queries
 * for D <= 64 and 64 for D <= 128.  Two warpgroups own 64 keys each,
 *
 *     S^T = K Q^T,  dP^T = V dO^T,  gV += P^T dO,  gK += dS^T Q         P^T and dS^T in registers,
 *     gQ = dS K     dS through shared memory: 64 queries each for D <= 64, else 64 columns each,
 *
 * and a third moves memory.  One warp loads by the copy engine.  Two take turns in adding gQ to
 * what device memory holds, as bulk reductions in the order that forget_attention_grad.cuh gives:
 * one waits for its turn while the sums of the other are on their way, so nobody who multiplies
 * waits.
 * That made a fixed order free: 4.56 ms with turns, 4.58 ms without, at the first shape below.
 *
 * Measured on one H100 80GB HBM3, 2026-11-26, B = 1, T = 16384, gates, all kernels of the op:
 * 24 heads of 64 4.56 ms (452 TFLOP/s), 12 heads of 128 3.97 ms (519 TFLOP/s).  Without gates, and
 * without their sums, 4.24 and 3.94 ms.
 *
 * Matrices lie in shared memory as wgmma.cuh says. */
#include <cuda.h>
#include "forget_attention_grad.cuh"
#include "wgmma.cuh"

#define KEYS 128

/* [B,N,H,D] as the copy engine sees it */
struct maps { CUtensorMap q, go, k, v; };

/* D columns; GATE: with gates; QT queries of a tile; P panels of 64 columns; where things lie, of
 * Q, GO, DS, GQ, level and delta (ROW) and PART two each; bytes of one. */
template <int D_, bool GATE_> struct layout {
    static constexpr bool GATE = GATE_;
    static constexpr int D = D_, QT = D == 64 ? 128 : 64, P = D / 64;
    static constexpr int K_AT = 0, V_AT = K_AT + KEYS * D * 2, Q_AT = V_AT + KEYS * D * 2;
    static constexpr int TILE = QT * D * 2, GO_AT = Q_AT + 2 * TILE, DS_AT = GO_AT + 2 * TILE;
    static constexpr int DS = KEYS * QT * 2, GQ_AT = DS_AT + 2 * DS, GQ = QT * D * 4;
    static constexpr int ROW_AT = GQ_AT + 2 * GQ, BASE_AT = ROW_AT + 4 * QT * 4;
    static constexpr int PART_AT = BASE_AT + 16, PART = QT / SOME * 8 * 4;
    static constexpr int BAR_AT = PART_AT + 2 * PART, GIVEN_AT = BAR_AT + 16 * 8;
    static constexpr int SHARED = GIVEN_AT + 16;
    static constexpr int ZN = QT / 2, GN = D / 2;          /* sums of a thread: z, gk or gv */
};
/* Barriers; of those with a distance two, or two times two, one for each stage. */
enum { KV_FULL, BLIND, FULL, EMPTY = FULL + 2, STAGED = EMPTY + 2, FREE = STAGED + 4 };

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* ---- bulk copies ---------------------------------------------------------------------------- */

static __device__ __forceinline__ void barrier_expect(unsigned bar, int bytes)
{
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;"
                 :: "r"(bar), "r"(bytes) : "memory");
}
/* A box of 64 columns, from column d on, of tokens t ... of head h; what is not there is 0. */
static __device__ __forceinline__ void box_load(unsigned to, const CUtensorMap *map, int d, int h,
                                                int t, int b, unsigned bar)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6];"
                 :: "r"(to), "l"(map), "r"(d), "r"(h), "r"(t), "r"(b), "r"(bar) : "memory");
}
static __device__ __forceinline__ void bulk_load(unsigned to, const void *from, int bytes,
                                                 unsigned bar)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" :: "r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
}
static __device__ __forceinline__ void bulk_store(float4 *to, unsigned from, int bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                 :: "l"(to), "r"(from), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void bulk_add(float4 *to, unsigned from, int bytes)
{
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
                 :: "l"(to), "r"(from), "r"(bytes) : "memory");
}

/* ---- products ------------------------------------------------------------------------------- */

/* A matrix_at to which bytes can be added: one instruction, where making it anew takes four. */
struct matrix {
    unsigned low;
    __device__ matrix(unsigned at, unsigned panel = 16)
        : low((at & 0x3ffff) >> 4 | panel >> 4 << 16) { }
    __device__ uint64_t operator+(int bytes) const
    {
        return (uint64_t)(1u << 30 | 1024 >> 4) << 32 | (low + (unsigned)(bytes >> 4));
    }
};
template <int N> static __device__ __forceinline__ void pin(float (&x)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i]) :: "memory");
}

#define D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(d, i) D4(d, i), D4(d, i + 4), D4(d, i + 8), D4(d, i + 12)

/* d = a b, or d += a b: 64 x 64 or 64 x 128 over 16.  TA, TB: the matrix is stored with its 16 as
 * rows. */
template <int TA, int TB>
static __device__ __forceinline__ void product(float (&d)[32], uint64_t a, uint64_t b, int add)
{
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" N32 "}, "
                 "%32, %33, p, 1, 1, %35, %36;\n}"
                 : D16(d, 0), D16(d, 16) : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
}
template <int TA, int TB>
static __device__ __forceinline__ void product(float (&d)[64], uint64_t a, uint64_t b, int add)
{
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" N64 "}, "
                 "%64, %65, p, 1, 1, %67, %68;\n}"
                 : D16(d, 0), D16(d, 16), D16(d, 32), D16(d, 48)
                 : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
}
/* d += a b, a in registers, b stored with its 16 as rows */
static __device__ __forceinline__ void product(float (&d)[32], const unsigned *a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" N32 "}, "
                 "{%32,%33,%34,%35}, %36, 1, 1, 1, 1;\n"
                 : D16(d, 0), D16(d, 16) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
static __device__ __forceinline__ void product(float (&d)[64], const unsigned *a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" N64 "}, "
                 "{%64,%65,%66,%67}, %68, 1, 1, 1, 1;\n"
                 : D16(d, 0), D16(d, 16), D16(d, 32), D16(d, 48)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* ---- one block of threads ------------------------------------------------------------------- */

static __device__ __forceinline__ float shared_get(unsigned at)
{
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
    return x;
}
static __device__ __forceinline__ void shared_put(unsigned at, float x)
{
    asm volatile("st.shared.f32 [%0], %1;" :: "r"(at), "f"(x) : "memory");
}

/* A walk with its place in shared memory; every role takes the same steps. */
struct steps : walk {
    unsigned memory;
    int count;                           /* steps so far */
    __device__ int stage() const { return count & 1; }
    __device__ int phase() const { return count >> 1 & 1; }
    template <class S> __device__ unsigned bar(int which) const
    {
        return memory + S::BAR_AT + which * 8;
    }
};

/* Zeros for rows of go that see nothing, whatever they hold; by a warp. */
template <class S> static __device__ __noinline__ void blind_rows(const int *low, unsigned go)
{
    for (int e = (int)threadIdx.x % 32; e < S::QT * S::P * 8; e += 32) {
        const int row = e / 8 % S::QT;
        if (low[row] == UNSEEN)
            asm volatile("st.shared.v4.b32 [%0], {%1,%1,%1,%1};" :: "r"(go + e * 16), "r"(0)
                         : "memory");
    }
    proxy_fence();
    __syncwarp();
}

/* One warp; its first thread loads. */
template <class S>
static __device__ __forceinline__ void load_role(const args &a, const maps &m, steps w)
{
    const bool one = threadIdx.x == 0;
    int blinds = 0;
    if (one) {
        const int kv = w.h / (int)(a.H / a.Hkv);
        const unsigned bar = w.template bar<S>(KV_FULL);
        barrier_expect(bar, 2 * KEYS * S::D * 2);
        for (int p = 0; p < S::P; p++) {
            const unsigned to = w.memory + p * KEYS * 128;
            box_load(to + S::K_AT, &m.k, p * 64, kv, w.j * KEYS, w.b, bar);
            box_load(to + S::V_AT, &m.v, p * 64, kv, w.j * KEYS, w.b, bar);
        }
        barrier_arrive(bar);
    }
    for (; w.more(); w.advance(a), w.count++) {
        const int stage = w.stage(), t0 = w.i * S::QT;
        const unsigned bar = w.template bar<S>(FULL + stage);
        const unsigned go = w.memory + S::GO_AT + stage * S::TILE;
        const bool blind = !a.plain && a.span[(int64_t)w.b * a.n_q + w.i].z;
        const unsigned go_bar = blind ? w.template bar<S>(BLIND) : bar;
        if (one) {
            const int64_t head = w.b * a.H + w.h, at = head * a.np + t0;
            const unsigned row = w.memory + S::ROW_AT + stage * S::QT * 4;
            const unsigned q = w.memory + S::Q_AT + stage * S::TILE;
            barrier_wait(w.template bar<S>(EMPTY + stage), w.phase() ^ 1);
            barrier_expect(bar, S::TILE + 2 * S::QT * 4);
            barrier_expect(go_bar, S::TILE);
            for (int p = 0; p < S::P; p++) {
                const int to = p * S::QT * 128;
                box_load(q + to, &m.q, p * 64, w.h, t0, w.b, bar);
                box_load(go + to, &m.go, p * 64, w.h, t0, w.b, go_bar);
            }
            bulk_load(row, a.level + at, S::QT * 4, bar);
            bulk_load(row + 2 * S::QT * 4, a.delta + at, S::QT * 4, bar);
            const fg_gate_block *block = a.gates.block + head * a.gates.blocks;
            float d = 0;
            if (S::GATE && a.gates.block)
                d = (float)(block[t0 / FG_GATE_BLOCK].base - block[w.j].base);
            shared_put(w.memory + S::BASE_AT + stage * 4, d);
            if (blind) barrier_arrive(go_bar);
        }
        if (blind) {
            barrier_wait(go_bar, blinds++ & 1);
            blind_rows<S>(a.low + w.b * a.np + t0, go);
        }
        if (one) barrier_arrive(bar);
    }
}

/* Two warps, every other step is a warp's: add the two halves of gq and the sums of ds, in turn.
 * One waits for its turn while the other's sums are on their way. */
template <class S> static __device__ __forceinline__ void add_role(const args &a, steps w)
{
    constexpr int HALF = S::GQ / 2;
    const int lane = (int)threadIdx.x % 32;
    for (; w.more(); w.advance(a), w.count++) {
        const unsigned from = w.memory + S::GQ_AT + w.stage() * S::GQ;
        const unsigned part = w.memory + S::PART_AT + w.stage() * S::PART + lane * 32;
        if (w.stage() != (int)threadIdx.x / 32 % 2) continue;
        const int64_t tile = w.tile(a);
        const int rank = w.rank(a);
        float4 *to = a.sum_q + tile * (S::GQ / 16);
        if (lane == 0) {
            while (rank > 0 && turn_now(a.turn + tile) < rank) { }
            asm volatile("fence.proxy.async;" ::: "memory");
            for (int g = 0; g < 2; g++) {
                barrier_wait(w.template bar<S>(STAGED + 2 * w.stage() + g), w.phase());
                if (rank == 0) bulk_store(to + g * (HALF / 16), from + g * HALF, HALF);
                else bulk_add(to + g * (HALF / 16), from + g * HALF, HALF);
            }
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
        __syncwarp();
        if (S::GATE && lane < S::QT / SOME) {
            float sum = 0, *row = a.rows + tile * (S::QT / SOME) + lane;
            for (int k = 0; k < 8; k++) sum += shared_get(part + k * 4);
            if (rank == 0) *row = sum;
            else atomicAdd(row, sum);    /* one adder at a time, in the order of turns */
        }
        __syncwarp();
        if (lane == 0) {
            asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
            barrier_arrive(w.template bar<S>(FREE + w.stage()));
            asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");   /* now they are visible */
            turn_set(a.turn + tile, rank + 1);
        }
    }
}

/* A thread of the two warpgroups that multiply: its place and sums. */
template <class S> struct worker {
    int lane, warp, group, key0;         /* warp: of its warpgroup; key0: its 16 rows' first key */
    float ell[2], column[2];
    float gk[S::GN], gv[S::GN];
};

template <class S>
static __device__ __forceinline__ void head_begin(const args &a, const steps &w, worker<S> &s)
{
    const int64_t head = w.b * a.H + w.h;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        s.column[r] = 0;
        s.ell[r] = S::GATE && a.gates.ell
                 ? a.gates.ell[head * a.np + s.key0 + s.lane / 4 + 8 * r] : 0;
    }
}
template <class S>
static __device__ __forceinline__ void head_end(const args &a, const steps &w, const worker<S> &s,
                                                int h)
{
#pragma unroll
    for (int r = 0; S::GATE && r < 2; r++) {
        const float sum = fg_warp_sum<4>(s.column[r]);
        const int64_t key = s.key0 + s.lane / 4 + 8 * r;
        if (s.lane % 4 == 0) a.column[(w.b * a.H + h) * a.np + key] = sum;
    }
}

/* x = k q^T or v go^T of the warpgroup's 64 keys */
template <class S>
static __device__ __forceinline__ void scores(unsigned keys, unsigned queries, float (&x)[S::ZN])
{
    const matrix a(keys), b(queries);
#pragma unroll
    for (int k = 0; k < S::D / 16; k++)
        product<0, 0>(x, a + (k / 4 * KEYS * 128 + k % 4 * 32),
                      b + (k / 4 * S::QT * 128 + k % 4 * 32), k > 0);
    wgmma_commit();
}

/* Pairs that do not meet: weight 0, whatever their score. */
template <class S>
static __device__ __forceinline__ void mask(const args &a, const steps &w, const worker<S> &s,
                                            float (&x)[S::ZN])
{
    const int key = s.key0 + s.lane / 4, ahead = w.i * S::QT + s.lane % 4 * 2 - key;
#pragma unroll
    for (int e = 0; e < S::ZN; e++)
        if (ahead < (e >> 1 & 1) * 8 - (e >> 2) * 8 - (e & 1)) x[e] = 0;
    if (a.plain) return;
    const int *low = a.low + w.b * a.np + w.i * S::QT + s.lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < S::QT / 8; n++) {
        const int l[2] = { low[n * 8], low[n * 8 + 1] };
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (key < l[e & 1] - (e >> 1) * 8) x[n * 4 + e] = 0;
    }
}

/* z, once it is there, to p */
template <class S, bool MASKED>
static __device__ __forceinline__ void weights(const args &a, const steps &w, const worker<S> &s,
                                               float (&z)[S::ZN])
{
    const unsigned rows = w.memory + S::ROW_AT + w.stage() * S::QT * 4 + s.lane % 4 * 8;
    const float d = S::GATE ? shared_get(w.memory + S::BASE_AT + w.stage() * 4) : 0;
    wgmma_wait<1>();
    pin(z);
    const float less[2] = { s.ell[0] - d, s.ell[1] - d };
#pragma unroll
    for (int n = 0; n < S::QT / 8; n++) {
        const float2 level = shared_float2(rows + n * 32);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float x = fmaf(z[n * 4 + e], a.scale2, e & 1 ? -level.y : -level.x);
            z[n * 4 + e] = fg_exp2(S::GATE ? x - less[e >> 1] : x);
        }
    }
    if (MASKED) mask<S>(a, w, s, z);
}

/* dp, once it is there, to ds; its sums per key, and over all, for SOME queries, to part */
template <class S, bool MASKED>
static __device__ __forceinline__ void slopes(const steps &w, worker<S> &s,
                                              const float (&p)[S::ZN], float (&dp)[S::ZN],
                                              float (&part)[S::QT / SOME])
{
    const unsigned rows = w.memory + S::ROW_AT + (2 + w.stage()) * S::QT * 4 + s.lane % 4 * 8;
    wgmma_wait<0>();
    pin(dp);
#pragma unroll
    for (int n = 0; n < S::QT / 8; n++) {
        const float2 delta = shared_float2(rows + n * 32);
#pragma unroll
        for (int e = 0; e < 4; e++)
            dp[n * 4 + e] = p[n * 4 + e] * (dp[n * 4 + e] - (e & 1 ? delta.y : delta.x));
    }
    if (MASKED)                          /* whatever go, v and delta hold */
#pragma unroll
        for (int e = 0; e < S::ZN; e++) dp[e] = p[e] == 0 ? 0 : dp[e];
#pragma unroll
    for (int e = 0; S::GATE && e < S::QT / SOME; e++) {
        const float *x = dp + 8 * e;
        const float upper = (x[0] + x[1]) + (x[4] + x[5]), lower = (x[2] + x[3]) + (x[6] + x[7]);
        s.column[0] += upper, s.column[1] += lower;
        part[e] = upper + lower;
    }
}

/* x as the left operand of a product over queries */
template <class S>
static __device__ __forceinline__ void pack(const float (&x)[S::ZN], unsigned (&r)[S::ZN / 2])
{
#pragma unroll
    for (int n = 0; n < S::ZN / 2; n++) r[n] = fg_pack2(x[2 * n], x[2 * n + 1]);
}

/* ds to panels of 64 queries, a row per key */
template <class S>
static __device__ __forceinline__ void ds_put(const worker<S> &s, unsigned to,
                                              const unsigned (&ds)[S::ZN / 2])
{
    /* matrices: rows, rows + 8, the next columns */
    const int row = s.group * 64 + s.warp * 16 + s.lane % 16, right = s.lane / 16;
#pragma unroll
    for (int n = 0; n < S::QT / 8; n += 2) {
        const unsigned at = to + n / 8 * KEYS * 128 + row * 128
                          + ((((n & 7) + right) ^ (row & 7)) << 4);
        store_matrices(at, ds[2 * n], ds[2 * n + 1], ds[2 * n + 2], ds[2 * n + 3]);
    }
}

/* gq = ds k: 64 queries of the warpgroup, or its 64 columns */
template <class S>
static __device__ __forceinline__ void queries_product(const steps &w, const worker<S> &s,
                                                       unsigned ds, float (&gq)[32])
{
    const matrix a(ds + (S::D == 64 ? s.group * KEYS * 128 : 0));
    const matrix b(w.memory + S::K_AT + (S::D == 64 ? 0 : s.group * KEYS * 128));
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++)
        product<1, 1>(gq, a + k * 2048, b + k * 2048, k > 0);
    wgmma_commit();
}

/* sum += x y over the tile's queries, x in registers */
template <class S>
static __device__ __forceinline__ void keys_product(float (&sum)[S::GN],
                                                    const unsigned (&x)[S::ZN / 2], unsigned y)
{
    const matrix b(y, S::QT * 128);
#pragma unroll
    for (int k = 0; k < S::QT / 16; k++) product(sum, x + 4 * k, b + k * 2048);
    wgmma_commit();
}

/* The warp's sums of N values, in N - 1 exchanges and those that the lanes of one value need: lane
 * l returns the sum of value l N / 32. */
template <int N> static __device__ __forceinline__ float sums_of_many(float (&x)[N], int lane)
{
#pragma unroll
    for (int n = N / 2, k = 16; k > 0; n /= 2, k /= 2) {
        if (n == 0) x[0] += __shfl_xor_sync(~0u, x[0], k);
#pragma unroll
        for (int i = 0; i < n; i++) {
            const bool upper = lane & k;
            const float other = __shfl_xor_sync(~0u, upper ? x[i] : x[i + n], k);
            x[i] = (upper ? x[i + n] : x[i]) + other;
        }
    }
    return x[0];
}

/* gq and the warp's sums of ds to where the adders take them from */
template <class S>
static __device__ __forceinline__ void stage_put(const steps &w, const worker<S> &s,
                                                 const float (&gq)[32],
                                                 float (&part)[S::QT / SOME])
{
    const int x = s.warp * 32 + s.lane;
    const float sum = S::GATE ? sums_of_many(part, s.lane) : 0;
    barrier_wait(w.template bar<S>(FREE + w.stage()), w.phase() ^ 1);
    const unsigned to = w.memory + S::GQ_AT + w.stage() * S::GQ + s.group * (S::GQ / 2) + x * 16;
    const unsigned sums = w.memory + S::PART_AT + w.stage() * S::PART;
#pragma unroll
    for (int n = 0; n < 8; n++)
        asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};"
                     :: "r"(to + n * 2048), "f"(gq[4 * n]), "f"(gq[4 * n + 1]), "f"(gq[4 * n + 2]),
                        "f"(gq[4 * n + 3]) : "memory");
    constexpr int LANES = 32 / (S::QT / SOME);
    if (S::GATE && s.lane % LANES == 0)
        shared_put(sums + (s.lane / LANES * 8 + s.group * 4 + s.warp) * 4, sum);
    proxy_fence();
    barrier_arrive(w.template bar<S>(STAGED + 2 * w.stage() + s.group));
}

template <class S>
static __device__ __forceinline__ void keys_store(const args &a, const steps &w, const worker<S> &s)
{
    const int64_t kv = w.h / (int)(a.H / a.Hkv);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int64_t key = s.key0 + s.lane / 4 + 8 * r;
        if (key >= a.N) continue;
        bf16 *gk = (bf16 *)a.gk + (w.b * a.N + key) * a.gk_row + kv * a.D;
        bf16 *gv = (bf16 *)a.gv + (w.b * a.N + key) * a.gv_row + kv * a.D;
#pragma unroll
        for (int n = 0; n < S::D / 8; n++) {
            const int d = n * 8 + s.lane % 4 * 2, e = n * 4 + r * 2;
            if (d >= a.D) continue;
            *(unsigned *)(gk + d) = fg_pack2(s.gk[e] * a.scale, s.gk[e + 1] * a.scale);
            *(unsigned *)(gv + d) = fg_pack2(s.gv[e], s.gv[e + 1]);
        }
    }
}

/* MASKED: some pairs of the tile do not meet. */
template <class S, bool MASKED>
static __device__ __forceinline__ void step(const args &a, const steps &w, worker<S> &s)
{
    const unsigned q = w.memory + S::Q_AT + w.stage() * S::TILE, go = q + S::GO_AT - S::Q_AT;
    const unsigned keys = w.memory + S::K_AT + s.group * 64 * 128;
    const unsigned values = keys + S::V_AT - S::K_AT;
    const unsigned at = w.memory + S::DS_AT + w.stage() * S::DS;
    float z[S::ZN], dp[S::ZN], gq[32], part[S::QT / SOME];
    unsigned p[S::ZN / 2], ds[S::ZN / 2];
    barrier_wait(w.template bar<S>(FULL + w.stage()), w.phase());
    wgmma_begin();
    scores<S>(keys, q, z);
    scores<S>(values, go, dp);
    weights<S, MASKED>(a, w, s, z);
    slopes<S, MASKED>(w, s, z, dp, part);
    pack<S>(z, p), pack<S>(dp, ds);
    ds_put<S>(s, at, ds);
    wgmma_begin();
    keys_product<S>(s.gv, p, go);
    proxy_fence();
    asm volatile("bar.sync 1, 256;" ::: "memory");
    wgmma_begin();
    queries_product<S>(w, s, at, gq);
    keys_product<S>(s.gk, ds, q);
    wgmma_wait<1>();
    pin(gq);
    stage_put<S>(w, s, gq, part);
    wgmma_wait<0>();
    pin(s.gk), pin(s.gv);
    if (s.lane == 0) barrier_arrive(w.template bar<S>(EMPTY + w.stage()));
}

template <class S> static __device__ __forceinline__ void multiply_role(const args &a, steps w)
{
    worker<S> s;
    s.lane = (int)threadIdx.x % 32, s.warp = (int)threadIdx.x / 32 % 4;
    s.group = (int)threadIdx.x / 128 - 1;
    s.key0 = w.j * KEYS + s.group * 64 + s.warp * 16;
#pragma unroll
    for (int e = 0; e < S::GN; e++) s.gk[e] = s.gv[e] = 0;
    head_begin(a, w, s);
    barrier_wait(w.template bar<S>(KV_FULL), 0);
    if (!w.more())
        for (int h = w.h; h < w.h_end; h++) head_end(a, w, s, h);
    while (w.more()) {
        const int h = w.h;
        if (w.masked(a)) step<S, true>(a, w, s);
        else step<S, false>(a, w, s);
        w.advance(a);
        w.count++;
        if (w.h != h || !w.more()) {
            head_end(a, w, s, h);
            if (w.more()) head_begin(a, w, s);
        }
    }
    keys_store<S>(a, w, s);
}
#endif

/* One tile of keys of one key head. */
template <class S> static __global__ void __launch_bounds__(384, 1)
tile_of_keys(const args a, const __grid_constant__ maps m)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) char memory[];
    int *given = (int *)(memory + S::GIVEN_AT);
    steps w;
    w.memory = fg_shared(memory);
    if (threadIdx.x == 0) {
        *given = atomicAdd(a.next, 1);
        barrier_init(w.template bar<S>(KV_FULL), 1);
        barrier_init(w.template bar<S>(BLIND), 1);
        for (int e = 0; e < 2; e++) {
            barrier_init(w.template bar<S>(FULL + e), 1);
            barrier_init(w.template bar<S>(EMPTY + e), 8);
            barrier_init(w.template bar<S>(STAGED + e), 128);
            barrier_init(w.template bar<S>(STAGED + 2 + e), 128);
            barrier_init(w.template bar<S>(FREE + e), 1);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    w.begin(a, *given);
    w.count = 0;
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x < 32) load_role<S>(a, m, w);
        else if (threadIdx.x < 96) add_role<S>(a, w);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        multiply_role<S>(a, w);
    }
#else
    (void)a, (void)m;
#endif
}

/* gq out of its fragments; a tile that nobody added to sees nothing. */
template <class S> static __global__ void __launch_bounds__(256) queries_store(const args a)
{
    __shared__ float part[S::QT][S::D + 4];
    const int64_t i = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
    const int64_t tile = (b * a.H + h) * a.n_q + i;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32 % 4;
    const int group = (int)threadIdx.x / 128;
    const float4 *from = a.sum_q + tile * (S::GQ / 16) + group * (S::GQ / 32) + threadIdx.x % 128;
    const bool any = a.turn[tile] > 0;
    if (!any && threadIdx.x < S::QT / SOME) a.rows[tile * (S::QT / SOME) + threadIdx.x] = 0;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const float4 x = any ? from[n * 128] : make_float4(0, 0, 0, 0);
        const int r = warp * 16 + lane / 4 + (S::D == 64 ? group * 64 : 0);
        const int d = n * 8 + lane % 4 * 2 + (S::D == 64 ? 0 : group * 64);
        *(float2 *)&part[r][d] = make_float2(x.x * a.scale, x.y * a.scale);
        *(float2 *)&part[r + 8][d] = make_float2(x.z * a.scale, x.w * a.scale);
    }
    __syncthreads();
    for (int e = (int)threadIdx.x; e < S::QT * S::D / 8; e += 256) {
        const int r = e / (S::D / 8), d = e % (S::D / 8) * 8;
        const int64_t t = i * S::QT + r;
        if (t >= a.N || d >= a.D) continue;
        fg_vec8 x;
#pragma unroll
        for (int k = 0; k < 8; k++) x[k] = part[r][d + k];
        fg_store8(fg_out{ a.gq, true }, (b * a.N + t) * a.gq_row + h * a.D + d, x);
    }
}

typedef CUresult (*encode_fn)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                              const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                              const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* The driver's function, found at run time so that nothing links to the driver; NULL: too old. */
static encode_fn encoder()
{
    void *f = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault,
                                         &found) != cudaSuccess
        || found != cudaDriverEntryPointSuccess) return nullptr;
    return (encode_fn)f;
}

static CUtensorMap map_of(encode_fn encode, const args &a, const void *x, int64_t heads,
                          int64_t pitch, int rows)
{
    CUtensorMap m;
    const cuuint64_t size[4] = { (cuuint64_t)a.D, (cuuint64_t)heads, (cuuint64_t)a.N,
                                 (cuuint64_t)a.B };
    const cuuint64_t bytes[3] = { (cuuint64_t)a.D * 2, (cuuint64_t)pitch * 2,
                                  (cuuint64_t)(a.N * pitch) * 2 };
    const cuuint32_t box[4] = { 64, 1, (cuuint32_t)rows, 1 }, each[4] = { 1, 1, 1, 1 };
    encode(&m, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, (void *)x, size, bytes, box, each,
           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return m;
}

template <class S> static void run(const args &a, cudaStream_t stream)
{
    const encode_fn encode = encoder();
    const maps m = { map_of(encode, a, a.q, a.H, a.q_row, S::QT),
                     map_of(encode, a, a.go, a.H, a.H * a.D, S::QT),
                     map_of(encode, a, a.k, a.Hkv, a.k_row, KEYS),
                     map_of(encode, a, a.v, a.Hkv, a.v_row, KEYS) };
    cudaFuncSetAttribute(tile_of_keys<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::SHARED);
    tile_of_keys<S><<<(unsigned)(a.B * a.Hkv * a.n_k), 384, S::SHARED, stream>>>(a, m);
    const dim3 tiles((unsigned)a.n_q, (unsigned)a.H, (unsigned)a.B);
    queries_store<S><<<tiles, 256, 0, stream>>>(a);
}

void fg_forget_attention_grad_sm90(const args &a, cudaStream_t stream)
{
    if (a.D <= 64 && a.log_f) run<layout<64, true>>(a, stream);
    else if (a.D <= 64) run<layout<64, false>>(a, stream);
    else if (a.log_f) run<layout<128, true>>(a, stream);
    else run<layout<128, false>>(a, stream);
}

bool fg_forget_attention_grad_has_sm90()
{
    cudaFuncAttributes f;
    if (cudaFuncGetAttributes(&f, tile_of_keys<layout<64, true>>) != cudaSuccess) {
        cudaGetLastError();              /* no error of the caller's */
        return false;
    }
    return f.binaryVersion == 90 && f.ptxVersion == 90 && encoder();
}
