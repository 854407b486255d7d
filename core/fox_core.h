/* fox_core.h - graphs, tensors, errors, stores, plans and running: what every other header needs.
 *
 * Three objects, three lifetimes:
 *   fg_graph  what is computed: values, nodes, scopes, names.  Building never computes.
 *   fg_store  parameters and other lasting state, by name, on one device.  Outlives graphs.
 *   fg_plan   a graph made ready to run on a store: order, memory, kernels.
 *
 * No function here aborts, exits or prints.  A builder that refuses its arguments returns a failed
 * tensor; whatever is built on it is not reported again, so a model is checked once, at the end,
 * with fg_graph_status().  Shapes are written outermost axis first; tensors are row-major.
 * Threads: one graph, plan or store per thread at a time; objects share nothing mutable unless one
 * was made from the other. */
#ifndef FOX_CORE_H
#define FOX_CORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FG_VERSION_MAJOR 0
#define FG_VERSION_MINOR 1
#define FG_VERSION_PATCH 0
#define FG_ABI 1u                        /* changes when a compiled model must be built again */

#ifndef FG_API
#define FG_API __attribute__((visibility("default")))
#endif
#define FG_PRINTF(fmt, first) __attribute__((format(printf, fmt, first)))

#define FG_MAX_RANK 6

#define FG_STATUS_MAP(X)                                                        \
    X(OK,        "no error")                                                    \
    X(SHAPE,     "tensor shapes do not fit together")                           \
    X(DTYPE,     "tensor dtypes do not fit together")                           \
    X(USAGE,     "the library was called wrongly")                              \
    X(NO_VJP,    "an op on the path to the loss has no gradient")               \
    X(NO_KERNEL, "no kernel and no decomposition on this backend")              \
    X(MEMORY,    "out of memory")                                               \
    X(DEVICE,    "the device reported an error")                                \
    X(IO,        "a file could not be read or written")                         \
    X(FORMAT,    "a file's contents are not valid")                             \
    X(NUMERIC,   "a value is not finite")                                       \
    X(STOPPED,   "stopped on request; can be resumed")

typedef enum {
#define X(name, text) FG_ERR_##name,
    FG_STATUS_MAP(X)
#undef X
    FG_STATUS_COUNT
} fg_status;
#define FG_OK FG_ERR_OK

typedef enum { FG_F32, FG_BF16, FG_I32, FG_DTYPE_COUNT } fg_dtype;

typedef struct { int rank; int64_t dim[FG_MAX_RANK]; } fg_shape;   /* axis 0 is outermost */

/* A place in a source file.  ours: the call was made inside the library. */
typedef struct { const char *file, *func; int line; bool ours; } fg_loc;

typedef struct fg_graph   fg_graph;
typedef struct fg_store   fg_store;
typedef struct fg_plan    fg_plan;
typedef struct fg_backend fg_backend;

/* A name for a value of a graph; copied freely, nothing to free, lives as long as its graph.
 * {0} is "absent": what a builder takes for an optional input that is not there. */
typedef struct { fg_graph *graph; uint32_t id; } fg_tensor;

/* How a parameter starts.  Random numbers depend on (seed, full name, index) alone, never on the
 * order in which parameters are made. */
typedef enum {
    FG_ZEROS,
    FG_ONES,
    FG_CONSTANT,        /* a                                                                  */
    FG_NORMAL,          /* normal with mean 0 and standard deviation a                        */
    FG_UNIFORM,         /* uniform in [-a, a]                                                 */
    FG_LOG_RANGE,       /* log(1 + index)                                    (Mamba-2 A_log)  */
    FG_INV_SOFTPLUS,    /* y with softplus(y) log-uniform in [a, b], at least c (dt_bias)     */
    FG_LOG_DECAY        /* logit of exp(-1/tau), tau log-spaced in [a, b] (fixed forget gate) */
} fg_init_kind;

typedef struct {
    fg_init_kind kind;
    double a, b, c;
    bool no_decay;      /* belongs to the group without weight decay */
    bool frozen;        /* saved with the model, never trained (a buffer) */
} fg_init;

