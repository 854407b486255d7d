/* fuse.c - the rules by which a device with fused kernels gets fewer and larger nodes.
 *
 *   linear(x, w1), linear(x, w2), ...          one product of x with the rows of w1, w2, ...,
 *                                              joined; its columns are the results.  The same for
 *                                              their gradients: one product for x, one for weights
 *   rms_norm(a + b, w)                         add_rms_norm(a, b, w)
 *   rms_norm_grad(...) + r                     rms_norm_grad(..., more = r)
 *   rms_norm_grad(...) and its cast to bf16    rms_norm_grad_bf16(...), which gives both
 *   shift_mix(x, sigmoid(z))                   shift_gate(x, z), and behind rms_norm of every head
 *                                              shift_norm(x, z, w); the same for their gradients
 *   cast of p to bf16 and adamw(p, ...)        adamw_bf16(p, ..., the cast), which keeps the copy
 *                                              up to date: no step casts its weights any more
 *   linear_cross_entropy and its gradient      linear_cross_entropy_both, where the gradient that
 *                                              comes in does not depend on the loss
 *   slice_grad(a) + slice_grad(b) + ...        a, b, ... joined, if they are the whole
 *   convolutions of spans of one tensor        fuse_conv.c
 *   what one token goes through                fuse_few.c
 *
 * Rules compute the same sums, in another order at most: what a plan shows is what it runs. */
#include <stdlib.h>
#include "internal.h"
#include "rewrite.h"

static bool is_op(const fg_node *n, int id) { return n->op == &fg_op_table[id]; }

static const fg_node *maker(const fg_rewrite *r, uint32_t v)
{
    const uint32_t k = v ? r->g->values[fg__now(r, v)].node : FG_NO_NODE;
    return k == FG_NO_NODE ? NULL : &r->g->nodes[k];
}

/* ---- products of one input ------------------------------------------------------------------ */

enum {
    GROUP_MAX = 16, REACH = 4096,        /* members; nodes between the first and the last */
    WHOLE = 8                            /* elements of a row that are loaded at once */
};

typedef struct {
    int n;
    uint32_t node[GROUP_MAX];            /* the products, in running order */
    int64_t rows[GROUP_MAX];             /* of their weights */
    uint32_t dx[GROUP_MAX], dw[GROUP_MAX];     /* their gradients, FG_NO_NODE if not there */
} group;

/* Products of one x in one pass, from node k on.  A bias is added behind them. */
static void find_group(const fg_rewrite *r, uint32_t k, group *m)
{
    const fg_graph *g = r->g;
    const fg_node *first = &g->nodes[k];
    const uint32_t x = fg__now(r, first->in[0]);
    m->n = 0;
    for (uint32_t i = k; i < r->n_nodes && i < k + REACH && m->n < GROUP_MAX; i++) {
        const fg_node *n = &g->nodes[i];
        if (!is_op(n, FG_OP_linear) || fg__now(r, n->in[0]) != x) continue;
        if (n->pass != first->pass || n->recomputed != first->recomputed) continue;
        if (g->values[n->in[1]].type != g->values[first->in[1]].type) continue;
        if (g->values[n->out[0]].type != g->values[first->out[0]].type) continue;
        m->dx[m->n] = m->dw[m->n] = FG_NO_NODE;
        m->rows[m->n] = fg_dim(fg__now_tensor(r, n->in[1]), 0);
        m->node[m->n++] = i;
    }
}

/* The gradients of the group's members.  They know their product as their pair. */
static void find_gradients(const fg_rewrite *r, group *m)
{
    const fg_graph *g = r->g;
    for (uint32_t i = 0; i < r->n_nodes; i++) {
        const fg_node *n = &g->nodes[i];
        const bool dx = is_op(n, FG_OP_linear_dx), dw = is_op(n, FG_OP_linear_dw);
        if (n->pass != FG_PASS_BACKWARD || (!dx && !dw)) continue;
        for (int j = 0; j < m->n; j++) {
            const fg_node *own = &g->nodes[m->node[j]];
            if (n->pair != m->node[j]) continue;
            if (dx && fg__now(r, n->in[1]) == fg__now(r, own->in[1])) m->dx[j] = i;
            if (dw && fg_dim(fg__now_tensor(r, n->out[0]), 0) == fg_dim(
                fg__now_tensor(r, own->in[1]), 0)) m->dw[j] = i;
        }
    }
}

static fg_tensor in_type(fg_tensor t, fg_dtype type)
{
    return fg_dtype_of(t) == type ? t : fg__cast(t, type);
}

