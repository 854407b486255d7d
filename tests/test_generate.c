/* test_generate.c - caches give what a recomputation gives; samples follow the distribution. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "fox_train.h"

enum { VOCAB = 40, NEW = 12 };

static fg_tensor build(void *self, fg_tensor tokens)
{
    return fox_lm(tokens, self);
}

/* Small, but with weights large enough that logits are far apart. */
static fox_config widened(fox_config c)
{
    c.intermediate_size = 24;
    c.initializer_range = 0.3;
    return c;
}

static fg_store *store_of(const struct fg_model *m, fg_backend *b)
{
    fg_recipe r = fg_recipe_default();
    fg_graph *g = fg_model_forward(m, &r, 1, 1);
    fg_store *s = fg_store_new(b);
    cr_assert_eq(fg_graph_status(g), FG_OK, "%s", fg_graph_message(g));
    cr_assert_eq(fg_store_init(s, g, 5), FG_OK);
    fg_graph_free(g);
    return s;
}

/* The likeliest continuation by running the whole sequence again for every token. */
static void recompute(const struct fg_model *m, fg_store *s, const fg_prompt *p, int64_t bos,
                      int32_t *out)
{
    fg_recipe r = fg_recipe_default();
    int32_t tokens[100];
    float logits[100 * VOCAB];
    int64_t n = 0;

    if (bos >= 0)
        tokens[n++] = (int32_t)bos;
    for (int64_t i = 0; i < p->count; i++)
        tokens[n++] = p->tokens[i];
    for (int k = 0; k < NEW; k++) {
        fg_graph *g = fg_model_forward(m, &r, 1, n);
        fg_plan *plan = fg_plan_new(g, s);
        const float *last = logits + (n - 1) * VOCAB;
        int32_t best = 0;
        cr_assert_eq(fg_write(plan, fg_find(g, "tokens"), tokens, (size_t)n * 4), FG_OK);
        cr_assert_eq(fg_run(plan), FG_OK, "%s", fg_plan_message(plan));
        cr_assert_eq(fg_read(plan, fg_find(g, "logits"), logits, (size_t)n * VOCAB * 4), FG_OK);
        for (int32_t v = 1; v < VOCAB; v++)
            if (last[v] > last[best])
                best = v;
        tokens[n++] = out[k] = best;
        fg_plan_free(plan);
        fg_graph_free(g);
    }
}

static void generate(const struct fg_model *m, fg_store *s, int n, const fg_prompt *prompts,
                     const fg_generate_options *o, int32_t *out, int64_t *counts)
{
    char message[FG_MESSAGE];
    cr_assert_eq(fg_generate(m, s, n, prompts, o, out, counts, message), FG_OK, "%s", message);
}

static const int32_t text[] = { 3, 17, 29, 4, 4, 31, 8, 0, 22 };

static void check_model(fox_config c)
{
    const struct fg_model m = { .name = "small", .build = build, .self = &c };
    fg_backend *b = fg_backend_open("cpu", 2);
    fg_store *s = store_of(&m, b);
    const fg_prompt prompts[3] = { { text, 9 }, { text + 2, 1 }, { text + 4, 4 } };
    int32_t out[3 * NEW], alone[NEW];
    int64_t counts[3];

    for (int64_t bos = -1; bos < 1; bos++) {
        const fg_generate_options o = { .max_tokens = NEW, .bos = bos, .end_token = -1 };
        generate(&m, s, 3, prompts, &o, out, counts);
        for (int i = 0; i < 3; i++) {
            cr_expect_eq(counts[i], NEW);
            recompute(&m, s, &prompts[i], bos, alone);
            cr_expect_eq(memcmp(alone, out + i * NEW, sizeof alone), 0,
                         "prompt %d of three differs from recomputation", i);
            generate(&m, s, 1, &prompts[i], &o, out + i * NEW, counts);
            cr_expect_eq(memcmp(alone, out + i * NEW, sizeof alone), 0,
                         "prompt %d alone differs from recomputation", i);
        }
    }
    fg_store_free(s);
    fg_backend_close(b);
}

Test(generate, cached_fox_pro_is_the_full_recomputation)
{
    check_model(widened(fox_pro_config(VOCAB, 16, 2, 2)));
}

Test(generate, cached_transformer_pro_is_the_full_recomputation)
{
    check_model(widened(transformer_pro_config(VOCAB, 16, 2, 2)));
}

Test(generate, cached_fox_llama_is_the_full_recomputation)
{
    check_model(widened(fox_llama_config(VOCAB, 16, 2, 2)));
}

Test(generate, a_prompt_longer_than_one_piece_is_the_full_recomputation)
{
    fox_config c = widened(fox_pro_config(VOCAB, 16, 1, 2));
    const struct fg_model m = { .name = "small", .build = build, .self = &c };
    fg_backend *b = fg_backend_open("cpu", 2);
    fg_store *s = store_of(&m, b);
    int32_t tokens[80], other[33], out[2 * NEW], alone[NEW];
    int64_t counts[2];
    for (int i = 0; i < 80; i++)
        tokens[i] = (i * i + 3 * i) % VOCAB;
    memcpy(other, tokens + 5, sizeof other);
    const fg_prompt prompts[2] = { { tokens, 80 }, { other, 33 } };
    const fg_generate_options o = { .max_tokens = NEW, .bos = 0, .end_token = -1, .piece = 16 };
    generate(&m, s, 2, prompts, &o, out, counts);
    for (int i = 0; i < 2; i++) {
        recompute(&m, s, &prompts[i], 0, alone);
        cr_expect_eq(memcmp(alone, out + i * NEW, sizeof alone), 0, "prompt %d differs", i);
    }
    fg_store_free(s);
    fg_backend_close(b);
}

