/* facts.c - the models' configurations: their defaults, and the facts that become a config.json.
 *
 * A table ties each key to a field of the struct.  Keys, value types and defaults are those of the
 * config.json files of the FoX release. */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "fox_models.h"

fox_config fox_llama_config(int64_t vocab, int64_t width, int64_t layers, int64_t heads)
{
    return (fox_config){ .vocab_size = vocab, .hidden_size = width, .num_hidden_layers = layers,
        .num_heads = heads, .hidden_ratio = 4, .norm_eps = 1e-6, .rope_base = 500000,
        .initializer_range = 0.02, .fgate_type = FG_GATE_FULL };
}

fox_config fox_pro_config(int64_t vocab, int64_t width, int64_t layers, int64_t heads)
{
    fox_config c = fox_llama_config(vocab, width, layers, heads);
    c.hidden_ratio = 3.5;
    c.use_k_shift = c.use_v_shift = c.qk_norm = c.use_output_gate = c.use_output_norm = true;
    return c;
}

fox_config transformer_pro_config(int64_t vocab, int64_t width, int64_t layers, int64_t heads)
{
    fox_config c = fox_pro_config(vocab, width, layers, heads);
    c.fgate_type = FG_GATE_NONE;
    c.use_rope = true;
    return c;
}

transformer_config transformer_llama_config(int64_t vocab, int64_t width, int64_t layers,
                                            int64_t heads)
{
    return (transformer_config){ .vocab_size = vocab, .hidden_size = width,
        .num_hidden_layers = layers, .num_heads = heads, .hidden_ratio = 4, .norm_eps = 1e-6,
        .rope_base = 500000, .initializer_range = 0.02 };
}

hgrn2_config hgrn2_lm_config(int64_t vocab, int64_t width, int64_t layers, int64_t expand)
{
    return (hgrn2_config){ .vocab_size = vocab, .hidden_size = width, .num_hidden_layers = layers,
        .expand_ratio = expand, .hidden_ratio = 4, .norm_eps = 1e-6, .initializer_range = 0.02 };
}

delta_net_config delta_net_lm_config(int64_t vocab, int64_t width, int64_t layers, int64_t heads)
{
    return (delta_net_config){ .vocab_size = vocab, .hidden_size = width,
        .num_hidden_layers = layers, .num_heads = heads, .conv_size = 4, .hidden_ratio = 4,
        .norm_eps = 1e-6, .initializer_range = 0.02 };
}

mamba2_config mamba2_lm_config(int64_t vocab, int64_t width, int64_t layers, int64_t heads)
{
    return (mamba2_config){ .vocab_size = vocab, .hidden_size = width, .num_hidden_layers = layers,
        .num_heads = heads, .head_dim = heads > 0 ? 2 * width / heads : 0, .state_size = 128,
        .expand = 2, .conv_kernel = 4, .n_groups = 1, .layer_norm_epsilon = 1e-5,
        .initializer_range = 0.02, .time_step_min = 0.001, .time_step_max = 0.1,
        .time_step_floor = 1e-4 };
}

mamba2_config mamba2_defaults(const mamba2_config *c)
{
    mamba2_config d = *c;
    if (d.head_dim <= 0) d.head_dim = 64;
    if (d.state_size <= 0) d.state_size = 64;
    if (d.expand <= 0) d.expand = 2;
    if (d.conv_kernel <= 0) d.conv_kernel = 4;
    if (d.n_groups <= 0) d.n_groups = 1;
    if (d.layer_norm_epsilon <= 0) d.layer_norm_epsilon = 1e-5;
    if (d.initializer_range <= 0) d.initializer_range = 0.1;
    if (d.time_step_min <= 0) d.time_step_min = 0.001;
    if (d.time_step_max <= 0) d.time_step_max = 0.1;
    if (d.time_step_floor <= 0) d.time_step_floor = 1e-4;
    return d;
}

/* COUNT: int64_t, unset at 0.  REAL: double, unset at 0.  FLAG: bool, GATE: fg_gate_kind: written
 * as words[value].  FIXED: always `unset`; the model has no such thing.  unset: JSON text of
 * a field that is 0, the default of the official class. */
