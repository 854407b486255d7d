/* test_f64_models.c - the families in double: every switch against a scalar computation written out
 * from the equations, golden models against the official code, gradients against differences.
 *
 * The golden models: vocabulary 17, width 16, 2 layers, MLP 24, 2 heads, batch 2, 7 positions;
 * label_(b,t) = (5t + 3b + t^2) mod 17, tokens are the labels before, 16 first.  Parameter i, by
 * name, has entry n: v = sin(1.7 n + 0.9 i); gains are 1 + 0.1 v, the embedding v, others 0.3 v,
 * A_log is ln(n + 1).
 * The official code ran in double; with rotary positions its numbers are good to about 1e-7, for
 * its angles are in single precision. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "fox_autodiff.h"
#include "fox_models.h"
#include "plan.h"

enum { B = 2, T = 7, V = 17, WIDE = 64 };

/* FoX or Transformer; kv_heads and window are the Transformer's.  Or, by its own function, another
 * family. */
typedef struct {
    fox_config c;
    bool llama, mamba;
    int64_t kv_heads, window;
    fg_tensor (*other)(fg_tensor tokens);
} model;

static transformer_config as_transformer(const model *m)
{
    transformer_config t = transformer_llama_config(m->c.vocab_size, m->c.hidden_size,
                                                    m->c.num_hidden_layers, m->c.num_heads);
    t.intermediate_size = m->c.intermediate_size;
    t.num_kv_heads = m->kv_heads;
    t.window_size = m->window;
    t.no_rope = !m->c.use_rope;
    t.mlp_sigmoid = m->c.mlp_sigmoid;
    t.tie_word_embeddings = m->c.tie_word_embeddings;
    return t;
}

/* Four heads of 8 or, grouped, with two pairs of b and c. */
static mamba2_config as_mamba2(const model *m)
{
    mamba2_config c = mamba2_lm_config(m->c.vocab_size, m->c.hidden_size, m->c.num_hidden_layers,
                                       4);
    c.state_size = 4;
    c.n_groups = m->kv_heads ? m->kv_heads : 1;
    c.recompute = m->c.recompute;
    c.tie_word_embeddings = m->c.tie_word_embeddings;
    return c;
}

static fg_tensor build(const model *m, fg_tensor tokens)
{
    if (m->other) return m->other(tokens);
    const mamba2_config s = as_mamba2(m);
    if (m->mamba) return mamba2_lm(tokens, &s);
    const transformer_config t = as_transformer(m);
    return m->llama ? transformer_lm(tokens, &t) : fox_lm(tokens, &m->c);
}

static model tiny(fox_config c, bool llama)
{
    c.intermediate_size = 24;
    return (model){ .c = c, .llama = llama };
}

static model tiny_fox_llama(void) { return tiny(fox_llama_config(V, 16, 2, 2), false); }
static model tiny_fox_pro(void) { return tiny(fox_pro_config(V, 16, 2, 2), false); }
static model tiny_transformer_pro(void) { return tiny(transformer_pro_config(V, 16, 2, 2), false); }
static model tiny_transformer(void)
{
    fox_config c = fox_llama_config(V, 16, 2, 2);
    c.fgate_type = FG_GATE_NONE;
    c.use_rope = true;
    return tiny(c, true);
}

static hgrn2_config tiny_hgrn2(hgrn2_bounds bounds)
{
    hgrn2_config c = hgrn2_lm_config(V, 16, 2, 8);
    c.intermediate_size = 24;
    c.lower_bound = bounds;
    return c;
}

static fg_tensor hgrn2(fg_tensor tokens)
{
    const hgrn2_config c = tiny_hgrn2(HGRN2_BOUNDS_STORED);
    return hgrn2_lm(tokens, &c);
}

static fg_tensor hgrn2_bounded(fg_tensor tokens)
{
    hgrn2_config c = tiny_hgrn2(HGRN2_BOUNDS_APPLIED);
    c.recompute = true;
    return hgrn2_lm(tokens, &c);
}

static fg_tensor delta_net(fg_tensor tokens)
{
    delta_net_config c = delta_net_lm_config(V, 16, 2, 2);
    c.intermediate_size = 24;
    return delta_net_lm(tokens, &c);
}

static model tiny_mamba2(void)
{
    model m = tiny_fox_llama();
    m.mamba = true;
    return m;
}

static void fill_batch(int32_t tokens[B * T], int32_t labels[B * T])
{
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++) labels[b * T + t] = (5 * t + 3 * b + t * t) % V;
    for (int i = 0; i < B * T; i++) tokens[i] = i % T ? labels[i - 1] : 16;
}

/* ---- one model, run once --------------------------------------------------------------------- */

