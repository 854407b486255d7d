/* test_checkpoint.c - stores and training states in files: a run goes on exactly where it was
 * saved, and no kill, full disk or damaged file costs the last whole checkpoint. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <math.h>
#include <string.h>
#include <sys/wait.h>

#include "faults.h"
#include "fox_train.h"

static char folder[64], run[128], message[400];
static fg_backend *cpu;

static void setup(void)
{
    temporary_folder(folder);
    snprintf(run, sizeof run, "%s/ckpt", folder);
    cpu = fg_backend_open("cpu", 1);
    cr_assert_eq(fg_backend_status(cpu), FG_OK);
}

static void teardown(void)
{
    fg_backend_close(cpu);
    remove_temporary(folder);
}

TestSuite(checkpoint, .init = setup, .fini = teardown);

/* ---- a small run ----------------------------------------------------------------------------- */

static double window[3];

/* Everything in it says which step it is. */
static fg_store *store_at(int64_t step)
{
    fg_store *s = fg_store_new(cpu);
    float x[6];
    int32_t n = (int32_t)step;
    for (int i = 0; i < 6; i++)
        x[i] = (float)step + (float)i / 8;
    fg_store_put(s, "model.a.weight", FG_F32, FG_DIMS(2, 3), x);
    fg_store_put(s, "model.b.weight", FG_F32, FG_DIMS(5), x);
    fg_store_put(s, "@adam.m.model.a.weight", FG_F32, FG_DIMS(2, 3), x);
    fg_store_put(s, "@adam.count", FG_I32, FG_DIMS(1), &n);
    fg_store_put(s, "@grad.model.a.weight", FG_F32, FG_DIMS(2, 3), x);
    return s;
}

static fg_train_state state_at(int64_t step)
{
    for (int i = 0; i < 3; i++)
        window[i] = (double)step + 1.0 / 3;
    return (fg_train_state){ .step = step, .batch = 4, .context = 16, .tokens = step * 64, .seed =
                            -7,
                             .rng = UINT64_MAX - (uint64_t)step, .epoch = 1, .position = 99,
                             .recipe = 0x123456789abcdef0u, .seconds = 0.1, .window = 2,
                             .positions = 3, .window_loss = window };
}

static fg_status save(int64_t step)
{
    fg_store *s = store_at(step);
    fg_train_state t = state_at(step);
    fg_status status = fg_checkpoint_save(run, s, NULL, &t, NULL, message);
    fg_store_free(s);
    return status;
}

static void must_save(int64_t step)
{
    cr_assert_eq(save(step), FG_OK, "%s", message);
}

/* Loads a checkpoint into a store that has other values and says which step it is; -1 if it cannot
 * be loaded or its parts are not of one step. */
static int64_t load_from(const char *path)
{
    float x[6], m[6];
    int32_t count;
    fg_train_state t;
    fg_store *s = store_at(1000);
    fg_status status = fg_checkpoint_load(path, s, &t, message);
    fg_store_get(s, "model.a.weight", x, sizeof x);
    fg_store_get(s, "@adam.m.model.a.weight", m, sizeof m);
    fg_store_get(s, "@adam.count", &count, sizeof count);
    bool same = !status && x[5] == (float)t.step + 0.625f && m[5] == x[5] && count == t.step &&
                t.positions == 3 && t.window_loss[2] == (double)t.step + 1.0 / 3;
    int64_t step = same ? t.step : -1;
    fg_train_state_free(&t);
    fg_store_free(s);
    return step;
}

static int64_t load_newest(void)
{
    char path[1024];
    if (fg_checkpoint_find_newest(run, path, message) || !path[0])
        return -1;
    return load_from(path);
}

/* How many folders have DONE; all of them must load. */
static int whole_folders(void)
{
    int n = 0;
    struct dirent *item;
    DIR *d = opendir(run);
    while ((item = readdir(d))) {
        char path[400], done[410];
        snprintf(path, sizeof path, "%s/%s", run, item->d_name);
        snprintf(done, sizeof done, "%s/DONE", path);
        if (access(done, F_OK) == 0) {
            cr_expect(load_from(path) > 0, "%s: %s", path, message);
            n++;
        }
    }
    closedir(d);
    return n;
}

