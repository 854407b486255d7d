/* view_diff.c - what makes one graph of another: nodes added, removed, changed; scopes moved.
 *
 * Scopes are matched by path, then whole scopes that only one side has by content: those have
 * moved. In a scope the nodes of a pass are aligned by op and parameter (longest common
 * subsequence), so an inserted node shifts nothing.  A node is changed if an attribute, an output's
 * shape or dtype, or what it reads differs; reading through an added or removed node of one input
 * is no change of its own.  Equal changes in scopes that differ in numbers alone are reported once,
 * with their count. */
#include <inttypes.h>
#include <math.h>
#include "view.h"

enum { ADDED, REMOVED, CHANGED, MOVED, KINDS };
enum { MOST_TABLE = 4000000 };
static const char *const kind_name[] = { "added", "removed", "changed", "moved" };

typedef struct { int kind; int32_t a, b; const char *op, *path, *where, *what; } change;
typedef struct { int32_t first, count; } group;
typedef struct {
    fg_view *a, *b;
    int32_t *to_b, *to_a;                /* node -> its partner, -1 if none */
    int32_t *box_to_b, *box_to_a;
    int32_t *list_a, *first_a, *list_b, *first_b;        /* nodes by box and pass */
    change  *change; int32_t n_changes, cap;
    group   *group;  int32_t n_groups;
    int32_t  count[KINDS];
} differ;

/* ---- partners -------------------------------------------------------------------------------- */

typedef struct { const char *path; uint64_t hash; int32_t at; } key;

static int by_path(const void *a, const void *b)
{
    const key *x = a, *y = b;
    const int c = strcmp(x->path, y->path);
    return c ? c : x->at - y->at;
}

static key *sorted_boxes(fg_view *v)
{
    key *k = fg__view_alloc(v, (size_t)v->n_boxes + 1, sizeof *k);
    for (int32_t i = 0; k && i < v->n_boxes; i++) k[i] = (key){ v->box[i].path, v->box[i].hash, i };
    if (k) qsort(k, (size_t)v->n_boxes, sizeof *k, by_path);
    return k;
}

static bool match_boxes(differ *d)
{
    key *a = sorted_boxes(d->a), *b = sorted_boxes(d->b);
    if (!a || !b) return false;
    for (int32_t i = 0, k = 0; i < d->a->n_boxes; i++) {
        while (k < d->b->n_boxes && strcmp(b[k].path, a[i].path) < 0) k++;
        if (k < d->b->n_boxes && !strcmp(b[k].path, a[i].path) &&
            !d->a->box[a[i].at].n_items == !d->b->box[b[k].at].n_items) {
            d->box_to_b[a[i].at] = b[k].at;
            d->box_to_a[b[k].at] = a[i].at;
        }
    }
    return true;
}

/* Nodes by the scope they were made in and by pass: list[first[3 box + pass]] and on. */
static bool list_nodes(fg_view *v, int32_t **list, int32_t **first)
{
    *first = fg__view_alloc(v, 3 * (size_t)v->n_boxes + 2, sizeof **first);
    *list = fg__view_alloc(v, (size_t)v->n_nodes + 1, sizeof **list);
    int32_t *next = fg__view_alloc(v, 3 * (size_t)v->n_boxes + 2, sizeof *next);
    if (!*first || !*list || !next) return false;
    for (int32_t k = 0; k < v->n_nodes; k++) (*first)[3 * v->node[k].box + v->node[k].pass + 1]++;
    for (int32_t i = 0; i < 3 * v->n_boxes; i++) {
        (*first)[i + 1] += (*first)[i];
        next[i] = (*first)[i];
    }
    for (int32_t k = 0; k < v->n_nodes; k++)
        (*list)[next[3 * v->node[k].box + v->node[k].pass]++] = k;
    return true;
}

