/* shift_mix.cu - data-dependent token shift and its gradient: ops/shift_mix.c on a GPU.
 *
 *     y_t = a_t x_(t-1) + (1 - a_t) x_t
 *     gx_t = (1 - a_t) gy_t + a_(t+1) gy_(t+1),  ga_t = sum over channels of gy_t (x_(t-1) - x_t)
 *
 * Bytes: every tensor once from memory; a thread walks STRIP rows, so a neighbour's row is read
 * again for one row in STRIP, mostly from cache. */
#include "shift.cuh"

#define THREADS 256
#define STRIP   4

struct geometry {
    const int32_t *first, *past;
    int64_t B, T, H, D;
    fg_divisor columns, strips, width;           /* of a row, of a sequence, of a head; V each */
};

/* V elements, loaded first and turned to float later. */
template <int V> struct some;
template <> struct some<8> {
    fg_raw8 raw;
    __device__ __forceinline__ void load(const fg_in &x, int64_t i) { raw = fg_load_raw8(x, i); }
    __device__ __forceinline__ void clear()
    {
        raw = { make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0) };
    }
    __device__ __forceinline__ void floats(const fg_in &x, float *v) const
    {
        const fg_vec8 f = fg_floats(x, raw);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = f[j];
    }
};
template <> struct some<1> {
    float one;
    __device__ __forceinline__ void load(const fg_in &x, int64_t i) { one = x[i]; }
    __device__ __forceinline__ void clear() { one = 0; }
    __device__ __forceinline__ void floats(const fg_in &, float *v) const { v[0] = one; }
};
template <int V> static __device__ __forceinline__ void store(const fg_out &y, int64_t i,
                                                              const float *v)
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

/* Thread i's sequence, first row and column. */
struct spot { int64_t b, t, column, head; };
static __device__ __forceinline__ spot spot_of(const geometry &k, int64_t i, int V)
{
    const int64_t q = fg_divide(i, k.columns), c = i - q * k.columns.d;
    const int64_t b = fg_divide(q, k.strips);
    return { b, (q - b * k.strips.d) * STRIP, c * V, fg_divide(c, k.width) };
}

template <int V>
static __global__ void __launch_bounds__(THREADS)
mix(geometry k, fg_source x, fg_source a, fg_in prev, fg_target y)
{
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, C = k.H * k.D;
    if (i >= k.B * k.strips.d * k.columns.d) return;
    const spot at = spot_of(k, i, V);
    const int64_t past = k.past ? *k.past : 0, row = at.b * k.T + at.t;
    some<V> raw[STRIP + 1];
    float gate[STRIP];
    raw[0].clear();
    if (at.t > 0) raw[0].load(x.x, x.place.at((row - 1) * C + at.column));
    else if (prev.p) raw[0].load(prev, at.b * C + at.column);
    const fg_in before = at.t > 0 || !prev.p ? x.x : prev;
#pragma unroll
    for (int u = 0; u < STRIP; u++) {
        if (at.t + u >= k.T) continue;
        raw[u + 1].load(x.x, x.place.at((row + u) * C + at.column));
        gate[u] = a.x[a.place.at((row + u) * k.H + at.head)];
    }
    float p[V], v[V], r[V];
    raw[0].floats(before, p);
#pragma unroll
    for (int u = 0; u < STRIP; u++) {
        if (at.t + u >= k.T) continue;
        const fg_shift_row is = fg_shift_place(k.first, past, row + u, at.t + u);
        const float g = is == INSIDE ? gate[u] : 0, rest = is == PAD ? 0 : 1 - gate[u];
        raw[u + 1].floats(x.x, v);
#pragma unroll
        for (int j = 0; j < V; j++) {
            const float keep = is == PAD ? 0 : rest * v[j];
            r[j] = is == INSIDE ? fmaf(g, p[j], keep) : keep;
            p[j] = v[j];
        }
        store<V>(y.y, y.place.at((row + u) * C + at.column), r);
    }
}

static geometry geometry_of(const fg_shape *s, int V)
{
    geometry k = {};
    k.B = s->dim[0], k.T = s->dim[1], k.H = s->dim[2], k.D = s->dim[3];
    k.columns = fg_divisor_of(k.H * k.D / V);
    k.strips = fg_divisor_of((k.T + STRIP - 1) / STRIP);
    k.width = fg_divisor_of(k.D / V);
    return k;
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const fg_shape *s = &e->in_shape[0];
    const bool eights = s->dim[3] % 8 == 0 && fg_in_eights(&e->in_rows[0])
                        && fg_in_eights(&e->out_rows[0]);
    geometry k = geometry_of(s, eights ? 8 : 1);
    k.first = (const int32_t *)e->in[2];
    k.past = (const int32_t *)e->in[3];
    const unsigned blocks = fg_blocks(k.B * k.strips.d * k.columns.d, THREADS);
    const fg_source x = fg_source_of(e, 0), a = fg_source_of(e, 1);
    const fg_in prev = e->in[4] ? fg_input_of(e, 4) : fg_in{ nullptr, false };
    const fg_target y = fg_target_of(e, 0);
    if (eights) mix<8><<<blocks, THREADS, 0, stream>>>(k, x, a, prev, y);
    else mix<1><<<blocks, THREADS, 0, stream>>>(k, x, a, prev, y);
}
FG_KERNEL(shift_mix) = { .launch = launch, .pitched_in = 3, .pitched_out = 1 };

