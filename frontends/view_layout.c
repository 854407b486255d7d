/* view_layout.c - the items of a box in rows: once for every class of boxes.
 *
 * Layered drawing (Sugiyama, Tagawa, Toda 1981): a row is the longest path from what enters the
 * box, an edge across rows has a bend in each, shared by all edges of one value; rows are sorted by
 * the mean of their neighbours, the order with the fewest crossings is kept; then every row's
 * places are the nearest to its neighbours' that leave gaps.  Everything is exact or rounded the
 * same way on every machine, and of equal choices the first is taken. */
#include <math.h>
#include "view.h"

enum { SWEEPS = 8, MOST_BENDS = 20000 };

typedef struct {
    fg_view    *v;
    view_box   *b;
    view_class *c;
    int32_t    *owner;                   /* place in drawn -> item of the box being laid out */
    int64_t    *met, meeting;            /* value -> the last meeting it was part of */
    int32_t    *rank, *cell_of;          /* per item; cells: items, then ports in, then ports out */
    int32_t    *cell_row, n_cells, cap_cells;
    view_cell  *cell;                    /* in the order of making; rows hold their numbers */
    int32_t   **row, *n_in_row;
    double     *place;                   /* per cell, while sorting and spreading */
} layout;

/* ---- sizes ----------------------------------------------------------------------------------- */

static double text_width(const char *s, double of_letter)
{
    return fg__view_letters(s) * of_letter;
}

static double wider(double a, double b) { return a > b ? a : b; }

static void stack(view_size *s, int lane, int n, double width)
{
    const int rows = n < VIEW_STACK ? n : VIEW_STACK, columns = (n + VIEW_STACK - 1) / VIEW_STACK;
    if (!n) return;
    s->w[lane] = columns * (width + VIEW_PILL_GAP) - VIEW_PILL_GAP;
    s->h[lane] = rows * (VIEW_PILL_H + VIEW_PILL_GAP) - VIEW_PILL_GAP;
}

/* Updates of one parameter are one chip. */
static int count_chips(const fg_view *v, int32_t node)
{
    int n = 0;
    for (int32_t a = v->first_attached[node]; a >= 0; a = v->node[a].next) {
        bool first = v->node[a].pass == VIEW_UPDATE;
        for (int32_t e = v->first_attached[node]; first && e != a; e = v->node[e].next)
            first = v->node[e].pass != VIEW_UPDATE || v->node[e].param != v->node[a].param;
        n += first;
    }
    return n;
}

static view_size node_size(const fg_view *v, int32_t k)
{
    const view_node *n = &v->node[k];
    view_size s = { { 0 }, { 0 } };
    view_words label, shape = "";
    const int lane = n->pass;
    fg__view_label(v, k, label);
    if (n->n_out) fg__view_shape(&v->value[n->out[0]], shape);
    if (n->error[0]) snprintf(shape, sizeof shape, "does not type-check");
    int attached = 0;
    for (int32_t a = v->first_attached[k]; a >= 0; a = v->node[a].next)
        attached += v->node[a].pass == VIEW_BACKWARD;
    if (lane != VIEW_FORWARD) stack(&s, lane, 1, lane == VIEW_BACKWARD ? VIEW_PILL_W : VIEW_CHIP_W);
    else if (fg__view_sign(n)) s.w[0] = s.h[0] = 30;
    else if (n->thin) {
        s.w[0] = wider(text_width(n->op, 6) + text_width(shape, 5.6) + 30, 72);
        s.h[0] = 20;
    } else {
        s.w[0] = wider(text_width(n->op, 7.2) + (label[0] ? text_width(label, 6.2) + 10 : 0),
                       text_width(shape, 6)) + 30;
        s.h[0] = 40;
    }
    if (lane != VIEW_BACKWARD) stack(&s, VIEW_BACKWARD, attached, VIEW_PILL_W);
    if (lane != VIEW_UPDATE) stack(&s, VIEW_UPDATE, count_chips(v, k), VIEW_CHIP_W);
    return s;
}

