/* forget_attention_grad.cu - gradient of forget_attention: rows, gates, and tensor cores.
 *
 *     p_ij     = 2^(z_ij + C_i - C_j - L_i)             z, C, L: scores, gates, lse in base 2
 *     ds_ij    = p_ij (go_i.v_j - delta_i),   delta_i = go_i.o_i - glse_i
 *     gq_i     = scale sum_j ds_ij k_j,   gk_j = scale sum_i ds_ij q_i,   gv_j = sum_i p_ij go_i
 *     glog_f_t = sum_(m>=t) (sum_j ds_mj - sum_i ds_im)
 *
 * Gates: C_i - C_j = ell_i + (base_I - base_J) - ell_j, as attention.cuh says.
 *
 * bf16, D <= 128: five products.  A block of threads keeps one tile of keys and walks the tiles of
 * queries below the diagonal.  On Hopper that is forget_attention_grad_sm90.cu; here, a warp owns
 * 16 or 32 keys and makes S^T = K Q^T and dP^T = V dO^T for 16 queries at a time, so that P^T and
 * dS^T are, in registers, the left operands of gV += P^T dO and gK += dS^T Q.  Only dS goes through
 * shared memory, for gQ = dS K.  That is added up in f32 in device memory by one tile of keys after
 * the other: a turn per tile of queries says who is next (walk, in forget_attention_grad.cuh).
 *
 * The gate's gradient takes column sums in f32 before rounding, and the sum of every 16 queries,
 * added under the same turn and spread over them: rows sum to 0 but for rounding, and without that
 * residue the long sum over m would be a random walk of roundings.  Sums over tokens are in double.
 *
 * All else (f32, or any D up to 256): forget_attention_grad_plain.cu.
 *
 * Bytes at the least, bf16, H = Hkv: q, k, v, o, go, gq, gk, gv once and go twice, 18 B N H D.
 * Moved besides: gq in f32 once to and from device memory, 8 B N H D, and through the L2 cache
 * for every 128 keys; go and q for every 128 keys, from the L2 cache.
 * Source: as ops/forget_attention_grad.c; tiles and order as in Dao 2023, "FlashAttention-2:
 * Faster Attention with Better Parallelism and Work Partitioning", 3.1-3.2. */
#include "forget_attention_grad.cuh"

enum { GO, GLSE, Q, K, V, LOG_F, O, LSE, FIRST };

/* ---- gates and rows ------------------------------------------------------------------------- */

/* Per row L_i - ell_i and delta_i, and what has to start at 0.  LANES threads read a row. */
template <int LANES> static __global__ void __launch_bounds__(256) rows_fill(const args a)
{
    const int64_t tile = blockIdx.x, h = blockIdx.y, b = blockIdx.z, head = b * a.H + h;
    const int lane = threadIdx.x % LANES;
    const fg_in go = { a.go, a.narrow }, o = { a.o, a.narrow };
    if (threadIdx.x == 0) {
        a.turn[head * a.n_q + tile] = 0;
        if (tile + h + b == 0) *a.next = 0;
    }
    for (int r = (int)threadIdx.x / LANES; r < a.tile; r += 256 / LANES) {
        const int64_t t = tile * a.tile + r, at = (b * a.N + t) * a.H + h;
        float delta = 0, level = INFINITY;
        if (t < a.N && !(a.first && a.first[b * a.N + t] > t)) {
            if (LANES < 32 || a.D % 8 == 0) {
                for (int64_t d = lane * 8; d < a.D; d += LANES * 8) {
                    const fg_vec8 x = fg_load8(go, at * a.D + d), y = fg_load8(o, at * a.D + d);
#pragma unroll
                    for (int i = 0; i < 8; i++) delta = fmaf(x[i], y[i], delta);
                }
            } else {
                for (int64_t d = lane; d < a.D; d += LANES)
                    delta = fmaf(go[at * a.D + d], o[at * a.D + d], delta);
            }
            level = a.lse[at] * (float)FG_LOG2_E;
            if (a.gates.ell) level -= a.gates.ell[head * a.np + t];
        }
        delta = fg_warp_sum<LANES>(delta);
        if (level < INFINITY && a.glse) delta -= a.glse[at];
        if (lane) continue;
        a.level[head * a.np + t] = level;
        a.delta[head * a.np + t] = level < INFINITY ? delta : 0;
    }
}

/* The lowest key that each row sees, and what that means for its tile. */
static __global__ void __launch_bounds__(128) spans_fill(const args a)
{
    __shared__ int part[3][4];
    const int64_t tile = blockIdx.x, b = blockIdx.y, t = tile * a.tile + threadIdx.x;
    int64_t from = 0;
    if (t < a.N) {
        if (a.first) from = a.first[b * a.N + t];
        if (a.window && t - a.window + 1 > from) from = t - a.window + 1;
    }
    const bool sees = t < a.N && from <= t;
    const int low = sees ? (int)(from > 0 ? from : 0) : UNSEEN;
    a.low[b * a.np + t] = low;
    const int least = __reduce_min_sync(~0u, low);
    const int most = __reduce_max_sync(~0u, sees ? low : 0);
    const int blind = __any_sync(~0u, t < a.N && !sees);
    if (threadIdx.x % 32 == 0) {
        part[0][threadIdx.x / 32] = least;
        part[1][threadIdx.x / 32] = most;
        part[2][threadIdx.x / 32] = blind;
    }
    __syncthreads();
    if (threadIdx.x) return;
    int l = UNSEEN, high = 0, any = 0;
    for (int w = 0; w < a.tile / 32; w++)
        l = min(l, part[0][w]), high = max(high, part[1][w]), any |= part[2][w];
    a.span[b * a.n_q + tile] = make_int4(l == UNSEEN ? UNSEEN : l / a.keys, high, any, 0);
}

