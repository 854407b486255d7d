/* optimizer.cu - what happens to parameters after the gradients: ops/optimizer.c on a GPU.
 *
 * Bytes: sum_squares reads x once; accumulate reads and writes sum, reads x; adamw reads and writes
 * p, m and v and reads g, 28 an element in f32.  Which part of x a block adds up depends on the
 * shape alone; parts are added in double, in order. */
#include "elementwise.cuh"

/* ---- sum_squares ---------------------------------------------------------------------------- */

#define SQUARE_THREADS 256
#define PART ((int64_t)SQUARE_THREADS * 8 * 8)   /* elements a block; eight eights a thread */

static int64_t parts_of(const fg_shape *x) { return (fg_count_of(x) + PART - 1) / PART; }

static size_t squares_scratch(const fg_infer *c)
{
    return parts_of(&c->in[0]) > 1 ? (size_t)parts_of(&c->in[0]) * sizeof(float) : 0;
}

static __global__ void __launch_bounds__(SQUARE_THREADS)
part_squares(fg_in x, fg_out y, int64_t n)
{
    const int64_t first = blockIdx.x * PART;
    float sum[8] = { 0 };
#pragma unroll
    for (int half = 0; half < 2; half++) {
        fg_raw8 raw[4];
#pragma unroll
        for (int u = 0; u < 4; u++) {
            const int64_t i = first + 8 * ((half * 4 + u) * SQUARE_THREADS + (int)threadIdx.x);
            if (i + 8 <= n) raw[u] = fg_load_raw8(x, i);
        }
#pragma unroll
        for (int u = 0; u < 4; u++) {
            const int64_t i = first + 8 * ((half * 4 + u) * SQUARE_THREADS + (int)threadIdx.x);
            if (i + 8 <= n) {
                const fg_vec8 v = fg_floats(x, raw[u]);
#pragma unroll
                for (int j = 0; j < 8; j++) sum[j] = fmaf(v[j], v[j], sum[j]);
            } else {
                for (int64_t k = i; k < n; k++) sum[0] = fmaf(x[k], x[k], sum[0]);
            }
        }
    }
    const float all = fg_block_sum<SQUARE_THREADS>(((sum[0] + sum[1]) + (sum[2] + sum[3])) +
                                                   ((sum[4] + sum[5]) + (sum[6] + sum[7])));
    if (threadIdx.x == 0) y.put(blockIdx.x, all);
}

/* One block: thread i adds parts i, i + 1024, ..., thread 0 the threads' sums. */
static __global__ void __launch_bounds__(1024) add_parts(const float *part, int64_t n, fg_out y)
{
    __shared__ double sums[1024];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += 1024) sum += (double)part[i];
    sums[threadIdx.x] = sum;
    for (int k = 512; k > 0; k /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < k) sums[threadIdx.x] += sums[threadIdx.x + k];
    }
    if (threadIdx.x == 0) y.put(0, (float)sums[0]);
}

static void squares_launch(const fg_exec *e, cudaStream_t stream)
{
    const int64_t parts = parts_of(&e->in_shape[0]), n = fg_count_of(&e->in_shape[0]);
    const fg_out y = fg_output_of(e, 0), part = { e->scratch, false };
    part_squares<<<(unsigned)parts, SQUARE_THREADS, 0, stream>>>(fg_input_of(e, 0),
                                                                 parts > 1 ? part : y, n);
    if (parts > 1) add_parts<<<1, 1024, 0, stream>>>((const float *)e->scratch, parts, y);
}
FG_KERNEL(sum_squares) = { .launch = squares_launch, .scratch = squares_scratch };

/* ---- clip_factor ---------------------------------------------------------------------------- */

static __global__ void factor(fg_in squares, fg_out y, double limit)
{
    const double s = (double)squares[0], f = limit / (sqrt(s) + 1e-6);
    y.put(0, !isfinite(s) ? NAN : f < 1 ? (float)f : 1);
}
static void clip_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_clip_factor *a = (const struct fg_attr_clip_factor *)e->attr;
    factor<<<1, 1, 0, stream>>>(fg_input_of(e, 0), fg_output_of(e, 0), a->limit);
}
FG_KERNEL(clip_factor) = { .launch = clip_launch };

/* ---- accumulate: sum is its own input 0 ----------------------------------------------------- */

