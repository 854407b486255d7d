/* shift_norm.cu - the token shift with its gate, and the norm of every head behind it, in one pass:
 * ops/shift_norm.c on a GPU.
 *
 *     s_t = a_t x_(t-1) + (1 - a_t) x_t,  a = sigmoid(logit);   y_t = s_t rstd_t w
 *     h = s rstd:  gs = rstd (w gy - h mean(w gy h)),  gw = sum over rows of gy h,
 *     gx_t = (1 - a_t) gs_t + a_(t+1) gs_(t+1),
 *     glogit_t = a_t (1 - a_t) sum over channels of gs_t (x_(t-1) - x_t)
 *
 * A lane holds eight channels, a head is D / 8 neighbouring lanes.  Forward, a thread walks STRIP
 * rows downwards.  Backward, a warp walks a run of rows upwards, the next one on its way, and hands
 * a_t gs_t to the row before; gs of the row behind its run it computes besides.
 * Bytes: every tensor once from memory; neighbouring rows again, one in STRIP forward and one in a
 * run (20 to 40 rows at 16384) backward, mostly from cache; partial sums of gw, under 1%. */
#include "norm.cuh"
#include "rows.cuh"

/* H100, 2026-11. */
constexpr int THREADS = 256, STRIP = 4;          /* forward: of a block; rows of a thread */
constexpr int WARPS = 4, BLOCKS = 4;             /* backward: of a block; of a processor */
constexpr int RUN = 4;                           /* fewest rows of a warp */

struct geometry {
    const int32_t *first, *past;
    int64_t B, T, H, D, C, rows;                 /* C = H D, rows = B T */
    fg_divisor columns, strips, length, width;   /* eights of a row; strips of a sequence; T; D */
    int lanes;                                   /* of a head */
};

static geometry geometry_of(const fg_shape *s)
{
    geometry k = {};
    k.B = s->dim[0], k.T = s->dim[1], k.H = s->dim[2], k.D = s->dim[3];
    k.C = k.H * k.D, k.rows = k.B * k.T, k.lanes = (int)(k.D / 8);
    k.columns = fg_divisor_of(k.C / 8), k.strips = fg_divisor_of((k.T + STRIP - 1) / STRIP);
    k.length = fg_divisor_of(k.T), k.width = fg_divisor_of(k.D);
    return k;
}

static const char *unfit_shape(const fg_shape *s)
{
    const int64_t D = s->dim[3];
    return D % 8 == 0 && D <= 256 && (D & (D - 1)) == 0 && s->dim[2] < 1 << 20
         ? nullptr : "heads must be 8, 16, 32, 64, 128 or 256 wide";
}

/* What row t of a sequence is, `row` of all: PAD gives 0, START has nothing before it. */
enum place { PAD, START, INSIDE };
static __device__ __forceinline__ place place_of(const int32_t *first, int64_t past, int64_t row,
                                                 int64_t t)
{
    const int64_t low = first && first[row] > 0 ? first[row] : 0, p = past + t;
    return low > p ? PAD : low == p ? START : INSIDE;
}

