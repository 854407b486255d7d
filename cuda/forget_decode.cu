/* forget_decode.cu - attention of one new token to the caches: ops/forget_decode.c on a GPU.
 *
 *     y = gated_norm(sum_j e^(s_j - lse) v_j),  s_j = scale rms_norm(q).k_j + log_f_(j+1) + ...
 *
 * A cluster of CLUSTER blocks per sequence and head shares the visible keys evenly; a block walks
 * its own in tiles, left to right.  In a tile the bias of a key is the sum of the gates behind it
 * in the tile, so nothing is summed over the whole cache: the tile's whole sum moves the maximum
 * of what came before (`shift`), a block's that of the blocks to the left.  D / 8 threads share a
 * key; each group of them has a running maximum and sums of its own, which are put together at the
 * end, in the block and then by the first block through the cluster's shared memory.
 * Everything is in units of log2.  Gates as in attention.cuh: clamped at -100 nats, and one that is
 * no number makes NaN of a query that sees beyond it.
 * In a chain (chain.cuh) the blocks that have not the new key begin before the wait.
 * Bytes: the visible rows of k, v and log_f once. */
#include "attention.cuh"
#include "chain.cuh"
#include "elementwise.cuh"

/* H100 SXM, 2026-11: blocks of a cluster, threads of a block, keys of a tile, keys of a group of
 * threads that are on their way at once, steps of a block that are on their way to the L2 cache. */
enum { CLUSTER = 8, THREADS = 256, WARPS = THREADS / 32, TILE = 1024, DEEP = 8, AHEAD = 1 };

struct problem {
    fg_source q, g;
    fg_in wq, wo;
    const bf16 *k, *v;                           /* [B,C,H,D] */
    const float *log_f;                          /* [B,C,H] */
    const int32_t *first, *past;
    fg_out y;
    int B, C, H, window;                         /* window: 1 .. C */
    int q_step, o_step;                          /* gains of head h begin at h * step */
    float scale, q_eps, eps;                     /* scale: in units of log2 */
    bool early;
};

/* All threads of the cluster meet; what they wrote before is seen by all. */
static __device__ __forceinline__ void meet()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}
/* Where block `rank` of the cluster has what this one has at p, in shared memory. */
template <class T> static __device__ __forceinline__ const T *in_block(const T *p, int rank)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm("mapa.u64 %0, %0, %1;" : "+l"(p) : "r"(rank));
#endif
    return p;
}

/* Sums of e^(s - max) over some keys, and of those times v; V: channels that a thread has. */
template <int V> struct sums { float max, all, v[V]; };

template <int V> static __device__ __forceinline__ void add(sums<V> &a, const sums<V> &b)
{
    const float max = fmaxf(a.max, b.max), at = max == -INFINITY ? 0 : max;
    const float x = fg_exp2(a.max - at), y = fg_exp2(b.max - at);
    a.max = max;
    a.all = a.all * x + b.all * y;
#pragma unroll
    for (int i = 0; i < V; i++) a.v[i] = a.v[i] * x + b.v[i] * y;
}

template <int D> struct shared_part {            /* what a block has in the end */
    float v[D], max, all;
    double gates;                                /* sum of all its gates */
    int bad;
};

/* Gates of keys [t0,t1) to sums over those behind: ell[j - t0] = log_f_(j+1) + ... in the tile.
 * Returns the sum of all; *bad: one of them, other than that of key `low`, is no number. */
