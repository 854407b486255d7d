/* view_read.c - graph.json into a view: everything that a file may get wrong is refused here.
 *
 * After reading, every index is in range, every node that makes a value says so and is the only
 * one, a scope's parent comes before it, and texts are UTF-8 without NUL. */
#include <inttypes.h>
#include <math.h>
#include "view.h"

enum { MAX_VALUES = 60000000, MAX_SCOPES = 1000000, MAX_DEPTH = 200 };

void *fg__view_alloc(fg_view *v, size_t n, size_t size)
{
    if (v->n_blocks == v->cap_blocks) {
        const int32_t cap = v->cap_blocks ? 2 * v->cap_blocks : 64;
        void **more = realloc(v->block, (size_t)cap * sizeof *more);
        if (!more) { v->out_of_memory = true; return NULL; }
        v->block = more;
        v->cap_blocks = cap;
    }
    void *p = calloc(n ? n : 1, size);
    if (p) v->block[v->n_blocks++] = p;
    else v->out_of_memory = true;
    return p;
}

char *fg__view_text(fg_view *v, const char *fmt, ...)
{
    char text[1200];
    va_list ap;
    va_start(ap, fmt);
    const int n = vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    const size_t size = (n < 0 ? 0 : (size_t)n < sizeof text ? (size_t)n : sizeof text - 1) + 1;
    char *copy = fg__view_alloc(v, size, 1);
    if (copy) memcpy(copy, text, size - 1);
    return copy;
}

typedef struct { int64_t id; int32_t at; } place;
typedef struct {
    fg_view *v;
    char    *message;
    fg_status status;
    place   *values, *nodes, *scopes;    /* sorted by id */
    int32_t n_scopes, *box_of;           /* scope -> box */
    const char *what;                    /* of the entry being read, for messages */
    int64_t entry;
} reader;

static FG_PRINTF(2, 3) bool refuse(reader *r, const char *fmt, ...)
{
    char text[300];
    va_list ap;
    if (r->status) return false;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    if (r->what) snprintf(r->message, 400, "%s %" PRId64 ": %s", r->what, r->entry, text);
    else snprintf(r->message, 400, "%s", text);
    r->status = FG_ERR_FORMAT;
    return false;
}

static const char *text_of(const fg_json_value *o, const char *key)
{
    const fg_json_value *x = fg_json_get(o, key);
    return x && x->kind == FG_JSON_TEXT ? x->u.text : "";
}

static double real_of(const fg_json_value *o, const char *key, double otherwise)
{
    double x;
    return fg_json_number(fg_json_get(o, key), &x) && isfinite(x) ? x : otherwise;
}

static int64_t whole_of(const fg_json_value *o, const char *key, int64_t otherwise)
{
    const fg_json_value *x = fg_json_get(o, key);
    return x && x->kind == FG_JSON_WHOLE ? x->u.whole : otherwise;
}

static bool flag_of(const fg_json_value *o, const char *key)
{
    const fg_json_value *x = fg_json_get(o, key);
    return x && x->kind == FG_JSON_TRUE;
}

/* The place of a word in a list; -1 if it is not there. */
static int word(const char *s, int n, const char *const *words)
{
    for (int i = 0; i < n; i++) if (!strcmp(s, words[i])) return i;
    return -1;
}

static const fg_json_value *list_of(reader *r, const fg_json_value *o, const char *key,
                                    int64_t most,
                                    bool needed)
{
    const fg_json_value *x = fg_json_get(o, key);
    if ((!x && needed) || (x && x->kind != FG_JSON_LIST)) refuse(r, "needs a list '%s'", key);
    else if (x && x->n > most) refuse(r, "'%s' is longer than %" PRId64, key, most);
    return r->status ? NULL : x;
}

static int by_id(const void *a, const void *b)
{
    const place *x = a, *y = b;
    return x->id < y->id ? -1 : x->id > y->id;
}

