/* text_file.h - small JSON and text files of the frontends: read with limits, written durably. */
#ifndef FG_TEXT_FILE_H
#define FG_TEXT_FILE_H
#include "fox_json.h"

enum { FG__MAX_PATH = 4000, FG__MAX_JSON = 8 << 20 };      /* bytes */

/* "path: reason" on one line; returns s. */
fg_status fg__refuse(char message[400], fg_status s, const char *path, const char *fmt, ...)
    FG_PRINTF(4, 5);
/* An object at the top, at most 32 levels; the bare tokens Infinity, -Infinity and NaN, which
 * Python writes, are numbers. */
fg_status fg__json_read(const char *path, fg_json **out, char message[400]);
fg_status fg__json_parse(const char *path, const char *text, size_t n, fg_json **out,
                         char message[400]);
/* The whole file and a NUL behind it; the caller frees it. */
fg_status fg__text_read(const char *path, size_t limit, char **text, size_t *n, char message[400]);
/* Makes path with this text, synced; its folder is not.  Fails if path is there and not a file. */
fg_status fg__text_create(const char *path, const char *text, size_t n, char message[400]);
/* The same by way of a file beside it: path has the old text or the new, never a part. */
fg_status fg__text_replace(const char *path, const char *text, size_t n, char message[400]);
fg_status fg__folder_sync(const char *folder, char message[400]);

/* Text that grows; after a failure nothing is added.  Free .text. */
typedef struct { char *text; size_t n, room; bool failed; } fg__text;
void fg__text_add(fg__text *t, const char *fmt, ...) FG_PRINTF(2, 3);

#endif
