/* test_graph.c - building: names and scopes, states, outputs, settings, facts, shapes, results. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "fox_graph.h"
#include "fox_json.h"
#include "ops.h"

static const fg_init ones = { .kind = FG_ONES };

static void expect_error(const fg_graph *g, int n, fg_status s, const char *text)
{
    cr_expect_eq(fg_graph_errors(g), n, "%d errors", fg_graph_errors(g));
    cr_expect_eq(fg_graph_status(g), s, "%s", fg_graph_message(g));
    cr_expect(strstr(fg_graph_message(g), text), "got: %s\nwanted: %s", fg_graph_message(g), text);
}

/* ---- names and scopes ----------------------------------------------------------------------- */

Test(graph, names_have_their_scopes_in_front)
{
    fg_graph *g = fg_graph_new();
    fg_tensor top = fg_input(g, "x", FG_F32, FG_DIMS(2));
    fg_scope_push(g, "model");
    fg_scope_push(g, "");
    fg_scope_push(g, "layers.0");
    fg_tensor w = fg_param(g, "weight", FG_DIMS(2), ones);
    fg_scope_pop(g);
    fg_tensor b = fg_param(g, "bias", FG_DIMS(2), ones);
    for (int i = 0; i < 5; i++) fg_scope_pop(g);         /* more than were pushed does no harm */
    fg_tensor end = fg_param(g, "end", FG_DIMS(2), ones);
    cr_expect_eq(fg_find(g, "x").id, top.id);
    cr_expect_eq(fg_find(g, "model.layers.0.weight").id, w.id);
    cr_expect_eq(fg_find(g, "model.bias").id, b.id);
    cr_expect_eq(fg_find(g, "end").id, end.id);
    cr_expect(fg_absent(fg_find(g, "weight")));
    cr_expect(fg_absent(fg_find(g, NULL)));
    cr_expect_eq(fg_graph_status(g), FG_OK);
    fg_graph_free(g);
}

Test(graph, many_names_are_found_again)
{
    fg_graph *g = fg_graph_new();
    uint32_t id[500];
    for (int i = 0; i < 500; i++)
        id[i] = fg_param(g, fg_name(g, "p%d", i * 7919 % 500), FG_DIMS(1), ones).id;
    for (int i = 0; i < 500; i++)
        cr_assert_eq(fg_find(g, fg_name(g, "p%d", i * 7919 % 500)).id, id[i]);
    fg_graph_free(g);
}

Test(graph, a_full_name_that_is_too_long_is_refused)
{
    fg_graph *g = fg_graph_new();
    char part[151];
    memset(part, 'a', 150);
    part[150] = 0;
    for (int i = 0; i < 6; i++) fg_scope_push(g, part);
    fg_tensor a = fg_state(g, "@kind.one", FG_F32, FG_DIMS(2));
    fg_tensor b = fg_state(g, "@kind.two", FG_F32, FG_DIMS(2));
    cr_expect(!fg_ok(a) && !fg_ok(b), "two states were cut to one name");
    expect_error(g, 2, FG_ERR_USAGE, "state: a name has at most 200 bytes, scopes included");
    fg_graph_free(g);
}

Test(graph, inputs_parameters_and_outputs_need_a_name)
{
    fg_graph *g = fg_graph_new();
    fg_tensor x = fg_input(g, "", FG_F32, FG_DIMS(2));
    fg_tensor w = fg_param(g, NULL, FG_DIMS(2), ones);
    fg_tensor y = fg_fill(g, FG_DIMS(2), 1);
    fg_output(y, NULL);
    fg_output(y, "");
    cr_expect(!fg_ok(x) && !fg_ok(w));
    expect_error(g, 4, FG_ERR_USAGE, "input: a name is needed");
    fg_graph_free(g);
}

Test(graph, names_that_are_not_utf8_are_refused)
{
    fg_graph *g = fg_graph_new();
    fg_input(g, "x\xff", FG_F32, FG_DIMS(2));
    fg_scope_push(g, "\xc3\x28");
    fg_tensor w = fg_param(g, "w", FG_DIMS(2), ones);
    cr_expect_eq(fg_find(g, "w").id, w.id, "the scope got a name all the same");
    expect_error(g, 2, FG_ERR_USAGE, "input: a name must be UTF-8");
    fg_graph_free(g);
}

