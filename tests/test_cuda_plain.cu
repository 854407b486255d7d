/* test_cuda_plain.cu - the plain CUDA kernels against the CPU kernels in double, and their speed.
 *
 * usage: test_cuda_plain check [OP...] | quick [OP...] | dry [OP...] | time [OP...]
 * check compares every op, over odd sizes, f32 and bf16 and mixed, contiguous and pitched, with
 * outputs and scratch full of NaN before, and asks for the same bits from a second run; quick takes
 * few shapes, for compute-sanitizer; dry leaves the device out.  time prints, for large shapes, the
 * kernel's bytes per second and those of a copy of as many bytes.
 * Links the object files of cuda/ and the library's twin in double.  C++17: nvcc 13.0 fails on it
 * as C++20. */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <functional>
#include <list>
#include <string>
#include <vector>
#include "kernel.cuh"

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
    c->e.n_in = (int)j.in.size(), c->e.n_out = (int)j.out.size(), c->e.threads = 8;
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
    const size_t bytes = j->op->code->scratch ? j->op->code->scratch(&f, 8) : 0;
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
        void *p;
        const std::vector<unsigned char> b = packed(j.in[i]);
        need(cudaMalloc(&p, b.size()), "cudaMalloc");
        need(cudaMemcpy(p, b.data(), b.size(), cudaMemcpyHostToDevice), "copy");
        all->push_back(p);
        c->e.in[i] = p;
    }
    for (size_t o = 0; o < j.out.size(); o++) {
        void *p;
        need(cudaMalloc(&p, j.out[o].bytes() + GUARD), "cudaMalloc");
        need(cudaMemset(p, fill, j.out[o].bytes() + GUARD), "set");
        all->push_back(p);
        c->e.out[o] = mutates || (o == 0 && in_place) ? (void *)(uintptr_t)c->e.in[o] : p;
    }
    if (!bytes) return;
    need(cudaMalloc(&c->e.scratch, bytes), "cudaMalloc");
    need(cudaMemset(c->e.scratch, fill, bytes), "set");
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
        need(cudaMemcpy(b.data(), c.e.out[o], b.size(), cudaMemcpyDeviceToHost), "copy");
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
    j.op->kernel->launch(&c.e, nullptr);
    need(cudaGetLastError(), j.op->name);
    need(cudaDeviceSynchronize(), j.op->name);
    const images result = collect(j, c, fill, in_place, touched);
    for (void *p : all) cudaFree(p);
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

static void complain(const job &j, const char *what)
{
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
    worst *w = &worst_of[j.op - entries];
    w->n++;
    if (error > w->error) w->error = error;
    if (error > limit) complain(j, text);
}

static void check(const char *name, const void *attr, std::vector<tensor> in, int n_out,
                  std::vector<fg_dtype> types, double limit = 8,
                  const int64_t *widths = nullptr, double floor = 0)
{
    if (!asked(name)) return;
    job j = { find(name), attr, in, {} };
    infer(&j, n_out, types, widths);
    const fg_infer f = inferred(j);
    if (j.op->kernel->unfit && j.op->kernel->unfit(&f)) {
        complain(j, j.op->kernel->unfit(&f));
        return;
    }
    cases++;
    run_cpu(&j);
    if (!strcmp(name, "adamw_bf16")) j.out[3].value = j.out[0].value;    /* not yet rounded */
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
    if ((j.op->code->reuse & 1) && in[0].there && j.out[0].count() == in[0].count()
        && in[0].type == j.out[0].type && in[0].width == j.out[0].width)
        compare(j, run_gpu(j, 0xff, true, &touched), limit, floor);
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
    jobs[0].op->kernel->launch_many(nodes.data(), (int)nodes.size(), nullptr);
    need(cudaGetLastError(), "launch_many");
    need(cudaDeviceSynchronize(), "launch_many");
    auto c = contexts.begin();
    for (const job &j : jobs) {
        const images got = collect(j, *c++, 0xff, false, &touched);
        const images alone = run_gpu(j, 0xff, false, &touched);
        for (size_t o = 0; o < j.out.size(); o++)
            if (got.of[o] != alone.of[o]) complain(j, "gives other bits together with others");
    }
    if (touched) complain(jobs[0], "writes outside its outputs");
    for (void *p : all) cudaFree(p);
}

