/* shift_norm.cu - the token shift with its gate, and the norm of every head behind it, in one pass:
 * ops/shift_norm.c on a GPU.
 *
 *     s_t = a_t x_(t-1) + (1 - a_t) x_t,  a = sigmoid(logit);   y_t = s_t rstd_t w
 *     h = s rstd:  gs = rstd (w gy - h mean(w gy h)),  gw = sum over rows of gy h,
 *     gx_t = (1 - a_t) gs_t + a_(t+1) gs_(t+1),
 *     glogit_t = a_t (1 - a_t) sum over channels of gs_t (x_(t-1) - x_t)
 *
 * A lane holds eight channels, a head is D / 8 neighbouring lanes.  Forward, and backward where gs
 * is gy, a thread is done with that.  Backward through a norm, a warp walks a run of rows upwards,
 * the next one on its way, and hands a_t gs_t to the row before; gs of the row behind its run it
 * computes besides.
 * Bytes: every tensor once from memory; the neighbouring row again, from cache, but where a run
 * (30 to 40 rows at 16384) has it by hand; partial sums of gw, under 1%. */
#include "norm.cuh"
#include "rows.cuh"

/* H100, 2026-11. */
constexpr int THREADS = 256;                     /* forward: of a block */
constexpr int GATE_ROWS = 8;                     /* backward without a norm: rows of a block */
constexpr int WARPS = 4, RUN = 4;                /* backward: of a block; fewest rows of a warp */
template <int LANES> constexpr int held = LANES ? 6 : 3;                 /* blocks of a processor */

/* Kernels have a form for heads of 8 LANES of bf16 in plain or pitched rows, and for LANES = 0 one
 * for everything else. */
struct geometry {
    const int32_t *first, *past;
    int64_t B, T, H, D, C, rows;                 /* C = H D, rows = B T */
    fg_divisor columns, length, width;           /* eights of a row; T; D */
    int lanes, heads;                            /* of a head; bytes of a float for every head */
    float share;                                 /* 1 / D, exactly */
};

