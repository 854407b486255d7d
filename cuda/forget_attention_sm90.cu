/* forget_attention_sm90.cu - tiles of attention with a forget gate on Hopper's wgmma.
 *
 * A block of threads stays on its multiprocessor and takes one tile of queries after another.  Its
 * first warpgroup loads tiles of keys, the others own 64 queries each and multiply (Shah et al.
 * 2024, "FlashAttention-3", arXiv 2407.08608, section 3):
 *   - s = q k^T of the next tile and o += weights v of this one are under way together, while
 *     the next tile's scores become weights;
 *   - for D = 64 warpgroups take turns in starting products: softmax of one, products of another.
 * For the algebra see forget_attention.cu, for the layout of matrices wgmma.cuh.  For D = 64 the
 * products q k^T start at -ell_j / scale instead of 0, and the gate costs nothing in the softmax.
 *
 * Settings of `shape` measured on an H100 SXM (132 multiprocessors), November 2026, one sequence of
 * 16384, causal: 24 heads of 64 2.05 ms, 1.79 without gates; 12 of 128 1.66 ms, 1.37.
 * ptxas 13.0: registers 32 and 160 (D = 64), 56 and 224; for D = 64 24 bytes are spilled, mostly
 * by the warpgroup that loads. */
#include "forget_attention.cuh"
#include "wgmma.cuh"

template <int D_> struct shape {
    enum {
        D = D_, ROWS = 1, GROUPS = D == 64 ? 3 : 2, QUERIES = 64 * GROUPS, KEYS = 128,
        STAGES = 2, THREADS = 128 * (GROUPS + 1), PANELS = D / 64,
        TILE = KEYS * D * 2, QUERY_TILE = QUERIES * D * 2,         /* bytes */
        K_AT = 2 * QUERY_TILE, V_AT = K_AT + STAGES * TILE, ELL_AT = V_AT + STAGES * TILE,
        NONE_AT = ELL_AT + STAGES * KEYS * 4,    /* an ell of 0 */
        BASE_AT = NONE_AT + KEYS * 4, BARS_AT = BASE_AT + STAGES * 8, ITEM_AT = BARS_AT + 16 * 8,
        SHARED = ITEM_AT + 16 + 1024
    };
    /* The keys' bias: where products begin (D = 64), or added to scores.  LATE: see step. */
    static constexpr bool TURNS = D == 64, PRESET = D == 64, LATE = D == 128;
    static constexpr int FEWER = D == 64 ? 32 : 56, MORE = D == 64 ? 160 : 224;   /* registers */
    typedef float scores[1][KEYS / 8][4];
    typedef float sums[1][D / 8][4];
    typedef uint32_t weights[1][KEYS / 16][4];
    static __device__ __forceinline__ uint32_t at(int r, int c)
    {
        return (uint32_t)(c / 8 * QUERIES * 128 + r * 128 + ((c ^ r) % 8 * 16));
    }
};
/* log2: products that start so far from 0 would lose too much; ell is added to them. */
#define DEEP (-512.0f)

enum { Q_FULL, Q_FREE = 2, K_FULL = 4, K_FREE = 6, V_FULL = 8, V_FREE = 10 };

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* Where a block stands: roles walk the same tiles. */
struct walk {
    uint32_t memory, bars;
    int round, tiles;                            /* tiles of queries, tiles of keys so far */
    __device__ uint32_t bar(int which) const { return bars + which * 8; }
    __device__ int stage() const { return tiles & 1; }
    __device__ int phase() const { return tiles >> 1 & 1; }
    __device__ int q() const { return round & 1; }
    __device__ int q_phase() const { return round >> 1 & 1; }
};

/* Tiles of keys: from `last` down to `first`; none: last < first. */
struct span { int first, last; };
template <class S> static __device__ __forceinline__ span keys_of(const place &w)
{
    if (w.low_min == NO_KEY) return { 0, -1 };
    return { w.low_min / S::KEYS, (min(w.past + w.t0 + S::QUERIES, w.keys) - 1) / S::KEYS };
}

/* ---- the warpgroup that loads ---------------------------------------------------------------- */

/* Groups of copies that are under way; a group's barrier is told when it is there. */
struct copies {
    uint32_t bar;                                /* of the group that nobody was told of; 0: none */
    __device__ __forceinline__ void tell()
    {
        proxy_fence();
        barrier_arrive(bar);
    }
    __device__ __forceinline__ void close(uint32_t next)
    {
        fg_copy_commit();
        if (bar) fg_copy_wait<1>(), tell();
        bar = next;
    }
    __device__ __forceinline__ void flush()
    {
        if (bar) fg_copy_wait<0>(), tell();
        bar = 0;
    }
    __device__ __forceinline__ void wait(uint32_t free, int phase)
    {
        if (barrier_passed(free, phase)) return;
        flush();
        barrier_wait(free, phase);
    }
};

