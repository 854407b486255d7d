/* gated_linear_attention.c - linear attention with a decay for every key channel, the mixer of
 * HGRN2.
 *
 *     S_t = diag(e^(g_t)) S_(t-1) + k_t v_t^T,   o_t = scale S_t^T q_t
 *
 * q, k: [B,T,H,K]   v, o: [B,T,H,V]   g: f32[B,T,H,K], <= 0, -inf included   first: i32[B,T]
 * past: i32[1]   state: f32[B,H,K,V], S before row 0; absent: 0.  Second output: S after the last
 * row.  Rows of padding give 0; a document begins with S = 0.
 * In chunks of n rows, with a_t = e^(g_t), products over r per channel, S before the chunk:
 *     A_ts = scale sum_d q_td k_sd prod_(s<r<=t) a_rd   (s <= t)
 *     o_t  = sum_s A_ts v_s + scale S^T (q_t prod_(r<=t) a_r)
 *     S'   = diag(prod_r a_r) S + sum_s (k_s prod_(r>s) a_r) v_s^T
 * Every decay is a product of factors <= 1 between the two rows it joins: nothing overflows however
 * strong the gates are, nothing cancels, and what underflows is 0 (below 1e-30, for subnormal
 * operands are slow).
 * The gradient of g is summed in crossing form: that of g_t is the sum over all pairs of rows
 * (s, r), s < t <= r, of what the pair's decay carries.  Within a chunk pairs are added one by one,
 * so that no difference of long sums is taken.
 * Forward reads q, k, v, g and writes o: once.  The gradient reads them, k, v and g a second time
 * (a third in sequences over 1024 rows), and stores no states between the passes.
 * Source: Yang et al. 2024, "Gated Linear Attention Transformers with Hardware-Efficient Training"
 * (arXiv 2312.06635), section 4; Qin et al. 2024, "HGRN2" (arXiv 2404.07904), section 3. */
#include "linear_attention.h"

fg_tensor (fg_gated_linear_attention)(fg_loc at, fg_tensor q, fg_tensor k, fg_tensor v,
                                      fg_tensor log_a, double scale, fg_tensor state)
{
    const struct fg_attr_gated_linear_attention a = { scale };
    const fg_op *op = &fg_op_table[FG_OP_gated_linear_attention];
    return fg__scan_build(at, op, &a, q, k, v, log_a, state);
}

static fg_status infer(fg_infer *c)
{
    if (fg__scan_check(c, 4)) return FG_ERR_SHAPE;
    FG_REQUIRE(c, fg_shape_equal(c->in[3], c->in[1]), SHAPE,
               "log_a must have k's shape, one gate per channel");
    FG_REQUIRE(c, c->in_type[3] == FG_F32, DTYPE, "log_a must be f32");
    return FG_OK;
}

/* ---- a chunk -------------------------------------------------------------------------------- */

typedef struct {                         /* a thread's own; panels of FG_CHUNK rows */
    fg_real *S, *more;                   /* [K,Vp]; what a chunk adds */
    fg_real *q, *k, *a;                  /* [.,Kp], a = e^g */
    fg_real *q_in, *k_out, *decay;       /* [.,Kp], [.,Kp], [Kp]: as in the formulas on top */
    fg_real *v, *o;                      /* [.,Vp] */
    fg_real *A;                          /* [.,FG_CHUNK] */
} work;

static work work_cut(char *base, size_t *used, const fg__scan *z)
{
    const size_t size = sizeof(fg_real);
    work w;
    w.S = fg__cut(base, used, z->K * z->Vp, size);
    w.more = fg__cut(base, used, z->K * z->Vp, size);
    w.q = fg__cut(base, used, FG_CHUNK * z->Kp, size);
    w.k = fg__cut(base, used, FG_CHUNK * z->Kp, size);
    w.a = fg__cut(base, used, FG_CHUNK * z->Kp, size);
    w.q_in = fg__cut(base, used, FG_CHUNK * z->Kp, size);
    w.k_out = fg__cut(base, used, FG_CHUNK * z->Kp, size);
    w.decay = fg__cut(base, used, z->Kp, size);
    w.v = fg__cut(base, used, FG_CHUNK * z->Vp, size);
    w.o = fg__cut(base, used, FG_CHUNK * z->Vp, size);
    w.A = fg__cut(base, used, FG_CHUNK * FG_CHUNK, size);
    return w;
}

