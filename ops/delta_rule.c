/* delta_rule.c - linear attention whose state is corrected, not only added to: DeltaNet.
 *
 *     e_t = v_t - S_(t-1)^T k_t,   S_t = S_(t-1) + beta_t k_t e_t^T,   o_t = scale S_t^T q_t
 *
 * q, k: [B,T,H,K], k of length 1 at most   v, o: [B,T,H,V]   beta: [B,T,H], in [0,2]
 * first: i32[B,T]   past: i32[1]   state: f32[B,H,K,V], S before row 0; absent: 0.  Second output:
 * S after the last row.  Rows of padding give 0; a document begins with S = 0.
 * In chunks of n rows, S before the chunk:
 *     e_t = (v_t - S^T k_t) - sum_(s<t) (k_t.k_s) u_s,   u_t = beta_t e_t      by substitution
 *     o_t = scale (S^T q_t + sum_(s<=t) (q_t.k_s) u_s),   S' = S + sum_t k_t u_t^T
 * Solving row by row is exact for identical keys, where a series for the inverse of the triangular
 * matrix fails; a chunk is short enough to need no inverse.
 * Forward reads q, k, v, beta and writes o: once.  The gradient reads them, k, v and beta a second
 * time (a third in sequences over 1024 rows), and stores no states between the passes.
 * Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence
 * Length" (arXiv 2406.06484), section 3. */
#include "linear_attention.h"

fg_tensor (fg_delta_rule)(fg_loc at, fg_tensor q, fg_tensor k, fg_tensor v, fg_tensor beta,
                          double scale, fg_tensor state)
{
    const struct fg_attr_delta_rule a = { scale };
    return fg__scan_build(at, &fg_op_table[FG_OP_delta_rule], &a, q, k, v, beta, state);
}

/* ---- a chunk -------------------------------------------------------------------------------- */

typedef struct {                         /* a thread's own; panels of FG_CHUNK rows */
    fg_real *S;                          /* [K,Vp] */
    fg_real *q, *k;                      /* [.,Kp]; q times scale */
    fg_real *v, *e, *u, *o;              /* [.,Vp] */
    fg_real *k_turned;                   /* [Kp,FG_CHUNK] */
    fg_real *kk, *qk;                    /* [.,FG_CHUNK]: k_t.k_s, and scale q_t.k_s for s <= t */
    fg_real beta[FG_CHUNK];
} work;

static work work_cut(char *base, size_t *used, const fg__scan *z)
{
    const size_t size = sizeof(fg_real);
    work w;
    w.S = fg__cut(base, used, z->K * z->Vp, size);
    w.q = fg__cut(base, used, FG_CHUNK * z->Kp, size);
    w.k = fg__cut(base, used, FG_CHUNK * z->Kp, size);
    w.v = fg__cut(base, used, FG_CHUNK * z->Vp, size);
    w.e = fg__cut(base, used, FG_CHUNK * z->Vp, size);
    w.u = fg__cut(base, used, FG_CHUNK * z->Vp, size);
    w.o = fg__cut(base, used, FG_CHUNK * z->Vp, size);
    w.k_turned = fg__cut(base, used, FG_CHUNK * z->Kp, size);
    w.kk = fg__cut(base, used, FG_CHUNK * FG_CHUNK, size);
    w.qk = fg__cut(base, used, FG_CHUNK * FG_CHUNK, size);
    return w;
}

/* Inputs from i on. */
static void load(const fg__scan *z, const fg_exec *e, int i, int64_t b, int64_t t, int64_t h,
                 int64_t n, work *w)
{
    const int64_t at = (b * z->T + t) * z->H + h, row = z->H * z->K;
    const fg_real *beta = fg__in(e, i + 3, at);
    fg__load_rows(fg__in(e, i, at * z->K), row, n, z->K, z->Kp, w->q);
    fg__load_rows(fg__in(e, i + 1, at * z->K), row, n, z->K, z->Kp, w->k);
    fg__load_rows(fg__in(e, i + 2, at * z->V), z->H * z->V, n, z->V, z->Vp, w->v);
    for (int64_t j = 0; j < n * z->Kp; j += FG_LANES)
        fg_vstore(w->q + j, fg_vload(w->q + j) * fg_vset((fg_real)z->scale));
    for (int64_t j = 0; j < n; j++) w->beta[j] = beta[j * z->H];
}

