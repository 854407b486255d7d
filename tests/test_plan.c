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

typedef struct { fg_backend *b; fg_store *s; fg_graph *g; fg_plan *p; } lab;

static lab open_lab(int threads)
{
    lab l = { .b = fg_backend_open("cpu", threads) };
    l.s = fg_store_new(l.b);
    l.g = fg_graph_new();
    return l;
}

static fg_plan *plan_of(lab *l) { return l->p = fg_plan_new(l->g, l->s); }

static void close_lab(lab *l)
{
    fg_plan_free(l->p);
    fg_graph_free(l->g);
    fg_store_free(l->s);
    fg_backend_close(l->b);
}

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
    lab l = open_lab(2);
    cr_assert_eq(fg_train_graph(small_fox_loss(l.g, false), &adamw, NULL), FG_OK, "%s",
                 fg_graph_message(l.g));
    fg_plan *p = plan_of(&l);
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
    close_lab(&l);
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

Test(plan, what_is_kept_and_what_is_computed_again_is_told)
{
    fg_plan_info info[2];
    for (int again = 0; again < 2; again++) {
        lab l = open_lab(1);
        cr_assert_eq(fg_train_graph(small_fox_loss(l.g, again), &adamw, NULL), FG_OK);
        const fg_plan *p = plan_of(&l);
        double flops = 0;
        for (uint32_t k = 0; k < p->low->n_nodes; k++)
            if (p->low->nodes[k].recomputed) flops += fg__cost_of(p->low, &p->low->nodes[k]).flops;
        info[again] = fg_plan_describe(p);
        cr_expect_float_eq(info[again].again_flops, flops, 0);
        cr_expect_leq(info[again].saved, info[again].activations);
        close_lab(&l);
    }
    cr_expect_float_eq(info[0].again_flops, 0, 0);
    cr_expect_gt(info[1].again_flops, 0);
    cr_expect_float_eq(info[1].flops - info[0].flops, info[1].again_flops, 1);
    cr_expect_lt(2 * info[1].saved, info[0].saved);
    cr_expect_gt(info[1].saved, 0);
}

Test(plan, a_gradient_is_added_to_its_sum_before_the_next_is_made)
{
    lab l = open_lab(1);
    fg_optimizer o = adamw;
    fg_graph *u = NULL;
    o.micro_batches = 2;
    cr_assert_eq(fg_train_graph(small_fox_loss(l.g, true), &o, &u), FG_OK, "%s",
                 fg_graph_message(l.g));
    const fg_graph *low = plan_of(&l)->low;
    int sums = 0, waiting = 0;               /* waiting: gradients made and not yet added */
    for (uint32_t k = 0; k < low->n_nodes; k++) {
        const char *op = low->nodes[k].op->name;
        waiting += !strcmp(op, "linear_dw");
        if (strcmp(op, "accumulate")) continue;
        const uint32_t made = low->values[low->nodes[k].in[1]].node;
        waiting -= !strcmp(low->nodes[made].op->name, "linear_dw");
        sums++;
        cr_expect_leq(waiting, 1, "node %u: %d gradients wait", k, waiting);
    }
    cr_expect_gt(sums, 20);
    cr_expect_eq(waiting, 0);
    fg_graph_free(u);
    close_lab(&l);
}

