/* transformer_tiny.c - the Transformer (LLaMA) on bytes, trained as fox_pro_tiny.c is, to compare.
 *
 *     fox-graph run transformer_tiny.c --data text.txt
 *     fox-graph run transformer_tiny.c --data text.txt --set window=64
 *
 * Source: Touvron et al. 2023, "LLaMA" (arXiv 2302.13971). */
#include <fox_graph.h>

/* Bytes are tokens; the last tenth of the text is held out.  Small batches, for many updates. */
void fg_configure(fg_recipe *r)
{
    r->batch = 8;
    r->context = 256;
    r->tokens = 2000000;
    r->lr = 4e-3;
    r->warmup_tokens = 100000;
    r->eval_every = 200;
    r->eval_batches = 16;
    r->log_every = 10;
}

fg_tensor fg_model(fg_tensor tokens)                     /* [B,T] -> logits [B,T,256] */
{
    fg_graph *g = tokens.graph;
    const int64_t width = fg_setting_int(g, "width", 128), layers = fg_setting_int(g, "layers", 4);
    const int64_t heads = fg_setting_int(g, "heads", width / 32);
    transformer_config c = transformer_llama_config(256, width, layers, heads);
    c.intermediate_size = width * 3;
    c.window_size = fg_setting_int(g, "window", 0);      /* keys that a query sees; 0: all */
    return transformer_lm(tokens, &c);
}
