/* fuzz_config.c - any bytes as config.json: refused with a message, or a config whose model builds
 * or is refused, and which the graph's facts give again. */
#include "fox_train.h"
#include "fuzz.h"

static bool is_small(const fg_config *c)
{
    const fox_config *f = &c->u.fox;
    const transformer_config *t = &c->u.transformer;
    if (c->family == FG_FAMILY_HGRN2)
        return c->u.hgrn2.num_hidden_layers < 4;
    if (c->family == FG_FAMILY_DELTA_NET)
        return c->u.delta_net.num_hidden_layers < 4 && c->u.delta_net.num_heads < 64;
    if (c->family == FG_FAMILY_MAMBA2)
        return c->u.mamba2.num_hidden_layers < 4 && c->u.mamba2.num_heads < 64;
    if (c->family == FG_FAMILY_FOX)
        return f->num_hidden_layers < 4 && f->num_heads < 64;
    return t->num_hidden_layers < 4 && t->num_heads < 64;
}

static void build(const fg_config *c)
{
    char path[128], message[400];
    fg_config again;
    fg_graph *g = fg_graph_new();
    fg_tensor tokens = fg_input(g, "tokens", FG_I32, FG_DIMS(1, 3));
    fg_tensor logits = fg_config_build(c, tokens);
    HOLDS(fg_ok(logits) == (fg_graph_status(g) == FG_OK));
    if (fg_ok(logits)) {
        HOLDS(fg_config_write(fuzz_path("again", path), g, message) == FG_OK);
        HOLDS(fg_config_read(path, &again, message) == FG_OK);
        HOLDS(memcmp(c, &again, sizeof again) == 0);
    }
    fg_graph_free(g);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    char path[128], message[400];
    fg_config c;
    fuzz_write(fuzz_path("config.json", path), data, n);
    fg_status s = fg_config_read(path, &c, message);
    HOLDS((s == FG_OK) == (message[0] == '\0'));
    if (!s && is_small(&c))
        build(&c);
    return 0;
}
