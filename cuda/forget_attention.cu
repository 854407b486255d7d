/* forget_attention.cu - attention with a forget gate: tiles for many queries, splits for few.
 *
 *     s_ij = scale q_i.k_j + log_f_(j+1) + ... + log_f_i,  lse_i = ln sum_j e^(s_ij),
 *     o_i  = sum_j e^(s_ij - lse_i) v_j                       over the keys j that query i sees
 *
 * A block of threads owns a tile of queries of one head and walks its tiles of keys from the
 * diagonal to the left, with a running maximum (Dao 2023, "FlashAttention-2", arXiv 2307.08691,
 * algorithm 1).  Everything is in units of log2.  The bias is a number per key, added to the score
 * (ell_j), and one per row and tile, which the maximum takes up (attention.cuh); tiles that nobody
 * in a tile of queries sees are never loaded, and only those that cross a border are masked.
 *   bf16  matrix units, weights rounded to bf16, sums in f32
 *   f32   ordinary multiply-adds in f32 throughout
 *   few queries against a cache, bf16: see "splits" below
 * The maximum follows only when it is SLACK behind (as on the CPU): the sums so far hardly ever
 * have to be scaled.  What a row gets depends on its own keys alone, never on others in its tile.
 * Bytes: q, k, v, log_f and o once, if the L2 cache holds k and v of a section of heads. */
#include <limits.h>
#include <math.h>
#include "attention.cuh"

/* Queries a tile = 16 * WARPS * ROWS, keys a tile = KEYS, blocks a multiprocessor = BLOCKS. */
template <int D> struct tuned;
template <> struct tuned<32>  { enum { WARPS = 4, ROWS = 2, KEYS = 64, BLOCKS = 2 }; };
template <> struct tuned<64>  { enum { WARPS = 4, ROWS = 2, KEYS = 64, BLOCKS = 2 }; };
template <> struct tuned<96>  { enum { WARPS = 4, ROWS = 2, KEYS = 32, BLOCKS = 2 }; };
template <> struct tuned<128> { enum { WARPS = 4, ROWS = 2, KEYS = 32, BLOCKS = 2 }; };
template <> struct tuned<256> { enum { WARPS = 4, ROWS = 1, KEYS = 32, BLOCKS = 1 }; };

#define SLACK   8.0f
#define NO_KEY  INT_MAX
#define L2_SAFE (32 << 20)                       /* bytes of k and v that stay in the L2 cache */

struct problem {                                 /* as in ops/forget_attention.c */
    const void *q, *k, *v;
    const float *log_f;
    const int32_t *first, *past;
    void *o;
    float *lse;
    int64_t q_pitch, k_pitch, v_pitch, f_pitch;  /* elements from token to token */
    fg_gates gates;
    int B, M, N, H, Hkv, D;
    int window;                                  /* 1 .. N */
    int section;                                 /* heads of sequences that are worked on at once */
    float scale;                                 /* of q.k, in units of log2 */
    bool vectors;                                /* rows can be read 16 bytes at a time */
};

/* The first key that query t of sequence b, at position i, sees; NO_KEY: none. */
static __device__ __forceinline__ int first_key(const problem &p, int b, int t, int i)
{
    const int low = p.first && t < p.M ? max(0, p.first[(int64_t)b * p.M + t]) : 0;
    if (t >= p.M || i >= p.N || low > i) return NO_KEY;
    return max(low, i - p.window + 1);
}

/* ---- a tile of queries ----------------------------------------------------------------------- */

struct place {                                   /* of a block of threads */
    int b, h, t0;                                /* sequence, head, first query */
    int past, keys;                              /* position of query 0; keys there are */
    int low_min, low_max;                        /* over the first keys of queries that see any */
};

/* Longest tiles first, heads of a section side by side. */
static __device__ place find_place(const problem &p, int queries)
{
    place w;
    const int tiles = (p.M + queries - 1) / queries, heads = p.B * p.H;
    const int64_t each = (int64_t)p.section * tiles;
    const int s = (int)(blockIdx.x / each), i = (int)(blockIdx.x % each);
    const int wide = min(p.section, heads - s * p.section), bh = s * p.section + i % wide;
    w.b = bh / p.H, w.h = bh % p.H;
    w.t0 = (tiles - 1 - i / wide) * queries;
    w.past = p.past ? min(max(0, *p.past), p.N) : 0;
    w.keys = min(p.N, w.past + p.M);
    w.low_min = NO_KEY, w.low_max = -1;
    return w;
}

