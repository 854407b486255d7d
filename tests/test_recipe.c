/* test_recipe.c - the schedule's published values, setting by name, and refusals that say why. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "fox_train.h"

/* A run of the official code: 32 sequences of 16384 tokens, or 256 of 2048. */
static double lr_of_step(const fg_recipe *r, int64_t step)
{
    return fg_recipe_lr(r, step * r->batch * r->context, fg_recipe_max_tokens(r));
}

static void expect(const fg_recipe *r, int64_t step, double lr, double printed)
{
    const double ours = lr_of_step(r, step);
    cr_expect(fabs(ours - lr) <= printed * lr, "step %lld: lr is %.9g, should be %.9g",
              (long long)step, ours, lr);
}

/* The tables print 7 digits, so half a unit of the last one: 5e-7 of the value, at most 5e-6. */
static const double digits = 1e-6, four_digits = 1e-4;

Test(recipe, schedule_of_760m)
{
    fg_recipe r = fg_recipe_default();
    r.batch = 32;
    r.context = 16384;
    r.lr = 2e-3;
    r.warmup_tokens = (int64_t)256 << 20;
    r.tokens = (int64_t)45 << 30;
    cr_expect_eq(fg_recipe_steps(&r), 92160);
    cr_expect_eq(lr_of_step(&r, 0), 0, "the first update must have rate 0 exactly");
    expect(&r, 1, 3.90625e-6, digits);
    expect(&r, 256, 1e-3, digits);
    expect(&r, 512, 2e-3, digits);
    expect(&r, 1024, 1.999846e-3, digits);
    expect(&r, 46080, 1.008775e-3, digits);
    expect(&r, 92159, 5.875e-13, four_digits);
}

Test(recipe, schedule_of_125m)
{
    fg_recipe r = fg_recipe_default();
    r.batch = 32;
    r.context = 16384;
    r.lr = 2e-3;
    r.warmup_tokens = (int64_t)256 << 20;
    r.tokens = (int64_t)5 << 29;
    cr_expect_eq(fg_recipe_steps(&r), 5120);
    cr_expect_eq(lr_of_step(&r, 0), 0);
    expect(&r, 1, 3.90625e-6, digits);
    expect(&r, 1024, 1.939693e-3, digits);
    expect(&r, 2560, 1.173648e-3, digits);
    expect(&r, 5119, 2.324e-10, 5e-4);
}

Test(recipe, schedule_with_a_start_and_an_end)
{
    fg_recipe r = fg_recipe_default();
    r.batch = 256;
    r.context = 2048;
    r.lr = 3e-4;
    r.lr_start = r.lr_end = 3e-5;
    r.warmup_tokens = (int64_t)512 << 20;
    r.tokens = (int64_t)14 << 30;
    cr_expect_eq(fg_recipe_steps(&r), 28672);
    expect(&r, 0, 3e-5, 1e-12);
    expect(&r, 1, 3.026367e-5, digits);
    expect(&r, 256, 9.75e-5, digits);
    expect(&r, 512, 1.65e-4, digits);
    expect(&r, 1024, 3e-4, digits);
    expect(&r, 14336, 1.728496e-4, digits);
    expect(&r, 28671, 3e-5, digits);
}

Test(recipe, the_earlier_end_counts)
{
    fg_recipe r = fg_recipe_default();
    r.batch = 2;
    r.context = 8;
    r.steps = r.tokens = 0;
    cr_expect_eq(fg_recipe_steps(&r), 1000);
    r.tokens = 100;
    cr_expect_eq(fg_recipe_max_tokens(&r), 100);
    cr_expect_eq(fg_recipe_steps(&r), 7);
    r.steps = 5;
    cr_expect_eq(fg_recipe_max_tokens(&r), 80);
    r.steps = 7;
    cr_expect_eq(fg_recipe_max_tokens(&r), 100);
}

