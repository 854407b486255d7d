/* device_cuda.h - the first GPU for a test, with traps: fresh memory is NaN all over, and a pattern
 * before and behind every allocation must be there still when it is freed. */
#ifndef FG_DEVICE_CUDA_H
#define FG_DEVICE_CUDA_H
#include <criterion/criterion.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "backend.h"

enum { FG__GUARD = 256, FG__BLOCKS = 4096 };   /* bytes of pattern; allocations at one time */

static struct {
    fg_backend_ops plain;
    char *at[FG__BLOCKS];
    size_t bytes[FG__BLOCKS];
    int broken;                          /* patterns that were written over */
} fg__traps;

/* By the driver: some tests fill tens of GB. */
static void fg__fill(char *at, size_t bytes, unsigned with)
{
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    int (*set)(unsigned long long, unsigned, size_t) = NULL, (*wait)(void *) = NULL;
    if (driver) *(void **)&set = dlsym(driver, "cuMemsetD32_v2");
    if (driver) *(void **)&wait = dlsym(driver, "cuStreamSynchronize");
    const bool filled = set && wait && !set((uintptr_t)at, with, bytes / 4) && !wait(NULL);
    if (driver) dlclose(driver);
    cr_assert(filled, "%zu bytes could not be filled", bytes);
}

static void *fg__trapped_alloc(fg_backend *b, size_t bytes)
{
    const size_t whole = (bytes + FG__GUARD - 1) / FG__GUARD * FG__GUARD;
    int i = 0;
    while (i < FG__BLOCKS && fg__traps.at[i]) i++;
    if (i == FG__BLOCKS) return NULL;
    char *p = fg__traps.plain.alloc(b, whole + 2 * FG__GUARD);
    if (!p) return NULL;
    fg__traps.at[i] = p;
    fg__traps.bytes[i] = whole;
    fg__fill(p, FG__GUARD, 0x5a5a5a5a);
    fg__fill(p + FG__GUARD, whole, ~0u);                     /* NaN in f32 and in bf16 */
    fg__fill(p + FG__GUARD + whole, FG__GUARD, 0x5a5a5a5a);
    return p + FG__GUARD;
}

static void fg__trapped_free(fg_backend *b, void *p)
{
    int32_t guard[2 * FG__GUARD / 4];
    int i = 0;
    if (!p) return;
    while (i < FG__BLOCKS && fg__traps.at[i] != (char *)p - FG__GUARD) i++;
    if (i == FG__BLOCKS) { fg__traps.broken++; return; }
    fg__traps.plain.download(b, guard, fg__traps.at[i], FG__GUARD / 4, FG_I32);
    fg__traps.plain.download(b, guard + FG__GUARD / 4, (char *)p + fg__traps.bytes[i],
                             FG__GUARD / 4, FG_I32);
    for (int k = 0; k < 2 * FG__GUARD / 4; k++)
        if (guard[k] != 0x5a5a5a5a) { fg__traps.broken++; break; }
    fg__traps.plain.free(b, fg__traps.at[i]);
    fg__traps.at[i] = NULL;
}

/* Sequences longer than that are left out of a test: FG_TEST_LENGTH, for compute-sanitizer. */
static inline int64_t fg__longest(void)
{
    const char *s = getenv("FG_TEST_LENGTH");
    return s ? atoll(s) : INT64_MAX;
}

/* NULL after saying why there is none, which is a failure where FG_NEED_GPU is set. */
static fg_backend *fg__cuda_or_skip(bool trapped)
{
    static fg_backend_ops ops;
    fg_backend *b = fg_backend_open("cuda", 0);
    if (!b || fg_backend_status(b)) {
        fprintf(stderr, "skipped: %s\n", fg_backend_message(b));
        cr_expect(!getenv("FG_NEED_GPU"), "no GPU: %s", fg_backend_message(b));
        fg_backend_close(b);
        return NULL;
    }
    if (!trapped) return b;
    fg__traps.plain = ops = *b->ops;
    fg__traps.broken = 0;
    ops.alloc = fg__trapped_alloc;
    ops.free = fg__trapped_free;
    b->ops = &ops;
    return b;
}
#endif
