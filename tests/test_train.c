/* test_train.c - the training loop: it learns, goes on exactly where it stopped, and knows when
 * to stop. */
#include <criterion/criterion.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "backend.h"
#include "fox_train.h"

enum { VOCAB = 128, WIDTH = 16 };

/* ---- a small language model on a small text -------------------------------------------------- */

static fg_tensor build(void *self, fg_tensor tokens)
{
    fox_config c = fox_pro_config(VOCAB, WIDTH, 1, 2);
    (void)self;
    c.intermediate_size = 32;
    return fox_lm(tokens, &c);
}

static const struct fg_model model = { .name = "small", .build = build };

static const char *text_file(void)
{
    static char path[64];
    static const char *const words[] = { "the fox ", "runs ", "over ", "a hill ", "and ",
                                         "sleeps.\n" };
    uint32_t state = 7;
    snprintf(path, sizeof path, "/tmp/fg-train-%d.txt", (int)getpid());
    FILE *out = fopen(path, "w");
    for (int i = 0; i < 2000; i++) {
        state = state * 1664525u + 1013904223u;
        fputs(words[(state >> 24) % 6], out);
    }
    fclose(out);
    return path;
}

static fg_recipe recipe(int64_t steps)
{
    fg_recipe r = fg_recipe_default();
    snprintf(r.data, sizeof r.data, "%s", text_file());
    r.batch = 4;
    r.context = 16;
    r.steps = steps;
    r.lr = 1e-2;
    r.warmup_tokens = 64;
    r.eval_every = 0;
    r.eval_batches = 4;
    r.log_every = 1;
    r.save_every = 0;
    return r;
}

/* A folder for one test, empty. */
static const char *run_dir(const char *name)
{
    static char path[8][64];
    static int count;
    char command[128], *dir = path[count++ % 8];
    snprintf(dir, 64, "/tmp/fg-run-%d-%s", (int)getpid(), name);
    snprintf(command, sizeof command, "rm -rf %s", dir);
    cr_assert_eq(system(command), 0);
    return dir;
}

static void remove_all(void)
{
    char command[160];
    snprintf(command, sizeof command, "rm -rf /tmp/fg-run-%d-* /tmp/fg-train-%d.txt", (int)getpid(),
             (int)getpid());
    cr_assert_eq(system(command), 0);
}

typedef struct { fg_backend *backend; fg_store *store; } place;

static place open_place(int threads)
{
    place p = { fg_backend_open("cpu", threads), NULL };
    p.store = fg_store_new(p.backend);
    return p;
}

static void close_place(place p)
{
    fg_store_free(p.store);
    fg_backend_close(p.backend);
}

static fg_train_result train(const struct fg_model *m, const fg_recipe *r, place p,
                             const fg_train_options *o, fg_status expected)
{
    char message[FG_MESSAGE];
    fg_train_result result;
    const fg_status s = fg_train(m, r, p.store, o, &result, message);
    cr_assert_eq(s, expected, "%s: %s", fg_status_text(s), message);
    return result;
}

/* Largest difference between the parameters (and moments) of two stores; 0: the same bits. */
static double difference(fg_store *a, fg_store *b, bool moments)
{
    double worst = 0;
    fg_store_entry e;
    for (int i = 0; fg_store_at(a, i, &e); i++) {
        if (e.state && (!moments || strncmp(e.name, "@adam.", 6)))
            continue;
        const size_t n = (size_t)fg_shape_count(e.shape);
        float *x = malloc(n * sizeof *x), *y = malloc(n * sizeof *y);
        cr_assert_eq(fg_store_get(a, e.name, x, n * sizeof *x), FG_OK);
        cr_assert_eq(fg_store_get(b, e.name, y, n * sizeof *y), FG_OK);
        for (size_t k = 0; k < n; k++)
            worst = fmax(worst, fabs((double)x[k] - y[k]));
        free(x);
        free(y);
    }
    return worst;
}

/* ---- lines of metrics.jsonl ------------------------------------------------------------------ */