Test(graph, a_state_made_twice_is_one_value)
{
    fg_graph *g = fg_graph_new();
    fg_scope_push(g, "layers.0");
    fg_tensor a = fg_state(g, "@cache.k", FG_F32, FG_DIMS(2, 3));
    fg_tensor b = fg_state(g, "@cache.k", FG_F32, FG_DIMS(2, 3));
    fg_tensor plain = fg_state(g, "@step", FG_I32, FG_DIMS(1));
    cr_expect_eq(a.id, b.id);
    cr_expect_eq(fg_find(g, "@cache.layers.0.k").id, a.id, "one prefix for all states of a kind");
    cr_expect_eq(fg_find(g, "@layers.0.step").id, plain.id);
    cr_expect_eq(fg_graph_status(g), FG_OK);
    fg_state(g, "@cache.k", FG_F32, FG_DIMS(3, 2));
    expect_error(g, 1, FG_ERR_USAGE, "\"@cache.layers.0.k\" is already the name of a value");
    fg_graph_free(g);
}

/* ---- outputs -------------------------------------------------------------------------------- */

Test(graph, an_output_may_be_marked_again_but_not_renamed_to_another)
{
    fg_graph *g = fg_graph_new();
    fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(2)), y = fg_exp(x);
    fg_output(y, "y");
    fg_output(y, "y");
    fg_output(y, "also_y");
    cr_expect_eq(fg_graph_status(g), FG_OK, "%s", fg_graph_message(g));
    cr_expect_eq(fg_find(g, "y").id, y.id);
    fg_output(x, "y");
    expect_error(g, 1, FG_ERR_USAGE, "output: two outputs have one name");
    fg_graph_free(g);
}

Test(graph, an_output_on_a_parameter_is_its_value_after_the_run)
{
    fg_backend *b = fg_backend_open("cpu", 1);
    fg_store *s = fg_store_new(b);
    fg_graph *g = fg_graph_new();
    fg_tensor w = fg_param(g, "w", FG_DIMS(2, 2), ones);
    fg_tensor flat = fg_reshape(w, FG_DIMS(4));
    fg_output(w, "w_out");
    fg_output(flat, "flat");
    fg_tensor one = fg_fill(g, FG_DIMS(2, 2), 1);
    FG_APPLY(accumulate, FG_HERE, ((const fg_tensor[]){ w, one }), 2.0);
    fg_store_init(s, g, 1);
    fg_plan *p = fg_plan_new(g, s);
    cr_assert_eq(fg_run(p), FG_OK, "%s", fg_plan_message(p));
    float at[4] = { 0 }, seen[4] = { 0 };
    cr_expect_eq(fg_read(p, fg_find(g, "w_out"), at, sizeof at), FG_OK);
    cr_expect_eq(fg_read(p, flat, seen, sizeof seen), FG_OK, "%s", fg_plan_message(p));
    for (int i = 0; i < 4; i++) cr_expect(at[i] == 3 && seen[i] == 3);
    fg_plan_free(p);
    fg_graph_free(g);
    fg_store_free(s);
    fg_backend_close(b);
}

/* ---- settings and facts --------------------------------------------------------------------- */

Test(graph, settings_are_read_replaced_and_accounted_for)
{
    fg_graph *g = fg_graph_new();
    fg_graph_set(g, "layers", "3");
    fg_graph_set(g, "rate", "2.5e-3");
    fg_graph_set(g, "act", "silu");
    fg_graph_set(g, "typo", "1");
    fg_graph_set(g, "layers", "4");
    cr_expect_eq(fg_setting_int(g, "layers", 1), 4);
    cr_expect_float_eq(fg_setting_real(g, "rate", 1), 2.5e-3, 1e-18);
    cr_expect_str_eq(fg_setting_text(g, "act", "relu"), "silu");
    cr_expect_eq(fg_setting_int(g, "heads", 7), 7);
    cr_expect_str_eq(fg_graph_unused_setting(g, 0), "typo");
    cr_expect_null(fg_graph_unused_setting(g, 1));
    cr_expect_str_eq(fg_graph_asked_setting(g, 0), "layers");
    cr_expect_str_eq(fg_graph_asked_setting(g, 3), "heads");
    cr_expect_null(fg_graph_asked_setting(g, 4));
    cr_expect_null(fg_graph_asked_setting(g, -1));
    cr_expect_eq(fg_graph_status(g), FG_OK);
    fg_graph_free(g);
}

Test(graph, settings_that_are_no_numbers_are_errors)
{
    static const char *const bad[] = { "", "4x", "1e999", "nan", "99999999999999999999" };
    for (int i = 0; i < 5; i++) {
        fg_graph *g = fg_graph_new();
        fg_graph_set(g, "n", bad[i]);
        cr_expect_eq(fg_setting_int(g, "n", 7), 7, "\"%s\"", bad[i]);
        if (i < 4) cr_expect_eq(fg_setting_real(g, "n", 7), 7, "\"%s\"", bad[i]);
        expect_error(g, i < 4 ? 2 : 1, FG_ERR_USAGE, "is not an integer");
        fg_graph_free(g);
    }
    cr_expect_eq(fg_graph_set(NULL, "a", "b"), FG_ERR_USAGE);
}