typedef struct {
    fg_graph *g;
    fg_backend *backend;
    fg_store *store;
    fg_plan *plan;
    fg_tensor logits, losses, loss;
    fg_tensor grad[100];
    int n;
} trial;

static bool ends(const char *s, const char *tail)
{
    const size_t n = strlen(s), m = strlen(tail);
    return n >= m && !strcmp(s + n - m, tail);
}

static void fill_parameters(const trial *r)
{
    fg_param_info p;
    for (int i = 0; fg_param_at(r->g, i, &p); i++) {
        double *w = fg__store_entry(r->store, p.name)->data;
        for (int64_t n = 0; n < fg_shape_count(p.shape); n++) {
            const double v = sin(1.7 * (double)n + 0.9 * i);
            w[n] = ends(p.name, "embeddings.weight") ? v : 0.3 * v;
            if (ends(p.name, "norm.weight") || ends(p.name, "norm_f.weight")) w[n] = 1 + 0.1 * v;
            if (ends(p.name, "A_log")) w[n] = log((double)n + 1);
        }
    }
}

static trial start(const model *m)
{
    int32_t tokens[B * T], labels[B * T];
    trial r = { .g = fg_graph_new(), .backend = fg_backend_open("cpu", 1) };
    fg_tensor x = fg_input(r.g, "tokens", FG_I32, FG_DIMS(B, T));
    fg_tensor y = fg_input(r.g, "labels", FG_I32, FG_DIMS(B, T));
    fg_param_info p;
    fg_tensor wrt[100];
    r.logits = fg_output(build(m, x), "logits");
    r.losses = fg_output(fg_cross_entropy(r.logits, y), "losses");
    r.loss = fg_output(fg_mean(r.losses), "loss");
    for (; fg_param_at(r.g, r.n, &p); r.n++) wrt[r.n] = p.tensor;
    cr_assert_eq(fg_grad(r.loss, r.n, wrt, r.grad), FG_OK, "%s", fg_graph_message(r.g));
    for (int i = 0; i < r.n; i++)
        if (fg_ok(r.grad[i])) fg_output(r.grad[i], fg_name(r.g, "grad%d", i));
    r.store = fg_store_new(r.backend);
    cr_assert_eq(fg_store_init(r.store, r.g, 0), FG_OK, "%s", fg_store_message(r.store));
    fill_parameters(&r);
    r.plan = fg_plan_new(r.g, r.store);
    fill_batch(tokens, labels);
    fg_write(r.plan, x, tokens, sizeof tokens);
    fg_write(r.plan, y, labels, sizeof labels);
    cr_assert_eq(fg_run(r.plan), FG_OK, "%s", fg_plan_message(r.plan));
    return r;
}

static void finish(trial *r)
{
    fg_plan_free(r->plan);
    fg_store_free(r->store);
    fg_backend_close(r->backend);
    fg_graph_free(r->g);
}

static const double *value(const trial *r, fg_tensor t)
{
    const double *v = fg__plan_data(r->plan, t);
    cr_assert_not_null(v);
    return v;
}

/* ---- the paper's equations, one number at a time --------------------------------------------- */

typedef struct { const model *m; const fg_store *s; int layer; } oracle;

static const double *weight(const oracle *o, const char *name)
{
    char full[200];
    snprintf(full, sizeof full, "model.layers.%d.%s", o->layer, name);
    const fg_entry *e = fg__store_entry(o->s, o->layer < 0 ? name : full);
    cr_assert_not_null(e, "%s", full);
    return e->data;
}

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }

static void product(const double *w, const double *x, int64_t rows, int64_t n, double *y)
{
    for (int64_t i = 0; i < rows; i++) {
        y[i] = 0;
        for (int64_t j = 0; j < n; j++) y[i] += w[i * n + j] * x[j];
    }
}

static void norm(const double *x, const double *w, int64_t n, int64_t groups, bool shared,
                 double eps, double *y)
{
    const int64_t d = n / groups;
    for (int64_t k = 0; k < groups; k++) {
        double sum = 0;
        for (int64_t j = 0; j < d; j++) sum += x[k * d + j] * x[k * d + j];
        for (int64_t j = 0; j < d; j++)
            y[k * d + j] = x[k * d + j] / sqrt(sum / (double)d + eps) * w[shared ? j : k * d + j];
    }
}

static void turn(double *x, int64_t heads, int64_t d, int64_t t, double base)
{
    for (int64_t k = 0; k < heads; k++)
        for (int64_t i = 0; i < d / 2; i++) {
            double *a = &x[k * d + i], *b = a + d / 2;
            const double angle = (double)t * pow(base, -2 * (double)i / (double)d), u = *a, v = *b;
            *a = u * cos(angle) - v * sin(angle);
            *b = u * sin(angle) + v * cos(angle);
        }
}

