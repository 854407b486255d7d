/* linear_cross_entropy.cu - the loss of every position from the last hidden state and the matrix of
 * the vocabulary, in slices of rows: the logits never exist whole.
 *
 *     z = x w^T     loss_t = lse_t - z_(t,label_t),  lse_t = ln sum_c e^(z_(t,c))
 *     gz_(t,c) = gloss_t (e^(z_(t,c) - lse_t) - [c = label_t])     gx = gz w     gw = gz^T x
 *
 * x, gx: [...,N]   w, gw: [V,N]   labels: i32[...]   loss, lse, gloss: f32[...]
 * z of a slice has x's dtype; its rows are padded, so that they begin at multiples of 128 bytes
 * even where V is odd.  Forward writes z once and reads it once; the gradient computes z again,
 * overwrites it by gz, and reads that twice.  gw sums the slices in order, in f32.
 * Label -100: loss 0, gradient 0.  Any other label outside [0,V): loss and gradient NaN. */
#include "gemm.cuh"

/* Each slice but the first reads and writes gw once more, and its logits take scratch. */
enum {
    SLICE_BYTES = 512 << 20,     /* of the logits of a slice, about */
    ROW_STEP = 128,              /* a slice has a multiple of this many rows */
    THREADS = 256,               /* of the block that walks one row */
    AHEAD = 4                    /* vectors of 8 logits that a thread has in flight */
};

typedef struct { int64_t rows, V, N, step, pitch; size_t z_bytes; } extents;

static extents extents_of(const fg_shape *x, const fg_shape *w, fg_dtype type)
{
    extents s = { 1, w->dim[0], w->dim[1], 0, 0, 0 };
    for (int i = 0; i + 1 < x->rank; i++) s.rows *= x->dim[i];
    const int64_t size = type == FG_BF16 ? 2 : 4;
    s.pitch = (s.V + 63) / 64 * 64;
    int64_t most = SLICE_BYTES / (s.pitch * size);
    if (most < ROW_STEP) most = ROW_STEP;
    const int64_t slices = (s.rows + most - 1) / most;
    s.step = slices > 0 ? (s.rows + slices - 1) / slices : 1;
    if (slices > 1) s.step = (s.step + ROW_STEP - 1) / ROW_STEP * ROW_STEP;
    s.z_bytes = (size_t)(s.step * s.pitch * size);
    return s;
}

/* ---- one row, by one block ------------------------------------------------------------------ */

/* Eight logits as they lie in memory. */
template <bool NARROW> struct packed { uint4 u[NARROW ? 1 : 2]; };

template <bool NARROW>
static __device__ __forceinline__ packed<NARROW> load(const void *row, int vector)
{
    packed<NARROW> p;
    const uint4 *q = (const uint4 *)row + (int64_t)vector * (NARROW ? 1 : 2);
    p.u[0] = q[0];
    if (!NARROW) p.u[!NARROW] = q[1];
    return p;
}

template <bool NARROW> static __device__ __forceinline__ fg_vec8 unpack(const packed<NARROW> &p)
{
    fg_vec8 x;
    if (NARROW) fg_unpack(p.u[0], x.v);
    else {
        *(uint4 *)x.v = p.u[0];
        *(uint4 *)(x.v + 4) = p.u[!NARROW];
    }
    return x;
}

/* e^x to 2^-20 for x from -87 to 0; below that 0.  One multiplication and the hardware's 2^x. */
static __device__ __forceinline__ float exp_of(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
    return y;
}

/* The greatest x so far and the sum of e^(x - greatest). */
struct running {
    float most, sum;
    __device__ __forceinline__ void add8(const fg_vec8 &x)
    {
        float here = x[0];
#pragma unroll
        for (int i = 1; i < 8; i++) here = fmaxf(here, x[i]);
        if (here > most) {
            sum *= exp_of(most - here);
            most = here;
        }
        const float shift = most == -INFINITY ? 0 : most;        /* NaN in x reaches sum */
        float a = 0, b = 0;
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            a += exp_of(x[i] - shift);
            b += exp_of(x[i + 1] - shift);
        }
        sum += a + b;
    }
};

static __device__ float block_max(float x)
{
    __shared__ float part[THREADS / 32];
    x = fg_warp_max(x);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    x = part[0];
#pragma unroll
    for (int i = 1; i < THREADS / 32; i++) x = fmaxf(x, part[i]);
    return x;
}

