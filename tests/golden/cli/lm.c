/* lm.c - a tiny language model on bytes, for the tests of the command. */
#include <fox_graph.h>

fg_tensor fg_model(fg_tensor tokens)
{
    const int64_t width = fg_setting_int(tokens.graph, "width", 16);
    const fox_config c = fox_pro_config(256, width, 1, 2);
    return fox_lm(tokens, &c);
}

void fg_configure(fg_recipe *r)
{
    r->batch = 2;
    r->context = 16;
    r->steps = 4;
    r->lr = 0.003;
    r->warmup_tokens = 32;
}