static view_size box_size(const fg_view *v, const view_box *in, const view_item *x)
{
    const view_box *b = &v->box[fg__view_shown(v, in, x)];
    view_words words;
    view_size s = { { 0 }, { 0 } };
    for (int32_t i = b->first; i < b->end; i++) s.w[v->node[v->drawn[i]].pass] = 1;
    fg__view_box_name(v, in, x, words);
    const double name = text_width(words, 7.6) + 30;
    for (int lane = 0; lane < VIEW_LANES; lane++) {
        if (s.w[lane] <= 0) continue;
        s.w[lane] = lane ? wider(name, 110) : wider(name, 150);
        s.h[lane] = 46;
    }
    return s;
}

static view_size item_size(const fg_view *v, const view_box *b, const view_item *x)
{
    view_size s = { { 0 }, { 0 } };
    const char *name = "";
    switch (x->kind) {
    case ITEM_NODE: return node_size(v, x->ref);
    case ITEM_BOX: case ITEM_RUN: return box_size(v, b, x);
    case ITEM_INPUT:  name = v->value[x->ref].name; break;
    case ITEM_OUTPUT: name = v->output[x->ref].name; break;
    }
    int letters = fg__view_letters(name);
    s.w[0] = (letters > 24 ? 24 : letters) * 6.6 + 36;
    s.h[0] = 26;
    return s;
}

/* ---- edges ----------------------------------------------------------------------------------- */

static int32_t index_of(const int32_t *list, int32_t n, int32_t x)
{
    for (int32_t i = 0; i < n; i++) if (list[i] == x) return i;
    return 0;
}

/* Which port of an item value x leaves by, or comes in by. */
static int32_t port(const layout *l, int32_t item, int32_t x, bool leaves)
{
    const view_item *t = &l->b->item[item];
    const view_box *b = t->kind == ITEM_BOX ? &l->v->box[t->ref] : NULL;
    for (int32_t i = 0; t->kind == ITEM_RUN && i < t->count; i++) {
        const view_box *c = &l->v->box[l->b->child[t->ref + i]];
        const int32_t *list = leaves ? c->out : c->in, n = leaves ? c->n_out : c->n_in;
        for (int32_t k = 0; k < n; k++) if (list[k] == x) return k;
    }
    if (b) return leaves ? index_of(b->out, b->n_out, x) : index_of(b->in, b->n_in, x);
    if (t->kind != ITEM_NODE) return 0;
    const view_node *n = &l->v->node[t->ref];
    return leaves ? index_of(n->out, n->n_out, x) : index_of(n->in, n->n_in, x);
}

/* The cell that value x comes from: an item's, or a port's on the upper edge. */
static int32_t source_of(const layout *l, int32_t x)
{
    const view_value *y = &l->v->value[x];
    if (y->maker >= 0 && fg__view_inside(l->v, l->b, y->maker))
        return l->owner[l->v->at[y->maker]];
    for (int32_t i = 0; y->maker < 0 && i < l->b->n_items; i++)
        if (l->b->item[i].kind == ITEM_INPUT && l->b->item[i].ref == x) return i;
    return l->b->n_items + index_of(l->b->in, l->b->n_in, x);
}

static bool add_edge(layout *l, int32_t x, int32_t to, int32_t to_port, int32_t *cap)
{
    view_class *c = l->c;
    const int32_t from = source_of(l, x);
    if (from == to) return true;
    if (c->n_edges == *cap) {
        *cap = 2 * *cap + 32;
        view_edge *more = fg__view_alloc(l->v, (size_t)*cap, sizeof *more);
        if (!more) return false;
        if (c->n_edges) memcpy(more, c->edge, (size_t)c->n_edges * sizeof *more);
        c->edge = more;
    }
    const bool inner = from < l->b->n_items && l->b->item[from].kind != ITEM_INPUT;
    c->edge[c->n_edges++] = (view_edge){ from, inner ? port(l, from, x, true) : 0, to, to_port, x,
                                         0, 0, from < l->b->n_items && from > to };
    return true;
}

static bool edges_to_nodes(layout *l, int32_t item, int32_t first, int32_t end, int32_t *cap)
{
    const fg_view *v = l->v;
    l->meeting++;
    for (int32_t i = first; i < end; i++) {
        const view_node *n = &v->node[v->drawn[i]];
        for (int j = 0; j < n->n_in && n->home == v->drawn[i]; j++) {
            const int32_t x = n->in[j];
            if (x < 0 || l->met[x] == l->meeting || !fg__view_flows(v, x)) continue;
            l->met[x] = l->meeting;
            if (!add_edge(l, x, item, port(l, item, x, false), cap)) return false;
        }
    }
    return true;
}

