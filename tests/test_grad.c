/* test_grad.c - the reverse sweep itself: what reaches a gradient, scopes computed again, refusals.
 * The gradients of single ops are in test_f64_ops.c. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include "fox_graph.h"
#include "ops.h"

static const fg_init normal = { .kind = FG_NORMAL, .a = 1 };

/* Runs g on its parameters' first values and reads count numbers of t, which becomes an output. */
static void value(fg_graph *g, fg_tensor t, float *out, int count)
{
    fg_backend *b = fg_backend_open("cpu", 1);
    fg_store *s = fg_store_new(b);
    fg_output(t, fg_name(g, "read%u", t.id));
    cr_assert_eq(fg_graph_status(g), FG_OK, "%s", fg_graph_message(g));
    fg_store_init(s, g, 1);
    fg_plan *p = fg_plan_new(g, s);
    cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
    cr_assert_eq(fg_read(p, t, out, (size_t)count * 4), FG_OK, "%s", fg_plan_message(p));
    fg_plan_free(p);
    fg_store_free(s);
    fg_backend_close(b);
}

static void expect_error(const fg_graph *g, fg_status s, const char *text)
{
    cr_expect_eq(fg_graph_status(g), s, "%s", fg_graph_message(g));
    cr_expect(strstr(fg_graph_message(g), text), "%s", fg_graph_message(g));
}

Test(grad, a_parameter_that_is_the_loss_has_gradient_one)
{
    fg_graph *g = fg_graph_new();
    fg_tensor w = fg_param(g, "w", FG_DIMS(1), normal);
    fg_tensor other = fg_param(g, "o", FG_DIMS(1), normal);
    const fg_tensor wrt[3] = { w, other, w };
    fg_tensor d[3];
    float x;
    cr_assert_eq(fg_grad(w, 3, wrt, d), FG_OK);
    cr_expect(fg_absent(d[1]) && d[2].id == d[0].id);
    value(g, d[0], &x, 1);
    cr_expect_eq(x, 1);
    fg_graph_free(g);
}

Test(grad, gradients_of_all_uses_are_added)
{
    fg_graph *g = fg_graph_new();
    fg_tensor w = fg_param(g, "w", FG_DIMS(3), normal), d;
    fg_tensor y = fg_add(fg_scale(w, 2, 0), fg_add(w, w));
    y = fg_add(y, fg_reshape(fg_reshape(w, FG_DIMS(3, 1)), FG_DIMS(3)));
    float x[3];
    cr_assert_eq(fg_grad(fg_sum(y), 1, &w, &d), FG_OK);
    value(g, d, x, 3);
    for (int i = 0; i < 3; i++) cr_expect_eq(x[i], 5);
    fg_graph_free(g);
}

/* d/dw sum (d/dw sum w^3) = 6 w */
Test(grad, a_gradient_can_be_differentiated)
{
    fg_graph *g = fg_graph_new();
    fg_tensor w = fg_param(g, "w", FG_DIMS(3), normal), d, dd;
    cr_assert_eq(fg_grad(fg_sum(fg_mul(w, fg_mul(w, w))), 1, &w, &d), FG_OK);
    cr_assert_eq(fg_grad(fg_sum(d), 1, &w, &dd), FG_OK);
    fg_tensor want = fg_scale(w, 6, 0), off = fg_sub(dd, want);
    float x[3];
    value(g, off, x, 3);
    for (int i = 0; i < 3; i++) cr_expect_float_eq(x[i], 0, 1e-5);
    fg_graph_free(g);
}

Test(grad, a_loss_in_bf16_is_differentiated)
{
    fg_graph *g = fg_graph_new();
    fg_tensor w = fg_param(g, "w", FG_DIMS(4), normal), d;
    fg_tensor h = fg_cast(w, FG_BF16), loss = fg_row_sum(fg_mul(h, h));
    cr_assert_eq(fg_dtype_of(loss), FG_BF16);
    cr_assert_eq(fg_grad(loss, 1, &w, &d), FG_OK, "%s", fg_graph_message(g));
    float x[4], y[4];
    fg_tensor twice = fg_cast(fg_scale(h, 2, 0), FG_F32);
    value(g, d, x, 4);
    value(g, twice, y, 4);
    cr_expect(!memcmp(x, y, sizeof x));
    fg_graph_free(g);
}

static fg_status same_infer(fg_infer *c) { (void)c; return FG_OK; }
static void same(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    out[0] = in[0];
    out[1] = in[0];
    (void)attr;
}

