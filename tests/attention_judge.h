/* attention_judge.h - attention run on a GPU, and what it gives judged by the definition.
 *
 * The measure is the definition with every step rounded (attention.h): a result may be twice as far
 * from exact at most, 1.5 times as far in the root of the mean square, and 1e-5 more.  In bf16 it
 * must besides keep to absolute bounds, of the norm: 4e-3 for o, 8e-3 for gradients, 1.5e-2 for
 * that of the gates, and 1e-3 of lse itself.  Where the definition itself does not keep to a
 * gradient's bound, as gates or logits may have it, twice and 1.5 times its error is all that is
 * asked; of the gates' gradient 1.5 times that error is enough.  Two errors are the kernels' own
 * and allowed for:
 *   - exponents are differences of f32 numbers as large as a block's gates and lse together, each
 *     off by 2^-24 of that: a weight is off by 2^-22 of it;
 *   - on tensor cores a row's sum of ds is known for 16 queries together.  What rounding o leaves
 *     in a row, 1.65e-3 of the root of sum_d (go_d o_d)^2, walks up to 8 rows on: 2^-8 of that. */
#ifndef FG_TEST_ATTENTION_JUDGE_H
#define FG_TEST_ATTENTION_JUDGE_H
#include <criterion/criterion.h>
#include <stdio.h>
#include "attention.h"
#include "device_cuda.h"

/* ---- running -------------------------------------------------------------------------------- */

static const char *words(const setting *s)
{
    static char text[300];
    snprintf(text, sizeof text, "%s, B %d, T %d, past %d, heads %d/%d of %d, window %d%s, %s%s%s",
             s->bf16 ? "bf16" : "f32", (int)s->B, (int)s->M, (int)s->past, (int)s->H, (int)s->Hkv,
             (int)s->D, (int)s->window, document_names[s->documents], gate_names[s->gates],
             value_names[s->values], s->pitched ? ", pitched" : "");
    return text;
}

static void free_results(float **y)
{
    for (int i = 0; i < RESULTS; i++) free(y[i]), y[i] = NULL;
}

/* Three times, with the same bits. */
static void run(const problem *p, fg_backend *gpu, float **y)
{
    const attention a = attention_new(p);
    cr_assert_eq(fg_graph_status(a.g), FG_OK, "%s", fg_graph_message(a.g));
    fg_store *store = fg_store_new(gpu);
    fg_plan *plan = fg_plan_new(a.g, store);
    write_inputs(&a, plan, p);
    if (p->s.pitched && p->s.D % 8 == 0)
        cr_expect(reads_pitched(plan, 0) && reads_pitched(plan, 2), "%s: q or v is contiguous",
                  words(&p->s));
    for (int i = 0; i < RESULTS; i++) y[i] = NULL;
    for (int k = 0; k < 3; k++) {
        float *again[RESULTS] = { NULL };
        cr_assert_eq(fg_run(plan), FG_OK, "%s: %s", words(&p->s), fg_plan_message(plan));
        read_results(&a, plan, p, k ? again : y);
        for (int i = 0; k && i < results_of(p); i++)
            cr_expect(!memcmp(y[i], again[i], (size_t)count_of(p, i) * 4),
                      "%s: %s changed from run to run", words(&p->s), result_names[i]);
        free_results(again);
    }
    fg_plan_free(plan);
    fg_store_free(store);
    fg_graph_free(a.g);
}

/* ---- comparing ------------------------------------------------------------------------------ */

typedef struct { double far, base, far2, base2, norm2, size; int64_t n, at; } tally;
static struct { double max, rms, norm; } worst[2][RESULTS + 1];      /* of f32, bf16: of what may */

static void add(tally *a, int64_t at, double exact, double base, double got)
{
    a->n++;
    if (isfinite(exact)) a->norm2 += exact * exact, a->size = fmax(a->size, fabs(exact));
    if (exact == got) return;                                /* infinities too */
    double d = fabs(got - exact), e = fabs(base - exact);
    if (!isfinite(d)) d = INFINITY;
    if (!isfinite(e)) e = 0;
    if (d > a->far) a->far = d, a->at = at;
    a->base = fmax(a->base, e);
    a->far2 += d * d, a->base2 += e * e;
}

static void note(double *to, double x) { *to = fmax(*to, x); }

/* Of weights; of sums of ds over rows; the greatest of those that sums of ds are made of. */
typedef struct { double weights, gates, pull; } allowance;