static inline fg_loc fg_here(const char *file, const char *func, int line, bool ours)
{
    fg_loc at = { file, func, line, ours };
    return at;
}
#ifndef FG_OURS
#define FG_OURS false                    /* true while the library itself is compiled */
#endif
#define FG_HERE fg_here(__FILE__, __func__, __LINE__, FG_OURS)

/* FG_DIMS(2, 8, 768) is a shape. */
#ifndef __cplusplus
#define FG_DIMS(...) fg_dims((int)(sizeof((int64_t[]){ __VA_ARGS__ }) / sizeof(int64_t)), \
                             (const int64_t[]){ __VA_ARGS__ })
#endif

FG_API fg_shape    fg_dims(int rank, const int64_t *dim);
FG_API int64_t     fg_shape_count(fg_shape s);             /* elements; 1 for rank 0 */
FG_API bool        fg_shape_equal(fg_shape a, fg_shape b);
FG_API const char *fg_status_text(fg_status s);
FG_API const char *fg_dtype_name(fg_dtype t);              /* "f32", "bf16", "i32" */
FG_API const char *fg_version(void);                       /* "0.1.0" */

/* ---- building ------------------------------------------------------------------------------- */

FG_API fg_graph   *fg_graph_new(void);                     /* NULL only if out of memory */
FG_API void        fg_graph_free(fg_graph *g);             /* NULL is fine */
FG_API fg_status   fg_graph_status(const fg_graph *g);     /* the first error's, or FG_OK */
FG_API const char *fg_graph_message(const fg_graph *g);    /* the first: line, op, rule, shapes */
FG_API int         fg_graph_errors(const fg_graph *g);     /* independent errors that were found */
FG_API const char *fg_graph_error(const fg_graph *g, int i);

/* A value given from outside at every run.  The name gets the scope's path in front and has then at
 * most 200 bytes; no extent is 0. */
FG_API fg_tensor (fg_input)(fg_loc at, fg_graph *g, const char *name, fg_dtype t, fg_shape s);
/* A trained value, f32, kept in the store under its full name; a second parameter of the same
 * full name is an error (share one by passing the tensor around). */
FG_API fg_tensor (fg_param)(fg_loc at, fg_graph *g, const char *name, fg_shape s, fg_init init);
/* A lasting value that is not trained (moments, caches), zero at first; made twice under one full
 * name with the same dtype and shape it is the same value.  "@cache.k" made in the scope "layers.0"
 * is "@cache.layers.0.k": one prefix for all states of a kind. */
FG_API fg_tensor (fg_state)(fg_loc at, fg_graph *g, const char *name, fg_dtype t, fg_shape s);
/* Keeps t's value after a run so that fg_read can fetch it by tensor or by name.  What is read of a
 * parameter or state, or of a view of one, is what it holds after the run. */
FG_API fg_tensor (fg_output)(fg_loc at, fg_tensor t, const char *name);
/* Scopes name what is made inside them: "model.layers.0" + "." + "weight".  "" adds nothing. */
FG_API void      (fg_scope_push)(fg_loc at, fg_graph *g, const char *name);
FG_API void        fg_scope_pop(fg_graph *g);
/* What the current scope computes is computed again in the backward pass instead of kept. */
FG_API void        fg_scope_recompute(fg_graph *g);
/* For builders: fail with your own words, as an op would.  The failed tensor is shaped like x. */
FG_API fg_tensor (fg_fail)(fg_loc at, fg_tensor x, fg_status s, const char *fmt, ...)
    FG_PRINTF(4, 5);
#define fg_input(...)      fg_input(FG_HERE, __VA_ARGS__)
#define fg_param(...)      fg_param(FG_HERE, __VA_ARGS__)
#define fg_state(...)      fg_state(FG_HERE, __VA_ARGS__)
#define fg_output(...)     fg_output(FG_HERE, __VA_ARGS__)
#define fg_scope_push(...) fg_scope_push(FG_HERE, __VA_ARGS__)
#define fg_fail(...)       fg_fail(FG_HERE, __VA_ARGS__)

