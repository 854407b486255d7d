/* test_cuda_same_bits.c - every family on a GPU in bf16, to the bit: what comes later changes no
 * logit before, and 20 runs with all gradients beside another stream's work are one; skipped, with
 * the reason, where there is no GPU. */
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include "device_cuda.h"
#include "fox_autodiff.h"
#include "fox_models.h"

enum { T = 300, V = 211, MOST = 200, RUNS = 20 };

static fg_tensor fox_pro(fg_tensor tokens)
{
    const fox_config c = fox_pro_config(V, 256, 2, 4);
    return fox_lm(tokens, &c);
}
static fg_tensor fox_llama(fg_tensor tokens)
{
    const fox_config c = fox_llama_config(V, 256, 2, 2);
    return fox_lm(tokens, &c);
}
static fg_tensor transformer(fg_tensor tokens)
{
    const transformer_config c = transformer_llama_config(V, 256, 2, 4);
    return transformer_lm(tokens, &c);
}
static fg_tensor mamba2(fg_tensor tokens)
{
    const mamba2_config c = mamba2_lm_config(V, 256, 2, 8);
    return mamba2_lm(tokens, &c);
}
static fg_tensor hgrn2(fg_tensor tokens)
{
    const hgrn2_config c = hgrn2_lm_config(V, 256, 2, 128);
    return hgrn2_lm(tokens, &c);
}
static fg_tensor delta_net(fg_tensor tokens)
{
    const delta_net_config c = delta_net_lm_config(V, 256, 2, 2);
    return delta_net_lm(tokens, &c);
}

static const struct { const char *name; fg_tensor (*build)(fg_tensor tokens); } families[] = {
    { "fox_pro", fox_pro }, { "fox_llama", fox_llama }, { "transformer", transformer },
    { "mamba2", mamba2 }, { "hgrn2", hgrn2 }, { "delta_net", delta_net },
};
enum { FAMILIES = sizeof families / sizeof families[0] };

typedef struct {
    fg_graph *g;
    fg_store *store;
    fg_plan *plan;
    fg_tensor tokens, out[MOST];         /* logits; or the losses and all gradients */
    int n;
} model;

static int32_t token_at(int64_t t, int64_t add)
{
    return (int32_t)((t * t * 3 + t * 17 + add) % V);
}

static void put_tokens(model *m, int64_t from, int64_t add)
{
    int32_t x[T];
    for (int64_t t = 0; t < T; t++) x[t] = token_at(t, t < from ? 0 : add);
    cr_assert_eq(fg_write(m->plan, m->tokens, x, sizeof x), FG_OK, "%s", fg_plan_message(m->plan));
}

static model model_new(int family, fg_backend *gpu, bool gradients)
{
    model m = { .g = fg_graph_new(), .store = fg_store_new(gpu) };
    m.tokens = fg_input(m.g, "tokens", FG_I32, FG_DIMS(1, T));
    m.out[m.n++] = families[family].build(m.tokens);
    fg_param_info p;
    fg_tensor wrt[MOST], grad[MOST];
    int n = 0;
    if (gradients) {
        m.out[0] = fg_cross_entropy(m.out[0], m.tokens);
        const fg_tensor loss = fg_mean(m.out[0]);
        for (; fg_param_at(m.g, n, &p); n++) wrt[n] = p.tensor;
        cr_assert_eq(fg_grad(loss, n, wrt, grad), FG_OK, "%s", fg_graph_message(m.g));
    }
    for (int i = 0; i < n; i++) if (fg_ok(grad[i])) m.out[m.n++] = grad[i];
    for (int i = 0; i < m.n; i++) fg_output(m.out[i], fg_name(m.g, "out%d", i));
    fg_store_precision(m.store, FG_BF16);
    cr_assert_eq(fg_store_init(m.store, m.g, 5), FG_OK, "%s", fg_store_message(m.store));
    m.plan = fg_plan_new(m.g, m.store);
    put_tokens(&m, T, 0);
    return m;
}

static void model_free(model *m)
{
    fg_plan_free(m->plan), fg_store_free(m->store), fg_graph_free(m->g);
}

static float *result(model *m, int i)
{
    const size_t bytes = (size_t)fg_count(m->out[i]) * sizeof(float);
    float *x = malloc(bytes);
    cr_assert_eq(fg_read(m->plan, m->out[i], x, bytes), FG_OK, "%s", fg_plan_message(m->plan));
    return x;
}

