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
#endif
