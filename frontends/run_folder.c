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
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>
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

static fg_status write_json(const fg__folder *f, const char *name, json_t *o,
                            char message[FG_MESSAGE])
{
    char path[PATH], whole[PATH + 8];
    fg_status s = FG_OK;

    path_in(f, name, path);
    snprintf(whole, sizeof whole, "%s.part", path);
    errno = 0;
    if (!o || json_dump_file(o, whole, JSON_INDENT(2)) != 0 || rename(whole, path) != 0)
        s = fg__say(message, FG_ERR_IO, "%s: %s", path,
                    errno ? strerror(errno) : "cannot be written");
    json_decref(o);
    return s;
}

static json_t *recipe_json(const fg_recipe *r)
{
    json_t *o = json_object();
    char text[1100];
    const char *key;

    for (int i = 0; (key = fg_recipe_key(i)); i++) {
        char *end;
        fg_recipe_get(r, key, text, sizeof text);
        const long long whole = strtoll(text, &end, 10);
        if (!strcmp(key, "data") || !strcmp(key, "eval_data"))
            json_object_set_new(o, key, json_string(text));
        else if (!*end)
            json_object_set_new(o, key, json_integer(whole));
        else
            json_object_set_new(o, key, json_real(strtod(text, NULL)));
    }
    return o;
}

static json_t *settings_json(const fg_setting *settings, int n)
{
    json_t *o = json_object();
    for (int i = 0; i < n; i++)
        json_object_set_new(o, settings[i].key, json_string(settings[i].value));
    return o;
}

static fg_status write_config(fg__folder *f, const struct fg_model *m, const fg_recipe *r,
                              const fg_graph *g, const fg_train_options *o,
                              char message[FG_MESSAGE])
{
    json_t *root = json_object(), *facts = json_object();
    const char *key, *value;

    for (int i = 0; fg_graph_fact_at(g, i, &key, &value); i++)
        json_object_set_new(facts, key, json_loads(value, JSON_DECODE_ANY, NULL));
    json_object_set_new(root, "model", m->name ? json_string(m->name) : json_null());
    json_object_set_new(root, "recipe", recipe_json(r));
    json_object_set_new(root, "settings", settings_json(m->settings, m->n_settings));
    json_object_set_new(root, "origin", settings_json(o->origins, o->n_origins));
    json_object_set_new(root, "facts", facts);
    return write_json(f, "config.json", root, message);
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
    json_t *root = json_object();
    struct utsname u;
    char when[32], cpu[128];

    utc(when);
    processor(cpu);
    json_object_set_new(root, "fox_graph", json_string(fg_version()));
    json_object_set_new(root, "started", json_string(when));
    if (o->backend) {
        json_object_set_new(root, "backend", json_string(fg_backend_name(o->backend)));
        json_object_set_new(root, "threads", json_integer(fg_backend_threads(o->backend)));
    }
    if (uname(&u) == 0) {
        json_object_set_new(root, "system", json_string(u.sysname));
        json_object_set_new(root, "release", json_string(u.release));
        json_object_set_new(root, "machine", json_string(u.machine));
    }
    json_object_set_new(root, "processor", json_string(cpu));
    json_object_set_new(root, "compiler", json_string(__VERSION__));
    return write_json(f, "env.json", root, message);
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

static fg_status write_graph(fg__folder *f, const fg_graph *g, char message[FG_MESSAGE])
{
    char path[PATH];
    path_in(f, "graph.json", path);
    FILE *out = fopen(path, "we");
    if (!out)
        return fg__say(message, FG_ERR_IO, "%s: %s", path, strerror(errno));
    fg_status s = fg_graph_dump(g, FG_DUMP_JSON, put_text, out);
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
    return s == FG_OK ? write_graph(f, g, message) : s;
}

/* ---- what happens in it ---------------------------------------------------------------------- */

/* The step of a line of metrics.jsonl, -1 if it is not a whole one. */
static int64_t step_of(const char *line, bool *eval)
{
    json_t *o = strchr(line, '\n') ? json_loads(line, 0, NULL) : NULL;
    const json_t *step = json_object_get(o, "step");
    const char *kind = json_string_value(json_object_get(o, "kind"));
    const int64_t n = json_is_integer(step) ? json_integer_value(step) : -1;
    *eval = kind && !strcmp(kind, "eval");
    json_decref(o);
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
