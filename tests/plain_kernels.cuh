/* plain_kernels.cuh - runs one CUDA kernel and the CPU kernel of the same op, in double, on the
 * same tensors, for test_cuda_plain.cu: tensors on the host, a case, what is asked of it. */
#ifndef PLAIN_KERNELS_CUH
#define PLAIN_KERNELS_CUH
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <condition_variable>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>
#include "kernel.cuh"

static const fg_dtype F = FG_F32, H = FG_BF16;

#define OPS(X)                                                                                   \
    X(neg) X(exp) X(log) X(sqrt) X(rsqrt) X(sigmoid) X(sigmoid_grad) X(log_sigmoid)              \
    X(log_sigmoid_grad) X(softplus) X(softplus_grad) X(silu) X(silu_grad) X(tanh) X(tanh_grad)   \
    X(relu) X(relu_grad) X(scale) X(cast) X(fill) X(add) X(sub) X(mul) X(div) X(max) X(where_ge) \
    X(sum_to) X(broadcast_to) X(row_sum) X(row_mean) X(row_max) X(row_max_grad) X(cumsum)        \
    X(permute) X(slice) X(slice_grad) X(concat) X(softmax) X(softmax_grad) X(log_sum_exp)        \
    X(log_sum_exp_grad) X(attention_mask) X(embedding) X(embedding_grad) X(cross_entropy)        \
    X(cross_entropy_grad) X(rope) X(shift_mix) X(shift_mix_grad) X(cache_write) X(cache_last)    \
    X(shift_gate) X(shift_gate_grad) X(shift_norm) X(shift_norm_grad) X(rms_norm_grad)            \
    X(rms_norm_grad_bf16) X(rms_norm) X(gated_norm) X(gated_norm_grad)                           \
    X(sum_squares) X(clip_factor) X(accumulate) X(adamw) X(adamw_bf16)

extern "C" {
#define X(op) extern const fg_op_code fg_code_##op; extern const fg_kernel fg_kernel_##op;
OPS(X)
#undef X
}

struct entry { const char *name; const fg_op_code *code; const fg_kernel *kernel; };
static const entry entries[] = {
#define X(op) { #op, &fg_code_##op, &fg_kernel_##op },
    OPS(X)
#undef X
};

static const entry *find(const char *name)
{
    for (const entry &e : entries)
        if (!strcmp(e.name, name)) return &e;
    return nullptr;
}

static void need(cudaError_t s, const char *what)
{
    if (s == cudaSuccess) return;
    printf("%s: %s\n", what, cudaGetErrorString(s));
    exit(1);
}

/* ---- tensors -------------------------------------------------------------------------------- */

static size_t size_of(fg_dtype t) { return t == FG_BF16 ? 2 : 4; }

static double rounded(double x, fg_dtype t)
{
    if (t == FG_I32) return x;
    const float f = (float)x;
    if (t == FG_F32) return f;
    return __bfloat162float(__float2bfloat16_rn(f));
}

/* width: 0 if contiguous, else the columns of a row of a pitched tensor. */
struct tensor {
    bool there = true;
    fg_dtype type = FG_F32;
    fg_shape shape = { 0, { 0 } };
    int64_t width = 0;
    std::vector<double> value;

    int64_t count() const { return fg_count_of(&shape); }
    fg_rows rows() const
    {
        const int64_t n = count();
        return width ? fg_rows{ width, (width + 7) / 8 * 8 + 16 } : fg_rows{ n, n };
    }
    int64_t place(int64_t i) const
    {
        const fg_rows r = rows();
        return i / r.width * r.pitch + i % r.width;
    }
    size_t bytes() const { return (size_t)(place(count() - 1) + 1) * size_of(type); }
};

static uint64_t seed = 1;
static double uniform()
{
    seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
    return (double)(seed >> 11) / 9007199254740992.0;
}
static double normal()
{
    const double radius = sqrt(-2 * log(uniform() + 1e-300));
    return radius * cos(6.283185307179586 * uniform());
}

static fg_shape dims(std::initializer_list<int64_t> d)
{
    fg_shape s = { (int)d.size(), { 0 } };
    int i = 0;
    for (int64_t n : d) s.dim[i++] = n;
    return s;
}
static tensor real(fg_shape s, fg_dtype t = FG_F32, int64_t width = 0)
{
    tensor x;
    x.type = t, x.shape = s, x.width = width;
    for (int64_t i = 0; i < x.count(); i++) x.value.push_back(rounded(normal(), t));
    return x;
}
static tensor whole(fg_shape s, int64_t low, int64_t high)           /* [low, high) */
{
    tensor x;
    x.type = FG_I32, x.shape = s;
    for (int64_t i = 0; i < x.count(); i++)
        x.value.push_back((double)low + floor(uniform() * (double)(high - low)));
    return x;
}
static tensor mapped(tensor x, double (*f)(double))
{
    for (double &v : x.value) v = rounded(f(v), x.type);
    return x;
}
static tensor one(double v)
{
    tensor x = real(dims({ 1 }));
    x.value[0] = rounded(v, FG_F32);
    return x;
}
static tensor absent()
{
    tensor x;
    x.there = false;
    return x;
}

