/* causal_conv.cu - the short causal convolution and its gradient: ops/causal_conv.c on a GPU.
 *
 *     u_(t,c) = bias_c + sum_(k<W) w_(c,W-1-k) x_(t-k,c),   y = u or silu(u)
 *     gx_s = sum_k w_(W-1-k) gu_(s+k),  gw_(W-1-k) = sum_t gu_t x_(t-k),  gbias = sum_t gu_t
 *
 * A thread walks STRIP rows of eight channels (width 4) or of one (any width up to 8) with the last
 * inputs in registers.  Bytes: x, gy and y, gx once; the rows before a strip again, from cache. */
#include "elementwise.cuh"

#define THREADS 128
#define STRIP   32
#define WIDEST  8

struct geometry {
    const int32_t *first, *past;
    fg_in w, bias, prev;                         /* bias.p, prev.p NULL: absent */
    int64_t B, T, C;
    fg_divisor columns, strips;                  /* threads of a row, strips of a sequence */
    int W;
    bool silu;
};

/* V channels as float. */
template <int V> struct some {
    float v[V];
    __device__ __forceinline__ void clear()
    {
#pragma unroll
        for (int j = 0; j < V; j++) v[j] = 0;
    }
    __device__ __forceinline__ void load(const fg_in &x, int64_t i)
    {
        if constexpr (V == 8) {
            const fg_vec8 f = fg_load8(x, i);
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] = f[j];
        } else {
            v[0] = x[i];
        }
    }
    __device__ __forceinline__ void store(const fg_out &y, int64_t i) const
    {
        if constexpr (V == 8) {
            fg_vec8 f;
#pragma unroll
            for (int j = 0; j < 8; j++) f[j] = v[j];
            fg_store8(y, i, f);
        } else {
            y.put(i, v[0]);
        }
    }
};

/* The inputs before its own that a row sees, at most W - 1; -1: a padding row. */
static __device__ __forceinline__ int reach(const geometry &k, int64_t past, int64_t b, int64_t t)
{
    const int64_t start = k.first ? k.first[b * k.T + t] : 0, p = past + t;
    const int64_t low = start > 0 ? start : 0, stored = t + (k.prev.p ? k.W - 1 : 0);
    return low > p ? -1 : (int)min(min(p - low, stored), (int64_t)k.W - 1);
}

struct spot { int64_t b, t, c; };
static __device__ __forceinline__ spot spot_of(const geometry &k, int64_t i, int V)
{
    const int64_t q = fg_divide(i, k.columns), b = fg_divide(q, k.strips);
    return { b, (q - b * k.strips.d) * STRIP, (i - q * k.columns.d) * V };
}

/* Row t of x, or of prev where t < 0; 0 where neither is. */
template <int V>
static __device__ __forceinline__ void fetch(const geometry &k, const fg_source &x, int64_t b,
                                             int64_t t, int64_t c, some<V> *to)
{
    to->clear();
    if (t >= k.T) return;
    if (t >= 0) to->load(x.x, x.place.at((b * k.T + t) * k.C + c));
    else if (k.prev.p && t >= 1 - k.W) to->load(k.prev, (b * (k.W - 1) + k.W - 1 + t) * k.C + c);
}

/* w[k] weighs the input k rows ago. */
template <int V, int W>
static __device__ __forceinline__ void weights(const geometry &k, int64_t c, some<V> *w,
                                               some<V> *bias)
{
    bias->clear();
    if (k.bias.p) bias->load(k.bias, c);
#pragma unroll
    for (int i = 0; i < W; i++)
#pragma unroll
        for (int j = 0; j < V; j++)
            w[i].v[j] = i < k.W ? k.w[(c + j) * k.W + k.W - 1 - i] : 0;
}

/* x[i]: the input i rows ago; from the oldest that is seen to the newest. */
template <int V, int W>
static __device__ __forceinline__ some<V> mix(const some<V> *w, const some<V> &bias,
                                              const some<V> *x, int seen)
{
    some<V> u = bias;
#pragma unroll
    for (int i = W - 1; i >= 0; i--)
#pragma unroll
        for (int j = 0; j < V; j++)
            u.v[j] = i <= seen ? fmaf(w[i].v[j], x[i].v[j], u.v[j]) : u.v[j];
    return u;
}

