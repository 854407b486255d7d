/* test_oom.c - every allocation of building, differentiating, planning and running failed in turn:
 * no crash, no leak (under the sanitizer build), and a clear status each time. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include "fox_graph.h"
#include "fox_view.h"

/* The linker sends the library's calls here (--wrap). */
void *__real_malloc(size_t n);
void *__real_calloc(size_t a, size_t b);
void *__real_realloc(void *p, size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t a, size_t b);
void *__wrap_realloc(void *p, size_t n);

static long left = -1;                   /* allocations until one fails; below 0: none fails */
static bool refused(void) { return left == 0 || (left > 0 && left-- == 1 && (left = 0) == 0); }
void *__wrap_malloc(size_t n) { return refused() ? NULL : __real_malloc(n); }
void *__wrap_calloc(size_t a, size_t b) { return refused() ? NULL : __real_calloc(a, b); }
void *__wrap_realloc(void *p, size_t n) { return refused() ? NULL : __real_realloc(p, n); }

static fg_status first(fg_status a, fg_status b) { return a ? a : b; }

static fg_status everything(void)
{
    fg_status st;
    fg_backend *b = fg_backend_open("cpu", 1);
    fg_store *s = fg_store_new(b);
    fg_graph *g = fg_graph_new(), *update = NULL;
    fg_plan *p = NULL, *q = NULL;
    if (!b || !s || !g) { st = FG_ERR_MEMORY; goto done; }
    fox_config c = fox_pro_config(17, 16, 2, 2);
    c.recompute = true;
    fg_tensor tokens = fg_input(g, "tokens", FG_I32, FG_DIMS(1, 8));
    fg_tensor labels = fg_input(g, "labels", FG_I32, FG_DIMS(1, 8));
    fg_tensor logits = fox_lm(tokens, &c);
    const fg_optimizer o = { 0.9, 0.95, 1e-8, 0.1, 1, 2 };
    st = fg_train_graph(fg_nn_loss(logits, labels), &o, &update);
    st = first(st, fg_graph_status(g));
    if (!st) st = fg_store_init(s, g, 1);
    if (!st) p = fg_plan_new(g, s);
    if (!st) q = fg_plan_new(update, s);
    if (!st) st = first(fg_plan_status(p), fg_plan_status(q));
    const int32_t ids[8] = { 1, 2, 3, 4, 5, 6, 7, 8 };
    if (!st) st = fg_write(p, tokens, ids, sizeof ids);
    if (!st) st = fg_write(p, labels, ids, sizeof ids);
    if (!st) st = fg_run(p);
    if (!st) st = fg_run(q);
done:
    fg_plan_free(p);
    fg_plan_free(q);
    fg_graph_free(g);
    fg_graph_free(update);
    fg_store_free(s);
    fg_backend_close(b);
    return st;
}

/* ---- drawing ----------------------------------------------------------------------------------
 */

typedef struct { char *text; size_t n, room; } page;

static void add(void *to, const char *text)
{
    page *p = to;
    const size_t n = strlen(text);
    if (p->n + n >= p->room) return;             /* what is drawn is only counted */
    memcpy(p->text + p->n, text, n + 1);
    p->n += n;
}

static fg_status draw(const fg_graph *g, page *json)
{
    static const fg_view_options o = { .depth = -1, .memory = true };
    const fg_json_part part = { g, NULL, FG_STAGE_BUILT };
    char nothing[1], message[400];
    page out = { nothing, 0, 1 };
    fg_view *v = NULL, *w = NULL;
    bool differ;
    json->n = 0;
    fg_status s = fg_graph_json(1, &part, NULL, add, json);
    if (!s) s = fg_view_read(json->text, json->n, &v, message);
    if (!s) s = fg_view_read(json->text, json->n, &w, message);
    if (!s) s = fg_view_text(v, &o, add, &out);
    if (!s) s = fg_view_dot(v, &o, add, &out);
    if (!s) s = fg_view_svg(v, &o, add, &out);
    if (!s) s = fg_view_html(v, &o, add, &out);
    for (int f = FG_DIFF_TEXT; f <= FG_DIFF_HTML && !s; f++)
        s = fg_view_diff(v, w, (fg_diff_format)f, add, &out, &differ);
    fg_view_free(v);
    fg_view_free(w);
    return s;
}

Test(oom, every_allocation_of_drawing_failed_in_turn)
{
    fg_graph *g = fg_graph_new(), *update = NULL;
    const fox_config c = fox_pro_config(17, 16, 2, 2);
    const fg_optimizer o = { 0.9, 0.95, 1e-8, 0.1, 1, 1 };
    fg_tensor tokens = fg_input(g, "tokens", FG_I32, FG_DIMS(1, 8));
    fg_tensor labels = fg_input(g, "labels", FG_I32, FG_DIMS(1, 8));
    fg_tensor logits = fox_lm(tokens, &c);
    cr_assert_eq(fg_train_graph(fg_nn_loss(logits, labels), &o, &update), FG_OK);
    page json = { malloc(1 << 22), 0, 1 << 22 };
    cr_assert_eq(draw(g, &json), FG_OK);
    long n = 1;
    for (;; n++) {
        left = n;
        const fg_status s = draw(g, &json);
        const bool all = left > 0;
        left = -1;
        if (all) { cr_assert_eq(s, FG_OK); break; }
        cr_assert_eq(s, FG_ERR_MEMORY, "allocation %ld failed: %s", n, fg_status_text(s));
    }
    cr_assert_gt(n, 1000, "only %ld allocations were seen", n);
    free(json.text);
    fg_graph_free(g);
}

Test(oom, every_allocation_failed_in_turn)
{
    cr_assert_eq(everything(), FG_OK);           /* one-time allocations of libraries happen here */
    long n = 1;
    for (;; n++) {
        left = n;
        const fg_status s = everything();
        const bool all = left > 0;
        left = -1;
        if (all) { cr_assert_eq(s, FG_OK); break; }
        cr_assert_eq(s, FG_ERR_MEMORY, "allocation %ld failed: %s", n, fg_status_text(s));
    }
    cr_assert_gt(n, 100, "only %ld allocations were seen", n);
}