typedef enum { COUNT, REAL, FLAG, GATE, FIXED } kind;
typedef struct {
    const char *key, *unset;
    kind kind;
    size_t at;
    const char *const *words;
} field;

static const char *const yes[] = { "false", "true" }, *const no[] = { "true", "false" };
static const char *const acts[] = { "\"swish\"", "\"sigmoid\"" };
static const char *const gate_acts[] = { "\"sigmoid\"", "\"silu\"" };
static const char *const gates[] = { "\"full\"", "\"bias_only\"", "\"fixed\"", "\"none\"" };

/* What all of these have, but for Mamba-2 */
#define COMMON_FIELDS(C)                                                                    \
    { "vocab_size",           "32000",    COUNT, offsetof(C, vocab_size),        NULL },    \
    { "hidden_size",          "2048",     COUNT, offsetof(C, hidden_size),       NULL },    \
    { "num_hidden_layers",    "24",       COUNT, offsetof(C, num_hidden_layers), NULL },    \
    { "hidden_ratio",         "4",        REAL,  offsetof(C, hidden_ratio),      NULL },    \
    { "intermediate_size",    "null",     COUNT, offsetof(C, intermediate_size), NULL },    \
    { "norm_eps",             "1e-06",    REAL,  offsetof(C, norm_eps),          NULL },    \
    { "initializer_range",    "0.02",     REAL,  offsetof(C, initializer_range), NULL },    \
    { "tie_word_embeddings",  "false",    FLAG,  offsetof(C, tie_word_embeddings), yes },   \
    { "fuse_cross_entropy",   "true",     FIXED, 0, NULL },                                 \
    { "use_cache",            "true",     FIXED, 0, NULL },                                 \
    { "bos_token_id",         "null",     FIXED, 0, NULL },                                 \
    { "eos_token_id",         "null",     FIXED, 0, NULL },                                 \
    { "pad_token_id",         "null",     FIXED, 0, NULL },                                 \
    { "torch_dtype",          "\"float32\"", FIXED, 0, NULL }

#define ATTENTION_FIELDS(C)                                                                 \
    COMMON_FIELDS(C),                                                                       \
    { "num_heads",            "32",       COUNT, offsetof(C, num_heads),         NULL },    \
    { "rope_base",            "500000.0", REAL,  offsetof(C, rope_base),         NULL },    \
    { "hidden_act",           "\"swish\"", FLAG, offsetof(C, mlp_sigmoid),       acts },    \
    { "max_position_embeddings", "null",  FIXED, 0, NULL },                                 \
    { "elementwise_affine",   "true",     FIXED, 0, NULL },                                 \
    { "attention_bias",       "false",    FIXED, 0, NULL },                                 \
    { "fuse_norm",            "true",     FIXED, 0, NULL }

static const field fox_fields[] = {
    { "model_type", "\"forgetting_transformer-project_fox\"", FIXED, 0, NULL },
    { "architectures", "[\"ForgettingTransformerForCausalLM\"]", FIXED, 0, NULL },
    ATTENTION_FIELDS(fox_config),
    { "num_kv_heads", "null", FIXED, 0, NULL },
    { "window_size", "null", FIXED, 0, NULL },
    { "log_pruning_tolerance", "null", FIXED, 0, NULL },
    { "fgate_type", "\"full\"", GATE, offsetof(fox_config, fgate_type), gates },
    { "decay_time_min", "null", REAL, offsetof(fox_config, decay_time_min), NULL },
    { "decay_time_max", "null", REAL, offsetof(fox_config, decay_time_max), NULL },
    { "use_rope", "false", FLAG, offsetof(fox_config, use_rope), yes },
    { "use_k_shift", "false", FLAG, offsetof(fox_config, use_k_shift), yes },
    { "use_v_shift", "false", FLAG, offsetof(fox_config, use_v_shift), yes },
    { "qk_norm", "false", FLAG, offsetof(fox_config, qk_norm), yes },
    { "qk_norm_share_param_across_head", "false", FLAG,
      offsetof(fox_config, qk_norm_share_param_across_head), yes },
    { "use_output_gate", "false", FLAG, offsetof(fox_config, use_output_gate), yes },
    { "use_output_norm", "false", FLAG, offsetof(fox_config, use_output_norm), yes },
    { "ogate_act", "\"sigmoid\"", FLAG, offsetof(fox_config, output_gate_silu), gate_acts },
    { NULL, NULL, FIXED, 0, NULL }
};

