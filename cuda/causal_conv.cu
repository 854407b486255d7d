/* causal_conv.cu - the short causal convolution and its gradient: ops/causal_conv.c on a GPU.
 *
 *     u_(t,c) = bias_c + sum_(k<W) w_(c,W-1-k) x_(t-k,c),   y = u or silu(u)
 *     gx_s = sum_k w_(W-1-k) gu_(s+k),  gw_(W-1-k) = sum_t gu_t x_(t-k),  gbias = sum_t gu_t
 *
 * A thread has V channels of a strip of rows; a block has 32 threads of channels and GROUP strips.
 * Width 4 goes 4 to 16 bytes at a time and walks its strip with AHEAD rows on their way: a row that
 * is used makes room for the next.  Others go a channel at a time, STRIP rows loaded at once.
 * Bytes: x, gy and y, gx once; the rows before a strip again, from cache. */
#include "kernel.cuh"

#define STRIP   16                               /* rows */
#define AHEAD   8
#define GROUP   4
#define THREADS (32 * GROUP)
#define WIDEST  8
/* Rows of a strip forward, and blocks of a processor; the gradient's where rows see all their
 * inputs, or perhaps less.  Chosen on an H100 80GB HBM3, 2026-11-26: 0.083 ms and 0.137 ms for
 * [1,16384,3328] in bf16. */
#define WALK 16
template <class E> constexpr int walk_blocks = sizeof(E) == 2 ? 5 : 4;
constexpr int grad_blocks(bool cut) { return 3 - cut; }

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
template <int V> static __device__ __forceinline__ spot own(int rows)
{
    return { blockIdx.z, ((int64_t)blockIdx.y * GROUP + threadIdx.x / 32) * rows,
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

/* 1 / (1 + e^-u); what is below 2^-126 counts as 0, which saves the scaling around both. */
static __device__ __forceinline__ float sigmoid(float u)
{
    float e, s;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-1.4426950408889634f * u));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1 + e));
    return s;
}

template <int V> static __device__ __forceinline__ void activate(float *v, bool silu)
{
#pragma unroll
    for (int j = 0; j < V; j++) v[j] = silu ? v[j] * sigmoid(v[j]) : v[j];
}

