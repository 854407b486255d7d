/* gemm.cu - matrix products through cuBLASLt, and the choice among its algorithms.
 *
 * cuBLASLt is column-major: y = op(a) op(b) in rows is y^T = op(b)^T op(a)^T in columns, so b is
 * its first matrix, a its second, and the bias runs along its rows. */
#include <cublasLt.h>
#include <mutex>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "gemm.cuh"

enum {
    DEVICES = 16,
    SHAPES = 4096,                   /* remembered; later ones run the heuristic's first choice */
    CANDIDATES = 8, RUNS = 3,        /* candidates measured, and runs of each: the least counts */
    EVEN = 8, LARGE = 512            /* an extent over LARGE that is no multiple of EVEN is cut: in
                                        bf16 a product with 50257 runs at a seventh of the speed of
                                        one with 50256 (H100, cuBLASLt 13.1, 2026-11) */
};
static const float OTHER_BITS = 0.9f;          /* of the time, to be worth other bits */

typedef struct {                     /* all that a choice depends on; compared as bytes */
    int64_t M, N, K, pitch_a, pitch_b, pitch_y, batch, step_a, step_b, step_y;
    int32_t device, flags, align_a, align_b, align_y, align_bias;
} shape_key;

typedef struct {
    shape_key key;
    cublasLtMatmulAlgo_t algo;
    bool used, measured;
} choice;

/* The library's handles and the choices made, one set for the process. */
static struct {
    std::mutex lock;
    cublasLtHandle_t handle[DEVICES];
    int users[DEVICES];
    choice *choices;
    int n_choices;
    bool failed;
    char failure[240], told[240];
} lt;

static int device_now()
{
    int device = 0;
    return cudaGetDevice(&device) == cudaSuccess && device < DEVICES ? device : -1;
}

fg_status fg_gemm_open(void)
{
    const std::lock_guard<std::mutex> hold(lt.lock);
    const int device = device_now();
    if (device < 0) return FG_ERR_DEVICE;
    if (!lt.choices) lt.choices = (choice *)calloc(SHAPES, sizeof(choice));
    if (!lt.choices) return FG_ERR_MEMORY;
    if (lt.users[device] == 0 && cublasLtCreate(&lt.handle[device]) != CUBLAS_STATUS_SUCCESS)
        return FG_ERR_DEVICE;
    lt.users[device]++;
    return FG_OK;
}

void fg_gemm_close(void)
{
    const std::lock_guard<std::mutex> hold(lt.lock);
    const int device = device_now();
    if (device < 0 || lt.users[device] == 0) return;
    if (--lt.users[device] == 0) cublasLtDestroy(lt.handle[device]);
    int users = 0;
    for (int i = 0; i < DEVICES; i++) users += lt.users[i];
    if (users > 0) return;
    free(lt.choices);
    lt.choices = nullptr;
    lt.n_choices = 0;
}

const char *fg_gemm_failure(void)
{
    const std::lock_guard<std::mutex> hold(lt.lock);
    if (!lt.failed) return nullptr;
    memcpy(lt.told, lt.failure, sizeof lt.told);
    lt.failed = false;
    return lt.told;
}

static void note_failure(const fg_gemm_call *g, cublasStatus_t s)
{
    if (lt.failed) return;
    lt.failed = true;
    snprintf(lt.failure, sizeof lt.failure,
             "cuBLASLt refuses a product [%lld,%lld] x [%lld,%lld] of %s to %s: %s",
             (long long)g->M, (long long)g->K, (long long)g->K, (long long)g->N,
             fg_type_name(g->type), fg_type_name(g->y_type), cublasLtGetStatusString(s));
}

/* ---- descriptions --------------------------------------------------------------------------- */

typedef struct {
    cublasLtMatmulDescOpaque_t op;
    cublasLtMatrixLayoutOpaque_t first, second, result;
} description;

static cudaDataType cuda_type(fg_dtype t) { return t == FG_BF16 ? CUDA_R_16BF : CUDA_R_32F; }