static const field transformer_fields[] = {
    { "model_type", "\"transformer-project_fox\"", FIXED, 0, NULL },
    { "architectures", "[\"TransformerForCausalLM\"]", FIXED, 0, NULL },
    ATTENTION_FIELDS(transformer_config),
    { "num_kv_heads", "null", COUNT, offsetof(transformer_config, num_kv_heads), NULL },
    { "window_size", "null", COUNT, offsetof(transformer_config, window_size), NULL },
    { "use_rope", "true", FLAG, offsetof(transformer_config, no_rope), no },
    { NULL, NULL, FIXED, 0, NULL }
};

#define LINEAR_FIELDS(C)                                                                    \
    COMMON_FIELDS(C),                                                                       \
    { "hidden_act",           "\"swish\"", FIXED, 0, NULL },                                \
    { "attn_mode",            "\"chunk\"", FIXED, 0, NULL },                                \
    { "max_position_embeddings", "2048",  FIXED, 0, NULL }

/* model_type tells whether the lower bounds count: see hgrn2_config_record. */
static const field hgrn2_fields[] = {
    { "architectures", "[\"HGRN2ForCausalLM\"]", FIXED, 0, NULL },
    LINEAR_FIELDS(hgrn2_config),
    { "num_heads", "null", COUNT, offsetof(hgrn2_config, num_heads), NULL },
    { "expand_ratio", "128", COUNT, offsetof(hgrn2_config, expand_ratio), NULL },
    { "use_short_conv", "false", FIXED, 0, NULL },
    { "conv_size", "4", FIXED, 0, NULL },
    { "elementwise_affine", "true", FIXED, 0, NULL },
    { NULL, NULL, FIXED, 0, NULL }
};

static const field delta_net_fields[] = {
    { "model_type", "\"delta_net-project_fox\"", FIXED, 0, NULL },
    { "architectures", "[\"DeltaNetForCausalLM\"]", FIXED, 0, NULL },
    LINEAR_FIELDS(delta_net_config),
    { "num_heads", "16", COUNT, offsetof(delta_net_config, num_heads), NULL },
    { "conv_size", "4", COUNT, offsetof(delta_net_config, conv_size), NULL },
    { "expand_k", "1", FIXED, 0, NULL },
    { "expand_v", "1", FIXED, 0, NULL },
    { "use_gate", "false", FIXED, 0, NULL },
    { "use_short_conv", "true", FIXED, 0, NULL },
    { "use_beta", "true", FIXED, 0, NULL },
    { "use_output_norm", "true", FIXED, 0, NULL },
    { "norm_first", "false", FIXED, 0, NULL },
    { "qk_norm", "\"l2\"", FIXED, 0, NULL },
    { "qk_activation", "\"silu\"", FIXED, 0, NULL },
    { NULL, NULL, FIXED, 0, NULL }
};