static void range(const layout *l, const view_item *x, int32_t *first, int32_t *end)
{
    const fg_view *v = l->v;
    *first = *end = 0;
    if (x->kind == ITEM_NODE) {
        *first = *end = v->at[x->ref];
        while (*end < v->n_nodes && v->node[v->drawn[*end]].home == x->ref) ++*end;
    } else if (x->kind == ITEM_BOX) {
        *first = v->box[x->ref].first;
        *end = v->box[x->ref].end;
    } else if (x->kind == ITEM_RUN) {
        *first = v->box[l->b->child[x->ref]].first;
        *end = v->box[l->b->child[x->ref + x->count - 1]].end;
    }
}

static bool find_edges(layout *l)
{
    const view_box *b = l->b;
    int32_t cap = 0, first, end;
    for (int32_t i = 0; i < b->n_items; i++) {
        range(l, &b->item[i], &first, &end);
        for (int32_t k = first; k < end; k++) l->owner[k] = i;
    }
    for (int32_t i = 0; i < b->n_items; i++) {
        range(l, &b->item[i], &first, &end);
        if (!edges_to_nodes(l, i, first, end, &cap)) return false;
        if (b->item[i].kind == ITEM_OUTPUT &&
            !add_edge(l, l->v->output[b->item[i].ref].value, i, 0, &cap)) return false;
    }
    for (int32_t i = 0; i < b->n_out && b->parent >= 0; i++)
        if (!add_edge(l, b->out[i], b->n_items + b->n_in + i, 0, &cap)) return false;
    return true;
}

/* ---- rows ------------------------------------------------------------------------------------ */

/* Sources that nothing above holds move down to just above their first reader; what no edge touches
 * stands below all else. */
static bool find_ranks(layout *l)
{
    const int32_t n = l->b->n_items, ports = l->b->n_in;
    const view_class *c = l->c;
    int32_t last = 0;
    for (int32_t i = 0; i < n; i++) l->rank[i] = ports > 0;
    for (int32_t e = 0; e < c->n_edges; e++) {           /* edges are sorted by what they lead to */
        const view_edge *x = &c->edge[e];
        if (x->to >= n || x->back) continue;
        const int32_t above = x->from < n ? l->rank[x->from] : 0;
        if (above + 1 > l->rank[x->to]) l->rank[x->to] = above + 1;
    }
    bool *alone = fg__view_alloc(l->v, (size_t)n + 1, sizeof *alone);
    if (!alone) return false;
    for (int32_t i = n; i-- > 0; ) {
        int32_t nearest = INT32_MAX;
        bool held = false;
        alone[i] = n > 1;
        for (int32_t e = 0; e < c->n_edges; e++) {
            if (c->edge[e].back) continue;
            if (c->edge[e].to == i) held = true;
            if (c->edge[e].to == i || c->edge[e].from == i) alone[i] = false;
            if (c->edge[e].from == i && c->edge[e].to < n && l->rank[c->edge[e].to] < nearest)
                nearest = l->rank[c->edge[e].to];
        }
        if (!held && nearest < INT32_MAX) l->rank[i] = nearest - 1;
    }
    for (int32_t i = 0; i < n; i++) if (l->rank[i] > last) last = l->rank[i];
    for (int32_t i = 0, below = last + (c->n_edges > 0); i < n; i++) {
        if (!alone[i] || !c->n_edges) continue;
        l->rank[i] = last = below;
    }
    l->c->n_rows = n ? last + 1 + (l->b->n_out > 0 && l->b->parent >= 0) : 0;
    return true;
}

