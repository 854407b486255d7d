/* fox_autodiff.h - graphs to graphs: gradients, accumulation, the optimizer's update as nodes. */
#ifndef FOX_AUTODIFF_H
#define FOX_AUTODIFF_H
#include "fox_core.h"
#ifdef __cplusplus
extern "C" {
#endif

/* d loss / d wrt[i] into grad[i], built as nodes of the same graph; {0} where the loss does not
 * depend on wrt[i].  loss has one element.  Scopes marked with fg_scope_recompute are computed
 * again. */
FG_API fg_status (fg_grad)(fg_loc at, fg_tensor loss, int n, const fg_tensor *wrt, fg_tensor *grad);
#define fg_grad(...) fg_grad(FG_HERE, __VA_ARGS__)

typedef struct {
    double beta1, beta2, eps, weight_decay;   /* 0.9, 0.95, 1e-8, 0.1 in the paper */
    double clip;                              /* limit of the global gradient norm; 0: none */
    int    micro_batches;         /* gradients are the mean over so many runs; 1: no accumulation */
} fg_optimizer;

/* One update of all parameters, as nodes.  Two ways, by micro_batches:
 *   1: the graph of loss gets gradients, norm, clipping and AdamW; one run is one step.
 *   more: the graph of loss adds its gradients to states "@grad.NAME": zero these (fg_store_zero),
 *      run it micro_batches times, then run `update` (another graph, made here) once.
 * Inputs made: "lr" f32[1] and "step" f32[1] (1 at the first update).  Outputs made: "loss" f32[]
 * on the loss graph, "grad_norm" f32[1] (before clipping) where the update is.  States:
 * "@adam.m.NAME", "@adam.v.NAME".  A gradient norm that is not finite updates nothing. */
FG_API fg_status fg_train_graph(fg_tensor loss, const fg_optimizer *o, fg_graph **update);

/* The worst relative error of gradients against central differences, over all parameters of loss's
 * graph (at most `samples` entries of each, 0: all).  Meant for the double build; report gets one
 * line a parameter.  error of entry i: |a - n| / (|a| + |n| + floor), floor from the rounding of
 * the loss. */
typedef struct { double worst; const char *where; int64_t checked; } fg_gradcheck_result;
FG_API fg_status fg_gradcheck(fg_tensor loss, fg_store *s, int64_t samples, fg_put report, void *to,
                              fg_gradcheck_result *out);
/* The same for a graph with inputs: fill writes them with fg_write, once to each of two plans. */
typedef fg_status (*fg_write_inputs)(void *of, fg_plan *p);
FG_API fg_status fg_gradcheck_filled(fg_tensor loss, fg_store *s, int64_t samples,
                                     fg_write_inputs fill, void *of,
                                     fg_put report, void *to, fg_gradcheck_result *out);

#ifdef __cplusplus
}
#endif
#endif
