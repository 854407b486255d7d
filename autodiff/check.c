/* check.c - gradients against central differences.
 *
 *     n_i = (loss(p + h e_i) - loss(p - h e_i)) / 2h
 *     error_i = |a_i - n_i| / (|a_i| + |n_i| + floor)
 *
 * h balances the rounding of the loss against its third derivative: 6e-6 (1 + |p_i|) in double.
 * floor: what rounding alone can make of n_i, |loss| eps / h, divided by the error looked for
 * (1e-6). */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include "plan.h"
#include "rng.h"
#include "fox_autodiff.h"

typedef struct {
    fg_plan *plan;                       /* loss only */
    fg_tensor loss;
    double step, noise;
} probe;

static double loss_at(probe *b)
{
    if (fg_run(b->plan)) return NAN;
    const fg_real *l = fg__plan_data(b->plan, b->loss);
    return l ? (double)l[0] : NAN;
}

static double error_of(probe *b, fg_real *p, double a)
{
    const fg_real keep = *p;
    const double h = b->step * (1 + fabs((double)keep));
    *p = (fg_real)((double)keep + h);
    const double up = (double)*p, hi = loss_at(b);
    *p = (fg_real)((double)keep - h);
    const double down = (double)*p, lo = loss_at(b);
    *p = keep;
    const double n = (hi - lo) / (up - down);
    const double floor = b->noise * (fabs(hi) + fabs(lo) + 1) / h;
    const double e = fabs(a - n) / (fabs(a) + fabs(n) + floor);
    return isnan(e) ? INFINITY : e;
}

static void tell(fg_put report, void *to, const fg_param_info *p, int64_t checked, double worst)
{
    char line[400];
    snprintf(line, sizeof line, "%-60s %8lld of %-10lld worst relative error %.1e\n", p->name,
             (long long)checked, (long long)fg_shape_count(p->shape), worst);
    if (report) report(to, line);
}

fg_status fg_gradcheck(fg_tensor loss, fg_store *s, int64_t samples, fg_put report, void *to,
                       fg_gradcheck_result *out)
{
    return fg_gradcheck_filled(loss, s, samples, NULL, NULL, report, to, out);
}

fg_status fg_gradcheck_filled(fg_tensor loss, fg_store *s, int64_t samples, fg_write_inputs fill,
                              void *of, fg_put report, void *to, fg_gradcheck_result *out)
{
    *out = (fg_gradcheck_result){ 0 };
    fg_graph *g = loss.graph;
    if (!g) return FG_ERR_USAGE;
    if (g->status) return g->status;
    const int n = fg_param_count(g);
    fg_tensor *p = calloc((size_t)n + 1, sizeof *p), *d = calloc((size_t)n + 1, sizeof *d);
    fg_param_info info;
    if (!p || !d) { free(p); free(d); return FG_ERR_MEMORY; }
    fg_output(loss, "gradcheck.loss");
    fg_plan *forward = fg_plan_new(g, s);
    for (int i = 0; i < n && fg_param_at(g, i, &info); i++) p[i] = info.tensor;
    fg_status st = fg_plan_status(forward);
    if (!st) st = fg_grad(loss, n, p, d);
    for (int i = 0; !st && i < n; i++)
        if (fg_ok(d[i])) fg_output(d[i], fg_name(g, "gradcheck.grad%d", i));
    fg_plan *both = st ? NULL : fg_plan_new(g, s);
    if (!st && fill) st = fill(of, forward);
    if (!st && fill) st = fill(of, both);
    if (!st) st = fg_run(both);
    const bool wide = sizeof(fg_real) == 8;
    const double eps = wide ? 2.2e-16 : 1.2e-7;
    probe b = { forward, loss, wide ? 6e-6 : 5e-3, eps / (wide ? 1e-7 : 1e-3) };
    for (int i = 0; !st && i < n; i++) {
        if (!fg_param_at(g, i, &info) || info.init.frozen) continue;
        fg_real *value = fg__plan_data(both, info.tensor);
        fg_real *grad = fg_ok(d[i]) ? fg__plan_data(both, d[i]) : NULL;
        if (!value) continue;                            /* the loss does not read it */
        const int64_t count = fg_shape_count(info.shape);
        const int64_t m = samples > 0 && samples < count ? samples : count;
        double worst = 0;
        for (int64_t k = 0; k < m; k++) {
            const uint64_t key = fg__random_key(1, info.name);
            const int64_t at = m == count ? k
                : (int64_t)(fg__random_uniform(key, (uint64_t)k) * (double)count);
            const double e = error_of(&b, value + at, grad ? (double)grad[at] : 0);
            if (e > worst) worst = e;
        }
        tell(report, to, &info, m, worst);
        out->checked += m;
        if (worst > out->worst || !out->where) {
            out->worst = worst > out->worst ? worst : out->worst;
            out->where = info.name;
        }
    }
    fg_plan_free(forward);
    fg_plan_free(both);
    free(p);
    free(d);
    return st;
}
