/* recipe.c - the numbers of a training run: defaults, setting by name, sense, learning rate.
 *
 * Schedule: linear warm-up, then half a cosine, both in tokens consumed before the update; the
 * official code of Lin et al. 2025 (arXiv 2503.02130). */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "training.h"

#define RECIPE_FIELDS(X)                                                                           \
    X(data,          TEXT, "training text: bytes, or u16 tokens where the name ends in .bin")      \
    X(eval_data,     TEXT, "held-out text; empty: a share of data")                                \
    X(eval_fraction, REAL, "without eval_data: this last share of data is held out; 0: none")      \
    X(batch,         INT,  "sequences per update")                                                 \
    X(context,       INT,  "tokens per sequence")                                                  \
    X(micro_batch,   INT,  "sequences per run, divides batch; 0: batch")                           \
    X(steps,         INT,  "updates; 0: not set")                                                  \
    X(tokens,        INT,  "tokens to train on; 0: not set")                                       \
    X(lr,            REAL, "highest learning rate")                                                \
    X(lr_end,        REAL, "learning rate that the cosine ends at")                                \
    X(lr_start,      REAL, "learning rate that the warm-up begins at")                             \
    X(warmup_tokens, INT,  "tokens of linear warm-up")                                             \
    X(weight_decay,  REAL, "decay of weights, decoupled from the gradient")                        \
    X(beta1,         REAL, "decay of the first moment")                                            \
    X(beta2,         REAL, "decay of the second moment")                                           \
    X(eps,           REAL, "added to the root of the second moment")                               \
    X(clip,          REAL, "limit of the gradient's norm; 0: none")                                \
    X(seed,          INT,  "of the parameters and of the order of the data")                       \
    X(eval_every,    INT,  "updates between evaluations; 0: at the end only")                      \
    X(log_every,     INT,  "updates between lines of metrics.jsonl; 0: at the end only")           \
    X(save_every,    INT,  "updates between checkpoints; 0: at the end only")                      \
    X(eval_batches,  INT,  "micro batches per evaluation, spread evenly; 0: all held-out text")    \
    X(keep,          INT,  "newest checkpoints kept; 0: all")                                      \
    X(vocab,         INT,  "token ids the data may hold; 0: the model's")                          \
    X(bos,           INT,  "token in front of every sequence")

typedef enum { TEXT, REAL, INT } kind;
typedef struct { const char *key; kind kind; size_t offset, size; const char *meaning; } field;

