/* test_models.c - the families against the official checkpoints: names, shapes, sizes, logits, loss
 * and gradients; what the models record about themselves. */
#include <criterion/criterion.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "fox_graph.h"

fg_tensor ops_model(fg_tensor tokens);
#define fg_model ops_model
#include "../models/examples/fox_llama_ops.c"
#undef fg_model

/* ---- presets -------------------------------------------------------------------------------- */

static int64_t parameters(fg_graph *g)
{
    int64_t n = 0;
    fg_param_info p;
    for (int i = 0; fg_param_at(g, i, &p); i++) n += fg_shape_count(p.shape);
    return n;
}

static int64_t preset_parameters(const char *name, bool shared)
{
    fg_graph *g = fg_graph_new();
    if (shared) fg_graph_set(g, "qk_norm_share_param_across_head", "1");
    fg_tensor tokens = fg_input(g, "tokens", FG_I32, FG_DIMS(1, 4));
    fg_tensor logits = fg_preset_build(name, tokens);
    cr_assert_eq(fg_graph_status(g), FG_OK, "%s: %s", name, fg_graph_message(g));
    cr_assert(fg_shape_equal(fg_shape_of(logits), FG_DIMS(1, 4, 50257)), "%s", name);
    const int64_t n = parameters(g);
    fg_graph_free(g);
    return n;
}

Test(models, presets_have_as_many_parameters_as_the_official_models)
{
    static const struct { const char *name; int64_t each, shared; } expected[] = {
        { "fox-llama-125m", 162259344, 0 },
        { "fox-llama-360m", 411651456, 0 },
        { "fox-llama-760m", 834827328, 0 },
        { "fox-pro-125m", 162508176, 162491280 },
        { "fox-pro-360m", 418803072, 418756992 },
        { "fox-pro-760m", 836707392, 836636736 },
        { "transformer-llama-125m", 162148608, 0 },
        { "transformer-llama-360m", 411257856, 0 },
        { "transformer-llama-760m", 833942016, 0 },
        { "transformer-pro-125m", 162397440, 162380544 },
        { "transformer-pro-360m", 418409472, 418363392 },
        { "transformer-pro-760m", 834937344, 834869760 },
        { "mamba2-125m", 167563200, 0 },
        { "mamba2-360m", 419778048, 0 },
        { "mamba2-760m", 857308416, 0 },
        { "transformer-swa-760m", 833942016, 0 },
        { "hgrn2-125m", 162167040, 0 },
        { "hgrn2-360m", 411307008, 0 },
        { "hgrn2-760m", 834015744, 0 },
        { "delta-net-125m", 162316032, 0 },
        { "delta-net-360m", 411752448, 0 },
        { "delta-net-760m", 834829824, 0 },
    };
    const int n = (int)(sizeof expected / sizeof expected[0]);
    cr_expect_eq(fg_preset_count(), n);
    for (int i = 0; i < n; i++) {
        const char *name = expected[i].name;
        cr_expect_not_null(fg_preset_find(name), "%s", name);
        cr_expect_eq(preset_parameters(name, false), expected[i].each, "%s", name);
        if (expected[i].shared)
            cr_expect_eq(preset_parameters(name, true), expected[i].shared, "%s, shared", name);
    }
}

Test(models, presets_carry_the_budgets_of_the_paper)
{
    const fg_preset *p = fg_preset_find("fox-pro-360m");
    cr_assert_not_null(p);
    cr_expect_str_eq(p->family, "fox_pro");
    cr_expect_eq(p->tokens, (int64_t)14336 * 524288);
    cr_expect_eq(p->lr, 2e-3);
    for (int i = 0; i < fg_preset_count(); i++) {
        p = fg_preset_at(i);
        cr_expect_eq(p->batch * p->context, 524288, "%s", p->name);
        cr_expect_eq(p->tokens % (p->batch * p->context), 0, "%s", p->name);
        cr_expect_eq(fg_preset_find(p->name), p);
    }
    cr_expect_null(fg_preset_at(fg_preset_count()));
    cr_expect_null(fg_preset_find("fox-pro"));
}

/* ---- against the official code --------------------------------------------------------------- */

enum { B = 2, T = 77, V = 97 };

