/* json.c - a JSON reader for files from anywhere: RFC 8259, and the strict side of what that leaves
 * open.
 *
 * One pass counts the values, so that one array holds them all; a second pass fills it and copies
 * the texts, which never grow by decoding, behind each other.  A stack of fixed depth replaces
 * recursion. */
#include <inttypes.h>
#include <locale.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fox_json.h"

enum { MAX_DEPTH = 64, MAX_NUMBER = 100 };

struct fg_json { char *texts; fg_json_value values[]; };

typedef struct { fg_json_value *of, *last; } level;
typedef struct {
    const char    *start, *at, *end, *key;
    char          *to;                   /* where the next text goes */
    fg_json_value *values;
    int64_t        n;
    fg_json_rules  rules;
    level          stack[MAX_DEPTH];
    int            depth;
    char          *message;
} parser;

/* Says what is wrong and where; false, for the callers to pass on. */
static FG_PRINTF(2, 3) bool wrong(parser *p, const char *fmt, ...)
{
    char what[120];
    size_t line = 1, byte = 1;
    va_list args;
    va_start(args, fmt);
    vsnprintf(what, sizeof what, fmt, args);
    va_end(args);
    for (const char *c = p->start; c < p->at; c++) {
        byte = *c == '\n' ? 1 : byte + 1;
        line += *c == '\n';
    }
    snprintf(p->message, 200, "%s at line %zu, byte %zu", what, line, byte);
    return false;
}

static void skip_space(parser *p)
{
    while (p->at < p->end && (*p->at == ' ' || *p->at == '\n' || *p->at == '\r' || *p->at == '\t'))
        p->at++;
}

static bool next_is(const parser *p, char c)
{
    return p->at < p->end && *p->at == c;
}

/* ---- texts ----------------------------------------------------------------------------------- */

/* Bytes of the UTF-8 character at s, which ends before end; 0 if it is none.  No overlong forms, no
 * surrogates, nothing beyond U+10FFFF (Unicode 15, table 3-7). */
static int utf8_length(const char *text, const char *end)
{
    const unsigned char *s = (const unsigned char *)text;
    int n = s[0] < 0x80 ? 1 : s[0] < 0xc2 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 :
            s[0] < 0xf5 ? 4 : 0;
    if (n == 0 || end - text < n)
        return 0;
    for (int i = 1; i < n; i++)
        if ((s[i] & 0xc0) != 0x80)
            return 0;
    bool bad = (s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f) ||
               (s[0] == 0xf0 && s[1] < 0x90) || (s[0] == 0xf4 && s[1] > 0x8f);
    return bad ? 0 : n;
}

bool fg_text_is_utf8(const char *text)
{
    const char *end = text + strlen(text);
    while (text < end) {
        int n = utf8_length(text, end);
        if (n == 0)
            return false;
        text += n;
    }
    return true;
}

/* The four digits of \uXXXX, or -1. */
static int hex4(parser *p)
{
    int value = 0;
    if (p->end - p->at < 4)
        return -1;
    for (int i = 0; i < 4; i++) {
        char c = *p->at++;
        int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 :
                    c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
        if (digit < 0)
            return -1;
        value = 16 * value + digit;
    }
    return value;
}

static void put_utf8(parser *p, int c)
{
    if (c < 0x80)
        *p->to++ = (char)c;
    else if (c < 0x800) {
        *p->to++ = (char)(0xc0 | c >> 6);
        *p->to++ = (char)(0x80 | (c & 63));
    } else if (c < 0x10000) {
        *p->to++ = (char)(0xe0 | c >> 12);
        *p->to++ = (char)(0x80 | (c >> 6 & 63));
        *p->to++ = (char)(0x80 | (c & 63));
    } else {
        *p->to++ = (char)(0xf0 | c >> 18);
        *p->to++ = (char)(0x80 | (c >> 12 & 63));
        *p->to++ = (char)(0x80 | (c >> 6 & 63));
        *p->to++ = (char)(0x80 | (c & 63));
    }
}

