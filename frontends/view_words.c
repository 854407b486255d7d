/* view_words.c - what is written on things: shapes, amounts, labels, heat; and the writers'
 * escapes. */
#include <inttypes.h>
#include <math.h>
#include "view.h"

void fg__view_say(const view_out *w, const char *fmt, ...)
{
    char text[2000];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    w->put(w->to, text);
}

/* Bytes of the well-formed character at s. */
static int length(const char *s)
{
    const unsigned char c = (unsigned char)*s;
    return c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
}

/* Marks that turn or hide text, which no name should be able to do: U+200B..200F, 202A..202E,
 * 2060..206F, FEFF. */
static bool invisible(const char *s)
{
    const unsigned char *c = (const unsigned char *)s;
    if (c[0] == 0xe2 && c[1] == 0x80)
        return (c[2] >= 0x8b && c[2] <= 0x8f) || (c[2] >= 0xa8 && c[2] <= 0xae);
    if (c[0] == 0xe2 && c[1] == 0x81) return c[2] >= 0xa0 && c[2] <= 0xaf;
    return c[0] == 0xef && c[1] == 0xbb && c[2] == 0xbf;
}

void fg__view_json_text(const view_out *w, const char *s)
{
    w->put(w->to, "\"");
    for (; *s; s += length(s)) {
        char piece[16];
        const unsigned char c = (unsigned char)*s;
        if (c < 32 || c == 127 || strchr("<>&'", *s)) snprintf(piece, sizeof piece, "\\u%04x", c);
        else if (c == '"' || c == '\\') snprintf(piece, sizeof piece, "\\%c", c);
        else if (invisible(s))
            snprintf(piece, sizeof piece, "\\u%04x", (unsigned)((c & 15) << 12 |
                     ((unsigned char)s[1] & 63) << 6 | ((unsigned char)s[2] & 63)));
        else snprintf(piece, sizeof piece, "%.*s", length(s), s);
        w->put(w->to, piece);
    }
    w->put(w->to, "\"");
}

void fg__view_xml_text(const view_out *w, const char *s)
{
    for (; *s; s += length(s)) {
        char piece[16];
        const unsigned char c = (unsigned char)*s;
        if (c < 32 || c == 127 || invisible(s)) snprintf(piece, sizeof piece, "?");
        else if (strchr("<>&\"'", *s)) snprintf(piece, sizeof piece, "&#%d;", c);
        else snprintf(piece, sizeof piece, "%.*s", length(s), s);
        w->put(w->to, piece);
    }
}

int fg__view_letters(const char *s)
{
    int n = 0;
    for (; *s; s++) n += (*s & 0xc0) != 0x80;
    return n;
}

/* Cuts to at most n characters, "..." included. */
static void cut(char *s, int n)
{
    if (fg__view_letters(s) <= n) return;
    char *at = s;
    for (int i = 0; i < n - 3; i++) at += length(at);
    memcpy(at, "...", 4);
}

/* ---- amounts --------------------------------------------------------------------------------- */

void fg__view_shape(const view_value *x, view_words to)
{
    size_t n = 0;
    to[0] = 0;
    for (int i = 0; i < x->rank && n < VIEW_WORDS; i++)
        n += (size_t)snprintf(to + n, VIEW_WORDS - n, i ? "\303\227%" PRId64 : "%" PRId64,
                              x->dim[i]);
    if (!x->rank) snprintf(to, VIEW_WORDS, "scalar");
}

static void scaled(double x, double step, int n, const char *const *unit, view_words to)
{
    int i = 0;
    while (fabs(x) >= step * 0.99995 && i < n - 1) { x /= step; i++; }
    snprintf(to, VIEW_WORDS, i && fabs(x) < 100 ? "%.1f%s" : "%.0f%s", x, unit[i]);
}

void fg__view_bytes(double bytes, view_words to)
{
    static const char *const unit[] = { " B", " KiB", " MiB", " GiB", " TiB", " PiB" };
    scaled(bytes, 1024, 6, unit, to);
}

