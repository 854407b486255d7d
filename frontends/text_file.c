/* text_file.c - small JSON and text files: read with limits, written so that a crash leaves the old
 * file or the new one. */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "text_file.h"

enum { MAX_DEPTH = 32, MAX_VALUES = 1000000 };

fg_status fg__refuse(char message[400], fg_status s, const char *path, const char *fmt, ...)
{
    size_t length = strlen(path);
    va_list args;
    int n = snprintf(message, 400, "%s: ", length > 160 ? path + length - 160 : path);
    va_start(args, fmt);
    vsnprintf(message + n, 400 - (size_t)n, fmt, args);
    va_end(args);
    for (char *p = message; *p; p++)
        if ((unsigned char)*p < 32 || *p == 127)
            *p = '?';
    return s;
}

/* ---- reading --------------------------------------------------------------------------------- */

static fg_status read_open(int fd, const char *path, size_t limit, char **text, size_t *n,
                           char message[400])
{
    struct stat info;
    size_t at = 0;
    if (fstat(fd, &info) < 0 || !S_ISREG(info.st_mode))
        return fg__refuse(message, FG_ERR_IO, path, "is not a regular file");
    if ((uint64_t)info.st_size > limit)
        return fg__refuse(message, FG_ERR_FORMAT, path, "has %lld bytes, more than %zu",
                          (long long)info.st_size, limit);
    *text = malloc((size_t)info.st_size + 1);
    if (!*text)
        return fg__refuse(message, FG_ERR_MEMORY, path, "no memory for its %lld bytes",
                          (long long)info.st_size);
    while (at < (size_t)info.st_size) {
        ssize_t got = pread(fd, *text + at, (size_t)info.st_size - at, (off_t)at);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return fg__refuse(message, FG_ERR_IO, path, "cannot read at byte %zu: %s", at,
                              got ? strerror(errno) : "the file ends");
        at += (size_t)got;
    }
    (*text)[at] = '\0';
    *n = at;
    return FG_OK;
}

fg_status fg__text_read(const char *path, size_t limit, char **text, size_t *n, char message[400])
{
    *text = NULL;
    *n = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);       /* a fifo must not make us wait */
    if (fd < 0)
        return fg__refuse(message, FG_ERR_IO, path, "cannot open: %s", strerror(errno));
    fg_status s = read_open(fd, path, limit, text, n, message);
    close(fd);
    if (s) {
        free(*text);
        *text = NULL;
    }
    return s;
}

fg_status fg__json_parse(const char *path, const char *text, size_t n, fg_json **out,
                         char message[400])
{
    static const fg_json_rules rules = { MAX_DEPTH, MAX_VALUES, true };
    char why[200];
    fg_status s = fg_json_parse(text, n, rules, out, why);
    if (s)
        return fg__refuse(message, s, path, "is not valid JSON: %s", why);
    if (fg_json_root(*out)->kind == FG_JSON_OBJECT)
        return FG_OK;
    fg_json_free(*out);
    *out = NULL;
    return fg__refuse(message, FG_ERR_FORMAT, path, "does not hold a JSON object");
}

fg_status fg__json_read(const char *path, fg_json **out, char message[400])
{
    char *text;
    size_t n;
    *out = NULL;
    fg_status s = fg__text_read(path, FG__MAX_JSON, &text, &n, message);
    if (!s)
        s = fg__json_parse(path, text, n, out, message);
    free(text);
    return s;
}

/* ---- writing --------------------------------------------------------------------------------- */

void fg__text_add(fg__text *t, const char *fmt, ...)
{
    va_list args, again;
    va_start(args, fmt);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, fmt, args);
    va_end(args);
    if (!t->failed && t->n + (size_t)n + 1 > t->room) {
        size_t room = 2 * (t->n + (size_t)n) + 256;
        char *text = realloc(t->text, room);
        t->failed = !text;
        if (text)
            t->text = text, t->room = room;
    }
    if (!t->failed)
        t->n += (size_t)vsnprintf(t->text + t->n, (size_t)n + 1, fmt, again);
    va_end(again);
}

static fg_status fill(int fd, const char *path, const char *text, size_t n, char message[400])
{
    while (n > 0) {
        ssize_t put = write(fd, text, n);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return fg__refuse(message, FG_ERR_IO, path, "cannot write: %s",
                              strerror(put ? errno : ENOSPC));
        text += put, n -= (size_t)put;
    }
    if (fsync(fd) < 0)
        return fg__refuse(message, FG_ERR_IO, path, "cannot sync: %s", strerror(errno));
    return FG_OK;
}

fg_status fg__text_create(const char *path, const char *text, size_t n, char message[400])
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0)
        return fg__refuse(message, FG_ERR_IO, path, "cannot create: %s", strerror(errno));
    fg_status s = fill(fd, path, text, n, message);
    if (close(fd) < 0 && !s)
        s = fg__refuse(message, FG_ERR_IO, path, "cannot close: %s", strerror(errno));
    return s;
}

fg_status fg__folder_sync(const char *folder, char message[400])
{
    int fd = open(*folder ? folder : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool ok = fd >= 0 && (fsync(fd) == 0 || errno == EINVAL);   /* EINVAL: not synced there */
    int why = errno;
    if (fd >= 0)
        close(fd);
    return ok ? FG_OK : fg__refuse(message, FG_ERR_IO, folder, "cannot sync: %s", strerror(why));
}

fg_status fg__text_replace(const char *path, const char *text, size_t n, char message[400])
{
    char beside[FG__MAX_PATH + 64], folder[FG__MAX_PATH + 1];
    const char *slash = strrchr(path, '/');
    int at = slash ? (int)(slash - path) + 1 : 0;
    struct stat info;
    if (strlen(path) > FG__MAX_PATH)
        return fg__refuse(message, FG_ERR_IO, path, "path is longer than %d bytes", FG__MAX_PATH);
    if (stat(path, &info) == 0 && !S_ISREG(info.st_mode))
        return fg__refuse(message, FG_ERR_IO, path, "is not a regular file");
    snprintf(folder, sizeof folder, "%.*s", at, path);
    snprintf(beside, sizeof beside, "%s.%s.%ld.tmp", folder, path + at, (long)getpid());
    fg_status s = fg__text_create(beside, text, n, message);
    if (!s && rename(beside, path) < 0)
        s = fg__refuse(message, FG_ERR_IO, path, "cannot rename to it: %s", strerror(errno));
    if (s)
        unlink(beside);
    return s ? s : fg__folder_sync(folder, message);
}