static std::vector<unsigned char> packed(const tensor &x)
{
    std::vector<unsigned char> b(x.bytes(), 0xff);
    for (int64_t i = 0; i < x.count(); i++) {
        unsigned char *to = b.data() + (size_t)x.place(i) * size_of(x.type);
        const double v = x.value[(size_t)i];
        const float f = (float)v;
        const int32_t k = x.type == FG_I32 ? (int32_t)v : 0;
        const bf16 h = __float2bfloat16_rn(f);
        if (x.type == FG_I32) memcpy(to, &k, 4);
        else if (x.type == FG_F32) memcpy(to, &f, 4);
        else memcpy(to, &h, 2);
    }
    return b;
}
static double unpacked(const unsigned char *b, const tensor &x, int64_t i)
{
    const unsigned char *from = b + (size_t)x.place(i) * size_of(x.type);
    float f;
    int32_t k;
    bf16 h;
    if (x.type == FG_I32) {
        memcpy(&k, from, 4);
        return k;
    }
    if (x.type == FG_F32) {
        memcpy(&f, from, 4);
        return f;
    }
    memcpy(&h, from, 2);
    return __bfloat162float(h);
}

/* ---- one case ------------------------------------------------------------------------------- */

struct job {
    const entry *op;
    const void *attr;
    std::vector<tensor> in, out;
    std::shared_ptr<const void> kept = nullptr;  /* what attr points to, if the job outlives it */
};

/* Shapes of the outputs by the op's own rule; types: those given, or f32.  The rule sees f32, but
 * for the one op that asks for a bf16 input. */
static void infer(job *j, int n_out, const std::vector<fg_dtype> &types, const int64_t *widths)
{
    fg_infer c = {};
    c.attr = j->attr;
    c.n_in = (int)j->in.size();
    c.n_out = n_out;
    const bool as_is = !strcmp(j->op->name, "adamw_bf16");
    for (int i = 0; i < c.n_in; i++) {
        c.given[i] = j->in[i].there;
        c.in[i] = j->in[i].shape;
        c.in_type[i] = as_is || j->in[i].type == FG_I32 ? j->in[i].type : FG_F32;
    }
    for (int o = 0; o < n_out; o++) c.out_type[o] = c.in_type[0];
    if (j->op->code->infer(&c)) printf("%s: infer refuses\n", j->op->name);
    for (int o = 0; o < n_out; o++) {
        tensor y;
        y.shape = c.out[o];
        y.type = c.out_type[o] == FG_I32 ? FG_I32 : o < (int)types.size() ? types[o] : FG_F32;
        y.width = widths ? widths[o] : 0;
        j->out.push_back(y);
    }
}

struct context {                                 /* what fg_exec points to */
    std::vector<fg_shape> shape[2];
    std::vector<fg_dtype> type[2];
    std::vector<fg_rows> rows[2];
    fg_exec e;
};
static void describe(const job &j, context *c)
{
    for (int side = 0; side < 2; side++)
        for (const tensor &x : side ? j.out : j.in) {
            c->shape[side].push_back(x.shape);
            c->type[side].push_back(x.type);
            c->rows[side].push_back(x.rows());
        }
    c->e = {};
    c->e.attr = j.attr;
    c->e.n_in = (int)j.in.size(), c->e.n_out = (int)j.out.size(), c->e.threads = 1;
    c->e.in_shape = c->shape[0].data(), c->e.out_shape = c->shape[1].data();
    c->e.in_type = c->type[0].data(), c->e.out_type = c->type[1].data();
    c->e.in_rows = c->rows[0].data(), c->e.out_rows = c->rows[1].data();
}
static fg_infer inferred(const job &j)
{
    fg_infer c = {};
    c.attr = j.attr;
    c.n_in = (int)j.in.size(), c.n_out = (int)j.out.size();
    for (int i = 0; i < c.n_in; i++) {
        c.given[i] = j.in[i].there;
        c.in[i] = j.in[i].shape, c.in_type[i] = j.in[i].type;
    }
    for (int o = 0; o < c.n_out; o++) c.out[o] = j.out[o].shape, c.out_type[o] = j.out[o].type;
    return c;
}

