/* test_decode.c - one model, written once: a full forward pass, and the same in pieces through
 * caches, with left padding and packed documents; causality; the same bits for any thread count. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "device_cpu.h"
#include "fox_autodiff.h"
#include "fox_models.h"
#include "plan.h"

enum { B = 3, T = 13, V = 61, CAPACITY = 17 };

static fg_tensor fox_llama(fg_tensor tokens)
{
    const fox_config c = fox_llama_config(V, 48, 2, 3);
    return fox_lm(tokens, &c);
}

static fg_tensor fox_pro(fg_tensor tokens)
{
    const fox_config c = fox_pro_config(V, 48, 2, 3);
    return fox_lm(tokens, &c);
}

static fg_tensor fox_pro_shared(fg_tensor tokens)
{
    fox_config c = fox_pro_config(V, 48, 2, 3);
    c.qk_norm_share_param_across_head = true;
    return fox_lm(tokens, &c);
}

static fg_tensor fox_bias_only(fg_tensor tokens)
{
    fox_config c = fox_pro_config(V, 48, 2, 3);
    c.fgate_type = FG_GATE_BIAS_ONLY;
    c.decay_time_min = 1;
    c.decay_time_max = 50;
    return fox_lm(tokens, &c);
}

static fg_tensor transformer_pro(fg_tensor tokens)
{
    const fox_config c = transformer_pro_config(V, 48, 2, 3);
    return fox_lm(tokens, &c);
}

static fg_tensor transformer(fg_tensor tokens)
{
    const transformer_config c = transformer_llama_config(V, 48, 2, 3);
    return transformer_lm(tokens, &c);
}

static fg_tensor transformer_window(fg_tensor tokens)
{
    transformer_config c = transformer_llama_config(V, 48, 2, 3);
    c.window_size = 4;
    return transformer_lm(tokens, &c);
}

static fg_tensor transformer_shared_keys(fg_tensor tokens)
{
    transformer_config c = transformer_llama_config(V, 48, 2, 6);
    c.num_kv_heads = 2;
    return transformer_lm(tokens, &c);
}

static fg_tensor hgrn2(fg_tensor tokens)
{
    const hgrn2_config c = hgrn2_lm_config(V, 48, 2, 12);
    return hgrn2_lm(tokens, &c);
}

static fg_tensor delta_net(fg_tensor tokens)
{
    const delta_net_config c = delta_net_lm_config(V, 48, 2, 3);
    return delta_net_lm(tokens, &c);
}

static fg_tensor mamba2(fg_tensor tokens)
{
    mamba2_config c = mamba2_lm_config(V, 48, 2, 4);
    c.state_size = 10;
    return mamba2_lm(tokens, &c);
}

/* Two groups, a wide kernel without bias, limits of dt. */
static fg_tensor mamba2_groups(fg_tensor tokens)
{
    mamba2_config c = mamba2_lm_config(V, 48, 2, 6);
    c.state_size = 17;
    c.n_groups = 2;
    c.conv_kernel = 7;
    c.no_conv_bias = true;
    c.time_step_low = 0.005;
    c.time_step_high = 0.5;
    return mamba2_lm(tokens, &c);
}

/* Some gated rows of these weights are almost 0, and a norm with eps 1e-5 would show the rounding
 * of products 300 times: eps is larger here. */
static fg_tensor hybrid(fg_tensor tokens)
{
    fg_graph *g = tokens.graph;
    mamba2_config scan = mamba2_lm_config(V, 48, 2, 4);
    const fox_config attention = fox_pro_config(V, 48, 2, 3);
    scan.state_size = 8;
    scan.layer_norm_epsilon = 1e-3;
    fg_tensor x = fg_nn_embed(tokens, "embed", V, 48);
    for (int i = 0; i < 3; i++) {
        fg_scope_push(g, fg_name(g, "layers.%d", i));
        x = i == 1 ? fox_block(x, &attention) : mamba2_block(x, &scan);
        fg_scope_pop(g);
    }
    return fg_nn_linear(fg_nn_norm(x, "norm", 0), "head", V);
}

struct family { const char *name; fg_tensor (*build)(fg_tensor tokens); };
static const struct family families[] = {
    { "fox_llama", fox_llama },
    { "fox_pro", fox_pro },
    { "fox_pro_shared", fox_pro_shared },
    { "fox_bias_only", fox_bias_only },
    { "transformer_pro", transformer_pro },
    { "transformer", transformer },
    { "transformer_window", transformer_window },
    { "transformer_shared_keys", transformer_shared_keys },
    { "hgrn2", hgrn2 },
    { "delta_net", delta_net },
    { "mamba2", mamba2 },
    { "mamba2_groups", mamba2_groups },
    { "hybrid", hybrid },
};
enum { FAMILIES = sizeof families / sizeof families[0] };

