/* cli_options.c - the tables of commands and options, and all that is made from them: parsing,
 * help, "did you mean", the man page and completion. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "cli.h"

#define CLI_BIT(command) (1u << CLI_##command)

const cli_command_info cli_commands[CLI_COMMAND_COUNT] = {
#define CLI_COMMAND(id, arguments, summary, text) { #id, arguments, summary, text },
#define CLI_OPTION(id, name, letter, argument, commands, help)
#include "cli_options.def"
#undef CLI_COMMAND
#undef CLI_OPTION
};

/* The sets of commands are macros of cli_options.def, gone at its end; so they are kept as
 * constants. */
enum {
#define CLI_COMMAND(id, arguments, summary, text)
#define CLI_OPTION(id, name, letter, argument, commands, help) COMMANDS_##id = commands,
#include "cli_options.def"
#undef CLI_COMMAND
#undef CLI_OPTION
    COMMANDS_END
};

const cli_option_info cli_options[CLI_OPTION_COUNT] = {
#define CLI_COMMAND(id, arguments, summary, text)
#define CLI_OPTION(id, name, letter, argument, commands, help) \
    { name, letter, argument, COMMANDS_##id, help },
#include "cli_options.def"
#undef CLI_COMMAND
#undef CLI_OPTION
};

/* ---- did you mean ---------------------------------------------------------------------------- */

/* Edits (insert, delete, replace, swap of neighbours) from a to b, words up to 39 letters. */
static int distance(const char *a, const char *b)
{
    int d[40][40];
    const int n = (int)strlen(a), m = (int)strlen(b);
    if (n > 39 || m > 39) return 99;
    for (int i = 0; i <= n; i++) d[i][0] = i;
    for (int j = 0; j <= m; j++) d[0][j] = j;
    for (int i = 1; i <= n; i++) {
        for (int j = 1; j <= m; j++) {
            int best = d[i - 1][j - 1] + (a[i - 1] != b[j - 1]);
            if (d[i - 1][j] + 1 < best) best = d[i - 1][j] + 1;
            if (d[i][j - 1] + 1 < best) best = d[i][j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] &&
                d[i - 2][j - 2] + 1 < best)
                best = d[i - 2][j - 2] + 1;
            d[i][j] = best;
        }
    }
    return d[n][m];
}

const char *cli_nearest(const char *word, const char *(*next)(const void *of, int i),
                        const void *of)
{
    const char *nearest = NULL, *candidate;
    const size_t length = strlen(word);
    int best = length < 4 ? 2 : 3;                       /* so far and no further */
    for (int i = 0; (candidate = next(of, i)); i++) {
        int d = distance(word, candidate);
        if (length >= 3 && d > 1 && !strncmp(word, candidate, length)) d = 1;
        if (d < best) {
            best = d;
            nearest = candidate;
        }
    }
    return nearest;
}

static const char *next_command(const void *of, int i)
{
    (void)of;
    return i < CLI_COMMAND_COUNT ? cli_commands[i].name : NULL;
}

/* of: the int number of a command; options of other commands are seen as "". */
static const char *next_option(const void *of, int i)
{
    if (i >= CLI_OPTION_COUNT) return NULL;
    return cli_options[i].commands & (1u << *(const int *)of) ? cli_options[i].name : "";
}

/* ---- parsing --------------------------------------------------------------------------------- */

static int find_command(const char *name)
{
    for (int i = 0; i < CLI_COMMAND_COUNT; i++) if (!strcmp(name, cli_commands[i].name)) return i;
    return -1;
}

static int find_option(int command, const char *name, size_t length)
{
    for (int i = 0; i < CLI_OPTION_COUNT; i++)
        if (cli_options[i].commands & (1u << command) && strlen(cli_options[i].name) == length &&
            !strncmp(cli_options[i].name, name, length))
            return i;
    return -1;
}

static int find_letter(int command, char letter)
{
    for (int i = 0; i < CLI_OPTION_COUNT; i++)
        if (cli_options[i].commands & (1u << command) && cli_options[i].letter == letter) return i;
    return -1;
}

