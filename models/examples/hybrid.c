/* hybrid.c - FoX attention among Mamba-2 layers: blocks of two families in one model.
 *
 *     fox-graph run hybrid.c --data text.txt
 *     fox-graph run hybrid.c --data text.txt --set layers=12 --set every=4
 *
 * Every third layer is a block of FoX (Pro) with its MLP, the others are Mamba-2's.  Scans carry a
 * state of fixed size, so caches grow in the attention layers alone.
 * Source: Lin et al. 2025, "Forgetting Transformer" (arXiv 2503.02130); Dao and Gu 2024,
 *         "Transformers are SSMs" (arXiv 2405.21060), section 9.2.3, for the mixture. */
#include <fox_graph.h>

void fg_configure(fg_recipe *r)
{
    r->batch = 4;
    r->context = 128;
    r->tokens = 2000000;
    r->lr = 4e-3;
    r->warmup_tokens = 50000;
    r->eval_every = 500;
    r->eval_batches = 16;
    r->log_every = 20;
}

fg_tensor fg_model(fg_tensor tokens)                     /* [B,T] -> logits [B,T,256] */
{
    fg_graph *g = tokens.graph;
    const int64_t width = fg_setting_int(g, "width", 128), layers = fg_setting_int(g, "layers", 6);
    const int64_t every = fg_setting_int(g, "every", 3);
    mamba2_config scan = mamba2_lm_config(256, width, layers, width / 16);
    fox_config attention = fox_pro_config(256, width, layers, width / 32);
    scan.state_size = 16;
    attention.intermediate_size = width * 5 / 2;

    fg_tensor x = fg_nn_embed(tokens, "embed", 256, width);                         /* [B,T,h] */
    for (int64_t i = 0; i < layers; i++) {
        fg_scope_push(g, fg_name(g, "layers.%lld", (long long)i));
        if (every > 0 && i % every == every - 1) x = fox_block(x, &attention);
        else x = mamba2_block(x, &scan);
        fg_scope_pop(g);
    }
    return fg_nn_linear(fg_nn_norm(x, "norm", 0), "head", 256);
}
