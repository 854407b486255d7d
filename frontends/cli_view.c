/* cli_view.c - graph.json for the commands: from files, and in memory. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "cli_view.h"

enum { MOST_BYTES = 1 << 30 };

static bool reserve(cli_buffer *b, size_t n)
{
    if (b->failed) return false;
    if (b->n + n + 1 <= b->capacity) return true;
    size_t capacity = b->capacity ? b->capacity : 1 << 16;
    while (capacity < b->n + n + 1) capacity *= 2;
    char *more = realloc(b->text, capacity);
    if (!more) { b->failed = true; return false; }
    b->text = more;
    b->capacity = capacity;
    return true;
}

void cli_add(void *buffer, const char *text)
{
    cli_buffer *b = buffer;
    const size_t n = strlen(text);
    if (!reserve(b, n)) return;
    memcpy(b->text + b->n, text, n + 1);
    b->n += n;
}

bool cli_is_graph(const char *path)
{
    const size_t n = strlen(path);
    return !strcmp(path, "-") || (n > 5 && !strcmp(path + n - 5, ".json"));
}

int cli_read_file(const cli *c, const char *path, cli_buffer *to)
{
    FILE *f = strcmp(path, "-") ? fopen(path, "rb") : stdin;
    if (!f) return cli_fail(c, CLI_FILE, "%s cannot be read: %s", path, strerror(errno));
    size_t got = 1;
    while (got > 0 && to->n < MOST_BYTES && reserve(to, 1 << 16)) {
        got = fread(to->text + to->n, 1, 1 << 16, f);
        to->n += got;
    }
    const bool bad = ferror(f), large = to->n >= MOST_BYTES;
    if (f != stdin) fclose(f);
    if (to->text) to->text[to->n] = 0;
    if (to->failed) return cli_fail(c, CLI_DEVICE, "out of memory");
    if (bad) return cli_fail(c, CLI_FILE, "%s cannot be read: %s", path, strerror(errno));
    if (large) return cli_fail(c, CLI_FILE, "%s is longer than 1 GiB", path);
    if (!to->n) return cli_fail(c, CLI_FILE, "%s is empty", path);
    return CLI_OK;
}

int cli_read_view(const cli *c, const char *path, fg_view **v)
{
    cli_buffer text = { 0 };
    char message[400];
    *v = NULL;
    int status = cli_read_file(c, path, &text);
    const fg_status s = status ? FG_OK : fg_view_read(text.text, text.n, v, message);
    if (s) status = cli_fail(c, cli_exit_of(s), "%s: %s", path, message);
    free(text.text);
    return status;
}