template <class S, int R>
static __device__ __forceinline__ void load_panels(uint32_t to, const bf16 *x, int64_t pitch,
                                                   int real, int D)
{
    constexpr int PER = S::D / 8, STEP = 128 / PER;
    const int c = (int)threadIdx.x % PER, r0 = (int)threadIdx.x / PER;
    const int end = c * 8 < D ? min(R, real) : 0;
    const bf16 *from = x + r0 * pitch + c * 8;
    to += c / 8 * R * 128 + r0 * 128 + (c ^ r0) % 8 * 16;
#pragma unroll 2
    for (int r = r0; r < R; r += STEP) {         /* STEP is a multiple of 8 */
        fg_copy_async(to, r < end ? from : x, r < end);
        from += STEP * pitch;
        to += STEP * 128;
    }
}

template <class S, bool GATE>
static __device__ __forceinline__ void load_keys(const problem &p, const place &w, const walk &u,
                                                 int j0, copies &c)
{
    const int64_t token = (int64_t)w.b * p.N + j0, kv = w.h / (p.H / p.Hkv) * (int64_t)p.D;
    const uint32_t k = u.memory + S::K_AT + u.stage() * S::TILE, v = k + S::V_AT - S::K_AT;
    c.wait(u.bar(K_FREE + u.stage()), u.phase() ^ 1);
    load_panels<S, S::KEYS>(k, (const bf16 *)p.k + token * p.k_pitch + kv, p.k_pitch, w.keys - j0,
                            p.D);
    if (GATE && threadIdx.x < S::KEYS / 4) {
        const float *ell = p.gates.ell + ((int64_t)w.b * p.H + w.h) * p.gates.padded + j0;
        fg_copy_async(u.memory + S::ELL_AT + (u.stage() * S::KEYS + threadIdx.x * 4) * 4,
                      ell + threadIdx.x * 4, true);
    }
    if (GATE && threadIdx.x == 32) {
        const fg_gate_block *b = p.gates.block + ((int64_t)w.b * p.H + w.h) * p.gates.blocks;
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8;"
                     :: "r"(u.memory + S::BASE_AT + u.stage() * 8),
                        "l"(&b[j0 / FG_GATE_BLOCK].base) : "memory");
    }
    c.close(u.bar(K_FULL + u.stage()));
    c.wait(u.bar(V_FREE + u.stage()), u.phase() ^ 1);
    load_panels<S, S::KEYS>(v, (const bf16 *)p.v + token * p.v_pitch + kv, p.v_pitch, w.keys - j0,
                            p.D);
    c.close(u.bar(V_FULL + u.stage()));
}

/* The tile of queries of a round is left in given[round % 4]: whoever reads it there is at most two
 * rounds behind. */
template <class S, bool GATE>
static __device__ __forceinline__ void load_role(const problem &p, walk u, int items, int *given)
{
    copies c = { 0 };
    for (int item = blockIdx.x; ; item = given[++u.round % 4]) {
        c.wait(u.bar(Q_FREE + u.q()), u.q_phase() ^ 1);
        if (item >= items) break;
        int next = 0;
        if (threadIdx.x == 0) next = (int)gridDim.x + atomicAdd(p.given, 1);
        const place w = find_place(p, S::QUERIES, item);
        const span keys = keys_of<S>(w);
        const bf16 *q = (const bf16 *)p.q + ((int64_t)w.b * p.M + w.t0) * p.q_pitch + w.h * p.D;
        load_panels<S, S::QUERIES>(u.memory + u.q() * S::QUERY_TILE, q, p.q_pitch, p.M - w.t0, p.D);
        c.close(u.bar(Q_FULL + u.q()));
        for (int n = keys.last; n >= keys.first; n--, u.tiles++)
            load_keys<S, GATE>(p, w, u, n * S::KEYS, c);
        if (threadIdx.x == 0) given[(u.round + 1) % 4] = next;
        asm volatile("bar.sync 4, 128;" ::: "memory");
    }
    c.flush();
    barrier_arrive(u.bar(Q_FULL + u.q()));
}

/* ---- warpgroups that multiply ---------------------------------------------------------------- */

