/* test_f64_norm.c - what the generic op test does not reach of the norms: gradients of gradients,
 * every output's gradient alone, refusals. */
#include <criterion/criterion.h>
#include <string.h>
#include "fox_autodiff.h"
#include "internal.h"

/* sum of t * random numbers */
static fg_tensor weigh(fg_tensor t)
{
    const fg_tensor r = (fg_random)(FG_HERE, t.graph, fg_shape_of(t));
    const fg_tensor product = fg_mul(t, r);
    return fg_sum(product);
}

static void expect_gradient(fg_tensor loss)
{
    fg_graph *g = loss.graph;
    cr_assert_eq(fg_graph_status(g), FG_OK, "%s", fg_graph_message(g));
    fg_backend *b = fg_backend_open("cpu", 2);
    fg_store *s = fg_store_new(b);
    fg_store_init(s, g, 5);
    fg_gradcheck_result r = { 0 };
    cr_expect_eq(fg_gradcheck(loss, s, 0, NULL, NULL, &r), FG_OK, "%s", fg_graph_message(g));
    cr_expect_gt(r.checked, 0);
    cr_expect_lt(r.worst, 1e-6, "gradient of %s is off by %.1e", r.where, r.worst);
    fg_store_free(s);
    fg_backend_close(b);
    fg_graph_free(g);
}

/* d/d(x, w, ...) of a weighted sum of dy/dx */
static void expect_second_gradient(fg_tensor y, fg_tensor x)
{
    fg_tensor gx;
    const fg_tensor first = weigh(y);
    cr_assert_eq(fg_grad(first, 1, &x, &gx), FG_OK, "%s", fg_graph_message(y.graph));
    const fg_tensor second = weigh(gx);
    expect_gradient(second);
}

Test(norm, rms_norm_has_gradients_of_gradients)
{
    fg_graph *g = fg_graph_new();
    const fg_tensor x = fg_random(g, 3, 6);
    const fg_tensor w = fg_random(g, 6);
    const fg_tensor y = fg_rms_norm(x, w, 1e-5, 2);
    expect_second_gradient(y, x);
}

Test(norm, gated_norm_has_gradients_of_gradients)
{
    fg_graph *g = fg_graph_new();
    const fg_tensor x = fg_random(g, 3, 6);
    const fg_tensor w = fg_random(g, 3);
    const fg_tensor gate = fg_random(g, 3, 6);
    const fg_tensor y = fg_gated_norm(x, w, gate, 1e-5, 2);
    expect_second_gradient(y, x);
}

Test(norm, swiglu_has_gradients_of_gradients)
{
    fg_graph *g = fg_graph_new();
    const fg_tensor x = fg_random(g, 3, 10);
    const fg_tensor y = fg_swiglu(x, FG_ACT_SILU);
    expect_second_gradient(y, x);
}

Test(norm, each_output_of_add_rms_norm_carries_a_gradient_alone)
{
    for (int k = 0; k < 3; k++) {
        fg_graph *g = fg_graph_new();
        const fg_tensor a = fg_random(g, 3, 5);
        const fg_tensor b = fg_random(g, 3, 5);
        const fg_tensor w = fg_random(g, 5);
        const fg_tensor y = fg__add_rms_norm(FG_HERE, a, b, w, 1e-5);
        const fg_tensor out = fg_result(y, k);
        expect_gradient(weigh(out));
    }
}

static void expect_refusal(fg_tensor t, fg_graph *g, const char *rule)
{
    cr_expect_not(fg_ok(t));
    cr_expect(strstr(fg_graph_message(g), rule) != NULL, "%s", fg_graph_message(g));
    fg_graph_free(g);
}

Test(norm, a_width_that_does_not_fall_in_groups_is_refused)
{
    fg_graph *g = fg_graph_new();
    const fg_tensor x = fg_random(g, 3, 10);
    const fg_tensor w = fg_random(g, 10);
    const fg_tensor y = fg_rms_norm(x, w, 1e-5, 3);
    expect_refusal(y, g, "x's last axis is 10, which does not fall in 3 groups of equal length");
}

Test(norm, a_gain_of_another_length_is_refused)
{
    fg_graph *g = fg_graph_new();
    const fg_tensor x = fg_random(g, 3, 10);
    const fg_tensor w = fg_random(g, 4);
    const fg_tensor y = fg_rms_norm(x, w, 1e-5, 1);
    expect_refusal(y, g, "w must have one axis of 10, the extent of x's last");
}

Test(norm, a_gate_of_another_shape_is_refused)
{
    fg_graph *g = fg_graph_new();
    const fg_tensor x = fg_random(g, 3, 10);
    const fg_tensor w = fg_random(g, 10);
    const fg_tensor gate = fg_random(g, 3, 5);
    const fg_tensor y = fg_gated_norm(x, w, gate, 1e-5, 1);
    expect_refusal(y, g, "g must have x's shape");
}

Test(norm, an_odd_width_is_refused_by_swiglu)
{
    fg_graph *g = fg_graph_new();
    const fg_tensor x = fg_random(g, 3, 7);
    const fg_tensor y = fg_swiglu(x, FG_ACT_SILU);
    expect_refusal(y, g, "x's last axis is 7 and must fall in two halves");
}
