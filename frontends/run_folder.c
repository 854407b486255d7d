/* run_folder.c - what a run leaves behind: config.json, env.json, params.tsv, metrics.jsonl,
 * run.log.
 *
 * metrics.jsonl holds one object a line, whole lines only, flushed one by one:
 *     {"v":1,"kind":"train","step":..,"tokens":..,"time":..,"loss":..,"lr":..,"grad_norm":..,
 *      "tokens_per_s":..}
 *     {"v":1,"kind":"eval","step":..,"tokens":..,"time":..,"loss":..,"ngram_loss":..}
 * time: seconds of training so far; losses in nats per token.  A number that is not finite is null,
 * and "finite":false says so.  On resume the lines behind the resume step are cut. */
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>
#include "text_file.h"
#include "training.h"

enum { PATH = 1200 };

struct fg__folder {
    char  dir[PATH - 64], checkpoints[PATH];
    FILE *metrics, *log;
};

static void path_in(const fg__folder *f, const char *name, char path[PATH])
{
    snprintf(path, PATH, "%s/%s", f->dir, name);
}

static bool exists(const fg__folder *f, const char *name)
{
    char path[PATH];
    struct stat st;
    path_in(f, name, path);
    return stat(path, &st) == 0;
}

static fg_status make_dir(const char *path, char message[FG_MESSAGE])
{
    char part[PATH];
    struct stat st;

    snprintf(part, sizeof part, "%s", path);
    for (char *slash = strchr(part + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(part, 0777);
        *slash = '/';
    }
    if (mkdir(path, 0777) != 0 && errno != EEXIST)
        return fg__say(message, FG_ERR_IO, "%s: %s", path, strerror(errno));
    if (stat(path, &st) != 0 || !S_ISDIR(st.st_mode))
        return fg__say(message, FG_ERR_IO, "%s: not a folder", path);
    return FG_OK;
}

/* Deletes the files of one checkpoint, then its folder. */
static void remove_checkpoint(const char *path)
{
    char file[3 * PATH];
    DIR *dir = opendir(path);
    if (!dir)
        return;
    for (struct dirent *e = readdir(dir); e; e = readdir(dir)) {
        snprintf(file, sizeof file, "%s/%s", path, e->d_name);
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, ".."))
            unlink(file);
    }
    closedir(dir);
    rmdir(path);
}

/* Deletes what an earlier run left, so that nothing of it is taken for the new one's. */
static void empty(const fg__folder *f)
{
    static const char *const files[] = { "metrics.jsonl", "run.log",  "loss.svg",
                                         "config.json",   "env.json", "params.tsv", "graph.json" };
    char path[2 * PATH];

    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        path_in(f, files[i], path);
        unlink(path);
    }
    DIR *dir = opendir(f->checkpoints);
    if (!dir)
        return;
    for (struct dirent *e = readdir(dir); e; e = readdir(dir))
        if (!strncmp(e->d_name, "step-", 5)) {
            snprintf(path, sizeof path, "%s/%s", f->checkpoints, e->d_name);
            remove_checkpoint(path);
        }
    closedir(dir);
}

static FILE *append_to(const fg__folder *f, const char *name)
{
    char path[PATH];
    path_in(f, name, path);
    return fopen(path, "ae");
}

fg_status fg__folder_open(fg__folder **out, const char *dir, bool resume, bool force,
                          char message[FG_MESSAGE])
{
    fg__folder *f = calloc(1, sizeof *f);
    fg_status s;

    *out = NULL;
    if (!f)
        return fg__say(message, FG_ERR_MEMORY, "%s", fg_status_text(FG_ERR_MEMORY));
    if (!dir[0] || strlen(dir) >= sizeof f->dir - 64) {
        free(f);
        return fg__say(message, FG_ERR_USAGE, "the run folder's name is %s",
                       dir[0] ? "too long" : "empty");
    }
    snprintf(f->dir, sizeof f->dir, "%s", dir);
    path_in(f, "ckpt", f->checkpoints);
    s = make_dir(f->checkpoints, message);
    if (s == FG_OK && (exists(f, "metrics.jsonl") || exists(f, "config.json"))) {
        if (!resume && !force)
            s = fg__say(message, FG_ERR_USAGE,
                        "%s holds a run already; resume it, force a new one over it, "
                        "or name another folder",
                        dir);
        else if (!resume)
            empty(f);
    }
    if (s == FG_OK) {
        f->metrics = append_to(f, "metrics.jsonl");
        f->log = append_to(f, "run.log");
        if (!f->metrics || !f->log)
            s = fg__say(message, FG_ERR_IO, "%s: %s", dir, strerror(errno));
    }
    if (s != FG_OK)
        fg__folder_close(f);
    else
        *out = f;
    return s;
}