Test(graph, facts_keep_their_order_and_their_last_value)
{
    fg_graph *g = fg_graph_new();
    const char *key, *json;
    fg_graph_set_fact(g, "width", "64");
    fg_graph_set_fact(g, "act", "\"silu\"");
    fg_graph_set_fact(g, "width", "128");
    cr_expect_str_eq(fg_graph_fact(g, "width"), "128");
    cr_expect_null(fg_graph_fact(g, "depth"));
    cr_assert(fg_graph_fact_at(g, 0, &key, &json));
    cr_expect_str_eq(key, "width");
    cr_assert(fg_graph_fact_at(g, 1, &key, &json));
    cr_expect_str_eq(json, "\"silu\"");
    cr_expect(!fg_graph_fact_at(g, 2, &key, &json) && !fg_graph_fact_at(g, -1, &key, &json));
    cr_expect_eq(fg_graph_set_fact(g, NULL, "1"), FG_ERR_USAGE);
    fg_graph_free(g);
}

/* ---- parameters ----------------------------------------------------------------------------- */

Test(graph, parameters_are_listed_by_name)
{
    fg_graph *g = fg_graph_new();
    fg_param_info p;
    cr_expect(!fg_param_at(g, 0, &p));
    fg_param(g, "w10", FG_DIMS(1), ones);
    fg_param(g, "b", FG_DIMS(2), ones);
    fg_input(g, "a", FG_F32, FG_DIMS(1));
    fg_state(g, "@a", FG_F32, FG_DIMS(1));
    fg_tensor w2 = fg_param(g, "w2", FG_DIMS(3), ((fg_init){ .kind = FG_NORMAL, .a = 2 }));
    static const char *const want[] = { "b", "w10", "w2" };
    for (int i = 0; i < 3; i++) {
        cr_assert(fg_param_at(g, i, &p));
        cr_expect_str_eq(p.name, want[i]);
    }
    cr_expect(p.tensor.id == w2.id && p.init.a == 2 && p.shape.dim[0] == 3);
    cr_expect_eq(fg_param_count(g), 3);
    fg_param(g, "a0", FG_DIMS(1), ones);                 /* the list follows what is made later */
    cr_assert(fg_param_at(g, 0, &p));
    cr_expect_str_eq(p.name, "a0");
    cr_expect(!fg_param_at(g, 4, &p) && !fg_param_at(g, -1, &p) && !fg_param_at(NULL, 0, &p));
    fg_graph_free(g);
}

/* ---- shapes --------------------------------------------------------------------------------- */

Test(graph, extents_are_read_from_both_ends)
{
    fg_graph *g = fg_graph_new();
    fg_tensor x = fg_input(g, "x", FG_BF16, FG_DIMS(2, 3, 5)), none = { 0 };
    cr_expect(fg_dim(x, 0) == 2 && fg_dim(x, -1) == 5 && fg_dim(x, -3) == 2);
    cr_expect(fg_dim(x, 3) == 0 && fg_dim(x, -4) == 0 && fg_count(x) == 30);
    cr_expect_eq(fg_dtype_of(x), FG_BF16);
    cr_expect(fg_absent(none) && !fg_ok(none) && fg_count(none) == 0 && fg_dim(none, 0) == 0);
    cr_expect_eq(fg_shape_of(none).rank, 0);
    fg_graph_free(g);
}

Test(graph, shapes_that_no_tensor_has_are_refused)
{
    const int64_t seven[7] = { 1, 1, 1, 1, 1, 1, 1 };
    const struct { fg_shape shape; const char *text; } bad[] = {
        { fg_dims(7, seven), "at most 6 axes" },
        { { .rank = -1 }, "at most 6 axes" },
        { FG_DIMS(2, -1), "negative extent" },
        { FG_DIMS(3, 0), "an extent of 0" },
        { FG_DIMS(1 << 30, 1 << 30), "too many elements" },
        { FG_DIMS(0, 1LL << 40, 1LL << 40), "too many elements" },
    };
    for (int i = 0; i < 6; i++) {
        fg_graph *g = fg_graph_new();
        fg_tensor x = fg_input(g, "x", FG_F32, bad[i].shape);
        expect_error(g, 1, FG_ERR_USAGE, bad[i].text);
        cr_expect(!fg_ok(x) && fg_count(x) == 1, "case %d", i);
        fg_graph_free(g);
    }
    fg_graph *g = fg_graph_new();
    cr_expect(!fg_ok(fg_input(g, "x", (fg_dtype)9, FG_DIMS(1))));
    expect_error(g, 1, FG_ERR_USAGE, "input: a dtype is f32, bf16 or i32");
    fg_graph_free(g);
}

