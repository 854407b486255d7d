/* test_cuda_models.c - every family on the GPU against the official code's numbers: f32 within the
 * bounds of the CPU, bf16 within 1e-3 of the loss and with a gradient of the same direction;
 * skipped where there is no GPU. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <math.h>
#include "device_cuda.h"
#include "fox_graph.h"

enum { MOST = 400 };

typedef struct {
    fg_graph *g;
    fg_store *store;
    fg_plan *plan;
    fg_file *reference;
    fg_tensor tokens, labels, logits, losses, grad[MOST];
    int n;
} trial;

static fg_file *open_fixture(const char *family, const char *file)
{
    char path[1000];
    snprintf(path, sizeof path, FIXTURES "/%s/%s", family, file);
    fg_file *f = fg_file_open(path);
    cr_assert_eq(fg_file_status(f), FG_OK, "%s", fg_file_message(f));
    return f;
}

static float *read_fixture(fg_file *f, const char *name, fg_dtype t, int64_t count)
{
    float *data = malloc((size_t)count * 4);
    const fg_status s = fg_file_read(f, name, t, data, (size_t)count * 4);
    cr_assert_eq(s, FG_OK, "%s", fg_file_message(f));
    return data;
}

static trial start(const char *family, fg_backend *gpu, fg_dtype precision)
{
    trial t = { .g = fg_graph_new(), .reference = open_fixture(family, "reference.safetensors"),
                .store = fg_store_new(gpu) };
    char path[1000], message[400] = "";
    fg_file_entry ids;
    fg_config config;
    fg_tensor wrt[MOST];
    snprintf(path, sizeof path, FIXTURES "/%s/config.json", family);
    cr_assert_eq(fg_config_read(path, &config, message), FG_OK, "%s", message);
    if (!strcmp(family, "hgrn2_lower_bound")) config.u.hgrn2.lower_bound = HGRN2_BOUNDS_APPLIED;
    cr_assert(fg_file_find(t.reference, "input_ids", &ids), "%s has no input_ids", family);
    t.tokens = fg_input(t.g, "tokens", FG_I32, ids.shape);
    t.labels = fg_input(t.g, "labels", FG_I32, ids.shape);
    t.logits = fg_config_build(&config, t.tokens);
    t.losses = fg_cross_entropy(t.logits, t.labels);
    fg_tensor loss = fg_mean(t.losses);
    t.n = fg_param_count(t.g);
    fg_param_info p;
    for (int i = 0; fg_param_at(t.g, i, &p); i++) wrt[i] = p.tensor;
    cr_assert_eq(fg_grad(loss, t.n, wrt, t.grad), FG_OK, "%s: %s", family, fg_graph_message(t.g));
    fg_output(t.logits, "logits");
    fg_output(t.losses, "losses");
    for (int i = 0; i < t.n; i++)
        if (fg_ok(t.grad[i])) fg_output(t.grad[i], fg_name(t.g, "grad%d", i));
    fg_store_precision(t.store, precision);
    snprintf(path, sizeof path, FIXTURES "/%s/model.safetensors", family);
    cr_assert_eq(fg_store_load(t.store, path, ""), FG_OK, "%s", fg_store_message(t.store));
    t.plan = fg_plan_new(t.g, t.store);
    const int64_t n = fg_count(t.tokens);
    float *in = read_fixture(t.reference, "input_ids", FG_I32, n);
    float *next = read_fixture(t.reference, "labels", FG_I32, n);
    fg_write(t.plan, t.tokens, in, (size_t)n * 4);
    fg_write(t.plan, t.labels, next, (size_t)n * 4);
    for (int i = 0; i < 3; i++)
        cr_assert_eq(fg_run(t.plan), FG_OK, "%s: %s", family, fg_plan_message(t.plan));
    free(in);
    free(next);
    return t;
}

static void finish(trial *t)
{
    fg_plan_free(t->plan);
    fg_store_free(t->store);
    fg_file_close(t->reference);
    fg_graph_free(t->g);
}

static float *result(trial *t, fg_tensor x)
{
    float *data = malloc((size_t)fg_count(x) * 4);
    cr_assert_eq(fg_read(t->plan, x, data, (size_t)fg_count(x) * 4), FG_OK, "%s",
                 fg_plan_message(t->plan));
    return data;
}

static double farthest(trial *t, fg_tensor x, const char *name)
{
    float *mine = result(t, x), *want = read_fixture(t->reference, name, FG_F32, fg_count(x));
    double worst = 0;
    for (int64_t i = 0; i < fg_count(x); i++) {
        const double d = fabs((double)mine[i] - (double)want[i]);
        if (!(d <= worst)) worst = isnan(d) ? INFINITY : d;
    }
    free(mine);
    free(want);
    return worst;
}

static double mean(const float *x, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i];
    return sum / (double)n;
}

/* Sums over all gradients: of products with the reference's, of squares, of squared differences. */
static void compare_gradients(trial *t, double *cosine, double *worst)
{
    double dot = 0, mine2 = 0, want2 = 0;
    fg_param_info p;
    *worst = 0;
    for (int i = 0; fg_param_at(t->g, i, &p); i++) {
        fg_file_entry e;
        const char *name = fg_name(t->g, "grad.%s", p.name);
        if (!fg_ok(t->grad[i]) || !fg_file_find(t->reference, name, &e)) continue;
        const int64_t n = fg_shape_count(p.shape);
        float *mine = result(t, t->grad[i]), *want = read_fixture(t->reference, name, FG_F32, n);
        double diff = 0, square = 0;
        for (int64_t k = 0; k < n; k++) {
            const double a = (double)mine[k], b = (double)want[k];
            dot += a * b;
            mine2 += a * a;
            square += b * b;
            diff += (a - b) * (a - b);
        }
        want2 += square;
        if (square > 0 && sqrt(diff / square) > *worst) *worst = sqrt(diff / square);
        free(mine);
        free(want);
    }
    *cosine = dot / sqrt(mine2 * want2);
}

