/* checkpoint_state.c - state.json: the counters of a training run, exact to the bit.
 *
 * 64-bit patterns are texts "0x...", because JSON readers keep 53 bits; a loss that is not finite
 * is null.  Every key must be there and no other: a file of another version or a damaged one is
 * refused rather than half understood. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint_state.h"
#include "text_file.h"

enum { VERSION = 1, MAX_POSITIONS = 1 << 18 };

fg_status fg__state_check(const fg_train_state *t, const char *path, char message[400])
{
    const struct { const char *key; int64_t value; } counters[] = {
        { "step", t->step }, { "batch", t->batch }, { "context", t->context },
        { "tokens", t->tokens }, { "epoch", t->epoch }, { "position", t->position },
        { "window", t->window }, { "positions", t->positions }
    };
    int64_t tokens;
    for (size_t i = 0; i < sizeof counters / sizeof counters[0]; i++)
        if (counters[i].value < 0)
            return fg__refuse(message, FG_ERR_FORMAT, path,
                              "%s is %" PRId64 ", must not be negative",
                              counters[i].key, counters[i].value);
    if (t->tokens && (__builtin_mul_overflow(t->step, t->batch, &tokens) ||
                      __builtin_mul_overflow(tokens, t->context, &tokens) || tokens != t->tokens))
        return fg__refuse(message, FG_ERR_FORMAT, path, "tokens is %" PRId64 ", but step %" PRId64
                          " * batch %" PRId64 " * context %" PRId64 " is not", t->tokens, t->step,
                          t->batch, t->context);
    if (t->positions > MAX_POSITIONS)
        return fg__refuse(message, FG_ERR_FORMAT, path, "window_loss has %" PRId64
                          " values, more than %d", t->positions, MAX_POSITIONS);
    if (!(t->seconds >= 0) || isinf(t->seconds))
        return fg__refuse(message, FG_ERR_FORMAT, path,
                          "seconds is %g, must be finite and not negative",
                          t->seconds);
    return FG_OK;
}

/* ---- writing --------------------------------------------------------------------------------- */

static json_t *pattern(uint64_t bits)
{
    char text[32];
    snprintf(text, sizeof text, "0x%016" PRIx64, bits);
    return json_string(text);
}

static json_t *losses(const fg_train_state *t)
{
    json_t *list = json_array();
    for (int64_t i = 0; list && i < t->positions; i++) {
        double v = t->window_loss[i];
        if (json_array_append_new(list, isfinite(v) ? json_real(v) : json_null())) {
            json_decref(list);
            list = NULL;
        }
    }
    return list;
}

static char *print(const fg_train_state *t, bool optimizer)
{
    json_t *j = json_object();
    char *text = NULL;
    int failed = !j;
    failed |= json_object_set_new(j, "version", json_integer(VERSION));
    failed |= json_object_set_new(j, "step", json_integer(t->step));
    failed |= json_object_set_new(j, "batch", json_integer(t->batch));
    failed |= json_object_set_new(j, "context", json_integer(t->context));
    failed |= json_object_set_new(j, "tokens", json_integer(t->tokens));
    failed |= json_object_set_new(j, "seed", json_integer(t->seed));
    failed |= json_object_set_new(j, "rng", pattern(t->rng));
    failed |= json_object_set_new(j, "epoch", json_integer(t->epoch));
    failed |= json_object_set_new(j, "position", json_integer(t->position));
    failed |= json_object_set_new(j, "recipe", pattern(t->recipe));
    failed |= json_object_set_new(j, "seconds", json_real(t->seconds));
    failed |= json_object_set_new(j, "optimizer", json_boolean(optimizer));
    failed |= json_object_set_new(j, "window", json_integer(t->window));
    failed |= json_object_set_new(j, "window_loss", losses(t));
    if (!failed)
        text = json_dumps(j, JSON_INDENT(1) | JSON_REAL_PRECISION(17));
    json_decref(j);
    return text;
}

fg_status fg__state_write(const char *path, const fg_train_state *t, bool optimizer,
                          char message[400])
{
    char *text = print(t, optimizer);
    if (!text)
        return fg__refuse(message, FG_ERR_MEMORY, path, "no memory for its text");
    fg_status s = fg__text_create(path, text, strlen(text), message);
    free(text);
    return s;
}

/* ---- reading --------------------------------------------------------------------------------- */

