/* forget_decode.cu - one new token in the heads of a layer: ops/forget_decode.c on a GPU.
 *
 *     y = gated_norm(sum_j e^(s_j - lse) v_j),  s_j = scale rms_norm(q).k_j + log_f_(j+1) + ...
 *
 * A cluster of up to eight blocks per sequence and head shares the visible keys of the caches
 * evenly; a block walks its own in tiles, left to right.  In a tile the bias of a key is the sum of
 * the gates behind it in the tile, so nothing is summed over the whole cache: the tile's whole sum
 * moves the maximum of what came before (`shift`), a block's that of the blocks to the left.  D / 8
 * threads share a key; each group of them has a running maximum and sums of its own, which are put
 * together at the end, in the block and then by the first block through the cluster's shared
 * memory. The new key is made by the last block, which adds it in the end: no block reads what is
 * written. Everything is in units of log2.  Gates as in attention.cuh: clamped at -100 nats, and
 * one that is no number makes NaN of a query that sees beyond it. In a chain (chain.cuh) caches are
 * read before the wait. Bytes: the visible rows of k, v and log_f once. */
#include "attention.cuh"
#include "chain.cuh"
#include "elementwise.cuh"

/* H100 SXM, 2026-11: threads of a block, keys of a tile, keys of a group of threads that are
 * on their way at once. */
enum { THREADS = 256, WARPS = THREADS / 32, TILE = 1024, DEEP = 4 };