template <bool NARROW>
static __global__ void __launch_bounds__(THREADS)
row_loss(const void *z, int64_t pitch, int V, const int32_t *labels, float *loss, float *lse)
{
    const void *x = (const char *)z + blockIdx.x * pitch * (NARROW ? 2 : 4);
    const fg_in element = { x, NARROW };
    const int whole = V / 8;
    running r = { -INFINITY, 0 };
    for (int from = threadIdx.x; from < whole; from += THREADS * AHEAD) {
        packed<NARROW> p[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (from + k * THREADS < whole) p[k] = load<NARROW>(x, from + k * THREADS);
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (from + k * THREADS < whole) r.add8(unpack(p[k]));
    }
    if (threadIdx.x < V % 8) {
        fg_vec8 v;
#pragma unroll
        for (int i = 1; i < 8; i++) v[i] = -INFINITY;
        v[0] = element[whole * 8 + threadIdx.x];
        r.add8(v);
    }
    const float most = block_max(r.most), shift = most == -INFINITY ? 0 : most;
    const float scale = r.most == -INFINITY ? 1 : exp_of(r.most - shift);
    const float sum = fg_block_sum<THREADS>(r.sum * scale);
    if (threadIdx.x > 0) return;
    const int32_t label = labels[blockIdx.x];
    const float total = most == -INFINITY ? most + sum : most + logf(sum);
    lse[blockIdx.x] = total;
    loss[blockIdx.x] = label == -100 ? 0 : label >= 0 && label < V ? total - element[label] : NAN;
}

/* z becomes gz. */
template <bool NARROW>
static __global__ void __launch_bounds__(THREADS)
row_grad(void *z, int64_t pitch, int V, const float *gloss, const int32_t *labels,
         const float *lse)
{
    void *x = (char *)z + blockIdx.x * pitch * (NARROW ? 2 : 4);
    const fg_in element = { x, NARROW };
    const fg_out y = { x, NARROW };
    const int32_t label = labels[blockIdx.x];
    const int whole = V / 8, last = whole * 8 + (int)threadIdx.x;
    if (label == -100) {
        for (int from = threadIdx.x; from < whole; from += THREADS)
            fg_store8(y, (int64_t)from * 8, fg_vec8{});
        if (last < V) y.put(last, 0);
        return;
    }
    const float scale = label >= 0 && label < V ? gloss[blockIdx.x] : NAN, shift = lse[blockIdx.x];
    for (int from = threadIdx.x; from < whole; from += THREADS * AHEAD) {
        packed<NARROW> p[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (from + k * THREADS < whole) p[k] = load<NARROW>(x, from + k * THREADS);
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            if (from + k * THREADS >= whole) continue;
            fg_vec8 v = unpack(p[k]);
            const unsigned at = (unsigned)label - (unsigned)(from + k * THREADS) * 8;
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] = scale * exp_of(v[i] - shift);
            if (at < 8)
#pragma unroll
                for (int i = 0; i < 8; i++) v[i] -= at == (unsigned)i ? scale : 0;
            fg_store8(y, (int64_t)(from + k * THREADS) * 8, v);
        }
    }
    if (last < V)
        y.put(last, scale * exp_of(element[last] - shift) - (last == label ? scale : 0));
}

/* ---- the ops -------------------------------------------------------------------------------- */

/* z = x w^T for n rows from row `from` on. */
static void logits(const fg_exec *e, int at, const extents *s, int64_t from, int64_t n, void *z,
                   cudaStream_t stream)
{
    const size_t size = e->in_type[at] == FG_BF16 ? 2 : 4;
    fg_gemm_call g = fg_gemm_of(n, s->V, s->N, false, true);
    g.a = (const char *)e->in[at] + (size_t)(from * s->N) * size;
    g.b = e->in[at + 1], g.y = z, g.work = e->scratch, g.pitch_y = s->pitch;
    g.type = g.y_type = e->in_type[at];
    fg_gemm(&g, stream);
}

static const char *product_unfit(const fg_shape *w, fg_dtype x_type, fg_dtype w_type, fg_dtype y)
{
    if (w->dim[0] > INT32_MAX - 4096) return "the vocabulary has more rows than a label can name";
    return fg_gemm_unfit(x_type, w_type, y);
}

static const char *unfit(const fg_infer *c)
{
    return product_unfit(&c->in[1], c->in_type[0], c->in_type[1], c->in_type[0]);
}

