/* test_cli.c - the fox-graph command as a user meets it: answers, statuses, files.
 *
 * Every test runs the built command in a fresh copy of tests/golden/cli with a cache of its own.
 * With FG_UPDATE=1 in the environment the golden answers are written anew instead of compared. */
#include <criterion/criterion.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include "fox_core.h"

#define GOLDEN SOURCE_DIR "/tests/golden/cli"

static char folder[64];                  /* this test's copy */

typedef struct { int status; char *out, *err; } answer;

static char *read_all(const char *path)
{
    FILE *f = fopen(path, "rb");
    cr_assert_not_null(f, "%s cannot be read", path);
    size_t n = 0, capacity = 1 << 16;
    char *text = malloc(capacity);
    for (size_t got; (got = fread(text + n, 1, capacity - n - 1, f)) > 0;) {
        n += got;
        if (capacity - n < 2) text = realloc(text, capacity *= 2);
    }
    text[n] = 0;
    fclose(f);
    return text;
}

static char *read_here(const char *name)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return read_all(path);
}

/* Runs a shell command in the copy; what it printed is found in the files out and err beside it. */
static int shell(const char *command)
{
    char *line = malloc(strlen(command) + 1024);
    sprintf(line, "cd %s/here && { %s\n} >../out 2>../err </dev/null", folder, command);
    int status = system(line);
    free(line);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static answer ask(const char *command)
{
    answer a;
    a.status = shell(command);
    a.out = read_here("out");
    a.err = read_here("err");
    return a;
}

static void done(answer a)
{
    free(a.out);
    free(a.err);
}

static void copy_afresh(void)
{
    char line[512];
    snprintf(line, sizeof line, "rm -rf %s/here && cp -r %s %s/here", folder, GOLDEN, folder);
    cr_assert_eq(system(line), 0);
}

static void begin(void)
{
    char text[4096];
    strcpy(folder, "/tmp/test_cli.XXXXXX");
    cr_assert_not_null(mkdtemp(folder));
    snprintf(text, sizeof text, "%s:%s", BUILD_DIR, getenv("PATH"));
    setenv("PATH", text, 1);
    snprintf(text, sizeof text, "%s/cache", folder);
    setenv("FOX_CACHE_DIR", text, 1);
    setenv("NO_COLOR", "1", 1);
    setenv("LC_ALL", "C", 1);
    static const char *const others[] = { "FOX_CC", "FOX_CFLAGS", "FOX_INCLUDE", "FOX_DEVICE",
                                          "FG_CHECK", "FG_PROFILE", "OMP_NUM_THREADS" };
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) unsetenv(others[i]);
    copy_afresh();
}

static void end(void)
{
    char line[128];
    snprintf(line, sizeof line, "rm -rf %s", folder);
    if (system(line)) perror(folder);
}

TestSuite(cli, .init = begin, .fini = end, .timeout = 300);

static void expect(const char *command, int status)
{
    answer a = ask(command);
    cr_assert_eq(a.status, status, "%s: status %d, not %d\n%s", command, a.status, status, a.err);
    done(a);
}

/* The JSON that a command prints; it must end well. */
static json_t *ask_json(const char *command)
{
    answer a = ask(command);
    json_error_t e;
    cr_assert_eq(a.status, 0, "%s: status %d\n%s", command, a.status, a.err);
    json_t *value = json_loads(a.out, 0, &e);
    cr_assert_not_null(value, "%s: %s in line %d of\n%s", command, e.text, e.line, a.out);
    done(a);
    return value;
}

static double number(const json_t *object, const char *key)
{
    const json_t *v = json_object_get(object, key);
    cr_assert(json_is_number(v), "no number '%s'", key);
    return json_number_value(v);
}

/* ---- refusals -------------------------------------------------------------------------------- */

