/* mamba2.c - Mamba-2: layers of a state space scan between projections, without attention or MLP.
 *
 * Source: Dao and Gu 2024, "Transformers are SSMs" (arXiv 2405.21060), section 7; parameters named
 *         as in the FoX release's checkpoints (Lin et al. 2025, arXiv 2503.02130).
 * Shapes: B batch, T positions, h model width, E = expand h inner width, H heads of P = E/H, G
 * groups that share b and c, N state size, C = E + 2 G N channels of the convolution, V vocabulary.
 * softplus is the exact one everywhere; the official code takes x itself above 20 (2e-9 less). */
#include <math.h>
#include "fox_models.h"

static fg_tensor uniform(fg_graph *g, const char *name, fg_shape s, double bound)
{
    const fg_init init = { FG_UNIFORM, .a = bound };
    fg_scope_push(g, name);
    fg_tensor w = fg_param(g, "weight", s, init);
    fg_scope_pop(g);
    return w;
}

static fg_tensor project(fg_tensor x, const char *name, int64_t n_out, double bound)
{
    fg_tensor w = uniform(x.graph, name, FG_DIMS(n_out, fg_dim(x, -1)), bound);
    return fg_linear(x, w, (fg_tensor){ 0 });
}

/* silu(causal convolution) of every channel */
static fg_tensor convolve(fg_tensor x, const mamba2_config *c)
{
    const int64_t C = fg_dim(x, -1), W = c->conv_kernel;
    const double bound = 1 / sqrt((double)W);
    const fg_init init = { FG_UNIFORM, .a = bound, .no_decay = true };
    fg_tensor w = uniform(x.graph, "conv1d", FG_DIMS(C, 1, W), bound), bias = { 0 };
    fg_scope_push(x.graph, "conv1d");
    if (!c->no_conv_bias) bias = fg_param(x.graph, "bias", FG_DIMS(C), init);
    fg_scope_pop(x.graph);
    return fg_causal_conv(x, w, bias, true);
}

/* The scan; dt = softplus(raw + dt_bias), in [time_step_low, time_step_high]. */
static fg_tensor scan(fg_tensor x, fg_tensor raw, fg_tensor b, fg_tensor k, const mamba2_config *c)
{
    fg_graph *g = raw.graph;
    const fg_shape heads = FG_DIMS(fg_dim(raw, -1));
    const fg_tensor none = { 0 };
    const fg_init steps = { FG_INV_SOFTPLUS, c->time_step_min, c->time_step_max,
                            c->time_step_floor, .no_decay = true };
    const fg_init rates = { FG_LOG_RANGE, .no_decay = true }, ones = { FG_ONES, .no_decay = true };
    fg_tensor bias = fg_param(g, "dt_bias", heads, steps);
    fg_tensor a_log = fg_param(g, "A_log", heads, rates);
    fg_tensor d = fg_param(g, "D", heads, ones);
    if (c->time_step_low <= 0 && c->time_step_high <= 0)
        return fg_mamba2_scan(x, raw, bias, a_log, b, k, d, none);
    fg_tensor dt = fg_softplus(fg_add(raw, bias));
    if (c->time_step_low > 0) {
        fg_tensor low = fg_fill(g, FG_DIMS(1), c->time_step_low);
        dt = fg_max(dt, low);
    }
    if (c->time_step_high > 0) {
        fg_tensor high = fg_fill(g, FG_DIMS(1), -c->time_step_high);
        dt = fg_neg(fg_max(fg_neg(dt), high));
    }
    return fg_ssd_scan(x, dt, fg_neg(fg_exp(a_log)), b, k, d, none);
}

