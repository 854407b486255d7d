/* safetensors.c - tensors in files, and a strict reader of them.
 *
 *   file = u64 n, little endian | n bytes of JSON | values
 *   JSON = { name: {"dtype": text, "shape": [..], "data_offsets": [begin, end]}, ..,
 *            "__metadata__": {text: text} }               offsets count from the end of the JSON
 *
 * Format: Hugging Face, safetensors, README, "Format" (2022-2024).  Stricter than it on purpose:
 * keys may not repeat, an entry has no other keys, names are short and printable, and counts are
 * limited before anything is allocated, because a checkpoint may come from anywhere. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fox_json.h"
#include "safetensors.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "files are little endian and are read without swapping"
#endif

enum {
    MAX_VALUES = 2000000,                /* in a header; bounds what the parser allocates */
    PIECE      = 1 << 14                 /* bytes converted at a time */
};
static const int64_t max_number = (int64_t)1 << 53;    /* what every JSON reader can hold exactly */

typedef enum { NOT_READ, FLOAT32, FLOAT16, BFLOAT16, INT64, INT32, UINT16, UINT8, TRUTH } coding;
static const struct { const char *name; int bits; coding as; } dtypes[] = {
    { "F32", 32, FLOAT32 },     { "F16", 16, FLOAT16 },     { "BF16", 16, BFLOAT16 },
    { "I64", 64, INT64 },       { "I32", 32, INT32 },       { "U16", 16, UINT16 },
    { "U8", 8, UINT8 },         { "BOOL", 8, TRUTH },       { "F64", 64, NOT_READ },
    { "I16", 16, NOT_READ },    { "I8", 8, NOT_READ },      { "U64", 64, NOT_READ },
    { "U32", 32, NOT_READ },    { "C64", 64, NOT_READ },    { "F8_E4M3", 8, NOT_READ },
    { "F8_E5M2", 8, NOT_READ }, { "F8_E8M0", 8, NOT_READ }, { "F8_E4M3FNUZ", 8, NOT_READ },
    { "F8_E5M2FNUZ", 8, NOT_READ }, { "F6_E2M3", 6, NOT_READ }, { "F6_E3M2", 6, NOT_READ },
    { "F4", 4, NOT_READ }
};
enum { DTYPES = sizeof dtypes / sizeof dtypes[0] };

typedef struct { const char *name; int dtype; fg_shape shape; int64_t begin, end; } entry;

struct fg_file {
    int       fd, n;
    int64_t   values_at;                 /* where offset 0 lies in the file */
    fg_json  *header;                    /* owns the names */
    entry    *entries;                   /* sorted by name once open */
    fg_status status;
    char      path[FG__FILE_MAX_PATH + 1], message[1000];
};

void fg__one_line(char *text)
{
    for (; *text; text++)
        if ((unsigned char)*text < 32 || *text == 127)
            *text = '?';
}

const char *fg__path_end(const char *path)
{
    size_t n = strlen(path);
    return n > 160 ? path + n - 160 : path;
}

static FG_PRINTF(3, 4) fg_status refuse(fg_file *f, fg_status s, const char *fmt, ...)
{
    va_list args;
    int n = snprintf(f->message, sizeof f->message, "%s: ", fg__path_end(f->path));
    va_start(args, fmt);
    vsnprintf(f->message + n, sizeof f->message - (size_t)n, fmt, args);
    va_end(args);
    fg__one_line(f->message);
    return s;
}

/* ---- the header ---------------------------------------------------------------------------- */

const char *fg__file_name_fault(const char *name)
{
    if (strlen(name) > FG__FILE_MAX_NAME)
        return "is longer than 512 bytes";
    for (; *name; name++)
        if ((unsigned char)*name < 32 || *name == 127)
            return "has a control character in its name";
    return NULL;
}

static bool is_count(const fg_json_value *v)
{
    return v && v->kind == FG_JSON_WHOLE && v->u.whole >= 0 && v->u.whole <= max_number;
}