static size_t scratch(const fg_infer *c)
{
    return FG_GEMM_WORK + extents_of(&c->in[0], &c->in[1], c->in_type[0]).z_bytes;
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const bool narrow = e->in_type[0] == FG_BF16;
    const extents s = extents_of(&e->in_shape[0], &e->in_shape[1], e->in_type[0]);
    const int32_t *labels = (const int32_t *)e->in[2];
    float *loss = (float *)e->out[0], *lse = (float *)e->out[1];
    void *z = (char *)e->scratch + FG_GEMM_WORK;
    for (int64_t from = 0; from < s.rows; from += s.step) {
        const int64_t n = s.rows - from < s.step ? s.rows - from : s.step;
        logits(e, 0, &s, from, n, z, stream);
        (narrow ? row_loss<true> : row_loss<false>)<<<(unsigned)n, THREADS, 0, stream>>>(
            z, s.pitch, (int)s.V, labels + from, loss + from, lse + from);
    }
}

FG_KERNEL(linear_cross_entropy) = { .launch = launch, .unfit = unfit, .scratch = scratch };

static const char *grad_unfit(const fg_infer *c)
{
    const char *gx = product_unfit(&c->in[2], c->in_type[1], c->in_type[2], c->out_type[0]);
    return gx ? gx : fg_gemm_unfit(c->in_type[1], c->in_type[2], c->out_type[1]);
}

static size_t grad_scratch(const fg_infer *c)
{
    const extents s = extents_of(&c->in[1], &c->in[2], c->in_type[1]);
    const bool wide = c->out_type[1] == FG_BF16 && s.step < s.rows;      /* gw's sum in f32 */
    return FG_GEMM_WORK + s.z_bytes + (wide ? (size_t)(s.V * s.N) * 4 : 0);
}

/* gx = gz w for the slice, and gw += gz^T x, or = for the first. */
static void grad_products(const fg_exec *e, const extents *s, int64_t from, int64_t n,
                          const void *gz, const fg_out &gw, cudaStream_t stream)
{
    const size_t x_size = e->in_type[1] == FG_BF16 ? 2 : 4;
    const size_t gx_size = e->out_type[0] == FG_BF16 ? 2 : 4;
    fg_gemm_call g = fg_gemm_of(n, s->N, s->V, false, false);
    g.a = gz, g.b = e->in[2], g.work = e->scratch, g.pitch_a = s->pitch;
    g.y = (char *)e->out[0] + (size_t)(from * s->N) * gx_size;
    g.type = e->in_type[1], g.y_type = e->out_type[0];
    fg_gemm(&g, stream);
    fg_gemm_call h = fg_gemm_of(s->V, s->N, n, true, false);
    h.a = gz, h.b = (const char *)e->in[1] + (size_t)(from * s->N) * x_size;
    h.y = gw.p, h.work = e->scratch, h.pitch_a = s->pitch, h.beta = from > 0 ? 1 : 0;
    h.type = e->in_type[1], h.y_type = gw.narrow ? FG_BF16 : FG_F32;
    fg_gemm(&h, stream);
}

static void grad_launch(const fg_exec *e, cudaStream_t stream)
{
    const bool narrow = e->in_type[1] == FG_BF16;
    const extents s = extents_of(&e->in_shape[1], &e->in_shape[2], e->in_type[1]);
    const float *gloss = (const float *)e->in[0], *lse = (const float *)e->in[4];
    const int32_t *labels = (const int32_t *)e->in[3];
    char *z = (char *)e->scratch + FG_GEMM_WORK;
    const bool wide = e->out_type[1] == FG_BF16 && s.step < s.rows;
    const fg_out gw = fg_output_of(e, 1), sum = wide ? fg_out{ z + s.z_bytes, false } : gw;
    for (int64_t from = 0; from < s.rows; from += s.step) {
        const int64_t n = s.rows - from < s.step ? s.rows - from : s.step;
        logits(e, 1, &s, from, n, z, stream);
        (narrow ? row_grad<true> : row_grad<false>)<<<(unsigned)n, THREADS, 0, stream>>>(
            z, s.pitch, (int)s.V, gloss + from, labels + from, lse + from);
        grad_products(e, &s, from, n, z, sum, stream);
    }
    if (s.rows == 0) grad_products(e, &s, 0, 0, z, gw, stream);
    if (wide) fg_convert(fg_in{ sum.p, false }, gw, s.V * s.N, stream);
}

FG_KERNEL(linear_cross_entropy_grad) = {
    .launch = grad_launch, .unfit = grad_unfit, .scratch = grad_scratch,
};
