/* cmd_train.c - fox-graph run, train and eval: from options to a run, its progress and result. */
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>
#include "cli.h"

/* ---- signals ------------------------------------------------------------------------------------
 * The first SIGINT, SIGTERM or SIGUSR1 asks for an end after this update; the second ends at once.
 * SIGUSR2 asks for a line of progress.  A handler reaches nothing but variables of the program. */

static volatile sig_atomic_t stop_signal, line_wanted;

static void on_stop(int signal_number)
{
    if (stop_signal) {
        signal(signal_number, SIG_DFL);
        raise(signal_number);
    }
    stop_signal = signal_number;
}

static void on_line(int signal_number)
{
    line_wanted = signal_number;
}

const volatile sig_atomic_t *cli_catch_signals(void)
{
    struct sigaction stop = { .sa_handler = on_stop, .sa_flags = SA_RESTART };
    struct sigaction line = { .sa_handler = on_line, .sa_flags = SA_RESTART };
    sigemptyset(&stop.sa_mask);
    sigemptyset(&line.sa_mask);
    sigaction(SIGINT, &stop, NULL);
    sigaction(SIGTERM, &stop, NULL);
    sigaction(SIGUSR1, &stop, NULL);
    sigaction(SIGUSR2, &line, NULL);
    return &stop_signal;
}

/* ---- progress -------------------------------------------------------------------------------- */

typedef struct {
    const cli       *c;
    const cli_model *m;
    const char      *run_dir;
    bool             terminal;           /* one line drawn again and again */
    bool             open_line;          /* the terminal's line has no newline yet */
    double           drawn;              /* when it was drawn last */
    int              failed;             /* exit status of a failure in a callback */
} progress;

static const char *clock_text(char buffer[32], double seconds)
{
    const int64_t s = seconds > 0 && seconds < 1e9 ? (int64_t)seconds : 0;
    if (s >= 3600)
        snprintf(buffer, 32, "%lld:%02lld:%02lld", (long long)(s / 3600), (long long)(s / 60 % 60),
                 (long long)(s % 60));
    else snprintf(buffer, 32, "%lld:%02lld", (long long)(s / 60), (long long)(s % 60));
    return buffer;
}

static void close_line(progress *p)
{
    if (p->open_line) fputc('\n', stderr);
    p->open_line = false;
}

/* Columns of the terminal on stderr; 80 if it does not say. */
static int columns(void)
{
    struct winsize w;
    return ioctl(STDERR_FILENO, TIOCGWINSZ, &w) || w.ws_col < 20 ? 80 : w.ws_col;
}

static void print_update(progress *p, const fg_event *e)
{
    char rate[32], flops[32], spent[32], left[32], line[400];
    const double now = cli_now();
    if (p->terminal && !line_wanted && now - p->drawn < 0.1 && e->step < e->steps) return;
    if (!p->terminal && !line_wanted && !e->logged) return;
    snprintf(line, sizeof line,
             "step %lld/%lld  loss %.4f (%.4f)  grad %.3g  lr %.3g  "
             "%s tok/s  %sFLOP/s  %s, %s left",
             (long long)e->step, (long long)e->steps, e->loss, e->smooth_loss, e->grad_norm, e->lr,
             cli_amount(rate, e->tokens_per_s), cli_amount(flops, e->flops_per_s),
             clock_text(spent, e->seconds), clock_text(left, e->seconds_left));
    if (p->terminal) fprintf(stderr, "\r\033[K%.*s", columns() - 1, line);
    else fputs(line, stderr);
    if (!p->terminal || line_wanted) fputc('\n', stderr);
    p->open_line = p->terminal && !line_wanted;
    p->drawn = now;
    line_wanted = 0;
}

static int copy_file(const cli *c, const char *from, const char *folder, const char *name)
{
    char path[2200], buffer[65536];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *in = fopen(from, "rb"), *out = in ? fopen(path, "wb") : NULL;
    bool good = in && out;
    for (size_t n; good && (n = fread(buffer, 1, sizeof buffer, in)) > 0;)
        good = fwrite(buffer, 1, n, out) == n;
    const int reason = errno;
    if (in) fclose(in);
    if (out) good = !fclose(out) && good;
    return good ? CLI_OK
                : cli_fail(c, CLI_FILE, "%s cannot be copied to %s: %s", from, path,
                           strerror(reason));
}

