/* test_f64_cuda_ops.c - every kernel of the GPU, every example of its op, against the CPU's kernel
 * in double; skipped, with the reason, where there is no GPU.
 *
 * The yardstick is the op's definition run on the same inputs with every node rounded to the
 * dtype in question (no definition, or one that ends in a cast: the exact result, rounded once).
 * Over a few draws of the inputs, a kernel may be twice as far from the exact result as that is,
 * plus four units in the last place of an f32 at the greatest value: sums go in another order, and
 * exp, log and sin of a GPU are good to two.  Every kernel runs three times, alone and from a CUDA
 * graph, and must give the same bits.  FG_TEST_DRAWS and FG_TEST_RUNS take fewer of both. */
#include <criterion/criterion.h>
#include <math.h>
#include "device_cuda.h"
#include "fox_autodiff.h"
#include "graph.h"
#include "ops.h"
#include "plan.h"

/* ---- the CPU in three ways of rounding ------------------------------------------------------- */

static enum { EXACT, TO_F32, TO_BF16 } rounding;

static void round_f32(double *y, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] = (float)y[i];
}

/* EXACT rounds nothing but casts; TO_BF16 what is bf16, and the rest to f32. */
static fg_status launch_rounded(fg_backend *b, const fg_op *op, const fg_exec *e)
{
    (void)b;
    op->code->cpu(e);
    const bool cast = !strcmp(op->name, "cast");
    for (int o = 0; o < e->n_out && (cast || rounding != EXACT); o++) {
        double *y = e->out[o];
        const int64_t n = fg_shape_count(e->out_shape[o]);
        if (e->out_type[o] == FG_I32) continue;
        round_f32(y, n);
        if (e->out_type[o] != FG_BF16) continue;
        for (int64_t i = 0; i < n; i++) {
            uint32_t u;
            float x = (float)y[i];
            memcpy(&u, &x, sizeof u);
            if ((u & 0x7fffffffu) <= 0x7f800000u)
                u = (u + 0x7fffu + ((u >> 16) & 1)) & 0xffff0000u;
            memcpy(&x, &u, sizeof x);
            y[i] = x;
        }
    }
    return FG_OK;
}

static fg_backend *open_cpu(void)
{
    static fg_backend_ops ops;
    fg_backend *b = fg_backend_open("cpu", 2);
    ops = *b->ops;
    ops.launch = launch_rounded;
    b->ops = &ops;
    return b;
}

/* ---- one example ----------------------------------------------------------------------------- */

enum { MOST = 16, DRAWS = 4 };           /* outputs, or parameters of an example; of inputs */

typedef struct {
    const char *what;
    fg_graph *g;
    uint32_t node;                       /* the op's node, its inputs of the dtype in question */
    fg_tensor out[MOST], def[MOST];      /* def: by the op's definition; absent: it has none */
    int n_out;
    fg_dtype precision;                  /* of plans */
} trial;

static uint32_t node_of(const fg_graph *g, const fg_op *op)
{
    for (uint32_t k = g->n_nodes; k-- > 0; ) if (g->nodes[k].op == op) return k;
    return FG_NO_NODE;
}

/* The op again on inputs rounded to bf16, but for those that must be f32. */
static void narrow(trial *t, const fg_op *op)
{
    const fg_node n = t->g->nodes[t->node];
    fg_tensor in[FG_MAX_IN] = { { 0 } };
    for (int i = 0; i < n.n_in; i++) {
        if (!n.in[i]) continue;
        in[i] = (fg_tensor){ t->g, n.in[i] };
        const bool wide = (op->code->bf16.wide_in >> i & 1) || t->g->values[n.in[i]].type == FG_I32;
        if (!wide) in[i] = fg__cast(in[i], FG_BF16);
    }
    const fg_tensor y = fg__apply(op, FG_HERE, t->g, n.n_in, in, n.attr);
    t->node = fg_ok(y) ? t->g->values[y.id].node : FG_NO_NODE;
}