static const field fields[] = {
#define X(name, k, text)                                                                           \
    { #name, k, offsetof(fg_recipe, name), sizeof(((fg_recipe *)0)->name), text },
    RECIPE_FIELDS(X)
#undef X
};
enum { N_FIELDS = sizeof fields / sizeof fields[0], DEFAULT_STEPS = 1000 };

fg_status fg__say(char message[FG_MESSAGE], fg_status s, const char *fmt, ...)
{
    if (!message)
        return s;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(message, FG_MESSAGE, fmt, ap);
    va_end(ap);
    return s;
}

static const field *find(const char *key)
{
    for (int i = 0; i < N_FIELDS; i++)
        if (key && !strcmp(fields[i].key, key))
            return &fields[i];
    return NULL;
}

fg_recipe fg_recipe_default(void)
{
    fg_recipe r = { .eval_fraction = 0.1, .batch = 8, .context = 256, .lr = 1e-3,
                    .weight_decay = 0.1, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .clip = 1,
                    .eval_every = 100, .log_every = 10, .save_every = 100, .eval_batches = 32,
                    .keep = 2 };
    return r;
}

const char *fg_recipe_key(int i)
{
    return i >= 0 && i < N_FIELDS ? fields[i].key : NULL;
}

const char *fg_recipe_meaning(const char *key)
{
    const field *f = find(key);
    return f ? f->meaning : NULL;
}

void fg_recipe_get(const fg_recipe *r, const char *key, char *text, size_t size)
{
    const field *f = find(key);
    const char *at = (const char *)r + (f ? f->offset : 0);
    int64_t whole;
    double real;

    if (!size)
        return;
    text[0] = 0;
    if (!f)
        return;
    switch (f->kind) {
    case TEXT:
        snprintf(text, size, "%s", at);
        break;
    case REAL:
        memcpy(&real, at, sizeof real);
        for (int digits = 6; digits <= 17; digits++) {           /* the shortest that reads back */
            snprintf(text, size, "%.*g", digits, real);
            if (strtod(text, NULL) == real)
                break;
        }
        break;
    case INT:
        memcpy(&whole, at, sizeof whole);
        snprintf(text, size, "%" PRId64, whole);
        break;
    }
}

/* "250" or "2.5e9": a whole number either way. */
static bool read_int(const char *value, int64_t *out)
{
    char *end;
    errno = 0;
    const long long whole = strtoll(value, &end, 10);
    if (end != value && !*end && !errno) {
        *out = whole;
        return true;
    }
    const double real = strtod(value, &end);
    if (end == value || *end || !(fabs(real) < 9e15) || real != floor(real))
        return false;
    *out = (int64_t)real;
    return true;
}

static bool read_real(const char *value, double *out)
{
    char *end;
    *out = strtod(value, &end);
    return end != value && !*end && isfinite(*out);
}

fg_status fg_recipe_set(fg_recipe *r, const char *key, const char *value, char message[200])
{
    const field *f = find(key);
    char text[FG_MESSAGE] = "";
    fg_status s = FG_OK;
    int64_t whole;
    double real;

    if (!f || !value)
        s = fg__say(text, FG_ERR_USAGE, f ? "%.60s has no value" : "recipe has no key '%.60s'",
                    key ? key : "");
    else if (f->kind == TEXT && strlen(value) >= f->size)
        s = fg__say(text, FG_ERR_USAGE, "%s has %zu bytes, at most %zu fit", key, strlen(value),
                    f->size - 1);
    else if (f->kind == INT && !read_int(value, &whole))
        s = fg__say(text, FG_ERR_USAGE, "%s must be a whole number, not '%.60s'", key, value);
    else if (f->kind == REAL && !read_real(value, &real))
        s = fg__say(text, FG_ERR_USAGE, "%s must be a number, not '%.60s'", key, value);
    else if (f->kind == TEXT)
        memcpy((char *)r + f->offset, value, strlen(value) + 1);
    else
        memcpy((char *)r + f->offset, f->kind == INT ? (void *)&whole : (void *)&real, f->size);
    if (message)
        snprintf(message, 200, "%.199s", text);
    return s;
}

int64_t fg_recipe_max_tokens(const fg_recipe *r)
{
    const int64_t per_step = r->batch * r->context;
    const int64_t steps = r->steps || r->tokens ? r->steps : DEFAULT_STEPS;
    if (!steps)
        return r->tokens;
    return r->tokens && r->tokens / per_step < steps ? r->tokens : steps * per_step;
}

int64_t fg_recipe_steps(const fg_recipe *r)
{
    const int64_t per_step = r->batch * r->context;
    return (fg_recipe_max_tokens(r) + per_step - 1) / per_step;
}

double fg_recipe_lr(const fg_recipe *r, int64_t tokens_before, int64_t max_tokens)
{
    const double t = (double)tokens_before, w = (double)r->warmup_tokens, M = (double)max_tokens;
    if (tokens_before < r->warmup_tokens)
        return r->lr + (r->lr_start - r->lr) * (1 - t / w);
    const double u = M > w ? fmin(t - w, M - w) / (M - w) : 1;
    return r->lr_end + (r->lr - r->lr_end) * (1 + cos(3.14159265358979323846 * u)) / 2;
}

static fg_status check_size(const fg_recipe *r, char message[FG_MESSAGE])
{
    const int64_t most = INT32_MAX;
    static const char *const counts[] = {
        "steps", "tokens", "warmup_tokens", "micro_batch", "eval_every", "log_every",
        "save_every", "eval_batches", "keep", "vocab", "bos", "seed"
    };

    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        int64_t value;
        memcpy(&value, (const char *)r + find(counts[i])->offset, sizeof value);
        if (value < 0)
            return fg__say(message, FG_ERR_USAGE, "%s must not be negative, it is %" PRId64,
                           counts[i], value);
    }
    if (r->batch < 1)
        return fg__say(message, FG_ERR_USAGE, "batch must be at least 1, it is %" PRId64, r->batch);
    if (r->context < 1)
        return fg__say(message, FG_ERR_USAGE, "context must be at least 1, it is %" PRId64,
                       r->context);
    if (r->batch > most / r->context)
        return fg__say(message, FG_ERR_USAGE, "batch %" PRId64 " times context %" PRId64
                       " must be at most %" PRId64 " tokens an update", r->batch, r->context, most);
    if (r->micro_batch && r->batch % r->micro_batch)
        return fg__say(message, FG_ERR_USAGE, "micro_batch %" PRId64 " must divide batch %" PRId64,
                       r->micro_batch, r->batch);
    if (r->steps > INT64_MAX / (r->batch * r->context))
        return fg__say(message, FG_ERR_USAGE,
                       "steps %" PRId64 " are more tokens than can be counted", r->steps);
    if (r->vocab > most)
        return fg__say(message, FG_ERR_USAGE, "vocab must be at most %" PRId64 ", it is %" PRId64,
                       most, r->vocab);
    if (r->vocab && r->bos >= r->vocab)
        return fg__say(message, FG_ERR_USAGE, "bos %" PRId64 " must be below vocab %" PRId64,
                       r->bos, r->vocab);
    return FG_OK;
}