/* ---- the ops -------------------------------------------------------------------------------- */

static const fg_dtype F = FG_F32, H = FG_BF16;
static std::vector<int64_t> sizes()
{
    return quick ? std::vector<int64_t>{ 1, 3, 100 }
                 : std::vector<int64_t>{ 1, 3, 63, 64, 100, 1000, 4096, 70001 };
}

static double small_positive(double x) { return exp(0.5 * x); }
static double squash(double x) { return 1 / (1 + exp(-x)); }
static double wide(double x) { return 20 * x; }

static void check_unary()
{
    static const char *const names[] = { "neg", "exp", "log", "sqrt", "rsqrt", "sigmoid",
        "log_sigmoid", "softplus", "silu", "tanh", "relu" };
    static const char *const grads[] = { "sigmoid_grad", "log_sigmoid_grad", "softplus_grad",
        "silu_grad", "tanh_grad", "relu_grad" };
    for (int64_t n : sizes())
        for (fg_dtype a : { F, H })
            for (fg_dtype y : { F, H }) {
                const fg_shape s = dims({ n });
                for (const char *op : names) {
                    const bool positive = !strcmp(op, "log") || strstr(op, "sqrt");
                    tensor x = real(s, a);
                    if (positive) x = mapped(x, small_positive);
                    else if (n == 1000 && strcmp(op, "exp")) x = mapped(x, wide);
                    if (n > 50) x.value[n / 2] = NAN, x.value[n / 3] = positive ? 0 : INFINITY;
                    check(op, nullptr, { x }, 1, { y });
                }
                for (const char *op : grads)
                    for (fg_dtype b : { F, H })
                        check(op, nullptr, { real(s, a), real(s, b) }, 1, { y });
                static const struct fg_attr_scale by = { -2.5, 0.75 };
                check("scale", &by, { real(s, a) }, 1, { y });
                const struct fg_attr_cast to = { y };
                check("cast", &to, { real(s, a) }, 1, { y });
                check("cast", &to, { whole(s, -70000, 70000) }, 1, { y });
                const struct fg_attr_fill fill = { s, 0.3 };
                if (a == F) check("fill", &fill, {}, 1, { y });
            }
    for (int64_t w : { 24, 8, 5, 1536 })                       /* columns of a wider matrix */
        for (int side = 0; side < 3; side++)
            for (fg_dtype a : { F, H }) {
                const int64_t in = side != 1 ? w : 0, out = side != 0 ? w : 0;
                const fg_shape s = dims({ 7, w });
                const struct fg_attr_cast to = { a == F ? H : F };
                check("sigmoid", nullptr, { real(s, a, in) }, 1, { F }, 8, &out);
                check("cast", &to, { real(s, a, in) }, 1, { to.to }, 8, &out);
                check("silu_grad", nullptr, { real(s, F, in), real(s, a) }, 1, { a }, 8, &out);
            }
}