static int32_t new_cell(layout *l, view_cell_kind kind, int32_t ref, int32_t row)
{
    if (l->n_cells == l->cap_cells) {
        const int32_t cap = 2 * l->cap_cells;
        view_cell *more = fg__view_alloc(l->v, (size_t)cap, sizeof *more);
        int32_t *rows = fg__view_alloc(l->v, (size_t)cap, sizeof *rows);
        if (!more || !rows) return -1;
        memcpy(more, l->cell, (size_t)l->n_cells * sizeof *more);
        memcpy(rows, l->cell_row, (size_t)l->n_cells * sizeof *rows);
        l->cell = more;
        l->cell_row = rows;
        l->cap_cells = cap;
    }
    l->cell[l->n_cells] = (view_cell){ kind, ref, { 0, 0 } };
    l->cell_row[l->n_cells] = row;
    return l->n_cells++;
}

static int32_t row_of(const layout *l, int32_t end)
{
    return l->cell_row[end];
}

/* Bends of an edge: those that edges of the same value from the same place have already, then new
 * ones. */
static bool bend_edge(layout *l, view_edge *x, int32_t *cap)
{
    view_class *c = l->c;
    const int32_t from = row_of(l, x->from), to = row_of(l, x->to);
    x->first_bend = c->n_bends;
    if (x->back || to - from < 2 || l->n_cells > MOST_BENDS) return true;
    const view_edge *twin = NULL;
    for (const view_edge *y = c->edge; y < x; y++)
        if (y->value == x->value && y->from == x->from && y->n_bends > (twin ? twin->n_bends : 0))
            twin = y;
    for (int32_t r = from + 1; r < to; r++) {
        const int32_t k = r - from - 1;
        if (c->n_bends == *cap) {
            *cap = 2 * *cap + 64;
            int32_t *more = fg__view_alloc(l->v, (size_t)*cap, sizeof *more);
            if (!more) return false;
            if (c->n_bends) memcpy(more, c->bend, (size_t)c->n_bends * sizeof *more);
            c->bend = more;
        }
        const int32_t cell = twin && k < twin->n_bends ? c->bend[twin->first_bend + k]
                           : new_cell(l, CELL_BEND, x->value, r);
        if (cell < 0) return false;
        c->bend[c->n_bends++] = cell;
        x->n_bends++;
    }
    return true;
}

static bool make_cells(layout *l)
{
    const view_box *b = l->b;
    int32_t cap = 0;
    const int32_t last = l->c->n_rows - 1;
    for (int32_t i = 0; i < b->n_items; i++)
        if (new_cell(l, CELL_ITEM, i, l->rank[i]) < 0) return false;
    for (int32_t i = 0; i < b->n_in; i++) if (new_cell(l, CELL_IN, i, 0) < 0) return false;
    for (int32_t i = 0; i < b->n_out && b->parent >= 0; i++)
        if (new_cell(l, CELL_OUT, i, last) < 0) return false;
    for (int32_t e = 0; e < l->c->n_edges; e++)
        if (!bend_edge(l, &l->c->edge[e], &cap)) return false;
    const size_t rows = (size_t)(l->c->n_rows ? l->c->n_rows : 1);
    l->row = fg__view_alloc(l->v, rows, sizeof *l->row);
    l->n_in_row = fg__view_alloc(l->v, rows, sizeof *l->n_in_row);
    l->place = fg__view_alloc(l->v, (size_t)l->n_cells + 1, sizeof *l->place);
    if (!l->row || !l->n_in_row || !l->place) return false;
    for (int32_t i = 0; i < l->n_cells; i++) l->n_in_row[l->cell_row[i]]++;
    for (int32_t r = 0; r < l->c->n_rows; r++) {
        l->row[r] = fg__view_alloc(l->v, (size_t)l->n_in_row[r] + 1, sizeof **l->row);
        if (!l->row[r]) return false;
        l->n_in_row[r] = 0;
    }
    for (int32_t i = 0; i < l->n_cells; i++)
        l->row[l->cell_row[i]][l->n_in_row[l->cell_row[i]]++] = i;
    return true;
}

/* ---- the order in rows ----------------------------------------------------------------------- */

typedef struct { int32_t upper, lower; double weight; } segment;
typedef struct { int32_t cell; double key; int32_t was; } ordered;

static int by_key(const void *a, const void *b)
{
    const ordered *x = a, *y = b;
    if (x->key < y->key || x->key > y->key) return x->key < y->key ? -1 : 1;
    return x->was < y->was ? -1 : x->was > y->was;
}

