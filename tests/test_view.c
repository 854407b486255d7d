/* test_view.c - graph.json, its reader, layout, folding, every format and diff, on graphs made
 * here. tests/test_browser.py tests the page in a browser. */
#include <criterion/criterion.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "fox_graph.h"
#include "plan.h"
#include "view.h"

typedef struct { char *text; size_t n, cap; } text;

static void add_text(void *to, const char *s)
{
    text *t = to;
    const size_t n = strlen(s);
    if (t->n + n + 1 > t->cap) t->text = realloc(t->text, t->cap = 2 * (t->n + n) + 100);
    memcpy(t->text + t->n, s, n + 1);
    t->n += n;
}

static fg_tensor model(fg_graph *g, fox_config c, int64_t B, int64_t T)
{
    return fox_lm(fg_input(g, "tokens", FG_I32, FG_DIMS(B, T)), &c);
}

/* A training graph of a small FoX (Pro). */
static fg_graph *training(int64_t layers, fg_graph **update)
{
    fg_graph *g = fg_graph_new();
    fg_tensor logits = model(g, fox_pro_config(50, 32, layers, 2), 2, 8);
    fg_tensor labels = fg_input(g, "labels", FG_I32, FG_DIMS(2, 8));
    fg_tensor loss = fg_mean(fg_cross_entropy(logits, labels));
    const fg_optimizer o = { 0.9, 0.95, 1e-8, 0.1, 1, update ? 4 : 1 };
    fg_train_graph(loss, &o, update);
    cr_assert_eq(fg_graph_status(g), FG_OK, "%s", fg_graph_message(g));
    return g;
}

static text json_of(fg_graph *g, fg_plan *p, unsigned passes)
{
    text t = { 0 };
    const fg_json_part part = { p ? NULL : g, p, p ? FG_STAGE_PLANNED : FG_STAGE_BUILT };
    const fg_json_options o = { "a model", NULL, passes, true };
    cr_assert_eq(fg_graph_json(1, &part, &o, add_text, &t), FG_OK);
    return t;
}

static fg_view *view_of(const char *json)
{
    fg_view *v;
    char message[400];
    cr_assert_eq(fg_view_read(json, strlen(json), &v, message), FG_OK, "%s", message);
    return v;
}

static fg_view *view_of_graph(fg_graph *g)
{
    text t = json_of(g, NULL, 0);
    fg_view *v = view_of(t.text);
    free(t.text);
    return v;
}

/* ---- the schema ------------------------------------------------------------------------------ */

static bool is_type(const json_t *x, const char *type)
{
    return !strcmp(type, "object") ? json_is_object(x) : !strcmp(type, "array") ? json_is_array(x)
         : !strcmp(type, "string") ? json_is_string(x) : !strcmp(type, "integer")
             ? json_is_integer(x)
         : !strcmp(type, "number") ? json_is_number(x) : !strcmp(type, "boolean")
             ? json_is_boolean(x)
         : json_is_null(x);
}

/* The words of JSON Schema that ours uses; false with the place and what is wrong. */
static bool fits(const json_t *x, const json_t *schema, char *where, size_t size)
{
    const json_t *type = json_object_get(schema, "type"), *values = json_object_get(schema, "enum");
    const json_t *fields = json_object_get(schema, "properties"), *least;
    const char *key, *start = where + strlen(where);
    json_t *y;
    size_t i;
    bool ok = !type;
    if (json_is_string(type)) ok = is_type(x, json_string_value(type));
    json_array_foreach(type, i, y) ok = ok || is_type(x, json_string_value(y));
    if (!ok) return snprintf((char *)start, size - (size_t)(start - where), ": type") < 0;
    ok = !values;
    json_array_foreach(values, i, y) ok = ok || json_equal(x, y);
    if (!ok) return snprintf((char *)start, size - (size_t)(start - where), ": enum") < 0;
    least = json_object_get(schema, "minimum");
    if (least && json_is_number(x) && json_number_value(x) < json_number_value(least))
        return snprintf((char *)start, size - (size_t)(start - where), ": minimum") < 0;
    json_array_foreach(json_object_get(schema, "required"), i, y)
        if (!json_object_get(x, json_string_value(y)))
            return snprintf((char *)start, size - (size_t)(start - where), " lacks %s",
                            json_string_value(y)) < 0;
    json_object_foreach((json_t *)(uintptr_t)x, key, y) {
        const json_t *s = json_object_get(fields, key);
        snprintf((char *)start, size - (size_t)(start - where), ".%s", key);
        if (fields && !s && json_is_false(json_object_get(schema, "additionalProperties")))
            return false;
        if (s && !fits(y, s, where, size)) return false;
    }
    json_array_foreach(x, i, y) {
        snprintf((char *)start, size - (size_t)(start - where), "[%d]", (int)i);
        if (!fits(y, json_object_get(schema, "items"), where, size)) return false;
    }
    *(char *)(uintptr_t)start = 0;
    return true;
}

