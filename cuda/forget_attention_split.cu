/* forget_attention_split.cu - attention with a forget gate for few queries against a cache.
 *
 * The rows (query, head) that share a head of k and v are taken FEW at a time, and their keys cut
 * in equal splits, each for a block of threads; a warp takes every 4th tile of a split.  A split
 * counts the bias from its own last key e: ell_j = C_j - C_e, which is exact where it matters.
 * split_join puts the splits of a row together, for which each says how far it is from the split
 * before (`step`).  The grid is that of a full cache, so that a captured launch stays right as the
 * cache fills.
 * Bytes: k and v once, 4 D + 24 a row and split written and read again. */
#include "forget_attention.cuh"

#define EARLY 12                                 /* splits that split_join loads at once */
#define GATES 8                                  /* of a thread, in a split of at most 1024 keys */

/* Between two kernels of one launch, from sm_90 on: the second may start while the first ends, and
 * waits for what the first wrote. */
static __device__ __forceinline__ void start_next()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
static __device__ __forceinline__ void wait_for_last()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

struct split_row {
    double step;                                 /* C_e - C_e of the split before */
    float max, sum;                              /* as in row_state */
    int bad;                                     /* last bad gate up to the group's first query */
};

template <int D_> struct split_shape {
    enum {
        D = D_, WARPS = 4, THREADS = 128, ROWS = 1, KEYS = D <= 64 ? 32 : 16,
        STAGES = D <= 128 ? 3 : 2, TILE = KEYS * D * 2, STAGE = 2 * TILE,
        SHARED = WARPS * STAGES * STAGE, BLOCKS = D <= 128 ? 2 : 1
    };
    static constexpr bool KEEP_Q = true;
    typedef float scores[1][KEYS / 8][4];
    typedef float sums[1][D / 8][4];
    typedef uint32_t weights[1][KEYS / 16][4];
    typedef uint32_t queries[1][D / 16][4];
};

/* A group of up to FEW rows and the keys that any of them sees. */
struct split_group {
    int b, kv, row0, rows, past;
    int begin, end, length;                      /* keys; begin = end: none; of a split */
};

/* Whole warps call it. */
static __device__ split_group find_group(const problem &p, int64_t at)
{
    split_group g;
    const int each = p.H / p.Hkv, groups = (p.M * each + FEW - 1) / FEW;
    g.row0 = (int)(at % groups) * FEW;
    g.kv = (int)(at / groups % p.Hkv), g.b = (int)(at / groups / p.Hkv);
    g.rows = min(FEW, p.M * each - g.row0);
    g.past = min(max(0, *p.past), p.N);
    const int t = (g.row0 + min((int)threadIdx.x % 32, g.rows - 1)) / each;
    const int low = first_key(p, g.b, t, g.past + t);
    g.begin = __reduce_min_sync(~0u, low) / 16 * 16;
    g.end = __reduce_max_sync(~0u, low == NO_KEY ? 0 : g.past + t + 1);
    g.begin = min(g.begin, g.end);
    const int keys = g.end - g.begin;
    g.length = ((keys + p.splits - 1) / p.splits + 63) / 64 * 64;
    return g;
}

/* Heads differ in their gates: rows of one head share a slot. */
static __device__ __forceinline__ int slots_of(const problem &p) { return min(p.H / p.Hkv, FEW); }
static __device__ __forceinline__ int slot_of(const problem &p, const split_group &g, int r)
{
    const int each = p.H / p.Hkv;
    return each < FEW ? (g.row0 + r) % each : r;
}

/* The thread's gates of keys [k0,k1), one after another, of the head in `slot`. */
static __device__ __forceinline__ void split_gates_load(float (&x)[GATES], const problem &p,
                                                        const split_group &g, int slot, int k0,
                                                        int k1)
{
    const int each = p.H / p.Hkv, h = g.kv * each + (each < FEW ? slot : (g.row0 + slot) % each);
    const int n = (k1 - k0 + 127) / 128, j0 = k0 + threadIdx.x * n;
    const float *f = p.log_f + ((int64_t)g.b * p.N + j0) * p.f_pitch + h;
#pragma unroll
    for (int u = 0; u < GATES; u++) x[u] = u < n && j0 + u < k1 ? f[u * p.f_pitch] : 0;
}