static geometry geometry_of(const fg_shape *s)
{
    geometry k = {};
    k.B = s->dim[0], k.T = s->dim[1], k.H = s->dim[2], k.D = s->dim[3];
    k.C = k.H * k.D, k.rows = k.B * k.T, k.lanes = (int)(k.D / 8), k.share = 1.0f / (float)k.D;
    k.columns = fg_divisor_of(k.C / 8, k.rows * (k.C / 8) + THREADS);
    k.heads = (int)(k.H * sizeof(float));
    k.length = fg_divisor_of(k.T, k.rows + THREADS), k.width = fg_divisor_of(k.D, k.C);
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

/* A tensor and where its rows lie.  EVEN, in what follows: it is bf16, and its rows are the
 * tensor's own, `step` bytes apart. */
struct matrix {
    char *p;
    bool narrow, even;
    int step;
    fg_matrix rows;
};
static matrix matrix_of(const void *p, fg_dtype t, const fg_rows *r, int64_t C, int64_t count)
{
    matrix m = { (char *)p, t == FG_BF16, false, 0, fg_matrix_of(r, C, count) };
    m.even = m.narrow && m.rows.pitch > 0 && m.rows.pitch < INT32_MAX / 2;
    if (m.even) m.step = 2 * (int)m.rows.pitch;
    return m;
}
static matrix in_matrix(const fg_exec *e, int i, int64_t C, int64_t count)
{
    return matrix_of(e->in[i], e->in_type[i], &e->in_rows[i], C, count);
}
static matrix out_matrix(const fg_exec *e, int o, int64_t C, int64_t count)
{
    return matrix_of(e->out[o], e->out_type[o], &e->out_rows[o], C, count);
}
/* A thread's column of one: eight channels from it on, or one element.  The address of row 0 is
 * hidden from the compiler, which else would add its parts up anew for every row. */
template <bool EVEN> struct eight {
    char *top;
    int column;
    __device__ __forceinline__ eight(const matrix &m, int column) :
        top(m.p + 2 * (int64_t)column), column(column)
    {
        if (EVEN) asm("" : "+l"(top));
        __builtin_assume(__isGlobal(top));
    }
    __device__ __forceinline__ char *at(const matrix &m, int row) const
    {
        if (EVEN) return top + (int64_t)row * m.step;
        return m.p + m.rows.at(row, column) * (m.narrow ? 2 : 4);
    }
    __device__ __forceinline__ float one(const matrix &m, int row) const
    {
        return fg_in{ at(m, row), EVEN || m.narrow }[0];
    }
    __device__ __forceinline__ void put(const matrix &m, int row, float x) const
    {
        fg_out{ at(m, row), EVEN || m.narrow }.put(0, x);
    }
    __device__ __forceinline__ void load(fg_some<8, !EVEN> &x, const matrix &m, int row) const
    {
        x.load(fg_in{ at(m, row), m.narrow }, 0);
    }
    __device__ __forceinline__ void store(const matrix &m, int row, const fg_vec8 &x) const
    {
        fg_store8(fg_out{ at(m, row), EVEN || m.narrow }, 0, x);
    }
};

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

/* The head that a channel lies in. */
template <int LANES> static __device__ __forceinline__ int head_of(const geometry &k, int column)
{
    return LANES > 0 ? column / (8 * (LANES > 0 ? LANES : 1)) : (int)fg_divide(column, k.width);
}

/* ---- forward -------------------------------------------------------------------------------- */

struct forward {
    geometry k;
    matrix x, logit, y;
    fg_in prev, w;
    float *rstd;
    float eps;
    bool shared;                                 /* w holds one head's gains */
};

/* Thread i's row and column; rows behind the last are the last. */
struct spot { int row, column; bool ok; };
template <bool EVEN> static __device__ __forceinline__ spot spot_of(const geometry &k)
{
    int row, column;
    if (EVEN) {
        const unsigned i = blockIdx.x * THREADS + threadIdx.x;
        row = fg_divide_few(i, k.columns);
        column = 8 * (int)(i - (unsigned)row * (unsigned)k.columns.d);
    } else {
        const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
        row = (int)fg_divide(i, k.columns);
        column = 8 * (int)(i - row * k.columns.d);
    }
    const int last = (int)k.rows - 1;
    return { row < last ? row : last, column, row <= last };
}

template <bool NORM, int LANES>
static __global__ void __launch_bounds__(THREADS)
shift_rows(const __grid_constant__ forward f)
{
    constexpr bool EVEN = LANES > 0;
    const geometry &k = f.k;
    const spot i = spot_of<EVEN>(k);
    const int head = head_of<LANES>(k, i.column), in_head = i.column & ((int)k.D - 1);
    const int b = fg_divide_few((unsigned)i.row, k.length), t = i.row - b * (int)k.T;
    const bool from_prev = t == 0 && f.prev.p;
    const eight<EVEN> x_at(f.x, i.column), y_at(f.y, i.column);
    fg_some<8, !EVEN> before, here;
    before.clear();
    if (t > 0) x_at.load(before, f.x, i.row - 1);
    else if (from_prev) before.load(f.prev, b * k.C + i.column);
    x_at.load(here, f.x, i.row);
    const float gate = gate_of(eight<EVEN>(f.logit, head).one(f.logit, i.row));
    fg_vec8 w, p, s;
    if (NORM) w = fg_load8(fg_in{ f.w.p, !EVEN && f.w.narrow }, f.shared ? in_head : i.column);
    const place is = place_of(k.first, k.past ? *k.past : 0, i.row, t);
    if (is != INSIDE) before.clear();
    if (is == PAD) here.clear();
    before.floats(from_prev ? f.prev : fg_in{ f.x.p, f.x.narrow }, p.v);
    here.floats(fg_in{ f.x.p, f.x.narrow }, s.v);
    const float keep = 1 - gate;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        s[j] = fmaf(gate, p[j], keep * s[j]);
        sum = fmaf(s[j], s[j], sum);
    }
    if (NORM) {
        const float rstd = norm_rsqrt(fmaf(head_sum<LANES>(sum, k.lanes), k.share, f.eps));
#pragma unroll
        for (int j = 0; j < 8; j++) s[j] = s[j] * rstd * w[j];
        if (i.ok && in_head == 0) f.rstd[(int64_t)i.row * (int)k.H + head] = rstd;
    }
    if (i.ok) y_at.store(f.y, i.row, s);
}