static void check_binary()
{
    static const fg_shape pairs[][2] = {
        { { 2, { 3, 5 } }, { 2, { 3, 5 } } }, { { 0, { 0 } }, { 0, { 0 } } },
        { { 3, { 2, 3, 5 } }, { 1, { 5 } } }, { { 3, { 2, 3, 5 } }, { 3, { 2, 3, 1 } } },
        { { 0, { 0 } }, { 2, { 3, 11 } } }, { { 2, { 1, 9 } }, { 1, { 1 } } },
        { { 2, { 5, 1 } }, { 2, { 1, 3 } } }, { { 4, { 2, 1, 3, 1 } }, { 3, { 3, 1, 9 } } },
        { { 2, { 33, 64 } }, { 1, { 64 } } }, { { 3, { 5, 24, 64 } }, { 3, { 5, 24, 1 } } },
        { { 3, { 9, 4, 8 } }, { 2, { 4, 1 } } }, { { 4, { 3, 1, 4, 16 } }, { 4, { 1, 5, 1, 16 } } },
        { { 6, { 2, 1, 3, 1, 2, 8 } }, { 6, { 1, 3, 1, 2, 1, 8 } } },
        { { 6, { 2, 1, 3, 1, 2, 1 } }, { 6, { 1, 3, 1, 2, 1, 7 } } },
        { { 1, { 70001 } }, { 1, { 70001 } } }, { { 1, { 100 } }, { 0, { 0 } } },
        { { 2, { 41, 1000 } }, { 2, { 41, 1000 } } }, { { 2, { 41, 1001 } }, { 1, { 1001 } } },
    };
    static const char *const names[] = { "add", "sub", "mul", "div", "max" };
    for (const auto &p : pairs)
        for (int k = 0; k < 8; k++) {
            const fg_dtype a = k & 1 ? H : F, b = k & 2 ? H : F, y = k & 4 ? H : F;
            for (const char *op : names)
                check(op, nullptr, { real(p[0], a), real(p[1], b) }, 1, { y });
            check("where_ge", nullptr, { real(p[0], a), real(p[1], b), real(p[0], y) }, 1, { y });
            check("where_ge", nullptr, { real(p[1], a), real(p[0], b), real(dims({ 1 }), H) }, 1,
                  { y });
        }
    for (int64_t w : { 64, 24, 5 })
        for (int k = 0; k < 8; k++) {
            const int64_t in = k & 1 ? w : 0, out = k & 2 ? w : 0;
            const fg_dtype t = k & 4 ? H : F;
            const fg_shape s = dims({ 3, 5, w });
            check("add", nullptr, { real(s, t, in), real(dims({ w })) }, 1, { t }, 8, &out);
            check("add", nullptr, { real(s, t, in), real(s, H) }, 1, { t }, 8, &out);
            check("mul", nullptr, { real(s, t, in), real(dims({ 3, 5, 1 }), t) }, 1, { F }, 8,
                  &out);
        }
}

