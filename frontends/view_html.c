/* view_html.c - a view as a page in one file: data, style, script, and a picture for readers
 * without script.
 *
 * The page may load nothing and run one script, which its content policy names by hash.  The data
 * are columns of numbers; texts are kept once, in a list, and reach the page as text alone. */
#include <inttypes.h>
#include "view.h"
#include "view_page.h"

typedef struct {
    view_out out;
    const fg_view *v;
    const fg_view_options *o;
    const char **text;                   /* the list of texts */
    int32_t n_texts, *table;             /* hash table: number of a text + 1 */
    uint32_t mask;
    int columns;                         /* of the object being written */
} page;

static uint64_t hash(const char *s)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (; *s; s++) h = (h ^ (unsigned char)*s) * 0x100000001b3u;
    return h ^ h >> 29;
}

/* The number of a text, which must live as long as the page. */
static int32_t number(page *p, const char *s)
{
    uint32_t at = (uint32_t)(hash(s) >> 8) & p->mask;
    for (; p->table[at]; at = (at + 1) & p->mask)
        if (!strcmp(p->text[p->table[at] - 1], s)) return p->table[at] - 1;
    p->text[p->n_texts] = s;
    p->table[at] = ++p->n_texts;
    return p->n_texts - 1;
}

/* The same for a text that is made for the page. */
static int32_t number_new(page *p, const char *s)
{
    uint32_t at = (uint32_t)(hash(s) >> 8) & p->mask;
    for (; p->table[at]; at = (at + 1) & p->mask)
        if (!strcmp(p->text[p->table[at] - 1], s)) return p->table[at] - 1;
    const char *copy = fg__view_text((fg_view *)(uintptr_t)p->v, "%s", s);
    return number(p, copy ? copy : "");
}

static bool open_texts(page *p)
{
    const fg_view *v = p->v;
    const size_t most = 8u * (size_t)v->n_nodes + 4u * (size_t)v->n_values
        + 2u * (size_t)v->n_boxes +
                        4u * (size_t)v->n_ops + (size_t)v->n_outputs + 64;
    uint32_t cap = 64;
    while (cap < most) cap *= 2;
    p->mask = cap - 1;
    p->text = fg__view_alloc((fg_view *)(uintptr_t)v, most, sizeof *p->text);
    p->table = fg__view_alloc((fg_view *)(uintptr_t)v, cap, sizeof *p->table);
    if (!p->text || !p->table) return false;
    number(p, "");                       /* 0: no text */
    return true;
}


/* ---- columns --------------------------------------------------------------------------------- */

static void begin(page *p, const char *name)
{
    fg__view_say(&p->out, "\"%s\":{", name);
    p->columns = 0;
}

static void begin_column(page *p, const char *name)
{
    fg__view_say(&p->out, "%s\"%s\":[", p->columns++ ? ",\n" : "", name);
}

/* "name":[x(0),x(1),...] for n whole numbers, x an expression in i. */
#define COLUMN(p, name, n, expression)                                                         \
    do {                                                                                       \
        begin_column(p, name);                                                                 \
        for (int32_t i = 0; i < (n); i++)                                                      \
            fg__view_say(&(p)->out, i ? ",%" PRId64 : "%" PRId64, (int64_t)(expression));      \
        fg__view_say(&(p)->out, "]");                                                          \
    } while (0)

static void reals(page *p, const char *name, int which)
{
    const fg_view *v = p->v;
    begin_column(p, name);
    for (int32_t i = 0; i < v->n_nodes; i++) {
        const view_node *n = &v->node[i];
        const double x = which == 0 ? n->flops : which == 1 ? n->bytes : n->time;
        fg__view_say(&p->out, i ? ",%.10g" : "%.10g", x);
    }
    fg__view_say(&p->out, "]");
}

static void lists(page *p, const char *name, bool out)
{
    const fg_view *v = p->v;
    begin_column(p, name);
    for (int32_t i = 0; i < v->n_nodes; i++) {
        const int n = out ? v->node[i].n_out : v->node[i].n_in;
        const int32_t *list = out ? v->node[i].out : v->node[i].in;
        fg__view_say(&p->out, i ? ",[" : "[");
        for (int k = 0; k < n; k++) fg__view_say(&p->out, k ? ",%d" : "%d", (int)list[k]);
        fg__view_say(&p->out, "]");
    }
    fg__view_say(&p->out, "]");
}