template <bool NORM> static void start(const fg_exec *e, forward &f, int sequence,
                                       cudaStream_t stream)
{
    f.k = geometry_of(&e->in_shape[0]);
    f.k.first = (const int32_t *)e->in[sequence];
    f.k.past = (const int32_t *)e->in[sequence + 1];
    if (e->in[sequence + 2]) f.prev = fg_input_of(e, sequence + 2);
    const int64_t n = f.k.rows * f.k.C, threads = f.k.rows * f.k.columns.d;
    f.x = in_matrix(e, 0, f.k.C, n), f.logit = in_matrix(e, 1, f.k.H, n);
    f.y = out_matrix(e, 0, f.k.C, n);
    const unsigned blocks = fg_blocks(threads, THREADS);
    const bool even = f.x.even && f.logit.even && f.y.even && (!f.prev.p || f.prev.narrow) &&
                      !f.w.narrow && f.k.columns.few;
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
    matrix gy, x, logit, gx, glogit;
    fg_in w;
    const float *rstd;
    float *part;                                 /* [blocks, C]: partial sums of gw */
    int segments;                                /* of 256 channels, a warp's each */
    int64_t runs;
    bool shared;
};

/* A warp's lanes of one segment; those behind the last channel do as the last head's, and write the
 * same. */
struct side { int column, in_head; };
static __device__ __forceinline__ side side_of(const geometry &k, int segment)
{
    const int own = segment * 256 + threadIdx.x % 32 * 8, in_head = own & ((int)k.D - 1);
    return { own < k.C ? own : (int)(k.C - k.D) + in_head, in_head };
}

/* Without a norm: one row for a warp. */
template <int LANES>
static __global__ void __launch_bounds__(32 * GATE_ROWS)
unshift_gate(const __grid_constant__ backward f)
{
    constexpr bool EVEN = LANES > 0;
    const geometry &k = f.k;
    const side i = side_of(k, blockIdx.x % f.segments);
    const int row = blockIdx.x / f.segments * GATE_ROWS + threadIdx.x / 32;
    if (row >= k.rows) return;
    const int t = row - fg_divide_few((unsigned)row, k.length) * (int)k.T;
    const int head = head_of<LANES>(k, i.column), behind = t + 1 < k.T ? row + 1 : row;
    const eight<EVEN> gy_at(f.gy, i.column), x_at(f.x, i.column), logit_at(f.logit, head);
    fg_some<8, !EVEN> gy, later, x, before;
    gy_at.load(gy, f.gy, row);
    x_at.load(x, f.x, row);
    gy_at.load(later, f.gy, behind);
    x_at.load(before, f.x, max(row - 1, 0));
    const float a = gate_of(logit_at.one(f.logit, row));
    float by = gate_of(logit_at.one(f.logit, behind));
    const place is = place_of(k.first, 0, row, t);
    if (is != INSIDE) before.clear();
    if (is == PAD) x.clear();
    if (behind == row || place_of(k.first, 0, behind, t + 1) != INSIDE) later.clear(), by = 0;
    fg_vec8 g, h, v, p;
    gy.floats(fg_in{ f.gy.p, f.gy.narrow }, g.v);
    later.floats(fg_in{ f.gy.p, f.gy.narrow }, h.v);
    x.floats(fg_in{ f.x.p, f.x.narrow }, v.v);
    before.floats(fg_in{ f.x.p, f.x.narrow }, p.v);
    const float keep = is == PAD ? 0 : 1 - a;
    float slope = 0;                                         /* d loss / d a_t */
#pragma unroll
    for (int j = 0; j < 8; j++) {
        slope = fmaf(g[j], p[j] - v[j], slope);
        g[j] = fmaf(keep, g[j], by * h[j]);
    }
    slope = head_sum<LANES>(slope, k.lanes);
    eight<EVEN>(f.gx, i.column).store(f.gx, row, g);
    if (i.in_head == 0) eight<EVEN>(f.glogit, head).put(f.glogit, row, slope * (a * (1 - a)));
}

/* Where a row's element lies; EVEN: its pitch is below 2^31. */
template <bool EVEN>
static __device__ __forceinline__ int64_t at(const fg_matrix &m, int row, int column)
{
    return EVEN ? (int64_t)row * (int)m.pitch + column : m.at(row, column);
}

