/* fox.c - the Forgetting Transformer: FoX (LLaMA), FoX (Pro) and, without gate, Transformer (Pro).
 *
 * Source: Lin, Nikishin, He, Courville 2025, "Forgetting Transformer: Softmax Attention with a
 *         Forget Gate" (arXiv 2503.02130), section 3; parameters named as in its checkpoints.
 * Shapes: B batch, T positions, h model width, H heads, d = h/H head width, V vocabulary. */
#include <math.h>
#include "fox_models.h"

/* u = W x, and if shifted y_t = a_t u_(t-1) + (1 - a_t) u_t for each head, a = sigmoid(W_a x) */
static fg_tensor project(fg_tensor x, const char *name, int64_t H, bool shift)
{
    if (!shift) return fg_nn_heads(fg_nn_linear(x, name, fg_dim(x, -1)), H);
    fg_scope_push(x.graph, name);
    fg_tensor u = fg_nn_heads(fg_nn_linear(x, "linear", fg_dim(x, -1)), H);         /* [B,T,H,d] */
    fg_tensor a = fg_sigmoid(fg_nn_linear(x, "shift_proj", H));                     /* [B,T,H]   */
    fg_tensor y = fg_shift_mix(u, a);                                               /* [B,T,H,d] */
    fg_scope_pop(x.graph);
    return y;
}

/* o_i = sum_(j<=i) softmax_j(q_i.k_j / sqrt(d) + log f_(j+1) + ... + log f_i) v_j,
 * log f_t = log sigmoid(W_f x_t + b_f), or log sigmoid(b_f) for gates that do not look at x */
static fg_tensor attention(fg_tensor x, const void *config, int64_t layer)
{
    (void)layer;
    const fox_config *c = config;
    const int64_t h = fg_dim(x, -1), H = c->num_heads;
    const bool shared = c->qk_norm_share_param_across_head;
    const bool gated = c->use_output_gate, normed = c->use_output_norm;
    const double base = c->rope_base > 0 ? c->rope_base : 500000;

    fg_tensor q = project(x, "q_proj", H, false);                                   /* [B,T,H,d] */
    fg_tensor k = project(x, "k_proj", H, c->use_k_shift);
    fg_tensor v = project(x, "v_proj", H, c->use_v_shift);
    if (c->qk_norm) q = fg_nn_head_norm(q, "q_norm", 1e-5, shared);
    if (c->qk_norm) k = fg_nn_head_norm(k, "k_norm", 1e-5, shared);
    if (c->use_rope) q = fg_rope(q, base);
    if (c->use_rope) k = fg_rope(k, base);
    fg_tensor log_f = { 0 };                                                        /* [B,T,H]   */
    if (c->fgate_type == FG_GATE_FULL)
        log_f = fg_log_sigmoid(fg_nn_affine(x, "fgate_proj", H));
    else if (c->fgate_type != FG_GATE_NONE)
        log_f = fg_nn_decay(x, "fgate_bias", H, c->decay_time_min, c->decay_time_max,
                            c->fgate_type == FG_GATE_FIXED);
    fg_tensor o = fg_forget_attention(q, k, v, log_f, sqrt((double)H / (double)h), 0);
    fg_tensor g = gated ? fg_nn_linear(x, "ogate_proj", h) : (fg_tensor){ 0 };      /* [B,T,h]   */
    if (normed) o = fg_nn_gated_norm(o, "output_norm", g, c->norm_eps);             /* [B,T,h]   */
    else o = fg_nn_merge(o);
    if (gated && !normed) o = fg_mul(o, c->output_gate_silu ? fg_silu(g) : fg_sigmoid(g));
    return fg_nn_linear(o, "o_proj", h);
}

static fg_nn_skeleton skeleton(const fox_config *c)
{
    return (fg_nn_skeleton){ attention, c, c->vocab_size, c->hidden_size, c->num_hidden_layers,
        c->num_heads, c->intermediate_size, c->hidden_ratio, c->norm_eps,
        c->mlp_sigmoid ? FG_ACT_SIGMOID : FG_ACT_SILU, c->tie_word_embeddings, c->recompute,
        false, 0 };
}

fg_tensor (fox_block)(fg_loc at, fg_tensor x, const fox_config *c)
{
    return (fg_nn_block)(at, x, skeleton(c));
}

fg_tensor (fox_lm)(fg_loc at, fg_tensor tokens, const fox_config *c)
{
    fox_config_record(tokens.graph, c);
    return (fg_nn_lm)(at, tokens, skeleton(c));
}

#ifndef FG_LIBRARY          /* fox-graph run fox.c --set width=512 --set layers=8 --set heads=8 */
#include <fox_graph.h>
fg_tensor fg_model(fg_tensor x)
{
    const fox_config c = fox_pro_config(
        fg_setting_int(x.graph, "vocab_size", 256), fg_setting_int(x.graph, "width", 128),
        fg_setting_int(x.graph, "layers", 4), fg_setting_int(x.graph, "heads", 4));
    return fox_lm(x, &c);
}
#endif