typedef struct { int32_t tokens[3][NEW]; int n[3]; } heard;

static bool hear(void *to, int sequence, int32_t token)
{
    heard *h = to;
    h->tokens[sequence][h->n[sequence]++] = token;
    return sequence != 1 || h->n[1] < 4;
}

Test(generate, tokens_are_streamed_and_a_sequence_can_be_ended)
{
    fox_config c = widened(fox_pro_config(VOCAB, 16, 1, 2));
    const struct fg_model m = { .name = "small", .build = build, .self = &c };
    fg_backend *b = fg_backend_open("cpu", 1);
    fg_store *s = store_of(&m, b);
    const fg_prompt prompts[3] = { { text, 9 }, { text, 2 }, { text + 1, 4 } };
    int32_t out[3 * NEW];
    int64_t counts[3];
    heard h = { 0 };
    fg_generate_options o = { .max_tokens = NEW, .temperature = 1, .end_token = -1,
                              .token = hear, .to = &h };
    generate(&m, s, 3, prompts, &o, out, counts);
    for (int i = 0; i < 3; i++) {
        cr_expect_eq(counts[i], i == 1 ? 4 : NEW);
        cr_expect_eq(h.n[i], counts[i]);
        cr_expect_eq(memcmp(h.tokens[i], out + i * NEW, (size_t)counts[i] * 4), 0);
    }
    o.end_token = out[5];
    memset(&h, 0, sizeof h);
    generate(&m, s, 1, prompts, &o, out, counts);
    cr_expect_leq(counts[0], 6);
    cr_expect_eq(out[counts[0] - 1], o.end_token);
    fg_store_free(s);
    fg_backend_close(b);
}

Test(generate, what_cannot_be_continued_is_refused)
{
    fox_config c = widened(fox_pro_config(VOCAB, 16, 1, 2));
    const struct fg_model m = { .name = "small", .build = build, .self = &c };
    fg_backend *b = fg_backend_open("cpu", 1);
    fg_store *s = store_of(&m, b);
    const int32_t high[2] = { 1, VOCAB };
    const fg_prompt empty = { NULL, 0 }, beyond = { high, 2 };
    fg_generate_options o = { .max_tokens = 2, .bos = -1, .end_token = -1 };
    int32_t out[2];
    int64_t count;
    char message[FG_MESSAGE];
    cr_expect_eq(fg_generate(&m, s, 1, &empty, &o, out, &count, message), FG_ERR_USAGE);
    cr_expect_str_eq(message, "prompt 0 is empty");
    cr_expect_eq(fg_generate(&m, s, 1, &beyond, &o, out, &count, message), FG_ERR_USAGE);
    cr_expect_str_eq(message, "prompt 0 holds the token 40, the model knows 0 to 39");
    o.temperature = -1;
    cr_expect_eq(fg_generate(&m, s, 1, &empty, &o, out, &count, message), FG_ERR_USAGE);
    fg_store_free(s);
    fg_backend_close(b);
}

/* ---- the choice of a token ------------------------------------------------------------------- */

enum { DRAWS = 20000 };

static void frequencies(const fg_generate_options *o, const double *p, int n, double *f)
{
    float logits[8];
    for (int v = 0; v < n; v++)
        f[v] = 0;
    for (int64_t i = 0; i < DRAWS; i++) {
        for (int v = 0; v < n; v++)
            logits[v] = (float)log(p[v]);
        f[fg_sample(logits, n, o, 3, i)] += 1.0 / DRAWS;
    }
}

/* Five standard deviations of a frequency over DRAWS draws: at most 5 / (2 sqrt(DRAWS)) = 0.018. */
static void expect_frequencies(const fg_generate_options *o, const double *p, int n,
                               const double *expected)
{
    double f[8];
    frequencies(o, p, n, f);
    for (int v = 0; v < n; v++) {
        cr_expect_float_eq(f[v], expected[v], 0.018, "token %d: %g, not %g", v, f[v], expected[v]);
        if (expected[v] == 0)
            cr_expect_eq(f[v], 0);
    }
}

Test(generate, samples_follow_temperature_top_k_and_top_p)
{
    const double p[5] = { 0.1, 0.4, 0.05, 0.25, 0.2 };
    fg_generate_options o = { .temperature = 1 };
    expect_frequencies(&o, p, 5, p);
    o.top_k = 2;
    expect_frequencies(&o, p, 5, (const double[]){ 0, 0.4 / 0.65, 0, 0.25 / 0.65, 0 });
    o.top_k = 0;
    o.top_p = 0.8;
    expect_frequencies(&o, p, 5, (const double[]){ 0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85 });
    o.top_p = 0;
    o.temperature = 0.5;
    const double sum = 0.01 + 0.16 + 0.0025 + 0.0625 + 0.04;
    expect_frequencies(&o, p, 5, (const double[]){ 0.01 / sum, 0.16 / sum, 0.0025 / sum,
                                                   0.0625 / sum, 0.04 / sum });
    o.temperature = 0;
    expect_frequencies(&o, p, 5, (const double[]){ 0, 1, 0, 0, 0 });
    o.temperature = 1;
    o.top_k = 1;
    expect_frequencies(&o, p, 5, (const double[]){ 0, 1, 0, 0, 0 });
}

Test(generate, ties_go_to_the_lower_id)
{
    fg_generate_options o = { .temperature = 0 };
    expect_frequencies(&o, (const double[]){ 0.2, 0.4, 0.4 }, 3, (const double[]){ 0, 1, 0 });
    o = (fg_generate_options){ .temperature = 1, .top_k = 2 };
    expect_frequencies(&o, (const double[]){ 0.25, 0.25, 0.25, 0.25 }, 4,
                       (const double[]){ 0.5, 0.5, 0, 0 });
}
