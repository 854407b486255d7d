/* fox_train.h - training, evaluating and generating for programs with a main of their own; the
 * fox-graph command is one of them.  Everything here is built on the public headers. */
#ifndef FOX_TRAIN_H
#define FOX_TRAIN_H
#include <stdio.h>
#include "fox_core.h"
#include "fox_ops.h"
#include "fox_autodiff.h"
#include "fox_models.h"
#ifdef __cplusplus
extern "C" {
#endif

/* ---- recipe: what a model file may set in fg_configure, and a user with --set ------------------ */

typedef struct fg_recipe {
    char    data[1024], eval_data[1024]; /* files; bytes are tokens unless the name ends in .bin (u16 tokens) */
    double  eval_fraction;               /* without eval_data: this last share of data is held out */
    int64_t batch, context;              /* sequences per update, tokens per sequence */
    int64_t micro_batch;                 /* sequences per run; 0: batch.  Must divide batch */
    int64_t steps, tokens;               /* end after the earlier of the two; 0: not set */
    double  lr, lr_end;                  /* peak, and what the cosine ends at */
    int64_t warmup_tokens;               /* linear warm-up from 0 */
    double  weight_decay, beta1, beta2, eps, clip;
    int64_t seed;
    int64_t eval_every, eval_batches, log_every, save_every, keep;   /* updates; 0: at the end only */
    int64_t vocab;                       /* token ids the data may hold; 0: the model's */
    int64_t bos;                         /* token in front of every training sequence */
} fg_recipe;
FG_API fg_recipe fg_recipe_default(void);
/* key as the field's name.  FG_ERR_USAGE with a message (up to 200 bytes) for an unknown key or bad value. */
FG_API fg_status fg_recipe_set(fg_recipe *r, const char *key, const char *value, char message[200]);
/* The i-th key, NULL past the last; a field's value as fg_recipe_set takes it ("" for an unknown key). */
FG_API const char *fg_recipe_key(int i);
FG_API void      fg_recipe_get(const fg_recipe *r, const char *key, char *text, size_t size);
FG_API double    fg_recipe_lr(const fg_recipe *r, int64_t tokens_before, int64_t max_tokens);

/* ---- models as the tools see them -------------------------------------------------------------- */

/* Language models give build; other models give loss (their whole training graph's scalar, with inputs of
 * their own) and feed, which fills those inputs for one batch with fg_write.
 * Always written "struct fg_model": the bare name is the function that a model file defines. */
struct fg_model {
    const char *name;
    fg_tensor (*build)(void *self, fg_tensor tokens);        /* i32[B,T] -> f32[B,T,V] */
    fg_tensor (*loss)(void *self, fg_graph *g, const fg_recipe *r);
    fg_status (*feed)(void *self, fg_plan *p, const fg_graph *g, const fg_recipe *r, int64_t batch, bool eval);
    void      *self;
};

#ifdef __cplusplus
}
#endif
#endif