/* Turns: a warpgroup waits until the one before it has started its products. */
template <class S> static __device__ __forceinline__ void turn_wait(int group)
{
    if (S::TURNS) asm volatile("bar.sync %0, 256;" :: "r"(group + 1) : "memory");
}
template <class S> static __device__ __forceinline__ void turn_pass(int group)
{
    if (S::TURNS)
        asm volatile("bar.arrive %0, 256;"
                     :: "r"(group + 1 == S::GROUPS ? 1 : group + 2) : "memory");
}

/* s = ell, as two products' sums begin */
template <class S>
static __device__ __forceinline__ void preset(typename S::scores &s, uint32_t ell)
{
#pragma unroll
    for (int n = 0; n < S::KEYS / 8; n++) {
        const float2 e = shared_float2(ell + n * 32 + threadIdx.x % 4 * 8);
        s[0][n][0] = s[0][n][2] = e.x, s[0][n][1] = s[0][n][3] = e.y;
    }
}
template <class S>
static __device__ __forceinline__ void add_ell(typename S::scores &s, uint32_t ell)
{
#pragma unroll
    for (int n = 0; n < S::KEYS / 8; n++) {
        const float2 e = shared_float2(ell + n * 32 + threadIdx.x % 4 * 8);
        s[0][n][0] += e.x, s[0][n][1] += e.y, s[0][n][2] += e.x, s[0][n][3] += e.y;
    }
}

/* s = q k^T, or s += q k^T */
template <class S, bool ADD>
static __device__ __forceinline__ void start_scores(typename S::scores &s, uint32_t q, uint32_t k)
{
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < S::D / 16; i++)
        product(s[0], matrix_at(q + i / 4 * S::QUERIES * 128 + i % 4 * 32, 16),
                matrix_at(k + i / 4 * S::KEYS * 128 + i % 4 * 32, 16), ADD || i > 0);
    wgmma_commit();
}

template <class S>
static __device__ __forceinline__ void start_sums(typename S::sums &o,
                                                  const typename S::weights &a, uint32_t v)
{
#pragma unroll
    for (int i = 0; i < S::KEYS / 16; i++)
        product(o[0], a[0][i], matrix_at(v + i * 2048, S::KEYS * 128));
    wgmma_commit();
}

/* What a row does not see becomes -inf.  Row 0 is at position i, column 0 is key j0. */
template <class S>
static __device__ __forceinline__ void mask(typename S::scores &s, const row_state (&rows)[1][2],
                                            int i, int j0)
{
    const int c = j0 + threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < S::KEYS / 8; n++)
#pragma unroll
        for (int x = 0; x < 4; x++) {
            const int low = rows[0][x / 2].low, at = i + x / 2 * 8;
            const unsigned j = (unsigned)(c + n * 8 + x % 2 - low);
            if (j > (unsigned)(at - low)) s[0][n][x] = -INFINITY;
        }
}

/* Scores to weights; scale: to units of log2, positive; keep: what the sums so far are worth. */
template <class S>
static __device__ __forceinline__ void weigh(typename S::scores &s, row_state (&rows)[1][2],
                                             float scale, float between, float (&keep)[2])
{
    float pivot[2];
#pragma unroll
    for (int x = 0; x < 2; x++) {
        float most = fmaxf(s[0][0][2 * x], s[0][0][2 * x + 1]);
#pragma unroll
        for (int n = 1; n < S::KEYS / 8; n++)
            most = fmaxf(most, fmaxf(s[0][n][2 * x], s[0][n][2 * x + 1]));
        pivot[x] = row_pivot(rows[0][x], fg_warp_max<4>(most) * scale, between, &keep[x]);
        rows[0][x].sum *= keep[x];
    }
#pragma unroll
    for (int n = 0; n < S::KEYS / 8; n++) {
#pragma unroll
        for (int x = 0; x < 4; x++) s[0][n][x] = fg_exp2(fmaf(s[0][n][x], scale, -pivot[x / 2]));
        rows[0][0].sum += s[0][n][0] + s[0][n][1], rows[0][1].sum += s[0][n][2] + s[0][n][3];
    }
}

template <class S>
static __device__ __forceinline__ void pack(typename S::weights &a, const typename S::scores &s)
{
#pragma unroll
    for (int n = 0; n < S::KEYS / 8; n++) {
        a[0][n / 2][n % 2 * 2] = fg_pack2(s[0][n][0], s[0][n][1]);
        a[0][n / 2][n % 2 * 2 + 1] = fg_pack2(s[0][n][2], s[0][n][3]);
    }
}