/* A decay that does not count any more is 0; NaN stays. */
static inline fg_vec fade(fg_vec w)
{
    return fg_vselect((fg_vint)(w < fg_vset((fg_real)1e-30)), fg_vset(0), w);
}

static void load(const fg__scan *z, const fg_exec *e, int i, int64_t b, int64_t t, int64_t h,
                 int64_t n, const work *w)
{
    const int64_t at = ((b * z->T + t) * z->H + h) * z->K, row = z->H * z->K;
    const fg_real *v = fg__in(e, i + 2, ((b * z->T + t) * z->H + h) * z->V);
    fg__load_rows(fg__in(e, i, at), row, n, z->K, z->Kp, w->q);
    fg__load_rows(fg__in(e, i + 1, at), row, n, z->K, z->Kp, w->k);
    fg__load_rows(fg__in(e, i + 3, at), row, n, z->K, z->Kp, w->a);
    fg__load_rows(v, z->H * z->V, n, z->V, z->Vp, w->v);
    for (int64_t j = 0; j < n * z->Kp; j += FG_LANES)
        fg_vstore(w->a + j, fg_vexp(fg_vload(w->a + j)));
}

/* q_in_t = scale q_t prod_(r<=t) a_r,  k_out_s = k_s prod_(r>s) a_r,  decay = prod_r a_r */
static void decays(const fg__scan *z, int64_t n, const work *w)
{
    const fg_vec scale = fg_vset((fg_real)z->scale);
    for (int64_t d = 0; d < z->Kp; d += FG_LANES) {
        fg_vec p = fg_vset(1);
        for (int64_t t = 0; t < n; t++) {
            p = fade(p * fg_vload(w->a + t * z->Kp + d));
            fg_vstore(w->q_in + t * z->Kp + d, scale * fg_vload(w->q + t * z->Kp + d) * p);
        }
        fg_vstore(w->decay + d, p);
        p = fg_vset(1);
        for (int64_t t = n - 1; t >= 0; t--) {
            fg_vstore(w->k_out + t * z->Kp + d, fg_vload(w->k + t * z->Kp + d) * p);
            p = fade(p * fg_vload(w->a + t * z->Kp + d));
        }
    }
}

/* A, with 0 where s > t */
static void pairs(const fg__scan *z, int64_t n, const work *w)
{
    const int64_t Kp = z->Kp;
    for (int64_t s = 0; s < n; s++) {
        fg_vec sum[FG_CHUNK] = { { 0 } };
        for (int64_t d = 0; d < Kp; d += FG_LANES) {
            const fg_vec k = fg_vload(w->k + s * Kp + d);
            fg_vec p = fg_vset(1);
            sum[s] = fg_vfma(fg_vload(w->q + s * Kp + d), k, sum[s]);
            for (int64_t t = s + 1; t < n; t++) {
                p = fade(p * fg_vload(w->a + t * Kp + d));
                sum[t] = fg_vfma(fg_vload(w->q + t * Kp + d) * p, k, sum[t]);
            }
        }
        for (int64_t t = 0; t < s; t++) w->A[t * FG_CHUNK + s] = 0;
        for (int64_t t = s; t < n; t++)
            w->A[t * FG_CHUNK + s] = (fg_real)z->scale * fg_vsum(sum[t]);
    }
}

/* S = diag(decay) S + k_out^T v, rounded once a chunk: without decay a state may be carried over a
 * million rows. */
static void pass_state(const fg__scan *z, int64_t n, const work *w, fg_real *S)
{
    const fg__product more = { 0, z->K, 0, z->Vp, 0, n, FG_WHOLE, w->k_out, 1, z->Kp, w->v, z->Vp,
                               w->more, z->Vp, NULL, false };
    fg__multiply(&more);
    for (int64_t d = 0; d < z->K; d++) {
        const fg_vec decay = fg_vset(w->decay[d]);
        for (int64_t j = d * z->Vp; j < (d + 1) * z->Vp; j += FG_LANES)
            fg_vstore(S + j, fg_vfma(decay, fg_vload(S + j), fg_vload(w->more + j)));
    }
}

