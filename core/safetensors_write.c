/* safetensors_write.c - a writer of safetensors files that never leaves half a file: the values go
 * to a new file beside the old one, which is synced and renamed over it. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fox_json.h"
#include "safetensors.h"

typedef struct { char *text; size_t n, room; bool failed; } growing;

static FG_PRINTF(2, 3) void add(growing *g, const char *fmt, ...)
{
    va_list args, again;
    va_start(args, fmt);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, fmt, args);
    va_end(args);
    if (!g->failed && g->n + (size_t)n + 1 > g->room) {
        size_t room = 2 * (g->n + (size_t)n) + 256;
        char *text = realloc(g->text, room);
        g->failed = !text;
        if (text)
            g->text = text, g->room = room;
    }
    if (!g->failed)
        g->n += (size_t)vsnprintf(g->text + g->n, (size_t)n + 1, fmt, again);
    va_end(again);
}

static void add_name(growing *g, const char *name)
{
    for (; *name; name++)
        add(g, *name == '"' || *name == '\\' ? "\\%c" : "%c", *name);
}

static int64_t item_bytes(const fg__file_item *item)
{
    return 4 * fg_shape_count(item->shape);
}

static FG_PRINTF(4, 5) fg_status fault(char message[400], fg_status s, const char *path,
                                       const char *fmt, ...)
{
    va_list args;
    int n = snprintf(message, 400, "%s: ", fg__path_end(path));
    va_start(args, fmt);
    vsnprintf(message + n, 400 - (size_t)n, fmt, args);
    va_end(args);
    fg__one_line(message);
    return s;
}

static int by_item_name(const void *a, const void *b)
{
    const fg__file_item *x = a, *y = b;
    return strcmp(x->name, y->name);
}

static bool shape_fits(fg_shape s)
{
    int64_t bytes = 4;
    bool over = s.rank < 0 || s.rank > FG_MAX_RANK;
    for (int i = 0; !over && i < s.rank; i++)
        over = s.dim[i] < 0 || __builtin_mul_overflow(bytes, s.dim[i], &bytes);
    return !over;
}

/* What the reader would refuse is not written. */
static fg_status check_items(const char *path, int n, fg__file_item *items, char message[400])
{
    if (n > FG__FILE_MAX_TENSORS)
        return fault(message, FG_ERR_USAGE, path, "%d tensors are more than %d", n,
                     FG__FILE_MAX_TENSORS);
    for (int i = 0; i < n; i++) {
        const char *why = fg__file_name_fault(items[i].name);
        if (!why && !fg_text_is_utf8(items[i].name))
            why = "has a name that is not UTF-8";
        if (!why && strcmp(items[i].name, "__metadata__") == 0)
            why = "is a name that the format keeps for itself";
        if (!why && !shape_fits(items[i].shape))
            why = "has a shape that no file can hold";
        if (why)
            return fault(message, FG_ERR_USAGE, path, "tensor %.60s: %s", items[i].name, why);
    }
    if (n > 1)
        qsort(items, (size_t)n, sizeof *items, by_item_name);
    for (int i = 1; i < n; i++)
        if (strcmp(items[i - 1].name, items[i].name) == 0)
            return fault(message, FG_ERR_USAGE, path, "tensor %.60s: is there twice",
                         items[i].name);
    return FG_OK;
}

static void add_header(growing *g, int n, const fg__file_item *items)
{
    int64_t at = 0;
    add(g, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int i = 0; i < n; i++) {
        const fg__file_item *item = &items[i];
        add(g, ",\"");
        add_name(g, item->name);
        add(g, "\":{\"dtype\":\"%s\",\"shape\":[", item->type == FG_I32 ? "I32" : "F32");
        for (int k = 0; k < item->shape.rank; k++)
            add(g, k ? ",%" PRId64 : "%" PRId64, item->shape.dim[k]);
        add(g, "],\"data_offsets\":[%" PRId64 ",%" PRId64 "]}", at, at + item_bytes(item));
        at += item_bytes(item);
    }
    add(g, "}");
    while (!g->failed && g->n % 8)
        add(g, " ");
}

static bool write_all(int fd, const void *data, size_t bytes)
{
    const char *p = data;
    while (bytes > 0) {
        ssize_t put = write(fd, p, bytes < (size_t)1 << 30 ? bytes : (size_t)1 << 30);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0) {
            errno = put ? errno : ENOSPC;
            return false;
        }
        p += put, bytes -= (size_t)put;
    }
    return true;
}

static fg_status write_values(int fd, const char *path, int n, const fg__file_item *items,
                              fg__file_fetch fetch, void *from, char message[400])
{
    int64_t largest = 0;
    fg_status s = FG_OK;
    for (int i = 0; i < n; i++)
        largest = item_bytes(&items[i]) > largest ? item_bytes(&items[i]) : largest;
    void *data = malloc((size_t)largest + 1);
    if (!data)
        return fault(message, FG_ERR_MEMORY, path, "no memory for a tensor of %" PRId64 " bytes",
                     largest);
    for (int i = 0; !s && i < n; i++) {
        size_t bytes = (size_t)item_bytes(&items[i]);
        s = fetch(from, &items[i], data, bytes);
        if (s)
            fault(message, s, path, "tensor %.200s: its values could not be fetched",
                  items[i].name);
        else if (!write_all(fd, data, bytes))
            s = fault(message, FG_ERR_IO, path, "cannot write: %s", strerror(errno));
    }
    free(data);
    return s;
}