static const field mamba2_fields[] = {
    { "model_type", "\"mamba2-project_fox\"", FIXED, 0, NULL },
    { "architectures", "[\"Mamba2ForCausalLM\"]", FIXED, 0, NULL },
#define COUNTED(name, unset) { #name, unset, COUNT, offsetof(mamba2_config, name), NULL }
#define MEASURED(name, unset) { #name, unset, REAL, offsetof(mamba2_config, name), NULL }
    COUNTED(vocab_size, "32000"),
    COUNTED(hidden_size, "2048"),
    COUNTED(num_hidden_layers, "48"),
    COUNTED(num_heads, "64"),
    COUNTED(head_dim, "64"),
    COUNTED(state_size, "64"),
    COUNTED(expand, "2"),
    COUNTED(conv_kernel, "4"),
    COUNTED(n_groups, "1"),
    MEASURED(layer_norm_epsilon, "1e-05"),
    MEASURED(initializer_range, "0.1"),
    MEASURED(time_step_min, "0.001"),
    MEASURED(time_step_max, "0.1"),
    MEASURED(time_step_floor, "0.0001"),
#undef COUNTED
#undef MEASURED
    { "use_conv_bias", "true", FLAG, offsetof(mamba2_config, no_conv_bias), no },
    { "tie_word_embeddings", "false", FLAG, offsetof(mamba2_config, tie_word_embeddings), yes },
    { "hidden_act", "\"silu\"", FIXED, 0, NULL },
    { "use_bias", "false", FIXED, 0, NULL },
    { "rms_norm", "true", FIXED, 0, NULL },
    { "residual_in_fp32", "true", FIXED, 0, NULL },
    { "rescale_prenorm_residual", "true", FIXED, 0, NULL },
    { "chunk_size", "256", FIXED, 0, NULL },
    { "fuse_cross_entropy", "true", FIXED, 0, NULL },
    { "use_cache", "true", FIXED, 0, NULL },
    { "bos_token_id", "null", FIXED, 0, NULL },
    { "eos_token_id", "null", FIXED, 0, NULL },
    { "pad_token_id", "null", FIXED, 0, NULL },
    { "torch_dtype", "\"float32\"", FIXED, 0, NULL },
    { NULL, NULL, FIXED, 0, NULL }
};

/* A short text that reads back as v. */
static void real_text(char text[32], double v)
{
    int digits = 6;
    do snprintf(text, 32, "%.*g", digits, v);
    while (strtod(text, NULL) != v && digits++ < 17);
    if (!strpbrk(text, ".e") && v >= 10) strcat(text, ".0");
}

static void record(fg_graph *g, const field *f, const void *config)
{
    for (; f->key; f++) {
        const char *at = (const char *)config + f->at, *json = f->unset;
        char text[32];
        if (f->kind == COUNT && *(const int64_t *)at > 0) {
            snprintf(text, sizeof text, "%lld", (long long)*(const int64_t *)at);
            json = text;
        } else if (f->kind == REAL && *(const double *)at > 0) {
            real_text(text, *(const double *)at);
            json = text;
        } else if (f->kind == FLAG) {
            json = f->words[*(const bool *)at];
        } else if (f->kind == GATE) {
            json = f->words[*(const fg_gate_kind *)at];
        }
        (void)fg_graph_set_fact(g, f->key, json);
    }
}

void fox_config_record(fg_graph *g, const fox_config *c)
{
    record(g, fox_fields, c);
    (void)fg_graph_set_fact(g, "fgate_bias_init", yes[c->decay_time_min > 0]);
}

void transformer_config_record(fg_graph *g, const transformer_config *c)
{
    record(g, transformer_fields, c);
}

/* "hgrn2" is what code that applies the bounds calls itself. */
void hgrn2_config_record(fg_graph *g, const hgrn2_config *c)
{
    const bool applied = c->lower_bound == HGRN2_BOUNDS_APPLIED;
    record(g, hgrn2_fields, c);
    (void)fg_graph_set_fact(g, "model_type", applied ? "\"hgrn2\"" : "\"hgrn2-project_fox\"");
    (void)fg_graph_set_fact(g, "use_lower_bound", yes[c->lower_bound != HGRN2_NO_BOUNDS]);
}

void delta_net_config_record(fg_graph *g, const delta_net_config *c)
{
    record(g, delta_net_fields, c);
}

void mamba2_config_record(fg_graph *g, const mamba2_config *c)
{
    char low[32] = "0.0", high[32] = "Infinity", text[80];
    record(g, mamba2_fields, c);
    if (c->time_step_low > 0) real_text(low, c->time_step_low);
    if (c->time_step_high > 0) real_text(high, c->time_step_high);
    snprintf(text, sizeof text, "[%s, %s]", low, high);
    (void)fg_graph_set_fact(g, "time_step_limit", text);
    snprintf(text, sizeof text, "%lld", (long long)(c->hidden_size + 15) / 16);
    (void)fg_graph_set_fact(g, "time_step_rank", text);
}