/* last_j: the last tile of queries that sees tile j of keys, or -1. */
static __global__ void __launch_bounds__(1024) lasts_fill(const args a)
{
    const int64_t b = blockIdx.x;
    for (int j = (int)threadIdx.x; j < a.n_k; j += 1024) {
        int i = a.n_q - 1;
        const int64_t end = a.first || !a.window ? a.N
                          : (int64_t)(j + 1) * a.keys - 1 + a.window;
        if (end / a.tile < i) i = (int)(end / a.tile);
        while (i >= 0 && a.span[b * a.n_q + i].x > j) i--;
        a.last[b * a.n_k + j] = i;
    }
}

/* ---- tensor cores --------------------------------------------------------------------------- */

static __device__ __forceinline__ void add_float4(float4 *to, float4 x)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1,%2,%3,%4};"
                 :: "l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
#else
    float *p = (float *)to;
    atomicAdd(p, x.x), atomicAdd(p + 1, x.y), atomicAdd(p + 2, x.z), atomicAdd(p + 3, x.w);
#endif
}

/* Sizes of a tile and where its parts lie in shared memory.  Rows of 16-byte chunks; chunk c of row
 * r lies at c ^ r % 8, so that eight rows of a matrix never meet in a bank. */
template <int D_, int WARPS_, int MT_, int PER_SM_, int KEEP_> struct shape {
    static constexpr int D = D_, WARPS = WARPS_, MT = MT_, PER_SM = PER_SM_;
    static constexpr bool KEEP_K = KEEP_ & 1, KEEP_V = KEEP_ & 2;   /* in registers */
    static constexpr int THREADS = WARPS * 32, OWN = MT * 16, KEYS = WARPS * OWN;
    static constexpr int CH = SOME;                        /* queries at a time */
    static constexpr int KS = D / 16, NT = D / 8;          /* steps of 16, columns of 8 */
    static constexpr int WIDE = D / (WARPS / 2), WT = WIDE / 8;   /* a warp's part of gq: 32 rows */
    static constexpr int BYTES = D * 2;                    /* of a row */
    static constexpr int K_AT = 0, V_AT = K_AT + KEYS * BYTES, Q_AT = V_AT + KEYS * BYTES;
    static constexpr int GO_AT = Q_AT + 2 * ROWS * BYTES, DS_AT = GO_AT + 2 * ROWS * BYTES;
    static constexpr int ROW_AT = DS_AT + KEYS * ROWS * 2, LOW_AT = ROW_AT + 4 * ROWS * 4;
    static constexpr int BASE_AT = LOW_AT + 2 * ROWS * 4, PART_AT = BASE_AT + 16;
    static constexpr int SHARED = PART_AT + 2 * (ROWS / SOME) * WARPS * 4;
    static constexpr int TILE4 = ROWS * D / 4;             /* float4 of a tile of gq */
};

/* A thread's place and its share of the tile of keys. */
template <class S> struct share {
    unsigned memory;                     /* shared memory */
    int lane, warp, key0;                /* key0: of the tile */
    int64_t b;
    double base;                         /* of the keys' block */
    unsigned k[S::MT][S::KEEP_K ? S::KS : 1][4], v[S::MT][S::KEEP_V ? S::KS : 1][4];
    float gk[S::MT][S::NT][4], gv[S::MT][S::NT][4];
    float ell[S::MT][2], column[S::MT][2];
};
/* A step: one tile of queries of one head. */
struct step {
    int i, stage;
    int64_t h;
    bool masked;
};

/* Offset of a lane's row in the 16 x 16 that an ldmatrix reads.  ROWS_FIRST: matrices 1 and 3 are
 * the rows' second half, otherwise the columns'. */
template <bool ROWS_FIRST>
static __device__ __forceinline__ unsigned lane_offset(int lane, int bytes)
{
    const int m = lane / 8, row = lane % 8 + 8 * (ROWS_FIRST ? m & 1 : m >> 1);
    const int half = ROWS_FIRST ? m >> 1 : m & 1;
    return (unsigned)(row * bytes + ((half ^ (lane & 7)) << 4));
}

template <class S>
static __device__ __forceinline__ void keys_load(const args &a, const share<S> &s, int64_t kv)
{
    constexpr int PER = S::D / 8;
    const int c = (int)threadIdx.x % PER;
    for (int r = (int)threadIdx.x / PER; r < S::KEYS; r += S::THREADS / PER) {
        const int64_t t = s.key0 + r;
        const bool there = t < a.N && c * 8 < a.D;
        const int64_t token = s.b * a.N + (there ? t : 0), d = there ? kv * a.D + c * 8 : 0;
        const unsigned to = s.memory + r * S::BYTES + ((c ^ (r & 7)) << 4);
        fg_copy_async(to + S::K_AT, (const bf16 *)a.k + token * a.k_row + d, there);
        fg_copy_async(to + S::V_AT, (const bf16 *)a.v + token * a.v_row + d, there);
    }
}

