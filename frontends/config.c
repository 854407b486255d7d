/* config.c - config.json of the official checkpoints: read into a model's configuration, written
 * from the facts of a graph.
 *
 * Keys and defaults: Lin et al. 2025, the official code's configuration classes.  What the model
 * code there ignores (window_size of FoX, elementwise_affine, fuse_norm, token ids) is ignored
 * here; what it would refuse or silently get wrong is refused. */
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fox_train.h"
#include "text_file.h"

enum { MAX_SIZE = 1 << 24, MAX_LAYERS = 4096, MAX_HEADS = 1 << 16 };

/* Takes values from an object; after the first fault every value is its default. */
typedef struct {
    const char *path;
    const fg_json_value *root;
    fg_status status;
    char *message;
} reader;

static void print_value(const fg_json_value *v, char *text, size_t room)
{
    static const char *const words[] = { "null", "false", "true" };
    if (!v)
        snprintf(text, room, "missing");
    else if (v->kind == FG_JSON_WHOLE)
        snprintf(text, room, "%" PRId64, v->u.whole);
    else if (v->kind == FG_JSON_REAL && isfinite(v->u.real))
        snprintf(text, room, "%.9g", v->u.real);
    else if (v->kind == FG_JSON_REAL)
        snprintf(text, room, "%s", isnan(v->u.real) ? "NaN" : v->u.real > 0 ? "Infinity"
                                                                          : "-Infinity");
    else if (v->kind == FG_JSON_TEXT)
        snprintf(text, room, "\"%.60s\"", v->u.text);
    else
        snprintf(text, room, "%s", v->kind == FG_JSON_LIST ? "a list" :
                 v->kind == FG_JSON_OBJECT ? "an object" : words[v->kind]);
}

static FG_PRINTF(3, 4) void bad(reader *r, const char *key, const char *fmt, ...)
{
    char rule[200], value[100];
    va_list args;
    if (r->status)
        return;
    va_start(args, fmt);
    vsnprintf(rule, sizeof rule, fmt, args);
    va_end(args);
    print_value(fg_json_get(r->root, key), value, sizeof value);
    r->status = fg__refuse(r->message, FG_ERR_FORMAT, r->path, "%s is %s%s", key, value, rule);
}

/* NULL: use the default. */
static const fg_json_value *value_of(const reader *r, const char *key)
{
    return r->status ? NULL : fg_json_get(r->root, key);
}

static bool is_null(const reader *r, const char *key)
{
    const fg_json_value *v = value_of(r, key);
    return v && v->kind == FG_JSON_NULL;
}

static int64_t whole(reader *r, const char *key, int64_t otherwise, int64_t max)
{
    const fg_json_value *v = value_of(r, key);
    if (!v)
        return otherwise;
    if (v->kind == FG_JSON_WHOLE && v->u.whole >= 1 && v->u.whole <= max)
        return v->u.whole;
    bad(r, key, ", must be an integer from 1 to %" PRId64, max);
    return otherwise;
}

static int64_t whole_or_null(reader *r, const char *key, int64_t max)
{
    return is_null(r, key) ? 0 : whole(r, key, 0, max);
}

static double real(reader *r, const char *key, double otherwise, double min, double max)
{
    const fg_json_value *v = value_of(r, key);
    double x;
    if (!v)
        return otherwise;
    if (fg_json_number(v, &x) && x >= min && x <= max)
        return x;
    bad(r, key, ", must be a number from %g to %g", min, max);
    return otherwise;
}

static double real_or_null(reader *r, const char *key, double otherwise, double min, double max)
{
    return is_null(r, key) ? otherwise : real(r, key, otherwise, min, max);
}

static bool truth(reader *r, const char *key, bool otherwise)
{
    const fg_json_value *v = value_of(r, key);
    if (!v)
        return otherwise;
    if (v->kind != FG_JSON_TRUE && v->kind != FG_JSON_FALSE)
        bad(r, key, ", must be true or false");
    return v->kind == FG_JSON_TRUE;
}

/* Index of the text among choices, which end with NULL. */
static int choice(reader *r, const char *key, int otherwise, const char *const *choices)
{
    const fg_json_value *v = value_of(r, key);
    char list[100] = "";
    if (!v)
        return otherwise;
    for (int i = 0; choices[i]; i++) {
        if (v->kind == FG_JSON_TEXT && strcmp(v->u.text, choices[i]) == 0)
            return i;
        size_t n = strlen(list);
        snprintf(list + n, sizeof list - n, "%s%s", i ? ", " : "", choices[i]);
    }
    bad(r, key, ", must be one of %s", list);
    return otherwise;
}