static fg_status read_shape(fg_file *f, const fg_json_value *list, entry *e)
{
    if (list->kind != FG_JSON_LIST)
        return refuse(f, FG_ERR_FORMAT, "tensor %s: shape is not a list", e->name);
    if (list->n > FG_MAX_RANK)
        return refuse(f, FG_ERR_FORMAT, "tensor %s: rank is %" PRId64 ", more than %d", e->name,
                      list->n, FG_MAX_RANK);
    for (const fg_json_value *v = list->first; v; v = v->next) {
        if (!is_count(v))
            return refuse(f, FG_ERR_FORMAT, "tensor %s: axis %d of shape is not an integer from 0 "
                          "to 2^53", e->name, e->shape.rank);
        e->shape.dim[e->shape.rank++] = v->u.whole;
    }
    return FG_OK;
}

/* The extent in the file must be exactly what shape and dtype need. */
static fg_status check_extent(fg_file *f, const entry *e)
{
    int64_t count = 1;
    bool over = false;
    for (int i = 0; i < e->shape.rank; i++)
        over |= __builtin_mul_overflow(count, e->shape.dim[i], &count);
    over |= __builtin_mul_overflow(count, (int64_t)dtypes[e->dtype].bits, &count);
    if (over)
        return refuse(f, FG_ERR_FORMAT, "tensor %s: the product of its shape is beyond 64 bits",
                      e->name);
    if (count % 8)
        return refuse(f, FG_ERR_FORMAT, "tensor %s: %" PRId64 " bits are not whole bytes", e->name,
                      count);
    if (e->end < e->begin)
        return refuse(f, FG_ERR_FORMAT,
                      "tensor %s: data ends at %" PRId64 ", before it begins at %" PRId64,
                      e->name, e->end, e->begin);
    if (count / 8 != e->end - e->begin)
        return refuse(f, FG_ERR_FORMAT, "tensor %s: shape and dtype %s need %" PRId64
                      " bytes, data_offsets give %" PRId64, e->name, dtypes[e->dtype].name,
                          count / 8,
                      e->end - e->begin);
    return FG_OK;
}

static fg_status read_dtype(fg_file *f, const fg_json_value *v, entry *e)
{
    if (v->kind != FG_JSON_TEXT)
        return refuse(f, FG_ERR_FORMAT, "tensor %s: dtype is not a text", e->name);
    for (e->dtype = 0; e->dtype < DTYPES; e->dtype++)
        if (strcmp(dtypes[e->dtype].name, v->u.text) == 0)
            return FG_OK;
    return refuse(f, FG_ERR_FORMAT, "tensor %s: dtype %.40s is unknown", e->name, v->u.text);
}

static fg_status read_offsets(fg_file *f, const fg_json_value *list, entry *e)
{
    if (list->kind != FG_JSON_LIST || list->n != 2 || !is_count(list->first) ||
        !is_count(list->first->next))
        return refuse(f, FG_ERR_FORMAT,
                      "tensor %s: data_offsets are not two integers from 0 to 2^53", e->name);
    e->begin = list->first->u.whole;
    e->end = list->first->next->u.whole;
    return FG_OK;
}

static fg_status read_entry(fg_file *f, const fg_json_value *tensor, entry *e)
{
    const char *fault = fg__file_name_fault(tensor->key);
    fg_status s;
    e->name = tensor->key;
    if (fault)
        return refuse(f, FG_ERR_FORMAT, "tensor %.60s: %s", e->name, fault);
    if (tensor->kind != FG_JSON_OBJECT)
        return refuse(f, FG_ERR_FORMAT, "tensor %s: entry is not an object", e->name);
    for (const fg_json_value *v = tensor->first; v; v = v->next)
        if (strcmp(v->key, "dtype") && strcmp(v->key, "shape") && strcmp(v->key, "data_offsets"))
            return refuse(f, FG_ERR_FORMAT, "tensor %s: unknown key %.60s", e->name, v->key);
    if (tensor->n != 3)
        return refuse(f, FG_ERR_FORMAT, "tensor %s: has %" PRId64
                      " of the 3 keys dtype, shape, data_offsets", e->name, tensor->n);
    s = read_dtype(f, fg_json_get(tensor, "dtype"), e);
    if (!s)
        s = read_shape(f, fg_json_get(tensor, "shape"), e);
    if (!s)
        s = read_offsets(f, fg_json_get(tensor, "data_offsets"), e);
    return s ? s : check_extent(f, e);
}

