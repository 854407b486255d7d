/* rms_norm.c - root-mean-square normalization with a learned gain, by itself and after a sum.
 *
 *     y = (x * rstd) * w,   rstd = 1 / sqrt(mean(x^2) + eps)     over each group of x's last axis
 *
 * x, y: [..., D], D = groups * n;  w: [D], or [n] shared by the groups;  rstd: f32[..., groups].
 * add_rms_norm does the same to sum = a + b, which is its second output: the residual sum and the
 * norm behind it in one pass over memory.
 * rms_norm_grad_bf16 is rms_norm_grad with a copy of gx for the products that follow: lowering puts
 * it in (fuse.c).
 * Sums are f32 (f64 in the double build).  Forward reads x once and writes y once; the gradient
 * reads gy and x once and writes gx once, which is the least possible.
 * Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4; groups as in the
 * per-head norms of Lin et al. 2025, "Forgetting Transformer". */
#include "norm.h"

fg_tensor (fg_rms_norm)(fg_loc at, fg_tensor x, fg_tensor w, double eps, int64_t groups)
{
    return FG_APPLY(rms_norm, at, ((const fg_tensor[]){ x, w }), eps, groups);
}

static fg_status infer(fg_infer *c)
{
    const struct fg_attr_rms_norm *a = c->attr;
    return norm_infer(c, a->eps, a->groups);
}

/* y = (x rstd) w over one group. */
static inline void scale_group(const fg_real *x, const fg_real *w, fg_real rstd, fg_real *y,
                               int64_t n)
{
    int64_t i = 0;
    for (; i + FG_LANES <= n; i += FG_LANES)
        fg_vstore(y + i, fg_vload(x + i) * rstd * fg_vload(w + i));
    if (i < n) {
        const int64_t k = n - i;
        fg_vstore_n(y + i, fg_vload_n(x + i, k) * rstd * fg_vload_n(w + i, k), k);
    }
}

static void cpu(const fg_exec *e)
{
    const struct fg_attr_rms_norm *a = e->attr;
    const norm_size s = norm_size_of(&e->in_shape[0], &e->in_shape[1], a->groups);
    const fg_real *x = e->in[0], *w = e->in[1];
    fg_real *y = e->out[0], *rstd = e->out[1];
    const int threads = fg__threads(e, norm_elements(s));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < s.rows; r++)
        for (int64_t g = 0; g < s.groups; g++) {
            const int64_t k = r * s.groups + g;
            rstd[k] = norm_rstd(norm_sum_squares(x + k * s.n, s.n), s.n, a->eps);
            scale_group(x + k * s.n, w + g * s.step_w, rstd[k], y + k * s.n, s.n);
        }
}

/* With h = x rstd:  gx = rstd (w gy - h mean(w gy h)),  gw = sum over rows of gy h. */
static void vjp(fg_vjp *v)
{
    const struct fg_attr_rms_norm *a = v->attr;
    const fg_tensor x = v->in[0], w = v->in[1], rstd = v->out[1];
    if (!fg_absent(v->gout[0])) {
        const fg_tensor in[] = { v->gout[0], x, w, rstd, { 0 } };
        v->gin[0] = FG_APPLY(rms_norm_grad, FG_HERE, in, a->groups);
        v->gin[1] = fg_result(v->gin[0], 1);
    }
    if (!fg_absent(v->gout[1])) {
        const fg_tensor more = norm_rstd_grad(v->gout[1], x, rstd, a->groups);
        v->gin[0] = fg_absent(v->gin[0]) ? more : fg_add(v->gin[0], more);
    }
}

static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_rms_norm *a = attr;
    const fg_tensor x = norm_split(in[0], a->groups), square = fg_mul(x, x);
    const fg_tensor mean = fg_row_mean(square), shifted = fg_scale(mean, 1, a->eps);
    const fg_tensor rstd = fg_rsqrt(shifted), h = fg_mul(x, rstd);
    const fg_tensor gain = norm_gain(in[1], in[0], a->groups), y = fg_mul(h, gain);
    fg_shape s = fg_shape_of(in[0]);
    if (s.rank > 0) s.dim[s.rank - 1] = a->groups;
    out[0] = norm_join(y, in[0]);
    out[1] = fg_reshape(rstd, s);
}

