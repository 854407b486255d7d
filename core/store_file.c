/* store_file.c - a store's entries in safetensors files. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "safetensors.h"
#include "store.h"

enum { SHOWN = 5 };                      /* names in a message */

/* "" stands for all parameters, other prefixes for the entries whose names they begin. */
static bool belongs(const char *name, const char *prefix)
{
    return *prefix ? strncmp(name, prefix, strlen(prefix)) == 0 : name[0] != '@';
}

/* ---- saving ---------------------------------------------------------------------------------- */

static fg_status fetch(void *store, const fg__file_item *item, void *data, size_t bytes)
{
    return fg_store_get(store, item->data, data, bytes);    /* item->data: the full name */
}

fg_status fg_store_save(fg_store *s, const char *path, const char *prefix)
{
    char message[400];
    fg_store_entry e;
    int n = 0;
    if (!s || s->status)
        return fg_store_status(s);
    fg__file_item *items = calloc((size_t)fg_store_count(s) + 1, sizeof *items);
    if (!items)
        return fg__store_fail(s, FG_ERR_MEMORY, "%s: no memory for %d names", fg__path_end(path),
                              fg_store_count(s));
    for (int i = 0; fg_store_at(s, i, &e); i++)
        if (belongs(e.name, prefix))
            items[n++] = (fg__file_item){ e.name + strlen(prefix), e.type, e.shape, e.name };
    fg_status status = fg__safetensors_write(path, n, items, fetch, s, message);
    free(items);
    return status ? fg__store_fail(s, status, "%s", message) : FG_OK;
}

/* ---- loading --------------------------------------------------------------------------------- */

/* Names that one side has and the other has not. */
typedef struct { int64_t n; char shown[400]; } names;

static void note(names *list, const char *name)
{
    size_t at = strlen(list->shown);
    if (list->n++ < SHOWN)
        snprintf(list->shown + at, sizeof list->shown - at, "%s%.70s", at ? ", " : "", name);
}

static void shape_text(fg_shape shape, char *text, size_t room)
{
    size_t n = (size_t)snprintf(text, room, "[");
    for (int i = 0; i < shape.rank && n < room; i++)
        n += (size_t)snprintf(text + n, room - n, i ? ",%" PRId64 : "%" PRId64, shape.dim[i]);
    if (n < room)
        snprintf(text + n, room - n, "]");
}

static bool is_real(const char *type)
{
    return strcmp(type, "F32") == 0 || strcmp(type, "F16") == 0 || strcmp(type, "BF16") == 0;
}

static bool is_whole(const char *type)
{
    static const char *const types[] = { "I64", "I32", "U16", "U8", "BOOL" };
    for (int i = 0; i < 5; i++)
        if (strcmp(type, types[i]) == 0)
            return true;
    return false;
}

/* Whether a tensor of the file can become the entry `have`, or any entry if that is NULL. */
static fg_status check_tensor(fg_store *s, const char *path, const fg_file_entry *tensor,
                              const fg_store_entry *have)
{
    char in_file[160], in_store[160];
    bool fits = have ? (have->type == FG_I32 ? is_whole : is_real)(tensor->type)
                     : is_whole(tensor->type) || is_real(tensor->type);
    if (!fits)
        return fg__store_fail(s, FG_ERR_FORMAT, "%s: tensor %s: dtype %s cannot become %s",
                              fg__path_end(path), tensor->name, tensor->type,
                              have ? fg_dtype_name(have->type) : "an entry of a store");
    if (!have || fg_shape_equal(tensor->shape, have->shape))
        return FG_OK;
    shape_text(tensor->shape, in_file, sizeof in_file);
    shape_text(have->shape, in_store, sizeof in_store);
    return fg__store_fail(s, FG_ERR_FORMAT, "%s: tensor %s: shape is %s, must be %s",
                          fg__path_end(path), tensor->name, in_file, in_store);
}

static bool find_entry(const fg_store *s, const char *prefix, const char *name, fg_store_entry *out)
{
    char full[FG__FILE_MAX_NAME + 100];
    int n = snprintf(full, sizeof full, "%s%s", prefix, name);
    return n > 0 && (size_t)n < sizeof full && fg_store_find(s, full, out);
}