static void check_heads(reader *r, int64_t width, int64_t heads, bool rope)
{
    if (width % heads)
        bad(r, "num_heads", ", must divide hidden_size %" PRId64, width);
    else if (rope && width / heads % 2)
        bad(r, "num_heads", " and hidden_size %" PRId64 " give heads of width %" PRId64
            ", must be even for rotary positions", width, width / heads);
}

static const char *const mlp_acts[] = { "swish", "silu", "sigmoid", NULL };
static const char *const gate_acts[] = { "sigmoid", "silu", "swish", NULL };
static const char *const gate_kinds[] = { "full", "bias_only", "fixed", "none", NULL };

/* The gate's initial time constants, which only gates without input have. */
static void read_gate(reader *r, fox_config *c)
{
    static const fg_gate_kind kinds[] = { FG_GATE_FULL, FG_GATE_BIAS_ONLY, FG_GATE_FIXED,
                                          FG_GATE_NONE };
    c->fgate_type = kinds[choice(r, "fgate_type", 0, gate_kinds)];
    bool timed = truth(r, "fgate_bias_init", false);
    double min = real_or_null(r, "decay_time_min", 0, 1e-3, 1e9);
    double max = real_or_null(r, "decay_time_max", 0, 1e-3, 1e9);
    if (c->fgate_type == FG_GATE_FIXED && !timed)
        bad(r, "fgate_bias_init", ", must be true where fgate_type is \"fixed\"");
    if (!timed || c->fgate_type == FG_GATE_FULL || c->fgate_type == FG_GATE_NONE)
        return;
    if (min == 0 || max < min)
        bad(r, min == 0 ? "decay_time_min" : "decay_time_max",
            ", must be a number where fgate_bias_init is true, and not below the minimum");
    c->decay_time_min = min;
    c->decay_time_max = max;
}

static void read_fox(reader *r, fg_config *out)
{
    fox_config *c = &out->u.fox;
    out->family = FG_FAMILY_FOX;
    c->vocab_size = whole(r, "vocab_size", 32000, MAX_SIZE);
    c->hidden_size = whole(r, "hidden_size", 2048, MAX_SIZE);
    c->num_hidden_layers = whole(r, "num_hidden_layers", 24, MAX_LAYERS);
    c->num_heads = whole(r, "num_heads", 32, MAX_HEADS);
    c->intermediate_size = whole_or_null(r, "intermediate_size", MAX_SIZE);
    c->hidden_ratio = real_or_null(r, "hidden_ratio", 4, 1e-3, 1e3);
    c->norm_eps = real(r, "norm_eps", 1e-6, 1e-20, 1);
    c->rope_base = real(r, "rope_base", 500000, 1, 1e15);
    c->initializer_range = real(r, "initializer_range", 0.02, 1e-20, 1e3);
    c->use_rope = truth(r, "use_rope", false);
    c->use_k_shift = truth(r, "use_k_shift", false);
    c->use_v_shift = truth(r, "use_v_shift", false);
    c->qk_norm = truth(r, "qk_norm", false);
    c->qk_norm_share_param_across_head = truth(r, "qk_norm_share_param_across_head", false);
    c->use_output_gate = truth(r, "use_output_gate", false);
    c->use_output_norm = truth(r, "use_output_norm", false);
    c->output_gate_silu = choice(r, "ogate_act", 0, gate_acts) > 0;
    c->mlp_sigmoid = choice(r, "hidden_act", 0, mlp_acts) == 2;
    c->tie_word_embeddings = truth(r, "tie_word_embeddings", false);
    read_gate(r, c);
    real_or_null(r, "log_pruning_tolerance", 0, -1e9, 0);     /* exact attention satisfies any */
    if (value_of(r, "num_kv_heads") && !is_null(r, "num_kv_heads"))
        bad(r, "num_kv_heads", ", must be null: this model has no grouped heads");
    if (c->output_gate_silu && c->use_output_gate && c->use_output_norm)
        bad(r, "ogate_act", ", must be \"sigmoid\" where use_output_norm is true");
    check_heads(r, c->hidden_size, c->num_heads, c->use_rope);
}