static int entries_of(const char *path)
{
    int n = 0;
    struct dirent *item;
    DIR *d = opendir(path);
    while (d && (item = readdir(d)))
        n += strcmp(item->d_name, ".") && strcmp(item->d_name, "..");
    if (d)
        closedir(d);
    return n;
}

static void put_file(const char *path, const char *text)
{
    FILE *f = fopen(path, "wb");
    cr_assert(f && fputs(text, f) >= 0);
    fclose(f);
}

static char *get_file(const char *path)
{
    static char text[20000];
    FILE *f = fopen(path, "rb");
    cr_assert(f, "%s", path);
    text[fread(text, 1, sizeof text - 1, f)] = '\0';
    fclose(f);
    return text;
}

/* ---- stores ---------------------------------------------------------------------------------- */

Test(checkpoint, parameters_and_states_go_to_files_of_their_own_and_come_back)
{
    char path[200];
    float x[6], zero[6] = { 0 };
    fg_store *s = store_at(3);
    snprintf(path, sizeof path, "%s/model", folder);
    cr_assert_eq(fg_store_save(s, path, ""), FG_OK, "%s", fg_store_message(s));
    fg_file *f = fg_file_open(path);
    cr_assert_eq(fg_file_count(f), 2);
    fg_file_close(f);
    fg_store_put(s, "model.a.weight", FG_F32, FG_DIMS(2, 3), zero);
    cr_assert_eq(fg_store_load(s, path, ""), FG_OK, "%s", fg_store_message(s));
    fg_store_get(s, "model.a.weight", x, sizeof x);
    cr_assert_eq(x[5], 3.625f);
    cr_assert_eq(fg_store_save(s, path, "@adam."), FG_OK, "%s", fg_store_message(s));
    f = fg_file_open(path);
    cr_assert(fg_file_count(f) == 2 && fg_file_find(f, "m.model.a.weight", &(fg_file_entry){ 0 }));
    fg_file_close(f);
    fg_store_free(s);
}

Test(checkpoint, an_empty_store_takes_every_tensor_of_a_file)
{
    char path[200];
    fg_store_entry e;
    int32_t count;
    fg_store *s = store_at(3), *fresh = fg_store_new(cpu);
    snprintf(path, sizeof path, "%s/model", folder);
    cr_assert_eq(fg_store_save(s, path, "@adam."), FG_OK, "%s", fg_store_message(s));
    cr_assert_eq(fg_store_load(fresh, path, "@adam."), FG_OK, "%s", fg_store_message(fresh));
    cr_assert_eq(fg_store_count(fresh), 2);
    cr_assert(fg_store_find(fresh, "@adam.count", &e) && e.type == FG_I32 && e.state);
    fg_store_get(fresh, "@adam.count", &count, sizeof count);
    cr_assert_eq(count, 3);
    fg_store_free(s);
    fg_store_free(fresh);
}

Test(checkpoint, a_file_that_does_not_fit_the_store_changes_nothing)
{
    static const float x[8];
    static const int32_t n[6];
    const fg_array b = { "model.b.weight", FG_F32, FG_DIMS(5), x };
    const struct { fg_array a[8]; int n; const char *says; } rows[] = {
        { { b }, 1, "does not hold what the store has: 1 missing: model.a.weight" },
        { { b, { "model.a.weight", FG_F32, FG_DIMS(3, 2), x } }, 2,
          "tensor model.a.weight: shape is [3,2], must be [2,3]" },
        { { b, { "model.a.weight", FG_I32, FG_DIMS(2, 3), n } }, 2,
          "tensor model.a.weight: dtype I32 cannot become f32" },
        { { b, { "u1", FG_F32, FG_DIMS(1), x }, { "u2", FG_F32, FG_DIMS(1), x },
            { "u3", FG_F32, FG_DIMS(1), x }, { "u4", FG_F32, FG_DIMS(1), x },
            { "u5", FG_F32, FG_DIMS(1), x }, { "u6", FG_F32, FG_DIMS(1), x } }, 7,
          "1 missing: model.a.weight; 6 unexpected: u1, u2, u3, u4, u5, ..." },
        { { b, { "@adam.m", FG_F32, FG_DIMS(1), x } }, 2,
         "names of parameters do not begin with @" },
    };
    char path[200];
    fg_store *s = store_at(3);
    snprintf(path, sizeof path, "%s/model", folder);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        float back[5];
        cr_assert_eq(fg_file_write(path, rows[i].n, rows[i].a, message), FG_OK, "%s", message);
        cr_expect_eq(fg_store_load(s, path, ""), FG_ERR_FORMAT);
        cr_expect(strstr(fg_store_message(s), rows[i].says), "%s", fg_store_message(s));
        fg_store_clear_error(s);
        fg_store_get(s, "model.b.weight", back, sizeof back);
        cr_expect_eq(back[4], 3.5f, "row %zu touched the store", i);
    }
    fg_store_free(s);
}