/* Key or value projection of all positions, with the shift if there is one. */
static void project(const oracle *o, const char *name, bool shift, int64_t heads, int64_t d,
                    double u[T][WIDE], double y[T][WIDE])
{
    char proj[60], gate[60];
    double raw[T][WIDE], a[WIDE];
    const int64_t h = o->m->c.hidden_size, n = heads * d;
    snprintf(proj, sizeof proj, "attn.%s.%sweight", name, shift ? "linear." : "");
    snprintf(gate, sizeof gate, "attn.%s.shift_proj.weight", name);
    for (int t = 0; t < T; t++) {
        product(weight(o, proj), u[t], n, h, raw[t]);
        if (shift) product(weight(o, gate), u[t], heads, h, a);
        for (int64_t i = 0; i < n; i++) {
            const double before = t ? raw[t - 1][i] : 0, s = shift ? sigmoid(a[i / d]) : 0;
            y[t][i] = s * before + (1 - s) * raw[t][i];
        }
    }
}

static double gate_logit(const oracle *o, const double *u, int64_t k)
{
    const int64_t h = o->m->c.hidden_size;
    double z;
    if (o->m->c.fgate_type != FG_GATE_FULL) return weight(o, "attn.fgate_bias")[k];
    product(weight(o, "attn.fgate_proj.weight") + k * h, u, 1, h, &z);
    return z + weight(o, "attn.fgate_proj.bias")[k];
}

/* o_i of one head: softmax over j <= i of q_i.k_j / sqrt(d) + sum of log f over (j, i]. */
static void attend(const oracle *o, int i, int64_t k, int64_t kv, int64_t d, double q[T][WIDE],
                   double key[T][WIDE], double v[T][WIDE], double u[T][WIDE], double *out)
{
    const bool gated = !o->m->llama && o->m->c.fgate_type != FG_GATE_NONE;
    double bias = 0, total = 0;
    for (int64_t e = 0; e < d; e++) out[e] = 0;
    for (int j = i; j >= 0 && !(o->m->window && i - j >= o->m->window); j--) {
        double s = 0;
        for (int64_t e = 0; e < d; e++) s += q[i][k * d + e] * key[j][kv * d + e] / sqrt((double)d);
        const double p = exp(s + bias);
        total += p;
        for (int64_t e = 0; e < d; e++) out[e] += p * v[j][kv * d + e];
        if (gated) bias += log(sigmoid(gate_logit(o, u[j], k)));
    }
    for (int64_t e = 0; e < d; e++) out[e] /= total;
}

static void time_mix(const oracle *o, double u[T][WIDE], double y[T][WIDE])
{
    const fox_config *c = &o->m->c;
    const int64_t h = c->hidden_size, H = c->num_heads, d = h / H;
    const int64_t G = o->m->kv_heads ? o->m->kv_heads : H;
    const bool shared = c->qk_norm_share_param_across_head, pro = !o->m->llama;
    double q[T][WIDE], k[T][WIDE], v[T][WIDE], out[WIDE], g[WIDE];
    project(o, "q_proj", false, H, d, u, q);
    project(o, "k_proj", pro && c->use_k_shift, G, d, u, k);
    project(o, "v_proj", pro && c->use_v_shift, G, d, u, v);
    for (int t = 0; t < T; t++) {
        if (pro && c->qk_norm) {
            norm(q[t], weight(o, "attn.q_norm.weight"), h, H, shared, 1e-5, q[t]);
            norm(k[t], weight(o, "attn.k_norm.weight"), h, H, shared, 1e-5, k[t]);
        }
        if (c->use_rope) turn(q[t], H, d, t, c->rope_base);
        if (c->use_rope) turn(k[t], G, d, t, c->rope_base);
    }
    for (int t = 0; t < T; t++) {
        for (int64_t n = 0; n < H; n++) attend(o, t, n, n / (H / G), d, q, k, v, u, out + n * d);
        if (pro && c->use_output_norm)
            norm(out, weight(o, "attn.output_norm.weight"), h, H, false, c->norm_eps, out);
        if (pro && c->use_output_gate) {
            product(weight(o, "attn.ogate_proj.weight"), u[t], h, h, g);
            const bool silu = c->output_gate_silu && !c->use_output_norm;
            for (int64_t i = 0; i < h; i++) out[i] *= sigmoid(g[i]) * (silu ? g[i] : 1);
        }
        product(weight(o, "attn.o_proj.weight"), out, h, h, y[t]);
    }
}