static __device__ double scan_gates(const problem &p, int64_t head0, int t0, int t1, int low,
                                    float *ell, int *bad)
{
    enum { EACH = TILE / THREADS };
    __shared__ double warps[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float f[EACH];
    double sum = 0, after = 0, all = 0;
    bool wrong = false;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int j = t0 + (int)threadIdx.x * EACH + i;
        f[i] = j < t1 ? p.log_f[head0 + (int64_t)j * p.H] : 0;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int j = t0 + (int)threadIdx.x * EACH + i;
        wrong |= j != low && fg_gate_is_bad(f[i]);
        f[i] = fg_gate_clamp(f[i]);
        sum += (double)f[i];
    }
    double behind = sum;                         /* sum over this thread and those behind */
#pragma unroll
    for (int k = 1; k < 32; k *= 2) {
        const double y = __shfl_down_sync(~0u, behind, k);
        if (lane + k < 32) behind += y;
    }
    if (lane == 0) warps[warp] = behind;
    *bad |= __syncthreads_or(wrong);
    for (int w = 0; w < WARPS; w++) {
        if (w > warp) after += warps[w];
        all += warps[w];
    }
    double rest = behind - sum + after;
#pragma unroll
    for (int i = EACH - 1; i >= 0; i--) {
        ell[threadIdx.x * EACH + i] = (float)(rest * FG_LOG2_E);
        rest += (double)f[i];
    }
    __syncthreads();
    return all * FG_LOG2_E;
}

/* How a block's threads share keys: SHARE of them have one, a warp KEYS at a time, DEEP times. */
template <int D> struct work {
    enum { SHARE = D / 8, KEYS = 32 / SHARE, WARP = KEYS * DEEP, STEP = WARPS * WARP };
    const problem &p;
    int64_t row0;                                /* of the head's key 0 */
    int to, first, c;                            /* the thread's first key of a step, channel */
    uint4 k[DEEP], v[DEEP];

    __device__ __forceinline__ void load(uint4 (&x)[DEEP], const bf16 *from, int base) const
    {
        const int64_t pitch = (int64_t)p.H * D;
#pragma unroll
        for (int u = 0; u < DEEP; u++) {
            const int j = base + first + u * KEYS;
            x[u] = j < to ? __ldcs((const uint4 *)(from + row0 + j * pitch + c))
                          : make_uint4(0, 0, 0, 0);
        }
    }
    /* Starts the step's keys on their way to the L2 cache. */
    __device__ __forceinline__ void call(int base) const
    {
        const int64_t pitch = (int64_t)p.H * D;
        for (int i = threadIdx.x; i < STEP * (D / 64); i += THREADS) {
            const int j = base + i / (D / 64);
            const int64_t at = row0 + j * pitch + i % (D / 64) * 64;
            if (j >= to) continue;
            asm volatile("prefetch.global.L2 [%0];" :: "l"(p.k + at));
            asm volatile("prefetch.global.L2 [%0];" :: "l"(p.v + at));
        }
    }
    /* Adds the step from base on; the next step's keys are loaded as soon as there is room. */
    __device__ __forceinline__ void step(int base, const float *ell, const float (&q)[8],
                                         sums<8> &a)
    {
        float s[DEEP], most = a.max;
#pragma unroll
        for (int u = 0; u < DEEP; u++) {
            float x[8];
            fg_unpack(k[u], x);
            s[u] = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) s[u] = fmaf(q[i], x[i], s[u]);
        }
        load(k, p.k, base + STEP);
#pragma unroll
        for (int u = 0; u < DEEP; u++) {
            s[u] = fg_warp_sum<SHARE>(s[u]);
            s[u] = base + first + u * KEYS < to ? s[u] + ell[first + u * KEYS] : -INFINITY;
            most = fmaxf(most, s[u]);
        }
        const float at = most == -INFINITY ? 0 : most, keep = fg_exp2(a.max - at);
        a.max = most;
        a.all *= keep;
#pragma unroll
        for (int i = 0; i < 8; i++) a.v[i] *= keep;
#pragma unroll
        for (int u = 0; u < DEEP; u++) {
            const float weight = fg_exp2(s[u] - at);
            float x[8];
            fg_unpack(v[u], x);
            a.all += weight;
#pragma unroll
            for (int i = 0; i < 8; i++) a.v[i] = fmaf(weight, x[i], a.v[i]);
        }
        load(v, p.v, base + STEP);
    }
};

