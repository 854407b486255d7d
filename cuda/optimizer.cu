/* optimizer.cu - what happens to parameters after the gradients: ops/optimizer.c on a GPU.
 *
 * Bytes: sum_squares reads x once; accumulate reads and writes sum, reads x; adamw reads and writes
 * p, m and v and reads g, 28 an element in f32, and adamw_bf16 writes two more.  Nodes that follow
 * each other go together: many tensors in a launch, a block finds its own.  Which part of x a block
 * adds up depends on the shape alone; parts are added in double, in order. */
#include "elementwise.cuh"

/* ---- sum_squares ---------------------------------------------------------------------------- */

#define SQUARE_THREADS 256
#define PART ((int64_t)1 << 14)                  /* elements of a part, as the op says */
#define EIGHTS (int)(PART / 8 / SQUARE_THREADS)  /* of a thread */

static int64_t parts_of(const fg_shape *x) { return (fg_count_of(x) + PART - 1) / PART; }

/* One tensor; its parts are first .. of the launch, and go to `part`. */
struct squared { fg_in x; int64_t n; float *part; unsigned first; };
/* One node: `count` parts follow each other and give y. */
struct squares { const float *part; int64_t count; fg_out y; };
enum { SQUARED = 96, NODES = 32 }; /* tensors, nodes of a launch: 4 KB of parameters */
struct squared_list { squared of[SQUARED]; int count; };
struct squares_list { squares of[NODES]; };

static __device__ __forceinline__ float squares_of_part(const fg_in &x, int64_t n, int64_t first)
{
    float sum[8] = { 0 };
#pragma unroll
    for (int half = 0; half < 2; half++) {
        fg_raw8 raw[EIGHTS / 2];
#pragma unroll
        for (int u = 0; u < EIGHTS / 2; u++) {
            const int64_t i = first + 8 * ((half * EIGHTS / 2 + u) * SQUARE_THREADS +
                                           (int)threadIdx.x);
            if (i + 8 <= n) raw[u] = fg_load_raw8(x, i);
        }
#pragma unroll
        for (int u = 0; u < EIGHTS / 2; u++) {
            const int64_t i = first + 8 * ((half * EIGHTS / 2 + u) * SQUARE_THREADS +
                                           (int)threadIdx.x);
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
part_squares(const __grid_constant__ squared_list list)
{
    const squared &t = list.of[fg_item_at(list, blockIdx.x)];
    const int64_t part = blockIdx.x - t.first;
    const float mine = squares_of_part(t.x, t.n, part * PART);
    const float all = fg_block_sum<SQUARE_THREADS>(mine);
    if (threadIdx.x == 0) t.part[part] = all;
}

/* One block a node: thread i adds parts i, i + 1024, ..., then the threads' sums in a tree. */
static __global__ void __launch_bounds__(1024)
add_parts(const __grid_constant__ squares_list list)
{
    __shared__ double sums[1024];
    const squares &t = list.of[blockIdx.x];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < t.count; i += 1024) sum += (double)t.part[i];
    sums[threadIdx.x] = sum;
    for (int k = 512; k > 0; k /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < k) sums[threadIdx.x] += sums[threadIdx.x + k];
    }
    if (threadIdx.x == 0) t.y.put(0, (float)sums[0]);
}

/* The node's tensors; returns its parts. */
static int64_t list_squared(const fg_exec *e, squared_list *list, unsigned *blocks)
{
    float *part = (float *)e->out[1];
    int64_t all = 0;
    for (int i = 0; i < e->n_in; i++) {
        if (!e->in[i]) continue;
        const int64_t parts = parts_of(&e->in_shape[i]);
        list->of[list->count++] = { fg_input_of(e, i), fg_count_of(&e->in_shape[i]), part + all,
                                    *blocks };
        *blocks += (unsigned)parts;
        all += parts;
    }
    return all;
}

static void squares_launch_many(const fg_exec *const *e, int n, cudaStream_t stream)
{
    for (int i = 0; i < n; ) {
        squared_list list = {};
        squares_list nodes = {};
        unsigned blocks = 0, count = 0;
        const int end = i + fg_at_once(e + i, n - i, NODES);
        for (; i < end && list.count + FG_MAX_IN <= SQUARED; i++) {
            const int64_t parts = list_squared(e[i], &list, &blocks);
            nodes.of[count++] = { (const float *)e[i]->out[1], parts, fg_output_of(e[i], 0) };
        }
        part_squares<<<blocks, SQUARE_THREADS, 0, stream>>>(list);
        add_parts<<<count, 1024, 0, stream>>>(nodes);
    }
}

static void squares_launch(const fg_exec *e, cudaStream_t stream)
{
    squares_launch_many(&e, 1, stream);
}
FG_KERNEL(sum_squares) = { .launch = squares_launch, .launch_many = squares_launch_many };

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

/* Inputs of adamw; adamw_bf16 has P16 behind V, the others one later. */
enum { P, M, V, G, CLIP, LR, STEP, P16 = 3 };

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
struct item { float *p, *m, *v; bf16 *p16; fg_in g; int64_t n; float decay; unsigned first; };
enum { ITEMS = 56, CHUNK = 4 * ADAM_THREADS * 2 };       /* of a launch; elements of a block */
struct items { item of[ITEMS]; int count; };

static __global__ void __launch_bounds__(ADAM_THREADS)
adamw(const __grid_constant__ items list, adam a, const float *clip, const float *lr,
      const float *step)
{
    const item &t = list.of[fg_item_at(list, blockIdx.x)];
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
            if (t.p16) fg_store_some<4>(fg_out{ t.p16, true }, i, pv);
        } else
            for (; i < t.n; i++) {
                update(a, f, t.g[i], &t.p[i], &t.m[i], &t.v[i]);
                if (t.p16) t.p16[i] = __float2bfloat16_rn(t.p[i]);
            }
    }
}

