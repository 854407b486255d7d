/* cmd_diff.c - fox-graph diff: two graphs, two checkpoints or two runs. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "cli_view.h"

enum { AS_GRAPH, AS_WEIGHTS, AS_RUN };
static const char *const formats[] = { "text", "json", "html" };

/* ---- what is compared ------------------------------------------------------------------------ */

static bool there(const char *folder, const char *name)
{
    char path[1200];
    struct stat st;
    snprintf(path, sizeof path, "%.1000s/%.100s", folder, name);
    return !stat(path, &st);
}

static int kind_of(const char *path)
{
    struct stat st;
    const size_t n = strlen(path);
    if (stat(path, &st)) return AS_GRAPH;
    if (!S_ISDIR(st.st_mode))
        return n > 12 && !strcmp(path + n - 12, ".safetensors") ? AS_WEIGHTS : AS_GRAPH;
    return there(path, "model.safetensors") ? AS_WEIGHTS : AS_RUN;
}

/* ---- graphs ---------------------------------------------------------------------------------- */

static int diff_graphs(const cli *c, fg_diff_format format, FILE *to)
{
    fg_view *v[2] = { NULL, NULL };
    char message[400];
    bool differ = false;
    cli_graph_wish wish;
    int status = cli_read_graph_wish(c, format == FG_DIFF_HTML, &wish) ? CLI_OK : CLI_USAGE;
    for (int i = 0; i < 2 && !status; i++) {
        cli_buffer json = { 0 };
        status = cli_graph_json(c, c->args[i], &wish, &json);
        const fg_status s = status ? FG_OK : fg_view_read(json.text, json.n, &v[i], message);
        if (s) status = cli_fail(c, cli_exit_of(s), "%s: %s", c->args[i], message);
        free(json.text);
    }
    if (!status && fg_view_diff(v[0], v[1], format, cli_put, to, &differ))
        status = cli_fail(c, CLI_DEVICE, "out of memory");
    for (int i = 0; i < 2; i++) fg_view_free(v[i]);
    return status ? status : differ ? CLI_DIFFERENT : CLI_OK;
}

/* ---- checkpoints ----------------------------------------------------------------------------- */

static fg_file *open_weights(const cli *c, const char *path, int *status)
{
    char file[1200];
    struct stat st;
    const bool folder = !stat(path, &st) && S_ISDIR(st.st_mode);
    snprintf(file, sizeof file, folder ? "%.1000s/model.safetensors" : "%.1000s", path);
    fg_file *f = fg_file_open(file);
    const fg_status s = f ? fg_file_status(f) : FG_ERR_MEMORY;
    if (!s) return f;
    *status = cli_fail(c, cli_exit_of(s), "%s", f ? fg_file_message(f) : "out of memory");
    fg_file_close(f);
    return NULL;
}

static json_t *note(const char *kind, const char *name, const char *what)
{
    return json_pack("{s:s, s:o, s:o}", "kind", kind, "name", cli_json_text(name), "what",
                     cli_json_text(what));
}

/* How far b's values are from a's: greatest difference, root mean square of it, and of a. */
static int compare_values(const cli *c, fg_file *const f[2], const fg_file_entry *e, json_t *list)
{
    const int64_t n = fg_shape_count(e->shape);
    float *x[2] = { NULL, NULL };
    int status = CLI_OK;
    for (int i = 0; i < 2 && !status; i++) {
        x[i] = malloc((size_t)(n ? n : 1) * sizeof **x);
        const fg_status s = x[i] ? fg_file_read(f[i], e->name, FG_F32, x[i], (size_t)n * sizeof **x)
                                 : FG_ERR_MEMORY;
        if (s)
            status = cli_fail(c, cli_exit_of(s), "%s", x[i] ? fg_file_message(f[i])
                              : "out of memory");
    }
    double most = 0, squares = 0, of_a = 0;
    int64_t differ = 0, odd = 0;
    for (int64_t i = 0; !status && i < n; i++) {
        const double d = (double)x[1][i] - (double)x[0][i];
        if (isfinite(x[0][i])) of_a += (double)x[0][i] * x[0][i];
        if (!memcmp(&x[0][i], &x[1][i], sizeof **x)) continue;
        differ++;
        if (!isfinite(d)) { odd++; continue; }
        if (fabs(d) > most) most = fabs(d);
        squares += d * d;
    }
    free(x[0]);
    free(x[1]);
    if (status || !differ) return status;
    const double rms = sqrt(squares / (double)n), scale = sqrt(of_a / (double)n);
    char what[200];
    snprintf(what, sizeof what,
             "%lld of %lld values, at most %.4g, rms %.4g (%.3g %% of the old)%s",
             (long long)differ, (long long)n, most, rms, scale > 0 ? 100 * rms / scale : 0,
             odd ? ", some not finite" : "");
    json_t *o = note("changed", e->name, what);
    json_object_set_new(o, "values", json_integer(differ));
    json_object_set_new(o, "most", json_real(most));
    json_object_set_new(o, "rms", json_real(rms));
    json_object_set_new(o, "rms_before", json_real(scale));
    json_array_append_new(list, o);
    return CLI_OK;
}

