/* store.c - parameters and states by name, on one device. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "graph.h"
#include "rng.h"
#include "store.h"

fg_status fg__store_fail(fg_store *s, fg_status st, const char *fmt, ...)
{
    if (s->status) return s->status;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(s->message, sizeof s->message, fmt, ap);
    va_end(ap);
    return s->status = st;
}

fg_store *fg_store_new(fg_backend *b)
{
    fg_store *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    s->backend = b;
    if (!b || !b->ops) fg__store_fail(s, FG_ERR_USAGE, "the store has no open device");
    return s;
}

static void free_entry(fg_store *s, fg_entry *e)
{
    s->backend->ops->free(s->backend, e->data);
    free(e->name);
    free(e);
}

void fg_store_free(fg_store *s)
{
    if (!s) return;
    for (uint32_t i = 0; i < s->n; i++) free_entry(s, s->entries[i]);
    free(s->entries);
    free(s);
}

fg_status   fg_store_status(const fg_store *s) { return s ? s->status : FG_ERR_MEMORY; }
const char *fg_store_message(const fg_store *s)
{
    return !s ? fg_status_text(FG_ERR_MEMORY) : s->status ? s->message : fg_status_text(FG_OK);
}
void        fg_store_clear_error(fg_store *s) { if (s) s->status = FG_OK; }
void        fg_store_precision(fg_store *s, fg_dtype t) { if (s && t != FG_I32) s->precision = t; }
int         fg_store_count(const fg_store *s) { return s ? (int)s->n : 0; }

/* Index of the first entry whose name is not before `name`. */
static uint32_t lower_bound(const fg_store *s, const char *name)
{
    uint32_t lo = 0, hi = s->n;
    while (lo < hi) {
        const uint32_t mid = lo + (hi - lo) / 2;
        if (strcmp(s->entries[mid]->name, name) < 0) lo = mid + 1;
        else hi = mid;
    }
    return lo;
}

fg_entry *fg__store_entry(const fg_store *s, const char *name)
{
    const uint32_t i = s ? lower_bound(s, name) : 0;
    return s && i < s->n && !strcmp(s->entries[i]->name, name) ? s->entries[i] : NULL;
}

size_t fg__entry_bytes(const fg_store *s, const fg_entry *e)
{
    return (size_t)fg_shape_count(e->shape) * s->backend->size_of[e->type];
}

static void shape_text(fg_dtype t, fg_shape shape, char *buf, size_t size)
{
    const fg_value v = { .type = t, .shape = shape };
    fg__value_text(&v, buf, size);
}

fg_entry *fg__store_need(fg_store *s, const char *name, fg_dtype t, fg_shape shape)
{
    if (!s || !s->backend || !s->backend->ops) return NULL;
    const char *fault = !name || !name[0] ? "a name is needed"
                      : (unsigned)t >= FG_DTYPE_COUNT ? "a dtype is f32, bf16 or i32"
                      : fg__shape_fault(shape);
    if (fault) {
        fg__store_fail(s, FG_ERR_USAGE, "entry %s: %s", name ? name : "", fault);
        return NULL;
    }
    fg_entry *e = fg__store_entry(s, name);
    if (e && e->type == t && fg_shape_equal(e->shape, shape)) return e;
    if (e) {
        char have[160], want[160];
        shape_text(e->type, e->shape, have, sizeof have);
        shape_text(t, shape, want, sizeof want);
        fg__store_fail(s, FG_ERR_SHAPE, "%s is %s in the store but %s in the graph", name, have,
                       want);
        return NULL;
    }
    if (s->n == s->cap) {
        const uint32_t cap = s->cap ? 2 * s->cap : 64;
        fg_entry **p = realloc(s->entries, cap * sizeof *p);
        if (!p) {
            fg__store_fail(s, FG_ERR_MEMORY, "out of memory for the entry %s", name);
            return NULL;
        }
        s->entries = p;
        s->cap = cap;
    }
    e = calloc(1, sizeof *e);
    char *copy = malloc(strlen(name) + 1);
    if (e) *e = (fg_entry){ .name = copy, .type = t, .shape = shape, .state = name[0] == '@' };
    const size_t bytes = e ? fg__entry_bytes(s, e) : 0;
    if (e && copy) e->data = s->backend->ops->alloc(s->backend, bytes);
    if (!e || !copy || !e->data || s->backend->ops->clear(s->backend, e->data, bytes)) {
        fg__store_fail(s, FG_ERR_MEMORY, "out of memory for %s: %zu bytes", name, bytes);
        if (e && e->data) s->backend->ops->free(s->backend, e->data);
        free(copy);
        free(e);
        return NULL;
    }
    strcpy(copy, name);
    const uint32_t i = lower_bound(s, name);
    memmove(s->entries + i + 1, s->entries + i, (s->n - i) * sizeof *s->entries);
    s->entries[i] = e;
    s->n++;
    return e;
}

/* softplus(y) = t: y = t + log(1 - e^-t). */
static double inverse_softplus(double t) { return t + log(-expm1(-t)); }

static float initial(const fg_init *init, uint64_t key, int64_t i, int64_t n)
{
    switch (init->kind) {
    case FG_ZEROS:     return 0;
    case FG_ONES:      return 1;
    case FG_CONSTANT:  return (float)init->a;
    case FG_NORMAL:    break;            /* four at a time: fill_normal */
    case FG_UNIFORM:   return (float)(init->a * (2 * fg__random_uniform(key, (uint64_t)i) - 1));
    case FG_LOG_RANGE: return (float)log(1 + (double)i);
    case FG_INV_SOFTPLUS: {
        const double u = fg__random_uniform(key, (uint64_t)i);
        const double t = exp(log(init->a) + u * (log(init->b) - log(init->a)));
        return (float)inverse_softplus(t > init->c ? t : init->c);
    }
    case FG_LOG_DECAY: {
        const double u = n > 1 ? (double)i / (double)(n - 1) : 0;
        const double tau = exp(log(init->a) + u * (log(init->b) - log(init->a)));
        return (float)-log(expm1(1 / tau));
    }
    }
    return 0;
}