/* A cast of v to bf16 among the first n nodes, FG_NO_NODE if there is none. */
static uint32_t narrow_cast(const fg_rewrite *r, uint32_t v, uint32_t n)
{
    const fg_graph *g = r->g;
    if (g->values[v].type != FG_F32) return FG_NO_NODE;
    for (uint32_t k = 0; k < n; k++)
        if (is_op(&g->nodes[k], FG_OP_cast) && fg__now(r, g->nodes[k].in[0]) == v &&
            g->values[g->nodes[k].out[0]].type == FG_BF16) return k;
    return FG_NO_NODE;
}

/* A bias in the dtype of what it is added to; what is computed again reads the first one's cast. */
static fg_tensor bias_as(const fg_rewrite *r, uint32_t v, fg_dtype type)
{
    const fg_tensor b = fg__now_tensor(r, v);
    const uint32_t k = type == FG_BF16 ? narrow_cast(r, b.id, r->g->n_nodes) : FG_NO_NODE;
    return k == FG_NO_NODE ? in_type(b, type) : fg__now_tensor(r, r->g->nodes[k].out[0]);
}

static int64_t padded(int64_t n) { return (n + WHOLE - 1) / WHOLE * WHOLE; }

/* all and, behind it along an axis, v with zeros up to a multiple of WHOLE, so that what comes next
 * begins where a kernel's 16-byte loads may. */
static fg_tensor join(const fg_rewrite *r, fg_tensor all, uint32_t v, int axis, int64_t rows)
{
    fg_tensor t = fg__now_tensor(r, v);
    if (axis < 0) axis += fg_shape_of(t).rank;
    if (rows % WHOLE) t = fg__slice_grad(FG_HERE, t, axis, 0, padded(rows));
    return fg_absent(all) ? t : fg_concat(all, t, axis);
}

/* Built as a part of the forward pass, also for what is computed again: there is one. */
static fg_tensor joined_weights(fg_rewrite *r, const group *m)
{
    const fg_node *n = &r->g->nodes[m->node[0]];
    const uint32_t k = n->recomputed && n->pair != FG_NO_NODE ? n->pair : m->node[0];
    const uint32_t first = fg__build_as(r, k);
    fg_tensor w = { 0 };
    for (int j = 0; j < m->n; j++) w = join(r, w, r->g->nodes[m->node[j]].in[1], 0, m->rows[j]);
    fg__built(r, k, first);
    return w;
}

/* y = x [w1; w2; ...]^T in the first member's slot, each member's result a span of its columns. */
static void merge_products(fg_rewrite *r, const group *m, fg_tensor w)
{
    fg_graph *g = r->g;
    const uint32_t k = m->node[0];
    const fg_tensor none = { 0 }, x = fg__now_tensor(r, g->nodes[k].in[0]);
    uint32_t first = fg__build_as(r, k);
    const fg_tensor y = fg_linear(x, w, none);
    fg__built(r, k, first);
    int64_t at = 0;
    fg_node own[GROUP_MAX];
    for (int j = 0; j < m->n; j++) own[j] = g->nodes[m->node[j]];
    for (int j = 0; j < m->n; j++) {
        first = fg__build_as(r, m->node[j]);
        fg_tensor part = fg_slice(y, -1, at, at + m->rows[j]);
        if (own[j].in[2]) part = fg_add(part, bias_as(r, own[j].in[2], fg_dtype_of(y)));
        fg__built(r, m->node[j], first);
        fg__instead(r, own[j].out[0], part);
        at += padded(m->rows[j]);
    }
    fg__take_slot(r, k, y);
}

static bool whole(const group *m, const uint32_t *node)
{
    for (int j = 0; j < m->n; j++) if (node[j] == FG_NO_NODE) return false;
    return true;
}

static uint32_t last_of(const group *m, const uint32_t *node)
{
    uint32_t last = 0;
    for (int j = 0; j < m->n; j++) if (node[j] > last) last = node[j];
    return last;
}

/* No node before `last` reads what the others make. */
static bool unread_before(const fg_rewrite *r, const group *m, const uint32_t *node, uint32_t last)
{
    const fg_graph *g = r->g;
    uint32_t from = last;
    for (int j = 0; j < m->n; j++) if (node[j] < from) from = node[j];
    for (uint32_t k = from; k < last; k++)
        for (int i = 0; i < g->nodes[k].n_in; i++)
            for (int j = 0; j < m->n; j++)
                if (g->nodes[k].in[i] && g->nodes[k].in[i] == g->nodes[node[j]].out[0])
                    return false;
    return true;
}

static fg_tensor joined_gradients(const fg_rewrite *r, const group *m, const uint32_t *node)
{
    fg_tensor gy = { 0 };
    for (int j = 0; j < m->n; j++) gy = join(r, gy, r->g->nodes[node[j]].in[0], -1, m->rows[j]);
    return gy;
}

