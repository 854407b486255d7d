/* fox_llama_ops.c - FoX (LLaMA) written out in ops alone, with nothing from fox_models.h.
 *
 *     fox-graph run fox_llama_ops.c --data text.txt
 *
 * The same model, to the bit, as fox_lm with fox_llama_config, with the same parameter names: a
 * checkpoint of one fits the other.
 * Source: Lin, Nikishin, He, Courville 2025, "Forgetting Transformer: Softmax Attention with a
 *         Forget Gate" (arXiv 2503.02130), section 3.
 * Shapes: B batch, T positions, h width, H heads, d = h/H, I MLP width, V vocabulary. */
#include <math.h>
#include <fox_graph.h>

static fg_tensor weight(fg_graph *g, const char *name, int64_t rows, int64_t columns)
{
    const fg_init normal = { FG_NORMAL, .a = 0.02 };
    return fg_param(g, name, FG_DIMS(rows, columns), normal);
}

/* y = W x */
static fg_tensor project(fg_tensor x, const char *name, int64_t n_out)
{
    fg_tensor w = weight(x.graph, name, n_out, fg_dim(x, -1));
    return fg_linear(x, w, (fg_tensor){ 0 });
}

/* y = w x / sqrt(mean(x^2) + eps) */
static fg_tensor norm(fg_tensor x, const char *name)
{
    const fg_init ones = { FG_ONES, .no_decay = true };
    fg_tensor w = fg_param(x.graph, name, FG_DIMS(fg_dim(x, -1)), ones);
    return fg_rms_norm(x, w, 1e-6, 1);
}

/* o_i = sum_(j<=i) softmax_j(q_i.k_j / sqrt(d) + log f_(j+1) + ... + log f_i) v_j,
 * log f_t = log sigmoid(W_f x_t + b_f) */
static fg_tensor attention(fg_tensor x, int64_t H)
{
    const int64_t B = fg_dim(x, 0), T = fg_dim(x, 1), h = fg_dim(x, 2), d = h / H;
    const fg_init zeros = { FG_ZEROS, .no_decay = true };
    const fg_shape heads = FG_DIMS(B, T, H, d);

    fg_tensor q = fg_reshape(project(x, "attn.q_proj.weight", h), heads);           /* [B,T,H,d] */
    fg_tensor k = fg_reshape(project(x, "attn.k_proj.weight", h), heads);
    fg_tensor v = fg_reshape(project(x, "attn.v_proj.weight", h), heads);
    fg_tensor w = weight(x.graph, "attn.fgate_proj.weight", H, h);                  /* [H,h]     */
    fg_tensor b = fg_param(x.graph, "attn.fgate_proj.bias", FG_DIMS(H), zeros);     /* [H]       */
    fg_tensor log_f = fg_log_sigmoid(fg_linear(x, w, b));                           /* [B,T,H]   */
    fg_tensor o = fg_forget_attention(q, k, v, log_f, 1 / sqrt((double)d), 0);      /* [B,T,H,d] */
    return project(fg_reshape(o, FG_DIMS(B, T, h)), "attn.o_proj.weight", h);       /* [B,T,h]   */
}

/* y = W_down (silu(g) * p),   [g | p] = W_gate x */
static fg_tensor mlp(fg_tensor x)
{
    const int64_t h = fg_dim(x, 2), I = (h * 8 / 3 + 255) / 256 * 256;
    fg_tensor gp = project(x, "mlp.gate_proj.weight", 2 * I);                       /* [B,T,2I]  */
    return project(fg_swiglu(gp, FG_ACT_SILU), "mlp.down_proj.weight", h);          /* [B,T,h]   */
}

fg_tensor fg_model(fg_tensor tokens)                                                /* [B,T]     */
{
    fg_graph *g = tokens.graph;
    const int64_t V = fg_setting_int(g, "vocab_size", 256), h = fg_setting_int(g, "width", 128);
    const int64_t L = fg_setting_int(g, "layers", 4), H = fg_setting_int(g, "heads", 4);
    if (H < 1 || h % H) return fg_fail(tokens, FG_ERR_USAGE, "heads must divide width");

    fg_scope_push(g, "model");
    fg_tensor E = weight(g, "embeddings.weight", V, h);                             /* [V,h]     */
    fg_tensor x = fg_embedding(tokens, E);                                          /* [B,T,h]   */
    for (int64_t i = 0; i < L; i++) {
        fg_scope_push(g, fg_name(g, "layers.%lld", (long long)i));
        x = fg_add(x, attention(norm(x, "attn_norm.weight"), H));                   /* [B,T,h]   */
        x = fg_add(x, mlp(norm(x, "mlp_norm.weight")));                             /* [B,T,h]   */
        fg_scope_pop(g);
    }
    x = norm(x, "norm.weight");
    fg_scope_pop(g);
    return project(x, "lm_head.weight", V);                                         /* [B,T,V]   */
}
