/* test_f64_lower.c - what lowering does for a GPU, run on the CPU in double: fused and merged
 * nodes, parts and joins in place, bf16. */
#include <criterion/criterion.h>
#include <stdio.h>
#include "device_cpu.h"
#include "fox_autodiff.h"
#include "fox_models.h"
#include "graph.h"
#include "plan.h"

enum { B = 2, T = 12, V = 17, MOST = 100 };

typedef struct {
    fg_graph *g;
    fg_backend *backend;
    fg_store *store;
    fg_plan *plan;
    fg_tensor loss, grad[MOST];
    int n;
} trial;

typedef enum { FOX_PRO, FOX_LLAMA, TRANSFORMER, RECOMPUTED, MAMBA2, HGRN2, DELTA_NET,
               MAMBA2_AGAIN, HGRN2_AGAIN, DELTA_NET_AGAIN, MODELS } kind;     /* recomputed */

static fg_tensor build(kind k, fg_tensor tokens)
{
    fox_config c = k == FOX_LLAMA ? fox_llama_config(V, 32, 2, 2) : fox_pro_config(V, 32, 2, 2);
    transformer_config t = transformer_llama_config(V, 32, 2, 2);
    c.intermediate_size = t.intermediate_size = 24;
    c.recompute = k == RECOMPUTED;
    if (k == MAMBA2 || k == MAMBA2_AGAIN) {
        mamba2_config m = mamba2_lm_config(V, 32, 2, 4);
        m.recompute = k == MAMBA2_AGAIN;
        return mamba2_lm(tokens, &m);
    }
    if (k == HGRN2 || k == HGRN2_AGAIN) {
        hgrn2_config m = hgrn2_lm_config(V, 32, 2, 16);
        m.recompute = k == HGRN2_AGAIN;
        m.intermediate_size = 24;
        return hgrn2_lm(tokens, &m);
    }
    if (k == DELTA_NET || k == DELTA_NET_AGAIN) {
        delta_net_config m = delta_net_lm_config(V, 32, 2, 2);
        m.recompute = k == DELTA_NET_AGAIN;
        m.intermediate_size = 24;
        return delta_net_lm(tokens, &m);
    }
    return k == TRANSFORMER ? transformer_lm(tokens, &t) : fox_lm(tokens, &c);
}

static trial start(kind k, bool device, fg_dtype precision)
{
    int32_t tokens[B * T], labels[B * T];
    trial r = { .g = fg_graph_new(),
                .backend = device ? fg__device_open() : fg_backend_open("cpu", 1) };
    fg_tensor x = fg_input(r.g, "tokens", FG_I32, FG_DIMS(B, T));
    fg_tensor y = fg_input(r.g, "labels", FG_I32, FG_DIMS(B, T));
    fg_param_info p;
    fg_tensor wrt[MOST];
    fg_tensor logits = build(k, x);
    r.loss = fg_output(fg_nn_loss(logits, y), "loss");
    for (; fg_param_at(r.g, r.n, &p); r.n++) wrt[r.n] = p.tensor;
    cr_assert_eq(fg_grad(r.loss, r.n, wrt, r.grad), FG_OK, "%s", fg_graph_message(r.g));
    for (int i = 0; i < r.n; i++) fg_output(r.grad[i], fg_name(r.g, "grad%d", i));
    r.store = fg_store_new(r.backend);
    fg_store_precision(r.store, precision);
    cr_assert_eq(fg_store_init(r.store, r.g, 3), FG_OK, "%s", fg_store_message(r.store));
    r.plan = fg_plan_new(r.g, r.store);
    for (int i = 0; i < B * T; i++) {
        tokens[i] = (7 * i + i * i) % V;
        labels[i] = (5 * i + 3) % V;
    }
    fg_write(r.plan, x, tokens, sizeof tokens);
    fg_write(r.plan, y, labels, sizeof labels);
    for (int i = 0; i < 2; i++)              /* the second run takes fixed nodes as they are */
        cr_assert_eq(fg_run(r.plan), FG_OK, "%s", fg_plan_message(r.plan));
    return r;
}

static void finish(trial *r)
{
    fg_plan_free(r->plan);
    fg_store_free(r->store);
    fg_backend_close(r->backend);
    fg_graph_free(r->g);
}