/* The parameter's name that a node reads, without the box's path; "" if none. */
static const char *reads(const fg_view *v, const view_node *n)
{
    for (int i = 0; i < n->n_in; i++) {
        const view_value *x = n->in[i] < 0 ? NULL : &v->value[n->in[i]];
        if (!x || x->kind != VIEW_PARAM) continue;
        const size_t m = strlen(v->box[n->box].path);
        return m && !strncmp(x->name, v->box[n->box].path, m) ? x->name + m : x->name;
    }
    return "";
}

static bool alike(const differ *d, int32_t a, int32_t b)
{
    const view_node *x = &d->a->node[a], *y = &d->b->node[b];
    return !strcmp(x->op, y->op) && x->recomputed == y->recomputed &&
           !strcmp(reads(d->a, x), reads(d->b, y));
}

static void pair_up(differ *d, int32_t a, int32_t b)
{
    d->to_b[a] = b;
    d->to_a[b] = a;
}

/* Aligns nodes a[0..n) with b[0..m). */
static bool align(differ *d, const int32_t *a, int32_t n, const int32_t *b, int32_t m)
{
    while (n && m && alike(d, a[0], b[0])) { pair_up(d, *a++, *b++); n--; m--; }
    while (n && m && alike(d, a[n - 1], b[m - 1])) pair_up(d, a[--n], b[--m]);
    if (!n || !m) return true;
    if ((int64_t)n * m > MOST_TABLE) {   /* too long for the table: the next one that is alike */
        for (int32_t i = 0, k = 0; i < n; i++) {
            int32_t at = k;
            while (at < m && at < k + 64 && !alike(d, a[i], b[at])) at++;
            if (at < m && at < k + 64) { pair_up(d, a[i], b[at]); k = at + 1; }
        }
        return true;
    }
    int32_t *t = calloc((size_t)(n + 1) * (size_t)(m + 1), sizeof *t);
    if (!t) return false;
    for (int32_t i = n; i-- > 0; )
        for (int32_t k = m; k-- > 0; ) {
            const int32_t down = t[(i + 1) * (m + 1) + k], right = t[i * (m + 1) + k + 1];
            t[i * (m + 1) + k] = alike(d, a[i], b[k]) ? t[(i + 1) * (m + 1) + k + 1] + 1
                               : down > right ? down : right;
        }
    for (int32_t i = 0, k = 0; i < n && k < m; ) {
        if (alike(d, a[i], b[k])) pair_up(d, a[i++], b[k++]);
        else if (t[(i + 1) * (m + 1) + k] >= t[i * (m + 1) + k + 1]) i++;
        else k++;
    }
    free(t);
    return true;
}

/* ---- changes --------------------------------------------------------------------------------- */

/* A path with every part that is a number as "*". */
static const char *general(fg_view *v, const char *path)
{
    char *to = fg__view_text(v, "%s", path);
    size_t n = 0;
    if (!to) return "";
    for (const char *s = path; *s && (size_t)(s - path) < strlen(to) + n + 1; ) {
        const char *e = s;
        while (*e >= '0' && *e <= '9') e++;
        const bool whole = e > s && (s == path || s[-1] == '.') && (!*e || *e == '.');
        if (whole) { to[n++] = '*'; s = e; }
        else to[n++] = *s++;
        if (n > 1100) break;
    }
    to[n] = 0;
    return to;
}

static bool add_change(differ *d, int kind, int32_t a, int32_t b, const char *op, const char *path,
                       const char *what)
{
    if (d->n_changes == d->cap) {
        const int32_t cap = d->cap ? 2 * d->cap : 64;
        change *more = fg__view_alloc(d->b, (size_t)cap, sizeof *more);
        if (!more) return false;
        if (d->n_changes) memcpy(more, d->change, (size_t)d->n_changes * sizeof *more);
        d->change = more;
        d->cap = cap;
    }
    d->change[d->n_changes++] = (change){ kind, a, b, op, path, general(d->b, path), what };
    d->count[kind]++;
    return !d->b->out_of_memory;
}

/* A hash of ops, attributes and shapes of all nodes drawn in a box, whatever it and its parameters
 * are called. */
