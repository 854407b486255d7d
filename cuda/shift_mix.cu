/* shift_mix.cu - data-dependent token shift and its gradient: ops/shift_mix.c on a GPU.
 *
 *     y_t = a_t x_(t-1) + (1 - a_t) x_t
 *     gx_t = (1 - a_t) gy_t + a_(t+1) gy_(t+1),  ga_t = sum over channels of gy_t (x_(t-1) - x_t)
 *
 * Bytes: every tensor once from memory; a thread walks STRIP rows, so a neighbour's row is read
 * again for one row in STRIP, mostly from cache. */
#include "rows.cuh"

#define THREADS 256
#ifndef STRIP
#define STRIP   4
#endif
#ifndef GRAD_STRIP
#define GRAD_STRIP 4
#endif

struct geometry {
    const int32_t *first, *past;
    int64_t B, T, H, D;
    fg_divisor columns, strips, width;           /* of a row, of a sequence, of a head; V each */
};

/* What row t of a sequence is: PAD gives 0, START has nothing before it. */
enum place { PAD, START, INSIDE };
static __device__ __forceinline__ place place_of(const geometry &k, int64_t past, int64_t row,
                                                 int64_t t)
{
    const int64_t low = k.first && k.first[row] > 0 ? k.first[row] : 0, p = past + t;
    return low > p ? PAD : low == p ? START : INSIDE;
}

/* Thread i's sequence, first row and column. */
struct spot { int64_t b, t, column, head; };
static __device__ __forceinline__ spot spot_of(const geometry &k, int64_t i, int V, int strip)
{
    const int64_t q = fg_divide(i, k.columns), c = i - q * k.columns.d;
    const int64_t b = fg_divide(q, k.strips);
    return { b, (q - b * k.strips.d) * strip, c * V, fg_divide(c, k.width) };
}

/* Inputs and outputs of both kernels and where they lie. */
struct tensors { fg_in x, a, gy, prev; fg_out y, ga; fg_matrix at_x, at_a, at_gy, at_y, at_ga; };

/* V channels a thread, WIDE: x may be f32. */
template <int V, bool WIDE>
static __global__ void __launch_bounds__(THREADS) mix(geometry k, tensors z)
{
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, C = k.H * k.D;
    if (i >= k.B * k.strips.d * k.columns.d) return;
    const spot at = spot_of(k, i, V, STRIP);
    const int64_t past = k.past ? *k.past : 0, row = at.b * k.T + at.t;
    fg_some<V, WIDE> raw[STRIP + 1];
    float gate[STRIP];
    raw[0].clear();
    if (at.t > 0) raw[0].load(z.x, z.at_x.at(row - 1, at.column));
    else if (z.prev.p) raw[0].load(z.prev, at.b * C + at.column);
    const fg_in before = at.t > 0 || !z.prev.p ? z.x : z.prev;
#pragma unroll
    for (int u = 0; u < STRIP; u++) {
        if (at.t + u >= k.T) continue;
        raw[u + 1].load(z.x, z.at_x.at(row + u, at.column));
        gate[u] = z.a[z.at_a.at(row + u, at.head)];
    }
    float p[V], v[V], r[V];
    raw[0].floats(before, p);
#pragma unroll
    for (int u = 0; u < STRIP; u++) {
        if (at.t + u >= k.T) continue;
        const place is = place_of(k, past, row + u, at.t + u);
        raw[u + 1].floats(z.x, v);
#pragma unroll
        for (int j = 0; j < V; j++) {
            const float keep = is == PAD ? 0 : (1 - gate[u]) * v[j];
            r[j] = is == INSIDE ? fmaf(gate[u], p[j], keep) : keep;
            p[j] = v[j];
        }
        fg_store_some<V>(z.y, z.at_y.at(row + u, at.column), r);
    }
}