static void chunk(const fg__scan *z, int64_t n, const work *w)
{
    const fg__product from_state = { 0, n, 0, z->Vp, 0, z->K, FG_WHOLE, w->q_in, z->Kp, 1, w->S,
                                     z->Vp, w->o, z->Vp, NULL, false };
    const fg__product from_chunk = { 0, n, 0, z->Vp, 0, n, FG_K_UP_TO_R, w->A, FG_CHUNK, 1, w->v,
                                     z->Vp, w->o, z->Vp, NULL, true };
    decays(z, n, w);
    fg__multiply(&from_state);
    pairs(z, n, w);
    fg__multiply(&from_chunk);
    pass_state(z, n, w, w->S);
}

/* ---- the forward kernel --------------------------------------------------------------------- */

static void head(const fg_exec *e, const fg__scan *z, int64_t b, int64_t h, const work *w)
{
    const fg_real *state = e->in[6];
    const int64_t own = (b * z->H + h) * z->K * z->V, row = z->H * z->V;
    fg__run r = { 0 };
    for (int64_t t0 = 0; t0 < z->T; t0 = r.t1) {
        fg_real *o = fg__out(e, 0, ((b * z->T + t0) * z->H + h) * z->V);
        r = fg__run_from(z, b, t0);
        fg__load_state(z, r.carried ? state + own : NULL, w->S);
        if (r.padding) fg__clear_rows(o, row, r.t1 - t0, z->V);
        for (int64_t t = t0; t < r.t1 && !r.padding; t += FG_CHUNK) {
            const int64_t n = fg__least(FG_CHUNK, r.t1 - t);
            load(z, e, 0, b, t, h, n, w);
            chunk(z, n, w);
            fg__store_rows(w->o, z->Vp, n, z->V, o + (t - t0) * row, row);
        }
    }
    fg__store_rows(w->S, z->Vp, z->K, z->V, fg__out(e, 1, own), z->V);
}

/* One row, straight from the state before to the state after. */
static void step(const fg_exec *e, const fg__scan *z, int64_t b, int64_t h)
{
    const int64_t row = b * z->H + h, K = z->K, V = z->V;
    const fg_real *q = fg__in(e, 0, row * K), *k = fg__in(e, 1, row * K);
    const fg_real *v = fg__in(e, 2, row * V), *g = fg__in(e, 3, row * K);
    const fg_real *S = fg__carried(z, b) ? fg__in(e, 6, row * K * V) : NULL;
    fg_real *o = fg__out(e, 0, row * V), *to = fg__out(e, 1, row * K * V);
    const bool padding = fg__ahead(z, b, 0) > 0;
    if (padding) memset(to, 0, (size_t)(K * V) * sizeof *to);
    memset(o, 0, (size_t)V * sizeof *o);
    for (int64_t d = 0; d < K && !padding; d++) {
        const fg_vec a = fg_vset(S ? fg_exp1(g[d]) : 0), kd = fg_vset(k[d]);
        const fg_vec qd = fg_vset((fg_real)z->scale * q[d]);
        for (int64_t j = 0; j < V; j += FG_LANES) {
            const int64_t n = V - j;
            const bool whole = n >= FG_LANES;
            const fg_real *before = S + (S ? d * V + j : 0);
            fg_vec x = kd * (whole ? fg_vload(v + j) : fg_vload_n(v + j, n));
            if (S) x = fg_vfma(a, whole ? fg_vload(before) : fg_vload_n(before, n), x);
            const fg_vec y = fg_vfma(qd, x, whole ? fg_vload(o + j) : fg_vload_n(o + j, n));
            if (whole) fg_vstore(to + d * V + j, x), fg_vstore(o + j, y);
            else fg_vstore_n(to + d * V + j, x, n), fg_vstore_n(o + j, y, n);
        }
    }
}

static fg__scan scan_of(const fg_exec *e)
{
    const struct fg_attr_gated_linear_attention *a = e->attr;
    return fg__scan_of(&e->in_shape[1], &e->in_shape[2], a->scale, e->in[4], e->in[5], e->in[6]);
}

static void cut(char *base, size_t *used, const fg__scan *z) { work_cut(base, used, z); }

