/* view_tree.c - what belongs together: backward nodes to their twins, updates to their parameters,
 * nodes to boxes, equal boxes to classes.
 *
 * Two boxes are equal if their nodes have the same ops, attributes, shapes and wiring, taken in the
 * same order; names of parameters count with the box's own path left out. */
#include "view.h"

enum { MOST_ITEMS = 256, PART = 64 };    /* longer lists of nodes are drawn in parts */

static uint64_t mix(uint64_t h, uint64_t x)
{
    h ^= x + 0x9e3779b97f4a7c15u + (h << 6) + (h >> 2);
    h *= 0xff51afd7ed558ccdu;
    return h ^ (h >> 29);
}

static uint64_t mix_text(uint64_t h, const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++) h = (h ^ (unsigned char)s[i]) * 0x100000001b3u;
    return mix(h, n);
}

/* ---- homes ----------------------------------------------------------------------------------- */

static bool list_readers(fg_view *v)
{
    int64_t total = 0;
    for (int32_t x = 0; x < v->n_values; x++) total += v->value[x].uses;
    if (total > INT32_MAX / 2) return false;
    v->first_reader = fg__view_alloc(v, (size_t)v->n_values + 2, sizeof *v->first_reader);
    v->reader = fg__view_alloc(v, (size_t)total + 1, sizeof *v->reader);
    int32_t *next = fg__view_alloc(v, (size_t)v->n_values + 1, sizeof *next);
    if (!v->first_reader || !v->reader || !next) return false;
    for (int32_t x = 0; x < v->n_values; x++) {
        next[x] = v->first_reader[x];
        v->first_reader[x + 1] = v->first_reader[x] + v->value[x].uses;
    }
    for (int32_t k = 0; k < v->n_nodes; k++)
        for (int i = 0; i < v->node[k].n_in; i++)
            if (v->node[k].in[i] >= 0) v->reader[next[v->node[k].in[i]]++] = k;
    return true;
}

/* Does the node have an item of its own?  Those carry the edges that are laid out. */
static bool own(const fg_view *v, int32_t k) { return v->node[k].home == k; }

/* The first forward node that reads a value, -1 if none does. */
static int32_t forward_reader(const fg_view *v, int32_t x)
{
    for (int32_t i = v->first_reader[x]; i < v->first_reader[x + 1]; i++)
        if (v->node[v->reader[i]].pass == VIEW_FORWARD) return v->reader[i];
    return -1;
}

typedef struct { const char *name; int32_t at; } named;

static int by_name(const void *a, const void *b)
{
    return strcmp(((const named *)a)->name, ((const named *)b)->name);
}

static int32_t find_name(const named *list, int32_t n, const char *name)
{
    const named key = { name, 0 };
    const named *found = n ? bsearch(&key, list, (size_t)n, sizeof key, by_name) : NULL;
    return found ? found->at : -1;
}

/* The parameter that a state belongs to, whose name ends the state's; -1 if there is none. */
static int32_t param_of(const view_value *x, const named *list, int32_t n_list)
{
    int32_t found = -1;
    for (const char *dot = strchr(x->name, '.'); dot && found < 0; dot = strchr(dot + 1, '.'))
        found = find_name(list, n_list, dot + 1);
    return found;
}

/* The parameter that an update is for: the one that it reads, or whose states it reads; -1 if that
 * is none or several. */
static int32_t updated(const fg_view *v, const view_node *n, const named *list, int32_t n_list)
{
    int32_t one = -1;
    for (int i = 0; i < n->n_in; i++) {
        const view_value *x = n->in[i] < 0 ? NULL : &v->value[n->in[i]];
        const int32_t found = !x ? -1 : x->kind == VIEW_PARAM ? n->in[i]
                            : x->kind == VIEW_STATE ? param_of(x, list, n_list) : -1;
        if (found < 0) continue;
        if (one >= 0 && one != found) return -1;
        one = found;
    }
    return one;
}