static void mlp(const oracle *o, const double *m, double *y)
{
    const int64_t h = o->m->c.hidden_size, I = o->m->c.intermediate_size;
    double gp[2 * WIDE], a[WIDE];
    product(weight(o, "mlp.gate_proj.weight"), m, 2 * I, h, gp);
    for (int64_t i = 0; i < I; i++)
        a[i] = sigmoid(gp[i]) * (o->m->c.mlp_sigmoid ? 1 : gp[i]) * gp[I + i];
    product(weight(o, "mlp.down_proj.weight"), a, h, I, y);
}

static void reference(const model *m, const fg_store *s, const int32_t *tokens, double logits[T][V])
{
    const int64_t h = m->c.hidden_size;
    const double eps = m->c.norm_eps;
    double x[T][WIDE], u[T][WIDE], y[T][WIDE];
    oracle o = { m, s, -1 };
    const double *E = weight(&o, "model.embeddings.weight");
    for (int t = 0; t < T; t++) memcpy(x[t], E + tokens[t] * h, (size_t)h * sizeof x[0][0]);
    for (o.layer = 0; o.layer < m->c.num_hidden_layers; o.layer++) {
        const double *gain = weight(&o, "attn_norm.weight");
        for (int t = 0; t < T; t++) norm(x[t], gain, h, 1, false, eps, u[t]);
        time_mix(&o, u, y);
        for (int t = 0; t < T; t++) {
            for (int64_t i = 0; i < h; i++) x[t][i] += y[t][i];
            norm(x[t], weight(&o, "mlp_norm.weight"), h, 1, false, eps, u[t]);
            mlp(&o, u[t], y[t]);
            for (int64_t i = 0; i < h; i++) x[t][i] += y[t][i];
        }
    }
    o.layer = -1;
    for (int t = 0; t < T; t++) {
        norm(x[t], weight(&o, "model.norm.weight"), h, 1, false, eps, u[t]);
        product(m->c.tie_word_embeddings ? E : weight(&o, "lm_head.weight"), u[t], V, h, logits[t]);
    }
}

/* The library rounds rotary angles to single precision, as the official code does. */
static void expect_equations(const char *what, const model *m)
{
    trial r = start(m);
    int32_t tokens[B * T], labels[B * T];
    double want[T][V], worst = 0;
    fill_batch(tokens, labels);
    const double *got = value(&r, r.logits);
    for (int b = 0; b < B; b++) {
        reference(m, r.store, tokens + b * T, want);
        for (int i = 0; i < T * V; i++)
            worst = fmax(worst, fabs(got[b * T * V + i] - want[i / V][i % V]));
    }
    cr_expect_lt(worst, m->c.use_rope ? 1e-5 : 1e-12, "%s: logits differ by %.1e", what, worst);
    finish(&r);
}

Test(f64_models, every_family_is_its_equations)
{
    model m = tiny_fox_llama();
    expect_equations("fox_llama", &m);
    m = tiny_fox_pro();
    expect_equations("fox_pro", &m);
    m.c.qk_norm_share_param_across_head = true;
    expect_equations("fox_pro, shared", &m);
    m = tiny_transformer_pro();
    expect_equations("transformer_pro", &m);
    m = tiny_transformer();
    expect_equations("transformer", &m);
    m.window = 3;
    expect_equations("transformer, window", &m);
}

Test(f64_models, every_switch_of_fox_is_its_equations)
{
    for (int bits = 0; bits < 1024; bits++) {
        char what[60];
        model m = tiny_fox_llama();
        snprintf(what, sizeof what, "switches %x", (unsigned)bits);
        m.c.use_k_shift = bits & 1;
        m.c.use_v_shift = bits & 2;
        m.c.qk_norm = bits & 4;
        m.c.use_output_gate = bits & 8;
        m.c.use_output_norm = bits & 16;
        m.c.output_gate_silu = bits & 32;
        m.c.mlp_sigmoid = bits & 64;
        m.c.tie_word_embeddings = bits & 128;
        m.c.fgate_type = (fg_gate_kind)(bits >> 8);
        m.c.decay_time_min = 1;
        m.c.decay_time_max = 9;
        m.c.num_hidden_layers = 1;
        expect_equations(what, &m);
    }
}

Test(f64_models, grouped_keys_are_shared_by_consecutive_heads)
{
    model m = tiny_transformer();
    m.c.num_heads = 4;
    for (m.kv_heads = 1; m.kv_heads <= 4; m.kv_heads *= 2) {
        expect_equations("rotary", &m);
        m.c.use_rope = false;
        expect_equations("no positions", &m);
        m.c.use_rope = true;
    }
}

/* ---- numbers of the official code ------------------------------------------------------------ */

typedef struct { const char *name; double norm, first; } golden_gradient;

