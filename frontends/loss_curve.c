/* loss_curve.c - the losses of a metrics.jsonl as a picture: SVG, nothing but lines and text.
 *
 * Across: tokens.  Up: loss in nats per token.  Thin line: training; line with dots: held out;
 * dashed: the n-gram baseline.  A long run is thinned: neighbouring training points are averaged,
 * at most 1000 stay. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "training.h"

enum { MOST = 1000, WIDTH = 800, HEIGHT = 480, LEFT = 70, RIGHT = 20, TOP = 40, BOTTOM = 60 };

typedef struct { double x, y; } point;
typedef struct { point *at; size_t n, room; } curve;
typedef struct { curve train, eval; double ngram, x0, x1, y0, y1; bool failed; } picture;

static void add(picture *p, curve *c, double x, double y)
{
    if (c->n == c->room) {
        const size_t room = c->room ? 2 * c->room : 64;
        point *at = realloc(c->at, room * sizeof *at);
        if (!at) {
            p->failed = true;
            return;
        }
        c->at = at;
        c->room = room;
    }
    c->at[c->n++] = (point){ x, y };
}

static void read_line(picture *p, const char *line)
{
    fg_json *json = NULL;
    char ignored[200];
    double tokens, loss;

    if (fg_json_parse(line, strlen(line), fg__metric_rules, &json, ignored) != FG_OK)
        return;
    const fg_json_value *o = fg_json_root(json), *kind = fg_json_get(o, "kind");
    if (kind && kind->kind == FG_JSON_TEXT && fg_json_number(fg_json_get(o, "tokens"), &tokens) &&
        fg_json_number(fg_json_get(o, "loss"), &loss)) {
        if (!strcmp(kind->u.text, "train"))
            add(p, &p->train, tokens, loss);
        else if (!strcmp(kind->u.text, "eval"))
            add(p, &p->eval, tokens, loss);
        fg_json_number(fg_json_get(o, "ngram_loss"), &p->ngram);
    }
    fg_json_free(json);
}

static void thin(curve *c)
{
    const size_t group = (c->n + MOST - 1) / MOST;
    size_t n = 0;
    if (group < 2)
        return;
    for (size_t i = 0; i < c->n; i += group) {
        const size_t m = c->n - i < group ? c->n - i : group;
        point mean = { 0, 0 };
        for (size_t k = 0; k < m; k++) {
            mean.x += c->at[i + k].x / (double)m;
            mean.y += c->at[i + k].y / (double)m;
        }
        c->at[n++] = mean;
    }
    c->n = n;
}

static void stretch(picture *p, const curve *c)
{
    for (size_t i = 0; i < c->n; i++) {
        p->x1 = fmax(p->x1, c->at[i].x);
        p->y0 = fmin(p->y0, c->at[i].y);
        p->y1 = fmax(p->y1, c->at[i].y);
    }
}

/* The round number (1, 2 or 5 times a power of ten) that parts a span in about five. */
static double tick(double span)
{
    const double power = pow(10, floor(log10(span / 5)));
    const double ratio = span / 5 / power;
    return power * (ratio < 1.5 ? 1 : ratio < 3.5 ? 2 : ratio < 7.5 ? 5 : 10);
}

static double px(const picture *p, double x)
{
    return LEFT + (x - p->x0) / (p->x1 - p->x0) * (WIDTH - LEFT - RIGHT);
}

static double py(const picture *p, double y)
{
    return TOP + (p->y1 - y) / (p->y1 - p->y0) * (HEIGHT - TOP - BOTTOM);
}

/* 1500000 as "1.5M". */
static void short_number(double x, char text[32])
{
    static const char units[] = { 0, 'k', 'M', 'G', 'T', 0 };
    int i = 0;
    while (fabs(x) >= 1000 && i < 4) {
        x /= 1000;
        i++;
    }
    snprintf(text, 32, "%.4g%.1s", x, &units[i]);
}

static void draw_axes(FILE *out, const picture *p)
{
    const double dx = tick(p->x1 - p->x0), dy = tick(p->y1 - p->y0);
    char text[32];

    fputs("<g stroke=\"#e0e0e0\" fill=\"#444\" font-size=\"12\">\n", out);
    for (double y = ceil(p->y0 / dy) * dy; y <= p->y1 + 1e-9 * dy; y += dy)
        fprintf(out,
                "<path d=\"M%d %.1fH%d\"/><text stroke=\"none\" x=\"%d\" y=\"%.1f\" "
                "text-anchor=\"end\">"
                "%.4g</text>\n",
                LEFT, py(p, y), WIDTH - RIGHT, LEFT - 8, py(p, y) + 4, fabs(y) < 1e-9 ? 0 : y);
    for (double x = 0; x <= p->x1 * (1 + 1e-9); x += dx) {
        short_number(x, text);
        fprintf(out, "<path d=\"M%.1f %dV%d\"/><text stroke=\"none\" x=\"%.1f\" y=\"%d\" "
                "text-anchor=\"middle\">%s</text>\n", px(p, x), TOP, HEIGHT - BOTTOM, px(p, x),
                HEIGHT - BOTTOM + 18, text);
    }
    fprintf(out, "</g>\n<path d=\"M%d %dV%dH%d\" fill=\"none\" stroke=\"#444\"/>\n", LEFT, TOP,
            HEIGHT - BOTTOM, WIDTH - RIGHT);
    fprintf(out, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">tokens</text>\n",
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 18);
    fprintf(out, "<text transform=\"translate(20 %d) rotate(-90)\" text-anchor=\"middle\">"
            "loss (nats per token)</text>\n", (TOP + HEIGHT - BOTTOM) / 2);
}

