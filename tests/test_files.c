/* test_files.c - files of tensors: what is written comes back, what is hostile is refused with a
 * clear message, and no failure of memory or disk does harm. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <math.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>

#include "faults.h"
#include "fox_train.h"

static char folder[64], path[128], message[400];

static void setup(void)
{
    temporary_folder(folder);
    snprintf(path, sizeof path, "%s/file", folder);
}

static void teardown(void)
{
    remove_temporary(folder);
}

TestSuite(files, .init = setup, .fini = teardown);

static int files_in_folder(void)
{
    int n = 0;
    struct dirent *item;
    DIR *d = opendir(folder);
    while ((item = readdir(d)))
        n += item->d_name[0] != '.' || strlen(item->d_name) > 2;
    closedir(d);
    return n;
}

static void write_bytes(const void *data, size_t n)
{
    FILE *f = fopen(path, "wb");
    cr_assert_eq(fwrite(data, 1, n, f), n);
    fclose(f);
}

/* A file of this header and values; length: what the file says of its header, -1 for the truth. */
static void write_tensors(const char *header, int64_t length, const void *values, size_t n)
{
    uint64_t said = length < 0 ? strlen(header) : (uint64_t)length;
    FILE *f = fopen(path, "wb");
    fwrite(&said, 8, 1, f);
    fwrite(header, 1, strlen(header), f);
    if (n)
        cr_assert_eq(fwrite(values, 1, n, f), n);
    fclose(f);
}

/* ---- round trips ----------------------------------------------------------------------------- */

static float reals[6] = { 1.5f, -0.0f, 3e38f, 1e-45f, 0.1f, -7.0f };
static int32_t wholes[3] = { INT32_MIN, 0, INT32_MAX };
static float scalar = 42.0f;

static int sample_arrays(fg_array out[5])
{
    out[0] = (fg_array){ "z.weight", FG_F32, FG_DIMS(2, 3), reals };
    out[1] = (fg_array){ "a \"quoted\" \\ name", FG_I32, FG_DIMS(3), wholes };
    out[2] = (fg_array){ "scalar", FG_F32, { 0 }, &scalar };
    out[3] = (fg_array){ "empty", FG_F32, FG_DIMS(4, 0, 2), NULL };
    out[4] = (fg_array){ "gr\xc3\xbc\xc3\x9f" "e", FG_F32, FG_DIMS(1, 6), reals };
    return 5;
}

Test(files, written_arrays_come_back_bit_for_bit)
{
    fg_array arrays[5];
    int n = sample_arrays(arrays);
    cr_assert_eq(fg_file_write(path, n, arrays, message), FG_OK, "%s", message);
    fg_file *f = fg_file_open(path);
    cr_assert_eq(fg_file_status(f), FG_OK, "%s", fg_file_message(f));
    cr_assert_eq(fg_file_count(f), n);
    for (int i = 0; i < n; i++) {
        char back[24];
        fg_file_entry e;
        size_t bytes = (size_t)fg_shape_count(arrays[i].shape) * 4;
        cr_assert(fg_file_find(f, arrays[i].name, &e));
        cr_assert(fg_shape_equal(e.shape, arrays[i].shape));
        cr_assert_str_eq(e.type, arrays[i].type == FG_I32 ? "I32" : "F32");
        cr_assert_eq(fg_file_read(f, e.name, arrays[i].type, back, bytes), FG_OK);
        cr_assert(bytes == 0 || memcmp(back, arrays[i].data, bytes) == 0);
    }
    fg_file_close(f);
    cr_assert_eq(files_in_folder(), 1, "a temporary file was left");
}

Test(files, a_written_file_has_sorted_names_format_pt_and_a_padded_header)
{
    fg_array arrays[5];
    char text[1000] = "";
    uint64_t length;
    cr_assert_eq(fg_file_write(path, sample_arrays(arrays), arrays, message), FG_OK, "%s", message);
    FILE *f = fopen(path, "rb");
    cr_assert_eq(fread(&length, 8, 1, f), 1u);
    cr_assert_eq(length % 8, 0u);
    cr_assert_eq(fread(text, 1, length, f), length);
    fclose(f);
    cr_assert(strstr(text, "{\"__metadata__\":{\"format\":\"pt\"},\"a \\\"quoted") == text);
    cr_assert(strstr(text, "\"empty\"") < strstr(text, "\"scalar\""));
    cr_assert(strstr(text, "\"scalar\"") < strstr(text, "\"z.weight\""));
}

