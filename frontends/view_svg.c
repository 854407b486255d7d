/* view_svg.c - a view as a picture: lanes side by side, boxes open to some depth, no script.
 *
 * Everything is drawn from the outside in: a box's frames, its edges, its items.  The memory plan,
 * where asked for, lies under the graph: nodes in running order from left to right, bytes
 * upwards. */
#include <inttypes.h>
#include <math.h>
#include "view.h"

typedef struct {
    view_out out;
    view_picture p;
    const fg_view_options *o;
    double least, greatest;              /* of the heat of what is drawn */
} drawing;

static const char *const lane_class[] = { "f", "b", "u" };
static const char *const lane_name[] = { "forward", "backward", "optimizer" };

static void style(const drawing *d)
{
    const bool dark = d->o->dark;
    fg__view_say(&d->out, "<style>text{font-family:'DejaVu Sans',system-ui,sans-serif;"
        "font-size:11px;fill:%s}.t{font-weight:600;font-size:12px}.s{fill:%s;font-size:10px}"
        ".e{fill:none;stroke:%s;stroke-width:1.2}.g{fill:none;stroke:#d55e00;stroke-opacity:.45;"
        "stroke-width:1.1}.v{fill:none;stroke:%s;stroke-dasharray:2 3}.box{fill-opacity:.045;"
        "stroke-opacity:.35}", dark ? "#e8eaf0" : "#1b2330", dark ? "#9aa4b5" : "#5b6778",
        dark ? "#8b95a7" : "#8491a5", dark ? "#6b7589" : "#a8b2c1");
    fg__view_say(&d->out, ".f{fill:#2f6fdd;stroke:%s}.b{fill:#d55e00;stroke:%s}.u{fill:#009e73;"
        "stroke:%s}.n{stroke-width:1.3}.r{stroke-dasharray:4 3}.x{fill:#c9182b;stroke:#c9182b}"
        ".pill{fill:%s;stroke:%s}"
        ".lane{font-weight:700;font-size:13px;letter-spacing:.4px}</style>\n",
        dark ? "#7aa7ff" : "#2f6fdd", dark ? "#ff9a4d" : "#c85a00", dark ? "#3ecf9f" : "#00845f",
        dark ? "#242b38" : "#f4f6fa", dark ? "#5d6880" : "#9aa6b8");
}

static void label(const drawing *d, double x, double y, const char *class, const char *anchor,
                  const char *text)
{
    fg__view_say(&d->out, "<text x=\"%.1f\" y=\"%.1f\" class=\"%s\" text-anchor=\"%s\">", x, y,
                 class, anchor);
    fg__view_xml_text(&d->out, text);
    fg__view_say(&d->out, "</text>\n");
}

static void rectangle(const drawing *d, double x, double y, double w, double h, double r,
                      const char *class, double fill)
{
    fg__view_say(&d->out, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" rx=\"%.1f\" "
                 "class=\"%s\"", x, y, w, h, r, class);
    if (fill >= 0) fg__view_say(&d->out, " fill-opacity=\"%.3f\"", fill);
    fg__view_say(&d->out, "/>\n");
}

/* How strongly something of that heat is filled: logarithmic between what is drawn. */
static double strength(const drawing *d, double heat)
{
    if (d->o->heat == FG_HEAT_NONE) return 0.12;
    if (heat <= 0 || d->greatest <= d->least) return heat > 0 ? 0.8 : 0.04;
    const double x = (log(heat) - log(d->least)) / (log(d->greatest) - log(d->least));
    return 0.06 + 0.74 * (x > 0 ? x : 0);
}