static uint64_t content(const fg_view *v, const view_box *b)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (int32_t i = b->first; i < b->end; i++) {
        const view_node *n = &v->node[v->drawn[i]];
        view_words words[5];
        snprintf(words[0], sizeof *words, "%.200s", n->op);
        fg__view_attrs(n, words[1]);
        for (int o = 0; o < 3; o++) {
            words[2 + o][0] = 0;
            if (o < n->n_out) fg__view_shape(&v->value[n->out[o]], words[2 + o]);
        }
        for (int k = 0; k < 5; k++)
            for (const char *c = words[k]; ; c++) {
                h = (h ^ (unsigned char)*c) * 0x100000001b3u;
                if (!*c) break;
            }
    }
    return h;
}

static uint64_t *contents(fg_view *v)
{
    uint64_t *h = fg__view_alloc(v, (size_t)v->n_boxes + 1, sizeof *h);
    for (int32_t b = 0; h && b < v->n_boxes; b++) h[b] = content(v, &v->box[b]);
    return h;
}

/* Whole scopes that one side alone has, of equal content: moved. */
static bool match_moved(differ *d)
{
    const uint64_t *in_a = contents(d->a), *in_b = contents(d->b);
    if (!in_a || !in_b) return false;
    for (int32_t i = 0; i < d->a->n_boxes; i++) {
        const view_box *x = &d->a->box[i];
        if (d->box_to_b[i] >= 0 || !x->n_items || x->made) continue;
        for (int32_t k = 0; k < d->b->n_boxes; k++) {
            const view_box *y = &d->b->box[k];
            if (d->box_to_a[k] >= 0 || y->made || in_b[k] != in_a[i] ||
                y->end - y->first != x->end - x->first || !y->n_items) continue;
            for (int32_t q = x->first, r = y->first; q < x->end; q++, r++) {
                pair_up(d, d->a->drawn[q], d->b->drawn[r]);
                d->box_to_b[d->a->node[d->a->drawn[q]].box] = d->b->node[d->b->drawn[r]].box;
                d->box_to_a[d->b->node[d->b->drawn[r]].box] = d->a->node[d->a->drawn[q]].box;
            }
            d->box_to_b[i] = k;
            d->box_to_a[k] = i;
            const char *what = fg__view_text(d->b, "from %.300s to %.300s, %d nodes", x->path,
                                             y->path,
                                             (int)(y->end - y->first));
            if (!what || !add_change(d, MOVED, -1, y->end > y->first ? d->b->drawn[y->first] : -1,
                                     "scope", x->path, what)) return false;
            break;
        }
    }
    return true;
}

/* Scopes of one parent in another order: those outside the longest rising run have moved. */
static bool find_reordered(differ *d, int32_t parent_a)
{
    const view_box *p = &d->a->box[parent_a];
    int32_t n = 0, last = -1;
    const size_t room = (size_t)d->a->n_boxes + 1;
    int32_t *box = calloc(room, sizeof *box), *best = calloc(room, sizeof *best);
    int32_t *from = calloc(room, sizeof *from);
    bool ok = box && best && from;
    for (int32_t i = 0; ok && i < p->n_items; i++) {
        const view_item *x = &p->item[i];
        for (int32_t k = 0; k < x->count && (x->kind == ITEM_BOX || x->kind == ITEM_RUN); k++) {
            const int32_t b = x->kind == ITEM_BOX ? x->ref : p->child[x->ref + k];
            if (d->box_to_b[b] >= 0 && !d->a->box[b].made) box[n++] = b;
        }
    }
    for (int32_t i = 0; ok && i < n && n < 5000; i++) {
        best[i] = 1;
        from[i] = -1;
        for (int32_t k = 0; k < i; k++)
            if (d->b->box[d->box_to_b[box[k]]].first < d->b->box[d->box_to_b[box[i]]].first &&
                best[k] + 1 > best[i]) { best[i] = best[k] + 1; from[i] = k; }
        if (last < 0 || best[i] > best[last]) last = i;
    }
    for (int32_t i = n - 1; ok && i >= 0 && n < 5000; i--) {
        if (i == last) { last = from[last]; continue; }
        const view_box *y = &d->b->box[d->box_to_b[box[i]]];
        if (strcmp(y->path, d->a->box[box[i]].path)) continue;       /* told already */
        const char *what = fg__view_text(d->b, "%.300s, %d nodes, in another place among its "
                                         "neighbours", y->path, (int)(y->end - y->first));
        ok = what && add_change(d, MOVED, -1, d->b->drawn[y->first], "scope", y->path, what);
    }
    free(box);
    free(best);
    free(from);
    return ok;
}