static int compare_weights(const cli *c, const char *const path[2], json_t *list)
{
    int status = CLI_OK;
    fg_file *f[2] = { open_weights(c, path[0], &status), NULL };
    if (!status) f[1] = open_weights(c, path[1], &status);
    fg_file_entry a, b;
    char x[128], y[128], what[400];
    for (int i = 0; !status && fg_file_at(f[0], i, &a); i++) {
        if (!fg_file_find(f[1], a.name, &b)) {
            snprintf(what, sizeof what, "%s %s", a.type, cli_shape(x, a.shape));
            json_array_append_new(list, note("removed", a.name, what));
        } else if (!fg_shape_equal(a.shape, b.shape)) {
            snprintf(what, sizeof what, "shape %s -> %s", cli_shape(x, a.shape),
                     cli_shape(y, b.shape));
            json_array_append_new(list, note("changed", a.name, what));
        } else {
            if (strcmp(a.type, b.type)) {
                snprintf(what, sizeof what, "dtype %s -> %s", a.type, b.type);
                json_array_append_new(list, note("changed", a.name, what));
            }
            status = compare_values(c, f, &a, list);
        }
    }
    for (int i = 0; !status && fg_file_at(f[1], i, &b); i++)
        if (!fg_file_find(f[0], b.name, &a)) {
            snprintf(what, sizeof what, "%s %s", b.type, cli_shape(x, b.shape));
            json_array_append_new(list, note("added", b.name, what));
        }
    fg_file_close(f[0]);
    fg_file_close(f[1]);
    return status;
}

/* ---- runs: settings, last measurements, newest checkpoints ----------------------------------- */

static void compare_json(const char *name, const json_t *a, const json_t *b, json_t *list)
{
    const char *key;
    json_t *x;
    char path[300], what[400];
    if (json_is_object(a) && json_is_object(b)) {
        json_object_foreach((json_t *)(uintptr_t)a, key, x) {
            snprintf(path, sizeof path, "%s%s%.100s", name, name[0] ? "." : "", key);
            compare_json(path, x, json_object_get(b, key), list);
        }
        json_object_foreach((json_t *)(uintptr_t)b, key, x) {
            snprintf(path, sizeof path, "%s%s%.100s", name, name[0] ? "." : "", key);
            if (!json_object_get(a, key)) compare_json(path, NULL, x, list);
        }
        return;
    }
    if (a && b && json_equal(a, b)) return;
    const size_t how = JSON_ENCODE_ANY | JSON_COMPACT | JSON_REAL_PRECISION(9);
    char *from = a ? json_dumps(a, how) : NULL, *to = b ? json_dumps(b, how) : NULL;
    snprintf(what, sizeof what, "%.150s -> %.150s", from ? from : "nothing", to ? to : "nothing");
    json_array_append_new(list, note(!a ? "added" : !b ? "removed" : "changed", name, what));
    free(from);
    free(to);
}

static json_t *load(const char *folder, const char *name)
{
    char path[1200];
    snprintf(path, sizeof path, "%.1000s/%.100s", folder, name);
    return json_load_file(path, 0, NULL);
}

/* The last line of metrics.jsonl of some kind, without what depends on the clock; NULL if none. */
static json_t *last_metrics(const char *folder, const char *kind)
{
    char path[1200], line[4000];
    json_t *last = NULL;
    snprintf(path, sizeof path, "%.1000s/metrics.jsonl", folder);
    FILE *f = fopen(path, "r");
    while (f && fgets(line, sizeof line, f)) {
        json_t *o = json_loads(line, 0, NULL);
        const char *is = json_string_value(json_object_get(o, "kind"));
        if (is && !strcmp(is, kind)) {
            json_decref(last);
            last = json_incref(o);
        }
        json_decref(o);
    }
    if (f) fclose(f);
    static const char *const clock[] = { "time", "seconds", "tokens_per_s", "flops_per_s", "mfu" };
    for (int i = 0; i < 5; i++) json_object_del(last, clock[i]);
    return last;
}

static int compare_runs(const cli *c, const char *const path[2], json_t *list)
{
    char newest[2][1024], folder[1200], message[400];
    static const char *const kinds[] = { "train", "eval" };
    json_t *a = load(path[0], "config.json"), *b = load(path[1], "config.json");
    if (a || b) compare_json("config", a, b, list);
    json_decref(a);
    json_decref(b);
    for (int i = 0; i < 2; i++) {
        a = last_metrics(path[0], kinds[i]);
        b = last_metrics(path[1], kinds[i]);
        if (a || b) compare_json(kinds[i], a, b, list);
        json_decref(a);
        json_decref(b);
    }
    for (int i = 0; i < 2; i++) {
        snprintf(folder, sizeof folder, "%.1000s/ckpt", path[i]);
        if (!there(path[i], "ckpt"))
            return cli_fail(c, CLI_FILE, "%s is neither a checkpoint nor a run", path[i]);
        const fg_status s = fg_checkpoint_find_newest(folder, newest[i], message);
        if (s) return cli_fail(c, cli_exit_of(s), "%s", message);
        if (!newest[i][0])
            return cli_fail(c, CLI_FILE, "%s is a run without a finished checkpoint", path[i]);
    }
    const char *const both[2] = { newest[0], newest[1] };
    return compare_weights(c, both, list);
}