static int32_t home_of_backward(const fg_view *v, const view_node *n)
{
    int32_t p = n->pair;
    for (int steps = 0; p >= 0 && steps < 8; steps++, p = v->node[p].pair)
        if (v->node[p].pass == VIEW_FORWARD) return p;
    for (int o = 0; o < n->n_out; o++)
        for (int32_t i = v->first_reader[n->out[o]]; i < v->first_reader[n->out[o] + 1]; i++)
            if (v->node[v->reader[i]].home >= 0) return v->node[v->reader[i]].home;
    for (int i = 0; i < n->n_in; i++) {
        const int32_t m = n->in[i] < 0 ? -1 : v->value[n->in[i]].maker;
        if (m >= 0 && v->node[m].home >= 0) return v->node[m].home;
    }
    return -1;
}

static int32_t home_of_update(const fg_view *v, view_node *n, const named *list, int32_t n_list)
{
    n->param = updated(v, n, list, n_list);
    if (n->param >= 0) return forward_reader(v, n->param);
    int32_t home = -1;                   /* that of all gradients that it reads, if it is one */
    for (int i = 0; i < n->n_in; i++) {
        const int32_t m = n->in[i] < 0 ? -1 : v->value[n->in[i]].maker;
        if (m < 0 || v->node[m].pass != VIEW_BACKWARD) continue;
        if (home >= 0 && v->node[m].home != home) return -1;
        home = v->node[m].home;
    }
    return home;
}

static bool find_homes(fg_view *v)
{
    named *list = fg__view_alloc(v, (size_t)v->n_values + 1, sizeof *list);
    int32_t n = 0;
    if (!list) return false;
    for (int32_t x = 0; x < v->n_values; x++)
        if (v->value[x].kind == VIEW_PARAM) list[n++] = (named){ v->value[x].name, x };
    qsort(list, (size_t)n, sizeof *list, by_name);
    for (int32_t k = 0; k < v->n_nodes; k++)
        if (v->node[k].pass == VIEW_FORWARD) v->node[k].home = k;
    for (int32_t k = v->n_nodes; k-- > 0 && v->has[VIEW_FORWARD]; )   /* readers before makers */
        if (v->node[k].pass == VIEW_BACKWARD) v->node[k].home = home_of_backward(v, &v->node[k]);
    for (int32_t k = 0; k < v->n_nodes; k++) {
        view_node *x = &v->node[k];
        if (x->pass == VIEW_UPDATE) x->home = home_of_update(v, x, list, n);
        if (x->home < 0 || v->node[x->home].home != x->home) x->home = k;
    }
    return true;
}

/* ---- boxes and items ------------------------------------------------------------------------- */

static int32_t new_box(fg_view *v, view_box b)
{
    if (v->n_boxes == v->cap_boxes) {
        const int32_t cap = 2 * v->cap_boxes + 16;
        view_box *more = fg__view_alloc(v, (size_t)cap, sizeof *more);
        if (!more) return -1;
        memcpy(more, v->box, (size_t)v->n_boxes * sizeof *more);
        v->box = more;
        v->cap_boxes = cap;
    }
    v->box[v->n_boxes] = b;
    return v->n_boxes++;
}

static bool place_nodes(fg_view *v)
{
    v->drawn_in = fg__view_alloc(v, (size_t)v->n_nodes + 1, sizeof *v->drawn_in);
    v->first_attached = fg__view_alloc(v, (size_t)v->n_nodes + 1, sizeof *v->first_attached);
    if (!v->drawn_in || !v->first_attached) return false;
    int32_t alone = 0, box = -1;
    for (int32_t k = 0; k < v->n_nodes; k++)
        alone += v->node[k].pass == VIEW_UPDATE && v->node[k].home == k;
    if (v->has[VIEW_FORWARD] && alone > 2) {
        box = new_box(v, (view_box){ .name = "optimizer", .path = "optimizer (shared)", .depth = 1,
                                     .made = true });
        if (box < 0) return false;
    }
    for (int32_t k = 0; k < v->n_nodes; k++) v->first_attached[k] = -1;
    for (int32_t k = v->n_nodes; k-- > 0; ) {
        view_node *n = &v->node[k];
        const bool own = n->home == k;
        v->drawn_in[k] = own && n->pass == VIEW_UPDATE && box >= 0 ? box : v->node[n->home].box;
        if (own) continue;
        n->next = v->first_attached[n->home];
        v->first_attached[n->home] = k;
    }
    return true;
}