/* y_t -= x y_s, a row of n elements, whole vectors */
static inline void subtract(fg_real x, const fg_real *from, int64_t n, fg_real *y)
{
    const fg_vec minus = fg_vset(-x);
    for (int64_t j = 0; j < n; j += FG_LANES)
        fg_vstore(y + j, fg_vfma(minus, fg_vload(from + j), fg_vload(y + j)));
}

/* e and u, from S before the chunk */
static void solve(const fg__scan *z, int64_t n, const work *w, const fg_real *S)
{
    const fg__product known = { 0, n, 0, z->Vp, 0, z->K, FG_WHOLE, w->k, z->Kp, 1, S, z->Vp, w->e,
                                z->Vp, NULL, false };
    const fg__product keys = { 0, n, 0, FG_CHUNK, 0, z->K, FG_WHOLE, w->k, z->Kp, 1, w->k_turned,
                               FG_CHUNK, w->kk, FG_CHUNK, NULL, false };
    fg__turn(w->k, z->Kp, n, z->K, w->k_turned, FG_CHUNK);
    fg__multiply(&known);
    fg__multiply(&keys);
    for (int64_t t = 0; t < n; t++) {
        fg_real *e = w->e + t * z->Vp, *u = w->u + t * z->Vp;
        for (int64_t j = 0; j < z->Vp; j += FG_LANES)
            fg_vstore(e + j, fg_vload(w->v + t * z->Vp + j) - fg_vload(e + j));
        for (int64_t s = 0; s < t; s++)
            subtract(w->kk[t * FG_CHUNK + s], w->u + s * z->Vp, z->Vp, e);
        for (int64_t j = 0; j < z->Vp; j += FG_LANES)
            fg_vstore(u + j, fg_vload(e + j) * fg_vset(w->beta[t]));
    }
}

/* scale q_t.k_s, 0 for s > t */
static void scores(const fg__scan *z, int64_t n, const work *w)
{
    const fg__product p = { 0, n, 0, FG_CHUNK, 0, z->K, FG_WHOLE, w->q, z->Kp, 1, w->k_turned,
                            FG_CHUNK, w->qk, FG_CHUNK, NULL, false };
    fg__multiply(&p);
    for (int64_t t = 0; t < n; t++)
        for (int64_t s = t + 1; s < FG_CHUNK; s++) w->qk[t * FG_CHUNK + s] = 0;
}

/* to = to + sum_t x_t y_t^T; x: rows of Kp, y: rows of Vp */
static void add_outer(const fg__scan *z, int64_t n, const fg_real *x, const fg_real *y, fg_real *to)
{
    const fg__product p = { 0, z->K, 0, z->Vp, 0, n, FG_WHOLE, x, 1, z->Kp, y, z->Vp, to, z->Vp,
                            NULL, true };
    fg__multiply(&p);
}

static void chunk(const fg__scan *z, int64_t n, const work *w)
{
    const fg__product from_state = { 0, n, 0, z->Vp, 0, z->K, FG_WHOLE, w->q, z->Kp, 1, w->S,
                                     z->Vp, w->o, z->Vp, NULL, false };
    const fg__product from_chunk = { 0, n, 0, z->Vp, 0, n, FG_K_UP_TO_R, w->qk, FG_CHUNK, 1, w->u,
                                     z->Vp, w->o, z->Vp, NULL, true };
    solve(z, n, w, w->S);
    scores(z, n, w);
    fg__multiply(&from_state);
    fg__multiply(&from_chunk);
    add_outer(z, n, w->k, w->u, w->S);
}

/* ---- the forward kernel --------------------------------------------------------------------- */