void fg__folder_close(fg__folder *f)
{
    if (!f)
        return;
    if (f->metrics)
        fclose(f->metrics);
    if (f->log)
        fclose(f->log);
    free(f);
}

const char *fg__folder_checkpoints(const fg__folder *f)
{
    return f->checkpoints;
}

/* ---- what the run is ------------------------------------------------------------------------- */

static void utc(char text[32])
{
    const time_t now = time(NULL);
    struct tm t;
    strftime(text, 32, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &t));
}

static fg_status write_text(const fg__folder *f, const char *name, fg__text *t,
                            char message[FG_MESSAGE])
{
    char path[PATH], words[400] = "";
    fg_status s = t->failed ? FG_ERR_MEMORY : FG_OK;

    path_in(f, name, path);
    if (s == FG_OK)
        s = fg__text_replace(path, t->text, t->n, words);
    free(t->text);
    return s == FG_OK ? s : fg__say(message, s, "%s", words[0] ? words : fg_status_text(s));
}

/* text as a JSON string; bytes that are not UTF-8 become question marks. */
static void add_string(fg__text *t, const char *text)
{
    const bool utf8 = fg_text_is_utf8(text);
    fg__text_add(t, "\"");
    for (; *text; text++) {
        const unsigned char c = (unsigned char)*text;
        if (c < 32 || c == 127)
            fg__text_add(t, "\\u%04x", c);
        else if (c == '"' || c == '\\')
            fg__text_add(t, "\\%c", c);
        else
            fg__text_add(t, "%c", c < 128 || utf8 ? c : '?');
    }
    fg__text_add(t, "\"");
}

/* A line "key": of an object, after a comma where it is not the first. */
static void add_key(fg__text *t, int i, const char *indent, const char *key)
{
    fg__text_add(t, "%s\n%s", i ? "," : "", indent);
    add_string(t, key);
    fg__text_add(t, ": ");
}

static void add_recipe(fg__text *t, const fg_recipe *r)
{
    char text[1100];
    const char *key;

    fg__text_add(t, "{");
    for (int i = 0; (key = fg_recipe_key(i)); i++) {
        fg_recipe_get(r, key, text, sizeof text);
        add_key(t, i, "    ", key);
        if (!strcmp(key, "data") || !strcmp(key, "eval_data"))
            add_string(t, text);
        else
            fg__text_add(t, "%s", text);
    }
    fg__text_add(t, "\n  }");
}

static void add_settings(fg__text *t, const fg_setting *settings, int n)
{
    fg__text_add(t, "{");
    for (int i = 0; i < n; i++) {
        add_key(t, i, "    ", settings[i].key);
        add_string(t, settings[i].value);
    }
    fg__text_add(t, n ? "\n  }" : "}");
}

static void add_facts(fg__text *t, const fg_graph *g)
{
    const char *key, *json;
    int n = 0;

    fg__text_add(t, "{");
    for (; fg_graph_fact_at(g, n, &key, &json); n++) {
        add_key(t, n, "    ", key);
        if (strstr(json, "Infinity")) add_string(t, json);     /* no JSON but Python's: as text */
        else fg__text_add(t, "%s", json);
    }
    fg__text_add(t, n ? "\n  }" : "}");
}

static fg_status write_config(fg__folder *f, const struct fg_model *m, const fg_recipe *r,
                              const fg_graph *g, const fg_train_options *o,
                              char message[FG_MESSAGE])
{
    fg__text t = { 0 };
    fg__text_add(&t, "{\n  \"model\": ");
    add_string(&t, m->name ? m->name : "");
    fg__text_add(&t, ",\n  \"recipe\": ");
    add_recipe(&t, r);
    fg__text_add(&t, ",\n  \"settings\": ");
    add_settings(&t, m->settings, m->n_settings);
    fg__text_add(&t, ",\n  \"origin\": ");
    add_settings(&t, o->origins, o->n_origins);
    fg__text_add(&t, ",\n  \"facts\": ");
    add_facts(&t, g);
    fg__text_add(&t, "\n}\n");
    return write_text(f, "config.json", &t, message);
}

