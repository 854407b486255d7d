/* backend_cuda.cu - an NVIDIA GPU as a device: memory, copies, launches on one stream, CUDA graphs.
 *
 * This shared object is opened on demand by core/backend_cpu.c and refers to nothing of the
 * library: what it needs comes in by fg__cuda_open.  f32 values are float on the device, bf16
 * values __nv_bfloat16; host data are float, converted in a staging buffer on the way. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "backend.h"
#include "gemm.cuh"
#include "kernel.cuh"

enum {
    RING = 2, SLOT = 8 << 20,            /* staging buffers, bytes of one */
    MAP = 512, LEAST = 80,               /* LEAST: compute capability 8.0 */
    WAITING = 512,                       /* nodes that are launched at once, at most */
    LETTERS = 256, MAIL = 1024           /* small values on their way to the host; floats of them */
};

typedef struct { const fg_op *op; const fg_kernel *kernel; } entry;
typedef struct { void *to; int64_t first, count; } letter;

typedef struct {
    int           device;
    cudaStream_t  stream;
    char         *slot[RING];            /* pinned; copies go through them in turn */
    cudaEvent_t   free_slot[RING];
    int           next;
    cudaEvent_t  *marks;
    int           n_marks;
    entry         map[MAP];              /* hash table: op -> kernel */
    float        *mail;                  /* pinned: what download_later copies to first */
    letter        letters[LETTERS];
    int           n_letters;
    const fg_kernel *many;               /* of the nodes that wait */
    const fg_exec *waiting[WAITING];
    int           n_waiting;
} cuda;

const fg_kernel *fg_kernel_of(const char *op);       /* table.cu */

static fg_status fail(fg_backend *b, fg_status s, const char *fmt, ...) FG_PRINTF(3, 4);
static fg_status fail(fg_backend *b, fg_status s, const char *fmt, ...)
{
    if (b->status) return b->status;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(b->message, sizeof b->message, fmt, ap);
    va_end(ap);
    return b->status = s;
}

static fg_status check(fg_backend *b, cudaError_t e, const char *act)
{
    if (e == cudaSuccess) return FG_OK;
    (void)cudaGetLastError();
    return fail(b, e == cudaErrorMemoryAllocation ? FG_ERR_MEMORY : FG_ERR_DEVICE, "%s: %s", act,
                cudaGetErrorString(e));
}

static cuda *of(fg_backend *b) { return (cuda *)b->impl; }

static fg_status cuda_sync(fg_backend *b);
static fg_status send_waiting(fg_backend *b);

/* ---- memory --------------------------------------------------------------------------------- */

static void *cuda_alloc(fg_backend *b, size_t bytes)
{
    void *p = NULL;
    cudaSetDevice(of(b)->device);
    if (cudaMalloc(&p, bytes ? bytes : 1) == cudaSuccess) return p;
    (void)cudaGetLastError();            /* the caller says what did not fit */
    return NULL;
}

static void cuda_free(fg_backend *b, void *p)
{
    if (!p) return;
    cudaSetDevice(of(b)->device);
    cuda_sync(b);
    cudaFree(p);
}

static size_t cuda_memory(fg_backend *b, size_t *total)
{
    size_t left = 0;
    cudaSetDevice(of(b)->device);
    *total = 0;
    if (cudaMemGetInfo(&left, total) != cudaSuccess) (void)cudaGetLastError();
    return left;
}

/* ---- copies --------------------------------------------------------------------------------- */

static uint16_t to_bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(u >> 16 | 0x40);      /* NaN stays NaN */
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

/* In order with the launches, without waiting for them, but for a slot that is still in use. */
static fg_status cuda_upload(fg_backend *b, void *to, const void *from, int64_t count, fg_dtype t)
{
    cuda *c = of(b);
    const int64_t size = (int64_t)b->size_of[t], most = SLOT / size;
    cudaSetDevice(c->device);
    if (send_waiting(b)) return b->status;
    for (int64_t at = 0; at < count; at += most) {
        const int64_t n = count - at < most ? count - at : most;
        char *slot = c->slot[c->next];
        cudaError_t e = cudaEventSynchronize(c->free_slot[c->next]);
        const float *x = (const float *)from + at;
        if (t == FG_BF16)
            for (int64_t i = 0; i < n; i++) ((uint16_t *)slot)[i] = to_bf16(x[i]);
        else memcpy(slot, x, (size_t)(n * 4));
        if (!e) e = cudaMemcpyAsync((char *)to + at * size, slot, (size_t)(n * size),
                                    cudaMemcpyHostToDevice, c->stream);
        if (!e) e = cudaEventRecord(c->free_slot[c->next], c->stream);
        if (e) return check(b, e, "copy to the GPU");
        c->next = (c->next + 1) % RING;
    }
    return FG_OK;
}