/* The losses of one kind by step; the number of lines.  Every line must be whole. */
static int losses(const char *dir, const char *kind, double *loss, int64_t *step, int most)
{
    char path[128], line[1000];
    int n = 0;
    snprintf(path, sizeof path, "%s/metrics.jsonl", dir);
    FILE *in = fopen(path, "r");
    cr_assert(in);
    while (fgets(line, sizeof line, in)) {
        json_t *o = json_loads(line, 0, NULL);
        cr_assert(o, "not an object: %s", line);
        const char *k = json_string_value(json_object_get(o, "kind"));
        cr_assert(k && json_is_integer(json_object_get(o, "step")) &&
                  json_is_integer(json_object_get(o, "tokens")) &&
                  json_is_number(json_object_get(o, "time")) && json_object_get(o, "loss"));
        if (!strcmp(k, "train"))
            cr_assert(json_object_get(o, "lr") && json_object_get(o, "grad_norm") &&
                      json_object_get(o, "tokens_per_s"));
        if (!strcmp(k, kind) && n < most) {
            loss[n] = json_is_number(json_object_get(o, "loss"))
                          ? json_number_value(json_object_get(o, "loss")) : NAN;
            step[n++] = json_integer_value(json_object_get(o, "step"));
        }
        json_decref(o);
    }
    fclose(in);
    return n;
}

static bool has(const char *dir, const char *name)
{
    char path[128];
    struct stat st;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return stat(path, &st) == 0 && st.st_size > 0;
}

static char *contents(const char *dir, const char *name)
{
    char path[128], *text = calloc(1, 1 << 20);
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *in = fopen(path, "r");
    cr_assert(in && fread(text, 1, (1 << 20) - 1, in) > 0);
    fclose(in);
    return text;
}

static json_t *json_of(const char *dir, const char *name)
{
    char *text = contents(dir, name);
    json_t *o = json_loads(text, 0, NULL);
    cr_assert(o, "%s is not JSON: %s", name, text);
    free(text);
    return o;
}

/* ---- claims ---------------------------------------------------------------------------------- */

Test(train, loss_falls_below_the_text_s_own_letters)
{
    const fg_recipe r = recipe(150);
    place p = open_place(2);
    const char *dir = run_dir("falls");
    const fg_train_options o = { .run_dir = dir, .backend = p.backend };
    double loss[200];
    int64_t step[200];
    const fg_train_result result = train(&model, &r, p, &o, FG_OK);
    cr_expect_eq(result.step, 150);
    cr_expect_eq(result.tokens, 150 * 64);
    cr_expect_eq(losses(dir, "train", loss, step, 200), 150);
    cr_expect_float_eq(loss[0], log(VOCAB), 0.3, "before the first update: %g", loss[0]);
    cr_expect_lt(result.eval_loss, 1.6);
    cr_expect_gt(result.eval_loss, log(6) / 8, "below the text's entropy");
    cr_expect_gt(result.ngram_loss, 0.2);
    static const char *const files[] = { "config.json", "env.json", "params.tsv", "run.log",
                                         "loss.svg", "ckpt/step-000000150/model.safetensors" };
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++)
        cr_expect(has(dir, files[i]), "%s is missing", files[i]);
    static const char *const marks[] = { "id=\"train\"", "id=\"eval\"", "id=\"ngram\"",
                                         ">tokens<" };
    char *picture = contents(dir, "loss.svg");
    for (size_t i = 0; i < sizeof marks / sizeof marks[0]; i++)
        cr_expect(strstr(picture, marks[i]), "the loss curve lacks %s", marks[i]);
    free(picture);
    json_t *config = json_of(dir, "config.json"), *env = json_of(dir, "env.json");
    cr_expect_eq(json_real_value(json_object_get(json_object_get(config, "recipe"), "lr")), 0.01);
    cr_expect_eq(json_integer_value(json_object_get(env, "threads")), 2);
    json_decref(config);
    json_decref(env);
    close_place(p);
    remove_all();
}