static fg_status check_metadata(fg_file *f, const fg_json_value *metadata)
{
    if (metadata->kind != FG_JSON_OBJECT)
        return refuse(f, FG_ERR_FORMAT, "__metadata__ is not an object");
    for (const fg_json_value *v = metadata->first; v; v = v->next)
        if (v->kind != FG_JSON_TEXT)
            return refuse(f, FG_ERR_FORMAT, "__metadata__ key %.60s: value is not a text", v->key);
    return FG_OK;
}

static int by_place(const void *a, const void *b)
{
    const entry *x = a, *y = b;
    if (x->begin != y->begin)
        return x->begin < y->begin ? -1 : 1;
    return (x->end > y->end) - (x->end < y->end);
}

static int by_name(const void *a, const void *b)
{
    const entry *x = a, *y = b;
    return strcmp(x->name, y->name);
}

/* Values lie one behind the other from 0 to the end of the file: no holes, no overlap, no rest. */
static fg_status check_layout(fg_file *f, int64_t bytes)
{
    int64_t at = 0;
    qsort(f->entries, (size_t)f->n, sizeof *f->entries, by_place);
    for (int i = 0; i < f->n; i++) {
        const entry *e = &f->entries[i];
        if (e->begin != at)
            return refuse(f, FG_ERR_FORMAT,
                          "tensor %s: data begins at %" PRId64 ", but the data before it %s %"
                          PRId64, e->name, e->begin, e->begin < at ? "reaches to" : "ends at", at);
        at = e->end;
    }
    if (at != bytes)
        return refuse(f, FG_ERR_FORMAT,
                      "the tensors have %" PRId64 " bytes, the file holds %" PRId64, at, bytes);
    qsort(f->entries, (size_t)f->n, sizeof *f->entries, by_name);
    return FG_OK;
}

static fg_status read_entries(fg_file *f, int64_t bytes)
{
    const fg_json_value *header = fg_json_root(f->header);
    if (header->n > FG__FILE_MAX_TENSORS)
        return refuse(f, FG_ERR_FORMAT, "header lists %" PRId64 " tensors, more than %d", header->n,
                      FG__FILE_MAX_TENSORS);
    f->entries = calloc((size_t)header->n + 1, sizeof *f->entries);
    if (!f->entries)
        return refuse(f, FG_ERR_MEMORY, "no memory for %" PRId64 " tensor entries", header->n);
    for (const fg_json_value *v = header->first; v; v = v->next) {
        bool metadata = strcmp(v->key, "__metadata__") == 0;
        fg_status s = metadata ? check_metadata(f, v) : read_entry(f, v, &f->entries[f->n]);
        if (s)
            return s;
        f->n += !metadata;
    }
    return check_layout(f, bytes);
}

static fg_status read_at(fg_file *f, void *to, size_t bytes, int64_t at)
{
    char *p = to;
    while (bytes > 0) {
        size_t piece = bytes < (size_t)1 << 30 ? bytes : (size_t)1 << 30;
        ssize_t got = pread(f->fd, p, piece, (off_t)at);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return refuse(f, FG_ERR_IO, "cannot read at byte %" PRId64 ": %s", at, strerror(errno));
        if (got == 0)
            return refuse(f, FG_ERR_IO, "file ends at byte %" PRId64 ", %zu bytes too early", at,
                          bytes);
        p += got, bytes -= (size_t)got, at += got;
    }
    return FG_OK;
}