static int by_order(const void *a, const void *b)
{
    const view_item *x = a, *y = b;
    if (x->order != y->order) return x->order < y->order ? -1 : 1;
    return x->kind != y->kind ? (x->kind < y->kind ? -1 : 1) : x->ref < y->ref ? -1
        : x->ref > y->ref;
}

/* Nodes and parts of a box with very many, PART in each: a new box is one item of it. */
static bool in_parts(fg_view *v, int32_t b)
{
    while (v->box[b].n_items > MOST_ITEMS) {
        const int32_t n = v->box[b].n_items, ends = b ? 0 : v->n_values + v->n_outputs;
        view_item *old = v->box[b].item, *item = fg__view_alloc(v, (size_t)(n + ends),
                                                                sizeof *item);
        int32_t made = 0;
        if (!item) return false;
        for (int32_t i = 0; i < n; ) {
            int32_t end = i;
            while (end < n && end - i < PART && (old[end].kind == ITEM_NODE ||
                   (old[end].kind == ITEM_BOX && v->box[old[end].ref].made))) end++;
            if (end - i < 2) { item[made++] = old[i++]; continue; }
            const char *name = fg__view_text(v, "part %d", (int)made);
            const char *path = fg__view_text(v, "%.1000s (part %d)", v->box[b].path, (int)made);
            const int32_t p = new_box(v, (view_box){ .name = name, .path = path, .parent = b,
                .depth = v->box[b].depth + 1, .made = true, .item = &old[i], .n_items = end - i });
            if (p < 0 || !name || !path) return false;
            for (; i < end; i++) {
                if (old[i].kind == ITEM_BOX) v->box[old[i].ref].parent = p;
                else v->drawn_in[old[i].ref] = p;
            }
            item[made++] = (view_item){ ITEM_BOX, p, 1, v->box[p].item[0].order };
        }
        v->box[b].item = item;
        v->box[b].n_items = made;
        if (made == n) return true;
    }
    return true;
}

/* Counts, then fills, the items that every box has; inner boxes come after outer ones. */
static bool list_items(fg_view *v)
{
    const int32_t n = v->n_boxes;
    int32_t *count = fg__view_alloc(v, (size_t)n + 1, sizeof *count);
    bool *full = fg__view_alloc(v, (size_t)n + 1, sizeof *full);
    if (!count || !full) return false;
    for (int32_t k = 0; k < v->n_nodes; k++) {
        if (v->node[k].home != k) continue;
        count[v->drawn_in[k]]++;
        for (int32_t b = v->drawn_in[k]; b > 0 && !full[b]; b = v->box[b].parent) {
            full[b] = true;
            count[v->box[b].parent]++;
        }
    }
    count[0] += v->n_values + v->n_outputs;
    for (int32_t b = 0; b < n; b++) {
        v->box[b].item = fg__view_alloc(v, (size_t)count[b] + 1, sizeof *v->box[b].item);
        if (!v->box[b].item) return false;
    }
    for (int32_t k = 0; k < v->n_nodes; k++) {
        view_box *b = &v->box[v->drawn_in[k]];
        const int64_t order = k + (int64_t)v->node[k].pass * v->n_nodes;
        if (v->node[k].home == k) b->item[b->n_items++] = (view_item){ ITEM_NODE, k, 1, order };
    }
    for (int32_t b = n; b-- > 0; ) {
        view_box *x = &v->box[b];
        qsort(x->item, (size_t)x->n_items, sizeof *x->item, by_order);
        if (!x->n_items || !b) continue;
        view_box *p = &v->box[x->parent];
        p->item[p->n_items++] = (view_item){ ITEM_BOX, b, 1, x->item[0].order };
    }
    for (int32_t b = n; b-- > 0; ) if (!in_parts(v, b)) return false;
    return true;
}