/* ---- shift_mix_grad ------------------------------------------------------------------------- */

struct gradients { fg_source gy, x, a; fg_target gx, ga; };

/* A head is `lanes` neighbouring threads of a warp, eight channels each. */
static __global__ void __launch_bounds__(THREADS) mix_grad(geometry k, gradients z, int lanes)
{
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, C = k.H * k.D;
    const bool there = i < k.B * k.strips.d * k.columns.d;
    const spot at = spot_of(k, there ? i : 0, 8);
    const int64_t row = at.b * k.T + at.t, rows = there ? k.T - at.t : 0;
    some<8> gy[STRIP + 1], x[STRIP + 1];
    float gate[STRIP + 1];
    x[0].clear();
    if (there && at.t > 0) x[0].load(z.x.x, z.x.place.at((row - 1) * C + at.column));
#pragma unroll
    for (int u = 0; u <= STRIP; u++) {
        gy[u].clear();
        gate[u] = 0;
        if (u < STRIP) x[u + 1].clear();
        if (u >= rows) continue;
        gy[u].load(z.gy.x, z.gy.place.at((row + u) * C + at.column));
        gate[u] = z.a.x[z.a.place.at((row + u) * k.H + at.head)];
        if (u < STRIP) x[u + 1].load(z.x.x, z.x.place.at((row + u) * C + at.column));
    }
#pragma unroll
    for (int u = 0; u < STRIP; u++) {
        const fg_shift_row is = u < rows ? fg_shift_place(k.first, 0, row + u, at.t + u) : PAD;
        const bool next = u + 1 < rows &&
                          fg_shift_place(k.first, 0, row + u + 1, at.t + u + 1) == INSIDE;
        const float keep = is == PAD ? 0 : 1 - gate[u], pass = next ? gate[u + 1] : 0;
        const bool counts = is == INSIDE;
        float g[8], h[8], v[8], p[8], r[8], sum = 0;
        gy[u].floats(z.gy.x, g);
        gy[u + 1].floats(z.gy.x, h);
        x[u + 1].floats(z.x.x, v);
        x[u].floats(z.x.x, p);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            r[j] = fmaf(keep, g[j], next ? pass * h[j] : 0);
            sum = fmaf(g[j], (counts ? p[j] : 0) - v[j], sum);
        }
        for (int d = lanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
        if (u >= rows) continue;
        store<8>(z.gx.y, z.gx.place.at((row + u) * C + at.column), r);
        if (at.column % k.D == 0)
            z.ga.y.put(z.ga.place.at((row + u) * k.H + at.head), is == PAD ? 0 : sum);
    }
}

/* Any D: a warp a head and row. */
static __global__ void __launch_bounds__(THREADS) mix_grad_any(geometry k, gradients z)
{
    const int64_t q = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (q >= k.B * k.T * k.H) return;
    const int64_t row = q / k.H, t = row % k.T, C = k.H * k.D;
    const fg_shift_row is = fg_shift_place(k.first, 0, row, t);
    const bool next = t + 1 < k.T && fg_shift_place(k.first, 0, row + 1, t + 1) == INSIDE;
    const float keep = is == PAD ? 0 : 1 - z.a.x[z.a.place.at(q)];
    const float pass = next ? z.a.x[z.a.place.at(q + k.H)] : 0;
    float sum = 0;
    for (int64_t d = threadIdx.x % 32; d < k.D; d += 32) {
        const int64_t i = q * k.D + d;
        const float g = z.gy.x[z.gy.place.at(i)], v = z.x.x[z.x.place.at(i)];
        const float p = is == INSIDE ? z.x.x[z.x.place.at(i - C)] : 0;
        const float h = next ? pass * z.gy.x[z.gy.place.at(i + C)] : 0;
        sum = fmaf(g, p - v, sum);
        z.gx.y.put(z.gx.place.at(i), fmaf(keep, g, h));
    }
    sum = fg_warp_sum(sum);
    if (threadIdx.x % 32 == 0) z.ga.y.put(z.ga.place.at(q), is == PAD ? 0 : sum);
}

static void grad_launch(const fg_exec *e, cudaStream_t stream)
{
    const fg_shape *s = &e->in_shape[1];
    const int64_t lanes = s->dim[3] / 8;
    const bool eights = s->dim[3] % 8 == 0 && lanes <= 32 && (lanes & (lanes - 1)) == 0
                        && fg_in_eights(&e->in_rows[0]) && fg_in_eights(&e->in_rows[1])
                        && fg_in_eights(&e->out_rows[0]);
    geometry k = geometry_of(s, eights ? 8 : 1);
    k.first = (const int32_t *)e->in[3];
    const gradients z = { fg_source_of(e, 0), fg_source_of(e, 1), fg_source_of(e, 2),
                          fg_target_of(e, 0), fg_target_of(e, 1) };
    if (eights)
        mix_grad<<<fg_blocks(k.B * k.strips.d * k.columns.d, THREADS), THREADS, 0, stream>>>(
            k, z, (int)lanes);
    else
        mix_grad_any<<<fg_blocks(k.B * k.T * k.H, THREADS / 32), THREADS, 0, stream>>>(k, z);
}
FG_KERNEL(shift_mix_grad) = { .launch = grad_launch, .pitched_in = 7, .pitched_out = 3 };