static void read_transformer(reader *r, fg_config *out)
{
    transformer_config *c = &out->u.transformer;
    out->family = FG_FAMILY_TRANSFORMER;
    c->vocab_size = whole(r, "vocab_size", 32000, MAX_SIZE);
    c->hidden_size = whole(r, "hidden_size", 2048, MAX_SIZE);
    c->num_hidden_layers = whole(r, "num_hidden_layers", 24, MAX_LAYERS);
    c->num_heads = whole(r, "num_heads", 32, MAX_HEADS);
    c->num_kv_heads = whole_or_null(r, "num_kv_heads", MAX_HEADS);
    c->intermediate_size = whole_or_null(r, "intermediate_size", MAX_SIZE);
    c->window_size = whole_or_null(r, "window_size", INT32_MAX);
    c->hidden_ratio = real_or_null(r, "hidden_ratio", 4, 1e-3, 1e3);
    c->norm_eps = real(r, "norm_eps", 1e-6, 1e-20, 1);
    c->rope_base = real(r, "rope_base", 500000, 1, 1e15);
    c->initializer_range = real(r, "initializer_range", 0.02, 1e-20, 1e3);
    c->no_rope = !truth(r, "use_rope", true);
    c->mlp_sigmoid = choice(r, "hidden_act", 0, mlp_acts) == 2;
    c->tie_word_embeddings = truth(r, "tie_word_embeddings", false);
    if (truth(r, "attention_bias", false))
        bad(r, "attention_bias", ", must be false: these projections have no bias");
    if (truth(r, "qk_norm", false))
        bad(r, "qk_norm", ", must be false: only forgetting_transformer has it");
    check_heads(r, c->hidden_size, c->num_heads, !c->no_rope);
    if (c->num_kv_heads && c->num_heads % c->num_kv_heads)
        bad(r, "num_kv_heads", ", must divide num_heads %" PRId64, c->num_heads);
}

/* A key that may have one value only. */
static void only_text(reader *r, const char *key, const char *text)
{
    const char *const choices[] = { text, NULL };
    choice(r, key, 0, choices);
}
static void only_truth(reader *r, const char *key, bool value)
{
    if (truth(r, key, value) != value)
        bad(r, key, ", must be %s: nothing else is known here", value ? "true" : "false");
}

static const char *const swish[] = { "swish", "silu", NULL };

/* The release's code stores lower_bounds and ignores it, and has a suffix in its model_type; code
 * that applies it has none. */
static void read_hgrn2(reader *r, fg_config *out)
{
    hgrn2_config *c = &out->u.hgrn2;
    const fg_json_value *type = value_of(r, "model_type");
    out->family = FG_FAMILY_HGRN2;
    c->vocab_size = whole(r, "vocab_size", 32000, MAX_SIZE);
    c->hidden_size = whole(r, "hidden_size", 2048, MAX_SIZE);
    c->num_hidden_layers = whole(r, "num_hidden_layers", 24, MAX_LAYERS);
    c->num_heads = whole_or_null(r, "num_heads", MAX_HEADS);
    c->expand_ratio = whole(r, "expand_ratio", 128, MAX_SIZE);
    c->intermediate_size = whole_or_null(r, "intermediate_size", MAX_SIZE);
    c->hidden_ratio = real_or_null(r, "hidden_ratio", 4, 1e-3, 1e3);
    c->norm_eps = real(r, "norm_eps", 1e-6, 1e-20, 1);
    c->initializer_range = real(r, "initializer_range", 0.02, 1e-20, 1e3);
    c->tie_word_embeddings = truth(r, "tie_word_embeddings", false);
    c->lower_bound = type && strchr(type->u.text, '-') ? HGRN2_BOUNDS_STORED : HGRN2_BOUNDS_APPLIED;
    if (!truth(r, "use_lower_bound", true)) c->lower_bound = HGRN2_NO_BOUNDS;
    only_truth(r, "use_short_conv", false);
    choice(r, "hidden_act", 0, swish);
    const int64_t heads = c->num_heads ? c->num_heads : c->hidden_size / c->expand_ratio;
    if (!c->num_heads && c->hidden_size % c->expand_ratio)
        bad(r, "expand_ratio", ", must divide hidden_size %" PRId64, c->hidden_size);
    else if (c->hidden_size % heads)
        bad(r, "num_heads", ", must divide hidden_size %" PRId64, c->hidden_size);
    else if (c->lower_bound != HGRN2_NO_BOUNDS && heads * c->expand_ratio != c->hidden_size)
        bad(r, "expand_ratio", ", must be hidden_size / num_heads = %" PRId64 " / %" PRId64,
            c->hidden_size, heads);
}

