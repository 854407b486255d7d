/* criterion.h - enough of Criterion to run a test file as one process, for valgrind.
 *
 * Tests run in the order of their definition, each with its suite's init and fini.  A failed assert
 * or expect prints its place; an assert ends the program, since leaks would mean nothing then. */
#ifndef FG_PLAIN_CRITERION_H
#define FG_PLAIN_CRITERION_H
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct plain_hooks { void (*init)(void), (*fini)(void); };
struct plain_test { const char *suite, *name; void (*run)(void); struct plain_hooks of; };
static struct plain_test plain_all[100];
static struct { const char *suite; struct plain_hooks of; } plain_suites[10];
static int plain_count, plain_suite_count, plain_failures;

#define TestSuite(name_, ...)                                                                     \
    __attribute__((constructor)) static void name_##_suite(void)                                  \
    {                                                                                             \
        plain_suites[plain_suite_count].suite = #name_;                                           \
        plain_suites[plain_suite_count++].of = (struct plain_hooks){ __VA_ARGS__ };               \
    }                                                                                             \
    struct plain_hooks

#define PLAIN_TEST(suite_, name_, ...)                                                            \
    static void suite_##_##name_(void);                                                           \
    __attribute__((constructor)) static void suite_##_##name_##_add(void)                         \
    {                                                                                             \
        plain_all[plain_count++] =                                                                \
            (struct plain_test){ #suite_, #name_, suite_##_##name_, { __VA_ARGS__ } };            \
    }                                                                                             \
    static void suite_##_##name_(void)
#define Test(...) PLAIN_TEST(__VA_ARGS__, .init = NULL)

__attribute__((format(printf, 6, 7)))
static inline void plain_check(int ok, int end, const char *file, int line, const char *what,
                               const char *fmt, ...)
{
    va_list ap;
    if (ok) return;
    plain_failures++;
    fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
    va_start(ap, fmt);
    if (fmt[0]) { vfprintf(stderr, fmt, ap); fputc('\n', stderr); }
    va_end(ap);
    if (end) exit(1);
}

#define PLAIN(end, ok, what, ...) plain_check(!!(ok), end, __FILE__, __LINE__, what, "" __VA_ARGS__)
#define cr_assert(c, ...)          PLAIN(1, c, #c, __VA_ARGS__)
#define cr_expect(c, ...)          PLAIN(0, c, #c, __VA_ARGS__)
#define cr_assert_not(c, ...)      PLAIN(1, !(c), "not " #c, __VA_ARGS__)
#define cr_expect_not(c, ...)      PLAIN(0, !(c), "not " #c, __VA_ARGS__)
#define cr_assert_eq(a, b, ...)    PLAIN(1, (a) == (b), #a " == " #b, __VA_ARGS__)
#define cr_expect_eq(a, b, ...)    PLAIN(0, (a) == (b), #a " == " #b, __VA_ARGS__)
#define cr_assert_neq(a, b, ...)   PLAIN(1, (a) != (b), #a " != " #b, __VA_ARGS__)
#define cr_expect_neq(a, b, ...)   PLAIN(0, (a) != (b), #a " != " #b, __VA_ARGS__)
#define cr_assert_lt(a, b, ...)    PLAIN(1, (a) < (b), #a " < " #b, __VA_ARGS__)
#define cr_expect_lt(a, b, ...)    PLAIN(0, (a) < (b), #a " < " #b, __VA_ARGS__)
#define cr_assert_leq(a, b, ...)   PLAIN(1, (a) <= (b), #a " <= " #b, __VA_ARGS__)
#define cr_expect_leq(a, b, ...)   PLAIN(0, (a) <= (b), #a " <= " #b, __VA_ARGS__)
#define cr_assert_gt(a, b, ...)    PLAIN(1, (a) > (b), #a " > " #b, __VA_ARGS__)
#define cr_expect_gt(a, b, ...)    PLAIN(0, (a) > (b), #a " > " #b, __VA_ARGS__)
#define cr_assert_geq(a, b, ...)   PLAIN(1, (a) >= (b), #a " >= " #b, __VA_ARGS__)
#define cr_expect_null(p, ...)     PLAIN(0, (p) == NULL, #p " is NULL", __VA_ARGS__)
#define cr_expect_not_null(p, ...) PLAIN(0, (p) != NULL, #p " is not NULL", __VA_ARGS__)
#define cr_assert_str_eq(a, b, ...) PLAIN(1, !strcmp(a, b), #a " equals " #b, __VA_ARGS__)
#define cr_expect_str_eq(a, b, ...) PLAIN(0, !strcmp(a, b), #a " equals " #b, __VA_ARGS__)
#define PLAIN_FAR(a, b) fabs((double)(a) - (double)(b))
#define cr_assert_float_eq(a, b, e, ...) PLAIN(1, PLAIN_FAR(a, b) <= (e), #a, __VA_ARGS__)
#define cr_expect_float_eq(a, b, e, ...) PLAIN(0, PLAIN_FAR(a, b) <= (e), #a, __VA_ARGS__)

int main(void)
{
    for (int i = 0; i < plain_count; i++) {
        struct plain_hooks of = plain_all[i].of;
        for (int s = 0; s < plain_suite_count; s++)
            if (!strcmp(plain_suites[s].suite, plain_all[i].suite)) of = plain_suites[s].of;
        if (of.init) of.init();
        plain_all[i].run();
        if (of.fini) of.fini();
    }
    printf("%d tests, %d failures\n", plain_count, plain_failures);
    return plain_failures != 0;
}
#endif