static void title(const drawing *d, int32_t k)
{
    const view_node *n = &d->p.v->node[k];
    view_words words;
    fg__view_say(&d->out, "<title>");
    fg__view_xml_text(&d->out, n->op);
    fg__view_say(&d->out, " (%s)\n", lane_name[n->pass]);
    fg__view_attrs(n, words);
    if (words[0]) { fg__view_xml_text(&d->out, words); fg__view_say(&d->out, "\n"); }
    for (int o = 0; o < n->n_out; o++) {
        fg__view_shape(&d->p.v->value[n->out[o]], words);
        fg__view_xml_text(&d->out, d->p.v->value[n->out[o]].dtype);
        fg__view_say(&d->out, " %s\n", words);
    }
    fg__view_heat_words(n->flops, FG_HEAT_FLOPS, words);
    fg__view_say(&d->out, "%s, ", words);
    fg__view_bytes(n->bytes, words);
    fg__view_say(&d->out, "%s moved\n", words);
    fg__view_xml_text(&d->out, n->user[0] ? n->user : n->src);
    fg__view_say(&d->out, "\n");
    fg__view_xml_text(&d->out, n->error);
    fg__view_say(&d->out, "</title>");
}

/* ---- nodes ----------------------------------------------------------------------------------- */

static void forward_node(const drawing *d, int32_t k, double x, double y, view_size s)
{
    const view_node *n = &d->p.v->node[k];
    const char *sign = fg__view_sign(n), *class = n->error[0] ? "x n" : "f n";
    const double fill = strength(d, fg__view_heat(d->p.v, k, d->o->heat));
    view_words shape = "", name;
    fg__view_label(d->p.v, k, name);
    if (n->n_out) fg__view_shape(&d->p.v->value[n->out[0]], shape);
    fg__view_say(&d->out, "<g>");
    title(d, k);
    if (sign) {
        fg__view_say(&d->out, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"15\" class=\"%s\" "
                     "fill-opacity=\"%.3f\"/>", x, y, class, fill);
        label(d, x, y + 5, "t", "middle", sign);
    } else {
        const double w = s.w[0], h = s.h[0];
        rectangle(d, x - w / 2, y - h / 2, w, h, n->thin ? 10 : 6, n->thin ? "pill n" : class,
                  n->thin ? 1 : fill);
        if (n->thin) {
            fg__view_say(&d->out,
                         "<text x=\"%.1f\" y=\"%.1f\" class=\"s\" text-anchor=\"middle\">", x,
                         y + 3.5);
            fg__view_xml_text(&d->out, n->op);
            fg__view_say(&d->out, " %s</text>\n", shape);
        } else {
            fg__view_say(&d->out, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">"
                         "<tspan class=\"t\">", x, y - 3);
            fg__view_xml_text(&d->out, n->op);
            fg__view_say(&d->out, "</tspan>%s", name[0] ? " \302\240" : "");
            fg__view_xml_text(&d->out, name);
            fg__view_say(&d->out, "</text>\n");
            label(d, x, y + 12, "s", "middle", n->error[0] ? "does not type-check" : shape);
        }
    }
    fg__view_say(&d->out, "</g>\n");
}

static void pill(const drawing *d, int32_t k, int lane, double x, double y, double w,
                 const char *text)
{
    const view_node *n = &d->p.v->node[k];
    fg__view_say(&d->out, "<g>");
    title(d, k);
    rectangle(d, x, y, w, VIEW_PILL_H, 5, n->error[0] ? "x n" : n->recomputed ? "b r"
              : lane_class[lane],
              strength(d, fg__view_heat(d->p.v, k, d->o->heat)));
    view_words shown;
    const int letters = (int)(w / 6.2);
    int used = 0;
    size_t at = 0;
    for (const char *s = text; *s && at < VIEW_WORDS - 8; s++) {
        if ((*s & 0xc0) != 0x80 && used++ >= letters) break;
        shown[at++] = *s;
    }
    shown[at] = 0;
    label(d, x + w / 2, y + 14, "s", "middle", shown);
    fg__view_say(&d->out, "</g>\n");
}