static void check_schema(const char *json, bool should)
{
    json_error_t e;
    char where[2000] = "";
    json_t *schema = json_load_file(SOURCE_DIR "/docs/graph.schema.json", 0, &e);
    cr_assert_not_null(schema, "%s in line %d", e.text, e.line);
    json_t *x = json_loads(json, 0, &e);
    cr_assert_not_null(x, "%s in line %d", e.text, e.line);
    cr_expect_eq(fits(x, schema, where, sizeof where), should, "%s", where);
    json_decref(x);
    json_decref(schema);
}

Test(view, graph_json_is_as_its_schema_says)
{
    fg_graph *update, *g = training(2, &update);
    text t = { 0 };
    const fg_json_part parts[] = { { g, NULL, FG_STAGE_BUILT }, { update, NULL, FG_STAGE_BUILT } };
    cr_assert_eq(fg_graph_json(2, parts, NULL, add_text, &t), FG_OK);
    check_schema(t.text, true);
    char *kind = strstr(t.text, "\"kind\":\"param\"");
    kind[9] = 'x';
    check_schema(t.text, false);
    free(t.text);
    fg_add(fg_find(g, "tokens"), fg_fill(g, FG_DIMS(5), 1));
    t = json_of(g, NULL, 0);
    check_schema(t.text, true);
    free(t.text);
    fg_graph_free(update);
    fg_graph_free(g);
}

/* ---- accounting ------------------------------------------------------------------------------ */

typedef struct { fg_backend *b; fg_store *s; fg_plan *p; } ready;

static ready plan_of(const fg_graph *g)
{
    ready r = { fg_backend_open("cpu", 1), NULL, NULL };
    r.s = fg_store_new(r.b);
    r.p = fg_plan_new(g, r.s);
    cr_assert_eq(fg_plan_status(r.p), FG_OK, "%s", fg_plan_message(r.p));
    return r;
}

static void close_plan(ready *r)
{
    fg_plan_free(r->p);
    fg_store_free(r->s);
    fg_backend_close(r->b);
}

Test(view, rectangles_of_the_plan_never_overlap_and_fill_the_arena)
{
    fg_graph *g = training(3, NULL);
    ready r = plan_of(g);
    text t = json_of(g, r.p, 0);
    check_schema(t.text, true);
    fg_view *v = view_of(t.text);
    int64_t high = 0, n = 0;
    for (int32_t i = 0; i < v->n_values; i++) {
        const view_value *x = &v->value[i];
        if (!x->laid) continue;
        n++;
        if (x->offset + x->bytes > high) high = x->offset + x->bytes;
        for (int32_t k = 0; k < i; k++) {
            const view_value *y = &v->value[k];
            cr_expect(!y->laid || x->to < y->from || y->to < x->from ||
                      x->offset + x->bytes <= y->offset || y->offset + y->bytes <= x->offset,
                      "values %d and %d", (int)x->id, (int)y->id);
        }
    }
    cr_expect(n > 50);
    cr_assert_eq(v->n_plans, 1);
    cr_expect_eq(high, v->plan[0].arena);
    cr_expect_eq((size_t)high, fg_plan_describe(r.p).activations);
    double flops = 0;
    for (int32_t k = 0; k < v->n_nodes; k++) flops += v->node[k].flops;
    cr_expect_eq(flops, fg_plan_describe(r.p).flops);
    cr_expect_eq(v->n_nodes, fg_plan_describe(r.p).nodes);
    fg_view_free(v);
    free(t.text);
    close_plan(&r);
    fg_graph_free(g);
}

static size_t largest;
static const fg_backend_ops *true_ops;
static void *counted(fg_backend *b, size_t bytes)
{
    if (bytes > largest) largest = bytes;
    return true_ops->alloc(b, bytes);
}

Test(view, the_planned_peak_is_what_the_allocator_gives)
{
    fg_graph *g = training(2, NULL);
    ready r = plan_of(g);
    fg_backend_ops ops = *r.b->ops;
    true_ops = r.b->ops;
    ops.alloc = counted;
    cr_assert_eq(fg_store_init(r.s, g, 1), FG_OK);
    r.b->ops = &ops;
    const int32_t tokens[16] = { 1, 2, 3 };
    cr_assert_eq(fg_write(r.p, fg_find(g, "tokens"), tokens, sizeof tokens), FG_OK, "%s",
                 fg_plan_message(r.p));
    text t = json_of(g, r.p, 0);
    fg_view *v = view_of(t.text);
    cr_expect_eq((int64_t)largest, v->plan[0].arena, "%zu", largest);
    fg_view_free(v);
    free(t.text);
    r.b->ops = true_ops;
    close_plan(&r);
    fg_graph_free(g);
}

/* Forward operations of B sequences of T tokens, from the costs in ops/: 2 for a multiply-add, 4 an
 * element for a norm (9 with a gate), 6 for SwiGLU, 10 for a curve, 3 for a shift or rotation. */