static int count(const trial *r, const char *op)
{
    int n = 0;
    for (uint32_t k = 0; k < r->plan->low->n_nodes; k++)
        n += !strcmp(r->plan->low->nodes[k].op->name, op);
    return n;
}

/* Those that copy in every run; parameters that are joined do so once. */
static int copies(const trial *r, const char *op)
{
    int n = 0;
    for (uint32_t k = 0; k < r->plan->low->n_nodes; k++)
        n += !strcmp(r->plan->low->nodes[k].op->name, op) && !r->plan->quiet[k] &&
             !r->plan->fixed[k];
    return n;
}

static void put(void *to, const char *text) { (void)to; fputs(text, stderr); }

/* 1 - cosine of the angle between all gradients of a and of b. */
static double turned(const trial *a, const trial *b)
{
    double dot = 0, aa = 0, bb = 0;
    for (int i = 0; i < a->n; i++) {
        const double *x = fg__plan_data(a->plan, a->grad[i]),
                     *y = fg__plan_data(b->plan, b->grad[i]);
        for (int64_t k = 0; k < fg_count(a->grad[i]); k++) {
            dot += x[k] * y[k];
            aa += x[k] * x[k];
            bb += y[k] * y[k];
        }
    }
    return 1 - dot / sqrt(aa * bb);
}

static void same(const trial *a, const trial *b)
{
    const double *x = fg__plan_data(a->plan, a->loss), *y = fg__plan_data(b->plan, b->loss);
    cr_expect_lt(fabs(x[0] - y[0]), 1e-12, "loss %.15g and %.15g", x[0], y[0]);
    for (int i = 0; i < a->n; i++) {
        x = fg__plan_data(a->plan, a->grad[i]);
        y = fg__plan_data(b->plan, b->grad[i]);
        for (int64_t k = 0; k < fg_count(a->grad[i]); k++)
            cr_assert(fabs(x[k] - y[k]) <= 1e-12 * (1 + fabs(x[k])), "gradient %d, element %lld: "
                      "%.15g and %.15g", i, (long long)k, x[k], y[k]);
    }
}

Test(lower, a_device_that_fuses_computes_the_same)
{
    for (kind k = 0; k < MODELS; k++) {
        trial a = start(k, false, FG_F32), b = start(k, true, FG_F32);
        cr_expect_gt(count(&b, "add_rms_norm"), 0, "model %d", k);
        cr_expect_eq(copies(&b, "slice"), 0, "model %d: %d slices are copied", k,
                     copies(&b, "slice"));
        same(&a, &b);
        finish(&a);
        finish(&b);
    }
}

Test(lower, parts_that_cannot_be_made_in_place_are_copied_to_it)
{
    for (kind k = MAMBA2; k < MODELS; k++) {
        trial a = start(k, false, FG_F32);
        fg__plain_mixers = true;
        trial b = start(k, true, FG_F32);
        fg__plain_mixers = false;
        cr_expect_gt(copies(&b, "concat"), 0, "model %d", k);
        cr_expect_lt(copies(&b, "concat"), count(&b, "concat"), "model %d", k);
        same(&a, &b);
        finish(&a);
        finish(&b);
    }
}

Test(lower, products_of_one_input_are_one)
{
    trial a = start(FOX_PRO, false, FG_F32), b = start(FOX_PRO, true, FG_F32);
    /* a layer's q, k, v, shifts, gates; o; two of the MLP.  The head is in the loss */
    cr_expect_eq(count(&a, "linear"), 2 * 10);
    cr_expect_eq(count(&b, "linear"), 2 * 4);
    cr_expect_eq(count(&b, "linear_dw"), 2 * 4);
    cr_expect_eq(count(&b, "linear_dx"), 2 * 4);
    finish(&a);
    finish(&b);
}

Test(lower, convolutions_of_one_product_are_one)
{
    for (int again = 0; again < 2; again++) {
        const kind k = again ? DELTA_NET_AGAIN : DELTA_NET;
        trial a = start(k, false, FG_F32), b = start(k, true, FG_F32);
        /* a layer's q, k and v, computed once more where the graph says so */
        cr_expect_eq(count(&a, "causal_conv"), 2 * 3 * (1 + again));
        cr_expect_eq(count(&b, "causal_conv"), 2 * (1 + again));
        cr_expect_eq(count(&a, "causal_conv_grad"), 2 * 3);
        cr_expect_eq(count(&b, "causal_conv_grad"), 2);
        cr_expect_eq(copies(&b, "concat"), 0, "%d joins are copied", copies(&b, "concat"));
        finish(&a);
        finish(&b);
    }
}

