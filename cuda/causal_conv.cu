/* causal_conv.cu - the short causal convolution and its gradient: ops/causal_conv.c on a GPU.
 *
 *     u_(t,c) = bias_c + sum_(k<W) w_(c,W-1-k) x_(t-k,c),   y = u or silu(u)
 *     gx_s = sum_k w_(W-1-k) gu_(s+k),  gw_(W-1-k) = sum_t gu_t x_(t-k),  gbias = sum_t gu_t
 *
 * A thread has V channels of a strip of rows; a block has 32 threads of channels and GROUP strips.
 * Width 4 goes 8 or 16 bytes at a time and walks LONG rows, the next STAGE of them on their way;
 * others go a channel at a time, STRIP rows loaded at once.
 * Bytes: x, gy and y, gx once; the rows before and behind a strip again, from cache. */
#include "kernel.cuh"

/* Chosen on an H100 80GB HBM3, 2026-11-26: 0.10 ms and 0.16 ms for [1,16384,3328] in bf16. */
#define STRIP   16                               /* rows */
#define LONG      48
#define LONG_GRAD 40
#define STAGE     8
#define GROUP   4
#define THREADS (32 * GROUP)
#define WIDEST  8

struct geometry {
    const int32_t *first, *past;
    fg_in w, bias;                               /* bias.p NULL: absent */
    const void *prev;                            /* of x's dtype; NULL: absent */
    int64_t B, T, C;
    int64_t x_row, y_row, gy_row;                /* elements between rows; y: or gx */
    int W;
    bool silu;
};

/* V channels: as they are in memory, and as float. */
template <class E, int V> struct alignas(sizeof(E) * V) some {
    uint32_t w[sizeof(E) * V / 4];
    __device__ __forceinline__ void floats(float *to) const
    {
#pragma unroll
        for (int j = 0; j < V; j++) {
            if constexpr (sizeof(E) == 4) to[j] = __uint_as_float(w[j]);
            else to[j] = __uint_as_float(j % 2 ? w[j / 2] & 0xffff0000u : w[j / 2] << 16);
        }
    }
    __device__ __forceinline__ void set(const float *from)
    {
#pragma unroll
        for (int j = 0; j < V; j++) {
            if constexpr (sizeof(E) == 4) w[j] = __float_as_uint(from[j]);
            else if (j % 2 == 0) w[j / 2] = fg_pack2(from[j], from[j + 1]);
        }
    }
};
template <> struct some<bf16, 1> {
    bf16 v;
    __device__ __forceinline__ void floats(float *to) const { to[0] = __bfloat162float(v); }
    __device__ __forceinline__ void set(const float *from) { v = __float2bfloat16_rn(from[0]); }
};
template <class E, int V>
static __device__ __forceinline__ some<E, V> load(const void *p, int64_t i, bool real)
{
    const float none[V] = { 0 };
    some<E, V> r;
    r.set(none);
    if (real) r = *(const some<E, V> *)((const E *)p + i);
    return r;
}

/* The inputs before its own that a row sees, at most W - 1; -1: a padding row. */
static __device__ __forceinline__ int reach(const geometry &k, int64_t past, int64_t b, int64_t t)
{
    const int64_t start = k.first ? k.first[b * k.T + t] : 0, p = past + t;
    const int64_t low = start > 0 ? start : 0, stored = t + (k.prev ? k.W - 1 : 0);
    return low > p ? -1 : (int)min(min(p - low, stored), (int64_t)k.W - 1);
}

/* A thread's sequence, first row and first channel. */
struct spot { int64_t b, t, c; };
template <int V, int ROWS> static __device__ __forceinline__ spot own()
{
    return { blockIdx.z, ((int64_t)blockIdx.y * GROUP + threadIdx.x / 32) * ROWS,
             ((int64_t)blockIdx.x * 32 + threadIdx.x % 32) * V };
}
static dim3 blocks_of(const geometry &k, int V, int rows)
{
    return dim3(fg_blocks(k.C, 32 * V), fg_blocks(k.T, rows * GROUP), (unsigned)k.B);
}

