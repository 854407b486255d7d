/* norms.c - RMS norms with gains of their own, over the whole width or over each head.
 *
 *     y = x rstd w,   rstd = 1 / sqrt(mean(x^2) + eps)
 *
 * Gains start at 1 and do not decay.  Shapes: B batch, T positions, H heads, d head width.
 * Reshapes cost nothing: heads are contiguous parts of the width. */
#include "fox_models.h"

static fg_tensor gain(fg_loc at, fg_graph *g, const char *name, int64_t n)
{
    const fg_init ones = { FG_ONES, .no_decay = true };
    (fg_scope_push)(at, g, name);
    fg_tensor w = fg_param(g, "weight", FG_DIMS(n), ones);
    fg_scope_pop(g);
    return w;
}

fg_tensor (fg_nn_norm)(fg_loc at, fg_tensor x, const char *name, double eps)
{
    fg_tensor w = gain(at, x.graph, name, fg_dim(x, -1));
    return (fg_rms_norm)(at, x, w, eps > 0 ? eps : 1e-6, 1);
}

fg_tensor (fg_nn_head_norm)(fg_loc at, fg_tensor x, const char *name, double eps, bool shared)
{
    const int64_t H = fg_dim(x, -2), d = fg_dim(x, -1);
    if (shared) return (fg_nn_norm)(at, x, name, eps);
    fg_tensor w = gain(at, x.graph, name, H * d);
    return fg_nn_heads((fg_rms_norm)(at, fg_nn_merge(x), w, eps > 0 ? eps : 1e-6, H), H);
}

fg_tensor (fg_nn_gated_norm)(fg_loc at, fg_tensor x, const char *name, fg_tensor gate, double eps)
{
    const int64_t H = fg_dim(x, -2), d = fg_dim(x, -1);
    if (fg_absent(gate)) return fg_nn_merge((fg_nn_head_norm)(at, x, name, eps, false));
    fg_tensor w = gain(at, x.graph, name, H * d);
    return (fg_gated_norm)(at, fg_nn_merge(x), w, gate, eps > 0 ? eps : 1e-6, H);
}
