/* main.c - fox-graph COMMAND: parses, dispatches, ends. */
#include "cli.h"

int main(int argc, char **argv)
{
    static int (*const commands[CLI_COMMAND_COUNT])(const cli *c) = {
#define CLI_COMMAND(id, arguments, summary, text) cmd_##id,
#define CLI_OPTION(id, name, letter, argument, commands, help)
#include "cli_options.def"
#undef CLI_COMMAND
#undef CLI_OPTION
    };
    cli c;
    int status = cli_parse(&c, argc, argv);
    if (status < 0) status = commands[c.command](&c);
    if (!status) status = cli_flush(&c);
    cli_done(&c);
    return status;
}