static double closed_form(bool pro, bool gate, bool rope, double B, double T, double h, double H,
                          double L, double I, double V)
{
    const double n = B * T * h, linear = 2 * B * T * h * h;
    double block = 4 * B * h * T * (T + 1) / 2 + (pro ? 5 : 4) * linear + 2 * 4 * n + 2 * n;
    block += 2 * B * T * h * 3 * I + 6 * B * T * I;
    if (gate) block += 2 * n * H + 10 * B * T * H;
    if (rope) block += 2 * 3 * n;
    if (pro) block += 2 * (2 * n * H + 10 * B * T * H + 3 * n + 4 * n) + 9 * n;
    return L * block + 4 * n + 2 * B * T * h * V;
}

Test(view, operations_are_those_of_the_closed_form)
{
    enum { B = 2, T = 24, h = 64, H = 4, L = 3, V = 50 };
    const struct { fox_config c; bool pro, gate, rope; } fox[] = {
        { fox_pro_config(V, h, L, H), true, true, false },
        { fox_llama_config(V, h, L, H), false, true, false },
        { transformer_pro_config(V, h, L, H), true, false, true },
    };
    const double I = (double)fg_nn_mlp_width(h, 4);
    for (int i = 0; i < 4; i++) {
        fg_graph *g = fg_graph_new();
        const transformer_config t = transformer_llama_config(V, h, L, H);
        fg_tensor tokens = fg_input(g, "tokens", FG_I32, FG_DIMS(B, T));
        if (i < 3) fox_lm(tokens, &fox[i].c);
        else transformer_lm(tokens, &t);
        fg_view *v = view_of_graph(g);
        double flops = 0;
        for (int32_t k = 0; k < v->n_nodes; k++) flops += v->node[k].flops;
        const double wanted = i < 3
            ? closed_form(fox[i].pro, fox[i].gate, i < 3 && fox[i].c.use_rope, B, T, h, H, L, I, V)
            : closed_form(false, false, true, B, T, h, H, L, I, V);
        cr_expect_eq(flops, wanted, "family %d: %.0f, closed form %.0f", i, flops, wanted);
        cr_expect_eq(fg__view_box_heat(v, &v->box[0], 0, FG_HEAT_FLOPS), flops);
        fg_view_free(v);
        fg_graph_free(g);
    }
}

static double sum_of(fg_graph *g)
{
    fg_view *v = view_of_graph(g);
    double flops = 0;
    for (int32_t k = 0; k < v->n_nodes; k++) flops += v->node[k].flops;
    fg_view_free(v);
    fg_graph_free(g);
    return flops;
}

/* The families with a state instead of keys: chunks of 16 positions (64 in the state space
 * scan). */
Test(view, operations_of_the_recurrent_families_are_those_of_the_closed_form)
{
    const double B = 2, T = 24, h = 64, H = 4, L = 3, V = 50, n = B * T * h, d = h / H;
    const double I = (double)fg_nn_mlp_width(64, 4), head = 4 * n + 2 * n * V;
    const double halves = 8 * n + 2 * n + 6 * n * I + 6 * B * T * I;       /* norms, sums, MLP */
    fg_graph *g = fg_graph_new();
    delta_net_config delta = { .vocab_size = 50, .hidden_size = 64, .num_hidden_layers = 3,
                               .num_heads = 4, .conv_size = 4 };
    delta_net_lm(fg_input(g, "tokens", FG_I32, FG_DIMS(2, 24)), &delta);
    double block = halves + 8 * n * h + 3 * 12 * n + 2 * 3 * n + 4 * n + 2 * n * H + 10 * B * T * H
                 + B * T * H * (6 * d * d + 16 * 4 * d);
    const double of_delta = sum_of(g);
    cr_expect_eq(of_delta, L * block + head, "%.0f, closed form %.0f", of_delta, L * block + head);

    hgrn2_config hgrn2 = { .vocab_size = 50, .hidden_size = 64, .num_hidden_layers = 3,
                           .expand_ratio = 16, .lower_bound = HGRN2_BOUNDS_APPLIED };
    g = fg_graph_new();
    hgrn2_lm(fg_input(g, "tokens", FG_I32, FG_DIMS(2, 24)), &hgrn2);
    block = halves + 8 * n * h + 4 * n + 18 * n + B * T * H * (4 * d * d + 16 * 2 * d);
    const double bounds = 14 * L * h;
    const double of_hgrn2 = sum_of(g);
    cr_expect_eq(of_hgrn2, L * block + bounds + head, "%.0f, closed form %.0f", of_hgrn2,
                 L * block + bounds + head);

    mamba2_config mamba2 = { .vocab_size = 50, .hidden_size = 64, .num_hidden_layers = 3,
                             .num_heads = 4, .head_dim = 32, .state_size = 16 };
    g = fg_graph_new();
    mamba2_lm(fg_input(g, "tokens", FG_I32, FG_DIMS(2, 24)), &mamba2);
    const double E = 128, N = 16, rows = B * T;
    block = 4 * n + 2 * n * (2 * E + 2 * N + H) + 12 * rows * (E + 2 * N) + 11 * rows * H + 11 * H
          + rows * E * (64 + 4 * N) + rows * N * 64 + 10 * rows * E + 2 * n * E + n;
    const double of_mamba2 = sum_of(g);
    cr_expect_eq(of_mamba2, L * block + head, "%.0f, closed form %.0f", of_mamba2,
                 L * block + head);
}