struct accumulate_of {
    float s;
    __device__ __forceinline__ float operator()(const float *in) const
    {
        return fmaf(s, in[1], in[0]);
    }
};
static void accumulate_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_accumulate *a = (const struct fg_attr_accumulate *)e->attr;
    fg_map<accumulate_of, 2>(e, stream, accumulate_of{ (float)a->s });
}
FG_KERNEL(accumulate) = { .launch = accumulate_launch, .pitched_in = 2 };

/* ---- adamw ---------------------------------------------------------------------------------- */

#define ADAM_THREADS 256
#define ADAM_BLOCKS  (4 * 132)                   /* as many as an H100 holds at once */

enum { P, M, V, G, CLIP, LR, STEP };

/* log_beta: base 2, so that beta^step is one exponential. */
struct adam { double log_beta1, log_beta2, decay; float beta1, rest1, beta2, rest2, eps; };
struct factors { float clip, keep, rate, root; };

static __device__ __forceinline__ factors factors_of(const adam &a, const float *clip,
                                                     const float *lr, const float *step)
{
    const double rate = (double)*lr, n = (double)*step;
    factors f;
    f.clip = *clip;
    f.keep = (float)(1 - rate * a.decay);
    f.rate = (float)(rate / (1 - exp2(a.log_beta1 * n)));
    f.root = (float)(1 / sqrt(1 - exp2(a.log_beta2 * n)));
    return f;
}

static __device__ __forceinline__ void update(const adam &a, const factors &f, float g, float *p,
                                              float *m, float *v)
{
    g *= f.clip;
    *m = a.beta1 * *m + a.rest1 * g;
    *v = a.beta2 * *v + a.rest2 * g * g;
    *p = *p * f.keep - f.rate * *m / (sqrtf(*v) * f.root + a.eps);
}

static __global__ void __launch_bounds__(ADAM_THREADS)
adamw(adam a, float *p, float *m, float *v, fg_in g, const float *clip, const float *lr,
      const float *step, int64_t n)
{
    const factors f = factors_of(a, clip, lr, step);
    if (!isfinite(f.clip)) return;
    const int64_t stride = (int64_t)gridDim.x * ADAM_THREADS * 8;
    int64_t i = 8 * ((int64_t)blockIdx.x * ADAM_THREADS + threadIdx.x);
    for (; i + 8 <= n; i += stride) {
        const fg_raw8 raw = fg_load_raw8(g, i);
        const fg_out po = { p, false }, mo = { m, false }, vo = { v, false };
        fg_vec8 pv = fg_load8(fg_in{ p, false }, i), mv = fg_load8(fg_in{ m, false }, i);
        fg_vec8 vv = fg_load8(fg_in{ v, false }, i);
        const fg_vec8 gv = fg_floats(g, raw);
#pragma unroll
        for (int j = 0; j < 8; j++) update(a, f, gv[j], &pv[j], &mv[j], &vv[j]);
        fg_store8(po, i, pv);
        fg_store8(mo, i, mv);
        fg_store8(vo, i, vv);
    }
    for (; i < n; i++) update(a, f, g[i], &p[i], &m[i], &v[i]);
}

static void adamw_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_adamw *a = (const struct fg_attr_adamw *)e->attr;
    const adam k = { .log_beta1 = log2(a->beta1), .log_beta2 = log2(a->beta2), .decay = a->decay,
                     .beta1 = (float)a->beta1, .rest1 = (float)(1 - a->beta1),
                     .beta2 = (float)a->beta2, .rest2 = (float)(1 - a->beta2),
                     .eps = (float)a->eps };
    const int64_t n = fg_count_of(&e->in_shape[P]);
    const unsigned blocks = fg_blocks(n, 8 * ADAM_THREADS);
    adamw<<<blocks < ADAM_BLOCKS ? blocks : ADAM_BLOCKS, ADAM_THREADS, 0, stream>>>(
        k, (float *)e->out[P], (float *)e->out[M], (float *)e->out[V], fg_input_of(e, G),
        (const float *)e->in[CLIP], (const float *)e->in[LR], (const float *)e->in[STEP], n);
}
static const char *adamw_unfit(const fg_infer *c)
{
    for (int i = P; i <= STEP; i++)
        if (i != G && c->in_type[i] != FG_F32)
            return "p, m, v, clip, lr and step are f32 alone";
    return nullptr;
}
FG_KERNEL(adamw) = { .launch = adamw_launch, .unfit = adamw_unfit };
