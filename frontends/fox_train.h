/* fox_train.h - training, evaluating and generating for programs with a main of their own; the
 * fox-graph command is one of them.  Everything here is built on the public headers.
 *
 * Nothing prints: what a person wants to see arrives through callbacks.  A function that takes a
 * message buffer fills it when its status is not FG_OK, and leaves "" otherwise. */
#ifndef FOX_TRAIN_H
#define FOX_TRAIN_H
#include <signal.h>
#include "fox_core.h"
#include "fox_ops.h"
#include "fox_autodiff.h"
#include "fox_models.h"
#ifdef __cplusplus
extern "C" {
#endif

#define FG_MESSAGE 2048                  /* bytes of a message buffer, the final 0 included */

/* ---- recipe: what a model file may set in fg_configure, and a user with --set ---------------- */

typedef struct fg_recipe {
    char    data[1024], eval_data[1024]; /* files of bytes; .bin: of u16 tokens */
    double  eval_fraction;              /* without eval_data: this last share of data is held out */
    int64_t batch, context;              /* sequences per update, tokens per sequence */
    int64_t micro_batch;                 /* sequences per run; 0: batch.  Must divide batch */
    int64_t steps, tokens;             /* end after the earlier; 0: not set; both 0: 1000 steps */
    double  lr, lr_end, lr_start;    /* peak, end of the cosine, start of the warm-up */
    int64_t warmup_tokens;               /* linear warm-up from lr_start */
    double  weight_decay, beta1, beta2, eps, clip;
    int64_t seed;
    int64_t eval_every, log_every, save_every;   /* updates; 0: at the end only */
    int64_t eval_batches;                /* micro batches per evaluation, spread evenly; 0: all */
    int64_t keep;                        /* newest checkpoints kept; 0: all */
    int64_t vocab;                       /* token ids the data may hold; 0: the model's */
    int64_t bos;                         /* token in front of every training sequence */
} fg_recipe;
FG_API fg_recipe fg_recipe_default(void);
/* key as the field's name.  FG_ERR_USAGE with a message for an unknown key or bad value. */
FG_API fg_status fg_recipe_set(fg_recipe *r, const char *key, const char *value, char message[200]);
/* The i-th key, NULL past the last; a field's value as fg_recipe_set takes it, to the same bits (""
 * for an unknown key); what the field means, in one line (NULL for an unknown key). */
FG_API const char *fg_recipe_key(int i);
FG_API void      fg_recipe_get(const fg_recipe *r, const char *key, char *text, size_t size);
FG_API const char *fg_recipe_meaning(const char *key);
/* Whether the recipe makes sense, data apart. */
FG_API fg_status fg_recipe_check(const fg_recipe *r, char message[FG_MESSAGE]);
FG_API int64_t   fg_recipe_max_tokens(const fg_recipe *r);    /* where training ends */
FG_API int64_t   fg_recipe_steps(const fg_recipe *r);         /* updates until there */
/* Learning rate of the update that begins when tokens_before tokens have been consumed:
 *   t < w:  lr_start + (lr - lr_start) t / w
 *   t >= w: lr_end + (lr - lr_end) (1 + cos(pi min(t - w, M - w) / (M - w))) / 2
 * with w = warmup_tokens and M = max_tokens. */
FG_API double    fg_recipe_lr(const fg_recipe *r, int64_t tokens_before, int64_t max_tokens);

/* ---- models as the tools see them ------------------------------------------------------------ */

typedef struct { const char *key, *value; } fg_setting;

/* Language models give build; other models give loss (their whole training graph's scalar, with
 * inputs of their own) and feed, which fills those inputs for one batch with fg_write.  What feed
 * fills is one micro batch; batch counts these from 0 over the whole training (or evaluation).
 * Always written "struct fg_model": the bare name is the function that a model file defines. */
struct fg_model {
    const char *name;
    fg_tensor (*build)(void *self, fg_tensor tokens);        /* i32[B,T] -> f32[B,T,V] */
    fg_tensor (*loss)(void *self, fg_graph *g, const fg_recipe *r);
    fg_status (*feed)(void *self, fg_plan *p, const fg_graph *g, const fg_recipe *r, int64_t batch,
                      bool eval);
    void      *self;
    const fg_setting *settings;          /* given to every graph before the model is built */
    int        n_settings;
};

/* The graphs of a model; NULL only if out of memory, else ask fg_graph_status.  Caller frees.
 * forward:  input "tokens" i32[batch,context], output "logits" f32[batch,context,V]; V must not be
 *           below r's vocab.
 * loss:     inputs "tokens", "labels" i32[batch,context]; output "losses" f32[batch,context].
 *           For a model that is not a language model: its own inputs, output "loss".
 * training: the loss graph of one micro batch with gradients and update; where the batch has
 *           several micro batches *update is the graph that applies their mean, else NULL. */
FG_API fg_graph *fg_model_forward(const struct fg_model *m, const fg_recipe *r, int64_t batch,
                                  int64_t context);
FG_API fg_graph *fg_model_loss(const struct fg_model *m, const fg_recipe *r, int64_t batch,
                               int64_t context);
FG_API fg_graph *fg_model_training(const struct fg_model *m, const fg_recipe *r, fg_graph **update);
/* FG_ERR_USAGE with a message if a setting was read by nobody while g was built. */
FG_API fg_status fg_model_settings_read(const fg_graph *g, char message[FG_MESSAGE]);

/* ---- data: tokens, held-out part, batches ---------------------------------------------------- */

/* A file is bytes (token = byte) or, where its name ends in .bin, little-endian u16 tokens: raw, or
 * after the 1024-byte header of llm.c (magic 20240520).  Training text is cut into windows of
 * `context` tokens; epoch e visits every window once, in a random order that depends on (seed, e)
 * alone, and cuts at another offset than the epoch before.  So the place in the data is one
 * integer, windows drawn.  labels = the window, tokens = bos, labels[0..T-2]. */
typedef struct fg_data fg_data;
/* Opens recipe's files and checks them whole: a window's tokens on each side, every id < vocab. */
FG_API fg_status fg_data_open(fg_data **out, const fg_recipe *r, int64_t vocab,
                              char message[FG_MESSAGE]);
FG_API void      fg_data_close(fg_data *d);
FG_API int64_t   fg_data_tokens(const fg_data *d, bool eval);          /* tokens of that part */
FG_API int64_t   fg_data_windows(const fg_data *d, bool eval);
FG_API int64_t   fg_data_context(const fg_data *d);                    /* tokens of a window */
FG_API int32_t   fg_data_token(const fg_data *d, bool eval, int64_t i);
FG_API uint64_t  fg_data_hash(const fg_data *d);                     /* of both parts and the cut */
FG_API bool      fg_data_is_text(const fg_data *d);                    /* tokens are bytes */
/* n windows from `position` on, as i32[n,context]; the next position is position + n. */
FG_API void      fg_data_train_batch(const fg_data *d, int64_t position, int64_t n, int32_t *tokens,
                                     int32_t *labels);
/* Of `total` held-out windows spread evenly (fg_data_windows: all), in the order of the text, those
 * numbered first .. first + n - 1; past the last, labels are -100. */
FG_API void      fg_data_eval_batch(const fg_data *d, int64_t total, int64_t first, int64_t n,
                                    int32_t *tokens, int32_t *labels);
/* How many windows an evaluation by the recipe scores. */
FG_API int64_t   fg_data_eval_windows(const fg_data *d, const fg_recipe *r);

/* Held-out loss of a byte n-gram model of that order: it predicts a byte from the `order` bytes
 * before (3: four-grams), interpolated with all shorter contexts by Witten and Bell's rule.
 * Counted on the training part, scored on `windows` held-out windows as above, each with no
 * context from before it, as the model is.  Nats per token; needs text; order 0 .. 6. */
FG_API fg_status fg_ngram_loss(const fg_data *d, int order, int64_t windows, double *loss,
                               char message[FG_MESSAGE]);

/* ---- training -------------------------------------------------------------------------------- */

typedef enum {
    FG_EVENT_START,   /* plans are made: info is their memory; step: where a resumed run goes on */
    FG_EVENT_TRAIN,   /* after every update */
    FG_EVENT_EVAL,    /* loss is held-out loss */
    FG_EVENT_SAVE,    /* text is the checkpoint's folder */
    FG_EVENT_NOTE,    /* text is one line for the person */
    FG_EVENT_END      /* text says why it ended */
} fg_event_kind;

typedef struct {
    fg_event_kind kind;
    bool    logged;                      /* this one is a line of metrics.jsonl too */
    int64_t step, steps, tokens, max_tokens;
    double  loss, smooth_loss;           /* of this update's batch; moving average */
    double  lr, grad_norm, tokens_per_s, flops_per_s;
    double  seconds, seconds_left;       /* spent, over all resumed parts; expected */
    double  ngram_loss;                  /* of fg_ngram_loss, order 3; 0: not known */
    fg_plan_info info;                   /* START */
    const char *text;
} fg_event;
typedef void (*fg_on_event)(void *to, const fg_event *e);

typedef struct fg_train_options {
    const char *run_dir;                 /* NULL: nothing is written */
    bool    resume;             /* go on from run_dir's newest checkpoint; start if there is none */
    bool    force;                       /* a run_dir that holds a run already is overwritten */
    bool    dry_run;                     /* plans only */
    bool    overfit;                     /* every update sees the first batch */
    bool    no_eval, no_ngram;
    double  seconds;                     /* stop after so many, as if asked to; 0: no limit */
    const volatile sig_atomic_t *stop;   /* not 0: finish the update, save, return FG_ERR_STOPPED */
    fg_on_event event;                   /* may be NULL */
    void   *to;
    const fg_backend *backend;           /* for env.json; or NULL */
    const char *source;           /* the model's source file, kept with every checkpoint; or NULL */
    const fg_setting *origins;           /* for config.json: where a value came from */
    int     n_origins;
} fg_train_options;

typedef struct {
    int64_t step, tokens, resumed_from;  /* done; the step it went on from, or 0 */
    double  loss, eval_loss, ngram_loss; /* the last ones; NaN, NaN, 0 if there is none */
    double  seconds, tokens_per_s;
    fg_plan_info info;
} fg_train_result;

/* Trains m on s (parameters that s lacks are made from recipe's seed).  FG_ERR_STOPPED: stopped on
 * request, saved, can be resumed.  FG_ERR_NUMERIC: loss or gradient not finite; the last good
 * checkpoint is kept.  A resumed run gives the same bits as one never interrupted. */
FG_API fg_status fg_train(const struct fg_model *m, const fg_recipe *r, fg_store *s,
                          const fg_train_options *o, fg_train_result *out,
                          char message[FG_MESSAGE]);

/* ---- evaluating ------------------------------------------------------------------------------ */

typedef struct {
    double  loss;                        /* mean over all scored tokens, nats */
    int64_t tokens;                      /* scored */
    double  seconds;
} fg_eval_result;
/* Held-out loss of m with s's parameters.  by_position: NULL or room for `context` means, one for
 * each position of a window.  d is NULL for a model that is not a language model. */
FG_API fg_status fg_evaluate(const struct fg_model *m, const fg_recipe *r, fg_store *s,
                             const fg_data *d, const volatile sig_atomic_t *stop,
                             fg_eval_result *out, double *by_position, char message[FG_MESSAGE]);

/* ---- generating ------------------------------------------------------------------------------ */

typedef struct { const int32_t *tokens; int64_t count; } fg_prompt;

typedef struct {
    int64_t max_tokens;                  /* new tokens for each prompt */
    double  temperature;                 /* 0: always the likeliest token */
    int64_t top_k;                       /* among the k likeliest; 0: all */
    double  top_p;                   /* among the fewest whose probabilities reach p; 0 or 1: all */
    int64_t seed;
    int64_t bos;                         /* put in front of every prompt; -1: nothing */
    int64_t end_token;                   /* a sequence ends behind it; -1: none */
    int64_t vocab;                       /* only ids below; 0: all of the model's */
    int64_t piece;                       /* prompt tokens per run, for memory; 0: 512 */
    /* Gets every new token; false ends that sequence.  May be NULL. */
    bool  (*token)(void *to, int sequence, int32_t token);
    void   *to;
    const volatile sig_atomic_t *stop;
} fg_generate_options;
FG_API fg_generate_options fg_generate_default(void);  /* 256 tokens, temperature 0.8, top_p 0.95 */
/* Continues n prompts side by side, with caches: out[i * max_tokens ...] gets counts[i] new tokens.
 * A random choice depends on (seed, sequence, index of the token) alone. */
FG_API fg_status fg_generate(const struct fg_model *m, fg_store *s, int n, const fg_prompt *prompts,
                             const fg_generate_options *o, int32_t *out, int64_t *counts,
                             char message[FG_MESSAGE]);
/* One choice from logits[vocab], which it uses up.  Ties go to the lower id. */
FG_API int32_t   fg_sample(float *logits, int64_t vocab, const fg_generate_options *o,
                           int64_t sequence, int64_t index);

/* ---- run folder ------------------------------------------------------------------------------ */

/* RUNDIR holds config.json (the resolved recipe and settings), env.json, params.tsv, metrics.jsonl,
 * run.log, loss.svg and ckpt/step-N/ with the model's source.  fg_train writes all of it. */
/* Draws the train and eval losses of a metrics.jsonl, and the n-gram baseline as a line. */
FG_API fg_status fg_loss_curve(const char *metrics_path, const char *svg_path, const char *title,
                               char message[FG_MESSAGE]);

/* ---- config.json: a model as the official checkpoints describe it ---------------------------- */

typedef enum {
    FG_FAMILY_FOX, FG_FAMILY_TRANSFORMER, FG_FAMILY_MAMBA2, FG_FAMILY_HGRN2, FG_FAMILY_DELTA_NET
} fg_family;
typedef struct {
    fg_family family;
    union {
        fox_config fox;
        transformer_config transformer;
        mamba2_config mamba2;
        hgrn2_config hgrn2;
        delta_net_config delta_net;
    } u;
} fg_config;
/* A missing key is the class's default, an unknown one is ignored, a bad value is refused with key
 * and value.  Messages are one line. */
FG_API fg_status fg_config_read(const char *path, fg_config *out, char message[400]);
/* Old configs lack qk_norm_share_param_across_head: takes it from the shapes in a weights file. */
FG_API fg_status fg_config_fit(fg_config *c, const char *weights, char message[400]);
FG_API fg_tensor fg_config_build(const fg_config *c, fg_tensor tokens);    /* i32[B,T] -> [B,T,V] */
/* All facts of g as one JSON object with sorted keys, with "architectures" and "torch_dtype". */
FG_API fg_status fg_config_write(const char *path, const fg_graph *g, char message[400]);

/* ---- checkpoints: everything a training run needs to go on, bit for bit ---------------------- */

/* DIR/step-000000123/ holds model.safetensors, config.json if the graph has facts,
 * optimizer.safetensors if the store has moments, state.json, model.c if there was a source, and
 * DONE.  It is written under another name, synced and renamed, so a folder of that name with DONE
 * in it is whole. */
typedef struct {
    int64_t  step;                       /* updates done */
    int64_t  batch, context;             /* sequences per update, tokens per sequence */
    int64_t  tokens;                     /* seen: step * batch * context, or 0 if not counted */
    int64_t  seed;
    uint64_t rng;                        /* counter of a random stream, if there is one */
    int64_t  epoch, position;            /* of the data: passes finished, next place to read */
    uint64_t recipe;                     /* hash of what must not change between start and resume */
    double   seconds;                    /* spent training */
    int64_t  window;                     /* sequences summed in window_loss since the last report */
    int64_t  positions;                  /* length of window_loss */
    double  *window_loss;                /* sums of the loss, by position or just one; or NULL */
} fg_train_state;
/* source: path of the model's source file, or NULL.  g: whose facts become config.json, or NULL. */
FG_API fg_status fg_checkpoint_save(const char *dir, fg_store *s, const fg_graph *g,
                                    const fg_train_state *t, const char *source, char message[400]);
/* path: one checkpoint's folder.  t->window_loss is allocated here; fg_train_state_free frees it.
 * After a failure the store may hold a part of the checkpoint. */
FG_API fg_status fg_checkpoint_load(const char *path, fg_store *s, fg_train_state *t,
                                    char message[400]);
FG_API void      fg_train_state_free(fg_train_state *t);
/* The folder of the highest step that has DONE; "" if there is none. */
FG_API fg_status fg_checkpoint_find_newest(const char *dir, char path[1024], char message[400]);
/* Keeps the newest `keep` checkpoints (0: all), deletes the others and what killed runs left. */
FG_API fg_status fg_checkpoint_prune(const char *dir, int keep, char message[400]);

#ifdef __cplusplus
}
#endif
#endif