static void check_family(const char *family, fg_backend *gpu)
{
    for (int bf16 = 0; bf16 < 2; bf16++) {
        trial t = start(family, gpu, bf16 ? FG_BF16 : FG_F32);
        double cosine, worst;
        compare_gradients(&t, &cosine, &worst);
        const int64_t n = fg_count(t.losses);
        float *mine = result(&t, t.losses), *want = read_fixture(t.reference, "loss", FG_F32, n);
        const double loss = fabs(mean(mine, n) - mean(want, n));
        const double logits = farthest(&t, t.logits, "logits");
        fprintf(stderr, "%-18s %s  logits %.1e  loss %.1e  gradient %.1e, 1 - cosine %.1e\n",
                family, bf16 ? "bf16" : "f32 ", logits, loss, worst, 1 - cosine);
        if (!bf16) {
            cr_expect_leq(logits, 5e-5, "%s: logits differ by %.2e", family, logits);
            cr_expect_leq(farthest(&t, t.losses, "loss"), 2e-5, "%s: losses", family);
            cr_expect_leq(worst, 2e-4, "%s: a gradient is off by %.2e of its norm", family, worst);
        } else {
            cr_expect_leq(loss, 1e-3, "%s: the bf16 loss is off by %.2e", family, loss);
            cr_expect_gt(cosine, 0.999, "%s: the bf16 gradient turned, cosine %.6f", family,
                         cosine);
        }
        free(mine);
        free(want);
        finish(&t);
    }
}

Test(cuda_models, every_family_computes_what_the_official_code_does)
{
    fg_backend *gpu = fg__cuda_or_skip(true);
    DIR *fixtures = opendir(FIXTURES);
    int families = 0;
    for (const struct dirent *d; gpu && (d = readdir(fixtures)); ) {
        if (d->d_name[0] == '.') continue;
        check_family(d->d_name, gpu);
        families++;
    }
    cr_expect(!gpu || families >= 4, "%d families", families);
    cr_expect_eq(fg__traps.broken, 0, "%d allocations were overrun", fg__traps.broken);
    closedir(fixtures);
    fg_backend_close(gpu);
}