void fg__view_amount(double n, view_words to)
{
    static const char *const unit[] = { "", "k", "M", "G", "T", "P" };
    scaled(n, 1000, 6, unit, to);
}

void fg__view_attr(const fg_json_value *a, view_words to)
{
    size_t n = 0;
    to[0] = 0;
    switch (a->kind) {
    case FG_JSON_NULL:  snprintf(to, VIEW_WORDS, "null"); break;
    case FG_JSON_FALSE: snprintf(to, VIEW_WORDS, "false"); break;
    case FG_JSON_TRUE:  snprintf(to, VIEW_WORDS, "true"); break;
    case FG_JSON_WHOLE: snprintf(to, VIEW_WORDS, "%" PRId64, a->u.whole); break;
    case FG_JSON_REAL:  snprintf(to, VIEW_WORDS, "%.9g", a->u.real); break;
    case FG_JSON_TEXT:
        snprintf(to, VIEW_WORDS, "%.60s", a->u.text);
        if (!fg_text_is_utf8(to)) snprintf(to, VIEW_WORDS, "?");
        break;
    default:
        n = (size_t)snprintf(to, VIEW_WORDS, "[");
        for (const fg_json_value *y = a->first; y && n < 200; y = y->next)
            if (y->kind == FG_JSON_WHOLE)
                n += (size_t)snprintf(to + n, VIEW_WORDS - n, y == a->first ? "%" PRId64
                                      : ",%" PRId64, y->u.whole);
        snprintf(to + n, VIEW_WORDS - n, "]");
    }
}

void fg__view_attrs(const view_node *n, view_words to)
{
    size_t at = 0;
    to[0] = 0;
    for (const fg_json_value *a = n->attrs ? n->attrs->first : NULL; a && at < 160; a = a->next) {
        view_words value;
        fg__view_attr(a, value);
        at += (size_t)snprintf(to + at, VIEW_WORDS - at, "%s%.40s=%.60s", at ? ", " : "", a->key,
                               value);
        if (at >= VIEW_WORDS) break;
    }
    if (!fg_text_is_utf8(to)) snprintf(to, VIEW_WORDS, "...");
}

/* ---- labels ---------------------------------------------------------------------------------- */

const char *fg__view_sign(const view_node *n)
{
    static const char *const op[] = { "add", "mul", "sub", "div" };
    static const char *const sign[] = { "+", "\303\227", "\342\210\222", "\303\267" };
    for (int i = 0; i < 4 && n->pass == VIEW_FORWARD && !n->error[0]; i++)
        if (!strcmp(n->op, op[i])) return sign[i];
    return NULL;
}

/* A parameter's name as it is called from inside the box: without path and without ".weight". */
static void short_name(const view_value *x, const char *path, view_words to)
{
    const size_t n = strlen(path), all = strlen(x->name);
    const bool under = n && !strncmp(x->name, path, n) && x->name[n] == '.';
    snprintf(to, VIEW_WORDS, "%s", under ? x->name + n + 1 : x->name);
    size_t m = strlen(to);
    if (m > 7 && all < VIEW_WORDS && !strcmp(to + m - 7, ".weight")) to[m - 7] = 0;
}

void fg__view_label(const fg_view *v, int32_t node, view_words to)
{
    const view_node *n = &v->node[node];
    to[0] = 0;
    if (n->param >= 0) {
        short_name(&v->value[n->param], v->box[n->home == node ? n->box : v->drawn_in[node]].path,
                   to);
        if (to[0]) { cut(to, 30); return; }
    }
    for (int i = 0; i < n->n_in && n->pass == VIEW_FORWARD; i++)
        if (n->in[i] >= 0 && v->value[n->in[i]].kind == VIEW_PARAM) {
            short_name(&v->value[n->in[i]], v->box[n->box].path, to);
            break;
        }
    cut(to, 30);
}