template <class S>
static __device__ __forceinline__ void queries_load(const args &a, const share<S> &s, step p)
{
    constexpr int PER = S::D / 8;
    const int c = (int)threadIdx.x % PER, x = (int)threadIdx.x;
    const bool blind = !a.plain && a.span[s.b * a.n_q + p.i].z;
    const int64_t tile0 = (int64_t)p.i * ROWS, at = (s.b * a.H + p.h) * a.np + tile0;
    const unsigned memory = s.memory + p.stage * ROWS * S::BYTES;
#pragma unroll
    for (int r = x / PER; r < ROWS; r += S::THREADS / PER) {
        const int64_t t = tile0 + r;
        const bool there = t < a.N && c * 8 < a.D;
        const int64_t token = s.b * a.N + (there ? t : 0), d = there ? p.h * a.D + c * 8 : 0;
        const bool sees = there && !(blind && a.low[s.b * a.np + t] == UNSEEN);
        const unsigned to = memory + r * S::BYTES + ((c ^ (r & 7)) << 4);
        fg_copy_async(to + S::Q_AT, (const bf16 *)a.q + token * a.q_row + d, there);
        fg_copy_async(to + S::GO_AT, (const bf16 *)a.go + token * a.H * a.D + d, sees);
    }
    const int y = x % (ROWS / 4), part = x / (ROWS / 4);
    const unsigned row = s.memory + S::ROW_AT + p.stage * ROWS * 4 + y * 16;
    if (part == 0) fg_copy_async(row, a.level + at + y * 4, true);
    else if (part == 1) fg_copy_async(row + 2 * ROWS * 4, a.delta + at + y * 4, true);
    else if (part == 2)
        fg_copy_async(row + 4 * ROWS * 4, a.low + s.b * a.np + tile0 + y * 4, true);
    else if (y == 0 && a.gates.block)
        copy8(s.memory + S::BASE_AT + p.stage * 8,
              &a.gates.block[(s.b * a.H + p.h) * a.gates.blocks + tile0 / FG_GATE_BLOCK].base);
}

/* Where the warp's 16 keys m and columns 16 k lie, as a left operand. */
template <class S>
static __device__ __forceinline__ unsigned keys_at(unsigned memory, int lane, int warp, int m,
                                                   int k)
{
    const unsigned at = memory + lane_offset<true>(lane, S::BYTES) + warp * S::OWN * S::BYTES;
    return (at ^ (32 * (k & 3))) + m * 16 * S::BYTES + (k >> 2) * 128;
}

/* z and dP of the warp's keys and 16 queries from row n on; dP starts at -delta. */
template <class S>
static __device__ __forceinline__ void scores(share<S> &s, unsigned q, unsigned go,
                                              float (&z)[S::MT][2][4], float (&dp)[S::MT][2][4])
{
#pragma unroll
    for (int k = 0; k < S::KS; k++) {
        unsigned b[4], c[4];
        fg_ldmatrix(b, (q ^ (32 * (k & 3))) + (k >> 2) * 128);
        fg_ldmatrix(c, (go ^ (32 * (k & 3))) + (k >> 2) * 128);
#pragma unroll
        for (int m = 0; m < S::MT; m++) {
            const unsigned from = keys_at<S>(s.memory, s.lane, s.warp, m, k);
            if (!S::KEEP_K) fg_ldmatrix(s.k[m][0], from + S::K_AT);
            if (!S::KEEP_V) fg_ldmatrix(s.v[m][0], from + S::V_AT);
            const unsigned *x = s.k[m][S::KEEP_K ? k : 0], *y = s.v[m][S::KEEP_V ? k : 0];
            fg_mma(z[m][0], x, b[0], b[1]);
            fg_mma(z[m][1], x, b[2], b[3]);
            fg_mma(dp[m][0], y, c[0], c[1]);
            fg_mma(dp[m][1], y, c[2], c[3]);
        }
    }
}

/* Pairs that do not meet, whatever their values. */
template <class S>
static __device__ __forceinline__ void mask(const share<S> &s, step p, int n,
                                            float (&z)[S::MT][2][4], float (&dp)[S::MT][2][4])
{
    const int *low = (const int *)__cvta_shared_to_generic(s.memory + S::LOW_AT)
                   + p.stage * ROWS + n + s.lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int t = 0; t < 2; t++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int key = s.key0 + s.warp * S::OWN + m * 16 + s.lane / 4 + (e >> 1) * 8;
                const int query = p.i * ROWS + n + t * 8 + s.lane % 4 * 2 + (e & 1);
                if (key > query || key < low[t * 8 + (e & 1)]) z[m][t][e] = dp[m][t][e] = 0;
            }
}

/* z to p and dp to ds; ds is summed per key, and over all to sum. */
template <class S>
static __device__ __forceinline__ void weights(const args &a, const share<S> &s, step p, int n,
                                               float d, const float2 (&level)[2],
                                               float (&z)[S::MT][2][4], float (&dp)[S::MT][2][4],
                                               float (&column)[S::MT][2], float &sum)
{
#pragma unroll
    for (int t = 0; t < 2; t++) {
        const float l0 = d - level[t].x, l1 = d - level[t].y;
#pragma unroll
        for (int m = 0; m < S::MT; m++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float x = fmaf(z[m][t][e], a.scale2, e & 1 ? l1 : l0) - s.ell[m][e >> 1];
                z[m][t][e] = fg_exp2(x);
                dp[m][t][e] *= z[m][t][e];
            }
    }
    if (p.masked) mask(s, p, n, z, dp);
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float x = (dp[m][0][2 * r] + dp[m][0][2 * r + 1])
                          + (dp[m][1][2 * r] + dp[m][1][2 * r + 1]);
            column[m][r] += x;
            sum += x;
        }
}

/* x of two columns of 8 as the left operand of a product over these 16. */
static __device__ __forceinline__ void pack(const float (&x)[2][4], unsigned (&r)[4])
{
    r[0] = fg_pack2(x[0][0], x[0][1]);
    r[1] = fg_pack2(x[0][2], x[0][3]);
    r[2] = fg_pack2(x[1][0], x[1][1]);
    r[3] = fg_pack2(x[1][2], x[1][3]);
}

