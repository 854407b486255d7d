/* cli.h - what the commands of fox-graph share: arguments, messages, models, settings. */
#ifndef FOX_CLI_H
#define FOX_CLI_H
#include <jansson.h>
#include "fox_train.h"

/* Exit statuses; docs/errors.md explains them. */
enum {
    CLI_OK, CLI_DIFFERENT, CLI_USAGE, CLI_COMPILE, CLI_GRAPH, CLI_FILE, CLI_DEVICE, CLI_NUMERIC,
    CLI_RESUMABLE = 75
};

/* ---- arguments (cli_options.c) --------------------------------------------------------------- */

enum {
#define CLI_COMMAND(id, arguments, summary, text) CLI_##id,
#define CLI_OPTION(id, name, letter, argument, commands, help)
#include "cli_options.def"
#undef CLI_COMMAND
#undef CLI_OPTION
    CLI_COMMAND_COUNT
};

enum {
#define CLI_COMMAND(id, arguments, summary, text)
#define CLI_OPTION(id, name, letter, argument, commands, help) OPT_##id,
#include "cli_options.def"
#undef CLI_COMMAND
#undef CLI_OPTION
    CLI_OPTION_COUNT
};

#ifdef FG_DOUBLE
enum { CLI_DOUBLE = true };              /* the twin in double */
#else
enum { CLI_DOUBLE = false };
#endif

typedef struct { const char *name, *arguments, *summary, *text; } cli_command_info;
typedef struct {
    const char *name;
    char letter;
    const char *argument;
    unsigned commands;
    const char *help;
} cli_option_info;
extern const cli_command_info cli_commands[CLI_COMMAND_COUNT];
extern const cli_option_info cli_options[CLI_OPTION_COUNT];

typedef struct cli {
    int          command;
    int          n_given, n_args;
    struct cli_given { int option; const char *value; } *given;   /* in order; "" for a switch */
    const char **args;                                  /* the other arguments, in order */
    char       **argv;                                  /* as main received them */
    bool         color, quiet, json;
} cli;

/* Fills c from the command line.  -1: go on; else the exit status to end with (help was printed,
 * or an error).  cli_done frees what c holds. */
int         cli_parse(cli *c, int argc, char **argv);
void        cli_done(cli *c);
bool        cli_has(const cli *c, int option);
const char *cli_text(const cli *c, int option);       /* the last value, NULL if not given */
const char *cli_nth(const cli *c, int option, int i); /* the i-th value, NULL past the last */
/* A whole number or real in [lo, hi] from an option: false after printing what is wrong. */
bool        cli_int(const cli *c, int option, int64_t lo, int64_t hi, int64_t *value);
bool        cli_real(const cli *c, int option, double lo, double hi, double *value);
/* The candidate nearest to a mistyped word, NULL if none is near.  next returns the i-th
 * candidate. */
const char *cli_nearest(const char *word, const char *(*next)(const void *of, int i),
                        const void *of);
void        cli_print_help(FILE *to, int command);              /* -1: the command as a whole */
void        cli_print_man(FILE *to);
void        cli_print_bash(FILE *to);

/* ---- messages (cli_text.c): results go to stdout, all else to stderr ------------------------- */

/* Prints "fox-graph: ..." and returns the exit status it was given. */
int  cli_fail(const cli *c, int status, const char *fmt, ...) FG_PRINTF(3, 4);
void cli_note(const cli *c, const char *fmt, ...) FG_PRINTF(2, 3);   /* unless --quiet */
void cli_more(const cli *c, const char *fmt, ...) FG_PRINTF(2, 3);   /* only with --verbose */
int  cli_exit_of(fg_status s);
const char *cli_bytes(char buffer[32], double bytes);           /* "1.5 GiB" */
const char *cli_amount(char buffer[32], double n);              /* "763.2M" */
const char *cli_shape(char buffer[128], fg_shape s);            /* "[2,8,768]" */
/* Prints a JSON value and a newline on stdout and releases it; the status to end with. */
int  cli_print_json(const cli *c, json_t *value);
json_t *cli_json_text(const char *text); /* bytes that are not UTF-8 become "?" */
json_t *cli_json_real(double x);                                /* null where it is not finite */
int cli_flush(const cli *c); /* CLI_FILE if stdout takes no more */
bool cli_color_wanted(void);                                    /* by terminal and environment */
void cli_print_plan(FILE *to, const fg_plan_info *info);
json_t *cli_plan_json(const fg_plan_info *info);
/* Catches SIGINT, SIGTERM and SIGUSR1: the signal's number arrives here; a second one ends at
 * once. */