static void list_outputs(trial *t, const fg_op *op)
{
    const fg_node n = t->g->nodes[t->node];
    fg_tensor in[FG_MAX_IN] = { { 0 } };
    for (int i = 0; i < n.n_in; i++) if (n.in[i]) in[i] = (fg_tensor){ t->g, n.in[i] };
    if (op->code->decompose) op->code->decompose(in, n.attr, t->def);
    t->n_out = n.n_out;
    for (int o = 0; o < n.n_out; o++) {
        t->out[o] = fg_output((fg_tensor){ t->g, n.out[o] }, fg_name(t->g, "kernel%d", o));
        if (fg_ok(t->def[o])) fg_output(t->def[o], fg_name(t->g, "definition%d", o));
    }
}

/* NULL for an output that the definition leaves out, as that of an input that is absent. */
static double *read_all(fg_plan *p, fg_tensor t)
{
    const int64_t n = fg_count(t);
    const double *from = fg__plan_data(p, t);
    double *x = from ? malloc((size_t)(n + 1) * sizeof *x) : NULL;
    if (x) memcpy(x, from, (size_t)n * sizeof *x);
    return x;
}

/* The outputs (definitions: their definitions) on the CPU, rounded as said. */
static void run_cpu(const trial *t, fg_backend *cpu, uint64_t seed, int how,
                    bool definitions, double **y)
{
    rounding = how;
    fg_store *s = fg_store_new(cpu);
    fg_store_precision(s, t->precision);
    fg_store_init(s, t->g, seed);
    fg_plan *p = fg_plan_new(t->g, s);
    cr_assert_eq(fg_run(p), FG_OK, "%s: %s", t->what, fg_plan_message(p));
    for (int o = 0; o < t->n_out; o++) {
        const bool defined = definitions && fg_ok(t->def[o]);
        y[o] = fg_dtype_of(t->out[o]) == FG_I32 ? NULL
             : read_all(p, defined ? t->def[o] : t->out[o]);
    }
    fg_plan_free(p);
    fg_store_free(s);
}

static void run_cuda(const trial *t, fg_backend *gpu, uint64_t seed, float **y)
{
    fg_store *s = fg_store_new(gpu);
    fg_store_precision(s, t->precision);
    cr_assert_eq(fg_store_init(s, t->g, seed), FG_OK, "%s", fg_store_message(s));
    fg_plan *p = fg_plan_new(t->g, s);
    const char *fewer = getenv("FG_TEST_RUNS");
    for (int run = 0; run < (fewer ? atoi(fewer) : 3); run++) {
        cr_assert_eq(fg_run(p), FG_OK, "%s: %s", t->what, fg_plan_message(p));
        for (int o = 0; o < t->n_out; o++) {
            const size_t bytes = (size_t)fg_count(t->out[o]) * sizeof(float);
            float *now = malloc(bytes + 1);
            cr_assert_eq(fg_read(p, t->out[o], now, bytes), FG_OK, "%s: %s", t->what,
                         fg_plan_message(p));
            if (run) cr_expect(!memcmp(y[o], now, bytes), "%s: output %d changed from run to run",
                               t->what, o);
            if (run) free(y[o]);
            y[o] = now;
        }
    }
    fg_plan_free(p);
    fg_store_free(s);
}

static int examined;                     /* examples that ran on the GPU */

/* How far the yardstick and the kernel are from exact at most, over all draws of the inputs. */
typedef struct { double base, far, most; int64_t at; float was; double should; } verdict;

static void look(const trial *t, int o, const double *exact, const double *base, const float *y,
                 verdict *v)
{
    for (int64_t i = 0; i < fg_count(t->out[o]); i++) {
        if (isfinite(exact[i])) v->most = fmax(v->most, fabs(exact[i]));
        if (isfinite(base[i] - exact[i])) v->base = fmax(v->base, fabs(base[i] - exact[i]));
        if (exact[i] == (double)y[i]) continue;              /* infinities too */
        if (isnan(exact[i]) && isnan(y[i])) continue;
        double d = fabs((double)y[i] - exact[i]);
        if (isnan(d)) d = INFINITY;                          /* or the next element would hide it */
        if (d <= v->far) continue;
        *v = (verdict){ v->base, d, v->most, i, y[i], exact[i] };
    }
}