/* Inputs that forward nodes read come first, outputs that they make last. */
static void add_ends(fg_view *v)
{
    view_box *b = &v->box[0];
    for (int32_t x = 0; x < v->n_values; x++)
        if (v->value[x].kind == VIEW_INPUT && fg__view_flows(v, x))
            b->item[b->n_items++] = (view_item){ ITEM_INPUT, x, 1, x - (int64_t)v->n_values };
    for (int32_t i = 0; i < v->n_outputs; i++) {
        const int32_t m = v->value[v->output[i].value].maker;
        if (m >= 0 && own(v, m) && (v->node[m].pass == VIEW_FORWARD || !v->has[VIEW_FORWARD]))
            b->item[b->n_items++] = (view_item){ ITEM_OUTPUT, i, 1, INT64_MAX / 2 + i };
    }
    qsort(b->item, (size_t)b->n_items, sizeof *b->item, by_order);
}

static void draw_node(fg_view *v, int32_t k, int32_t *n)
{
    v->at[k] = *n;
    v->drawn[(*n)++] = k;
    for (int32_t a = v->first_attached[k]; a >= 0; a = v->node[a].next) {
        v->at[a] = *n;
        v->drawn[(*n)++] = a;
    }
}

/* The depth of boxes is bounded by the reader, and so is the recursion. */
static void draw_box(fg_view *v, int32_t b, int32_t *n)
{
    v->box[b].first = *n;
    for (int32_t i = 0; i < v->box[b].n_items; i++) {
        const view_item *x = &v->box[b].item[i];
        if (x->kind == ITEM_NODE) draw_node(v, x->ref, n);
        if (x->kind != ITEM_BOX) continue;
        v->box[x->ref].parent = b;
        v->box[x->ref].depth = v->box[b].depth + 1;
        draw_box(v, x->ref, n);
    }
    v->box[b].end = *n;
    v->inner_first[v->n_inner++] = b;
}

bool fg__view_inside(const fg_view *v, const view_box *b, int32_t node)
{
    return v->at[node] >= b->first && v->at[node] < b->end;
}

/* ---- what goes in and out -------------------------------------------------------------------- */

int32_t fg__view_seen(const fg_view *v, int32_t x)
{
    for (int steps = 0; steps < 1000; steps++) {
        const int32_t m = v->value[x].maker;
        if (m < 0 || !v->node[m].view || v->node[m].n_in < 1 || v->node[m].in[0] < 0) break;
        x = v->node[m].in[0];
    }
    return x;
}

bool fg__view_flows(const fg_view *v, int32_t x)
{
    const view_value *y = &v->value[x];
    if (y->maker >= 0) return own(v, y->maker);
    for (int32_t i = v->first_reader[x]; y->kind == VIEW_INPUT && i < v->first_reader[x + 1]; i++)
        if (own(v, v->reader[i])) return true;
    return false;
}

static bool used_outside(const fg_view *v, const view_box *b, int32_t x)
{
    for (int32_t i = v->first_reader[x]; i < v->first_reader[x + 1]; i++)
        if (own(v, v->reader[i]) && !fg__view_inside(v, b, v->reader[i])) return true;
    return false;
}