/* The gradients behind them are of one dtype; with_x: and are taken with one x. */
static bool alike(const fg_rewrite *r, const group *m, const uint32_t *node, bool with_x)
{
    const fg_node *n = r->g->nodes;
    for (int j = 1; j < m->n; j++) {
        const fg_tensor a = fg__now_tensor(r, n[node[0]].in[0]);
        if (fg_dtype_of(a) != fg_dtype_of(fg__now_tensor(r, n[node[j]].in[0]))) return false;
        if (with_x && fg__now(r, n[node[j]].in[1]) != fg__now(r, n[node[0]].in[1])) return false;
    }
    return true;
}

/* [gw1; gw2; ...] = [gy1 | gy2 | ...]^T x in the last one's slot. */
static void merge_weight_gradients(fg_rewrite *r, const group *m)
{
    fg_graph *g = r->g;
    const uint32_t last = last_of(m, m->dw);
    if (!unread_before(r, m, m->dw, last) || !alike(r, m, m->dw, true)) return;
    uint32_t first = fg__build_as(r, last);
    const fg_tensor gy = joined_gradients(r, m, m->dw);
    const fg_tensor gw = fg__linear_dw(FG_HERE, gy, fg__now_tensor(r, g->nodes[last].in[1]));
    if (fg_ok(gw)) g->values[gw.id].type = g->values[g->nodes[last].out[0]].type;
    fg__built(r, last, first);
    fg_node own[GROUP_MAX];
    for (int j = 0; j < m->n; j++) own[j] = g->nodes[m->dw[j]];
    int64_t at = 0;
    for (int j = 0; j < m->n; j++) {
        first = fg__build_as(r, m->dw[j]);
        const fg_tensor part = fg_slice(gw, 0, at, at + m->rows[j]);
        fg__built(r, m->dw[j], first);
        fg__instead(r, own[j].out[0], part);
        at += padded(m->rows[j]);
    }
    fg__take_slot(r, last, gw);
}

/* Sums that take all of the group's dx and nothing else of them: every dx is read once, by an add.
 * Returns false if that is not so. */
static bool only_summed(const fg_rewrite *r, const group *m)
{
    const fg_graph *g = r->g;
    int sums = 0;
    for (int j = 0; j < m->n; j++) {
        const uint32_t v = g->nodes[m->dx[j]].out[0];
        if (fg__uses(r, v) != 1) return false;
    }
    for (uint32_t k = 0; k < r->n_nodes; k++) {
        if (!is_op(&g->nodes[k], FG_OP_add)) continue;
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < m->n; j++)
                if (g->nodes[k].in[i] == g->nodes[m->dx[j]].out[0] &&
                    fg_shape_equal(g->values[g->nodes[k].out[0]].shape,
                                   g->values[g->nodes[k].in[i]].shape)) sums++;
    }
    return sums == m->n;
}

/* gx = [gy1 | gy2 | ...] [w1; w2; ...] stands for the last dx; the others add nothing any more. */
static void merge_input_gradients(fg_rewrite *r, const group *m, fg_tensor w)
{
    fg_graph *g = r->g;
    const uint32_t last = last_of(m, m->dx);
    if (!only_summed(r, m) || !alike(r, m, m->dx, false)) return;
    uint32_t gone[GROUP_MAX], n_gone = 0;
    for (int j = 0; j < m->n; j++)
        if (m->dx[j] != last) gone[n_gone++] = g->nodes[m->dx[j]].out[0];
    for (uint32_t k = 0; k < last && k < r->n_nodes; k++) /* sums of gone ones must be gone too */
        for (int i = 0; i < g->nodes[k].n_in; i++)
            for (uint32_t j = 0; j < n_gone; j++)
                if (g->nodes[k].in[i] == gone[j] && !is_op(&g->nodes[k], FG_OP_add)) return;
    const uint32_t first = fg__build_as(r, last);
    const fg_tensor gy = joined_gradients(r, m, m->dx);
    const fg_tensor gx = fg__linear_dx(FG_HERE, gy, w);
    fg__built(r, last, first);
    fg__instead(r, g->nodes[last].out[0], gx);
    fg__take_slot(r, last, gx);
    for (uint32_t k = 0; k < r->n_nodes; k++) {              /* a + gone = a */
        const fg_node *n = &g->nodes[k];
        if (!is_op(n, FG_OP_add)) continue;
        int lost[2] = { 0 };
        for (int i = 0; i < 2; i++)
            for (uint32_t j = 0; j < n_gone; j++) lost[i] |= n->in[i] == gone[j];
        if (lost[0] && lost[1] && n_gone < GROUP_MAX) gone[n_gone++] = n->out[0];
        else if (lost[0] != lost[1])
            fg__instead(r, n->out[0], fg__now_tensor(r, n->in[lost[0] ? 1 : 0]));
    }
}