/* The run folder keeps the source of its model. */
static void keep_source(progress *p)
{
    struct stat a, b;
    char path[2200];
    if (!p->run_dir || !p->m->source) return;
    snprintf(path, sizeof path, "%s/model.c", p->run_dir);
    if (!stat(p->m->source, &a) && !stat(path, &b) && a.st_dev == b.st_dev && a.st_ino == b.st_ino)
        return;
    p->failed = copy_file(p->c, p->m->source, p->run_dir, "model.c");
}

static void on_event(void *to, const fg_event *e)
{
    progress *p = to;
    char memory[32], flops[32];
    if (e->kind == FG_EVENT_START) keep_source(p);
    if (p->c->quiet) return;
    if (e->kind != FG_EVENT_TRAIN) close_line(p);
    switch (e->kind) {
    case FG_EVENT_START:
        cli_note(p->c, "%s: %lld updates, %s of memory, %s floating-point operations each%s",
                 p->m->path, (long long)e->steps, cli_bytes(memory, (double)e->info.total),
                 cli_amount(flops, e->info.flops), e->step ? ", resumed" : "");
        break;
    case FG_EVENT_TRAIN:
        print_update(p, e);
        break;
    case FG_EVENT_EVAL:
        if (e->ngram_loss > 0)
            cli_note(p->c, "step %lld: held-out loss %.4f, perplexity %.3f (order-3 n-gram: %.4f)",
                     (long long)e->step, e->loss, exp(e->loss), e->ngram_loss);
        else
            cli_note(p->c, "step %lld: held-out loss %.4f, perplexity %.3f", (long long)e->step,
                     e->loss, exp(e->loss));
        break;
    case FG_EVENT_SAVE:
        cli_more(p->c, "saved %s", e->text);
        break;
    case FG_EVENT_NOTE: case FG_EVENT_END:
        if (e->text) cli_note(p->c, "%s", e->text);
        break;
    }
}

/* ---- training -------------------------------------------------------------------------------- */

enum { MAX_ORIGINS = CLI_MAX_KEYS + CLI_MAX_SETTINGS };

static int list_origins(const cli_model *m, fg_setting origins[MAX_ORIGINS])
{
    const char *key;
    int n = 0;
    for (int i = 0; i < CLI_MAX_KEYS && (key = fg_recipe_key(i)); i++)
        origins[n++] = (fg_setting){ key, cli_origin_name(m->recipe_origin[i]) };
    for (int i = 0; i < m->model.n_settings; i++)
        origins[n++] = (fg_setting){ m->settings[i].key, cli_origin_name(m->setting_origin[i]) };
    return n;
}

static int print_result(const cli *c, const fg_train_result *r, const char *run_dir, bool stopped)
{
    char rate[32];
    if (c->json)
        return cli_print_json(
            c, json_pack("{s:I, s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:b, s:o, s:o}",
                         "step", (json_int_t)r->step,
                         "tokens", (json_int_t)r->tokens,
                         "resumed_from", (json_int_t)r->resumed_from,
                         "loss", cli_json_real(r->loss),
                         "eval_loss", cli_json_real(r->eval_loss),
                         "ngram_loss", cli_json_real(r->ngram_loss > 0 ? r->ngram_loss : NAN),
                         "seconds", cli_json_real(r->seconds),
                         "tokens_per_s", cli_json_real(r->tokens_per_s),
                         "stopped", (int)stopped,
                         "run", run_dir ? cli_json_text(run_dir) : json_null(),
                         "memory", cli_plan_json(&r->info)));
    printf("steps %lld, tokens %lld, loss %.4f", (long long)r->step, (long long)r->tokens, r->loss);
    if (isfinite(r->eval_loss)) printf(", held-out loss %.4f", r->eval_loss);
    if (r->ngram_loss > 0) printf(", order-3 n-gram %.4f", r->ngram_loss);
    printf(", %.1f s, %s tokens/s\n", r->seconds, cli_amount(rate, r->tokens_per_s));
    return CLI_OK;
}

