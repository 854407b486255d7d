/* fuzz_graph.c - any bytes as graph.json: refused with a message, or drawn in every format and
 * compared with itself, and pictures hold no script of the file's. */
#include "fox_view.h"
#include "fuzz.h"

typedef struct { size_t n; bool script; } seen;

static void look(void *to, const char *text)
{
    seen *s = to;
    s->n += strlen(text);
    s->script |= strstr(text, "<script") != NULL;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    fg_view *v = NULL;
    char message[400];
    const fg_status s = fg_view_read((const char *)data, n, &v, message);
    HOLDS((s == FG_OK) == (message[0] == '\0'));
    HOLDS((s == FG_OK) == (v != NULL));
    if (!v)
        return 0;
    for (int depth = -1; depth < 2; depth++) {
        const fg_view_options o = { .depth = depth, .heat = FG_HEAT_FLOPS, .memory = true };
        seen text = { 0 }, dot = { 0 }, svg = { 0 }, html = { 0 };
        HOLDS(fg_view_text(v, &o, look, &text) == FG_OK && text.n);
        HOLDS(fg_view_dot(v, &o, look, &dot) == FG_OK && dot.n);
        HOLDS(fg_view_svg(v, &o, look, &svg) == FG_OK && svg.n && !svg.script);
        HOLDS(fg_view_html(v, &o, look, &html) == FG_OK && html.n > svg.n / 2);
    }
    bool differ = true;
    seen told = { 0 };
    HOLDS(fg_view_diff(v, v, FG_DIFF_TEXT, look, &told, &differ) == FG_OK);
    HOLDS(told.n > 0);
    fg_view_free(v);
    return 0;
}
