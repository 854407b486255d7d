/* ngram.c - a byte n-gram model: the baseline that a language model must beat.
 *
 * Witten and Bell 1991, interpolated.  For a context h of k bytes followed n(h) times by d(h)
 * different bytes, n(hc) times by c, and h' = h without its first byte: p(c | h) = (n(hc) + d(h)
 * p(c | h')) / (n(h) + d(h)),     below the empty context p = 1/256. Strings and contexts share one
 * table of 64-bit keys: length, role, bytes. */
#include <stdlib.h>
#include "training.h"

enum { MAX_ORDER = 6 };

typedef struct { uint64_t key; uint32_t count, distinct; } cell;
typedef struct { cell *cells; size_t mask, used; } table;

/* The last n <= 7 bytes of `history` as a string that was seen, or as a context that was followed.
 */
typedef enum { SEEN, FOLLOWED } role;
static inline uint64_t key_of(uint64_t history, int n, role as)
{
    return (n ? history & UINT64_MAX >> (64 - 8 * n) : 0) | (uint64_t)as << 56 |
           (uint64_t)(n + 1) << 60;
}

static cell *look(const table *t, uint64_t key)
{
    size_t i = fg__mix(key) & t->mask;
    while (t->cells[i].key && t->cells[i].key != key)
        i = (i + 1) & t->mask;
    return &t->cells[i];
}

static bool grow(table *t)
{
    table wide = { calloc(2 * (t->mask + 1), sizeof(cell)), 2 * (t->mask + 1) - 1, t->used };
    if (!wide.cells)
        return false;
    for (size_t i = 0; i <= t->mask; i++)
        if (t->cells[i].key)
            *look(&wide, t->cells[i].key) = t->cells[i];
    free(t->cells);
    *t = wide;
    return true;
}

/* One more of key; NULL if out of memory. */
static cell *count(table *t, uint64_t key)
{
    if (2 * t->used > t->mask && !grow(t))
        return NULL;
    cell *c = look(t, key);
    if (!c->key) {
        c->key = key;
        t->used++;
    }
    c->count++;
    return c;
}

/* history ends with the byte in question, in its lowest byte; n bytes precede it. */
static bool learn(table *t, uint64_t history, int n)
{
    for (int k = 0; k <= n; k++) {
        const cell *whole = count(t, key_of(history, k + 1, SEEN));
        const bool first = whole && whole->count == 1;
        cell *context = whole ? count(t, key_of(history >> 8, k, FOLLOWED)) : NULL;
        if (!context)
            return false;
        context->distinct += first;
    }
    return true;
}

static double probability(const table *t, uint64_t history, int n)
{
    double p = 1.0 / 256;
    for (int k = 0; k <= n; k++) {
        const cell *context = look(t, key_of(history >> 8, k, FOLLOWED));
        if (!context->key)
            break;
        const cell *whole = look(t, key_of(history, k + 1, SEEN));
        const double d = context->distinct;
        p = (whole->count + d * p) / (context->count + d);
    }
    return p;
}

static double score(const table *t, const fg_data *d, int order, int64_t windows, int32_t *tokens,
                    int32_t *labels, int64_t T)
{
    double sum = 0;
    for (int64_t w = 0; w < windows; w++) {
        uint64_t history = 0;
        fg_data_eval_batch(d, windows, w, 1, tokens, labels);
        for (int64_t i = 0; i < T; i++) {
            history = history << 8 | (uint64_t)labels[i];
            sum -= log(probability(t, history, i < order ? (int)i : order));
        }
    }
    return sum / (double)(windows * T);
}

fg_status fg_ngram_loss(const fg_data *d, int order, int64_t windows, double *loss,
                        char message[FG_MESSAGE])
{
    const int64_t n = fg_data_tokens(d, false), T = fg_data_context(d);
    table t = { calloc(1 << 16, sizeof(cell)), (1 << 16) - 1, 0 };
    int32_t *tokens = malloc(2 * (size_t)T * sizeof *tokens);
    fg_status s = t.cells && tokens ? FG_OK : FG_ERR_MEMORY;
    uint64_t history = 0;

    if (order < 0 || order > MAX_ORDER)
        s = fg__say(message, FG_ERR_USAGE, "order must lie between 0 and %d, it is %d", MAX_ORDER,
                    order);
    else if (!fg_data_is_text(d) || fg_data_windows(d, true) < 1 || windows < 1)
        s = fg__say(message, FG_ERR_USAGE, "an n-gram model needs text and a held-out part");
    for (int64_t i = 0; i < n && s == FG_OK; i++) {
        history = history << 8 | (uint64_t)fg_data_token(d, false, i);
        if (!learn(&t, history, i < order ? (int)i : order))
            s = FG_ERR_MEMORY;
    }
    if (s == FG_OK)
        *loss = score(&t, d, order, windows, tokens, tokens + T, T);
    free(tokens);
    free(t.cells);
    return s == FG_ERR_MEMORY ? fg__say(message, s, "%s", fg_status_text(s)) : s;
}