static fg_cost cost(const fg_infer *c)
{
    return (fg_cost){ .flops = 4 * (double)fg_shape_count(c->in[0]), .bytes = fg__bytes_moved(c) };
}

static fg_tensor example(fg_graph *g, int i)
{
    static const struct { int64_t B, T, D, n_w, groups; double eps; } cases[] = {
        { 1, 3, 5, 5, 1, 1e-5 },
        { 2, 3, 6, 6, 2, 1e-6 },       /* a gain for every element */
        { 2, 3, 15, 5, 3, 1e-5 },      /* one gain shared by three groups */
        { 1, 37, 9, 9, 1, 1e-5 },      /* more than one block of rows */
        { 1, 1, 70, 70, 1, 1e-5 },     /* longer than one round of accumulators */
        { 1, 1, 1, 1, 1, 1e-2 },
        { 2, 3, 16, 16, 1, 1e-5 },     /* of heads */
    };
    if (i >= (int)(sizeof cases / sizeof cases[0])) return (fg_tensor){ 0 };
    fg_tensor x = fg_random(g, cases[i].B, cases[i].T, cases[i].D);
    if (cases[i].D == 16) x = fg_random(g, 2, 3, 3, 16);
    const fg_tensor w = fg_random(g, cases[i].n_w);
    return fg_rms_norm(x, w, cases[i].eps, cases[i].groups);
}

const fg_op_code fg_code_rms_norm = {
    .infer = infer, .cpu = cpu, .vjp = vjp, .cost = cost, .decompose = decompose,
    .example = example, .reuse = 1u << 0,
    .bf16 = { .narrow_out = 1, .wide_out = 2 },
};

/* ---- rms_norm_grad -------------------------------------------------------------------------- */

static fg_status check_grad(fg_infer *c, int64_t groups)
{
    FG_REQUIRE(c, fg_shape_equal(c->in[0], c->in[1]), SHAPE, "gy must have x's shape");
    FG_REQUIRE(c, !c->given[4] || fg_shape_equal(c->in[4], c->in[1]), SHAPE,
               "more must have x's shape");
    return norm_grad_infer(c, 3, groups);
}

static fg_status grad_infer(fg_infer *c)
{
    const struct fg_attr_rms_norm_grad *a = c->attr;
    return check_grad(c, a->groups);
}

static size_t grad_scratch(const fg_infer *c, int threads)
{
    (void)threads;
    return (size_t)(norm_blocks(fg__rows(&c->in[1])) * fg__last(&c->in[2])) * sizeof(fg_real);
}

/* One group: gx = rstd (m - h mean(m h)), gw += gy h, with h = x rstd, m = w gy. */
static inline void grad_group(const fg_real *gy, const fg_real *x, const fg_real *w, fg_real rstd,
                              fg_real *gx, fg_real *gw, int64_t n)
{
    fg_vec a = { 0 }, b = { 0 };
    int64_t i = 0;
    for (; i + 2 * FG_LANES <= n; i += 2 * FG_LANES) {
        const int64_t k = i + FG_LANES;
        a = fg_vfma(fg_vload(w + i) * fg_vload(gy + i), fg_vload(x + i), a);
        b = fg_vfma(fg_vload(w + k) * fg_vload(gy + k), fg_vload(x + k), b);
    }
    for (; i < n; i += FG_LANES) {
        const int64_t k = n - i < FG_LANES ? n - i : FG_LANES;
        a = fg_vfma(fg_vload_n(w + i, k) * fg_vload_n(gy + i, k), fg_vload_n(x + i, k), a);
    }
    const fg_real mean = fg_vsum(a + b) * rstd / (fg_real)n;
    for (i = 0; i + FG_LANES <= n; i += FG_LANES) {
        const fg_vec gyi = fg_vload(gy + i), h = fg_vload(x + i) * rstd;
        fg_vstore(gw + i, fg_vfma(gyi, h, fg_vload(gw + i)));
        fg_vstore(gx + i, fg_vfma(h, fg_vset(-mean), fg_vload(w + i) * gyi) * rstd);
    }
    if (i < n) {
        const int64_t k = n - i;
        const fg_vec gyi = fg_vload_n(gy + i, k), h = fg_vload_n(x + i, k) * rstd;
        fg_vstore_n(gw + i, fg_vfma(gyi, h, fg_vload_n(gw + i, k)), k);
        fg_vstore_n(gx + i, fg_vfma(h, fg_vset(-mean), fg_vload_n(w + i, k) * gyi) * rstd, k);
    }
}