/* ell of keys [k0,k1) from all threads' gates; *step and *bad as in split_row. */
static __device__ void split_gates(const float (&x)[GATES], const problem &p, const split_group &g,
                                   int k0, int k1, float *ell, double *step, int *bad)
{
    __shared__ double part[4];
    __shared__ int part_bad[4];
    const int n = (k1 - k0 + 127) / 128, j0 = k0 + threadIdx.x * n, warp = threadIdx.x / 32;
    const int upto = g.past + g.row0 / (p.H / p.Hkv);
    double sum = 0;
    int last = -1;
#pragma unroll
    for (int u = 0; u < GATES; u++) {
        if (fg_gate_is_bad(x[u]) && j0 + u <= upto) last = j0 + u;
        sum += (double)fg_gate_clamp(x[u]) * FG_LOG2_E;
    }
    const double here = fg_warp_prefix(sum);
    last = __reduce_max_sync(~0u, last);
    __syncthreads();                             /* the last slot's readers are done */
    if (threadIdx.x % 32 == 31) part[warp] = here, part_bad[warp] = last;
    __syncthreads();
    double c = here - sum, all = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (i < warp) c += part[i];
        all += part[i];
        last = max(last, part_bad[i]);
    }
    c -= all;
#pragma unroll
    for (int u = 0; u < GATES; u++) {
        c += (double)fg_gate_clamp(x[u]) * FG_LOG2_E;
        if (u < n && j0 + u < k1) ell[j0 + u - k0] = (float)c;
    }
    if (threadIdx.x == 0) *step = all, *bad = last;
}

template <class S, bool ALIGNED>
static __device__ __forceinline__ void split_load(uint32_t to, const problem &p,
                                                  const split_group &g, int j0, int k1)
{
    if (j0 < k1) {
        const int64_t row = (int64_t)g.b * p.N + j0, kv = (int64_t)g.kv * p.D;
        const int lane = threadIdx.x % 32;
        load_rows<S::D, S::KEYS, 32, ALIGNED>(to, (const bf16 *)p.k + row * p.k_pitch + kv,
                                              p.k_pitch, k1 - j0, p.D, lane);
        load_rows<S::D, S::KEYS, 32, ALIGNED>(to + S::TILE,
                                              (const bf16 *)p.v + row * p.v_pitch + kv, p.v_pitch,
                                              k1 - j0, p.D, lane);
    }
    fg_copy_commit();
}

/* Columns d, d + 1 of a row; nothing waits for them here. */
template <bool ALIGNED>
static __device__ __forceinline__ uint32_t split_pair(const bf16 *row, int d, int D)
{
    if (ALIGNED) return d < D ? *(const uint32_t *)(row + d) : 0;
    const uint32_t low = d < D ? __bfloat16_as_ushort(row[d]) : 0;
    const uint32_t high = d + 1 < D ? __bfloat16_as_ushort(row[d + 1]) : 0;
    return low | high << 16;
}

/* The group's rows of q as fragments, and what their keys are. */
template <class S, bool ALIGNED>
static __device__ __forceinline__ void split_queries(const problem &p, const split_group &g,
                                                     typename S::queries &a,
                                                     row_state (&rows)[1][2])
{
    const int lane = threadIdx.x % 32, each = p.H / p.Hkv;
#pragma unroll
    for (int x = 0; x < 2; x++) {
        const int r = x * 8 + lane / 4, t = (g.row0 + r) / each, h = (g.row0 + r) % each;
        const bool real = r < g.rows;
        rows[0][x] = { real ? first_key(p, g.b, t, g.past + t) : NO_KEY, -INFINITY, 0 };
        const int64_t token = (int64_t)g.b * p.M + t, column = (g.kv * each + h) * (int64_t)p.D;
        const bf16 *q = (const bf16 *)p.q + (real ? token * p.q_pitch + column : 0);
#pragma unroll
        for (int i = 0; i < S::D / 16; i++)
#pragma unroll
            for (int y = 0; y < 2; y++)
                a[0][i][2 * y + x] =
                    split_pair<ALIGNED>(q, i * 16 + y * 8 + lane % 4 * 2, real ? p.D : 0);
    }
}