/* The stored matrix of rows x columns as cuBLASLt sees it: columns x rows. */
static void lay_out(cublasLtMatrixLayoutOpaque_t *m, fg_dtype type, int64_t rows, int64_t columns,
                    int64_t pitch, int64_t batch, int64_t step)
{
    const int32_t count = (int32_t)batch;
    cublasLtMatrixLayoutInit(m, cuda_type(type), (uint64_t)columns, (uint64_t)rows, pitch);
    cublasLtMatrixLayoutSetAttribute(m, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count);
    cublasLtMatrixLayoutSetAttribute(m, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &step,
                                     sizeof step);
}

static void describe(const fg_gemm_call *g, description *d)
{
    const cublasOperation_t first = g->tb ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t second = g->ta ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtMatmulDescInit(&d->op, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatmulDescSetAttribute(&d->op, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first);
    cublasLtMatmulDescSetAttribute(&d->op, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second);
    if (g->bias) {
        const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
        const int32_t type = cuda_type(g->y_type);
        cublasLtMatmulDescSetAttribute(&d->op, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue,
                                       sizeof epilogue);
        cublasLtMatmulDescSetAttribute(&d->op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &g->bias,
                                       sizeof g->bias);
        cublasLtMatmulDescSetAttribute(&d->op, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &type,
                                       sizeof type);
    }
    lay_out(&d->first, g->type, g->tb ? g->N : g->K, g->tb ? g->K : g->N, g->pitch_b, g->batch,
            g->step_b);
    lay_out(&d->second, g->type, g->ta ? g->K : g->M, g->ta ? g->M : g->K, g->pitch_a, g->batch,
            g->step_a);
    lay_out(&d->result, g->y_type, g->M, g->N, g->pitch_y, g->batch, g->step_y);
}

/* The greatest power of two, at most 256, that divides an address. */
static int32_t align_of(const void *p)
{
    const uintptr_t bits = (uintptr_t)p | 256;
    return (int32_t)(bits & (~bits + 1));
}

static shape_key key_of(const fg_gemm_call *g, int device)
{
    shape_key k;
    memset(&k, 0, sizeof k);
    k.M = g->M, k.N = g->N, k.K = g->K, k.batch = g->batch;
    k.pitch_a = g->pitch_a, k.pitch_b = g->pitch_b, k.pitch_y = g->pitch_y;
    k.step_a = g->step_a, k.step_b = g->step_b, k.step_y = g->step_y;
    k.device = device;
    k.flags = g->ta | g->tb << 1 | (g->type == FG_BF16) << 2 | (g->y_type == FG_BF16) << 3;
    k.align_a = align_of(g->a), k.align_b = align_of(g->b), k.align_y = align_of(g->y);
    k.align_bias = g->bias ? align_of(g->bias) : 0;
    return k;
}

/* The entry of a shape, free or used; NULL where the table is full. */
static choice *find(const shape_key *key)
{
    uint64_t h = 14695981039346656037u;
    for (size_t i = 0; i < sizeof *key; i++) h = (h ^ ((const uint8_t *)key)[i]) * 1099511628211u;
    for (int64_t i = (int64_t)(h % SHAPES), n = 0; n < SHAPES; i = (i + 1) % SHAPES, n++) {
        choice *c = &lt.choices[i];
        if (!c->used) return lt.n_choices < SHAPES / 2 ? c : nullptr;
        if (memcmp(&c->key, key, sizeof *key) == 0) return c;
    }
    return nullptr;
}

/* ---- candidates ----------------------------------------------------------------------------- */

/* Partial sums of a split K are kept in f32 and added in order, never in the type of y. */
static int candidates(cublasLtHandle_t handle, description *d, const shape_key *key,
                      cublasLtMatmulHeuristicResult_t *result)
{
    cublasLtMatmulPreferenceOpaque_t prefer;
    const uint64_t bytes = FG_GEMM_WORK;
    const uint32_t sums = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    const struct { cublasLtMatmulPreferenceAttributes_t name; uint32_t value; } align[] = {
        { CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, (uint32_t)key->align_b },
        { CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, (uint32_t)key->align_a },
        { CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, (uint32_t)key->align_y },
        { CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, (uint32_t)key->align_y },
    };
    cublasLtMatmulPreferenceInit(&prefer);
    cublasLtMatmulPreferenceSetAttribute(&prefer, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes,
                                         sizeof bytes);
    cublasLtMatmulPreferenceSetAttribute(&prefer, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                         &sums, sizeof sums);
    for (const auto &x : align)
        cublasLtMatmulPreferenceSetAttribute(&prefer, x.name, &x.value, sizeof x.value);
    int n = 0;
    const cublasStatus_t s = cublasLtMatmulAlgoGetHeuristic(
        handle, &d->op, &d->first, &d->second, &d->result, &d->result, &prefer, CANDIDATES, result,
        &n);
    int kept = 0;
    for (int i = 0; s == CUBLAS_STATUS_SUCCESS && i < n; i++)
        if (result[i].state == CUBLAS_STATUS_SUCCESS) result[kept++] = result[i];
    return kept;
}

static cublasStatus_t enqueue(cublasLtHandle_t handle, const fg_gemm_call *g, description *d,
                              const cublasLtMatmulAlgo_t *algo, cudaStream_t stream)
{
    return cublasLtMatmul(handle, &d->op, &g->alpha, g->b, &d->first, g->a, &d->second, &g->beta,
                          g->y, &d->result, g->y, &d->result, algo, g->work, FG_GEMM_WORK, stream);
}

/* Adds a hash of y's bits and places to *sum, in any order: the sum of integers is the same. */
static __global__ void hash(const void *y, bool narrow, int64_t M, int64_t N, int64_t pitch,
                            int64_t batch, int64_t step, unsigned long long *sum)
{
    unsigned long long h = 0;
    for (int64_t row = blockIdx.x; row < M * batch; row += gridDim.x) {
        const int64_t at = row / M * step + row % M * pitch;
        for (int64_t j = threadIdx.x; j < N; j += blockDim.x) {
            const unsigned bits = narrow ? ((const unsigned short *)y)[at + j]
                                         : ((const unsigned *)y)[at + j];
            unsigned long long x = (unsigned long long)(row * N + j) * 0x9e3779b97f4a7c15u + bits;
            x = (x ^ x >> 31) * 0xbf58476d1ce4e5b9u;
            h += x ^ x >> 29;
        }
    }
    atomicAdd(sum, h);
}

/* The hash of y once the stream has come so far. */
static unsigned long long hash_of(const fg_gemm_call *g, cudaStream_t stream)
{
    unsigned long long sum = 0, *on_device = (unsigned long long *)g->work;
    cudaMemsetAsync(on_device, 0, sizeof sum, stream);
    hash<<<1024, 256, 0, stream>>>(g->y, g->y_type == FG_BF16, g->M, g->N, g->pitch_y, g->batch,
                                   g->step_y, on_device);
    cudaMemcpyAsync(&sum, on_device, sizeof sum, cudaMemcpyDeviceToHost, stream);
    cudaStreamSynchronize(stream);
    return sum;
}

typedef struct {
    float time;                      /* milliseconds; negative: not to be used */
    unsigned long long bits;
    uint64_t split;                  /* of K, and how its parts are added */
} measurement;

static measurement measure(cublasLtHandle_t handle, const fg_gemm_call *g, description *d,
                           const cublasLtMatmulAlgo_t *algo, cudaEvent_t from, cudaEvent_t to,
                           cudaStream_t stream)
{
    measurement m = { -1, 0, 0 };
    uint32_t parts = 0, scheme = 0;
    size_t written;
    cublasLtMatmulAlgoConfigGetAttribute(algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &parts,
                                         sizeof parts, &written);
    cublasLtMatmulAlgoConfigGetAttribute(algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &scheme,
                                         sizeof scheme, &written);
    m.split = (uint64_t)parts << 32 | scheme;
    if (enqueue(handle, g, d, algo, stream) != CUBLAS_STATUS_SUCCESS) return m;
    m.bits = hash_of(g, stream);
    float best = -1;
    for (int run = 0; run < RUNS; run++) {
        float time = 0;
        cudaEventRecord(from, stream);
        enqueue(handle, g, d, algo, stream);
        cudaEventRecord(to, stream);
        if (cudaEventSynchronize(to) != cudaSuccess) return m;
        cudaEventElapsedTime(&time, from, to);
        if (best < 0 || time < best) best = time;
    }
    if (hash_of(g, stream) == m.bits) m.time = best;
    return m;
}

/* The index of the best of n candidates: see gemm.cuh on bits.  One with other bits that does not
 * split K is none: seen were some that round the product before they add the bias. */
static int best_of(cublasLtHandle_t handle, const fg_gemm_call *g, description *d,
                   const cublasLtMatmulHeuristicResult_t *result, int n, cudaStream_t stream)
{
    measurement m[CANDIDATES];
    cudaEvent_t from, to;
    if (cudaEventCreate(&from) != cudaSuccess) return 0;
    if (cudaEventCreate(&to) != cudaSuccess) {
        cudaEventDestroy(from);
        return 0;
    }
    for (int i = 0; i < n; i++) m[i] = measure(handle, g, d, &result[i].algo, from, to, stream);
    cudaEventDestroy(from);
    cudaEventDestroy(to);
    int same = -1, other = -1;
    for (int i = 0; i < n; i++) {
        if (m[i].time < 0) continue;
        const bool like = m[0].time >= 0 && m[i].bits == m[0].bits && m[i].split == m[0].split;
        int *best = like ? &same : m[i].split >> 32 > 1 || m[0].time < 0 ? &other : nullptr;
        if (best == nullptr) continue;
        if (*best < 0 || m[i].time < m[*best].time) *best = i;
    }
    if (same < 0) return other < 0 ? 0 : other;
    return other >= 0 && m[other].time < OTHER_BITS * m[same].time ? other : same;
}

/* ---- the call ------------------------------------------------------------------------------- */

/* Fills *algo with what a shape is to run; false: cuBLASLt knows nothing for it. */
static bool choose(cublasLtHandle_t handle, const fg_gemm_call *g, description *d, int device,
                   cudaStream_t stream, cublasLtMatmulAlgo_t *algo)
{
    const shape_key key = key_of(g, device);
    choice *c = find(&key);
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    cudaStreamIsCapturing(stream, &capture);
    const bool may_measure = c && g->beta == 0 && capture == cudaStreamCaptureStatusNone;
    if (c && c->used && (c->measured || !may_measure)) {
        *algo = c->algo;
        return true;
    }
    cublasLtMatmulHeuristicResult_t result[CANDIDATES];
    const int n = candidates(handle, d, &key, result);
    if (n == 0) return false;
    *algo = result[may_measure && n > 1 ? best_of(handle, g, d, result, n, stream) : 0].algo;
    if (!c) return true;
    if (!c->used) lt.n_choices++;
    c->key = key;
    c->algo = *algo;
    c->used = true;
    c->measured = may_measure;
    return true;
}

/* y = beta y + bias: what is left of a product over nothing. */
static __global__ void add_bias(fg_out y, const void *bias, float beta, int64_t M, int64_t N,
                                int64_t pitch, int64_t batch, int64_t step)
{
    const fg_in before = { y.p, y.narrow }, b = { bias, y.narrow };
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < batch * M * N;
         i += (int64_t)gridDim.x * blockDim.x) {
        const int64_t row = i / N, at = row / M * step + row % M * pitch + i % N;
        y.put(at, (beta != 0 ? beta * before[at] : 0) + (bias ? b[i % N] : 0));
    }
}

