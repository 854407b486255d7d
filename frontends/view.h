/* view.h - the inside of a view: values, nodes, boxes, and how a box is laid out;
 * frontends/view_*.c.
 *
 * A box is a scope with all that is drawn in it.  Its items stand in rows: nodes, boxes, runs of
 * equal boxes, inputs and outputs.  A backward node stands beside its forward twin, an update
 * beside the node that reads its parameter: they belong to that node's item, in the second and
 * third lane. Boxes of equal content share a class, and a class is laid out once. */
#ifndef FG_VIEW_H
#define FG_VIEW_H
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "fox_json.h"
#include "fox_view.h"

enum { VIEW_NODE, VIEW_INPUT, VIEW_PARAM, VIEW_STATE };        /* kinds of values */
enum { VIEW_FORWARD, VIEW_BACKWARD, VIEW_UPDATE, VIEW_LANES };
enum { VIEW_IN_ARENA, VIEW_IN_IO, VIEW_IN_STORE, VIEW_NOWHERE };

typedef struct {
    int64_t     id;
    int         kind, rank;
    const char *dtype, *name, *reused;                 /* name "": none */
    int64_t     dim[FG_MAX_RANK], bytes, offset, from, to, not_finite;
    int32_t     maker, out, root;                      /* node or -1; its output; value */
    int32_t     uses, first_use;                       /* readers; the first one or -1 */
    int         place;
    bool        laid, seen, frozen, failed;            /* in the arena at offset; has statistics */
    double      least, greatest, mean, rms;
} view_value;

typedef struct {
    int64_t     id;
    const char *op, *src, *user, *error;               /* "": none */
    const fg_json_value *attrs;
    int         pass, n_in, n_out;
    int32_t    *in, *out;                              /* values; -1: absent */
    int32_t     box, pair, op_info;                   /* scope it was made in; forward node or -1 */
    int32_t     home;                                /* whose item it belongs to; itself: its own */
    int32_t     param;                                 /* the value that an update is for, or -1 */
    int32_t     next;                                  /* the next one of the same home, or -1 */
    double      flops, bytes, time;                    /* time in microseconds, < 0: not known */
    bool recomputed, view, overwrites, thin; /* thin: seldom more than a name for memory */
} view_node;

typedef struct { const char *name, *ins, *outs, *formula; } view_op;
typedef struct { int32_t value; const char *name; } view_output;
typedef struct {
    int64_t first_node, nodes, arena, params, states, inputs, scratch, total;
} view_plan;

typedef enum { ITEM_NODE, ITEM_BOX, ITEM_RUN, ITEM_INPUT, ITEM_OUTPUT } view_kind;
typedef struct {
    view_kind kind;
    int32_t   ref, count;                /* node, first box (count: of a run), value, output */
    int64_t   order;                     /* by which items of a box are sorted */
} view_item;

typedef struct {
    const char *name, *path;             /* path from the top; "" is the whole graph */
    int32_t  parent, depth;
    int32_t *child;  int32_t n_children; /* boxes in it, in order */
    view_item *item; int32_t n_items;
    int32_t  first, end;             /* its nodes in fg_view.drawn, those of boxes in it included */
    int32_t  class;
    uint64_t skeleton, hash;             /* of boxes in it; of all it holds, its name apart */
    int32_t *in;   int32_t n_in;         /* values from outside that forward nodes in it read */
    int32_t *out;  int32_t n_out;        /* values of it that forward nodes outside read */
    int64_t  saved;                      /* bytes kept for its backward nodes */
    int32_t  twin;                       /* the first of the run it is part of, else itself */
    bool     recompute, made;            /* made: not a scope, but a part of a long one */
} view_box;

/* Lengths of a layout, in pixels at scale 1. */
enum {
    VIEW_PAD = 14, VIEW_HEAD = 26, VIEW_ROW_GAP = 22, VIEW_COLUMN_GAP = 16, VIEW_LANE_GAP = 96,
    VIEW_PILL_W = 92, VIEW_CHIP_W = 124, VIEW_PILL_H = 20, VIEW_PILL_GAP = 4, VIEW_STACK = 3
};

/* One place of a row: an item, a port on the upper (0) or lower (1) edge, or the bend of a value's
 * edges; x is its middle in the first two lanes, with everything closed. */
typedef enum { CELL_ITEM, CELL_IN, CELL_OUT, CELL_BEND } view_cell_kind;
typedef struct { view_cell_kind kind; int32_t ref; double x[2]; } view_cell;
typedef struct {
    int32_t from, from_port, to, to_port;  /* cells; which output or port of theirs */
    int32_t value, first_bend, n_bends;
    bool    back;                       /* runs upwards: the items depend on each other in a ring */
} view_edge;
typedef struct { double w[VIEW_LANES], h[VIEW_LANES]; } view_size;     /* of an item, closed */

typedef struct {
    int32_t    box;                      /* the one it was made from */
    int32_t    n_rows, *row;             /* cells of row r: row[r] .. row[r + 1] - 1 */
    view_cell *cell;  int32_t n_cells;
    view_edge *edge;  int32_t n_edges;
    int32_t   *bend;  int32_t n_bends;   /* cells */
    view_size *size;                     /* per item */
    uint64_t   hash;
} view_class;

typedef struct { int kind; const char *words; int32_t n; const int32_t *node; } view_note;

