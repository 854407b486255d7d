/* gated_norm.c - RMS norm followed by a sigmoid gate: the output norm and gate of FoX (Pro).
 *
 *     y = (x * rstd) * w * sigmoid(g),   rstd = 1 / sqrt(mean(x^2) + eps)   over each group
 *
 * x, g, y: [..., D], D = groups * n;  w: [D], or [n] shared by the groups;  rstd: f32[..., groups].
 * The norm comes first and the gate after it, with its own input; for a silu gate multiply by g.
 * Forward reads x and g and writes y; the gradient reads gy, x and g and writes gx and gg: once.
 * Source: Lin et al. 2025, "Forgetting Transformer", FoX (Pro): output norm and output gate. */
#include "norm_gate.h"

fg_tensor (fg_gated_norm)(fg_loc at, fg_tensor x, fg_tensor w, fg_tensor g, double eps,
                          int64_t groups)
{
    return FG_APPLY(gated_norm, at, ((const fg_tensor[]){ x, w, g }), eps, groups);
}

static fg_status infer(fg_infer *c)
{
    const struct fg_attr_gated_norm *a = c->attr;
    return norm_gate_infer(c, a->eps, a->groups);
}

static inline void gate_group(const fg_real *x, const fg_real *w, const fg_real *g, fg_real rstd,
                              fg_real *y, int64_t n)
{
    int64_t i = 0;
    for (; i + FG_LANES <= n; i += FG_LANES)
        fg_vstore(y + i, fg_vload(x + i) * rstd * fg_vload(w + i) * fg_vsigmoid(fg_vload(g + i)));
    if (i < n) {
        const int64_t k = n - i;
        const fg_vec s = fg_vsigmoid(fg_vload_n(g + i, k));
        fg_vstore_n(y + i, fg_vload_n(x + i, k) * rstd * fg_vload_n(w + i, k) * s, k);
    }
}

static void cpu(const fg_exec *e)
{
    const struct fg_attr_gated_norm *a = e->attr;
    const norm_size s = norm_size_of(&e->in_shape[0], &e->in_shape[1], a->groups);
    const fg_real *x = e->in[0], *w = e->in[1], *gate = e->in[2];
    fg_real *y = e->out[0], *rstd = e->out[1];
    const int threads = fg__threads(e, 4 * norm_elements(s));   /* an exp is worth several sums */
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < s.rows; r++)
        for (int64_t g = 0; g < s.groups; g++) {
            const int64_t k = r * s.groups + g, at = k * s.n;
            rstd[k] = norm_rstd(norm_sum_squares(x + at, s.n), s.n, a->eps);
            gate_group(x + at, w + g * s.step_w, gate + at, rstd[k], y + at, s.n);
        }
}

/* With s = sigmoid(g), h = x rstd, m = w s gy:
 * gx = rstd (m - h mean(m h)),  gw = sum over rows of gy s h,  gg = gy h w s (1 - s). */
static void vjp(fg_vjp *v)
{
    const struct fg_attr_gated_norm *a = v->attr;
    const fg_tensor x = v->in[0], w = v->in[1], g = v->in[2], rstd = v->out[1];
    if (!fg_absent(v->gout[0])) {
        const fg_tensor in[] = { v->gout[0], x, w, g, rstd };
        v->gin[0] = FG_APPLY(gated_norm_grad, FG_HERE, in, a->groups);
        v->gin[1] = fg_result(v->gin[0], 1);
        v->gin[2] = fg_result(v->gin[0], 2);
    }
    if (!fg_absent(v->gout[1])) {
        const fg_tensor more = norm_rstd_grad(v->gout[1], x, rstd, a->groups);
        v->gin[0] = fg_absent(v->gin[0]) ? more : fg_add(v->gin[0], more);
    }
}

static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_gated_norm *a = attr;
    const fg_tensor n = fg_rms_norm(in[0], in[1], a->eps, a->groups), s = fg_sigmoid(in[2]);
    out[0] = fg_mul(n, s);
    out[1] = fg_result(n, 1);
}