static fg_tensor build(const char *family, fg_tensor tokens, bool recompute)
{
    fox_config c = { 0 };
    if (!strcmp(family, "mamba2")) {
        mamba2_config m = mamba2_lm_config(V, 64, 2, 4);
        m.state_size = 16;
        m.initializer_range = 0.1;
        m.recompute = recompute;
        return mamba2_lm(tokens, &m);
    }
    if (!strcmp(family, "fox_llama")) c = fox_llama_config(V, 64, 2, 2);
    if (!strcmp(family, "fox_pro")) c = fox_pro_config(V, 64, 2, 4);
    if (!strcmp(family, "transformer_pro")) c = transformer_pro_config(V, 64, 2, 2);
    c.recompute = recompute;
    if (c.num_heads) return fox_lm(tokens, &c);
    if (!strncmp(family, "hgrn2", 5)) {
        hgrn2_config hgrn2 = hgrn2_lm_config(V, 64, 3, 16);
        if (!strcmp(family, "hgrn2")) hgrn2.lower_bound = HGRN2_BOUNDS_STORED;
        hgrn2.recompute = recompute;
        return hgrn2_lm(tokens, &hgrn2);
    }
    if (!strcmp(family, "delta_net")) {
        delta_net_config delta = delta_net_lm_config(V, 64, 2, 2);
        delta.recompute = recompute;
        return delta_net_lm(tokens, &delta);
    }
    transformer_config t = transformer_llama_config(V, 64, 2, 2);
    t.recompute = recompute;
    return transformer_lm(tokens, &t);
}

static fg_file *open_fixture(const char *family, const char *file)
{
    char path[1000];
    snprintf(path, sizeof path, FIXTURES "/%s/%s", family, file);
    fg_file *f = fg_file_open(path);
    cr_assert_eq(fg_file_status(f), FG_OK, "%s", fg_file_message(f));
    return f;
}

static void *read_fixture(fg_file *f, const char *name, fg_dtype t, int64_t count)
{
    void *data = malloc((size_t)count * 4);
    const fg_status s = fg_file_read(f, name, t, data, (size_t)count * 4);
    cr_assert_eq(s, FG_OK, "%s", fg_file_message(f));
    return data;
}

static void expect_near(const char *what, const float *x, const float *y, int64_t n, double bound)
{
    double worst = 0;
    for (int64_t i = 0; i < n; i++) worst = fmax(worst, fabs((double)x[i] - (double)y[i]));
    cr_expect(worst <= bound, "%s differ by up to %.2e, allowed are %.0e", what, worst, bound);
}

/* |x - y| relative to |y| */
static void expect_near_in_norm(const char *what, const float *x, const float *y, int64_t n,
                                double bound)
{
    double diff = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        diff += ((double)x[i] - (double)y[i]) * ((double)x[i] - (double)y[i]);
        norm += (double)y[i] * (double)y[i];
    }
    cr_expect(sqrt(diff) <= bound * sqrt(norm), "%s: off by %.2e of its norm, allowed are %.0e",
              what, sqrt(diff / norm), bound);
}

static void check_names(const char *family)
{
    fg_graph *g = fg_graph_new();
    fg_file *f = open_fixture(family, "model.safetensors");
    build(family, fg_input(g, "tokens", FG_I32, FG_DIMS(B, T)), false);
    cr_expect_eq(fg_param_count(g), fg_file_count(f), "%s: %d parameters instead of %d", family,
                 fg_param_count(g), fg_file_count(f));
    fg_param_info p;
    for (int i = 0; fg_param_at(g, i, &p); i++) {
        fg_file_entry e;
        const bool found = fg_file_find(f, p.name, &e);
        cr_expect(found, "%s: %s is no official name", family, p.name);
        if (found) cr_expect(fg_shape_equal(e.shape, p.shape), "%s: %s", family, p.name);
    }
    fg_file_close(f);
    fg_graph_free(g);
}