/* The index of what has this id, -1 if nothing has. */
static int32_t find(const place *s, int32_t n, int64_t id)
{
    int32_t lo = 0, hi = n;
    while (lo < hi) {
        const int32_t mid = lo + (hi - lo) / 2;
        if (s[mid].id < id) lo = mid + 1;
        else hi = mid;
    }
    return lo < n && s[lo].id == id ? s[lo].at : -1;
}

/* A sorted index of a list of objects with an 'id'; refuses one id twice. */
static place *index_of(reader *r, const fg_json_value *list, const char *what)
{
    place *s = fg__view_alloc(r->v, (size_t)(list->n ? list->n : 1), sizeof *s);
    int32_t n = 0;
    if (!s) { r->status = FG_ERR_MEMORY; return NULL; }
    for (const fg_json_value *x = list->first; x; x = x->next, n++) {
        s[n].id = whole_of(x, "id", -1);
        s[n].at = n;
        if (x->kind != FG_JSON_OBJECT || s[n].id < 0) {
            refuse(r, "every one of the %ss needs an 'id'", what);
            return NULL;
        }
    }
    qsort(s, (size_t)n, sizeof *s, by_id);
    for (int32_t i = 1; i < n; i++)
        if (s[i].id == s[i - 1].id) refuse(r, "two %ss have the id %" PRId64, what, s[i].id);
    return s;
}

/* ---- values ---------------------------------------------------------------------------------- */

static void read_value(reader *r, const fg_json_value *x, view_value *v)
{
    static const char *const kinds[] = { "node", "input", "param", "state" };
    static const char *const places[] = { "arena", "io", "store", "none" };
    const fg_json_value *shape = list_of(r, x, "shape", FG_MAX_RANK, true);
    const fg_json_value *stats = fg_json_get(x, "stats");
    *v = (view_value){ .id = r->entry, .dtype = text_of(x, "dtype"), .name = text_of(x, "name"),
                       .reused = text_of(x, "reused"), .bytes = whole_of(x, "bytes", 0),
                       .offset = whole_of(x, "offset", -1), .from = whole_of(x, "from", -1),
                       .to = whole_of(x, "to", -1), .maker = -1, .first_use = -1,
                       .frozen = flag_of(x, "frozen"), .failed = flag_of(x, "failed") };
    v->kind = word(text_of(x, "kind"), 4, kinds);
    if (v->kind < 0) refuse(r, "its kind is node, input, param or state");
    for (const fg_json_value *d = shape ? shape->first : NULL; d; d = d->next) {
        if (d->kind != FG_JSON_WHOLE || d->u.whole < 0) refuse(r, "its shape is not whole numbers");
        v->dim[v->rank++] = d->kind == FG_JSON_WHOLE ? d->u.whole : 0;
    }
    if (v->bytes < 0 || v->bytes > INT64_MAX / 4) refuse(r, "its bytes are out of range");
    v->place = word(text_of(x, "place"), 4, places);
    if (v->place < 0) v->place = VIEW_NOWHERE;
    v->laid = v->place == VIEW_IN_ARENA && v->offset >= 0 && v->from >= 0 && v->to >= v->from;
    if (v->laid && v->offset > INT64_MAX / 4) refuse(r, "its offset is out of range");
    const int64_t root = whole_of(x, "root", -1);
    v->root = root < 0 ? -1 : find(r->values, r->v->n_values, root);
    if (root >= 0 && v->root < 0) refuse(r, "its root %" PRId64 " is not there", root);
    if (!stats || stats->kind != FG_JSON_OBJECT) return;
    v->seen = r->v->seen = true;
    v->least = real_of(stats, "min", 0);
    v->greatest = real_of(stats, "max", 0);
    v->mean = real_of(stats, "mean", 0);
    v->rms = real_of(stats, "rms", 0);
    v->not_finite = whole_of(stats, "not_finite", 0);
}

static void read_values(reader *r, const fg_json_value *list)
{
    fg_view *v = r->v;
    v->n_values = list ? (int32_t)list->n : 0;
    v->value = fg__view_alloc(v, (size_t)v->n_values + 1, sizeof *v->value);
    r->values = list ? index_of(r, list, "value") : NULL;
    if (!r->values || !v->value) return;
    int32_t n = 0;
    r->what = "value";
    for (const fg_json_value *x = list->first; x && !r->status; x = x->next, n++) {
        r->entry = whole_of(x, "id", -1);
        read_value(r, x, &v->value[n]);
    }
    for (n = 0; n < v->n_values; n++) if (v->value[n].root < 0) v->value[n].root = n;
    r->what = NULL;
}

