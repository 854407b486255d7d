/* shift_mix.cu - data-dependent token shift and its gradient: ops/shift_mix.c on a GPU.
 *
 *     y_t = a_t x_(t-1) + (1 - a_t) x_t
 *     gx_t = (1 - a_t) gy_t + a_(t+1) gy_(t+1),  ga_t = sum over channels of gy_t (x_(t-1) - x_t)
 *
 * Bytes: every tensor once from memory; the row before (of gy: after) comes from cache.  A thread
 * has one row: on an H100 walking down 2 or 4 rows with the neighbour in registers is slower. */
#include "rows.cuh"

#define THREADS 256

struct geometry {
    const int32_t *first, *past;
    int64_t B, T, H, D;
    fg_divisor columns, rows, width;             /* of a row, of a sequence, of a head; V each */
};

/* What row t of a sequence is: PAD gives 0, START has nothing before it. */
enum place { PAD, START, INSIDE };
static __device__ __forceinline__ place place_of(const geometry &k, int64_t past, int64_t row,
                                                 int64_t t)
{
    const int64_t low = k.first && k.first[row] > 0 ? k.first[row] : 0, p = past + t;
    return low > p ? PAD : low == p ? START : INSIDE;
}

/* Thread i's row, its place t in sequence b, first channel and head. */
struct spot { int64_t row, b, t, column, head; };
static __device__ __forceinline__ spot spot_of(const geometry &k, int64_t i, int V)
{
    const int64_t row = fg_divide(i, k.columns), c = i - row * k.columns.d;
    const int64_t b = fg_divide(row, k.rows);
    return { row, b, row - b * k.T, c * V, fg_divide(c, k.width) };
}

/* Inputs and outputs of both kernels and where they lie. */
struct tensors { fg_in x, a, gy, prev; fg_out y, ga; fg_matrix at_x, at_a, at_gy, at_y, at_ga; };

/* V channels a thread, WIDE: x may be f32. */
template <int V, bool WIDE>
static __global__ void __launch_bounds__(THREADS) mix(geometry k, tensors z)
{
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= k.B * k.T * k.columns.d) return;
    const spot at = spot_of(k, i, V);
    const fg_in before = at.t > 0 || !z.prev.p ? z.x : z.prev;
    fg_some<V, WIDE> earlier, own;
    earlier.clear();
    own.load(z.x, z.at_x.at(at.row, at.column));
    if (at.t > 0) earlier.load(z.x, z.at_x.at(at.row - 1, at.column));
    else if (z.prev.p) earlier.load(z.prev, at.b * k.H * k.D + at.column);
    const float gate = z.a[z.at_a.at(at.row, at.head)];
    const place is = place_of(k, k.past ? *k.past : 0, at.row, at.t);
    float p[V], v[V];
    earlier.floats(before, p);
    own.floats(z.x, v);
#pragma unroll
    for (int j = 0; j < V; j++) {
        const float keep = is == PAD ? 0 : (1 - gate) * v[j];
        v[j] = is == INSIDE ? fmaf(gate, p[j], keep) : keep;
    }
    fg_store_some<V>(z.y, z.at_y.at(at.row, at.column), v);
}

static geometry geometry_of(const fg_shape *s, int V)
{
    geometry k = {};
    k.B = s->dim[0], k.T = s->dim[1], k.H = s->dim[2], k.D = s->dim[3];
    const int64_t most = fg_count_of(s) + THREADS;
    k.columns = fg_divisor_of(k.H * k.D / V, most);
    k.rows = fg_divisor_of(k.T, most);
    k.width = fg_divisor_of(k.D / V, most);
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
    const unsigned blocks = fg_blocks(k.B * k.T * k.columns.d, THREADS);
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

/* A head is `lanes` neighbouring threads of a warp, eight channels each; WIDE: gy or x may be f32,
 * any mixture. */
template <bool WIDE>
static __global__ void __launch_bounds__(THREADS) mix_grad(geometry k, tensors z, int lanes)
{
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    const bool there = i < k.B * k.T * k.columns.d;      /* else only shuffles */
    const spot at = spot_of(k, there ? i : 0, 8);
    const bool has_next = at.t + 1 < k.T;
    fg_some<8, WIDE> gy, later, x, earlier;
    later.clear();
    earlier.clear();
    gy.load(z.gy, z.at_gy.at(at.row, at.column));
    x.load(z.x, z.at_x.at(at.row, at.column));
    if (has_next) later.load(z.gy, z.at_gy.at(at.row + 1, at.column));
    if (at.t > 0) earlier.load(z.x, z.at_x.at(at.row - 1, at.column));
    const float gate = z.a[z.at_a.at(at.row, at.head)];
    const float gate_later = has_next ? z.a[z.at_a.at(at.row + 1, at.head)] : 0;
    const place is = place_of(k, 0, at.row, at.t);
    const bool next = has_next && place_of(k, 0, at.row + 1, at.t + 1) == INSIDE;
    const float keep = is == PAD ? 0 : 1 - gate;
    float g[8], h[8], v[8], p[8], sum = 0;
    gy.floats(z.gy, g);
    later.floats(z.gy, h);
    x.floats(z.x, v);
    earlier.floats(z.x, p);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        sum = fmaf(g[j], (is == INSIDE ? p[j] : 0) - v[j], sum);
        g[j] = fmaf(keep, g[j], next ? gate_later * h[j] : 0);
    }
    for (int d = lanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (!there) return;
    fg_store_some<8>(z.y, z.at_y.at(at.row, at.column), g);
    if ((threadIdx.x & (lanes - 1)) == 0)
        z.ga.put(z.at_ga.at(at.row, at.head), is == PAD ? 0 : sum);
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
    geometry k = geometry_of(s, eights ? 8 : 1);
    k.first = (const int32_t *)e->in[3];
    tensors z = {};
    z.gy = fg_input_of(e, 0), z.x = fg_input_of(e, 1), z.a = fg_input_of(e, 2);
    z.y = fg_output_of(e, 0), z.ga = fg_output_of(e, 1);
    z.at_gy = fg_matrix_of(&e->in_rows[0], C, n), z.at_x = fg_matrix_of(&e->in_rows[1], C, n);
    z.at_a = fg_matrix_of(&e->in_rows[2], k.H, n), z.at_y = fg_matrix_of(&e->out_rows[0], C, n);
    z.at_ga = fg_matrix_of(&e->out_rows[1], k.H, n);
    const unsigned blocks = fg_blocks(k.B * k.T * k.columns.d, THREADS);
    if (!eights)
        mix_grad_any<<<fg_blocks(k.B * k.T * k.H, THREADS / 32), THREADS, 0, stream>>>(k, z);
    else if (z.gy.narrow && z.x.narrow)
        mix_grad<false><<<blocks, THREADS, 0, stream>>>(k, z, (int)lanes);
    else
        mix_grad<true><<<blocks, THREADS, 0, stream>>>(k, z, (int)lanes);
}
FG_KERNEL(shift_mix_grad) = { .launch = grad_launch, .pitched_in = 7, .pitched_out = 3 };