Test(files, a_file_without_tensors_is_legal)
{
    cr_assert_eq(fg_file_write(path, 0, NULL, message), FG_OK, "%s", message);
    fg_file *f = fg_file_open(path);
    cr_assert_eq(fg_file_status(f), FG_OK, "%s", fg_file_message(f));
    cr_assert_eq(fg_file_count(f), 0);
    fg_file_close(f);
}

Test(files, official_files_open_and_hold_what_they_should)
{
    static const struct { const char *family; int tensors; } rows[] = {
        { "fox_llama", 23 }, { "fox_pro", 35 },
        { "transformer_llama", 19 }, { "transformer_pro", 31 },
        { "hgrn2", 31 }, { "hgrn2_lower_bound", 31 }, { "delta_net", 29 }
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        char name[400];
        int32_t ids[154];
        fg_file_entry e;
        snprintf(name, sizeof name, "%s/%s/model.safetensors", FIXTURES, rows[i].family);
        fg_file *f = fg_file_open(name);
        cr_assert_eq(fg_file_status(f), FG_OK, "%s", fg_file_message(f));
        cr_assert_eq(fg_file_count(f), rows[i].tensors, "%s: %d", name, fg_file_count(f));
        fg_file_close(f);
        snprintf(name, sizeof name, "%s/%s/reference.safetensors", FIXTURES, rows[i].family);
        f = fg_file_open(name);
        cr_assert_eq(fg_file_status(f), FG_OK, "%s", fg_file_message(f));
        cr_assert(fg_file_find(f, "logits", &e) && fg_shape_equal(e.shape, FG_DIMS(2, 77, 97)));
        cr_assert_eq(fg_file_read(f, "input_ids", FG_I32, ids, sizeof ids), FG_OK);
        for (int k = 0; k < 154; k++)
            cr_assert(ids[k] >= 0 && ids[k] < 97);
        fg_file_close(f);
    }
}

#define HEAD(dtype, n, bytes) "{\"x\":{\"dtype\":\"" dtype "\",\"shape\":[" #n \
                              "],\"data_offsets\":[0," #bytes "]}}"

static fg_file *open_values(const char *header, const void *values, size_t n)
{
    write_tensors(header, -1, values, n);
    fg_file *f = fg_file_open(path);
    cr_assert_eq(fg_file_status(f), FG_OK, "%s", fg_file_message(f));
    return f;
}

Test(files, half_precision_is_widened_exactly)
{
    static const uint16_t half[] = { 0x3c00, 0xc000, 0x7bff, 0x0001, 0x8001, 0x03ff, 0x0400, 0x7c00,
                                     0xfc00, 0x8000 };
    static const float want[] = { 1, -2, 65504, 0x1p-24f, -0x1p-24f, 1023 * 0x1p-24f, 0x1p-14f,
                                  INFINITY, -INFINITY, -0.0f };
    static const uint16_t brain[] = { 0x3f80, 0xc000, 0x0001, 0x7f80 };
    static const float brain_want[] = { 1, -2, 0x1p-133f, INFINITY };
    float got[10];
    fg_file *f = open_values(HEAD("F16", 10, 20), half, 20);
    cr_assert_eq(fg_file_read(f, "x", FG_F32, got, 40), FG_OK);
    cr_assert_eq(memcmp(got, want, 40), 0);
    fg_file_close(f);
    f = open_values(HEAD("BF16", 4, 8), brain, 8);
    cr_assert_eq(fg_file_read(f, "x", FG_F32, got, 16), FG_OK);
    cr_assert_eq(memcmp(got, brain_want, 16), 0);
    fg_file_close(f);
}

Test(files, half_precision_keeps_nan)
{
    static const uint16_t half[] = { 0x7e01 };
    float got;
    fg_file *f = open_values(HEAD("F16", 1, 2), half, 2);
    cr_assert_eq(fg_file_read(f, "x", FG_F32, &got, 4), FG_OK);
    cr_assert(isnan(got));
    fg_file_close(f);
}