void fg__view_box_name(const fg_view *v, const view_box *in, const view_item *x, view_words to)
{
    if (x->kind != ITEM_RUN) {
        snprintf(to, VIEW_WORDS, "%s", v->box[x->ref].name);
        cut(to, 36);
        return;
    }
    view_words first, last;
    snprintf(first, sizeof first, "%s", v->box[in->child[x->ref]].name);
    snprintf(last, sizeof last, "%s", v->box[in->child[x->ref + x->count - 1]].name);
    cut(first, 18);
    cut(last, 18);
    snprintf(to, VIEW_WORDS, "%.90s \342\200\246 %.90s  \303\227 %d", first, last, (int)x->count);
}

int32_t fg__view_find_box(const fg_view *v, const char *path)
{
    for (int32_t b = 0; b < v->n_boxes; b++)
        if (v->box[b].n_items && !strcmp(v->box[b].path, path)) return b;
    return -1;
}

/* ---- heat ------------------------------------------------------------------------------------ */

const char *fg_heat_name(fg_heat h)
{
    static const char *const name[FG_HEAT_COUNT] = { "none", "flops", "bytes", "intensity", "time",
                                                     "absmax", "gradnorm" };
    return h >= 0 && h < FG_HEAT_COUNT ? name[h] : "?";
}

static double largest(const view_value *x)
{
    return fabs(x->least) > fabs(x->greatest) ? fabs(x->least) : fabs(x->greatest);
}

double fg__view_heat(const fg_view *v, int32_t node, fg_heat h)
{
    const view_node *n = &v->node[node];
    double most = -1;
    switch (h) {
    case FG_HEAT_FLOPS:     return n->flops;
    case FG_HEAT_BYTES:     return n->bytes;
    case FG_HEAT_INTENSITY: return n->bytes > 0 ? n->flops / n->bytes : 0;
    case FG_HEAT_TIME:      return n->view && v->timed ? 0 : n->time;
    case FG_HEAT_ABSMAX: case FG_HEAT_GRADNORM:
        for (int o = 0; o < n->n_out; o++) {
            const view_value *x = &v->value[n->out[o]];
            double y = largest(x);
            if (!x->seen || (h == FG_HEAT_GRADNORM && n->pass != VIEW_BACKWARD)) continue;
            if (h == FG_HEAT_GRADNORM) {
                y = x->rms * x->rms;
                for (int i = 0; i < x->rank; i++) y *= (double)x->dim[i];
                y = sqrt(y);
            }
            if (y > most) most = y;
        }
        return most;
    default: return -1;
    }
}

double fg__view_box_heat(const fg_view *v, const view_box *b, int pass, fg_heat h)
{
    double flops = 0, bytes = 0, sum = -1;
    for (int32_t i = b->first; i < b->end; i++) {
        const int32_t k = v->drawn[i];
        if (v->node[k].pass != pass) continue;
        const double x = fg__view_heat(v, k, h);
        flops += v->node[k].flops;
        bytes += v->node[k].bytes;
        if (x < 0) continue;
        if (h == FG_HEAT_ABSMAX || h == FG_HEAT_GRADNORM) sum = x > sum ? x : sum;
        else sum = (sum < 0 ? 0 : sum) + x;
    }
    return h == FG_HEAT_INTENSITY ? (bytes > 0 ? flops / bytes : -1) : sum;
}

void fg__view_heat_words(double x, fg_heat h, view_words to)
{
    view_words t;
    to[0] = 0;
    if (x < 0) return;
    if (h == FG_HEAT_BYTES) { fg__view_bytes(x, to); return; }
    if (h == FG_HEAT_TIME && x < 1000) { snprintf(to, VIEW_WORDS, "%.3g us", x); return; }
    if (h == FG_HEAT_TIME) { snprintf(to, VIEW_WORDS, "%.4g ms", x / 1000); return; }
    if (h == FG_HEAT_FLOPS) {
        fg__view_amount(x, t);
        snprintf(to, VIEW_WORDS, "%.40s%sFLOP", t, t[strlen(t) - 1] > '9' ? "" : " ");
        return;
    }
    if (h == FG_HEAT_INTENSITY) snprintf(to, VIEW_WORDS, "%.3g FLOP/B", x);
    else snprintf(to, VIEW_WORDS, "%.3g", x);
}
