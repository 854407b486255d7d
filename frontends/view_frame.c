/* view_frame.c - a box with some of the boxes in it open: sizes from the inside out, and places.
 *
 * Opening a box makes its row higher and moves its neighbours apart; nothing changes its row or its
 * order.  The page does the same in view.js. */
#include <math.h>
#include "view.h"

int32_t fg__view_shown(const fg_view *v, const view_box *b, const view_item *x)
{
    (void)v;
    return x->kind == ITEM_BOX ? x->ref : x->kind == ITEM_RUN ? b->child[x->ref] : -1;
}

view_size fg__view_size_now(const view_picture *p, const view_box *b, int32_t item)
{
    const int32_t inner = fg__view_shown(p->v, b, &b->item[item]);
    view_size s = p->v->class[b->class].size[item];
    if (inner < 0 || !p->open[inner]) return s;
    for (int lane = 0; lane < VIEW_LANES; lane++) {
        s.w[lane] = p->frame[inner].w[lane];
        s.h[lane] = s.w[lane] > 0 ? p->frame[inner].h : 0;
    }
    return s;
}

int64_t fg__view_saved(const fg_view *v, int32_t node)
{
    int32_t met[64];
    int n = 0;
    int64_t bytes = 0;
    for (int32_t a = v->first_attached[node]; a >= 0; a = v->node[a].next)
        for (int i = 0; i < v->node[a].n_in && v->node[a].pass == VIEW_BACKWARD; i++) {
            const int32_t x = v->node[a].in[i] < 0 ? -1 : fg__view_seen(v, v->node[a].in[i]);
            bool new = x >= 0 && v->value[x].maker >= 0 &&
                       v->node[v->value[x].maker].pass == VIEW_FORWARD;
            for (int k = 0; k < n && new; k++) new = met[k] != x;
            if (!new || n == 64) continue;
            met[n++] = x;
            bytes += v->value[x].bytes;
        }
    return bytes;
}

static double most(double a, double b) { return a > b ? a : b; }

static void set_rows(const view_picture *p, const view_box *b, view_frame *f)
{
    const view_class *c = &p->v->class[b->class];
    double y = VIEW_HEAD;
    for (int32_t r = 0; r < c->n_rows; r++) {
        double h = 8;
        bool edge = true;
        for (int32_t i = c->row[r]; i < c->row[r + 1]; i++) {
            edge &= c->cell[i].kind == CELL_IN || c->cell[i].kind == CELL_OUT;
            if (c->cell[i].kind != CELL_ITEM) continue;
            const view_size s = fg__view_size_now(p, b, c->cell[i].ref);
            for (int lane = 0; lane < VIEW_LANES; lane++) h = most(h, s.h[lane]);
        }
        f->y[r] = y;
        f->row_h[r] = edge ? 0 : h;
        y += f->row_h[r] + (edge ? 12 : VIEW_ROW_GAP);
    }
    f->h = y - (c->n_rows ? VIEW_ROW_GAP : 0) + VIEW_PAD;
}

static double width_of(const view_picture *p, const view_box *b, const view_cell *c, int lane)
{
    if (c->kind != CELL_ITEM) return c->kind == CELL_BEND ? 4 : 10;
    return fg__view_size_now(p, b, c->ref).w[lane];
}

/* Items keep their column, bends give way. */
static void set_lane(const view_picture *p, const view_box *b, view_frame *f, int lane, double *w,
                     double *weight)
{
    const view_class *c = &p->v->class[b->class];
    double left = 0, right = 0, widest = 0;
    for (int32_t r = 0; r < c->n_rows; r++) {
        const int32_t first = c->row[r], n = c->row[r + 1] - first;
        for (int32_t i = 0; i < n; i++) {
            w[i] = width_of(p, b, &c->cell[first + i], lane);
            weight[i] = c->cell[first + i].kind == CELL_ITEM ? 100 : 1;
            f->x[lane][first + i] = c->cell[first + i].x[lane];
        }
        fg__view_spread(n, f->x[lane] + first, w, weight, VIEW_COLUMN_GAP);
        for (int32_t i = 0; i < n; i++) {
            left = (!r && !i) ? f->x[lane][first] - w[0] / 2
                              : fmin(left, f->x[lane][first + i] - w[i] / 2);
            right = (!r && !i) ? f->x[lane][first] + w[0] / 2
                               : most(right, f->x[lane][first + i] + w[i] / 2);
            if (c->cell[first + i].kind == CELL_ITEM) widest = most(widest, w[i]);
        }
    }
    for (int32_t i = 0; i < c->n_cells; i++) f->x[lane][i] += VIEW_PAD - left;
    f->w[lane] = widest > 0 ? most(right - left, 7.6 * fg__view_letters(b->name) + 30)
                              + 2 * VIEW_PAD : 0;
}

