/* fuzz_tokens.c - any bytes as a file of tokens, text or .bin: refused with a message, or batches
 * of tokens below the vocabulary from every window.  The first 8 bytes choose how it is opened and
 * what is done with it. */
#include "fox_train.h"
#include "fuzz.h"

static void draw(const fg_data *d, const fg_recipe *r, int64_t vocab)
{
    int32_t tokens[2 * 64], labels[2 * 64];
    int64_t windows = fg_data_windows(d, false), held = fg_data_windows(d, true);
    HOLDS(windows > 0 && held >= 0);
    for (int64_t p = 0; p < windows + 3 && p < 200; p++) {
        fg_data_train_batch(d, p, 2, tokens, labels);
        for (int64_t i = 0; i < 2 * r->context; i++)
            HOLDS(tokens[i] >= 0 && tokens[i] < vocab && labels[i] >= 0 && labels[i] < vocab);
    }
    for (int64_t p = 0; p < held + 2 && p < 200; p++) {
        fg_data_eval_batch(d, held, p, 2, tokens, labels);
        for (int64_t i = 0; i < 2 * r->context; i++)
            HOLDS(tokens[i] >= 0 && tokens[i] < vocab && labels[i] >= -100 && labels[i] < vocab);
    }
    for (int eval = 0; eval < 2; eval++)
        for (int64_t i = 0; i < fg_data_tokens(d, eval); i += 7)
            HOLDS(fg_data_token(d, eval, i) < vocab);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static char message[FG_MESSAGE];
    char path[128];
    fg_data *d;
    fg_recipe r = fg_recipe_default();
    if (n < 8)
        return 0;
    int64_t vocab = 1 + data[0] + 256 * data[1];
    r.context = 1 + data[2] % 64;
    r.bos = data[3];
    r.seed = data[4];
    r.eval_fraction = data[5] / 256.0;
    snprintf(r.data, sizeof r.data, "%s", fuzz_path(data[6] & 1 ? "tokens.bin" : "tokens", path));
    if (data[6] & 2)
        snprintf(r.eval_data, sizeof r.eval_data, "%s", path);
    fuzz_write(path, data + 8, n - 8);
    if (fg_data_open(&d, &r, vocab, message)) {
        HOLDS(message[0] != '\0');
        return 0;
    }
    draw(d, &r, vocab);
    if (fg_data_is_text(d) && data[7] == 0) {      /* slow: not every time */
        double loss;
        fg_ngram_loss(d, 3, fg_data_windows(d, true), &loss, message);
    }
    fg_data_close(d);
    return 0;
}
