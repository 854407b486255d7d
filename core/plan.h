/* plan.h - the inside of a plan; core/ and autodiff's gradient check only. */
#ifndef FG_PLAN_H
#define FG_PLAN_H
#include "backend.h"
#include "graph.h"
#include "store.h"

typedef enum { FG_IN_ARENA, FG_IN_IO, FG_IN_STORE, FG_UNUSED } fg_place;

typedef struct {
    fg_place place;
    uint32_t root;                     /* the value in whose memory it lies; itself if its own */
    size_t   shift;                    /* bytes behind that one's start */
    fg_rows  rows;                     /* width 0: contiguous */
    int64_t  from, to;                  /* steps between which the memory holds something (roots) */
    size_t   bytes, offset;              /* in the arena or the io area (roots) */
    fg_entry *entry;                     /* in the store (roots) */
    const char *reused;               /* why it shares its root: "view", "in place", "overwrites",
                                           "part", "joined" */
} fg_slot;

typedef struct {
    const char *op;
    double seconds, flops, bytes;
    int64_t calls;
} fg_timing;

typedef struct {                         /* what runs noted of one value; seconds of its maker */
    double  seconds, least, greatest, mean, rms;
    int64_t not_finite;
    bool    timed, seen;
} fg_record;

struct fg_plan {
    const fg_graph *graph;               /* as given */
    fg_graph  *low;                      /* lowered, its nodes in running order */
    uint32_t  *map, n_map;               /* value of graph -> value of low, 0 if dropped */
    fg_store  *store;
    fg_slot   *slots;                    /* per value of low */
    fg_exec   *execs;                    /* per node of low, pointers filled when memory is there */
    fg_shape  *shapes;
    fg_dtype  *types;
    fg_rows   *rows;
    bool      *quiet;                    /* per node of low: nothing is launched for it */
    bool      *fixed;                    /* per node of low: it depends on parameters alone and runs
                                            when they have changed */
    uint64_t   version;                  /* of the store's parameters when they last ran */
    bool       changes_params, fixed_ran;
    void      *recording;                /* the launches as the device keeps them; NULL: not yet */
    int64_t    runs;
    char      *arena, *io, *scratch;
    size_t     arena_bytes, io_bytes, scratch_bytes;
    fg_timing *timings;                  /* one for each op that occurs */
    uint32_t   n_timings;
    unsigned   record;                   /* FG_RECORD_TIMES, FG_RECORD_VALUES */
    fg_record *records;                  /* per value of low, or NULL */
    bool       profile, check, ready;
    bool       sync, plain;             /* FG_SYNC, FG_NO_GRAPHS */
    fg_plan_info info;
    fg_status  status;
    char       message[1200];
};

/* A graph of the same values in running order, in that precision: every node has a kernel on b or
 * is replaced by its definition; nodes that nothing needs are gone, equal ones are one.  NULL if
 * out of memory. */
fg_graph *fg__lower(const fg_graph *g, fg_backend *b, fg_dtype precision, uint32_t **map);
void      fg__infer_of(const fg_graph *g, const fg_node *n, fg_infer *c);    /* shapes in and out */
fg_status fg__find_views(fg_plan *p);                           /* who lies in whose memory */
uint32_t  fg__root_of(const fg_plan *p, uint32_t v);
/* Is input i of n made of nothing but a parameter that n overwrites? */
bool      fg__is_copy(const fg_graph *g, const fg_node *n, int i);
fg_status fg__lay_out(fg_plan *p);                                          /* slots, sizes, peak */
fg_status fg__prepare(fg_plan *p);                                         /* memory and pointers */
/* Where t's value lies on the CPU; NULL if the plan does not keep it. */
void     *fg__plan_data(fg_plan *p, fg_tensor t);
bool      fg__plan_keeps(const fg_plan *p, uint32_t low_id);              /* readable after a run */
fg_cost   fg__cost_of(const fg_graph *g, const fg_node *n);
/* Output o of node k as floats, for the caller to free; NULL with the plan's error. */
float    *fg__copy_output(fg_plan *p, uint32_t k, int o);
/* Notes what node k, started so many seconds ago, took and made. */
fg_status fg__record_node(fg_plan *p, uint32_t k, double seconds);
fg_status fg__plan_fail(fg_plan *p, fg_status s, const char *fmt, ...) FG_PRINTF(3, 4);
#endif