/* dS^T to shared memory, rows of 64 queries. */
template <class S>
static __device__ __forceinline__ void ds_put(const share<S> &s, int m, int n,
                                              const unsigned (&r)[4])
{
    const unsigned at = s.memory + S::DS_AT + (s.warp * S::OWN + m * 16 + s.lane / 4) * 128
                      + s.lane % 4 * 4;
    const unsigned x = (unsigned)(n >> 3) ^ (unsigned)(s.lane / 4);
    asm volatile("st.shared.b32 [%0], %1;" :: "r"(at + (x << 4)), "r"(r[0]) : "memory");
    asm volatile("st.shared.b32 [%0], %1;" :: "r"(at + (x << 4) + 1024), "r"(r[1]) : "memory");
    asm volatile("st.shared.b32 [%0], %1;" :: "r"(at + ((x ^ 1) << 4)), "r"(r[2]) : "memory");
    asm volatile("st.shared.b32 [%0], %1;" :: "r"(at + ((x ^ 1) << 4) + 1024), "r"(r[3])
                 : "memory");
}

/* gV += P^T dO, gK += dS^T Q over 16 queries, whose rows begin at q and go. */
template <class S>
static __device__ __forceinline__ void accumulate(share<S> &s, unsigned q, unsigned go,
                                                  const unsigned (&p)[S::MT][4],
                                                  const unsigned (&ds)[S::MT][4])
{
#pragma unroll
    for (int k = 0; k < S::KS; k++) {
        unsigned b[4], c[4];
        fg_ldmatrix_trans(b, (go ^ (32 * (k & 3))) + (k >> 2) * 128);
        fg_ldmatrix_trans(c, (q ^ (32 * (k & 3))) + (k >> 2) * 128);
#pragma unroll
        for (int m = 0; m < S::MT; m++) {
            fg_mma(s.gv[m][2 * k], p[m], b[0], b[1]);
            fg_mma(s.gv[m][2 * k + 1], p[m], b[2], b[3]);
            fg_mma(s.gk[m][2 * k], ds[m], c[0], c[1]);
            fg_mma(s.gk[m][2 * k + 1], ds[m], c[2], c[3]);
        }
    }
}

/* The warps' sums of ds over SOME queries */
template <class S>
static __device__ __forceinline__ unsigned part_at(const share<S> &s, int stage, int some)
{
    return s.memory + S::PART_AT + (stage * (ROWS / SOME) + some) * S::WARPS * 4;
}
static __device__ __forceinline__ void part_put(unsigned at, float x)
{
    asm volatile("st.shared.f32 [%0], %1;" :: "r"(at), "f"(x) : "memory");
}

/* All of a step but gq; the warp's sums of ds go to shared memory. */
template <class S>
static __device__ __forceinline__ void step_keys(const args &a, share<S> &s, step p)
{
    const unsigned rows = s.memory + S::ROW_AT + p.stage * ROWS * 4 + s.lane % 4 * 8;
    const unsigned q = s.memory + S::Q_AT + p.stage * ROWS * S::BYTES, go = q + S::GO_AT - S::Q_AT;
    const unsigned plain = lane_offset<false>(s.lane, S::BYTES);
    const unsigned turned = lane_offset<true>(s.lane, S::BYTES);
    float d = 0, column[S::MT][2] = {};
    if (a.gates.block) {
        double base;
        asm volatile("ld.shared.f64 %0, [%1];"
                     : "=d"(base) : "r"(s.memory + S::BASE_AT + p.stage * 8) : "memory");
        d = (float)(base - s.base);
    }
#pragma unroll 1
    for (int n = 0; n < ROWS; n += S::CH) {
        unsigned w[S::MT][4] = {}, u[S::MT][4] = {};
        float sum = 0;
        const bool any = p.i * ROWS + n + S::CH > s.key0 + s.warp * S::OWN;
        if (any) {
            const unsigned levels = rows + n * 4, deltas = levels + 2 * ROWS * 4;
            const float2 level[2] = { shared_float2(levels), shared_float2(levels + 32) };
            const float2 delta[2] = { shared_float2(deltas), shared_float2(deltas + 32) };
            float z[S::MT][2][4] = {}, dp[S::MT][2][4];
#pragma unroll
            for (int m = 0; m < S::MT; m++)
#pragma unroll
                for (int e = 0; e < 8; e++)
                    dp[m][e >> 2][e & 3] = e & 1 ? -delta[e >> 2].y : -delta[e >> 2].x;
            scores(s, q + n * S::BYTES + plain, go + n * S::BYTES + plain, z, dp);
            weights(a, s, p, n, d, level, z, dp, column, sum);
#pragma unroll
            for (int m = 0; m < S::MT; m++) pack(z[m], w[m]), pack(dp[m], u[m]);
        }
#pragma unroll
        for (int m = 0; m < S::MT; m++) ds_put(s, m, n, u[m]);
        if (any) accumulate(s, q + n * S::BYTES + turned, go + n * S::BYTES + turned, w, u);
        sum = fg_warp_sum(sum);
        if (s.lane == 0) part_put(part_at(s, p.stage, n / SOME) + s.warp * 4, sum);
    }
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) s.column[m][r] += column[m][r];
}

/* gQ / scale of the step: 32 rows and WIDE columns are the warp's. */
template <class S>
static __device__ __forceinline__ void step_queries(const share<S> &s, step p,
                                                    float (&c)[2][S::WT][4])
{
    const int from = s.warp % 2 * 32, wide = s.warp / 2 * S::WIDE;
    const int end = min(S::KEYS, (p.i + 1) * ROWS - s.key0);
    const int l = s.lane, m = l / 8;
    /* dS^T is [key][query]: matrices 1 and 3 are the second half of queries */
    const unsigned ds = s.memory + S::DS_AT + (l % 8 + 8 * (m >> 1)) * 128
                      + (((from / 8 + (m & 1)) ^ (l & 7)) << 4);
    const unsigned k = s.memory + S::K_AT + (l % 8 + 8 * (m & 1)) * S::BYTES
                     + (((wide / 8 + (m >> 1)) ^ (l & 7)) << 4);
#pragma unroll
    for (int e = 0; e < 2 * S::WT * 4; e++) c[e / (4 * S::WT)][e / 4 % S::WT][e % 4] = 0;
#pragma unroll 2
    for (int j = 0; j < end; j += 16) {
        unsigned x[2][4];
        fg_ldmatrix_trans(x[0], ds + j * 128);
        fg_ldmatrix_trans(x[1], (ds ^ 32) + j * 128);
#pragma unroll
        for (int n = 0; n < S::WT / 2; n++) {
            unsigned y[4];
            fg_ldmatrix_trans(y, (k ^ (32 * (n & 3))) + (n >> 2) * 128 + j * S::BYTES);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                fg_mma(c[r][2 * n], x[r], y[0], y[1]);
                fg_mma(c[r][2 * n + 1], x[r], y[2], y[3]);
            }
        }
    }
}