/* Any width. */
template <class E, int W>
static __global__ void __launch_bounds__(THREADS, 3) convolve(geometry k, const E *x, E *y)
{
    const spot at = own<1>(STRIP);
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

/* ---- width 4 -------------------------------------------------------------------------------- */

/* Rows of a strip: such that blocks come in few and full waves of those that an H100 holds at once.
 * Set by the shape alone, on any card. */
static int strip_of(const geometry &k, int V, int blocks)
{
    enum { LEAST = 32, MOST = 160, START = 16 }; /* rows that a strip's begin takes as long as */
    int best = LEAST;
    int64_t least = INT64_MAX;
    for (int rows = LEAST; rows <= MOST; rows += AHEAD) {
        const dim3 grid = blocks_of(k, V, rows);
        const int64_t all = (int64_t)grid.x * grid.y * grid.z, held = 132 * blocks;
        const int64_t time = (all + held - 1) / held * (rows + START);
        if (time < least) least = time, best = rows;
    }
    return best;
}

/* x[r % 4] is row r; mixes it with the three before. */
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

/* What a thread holds of the last four rows, row r of the strip in place r % 4. */
template <int V> struct rows4 { float w[4][V], bias[V], in[4][V]; };

template <class E, int V, bool CUT>
static __device__ __forceinline__ some<E, V> row_forth(const geometry &k, rows4<V> &m, int r,
                                                       int seen, const some<E, V> &x)
{
    some<E, V> out;
    float v[V];
    x.floats(m.in[r & 3]);
    mix4<V, CUT>(m.w, m.bias, m.in, r, seen, v);
    activate<V>(v, k.silu);
#pragma unroll
    for (int j = 0; j < V; j++) v[j] = CUT && seen < 0 ? 0 : v[j];
    out.set(v);
    return out;
}

/* CUT: rows may see less than 4 inputs, as documents and caches have it. */
template <class E, int V, bool CUT>
static __global__ void __launch_bounds__(THREADS, walk_blocks<E>)
walk(geometry k, const E *x, E *y)
{
    const spot at = own<V>(WALK);
    if (at.c >= k.C || at.t >= k.T) return;
    const int n = (int)min((int64_t)WALK, k.T - at.t), whole = n / AHEAD * AHEAD;
    const int x_step = (int)k.x_row, y_step = (int)k.y_row;
    const int64_t past = CUT && k.past ? *k.past : 0;
    const E *from = x + (at.b * k.T + at.t) * k.x_row + at.c;
    E *to = y + (at.b * k.T + at.t) * k.y_row + at.c;
    some<E, V> raw[AHEAD];
    rows4<V> m;
#pragma unroll
    for (int r = 1; r < 4; r++) input<E, V>(k, x, at, at.t + r - 4).floats(m.in[r]);
#pragma unroll
    for (int r = 0; r < AHEAD; r++, from += x_step) raw[r] = load<E, V>(from, 0, r < n);
    weights<V, 4>(k, at.c, m.w, m.bias);
    for (int i = 0; i < whole; i += AHEAD)
#pragma unroll
        for (int r = 0; r < AHEAD; r++, from += x_step, to += y_step) {
            const int seen = CUT ? reach(k, past, at.b, at.t + i + r) : 3;
            const some<E, V> now = raw[r];
            if (i + AHEAD + r < n) raw[r] = *(const some<E, V> *)from;
            *(some<E, V> *)to = row_forth<E, V, CUT>(k, m, r, seen, now);
        }
#pragma unroll
    for (int r = 0; r < AHEAD; r++, to += y_step) {
        if (whole + r >= n) break;
        const int seen = CUT ? reach(k, past, at.b, at.t + whole + r) : 3;
        *(some<E, V> *)to = row_forth<E, V, CUT>(k, m, r, seen, raw[r]);
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

template <class E>
static void convolve_launch(const fg_exec *e, const geometry &k, cudaStream_t stream)
{
    constexpr int V = 4;
    const bool cut = k.first || k.past;
    const dim3 runs = blocks_of(k, V, WALK);
    const E *x = (const E *)e->in[0];
    E *y = (E *)e->out[0];
    if (!in_runs(k, V))
        convolve<E, WIDEST><<<blocks_of(k, 1, STRIP), THREADS, 0, stream>>>(k, x, y);
    else if (cut) walk<E, V, true><<<runs, THREADS, 0, stream>>>(k, x, y);
    else walk<E, V, false><<<runs, THREADS, 0, stream>>>(k, x, y);
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_causal_conv *a = (const struct fg_attr_causal_conv *)e->attr;
    geometry k = geometry_of(e, 0, a->silu);
    k.past = (const int32_t *)e->in[4];
    k.prev = e->in[5];
    if (e->in_type[0] == FG_BF16) convolve_launch<bf16>(e, k, stream);
    else convolve_launch<float>(e, k, stream);
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
    const spot at = own<1>(STRIP);
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

/* Width 4: of the last four rows, and a thread's sums. */
template <int V> struct window : rows4<V> {
    float gu[4][V], gw[4][V], gb[V];
    int saw[4];
};

/* Row t, the r-th of its strip; adds: it is of the strip, not one before. */
template <class E, class F, int V, bool CUT>
static __device__ __forceinline__ void row_back(const geometry &k, window<V> &m, int r, int64_t b,
                                                int64_t t, bool adds, const some<E, V> &x,
                                                const some<F, V> &gy)
{
    const int seen = !CUT ? 3 : t < 0 ? -1 : reach(k, 0, b, t);
    float v[V], *gu = m.gu[r & 3];
    if (CUT) m.saw[r & 3] = seen;
    x.floats(m.in[r & 3]);
    gy.floats(gu);
    mix4<V, CUT>(m.w, m.bias, m.in, r, seen, v);
    back<V>(gu, v, seen, k.silu);
    if (!adds) return;
#pragma unroll
    for (int j = 0; j < V; j++) {
        m.gb[j] += gu[j];
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (!CUT || i <= seen) m.gw[i][j] = fmaf(gu[j], m.in[(r - i) & 3][j], m.gw[i][j]);
    }
}

/* gx of the row three before the r-th. */
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

/* gu of the three rows before the strip. */
template <class E, class F, int V, bool CUT>
static __device__ __forceinline__ void rows_before(const geometry &k, window<V> &m, const spot &at,
                                                   const E *x, const F *gy)
{
    some<E, V> old[6];
    some<F, V> gu[3];
#pragma unroll
    for (int r = 0; r < 6; r++) old[r] = load<E, V>(x, (r - 6) * k.x_row, at.t + r >= 6);
#pragma unroll
    for (int r = 0; r < 3; r++) gu[r] = load<F, V>(gy, (r - 3) * k.gy_row, at.t + r >= 3);
    weights<V, 4>(k, at.c, m.w, m.bias);
#pragma unroll
    for (int r = 0; r < 3; r++) old[r].floats(m.in[(r - 6) & 3]);
#pragma unroll
    for (int r = -3; r < 0; r++)
        row_back<E, F, V, CUT>(k, m, r, at.b, at.t + r, false, old[r + 6], gu[r + 3]);
}

/* A strip has gu of its rows, and gx of those three rows before; the last has gx to the end. */
template <class E, class F, int V, bool CUT>
static __global__ void __launch_bounds__(THREADS, grad_blocks(CUT && V > 2))
walk_grad(geometry k, int strip, const F *gy, const E *x, E *gx, float *sums)
{
    const spot at = own<V>(strip);
    window<V> m = {};
    if (at.c < k.C && at.t < k.T) {
        const int n = (int)min((int64_t)strip, k.T - at.t), whole = n / AHEAD * AHEAD;
        const int all = at.t + n == k.T ? n + 3 : n;
        const int x_step = (int)k.x_row, gy_step = (int)k.gy_row, gx_step = (int)k.y_row;
        const E *x_from = x + (at.b * k.T + at.t) * k.x_row + at.c;
        const F *gy_from = gy + (at.b * k.T + at.t) * k.gy_row + at.c;
        E *to = gx + (at.b * k.T + at.t - 3) * k.y_row + at.c;
        some<E, V> x_raw[AHEAD];
        some<F, V> gy_raw[AHEAD];
        rows_before<E, F, V, CUT>(k, m, at, x_from, gy_from);
#pragma unroll
        for (int r = 0; r < AHEAD; r++, x_from += x_step, gy_from += gy_step) {
            x_raw[r] = load<E, V>(x_from, 0, r < n);
            gy_raw[r] = load<F, V>(gy_from, 0, r < n);
        }
        for (int i = 0; i < whole; i += AHEAD)
#pragma unroll
            for (int r = 0; r < AHEAD; r++, x_from += x_step, gy_from += gy_step, to += gx_step) {
                row_back<E, F, V, CUT>(k, m, r, at.b, at.t + i + r, true, x_raw[r], gy_raw[r]);
                if (i + AHEAD + r < n) {
                    x_raw[r] = *(const some<E, V> *)x_from;
                    gy_raw[r] = *(const some<F, V> *)gy_from;
                }
                if (r >= 3 || i > 0 || at.t > 0)
                    *(some<E, V> *)to = input_back<E, V, CUT>(m, r);
            }
#pragma unroll
        for (int r = 0; r < AHEAD + 2; r++, to += gx_step) {
            if (whole + r >= all) break;
            if (r < AHEAD && whole + r < n)
                row_back<E, F, V, CUT>(k, m, r, at.b, at.t + whole + r, true, x_raw[r % AHEAD],
                                       gy_raw[r % AHEAD]);
            else
#pragma unroll
                for (int j = 0; j < V; j++) m.gu[r & 3][j] = 0;
            if (r >= 3 || whole > 0 || at.t > 0) *(some<E, V> *)to = input_back<E, V, CUT>(m, r);
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
    const int strip = strip_of(k, V, grad_blocks(k.first && V > 2));
    const dim3 runs = blocks_of(k, V, strip), ones = blocks_of(k, 1, STRIP);
    const bool walks = in_runs(k, V);
    if (!walks) convolve_grad<E, F, WIDEST><<<ones, THREADS, 0, stream>>>(k, gy, x, gx, s);
    else if (k.first)
        walk_grad<E, F, V, true><<<runs, THREADS, 0, stream>>>(k, strip, gy, x, gx, s);
    else walk_grad<E, F, V, false><<<runs, THREADS, 0, stream>>>(k, strip, gy, x, gx, s);
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
