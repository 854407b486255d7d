/* test_errors.c - each refusal while building says the user's line, the op, the rule and the
 * shapes. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>
#include "fox_graph.h"

static char want[2000];
/* The message must begin with the line of the caller's call and contain the rest. */
static void expect(const fg_graph *g, fg_status s, int line, const char *text)
{
    snprintf(want, sizeof want, "test_errors.c:%d: %s", line, text);
    cr_expect_eq(fg_graph_status(g), s, "status %d, wanted %d", (int)fg_graph_status(g), (int)s);
    cr_expect(!strncmp(fg_graph_message(g), want, strlen(want)), "got:    %s\nwanted: %s",
              fg_graph_message(g), want);
}

static fg_tensor f32(fg_graph *g, const char *name, int64_t a, int64_t b)
{
    return fg_input(g, name, FG_F32, FG_DIMS(a, b));
}

Test(errors, shapes_that_do_not_broadcast)
{
    fg_graph *g = fg_graph_new();
    fg_tensor a = f32(g, "a", 2, 3), b = f32(g, "b", 2, 4);
    fg_add(a, b);
    expect(g, FG_ERR_SHAPE, __LINE__ - 1, "add: ");
    cr_expect(strstr(fg_graph_message(g), "f32[2,3]") && strstr(fg_graph_message(g), "f32[2,4]"),
              "%s", fg_graph_message(g));
    fg_graph_free(g);
}

Test(errors, a_linear_layer_of_the_wrong_width)
{
    fg_graph *g = fg_graph_new();
    fg_tensor x = f32(g, "x", 2, 768);
    fg_tensor w = fg_param(g, "w", FG_DIMS(10, 512), ((fg_init){ .kind = FG_ZEROS }));
    fg_linear(x, w, ((fg_tensor){ 0 }));
    expect(g, FG_ERR_SHAPE, __LINE__ - 1, "linear: ");
    cr_expect(strstr(fg_graph_message(g), "512") && strstr(fg_graph_message(g), "768"), "%s",
              fg_graph_message(g));
    fg_graph_free(g);
}

Test(errors, a_block_names_the_users_line)
{
    fg_graph *g = fg_graph_new();
    fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(2, 8, 768));
    fox_config c = fox_pro_config(256, 768, 1, 5);
    fg_scope_push(g, "block0");
    const int line = __LINE__ + 1;
    fox_block(x, &c);
    expect(g, FG_ERR_SHAPE, line, "");
    const char *all = fg_graph_message(g);
    cr_expect(strstr(all, "width 768 does not divide into 5 heads"), "%s", all);
    cr_expect(strstr(all, "in block0, opened at test_errors.c:"), "%s", all);
    fg_graph_free(g);
}

Test(errors, a_model_names_the_users_line_the_librarys_and_the_scope)
{
    fg_graph *g = fg_graph_new();
    fg_tensor tokens = fg_input(g, "tokens", FG_F32, FG_DIMS(2, 8));
    fox_config c = fox_pro_config(256, 768, 1, 6);
    fox_lm(tokens, &c);
    const int line = __LINE__ - 1;
    expect(g, FG_ERR_DTYPE, line, "embedding: tokens are f32; they must be i32");
    char scope[80];
    snprintf(scope, sizeof scope, "in model, opened at test_errors.c:%d", line);
    cr_expect(strstr(fg_graph_message(g), "\n    by lm.c:"), "%s", fg_graph_message(g));
    cr_expect(strstr(fg_graph_message(g), scope), "%s", fg_graph_message(g));
    fg_graph_free(g);
}

Test(errors, independent_mistakes_are_all_found)
{
    fg_graph *g = fg_graph_new();
    fg_tensor x = f32(g, "x", 4, 8);
    for (int i = 0; i < 3; i++) {
        fg_tensor bad = fg_param(g, fg_name(g, "gain%d", i), FG_DIMS(5),
                                 ((fg_init){ .kind = FG_ONES }));
        fg_tensor y = fg_rms_norm(x, bad, 1e-6, 1);
        y = fg_exp(y);                              /* follows from the error: not reported again */
        x = fg_add(x, y);
    }
    cr_expect_eq(fg_graph_errors(g), 3, "%d errors", fg_graph_errors(g));
    cr_expect(strstr(fg_graph_error(g, 2), "gain2"), "%s", fg_graph_error(g, 2));
    fg_graph_free(g);
}

Test(errors, two_parameters_of_one_name)
{
    fg_graph *g = fg_graph_new();
    fg_scope_push(g, "layer");
    fg_param(g, "w", FG_DIMS(2), ((fg_init){ .kind = FG_ZEROS }));
    fg_param(g, "w", FG_DIMS(2), ((fg_init){ .kind = FG_ZEROS }));
    expect(g, FG_ERR_USAGE, __LINE__ - 1,
           "param: \"layer.w\" is already the name of a value made at test_errors.c");
    fg_graph_free(g);
}