/* The sum over the lanes of a head. */
static __device__ __forceinline__ float head_sum(float x, int lanes)
{
    for (int d = lanes / 2; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
    return x;
}

/* s = a p + (1 - a) x where there is a row before, (1 - a) x at a document's first, 0 in padding. */
static __device__ __forceinline__ float shift(place is, float a, float p, float x)
{
    const float keep = is == PAD ? 0 : (1 - a) * x;
    return is == INSIDE ? fmaf(a, p, keep) : keep;
}

/* ---- forward -------------------------------------------------------------------------------- */

struct forward {
    geometry k;
    fg_in x, logit, prev, w;
    fg_out y;
    norm_rows x_rows, logit_rows, y_rows;
    float *rstd;
    float eps;
    bool shared;                                 /* w holds one head's gains */
};

template <bool NORM>
static __global__ void __launch_bounds__(THREADS) shift_rows(const forward f)
{
    const geometry &k = f.k;
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, all = k.B * k.strips.d;
    const int64_t q = fg_divide(i, k.columns), b = fg_divide(q, k.strips);
    const bool there = q < all;
    const int column = (int)(i - q * k.columns.d) * 8, head = (int)fg_divide(column, k.width);
    const int64_t t = (q - b * k.strips.d) * STRIP, row = b * k.T + t, left = there ? k.T - t : 0;
    const int64_t past = k.past ? *k.past : 0;
    const bool from_prev = t == 0 && f.prev.p;
    fg_raw8 raw[STRIP + 1] = {};
    float a[STRIP];
    if (left > 0 && t > 0) raw[0] = fg_load_raw8(f.x, norm_row(f.x_rows, row - 1) + column);
    else if (left > 0 && from_prev) raw[0] = fg_load_raw8(f.prev, b * k.C + column);
#pragma unroll
    for (int u = 0; u < STRIP; u++) {
        a[u] = 0;
        if (u >= left) continue;
        raw[u + 1] = fg_load_raw8(f.x, norm_row(f.x_rows, row + u) + column);
        a[u] = f.logit[norm_row(f.logit_rows, row + u) + head];
    }
    fg_vec8 w, p = fg_floats(from_prev ? f.prev : f.x, raw[0]);
    if (NORM) w = fg_load8(f.w, f.shared ? column - head * k.D : column);
#pragma unroll
    for (int u = 0; u < STRIP; u++) {
        const place is = u < left ? place_of(k.first, past, row + u, t + u) : PAD;
        const fg_vec8 x = fg_floats(f.x, raw[u + 1]);
        const float gate = 1.0f / (1.0f + __expf(-a[u]));
        fg_vec8 s;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            s[j] = shift(is, gate, p[j], x[j]);
            sum = fmaf(s[j], s[j], sum);
        }
        p = x;
        if (NORM) {
            const float rstd = 1.0f / sqrtf(head_sum(sum, k.lanes) / (float)k.D + f.eps);
#pragma unroll
            for (int j = 0; j < 8; j++) s[j] = s[j] * rstd * w[j];
            if (u < left && column - head * k.D == 0) f.rstd[(row + u) * k.H + head] = rstd;
        }
        if (u < left) fg_store8(f.y, norm_row(f.y_rows, row + u) + column, s);
    }
}

template <bool NORM> static void start(const fg_exec *e, forward &f, int sequence,
                                       cudaStream_t stream)
{
    f.k = geometry_of(&e->in_shape[0]);
    f.k.first = (const int32_t *)e->in[sequence];
    f.k.past = (const int32_t *)e->in[sequence + 1];
    f.x = fg_input_of(e, 0), f.logit = fg_input_of(e, 1), f.y = fg_output_of(e, 0);
    if (e->in[sequence + 2]) f.prev = fg_input_of(e, sequence + 2);
    f.x_rows = norm_rows_of(&e->in_rows[0], f.k.C);
    f.logit_rows = norm_rows_of(&e->in_rows[1], f.k.H);
    f.y_rows = norm_rows_of(&e->out_rows[0], f.k.C);
    const int64_t threads = f.k.B * f.k.strips.d * f.k.columns.d;
    if (f.k.rows > 0 && f.k.C > 0)
        shift_rows<NORM><<<fg_blocks(threads, THREADS), THREADS, 0, stream>>>(f);
}

static void gate_launch(const fg_exec *e, cudaStream_t stream)
{
    forward f = {};
    start<false>(e, f, 2, stream);
}
static void norm_op_launch(const fg_exec *e, cudaStream_t stream)
{
    forward f = {};
    f.w = fg_input_of(e, 2), f.shared = fg_last_of(&e->in_shape[2]) == e->in_shape[0].dim[3];
    f.rstd = (float *)e->out[1];
    f.eps = (float)((const struct fg_attr_shift_norm *)e->attr)->eps;
    start<true>(e, f, 3, stream);
}
static const char *unfit(const fg_infer *c) { return unfit_shape(&c->in[0]); }

FG_KERNEL(shift_gate) = { .launch = gate_launch, .unfit = unfit, .pitched_in = 3, .pitched_out = 1 };
FG_KERNEL(shift_norm) = {
    .launch = norm_op_launch, .unfit = unfit, .pitched_in = 3, .pitched_out = 1,
};