/* rms_norm(q) of the thread's channels, times the scale. */
template <int D>
static __device__ __forceinline__ void load_query(const problem &p, int64_t head, int h,
                                                  float (&q)[8])
{
    const int c = threadIdx.x % (D / 8) * 8;
    const fg_vec8 x = fg_load8(p.q.x, p.q.place.at(head * D + c));
    const fg_vec8 w = fg_load8(p.wq, (int64_t)h * p.q_step + c);
    float squares = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) squares = fmaf(x[i], x[i], squares);
    const float rstd = rsqrtf(fg_warp_sum<D / 8>(squares) / D + p.q_eps) * p.scale;
#pragma unroll
    for (int i = 0; i < 8; i++) q[i] = x[i] * rstd * w[i];
}

/* The block's groups of threads, put together. */
template <int D> static __device__ void join_block(sums<8> a, shared_part<D> *part)
{
    enum { SHARE = D / 8 };
    __shared__ float v[WARPS][D], max[WARPS], all[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int k = SHARE; k < 32; k *= 2) {
        sums<8> b;
        b.max = __shfl_xor_sync(~0u, a.max, k);
        b.all = __shfl_xor_sync(~0u, a.all, k);
#pragma unroll
        for (int i = 0; i < 8; i++) b.v[i] = __shfl_xor_sync(~0u, a.v[i], k);
        add(a, b);
    }
    if (lane < SHARE)
#pragma unroll
        for (int i = 0; i < 8; i++) v[warp][lane * 8 + i] = a.v[i];
    if (lane == 0) max[warp] = a.max, all[warp] = a.all;
    __syncthreads();
    const int d = threadIdx.x;
    if (d >= D) return;
    sums<1> y = { max[0], all[0], { v[0][d] } };
    for (int w = 1; w < WARPS; w++) {
        const sums<1> b = { max[w], all[w], { v[w][d] } };
        add(y, b);
    }
    part->v[d] = y.v[0];
    if (d == 0) part->max = y.max, part->all = y.all;
}

/* The blocks of a cluster, put together by the first: o, its norm and its gate. */
template <int D>
static __device__ void finish(const problem &p, const shared_part<D> *part, int64_t head, int h,
                              bool sees)
{
    __shared__ float squares[D / 32];
    const int d = threadIdx.x;
    float o = 0;
    if (d < D && sees) {
        sums<1> a = { -INFINITY, 0, { 0 } };
        double behind = 0;
        int bad = 0;
        for (int r = CLUSTER - 1; r >= 0; r--) {
            const shared_part<D> *x = in_block(part, r);
            const sums<1> b = { x->max + (float)behind, x->all, { x->v[d] } };
            behind += x->gates;
            bad |= x->bad;
            add(a, b);
        }
        o = bad ? NAN : a.v[0] / a.all;
    }
    const float square = fg_warp_sum(o * o);
    if (d < D && d % 32 == 0) squares[d / 32] = square;
    __syncthreads();
    if (d >= D) return;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < D / 32; i++) sum += squares[i];
    const float gate = p.g.x[p.g.place.at(head * D + d)];
    const float y = o * rsqrtf(sum / D + p.eps) * p.wo[(int64_t)h * p.o_step + d];
    p.y.put(head * D + d, y / (1 + expf(-gate)));
}