Test(lower, bf16_keeps_the_loss_and_the_direction_of_the_gradient)
{
    for (kind k = 0; k < MODELS; k++) {
        trial a = start(k, false, FG_F32), b = start(k, true, FG_BF16);
        const double *x = fg__plan_data(a.plan, a.loss), *y = fg__plan_data(b.plan, b.loss);
        cr_expect_lt(fabs(x[0] - y[0]), 1e-3, "model %d: loss %g and %g", k, x[0], y[0]);
        cr_expect_lt(turned(&a, &b), 1e-3, "model %d: turned by %g", k, turned(&a, &b));
        cr_expect_gt(turned(&a, &b), 0, "model %d: bf16 changed nothing", k);
        cr_expect_eq(copies(&b, "slice"), 0, "model %d: %d slices are copied", k,
                     copies(&b, "slice"));
        cr_expect_eq(copies(&b, "concat"), 0, "model %d: %d joins are copied", k,
                     copies(&b, "concat"));
        if (getenv("FG_TEST_DUMP"))
            fg_plan_dump(b.plan, FG_STAGE_PLANNED, FG_DUMP_TEXT, put, NULL);
        finish(&a);
        finish(&b);
    }
}

/* ---- a device that has every kernel: what is fused stays whole ------------------------------- */

static const char *fits(fg_backend *b, const fg_op *op, const fg_infer *c)
{
    (void)b; (void)op; (void)c;
    return NULL;
}

/* Nodes of that op, on a device with every kernel, of the loss's and gradients' graph; -1: none. */
static int fused(const trial *r, fg_dtype precision, const char *op)
{
    fg_backend *b = fg__device_open();
    fg_backend_ops ops = *b->ops;
    uint32_t *map = NULL;
    int n = 0;
    ops.unfit = fits;
    b->ops = &ops;
    fg_graph *low = fg__lower(r->g, b, precision, &map);
    cr_assert(low && !low->status, "%s", low ? fg_graph_message(low) : "out of memory");
    for (uint32_t k = 0; k < low->n_nodes; k++) n += !strcmp(low->nodes[k].op->name, op);
    fg_graph_free(low);
    free(map);
    fg_backend_close(b);
    return n;
}

/* Convolutions that differ in more than their channels, or with a gap between, stay apart. */
Test(lower, convolutions_of_other_kinds_stay_apart)
{
    static const struct { int64_t from, width; bool silu; int n; } others[] = {
        { 8, 4, true, 1 }, { 8, 4, false, 2 }, { 8, 3, true, 2 }, { 9, 4, true, 2 } };
    for (int i = 0; i < 4; i++) {
        trial r = { .g = fg_graph_new() };
        const fg_tensor x = fg_random(r.g, B, T, 16), none = { 0 };
        const fg_tensor w = fg_random(r.g, 8, 4);
        const fg_tensor v = fg_random(r.g, 16 - others[i].from, others[i].width);
        const fg_tensor left = fg_slice(x, -1, 0, 8), right = fg_slice(x, -1, others[i].from, 16);
        const fg_tensor one = fg_causal_conv(left, w, none, true);
        const fg_tensor other = fg_causal_conv(right, v, none, others[i].silu);
        fg_output(one, "one");
        fg_output(other, "other");
        cr_expect_eq(fused(&r, FG_F32, "causal_conv"), others[i].n, "case %d", i);
        fg_graph_free(r.g);
    }
}

Test(lower, shifts_take_their_gates_and_norms)
{
    for (int bf16 = 0; bf16 < 2; bf16++) {
        trial a = start(FOX_PRO, true, bf16 ? FG_BF16 : FG_F32);
        const fg_dtype t = bf16 ? FG_BF16 : FG_F32;
        /* of a layer: keys are shifted and normed, values shifted, queries normed */
        cr_expect_eq(fused(&a, t, "shift_norm"), 2);
        cr_expect_eq(fused(&a, t, "shift_norm_grad"), 2);
        cr_expect_eq(fused(&a, t, "shift_gate"), 2);
        cr_expect_eq(fused(&a, t, "shift_gate_grad"), 2);
        for (const char *const *op = (const char *const[]){ "sigmoid", "sigmoid_grad", "shift_mix",
                                                            "shift_mix_grad", NULL }; *op; op++)
            cr_expect_eq(fused(&a, t, *op), 0, "%s: %d", *op, fused(&a, t, *op));
        finish(&a);
    }
    trial a = start(RECOMPUTED, true, FG_BF16);
    cr_expect_eq(fused(&a, FG_BF16, "shift_norm"), 2 * 2);
    cr_expect_eq(fused(&a, FG_BF16, "shift_norm_grad"), 2);
    cr_expect_eq(fused(&a, FG_BF16, "shift_mix"), 0);
    finish(&a);
}

