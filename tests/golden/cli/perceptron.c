/* perceptron.c - a small model with inputs of its own, for the tests of the command. */
#include <fox_graph.h>
#include "width.h"

fg_tensor fg_loss(fg_graph *g, const fg_recipe *r)
{
    const int64_t n = fg_setting_int(g, "width", WIDTH);
    fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(r->batch, n));
    fg_tensor w = fg_param(g, "w", FG_DIMS(n), ((fg_init){ .kind = FG_NORMAL, .a = 0.1 }));
    fg_tensor y = fg_tanh(fg_mul(x, w));
    return fg_mean(fg_mul(y, y));
}

fg_status fg_feed(fg_plan *p, const fg_graph *g, const fg_recipe *r, int64_t batch, bool eval)
{
    float x[4096];
    fg_tensor t = fg_find(g, "x");
    (void)r;
    (void)eval;
    for (int64_t i = 0; i < fg_count(t); i++)
        x[i] = (float)((i * 37 + batch * 11) % 17) / 17 - 0.4f;
    return fg_write(p, t, x, (size_t)fg_count(t) * sizeof *x);
}

void fg_configure(fg_recipe *r)
{
    r->steps = 8;
    r->batch = 4;
    r->lr = 0.01;
}