Test(plan, equal_nodes_become_one_and_dead_nodes_go)
{
    lab l = open_lab(1);
    fg_tensor x = fg_input(l.g, "x", FG_F32, FG_DIMS(4));
    fg_tensor a = fg_exp(x), twin = fg_exp(x);
    fg_tensor dead = fg_sqrt(x);
    (void)dead;
    fg_output(fg_add(a, twin), "y");
    fg_plan *p = plan_of(&l);
    cr_assert_eq(fg_plan_describe(p).nodes, 2);
    float in[4] = { 0, 1, 2, 3 }, out[4];
    fg_write(p, x, in, sizeof in);
    fg_run(p);
    fg_read(p, fg_find(l.g, "y"), out, sizeof out);
    for (int i = 0; i < 4; i++) cr_expect_float_eq(out[i], 2 * expf(in[i]), 1e-4);
    close_lab(&l);
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
    lab l = open_lab(1);
    fg_tensor acc = fg_state(l.g, "@acc", FG_F32, FG_DIMS(2));
    fg_tensor one = fg_fill(l.g, FG_DIMS(2), 1);
    fg_tensor next = FG_APPLY(accumulate, FG_HERE, ((const fg_tensor[]){ acc, one }), 1.0);
    fg_output(fg_scale(next, 10, 0), "after");
    fg_output(fg_scale(acc, 10, 0), "before");
    fg_plan *p = plan_of(&l);
    for (int i = 0; i < 3; i++) {
        float before[2], after[2];
        cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
        fg_read(p, fg_find(l.g, "before"), before, 8);
        fg_read(p, fg_find(l.g, "after"), after, 8);
        cr_expect_eq(before[0], 10.0f * (float)i);
        cr_expect_eq(after[1], 10.0f * (float)(i + 1));
    }
    close_lab(&l);
}

Test(plan, check_names_the_first_node_that_is_not_finite)
{
    lab l = open_lab(1);
    fg_tensor x = fg_input(l.g, "x", FG_F32, FG_DIMS(2));
    fg_tensor y = fg_log(x);
    const int line = __LINE__ - 1;
    fg_output(fg_exp(y), "z");
    fg_plan *p = plan_of(&l);
    p->check = true;
    const float in[2] = { 1, -1 };
    fg_write(p, x, in, sizeof in);
    cr_assert_eq(fg_run(p), FG_ERR_NUMERIC);
    char want[100];
    snprintf(want, sizeof want, "test_plan.c:%d: log: element 1 of output 0, f32[2], is", line);
    cr_expect(strstr(fg_plan_message(p), want), "%s", fg_plan_message(p));
    close_lab(&l);
}

/* ---- what may share memory, and in what order ----------------------------------------------- */

/* [5] and [3,5] take as many bytes once both are rounded up to 64. */
Test(plan, a_value_that_broadcasts_is_not_overwritten_in_place)
{
    lab l = open_lab(1);
    fg_tensor row = fg_input(l.g, "row", FG_F32, FG_DIMS(5));
    fg_tensor x = fg_input(l.g, "x", FG_F32, FG_DIMS(3, 5));
    fg_tensor y = fg_output(fg_mul(fg_scale(row, 2, 0), x), "y");
    fg_plan *p = plan_of(&l);
    float r[5] = { 1, 2, 3, 4, 5 }, in[15], out[15];
    for (int i = 0; i < 15; i++) in[i] = (float)(i + 1);
    fg_write(p, row, r, sizeof r);
    fg_write(p, x, in, sizeof in);
    cr_assert_eq(fg_run(p), FG_OK);
    fg_read(p, y, out, sizeof out);
    for (int i = 0; i < 15; i++) cr_expect_eq(out[i], 2 * r[i % 5] * in[i], "element %d", i);
    close_lab(&l);
}

Test(plan, an_output_is_not_overwritten_in_place_nor_through_a_view)
{
    lab l = open_lab(1);
    fg_tensor x = fg_input(l.g, "x", FG_F32, FG_DIMS(2, 3));
    fg_tensor a = fg_scale(x, 2, 0), flat = fg_output(fg_reshape(a, FG_DIMS(6)), "flat");
    fg_tensor c = fg_scale(a, 5, 0), d = fg_output(fg_scale(c, 7, 0), "d");
    fg_tensor late = fg_output(fg_scale(fg_reshape(c, FG_DIMS(6)), 1, 1), "late");
    fg_plan *p = plan_of(&l);
    const float in[6] = { 1, 2, 3, 4, 5, 6 };
    float one[6], two[6], three[6];
    fg_write(p, x, in, sizeof in);
    cr_assert_eq(fg_run(p), FG_OK);
    fg_read(p, flat, one, sizeof one);
    fg_read(p, d, two, sizeof two);
    fg_read(p, late, three, sizeof three);
    for (int i = 0; i < 6; i++)
        cr_expect(one[i] == 2 * in[i] && two[i] == 70 * in[i] && three[i] == 10 * in[i] + 1);
    close_lab(&l);
}