/* Whether text matches a pattern in which a line "..." stands for any lines. */
static bool matches(const char *pattern, const char *text)
{
    const size_t n = strcspn(pattern, "\n");
    if (!*pattern) return !*text;
    if (n == 3 && !strncmp(pattern, "...", 3)) {
        const char *rest = pattern + 3 + (pattern[3] == '\n');
        if (matches(rest, text)) return true;
        while (*text) {
            text += strcspn(text, "\n");
            text += *text == '\n';
            if (matches(rest, text)) return true;
        }
        return false;
    }
    if (strncmp(pattern, text, n) || (text[n] && text[n] != '\n')) return false;
    return matches(pattern + n + (pattern[n] == '\n'), text + n + (text[n] == '\n'));
}

/* Lines of our own sources move: "graph.c:320" becomes "graph.c:N", a test model's stay. */
static void blur_lines(char *text)
{
    for (char *p = text; (p = strstr(p, ".c:")); p++) {
        char *name = p, path[512];
        while (name > text && strchr(" \n", name[-1]) == NULL) name--;
        snprintf(path, sizeof path, "%s/%.*s.c", GOLDEN, (int)(p - name), name);
        const size_t digits = strspn(p + 3, "0123456789");
        if (!digits || !access(path, F_OK)) continue;
        p[3] = 'N';
        memmove(p + 4, p + 3 + digits, strlen(p + 3 + digits) + 1);
    }
}

/* An answer as the golden file has it: the words of compiler and loader before the last line as
 * "...". */
static void write_answer(FILE *to, const char *command, const answer *a)
{
    const size_t n = strlen(a->err);
    size_t last = n > 1 ? n - 1 : 0;
    while (last > 0 && a->err[last - 1] != '\n') last--;
    fprintf(to, "$ %s\n= %d\n", command, a->status);
    if (a->status == 3 && last > 0) fprintf(to, "...\n%s", a->err + last);
    else fputs(a->err, to);
    fputc('\n', to);
}

/* One entry: its lines from "%" or "$" up to a blank line.  Returns the text behind it. */
static char *run_entry(char *text, FILE *update, int *count)
{
    char *command = NULL, *expected = text + strlen(text);
    int status = 0;
    copy_afresh();
    while (*text && *text != '\n') {
        char *line = text, *next = strchr(text, '\n');
        cr_assert_not_null(next);
        text = next + 1;
        if (strchr("%$=#", *line)) *next = 0;
        if (*line == '#' && update) fprintf(update, "%s\n", line);
        if (*line == '%') {
            if (update) fprintf(update, "%s\n", line);
            shell(line + 2);
        }
        if (*line == '$') command = line + 2;
        if (*line == '$') expected = text;
        if (*line == '=') status = atoi(line + 2);
        if (*line == '=') expected = text;
    }
    char *behind = *text ? text + 1 : text;
    *text = 0;
    if (!command) {
        if (update) fputc('\n', update);
        return behind;
    }
    answer a = ask(command);
    blur_lines(a.err);
    ++*count;
    if (update) write_answer(update, command, &a);
    cr_expect_neq(a.status, 0, "%s: succeeds", command);
    cr_expect(!*a.out || a.status == 1, "%s: prints on stdout:\n%s", command, a.out);
    if (!update) {
        cr_expect_eq(a.status, status, "%s: status %d, not %d\n%s", command, a.status, status,
                     a.err);
        cr_expect(matches(expected, a.err), "%s: says\n%s--- not\n%s", command, a.err, expected);
    }
    done(a);
    return behind;
}

Test(cli, each_mistake_gets_its_golden_answer)
{
    char *text = read_all(GOLDEN "/refusals.txt"), *at = text;
    FILE *update = getenv("FG_UPDATE") ? fopen(GOLDEN "/refusals.txt", "w") : NULL;
    int count = 0;
    while (*at) at = run_entry(at, update, &count);
    if (update) fclose(update);
    cr_assert_geq(count, 40, "only %d entries", count);
    free(text);
}

