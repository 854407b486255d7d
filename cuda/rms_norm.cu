/* rms_norm.cu - root-mean-square normalization, after a sum too, and its gradient.
 *
 *     y = (x rstd) w,   rstd = 1 / sqrt(mean(x^2) + eps)   over each group of x's last axis
 *     h = x rstd:  gx = rstd (w gy - h mean(w gy h)) [+ more],   gw = sum over rows of gy h
 *
 * x, y, gy, gx, more: [...,D], D = groups * n;  w, gw: [D] or [n];  rstd: f32[...,groups].
 * Rows of x, y, gy, more and gx may be pitched.  Every element is read once and written once, and
 * the gradient's partial sums of gw besides: 1 to 5% of the whole at 16384 rows (norm.cuh). */
#include "norm_heads.cuh"

/* Heads of x: [B,T,H,n] with one gain for all are groups of a row: they fill warps that one of them
 * would leave half empty. */
static norm_size size_of(const fg_shape *x, const fg_shape *w, int64_t groups)
{
    const norm_size plain = norm_size_of(x, w, groups);
    if (groups > 1 || x->rank != 4 || x->dim[2] == 1) return plain;
    const fg_shape rows = { .rank = 3, .dim = { x->dim[0], x->dim[1], x->dim[2] * x->dim[3] } };
    const norm_size heads = norm_size_of(&rows, w, x->dim[2]);
    return heads.lanes ? heads : plain;
}
/* Its rows can be found where all are pitched so, or not at all. */
static bool holds(const norm_size &s, const fg_rows *r)
{
    return !fg_is_pitched(r) || r->width % s.D == 0;
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_rms_norm *at = (const struct fg_attr_rms_norm *)e->attr;
    norm_forward a = {};
    a.s = size_of(&e->in_shape[0], &e->in_shape[1], at->groups);
    if (!holds(a.s, &e->in_rows[0]) || !holds(a.s, &e->out_rows[0]))
        a.s = norm_size_of(&e->in_shape[0], &e->in_shape[1], at->groups);
    a.x = fg_input_of(e, 0), a.w = fg_input_of(e, 1);
    a.y = fg_output_of(e, 0), a.rstd = (float *)e->out[1], a.eps = (float)at->eps;
    a.x_rows = norm_rows_of(&e->in_rows[0], a.s.D);
    a.y_rows = norm_rows_of(&e->out_rows[0], a.s.D);
    if (heads_fit<NORM_PLAIN>(a)) heads_launch<NORM_PLAIN>(a, stream);
    else norm_launch<NORM_PLAIN>(a, stream);
}

FG_KERNEL(rms_norm) = { .launch = launch, .pitched_in = 1u << 0, .pitched_out = 1u << 0 };

static void add_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_add_rms_norm *at = (const struct fg_attr_add_rms_norm *)e->attr;
    norm_forward a = {};
    a.s = norm_size_of(&e->in_shape[0], &e->in_shape[2], 1);
    a.x = fg_input_of(e, 0), a.more = fg_input_of(e, 1), a.w = fg_input_of(e, 2);
    a.y = fg_output_of(e, 0), a.sum = fg_output_of(e, 1), a.rstd = (float *)e->out[2];
    a.eps = (float)at->eps;
    a.x_rows = norm_rows_of(&e->in_rows[0], a.s.D);
    a.y_rows = norm_rows_of(&e->out_rows[0], a.s.D);
    norm_launch<NORM_PLAIN>(a, stream);
}

FG_KERNEL(add_rms_norm) = { .launch = add_launch };

static size_t scratch_of(const fg_infer *c, int64_t groups)
{
    const norm_size sizes[] = { size_of(&c->in[1], &c->in[2], groups),
                                norm_size_of(&c->in[1], &c->in[2], groups) };
    size_t most = 0;
    for (const norm_size &s : sizes) {
        const size_t a = norm_grad_scratch(s), b = heads_scratch<NORM_PLAIN>(s);
        most = a > most ? a : most;
        most = b > most ? b : most;
    }
    return most;
}

static void start_grad(const fg_exec *e, int64_t groups, bool both, cudaStream_t stream)
{
    norm_backward a = {};
    a.s = size_of(&e->in_shape[1], &e->in_shape[2], groups);
    const bool more = e->n_in > 4 && e->in[4];
    if (!holds(a.s, &e->in_rows[0]) || !holds(a.s, &e->in_rows[1]) ||
        !holds(a.s, &e->out_rows[0]) || (more && !holds(a.s, &e->in_rows[4])) ||
        (both && !holds(a.s, &e->out_rows[2])))
        a.s = norm_size_of(&e->in_shape[1], &e->in_shape[2], groups);
    a.gy = fg_input_of(e, 0), a.x = fg_input_of(e, 1), a.w = fg_input_of(e, 2);
    a.rstd = (const float *)e->in[3], a.gx = fg_output_of(e, 0), a.part = (float *)e->scratch;
    a.gy_rows = norm_rows_of(&e->in_rows[0], a.s.D);
    a.x_rows = norm_rows_of(&e->in_rows[1], a.s.D);
    a.gx_rows = norm_rows_of(&e->out_rows[0], a.s.D);
    if (more) {
        a.more = fg_input_of(e, 4);
        a.more_rows = norm_rows_of(&e->in_rows[4], a.s.D);
    }
    if (both) {
        a.gx16 = fg_output_of(e, 2);
        a.gx16_rows = norm_rows_of(&e->out_rows[2], a.s.D);
    }
    if (heads_fit<NORM_PLAIN>(a)) heads_launch<NORM_PLAIN>(a, fg_output_of(e, 1), stream);
    else norm_grad_launch<NORM_PLAIN>(a, fg_output_of(e, 1), stream);
}

static size_t grad_scratch(const fg_infer *c)
{
    return scratch_of(c, ((const struct fg_attr_rms_norm_grad *)c->attr)->groups);
}
static void grad_launch(const fg_exec *e, cudaStream_t stream)
{
    start_grad(e, ((const struct fg_attr_rms_norm_grad *)e->attr)->groups, false, stream);
}

FG_KERNEL(rms_norm_grad) = {
    .launch = grad_launch, .scratch = grad_scratch,
    .pitched_in = 1u << 0 | 1u << 1 | 1u << 4, .pitched_out = 1u << 0,
};

static size_t both_scratch(const fg_infer *c)
{
    return scratch_of(c, ((const struct fg_attr_rms_norm_grad_bf16 *)c->attr)->groups);
}
static void both_launch(const fg_exec *e, cudaStream_t stream)
{
    start_grad(e, ((const struct fg_attr_rms_norm_grad_bf16 *)e->attr)->groups, true, stream);
}

FG_KERNEL(rms_norm_grad_bf16) = {
    .launch = both_launch, .scratch = both_scratch,
    .pitched_in = 1u << 0 | 1u << 1 | 1u << 4, .pitched_out = 1u << 0 | 1u << 2,
};