Test(train, resume_gives_the_bits_of_a_run_never_interrupted)
{
    fg_recipe r = recipe(12);
    r.eval_every = 4;
    place whole = open_place(2), parts = open_place(2), again = open_place(2);
    const char *one = run_dir("whole"), *two = run_dir("parts");
    const fg_train_options o = { .run_dir = one };
    train(&model, &r, whole, &o, FG_OK);

    fg_train_options p = { .run_dir = two };
    char command[256];
    r.save_every = 5;
    r.keep = 0;
    train(&model, &r, parts, &p, FG_OK);              /* 12 updates, checkpoints at 5, 10 and 12 */
    snprintf(command, sizeof command, "cd %s/ckpt && rm -r step-000000010 step-000000012", two);
    cr_assert_eq(system(command), 0);                 /* as if killed after 12, saved at 5 */
    snprintf(command, sizeof command, "printf '{\"v\":1,\"kind\":\"tr' >> %s/metrics.jsonl", two);
    cr_assert_eq(system(command), 0);
    p.resume = true;
    const fg_train_result result = train(&model, &r, again, &p, FG_OK);
    cr_expect_eq(result.resumed_from, 5);
    cr_expect_eq(result.step, 12);
    cr_expect_eq(difference(whole.store, again.store, true), 0);

    double a[50], b[50];
    int64_t sa[50], sb[50];
    for (int k = 0; k < 2; k++) {
        const int n = losses(one, k ? "eval" : "train", a, sa, 50);
        cr_expect_eq(n, k ? 3 : 12);
        cr_expect_eq(losses(two, k ? "eval" : "train", b, sb, 50), n);
        cr_expect_eq(memcmp(a, b, (size_t)n * sizeof *a), 0);
        cr_expect_eq(memcmp(sa, sb, (size_t)n * sizeof *sa), 0);
    }
    close_place(whole);
    close_place(parts);
    close_place(again);
    remove_all();
}

typedef struct { volatile sig_atomic_t flag; int64_t at; fg_event_kind when; } stopper;

static void stop_at(void *to, const fg_event *e)
{
    stopper *s = to;
    if (e->kind == s->when && e->step == s->at)
        s->flag = 1;
}

Test(train, a_stop_saves_and_can_be_resumed_even_within_an_update_s_evaluation)
{
    fg_recipe r = recipe(9);
    r.eval_every = 3;
    place whole = open_place(2);
    train(&model, &r, whole, NULL, FG_OK);
    for (int64_t at = 1; at <= 9; at += 2) {
        place before = open_place(2), after = open_place(2);
        const char *dir = run_dir("stop");
        stopper s = { 0, at, FG_EVENT_TRAIN };
        fg_train_options o = { .run_dir = dir, .stop = &s.flag, .event = stop_at, .to = &s };
        double loss[9];
        int64_t step[9];
        const fg_train_result first = train(&model, &r, before, &o, FG_ERR_STOPPED);
        cr_expect_eq(first.step, at);
        o = (fg_train_options){ .run_dir = dir, .resume = true };
        const fg_train_result second = train(&model, &r, after, &o, FG_OK);
        cr_expect_eq(second.resumed_from, at);
        cr_expect_eq(difference(whole.store, after.store, true), 0);
        cr_expect_eq(losses(dir, "eval", loss, step, 9), 3, "stopped at %d", (int)at);
        cr_expect_eq(losses(dir, "train", loss, step, 9), 9);
        close_place(before);
        close_place(after);
    }
    close_place(whole);
    remove_all();
}

/* Gradients differ by the rounding of their sums alone, some 1e-8.  AdamW divides by sqrt(v) + eps,
 * so that eps = 1e-3 and lr = 1e-2 leave 1e-7 an update of that; the usual eps would let the sign
 * of a gradient that is all rounding decide. */
Test(train, four_micro_batches_are_one_batch)
{
    fg_recipe r = recipe(3);
    place one = open_place(2), four = open_place(2);
    r.eps = 1e-3;
    const fg_train_result a = train(&model, &r, one, NULL, FG_OK);
    r.micro_batch = 1;
    const fg_train_result b = train(&model, &r, four, NULL, FG_OK);
    const double off = difference(one.store, four.store, true);
    cr_expect_lt(off, 1e-6, "parameters or moments differ by %g", off);
    cr_expect_float_eq(a.loss, b.loss, 1e-6);
    close_place(one);
    close_place(four);
    remove_all();
}

Test(train, threads_do_not_change_a_bit)
{
    const fg_recipe r = recipe(5);
    place one = open_place(1), two = open_place(2);
    const fg_train_result a = train(&model, &r, one, NULL, FG_OK);
    const fg_train_result b = train(&model, &r, two, NULL, FG_OK);
    cr_expect_eq(a.loss, b.loss);
    cr_expect_eq(a.eval_loss, b.eval_loss);
    cr_expect_eq(difference(one.store, two.store, true), 0);
    close_place(one);
    close_place(two);
    remove_all();
}

Test(train, overfitting_one_batch_drives_its_loss_down)
{
    fg_recipe r = recipe(120);
    place p = open_place(2);
    const fg_train_options o = { .overfit = true, .no_eval = true };
    const fg_train_result result = train(&model, &r, p, &o, FG_OK);
    cr_expect_lt(result.loss, 0.3, "loss is %g", result.loss);
    cr_expect(isnan(result.eval_loss));
    close_place(p);
    remove_all();
}

