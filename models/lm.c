/* lm.c - what the families share around their mixers: SwiGLU, pre-norm block, language model.
 *
 *     x = E[tokens];  each layer: r = x + mixer(norm(x)), x = r + mlp(norm(r));  logits = W norm(x)
 *
 * Shapes: B batch, T positions, h model width, I MLP width, V vocabulary.
 * Source: Touvron et al. 2023, "LLaMA" (arXiv 2302.13971), section 2.2. */
#include <math.h>
#include <stdlib.h>
#include "fox_models.h"

/* W_down [n_out,I] starts `scale` times as large as other weights. */
static fg_tensor down(fg_tensor x, int64_t n_out, double scale)
{
    const char *range = fg_graph_fact(x.graph, "initializer_range");
    const fg_init normal = { FG_NORMAL, .a = scale * (range ? strtod(range, NULL) : 0.02) };
    fg_scope_push(x.graph, "down_proj");
    fg_tensor w = fg_param(x.graph, "weight", FG_DIMS(n_out, fg_dim(x, -1)), normal);
    fg_scope_pop(x.graph);
    return fg_linear(x, w, (fg_tensor){ 0 });
}

/* y = W_down (act(g) * p),   [g | p] = W_gate x */
static fg_tensor mlp(fg_loc at, fg_tensor x, const char *name, int64_t hidden, fg_act act,
                     double scale)
{
    (fg_scope_push)(at, x.graph, name);
    fg_tensor gp = fg_nn_linear(x, "gate_proj", 2 * hidden);                        /* [B,T,2I]  */
    fg_tensor y = down(fg_swiglu(gp, act), fg_dim(x, -1), scale);                   /* [B,T,h]   */
    fg_scope_pop(x.graph);
    return y;
}

fg_tensor (fg_nn_mlp)(fg_loc at, fg_tensor x, const char *name, int64_t hidden, fg_act act)
{
    return mlp(at, x, name, hidden, act, 1);
}

/* The halves of a block; each has a scope, to be recomputed in the backward pass if asked. */
static fg_tensor time_half(fg_tensor x, fg_nn_skeleton s)
{
    if (s.recompute) fg_scope_recompute(x.graph);
    fg_tensor u = fg_nn_norm(x, "attn_norm", s.eps);                               /* [B,T,h]   */
    fg_scope_push(x.graph, "attn");
    fg_tensor y = s.mixer(u, s.config, s.layer);                                    /* [B,T,h]   */
    fg_scope_pop(x.graph);
    return y;
}

static fg_tensor mlp_half(fg_tensor x, fg_nn_skeleton s)
{
    if (s.recompute) fg_scope_recompute(x.graph);
    fg_tensor u = fg_nn_norm(x, "mlp_norm", s.eps);                                /* [B,T,h]   */
    const int64_t wide = fg_nn_mlp_width(fg_dim(x, -1), s.ratio > 0 ? s.ratio : 4);
    const double scale = s.small_down && s.layers > 0 ? 1 / sqrt(2 * (double)s.layers) : 1;
    return mlp(FG_HERE, u, "mlp", s.hidden > 0 ? s.hidden : wide, s.act, scale);
}

static fg_tensor whole_heads(fg_loc at, fg_tensor x, int64_t width, int64_t heads)
{
    if (heads > 0 && width > 0 && width % heads == 0) return x;
    return (fg_fail)(at, x, FG_ERR_SHAPE, "width %lld does not divide into %lld heads",
                     (long long)width, (long long)heads);
}

fg_tensor (fg_nn_block)(fg_loc at, fg_tensor x, fg_nn_skeleton s)
{
    x = whole_heads(at, x, fg_dim(x, -1), s.heads);
    if (!fg_ok(x)) return x;
    (fg_scope_push)(at, x.graph, "");
    fg_tensor a = time_half(x, s);                                                  /* [B,T,h]   */
    fg_scope_pop(x.graph);
    x = (fg_add)(at, x, a);
    (fg_scope_push)(at, x.graph, "");
    fg_tensor m = mlp_half(x, s);                                                   /* [B,T,h]   */
    fg_scope_pop(x.graph);
    return (fg_add)(at, x, m);
}

fg_tensor (fg_nn_lm)(fg_loc at, fg_tensor tokens, fg_nn_skeleton s)
{
    fg_graph *g = tokens.graph;
    tokens = whole_heads(at, tokens, s.width, s.heads);
    if (!fg_ok(tokens)) return tokens;
    (fg_scope_push)(at, g, "model");
    fg_tensor E = fg_nn_weight(g, "embeddings", FG_DIMS(s.vocab, s.width));       /* [V,h]     */
    fg_tensor x = fg_embedding(tokens, E);                                          /* [B,T,h]   */
    fg_scope_push(g, "layers");
    for (int64_t i = 0; i < s.layers; i++) {
        fg_scope_push(g, fg_name(g, "%lld", (long long)i));
        s.layer = i;
        x = fg_nn_block(x, s);
        fg_scope_pop(g);
    }
    fg_scope_pop(g);
    x = fg_nn_norm(x, "norm", s.eps);
    fg_scope_pop(g);
    if (s.tied) return (fg_linear)(at, x, E, (fg_tensor){ 0 });                    /* [B,T,V]   */
    return (fg_nn_linear)(at, x, "lm_head", s.vocab);
}