static void one_head(const fg_exec *e, const fg__scan *z, int64_t b, int64_t h, char *own)
{
    size_t used = 0;
    const work w = work_cut(own, &used, z);
    if (z->T == 1) step(e, z, b, h);
    else head(e, z, b, h, &w);
}

static void cpu(const fg_exec *e)
{
    const fg__scan z = scan_of(e);
    fg__all_heads(e, &z, cut, one_head);
}

static size_t scratch(const fg_infer *c, int threads)
{
    return fg__heads_scratch(&c->in[1], &c->in[2], threads, cut);
}

/* ---- gradient, definition, cost ------------------------------------------------------------- */

static void vjp(fg_vjp *v) { fg__scan_vjp(v, &fg_op_table[FG_OP_gated_linear_attention_grad]); }

/* The recurrence, row by row. */
static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_gated_linear_attention *a = attr;
    const int64_t B = fg_dim(in[1], 0), T = fg_dim(in[1], 1), H = fg_dim(in[1], 2);
    const int64_t V = fg_dim(in[2], 3);
    fg_tensor S = in[6];
    for (int64_t t = 0; t < T; t++) {
        const fg_tensor k = fg__row_of(in[1], t, true), v = fg__row_of(in[2], t, false);
        const fg_tensor q = fg__row_of(in[0], t, false);
        fg_tensor add = fg_mul(k, v), decay = fg__row_of(in[3], t, true);
        if (!fg_absent(S)) {
            decay = fg_exp(decay);
            S = fg__where_seen(S, in[4], in[5], t, -1);
            S = fg_mul(S, decay);
            add = fg_add(S, add);
        }
        S = fg__where_seen(add, in[4], in[5], t, 0);
        fg_tensor o = fg_matmul(q, S, false, false);
        o = fg_scale(o, a->scale, 0);
        o = fg_reshape(o, FG_DIMS(B, 1, H, V));
        o = fg_cast(o, fg_dtype_of(in[2]));
        out[0] = t ? fg_concat(out[0], o, 1) : o;
    }
    out[1] = S;
}

/* The state is read and changed in every row: 4 K V operations, and FG_CHUNK / 2 pairs. */
static fg_cost cost(const fg_infer *c)
{
    const double rows = (double)fg_shape_count(c->in[1]) / (double)c->in[1].dim[3];
    const double K = (double)c->in[1].dim[3], V = (double)c->in[2].dim[3];
    return (fg_cost){ .flops = rows * (4 * K * V + FG_CHUNK * (K + V)),
                      .bytes = (double)sizeof(float) * (rows * (3 * K + 2 * V)
                               + (c->given[6] ? 2 : 1) * (double)fg_shape_count(c->out[1])) };
}

static fg_tensor example(fg_graph *g, int i)
{
    static const struct { int64_t B, T, H, K, V; bool state, first; double gate; } e[] = {
        { 2, 5, 2, 3, 4, false, false, 1 }, { 1, 1, 2, 5, 3, true, false, 1 },
        { 1, 19, 1, 3, 2, true, false, 1 }, { 2, 6, 1, 2, 3, true, true, 1 },
        { 1, 18, 1, 2, 1, false, false, 9 }, { 1, 1, 1, 1, 1, false, false, 1 },
    };
    static const int32_t first[12] = { 0, 0, 2, 2, 5, 5, 1, 1, 1, 5, 5, 5 };
    if (i >= (int)(sizeof e / sizeof e[0])) return (fg_tensor){ 0 };
    const fg_tensor q = fg_random(g, e[i].B, e[i].T, e[i].H, e[i].K);
    const fg_tensor k = fg_random(g, e[i].B, e[i].T, e[i].H, e[i].K);
    const fg_tensor v = fg_random(g, e[i].B, e[i].T, e[i].H, e[i].V);
    fg_tensor log_a = fg_random(g, e[i].B, e[i].T, e[i].H, e[i].K), state = { 0 };
    log_a = fg_scale(log_a, e[i].gate, 0);
    log_a = fg_log_sigmoid(log_a);
    if (e[i].state) state = fg_random(g, e[i].B, e[i].H, e[i].K, e[i].V);
    if (e[i].first) {
        const fg_tensor f = fg_given_int(g, FG_DIMS(2, 6), first);
        fg_graph_sequence(g, (fg_sequence){ .first = f });
    }
    return fg_gated_linear_attention(q, k, v, log_a, 0.7, state);
}