static __global__ void convert(fg_in x, fg_out y, int64_t n)
{
    const int64_t i = (blockIdx.x * (int64_t)blockDim.x + threadIdx.x) * 8;
    if (i + 8 <= n) fg_store8(y, i, fg_load8(x, i));
    else
        for (int64_t k = i; k < n; k++) y.put(k, x[k]);
}

void fg_convert(const fg_in &x, const fg_out &y, int64_t n, cudaStream_t stream)
{
    if (n > 0) convert<<<fg_blocks(n, 2048), 256, 0, stream>>>(x, y, n);
}

static void fill_nan(const fg_gemm_call *g, cudaStream_t stream)
{
    const size_t size = g->y_type == FG_BF16 ? 2 : 4;
    for (int64_t i = 0; i < g->batch; i++)
        cudaMemset2DAsync((char *)g->y + (size_t)(i * g->step_y) * size, (size_t)g->pitch_y * size,
                          0xff, (size_t)g->N * size, (size_t)g->M, stream);
}

/* One product as cuBLASLt takes it; only_choose: makes the choice for its shape and no product. */
static void product(const fg_gemm_call *g, bool only_choose, cudaStream_t stream)
{
    const int device = device_now();
    cublasStatus_t s = CUBLAS_STATUS_NOT_INITIALIZED;
    if (device >= 0 && lt.users[device] > 0) {
        description d;
        cublasLtMatmulAlgo_t algo;
        describe(g, &d);
        const bool found = choose(lt.handle[device], g, &d, device, stream, &algo);
        if (only_choose) return;
        s = found ? enqueue(lt.handle[device], g, &d, &algo, stream) : CUBLAS_STATUS_NOT_SUPPORTED;
    }
    if (s == CUBLAS_STATUS_SUCCESS) return;
    note_failure(g, s);
    fill_nan(g, stream);
}