/* Which commands take an option of this name, as words; "" if none. */
static void commands_with(const char *name, char *buffer, size_t size)
{
    unsigned commands = 0;
    size_t n = 0;
    buffer[0] = 0;
    for (int i = 0; i < CLI_OPTION_COUNT; i++)
        if (!strcmp(cli_options[i].name, name)) commands |= cli_options[i].commands;
    for (int i = 0; i < CLI_COMMAND_COUNT; i++)
        if (commands & (1u << i) && n < size)
            n += (size_t)snprintf(buffer + n, size - n, "%s%s", n ? ", " : "",
                                  cli_commands[i].name);
}

static int unknown_option(const cli *c, const char *name, size_t length)
{
    char word[64], others[200];
    snprintf(word, sizeof word, "%.*s", (int)(length < 60 ? length : 60), name);
    const char *command = cli_commands[c->command].name;
    const char *near = cli_nearest(word, next_option, &c->command);
    if (near)
        return cli_fail(c, CLI_USAGE, "%s has no option --%s, did you mean --%s?", command, word,
                        near);
    commands_with(word, others, sizeof others);
    if (others[0])
        return cli_fail(c, CLI_USAGE, "%s has no option --%s; it belongs to %s", command, word,
                        others);
    return cli_fail(c, CLI_USAGE, "%s has no option --%s; see fox-graph %s --help", command, word,
                    command);
}

static void give(cli *c, int option, const char *value)
{
    c->given[c->n_given].option = option;
    c->given[c->n_given++].value = value;
}

/* "--name", "--name=value" or "--name value"; *i moves past a value that is an argument of its
 * own. */
static int long_option(cli *c, int argc, char **argv, int *i)
{
    const char *name = argv[*i] + 2, *equals = strchr(name, '=');
    const size_t length = equals ? (size_t)(equals - name) : strlen(name);
    int option = find_option(c->command, name, length);
    if (option < 0) return unknown_option(c, name, length);
    if (!cli_options[option].argument) {
        if (equals) return cli_fail(c, CLI_USAGE, "--%s takes no value", cli_options[option].name);
        give(c, option, "");
    } else if (equals) {
        give(c, option, equals + 1);
    } else if (*i + 1 < argc) {
        give(c, option, argv[++*i]);
    } else {
        return cli_fail(c, CLI_USAGE, "--%s needs a value: --%s %s", cli_options[option].name,
                        cli_options[option].name, cli_options[option].argument);
    }
    return CLI_OK;
}

/* "-v", "-qv", "-o value" or "-ovalue". */
static int short_options(cli *c, int argc, char **argv, int *i)
{
    for (const char *p = argv[*i] + 1; *p; p++) {
        int option = find_letter(c->command, *p);
        if (option < 0)
            return cli_fail(c, CLI_USAGE, "%s has no option -%c; see fox-graph %s --help",
                            cli_commands[c->command].name, *p, cli_commands[c->command].name);
        if (!cli_options[option].argument) {
            give(c, option, "");
            continue;
        }
        if (p[1]) give(c, option, p + 1);
        else if (*i + 1 < argc) give(c, option, argv[++*i]);
        else
            return cli_fail(c, CLI_USAGE, "-%c needs a value: -%c %s", *p, *p,
                            cli_options[option].argument);
        break;
    }
    return CLI_OK;
}

static int check_color(cli *c)
{
    const char *when = cli_text(c, OPT_color);
    if (!when || !strcmp(when, "auto")) return CLI_OK;
    if (strcmp(when, "always") && strcmp(when, "never"))
        return cli_fail(c, CLI_USAGE, "--color is auto, always or never, not '%s'", when);
    c->color = when[0] == 'a';
    return CLI_OK;
}