template <int V, int W>
static __global__ void __launch_bounds__(THREADS)
convolve(geometry k, fg_source x, fg_target y)
{
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= k.B * k.strips.d * k.columns.d) return;
    const spot at = spot_of(k, i, V);
    const int64_t past = k.past ? *k.past : 0;
    some<V> w[W], bias, in[W + 3];
    weights<V, W>(k, at.c, w, &bias);
#pragma unroll
    for (int r = 1; r < W; r++) fetch(k, x, at.b, at.t - r, at.c, &in[r - 1]);
    for (int u0 = 0; u0 < STRIP && at.t + u0 < k.T; u0 += 4) {
#pragma unroll
        for (int r = W + 2; r >= 4; r--) in[r] = in[r - 4];          /* the rows before these */
#pragma unroll
        for (int u = 0; u < 4; u++) fetch(k, x, at.b, at.t + u0 + u, at.c, &in[3 - u]);
#pragma unroll
        for (int u = 0; u < 4; u++) {
            const int64_t t = at.t + u0 + u;
            if (t >= k.T) continue;
            const int seen = reach(k, past, at.b, t);
            some<V> r = mix<V, W>(w, bias, in + 3 - u, seen);
#pragma unroll
            for (int j = 0; j < V; j++) {
                const float v = k.silu ? r.v[j] / (1 + __expf(-r.v[j])) : r.v[j];
                r.v[j] = seen < 0 ? 0 : v;
            }
            r.store(y.y, y.place.at((at.b * k.T + t) * k.C + at.c));
        }
    }
}

static geometry geometry_of(const fg_exec *e, int at, bool silu, bool *eights)
{
    const fg_shape *x = &e->in_shape[at];
    geometry k = {};
    k.B = x->dim[0], k.T = x->dim[1], k.C = x->dim[2];
    k.W = (int)fg_last_of(&e->in_shape[at + 1]);
    k.w = fg_input_of(e, at + 1);
    k.bias = fg_input_of(e, at + 2);
    k.first = (const int32_t *)e->in[at + 3];
    k.silu = silu;
    *eights = k.W == 4 && k.C % 8 == 0 && fg_in_eights(&e->in_rows[at])
              && fg_in_eights(&e->out_rows[0]);
    const int64_t most = fg_count_of(x) + THREADS;
    k.columns = fg_divisor_of(k.C / (*eights ? 8 : 1), most);
    k.strips = fg_divisor_of((k.T + STRIP - 1) / STRIP, most);
    return k;
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_causal_conv *a = (const struct fg_attr_causal_conv *)e->attr;
    bool eights;
    geometry k = geometry_of(e, 0, a->silu, &eights);
    k.past = (const int32_t *)e->in[4];
    k.prev = e->in[5] ? fg_input_of(e, 5) : fg_in{ nullptr, false };
    const fg_source x = fg_source_of(e, 0);
    const fg_target y = fg_target_of(e, 0);
    const unsigned blocks = fg_blocks(k.B * k.strips.d * k.columns.d, THREADS);
    if (eights) convolve<8, 4><<<blocks, THREADS, 0, stream>>>(k, x, y);
    else convolve<1, WIDEST><<<blocks, THREADS, 0, stream>>>(k, x, y);
}
FG_KERNEL(causal_conv) = { .launch = launch, .pitched_in = 1, .pitched_out = 1 };

/* ---- causal_conv_grad ----------------------------------------------------------------------- */

/* sums: [B * strips][W + 1][C], row i for w_(W-1-i), row W for the bias. */
struct gradients { fg_source gy, x; fg_target gx; float *sums; };

/* gu of row t from its inputs in[0 .. W). */
template <int V, int W>
static __device__ __forceinline__ some<V> pull(const geometry &k, const gradients &z,
                                               const some<V> *w, const some<V> &bias,
                                               const some<V> *in, const spot &at, int64_t t,
                                               int seen)
{
    some<V> g;
    g.clear();
    if (seen < 0) return g;
    g.load(z.gy.x, z.gy.place.at((at.b * k.T + t) * k.C + at.c));
    if (!k.silu) return g;
    const some<V> u = mix<V, W>(w, bias, in, seen);
#pragma unroll
    for (int j = 0; j < V; j++) {
        const float s = 1 / (1 + __expf(-u.v[j]));
        g.v[j] *= s * (1 + u.v[j] * (1 - s));
    }
    return g;
}