static int32_t attrs_of(page *p, const view_node *n)
{
    view_words words;
    fg__view_attrs(n, words);
    return words[0] ? number_new(p, words) : 0;
}

static void nodes(page *p)
{
    const fg_view *v = p->v;
    const view_node *n = v->node;
    begin(p, "nodes");
    COLUMN(p, "id", v->n_nodes, n[i].id);
    COLUMN(p, "op", v->n_nodes, number(p, n[i].op));
    COLUMN(p, "pass", v->n_nodes, n[i].pass);
    COLUMN(p, "box", v->n_nodes, v->drawn_in[i]);
    COLUMN(p, "scope", v->n_nodes, n[i].box);
    COLUMN(p, "home", v->n_nodes, n[i].home);
    COLUMN(p, "param", v->n_nodes, n[i].param);
    COLUMN(p, "info", v->n_nodes, n[i].op_info);
    COLUMN(p, "flags", v->n_nodes, n[i].recomputed + 2 * n[i].view + 4 * n[i].overwrites
           + 8 * n[i].thin);
    COLUMN(p, "src", v->n_nodes, number(p, n[i].src));
    COLUMN(p, "user", v->n_nodes, number(p, n[i].user));
    COLUMN(p, "error", v->n_nodes, number(p, n[i].error));
    COLUMN(p, "attrs", v->n_nodes, attrs_of(p, &n[i]));
    reals(p, "flops", 0);
    reals(p, "bytes", 1);
    reals(p, "time", 2);
    lists(p, "in", false);
    lists(p, "out", true);
    fg__view_say(&p->out, "},\n");
}

static int32_t shape_of(page *p, const view_value *x)
{
    view_words words = "";
    size_t n = 0;
    for (int i = 0; i < x->rank && n < sizeof words; i++)
        n += (size_t)snprintf(words + n, sizeof words - n, i ? ",%" PRId64 : "%" PRId64, x->dim[i]);
    return number_new(p, words);
}

static void values(page *p)
{
    const fg_view *v = p->v;
    const view_value *x = v->value;
    int32_t stats = 0;
    begin(p, "values");
    COLUMN(p, "kind", v->n_values, x[i].kind);
    COLUMN(p, "dtype", v->n_values, number(p, x[i].dtype));
    COLUMN(p, "name", v->n_values, number(p, x[i].name));
    COLUMN(p, "shape", v->n_values, shape_of(p, &x[i]));
    COLUMN(p, "bytes", v->n_values, x[i].bytes);
    COLUMN(p, "maker", v->n_values, x[i].maker);
    COLUMN(p, "root", v->n_values, x[i].root);
    COLUMN(p, "reused", v->n_values, number(p, x[i].reused));
    COLUMN(p, "offset", v->n_values, x[i].laid ? x[i].offset : -1);
    COLUMN(p, "from", v->n_values, x[i].laid ? x[i].from : -1);
    COLUMN(p, "to", v->n_values, x[i].laid ? x[i].to : -1);
    COLUMN(p, "stats", v->n_values, x[i].seen ? stats++ : -1);
    fg__view_say(&p->out, "},\n\"stats\":[");
    stats = 0;
    for (int32_t i = 0; i < v->n_values; i++)
        if (x[i].seen)
            fg__view_say(&p->out, "%s[%.9g,%.9g,%.9g,%.9g,%" PRId64 "]", stats++ ? "," : "",
                         x[i].least,
                         x[i].greatest, x[i].mean, x[i].rms, x[i].not_finite);
    fg__view_say(&p->out, "],\n");
}

/* ---- boxes and classes ----------------------------------------------------------------------- */