/* ---- structure ------------------------------------------------------------------------------- */

static const view_item *find_run(const fg_view *v, const view_box **in)
{
    for (int32_t b = 0; b < v->n_boxes; b++)
        for (int32_t i = 0; i < v->box[b].n_items; i++)
            if (v->box[b].item[i].kind == ITEM_RUN) {
                *in = &v->box[b];
                return &v->box[b].item[i];
            }
    return NULL;
}

Test(view, equal_blocks_are_one_run)
{
    fg_graph *g = training(24, NULL);
    fg_view *v = view_of_graph(g);
    const view_box *in;
    const view_item *run = find_run(v, &in);
    cr_assert_not_null(run);
    cr_expect_eq(run->count, 24);
    cr_expect_str_eq(in->path, "model.layers");
    for (int32_t k = 0; k < v->n_nodes; k++) {
        const view_node *n = &v->node[k], *home = &v->node[n->home];
        cr_expect_eq(home->home, n->home);
        if (n->pass == VIEW_BACKWARD && n->pair >= 0) cr_expect_eq(home->pass, VIEW_FORWARD);
        cr_expect_eq(v->drawn[v->at[k]], k);
    }
    fg_view_free(v);
    fg_graph_free(g);
}

Test(view, a_block_that_differs_in_one_attribute_stands_alone)
{
    fg_graph *g = fg_graph_new();
    fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(2, 8));
    for (int i = 0; i < 6; i++) {
        fg_scope_push(g, fg_name(g, "block%d", i));
        x = fg_nn_norm(x, "norm", i == 3 ? 1e-5 : 1e-6);
        x = fg_nn_linear(x, "w", 8);
        fg_scope_pop(g);
    }
    fg_output(x, "y");
    fg_view *v = view_of_graph(g);
    int n = 0, counts[8] = { 0 };
    for (int32_t i = 0; i < v->box[0].n_items; i++)
        if (v->box[0].item[i].kind == ITEM_RUN || v->box[0].item[i].kind == ITEM_BOX)
            counts[n++] = v->box[0].item[i].count;
    cr_expect_eq(n, 3);
    cr_expect(counts[0] == 3 && counts[1] == 1 && counts[2] == 2, "%d %d %d", counts[0], counts[1],
              counts[2]);
    fg_view_free(v);
    fg_graph_free(g);
}

Test(view, blocks_that_take_a_row_each_of_one_table_are_equal)
{
    fg_graph *g = fg_graph_new();
    fg_tensor tokens = fg_input(g, "tokens", FG_I32, FG_DIMS(1, 4));
    const hgrn2_config c = { .vocab_size = 20, .hidden_size = 16, .num_hidden_layers = 5,
                             .expand_ratio = 8, .lower_bound = HGRN2_BOUNDS_APPLIED };
    hgrn2_lm(tokens, &c);
    fg_view *v = view_of_graph(g);
    const view_box *in;
    const view_item *run = find_run(v, &in);
    cr_assert_not_null(run);
    cr_expect_eq(run->count, 4);                         /* the first has no bounds */
    fg_view_free(v);
    fg_graph_free(g);
}

Test(view, equal_neighbours_with_other_names_are_not_folded)
{
    fg_graph *g = fg_graph_new();
    fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(2, 8)), y[2];
    const char *const name[] = { "left", "right" };
    for (int i = 0; i < 2; i++) {
        fg_scope_push(g, name[i]);
        y[i] = fg_nn_linear(x, "w", 8);
        fg_scope_pop(g);
    }
    fg_output(fg_add(y[0], y[1]), "y");
    fg_view *v = view_of_graph(g);
    const view_box *in;
    cr_expect_null(find_run(v, &in));
    fg_view_free(v);
    fg_graph_free(g);
}