/* The CPU kernel in double; the results become the outputs' values. */
static void run_cpu(job *j)
{
    context c;
    describe(*j, &c);
    const fg_infer f = inferred(*j);
    const size_t bytes = j->op->code->scratch ? j->op->code->scratch(&f, 1) : 0;
    std::vector<double> scratch(bytes / 8 + 8);
    std::vector<int32_t> integers[FG_MAX_IN];
    const bool mutates = j->op->code->memory == FG_MUTATE;
    for (size_t i = 0; i < j->in.size(); i++) {
        for (double v : j->in[i].value)
            if (j->in[i].type == FG_I32) integers[i].push_back((int32_t)v);
        if (!j->in[i].there) continue;
        c.e.in[i] = j->in[i].value.data();
        if (j->in[i].type == FG_I32) c.e.in[i] = integers[i].data();
    }
    for (size_t o = 0; o < j->out.size(); o++) {
        j->out[o].value = mutates ? j->in[o].value
                                  : std::vector<double>((size_t)j->out[o].count(), NAN);
        c.e.out[o] = j->out[o].value.data();
        if (mutates) c.e.in[o] = c.e.out[o];
    }
    std::vector<int32_t> copy;                   /* i32 outputs: moved bit for bit */
    if (j->out[0].type == FG_I32) {
        copy.resize((size_t)j->out[0].count());
        c.e.out[0] = copy.data();
    }
    c.e.scratch = scratch.data();
    j->op->code->cpu(&c.e);
    for (size_t i = 0; i < copy.size(); i++) j->out[0].value[i] = copy[i];
}

#define GUARD 256

struct images { std::vector<unsigned char> of[FG_MAX_OUT]; };

/* Every thread of the host has a stream; freed memory is kept for the next case. */
static const cudaStream_t stream = cudaStreamPerThread;
static void *device_memory(size_t bytes)
{
    void *p;
    need(cudaMallocAsync(&p, bytes, stream), "cudaMallocAsync");
    return p;
}
static void keep_freed_memory()
{
    cudaMemPool_t pool;
    uint64_t all = UINT64_MAX;
    need(cudaDeviceGetDefaultMemPool(&pool, 0), "memory pool");
    need(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all), "memory pool");
}

/* The job's tensors on the device; fill: what memory holds before.  in_place: output 0 takes input
 * 0's memory. */
static void place(const job &j, int fill, bool in_place, context *c, std::vector<void *> *all)
{
    describe(j, c);
    const fg_infer f = inferred(j);
    const size_t bytes = j.op->kernel->scratch ? j.op->kernel->scratch(&f) : 0;
    const bool mutates = j.op->code->memory == FG_MUTATE;
    for (size_t i = 0; i < j.in.size(); i++) {
        if (!j.in[i].there) continue;
        const std::vector<unsigned char> b = packed(j.in[i]);
        void *p = device_memory(b.size());
        need(cudaMemcpyAsync(p, b.data(), b.size(), cudaMemcpyHostToDevice, stream), "copy");
        need(cudaStreamSynchronize(stream), "copy");
        all->push_back(p);
        c->e.in[i] = p;
    }
    for (size_t o = 0; o < j.out.size(); o++) {
        void *p = device_memory(j.out[o].bytes() + GUARD);
        need(cudaMemsetAsync(p, fill, j.out[o].bytes() + GUARD, stream), "set");
        all->push_back(p);
        c->e.out[o] = mutates || (o == 0 && in_place) ? (void *)(uintptr_t)c->e.in[o] : p;
    }
    if (!bytes) return;
    c->e.scratch = device_memory(bytes);
    need(cudaMemsetAsync(c->e.scratch, fill, bytes, stream), "set");
    all->push_back(c->e.scratch);
}

/* The outputs' bytes, pitched ones with what lies between. */
static images collect(const job &j, const context &c, int fill, bool in_place, bool *touched)
{
    const bool mutates = j.op->code->memory == FG_MUTATE;
    images result;
    for (size_t o = 0; o < j.out.size(); o++) {
        const bool own = !mutates && !(o == 0 && in_place);
        std::vector<unsigned char> b(j.out[o].bytes() + (own ? GUARD : 0));
        need(cudaMemcpyAsync(b.data(), c.e.out[o], b.size(), cudaMemcpyDeviceToHost, stream),
             "copy");
        need(cudaStreamSynchronize(stream), "copy");
        std::vector<char> used(b.size());
        for (int64_t i = 0; i < j.out[o].count(); i++)
            for (size_t k = 0; k < size_of(j.out[o].type); k++)
                used[(size_t)j.out[o].place(i) * size_of(j.out[o].type) + k] = 1;
        for (size_t k = 0; own && k < b.size(); k++)
            if (!used[k] && b[k] != (unsigned char)fill) *touched = true;
        result.of[o] = b;
    }
    return result;
}

