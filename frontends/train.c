/* train.c - the loop: batches in, updates done, losses written down, checkpoints kept.
 *
 * Everything an update depends on is the store (parameters, moments), the number of updates done
 * and the place in the data, both integers; so a run that goes on from a checkpoint gives the bits
 * of one that was never interrupted.  One update, in this order: rate from the tokens before it,
 * micro batches, update, counters, log, evaluation, checkpoint. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "training.h"

typedef struct {
    const struct fg_model *model;
    const fg_recipe *recipe;
    const fg_train_options *options;
    fg_store *store;
    char *message;                       /* FG_MESSAGE bytes, or NULL */

    fg_data   *data;
    fg_graph  *graph, *update;           /* update: NULL where one run is one step */
    fg_plan   *plan, *update_plan;
    fg_tensor  tokens, labels, loss, lr, step_input, grad_norm;
    fg__evaluator *evaluator;
    fg__folder *folder;
    int32_t   *batch;                    /* tokens, then labels of one micro batch */
    float     *losses;                   /* of an update's micro batches */

    int64_t vocab, micro, runs;          /* ids; sequences of a run; runs of an update */
    int64_t max_tokens, steps;
    int64_t step, done, position;        /* updates, tokens, windows drawn */
    int64_t saved, evaluated;            /* step of the newest checkpoint, of the last evaluation */
    double  smooth;                      /* moving average of the loss */
    double  before, started;             /* seconds of earlier parts; clock at the start */
    double  pace_clock, idle;            /* since the last log: clock, seconds not training */
    int64_t pace_tokens;
    fg_event last;                       /* the newest TRAIN event */
    fg_train_result *out;
} training;

static fg_status refuse(training *t, fg_status s, const char *text)
{
    return fg__say(t->message, s, "%s", text && text[0] ? text : fg_status_text(s));
}

static double spent(const training *t)
{
    return t->before + fg__seconds() - t->started;
}

static void tell(training *t, fg_event e)
{
    e.step = t->step;
    e.steps = t->steps;
    e.tokens = t->done;
    e.max_tokens = t->max_tokens;
    e.seconds = spent(t);
    e.smooth_loss = t->smooth;
    if (t->options->event)
        t->options->event(t->options->to, &e);
}

static void note(training *t, fg_event_kind kind, const char *text)
{
    const fg_event e = { .kind = kind, .text = text };
    if (t->folder)
        fg__folder_log(t->folder, "step %" PRId64 ": %s", t->step, text);
    tell(t, e);
}

/* ---- before the first update ----------------------------------------------------------------- */

static fg_status make_plan(training *t, const fg_graph *g, fg_plan **out)
{
    if (fg_graph_status(g) != FG_OK)
        return refuse(t, fg_graph_status(g), fg_graph_message(g));
    *out = fg_plan_new(g, t->store);
    if (!*out)
        return refuse(t, FG_ERR_MEMORY, NULL);
    return fg_plan_status(*out) == FG_OK ? FG_OK
                                         : refuse(t, fg_plan_status(*out), fg_plan_message(*out));
}

static fg_status make_graph(training *t)
{
    t->graph = fg__training_graph(t->model, t->recipe, &t->update, &t->vocab);
    if (!t->graph)
        return refuse(t, FG_ERR_MEMORY, NULL);
    if (fg_graph_status(t->graph) != FG_OK)
        return refuse(t, fg_graph_status(t->graph), fg_graph_message(t->graph));
    return fg_model_settings_read(t->graph, t->message);
}

static fg_status make_plans(training *t)
{
    const fg_graph *last = t->update ? t->update : t->graph;
    fg_status s = FG_OK;

    if (fg_store_init(t->store, t->graph, (uint64_t)t->recipe->seed) != FG_OK)
        return refuse(t, fg_store_status(t->store), fg_store_message(t->store));
    s = make_plan(t, t->graph, &t->plan);
    if (s == FG_OK && t->update)
        s = make_plan(t, t->update, &t->update_plan);
    t->tokens = fg_find(t->graph, "tokens");
    t->labels = fg_find(t->graph, "labels");
    t->loss = fg_find(t->graph, "loss");
    t->lr = fg_find(last, "lr");
    t->step_input = fg_find(last, "step");
    t->grad_norm = fg_find(last, "grad_norm");
    return s;
}