Test(graph, a_refused_shape_does_not_reach_the_ops_behind_it)
{
    const int64_t seven[7] = { 1, 1, 1, 1, 1, 1, 1 };
    fg_graph *g = fg_graph_new();
    fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(1 << 20, 1));
    fg_tensor wide = fg_input(g, "wide", FG_F32, FG_DIMS(1, 1 << 20));
    fg_tensor y = fg_reshape(x, fg_dims(7, seven));
    y = fg_softmax(fg_exp(y));
    fg_tensor z = fg_reshape(x, FG_DIMS(-5, 1 << 20));
    z = fg_row_sum(fg_mul(z, z));
    fg_tensor a = fg_mul(x, wide);                       /* 2^40 elements are still a shape */
    fg_tensor b = fg_broadcast_to(fg_reshape(a, FG_DIMS(1, 1 << 20, 1 << 20)),
                                  FG_DIMS(1 << 30, 1 << 20, 1 << 20));
    fg_concat(b, b, 0);
    cr_expect(!fg_ok(y) && !fg_ok(z) && fg_ok(a) && !fg_ok(b));
    cr_expect_eq(fg_graph_errors(g), 3, "%d errors, the first: %s", fg_graph_errors(g),
                 fg_graph_message(g));
    fg_graph_free(g);
}

/* ---- results -------------------------------------------------------------------------------- */

Test(graph, every_output_of_an_op_can_be_had)
{
    fg_graph *g = fg_graph_new();
    fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(4, 6));
    fg_tensor w = fg_param(g, "w", FG_DIMS(6), ones);
    fg_tensor y = fg_rms_norm(x, w, 1e-6, 1), rstd = fg_result(y, 1);
    cr_expect_eq(fg_count(rstd), 4);
    cr_expect(fg_result(rstd, 0).id == y.id && fg_result(y, 0).id == y.id);
    cr_expect_eq(fg_result(x, 0).id, x.id);
    cr_expect_eq(fg_graph_status(g), FG_OK);
    cr_expect(!fg_ok(fg_result(y, 2)));
    cr_expect(!fg_ok(fg_result(x, 1)) && !fg_ok(fg_result(y, -1)));
    expect_error(g, 3, FG_ERR_USAGE, "rms_norm: the tensor's maker has 2 outputs");
    fg_graph_free(g);
}

Test(graph, results_of_an_op_that_failed_have_their_own_shapes)
{
    fg_graph *g = fg_graph_new();
    fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(4, 6)), y = fg_input(g, "y", FG_F32, FG_DIMS(5));
    fg_tensor w = fg_param(g, "w", FG_DIMS(6), ones);
    fg_tensor bad = fg_add(x, y);
    cr_expect_eq(fg_graph_errors(g), 1);
    fg_tensor rstd = fg_result(fg_rms_norm(bad, w, 1e-6, 1), 1);
    cr_expect(!fg_ok(rstd) && fg_dim(rstd, 1) == 1, "its last extent is %d", (int)fg_dim(rstd, 1));
    cr_expect_eq(fg_graph_errors(g), 1, "%s", fg_graph_error(g, 1));
    fg_graph_free(g);
}

Test(graph, a_builder_fails_in_its_own_words)
{
    fg_graph *g = fg_graph_new();
    fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(4, 6));
    fg_tensor y = fg_fail(x, FG_ERR_SHAPE, "width %d is odd", 7);
    fg_tensor z = fg_fail(y, FG_ERR_SHAPE, "follows from the first");
    cr_expect(!fg_ok(y) && !fg_ok(z) && fg_ok(x) && fg_count(y) == 24);
    expect_error(g, 1, FG_ERR_SHAPE, "width 7 is odd");
    cr_expect(fg_absent(fg_fail(((fg_tensor){ 0 }), FG_ERR_SHAPE, "nothing to fail")));
    fg_graph_free(g);
}

/* ---- the canonical order -------------------------------------------------------------------- */

static void add_text(void *to, const char *text)
{
    char **all = to;
    const size_t n = *all ? strlen(*all) : 0;
    *all = realloc(*all, n + strlen(text) + 1);
    strcpy(*all + n, text);
}

