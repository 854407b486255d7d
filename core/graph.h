/* graph.h - the inside of a graph; core/ and autodiff/ only. */
#ifndef FG_GRAPH_H
#define FG_GRAPH_H
#include "op.h"

typedef struct {
    const char *name;
    fg_loc at;
    uint32_t parent;
    bool recompute;
} fg_scope;

typedef enum { FG_OF_NODE, FG_OF_INPUT, FG_OF_PARAM, FG_OF_STATE } fg_value_kind;

typedef struct {
    fg_dtype type;
    fg_shape shape;
    fg_value_kind kind;
    const char *name;                    /* full name; NULL for what a node makes */
    uint32_t node;                       /* the maker, FG_NO_NODE if none */
    int out;                             /* which of its outputs */
    bool failed;
    fg_init init;
    fg_loc at;
    const int32_t *given;                /* an input whose value is part of the graph */
} fg_value;

typedef enum { FG_PASS_FORWARD, FG_PASS_BACKWARD, FG_PASS_UPDATE } fg_pass;

typedef struct {
    const fg_op *op;
    const void *attr;
    fg_loc at;
    uint32_t scope;
    int n_in, n_out;
    fg_pass pass;
    bool recomputed;                     /* a second computation of its pair */
    bool dropped;                        /* runs for no reader's sake, though it overwrites */
    uint32_t pair;                    /* the forward node that this one belongs to, or FG_NO_NODE */
    uint32_t in[FG_MAX_IN], out[FG_MAX_OUT];   /* in: 0 where an optional input is absent */
} fg_node;

#define FG_NO_NODE UINT32_MAX

/* Outputs of n, the first, that overwrite an input. */
static inline int fg__overwritten(const fg_node *n)
{
    return n->op->code->memory == FG_MUTATE ? n->n_out - n->op->code->fresh : 0;
}

typedef struct fg_block { struct fg_block *next; size_t used, size; } fg_block;
typedef struct { const char *key, *value; bool used; } fg_pair;
typedef struct { const char *name; uint32_t id; } fg_mark;
typedef struct {                         /* an error, and the node that it kept from being made */
    fg_status status;
    const char *text, *op;
    fg_loc at;
    uint32_t scope;
    fg_pass pass;
    int n_in;
    uint32_t in[FG_MAX_IN];
} fg_error;

struct fg_graph {
    fg_block *arena;
    fg_value *values;  uint32_t n_values,  cap_values;      /* value 0 is no value */
    fg_node  *nodes;   uint32_t n_nodes,   cap_nodes;
    fg_scope *scopes;  uint32_t n_scopes,  cap_scopes, scope;
    fg_mark  *outputs; uint32_t n_outputs, cap_outputs;
    fg_pair  *settings; uint32_t n_settings, cap_settings;
    fg_pair  *asked;    uint32_t n_asked, cap_asked;     /* keys that somebody looked up */
    fg_pair  *facts;   uint32_t n_facts,   cap_facts;
    fg_error *errors;  uint32_t n_errors,  cap_errors;
    uint32_t *slots;   uint32_t cap_slots, n_named;         /* hash table: full name -> value */
    fg_mark  *params;  uint32_t n_params,  cap_params;      /* sorted */
    uint32_t  params_of;                 /* params is right while n_values is this */
    fg_pass   pass;                      /* what is being built now */
    fg_loc    forward_at;        /* where its forward twin was built; used unless pass is forward */
    uint32_t  pair;
    fg_sequence sequence;
    fg_status status;
    int       silent;                    /* > 0: errors are not recorded */
    char      rule[600];                 /* what infer said last */
    uint32_t  n_random;
};

void       *fg__alloc(fg_graph *g, size_t size);     /* zeroed, 64-byte aligned; NULL sets MEMORY */
char       *fg__strdup(fg_graph *g, const char *s);
bool        fg__grow(void **array, uint32_t *cap, uint32_t n, size_t size);  /* room for one more */
void        fg__out_of_memory(fg_graph *g);
void        fg__scope_path(const fg_graph *g, uint32_t scope, char *buf, size_t size);
void        fg__value_text(const fg_value *v, char *buf, size_t size);        /* "f32[2,8,768]" */
const char *fg__base(const char *path);
const char *fg__shape_fault(fg_shape s);             /* NULL if s is a legal shape, else why not */
uint32_t    fg__find_name(const fg_graph *g, const char *name);
uint32_t    fg__new_value(fg_graph *g, fg_value v);
uint32_t    fg__new_node(fg_graph *g, fg_node n);
const void *fg__copy_attr(fg_graph *g, const fg_op *op, const void *attr);    /* padding zeroed */
void        fg__error(fg_graph *g, fg_status s, const char *op, const char *names, fg_loc at,
                      int n_in, const fg_tensor *in, const char *rule);
/* Nodes that the roots need, in an order that gcc and clang agree on: forward nodes depth first
 * from the roots, inputs in order; then the others as they were made.  A node that overwrites a
 * value comes after all other readers of it; sums_soon: an update's node that adds to states alone
 * right behind what it adds.  order has room for n_nodes; returns how many, or -1 if out of
 * memory. */
int64_t     fg__order(const fg_graph *g, int n_roots, const uint32_t *roots, bool sums_soon,
                      uint32_t *order);
/* base[v]: the value that v is a view of, else v; room for n_values.  False if base is NULL. */
bool        fg__bases(const fg_graph *g, uint32_t *base);
#endif
