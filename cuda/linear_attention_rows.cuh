/* linear_attention_rows.cuh - gated linear attention and the delta rule row by row, in f32: for
 * every shape and dtype that the kernels in chunks do not take, and for decoding.
 *
 *     GLA          S = diag(e^g) S + k v^T
 *     delta rule   e = v - S^T k,  S = S + beta k e^T          o = scale S^T q
 *
 * Forward: a block has 32 columns of one head's state in shared memory, a warp every eighth row of
 * it.  The gradient (formulas: ops/gated_linear_attention.c, ops/delta_rule.c) has a block a head;
 * it keeps the state before every 64th row and makes those between again, block by block. */
#ifndef FG_LINEAR_ATTENTION_ROWS_CUH
#define FG_LINEAR_ATTENTION_ROWS_CUH
#include "linear_attention.cuh"

#define ROWS_GROUPS 8                            /* of state rows, forward */
#define ROWS_KEPT   64                           /* rows from kept state to kept state */
#define ROWS_WARPS  16                           /* of the gradient */

/* Row t: padding, and whether the state before it counts. */
struct rows_place { bool padding, inside; };
static __device__ __forceinline__ rows_place rows_place_of(const la_task &z, int64_t b, int64_t t)
{
    const int64_t past = la_past(z), ahead = la_low(z, b, t) - past - t;
    const bool padding = ahead > 0;
    if (t == 0) return { padding, !padding && la_carried(z, b) };
    return { padding, ahead < 0 && !(z.first && la_low(z, b, t - 1) > past + t - 1) };
}

struct rows_inputs { fg_in q, k, v, gate; int64_t K, V; };

template <bool DELTA>
static __global__ void __launch_bounds__(32 * ROWS_GROUPS)
rows_sweep(la_task z, rows_inputs x, fg_out o, float *to)
{
    extern __shared__ float rows_memory[];
    __shared__ float part[2][ROWS_GROUPS][32];
    float *S = rows_memory;                      /* [K][32] */
    const int lane = threadIdx.x % 32, w = threadIdx.x / 32;
    const int64_t bh = blockIdx.y, b = bh / z.H, h = bh % z.H, j = blockIdx.x * 32 + lane;
    const bool in = j < x.V;
    const bool carried = la_carried(z, b);
    for (int64_t d = w; d < x.K; d += ROWS_GROUPS)
        S[d * 32 + lane] = carried && in ? z.state[(bh * x.K + d) * x.V + j] : 0;
    for (int64_t t = 0; t < z.T; t++) {
        const rows_place p = rows_place_of(z, b, t);
        const int64_t row = (b * z.T + t) * z.H + h;
        float u = in ? x.v[row * x.V + j] : 0, sum = 0;
        if (DELTA) {
            for (int64_t d = w; d < x.K && p.inside; d += ROWS_GROUPS)
                sum = fmaf(x.k[row * x.K + d], S[d * 32 + lane], sum);
            part[0][w][lane] = sum;
            __syncthreads();
            sum = 0;
#pragma unroll
            for (int i = 0; i < ROWS_GROUPS; i++) sum += part[0][i][lane];
            u = (u - sum) * x.gate[row];
            sum = 0;
        }
        for (int64_t d = w; d < x.K; d += ROWS_GROUPS) {
            const float a = DELTA || !p.inside ? 1.0f : expf(x.gate[row * x.K + d]);
            const float before = p.inside ? a * S[d * 32 + lane] : 0;
            const float s = p.padding ? 0 : fmaf(x.k[row * x.K + d], u, before);
            S[d * 32 + lane] = s;
            sum = fmaf(x.q[row * x.K + d], s, sum);
        }
        const int buffer = DELTA ? 1 : t % 2;
        part[buffer][w][lane] = sum;
        __syncthreads();
        if (w == 0 && in) {
            sum = 0;
#pragma unroll
            for (int i = 0; i < ROWS_GROUPS; i++) sum += part[buffer][i][lane];
            o.put(row * x.V + j, p.padding ? 0 : z.scale * sum);
        }
    }
    for (int64_t d = w; d < x.K && in; d += ROWS_GROUPS)
        to[(bh * x.K + d) * x.V + j] = S[d * 32 + lane];
}

