/* fuse_few.c - the rules for graphs of a few tokens, where launches cost more than arithmetic.
 *
 *   linear(rms_norm(a [+ b], w), m), few rows       norm_linear(a, b, w, m)
 *   linear(swiglu(x), m), few rows                  swiglu_linear(x, m)
 *   linear(x, m), few rows                          few_linear(x, m)
 *   one token through a FoX (Pro) layer's heads     forget_decode
 *
 * They hold in graphs without gradients: there nobody else needs what lies between.  A layer that
 * is built in another way keeps its nodes. */
#include "internal.h"
#include "rewrite.h"

enum { FEW = 8 };                        /* rows of a product */

static bool is_op(const fg_node *n, int id) { return n->op == &fg_op_table[id]; }

/* The node that makes v, if it is one of that op; NULL otherwise. */
static const fg_node *made_by(const fg_rewrite *r, uint32_t v, int id)
{
    const uint32_t k = v ? r->g->values[fg__now(r, v)].node : FG_NO_NODE;
    return k == FG_NO_NODE || !is_op(&r->g->nodes[k], id) ? NULL : &r->g->nodes[k];
}

/* The same, if v is its first result. */
static const fg_node *first_of(const fg_rewrite *r, uint32_t v, int id)
{
    const fg_node *n = made_by(r, v, id);
    return n && n->out[0] == fg__now(r, v) ? n : NULL;
}

/* v, or what it is another shape of. */
static uint32_t unshaped(const fg_rewrite *r, uint32_t v)
{
    const fg_node *n = made_by(r, v, FG_OP_reshape);
    return n ? unshaped(r, n->in[0]) : fg__now(r, v);
}

static uint32_t index_of(const fg_rewrite *r, const fg_node *n)
{
    return (uint32_t)(n - r->g->nodes);
}

/* ---- products ------------------------------------------------------------------------------- */

/* v is made of parameters alone. */
static bool of_weights(const fg_rewrite *r, uint32_t v, int depth)
{
    const fg_value *x = &r->g->values[fg__now(r, v)];
    if (x->kind != FG_OF_NODE) return x->kind == FG_OF_PARAM;
    const fg_node *n = &r->g->nodes[x->node];
    if (n->op->code->memory == FG_MUTATE || depth > 4 * FG_MAX_IN) return false;
    for (int i = 0; i < n->n_in; i++)
        if (n->in[i] && !of_weights(r, n->in[i], depth + 1)) return false;
    return true;
}

/* Something is launched for v: that has ended before what reads it begins, and with it all that was
 * launched in front of the graph and may have written its weights. */
static bool is_launched(const fg_rewrite *r, uint32_t v)
{
    return r->g->values[unshaped(r, v)].kind == FG_OF_NODE;
}

/* One norm over the row. */
static bool is_row_norm(const fg_node *norm)
{
    return ((const struct fg_attr_rms_norm *)norm->attr)->groups == 1;
}

static void fuse_norm(fg_rewrite *r, uint32_t k, const fg_node *norm)
{
    fg_graph *g = r->g;
    const fg_node linear = g->nodes[k], old = *norm;
    const bool sum = is_op(&old, FG_OP_add_rms_norm);
    const struct fg_attr_rms_norm *a = old.attr;             /* eps comes first in both */
    const fg_tensor none = { 0 }, w = fg__now_tensor(r, old.in[sum ? 2 : 1]);
    const fg_tensor in[] = { fg__now_tensor(r, old.in[0]),
                             sum ? fg__now_tensor(r, old.in[1]) : none, w,
                             fg__now_tensor(r, linear.in[1]) };
    const fg_dtype type = g->values[sum ? old.out[1] : in[0].id].type;
    const uint32_t first = fg__build_as(r, k);
    const fg_tensor t = FG_APPLY(norm_linear, FG_HERE, in, a->eps, true);
    if (!fg_ok(t)) { fg__built(r, k, first); return; }
    g->values[t.id].type = g->values[linear.out[0]].type;
    g->values[fg_result(t, 1).id].type = type;
    fg__built(r, k, first);
    fg__instead(r, linear.out[0], t);
    if (sum) fg__instead(r, old.out[1], fg_result(t, 1));
    fg__take_slot(r, k, t);
}

static void fuse_swiglu(fg_rewrite *r, uint32_t k, const fg_node *gate)
{
    fg_graph *g = r->g;
    const fg_node linear = g->nodes[k];
    const struct fg_attr_swiglu *a = gate->attr;
    const fg_tensor in[] = { fg__now_tensor(r, gate->in[0]), fg__now_tensor(r, linear.in[1]) };
    const uint32_t first = fg__build_as(r, k);
    const fg_tensor t = FG_APPLY(swiglu_linear, FG_HERE, in, a->act, true);
    if (!fg_ok(t)) { fg__built(r, k, first); return; }
    g->values[t.id].type = g->values[linear.out[0]].type;
    fg__built(r, k, first);
    fg__instead(r, linear.out[0], t);
    fg__take_slot(r, k, t);
}

