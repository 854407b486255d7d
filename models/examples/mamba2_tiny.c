/* mamba2_tiny.c - Mamba-2 on bytes, trained as fox_pro_tiny.c is, to compare.
 *
 *     fox-graph run mamba2_tiny.c --data text.txt
 *     fox-graph run mamba2_tiny.c --data text.txt --set width=192 --set state=32
 *
 * Source: Dao and Gu 2024, "Transformers are SSMs" (arXiv 2405.21060). */
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
    const int64_t width = fg_setting_int(g, "width", 128), layers = fg_setting_int(g, "layers", 8);
    const int64_t heads = fg_setting_int(g, "heads", width / 16);
    mamba2_config c = mamba2_lm_config(256, width, layers, heads);
    c.state_size = fg_setting_int(g, "state", 16);
    return mamba2_lm(tokens, &c);
}