/* The node whose output x is, seen through nodes without a partner that read one value. */
static int32_t through(const fg_view *v, const int32_t *partner, int32_t x, int32_t *value)
{
    for (int steps = 0; steps < 100; steps++) {
        *value = x;
        const int32_t m = x < 0 ? -1 : v->value[x].maker;
        if (m < 0 || partner[m] >= 0) return m;
        int32_t only = -1;
        int n = 0;
        for (int i = 0; i < v->node[m].n_in; i++)
            if (v->node[m].in[i] >= 0 && v->value[v->node[m].in[i]].maker >= 0) {
                only = v->node[m].in[i];
                n++;
            }
        if (n != 1) return m;
        x = only;
    }
    return -1;
}

static bool reads_same(const differ *d, const view_node *x, const view_node *y)
{
    if (x->n_in != y->n_in) return false;
    for (int i = 0; i < x->n_in; i++) {
        int32_t va, vb;
        const int32_t a = through(d->a, d->to_b, x->in[i], &va);
        const int32_t b = through(d->b, d->to_a, y->in[i], &vb);
        if ((va < 0) != (vb < 0) || (a < 0) != (b < 0)) return false;
        if (va < 0) continue;
        if (a < 0 && strcmp(d->a->value[va].name, d->b->value[vb].name) &&
            strcmp(reads(d->a, x), reads(d->b, y))) return false;
        if (a >= 0 && (d->to_b[a] != b || d->a->value[va].out != d->b->value[vb].out)) return false;
    }
    return true;
}

static void say(char *to, size_t size, const char *fmt, ...) FG_PRINTF(3, 4);
static void say(char *to, size_t size, const char *fmt, ...)
{
    const size_t n = strlen(to);
    va_list ap;
    if (n + 4 >= size) return;
    va_start(ap, fmt);
    if (n) { memcpy(to + n, "; ", 3); vsnprintf(to + n + 2, size - n - 2, fmt, ap); }
    else vsnprintf(to, size, fmt, ap);
    va_end(ap);
}

static void attributes(const view_node *x, const view_node *y, char *to, size_t size)
{
    view_words a, b;
    for (const fg_json_value *p = x->attrs ? x->attrs->first : NULL; p; p = p->next) {
        const fg_json_value *q = fg_json_get(y->attrs, p->key);
        fg__view_attr(p, a);
        if (!q) { say(to, size, "%.40s=%.40s gone", p->key, a); continue; }
        fg__view_attr(q, b);
        if (strcmp(a, b)) say(to, size, "%.40s %.80s -> %.80s", p->key, a, b);
    }
    for (const fg_json_value *q = y->attrs ? y->attrs->first : NULL; q; q = q->next) {
        if (fg_json_get(x->attrs, q->key)) continue;
        fg__view_attr(q, b);
        say(to, size, "%.40s=%.40s new", q->key, b);
    }
}

static bool compare(differ *d, int32_t a, int32_t b)
{
    const view_node *x = &d->a->node[a], *y = &d->b->node[b];
    char what[700] = "";
    view_words s, t;
    attributes(x, y, what, sizeof what);
    for (int o = 0; o < x->n_out && o < y->n_out; o++) {
        const view_value *p = &d->a->value[x->out[o]], *q = &d->b->value[y->out[o]];
        fg__view_shape(p, s);
        fg__view_shape(q, t);
        if (strcmp(s, t)) say(what, sizeof what, "output %d shape %.80s -> %.80s", o, s, t);
        if (strcmp(p->dtype, q->dtype))
            say(what, sizeof what, "output %d dtype %.20s -> %.20s", o, p->dtype, q->dtype);
    }
    if (x->n_out != y->n_out) say(what, sizeof what, "%d outputs -> %d", x->n_out, y->n_out);
    if (!reads_same(d, x, y)) say(what, sizeof what, "reads other values");
    if (strcmp(x->error, y->error))
        say(what, sizeof what, y->error[0] ? "fails" : "no longer fails");
    if (!what[0]) return true;
    char *copy = fg__view_text(d->b, "%s", what);
    return copy && add_change(d, CHANGED, a, b, y->op, d->b->box[y->box].path, copy);
}