static fg_status report(fg_store *s, const char *path, const names *missing, const names *extra)
{
    char text[900] = "";
    size_t n = 0;
    if (missing->n)
        n = (size_t)snprintf(text, sizeof text, "%" PRId64 " missing: %s%s", missing->n,
                             missing->shown, missing->n > SHOWN ? ", ..." : "");
    if (extra->n)
        snprintf(text + n, sizeof text - n, "%s%" PRId64 " unexpected: %s%s", n ? "; " : "",
                 extra->n,
                 extra->shown, extra->n > SHOWN ? ", ..." : "");
    return fg__store_fail(s, FG_ERR_FORMAT, "%s: does not hold what the store has: %s",
                          fg__path_end(path), text);
}

/* Every entry of that prefix must be in the file and the reverse; a store that has none of them yet
 * takes all. */
static fg_status compare(fg_store *s, const char *path, const char *prefix, const fg_file *f)
{
    names missing = { 0 }, extra = { 0 };
    fg_store_entry e;
    fg_file_entry tensor;
    fg_status status = FG_OK;
    bool fresh = true;
    for (int i = 0; !status && fg_store_at(s, i, &e); i++) {
        if (!belongs(e.name, prefix))
            continue;
        fresh = false;
        if (fg_file_find(f, e.name + strlen(prefix), &tensor))
            status = check_tensor(s, path, &tensor, &e);
        else
            note(&missing, e.name);
    }
    for (int i = 0; !status && fg_file_at(f, i, &tensor); i++) {
        if (!*prefix && tensor.name[0] == '@')
            status = fg__store_fail(s, FG_ERR_FORMAT, "%s: tensor %s: names of parameters do not "
                                    "begin with @", fg__path_end(path), tensor.name);
        else if (fresh)
            status = check_tensor(s, path, &tensor, NULL);
        else if (!find_entry(s, prefix, tensor.name, &e))
            note(&extra, tensor.name);
    }
    return status || (!missing.n && !extra.n) ? status : report(s, path, &missing, &extra);
}

/* Reads one tensor and, if put, stores it. */
static fg_status take(fg_store *s, const char *prefix, fg_file *f, const fg_file_entry *tensor,
                      void *data, bool put)
{
    char full[FG__FILE_MAX_NAME + 100];
    fg_store_entry e;
    bool there = find_entry(s, prefix, tensor->name, &e);
    fg_dtype type = there ? e.type : is_whole(tensor->type) ? FG_I32 : FG_F32;
    size_t bytes = (size_t)fg_shape_count(tensor->shape) * 4;
    fg_status status = fg_file_read(f, tensor->name, type == FG_I32 ? FG_I32 : FG_F32, data, bytes);
    if (status)
        return fg__store_fail(s, status, "%s", fg_file_message(f));
    snprintf(full, sizeof full, "%s%s", prefix, tensor->name);
    return put ? fg_store_put(s, full, type, tensor->shape, data) : FG_OK;
}

/* Integers of 64 bits may not fit: they are read once before anything is stored. */
static fg_status fill(fg_store *s, const char *path, const char *prefix, fg_file *f)
{
    fg_file_entry tensor;
    fg_status status = FG_OK;
    int64_t largest = 0;
    for (int i = 0; fg_file_at(f, i, &tensor); i++)
        if (fg_shape_count(tensor.shape) > largest)
            largest = fg_shape_count(tensor.shape);
    void *data = malloc((size_t)largest * 4 + 1);
    if (!data)
        return fg__store_fail(s, FG_ERR_MEMORY,
                              "%s: no memory for a tensor of %" PRId64 " elements",
                              fg__path_end(path), largest);
    for (int i = 0; !status && fg_file_at(f, i, &tensor); i++)
        if (strcmp(tensor.type, "I64") == 0)
            status = take(s, prefix, f, &tensor, data, false);
    for (int i = 0; !status && fg_file_at(f, i, &tensor); i++)
        status = take(s, prefix, f, &tensor, data, true);
    free(data);
    return status;
}

fg_status fg_store_load(fg_store *s, const char *path, const char *prefix)
{
    if (!s || s->status)
        return fg_store_status(s);
    if (strlen(prefix) >= 100)
        return fg__store_fail(s, FG_ERR_USAGE, "prefix of more than 99 bytes");
    s->version++;
    fg_file *f = fg_file_open(path);
    fg_status status = fg_file_status(f);
    if (status)
        fg__store_fail(s, status, "%s", fg_file_message(f));
    if (!status)
        status = compare(s, path, prefix, f);
    if (!status)
        status = fill(s, path, prefix, f);
    fg_file_close(f);
    return status;
}
