/* cmd_help.c - fox-graph help: pages made from the tables of commands and options. */
#include <string.h>
#include "cli.h"

static const char *next_command(const void *of, int i)
{
    (void)of;
    return i < CLI_COMMAND_COUNT ? cli_commands[i].name : NULL;
}

int cmd_help(const cli *c)
{
    if (cli_has(c, OPT_man)) {
        cli_print_man(stdout);
    } else if (cli_has(c, OPT_bash)) {
        cli_print_bash(stdout);
    } else if (!c->n_args) {
        cli_print_help(stdout, -1);
    } else {
        const char *near = cli_nearest(c->args[0], next_command, NULL);
        for (int i = 0; i < CLI_COMMAND_COUNT; i++) {
            if (strcmp(c->args[0], cli_commands[i].name)) continue;
            cli_print_help(stdout, i);
            return CLI_OK;
        }
        if (near)
            return cli_fail(c, CLI_USAGE, "no command '%s', did you mean %s?", c->args[0], near);
        return cli_fail(c, CLI_USAGE, "no command '%s'; see fox-graph --help", c->args[0]);
    }
    return CLI_OK;
}