static fg_cost cost(const fg_infer *c)
{
    return (fg_cost){ .flops = 9 * (double)fg_shape_count(c->in[0]), .bytes = fg__bytes_moved(c) };
}

static fg_tensor example(fg_graph *g, int i)
{
    static const norm_gate_case cases[] = {
        { 1, 3, 5, 5, 1, 1e-5 },
        { 2, 3, 6, 6, 2, 1e-6 },       /* a gain for every element */
        { 2, 3, 27, 9, 3, 1e-5 },      /* one gain shared by three groups */
        { 1, 37, 5, 5, 1, 1e-5 },      /* more than one block of rows */
        { 1, 1, 1, 1, 1, 1e-2 },
    };
    if (i >= (int)(sizeof cases / sizeof cases[0])) return (fg_tensor){ 0 };
    const norm_gate_inputs in = norm_gate_example(g, &cases[i]);
    return fg_gated_norm(in.x, in.w, in.g, cases[i].eps, cases[i].groups);
}

const fg_op_code fg_code_gated_norm = {
    .infer = infer, .cpu = cpu, .vjp = vjp, .cost = cost, .decompose = decompose,
    .example = example, .reuse = 1u << 0 | 1u << 2,
    .bf16 = { .narrow_out = 1, .wide_out = 2 },
};

/* ---- gated_norm_grad ------------------------------------------------------------------------ */

static fg_status grad_infer(fg_infer *c)
{
    const struct fg_attr_gated_norm_grad *a = c->attr;
    return norm_gate_grad_infer(c, a->groups);
}

static size_t grad_scratch(const fg_infer *c, int threads)
{
    (void)threads;
    return (size_t)(norm_blocks(fg__rows(&c->in[1])) * fg__last(&c->in[2])) * sizeof(fg_real);
}

typedef struct { fg_vec m, gg, gwh; } gate_step;     /* m = w s gy, gg, and gy s h */

static inline gate_step gate_grad(fg_vec gy, fg_vec h, fg_vec w, fg_vec g)
{
    const fg_vec s = fg_vsigmoid(g), gn = gy * s;
    return (gate_step){ gn * w, gn * (1 - s) * (h * w), gn * h };
}

/* One group; gx holds m until the mean of m h is known. */
static inline void grad_group(const fg_real *gy, const fg_real *x, const fg_real *w,
                              const fg_real *g, fg_real rstd, fg_real *gx, fg_real *gw,
                              fg_real *gg, int64_t n)
{
    fg_vec sum = { 0 };
    int64_t i = 0;
    for (; i + FG_LANES <= n; i += FG_LANES) {
        const fg_vec h = fg_vload(x + i) * rstd;
        const gate_step t = gate_grad(fg_vload(gy + i), h, fg_vload(w + i), fg_vload(g + i));
        sum = fg_vfma(t.m, h, sum);
        fg_vstore(gx + i, t.m);
        fg_vstore(gg + i, t.gg);
        fg_vstore(gw + i, fg_vload(gw + i) + t.gwh);
    }
    if (i < n) {
        const int64_t k = n - i;
        const fg_vec h = fg_vload_n(x + i, k) * rstd, gi = fg_vload_n(g + i, k);
        const gate_step t = gate_grad(fg_vload_n(gy + i, k), h, fg_vload_n(w + i, k), gi);
        sum = fg_vfma(t.m, h, sum);
        fg_vstore_n(gx + i, t.m, k);
        fg_vstore_n(gg + i, t.gg, k);
        fg_vstore_n(gw + i, fg_vload_n(gw + i, k) + t.gwh, k);
    }
    const fg_real mean = fg_vsum(sum) / (fg_real)n;
    for (i = 0; i + FG_LANES <= n; i += FG_LANES)
        fg_vstore(gx + i, fg_vfma(fg_vload(x + i) * rstd, fg_vset(-mean), fg_vload(gx + i)) * rstd);
    if (i < n) {
        const int64_t k = n - i;
        const fg_vec h = fg_vload_n(x + i, k) * rstd;
        fg_vstore_n(gx + i, fg_vfma(h, fg_vset(-mean), fg_vload_n(gx + i, k)) * rstd, k);
    }
}