/* Adds the warp's part of gq when its turn has come; rank: tiles of keys that add before. */
template <class S>
static __device__ __forceinline__ void queries_add(const args &a, const share<S> &s, int64_t tile,
                                                   int rank, const float (&c)[2][S::WT][4])
{
    float4 *to = a.sum_q + tile * S::TILE4 + s.warp * (2 * S::WT * 32) + s.lane;
    if (rank > 0) {
        if (s.lane == 0)
            while (turn_now(a.turn + tile) < rank) { }
        __syncwarp();
    }
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int n = 0; n < S::WT; n++) {
            const float4 x = make_float4(c[r][n][0], c[r][n][1], c[r][n][2], c[r][n][3]);
            if (rank == 0) to[(r * S::WT + n) * 32] = x;
            else add_float4(to + (r * S::WT + n) * 32, x);
        }
}

/* The tile's sums of ds, then the turn of the next; by one warp, after a barrier. */
template <class S>
static __device__ __forceinline__ void turn_pass(const args &a, const share<S> &s, int stage,
                                                 int64_t tile, int rank)
{
    if (s.lane < ROWS / SOME) {
        float sum = 0, *row = a.rows + tile * (ROWS / SOME) + s.lane;
#pragma unroll
        for (int w = 0; w < S::WARPS; w++) {
            float x;
            asm volatile("ld.shared.f32 %0, [%1];"
                         : "=f"(x) : "r"(part_at(s, stage, s.lane) + w * 4) : "memory");
            sum += x;
        }
        if (rank == 0) *row = sum;
        else atomicAdd(row, sum);        /* one adder at a time, in the order of turns */
    }
    __syncwarp();
    if (s.lane == 0) turn_set(a.turn + tile, rank + 1);
}

template <class S>
static __device__ __forceinline__ void columns_begin(const args &a, share<S> &s, int64_t h)
{
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int64_t key = s.key0 + s.warp * S::OWN + m * 16 + s.lane / 4 + 8 * r;
            s.column[m][r] = 0;
            s.ell[m][r] = a.gates.ell ? a.gates.ell[(s.b * a.H + h) * a.np + key] : 0;
        }
    const fg_gate_block *block = a.gates.block;
    if (block) s.base = block[(s.b * a.H + h) * a.gates.blocks + s.key0 / FG_GATE_BLOCK].base;
}
template <class S>
static __device__ __forceinline__ void columns_end(const args &a, const share<S> &s, int64_t h)
{
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int64_t key = s.key0 + s.warp * S::OWN + m * 16 + s.lane / 4 + 8 * r;
            const float sum = fg_warp_sum<4>(s.column[m][r]);
            if (s.lane % 4 == 0 && key < a.np) a.column[(s.b * a.H + h) * a.np + key] = sum;
        }
}

template <class S>
static __device__ __forceinline__ void keys_store(const args &a, const share<S> &s, int64_t kv)
{
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int64_t key = s.key0 + s.warp * S::OWN + m * 16 + s.lane / 4 + 8 * r;
            if (key >= a.N) continue;
            bf16 *gk = (bf16 *)a.gk + (s.b * a.N + key) * a.gk_row + kv * a.D;
            bf16 *gv = (bf16 *)a.gv + (s.b * a.N + key) * a.gv_row + kv * a.D;
#pragma unroll
            for (int n = 0; n < S::NT; n++) {
                const int d = n * 8 + s.lane % 4 * 2;
                if (d >= a.D) continue;
                *(unsigned *)(gk + d) = fg_pack2(s.gk[m][n][2 * r] * a.scale,
                                                 s.gk[m][n][2 * r + 1] * a.scale);
                *(unsigned *)(gv + d) = fg_pack2(s.gv[m][n][2 * r], s.gv[m][n][2 * r + 1]);
            }
        }
}

template <class S> static __device__ __forceinline__ void keys_keep(share<S> &s)
{
#pragma unroll
    for (int m = 0; m < S::MT; m++)
#pragma unroll
        for (int k = 0; k < S::KS; k++) {
            const unsigned from = keys_at<S>(s.memory, s.lane, s.warp, m, k);
            if (S::KEEP_K) fg_ldmatrix(s.k[m][k], from + S::K_AT);
            if (S::KEEP_V) fg_ldmatrix(s.v[m][k], from + S::V_AT);
        }
}

