/* cli_text.c - messages, numbers for people, JSON results. */
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "cli.h"

bool cli_color_wanted(void)
{
    const char *no = getenv("NO_COLOR"), *term = getenv("TERM");
    if (no && *no) return false;
    return isatty(STDERR_FILENO) && term && strcmp(term, "dumb") != 0;
}

static void say(const cli *c, const char *color, const char *fmt, va_list ap)
{
    fflush(stdout);
    if (c->color) fprintf(stderr, "\033[%smfox-graph:\033[0m ", color);
    else fputs("fox-graph: ", stderr);
    vfprintf(stderr, fmt, ap);
    fputc('\n', stderr);
}

int cli_fail(const cli *c, int status, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    say(c, "1;31", fmt, ap);
    va_end(ap);
    return status;
}

void cli_note(const cli *c, const char *fmt, ...)
{
    if (c->quiet) return;
    va_list ap;
    va_start(ap, fmt);
    say(c, "1", fmt, ap);
    va_end(ap);
}

void cli_more(const cli *c, const char *fmt, ...)
{
    if (!cli_has(c, OPT_verbose)) return;
    va_list ap;
    va_start(ap, fmt);
    say(c, "2", fmt, ap);
    va_end(ap);
}

int cli_exit_of(fg_status s)
{
    switch (s) {
    case FG_OK:          return CLI_OK;
    case FG_ERR_SHAPE:
    case FG_ERR_DTYPE:
    case FG_ERR_USAGE:
    case FG_ERR_NO_VJP:
    case FG_ERR_NO_KERNEL: return CLI_GRAPH;
    case FG_ERR_IO: case FG_ERR_FORMAT:
        return CLI_FILE;
    case FG_ERR_NUMERIC: return CLI_NUMERIC;
    case FG_ERR_STOPPED: return CLI_RESUMABLE;
    default:             return CLI_DEVICE;
    }
}

const char *cli_bytes(char buffer[32], double bytes)
{
    static const char *const unit[] = { "B", "KiB", "MiB", "GiB", "TiB", "PiB" };
    int i = 0;
    while (bytes >= 1024 && i < 5) {
        bytes /= 1024;
        i++;
    }
    snprintf(buffer, 32, i && bytes < 100 ? "%.1f %s" : "%.0f %s", bytes, unit[i]);
    return buffer;
}

const char *cli_amount(char buffer[32], double n)
{
    static const char *const unit[] = { "", "k", "M", "G", "T", "P" };
    int i = 0;
    while (n >= 999.95 && i < 5) {
        n /= 1000;
        i++;
    }
    snprintf(buffer, 32, i ? "%.1f%s" : "%.0f%s", n, unit[i]);
    return buffer;
}

const char *cli_shape(char buffer[128], fg_shape s)
{
    size_t n = (size_t)snprintf(buffer, 128, "[");
    for (int i = 0; i < s.rank && n < 120; i++)
        n += (size_t)snprintf(buffer + n, 128 - n, i ? ",%lld" : "%lld", (long long)s.dim[i]);
    if (n < 127) snprintf(buffer + n, 128 - n, "]");
    return buffer;
}

/* Names of files and text of users are not always UTF-8; JSON strings are. */
json_t *cli_json_text(const char *text)
{
    json_t *s = json_string(text ? text : "");
    if (s) return s;
    const size_t n = strlen(text);
    char *safe = malloc(n + 1);
    if (!safe) return NULL;
    for (size_t i = 0; i <= n; i++) safe[i] = (unsigned char)text[i] < 128 ? text[i] : '?';
    s = json_string(safe);
    free(safe);
    return s;
}

json_t *cli_json_real(double x)
{
    return isfinite(x) ? json_real(x) : json_null();
}

int cli_print_json(const cli *c, json_t *value)
{
    const size_t how = JSON_INDENT(1) | JSON_ENCODE_ANY | JSON_REAL_PRECISION(9);
    char *text = value ? json_dumps(value, how) : NULL;
    json_decref(value);
    if (!text) return cli_fail(c, CLI_DEVICE, "out of memory");
    puts(text);
    free(text);
    return cli_flush(c);
}

int cli_flush(const cli *c)
{
    if (fflush(stdout) || ferror(stdout))
        return cli_fail(c, CLI_FILE, "the results could not be written to standard output");
    return CLI_OK;
}

void cli_print_plan(FILE *to, const fg_plan_info *i)
{
    const struct { const char *name; size_t bytes; } part[] = {
        { "parameters", i->params },
        { "optimizer and other state", i->states },
        { "inputs", i->inputs },
        { "activations", i->activations },
        { "  kept for backward", i->saved },
        { "scratch", i->scratch },
        { "total", i->total },
    };
    char text[32];
    for (size_t k = 0; k < sizeof part / sizeof part[0]; k++)
        fprintf(to, "  %-26s %12s\n", part[k].name, cli_bytes(text, (double)part[k].bytes));
    if (i->peak_node[0]) fprintf(to, "  activations peak at        %s\n", i->peak_node);
}

json_t *cli_plan_json(const fg_plan_info *i)
{
    return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:o, s:I, s:o, s:o, s:o}",
                     "params", (json_int_t)i->params,
                     "states", (json_int_t)i->states,
                     "inputs", (json_int_t)i->inputs,
                     "activations", (json_int_t)i->activations,
                     "saved", (json_int_t)i->saved,
                     "scratch", (json_int_t)i->scratch,
                     "total", (json_int_t)i->total,
                     "peak_node", cli_json_text(i->peak_node),
                     "nodes", (json_int_t)i->nodes,
                     "flops", cli_json_real(i->flops),
                     "again_flops", cli_json_real(i->again_flops),
                     "bytes", cli_json_real(i->bytes));
}

double cli_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void cli_put(void *file, const char *text)
{
    fputs(text, file);
}