template <class S>
static __device__ __forceinline__ void scale_sums(typename S::sums &o, const float (&keep)[2])
{
    if (!__any_sync(~0u, keep[0] != 1 || keep[1] != 1)) return;
#pragma unroll
    for (int n = 0; n < S::D / 8; n++)
#pragma unroll
        for (int x = 0; x < 4; x++) o[0][n][x] *= keep[x / 2];
}

/* A thread's place in its warpgroup, and its tile of queries. */
template <class S> struct worker {
    int group, warp0, i;                         /* warp0: position of the warp's first query */
    double base;
    row_state rows[1][2];
    typename S::sums o;
};

/* How far a tile's queries are from its keys: the part of the bias that all pairs have. */
template <class S, bool GATE>
static __device__ __forceinline__ float between(const worker<S> &t, const walk &u)
{
    if (!GATE) return 0;
    return (float)(t.base - shared_double(u.memory + S::BASE_AT + u.stage() * 8));
}

static __device__ __forceinline__ void release(uint32_t bar, bool when = true)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0 && when) barrier_arrive(bar);
}

/* Scores of tile n of keys to weights a; unless it is the first, the sums of the tile before, with
 * the weights that a holds, go on at the same time. */
template <class S, bool GATE, bool FIRST>
static __device__ __forceinline__ void step(const problem &p, const place &w, walk &u, worker<S> &t,
                                            typename S::weights &a, int n)
{
    constexpr bool PRESET = GATE && S::PRESET, LATE = GATE && S::LATE;
    typename S::scores s;
    float keep[2];
    const int before = u.stage(), phase = u.phase(), j0 = n * S::KEYS;
    if (!FIRST) u.tiles++;
    const uint32_t ell = u.memory + S::ELL_AT + u.stage() * S::KEYS * 4;
    barrier_wait(u.bar(K_FULL + u.stage()), u.phase());
    const bool deep = GATE && (!PRESET || shared_float(ell + S::KEYS * 4 - 4) * p.ell_unit < DEEP);
    if (PRESET) preset<S>(s, deep ? u.memory + S::NONE_AT : ell);
    if (!FIRST) {
        barrier_wait(u.bar(V_FULL + before), phase);
        turn_wait<S>(t.group);
    }
    start_scores<S, PRESET>(s, u.memory + u.q() * S::QUERY_TILE + t.group * 64 * 128,
                            u.memory + S::K_AT + u.stage() * S::TILE);
    if (!FIRST) {
        start_sums<S>(t.o, a, u.memory + S::V_AT + before * S::TILE);
        turn_pass<S>(t.group);
        wgmma_wait<1>();
    } else wgmma_wait<0>();
    pin(s[0]);
    const float apart = between<S, GATE>(t, u);
    if (deep) add_ell<S>(s, ell);
    if (!LATE) release(u.bar(K_FREE + u.stage()));
    if (j0 + S::KEYS - 1 > t.warp0 || j0 < w.low_max) mask<S>(s, t.rows, t.i, j0);
    weigh<S>(s, t.rows, p.scale, apart, keep);
    /* No sum is negative, but ptxas does not know: it cannot put off the weights until after the
     * wait below, and they overlap with the products. */
    if (LATE) release(u.bar(K_FREE + u.stage()), !(t.rows[0][0].sum + t.rows[0][1].sum < 0));
    if (!FIRST) {
        wgmma_wait<0>();
        pin(t.o[0]), pin(a[0]);
        release(u.bar(V_FREE + before));
        scale_sums<S>(t.o, keep);
    }
    pack<S>(a, s);
}

/* One tile of queries against its tiles of keys. */
template <class S, bool GATE>
static __device__ __forceinline__ void walk_keys(const problem &p, const place &w, const span &keys,
                                                 walk &u, worker<S> &t)
{
    const int highest = (w.past + w.t0 + t.group * 64 + 63) / S::KEYS;
    int n = keys.last;
    for (; n > keys.first && n > highest; n--, u.tiles++) {        /* keys behind all its queries */
        turn_wait<S>(t.group), turn_pass<S>(t.group);
        barrier_wait(u.bar(K_FULL + u.stage()), u.phase());
        release(u.bar(K_FREE + u.stage()));
        barrier_wait(u.bar(V_FULL + u.stage()), u.phase());
        release(u.bar(V_FREE + u.stage()));
    }
    typename S::weights a;
    step<S, GATE, true>(p, w, u, t, a, n);
    for (n--; n >= keys.first; n--) step<S, GATE, false>(p, w, u, t, a, n);
    barrier_wait(u.bar(V_FULL + u.stage()), u.phase());
    wgmma_begin();
    start_sums<S>(t.o, a, u.memory + S::V_AT + u.stage() * S::TILE);
    wgmma_wait<0>();
    pin(t.o[0]), pin(a[0]);
    release(u.bar(V_FREE + u.stage()));
    u.tiles++;
}