static void check_reduce()
{
    static const fg_shape pairs[][2] = {
        { { 2, { 3, 5 } }, { 1, { 5 } } }, { { 3, { 2, 3, 5 } }, { 3, { 2, 3, 1 } } },
        { { 2, { 3, 11 } }, { 0, { 0 } } }, { { 4, { 2, 3, 1, 5 } }, { 4, { 2, 1, 1, 5 } } },
        { { 5, { 2, 3, 2, 5, 3 } }, { 5, { 1, 3, 1, 5, 1 } } },
        { { 4, { 3, 2, 3, 9 } }, { 4, { 3, 1, 3, 1 } } }, { { 3, { 2, 3, 3 } }, { 2, { 1, 1 } } },
        { { 6, { 2, 3, 4, 3, 2, 5 } }, { 6, { 2, 1, 4, 1, 2, 1 } } },
        { { 6, { 2, 3, 4, 3, 2, 8 } }, { 6, { 1, 3, 1, 3, 1, 8 } } },
        { { 2, { 1000, 64 } }, { 1, { 64 } } }, { { 2, { 5000, 24 } }, { 1, { 24 } } },
        { { 2, { 3000, 100 } }, { 1, { 100 } } }, { { 2, { 3000, 63 } }, { 1, { 63 } } },
        { { 1, { 70001 } }, { 0, { 0 } } }, { { 3, { 3, 30000, 2 } }, { 3, { 3, 1, 2 } } },
        { { 4, { 2, 500, 6, 64 } }, { 2, { 6, 1 } } }, { { 2, { 3, 40000 } }, { 2, { 3, 1 } } },
        { { 2, { 100, 1 } }, { 1, { 1 } } }, { { 3, { 1, 4, 5 } }, { 2, { 4, 5 } } },
        { { 3, { 2000, 24, 64 } }, { 3, { 2000, 24, 1 } } },
    };
    for (const auto &p : pairs)
        for (int k = 0; k < 4; k++) {
            const fg_dtype x = k & 1 ? H : F, y = k & 2 ? H : F;
            if (quick && k % 3) continue;
            const struct fg_attr_sum_to sum = { p[1] };
            const struct fg_attr_broadcast_to up = { p[0] };
            const double terms = (double)fg_count_of(&p[0]) / (double)fg_count_of(&p[1]);
            check("sum_to", &sum, { real(p[0], x) }, 1, { y }, 8, nullptr, sqrt(terms));
            check("broadcast_to", &up, { real(p[1], x) }, 1, { y });
        }
    for (int64_t n : sizes())
        for (int64_t rows : { 1, 3, 37 })
            for (int k = 0; k < 4; k++) {
                const fg_dtype a = k & 1 ? H : F, y = k & 2 ? H : F;
                const fg_shape s = dims({ rows, n }), c = dims({ rows, 1 });
                const double root = sqrt((double)n);
                check("row_sum", nullptr, { real(s, a) }, 1, { y }, 8, nullptr, root);
                check("row_mean", nullptr, { real(s, a) }, 1, { y }, 8, nullptr, 1 / root);
                tensor x = real(s, a);
                if (n > 50) {
                    x.value[n - 1] = x.value[7] = 9;                          /* equal maxima */
                    if (rows > 1) x.value[n + n / 2] = x.value[n + 40] = NAN;
                    if (rows > 2) for (int64_t i = 0; i < n; i++) x.value[2 * n + i] = -INFINITY;
                }
                check("row_max", nullptr, { x }, 1, { y });
                check("row_max_grad", nullptr, { real(c, y), x }, 1, { a });
                const struct fg_attr_cumsum last = { 1, false }, back = { 1, true },
                                            down = { 0, false };
                check("cumsum", &last, { real(s, a) }, 1, { y });
                check("cumsum", &back, { real(s, a) }, 1, { y });
                const struct fg_attr_cumsum up = { 1, true };
                check("cumsum", &up, { real(dims({ 2, n, 3 }), a) }, 1, { y });
                tensor low = real(dims({ n, 2 }), a);
                if (n > 50) low.value[n] = -INFINITY;
                check("cumsum", &down, { low }, 1, { y });
            }
}

