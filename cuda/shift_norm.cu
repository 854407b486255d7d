/* shift_norm.cu - the token shift with its gate, and the norm of every head behind it, in one pass:
 * ops/shift_norm.c on a GPU.
 *
 *     s_t = a_t x_(t-1) + (1 - a_t) x_t,  a = sigmoid(logit);   y_t = s_t rstd_t w
 *     h = s rstd:  gs = rstd (w gy - h mean(w gy h)),  gw = sum over rows of gy h,
 *     gx_t = (1 - a_t) gs_t + a_(t+1) gs_(t+1),
 *     glogit_t = a_t (1 - a_t) sum over channels of gs_t (x_(t-1) - x_t)
 *
 * A lane holds eight channels, a head is D / 8 neighbouring lanes.  Forward, a thread is done with
 * that.  Backward, a warp walks a run of rows upwards, the next one on its way, and hands a_t gs_t
 * to the row before; gs of the row behind its run it computes besides.
 * Bytes: every tensor once from memory; the row before again, from cache, forward always and
 * backward once in a run (20 to 40 rows at 16384); partial sums of gw, under 1%. */
#include "norm.cuh"
#include "rows.cuh"

/* H100, 2026-11. */
constexpr int THREADS = 256;                     /* forward: of a block */
constexpr int WARPS = 4, RUN = 4;                /* backward: of a block; fewest rows of a warp */
template <bool NORM, int LANES> constexpr int held = !LANES ? 3 : NORM ? 6 : 8;
                                                 /* blocks of a processor */

/* Kernels have a form for heads of 8 LANES of bf16 in plain or pitched rows, and for LANES = 0 one
 * for everything else. */
struct geometry {
    const int32_t *first, *past;
    int64_t B, T, H, D, C, rows;                 /* C = H D, rows = B T */
    fg_divisor columns, length, width;           /* eights of a row; T; D */
    int lanes;                                   /* of a head */
    float share;                                 /* 1 / D, exactly */
};

static geometry geometry_of(const fg_shape *s)
{
    geometry k = {};
    k.B = s->dim[0], k.T = s->dim[1], k.H = s->dim[2], k.D = s->dim[3];
    k.C = k.H * k.D, k.rows = k.B * k.T, k.lanes = (int)(k.D / 8), k.share = 1.0f / (float)k.D;
    const int64_t most = k.rows * k.C + THREADS;
    k.columns = fg_divisor_of(k.C / 8, most);
    k.length = fg_divisor_of(k.T, most), k.width = fg_divisor_of(k.D, most);
    return k;
}

static const char *unfit_shape(const fg_shape *s)
{
    const int64_t D = s->dim[3];
    if (D % 8 != 0 || D > 256 || (D & (D - 1)) != 0)
        return "heads must be 8, 16, 32, 64, 128 or 256 wide";
    return s->dim[0] * s->dim[1] < INT32_MAX / 2 && s->dim[2] * D < INT32_MAX / 2
         ? nullptr : "more than 2^30 rows or channels";
}

/* What row t of a sequence is, `row` of all: PAD gives 0, START has nothing before it. */
enum place { PAD, START, INSIDE };
static __device__ __forceinline__ place place_of(const int32_t *first, int past, int row, int t)
{
    const int low = first ? max(first[row], 0) : 0, p = past + t;
    return low > p ? PAD : low == p ? START : INSIDE;
}

/* Where a row's element lies; EVEN: m's rows are the tensor's, and their pitch is below 2^31. */
template <bool EVEN>
static __device__ __forceinline__ int64_t at(const fg_matrix &m, int row, int column)
{
    return EVEN ? (int64_t)row * (int)m.pitch + column : m.at(row, column);
}
static bool is_even(const fg_matrix &m) { return m.pitch > 0 && m.pitch < INT32_MAX; }

/* Once a row and lane, so with the full exp: norm_sigmoid's loses a place for every unit of x. */
static __device__ __forceinline__ float gate_of(float x)
{
    return __fdividef(1.0f, 1.0f + expf(-x));
}