/* The pieces of all edges between neighbouring rows; straight lines between bends weigh most. */
static segment *segments(const layout *l, int32_t *n)
{
    const view_class *c = l->c;
    segment *s = fg__view_alloc(l->v, (size_t)(c->n_edges + c->n_bends) + 1, sizeof *s);
    *n = 0;
    for (int32_t e = 0; s && e < c->n_edges; e++) {
        const view_edge *x = &c->edge[e];
        int32_t at = x->from;
        if (x->back || l->cell_row[x->to] - l->cell_row[x->from] != x->n_bends + 1) continue;
        for (int32_t k = 0; k <= x->n_bends; k++) {
            const int32_t next = k < x->n_bends ? c->bend[x->first_bend + k] : x->to;
            const int bends = (l->cell[at].kind == CELL_BEND) + (l->cell[next].kind == CELL_BEND);
            s[(*n)++] = (segment){ at, next, bends == 2 ? 8 : bends == 1 ? 2 : 1 };
            at = next;
        }
    }
    return s;
}

static void number_rows(layout *l)
{
    for (int32_t r = 0; r < l->c->n_rows; r++)
        for (int32_t i = 0; i < l->n_in_row[r]; i++) l->place[l->row[r][i]] = i;
}

static int64_t crossings(const layout *l, const segment *s, int32_t n)
{
    int64_t found = 0;
    for (int32_t i = 0; i < n; i++)
        for (int32_t k = i + 1; k < n; k++) {
            if (l->cell_row[s[i].upper] != l->cell_row[s[k].upper]) continue;
            const double a = l->place[s[i].upper] - l->place[s[k].upper];
            const double b = l->place[s[i].lower] - l->place[s[k].lower];
            found += a * b < 0;
        }
    return found;
}

/* Sorts every row by the mean place of its neighbours in the row before (or behind). */
static void sweep(layout *l, const segment *s, int32_t n, bool down, double *sum, double *count,
                  ordered *list)
{
    for (int32_t step = 1; step < l->c->n_rows; step++) {
        const int32_t r = down ? step : l->c->n_rows - 1 - step;
        for (int32_t i = 0; i < l->n_in_row[r]; i++) sum[l->row[r][i]] = count[l->row[r][i]] = 0;
        for (int32_t i = 0; i < n; i++) {
            const int32_t self = down ? s[i].lower : s[i].upper;
            if (l->cell_row[self] != r) continue;
            sum[self] += l->place[down ? s[i].upper : s[i].lower];
            count[self]++;
        }
        for (int32_t i = 0; i < l->n_in_row[r]; i++) {
            const int32_t k = l->row[r][i];
            list[i] = (ordered){ k, count[k] > 0 ? sum[k] / count[k] : l->place[k], i };
        }
        qsort(list, (size_t)l->n_in_row[r], sizeof *list, by_key);
        for (int32_t i = 0; i < l->n_in_row[r]; i++) {
            l->row[r][i] = list[i].cell;
            l->place[list[i].cell] = i;
        }
    }
}

static bool order_rows(layout *l, const segment *s, int32_t n)
{
    const size_t room = (size_t)l->n_cells + 1;
    double *sum = fg__view_alloc(l->v, room, sizeof *sum);
    double *count = fg__view_alloc(l->v, room, sizeof *count);
    double *best = fg__view_alloc(l->v, room, sizeof *best);
    ordered *list = fg__view_alloc(l->v, room, sizeof *list);
    if (!sum || !count || !best || !list) return false;
    int64_t fewest = INT64_MAX;
    number_rows(l);
    for (int i = 0; i <= SWEEPS; i++) {
        const int64_t found = n < 1500 ? crossings(l, s, n) : SWEEPS - i;
        if (found < fewest) {
            fewest = found;
            memcpy(best, l->place, (size_t)l->n_cells * sizeof *best);
        }
        if (!found) break;
        sweep(l, s, n, i % 2 == 0, sum, count, list);
    }
    memcpy(l->place, best, (size_t)l->n_cells * sizeof *best);
    for (int32_t i = 0; i < l->n_cells; i++) l->row[l->cell_row[i]][(int32_t)best[i]] = i;
    return true;
}

/* ---- places ---------------------------------------------------------------------------------- */

