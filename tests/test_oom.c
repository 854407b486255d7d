/* test_oom.c - every allocation of building, differentiating, planning and running failed in turn:
 * no crash, no leak (under the sanitizer build), and a clear status each time. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include "fox_graph.h"

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
