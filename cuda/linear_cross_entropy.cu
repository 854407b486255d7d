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
    THREADS = 512,               /* of the block that walks one row */
    AHEAD = 4                    /* 16-byte vectors of bf16 a thread has in flight */
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

/* The greatest x so far and the sum of e^(x - greatest). */
struct running {
    float most, sum;
    __device__ void add8(const fg_vec8 &x)
    {
        float here = x[0];
#pragma unroll
        for (int i = 1; i < 8; i++) here = fmaxf(here, x[i]);
        if (here > most) {
            sum *= __expf(most - here);
            most = here;
        }
        const float shift = most == -INFINITY ? 0 : most;        /* NaN in x reaches sum */
#pragma unroll
        for (int i = 0; i < 8; i++) sum += __expf(x[i] - shift);
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
row_loss(const void *z, int64_t pitch, int64_t V, const int32_t *labels, float *loss, float *lse)
{
    const int64_t row = blockIdx.x;
    const fg_in x = { z, NARROW };
    running r = { -INFINITY, 0 };
    for (int64_t from = threadIdx.x; from < V / 8; from += THREADS * AHEAD) {
        fg_vec8 v[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (from + k * THREADS < V / 8)
                v[k] = fg_load8(x, row * pitch + (from + k * THREADS) * 8);
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (from + k * THREADS < V / 8) r.add8(v[k]);
    }
    if (threadIdx.x < V % 8) {
        fg_vec8 v;
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = -INFINITY;
        v[0] = x[row * pitch + V / 8 * 8 + threadIdx.x];
        r.add8(v);
    }
    const float most = block_max(r.most), shift = most == -INFINITY ? 0 : most;
    const float scale = r.most == -INFINITY ? 1 : __expf(r.most - shift);
    const float sum = fg_block_sum<THREADS>(r.sum * scale);
    if (threadIdx.x > 0) return;
    const int32_t label = labels[row];
    const float total = most == -INFINITY ? most + sum : most + logf(sum);
    lse[row] = total;
    loss[row] = label == -100 ? 0 : label >= 0 && label < V ? total - x[row * pitch + label] : NAN;
}

/* z becomes gz. */
template <bool NARROW>
static __global__ void __launch_bounds__(THREADS)
row_grad(void *z, int64_t pitch, int64_t V, const float *gloss, const int32_t *labels,
         const float *lse)
{
    const int64_t row = blockIdx.x;
    const int32_t label = labels[row];
    const bool valid = label >= 0 && label < V, none = label == -100;
    const float scale = none ? 0 : valid ? gloss[row] : NAN, shift = lse[row];
    const fg_in x = { z, NARROW };
    const fg_out y = { z, NARROW };
    const auto grad = [&](float x, int64_t c) {
        return none ? 0 : scale * (__expf(x - shift) - (c == label ? 1.0f : 0.0f));
    };
    for (int64_t from = threadIdx.x; from < V / 8; from += THREADS * AHEAD) {
        fg_vec8 v[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (from + k * THREADS < V / 8)
                v[k] = fg_load8(x, row * pitch + (from + k * THREADS) * 8);
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const int64_t c = (from + k * THREADS) * 8;
            if (c + 8 > V) continue;
#pragma unroll
            for (int i = 0; i < 8; i++) v[k][i] = grad(v[k][i], c + i);
            fg_store8(y, row * pitch + c, v[k]);
        }
    }
    const int64_t c = V / 8 * 8 + threadIdx.x;
    if (c < V) y.put(row * pitch + c, grad(x[row * pitch + c], c));
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

static const char *unfit(const fg_infer *c)
{
    return fg_gemm_unfit(c->in_type[0], c->in_type[1], c->in_type[0]);
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
            z, s.pitch, s.V, labels + from, loss + from, lse + from);
    }
}

FG_KERNEL(linear_cross_entropy) = { .launch = launch, .unfit = unfit, .scratch = scratch };

static const char *grad_unfit(const fg_infer *c)
{
    const char *x = fg_gemm_unfit(c->in_type[1], c->in_type[2], c->out_type[0]);
    return x ? x : fg_gemm_unfit(c->in_type[1], c->in_type[2], c->out_type[1]);
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
            z, s.pitch, s.V, gloss + from, labels + from, lse + from);
        grad_products(e, &s, from, n, z, sum, stream);
    }
    if (s.rows == 0) grad_products(e, &s, 0, 0, z, gw, stream);
    if (wide) fg_convert(fg_in{ sum.p, false }, gw, s.V * s.N, stream);
}

FG_KERNEL(linear_cross_entropy_grad) = {
    .launch = grad_launch, .unfit = grad_unfit, .scratch = grad_scratch,
};