/* stamp[x]: the last box, plus 1, for which value x was met. */
static bool find_ports(fg_view *v, int32_t at, int32_t *stamp, int32_t *list, const bool *output)
{
    view_box *b = &v->box[at];
    int32_t n = 0, m = 0;
    for (int32_t i = b->first; i < b->end; i++) {
        const view_node *k = &v->node[v->drawn[i]];
        for (int j = 0; j < k->n_in && own(v, v->drawn[i]); j++) {
            const int32_t x = k->in[j];
            if (x < 0 || stamp[x] == at + 1 || !fg__view_flows(v, x)) continue;
            if (v->value[x].maker >= 0 && fg__view_inside(v, b, v->value[x].maker)) continue;
            stamp[x] = at + 1;
            list[n++] = x;
        }
    }
    b->in = fg__view_alloc(v, (size_t)n + 1, sizeof *b->in);
    if (!b->in) return false;
    memcpy(b->in, list, (size_t)n * sizeof *list);
    b->n_in = n;
    for (int32_t i = b->first; i < b->end; i++) {
        const view_node *k = &v->node[v->drawn[i]];
        for (int j = 0; j < k->n_out && own(v, v->drawn[i]); j++)
            if (output[k->out[j]] || used_outside(v, b, k->out[j])) list[m++] = k->out[j];
    }
    b->out = fg__view_alloc(v, (size_t)m + 1, sizeof *b->out);
    if (!b->out) return false;
    memcpy(b->out, list, (size_t)m * sizeof *list);
    b->n_out = m;
    return true;
}

/* Distinct memory of forward nodes that backward nodes of the box read. */
static void find_saved(fg_view *v, int32_t at, int32_t *stamp)
{
    view_box *b = &v->box[at];
    for (int32_t i = b->first; i < b->end; i++) {
        const view_node *k = &v->node[v->drawn[i]];
        for (int j = 0; j < k->n_in && k->pass == VIEW_BACKWARD; j++) {
            const int32_t x = k->in[j] < 0 ? -1 : fg__view_seen(v, k->in[j]);
            if (x < 0 || stamp[x] == at + 1 || v->value[x].maker < 0) continue;
            if (v->node[v->value[x].maker].pass != VIEW_FORWARD) continue;
            stamp[x] = at + 1;
            b->saved += v->value[x].bytes;
        }
    }
}

/* ---- classes --------------------------------------------------------------------------------- */

static uint64_t hash_json(uint64_t h, const fg_json_value *x)
{
    if (!x) return h;
    h = mix(h, (uint64_t)x->kind);
    if (x->key) h = mix_text(h, x->key, strlen(x->key));
    if (x->kind == FG_JSON_TEXT) return mix_text(h, x->u.text, strlen(x->u.text));
    if (x->kind == FG_JSON_WHOLE) return mix(h, (uint64_t)x->u.whole);
    uint64_t bits = 0;
    if (x->kind == FG_JSON_REAL) { memcpy(&bits, &x->u.real, sizeof bits); return mix(h, bits); }
    if (x->kind < FG_JSON_LIST) return h;
    for (const fg_json_value *y = x->first; y; y = y->next) h = hash_json(h, y);
    return h;
}

static uint64_t hash_value(uint64_t h, const view_value *x)
{
    h = mix_text(h, x->dtype, strlen(x->dtype));
    for (int i = 0; i < x->rank; i++) h = mix(h, (uint64_t)x->dim[i]);
    return mix(h, (uint64_t)x->rank);
}

/* A name with the box's path, where it occurs, left out. */
static uint64_t hash_name(uint64_t h, const char *name, const char *path)
{
    const char *found = path[0] ? strstr(name, path) : NULL;
    if (!found) return mix_text(h, name, strlen(name));
    h = mix_text(h, name, (size_t)(found - name));
    return mix_text(mix(h, 1), found + strlen(path), strlen(found + strlen(path)));
}

typedef struct { int32_t *stamp, *number, n; } outsiders;

static uint64_t hash_input(const fg_view *v, const view_box *b, int32_t mark, int32_t x,
                           outsiders *o, uint64_t h)
{
    if (x < 0) return mix(h, 7);
    const view_value *y = &v->value[x];
    if (y->maker >= 0 && fg__view_inside(v, b, y->maker))
        return mix(mix(h, (uint64_t)(v->at[y->maker] - b->first)), (uint64_t)y->out);
    if (o->stamp[x] != mark) { o->stamp[x] = mark; o->number[x] = o->n++; }
    h = hash_value(mix(h, 1000003u + (uint64_t)o->number[x]), y);
    return y->kind == VIEW_PARAM || y->kind == VIEW_STATE ? hash_name(h, y->name, b->path) : h;
}