struct fg_view {
    fg_json     *json;                   /* owns every text that came from the file */
    void       **block; int32_t n_blocks, cap_blocks;  /* all else */
    const char  *model, *stage, *device, *library;
    view_value  *value; int32_t n_values;
    view_node   *node;  int32_t n_nodes;
    view_box    *box;   int32_t n_boxes, cap_boxes;  /* box 0: all */
    view_op     *op;    int32_t n_ops;
    view_output *output; int32_t n_outputs;
    view_plan   *plan;  int32_t n_plans;
    view_class  *class; int32_t n_classes;
    int32_t     *drawn;                  /* nodes by box, then as the file has them */
    int32_t     *first_attached;         /* per node: the first one whose home it is, or -1 */
    int32_t     *drawn_in;               /* per node: the box whose item it is part of */
    int32_t     *inner_first, n_inner; /* boxes that hold something, inner ones before outer ones */
    int32_t     *at;                     /* per node: its place in drawn */
    int32_t     *reader, *first_reader;  /* of value x: reader[first_reader[x]] .. [x + 1] - 1 */
    const view_note *note; int32_t n_notes;             /* of a comparison, for the page */
    bool         compared;
    bool         has[VIEW_LANES], timed, seen, planned, failed, out_of_memory;
};

/* view_read.c: zeroed memory that the view owns; NULL sets out_of_memory. */
void *fg__view_alloc(fg_view *v, size_t n, size_t size);
char *fg__view_text(fg_view *v, const char *fmt, ...) FG_PRINTF(2, 3);
/* view_tree.c: homes, boxes, items, classes.  view_layout.c: rows and places of every class. */
fg_status fg__view_tree(fg_view *v);
/* Is the node drawn somewhere in the box? */
bool fg__view_inside(const fg_view *v, const view_box *b, int32_t node);
/* Is the value made by a node with an item of its own, or an input that such a node reads? */
bool fg__view_flows(const fg_view *v, int32_t x);
/* The node that stands for node k where runs are folded: its twin in the first box of each run. */
int32_t fg__view_stand_in(const fg_view *v, int32_t k);
/* The value whose memory x is seen through views. */
int32_t fg__view_seen(const fg_view *v, int32_t x);
fg_status fg__view_layout(fg_view *v);
/* Middles of n neighbours of widths w, as near to what is wanted (by weight) as their order and
 * gaps allow; in place.  room: n doubles and n ints. */
void fg__view_spread(int n, double *x, const double *w, const double *weight, double gap);

/* view_frame.c: a box with some of the boxes in it open, every thing at its place. */
typedef struct {
    double  w[VIEW_LANES], h;            /* of the frame; w 0: nothing in that lane */
    double *x[VIEW_LANES];               /* per cell: its middle, from the left of the frame */
    double *y, *row_h;                 /* per row: its top, from the top of the frame; its height */
} view_frame;
typedef struct {
    fg_view    *v;
    const bool *open;                    /* per box */
    view_frame *frame;                   /* per box; made for those that are open and seen */
    int32_t     top;                     /* the box that is the picture */
    double      lane[VIEW_LANES], w, h;  /* where lanes begin; of the whole picture */
} view_picture;
/* False if out of memory.  What it makes belongs to the view. */
bool fg__view_compose(fg_view *v, const fg_view_options *o, view_picture *p);
/* Marks the boxes that options open: what lies at most depth deep in focus, and the way to it from
 * the box that is returned. */
int32_t   fg__view_open(const fg_view *v, const fg_view_options *o, bool *open);
/* The box that an item shows: itself or the first of a run; -1 for other items. */
int32_t   fg__view_shown(const fg_view *v, const view_box *b, const view_item *x);
view_size fg__view_size_now(const view_picture *p, const view_box *b, int32_t item);
/* Bytes that the backward nodes beside a node read of what forward nodes made. */
int64_t   fg__view_saved(const fg_view *v, int32_t node);

/* view_words.c: what is written on things. */
enum { VIEW_WORDS = 256 };
typedef char view_words[VIEW_WORDS];
void   fg__view_shape(const view_value *x, view_words to);          /* "1x16384x1536" */
void   fg__view_bytes(double bytes, view_words to);                 /* "1.5 GiB" */
void   fg__view_amount(double n, view_words to);                    /* "763.2M" */
void   fg__view_attrs(const view_node *n, view_words to);           /* "eps=1e-06, groups=24" */
void   fg__view_attr(const fg_json_value *a, view_words to);        /* "1e-06" */
void   fg__view_label(const fg_view *v, int32_t node, view_words to); /* "q_proj", a shape, or "" */
/* A box's or run's name: "attn", "0 ... 23". */
void   fg__view_box_name(const fg_view *v, const view_box *in, const view_item *x, view_words to);
/* Is the op drawn as a circle, and with which sign?  NULL: as a box. */
const char *fg__view_sign(const view_node *n);
int    fg__view_letters(const char *utf8);                          /* characters in it */
double fg__view_heat(const fg_view *v, int32_t node, fg_heat h);    /* < 0: not known */
/* Sum, for intensity and maxima what stands for all, of a box's nodes in one pass; < 0: not
 * known. */
double fg__view_box_heat(const fg_view *v, const view_box *b, int pass, fg_heat h);
void   fg__view_heat_words(double x, fg_heat h, view_words to);     /* "1.3 TFLOP" */
int32_t fg__view_find_box(const fg_view *v, const char *path);      /* -1: none */

/* A writer that all formats share. */
typedef struct { fg_put put; void *to; } view_out;
void fg__view_say(const view_out *w, const char *fmt, ...) FG_PRINTF(2, 3);   /* up to 2000 bytes */
void fg__view_json_text(const view_out *w, const char *s);   /* quoted; "<" and "&" as escapes */
void fg__view_xml_text(const view_out *w, const char *s);
/* Base64 of the SHA-256 of n bytes. */
void fg__view_sha256(const void *data, size_t n, char base64[48]);
#endif