static fg_tensor branch(fg_graph *g, fg_tensor x, const char *name)
{
    fg_scope_push(g, name);
    fg_tensor w = fg_param(g, "w", FG_DIMS(3, 3), ones);
    fg_tensor seen = fg_state(g, "@seen.sum", FG_F32, FG_DIMS(2, 3));
    fg_tensor y = fg_linear(x, w, ((fg_tensor){ 0 }));
    FG_APPLY(accumulate, FG_HERE, ((const fg_tensor[]){ seen, y }), 1.0);
    fg_scope_pop(g);
    return fg_silu(y);
}

/* loss(left(x) * right(x)) with its arguments evaluated as one compiler or the other would. */
static char *plan_text(bool right_first, fg_store *s)
{
    fg_graph *g = fg_graph_new();
    fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(2, 3)), left, right, d[2], w[2];
    if (right_first) { right = branch(g, x, "right"); left = branch(g, x, "left"); }
    else { left = branch(g, x, "left"); right = branch(g, x, "right"); }
    fg_tensor loss = fg_mean(fg_mul(left, right));
    w[0] = fg_find(g, "left.w");
    w[1] = fg_find(g, "right.w");
    cr_assert_eq(fg_grad(loss, 2, w, d), FG_OK, "%s", fg_graph_message(g));
    fg_output(loss, "loss");
    fg_output(d[0], "d0");
    fg_output(d[1], "d1");
    fg_plan *p = fg_plan_new(g, s);
    char *text = NULL;
    cr_assert_eq(fg_plan_dump(p, FG_STAGE_PLANNED, FG_DUMP_TEXT, add_text, &text), FG_OK);
    fg_plan_free(p);
    fg_graph_free(g);
    return text;
}

Test(graph, the_order_of_evaluation_of_arguments_leaves_no_trace)
{
    fg_backend *b = fg_backend_open("cpu", 1);
    fg_store *s = fg_store_new(b);
    char *one = plan_text(false, s), *other = plan_text(true, s);
    cr_expect_str_eq(one, other);
    cr_expect(strstr(one, "left.w") && strstr(one, "backward:"), "%s", one);
    free(one);
    free(other);
    fg_store_free(s);
    fg_backend_close(b);
}

/* ---- dumps ---------------------------------------------------------------------------------- */

Test(graph, a_dump_in_json_can_be_read)
{
    fg_graph *g = fg_graph_new();
    fg_scope_push(g, "a \"quoted\" scope\n");
    fg_tensor x = fg_input(g, "x\\y", FG_BF16, FG_DIMS(2, 3));
    fg_tensor y = fg_scale(fg_cast(x, FG_F32), INFINITY, -1);
    fg_tensor z = fg_scale(y, NAN, 0.1);
    fg_output(fg_slice(z, 1, 0, 2), "out");
    fg_add(y, fg_fill(g, FG_DIMS(5), 1));                /* a graph with an error is dumped too */
    char *text = NULL;
    cr_assert_eq(fg_graph_dump(g, FG_DUMP_JSON, add_text, &text), FG_OK);
    const fg_json_rules rules = { 8, 10000, false };
    fg_json *all = NULL;
    char message[200];
    cr_expect_eq(fg_json_parse(text, strlen(text), rules, &all, message), FG_OK, "%s", message);
    const fg_json_value *scopes = fg_json_get(fg_json_root(all), "scopes");
    const fg_json_value *path = scopes ? fg_json_get(scopes->first, "path") : NULL;
    cr_expect(path && !strcmp(path->u.text, "a \"quoted\" scope\n"), "%s", text);
    fg_json_free(all);
    free(text);
    fg_graph_free(g);
}

/* ---- what NULL does ------------------------------------------------------------------------- */

Test(graph, no_graph_is_a_status_not_a_crash)
{
    fg_graph_free(NULL);
    cr_expect_eq(fg_graph_status(NULL), FG_ERR_MEMORY);
    cr_expect_str_eq(fg_graph_message(NULL), "out of memory");
    cr_expect(fg_absent(fg_input(NULL, "x", FG_F32, FG_DIMS(1))));
    fg_scope_push(NULL, "s");
    fg_scope_pop(NULL);
    cr_expect_eq(fg_setting_int(NULL, "n", 3), 3);
    cr_expect_eq(fg_graph_dump(NULL, FG_DUMP_TEXT, add_text, NULL), FG_ERR_USAGE);
    cr_expect_eq(fg_param_count(NULL), 0);
    cr_expect_null(fg_graph_fact(NULL, "a"));
}