/* ---- help ------------------------------------------------------------------------------------ */

static const char *const commands[] = {
    "run",       "train", "eval", "generate", "logits", "check",
    "gradcheck", "bench", "info", "ops",      "dump",   "diff", "help"
};

/* The part of the man page or completion that is about one command. */
static char *section(const char *text, const char *mark, const char *end_mark)
{
    const char *begin_at = strstr(text, mark);
    cr_assert_not_null(begin_at, "no '%s'", mark);
    const char *end_at = strstr(begin_at + strlen(mark), end_mark);
    return strndup(begin_at, end_at ? (size_t)(end_at - begin_at) : strlen(begin_at));
}

/* Every option that help names is in the other text, as that text writes it; and as many. */
static void compare_options(const char *command, const char *help, const char *other,
                            const char *dash)
{
    int in_help = 0, in_other = 0;
    const char *options = strstr(help, "\noptions:\n");
    cr_assert_not_null(options, "%s --help lists no options", command);
    for (const char *p = options; (p = strstr(p, "--")); p++) {
        const char *line = p;
        while (line[-1] != '\n') line--;
        if (p - line != 6) continue;     /* the option's own line, not a mention in a text */
        char name[64];
        snprintf(name, sizeof name, "%.*s", (int)strcspn(p + 2, " \n"), p + 2);
        char written[160] = "", *w = written;
        for (const char *d = dash; *d; d++) *w++ = *d;
        for (const char *n = name; *n; n++) {
            if (*n == '-' && dash[0] == '\\') *w++ = '\\';
            *w++ = *n;
        }
        *w = 0;
        const char *found = other;
        const size_t length = strlen(written);
        while ((found = strstr(found, written)) && !strchr(" \n\"", found[length])) found++;
        cr_expect_not_null(found, "%s: --%s is in --help, but not elsewhere", command, name);
        in_help++;
    }
    for (const char *p = other; (p = strstr(p, dash)); p += strlen(dash)) in_other += p[-1] != 'e';
    cr_expect_geq(in_other, in_help);
}

Test(cli, help_man_page_and_completion_agree)
{
    answer man = ask("fox-graph help --man"), bash = ask("fox-graph help --bash");
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
        char line[128], mark[64];
        snprintf(line, sizeof line, "fox-graph %s --help", commands[i]);
        answer help = ask(line);
        cr_assert_eq(help.status, 0);
        cr_assert_str_empty(help.err);
        snprintf(mark, sizeof mark, ".SS %s ", commands[i]);
        char *page = section(man.out, mark, "\n.S");
        compare_options(commands[i], help.out, page, "\\-\\-");
        free(page);
        snprintf(mark, sizeof mark, "    %s) options=", commands[i]);
        char *words = section(bash.out, mark, ";;");
        compare_options(commands[i], help.out, words, "--");
        free(words);
        snprintf(line, sizeof line, "fox-graph help %s", commands[i]);
        answer same = ask(line);
        cr_assert_str_eq(same.out, help.out);
        done(same);
        done(help);
    }
    done(man);
    done(bash);
}

Test(cli, completion_is_a_script_that_completes)
{
    expect("fox-graph help --bash > c.sh && bash -c '. ./c.sh; COMP_WORDS=(fox-graph gradcheck "
           "--sam); "
           "COMP_CWORD=2; _fox_graph; test \"${COMPREPLY[*]}\" = --samples'",
           0);
}

Test(cli, no_command_has_two_options_of_one_name)
{
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
        char line[200];
        snprintf(line, sizeof line,
                 "test -z \"$(fox-graph %s --help | sed -n 's/^ .\\{5\\}--\\([a-z-]*\\).*"
                 "/\\1/p' | sort | uniq -d)\"",
                 commands[i]);
        expect(line, 0);
    }
}