static fg_status open_data(training *t)
{
    const size_t n = 2 * (size_t)(t->micro * t->recipe->context);
    if (!t->model->build)
        return FG_OK;
    t->batch = malloc(n * sizeof *t->batch);
    if (!t->batch)
        return refuse(t, FG_ERR_MEMORY, NULL);
    return fg_data_open(&t->data, t->recipe, t->vocab, t->message);
}

static fg_status make_evaluator(training *t)
{
    const bool nothing = t->model->build && fg_data_windows(t->data, true) < 1;
    if (t->options->no_eval || nothing)
        return FG_OK;
    return fg__evaluator_new(&t->evaluator, t->model, t->recipe, t->store, t->data, t->message);
}

/* A hash of what must be the same when a run goes on. */
static uint64_t identity(const training *t)
{
    const uint64_t data = t->data ? fg_data_hash(t->data) : 0;
    return fg__draw(data, (uint64_t)t->recipe->bos, t->options->overfit);
}

static fg_status check_same(training *t, const fg_train_state *was)
{
    const fg_recipe *r = t->recipe;
    if (was->batch != r->batch)
        return fg__say(t->message, FG_ERR_USAGE,
                       "batch is %" PRId64 ", the run to resume has %" PRId64, r->batch,
                       was->batch);
    if (was->context != r->context)
        return fg__say(t->message, FG_ERR_USAGE,
                       "context is %" PRId64 ", the run to resume has %" PRId64, r->context,
                       was->context);
    if (was->seed != r->seed)
        return fg__say(t->message, FG_ERR_USAGE,
                       "seed is %" PRId64 ", the run to resume has %" PRId64, r->seed, was->seed);
    if (was->recipe != identity(t))
        return fg__say(t->message, FG_ERR_USAGE,
                       "the data, its held-out part or bos are not those of the "
                       "run to resume");
    return FG_OK;
}

static fg_status resume(training *t)
{
    char path[1024] = "", words[400] = "";
    fg_train_state was = { 0 };
    fg_status s = fg_checkpoint_find_newest(fg__folder_checkpoints(t->folder), path, words);

    if (s == FG_OK && path[0])
        s = fg_checkpoint_load(path, t->store, &was, words);
    if (s != FG_OK)
        return refuse(t, s, words);
    if (path[0])
        s = check_same(t, &was);
    if (s == FG_OK) {
        t->step = t->saved = t->out->resumed_from = was.step;
        t->done = was.tokens;
        t->position = was.position;
        t->before = was.seconds;
        if (was.positions == 1 && was.window_loss)
            t->smooth = was.window_loss[0];
        s = fg__folder_cut(t->folder, t->step, &t->evaluated, t->message);
    }
    fg_train_state_free(&was);
    return s;
}

/* Before a folder is touched: what does not fit must not cost the run that was there.  A run that
 * goes on loads its values first. */
static fg_status take_memory(training *t)
{
    fg_status s = fg_plan_reserve(t->plan);
    if (s != FG_OK)
        return refuse(t, s, fg_plan_message(t->plan));
    s = t->update ? fg_plan_reserve(t->update_plan) : FG_OK;
    return s == FG_OK ? FG_OK : refuse(t, s, fg_plan_message(t->update_plan));
}

static fg_status open_folder(training *t)
{
    const fg_train_options *o = t->options;
    fg_status s;

    if (!o->run_dir)
        return FG_OK;
    s = fg__folder_open(&t->folder, o->run_dir, o->resume, o->force, t->message);
    if (s == FG_OK && o->resume)
        s = resume(t);
    return s == FG_OK ? fg__folder_describe(t->folder, t->model, t->recipe, t->graph, o, t->message)
                      : s;
}

static fg_status count_ngrams(training *t)
{
    enum { MOST = 64 << 20 };
    if (t->options->no_ngram || !t->evaluator || !t->data || !fg_data_is_text(t->data))
        return FG_OK;
    if (fg_data_tokens(t->data, false) > MOST) {
        note(t, FG_EVENT_NOTE, "no n-gram baseline: the training text has more than 64 MiB");
        return FG_OK;
    }
    return fg_ngram_loss(t->data, 3, fg_data_eval_windows(t->data, t->recipe), &t->out->ngram_loss,
                         t->message);
}

