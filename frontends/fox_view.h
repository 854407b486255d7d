/* fox_view.h - graphs as graph.json has them: read, drawn, compared.
 *
 * docs/viewer.md explains what is drawn, docs/graph.schema.json is the format.  A view owns what it
 * was read from; every picture of it depends on the file and the options alone. */
#ifndef FOX_VIEW_H
#define FOX_VIEW_H
#include "fox_core.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef struct fg_view fg_view;

typedef enum {
    FG_HEAT_NONE, FG_HEAT_FLOPS, FG_HEAT_BYTES, FG_HEAT_INTENSITY, FG_HEAT_TIME, FG_HEAT_ABSMAX,
    FG_HEAT_GRADNORM, FG_HEAT_COUNT
} fg_heat;

typedef struct {
    int         depth;                   /* scopes open from the top or from focus; < 0: all */
    const char *focus;                   /* path of the scope to show, NULL: everything */
    int         radius;                  /* scopes around focus, this many steps out */
    fg_heat     heat;
    bool        memory;                  /* the memory plan under the graph */
    bool        dark;                    /* svg: light on dark */
} fg_view_options;

/* Reads graph.json of at most n bytes and checks all that the functions below rely on.
 * FG_ERR_FORMAT or FG_ERR_MEMORY with a message of one line, and *out NULL. */
FG_API fg_status fg_view_read(const char *json, size_t n, fg_view **out, char message[400]);
FG_API void      fg_view_free(fg_view *v);
/* FG_OK if options fit the view; else FG_ERR_USAGE and why: no scope of that path, no times. */
FG_API fg_status fg_view_check(const fg_view *v, const fg_view_options *o, char message[400]);
FG_API const char *fg_heat_name(fg_heat h);              /* "flops" */

/* Each writes one document: a tree for a terminal, Graphviz, a picture, a page in one file.
 * FG_ERR_MEMORY is the only failure after fg_view_check. */
FG_API fg_status fg_view_text(const fg_view *v, const fg_view_options *o, fg_put put, void *to);
FG_API fg_status fg_view_dot(const fg_view *v, const fg_view_options *o, fg_put put, void *to);
FG_API fg_status fg_view_svg(const fg_view *v, const fg_view_options *o, fg_put put, void *to);
FG_API fg_status fg_view_html(const fg_view *v, const fg_view_options *o, fg_put put, void *to);

/* Takes times (and statistics) of a run of the same graph from another view: nodes in the same
 * order with the same ops, else FG_ERR_USAGE and where they differ first. */
FG_API fg_status fg_view_take_times(fg_view *v, const fg_view *run, char message[400]);

typedef enum { FG_DIFF_TEXT, FG_DIFF_JSON, FG_DIFF_HTML } fg_diff_format;
/* What makes b of a: nodes added, removed, changed, moved.  *differ: whether anything does. */
FG_API fg_status fg_view_diff(const fg_view *a, const fg_view *b, fg_diff_format f, fg_put put,
                              void *to, bool *differ);

#ifdef __cplusplus
}
#endif
#endif