static void check_box(const view_picture *p, int32_t at)
{
    const fg_view *v = p->v;
    const view_box *b = &v->box[at];
    const view_class *c = &v->class[b->class];
    const view_frame *f = &p->frame[at];
    for (int32_t e = 0; e < c->n_edges; e++) {
        int32_t from = 0, to = 0;
        while (c->row[from + 1] <= c->edge[e].from) from++;
        while (c->row[to + 1] <= c->edge[e].to) to++;
        if (!c->edge[e].back) cr_expect_lt(from, to, "edge %d of %s", (int)e, b->path);
    }
    for (int32_t r = 0; r < c->n_rows; r++) {
        if (r) cr_expect_geq(f->y[r], f->y[r - 1] + f->row_h[r - 1], "rows of %s", b->path);
        for (int32_t i = c->row[r]; i < c->row[r + 1]; i++) {
            if (c->cell[i].kind != CELL_ITEM) continue;
            const view_size s = fg__view_size_now(p, b, c->cell[i].ref);
            for (int lane = 0; lane < VIEW_LANES; lane++) {
                if (s.w[lane] <= 0) continue;
                cr_expect_leq(s.h[lane], f->row_h[r] + 1e-9);
                cr_expect_geq(f->x[lane][i] - s.w[lane] / 2, -1e-6, "left of %s", b->path);
                cr_expect_leq(f->x[lane][i] + s.w[lane] / 2, f->w[lane] + 1e-6, "right of %s",
                              b->path);
                for (int32_t k = c->row[r]; k < i; k++) {
                    if (c->cell[k].kind != CELL_ITEM) continue;
                    const double w = fg__view_size_now(p, b, c->cell[k].ref).w[lane];
                    if (w > 0)
                        cr_expect_leq(f->x[lane][k] + w / 2, f->x[lane][i] - s.w[lane] / 2 + 1e-6);
                }
            }
            const int32_t inner = fg__view_shown(v, b, &b->item[c->cell[i].ref]);
            if (inner >= 0 && p->open[inner]) check_box(p, inner);
        }
    }
}

Test(view, layout_keeps_its_promises_at_every_depth)
{
    fg_graph *g = training(4, NULL);
    fg_view *v = view_of_graph(g);
    double before = 0;
    for (int depth = 0; depth < 7; depth++) {
        const fg_view_options o = { .depth = depth };
        view_picture p;
        cr_assert(fg__view_compose(v, &o, &p));
        check_box(&p, p.top);
        cr_expect_geq(p.h, before, "opening makes nothing smaller");
        before = p.h;
    }
    fg_view_free(v);
    fg_graph_free(g);
}

Test(view, spread_keeps_order_and_gaps_and_moves_little)
{
    double x[] = { 10, 11, 50, 49, 200 };
    const double w[] = { 10, 10, 20, 20, 10 };
    fg__view_spread(5, x, w, NULL, 4);
    for (int i = 1; i < 5; i++) cr_expect_geq(x[i] - x[i - 1], (w[i] + w[i - 1]) / 2 + 4 - 1e-9);
    cr_expect_float_eq(x[4], 200, 1e-9);
    cr_expect_float_eq(x[0] + x[1], 21, 1e-9);
    cr_expect_float_eq(x[2] + x[3], 99, 1e-9);
}

/* ---- formats --------------------------------------------------------------------------------- */

typedef fg_status (*writer)(const fg_view *, const fg_view_options *, fg_put, void *);
static const writer writers[] = { fg_view_text, fg_view_dot, fg_view_svg, fg_view_html };

Test(view, the_same_graph_gives_the_same_bytes)
{
    fg_graph *g = training(2, NULL);
    const fg_view_options o = { .depth = -1, .heat = FG_HEAT_FLOPS };
    for (int i = 0; i < 4; i++) {
        text t[2] = { { 0 }, { 0 } };
        for (int k = 0; k < 2; k++) {
            fg_view *v = view_of_graph(g);
            cr_expect_eq(writers[i](v, &o, add_text, &t[k]), FG_OK);
            fg_view_free(v);
        }
        cr_expect_str_eq(t[0].text, t[1].text);
        free(t[0].text);
        free(t[1].text);
    }
    fg_graph_free(g);
}

static const char *const hostile[] = {
    "</script><script>alert(1)</script>", "\"quotes\" 'and' \\back\\slashes\\", "line\nbreak\ttab",
    "<img src=x onerror=alert(2)>", "&amp; &lt; ]]> -->", "\342\200\256right to left\342\200\254",
    "\"];evil [label=\"x", "${alert(3)} `x` %s %n",
    ("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
     "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"),
};
enum { HOSTILE = sizeof hostile / sizeof hostile[0] };

Test(view, hostile_names_come_out_as_text)
{
    fg_graph *g = fg_graph_new();
    fg_tensor x = fg_input(g, hostile[0], FG_F32, FG_DIMS(2, 8));
    for (int i = 1; i < HOSTILE; i++) {
        fg_scope_push(g, hostile[i]);
        x = fg_nn_linear(x, hostile[(i + 3) % HOSTILE], 8);
        fg_scope_pop(g);
    }
    fg_output(x, hostile[3]);
    fg_view *v = view_of_graph(g);
    const fg_view_options o = { .depth = -1 };
    text t[4] = { { 0 }, { 0 }, { 0 }, { 0 } };
    for (int i = 0; i < 4; i++) cr_expect_eq(writers[i](v, &o, add_text, &t[i]), FG_OK);
    cr_expect_null(strstr(t[2].text, "<script"));
    cr_expect_null(strstr(t[2].text, "<img"));
    cr_expect_null(strstr(t[3].text, "alert(1)</script>"));
    cr_expect_null(strstr(t[3].text, "<img"));
    cr_expect_null(strstr(t[3].text, "\342\200\256"));
    int scripts = 0;
    for (const char *s = t[3].text; (s = strstr(s, "<script")); s++) scripts++;
    cr_expect_eq(scripts, 2, "%d scripts", scripts);
    for (int i = 0; i < 4; i++) cr_expect(fg_text_is_utf8(t[i].text), "format %d", i);
    for (int i = 0; i < 4; i++) free(t[i].text);
    fg_view_free(v);
    fg_graph_free(g);
}