Test(checkpoint, half_precision_weights_load_into_a_store)
{
    static const char header[] =
        "{\"w\":{\"dtype\":\"BF16\",\"shape\":[2],\"data_offsets\":[0,4]}}";
    static const uint16_t values[] = { 0x3f80, 0xc040 };
    char path[200];
    float x[2] = { 0 };
    uint64_t n = sizeof header - 1;
    fg_store *s = fg_store_new(cpu);
    snprintf(path, sizeof path, "%s/model", folder);
    FILE *f = fopen(path, "wb");
    fwrite(&n, 8, 1, f);
    fwrite(header, 1, sizeof header - 1, f);
    fwrite(values, 1, sizeof values, f);
    fclose(f);
    fg_store_put(s, "w", FG_F32, FG_DIMS(2), x);
    cr_assert_eq(fg_store_load(s, path, ""), FG_OK, "%s", fg_store_message(s));
    fg_store_get(s, "w", x, sizeof x);
    cr_assert(x[0] == 1 && x[1] == -3);
    fg_store_free(s);
}

Test(checkpoint, each_failing_allocation_of_saving_and_loading_a_store_is_an_error_without_leak)
{
    char path[200];
    snprintf(path, sizeof path, "%s/model", folder);
    for (int load = 0; load < 2; load++) {
        bool came = true;
        for (long k = 1; came; k++) {
            fg_store *s = store_at(3);
            long live = faults.live;
            faults_arm(FAULT_MEMORY, k);
            fg_status status = load ? fg_store_load(s, path, "") : fg_store_save(s, path, "");
            came = faults_disarm();
            cr_assert(k < 1000);
            cr_expect_eq(status, came ? FG_ERR_MEMORY : FG_OK, "%d, allocation %ld: %s", load, k,
                         fg_store_message(s));
            cr_expect_eq(faults.live, live, "%d, allocation %ld leaks", load, k);
            fg_store_free(s);
        }
    }
}

/* ---- saving and loading ---------------------------------------------------------------------- */

Test(checkpoint, a_saved_state_comes_back_bit_for_bit)
{
    char path[1024];
    fg_train_state t, want = state_at(123);
    float grad[6];
    want.seconds = 0x1.fffffffffffffp-3;
    window[0] = 0x1.0000000000001p-1000;
    window[1] = NAN;
    fg_store *s = store_at(123);
    cr_assert_eq(fg_checkpoint_save(run, s, NULL, &want, NULL, message), FG_OK, "%s", message);
    cr_assert_eq(fg_checkpoint_find_newest(run, path, message), FG_OK, "%s", message);
    cr_assert(strstr(path, "/ckpt/step-000000123"));
    cr_assert_eq(fg_checkpoint_load(path, s, &t, message), FG_OK, "%s", message);
    cr_assert(t.step == 123 && t.batch == 4 && t.context == 16 && t.tokens == 123 * 64);
    cr_assert(t.seed == -7 && t.rng == want.rng && t.recipe == want.recipe && t.epoch == 1);
    cr_assert(t.position == 99 && t.seconds == want.seconds && t.window == 2 && t.positions == 3);
    cr_assert(t.window_loss[0] == window[0] && isnan(t.window_loss[1]));
    cr_assert_eq(t.window_loss[2], window[2]);
    fg_store_get(s, "@grad.model.a.weight", grad, sizeof grad);
    cr_assert(grad[5] == 0, "sums of gradients are not part of a checkpoint and start at zero");
    fg_train_state_free(&t);
    fg_store_free(s);
}

