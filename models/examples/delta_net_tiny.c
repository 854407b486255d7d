/* delta_net_tiny.c - DeltaNet on bytes, trained as fox_pro_tiny.c is, to compare.
 *
 *     fox-graph run delta_net_tiny.c --data text.txt
 *
 * Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence
 *         Length" (arXiv 2406.06484). */
#include <fox_graph.h>

/* Bytes are tokens; the last tenth of the text is held out.  Small batches, for many updates. */
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
    const int64_t width = fg_setting_int(g, "width", 128), layers = fg_setting_int(g, "layers", 4);
    const int64_t heads = fg_setting_int(g, "heads", width / 32);
    delta_net_config c = delta_net_lm_config(256, width, layers, heads);
    c.intermediate_size = width * 5 / 2;
    return delta_net_lm(tokens, &c);
}
