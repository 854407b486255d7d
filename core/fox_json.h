/* fox_json.h - reads JSON that nobody vouches for: bounded in depth and size, without recursion,
 * with two allocations whatever the text.  Numbers, texts and keys are as RFC 8259 has them; keys
 * of one object must differ; texts are valid UTF-8 without NUL. */
#ifndef FOX_JSON_H
#define FOX_JSON_H
#include "fox_core.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    FG_JSON_NULL, FG_JSON_FALSE, FG_JSON_TRUE, FG_JSON_WHOLE, FG_JSON_REAL, FG_JSON_TEXT,
    FG_JSON_LIST, FG_JSON_OBJECT
} fg_json_kind;

typedef struct fg_json_value {
    fg_json_kind kind;
    union { int64_t whole; double real; const char *text; } u;   /* WHOLE: no '.' and no exponent */
    int64_t     n;                       /* values of a list or an object */
    const char *key;                     /* inside an object, whose values are sorted by it */
    const struct fg_json_value *first, *next;
} fg_json_value;

typedef struct {
    int     depth;                       /* levels of lists and objects, at most 64 */
    int64_t values;
    bool    bare;                        /* Infinity, -Infinity and NaN are REAL, as in Python */
} fg_json_rules;

typedef struct fg_json fg_json;
/* FG_ERR_FORMAT or FG_ERR_MEMORY with a message, and *out NULL. */
FG_API fg_status fg_json_parse(const char *text, size_t n, fg_json_rules rules, fg_json **out,
                               char message[200]);
FG_API void      fg_json_free(fg_json *j);
FG_API const fg_json_value *fg_json_root(const fg_json *j);
/* NULL if v is NULL or not an object, or has no such key. */
FG_API const fg_json_value *fg_json_get(const fg_json_value *v, const char *key);
/* Whether v is a WHOLE or REAL number, and which. */
FG_API bool      fg_json_number(const fg_json_value *v, double *out);
FG_API bool      fg_text_is_utf8(const char *text);

#ifdef __cplusplus
}
#endif
#endif