/* Attributes, but not where a span of a value from outside the box lies, or whose gradient goes
 * there: blocks that take each a row of one table are equal. */
static uint64_t hash_attrs(const fg_view *v, const view_box *b, const view_node *n, uint64_t h)
{
    const bool span = !strcmp(n->op, "slice") && n->n_in > 0 && n->in[0] >= 0;
    const int32_t maker = span ? v->value[n->in[0]].maker : -1;
    const bool outside = (span && (maker < 0 || !fg__view_inside(v, b, maker))) ||
                         !strcmp(n->op, "slice_grad");
    for (const fg_json_value *a = n->attrs ? n->attrs->first : NULL; a; a = a->next)
        if (!outside || (strcmp(a->key, "start") && strcmp(a->key, "stop"))) h = hash_json(h, a);
    return h;
}

static void hash_box(fg_view *v, int32_t at, outsiders *o, const bool *output)
{
    view_box *b = &v->box[at];
    uint64_t h = 11;
    o->n = 0;
    b->skeleton = mix(5, (uint64_t)b->n_items);
    for (int32_t i = 0; i < b->n_items; i++) {
        b->skeleton = mix(b->skeleton, (uint64_t)b->item[i].kind);
        if (b->item[i].kind != ITEM_BOX) continue;
        const view_box *c = &v->box[b->item[i].ref];
        b->skeleton = mix(b->skeleton, c->skeleton);
        b->skeleton = mix_text(b->skeleton, c->made ? "" : c->name, c->made ? 0 : strlen(c->name));
    }
    for (int32_t i = b->first; i < b->end; i++) {
        const view_node *k = &v->node[v->drawn[i]];
        h = mix_text(mix(h, (uint64_t)k->pass), k->op, strlen(k->op));
        h = hash_attrs(v, b, k, mix(h, k->recomputed));
        h = mix_text(h, k->error, strlen(k->error));
        h = mix(h, (uint64_t)(v->at[k->home] - b->first));
        for (int j = 0; j < k->n_in; j++) h = hash_input(v, b, at + 1, k->in[j], o, h);
        for (int j = 0; j < k->n_out; j++) {
            h = hash_value(h, &v->value[k->out[j]]);
            if (own(v, v->drawn[i]))
                h = mix(h, output[k->out[j]] || used_outside(v, b, k->out[j]));
        }
    }
    b->hash = mix(mix(h, b->skeleton), (uint64_t)(b->end - b->first));
}

static bool alike(const view_box *a, const view_box *b)
{
    return a->hash == b->hash && a->skeleton == b->skeleton && a->n_items == b->n_items &&
           a->end - a->first == b->end - b->first && a->n_in == b->n_in && a->n_out == b->n_out;
}

/* Do the names differ in a number at their end alone? */
static bool numbered(const char *a, const char *b)
{
    size_t n = strlen(a), m = strlen(b);
    const size_t whole = n, other = m;
    while (n && a[n - 1] >= '0' && a[n - 1] <= '9') n--;
    while (m && b[m - 1] >= '0' && b[m - 1] <= '9') m--;
    return n < whole && m < other && n == m && !strncmp(a, b, n);
}

