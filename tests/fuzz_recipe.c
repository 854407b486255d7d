/* fuzz_recipe.c - any bytes as lines KEY=VALUE of a recipe: refused with a message, or a value that
 * prints and sets again to the same bits. */
#include "fox_train.h"
#include "fuzz.h"

static void set_line(fg_recipe *r, char *line)
{
    char message[200] = "", value[2048], again[2048];
    char *equals = strchr(line, '=');
    if (!equals)
        return;
    *equals = '\0';
    fg_recipe copy = *r;
    if (fg_recipe_set(r, line, equals + 1, message)) {
        HOLDS(message[0] != '\0');
        *r = copy;
        return;
    }
    fg_recipe_get(r, line, value, sizeof value);
    copy = *r;
    HOLDS(fg_recipe_set(&copy, line, value, message) == FG_OK);
    fg_recipe_get(&copy, line, again, sizeof again);
    HOLDS(strcmp(value, again) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static char check[FG_MESSAGE];
    fg_recipe r = fg_recipe_default();
    char *text = malloc(n + 1);
    memcpy(text, data, n);
    text[n] = '\0';
    for (char *line = text, *end; line; line = end ? end + 1 : NULL) {
        end = strchr(line, '\n');
        if (end)
            *end = '\0';
        set_line(&r, line);
    }
    if (fg_recipe_check(&r, check) == FG_OK) {
        int64_t max = fg_recipe_max_tokens(&r);
        HOLDS(fg_recipe_steps(&r) >= 0 && max >= 0);
        for (int i = 0; i <= 4; i++)
            HOLDS(fg_recipe_lr(&r, max / 4 * i, max) == fg_recipe_lr(&r, max / 4 * i, max));
    }
    free(text);
    return 0;
}