static void check_values(const char *family, bool recompute)
{
    char name[300];
    fg_graph *g = fg_graph_new();
    fg_tensor tokens = fg_input(g, "tokens", FG_I32, FG_DIMS(B, T));
    fg_tensor labels = fg_input(g, "labels", FG_I32, FG_DIMS(B, T));
    fg_tensor logits = build(family, tokens, recompute);
    fg_tensor losses = fg_cross_entropy(logits, labels);
    fg_tensor loss = fg_mean(losses), wrt[100], grad[100];
    const int n = fg_param_count(g);
    fg_param_info p;
    for (int i = 0; fg_param_at(g, i, &p); i++) wrt[i] = p.tensor;
    cr_assert_eq(fg_grad(loss, n, wrt, grad), FG_OK, "%s: %s", family, fg_graph_message(g));
    fg_output(logits, "logits");
    fg_output(losses, "losses");
    for (int i = 0; i < n; i++)
        if (fg_ok(grad[i])) fg_output(grad[i], fg_name(g, "grad%d", i));

    fg_backend *b = fg_backend_open("cpu", 2);
    fg_store *s = fg_store_new(b);
    snprintf(name, sizeof name, FIXTURES "/%s/model.safetensors", family);
    cr_assert_eq(fg_store_load(s, name, ""), FG_OK, "%s", fg_store_message(s));
    fg_plan *plan = fg_plan_new(g, s);
    fg_file *f = open_fixture(family, "reference.safetensors");
    void *ids = read_fixture(f, "input_ids", FG_I32, B * T);
    void *next = read_fixture(f, "labels", FG_I32, B * T);
    fg_write(plan, tokens, ids, sizeof(int32_t[B * T]));
    fg_write(plan, labels, next, sizeof(int32_t[B * T]));
    cr_assert_eq(fg_run(plan), FG_OK, "%s: %s", family, fg_plan_message(plan));

    static float got[B * T * V];
    float *want = read_fixture(f, "logits", FG_F32, B * T * V);
    cr_assert_eq(fg_read(plan, logits, got, sizeof got), FG_OK, "%s", fg_plan_message(plan));
    expect_near(fg_name(g, "%s: logits", family), got, want, B * T * V, 5e-5);
    free(want);
    want = read_fixture(f, "loss", FG_F32, B * T);
    cr_assert_eq(fg_read(plan, losses, got, sizeof(float[B * T])), FG_OK, "%s",
                 fg_plan_message(plan));
    expect_near(fg_name(g, "%s: losses", family), got, want, B * T, 2e-5);
    free(want);
    for (int i = 0; fg_param_at(g, i, &p); i++) {
        const int64_t count = fg_shape_count(p.shape);
        cr_expect_eq(fg_ok(grad[i]), !p.init.frozen, "%s: %s", family, p.name);
        if (p.init.frozen) continue;                     /* stored and unused: no gradient */
        float *mine = malloc((size_t)count * 4);
        want = read_fixture(f, fg_name(g, "grad.%s", p.name), FG_F32, count);
        cr_assert_eq(fg_read(plan, grad[i], mine, (size_t)count * 4), FG_OK, "%s",
                     fg_plan_message(plan));
        const char *what = fg_name(g, "%s: gradient of %s", family, p.name);
        expect_near_in_norm(what, mine, want, count, 2e-4);
        free(mine);
        free(want);
    }
    free(ids);
    free(next);
    fg_file_close(f);
    fg_plan_free(plan);
    fg_store_free(s);
    fg_backend_close(b);
    fg_graph_free(g);
}

static const char *const families[] = {
    "fox_llama", "fox_pro", "transformer_llama", "transformer_pro", "mamba2", "hgrn2",
    "hgrn2_lower_bound", "delta_net"
};
enum { FAMILIES = sizeof families / sizeof families[0], ATTENTION_FAMILIES = 4 };

Test(models, parameters_have_the_official_names_and_shapes)
{
    for (int i = 0; i < FAMILIES; i++) check_names(families[i]);
}

Test(models, every_family_computes_what_the_official_code_does)
{
    for (int i = 0; i < FAMILIES; i++) check_values(families[i], false);
}

Test(models, halves_computed_again_are_what_the_official_code_computes)
{
    for (int i = 0; i < FAMILIES; i++) check_values(families[i], true);
}

/* Logits of FoX (LLaMA), vocabulary 256, width 128, 2 layers, 4 heads. */
static void run_fox_llama(bool by_ops, float *logits, size_t bytes)
{
    int32_t tokens[B * T];
    const fox_config c = fox_llama_config(256, 128, 2, 4);
    fg_graph *g = fg_graph_new();
    fg_graph_set(g, "layers", "2");
    fg_tensor x = fg_input(g, "tokens", FG_I32, FG_DIMS(B, T));
    fg_tensor y = fg_output(by_ops ? ops_model(x) : fox_lm(x, &c), "logits");
    fg_backend *b = fg_backend_open("cpu", 2);
    fg_store *s = fg_store_new(b);
    cr_assert_eq(fg_store_init(s, g, 11), FG_OK, "%s", fg_store_message(s));
    fg_plan *p = fg_plan_new(g, s);
    for (int i = 0; i < B * T; i++) tokens[i] = (i * i + 31 * i) % 256;
    fg_write(p, x, tokens, sizeof tokens);
    cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
    cr_assert_eq(fg_read(p, y, logits, bytes), FG_OK, "%s", fg_plan_message(p));
    fg_plan_free(p);
    fg_store_free(s);
    fg_backend_close(b);
    fg_graph_free(g);
}