/* Behind "\u": one code unit, or two that make a pair. */
static bool unicode_escape(parser *p)
{
    int c = hex4(p);
    if (c < 0)
        return wrong(p, "\\u without four hexadecimal digits");
    if (c == 0)
        return wrong(p, "a NUL in a text");
    if (c >= 0xdc00 && c < 0xe000)
        return wrong(p, "half a surrogate pair");
    if (c >= 0xd800 && c < 0xdc00) {
        bool pair = p->end - p->at >= 6 && p->at[0] == '\\' && p->at[1] == 'u';
        p->at += pair ? 2 : 0;
        int low = pair ? hex4(p) : -1;
        if (low < 0xdc00 || low >= 0xe000)
            return wrong(p, "half a surrogate pair");
        c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
    }
    put_utf8(p, c);
    return true;
}

static bool escape(parser *p)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    const char *found;
    if (p->at == p->end)
        return wrong(p, "the text does not end");
    char c = *p->at++;
    if (c == 'u')
        return unicode_escape(p);
    found = c ? strchr(from, c) : NULL;
    if (!found)
        return wrong(p, "an unknown escape");
    *p->to++ = to[found - from];
    return true;
}

static bool text(parser *p, const char **out)
{
    *out = p->to;
    for (p->at++; p->at < p->end && *p->at != '"';) {
        if (*p->at == '\\') {
            p->at++;
            if (!escape(p))
                return false;
            continue;
        }
        int n = utf8_length(p->at, p->end);
        if ((unsigned char)*p->at < 32)
            return wrong(p, "a control character in a text");
        if (n == 0)
            return wrong(p, "bytes that are not UTF-8");
        memcpy(p->to, p->at, (size_t)n);
        p->to += n;
        p->at += n;
    }
    if (p->at == p->end)
        return wrong(p, "the text does not end");
    p->at++;
    *p->to++ = '\0';
    return true;
}

/* ---- numbers and words ----------------------------------------------------------------------- */

static int digits(const char **at, const char *end)
{
    const char *from = *at;
    while (*at < end && **at >= '0' && **at <= '9')
        (*at)++;
    return (int)(*at - from);
}

/* [minus] int [frac] [exp]; the end of it, or NULL. */
static const char *number_end(const char *at, const char *end, bool *whole)
{
    at += at < end && *at == '-';
    const char *first = at;
    int n = digits(&at, end);
    *whole = true;
    if (n == 0 || (n > 1 && *first == '0'))
        return NULL;
    if (at < end && *at == '.') {
        at++;
        *whole = false;
        if (digits(&at, end) == 0)
            return NULL;
    }
    if (at < end && (*at == 'e' || *at == 'E')) {
        at++;
        *whole = false;
        at += at < end && (*at == '+' || *at == '-');
        if (digits(&at, end) == 0)
            return NULL;
    }
    return at;
}

/* strtod knows only the locale's point. */
static double to_real(const char *from, size_t n)
{
    char copy[2 * MAX_NUMBER];
    const char *point = localeconv()->decimal_point;
    size_t to = 0;
    for (size_t i = 0; i < n; i++)
        if (from[i] == '.' && strlen(point) < MAX_NUMBER)
            to += (size_t)sprintf(copy + to, "%s", point);
        else
            copy[to++] = from[i];
    copy[to] = '\0';
    return strtod(copy, NULL);
}