FG_API fg_shape    fg_shape_of(fg_tensor t);               /* rank 0 if absent */
FG_API fg_dtype    fg_dtype_of(fg_tensor t);
FG_API int64_t     fg_dim(fg_tensor t, int axis);          /* axis < 0: from the end; 0 if none */
FG_API int64_t     fg_count(fg_tensor t);
FG_API bool        fg_ok(fg_tensor t);                     /* there and not failed */
FG_API bool        fg_absent(fg_tensor t);
FG_API fg_tensor   fg_result(fg_tensor t, int k);          /* k-th output of the op that made t */
FG_API const char *fg_name(fg_graph *g, const char *fmt, ...) FG_PRINTF(2, 3);  /* lives as g */

/* What the sequence-mixing ops (attention, token shift, rotary, convolution, scans) must know about
 * the tokens of this graph.  They look it up themselves, so a model is written once and serves
 * training, packed documents, padded batches and decoding with a cache. */
typedef struct {
    fg_tensor first;     /* i32[B,T]: for each token, the absolute position of the first token that
                            it may see: its document's start, or the end of the left padding.
                            first > own position marks padding: such rows give 0.  Absent: 0. */
    fg_tensor past;      /* i32[1]: how many tokens the caches hold already; token t stands at
                            absolute position past + t.  Absent: no caches. */
    int64_t   capacity;  /* tokens a cache can hold */
} fg_sequence;
FG_API void        fg_graph_sequence(fg_graph *g, fg_sequence s);
FG_API fg_sequence fg_sequence_of(const fg_graph *g);

/* Settings: numbers that a model reads, and a user may change without editing it (--set K=V). */
FG_API fg_status   fg_graph_set(fg_graph *g, const char *key, const char *value);
FG_API int64_t   (fg_setting_int)(fg_loc at, fg_graph *g, const char *key, int64_t otherwise);
FG_API double    (fg_setting_real)(fg_loc at, fg_graph *g, const char *key, double otherwise);
#define fg_setting_int(...)  fg_setting_int(FG_HERE, __VA_ARGS__)
#define fg_setting_real(...) fg_setting_real(FG_HERE, __VA_ARGS__)
FG_API const char *fg_setting_text(fg_graph *g, const char *key, const char *otherwise);
/* The i-th key that nobody read, or NULL. */
FG_API const char *fg_graph_unused_setting(const fg_graph *g, int i);
/* The i-th key that the model asked for, given or not, or NULL. */
FG_API const char *fg_graph_asked_setting(const fg_graph *g, int i);

/* Facts about the model that travel with it (the fields of config.json); value is JSON text. */
FG_API fg_status   fg_graph_set_fact(fg_graph *g, const char *key, const char *json);
FG_API const char *fg_graph_fact(const fg_graph *g, const char *key);   /* NULL if none */
FG_API bool        fg_graph_fact_at(const fg_graph *g, int i, const char **key, const char **json);

/* The parameters of a graph, sorted by name. */
typedef struct { const char *name; fg_shape shape; fg_init init; fg_tensor tensor; } fg_param_info;
FG_API int         fg_param_count(const fg_graph *g);
FG_API bool        fg_param_at(const fg_graph *g, int i, fg_param_info *out);
/* An input, parameter, state or output. */
FG_API fg_tensor   fg_find(const fg_graph *g, const char *full_name);

/* ---- running -------------------------------------------------------------------------------- */

/* name: "cpu", "cuda" or "cuda:N".  threads: for the CPU, 0 = as many as the machine has.
 * NULL only if out of memory; else ask fg_backend_status. */
FG_API fg_backend *fg_backend_open(const char *name, int threads);
FG_API void        fg_backend_close(fg_backend *b);
FG_API fg_status   fg_backend_status(const fg_backend *b);
FG_API const char *fg_backend_message(const fg_backend *b);
FG_API const char *fg_backend_name(const fg_backend *b);
FG_API const char *fg_backend_device(const fg_backend *b); /* what the device calls itself, or "" */
FG_API size_t      fg_backend_memory(fg_backend *b, size_t *total);   /* bytes free; 0: not known */
FG_API int         fg_backend_threads(const fg_backend *b);

