/* faults.h - makes the n-th allocation or the n-th file operation of the code under test fail, be
 * cut short, or end the process.  The test is linked with --wrap for every function below. */
#ifndef FG_FAULTS_H
#define FG_FAULTS_H
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

typedef enum { FAULT_NONE, FAULT_MEMORY, FAULT_FULL, FAULT_SHORT, FAULT_EXIT } fault_kind;
static struct { fault_kind kind; long at, calls, live; } faults;

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void __real_free(void *p);
int __real_open(const char *path, int flags, ...);
int __real_close(int fd);
int __real_fsync(int fd);
int __real_rename(const char *from, const char *to);
int __real_unlink(const char *path);
int __real_mkdir(const char *path, mode_t mode);
int __real_rmdir(const char *path);
ssize_t __real_write(int fd, const void *data, size_t n);
ssize_t __real_pread(int fd, void *data, size_t n, off_t at);

void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);
void __wrap_free(void *p);
int __wrap_open(const char *path, int flags, ...);
int __wrap_close(int fd);
int __wrap_fsync(int fd);
int __wrap_rename(const char *from, const char *to);
int __wrap_unlink(const char *path);
int __wrap_mkdir(const char *path, mode_t mode);
int __wrap_rmdir(const char *path);
ssize_t __wrap_write(int fd, const void *data, size_t n);
ssize_t __wrap_pread(int fd, void *data, size_t n, off_t at);

/* Begins a trial: the at-th call counts from 1. */
static inline void faults_arm(fault_kind kind, long at)
{
    faults.kind = kind;
    faults.at = at;
    faults.calls = 0;
}

/* Ends it; whether the fault came. */
static inline bool faults_disarm(void)
{
    bool came = faults.calls >= faults.at;
    faults.kind = FAULT_NONE;
    return came;
}

static bool no_memory(void)
{
    return faults.kind == FAULT_MEMORY && ++faults.calls == faults.at;
}

void *__wrap_malloc(size_t n)
{
    void *p = no_memory() ? NULL : __real_malloc(n);
    faults.live += p != NULL;
    return p;
}

void *__wrap_calloc(size_t n, size_t size)
{
    void *p = no_memory() ? NULL : __real_calloc(n, size);
    faults.live += p != NULL;
    return p;
}

void *__wrap_realloc(void *p, size_t n)
{
    void *q = no_memory() ? NULL : __real_realloc(p, n);
    faults.live += !p && q;
    return q;
}

void __wrap_free(void *p)
{
    faults.live -= p != NULL;
    __real_free(p);
}

/* Whether this file operation is to fail; the process ends here if that is the fault. */
static bool refused(void)
{
    if (faults.kind != FAULT_FULL && faults.kind != FAULT_EXIT)
        return false;
    if (++faults.calls != faults.at)
        return false;
    if (faults.kind == FAULT_EXIT)
        _exit(77);
    errno = ENOSPC;
    return true;
}

int __wrap_open(const char *path, int flags, ...)
{
    va_list args;
    va_start(args, flags);
    int mode = flags & O_CREAT ? va_arg(args, int) : 0;
    va_end(args);
    return refused() ? -1 : __real_open(path, flags, mode);
}

int __wrap_close(int fd)
{
    bool fail = refused();
    int result = __real_close(fd);
    if (fail)
        errno = ENOSPC;
    return fail ? -1 : result;
}

int __wrap_fsync(int fd)
{
    return refused() ? -1 : __real_fsync(fd);
}

int __wrap_rename(const char *from, const char *to)
{
    return refused() ? -1 : __real_rename(from, to);
}

int __wrap_unlink(const char *path)
{
    return refused() ? -1 : __real_unlink(path);
}

int __wrap_mkdir(const char *path, mode_t mode)
{
    return refused() ? -1 : __real_mkdir(path, mode);
}

int __wrap_rmdir(const char *path)
{
    return refused() ? -1 : __real_rmdir(path);
}

ssize_t __wrap_write(int fd, const void *data, size_t n)
{
    if (faults.kind == FAULT_SHORT && n > 1)
        n = (n + 2) / 3;
    if (faults.kind == FAULT_EXIT && faults.calls + 1 == faults.at && n > 1 &&
        __real_write(fd, data, n / 2) < 0)
        return -1;
    return refused() ? -1 : __real_write(fd, data, n);
}

ssize_t __wrap_pread(int fd, void *data, size_t n, off_t at)
{
    if (faults.kind == FAULT_SHORT && n > 1)
        n = (n + 2) / 3;
    return refused() ? -1 : __real_pread(fd, data, n, at);
}

/* A new folder in memory where there is one, so that syncing is quick. */
static inline void temporary_folder(char path[64])
{
    snprintf(path, 64, "%s/fox-graph-test-XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
    if (!mkdtemp(path))
        abort();
}

static inline void remove_temporary(const char *path)
{
    char command[200];
    snprintf(command, sizeof command, "rm -rf '%s'", path);
    if (system(command))
        abort();
}
#endif