/* Pools neighbours that want to overlap (pool adjacent violators): least sum of weighted
 * squares. */
void fg__view_spread(int n, double *x, const double *w, const double *weight, double gap)
{
    double mean[n > 0 ? n : 1], heavy[n > 0 ? n : 1];
    int count[n > 0 ? n : 1], pools = 0;
    double offset = 0;
    for (int i = 0; i < n; i++) {
        if (i) offset += (w[i - 1] + w[i]) / 2 + gap;
        mean[pools] = x[i] - offset;
        heavy[pools] = weight ? weight[i] : 1;
        count[pools++] = 1;
        while (pools > 1 && mean[pools - 1] < mean[pools - 2]) {
            const double a = heavy[pools - 2], b = heavy[pools - 1];
            mean[pools - 2] = (mean[pools - 2] * a + mean[pools - 1] * b) / (a + b);
            heavy[pools - 2] = a + b;
            count[pools - 2] += count[pools - 1];
            pools--;
        }
    }
    offset = 0;
    for (int i = 0, p = 0, used = 0; i < n; i++) {
        if (i) offset += (w[i - 1] + w[i]) / 2 + gap;
        while (used == count[p]) { p++; used = 0; }
        x[i] = mean[p] + offset;
        used++;
    }
}

static double cell_width(const layout *l, int32_t cell, int lane)
{
    const view_cell *c = &l->cell[cell];
    return c->kind == CELL_ITEM ? l->c->size[c->ref].w[lane] : c->kind == CELL_BEND ? 4 : 10;
}

static void spread_row(layout *l, int32_t r, int lane, double *t[3], double of_bend)
{
    const int n = l->n_in_row[r];
    for (int i = 0; i < n; i++) {
        const int32_t k = l->row[r][i];
        t[0][i] = l->place[k];
        t[1][i] = cell_width(l, k, lane);
        t[2][i] = l->cell[k].kind == CELL_BEND ? of_bend : 1;
    }
    fg__view_spread(n, t[0], t[1], t[2], VIEW_COLUMN_GAP);
    for (int i = 0; i < n; i++) l->place[l->row[r][i]] = t[0][i];
}

/* All bends of an edge to the mean of their places: edges across rows become straight. */
static void straighten(layout *l)
{
    const view_class *c = l->c;
    for (int32_t e = 0; e < c->n_edges; e++) {
        const view_edge *x = &c->edge[e];
        double sum = 0;
        for (int32_t i = 0; i < x->n_bends; i++) sum += l->place[c->bend[x->first_bend + i]];
        for (int32_t i = 0; i < x->n_bends; i++)
            l->place[c->bend[x->first_bend + i]] = sum / x->n_bends;
    }
}

/* Pulls what stands in row r to the mean of its neighbours: those above count most on the way
 * down. */
static void pull_row(layout *l, int32_t r, const segment *s, int32_t n, double above, double below,
                     bool bends, double *sum, double *weight)
{
    for (int32_t i = 0; i < l->n_in_row[r]; i++) sum[l->row[r][i]] = weight[l->row[r][i]] = 0;
    for (int32_t i = 0; i < n; i++) {
        const bool lower = l->cell_row[s[i].lower] == r, upper = l->cell_row[s[i].upper] == r;
        if (!lower && !upper) continue;
        const int32_t self = lower ? s[i].lower : s[i].upper;
        const double w = (lower ? above : below) * s[i].weight;
        sum[self] += w * l->place[lower ? s[i].upper : s[i].lower];
        weight[self] += w;
    }
    for (int32_t i = 0; i < l->n_in_row[r]; i++) {
        const int32_t k = l->row[r][i];
        if (weight[k] > 0 && (bends || l->cell[k].kind != CELL_BEND))
            l->place[k] = sum[k] / weight[k];
    }
}