/* The backward or update nodes beside node k, in columns of VIEW_STACK; x, y is the middle. */
static void attached(const drawing *d, int32_t k, int lane, double x, double y, view_size s)
{
    const fg_view *v = d->p.v;
    const double w = lane == VIEW_BACKWARD ? VIEW_PILL_W : VIEW_CHIP_W;
    int i = 0;
    if (v->node[k].pass == lane) {
        pill(d, k, lane, x - s.w[lane] / 2, y - s.h[lane] / 2, w, v->node[k].op);
        return;
    }
    for (int32_t a = v->first_attached[k]; a >= 0; a = v->node[a].next) {
        view_words name;
        bool first = v->node[a].pass == lane;
        for (int32_t e = v->first_attached[k]; lane == VIEW_UPDATE && e != a; e = v->node[e].next)
            first &= v->node[e].pass != lane || v->node[e].param != v->node[a].param;
        if (!first) continue;
        fg__view_label(v, a, name);
        pill(d, a, lane, x - s.w[lane] / 2 + i / VIEW_STACK * (w + VIEW_PILL_GAP),
             y - s.h[lane] / 2 + i % VIEW_STACK * (VIEW_PILL_H + VIEW_PILL_GAP), w,
             lane == VIEW_UPDATE && name[0] ? name : v->node[a].op);
        i++;
    }
}

static void closed_box(const drawing *d, const view_box *in, const view_item *x, int lane,
                       double cx,
                       double cy, view_size s)
{
    const fg_view *v = d->p.v;
    const view_box *b = &v->box[fg__view_shown(v, in, x)];
    view_words words, name;
    const double w = s.w[lane], h = s.h[lane];
    int32_t n = 0;
    for (int32_t i = b->first; i < b->end; i++) n += v->node[v->drawn[i]].pass == lane;
    fg__view_say(&d->out, "<g><title>");
    fg__view_xml_text(&d->out, b->path);
    fg__view_say(&d->out, "</title>");
    const double fill = strength(d, fg__view_box_heat(v, b, lane, d->o->heat));
    for (int back = x->count > 1 ? 2 : 0; back > 0; back--)
        rectangle(d, cx - w / 2 + back * 4, cy - h / 2 - back * 4, w, h, 7, lane_class[lane], 0.05);
    rectangle(d, cx - w / 2, cy - h / 2, w, h, 7, lane_class[lane], fill);
    fg__view_box_name(v, in, x, name);
    label(d, cx, cy - 3, "t", "middle", name);
    snprintf(words, sizeof words, "%d nodes", (int)n);
    if (d->o->heat)
        fg__view_heat_words(fg__view_box_heat(v, b, lane, d->o->heat), d->o->heat, words);
    label(d, cx, cy + 13, "s", "middle", words);
    fg__view_say(&d->out, "</g>\n");
}

static void end_item(const drawing *d, const view_item *x, double cx, double cy, view_size s)
{
    const fg_view *v = d->p.v;
    view_words text;
    rectangle(d, cx - s.w[0] / 2, cy - 13, s.w[0], 26, 13, "pill n", 1);
    snprintf(text, sizeof text, "%.200s",
             x->kind == ITEM_INPUT ? v->value[x->ref].name : v->output[x->ref].name);
    label(d, cx, cy + 4, "t", "middle", fg_text_is_utf8(text) ? text : "...");
}

/* ---- edges ----------------------------------------------------------------------------------- */

static double cell_half(const drawing *d, const view_box *b, const view_cell *c, int lane)
{
    return c->kind == CELL_ITEM ? fg__view_size_now(&d->p, b, c->ref).h[lane] / 2 : 0;
}

static int32_t row_of(const view_class *c, int32_t cell)
{
    int32_t r = 0;
    while (r + 1 < c->n_rows && c->row[r + 1] <= cell) r++;
    return r;
}

/* Where an edge meets a cell: the port of an open box, else its middle. */
static double meets(const drawing *d, const view_box *b, const view_class *c, int32_t cell,
                    int lane,
                    int32_t port, bool lower)
{
    const view_frame *f = &d->p.frame[b - d->p.v->box];
    const double x = f->x[lane][cell];
    if (c->cell[cell].kind != CELL_ITEM) return x;
    const int32_t inner = fg__view_shown(d->p.v, b, &b->item[c->cell[cell].ref]);
    if (inner < 0 || !d->p.open[inner] || d->p.frame[inner].w[lane] <= 0) return x;
    const view_box *i = &d->p.v->box[inner];
    const view_class *ic = &d->p.v->class[i->class];
    const view_frame *g = &d->p.frame[inner];
    for (int32_t k = 0; k < ic->n_cells; k++)
        if (ic->cell[k].kind == (lower ? CELL_OUT : CELL_IN) && ic->cell[k].ref == port)
            return x - g->w[lane] / 2 + g->x[lane][k];
    return x;
}

