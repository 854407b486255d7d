/* store.h - the inside of a store; core/ only. */
#ifndef FG_STORE_H
#define FG_STORE_H
#include "backend.h"

typedef struct {
    char     *name;
    fg_dtype  type;
    fg_shape  shape;
    bool      state;                     /* name begins with "@" */
    void     *data;                      /* on the backend's device; never moves */
} fg_entry;

struct fg_store {
    fg_backend *backend;
    fg_entry  **entries;                 /* sorted by name */
    uint32_t    n, cap;
    fg_dtype    precision;               /* of plans, FG_F32 or FG_BF16 */
    uint64_t    version;                 /* counts changes of parameters */
    fg_status   status;
    char        message[1000];
};

fg_status fg__store_fail(fg_store *s, fg_status st, const char *fmt, ...) FG_PRINTF(3, 4);
fg_entry *fg__store_entry(const fg_store *s, const char *name);            /* NULL if none */
/* The entry of that name, made (zero) if not there; NULL with a message if it does not fit. */
fg_entry *fg__store_need(fg_store *s, const char *name, fg_dtype t, fg_shape shape);
size_t    fg__entry_bytes(const fg_store *s, const fg_entry *e);
#endif
