/* checkpoint.c - a training run in a folder, such that killing the process at any moment leaves the
 * last whole checkpoint loadable.
 *
 *   save:  fill DIR/.step-N.tmp, DONE last; sync every file and the folder; rename to DIR/step-N
 *   again: an older DIR/step-N becomes DIR/step-N.old first, and goes when the new one is there
 *   prune: DONE goes first, so a half deleted folder is not taken for a checkpoint
 *
 * Only files of the names below are ever deleted. */
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fox_train.h"
#include "checkpoint_state.h"
#include "text_file.h"

enum { MAX_SOURCE = 16 << 20, ROOM = FG__MAX_PATH + 64 };
static const char moments[] = "@adam.", sums[] = "@grad.";
static const char *const file_names[] = {
    "DONE", "state.json", "config.json", "model.safetensors", "optimizer.safetensors", "model.c"
};
enum { FILE_NAMES = sizeof file_names / sizeof file_names[0] };

typedef struct { int64_t step; bool old, temporary; } folder_name;

static bool parse_folder(const char *name, folder_name *out)
{
    char again[64];
    long long step;
    *out = (folder_name){ 0 };
    out->temporary = name[0] == '.';
    if (strlen(name) > 40 || sscanf(name + out->temporary, "step-%18lld", &step) != 1 || step < 0)
        return false;
    out->step = step;
    for (int old = 0; old < 2; old++) {
        snprintf(again, sizeof again, "%sstep-%09lld%s%s", out->temporary ? "." : "", step,
                 old ? ".old" : "", out->temporary ? ".tmp" : "");
        out->old = old;
        if (strcmp(again, name) == 0)
            return true;
    }
    return false;
}

static bool is_file(const char *folder, const char *name)
{
    char path[ROOM + 400];
    struct stat info;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return stat(path, &info) == 0 && S_ISREG(info.st_mode);
}

static bool is_ours(const char *name)
{
    size_t n = strlen(name);
    for (int i = 0; i < FILE_NAMES; i++)
        if (strcmp(name, file_names[i]) == 0 ||
            (name[0] == '.' && strncmp(name + 1, file_names[i], strlen(file_names[i])) == 0 &&
             n > 4 && strcmp(name + n - 4, ".tmp") == 0))
            return true;
    return false;
}

/* Deletes a checkpoint; what is not ours stays, and its folder with it. */
static fg_status remove_folder(const char *folder, char message[400])
{
    char path[ROOM + 300];
    struct dirent *item;
    snprintf(path, sizeof path, "%s/DONE", folder);
    if (unlink(path) == 0) {
        fg_status s = fg__folder_sync(folder, message);
        if (s)
            return s;
    } else if (errno == ENOENT && access(folder, F_OK) < 0)
        return FG_OK;
    DIR *d = opendir(folder);
    if (!d)
        return fg__refuse(message, FG_ERR_IO, folder, "cannot be listed: %s", strerror(errno));
    while ((item = readdir(d))) {
        snprintf(path, sizeof path, "%s/%s", folder, item->d_name);
        if (is_ours(item->d_name) && unlink(path) < 0) {
            int why = errno;
            closedir(d);
            return fg__refuse(message, FG_ERR_IO, path, "cannot be deleted: %s", strerror(why));
        }
    }
    closedir(d);
    if (rmdir(folder) < 0 && errno != ENOTEMPTY && errno != EEXIST)
        return fg__refuse(message, FG_ERR_IO, folder, "cannot be deleted: %s", strerror(errno));
    return FG_OK;
}

/* ---- saving ---------------------------------------------------------------------------------- */

static bool has_moments(const fg_store *s)
{
    fg_store_entry e;
    for (int i = 0; fg_store_at(s, i, &e); i++)
        if (strncmp(e.name, moments, sizeof moments - 1) == 0)
            return true;
    return false;
}

/* A failed save must not stop a run that could go on: the store forgets an error that is new. */
static fg_status save_part(fg_store *s, const char *folder, const char *name, const char *prefix,
                           char message[400])
{
    char path[ROOM + 64];
    bool was_ok = fg_store_status(s) == FG_OK;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    fg_status status = fg_store_save(s, path, prefix);
    if (status)
        snprintf(message, 400, "%s", fg_store_message(s));
    if (status && was_ok)
        fg_store_clear_error(s);
    return status;
}