static const golden_gradient fox_llama_gradients[] = {
    { "lm_head.weight", 1.070674e+00, -8.88283e-02 },
    { "model.embeddings.weight", 4.257226e-01, -1.29561e-02 },
    { "model.layers.0.attn.fgate_proj.bias", 2.280310e-04, 1.62912e-04 },
    { "model.layers.0.attn.fgate_proj.weight", 9.651972e-04, -2.12447e-04 },
    { "model.layers.0.attn.k_proj.weight", 4.064609e-03, -3.54086e-04 },
    { "model.layers.0.attn.o_proj.weight", 3.715707e+00, 1.14257e-01 },
    { "model.layers.0.attn.q_proj.weight", 4.285675e-03, 2.00426e-04 },
    { "model.layers.0.attn.v_proj.weight", 1.142171e+00, 2.43776e-02 },
    { "model.layers.0.attn_norm.weight", 6.599525e-02, 2.07050e-02 },
    { "model.layers.0.mlp.down_proj.weight", 2.395721e+00, 7.57611e-02 },
    { "model.layers.0.mlp.gate_proj.weight", 2.131645e+00, -3.41955e-02 },
    { "model.layers.0.mlp_norm.weight", 3.512886e-01, -1.34926e-01 },
    { "model.norm.weight", 3.756313e-01, 1.48155e-01 },
    { NULL, 0, 0 }
};

static const golden_gradient fox_pro_gradients[] = {
    { "lm_head.weight", 1.072364e+00, -8.53245e-02 },
    { "model.embeddings.weight", 1.529733e-01, -2.46805e-03 },
    { "model.layers.0.attn.fgate_proj.bias", 1.114988e-03, -1.05466e-03 },
    { "model.layers.0.attn.fgate_proj.weight", 3.574246e-03, 1.13794e-03 },
    { "model.layers.0.attn.k_norm.weight", 2.885100e-03, 3.02229e-04 },
    { "model.layers.0.attn.k_proj.linear.weight", 2.741239e-03, -7.40071e-05 },
    { "model.layers.0.attn.k_proj.shift_proj.weight", 1.150462e-03, 6.53639e-05 },
    { "model.layers.0.attn.o_proj.weight", 4.500255e-01, -1.67455e-02 },
    { "model.layers.0.attn.ogate_proj.weight", 3.149153e-02, 8.23316e-04 },
    { "model.layers.0.attn.output_norm.weight", 3.847147e-02, 2.80494e-03 },
    { "model.layers.0.attn.q_norm.weight", 2.834283e-03, 2.77421e-04 },
    { "model.layers.0.attn.q_proj.weight", 3.375682e-03, -4.62359e-04 },
    { "model.layers.0.attn.v_proj.linear.weight", 6.072445e-02, -1.87602e-03 },
    { "model.layers.0.attn.v_proj.shift_proj.weight", 2.183257e-02, -1.81640e-03 },
    { "model.layers.0.attn_norm.weight", 9.792001e-03, 2.55581e-03 },
    { "model.layers.0.mlp.down_proj.weight", 2.266183e+00, 1.59792e-02 },
    { "model.layers.0.mlp.gate_proj.weight", 1.557324e+00, -1.55407e-03 },
    { "model.layers.0.mlp_norm.weight", 1.655401e-01, -2.45627e-02 },
    { "model.norm.weight", 3.959623e-01, 1.96343e-01 },
    { NULL, 0, 0 }
};

static const golden_gradient transformer_llama_gradients[] = {
    { "lm_head.weight", 1.064651e+00, -2.12220e-02 },
    { "model.embeddings.weight", 1.331063e-01, -9.38116e-03 },
    { "model.layers.0.attn.k_proj.weight", 8.880653e-02, 8.95000e-03 },
    { "model.layers.0.attn.o_proj.weight", 1.473651e+00, -7.80715e-02 },
    { "model.layers.0.attn.q_proj.weight", 8.952967e-02, 8.44798e-03 },
    { "model.layers.0.attn.v_proj.weight", 6.529425e-01, -7.24379e-03 },
    { "model.layers.0.attn_norm.weight", 6.655059e-02, 4.44192e-03 },
    { "model.layers.0.mlp.down_proj.weight", 2.572975e+00, 7.14533e-02 },
    { "model.layers.0.mlp.gate_proj.weight", 1.198314e+00, -3.07208e-03 },
    { "model.layers.0.mlp_norm.weight", 2.348408e-01, -1.18998e-01 },
    { "model.norm.weight", 3.186314e-01, 1.46992e-01 },
    { NULL, 0, 0 }
};