static fg_status parse_header(fg_file *f, const char *text, size_t n)
{
    static const fg_json_rules rules = { 3, MAX_VALUES, false };
    char why[200];
    if (n == 0 || text[0] != '{')
        return refuse(f, FG_ERR_FORMAT, "header does not begin with '{'");
    fg_status s = fg_json_parse(text, n, rules, &f->header, why);
    return s ? refuse(f, s, "header is not valid: %s", why) : FG_OK;
}

static fg_status open_at(fg_file *f)
{
    struct stat info;
    uint64_t n = 0;
    char *text;
    fg_status s;
    f->fd = open(f->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        /* a fifo must not make us wait */
    if (f->fd < 0)
        return refuse(f, FG_ERR_IO, "cannot open: %s", strerror(errno));
    if (fstat(f->fd, &info) < 0)
        return refuse(f, FG_ERR_IO, "cannot stat: %s", strerror(errno));
    if (!S_ISREG(info.st_mode))
        return refuse(f, FG_ERR_IO, "is not a regular file");
    if (info.st_size < 8)
        return refuse(f, FG_ERR_FORMAT, "has %lld bytes, too few for a safetensors file",
                      (long long)info.st_size);
    s = read_at(f, &n, 8, 0);
    if (s)
        return s;
    if (n > FG__FILE_MAX_HEADER)
        return refuse(f, FG_ERR_FORMAT, "header length is %" PRIu64 ", more than %d", n,
                      FG__FILE_MAX_HEADER);
    if ((int64_t)n > (int64_t)info.st_size - 8)
        return refuse(f, FG_ERR_FORMAT, "header length is %" PRIu64 ", but only %lld bytes follow",
                      n,
                      (long long)info.st_size - 8);
    text = malloc((size_t)n + 1);
    if (!text)
        return refuse(f, FG_ERR_MEMORY, "no memory for a header of %" PRIu64 " bytes", n);
    s = read_at(f, text, (size_t)n, 8);
    if (!s)
        s = parse_header(f, text, (size_t)n);
    free(text);
    f->values_at = 8 + (int64_t)n;
    return s ? s : read_entries(f, (int64_t)info.st_size - f->values_at);
}

/* ---- reading ------------------------------------------------------------------------------- */

fg_file *fg_file_open(const char *path)
{
    fg_file *f = calloc(1, sizeof *f);
    if (!f)
        return NULL;
    f->fd = -1;
    snprintf(f->path, sizeof f->path, "%s", path ? path : "");
    if (!path || strlen(path) > FG__FILE_MAX_PATH)
        f->status = refuse(f, FG_ERR_IO, "cannot open: path of no or more than %d bytes",
                           FG__FILE_MAX_PATH);
    else
        f->status = open_at(f);
    if (f->status)
        f->n = 0;
    return f;
}

void fg_file_close(fg_file *f)
{
    if (!f)
        return;
    if (f->fd >= 0)
        close(f->fd);
    fg_json_free(f->header);
    free(f->entries);
    free(f);
}

fg_status fg_file_status(const fg_file *f)
{
    return f ? f->status : FG_ERR_MEMORY;
}

const char *fg_file_message(const fg_file *f)
{
    return f ? f->message : fg_status_text(FG_ERR_MEMORY);
}

int fg_file_count(const fg_file *f)
{
    return f ? f->n : 0;
}

bool fg_file_at(const fg_file *f, int i, fg_file_entry *out)
{
    if (!f || i < 0 || i >= f->n)
        return false;
    const entry *e = &f->entries[i];
    *out = (fg_file_entry){ e->name, dtypes[e->dtype].name, e->shape, e->end - e->begin };
    return true;
}

static const entry *find(const fg_file *f, const char *name)
{
    entry key = { .name = name };
    return f && f->n ? bsearch(&key, f->entries, (size_t)f->n, sizeof key, by_name) : NULL;
}

bool fg_file_find(const fg_file *f, const char *name, fg_file_entry *out)
{
    const entry *e = find(f, name);
    return e && fg_file_at(f, (int)(e - f->entries), out);
}

static float from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* IEEE binary16: sign, 5 bits of exponent (bias 15), 10 of fraction. */
static float from_half(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 31)
        return from_bits(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) {
        float x = (float)fraction * 0x1p-24f;              /* subnormal: fraction * 2^-24 */
        return sign ? -x : x;
    }
    return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

static float float_at(coding c, const unsigned char *raw, int64_t i)
{
    uint16_t h;
    float x;
    if (c == FLOAT32) {
        memcpy(&x, raw + 4 * i, 4);
        return x;
    }
    memcpy(&h, raw + 2 * i, 2);
    return c == FLOAT16 ? from_half(h) : from_bits((uint32_t)h << 16);
}

static int64_t integer_at(coding c, const unsigned char *raw, int64_t i)
{
    int64_t wide;
    int32_t word;
    uint16_t half;
    switch (c) {
    case INT64:
        memcpy(&wide, raw + 8 * i, 8);
        return wide;
    case INT32:
        memcpy(&word, raw + 4 * i, 4);
        return word;
    case UINT16:
        memcpy(&half, raw + 2 * i, 2);
        return half;
    default:
        return c == TRUTH ? raw[i] != 0 : raw[i];
    }
}

/* n values of raw into to[at...]; integers must be kept exactly. */
static fg_status convert(fg_file *f, const entry *e, const unsigned char *raw, int64_t at,
                         int64_t n,
                         fg_dtype as, void *to)
{
    coding c = dtypes[e->dtype].as;
    float *real = to;
    int32_t *whole = to;
    int64_t limit = as == FG_F32 ? (int64_t)1 << 24 : INT32_MAX;
    for (int64_t i = 0; i < n; i++) {
        if (c <= BFLOAT16) {
            real[at + i] = float_at(c, raw, i);
            continue;
        }
        int64_t v = integer_at(c, raw, i);
        if (v > limit || v < -limit - (as == FG_I32))
            return refuse(f, FG_ERR_FORMAT,
                          "tensor %s: value %" PRId64 " at %" PRId64 " does not fit %s",
                          e->name, v, at + i, fg_dtype_name(as));
        if (as == FG_F32)
            real[at + i] = (float)v;
        else
            whole[at + i] = (int32_t)v;
    }
    return FG_OK;
}

fg_status fg_file_read(fg_file *f, const char *name, fg_dtype as, void *data, size_t bytes)
{
    unsigned char raw[PIECE];
    const entry *e = find(f, name);
    if (!f || f->status)
        return f ? f->status : FG_ERR_MEMORY;
    if (!e)
        return refuse(f, FG_ERR_USAGE, "has no tensor %.300s", name);
    coding c = dtypes[e->dtype].as;
    int64_t size = dtypes[e->dtype].bits / 8;
    if (c == NOT_READ)
        return refuse(f, FG_ERR_FORMAT, "tensor %s: dtype %s cannot be read here", name,
                      dtypes[e->dtype].name);
    if ((as != FG_F32 && as != FG_I32) || (as == FG_I32 && c <= BFLOAT16))
        return refuse(f, FG_ERR_DTYPE, "tensor %s: %s cannot be read as %s", name,
                      dtypes[e->dtype].name,
                      fg_dtype_name(as));
    int64_t count = (e->end - e->begin) / size;
    if (count > INT64_MAX / 4 || (uint64_t)bytes != (uint64_t)count * 4)
        return refuse(f, FG_ERR_USAGE, "tensor %s: %" PRId64 " elements do not fill %zu bytes",
                      name, count, bytes);
    if (c == FLOAT32 || (c == INT32 && as == FG_I32))
        return read_at(f, data, bytes, f->values_at + e->begin);
    for (int64_t at = 0; at < count;) {
        int64_t n = count - at < PIECE / size ? count - at : PIECE / size;
        fg_status s = read_at(f, raw, (size_t)(n * size), f->values_at + e->begin + at * size);
        if (!s)
            s = convert(f, e, raw, at, n, as, data);
        if (s)
            return s;
        at += n;
    }
    return FG_OK;
}