/* Row t of x, or of prev where t < 0; 0 where neither is. */
template <class E, int V>
static __device__ __forceinline__ some<E, V> input(const geometry &k, const E *x, const spot &at,
                                                   int64_t t)
{
    if (t >= 0) return load<E, V>(x, (at.b * k.T + t) * k.x_row + at.c, t < k.T);
    const int64_t row = at.b * (k.W - 1) + k.W - 1 + t;
    return load<E, V>(k.prev, row * k.C + at.c, k.prev && t > -k.W);
}

/* w[k] weighs the input k rows ago. */
template <int V, int W>
static __device__ __forceinline__ void weights(const geometry &k, int64_t c, float (*w)[V],
                                               float *bias)
{
#pragma unroll
    for (int j = 0; j < V; j++) {
        bias[j] = k.bias.p ? k.bias[c + j] : 0.0f;
#pragma unroll
        for (int i = 0; i < W; i++) w[i][j] = i < k.W ? k.w[(c + j) * k.W + k.W - 1 - i] : 0.0f;
    }
}

/* x[i]: the input i rows ago; from the oldest that is seen to the newest. */
template <int V, int W, bool CUT>
static __device__ __forceinline__ void mix(const float (*w)[V], const float *bias,
                                           const float (*x)[V], int seen, float *u)
{
#pragma unroll
    for (int j = 0; j < V; j++) u[j] = bias[j];
#pragma unroll
    for (int i = W - 1; i >= 0; i--)
#pragma unroll
        for (int j = 0; j < V; j++)
            u[j] = !CUT || i <= seen ? fmaf(w[i][j], x[i][j], u[j]) : u[j];
}
/* Makes room for the next row. */
template <int V, int W> static __device__ __forceinline__ void shift(float (*x)[V])
{
#pragma unroll
    for (int r = W - 1; r > 0; r--)
#pragma unroll
        for (int j = 0; j < V; j++) x[r][j] = x[r - 1][j];
}

/* 1 / (1 + e^-u) */
static __device__ __forceinline__ float sigmoid(float u) { return __fdividef(1, 1 + __expf(-u)); }

template <int V> static __device__ __forceinline__ void activate(float *v, bool silu)
{
#pragma unroll
    for (int j = 0; j < V; j++) v[j] = silu ? v[j] * sigmoid(v[j]) : v[j];
}

/* Any width. */
template <class E, int W>
static __global__ void __launch_bounds__(THREADS, 3) convolve(geometry k, const E *x, E *y)
{
    const spot at = own<1, STRIP>();
    if (at.c >= k.C || at.t >= k.T) return;
    some<E, 1> raw[W - 1 + STRIP];
    float w[W][1], bias[1], in[W][1];
    const int64_t past = k.past ? *k.past : 0;
#pragma unroll
    for (int r = 0; r < W - 1 + STRIP; r++) raw[r] = input<E, 1>(k, x, at, at.t + r - (W - 1));
    weights<1, W>(k, at.c, w, bias);
#pragma unroll
    for (int r = 0; r < W - 1 + STRIP; r++) {
        const int64_t t = at.t + r - (W - 1);
        shift<1, W>(in);
        raw[r].floats(in[0]);
        if (r < W - 1 || t >= k.T) continue;
        const int seen = reach(k, past, at.b, t);
        float v[1];
        mix<1, W, true>(w, bias, in, seen, v);
        activate<1>(v, k.silu);
        if (seen < 0) v[0] = 0;
        some<E, 1> out;
        out.set(v);
        *(some<E, 1> *)(y + (at.b * k.T + t) * k.y_row + at.c) = out;
    }
}

/* x[r % 4] becomes row r; mixes it with the three before. */
template <int V, bool CUT>
static __device__ __forceinline__ void mix4(const float (*w)[V], const float *bias,
                                            const float (*x)[V], int r, int seen, float *u)
{
#pragma unroll
    for (int j = 0; j < V; j++) u[j] = bias[j];
#pragma unroll
    for (int i = 3; i >= 0; i--)
#pragma unroll
        for (int j = 0; j < V; j++)
            u[j] = !CUT || i <= seen ? fmaf(w[i][j], x[(r - i) & 3][j], u[j]) : u[j];
}

/* STAGE rows, of which `n` are there. */
template <class E, int V>
static __device__ __forceinline__ void stage_load(some<E, V> *to, const E *x, int64_t row, int n)
{
#pragma unroll
    for (int r = 0; r < STAGE; r++) to[r] = load<E, V>(x, r * row, r < n);
}

