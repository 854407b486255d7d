/* forget_attention.cuh - what the files of forget_attention share: the problem, rows, fragments. */
#ifndef FG_FORGET_ATTENTION_CUH
#define FG_FORGET_ATTENTION_CUH
#include <limits.h>
#include <math.h>
#include "attention.cuh"

#define SLACK  8.0f
#define NO_KEY INT_MAX
#define FEW    16                                /* queries against a cache, at most: splits */

struct problem {                                 /* as in ops/forget_attention.c */
    const void *q, *k, *v;
    const float *log_f;
    const int32_t *first, *past;
    void *o;
    float *lse;
    int64_t q_pitch, k_pitch, v_pitch, f_pitch;  /* elements from token to token */
    fg_gates gates;
    int *given;                                  /* sm90: tiles of queries given out so far */
    int B, M, N, H, Hkv, D;
    int window;                                  /* 1 .. N */
    int section;                                 /* heads of sequences that are worked on at once */
    float scale;                                 /* of q.k, in units of log2 */
    float ell_unit;                              /* of gates.ell, in units of log2 */
    bool vectors;                                /* rows can be read 16 bytes at a time */
    int splits, split_keys;                      /* 0 splits: tiles; most keys of a split */
    struct split_row *split_rows;                /* [B,Hkv,groups,FEW,splits] */
    float *split_sums;                           /* [B,Hkv,groups,FEW,splits,width] */
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

/* The item-th tile of queries: longest first, heads of a section side by side.  Whole warps. */
static __device__ __forceinline__ place find_place(const problem &p, int queries, int64_t item)
{
    place w;
    const int tiles = (p.M + queries - 1) / queries, heads = p.B * p.H;
    const int64_t each = (int64_t)p.section * tiles;
    const int s = (int)(item / each), i = (int)(item % each);
    const int wide = min(p.section, heads - s * p.section), bh = s * p.section + i % wide;
    w.b = bh / p.H, w.h = bh % p.H;
    w.t0 = (tiles - 1 - i / wide) * queries;
    w.past = p.past ? min(max(0, *p.past), p.N) : 0;
    w.keys = min(p.N, w.past + p.M);
    int low = NO_KEY, high = -1;
    for (int t = w.t0 + threadIdx.x % 32; t < w.t0 + queries; t += 32) {
        const int x = first_key(p, w.b, t, w.past + t);
        low = min(low, x), high = max(high, x == NO_KEY ? -1 : x);
    }
    w.low_min = __reduce_min_sync(~0u, low), w.low_max = __reduce_max_sync(~0u, high);
    return w;
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
static __device__ __forceinline__ double row_bias(const problem &p, const place &w, int low, int i,
                                                  double base)
{
    if (!p.log_f) return 0;
    const int64_t head = (int64_t)w.b * p.H + w.h;
    const fg_gate_block *block = p.gates.block + head * p.gates.blocks;
    const double ell = (double)p.gates.ell[head * p.gates.padded + i] * (double)p.ell_unit;
    return fg_gate_bad(block, low, i) ? (double)NAN : ell + block[i / FG_GATE_BLOCK].base - base;
}

/* max and bias may be large and cancel. */
static __device__ __forceinline__ float row_lse(float max, double bias, float sum)
{
    return (float)((double)max + bias + (double)log2f(sum)) * (float)FG_LN_2;
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

/* ---- fragments ------------------------------------------------------------------------------
 *
 * S, here and below, gives D, KEYS of a tile, ROWS: times 16 queries a warp has, KEEP_Q: q stays in
 * registers, at(r, c): where chunk c of row r of the tile of queries lies, and types: scores
 * [ROWS][KEYS/8][4], sums [ROWS][D/8][4] in f32, weights [ROWS][KEYS/16][4] in pairs of bf16. */

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
#pragma unroll (S::KEEP_Q ? S::D / 16 : 4)
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

/* The warp's rows of o and lse, from row r0 of the tile on.  room: these rows of the tile of
 * queries in shared memory. */
template <class S>
static __device__ __forceinline__ void store_rows(const problem &p, const place &w,
                                                  typename S::sums &o,
                                                  row_state (&rows)[S::ROWS][2], char *room,
                                                  int r0, double base)
{
    const int lane = threadIdx.x % 32;
    const int64_t token = (int64_t)w.b * p.M + w.t0 + r0;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < S::ROWS; m++)
#pragma unroll
        for (int x = 0; x < 2; x++) {
            const row_state u = rows[m][x];
            const int r = m * 16 + x * 8 + lane / 4, t = w.t0 + r0 + r;
            const bool sees = u.low != NO_KEY;
            const double bias = sees ? row_bias(p, w, u.low, w.past + t, base) : 0;
            const float sum = fg_warp_sum<4>(u.sum), part = 1 / sum + 0 * (float)bias;   /* NaN */
#pragma unroll
            for (int n = 0; n < S::D / 8; n++) {
                const uint32_t y = fg_pack2(o[m][n][2 * x] * part, o[m][n][2 * x + 1] * part);
                *(uint32_t *)(room + S::at(r, n) + lane % 4 * 4) = sees ? y : 0;
            }
            if (lane % 4 == 0 && t < p.M)
                p.lse[(token + r) * p.H + w.h] =
                    sees ? row_lse(u.max, bias, sum) : -INFINITY;
        }
    __syncwarp();
    const int chunks = (p.D + 7) / 8, n = min(16 * S::ROWS, p.M - w.t0 - r0);
    for (int i = lane; i < n * chunks; i += 32) {
        const int r = i / chunks, c = i % chunks;
        const uint4 y = *(const uint4 *)(room + S::at(r, c));
        bf16 *to = (bf16 *)p.o + ((token + r) * p.H + w.h) * p.D + c * 8;
        if (p.D % 8 == 0) { *(uint4 *)to = y; continue; }
        const bf16 *from = (const bf16 *)(room + S::at(r, c));
        for (int d = 0; d < 8 && c * 8 + d < p.D; d++) to[d] = from[d];
    }
}

/* ---- the other files' launches --------------------------------------------------------------- */

template <class K>
static void start(K *kernel, int64_t blocks, int threads, int shared, const problem &p,
                  cudaStream_t stream)
{
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    kernel<<<(unsigned)blocks, (unsigned)threads, (size_t)shared, stream>>>(p);
}

/* Splits that suit p on this device; 0: none do. */
int fg_forget_attention_splits(const problem &p);
size_t fg_forget_attention_cut_splits(problem *p, void *scratch);    /* returns the bytes */
void fg_forget_attention_start_splits(const problem &p, cudaStream_t stream);

/* Tiles on wgmma, for bf16 and D <= 128: whether this device and p are fit.  Then gates.ell must be
 * in units of q.k and negative: ell_unit = -scale. */
bool fg_forget_attention_fits_sm90(const problem &p);
void fg_forget_attention_start_sm90(const problem &p, cudaStream_t stream);
#endif