static void read_delta_net(reader *r, fg_config *out)
{
    delta_net_config *c = &out->u.delta_net;
    out->family = FG_FAMILY_DELTA_NET;
    c->vocab_size = whole(r, "vocab_size", 32000, MAX_SIZE);
    c->hidden_size = whole(r, "hidden_size", 2048, MAX_SIZE);
    c->num_hidden_layers = whole(r, "num_hidden_layers", 24, MAX_LAYERS);
    c->num_heads = whole(r, "num_heads", 16, MAX_HEADS);
    c->conv_size = whole(r, "conv_size", 4, 8);
    c->intermediate_size = whole_or_null(r, "intermediate_size", MAX_SIZE);
    c->hidden_ratio = real_or_null(r, "hidden_ratio", 4, 1e-3, 1e3);
    c->norm_eps = real(r, "norm_eps", 1e-6, 1e-20, 1);
    c->initializer_range = real(r, "initializer_range", 0.02, 1e-20, 1e3);
    c->tie_word_embeddings = truth(r, "tie_word_embeddings", false);
    real(r, "expand_k", 1, 1, 1);
    real(r, "expand_v", 1, 1, 1);
    only_truth(r, "use_gate", false);
    only_truth(r, "use_short_conv", true);
    only_truth(r, "use_beta", true);
    only_truth(r, "norm_first", false);
    only_text(r, "qk_norm", "l2");
    only_text(r, "qk_activation", "silu");
    choice(r, "hidden_act", 0, swish);
    check_heads(r, c->hidden_size, c->num_heads, false);
}

/* time_step_limit: two numbers, the second may be Infinity: no limit. */
static void read_limits(reader *r, mamba2_config *c)
{
    const char *key = "time_step_limit";
    const fg_json_value *v = value_of(r, key);
    double low = 0, high = INFINITY;
    if (!v || v->kind == FG_JSON_NULL)
        return;
    if (v->kind != FG_JSON_LIST || v->n != 2 || !fg_json_number(v->first, &low) ||
        !fg_json_number(v->first->next, &high) || !(low >= 0 && isfinite(low) && high > low)) {
        bad(r, key, ", must be two numbers, 0 or above, the second greater");
        return;
    }
    c->time_step_low = low + 0.0;        /* -0 too */
    c->time_step_high = isinf(high) ? 0 : high;
}

static void read_mamba2(reader *r, fg_config *out)
{
    static const char *const acts[] = { "silu", "swish", NULL };
    mamba2_config *c = &out->u.mamba2;
    out->family = FG_FAMILY_MAMBA2;
    c->vocab_size = whole(r, "vocab_size", 32000, MAX_SIZE);
    c->hidden_size = whole(r, "hidden_size", 2048, MAX_SIZE);
    c->num_hidden_layers = whole(r, "num_hidden_layers", 48, MAX_LAYERS);
    c->num_heads = whole(r, "num_heads", 64, MAX_HEADS);
    c->head_dim = whole(r, "head_dim", 64, MAX_SIZE);
    c->state_size = whole(r, "state_size", 64, MAX_SIZE);
    c->expand = whole(r, "expand", 2, 64);
    c->conv_kernel = whole(r, "conv_kernel", 4, 8);
    c->n_groups = whole(r, "n_groups", 8, MAX_HEADS);
    c->layer_norm_epsilon = real(r, "layer_norm_epsilon", 1e-5, 1e-20, 1);
    c->initializer_range = real(r, "initializer_range", 0.1, 1e-20, 1e3);
    c->time_step_min = real(r, "time_step_min", 0.001, 1e-12, 1e6);
    c->time_step_max = real(r, "time_step_max", 0.1, 1e-12, 1e6);
    c->time_step_floor = real(r, "time_step_floor", 1e-4, 1e-12, 1e6);
    c->no_conv_bias = !truth(r, "use_conv_bias", true);
    c->tie_word_embeddings = truth(r, "tie_word_embeddings", false);
    read_limits(r, c);
    choice(r, "hidden_act", 0, acts);
    if (truth(r, "use_bias", false))
        bad(r, "use_bias", ", must be false: these projections have no bias");
    if (!truth(r, "rms_norm", true))
        bad(r, "rms_norm", ", must be true: this model has no other norm");
    if (c->num_heads * c->head_dim != c->expand * c->hidden_size)
        bad(r, "num_heads", ", must be expand * hidden_size / head_dim = %" PRId64 " * %" PRId64
            " / %" PRId64, c->expand, c->hidden_size, c->head_dim);
    if (c->num_heads % c->n_groups)
        bad(r, "n_groups", ", must divide num_heads %" PRId64, c->num_heads);
}