Test(checkpoint, the_folder_holds_facts_and_source)
{
    char path[300];
    fg_graph *g = fg_graph_new();
    fg_store *s = store_at(1);
    fg_train_state t = state_at(1);
    fg_graph_set_fact(g, "vocab_size", "97");
    snprintf(path, sizeof path, "%s/my_model.c", folder);
    put_file(path, "the source\n");
    cr_assert_eq(fg_checkpoint_save(run, s, g, &t, path, message), FG_OK, "%s", message);
    snprintf(path, sizeof path, "%s/step-000000001/model.c", run);
    cr_assert_str_eq(get_file(path), "the source\n");
    snprintf(path, sizeof path, "%s/step-000000001/config.json", run);
    cr_assert(strstr(get_file(path), "\"vocab_size\": 97"));
    snprintf(path, sizeof path, "%s/step-000000001", run);
    cr_assert_eq(entries_of(path), 6);
    fg_graph_free(g);
    fg_store_free(s);
}

Test(checkpoint, without_moments_loading_zeroes_them)
{
    float x[6] = { 0 };
    char path[1024];
    fg_store *s = fg_store_new(cpu), *with = fg_store_new(cpu);
    fg_train_state t = state_at(0);
    fg_store_put(s, "w", FG_F32, FG_DIMS(6), x);
    cr_assert_eq(fg_checkpoint_save(run, s, NULL, &t, NULL, message), FG_OK, "%s", message);
    cr_assert_eq(fg_checkpoint_find_newest(run, path, message), FG_OK);
    x[5] = 1;
    fg_store_put(with, "w", FG_F32, FG_DIMS(6), x);
    fg_store_put(with, "@adam.m.w", FG_F32, FG_DIMS(6), x);
    cr_assert_eq(fg_checkpoint_load(path, with, &t, message), FG_OK, "%s", message);
    fg_store_get(with, "@adam.m.w", x, sizeof x);
    cr_assert_eq(x[5], 0);
    fg_train_state_free(&t);
    fg_store_free(s);
    fg_store_free(with);
}

Test(checkpoint, the_newest_whole_one_is_found)
{
    char path[1100];
    cr_assert_eq(fg_checkpoint_find_newest(run, path, message), FG_OK);
    cr_assert_str_eq(path, "", "there is no folder yet");
    must_save(2);
    must_save(1000000000);
    must_save(10);
    cr_assert_eq(load_newest(), 1000000000);
    snprintf(path, sizeof path, "%s/step-1000000000/DONE", run);
    cr_assert_eq(unlink(path), 0);
    cr_assert_eq(load_newest(), 10);
    *strrchr(path, '/') = '\0';
    fg_store *s = store_at(1);
    fg_train_state t;
    cr_assert_eq(fg_checkpoint_load(path, s, &t, message), FG_ERR_IO);
    cr_assert(strstr(message, "has no file DONE"), "%s", message);
    fg_store_free(s);
}

Test(checkpoint, pruning_keeps_the_newest_and_what_is_not_ours)
{
    char path[300];
    for (int64_t step = 1; step <= 5; step++)
        must_save(step);
    snprintf(path, sizeof path, "%s/step-000000002/notes.txt", run);
    put_file(path, "mine\n");
    snprintf(path, sizeof path, "%s/step-000000005/DONE", run);
    cr_assert_eq(unlink(path), 0);
    snprintf(path, sizeof path, "%s/.step-000000009.tmp", run);
    cr_assert_eq(mkdir(path, 0777), 0);
    snprintf(path, sizeof path, "%s/step-7", run);
    cr_assert_eq(mkdir(path, 0777), 0);
    cr_assert_eq(fg_checkpoint_prune(run, 0, message), FG_OK, "%s", message);
    cr_assert_eq(entries_of(run), 5, "4 whole ones and a folder of another name");
    cr_assert_eq(fg_checkpoint_prune(run, 2, message), FG_OK, "%s", message);
    cr_assert_eq(entries_of(run), 4, "3 and 4, and the two that hold what is not ours");
    snprintf(path, sizeof path, "%s/step-000000002", run);
    cr_assert_eq(entries_of(path), 1);
    cr_assert_eq(load_newest(), 4);
}