static void grad_cpu(const fg_exec *e)
{
    const struct fg_attr_gated_norm_grad *a = e->attr;
    const norm_size s = norm_size_of(&e->in_shape[1], &e->in_shape[2], a->groups);
    const int64_t blocks = norm_blocks(s.rows);
    const fg_real *gy = e->in[0], *x = e->in[1], *w = e->in[2], *g = e->in[3], *rstd = e->in[4];
    fg_real *gx = e->out[0], *gg = e->out[2], *part = e->scratch;
    const int threads = fg__threads(e, 4 * norm_elements(s));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < blocks; b++) {
        fg_real *gw = part + b * s.n_w;
        memset(gw, 0, (size_t)s.n_w * sizeof *gw);
        const int64_t end = norm_block_start(s.rows, blocks, b + 1) * s.groups;
        for (int64_t k = norm_block_start(s.rows, blocks, b) * s.groups; k < end; k++) {
            const int64_t at = k * s.n, at_w = k % s.groups * s.step_w;
            grad_group(gy + at, x + at, w + at_w, g + at, rstd[k],
                       gx + at, gw + at_w, gg + at, s.n);
        }
    }
    norm_add_blocks(part, blocks, e->out[1], s.n_w, fg__threads(e, blocks * s.n_w));
}

static void grad_decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_gated_norm_grad *a = attr;
    const fg_tensor gy = norm_split(in[0], a->groups), x = norm_split(in[1], a->groups);
    const fg_tensor w = norm_gain(in[2], in[1], a->groups), g = norm_split(in[3], a->groups);
    const fg_tensor rstd = fg_reshape(in[4], FG_DIMS(fg_dim(x, 0), a->groups, 1));
    const fg_tensor h = fg_mul(x, rstd), s = fg_sigmoid(g), gn = fg_mul(gy, s);
    const fg_tensor m = fg_mul(gn, w), mh = fg_mul(m, h), mean = fg_row_mean(mh);
    const fg_tensor along = fg_mul(h, mean), across = fg_sub(m, along), gx = fg_mul(across, rstd);
    const fg_tensor each = fg_mul(gn, h), gw = fg_sum_to(each, fg_shape_of(w));
    const fg_tensor rest = fg_scale(s, -1, 1), gg = fg_mul(mh, rest);
    out[0] = norm_join(gx, in[1]);
    out[1] = norm_join(gw, in[2]);
    out[2] = norm_join(gg, in[3]);
}

static fg_cost grad_cost(const fg_infer *c)
{
    return (fg_cost){ .flops = 18 * (double)fg_shape_count(c->in[1]), .bytes = fg__bytes_moved(c) };
}

static fg_tensor grad_example(fg_graph *g, int i)
{
    static const norm_gate_case cases[] = {
        { 1, 3, 5, 5, 1, 0 }, { 1, 35, 6, 6, 2, 0 }, { 1, 5, 27, 9, 3, 0 },
    };
    if (i >= (int)(sizeof cases / sizeof cases[0])) return (fg_tensor){ 0 };
    const norm_gate_inputs k = norm_gate_grad_example(g, &cases[i]);
    const fg_tensor in[] = { k.gy, k.x, k.w, k.g, k.rstd };
    return FG_APPLY(gated_norm_grad, FG_HERE, in, cases[i].groups);
}

/* No vjp: gradients of gradients go through the definition.  gx may overwrite gy or g, but not x,
 * which is read again after gx has held m. */
const fg_op_code fg_code_gated_norm_grad = {
    .infer = grad_infer, .cpu = grad_cpu, .cost = grad_cost, .decompose = grad_decompose,
    .example = grad_example, .scratch = grad_scratch, .reuse = 1u << 0 | 1u << 3,
    .bf16 = { .wide_in = 16, .like = { 2, 0, 4 }, .wide_out = 2 },
};