/* A sum passes its gradient on without a node: a joint in the second lane. */
static bool is_joint(const drawing *d, const view_box *b, const view_cell *c)
{
    const view_item *x = c->kind == CELL_ITEM ? &b->item[c->ref] : NULL;
    return x && x->kind == ITEM_NODE && !strcmp(d->p.v->node[x->ref].op, "add") &&
           d->p.v->node[x->ref].pass == VIEW_FORWARD && d->p.v->has[VIEW_BACKWARD];
}

static bool has_lane(const drawing *d, const view_box *b, const view_cell *c, int lane)
{
    return c->kind != CELL_ITEM || fg__view_size_now(&d->p, b, c->ref).w[lane] > 0 ||
           (lane == VIEW_BACKWARD && is_joint(d, b, c));
}

/* The middle of an item; items hang from the upper end of their row. */
static double middle(const drawing *d, const view_box *b, const view_class *c, int32_t cell,
                     int32_t r,
                     double y)
{
    const view_frame *f = &d->p.frame[b - d->p.v->box];
    double h = 0;
    if (c->cell[cell].kind == CELL_ITEM) {
        const view_size s = fg__view_size_now(&d->p, b, c->cell[cell].ref);
        for (int lane = 0; lane < VIEW_LANES; lane++) if (s.h[lane] > h) h = s.h[lane];
    }
    return y + f->y[r] + h / 2;
}

static void curve(const drawing *d, double x0, double y0, double x1, double y1)
{
    const double m = (y0 + y1) / 2;
    if (fabs(x0 - x1) < 0.5) fg__view_say(&d->out, "L%.1f %.1f", x1, y1);
    else fg__view_say(&d->out, "C%.1f %.1f %.1f %.1f %.1f %.1f", x0, m, x1, m, x1, y1);
}

/* Upper and lower end of a cell's row in one lane. */
static void edge(const drawing *d, const view_box *b, const view_edge *e, int lane, double x,
                 double y)
{
    const view_class *c = &d->p.v->class[b->class];
    const view_frame *f = &d->p.frame[b - d->p.v->box];
    const int32_t r0 = row_of(c, e->from), r1 = row_of(c, e->to);
    const double x0 = x + meets(d, b, c, e->from, lane, e->from_port, true);
    const double x1 = x + meets(d, b, c, e->to, lane, e->to_port, false);
    const double h0 = cell_half(d, b, &c->cell[e->from], lane);
    const double h1 = cell_half(d, b, &c->cell[e->to], lane);
    const double y0 = c->cell[e->from].kind == CELL_IN ? y : middle(d, b, c, e->from, r0, y) + h0;
    const double y1 = c->cell[e->to].kind == CELL_OUT ? y + f->h
                    : middle(d, b, c, e->to, r1, y) - h1;
    const bool arrow = c->cell[e->to].kind == CELL_ITEM;
    fg__view_say(&d->out, "<path class=\"%s\" d=\"M%.1f %.1f", lane ? "g" : "e", x0, y0);
    double px = x0, py = e->back ? y0 : y + f->y[r0] + f->row_h[r0];
    if (py > y0) fg__view_say(&d->out, "L%.1f %.1f", px, py);
    else py = y0;
    for (int32_t i = 0; i < e->n_bends; i++) {
        const int32_t cell = c->bend[e->first_bend + i], r = row_of(c, cell);
        const double bx = x + f->x[lane][cell], begin = y + f->y[r], end = begin + f->row_h[r];
        curve(d, px, py, bx, begin);
        fg__view_say(&d->out, "L%.1f %.1f", bx, end);
        px = bx;
        py = end;
    }
    const double top = c->cell[e->to].kind == CELL_OUT || e->back ? y1 : y + f->y[r1];
    curve(d, px, py, x1, top);
    if (y1 > top) fg__view_say(&d->out, "L%.1f %.1f", x1, y1);
    if (lane && c->cell[e->from].kind == CELL_ITEM)          /* gradients flow upwards */
        fg__view_say(&d->out, "M%.1f %.1fl-3 6m3 -6l3 6", x0, y0);
    else if (!lane && arrow) fg__view_say(&d->out, "M%.1f %.1fl-3 -6m3 6l3 -6", x1, y1);
    fg__view_say(&d->out, "\"/>\n");
}