/* What the walk through a norm takes of `backward`. */
struct walked {
    geometry k;
    fg_in gy, x, logit, w;
    fg_out gx, glogit;
    fg_matrix at_gy, at_x, at_logit, at_gx, at_glogit;
    const float *rstd;
    float *part;
    int64_t runs;
    bool shared;
};
static walked walked_of(const backward &f)
{
    return { f.k, { f.gy.p, f.gy.narrow }, { f.x.p, f.x.narrow }, { f.logit.p, f.logit.narrow },
             f.w, { f.gx.p, f.gx.narrow }, { f.glogit.p, f.glogit.narrow }, f.gy.rows, f.x.rows,
             f.logit.rows, f.gx.rows, f.glogit.rows, f.rstd, f.part, f.runs, f.shared };
}

/* What row t needs from memory besides x_t. */
template <int LANES> struct fetched {
    fg_some<8, LANES == 0> gy, before;
    float logit, rstd;
};

template <int LANES>
static __device__ __forceinline__ void fetch(fetched<LANES> &r, const walked &f, int row,
                                             int column, int head)
{
    constexpr bool EVEN = LANES > 0;
    r.gy.load(f.gy, at<EVEN>(f.at_gy, row, column));
    if (row > 0) r.before.load(f.x, at<EVEN>(f.at_x, row - 1, column));
    else r.before.clear();
    r.logit = f.logit[at<EVEN>(f.at_logit, row, head)];
    r.rstd = f.rstd[row * f.k.H + head];
}

/* The block's sums of gw: its warps' rows, added in order. */
static __device__ __forceinline__ void leave_gain(const walked &f, float (*part)[256],
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

/* Through a norm.  Lanes behind the last channel keep what they do to themselves. */
template <int LANES>
static __global__ void __launch_bounds__(32 * WARPS, (held<LANES>))
unshift_norm(const walked f)
{
    __shared__ float part[WARPS][256];
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
    w = fg_load8(f.w, f.shared ? in_head : column);
    if (from < to) x.load(f.x, at<EVEN>(f.at_x, row, column));
    if (from < to) fetch(next, f, row, column, head);
    for (; row >= from && from < to; row--) {
        const fetched<LANES> r = next;
        if (row > from) fetch(next, f, row - 1, column, head);
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
    leave_gain(f, part, gw.v, lane);
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
    const int64_t segments = segments_of(f.k);
    const dim3 grid((unsigned)blocks_of(f.k, held<LANES>), (unsigned)segments);
    f.segments = (int)segments, f.runs = grid.x * (int64_t)WARPS;
    if (f.k.C == 0) return grid.x;
    if constexpr (NORM) unshift_norm<LANES><<<grid, 32 * WARPS, 0, stream>>>(walked_of(f));
    else if (f.k.rows > 0)
        unshift_gate<LANES><<<fg_blocks(f.k.rows, GATE_ROWS) * grid.y, 32 * GATE_ROWS, 0,
                              stream>>>(f);
    return grid.x;
}

/* Returns the rows of partial sums. */
template <bool NORM> static int64_t start_grad(const fg_exec *e, backward &f, int first,
                                               cudaStream_t stream)
{
    f.k = geometry_of(&e->in_shape[1]);
    f.k.first = (const int32_t *)e->in[first];
    const int64_t n = f.k.rows * f.k.C;
    f.gy = in_matrix(e, 0, f.k.C, n), f.x = in_matrix(e, 1, f.k.C, n);
    f.logit = in_matrix(e, 2, f.k.H, n), f.gx = out_matrix(e, 0, f.k.C, n);
    f.glogit = out_matrix(e, NORM ? 2 : 1, f.k.H, n);
    const bool even = f.gy.even && f.x.even && f.logit.even && f.gx.even && f.glogit.even;
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
    return (size_t)(blocks_of(k, held<8>) * k.C) * sizeof(float);
}
static const char *grad_unfit(const fg_infer *c) { return unfit_shape(&c->in[1]); }

FG_KERNEL(shift_gate_grad) = {
    .launch = gate_grad_launch, .unfit = grad_unfit, .pitched_in = 7, .pitched_out = 3,
};
FG_KERNEL(shift_norm_grad) = {
    .launch = norm_grad_op_launch, .unfit = grad_unfit, .scratch = grad_scratch, .pitched_in = 7,
    .pitched_out = 5,
};