/* The table "| 0 | done |" of docs/errors.md has what --help says. */
Test(cli, docs_and_help_name_the_same_statuses)
{
    char *docs = read_all(SOURCE_DIR "/docs/errors.md");
    answer help = ask("fox-graph --help");
    const char *p = strstr(help.out, "\nexit status:\n");
    int n = 0;
    cr_assert_not_null(p);
    for (p += strlen("\nexit status:\n"); *p == ' '; p = strchr(p, '\n') + 1, n++) {
        char row[200];
        const int status = atoi(p);
        const char *words = p + 2;
        words += strspn(words, "0123456789 ");
        snprintf(row, sizeof row, "| %d | %.*s |", status, (int)strcspn(words, "\n"), words);
        cr_expect_not_null(strstr(docs, row), "docs/errors.md lacks '%s'", row);
    }
    cr_assert_eq(n, 9);
    done(help);
    free(docs);
}

Test(cli, docs_ops_is_what_ops_prints)
{
    expect("fox-graph ops --markdown > ops.md", 0);
    if (getenv("FG_UPDATE")) expect("cp ops.md " SOURCE_DIR "/docs/ops.md", 0);
    expect("cmp ops.md " SOURCE_DIR "/docs/ops.md", 0);
}

Test(cli, version_goes_to_stdout)
{
    answer a = ask("fox-graph --version");
    cr_assert_eq(a.status, 0);
    cr_assert_str_empty(a.err);
    cr_assert_not_null(strstr(a.out, fg_version()));
    done(a);
}

Test(cli, a_full_disk_is_reported)
{
    expect("fox-graph ops > /dev/full", 5);
}

/* ---- compiling ------------------------------------------------------------------------------- */

Test(cli, many_runs_compile_one_model_at_once)
{
    expect("for i in 1 2 3 4 5 6; do fox-graph check perceptron.c & echo $! >> pids; done\n"
           "for p in $(cat pids); do wait $p || exit 9; done", 0);
    expect("test $(ls ../cache | wc -l) = 1", 0);
}

Test(cli, a_changed_header_compiles_again_and_an_unchanged_one_does_not)
{
    json_t *before = ask_json("fox-graph check perceptron.c --json");
    expect("test \"$(fox-graph check perceptron.c -v 2>&1 | grep -c compiled)\" = 0", 0);
    expect("echo '#define WIDTH 12' > width.h", 0);
    json_t *after = ask_json("fox-graph check perceptron.c --json");
    cr_assert_float_eq(number(before, "parameters"), 8, 0);
    cr_assert_float_eq(number(after, "parameters"), 12, 0);
    json_decref(before);
    json_decref(after);
}

Test(cli, models_are_found_from_other_folders_and_as_libraries)
{
    expect("mkdir sub && cd sub && fox-graph check ../perceptron.c", 0);
    expect("fox-graph check --keep perceptron.c && fox-graph check perceptron.so", 0);
    expect("FOX_CFLAGS=-DWIDTH=5 fox-graph check perceptron.c", 0);
}

Test(cli, cc_is_printed_on_request)
{
    answer a = ask("fox-graph check lm.c --print-cc -q");
    cr_assert_eq(a.status, 0);
    cr_assert_not_null(strstr(a.err, "-shared"));
    done(a);
}

/* ---- settings -------------------------------------------------------------------------------- */

static const char *origin(const json_t *info, const char *key)
{
    return json_string_value(
        json_object_get(json_object_get(json_object_get(info, "config"), key), "origin"));
}

static const char *value(const json_t *info, const char *key)
{
    return json_string_value(
        json_object_get(json_object_get(json_object_get(info, "config"), key), "value"));
}