FG_API fg_store   *fg_store_new(fg_backend *b);
FG_API void        fg_store_free(fg_store *s);
/* FG_BF16: plans made on s from now on keep activations and the operands of products in bf16;
 * parameters, their gradients, moments, gates, statistics and the residual stream stay f32.
 * FG_F32, the default: everything as the graph says. */
FG_API void        fg_store_precision(fg_store *s, fg_dtype t);
FG_API fg_status   fg_store_status(const fg_store *s);     /* the first error, or FG_OK */
FG_API const char *fg_store_message(const fg_store *s);
FG_API void        fg_store_clear_error(fg_store *s);
/* Makes every parameter of g that the store lacks, from its init and the seed. */
FG_API fg_status   fg_store_init(fg_store *s, const fg_graph *g, uint64_t seed);
FG_API fg_status   fg_store_put(fg_store *s, const char *name, fg_dtype t, fg_shape shape,
                                const void *data);
FG_API fg_status   fg_store_get(fg_store *s, const char *name, void *data, size_t bytes);
FG_API fg_status   fg_store_zero(fg_store *s, const char *prefix);  /* every entry so named */
/* Forgets and frees every entry so named; no plan that uses one of them may run again. */
FG_API void        fg_store_remove(fg_store *s, const char *prefix);
FG_API int         fg_store_count(const fg_store *s);
typedef struct { const char *name; fg_dtype type; fg_shape shape; bool state; } fg_store_entry;
FG_API bool        fg_store_at(const fg_store *s, int i, fg_store_entry *out);  /* sorted by name */
FG_API bool        fg_store_find(const fg_store *s, const char *name, fg_store_entry *out);

/* Files in the safetensors format.  Save writes every entry whose name has the prefix that it then
 * drops ("" for all parameters; states carry names beginning with "@"), to a new file, synced and
 * renamed over the old one.  Load checks the whole file before it touches the store. */
FG_API fg_status   fg_store_save(fg_store *s, const char *path, const char *prefix);
FG_API fg_status   fg_store_load(fg_store *s, const char *path, const char *prefix);

/* The same files without a store.  Opening checks the header against the size of the file; values
 * are read one entry at a time, never mapped.  NULL only if out of memory; else ask fg_file_status.
 * type: as the file has it, "F32", "BF16", ... */
typedef struct fg_file fg_file;
typedef struct { const char *name, *type; fg_shape shape; int64_t bytes; } fg_file_entry;
FG_API fg_file    *fg_file_open(const char *path);
FG_API void        fg_file_close(fg_file *f);
FG_API fg_status   fg_file_status(const fg_file *f);       /* of opening */
FG_API const char *fg_file_message(const fg_file *f);      /* of the last failure */
FG_API int         fg_file_count(const fg_file *f);
FG_API bool        fg_file_at(const fg_file *f, int i, fg_file_entry *out);     /* sorted by name */
FG_API bool        fg_file_find(const fg_file *f, const char *name, fg_file_entry *out);
/* One entry's values as float (FG_F32) or int32_t (FG_I32); bytes must be 4 * elements.  F32 F16
 * BF16 I64 I32 U16 U8 BOOL are read; an integer that does not fit, or a float asked for as integer,
 * is an error. */
FG_API fg_status   fg_file_read(fg_file *f, const char *name, fg_dtype as, void *data,
                                size_t bytes);
/* Writes arrays of float (FG_F32) or int32_t (FG_I32) to a new file, synced and renamed over the
 * old. */
typedef struct { const char *name; fg_dtype type; fg_shape shape; const void *data; } fg_array;
FG_API fg_status   fg_file_write(const char *path, int n, const fg_array *arrays,
                                 char message[400]);