typedef struct { const char *path; const json_t *root; int taken; fg_status status; char *message;
                } reader;

static const json_t *take(reader *r, const char *key)
{
    const json_t *j = json_object_get(r->root, key);
    if (!r->status && !j)
        r->status = fg__refuse(r->message, FG_ERR_FORMAT, r->path, "%s is missing", key);
    r->taken++;
    return r->status ? NULL : j;
}

static void wrong(reader *r, const char *key, const char *must)
{
    if (!r->status)
        r->status = fg__refuse(r->message, FG_ERR_FORMAT, r->path, "%s is not %s", key, must);
}

static int64_t take_integer(reader *r, const char *key)
{
    const json_t *j = take(r, key);
    if (!json_is_integer(j))
        wrong(r, key, "an integer");
    return json_integer_value(j);
}

static uint64_t take_pattern(reader *r, const char *key)
{
    const char *text = json_string_value(take(r, key));
    uint64_t bits = 0;
    if (!text || strlen(text) != 18 || strncmp(text, "0x", 2) ||
        strspn(text + 2, "0123456789abcdef") != 16) {
        wrong(r, key, "a text of 0x and 16 hexadecimal digits");
        return 0;
    }
    sscanf(text, "%" SCNx64, &bits);
    return bits;
}

static void take_losses(reader *r, fg_train_state *t)
{
    const json_t *list = take(r, "window_loss");
    size_t n = json_array_size(list);
    if (!json_is_array(list))
        wrong(r, "window_loss", "a list");
    if (n > MAX_POSITIONS)
        wrong(r, "window_loss", "at most 262144 values");
    if (r->status || n == 0)
        return;
    t->window_loss = malloc(n * sizeof *t->window_loss);
    if (!t->window_loss) {
        r->status = fg__refuse(r->message, FG_ERR_MEMORY, r->path, "no memory for %zu losses", n);
        return;
    }
    t->positions = (int64_t)n;
    for (size_t i = 0; i < n; i++) {
        const json_t *j = json_array_get(list, i);
        if (!json_is_number(j) && !json_is_null(j))
            wrong(r, "window_loss", "a list of numbers and nulls");
        t->window_loss[i] = json_is_null(j) ? (double)NAN : json_number_value(j);
    }
}

static void take_all(reader *r, fg_train_state *t, bool *optimizer)
{
    int64_t version = take_integer(r, "version");
    if (!r->status && version != VERSION)
        r->status = fg__refuse(r->message, FG_ERR_FORMAT, r->path, "version is %" PRId64
                               ", this program reads %d", version, VERSION);
    t->step = take_integer(r, "step");
    t->batch = take_integer(r, "batch");
    t->context = take_integer(r, "context");
    t->tokens = take_integer(r, "tokens");
    t->seed = take_integer(r, "seed");
    t->rng = take_pattern(r, "rng");
    t->epoch = take_integer(r, "epoch");
    t->position = take_integer(r, "position");
    t->recipe = take_pattern(r, "recipe");
    const json_t *seconds = take(r, "seconds");
    if (!json_is_number(seconds))
        wrong(r, "seconds", "a number");
    t->seconds = json_number_value(seconds);
    const json_t *moments = take(r, "optimizer");
    if (!json_is_boolean(moments))
        wrong(r, "optimizer", "true or false");
    *optimizer = json_is_true(moments);
    t->window = take_integer(r, "window");
    take_losses(r, t);
    if (!r->status && json_object_size(r->root) != (size_t)r->taken)
        r->status = fg__refuse(r->message, FG_ERR_FORMAT, r->path, "has %zu keys, must have %d",
                               json_object_size(r->root), r->taken);
}

fg_status fg__state_read(const char *path, fg_train_state *t, bool *optimizer, char message[400])
{
    json_t *root;
    *t = (fg_train_state){ 0 };
    fg_status s = fg__json_read(path, &root, message);
    if (s)
        return s;
    reader r = { path, root, 0, FG_OK, message };
    take_all(&r, t, optimizer);
    json_decref(root);
    if (!r.status)
        r.status = fg__state_check(t, path, message);
    if (r.status)
        fg_train_state_free(t);
    return r.status;
}

void fg_train_state_free(fg_train_state *t)
{
    if (t)
        free(t->window_loss);
    if (t)
        *t = (fg_train_state){ 0 };
}