static void boxes(page *p)
{
    const fg_view *v = p->v;
    const view_box *b = v->box;
    begin(p, "boxes");
    COLUMN(p, "name", v->n_boxes, number(p, b[i].name));
    COLUMN(p, "path", v->n_boxes, number(p, b[i].path));
    COLUMN(p, "parent", v->n_boxes, b[i].parent);
    COLUMN(p, "cls", v->n_boxes, b[i].class);
    COLUMN(p, "first", v->n_boxes, b[i].first);
    COLUMN(p, "end", v->n_boxes, b[i].end);
    COLUMN(p, "saved", v->n_boxes, b[i].saved);
    COLUMN(p, "recompute", v->n_boxes, b[i].recompute);
    COLUMN(p, "made", v->n_boxes, b[i].made);
    fg__view_say(&p->out, ",\n\"items\":[");
    for (int32_t i = 0; i < v->n_boxes; i++) {
        fg__view_say(&p->out, i ? ",[" : "[");
        for (int32_t k = 0; k < b[i].n_items; k++)
            fg__view_say(&p->out, "%s[%d,%d,%d]", k ? "," : "", (int)b[i].item[k].kind,
                         (int)b[i].item[k].ref, (int)b[i].item[k].count);
        fg__view_say(&p->out, "]");
    }
    fg__view_say(&p->out, "],\n\"child\":[");
    for (int32_t i = 0; i < v->n_boxes; i++) {
        fg__view_say(&p->out, i ? ",[" : "[");
        for (int32_t k = 0; k < b[i].n_children; k++)
            fg__view_say(&p->out, k ? ",%d" : "%d", (int)b[i].child[k]);
        fg__view_say(&p->out, "]");
    }
    fg__view_say(&p->out, "]},\n");
}

static void class(const page *p, const view_class *c)
{
    const view_box *b = &p->v->box[c->box];
    fg__view_say(&p->out, "{\"rows\":[");
    for (int32_t r = 0; r <= c->n_rows; r++)
        fg__view_say(&p->out, r ? ",%d" : "%d", (int)c->row[r]);
    fg__view_say(&p->out, "],\"cells\":[");
    for (int32_t i = 0; i < c->n_cells; i++)
        fg__view_say(&p->out, "%s[%d,%d,%.2f,%.2f]", i ? "," : "", (int)c->cell[i].kind,
                     (int)c->cell[i].ref, c->cell[i].x[0], c->cell[i].x[1]);
    fg__view_say(&p->out, "],\"size\":[");
    for (int32_t i = 0; i < b->n_items; i++) {
        const view_size *s = &c->size[i];
        fg__view_say(&p->out, "%s[%.1f,%.1f,%.1f,%.1f,%.1f,%.1f]", i ? "," : "", s->w[0], s->w[1],
                     s->w[2], s->h[0], s->h[1], s->h[2]);
    }
    fg__view_say(&p->out, "],\"edges\":[");
    for (int32_t i = 0; i < c->n_edges; i++) {
        const view_edge *e = &c->edge[i];
        fg__view_say(&p->out, "%s[%d,%d,%d,%d,%d,%d,[", i ? "," : "", (int)e->from,
                     (int)e->from_port,
                     (int)e->to, (int)e->to_port, (int)e->value, e->back);
        for (int32_t k = 0; k < e->n_bends; k++)
            fg__view_say(&p->out, k ? ",%d" : "%d", (int)c->bend[e->first_bend + k]);
        fg__view_say(&p->out, "]]");
    }
    fg__view_say(&p->out, "]}");
}

static void small_lists(page *p)
{
    const fg_view *v = p->v;
    fg__view_say(&p->out, "\"classes\":[");
    for (int32_t i = 0; i < v->n_classes; i++) {
        if (i) fg__view_say(&p->out, ",\n");
        class(p, &v->class[i]);
    }
    fg__view_say(&p->out, "],\n\"drawn\":[");
    for (int32_t i = 0; i < v->n_nodes; i++)
        fg__view_say(&p->out, i ? ",%d" : "%d", (int)v->drawn[i]);
    fg__view_say(&p->out, "],\n\"ops\":[");
    for (int32_t i = 0; i < v->n_ops; i++) {
        const int32_t name = number(p, v->op[i].name), ins = number(p, v->op[i].ins);
        const int32_t outs = number(p, v->op[i].outs), formula = number(p, v->op[i].formula);
        fg__view_say(&p->out, "%s[%d,%d,%d,%d]", i ? "," : "", (int)name, (int)ins, (int)outs,
                     (int)formula);
    }
    fg__view_say(&p->out, "],\n\"outputs\":[");
    for (int32_t i = 0; i < v->n_outputs; i++)
        fg__view_say(&p->out, "%s[%d,%d]", i ? "," : "", (int)v->output[i].value,
                     (int)number(p, v->output[i].name));
    fg__view_say(&p->out, "],\n\"plans\":[");
    for (int32_t i = 0; i < v->n_plans; i++) {
        const view_plan *q = &v->plan[i];
        fg__view_say(&p->out, "%s[%" PRId64 ",%" PRId64 ",%" PRId64 ",%" PRId64, i ? "," : "",
                     q->first_node, q->nodes, q->arena, q->params);
        fg__view_say(&p->out, ",%" PRId64 ",%" PRId64 ",%" PRId64 ",%" PRId64 "]", q->states,
                     q->inputs,
                     q->scratch, q->total);
    }
    fg__view_say(&p->out, "],\n");
}

