/* shape.c - shapes, dtypes and their texts. */
#include <stdio.h>
#include <string.h>
#include "graph.h"

fg_shape fg_dims(int rank, const int64_t *dim)
{
    fg_shape s = { .rank = rank };
    for (int i = 0; i < rank && i < FG_MAX_RANK; i++) s.dim[i] = dim[i];
    return s;
}

/* A rank that no shape can have is read as if it were the nearest that one can. */
static int axes(fg_shape s) { return s.rank < 0 ? 0 : s.rank < FG_MAX_RANK ? s.rank : FG_MAX_RANK; }

int64_t fg_shape_count(fg_shape s)
{
    int64_t n = 1;
    for (int i = 0; i < axes(s); i++) n *= s.dim[i];
    return n;
}

bool fg_shape_equal(fg_shape a, fg_shape b)
{
    return a.rank == b.rank && !memcmp(a.dim, b.dim, sizeof(int64_t) * (size_t)axes(a));
}

const char *fg__shape_fault(fg_shape s)
{
    if (s.rank < 0 || s.rank > FG_MAX_RANK) return "a tensor has at most 6 axes";
    int64_t n = 1;
    for (int i = 0; i < s.rank; i++) {
        if (s.dim[i] < 0) return "an axis cannot have a negative extent";
        if (s.dim[i] && n > INT64_MAX / 16 / s.dim[i]) return "the shape has too many elements";
        n *= s.dim[i] ? s.dim[i] : 1;
    }
    return NULL;
}

bool fg__is_suffix(const fg_shape *tail, const fg_shape *of)
{
    return tail->rank <= of->rank &&
           !memcmp(tail->dim, of->dim + of->rank - tail->rank,
                   sizeof(int64_t) * (size_t)tail->rank);
}

int64_t fg__last(const fg_shape *s) { return s->rank ? s->dim[s->rank - 1] : 1; }

int64_t fg__rows(const fg_shape *s)
{
    int64_t n = 1;
    for (int i = 0; i + 1 < s->rank; i++) n *= s->dim[i];
    return n;
}

const char *fg_dtype_name(fg_dtype t)
{
    static const char *const name[FG_DTYPE_COUNT] = { "f32", "bf16", "i32" };
    return (unsigned)t < FG_DTYPE_COUNT ? name[t] : "?";
}

void fg__value_text(const fg_value *v, char *buf, size_t size)
{
    size_t n = (size_t)snprintf(buf, size, "%s[", fg_dtype_name(v->type));
    for (int i = 0; i < v->shape.rank && n < size; i++)
        n += (size_t)snprintf(buf + n, size - n, i ? ",%lld" : "%lld", (long long)v->shape.dim[i]);
    if (n < size) snprintf(buf + n, size - n, "]");
}