Test(view, the_page_names_the_hash_of_its_script_and_no_address)
{
    fg_graph *g = training(1, NULL);
    fg_view *v = view_of_graph(g);
    const fg_view_options o = { .depth = -1 };
    text t = { 0 };
    char hash[48];
    fg_view_html(v, &o, add_text, &t);
    const char *script = strrchr(t.text, '\0');
    for (const char *s = t.text; (s = strstr(s, "<script>")); s++) script = s + 8;
    const char *end = strstr(script, "</script>");
    cr_assert_not_null(end);
    fg__view_sha256(script, (size_t)(end - script), hash);
    cr_expect_not_null(strstr(t.text, hash), "%s", hash);
    for (char *s = strstr(t.text, "xmlns=\"http"); s; s = strstr(s, "xmlns=\"http"))
        memset(s, 'x', 12);
    cr_expect_null(strstr(t.text, "http:"));
    cr_expect_null(strstr(t.text, "https:"));
    cr_expect_null(strstr(t.text, "src="));
    cr_expect_null(strstr(t.text, "url("));
    free(t.text);
    fg_view_free(v);
    fg_graph_free(g);
}

Test(view, sha256_is_the_standards)
{
    char hash[48], long_text[200];
    fg__view_sha256("abc", 3, hash);
    cr_expect_str_eq(hash, "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=");
    fg__view_sha256("", 0, hash);
    cr_expect_str_eq(hash, "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=");
    memset(long_text, 'a', sizeof long_text);
    fg__view_sha256(long_text, 119, hash);               /* the length falls into another block */
    cr_expect_eq(strlen(hash), 44);
}

/* ---- the reader ------------------------------------------------------------------------------ */

Test(view, wrong_files_are_refused_with_the_reason)
{
#define BEFORE "{\"fox_graph\":1,\"scopes\":["
#define VALUES "],\"values\":["
#define NODES  "],\"nodes\":["
#define V1     "{\"id\":1,\"kind\":\"node\",\"dtype\":\"f32\",\"shape\":[2],\"bytes\":8}"
#define NODE(in, out, more) \
    "{\"id\":0,\"op\":\"exp\",\"pass\":\"forward\",\"scope\":0,\"in\":[" in "],\"out\":[" out \
    "]" more "}"
    static const struct { const char *json, *message; } wrong[] = {
        { "", "" },
        { "[1]", "this is no graph.json: it has no 'fox_graph'" },
        { "{\"fox_graph\":2}", "graph.json of version 2 is not known, only 1" },
        { "{\"fox_graph\":1}", "needs a list 'scopes'" },
        { BEFORE "{\"id\":2,\"parent\":3,\"path\":\"a\"},{\"id\":3,\"parent\":0,\"path\":\"b\"}"
          VALUES NODES "]}", "scope 2: its parent 3 does not come before it" },
        { BEFORE "{\"id\":2,\"parent\":2,\"path\":\"a\"}" VALUES NODES "]}",
          "scope 2: its parent 2 does not come before it" },
        { BEFORE VALUES V1 "," V1 NODES "]}", "two values have the id 1" },
        { BEFORE VALUES V1 NODES NODE("9", "1", "") "]}",
          "node 0: 'in' names a value that is not there" },
        { BEFORE VALUES V1 NODES NODE("", "1,1", "") "]}",
          "node 0: output 1 is no value that this node alone makes" },
        { BEFORE VALUES V1 NODES NODE("", "1", ",\"attrs\":3") "]}",
          "node 0: 'attrs' must be an object" },
        { BEFORE VALUES "{\"id\":1,\"kind\":\"thing\",\"shape\":[]}" NODES "]}",
          "value 1: its kind is node, input, param or state" },
        { BEFORE VALUES "{\"id\":1,\"kind\":\"node\",\"shape\":[-1]}" NODES "]}",
          "value 1: its shape is not whole numbers" },
        { BEFORE VALUES "{\"id\":1,\"kind\":\"node\",\"shape\":[1,2,3,4,5,6,7]}" NODES "]}",
          "value 1: 'shape' is longer than 6" },
        { BEFORE VALUES "{\"id\":1,\"kind\":\"node\",\"shape\":[],\"bytes\":-1}" NODES "]}",
          "value 1: its bytes are out of range" },
        { BEFORE VALUES "{\"id\":1,\"kind\":\"node\",\"shape\":[],\"root\":7}" NODES "]}",
          "value 1: its root 7 is not there" },
        { BEFORE VALUES V1 NODES "],\"outputs\":[{\"value\":5}]}",
          "an output's value is not there" },
    };
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        fg_view *v = (fg_view *)&v;
        char message[400];
        cr_expect_eq(fg_view_read(wrong[i].json, strlen(wrong[i].json), &v, message), FG_ERR_FORMAT,
                     "case %zu", i);
        cr_expect_null(v);
        if (wrong[i].message[0]) cr_expect_str_eq(message, wrong[i].message);
    }
}