/* Three places of the held-out text: a few bytes of it, and how the model goes on. */
static int print_samples(const cli *c, const cli_model *m, fg_store *s)
{
    enum { SAMPLES = 3, PROMPT = 24, NEW = 300 };
    char message[FG_MESSAGE] = "";
    fg_data *d = NULL;
    if (!m->model.build || c->quiet) return CLI_OK;
    fg_status e = fg_data_open(&d, &m->recipe, cli_vocab(m), message);
    const int64_t held = e ? 0 : fg_data_tokens(d, true);
    if (!e && (!fg_data_is_text(d) || held < SAMPLES * PROMPT)) { fg_data_close(d); return CLI_OK; }
    int32_t start[SAMPLES][PROMPT], out[SAMPLES * NEW];
    int64_t counts[SAMPLES] = { 0 };
    fg_prompt prompts[SAMPLES];
    for (int i = 0; !e && i < SAMPLES; i++) {
        const int64_t from = (held - PROMPT) / SAMPLES * i;
        for (int64_t k = 0; k < PROMPT; k++) start[i][k] = fg_data_token(d, true, from + k);
        prompts[i] = (fg_prompt){ start[i], PROMPT };
    }
    fg_generate_options o = fg_generate_default();
    o.max_tokens = NEW;
    o.seed = m->recipe.seed;
    o.bos = m->recipe.bos;
    o.stop = cli_catch_signals();
    if (!e) e = fg_generate(&m->model, s, SAMPLES, prompts, &o, out, counts, message);
    for (int i = 0; !e && i < SAMPLES; i++) {
        printf("\n-------- sample %d, after %d bytes of held-out text\n", i + 1, PROMPT);
        for (int64_t k = 0; k < PROMPT; k++) putchar((unsigned char)start[i][k]);
        for (int64_t k = 0; k < counts[i]; k++) putchar((unsigned char)out[i * NEW + k]);
        putchar('\n');
    }
    fg_data_close(d);
    return e && e != FG_ERR_STOPPED ? cli_fail(c, cli_exit_of(e), "%s", message) : CLI_OK;
}

static int print_dry_run(const cli *c, const fg_train_result *r)
{
    if (c->json) return cli_print_json(c, cli_plan_json(&r->info));
    cli_print_plan(stdout, &r->info);
    return CLI_OK;
}

/* What ended training early, as an exit status. */
static int end_status(const cli *c, fg_status s, const char *message, const char *run_dir)
{
    if (s == FG_ERR_STOPPED && !run_dir) {
        cli_fail(c, 0, "stopped; nothing was saved, because there is no --out");
        return stop_signal ? 128 + (int)stop_signal : CLI_RESUMABLE;
    }
    if (s == FG_ERR_STOPPED) return cli_fail(c, CLI_RESUMABLE, "stopped; go on with --resume");
    if (s) return cli_fail(c, s == FG_ERR_USAGE ? CLI_USAGE : cli_exit_of(s), "%s", message);
    return CLI_OK;
}

static int train(const cli *c, const cli_model *m, fg_store *s, bool samples)
{
    fg_setting origins[MAX_ORIGINS];
    char message[FG_MESSAGE] = "";
    const char *term = getenv("TERM");
    fg_train_result r = { 0 };
    progress p = { .c = c, .m = m, .run_dir = cli_text(c, OPT_out),
                   .terminal = isatty(STDERR_FILENO) && term && strcmp(term, "dumb") };
    if (!p.run_dir && cli_has(c, OPT_resume) && m->folder && strcmp(m->folder, m->path))
        p.run_dir = m->path;
    if (cli_has(c, OPT_resume) && !p.run_dir)
        return cli_fail(c, CLI_USAGE, "--resume needs --out RUNDIR, or a run folder as MODEL");
    if (cli_has(c, OPT_resume) && cli_has(c, OPT_force))
        return cli_fail(c, CLI_USAGE,
                        "--resume goes on with a run and --force replaces it; give one of them");
    fg_train_options o = { .run_dir = p.run_dir,
                           .resume = cli_has(c, OPT_resume),
                           .force = cli_has(c, OPT_force),
                           .dry_run = cli_has(c, OPT_dry_run),
                           .overfit = cli_has(c, OPT_overfit),
                           .stop = cli_catch_signals(),
                           .event = on_event,
                           .to = &p,
                           .source = m->source,
                           .origins = origins,
                           .n_origins = list_origins(m, origins) };
    fg_status e = fg_train(&m->model, &m->recipe, s, &o, &r, message);
    close_line(&p);
    int status = end_status(c, e, message, p.run_dir);
    if (!status) status = p.failed;
    if (o.dry_run && !status) return print_dry_run(c, &r);
    if (!e || e == FG_ERR_STOPPED) {
        int printed = print_result(c, &r, p.run_dir, e == FG_ERR_STOPPED);
        if (!status) status = printed;
    }
    if (!status && !e && !c->json && samples) status = print_samples(c, m, s);
    return status;
}

