/* linear_cross_entropy.cu - the loss of every position from the last hidden state and the matrix of
 * the vocabulary, in slices of rows: the logits never exist whole.
 *
 *     z = x w^T     loss_t = lse_t - z_(t,label_t),  lse_t = ln sum_c e^(z_(t,c))
 *     gz_(t,c) = gloss_t (e^(z_(t,c) - lse_t) - [c = label_t])     gx = gz w     gw = gz^T x
 *
 * x, gx: [...,N]   w, gw: [V,N]   labels: i32[...]   loss, lse, gloss: f32[...]
 * z of a slice has x's dtype; its rows are padded, so that they begin at multiples of 128 bytes
 * even where V is odd.  Forward writes z once and reads it once; the gradient computes z again,
 * overwrites it by gz, and reads that twice; where both are one op, a row of bf16 lies in shared
 * memory between loss and gz.  gw sums the slices in order, in f32.
 * Label -100: loss 0, gradient 0.  Any other label outside [0,V): loss and gradient NaN. */
#include "gemm.cuh"

/* Each slice but the first reads and writes gw once more, and its logits take scratch. */
enum {
    SLICE_BYTES = 512 << 20, /* of the logits of a slice, about */
    ROW_STEP = 128,          /* a slice has a multiple of this many rows */
    THREADS = 256,           /* of the block that walks one row */
    BOTH_THREADS = 512,      /* of the block that walks one row for loss and gradient */
    BOTH_BYTES = 113 << 10,  /* of shared memory for that row: two fit in a processor of sm_90 */
    AHEAD = 4                /* vectors of 8 logits that a thread has in flight */
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

template <int COUNT> static __device__ float block_max(float x)
{
    __shared__ float part[COUNT / 32];
    x = fg_warp_max(x);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    x = part[0];
#pragma unroll
    for (int i = 1; i < COUNT / 32; i++) x = fmaxf(x, part[i]);
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
    const float most = block_max<THREADS>(r.most), shift = most == -INFINITY ? 0 : most;
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

/* Loss, and z becomes gz: the row is read once, and kept in shared memory. */
static __global__ void __launch_bounds__(BOTH_THREADS, 2)
row_both(void *z, int64_t pitch, int V, const int32_t *labels, const float *gloss, float *loss,
         float *lse)
{
    extern __shared__ uint4 kept[];
    void *x = (char *)z + blockIdx.x * pitch * 2;
    const fg_in element = { x, true };
    const fg_out y = { x, true };
    const int32_t label = labels[blockIdx.x];
    const int whole = V / 8, last = whole * 8 + (int)threadIdx.x;
    const float end = last < V ? element[last] : -INFINITY;
    const bool named = label >= 0 && label < V;
    const float own = named && threadIdx.x == 0 ? element[label] : 0;
    running r = { -INFINITY, 0 };
    for (int from = threadIdx.x; from < whole; from += BOTH_THREADS * AHEAD) {
        packed<true> p[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (from + k * BOTH_THREADS < whole) p[k] = load<true>(x, from + k * BOTH_THREADS);
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            if (from + k * BOTH_THREADS >= whole) continue;
            kept[from + k * BOTH_THREADS] = p[k].u[0];
            r.add8(unpack(p[k]));
        }
    }
    if (last < V) {
        fg_vec8 v;
#pragma unroll
        for (int i = 1; i < 8; i++) v[i] = -INFINITY;
        v[0] = end;
        r.add8(v);
    }
    const float most = block_max<BOTH_THREADS>(r.most), shift = most == -INFINITY ? 0 : most;
    const float part = r.most == -INFINITY ? 1 : exp_of(r.most - shift);
    const float sum = fg_block_sum<BOTH_THREADS>(r.sum * part);
    const float total = most == -INFINITY ? most + sum : most + logf(sum);
    if (threadIdx.x == 0) {
        lse[blockIdx.x] = total;
        loss[blockIdx.x] = label == -100 ? 0 : named ? total - own : NAN;
    }
    const float scale = label == -100 ? 0 : named ? gloss[blockIdx.x] : NAN;
    for (int at = threadIdx.x; at < whole; at += BOTH_THREADS) {     /* its own vectors */
        fg_vec8 v;
        fg_unpack(kept[at], v.v);
        const unsigned here = (unsigned)label - (unsigned)at * 8;
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = label == -100 ? 0 : scale * exp_of(v[i] - total);
        if (here < 8)
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] -= here == (unsigned)i ? scale : 0;
        fg_store8(y, (int64_t)at * 8, v);
    }
    if (last < V)
        y.put(last, label == -100 ? 0 : scale * exp_of(end - total) - (last == label ? scale : 0));
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

static size_t gradient_scratch(const fg_shape *x, const fg_shape *w, fg_dtype x_type, fg_dtype gw)
{
    const extents s = extents_of(x, w, x_type);
    const bool wide = gw == FG_BF16 && s.step < s.rows;      /* gw's sum in f32 */
    return FG_GEMM_WORK + s.z_bytes + (wide ? (size_t)(s.V * s.N) * 4 : 0);
}
static size_t grad_scratch(const fg_infer *c)
{
    return gradient_scratch(&c->in[1], &c->in[2], c->in_type[1], c->out_type[1]);
}

/* Where an op has its inputs x, w and outputs gx, gw. */
struct places { int x, gx; };

/* gx = gz w for the slice, and gw += gz^T x, or = for the first. */
static void grad_products(const fg_exec *e, places at, const extents *s, int64_t from, int64_t n,
                          const void *gz, const fg_out &gw, cudaStream_t stream)
{
    const size_t x_size = e->in_type[at.x] == FG_BF16 ? 2 : 4;
    const size_t gx_size = e->out_type[at.gx] == FG_BF16 ? 2 : 4;
    fg_gemm_call g = fg_gemm_of(n, s->N, s->V, false, false);
    g.a = gz, g.b = e->in[at.x + 1], g.work = e->scratch, g.pitch_a = s->pitch;
    g.y = (char *)e->out[at.gx] + (size_t)(from * s->N) * gx_size;
    g.type = e->in_type[at.x], g.y_type = e->out_type[at.gx];
    fg_gemm(&g, stream);
    fg_gemm_call h = fg_gemm_of(s->V, s->N, n, true, false);
    h.a = gz, h.b = (const char *)e->in[at.x] + (size_t)(from * s->N) * x_size;
    h.y = gw.p, h.work = e->scratch, h.pitch_a = s->pitch, h.beta = from > 0 ? 1 : 0;
    h.type = e->in_type[at.x], h.y_type = gw.narrow ? FG_BF16 : FG_F32;
    fg_gemm(&h, stream);
}

/* What turns the n logits of rows `from` on into their gradients. */
template <class F>
static void each_slice(const fg_exec *e, places at, cudaStream_t stream, const F &rows)
{
    const extents s = extents_of(&e->in_shape[at.x], &e->in_shape[at.x + 1], e->in_type[at.x]);
    char *z = (char *)e->scratch + FG_GEMM_WORK;
    const bool wide = e->out_type[at.gx + 1] == FG_BF16 && s.step < s.rows;
    const fg_out gw = fg_output_of(e, at.gx + 1), sum = wide ? fg_out{ z + s.z_bytes, false } : gw;
    for (int64_t from = 0; from < s.rows; from += s.step) {
        const int64_t n = s.rows - from < s.step ? s.rows - from : s.step;
        logits(e, at.x, &s, from, n, z, stream);
        rows(s, z, from, (unsigned)n);
        grad_products(e, at, &s, from, n, z, sum, stream);
    }
    if (s.rows == 0) grad_products(e, at, &s, 0, 0, z, gw, stream);
    if (wide) fg_convert(fg_in{ sum.p, false }, gw, s.V * s.N, stream);
}

static void grad_launch(const fg_exec *e, cudaStream_t stream)
{
    const bool narrow = e->in_type[1] == FG_BF16;
    const float *gloss = (const float *)e->in[0], *lse = (const float *)e->in[4];
    const int32_t *labels = (const int32_t *)e->in[3];
    each_slice(e, { 1, 0 }, stream, [&](const extents &s, void *z, int64_t from, unsigned n) {
        (narrow ? row_grad<true> : row_grad<false>)<<<n, THREADS, 0, stream>>>(
            z, s.pitch, (int)s.V, gloss + from, labels + from, lse + from);
    });
}

FG_KERNEL(linear_cross_entropy_grad) = {
    .launch = grad_launch, .unfit = grad_unfit, .scratch = grad_scratch,
};

static const char *both_unfit(const fg_infer *c)
{
    const char *gx = product_unfit(&c->in[1], c->in_type[0], c->in_type[1], c->out_type[2]);
    return gx ? gx : fg_gemm_unfit(c->in_type[0], c->in_type[1], c->out_type[3]);
}

static size_t both_scratch(const fg_infer *c)
{
    return gradient_scratch(&c->in[0], &c->in[1], c->in_type[0], c->out_type[3]);
}

/* Does a row lie in the shared memory that a block of this device may have? */
static bool row_fits(bool narrow, int64_t V)
{
    const int bytes = (int)(V / 8 * 16);
    return narrow && V / 8 * 16 <= BOTH_BYTES &&
           cudaFuncSetAttribute(row_both, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) ==
           cudaSuccess;
}

static void both_launch(const fg_exec *e, cudaStream_t stream)
{
    const bool narrow = e->in_type[0] == FG_BF16, fits = row_fits(narrow, e->in_shape[1].dim[0]);
    const int32_t *labels = (const int32_t *)e->in[2];
    const float *gloss = (const float *)e->in[3];
    float *loss = (float *)e->out[0], *lse = (float *)e->out[1];
    (void)cudaGetLastError();
    each_slice(e, { 0, 2 }, stream, [&](const extents &s, void *z, int64_t from, unsigned n) {
        if (fits) {
            row_both<<<n, BOTH_THREADS, (size_t)(s.V / 8 * 16), stream>>>(
                z, s.pitch, (int)s.V, labels + from, gloss + from, loss + from, lse + from);
            return;
        }
        (narrow ? row_loss<true> : row_loss<false>)<<<n, THREADS, 0, stream>>>(
            z, s.pitch, (int)s.V, labels + from, loss + from, lse + from);
        (narrow ? row_grad<true> : row_grad<false>)<<<n, THREADS, 0, stream>>>(
            z, s.pitch, (int)s.V, gloss + from, labels + from, lse + from);
    });
}

FG_KERNEL(linear_cross_entropy_both) = {
    .launch = both_launch, .unfit = both_unfit, .scratch = both_scratch,
};