static void check_view()
{
    static const fg_shape orders[][2] = {
        { { 4, { 2, 3, 5, 3 } }, { 4, { 0, 2, 1, 3 } } }, { { 2, { 3, 5 } }, { 2, { 1, 0 } } },
        { { 3, { 2, 3, 5 } }, { 3, { 2, 0, 1 } } },
        { { 4, { 3, 2, 5, 3 } }, { 4, { 3, 1, 0, 2 } } },
        { { 3, { 1, 17, 19 } }, { 3, { 2, 0, 1 } } }, { { 3, { 3, 1, 5 } }, { 3, { 1, 0, 2 } } },
        { { 0, { 0 } }, { 0, { 0 } } },
        { { 6, { 2, 3, 1, 2, 3, 2 } }, { 6, { 4, 2, 0, 5, 3, 1 } } },
        { { 4, { 2, 33, 4, 64 } }, { 4, { 0, 2, 1, 3 } } },
        { { 2, { 100, 130 } }, { 2, { 1, 0 } } },
        { { 3, { 2, 65, 129 } }, { 3, { 0, 2, 1 } } },
        { { 4, { 5, 3, 40, 70 } }, { 4, { 1, 3, 0, 2 } } },
        { { 3, { 1, 1, 1 } }, { 3, { 2, 1, 0 } } },
    };
    for (const auto &p : orders)
        for (int k = 0; k < 5; k++) {
            const struct fg_attr_permute order = { p[1] };
            if (k == 4) check("permute", &order, { whole(p[0], -1000000, 1000000) }, 1, { F });
            else check("permute", &order, { real(p[0], k & 1 ? H : F) }, 1, { k & 2 ? H : F });
        }
    for (int64_t n : { 1, 3, 8, 24, 63, 64 })
        for (int k = 0; k < 16; k++) {
            const fg_dtype a = k & 1 ? H : F, y = k & 2 ? H : F;
            const fg_shape s = dims({ 3, 6, n });
            const int64_t in = k & 4 ? n : 0, out = k & 8 ? n : 0;
            const int64_t cut = k & 8 ? n / 2 + 1 - n / 4 : 0;
            const struct fg_attr_slice middle = { 1, 1, 4 }, part = { 2, n / 4, n / 2 + 1 };
            check("slice", &middle, { real(s, a, in) }, 1, { y }, 8, &out);
            check("slice", &part, { real(s, a, in) }, 1, { y }, 8, &cut);
            const struct fg_attr_slice_grad wider = { 2, 8, n + 16 }, longer = { 1, 2, 9 };
            const int64_t wide = k & 8 ? n + 16 : 0, both = k & 8 ? n + 8 : 0;
            check("slice_grad", &wider, { real(s, a, in) }, 1, { y }, 8, &wide);
            check("slice_grad", &longer, { real(s, a, in) }, 1, { y }, 8, &out);
            const struct fg_attr_concat rows = { 1 }, columns = { 2 };
            check("concat", &rows, { real(s, a, in), real(dims({ 3, 2, n }), y) }, 1, { y }, 8,
                  &out);
            check("concat", &columns, { real(s, a, in), real(dims({ 3, 6, 8 }), y) }, 1, { y }, 8,
                  &both);
            check("concat", &columns, { real(dims({ 3, 6, 5 }), a), real(s, y, in) }, 1, { y });
            const struct fg_attr_slice some = { 1, 1, 3 };
            if (k == 0) check("slice", &some, { whole(s, 0, 1 << 30) }, 1, { F });
        }
}

static void check_softmax()
{
    for (int64_t n : sizes())
        for (int64_t rows : { 1, 5, 33 })
            for (int k = 0; k < 4; k++) {
                const fg_dtype a = k & 1 ? H : F, y = k & 2 ? H : F;
                const fg_shape s = dims({ rows, n }), c = dims({ rows, 1 });
                tensor x = real(s, a);
                if (rows == 33) x = mapped(x, wide);
                for (int64_t i = 0; rows > 1 && i < n; i++) {
                    x.value[n + i] = -INFINITY;
                    if (i % 3) x.value[2 * n + i] = -INFINITY;
                }
                if (rows > 3) x.value[3 * n] = NAN;
                check("softmax", nullptr, { x }, 1, { y }, 64);
                check("log_sum_exp", nullptr, { x }, 1, { y });
                tensor p = mapped(real(s, y), small_positive), lse = real(c, y);
                for (double &v : p.value) v = rounded(v / (double)n, y);
                check("softmax_grad", nullptr, { real(s, a), p }, 1, { a });
                for (int64_t r = 0; r < rows; r++) {
                    lse.value[r] = -INFINITY;
                    for (int64_t i = 0; i < n; i++)
                        lse.value[r] = fmax(lse.value[r], rounded(x.value[r * n + i], y));
                }
                check("log_sum_exp_grad", nullptr, { real(c, y), x, lse }, 1, { a }, 64);
            }
    for (int64_t N : { 5, 8, 37, 64 })
        for (int k = 0; k < 16; k++) {
            const fg_dtype a = k & 1 ? H : F;
            const int64_t M = k & 2 ? 3 : N;
            const struct fg_attr_attention_mask mask = { k & 4 ? 3 : 0 };
            tensor past = whole(dims({ 1 }), N - M, N - M + 1);
            tensor first = whole(dims({ 2, M }), 0, N);
            first.value[0] = (double)(N + 7);                               /* sees nothing */
            check("attention_mask", &mask, { real(dims({ 2, 3, M, N }), a),
                  k & 8 ? first : absent(), k & 2 ? past : absent() }, 1, { a });
        }
}