struct problem {
    fg_source q, x[2], a[2], f, g;               /* x, a: k, v and their gates */
    fg_in fb, wq, wk, wo;
    fg_out cache[2], f_cache, kept[2];           /* where k, v and log_f go */
    const bf16 *k, *v;                           /* [B,C,H,D] */
    const float *log_f;                          /* [B,C,H] */
    const int32_t *first, *past;
    fg_out y;
    int B, C, H, window;                         /* window: 1 .. C */
    int q_step, k_step, o_step;                  /* gains of head h begin at h * step */
    float scale, q_eps, k_eps, eps;              /* scale: in units of log2 */
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

/* The C blocks of a cluster, put together by the first: o, its norm and its gate. */
template <int D, int C>
static __device__ void finish(const problem &p, const shared_part<D> *part, int64_t head, bool sees,
                              float gain, float gate)
{
    __shared__ float squares[D / 32];
    const int d = threadIdx.x;
    float o = 0;
    if (d < D && sees) {
        sums<1> a = { -INFINITY, 0, { 0 } };
        double behind = 0;
        int bad = 0;
#pragma unroll
        for (int r = C - 1; r >= 0; r--) {
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
    p.y.put(head * D + d, o * rsqrtf(sum / D + p.eps) * gain / (1 + expf(-gate)));
}

enum place { PAD, START, INSIDE };

/* The thread's channels of k (i = 0) or v (1), shifted; what is before START counts as 0.  *now: as
 * they came. */
static __device__ __forceinline__ fg_vec8 shifted(const problem &p, int i, place is, int64_t head,
                                                  int64_t at, fg_vec8 *now)
{
    const float a = 1 / (1 + expf(-p.a[i].x[p.a[i].place.at(head)]));
    const fg_vec8 before = fg_load8({ p.kept[i].p, p.kept[i].narrow }, at);
    fg_vec8 y;
    *now = fg_load8(p.x[i].x, p.x[i].place.at(at));
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float keep = is == PAD ? 0 : (1 - a) * (*now)[j];
        y[j] = is == INSIDE ? fmaf(a, before[j], keep) : keep;
    }
    return y;
}

static __device__ __forceinline__ fg_vec8 rounded(fg_vec8 x)
{
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = __bfloat162float(__float2bfloat16_rn(x[j]));
    return x;
}

/* The new token's row of the caches and what is kept of it, by the first warp; its first group of
 * threads adds it to a. */
template <int D>
static __device__ void add_new(const problem &p, int64_t head, int past, int pad, float log_f,
                               const float (&q)[8], sums<8> &a)
{
    enum { SHARE = D / 8 };
    const int64_t b = head / p.H, h = head % p.H;
    const int lane = threadIdx.x, c = lane % SHARE * 8;
    const place is = pad > past ? PAD : pad == past ? START : INSIDE;
    fg_vec8 now[2], k = shifted(p, 0, is, head, head * D + c, &now[0]);
    const fg_vec8 v = rounded(shifted(p, 1, is, head, head * D + c, &now[1]));
    const fg_vec8 w = fg_load8(p.wk, h * p.k_step + c);
    float squares = 0, s = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) squares = fmaf(k[j], k[j], squares);
    const float rstd = rsqrtf(fg_warp_sum<SHARE>(squares) / D + p.k_eps);
#pragma unroll
    for (int j = 0; j < 8; j++) k[j] *= rstd * w[j];
    k = rounded(k);
#pragma unroll
    for (int j = 0; j < 8; j++) s = fmaf(q[j], k[j], s);
    s = fg_warp_sum<SHARE>(s);                   /* all have read what is kept */
    if (lane >= SHARE) return;
    fg_store8(p.kept[0], head * D + c, now[0]);
    fg_store8(p.kept[1], head * D + c, now[1]);
    if (past < 0 || past >= p.C) return;         /* does not fit: dropped */
    const int64_t row = (b * p.C + past) * p.H + h;
    fg_store8(p.cache[0], row * D + c, k);
    fg_store8(p.cache[1], row * D + c, v);
    if (lane == 0) p.f_cache.put(row, log_f);
    if (is == PAD) return;
    sums<8> one = { s, 1, { 0 } };
#pragma unroll
    for (int j = 0; j < 8; j++) one.v[j] = v[j];
    add(a, one);
}

template <int D, int C>
static __global__ void __launch_bounds__(THREADS, 2) decode(const __grid_constant__ problem p)
{
    __shared__ float ell[TILE];
    __shared__ shared_part<D> part;
    const int rank = (int)blockIdx.x % C;
    const int64_t head = blockIdx.x / C, b = head / p.H;
    const int h = (int)(head % p.H);
    fg_chain_next();
    if (!p.early) fg_chain_wait();
    const int past = *p.past, pad = p.first ? max(0, p.first[b]) : 0;
    const int low = max(pad, past - p.window + 1);
    const bool sees = pad <= past && past < p.C;
    const int n = sees ? past - low : 0, each = (n + C * 32 - 1) / (C * 32) * 32;
    const int from = low + rank * each, to = min(from + each, low + n);
    work<D> w = { p, (b * p.C * p.H + h) * D, to };
    w.first = threadIdx.x / 32 * w.WARP + threadIdx.x % 32 / w.SHARE;
    w.c = threadIdx.x % w.SHARE * 8;
    w.load(w.k, p.k, from);
    w.load(w.v, p.v, from);
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
            if (p.early) fg_chain_wait();
            load_query<D>(p, head, h, q);
        }
        w.step(base, ell + at, q, a);
    }
    if (from >= to) {
        if (p.early) fg_chain_wait();
        load_query<D>(p, head, h, q);
    }
    if (rank == C - 1) {
        const float f = p.f.x[p.f.place.at(head)] + p.fb[h];
        const float log_f = fminf(f, 0) - log1pf(expf(-fabsf(f)));
        const double shift = (double)fg_gate_clamp(log_f) * FG_LOG2_E;
        bad |= low < past && fg_gate_is_bad(log_f);
        gates += shift;
        a.max += (float)shift;
        if (threadIdx.x < 32) add_new<D>(p, head, past, pad, log_f, q, a);
    }
    float gain = 0, gate = 0;
    if (rank == 0 && threadIdx.x < D) {
        gain = p.wo[(int64_t)h * p.o_step + threadIdx.x];
        gate = p.g.x[p.g.place.at(head * D + threadIdx.x)];
    }
    join_block<D>(a, &part);
    if (threadIdx.x == 0) part.gates = gates, part.bad = bad;
    meet();
    if (rank == 0) finish<D, C>(p, &part, head, sees, gain, gate);
    meet();                                      /* until then the others' memory must stay */
}