Test(cli, the_last_source_of_a_value_wins_and_is_named)
{
    expect("echo '{\"steps\": 5, \"lr\": 0.5, \"width\": 6}' > c.json", 0);
    json_t *info = ask_json(
        "fox-graph info perceptron.c --show-config --json --set lr=0.25 --config c.json --seed 9");
    cr_assert_str_eq(origin(info, "batch"), "model");
    cr_assert_str_eq(origin(info, "steps"), "--config");
    cr_assert_str_eq(origin(info, "lr"), "command line");
    cr_assert_str_eq(origin(info, "width"), "--config");
    cr_assert_str_eq(origin(info, "seed"), "command line");
    cr_assert_str_eq(origin(info, "beta1"), "default");
    cr_assert_str_eq(value(info, "batch"), "4");
    cr_assert_str_eq(value(info, "steps"), "5");
    cr_assert_str_eq(value(info, "lr"), "0.25");
    cr_assert_float_eq(number(info, "parameters"), 6, 0);
    json_decref(info);
}

/* ---- training, evaluating, generating -------------------------------------------------------- */

Test(cli, a_run_is_kept_and_can_be_evaluated)
{
    expect("seq 1 400 > text", 0);
    json_t *trained = ask_json("fox-graph train lm.c --data text --out r --json -q");
    json_t *scored = ask_json("fox-graph eval r --json -q");
    cr_assert_float_eq(number(trained, "eval_loss"), number(scored, "loss"), 1e-6);
    expect("cmp lm.c r/model.c && test -f r/metrics.jsonl -a -f r/config.json", 0);
    json_decref(trained);
    json_decref(scored);
}

Test(cli, what_is_kept_and_what_is_computed_again_is_told_by_scope)
{
    const char *small = "fox-pro-125m --set batch=1 --set context=64 --set recompute=";
    char line[400];
    for (int again = 0; again < 2; again++) {
        const char *count = again ? "5" : "0";           /* all, model, layers, each, attn or mlp */
        snprintf(line, sizeof line, "fox-graph dump %s%d --pass all --memory --depth 3 > tree; "
                 "test $(grep -c 'FLOP computed again$' tree) -ge %s && grep -q ' saved' tree",
                 small, again, count);
        expect(line, 0);
        expect("grep -q 'computed again' tree", again ? 0 : 1);
        snprintf(line, sizeof line, "fox-graph info %s%d > info; grep -q 'kept for backward' info",
                 small, again);
        expect(line, 0);
        expect("grep -q 'done again' info", again ? 0 : 1);
    }
}

Test(cli, a_resumed_run_ends_where_one_without_a_break_ends)
{
    expect("seq 1 400 > text", 0);
    json_t *whole = ask_json("fox-graph train lm.c --data text --out a --json -q");
    expect("fox-graph train lm.c --data text --out b -q --set save_every=1", 0);
    expect("ls -d b/ckpt/step-* | sed 1d | xargs rm -r", 0);
    json_t *rest = ask_json(
        "fox-graph train lm.c --data text --out b --resume --json -q --set save_every=1");
    cr_assert_float_eq(number(whole, "loss"), number(rest, "loss"), 0);
    cr_assert_gt(number(rest, "resumed_from"), 0);
    json_decref(whole);
    json_decref(rest);
}

/* Interrupts a run of lm.c that would go on for hours, once its newest checkpoint is not the one it
 * began with; gives the step where it began. */
static double interrupt(const char *options)
{
    char line[600];
    json_error_t e;
    snprintf(line, sizeof line,
             "newest() { ls r/ckpt 2>/dev/null | grep '^step' | tail -n 1; }; before=$(newest)\n"
             "fox-graph train lm.c --data text --out r --steps 10000000 --set save_every=20 -q -j "
             "%s & pid=$!\n"
             "while kill -0 $pid && test \"$(newest)\" = \"$before\"; do sleep 0.05; done\n"
             "kill -INT $pid; wait $pid",
             options);
    answer a = ask(line);
    cr_assert_eq(a.status, 75, "status %d\n%s", a.status, a.err);
    json_t *result = json_loads(a.out, 0, &e);
    cr_assert_not_null(result, "%s\n%s", e.text, a.out);
    cr_assert(json_is_true(json_object_get(result, "stopped")));
    const double from = number(result, "resumed_from");
    json_decref(result);
    done(a);
    return from;
}