/* model_type without the official code's suffix; architectures; how to read it. */
static const struct {
    const char *type, *architecture;
    void (*read)(reader *r, fg_config *out);
} families[] = {
    { "forgetting_transformer", "ForgettingTransformerForCausalLM", read_fox },
    { "transformer", "TransformerForCausalLM", read_transformer },
    { "hgrn2", "HGRN2ForCausalLM", read_hgrn2 },
    { "delta_net", "DeltaNetForCausalLM", read_delta_net },
    { "mamba2", "Mamba2ForCausalLM", read_mamba2 },
};
enum { FAMILIES = sizeof families / sizeof families[0] };

static int family_of(const char *type)
{
    static const char suffix[] = "-project_fox";
    size_t n = strlen(type), end = sizeof suffix - 1;
    if (n > end && strcmp(type + n - end, suffix) == 0)
        n -= end;
    for (int i = 0; i < FAMILIES; i++)
        if (strlen(families[i].type) == n && strncmp(families[i].type, type, n) == 0)
            return i;
    return -1;
}

fg_status fg_config_read(const char *path, fg_config *out, char message[400])
{
    fg_json *json;
    memset(out, 0, sizeof *out);         /* padding too: equal configs are equal bytes */
    message[0] = '\0';
    fg_status s = fg__json_read(path, &json, message);
    if (s)
        return s;
    reader r = { path, fg_json_root(json), FG_OK, message };
    const fg_json_value *type = fg_json_get(r.root, "model_type");
    int family = type && type->kind == FG_JSON_TEXT ? family_of(type->u.text) : -1;
    if (family >= 0)
        families[family].read(&r, out);
    else {
        char known[200] = "";
        for (int i = 0; i < FAMILIES; i++) {
            size_t n = strlen(known);
            snprintf(known + n, sizeof known - n, "%s%s", i ? ", " : "", families[i].type);
        }
        bad(&r, "model_type", ", known are %s", known);
    }
    fg_json_free(json);
    return r.status;
}

fg_status fg_config_fit(fg_config *c, const char *weights, char message[400])
{
    fg_file_entry gain;
    fg_status s;
    message[0] = '\0';
    if (c->family != FG_FAMILY_FOX || !c->u.fox.qk_norm)
        return FG_OK;
    fg_file *f = fg_file_open(weights);
    s = fg_file_status(f);
    if (s)
        snprintf(message, 400, "%s", fg_file_message(f));
    else if (fg_file_find(f, "model.layers.0.attn.q_norm.weight", &gain) && c->u.fox.num_heads > 1)
        c->u.fox.qk_norm_share_param_across_head =
            fg_shape_count(gain.shape) == c->u.fox.hidden_size / c->u.fox.num_heads;
    fg_file_close(f);
    return s;
}

/* The setting lower_bound overrules what model_type says of bounds that are there. */
static fg_tensor build_hgrn2(hgrn2_config c, fg_tensor tokens)
{
    const bool applied = c.lower_bound == HGRN2_BOUNDS_APPLIED;
    if (c.lower_bound != HGRN2_NO_BOUNDS && fg_ok(tokens))
        c.lower_bound = fg_setting_int(tokens.graph, "lower_bound", applied)
                      ? HGRN2_BOUNDS_APPLIED : HGRN2_BOUNDS_STORED;
    return hgrn2_lm(tokens, &c);
}