/* Neighbours of one class become a run. */
static void fold_runs(fg_view *v, view_box *b)
{
    int32_t n = 0;
    for (int32_t i = 0; i < b->n_items; ) {
        int32_t end = i + 1;
        const view_item x = b->item[i];
        const view_box *first = x.kind == ITEM_BOX ? &v->box[x.ref] : NULL;
        while (first && end < b->n_items && b->item[end].kind == ITEM_BOX &&
               v->box[b->item[end].ref].class == first->class &&
               numbered(first->name, v->box[b->item[end].ref].name)) end++;
        for (int32_t k = i; end - i > 1 && k < end; k++) {
            v->box[b->item[k].ref].twin = x.ref;
            b->child[b->n_children++] = b->item[k].ref;
        }
        if (end - i > 1)
            b->item[n++] = (view_item){ ITEM_RUN, b->n_children - (end - i), end - i, x.order };
        else b->item[n++] = x;
        i = end;
    }
    b->n_items = n;
}

static bool find_classes(fg_view *v)
{
    uint32_t cap = 64;
    while (cap < 2u * (uint32_t)v->n_boxes) cap *= 2;
    int32_t *table = fg__view_alloc(v, cap, sizeof *table);
    v->class = fg__view_alloc(v, (size_t)v->n_boxes + 1, sizeof *v->class);
    if (!table || !v->class) return false;
    for (int32_t i = 0; i < v->n_inner; i++) {
        const int32_t b = v->inner_first[i];
        view_box *x = &v->box[b];
        uint32_t at = (uint32_t)(x->hash >> 16) & (cap - 1);
        while (table[at] && !alike(&v->box[v->class[table[at] - 1].box], x))
            at = (at + 1) & (cap - 1);
        if (!table[at]) {
            v->class[v->n_classes] = (view_class){ .box = b, .hash = x->hash };
            table[at] = ++v->n_classes;
        }
        x->class = table[at] - 1;
        x->twin = b;
    }
    for (int32_t i = 0; i < v->n_inner; i++) {
        view_box *x = &v->box[v->inner_first[i]];
        x->child = fg__view_alloc(v, (size_t)x->n_items + 1, sizeof *x->child);
        if (!x->child) return false;
        fold_runs(v, x);
    }
    return true;
}

int32_t fg__view_stand_in(const fg_view *v, int32_t k)
{
    for (;;) {
        int32_t outer = -1;
        for (int32_t b = v->drawn_in[k]; b >= 0; b = v->box[b].parent)
            if (v->box[b].twin != b) outer = b;
        if (outer < 0) return k;
        k = v->drawn[v->at[k] - v->box[outer].first + v->box[v->box[outer].twin].first];
    }
}

fg_status fg__view_tree(fg_view *v)
{
    if (!list_readers(v) || !find_homes(v) || !place_nodes(v) || !list_items(v))
        return FG_ERR_MEMORY;
    add_ends(v);
    v->drawn = fg__view_alloc(v, (size_t)v->n_nodes + 1, sizeof *v->drawn);
    v->at = fg__view_alloc(v, (size_t)v->n_nodes + 1, sizeof *v->at);
    v->inner_first = fg__view_alloc(v, (size_t)v->n_boxes + 1, sizeof *v->inner_first);
    const size_t n = (size_t)v->n_values + 1;
    int32_t *stamp[3];
    for (int i = 0; i < 3; i++) stamp[i] = fg__view_alloc(v, n, sizeof **stamp);
    int32_t *list = fg__view_alloc(v, n, sizeof *list);
    bool *output = fg__view_alloc(v, n, sizeof *output);
    outsiders o = { stamp[2], fg__view_alloc(v, n, sizeof *o.number), 0 };
    if (v->out_of_memory) return FG_ERR_MEMORY;
    int32_t drawn = 0;
    draw_box(v, 0, &drawn);
    for (int32_t i = 0; i < v->n_outputs; i++) output[v->output[i].value] = true;
    for (int32_t i = 0; i < v->n_inner; i++) {
        if (!find_ports(v, v->inner_first[i], stamp[0], list, output)) return FG_ERR_MEMORY;
        find_saved(v, v->inner_first[i], stamp[1]);
    }
    for (int32_t i = 0; i < v->n_inner; i++) hash_box(v, v->inner_first[i], &o, output);
    return find_classes(v) ? FG_OK : FG_ERR_MEMORY;
}