static void deliver(cuda *c)
{
    for (int i = 0; i < c->n_letters; i++)
        memcpy(c->letters[i].to, c->mail + c->letters[i].first,
               (size_t)c->letters[i].count * sizeof(float));
    c->n_letters = 0;
}

static fg_status cuda_download(fg_backend *b, void *to, const void *from, int64_t count, fg_dtype t)
{
    cuda *c = of(b);
    const int64_t size = (int64_t)b->size_of[t], most = SLOT / size;
    cudaSetDevice(c->device);
    if (send_waiting(b)) return b->status;
    for (int64_t at = 0; at < count; at += most) {
        const int64_t n = count - at < most ? count - at : most;
        char *slot = c->slot[c->next];
        float *y = (float *)to + at;
        cudaError_t e = cudaEventSynchronize(c->free_slot[c->next]);
        if (!e) e = cudaMemcpyAsync(slot, (const char *)from + at * size, (size_t)(n * size),
                                    cudaMemcpyDeviceToHost, c->stream);
        if (!e) e = cudaStreamSynchronize(c->stream);
        if (e) return check(b, e, "copy from the GPU");
        deliver(c);
        if (t != FG_BF16) memcpy(y, slot, (size_t)(n * 4));
        else
            for (int64_t i = 0; i < n; i++) {
                const uint32_t u = (uint32_t)((const uint16_t *)slot)[i] << 16;
                memcpy(y + i, &u, sizeof u);
            }
    }
    return FG_OK;
}

static fg_status cuda_download_later(fg_backend *b, void *to, const void *from, int64_t count,
                                     fg_dtype t)
{
    cuda *c = of(b);
    const letter *last = c->n_letters ? &c->letters[c->n_letters - 1] : NULL;
    const int64_t first = last ? last->first + last->count : 0;
    if (t == FG_BF16 || first + count > MAIL || c->n_letters == LETTERS)
        return cuda_download(b, to, from, count, t);
    c->letters[c->n_letters++] = { to, first, count };
    cudaSetDevice(c->device);
    if (send_waiting(b)) return b->status;
    return check(b, cudaMemcpyAsync(c->mail + first, from, (size_t)count * sizeof(float),
                                    cudaMemcpyDeviceToHost, c->stream), "copy from the GPU");
}

static fg_status cuda_clear(fg_backend *b, void *to, size_t bytes)
{
    cudaSetDevice(of(b)->device);
    if (send_waiting(b)) return b->status;
    return check(b, cudaMemsetAsync(to, 0, bytes, of(b)->stream), "clear");
}

/* ---- launches ------------------------------------------------------------------------------- */

static const fg_kernel *kernel_of(fg_backend *b, const fg_op *op)
{
    entry *map = of(b)->map;
    size_t i = (size_t)((uintptr_t)op >> 4) * 0x9e3779b97f4a7c15u >> 55;
    for (; map[i % MAP].op && map[i % MAP].op != op; i++) { }
    entry *e = &map[i % MAP];
    if (!e->op) *e = { op, fg_kernel_of(op->name) };
    return e->kernel;
}

static const char *cuda_unfit(fg_backend *b, const fg_op *op, const fg_infer *c)
{
    const fg_kernel *k = kernel_of(b, op);
    if (op->code->memory == FG_VIEW) return NULL;
    if (!k) return "the CUDA backend has no kernel for it";
    return k->unfit ? k->unfit(c) : NULL;
}

static bool cuda_pitched(fg_backend *b, const fg_op *op, int i, bool output)
{
    const fg_kernel *k = kernel_of(b, op);
    return k && ((output ? k->pitched_out : k->pitched_in) >> i & 1);
}

static size_t cuda_scratch(fg_backend *b, const fg_op *op, const fg_infer *c)
{
    const fg_kernel *k = kernel_of(b, op);
    return k && k->scratch && op->code->memory != FG_VIEW ? k->scratch(c) : 0;
}

static fg_status launched(fg_backend *b)
{
    const char *refused = fg_gemm_failure();
    if (refused) return fail(b, FG_ERR_DEVICE, "%s", refused);
    return check(b, cudaGetLastError(), "launch");
}

