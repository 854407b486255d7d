/* catalog.c - the paper's models by name: sizes, peak learning rates and token budgets.
 *
 * Source: Lin et al. 2025, "Forgetting Transformer" (arXiv 2503.02130), as released.
 * Vocabulary 50257; an update sees 32 sequences of 16384 tokens.  At 760m FoX has heads of 64, the
 * Transformers heads of 128, and activations are computed again in the backward pass unless the
 * setting "recompute" is 0. */
#include <string.h>
#include "fox_models.h"

typedef struct { int64_t width, layers, heads, window; bool recompute; } size;

/* The paper's choice, or the setting "recompute". */
static bool recompute(fg_tensor tokens, const size *s)
{
    return fg_setting_int(tokens.graph, "recompute", s->recompute) != 0;
}

static fg_tensor build_fox(fg_loc at, fg_tensor tokens, fox_config c, const size *s)
{
    c.recompute = recompute(tokens, s);
    c.qk_norm_share_param_across_head = c.qk_norm
        && fg_setting_int(tokens.graph, "qk_norm_share_param_across_head", 0);
    return (fox_lm)(at, tokens, &c);
}

static fg_tensor fox_llama(fg_loc at, fg_tensor tokens, const size *s)
{
    return build_fox(at, tokens, fox_llama_config(50257, s->width, s->layers, s->heads), s);
}

static fg_tensor fox_pro(fg_loc at, fg_tensor tokens, const size *s)
{
    return build_fox(at, tokens, fox_pro_config(50257, s->width, s->layers, s->heads), s);
}

static fg_tensor transformer_pro(fg_loc at, fg_tensor tokens, const size *s)
{
    return build_fox(at, tokens, transformer_pro_config(50257, s->width, s->layers, s->heads), s);
}

static fg_tensor transformer_llama(fg_loc at, fg_tensor tokens, const size *s)
{
    transformer_config c = transformer_llama_config(50257, s->width, s->layers, s->heads);
    c.window_size = s->window;
    c.recompute = recompute(tokens, s);
    return (transformer_lm)(at, tokens, &c);
}

/* heads of 128; lower_bound=0 keeps the bounds unused, as the released models have them */
static fg_tensor hgrn2(fg_loc at, fg_tensor tokens, const size *s)
{
    hgrn2_config c = hgrn2_lm_config(50257, s->width, s->layers, s->width / s->heads);
    if (!fg_setting_int(tokens.graph, "lower_bound", 1)) c.lower_bound = HGRN2_BOUNDS_STORED;
    c.recompute = recompute(tokens, s);
    return (hgrn2_lm)(at, tokens, &c);
}

static fg_tensor delta_net(fg_loc at, fg_tensor tokens, const size *s)
{
    delta_net_config c = delta_net_lm_config(50257, s->width, s->layers, s->heads);
    c.recompute = recompute(tokens, s);
    return (delta_net_lm)(at, tokens, &c);
}

static fg_tensor mamba2(fg_loc at, fg_tensor tokens, const size *s)
{
    mamba2_config c = mamba2_lm_config(50257, s->width, s->layers, s->heads);
    c.recompute = recompute(tokens, s);
    return (mamba2_lm)(at, tokens, &c);
}

#define BUDGET_2B  2684354560            /* 2.5, 7 and 15 * 2^30 tokens */
#define BUDGET_7B  7516192768
#define BUDGET_16B 16106127360