static void make_few(fg_rewrite *r, uint32_t k)
{
    fg_graph *g = r->g;
    const fg_node linear = g->nodes[k];
    const fg_tensor in[] = { fg__now_tensor(r, linear.in[0]), fg__now_tensor(r, linear.in[1]) };
    const uint32_t first = fg__build_as(r, k);
    const fg_tensor t = FG_APPLY(few_linear, FG_HERE, in, true);
    if (!fg_ok(t)) { fg__built(r, k, first); return; }
    g->values[t.id].type = g->values[linear.out[0]].type;
    fg__built(r, k, first);
    fg__instead(r, linear.out[0], t);
    fg__take_slot(r, k, t);
}

static void fuse_product(fg_rewrite *r, uint32_t k)
{
    const fg_node *n = &r->g->nodes[k], *from;
    const fg_tensor x = fg__now_tensor(r, n->in[0]);
    const int64_t width = fg_dim(x, -1);
    if (n->in[2] || fg__now(r, n->out[0]) != n->out[0] || fg_count(x) > FEW * width) return;
    if (!of_weights(r, n->in[1], 0) || !is_launched(r, x.id)) return;
    if ((from = first_of(r, x.id, FG_OP_swiglu)) && is_launched(r, from->in[0]))
        fuse_swiglu(r, k, from);
    else if ((from = first_of(r, x.id, FG_OP_rms_norm)) && is_row_norm(from)
             && is_launched(r, from->in[0]))
        fuse_norm(r, k, from);
    else if ((from = first_of(r, x.id, FG_OP_add_rms_norm)) && is_launched(r, from->in[0]))
        fuse_norm(r, k, from);
    else make_few(r, k);
}

/* ---- a layer's heads ------------------------------------------------------------------------ */

/* A norm over each of H heads of D. */
static bool is_head_norm(const fg_rewrite *r, const fg_node *n, int64_t H, int64_t D)
{
    if (!n) return false;
    const struct fg_attr_rms_norm *a = n->attr;
    const int64_t width = fg_dim(fg__now_tensor(r, n->in[0]), -1);
    return (a->groups == H && width == H * D) || (a->groups == 1 && width == D);
}

typedef struct { const fg_node *mix, *gate, *last; } shift;

/* Node n shifts one token: its gate's sigmoid, and what keeps the row for the next token. */
static bool find_shift(const fg_rewrite *r, const fg_node *n, uint32_t past, shift *s)
{
    const fg_graph *g = r->g;
    if (!n || !n->in[3] || fg__now(r, n->in[3]) != past || !n->in[4]) return false;
    *s = (shift){ n, made_by(r, n->in[1], FG_OP_sigmoid), NULL };
    for (uint32_t k = 0; k < r->n_nodes; k++) {
        const fg_node *l = &g->nodes[k];
        if (!is_op(l, FG_OP_cache_last) || l->dropped) continue;
        if (fg__now(r, l->in[0]) != fg__now(r, n->in[4])) continue;
        if (unshaped(r, l->in[1]) == unshaped(r, n->in[0])) s->last = l;
    }
    return s->gate && s->last && g->values[fg__now(r, n->in[4])].kind == FG_OF_STATE;
}

typedef struct {
    const fg_node *gated, *attention, *q_norm, *k_norm, *k_write, *v_write, *f_write, *sum;
    shift k, v;
    int64_t B, H, D;
} heads;

/* log_f = log_sigmoid(f + fb), with fb per head. */
static bool find_gate(const fg_rewrite *r, heads *h)
{
    const fg_node *n = made_by(r, h->f_write->in[1], FG_OP_log_sigmoid);
    h->sum = n ? made_by(r, n->in[0], FG_OP_add) : NULL;
    return h->sum && fg_count(fg__now_tensor(r, h->sum->in[0])) == h->B * h->H
        && fg_shape_equal(fg_shape_of(fg__now_tensor(r, h->sum->in[1])), FG_DIMS(h->H));
}

