/* layers.c - the layers that every model shares: projections, embedding, gates, heads, loss.
 *
 * Each makes its parameters in a scope of its own name: "<scope>.<name>.weight".  Biases and
 * constant gates belong to the group without weight decay, weights (embeddings too) decay.
 * Shapes: B batch, T positions, h model width, H heads, d = h/H, "..." any leading axes. */
#include <math.h>
#include <stdlib.h>
#include "fox_models.h"

fg_tensor (fg_nn_weight)(fg_loc at, fg_graph *g, const char *name, fg_shape s)
{
    const char *range = fg_graph_fact(g, "initializer_range");
    const fg_init normal = { FG_NORMAL, .a = range ? strtod(range, NULL) : 0.02 };
    (fg_scope_push)(at, g, name);
    fg_tensor w = fg_param(g, "weight", s, normal);
    fg_scope_pop(g);
    return w;
}

fg_tensor (fg_nn_linear)(fg_loc at, fg_tensor x, const char *name, int64_t n_out)
{
    fg_tensor w = (fg_nn_weight)(at, x.graph, name, FG_DIMS(n_out, fg_dim(x, -1)));
    return (fg_linear)(at, x, w, (fg_tensor){ 0 });
}

fg_tensor (fg_nn_xavier)(fg_loc at, fg_tensor x, const char *name, int64_t n_out)
{
    const double fans = (double)(fg_dim(x, -1) + n_out);
    const fg_init uniform = { FG_UNIFORM, .a = fans > 0 ? sqrt(6 / fans / 32) : 0 };
    (fg_scope_push)(at, x.graph, name);
    fg_tensor w = fg_param(x.graph, "weight", FG_DIMS(n_out, fg_dim(x, -1)), uniform);
    fg_scope_pop(x.graph);
    return (fg_linear)(at, x, w, (fg_tensor){ 0 });
}

fg_tensor (fg_nn_affine)(fg_loc at, fg_tensor x, const char *name, int64_t n_out)
{
    const fg_init zeros = { FG_ZEROS, .no_decay = true };
    fg_tensor w = (fg_nn_weight)(at, x.graph, name, FG_DIMS(n_out, fg_dim(x, -1)));
    (fg_scope_push)(at, x.graph, name);
    fg_tensor b = fg_param(x.graph, "bias", FG_DIMS(n_out), zeros);
    fg_scope_pop(x.graph);
    return (fg_linear)(at, x, w, b);
}

fg_tensor (fg_nn_embed)(fg_loc at, fg_tensor tokens, const char *name, int64_t vocab, int64_t width)
{
    fg_tensor w = (fg_nn_weight)(at, tokens.graph, name, FG_DIMS(vocab, width));
    return (fg_embedding)(at, tokens, w);
}

fg_tensor (fg_nn_decay)(fg_loc at, fg_tensor x, const char *name, int64_t heads, double tau_min,
                        double tau_max, bool frozen)
{
    const fg_shape s = FG_DIMS(fg_dim(x, 0), fg_dim(x, 1), heads);
    const fg_init_kind kind = tau_min > 0 ? FG_LOG_DECAY : FG_ZEROS;
    const fg_init init = { kind, tau_min, tau_max, .no_decay = true, .frozen = frozen };
    if (fg_ok(x) && (tau_min > 0 || frozen) && !(tau_min > 0 && tau_max >= tau_min))
        return (fg_fail)(at, x, FG_ERR_USAGE, "time constants from %g to %g are no range above 0",
                         tau_min, tau_max);
    fg_tensor b = (fg_param)(at, x.graph, name, FG_DIMS(heads), init);
    return (fg_broadcast_to)(at, (fg_log_sigmoid)(at, b), s);
}

fg_tensor (fg_nn_heads)(fg_loc at, fg_tensor x, int64_t heads)
{
    const int64_t B = fg_dim(x, 0), T = fg_dim(x, 1), h = fg_dim(x, 2);
    if (fg_ok(x) && (heads < 1 || h % heads))
        return (fg_fail)(at, x, FG_ERR_SHAPE, "width %lld does not divide into %lld heads",
                         (long long)h, (long long)heads);
    return (fg_reshape)(at, x, FG_DIMS(B, T, heads, h / (heads > 0 ? heads : 1)));
}

fg_tensor (fg_nn_merge)(fg_loc at, fg_tensor x)
{
    return (fg_reshape)(at, x, FG_DIMS(fg_dim(x, 0), fg_dim(x, 1), fg_dim(x, 2) * fg_dim(x, 3)));
}

fg_tensor (fg_nn_loss)(fg_loc at, fg_tensor logits, fg_tensor labels)
{
    return (fg_mean)(at, (fg_cross_entropy)(at, logits, labels));
}

int64_t fg_nn_mlp_width(int64_t h, double ratio)
{
    return ((int64_t)((double)h * ratio * 2 / 3) + 255) / 256 * 256;
}