/* Width 4.  CUT: rows may see less than 4 inputs, as documents and caches have it. */
template <class E, int V, bool CUT>
static __global__ void __launch_bounds__(THREADS, 3) walk(geometry k, const E *x, E *y)
{
    const spot at = own<V, LONG>();
    if (at.c >= k.C || at.t >= k.T) return;
    some<E, V> now[STAGE], next[STAGE];
    float w[4][V], bias[V], in[4][V];
    const int64_t past = CUT && k.past ? *k.past : 0;
    const int rows = (int)min((int64_t)LONG, k.T - at.t);
    const E *from = x + (at.b * k.T + at.t) * k.x_row + at.c;
    E *to = y + (at.b * k.T + at.t) * k.y_row + at.c;
    stage_load<E, V>(next, from, k.x_row, rows);
#pragma unroll
    for (int r = 1; r < 4; r++) input<E, V>(k, x, at, at.t + r - 4).floats(in[r]);
    weights<V, 4>(k, at.c, w, bias);
    for (int i = 0; i < rows; i += STAGE) {
#pragma unroll
        for (int r = 0; r < STAGE; r++) now[r] = next[r];
        from += STAGE * k.x_row;
        stage_load<E, V>(next, from, k.x_row, rows - i - STAGE);
#pragma unroll
        for (int r = 0; r < STAGE; r++) {
            if (i + r >= rows) break;
            const int seen = CUT ? reach(k, past, at.b, at.t + i + r) : 3;
            float v[V];
            now[r].floats(in[r & 3]);
            mix4<V, CUT>(w, bias, in, r, seen, v);
            activate<V>(v, k.silu);
#pragma unroll
            for (int j = 0; j < V; j++) v[j] = seen < 0 ? 0 : v[j];
            some<E, V> out;
            out.set(v);
            *(some<E, V> *)(to + r * k.y_row) = out;
        }
        to += STAGE * k.y_row;
    }
}

static geometry geometry_of(const fg_exec *e, int at, bool silu)
{
    const fg_shape *x = &e->in_shape[at];
    geometry k = {};
    k.B = x->dim[0], k.T = x->dim[1], k.C = x->dim[2];
    k.W = (int)fg_last_of(&e->in_shape[at + 1]);
    k.w = fg_input_of(e, at + 1);
    k.bias = fg_input_of(e, at + 2);
    k.first = (const int32_t *)e->in[at + 3];
    k.silu = silu;
    k.x_row = fg_pitch_of(&e->in_rows[at], k.C);
    k.y_row = fg_pitch_of(&e->out_rows[0], k.C);
    return k;
}

/* Rows can be read V channels at a time. */
static bool in_runs(const geometry &k, int V)
{
    return k.W == 4 && k.C % V == 0 && k.x_row % V == 0 && k.y_row % V == 0 && k.gy_row % V == 0;
}

template <class E, int V>
static void convolve_launch(const fg_exec *e, const geometry &k, cudaStream_t stream)
{
    const bool cut = k.first || k.past;
    const E *x = (const E *)e->in[0];
    E *y = (E *)e->out[0];
    if (!in_runs(k, V))
        convolve<E, WIDEST><<<blocks_of(k, 1, STRIP), THREADS, 0, stream>>>(k, x, y);
    else if (cut) walk<E, V, true><<<blocks_of(k, V, LONG), THREADS, 0, stream>>>(k, x, y);
    else walk<E, V, false><<<blocks_of(k, V, LONG), THREADS, 0, stream>>>(k, x, y);
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_causal_conv *a = (const struct fg_attr_causal_conv *)e->attr;
    geometry k = geometry_of(e, 0, a->silu);
    k.past = (const int32_t *)e->in[4];
    k.prev = e->in[5];
    if (e->in_type[0] == FG_BF16) convolve_launch<bf16, 8>(e, k, stream);
    else convolve_launch<float, 4>(e, k, stream);
}

static const char *unfit(const fg_infer *c)
{
    const bool same = !c->given[5] || c->in_type[5] == c->in_type[0];
    return same && c->out_type[0] == c->in_type[0] ? NULL : "x, y and prev must be of one dtype";
}
FG_KERNEL(causal_conv) = { .launch = launch, .unfit = unfit, .pitched_in = 1, .pitched_out = 1 };