const fg_op_code fg_code_gated_linear_attention = {
    .infer = infer, .cpu = cpu, .vjp = vjp, .cost = cost, .decompose = decompose,
    .example = example, .scratch = scratch,
    .bf16 = { .narrow_in = 7, .wide_in = 1u << 3 | 1u << 6, .narrow_out = 1, .wide_out = 2 },
};

/* ---- gated_linear_attention_grad ------------------------------------------------------------ */

typedef struct {                         /* a thread's own, beside its work */
    fg_real *gA;                         /* [.,FG_CHUNK] */
    fg_real *turned;                     /* [Vp,FG_CHUNK] of go, then v */
    fg_real *state_side;                 /* [K,FG_CHUNK] */
    fg_real *go, *gv;                    /* [.,Vp] */
    fg_real *gq, *gk, *gg;               /* [.,Kp] */
} grad_work;

static grad_work grad_cut(char *base, size_t *used, const fg__scan *z)
{
    const size_t size = sizeof(fg_real);
    grad_work w;
    w.gA = fg__cut(base, used, FG_CHUNK * FG_CHUNK, size);
    w.turned = fg__cut(base, used, FG_CHUNK * z->Vp, size);
    w.state_side = fg__cut(base, used, FG_CHUNK * z->Kp, size);
    w.go = fg__cut(base, used, FG_CHUNK * z->Vp, size);
    w.gv = fg__cut(base, used, FG_CHUNK * z->Vp, size);
    w.gq = fg__cut(base, used, FG_CHUNK * z->Kp, size);
    w.gk = fg__cut(base, used, FG_CHUNK * z->Kp, size);
    w.gg = fg__cut(base, used, FG_CHUNK * z->Kp, size);
    return w;
}

/* to[t][d] = sum_j S[d][j] x_t[j], by way of the turned panel of x */
static void through_state(const fg__scan *z, int64_t n, const fg_real *S, const grad_work *u,
                          fg_real *to)
{
    const fg__product p = { 0, z->K, 0, FG_CHUNK, 0, z->V, FG_WHOLE, S, z->Vp, 1, u->turned,
                            FG_CHUNK, u->state_side, FG_CHUNK, NULL, false };
    fg__multiply(&p);
    fg__turn_back(u->state_side, FG_CHUNK, n, z->K, to, z->Kp);
}

/* gv_s = sum_t A_ts go_t + R^T k_out_s,  gA_ts = scale go_t.v_s,  gq = S go,  gk = R v */
static void grad_products(const fg__scan *z, int64_t n, const work *w, const grad_work *u,
                          const fg_real *S, const fg_real *R)
{
    const fg__product from_chunk = { 0, n, 0, z->Vp, 0, n, FG_K_FROM_R, w->A, 1, FG_CHUNK, u->go,
                                     z->Vp, u->gv, z->Vp, NULL, false };
    const fg__product from_state = { 0, n, 0, z->Vp, 0, z->K, FG_WHOLE, w->k_out, z->Kp, 1, R,
                                     z->Vp, u->gv, z->Vp, NULL, true };
    const fg__product weights = { 0, n, 0, FG_CHUNK, 0, z->V, FG_WHOLE, u->go, z->Vp, 1, u->turned,
                                  FG_CHUNK, u->gA, FG_CHUNK, NULL, false };
    pairs(z, n, w);
    fg__multiply(&from_chunk);
    fg__multiply(&from_state);
    fg__turn(u->go, z->Vp, n, z->V, u->turned, FG_CHUNK);
    through_state(z, n, S, u, u->gq);
    fg__turn(w->v, z->Vp, n, z->V, u->turned, FG_CHUNK);
    through_state(z, n, R, u, u->gk);
    fg__multiply(&weights);
    for (int64_t i = 0; i < n * FG_CHUNK; i++) u->gA[i] *= (fg_real)z->scale;
}

/* What passes through the states: decays on gq and gk, and the gates that q from before, k on its
 * way out, and the state itself cross.  across: rowsum(S R) decay, [Kp]. */
