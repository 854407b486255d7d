/* test_plan.c - lowering, order and memory. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "ops.h"
#include "plan.h"
#include "fox_autodiff.h"
#include "fox_models.h"

static fg_tensor small_fox_loss(fg_graph *g, bool recompute)
{
    fox_config c = fox_pro_config(97, 64, 3, 2);
    c.recompute = recompute;
    fg_tensor tokens = fg_input(g, "tokens", FG_I32, FG_DIMS(2, 48));
    fg_tensor labels = fg_input(g, "labels", FG_I32, FG_DIMS(2, 48));
    fg_tensor logits = fox_lm(tokens, &c);
    return fg_nn_loss(logits, labels);
}

static const fg_optimizer adamw = { 0.9, 0.95, 1e-8, 0.1, 1.0, 1 };

static void feed(fg_plan *p, const fg_graph *g, int step)
{
    int32_t ids[96];
    for (int i = 0; i < 96; i++) ids[i] = (i * 7 + i * i * 3) % 97;
    fg_write(p, fg_find(g, "labels"), ids, sizeof ids);
    for (int i = 95; i > 0; i--) ids[i] = i % 48 ? ids[i - 1] : 0;
    ids[0] = 0;
    fg_write(p, fg_find(g, "tokens"), ids, sizeof ids);
    const float lr = 1e-2f, n = (float)(step + 1);
    fg_write(p, fg_find(g, "lr"), &lr, sizeof lr);
    fg_write(p, fg_find(g, "step"), &n, sizeof n);
}

Test(plan, values_that_live_at_one_time_never_overlap)
{
    fg_backend *b = fg_backend_open("cpu", 2);
    fg_store *s = fg_store_new(b);
    fg_graph *g = fg_graph_new();
    cr_assert_eq(fg_train_graph(small_fox_loss(g, false), &adamw, NULL), FG_OK, "%s",
                 fg_graph_message(g));
    fg_plan *p = fg_plan_new(g, s);
    cr_assert_eq(fg_plan_status(p), FG_OK, "%s", fg_plan_message(p));
    int pairs = 0;
    for (uint32_t a = 1; a < p->low->n_values; a++) {
        const fg_slot *x = &p->slots[a];
        if (x->place != FG_IN_ARENA || x->root != a || x->from < 0) continue;
        cr_assert_leq(x->offset + x->bytes, p->arena_bytes);
        for (uint32_t c = a + 1; c < p->low->n_values; c++) {
            const fg_slot *y = &p->slots[c];
            if (y->place != FG_IN_ARENA || y->root != c || y->from < 0) continue;
            if (x->to < y->from || y->to < x->from) continue;
            pairs++;
            cr_assert(x->offset + x->bytes <= y->offset || y->offset + y->bytes <= x->offset,
                      "values %u and %u overlap", a, c);
        }
    }
    cr_assert_gt(pairs, 100);
    fg_plan_free(p);
    fg_graph_free(g);
    fg_store_free(s);
    fg_backend_close(b);
}

/* The arena cannot be smaller than the most bytes alive at once; it may exceed them by gaps. */
Test(plan, arena_is_within_a_tenth_of_the_lower_bound)
{
    fg_backend *b = fg_backend_open("cpu", 2);
    fg_store *s = fg_store_new(b);
    fg_graph *g = fg_graph_new();
    fg_train_graph(small_fox_loss(g, false), &adamw, NULL);
    fg_plan *p = fg_plan_new(g, s);
    size_t most = 0;
    for (uint32_t k = 0; k < p->low->n_nodes; k++) {
        size_t live = 0;
        for (uint32_t v = 1; v < p->low->n_values; v++) {
            const fg_slot *x = &p->slots[v];
            const bool own = x->place == FG_IN_ARENA && x->root == v && x->from >= 0;
            if (own && x->from <= k && k <= x->to) live += x->bytes;
        }
        if (live > most) most = live;
    }
    cr_assert_geq(p->arena_bytes, most);
    cr_assert_leq((double)p->arena_bytes, 1.1 * (double)most, "arena %zu, lower bound %zu",
                  p->arena_bytes, most);
    cr_assert_eq(fg_plan_describe(p).activations, p->arena_bytes);
    fg_plan_free(p);
    fg_graph_free(g);
    fg_store_free(s);
    fg_backend_close(b);
}

/* Loss and every parameter after `steps` updates. */
static void train(bool recompute, int threads, int steps, float *losses, fg_store **out,
                  fg_backend **bo, size_t *peak)
{
    fg_backend *b = fg_backend_open("cpu", threads);
    fg_store *s = fg_store_new(b);
    fg_graph *g = fg_graph_new();
    cr_assert_eq(fg_train_graph(small_fox_loss(g, recompute), &adamw, NULL), FG_OK, "%s",
                 fg_graph_message(g));
    cr_assert_eq(fg_store_init(s, g, 3), FG_OK);
    fg_plan *p = fg_plan_new(g, s);
    for (int i = 0; i < steps; i++) {
        feed(p, g, i);
        cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
        fg_read(p, fg_find(g, "loss"), &losses[i], sizeof losses[i]);
    }
    *peak = fg_plan_describe(p).activations;
    fg_plan_free(p);
    fg_graph_free(g);
    *out = s;
    *bo = b;
}