Test(files, integers_of_every_width_are_read)
{
    static const int64_t wide[] = { -5, INT32_MAX, INT32_MIN };
    static const uint16_t half[] = { 65535, 0, 50256 };
    static const uint8_t byte[] = { 255, 0, 7 };
    static const int32_t want_wide[] = { -5, INT32_MAX, INT32_MIN };
    static const int32_t want_half[] = { 65535, 0, 50256 };
    static const int32_t want_byte[] = { 255, 0, 7 }, want_truth[] = { 1, 0, 1 };
    const struct {
        const char *header;
        const void *raw;
        size_t bytes;
        const int32_t *want;
    } rows[] = {
        { HEAD("I64", 3, 24), wide, 24, want_wide }, { HEAD("U16", 3, 6), half, 6, want_half },
        { HEAD("U8", 3, 3), byte, 3, want_byte }, { HEAD("BOOL", 3, 3), byte, 3, want_truth }
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        int32_t got[3];
        fg_file *f = open_values(rows[i].header, rows[i].raw, rows[i].bytes);
        cr_assert_eq(fg_file_read(f, "x", FG_I32, got, 12), FG_OK, "%s", fg_file_message(f));
        cr_assert_eq(memcmp(got, rows[i].want, 12), 0, "%s", rows[i].header);
        fg_file_close(f);
    }
}

/* More values than one piece, so that pieces meet without a seam. */
Test(files, long_tensors_are_converted_piece_by_piece)
{
    enum { N = 50001 };
    static uint16_t raw[N];
    static int32_t got[N];
    for (int i = 0; i < N; i++)
        raw[i] = (uint16_t)(i * 7);
    fg_file *f = open_values(HEAD("U16", 50001, 100002), raw, sizeof raw);
    faults_arm(FAULT_SHORT, 1);
    cr_assert_eq(fg_file_read(f, "x", FG_I32, got, sizeof got), FG_OK);
    faults_disarm();
    for (int i = 0; i < N; i++)
        cr_assert_eq(got[i], (uint16_t)(i * 7));
    fg_file_close(f);
}

/* ---- refusals -------------------------------------------------------------------------------- */

#define X "\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}"
#define Y(begin, end) "\"y\":{\"dtype\":\"F32\",\"shape\":[2]," \
                      "\"data_offsets\":[" #begin "," #end "]}"
#define ENTRY(body) "{\"x\":{" body "}}"

