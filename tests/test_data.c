/* test_data.c - token files, the held-out part, and the order of batches. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "fox_train.h"

/* Writes bytes to a file of its own for each test; the name ends in `ending`. */
static const char *file(const void *bytes, size_t n, const char *ending)
{
    static char path[4][64];
    static int count;
    char *name = path[count++ % 4];
    snprintf(name, 64, "/tmp/fg-data-%d-%d%s", (int)getpid(), count, ending);
    FILE *out = fopen(name, "wb");
    cr_assert(out && fwrite(bytes, 1, n, out) == n && fclose(out) == 0);
    return name;
}

static fg_recipe recipe_of(const char *path, int64_t context)
{
    fg_recipe r = fg_recipe_default();
    snprintf(r.data, sizeof r.data, "%s", path);
    r.context = context;
    r.eval_fraction = 0;
    return r;
}

static fg_data *open_or_fail(const fg_recipe *r, int64_t vocab)
{
    char message[FG_MESSAGE];
    fg_data *d;
    cr_assert_eq(fg_data_open(&d, r, vocab, message), FG_OK, "%s", message);
    return d;
}

static void refuses(const fg_recipe *r, int64_t vocab, fg_status status, const char *words)
{
    char message[FG_MESSAGE];
    fg_data *d;
    cr_expect_eq(fg_data_open(&d, r, vocab, message), status, "%s", message);
    cr_expect(strstr(message, words), "'%s' should say '%s'", message, words);
    cr_expect_null(d);
}

Test(data, labels_are_the_text_and_tokens_lag_by_one)
{
    fg_recipe r = recipe_of(file("abcde", 5, ".txt"), 5);
    int32_t tokens[5], labels[5];
    r.bos = 7;
    fg_data *d = open_or_fail(&r, 256);
    fg_data_train_batch(d, 0, 1, tokens, labels);
    for (int t = 0; t < 5; t++) {
        cr_expect_eq(labels[t], "abcde"[t]);
        cr_expect_eq(tokens[t], t ? "abcde"[t - 1] : 7);
    }
    fg_data_close(d);
    unlink(r.data);
}

Test(data, an_epoch_visits_every_window_once_and_the_next_another_way)
{
    enum { T = 3, W = 32 };
    unsigned char text[T * W + T - 1];
    int32_t tokens[W][T], labels[W][T], again[W][T];
    int64_t first[2][W];
    for (size_t i = 0; i < sizeof text; i++)
        text[i] = (unsigned char)i;
    fg_recipe r = recipe_of(file(text, sizeof text, ""), T);
    fg_data *d = open_or_fail(&r, 256);
    cr_assert_eq(fg_data_windows(d, false), W);
    for (int epoch = 0; epoch < 2; epoch++) {
        bool seen[W] = { false };
        fg_data_train_batch(d, epoch * W, W, tokens[0], labels[0]);
        const int offset = labels[0][0] % T;
        for (int i = 0; i < W; i++) {
            first[epoch][i] = labels[i][0];
            cr_expect_eq(labels[i][0] % T, offset, "one epoch cuts at one offset");
            cr_expect_eq(labels[i][2], labels[i][0] + 2);
            cr_expect_not(seen[(labels[i][0] - offset) / T]);
            seen[(labels[i][0] - offset) / T] = true;
        }
    }
    int moved = 0;
    for (int i = 0; i < W; i++)
        moved += first[0][i] / T != first[1][i] / T;
    cr_expect_gt(moved, W / 2, "the second epoch has the order of the first");
    for (int i = 0; i < W; i++)
        fg_data_train_batch(d, W + i, 1, tokens[i], again[i]);
    cr_expect_eq(memcmp(labels, again, sizeof labels), 0, "a batch depends on its position alone");
    fg_data_close(d);
    unlink(r.data);
}

Test(data, another_seed_is_another_order)
{
    char text[1000];
    int32_t tokens[100], a[100], b[100];
    for (size_t i = 0; i < sizeof text; i++)
        text[i] = (char)(i / 10);
    fg_recipe r = recipe_of(file(text, sizeof text, ""), 10);
    fg_data *d = open_or_fail(&r, 256);
    fg_data_train_batch(d, 0, 10, tokens, a);
    fg_data_close(d);
    r.seed = 1;
    d = open_or_fail(&r, 256);
    fg_data_train_batch(d, 0, 10, tokens, b);
    cr_expect_neq(memcmp(a, b, sizeof a), 0);
    fg_data_close(d);
    unlink(r.data);
}

Test(data, held_out_text_is_the_end_and_never_trained_on)
{
    char text[100];
    int32_t tokens[100], labels[100];
    memset(text, 't', 80);
    memset(text + 80, 'h', 20);
    fg_recipe r = recipe_of(file(text, sizeof text, ""), 8);
    r.eval_fraction = 0.2;
    fg_data *d = open_or_fail(&r, 256);
    cr_expect_eq(fg_data_tokens(d, false), 80);
    cr_expect_eq(fg_data_tokens(d, true), 20);
    cr_expect_eq(fg_data_windows(d, true), 2);
    for (int64_t p = 0; p < 40; p++) {
        fg_data_train_batch(d, p, 1, tokens, labels);
        for (int t = 0; t < 8; t++)
            cr_expect_eq(labels[t], 't');
    }
    fg_data_eval_batch(d, 2, 0, 3, tokens, labels);
    for (int t = 0; t < 24; t++)
        cr_expect_eq(labels[t], t < 16 ? 'h' : -100);
    fg_data_close(d);
    unlink(r.data);
}