/* Fills low_min and low_max; all threads of the block, at least as many as queries / 2. */
static __device__ void find_bounds(const problem &p, place &w, int queries)
{
    __shared__ int part[2][32];
    int low = NO_KEY, high = -1;
    for (int t = threadIdx.x; t < queries; t += blockDim.x) {
        const int x = first_key(p, w.b, w.t0 + t, w.past + w.t0 + t);
        low = min(low, x);
        high = max(high, x == NO_KEY ? -1 : x);
    }
    low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
    if (threadIdx.x % 32 == 0) part[0][threadIdx.x / 32] = low, part[1][threadIdx.x / 32] = high;
    __syncthreads();
    for (int i = 0; i < (int)blockDim.x / 32; i++) {
        w.low_min = min(w.low_min, part[0][i]);
        w.low_max = max(w.low_max, part[1][i]);
    }
}

/* Base of the block of gates that a position lies in; 0 if there is no gate. */
static __device__ __forceinline__ double base_at(const problem &p, const place &w, int position)
{
    if (!p.log_f) return 0;
    const int64_t head = (int64_t)w.b * p.H + w.h;
    return p.gates.block[head * p.gates.blocks + min(position, p.N - 1) / FG_GATE_BLOCK].base;
}

/* A row i and what is known of its sum over keys, both without the row's own part of the bias,
 * C_i - base: it goes into lse alone. */
struct row_state {
    int low;                                     /* first key; NO_KEY: sees none */
    float max, sum;                              /* sum_j 2^(s_ij - max) */
};

static __device__ __forceinline__ row_state row_start(const problem &p, const place &w, int t)
{
    return { first_key(p, w.b, t, w.past + t), -INFINITY, 0 };
}

/* C_i - base, for a row that sees keys; NaN if it sees beyond a bad gate. */
static __device__ __forceinline__ float row_bias(const problem &p, const place &w, int low, int i,
                                                 double base)
{
    if (!p.log_f) return 0;
    const int64_t head = (int64_t)w.b * p.H + w.h;
    const fg_gate_block *block = p.gates.block + head * p.gates.blocks;
    const float ell = p.gates.ell[head * p.gates.padded + i];
    return fg_gate_bad(block, low, i) ? NAN : ell + (float)(block[i / FG_GATE_BLOCK].base - base);
}

/* What a row has under a new tile whose greatest score, without what the tile's keys have in
 * common (`between`), is `most`: returns what to subtract from the tile's scores; *keep: the worth
 * of the sums so far. */
static __device__ __forceinline__ float row_pivot(row_state &r, float most, float between,
                                                  float *keep)
{
    const float before = r.max - between;
    *keep = 1;
    if (!(most > before + SLACK)) return before == -INFINITY ? 0 : before;   /* NaN stays NaN */
    *keep = fg_exp2(before - most);
    r.max = most + between;
    return most;
}

/* ---- bf16 ------------------------------------------------------------------------------------ */

template <int D_> struct shape {
    enum {
        D = D_, WARPS = tuned<D>::WARPS, ROWS = tuned<D>::ROWS, KEYS = tuned<D>::KEYS,
        THREADS = 32 * WARPS, QUERIES = 16 * WARPS * ROWS,
        TILE = KEYS * D * 2,                     /* bytes of a tile of keys */
        STAGE = 2 * TILE + KEYS * 4,             /* k, v, ell */
        SHARED = QUERIES * D * 2 + 2 * STAGE
    };
    static constexpr bool KEEP_Q = D <= 64;      /* q in registers */
    typedef float scores[ROWS][KEYS / 8][4];
    typedef float sums[ROWS][D / 8][4];
    typedef uint32_t weights[ROWS][KEYS / 16][4];
    typedef uint32_t queries[ROWS][KEEP_Q ? D / 16 : 1][4];
};

/* Eight elements of a row that may begin anywhere, those from `real` on 0. */
static __device__ __forceinline__ void load_odd(uint32_t to, const bf16 *from, int real)
{
    uint32_t w[4] = { 0, 0, 0, 0 };
#pragma unroll
    for (int d = 0; d < 8; d++)
        if (d < real) w[d / 2] |= (uint32_t)__bfloat16_as_ushort(from[d]) << (d % 2 * 16);
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};"
                 :: "r"(to), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
}

