/* test_json.c - the JSON reader: takes what RFC 8259 allows, with the values it means, and nothing
 * else; within its limits; in two allocations. */
#include <criterion/criterion.h>
#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "fox_json.h"

static char message[200];

static fg_json *parse(const char *text)
{
    static const fg_json_rules rules = { 4, 1000, false };
    fg_json *j;
    fg_status s = fg_json_parse(text, strlen(text), rules, &j, message);
    cr_assert_eq(s == FG_OK, j != NULL);
    cr_assert_eq(s == FG_OK, message[0] == '\0');
    return j;
}

Test(json, what_the_grammar_allows_is_taken)
{
    static const char *const texts[] = {
        "0", "-0", "12", "-1", "0.5", "1e5", "1E+5", "1e-5", "1.25e2", " \t\r\n1\n", "\"\"", "null",
        "true", "false", "[]", "{}", "[1]", "[1,2 , 3]", "[[[[]]]]", "{\"\":1}",
            "{\"a\":{\"a\":[]}}",
        "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\"", "\"\\ud83d\\ude00\"", "\"\x7f\"", "\"\xc3\xa9\"",
        "\"\xf4\x8f\xbf\xbf\"", "9223372036854775807", "-9223372036854775808"
    };
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        fg_json *j = parse(texts[i]);
        cr_expect(j, "%s: %s", texts[i], message);
        fg_json_free(j);
    }
}

Test(json, what_the_grammar_forbids_is_refused_with_a_reason_and_a_place)
{
    static const struct { const char *text, *says; } rows[] = {
        { "", "ends too early at line 1, byte 1" }, { " \n ", "ends too early at line 2, byte 2" },
        { "[", "ends too early" }, { "[1", "ends too early" }, { "[1,", "ends too early" },
        { "[1,]", "not a value" }, { "[,1]", "not a value" }, { "[1 2]", "a comma is missing" },
        { "[1}", "a comma is missing" }, { "]", "not a value" }, { "1 2", "something follows" },
        { "{", "a key is missing" }, { "{1:2}", "a key is missing" }, { "{\"a\"}", "a colon" },
        { "{\"a\":}", "not a value" }, { "{\"a\":1,}", "a key is missing" }, { "{,}", "a key" },
        { "{\"a\":1 \"b\":2}", "a comma is missing" }, { "{\"a\":1]", "a comma is missing" },
        { "{\"b\":1,\"a\":2,\"b\":3}", "key b is there twice" },
        { "{\"a\":1,\"\\u0061\":2}", "key a is there twice" },
        { "nul", "not a value" }, { "nulll", "something follows" }, { "True", "not a value" },
        { "Infinity", "not a value" }, { "NaN", "not a value" }, { "-Infinity", "not a number" },
        { "+1", "not a value" }, { "01", "not a number" }, { "-01", "not a number" },
        { ".5", "not a value" }, { "1.", "not a number" }, { "1e", "not a number" },
        { "1e+", "not a number" }, { "-", "not a number" }, { "--1", "not a number" },
        { "0x10", "something follows" }, { "1_000", "something follows" }, { "1e999", "range" },
        { "9223372036854775808", "beyond 64 bits" }, { "-9223372036854775809", "beyond 64 bits" },
        { "\"", "does not end" }, { "\"\\", "does not end" }, { "\"\\\"", "does not end" },
        { "\"\\x\"", "unknown escape" }, { "\"\\u12\"", "four hexadecimal digits" },
        { "\"\\u12g4\"", "four hexadecimal digits" }, { "\"\\u0000\"", "a NUL" },
        { "\"\\ud800\"", "half a surrogate" }, { "\"\\udc00\"", "half a surrogate" },
        { "\"\\ud800\\u0041\"", "half a surrogate" }, { "\"\\ud800\\ud800\"", "half a surrogate" },
        { "\"\n\"", "a control character" }, { "\"\x01\"", "a control character" },
        { "\"\x80\"", "not UTF-8" }, { "\"\xc0\xaf\"", "not UTF-8" }, { "\"\xe0\x80\xaf\"",
                                                                       "not UTF-8" },
        { "\"\xed\xa0\x80\"", "not UTF-8" }, { "\"\xf4\x90\x80\x80\"", "not UTF-8" },
        { "\"\xf5\x80\x80\x80\"", "not UTF-8" }, { "\"\xc3\"", "not UTF-8" }, { "\"\xff\"",
                                                                               "not UTF-8" },
        { "\xef\xbb\xbf{}", "not a value" }, { "// x\n1", "not a value" }, { "'a'", "not a value" },
        { "[[[[[]]]]]", "more than 4 levels" }, { "[1,\n2,\n x]", "not a value at line 3, byte 2" }
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        fg_json *j = parse(rows[i].text);
        cr_expect(!j, "%s was taken", rows[i].text);
        cr_expect(strstr(message, rows[i].says), "%s: %s", rows[i].text, message);
        fg_json_free(j);
    }
}