static void expect_equal_stores(fg_store *a, fg_store *b)
{
    cr_assert_eq(fg_store_count(a), fg_store_count(b));
    for (int i = 0; i < fg_store_count(a); i++) {
        fg_store_entry e;
        fg_store_at(a, i, &e);
        const size_t bytes = (size_t)fg_shape_count(e.shape) * 4;
        float *x = malloc(bytes), *y = malloc(bytes);
        fg_store_get(a, e.name, x, bytes);
        cr_assert_eq(fg_store_get(b, e.name, y, bytes), FG_OK);
        cr_expect(!memcmp(x, y, bytes), "%s differs", e.name);
        free(x);
        free(y);
    }
}

Test(plan, recomputation_saves_memory_and_changes_no_bit)
{
    float kept[3], again[3];
    fg_store *s1, *s2;
    fg_backend *b1, *b2;
    size_t peak1, peak2;
    train(false, 2, 3, kept, &s1, &b1, &peak1);
    train(true, 2, 3, again, &s2, &b2, &peak2);
    cr_assert(!memcmp(kept, again, sizeof kept), "%.9g %.9g", (double)kept[2], (double)again[2]);
    expect_equal_stores(s1, s2);
    cr_expect_lt(peak2, peak1, "recomputed: %zu bytes, kept: %zu", peak2, peak1);
    cr_expect_lt(kept[2], kept[0], "the loss did not fall");
    fg_store_free(s1); fg_store_free(s2);
    fg_backend_close(b1); fg_backend_close(b2);
}

Test(plan, any_number_of_threads_gives_the_same_bits)
{
    float one[2], three[2];
    fg_store *s1, *s2;
    fg_backend *b1, *b2;
    size_t peak;
    train(false, 1, 2, one, &s1, &b1, &peak);
    train(false, 3, 2, three, &s2, &b2, &peak);
    cr_assert(!memcmp(one, three, sizeof one), "%.9g %.9g", (double)one[1], (double)three[1]);
    expect_equal_stores(s1, s2);
    fg_store_free(s1); fg_store_free(s2);
    fg_backend_close(b1); fg_backend_close(b2);
}

Test(plan, accumulation_over_micro_batches_equals_one_batch)
{
    fg_backend *b = fg_backend_open("cpu", 2);
    float w[2][6];
    for (int micro = 0; micro < 2; micro++) {
        fg_store *s = fg_store_new(b);
        fg_graph *g = fg_graph_new(), *u = NULL;
        const int rows = micro ? 2 : 4;
        fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(rows, 3));
        fg_tensor weight = fg_param(g, "w", FG_DIMS(2, 3),
                                    ((fg_init){ .kind = FG_NORMAL, .a = 1 }));
        fg_tensor y = fg_linear(x, weight, ((fg_tensor){ 0 }));
        fg_tensor loss = fg_mean(fg_mul(y, y));
        fg_optimizer o = adamw;
        o.micro_batches = micro ? 2 : 1;
        cr_assert_eq(fg_train_graph(loss, &o, &u), FG_OK, "%s", fg_graph_message(g));
        fg_store_init(s, g, 5);
        fg_plan *p = fg_plan_new(g, s), *q = u ? fg_plan_new(u, s) : NULL;
        const float data[12] = { 1, -2, 3, 0.5f, 0.25f, -1, 2, 2, 1, -1, 0, 4 };
        const float lr = 0.1f, step = 1;
        for (int m = 0; m <= micro; m++) {
            fg_write(p, x, data + 6 * m, (size_t)rows * 12);
            fg_plan *at = q ? q : p;
            const fg_graph *h = q ? u : g;
            fg_write(at, fg_find(h, "lr"), &lr, 4);
            fg_write(at, fg_find(h, "step"), &step, 4);
            cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
        }
        if (q) cr_assert_eq(fg_run(q), FG_OK, "%s", fg_plan_message(q));
        fg_store_get(s, "w", w[micro], sizeof w[micro]);
        fg_plan_free(p); fg_plan_free(q);
        fg_graph_free(g); fg_graph_free(u);
        fg_store_free(s);
    }
    for (int i = 0; i < 6; i++)
        cr_expect_float_eq(w[0][i], w[1][i], 1e-5, "%d: %g %g", i, (double)w[0][i],
                           (double)w[1][i]);
    fg_backend_close(b);
}