static void merge_linears(fg_rewrite *r, uint32_t k, uint8_t *done)
{
    group m;
    if (done[k]) return;
    find_group(r, k, &m);
    for (int j = 0; j < m.n; j++) done[m.node[j]] = 1;
    if (m.n < 2) return;
    find_gradients(r, &m);
    const fg_tensor w = joined_weights(r, &m);
    if (whole(&m, m.dx)) merge_input_gradients(r, &m, w);
    if (whole(&m, m.dw)) merge_weight_gradients(r, &m);
    merge_products(r, &m, w);
}

/* ---- norms ---------------------------------------------------------------------------------- */

/* rms_norm(a + b, w) becomes add_rms_norm in the sum's slot: the sum is its second result. */
static void fuse_add_norm(fg_rewrite *r, uint32_t k)
{
    fg_graph *g = r->g;
    const fg_node norm = g->nodes[k];
    const struct fg_attr_rms_norm *a = norm.attr;
    const uint32_t j = g->values[fg__now(r, norm.in[0])].node;
    if (a->groups != 1 || j == FG_NO_NODE || j >= r->n_nodes) return;
    const fg_node sum = g->nodes[j];
    if (!is_op(&sum, FG_OP_add) || sum.recomputed != norm.recomputed || sum.pass != norm.pass)
        return;
    const fg_tensor x = fg__now_tensor(r, sum.in[0]), y = fg__now_tensor(r, sum.in[1]);
    if (!fg_shape_equal(fg_shape_of(x), fg_shape_of(y))) return;
    const uint32_t first = fg__build_as(r, j);
    const fg_tensor t = fg__add_rms_norm(FG_HERE, x, y, fg__now_tensor(r, norm.in[1]), a->eps);
    if (!fg_ok(t)) { fg__built(r, j, first); return; }
    g->values[t.id].type = g->values[norm.out[0]].type;
    g->values[fg_result(t, 1).id].type = g->values[sum.out[0]].type;
    fg__built(r, j, first);
    fg__instead(r, sum.out[0], fg_result(t, 1));
    fg__instead(r, norm.out[0], t);
    fg__instead(r, norm.out[1], fg_result(t, 2));
    fg__take_slot(r, j, t);
}

/* rms_norm_grad(...) + more in the sum's slot. */
static void fuse_norm_grad_add(fg_rewrite *r, uint32_t k)
{
    fg_graph *g = r->g;
    const fg_node sum = g->nodes[k];
    for (int i = 0; i < 2; i++) {
        const fg_tensor gx = fg__now_tensor(r, sum.in[i]), more = fg__now_tensor(r, sum.in[1 - i]);
        const fg_node *n = maker(r, gx.id);
        if (!n || !is_op(n, FG_OP_rms_norm_grad) || n->in[4] || fg__uses(r, gx.id) != 1) continue;
        if (gx.id != n->out[0] || !fg_shape_equal(fg_shape_of(gx), fg_shape_of(more))) continue;
        const fg_node old = *n;
        const struct fg_attr_rms_norm_grad *a = old.attr;
        const fg_tensor in[] = { fg__now_tensor(r, old.in[0]), fg__now_tensor(r, old.in[1]),
                                 fg__now_tensor(r, old.in[2]), fg__now_tensor(r, old.in[3]), more };
        const uint32_t first = fg__build_as(r, k);
        const fg_tensor t = FG_APPLY(rms_norm_grad, FG_HERE, in, a->groups);
        if (!fg_ok(t)) { fg__built(r, k, first); return; }
        g->values[t.id].type = g->values[sum.out[0]].type;
        g->values[fg_result(t, 1).id].type = g->values[old.out[1]].type;
        fg__built(r, k, first);
        fg__instead(r, sum.out[0], t);
        fg__instead(r, old.out[1], fg_result(t, 1));
        fg__take_slot(r, k, t);
        return;
    }
}

/* The gradient that goes on in f32 along the residual stream, and in bf16 into products. */
static void fuse_norm_grad_cast(fg_rewrite *r, uint32_t k)
{
    fg_graph *g = r->g;
    const fg_node old = g->nodes[k];
    const struct fg_attr_rms_norm_grad *a = old.attr;
    const uint32_t cast = narrow_cast(r, old.out[0], r->n_nodes);
    if (cast == FG_NO_NODE) return;
    const fg_tensor in[] = { fg__now_tensor(r, old.in[0]), fg__now_tensor(r, old.in[1]),
                             fg__now_tensor(r, old.in[2]), fg__now_tensor(r, old.in[3]),
                             fg__now_tensor(r, old.in[4]) };
    const uint32_t first = fg__build_as(r, k);
    const fg_tensor t = FG_APPLY(rms_norm_grad_bf16, FG_HERE, in, a->groups);
    fg__built(r, k, first);
    if (!fg_ok(t)) return;
    for (int o = 0; o < 2; o++)
        g->values[fg_result(t, o).id].type = g->values[old.out[o]].type;
    fg__instead(r, g->nodes[cast].out[0], fg_result(t, 2));
    for (int o = 0; o < 2; o++) fg__instead(r, old.out[o], fg_result(t, o));
    fg__take_slot(r, k, t);
}

