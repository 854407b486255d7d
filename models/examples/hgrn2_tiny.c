/* hgrn2_tiny.c - HGRN2 on bytes, trained as fox_pro_tiny.c is, to compare.
 *
 *     fox-graph run hgrn2_tiny.c --data text.txt
 *     fox-graph run hgrn2_tiny.c --data text.txt --set lower_bound=0
 *
 * Source: Qin et al. 2024, "HGRN2: Gated Linear RNNs with State Expansion" (arXiv 2404.07904). */
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
    const int64_t expand = fg_setting_int(g, "expand", 32);
    const bool bounded = fg_setting_int(g, "lower_bound", 1);
    hgrn2_config c = hgrn2_lm_config(256, width, layers, expand);
    if (!bounded) c.lower_bound = HGRN2_NO_BOUNDS;
    c.intermediate_size = width * 5 / 2;
    return hgrn2_lm(tokens, &c);
}