static const golden_gradient transformer_pro_gradients[] = {
    { "lm_head.weight", 1.053226e+00, -1.70007e-01 },
    { "model.embeddings.weight", 5.953177e-01, 6.93948e-04 },
    { "model.layers.0.attn.k_norm.weight", 2.392537e-02, -3.69816e-03 },
    { "model.layers.0.attn.k_proj.linear.weight", 3.494161e-02, 6.94196e-04 },
    { "model.layers.0.attn.k_proj.shift_proj.weight", 3.123463e-02, 3.23947e-03 },
    { "model.layers.0.attn.o_proj.weight", 1.056824e+00, 3.03261e-02 },
    { "model.layers.0.attn.ogate_proj.weight", 8.793863e-02, -3.92740e-04 },
    { "model.layers.0.attn.output_norm.weight", 8.337359e-02, 9.95096e-03 },
    { "model.layers.0.attn.q_norm.weight", 2.059437e-02, -3.23063e-03 },
    { "model.layers.0.attn.q_proj.weight", 2.921592e-02, -3.95721e-04 },
    { "model.layers.0.attn.v_proj.linear.weight", 1.097684e-01, 3.01344e-03 },
    { "model.layers.0.attn.v_proj.shift_proj.weight", 7.810520e-02, -2.03466e-02 },
    { "model.layers.0.attn_norm.weight", 2.632344e-02, -9.87691e-03 },
    { "model.layers.0.mlp.down_proj.weight", 2.531372e+00, 3.15460e-02 },
    { "model.layers.0.mlp.gate_proj.weight", 1.099444e+00, -2.44351e-03 },
    { "model.layers.0.mlp_norm.weight", 1.990236e-01, -1.18007e-02 },
    { "model.norm.weight", 4.526124e-01, 2.06141e-01 },
    { NULL, 0, 0 }
};

static const golden_gradient hgrn2_gradients[] = {
    { "lm_head.weight", 1.089638e+00, -7.68483e-02 },
    { "model.embeddings.weight", 1.177609e-01, -7.54070e-04 },
    { "model.layers.0.attn.f_proj.weight", 7.221998e-03, 4.12950e-04 },
    { "model.layers.0.attn.g_norm.weight", 8.731075e-02, 4.87633e-03 },
    { "model.layers.0.attn.i_proj.weight", 1.487694e-01, -5.06054e-03 },
    { "model.layers.0.attn.o_proj.weight", 7.010021e-01, -3.20279e-03 },
    { "model.layers.0.attn.q_proj.weight", 4.738971e-02, -5.96662e-03 },
    { "model.layers.0.attn_norm.weight", 2.761469e-03, -3.23127e-04 },
    { "model.layers.0.mlp.down_proj.weight", 2.409998e+00, 3.20296e-02 },
    { "model.layers.0.mlp.gate_proj.weight", 1.792969e+00, 1.25610e-02 },
    { "model.layers.0.mlp_norm.weight", 1.222380e-01, -3.37147e-02 },
    { "model.norm.weight", 3.937808e-01, 1.58561e-01 },
    { NULL, 0, 0 }
};

static const golden_gradient delta_net_gradients[] = {
    { "lm_head.weight", 1.057527e+00, -1.76995e-02 },
    { "model.embeddings.weight", 1.581908e-01, -3.35271e-03 },
    { "model.layers.0.attn.b_proj.weight", 2.102421e-02, 1.95680e-03 },
    { "model.layers.0.attn.k_conv1d.weight", 3.748512e-01, -5.58145e-02 },
    { "model.layers.0.attn.k_proj.weight", 1.026327e-01, 3.75508e-03 },
    { "model.layers.0.attn.o_norm.weight", 1.000800e-01, -2.77893e-02 },
    { "model.layers.0.attn.o_proj.weight", 2.842979e-01, 2.09202e-02 },
    { "model.layers.0.attn.q_conv1d.weight", 3.957867e-01, -4.21660e-02 },
    { "model.layers.0.attn.q_proj.weight", 1.458401e-01, 8.01081e-03 },
    { "model.layers.0.attn.v_conv1d.weight", 2.740695e-01, -2.68109e-02 },
    { "model.layers.0.attn.v_proj.weight", 1.047952e-01, -4.66950e-03 },
    { "model.layers.0.attn_norm.weight", 6.082547e-02, 1.63439e-03 },
    { "model.layers.0.mlp.down_proj.weight", 1.127777e+00, -9.38598e-02 },
    { "model.layers.0.mlp.gate_proj.weight", 5.396975e-01, -3.93073e-04 },
    { "model.layers.0.mlp_norm.weight", 1.782810e-02, -2.31032e-03 },
    { "model.norm.weight", 2.281288e-01, 4.79840e-02 },
    { NULL, 0, 0 }
};