static allowance allowance_of(const reference *r)
{
    const problem *p = r->p;
    double squares = 0, pull = 0;
    for (int64_t i = 0; r->out[GQ] && i < count_of(p, LSE); i++) {
        for (int64_t d = i * p->s.D; d < (i + 1) * p->s.D; d++)
            squares += (double)p->go[d] * (double)p->go[d] * r->out[O][d] * r->out[O][d];
        pull = fmax(pull, fabs(r->state[i].dot) + fabs((double)p->glse[i]));
    }
    const bool shared = p->s.bf16 && p->s.D <= 128 && p->s.D % 8 == 0;
    const double rows = sqrt(squares / (double)count_of(p, LSE));
    return (allowance){ 0x1p-22 * reach_of(r), shared ? 0x1p-8 * rows : 0, pull };
}

static void judge(const problem *p, int i, const char *name, const tally *a, double bound,
                  const allowance *of)
{
    const double n = (double)(a->n + !a->n), norm = sqrt(a->norm2 / n);
    const double far = sqrt(a->far2 / n), base = sqrt(a->base2 / n);
    const double size = i == LSE ? 1 : i < GLOG_F ? a->size : of->pull;
    const double more = 1e-5 + of->weights * size + (i < GLOG_F ? 0 : of->gates);
    const double most = 2 * a->base + more, mean = 1.5 * base + more;
    const double got = i == LSE ? a->far : far;
    const double part = bound * norm + more;
    const bool gates = i >= GLOG_F, bf16 = p->s.bf16, keeps = i < GQ || base <= bound * norm;
    const double may = i == LSE ? bound : gates ? fmax(part, mean) : keeps ? part : mean;
    if (!gates) note(&worst[bf16][i].max, a->far / most);
    if (!gates || !bf16) note(&worst[bf16][i].rms, far / mean);
    if (bf16) note(&worst[bf16][i].norm, got / may);
    if (!gates)
        cr_expect(a->far <= most, "%s: %s is off by %.3g at element %lld, the definition by %.3g; "
                  "%.3g is allowed", words(&p->s), name, a->far, (long long)a->at, a->base, most);
    if (!gates || !bf16)
        cr_expect(far <= mean, "%s: %s is off by %.3g (root of mean squares), the definition by "
                  "%.3g; %.3g is allowed", words(&p->s), name, far, base, mean);
    if (bf16)
        cr_expect(got <= may, "%s: %s is off by %.3g, of %.3g; the definition by %.3g; %.3g is "
                  "allowed", words(&p->s), name, got, norm, base, may);
}

/* known: which rows of D, or of one number, are compared; NULL: all. */
static void judge_result(const problem *p, int i, const reference *exact, const reference *base,
                         float **y, const bool *known, const allowance *of)
{
    static const double bounds[] = { 4e-3, 1e-3, 8e-3, 8e-3, 8e-3, 1.5e-2 };
    const int64_t width = i == LSE || i == GLOG_F ? 1 : p->s.D;
    tally a = { 0 };
    for (int64_t e = 0; e < count_of(p, i); e++)
        if (!known || known[e / width])
            add(&a, e, exact->out[i][e], base->out[i][e], (double)y[i][e]);
    judge(p, i, result_names[i], &a, bounds[i], of);
}

/* glog_f as it reaches the gate's logit: times 1 - f. */
static inline void compare_logits(const problem *p, const reference *exact, const reference *base,
                           float **y, const allowance *of)
{
    tally a = { 0 };
    for (int64_t i = 0; p->log_f && i < count_of(p, GLOG_F); i++) {
        const double rest = -expm1(fmax((double)p->log_f[i], -100));
        add(&a, i, exact->out[GLOG_F][i] * rest, base->out[GLOG_F][i] * rest,
            (double)y[GLOG_F][i] * rest);
    }
    judge(p, RESULTS, "the gradient of the gates' logits", &a, 1.5e-2, of);
}

static inline void print_worst(void)
{
    for (int i = 0; i <= RESULTS; i++)
        fprintf(stderr, "%-8s of what is allowed: f32 %.2f most, %.2f rms; bf16 %.2f most, %.2f "
                "rms, %.2f absolute\n", i < RESULTS ? result_names[i] : "logits",
                worst[0][i].max, worst[0][i].rms, worst[1][i].max, worst[1][i].rms,
                worst[1][i].norm);
}

#endif