Test(grad, a_definition_may_return_its_input_and_more_than_once)
{
    static const fg_attr_field none = { 0 };
    static const fg_op_code code = { .infer = same_infer, .decompose = same };
    static const fg_op copies = { "copies", "x", "y z", "", 1, &none, &code };
    for (int again = 0; again < 2; again++) {
        fg_graph *g = fg_graph_new();
        fg_tensor w = fg_param(g, "w", FG_DIMS(3), normal), d;
        fg_scope_push(g, "part");
        if (again) fg_scope_recompute(g);
        fg_tensor in = fg_scale(w, 1, 0);
        fg_tensor y = fg__apply(&copies, FG_HERE, NULL, 1, &in, "");
        fg_tensor sum = fg_add(fg_scale(y, 10, 0), fg_scale(fg_result(y, 1), 100, 0));
        fg_scope_pop(g);
        sum = fg_add(sum, in);
        float x[3];
        cr_assert_eq(fg_grad(fg_sum(sum), 1, &w, &d), FG_OK, "%s", fg_graph_message(g));
        value(g, d, x, 3);
        for (int i = 0; i < 3; i++) cr_expect_eq(x[i], 111, "%g", (double)x[i]);
        fg_graph_free(g);
    }
}

/* ---- scopes computed again ------------------------------------------------------------------ */

/* Two nested scopes; values of both are used inside, outside and as outputs. */
static void nested(bool outer, bool inner, float *out)
{
    fg_graph *g = fg_graph_new();
    fg_tensor w = fg_param(g, "w", FG_DIMS(4), normal), v = fg_param(g, "v", FG_DIMS(4), normal);
    fg_scope_push(g, "outer");
    if (outer) fg_scope_recompute(g);
    fg_tensor a = fg_tanh(fg_mul(w, v));
    fg_scope_push(g, "inner");
    if (inner) fg_scope_recompute(g);
    fg_tensor b = fg_silu(fg_mul(a, v));
    fg_tensor c = fg_reshape(fg_exp(b), FG_DIMS(2, 2));
    fg_scope_pop(g);
    fg_tensor e = fg_mul(a, fg_reshape(c, FG_DIMS(4)));
    fg_scope_pop(g);
    fg_output(b, "leaves_the_inner");
    fg_tensor loss = fg_sum(fg_add(fg_mul(e, b), fg_sigmoid(a)));
    const fg_tensor wrt[2] = { w, v };
    fg_tensor d[2];
    cr_assert_eq(fg_grad(loss, 2, wrt, d), FG_OK, "%s", fg_graph_message(g));
    value(g, d[0], out, 4);
    value(g, d[1], out + 4, 4);
    value(g, loss, out + 8, 1);
    value(g, b, out + 9, 4);
    fg_graph_free(g);
}

Test(grad, recomputing_any_of_nested_scopes_changes_no_bit)
{
    float want[13], got[13];
    nested(false, false, want);
    for (int i = 1; i < 4; i++) {
        nested(i & 1, i & 2, got);
        cr_expect(!memcmp(want, got, sizeof want), "outer %d, inner %d", i & 1, i >> 1);
    }
}

/* d/dw sum (d/dw sum tanh(w)^3), through a scope that is computed again or not */
Test(grad, a_gradient_through_a_recomputed_scope_can_be_differentiated)
{
    float x[2][3];
    for (int again = 0; again < 2; again++) {
        fg_graph *g = fg_graph_new();
        fg_tensor w = fg_param(g, "w", FG_DIMS(3), normal), d, dd;
        fg_scope_push(g, "part");
        if (again) fg_scope_recompute(g);
        fg_tensor t = fg_tanh(w), y = fg_mul(t, fg_mul(t, t));
        fg_scope_pop(g);
        cr_assert_eq(fg_grad(fg_sum(y), 1, &w, &d), FG_OK);
        cr_assert_eq(fg_grad(fg_sum(fg_mul(d, d)), 1, &w, &dd), FG_OK, "%s", fg_graph_message(g));
        value(g, dd, x[again], 3);
        fg_graph_free(g);
    }
    cr_expect(!memcmp(x[0], x[1], sizeof x[0]), "%g %g", (double)x[0][0], (double)x[1][0]);
}

/* ---- refusals ------------------------------------------------------------------------------- */