static const golden_gradient mamba2_gradients[] = {
    { "backbone.embeddings.weight", 3.363408e-01, -2.49836e-02 },
    { "backbone.layers.0.mixer.A_log", 8.119089e-03, -6.10979e-03 },
    { "backbone.layers.0.mixer.D", 3.620749e-01, -2.91666e-02 },
    { "backbone.layers.0.mixer.conv1d.bias", 4.332674e-01, 3.32402e-02 },
    { "backbone.layers.0.mixer.conv1d.weight", 2.620035e+00, -7.96688e-02 },
    { "backbone.layers.0.mixer.dt_bias", 9.702467e-02, 4.08731e-02 },
    { "backbone.layers.0.mixer.in_proj.weight", 1.129559e+00, -2.37206e-02 },
    { "backbone.layers.0.mixer.norm.weight", 3.358270e-01, 2.37819e-02 },
    { "backbone.layers.0.mixer.out_proj.weight", 1.453397e+00, 1.10064e-02 },
    { "backbone.layers.0.norm.weight", 9.548290e-02, 3.35723e-03 },
    { "backbone.norm_f.weight", 5.210490e-01, 2.52002e-01 },
    { "lm_head.weight", 1.167584e+00, -5.98663e-02 },
    { NULL, 0, 0 }
};

/* Printed numbers are good to a unit of their last digit; loose: the rotary angles' part. */
static void expect_printed(const char *what, double got, double want, double unit, double loose)
{
    cr_expect_lt(fabs(got - want), unit + loose, "%s: %.12g instead of %.12g", what, got,
                 want);
}

static double unit_of(double x, int digits)
{
    return x == 0 ? 0 : pow(10, floor(log10(fabs(x))) - digits + 1);
}

static double squares(const double *x, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    return sum;
}

/* want: mean loss, loss_(0,0), loss_(1,6), logits_(0,3,0..3), norm of all gradients. */
static void expect_golden(const model *m, const double want[8], const golden_gradient *gradients)
{
    trial r = start(m);
    const bool rope = m->c.use_rope;
    const double *losses = value(&r, r.losses), *logits = value(&r, r.logits) + 3 * V;
    double total = 0;
    fg_param_info p;
    expect_printed("mean loss", value(&r, r.loss)[0], want[0], 1e-9, rope ? 1e-6 : 0);
    expect_printed("first loss", losses[0], want[1], 1e-8, rope ? 1e-6 : 0);
    expect_printed("last loss", losses[B * T - 1], want[2], 1e-8, rope ? 1e-6 : 0);
    for (int i = 0; i < 4; i++)
        expect_printed("logit", logits[i], want[3 + i], 1e-7, rope ? 1e-6 : 0);
    for (int i = 0; fg_param_at(r.g, i, &p); i++) {
        if (p.init.frozen) continue;                     /* stored and unused */
        const double *g = value(&r, r.grad[i]), sum = squares(g, fg_shape_count(p.shape));
        total += sum;
        for (const golden_gradient *w = gradients; w && w->name; w++) {
            if (strcmp(w->name, p.name)) continue;
            const double loose = rope ? 1e-5 * w->norm : 0;
            expect_printed(p.name, sqrt(sum), w->norm, unit_of(w->norm, 7), loose);
            expect_printed(p.name, g[0], w->first, unit_of(w->first, 6), loose);
        }
    }
    expect_printed("gradient norm", sqrt(total), want[7], 1e-8, rope ? 1e-5 : 0);
    for (const golden_gradient *w = gradients; w && w->name; w++)
        cr_expect(fg_ok(fg_find(r.g, w->name)), "%s is no parameter", w->name);
    finish(&r);
}

Test(f64_models, fox_llama_gives_the_official_numbers)
{
    const model m = tiny_fox_llama();
    const double want[] = { 3.534791917, 4.37421956, 4.93726125, -0.2104267, -0.8098845, 0.9819519,
                            -0.1255583, 5.53047206 };
    expect_golden(&m, want, fox_llama_gradients);
}

Test(f64_models, fox_pro_gives_the_official_numbers)
{
    model m = tiny_fox_pro();
    const double each[] = { 3.653335936, 4.29708326, 5.22441131, 0.0132517, -1.9331406, 1.8283278,
                            0.1914095, 3.68245471 };
    const double shared[] = { 3.653336951, 4.29708326, 5.22435354, 0.0105802, -1.9321768, 1.8300811,
                              0.1887754, 3.68502322 };
    expect_golden(&m, each, fox_pro_gradients);
    m.c.qk_norm_share_param_across_head = true;
    expect_golden(&m, shared, NULL);
}