static void run(model *m)
{
    cr_assert_eq(fg_run(m->plan), FG_OK, "%s", fg_plan_message(m->plan));
}

static void check_causality(int family, fg_backend *gpu)
{
    static const int64_t from[] = { 1, 63, 77, 128, 200, 299 };
    model m = model_new(family, gpu, false);
    run(&m);
    float *before = result(&m, 0);
    for (int i = 0; i < 6; i++) {
        put_tokens(&m, from[i], 5 + i);
        run(&m);
        float *after = result(&m, 0);
        const size_t bytes = (size_t)(from[i] * V) * sizeof(float);
        cr_expect(!memcmp(before, after, bytes), "%s: tokens from %lld on change logits before",
                  families[family].name, (long long)from[i]);
        cr_expect(memcmp(before + from[i] * V, after + from[i] * V, V * sizeof(float)),
                  "%s: token %lld changes nothing", families[family].name, (long long)from[i]);
        free(after);
    }
    free(before);
    model_free(&m);
}

Test(cuda_same_bits, later_tokens_change_no_logit_before)
{
    fg_backend *gpu = fg__cuda_or_skip(true);
    for (int i = 0; gpu && i < FAMILIES; i++) check_causality(i, gpu);
    cr_expect_eq(fg__traps.broken, 0, "%d allocations were overrun", fg__traps.broken);
    fg_backend_close(gpu);
}

/* ---- beside other work ---------------------------------------------------------------------- */

typedef struct { atomic_bool stop, ended; atomic_int runs; } neighbour;

/* Another device object, that is another stream: products and a scan, again and again. */
static void *work(void *of)
{
    neighbour *n = of;
    fg_backend *gpu = fg_backend_open("cuda", 0);
    fg_graph *g = fg_graph_new();
    fg_store *store = fg_store_new(gpu);
    const fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(1024, 1024));
    fg_tensor y = fg_matmul(x, x, false, true);
    y = fg_softmax(fg_matmul(y, x, false, false));
    fg_output(fg_sum(fg_cumsum(y, 1, false)), "y");
    fg_plan *p = fg_plan_new(g, store);
    float *zero = calloc(1024 * 1024, sizeof *zero);
    fg_write(p, x, zero, 1024 * 1024 * sizeof *zero);
    while (!atomic_load(&n->stop) && !fg_run(p)) atomic_fetch_add(&n->runs, 1);
    free(zero);
    fg_plan_free(p), fg_store_free(store), fg_graph_free(g);
    fg_backend_close(gpu);
    atomic_store(&n->ended, true);
    return NULL;
}

static void check_runs(int family, fg_backend *gpu, neighbour *n)
{
    model m = model_new(family, gpu, true);
    float *first[MOST];
    run(&m);
    for (int i = 0; i < m.n; i++) first[i] = result(&m, i);
    const int before = atomic_load(&n->runs);
    for (int k = 1; k < RUNS || atomic_load(&n->runs) < before + 2; k++) {
        int other = 0;
        cr_assert(!atomic_load(&n->ended), "the work beside it failed");
        run(&m);
        for (int i = 0; i < m.n; i++) {
            float *again = result(&m, i);
            other += memcmp(first[i], again, (size_t)fg_count(m.out[i]) * sizeof *again) != 0;
            free(again);
        }
        cr_assert_eq(other, 0, "%s: run %d gives %d of %d results other bits",
                     families[family].name, k, other, m.n);
    }
    for (int i = 0; i < m.n; i++) free(first[i]);
    model_free(&m);
}

Test(cuda_same_bits, twenty_runs_beside_other_work_are_one)
{
    static neighbour n;
    pthread_t thread;
    fg_backend *gpu = fg__cuda_or_skip(true);
    if (!gpu) return;
    cr_assert_eq(pthread_create(&thread, NULL, work, &n), 0);
    for (int i = 0; i < FAMILIES; i++) check_runs(i, gpu, &n);
    atomic_store(&n.stop, true);
    pthread_join(thread, NULL);
    cr_expect_eq(fg__traps.broken, 0, "%d allocations were overrun", fg__traps.broken);
    fg_backend_close(gpu);
}
