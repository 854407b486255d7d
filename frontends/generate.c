/* generate.c - continuing prompts: a graph for pieces of the prompts and one for a token after
 * another, all prompts side by side, on the same caches; and the choice of a token from logits.
 *
 * Prompts of different lengths are padded on the left, and fg_sequence.first keeps the padding out
 * of sight, so that every sequence ends in the same column.  Random numbers are a function of
 * (seed, sequence, index of the new token): neither the other sequences nor an earlier choice moves
 * them. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include "training.h"

enum { PIECE = 512 };

typedef struct {
    int64_t   length;                    /* columns */
    fg_graph *graph;
    fg_plan  *plan;
    fg_tensor tokens, past, first, logits;
} stage;

typedef struct {
    const struct fg_model *model;
    fg_store *store;
    const fg_generate_options *options;
    const fg_prompt *prompts;
    char     *message;
    int64_t   n, vocab;                  /* sequences; ids that may be chosen */
    int64_t   longest, capacity;         /* tokens of the longest prompt, of a cache */
    stage     piece, rest, next;         /* of the prompts; the last, shorter one; one token */
    int32_t  *prompt;                    /* [n, longest], padded on the left */
    int32_t  *pad;                       /* [n]: columns of padding */
    int32_t  *tokens, *first;            /* of one run */
    float    *logits;                    /* [n, width of the model's logits] */
    bool     *ended;                     /* [n] */
} generation;

fg_generate_options fg_generate_default(void)
{
    fg_generate_options o = { .max_tokens = 256, .temperature = 0.8, .top_p = 0.95,
                              .end_token = -1 };
    return o;
}

/* ---- choosing -------------------------------------------------------------------------------- */

static uint32_t bits_of(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

/* The first of the greatest; *finite, unless NULL, becomes false if one of x is not.  In blocks,
 * and by bits, as integers are compared many at a time: those of floats, but for the sign, are in
 * the order of the floats. */
static int32_t likeliest(const float *x, int64_t n, bool *finite)
{
    enum { BLOCK = 512 };
    const int32_t infinite = 0x7f800000;
    int64_t best = 0;
    int32_t most = INT32_MIN, worst = 0;
    for (int64_t from = 0; from < n; from += BLOCK) {
        const int64_t to = from + BLOCK < n ? from + BLOCK : n;
        int32_t here = INT32_MIN;
        for (int64_t i = from; i < to; i++) {
            int32_t u;
            memcpy(&u, x + i, sizeof u);
            const int32_t size = u & INT32_MAX, key = u < 0 ? -size : size;
            here = key > here ? key : here;
            worst = size > worst ? size : worst;
        }
        if (here > most) {
            most = here;
            best = from;
        }
    }
    if (finite)
        *finite = worst < infinite;
    for (int64_t i = best; i < n; i++) {
        int32_t u;
        memcpy(&u, x + i, sizeof u);
        if ((u < 0 ? -(u & INT32_MAX) : u) == most)
            return (int32_t)i;
    }
    return 0;
}

/* What the probabilities from `least` up come to: how many they are, or their sum. */
static double weight_from(const float *p, int64_t n, uint32_t least, bool counted)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        if (bits_of(p[i]) >= least)
            sum += counted ? 1 : (double)p[i];
    return sum;
}

/* Zeroes all but the fewest likeliest whose weight reaches `want`; ties go to the lower id.  The
 * bound is found by halving: bits of floats that are not negative are in the order of the floats.
 */
static void keep_likeliest(float *p, int64_t n, double want, bool counted)
{
    uint32_t least = 0, above = bits_of(INFINITY);
    while (above - least > 1) {
        const uint32_t middle = least + (above - least) / 2;
        if (weight_from(p, n, middle, counted) >= want)
            least = middle;
        else
            above = middle;
    }
    double sum = weight_from(p, n, least + 1, counted);
    for (int64_t i = 0; i < n; i++) {
        const uint32_t u = bits_of(p[i]);
        const bool tie = u == least && sum < want;
        if (tie)
            sum += counted ? 1 : (double)p[i];
        if (u <= least && !tie)
            p[i] = 0;
    }
}