/* ---- gradients ------------------------------------------------------------------------------ */

struct backward {
    geometry k;
    fg_in gy, x, logit, w;
    fg_out gx, glogit;
    norm_rows gy_rows, x_rows, logit_rows, gx_rows, glogit_rows;
    const float *rstd;
    float *part;                                 /* [blocks, C]: partial sums of gw */
    int64_t runs;
    bool shared;
};

/* What row t needs from memory besides x_t: its gradient, the row before it, gate and scale. */
struct fetched { fg_raw8 gy, before; float logit, rstd; int64_t t; place is; };

template <bool NORM>
static __device__ __forceinline__ fetched fetch(const backward &f, int64_t row, int column, int head,
                                                bool ok)
{
    const geometry &k = f.k;
    fetched r = {};
    r.t = row - fg_divide(row, k.length) * k.T;
    r.is = place_of(k.first, 0, row, r.t);
    if (!ok) return r;
    r.gy = fg_load_raw8(f.gy, norm_row(f.gy_rows, row) + column);
    if (row > 0) r.before = fg_load_raw8(f.x, norm_row(f.x_rows, row - 1) + column);
    r.logit = f.logit[norm_row(f.logit_rows, row) + head];
    if (NORM) r.rstd = f.rstd[row * k.H + head];
    return r;
}

/* The block's sums of gw: its warps' rows, added in order. */
static __device__ __forceinline__ void leave_gain(const backward &f, float (*part)[256],
                                                  const float *gw, int lane)
{
#pragma unroll
    for (int j = 0; j < 8; j++) part[threadIdx.x / 32][lane * 8 + j] = gw[j];
    __syncthreads();
    for (int j = threadIdx.x; j < 256; j += 32 * WARPS) {
        const int64_t column = blockIdx.y * (int64_t)256 + j;
        float sum = 0;
        for (int warp = 0; warp < WARPS; warp++) sum += part[warp][j];
        if (column < f.k.C) f.part[blockIdx.x * f.k.C + column] = sum;
    }
}

template <bool NORM>
static __global__ void __launch_bounds__(32 * WARPS, BLOCKS) unshift_rows(const backward f)
{
    __shared__ float part[NORM ? WARPS : 1][256];
    const geometry &k = f.k;
    const int lane = threadIdx.x % 32, column = (blockIdx.y * 32 + lane) * 8;
    const bool ok = column < k.C;
    const int head = ok ? (int)fg_divide(column, k.width) : 0, inside = column - head * (int)k.D;
    const int64_t run = blockIdx.x * (int64_t)WARPS + threadIdx.x / 32;
    const int64_t from = norm_first(k.rows, f.runs, run), to = norm_first(k.rows, f.runs, run + 1);
    const bool more = from < to && to < k.rows && fg_divide(to, k.length) * k.T != to;
    int64_t row = more ? to : to - 1;                        /* the last, or the one behind it */
    fg_vec8 w, gw = {}, later = {};                          /* later: a gs of the row behind */
    if (NORM && ok) w = fg_load8(f.w, f.shared ? inside : column);
    fg_raw8 x = {};
    fetched next = {};
    if (from < to) {
        if (ok) x = fg_load_raw8(f.x, norm_row(f.x_rows, row) + column);
        next = fetch<NORM>(f, row, column, head, ok);
    }
    for (; row >= from && from < to; row--) {
        const fetched r = next;
        if (row > from) next = fetch<NORM>(f, row - 1, column, head, ok);
        const fg_vec8 v = fg_floats(f.x, x), p = fg_floats(f.x, r.before);
        const float a = 1.0f / (1.0f + __expf(-r.logit)), keep = r.is == PAD ? 0 : 1 - a;
        fg_vec8 gs = fg_floats(f.gy, r.gy);
        if (NORM) {
            float sum = 0;
            fg_vec8 h;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                h[j] = shift(r.is, a, p[j], v[j]) * r.rstd;
                if (row < to) gw[j] = fmaf(gs[j], h[j], gw[j]);
                gs[j] *= w[j];
                sum = fmaf(gs[j], h[j], sum);
            }
            const float mean = head_sum(sum, k.lanes) / (float)k.D;
#pragma unroll
            for (int j = 0; j < 8; j++) gs[j] = r.rstd * fmaf(-mean, h[j], gs[j]);
        }
        fg_vec8 gx;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            gx[j] = fmaf(keep, gs[j], later[j]);
            later[j] = r.is == INSIDE ? a * gs[j] : 0;
            sum = fmaf(gs[j], (r.is == INSIDE ? p[j] : 0) - v[j], sum);
        }
        sum = head_sum(sum, k.lanes);
        x = r.before;
        if (!ok || row == to) continue;
        fg_store8(f.gx, norm_row(f.gx_rows, row) + column, gx);
        if (inside == 0)
            f.glogit.put(norm_row(f.glogit_rows, row) + head,
                         r.is == PAD ? 0 : sum * (a * (1 - a)));
    }
    if (NORM) leave_gain(f, part, gw.v, lane);
}

