/* rope.cu - rotary positions: ops/rope.c on a GPU.
 *
 *     y_i       = x_i cos a - x_(i+D/2) sin a
 *     y_(i+D/2) = x_i sin a + x_(i+D/2) cos a,   a = position * base^(-2i/D), i in [0, D/2)
 *
 * Bytes: x and y once.  A block takes a few positions, makes their angles once and turns all heads.
 * The angle is counted in turns of 2 pi, in double; whole turns are dropped before it becomes a
 * float, so its error is that of a float below 1/2 however far the position. */
#include "elementwise.cuh"

#define THREADS 256                              /* also angles a block, so channels a block */
#define POSITIONS 4                              /* of a block, at most; measured on an H100 */
#define UNROLL    2                              /* turns a thread has under way */

struct geometry {
    const int32_t *first, *past;
    int64_t T, rows, H, half;
    int channels, positions;                     /* of a block */
    double step;                                 /* log2 of the ratio of neighbouring speeds */
    bool inverse;
};

static __device__ __forceinline__ float2 angle_of(const geometry &k, int64_t row, int64_t i)
{
    const int64_t p = row % k.T + (k.past ? *k.past : 0), low = k.first ? k.first[row] : 0;
    const double turns = (double)(p - (low <= p ? low : 0)) * exp2(k.step * (double)i)
                         * 0.15915494309189533577;                                /* 1 / (2 pi) */
    float2 a;
    sincospif(2 * (float)(turns - rint(turns)), &a.y, &a.x);
    if (k.inverse) a.y = -a.y;
    return a;
}

/* One channel and its partner. */
static __device__ __forceinline__ void turn(float2 a, float *x, float *w)
{
    const float u = *x, v = *w;
    *x = fmaf(u, a.x, -(v * a.y));
    *w = fmaf(u, a.y, v * a.x);
}

/* Where a thread's j-th turn of a block is. */
struct spot { int row, column, angle; };
static __device__ __forceinline__ spot spot_of(const geometry &k, unsigned j, unsigned width, int V,
                                               int channels, int64_t i0)
{
    const unsigned q = j / width, i = (j - q * width) * V, row = q / (unsigned)k.H;
    return { (int)row, (int)((q - row * k.H) * 2 * k.half + i0 + i), (int)(row * channels + i) };
}

/* Blocks: positions along x, channels along y; V channels a thread at once, WIDE: x may be f32.
 * The first loads are under way while the angles are made. */
template <int V, bool WIDE>
static __global__ void __launch_bounds__(THREADS, WIDE ? 3 : 4)
rotate(geometry k, fg_in x, fg_out y, fg_matrix from, fg_matrix to)
{
    __shared__ float2 angle[THREADS];
    const int64_t row0 = (int64_t)blockIdx.x * k.positions, i0 = (int64_t)blockIdx.y * k.channels;
    const int channels = k.half - i0 < k.channels ? (int)(k.half - i0) : k.channels;
    const int positions = k.rows - row0 < k.positions ? (int)(k.rows - row0) : k.positions;
    const unsigned width = channels / V, all = positions * (unsigned)k.H * width;
    for (unsigned j0 = 0; j0 < all; j0 += UNROLL * THREADS) {
        fg_some<V, WIDE> a[UNROLL], b[UNROLL];
        spot at[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const unsigned j = j0 + u * THREADS + threadIdx.x;
            if (j >= all) continue;
            at[u] = spot_of(k, j, width, V, channels, i0);
            a[u].load(x, from.at(row0 + at[u].row, at[u].column));
            b[u].load(x, from.at(row0 + at[u].row, at[u].column + k.half));
        }
        if (j0 == 0) {
            const int j = threadIdx.x;
            if (j < positions * channels)
                angle[j] = angle_of(k, row0 + j / channels, i0 + j % channels);
            __syncthreads();
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (j0 + u * THREADS + threadIdx.x >= all) continue;
            float v[V], w[V];
            a[u].floats(x, v);
            b[u].floats(x, w);
#pragma unroll
            for (int j = 0; j < V; j++) turn(angle[at[u].angle + j], &v[j], &w[j]);
            fg_store_some<V>(y, to.at(row0 + at[u].row, at[u].column), v);
            fg_store_some<V>(y, to.at(row0 + at[u].row, at[u].column + k.half), w);
        }
    }
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_rope *a = (const struct fg_attr_rope *)e->attr;
    const fg_shape *s = &e->in_shape[0];
    geometry k = { .first = (const int32_t *)e->in[1], .past = (const int32_t *)e->in[2],
                   .T = s->dim[1], .rows = s->dim[0] * s->dim[1], .H = s->dim[2],
                   .half = s->dim[3] / 2, .channels = THREADS, .positions = 1, .step = 0,
                   .inverse = a->inverse };
    if (k.half < THREADS) k.channels = (int)k.half;
    k.positions = THREADS / k.channels < POSITIONS ? THREADS / k.channels : POSITIONS;
    k.step = -log2(a->base) / (double)k.half;
    const dim3 blocks(fg_blocks(k.rows, k.positions), fg_blocks(k.half, k.channels));
    const fg_in x = fg_input_of(e, 0);
    const fg_out y = fg_output_of(e, 0);
    const int64_t C = s->dim[2] * s->dim[3], count = fg_count_of(s);
    const fg_matrix from = fg_matrix_of(&e->in_rows[0], C, count);
    const fg_matrix to = fg_matrix_of(&e->out_rows[0], C, count);
    if (k.half % 8 || !fg_in_eights(&e->in_rows[0]) || !fg_in_eights(&e->out_rows[0]))
        rotate<1, true><<<blocks, THREADS, 0, stream>>>(k, x, y, from, to);
    else if (x.narrow)
        rotate<8, false><<<blocks, THREADS, 0, stream>>>(k, x, y, from, to);
    else
        rotate<8, true><<<blocks, THREADS, 0, stream>>>(k, x, y, from, to);
}
FG_KERNEL(rope) = { .launch = launch, .pitched_in = 1, .pitched_out = 1 };