/* The bias of each row's own head, and the mask. */
template <class S, bool GATE>
static __device__ __forceinline__ void split_bias(typename S::scores &s, const problem &p,
                                                  const float *const (&ell)[2],
                                                  const int (&at)[2], const row_state (&rows)[1][2],
                                                  int j0)
{
    const int c = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < S::KEYS / 8; n++)
#pragma unroll
        for (int x = 0; x < 2; x++) {
            const float2 e = GATE ? *(const float2 *)(ell[x] + n * 8 + c) : make_float2(0, 0);
#pragma unroll
            for (int y = 0; y < 2; y++) {
                const int j = j0 + n * 8 + c + y, low = rows[0][x].low;
                const float z = fmaf(s[0][n][2 * x + y], p.scale, y ? -e.y : -e.x);
                s[0][n][2 * x + y] = j >= low && j <= at[x] ? z : -INFINITY;
            }
        }
}

/* Adds up the warps' sums and writes the split's. */
template <class S>
static __device__ __forceinline__ void split_store(const problem &p, const split_group &g,
                                                   typename S::sums &o, row_state (&rows)[1][2],
                                                   float *room, int64_t at, int split,
                                                   const double *steps, const int *bads)
{
    __shared__ float most[S::WARPS][FEW], sum[S::WARPS][FEW];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    fg_copy_wait<0>();
    __syncthreads();                             /* the tiles make room */
#pragma unroll
    for (int x = 0; x < 2; x++) {
        const int r = x * 8 + lane / 4;
        const float all = fg_warp_sum<4>(rows[0][x].sum);
        if (lane % 4 == 0) most[warp][r] = rows[0][x].max, sum[warp][r] = all;
#pragma unroll
        for (int n = 0; n < S::D / 8; n++)
            *(float2 *)(room + (warp * FEW + r) * S::D + n * 8 + lane % 4 * 2) =
                make_float2(o[0][n][2 * x], o[0][n][2 * x + 1]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < g.rows * S::D; i += S::THREADS) {
        const int r = i / S::D, d = i % S::D;
        float top = -INFINITY, y = 0, all = 0;
        for (int w = 0; w < S::WARPS; w++) top = fmaxf(top, most[w][r]);
        for (int w = 0; w < S::WARPS; w++) {
            const float keep = fg_exp2(most[w][r] - (top == -INFINITY ? 0 : top));
            y = fmaf(keep, room[(w * FEW + r) * S::D + d], y);
            all = fmaf(keep, sum[w][r], all);
        }
        const int64_t row = (at * FEW + r) * p.splits + split;
        p.split_sums[row * S::D + d] = y;
        if (d == 0) {
            const int slot = slot_of(p, g, r);
            p.split_rows[row] = { p.log_f ? steps[slot] : 0, top, all, p.log_f ? bads[slot] : -1 };
        }
    }
}

template <int D, bool GATE, bool ALIGNED>
static __global__ void __launch_bounds__(128, split_shape<D>::BLOCKS)
split_keys(const __grid_constant__ problem p)
{
    typedef split_shape<D> S;
    extern __shared__ __align__(1024) char shared[];
    __shared__ double steps[FEW];
    __shared__ int bads[FEW];
    const int heads = gridDim.x / p.splits, split = blockIdx.x / heads;
    const int64_t at = blockIdx.x % heads;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    start_next();
    const split_group g = find_group(p, at);
    const int k0 = g.begin + split * g.length, k1 = min(k0 + g.length, g.end);
    if (k0 >= k1) return;
    float *ell = (float *)(shared + S::SHARED), x[GATES];
    const uint32_t stages = fg_shared(shared) + warp * S::STAGES * S::STAGE;
    int j0 = k0 + warp * S::KEYS, ahead = j0;
    typename S::queries q;
    row_state rows[1][2];
    if (GATE) split_gates_load(x, p, g, 0, k0, k1);    /* before k and v, or they come after them */
    split_queries<S, ALIGNED>(p, g, q, rows);
#pragma unroll 1
    for (int i = 0; i < S::STAGES - 1; i++, ahead += S::WARPS * S::KEYS)
        split_load<S, ALIGNED>(stages + i * S::STAGE, p, g, ahead, k1);
    for (int i = 0; GATE && i < slots_of(p); i++) {
        if (i) split_gates_load(x, p, g, i, k0, k1);
        split_gates(x, p, g, k0, k1, ell + i * p.split_keys, steps + i, bads + i);
    }
    __syncthreads();
    const float *mine[2];
    int upto[2];
#pragma unroll
    for (int x = 0; x < 2; x++) {
        const int r = min(x * 8 + lane / 4, g.rows - 1);
        mine[x] = ell + slot_of(p, g, r) * p.split_keys - k0;
        upto[x] = min(g.past + (g.row0 + r) / (p.H / p.Hkv), k1 - 1);
    }
    typename S::sums o = {};
    for (int stage = 0; j0 < k1; j0 += S::WARPS * S::KEYS, ahead += S::WARPS * S::KEYS) {
        fg_copy_wait<S::STAGES - 2>();
        __syncwarp();
        const int free = stage ? stage - 1 : S::STAGES - 1;
        split_load<S, ALIGNED>(stages + free * S::STAGE, p, g, ahead, k1);
        const uint32_t k = stages + stage * S::STAGE;
        const float *const bias[2] = { mine[0] + j0, mine[1] + j0 };
        typename S::scores s;
        typename S::weights a;
        multiply_keys<S>(s, q, 0, k);
        split_bias<S, GATE>(s, p, bias, upto, rows, j0);
        softmax<S>(a, s, o, rows, 0);
        add_values<S>(o, a, k + S::TILE);
        stage = stage + 1 == S::STAGES ? 0 : stage + 1;
    }
    split_store<S>(p, g, o, rows, (float *)shared, at, split, steps, bads);
}

/* How far query i of the row is before the group's last position, in units of log2, and whether a
 * bad gate lies between the group's first query and i. */
static __device__ double split_late(const problem &p, const split_group &g, int h, int i, int low,
                                    bool *bad)
{
    double late = 0;
    const float *f = p.log_f + (int64_t)g.b * p.N * p.f_pitch + h;
    for (int t = g.past + g.row0 / (p.H / p.Hkv) + 1; t < g.end; t++) {
        const float x = f[t * p.f_pitch];
        if (t > i) late += (double)fg_gate_clamp(x) * FG_LOG2_E;
        else if (t > low && fg_gate_is_bad(x)) *bad = true;
    }
    return late;
}

/* One block of WIDTH threads per row.  weight[splits] in shared memory. */
template <int WIDTH>
static __global__ void __launch_bounds__(WIDTH) split_join(const __grid_constant__ problem p)
{
    extern __shared__ float weight[];
    const int h = blockIdx.x % p.H, each = p.H / p.Hkv, groups = (p.M * each + FEW - 1) / FEW;
    const int t = blockIdx.x / p.H % p.M, r = t * each + h % each, lane = threadIdx.x % 32;
    const int64_t b = blockIdx.x / p.H / p.M, at = (b * p.Hkv + h / each) * groups + r / FEW;
    const split_group g = find_group(p, at);
    const int i = g.past + t, low = first_key(p, (int)b, t, i);
    const int64_t row = (at * FEW + r % FEW) * p.splits, to = blockIdx.x;
    if (low == NO_KEY) {
        wait_for_last();                         /* whoever comes next must not meet the first */
        if ((int)threadIdx.x < p.D) ((bf16 *)p.o)[to * p.D + threadIdx.x] = bf16(0.0f);
        if (threadIdx.x == 0) p.lse[to] = -INFINITY;
        return;
    }
    const int n = (g.end - g.begin + g.length - 1) / g.length;
    bool bad = false;
    double behind = p.log_f ? -split_late(p, g, h, i, low, &bad) : 0;
    float most = -INFINITY, sum = 0, y = 0, early[EARLY];
    const int d = threadIdx.x;
    const float *sums = p.split_sums + row * WIDTH + d;
    wait_for_last();
#pragma unroll
    for (int s = 0; s < EARLY; s++) early[s] = s < n ? sums[s * WIDTH] : 0;
    for (int k = 0; k < n; k += 32) {            /* every warp the same; the last split first */
        const int s = n - 1 - k - lane;
        const split_row x = s >= 0 ? p.split_rows[row + s] : split_row{ 0, -INFINITY, 0, -1 };
        const double from = behind + fg_warp_prefix(x.step);
        const float m = x.max + (float)(from - x.step), now = fmaxf(most, fg_warp_max(m));
        behind = __shfl_sync(~0u, from, 31);
        bad = __any_sync(~0u, bad || x.bad > low);
        sum *= most == -INFINITY ? 0 : fg_exp2(most - now);
        most = now;
        sum += fg_warp_sum(x.sum == 0 ? 0 : x.sum * fg_exp2(m - (now == -INFINITY ? 0 : now)));
        if (s >= 0 && threadIdx.x < 32) weight[s] = m;
    }
    if (most == -INFINITY) most = 0;             /* NaN only */
    __syncthreads();
    for (int s = threadIdx.x; s < n; s += blockDim.x) weight[s] = fg_exp2(weight[s] - most);
    __syncthreads();
#pragma unroll
    for (int s = 0; s < EARLY; s++) if (s < n) y = fmaf(weight[s], early[s], y);
#pragma unroll 8
    for (int s = EARLY; s < n; s++) y = fmaf(weight[s], sums[s * WIDTH], y);
    if (d < p.D) ((bf16 *)p.o)[to * p.D + d] = __float2bfloat16_rn(bad ? NAN : y / sum);
    if (threadIdx.x == 0) p.lse[to] = bad ? NAN : (most + log2f(sum)) * (float)FG_LN_2;
}

/* ---- launch ---------------------------------------------------------------------------------- */

template <int D, bool ALIGNED> static void start_width(const problem &p, cudaStream_t stream)
{
    typedef split_shape<D> S;
    const int each = p.H / p.Hkv, groups = (p.M * each + FEW - 1) / FEW;
    const int ell = p.log_f ? (each < FEW ? each : FEW) * p.split_keys * 4 : 0;
    start(p.log_f ? split_keys<D, true, ALIGNED> : split_keys<D, false, ALIGNED>,
          (int64_t)p.B * p.Hkv * groups * p.splits, S::THREADS, S::SHARED + ell, p, stream);
    int device = 0, major = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t c = {};
    c.gridDim = dim3((unsigned)(p.B * p.M * p.H)), c.blockDim = dim3(D);
    c.dynamicSmemBytes = (size_t)((p.splits + 31) / 32 * 128), c.stream = stream;
    c.attrs = &early, c.numAttrs = major >= 9;
    cudaLaunchKernelEx(&c, split_join<D>, p);
}

void fg_forget_attention_start_splits(const problem &p, cudaStream_t stream)
{
    if (!p.vectors) {
        if (p.D <= 64) start_width<64, false>(p, stream);
        else if (p.D <= 128) start_width<128, false>(p, stream);
        else start_width<256, false>(p, stream);
    } else if (p.D <= 64) start_width<64, true>(p, stream);
    else if (p.D <= 128) start_width<128, true>(p, stream);
    else start_width<256, true>(p, stream);
}

int fg_forget_attention_splits(const problem &p)
{
    const int64_t each = p.H / p.Hkv, heads = (int64_t)p.B * p.Hkv * ((p.M * each + FEW - 1) / FEW);
    const int64_t most = (p.N + 63) / 64, least = (p.N + 1023) / 1024;
    const int64_t fill = fg_processors() * (p.D <= 128 ? 2 : 1) / heads;
    const int64_t slots = each < FEW ? each : FEW;
    int device = 0, room = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (room < (p.D <= 128 ? 98 : 130) * 1024 + slots * 4096 || least > 4096) return 0;
    return (int)(fill < least ? least : fill > most ? most : fill);
}

size_t fg_forget_attention_cut_splits(problem *p, void *scratch)
{
    const int64_t groups = (p->M * (p->H / p->Hkv) + FEW - 1) / FEW;
    const size_t rows = (size_t)(p->B * p->Hkv * groups * FEW * p->splits);
    const size_t sums = rows * (p->D <= 64 ? 64 : p->D <= 128 ? 128 : 256) * sizeof(float);
    p->split_keys = ((p->N + p->splits - 1) / p->splits + 63) / 64 * 64;
    p->split_sums = (float *)scratch;
    p->split_rows = scratch ? (split_row *)((char *)scratch + sums) : nullptr;
    return sums + rows * sizeof(split_row);
}