/* ---- scopes ---------------------------------------------------------------------------------- */

/* The part of a path behind its parent's; all of it where the parent's is no prefix. */
static const char *last_part(const char *path, const char *parent)
{
    const size_t n = strlen(parent);
    if (!strncmp(path, parent, n) && (path[n] == '.' || !n)) return path + n + (n > 0);
    return path;
}

/* The box of that name in a box, made if it is not there. */
static int32_t box_in(fg_view *v, int32_t parent, const char *name, const char *path,
                      int32_t *table, uint32_t mask)
{
    uint64_t h = (uint64_t)parent * 0x9e3779b97f4a7c15u;
    for (const char *c = name; *c; c++) h = (h ^ (unsigned char)*c) * 0x100000001b3u;
    uint32_t at = (uint32_t)(h >> 20) & mask;
    for (; table[at]; at = (at + 1) & mask) {
        const view_box *b = &v->box[table[at]];
        if (b->parent == parent && !strcmp(b->name, name)) return table[at];
    }
    table[at] = v->n_boxes;
    v->box[v->n_boxes] = (view_box){ .name = name, .path = path, .parent = parent,
                                     .depth = v->box[parent].depth + 1 };
    return v->n_boxes++;
}

static void read_scopes(reader *r, const fg_json_value *list)
{
    fg_view *v = r->v;
    r->n_scopes = list ? (int32_t)list->n : 0;
    uint32_t cap = 64;
    while (cap < 2u * (uint32_t)r->n_scopes) cap *= 2;
    int32_t *table = fg__view_alloc(v, cap, sizeof *table);
    v->cap_boxes = r->n_scopes + 2;
    v->box = fg__view_alloc(v, (size_t)v->cap_boxes, sizeof *v->box);
    r->box_of = fg__view_alloc(v, (size_t)r->n_scopes + 1, sizeof *r->box_of);
    r->scopes = list ? index_of(r, list, "scope") : NULL;
    if (!r->scopes || !table || !v->box || !r->box_of) return;
    v->box[0] = (view_box){ .name = "", .path = "", .parent = -1 };
    v->n_boxes = 1;
    int32_t n = 0;
    r->what = "scope";
    for (const fg_json_value *x = list->first; x && !r->status; x = x->next, n++) {
        r->entry = whole_of(x, "id", -1);
        const int64_t parent = whole_of(x, "parent", 0);
        const int32_t at = parent ? find(r->scopes, r->n_scopes, parent) : -1;
        if (parent && (at < 0 || at >= n)) {
            refuse(r, "its parent %" PRId64 " does not come before it", parent);
            return;
        }
        const int32_t outer = parent ? r->box_of[at] : 0;
        const char *path = text_of(x, "path"), *name = last_part(path, v->box[outer].path);
        const bool same = !strcmp(path, v->box[outer].path);
        if (v->box[outer].depth >= MAX_DEPTH) refuse(r, "lies deeper than %d scopes", MAX_DEPTH);
        r->box_of[n] = same ? outer : box_in(v, outer, name, path, table, cap - 1);
        if (flag_of(x, "recompute")) v->box[r->box_of[n]].recompute = true;
    }
    r->what = NULL;
}

/* ---- nodes ----------------------------------------------------------------------------------- */

static int32_t *read_ids(reader *r, const fg_json_value *x, const char *key, int *n)
{
    const fg_json_value *list = list_of(r, x, key, 64, true);
    *n = 0;
    if (!list) return NULL;
    int32_t *to = fg__view_alloc(r->v, (size_t)list->n + 1, sizeof *to);
    if (!to) { r->status = FG_ERR_MEMORY; return NULL; }
    for (const fg_json_value *i = list->first; i; i = i->next) {
        const int64_t id = i->kind == FG_JSON_WHOLE ? i->u.whole : -1;
        to[*n] = id > 0 ? find(r->values, r->v->n_values, id) : -1;
        if (id < 0 || (id > 0 && to[*n] < 0))
            refuse(r, "'%s' names a value that is not there", key);
        ++*n;
    }
    return to;
}