/* ---- causal_conv_grad ----------------------------------------------------------------------- */

/* gw and gb of a thread's strip become a row of sums for the block:
 * sums: [B * blocks of strips][W + 1][C], row i for w_(W-1-i), row W for the bias. */
template <int V, int W>
static __device__ __forceinline__ void leave(const geometry &k, const float (*gw)[V],
                                             const float *gb, float *sums)
{
    __shared__ float part[GROUP][(W + 1) * V][32];
    const int lane = threadIdx.x % 32, strip = threadIdx.x / 32;
#pragma unroll
    for (int j = 0; j < V; j++) {
#pragma unroll
        for (int i = 0; i < W; i++) part[strip][i * V + j][lane] = gw[i][j];
        part[strip][W * V + j][lane] = gb[j];
    }
    __syncthreads();
    float *to = sums + ((int64_t)blockIdx.z * gridDim.y + blockIdx.y) * (k.W + 1) * k.C;
    const int64_t c0 = (int64_t)blockIdx.x * 32 * V;
    for (int i = threadIdx.x; i < (W + 1) * V * 32; i += THREADS) {
        const int row = i / (32 * V), c = i % (32 * V);
        float sum = 0;
#pragma unroll
        for (int n = 0; n < GROUP; n++) sum += part[n][row * V + c % V][c / V];
        const int to_row = row == W ? k.W : row;
        if (c0 + c < k.C && (row == W || row < k.W)) to[to_row * k.C + c0 + c] = sum;
    }
}

/* gy becomes gu: u is what the row came to, seen the inputs that it saw. */
template <int V>
static __device__ __forceinline__ void back(float *gy, const float *u, int seen, bool silu)
{
#pragma unroll
    for (int j = 0; j < V; j++) {
        const float e = sigmoid(u[j]), slope = silu ? e * (1 + u[j] * (1 - e)) : 1.0f;
        gy[j] = seen < 0 ? 0.0f : gy[j] * slope;
    }
}

/* Any width. */
template <class E, class F, int W>
static __global__ void __launch_bounds__(THREADS, 3)
convolve_grad(geometry k, const F *gy, const E *x, E *gx, float *sums)
{
    const spot at = own<1, STRIP>();
    const int64_t end = min(at.t + STRIP, k.T), token = at.b * k.T;
    const bool there = at.c < k.C && at.t < k.T;
    some<E, 1> raw_x[STRIP + 2 * (W - 1)];
    some<F, 1> raw_gy[STRIP + W - 1];
    float w[W][1] = {}, bias[1] = {}, in[W][1] = {}, gu[W][1] = {}, gw[W][1] = {}, gb[1] = {};
    int saw[W];
#pragma unroll
    for (int r = 0; r < STRIP + 2 * (W - 1); r++)
        if (there) raw_x[r] = input<E, 1>(k, x, at, at.t + r - (W - 1));
#pragma unroll
    for (int r = 0; r < STRIP + W - 1; r++)
        if (there) raw_gy[r] = load<F, 1>(gy, (token + at.t + r) * k.gy_row + at.c,
                                          at.t + r < k.T);
    if (there) weights<1, W>(k, at.c, w, bias);
#pragma unroll
    for (int r = 0; r < W; r++) saw[r] = -1;
#pragma unroll
    for (int r = 0; r < STRIP + 2 * (W - 1); r++) {
        const int64_t t = at.t + r - (W - 1), s = t - (W - 1);
        if (!there) continue;
        shift<1, W>(in);
        raw_x[r].floats(in[0]);
        if (r < W - 1) continue;
        shift<1, W>(gu);
        raw_gy[r - (W - 1)].floats(gu[0]);
#pragma unroll
        for (int i = W - 1; i > 0; i--) saw[i] = saw[i - 1];
        saw[0] = t < k.T ? reach(k, 0, at.b, t) : -1;
        const bool own = r < W - 1 + STRIP && t < k.T;
        float v[1];
        mix<1, W, true>(w, bias, in, saw[0], v);
        back<1>(gu[0], v, saw[0], k.silu);
        if (own) gb[0] += gu[0][0];
#pragma unroll
        for (int i = 0; i < W; i++)
            if (own && i <= saw[0]) gw[i][0] = fmaf(gu[0][0], in[i][0], gw[i][0]);
        if (r < 2 * (W - 1) || s >= end) continue;           /* all that see row s are known */
        v[0] = 0;
#pragma unroll
        for (int i = 0; i < W; i++)                          /* row s + i is W - 1 - i rows ago */
            if (saw[W - 1 - i] >= i) v[0] = fmaf(w[i][0], gu[W - 1 - i][0], v[0]);
        some<E, 1> out;
        out.set(v);
        *(some<E, 1> *)(gx + (token + s) * k.y_row + at.c) = out;
    }
    leave<1, W>(k, gw, gb, sums);
}