static void check_loss()
{
    for (int64_t V : sizes())
        for (int64_t T : { 1, 37 })
            for (int k = 0; k < 4; k++) {
                const fg_dtype a = k & 1 ? H : F, y = k & 2 ? H : F;
                tensor x = real(dims({ T, V }), a), labels = whole(dims({ T }), 0, V);
                if (T > 1) {
                    x = mapped(x, wide);
                    labels.value[3] = -100, labels.value[4] = (double)V, labels.value[5] = -1;
                    for (int64_t i = 0; i < V; i++) {
                        x.value[3 * V + i] = NAN;
                        if (i != 2) x.value[7 * V + i] = -INFINITY;
                        x.value[8 * V + i] = -INFINITY;
                    }
                }
                check("cross_entropy", nullptr, { x, labels }, 2, { F, F });
                tensor lse = real(dims({ T }));
                for (int64_t t = 0; t < T; t++) {
                    double m = -INFINITY, sum = 0;
                    for (int64_t i = 0; i < V; i++) m = fmax(m, x.value[t * V + i]);
                    for (int64_t i = 0; i < V; i++) sum += exp(x.value[t * V + i] - m);
                    lse.value[t] = rounded(m + log(sum), F);
                }
                check("cross_entropy_grad", nullptr, { real(dims({ T })), x, labels, lse }, 1, {
                      y },
                      64);
            }
}

static void check_embedding()
{
    for (int64_t D : { 1, 3, 8, 63, 64, 200 })
        for (int64_t T : { 1, 3, 100, 1000 })
            for (int64_t V : { 1, 7, 300 })
                for (int k = 0; k < 4; k++) {
                    const fg_dtype a = k & 1 ? H : F, y = k & 2 ? H : F;
                    if (quick && (T > 100 || D > 64)) continue;
                    tensor tokens = whole(dims({ T }), 0, V);
                    for (int64_t t = 0; t < T; t++)
                        if (t % 3 == 0) tokens.value[t] = (double)(V / 2);     /* one everywhere */
                    if (T > 4) tokens.value[1] = -1, tokens.value[2] = (double)V;
                    const struct fg_attr_embedding_grad size = { V };
                    check("embedding", nullptr, { tokens, real(dims({ V, D }), a) }, 1, { y });
                    check("embedding_grad", &size, { real(dims({ T, D }), a), tokens }, 1, { y }, 8,
                          nullptr, (double)T / 3);    /* added one by one */
                }
}

static tensor firsts(int64_t B, int64_t T, int64_t past)
{
    tensor f = whole(dims({ B, T }), 0, past + T);
    for (int64_t i = 0; i < B * T; i++) {
        if (i % 5 == 0) f.value[i] = 0;
        if (i % 7 == 3) f.value[i] = (double)(past + i % T);                /* starts here */
        if (i % 11 == 4) f.value[i] = (double)(past + i % T + 1);           /* padding */
    }
    return f;
}