/* One tile of keys of one key head. */
template <class S> static __global__ void __launch_bounds__(S::THREADS, S::PER_SM)
tile_of_keys(const args a)
{
    extern __shared__ __align__(1024) char memory[];
    __shared__ int given;
    if (threadIdx.x == 0) given = atomicAdd(a.next, 1);
    __syncthreads();
    walk w;
    w.begin(a, given);
    const int h0 = w.h, kv = h0 / (int)(a.H / a.Hkv);
    share<S> s;
    s.memory = fg_shared(memory), s.lane = (int)threadIdx.x % 32, s.warp = (int)threadIdx.x / 32;
    s.key0 = w.j * S::KEYS, s.b = w.b;
#pragma unroll
    for (int e = 0; e < S::MT * S::NT * 4; e++) {
        const int m = e / (4 * S::NT), n = e / 4 % S::NT;
        s.gk[m][n][e % 4] = s.gv[m][n][e % 4] = 0;
    }
    step p = { w.i, 0, w.h, false };
    columns_begin(a, s, p.h);
    keys_load(a, s, kv);
    if (w.more()) queries_load(a, s, p);
    fg_copy_commit();
    fg_copy_wait<0>();
    __syncthreads();
    keys_keep(s);
    int64_t before = -1;                 /* the tile of queries whose turn is still to be passed */
    int rank = 0;
    while (w.more()) {
        fg_copy_wait<0>();
        __syncthreads();
        if (before >= 0 && s.warp == 0) turn_pass(a, s, p.stage ^ 1, before, rank);
        before = w.tile(a), rank = w.rank(a), p.masked = w.masked(a);
        w.advance(a);
        const step next = { w.i, p.stage ^ 1, w.h, false };
        if (w.more()) queries_load(a, s, next);
        fg_copy_commit();
        step_keys(a, s, p);
        __syncthreads();
        float c[2][S::WT][4];
        step_queries(s, p, c);
        queries_add(a, s, before, rank, c);
        if (next.h != p.h || !w.more()) {
            columns_end(a, s, p.h);
            if (w.more()) columns_begin(a, s, next.h);
        }
        p = next;
    }
    __syncthreads();
    if (before >= 0 && s.warp == 0) turn_pass(a, s, p.stage ^ 1, before, rank);
    if (before < 0)
        for (int h = h0; h < w.h_end; h++) columns_end(a, s, h);
    keys_store(a, s, kv);
}

/* gq out of its fragments; a tile that nobody added to sees nothing. */
template <class S> static __global__ void __launch_bounds__(S::THREADS) queries_store(const args a)
{
    __shared__ float part[ROWS][S::D + 4];
    const int64_t i = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
    const int64_t tile = (b * a.H + h) * a.n_q + i;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const float4 *from = a.sum_q + tile * S::TILE4 + warp * (2 * S::WT * 32) + lane;
    const bool any = a.turn[tile] > 0;
    if (!any && threadIdx.x < ROWS / SOME) a.rows[tile * (ROWS / SOME) + threadIdx.x] = 0;
#pragma unroll
    for (int e = 0; e < 2 * S::WT; e++) {
        const float4 x = any ? from[e * 32] : make_float4(0, 0, 0, 0);
        const int r = warp % 2 * 32 + e / S::WT * 16 + lane / 4;
        const int d = warp / 2 * S::WIDE + e % S::WT * 8 + lane % 4 * 2;
        part[r][d] = x.x * a.scale, part[r][d + 1] = x.y * a.scale;
        part[r + 8][d] = x.z * a.scale, part[r + 8][d + 1] = x.w * a.scale;
    }
    __syncthreads();
    for (int e = (int)threadIdx.x; e < ROWS * S::D / 8; e += S::THREADS) {
        const int r = e / (S::D / 8), d = e % (S::D / 8) * 8;
        const int64_t t = i * ROWS + r;
        if (t >= a.N || d >= a.D) continue;
        fg_vec8 x;
#pragma unroll
        for (int k = 0; k < 8; k++) x[k] = part[r][d + k];
        fg_store8(fg_out{ a.gq, true }, (b * a.N + t) * a.gq_row + h * a.D + d, x);
    }
}

/* ---- the gate's gradient -------------------------------------------------------------------- */

/* The sums over keys of 4 rows' ds.  some: those of SOME rows together are known; a row's own is
 * glse, and an equal part of what else that sum holds.  If that is NaN, only of rows that are. */
static __device__ __forceinline__ void row_sums(const args &a, bool some, int64_t b, int64_t h,
                                                int64_t t, float (&row)[4])
{
    const int64_t head = b * a.H + h, from = t / SOME * SOME;
    if (!some) {
#pragma unroll
        for (int e = 0; e < 4; e++) row[e] = t + e < a.N ? a.rows[head * a.np + t + e] : 0;
        return;
    }
    float sum = 0;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const bool sees = a.glse && t + e < a.N && a.low[b * a.np + t + e] != UNSEEN;
        sum += row[e] = sees ? a.glse[(b * a.N + t + e) * a.H + h] : 0;
    }
    sum = fg_warp_sum<SOME / 4>(sum);
    const int64_t rows = a.N - from < SOME ? a.N - from : SOME;
    const int64_t at = head * a.n_q * (a.tile / SOME) + from / SOME;
    const float rest = t < a.N ? (a.rows[at] - sum) / (float)rows : 0;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const bool own = t + e < a.N && (!isnan(rest) || isnan(a.level[head * a.np + t + e]));
        row[e] = t + e < a.N ? row[e] + (own ? rest : 0) : 0;
    }
}

/* A sum over tokens from the last to the first; shut: it began anew among them. */
struct suffix {
    double sum;
    bool shut;
    __device__ void add(const suffix &later)
    {
        if (!shut) sum += later.sum;
        shut |= later.shut;
    }
};

/* The least of what the lanes behind this one have, or the sum over them; *all: of this one too. */
static __device__ __forceinline__ int least_behind(int x, int lane, int *all)
{
#pragma unroll
    for (int k = 1; k < 32; k *= 2) {
        const int y = __shfl_down_sync(~0u, x, k);
        if (lane + k < 32) x = min(x, y);
    }
    *all = x;
    const int y = __shfl_down_sync(~0u, x, 1);
    return lane < 31 ? y : UNSEEN;
}
static __device__ __forceinline__ suffix sum_behind(suffix x, int lane, suffix *all)
{
#pragma unroll
    for (int k = 1; k < 32; k *= 2) {
        const suffix y = { __shfl_down_sync(~0u, x.sum, k),
                           (bool)__shfl_down_sync(~0u, (int)x.shut, k) };
        if (lane + k < 32) x.add(y);
    }
    *all = x;
    const suffix y = { __shfl_down_sync(~0u, x.sum, 1),
                       (bool)__shfl_down_sync(~0u, (int)x.shut, 1) };
    return lane < 31 ? y : suffix{ 0, false };
}