static void grad_cpu(const fg_exec *e)
{
    const struct fg_attr_rms_norm_grad *a = e->attr;
    const norm_size s = norm_size_of(&e->in_shape[1], &e->in_shape[2], a->groups);
    const int64_t blocks = norm_blocks(s.rows);
    const fg_real *gy = e->in[0], *x = e->in[1], *w = e->in[2], *rstd = e->in[3];
    const fg_real *more = e->in[4];
    fg_real *gx = e->out[0], *part = e->scratch;
    const int threads = fg__threads(e, norm_elements(s));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < blocks; b++) {
        fg_real *gw = part + b * s.n_w;
        memset(gw, 0, (size_t)s.n_w * sizeof *gw);
        const int64_t end = norm_block_start(s.rows, blocks, b + 1) * s.groups;
        for (int64_t k = norm_block_start(s.rows, blocks, b) * s.groups; k < end; k++) {
            const int64_t at = k * s.n, at_w = k % s.groups * s.step_w;
            grad_group(gy + at, x + at, w + at_w, rstd[k], gx + at, gw + at_w, s.n);
            for (int64_t i = 0; more && i < s.n; i++) gx[at + i] += more[at + i];
        }
    }
    norm_add_blocks(part, blocks, e->out[1], s.n_w, fg__threads(e, blocks * s.n_w));
}

static void grad_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_rms_norm_grad *a = attr;
    const fg_tensor gy = norm_split(in[0], a->groups), x = norm_split(in[1], a->groups);
    const fg_tensor w = norm_gain(in[2], in[1], a->groups);
    const fg_tensor rstd = fg_reshape(in[3], FG_DIMS(fg_dim(x, 0), a->groups, 1));
    const fg_tensor h = fg_mul(x, rstd), m = fg_mul(gy, w), mh = fg_mul(m, h);
    const fg_tensor mean = fg_row_mean(mh);
    const fg_tensor along = fg_mul(h, mean), across = fg_sub(m, along), gx = fg_mul(across, rstd);
    const fg_tensor each = fg_mul(gy, h), gw = fg_sum_to(each, fg_shape_of(w));
    const fg_tensor joined = norm_join(gx, in[1]);
    out[0] = fg_absent(in[4]) ? joined : fg_add(joined, in[4]);
    out[1] = norm_join(gw, in[2]);
}

static fg_cost grad_cost(const fg_infer *c)
{
    return (fg_cost){ .flops = 9 * (double)fg_shape_count(c->in[1]), .bytes = fg__bytes_moved(c) };
}

static fg_tensor grad_example(fg_graph *g, int i)
{
    static const struct { int64_t T, D, n_w, groups; } cases[] = {
        { 3, 5, 5, 1 }, { 35, 6, 6, 2 }, { 5, 9, 3, 3 }, { 4, 7, 7, 1 },
    };
    if (i >= (int)(sizeof cases / sizeof cases[0])) return (fg_tensor){ 0 };
    const fg_tensor gy = fg_random(g, cases[i].T, cases[i].D);
    const fg_tensor x = fg_random(g, cases[i].T, cases[i].D);
    const fg_tensor w = fg_random(g, cases[i].n_w);
    const fg_tensor rstd = fg_random(g, cases[i].T, cases[i].groups);
    fg_tensor more = { 0 };
    if (i == 3) more = fg_random(g, cases[i].T, cases[i].D);
    const fg_tensor in[] = { gy, x, w, rstd, more };
    return FG_APPLY(rms_norm_grad, FG_HERE, in, cases[i].groups);
}