Test(errors, shapes_that_cannot_be)
{
    fg_graph *g = fg_graph_new();
    fg_input(g, "x", FG_F32, FG_DIMS(2, -1));
    expect(g, FG_ERR_USAGE, __LINE__ - 1, "input: an axis cannot have a negative extent");
    fg_graph_free(g);
    g = fg_graph_new();
    fg_input(g, "x", FG_F32, FG_DIMS(INT64_MAX / 2, 4));
    expect(g, FG_ERR_USAGE, __LINE__ - 1, "input: the shape has too many elements");
    fg_graph_free(g);
}

Test(errors, tensors_of_another_graph_and_missing_ones)
{
    fg_graph *g = fg_graph_new(), *h = fg_graph_new();
    fg_tensor a = f32(g, "a", 2, 2), b = f32(h, "b", 2, 2);
    fg_mul(a, b);
    expect(g, FG_ERR_USAGE, __LINE__ - 1, "mul: input 1 belongs to another graph");
    fg_graph_free(g);
    g = fg_graph_new();
    a = f32(g, "a", 2, 2);
    fg_mul(a, ((fg_tensor){ 0 }));
    expect(g, FG_ERR_USAGE, __LINE__ - 1, "mul: input 1 is missing");
    fg_graph_free(g);
    fg_graph_free(h);
}

Test(errors, a_loss_of_many_elements)
{
    fg_graph *g = fg_graph_new();
    fg_tensor w = fg_param(g, "w", FG_DIMS(3), ((fg_init){ .kind = FG_ONES })), d;
    fg_grad(w, 1, &w, &d);
    expect(g, FG_ERR_SHAPE, __LINE__ - 1, "grad: the loss must have exactly one element");
    fg_graph_free(g);
}

Test(errors, attention_with_a_gate_of_the_wrong_shape)
{
    fg_graph *g = fg_graph_new();
    fg_tensor q = fg_input(g, "q", FG_F32, FG_DIMS(1, 8, 2, 4));
    fg_tensor f = fg_input(g, "f", FG_F32, FG_DIMS(1, 8, 3));
    fg_forget_attention(q, q, q, f, 0.5, 0);
    expect(g, FG_ERR_SHAPE, __LINE__ - 1, "forget_attention: ");
    cr_expect(strstr(fg_graph_message(g), "f32[1,8,3]"), "%s", fg_graph_message(g));
    fg_graph_free(g);
}

Test(errors, a_setting_that_is_no_number)
{
    fg_graph *g = fg_graph_new();
    fg_graph_set(g, "layers", "many");
    cr_expect_eq(fg_setting_int(g, "layers", 4), 4);
    expect(g, FG_ERR_USAGE, __LINE__ - 1, "setting: layers=many is not an integer");
    fg_graph_free(g);
}

Test(errors, plans_refuse_what_they_cannot_run)
{
    fg_backend *b = fg_backend_open("cpu", 1);
    fg_store *s = fg_store_new(b);
    fg_graph *g = fg_graph_new();
    fg_tensor w = fg_param(g, "w", FG_DIMS(3), ((fg_init){ .kind = FG_ONES }));
    fg_output(fg_exp(w), "y");
    fg_plan *p = fg_plan_new(g, s);
    cr_expect_eq(fg_run(p), FG_ERR_USAGE);
    cr_expect_str_eq(fg_plan_message(p), "the store has no value for parameter w");
    fg_plan_free(p);
    const float five[5] = { 0 };
    fg_store_put(s, "w", FG_F32, FG_DIMS(5), five);
    p = fg_plan_new(g, s);
    cr_expect_eq(fg_run(p), FG_ERR_SHAPE);
    cr_expect_str_eq(fg_plan_message(p), "w is f32[5] in the store but f32[3] in the graph");
    fg_plan_free(p);
    fg_graph_free(g);
    fg_store_free(s);
    fg_backend_close(b);
}

Test(errors, devices_that_are_not_there)
{
    fg_backend *b = fg_backend_open("tpu", 0);
    cr_expect_eq(fg_backend_status(b), FG_ERR_USAGE);
    cr_expect_str_eq(fg_backend_message(b),
                     "no device is called \"tpu\"; there are cpu, cuda and cuda:N");
    fg_store *s = fg_store_new(b);
    cr_expect_eq(fg_store_status(s), FG_ERR_USAGE);
    fg_store_free(s);
    fg_backend_close(b);
}