int32_t fg_sample(float *logits, int64_t vocab, const fg_generate_options *o, int64_t sequence,
                  int64_t index)
{
    if (!(o->temperature > 0))
        return likeliest(logits, vocab, NULL);
    const double most = logits[likeliest(logits, vocab, NULL)];
    double sum = 0;
    for (int64_t i = 0; i < vocab; i++) {
        logits[i] = (float)exp((logits[i] - most) / o->temperature);
        sum += logits[i];
    }
    if (o->top_k > 0 && o->top_k < vocab)
        keep_likeliest(logits, vocab, (double)o->top_k, true);
    if (o->top_p > 0 && o->top_p < 1) {
        sum = weight_from(logits, vocab, 0, false);
        keep_likeliest(logits, vocab, o->top_p * sum, false);
    }
    sum = weight_from(logits, vocab, 0, false);

    const uint64_t random = fg__draw((uint64_t)o->seed, (uint64_t)sequence, (uint64_t)index);
    const double aim = (double)(random >> 11) * 0x1p-53 * sum;
    int64_t chosen = 0;
    double passed = 0;
    for (int64_t i = 0; i < vocab && passed <= aim; i++)
        if (logits[i] > 0) {
            passed += logits[i];
            chosen = i;
        }
    return (int32_t)chosen;
}

/* ---- graphs ---------------------------------------------------------------------------------- */

static fg_status refuse(generation *g, fg_status s, const char *text)
{
    return fg__say(g->message, s, "%s", text && text[0] ? text : fg_status_text(s));
}

/* A graph of the model on `length` columns, whose last column's logits are read; none for 0. */
static fg_status make_stage(generation *g, int64_t length, bool padded, stage *s)
{
    s->length = length;
    if (!length)
        return FG_OK;
    s->graph = fg_graph_new();
    if (!s->graph)
        return refuse(g, FG_ERR_MEMORY, NULL);
    for (int i = 0; i < g->model->n_settings; i++)
        fg_graph_set(s->graph, g->model->settings[i].key, g->model->settings[i].value);
    s->tokens = fg_input(s->graph, "tokens", FG_I32, FG_DIMS(g->n, length));
    s->past = fg_input(s->graph, "past", FG_I32, FG_DIMS(1));
    if (padded)
        s->first = fg_input(s->graph, "first", FG_I32, FG_DIMS(g->n, length));
    fg_graph_sequence(s->graph, (fg_sequence){ s->first, s->past, g->capacity });
    const fg_tensor all = g->model->build(g->model->self, s->tokens);
    const fg_tensor last = length > 1 ? fg_slice(all, 1, length - 1, length) : all;
    s->logits = fg_output(last, "logits");
    if (fg_graph_status(s->graph) != FG_OK)
        return refuse(g, fg_graph_status(s->graph), fg_graph_message(s->graph));
    if (fg_shape_of(last).rank != 3)
        return refuse(g, FG_ERR_SHAPE, "the model must return logits [B,T,V]");
    s->plan = fg_plan_new(s->graph, g->store);
    if (!s->plan)
        return refuse(g, FG_ERR_MEMORY, NULL);
    return fg_plan_status(s->plan) == FG_OK
               ? FG_OK
               : refuse(g, fg_plan_status(s->plan), fg_plan_message(s->plan));
}

/* The lengths of the prompts, and whether they differ. */
static fg_status measure(generation *g, bool *padded)
{
    const int64_t extra = g->options->bos >= 0;
    for (int64_t i = 0; i < g->n; i++) {
        const int64_t length = g->prompts[i].count + extra;
        if (length < 1)
            return fg__say(g->message, FG_ERR_USAGE, "prompt %" PRId64 " is empty", i);
        *padded |= i && length != g->longest;
        if (length > g->longest)
            g->longest = length;
    }
    g->capacity = g->longest + g->options->max_tokens;
    if (g->capacity > INT32_MAX / g->n)
        return fg__say(g->message, FG_ERR_USAGE, "%" PRId64 " sequences of %" PRId64
                       " tokens are too many", g->n, g->capacity);
    return FG_OK;
}