/* No vjp: gradients of gradients go through the definition. */
const fg_op_code fg_code_rms_norm_grad = {
    .infer = grad_infer, .cpu = grad_cpu, .cost = grad_cost, .decompose = grad_decompose,
    .example = grad_example, .scratch = grad_scratch, .reuse = 1u << 0 | 1u << 1,
    .bf16 = { .wide_in = 8, .like = { 2 }, .wide_out = 2 },
};

/* ---- rms_norm_grad_bf16 --------------------------------------------------------------------- */

static fg_status both_infer(fg_infer *c)
{
    const struct fg_attr_rms_norm_grad_bf16 *a = c->attr;
    c->out[2] = c->in[1];
    c->out_type[2] = FG_BF16;
    return check_grad(c, a->groups);
}

static void both_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_rms_norm_grad_bf16 *a = attr;
    const fg_tensor all[] = { in[0], in[1], in[2], in[3], in[4] };
    out[0] = FG_APPLY(rms_norm_grad, FG_HERE, all, a->groups);
    out[1] = fg_result(out[0], 1);
    out[2] = fg_cast(out[0], FG_BF16);
}

static fg_tensor both_example(fg_graph *g, int i)
{
    static const struct { int64_t T, D, groups; } cases[] = {
        { 3, 5, 1 }, { 35, 16, 2 }, { 4, 7, 1 }, { 6, 1536, 1 },
    };
    if (i >= (int)(sizeof cases / sizeof cases[0])) return (fg_tensor){ 0 };
    const fg_tensor gy = fg_random(g, cases[i].T, cases[i].D);
    const fg_tensor x = fg_random(g, cases[i].T, cases[i].D);
    const fg_tensor w = fg_random(g, cases[i].D);
    const fg_tensor rstd = fg_random(g, cases[i].T, cases[i].groups);
    fg_tensor more = { 0 };
    if (i >= 2) more = fg_random(g, cases[i].T, cases[i].D);
    const fg_tensor in[] = { gy, x, w, rstd, more };
    return FG_APPLY(rms_norm_grad_bf16, FG_HERE, in, cases[i].groups);
}

/* Made by lowering alone, behind all gradients.  No CPU kernel: there, bf16 is not narrow. */
const fg_op_code fg_code_rms_norm_grad_bf16 = {
    .infer = both_infer, .cost = grad_cost, .decompose = both_decompose, .example = both_example,
    .reuse = 1u << 0 | 1u << 1, .no_grad = true,
    .bf16 = { .wide_in = 8, .like = { 2 }, .wide_out = 2, .narrow_out = 4 },
};

/* ---- add_rms_norm --------------------------------------------------------------------------- */

fg_tensor fg__add_rms_norm(fg_loc at, fg_tensor a, fg_tensor b, fg_tensor w, double eps)
{
    return FG_APPLY(add_rms_norm, at, ((const fg_tensor[]){ a, b, w }), eps);
}

static fg_status add_infer(fg_infer *c)
{
    const struct fg_attr_add_rms_norm *at = c->attr;
    const fg_shape *a = &c->in[0], *w = &c->in[2];
    FG_REQUIRE(c, fg_shape_equal(*a, c->in[1]), SHAPE, "a and b must have one shape");
    FG_REQUIRE(c, fg__is_real(c->in_type[2]), DTYPE, "w must be f32 or bf16");
    if (fg__need_reals(c, 0, 2)) return FG_ERR_DTYPE;
    FG_REQUIRE(c, a->rank >= 1 && fg__last(a) > 0, SHAPE,
               "a needs at least one axis to normalize over");
    FG_REQUIRE(c, w->rank == 1 && w->dim[0] == fg__last(a), SHAPE,
               "w must have one axis of %lld, the extent of a's last", (long long)fg__last(a));
    FG_REQUIRE(c, at->eps >= 0, USAGE, "eps is %g and must not be negative", at->eps);
    c->out[0] = c->out[1] = c->out[2] = *a;
    c->out[2].dim[a->rank - 1] = 1;
    c->out_type[1] = c->out_type[0];
    c->out_type[2] = FG_F32;
    return FG_OK;
}