Test(plan, readers_of_a_view_run_before_its_memory_is_overwritten)
{
    lab l = open_lab(1);
    fg_tensor acc = fg_state(l.g, "@acc", FG_F32, FG_DIMS(2, 2));
    fg_tensor one = fg_fill(l.g, FG_DIMS(2, 2), 1);
    fg_tensor view = fg_reshape(acc, FG_DIMS(4)), again = fg_reshape(view, FG_DIMS(1, 4));
    fg_tensor next = FG_APPLY(accumulate, FG_HERE, ((const fg_tensor[]){ acc, one }), 1.0);
    fg_output(fg_scale(fg_reshape(next, FG_DIMS(4)), 10, 0), "after");
    fg_output(fg_scale(again, 10, 0), "before");
    fg_plan *p = plan_of(&l);
    for (int i = 0; i < 3; i++) {
        float before[4], after[4];
        cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
        fg_read(p, fg_find(l.g, "before"), before, sizeof before);
        fg_read(p, fg_find(l.g, "after"), after, sizeof after);
        cr_expect_eq(before[3], 10.0f * (float)i);
        cr_expect_eq(after[0], 10.0f * (float)(i + 1));
    }
    close_lab(&l);
}

/* A state that is overwritten twice is overwritten in turn, each time after the readers of what it
 * held then. */
Test(plan, two_overwritings_in_a_row_keep_their_order)
{
    lab l = open_lab(1);
    fg_tensor acc = fg_state(l.g, "@acc", FG_F32, FG_DIMS(2));
    fg_tensor one = fg_fill(l.g, FG_DIMS(2), 1);
    fg_tensor first = FG_APPLY(accumulate, FG_HERE, ((const fg_tensor[]){ acc, one }), 1.0);
    fg_tensor then = FG_APPLY(accumulate, FG_HERE, ((const fg_tensor[]){ first, one }), 10.0);
    fg_tensor c = fg_output(fg_scale(then, 1, 0), "c"), a = fg_output(fg_scale(acc, 1, 0), "a");
    fg_tensor m = fg_output(fg_scale(first, 1, 0), "m");
    fg_plan *p = plan_of(&l);
    float x[3][2];
    cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
    fg_read(p, a, x[0], 8);
    fg_read(p, m, x[1], 8);
    fg_read(p, c, x[2], 8);
    cr_expect(x[0][0] == 0 && x[1][0] == 1 && x[2][0] == 11, "%g %g %g", (double)x[0][0],
              (double)x[1][0], (double)x[2][0]);
    close_lab(&l);
}

Test(plan, a_node_that_reads_before_and_after_is_refused)
{
    lab l = open_lab(1);
    fg_tensor acc = fg_state(l.g, "@acc", FG_F32, FG_DIMS(2));
    fg_tensor one = fg_fill(l.g, FG_DIMS(2), 1);
    fg_tensor next = FG_APPLY(accumulate, FG_HERE, ((const fg_tensor[]){ acc, one }), 1.0);
    fg_output(fg_add(acc, next), "both");
    fg_plan *p = plan_of(&l);
    cr_expect_eq(fg_plan_status(p), FG_ERR_USAGE);
    cr_expect(strstr(fg_plan_message(p), "add: reads @acc as it was before accumulate at"), "%s",
              fg_plan_message(p));
    fg_graph *h = fg_graph_new();               /* and so are two that overwrite one value */
    acc = fg_state(h, "@acc", FG_F32, FG_DIMS(2));
    one = fg_fill(h, FG_DIMS(2), 1);
    for (int i = 0; i < 2; i++)
        FG_APPLY(accumulate, FG_HERE, ((const fg_tensor[]){ acc, one }), 1.0);
    fg_plan *q = fg_plan_new(h, l.s);
    cr_expect_eq(fg_plan_status(q), FG_ERR_USAGE, "%s", fg_plan_message(q));
    fg_plan_free(q);
    fg_graph_free(h);
    close_lab(&l);
}

