/* fuzz_safetensors.c - any bytes as a safetensors file: refused with a message, or read whole, into
 * arrays and into a store, within the file's size. */
#include "fox_core.h"
#include "fuzz.h"

/* Every entry as float and as int32_t. */
static int64_t read_all(fg_file *f)
{
    int64_t bytes = 0;
    fg_file_entry e;
    for (int i = 0; fg_file_at(f, i, &e); i++) {
        size_t n = (size_t)fg_shape_count(e.shape) * 4;
        fg_file_entry again;
        HOLDS(fg_file_find(f, e.name, &again) && again.bytes == e.bytes);
        void *values = malloc(n + 1);
        for (int as = 0; as < 2; as++)
            if (fg_file_read(f, e.name, as ? FG_I32 : FG_F32, values, n))
                HOLDS(strlen(fg_file_message(f)) > 0);
        free(values);
        bytes += e.bytes;
    }
    return bytes;
}

static void load(const char *path)
{
    fg_backend *cpu = fg_backend_open("cpu", 1);
    fg_store *s = fg_store_new(cpu);
    static const float x[2] = { 1, 2 };
    for (int fresh = 0; fresh < 2; fresh++) {
        if (fg_store_load(s, path, ""))
            HOLDS(strlen(fg_store_message(s)) > 0);
        fg_store_clear_error(s);
        fg_store_put(s, "x", FG_F32, FG_DIMS(2), x);
        fg_store_clear_error(s);
    }
    fg_store_free(s);
    fg_backend_close(cpu);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    char path[128];
    fuzz_write(fuzz_path("file", path), data, n);
    fg_file *f = fg_file_open(path);
    if (fg_file_status(f))
        HOLDS(fg_file_count(f) == 0 && strlen(fg_file_message(f)) > strlen(path));
    else
        HOLDS(read_all(f) <= (int64_t)n - 8);
    bool good = !fg_file_status(f);
    fg_file_close(f);
    if (good)
        load(path);
    return 0;
}