/* Rings of values are no graph that a builder makes, but a file may hold one. */
Test(view, rings_are_drawn_as_they_are)
{
    const char *json =
        BEFORE "{\"id\":1,\"parent\":0,\"path\":\"a\"},{\"id\":2,\"parent\":0,\"path\":\"b\"}"
        VALUES V1 ",{\"id\":2,\"kind\":\"node\",\"dtype\":\"f32\",\"shape\":[2],\"bytes\":8}" NODES
        "{\"id\":0,\"op\":\"exp\",\"pass\":\"forward\",\"scope\":1,\"in\":[2],"
        "\"out\":[1],\"pair\":1},"
        "{\"id\":1,\"op\":\"exp\",\"pass\":\"backward\",\"scope\":2,\"in\":[1],"
        "\"out\":[2],\"pair\":1},"
        "{\"id\":2,\"op\":\"log\",\"pass\":\"forward\",\"scope\":2,\"in\":[1,2],\"out\":[]}]}";
    fg_view *v = view_of(json);
    const fg_view_options o = { .depth = -1, .memory = true };
    for (int i = 0; i < 4; i++) {
        text t = { 0 };
        cr_expect_eq(writers[i](v, &o, add_text, &t), FG_OK);
        free(t.text);
    }
    fg_view_free(v);
}

/* ---- diff ------------------------------------------------------------------------------------ */

static char *diff_of(const char *a, const char *b, bool *differ)
{
    fg_view *v[2] = { view_of(a), view_of(b) };
    text t = { 0 };
    cr_assert_eq(fg_view_diff(v[0], v[1], FG_DIFF_TEXT, add_text, &t, differ), FG_OK);
    text j = { 0 };
    cr_assert_eq(fg_view_diff(v[0], v[1], FG_DIFF_JSON, add_text, &j, differ), FG_OK);
    json_error_t e;
    json_t *x = json_loads(j.text, 0, &e);
    cr_assert_not_null(x, "%s", e.text);
    cr_expect_eq(json_is_true(json_object_get(x, "differ")), *differ);
    json_decref(x);
    free(j.text);
    for (int i = 0; i < 2; i++) fg_view_free(v[i]);
    return t.text;
}

typedef enum { PLAIN, CASTS, SHAPE, MOVED, ATTRIBUTE, SWAPPED } variant;

/* Blocks of norm, linear and curve, with a twist. */
static char *stack(int layers, variant twist)
{
    fg_graph *g = fg_graph_new();
    fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(2, 16));
    for (int i = 0; i < layers; i++) {
        fg_scope_push(g, fg_name(g, "layers.%d", i));
        x = fg_nn_norm(x, "norm", twist == ATTRIBUTE && i == 1 ? 1e-3 : 1e-6);
        if (twist == CASTS) x = fg_cast(x, FG_BF16);
        if (twist == CASTS) x = fg_cast(x, FG_F32);
        x = fg_nn_linear(fg_nn_linear(x, "up", twist == SHAPE && i == 2 ? 40 : 32), "down", 16);
        fg_scope_push(g, twist == MOVED && i == 2 ? "end" : "tail");
        x = fg_nn_linear(fg_silu(x), "last", 16);
        fg_scope_pop(g);
        fg_scope_pop(g);
    }
    const char *const name[] = { "first", "second" };
    for (int i = 0; i < 2; i++) {
        fg_scope_push(g, name[twist == SWAPPED ? 1 - i : i]);
        x = (twist == SWAPPED) != (i == 1) ? fg_exp(x) : fg_nn_linear(x, "w", 16);
        fg_scope_pop(g);
    }
    fg_output(x, "y");
    cr_assert_eq(fg_graph_status(g), FG_OK, "%s", fg_graph_message(g));
    text t = json_of(g, NULL, 0);
    fg_graph_free(g);
    return t.text;
}

static void expect_diff(char *a, char *b, const char *const lines[])
{
    bool differ;
    char *said = diff_of(a, b, &differ);
    cr_expect(differ);
    for (int i = 0; lines[i]; i++)
        cr_expect_not_null(strstr(said, lines[i]), "no '%s' in\n%s", lines[i], said);
    free(said);
    free(b);
}

