/* test_f64_ops.c - every op, every example, in double: the kernel equals its definition, and
 * gradients equal central differences. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "ops.h"
#include "plan.h"
#include "fox_autodiff.h"

/* Outputs beside the first that carry gradients of their own. */
static bool differentiable(const char *outs, int k)
{
    for (; k > 0; k--) { outs += strcspn(outs, " "); outs += *outs == ' '; }
    return !strncmp(outs, "lse", 3) || !strncmp(outs, "sum", 3) || !strncmp(outs, "end", 3)
        || !strncmp(outs, "state", 5) || !strncmp(outs, "log_f", 5);
}

static void add_to(fg_tensor *loss, fg_tensor y)
{
    if (!fg_ok(y) || fg_dtype_of(y) == FG_I32) return;
    fg_tensor w = (fg_random)(FG_HERE, y.graph, fg_shape_of(y));
    fg_tensor weighted = fg_mul(y, w);
    fg_tensor part = fg_sum(weighted);
    *loss = fg_absent(*loss) ? part : fg_add(*loss, part);
}

/* sum of y * random weights, so that no gradient cancels by symmetry */
static fg_tensor loss_of(fg_tensor y)
{
    fg_tensor in[FG_MAX_IN], loss = { 0 };
    int n_in;
    const fg_op *op = fg__producer(y, in, &n_in, NULL);
    add_to(&loss, y);
    if (op && strchr(op->outs, ' ') && differentiable(op->outs, 1)) add_to(&loss, fg_result(y, 1));
    return loss;
}

static void put_line(void *to, const char *line) { fputs(line, to); }

static void check_gradient(const char *what, fg_graph *g, fg_tensor y, fg_backend *b)
{
    fg_tensor loss = loss_of(y);
    cr_assert_eq(fg_graph_status(g), FG_OK, "%s: %s", what, fg_graph_message(g));
    fg_store *s = fg_store_new(b);
    cr_assert_eq(fg_store_init(s, g, 7), FG_OK, "%s", fg_store_message(s));
    fg_gradcheck_result r;
    const fg_status st = fg_gradcheck(loss, s, 0, getenv("FG_TEST_OP") ? put_line : NULL, stderr,
                                      &r);
    cr_assert_eq(st, FG_OK, "%s: gradcheck: %s; %s", what, fg_status_text(st), fg_graph_message(g));
    cr_expect_lt(r.worst, 1e-6, "%s: gradient of %s is off by %.1e", what, r.where, r.worst);
    fg_store_free(s);
}

/* The node of this op that the example made. */
static uint32_t node_of(const fg_graph *g, const fg_op *op)
{
    for (uint32_t k = g->n_nodes; k-- > 0; ) if (g->nodes[k].op == op) return k;
    return FG_NO_NODE;
}

static void compare(const char *what, int o, const fg_real *x, const fg_real *y, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        const double a = (double)x[i], d = (double)y[i];
        cr_assert(a == d || fabs(a - d) <= 1e-12 * (1 + fabs(d)),
                  "%s: output %d, element %lld: kernel %.15g, definition %.15g", what, o,
                  (long long)i, a, d);
    }
}

static void check_definition(const char *what, fg_graph *g, uint32_t k, fg_backend *b)
{
    const fg_node n = g->nodes[k];
    fg_tensor in[FG_MAX_IN] = { { 0 } }, def[FG_MAX_OUT] = { { 0 } };
    for (int i = 0; i < n.n_in; i++) if (n.in[i]) in[i] = (fg_tensor){ g, n.in[i] };
    n.op->code->decompose(in, n.attr, def);
    cr_assert_eq(fg_graph_status(g), FG_OK, "%s: definition: %s", what, fg_graph_message(g));
    cr_assert(fg_ok(def[0]), "%s: the definition gives no first output", what);
    for (int o = 0; o < n.n_out; o++) {
        fg_output(((fg_tensor){ g, n.out[o] }), fg_name(g, "kernel%d", o));
        if (fg_ok(def[o])) fg_output(def[o], fg_name(g, "definition%d", o));
    }
    fg_store *s = fg_store_new(b);
    fg_store_init(s, g, 7);
    fg_plan *p = fg_plan_new(g, s);
    cr_assert_eq(fg_run(p), FG_OK, "%s: %s", what, fg_plan_message(p));
    for (int o = 0; o < n.n_out; o++) {
        if (!fg_ok(def[o])) continue;
        cr_assert(fg_shape_equal(g->values[n.out[o]].shape, fg_shape_of(def[o])),
                  "%s: output %d: the definition has another shape", what, o);
        compare(what, o, fg__plan_data(p, (fg_tensor){ g, n.out[o] }), fg__plan_data(p, def[o]),
                fg_count(def[o]));
    }
    fg_plan_free(p);
    fg_store_free(s);
}

static void check_op(const fg_op *op, fg_backend *b)
{
    cr_assert(op->code != NULL, "%s has no code", op->name);
    for (int i = 0; op->code->example; i++) {
        char what[100];
        snprintf(what, sizeof what, "%s, example %d", op->name, i);
        fg_graph *g = fg_graph_new();
        fg_tensor y = op->code->example(g, i);
        cr_assert(y.graph || i > 0, "%s has no examples", op->name);
        if (!y.graph) { fg_graph_free(g); break; }
        cr_assert_eq(fg_graph_status(g), FG_OK, "%s: %s", what, fg_graph_message(g));
        const uint32_t k = node_of(g, op);
        if (k != FG_NO_NODE && op->code->decompose) check_definition(what, g, k, b);
        fg_graph_free(g);
        g = fg_graph_new();
        y = op->code->example(g, i);
        if (!op->code->no_grad) check_gradient(what, g, y, b);
        fg_graph_free(g);
    }
}

Test(ops, kernels_equal_definitions_and_gradients_equal_differences)
{
    const char *only = getenv("FG_TEST_OP");
    fg_backend *b = fg_backend_open("cpu", 2);
    int examined = 0;
    for (int i = 0; i < FG_OP_COUNT; i++) {
        if (only && strcmp(only, fg_op_table[i].name)) continue;
        check_op(&fg_op_table[i], b);
        examined++;
    }
    cr_assert_gt(examined, 0, "no op was examined");
    fg_backend_close(b);
}

static bool ends(const char *name, const char *with)
{
    const size_t n = strlen(name), m = strlen(with);
    return n > m && !strcmp(name + n - m, with);
}

Test(ops, every_op_has_an_example_or_is_a_gradient_or_an_update)
{
    for (int i = 0; i < FG_OP_COUNT; i++) {
        const fg_op *op = &fg_op_table[i];
        const bool gradient = ends(op->name, "_grad") || ends(op->name, "_dx") ||
            ends(op->name, "_dw");
        if (op->code->memory == FG_MUTATE || op->code->no_grad || gradient) continue;
        cr_expect(op->code->example != NULL, "%s has no example", op->name);
    }
}