Test(train, a_dry_run_writes_nothing)
{
    fg_recipe r = recipe(120);
    place p = open_place(2);
    const char *dir = run_dir("dry");
    const fg_train_options o = { .dry_run = true, .run_dir = dir };
    const fg_train_result result = train(&model, &r, p, &o, FG_OK);
    cr_expect_eq(result.step, 0);
    cr_expect_gt(result.info.total, 0);
    cr_expect_neq(access(dir, F_OK), 0);
    close_place(p);
    remove_all();
}

Test(train, a_folder_with_a_run_is_not_overwritten_unasked)
{
    const fg_recipe r = recipe(2);
    place p = open_place(1);
    fg_train_options o = { .run_dir = run_dir("twice") };
    char message[FG_MESSAGE];
    train(&model, &r, p, &o, FG_OK);
    cr_expect_eq(fg_train(&model, &r, p.store, &o, NULL, message), FG_ERR_USAGE);
    cr_expect(strstr(message, "holds a run already"), "%s", message);
    o.force = true;
    cr_expect_eq(train(&model, &r, p, &o, FG_OK).resumed_from, 0);
    o.force = false;
    o.resume = true;
    fg_recipe other = r;
    other.context = 8;
    other.warmup_tokens = 0;
    cr_expect_eq(fg_train(&model, &other, p.store, &o, NULL, message), FG_ERR_USAGE);
    cr_expect_str_eq(message, "context is 8, the run to resume has 16");
    other = r;
    other.bos = 1;
    cr_expect_eq(fg_train(&model, &other, p.store, &o, NULL, message), FG_ERR_USAGE);
    cr_expect(strstr(message, "not those of the run to resume"), "%s", message);
    close_place(p);
    remove_all();
}

static void *(*plain_alloc)(fg_backend *b, size_t bytes);
static size_t most;                      /* bytes that an allocation may have */
static void *bounded_alloc(fg_backend *b, size_t bytes)
{
    return bytes > most ? NULL : plain_alloc(b, bytes);
}

Test(train, a_run_that_does_not_fit_leaves_the_one_it_would_replace)
{
    fg_recipe r = recipe(2);
    place p = open_place(1);
    const char *dir = run_dir("fit");
    fg_train_options o = { .run_dir = dir, .force = true };
    fg_backend_ops ops = *p.backend->ops;
    char message[FG_MESSAGE];
    train(&model, &r, p, &o, FG_OK);
    plain_alloc = ops.alloc;
    most = 1 << 20;
    ops.alloc = bounded_alloc;
    p.backend->ops = &ops;
    r.batch = 256;
    cr_expect_eq(fg_train(&model, &r, p.store, &o, NULL, message), FG_ERR_MEMORY);
    cr_expect(strstr(message, "bytes of activations"), "%s", message);
    most = SIZE_MAX;
    r.batch = 4;
    o = (fg_train_options){ .run_dir = dir, .resume = true };
    cr_expect_eq(train(&model, &r, p, &o, FG_OK).resumed_from, 2);
    close_place(p);
    remove_all();
}

Test(train, a_time_limit_stops_as_a_signal_does)
{
    fg_recipe r = recipe(1000000);
    place p = open_place(2);
    const char *dir = run_dir("time");
    const fg_train_options o = { .run_dir = dir, .seconds = 0.3, .no_eval = true };
    const fg_train_result result = train(&model, &r, p, &o, FG_ERR_STOPPED);
    cr_expect_gt(result.step, 0);
    cr_expect_lt(result.seconds, 30);
    close_place(p);
    remove_all();
}

Test(train, an_unread_setting_is_refused)
{
    const fg_setting settings[] = { { "layres", "2" } };
    struct fg_model m = model;
    const fg_recipe r = recipe(2);
    place p = open_place(1);
    char message[FG_MESSAGE];
    m.settings = settings;
    m.n_settings = 1;
    cr_expect_eq(fg_train(&m, &r, p.store, NULL, NULL, message), FG_ERR_USAGE);
    cr_expect(strstr(message, "'layres'"), "%s", message);
    close_place(p);
    remove_all();
}

/* ---- not a language model: y = w x, its loss (w x - 3 x)^2 ----------------------------------- */

typedef struct { int64_t bad_batch, fed; } line;