Test(cli, an_interrupted_run_ends_with_75_and_goes_on)
{
    expect("seq 1 400 > text", 0);
    const double fresh = interrupt("");
    const double resumed = interrupt("--resume");
    cr_assert_float_eq(fresh, 0, 0);
    cr_assert_gt(resumed, 0);
}

Test(cli, a_dry_run_plans_and_writes_nothing)
{
    json_t *plan = ask_json("fox-graph train perceptron.c --dry-run --json --out r");
    cr_assert_gt(number(plan, "total"), 0);
    expect("test ! -e r", 0);
    json_decref(plan);
}

Test(cli, a_batch_of_prompts_gives_what_each_gives_alone)
{
    json_t *both = ask_json(
        "fox-graph generate lm.c -q --json --greedy -m 6 -p abc -p 'hello there'");
    json_t *one = ask_json("fox-graph generate lm.c -q --json --greedy -m 6 -p abc");
    json_t *other = ask_json("fox-graph generate lm.c -q --json --greedy -m 6 -p 'hello there'");
    cr_assert(json_equal(json_array_get(both, 0), json_array_get(one, 0)));
    cr_assert(json_equal(json_array_get(both, 1), json_array_get(other, 0)));
    json_decref(both);
    json_decref(one);
    json_decref(other);
}

/* ---- looking --------------------------------------------------------------------------------- */

Test(cli, gradients_of_models_and_ops_are_checked_in_double)
{
    expect("fox-graph gradcheck perceptron.c", 0);
    expect("fox-graph gradcheck lm.c", 0);
    expect("fox-graph gradcheck silu rms_norm", 0);
    expect("fox-graph gradcheck silu --limit 0", 1);
    json_t *r = ask_json("fox-graph gradcheck lm.c --json --samples 2");
    cr_assert_lt(number(r, "worst"), 1e-6);
    cr_assert_gt(json_array_size(json_object_get(r, "parameters")), 5);
    json_decref(r);
}

Test(cli, info_counts_parameters_and_plans_memory)
{
    json_t *info = ask_json("fox-graph info lm.c --params --json");
    const json_t *list = json_object_get(info, "params"), *item;
    double n = 0;
    size_t i;
    json_array_foreach(list, i, item) {
        double count = 1;
        const json_t *shape = json_object_get(item, "shape");
        for (size_t k = 0; k < json_array_size(shape); k++)
            count *= json_number_value(json_array_get(shape, k));
        n += count;
    }
    cr_assert_float_eq(number(info, "parameters"), n, 0);
    cr_assert_lt(number(info, "non_embedding"), n);
    cr_assert_float_eq(number(json_object_get(info, "training"), "params"), 4 * n, 64 * 64);
    cr_assert_gt(number(info, "training_flops_per_token"),
                 2 * number(info, "forward_flops_per_token"));
    json_decref(info);
}

Test(cli, graphs_are_dumped_in_each_form)
{
    json_decref(ask_json("fox-graph dump lm.c --format json --pass train"));
    json_decref(ask_json("fox-graph dump lm.c --json --stage planned"));
    expect("fox-graph dump lm.c --stage lowered | grep -q forget_attention", 0);
    expect("fox-graph dump lm.c --format dot -o g.dot && head -1 g.dot | grep -q digraph", 0);
    expect("fox-graph dump lm.c --format svg | head -1 | grep -q '^<svg'", 0);
    expect("fox-graph dump lm.c --format html -o g.html && head -1 g.html | grep -q doctype", 0);
    expect("fox-graph dump shapes.c | grep -q embedding", 0);
    expect("fox-graph dump shapes.c", 4);
    answer a = ask("fox-graph dump shapes.c --stage planned");
    cr_expect(a.status == 4 && !a.out[0]);
    done(a);
}