static images run_gpu(const job &j, int fill, bool in_place, bool *touched)
{
    context c;
    std::vector<void *> all;
    place(j, fill, in_place, &c, &all);
    j.op->kernel->launch(&c.e, stream);
    need(cudaGetLastError(), j.op->name);
    need(cudaStreamSynchronize(stream), j.op->name);
    const images result = collect(j, c, fill, in_place, touched);
    for (void *p : all) cudaFreeAsync(p, stream);
    return result;
}

static bool quick, dry;
static int cases, failures;
static char **only;                            /* names, ended by NULL; none: all */
static bool asked(const char *name)
{
    if (!only || !*only) return true;
    for (char **o = only; *o; o++)
        if (!strcmp(*o, name)) return true;
    return false;
}
struct worst { double error = 0; int n = 0; };
static worst worst_of[sizeof entries / sizeof entries[0]];

static std::string words(const job &j)
{
    static const char *const names[] = { "f32", "bf16", "i32" };
    std::string s = j.op->name;
    for (int side = 0; side < 2; side++)
        for (const tensor &x : side ? j.out : j.in) {
            s += side ? " -> " : " ";
            if (!x.there) { s += "-"; continue; }
            s += names[x.type];
            s += "[";
            for (int i = 0; i < x.shape.rank; i++)
                s += (i ? "," : "") + std::to_string(x.shape.dim[i]);
            s += "]";
            if (x.width) s += "/" + std::to_string(x.width);
        }
    return s;
}

static std::mutex counting;                     /* failures and worst_of */
static void complain(const job &j, const char *what)
{
    const std::lock_guard<std::mutex> hold(counting);
    failures++;
    if (failures < 60) printf("FAILS %s: %s\n", words(j).c_str(), what);
}

/* Errors in units of 2^-24 of the output's scale, the root of its mean square but at least `floor`
 * (what sums that cancel were made of); bf16 may also round the other way. */
static void compare(const job &j, const images &got, double limit, double floor)
{
    double error = 0;
    char text[200] = "";
    for (size_t o = 0; o < j.out.size(); o++) {
        double scale = 0;
        for (double v : j.out[o].value) if (isfinite(v)) scale += v * v;
        scale = fmax(floor, sqrt(scale / (double)j.out[o].count()));
        for (int64_t i = 0; i < j.out[o].count(); i++) {
            const double want = j.out[o].value[(size_t)i];
            const double is = unpacked(got.of[o].data(), j.out[o], i);
            if (isnan(want) && isnan(is)) continue;
            if (want == is || rounded(want, j.out[o].type) == is) continue;
            double off = fabs(want - is);
            if (j.out[o].type == FG_BF16) off = fmax(0, off - ldexp(fabs(want), -8));
            off /= ldexp(fabs(want) + scale + 1e-30, -24);
            if (!(off <= error)) {
                error = isfinite(off) ? off : INFINITY;
                snprintf(text, sizeof text, "output %d, element %lld: %.9g, not %.9g (%.3g units)",
                         (int)o, (long long)i, is, want, error);
            }
        }
    }
    {
        const std::lock_guard<std::mutex> hold(counting);
        worst *w = &worst_of[j.op - entries];
        w->n++;
        if (error > w->error) w->error = error;
    }
    if (error > limit) complain(j, text);
}

/* The job on the CPU, on the GPU twice with other memory, and in place if the op may. */
static void examine(job j, double limit, double floor)
{
    run_cpu(&j);
    if (!strcmp(j.op->name, "adamw_bf16")) j.out[3].value = j.out[0].value; /* not yet rounded */
    if (dry) return;
    bool touched = false;
    const auto a = run_gpu(j, 0xff, false, &touched), b = run_gpu(j, 0x11, false, &touched);
    compare(j, a, limit, floor);
    if (touched) complain(j, "writes outside its outputs");
    for (size_t o = 0; o < j.out.size(); o++)
        for (int64_t i = 0; i < j.out[o].count(); i++)
            if (memcmp(&a.of[o][(size_t)j.out[o].place(i) * size_of(j.out[o].type)],
                       &b.of[o][(size_t)j.out[o].place(i) * size_of(j.out[o].type)],
                       size_of(j.out[o].type))) {
                complain(j, "a second run gives other bits");
                return;
            }
    if ((j.op->code->reuse & 1) && j.in[0].there && j.out[0].count() == j.in[0].count()
        && j.in[0].type == j.out[0].type && j.in[0].width == j.out[0].width)
        compare(j, run_gpu(j, 0xff, true, &touched), limit, floor);
}