typedef struct { const char *header; int64_t length, bytes; const char *says; } hostile;
static const hostile hostiles[] = {
    { "", 0, 0, "does not begin with '{'" },
    { "{" X "}", 100000001, 8, "header length is 100000001, more than 100000000" },
    { "{" X "}", -2, 8, "header length is 18446744073709551614, more than" },
    { "{" X "}", 1000, 8, "header length is 1000, but only 62 bytes follow" },
    { "[]", -1, 0, "does not begin with '{'" },
    { " {" X "}", -1, 8, "does not begin with '{'" },
    { "{\"x\":", -1, 0, "the text ends too early at line 1, byte 6" },
    { "{" X "}garbage", -1, 8, "something follows" },
    { "{" X "," X "}", -1, 8, "header is not valid: key x is there twice" },
    { ENTRY("\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]"), -1, 8,
      "key dtype is there twice" },
    { "{\"\\ud800\":1}", -1, 0, "half a surrogate pair" },
    { "{\"\xff\":1}", -1, 0, "bytes that are not UTF-8" },
    { "{\"a\\u0000b\":1}", -1, 0, "a NUL in a text" },
    { "{\"a\\u001bb\":{}}", -1, 0, "tensor a?b: has a control character" },
    { "{\"x\":[[[[1]]]]}", -1, 0, "more than 3 levels" },
    { "{\"x\":7}", -1, 0, "tensor x: entry is not an object" },
    { "{\"__metadata__\":7}", -1, 0, "__metadata__ is not an object" },
    { "{\"__metadata__\":{\"a\":1}}", -1, 0, "__metadata__ key a: value is not a text" },
    { ENTRY("\"dtype\":\"F32\",\"shape\":[2]"), -1, 8, "has 2 of the 3 keys" },
    { ENTRY("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"extra\":1"), -1, 8,
      "unknown key extra" },
    { ENTRY("\"dtype\":\"F33\",\"shape\":[2],\"data_offsets\":[0,8]"), -1, 8,
     "dtype F33 is unknown" },
    { ENTRY("\"dtype\":32,\"shape\":[2],\"data_offsets\":[0,8]"), -1, 8, "dtype is not a text" },
    { ENTRY("\"dtype\":\"F32\",\"shape\":2,\"data_offsets\":[0,8]"), -1, 8, "shape is not a list" },
    { ENTRY("\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]"), -1, 8,
      "axis 0 of shape is not an integer from 0 to 2^53" },
    { ENTRY("\"dtype\":\"F32\",\"shape\":[2.0],\"data_offsets\":[0,8]"), -1, 8, "axis 0 of shape" },
    { ENTRY("\"dtype\":\"F32\",\"shape\":[1,9007199254740993],\"data_offsets\":[0,8]"), -1, 8,
      "axis 1 of shape" },
    { ENTRY("\"dtype\":\"F32\",\"shape\":[99999999999999999999],\"data_offsets\":[0,8]"), -1, 8,
      "an integer beyond 64 bits" },
    { ENTRY("\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]"), -1, 0,
      "beyond 64 bits" },
    { ENTRY("\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1],\"data_offsets\":[0,4]"), -1, 4,
      "rank is 7, more than 6" },
    { ENTRY("\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,2]"), -1, 2, "not whole bytes" },
    { ENTRY("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0]"), -1, 8, "not two integers" },
    { ENTRY("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,\"8\"]"), -1, 8,
     "not two integers" },
    { ENTRY("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]"), -1, 8,
      "data ends at 0, before it begins at 8" },
    { ENTRY("\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]"), -1, 8,
      "shape and dtype F32 need 12 bytes, data_offsets give 8" },
    { ENTRY("\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]"), -1, 16,
     "data begins at 8" },
    { "{" X "," Y(12, 20) "}", -1, 20,
     "tensor y: data begins at 12, but the data before it ends at 8" },
    { "{" X "," Y(4, 12) "}", -1, 12,
     "tensor y: data begins at 4, but the data before it reaches to 8" },
    { "{" X "}", -1, 9, "the tensors have 8 bytes, the file holds 9" },
    { "{" X "}", -1, 7, "the tensors have 8 bytes, the file holds 7" },
};

Test(files, hostile_files_are_refused_with_path_tensor_and_rule)
{
    static const char zeros[64];
    for (size_t i = 0; i < sizeof hostiles / sizeof hostiles[0]; i++) {
        const hostile *h = &hostiles[i];
        uint64_t said = h->length == -1 ? strlen(h->header) : (uint64_t)h->length;
        write_tensors(h->header, -1, zeros, (size_t)h->bytes);
        FILE *out = fopen(path, "r+b");
        fwrite(&said, 8, 1, out);
        fclose(out);
        long live = faults.live;
        fg_file *f = fg_file_open(path);
        cr_expect_eq(fg_file_status(f), FG_ERR_FORMAT, "%s was taken", h->header);
        cr_expect(strstr(fg_file_message(f), h->says), "%s: %s", h->header, fg_file_message(f));
        cr_expect(strstr(fg_file_message(f), path) == fg_file_message(f));
        cr_expect_eq(fg_file_count(f), 0);
        fg_file_close(f);
        cr_expect_eq(faults.live, live, "%s: %ld blocks leaked", h->header, faults.live - live);
    }
}