/* Heads of a row, all in bf16 or not; with one gain a channel or a gain that heads share. */
static void check_heads()
{
    static const int64_t shapes[][3] = { { 1, 2, 8 }, { 17, 24, 64 }, { 333, 3, 64 },
                                         { 50, 3, 128 }, { 9, 5, 256 }, { 300, 24, 64 },
                                         { 21, 7, 16 } };
    for (const auto &d : shapes)
        for (int k = 0; k < (quick ? 8 : 16); k++) {
            const int64_t T = d[0], n = d[2], W = d[1] * n, wide = k & 8 ? W : 0;
            if (quick && T > 100) continue;
            const fg_dtype t = k & 1 ? F : H, u = k & 2 ? F : H;
            const fg_shape s = dims({ T, W }), r = dims({ T, d[1] });
            const tensor w = real(dims({ k & 4 ? W : n })), rstd = mapped(real(r), small_positive);
            const int64_t in[] = { wide, 0, 0 }, both[] = { wide, 0, wide };
            const struct fg_attr_rms_norm a = { 1e-5, d[1] };
            const struct fg_attr_gated_norm b = { 1e-5, d[1] };
            const struct fg_attr_rms_norm_grad c = { d[1] };
            const struct fg_attr_gated_norm_grad e = { d[1] };
            const tensor x = real(s, t, wide), g = real(s, u, wide), gy = real(s, u, wide);
            check("rms_norm", &a, { x, w }, 2, { u, F }, 16, in);
            check("gated_norm", &b, { x, w, g }, 2, { u, F }, 32, in);
            check("rms_norm_grad", &c, { gy, x, w, rstd, absent() }, 2, { t, F }, 64, in);
            check("gated_norm_grad", &e, { gy, x, w, g, rstd }, 3, { t, F, u }, 64, both);
        }
}

static void check_sequence()
{
    static const int64_t shapes[][4] = { { 1, 1, 1, 2 }, { 2, 3, 2, 6 }, { 2, 37, 3, 64 },
        { 1, 100, 5, 16 }, { 1, 9, 2, 100 }, { 2, 5, 1, 128 }, { 1, 13, 2, 768 }, { 3, 4, 3, 8 } };
    for (const auto &d : shapes)
        for (int k = 0; k < 16; k++) {
            const int64_t B = d[0], T = d[1], Hn = d[2], D = d[3], W = Hn * D;
            const fg_dtype t = k & 1 ? H : F, u = k & 2 ? H : F;
            const fg_shape s = dims({ B, T, Hn, D }), g = dims({ B, T, Hn });
            const tensor past = whole(dims({ 1 }), 70000, 70001);
            const tensor one_past = whole(dims({ 1 }), 3, 4);
            const struct fg_attr_rope rope = { k & 2 ? 10000 : 500000.0, (k & 4) != 0 };
            const int64_t in = k & 8 ? W : 0, out[2] = { k & 8 ? W : 0, k & 8 ? Hn : 0 };
            check("rope", &rope, { real(s, t, in), k & 4 ? firsts(B, T, 70000) : absent(),
                  k & 2 ? past : absent() }, 1, { u }, 8, out);
            const tensor gate = mapped(real(g, u, in ? Hn : 0), squash);
            check("shift_mix", nullptr, { real(s, t, in), gate,
                  k & 4 ? firsts(B, T, k & 2 ? 3 : 0) : absent(), k & 2 ? one_past : absent(),
                  k & 2 ? real(dims({ B, Hn, D }), u) : absent() }, 1, { t }, 8, out);
            check("shift_mix_grad", nullptr, { real(s, u, in), real(s, t, in), gate,
                  k & 4 ? firsts(B, T, 0) : absent() }, 2, { t, u }, 16, out);
            const tensor place = whole(dims({ 1 }), k & 4 ? 3 : 0, k & 4 ? 4 : 1);
            check("cache_write", nullptr, { real(dims({ B, T + 2, Hn, D }), t), real(s, u, in),
                  place },
                  1, { t });
            check("cache_last", nullptr, { real(dims({ B, Hn, D }), t), real(s, u, in) }, 1, { t });
        }
}

static tensor in_bf16(tensor x)
{
    x.type = H;
    for (double &v : x.value) v = rounded(v, H);
    return x;
}

static job made(const char *name, const void *attr, std::vector<tensor> in, int n_out,
                std::vector<fg_dtype> types)
{
    job j = { find(name), attr, in, {} };
    infer(&j, n_out, types, nullptr);
    return j;
}