/* ---- shifts --------------------------------------------------------------------------------- */

/* The value that v shows in another shape. */
static uint32_t unshaped(const fg_rewrite *r, uint32_t v)
{
    const fg_node *n = maker(r, v);
    for (; n && is_op(n, FG_OP_reshape); n = maker(r, v)) v = n->in[0];
    return fg__now(r, v);
}

/* The node that is the only reader of v, through reshapes that nothing else reads; `at`: by which
 * input.  FG_NO_NODE if there are several, or v is an output. */
static uint32_t only_reader(const fg_rewrite *r, uint32_t v, int *at)
{
    for (;;) {
        uint32_t reader = FG_NO_NODE;
        if (fg__uses(r, v) != 1) return FG_NO_NODE;
        for (uint32_t k = 0; k < r->g->n_nodes && reader == FG_NO_NODE; k++)
            for (int i = 0; i < r->g->nodes[k].n_in; i++)
                if (r->g->nodes[k].in[i] && fg__now(r, r->g->nodes[k].in[i]) == fg__now(r, v))
                    reader = k, *at = i;
        if (reader == FG_NO_NODE || !is_op(&r->g->nodes[reader], FG_OP_reshape)) return reader;
        v = r->g->nodes[reader].out[0];
    }
}

static bool same(const fg_rewrite *r, uint32_t a, uint32_t b)
{
    return fg__now(r, a) == fg__now(r, b);
}

/* What a = sigmoid(logit) was made of; 0 if it was made otherwise. */
static uint32_t logit_of(const fg_rewrite *r, uint32_t a)
{
    const fg_node *n = maker(r, a);
    return n && is_op(n, FG_OP_sigmoid) ? fg__now(r, n->in[0]) : 0;
}

/* Groups of a norm are the heads of x. */
static bool by_head(const fg_rewrite *r, int64_t groups, uint32_t normed, uint32_t x)
{
    const fg_shape *s = &r->g->values[x].shape;
    const int64_t row = fg_dim(fg__now_tensor(r, normed), -1);
    return s->rank == 4 && row == groups * s->dim[3] && s->dim[2] % groups == 0;
}

static void set_types(const fg_rewrite *r, fg_tensor t, const uint32_t *like, int n)
{
    for (int o = 0; o < n; o++)
        r->g->values[fg_result(t, o).id].type = r->g->values[like[o]].type;
}

static fg_tensor shaped_as(const fg_rewrite *r, fg_tensor t, uint32_t like)
{
    const fg_shape s = r->g->values[like].shape;
    return fg_shape_equal(s, fg_shape_of(t)) ? t : fg_reshape(t, s);
}

/* shift_mix with its sigmoid, and with the norm behind it where that is its only reader. */
static void fuse_shift(fg_rewrite *r, uint32_t k)
{
    fg_graph *g = r->g;
    const fg_node shift = g->nodes[k];
    const uint32_t x = fg__now(r, shift.in[0]), logit = logit_of(r, shift.in[1]);
    if (!logit) return;
    int at = 0;
    const uint32_t j = only_reader(r, shift.out[0], &at);
    const fg_node norm = j == FG_NO_NODE ? shift : g->nodes[j];
    const struct fg_attr_rms_norm *a = norm.attr;
    const bool normed = is_op(&norm, FG_OP_rms_norm) && at == 0 && norm.pass == shift.pass &&
                        by_head(r, a->groups, norm.in[0], x);
    const fg_tensor s[] = { fg__now_tensor(r, x), fg__now_tensor(r, logit),
                            fg__now_tensor(r, shift.in[2]), fg__now_tensor(r, shift.in[3]),
                            fg__now_tensor(r, shift.in[4]) };
    const uint32_t first = fg__build_as(r, k);
    if (!normed) {
        const fg_tensor y = FG_APPLY(shift_gate, FG_HERE, s, 0);
        if (fg_ok(y)) set_types(r, y, shift.out, 1);
        fg__built(r, k, first);
        fg__instead(r, shift.out[0], y);
        fg__take_slot(r, k, y);
        return;
    }
    const fg_tensor in[] = { s[0], s[1], fg__now_tensor(r, norm.in[1]), s[2], s[3], s[4] };
    const fg_tensor y = FG_APPLY(shift_norm, FG_HERE, in, a->eps);
    if (!fg_ok(y)) { fg__built(r, k, first); return; }
    set_types(r, y, norm.out, 2);
    const fg_tensor rows = shaped_as(r, y, norm.out[0]);
    const fg_tensor rstd = shaped_as(r, fg_result(y, 1), norm.out[1]);
    fg__built(r, k, first);
    fg__instead(r, norm.out[0], rows);
    fg__instead(r, norm.out[1], rstd);
    fg__take_slot(r, k, y);
}