static void grad_outer(const fg__scan *z, int64_t n, const work *w, const grad_work *u,
                       const fg_real *across)
{
    const fg_vec scale = fg_vset((fg_real)z->scale);
    for (int64_t d = 0; d < z->Kp; d += FG_LANES) {
        fg_vec p = fg_vset(1), sum = fg_vload(across + d);
        for (int64_t t = 0; t < n; t++) {
            p = fade(p * fg_vload(w->a + t * z->Kp + d));
            fg_vstore(u->gq + t * z->Kp + d, fg_vload(u->gq + t * z->Kp + d) * p * scale);
        }
        p = fg_vset(1);
        for (int64_t t = n - 1; t >= 0; t--) {
            fg_vstore(u->gk + t * z->Kp + d, fg_vload(u->gk + t * z->Kp + d) * p);
            p = fade(p * fg_vload(w->a + t * z->Kp + d));
        }
        for (int64_t t = 0; t < n; t++) {                /* state and the rows before, to behind */
            fg_vstore(u->gg + t * z->Kp + d, sum);
            sum = fg_vfma(fg_vload(w->k + t * z->Kp + d), fg_vload(u->gk + t * z->Kp + d), sum);
        }
        sum = fg_vset(0);
        for (int64_t t = n - 1; t >= 0; t--) {           /* state to this row and those after */
            sum = fg_vfma(fg_vload(w->q + t * z->Kp + d), fg_vload(u->gq + t * z->Kp + d), sum);
            fg_vstore(u->gg + t * z->Kp + d, fg_vload(u->gg + t * z->Kp + d) + sum);
        }
    }
}

/* Pairs s <= t of the chunk: gq_t += gA_ts k_s p, gk_s += gA_ts q_t p, and what the pair carries,
 * gA_ts q_t k_s p, to every gate in (s, t];  p = prod_(s<r<=t) a_r. */
static void grad_pairs(const fg__scan *z, int64_t n, const work *w, const grad_work *u)
{
    for (int64_t s = 0; s < n; s++)
        for (int64_t d = 0; d < z->Kp; d += FG_LANES) {
            fg_vec p[FG_CHUNK], across = { 0 };
            const fg_vec k = fg_vload(w->k + s * z->Kp + d);
            fg_vec gk = fg_vload(u->gk + s * z->Kp + d);
            p[s] = fg_vset(1);
            for (int64_t t = s + 1; t < n; t++)
                p[t] = fade(p[t - 1] * fg_vload(w->a + t * z->Kp + d));
            for (int64_t t = n - 1; t >= s; t--) {
                const int64_t at = t * z->Kp + d;
                const fg_vec x = p[t] * fg_vset(u->gA[t * FG_CHUNK + s]);
                const fg_vec xq = x * fg_vload(w->q + at);
                fg_vstore(u->gq + at, fg_vfma(x, k, fg_vload(u->gq + at)));
                gk = gk + xq;
                if (t == s) break;
                across = fg_vfma(xq, k, across);
                fg_vstore(u->gg + at, fg_vload(u->gg + at) + across);
            }
            fg_vstore(u->gk + s * z->Kp + d, gk);
        }
}

/* One chunk, S before it; R goes from behind the chunk to before it. */
static void grad_chunk(const fg__scan *z, int64_t n, const work *w, const grad_work *u,
                       const fg_real *S, fg_real *R)
{
    const fg__product add = { 0, z->K, 0, z->Vp, 0, n, FG_WHOLE, w->q_in, 1, z->Kp, u->go, z->Vp,
                              R, z->Vp, NULL, true };
    fg_real *across = u->state_side;
    decays(z, n, w);
    grad_products(z, n, w, u, S, R);
    for (int64_t d = 0; d < z->Kp; d++) across[d] = 0;
    for (int64_t d = 0; d < z->K; d++) {
        fg_vec sum = { 0 };
        for (int64_t j = 0; j < z->Vp; j += FG_LANES) {
            const fg_vec r = fg_vload(R + d * z->Vp + j) * fg_vset(w->decay[d]);
            sum = fg_vfma(fg_vload(S + d * z->Vp + j), r, sum);
            fg_vstore(R + d * z->Vp + j, r);
        }
        across[d] = fg_vsum(sum);
    }
    grad_outer(z, n, w, u, across);
    grad_pairs(z, n, w, u);
    fg__multiply(&add);
}