static geometry geometry_of(const fg_shape *s, int V, int strip)
{
    geometry k = {};
    k.B = s->dim[0], k.T = s->dim[1], k.H = s->dim[2], k.D = s->dim[3];
    const int64_t most = fg_count_of(s) + THREADS;
    k.columns = fg_divisor_of(k.H * k.D / V, most);
    k.strips = fg_divisor_of((k.T + strip - 1) / strip, most);
    k.width = fg_divisor_of(k.D / V, most);
    return k;
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const fg_shape *s = &e->in_shape[0];
    const bool eights = s->dim[3] % 8 == 0 && fg_in_eights(&e->in_rows[0])
                        && fg_in_eights(&e->out_rows[0]);
    geometry k = geometry_of(s, eights ? 8 : 1, STRIP);
    k.first = (const int32_t *)e->in[2];
    k.past = (const int32_t *)e->in[3];
    const unsigned blocks = fg_blocks(k.B * k.strips.d * k.columns.d, THREADS);
    const int64_t n = fg_count_of(s), C = k.H * k.D;
    tensors z = {};
    z.x = fg_input_of(e, 0), z.a = fg_input_of(e, 1), z.y = fg_output_of(e, 0);
    if (e->in[4]) z.prev = fg_input_of(e, 4);
    z.at_x = fg_matrix_of(&e->in_rows[0], C, n), z.at_a = fg_matrix_of(&e->in_rows[1], k.H, n);
    z.at_y = fg_matrix_of(&e->out_rows[0], C, n);
    const bool narrow = z.x.narrow && (!z.prev.p || z.prev.narrow);
    if (!eights) mix<1, true><<<blocks, THREADS, 0, stream>>>(k, z);
    else if (narrow) mix<8, false><<<blocks, THREADS, 0, stream>>>(k, z);
    else mix<8, true><<<blocks, THREADS, 0, stream>>>(k, z);
}
FG_KERNEL(shift_mix) = { .launch = launch, .pitched_in = 3, .pitched_out = 1 };

/* ---- shift_mix_grad ------------------------------------------------------------------------- */

/* A head is `lanes` neighbouring threads of a warp, eight channels each; WIDE: gy or x may be f32. */
template <bool WIDE>
static __global__ void __launch_bounds__(THREADS) mix_grad(geometry k, tensors z, int lanes)
{
    constexpr int STEPS = GRAD_STRIP;
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    const bool there = i < k.B * k.strips.d * k.columns.d;
    const spot at = spot_of(k, there ? i : 0, 8, STEPS);
    const int64_t row = at.b * k.T + at.t, rows = there ? k.T - at.t : 0;
    fg_some<8, WIDE> gy[STEPS + 1], x[STEPS + 1];
    float gate[STEPS + 1];
    x[0].clear();
    if (there && at.t > 0) x[0].load(z.x, z.at_x.at(row - 1, at.column));
#pragma unroll
    for (int u = 0; u <= STEPS; u++) {
        gy[u].clear();
        gate[u] = 0;
        if (u < STEPS) x[u + 1].clear();
        if (u >= rows) continue;
        gy[u].load(z.gy, z.at_gy.at(row + u, at.column));
        gate[u] = z.a[z.at_a.at(row + u, at.head)];
        if (u < STEPS) x[u + 1].load(z.x, z.at_x.at(row + u, at.column));
    }
    float g[8], h[8], v[8], p[8], r[8];
    gy[0].floats(z.gy, g);
    x[0].floats(z.x, p);
#pragma unroll
    for (int u = 0; u < STEPS; u++) {
        const place is = u < rows ? place_of(k, 0, row + u, at.t + u) : PAD;
        const bool next = u + 1 < rows && place_of(k, 0, row + u + 1, at.t + u + 1) == INSIDE;
        const float keep = is == PAD ? 0 : 1 - gate[u];
        float sum = 0;
        gy[u + 1].floats(z.gy, h);
        x[u + 1].floats(z.x, v);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            r[j] = fmaf(keep, g[j], next ? gate[u + 1] * h[j] : 0);
            sum = fmaf(g[j], (is == INSIDE ? p[j] : 0) - v[j], sum);
            g[j] = h[j];
            p[j] = v[j];
        }
        for (int d = lanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
        if (u >= rows) continue;
        fg_store_some<8>(z.y, z.at_y.at(row + u, at.column), r);
        if (threadIdx.x % lanes == 0)
            z.ga.put(z.at_ga.at(row + u, at.head), is == PAD ? 0 : sum);
    }
}