Test(plan, an_input_cannot_be_overwritten)
{
    lab l = open_lab(1);
    fg_tensor x = fg_input(l.g, "x", FG_F32, FG_DIMS(2)), one = fg_fill(l.g, FG_DIMS(2), 1);
    FG_APPLY(accumulate, FG_HERE, ((const fg_tensor[]){ fg_exp(x), one }), 1.0);
    fg_plan *p = plan_of(&l);
    cr_expect_eq(fg_plan_status(p), FG_ERR_USAGE);
    cr_expect(strstr(fg_plan_message(p), "neither a parameter nor a state"), "%s",
              fg_plan_message(p));
    close_lab(&l);
}

/* ---- definitions ---------------------------------------------------------------------------- */

static size_t planned(bool recompute, fg_backend *b, fg_store **out, float *loss, int *copies)
{
    fg_store *s = *out = fg_store_new(b);
    fg_graph *g = fg_graph_new();
    cr_assert_eq(fg_train_graph(small_fox_loss(g, recompute), &adamw, NULL), FG_OK);
    fg_store_init(s, g, 3);
    fg_plan *p = fg_plan_new(g, s);
    feed(p, g, 0);
    cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
    fg_read(p, fg_find(g, "loss"), loss, sizeof *loss);
    *copies = 0;
    for (uint32_t k = 0; k < p->low->n_nodes; k++) *copies += p->low->nodes[k].recomputed;
    const size_t bytes = fg_plan_describe(p).activations;
    fg_plan_free(p);
    fg_graph_free(g);
    return bytes;
}

Test(plan, what_is_recomputed_is_recomputed_in_smaller_ops_too)
{
    fg_backend *b = fg_backend_open("cpu", 1), *c = fg_backend_open("cpu", 1);
    partial = *c->ops;
    partial.unfit = no_norm;
    c->ops = &partial;
    fg_store *s[3];
    float loss[3];
    int copies[3];
    planned(true, b, &s[0], &loss[0], &copies[0]);
    const size_t kept = planned(false, c, &s[1], &loss[1], &copies[1]);
    const size_t again = planned(true, c, &s[2], &loss[2], &copies[2]);
    cr_expect_eq(loss[1], loss[2]);
    expect_equal_stores(s[1], s[2]);
    cr_expect(copies[1] == 0 && copies[2] > copies[0], "%d copies of kernels, %d of smaller ops",
              copies[0], copies[2]);
    cr_expect_lt(again, kept);
    for (int i = 0; i < 3; i++) fg_store_free(s[i]);
    fg_backend_close(b);
    fg_backend_close(c);
}

static fg_status two_infer(fg_infer *c) { (void)c; return FG_OK; }
static void half_a_definition(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    out[0] = fg_exp(in[0]);                              /* and nothing for out[1] */
    (void)attr;
}

Test(plan, a_definition_that_leaves_out_what_is_read_is_an_error)
{
    static const fg_attr_field none = { 0 };
    static const fg_op_code code = { .infer = two_infer, .decompose = half_a_definition };
    static const fg_op two = { "two", "x", "y z", "", 1, &none, &code };
    lab l = open_lab(1);
    fg_tensor x = fg_input(l.g, "x", FG_F32, FG_DIMS(2));
    fg_tensor y = fg__apply(&two, FG_HERE, NULL, 1, &x, "");
    fg_output(fg_sqrt(fg_result(y, 1)), "z");
    fg_plan *p = plan_of(&l);
    cr_expect_eq(fg_plan_status(p), FG_ERR_NO_KERNEL);
    cr_expect(strstr(fg_plan_message(p), "sqrt: needs output 1 of two, which its definition does "
                     "not give"), "%s", fg_plan_message(p));
    close_lab(&l);
}