Test(checkpoint, saving_a_step_again_replaces_it)
{
    char path[300];
    must_save(4);
    must_save(4);
    cr_assert_eq(load_newest(), 4);
    cr_assert_eq(entries_of(run), 1);
    snprintf(path, sizeof path, "%s/step-000000004", run);
    cr_assert_eq(entries_of(path), 4);
}

/* ---- damaged and hostile states -------------------------------------------------------------- */

/* A copy of text with the line that has key replaced, or the line left out if there is no other. */
static void with_line(char *out, const char *text, const char *key, const char *line)
{
    const char *at = strstr(text, key), *from = at, *end = strchr(at, '\n');
    while (from > text && from[-1] != '\n')
        from--;
    sprintf(out, "%.*s%s%s", (int)(from - text), text, line, end + (*line ? 0 : 1));
}

Test(checkpoint, damaged_states_are_refused_with_clear_messages)
{
    static const struct { const char *key, *line, *says; } rows[] = {
        { "\"version\"", " \"version\": 2,", "version is 2, this program reads 1" },
        { "\"version\"", " \"version\": \"1\",", "version is not an integer" },
        { "\"step\"", "", "step is missing" },
        { "\"step\"", " \"step\": 3.0,", "step is not an integer" },
        { "\"step\"", " \"step\": -3,", "step is -3, must not be negative" },
        { "\"step\"", " \"step\": 4,", "tokens is 192, but step 4 * batch 4 * context 16 is not" },
        { "\"step\"", " \"step\": 9223372036854775807,", "tokens is 192, but step" },
        { "\"step\"", " \"step\": 9223372036854775808,", "an integer beyond 64 bits" },
        { "\"step\"", " \"step\": 3, \"step\": 3,", "key step is there twice" },
        { "\"batch\"", " \"batch\": null,", "batch is not an integer" },
        { "\"context\"", " \"context\": 8,", "tokens is 192, but" },
        { "\"position\"", " \"position\": -1,", "position is -1, must not be negative" },
        { "\"rng\"", " \"rng\": 7,", "rng is not a text of 0x and 16 hexadecimal digits" },
        { "\"rng\"", " \"rng\": \"0x123\",", "rng is not a text of 0x and 16" },
        { "\"recipe\"", " \"recipe\": \"0x123456789abcdefg\",",
         "recipe is not a text of 0x and 16" },
        { "\"seconds\"", " \"seconds\": \"1\",", "seconds is not a number" },
        { "\"seconds\"", " \"seconds\": NaN,", "seconds is nan, must be finite" },
        { "\"seconds\"", " \"seconds\": Infinity,", "seconds is inf, must be finite" },
        { "\"seconds\"", " \"seconds\": -1,", "seconds is -1, must be finite and not negative" },
        { "\"optimizer\"", " \"optimizer\": 1,", "optimizer is not true or false" },
        { "\"window\"", " \"window\": -1,", "window is -1, must not be negative" },
        { "\"window_loss\"", " \"window_loss\": [true,", "window_loss is not a list of numbers" },
        { "\"window_loss\"", " \"window_loss\": 3, \"x\": [", "window_loss is not a list" },
        { "\"window\"", " \"window\": 2, \"extra\": 1,", "has 15 keys, must have 14" },
        { "\"version\"", "", "version is missing" },
    };
    static char whole[20000], text[20000];
    char path[300], state[400];
    must_save(3);
    snprintf(path, sizeof path, "%s/step-000000003", run);
    snprintf(state, sizeof state, "%s/state.json", path);
    strcpy(whole, get_file(state));
    fg_store *s = store_at(1);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        fg_train_state t;
        with_line(text, whole, rows[i].key, rows[i].line);
        put_file(state, text);
        long live = faults.live;
        cr_expect_eq(fg_checkpoint_load(path, s, &t, message), FG_ERR_FORMAT, "%s", text);
        cr_expect(strstr(message, rows[i].says), "%s: %s", rows[i].line, message);
        cr_expect(strstr(message, "state.json: "), "%s", message);
        cr_expect_eq(faults.live, live, "%s leaks", rows[i].line);
    }
    for (size_t cut = 0; cut < strlen(whole) - 1; cut++) {
        fg_train_state t;
        sprintf(text, "%.*s", (int)cut, whole);
        put_file(state, text);
        cr_expect_eq(fg_checkpoint_load(path, s, &t, message), FG_ERR_FORMAT, "%zu bytes", cut);
    }
    cr_expect_eq(fg_store_status(s), FG_OK, "a damaged state reaches the store: %s",
                 fg_store_message(s));
    fg_store_free(s);
}

