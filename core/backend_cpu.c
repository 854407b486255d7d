/* backend_cpu.c - the CPU: memory of the process, kernels called in order, threads inside kernels.
 *
 * f32 and bf16 tensors are kept as fg_real; a bf16 result is rounded to bf16 after its node, so a
 * bf16 graph on the CPU is an oracle for the same graph on a GPU. */
#define _GNU_SOURCE                      /* dladdr */
#include <dlfcn.h>
#include <omp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include "backend.h"

fg_status fg__backend_fail(fg_backend *b, fg_status s, const char *fmt, ...)
{
    if (b->status) return b->status;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(b->message, sizeof b->message, fmt, ap);
    va_end(ap);
    return b->status = s;
}

static void *cpu_alloc(fg_backend *b, size_t bytes)
{
    (void)b;
    void *p = NULL;
    if (bytes > SIZE_MAX / 2) return NULL;
    p = malloc(bytes + 64 + sizeof(void *));
    if (!p) return NULL;
    char *at = (char *)(((uintptr_t)p + sizeof(void *) + 63) & ~(uintptr_t)63);
    memcpy(at - sizeof p, &p, sizeof p);
    return at;
}

static void cpu_free(fg_backend *b, void *p)
{
    (void)b;
    if (!p) return;
    void *whole;
    memcpy(&whole, (char *)p - sizeof whole, sizeof whole);
    free(whole);
}

static float to_bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    if ((u & 0x7fffffffu) <= 0x7f800000u) u = (u + 0x7fffu + ((u >> 16) & 1)) & 0xffff0000u;
    memcpy(&x, &u, sizeof x);
    return x;
}

static fg_status cpu_upload(fg_backend *b, void *to, const void *from, int64_t count, fg_dtype t)
{
    (void)b;
    if (t == FG_I32) { if (count) memcpy(to, from, (size_t)count * sizeof(int32_t)); return FG_OK; }
    fg_real *y = to;
    const float *x = from;
    for (int64_t i = 0; i < count; i++) y[i] = t == FG_BF16 ? to_bf16(x[i]) : x[i];
    return FG_OK;
}

static fg_status cpu_download(fg_backend *b, void *to, const void *from, int64_t count, fg_dtype t)
{
    (void)b;
    if (t == FG_I32) { if (count) memcpy(to, from, (size_t)count * sizeof(int32_t)); return FG_OK; }
    float *y = to;
    const fg_real *x = from;
    for (int64_t i = 0; i < count; i++) y[i] = (float)x[i];
    return FG_OK;
}

static fg_status cpu_clear(fg_backend *b, void *to, size_t bytes)
{
    (void)b;
    memset(to, 0, bytes);
    return FG_OK;
}

static const char *cpu_unfit(fg_backend *b, const fg_op *op, const fg_infer *c)
{
    (void)b; (void)c;
    return op->code->cpu ? NULL : "the CPU has no kernel for it";
}

static size_t cpu_scratch(fg_backend *b, const fg_op *op, const fg_infer *c)
{
    return op->code->scratch ? op->code->scratch(c, b->threads) : 0;
}

static fg_status cpu_launch(fg_backend *b, const fg_op *op, const fg_exec *e)
{
    (void)b;
    op->code->cpu(e);
    for (int o = 0; o < e->n_out; o++) {
        if (e->out_type[o] != FG_BF16) continue;
        fg_real *y = e->out[o];
        for (int64_t i = 0, n = fg_shape_count(e->out_shape[o]); i < n; i++)
            y[i] = to_bf16((float)y[i]);
    }
    return FG_OK;
}

static fg_status cpu_sync(fg_backend *b) { (void)b; return FG_OK; }
static void cpu_close(fg_backend *b) { (void)b; }

void fg__cpu_open(fg_backend *b)
{
    static const fg_backend_ops ops = {
        .alloc = cpu_alloc, .free = cpu_free, .upload = cpu_upload, .download = cpu_download,
        .clear = cpu_clear, .unfit = cpu_unfit, .scratch = cpu_scratch, .launch = cpu_launch,
        .sync = cpu_sync, .close = cpu_close,
    };
    b->ops = &ops;
    if (b->threads <= 0) b->threads = omp_get_max_threads();
    for (int t = 0; t < FG_DTYPE_COUNT; t++)
        b->size_of[t] = t == FG_I32 ? sizeof(int32_t) : sizeof(fg_real);
}