static fg_status prepare(training *t)
{
    fg_status s = fg_recipe_check(t->recipe, t->message);
    if (s != FG_OK)
        return s;
    if (!t->model->build && !(t->model->loss && t->model->feed))
        return refuse(t, FG_ERR_USAGE, "the model has neither build nor loss and feed");
    t->micro = t->recipe->micro_batch ? t->recipe->micro_batch : t->recipe->batch;
    t->runs = t->recipe->batch / t->micro;
    t->max_tokens = fg_recipe_max_tokens(t->recipe);
    t->steps = fg_recipe_steps(t->recipe);
    t->losses = calloc((size_t)t->runs, sizeof *t->losses);
    if (!t->losses)
        return refuse(t, FG_ERR_MEMORY, NULL);
    s = make_graph(t);
    if (s == FG_OK)
        s = open_data(t);
    if (s == FG_OK)
        s = make_plans(t);
    if (s == FG_OK)
        s = make_evaluator(t);
    if (s == FG_OK)
        t->out->info = fg_plan_describe(t->plan);
    if (s == FG_OK && !t->options->dry_run && !t->options->resume)
        s = take_memory(t);
    if (s == FG_OK && !t->options->dry_run)
        s = open_folder(t);
    if (s == FG_OK && !t->options->dry_run)
        s = count_ngrams(t);
    return s;
}

/* ---- one update ------------------------------------------------------------------------------ */

static fg_status feed(training *t, int64_t run)
{
    const size_t n = (size_t)(t->micro * t->recipe->context);
    const int64_t from = t->options->overfit ? 0 : t->position;
    fg_status s;

    if (!t->model->build)
        return t->model->feed(t->model->self, t->plan, t->graph, t->recipe, from / t->micro + run,
                              false);
    fg_data_train_batch(t->data, from + run * t->micro, t->micro, t->batch, t->batch + n);
    s = fg_write(t->plan, t->tokens, t->batch, n * sizeof *t->batch);
    return s == FG_OK ? fg_write(t->plan, t->labels, t->batch + n, n * sizeof *t->batch) : s;
}

/* Nothing in an update waits for the device but its end: micro batches are fed while earlier ones
 * run, and losses come back by themselves. */
static fg_status run_once(training *t, int64_t run, float *loss)
{
    fg_status s = feed(t, run);
    if (s == FG_OK)
        s = fg_run_later(t->plan);
    if (s == FG_OK)
        s = fg_read_later(t->plan, t->loss, loss, sizeof *loss);
    return s == FG_OK ? s : refuse(t, s, fg_plan_message(t->plan));
}

static fg_status update(training *t, double *loss, double *norm)
{
    fg_plan *last = t->update ? t->update_plan : t->plan;
    const float lr = (float)fg_recipe_lr(t->recipe, t->done, t->max_tokens),
                step = (float)(t->step + 1);
    float value = 0;
    fg_status s = fg_write(last, t->lr, &lr, sizeof lr);

    *loss = 0;
    if (t->update)
        fg_store_zero(t->store, "@grad.");
    if (s == FG_OK)
        s = fg_write(last, t->step_input, &step, sizeof step);
    for (int64_t run = 0; run < t->runs && s == FG_OK; run++) {
        s = run_once(t, run, &t->losses[run]);
        if (s != FG_OK)
            return s;
    }
    if (s == FG_OK && t->update)
        s = fg_run_later(last);
    if (s == FG_OK)
        s = fg_read(last, t->grad_norm, &value, sizeof value);
    for (int64_t run = 0; run < t->runs; run++)
        *loss += t->losses[run];
    *loss /= (double)t->runs;
    *norm = value;
    return s == FG_OK ? s : refuse(t, s, fg_plan_message(last));
}

/* ---- what happens between updates ------------------------------------------------------------ */

static bool due(const training *t, int64_t every)
{
    return t->done >= t->max_tokens || (every && t->step % every == 0);
}

