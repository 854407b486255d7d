/* training.h - what the files of training share and no program sees. */
#ifndef FG_TRAINING_H
#define FG_TRAINING_H
#include <math.h>
#include <stdarg.h>
#include <time.h>
#include "fox_json.h"
#include "fox_train.h"

/* ---- messages ------------------------------------------------------------------------------- */

/* Fills message (may be NULL) and returns s, so that a refusal is one line. */
fg_status fg__say(char message[FG_MESSAGE], fg_status s, const char *fmt, ...) FG_PRINTF(3, 4);

/* ---- random numbers: a pure function of three integers --------------------------------------- */

static inline uint64_t fg__mix(uint64_t x)           /* the end of splitmix64 (Steele 2014) */
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static inline uint64_t fg__draw(uint64_t a, uint64_t b, uint64_t c)
{
    const uint64_t step = 0x9e3779b97f4a7c15u;
    return fg__mix(fg__mix(fg__mix(a + step) + b + step) + c + step);
}

static inline double fg__seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- models ---------------------------------------------------------------------------------- */

typedef enum { FG__FORWARD, FG__LOSSES, FG__LOSS } fg__goal;
/* The graph and, for language models, the width of the logits (0 if the graph has failed). */
fg_graph *fg__model_graph(const struct fg_model *m, const fg_recipe *r, int64_t batch,
                          int64_t context, fg__goal goal, fg_tensor *result, int64_t *vocab);

fg_graph *fg__training_graph(const struct fg_model *m, const fg_recipe *r, fg_graph **update,
                             int64_t *vocab);

/* ---- evaluation that is repeated ------------------------------------------------------------- */

typedef struct fg__evaluator fg__evaluator;
fg_status fg__evaluator_new(fg__evaluator **out, const struct fg_model *m, const fg_recipe *r,
                            fg_store *s, const fg_data *d, char message[FG_MESSAGE]);
void      fg__evaluator_free(fg__evaluator *e);
fg_status fg__evaluator_run(fg__evaluator *e, const volatile sig_atomic_t *stop,
                            fg_eval_result *out, double *by_position, char message[FG_MESSAGE]);

/* ---- run folder ------------------------------------------------------------------------------ */

/* What a line of metrics.jsonl may be: one object of plain values. */
static const fg_json_rules fg__metric_rules = { 2, 64, false };

typedef struct fg__folder fg__folder;
/* Makes dir, or takes one that holds a run if resume or force allow it; force empties it. */
fg_status fg__folder_open(fg__folder **out, const char *dir, bool resume, bool force,
                          char message[FG_MESSAGE]);
void      fg__folder_close(fg__folder *f);
const char *fg__folder_checkpoints(const fg__folder *f);                   /* DIR/ckpt */
/* config.json, env.json, params.tsv, graph.json. */
fg_status fg__folder_describe(fg__folder *f, const struct fg_model *m, const fg_recipe *r,
                              const fg_graph *g, const fg_train_options *o,
                              char message[FG_MESSAGE]);
/* graph.json anew. */
fg_status fg__folder_graph(fg__folder *f, int n, const fg_json_part *parts, const char *model,
                           char message[FG_MESSAGE]);
/* Drops the lines of metrics.jsonl behind that step, and a half-written last one.  last_eval: the
 * step of the last evaluation that stays, -1 if none does. */
fg_status fg__folder_cut(fg__folder *f, int64_t step, int64_t *last_eval,
                         char message[FG_MESSAGE]);
fg_status fg__folder_metric(fg__folder *f, const fg_event *e, char message[FG_MESSAGE]);
void      fg__folder_log(fg__folder *f, const char *fmt, ...) FG_PRINTF(2, 3);
fg_status fg__folder_curve(fg__folder *f, const char *title, char message[FG_MESSAGE]);

#endif