/* The processor's name as the kernel gives it; "" if it does not. */
static void processor(char name[128])
{
    char line[256];
    FILE *in = fopen("/proc/cpuinfo", "re");

    name[0] = 0;
    while (in && !name[0] && fgets(line, sizeof line, in))
        if (!strncmp(line, "model name", 10) && strchr(line, ':'))
            snprintf(name, 128, "%.*s", (int)strcspn(strchr(line, ':') + 2, "\n"),
                     strchr(line, ':') + 2);
    if (in)
        fclose(in);
}

static fg_status write_env(fg__folder *f, const fg_train_options *o, char message[FG_MESSAGE])
{
    fg__text t = { 0 };
    struct utsname u;
    char when[32], cpu[128];
    const bool known = uname(&u) == 0;
    const struct { const char *key, *value; } facts[] = {
        { "fox_graph", fg_version() },
        { "started", when },
        { "backend", o->backend ? fg_backend_name(o->backend) : "" },
        { "system", known ? u.sysname : "" },
        { "release", known ? u.release : "" },
        { "machine", known ? u.machine : "" },
        { "processor", cpu },
        { "compiler", __VERSION__ }
    };
    const int n = sizeof facts / sizeof facts[0];

    utc(when);
    processor(cpu);
    fg__text_add(&t, "{");
    for (int i = 0; i < n; i++) {
        add_key(&t, i, "  ", facts[i].key);
        add_string(&t, facts[i].value);
    }
    add_key(&t, n, "  ", "threads");
    fg__text_add(&t, "%d\n}\n", o->backend ? fg_backend_threads(o->backend) : 0);
    return write_text(f, "env.json", &t, message);
}

static void init_text(const fg_init *n, char text[96])
{
    switch (n->kind) {
    case FG_ZEROS:        snprintf(text, 96, "zeros"); break;
    case FG_ONES:         snprintf(text, 96, "ones"); break;
    case FG_CONSTANT:     snprintf(text, 96, "constant(%g)", n->a); break;
    case FG_NORMAL:       snprintf(text, 96, "normal(0,%g)", n->a); break;
    case FG_UNIFORM:      snprintf(text, 96, "uniform(%g,%g)", -n->a, n->a); break;
    case FG_LOG_RANGE:    snprintf(text, 96, "log_range"); break;
    case FG_INV_SOFTPLUS: snprintf(text, 96, "inv_softplus(%g,%g,%g)", n->a, n->b, n->c); break;
    case FG_LOG_DECAY:    snprintf(text, 96, "log_decay(%g,%g)", n->a, n->b); break;
    }
}

static fg_status write_params(fg__folder *f, const fg_graph *g, char message[FG_MESSAGE])
{
    char path[PATH], init[96];
    fg_param_info p;
    bool bad;

    path_in(f, "params.tsv", path);
    FILE *out = fopen(path, "we");
    if (!out)
        return fg__say(message, FG_ERR_IO, "%s: %s", path, strerror(errno));
    fputs("name\tshape\tdtype\tinit\tgroup\n", out);
    for (int i = 0; fg_param_at(g, i, &p); i++) {
        fprintf(out, "%s\t", p.name);
        for (int a = 0; a < p.shape.rank; a++)
            fprintf(out, "%s%" PRId64, a ? "," : "", p.shape.dim[a]);
        init_text(&p.init, init);
        fprintf(out, "\tf32\t%s\t%s\n", init,
                p.init.frozen ? "frozen" : p.init.no_decay ? "no_decay" : "decay");
    }
    bad = ferror(out);
    if (fclose(out) != 0 || bad)
        return fg__say(message, FG_ERR_IO, "%s: cannot be written", path);
    return FG_OK;
}

static void put_text(void *to, const char *text)
{
    fputs(text, to);
}

fg_status fg__folder_graph(fg__folder *f, int n, const fg_json_part *parts, const char *model,
                           char message[FG_MESSAGE])
{
    const char *slash = model ? strrchr(model, '/') : NULL;
    const fg_json_options o = { .model = slash ? slash + 1 : model };
    char path[PATH];
    path_in(f, "graph.json", path);
    FILE *out = fopen(path, "we");
    if (!out)
        return fg__say(message, FG_ERR_IO, "%s: %s", path, strerror(errno));
    fg_status s = fg_graph_json(n, parts, &o, put_text, out);
    const bool bad = ferror(out);
    if (fclose(out) != 0 || bad)
        return fg__say(message, FG_ERR_IO, "%s: cannot be written", path);
    return s == FG_OK ? s : fg__say(message, s, "%s: the graph cannot be written down", path);
}