static fg_status save(training *t)
{
    const fg_recipe *r = t->recipe;
    const int64_t windows = t->data ? fg_data_windows(t->data, false) : 1;
    char words[400] = "", path[1300];
    fg_train_state now = { .step = t->step,
                           .batch = r->batch,
                           .context = r->context,
                           .tokens = t->done,
                           .seed = r->seed,
                           .epoch = t->position / windows,
                           .position = t->position,
                           .recipe = identity(t),
                           .seconds = spent(t),
                           .window = 1,
                           .positions = 1,
                           .window_loss = &t->smooth };
    const char *dir = t->folder ? fg__folder_checkpoints(t->folder) : NULL;
    const double start = fg__seconds();
    fg_status s;

    if (!dir || t->saved == t->step)
        return FG_OK;
    s = fg_checkpoint_save(dir, t->store, t->graph, &now, t->options->source, words);
    if (s == FG_OK && r->keep)
        s = fg_checkpoint_prune(dir, (int)r->keep, words);
    if (s != FG_OK)
        return refuse(t, s, words);
    t->saved = t->step;
    t->idle += fg__seconds() - start;
    snprintf(path, sizeof path, "%s/step-%09" PRId64, dir, t->step);
    fg__folder_log(t->folder, "step %" PRId64 ": saved", t->step);
    tell(t, (fg_event){ .kind = FG_EVENT_SAVE, .text = path });
    return FG_OK;
}

static fg_status metric(training *t, const fg_event *e)
{
    fg_event whole = *e;
    whole.step = t->step;
    whole.tokens = t->done;
    whole.seconds = spent(t);
    return t->folder ? fg__folder_metric(t->folder, &whole, t->message) : FG_OK;
}

static fg_status curve(training *t)
{
    return t->folder
               ? fg__folder_curve(t->folder, t->model->name ? t->model->name : "loss", t->message)
               : FG_OK;
}

static fg_status evaluate(training *t)
{
    fg_eval_result result;
    fg_event e = { .kind = FG_EVENT_EVAL, .logged = true, .ngram_loss = t->out->ngram_loss };
    fg_status s;

    if (!t->evaluator)
        return FG_OK;
    s = fg__evaluator_run(t->evaluator, t->options->stop, &result, NULL, t->message);
    if (s != FG_OK)
        return s;
    t->idle += result.seconds;
    t->evaluated = t->step;
    t->out->eval_loss = e.loss = result.loss;
    s = metric(t, &e);
    if (s == FG_OK)
        s = curve(t);
    if (t->folder)
        fg__folder_log(t->folder, "step %" PRId64 ": held-out loss %.4f", t->step, result.loss);
    tell(t, e);
    return s;
}

static fg_status report(training *t, double loss, double norm, double lr)
{
    const double now = fg__seconds(), busy = now - t->pace_clock - t->idle;
    const int64_t tokens = t->done - t->pace_tokens;
    fg_event e = { .kind = FG_EVENT_TRAIN, .loss = loss, .grad_norm = norm, .lr = lr };
    fg_status s = FG_OK;

    e.logged = due(t, t->recipe->log_every) || t->step == 1;
    e.tokens_per_s = busy > 0 ? (double)tokens / busy : 0;
    e.flops_per_s = t->out->info.flops / (double)(t->micro * t->recipe->context) * e.tokens_per_s;
    e.seconds_left = e.tokens_per_s > 0 ? (double)(t->max_tokens - t->done) / e.tokens_per_s : 0;
    t->last = e;
    if (e.logged) {
        s = metric(t, &e);
        if (t->folder)
            fg__folder_log(t->folder,
                           "step %" PRId64 ": loss %.4f, norm %.3g, lr %.3g, %.0f tokens/s",
                           t->step, loss, norm, lr, e.tokens_per_s);
        t->pace_clock = now;
        t->pace_tokens = t->done;
        t->idle = 0;
    }
    tell(t, e);
    return s;
}

/* The update was not applied: what the store holds is good, and is kept. */
static fg_status not_finite(training *t, double loss, double norm)
{
    const fg_event e = { .kind = FG_EVENT_TRAIN, .loss = loss, .grad_norm = norm };
    char words[300];
    fg_status s = save(t);

    if (s != FG_OK)
        return s;
    snprintf(words, sizeof words,
             "update %" PRId64 ": %s is not finite (loss %g, gradient norm %g); the "
             "parameters are those of step %" PRId64,
             t->step + 1, isfinite(loss) ? "the gradient" : "the loss", loss, norm, t->step);
    t->step++;
    s = metric(t, &e);
    t->step--;
    note(t, FG_EVENT_END, words);
    return s == FG_OK ? refuse(t, FG_ERR_NUMERIC, words) : s;
}