/* Weights large enough for attention to be far from uniform. */
static fg_store *store_for(const struct family *f, fg_backend *b)
{
    fg_graph *g = fg_graph_new();
    f->build(fg_input(g, "tokens", FG_I32, FG_DIMS(1, 1)));
    fg_store *s = fg_store_new(b);
    cr_assert_eq(fg_store_init(s, g, 3), FG_OK, "%s: %s", f->name, fg_store_message(s));
    fg_param_info p;
    for (int i = 0; fg_param_at(g, i, &p); i++) {
        const int64_t n = fg_shape_count(p.shape);
        float *w = malloc((size_t)n * sizeof *w);
        fg_store_get(s, p.name, w, (size_t)n * 4);
        for (int64_t k = 0; k < n; k++) {
            if (p.init.kind == FG_NORMAL) w[k] *= 8;
            w[k] += 0.3f * sinf(1.3f * (float)k + (float)i);
        }
        fg_store_put(s, p.name, FG_F32, p.shape, w);
        free(w);
    }
    fg_graph_free(g);
    return s;
}

static void fill_tokens(int32_t tokens[B][T])
{
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++) tokens[b][t] = (17 * t + 5 * b * b + 3 * t * t + 1) % V;
}

/* Runs positions from .. from + n - 1 of all sequences, through caches or not; first or NULL. */
static void run_piece(const struct family *f, fg_store *s, int from, int n, int32_t tokens[B][T],
                      int32_t first[B][T], bool caches, float logits[B][T][V])
{
    static float out[B * T * V];
    int32_t piece[B * T], starts[B * T], past = from;
    fg_sequence q = { { 0 }, { 0 }, CAPACITY };
    fg_graph *g = fg_graph_new();
    fg_tensor x = fg_input(g, "tokens", FG_I32, FG_DIMS(B, n));
    if (first) q.first = fg_input(g, "first", FG_I32, FG_DIMS(B, n));
    if (caches) q.past = fg_input(g, "past", FG_I32, FG_DIMS(1));
    if (first || caches) fg_graph_sequence(g, q);
    fg_tensor y = fg_output(f->build(x), "logits");
    cr_assert_eq(fg_graph_status(g), FG_OK, "%s: %s", f->name, fg_graph_message(g));
    fg_plan *p = fg_plan_new(g, s);
    for (int b = 0; b < B; b++) {
        memcpy(piece + b * n, tokens[b] + from, (size_t)n * sizeof piece[0]);
        if (first) memcpy(starts + b * n, first[b] + from, (size_t)n * sizeof starts[0]);
    }
    fg_write(p, x, piece, (size_t)(B * n) * 4);
    if (first) fg_write(p, q.first, starts, (size_t)(B * n) * 4);
    if (caches) fg_write(p, q.past, &past, sizeof past);
    cr_assert_eq(fg_run(p), FG_OK, "%s: %s", f->name, fg_plan_message(p));
    cr_assert_eq(fg_read(p, y, out, (size_t)(B * n * V) * 4), FG_OK, "%s", fg_plan_message(p));
    for (int b = 0; b < B; b++)
        memcpy(logits[b][from], out + b * n * V, (size_t)(n * V) * sizeof out[0]);
    fg_plan_free(p);
    fg_graph_free(g);
}

/* The worst difference of logits over the positions that are no padding. */
static double difference(float x[B][T][V], float y[B][T][V], int32_t first[B][T])
{
    double worst = 0;
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++)
            for (int c = 0; c < V && !(first && first[b][t] > t); c++) {
                const double d = fabs((double)x[b][t][c] - (double)y[b][t][c]);
                if (!(d <= worst)) worst = d;            /* NaN stays */
            }
    return worst;
}

/* A prompt, then one token at a time, is the full pass. */
static void expect_steps(const struct family *f, fg_store *s, int32_t first[B][T], const char *what)
{
    static float full[B][T][V], steps[B][T][V];
    static const int prompts[] = { 1, 3, T - 1 };
    int32_t tokens[B][T];
    fill_tokens(tokens);
    run_piece(f, s, 0, T, tokens, first, false, full);
    for (int i = 0; i < 3; i++) {
        run_piece(f, s, 0, prompts[i], tokens, first, true, steps);
        for (int t = prompts[i]; t < T; t++) run_piece(f, s, t, 1, tokens, first, true, steps);
        const double d = difference(full, steps, first);
        cr_expect(d <= 1e-4, "%s, %s, prompt of %d: logits differ by %.1e", f->name, what,
                  prompts[i], d);
    }
    run_piece(f, s, 0, 5, tokens, first, true, steps);       /* a second piece of many tokens */
    run_piece(f, s, 5, T - 5, tokens, first, true, steps);
    const double d = difference(full, steps, first);
    cr_expect(d <= 1e-4, "%s, %s, in two pieces: logits differ by %.1e", f->name, what, d);
}

