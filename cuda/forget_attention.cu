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
 *   bf16 on Hopper: forget_attention_sm90.cu; few queries against a cache: ..._split.cu
 * The maximum follows only when it is SLACK behind (as on the CPU): the sums so far hardly ever
 * have to be scaled.  What a row gets depends on its own keys alone, never on others in its tile.
 * Bytes: q, k, v, log_f and o once, if the L2 cache holds k and v of a section of heads. */
#include "forget_attention.cuh"

#define L2_SAFE (32 << 20)                       /* bytes of k and v that stay in the L2 cache */

/* Queries a tile = 16 * WARPS * ROWS, keys a tile = KEYS, blocks a multiprocessor = BLOCKS. */
template <int D> struct tuned;
template <> struct tuned<32>  { enum { WARPS = 4, ROWS = 2, KEYS = 64, BLOCKS = 2 }; };
template <> struct tuned<64>  { enum { WARPS = 4, ROWS = 2, KEYS = 64, BLOCKS = 2 }; };
template <> struct tuned<96>  { enum { WARPS = 4, ROWS = 2, KEYS = 32, BLOCKS = 2 }; };
template <> struct tuned<128> { enum { WARPS = 4, ROWS = 2, KEYS = 32, BLOCKS = 2 }; };
template <> struct tuned<256> { enum { WARPS = 4, ROWS = 1, KEYS = 32, BLOCKS = 1 }; };

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
    static __device__ __forceinline__ uint32_t at(int r, int c) { return fg_swizzle<D>(r, c); }
    typedef float scores[ROWS][KEYS / 8][4];
    typedef float sums[ROWS][D / 8][4];
    typedef uint32_t weights[ROWS][KEYS / 16][4];
    typedef uint32_t queries[ROWS][KEEP_Q ? D / 16 : 1][4];
};

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
    const place w = find_place(p, S::QUERIES, blockIdx.x);
    const bf16 *q = (const bf16 *)p.q + ((int64_t)w.b * p.M + w.t0) * p.q_pitch + w.h * p.D;
    load_rows<D, S::QUERIES, S::THREADS, ALIGNED>(fg_shared(shared), q, p.q_pitch, p.M - w.t0, p.D,
                                                  threadIdx.x);
    const int r0 = threadIdx.x / 32 * 16 * S::ROWS;
    const double base = base_at(p, w, w.past + w.t0 + r0);
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
    store_rows<S>(p, w, o, rows, shared + r0 * D * 2, r0, base);
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
        const double bias = sees ? row_bias(p, w, rows[a].low, w.past + t, base) : 0;
        const float part = 1 / sum + 0 * (float)bias;   /* NaN to all */
#pragma unroll
        for (int c = 0; c < D / 16; c++) {
            const int d = c / 4 * 64 + 4 * tx + c % 4;
            if (d < p.D) ((float *)p.o)[row * p.D + d] = sees ? o[a][c] * part : 0;
        }
        if (tx == 0)
            p.lse[row] = sees ? row_lse(rows[a].max, bias, sum) : -INFINITY;
    }
}

template <int D>
static __global__ void __launch_bounds__(256, 1) tiles_f32(const __grid_constant__ problem p)
{
    typedef shape_f32<D> S;
    extern __shared__ __align__(1024) float shared_f32[];
    float *q = shared_f32, *kv = q + S::QUERIES * S::LINE, *weights = kv + S::KEYS * S::LINE;
    const place w = find_place(p, S::QUERIES, blockIdx.x);
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

template <int D, bool ALIGNED> static void start_bf16(const problem &p, cudaStream_t stream)
{
    typedef shape<D> S;
    const int64_t blocks = (int64_t)fg_blocks(p.M, S::QUERIES) * p.B * p.H;
    start(p.log_f ? tiles_bf16<D, true, ALIGNED> : tiles_bf16<D, false, ALIGNED>, blocks,
          S::THREADS, S::SHARED, p, stream);
}
template <int D> static void start_f32(const problem &p, cudaStream_t stream)
{
    typedef shape_f32<D> S;
    start(tiles_f32<D>, (int64_t)fg_blocks(p.M, S::QUERIES) * p.B * p.H, S::THREADS, S::SHARED, p,
          stream);
}

/* Cuts scratch for what p needs; returns the bytes. */
static size_t cut(problem *p, void *scratch)
{
    if (p->splits) return fg_forget_attention_cut_splits(p, scratch);
    size_t bytes;
    p->gates = fg_gates_cut(scratch, p->B, p->log_f ? p->N : 0, p->H, &bytes);
    p->given = (int *)((char *)scratch + bytes);
    return bytes + 256;
}

static void sizes(problem *p, const fg_shape *q, const fg_shape *k, bool cache, bool narrow)
{
    p->B = (int)q->dim[0], p->M = (int)q->dim[1], p->H = (int)q->dim[2], p->D = (int)q->dim[3];
    p->N = (int)k->dim[1], p->Hkv = (int)k->dim[2];
    p->splits = cache && narrow && p->M <= FEW ? fg_forget_attention_splits(*p) : 0;
}

static problem problem_of(const fg_exec *e)
{
    const struct fg_attr_forget_attention *a = (const struct fg_attr_forget_attention *)e->attr;
    const bool narrow = e->in_type[0] == FG_BF16;
    problem p = {};
    sizes(&p, &e->in_shape[0], &e->in_shape[1], e->in[5], narrow);
    p.q = e->in[0], p.k = e->in[1], p.v = e->in[2], p.log_f = (const float *)e->in[3];
    p.first = (const int32_t *)e->in[4], p.past = (const int32_t *)e->in[5];
    p.o = e->out[0], p.lse = (float *)e->out[1];
    p.q_pitch = fg_pitch_of(&e->in_rows[0], (int64_t)p.H * p.D);
    p.k_pitch = fg_pitch_of(&e->in_rows[1], (int64_t)p.Hkv * p.D);
    p.v_pitch = fg_pitch_of(&e->in_rows[2], (int64_t)p.Hkv * p.D);
    p.f_pitch = p.log_f ? fg_pitch_of(&e->in_rows[3], p.H) : 0;
    p.window = a->window && a->window < p.N ? (int)a->window : p.N;
    p.scale = (float)(a->scale * FG_LOG2_E);
    p.vectors = p.D % 8 == 0 && (p.q_pitch | p.k_pitch | p.v_pitch) % 8 == 0;
    const int64_t each = 2 * p.N * (int64_t)p.D * (narrow ? 2 : 4), heads = (int64_t)p.B * p.H;
    const int64_t section = L2_SAFE / each * (p.H / p.Hkv);
    p.section = (int)(section < 1 ? 1 : section < heads ? section : heads);
    cut(&p, e->scratch);
    return p;
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    problem p = problem_of(e);
    const bool narrow = e->in_type[0] == FG_BF16;
    if (p.splits) { fg_forget_attention_start_splits(p, stream); return; }
    const bool sm90 = narrow && fg_forget_attention_fits_sm90(p);
    p.ell_unit = sm90 ? -p.scale : 1;
    if (p.log_f)
        fg_gates_scan(p.log_f, p.f_pitch, p.B, p.N, p.H, &p.gates, stream, 1 / (double)p.ell_unit);
    if (sm90) { fg_forget_attention_start_sm90(p, stream); return; }
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
    problem p = {};
    p.log_f = c->given[3] ? (const float *)&p : nullptr;      /* there, that is all */
    sizes(&p, &c->in[0], &c->in[1], c->given[5], c->in_type[0] == FG_BF16);
    return cut(&p, nullptr);
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