static bool find_changes(differ *d)
{
    for (int32_t k = 0; k < d->a->n_nodes; k++) {
        const view_node *n = &d->a->node[k];
        if (d->to_b[k] < 0 && !add_change(d, REMOVED, k, -1, n->op, d->a->box[n->box].path, ""))
            return false;
    }
    for (int32_t k = 0; k < d->b->n_nodes; k++) {
        const view_node *n = &d->b->node[k];
        if (d->to_a[k] < 0 ? !add_change(d, ADDED, -1, k, n->op, d->b->box[n->box].path, "")
                           : !compare(d, d->to_a[k], k)) return false;
    }
    for (int32_t i = 0; i < d->a->n_boxes; i++)
        if (d->box_to_b[i] >= 0 && !find_reordered(d, i)) return false;
    return true;
}

/* ---- groups ---------------------------------------------------------------------------------- */

static int by_change(const void *a, const void *b)
{
    const change *x = *(change *const *)a, *y = *(change *const *)b;
    int c = x->kind - y->kind;
    if (!c) c = strcmp(x->where, y->where);
    if (!c) c = strcmp(x->op, y->op);
    return c ? c : strcmp(x->what, y->what);
}

static int in_order(const void *a, const void *b)
{
    const change *x = *(change *const *)a, *y = *(change *const *)b;
    const int c = by_change(a, b);
    return c ? c : x->b != y->b ? (x->b < y->b ? -1 : 1) : x->a < y->a ? -1 : x->a > y->a;
}

static bool find_groups(differ *d)
{
    const size_t n = (size_t)d->n_changes + 1;
    change **p = fg__view_alloc(d->b, n, sizeof *p);
    change *sorted = fg__view_alloc(d->b, n, sizeof *sorted);
    d->group = fg__view_alloc(d->b, n, sizeof *d->group);
    if (!p || !sorted || !d->group) return false;
    for (int32_t i = 0; i < d->n_changes; i++) p[i] = &d->change[i];
    qsort(p, (size_t)d->n_changes, sizeof *p, in_order);
    for (int32_t i = 0; i < d->n_changes; i++) {
        if (!i || by_change(&p[i - 1], &p[i])) d->group[d->n_groups++] = (group){ i, 0 };
        d->group[d->n_groups - 1].count++;
        sorted[i] = *p[i];
    }
    d->change = sorted;
    return true;
}

/* ---- reports --------------------------------------------------------------------------------- */

typedef struct { const char *name; double a, b; fg_heat as; } total;

static double parameters(const fg_view *v)
{
    double sum = 0;
    for (int32_t i = 0; i < v->n_values; i++) {
        double n = v->value[i].kind == VIEW_PARAM;
        for (int k = 0; k < v->value[i].rank; k++) n *= (double)v->value[i].dim[k];
        sum += n;
    }
    return sum;
}

static int totals(const differ *d, total to[6])
{
    const fg_view *const v[2] = { d->a, d->b };
    double x[6][2] = { { 0 } };
    for (int i = 0; i < 2; i++) {
        x[0][i] = v[i]->n_nodes;
        x[1][i] = parameters(v[i]);
        for (int32_t k = 0; k < v[i]->n_nodes; k++) {
            x[2][i] += v[i]->node[k].flops;
            x[3][i] += v[i]->node[k].bytes;
        }
        x[4][i] = (double)v[i]->box[0].saved;
        for (int32_t k = 0; k < v[i]->n_plans; k++) x[5][i] += (double)v[i]->plan[k].arena;
    }
    static const char *const name[] = { "nodes", "parameters", "arithmetic", "bytes moved",
                                        "saved for backward", "arena" };
    for (int i = 0; i < 6; i++)
        to[i] = (total){ name[i], x[i][0], x[i][1], i == 2 ? FG_HEAT_FLOPS : i > 2 ? FG_HEAT_BYTES
                                                                           : FG_HEAT_NONE };
    return 6;
}

