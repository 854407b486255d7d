/* cli_view.h - graph.json for the commands: from files, and in memory. */
#ifndef FOX_CLI_VIEW_H
#define FOX_CLI_VIEW_H
#include "cli.h"
#include "fox_view.h"

typedef struct { char *text; size_t n, capacity; bool failed; } cli_buffer;
/* An fg_put that appends to a cli_buffer, whose text is then ended by 0 or NULL. */
void cli_add(void *buffer, const char *text);
bool cli_is_graph(const char *path);     /* its name ends in .json, or it is - */
/* CLI_OK or an exit status after printing why. */
int  cli_read_file(const cli *c, const char *path, cli_buffer *to);
int  cli_read_view(const cli *c, const char *path, fg_view **v);

/* The place of an option's value in a list of words; `otherwise` if the option is not given, -1 if
 * the value is none of them. */
int  cli_choice(const cli *c, int option, int n, const char *const *words, int otherwise);

/* Which graphs of a model (cli_graph.c). */
enum { CLI_BUILT, CLI_GRADIENT, CLI_LOWERED, CLI_PLANNED };
enum { CLI_FORWARD, CLI_TRAIN, CLI_OPT, CLI_PASS_ALL };
typedef struct {
    const cli *c;
    int  stage, pass;
    bool stage_given, run, values, stable;
} cli_graph_wish;
/* From --stage and --pass; whole: all passes where --pass is not given.  False after printing
 * why. */
bool cli_read_graph_wish(const cli *c, bool whole, cli_graph_wish *w);
/* graph.json of a file or a model.  The text may be there although the status is CLI_GRAPH: a graph
 * with errors, which have been printed. */
int  cli_graph_json(const cli *c, const char *path, const cli_graph_wish *w, cli_buffer *json);
#endif