/* Its definition rounds as its last act: the exact result is then rounded too, and near a tie that
 * may go either way. */
static bool ends_in_cast(const trial *t, int o)
{
    fg_tensor in[FG_MAX_IN];
    int n_in;
    const fg_op *op = fg_ok(t->def[o]) ? fg__producer(t->def[o], in, &n_in, NULL) : NULL;
    return op && !strcmp(op->name, "cast");
}

static void judge(const trial *t, int o, const verdict *v)
{
    const bool narrow = fg_dtype_of(t->out[o]) == FG_BF16;
    const double once = narrow && ends_in_cast(t, o) ? 0x1p-9 * v->most : 0;
    const double may = 2 * fmax(v->base, once) + 4 * 0x1p-23 * v->most;
    cr_expect(v->far <= may, "%s: output %d is off by %.3g at element %lld (%.9g, not %.9g); %.3g "
              "is allowed", t->what, o, v->far, (long long)v->at, (double)v->was, v->should, may);
}

static void compare(const trial *t, const trial *on_gpu, bool bf16, fg_backend *cpu,
                    fg_backend *gpu)
{
    verdict v[MOST] = { { 0 } };
    examined++;
    const char *fewer = getenv("FG_TEST_DRAWS");
    const int64_t n = fg_count(t->out[0]); /* few numbers: more draws, for a fair yardstick */
    const uint64_t draws = fewer ? (uint64_t)atoi(fewer) : n < 16 ? 8 * DRAWS : DRAWS;
    for (uint64_t seed = 1; seed <= draws; seed++) {
        double *exact[MOST] = { NULL }, *base[MOST] = { NULL };
        float *y[MOST] = { NULL };
        run_cpu(t, cpu, seed, EXACT, false, exact);
        run_cpu(t, cpu, seed, bf16 ? TO_BF16 : TO_F32, true, base);
        run_cuda(on_gpu, gpu, seed, y);
        for (int o = 0; o < t->n_out; o++) {
            if (exact[o]) look(t, o, exact[o], base[o], y[o], &v[o]);
            free(exact[o]);
            free(base[o]);
            free(y[o]);
        }
    }
    for (int o = 0; o < t->n_out; o++) judge(t, o, &v[o]);
}

/* Returns false past the last example. */
static bool check_example(const fg_op *op, int i, bool bf16, fg_backend *cpu, fg_backend *gpu)
{
    char what[120];
    snprintf(what, sizeof what, "%s, example %d, %s", op->name, i, bf16 ? "bf16" : "f32");
    trial t = { .what = what, .g = fg_graph_new() };
    const bool there = op->code->example(t.g, i).graph != NULL;
    t.node = there ? node_of(t.g, op) : FG_NO_NODE;
    if (t.node != FG_NO_NODE && bf16) narrow(&t, op);
    fg_infer c;
    if (t.node != FG_NO_NODE) fg__infer_of(t.g, &t.g->nodes[t.node], &c);
    if (t.node != FG_NO_NODE && !gpu->ops->unfit(gpu, op, &c)) {
        list_outputs(&t, op);
        cr_assert_eq(fg_graph_status(t.g), FG_OK, "%s: %s", what, fg_graph_message(t.g));
        compare(&t, &t, bf16, cpu, gpu);
    }
    fg_graph_free(t.g);
    return there;
}

/* ---- gradients ------------------------------------------------------------------------------- */

static fg_tensor weighted(fg_tensor y, fg_tensor w)
{
    const fg_tensor each = fg_mul(y, w);
    return fg_sum(each);
}

/* The gradients of an example's parameters, of the sum of its first output times random numbers;
 * defined: and by way of its definition.  Returns false past the last example. */
