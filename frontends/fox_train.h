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

/* ---- config.json: a model as the official checkpoints describe it ------------------------------- */

typedef enum { FG_FAMILY_FOX, FG_FAMILY_TRANSFORMER } fg_family;
typedef struct {
    fg_family family;
    union { fox_config fox; transformer_config transformer; } u;
} fg_config;
/* A missing key is the class's default, an unknown one is ignored, a bad value is refused with key and
 * value.  Messages are one line. */
FG_API fg_status fg_config_read(const char *path, fg_config *out, char message[400]);
/* Old configs lack qk_norm_share_param_across_head: takes it from the shapes in a weights file. */
FG_API fg_status fg_config_fit(fg_config *c, const char *weights, char message[400]);
FG_API fg_tensor fg_config_build(const fg_config *c, fg_tensor tokens);      /* i32[B,T] -> [B,T,V] */
/* All facts of g as one JSON object with sorted keys, with "architectures" and "torch_dtype". */
FG_API fg_status fg_config_write(const char *path, const fg_graph *g, char message[400]);

/* ---- checkpoints: everything a training run needs to go on, bit for bit ------------------------- */

/* DIR/step-000000123/ holds model.safetensors, config.json if the graph has facts, optimizer.safetensors
 * if the store has moments, state.json, model.c if there was a source, and DONE.  It is written under
 * another name, synced and renamed, so a folder of that name with DONE in it is whole. */
typedef struct {
    int64_t  step;                       /* updates done */
    int64_t  batch, context;             /* sequences per update, tokens per sequence */
    int64_t  tokens;                     /* seen so far: step * batch * context, or 0 if none are counted */
    int64_t  seed;
    uint64_t rng;                        /* counter of a random stream, if there is one */
    int64_t  epoch, position;            /* of the data: passes finished, and the next place to read */
    uint64_t recipe;                     /* hash of what must not change between start and resume */
    double   seconds;                    /* spent training */
    int64_t  window;                     /* sequences summed in window_loss since the last report */
    int64_t  positions;                  /* length of window_loss */
    double  *window_loss;                /* sums of the loss, by position or just one; may be NULL if 0 */
} fg_train_state;
/* source: path of the model's source file, or NULL.  g: whose facts become config.json, or NULL. */
FG_API fg_status fg_checkpoint_save(const char *dir, fg_store *s, const fg_graph *g,
                                    const fg_train_state *t, const char *source, char message[400]);
/* path: one checkpoint's folder.  t->window_loss is allocated here; fg_train_state_free frees it.  After
 * a failure the store may hold a part of the checkpoint. */
FG_API fg_status fg_checkpoint_load(const char *path, fg_store *s, fg_train_state *t, char message[400]);
FG_API void      fg_train_state_free(fg_train_state *t);
/* The folder of the highest step that has DONE; "" if there is none. */
FG_API fg_status fg_checkpoint_find_newest(const char *dir, char path[1024], char message[400]);
/* Deletes all but the newest `keep` checkpoints (at least one) and what killed runs left behind. */
FG_API fg_status fg_checkpoint_prune(const char *dir, int keep, char message[400]);

#ifdef __cplusplus
}
#endif
#endif