Test(recipe, every_field_reads_back_to_the_same_bits)
{
    fg_recipe r = fg_recipe_default(), again;
    const char *key;
    char text[1100], message[200];
    r.lr = 0.1 + 0.2;
    r.seed = 9007199254740993;
    snprintf(r.data, sizeof r.data, "a text with spaces.txt");
    memset(&again, 0, sizeof again);
    for (int i = 0; (key = fg_recipe_key(i)); i++) {
        fg_recipe_get(&r, key, text, sizeof text);
        cr_assert_eq(fg_recipe_set(&again, key, text, message), FG_OK, "%s: %s", key, message);
        cr_expect(fg_recipe_meaning(key) && fg_recipe_meaning(key)[0]);
    }
    cr_expect_str_eq(again.data, r.data);
    cr_expect_eq(again.lr, r.lr);
    cr_expect_eq(again.seed, r.seed);
    cr_expect_eq(again.eval_fraction, r.eval_fraction);
    cr_expect_eq(again.keep, r.keep);
    fg_recipe_get(&r, "eval_fraction", text, sizeof text);
    cr_expect_str_eq(text, "0.1");
}

Test(recipe, setting_refuses_what_is_not_a_value)
{
    fg_recipe r = fg_recipe_default();
    char message[200];
    cr_expect_eq(fg_recipe_set(&r, "learning_rate", "1", message), FG_ERR_USAGE);
    cr_expect_str_eq(message, "recipe has no key 'learning_rate'");
    cr_expect_eq(fg_recipe_set(&r, "batch", "2.5", message), FG_ERR_USAGE);
    cr_expect_str_eq(message, "batch must be a whole number, not '2.5'");
    cr_expect_eq(fg_recipe_set(&r, "batch", "", message), FG_ERR_USAGE);
    cr_expect_eq(fg_recipe_set(&r, "steps", "99999999999999999999", message), FG_ERR_USAGE);
    cr_expect_eq(fg_recipe_set(&r, "lr", "fast", message), FG_ERR_USAGE);
    cr_expect_str_eq(message, "lr must be a number, not 'fast'");
    cr_expect_eq(fg_recipe_set(&r, "lr", "nan", message), FG_ERR_USAGE);
    cr_expect_eq(fg_recipe_set(&r, "tokens", "2.5e9", message), FG_OK);
    cr_expect_eq(r.tokens, 2500000000);
    cr_expect_str_eq(message, "");
}

#define REFUSES(field, value, words)                                                               \
    do {                                                                                           \
        fg_recipe r = fg_recipe_default();                                                         \
        char message[FG_MESSAGE];                                                                  \
        r.field = value;                                                                           \
        cr_expect_eq(fg_recipe_check(&r, message), FG_ERR_USAGE, #field " = " #value);             \
        cr_expect_str_eq(message, words);                                                          \
    } while (0)

Test(recipe, a_recipe_without_sense_is_refused_with_its_numbers)
{
    fg_recipe fine = fg_recipe_default();
    char text[FG_MESSAGE];
    cr_expect_eq(fg_recipe_check(&fine, text), FG_OK);
    cr_expect_str_eq(text, "");
    REFUSES(batch, 0, "batch must be at least 1, it is 0");
    REFUSES(context, -3, "context must be at least 1, it is -3");
    REFUSES(micro_batch, 3, "micro_batch 3 must divide batch 8");
    REFUSES(batch, (int64_t)1 << 40,
            "batch 1099511627776 times context 256 must be at most 2147483647 tokens an update");
    REFUSES(lr, 0, "lr must be above 0, it is 0");
    REFUSES(lr_end, 1, "lr_end must lie between 0 and lr 0.001, it is 1");
    REFUSES(lr_start, -1, "lr_start must lie between 0 and lr 0.001, it is -1");
    REFUSES(warmup_tokens, 2048000,
            "warmup_tokens 2048000 must be less than the 2048000 tokens of the whole training");
    REFUSES(beta2, 1, "beta2 must be at least 0 and below 1, it is 1");
    REFUSES(eps, 0, "eps must be above 0, it is 0");
    REFUSES(clip, -1, "clip must not be negative, it is -1");
    REFUSES(eval_fraction, 1, "eval_fraction must be at least 0 and below 1, it is 1");
    REFUSES(log_every, -1, "log_every must not be negative, it is -1");
    REFUSES(weight_decay, NAN, "weight_decay must not be negative, it is nan");
}