/* Most of the work is the host's: all its processors take jobs as they come, while the next are
 * drawn.  Jobs that wait hold so many elements at most. */
class workers {
    enum : int64_t { MOST = 1 << 26 };
    struct task { std::function<void()> f; int64_t elements; };
    std::mutex lock;
    std::condition_variable changed;
    std::deque<task> tasks;
    int64_t elements = 0;                        /* of jobs that wait or run */
    bool ended = false;
    std::vector<std::thread> threads;

    void work()
    {
        std::unique_lock<std::mutex> hold(lock);
        for (;;) {
            changed.wait(hold, [&] { return ended || !tasks.empty(); });
            if (tasks.empty()) return;
            const task t = std::move(tasks.front());
            tasks.pop_front();
            hold.unlock();
            t.f();
            hold.lock();
            elements -= t.elements;
            changed.notify_all();
        }
    }
public:
    void add(std::function<void()> f, int64_t n)
    {
        std::unique_lock<std::mutex> hold(lock);
        const unsigned all = std::thread::hardware_concurrency();
        while (threads.size() < (all ? all : 1)) threads.emplace_back([&] { work(); });
        changed.wait(hold, [&] { return elements < MOST; });
        tasks.push_back({ std::move(f), n });
        elements += n;
        changed.notify_all();
    }
    void finish()
    {
        {
            const std::lock_guard<std::mutex> hold(lock);
            ended = true;
            changed.notify_all();
        }
        for (std::thread &t : threads) t.join();
    }
};
static workers processors;

static void check_kept(const char *name, std::shared_ptr<const void> attr, std::vector<tensor> in,
                       int n_out, const std::vector<fg_dtype> &types, double limit,
                       const int64_t *widths, double floor)
{
    if (!asked(name)) return;
    job j = { find(name), attr.get(), std::move(in), {}, attr };
    infer(&j, n_out, types, widths);
    const fg_infer f = inferred(j);
    if (j.op->kernel->unfit && j.op->kernel->unfit(&f)) {
        complain(j, j.op->kernel->unfit(&f));
        return;
    }
    cases++;
    int64_t n = 0;
    for (const tensor &x : j.in) n += x.there ? x.count() : 0;
    processors.add([j = std::move(j), limit, floor] { examine(j, limit, floor); }, n);
}

template <class A>
static void check(const char *name, const A *attr, std::vector<tensor> in, int n_out,
                  std::vector<fg_dtype> types, double limit = 8,
                  const int64_t *widths = nullptr, double floor = 0)
{
    check_kept(name, std::make_shared<A>(*attr), std::move(in), n_out, types, limit, widths, floor);
}
static void check(const char *name, std::nullptr_t, std::vector<tensor> in, int n_out,
                  std::vector<fg_dtype> types, double limit = 8,
                  const int64_t *widths = nullptr, double floor = 0)
{
    check_kept(name, nullptr, std::move(in), n_out, types, limit, widths, floor);
}

/* Nodes launched together give the bits that each gives alone.  shared: so many last inputs are
 * those of the first node. */
static void check_together(const std::vector<job> &jobs, int shared)
{
    if (!asked(jobs[0].op->name)) return;
    cases++;
    if (dry) return;
    std::list<context> contexts;
    std::vector<const fg_exec *> nodes;
    std::vector<void *> all;
    bool touched = false;
    for (const job &j : jobs) {
        contexts.emplace_back();
        place(j, 0xff, false, &contexts.back(), &all);
        fg_exec *e = &contexts.back().e;
        for (int i = 1; i <= shared; i++)
            e->in[e->n_in - i] = contexts.front().e.in[contexts.front().e.n_in - i];
        nodes.push_back(e);
    }
    jobs[0].op->kernel->launch_many(nodes.data(), (int)nodes.size(), stream);
    need(cudaGetLastError(), "launch_many");
    need(cudaStreamSynchronize(stream), "launch_many");
    auto c = contexts.begin();
    for (const job &j : jobs) {
        const images got = collect(j, *c++, 0xff, false, &touched);
        const images alone = run_gpu(j, 0xff, false, &touched);
        for (size_t o = 0; o < j.out.size(); o++)
            if (got.of[o] != alone.of[o]) complain(j, "gives other bits together with others");
    }
    if (touched) complain(jobs[0], "writes outside its outputs");
    for (void *p : all) cudaFreeAsync(p, stream);
}
#endif