static void read_node(reader *r, const fg_json_value *x, int32_t k)
{
    static const char *const passes[] = { "forward", "backward", "update" };
    fg_view *v = r->v;
    view_node *n = &v->node[k];
    *n = (view_node){ .id = r->entry, .op = text_of(x, "op"), .src = text_of(x, "src"),
                      .user = text_of(x, "user"), .error = text_of(x, "error"),
                      .attrs = fg_json_get(x, "attrs"), .flops = real_of(x, "flops", 0),
                      .bytes = real_of(x, "bytes", 0), .time = real_of(x, "time_us", -1),
                      .recomputed = flag_of(x, "recomputed"), .param = -1, .pair = -1,
                      .home = -1, .next = -1, .op_info = -1 };
    n->pass = word(text_of(x, "pass"), 3, passes);
    if (n->pass < 0) refuse(r, "its pass is forward, backward or update");
    if (n->attrs && n->attrs->kind != FG_JSON_OBJECT) refuse(r, "'attrs' must be an object");
    const int64_t scope = whole_of(x, "scope", 0);
    const int32_t at = scope ? find(r->scopes, r->n_scopes, scope) : -1;
    if (scope && at < 0) refuse(r, "its scope %" PRId64 " is not there", scope);
    n->box = at < 0 ? 0 : r->box_of[at];
    n->in = read_ids(r, x, "in", &n->n_in);
    n->out = read_ids(r, x, "out", &n->n_out);
    n->view = !strcmp(text_of(x, "memory"), "view") || !strcmp(text_of(x, "memory"), "part");
    n->thin = n->view || !strcmp(text_of(x, "memory"), "join");
    n->overwrites = !strcmp(text_of(x, "memory"), "overwrites");
    for (int o = 0; o < n->n_out && n->out; o++) {
        view_value *y = n->out[o] < 0 ? NULL : &v->value[n->out[o]];
        if (!y || y->maker >= 0 || y->kind != VIEW_NODE)
            refuse(r, "output %d is no value that this node alone makes", o);
        else { y->maker = k; y->out = o; }
    }
    for (int i = 0; i < v->n_ops; i++) if (!strcmp(v->op[i].name, n->op)) n->op_info = i;
    v->has[n->pass < 0 ? 0 : n->pass] = true;
    v->timed |= n->time >= 0;
    v->failed |= n->error[0] != 0;
}

static void read_nodes(reader *r, const fg_json_value *list)
{
    fg_view *v = r->v;
    v->n_nodes = list ? (int32_t)list->n : 0;
    v->node = fg__view_alloc(v, (size_t)v->n_nodes + 1, sizeof *v->node);
    r->nodes = list ? index_of(r, list, "node") : NULL;
    if (!r->nodes || !v->node) return;
    int32_t k = 0;
    r->what = "node";
    for (const fg_json_value *x = list->first; x && !r->status; x = x->next, k++) {
        r->entry = whole_of(x, "id", -1);
        read_node(r, x, k);
        const int64_t pair = whole_of(x, "pair", -1);
        v->node[k].pair = pair < 0 ? -1 : find(r->nodes, v->n_nodes, pair);
    }
    for (k = 0; k < v->n_nodes && !r->status; k++)
        for (int i = 0; i < v->node[k].n_in; i++) {
            view_value *y = v->node[k].in[i] < 0 ? NULL : &v->value[v->node[k].in[i]];
            if (y && !y->uses++) y->first_use = k;
        }
    r->what = NULL;
}

/* ---- the rest -------------------------------------------------------------------------------- */