static fg_status lay_out(generation *g)
{
    const size_t n = (size_t)g->n, all = n * (size_t)g->longest;
    const int64_t bos = g->options->bos, extra = bos >= 0;

    g->prompt = calloc(all, sizeof *g->prompt);
    g->tokens = calloc(all, sizeof *g->tokens);
    g->first = calloc(all, sizeof *g->first);
    g->pad = calloc(n, sizeof *g->pad);
    g->ended = calloc(n, sizeof *g->ended);
    if (!g->prompt || !g->tokens || !g->first || !g->pad || !g->ended)
        return refuse(g, FG_ERR_MEMORY, NULL);
    for (int64_t i = 0; i < g->n; i++) {
        const fg_prompt *p = &g->prompts[i];
        int32_t *row = g->prompt + (i + 1) * g->longest - p->count;
        if (p->count)
            memcpy(row, p->tokens, (size_t)p->count * sizeof *row);
        if (extra)
            row[-1] = (int32_t)bos;
        g->pad[i] = (int32_t)(g->longest - p->count - extra);
    }
    return FG_OK;
}

static fg_status check_vocab(generation *g)
{
    const int64_t width = fg_dim(g->next.logits, 2), limit = g->options->vocab;
    g->vocab = limit > 0 && limit < width ? limit : width;
    for (int64_t i = 0; i < g->n * g->longest; i++)
        if (g->prompt[i] < 0 || g->prompt[i] >= width)
            return fg__say(g->message, FG_ERR_USAGE, "prompt %" PRId64 " holds the token %" PRId32
                           ", the model knows 0 to %" PRId64, i / g->longest, g->prompt[i],
                           width - 1);
    g->logits = malloc((size_t)(g->n * width) * sizeof *g->logits);
    return g->logits ? FG_OK : refuse(g, FG_ERR_MEMORY, NULL);
}

/* ---- running --------------------------------------------------------------------------------- */

/* Runs a stage on g->tokens, `past` columns into the sequences; the last column's logits. */
static fg_status run(generation *g, stage *s, int64_t past)
{
    const size_t bytes = (size_t)(g->n * s->length) * sizeof(int32_t);
    const int32_t before = (int32_t)past;
    fg_status status = fg_write(s->plan, s->tokens, g->tokens, bytes);

    for (int64_t i = 0; i < g->n; i++)
        for (int64_t t = 0; t < s->length; t++)
            g->first[i * s->length + t] = g->pad[i];
    if (status == FG_OK)
        status = fg_write(s->plan, s->past, &before, sizeof before);
    if (status == FG_OK && !fg_absent(s->first))
        status = fg_write(s->plan, s->first, g->first, bytes);
    if (status == FG_OK)
        status = fg_run_later(s->plan);                  /* reading waits for it */
    if (status == FG_OK)
        status = fg_read(s->plan, s->logits, g->logits,
                         (size_t)(g->n * fg_dim(s->logits, 2)) * sizeof *g->logits);
    return status == FG_OK ? status : refuse(g, status, fg_plan_message(s->plan));
}

static fg_status read_prompts(generation *g)
{
    fg_status s = FG_OK;
    fg_store_zero(g->store, "@cache.");
    for (int64_t past = 0; past < g->longest && s == FG_OK;) {
        stage *now = g->longest - past >= g->piece.length && g->piece.length ? &g->piece : &g->rest;
        for (int64_t i = 0; i < g->n; i++)
            memcpy(g->tokens + i * now->length, g->prompt + i * g->longest + past,
                   (size_t)now->length * sizeof *g->tokens);
        s = run(g, now, past);
        past += now->length;
    }
    return s;
}

static fg_status not_finite(generation *g, int64_t sequence, const float *x)
{
    for (int64_t i = 0; i < g->vocab; i++)
        if (!isfinite(x[i]))
            return fg__say(g->message, FG_ERR_NUMERIC,
                           "the logit of token %" PRId64 " in sequence %" PRId64 " is %g", i,
                           sequence, (double)x[i]);
    return FG_OK;
}

