/* checkpoint_state.c - state.json: the counters of a training run, exact to the bit.
 *
 * 64-bit patterns are texts "0x...", because JSON readers keep 53 bits; a loss that is not finite
 * is null.  Every key must be there and no other: a file of another version or a damaged one is
 * refused rather than half understood. */
#include <inttypes.h>
#include <locale.h>
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

/* A number that reads back to the same bits, with a point whatever the locale. */
static void add_real(fg__text *t, double v)
{
    char text[64];
    const char *point = localeconv()->decimal_point;
    snprintf(text, sizeof text, "%.17g", v);
    char *at = strstr(text, point);
    if (at && strcmp(point, "."))
        fg__text_add(t, "%.*s.%s", (int)(at - text), text, at + strlen(point));
    else
        fg__text_add(t, "%s", text);
}

static void print(fg__text *out, const fg_train_state *t, bool optimizer)
{
    fg__text_add(out, "{\n \"version\": %d,\n \"step\": %" PRId64 ",\n \"batch\": %" PRId64
                 ",\n \"context\": %" PRId64 ",\n \"tokens\": %" PRId64 ",\n \"seed\": %" PRId64
                 ",\n \"rng\": \"0x%016" PRIx64 "\",\n \"epoch\": %" PRId64 ",\n \"position\": %"
                 PRId64 ",\n \"recipe\": \"0x%016" PRIx64
                 "\",\n \"optimizer\": %s,\n \"seconds\": ",
                 VERSION, t->step, t->batch, t->context, t->tokens, t->seed, t->rng, t->epoch,
                 t->position, t->recipe, optimizer ? "true" : "false");
    add_real(out, t->seconds);
    fg__text_add(out, ",\n \"window\": %" PRId64 ",\n \"window_loss\": [", t->window);
    for (int64_t i = 0; i < t->positions; i++) {
        fg__text_add(out, i ? ",\n  " : "\n  ");
        if (isfinite(t->window_loss[i]))
            add_real(out, t->window_loss[i]);
        else
            fg__text_add(out, "null");
    }
    fg__text_add(out, "]\n}\n");
}

fg_status fg__state_write(const char *path, const fg_train_state *t, bool optimizer,
                          char message[400])
{
    fg__text text = { 0 };
    print(&text, t, optimizer);
    fg_status s = text.failed ? fg__refuse(message, FG_ERR_MEMORY, path, "no memory for its text")
                              : fg__text_create(path, text.text, text.n, message);
    free(text.text);
    return s;
}

/* ---- reading --------------------------------------------------------------------------------- */

typedef struct {
    const char *path;
    const fg_json_value *root;
    int64_t taken;
    fg_status status;
    char *message;
} reader;

static void wrong(reader *r, const char *key, const char *must)
{
    if (!r->status)
        r->status = fg__refuse(r->message, FG_ERR_FORMAT, r->path, "%s is not %s", key, must);
}

/* NULL after any fault. */
static const fg_json_value *take(reader *r, const char *key)
{
    const fg_json_value *v = fg_json_get(r->root, key);
    if (!r->status && !v)
        r->status = fg__refuse(r->message, FG_ERR_FORMAT, r->path, "%s is missing", key);
    r->taken++;
    return r->status ? NULL : v;
}

static int64_t take_integer(reader *r, const char *key)
{
    const fg_json_value *v = take(r, key);
    if (v && v->kind == FG_JSON_WHOLE)
        return v->u.whole;
    wrong(r, key, "an integer");
    return 0;
}

static uint64_t take_pattern(reader *r, const char *key)
{
    const fg_json_value *v = take(r, key);
    const char *text = v && v->kind == FG_JSON_TEXT ? v->u.text : "";
    uint64_t bits = 0;
    if (strlen(text) != 18 || strncmp(text, "0x", 2) ||
        strspn(text + 2, "0123456789abcdef") != 16)
        wrong(r, key, "a text of 0x and 16 hexadecimal digits");
    else
        sscanf(text, "%" SCNx64, &bits);
    return bits;
}

static double take_real(reader *r, const char *key)
{
    double x = 0;
    if (!fg_json_number(take(r, key), &x))
        wrong(r, key, "a number");
    return x;
}

static bool take_truth(reader *r, const char *key)
{
    const fg_json_value *v = take(r, key);
    if (!v || (v->kind != FG_JSON_TRUE && v->kind != FG_JSON_FALSE))
        wrong(r, key, "true or false");
    return v && v->kind == FG_JSON_TRUE;
}

static void take_losses(reader *r, fg_train_state *t)
{
    const fg_json_value *list = take(r, "window_loss");
    if (!list || list->kind != FG_JSON_LIST || list->n > MAX_POSITIONS) {
        wrong(r, "window_loss", "a list of at most 262144 values");
        return;
    }
    if (list->n == 0)
        return;
    t->window_loss = malloc((size_t)list->n * sizeof *t->window_loss);
    if (!t->window_loss) {
        r->status = fg__refuse(r->message, FG_ERR_MEMORY, r->path, "no memory for %" PRId64
                               " losses", list->n);
        return;
    }
    for (const fg_json_value *v = list->first; v; v = v->next) {
        double x = (double)NAN;
        if (!fg_json_number(v, &x) && v->kind != FG_JSON_NULL)
            wrong(r, "window_loss", "a list of numbers and nulls");
        t->window_loss[t->positions++] = x;
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
    t->seconds = take_real(r, "seconds");
    *optimizer = take_truth(r, "optimizer");
    t->window = take_integer(r, "window");
    take_losses(r, t);
    if (!r->status && r->root->n != r->taken)
        r->status = fg__refuse(r->message, FG_ERR_FORMAT, r->path, "has %" PRId64
                               " keys, must have %" PRId64, r->root->n, r->taken);
}

fg_status fg__state_read(const char *path, fg_train_state *t, bool *optimizer, char message[400])
{
    fg_json *json;
    *t = (fg_train_state){ 0 };
    fg_status s = fg__json_read(path, &json, message);
    if (s)
        return s;
    reader r = { path, fg_json_root(json), 0, FG_OK, message };
    take_all(&r, t, optimizer);
    fg_json_free(json);
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