/* One block per head, from the last token to the first, 4 tokens a thread.  Where a token sees
 * nothing in front of it, and those behind it neither, the sum is 0 and begins anew: what a
 * document has, rounding or NaN, is not that of the one before. */
static __global__ void __launch_bounds__(1024) gates_gradient(const args a, bool some)
{
    __shared__ suffix part[32];
    __shared__ int part_low[32];
    const int64_t h = blockIdx.x, b = blockIdx.y, head = b * a.H + h;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    suffix after = { 0, false };
    int after_low = UNSEEN;
    for (int64_t t0 = (a.N - 1) / 4096 * 4096; t0 >= 0; t0 -= 4096) {
        const int64_t t = t0 + (int64_t)threadIdx.x * 4;
        float row[4];
        int low[4], all_low;
        suffix sum[4], x = { 0, false }, all;
        row_sums(a, some, b, h, t, row);
#pragma unroll
        for (int e = 3; e >= 0; e--) {
            low[e] = t + e < a.N ? a.low[b * a.np + t + e] : UNSEEN;
            if (e < 3) low[e] = min(low[e], low[e + 1]);
        }
        int later = min(least_behind(low[0], lane, &all_low), after_low);
        __syncthreads();                 /* the last round's readers are done */
        if (lane == 0) part_low[warp] = all_low;
        __syncthreads();
        for (int w = 0; w < 32; w++) {
            if (w > warp) later = min(later, part_low[w]);
            after_low = min(after_low, part_low[w]);
        }
#pragma unroll
        for (int e = 3; e >= 0; e--) {
            if (t + e < a.N) x.sum += (double)row[e] - (double)a.column[head * a.np + t + e];
            if (t + e > 0 && t + e < a.N && min(low[e], later) >= t + e) x = { 0, true };
            sum[e] = x;
        }
        suffix behind = sum_behind(x, lane, &all);
        if (lane == 0) part[warp] = all;
        __syncthreads();
        for (int w = warp + 1; w < 32; w++) behind.add(part[w]);
        behind.add(after);
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (t + e < a.N) {
                const bool below = a.log_f[(b * a.N + t + e) * a.f_row + h] < LOG_F_MIN;
                sum[e].add(behind);
                a.glog_f[(b * a.N + t + e) * a.gf_row + h] = below ? 0 : (float)sum[e].sum;
            }
        suffix whole = part[0];
        for (int w = 1; w < 32; w++) whole.add(part[w]);
        whole.add(after);
        after = { whole.sum, false };
    }
}

static __global__ void __launch_bounds__(256) gates_zero(const args a)
{
    const int64_t e = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (e < a.B * a.N * a.H) a.glog_f[e / a.H * a.gf_row + e % a.H] = 0;
}

/* ---- host side ------------------------------------------------------------------------------ */

/* D, warps, 16s of keys of a warp, blocks of a processor, whether k and v stay in registers.
 * Measured on one H100 80GB HBM3, 2026-11-26, 1 x 16384 with gates, all kernels of the op, before
 * sums of ds went from 64 queries to 16: 24 heads of 64 9.0 ms, 12 heads of 128 10.6 ms. */
using shape64 = shape<64, 4, 2, 2, 1>;
using shape128 = shape<128, 8, 1, 1, 0>;

static bool on_tensor_cores(fg_dtype type, int64_t D, double scale)
{
    return type == FG_BF16 && D % 8 == 0 && D <= 128 && scale > 0;
}

static size_t take(char *base, size_t *used, void *to, size_t bytes)
{
    *(void **)to = base ? base + *used : nullptr;
    return *used += (bytes + 255) / 256 * 256;
}

/* Sizes, and scratch from base on; returns its bytes. */
static size_t cut(args *a, const fg_shape *q, const fg_shape *k, bool gate, bool matrices,
                  char *base)
{
    size_t used = 0;
    a->B = q->dim[0], a->N = k->dim[1], a->H = q->dim[2], a->Hkv = k->dim[2], a->D = q->dim[3];
    a->np = (a->N + FG_GATE_BLOCK - 1) / FG_GATE_BLOCK * FG_GATE_BLOCK;
    a->sm90 = matrices && fg_forget_attention_grad_has_sm90();
    a->tile = a->sm90 && a->D <= 64 ? 128 : 64;
    a->keys = 128;
    a->n_q = (int)((a->N + a->tile - 1) / a->tile);
    a->n_k = (int)((a->N + a->keys - 1) / a->keys);
    const size_t heads = (size_t)(a->B * a->H), tokens = heads * (size_t)a->np;
    const size_t tiles = heads * (size_t)a->n_q, B = (size_t)a->B;
    take(base, &used, &a->level, tokens * sizeof *a->level);
    take(base, &used, &a->delta, tokens * sizeof *a->delta);
    take(base, &used, &a->column, tokens * sizeof *a->column);
    take(base, &used, &a->rows, tokens * sizeof *a->rows);
    take(base, &used, &a->low, B * (size_t)a->np * sizeof *a->low);
    take(base, &used, &a->span, B * (size_t)a->n_q * sizeof *a->span);
    take(base, &used, &a->last, B * (size_t)a->n_k * sizeof *a->last);
    take(base, &used, &a->turn, tiles * sizeof *a->turn);
    take(base, &used, &a->next, sizeof *a->next);
    if (matrices)
        take(base, &used, &a->sum_q, tiles * (size_t)(a->tile * (a->D <= 64 ? 64 : 128))
                                          * sizeof(float));
    if (gate) {
        size_t bytes = 0;
        a->gates = fg_gates_cut(base ? base + used : nullptr, a->B, a->N, a->H, &bytes);
        used += bytes;
    }
    return used;
}