/* The sum over the lanes of a head. */
template <int LANES> static __device__ __forceinline__ float head_sum(float x, int lanes)
{
    if constexpr (LANES > 0) return fg_warp_sum<LANES>(x);
    else {
        for (int d = lanes / 2; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
        return x;
    }
}

/* Three of them at once: none waits for another. */
template <int LANES>
static __device__ __forceinline__ void head_sums(float &a, float &b, float &c, int lanes)
{
#pragma unroll
    for (int d = (LANES > 0 ? LANES : lanes) / 2; d > 0; d /= 2) {
        a += __shfl_xor_sync(~0u, a, d);
        b += __shfl_xor_sync(~0u, b, d);
        c += __shfl_xor_sync(~0u, c, d);
    }
}

/* ---- forward -------------------------------------------------------------------------------- */

struct forward {
    geometry k;
    fg_in x, logit, prev, w;
    fg_out y;
    fg_matrix at_x, at_logit, at_y;
    float *rstd;
    float eps;
    bool shared;                                 /* w holds one head's gains */
};

template <bool NORM, int LANES>
static __global__ void __launch_bounds__(THREADS) shift_rows(const forward f)
{
    constexpr bool EVEN = LANES > 0;
    const geometry &k = f.k;
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, q = fg_divide(i, k.columns);
    const int row = (int)q, b = (int)fg_divide(q, k.length), t = row - b * (int)k.T;
    const int column = (int)(i - q * k.columns.d) * 8, head = (int)fg_divide(column, k.width);
    const bool ok = q < k.rows, from_prev = t == 0 && f.prev.p;
    fg_some<8, !EVEN> before, here;
    before.clear();
    here.clear();
    float a = 0;
    if (ok && t > 0) before.load(f.x, at<EVEN>(f.at_x, row - 1, column));
    else if (ok && from_prev) before.load(f.prev, b * k.C + column);
    if (ok) here.load(f.x, at<EVEN>(f.at_x, row, column));
    if (ok) a = f.logit[at<EVEN>(f.at_logit, row, head)];
    fg_vec8 w, p, x, s;
    if (NORM) w = fg_load8(f.w, f.shared ? column - head * k.D : column);
    const place is = ok ? place_of(k.first, k.past ? *k.past : 0, row, t) : PAD;
    before.floats(from_prev ? f.prev : f.x, p.v);
    here.floats(f.x, x.v);
    const float gate = gate_of(a), by = is == INSIDE ? gate : 0, keep = 1 - gate;
    float sum = 0;
    if (is != INSIDE) p = {};
#pragma unroll
    for (int j = 0; j < 8; j++) {
        s[j] = fmaf(by, p[j], keep * x[j]);
        if (is == PAD) s[j] = 0;
        sum = fmaf(s[j], s[j], sum);
    }
    if (NORM) {
        const float rstd = norm_rsqrt(fmaf(head_sum<LANES>(sum, k.lanes), k.share, f.eps));
#pragma unroll
        for (int j = 0; j < 8; j++) s[j] = s[j] * rstd * w[j];
        if (ok && column - head * k.D == 0) f.rstd[(int64_t)row * k.H + head] = rstd;
    }
    if (ok) fg_store8(f.y, at<EVEN>(f.at_y, row, column), s);
}

template <bool NORM> static void start(const fg_exec *e, forward &f, int sequence,
                                       cudaStream_t stream)
{
    f.k = geometry_of(&e->in_shape[0]);
    f.k.first = (const int32_t *)e->in[sequence];
    f.k.past = (const int32_t *)e->in[sequence + 1];
    f.x = fg_input_of(e, 0), f.logit = fg_input_of(e, 1), f.y = fg_output_of(e, 0);
    if (e->in[sequence + 2]) f.prev = fg_input_of(e, sequence + 2);
    const int64_t n = f.k.rows * f.k.C, threads = f.k.rows * f.k.columns.d;
    f.at_x = fg_matrix_of(&e->in_rows[0], f.k.C, n);
    f.at_logit = fg_matrix_of(&e->in_rows[1], f.k.H, n);
    f.at_y = fg_matrix_of(&e->out_rows[0], f.k.C, n);
    const unsigned blocks = fg_blocks(threads, THREADS);
    const bool even = f.x.narrow && (!f.prev.p || f.prev.narrow) && is_even(f.at_x) &&
                      is_even(f.at_logit) && is_even(f.at_y);
    if (n == 0) return;
    if (even && f.k.lanes == 8) shift_rows<NORM, 8><<<blocks, THREADS, 0, stream>>>(f);
    else if (even && f.k.lanes == 16) shift_rows<NORM, 16><<<blocks, THREADS, 0, stream>>>(f);
    else shift_rows<NORM, 0><<<blocks, THREADS, 0, stream>>>(f);
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

FG_KERNEL(shift_gate) = {
    .launch = gate_launch, .unfit = unfit, .pitched_in = 3, .pitched_out = 1,
};
FG_KERNEL(shift_norm) = {
    .launch = norm_op_launch, .unfit = unfit, .pitched_in = 3, .pitched_out = 1,
};

/* ---- gradients ------------------------------------------------------------------------------ */

struct backward {
    geometry k;
    fg_in gy, x, logit, w;
    fg_out gx, glogit;
    fg_matrix at_gy, at_x, at_logit, at_gx, at_glogit;
    const float *rstd;
    float *part;                                 /* [blocks, C]: partial sums of gw */
    int64_t runs;
    bool shared;
};

/* What row t needs from memory besides x_t. */
template <int LANES> struct fetched {
    fg_some<8, LANES == 0> gy, before;
    float logit, rstd;
};

template <bool NORM, int LANES>
static __device__ __forceinline__ void fetch(fetched<LANES> &r, const backward &f, int row,
                                             int column, int head)
{
    constexpr bool EVEN = LANES > 0;
    r.gy.load(f.gy, at<EVEN>(f.at_gy, row, column));
    if (row > 0) r.before.load(f.x, at<EVEN>(f.at_x, row - 1, column));
    else r.before.clear();
    r.logit = f.logit[at<EVEN>(f.at_logit, row, head)];
    if (NORM) r.rstd = f.rstd[row * f.k.H + head];
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

/* Lanes behind the last channel do as the last head's, and keep it to themselves. */
template <bool NORM, int LANES>
static __global__ void __launch_bounds__(32 * WARPS, (held<NORM, LANES>))
unshift_rows(const backward f)
{
    __shared__ float part[NORM ? WARPS : 1][256];
    constexpr bool EVEN = LANES > 0;
    const geometry &k = f.k;
    const int lane = threadIdx.x % 32, own = (blockIdx.y * 32 + lane) * 8, in_head = own % (int)k.D;
    const bool ok = own < k.C;
    const int column = ok ? own : (int)(k.C - k.D) + in_head;
    const int head = (int)fg_divide(column, k.width);
    const int64_t run = blockIdx.x * (int64_t)WARPS + threadIdx.x / 32;
    const int from = (int)norm_first(k.rows, f.runs, run);
    const int to = (int)norm_first(k.rows, f.runs, run + 1);
    const bool more = from < to && to < k.rows && fg_divide(to, k.length) * k.T != to;
    int row = more ? to : to - 1;                            /* the last, or the one behind it */
    int t = from < to ? row - (int)(fg_divide(row, k.length) * k.T) : 0;
    fg_vec8 w, gw = {}, later = {};                          /* later: a gs of the row behind */
    fg_some<8, !EVEN> x;
    fetched<LANES> next;
    if (NORM) w = fg_load8(f.w, f.shared ? in_head : column);
    if (from < to) x.load(f.x, at<EVEN>(f.at_x, row, column));
    if (from < to) fetch<NORM>(next, f, row, column, head);
    for (; row >= from && from < to; row--) {
        const fetched<LANES> r = next;
        if (row > from) fetch<NORM>(next, f, row - 1, column, head);
        const place is = place_of(k.first, 0, row, t);
        const float a = gate_of(r.logit), by = is == INSIDE ? a : 0;
        const float keep = is == PAD ? 0 : 1 - a;
        fg_some<8, !EVEN> before = r.before;
        if (is != INSIDE) before.clear();
        if (is == PAD) x.clear();
        fg_vec8 v, p, gs, h;
        x.floats(f.x, v.v);
        before.floats(f.x, p.v);
        r.gy.floats(f.gy, gs.v);
        float slope = 0;                                     /* d loss / d a_t */
        if (NORM) {
            const float by_h = by * r.rstd, keep_h = keep * r.rstd;
            float along = 0, turn = 0;                       /* sums of w gy h, of h (p - v) */
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float d = p[j] - v[j];
                h[j] = fmaf(by_h, p[j], keep_h * v[j]);
                if (row < to) gw[j] = fmaf(gs[j], h[j], gw[j]);
                gs[j] *= w[j];
                along = fmaf(gs[j], h[j], along);
                turn = fmaf(h[j], d, turn);
                slope = fmaf(gs[j], d, slope);
            }
            head_sums<LANES>(along, turn, slope, k.lanes);
            const float mean = along * k.share;
            slope = r.rstd * fmaf(-mean, turn, slope);
#pragma unroll
            for (int j = 0; j < 8; j++) gs[j] = r.rstd * fmaf(-mean, h[j], gs[j]);
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++) slope = fmaf(gs[j], p[j] - v[j], slope);
            slope = head_sum<LANES>(slope, k.lanes);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            h[j] = fmaf(keep, gs[j], later[j]);              /* gx */
            later[j] = by * gs[j];
        }
        if (ok && row < to) {
            fg_store8(f.gx, at<EVEN>(f.at_gx, row, column), h);
            if (in_head == 0)
                f.glogit.put(at<EVEN>(f.at_glogit, row, head), slope * (a * (1 - a)));
        }
        x = r.before;
        t = t > 0 ? t - 1 : (int)k.T - 1;
    }
    if (NORM) leave_gain(f, part, gw.v, lane);
}

static int64_t segments_of(const geometry &k) { return (k.C + 255) / 256; }
static int64_t blocks_of(const geometry &k, int held_by_one)
{
    const int64_t segments = segments_of(k), most = NORM_PROCESSORS * held_by_one;
    const int64_t parts = (k.rows + WARPS * RUN - 1) / (WARPS * RUN);
    const int64_t each = segments > 0 ? most / segments : most;
    return parts < each ? (parts > 1 ? parts : 1) : each > 1 ? each : 1;
}

template <bool NORM, int LANES> static int64_t run_grad(backward &f, cudaStream_t stream)
{
    const dim3 grid((unsigned)blocks_of(f.k, held<NORM, LANES>), (unsigned)segments_of(f.k));
    f.runs = grid.x * (int64_t)WARPS;
    if (f.k.C > 0) unshift_rows<NORM, LANES><<<grid, 32 * WARPS, 0, stream>>>(f);
    return grid.x;
}

/* Returns the rows of partial sums. */
template <bool NORM> static int64_t start_grad(const fg_exec *e, backward &f, int first,
                                               cudaStream_t stream)
{
    const int glogit = NORM ? 2 : 1;
    f.k = geometry_of(&e->in_shape[1]);
    f.k.first = (const int32_t *)e->in[first];
    f.gy = fg_input_of(e, 0), f.x = fg_input_of(e, 1), f.logit = fg_input_of(e, 2);
    f.gx = fg_output_of(e, 0), f.glogit = fg_output_of(e, glogit);
    const int64_t n = f.k.rows * f.k.C;
    f.at_gy = fg_matrix_of(&e->in_rows[0], f.k.C, n);
    f.at_x = fg_matrix_of(&e->in_rows[1], f.k.C, n);
    f.at_logit = fg_matrix_of(&e->in_rows[2], f.k.H, n);
    f.at_gx = fg_matrix_of(&e->out_rows[0], f.k.C, n);
    f.at_glogit = fg_matrix_of(&e->out_rows[glogit], f.k.H, n);
    const bool even = f.gy.narrow && f.x.narrow && is_even(f.at_gy) && is_even(f.at_x) &&
                      is_even(f.at_logit) && is_even(f.at_gx) && is_even(f.at_glogit);
    if (even && f.k.lanes == 8) return run_grad<NORM, 8>(f, stream);
    if (even && f.k.lanes == 16) return run_grad<NORM, 16>(f, stream);
    return run_grad<NORM, 0>(f, stream);
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
    const int64_t rows = start_grad<true>(e, f, 5, stream);
    const dim3 block(32, 32);
    norm_add_parts<<<fg_blocks(n, 32), block, 0, stream>>>(f.part, rows * (f.k.C / n), n,
                                                           fg_output_of(e, 1));
}
static size_t grad_scratch(const fg_infer *c)
{
    const geometry k = geometry_of(&c->in[1]);
    return (size_t)(blocks_of(k, held<true, 8>) * k.C) * sizeof(float);
}
static const char *grad_unfit(const fg_infer *c) { return unfit_shape(&c->in[1]); }

FG_KERNEL(shift_gate_grad) = {
    .launch = gate_grad_launch, .unfit = grad_unfit, .pitched_in = 7, .pitched_out = 3,
};
FG_KERNEL(shift_norm_grad) = {
    .launch = norm_grad_op_launch, .unfit = grad_unfit, .scratch = grad_scratch, .pitched_in = 7,
    .pitched_out = 5,
};