/* One new token for every sequence that goes on; left: how many still do. */
static fg_status choose(generation *g, int64_t index, int32_t *out, int64_t *counts, int64_t *left)
{
    const fg_generate_options *o = g->options;
    const int64_t width = fg_dim(g->next.logits, 2);

    for (int64_t i = 0; i < g->n; i++) {
        if (g->ended[i])
            continue;
        float *x = g->logits + i * width;
        bool finite;
        int32_t token = likeliest(x, g->vocab, &finite);
        if (!finite)
            return not_finite(g, i, x);
        if (o->temperature > 0)
            token = fg_sample(x, g->vocab, o, i, index);
        out[i * o->max_tokens + index] = token;
        counts[i] = index + 1;
        g->ended[i] = (o->token && !o->token(o->to, (int)i, token)) || token == o->end_token;
        *left -= g->ended[i];
    }
    return FG_OK;
}

static fg_status go_on(generation *g, int32_t *out, int64_t *counts)
{
    const fg_generate_options *o = g->options;
    int64_t left = g->n;
    fg_status s = read_prompts(g);

    for (int64_t k = 0; s == FG_OK; k++) {
        s = choose(g, k, out, counts, &left);
        if (s != FG_OK || !left || k + 1 == o->max_tokens)
            break;
        if (o->stop && *o->stop)
            return fg__say(g->message, FG_ERR_STOPPED, "stopped on request");
        for (int64_t i = 0; i < g->n; i++)
            g->tokens[i] = out[i * o->max_tokens + counts[i] - 1];
        s = run(g, &g->next, g->longest + k);
    }
    return s;
}

static void free_generation(generation *g)
{
    stage *stages[3] = { &g->piece, &g->rest, &g->next };
    for (int i = 0; i < 3; i++) {
        fg_plan_free(stages[i]->plan);
        fg_graph_free(stages[i]->graph);
    }
    fg_store_remove(g->store, "@cache.");
    free(g->prompt);
    free(g->pad);
    free(g->tokens);
    free(g->first);
    free(g->logits);
    free(g->ended);
}

static fg_status check_options(const struct fg_model *m, const fg_generate_options *o, int n,
                               char message[FG_MESSAGE])
{
    if (!m->build)
        return fg__say(message, FG_ERR_USAGE, "only a language model can generate");
    if (n < 1)
        return fg__say(message, FG_ERR_USAGE, "there is no prompt to continue");
    if (o->max_tokens < 0 || o->max_tokens > INT32_MAX / 2)
        return fg__say(message, FG_ERR_USAGE, "max_tokens must not be negative, it is %" PRId64,
                       o->max_tokens);
    if (!(o->temperature >= 0) || !isfinite(o->temperature))
        return fg__say(message, FG_ERR_USAGE, "temperature must not be negative, it is %g",
                       o->temperature);
    if (o->top_k < 0)
        return fg__say(message, FG_ERR_USAGE, "top_k must not be negative, it is %" PRId64,
                       o->top_k);
    if (!(o->top_p >= 0 && o->top_p <= 1))
        return fg__say(message, FG_ERR_USAGE, "top_p must lie between 0 and 1, it is %g", o->top_p);
    return FG_OK;
}

fg_status fg_generate(const struct fg_model *m, fg_store *s, int n, const fg_prompt *prompts,
                      const fg_generate_options *o, int32_t *out, int64_t *counts,
                      char message[FG_MESSAGE])
{
    generation g = { .model = m, .store = s, .options = o, .prompts = prompts,
                     .message = message, .n = n > 0 ? n : 1 };
    bool padded = false;
    fg_status status = check_options(m, o, n, message);

    for (int i = 0; i < n && status == FG_OK; i++)
        counts[i] = 0;
    if (status != FG_OK || o->max_tokens == 0)
        return status == FG_OK ? fg__say(message, FG_OK, "%s", "") : status;
    const int64_t piece = o->piece > 0 ? o->piece : PIECE;
    fg_store_remove(s, "@cache.");
    status = measure(&g, &padded);
    if (status == FG_OK)
        status = lay_out(&g);
    if (status == FG_OK)
        status = make_stage(&g, 1, padded, &g.next);
    if (status == FG_OK)
        status = check_vocab(&g);
    if (status == FG_OK)
        status = make_stage(&g, g.longest >= piece ? piece : 0, padded, &g.piece);
    if (status == FG_OK)
        status = make_stage(&g, g.longest % piece, padded, &g.rest);
    if (status == FG_OK)
        status = go_on(&g, out, counts);
    free_generation(&g);
    return status == FG_OK ? fg__say(message, FG_OK, "%s", "") : status;
}