static fg_tensor line_loss(void *self, fg_graph *g, const fg_recipe *r)
{
    (void)self;
    const fg_tensor x = fg_input(g, "x", FG_F32, FG_DIMS(r->batch));
    const fg_init zero = { .kind = FG_ZEROS, .no_decay = true };
    const fg_tensor w = fg_param(g, "w", FG_DIMS(1), zero);
    const fg_tensor wx = fg_mul(x, w);
    const fg_tensor target = fg_scale(x, 3, 0);
    const fg_tensor off = fg_sub(wx, target);
    const fg_tensor square = fg_mul(off, off);
    return fg_mean(square);
}

static fg_status line_feed(void *self, fg_plan *p, const fg_graph *g, const fg_recipe *r,
                           int64_t batch, bool eval)
{
    line *l = self;
    float x[16];
    for (int64_t i = 0; i < r->batch; i++)
        x[i] = (float)((batch + i) % 5 - 2);
    if (!eval && batch == l->bad_batch)
        x[1] = NAN;
    l->fed++;
    return fg_write(p, fg_find(g, "x"), x, (size_t)r->batch * sizeof *x);
}

static fg_recipe line_recipe(int64_t steps)
{
    fg_recipe r = fg_recipe_default();
    r.batch = 8;
    r.context = 1;
    r.steps = steps;
    r.lr = 0.1;
    r.lr_end = 0.01;
    r.log_every = 1;
    return r;
}

Test(train, models_with_inputs_of_their_own_are_trained_alike)
{
    line l = { .bad_batch = -1 };
    const struct fg_model m = { .name = "line", .loss = line_loss, .feed = line_feed, .self = &l };
    const fg_recipe r = line_recipe(200);
    place p = open_place(1);
    float w;
    const fg_train_result result = train(&m, &r, p, NULL, FG_OK);
    cr_assert_eq(fg_store_get(p.store, "w", &w, sizeof w), FG_OK);
    cr_expect_float_eq(w, 3, 0.02, "w is %g", w);
    cr_expect_lt(result.eval_loss, 1e-3);
    cr_expect_geq(l.fed, 200);
    close_place(p);
}

Test(train, a_loss_that_is_not_finite_stops_with_the_last_good_parameters)
{
    line l = { .bad_batch = 7 };
    const struct fg_model m = { .name = "line", .loss = line_loss, .feed = line_feed, .self = &l };
    fg_recipe r = line_recipe(200);
    place p = open_place(1), good = open_place(1);
    const char *dir = run_dir("nan");
    const fg_train_options o = { .run_dir = dir };
    char message[FG_MESSAGE];
    fg_train_result result;
    cr_expect_eq(fg_train(&m, &r, p.store, &o, &result, message), FG_ERR_NUMERIC);
    cr_expect(strstr(message, "update 8: the loss is not finite"), "%s", message);
    cr_expect_eq(result.step, 7);
    cr_expect(has(dir, "ckpt/step-000000007/model.safetensors"));
    double loss[20];
    int64_t step[20];
    cr_expect_eq(losses(dir, "train", loss, step, 20), 8);
    cr_expect(isnan(loss[7]) && isfinite(loss[6]));
    float w, same;
    cr_assert_eq(fg_store_get(p.store, "w", &w, sizeof w), FG_OK);
    r.steps = 200;
    l.bad_batch = -1;
    stopper s = { 0, 7, FG_EVENT_TRAIN };
    const fg_train_options until = { .stop = &s.flag, .event = stop_at, .to = &s };
    train(&m, &r, good, &until, FG_ERR_STOPPED);
    cr_assert_eq(fg_store_get(good.store, "w", &same, sizeof same), FG_OK);
    cr_expect_eq(w, same);
    close_place(p);
    close_place(good);
    remove_all();
}

Test(train, the_first_rate_of_a_warm_up_is_zero)
{
    line l = { .bad_batch = -1 };
    const struct fg_model m = { .name = "line", .loss = line_loss, .feed = line_feed, .self = &l };
    fg_recipe r = line_recipe(100);
    place p = open_place(1);
    stopper s = { 0, 1, FG_EVENT_TRAIN };
    const fg_train_options o = { .stop = &s.flag, .event = stop_at, .to = &s };
    float w;
    r.warmup_tokens = 80;
    train(&m, &r, p, &o, FG_ERR_STOPPED);
    cr_assert_eq(fg_store_get(p.store, "w", &w, sizeof w), FG_OK);
    cr_expect_eq(w, 0);
    close_place(p);
}