fg_status fg__folder_describe(fg__folder *f, const struct fg_model *m, const fg_recipe *r,
                              const fg_graph *g, const fg_train_options *o,
                              char message[FG_MESSAGE])
{
    fg_status s = write_config(f, m, r, g, o, message);
    if (s == FG_OK)
        s = write_env(f, o, message);
    if (s == FG_OK)
        s = write_params(f, g, message);
    const fg_json_part part = { g, NULL, FG_STAGE_BUILT };
    return s == FG_OK ? fg__folder_graph(f, 1, &part, m->name, message) : s;
}

/* ---- what happens in it ---------------------------------------------------------------------- */

/* The step of a line of metrics.jsonl, -1 if it is not a whole one. */
static int64_t step_of(const char *line, bool *eval)
{
    fg_json *json = NULL;
    char ignored[200];
    int64_t n = -1;

    *eval = false;
    if (!strchr(line, '\n') || fg_json_parse(line, strlen(line), fg__metric_rules, &json, ignored))
        return -1;
    const fg_json_value *step = fg_json_get(fg_json_root(json), "step");
    const fg_json_value *kind = fg_json_get(fg_json_root(json), "kind");
    if (step && step->kind == FG_JSON_WHOLE)
        n = step->u.whole;
    *eval = kind && kind->kind == FG_JSON_TEXT && !strcmp(kind->u.text, "eval");
    fg_json_free(json);
    return n;
}

fg_status fg__folder_cut(fg__folder *f, int64_t step, int64_t *last_eval, char message[FG_MESSAGE])
{
    char path[PATH], whole[PATH + 8], *line = NULL;
    size_t room = 0;
    bool ok, eval;

    *last_eval = -1;
    path_in(f, "metrics.jsonl", path);
    snprintf(whole, sizeof whole, "%s.part", path);
    FILE *in = fopen(path, "re"), *out = fopen(whole, "we");
    while (in && out && getline(&line, &room, in) > 0) {
        const int64_t n = step_of(line, &eval);
        if (n < 0 || n > step)
            continue;
        fputs(line, out);
        if (eval)
            *last_eval = n;
    }
    free(line);
    ok = in && out && !ferror(in) && !ferror(out);
    if (in)
        fclose(in);
    ok = out && fclose(out) == 0 && ok && rename(whole, path) == 0;
    if (!ok)
        return fg__say(message, FG_ERR_IO, "%s: %s", path, strerror(errno));
    fclose(f->metrics);
    f->metrics = append_to(f, "metrics.jsonl");
    return f->metrics ? FG_OK : fg__say(message, FG_ERR_IO, "%s: %s", path, strerror(errno));
}

static void put_number(FILE *out, const char *key, double x)
{
    if (isfinite(x))
        fprintf(out, ",\"%s\":%.9g", key, x);
    else
        fprintf(out, ",\"%s\":null", key);
}

fg_status fg__folder_metric(fg__folder *f, const fg_event *e, char message[FG_MESSAGE])
{
    FILE *out = f->metrics;
    const bool train = e->kind == FG_EVENT_TRAIN;

    fprintf(out, "{\"v\":1,\"kind\":\"%s\",\"step\":%" PRId64 ",\"tokens\":%" PRId64,
            train ? "train" : "eval", e->step, e->tokens);
    put_number(out, "time", e->seconds);
    put_number(out, "loss", e->loss);
    if (train) {
        put_number(out, "lr", e->lr);
        put_number(out, "grad_norm", e->grad_norm);
        put_number(out, "tokens_per_s", e->tokens_per_s);
    } else if (e->ngram_loss > 0) {
        put_number(out, "ngram_loss", e->ngram_loss);
    }
    if (!isfinite(e->loss) || (train && !isfinite(e->grad_norm)))
        fputs(",\"finite\":false", out);
    fputs("}\n", out);
    if (fflush(out) != 0)
        return fg__say(message, FG_ERR_IO, "%s/metrics.jsonl: %s", f->dir, strerror(errno));
    return FG_OK;
}

void fg__folder_log(fg__folder *f, const char *fmt, ...)
{
    char when[32];
    va_list ap;

    utc(when);
    fprintf(f->log, "%s ", when);
    va_start(ap, fmt);
    vfprintf(f->log, fmt, ap);
    va_end(ap);
    fputc('\n', f->log);
    fflush(f->log);
}

fg_status fg__folder_curve(fg__folder *f, const char *title, char message[FG_MESSAGE])
{
    char from[PATH], to[PATH];
    path_in(f, "metrics.jsonl", from);
    path_in(f, "loss.svg", to);
    return fg_loss_curve(from, to, title, message);
}