static int64_t segments_of(const geometry &k) { return (k.C + 255) / 256; }
static int64_t blocks_of(const geometry &k)
{
    const int64_t most = NORM_PROCESSORS * BLOCKS / (segments_of(k) > 0 ? segments_of(k) : 1);
    const int64_t parts = (k.rows + WARPS * RUN - 1) / (WARPS * RUN);
    const int64_t blocks = parts < most ? parts : most;
    return blocks > 1 ? blocks : 1;
}

template <bool NORM> static void start_grad(const fg_exec *e, backward &f, int first,
                                            cudaStream_t stream)
{
    const int glogit = NORM ? 2 : 1;
    f.k = geometry_of(&e->in_shape[1]);
    f.k.first = (const int32_t *)e->in[first];
    f.gy = fg_input_of(e, 0), f.x = fg_input_of(e, 1), f.logit = fg_input_of(e, 2);
    f.gx = fg_output_of(e, 0), f.glogit = fg_output_of(e, glogit);
    f.gy_rows = norm_rows_of(&e->in_rows[0], f.k.C), f.x_rows = norm_rows_of(&e->in_rows[1], f.k.C);
    f.logit_rows = norm_rows_of(&e->in_rows[2], f.k.H);
    f.gx_rows = norm_rows_of(&e->out_rows[0], f.k.C);
    f.glogit_rows = norm_rows_of(&e->out_rows[glogit], f.k.H);
    const dim3 grid((unsigned)blocks_of(f.k), (unsigned)segments_of(f.k));
    f.runs = grid.x * (int64_t)WARPS;
    if (f.k.C > 0) unshift_rows<NORM><<<grid, 32 * WARPS, 0, stream>>>(f);
}

static void gate_grad_launch(const fg_exec *e, cudaStream_t stream)
{
    backward f = {};
    start_grad<false>(e, f, 3, stream);
}
/* Where heads share the gain, a block's row of partial sums is H rows. */
static void norm_grad_op_launch(const fg_exec *e, cudaStream_t stream)
{
    const int64_t D = e->in_shape[1].dim[3], n = fg_last_of(&e->in_shape[3]);
    backward f = {};
    f.w = fg_input_of(e, 3), f.rstd = (const float *)e->in[4], f.part = (float *)e->scratch;
    f.shared = n == D;
    start_grad<true>(e, f, 5, stream);
    const dim3 block(32, 32);
    norm_add_parts<<<fg_blocks(n, 32), block, 0, stream>>>(f.part, blocks_of(f.k) * (f.k.C / n), n,
                                                           fg_output_of(e, 1));
}
static size_t grad_scratch(const fg_infer *c)
{
    const geometry k = geometry_of(&c->in[1]);
    return (size_t)(blocks_of(k) * k.C) * sizeof(float);
}
static const char *grad_unfit(const fg_infer *c) { return unfit_shape(&c->in[1]); }

FG_KERNEL(shift_gate_grad) = {
    .launch = gate_grad_launch, .unfit = grad_unfit, .pitched_in = 7, .pitched_out = 3,
};
FG_KERNEL(shift_norm_grad) = {
    .launch = norm_grad_op_launch, .unfit = grad_unfit, .scratch = grad_scratch, .pitched_in = 7,
    .pitched_out = 5,
};
