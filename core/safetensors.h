/* safetensors.h - what the reader, the writer and the store share about safetensors files. */
#ifndef FG_SAFETENSORS_H
#define FG_SAFETENSORS_H

#include "fox_core.h"

enum {
    FG__FILE_MAX_HEADER  = 100000000,    /* bytes; the format's own limit */
    FG__FILE_MAX_TENSORS = 100000,
    FG__FILE_MAX_NAME    = 512,          /* bytes */
    FG__FILE_MAX_PATH    = 4000
};

/* One tensor to write; fetch gives its values, so that only one tensor is in memory at a time. */
typedef struct { const char *name; fg_dtype type; fg_shape shape; const void *data; } fg__file_item;
typedef fg_status (*fg__file_fetch)(void *from, const fg__file_item *item, void *data,
                                    size_t bytes);

/* Writes n items to a new file beside path, syncs it, renames it over path and syncs the folder.
 * f32 and bf16 items are written as F32, i32 items as I32; fetch fills float or int32_t.  Sorts the
 * items by name. */
fg_status fg__safetensors_write(const char *path, int n, fg__file_item *items, fg__file_fetch fetch,
                                void *from, char message[400]);

/* Why a name may not stand in a file, or NULL. */
const char *fg__file_name_fault(const char *name);
/* One line of text: control characters become '?'; a long path keeps its end. */
void        fg__one_line(char *text);
const char *fg__path_end(const char *path);

#endif