Test(models, fox_llama_written_in_ops_is_the_library_model_to_the_bit)
{
    static float ops[B * T * 256], lib[B * T * 256];
    run_fox_llama(true, ops, sizeof ops);
    run_fox_llama(false, lib, sizeof lib);
    cr_expect_eq(memcmp(ops, lib, sizeof ops), 0);
    cr_expect_neq(ops[0], 0);
}

/* ---- parameters ------------------------------------------------------------------------------ */

static bool ends(const char *s, const char *tail)
{
    const size_t n = strlen(s), m = strlen(tail);
    return n >= m && !strcmp(s + n - m, tail);
}

Test(models, gains_biases_and_constant_gates_alone_do_not_decay)
{
    for (int kind = FG_GATE_FULL; kind <= FG_GATE_NONE; kind++) {
        fg_graph *g = fg_graph_new();
        fox_config c = fox_pro_config(V, 64, 1, 4);
        c.fgate_type = (fg_gate_kind)kind;
        c.decay_time_min = 2;
        c.decay_time_max = 100;
        fox_lm(fg_input(g, "tokens", FG_I32, FG_DIMS(B, T)), &c);
        cr_assert_eq(fg_graph_status(g), FG_OK, "%s", fg_graph_message(g));
        fg_param_info p;
        for (int i = 0; fg_param_at(g, i, &p); i++) {
            const bool gate = ends(p.name, "attn.fgate_bias");
            const bool kept = gate || ends(p.name, "norm.weight") || ends(p.name, ".bias");
            cr_expect_eq(p.init.no_decay, kept, "%s", p.name);
            cr_expect_eq(p.init.frozen, gate && kind == FG_GATE_FIXED, "%s", p.name);
        }
        const fg_tensor gate = fg_find(g, "model.layers.0.attn.fgate_bias");
        cr_expect_eq(fg_ok(gate), kind == FG_GATE_BIAS_ONLY || kind == FG_GATE_FIXED);
        fg_graph_free(g);
    }
}

Test(models, parameters_start_as_the_official_ones)
{
    enum { h = 256, H = 4 };
    static float w[2 * 1024 * h];
    fg_graph *g = fg_graph_new();
    fox_config c = fox_pro_config(V, h, 1, H);
    c.fgate_type = FG_GATE_FIXED;
    c.decay_time_min = 4;
    c.decay_time_max = 256;
    c.initializer_range = 0.05;
    fox_lm(fg_input(g, "tokens", FG_I32, FG_DIMS(B, T)), &c);
    fg_backend *b = fg_backend_open("cpu", 1);
    fg_store *s = fg_store_new(b);
    cr_assert_eq(fg_store_init(s, g, 1), FG_OK, "%s", fg_store_message(s));

    fg_param_info p;
    for (int i = 0; fg_param_at(g, i, &p); i++) {
        const int64_t n = fg_shape_count(p.shape);
        double sum = 0, squares = 0;
        cr_assert_eq(fg_store_get(s, p.name, w, (size_t)n * 4), FG_OK, "%s", fg_store_message(s));
        for (int64_t k = 0; k < n; k++) {
            sum += (double)w[k];
            squares += (double)w[k] * (double)w[k];
        }
        if (ends(p.name, "norm.weight")) {
            cr_expect_eq(sum, (double)n, "%s", p.name);
            cr_expect_eq(squares, (double)n, "%s", p.name);
        } else if (ends(p.name, "fgate_bias")) {
            for (int k = 0; k < H; k++) {        /* log sigmoid(b) = -1 / tau, tau = 4^(k+1) */
                const double rate = log1p(exp(-(double)w[k]));
                cr_expect_float_eq(rate * pow(4, k + 1), 1, 1e-4, "head %d", k);
            }
        } else {                                         /* five standard errors */
            const double mean = sum / (double)n, deviation = sqrt(squares / (double)n);
            cr_expect_lt(fabs(mean), 5 * 0.05 / sqrt((double)n), "%s", p.name);
            cr_expect_lt(fabs(deviation / 0.05 - 1), 5 / sqrt(2 * (double)n), "%s", p.name);
        }
    }
    fg_store_free(s);
    fg_backend_close(b);
    fg_graph_free(g);
}

Test(models, a_tied_head_is_the_embedding)
{
    fg_graph *g = fg_graph_new();
    fox_config c = fox_llama_config(V, 64, 1, 4);
    c.tie_word_embeddings = true;
    fg_tensor y = fox_lm(fg_input(g, "tokens", FG_I32, FG_DIMS(B, T)), &c);
    cr_expect_eq(fg_graph_status(g), FG_OK, "%s", fg_graph_message(g));
    cr_expect_eq(fg_dim(y, -1), V);
    cr_expect_not(fg_ok(fg_find(g, "lm_head.weight")));
    cr_expect_str_eq(fg_graph_fact(g, "tie_word_embeddings"), "true");
    fg_graph_free(g);
}