typedef struct {
    size_t params, states, inputs, activations, scratch, total;   /* bytes */
    char   peak_node[200];                                       /* where activations peak */
    int64_t nodes;
    double flops, bytes;                                          /* of one run */
    size_t saved;                        /* of the activations: kept for the backward pass */
    double again_flops;                  /* of the operations: to compute again what is not kept */
} fg_plan_info;

/* Lowers, orders and lays out g.  NULL only if out of memory; else ask fg_plan_status.  The store
 * must hold g's parameters by the first fg_write, fg_read or fg_run; states are made then.  Borrows
 * both: what is added to g later is not part of the plan. */
FG_API fg_plan    *fg_plan_new(const fg_graph *g, fg_store *s);
FG_API void        fg_plan_free(fg_plan *p);
FG_API fg_status   fg_plan_status(const fg_plan *p);
FG_API const char *fg_plan_message(const fg_plan *p);
FG_API fg_plan_info fg_plan_describe(const fg_plan *p);
/* Takes the memory that runs need, which the first of them takes otherwise. */
FG_API fg_status   fg_plan_reserve(fg_plan *p);
/* Data are float or int32_t. */
FG_API fg_status   fg_write(fg_plan *p, fg_tensor input, const void *data, size_t bytes);
FG_API fg_status   fg_read(fg_plan *p, fg_tensor output, void *data, size_t bytes);
/* The same in order with the runs, without waiting for them: data are there after the next call
 * that waits (fg_run, fg_read of any plan on that device) and must stay valid until then. */
FG_API fg_status   fg_read_later(fg_plan *p, fg_tensor output, void *data, size_t bytes);
FG_API fg_status   fg_run(fg_plan *p);
/* The same without waiting for the device: errors of the run may show in a later call.  What is
 * written next, and what is read, waits for it. */
FG_API fg_status   fg_run_later(fg_plan *p);
/* Seconds spent in each node kind since the plan was made (needs FG_PROFILE=1 or this switch). */
FG_API void        fg_plan_profile(fg_plan *p, bool on);
FG_API bool        fg_plan_profile_at(const fg_plan *p, int i, const char **op, double *seconds,
                                      int64_t *calls, double *flops, double *bytes);

typedef enum { FG_STAGE_BUILT, FG_STAGE_LOWERED, FG_STAGE_PLANNED } fg_stage;
typedef enum { FG_DUMP_TEXT, FG_DUMP_JSON } fg_dump_format;
typedef void (*fg_put)(void *to, const char *text);        /* receives pieces of text in order */
FG_API fg_status   fg_graph_dump(const fg_graph *g, fg_dump_format f, fg_put put, void *to);
FG_API fg_status   fg_plan_dump(const fg_plan *p, fg_stage stage, fg_dump_format f, fg_put put,
                                void *to);

/* graph.json (docs/graph.schema.json) of several graphs that run one after another, such as a
 * training step in micro batches and its update: parameters and states of one name are one. */
typedef struct {
    const fg_graph *graph;               /* as it was built; or NULL, and */
    const fg_plan  *plan;                /* the plan whose graph is meant, at this stage */
    fg_stage        stage;
} fg_json_part;
typedef struct {
    const char *model, *device;          /* for the reader; or NULL */
    unsigned    passes;                  /* 1 forward + 2 backward + 4 update; 0: all */
    bool        stable;                  /* nothing that was measured */
} fg_json_options;
FG_API fg_status   fg_graph_json(int n, const fg_json_part *parts, const fg_json_options *o,
                                 fg_put put, void *to);
/* What later runs note for graph.json: seconds of every node (the least of all runs), and the
 * values that it made (of the last run: least, greatest, mean, root of the mean square, not
 * finite).  Noting values waits for every node and copies what it made. */
enum { FG_RECORD_TIMES = 1, FG_RECORD_VALUES = 2 };
FG_API fg_status   fg_plan_record(fg_plan *p, unsigned what);
FG_API bool fg_plan_recorded(const fg_plan *p); /* is anything noted? FG_RECORD=1: times */

#ifdef __cplusplus
}
#endif
#endif