static void edges(const drawing *d, const view_box *b, const double x[VIEW_LANES], double y)
{
    const view_class *c = &d->p.v->class[b->class];
    for (int lane = 0; lane < 2; lane++)
        for (int32_t i = 0; i < c->n_edges; i++) {
            const view_edge *e = &c->edge[i];
            const view_value *value = &d->p.v->value[e->value];
            if (!has_lane(d, b, &c->cell[e->from], lane) || !has_lane(d, b, &c->cell[e->to], lane))
                continue;
            if (lane && (value->kind == VIEW_INPUT || !strcmp(value->dtype, "i32"))) continue;
            if (d->p.frame[b - d->p.v->box].w[lane] > 0) edge(d, b, e, lane, x[lane], y);
        }
}

/* What is kept for the backward pass: a line from a node to its twin, the bytes of a row between
 * the lanes. */
static void saved_lines(const drawing *d, const view_box *b, const double x[VIEW_LANES], double y)
{
    const view_class *c = &d->p.v->class[b->class];
    const view_frame *f = &d->p.frame[b - d->p.v->box];
    for (int32_t r = 0; r < c->n_rows; r++) {
        int64_t bytes = 0;
        int n = 0;
        for (int32_t i = c->row[r]; i < c->row[r + 1]; i++) {
            const view_item *t = c->cell[i].kind == CELL_ITEM ? &b->item[c->cell[i].ref] : NULL;
            const int32_t inner = t ? fg__view_shown(d->p.v, b, t) : -1;
            if (!t || (inner >= 0 && d->p.open[inner])) continue;
            const int64_t kept = t->kind == ITEM_NODE ? fg__view_saved(d->p.v, t->ref)
                               : inner >= 0 ? d->p.v->box[inner].saved * t->count : 0;
            if (!kept) continue;
            const view_size s = fg__view_size_now(&d->p, b, c->cell[i].ref);
            const double at = middle(d, b, c, i, r, y) + 5 * n++ - 4;
            fg__view_say(&d->out, "<path class=\"v\" d=\"M%.1f %.1fH%.1f\"/>\n",
                         x[0] + f->x[0][i] + s.w[0] / 2, at, x[1] + f->x[1][i] - s.w[1] / 2);
            bytes += kept;
        }
        view_words words;
        fg__view_bytes((double)bytes, words);
        if (bytes) label(d, d->p.lane[1] - VIEW_LANE_GAP / 2, y + f->y[r] + 8, "s",
                         "middle", words);
    }
}

/* ---- boxes ----------------------------------------------------------------------------------- */

static void open_box(const drawing *d, int32_t at, const double x[VIEW_LANES], double y,
                     const view_box *in, const view_item *as);