Test(data, few_evaluation_windows_are_spread_evenly)
{
    unsigned char text[200];
    int32_t tokens[10], labels[10];
    for (size_t i = 0; i < sizeof text; i++)
        text[i] = (unsigned char)i;
    fg_recipe r = recipe_of(file(text, sizeof text, ""), 10);
    snprintf(r.eval_data, sizeof r.eval_data, "%s", r.data);
    r.batch = 2;
    r.eval_batches = 2;
    fg_data *d = open_or_fail(&r, 256);
    cr_expect_eq(fg_data_windows(d, true), 20);
    cr_expect_eq(fg_data_eval_windows(d, &r), 4);
    for (int64_t j = 0; j < 4; j++) {
        fg_data_eval_batch(d, 4, j, 1, tokens, labels);
        cr_expect_eq(labels[0], 50 * j);
    }
    r.eval_batches = 11;
    cr_expect_eq(fg_data_eval_windows(d, &r), 20);
    fg_data_close(d);
    unlink(r.data);
}

Test(data, u16_files_with_and_without_header)
{
    unsigned char raw[8] = { 1, 0, 0x50, 0xc4, 3, 0, 4, 0 }, headed[1024 + 8] = { 0 };
    const uint32_t header[3] = { 20240520, 1, 4 };
    for (int i = 0; i < 3; i++)
        for (int b = 0; b < 4; b++)
            headed[4 * i + b] = (unsigned char)(header[i] >> 8 * b);
    memcpy(headed + 1024, raw, 8);
    const int32_t expected[4] = { 1, 50256, 3, 4 };
    const char *paths[2] = { file(raw, 8, ".bin"), file(headed, sizeof headed, ".bin") };
    for (int k = 0; k < 2; k++) {
        fg_recipe r = recipe_of(paths[k], 4);
        fg_data *d = open_or_fail(&r, 50257);
        cr_expect_eq(fg_data_tokens(d, false), 4);
        cr_expect_not(fg_data_is_text(d));
        for (int i = 0; i < 4; i++)
            cr_expect_eq(fg_data_token(d, false, i), expected[i]);
        fg_data_close(d);
    }
    fg_recipe r = recipe_of(paths[1], 4);
    refuses(&r, 50000, FG_ERR_FORMAT,
            "token 50256 at byte 1026 is not below the vocabulary's size 50000");
    for (int k = 0; k < 2; k++)
        unlink(paths[k]);
}

Test(data, damaged_files_are_refused)
{
    unsigned char headed[1024 + 6] = { 0x88, 0xd8, 0x34, 1, 1, 0, 0, 0, 4 };
    fg_recipe r = recipe_of("/nowhere/at/all.txt", 4);
    refuses(&r, 256, FG_ERR_IO, "/nowhere/at/all.txt: No such file");
    r = recipe_of("/tmp", 4);
    refuses(&r, 256, FG_ERR_IO, "not a regular file");
    r = recipe_of("", 4);
    refuses(&r, 256, FG_ERR_USAGE, "no training data");
    r = recipe_of(file("", 0, ""), 4);
    refuses(&r, 256, FG_ERR_FORMAT, "the file is empty");
    unlink(r.data);
    r = recipe_of(file("abc", 3, ""), 4);
    refuses(&r, 256, FG_ERR_FORMAT, "3 tokens to train on are fewer than the context of 4");
    r.eval_fraction = 0.5;
    r.context = 2;
    refuses(&r, 256, FG_ERR_FORMAT, "1 held-out tokens are fewer than the context of 2");
    unlink(r.data);
    r = recipe_of(file("abc", 3, ".bin"), 1);
    refuses(&r, 256, FG_ERR_FORMAT, "3 bytes are no whole number of u16 tokens");
    unlink(r.data);
    r = recipe_of(file(headed, sizeof headed, ".bin"), 1);
    refuses(&r, 256, FG_ERR_FORMAT, "promises 4 tokens, the file has room for 3");
    unlink(r.data);
    r = recipe_of(file("abz", 3, ""), 1);
    refuses(&r, 'z', FG_ERR_FORMAT, "token 122 at byte 2 is not below the vocabulary's size 122");
    r.bos = 300;
    refuses(&r, 256, FG_ERR_USAGE, "bos 300 must be below the vocabulary's size 256");
    unlink(r.data);
}

/* Of a text with two equally likely letters, no context tells more than log 2. */
Test(data, ngram_loss_is_the_entropy_of_what_it_can_see)
{
    enum { N = 40000 };
    char *text = malloc(N), message[FG_MESSAGE];
    double by_order[3];
    uint32_t state = 1;
    for (int i = 0; i < N; i++) {
        state = state * 1664525u + 1013904223u;
        text[i] = state >> 31 ? 'a' : 'b';
    }
    fg_recipe r = recipe_of(file(text, N, ""), 100);
    r.eval_fraction = 0.1;
    fg_data *d = open_or_fail(&r, 256);
    cr_assert_eq(fg_ngram_loss(d, 3, 40, by_order, message), FG_OK, "%s", message);
    cr_expect_float_eq(by_order[0], log(2), 0.005);
    fg_data_close(d);
    unlink(r.data);

    for (int i = 0; i < N; i++)
        text[i] = "aab"[i % 3];                       /* two bytes before decide the next */
    r = recipe_of(file(text, N, ""), 100);
    r.eval_fraction = 0.1;
    d = open_or_fail(&r, 256);
    for (int order = 0; order < 3; order++)
        cr_assert_eq(fg_ngram_loss(d, order, 40, &by_order[order], message), FG_OK);
    cr_expect_float_eq(by_order[0], log(3) - 2 * log(2) / 3, 0.01);
    cr_expect_float_eq(by_order[1], 2 * log(2) / 3, 0.02);
    cr_expect_lt(by_order[2], 0.03);
    fg_data_close(d);
    unlink(r.data);
    free(text);
}
