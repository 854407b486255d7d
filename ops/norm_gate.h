/* norm_gate.h - what gated_norm.c and norm_of_gated.c share: the shapes of a norm with a gate g
 * beside x, and the inputs of their examples. */
#ifndef FG_NORM_GATE_H
#define FG_NORM_GATE_H
#include "norm.h"

/* x, w, g */
static inline fg_status norm_gate_infer(fg_infer *c, double eps, int64_t groups)
{
    FG_REQUIRE(c, fg_shape_equal(c->in[0], c->in[2]), SHAPE, "g must have x's shape");
    FG_REQUIRE(c, fg__is_real(c->in_type[2]), DTYPE, "g must be f32 or bf16");
    return norm_infer(c, eps, groups);
}

/* gy, x, w, g, rstd -> gx, gw, gg */
static inline fg_status norm_gate_grad_infer(fg_infer *c, int64_t groups)
{
    const fg_shape *x = &c->in[1];
    FG_REQUIRE(c, fg_shape_equal(c->in[0], *x) && fg_shape_equal(c->in[3], *x), SHAPE,
               "gy and g must have x's shape");
    c->out[2] = *x;
    c->out_type[2] = c->in_type[3];
    return norm_grad_infer(c, 4, groups);
}

typedef struct { int64_t B, T, D, n_w, groups; double eps; } norm_gate_case;
typedef struct { fg_tensor gy, x, w, g, rstd; } norm_gate_inputs;

static inline norm_gate_inputs norm_gate_example(fg_graph *g, const norm_gate_case *k)
{
    const fg_tensor x = fg_random(g, k->B, k->T, k->D), w = fg_random(g, k->n_w);
    const fg_tensor gate = fg_random(g, k->B, k->T, k->D);
    return (norm_gate_inputs){ .x = x, .w = w, .g = gate };
}

/* One sequence */
static inline norm_gate_inputs norm_gate_grad_example(fg_graph *g, const norm_gate_case *k)
{
    const fg_tensor gy = fg_random(g, k->T, k->D), x = fg_random(g, k->T, k->D);
    const fg_tensor w = fg_random(g, k->n_w), gate = fg_random(g, k->T, k->D);
    const fg_tensor rstd = fg_random(g, k->T, k->groups);
    return (norm_gate_inputs){ gy, x, w, gate, rstd };
}
#endif