Test(files, too_long_a_name_and_too_many_tensors_are_refused)
{
    static char header[8 << 20];
    char *p = header + sprintf(header, "{\"");
    memset(p, 'n', 513);
    strcpy(p + 513, "\":{}}");
    write_tensors(header, -1, NULL, 0);
    fg_file *f = fg_file_open(path);
    cr_assert(strstr(fg_file_message(f), "is longer than 512 bytes"), "%s", fg_file_message(f));
    fg_file_close(f);
    p = header + sprintf(header, "{\"0\":1");
    for (int i = 1; i <= 100000; i++)
        p += sprintf(p, ",\"%d\":1", i);
    strcpy(p, "}");
    write_tensors(header, -1, NULL, 0);
    f = fg_file_open(path);
    cr_assert(strstr(fg_file_message(f), "lists 100001 tensors, more than 100000"), "%s",
              fg_file_message(f));
    fg_file_close(f);
    memset(header, ',', 5000000);
    header[0] = '{';
    header[5000000] = '\0';
    write_tensors(header, -1, NULL, 0);
    f = fg_file_open(path);
    cr_assert(strstr(fg_file_message(f), "more than 2000000"), "%s",
              fg_file_message(f));
    fg_file_close(f);
}

Test(files, what_is_no_file_is_refused)
{
    char fifo[128];
    const struct { const char *path, *says; } rows[] = {
        { "/nowhere/at/all", "cannot open: No such file" }, { folder, "is not a regular file" },
        { fifo, "is not a regular file" }, { "/dev/zero", "is not a regular file" },
        { NULL, "cannot open" }
    };
    snprintf(fifo, sizeof fifo, "%s/fifo", folder);
    cr_assert_eq(mkfifo(fifo, 0600), 0);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        fg_file *f = fg_file_open(rows[i].path);
        cr_expect_eq(fg_file_status(f), FG_ERR_IO);
        cr_expect(strstr(fg_file_message(f), rows[i].says), "%s", fg_file_message(f));
        fg_file_close(f);
    }
    for (size_t n = 0; n < 8; n++) {
        write_bytes("\0\0\0\0\0\0\0", n);
        fg_file *f = fg_file_open(path);
        cr_expect_eq(fg_file_status(f), FG_ERR_FORMAT);
        cr_expect(strstr(fg_file_message(f), "too few for a safetensors file"));
        fg_file_close(f);
    }
}

Test(files, every_truncation_of_a_good_file_is_refused)
{
    fg_array arrays[5];
    static char whole[2000];
    cr_assert_eq(fg_file_write(path, sample_arrays(arrays), arrays, message), FG_OK);
    FILE *in = fopen(path, "rb");
    size_t n = fread(whole, 1, sizeof whole, in);
    fclose(in);
    for (size_t cut = 0; cut < n; cut++) {
        write_bytes(whole, cut);
        fg_file *f = fg_file_open(path);
        cr_expect_eq(fg_file_status(f), FG_ERR_FORMAT, "%zu of %zu bytes were taken", cut, n);
        fg_file_close(f);
    }
}

Test(files, reading_refuses_what_would_lose_information)
{
    static const int64_t wide[] = { 1, INT64_C(1) << 31 };
    static const int32_t large[] = { (1 << 24) + 1 };
    float real;
    int32_t got[2];
    fg_file *f = open_values(HEAD("I64", 2, 16), wide, 16);
    cr_assert_eq(fg_file_read(f, "x", FG_I32, got, 8), FG_ERR_FORMAT);
    cr_assert(strstr(fg_file_message(f), "tensor x: value 2147483648 at 1 does not fit i32"));
    cr_assert_eq(fg_file_read(f, "x", FG_I32, got, 4), FG_ERR_USAGE);
    cr_assert(strstr(fg_file_message(f), "2 elements do not fill 4 bytes"));
    cr_assert_eq(fg_file_read(f, "y", FG_I32, got, 8), FG_ERR_USAGE);
    cr_assert(strstr(fg_file_message(f), "has no tensor y"));
    fg_file_close(f);
    f = open_values(HEAD("I32", 1, 4), large, 4);
    cr_assert_eq(fg_file_read(f, "x", FG_F32, &real, 4), FG_ERR_FORMAT);
    fg_file_close(f);
    f = open_values(HEAD("F32", 1, 4), large, 4);
    cr_assert_eq(fg_file_read(f, "x", FG_I32, got, 4), FG_ERR_DTYPE);
    cr_assert(strstr(fg_file_message(f), "F32 cannot be read as i32"));
    fg_file_close(f);
}