template <int D> static void start(const problem &p, cudaStream_t stream)
{
    const int64_t heads = (int64_t)p.B * p.H, room = 2 * fg_processors();
    const unsigned n = (unsigned)heads;
    if (heads * 8 <= room) fg_chain_launch(decode<D, 8>, n * 8, THREADS, 0, 8, stream, p);
    else if (heads * 4 <= room) fg_chain_launch(decode<D, 4>, n * 4, THREADS, 0, 4, stream, p);
    else if (heads * 2 <= room) fg_chain_launch(decode<D, 2>, n * 2, THREADS, 0, 2, stream, p);
    else fg_chain_launch(decode<D, 1>, n, THREADS, 0, 1, stream, p);
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    enum { K_CACHE, V_CACHE, F_CACHE, K_LAST, V_LAST, Q, K, V, KA, VA, F, G, FB, WQ, WK, WO, FIRST,
           PAST };
    const struct fg_attr_forget_decode *at = (const struct fg_attr_forget_decode *)e->attr;
    const int64_t *k = e->in_shape[K_CACHE].dim;
    problem p = {};
    p.q = fg_source_of(e, Q), p.f = fg_source_of(e, F), p.g = fg_source_of(e, G);
    p.fb = fg_input_of(e, FB), p.wq = fg_input_of(e, WQ);
    p.wk = fg_input_of(e, WK), p.wo = fg_input_of(e, WO);
    for (int i = 0; i < 2; i++) {
        p.x[i] = fg_source_of(e, K + i), p.a[i] = fg_source_of(e, KA + i);
        p.cache[i] = fg_output_of(e, K_CACHE + i), p.kept[i] = fg_output_of(e, K_LAST + i);
    }
    p.f_cache = fg_output_of(e, F_CACHE);
    p.k = (const bf16 *)e->in[K_CACHE], p.v = (const bf16 *)e->in[V_CACHE];
    p.log_f = (const float *)e->in[F_CACHE];
    p.first = (const int32_t *)e->in[FIRST], p.past = (const int32_t *)e->in[PAST];
    p.y = fg_output_of(e, 5);
    p.B = (int)k[0], p.C = (int)k[1], p.H = (int)k[2];
    p.window = at->window && at->window < k[1] ? (int)at->window : p.C;
    p.q_step = e->in_shape[WQ].dim[0] == k[3] ? 0 : (int)k[3];
    p.k_step = e->in_shape[WK].dim[0] == k[3] ? 0 : (int)k[3];
    p.o_step = e->in_shape[WO].dim[0] == k[3] ? 0 : (int)k[3];
    p.scale = (float)(at->scale * FG_LOG2_E);
    p.q_eps = (float)at->q_eps, p.k_eps = (float)at->k_eps, p.eps = (float)at->eps;
    p.early = at->early;
    if (k[3] == 64) start<64>(p, stream);
    else start<128>(p, stream);
}

static const char *unfit(const fg_infer *c)
{
    const int64_t *k = c->in[0].dim;
    if (c->in_type[0] != FG_BF16) return "the caches are not bf16";
    if (k[3] != 64 && k[3] != 128) return "heads of another width than 64 and 128";
    if (k[1] > 1 << 30 || k[0] * k[2] > 1 << 20) return "too many keys or heads";
    return fg_capability() < 90 ? "the GPU has no clusters" : nullptr;
}

FG_KERNEL(forget_decode) = { .launch = launch, .unfit = unfit,
                             .pitched_in = 0xfe0 };             /* q k v ka va f g */
