/* hgrn2.c - HGRN2: gated linear attention whose keys are what the forget gates let go.
 *
 * Source: Qin et al. 2024, "HGRN2: Gated Linear RNNs with State Expansion" (arXiv 2404.07904),
 *         section 3; parameters named as in the checkpoints of Lin et al. 2025 (arXiv 2503.02130).
 * Shapes: B batch, T positions, h model width, H heads, K = expand_ratio key width, d = h/H value
 * width, L layers.
 * HGRN2's paper bounds the forget gate of layer l from below by lb_l; the code of the release makes
 * the parameter lower_bounds and saves it, but does not use it.  Both can be had: hgrn2_bounds. */
#include <math.h>
#include "fox_models.h"

typedef struct { const hgrn2_config *c; fg_tensor bounds; } hgrn2;      /* [L,h], or absent */

static int64_t expand_of(const hgrn2_config *c)
{
    return c->expand_ratio > 0 ? c->expand_ratio : 128;
}

static int64_t heads_of(const hgrn2_config *c, int64_t width)
{
    return c->num_heads > 0 ? c->num_heads : width / expand_of(c);
}

/* lb, a row of the bounds: absent for the first layer, whose bound is 0 */
static fg_tensor bound_of(const hgrn2 *m, int64_t layer)
{
    if (fg_absent(m->bounds) || layer == 0) return (fg_tensor){ 0 };
    return fg_slice(m->bounds, 0, layer, layer + 1);                                /* [1,h]     */
}

/* S_t = diag(f_t) S_(t-1) + (1 - f_t) i_t^T,   o_t = S_t^T q_t / sqrt(K),
 * f_t = lb + (1 - lb) sigmoid(z_t),  q_t = silu(W x_t) */
static fg_tensor mixer(fg_tensor x, const void *config, int64_t layer)
{
    const hgrn2 *m = config;
    const int64_t h = fg_dim(x, -1), H = heads_of(m->c, h), K = expand_of(m->c);
    if (!fg_absent(m->bounds) && H * K != h)
        return fg_fail(x, FG_ERR_SHAPE, "%lld heads of %lld keys do not fit bounds for a width of"
                       " %lld", (long long)H, (long long)K, (long long)h);

    fg_tensor q = fg_nn_heads(fg_nn_xavier(x, "q_proj", H * K), H);                 /* [B,T,H,K] */
    fg_tensor z = fg_nn_heads(fg_nn_xavier(x, "f_proj", H * K), H);                 /* [B,T,H,K] */
    fg_tensor i = fg_nn_heads(fg_nn_xavier(x, "i_proj", h), H);                     /* [B,T,H,d] */
    fg_tensor low = bound_of(m, layer);                                             /* [1,H*K]   */
    const fg_tensor none = { 0 };
    fg_tensor o = fg_hgrn2_scan(q, z, i, low, 1 / sqrt((double)K), none);           /* [B,T,H,d] */
    o = fg_nn_norm(fg_nn_merge(o), "g_norm", m->c->norm_eps);                       /* [B,T,h]   */
    return fg_nn_xavier(o, "o_proj", h);
}

static fg_nn_skeleton skeleton(const hgrn2 *m)
{
    const hgrn2_config *c = m->c;
    return (fg_nn_skeleton){ .mixer = mixer, .config = m, .vocab = c->vocab_size,
        .width = c->hidden_size, .layers = c->num_hidden_layers,
        .heads = heads_of(c, c->hidden_size), .hidden = c->intermediate_size,
        .ratio = c->hidden_ratio, .eps = c->norm_eps, .tied = c->tie_word_embeddings,
        .recompute = c->recompute, .small_down = true };
}

/* lb_l = sum_(1<=i<=l) softmax_i(lower_bounds): 0 for the first layer, below 1 for the last */
static fg_tensor lower_bounds(fg_graph *g, const hgrn2_config *c)
{
    const int64_t L = c->num_hidden_layers, h = c->hidden_size;
    const bool used = c->lower_bound == HGRN2_BOUNDS_APPLIED && L > 1;
    const fg_init zeros = { FG_ZEROS, .no_decay = true, .frozen = !used };
    fg_scope_push(g, "model");
    fg_tensor raw = fg_param(g, "lower_bounds", FG_DIMS(L, h), zeros);              /* [L,h]     */
    fg_scope_pop(g);
    if (!used) return (fg_tensor){ 0 };
    fg_tensor p = fg_softmax(fg_permute(raw, FG_DIMS(1, 0)));                       /* [h,L]     */
    p = fg_cumsum(fg_permute(p, FG_DIMS(1, 0)), 0, false);                          /* [L,h]     */
    return fg_sub(p, fg_slice(p, 0, 0, 1));
}

fg_tensor (hgrn2_block)(fg_loc at, fg_tensor x, const hgrn2_config *c)
{
    const hgrn2 m = { c, { 0 } };
    return (fg_nn_block)(at, x, skeleton(&m));
}

fg_tensor (hgrn2_lm)(fg_loc at, fg_tensor tokens, const hgrn2_config *c)
{
    hgrn2 m = { c, { 0 } };
    hgrn2_config_record(tokens.graph, c);
    if (c->lower_bound != HGRN2_NO_BOUNDS) m.bounds = lower_bounds(tokens.graph, c);
    return (fg_nn_lm)(at, tokens, skeleton(&m));
}

#ifndef FG_LIBRARY        /* fox-graph run hgrn2.c --set width=512 --set layers=8 --set expand=64 */
#include <fox_graph.h>
fg_tensor fg_model(fg_tensor tokens)
{
    fg_graph *g = tokens.graph;
    const hgrn2_config c = hgrn2_lm_config(
        fg_setting_int(g, "vocab_size", 256), fg_setting_int(g, "width", 128),
        fg_setting_int(g, "layers", 4), fg_setting_int(g, "expand", 32));
    return hgrn2_lm(tokens, &c);
}
#endif
