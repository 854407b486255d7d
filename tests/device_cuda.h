/* device_cuda.h - the first GPU for a test, with traps: fresh memory is NaN all over, and a pattern
 * before and behind every allocation must be there still when it is freed. */
#ifndef FG_DEVICE_CUDA_H
#define FG_DEVICE_CUDA_H
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

static void fg__fill(fg_backend *b, char *at, size_t bytes, int32_t with)
{
    enum { PIECE = 1 << 18 };
    static int32_t buffer[PIECE];
    for (int i = 0; i < PIECE; i++) buffer[i] = with;
    for (size_t done = 0; done < bytes; done += sizeof buffer) {
        const size_t n = bytes - done < sizeof buffer ? bytes - done : sizeof buffer;
        fg__traps.plain.upload(b, at + done, buffer, (int64_t)(n / 4), FG_I32);
    }
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
    fg__fill(b, p, FG__GUARD, 0x5a5a5a5a);
    fg__fill(b, p + FG__GUARD, whole, -1);                   /* NaN in f32 and in bf16 */
    fg__fill(b, p + FG__GUARD + whole, FG__GUARD, 0x5a5a5a5a);
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
