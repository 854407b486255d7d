/* delta_net.c - DeltaNet: linear attention that corrects what its state knows of a key.
 *
 * Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence
 *         Length" (arXiv 2406.06484), section 3.3; parameters named as in the checkpoints of Lin et
 *         al. 2025 (arXiv 2503.02130).
 * Shapes: B batch, T positions, h model width, H heads, d = h/H head width, W width of the
 * convolutions. */
#include <math.h>
#include "fox_models.h"

/* silu(conv(W x)), each channel with its own last inputs; NAME_proj and NAME_conv1d */
static fg_tensor project(fg_tensor x, const char *name, const delta_net_config *c)
{
    fg_graph *g = x.graph;
    const int64_t h = fg_dim(x, -1), W = c->conv_size > 0 ? c->conv_size : 4;
    const fg_init uniform = { FG_UNIFORM, .a = 1 / sqrt((double)W) };
    fg_tensor u = fg_nn_xavier(x, fg_name(g, "%s_proj", name), h);                  /* [B,T,h]   */
    fg_scope_push(g, fg_name(g, "%s_conv1d", name));
    fg_tensor w = fg_param(g, "weight", FG_DIMS(h, 1, W), uniform);
    fg_scope_pop(g);
    u = fg_causal_conv(u, w, (fg_tensor){ 0 }, true);                               /* [B,T,h]   */
    return fg_nn_heads(u, c->num_heads);                                            /* [B,T,H,d] */
}

/* S_t = S_(t-1) + beta_t k_t (v_t - S_(t-1)^T k_t)^T,   o_t = S_t^T q_t / sqrt(d), |q| = |k| = 1 */
static fg_tensor mixer(fg_tensor x, const void *config, int64_t layer)
{
    const delta_net_config *c = config;
    const int64_t h = fg_dim(x, -1), H = c->num_heads;
    const fg_tensor none = { 0 };
    (void)layer;
    const double scale = sqrt((double)H / (double)h);
    fg_tensor q = project(x, "q", c);                                               /* [B,T,H,d] */
    fg_tensor k = project(x, "k", c);
    fg_tensor v = project(x, "v", c);
    fg_tensor beta = fg_sigmoid(fg_nn_xavier(x, "b_proj", H));                      /* [B,T,H]   */
    fg_tensor o = fg_unit_delta_rule(q, k, v, beta, scale, 1e-6, none);             /* [B,T,H,d] */
    o = fg_nn_merge(fg_nn_norm(o, "o_norm", c->norm_eps));                          /* [B,T,h]   */
    return fg_nn_xavier(o, "o_proj", h);
}

static fg_nn_skeleton skeleton(const delta_net_config *c)
{
    return (fg_nn_skeleton){ .mixer = mixer, .config = c, .vocab = c->vocab_size,
        .width = c->hidden_size, .layers = c->num_hidden_layers, .heads = c->num_heads,
        .hidden = c->intermediate_size, .ratio = c->hidden_ratio, .eps = c->norm_eps,
        .tied = c->tie_word_embeddings, .recompute = c->recompute, .small_down = true };
}

fg_tensor (delta_net_block)(fg_loc at, fg_tensor x, const delta_net_config *c)
{
    return (fg_nn_block)(at, x, skeleton(c));
}

fg_tensor (delta_net_lm)(fg_loc at, fg_tensor tokens, const delta_net_config *c)
{
    delta_net_config_record(tokens.graph, c);
    return (fg_nn_lm)(at, tokens, skeleton(c));
}

#ifndef FG_LIBRARY            /* fox-graph run delta_net.c --set width=512 --set heads=8 */
#include <fox_graph.h>
fg_tensor fg_model(fg_tensor tokens)
{
    fg_graph *g = tokens.graph;
    const delta_net_config c = delta_net_lm_config(
        fg_setting_int(g, "vocab_size", 256), fg_setting_int(g, "width", 128),
        fg_setting_int(g, "layers", 4), fg_setting_int(g, "heads", 4));
    return delta_net_lm(tokens, &c);
}
#endif