/* Any D: a warp a head and row. */
static __global__ void __launch_bounds__(THREADS) mix_grad_any(geometry k, tensors z)
{
    const int64_t q = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (q >= k.B * k.T * k.H) return;
    const int64_t row = q / k.H, h = q - row * k.H, t = row % k.T;
    const place is = place_of(k, 0, row, t);
    const bool next = t + 1 < k.T && place_of(k, 0, row + 1, t + 1) == INSIDE;
    const float keep = is == PAD ? 0 : 1 - z.a[z.at_a.at(row, h)];
    const float pass = next ? z.a[z.at_a.at(row + 1, h)] : 0;
    float sum = 0;
    for (int64_t d = threadIdx.x % 32; d < k.D; d += 32) {
        const int64_t column = h * k.D + d;
        const float g = z.gy[z.at_gy.at(row, column)], v = z.x[z.at_x.at(row, column)];
        const float p = is == INSIDE ? z.x[z.at_x.at(row - 1, column)] : 0;
        const float later = next ? pass * z.gy[z.at_gy.at(row + 1, column)] : 0;
        sum = fmaf(g, p - v, sum);
        z.y.put(z.at_y.at(row, column), fmaf(keep, g, later));
    }
    sum = fg_warp_sum(sum);
    if (threadIdx.x % 32 == 0) z.ga.put(z.at_ga.at(row, h), is == PAD ? 0 : sum);
}

static void grad_launch(const fg_exec *e, cudaStream_t stream)
{
    const fg_shape *s = &e->in_shape[1];
    const int64_t lanes = s->dim[3] / 8, n = fg_count_of(s), C = s->dim[2] * s->dim[3];
    const bool eights = s->dim[3] % 8 == 0 && lanes <= 32 && (lanes & (lanes - 1)) == 0
                        && fg_in_eights(&e->in_rows[0]) && fg_in_eights(&e->in_rows[1])
                        && fg_in_eights(&e->out_rows[0]);
    geometry k = geometry_of(s, eights ? 8 : 1, GRAD_STRIP);
    k.first = (const int32_t *)e->in[3];
    tensors z = {};
    z.gy = fg_input_of(e, 0), z.x = fg_input_of(e, 1), z.a = fg_input_of(e, 2);
    z.y = fg_output_of(e, 0), z.ga = fg_output_of(e, 1);
    z.at_gy = fg_matrix_of(&e->in_rows[0], C, n), z.at_x = fg_matrix_of(&e->in_rows[1], C, n);
    z.at_a = fg_matrix_of(&e->in_rows[2], k.H, n), z.at_y = fg_matrix_of(&e->out_rows[0], C, n);
    z.at_ga = fg_matrix_of(&e->out_rows[1], k.H, n);
    const unsigned blocks = fg_blocks(k.B * k.strips.d * k.columns.d, THREADS);
    if (!eights)
        mix_grad_any<<<fg_blocks(k.B * k.T * k.H, THREADS / 32), THREADS, 0, stream>>>(k, z);
    else if (z.gy.narrow && z.x.narrow)
        mix_grad<false><<<blocks, THREADS, 0, stream>>>(k, z, (int)lanes);
    else
        mix_grad<true><<<blocks, THREADS, 0, stream>>>(k, z, (int)lanes);
}
FG_KERNEL(shift_mix_grad) = { .launch = grad_launch, .pitched_in = 7, .pitched_out = 3 };