/* A preset: name, family, lr, tokens, context, batch; its builder; width, layers, heads, window. */
static const struct {
    fg_preset preset;
    fg_tensor (*build)(fg_loc at, fg_tensor tokens, const size *s);
    size size;
} models[] = {
#define MODEL(name, build, lr, tokens, ...) \
    { { name, #build, lr, tokens, 16384, 32 }, build, { __VA_ARGS__ } }
    MODEL("fox-llama-125m",         fox_llama,         2e-3, BUDGET_2B,   768, 12, 12,    0, false),
    MODEL("fox-llama-360m",         fox_llama,         2e-3, BUDGET_7B,  1024, 24, 16,    0, false),
    MODEL("fox-llama-760m",         fox_llama,         1e-3, BUDGET_16B, 1536, 24, 24,    0, true),
    MODEL("fox-pro-125m",           fox_pro,           2e-3, BUDGET_2B,   768, 12, 12,    0, false),
    MODEL("fox-pro-360m",           fox_pro,           2e-3, BUDGET_7B,  1024, 24, 16,    0, false),
    MODEL("fox-pro-760m",           fox_pro,           1e-3, BUDGET_16B, 1536, 24, 24,    0, true),
    MODEL("transformer-llama-125m", transformer_llama, 2e-3, BUDGET_2B,   768, 12, 12,    0, false),
    MODEL("transformer-llama-360m", transformer_llama, 2e-3, BUDGET_7B,  1024, 24, 16,    0, false),
    MODEL("transformer-llama-760m", transformer_llama, 1e-3, BUDGET_16B, 1536, 24, 12,    0, true),
    MODEL("transformer-pro-125m",   transformer_pro,   2e-3, BUDGET_2B,   768, 12, 12,    0, false),
    MODEL("transformer-pro-360m",   transformer_pro,   2e-3, BUDGET_7B,  1024, 24, 16,    0, false),
    MODEL("transformer-pro-760m",   transformer_pro,   1e-3, BUDGET_16B, 1536, 24, 12,    0, true),
    MODEL("hgrn2-125m",             hgrn2,             2e-3, BUDGET_2B,   768, 12,  6,    0, false),
    MODEL("hgrn2-360m",             hgrn2,             2e-3, BUDGET_7B,  1024, 24,  8,    0, false),
    MODEL("hgrn2-760m",             hgrn2,             1e-3, BUDGET_16B, 1536, 24, 12,    0, true),
    MODEL("delta-net-125m",         delta_net,         2e-3, BUDGET_2B,   768, 12,  6,    0, false),
    MODEL("delta-net-360m",         delta_net,         2e-3, BUDGET_7B,  1024, 24,  8,    0, false),
    MODEL("delta-net-760m",         delta_net,         1e-3, BUDGET_16B, 1536, 24, 12,    0, true),
    MODEL("mamba2-125m",            mamba2,            2e-3, BUDGET_2B,   768, 24, 24,    0, false),
    MODEL("mamba2-360m",            mamba2,            2e-3, BUDGET_7B,  1024, 48, 32,    0, false),
    MODEL("mamba2-760m",            mamba2,            1e-3, BUDGET_16B, 1536, 48, 48,    0, true),
    MODEL("transformer-swa-760m",   transformer_llama, 1e-3, BUDGET_16B, 1536, 24, 12, 2048, true),
};

int fg_preset_count(void)
{
    return (int)(sizeof models / sizeof models[0]);
}

const fg_preset *fg_preset_at(int i)
{
    return i >= 0 && i < fg_preset_count() ? &models[i].preset : NULL;
}

const fg_preset *fg_preset_find(const char *name)
{
    for (int i = 0; i < fg_preset_count(); i++)
        if (!strcmp(models[i].preset.name, name)) return &models[i].preset;
    return NULL;
}

fg_tensor (fg_preset_build)(fg_loc at, const char *name, fg_tensor tokens)
{
    for (int i = 0; i < fg_preset_count(); i++)
        if (!strcmp(models[i].preset.name, name))
            return models[i].build(at, tokens, &models[i].size);
    return (fg_fail)(at, tokens, FG_ERR_USAGE, "there is no preset \"%s\"", name);
}

#ifndef FG_LIBRARY                       /* fox-graph run catalog.c --set preset=fox-pro-360m */
#include <fox_graph.h>
fg_tensor fg_model(fg_tensor tokens)
{
    return fg_preset_build(fg_setting_text(tokens.graph, "preset", "fox-pro-125m"), tokens);
}
#endif