static void item(const drawing *d, const view_box *b, int32_t cell, int32_t r,
                 const double x[VIEW_LANES], double y)
{
    const view_class *c = &d->p.v->class[b->class];
    const view_frame *f = &d->p.frame[b - d->p.v->box];
    const view_item *t = &b->item[c->cell[cell].ref];
    const view_size s = fg__view_size_now(&d->p, b, c->cell[cell].ref);
    const int32_t inner = fg__view_shown(d->p.v, b, t);
    const double cy = middle(d, b, c, cell, r, y);
    double cx[VIEW_LANES], left[VIEW_LANES];
    for (int lane = 0; lane < VIEW_LANES; lane++) {
        cx[lane] = x[lane] + f->x[lane][cell];
        left[lane] = cx[lane] - s.w[lane] / 2;
    }
    if (inner >= 0 && d->p.open[inner]) {
        open_box(d, inner, left, cy - d->p.frame[inner].h / 2, b, t);
        return;
    }
    if (s.w[1] <= 0 && is_joint(d, b, &c->cell[cell]))
        fg__view_say(&d->out, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" class=\"b\"/>\n", cx[1], cy);
    for (int lane = 0; lane < VIEW_LANES; lane++) {
        if (s.w[lane] <= 0) continue;
        if (inner >= 0) closed_box(d, b, t, lane, cx[lane], cy, s);
        else if (t->kind != ITEM_NODE) end_item(d, t, cx[lane], cy, s);
        else if (lane == 0) forward_node(d, t->ref, cx[0], cy, s);
        else attached(d, t->ref, lane, cx[lane], cy, s);
    }
}

static void open_box(const drawing *d, int32_t at, const double x[VIEW_LANES], double y,
                     const view_box *in, const view_item *as)
{
    const view_box *b = &d->p.v->box[at];
    const view_class *c = &d->p.v->class[b->class];
    const view_frame *f = &d->p.frame[at];
    view_words name;
    if (as) fg__view_box_name(d->p.v, in, as, name);
    else snprintf(name, sizeof name, "%.250s", b->path);
    for (int lane = 0; lane < VIEW_LANES && at != 0; lane++) {
        if (f->w[lane] <= 0) continue;
        fg__view_say(&d->out, "<g class=\"%s\">", lane_class[lane]);
        rectangle(d, x[lane], y, f->w[lane], f->h, 10, "box", -1);
        fg__view_say(&d->out, "</g>\n");
        label(d, x[lane] + 12, y + 17, "t", "start", fg_text_is_utf8(name) ? name : "...");
    }
    if (f->w[1] > 0 && f->w[0] > 0) saved_lines(d, b, x, y);
    edges(d, b, x, y);
    for (int32_t r = 0; r < c->n_rows; r++)
        for (int32_t i = c->row[r]; i < c->row[r + 1]; i++)
            if (c->cell[i].kind == CELL_ITEM) item(d, b, i, r, x, y);
}

/* ---- memory and heat ------------------------------------------------------------------------- */

static void find_range(drawing *d)
{
    const fg_view *v = d->p.v;
    d->least = d->greatest = 0;
    for (int32_t k = 0; k < v->n_nodes; k++) {
        const double x = fg__view_heat(v, k, d->o->heat);
        if (x > 0 && (d->least <= 0 || x < d->least)) d->least = x;
        if (x > d->greatest) d->greatest = x;
    }
    const double all = fg__view_box_heat(v, &v->box[0], 0, d->o->heat);
    if (all > d->greatest) d->greatest = all;
    if (d->greatest > 0 && d->least < d->greatest * 1e-6) d->least = d->greatest * 1e-6;
}

static void legend(const drawing *d, double x, double y)
{
    view_words words, low, high;
    if (!d->o->heat) return;
    fg__view_heat_words(d->least, d->o->heat, low);
    fg__view_heat_words(d->greatest, d->o->heat, high);
    for (int i = 0; i < 20; i++)
        rectangle(d, x + 80 + i * 6, y - 10, 6, 12, 0, "f", 0.06 + 0.74 * i / 19);
    snprintf(words, sizeof words, "%.40s", fg_heat_name(d->o->heat));
    label(d, x, y, "t", "start", words);
    label(d, x + 74, y, "s", "end", low);
    label(d, x + 206, y, "s", "start", high);
}

static const char *kind_of(const fg_view *v, const view_value *x, int64_t first_backward)
{
    const int pass = v->node[x->maker].pass;
    return pass == VIEW_UPDATE ? "u" : pass == VIEW_BACKWARD ? "b"
         : first_backward >= 0 && x->to >= first_backward ? "k" : "f";
}