/* Width 4: what a thread holds of the last four rows, row t in place t % 4 of the strip, and its
 * sums. */
template <int V> struct window {
    float w[4][V], bias[V], in[4][V], gu[4][V], gw[4][V], gb[V];
    int saw[4];
};

/* Row t, the r-th of a stage; own: it is of the strip, not one behind it that sees the strip. */
template <class E, class F, int V, bool CUT>
static __device__ __forceinline__ void row_back(const geometry &k, window<V> &m, int r, int64_t b,
                                                int64_t t, bool own, const some<E, V> &x,
                                                const some<F, V> &gy)
{
    const int seen = CUT ? reach(k, 0, b, t) : 3;
    float v[V], *gu = m.gu[r & 3];
    if (CUT) m.saw[r & 3] = seen;
    x.floats(m.in[r & 3]);
    gy.floats(gu);
    mix4<V, CUT>(m.w, m.bias, m.in, r, seen, v);
    back<V>(gu, v, seen, k.silu);
    if (!own) return;
#pragma unroll
    for (int j = 0; j < V; j++) {
        m.gb[j] += gu[j];
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (!CUT || i <= seen) m.gw[i][j] = fmaf(gu[j], m.in[(r - i) & 3][j], m.gw[i][j]);
    }
}

/* gx of the row three before the r-th of a stage. */
template <class E, int V, bool CUT>
static __device__ __forceinline__ some<E, V> input_back(const window<V> &m, int r)
{
    some<E, V> out;
    float v[V] = {};
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < V; j++)
            if (!CUT || m.saw[(r - 3 + i) & 3] >= i)
                v[j] = fmaf(m.w[i][j], m.gu[(r - 3 + i) & 3][j], v[j]);
    out.set(v);
    return out;
}

template <class E, class F, int V, bool CUT>
static __global__ void __launch_bounds__(THREADS, CUT && V > 2 ? 2 : 3)
walk_grad(geometry k, const F *gy, const E *x, E *gx, float *sums)
{
    const spot at = own<V, LONG_GRAD>();
    window<V> m = {};
    if (at.c < k.C && at.t < k.T) {
        const int own = (int)min((int64_t)LONG_GRAD, k.T - at.t);
        const int all = (int)min((int64_t)own + 3, k.T - at.t);
        some<E, V> x_now[STAGE], x_next[STAGE];
        some<F, V> gy_now[STAGE], gy_next[STAGE];
        const E *x_from = x + (at.b * k.T + at.t) * k.x_row + at.c;
        const F *gy_from = gy + (at.b * k.T + at.t) * k.gy_row + at.c;
        E *to = gx + (at.b * k.T + at.t - 3) * k.y_row + at.c;
        stage_load<E, V>(x_next, x_from, k.x_row, all);
        stage_load<F, V>(gy_next, gy_from, k.gy_row, all);
#pragma unroll
        for (int r = 1; r < 4; r++) input<E, V>(k, x, at, at.t + r - 4).floats(m.in[r]);
        weights<V, 4>(k, at.c, m.w, m.bias);
        for (int i = 0; i < own + 3; i += STAGE) {
#pragma unroll
            for (int r = 0; r < STAGE; r++) x_now[r] = x_next[r], gy_now[r] = gy_next[r];
            x_from += STAGE * k.x_row, gy_from += STAGE * k.gy_row;
            stage_load<E, V>(x_next, x_from, k.x_row, all - i - STAGE);
            stage_load<F, V>(gy_next, gy_from, k.gy_row, all - i - STAGE);
#pragma unroll
            for (int r = 0; r < STAGE; r++) {
                if (i + r >= own + 3) break;
                if (i + r < all)
                    row_back<E, F, V, CUT>(k, m, r, at.b, at.t + i + r, i + r < own, x_now[r],
                                           gy_now[r]);
                else
#pragma unroll
                    for (int j = 0; j < V; j++) m.gu[r & 3][j] = 0;
                if (i + r >= 3)
                    *(some<E, V> *)(to + r * k.y_row) = input_back<E, V, CUT>(m, r);
            }
            to += STAGE * k.y_row;
        }
    }
    leave<V, 4>(k, m.gw, m.gb, sums);
}