/* ---- reports --------------------------------------------------------------------------------- */

static void escaped(FILE *to, const char *s)
{
    for (; *s; s++) {
        if (strchr("<>&\"'", *s)) fprintf(to, "&#%d;", *s);
        else fputc((unsigned char)*s < 32 ? '?' : *s, to);
    }
}

static const char *text_in(const json_t *o, const char *key)
{
    const char *s = json_string_value(json_object_get(o, key));
    return s ? s : "";
}

static void as_text(const json_t *list, FILE *to)
{
    if (!json_array_size(list)) { fputs("no difference\n", to); return; }
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *o = json_array_get(list, i);
        const char *kind = text_in(o, "kind");
        fprintf(to, "%c %-48s %s\n", kind[0] == 'a' ? '+' : kind[0] == 'r' ? '-' : '~',
                text_in(o, "name"), text_in(o, "what"));
    }
}

static void as_html(const cli *c, const json_t *list, FILE *to)
{
    fputs("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n<meta http-equiv="
          "\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
          "<title>fox-graph diff</title>\n<style>:root{color-scheme:light dark}body{font:14px "
          "system-ui,sans-serif;margin:2em;max-width:100ch}td,th{padding:3px 14px 3px 0;text-align:"
          "left;vertical-align:top;overflow-wrap:anywhere}.added{color:#00845f}.removed{color:"
          "#c9182b}.changed{color:#2f6fdd}</style></head><body>\n<h1>", to);
    escaped(to, c->args[0]);
    fputs(" &#8594; ", to);
    escaped(to, c->args[1]);
    fprintf(to, "</h1>\n<p>%d differences</p>\n<table>\n", (int)json_array_size(list));
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *o = json_array_get(list, i);
        fprintf(to, "<tr><td class=\"%s\">%s</td><td>", text_in(o, "kind"), text_in(o, "kind"));
        escaped(to, text_in(o, "name"));
        fputs("</td><td>", to);
        escaped(to, text_in(o, "what"));
        fputs("</td></tr>\n", to);
    }
    fputs("</table></body></html>\n", to);
}

static int diff_lists(const cli *c, int kind, fg_diff_format format, FILE *to)
{
    json_t *list = json_array();
    const char *const path[2] = { c->args[0], c->args[1] };
    int status = kind == AS_RUN ? compare_runs(c, path, list) : compare_weights(c, path, list);
    const bool differ = json_array_size(list) > 0;
    if (!status && format == FG_DIFF_TEXT) as_text(list, to);
    else if (!status && format == FG_DIFF_HTML) as_html(c, list, to);
    else if (!status) {
        json_t *all = json_pack("{s:b, s:O}", "differ", differ, "changes", list);
        if (all) json_dumpf(all, to, JSON_INDENT(1) | JSON_REAL_PRECISION(9));
        fputc('\n', to);
        json_decref(all);
    }
    json_decref(list);
    return status ? status : differ ? CLI_DIFFERENT : CLI_OK;
}

static int diff(const cli *c, fg_diff_format format, FILE *to)
{
    const int a = kind_of(c->args[0]), b = kind_of(c->args[1]);
    if (a != b)
        return cli_fail(c, CLI_USAGE, "%s and %s are of different kinds", c->args[0], c->args[1]);
    return a == AS_GRAPH ? diff_graphs(c, format, to) : diff_lists(c, a, format, to);
}

int cmd_diff(const cli *c)
{
    const char *format = cli_text(c, OPT_diff_format), *path = cli_text(c, OPT_dump_out);
    int f = c->json ? FG_DIFF_JSON : FG_DIFF_TEXT;
    if (format) for (f = 0; f < 3 && strcmp(format, formats[f]); f++) continue;
    if (f == 3) return cli_fail(c, CLI_USAGE, "--format is text, json or html, not '%s'", format);
    if (!path || !strcmp(path, "-")) {
        const int status = diff(c, (fg_diff_format)f, stdout), flushed = cli_flush(c);
        return flushed ? flushed : status;
    }
    FILE *to = fopen(path, "w");
    if (!to) return cli_fail(c, CLI_FILE, "%s cannot be written: %s", path, strerror(errno));
    int status = diff(c, (fg_diff_format)f, to);
    const bool bad = ferror(to);
    if (fclose(to) || bad)
        status = cli_fail(c, CLI_FILE, "%s cannot be written: %s", path, strerror(errno));
    return status;
}
