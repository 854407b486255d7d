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
    int64_t parts = 0;
    for (int i = 0; i < c->n_in; i++) parts += c->given[i] ? parts_of(&c->in[i]) : 0;
    return (size_t)parts * sizeof(float);
}

/* Tensors whose parts follow each other: those of i are first[i] .. first[i + 1] - 1. */
struct tensors {
    fg_in x[FG_MAX_IN];
    int64_t n[FG_MAX_IN], first[FG_MAX_IN + 1];
    int count;
};

static __device__ __forceinline__ float squares_of_part(const fg_in &x, int64_t n, int64_t first)
{
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
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

static __global__ void __launch_bounds__(SQUARE_THREADS)
part_squares(const __grid_constant__ tensors t, float *part)
{
    int i = 0;
    while (i + 1 < t.count && blockIdx.x >= t.first[i + 1]) i++;
    const float mine = squares_of_part(t.x[i], t.n[i], (blockIdx.x - t.first[i]) * PART);
    const float all = fg_block_sum<SQUARE_THREADS>(mine);
    if (threadIdx.x == 0) part[blockIdx.x] = all;
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
    tensors t = {};
    for (int i = 0; i < e->n_in; i++) {
        if (!e->in[i]) continue;
        t.x[t.count] = fg_input_of(e, i);
        t.n[t.count] = fg_count_of(&e->in_shape[i]);
        t.first[t.count + 1] = t.first[t.count] + parts_of(&e->in_shape[i]);
        t.count++;
    }
    const int64_t parts = t.first[t.count];
    part_squares<<<(unsigned)parts, SQUARE_THREADS, 0, stream>>>(t, (float *)e->scratch);
    add_parts<<<1, 1024, 0, stream>>>((const float *)e->scratch, parts, fg_output_of(e, 0));
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

/* One parameter; its chunks are first .. first + chunks - 1 of the launch. */
struct item { float *p, *m, *v; fg_in g; int64_t n; float decay; unsigned first; };
enum { ITEMS = 56, CHUNK = 4 * ADAM_THREADS * 2 };       /* of a launch; elements of a block */
struct items { item of[ITEMS]; int count; };

static __global__ void __launch_bounds__(ADAM_THREADS)
adamw(const __grid_constant__ items list, adam a, const float *clip, const float *lr,
      const float *step)
{
    int k = 0, end = list.count;
    while (end - k > 1) {
        const int middle = (k + end) / 2;
        if (blockIdx.x >= list.of[middle].first) k = middle;
        else end = middle;
    }
    const item &t = list.of[k];
    a.decay = (double)t.decay;
    const factors f = factors_of(a, clip, lr, step);
    if (!isfinite(f.clip)) return;
    const fg_in pi = { t.p, false }, mi = { t.m, false }, vi = { t.v, false };
    const int64_t start = (int64_t)(blockIdx.x - t.first) * CHUNK;
#pragma unroll
    for (int u = 0; u < 2; u++) {
        int64_t i = start + 4 * (u * ADAM_THREADS + (int64_t)threadIdx.x);
        if (i + 4 <= t.n) {
            fg_some<4> raw[4];
            float pv[4], mv[4], vv[4], gv[4];
            raw[0].load(pi, i);
            raw[1].load(mi, i);
            raw[2].load(vi, i);
            raw[3].load(t.g, i);
            raw[0].floats(pi, pv);
            raw[1].floats(mi, mv);
            raw[2].floats(vi, vv);
            raw[3].floats(t.g, gv);
#pragma unroll
            for (int j = 0; j < 4; j++) update(a, f, gv[j], &pv[j], &mv[j], &vv[j]);
            fg_store_some<4>(fg_out{ t.p, false }, i, pv);
            fg_store_some<4>(fg_out{ t.m, false }, i, mv);
            fg_store_some<4>(fg_out{ t.v, false }, i, vv);
        } else
            for (; i < t.n; i++) update(a, f, t.g[i], &t.p[i], &t.m[i], &t.v[i]);
    }
}

static adam adam_of(const struct fg_attr_adamw *a)
{
    return { .log_beta1 = log2(a->beta1), .log_beta2 = log2(a->beta2), .decay = 0,
             .beta1 = (float)a->beta1, .rest1 = (float)(1 - a->beta1), .beta2 = (float)a->beta2,
             .rest2 = (float)(1 - a->beta2), .eps = (float)a->eps };
}

static bool together(const fg_exec *x, const fg_exec *y)
{
    const struct fg_attr_adamw *a = (const struct fg_attr_adamw *)x->attr;
    const struct fg_attr_adamw *b = (const struct fg_attr_adamw *)y->attr;
    return a->beta1 == b->beta1 && a->beta2 == b->beta2 && a->eps == b->eps &&
           x->in[CLIP] == y->in[CLIP] && x->in[LR] == y->in[LR] && x->in[STEP] == y->in[STEP];
}

static void adamw_launch_many(const fg_exec *const *e, int n, cudaStream_t stream)
{
    for (int i = 0; i < n; ) {
        const fg_exec *head = e[i];
        items list = {};
        unsigned blocks = 0;
        for (; i < n && list.count < ITEMS && together(head, e[i]); i++) {
            const struct fg_attr_adamw *a = (const struct fg_attr_adamw *)e[i]->attr;
            const int64_t size = fg_count_of(&e[i]->in_shape[P]);
            list.of[list.count++] = { (float *)e[i]->out[P], (float *)e[i]->out[M],
                                      (float *)e[i]->out[V], fg_input_of(e[i], G), size,
                                      (float)a->decay, blocks };
            blocks += fg_blocks(size, CHUNK);
        }
        adamw<<<blocks, ADAM_THREADS, 0, stream>>>(
            list, adam_of((const struct fg_attr_adamw *)head->attr),
            (const float *)head->in[CLIP], (const float *)head->in[LR],
            (const float *)head->in[STEP]);
    }
}

static void adamw_launch(const fg_exec *e, cudaStream_t stream)
{
    adamw_launch_many(&e, 1, stream);
}
static const char *adamw_unfit(const fg_infer *c)
{
    for (int i = P; i <= STEP; i++)
        if (i != G && c->in_type[i] != FG_F32)
            return "p, m, v, clip, lr and step are f32 alone";
    return nullptr;
}
FG_KERNEL(adamw) = { .launch = adamw_launch, .unfit = adamw_unfit,
                     .launch_many = adamw_launch_many };