Test(files, foreign_dtypes_are_listed_but_not_read)
{
    static const struct { const char *header, *type; size_t bytes; } rows[] = {
        { HEAD("F64", 1, 8), "F64", 8 }, { HEAD("I16", 1, 2), "I16", 2 }, { HEAD("I8", 1, 1), "I8",
                                                                           1 },
        { HEAD("U32", 1, 4), "U32", 4 }, { HEAD("U64", 1, 8), "U64", 8 },
        { HEAD("F8_E4M3", 1, 1), "F8_E4M3", 1 }, { HEAD("F8_E5M2", 1, 1), "F8_E5M2", 1 },
        { HEAD("F4", 2, 1), "F4", 1 }, { HEAD("F6_E2M3", 4, 3), "F6_E2M3", 3 }
    };
    static const char zeros[8];
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        fg_file_entry e;
        float got[4];
        fg_file *f = open_values(rows[i].header, zeros, rows[i].bytes);
        cr_assert(fg_file_at(f, 0, &e));
        cr_assert_str_eq(e.type, rows[i].type);
        cr_assert_eq(e.bytes, (int64_t)rows[i].bytes);
        cr_assert_eq(fg_file_read(f, "x", FG_F32, got, 4), FG_ERR_FORMAT);
        cr_assert(strstr(fg_file_message(f), rows[i].type));
        cr_assert(strstr(fg_file_message(f), "cannot be read here"));
        fg_file_close(f);
    }
}

Test(files, a_file_that_shrinks_while_open_is_an_error_not_a_crash)
{
    float got[2];
    fg_file *f = open_values("{" X "}", "\0\0\0\0\0\0\0", 8);
    cr_assert_eq(truncate(path, 66), 0);
    cr_assert_eq(fg_file_read(f, "x", FG_F32, got, 8), FG_ERR_IO);
    cr_assert(strstr(fg_file_message(f), "file ends at byte 66, 4 bytes too early"), "%s",
              fg_file_message(f));
    fg_file_close(f);
}

Test(files, the_writer_refuses_what_the_reader_would)
{
    static char long_name[600];
    memset(long_name, 'n', sizeof long_name - 1);
    const struct { fg_array a; const char *says; } rows[] = {
        { { "tab\t", FG_F32, FG_DIMS(1), &scalar }, "control character" },
        { { "\xc0\x80", FG_F32, FG_DIMS(1), &scalar }, "not UTF-8" },
        { { "\xed\xa0\x80", FG_F32, FG_DIMS(1), &scalar }, "not UTF-8" },
        { { long_name, FG_F32, FG_DIMS(1), &scalar }, "longer than 512" },
        { { "__metadata__", FG_F32, FG_DIMS(1), &scalar }, "keeps for itself" },
        { { "x", FG_F32, FG_DIMS(-1), &scalar }, "a shape that no file can hold" },
        { { "x", FG_F32, FG_DIMS(INT64_MAX, 2), &scalar }, "a shape that no file can hold" },
        { { "x", FG_BF16, FG_DIMS(1), &scalar }, "only f32 and i32" },
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        cr_expect_neq(fg_file_write(path, 1, &rows[i].a, message), FG_OK);
        cr_expect(strstr(message, rows[i].says), "%s", message);
    }
    fg_array twice[2] = { { "x", FG_F32, FG_DIMS(1), &scalar }, { "x", FG_F32, FG_DIMS(1),
                                                                 &scalar } };
    cr_expect_eq(fg_file_write(path, 2, twice, message), FG_ERR_USAGE);
    cr_expect(strstr(message, "tensor x: is there twice"), "%s", message);
    cr_expect_eq(files_in_folder(), 0);
}

/* ---- failures of disk and memory ------------------------------------------------------------- */

static void expect_intact(const char *what, long k)
{
    float back[6];
    fg_file *f = fg_file_open(path);
    cr_expect_eq(fg_file_status(f), FG_OK, "%s %ld: %s", what, k, fg_file_message(f));
    cr_expect_eq(fg_file_read(f, "z.weight", FG_F32, back, 24), FG_OK, "%s %ld", what, k);
    cr_expect_eq(memcmp(back, reals, 24), 0, "%s %ld", what, k);
    fg_file_close(f);
    cr_expect_eq(files_in_folder(), 1, "%s %ld left a temporary file", what, k);
}