/* Rows [0,R) of a matrix with `real` rows, D of them wide, to shared memory, zeros around. */
template <int WIDTH, int R, int THREADS, bool ALIGNED>
static __device__ __forceinline__ void load_rows(uint32_t to, const bf16 *from, int64_t pitch,
                                                 int real, int D, unsigned thread)
{
    constexpr unsigned CHUNKS = WIDTH / 8, ALL = R * CHUNKS, EACH = (ALL + THREADS - 1) / THREADS;
#pragma unroll
    for (unsigned k = 0; k < EACH; k++) {
        const unsigned i = k * THREADS + thread, r = i / CHUNKS, c = i % CHUNKS;
        if (ALL % THREADS && i >= ALL) break;
        const uint32_t at = to + fg_swizzle<WIDTH>((int)r, (int)c);
        const bool in = (int)r < real && (int)c * 8 < D;
        const bf16 *x = from + r * pitch + c * 8;
        if (ALIGNED) fg_copy_async(at, in ? x : from, in);
        else load_odd(at, x, in ? D - (int)c * 8 : 0);
    }
}

/* Keys [j0, j0 + KEYS) of k and v, and their ell. */
template <class S, bool GATE, bool ALIGNED>
static __device__ __forceinline__ void load_keys(uint32_t to, const problem &p, const place &w,
                                                 int j0)
{
    const int64_t row = (int64_t)w.b * p.N + j0, kv = w.h / (p.H / p.Hkv) * (int64_t)p.D;
    load_rows<S::D, S::KEYS, S::THREADS, ALIGNED>(to, (const bf16 *)p.k + row * p.k_pitch + kv,
                                                  p.k_pitch, w.keys - j0, p.D, threadIdx.x);
    load_rows<S::D, S::KEYS, S::THREADS, ALIGNED>(to + S::TILE,
                                                  (const bf16 *)p.v + row * p.v_pitch + kv,
                                                  p.v_pitch, w.keys - j0, p.D, threadIdx.x);
    if (GATE && threadIdx.x < S::KEYS / 4) {
        const float *ell = p.gates.ell + ((int64_t)w.b * p.H + w.h) * p.gates.padded + j0;
        fg_copy_async(to + 2 * S::TILE + threadIdx.x * 16, ell + threadIdx.x * 4, true);
    }
}

/* The 16 x 16 block k of the warp's m-th 16 queries. */
template <class S>
static __device__ __forceinline__ void load_query(uint32_t *a, uint32_t q, int m, int k)
{
    const int lane = threadIdx.x % 32, r = (threadIdx.x / 32 * S::ROWS + m) * 16;
    fg_ldmatrix(a, q + fg_swizzle<S::D>(r + lane % 16, 2 * k + lane / 16));
}