Test(cli, a_dumped_graph_is_dumped_again_without_its_model)
{
    expect("fox-graph dump lm.c --json --pass all --stage planned -o g.json", 0);
    expect("fox-graph dump g.json --json | cmp - g.json", 0);
    expect("fox-graph dump lm.c --pass all --stage planned >a && fox-graph dump g.json >b && "
           "cmp a b", 0);
    expect("fox-graph dump - <g.json | cmp - a", 0);
    expect("fox-graph dump lm.c --json --stable --pass all --threads 1 >a && "
           "fox-graph dump lm.c --json --stable --pass all --threads 2 | cmp - a", 0);
    expect("fox-graph dump lm.c --heat time --pass all --json -o timed.json && "
           "grep -q time_us timed.json", 0);
    expect("fox-graph dump g.json --profile timed.json | grep -q ' us'", 0);
    expect("fox-graph dump lm.c --values stats | grep -q rms", 0);
    expect("head -c 20000 /dev/urandom >text && FG_RECORD=1 fox-graph train lm.c --data text "
           "--steps 2 -q --out run && grep -q time_us run/graph.json", 0);
    expect("fox-graph dump run --pass all --profile run --heat time --format svg -o t.svg", 0);
    expect("fox-graph dump g.json --memory | grep -q arena", 0);
}

Test(cli, diff_tells_graphs_checkpoints_and_runs_apart)
{
    expect("fox-graph diff lm.c lm.c", 0);
    expect("fox-graph diff lm.c perceptron.c | grep -q added", 0);
    expect("fox-graph diff lm.c perceptron.c", 1);
    expect("fox-graph diff lm.c perceptron.c --format html -o d.html; grep -q doctype d.html", 0);
    expect("fox-graph diff lm.c perceptron.c --json | grep -q '\"differ\":true'", 0);
    expect("head -c 20000 /dev/urandom >text && fox-graph train lm.c --data text --steps 2 -q "
           "--out a && fox-graph train lm.c --data text --steps 2 -q --out b --seed 7", 0);
    expect("fox-graph diff a a", 0);
    expect("fox-graph diff a b | grep -q '^~ config.recipe.seed'", 0);
    expect("fox-graph diff a b | grep -q '^~ model.embeddings.weight.*values, at most'", 0);
    expect("fox-graph diff a/ckpt/step-* b/ckpt/step-* --json | grep -q rms_before", 0);
    expect("fox-graph diff a lm.c", 2);
}

Test(cli, bench_measures_training_and_decoding)
{
    json_t *b = ask_json("fox-graph bench lm.c --json -q --repeat 2");
    cr_assert_gt(number(b, "step_seconds"), 0);
    cr_assert_gt(number(b, "decode_seconds"), 0);
    cr_assert_gt(number(b, "sgemm_flops_per_s"), 1e8);
    cr_assert_gt(json_array_size(json_object_get(b, "kinds")), 5);
    json_decref(b);
}

/* Greatest difference between two tensors of two files, against the greatest value. */
static double difference(const char *a_path, const char *a_name, const char *b_path,
                         const char *b_name)
{
    fg_file *a = fg_file_open(a_path), *b = fg_file_open(b_path);
    fg_file_entry e;
    cr_assert_eq(fg_file_status(a), FG_OK, "%s", fg_file_message(a));
    cr_assert(fg_file_find(a, a_name, &e), "%s has no %s", a_path, a_name);
    const size_t n = (size_t)fg_shape_count(e.shape), bytes = n * sizeof(float);
    float *x = malloc(bytes), *y = malloc(bytes);
    cr_assert_eq(fg_file_read(a, a_name, FG_F32, x, bytes), FG_OK, "%s", fg_file_message(a));
    cr_assert_eq(fg_file_read(b, b_name, FG_F32, y, bytes), FG_OK, "%s", fg_file_message(b));
    double worst = 0, scale = 0;
    for (size_t i = 0; i < n; i++) {
        worst = fmax(worst, fabs((double)x[i] - (double)y[i]));
        scale = fmax(scale, fabs((double)y[i]));
    }
    free(x);
    free(y);
    fg_file_close(a);
    fg_file_close(b);
    return scale > 0 ? worst / scale : worst;
}