static void amount(double x, fg_heat as, view_words to)
{
    if (as) fg__view_heat_words(x, as, to);
    else fg__view_amount(x, to);
}

/* The scope of a group: of one change its own, of several what they have in common. */
static const char *path_of(const group *g, const change *c)
{
    const char *path = g->count > 1 ? c->where : c->path;
    return path[0] ? path : "(top)";
}

static void as_text(const differ *d, const view_out *out)
{
    static const char sign[] = "+-~>";
    total t[6];
    view_words a, b;
    if (!d->n_changes) { fg__view_say(out, "the graphs are equal\n"); return; }
    fg__view_say(out, "%d added, %d removed, %d changed, %d moved\n", (int)d->count[ADDED],
                 (int)d->count[REMOVED], (int)d->count[CHANGED], (int)d->count[MOVED]);
    for (int i = 0; i < totals(d, t); i++) {
        if (fabs(t[i].a - t[i].b) <= 0) continue;
        amount(t[i].a, t[i].as, a);
        amount(t[i].b, t[i].as, b);
        fg__view_say(out, "  %-20s %12s -> %12s", t[i].name, a, b);
        if (t[i].a > 0) fg__view_say(out, "  (%+.2f %%)", 100 * (t[i].b - t[i].a) / t[i].a);
        fg__view_say(out, "\n");
    }
    for (int32_t i = 0; i < d->n_groups; i++) {
        const change *c = &d->change[d->group[i].first];
        const view_node *n = c->b >= 0 ? &d->b->node[c->b] : c->a >= 0 ? &d->a->node[c->a] : NULL;
        fg__view_say(out, "%c %d %.80s  %.300s", sign[c->kind], (int)d->group[i].count, c->op,
                     path_of(&d->group[i], c));
        if (c->what[0]) fg__view_say(out, "  %.700s", c->what);
        if (n && c->kind != MOVED)
            fg__view_say(out, "  %.100s", n->user[0] ? n->user : n->src);
        fg__view_say(out, "\n");
    }
}

static void as_json(const differ *d, const view_out *out)
{
    total t[6];
    fg__view_say(out, "{\"differ\":%s", d->n_changes ? "true" : "false");
    for (int i = 0; i < KINDS; i++)
        fg__view_say(out, ",\"%s\":%d", kind_name[i], (int)d->count[i]);
    fg__view_say(out, ",\n\"totals\":{");
    for (int i = 0; i < totals(d, t); i++)
        fg__view_say(out, "%s\"%s\":[%.15g,%.15g]", i ? "," : "", t[i].name, t[i].a, t[i].b);
    fg__view_say(out, "},\n\"changes\":[");
    for (int32_t i = 0; i < d->n_groups; i++) {
        const change *c = &d->change[d->group[i].first];
        fg__view_say(out, "%s{\"kind\":\"%s\",\"count\":%d,\"op\":", i ? ",\n" : "",
                     kind_name[c->kind], (int)d->group[i].count);
        fg__view_json_text(out, c->op);
        fg__view_say(out, ",\"scope\":");
        fg__view_json_text(out, d->group[i].count > 1 ? c->where : c->path);
        fg__view_say(out, ",\"what\":");
        fg__view_json_text(out, c->what);
        fg__view_say(out, ",\"nodes\":[");
        for (int32_t k = 0; k < d->group[i].count; k++) {
            const int64_t a = c[k].a < 0 ? -1 : d->a->node[c[k].a].id;
            const int64_t b = c[k].b < 0 ? -1 : d->b->node[c[k].b].id;
            fg__view_say(out, "%s[%" PRId64 ",%" PRId64 "]", k ? "," : "", a, b);
        }
        fg__view_say(out, "]}");
    }
    fg__view_say(out, "]}\n");
}