template <int V, int W>
static __global__ void __launch_bounds__(THREADS) convolve_grad(geometry k, gradients z)
{
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= k.B * k.strips.d * k.columns.d) return;
    const spot at = spot_of(k, i, V);
    some<V> w[W], bias, in[W], gu[W], gw[W], gb;
    int saw[W];
    weights<V, W>(k, at.c, w, &bias);
    gb.clear();
#pragma unroll
    for (int r = 0; r < W; r++) {
        gw[r].clear();
        gu[r].clear();
        saw[r] = -1;
        if (r) fetch(k, z.x, at.b, at.t - r, at.c, &in[r - 1]);
    }
    const int64_t end = min(at.t + STRIP, k.T);
    for (int64_t t = at.t; t < end + W - 1; t++) {
        const int seen = t < k.T ? reach(k, 0, at.b, t) : -1;
#pragma unroll
        for (int r = W - 1; r > 0; r--) in[r] = in[r - 1], gu[r] = gu[r - 1], saw[r] = saw[r - 1];
        fetch(k, z.x, at.b, t, at.c, &in[0]);
        gu[0] = pull<V, W>(k, z, w, bias, in, at, t, seen);
        saw[0] = seen;
        if (t < end) {
#pragma unroll
            for (int r = 0; r < W; r++)
#pragma unroll
                for (int j = 0; j < V; j++)
                    gw[r].v[j] = r <= seen ? fmaf(gu[0].v[j], in[r].v[j], gw[r].v[j]) : gw[r].v[j];
#pragma unroll
            for (int j = 0; j < V; j++) gb.v[j] += gu[0].v[j];
        }
        const int64_t s = t - (W - 1);           /* all rows that see it are known now */
        if (s < at.t || s >= end) continue;
        some<V> gx;
        gx.clear();
#pragma unroll
        for (int r = 0; r < W; r++)              /* row s + r is W - 1 - r rows ago */
#pragma unroll
            for (int j = 0; j < V; j++)
                if (saw[W - 1 - r] >= r) gx.v[j] = fmaf(w[r].v[j], gu[W - 1 - r].v[j], gx.v[j]);
        gx.store(z.gx.y, z.gx.place.at((at.b * k.T + s) * k.C + at.c));
    }
    float *sums = z.sums + (at.b * k.strips.d + at.t / STRIP) * (k.W + 1) * k.C + at.c;
#pragma unroll
    for (int r = 0; r < W; r++)
#pragma unroll
        for (int j = 0; j < V; j++) if (r < k.W) sums[r * k.C + j] = gw[r].v[j];
#pragma unroll
    for (int j = 0; j < V; j++) sums[k.W * k.C + j] = gb.v[j];
}

#define ADDERS 8

/* gw and gbias: 32 columns a block, ADDERS runs of strips each, added in order. */
static __global__ void __launch_bounds__(32 * ADDERS)
add_strips(const float *sums, int64_t rows, int64_t C, int W, fg_out gw, fg_out gb)
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

static void grad_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_causal_conv_grad *a = (const struct fg_attr_causal_conv_grad *)e->attr;
    bool eights;
    const geometry k = geometry_of(e, 1, a->silu, &eights);
    eights = eights && fg_in_eights(&e->in_rows[0]);
    geometry one = k;
    one.columns = fg_divisor_of(k.C, k.B * k.T * k.C + THREADS);
    const gradients z = { fg_source_of(e, 0), fg_source_of(e, 1), fg_target_of(e, 0),
                          (float *)e->scratch };
    const int64_t rows = k.B * k.strips.d, n = (k.W + 1) * k.C;
    if (eights)
        convolve_grad<8, 4><<<fg_blocks(rows * k.columns.d, THREADS), THREADS, 0, stream>>>(k, z);
    else
        convolve_grad<1, WIDEST><<<fg_blocks(rows * k.C, THREADS), THREADS, 0, stream>>>(one, z);
    add_strips<<<fg_blocks(n, 32), 32 * ADDERS, 0, stream>>>(z.sums, rows, k.C, k.W,
                                                           fg_output_of(e, 1), fg_output_of(e, 2));
}

static size_t grad_scratch(const fg_infer *c)
{
    const fg_shape *x = &c->in[1];
    const int64_t strips = (x->dim[1] + STRIP - 1) / STRIP;
    return (size_t)(x->dim[0] * strips * (fg_last_of(&c->in[2]) + 1) * x->dim[2]) * sizeof(float);
}
FG_KERNEL(causal_conv_grad) = { .launch = grad_launch, .scratch = grad_scratch, .pitched_in = 3,
                                .pitched_out = 1 };