template <int D>
static __global__ void __launch_bounds__(THREADS, 2) decode(const __grid_constant__ problem p)
{
    __shared__ float ell[TILE];
    __shared__ shared_part<D> part;
    const int rank = (int)blockIdx.x % CLUSTER;
    const int64_t head = blockIdx.x / CLUSTER, b = head / p.H;
    const int h = (int)(head % p.H);
    fg_chain_next();
    if (!p.early) fg_chain_wait();
    const int past = *p.past, pad = p.first ? max(0, p.first[b]) : 0;
    const int low = max(pad, past - p.window + 1);
    const bool sees = pad <= past && past < p.C;
    const int n = sees ? past + 1 - low : 0, each = (n + CLUSTER * 32 - 1) / (CLUSTER * 32) * 32;
    const int from = low + rank * each, to = min(from + each, low + n);
    const bool old = p.early && to <= past;      /* what is in front writes none of these keys */
    if (p.early && !old) fg_chain_wait();
    work<D> w = { p, (b * p.C * p.H + h) * D, to };
    w.first = threadIdx.x / 32 * w.WARP + threadIdx.x % 32 / w.SHARE;
    w.c = threadIdx.x % w.SHARE * 8;
    w.load(w.k, p.k, from);
    w.load(w.v, p.v, from);
    for (int i = 1; i <= AHEAD; i++) w.call(from + i * w.STEP);
    sums<8> a = { -INFINITY, 0, { 0 } };
    double gates = 0;
    int bad = 0;
    float q[8];
    for (int base = from; base < to; base += w.STEP) {
        const int at = (base - from) % TILE;
        if (at == 0) {
            __syncthreads();
            const double shift = scan_gates(p, b * p.C * p.H + h, base, min(base + TILE, to), low,
                                            ell, &bad);
            gates += shift;
            a.max += (float)shift;
        }
        if (base == from) {
            if (old) fg_chain_wait();
            load_query<D>(p, head, h, q);
        }
        w.call(base + (1 + AHEAD) * w.STEP);
        w.step(base, ell + at, q, a);
    }
    if (old && from >= to) fg_chain_wait();
    join_block<D>(a, &part);
    if (threadIdx.x == 0) part.gates = gates, part.bad = bad;
    meet();
    if (rank == 0) finish<D>(p, &part, head, h, sees);
    meet();                                      /* until then the others' memory must stay */
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    enum { Q, WQ, K, V, LOG_F, FIRST, PAST, G, WO };
    const struct fg_attr_forget_decode *at = (const struct fg_attr_forget_decode *)e->attr;
    const int64_t *k = e->in_shape[K].dim;
    problem p = {};
    p.q = fg_source_of(e, Q), p.g = fg_source_of(e, G);
    p.wq = fg_input_of(e, WQ), p.wo = fg_input_of(e, WO);
    p.k = (const bf16 *)e->in[K], p.v = (const bf16 *)e->in[V];
    p.log_f = (const float *)e->in[LOG_F];
    p.first = (const int32_t *)e->in[FIRST], p.past = (const int32_t *)e->in[PAST];
    p.y = fg_output_of(e, 0);
    p.B = (int)k[0], p.C = (int)k[1], p.H = (int)k[2];
    p.window = at->window && at->window < k[1] ? (int)at->window : p.C;
    p.q_step = e->in_shape[WQ].dim[0] == k[3] ? 0 : (int)k[3];
    p.o_step = e->in_shape[WO].dim[0] == k[3] ? 0 : (int)k[3];
    p.scale = (float)(at->scale * FG_LOG2_E);
    p.q_eps = (float)at->q_eps, p.eps = (float)at->eps;
    p.early = at->early;
    const unsigned blocks = (unsigned)(p.B * p.H * CLUSTER);
    if (k[3] == 64) fg_chain_launch(decode<64>, blocks, THREADS, 0, CLUSTER, stream, p);
    else fg_chain_launch(decode<128>, blocks, THREADS, 0, CLUSTER, stream, p);
}

static const char *unfit(const fg_infer *c)
{
    const int64_t *k = c->in[2].dim;
    if (c->in_type[2] != FG_BF16) return "the caches are not bf16";
    if (k[3] != 64 && k[3] != 128) return "heads of another width than 64 and 128";
    if (k[1] > 1 << 30 || k[0] * k[2] > 1 << 20) return "too many keys or heads";
    return fg_capability() < 90 ? "the GPU has no clusters" : nullptr;
}

FG_KERNEL(forget_decode) = { .launch = launch, .unfit = unfit,
                             .pitched_in = 1u << 0 | 1u << 7 };
