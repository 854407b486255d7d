/* plain_times.cuh - the speed of the plain kernels at the shapes of a model of 760M parameters,
 * beside a copy of as many bytes, for test_cuda_plain.cu. */
#ifndef PLAIN_TIMES_CUH
#define PLAIN_TIMES_CUH
#include "plain_kernels.cuh"

/* As a captured graph of `times` launches, so that the host's part does not count. */
static double seconds_of(const std::function<void(cudaStream_t)> &f, int times)
{
    cudaEvent_t a, b;
    cudaStream_t s;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEventCreate(&a);
    cudaEventCreate(&b);
    cudaStreamCreate(&s);
    f(s);
    need(cudaStreamSynchronize(s), "warm up");
    need(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < times; i++) f(s);
    need(cudaStreamEndCapture(s, &graph), "capture");
    need(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
    cudaGraphLaunch(exec, s);
    cudaEventRecord(a, s);
    cudaGraphLaunch(exec, s);
    cudaEventRecord(b, s);
    need(cudaEventSynchronize(b), "time");
    float ms;
    cudaEventElapsedTime(&ms, a, b);
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(s);
    cudaEventDestroy(a);
    cudaEventDestroy(b);
    return (double)ms / 1e3 / times;
}

/* One allocation for all: where pages lie makes a difference of a tenth. */
static char *pool;
static size_t pool_used;
static void *take(size_t bytes)
{
    const size_t size = (size_t)12 << 30;
    if (!pool) need(cudaMalloc(&pool, size), "cudaMalloc");
    void *p = pool + pool_used;
    pool_used += (bytes + 255) / 256 * 256;
    if (pool_used > size) need(cudaErrorMemoryAllocation, "take");
    return p;
}

/* A copy of half as many bytes moves as many. */
static double copy_rate(double bytes)
{
    const size_t half = ((size_t)(bytes / 2) + 65535) / 65536 * 65536;      /* no odd ends */
    pool_used = 0;
    void *a = take(half), *b = take(half);
    return 2 * (double)half / seconds_of([&](cudaStream_t st) {
        cudaMemcpyAsync(b, a, half, cudaMemcpyDeviceToDevice, st);
    }, 20);
}

static tensor shaped(fg_shape s, fg_dtype t, int64_t width = 0)      /* without values */
{
    tensor x;
    x.type = t, x.shape = s, x.width = width;
    return x;
}

/* Values: bytes 0x3c, small positive numbers; i32 tensors as given. */
static void measure(const char *name, const void *attr, std::vector<tensor> in, int n_out,
                    std::vector<fg_dtype> types, const int64_t *widths = nullptr, double bytes = 0)
{
    if (!asked(name)) return;
    job j = { find(name), attr, in, {} };
    infer(&j, n_out, types, widths);
    context c;
    describe(j, &c);
    const fg_infer f = inferred(j);
    const bool mutates = j.op->code->memory == FG_MUTATE;
    pool_used = 0;
    double moved = 0;
    for (int side = 0; side < 2; side++)
        for (size_t i = 0; i < (side ? j.out : j.in).size(); i++) {
            const tensor &x = side ? j.out[i] : j.in[i];
            if (!x.there) continue;
            moved += (double)x.count() * (double)size_of(x.type);
            if (side && mutates) {
                c.e.out[i] = (void *)(uintptr_t)c.e.in[i];
                continue;
            }
            void *p = take(x.bytes());
            cudaMemset(p, 0x3c, x.bytes());
            if (!x.value.empty()) {
                const std::vector<unsigned char> b = packed(x);
                cudaMemcpy(p, b.data(), b.size(), cudaMemcpyHostToDevice);
            }
            if (side) c.e.out[i] = p;
            else c.e.in[i] = p;
        }
    const size_t scratch = j.op->kernel->scratch ? j.op->kernel->scratch(&f) : 0;
    if (scratch) c.e.scratch = take(scratch);
    if (bytes > 0) moved = bytes;
    const double s = seconds_of([&](cudaStream_t st) { j.op->kernel->launch(&c.e, st); }, 20);
    const double rate = moved / s, copy = copy_rate(moved);
    printf("%5.1f%%  %7.1f us  %6.0f GB/s  copy %6.0f  %s\n", 100 * rate / copy, s * 1e6,
           rate / 1e9,
           copy / 1e9, words(j).c_str());
    fflush(stdout);
}

static void time_elementwise()
{
    const int64_t T = 16384, C = 1536;
    const fg_shape s = dims({ T, C }), gates = dims({ T, 24 });
    for (fg_dtype t : { H, F }) {
        const struct fg_attr_cast other = { t == H ? F : H };
        const struct fg_attr_scale by = { 2, 1 };
        for (const char *op : { "sigmoid", "log_sigmoid", "silu", "tanh", "exp", "relu" })
            measure(op, nullptr, { shaped(s, t) }, 1, { t });
        measure("scale", &by, { shaped(s, t) }, 1, { t });
        measure("silu_grad", nullptr, { shaped(s, t), shaped(s, t) }, 1, { t });
        measure("cast", &other, { shaped(s, t) }, 1, { other.to });
        const int64_t w = C;
        measure("silu", nullptr, { shaped(s, t, C) }, 1, { t });
        measure("cast", &other, { shaped(s, t, C) }, 1, { other.to }, &w);
        measure("add", nullptr, { shaped(s, t), shaped(s, t) }, 1, { t });
        measure("add", nullptr, { shaped(s, t), shaped(dims({ C }), F) }, 1, { t });
        measure("add", nullptr, { shaped(s, t, C), shaped(dims({ C }), F) }, 1, { t }, &w);
        measure("mul", nullptr, { shaped(dims({ T, 24, 64 }), t),
                shaped(dims({ T, 24, 1 }), t) }, 1,
                { t });
        measure("where_ge", nullptr, { shaped(s, t), shaped(s, t), shaped(s, t) }, 1, { t });
        measure("log_sigmoid", nullptr, { shaped(gates, t, 24) }, 1, { F });
    }
    const struct fg_attr_fill fill = { s, 1 };
    const size_t bytes = (size_t)T * C * 4;
    pool_used = 0;
    void *p = take(bytes);
    const double set = seconds_of([&](cudaStream_t st) { cudaMemsetAsync(p, 0, bytes, st); }, 20);
    printf("        %7.1f us  %6.0f GB/s  cudaMemset of as many bytes as fill:\n", set * 1e6,
           (double)bytes / set / 1e9);
    measure("fill", &fill, {}, 1, { F });
    measure("add", nullptr, { shaped(dims({ T, 50257 }), H),
            shaped(dims({ 50257 }), F) }, 1, { H });
}

static void time_rows()
{
    const int64_t T = 16384, C = 1536, V = 50257;
    for (fg_dtype t : { H, F }) {
        const struct fg_attr_sum_to column = { dims({ C }) }, all = { dims({}) },
                                    gate = { dims({ 24 }) },
                                    head = { dims({ 24, 1 }) };
        measure("sum_to", &column, { shaped(dims({ T, C }), t) }, 1, { F });
        measure("sum_to", &all, { shaped(dims({ T, C }), t) }, 1, { F });
        measure("sum_to", &gate, { shaped(dims({ T, 24 }), t) }, 1, { F });
        measure("sum_to", &head, { shaped(dims({ T, 24, 64 }), t) }, 1, { F });
        measure("row_sum", nullptr, { shaped(dims({ T, 24, 64 }), t) }, 1, { t });
        measure("row_sum", nullptr, { shaped(dims({ T, C }), t) }, 1, { t });
        measure("row_max", nullptr, { shaped(dims({ T, C }), t) }, 1, { t });
        const struct fg_attr_cumsum time = { 1, false };
        measure("cumsum", &time, { shaped(dims({ 1, T, 24 }), t) }, 1, { t });
        measure("cumsum", &time, { shaped(dims({ 8, 2048, C }), t) }, 1, { t });
        for (int64_t n : { 64, 512, 2048, 4096, 16384, 32768 }) {
            const fg_shape s = dims({ (1 << 25) / n, n }), c = dims({ (1 << 25) / n, 1 });
            measure("softmax", nullptr, { shaped(s, t) }, 1, { t });
            measure("softmax_grad", nullptr, { shaped(s, t), shaped(s, t) }, 1, { t });
            measure("log_sum_exp", nullptr, { shaped(s, t) }, 1, { F });
            if (n == 2048)
                measure("log_sum_exp_grad", nullptr, { shaped(c, t), shaped(s, t),
                        shaped(c, t) }, 1, { t });
        }
        const tensor labels = whole(dims({ T }), 0, V);
        const tensor row = shaped(dims({ T }), F), x = shaped(dims({ T, V }), t);
        measure("cross_entropy", nullptr, { x, labels }, 2, { F, F });
        measure("cross_entropy_grad", nullptr, { row, x, labels, row }, 1, { t });
        const struct fg_attr_attention_mask none = { 0 };
        measure("attention_mask", &none, { shaped(dims({ 1, 8, 2048, 2048 }), t) }, 1, { t });
    }
}

static void time_rest()
{
    const int64_t T = 16384, C = 1536, V = 50257;
    const fg_shape s = dims({ 1, T, 24, 64 }), g = dims({ 1, T, 24 });
    for (fg_dtype t : { H, F }) {
        const int64_t w[2] = { C, 24 };
        const struct fg_attr_rope rope = { 500000, false };
        measure("rope", &rope, { shaped(s, t), absent(), absent() }, 1, { t });
        measure("rope", &rope, { shaped(s, t, C), absent(), absent() }, 1, { t }, w);
        measure("shift_mix", nullptr, { shaped(s, t), shaped(g, t), absent(),
                absent(), absent() }, 1,
                { t });
        measure("shift_mix", nullptr, { shaped(s, t, C), shaped(g, t, 24), absent(), absent(),
                absent() }, 1, { t }, w);
        measure("shift_mix_grad", nullptr, { shaped(s, t),
                shaped(s, t), shaped(g, t), absent() }, 2,
                { t, t });
        measure("shift_mix_grad", nullptr, { shaped(s, t, C), shaped(s, t, C), shaped(g, t, 24),
                absent() }, 2, { t, t }, w);
        const tensor gains = shaped(dims({ C }), F), rstd = shaped(g, F);
        const int64_t w3[3] = { C, 0, 24 };
        const struct fg_attr_shift_norm eps = { 1e-5 };
        measure("shift_gate", nullptr, { shaped(s, t, C), shaped(g, t, 24), absent(), absent(),
                absent() }, 1, { t });
        measure("shift_gate_grad", nullptr, { shaped(s, t), shaped(s, t, C), shaped(g, t, 24),
                absent() }, 2, { t, t }, w);
        measure("shift_norm", &eps, { shaped(s, t, C), shaped(g, t, 24), gains, absent(), absent(),
                absent() }, 2, { t, F });
        measure("shift_norm_grad", nullptr, { shaped(s, t), shaped(s, t, C), shaped(g, t, 24),
                gains, rstd, absent() }, 3, { t, F, t }, w3);
        const struct fg_attr_rms_norm norm = { 1e-5, 24 };
        const struct fg_attr_gated_norm gated = { 1e-5, 24 };
        const struct fg_attr_rms_norm_grad norm_grad = { 24 };
        const struct fg_attr_gated_norm_grad gated_grad = { 24 };
        const fg_shape rows = dims({ T, C }), each = dims({ T, 24 });
        const int64_t wx[2] = { C, 0 }, wg[3] = { 0, 0, C };
        measure("rms_norm", &norm, { shaped(rows, t, C), gains }, 2, { t, F });
        measure("rms_norm_grad", &norm_grad, { shaped(rows, t), shaped(rows, t, C), gains,
                shaped(each, F), absent() }, 2, { t, F }, wx);
        measure("gated_norm", &gated, { shaped(rows, t), gains, shaped(rows, t, C) }, 2, { t, F });
        measure("gated_norm_grad", &gated_grad, { shaped(rows, t), shaped(rows, t), gains,
                shaped(rows, t, C), shaped(each, F) }, 3, { t, F, t }, wg);
        const struct fg_attr_permute heads = { dims({ 0, 2, 1, 3 }) }, turned = { dims({ 1, 0 }) };
        measure("permute", &heads, { shaped(s, t) }, 1, { t });
        measure("permute", &turned, { shaped(dims({ T, C }), t) }, 1, { t });
        const struct fg_attr_slice part = { 1, 512, 2048 };
        const struct fg_attr_concat join = { 1 };
        const struct fg_attr_slice_grad back = { 1, 512, 3072 };
        measure("slice", &part, { shaped(dims({ T, 3072 }), t) }, 1, { t }, nullptr,
                2.0 * T * C * size_of(t));
        measure("slice_grad", &back, { shaped(dims({ T, C }), t) }, 1, { t });
        measure("concat", &join, { shaped(dims({ T, C }), t),
                shaped(dims({ T, C }), t) }, 1, { t });
        tensor tokens = whole(dims({ T }), 0, V);
        measure("embedding", nullptr, { tokens, shaped(dims({ V, C }), t) }, 1, { t }, nullptr,
                2.0 * T * C * size_of(t));
        const struct fg_attr_embedding_grad size = { V };
        measure("embedding_grad", &size, { shaped(dims({ T, C }), t), tokens }, 1, { F });
        for (int64_t i = 0; i < T; i++) if (i % 3) tokens.value[i] = 11;
        measure("embedding_grad", &size, { shaped(dims({ T, C }), t), tokens }, 1, { F });
        const fg_shape p = dims({ 50257, C });
        const struct fg_attr_adamw a = { 0.9, 0.95, 1e-8, 0.1 };
        measure("adamw", &a, { shaped(p, F), shaped(p, F), shaped(p, F), shaped(p, t),
                one(1), one(1e-3),
                one(7) }, 3, { F, F, F });
        measure("adamw_bf16", &a, { shaped(p, F), shaped(p, F), shaped(p, F), shaped(p, H),
                shaped(p, t), one(1), one(1e-3), one(7) }, 4, { F, F, F, H }, nullptr,
                (26.0 + size_of(t)) * 50257 * C);
        const struct fg_attr_accumulate by = { 0.25 };
        measure("accumulate", &by, { shaped(p, F), shaped(p, t) }, 1, { F });
        measure("sum_squares", nullptr, { shaped(p, t) }, 2, { F, F });
    }
    puts("tiny:");
    const fg_shape tiny = dims({ 1, 1536 });
    measure("add", nullptr, { shaped(tiny, H), shaped(tiny, H) }, 1, { H });
    measure("add", nullptr, { shaped(tiny, H), shaped(dims({ 1536 }), F) }, 1, { H });
    measure("silu", nullptr, { shaped(tiny, H) }, 1, { H });
    measure("sum_squares", nullptr, { shaped(tiny, F) }, 2, { F, F });
    measure("softmax", nullptr, { shaped(tiny, F) }, 1, { F });
    const struct fg_attr_rope rope = { 500000, false };
    measure("rope", &rope, { shaped(dims({ 1, 1, 24, 64 }), H), absent(), absent() }, 1, { H });
    const tensor label = whole(dims({ 4 }), 0, V);
    measure("cross_entropy", nullptr, { shaped(dims({ 4, V }), H), label }, 2, { F, F });
}
#endif