#define ADDERS 8

/* gw and gbias: 32 columns a block, ADDERS runs of rows of sums each, added in order. */
static __global__ void __launch_bounds__(32 * ADDERS)
add_sums(const float *sums, int64_t rows, int64_t C, int W, fg_out gw, fg_out gb)
{
    __shared__ float part[ADDERS][32];
    const int lane = threadIdx.x % 32, run = threadIdx.x / 32;
    const int64_t n = (W + 1) * C, i = (int64_t)blockIdx.x * 32 + lane;
    const int64_t each = (rows + ADDERS - 1) / ADDERS, to = min(rows, (run + 1) * each);
    float sum = 0;
    if (i < n) for (int64_t r = run * each; r < to; r++) sum += sums[r * n + i];
    part[run][lane] = sum;
    __syncthreads();
    if (run || i >= n) return;
    sum = 0;
#pragma unroll
    for (int r = 0; r < ADDERS; r++) sum += part[r][lane];
    const int64_t row = i / C, c = i - row * C;
    if (row < W) gw.put(c * W + W - 1 - row, sum);
    else gb.put(c, sum);
}

template <class E, class F>
static void grad_launch_of(const fg_exec *e, const geometry &k, cudaStream_t stream)
{
    constexpr int V = sizeof(E) + sizeof(F) > 4 ? 2 : 4;
    const F *gy = (const F *)e->in[0];
    const E *x = (const E *)e->in[1];
    E *gx = (E *)e->out[0];
    float *s = (float *)e->scratch;
    const dim3 runs = blocks_of(k, V, LONG_GRAD), ones = blocks_of(k, 1, STRIP);
    const bool walks = in_runs(k, V);
    if (!walks) convolve_grad<E, F, WIDEST><<<ones, THREADS, 0, stream>>>(k, gy, x, gx, s);
    else if (k.first) walk_grad<E, F, V, true><<<runs, THREADS, 0, stream>>>(k, gy, x, gx, s);
    else walk_grad<E, F, V, false><<<runs, THREADS, 0, stream>>>(k, gy, x, gx, s);
    const int64_t n = (k.W + 1) * k.C;
    add_sums<<<fg_blocks(n, 32), 32 * ADDERS, 0, stream>>>(
        s, k.B * (walks ? runs : ones).y, k.C, k.W, fg_output_of(e, 1), fg_output_of(e, 2));
}

static void grad_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_causal_conv_grad *a = (const struct fg_attr_causal_conv_grad *)e->attr;
    const bool x = e->in_type[1] == FG_BF16, gy = e->in_type[0] == FG_BF16;
    geometry k = geometry_of(e, 1, a->silu);
    k.gy_row = fg_pitch_of(&e->in_rows[0], k.C);
    if (x && gy) grad_launch_of<bf16, bf16>(e, k, stream);
    else if (x) grad_launch_of<bf16, float>(e, k, stream);
    else if (gy) grad_launch_of<float, bf16>(e, k, stream);
    else grad_launch_of<float, float>(e, k, stream);
}

static size_t grad_scratch(const fg_infer *c)
{
    const fg_shape *x = &c->in[1];
    const int64_t rows = x->dim[0] * fg_blocks(x->dim[1], STRIP * GROUP);
    return (size_t)(rows * (fg_last_of(&c->in[2]) + 1) * x->dim[2]) * sizeof(float);
}

static const char *grad_unfit(const fg_infer *c)
{
    return c->out_type[0] == c->in_type[1] ? NULL : "gx must be of x's dtype";
}
FG_KERNEL(causal_conv_grad) = { .launch = grad_launch, .unfit = grad_unfit,
                                .scratch = grad_scratch, .pitched_in = 3, .pitched_out = 1 };