/* How many arguments a command takes is read off its line: "MODEL" one, "[OP...]" any number. */
static int check_arguments(const cli *c)
{
    const cli_command_info *k = &cli_commands[c->command];
    const bool optional = k->arguments[0] == '[', many = strstr(k->arguments, "...") != NULL;
    const bool pair = !strcmp(k->arguments, "A B");
    if (!optional && c->n_args < 1)
        return cli_fail(c, CLI_USAGE, "%s needs %s; see fox-graph %s --help", k->name, k->arguments,
                        k->name);
    if (pair && c->n_args != 2)
        return cli_fail(c, CLI_USAGE, "%s needs A and B, %d were given", k->name, c->n_args);
    if (!many && !pair && c->n_args > 1)
        return cli_fail(c, CLI_USAGE, "%s takes one %s, '%s' is too much", k->name,
                        k->arguments[0] == '[' ? "COMMAND" : k->arguments, c->args[1]);
    return CLI_OK;
}

static int no_command(cli *c, const char *word)
{
    if (!word) {
        cli_print_help(stderr, -1);
        return CLI_USAGE;
    }
    const char *near = cli_nearest(word, next_command, NULL);
    if (near) return cli_fail(c, CLI_USAGE, "no command '%s', did you mean %s?", word, near);
    return cli_fail(c, CLI_USAGE, "no command '%s'; see fox-graph --help", word);
}

static void print_version(void)
{
    printf("fox-graph %s\nmodel ABI %u\n", fg_version(), (unsigned)FG_ABI);
}

int cli_parse(cli *c, int argc, char **argv)
{
    int status = CLI_OK;
    *c = (cli){ .command = -1, .argv = argv, .color = cli_color_wanted() };
    c->given = calloc((size_t)argc + 1, sizeof *c->given);
    c->args = calloc((size_t)argc + 1, sizeof *c->args);
    if (!c->given || !c->args) return cli_fail(c, CLI_DEVICE, "out of memory");
    if (argc < 2) return no_command(c, NULL);
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h")) {
        cli_print_help(stdout, -1);
        return CLI_OK;
    }
    if (!strcmp(argv[1], "--version")) {
        print_version();
        return CLI_OK;
    }
    if (argv[1][0] == '-')
        return cli_fail(c, CLI_USAGE, "the command comes first, before %s", argv[1]);
    c->command = find_command(argv[1]);
    if (c->command < 0) return no_command(c, argv[1]);
    bool plain = false;                                  /* after "--" */
    int i = 2;
    while (i < argc && !status) {
        if (plain || argv[i][0] != '-' || !argv[i][1]) c->args[c->n_args++] = argv[i];
        else if (!strcmp(argv[i], "--")) plain = true;
        else if (argv[i][1] == '-') status = long_option(c, argc, argv, &i);
        else status = short_options(c, argc, argv, &i);
        i++;
    }
    if (status) return status;
    c->quiet = cli_has(c, OPT_quiet);
    c->json = cli_has(c, OPT_json);
    if (cli_has(c, OPT_help)) {
        cli_print_help(stdout, c->command);
        return CLI_OK;
    }
    status = check_color(c);
    if (!status) status = check_arguments(c);
    return status ? status : -1;
}

void cli_done(cli *c)
{
    free(c->given);
    free(c->args);
}

bool cli_has(const cli *c, int option)
{
    return cli_text(c, option) != NULL;
}

const char *cli_text(const cli *c, int option)
{
    for (int i = c->n_given - 1; i >= 0; i--)
        if (c->given[i].option == option) return c->given[i].value;
    return NULL;
}

const char *cli_nth(const cli *c, int option, int n)
{
    for (int i = 0; i < c->n_given; i++)
        if (c->given[i].option == option && n-- == 0) return c->given[i].value;
    return NULL;
}

bool cli_int(const cli *c, int option, int64_t lo, int64_t hi, int64_t *value)
{
    const char *text = cli_text(c, option);
    char *end;
    if (!text) return true;
    errno = 0;
    long long v = strtoll(text, &end, 10);
    if (end == text || *end || errno || v < lo || v > hi) {
        if (hi == INT64_MAX)
            cli_fail(c, CLI_USAGE, "--%s is a whole number of at least %lld, not '%s'",
                     cli_options[option].name, (long long)lo, text);
        else
            cli_fail(c, CLI_USAGE, "--%s is a whole number from %lld to %lld, not '%s'",
                     cli_options[option].name, (long long)lo, (long long)hi, text);
        return false;
    }
    *value = v;
    return true;
}

