/* fuzz.h - what the fuzz targets share: input bytes as a file, and claims that are checked. */
#ifndef FG_FUZZ_H
#define FG_FUZZ_H
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

/* A claim about the code under test, whatever the input. */
#define HOLDS(cond)                                                        \
    do {                                                                   \
        if (!(cond)) {                                                     \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #cond);     \
            abort();                                                       \
        }                                                                  \
    } while (0)

/* A folder of this process in memory where there is one. */
static inline const char *fuzz_path(const char *name, char path[128])
{
    snprintf(path, 128, "%s/fox-graph-fuzz-%ld", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm",
             (long)getpid());
    mkdir(path, 0777);
    size_t at = strlen(path);
    snprintf(path + at, 128 - at, "/%s", name);
    return path;
}

static inline void fuzz_write(const char *path, const void *data, size_t n)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    HOLDS(fd >= 0 && write(fd, data, n) == (ssize_t)n);
    close(fd);
}
#endif