/* ---- refusals ------------------------------------------------------------------------------- */

Test(plan, what_is_made_after_the_plan_is_not_in_it)
{
    lab l = open_lab(1);
    fg_tensor x = fg_input(l.g, "x", FG_F32, FG_DIMS(2));
    fg_output(fg_exp(x), "y");
    fg_plan *p = plan_of(&l);
    fg_tensor late = x;
    for (int i = 0; i < 1000; i++) late = fg_exp(late);
    float out[2];
    cr_expect_null(fg__plan_data(p, late));
    cr_expect_eq(fg_read(p, late, out, sizeof out), FG_ERR_USAGE);
    cr_expect_str_eq(fg_plan_message(p), "read: the tensor was made after the plan");
    close_lab(&l);
}

Test(plan, sizes_beyond_the_address_space_are_out_of_memory)
{
    lab l = open_lab(1);
    for (int i = 0; i < 9; i++)                          /* 9 * 2^61 bytes are 2^61 modulo 2^64 */
        fg_input(l.g, fg_name(l.g, "x%d", i), FG_F32, FG_DIMS((1LL << 59) - 1));
    fg_plan *p = plan_of(&l);
    cr_expect_eq(fg_plan_status(p), FG_ERR_MEMORY, "%zu bytes", fg_plan_describe(p).total);
    close_lab(&l);
}

static void count_text(void *to, const char *text) { *(size_t *)to += strlen(text); }

Test(plan, a_plan_that_failed_can_be_asked_and_dumped)
{
    lab l = open_lab(1);
    fg_tensor x = fg_input(l.g, "x", FG_F32, FG_DIMS(2));
    fg_tensor y = fg_input(l.g, "y", FG_F32, FG_DIMS(3));
    fg_exp(x);
    fg_add(x, y);
    fg_plan *p = plan_of(&l), *none = fg_plan_new(NULL, l.s), *bare = fg_plan_new(l.g, NULL);
    fg_plan *const all[] = { p, none, bare };
    for (int i = 0; i < 3; i++) {
        float v[2];
        size_t n = 0;
        cr_expect_neq(fg_plan_status(all[i]), FG_OK);
        cr_expect_neq(fg_run(all[i]), FG_OK);
        cr_expect_neq(fg_read(all[i], x, v, sizeof v), FG_OK);
        for (int stage = FG_STAGE_BUILT; stage <= FG_STAGE_PLANNED; stage++)
            for (int f = FG_DUMP_TEXT; f <= FG_DUMP_JSON; f++) {
                const bool ok = all[i] != none && stage == FG_STAGE_BUILT;
                cr_expect_eq(fg_plan_dump(all[i], (fg_stage)stage, (fg_dump_format)f, count_text,
                                          &n), ok ? FG_OK : FG_ERR_USAGE);
            }
        cr_expect_eq(n > 0, all[i] != none);
    }
    fg_plan_free(none);
    fg_plan_free(bare);
    close_lab(&l);
}

Test(plan, check_lets_minus_infinity_pass)
{
    lab l = open_lab(1);
    fg_tensor x = fg_input(l.g, "x", FG_F32, FG_DIMS(2));
    fg_output(fg_exp(fg_log(x)), "y");
    fg_plan *p = plan_of(&l);
    p->check = true;
    const float zero[2] = { 0, 1 }, huge[2] = { INFINITY, 1 };
    fg_write(p, x, zero, sizeof zero);
    cr_expect_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
    fg_write(p, x, huge, sizeof huge);
    cr_expect_eq(fg_run(p), FG_ERR_NUMERIC);
    close_lab(&l);
}

/* ---- every op in place ---------------------------------------------------------------------- */

/* All outputs of op's i-th example one after another, NULL past the last.  fresh: its inputs are
 * values that die there, so that it works in place; else they are parameters.  twin: input twin[1]
 * is replaced by input twin[0]. */