const volatile sig_atomic_t *cli_catch_signals(void);
double cli_now(void); /* seconds of a clock that only runs on */
/* An fg_put that appends to a FILE. */
void cli_put(void *file, const char *text);

/* ---- models (cli_load.c, cli_model.c) -------------------------------------------------------- */

typedef struct {
    void *handle;                                               /* of dlopen */
    fg_tensor (*model)(fg_tensor tokens);
    fg_tensor (*loss)(fg_graph *g, const fg_recipe *r);
    fg_status (*feed)(fg_plan *p, const fg_graph *g, const fg_recipe *r, int64_t batch, bool eval);
    void      (*configure)(fg_recipe *r);
} cli_code;

/* Compiles a C file into the cache if it is not there yet and loads it, or loads a .so. */
int  cli_load(const cli *c, const char *path, cli_code *code);
void cli_unload(cli_code *code);

/* Where a value came from, weakest first; each overrides those before it. */
typedef enum {
    CLI_FROM_DEFAULT, CLI_FROM_PRESET, CLI_FROM_MODEL, CLI_FROM_RUN, CLI_FROM_CONFIG,
    CLI_FROM_USER, CLI_FROM_COUNT
} cli_origin;
const char *cli_origin_name(cli_origin o);

enum { CLI_MAX_KEYS = 64, CLI_MAX_SETTINGS = 256 };

typedef struct {
    struct fg_model model;              /* what the library's functions take; settings included */
    fg_recipe       recipe;             /* after all sources */
    cli_origin      recipe_origin[CLI_MAX_KEYS];       /* of fg_recipe_key(i)'s value */
    fg_setting      settings[CLI_MAX_SETTINGS];        /* for the model, not the recipe */
    cli_origin      setting_origin[CLI_MAX_SETTINGS];
    cli_code        code;
    fg_config       config;             /* of a checkpoint without a source */
    char           *path;               /* as given */
    char           *source;             /* the C file, NULL if there is none */
    char           *folder;             /* of a checkpoint, NULL if there is none */
    char           *weights;            /* safetensors file, NULL if the model has no weights yet */
} cli_model;

/* Finds and loads MODEL and settles recipe and settings.  CLI_OK or an exit status, with the reason
 * printed.  cli_close takes a model that never opened, too. */
int  cli_open(const cli *c, const char *path, cli_model *m);
void cli_close(cli_model *m);
/* Every key=value that the user gave must have been read while g was built. */
int  cli_check_settings(const cli *c, const fg_graph *g);
/* Prints a graph's errors, all of them, each with its place; the exit status, CLI_OK if there are
 * none. g may be NULL: out of memory.  what: "forward graph". */
int  cli_check_graph(const cli *c, const fg_graph *g, const char *what);
/* A model's graph, checked: NULL after printing why, with the status to end with in *status. */
fg_graph *cli_forward(const cli *c, const cli_model *m, int64_t batch, int64_t context,
                      int *status);
fg_graph *cli_loss(const cli *c, const cli_model *m, int64_t batch, int64_t context, int *status);
int  cli_check_trained(const cli *c, const cli_model *m, const fg_graph *g);
fg_graph *cli_training(const cli *c, const cli_model *m, fg_graph **update, int *status);

/* Columns of a language model's logits; 0 for another model or one that does not build. */
int64_t cli_vocab(const cli_model *m);
/* By --device, --threads and the environment; NULL after printing why. */
fg_backend *cli_backend(const cli *c, int *status);
/* What plans on s compute in: --precision, else bf16 on a GPU. */
void cli_precision(const cli *c, fg_store *s, const fg_backend *b);
/* A store with g's parameters: from the model's weights, else from the seed; NULL after printing
 * why. */
fg_store *cli_store(const cli *c, const cli_model *m, fg_backend *b, const fg_graph *g,
                    int *status);

/* cmd_bench_decode.c: bench --decode-at; the status to end with. */
int cli_bench_decoding(const cli *c, int64_t behind);

/* ---- commands (cmd_*.c) ---------------------------------------------------------------------- */

#define CLI_COMMAND(id, arguments, summary, text) int cmd_##id(const cli *c);
#define CLI_OPTION(id, name, letter, argument, commands, help)
#include "cli_options.def"
#undef CLI_COMMAND
#undef CLI_OPTION

#endif