typedef struct { const fg_exec *e; fg__way_back way; work w; grad_work u; } grad_head;

static void grad_pass(void *self, int64_t t, int64_t n, fg_real *S)
{
    const grad_head *x = self;
    load(x->way.z, x->e, 2, x->way.b, t, x->way.h, n, &x->w);
    decays(x->way.z, n, &x->w);
    pass_state(x->way.z, n, &x->w, S);
}

static void grad_back(void *self, int64_t t, int64_t n, const fg_real *S)
{
    const grad_head *x = self;
    const fg__scan *z = x->way.z;
    const int64_t row = (x->way.b * z->T + t) * z->H + x->way.h, K = row * z->K, V = row * z->V;
    load(z, x->e, 2, x->way.b, t, x->way.h, n, &x->w);
    fg__load_rows(fg__in(x->e, 0, V), z->H * z->V, n, z->V, z->Vp, x->u.go);
    grad_chunk(z, n, &x->w, &x->u, S, x->way.R);
    fg__store_rows(x->u.gq, z->Kp, n, z->K, fg__out(x->e, 0, K), z->H * z->K);
    fg__store_rows(x->u.gk, z->Kp, n, z->K, fg__out(x->e, 1, K), z->H * z->K);
    fg__store_rows(x->u.gv, z->Vp, n, z->V, fg__out(x->e, 2, V), z->H * z->V);
    fg__store_rows(x->u.gg, z->Kp, n, z->K, fg__out(x->e, 3, K), z->H * z->K);
}

static void grad_clear(void *self, int64_t t, int64_t n)
{
    const grad_head *x = self;
    const fg__scan *z = x->way.z;
    for (int i = 0; i < 4; i++) {
        const int64_t D = i == 2 ? z->V : z->K;
        const int64_t row = (x->way.b * z->T + t) * z->H + x->way.h;
        fg__clear_rows(fg__out(x->e, i, row * D), z->H * D, n, D);
    }
}

static grad_head grad_head_cut(char *base, size_t *used, const fg__scan *z)
{
    grad_head x = { .way = { .pass = grad_pass, .back = grad_back, .clear = grad_clear } };
    fg__way_back_cut(&x.way, base, used, z);
    x.w = work_cut(base, used, z);
    x.u = grad_cut(base, used, z);
    return x;
}

static void grad_cut_all(char *base, size_t *used, const fg__scan *z)
{
    grad_head_cut(base, used, z);
}

static void grad_one_head(const fg_exec *e, const fg__scan *z, int64_t b, int64_t h, char *own)
{
    size_t used = 0;
    grad_head x = grad_head_cut(own, &used, z);
    x.e = e;
    x.way.self = &x;
    x.way.b = b;
    x.way.h = h;
    fg__head_back(&x.way, e->in[7], e->in[1], e->out[4]);
}

static void grad_cpu(const fg_exec *e)
{
    const struct fg_attr_gated_linear_attention_grad *a = e->attr;
    const fg__scan z =
        fg__scan_of(&e->in_shape[3], &e->in_shape[4], a->scale, e->in[6], NULL, e->in[7]);
    fg__all_heads(e, &z, grad_cut_all, grad_one_head);
}

static size_t grad_scratch(const fg_infer *c, int threads)
{
    return fg__heads_scratch(&c->in[3], &c->in[4], threads, grad_cut_all);
}

static fg_cost grad_cost(const fg_infer *c)
{
    const double rows = (double)fg_shape_count(c->in[3]) / (double)c->in[3].dim[3];
    const double K = (double)c->in[3].dim[3], V = (double)c->in[4].dim[3];
    return (fg_cost){ .flops = rows * (10 * K * V + FG_CHUNK * (3 * K + 2 * V)),
                      .bytes = (double)sizeof(float) * rows * (9 * K + 5 * V) };
}

const fg_op_code fg_code_gated_linear_attention_grad = {
    .infer = fg__scan_grad_infer, .cpu = grad_cpu, .cost = grad_cost, .scratch = grad_scratch,
    .bf16 = { .narrow_in = 1 | 7u << 2, .wide_in = 1u << 1 | 1u << 5 | 1u << 7, .narrow_out = 7,
              .wide_out = 3u << 3 },
};