static float *results(const fg_op *op, int i, bool fresh, const int *twin, int64_t *n, int *shared)
{
    lab l = open_lab(1);
    fg_tensor t = op->code->example(l.g, i), in[FG_MAX_IN];
    if (fg_absent(t)) { close_lab(&l); return NULL; }
    uint32_t k = l.g->n_nodes;
    while (l.g->nodes[--k].op != op) { }
    const fg_node node = l.g->nodes[k];
    for (int j = 0; j < node.n_in; j++) {
        const uint32_t id = node.in[twin && j == twin[1] ? twin[0] : j];
        in[j] = id ? (fg_tensor){ l.g, id } : (fg_tensor){ 0 };
        if (fresh && id && fg_dtype_of(in[j]) != FG_I32) in[j] = fg_scale(in[j], 1, 0);
    }
    const fg_tensor y = fg__apply(op, FG_HERE, l.g, node.n_in, in, node.attr);
    for (int o = 0; o < node.n_out; o++) fg_output(fg_result(y, o), fg_name(l.g, "out%d", o));
    cr_assert_eq(fg_graph_status(l.g), FG_OK, "%s", fg_graph_message(l.g));
    fg_store_init(l.s, l.g, 4);
    fg_plan *p = plan_of(&l);
    cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
    for (uint32_t v = 1; v < p->low->n_values; v++)
        if (p->slots[v].reused && !strcmp(p->slots[v].reused, "in place")) ++*shared;
    *n = 0;
    for (int o = 0; o < node.n_out; o++) *n += fg_count(fg_result(y, o));
    float *all = malloc((size_t)*n * sizeof *all), *to = all;
    for (int o = 0; o < node.n_out; o++) {
        const fg_tensor out = fg_result(y, o);
        fg_read(p, out, to, (size_t)fg_count(out) * sizeof *to);
        to += fg_count(out);
    }
    close_lab(&l);
    return all;
}

static bool alike(const fg_op *op, int i, int a, int b)
{
    fg_graph *g = fg_graph_new();
    op->code->example(g, i);
    uint32_t k = g->n_nodes;
    while (g->nodes[--k].op != op) { }
    const fg_node *n = &g->nodes[k];
    const fg_value *x = &g->values[n->in[a]], *y = &g->values[n->in[b]];
    const bool same = n->in[a] && n->in[b] && x->type == y->type
                      && fg_shape_equal(x->shape, y->shape);
    fg_graph_free(g);
    return same;
}

static int compare_in_place(const fg_op *op, int i, const int *twin)
{
    int64_t n = 0, m = 0;
    int shared = 0;
    float *apart = results(op, i, false, twin, &n, &shared);
    float *inside = apart ? results(op, i, true, twin, &m, &shared) : NULL;
    if (!apart) return -1;
    cr_assert_eq(n, m);
    cr_expect(!memcmp(apart, inside, (size_t)n * sizeof *apart), "%s, example %d, inputs %d and %d "
              "the same: in place it gives other bits", op->name, i, twin ? twin[0] : 0,
              twin ? twin[1] : 0);
    free(apart);
    free(inside);
    return shared;
}

Test(plan, every_op_that_may_work_in_place_gives_the_same_bits_there)
{
    int cases = 0, shared = 0;
    for (int k = 0; k < FG_OP_COUNT; k++) {
        const fg_op *op = &fg_op_table[k];
        if (!op->code || !op->code->reuse || !op->code->example) continue;
        for (int i = 0, more; (more = compare_in_place(op, i, NULL)) >= 0; i++) {
            fg_graph *g = fg_graph_new();
            fg_tensor in[FG_MAX_IN];
            int n_in = 0;
            fg__producer(op->code->example(g, i), in, &n_in, NULL);
            fg_graph_free(g);
            shared += more;
            for (int a = 0; a < n_in; a++)
                for (int b = 0; b < n_in; b++)
                    if (a != b && alike(op, i, a, b))
                        shared += compare_in_place(op, i, (const int[]){ a, b });
            cases++;
        }
    }
    cr_expect(cases > 40 && shared > 40, "%d cases, %d in place", cases, shared);
}