fg_tensor fg_config_build(const fg_config *c, fg_tensor tokens)
{
    switch (c->family) {
    case FG_FAMILY_FOX:
        return fox_lm(tokens, &c->u.fox);
    case FG_FAMILY_TRANSFORMER:
        return transformer_lm(tokens, &c->u.transformer);
    case FG_FAMILY_HGRN2:
        return build_hgrn2(c->u.hgrn2, tokens);
    case FG_FAMILY_DELTA_NET:
        return delta_net_lm(tokens, &c->u.delta_net);
    case FG_FAMILY_MAMBA2:
        return mamba2_lm(tokens, &c->u.mamba2);
    }
    return fg_fail(tokens, FG_ERR_USAGE, "family %d is unknown", (int)c->family);
}

/* ---- writing --------------------------------------------------------------------------------- */

typedef struct { const char *key, *json; } fact;

static int by_key(const void *a, const void *b)
{
    const fact *x = a, *y = b;
    return strcmp(x->key, y->key);
}

/* A fact goes out as it came, so its text must be one JSON value and its key need no escapes. */
static fg_status check_fact(const char *path, const fact *f, char message[400])
{
    fg_json *j;
    fg__text text = { 0 };
    for (const char *p = f->key; *p; p++)
        if ((unsigned char)*p < 32 || *p == '"' || *p == '\\' || *p == 127)
            return fg__refuse(message, FG_ERR_USAGE, path, "fact %.60s: key needs escapes", f->key);
    fg__text_add(&text, "{\"%s\":%s}", f->key, f->json);
    if (text.failed)
        return fg__refuse(message, FG_ERR_MEMORY, path, "no memory for fact %.60s", f->key);
    fg_status s = fg__json_parse(path, text.text, text.n, &j, message);
    bool single = !s && fg_json_root(j)->n == 1;
    free(text.text);
    fg_json_free(j);
    if (s == FG_ERR_MEMORY)
        return s;
    return single ? FG_OK : fg__refuse(message, FG_ERR_USAGE, path,
                                       "fact %.60s: %.100s is not JSON", f->key, f->json);
}

static const char *fact_of(const fact *facts, int n, const char *key)
{
    for (int i = 0; i < n; i++)
        if (strcmp(facts[i].key, key) == 0)
            return facts[i].json;
    return NULL;
}

/* The facts of g and up to two that transformers wants besides; returns how many. */
static int gather(const fg_graph *g, fact *facts, char *architectures, size_t room)
{
    char type[100] = "";
    int n = 0;
    while (fg_graph_fact_at(g, n, &facts[n].key, &facts[n].json))
        n++;
    const char *json = fact_of(facts, n, "model_type");
    if (json && sscanf(json, "\"%99[^\"]\"", type) == 1 && !fact_of(facts, n, "architectures")) {
        int family = family_of(type);
        snprintf(architectures, room, "[\"%s\"]",
                 family < 0 ? type : families[family].architecture);
        facts[n++] = (fact){ "architectures", architectures };
    }
    if (!fact_of(facts, n, "torch_dtype"))
        facts[n++] = (fact){ "torch_dtype", "\"float32\"" };
    qsort(facts, (size_t)n, sizeof *facts, by_key);
    return n;
}

static fg_status print_facts(const char *path, int n, const fact *facts, char message[400])
{
    fg__text text = { 0 };
    fg_status s = FG_OK;
    fg__text_add(&text, "{\n");
    for (int i = 0; !s && i < n; i++) {
        s = check_fact(path, &facts[i], message);
        fg__text_add(&text, "  \"%s\": %s%s\n", facts[i].key, facts[i].json, i < n - 1 ? "," : "");
    }
    fg__text_add(&text, "}\n");
    if (!s && text.failed)
        s = fg__refuse(message, FG_ERR_MEMORY, path, "no memory for %d facts", n);
    if (!s)
        s = fg__text_replace(path, text.text, text.n, message);
    free(text.text);
    return s;
}

fg_status fg_config_write(const char *path, const fg_graph *g, char message[400])
{
    char architectures[120];
    const char *key, *json;
    size_t n = 0;
    message[0] = '\0';
    while (fg_graph_fact_at(g, (int)n, &key, &json))
        n++;
    fact *facts = calloc(n + 3, sizeof *facts);
    if (!facts)
        return fg__refuse(message, FG_ERR_MEMORY, path, "no memory for %zu facts", n);
    fg_status s = print_facts(path, gather(g, facts, architectures, sizeof architectures), facts,
                              message);
    free(facts);
    return s;
}