Test(files, each_failing_file_operation_leaves_the_old_file_and_nothing_else)
{
    fg_array arrays[5];
    int n = sample_arrays(arrays);
    bool came = true;
    cr_assert_eq(fg_file_write(path, n, arrays, message), FG_OK);
    for (long k = 1; came; k++) {
        faults_arm(FAULT_FULL, k);
        fg_status s = fg_file_write(path, n, arrays, message);
        came = faults_disarm();
        cr_assert(k < 100);
        /* closing the synced folder cannot harm the file any more */
        cr_expect(!came || s == FG_ERR_IO || strlen(message) == 0, "operation %ld: %s", k, message);
        cr_expect(s == FG_OK || strstr(message, "No space left"), "operation %ld: %s", k, message);
        expect_intact("operation", k);
    }
}

Test(files, short_writes_are_continued)
{
    fg_array arrays[5];
    faults_arm(FAULT_SHORT, 1);
    cr_assert_eq(fg_file_write(path, sample_arrays(arrays), arrays, message), FG_OK, "%s", message);
    faults_disarm();
    expect_intact("short", 0);
}

Test(files, a_full_disk_is_reported_and_cleaned_up)
{
    enum { N = 100000 };
    static float big[N];
    struct rlimit limit = { 20000, RLIM_INFINITY };
    fg_array arrays[5], one = { "big", FG_F32, FG_DIMS(N), big };
    cr_assert_eq(fg_file_write(path, sample_arrays(arrays), arrays, message), FG_OK);
    signal(SIGXFSZ, SIG_IGN);
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    cr_assert_eq(fg_file_write(path, 1, &one, message), FG_ERR_IO);
    cr_expect(strstr(message, "cannot write: File too large"), "%s", message);
    expect_intact("limit", 0);
}

Test(files, a_folder_that_cannot_be_written_is_reported)
{
    fg_array arrays[5];
    int n = sample_arrays(arrays);
    char inside[160];
    snprintf(inside, sizeof inside, "%s/file/x", folder);
    write_bytes("", 0);
    cr_expect_eq(fg_file_write(inside, n, arrays, message), FG_ERR_IO);
    cr_expect(strstr(message, "Not a directory"), "%s", message);
    cr_expect_eq(fg_file_write(folder, n, arrays, message), FG_ERR_IO);
    cr_expect(strstr(message, "is not a regular file"), "%s", message);
    cr_expect_eq(fg_file_write("/dev/null", n, arrays, message), FG_ERR_IO);
    cr_expect(strstr(message, "is not a regular file"), "%s", message);
    cr_assert_eq(unlink(path), 0);
    cr_assert_eq(chmod(folder, 0555), 0);
    if (geteuid() == 0)
        cr_assert_eq(seteuid(65534), 0);
    cr_expect_eq(fg_file_write(path, n, arrays, message), FG_ERR_IO);
    cr_expect(strstr(message, "cannot create a file beside it: Permission denied"), "%s", message);
    if (getuid() == 0)
        cr_assert_eq(seteuid(0), 0);
}

Test(files, each_failing_allocation_is_an_error_without_leak)
{
    fg_array arrays[5];
    int n = sample_arrays(arrays);
    bool came = true;
    for (long k = 1; came; k++) {
        long live = faults.live;
        faults_arm(FAULT_MEMORY, k);
        fg_status s = fg_file_write(path, n, arrays, message);
        came = faults_disarm();
        cr_expect_eq(s, came ? FG_ERR_MEMORY : FG_OK, "allocation %ld: %s", k, message);
        cr_expect_eq(faults.live, live, "allocation %ld of writing leaks", k);
    }
    came = true;
    for (long k = 1; came; k++) {
        long live = faults.live;
        faults_arm(FAULT_MEMORY, k);
        fg_file *f = fg_file_open(path);
        fg_status s = fg_file_status(f);
        came = faults_disarm();
        cr_assert(k < 1000);
        cr_expect_eq(s != FG_OK, came, "allocation %ld: %s", k, fg_file_message(f));
        fg_file_close(f);
        cr_expect_eq(faults.live, live, "allocation %ld of reading leaks", k);
    }
}
