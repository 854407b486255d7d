/* shapes.c - four mistakes, none of which hides another. */
#include <fox_graph.h>

fg_tensor fg_model(fg_tensor tokens)
{
    fg_tensor x = fg_nn_embed(tokens, "embed", 64, 24);
    fg_tensor a = fg_nn_heads(x, 5);
    fg_tensor w = fg_param(x.graph, "w", FG_DIMS(7, 8), ((fg_init){ .kind = FG_NORMAL, .a = 1 }));
    fg_tensor b = fg_linear(x, w, ((fg_tensor){ 0 }));
    fg_tensor v = fg_param(x.graph, "w", FG_DIMS(7, 8), ((fg_init){ .kind = FG_NORMAL, .a = 1 }));
    fg_tensor c = fg_cumsum(x, 3, false);
    return fg_add(fg_add(a, b), fg_add(v, c));
}
