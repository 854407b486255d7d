/* backend.h - what a device offers: functions, each with one line of contract. */
#ifndef FG_BACKEND_H
#define FG_BACKEND_H
#include "op.h"

typedef struct fg_backend_ops {
    void        *(*alloc)(fg_backend *b, size_t bytes);   /* 64-byte aligned; NULL: out of memory */
    void         (*free)(fg_backend *b, void *p);
    /* Host data are f32 or i32 by the tensor's dtype; the device keeps them as it likes. */
    fg_status    (*upload)(fg_backend *b, void *to, const void *from, int64_t count, fg_dtype t);
    fg_status    (*download)(fg_backend *b, void *to, const void *from, int64_t count, fg_dtype t);
    fg_status    (*clear)(fg_backend *b, void *to, size_t bytes);
    const char  *(*unfit)(fg_backend *b, const fg_op *op, const fg_infer *c); /* NULL, or why not */
    /* Bytes a launch needs. */
    size_t       (*scratch)(fg_backend *b, const fg_op *op, const fg_infer *c);
    fg_status    (*launch)(fg_backend *b, const fg_op *op, const fg_exec *e);
    fg_status    (*sync)(fg_backend *b);
    void         (*close)(fg_backend *b);
    /* The rest may be NULL.  May input (output) i of op be columns of a wider matrix? */
    bool         (*pitched)(fg_backend *b, const fg_op *op, int i, bool output);
    /* download, done by the time sync returns. */
    fg_status    (*download_later)(fg_backend *b, void *to, const void *from, int64_t count,
                                   fg_dtype t);
    /* Launches between record and recorded are kept instead of run; replay runs them all. */
    fg_status    (*record)(fg_backend *b);
    fg_status    (*recorded)(fg_backend *b, void **recording);
    fg_status    (*replay)(fg_backend *b, void *recording);
    void         (*forget)(fg_backend *b, void *recording);
    /* Puts the i-th mark between two launches; after sync, elapsed gives seconds from i to j. */
    fg_status    (*mark)(fg_backend *b, int i);
    double       (*elapsed)(fg_backend *b, int i, int j);
    size_t       (*memory)(fg_backend *b, size_t *total);     /* bytes free, and in all */
} fg_backend_ops;

struct fg_backend {
    const fg_backend_ops *ops;           /* NULL if it could not be opened */
    char      name[32], message[400];
    fg_status status;
    int       threads;
    bool      fuses;                     /* graphs are fused for it (ops/fuse.c) */
    char      device[128];               /* what the device calls itself */
    size_t    size_of[FG_DTYPE_COUNT];   /* bytes of an element on the device */
    void     *impl;
};

fg_status fg__backend_fail(fg_backend *b, fg_status s, const char *fmt, ...) FG_PRINTF(3, 4);
void      fg__cpu_open(fg_backend *b);
#endif