/* s = q k^T of this warp's queries and a tile of keys. */
template <class S>
static __device__ __forceinline__ void multiply_keys(typename S::scores &s,
                                                     const typename S::queries &kept,
                                                     uint32_t q, uint32_t k)
{
    const int lane = threadIdx.x % 32, r = lane / 16 * 8 + lane % 8, c = lane / 8 % 2;
#pragma unroll
    for (int m = 0; m < S::ROWS; m++)
#pragma unroll
        for (int n = 0; n < S::KEYS / 8; n++) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0;
#pragma unroll (S::KEEP_Q ? S::D / 16 : 2)
    for (int i = 0; i < S::D / 16; i++) {
        uint32_t a[S::ROWS][4];
#pragma unroll
        for (int m = 0; m < S::ROWS; m++) {
            if (!S::KEEP_Q) load_query<S>(a[m], q, m, i);
            else for (int x = 0; x < 4; x++) a[m][x] = kept[m][S::KEEP_Q ? i : 0][x];
        }
#pragma unroll
        for (int n = 0; n < S::KEYS / 16; n++) {
            uint32_t b[4];
            fg_ldmatrix(b, k + fg_swizzle<S::D>(n * 16 + r, 2 * i + c));
#pragma unroll
            for (int m = 0; m < S::ROWS; m++) {
                fg_mma(s[m][2 * n], a[m], b[0], b[1]);
                fg_mma(s[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

/* o += weights v */
template <class S>
static __device__ __forceinline__ void add_values(typename S::sums &o,
                                                  const typename S::weights &a, uint32_t v)
{
    const int lane = threadIdx.x % 32, r = lane % 16, c = lane / 16;
#pragma unroll
    for (int k = 0; k < S::KEYS / 16; k++)
#pragma unroll
        for (int n = 0; n < S::D / 16; n++) {
            uint32_t b[4];
            fg_ldmatrix_trans(b, v + fg_swizzle<S::D>(k * 16 + r, 2 * n + c));
#pragma unroll
            for (int m = 0; m < S::ROWS; m++) {
                fg_mma(o[m][2 * n], a[m][k], b[0], b[1]);
                fg_mma(o[m][2 * n + 1], a[m][k], b[2], b[3]);
            }
        }
}

/* Adds the keys' part of the bias; what a row does not see becomes -inf.  Row 0 is at position i
 * (lane / 4 added), column 0 is key j0. */
template <class S, bool GATE, bool MASK>
static __device__ __forceinline__ void bias_scores(typename S::scores &s, const float *ell,
                                                   const row_state (&rows)[S::ROWS][2],
                                                   float scale, int i, int j0)
{
    const int c = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < S::KEYS / 8; n++) {
        const float2 e = GATE ? *(const float2 *)(ell + n * 8 + c) : make_float2(0, 0);
#pragma unroll
        for (int m = 0; m < S::ROWS; m++)
#pragma unroll
            for (int x = 0; x < 4; x++) {
                float y = fmaf(s[m][n][x], scale, x % 2 ? -e.y : -e.x);
                if (MASK) {
                    const int low = rows[m][x / 2].low, at = i + m * 16 + x / 2 * 8;
                    const unsigned j = (unsigned)(j0 + n * 8 + c + x % 2 - low);
                    y = j <= (unsigned)(at - low) ? y : -INFINITY;
                }
                s[m][n][x] = y;
            }
    }
}

/* Scores to weights, packed as the left operand of the next product. */
template <class S>
static __device__ __forceinline__ void softmax(typename S::weights &a,
                                               typename S::scores &s,
                                               typename S::sums &o,
                                               row_state (&rows)[S::ROWS][2], float between)
{
    float pivot[S::ROWS][2], keep[S::ROWS][2];
    bool scaled = false;
#pragma unroll
    for (int m = 0; m < S::ROWS; m++)
#pragma unroll
        for (int x = 0; x < 2; x++) {
            float most = s[m][0][2 * x];
#pragma unroll
            for (int n = 0; n < S::KEYS / 8; n++)
                most = fmaxf(most, fmaxf(s[m][n][2 * x], s[m][n][2 * x + 1]));
            most = fg_warp_max<4>(most);
            pivot[m][x] = row_pivot(rows[m][x], most, between, &keep[m][x]);
            scaled |= keep[m][x] != 1;
        }
    if (__any_sync(~0u, scaled)) {
#pragma unroll
        for (int m = 0; m < S::ROWS; m++) {
            rows[m][0].sum *= keep[m][0], rows[m][1].sum *= keep[m][1];
#pragma unroll
            for (int n = 0; n < S::D / 8; n++)
#pragma unroll
                for (int x = 0; x < 4; x++) o[m][n][x] *= keep[m][x / 2];
        }
    }
#pragma unroll
    for (int m = 0; m < S::ROWS; m++)
#pragma unroll
        for (int n = 0; n < S::KEYS / 8; n++) {
            float y[4];
#pragma unroll
            for (int x = 0; x < 4; x++) y[x] = fg_exp2(s[m][n][x] - pivot[m][x / 2]);
            rows[m][0].sum += y[0] + y[1], rows[m][1].sum += y[2] + y[3];
            a[m][n / 2][n % 2 * 2] = fg_pack2(y[0], y[1]);
            a[m][n / 2][n % 2 * 2 + 1] = fg_pack2(y[2], y[3]);
        }
}

/* The warp's rows of o and lse.  room: its own rows of the tile of queries in shared memory. */
template <class S>
static __device__ __forceinline__ void store_rows(const problem &p, const place &w,
                                                  typename S::sums &o,
                                                  row_state (&rows)[S::ROWS][2], char *room,
                                                  double base)
{
    const int lane = threadIdx.x % 32, r0 = threadIdx.x / 32 * 16 * S::ROWS;
    const int64_t token = (int64_t)w.b * p.M + w.t0 + r0;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < S::ROWS; m++)
#pragma unroll
        for (int x = 0; x < 2; x++) {
            const row_state u = rows[m][x];
            const int r = m * 16 + x * 8 + lane / 4, t = w.t0 + r0 + r;
            const bool sees = u.low != NO_KEY;
            const float bias = sees ? row_bias(p, w, u.low, w.past + t, base) : 0;
            const float sum = fg_warp_sum<4>(u.sum), part = 1 / sum + 0 * bias;   /* NaN to all */
#pragma unroll
            for (int n = 0; n < S::D / 8; n++) {
                const uint32_t y = fg_pack2(o[m][n][2 * x] * part, o[m][n][2 * x + 1] * part);
                *(uint32_t *)(room + fg_swizzle<S::D>(r, n) + lane % 4 * 4) = sees ? y : 0;
            }
            if (lane % 4 == 0 && t < p.M)
                p.lse[(token + r) * p.H + w.h] =
                    sees ? (u.max + bias + log2f(sum)) * (float)FG_LN_2 : -INFINITY;
        }
    __syncwarp();
    const int chunks = (p.D + 7) / 8, n = min(16 * S::ROWS, p.M - w.t0 - r0);
    for (int i = lane; i < n * chunks; i += 32) {
        const int r = i / chunks, c = i % chunks;
        const uint4 y = *(const uint4 *)(room + fg_swizzle<S::D>(r, c));
        bf16 *to = (bf16 *)p.o + ((token + r) * p.H + w.h) * p.D + c * 8;
        if (p.D % 8 == 0) { *(uint4 *)to = y; continue; }
        const bf16 *from = (const bf16 *)(room + fg_swizzle<S::D>(r, c));
        for (int d = 0; d < 8 && c * 8 + d < p.D; d++) to[d] = from[d];
    }
}

/* Tiles of keys [lo,hi], the last first; the next is on its way while one is worked on. */
template <class S, bool GATE, bool ALIGNED>
static __device__ __forceinline__ void walk(const problem &p, const place &w, char *shared,
                                            typename S::sums &o,
                                            row_state (&rows)[S::ROWS][2], double base)
{
    const int warp0 = w.past + w.t0 + threadIdx.x / 32 * 16 * S::ROWS;
    const int i = warp0 + threadIdx.x % 32 / 4;
    const int lo = w.low_min / S::KEYS;
    int n = min(w.past + w.t0 + S::QUERIES - 1, w.keys - 1) / S::KEYS;
    const uint32_t q = fg_shared(shared), stages = q + S::QUERIES * S::D * 2;
    typename S::queries kept;
    double from = GATE ? base_at(p, w, n * S::KEYS) : 0;
    load_keys<S, GATE, ALIGNED>(stages, p, w, n * S::KEYS);
    fg_copy_commit();
    for (int stage = 0, start = 1; n >= lo; n--, stage ^= 1) {
        const float between = GATE ? (float)(base - from) : 0;
        const uint32_t k = stages + stage * S::STAGE;
        const float *ell = (const float *)(shared + (k - q) + 2 * S::TILE);
        const int j0 = n * S::KEYS;
        fg_copy_wait<0>();
        __syncthreads();
        if (n > lo) {
            load_keys<S, GATE, ALIGNED>(stages + (stage ^ 1) * S::STAGE, p, w, j0 - S::KEYS);
            fg_copy_commit();
            if (GATE) from = base_at(p, w, j0 - S::KEYS);
        }
        if (start && S::KEEP_Q) {
            for (int m = 0; m < S::ROWS; m++)
#pragma unroll
                for (int x = 0; x < (int)(S::KEEP_Q ? S::D / 16 : 0); x++)
                    load_query<S>(kept[m][x], q, m, x);
            start = 0;
        }
        if (j0 > warp0 + 16 * S::ROWS - 1) continue;
        typename S::scores s;
        typename S::weights a;
        multiply_keys<S>(s, kept, q, k);
        if (j0 + S::KEYS - 1 > warp0 || j0 < w.low_max)
            bias_scores<S, GATE, true>(s, ell, rows, p.scale, i, j0);
        else bias_scores<S, GATE, false>(s, ell, rows, p.scale, i, j0);
        softmax<S>(a, s, o, rows, between);
        add_values<S>(o, a, k + S::TILE);
    }
}

template <int D, bool GATE, bool ALIGNED>
static __global__ void __launch_bounds__(shape<D>::THREADS, tuned<D>::BLOCKS)
tiles_bf16(const __grid_constant__ problem p)
{
    typedef shape<D> S;
    extern __shared__ __align__(1024) char shared[];
    place w = find_place(p, S::QUERIES);
    const bf16 *q = (const bf16 *)p.q + ((int64_t)w.b * p.M + w.t0) * p.q_pitch + w.h * p.D;
    load_rows<D, S::QUERIES, S::THREADS, ALIGNED>(fg_shared(shared), q, p.q_pitch, p.M - w.t0, p.D,
                                                  threadIdx.x);
    find_bounds(p, w, S::QUERIES);
    const int r0 = threadIdx.x / 32 * 16 * S::ROWS;
    const double base = base_at(p, w, w.past + w.t0);
    row_state rows[S::ROWS][2];
    typename S::sums o;
#pragma unroll
    for (int m = 0; m < S::ROWS; m++) {
        for (int x = 0; x < 2; x++)
            rows[m][x] = row_start(p, w, w.t0 + r0 + m * 16 + x * 8 + threadIdx.x % 32 / 4);
#pragma unroll
        for (int n = 0; n < D / 8; n++) o[m][n][0] = o[m][n][1] = o[m][n][2] = o[m][n][3] = 0;
    }
    if (w.low_min != NO_KEY) walk<S, GATE, ALIGNED>(p, w, shared, o, rows, base);
    else fg_copy_wait<0>(), __syncthreads();
    store_rows<S>(p, w, o, rows, shared + r0 * D * 2, base);
}

/* ---- f32: 256 threads, each with 4 queries and every 16th key -------------------------------- */

template <int D_> struct shape_f32 {
    enum {
        D = D_, QUERIES = 64, KEYS = D <= 64 ? 64 : D <= 128 ? 32 : 16, THREADS = 256,
        LINE = D + 4, WEIGHTS = KEYS + 4,        /* floats of a row in shared memory */
        SHARED = ((QUERIES + KEYS) * LINE + QUERIES * WEIGHTS) * 4
    };
};

template <class S>
static __device__ __forceinline__ void load_f32(float *to, const float *from, int64_t pitch,
                                                int rows, int real, int D)
{
    for (int i = threadIdx.x; i < rows * S::D; i += S::THREADS) {
        const int r = i / S::D, d = i % S::D;
        to[r * S::LINE + d] = r < real && d < D ? from[r * pitch + d] : 0;
    }
}

/* The thread's 4 queries by its keys tx, tx + 16, ... */
template <class S>
static __device__ __forceinline__ void multiply_f32(float (&s)[4][S::KEYS / 16], const float *q,
                                                    const float *k)
{
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (int a = 0; a < 4; a++)
#pragma unroll
        for (int b = 0; b < S::KEYS / 16; b++) s[a][b] = 0;
#pragma unroll 4
    for (int d = 0; d < S::D; d += 4) {
        float4 x[4];
#pragma unroll
        for (int a = 0; a < 4; a++) x[a] = *(const float4 *)(q + (ty * 4 + a) * S::LINE + d);
#pragma unroll
        for (int b = 0; b < S::KEYS / 16; b++) {
            const float4 y = *(const float4 *)(k + (tx + 16 * b) * S::LINE + d);
#pragma unroll
            for (int a = 0; a < 4; a++)
                s[a][b] = fmaf(x[a].w, y.w, fmaf(x[a].z, y.z, fmaf(x[a].y, y.y,
                                                               fmaf(x[a].x, y.x, s[a][b]))));
        }
    }
}

/* Scores to weights; o and the rows' sums are scaled where the maximum moves. */
template <class S>
static __device__ __forceinline__ void softmax_f32(const problem &p, float (&s)[4][S::KEYS / 16],
                                                   float (&o)[4][S::D / 16], row_state (&rows)[4],
                                                   const float *ell, float between, int i, int j0)
{
    const int tx = threadIdx.x % 16;
#pragma unroll
    for (int a = 0; a < 4; a++) {
        float most = -INFINITY, keep;
#pragma unroll
        for (int b = 0; b < S::KEYS / 16; b++) {
            const int j = j0 + tx + 16 * b;
            const float y = fmaf(s[a][b], p.scale, ell ? -ell[tx + 16 * b] : 0);
            s[a][b] = j >= rows[a].low && j <= i + a ? y : -INFINITY;
            most = fmaxf(most, s[a][b]);
        }
        const float pivot = row_pivot(rows[a], fg_warp_max<16>(most), between, &keep);
        rows[a].sum *= keep;
#pragma unroll
        for (int c = 0; c < S::D / 16; c++) o[a][c] *= keep;
#pragma unroll
        for (int b = 0; b < S::KEYS / 16; b++) {
            s[a][b] = fg_exp2(s[a][b] - pivot);
            rows[a].sum += s[a][b];
        }
    }
}

/* o += weights v: the thread's columns are 4 tx + 64 c. */
template <class S>
static __device__ __forceinline__ void add_f32(float (&o)[4][S::D / 16], const float *weights,
                                               const float *v)
{
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll 2
    for (int j = 0; j < S::KEYS; j += 4) {
        float x[4][4];
#pragma unroll
        for (int a = 0; a < 4; a++)
            *(float4 *)x[a] = *(const float4 *)(weights + (ty * 4 + a) * S::WEIGHTS + j);
#pragma unroll
        for (int u = 0; u < 4; u++)
#pragma unroll
            for (int c = 0; c < S::D / 64; c++) {
                float y[4];
                *(float4 *)y = *(const float4 *)(v + (j + u) * S::LINE + 64 * c + 4 * tx);
#pragma unroll
                for (int a = 0; a < 4; a++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        o[a][4 * c + e] = fmaf(x[a][u], y[e], o[a][4 * c + e]);
            }
    }
}

template <int D>
static __device__ __forceinline__ void store_f32(const problem &p, const place &w,
                                                 float (&o)[4][D / 16], row_state (&rows)[4],
                                                 double base)
{
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    for (int a = 0; a < 4; a++) {
        const float sum = fg_warp_sum<16>(rows[a].sum);
        const int t = w.t0 + ty * 4 + a;
        const int64_t row = ((int64_t)w.b * p.M + t) * p.H + w.h;
        const bool sees = rows[a].low != NO_KEY;
        if (t >= p.M) continue;
        const float bias = sees ? row_bias(p, w, rows[a].low, w.past + t, base) : 0;
        const float part = 1 / sum + 0 * bias;   /* NaN to all */
#pragma unroll
        for (int c = 0; c < D / 16; c++) {
            const int d = c / 4 * 64 + 4 * tx + c % 4;
            if (d < p.D) ((float *)p.o)[row * p.D + d] = sees ? o[a][c] * part : 0;
        }
        if (tx == 0)
            p.lse[row] =
                sees ? (rows[a].max + bias + log2f(sum)) * (float)FG_LN_2 : -INFINITY;
    }
}

template <int D>
static __global__ void __launch_bounds__(256, 1) tiles_f32(const __grid_constant__ problem p)
{
    typedef shape_f32<D> S;
    extern __shared__ __align__(1024) float shared_f32[];
    float *q = shared_f32, *kv = q + S::QUERIES * S::LINE, *weights = kv + S::KEYS * S::LINE;
    place w = find_place(p, S::QUERIES);
    find_bounds(p, w, S::QUERIES);
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, i = w.past + w.t0 + ty * 4;
    const double base = base_at(p, w, w.past + w.t0);
    load_f32<S>(q, (const float *)p.q + ((int64_t)w.b * p.M + w.t0) * p.q_pitch + w.h * p.D,
                p.q_pitch, S::QUERIES, p.M - w.t0, p.D);
    row_state rows[4];
    float o[4][D / 16], s[4][S::KEYS / 16];
    for (int a = 0; a < 4; a++) rows[a] = row_start(p, w, w.t0 + ty * 4 + a);
#pragma unroll
    for (int c = 0; c < D / 4; c++) o[c % 4][c / 4] = 0;
    const int last = w.low_min == NO_KEY ? -1 : min(w.past + w.t0 + S::QUERIES, w.keys) - 1;
    const int64_t head = (int64_t)w.b * p.H + w.h, kv_head = w.h / (p.H / p.Hkv) * (int64_t)p.D;
    for (int n = last / S::KEYS; last >= 0 && n >= w.low_min / S::KEYS; n--) {
        const int j0 = n * S::KEYS;
        const int64_t row = (int64_t)w.b * p.N + j0;
        const float *ell = p.log_f ? p.gates.ell + head * p.gates.padded + j0 : nullptr;
        __syncthreads();
        load_f32<S>(kv, (const float *)p.k + row * p.k_pitch + kv_head, p.k_pitch, S::KEYS,
                    w.keys - j0, p.D);
        __syncthreads();
        multiply_f32<S>(s, q, kv);
        softmax_f32<S>(p, s, o, rows, ell, (float)(base - base_at(p, w, j0)), i, j0);
#pragma unroll
        for (int a = 0; a < 4; a++)
#pragma unroll
            for (int b = 0; b < S::KEYS / 16; b++)
                weights[(ty * 4 + a) * S::WEIGHTS + tx + 16 * b] = s[a][b];
        __syncthreads();
        load_f32<S>(kv, (const float *)p.v + row * p.v_pitch + kv_head, p.v_pitch, S::KEYS,
                    w.keys - j0, p.D);
        __syncthreads();
        add_f32<S>(o, weights, kv);
    }
    store_f32<D>(p, w, o, rows, base);
}

/* ---- launch ---------------------------------------------------------------------------------- */

template <class K>
static void start(K *kernel, unsigned blocks, int threads, int shared, const problem &p,
                  cudaStream_t stream)
{
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    kernel<<<blocks, (unsigned)threads, (size_t)shared, stream>>>(p);
}

template <int D, bool ALIGNED> static void start_bf16(const problem &p, cudaStream_t stream)
{
    typedef shape<D> S;
    const unsigned blocks = fg_blocks(p.M, S::QUERIES) * (unsigned)(p.B * p.H);
    start(p.log_f ? tiles_bf16<D, true, ALIGNED> : tiles_bf16<D, false, ALIGNED>, blocks,
          S::THREADS, S::SHARED, p, stream);
}
template <int D> static void start_f32(const problem &p, cudaStream_t stream)
{
    typedef shape_f32<D> S;
    start(tiles_f32<D>, fg_blocks(p.M, S::QUERIES) * (unsigned)(p.B * p.H), S::THREADS, S::SHARED,
          p, stream);
}

static problem problem_of(const fg_exec *e)
{
    const struct fg_attr_forget_attention *a = (const struct fg_attr_forget_attention *)e->attr;
    const int64_t *q = e->in_shape[0].dim, *k = e->in_shape[1].dim;
    problem p;
    p.B = (int)q[0], p.M = (int)q[1], p.H = (int)q[2], p.D = (int)q[3];
    p.N = (int)k[1], p.Hkv = (int)k[2];
    p.q = e->in[0], p.k = e->in[1], p.v = e->in[2], p.log_f = (const float *)e->in[3];
    p.first = (const int32_t *)e->in[4], p.past = (const int32_t *)e->in[5];
    p.o = e->out[0], p.lse = (float *)e->out[1];
    p.q_pitch = fg_pitch_of(&e->in_rows[0], q[2] * q[3]);
    p.k_pitch = fg_pitch_of(&e->in_rows[1], k[2] * k[3]);
    p.v_pitch = fg_pitch_of(&e->in_rows[2], k[2] * k[3]);
    p.f_pitch = p.log_f ? fg_pitch_of(&e->in_rows[3], q[2]) : 0;
    p.window = a->window && a->window < p.N ? (int)a->window : p.N;
    p.scale = (float)(a->scale * FG_LOG2_E);
    p.vectors = p.D % 8 == 0 && (p.q_pitch | p.k_pitch | p.v_pitch) % 8 == 0;
    const int64_t size = e->in_type[0] == FG_BF16 ? 2 : 4, both = 2 * p.N * (int64_t)p.D * size;
    const int64_t section = L2_SAFE / both * (p.H / p.Hkv);
    p.section = (int)(section < 1 ? 1 : section < (int64_t)p.B * p.H ? section : p.B * p.H);
    size_t bytes;
    p.gates = fg_gates_cut(e->scratch, p.B, p.log_f ? p.N : 0, p.H, &bytes);
    return p;
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const problem p = problem_of(e);
    const bool narrow = e->in_type[0] == FG_BF16;
    if (p.log_f) fg_gates_scan(p.log_f, p.f_pitch, p.B, p.N, p.H, &p.gates, stream);
    if (!narrow) {
        if (p.D <= 64) start_f32<64>(p, stream);
        else if (p.D <= 128) start_f32<128>(p, stream);
        else start_f32<256>(p, stream);
    } else if (!p.vectors) {
        if (p.D <= 64) start_bf16<64, false>(p, stream);
        else if (p.D <= 128) start_bf16<128, false>(p, stream);
        else start_bf16<256, false>(p, stream);
    } else if (p.D <= 32) start_bf16<32, true>(p, stream);
    else if (p.D <= 64) start_bf16<64, true>(p, stream);
    else if (p.D <= 96) start_bf16<96, true>(p, stream);
    else if (p.D <= 128) start_bf16<128, true>(p, stream);
    else start_bf16<256, true>(p, stream);
}

static size_t scratch(const fg_infer *c)
{
    size_t bytes;
    fg_gates_cut(nullptr, c->in[0].dim[0], c->given[3] ? c->in[1].dim[1] : 0, c->in[0].dim[2],
                 &bytes);
    return bytes;
}

static const char *unfit(const fg_infer *c)
{
    const int64_t *q = c->in[0].dim;
    if (q[3] > 256) return "heads wider than 256";
    if (c->in[1].dim[1] > INT_MAX - 256) return "more than 2^31 keys";
    if (q[0] * q[2] * (q[1] / 16 + 1) > INT_MAX) return "more than 2^31 tiles";
    return nullptr;
}

FG_KERNEL(forget_attention) = { .launch = launch, .unfit = unfit, .scratch = scratch,
                                .pitched_in = 15 };