bool cli_real(const cli *c, int option, double lo, double hi, double *value)
{
    const char *text = cli_text(c, option);
    char *end;
    if (!text) return true;
    double v = strtod(text, &end);
    if (end == text || *end || !(v >= lo && v <= hi)) {
        cli_fail(c, CLI_USAGE, "--%s is a number from %g to %g, not '%s'", cli_options[option].name,
                 lo, hi, text);
        return false;
    }
    *value = v;
    return true;
}

/* ---- help, man page, completion -------------------------------------------------------------- */

static const char *const about =
    "MODEL is a C file that defines fg_model or fg_loss, a compiled .so of one, the name of a\n"
    "preset, a checkpoint's folder (config.json and model.safetensors) or a run's folder.\n"
    "Running a model file runs its code, with all rights of the caller: run only files that you\n"
    "trust.";

static const char *const statuses[][2] = {
    { "0",  "done" },
    { "1",  "a check found a difference" },
    { "2",  "wrong usage" },
    { "3",  "the model file did not compile, or is not a model for this version" },
    { "4",  "the graph is wrong: shapes, types, no gradient" },
    { "5",  "a file is missing, unreadable or not valid" },
    { "6",  "the device failed or memory ran out" },
    { "7",  "a value is not finite" },
    { "75", "stopped early, can be resumed with --resume" },
};

static const char *const variables[][2] = {
    { "FOX_DEVICE",      "device, where --device is not given" },
    { "FOX_CC",          "compiler of model files (default cc)" },
    { "FOX_CFLAGS",      "more flags for it" },
    { "FOX_INCLUDE",     "folder of fox_graph.h" },
    { "FOX_CACHE_DIR",   "folder of compiled models (default ~/.cache/fox-graph)" },
    { "OMP_NUM_THREADS", "CPU threads, where --threads is not given" },
    { "NO_COLOR",        "no colours" },
};

#define LENGTH(a) ((int)(sizeof(a) / sizeof((a)[0])))

/* "-o, --out RUNDIR" */
static void option_text(const cli_option_info *o, char *buffer, size_t size)
{
    char letter[8] = "    ";
    if (o->letter) snprintf(letter, sizeof letter, "-%c, ", o->letter);
    snprintf(buffer, size, "%s--%s%s%s", letter, o->name, o->argument ? " " : "",
             o->argument ? o->argument : "");
}

static void print_top_help(FILE *to)
{
    fprintf(to, "usage: fox-graph COMMAND ...\n\ncommands:\n");
    for (int i = 0; i < CLI_COMMAND_COUNT; i++)
        fprintf(to, "  %-10s %s\n", cli_commands[i].name, cli_commands[i].summary);
    fprintf(to,
            "\n%s\n\nfox-graph COMMAND --help explains a command; fox-graph --version prints the "
            "version.\n",
            about);
    fprintf(to, "\nexit status:\n");
    for (int i = 0; i < LENGTH(statuses); i++)
        fprintf(to, "  %-3s %s\n", statuses[i][0], statuses[i][1]);
    fprintf(to, "\nenvironment:\n");
    for (int i = 0; i < LENGTH(variables); i++)
        fprintf(to, "  %-16s %s\n", variables[i][0], variables[i][1]);
}

static void print_presets(FILE *to)
{
    fprintf(to, "\npresets:\n");
    for (int i = 0; i < fg_preset_count(); i++) fprintf(to, "  %s\n", fg_preset_at(i)->name);
}

void cli_print_help(FILE *to, int command)
{
    if (command < 0) {
        print_top_help(to);
        return;
    }
    const cli_command_info *k = &cli_commands[command];
    fprintf(to, "usage: fox-graph %s [OPTION...] %s\n\n%s\n", k->name, k->arguments, k->text);
    if (strstr(k->arguments, "MODEL")) fprintf(to, "\n%s\n", about);
    if (command == CLI_info) print_presets(to);
    fprintf(to, "\noptions:\n");
    for (int i = 0; i < CLI_OPTION_COUNT; i++) {
        char text[64];
        if (!(cli_options[i].commands & (1u << command))) continue;
        option_text(&cli_options[i], text, sizeof text);
        fprintf(to, "  %-26s %s\n", text, cli_options[i].help);
    }
}