Test(f64_models, transformer_llama_gives_the_official_numbers)
{
    model m = tiny_transformer();
    const double all[] = { 3.439115192, 4.68826451, 4.25165635, -0.3617984, -0.7912671, 1.1155880,
                           -0.2714823, 3.60106857 };
    const double window[] = { 3.449197875, 4.68826451, 4.25644181, -0.4949336, -0.6032949,
                              1.0696541, -0.4156962, 3.52440693 };
    expect_golden(&m, all, transformer_llama_gradients);
    m.window = 3;
    expect_golden(&m, window, NULL);
}

Test(f64_models, transformer_pro_gives_the_official_numbers)
{
    const model m = tiny_transformer_pro();
    const double want[] = { 3.906274241, 5.76600681, 4.41363365, -0.4447931, -1.8088626, 2.1679809,
                            -0.2564343, 3.73359463 };
    expect_golden(&m, want, transformer_pro_gradients);
}

Test(f64_models, hgrn2_gives_the_official_numbers)
{
    const model m = { .other = hgrn2 };
    const double want[] = { 3.669164683, 4.28488766, 5.44863958, -0.1549275, -1.7816918, 1.8522314,
                            0.0171893, 3.97614447 };
    expect_golden(&m, want, hgrn2_gradients);
}

Test(f64_models, delta_net_gives_the_official_numbers)
{
    const model m = { .other = delta_net };
    const double want[] = { 3.297386754, 3.77245326, 5.84015113, -0.4482031, -0.5877132, 1.0080799,
                            -0.3726201, 1.97989491 };
    expect_golden(&m, want, delta_net_gradients);
}

Test(f64_models, mamba2_gives_the_official_numbers)
{
    const model m = tiny_mamba2();
    const double want[] = { 3.696617339, 4.47128336, 4.36860818, -0.2967018, -1.6783772, 1.8955845,
                            -0.1274250, 4.43982869 };
    expect_golden(&m, want, mamba2_gradients);
}

/* ---- gradients against central differences --------------------------------------------------- */

static void put_line(void *to, const char *line) { fputs(line, to); }

/* The positions' losses are weighted apart and labels include none, so that nothing cancels. */
static void expect_gradients(const char *what, const model *m)
{
    int32_t labels[B * T], tokens[B * T];
    fg_graph *g = fg_graph_new();
    fill_batch(tokens, labels);
    labels[4] = -100;
    fg_tensor x = fg_given_int(g, FG_DIMS(B, T), tokens);
    fg_tensor y = fg_given_int(g, FG_DIMS(B, T), labels);
    fg_tensor logits = build(m, x);
    fg_tensor loss = fg_nn_loss(logits, y);
    trial r = { .g = g, .backend = fg_backend_open("cpu", 1) };
    cr_assert_eq(fg_graph_status(g), FG_OK, "%s: %s", what, fg_graph_message(g));
    r.store = fg_store_new(r.backend);
    cr_assert_eq(fg_store_init(r.store, g, 0), FG_OK, "%s", fg_store_message(r.store));
    fill_parameters(&r);
    fg_gradcheck_result out;
    const fg_put put = getenv("FG_TEST_REPORT") ? put_line : NULL;
    const fg_status s = fg_gradcheck(loss, r.store, 0, put, stderr, &out);
    cr_assert_eq(s, FG_OK, "%s: %s", what, fg_graph_message(g));
    cr_expect_lt(out.worst, 1e-6, "%s: gradient of %s is off by %.1e", what, out.where, out.worst);
    finish(&r);
}

Test(f64_models, gradients_of_whole_models_equal_differences)
{
    model m = tiny_fox_llama();
    m.c.tie_word_embeddings = true;
    expect_gradients("fox_llama", &m);
    m = tiny_fox_pro();
    expect_gradients("fox_pro", &m);
    m.c.recompute = true;
    m.c.qk_norm_share_param_across_head = true;
    expect_gradients("fox_pro, shared, recomputed", &m);
    m.c.fgate_type = FG_GATE_BIAS_ONLY;
    m.c.use_output_norm = false;
    m.c.output_gate_silu = m.c.mlp_sigmoid = true;
    expect_gradients("bias_only, silu gate, sigmoid MLP", &m);
    m = tiny_transformer_pro();
    expect_gradients("transformer_pro", &m);
    m = tiny_transformer();
    m.kv_heads = 1;
    m.window = 3;
    expect_gradients("transformer, shared keys, window", &m);
    m = (model){ .other = hgrn2 };
    expect_gradients("hgrn2", &m);
    m.other = hgrn2_bounded;
    expect_gradients("hgrn2, lower bounds, recomputed", &m);
    m.other = delta_net;
    expect_gradients("delta_net", &m);
    m = tiny_mamba2();
    expect_gradients("mamba2", &m);
    m.kv_heads = 2;
    m.c.recompute = true;
    expect_gradients("mamba2, groups, recomputed", &m);
}