static void head(const fg_exec *e, const fg__scan *z, int64_t b, int64_t h, work *w)
{
    const int64_t own = (b * z->H + h) * z->K * z->V, row = z->H * z->V;
    fg__run r = { 0 };
    for (int64_t t0 = 0; t0 < z->T; t0 = r.t1) {
        fg_real *o = fg__out(e, 0, ((b * z->T + t0) * z->H + h) * z->V);
        r = fg__run_from(z, b, t0);
        fg__load_state(z, r.carried ? fg__in(e, 6, own) : NULL, w->S);
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

static inline fg_vec part(const fg_real *x, int64_t n)
{
    return n >= FG_LANES ? fg_vload(x) : fg_vload_n(x, n);
}

static inline void put(fg_real *x, fg_vec v, int64_t n)
{
    if (n >= FG_LANES) fg_vstore(x, v);
    else fg_vstore_n(x, v, n);
}

/* One row: the state is read twice and written once.  w->u: beta e. */
static void step(const fg_exec *e, const fg__scan *z, int64_t b, int64_t h, const work *w)
{
    const int64_t row = b * z->H + h, K = z->K, V = z->V;
    const fg_real *q = fg__in(e, 0, row * K), *k = fg__in(e, 1, row * K);
    const fg_real *v = fg__in(e, 2, row * V), beta = *fg__in(e, 3, row);
    const fg_real *S = fg__carried(z, b) ? fg__in(e, 6, row * K * V) : NULL;
    fg_real *o = fg__out(e, 0, row * V), *to = fg__out(e, 1, row * K * V), *u = w->u;
    const bool padding = fg__ahead(z, b, 0) > 0;
    memset(o, 0, (size_t)V * sizeof *o);
    if (padding) memset(to, 0, (size_t)(K * V) * sizeof *to);
    for (int64_t j = 0; j < V; j += FG_LANES) fg_vstore(u + j, part(v + j, V - j));
    for (int64_t d = 0; d < K && S; d++)
        for (int64_t j = 0; j < V; j += FG_LANES)
            fg_vstore(u + j, fg_vfma(fg_vset(-k[d]), part(S + d * V + j, V - j), fg_vload(u + j)));
    for (int64_t j = 0; j < V; j += FG_LANES) fg_vstore(u + j, fg_vload(u + j) * fg_vset(beta));
    for (int64_t d = 0; d < K && !padding; d++) {
        const fg_vec kd = fg_vset(k[d]), qd = fg_vset((fg_real)z->scale * q[d]);
        for (int64_t j = 0; j < V; j += FG_LANES) {
            fg_vec x = kd * fg_vload(u + j);
            if (S) x = x + part(S + d * V + j, V - j);
            put(to + d * V + j, x, V - j);
            put(o + j, fg_vfma(qd, x, part(o + j, V - j)), V - j);
        }
    }
}

static void cut(char *base, size_t *used, const fg__scan *z) { work_cut(base, used, z); }

static void one_head(const fg_exec *e, const fg__scan *z, int64_t b, int64_t h, char *own)
{
    size_t used = 0;
    work w = work_cut(own, &used, z);
    if (z->T == 1) step(e, z, b, h, &w);
    else head(e, z, b, h, &w);
}

static void cpu(const fg_exec *e)
{
    const struct fg_attr_delta_rule *a = e->attr;
    const fg__scan z =
        fg__scan_of(&e->in_shape[1], &e->in_shape[2], a->scale, e->in[4], e->in[5], e->in[6]);
    fg__all_heads(e, &z, cut, one_head);
}

static size_t scratch(const fg_infer *c, int threads)
{
    return fg__heads_scratch(&c->in[1], &c->in[2], threads, cut);
}

/* ---- gradient, definition, cost ------------------------------------------------------------- */

static void vjp(fg_vjp *v) { fg__scan_vjp(v, &fg_op_table[FG_OP_delta_rule_grad]); }

/* The recurrence, row by row. */
static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const struct fg_attr_delta_rule *a = attr;
    const int64_t B = fg_dim(in[1], 0), T = fg_dim(in[1], 1), H = fg_dim(in[1], 2);
    const int64_t V = fg_dim(in[2], 3);
    const fg_tensor betas = fg_reshape(in[3], FG_DIMS(B, T, H, 1));
    fg_tensor S = in[6];
    for (int64_t t = 0; t < T; t++) {
        const fg_tensor k = fg__row_of(in[1], t, true), q = fg__row_of(in[0], t, false);
        const fg_tensor beta = fg__row_of(betas, t, false);
        fg_tensor e = fg__row_of(in[2], t, false);
        if (!fg_absent(S)) {
            S = fg__where_seen(S, in[4], in[5], t, -1);
            const fg_tensor known = fg_matmul(k, S, true, false);
            e = fg_sub(e, known);
        }
        e = fg_mul(e, beta);
        const fg_tensor add = fg_mul(k, e);
        S = fg_absent(S) ? add : fg_add(S, add);
        S = fg__where_seen(S, in[4], in[5], t, 0);
        fg_tensor o = fg_matmul(q, S, false, false);
        o = fg_scale(o, a->scale, 0);
        o = fg_reshape(o, FG_DIMS(B, 1, H, V));
        o = fg_cast(o, fg_dtype_of(in[2]));
        out[0] = t ? fg_concat(out[0], o, 1) : o;
    }
    out[1] = S;
}

/* The state is read twice and changed once in every row: 6 K V operations; FG_CHUNK / 2 pairs. */
static fg_cost cost(const fg_infer *c)
{
    const double rows = (double)fg_shape_count(c->in[3]);
    const double K = (double)c->in[1].dim[3], V = (double)c->in[2].dim[3];
    return (fg_cost){ .flops = rows * (6 * K * V + FG_CHUNK * (2 * K + 2 * V)),
                      .bytes = (double)sizeof(float) * (rows * (2 * K + 2 * V + 1)
                               + (c->given[6] ? 2 : 1) * (double)fg_shape_count(c->out[1])) };
}

static fg_tensor example(fg_graph *g, int i)
{
    static const struct { int64_t B, T, H, K, V; bool state, first; } e[] = {
        { 2, 5, 2, 3, 4, false, false }, { 1, 1, 2, 5, 3, true, false },
        { 1, 19, 1, 3, 2, true, false }, { 2, 6, 1, 2, 3, true, true },
        { 1, 33, 1, 2, 1, false, false }, { 1, 1, 1, 1, 1, false, false },
    };
    static const int32_t first[12] = { 0, 0, 2, 2, 5, 5, 1, 1, 1, 5, 5, 5 };
    if (i >= (int)(sizeof e / sizeof e[0])) return (fg_tensor){ 0 };
    const fg_tensor q = fg_random(g, e[i].B, e[i].T, e[i].H, e[i].K);
    fg_tensor k = fg_random(g, e[i].B, e[i].T, e[i].H, e[i].K);
    const fg_tensor v = fg_random(g, e[i].B, e[i].T, e[i].H, e[i].V);
    fg_tensor beta = fg_random(g, e[i].B, e[i].T, e[i].H), state = { 0 };
    k = fg_l2_norm(k, 1e-2);
    beta = fg_sigmoid(beta);
    if (e[i].state) state = fg_random(g, e[i].B, e[i].H, e[i].K, e[i].V);
    if (e[i].first) {
        const fg_tensor f = fg_given_int(g, FG_DIMS(2, 6), first);
        fg_graph_sequence(g, (fg_sequence){ .first = f });
    }
    return fg_delta_rule(q, k, v, beta, 0.7, state);
}

const fg_op_code fg_code_delta_rule = {
    .infer = fg__delta_check, .cpu = cpu, .vjp = vjp, .cost = cost, .decompose = decompose,
    .example = example, .scratch = scratch,
    .bf16 = { .narrow_in = 7, .wide_in = 1u << 6, .narrow_out = 1, .wide_out = 2 },
};

/* ---- delta_rule_grad ------------------------------------------------------------------------ */
/* Of a chunk, R behind it, S before it, all else as on top:
 *     gu_s = R^T k_s + sum_(t>=s) scale (q_t.k_s) go_t
 *     y_s  = gu_s - sum_(t>s) (k_t.k_s) ge_t,   ge_t = beta_t y_t          by substitution
 *     gbeta_t = y_t.e_t,   gv_t = ge_t
 *     gq_t = scale S go_t + sum_(s<=t) (go_t.u_s) scale k_s
 *     gk_t = R u_t - S ge_t + sum_(s>=t) (go_s.u_t) scale q_s
 *            - sum_(s<t) (ge_t.u_s) k_s - sum_(s>t) (ge_s.u_t) k_s
 *     R before = R + sum_t (scale q_t go_t^T - k_t ge_t^T) */

typedef struct {
    const fg_exec *e;
    fg__way_back way;
    work w;
    fg_real *go, *y, *ge;                /* [.,Vp]; y is gu at first, ge = -beta y */
    fg_real *gq, *gk, *more;             /* [.,Kp] */
    fg_real *turned;                     /* [Vp,FG_CHUNK] */
    fg_real *state_side;                 /* [K,FG_CHUNK] */
    fg_real *of_q, *of_k;                /* go_t.u_s for s <= t, -ge_t.u_s for s < t */
} grad_head;

/* to[t] = S x_t */
static void through_state(const grad_head *x, int64_t n, const fg_real *S, const fg_real *from,
                          fg_real *to)
{
    const fg__scan *z = x->way.z;
    const fg__product p = { 0, z->K, 0, FG_CHUNK, 0, z->V, FG_WHOLE, S, z->Vp, 1, x->turned,
                            FG_CHUNK, x->state_side, FG_CHUNK, NULL, false };
    fg__turn(from, z->Vp, n, z->V, x->turned, FG_CHUNK);
    fg__multiply(&p);
    fg__turn_back(x->state_side, FG_CHUNK, n, z->K, to, z->Kp);
}

/* y and -ge */
static void solve_back(const grad_head *x, int64_t n)
{
    const fg__scan *z = x->way.z;
    const work *w = &x->w;
    const fg__product from_state = { 0, n, 0, z->Vp, 0, z->K, FG_WHOLE, w->k, z->Kp, 1, x->way.R,
                                     z->Vp, x->y, z->Vp, NULL, false };
    const fg__product from_chunk = { 0, n, 0, z->Vp, 0, n, FG_K_FROM_R, w->qk, 1, FG_CHUNK, x->go,
                                     z->Vp, x->y, z->Vp, NULL, true };
    fg__multiply(&from_state);
    fg__multiply(&from_chunk);
    for (int64_t s = n - 1; s >= 0; s--) {
        fg_real *y = x->y + s * z->Vp, *ge = x->ge + s * z->Vp;
        for (int64_t t = s + 1; t < n; t++)
            subtract(-w->kk[t * FG_CHUNK + s], x->ge + t * z->Vp, z->Vp, y);
        for (int64_t j = 0; j < z->Vp; j += FG_LANES)
            fg_vstore(ge + j, fg_vload(y + j) * fg_vset(-w->beta[s]));
    }
}

/* to_ts = x_t.u_s for s <= t - gap, else 0; x->turned holds u */
static void against_u(const grad_head *x, int64_t n, const fg_real *from, int64_t gap, fg_real *to)
{
    const fg__scan *z = x->way.z;
    const fg__product p = { 0, n, 0, FG_CHUNK, 0, z->V, FG_WHOLE, from, z->Vp, 1, x->turned,
                            FG_CHUNK, to, FG_CHUNK, NULL, false };
    fg__multiply(&p);
    for (int64_t t = 0; t < n; t++)
        for (int64_t s = t - gap + 1; s < FG_CHUNK; s++) to[t * FG_CHUNK + s] = 0;
}

/* to_t += sum_s a_ts x_s, or a_st if turned */
static void add_rows(const grad_head *x, int64_t n, const fg_real *a, bool turned,
                     const fg_real *from, fg_real *to)
{
    const fg__scan *z = x->way.z;
    const fg__product p = { 0, n, 0, z->Kp, 0, n, turned ? FG_K_FROM_R : FG_K_UP_TO_R, a,
                            turned ? 1 : FG_CHUNK, turned ? FG_CHUNK : 1, from, z->Kp, to, z->Kp,
                            NULL, true };
    fg__multiply(&p);
}

static void grad_pass(void *self, int64_t t, int64_t n, fg_real *S)
{
    grad_head *x = self;
    load(x->way.z, x->e, 2, x->way.b, t, x->way.h, n, &x->w);
    solve(x->way.z, n, &x->w, S);
    add_outer(x->way.z, n, x->w.k, x->w.u, S);
}

static void grad_chunk(grad_head *x, int64_t n, const fg_real *S)
{
    const fg__scan *z = x->way.z;
    const work *w = &x->w;
    const fg_vec scale = fg_vset((fg_real)z->scale);
    solve(z, n, w, S);
    scores(z, n, w);
    solve_back(x, n);
    through_state(x, n, S, x->go, x->gq);
    through_state(x, n, S, x->ge, x->gk);
    through_state(x, n, x->way.R, w->u, x->more);        /* leaves u turned */
    for (int64_t j = 0; j < n * z->Kp; j += FG_LANES)
        fg_vstore(x->gk + j, fg_vload(x->gk + j) + fg_vload(x->more + j));
    against_u(x, n, x->go, 0, x->of_q);
    against_u(x, n, x->ge, 1, x->of_k);
    add_rows(x, n, x->of_q, false, w->k, x->gq);
    for (int64_t j = 0; j < n * z->Kp; j += FG_LANES)
        fg_vstore(x->gq + j, fg_vload(x->gq + j) * scale);
    add_rows(x, n, x->of_q, true, w->q, x->gk);          /* q carries the scale */
    add_rows(x, n, x->of_k, false, w->k, x->gk);
    add_rows(x, n, x->of_k, true, w->k, x->gk);
    add_outer(z, n, w->q, x->go, x->way.R);
    add_outer(z, n, w->k, x->ge, x->way.R);
}

static void grad_back(void *self, int64_t t, int64_t n, const fg_real *S)
{
    grad_head *x = self;
    const fg__scan *z = x->way.z;
    const int64_t row = (x->way.b * z->T + t) * z->H + x->way.h, V = row * z->V;
    load(z, x->e, 2, x->way.b, t, x->way.h, n, &x->w);
    fg__load_rows(fg__in(x->e, 0, V), z->H * z->V, n, z->V, z->Vp, x->go);
    grad_chunk(x, n, S);
    for (int64_t i = 0; i < n; i++) {
        fg_vec sum = { 0 };
        for (int64_t j = i * z->Vp; j < (i + 1) * z->Vp; j += FG_LANES) {
            sum = fg_vfma(fg_vload(x->y + j), fg_vload(x->w.e + j), sum);
            fg_vstore(x->ge + j, -fg_vload(x->ge + j));
        }
        *fg__out(x->e, 3, row + i * z->H) = fg_vsum(sum);
    }
    fg__store_rows(x->gq, z->Kp, n, z->K, fg__out(x->e, 0, row * z->K), z->H * z->K);
    fg__store_rows(x->gk, z->Kp, n, z->K, fg__out(x->e, 1, row * z->K), z->H * z->K);
    fg__store_rows(x->ge, z->Vp, n, z->V, fg__out(x->e, 2, V), z->H * z->V);
}

static void grad_clear(void *self, int64_t t, int64_t n)
{
    const grad_head *x = self;
    const fg__scan *z = x->way.z;
    const int64_t row = (x->way.b * z->T + t) * z->H + x->way.h;
    const int64_t D[] = { z->K, z->K, z->V, 1 };
    for (int i = 0; i < 4; i++)
        fg__clear_rows(fg__out(x->e, i, row * D[i]), z->H * D[i], n, D[i]);
}

static grad_head grad_head_cut(char *base, size_t *used, const fg__scan *z)
{
    const size_t size = sizeof(fg_real);
    grad_head x = { .way = { .pass = grad_pass, .back = grad_back, .clear = grad_clear } };
    fg__way_back_cut(&x.way, base, used, z);
    x.w = work_cut(base, used, z);
    x.go = fg__cut(base, used, FG_CHUNK * z->Vp, size);
    x.y = fg__cut(base, used, FG_CHUNK * z->Vp, size);
    x.ge = fg__cut(base, used, FG_CHUNK * z->Vp, size);
    x.gq = fg__cut(base, used, FG_CHUNK * z->Kp, size);
    x.gk = fg__cut(base, used, FG_CHUNK * z->Kp, size);
    x.more = fg__cut(base, used, FG_CHUNK * z->Kp, size);
    x.turned = fg__cut(base, used, FG_CHUNK * z->Vp, size);
    x.state_side = fg__cut(base, used, FG_CHUNK * z->Kp, size);
    x.of_q = fg__cut(base, used, FG_CHUNK * FG_CHUNK, size);
    x.of_k = fg__cut(base, used, FG_CHUNK * FG_CHUNK, size);
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
    const struct fg_attr_delta_rule_grad *a = e->attr;
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
    const double rows = (double)fg_shape_count(c->in[5]);
    const double K = (double)c->in[3].dim[3], V = (double)c->in[4].dim[3];
    return (fg_cost){ .flops = rows * (18 * K * V + FG_CHUNK * (8 * K + 8 * V)),
                      .bytes = (double)sizeof(float) * rows * (6 * K + 4 * V + 3) };
}

const fg_op_code fg_code_delta_rule_grad = {
    .infer = fg__scan_grad_infer, .cpu = grad_cpu, .cost = grad_cost, .scratch = grad_scratch,
    .bf16 = { .narrow_in = 1 | 7u << 2, .wide_in = 1u << 1 | 1u << 7, .narrow_out = 7,
              .wide_out = 1u << 4, .like = { 0, 0, 0, 6 } },
};