/* The third lane has no columns: what a row holds stands side by side. */
static void set_updates(const view_picture *p, const view_box *b, view_frame *f)
{
    const view_class *c = &p->v->class[b->class];
    for (int32_t r = 0; r < c->n_rows; r++) {
        double x = VIEW_PAD;
        for (int32_t i = c->row[r]; i < c->row[r + 1]; i++) {
            const double w = c->cell[i].kind == CELL_ITEM
                           ? fg__view_size_now(p, b, c->cell[i].ref).w[VIEW_UPDATE] : 0;
            f->x[VIEW_UPDATE][i] = x + w / 2;
            if (w > 0) x += w + VIEW_PILL_GAP * 2;
        }
        if (x > VIEW_PAD)
            f->w[VIEW_UPDATE] = most(f->w[VIEW_UPDATE], x - VIEW_PILL_GAP * 2 + VIEW_PAD);
    }
}

static bool measure(view_picture *p, int32_t at)
{
    fg_view *v = p->v;
    const view_box *b = &v->box[at];
    const view_class *c = &v->class[b->class];
    view_frame *f = &p->frame[at];
    for (int32_t i = 0; i < b->n_items; i++) {
        const int32_t inner = fg__view_shown(v, b, &b->item[i]);
        if (inner >= 0 && p->open[inner] && !measure(p, inner)) return false;
    }
    double *w = fg__view_alloc(v, (size_t)c->n_cells + 1, sizeof *w);
    double *weight = fg__view_alloc(v, (size_t)c->n_cells + 1, sizeof *weight);
    f->y = fg__view_alloc(v, (size_t)c->n_rows + 1, sizeof *f->y);
    f->row_h = fg__view_alloc(v, (size_t)c->n_rows + 1, sizeof *f->row_h);
    for (int lane = 0; lane < VIEW_LANES; lane++)
        f->x[lane] = fg__view_alloc(v, (size_t)c->n_cells + 1, sizeof **f->x);
    if (v->out_of_memory) return false;
    set_rows(p, b, f);
    set_lane(p, b, f, 0, w, weight);
    set_lane(p, b, f, 1, w, weight);
    set_updates(p, b, f);
    return true;
}

int32_t fg__view_open(const fg_view *v, const fg_view_options *o, bool *open)
{
    const int32_t focus = o->focus ? fg__view_find_box(v, o->focus) : 0;
    const int32_t deep = focus < 0 ? 0 : focus;
    int32_t top = deep;
    for (int i = 0; i < o->radius && top > 0; i++) top = v->box[top].parent;
    for (int32_t b = deep; b >= 0; b = v->box[b].parent) {
        open[b] = true;
        if (b == top) break;
    }
    for (int32_t b = 0; b < v->n_boxes; b++) {
        int32_t up = b;
        while (up >= 0 && up != deep) up = v->box[up].parent;
        const bool near = o->depth < 0 || v->box[b].depth - v->box[deep].depth <= o->depth;
        if (up == deep && near && (!v->box[b].made || b == deep || v->box[deep].made))
            open[b] = true;
    }
    return top;
}

bool fg__view_compose(fg_view *v, const fg_view_options *o, view_picture *p)
{
    bool *open = fg__view_alloc(v, (size_t)v->n_boxes + 1, sizeof *open);
    *p = (view_picture){ .v = v, .open = open };
    p->frame = fg__view_alloc(v, (size_t)v->n_boxes + 1, sizeof *p->frame);
    if (!open || !p->frame) return false;
    p->top = fg__view_open(v, o, open);
    if (!measure(p, p->top)) return false;
    const view_frame *f = &p->frame[p->top];
    double x = 0;
    for (int lane = 0; lane < VIEW_LANES; lane++) {
        p->lane[lane] = x;
        if (f->w[lane] > 0) x += f->w[lane] + VIEW_LANE_GAP;
    }
    p->w = x > 0 ? x - VIEW_LANE_GAP : 0;
    p->h = f->h;
    return true;
}