/* Nodes that can go together wait here for more of their kind. */
static fg_status send_waiting(fg_backend *b)
{
    cuda *c = of(b);
    if (!c->n_waiting) return FG_OK;
    c->many->launch_many(c->waiting, c->n_waiting, c->stream);
    c->n_waiting = 0;
    return launched(b);
}

static fg_status cuda_launch(fg_backend *b, const fg_op *op, const fg_exec *e)
{
    cuda *c = of(b);
    const fg_kernel *k = kernel_of(b, op);
    cudaSetDevice(c->device);
    const bool joins = c->n_waiting && k->launch_many == c->many->launch_many;
    if (c->n_waiting && (!joins || c->n_waiting == WAITING) && send_waiting(b)) return b->status;
    if (k->launch_many) {
        c->many = k;
        c->waiting[c->n_waiting++] = e;
        return FG_OK;
    }
    k->launch(e, c->stream);
    return launched(b);
}

static fg_status cuda_sync(fg_backend *b)
{
    if (send_waiting(b)) return b->status;
    cudaSetDevice(of(b)->device);
    const fg_status s = check(b, cudaStreamSynchronize(of(b)->stream), "run");
    if (!s) deliver(of(b));
    return s;
}

static fg_status cuda_record(fg_backend *b)
{
    if (send_waiting(b)) return b->status;
    cudaSetDevice(of(b)->device);
    return check(b, cudaStreamBeginCapture(of(b)->stream, cudaStreamCaptureModeThreadLocal),
                 "record");
}

static fg_status cuda_recorded(fg_backend *b, void **recording)
{
    cudaGraph_t graph = NULL;
    cudaGraphExec_t whole = NULL;
    send_waiting(b);
    cudaError_t e = cudaStreamEndCapture(of(b)->stream, &graph);
    if (!e && !b->status) e = cudaGraphInstantiate(&whole, graph, 0);
    if (!e && whole) e = cudaGraphUpload(whole, of(b)->stream);
    if (graph) cudaGraphDestroy(graph);
    *recording = whole;
    return check(b, e, "record");
}

static fg_status cuda_replay(fg_backend *b, void *recording)
{
    cudaSetDevice(of(b)->device);
    if (send_waiting(b)) return b->status;
    return check(b, cudaGraphLaunch((cudaGraphExec_t)recording, of(b)->stream), "replay");
}

static void cuda_forget(fg_backend *b, void *recording)
{
    cudaSetDevice(of(b)->device);
    cudaStreamSynchronize(of(b)->stream);
    cudaGraphExecDestroy((cudaGraphExec_t)recording);
}

static fg_status cuda_mark(fg_backend *b, int i)
{
    cuda *c = of(b);
    if (i >= c->n_marks) {
        const int n = i + i / 2 + 64;
        cudaEvent_t *more = (cudaEvent_t *)realloc(c->marks, (size_t)n * sizeof *more);
        if (!more) return fail(b, FG_ERR_MEMORY, "out of memory for %d marks", n);
        c->marks = more;
        for (; c->n_marks < n; c->n_marks++) {
            const cudaError_t e = cudaEventCreate(&c->marks[c->n_marks]);
            if (e) return check(b, e, "mark");
        }
    }
    if (send_waiting(b)) return b->status;
    return check(b, cudaEventRecord(c->marks[i], c->stream), "mark");
}

static double cuda_elapsed(fg_backend *b, int i, int j)
{
    float ms = 0;
    if (cudaEventElapsedTime(&ms, of(b)->marks[i], of(b)->marks[j])) (void)cudaGetLastError();
    return ms * 1e-3;
}

/* ---- open and close ------------------------------------------------------------------------- */

static void cuda_close(fg_backend *b)
{
    cuda *c = of(b);
    if (!c) return;
    cudaSetDevice(c->device);
    if (c->stream) cudaStreamSynchronize(c->stream);
    fg_gemm_close();
    for (int i = 0; i < RING; i++) {
        if (c->free_slot[i]) cudaEventDestroy(c->free_slot[i]);
        if (c->slot[i]) cudaFreeHost(c->slot[i]);
    }
    if (c->mail) cudaFreeHost(c->mail);
    for (int i = 0; i < c->n_marks; i++) cudaEventDestroy(c->marks[i]);
    if (c->stream) cudaStreamDestroy(c->stream);
    (void)cudaGetLastError();
    free(c->marks);
    free(c);
    b->impl = NULL;
}