/* A node of either op: where it has the inputs of adamw from G on. */
struct node {
    const fg_exec *e;
    const struct fg_attr_adamw_bf16 *a;          /* that of adamw has the same fields */
    int more;                                    /* 1: it is adamw_bf16 */
};
static node node_of(const fg_exec *e)
{
    static_assert(sizeof(struct fg_attr_adamw) == sizeof(struct fg_attr_adamw_bf16), "fields");
    return { e, (const struct fg_attr_adamw_bf16 *)e->attr, e->n_out > P16 };
}
static const float *number_of(const node &n, int i) { return (const float *)n.e->in[i + n.more]; }

static adam adam_of(const struct fg_attr_adamw_bf16 *a)
{
    return { .log_beta1 = log2(a->beta1), .log_beta2 = log2(a->beta2), .decay = 0,
             .beta1 = (float)a->beta1, .rest1 = (float)(1 - a->beta1), .beta2 = (float)a->beta2,
             .rest2 = (float)(1 - a->beta2), .eps = (float)a->eps };
}

static bool together(const node &x, const node &y)
{
    for (int i = CLIP; i <= STEP; i++)
        if (number_of(x, i) != number_of(y, i)) return false;
    return x.a->beta1 == y.a->beta1 && x.a->beta2 == y.a->beta2 && x.a->eps == y.a->eps;
}

static item item_of(const node &n, unsigned first)
{
    const fg_exec *e = n.e;
    return { (float *)e->out[P], (float *)e->out[M], (float *)e->out[V],
             n.more ? (bf16 *)e->out[P16] : nullptr, fg_input_of(e, G + n.more),
             fg_count_of(&e->in_shape[P]), (float)n.a->decay, first };
}

static void adamw_launch_many(const fg_exec *const *e, int n, cudaStream_t stream)
{
    for (int i = 0; i < n; ) {
        const node head = node_of(e[i]);
        items list = {};
        unsigned blocks = 0;
        for (; i < n && list.count < ITEMS && together(head, node_of(e[i])); i++) {
            list.of[list.count] = item_of(node_of(e[i]), blocks);
            blocks += fg_blocks(list.of[list.count++].n, CHUNK);
        }
        adamw<<<blocks, ADAM_THREADS, 0, stream>>>(list, adam_of(head.a), number_of(head, CLIP),
                                                   number_of(head, LR), number_of(head, STEP));
    }
}

static void adamw_launch(const fg_exec *e, cudaStream_t stream)
{
    adamw_launch_many(&e, 1, stream);
}
/* p, m, v, clip, lr and step; g and p16 are of the dtypes that the op asks for. */
static const char *adamw_unfit(const fg_infer *c)
{
    const int more = c->n_out > P16;
    for (int i = P; i <= STEP; i++)
        if (i != G && c->in_type[i < G ? i : i + more] != FG_F32)
            return "p, m, v, clip, lr and step are f32 alone";
    return nullptr;
}
FG_KERNEL(adamw) = { .launch = adamw_launch, .unfit = adamw_unfit,
                     .launch_many = adamw_launch_many };
FG_KERNEL(adamw_bf16) = { .launch = adamw_launch, .unfit = adamw_unfit,
                          .launch_many = adamw_launch_many };