static void each_family(void (*check)(const struct family *f, fg_store *s))
{
    fg_backend *b = fg_backend_open("cpu", 2);
    for (int i = 0; i < FAMILIES; i++) {
        fg_store *s = store_for(&families[i], b);
        check(&families[i], s);
        fg_store_free(s);
    }
    fg_backend_close(b);
}

static void check_plain(const struct family *f, fg_store *s) { expect_steps(f, s, NULL, "plain"); }

Test(decode, prompt_and_steps_are_the_full_pass)
{
    each_family(check_plain);
}

/* Left padding of 0, 2 and 5 tokens. */
static const int pads[B] = { 0, 2, 5 };

static void fill_padding(int32_t first[B][T])
{
    for (int b = 0; b < B; b++) for (int t = 0; t < T; t++) first[b][t] = pads[b];
}

static void check_padded(const struct family *f, fg_store *s)
{
    int32_t first[B][T];
    fill_padding(first);
    expect_steps(f, s, first, "padded");
}

Test(decode, padded_prompt_and_steps_are_the_full_pass)
{
    each_family(check_padded);
}

/* Documents of lengths 4, 1, 8; 13; 6, 7. */
static void fill_documents(int32_t first[B][T])
{
    for (int t = 0; t < T; t++) {
        first[0][t] = t < 4 ? 0 : t < 5 ? 4 : 5;
        first[1][t] = 0;
        first[2][t] = t < 6 ? 0 : 6;
    }
}

static void check_documents(const struct family *f, fg_store *s)
{
    int32_t first[B][T];
    fill_documents(first);
    expect_steps(f, s, first, "documents");
}

Test(decode, packed_prompt_and_steps_are_the_full_pass)
{
    each_family(check_documents);
}

/* Nodes of one token that a device with kernels for all of them would run. */
static int count_planned(fg_backend *b, const struct family *f, const char *op)
{
    int n = 0;
    fg_graph *g = fg_graph_new();
    fg_tensor x = fg_input(g, "tokens", FG_I32, FG_DIMS(B, 1));
    fg_tensor past = fg_input(g, "past", FG_I32, FG_DIMS(1));
    fg_graph_sequence(g, (fg_sequence){ { 0 }, past, CAPACITY });
    fg_output(f->build(x), "logits");
    uint32_t *map;
    fg_graph *low = fg__lower(g, b, FG_F32, &map);
    for (uint32_t k = 0; k < low->n_nodes; k++) n += !strcmp(low->nodes[k].op->name, op);
    fg_graph_free(low);
    free(map);
    fg_graph_free(g);
    return n;
}

static const char *all_fit(fg_backend *b, const fg_op *op, const fg_infer *c)
{
    (void)b; (void)op; (void)c;
    return NULL;
}

/* A device that fuses: what lowering makes of few tokens has the same results. */
Test(decode, steps_of_fused_nodes_are_the_full_pass)
{
    fg_backend *b = fg__device_open();
    for (int i = 0; i < FAMILIES; i++) {
        fg_store *s = store_for(&families[i], b);
        check_plain(&families[i], s);
        check_padded(&families[i], s);
        check_documents(&families[i], s);
        fg_store_free(s);
    }
    fg_backend_close(b);
}

Test(decode, a_token_through_fox_pro_is_five_nodes_a_layer)
{
    static const struct { const char *op; int n; } want[] = {
        { "norm_linear", 2 * 2 + 1 }, { "swiglu_linear", 2 }, { "forget_decode", 2 },
        { "few_linear", 2 }, { "linear", 0 }, { "embedding", 1 }, { "cache_write", 0 },
        { "cache_last", 0 }, { "forget_attention", 0 }, { "rms_norm", 0 }, { "add_rms_norm", 0 },
    };
    fg_backend *b = fg__device_open();
    fg_backend_ops ops = *b->ops;
    ops.unfit = all_fit;
    b->ops = &ops;
    for (size_t i = 0; i < sizeof want / sizeof want[0]; i++) {
        const int n = count_planned(b, &families[1], want[i].op);
        cr_expect_eq(n, want[i].n, "%s: %d nodes, not %d", want[i].op, n, want[i].n);
    }
    fg_backend_close(b);
}