Test(lower, the_residual_gradient_is_rounded_where_it_is_made)
{
    trial a = start(FOX_PRO, true, FG_BF16);
    /* of a layer: behind both norms but the first, whose gradient goes into the table; the last */
    cr_expect_eq(fused(&a, FG_BF16, "rms_norm_grad_bf16"), 2 * 2);
    cr_expect_eq(fused(&a, FG_BF16, "rms_norm_grad"), 2 + 1);    /* of queries; of the first norm */
    cr_expect_eq(fused(&a, FG_F32, "rms_norm_grad_bf16"), 0);
    finish(&a);
}

Test(lower, a_loss_whose_weight_is_known_takes_its_gradient)
{
    for (kind k = 0; k < MODELS; k++) {
        trial a = start(k, true, FG_BF16);
        cr_expect_eq(fused(&a, FG_BF16, "linear_cross_entropy_both"), 1, "model %d", k);
        cr_expect_eq(fused(&a, FG_BF16, "linear_cross_entropy"), 0, "model %d", k);
        cr_expect_eq(fused(&a, FG_BF16, "linear_cross_entropy_grad"), 0, "model %d", k);
        finish(&a);
    }
}

/* d loss^2: what comes in is the loss itself. */
Test(lower, a_gradient_that_depends_on_the_loss_waits_for_it)
{
    trial a = start(FOX_PRO, true, FG_F32);
    fg_tensor wrt[MOST], grad[MOST];
    fg_param_info p;
    for (int i = 0; fg_param_at(a.g, i, &p); i++) wrt[i] = p.tensor;
    const fg_tensor square = fg_mul(a.loss, a.loss);
    cr_assert_eq(fg_grad(square, a.n, wrt, grad), FG_OK);
    for (int i = 0; i < a.n; i++) fg_output(grad[i], fg_name(a.g, "square%d", i));
    cr_expect_eq(fused(&a, FG_F32, "linear_cross_entropy_grad"), 1);
    fg_plan *q = fg_plan_new(a.g, a.store);
    cr_expect_eq(fg_plan_status(q), FG_OK, "%s", fg_plan_message(q));
    fg_plan_free(q);
    finish(&a);
}

/* ---- training in bf16: copies of weights ----------------------------------------------------- */

typedef struct {
    fg_graph *g;
    fg_store *store;
    fg_plan *plan;
    fg_tensor loss;
} training;

static training train(fg_backend *b, kind k)
{
    static const fg_optimizer o = { 0.9, 0.95, 1e-8, 0.1, 1.0, 1 };
    training t = { .g = fg_graph_new(), .store = fg_store_new(b) };
    fg_tensor x = fg_input(t.g, "tokens", FG_I32, FG_DIMS(B, T));
    fg_tensor y = fg_input(t.g, "labels", FG_I32, FG_DIMS(B, T));
    fg_tensor logits = build(k, x);
    t.loss = fg_nn_loss(logits, y);
    cr_assert_eq(fg_train_graph(t.loss, &o, NULL), FG_OK, "%s", fg_graph_message(t.g));
    fg_store_precision(t.store, FG_BF16);
    cr_assert_eq(fg_store_init(t.store, t.g, 3), FG_OK, "%s", fg_store_message(t.store));
    t.plan = fg_plan_new(t.g, t.store);
    return t;
}