Test(plan, equal_nodes_become_one_and_dead_nodes_go)
{
    fg_backend *b = fg_backend_open("cpu", 1);
    fg_store *s = fg_store_new(b);
    fg_graph *g = fg_graph_new();
    fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(4));
    fg_tensor a = fg_exp(x), twin = fg_exp(x);
    fg_tensor dead = fg_sqrt(x);
    (void)dead;
    fg_output(fg_add(a, twin), "y");
    fg_plan *p = fg_plan_new(g, s);
    cr_assert_eq(fg_plan_describe(p).nodes, 2);
    float in[4] = { 0, 1, 2, 3 }, out[4];
    fg_write(p, x, in, sizeof in);
    fg_run(p);
    fg_read(p, fg_find(g, "y"), out, sizeof out);
    for (int i = 0; i < 4; i++) cr_expect_float_eq(out[i], 2 * expf(in[i]), 1e-4);
    fg_plan_free(p);
    fg_graph_free(g);
    fg_store_free(s);
    fg_backend_close(b);
}

static fg_backend_ops partial;
static const char *no_norm(fg_backend *b, const fg_op *op, const fg_infer *c)
{
    (void)b; (void)c;
    const bool left_out = !strcmp(op->name, "rms_norm") || !strcmp(op->name, "swiglu");
    return left_out ? "left out in this test" : NULL;
}

Test(plan, a_node_without_a_kernel_runs_by_its_definition)
{
    fg_backend *b = fg_backend_open("cpu", 2), *c = fg_backend_open("cpu", 2);
    partial = *c->ops;
    partial.unfit = no_norm;
    c->ops = &partial;
    float loss[2];
    for (int k = 0; k < 2; k++) {
        fg_store *s = fg_store_new(k ? c : b);
        fg_graph *g = fg_graph_new();
        fg_output(small_fox_loss(g, false), "loss");
        fg_store_init(s, g, 1);
        fg_plan *p = fg_plan_new(g, s);
        feed(p, g, 0);
        if (fg_plan_status(p) == FG_ERR_USAGE) { fg_plan_free(p); p = fg_plan_new(g, s); }
        int32_t ids[96] = { 1, 2, 3 };
        fg_write(p, fg_find(g, "tokens"), ids, sizeof ids);
        fg_write(p, fg_find(g, "labels"), ids, sizeof ids);
        cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
        fg_read(p, fg_find(g, "loss"), &loss[k], 4);
        for (uint32_t i = 0; k && i < p->low->n_nodes; i++)
            cr_assert(!no_norm(c, p->low->nodes[i].op, NULL), "%s was not lowered",
                      p->low->nodes[i].op->name);
        fg_plan_free(p);
        fg_graph_free(g);
        fg_store_free(s);
    }
    cr_assert_float_eq(loss[0], loss[1], 1e-5, "%g %g", (double)loss[0], (double)loss[1]);
    fg_backend_close(b);
    fg_backend_close(c);
}

Test(plan, a_node_that_overwrites_runs_after_all_readers)
{
    fg_backend *b = fg_backend_open("cpu", 1);
    fg_store *s = fg_store_new(b);
    fg_graph *g = fg_graph_new();
    fg_tensor acc = fg_state(g, "@acc", FG_F32, FG_DIMS(2));
    fg_tensor one = fg_fill(g, FG_DIMS(2), 1);
    fg_tensor next = FG_APPLY(accumulate, FG_HERE, ((const fg_tensor[]){ acc, one }), 1.0);
    fg_output(fg_scale(next, 10, 0), "after");
    fg_output(fg_scale(acc, 10, 0), "before");
    fg_plan *p = fg_plan_new(g, s);
    for (int i = 0; i < 3; i++) {
        float before[2], after[2];
        cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
        fg_read(p, fg_find(g, "before"), before, 8);
        fg_read(p, fg_find(g, "after"), after, 8);
        cr_expect_eq(before[0], 10.0f * (float)i);
        cr_expect_eq(after[1], 10.0f * (float)(i + 1));
    }
    fg_plan_free(p);
    fg_graph_free(g);
    fg_store_free(s);
    fg_backend_close(b);
}

Test(plan, check_names_the_first_node_that_is_not_finite)
{
    fg_backend *b = fg_backend_open("cpu", 1);
    fg_store *s = fg_store_new(b);
    fg_graph *g = fg_graph_new();
    fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(2));
    fg_tensor y = fg_log(x);
    const int line = __LINE__ - 1;
    fg_output(fg_exp(y), "z");
    fg_plan *p = fg_plan_new(g, s);
    p->check = true;
    const float in[2] = { 1, -1 };
    fg_write(p, x, in, sizeof in);
    cr_assert_eq(fg_run(p), FG_ERR_NUMERIC);
    char want[100];
    snprintf(want, sizeof want, "test_plan.c:%d: log: element 1 of output 0, f32[2], is", line);
    cr_expect(strstr(fg_plan_message(p), want), "%s", fg_plan_message(p));
    fg_plan_free(p);
    fg_graph_free(g);
    fg_store_free(s);
    fg_backend_close(b);
}