static int open_and_train(const cli *c, bool samples)
{
    cli_model m;
    fg_graph *update = NULL;
    if (cli_has(c, OPT_check_nan)) setenv("FG_CHECK", "1", 1);
    int status = cli_open(c, c->args[0], &m);
    fg_graph *g = status ? NULL : cli_training(c, &m, &update, &status);
    fg_backend *b = g ? cli_backend(c, &status) : NULL;
    fg_store *s = b ? cli_store(c, &m, b, g, &status) : NULL;
    fg_graph_free(update);
    fg_graph_free(g);
    if (s) status = train(c, &m, s, samples);
    fg_store_free(s);
    fg_backend_close(b);
    cli_close(&m);
    return status;
}

int cmd_train(const cli *c) { return open_and_train(c, false); }

/* ---- evaluating ------------------------------------------------------------------------------ */

static int print_eval(const cli *c, const fg_eval_result *r)
{
    if (c->json)
        return cli_print_json(
            c, json_pack("{s:o, s:o, s:o, s:I, s:o}",
                         "loss", cli_json_real(r->loss),
                         "perplexity", cli_json_real(exp(r->loss)),
                         "bits_per_token", cli_json_real(r->loss / log(2)),
                         "tokens", (json_int_t)r->tokens,
                         "seconds", cli_json_real(r->seconds)));
    printf("loss %.4f nats per token, perplexity %.3f, %.4f bits per token, ", r->loss,
           exp(r->loss), r->loss / log(2));
    printf("over %lld tokens, %.1f s\n", (long long)r->tokens, r->seconds);
    return CLI_OK;
}

static int evaluate(const cli *c, const cli_model *m, fg_store *s)
{
    char message[FG_MESSAGE] = "";
    fg_data *d = NULL;
    fg_eval_result r = { 0 };
    fg_status e = m->model.build ? fg_data_open(&d, &m->recipe, cli_vocab(m), message) : FG_OK;
    if (!e && !m->weights)
        cli_note(c, "%s has no weights: these are the initial parameters", m->path);
    if (!e) e = fg_evaluate(&m->model, &m->recipe, s, d, cli_catch_signals(), &r, NULL, message);
    int status = e ? cli_fail(c, e == FG_ERR_USAGE ? CLI_USAGE : cli_exit_of(e), "%s", message)
                   : print_eval(c, &r);
    fg_data_close(d);
    return status;
}

int cmd_eval(const cli *c)
{
    cli_model m;
    char message[FG_MESSAGE] = "";
    int status = cli_open(c, c->args[0], &m);
    const int64_t batch = m.recipe.micro_batch > 0 ? m.recipe.micro_batch : m.recipe.batch;
    if (!status && fg_recipe_check(&m.recipe, message))
        status = cli_fail(c, CLI_USAGE, "%s", message);
    fg_graph *g = status ? NULL : cli_forward(c, &m, batch, m.recipe.context, &status);
    fg_backend *b = g ? cli_backend(c, &status) : NULL;
    fg_store *s = b ? cli_store(c, &m, b, g, &status) : NULL;
    if (s) status = evaluate(c, &m, s);
    fg_store_free(s);
    fg_backend_close(b);
    fg_graph_free(g);
    cli_close(&m);
    return status;
}

int cmd_run(const cli *c)
{
    const char *task = cli_text(c, OPT_task);
    if (!task || !strcmp(task, "train")) return open_and_train(c, true);
    if (!strcmp(task, "eval")) return cmd_eval(c);
    if (!strcmp(task, "generate")) return cmd_generate(c);
    return cli_fail(c, CLI_USAGE, "--task is train, eval or generate, not '%s'", task);
}