/* The references are float64 runs of the official models; f32 agrees with those to a few 1e-6. */
Test(cli, logits_losses_and_gradients_are_the_official_ones)
{
    char path[512];
    expect("fox-graph logits " FIXTURES "/fox_pro --tokens " FIXTURES
           "/fox_pro/reference.safetensors --grad --out o.safetensors", 0);
    snprintf(path, sizeof path, "%s/here/o.safetensors", folder);
    fg_file *reference = fg_file_open(FIXTURES "/fox_pro/reference.safetensors");
    fg_file_entry e;
    int n = 0;
    for (int i = 0; fg_file_at(reference, i, &e); i++) {
        if (strcmp(e.name, "logits") && strcmp(e.name, "loss") && strncmp(e.name, "grad.", 5))
            continue;
        const double d = difference(path, e.name, FIXTURES "/fox_pro/reference.safetensors",
                                    e.name);
        cr_expect_lt(d, 2e-5, "%s is off by %.1e of its greatest value", e.name, d);
        n++;
    }
    cr_assert_gt(n, 20);
    fg_file_close(reference);
}

/* ---- the models of the tree ------------------------------------------------------------------ */

Test(cli, every_model_file_of_the_tree_can_be_run_from_another_folder)
{
    static const char *const files[] = { "fox.c", "transformer.c", "mamba2.c", "hgrn2.c",
        "delta_net.c", "examples/perceptron.c", "examples/fox_llama_ops.c",
        "examples/fox_pro_tiny.c", "examples/transformer_tiny.c", "examples/mamba2_tiny.c",
        "examples/hybrid.c", "examples/hgrn2_tiny.c", "examples/delta_net_tiny.c" };
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        char line[1000];
        snprintf(line, sizeof line, "cp " SOURCE_DIR "/models/%s copy.c && fox-graph check copy.c",
                 files[i]);
        expect(line, 0);
    }
    expect("cp " SOURCE_DIR "/models/catalog.c copy.c && "
           "fox-graph check copy.c --set preset=fox-llama-125m", 0);
}

/* A state space model's facts hold Infinity, which is no JSON. */
Test(cli, a_run_of_mamba2_goes_on_and_can_be_evaluated_and_sampled)
{
    const char *small = "--set width=32 --set layers=2 --set state=4 --set batch=2 --set context=32"
                        " --set warmup_tokens=0 --set eval_batches=1 -q";
    char line[1000];
    expect("seq 1 2000 > text && cp " SOURCE_DIR "/models/examples/mamba2_tiny.c m.c", 0);
    snprintf(line, sizeof line, "fox-graph run m.c --data text --out r --steps 2 %s", small);
    expect(line, 0);
    snprintf(line, sizeof line, "fox-graph run m.c --data text --out r --steps 4 --resume %s",
             small);
    expect(line, 0);
    expect("fox-graph eval r --data text", 0);
    expect("fox-graph generate r --prompt 12 --max-tokens 3", 0);
}

Test(cli, an_edited_copy_of_a_library_model_is_what_runs)
{
    answer a = ask("sed 's/\"q_proj\"/\"query\"/' " SOURCE_DIR "/models/fox.c >copy.c && "
                   "fox-graph dump copy.c --set layers=1");
    cr_expect_eq(a.status, 0, "%s", a.err);
    cr_expect_not_null(strstr(a.out, "attn.query.weight"));
    cr_expect_null(strstr(a.out, "attn.q_proj.weight"));
    done(a);
}
