/* fox_graph.h - the front door: the one line a model file includes.
 *
 * A model file defines
 *     fg_tensor fg_model(fg_tensor tokens);          i32[B,T] -> logits [B,T,V]
 * or, for anything but a language model,
 *     fg_tensor fg_loss(fg_graph *g, const fg_recipe *r);     a scalar, on inputs of its own
 *     fg_status fg_feed(fg_plan *p, const fg_graph *g, const fg_recipe *r, int64_t batch,
 *                       bool eval);
 * and may define
 *     void fg_configure(fg_recipe *r);      data, batch, context, steps, optimizer, schedule
 * then runs with `fox-graph run model.c`. */
#ifndef FOX_GRAPH_H
#define FOX_GRAPH_H
#include "fox_core.h"
#include "fox_ops.h"
#include "fox_autodiff.h"
#include "fox_models.h"
#include "fox_train.h"
#ifdef __cplusplus
extern "C" {
#endif
/* What a model file may define; declared here, so that a wrong argument does not compile. */
FG_API fg_tensor fg_model(fg_tensor tokens);
FG_API fg_tensor fg_loss(fg_graph *g, const fg_recipe *r);
FG_API fg_status fg_feed(fg_plan *p, const fg_graph *g, const fg_recipe *r, int64_t batch,
                         bool eval);
FG_API void      fg_configure(fg_recipe *r);

/* What fox-graph compares before it uses a compiled model. */
extern const uint32_t fg_model_abi __attribute__((weak, visibility("default")));
const uint32_t fg_model_abi = FG_ABI;
#ifdef __cplusplus
}
#endif
#endif