fg_status fg_recipe_check(const fg_recipe *r, char message[FG_MESSAGE])
{
    const fg_status s = check_size(r, message);
    if (s != FG_OK)
        return s;
    if (!(r->lr > 0) || !isfinite(r->lr))
        return fg__say(message, FG_ERR_USAGE, "lr must be above 0, it is %g", r->lr);
    if (!(r->lr_end >= 0 && r->lr_end <= r->lr))
        return fg__say(message, FG_ERR_USAGE, "lr_end must lie between 0 and lr %g, it is %g",
                       r->lr, r->lr_end);
    if (!(r->lr_start >= 0 && r->lr_start <= r->lr))
        return fg__say(message, FG_ERR_USAGE, "lr_start must lie between 0 and lr %g, it is %g",
                       r->lr, r->lr_start);
    if (r->warmup_tokens && r->warmup_tokens >= fg_recipe_max_tokens(r))
        return fg__say(message, FG_ERR_USAGE,
                       "warmup_tokens %" PRId64 " must be less than the %" PRId64
                       " tokens of the whole training",
                       r->warmup_tokens, fg_recipe_max_tokens(r));
    if (!(r->beta1 >= 0 && r->beta1 < 1))
        return fg__say(message, FG_ERR_USAGE, "beta1 must be at least 0 and below 1, it is %g",
                       r->beta1);
    if (!(r->beta2 >= 0 && r->beta2 < 1))
        return fg__say(message, FG_ERR_USAGE, "beta2 must be at least 0 and below 1, it is %g",
                       r->beta2);
    if (!(r->eps > 0))
        return fg__say(message, FG_ERR_USAGE, "eps must be above 0, it is %g", r->eps);
    if (!(r->weight_decay >= 0))
        return fg__say(message, FG_ERR_USAGE, "weight_decay must not be negative, it is %g",
                       r->weight_decay);
    if (!(r->clip >= 0))
        return fg__say(message, FG_ERR_USAGE, "clip must not be negative, it is %g", r->clip);
    if (!(r->eval_fraction >= 0 && r->eval_fraction < 1))
        return fg__say(message, FG_ERR_USAGE,
                       "eval_fraction must be at least 0 and below 1, it is %g", r->eval_fraction);
    return fg__say(message, FG_OK, "%s", "");
}