/* What a gradient by a gate's logit is put in place of: the gradient by the sigmoid's input, or
 * the cast that alone reads that. */
static uint32_t logit_gradient(const fg_rewrite *r, const fg_node *shift, fg_node *sigmoid)
{
    int at = 0;
    const uint32_t k = only_reader(r, shift->out[1], &at);
    if (k == FG_NO_NODE || at != 0 || !is_op(&r->g->nodes[k], FG_OP_sigmoid_grad)) return 0;
    *sigmoid = r->g->nodes[k];
    if (!same(r, sigmoid->in[1], shift->in[2])) return 0;
    const uint32_t cast = only_reader(r, sigmoid->out[0], &at);
    const bool is_cast = cast != FG_NO_NODE && is_op(&r->g->nodes[cast], FG_OP_cast) &&
                         same(r, r->g->nodes[cast].in[0], sigmoid->out[0]);
    return is_cast ? r->g->nodes[cast].out[0] : sigmoid->out[0];
}

/* The gradients of the same, in the slot of the first of them. */
static void fuse_shift_grad(fg_rewrite *r, uint32_t k)
{
    fg_graph *g = r->g;
    const fg_node shift = g->nodes[k];
    const uint32_t x = fg__now(r, shift.in[1]), logit = logit_of(r, shift.in[2]);
    fg_node sigmoid;
    const uint32_t glogit = logit ? logit_gradient(r, &shift, &sigmoid) : 0;
    if (!glogit) return;
    const uint32_t gs = unshaped(r, shift.in[0]), j = g->values[gs].node;
    int at = 0;
    const fg_node norm = j == FG_NO_NODE ? shift : g->nodes[j];
    const fg_node *made = maker(r, unshaped(r, norm.in[1]));
    const struct fg_attr_rms_norm_grad *a = norm.attr;
    const bool normed = is_op(&norm, FG_OP_rms_norm_grad) && gs == norm.out[0] && !norm.in[4] &&
        only_reader(r, gs, &at) == k && made && is_op(made, FG_OP_shift_mix) &&
        same(r, made->in[0], x) && same(r, made->in[1], shift.in[2]) &&
        same(r, made->in[2], shift.in[3]) && by_head(r, a->groups, norm.in[1], x);
    const fg_tensor xt = fg__now_tensor(r, x), zt = fg__now_tensor(r, logit);
    const fg_tensor start = fg__now_tensor(r, shift.in[3]);
    const uint32_t place = normed ? j : k, first = fg__build_as(r, place);
    fg_tensor t;
    if (normed) {
        const fg_tensor gy = fg__now_tensor(r, norm.in[0]), rstd = fg__now_tensor(r, norm.in[3]);
        const fg_tensor gy4 = shaped_as(r, gy, x), rstd3 = shaped_as(r, rstd, logit);
        const fg_tensor in[] = { gy4, xt, zt, fg__now_tensor(r, norm.in[2]), rstd3, start };
        t = FG_APPLY(shift_norm_grad, FG_HERE, in, 0);
    } else {
        const fg_tensor in[] = { fg__now_tensor(r, shift.in[0]), xt, zt, start };
        t = FG_APPLY(shift_gate_grad, FG_HERE, in, 0);
    }
    const uint32_t like[] = { shift.out[0], normed ? norm.out[1] : glogit, glogit };
    if (fg_ok(t)) set_types(r, t, like, normed ? 3 : 2);
    fg__built(r, place, first);
    if (!fg_ok(t)) return;
    fg__unread(r, k);
    fg__unread(r, g->values[sigmoid.out[0]].node);
    if (normed) fg__unread(r, j);
    fg__instead(r, shift.out[0], t);
    fg__instead(r, glogit, fg_result(t, normed ? 2 : 1));
    if (normed) fg__instead(r, norm.out[1], fg_result(t, 1));
    fg__take_slot(r, place, t);
}

/* ---- loss ----------------------------------------------------------------------------------- */

