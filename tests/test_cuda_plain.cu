/* test_cuda_plain.cu - the plain CUDA kernels against the CPU kernels in double, and their speed.
 *
 * usage: test_cuda_plain check [OP...] | quick [OP...] | dry [OP...] | time [OP...]
 * check compares every op, over odd sizes, f32 and bf16 and mixed, contiguous and pitched, with
 * outputs and scratch full of NaN before, and asks for the same bits from a second run; quick takes
 * few shapes, for compute-sanitizer; dry leaves the device out.  time prints, for large shapes, the
 * kernel's bytes per second and those of a copy of as many bytes.
 * Links the object files of cuda/ and the library's twin in double.  C++17: nvcc 13.0 fails on it
 * as C++20. */
#include "plain_kernels.cuh"
#include "plain_times.cuh"

/* ---- the ops -------------------------------------------------------------------------------- */

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
    if (!dry) keep_freed_memory();
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
    processors.finish();
    for (size_t i = 0; i < sizeof entries / sizeof entries[0]; i++)
        if (asked(entries[i].name))
            printf("%-20s %5d comparisons, worst error %.3g units\n", entries[i].name,
                   worst_of[i].n,
                   worst_of[i].error);
    printf("%d cases, %d failures\n", cases, failures);
    return failures > 0;
}