static size_t scratch(const fg_infer *c)
{
    const struct fg_attr_forget_attention_grad *p =
        (const struct fg_attr_forget_attention_grad *)c->attr;
    args a = {};
    return cut(&a, &c->in[Q], &c->in[K], c->given[LOG_F],
               on_tensor_cores(c->in_type[Q], c->in[Q].dim[3], p->scale), nullptr);
}

static const char *unfit(const fg_infer *c)
{
    const fg_dtype t = c->in_type[Q];
    if (t != FG_F32 && t != FG_BF16) return "q must be f32 or bf16";
    if (c->in_type[GO] != t || c->in_type[K] != t || c->in_type[V] != t || c->in_type[O] != t)
        return "go, q, k, v and o must have one dtype";
    if (c->in_type[LSE] != FG_F32 || (c->given[GLSE] && c->in_type[GLSE] != FG_F32)
        || (c->given[LOG_F] && c->in_type[LOG_F] != FG_F32))
        return "lse, its gradient and log_f must be f32";
    if (c->in[Q].dim[3] > 256) return "heads of more than 256 elements";
    if (c->in[Q].dim[1] > INT32_MAX / 2) return "more than 2^30 tokens in a sequence";
    if (c->in[Q].dim[2] > 65535 || c->in[Q].dim[0] > 65535) return "more than 65535 heads or rows";
    return nullptr;
}

static args arguments(const fg_exec *e)
{
    const struct fg_attr_forget_attention_grad *p =
        (const struct fg_attr_forget_attention_grad *)e->attr;
    args a = {};
    const int64_t D = e->in_shape[Q].dim[3];
    cut(&a, &e->in_shape[Q], &e->in_shape[K], e->in[LOG_F] != nullptr,
        on_tensor_cores(e->in_type[Q], D, p->scale), (char *)e->scratch);
    a.go = e->in[GO], a.q = e->in[Q], a.k = e->in[K], a.v = e->in[V], a.o = e->in[O];
    a.glse = (const float *)e->in[GLSE], a.lse = (const float *)e->in[LSE];
    a.log_f = (const float *)e->in[LOG_F], a.first = (const int *)e->in[FIRST];
    a.gq = e->out[0], a.gk = e->out[1], a.gv = e->out[2], a.glog_f = (float *)e->out[3];
    a.q_row = fg_pitch_of(&e->in_rows[Q], a.H * D);
    a.k_row = fg_pitch_of(&e->in_rows[K], a.Hkv * D);
    a.v_row = fg_pitch_of(&e->in_rows[V], a.Hkv * D);
    a.f_row = a.log_f ? fg_pitch_of(&e->in_rows[LOG_F], a.H) : a.H;
    a.gq_row = fg_pitch_of(&e->out_rows[0], a.H * D);
    a.gk_row = fg_pitch_of(&e->out_rows[1], a.Hkv * D);
    a.gv_row = fg_pitch_of(&e->out_rows[2], a.Hkv * D);
    a.gf_row = fg_pitch_of(&e->out_rows[3], a.H);
    a.window = p->window, a.scale = (float)p->scale, a.scale2 = (float)(p->scale * FG_LOG2_E);
    a.narrow = e->in_type[Q] == FG_BF16, a.plain = !a.first && !a.window;
    return a;
}

/* All that the tiles need to know beforehand. */
static void prepare(const args &a, cudaStream_t stream)
{
    const dim3 tiles((unsigned)a.n_q, (unsigned)a.H, (unsigned)a.B);
    spans_fill<<<dim3((unsigned)a.n_q, (unsigned)a.B), a.tile, 0, stream>>>(a);
    if (!a.plain) lasts_fill<<<(unsigned)a.B, 1024, 0, stream>>>(a);
    if (a.log_f) fg_gates_scan(a.log_f, a.f_row, a.B, a.N, a.H, &a.gates, stream);
    if (a.D % 8 || a.D > 128) rows_fill<32><<<tiles, 256, 0, stream>>>(a);
    else if (a.D > 64) rows_fill<16><<<tiles, 256, 0, stream>>>(a);
    else rows_fill<8><<<tiles, 256, 0, stream>>>(a);
}

template <class S> static void run_matrices(const args &a, cudaStream_t stream)
{
    cudaFuncSetAttribute(tile_of_keys<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::SHARED);
    tile_of_keys<S><<<(unsigned)(a.B * a.Hkv * a.n_k), S::THREADS, S::SHARED, stream>>>(a);
    const dim3 tiles((unsigned)a.n_q, (unsigned)a.H, (unsigned)a.B);
    queries_store<S><<<tiles, S::THREADS, 0, stream>>>(a);
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const args a = arguments(e);
    const bool matrices = a.sum_q;
    prepare(a, stream);
    if (a.sm90) fg_forget_attention_grad_sm90(a, stream);
    else if (matrices && a.D <= 64) run_matrices<shape64>(a, stream);
    else if (matrices) run_matrices<shape128>(a, stream);
    else fg_forget_attention_grad_plain(a, stream);
    if (a.log_f)
        gates_gradient<<<dim3((unsigned)a.H, (unsigned)a.B), 1024, 0, stream>>>(a, matrices);
    else gates_zero<<<fg_blocks(a.B * a.N * a.H, 256), 256, 0, stream>>>(a);
}

FG_KERNEL(forget_attention_grad) = {
    .launch = launch, .unfit = unfit, .scratch = scratch,
    .pitched_in = 1u << Q | 1u << K | 1u << V | 1u << LOG_F,
    .pitched_out = 1u << 0 | 1u << 1 | 1u << 2 | 1u << 3,
};