Test(checkpoint, a_folder_renamed_to_another_step_is_refused)
{
    char from[300], to[300];
    fg_train_state t;
    must_save(3);
    snprintf(from, sizeof from, "%s/step-000000003", run);
    snprintf(to, sizeof to, "%s/step-000000008", run);
    cr_assert_eq(rename(from, to), 0);
    fg_store *s = store_at(1);
    cr_assert_eq(fg_checkpoint_load(to, s, &t, message), FG_ERR_FORMAT);
    cr_assert(strstr(message, "step is 3, the folder's name says 8"), "%s", message);
    fg_store_free(s);
}

Test(checkpoint, inconsistent_counters_are_not_saved)
{
    fg_store *s = store_at(1);
    fg_train_state t = state_at(1);
    t.tokens++;
    cr_assert_eq(fg_checkpoint_save(run, s, NULL, &t, NULL, message), FG_ERR_FORMAT);
    cr_assert(strstr(message, "tokens is 65, but step 1 * batch 4 * context 16 is not"), "%s",
              message);
    cr_assert_eq(access(run, F_OK), -1, "a folder was made");
    fg_store_free(s);
}

Test(checkpoint, a_missing_or_damaged_part_is_named)
{
    static const char *const parts[] = { "model.safetensors", "optimizer.safetensors",
                                        "state.json" };
    for (int i = 0; i < 3; i++) {
        char path[300];
        fg_train_state t;
        must_save(3);
        snprintf(path, sizeof path, "%s/step-000000003/%s", run, parts[i]);
        cr_assert_eq(truncate(path, 100), 0);
        fg_store *s = store_at(1);
        *strrchr(path, '/') = '\0';
        cr_expect_eq(fg_checkpoint_load(path, s, &t, message), FG_ERR_FORMAT);
        cr_expect(strstr(message, parts[i]), "%s", message);
        fg_store_free(s);
    }
}

/* ---- kills and full disks -------------------------------------------------------------------- */

/* The process ends at the k-th file operation of a save and a prune, for every k: what is there
 * before or after can be loaded, and the next save puts everything in order. */
static void kill_at_every_operation(int64_t before, int64_t after)
{
    int status = 1;
    long k = 1;
    for (; status; k++) {
        cr_assert(k < 1000);
        remove_temporary(folder);
        cr_assert_eq(mkdir(folder, 0777), 0);
        must_save(before);
        pid_t child = fork();
        if (child == 0) {
            faults_arm(FAULT_EXIT, k);
            if (save(after) || fg_checkpoint_prune(run, 1, message))
                _exit(1);
            _exit(0);
        }
        cr_assert(waitpid(child, &status, 0) == child && WIFEXITED(status));
        status = WEXITSTATUS(status);
        cr_assert(status == 0 || status == 77, "exit %d", status);
        int64_t found = load_newest();
        cr_assert(found == before || found == after, "killed at operation %ld: %lld, %s", k,
                  (long long)found, message);
        cr_assert(status || found == after);
        cr_assert(whole_folders() > 0);
        must_save(after);
        cr_assert_eq(fg_checkpoint_prune(run, 1, message), FG_OK, "%s", message);
        cr_assert_eq(load_newest(), after);
        cr_assert_eq(entries_of(run), 1, "killed at operation %ld: something is left", k);
    }
    cr_assert(k > 40, "only %ld operations were seen", k);
}

