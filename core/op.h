/* op.h - what one page of ops/ includes: the op record and the contexts its functions receive
 * (shape inference, CPU execution, gradient building). */
#ifndef FG_OP_H
#define FG_OP_H

#include "fox_core.h"

#ifdef __cplusplus
extern "C" {
#endif

#ifndef FG_REAL
#define FG_REAL float
#endif
typedef FG_REAL fg_real;                 /* what the CPU backend stores f32 and bf16 tensors in */

#define FG_MAX_IN  18
#define FG_MAX_OUT 8

typedef struct { double flops, bytes; } fg_cost;

typedef struct fg_infer {                /* inputs are read, outputs are filled */
    fg_graph   *graph;
    const void *attr;
    int         n_in, n_out;
    bool        given[FG_MAX_IN];        /* false: an optional input that is absent */
    fg_shape    in[FG_MAX_IN], out[FG_MAX_OUT];
    fg_dtype    in_type[FG_MAX_IN], out_type[FG_MAX_OUT];   /* out_type starts as in_type[0] */
} fg_infer;

/* Where element i of a tensor lies: i / width * pitch + i % width elements behind its pointer.
 * A contiguous tensor has width = pitch; columns of a wider matrix have width < pitch. */
typedef struct { int64_t width, pitch; } fg_rows;

/* On the CPU all tensors are contiguous, f32 and bf16 values are fg_real, i32 values int32_t.  An
 * absent optional input is NULL.  A kernel is called once per node, splits its own work with
 * "#pragma omp parallel for num_threads(e->threads)", and gives the same bits for any number of
 * threads: every sum has one fixed order.  For a GPU: cuda/kernel.cuh. */
typedef struct fg_exec {
    const void     *attr;
    int             n_in, n_out, threads;
    const fg_shape *in_shape, *out_shape;
    const fg_dtype *in_type, *out_type;
    const fg_rows  *in_rows, *out_rows;
    const void     *in[FG_MAX_IN];
    void           *out[FG_MAX_OUT];
    void           *scratch;        /* 64-byte aligned, as many bytes as the op's scratch() asked */
} fg_exec;

typedef struct fg_vjp {                  /* gin[i] stays {0} where no gradient flows */
    const void *attr;
    int         n_in, n_out;
    fg_tensor   in[FG_MAX_IN], out[FG_MAX_OUT];
    fg_tensor   gout[FG_MAX_OUT];        /* absent where the loss does not depend on that output */
    fg_tensor   gin[FG_MAX_IN];          /* of any shape that broadcasting made: autodiff sums it */
    bool        wants[FG_MAX_IN];
} fg_vjp;

typedef enum {
    FG_FRESH,                            /* outputs are new values */
    FG_VIEW,                             /* output 0 is input 0's memory seen with another shape */
    FG_PART,                             /* output 0 is a span of input 0 along one axis: a view
                                            where its readers can read it in place, else a copy */
    FG_JOIN,                             /* output 0 is its inputs, one behind the other along one
                                            axis: in place where their makers can, else copied */
    FG_MUTATE                            /* output i overwrites input i: a parameter, a state, or
                                            what a node made of a parameter alone that this node
                                            overwrites too, a copy kept up to date.  The last
                                            `fresh` outputs are new values */
} fg_memory_use;

/* Dtypes when a graph is lowered to bf16 (fg_store_precision).  An output takes the widest dtype of
 * the op's real inputs unless one of these says otherwise. */
typedef struct fg_bf16_rule {
    unsigned      narrow_in, wide_in;    /* bit i: input i is cast to bf16, to f32 */
    unsigned      narrow_out, wide_out;  /* bit o: output o is bf16, f32 */
    unsigned char like[FG_MAX_OUT];      /* 1 + the input whose dtype output o takes.  Of an op that
                                            overwrites: a state in its place takes it too */
    bool          as_inferred;           /* outputs keep the dtypes that infer gave them */
} fg_bf16_rule;

typedef struct fg_op_code {
    fg_status (*infer)(fg_infer *c);                                /* required */
    void      (*cpu)(const fg_exec *e);                             /* NULL: decomposed */
    void      (*vjp)(fg_vjp *v);                              /* NULL: through decompose, or none */
    fg_cost   (*cost)(const fg_infer *c);                 /* outputs are filled; NULL: bytes only */
    void      (*decompose)(const fg_tensor *in, const void *attr, fg_tensor *out); /* definition */
    fg_tensor (*example)(fg_graph *g, int i);                /* i-th test case, {0} past the last */
    size_t    (*scratch)(const fg_infer *c, int threads);   /* bytes a cpu call needs; NULL: none */
    fg_memory_use memory;
    int       fresh;                  /* of FG_MUTATE */
    unsigned  reuse;       /* bit i: output 0 may take input i's memory, even where another input
                              whose bit is set is the same value */
    void      (*span)(const void *attr, int *axis, int64_t *start);   /* of FG_PART and FG_JOIN */
    bool      no_grad;                /* not differentiable by nature (argmax, optimizer updates) */
    fg_bf16_rule bf16;
} fg_op_code;

typedef struct { const char *name, *type; size_t size, align; } fg_attr_field;

typedef struct fg_op {                   /* one line of ops.def */
    const char *name, *ins, *outs, *formula;   /* "?" after an input's name: optional */
    size_t      attr_size;
    const fg_attr_field *attrs;          /* ended by a NULL name */
    const fg_op_code *code;
} fg_op;

/* Adds a node; returns its first output, the others are fg_result(t, 1), ...  g is needed only
 * where there is no input to take it from. */
FG_API fg_tensor fg__apply(const fg_op *op, fg_loc at, fg_graph *g, int n_in, const fg_tensor *in,
                           const void *attr);
/* The op that made t and its inputs; NULL for inputs, parameters, states and failed tensors. */
FG_API const fg_op *fg__producer(fg_tensor t, fg_tensor in[FG_MAX_IN], int *n_in,
                                 const void **attr);
/* name with the current scope's path in front, as parameters and states get it */
FG_API const char *fg__full_name(fg_graph *g, const char *name);
FG_API fg_status fg__fail(fg_infer *c, fg_status s, const char *fmt, ...) FG_PRINTF(3, 4);
FG_API bool      fg__is_suffix(const fg_shape *tail, const fg_shape *of);
FG_API int64_t   fg__last(const fg_shape *s);            /* extent of the last axis; 1 for rank 0 */
FG_API int64_t   fg__rows(const fg_shape *s);               /* elements / extent of the last axis */

/* What lowering needs of ops/: the cast that it puts in, and the rules by which nodes are replaced
 * by fused ones (ops/fuse.c, core/rewrite.h). */
struct fg_rewrite;
fg_tensor fg__cast(fg_tensor x, fg_dtype to);
void      fg__fuse(struct fg_rewrite *r);
void      fg__fuse_few(struct fg_rewrite *r);              /* ops/fuse_few.c, called by fg__fuse */
void      fg__fuse_convs(struct fg_rewrite *r);            /* ops/fuse_conv.c, the same */

/* Test inputs: parameters with N(0,1) entries, named random0, random1, ... in order of creation,
 * and integers drawn from [lo, hi).  Make them in statements of their own, one per line. */
FG_API fg_tensor (fg_random)(fg_loc at, fg_graph *g, fg_shape s);
FG_API fg_tensor (fg_random_int)(fg_loc at, fg_graph *g, int64_t lo, int64_t hi, fg_shape s);
FG_API fg_tensor (fg_given_int)(fg_loc at, fg_graph *g, fg_shape s, const int32_t *values);
#define fg_random(g, ...)             fg_random(FG_HERE, g, FG_DIMS(__VA_ARGS__))
#define fg_random_int(g, lo, hi, ...) fg_random_int(FG_HERE, g, lo, hi, FG_DIMS(__VA_ARGS__))
#define fg_given_int(...)             fg_given_int(FG_HERE, __VA_ARGS__)

/* In infer: the op's own rule.  The library adds the op's name, every input's name, dtype, shape
 * and origin, the user's line and the scope trail. */
#define FG_REQUIRE(c, cond, status, ...) \
    do { if (!(cond)) return fg__fail(c, FG_ERR_##status, __VA_ARGS__); } while (0)

#ifdef __cplusplus
}
#endif
#endif