/* The gradient of loss k whose incoming gradient is known before k; FG_NO_NODE if there is none. */
static uint32_t known_gradient(const fg_rewrite *r, uint32_t k)
{
    const fg_graph *g = r->g;
    const fg_node *n = &g->nodes[k];
    for (uint32_t j = 0; j < r->n_nodes; j++) {
        const fg_node *m = &g->nodes[j];
        if (!is_op(m, FG_OP_linear_cross_entropy_grad) || !same(r, m->in[4], n->out[1])) continue;
        if (!same(r, m->in[1], n->in[0]) || !same(r, m->in[2], n->in[1])) continue;
        if (!same(r, m->in[3], n->in[2])) continue;
        if (!fg__depends(r, m->in[0], k)) return j;
    }
    return FG_NO_NODE;
}

static void fuse_loss_grad(fg_rewrite *r, uint32_t k)
{
    fg_graph *g = r->g;
    const uint32_t j = known_gradient(r, k);
    if (j == FG_NO_NODE) return;
    const fg_node loss = g->nodes[k], grad = g->nodes[j];
    const fg_tensor in[] = { fg__now_tensor(r, loss.in[0]), fg__now_tensor(r, loss.in[1]),
                             fg__now_tensor(r, loss.in[2]), fg__now_tensor(r, grad.in[0]) };
    const uint32_t like[] = { loss.out[0], loss.out[1], grad.out[0], grad.out[1] };
    const uint32_t first = fg__build_as(r, k);
    const fg_tensor t = FG_APPLY(linear_cross_entropy_both, FG_HERE, in, 0);
    if (fg_ok(t)) set_types(r, t, like, 4);
    fg__built(r, k, first);
    for (int o = 0; o < 4; o++) fg__instead(r, like[o], fg_result(t, o));
    fg__take_slot(r, k, t);
}

/* ---- copies of weights ---------------------------------------------------------------------- */

/* Node k is the last but for other updates, and alone overwrites parameter p. */
static bool updates_alone(const fg_rewrite *r, uint32_t k, uint32_t p)
{
    const fg_graph *g = r->g;
    if (fg__uses(r, g->nodes[k].out[0])) return false;
    for (uint32_t i = 0; i < r->n_nodes; i++) {
        const fg_node *n = &g->nodes[i];
        if (i > k && n->pass != FG_PASS_UPDATE) return false;
        for (int o = 0; o < fg__overwritten(n); o++)
            if (i != k && fg__now(r, n->in[o]) == p) return false;
    }
    return true;
}

static bool is_output(const fg_graph *g, uint32_t v)
{
    for (uint32_t i = 0; i < g->n_outputs; i++) if (g->outputs[i].id == v) return true;
    return false;
}

static void fuse_update_cast(fg_rewrite *r, uint32_t k)
{
    fg_graph *g = r->g;
    const fg_node old = g->nodes[k];
    const struct fg_attr_adamw *a = old.attr;
    const uint32_t p = fg__now(r, old.in[0]);
    if (g->values[p].kind != FG_OF_PARAM) return;
    const uint32_t cast = narrow_cast(r, p, g->n_nodes),
                   p16 = cast == FG_NO_NODE ? 0 : g->nodes[cast].out[0];
    if (!p16 || fg__now(r, p16) != p16 || is_output(g, p16) || !updates_alone(r, k, p)) return;
    fg_tensor in[8];
    for (int i = 0; i < 8; i++)
        in[i] = fg__now_tensor(r, i == 3 ? p16 : old.in[i < 3 ? i : i - 1]);
    const uint32_t first = fg__build_as(r, k);
    const fg_tensor t = FG_APPLY(adamw_bf16, FG_HERE, in, a->beta1, a->beta2, a->eps, a->decay);
    fg__built(r, k, first);
    if (!fg_ok(t)) return;
    fg__drop(r, k);
    for (int o = 0; o < 3; o++) fg__instead(r, old.out[o], fg_result(t, o));
    fg__take_slot(r, k, t);
}

/* ---- sums of padded parts ------------------------------------------------------------------- */

typedef struct { fg_tensor gy; int axis; int64_t start, stop, extent; } part;

/* The slice_grads that node k, an add, sums up by way of other adds; -1: there is more. */
static int list_parts(const fg_rewrite *r, uint32_t v, part *parts, int n, bool top)
{
    const fg_node *m = maker(r, v);
    if (!m || n < 0 || (!top && fg__uses(r, v) != 1)) return -1;
    if (is_op(m, FG_OP_add)) {
        for (int i = 0; i < 2; i++) n = list_parts(r, fg__now(r, m->in[i]), parts, n, false);
        return n;
    }
    if (!is_op(m, FG_OP_slice_grad) || n == GROUP_MAX) return -1;
    const struct fg_attr_slice_grad *a = m->attr;
    const fg_tensor gy = fg__now_tensor(r, m->in[0]);
    parts[n] = (part){ gy, a->axis, a->start, a->start + fg_dim(gy, a->axis), a->extent };
    return n + 1;
}

