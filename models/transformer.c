/* transformer.c - the Transformer (LLaMA): rotary positions, SwiGLU, pre-norm; also with a window.
 *
 * Source: Touvron et al. 2023, "LLaMA" (arXiv 2302.13971), section 2.2; the window of
 *         Beltagy et al. 2020, "Longformer" (arXiv 2004.05150): the last W keys.
 * Shapes: B batch, T positions, h model width, H heads, G key and value heads, d = h/H. */
#include <math.h>
#include "fox_models.h"

static fg_tensor project(fg_tensor x, const char *name, int64_t heads, int64_t d)
{
    return fg_nn_heads(fg_nn_linear(x, name, heads * d), heads);
}

/* o_i = sum_(i-W<j<=i) softmax_j(q_i.k_j / sqrt(d)) v_j,   q and k turned by their positions */
static fg_tensor attention(fg_tensor x, const void *config, int64_t layer)
{
    (void)layer;
    const transformer_config *c = config;
    const int64_t h = fg_dim(x, -1), H = c->num_heads, d = h / H;
    const int64_t G = c->num_kv_heads > 0 ? c->num_kv_heads : H;
    const double base = c->rope_base > 0 ? c->rope_base : 500000;
    if (H % G)
        return fg_fail(x, FG_ERR_SHAPE, "%lld heads cannot share %lld key heads evenly",
                       (long long)H, (long long)G);

    fg_tensor q = project(x, "q_proj", H, d);                                       /* [B,T,H,d] */
    fg_tensor k = project(x, "k_proj", G, d);                                       /* [B,T,G,d] */
    fg_tensor v = project(x, "v_proj", G, d);                                       /* [B,T,G,d] */
    if (!c->no_rope) q = fg_rope(q, base);
    if (!c->no_rope) k = fg_rope(k, base);
    const fg_tensor no_gate = { 0 };
    fg_tensor o = fg_forget_attention(q, k, v, no_gate, 1 / sqrt((double)d), c->window_size);
    return fg_nn_linear(fg_nn_merge(o), "o_proj", h);                               /* [B,T,h]   */
}

static fg_nn_skeleton skeleton(const transformer_config *c)
{
    return (fg_nn_skeleton){ attention, c, c->vocab_size, c->hidden_size, c->num_hidden_layers,
        c->num_heads, c->intermediate_size, c->hidden_ratio, c->norm_eps,
        c->mlp_sigmoid ? FG_ACT_SIGMOID : FG_ACT_SILU, c->tie_word_embeddings, c->recompute,
        false, 0 };
}

fg_tensor (transformer_block)(fg_loc at, fg_tensor x, const transformer_config *c)
{
    return (fg_nn_block)(at, x, skeleton(c));
}

fg_tensor (transformer_lm)(fg_loc at, fg_tensor tokens, const transformer_config *c)
{
    transformer_config_record(tokens.graph, c);
    return (fg_nn_lm)(at, tokens, skeleton(c));
}

#ifndef FG_LIBRARY          /* fox-graph run transformer.c --set width=512 --set heads=8 */
#include <fox_graph.h>
fg_tensor fg_model(fg_tensor tokens)
{
    fg_graph *g = tokens.graph;
    transformer_config c = transformer_llama_config(
        fg_setting_int(g, "vocab_size", 256), fg_setting_int(g, "width", 128),
        fg_setting_int(g, "layers", 4), fg_setting_int(g, "heads", 4));
    c.window_size = fg_setting_int(g, "window", 0);
    return transformer_lm(tokens, &c);
}
#endif