Test(view, diff_names_and_counts_what_changed)
{
    char *plain = stack(4, PLAIN);
    bool differ = true;
    char *said = diff_of(plain, plain, &differ);
    cr_expect(!differ);
    cr_expect_str_eq(said, "the graphs are equal\n");
    free(said);
    expect_diff(plain, stack(4, CASTS), (const char *const[]){
        "8 added, 0 removed, 0 changed, 0 moved\n", "\n+ 8 cast  layers.*", NULL });
    expect_diff(plain, stack(4, SHAPE), (const char *const[]){
        "0 added, 0 removed, 1 changed, 0 moved\n",
        "\n~ 1 linear  layers.2  output 0 shape 2\303\22732 -> 2\303\22740", NULL });
    expect_diff(plain, stack(4, ATTRIBUTE), (const char *const[]){
        "0 added, 0 removed, 1 changed, 0 moved\n", "\n~ 1 rms_norm  layers.1  eps 1e-06 -> 0.001",
            NULL });
    expect_diff(plain, stack(4, MOVED), (const char *const[]){
        "0 added, 0 removed, 0 changed, 1 moved\n",
        "> 1 scope  layers.2.tail  from layers.2.tail to layers.2.end, 2 nodes", NULL });
    expect_diff(plain, stack(4, SWAPPED), (const char *const[]){
        " 1 moved\n", "> 1 scope", "in another place among its neighbours", NULL });
    expect_diff(plain, stack(6, PLAIN), (const char *const[]){
        "10 added, 0 removed,", "\n+ 4 linear  layers.*", "\n+ 2 rms_norm  layers.*", NULL });
    expect_diff(plain, stack(6, CASTS), (const char *const[]){ "+ 12 cast  layers.*", NULL });
    free(plain);
}

/* ---- times and statistics -------------------------------------------------------------------- */

Test(view, a_run_notes_times_and_values)
{
    fg_graph *g = fg_graph_new();
    fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(4));
    fg_output(fg_log(fg_neg(x)), "y");
    ready r = plan_of(g);
    const float in[4] = { -1, -2, -4, 1 };
    cr_assert_eq(fg_write(r.p, x, in, sizeof in), FG_OK);
    cr_assert_eq(fg_plan_record(r.p, FG_RECORD_TIMES | FG_RECORD_VALUES), FG_OK);
    cr_assert_eq(fg_run(r.p), FG_OK);
    text t = { 0 };
    const fg_json_part part = { NULL, r.p, FG_STAGE_PLANNED };
    cr_assert_eq(fg_graph_json(1, &part, NULL, add_text, &t), FG_OK);
    check_schema(t.text, true);
    fg_view *v = view_of(t.text);
    cr_expect(v->timed && v->seen);
    for (int32_t k = 0; k < v->n_nodes; k++) {
        const view_value *y = &v->value[v->node[k].out[0]];
        cr_expect_geq(v->node[k].time, 0);
        if (!strcmp(v->node[k].op, "neg")) {
            cr_expect_float_eq(y->least, -1, 1e-6);
            cr_expect_float_eq(y->greatest, 4, 1e-6);
            cr_expect_float_eq(y->mean, 1.5, 1e-6);
            cr_expect_float_eq(y->rms, sqrt(22.0 / 4), 1e-6);
            cr_expect_eq(y->not_finite, 0);
        } else cr_expect_eq(y->not_finite, 1);                    /* log -1 */
    }
    fg_view_free(v);
    free(t.text);
    t = json_of(g, r.p, 0);                              /* --stable leaves both out */
    cr_expect_null(strstr(t.text, "time_us"));
    cr_expect_null(strstr(t.text, "stats"));
    free(t.text);
    close_plan(&r);
    fg_graph_free(g);
}

Test(view, passes_can_be_shown_alone)
{
    fg_graph *g = training(1, NULL);
    for (unsigned passes = 1; passes <= 7; passes++) {
        text t = json_of(g, NULL, passes);
        check_schema(t.text, true);
        fg_view *v = view_of(t.text);
        for (int p = 0; p < 3; p++) cr_expect_eq(v->has[p], (passes >> p & 1) != 0);
        const fg_view_options o = { .depth = -1 };
        for (int i = 0; i < 4; i++) {
            text out = { 0 };
            cr_expect_eq(writers[i](v, &o, add_text, &out), FG_OK);
            free(out.text);
        }
        fg_view_free(v);
        free(t.text);
    }
    fg_graph_free(g);
}

Test(view, options_that_do_not_fit_are_refused)
{
    fg_graph *g = training(1, NULL);
    fg_view *v = view_of_graph(g);
    char message[400];
    cr_expect_eq(fg_view_check(v, &(fg_view_options){ .focus = "model.nowhere" }, message),
                 FG_ERR_USAGE);
    cr_expect_str_eq(message, "no scope 'model.nowhere' in this graph");
    cr_expect_eq(fg_view_check(v, &(fg_view_options){ .heat = FG_HEAT_TIME }, message),
                 FG_ERR_USAGE);
    cr_expect_eq(fg_view_check(v, &(fg_view_options){ .heat = FG_HEAT_ABSMAX }, message),
                 FG_ERR_USAGE);
    cr_expect_eq(fg_view_check(v, &(fg_view_options){ .focus = "model.layers.0" }, message), FG_OK);
    cr_expect_eq(fg_view_take_times(v, v, message), FG_ERR_USAGE);
    fg_view_free(v);
    fg_graph_free(g);
}