/* Other devices live in shared objects of their own, so that one install runs on machines without
 * their drivers: beside this library, or where the loader looks. */
static void *open_beside(const char *file)
{
    Dl_info here;
    char path[4096];
    void *self = NULL;
    *(fg_backend *(**)(const char *, int))&self = fg_backend_open;
    if (!dladdr(self, &here) || !here.dli_fname) return NULL;
    const char *slash = strrchr(here.dli_fname, '/');
    const int folder = slash ? (int)(slash - here.dli_fname) + 1 : 0;
    const int n = snprintf(path, sizeof path, "%.*s%s", folder, here.dli_fname, file);
    struct stat st;
    if (!folder || n < 0 || (size_t)n >= sizeof path || stat(path, &st)) return NULL;
    return dlopen(path, RTLD_NOW | RTLD_LOCAL);
}

static void open_loaded(fg_backend *b, const char *kind)
{
    char file[64];
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (!driver) {                       /* cheaper to find out than by loading the backend */
        fg__backend_fail(b, FG_ERR_DEVICE, "no %s backend: the NVIDIA driver (libcuda.so.1) is not "
                         "there", kind);
        return;
    }
    dlclose(driver);
    snprintf(file, sizeof file, "libfox-graph-%s.so", kind);
    dlerror();
    void *so = open_beside(file);
    const char *why = dlerror();
    if (!so && !why) {
        so = dlopen(file, RTLD_NOW | RTLD_LOCAL);
        why = dlerror();
    }
    if (!so) {
        fg__backend_fail(b, FG_ERR_DEVICE, "no %s backend: %s", kind, why ? why : file);
        return;
    }
    char symbol[64];
    snprintf(symbol, sizeof symbol, "fg__%s_open", kind);
    void (*open)(fg_backend *) = NULL;
    *(void **)&open = dlsym(so, symbol);
    if (b->threads <= 0) b->threads = omp_get_max_threads();      /* for work on the host */
    if (open) open(b);
    else fg__backend_fail(b, FG_ERR_DEVICE, "no %s backend: %s lacks %s", kind, file, symbol);
}

fg_backend *fg_backend_open(const char *name, int threads)
{
    fg_backend *b = calloc(1, sizeof *b);
    if (!b) return NULL;
    if (!name) name = "cpu";
    snprintf(b->name, sizeof b->name, "%s", name);
    b->threads = threads;
    if (threads < 0 || threads > 4096)
        fg__backend_fail(b, FG_ERR_USAGE, "%d threads: the number must be between 0 and 4096",
                         threads);
    else if (!strcmp(name, "cpu")) fg__cpu_open(b);
    else if (!strncmp(name, "cuda", 4) && (!name[4] || name[4] == ':')) open_loaded(b, "cuda");
    else
        fg__backend_fail(b, FG_ERR_USAGE,
                         "no device is called \"%.20s\"; there are cpu, cuda and cuda:N", name);
    return b;
}

void fg_backend_close(fg_backend *b)
{
    if (!b) return;
    if (b->ops) b->ops->close(b);
    free(b);
}

fg_status   fg_backend_status(const fg_backend *b) { return b ? b->status : FG_ERR_MEMORY; }
const char *fg_backend_message(const fg_backend *b)
{
    return !b ? fg_status_text(FG_ERR_MEMORY) : b->status ? b->message : fg_status_text(FG_OK);
}
const char *fg_backend_name(const fg_backend *b) { return b ? b->name : "none"; }
const char *fg_backend_device(const fg_backend *b) { return b ? b->device : ""; }
size_t      fg_backend_memory(fg_backend *b, size_t *total)
{
    *total = 0;
    return b && b->ops && b->ops->memory ? b->ops->memory(b, total) : 0;
}
int         fg_backend_threads(const fg_backend *b) { return b ? b->threads : 0; }