Test(checkpoint, a_kill_at_any_moment_leaves_a_whole_checkpoint)
{
    kill_at_every_operation(1, 2);
}

Test(checkpoint, a_kill_while_a_step_is_saved_again_leaves_a_whole_checkpoint)
{
    kill_at_every_operation(2, 2);
}

/* Files that are younger than DONE come first in the listing of some file systems. */
Test(checkpoint, deleting_begins_with_DONE)
{
    int status = 1;
    for (long k = 1; status; k++) {
        char path[300];
        cr_assert(k < 100);
        must_save(1);
        must_save(2);
        snprintf(path, sizeof path, "%s/step-000000001/config.json", run);
        put_file(path, "{}");
        pid_t child = fork();
        if (child == 0) {
            faults_arm(FAULT_EXIT, k);
            _exit(fg_checkpoint_prune(run, 1, message) != FG_OK);
        }
        cr_assert(waitpid(child, &status, 0) == child && WIFEXITED(status));
        status = WEXITSTATUS(status);
        cr_assert(status == 0 || status == 77);
        snprintf(path, sizeof path, "%s/step-000000001/DONE", run);
        bool whole = access(path, F_OK) == 0;
        *strrchr(path, '/') = '\0';
        cr_assert(!whole || entries_of(path) == 5, "operation %ld: DONE is not the first to go", k);
    }
}

Test(checkpoint, each_failing_file_operation_is_reported_and_leaves_a_whole_checkpoint)
{
    bool came = true;
    must_save(1);
    for (long k = 1; came; k++) {
        cr_assert(k < 1000);
        fg_store *s = store_at(2);
        fg_train_state t = state_at(2);
        faults_arm(FAULT_FULL, k);
        fg_status status = fg_checkpoint_save(run, s, NULL, &t, NULL, message);
        came = faults_disarm();
        cr_expect(status == FG_OK || strlen(message) > 0);
        cr_expect(status != FG_OK || load_newest() == 2, "operation %ld: %s", k, message);
        cr_expect(load_newest() > 0, "operation %ld: %s", k, message);
        cr_expect_eq(fg_store_status(s), FG_OK, "a failed save stops the run");
        fg_store_free(s);
    }
    must_save(2);
    cr_assert_eq(fg_checkpoint_prune(run, 1, message), FG_OK, "%s", message);
    cr_assert_eq(entries_of(run), 1);
}

Test(checkpoint, each_failing_allocation_is_reported_without_leak)
{
    for (int load = 0; load < 2; load++) {
        bool came = true;
        for (long k = 1; came; k++) {
            char path[300];
            fg_store *s = store_at(2);
            fg_train_state t = state_at(2), back = { 0 };
            snprintf(path, sizeof path, "%s/step-000000002", run);
            long live = faults.live;
            faults_arm(FAULT_MEMORY, k);
            fg_status status = load ? fg_checkpoint_load(path, s, &back, message)
                                    : fg_checkpoint_save(run, s, NULL, &t, NULL, message);
            fg_train_state_free(&back);
            came = faults_disarm();
            cr_assert(k < 1000);
            cr_expect_eq(status, came ? FG_ERR_MEMORY : FG_OK, "%d, allocation %ld: %s", load, k,
                         message);
            cr_expect_eq(faults.live, live, "%d, allocation %ld leaks %ld", load, k,
                         faults.live - live);
            fg_store_free(s);
        }
    }
}

Test(checkpoint, an_unwritable_folder_is_reported)
{
    cr_assert_eq(mkdir(run, 0555), 0);
    if (geteuid() == 0)
        cr_assert_eq(seteuid(65534), 0);
    fg_status s = save(1);
    if (getuid() == 0)
        cr_assert_eq(seteuid(0), 0);
    cr_assert_eq(s, FG_ERR_IO);
    cr_assert(strstr(message, "cannot be made: Permission denied"), "%s", message);
}