Test(grad, tensors_of_another_graph_are_refused)
{
    fg_graph *g = fg_graph_new(), *h = fg_graph_new();
    fg_tensor w = fg_param(g, "w", FG_DIMS(1), normal), d[2];
    fg_tensor far = fg_param(h, "x", FG_DIMS(1), normal);
    for (int i = 0; i < 5000; i++) far = fg_exp(far);
    const fg_tensor wrt[2] = { w, far };
    cr_expect_eq(fg_grad(w, 2, wrt, d), FG_ERR_USAGE);
    expect_error(g, FG_ERR_USAGE, "grad: tensor 1 belongs to another graph than the loss");
    fg_graph_free(g);
    fg_graph_free(h);
}

Test(grad, integers_have_no_gradient)
{
    fg_graph *g = fg_graph_new();
    fg_tensor n = fg_input(g, "n", FG_I32, FG_DIMS(1)), d;
    cr_expect_eq(fg_grad(n, 1, &n, &d), FG_ERR_DTYPE);
    expect_error(g, FG_ERR_DTYPE, "grad: the loss must be f32 or bf16");
    fg_graph_free(g);
}

Test(grad, an_op_without_gradient_on_the_path_is_named)
{
    fg_graph *g = fg_graph_new();
    fg_tensor w = fg_param(g, "w", FG_DIMS(2), normal), d;
    fg_tensor acc = fg_state(g, "@acc", FG_F32, FG_DIMS(2));
    fg_tensor y = FG_APPLY(accumulate, FG_HERE, ((const fg_tensor[]){ acc, w }), 1.0);
    fg_grad(fg_sum(y), 1, &w, &d);
    expect_error(g, FG_ERR_NO_VJP, "accumulate: has no gradient");
    cr_expect(fg_absent(d));
    fg_graph_free(g);
}

/* ---- training graphs ------------------------------------------------------------------------ */

static const fg_optimizer adamw = { 0.9, 0.95, 1e-8, 0.1, 1.0, 1 };

Test(grad, a_model_may_call_its_loss_an_output_itself)
{
    fg_graph *g = fg_graph_new();
    fg_tensor w = fg_param(g, "w", FG_DIMS(2), normal);
    fg_tensor loss = fg_output(fg_sum(fg_mul(w, w)), "loss");
    cr_expect_eq(fg_train_graph(loss, &adamw, NULL), FG_OK, "%s", fg_graph_message(g));
    fg_graph_free(g);
}

Test(grad, an_update_graph_that_failed_is_reported)
{
    fg_graph *g = fg_graph_new(), *update;
    fg_tensor w = fg_param(g, "lr", FG_DIMS(2), normal);         /* the update has an input "lr" */
    fg_optimizer o = adamw;
    o.micro_batches = 2;
    cr_expect_eq(fg_train_graph(fg_sum(fg_mul(w, w)), &o, &update), FG_ERR_USAGE);
    cr_expect(strstr(fg_graph_message(update), "\"lr\" is already the name"), "%s",
              fg_graph_message(update));
    fg_graph_free(g);
    fg_graph_free(update);
}

Test(grad, frozen_parameters_and_those_without_gradient_do_not_move)
{
    fg_backend *b = fg_backend_open("cpu", 1);
    fg_store *s = fg_store_new(b);
    fg_graph *g = fg_graph_new();
    fg_tensor w = fg_param(g, "w", FG_DIMS(2), normal);
    fg_tensor f = fg_param(g, "f", FG_DIMS(2), ((fg_init){ .kind = FG_ONES, .frozen = true }));
    fg_param(g, "unused", FG_DIMS(2), ((fg_init){ .kind = FG_ONES }));
    cr_assert_eq(fg_train_graph(fg_sum(fg_mul(w, f)), &adamw, NULL), FG_OK);
    fg_store_init(s, g, 1);
    fg_plan *p = fg_plan_new(g, s);
    const float one = 1;
    float before[2], x[2];
    fg_store_get(s, "w", before, sizeof before);
    fg_write(p, fg_find(g, "lr"), &one, 4);
    fg_write(p, fg_find(g, "step"), &one, 4);
    cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
    fg_store_get(s, "w", x, sizeof x);
    cr_expect(x[0] != before[0] && x[1] != before[1]);
    fg_store_get(s, "f", x, sizeof x);
    cr_expect(x[0] == 1 && x[1] == 1);
    fg_store_get(s, "unused", x, sizeof x);
    cr_expect(x[0] == 1 && x[1] == 1, "decay alone moved it");
    fg_plan_free(p);
    fg_graph_free(g);
    fg_store_free(s);
    fg_backend_close(b);
}