static bool build_gradients(trial *t, const fg_op *op, int i, bool defined)
{
    fg_tensor in[FG_MAX_IN] = { { 0 } }, def[FG_MAX_OUT] = { { 0 } }, wrt[MOST], grad[MOST];
    t->g = fg_graph_new();
    const fg_tensor y = op->code->example(t->g, i);
    if (!y.graph) return false;
    fg_param_info p;
    int n = 0;
    for (; n < MOST && fg_param_at(t->g, n, &p); n++) wrt[n] = p.tensor;
    const fg_tensor w = (fg_random)(FG_HERE, t->g, fg_shape_of(y));
    const fg_tensor loss = weighted(y, w);
    cr_assert_eq(fg_grad(loss, n, wrt, grad), FG_OK, "%s: %s", t->what, fg_graph_message(t->g));
    t->node = node_of(t->g, op);
    for (int k = 0; k < n; k++)
        if (fg_ok(grad[k]))
            t->out[t->n_out++] = fg_output(grad[k], fg_name(t->g, "grad%d", k));
    if (!defined || !op->code->decompose || !t->g->nodes[t->node].n_in) return true;
    const fg_node node = t->g->nodes[t->g->values[y.id].node];
    if (node.op != op) return true;          /* the example goes on behind the op */
    for (int k = 0; k < node.n_in; k++) if (node.in[k]) in[k] = (fg_tensor){ t->g, node.in[k] };
    op->code->decompose(in, node.attr, def);
    const fg_tensor other = weighted(def[0], w);
    cr_assert_eq(fg_grad(other, n, wrt, grad), FG_OK, "%s: %s", t->what, fg_graph_message(t->g));
    for (int k = 0, o = 0; k < n; k++)
        if (fg_ok(grad[k])) t->def[o++] = fg_output(grad[k], fg_name(t->g, "defined%d", k));
    return true;
}

static bool check_gradient(const fg_op *op, int i, bool bf16, fg_backend *cpu, fg_backend *gpu)
{
    char what[120];
    snprintf(what, sizeof what, "gradient of %s, example %d, %s", op->name, i,
             bf16 ? "bf16" : "f32");
    trial t = { .what = what, .precision = bf16 ? FG_BF16 : FG_F32 }, u = t;
    const bool there = build_gradients(&t, op, i, true) && build_gradients(&u, op, i, false);
    if (there && t.n_out) compare(&t, &u, bf16, cpu, gpu);
    fg_graph_free(t.g);
    fg_graph_free(u.g);
    return there;
}

/* FG_TEST_OP names the ops to look at, with commas between. */
static bool asked_for(const char *only, const char *name)
{
    const size_t n = strlen(name);
    for (const char *at = only; at && (at = strstr(at, name)); at += n)
        if ((at == only || at[-1] == ',') && (!at[n] || at[n] == ',')) return true;
    return !only;
}

static void for_all(bool gradients)
{
    const char *only = getenv("FG_TEST_OP");
    fg_backend *gpu = fg__cuda_or_skip(true), *cpu = gpu ? open_cpu() : NULL;
    int n = 0;
    examined = 0;
    for (int k = 0; gpu && k < FG_OP_COUNT; k++) {
        const fg_op *op = &fg_op_table[k];
        if (!asked_for(only, op->name) || !op->code->example) continue;
        if (gradients && op->code->no_grad) continue;
        for (int bf16 = 0; bf16 < 2; bf16++)
            for (int i = 0; gradients ? check_gradient(op, i, bf16, cpu, gpu)
                                      : check_example(op, i, bf16, cpu, gpu); i++) n++;
    }
    if (gpu) fprintf(stderr, "%d of %d examples have a kernel\n", examined, n);
    cr_expect(!gpu || examined > 0 || only, "nothing was examined");
    cr_expect_eq(fg__traps.broken, 0, "%d allocations were overrun", fg__traps.broken);
    fg_backend_close(gpu);
    fg_backend_close(cpu);
}

Test(cuda_ops, kernels_are_as_good_as_their_definitions) { for_all(false); }
Test(cuda_ops, gradients_are_as_good_as_those_of_the_definitions) { for_all(true); }