/* Whether only its extents keep the tensor cores from a product: everything else is aligned. */
static bool worth_cutting(const fg_gemm_call *g)
{
    return g->type == FG_BF16 && (g->pitch_a | g->pitch_b | g->pitch_y) % EVEN == 0 &&
           align_of(g->a) >= 16 && align_of(g->b) >= 16 && align_of(g->y) >= 16;
}

static const void *offset(const void *p, int64_t elements, fg_dtype type)
{
    return (const char *)p + elements * (type == FG_BF16 ? 2 : 4);
}

/* Cuts what is left of an extent over a multiple of EVEN off as a product of its own.  Of K that
 * remainder is first: y, if bf16, rounds it and then the sum. */
static void cut_product(const fg_gemm_call *g, cudaStream_t stream)
{
    const bool cut = worth_cutting(g);
    const bool cut_N = cut && g->N > LARGE && g->N % EVEN;
    const bool cut_M = cut && g->M > LARGE && g->M % EVEN;
    const bool cut_K = cut && g->K > LARGE && g->K % EVEN;
    fg_gemm_call most = *g, rest = *g;
    if (cut_N) {
        rest.N = g->N % EVEN, most.N = g->N - rest.N;
        rest.b = offset(g->b, g->tb ? most.N * g->pitch_b : most.N, g->type);
        rest.y = (void *)offset(g->y, most.N, g->y_type);
        if (g->bias) rest.bias = offset(g->bias, most.N, g->y_type);
    } else if (cut_M) {
        rest.M = g->M % EVEN, most.M = g->M - rest.M;
        rest.a = offset(g->a, g->ta ? most.M : most.M * g->pitch_a, g->type);
        rest.y = (void *)offset(g->y, most.M * g->pitch_y, g->y_type);
    } else if (cut_K) {
        rest.K = g->K % EVEN, most.K = g->K - rest.K, most.bias = nullptr;
        rest.a = offset(g->a, g->ta ? most.K * g->pitch_a : most.K, g->type);
        rest.b = offset(g->b, g->tb ? most.K : most.K * g->pitch_b, g->type);
        product(&most, true, stream);
        most.beta = 1;
        product(&rest, false, stream);
        product(&most, false, stream);
    } else {
        product(g, false, stream);
    }
    if (!cut_N && !cut_M) return;
    cut_product(&most, stream);
    cut_product(&rest, stream);
}

void fg_gemm(const fg_gemm_call *g, cudaStream_t stream)
{
    if (g->M == 0 || g->N == 0 || g->batch == 0) return;
    if (g->K == 0) {
        const fg_out y = { g->y, g->y_type == FG_BF16 };
        add_bias<<<256, 256, 0, stream>>>(y, g->bias, g->beta, g->M, g->N, g->pitch_y, g->batch,
                                          g->step_y);
        return;
    }
    const std::lock_guard<std::mutex> hold(lt.lock);
    cut_product(g, stream);
}