static void memory(const drawing *d, double y, double width, double height)
{
    const fg_view *v = d->p.v;
    int64_t last = 1, arena = 1, backward = -1;
    view_words words;
    for (int32_t k = 0; k < v->n_nodes; k++) {
        if (v->node[k].id > last) last = v->node[k].id;
        if (v->node[k].pass == VIEW_BACKWARD && backward < 0) backward = v->node[k].id;
    }
    for (int32_t i = 0; i < v->n_plans; i++) if (v->plan[i].arena > arena) arena = v->plan[i].arena;
    fg__view_bytes((double)arena, words);
    fg__view_say(&d->out, "<style>.k{fill:#7b4fc9;stroke:#7b4fc9}.m{stroke-width:.3;"
                 "fill-opacity:.55}.peak{stroke:#c9182b;stroke-dasharray:6 4}</style>\n");
    label(d, 0, y - 8, "lane", "start", "memory plan");
    fg__view_say(&d->out, "<text x=\"110\" y=\"%.1f\" class=\"s\">arena %s; in the order of nodes: "
                 "blue temporary, violet saved for the backward pass, orange gradients</text>\n",
                 y - 8, words);
    for (int32_t i = 0; i < v->n_values; i++) {
        const view_value *x = &v->value[i];
        if (!x->laid || x->maker < 0) continue;
        const double left = (double)x->from / (double)(last + 1) * width;
        const double w = (double)(x->to - x->from + 1) / (double)(last + 1) * width;
        const double h = (double)x->bytes / (double)arena * height;
        fg__view_say(&d->out, "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" "
                     "class=\"%s m\"/>\n", left, y + height - (double)x->offset / (double)arena *
                     height - h, w, h, kind_of(v, x, backward));
    }
    fg__view_say(&d->out, "<path class=\"peak\" d=\"M0 %.1fH%.1f\"/><path class=\"e\" "
                 "d=\"M0 %.1fH%.1f\"/>\n", y, width, y + height, width);
}

fg_status fg_view_svg(const fg_view *view, const fg_view_options *o, fg_put put, void *to)
{
    fg_view *v = (fg_view *)(uintptr_t)view;             /* memory for the picture is the view's */
    drawing d = { .out = { put, to }, .o = o };
    if (!fg__view_compose(v, o, &d.p)) return FG_ERR_MEMORY;
    const bool plan = o->memory && v->planned;
    const double head = 52, wide = d.p.w > (plan ? 720 : 200) ? d.p.w : plan ? 720 : 200;
    const double high = d.p.h + head + (plan ? 280 : 0);
    find_range(&d);
    fg__view_say(&d.out, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"-16 -12 %.0f %.0f\" "
                 "width=\"%.0f\" height=\"%.0f\" role=\"img\">\n", wide + 32, high + 28, wide + 32,
                 high + 28);
    fg__view_say(&d.out, "<title>");
    fg__view_xml_text(&d.out, v->model);
    fg__view_say(&d.out, "</title>\n");
    style(&d);
    rectangle(&d, -16, -12, wide + 32, high + 28, 0, o->dark ? "page" : "page", 1);
    fg__view_say(&d.out, "<style>.page{fill:%s}</style>\n", o->dark ? "#151a22" : "#ffffff");
    view_words name;
    snprintf(name, sizeof name, "%.100s%s%.140s", v->model, d.p.top ? "  " : "",
             v->box[d.p.top].path);
    label(&d, 0, 12, "lane", "start", fg_text_is_utf8(name) ? name : "");
    legend(&d, wide - 260, 12);
    for (int lane = 0; lane < VIEW_LANES; lane++)
        if (d.p.frame[d.p.top].w[lane] > 0)
            label(&d, d.p.lane[lane] + 2, 40, "s", "start", lane_name[lane]);
    open_box(&d, d.p.top, d.p.lane, head - 6, NULL, NULL);
    if (plan) memory(&d, head + d.p.h + 40, wide, 220);
    fg__view_say(&d.out, "</svg>\n");
    return FG_OK;
}