static fg_status advance(training *t)
{
    const double lr = fg_recipe_lr(t->recipe, t->done, t->max_tokens);
    double loss, norm;
    fg_status s = update(t, &loss, &norm);

    if (s == FG_ERR_NUMERIC)                 /* a checked run has named the node already */
        return save(t) == FG_OK ? s : FG_ERR_IO;
    if (s != FG_OK)
        return s;
    if (!isfinite(loss) || !isfinite(norm))
        return not_finite(t, loss, norm);
    t->smooth = t->step ? 0.95 * t->smooth + 0.05 * loss : loss;
    t->step++;
    t->done += t->recipe->batch * t->recipe->context;
    t->position += t->recipe->batch;
    t->out->loss = loss;
    s = report(t, loss, norm, lr);
    if (s == FG_OK && due(t, t->recipe->eval_every))
        s = evaluate(t);
    if (s == FG_OK && due(t, t->recipe->save_every))
        s = save(t);
    return s;
}

static bool asked_to_stop(const training *t)
{
    const double limit = t->options->seconds;
    return (t->options->stop && *t->options->stop) ||
           (limit > 0 && fg__seconds() - t->started >= limit);
}

/* graph.json as it ran, with the time of every node, where the plans noted it (FG_RECORD=1). */
static fg_status write_times(training *t)
{
    const fg_json_part parts[2] = { { NULL, t->plan, FG_STAGE_PLANNED },
                                    { NULL, t->update_plan, FG_STAGE_PLANNED } };
    if (!t->folder || !fg_plan_recorded(t->plan))
        return FG_OK;
    return fg__folder_graph(t->folder, t->update ? 2 : 1, parts, t->model->name, t->message);
}

static fg_status loop(training *t)
{
    const fg_event start = { .kind = FG_EVENT_START,
                             .info = t->out->info,
                             .ngram_loss = t->out->ngram_loss };
    fg_status s = FG_OK;

    if (t->folder)
        fg__folder_log(t->folder, "%s at step %" PRId64 " of %" PRId64,
                       t->step ? "resumed" : "started", t->step, t->steps);
    tell(t, start);
    if (!t->step)
        fg_store_zero(t->store, "@adam.");
    t->pace_clock = fg__seconds();
    t->pace_tokens = t->done;
    if (t->step && t->evaluated < t->step && due(t, t->recipe->eval_every))
        s = evaluate(t); /* it was stopped between the update and its evaluation */
    while (s == FG_OK && t->done < t->max_tokens) {
        if (asked_to_stop(t)) {
            s = FG_ERR_STOPPED;
            break;
        }
        s = advance(t);
    }
    if (s == FG_ERR_STOPPED) {
        s = save(t);
        if (s == FG_OK)
            s = curve(t);
        if (s != FG_OK)
            return s;
        note(t, FG_EVENT_END, "stopped on request; resume to go on");
        return refuse(t, FG_ERR_STOPPED, NULL);
    }
    if (s == FG_OK)
        s = write_times(t);
    if (s == FG_OK)
        note(t, FG_EVENT_END, "training is complete");
    return s;
}

fg_status fg_train(const struct fg_model *m, const fg_recipe *r, fg_store *s,
                   const fg_train_options *o, fg_train_result *out, char message[FG_MESSAGE])
{
    static const fg_train_options none;
    fg_train_result unread;
    training t = { .model = m,
                   .recipe = r,
                   .options = o ? o : &none,
                   .store = s,
                   .message = message,
                   .saved = -1,
                   .started = fg__seconds(),
                   .out = out ? out : &unread };
    fg_status status;

    memset(t.out, 0, sizeof *t.out);
    t.out->loss = t.out->eval_loss = NAN;
    status = prepare(&t);
    if (status == FG_OK && !t.options->dry_run)
        status = loop(&t);
    t.out->step = t.step;
    t.out->tokens = t.done;
    t.out->seconds = spent(&t);
    t.out->tokens_per_s = t.last.tokens_per_s;
    fg__evaluator_free(t.evaluator);
    fg_plan_free(t.plan);
    fg_plan_free(t.update_plan);
    fg_graph_free(t.graph);
    fg_graph_free(t.update);
    fg_data_close(t.data);
    fg__folder_close(t.folder);
    free(t.batch);
    free(t.losses);
    return status == FG_OK ? fg__say(message, FG_OK, "%s", "") : status;
}