/* Without a NUL behind the text, and with one inside it. */
Test(json, only_the_given_bytes_are_read)
{
    static const fg_json_rules rules = { 4, 1000, false };
    static const char text[] = { '[', '1', ']', '2' }, inside[] = { '1', '\0' };
    fg_json *j;
    for (size_t n = 0; n <= sizeof text; n++) {
        char *copy = malloc(n + (n == 0));       /* a tool that watches memory sees a read beyond */
        memcpy(copy, text, n);
        cr_expect_eq(fg_json_parse(copy, n, rules, &j, message) == FG_OK, n == 3);
        fg_json_free(j);
        free(copy);
    }
    cr_expect_neq(fg_json_parse(inside, 2, rules, &j, message), FG_OK);
}

Test(json, values_are_what_the_text_means)
{
    fg_json *j = parse("{\"z\":[1,-2.5,\"\\u00e9\\ud83d\\ude00\",null],"
                       "\"a\":true,\"m\":{\"k\":1e2}}");
    const fg_json_value *root = fg_json_root(j), *z = fg_json_get(root, "z"), *v = z->first;
    double x;
    cr_assert(root->kind == FG_JSON_OBJECT && root->n == 3 && z->kind == FG_JSON_LIST && z->n == 4);
    cr_assert(v->kind == FG_JSON_WHOLE && v->u.whole == 1 && !v->key);
    v = v->next;
    cr_assert(v->kind == FG_JSON_REAL && v->u.real == -2.5 && fg_json_number(v, &x) && x == -2.5);
    v = v->next;
    cr_assert(v->kind == FG_JSON_TEXT && strcmp(v->u.text, "\xc3\xa9\xf0\x9f\x98\x80") == 0);
    cr_assert_not(fg_json_number(v, &x));
    v = v->next;
    cr_assert(v->kind == FG_JSON_NULL && !v->next);
    cr_assert_str_eq(root->first->key, "a");
    cr_assert_str_eq(root->first->next->key, "m");
    cr_assert(fg_json_number(fg_json_get(fg_json_get(root, "m"), "k"), &x) && x == 100);
    cr_assert(!fg_json_get(root, "b") && !fg_json_get(NULL, "b") && !fg_json_get(z, "b"));
    fg_json_free(j);
}

Test(json, whole_numbers_are_exact_to_64_bits)
{
    static const int64_t values[] = { INT64_MAX, INT64_MIN, INT64_MAX - 1, INT64_MIN + 1, 0, -1,
                                      INT64_C(9007199254740993) };
    for (size_t i = 0; i < sizeof values / sizeof values[0]; i++) {
        char text[32];
        snprintf(text, sizeof text, "%lld", (long long)values[i]);
        fg_json *j = parse(text);
        cr_assert(j && fg_json_root(j)->u.whole == values[i], "%s", text);
        fg_json_free(j);
    }
}

Test(json, reals_do_not_depend_on_the_locale)
{
    static const char *const names[] = { "de_DE.UTF-8", "fr_FR.UTF-8", "de_DE.utf8" };
    for (int i = 0; i < 3 && !setlocale(LC_NUMERIC, names[i]); i++)
        ;
    fg_json *j = parse("0.02");
    cr_assert_eq(fg_json_root(j)->u.real, 1.0 / 50);
    fg_json_free(j);
}

Test(json, bare_tokens_of_python_are_numbers_only_if_asked_for)
{
    static const fg_json_rules rules = { 4, 1000, true };
    static const char text[] = "[Infinity, -Infinity,NaN,-1]";
    fg_json *j;
    cr_assert_eq(fg_json_parse(text, strlen(text), rules, &j, message), FG_OK, "%s", message);
    const fg_json_value *v = fg_json_root(j)->first;
    cr_assert(isinf(v->u.real) && v->u.real > 0);
    cr_assert(isinf(v->next->u.real) && v->next->u.real < 0 && isnan(v->next->next->u.real));
    cr_assert_eq(v->next->next->next->u.whole, -1);
    fg_json_free(j);
    cr_assert_neq(fg_json_parse("NaNs", 4, rules, &j, message), FG_OK);
}

Test(json, large_objects_are_sorted_and_repeated_keys_found)
{
    enum { N = 50000 };
    static const fg_json_rules rules = { 4, N + 2, false };
    char *text = malloc(N * 16 + 32), *p = text;
    fg_json *j;
    p += sprintf(p, "{");
    for (int i = 0; i < N; i++)
        p += sprintf(p, "%s\"%d\":%d", i ? "," : "", (int)(i * INT64_C(48271) % N), i);
    strcpy(p, "}");
    cr_assert_eq(fg_json_parse(text, strlen(text), rules, &j, message), FG_OK, "%s", message);
    cr_assert_eq(fg_json_root(j)->n, N);
    int count = 1;
    for (const fg_json_value *v = fg_json_root(j)->first; v->next; v = v->next, count++)
        cr_assert(strcmp(v->key, v->next->key) < 0);
    cr_assert_eq(count, N);
    fg_json_free(j);
    strcpy(p, ",\"777\":0}");
    cr_assert_eq(fg_json_parse(text, strlen(text), rules, &j, message), FG_ERR_FORMAT);
    cr_assert(strstr(message, "key 777 is there twice"), "%s", message);
    strcpy(p, ",\"x\":0,\"y\":0}");
    cr_assert_eq(fg_json_parse(text, strlen(text), rules, &j, message), FG_ERR_FORMAT);
    cr_assert(strstr(message, "values, more than 50002"), "%s", message);
    free(text);
}