static void fill_normal(float *x, int64_t n, float deviation, uint64_t key, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (n > 4096)
    for (int64_t block = 0; block < (n + 3) / 4; block++) {
        float four[4];
        fg__random_normals(key, (uint64_t)block, four);
        for (int64_t i = 4 * block; i < n && i < 4 * block + 4; i++)
            x[i] = deviation * four[i - 4 * block];
    }
}

static void fill(float *x, int64_t n, const fg_init *init, uint64_t key, int threads)
{
    if (init->kind == FG_NORMAL) {
        fill_normal(x, n, (float)init->a, key, threads);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (n > 4096)
    for (int64_t i = 0; i < n; i++) x[i] = initial(init, key, i, n);
}

fg_status fg_store_init(fg_store *s, const fg_graph *g, uint64_t seed)
{
    if (!s) return FG_ERR_MEMORY;
    if (s->status) return s->status;
    const int n_params = fg_param_count(g);
    for (int k = 0; k < n_params; k++) {
        fg_param_info p;
        if (!fg_param_at(g, k, &p))
            return fg__store_fail(s, FG_ERR_MEMORY, "out of memory for parameter names");
        const int64_t n = fg_shape_count(p.shape);
        const bool there = fg__store_entry(s, p.name) != NULL;
        float *x = there ? NULL : malloc((size_t)n * sizeof *x);
        if (!there && !x)                        /* no entry yet: it would pass for initialized */
            return fg__store_fail(s, FG_ERR_MEMORY, "out of memory for the first values of %s",
                                  p.name);
        fg_entry *e = fg__store_need(s, p.name, FG_F32, p.shape);
        if (!e || there) {
            free(x);
            if (!e) return s->status;
            continue;
        }
        const uint64_t key = fg__random_key(seed, p.name);
        s->version++;
        fill(x, n, &p.init, key, s->backend->threads > 0 ? s->backend->threads : 1);
        const fg_status st = s->backend->ops->upload(s->backend, e->data, x, n, FG_F32);
        free(x);
        if (st) return fg__store_fail(s, st, "%s: %s", p.name, fg_backend_message(s->backend));
    }
    return FG_OK;
}

fg_status fg_store_put(fg_store *s, const char *name, fg_dtype t, fg_shape shape, const void *data)
{
    if (!s) return FG_ERR_MEMORY;
    s->version++;
    fg_entry *e = fg__store_need(s, name, t, shape);
    if (!e) return s->status;
    const fg_status st = s->backend->ops->upload(s->backend, e->data, data, fg_shape_count(shape),
                                                 t);
    return st ? fg__store_fail(s, st, "%s: %s", name, fg_backend_message(s->backend)) : FG_OK;
}

fg_status fg_store_get(fg_store *s, const char *name, void *data, size_t bytes)
{
    if (!s) return FG_ERR_MEMORY;
    const fg_entry *e = fg__store_entry(s, name);
    if (!e) return fg__store_fail(s, FG_ERR_USAGE, "the store has no entry %s", name);
    const int64_t n = fg_shape_count(e->shape);
    if (bytes != (size_t)n * 4)
        return fg__store_fail(s, FG_ERR_USAGE, "%s has %lld bytes, not %zu", name, (long long)n * 4,
                              bytes);
    const fg_status st = s->backend->ops->download(s->backend, data, e->data, n, e->type);
    return st ? fg__store_fail(s, st, "%s: %s", name, fg_backend_message(s->backend)) : FG_OK;
}

fg_status fg_store_zero(fg_store *s, const char *prefix)
{
    if (!s) return FG_ERR_MEMORY;
    if (prefix[0] != '@') s->version++;
    for (uint32_t i = lower_bound(s, prefix); i < s->n; i++) {
        fg_entry *e = s->entries[i];
        if (strncmp(e->name, prefix, strlen(prefix))) break;
        const fg_status st = s->backend->ops->clear(s->backend, e->data, fg__entry_bytes(s, e));
        if (st) return fg__store_fail(s, st, "%s: %s", e->name, fg_backend_message(s->backend));
    }
    return FG_OK;
}

void fg_store_remove(fg_store *s, const char *prefix)
{
    if (!s) return;
    const uint32_t first = lower_bound(s, prefix);
    uint32_t end = first;
    while (end < s->n && !strncmp(s->entries[end]->name, prefix, strlen(prefix)))
        free_entry(s, s->entries[end++]);
    if (end == first) return;
    memmove(s->entries + first, s->entries + end, (s->n - end) * sizeof *s->entries);
    s->n -= end - first;
}

static void describe(const fg_entry *e, fg_store_entry *out)
{
    *out = (fg_store_entry){ e->name, e->type, e->shape, e->state };
}

bool fg_store_at(const fg_store *s, int i, fg_store_entry *out)
{
    if (!s || i < 0 || (uint32_t)i >= s->n) return false;
    describe(s->entries[i], out);
    return true;
}

bool fg_store_find(const fg_store *s, const char *name, fg_store_entry *out)
{
    const fg_entry *e = s ? fg__store_entry(s, name) : NULL;
    if (e) describe(e, out);
    return e != NULL;
}