static bool number(parser *p, fg_json_value *v)
{
    bool whole, negative = *p->at == '-';
    const char *end = number_end(p->at, p->end, &whole);
    if (!end)
        return wrong(p, "not a number");
    if (end - p->at > MAX_NUMBER)
        return wrong(p, "a number of more than %d characters", MAX_NUMBER);
    if (whole) {
        v->kind = FG_JSON_WHOLE;
        for (const char *c = p->at + negative; c < end; c++)
            if (__builtin_mul_overflow(v->u.whole, (int64_t)10, &v->u.whole) ||
                __builtin_sub_overflow(v->u.whole, (int64_t)(*c - '0'), &v->u.whole))
                return wrong(p, "an integer beyond 64 bits");
        if (!negative && v->u.whole == INT64_MIN)
            return wrong(p, "an integer beyond 64 bits");
        v->u.whole = negative ? v->u.whole : -v->u.whole;
    } else {
        v->kind = FG_JSON_REAL;
        v->u.real = to_real(p->at, (size_t)(end - p->at));
        if (isinf(v->u.real))
            return wrong(p, "a number beyond the range of doubles");
    }
    p->at = end;
    return true;
}

static bool word(parser *p, fg_json_value *v)
{
    static const struct { const char *word; fg_json_kind kind; double real; } words[] = {
        { "null", FG_JSON_NULL, 0 }, { "false", FG_JSON_FALSE, 0 }, { "true", FG_JSON_TRUE, 0 },
        { "Infinity", FG_JSON_REAL, HUGE_VAL }, { "-Infinity", FG_JSON_REAL, -HUGE_VAL },
        { "NaN", FG_JSON_REAL, (double)NAN }
    };
    for (int i = 0; i < (p->rules.bare ? 6 : 3); i++) {
        size_t n = strlen(words[i].word);
        if ((size_t)(p->end - p->at) < n || memcmp(p->at, words[i].word, n))
            continue;
        p->at += n;
        v->kind = words[i].kind;
        if (v->kind == FG_JSON_REAL)
            v->u.real = words[i].real;
        return true;
    }
    return *p->at == '-' ? number(p, v) : wrong(p, "not a value");
}

/* ---- lists and objects ----------------------------------------------------------------------- */

/* One value, appended to the innermost list or object; a list or object is entered. */
static bool value(parser *p)
{
    fg_json_value *v = &p->values[p->n++];
    level *in = p->depth ? &p->stack[p->depth - 1] : NULL;
    *v = (fg_json_value){ .kind = FG_JSON_NULL, .key = p->key };
    p->key = NULL;
    if (in && in->last)
        in->last->next = v;
    else if (in)
        in->of->first = v;
    if (in) {
        in->last = v;
        in->of->n++;
    }
    skip_space(p);
    if (p->at == p->end)
        return wrong(p, "the text ends too early");
    if (*p->at == '"') {
        v->kind = FG_JSON_TEXT;
        return text(p, &v->u.text);
    }
    if (*p->at >= '0' && *p->at <= '9')
        return number(p, v);
    if (*p->at != '{' && *p->at != '[')
        return word(p, v);
    if (p->depth == p->rules.depth)
        return wrong(p, "more than %d levels", p->rules.depth);
    v->kind = *p->at++ == '{' ? FG_JSON_OBJECT : FG_JSON_LIST;
    p->stack[p->depth++] = (level){ v, NULL };
    return true;
}

static bool key(parser *p)
{
    skip_space(p);
    if (!next_is(p, '"'))
        return wrong(p, "a key is missing");
    if (!text(p, &p->key))
        return false;
    skip_space(p);
    if (!next_is(p, ':'))
        return wrong(p, "a colon is missing");
    p->at++;
    return true;
}

/* Merges two lists sorted by key. */
static const fg_json_value *merge(const fg_json_value *a, const fg_json_value *b)
{
    fg_json_value head = { .kind = FG_JSON_NULL }, *last = &head;
    while (a && b) {
        bool first = strcmp(a->key, b->key) <= 0;
        const fg_json_value *v = first ? a : b;
        if (first)
            a = a->next;
        else
            b = b->next;
        last->next = v;
        last = (fg_json_value *)v;
    }
    last->next = a ? a : b;
    return head.next;
}