/* A document behind padding or other documents is what it is alone: position 0 at its start. */
static void expect_alone(const struct family *f, fg_store *s, int32_t first[B][T], const char *what)
{
    static float packed[B][T][V], alone[B][T][V];
    int32_t tokens[B][T], shifted[B][T];
    fill_tokens(tokens);
    run_piece(f, s, 0, T, tokens, first, false, packed);
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++) {
            const int start = first[b][t];
            if (start > t || (t && first[b][t - 1] == start && start < t)) continue;
            memset(shifted, 0, sizeof shifted);
            memcpy(shifted[0], tokens[b] + start, (size_t)(T - start) * sizeof tokens[0][0]);
            run_piece(f, s, 0, T, shifted, NULL, false, alone);
            double worst = 0;
            for (int i = start; i < T && first[b][i] == start; i++)
                for (int c = 0; c < V; c++)
                    worst = fmax(worst, fabs((double)(packed[b][i][c] - alone[0][i - start][c])));
            cr_expect(worst <= 1e-4, "%s, %s: sequence %d from %d is off by %.1e", f->name, what, b,
                      start, worst);
        }
}

static void check_alone(const struct family *f, fg_store *s)
{
    int32_t first[B][T];
    fill_documents(first);
    expect_alone(f, s, first, "documents");
    fill_padding(first);
    expect_alone(f, s, first, "padded");
}

Test(decode, documents_see_nothing_of_each_other_or_of_padding)
{
    each_family(check_alone);
}

static void check_causality(const struct family *f, fg_store *s)
{
    static float before[B][T][V], after[B][T][V];
    int32_t tokens[B][T];
    fill_tokens(tokens);
    run_piece(f, s, 0, T, tokens, NULL, false, before);
    for (int cut = 1; cut < T; cut += 4) {
        fill_tokens(tokens);
        for (int b = 0; b < B; b++)
            for (int t = cut; t < T; t++) tokens[b][t] = (tokens[b][t] + 7) % V;
        run_piece(f, s, 0, T, tokens, NULL, false, after);
        for (int b = 0; b < B; b++) {
            cr_expect_eq(memcmp(before[b], after[b], (size_t)cut * sizeof before[b][0]), 0,
                         "%s: tokens from %d on changed what was before", f->name, cut);
            cr_expect_neq(memcmp(before[b][cut], after[b][cut], sizeof before[b][cut]), 0,
                          "%s: token %d changed nothing", f->name, cut);
        }
    }
}

Test(decode, later_tokens_change_no_bit_of_earlier_logits)
{
    each_family(check_causality);
}

/* Loss, logits and all gradients of one batch, with so many threads. */
static size_t run_gradients(const struct family *f, int threads, float *out, size_t room)
{
    int32_t tokens[B][T];
    fg_backend *b = fg_backend_open("cpu", threads);
    fg_store *s = store_for(f, b);
    fg_graph *g = fg_graph_new();
    fg_tensor x = fg_input(g, "tokens", FG_I32, FG_DIMS(B, T));
    fg_tensor logits = fg_output(f->build(x), "logits");
    fg_tensor loss = fg_nn_loss(logits, x), wrt[100], grad[100];
    fg_param_info p;
    int n = 0;
    size_t used = 0;
    for (; fg_param_at(g, n, &p); n++) wrt[n] = p.tensor;
    cr_assert_eq(fg_grad(loss, n, wrt, grad), FG_OK, "%s: %s", f->name, fg_graph_message(g));
    for (int i = 0; i < n; i++) fg_output(grad[i], fg_name(g, "grad%d", i));
    fg_plan *plan = fg_plan_new(g, s);
    fill_tokens(tokens);
    fg_write(plan, x, tokens, sizeof tokens);
    cr_assert_eq(fg_run(plan), FG_OK, "%s: %s", f->name, fg_plan_message(plan));
    for (int i = -1; i < n; i++) {
        const fg_tensor t = i < 0 ? logits : grad[i];
        const size_t count = (size_t)fg_count(t);
        cr_assert_leq(used + count, room);
        cr_assert_eq(fg_read(plan, t, out + used, count * 4), FG_OK, "%s", fg_plan_message(plan));
        used += count;
    }
    fg_plan_free(plan);
    fg_graph_free(g);
    fg_store_free(s);
    fg_backend_close(b);
    return used;
}

Test(decode, threads_change_no_bit_of_logits_and_gradients)
{
    static float one[500000], many[500000];
    for (int i = 0; i < FAMILIES; i++) {
        const size_t n = run_gradients(&families[i], 1, one, 500000);
        for (int threads = 2; threads <= 5; threads += 3) {
            cr_assert_eq(run_gradients(&families[i], threads, many, 500000), n);
            cr_expect_eq(memcmp(one, many, n * sizeof one[0]), 0, "%s: %d threads differ from one",
                         families[i].name, threads);
        }
    }
}