/* ---- facts ----------------------------------------------------------------------------------- */

/* Jansson does not know the word Infinity, which Python writes. */
static json_t *parse_json(const char *text)
{
    char copy[4000];
    snprintf(copy, sizeof copy, "%s", text);
    for (char *p; (p = strstr(copy, "Infinity")) != NULL; ) memcpy(p, "1e+308  ", 8);
    return json_loads(copy, JSON_DECODE_ANY, NULL);
}

static json_t *load_json(const char *path)
{
    char text[4000] = "";
    FILE *f = fopen(path, "r");
    cr_assert_not_null(f, "%s", path);
    text[fread(text, 1, sizeof text - 1, f)] = '\0';
    fclose(f);
    json_t *j = parse_json(text);
    cr_assert_not_null(j, "%s", path);
    return j;
}

/* What the release's trainer writes differently from a freshly made config, and the size of the
 * official kernel's chunks. */
static bool of_the_trainer(const char *key)
{
    static const char *const keys[] = { "architectures", "bos_token_id", "eos_token_id",
        "pad_token_id", "max_position_embeddings", "use_cache", "torch_dtype", "chunk_size" };
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++)
        if (!strcmp(keys[i], key)) return true;
    return false;
}

Test(models, facts_are_the_official_config)
{
    for (int i = 0; i < FAMILIES; i++) {
        char path[1000];
        const char *key, *text;
        fg_graph *g = fg_graph_new();
        build(families[i], fg_input(g, "tokens", FG_I32, FG_DIMS(B, T)), false);
        snprintf(path, sizeof path, FIXTURES "/%s/config.json", families[i]);
        json_t *official = load_json(path), *value;
        for (int k = 0; fg_graph_fact_at(g, k, &key, &text); k++) {
            json_t *mine = parse_json(text);
            cr_expect_not_null(mine, "%s: %s is no JSON", key, text);
            value = json_object_get(official, key);
            const bool bounded = !strcmp(families[i], "hgrn2_lower_bound");
            if (bounded && !strcmp(key, "model_type")) cr_expect_str_eq(text, "\"hgrn2\"");
            else if (!of_the_trainer(key)) {
                cr_expect_not_null(value, "%s: the official config has no %s", families[i], key);
                cr_expect(json_equal(mine, value), "%s: %s is %s", families[i], key, text);
            }
            json_decref(mine);
        }
        const char *const wanted[] = { "model_type", "vocab_size", "hidden_size",
            "num_hidden_layers", "num_heads", "num_kv_heads", "hidden_ratio", "intermediate_size",
            "hidden_act", "norm_eps", "rope_base", "use_rope", "initializer_range", "window_size",
            "tie_word_embeddings" };
        for (size_t k = 0; k < sizeof wanted / sizeof wanted[0] && i < ATTENTION_FAMILIES; k++)
            cr_expect_not_null(fg_graph_fact(g, wanted[k]), "%s: no %s", families[i], wanted[k]);
        json_decref(official);
        fg_graph_free(g);
    }
}

Test(models, a_width_that_heads_do_not_divide_is_refused_with_both_numbers)
{
    fg_graph *g = fg_graph_new();
    fox_config c = fox_llama_config(V, 64, 1, 5);
    fg_tensor y = fox_lm(fg_input(g, "tokens", FG_I32, FG_DIMS(B, T)), &c);
    cr_expect_not(fg_ok(y));
    cr_expect_eq(fg_graph_status(g), FG_ERR_SHAPE);
    cr_expect_not_null(strstr(fg_graph_message(g), "width 64 does not divide into 5 heads"), "%s",
                       fg_graph_message(g));
    cr_expect_not_null(strstr(fg_graph_message(g), "test_models.c:"), "%s", fg_graph_message(g));
    cr_expect_eq(fg_graph_errors(g), 1, "%d errors", fg_graph_errors(g));
    fg_graph_free(g);
}

Test(models, a_fixed_gate_without_time_constants_is_refused)
{
    fg_graph *g = fg_graph_new();
    fox_config c = fox_llama_config(V, 64, 1, 4);
    c.fgate_type = FG_GATE_FIXED;
    fox_lm(fg_input(g, "tokens", FG_I32, FG_DIMS(B, T)), &c);
    cr_expect_eq(fg_graph_status(g), FG_ERR_USAGE);
    fg_graph_free(g);
}