static void read_ops(reader *r, const fg_json_value *list)
{
    fg_view *v = r->v;
    v->op = fg__view_alloc(v, list ? (size_t)list->n + 1 : 1, sizeof *v->op);
    for (const fg_json_value *x = list && v->op ? list->first : NULL; x; x = x->next)
        v->op[v->n_ops++] = (view_op){ text_of(x, "name"), text_of(x, "ins"), text_of(x, "outs"),
                                       text_of(x, "formula") };
}

static void read_outputs(reader *r, const fg_json_value *list)
{
    fg_view *v = r->v;
    v->output = fg__view_alloc(v, list ? (size_t)list->n + 1 : 1, sizeof *v->output);
    for (const fg_json_value *x = list && v->output ? list->first : NULL; x; x = x->next) {
        const int32_t at = find(r->values, v->n_values, whole_of(x, "value", -1));
        if (at < 0) refuse(r, "an output's value is not there");
        else v->output[v->n_outputs++] = (view_output){ at, text_of(x, "name") };
    }
}

static void read_plans(reader *r, const fg_json_value *list)
{
    fg_view *v = r->v;
    v->plan = fg__view_alloc(v, list ? (size_t)list->n + 1 : 1, sizeof *v->plan);
    for (const fg_json_value *x = list && v->plan ? list->first : NULL; x; x = x->next) {
        v->plan[v->n_plans++] = (view_plan){
            whole_of(x, "first_node", 0), whole_of(x, "nodes", 0), whole_of(x, "arena", 0),
            whole_of(x, "params", 0), whole_of(x, "states", 0), whole_of(x, "inputs", 0),
            whole_of(x, "scratch", 0), whole_of(x, "total", 0) };
    }
    v->planned = v->n_plans > 0;
}

static void read_all(reader *r, const fg_json_value *root)
{
    fg_view *v = r->v;
    if (!root || root->kind != FG_JSON_OBJECT || !fg_json_get(root, "fox_graph")) {
        refuse(r, "this is no graph.json: it has no 'fox_graph'");
        return;
    }
    const int64_t version = whole_of(root, "fox_graph", -1);
    if (version != 1) {
        refuse(r, "graph.json of version %" PRId64 " is not known, only 1", version);
        return;
    }
    v->model = text_of(root, "model");
    v->stage = text_of(root, "stage");
    v->device = text_of(root, "device");
    v->library = text_of(root, "library");
    read_ops(r, list_of(r, root, "ops", 10000, false));
    const fg_json_value *scopes = list_of(r, root, "scopes", MAX_SCOPES, true);
    if (!r->status) read_scopes(r, scopes);
    const fg_json_value *values = list_of(r, root, "values", MAX_VALUES, true);
    if (!r->status) read_values(r, values);
    const fg_json_value *nodes = list_of(r, root, "nodes", MAX_VALUES, true);
    if (!r->status) read_nodes(r, nodes);
    if (!r->status) read_outputs(r, list_of(r, root, "outputs", 100000, false));
    if (!r->status) read_plans(r, list_of(r, root, "plans", 100, false));
}

fg_status fg_view_read(const char *json, size_t n, fg_view **out, char message[400])
{
    const fg_json_rules rules = { 16, MAX_VALUES, false };
    char why[200] = "";
    *out = NULL;
    message[0] = 0;
    fg_view *v = calloc(1, sizeof *v);
    reader r = { .v = v, .message = message, .status = v ? FG_OK : FG_ERR_MEMORY };
    if (v) r.status = fg_json_parse(json, n, rules, &v->json, why);
    if (r.status) snprintf(message, 400, "%s", why[0] ? why : "out of memory");
    else read_all(&r, fg_json_root(v->json));
    if (!r.status && v->out_of_memory) r.status = FG_ERR_MEMORY;
    if (!r.status) r.status = fg__view_tree(v);
    if (!r.status) r.status = fg__view_layout(v);
    if (r.status == FG_ERR_MEMORY) snprintf(message, 400, "out of memory");
    if (!r.status) *out = v;
    else fg_view_free(v);
    return r.status;
}

void fg_view_free(fg_view *v)
{
    if (!v) return;
    for (int32_t i = 0; i < v->n_blocks; i++) free(v->block[i]);
    free(v->block);
    fg_json_free(v->json);
    free(v);
}