static fg_status choose_device(fg_backend *b, int *device)
{
    int n = 0;
    const cudaError_t e = cudaGetDeviceCount(&n);
    (void)cudaGetLastError();
    if (e == cudaErrorInsufficientDriver || e == cudaErrorNoDevice || (!e && n == 0))
        return fail(b, FG_ERR_DEVICE, "no CUDA device: %s",
                    e == cudaErrorInsufficientDriver ? "the NVIDIA driver is missing or too old"
                                                     : "the driver sees no GPU");
    if (e) return fail(b, FG_ERR_DEVICE, "no CUDA device: %s", cudaGetErrorString(e));
    char *end = NULL;
    const long wanted = b->name[4] ? strtol(b->name + 5, &end, 10) : 0;
    if (end && (end == b->name + 5 || *end))
        return fail(b, FG_ERR_USAGE, "\"%s\" names no device; write cuda:0 for the first", b->name);
    if (wanted < 0 || wanted >= n)
        return fail(b, FG_ERR_DEVICE, "there is no %s: the driver sees %d GPU%s", b->name, n,
                    n == 1 ? "" : "s");
    *device = (int)wanted;
    return FG_OK;
}

/* Runs where the rest runs: every file is compiled for the same architectures. */
static __global__ void nothing() { }

static fg_status check_card(fg_backend *b, int device)
{
    cudaDeviceProp p;
    cudaFuncAttributes a;
    cudaError_t e = cudaGetDeviceProperties(&p, device);
    if (e) return check(b, e, "look at the GPU");
    snprintf(b->device, sizeof b->device, "%.127s", p.name);
    if (10 * p.major + p.minor < LEAST)
        return fail(b, FG_ERR_DEVICE, "%s has compute capability %d.%d; 8.0 or later is needed",
                    p.name, p.major, p.minor);
    e = cudaSetDevice(device);
    if (!e) e = cudaFuncGetAttributes(&a, nothing);
    if (!e) return FG_OK;
    (void)cudaGetLastError();
    if (e == cudaErrorNoKernelImageForDevice || e == cudaErrorInvalidDeviceFunction ||
        e == cudaErrorUnsupportedPtxVersion || e == cudaErrorJitCompilationDisabled)
        return fail(b, FG_ERR_DEVICE, "%s is not supported: libfox-graph-cuda.so has no code for "
                    "its compute capability %d.%d (%s)", p.name, p.major, p.minor,
                    cudaGetErrorString(e));
    return check(b, e, "look at the GPU");
}

static fg_status open_device(fg_backend *b, cuda *c)
{
    cudaError_t e = cudaSetDevice(c->device);
    if (!e) e = cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking);
    for (int i = 0; i < RING && !e; i++) {
        e = cudaMallocHost((void **)&c->slot[i], SLOT);
        if (!e) e = cudaEventCreateWithFlags(&c->free_slot[i], cudaEventDisableTiming);
    }
    if (!e) e = cudaMallocHost((void **)&c->mail, MAIL * sizeof(float));
    if (e) return check(b, e, "open the GPU");
    if (fg_gemm_open()) return fail(b, FG_ERR_DEVICE, "cuBLASLt could not be started");
    return FG_OK;
}

extern "C" __attribute__((visibility("default"))) void fg__cuda_open(fg_backend *b)
{
    static const fg_backend_ops ops = {
        .alloc = cuda_alloc, .free = cuda_free, .upload = cuda_upload, .download = cuda_download,
        .clear = cuda_clear, .unfit = cuda_unfit, .scratch = cuda_scratch, .launch = cuda_launch,
        .sync = cuda_sync, .close = cuda_close, .pitched = cuda_pitched,
        .download_later = cuda_download_later, .record = cuda_record,
        .recorded = cuda_recorded, .replay = cuda_replay, .forget = cuda_forget, .mark = cuda_mark,
        .elapsed = cuda_elapsed, .memory = cuda_memory,
    };
    int device = 0;
    if (choose_device(b, &device) || check_card(b, device)) return;
    cuda *c = (cuda *)calloc(1, sizeof *c);
    if (!c) { fail(b, FG_ERR_MEMORY, "out of memory"); return; }
    c->device = device;
    b->impl = c;
    if (open_device(b, c)) { cuda_close(b); return; }
    b->size_of[FG_F32] = 4;
    b->size_of[FG_BF16] = 2;
    b->size_of[FG_I32] = 4;
    b->fuses = true;
    b->ops = &ops;
}