static void draw_curve(FILE *out, const picture *p, const curve *c, const char *id,
                       const char *colour, double width, bool dots)
{
    if (!c->n)
        return;
    fprintf(out, "<polyline id=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"%g\" points=\"",
            id, colour, width);
    for (size_t i = 0; i < c->n; i++)
        fprintf(out, "%.1f,%.1f ", px(p, c->at[i].x), py(p, c->at[i].y));
    fputs("\"/>\n", out);
    for (size_t i = 0; i < c->n && (dots || c->n == 1); i++)
        fprintf(out, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n", px(p, c->at[i].x),
                py(p, c->at[i].y), colour);
}

static void draw_key(FILE *out, int row, const char *colour, const char *dash, const char *name,
                     double value)
{
    const int x = WIDTH - RIGHT - 210, y = TOP + 16 + 20 * row;
    fprintf(
        out,
        "<path d=\"M%d %dh30\" stroke=\"%s\" stroke-width=\"2\"%s/><text x=\"%d\" y=\"%d\">%s %.4f"
        "</text>\n",
        x, y, colour, dash, x + 38, y + 4, name, value);
}

static void put_escaped(FILE *out, const char *text)
{
    for (; *text; text++)
        switch (*text) {
        case '<': fputs("&lt;", out); break;
        case '>': fputs("&gt;", out); break;
        case '&': fputs("&amp;", out); break;
        default:  fputc((unsigned char)*text < 32 ? ' ' : *text, out);
        }
}

static void draw(FILE *out, const picture *p, const char *title)
{
    static const char dash[] = " stroke-dasharray=\"6 4\"";
    int row = 0;

    fprintf(out,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" "
            "height=\"%d\" "
            "font-family=\"sans-serif\" font-size=\"14\">\n<title>",
            WIDTH, HEIGHT, WIDTH, HEIGHT);
    put_escaped(out, title);
    fprintf(out, "</title>\n<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n"
            "<text x=\"%d\" y=\"24\" font-weight=\"bold\">", LEFT);
    put_escaped(out, title);
    fputs("</text>\n", out);
    draw_axes(out, p);
    if (p->ngram > 0)
        fprintf(out,
                "<path id=\"ngram\" d=\"M%d %.1fH%d\" stroke=\"#777\" stroke-width=\"2\"%s/>\n",
                LEFT, py(p, p->ngram), WIDTH - RIGHT, dash);
    draw_curve(out, p, &p->train, "train", "#7fa8d8", 1.2, false);
    draw_curve(out, p, &p->eval, "eval", "#c8501e", 2, true);
    if (p->train.n)
        draw_key(out, row++, "#7fa8d8", "", "training", p->train.at[p->train.n - 1].y);
    if (p->eval.n)
        draw_key(out, row++, "#c8501e", "", "held out", p->eval.at[p->eval.n - 1].y);
    if (p->ngram > 0)
        draw_key(out, row++, "#777", dash, "held out, n-gram", p->ngram);
    fputs("</svg>\n", out);
}

static fg_status read_metrics(picture *p, const char *path, char message[FG_MESSAGE])
{
    char *line = NULL;
    size_t room = 0;
    FILE *in = fopen(path, "re");

    if (!in)
        return fg__say(message, FG_ERR_IO, "%s: %s", path, strerror(errno));
    while (getline(&line, &room, in) > 0)
        read_line(p, line);
    free(line);
    fclose(in);
    if (p->failed)
        return fg__say(message, FG_ERR_MEMORY, "out of memory for %s", path);
    if (!p->train.n && !p->eval.n)
        return fg__say(message, FG_ERR_FORMAT, "%s: holds no losses", path);
    return FG_OK;
}

fg_status fg_loss_curve(const char *metrics_path, const char *svg_path, const char *title,
                        char message[FG_MESSAGE])
{
    picture p = { .y0 = INFINITY, .y1 = -INFINITY };
    char whole[1300];
    fg_status s = read_metrics(&p, metrics_path, message);

    if (s == FG_OK) {
        thin(&p.train);
        stretch(&p, &p.train);
        stretch(&p, &p.eval);
        if (p.ngram > 0) {
            p.y0 = fmin(p.y0, p.ngram);
            p.y1 = fmax(p.y1, p.ngram);
        }
        const double rim = fmax(0.05 * (p.y1 - p.y0), 1e-3 * fmax(1, fabs(p.y1)));
        p.y0 -= rim;
        p.y1 += rim;
        p.x1 = fmax(p.x1, 1);
        snprintf(whole, sizeof whole, "%.1280s.part", svg_path);
        FILE *out = fopen(whole, "we");
        if (out)
            draw(out, &p, title);
        const bool bad = !out || ferror(out);
        if ((out && fclose(out) != 0) || bad || rename(whole, svg_path) != 0)
            s = fg__say(message, FG_ERR_IO, "%s: %s", svg_path, strerror(errno));
    }
    free(p.train.at);
    free(p.eval.at);
    return s;
}