static void check_nodes_together()
{
    static const struct fg_attr_cast narrow = { H }, widen = { F };
    static const struct fg_attr_adamw a = { 0.9, 0.95, 1e-8, 0.1 };
    static const struct fg_attr_adamw_bf16 b = { 0.9, 0.95, 1e-8, 0.1 };
    std::vector<job> sums, casts, updates;
    for (int i = 0; i < (quick ? 3 : 150); i++) {
        const fg_shape s = dims({ i % 5 == 4 ? 40003 : 1 + 13 * i }), t = dims({ 16384, 3 });
        const tensor v = mapped(real(s), small_positive), g = real(s, i % 2 ? F : H);
        sums.push_back(made("sum_squares", nullptr, { real(s), real(i % 7 ? s : t), real(s, H) },
                            2, { F, F }));
        casts.push_back(i % 9 == 8 ? made("cast", &narrow, { whole(s, 0, 9) }, 1, { H })
                                   : i % 2 ? made("cast", &narrow, { real(s) }, 1, { H })
                                           : made("cast", &widen, { real(s, H) }, 1, { F }));
        const tensor clip = one(0.7), lr = one(1e-3), step = one(3);
        updates.push_back(i % 3 ? made("adamw", &a, { real(s), real(s), v, g, clip, lr, step }, 3,
                                       { F, F, F })
                                : made("adamw_bf16", &b, { real(s), real(s), v, real(s, H), g,
                                       clip, lr, step }, 4, { F, F, F, H }));
    }
    check_together(sums, 0);
    check_together(casts, 0);
    check_together(updates, 3);
}

static void check_optimizer()
{
    for (int64_t n : sizes())
        for (fg_dtype t : { F, H }) {
            const fg_shape s = dims({ n });
            check("sum_squares", nullptr, { real(s, t) }, 2, { F, F });
            const struct fg_attr_accumulate by = { 0.25 };
            check("accumulate", &by, { real(s), real(s, t) }, 1, { F });
            for (int k = 0; k < 4; k++) {
                const struct fg_attr_adamw a = { k == 2 ? 0 : 0.9, k == 2 ? 0 : 0.95, 1e-8, 0.1 };
                const tensor v = mapped(real(s), small_positive);
                check("adamw", &a, { real(s), real(s), v, real(s, t),
                      one(k == 3 ? NAN : 0.7), one(1e-3),
                      one(k ? 1000 : 1) }, 3, { F, F, F });
                const tensor p = real(s);
                check("adamw_bf16", &a, { p, real(s), v, in_bf16(p), real(s, t),
                      one(k == 3 ? NAN : 0.7), one(1e-3), one(k ? 1000 : 1) }, 4, { F, F, F, H });
            }
        }
    check_nodes_together();
    const struct fg_attr_clip_factor limit = { 1.5 };
    for (double squares : { 0.0, 1.0, 100.0, (double)INFINITY, (double)NAN })
        check("clip_factor", &limit, { one(squares) }, 1, { F });
}

/* ---- speed ---------------------------------------------------------------------------------- */

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

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "check";
    only = argc > 2 ? argv + 2 : nullptr;
    quick = !strcmp(what, "quick");
    dry = !strcmp(what, "dry");
    if (!strcmp(what, "time")) {
        time_elementwise();
        time_rows();
        time_rest();
        return 0;
    }
    check_unary();
    check_binary();
    check_reduce();
    check_view();
    check_softmax();
    check_loss();
    check_embedding();
    check_sequence();
    check_optimizer();
    check_heads();
    for (size_t i = 0; i < sizeof entries / sizeof entries[0]; i++)
        if (asked(entries[i].name))
            printf("%-20s %5d comparisons, worst error %.3g units\n", entries[i].name,
                   worst_of[i].n,
                   worst_of[i].error);
    printf("%d cases, %d failures\n", cases, failures);
    return failures > 0;
}