/* y = W_out norm(scan(x) * silu(z)),   [z | xbc | dt] = W_in u,   [x | b | c] = silu(conv(xbc)) */
static fg_tensor mixer(fg_tensor u, const mamba2_config *c)
{
    fg_graph *g = u.graph;
    const int64_t B = fg_dim(u, 0), T = fg_dim(u, 1), h = fg_dim(u, 2);
    const int64_t E = c->expand * h, H = c->num_heads, G = c->n_groups, N = c->state_size;
    const int64_t C = E + 2 * G * N, b0 = E, c0 = E + G * N;
    const fg_init ones = { FG_ONES, .no_decay = true };

    fg_tensor all = project(u, "in_proj", E + C + H, 1 / sqrt((double)h));          /* all      */
    fg_tensor z = fg_slice(all, -1, 0, E);                                          /* [B,T,E]   */
    fg_tensor xbc = convolve(fg_slice(all, -1, E, E + C), c);                       /* [B,T,C]   */
    fg_tensor dt = fg_slice(all, -1, E + C, E + C + H);                             /* [B,T,H]   */
    fg_tensor x = fg_reshape(fg_slice(xbc, -1, 0, E), FG_DIMS(B, T, H, E / H));     /* [B,T,H,P] */
    fg_tensor b = fg_reshape(fg_slice(xbc, -1, b0, c0), FG_DIMS(B, T, G, N));       /* [B,T,G,N] */
    fg_tensor k = fg_reshape(fg_slice(xbc, -1, c0, C), FG_DIMS(B, T, G, N));
    fg_tensor y = fg_nn_merge(scan(x, dt, b, k, c));                                /* [B,T,E]   */
    fg_scope_push(g, "norm");
    fg_tensor gain = fg_param(g, "weight", FG_DIMS(E), ones);
    fg_scope_pop(g);
    y = fg_norm_of_gated(y, gain, z, c->layer_norm_epsilon, G);
    const double depth = sqrt((double)(c->num_hidden_layers > 0 ? c->num_hidden_layers : 1));
    return project(y, "out_proj", h, 1 / (sqrt((double)E) * depth));                /* [B,T,h]   */
}

static fg_tensor check(fg_loc at, fg_tensor x, int64_t width, const mamba2_config *c)
{
    if (!fg_ok(x)) return x;
    if (c->num_heads * c->head_dim != c->expand * width)
        return (fg_fail)(at, x, FG_ERR_SHAPE, "%lld heads of %lld are not expand = %lld times the"
                         " width %lld", (long long)c->num_heads, (long long)c->head_dim,
                         (long long)c->expand, (long long)width);
    if (c->num_heads % c->n_groups || c->state_size < 1 || c->conv_kernel < 1)
        return (fg_fail)(at, x, FG_ERR_SHAPE, "%lld heads in %lld groups, a state of %lld and a"
                         " kernel of %lld are no mixer", (long long)c->num_heads,
                         (long long)c->n_groups, (long long)c->state_size,
                         (long long)c->conv_kernel);
    return x;
}

fg_tensor (mamba2_block)(fg_loc at, fg_tensor x, const mamba2_config *config)
{
    const mamba2_config c = mamba2_defaults(config);
    x = check(at, x, fg_dim(x, -1), &c);
    if (!fg_ok(x)) return x;
    fg_graph *g = x.graph;
    (fg_scope_push)(at, g, "");
    if (c.recompute) fg_scope_recompute(g);
    fg_tensor u = fg_nn_norm(x, "norm", c.layer_norm_epsilon);                      /* [B,T,h]   */
    fg_scope_push(g, "mixer");
    fg_tensor y = mixer(u, &c);                                                     /* [B,T,h]   */
    fg_scope_pop(g);
    fg_scope_pop(g);
    return (fg_add)(at, x, y);
}

fg_tensor (mamba2_lm)(fg_loc at, fg_tensor tokens, const mamba2_config *config)
{
    const mamba2_config c = mamba2_defaults(config);
    fg_graph *g = tokens.graph;
    mamba2_config_record(g, &c);
    tokens = check(at, tokens, c.hidden_size, &c);
    if (!fg_ok(tokens)) return tokens;
    (fg_scope_push)(at, g, "backbone");
    fg_tensor E = fg_nn_weight(g, "embeddings", FG_DIMS(c.vocab_size, c.hidden_size)); /* [V,h] */
    fg_tensor x = fg_embedding(tokens, E);                                          /* [B,T,h]   */
    fg_scope_push(g, "layers");
    for (int64_t i = 0; i < c.num_hidden_layers; i++) {
        fg_scope_push(g, fg_name(g, "%lld", (long long)i));
        x = (mamba2_block)(at, x, &c);
        fg_scope_pop(g);
    }
    fg_scope_pop(g);
    x = fg_nn_norm(x, "norm_f", c.layer_norm_epsilon);
    fg_scope_pop(g);
    if (c.tie_word_embeddings) return (fg_linear)(at, x, E, (fg_tensor){ 0 });      /* [B,T,V]   */
    return project(x, "lm_head", c.vocab_size, 1 / sqrt((double)c.hidden_size));
}

#ifndef FG_LIBRARY                   /* fox-graph run mamba2.c --set width=512 --set layers=16 */
#include <fox_graph.h>
fg_tensor fg_model(fg_tensor tokens)
{
    fg_graph *g = tokens.graph;
    const int64_t width = fg_setting_int(g, "width", 128);
    const mamba2_config c = mamba2_lm_config(
        fg_setting_int(g, "vocab_size", 256), width, fg_setting_int(g, "layers", 8),
        fg_setting_int(g, "heads", width / 32));
    return mamba2_lm(tokens, &c);
}
#endif