/* One step of rate lr; returns the loss before it. */
static double train_step(training *t, int step, float lr)
{
    const float at = (float)step;
    int32_t tokens[B * T], labels[B * T];
    for (int i = 0; i < B * T; i++) {
        tokens[i] = (7 * i + i * i + step) % V;
        labels[i] = (5 * i + 3) % V;
    }
    fg_write(t->plan, fg_find(t->g, "tokens"), tokens, sizeof tokens);
    fg_write(t->plan, fg_find(t->g, "labels"), labels, sizeof labels);
    fg_write(t->plan, fg_find(t->g, "lr"), &lr, sizeof lr);
    fg_write(t->plan, fg_find(t->g, "step"), &at, sizeof at);
    cr_assert_eq(fg_run(t->plan), FG_OK, "%s", fg_plan_message(t->plan));
    return *(double *)fg__plan_data(t->plan, t->loss);
}

static void train_end(training *t)
{
    fg_plan_free(t->plan);
    fg_store_free(t->store);
    fg_graph_free(t->g);
}

/* Every parameter is multiplied by 1.5 from outside. */
static void grow(training *t)
{
    fg_param_info p;
    for (int i = 0; fg_param_at(t->g, i, &p); i++) {
        const int64_t n = fg_shape_count(p.shape);
        float *x = malloc((size_t)n * sizeof *x);
        fg_store_get(t->store, p.name, x, (size_t)n * sizeof *x);
        for (int64_t j = 0; j < n; j++) x[j] *= 1.5f;
        fg_store_put(t->store, p.name, FG_F32, p.shape, x);
        free(x);
    }
}

/* Casts of parameters that a plan runs in every step. */
static int casts_of_weights(const fg_plan *p)
{
    const fg_graph *g = p->low;
    int n = 0;
    for (uint32_t k = 0; k < g->n_nodes; k++)
        n += !p->fixed[k] && !strcmp(g->nodes[k].op->name, "cast") &&
             g->values[g->nodes[k].in[0]].kind == FG_OF_PARAM;
    return n;
}

/* Against a plan whose store says before every step that weights have changed. */
Test(lower, an_update_keeps_the_copies_of_the_weights)
{
    fg_backend *plain = fg_backend_open("cpu", 1), *device = fg__device_open();
    for (kind k = 0; k < MODELS; k++) {
        training a = train(plain, k), b = train(device, k), c = train(device, k);
        cr_expect_gt(casts_of_weights(a.plan), 0, "model %d", k);
        cr_expect_eq(casts_of_weights(b.plan), 0, "model %d: %d", k, casts_of_weights(b.plan));
        for (int step = 1; step <= 4; step++) {
            const double x = train_step(&b, step, 0.01f), y = train_step(&c, step, 0.01f);
            cr_expect_eq(x, y, "model %d, step %d: %.17g and %.17g", k, step, x, y);
            c.store->version++;
        }
        train_end(&a);
        train_end(&b);
        train_end(&c);
    }
    fg_backend_close(plain);
    fg_backend_close(device);
}

/* A plan that is new has no copies, one whose store was changed from outside has old ones. */
Test(lower, copies_of_weights_are_made_anew_when_they_must_be)
{
    fg_backend *device = fg__device_open();
    training a = train(device, FOX_PRO), b = train(device, FOX_PRO);
    for (int step = 1; step <= 6; step++) {
        if (step == 3) {
            grow(&a);
            grow(&b);
        }
        if (step == 4) {
            fg_plan_free(b.plan);
            b.plan = fg_plan_new(b.g, b.store);
        }
        if (step == 5) b.store->version++;
        const float lr = step == 6 ? 0 : 0.01f;
        const double x = train_step(&a, step, lr), y = train_step(&b, step, lr);
        cr_expect_eq(x, y, "step %d: %.17g and %.17g", step, x, y);
    }
    train_end(&a);
    train_end(&b);
    fg_backend_close(device);
}

/* Evaluation between steps: another plan of the same store, which has copies of its own. */
Test(lower, plans_of_one_store_see_each_others_updates)
{
    fg_backend *device = fg__device_open();
    training a = train(device, FOX_PRO), b = train(device, FOX_PRO);
    fg_plan *second = fg_plan_new(a.g, a.store), *first = a.plan;
    for (int step = 1; step <= 6; step++) {
        a.plan = step % 3 ? first : second;
        const double x = train_step(&a, step, 0.01f), y = train_step(&b, step, 0.01f);
        cr_expect_eq(x, y, "step %d: %.17g and %.17g", step, x, y);
    }
    a.plan = first;
    fg_plan_free(second);
    train_end(&a);
    train_end(&b);
    fg_backend_close(device);
}