static fg_status copy_source(const char *source, const char *folder, char message[400])
{
    char path[ROOM + 64], *text;
    size_t n;
    fg_status s = fg__text_read(source, MAX_SOURCE, &text, &n, message);
    snprintf(path, sizeof path, "%s/model.c", folder);
    if (!s)
        s = fg__text_create(path, text, n, message);
    free(text);
    return s;
}

static fg_status fill_folder(const char *folder, fg_store *s, const fg_graph *g,
                             const fg_train_state *t, const char *source, char message[400])
{
    char path[ROOM + 64];
    const char *key, *json;
    bool optimizer = has_moments(s);
    fg_status status = save_part(s, folder, "model.safetensors", "", message);
    if (!status && optimizer)
        status = save_part(s, folder, "optimizer.safetensors", moments, message);
    snprintf(path, sizeof path, "%s/config.json", folder);
    if (!status && g && fg_graph_fact_at(g, 0, &key, &json))
        status = fg_config_write(path, g, message);
    if (!status && source)
        status = copy_source(source, folder, message);
    snprintf(path, sizeof path, "%s/state.json", folder);
    if (!status)
        status = fg__state_write(path, t, optimizer, message);
    snprintf(path, sizeof path, "%s/DONE", folder);
    if (!status)
        status = fg__text_create(path, "", 0, message);
    return status ? status : fg__folder_sync(folder, message);
}

/* Gives the whole folder `from` its name. */
static fg_status put_in_place(const char *from, const char *to, char message[400])
{
    char old[ROOM + 8];
    bool again = is_file(to, "DONE");
    fg_status s = FG_OK;
    snprintf(old, sizeof old, "%s.old", to);
    if (!again)
        s = remove_folder(to, message);
    else
        s = remove_folder(old, message);
    if (!s && again && rename(to, old) < 0)
        s = fg__refuse(message, FG_ERR_IO, to, "cannot be renamed: %s", strerror(errno));
    if (!s && rename(from, to) < 0)
        s = fg__refuse(message, FG_ERR_IO, to, "cannot rename to it: %s", strerror(errno));
    return s;
}

fg_status fg_checkpoint_save(const char *dir, fg_store *s, const fg_graph *g,
                             const fg_train_state *t, const char *source, char message[400])
{
    char beside[ROOM], folder[ROOM], old[ROOM + 8];
    message[0] = '\0';
    if (strlen(dir) > FG__MAX_PATH)
        return fg__refuse(message, FG_ERR_IO, dir, "path is longer than %d bytes", FG__MAX_PATH);
    fg_status status = fg__state_check(t, dir, message);
    if (status)
        return status;
    if (mkdir(dir, 0777) < 0 && errno != EEXIST)
        return fg__refuse(message, FG_ERR_IO, dir, "cannot be made: %s", strerror(errno));
    snprintf(beside, sizeof beside, "%s/.step-%09" PRId64 ".tmp", dir, t->step);
    snprintf(folder, sizeof folder, "%s/step-%09" PRId64, dir, t->step);
    snprintf(old, sizeof old, "%s.old", folder);
    status = remove_folder(beside, message);
    if (status)
        return status;
    if (mkdir(beside, 0777) < 0)
        return fg__refuse(message, FG_ERR_IO, beside, "cannot be made: %s", strerror(errno));
    status = fill_folder(beside, s, g, t, source, message);
    if (!status)
        status = put_in_place(beside, folder, message);
    if (status) {
        char ignored[400];
        remove_folder(beside, ignored);
        return status;
    }
    status = fg__folder_sync(dir, message);
    return status ? status : remove_folder(old, message);
}

/* ---- loading --------------------------------------------------------------------------------- */

static fg_status load_part(fg_store *s, const char *folder, const char *name, const char *prefix,
                           char message[400])
{
    char path[ROOM + 64];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    fg_status status = fg_store_load(s, path, prefix);
    if (status)
        snprintf(message, 400, "%s", fg_store_message(s));
    return status;
}

static fg_status load_arrays(const char *path, fg_store *s, bool optimizer, char message[400])
{
    fg_status status = load_part(s, path, "model.safetensors", "", message);
    if (!status && optimizer)
        status = load_part(s, path, "optimizer.safetensors", moments, message);
    else if (!status)
        status = fg_store_zero(s, moments);
    if (!status)
        status = fg_store_zero(s, sums);
    if (status && !message[0])
        snprintf(message, 400, "%s", fg_store_message(s));
    return status;
}