template <class S, bool GATE>
static __device__ __forceinline__ void multiply_role(const problem &p, walk u, int items,
                                                     const int *given, char *shared)
{
    const int lane = threadIdx.x % 32, r0 = ((int)threadIdx.x - 128) / 32 * 16;
    worker<S> t;
    t.group = (int)threadIdx.x / 128 - 1;
    if (S::TURNS && t.group == 0) asm volatile("bar.arrive 1, 256;" ::: "memory");   /* first */
    for (;; u.round++) {
        barrier_wait(u.bar(Q_FULL + u.q()), u.q_phase());
        const int item = given[u.round % 4];
        if (item >= items) break;
        const place w = find_place(p, S::QUERIES, item);
        const span keys = keys_of<S>(w);
        t.warp0 = w.past + w.t0 + r0, t.i = t.warp0 + lane / 4;
        t.base = GATE ? base_at(p, w, t.warp0) : 0;
#pragma unroll
        for (int x = 0; x < 2; x++) t.rows[0][x] = row_start(p, w, w.t0 + r0 + x * 8 + lane / 4);
#pragma unroll
        for (int n = 0; n < S::D / 2; n++) t.o[0][n / 4][n % 4] = 0;
        if (keys.last >= keys.first) walk_keys<S, GATE>(p, w, keys, u, t);
        char *room = shared + u.q() * S::QUERY_TILE + r0 * 128;
        store_rows<S>(p, w, t.o, t.rows, room, r0, t.base);
        release(u.bar(Q_FREE + u.q()));
    }
}
#endif

template <int D, bool GATE>
static __global__ void __launch_bounds__(shape<D>::THREADS, 1)
tiles_sm90(const __grid_constant__ problem p)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    typedef shape<D> S;
    extern __shared__ __align__(1024) char memory[];
    char *shared = memory + (1024 - fg_shared(memory) % 1024) % 1024;
    walk u = { fg_shared(shared), fg_shared(shared) + S::BARS_AT, 0, 0 };
    const int items = (p.M + S::QUERIES - 1) / S::QUERIES * p.B * p.H;
    int *given = (int *)(shared + S::ITEM_AT);
    if (threadIdx.x < S::KEYS) ((float *)(shared + S::NONE_AT))[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
        given[0] = blockIdx.x;
        for (int e = 0; e < 2; e++) {
            barrier_init(u.bar(Q_FULL + e), 128);
            barrier_init(u.bar(K_FULL + e), 128);
            barrier_init(u.bar(V_FULL + e), 128);
            barrier_init(u.bar(Q_FREE + e), 4 * S::GROUPS);
            barrier_init(u.bar(K_FREE + e), 4 * S::GROUPS);
            barrier_init(u.bar(V_FREE + e), 4 * S::GROUPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(S::FEWER));
        load_role<S, GATE>(p, u, items, given);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(S::MORE));
        multiply_role<S, GATE>(p, u, items, given, shared);
    }
#else
    (void)p;
#endif
}

bool fg_forget_attention_fits_sm90(const problem &p)
{
    cudaFuncAttributes f;
    if (p.D > 128 || !p.vectors || !(p.scale > 1e-6f)) return false;
    if (cudaFuncGetAttributes(&f, tiles_sm90<64, true>) != cudaSuccess) return false;
    return f.binaryVersion == 90 && f.ptxVersion == 90;
}

template <int D> static void start_width(const problem &p, cudaStream_t stream)
{
    typedef shape<D> S;
    const int64_t items = (int64_t)fg_blocks(p.M, S::QUERIES) * p.B * p.H, all = fg_processors();
    cudaMemsetAsync(p.given, 0, sizeof *p.given, stream);
    start(p.log_f ? tiles_sm90<D, true> : tiles_sm90<D, false>, items < all ? items : all,
          S::THREADS, S::SHARED, p, stream);
}

void fg_forget_attention_start_sm90(const problem &p, cudaStream_t stream)
{
    if (p.D <= 64) start_width<64>(p, stream);
    else start_width<128>(p, stream);
}