static bool find_heads(const fg_rewrite *r, const fg_node *gated, heads *h)
{
    const struct fg_attr_gated_norm *a = gated->attr;
    *h = (heads){ .gated = gated,
                  .attention = made_by(r, unshaped(r, gated->in[0]), FG_OP_forget_attention) };
    const fg_node *n = h->attention;
    if (!n || !n->in[3] || !n->in[5] || unshaped(r, gated->in[0]) != n->out[0]) return false;
    const fg_shape q = fg_shape_of(fg__now_tensor(r, n->in[0]));
    const fg_shape k = fg_shape_of(fg__now_tensor(r, n->in[1]));
    h->B = q.dim[0], h->H = q.dim[2], h->D = q.dim[3];
    if (q.dim[1] != 1 || k.dim[2] != h->H || a->groups != h->H || h->B > FEW) return false;
    const uint32_t past = fg__now(r, n->in[5]);
    h->q_norm = made_by(r, unshaped(r, n->in[0]), FG_OP_rms_norm);
    h->k_write = made_by(r, n->in[1], FG_OP_cache_write);
    h->v_write = made_by(r, n->in[2], FG_OP_cache_write);
    h->f_write = made_by(r, n->in[3], FG_OP_cache_write);
    if (!h->k_write || !h->v_write || !h->f_write || !find_gate(r, h)) return false;
    h->k_norm = made_by(r, unshaped(r, h->k_write->in[1]), FG_OP_rms_norm);
    if (!is_head_norm(r, h->q_norm, h->H, h->D) || !is_head_norm(r, h->k_norm, h->H, h->D))
        return false;
    return find_shift(r, made_by(r, unshaped(r, h->k_norm->in[0]), FG_OP_shift_mix), past, &h->k)
        && find_shift(r, made_by(r, unshaped(r, h->v_write->in[1]), FG_OP_shift_mix), past, &h->v);
}

/* A part of the joined product as one row for each sequence, n wide. */
static fg_tensor row(const fg_rewrite *r, const heads *h, uint32_t v, int64_t n)
{
    return fg_reshape(fg__now_tensor(r, unshaped(r, v)), FG_DIMS(h->B, 1, n));
}

/* One node for all; those that wrote the caches one by one are dropped. */
static void build_heads(fg_rewrite *r, uint32_t k, const heads *h)
{
    fg_graph *g = r->g;
    enum { CACHES = 5, WIDE = 3, GATES = 3 };
    const fg_node gated = *h->gated, attention = *h->attention;
    const fg_node *writers[] = { h->k_write, h->v_write, h->f_write, h->k.last, h->v.last };
    const uint32_t wide[] = { h->q_norm->in[0], h->k.mix->in[0], h->v.mix->in[0] };
    const uint32_t gates[] = { h->k.gate->in[0], h->v.gate->in[0], h->sum->in[0] };
    const uint32_t rest[] = { gated.in[2], h->sum->in[1], h->q_norm->in[1], h->k_norm->in[1],
                              gated.in[1], attention.in[4], attention.in[5] };
    const struct fg_attr_rms_norm *q_norm = h->q_norm->attr, *k_norm = h->k_norm->attr;
    const struct fg_attr_forget_attention *a = attention.attr;
    const struct fg_attr_gated_norm *out = gated.attr;
    uint32_t old[CACHES], node[CACHES];
    fg_tensor in[18];
    for (int i = 0; i < CACHES; i++) {
        node[i] = index_of(r, writers[i]);
        old[i] = writers[i]->out[0];
        in[i] = fg__now_tensor(r, writers[i]->in[0]);
    }
    const uint32_t first = fg__build_as(r, k);               /* h's nodes move from here on */
    for (int i = 0; i < WIDE; i++) in[CACHES + i] = row(r, h, wide[i], h->H * h->D);
    for (int i = 0; i < GATES; i++) in[CACHES + WIDE + i] = row(r, h, gates[i], h->H);
    for (int i = 0; i < 7; i++) in[CACHES + WIDE + GATES + i] = fg__now_tensor(r, rest[i]);
    in[11] = row(r, h, rest[0], h->H * h->D);
    const fg_tensor t = FG_APPLY(forget_decode, FG_HERE, in, a->scale, a->window, q_norm->eps,
                                 k_norm->eps, out->eps, true);
    const fg_tensor y = fg_result(t, CACHES);
    if (fg_ok(y)) g->values[y.id].type = g->values[gated.out[0]].type;
    fg__built(r, k, first);
    if (!fg_ok(t)) return;
    for (int i = 0; i < CACHES; i++) fg__drop(r, node[i]);
    for (int i = 0; i < CACHES; i++) fg__instead(r, old[i], fg_result(t, i));
    fg__instead(r, gated.out[0], y);
    fg__take_slot(r, k, t);
}

static void fuse_heads(fg_rewrite *r, uint32_t k)
{
    heads h;
    if (find_heads(r, &r->g->nodes[k], &h)) build_heads(r, k, &h);
}

/* ---- all ------------------------------------------------------------------------------------ */

void fg__fuse_few(fg_rewrite *r)
{
    fg_graph *g = r->g;
    for (uint32_t k = 0; k < r->n_nodes; k++) {
        const fg_node *n = &g->nodes[k];
        if (n->pass != FG_PASS_FORWARD) return;
        for (int o = 0; o < fg__overwritten(n); o++)
            if (g->values[n->in[o]].kind == FG_OF_PARAM) return;
    }
    for (uint32_t k = 0; k < r->n_nodes && !g->status; k++)
        if (is_op(&g->nodes[k], FG_OP_gated_norm)) fuse_heads(r, k);
    for (uint32_t k = 0; k < r->n_nodes && !g->status; k++)
        if (is_op(&g->nodes[k], FG_OP_linear)) fuse_product(r, k);
}
