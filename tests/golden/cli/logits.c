/* logits.c - gives logits of rank 2. */
#include <fox_graph.h>

fg_tensor fg_model(fg_tensor tokens)
{
    fg_tensor x = fg_nn_embed(tokens, "embed", 64, 8);
    return fg_reshape(x, FG_DIMS(fg_dim(tokens, 0) * fg_dim(tokens, 1), 8));
}