static int by_start(const void *a, const void *b)
{
    const part *x = a, *y = b;
    return (x->start > y->start) - (x->start < y->start);
}

/* The dtype that all readers of v cast it to; its own if they do not. */
static fg_dtype wanted(const fg_rewrite *r, fg_tensor v)
{
    const fg_graph *g = r->g;
    const fg_dtype own = fg_dtype_of(v);
    fg_dtype to = own;
    uint32_t casts = 0;
    for (uint32_t k = 0; k < r->n_nodes; k++) {
        const fg_node *n = &g->nodes[k];
        if (!is_op(n, FG_OP_cast) || fg__now(r, n->in[0]) != v.id) continue;
        const fg_dtype is = g->values[n->out[0]].type;
        if (casts++ && is != to) return own;
        to = is;
    }
    return casts == fg__uses(r, v.id) ? to : own;
}

/* Casts of `old` to the dtype that t has read t. */
static void skip_casts(fg_rewrite *r, uint32_t old, fg_tensor t)
{
    for (uint32_t k = 0; k < r->n_nodes; k++) {
        const fg_node *n = &r->g->nodes[k];
        if (is_op(n, FG_OP_cast) && fg__now(r, n->in[0]) == old &&
            r->g->values[n->out[0]].type == fg_dtype_of(t)) fg__instead(r, n->out[0], t);
    }
}

/* Gradients of all spans of one tensor, each padded with zeros and summed, are these spans joined,
 * in the dtype in which the whole is read. */
static void join_parts(fg_rewrite *r, uint32_t k)
{
    fg_graph *g = r->g;
    part parts[GROUP_MAX];
    const fg_tensor sum = fg__now_tensor(r, g->nodes[k].out[0]);
    const int n = list_parts(r, sum.id, parts, 0, true);
    if (n < 2) return;
    qsort(parts, (size_t)n, sizeof *parts, by_start);
    int64_t at = 0;
    for (int i = 0; i < n; i++) {
        if (parts[i].start != at || parts[i].axis != parts[0].axis) return;
        at = parts[i].stop;
    }
    if (at != parts[0].extent) return;
    const fg_dtype type = wanted(r, sum);
    const uint32_t first = fg__build_as(r, k);
    fg_tensor all = in_type(parts[0].gy, type);
    for (int i = 1; i < n; i++) {
        const fg_tensor next = in_type(parts[i].gy, type);
        all = fg_concat(all, next, parts[0].axis);
    }
    fg__built(r, k, first);
    skip_casts(r, sum.id, all);
    fg__instead(r, sum.id, all);
    fg__take_slot(r, k, all);
}

void fg__fuse(fg_rewrite *r)
{
    fg_graph *g = r->g;
    uint8_t *done = calloc((size_t)r->n_nodes + 1, 1);
    if (!done) { fg__out_of_memory(g); return; }
    for (uint32_t k = r->n_nodes; k-- > 0 && !g->status;) /* the last sum first: it has all parts */
        if (is_op(&g->nodes[k], FG_OP_add)) join_parts(r, k);
    for (uint32_t k = 0; k < r->n_nodes && !g->status; k++)
        if (is_op(&g->nodes[k], FG_OP_linear)) merge_linears(r, k, done);
    if (!g->status) fg__fuse_convs(r);
    for (uint32_t k = 0; k < r->n_nodes && !g->status; k++)
        if (is_op(&g->nodes[k], FG_OP_rms_norm)) fuse_add_norm(r, k);
    if (!g->status) fg__fuse_few(r);
    for (uint32_t k = 0; k < r->n_nodes && !g->status; k++)
        if (is_op(&g->nodes[k], FG_OP_add)) fuse_norm_grad_add(r, k);
    for (uint32_t k = 0; k < r->n_nodes && !g->status; k++)
        if (is_op(&g->nodes[k], FG_OP_rms_norm_grad)) fuse_norm_grad_cast(r, k);
    for (uint32_t k = 0; k < r->n_nodes && !g->status; k++)
        if (is_op(&g->nodes[k], FG_OP_shift_mix_grad)) fuse_shift_grad(r, k);
    for (uint32_t k = 0; k < r->n_nodes && !g->status; k++)
        if (is_op(&g->nodes[k], FG_OP_shift_mix)) fuse_shift(r, k);
    for (uint32_t k = 0; k < r->n_nodes && !g->status; k++)
        if (is_op(&g->nodes[k], FG_OP_linear_cross_entropy)) fuse_loss_grad(r, k);
    for (uint32_t k = 0; k < r->n_nodes && !g->status; k++)
        if (is_op(&g->nodes[k], FG_OP_adamw)) fuse_update_cast(r, k);
    free(done);
}