fg_status fg_checkpoint_load(const char *path, fg_store *s, fg_train_state *t, char message[400])
{
    char state[ROOM];
    const char *name = strrchr(path, '/');
    folder_name parsed;
    bool optimizer = false;
    *t = (fg_train_state){ 0 };
    message[0] = '\0';
    if (strlen(path) > FG__MAX_PATH)
        return fg__refuse(message, FG_ERR_IO, path, "path is longer than %d bytes", FG__MAX_PATH);
    if (!is_file(path, "DONE"))
        return fg__refuse(message, FG_ERR_IO, path,
                          "has no file DONE, so it is not a whole checkpoint");
    snprintf(state, sizeof state, "%s/state.json", path);
    fg_status status = fg__state_read(state, t, &optimizer, message);
    if (!status && parse_folder(name ? name + 1 : path, &parsed) && parsed.step != t->step)
        status = fg__refuse(message, FG_ERR_FORMAT, state,
                            "step is %" PRId64 ", the folder's name says %" PRId64, t->step,
                            parsed.step);
    if (!status)
        status = load_arrays(path, s, optimizer, message);
    if (status)
        fg_train_state_free(t);
    return status;
}

/* ---- finding and deleting -------------------------------------------------------------------- */

typedef struct { folder_name is; bool whole; char name[64]; } found;

/* Newest first; of two with the same step the one that was renamed away comes second. */
static int newest_first(const void *a, const void *b)
{
    const found *x = a, *y = b;
    if (x->is.step != y->is.step)
        return x->is.step > y->is.step ? -1 : 1;
    return (int)x->is.old - (int)y->is.old;
}

static fg_status grow(found **list, int n, int *room)
{
    if (n < *room)
        return FG_OK;
    int wider = *room ? 2 * *room : 16;
    found *more = realloc(*list, (size_t)wider * sizeof **list);
    if (!more)
        return FG_ERR_MEMORY;
    *list = more;
    *room = wider;
    return FG_OK;
}

/* Everything in dir that bears a checkpoint's name, newest first; the caller frees the list. */
static fg_status list_folders(const char *dir, found **list, int *n, char message[400])
{
    char path[ROOM + 64];
    struct dirent *item;
    int room = 0;
    *list = NULL;
    *n = 0;
    DIR *d = opendir(dir);
    if (!d && errno == ENOENT)
        return FG_OK;
    if (!d)
        return fg__refuse(message, FG_ERR_IO, dir, "cannot be listed: %s", strerror(errno));
    while ((item = readdir(d))) {
        found f = { 0 };
        if (!parse_folder(item->d_name, &f.is))
            continue;
        if (grow(list, *n, &room)) {
            closedir(d);
            free(*list);
            *list = NULL;
            return fg__refuse(message, FG_ERR_MEMORY, dir, "no memory for %d names", *n);
        }
        snprintf(f.name, sizeof f.name, "%.40s", item->d_name);
        snprintf(path, sizeof path, "%s/%s", dir, f.name);
        f.whole = !f.is.temporary && is_file(path, "DONE");
        (*list)[(*n)++] = f;
    }
    closedir(d);
    if (*n > 1)
        qsort(*list, (size_t)*n, sizeof **list, newest_first);
    return FG_OK;
}

fg_status fg_checkpoint_find_newest(const char *dir, char path[1024], char message[400])
{
    found *list;
    int n;
    path[0] = message[0] = '\0';
    if (strlen(dir) > 900)
        return fg__refuse(message, FG_ERR_IO, dir, "path is longer than 900 bytes");
    fg_status s = list_folders(dir, &list, &n, message);
    for (int i = 0; !s && i < n && !path[0]; i++)
        if (list[i].whole)
            snprintf(path, 1024, "%s/%s", dir, list[i].name);
    free(list);
    return s;
}

fg_status fg_checkpoint_prune(const char *dir, int keep, char message[400])
{
    char path[ROOM + 64];
    found *list;
    int n, kept = 0;
    int64_t last = -1;
    message[0] = '\0';
    if (strlen(dir) > FG__MAX_PATH)
        return fg__refuse(message, FG_ERR_IO, dir, "path is longer than %d bytes", FG__MAX_PATH);
    fg_status s = list_folders(dir, &list, &n, message);
    for (int i = 0; !s && i < n; i++) {
        bool stays = list[i].whole && list[i].is.step != last && (keep <= 0 || kept < keep);
        if (list[i].whole)
            last = list[i].is.step;
        kept += stays;
        snprintf(path, sizeof path, "%s/%s", dir, list[i].name);
        if (!stays)
            s = remove_folder(path, message);
    }
    free(list);
    return s;
}