template <bool DELTA>
static void rows_forward(const fg_exec *e, const la_task &z, cudaStream_t stream)
{
    const int64_t K = e->in_shape[1].dim[3], V = e->in_shape[2].dim[3];
    const rows_inputs x = { fg_input_of(e, 0), fg_input_of(e, 1), fg_input_of(e, 2),
                            fg_input_of(e, 3), K, V };
    const int bytes = (int)(K * 32 * (int64_t)sizeof(float));
    cudaFuncSetAttribute(rows_sweep<DELTA>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    rows_sweep<DELTA><<<dim3(fg_blocks(V, 32), (unsigned)(z.B * z.H)), 32 * ROWS_GROUPS, bytes,
                        stream>>>(z, x, fg_output_of(e, 0), (float *)e->out[1]);
}

/* ---- gradient -------------------------------------------------------------------------------- */

struct rows_way_back {
    float *R;                                    /* [K,V] of every head: S at first */
    float *kept;                                 /* [blocks,K,V] */
    float *inner;                                /* [ROWS_KEPT,K,V] */
    float *e;                                    /* [ROWS_KEPT,V] */
    int64_t blocks;
};

static inline rows_way_back rows_cut(char *base, size_t *used, int64_t heads, int64_t T, int64_t K,
                                     int64_t V)
{
    const size_t state = (size_t)(heads * K * V) * sizeof(float);
    rows_way_back w;
    w.blocks = (T + ROWS_KEPT - 1) / ROWS_KEPT;
    w.R = (float *)la_cut(base, used, state);
    w.kept = (float *)la_cut(base, used, state * (size_t)w.blocks);
    w.inner = (float *)la_cut(base, used, state * ROWS_KEPT);
    w.e = (float *)la_cut(base, used, (size_t)(heads * ROWS_KEPT * V) * sizeof(float));
    return w;
}
static inline size_t rows_grad_scratch(const fg_shape *k, const fg_shape *v)
{
    size_t used = 0;
    rows_cut(nullptr, &used, k->dim[0] * k->dim[2], k->dim[1], k->dim[3], v->dim[3]);
    return used;
}

struct rows_gradients { fg_in go; const float *gstate; fg_out q, k, v, gate; float *to; };

/* to[v] of shared memory = sum over warps of part[warp][v]; all threads call it. */
static __device__ __forceinline__ void rows_join(const float *part, float *to, int64_t V)
{
    __syncthreads();
    for (int64_t j = threadIdx.x; j < V; j += 32 * ROWS_WARPS) {
        float sum = 0;
        for (int i = 0; i < ROWS_WARPS; i++) sum += part[i * V + j];
        to[j] = sum;
    }
    __syncthreads();
}

/* S from before row t to behind it; e: [V], kept if not NULL. */
template <bool DELTA>
static __device__ void rows_advance(const la_task &z, const rows_inputs &x, int64_t b, int64_t h,
                                    int64_t t, float *S, float *part, float *column, float *e)
{
    const int lane = threadIdx.x % 32, w = threadIdx.x / 32;
    const rows_place p = rows_place_of(z, b, t);
    const int64_t row = (b * z.T + t) * z.H + h;
    if (DELTA) {
        for (int64_t j = lane; j < x.V; j += 32) {
            float sum = 0;
            for (int64_t d = w; d < x.K && p.inside; d += ROWS_WARPS)
                sum = fmaf(x.k[row * x.K + d], S[d * x.V + j], sum);
            part[w * x.V + j] = sum;
        }
        rows_join(part, column, x.V);
        for (int64_t j = threadIdx.x; e && j < x.V; j += 32 * ROWS_WARPS)
            e[j] = x.v[row * x.V + j] - column[j];
    }
    for (int64_t d = w; d < x.K; d += ROWS_WARPS) {
        const float a = DELTA || !p.inside ? 1.0f : expf(x.gate[row * x.K + d]);
        const float k = p.padding ? 0 : x.k[row * x.K + d];
#pragma unroll 1
        for (int64_t j = lane; j < x.V; j += 32) {
            const float v = x.v[row * x.V + j];
            const float u = DELTA ? (v - column[j]) * x.gate[row] : v;
            const float before = p.inside ? a * S[d * x.V + j] : 0;
            S[d * x.V + j] = p.padding ? 0 : fmaf(k, u, before);
        }
    }
}

/* Gradients of row t; S before it; R from behind it to before it. */
template <bool DELTA>
static __device__ void rows_back(const la_task &z, const rows_inputs &x, const rows_gradients &y,
                                 int64_t b, int64_t h, int64_t t, const float *S, float *R,
                                 float *part, float *column, const float *e)
{
    const int lane = threadIdx.x % 32, w = threadIdx.x / 32;
    const rows_place p = rows_place_of(z, b, t);
    const int64_t row = (b * z.T + t) * z.H + h, K = x.K, V = x.V;
    const float beta = DELTA ? x.gate[row] : 0;
    for (int64_t j = lane; j < V; j += 32) part[w * V + j] = 0;
    for (int64_t d = w; d < K; d += ROWS_WARPS) {
        const float q = x.q[row * K + d], k = x.k[row * K + d];
        const float a = DELTA ? 1.0f : expf(x.gate[row * K + d]);
        float gq = 0, gk = 0, gg = 0;
#pragma unroll 1
        for (int64_t j = lane; j < V && !p.padding; j += 32) {
            const float go = y.go[row * V + j], v = x.v[row * V + j];
            const float before = p.inside ? S[d * V + j] : 0;
            const float r = fmaf(z.scale * q, go, R[d * V + j]);
            const float behind = DELTA ? fmaf(k, beta * e[j], before) : fmaf(k, v, a * before);
            gq = fmaf(behind, go, gq);
            part[w * V + j] = fmaf(r, k, part[w * V + j]);
            if (DELTA) R[d * V + j] = r;
            else {
                gk = fmaf(r, v, gk);
                gg = fmaf(r, before, gg);
                R[d * V + j] = p.inside ? a * r : 0;
            }
        }
        gq = fg_warp_sum(gq);
        gk = fg_warp_sum(gk);
        gg = fg_warp_sum(gg);
        if (lane == 0) {
            y.q.put(row * K + d, z.scale * gq);
            if (!DELTA) y.k.put(row * K + d, gk);
            if (!DELTA) y.gate.put(row * K + d, gg == 0 ? 0 : a * gg);
        }
    }
    rows_join(part, column, V);
    if (w == 0) {
        float sum = 0;
        for (int64_t j = lane; j < V; j += 32) {
            if (DELTA && !p.padding) sum = fmaf(column[j], e[j], sum);
            y.v.put(row * V + j, DELTA ? beta * column[j] : column[j]);
        }
        sum = fg_warp_sum(sum);
        if (DELTA && lane == 0) y.gate.put(row, sum);
    }
    for (int64_t d = w; DELTA && d < K; d += ROWS_WARPS) {
        const float k = x.k[row * K + d];
        float gk = 0;
#pragma unroll 1
        for (int64_t j = lane; j < V && !p.padding; j += 32) {
            const float r = R[d * V + j], gv = beta * column[j];
            gk = fmaf(r, beta * e[j], gk);
            if (p.inside) gk = fmaf(-S[d * V + j], gv, gk);
            R[d * V + j] = p.inside ? fmaf(-k, gv, r) : 0;
        }
        gk = fg_warp_sum(gk);
        if (lane == 0) y.k.put(row * K + d, gk);
    }
    for (int64_t i = threadIdx.x; p.padding && i < K * V; i += 32 * ROWS_WARPS) R[i] = 0;
    __syncthreads();
}

template <bool DELTA>
static __global__ void __launch_bounds__(32 * ROWS_WARPS)
rows_gradient(la_task z, rows_inputs x, rows_gradients y, rows_way_back w)
{
    extern __shared__ float rows_memory[];
    float *part = rows_memory, *column = part + ROWS_WARPS * x.V;
    const int64_t bh = blockIdx.x, b = bh / z.H, h = bh % z.H, size = x.K * x.V;
    const int N = 32 * ROWS_WARPS;
    float *R = w.R + bh * size, *kept = w.kept + bh * w.blocks * size;
    float *inner = w.inner + bh * ROWS_KEPT * size, *e = w.e + bh * ROWS_KEPT * x.V;
    const bool carried = la_carried(z, b);
    for (int64_t i = threadIdx.x; i < size; i += N) R[i] = carried ? z.state[bh * size + i] : 0;
    __syncthreads();
    for (int64_t t = 0; t < z.T; t++) {
        if (t % ROWS_KEPT == 0) {
            __syncthreads();
            for (int64_t i = threadIdx.x; i < size; i += N) kept[t / ROWS_KEPT * size + i] = R[i];
            __syncthreads();
        }
        rows_advance<DELTA>(z, x, b, h, t, R, part, column, nullptr);
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < size; i += N) R[i] = y.gstate ? y.gstate[bh * size + i] : 0;
    for (int64_t block = w.blocks - 1; block >= 0; block--) {
        const int64_t t0 = block * ROWS_KEPT, t1 = min(z.T, t0 + ROWS_KEPT);
        float *S = kept + block * size;          /* walks on from here */
        for (int64_t t = t0; t < t1; t++) {
            __syncthreads();
            for (int64_t i = threadIdx.x; i < size; i += N) inner[(t - t0) * size + i] = S[i];
            __syncthreads();
            rows_advance<DELTA>(z, x, b, h, t, S, part, column, e + (t - t0) * x.V);
        }
        __syncthreads();
        for (int64_t t = t1 - 1; t >= t0; t--)
            rows_back<DELTA>(z, x, y, b, h, t, inner + (t - t0) * size, R, part, column,
                             e + (t - t0) * x.V);
    }
    for (int64_t i = threadIdx.x; i < size; i += N) y.to[bh * size + i] = carried ? R[i] : 0;
}

template <bool DELTA>
static void rows_backward(const fg_exec *e, const la_task &z, cudaStream_t stream)
{
    const int64_t K = e->in_shape[3].dim[3], V = e->in_shape[4].dim[3];
    const rows_inputs x = { fg_input_of(e, 2), fg_input_of(e, 3), fg_input_of(e, 4),
                            fg_input_of(e, 5), K, V };
    const rows_gradients y = { fg_input_of(e, 0), (const float *)e->in[1], fg_output_of(e, 0),
                               fg_output_of(e, 1), fg_output_of(e, 2), fg_output_of(e, 3),
                               (float *)e->out[4] };
    size_t used = 0;
    const rows_way_back w = rows_cut((char *)e->scratch, &used, z.B * z.H, z.T, K, V);
    const int bytes = (int)((ROWS_WARPS + 1) * V * (int64_t)sizeof(float));
    cudaFuncSetAttribute(rows_gradient<DELTA>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    rows_gradient<DELTA><<<(unsigned)(z.B * z.H), 32 * ROWS_WARPS, bytes, stream>>>(z, x, y, w);
}

/* Why rows do not fit: a state's columns, or a row's sums, lie in shared memory. */
static inline const char *rows_unfit(const fg_shape *k, const fg_shape *v)
{
    return k->dim[3] > 1280 || v->dim[3] > 1280 ? "K and V must be at most 1280"
         : k->dim[0] * k->dim[2] > 65535 ? "more than 65535 heads" : nullptr;
}
#endif