/* Sorts by merging runs of 1, 2, 4, ... values kept in bins; no allocation, n log n. */
static const fg_json_value *sort(const fg_json_value *v)
{
    const fg_json_value *bins[64] = { NULL };
    while (v) {
        const fg_json_value *run = v;
        int i = 0;
        v = v->next;
        ((fg_json_value *)run)->next = NULL;
        for (; bins[i]; i++) {
            run = merge(bins[i], run);
            bins[i] = NULL;
        }
        bins[i] = run;
    }
    const fg_json_value *all = NULL;
    for (int i = 0; i < 64; i++)
        all = bins[i] ? merge(bins[i], all) : all;
    return all;
}

static bool leave(parser *p)
{
    fg_json_value *of = p->stack[--p->depth].of;
    p->at++;
    if (of->kind == FG_JSON_LIST)
        return true;
    of->first = sort(of->first);
    for (const fg_json_value *v = of->first; v && v->next; v = v->next)
        if (strcmp(v->key, v->next->key) == 0)
            return wrong(p, "key %.60s is there twice in the object that ends", v->key);
    return true;
}

static bool everything(parser *p)
{
    if (!value(p))
        return false;
    while (p->depth > 0) {
        const fg_json_value *of = p->stack[p->depth - 1].of;
        bool object = of->kind == FG_JSON_OBJECT;
        skip_space(p);
        if (next_is(p, object ? '}' : ']')) {
            if (!leave(p))
                return false;
            continue;
        }
        if (of->n > 0 && !next_is(p, ','))
            return wrong(p, p->at == p->end ? "the text ends too early" : "a comma is missing");
        p->at += of->n > 0;
        if ((object && !key(p)) || !value(p))
            return false;
    }
    skip_space(p);
    return p->at == p->end || wrong(p, "something follows");
}

/* A value is the first of all, or follows a bracket or a comma. */
static int64_t most_values(const char *from, size_t n)
{
    int64_t most = 1;
    bool quoted = false;
    for (size_t i = 0; i < n; i++) {
        if (quoted && from[i] == '\\')
            i++;
        else if (from[i] == '"')
            quoted = !quoted;
        else if (!quoted)
            most += from[i] == ',' || from[i] == '[' || from[i] == '{';
    }
    return most;
}

fg_status fg_json_parse(const char *from, size_t n, fg_json_rules rules, fg_json **out,
                        char message[200])
{
    int64_t most = most_values(from, n);
    *out = NULL;
    message[0] = '\0';
    if (rules.depth > MAX_DEPTH)
        rules.depth = MAX_DEPTH;
    if (most > rules.values) {
        snprintf(message, 200, "up to %" PRId64 " values, more than %" PRId64, most, rules.values);
        return FG_ERR_FORMAT;
    }
    fg_json *j = malloc(sizeof *j + (size_t)most * sizeof j->values[0]);
    char *texts = malloc(n + 1);
    if (!j || !texts) {
        free(j);
        free(texts);
        snprintf(message, 200, "no memory for %" PRId64 " values in %zu bytes", most, n);
        return FG_ERR_MEMORY;
    }
    j->texts = texts;
    parser p = { .start = from, .at = from, .end = from + n, .to = texts, .values = j->values,
                 .rules = rules, .message = message };
    if (!everything(&p)) {
        fg_json_free(j);
        return FG_ERR_FORMAT;
    }
    *out = j;
    return FG_OK;
}

void fg_json_free(fg_json *j)
{
    if (j)
        free(j->texts);
    free(j);
}

const fg_json_value *fg_json_root(const fg_json *j)
{
    return j ? &j->values[0] : NULL;
}

const fg_json_value *fg_json_get(const fg_json_value *v, const char *name)
{
    if (!v || v->kind != FG_JSON_OBJECT)
        return NULL;
    for (v = v->first; v; v = v->next)
        if (strcmp(v->key, name) == 0)
            return v;
    return NULL;
}

bool fg_json_number(const fg_json_value *v, double *out)
{
    if (!v || (v->kind != FG_JSON_WHOLE && v->kind != FG_JSON_REAL))
        return false;
    *out = v->kind == FG_JSON_WHOLE ? (double)v->u.whole : v->u.real;
    return true;
}