/* Text for troff: "-" is a minus, and a line must not begin with a control character. */
static void print_roff(FILE *to, const char *text)
{
    if (*text == '.' || *text == '\'') fputs("\\&", to);
    for (; *text; text++) {
        if (*text == '-') fputs("\\-", to);
        else if (*text == '\\') fputs("\\e", to);
        else fputc(*text, to);
    }
}

static void print_pair(FILE *to, const char *name, const char *text)
{
    fputs(".TP\n.B ", to);
    print_roff(to, name);
    fputc('\n', to);
    print_roff(to, text);
    fputc('\n', to);
}

void cli_print_man(FILE *to)
{
    fprintf(to,
            ".TH FOX\\-GRAPH 1 \"\" \"fox-graph %s\"\n.SH NAME\n"
            "fox\\-graph \\- train, evaluate and inspect models written as graphs in C\n"
            ".SH SYNOPSIS\n.B fox\\-graph\n.I COMMAND\n[\\fIOPTION\\fR...] "
            "[\\fIARGUMENT\\fR...]\n.SH DESCRIPTION\n",
            fg_version());
    print_roff(to, about);
    fputs("\n.SH COMMANDS\n", to);
    for (int k = 0; k < CLI_COMMAND_COUNT; k++) {
        fputs(".SS ", to);
        print_roff(to, cli_commands[k].name);
        fputc(' ', to);
        print_roff(to, cli_commands[k].arguments);
        fputc('\n', to);
        print_roff(to, cli_commands[k].text);
        fputc('\n', to);
        for (int i = 0; i < CLI_OPTION_COUNT; i++) {
            char text[64];
            if (!(cli_options[i].commands & (1u << k))) continue;
            option_text(&cli_options[i], text, sizeof text);
            print_pair(to, text + strspn(text, " "), cli_options[i].help);
        }
    }
    fputs(".SH EXIT STATUS\n", to);
    for (int i = 0; i < LENGTH(statuses); i++) print_pair(to, statuses[i][0], statuses[i][1]);
    fputs(".SH ENVIRONMENT\n", to);
    for (int i = 0; i < LENGTH(variables); i++) print_pair(to, variables[i][0], variables[i][1]);
}

void cli_print_bash(FILE *to)
{
    fputs("# bash completion for fox-graph; source it or put it into bash-completion's folder\n"
          "_fox_graph()\n{\n    local word=${COMP_WORDS[COMP_CWORD]} options=\n    COMPREPLY=()\n"
          "    if [ \"$COMP_CWORD\" -eq 1 ]; then\n        COMPREPLY=($(compgen -W \"", to);
    for (int k = 0; k < CLI_COMMAND_COUNT; k++) fprintf(to, "%s ", cli_commands[k].name);
    fputs(
        "--help --version\" -- \"$word\"))\n        return\n    fi\n    case ${COMP_WORDS[1]} in\n",
        to);
    for (int k = 0; k < CLI_COMMAND_COUNT; k++) {
        fprintf(to, "    %s) options=\"", cli_commands[k].name);
        const char *blank = "";
        for (int i = 0; i < CLI_OPTION_COUNT; i++) {
            if (!(cli_options[i].commands & (1u << k))) continue;
            fprintf(to, "%s--%s", blank, cli_options[i].name);
            blank = " ";
        }
        fputs("\" ;;\n", to);
    }
    fputs("    esac\n    if [[ $word == -* ]]; then\n        COMPREPLY=($(compgen -W \"$options\" "
          "-- \"$word\"))\n"
          "    else\n        COMPREPLY=($(compgen -f -- \"$word\"))\n    fi\n}\n"
          "complete -o filenames -F _fox_graph fox-graph\n",
          to);
}
