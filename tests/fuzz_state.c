/* fuzz_state.c - any bytes as state.json: refused with a message, or a state that is written and
 * read again the same. */
#include "checkpoint_state.h"
#include "fuzz.h"

static void write_again(const fg_train_state *t, bool optimizer)
{
    char path[128], message[400];
    fg_train_state again;
    bool optimizer_again;
    HOLDS(fg__state_write(fuzz_path("again", path), t, optimizer, message) == FG_OK);
    HOLDS(fg__state_read(path, &again, &optimizer_again, message) == FG_OK);
    HOLDS(again.step == t->step && again.tokens == t->tokens && again.seed == t->seed);
    HOLDS(again.rng == t->rng && again.recipe == t->recipe && again.seconds == t->seconds);
    HOLDS(optimizer_again == optimizer && again.positions == t->positions);
    for (int64_t i = 0; i < t->positions; i++) {
        double a = t->window_loss[i], b = again.window_loss[i];
        HOLDS(a == b || a != a || a - a != 0);       /* what is not finite comes back as NaN */
        HOLDS(a == b || b != b);
    }
    fg_train_state_free(&again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    char path[128], message[400] = "";
    fg_train_state t;
    bool optimizer;
    fuzz_write(fuzz_path("state.json", path), data, n);
    fg_status s = fg__state_read(path, &t, &optimizer, message);
    HOLDS((s == FG_OK) == (message[0] == '\0'));
    if (!s)
        write_again(&t, optimizer);
    else
        HOLDS(!t.window_loss);
    fg_train_state_free(&t);
    return 0;
}