/* A new file beside path, not seen by anyone who looks for path. */
static int create_beside(const char *path, char *beside, size_t room)
{
    const char *slash = strrchr(path, '/');
    int folder = slash ? (int)(slash - path) + 1 : 0;
    for (int i = 0; i < 1000; i++) {
        int n = snprintf(beside, room, "%.*s.%s.%ld-%d.tmp", folder, path, path + folder,
                         (long)getpid(), i);
        if (n < 0 || (size_t)n >= room) {
            errno = ENAMETOOLONG;
            return -1;
        }
        int fd = open(beside, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (fd >= 0 || errno != EEXIST)
            return fd;
    }
    return -1;
}

static bool sync_folder_of(const char *path)
{
    char folder[FG__FILE_MAX_PATH + 2];
    const char *slash = strrchr(path, '/');
    int n = slash ? (int)(slash - path) + 1 : 0;
    snprintf(folder, sizeof folder, "%.*s", n ? n : 1, n ? path : ".");
    int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool ok = fd >= 0 && (fsync(fd) == 0 || errno == EINVAL);     /* EINVAL:
        a file system without it */
    if (fd >= 0)
        close(fd);
    return ok;
}

static fg_status write_beside(int fd, const char *path, int n, const fg__file_item *items,
                              const growing *head,
                              fg__file_fetch fetch, void *from, char message[400])
{
    uint64_t length = head->n;
    if (!write_all(fd, &length, 8) || !write_all(fd, head->text, head->n))
        return fault(message, FG_ERR_IO, path, "cannot write: %s", strerror(errno));
    fg_status s = write_values(fd, path, n, items, fetch, from, message);
    if (!s && fsync(fd) < 0)
        s = fault(message, FG_ERR_IO, path, "cannot sync: %s", strerror(errno));
    return s;
}

static fg_status replace(const char *path, int n, const fg__file_item *items, const growing *head,
                         fg__file_fetch fetch, void *from, char message[400])
{
    char beside[FG__FILE_MAX_PATH + 64];
    struct stat info;
    if (stat(path, &info) == 0 && !S_ISREG(info.st_mode))
        return fault(message, FG_ERR_IO, path, "is not a regular file");
    int fd = create_beside(path, beside, sizeof beside);
    if (fd < 0)
        return fault(message, FG_ERR_IO, path, "cannot create a file beside it: %s",
                     strerror(errno));
    fg_status s = write_beside(fd, path, n, items, head, fetch, from, message);
    if (close(fd) < 0 && !s)
        s = fault(message, FG_ERR_IO, path, "cannot close: %s", strerror(errno));
    if (!s && rename(beside, path) < 0)
        s = fault(message, FG_ERR_IO, path, "cannot rename to it: %s", strerror(errno));
    if (s)
        unlink(beside);
    else if (!sync_folder_of(path))
        s = fault(message, FG_ERR_IO, path, "cannot sync its folder: %s", strerror(errno));
    return s;
}

fg_status fg__safetensors_write(const char *path, int n, fg__file_item *items, fg__file_fetch fetch,
                                void *from, char message[400])
{
    growing head = { 0 };
    message[0] = '\0';
    if (!path || !*path || strlen(path) > FG__FILE_MAX_PATH)
        return fault(message, FG_ERR_IO, path ? path : "", "path of no or more than %d bytes",
                     FG__FILE_MAX_PATH);
    fg_status s = check_items(path, n, items, message);
    if (s)
        return s;
    add_header(&head, n, items);
    if (head.failed)
        s = fault(message, FG_ERR_MEMORY, path, "no memory for the header of %d tensors", n);
    else if (head.n > FG__FILE_MAX_HEADER)
        s = fault(message, FG_ERR_USAGE, path, "header of %zu bytes is longer than %d", head.n,
                  FG__FILE_MAX_HEADER);
    else
        s = replace(path, n, items, &head, fetch, from, message);
    free(head.text);
    return s;
}

static fg_status copy_given(void *from, const fg__file_item *item, void *data, size_t bytes)
{
    (void)from;
    if (bytes)
        memcpy(data, item->data, bytes);
    return FG_OK;
}

fg_status fg_file_write(const char *path, int n, const fg_array *arrays, char message[400])
{
    for (int i = 0; i < n; i++)
        if (arrays[i].type != FG_F32 && arrays[i].type != FG_I32)
            return fault(message, FG_ERR_DTYPE, path,
                         "tensor %.60s: only f32 and i32 are written, not %s",
                         arrays[i].name, fg_dtype_name(arrays[i].type));
    fg__file_item *items = calloc((size_t)n + 1, sizeof *items);
    if (!items)
        return fault(message, FG_ERR_MEMORY, path, "no memory for %d tensors", n);
    for (int i = 0; i < n; i++)
        items[i] = (fg__file_item){ arrays[i].name, arrays[i].type, arrays[i].shape,
                                   arrays[i].data };
    fg_status s = fg__safetensors_write(path, n, items, copy_given, NULL, message);
    free(items);
    return s;
}