static bool place_cells(layout *l, const segment *s, int32_t n, int lane)
{
    enum { PULLS = 12, STRAIGHT = 6 };
    const size_t room = (size_t)l->n_cells + 1;
    double *t[5];
    for (int i = 0; i < 5; i++) {
        t[i] = fg__view_alloc(l->v, room, sizeof **t);
        if (!t[i]) return false;
    }
    for (int32_t i = 0; i < l->n_cells; i++) l->place[i] = 0;
    for (int32_t r = 0; r < l->c->n_rows; r++) spread_row(l, r, lane, t, 1);
    for (int turn = 0; turn < PULLS + STRAIGHT; turn++) {
        const bool down = turn % 2 == 0, last = turn >= PULLS;
        if (last) straighten(l);
        for (int32_t step = 0; step < l->c->n_rows; step++) {
            const int32_t r = down ? step : l->c->n_rows - 1 - step;
            pull_row(l, r, s, n, down || last ? 1 : 0.25, !down || last ? 1 : 0.25, !last, t[3],
                     t[4]);
            spread_row(l, r, lane, t, last ? 50 : 4);
        }
    }
    double left = 0;
    for (int32_t i = 0; i < l->n_cells; i++) {
        const double x = l->place[i] - cell_width(l, i, lane) / 2;
        if (!i || x < left) left = x;
    }
    for (int32_t i = 0; i < l->n_cells; i++)
        l->cell[i].x[lane] = floor((l->place[i] - left) * 4) / 4;
    return true;
}

/* Cells in the order of rows; edges and bends name them by that order. */
static bool finish(layout *l)
{
    view_class *c = l->c;
    int32_t *to = fg__view_alloc(l->v, (size_t)l->n_cells + 1, sizeof *to), n = 0;
    c->cell = fg__view_alloc(l->v, (size_t)l->n_cells + 1, sizeof *c->cell);
    c->row = fg__view_alloc(l->v, (size_t)c->n_rows + 2, sizeof *c->row);
    if (!to || !c->cell || !c->row) return false;
    for (int32_t r = 0; r < c->n_rows; r++) {
        c->row[r] = n;
        for (int32_t i = 0; i < l->n_in_row[r]; i++) {
            to[l->row[r][i]] = n;
            c->cell[n++] = l->cell[l->row[r][i]];
        }
    }
    c->row[c->n_rows] = n;
    c->n_cells = n;
    for (int32_t e = 0; e < c->n_edges; e++) {
        c->edge[e].from = to[c->edge[e].from];
        c->edge[e].to = to[c->edge[e].to];
    }
    for (int32_t i = 0; i < c->n_bends; i++) c->bend[i] = to[c->bend[i]];
    return true;
}

static bool lay_out(layout *l)
{
    const int32_t n = l->b->n_items;
    l->rank = fg__view_alloc(l->v, (size_t)n + 1, sizeof *l->rank);
    l->c->size = fg__view_alloc(l->v, (size_t)n + 1, sizeof *l->c->size);
    l->cap_cells = 2 * (n + l->b->n_in + l->b->n_out) + 16;
    l->cell = fg__view_alloc(l->v, (size_t)l->cap_cells, sizeof *l->cell);
    l->cell_row = fg__view_alloc(l->v, (size_t)l->cap_cells, sizeof *l->cell_row);
    if (!l->rank || !l->c->size || !l->cell || !l->cell_row) return false;
    for (int32_t i = 0; i < n; i++) l->c->size[i] = item_size(l->v, l->b, &l->b->item[i]);
    if (!find_edges(l)) return false;
    if (!find_ranks(l) || !make_cells(l)) return false;
    int32_t n_segments;
    segment *s = segments(l, &n_segments);
    return s && order_rows(l, s, n_segments) && place_cells(l, s, n_segments, 0) &&
           place_cells(l, s, n_segments, 1) && finish(l);
}

fg_status fg__view_layout(fg_view *v)
{
    int32_t *owner = fg__view_alloc(v, (size_t)v->n_nodes + 1, sizeof *owner);
    int64_t *met = fg__view_alloc(v, (size_t)v->n_values + 1, sizeof *met), meeting = 0;
    for (int32_t i = 0; owner && met && i < v->n_classes; i++) {
        layout l = { .v = v, .b = &v->box[v->class[i].box], .c = &v->class[i], .owner = owner,
                     .met = met, .meeting = meeting };
        if (!lay_out(&l)) return FG_ERR_MEMORY;
        meeting = l.meeting;
    }
    return v->out_of_memory ? FG_ERR_MEMORY : FG_OK;
}