/* sum = a + b; returns the sum of its squares. */
static inline fg_real add_row(const fg_real *a, const fg_real *b, fg_real *sum, int64_t n)
{
    fg_vec s0 = { 0 }, s1 = { 0 };
    int64_t i = 0;
    for (; i + 2 * FG_LANES <= n; i += 2 * FG_LANES) {
        const fg_vec v0 = fg_vload(a + i) + fg_vload(b + i);
        const fg_vec v1 = fg_vload(a + i + FG_LANES) + fg_vload(b + i + FG_LANES);
        fg_vstore(sum + i, v0);
        fg_vstore(sum + i + FG_LANES, v1);
        s0 = fg_vfma(v0, v0, s0);
        s1 = fg_vfma(v1, v1, s1);
    }
    for (; i < n; i += FG_LANES) {
        const int64_t k = n - i < FG_LANES ? n - i : FG_LANES;
        const fg_vec v = fg_vload_n(a + i, k) + fg_vload_n(b + i, k);
        fg_vstore_n(sum + i, v, k);
        s0 = fg_vfma(v, v, s0);
    }
    return fg_vsum(s0 + s1);
}

static void add_cpu(const fg_exec *e)
{
    const struct fg_attr_add_rms_norm *at = e->attr;
    const int64_t rows = fg__rows(&e->in_shape[0]), D = fg__last(&e->in_shape[0]);
    const fg_real *a = e->in[0], *b = e->in[1], *w = e->in[2];
    fg_real *y = e->out[0], *sum = e->out[1], *rstd = e->out[2];
    const int threads = fg__threads(e, rows * D);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        rstd[r] = norm_rstd(add_row(a + r * D, b + r * D, sum + r * D, D), D, at->eps);
        scale_group(sum + r * D, w, rstd[r], y + r * D, D);
    }
}

/* ga = gb = gsum + the gradient of the norm at sum. */
static void add_vjp(fg_vjp *v)
{
    const fg_tensor w = v->in[2], sum = v->out[1], rstd = v->out[2];
    fg_tensor gs = v->gout[1];
    if (!fg_absent(v->gout[0])) {
        const fg_tensor in[] = { v->gout[0], sum, w, rstd };
        const fg_tensor gx = FG_APPLY(rms_norm_grad, FG_HERE, in, 1);
        gs = fg_absent(gs) ? gx : fg_add(gs, gx);
        v->gin[2] = fg_result(gx, 1);
    }
    if (!fg_absent(v->gout[2])) {
        const fg_tensor more = norm_rstd_grad(v->gout[2], sum, rstd, 1);
        gs = fg_absent(gs) ? more : fg_add(gs, more);
    }
    v->gin[0] = v->gin[1] = gs;
}

static void add_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_add_rms_norm *at = attr;
    out[1] = fg_add(in[0], in[1]);
    out[0] = fg_rms_norm(out[1], in[2], at->eps, 1);
    out[2] = fg_result(out[0], 1);
}

static fg_cost add_cost(const fg_infer *c)
{
    return (fg_cost){ .flops = 5 * (double)fg_shape_count(c->in[0]), .bytes = fg__bytes_moved(c) };
}

static fg_tensor add_example(fg_graph *g, int i)
{
    static const int64_t rows[] = { 3, 1, 5 }, extent[] = { 5, 1, 33 };
    if (i >= (int)(sizeof rows / sizeof rows[0])) return (fg_tensor){ 0 };
    const fg_tensor a = fg_random(g, rows[i], extent[i]);
    const fg_tensor b = fg_random(g, rows[i], extent[i]);
    const fg_tensor w = fg_random(g, extent[i]);
    return fg__add_rms_norm(FG_HERE, a, b, w, i == 1 ? 1e-2 : 1e-5);
}

const fg_op_code fg_code_add_rms_norm = {
    .infer = add_infer, .cpu = add_cpu, .vjp = add_vjp, .cost = add_cost,
    .decompose = add_decompose, .example = add_example,
    .bf16 = { .narrow_out = 1, .wide_out = 4 },
};