/* The second graph's page, with what changed marked in it and listed beside it. */
static fg_status as_html(const differ *d, fg_put put, void *to)
{
    static const fg_view_options o = { .depth = -1 };
    view_note *note = fg__view_alloc(d->b, (size_t)d->n_groups + 1, sizeof *note);
    int32_t *node = fg__view_alloc(d->b, (size_t)d->n_changes + 1, sizeof *node);
    if (!note || !node) return FG_ERR_MEMORY;
    for (int32_t i = 0; i < d->n_changes; i++) node[i] = d->change[i].b;
    for (int32_t i = 0; i < d->n_groups; i++) {
        const change *c = &d->change[d->group[i].first];
        const char *words = fg__view_text(d->b, "%s: %d %.80s in %.200s  %.700s",
                                          kind_name[c->kind],
                                          (int)d->group[i].count, c->op,
                                          path_of(&d->group[i], c), c->what);
        if (!words) return FG_ERR_MEMORY;
        note[i] = (view_note){ c->kind, words, d->group[i].count, &node[d->group[i].first] };
    }
    d->b->note = note;
    d->b->n_notes = d->n_groups;
    d->b->compared = true;
    const fg_status s = fg_view_html(d->b, &o, put, to);
    d->b->note = NULL;
    d->b->n_notes = 0;
    d->b->compared = false;
    return s;
}

static bool prepare(differ *d)
{
    const size_t na = (size_t)d->a->n_nodes + 1, nb = (size_t)d->b->n_nodes + 1;
    const size_t ba = (size_t)d->a->n_boxes + 1, bb = (size_t)d->b->n_boxes + 1;
    d->to_b = fg__view_alloc(d->a, na, sizeof *d->to_b);
    d->to_a = fg__view_alloc(d->b, nb, sizeof *d->to_a);
    d->box_to_b = fg__view_alloc(d->a, ba, sizeof *d->box_to_b);
    d->box_to_a = fg__view_alloc(d->b, bb, sizeof *d->box_to_a);
    if (!d->to_b || !d->to_a || !d->box_to_b || !d->box_to_a) return false;
    for (size_t i = 0; i < na; i++) d->to_b[i] = -1;
    for (size_t i = 0; i < nb; i++) d->to_a[i] = -1;
    for (size_t i = 0; i < ba; i++) d->box_to_b[i] = -1;
    for (size_t i = 0; i < bb; i++) d->box_to_a[i] = -1;
    return list_nodes(d->a, &d->list_a, &d->first_a) && list_nodes(d->b, &d->list_b, &d->first_b);
}

fg_status fg_view_diff(const fg_view *a, const fg_view *b, fg_diff_format f, fg_put put, void *to,
                       bool *differs)
{
    differ d = { .a = (fg_view *)(uintptr_t)a, .b = (fg_view *)(uintptr_t)b };
    bool ok = prepare(&d) && match_boxes(&d) && match_moved(&d);
    for (int32_t i = 0; ok && i < a->n_boxes; i++) {
        const int32_t k = d.box_to_b[i];
        for (int p = 0; ok && k >= 0 && p < 3; p++) {
            const int32_t x = d.first_a[3 * i + p], y = d.first_b[3 * k + p];
            if (d.first_a[3 * i + p + 1] > x && d.to_b[d.list_a[x]] >= 0) continue;      /* moved */
            ok = align(&d, d.list_a + x, d.first_a[3 * i + p + 1] - x, d.list_b + y,
                       d.first_b[3 * k + p + 1] - y);
        }
    }
    ok = ok && find_changes(&d) && find_groups(&d);
    if (!ok) return FG_ERR_MEMORY;
    *differs = d.n_changes > 0;
    const view_out out = { put, to };
    if (f == FG_DIFF_HTML) return as_html(&d, put, to);
    if (f == FG_DIFF_JSON) as_json(&d, &out);
    else as_text(&d, &out);
    return FG_OK;
}