static void notes(const page *p)
{
    const fg_view *v = p->v;
    if (!v->compared) return;
    fg__view_say(&p->out, "\"diff\":[");
    for (int32_t i = 0; i < v->n_notes; i++) {
        fg__view_say(&p->out, "%s[%d,", i ? ",\n" : "", v->note[i].kind);
        fg__view_json_text(&p->out, v->note[i].words);
        for (int32_t k = 0; k < v->note[i].n; k++)
            fg__view_say(&p->out, ",%d", (int)v->note[i].node[k]);
        fg__view_say(&p->out, "]");
    }
    fg__view_say(&p->out, "],\n");
}

static void data(page *p)
{
    const fg_view *v = p->v;
    const int32_t focus = p->o->focus ? fg__view_find_box(v, p->o->focus) : -1;
    fg__view_say(&p->out, "{\"meta\":{\"model\":");
    fg__view_json_text(&p->out, v->model);
    fg__view_say(&p->out, ",\"stage\":");
    fg__view_json_text(&p->out, v->stage);
    fg__view_say(&p->out, ",\"heat\":\"%s\",\"depth\":%d,\"focus\":%d,\"memory\":%s,\"timed\":%s,"
                 "\"seen\":%s,\"has\":[%s,%s,%s]},\n", fg_heat_name(p->o->heat), p->o->depth,
                     (int)focus,
                 v->planned ? "true" : "false", v->timed ? "true" : "false",
                 v->seen ? "true" : "false", v->has[0] ? "true" : "false",
                 v->has[1] ? "true" : "false", v->has[2] ? "true" : "false");
    nodes(p);
    values(p);
    boxes(p);
    small_lists(p);
    notes(p);
    fg__view_say(&p->out, "\"strings\":[");
    for (int32_t i = 0; i < p->n_texts; i++) {
        if (i) fg__view_say(&p->out, ",\n");
        fg__view_json_text(&p->out, p->text[i]);
    }
    fg__view_say(&p->out, "]}");
}

fg_status fg_view_html(const fg_view *v, const fg_view_options *o, fg_put put, void *to)
{
    page p = { .out = { put, to }, .v = v, .o = o };
    char policy[48];
    if (!open_texts(&p)) return FG_ERR_MEMORY;
    fg__view_sha256(view_js, sizeof view_js - 1, policy);
    fg__view_say(&p.out, "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n"
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; "
        "style-src 'unsafe-inline'; script-src 'sha256-%s'; base-uri 'none'; "
        "form-action 'none'\">\n"
        "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>",
            policy);
    fg__view_xml_text(&p.out, v->model[0] ? v->model : "graph");
    fg__view_say(&p.out, "</title>\n<link rel=\"icon\" href=\"data:,\">\n<style>\n");
    put(to, view_css);
    fg__view_say(&p.out, "</style></head><body>\n<noscript>");
    int32_t top = 0;
    for (int32_t b = 0; b < v->n_boxes; b++) top += v->box[b].depth == 1 && v->box[b].n_items > 0;
    const fg_view_options closed = { .depth = top < 16 && v->n_nodes < 20000 };
    const fg_status s = fg_view_svg(v, &closed, put, to);
    fg__view_say(&p.out, "</noscript>\n");
    put(to, view_page_html);
    fg__view_say(&p.out, "<script type=\"application/json\" id=\"graph\">\n");
    data(&p);
    fg__view_say(&p.out, "</script>\n<script>");
    put(to, view_js);
    fg__view_say(&p.out, "</script>\n</body></html>\n");
    return s ? s : v->out_of_memory ? FG_ERR_MEMORY : FG_OK;
}
