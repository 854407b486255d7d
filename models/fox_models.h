/* fox_models.h - layers and models, written only with fox_core.h and fox_ops.h.
 *
 * Layers that make parameters are fg_nn_*; they name them "<scope>.<name>.weight" as the official
 * checkpoints do.  B batch, T positions, h model width, H heads, d = h/H head width, V vocabulary,
 * "..." any leading axes. */
#ifndef FOX_MODELS_H
#define FOX_MODELS_H
#include "fox_ops.h"
#ifdef __cplusplus
extern "C" {
#endif

/* ---- layers --------------------------------------------------------------------------------- */

/* The parameter "<name>.weight": normal with mean 0 and the standard deviation of the graph's fact
 * initializer_range, 0.02 without one. */
FG_API fg_tensor (fg_nn_weight)(fg_loc at, fg_graph *g, const char *name, fg_shape s);
/* x [...,N] -> [...,n_out] through a weight [n_out,N]; affine adds a bias, zero at first. */
FG_API fg_tensor (fg_nn_linear)(fg_loc at, fg_tensor x, const char *name, int64_t n_out);
FG_API fg_tensor (fg_nn_affine)(fg_loc at, fg_tensor x, const char *name, int64_t n_out);
/* The same without bias, at first uniform in +-2^-2.5 sqrt(6 / (N + n_out)): Xavier, small gain. */
FG_API fg_tensor (fg_nn_xavier)(fg_loc at, fg_tensor x, const char *name, int64_t n_out);
FG_API fg_tensor (fg_nn_embed)(fg_loc at, fg_tensor tokens, const char *name, int64_t vocab,
                               int64_t width);
/* A log forget gate [B,T,H] that is the same at all positions: log sigmoid(b), parameter "<name>"
 * [H].  It starts at -1 / tau, tau log-spaced over [tau_min, tau_max] from the first head to the
 * last; tau_min 0: b starts at 0.  frozen: b is not trained. */
FG_API fg_tensor (fg_nn_decay)(fg_loc at, fg_tensor x, const char *name, int64_t heads,
                               double tau_min, double tau_max, bool frozen);
/* RMS norm with a new gain of ones: of the last axis, or of each head of [B,T,H,d]; the gain is
 * [H*d], or [d] if the heads share it.  eps 0: 1e-6. */
FG_API fg_tensor (fg_nn_norm)(fg_loc at, fg_tensor x, const char *name, double eps);
FG_API fg_tensor (fg_nn_head_norm)(fg_loc at, fg_tensor x, const char *name, double eps,
                                   bool shared);
/* Each head's norm, then a gate if there is one: merge(norm(x)) * sigmoid(gate).  x [B,T,H,d],
 * gate [B,T,H*d] -> [B,T,H*d]. */
FG_API fg_tensor (fg_nn_gated_norm)(fg_loc at, fg_tensor x, const char *name, fg_tensor gate,
                                    double eps);
/* SwiGLU: down(act(g) * p), [g | p] = gate_proj x of 2 * hidden rows. */
FG_API fg_tensor (fg_nn_mlp)(fg_loc at, fg_tensor x, const char *name, int64_t hidden, fg_act act);
FG_API fg_tensor (fg_nn_heads)(fg_loc at, fg_tensor x, int64_t heads);  /* [B,T,H*d] -> [B,T,H,d] */
FG_API fg_tensor (fg_nn_merge)(fg_loc at, fg_tensor x);                 /* [B,T,H,d] -> [B,T,H*d] */
/* What the families share: x = embeddings; layers of r = x + mixer(norm(x)), x = r + mlp(norm(r));
 * logits = head(norm(x)).  mixer gets norm(x) [B,T,h], config and the number of the layer, 0 for
 * the first and for a block by itself, in the scope "attn". */
typedef struct {
    fg_tensor (*mixer)(fg_tensor x, const void *config, int64_t layer);
    const void *config;
    int64_t vocab, width, layers, heads;
    int64_t hidden;                          /* of the MLP; 0: from ratio */
    double  ratio, eps;                      /* 0: 4 and 1e-6 */
    fg_act  act;
    bool    tied, recompute;                 /* one table for embedding and head; see fox_config */
    bool    small_down;                      /* down_proj starts 1/sqrt(2 layers) as large */
    int64_t layer;                           /* of this block; fg_nn_lm counts */
} fg_nn_skeleton;
FG_API fg_tensor (fg_nn_block)(fg_loc at, fg_tensor x, fg_nn_skeleton s);    /* in this scope */
FG_API fg_tensor (fg_nn_lm)(fg_loc at, fg_tensor tokens, fg_nn_skeleton s);   /* to [B,T,V] */
/* Mean of cross_entropy over all positions.  A label of -100 adds nothing and is counted. */
FG_API fg_tensor (fg_nn_loss)(fg_loc at, fg_tensor logits, fg_tensor labels);
/* hidden width of an MLP: 256 * ceil(trunc(h * ratio * 2 / 3) / 256). */
FG_API int64_t     fg_nn_mlp_width(int64_t h, double ratio);

#define fg_nn_weight(...)    fg_nn_weight(FG_HERE, __VA_ARGS__)
#define fg_nn_linear(...)    fg_nn_linear(FG_HERE, __VA_ARGS__)
#define fg_nn_affine(...)    fg_nn_affine(FG_HERE, __VA_ARGS__)
#define fg_nn_xavier(...)    fg_nn_xavier(FG_HERE, __VA_ARGS__)
#define fg_nn_embed(...)     fg_nn_embed(FG_HERE, __VA_ARGS__)
#define fg_nn_decay(...)     fg_nn_decay(FG_HERE, __VA_ARGS__)
#define fg_nn_norm(...)      fg_nn_norm(FG_HERE, __VA_ARGS__)
#define fg_nn_head_norm(...) fg_nn_head_norm(FG_HERE, __VA_ARGS__)
#define fg_nn_gated_norm(...) fg_nn_gated_norm(FG_HERE, __VA_ARGS__)
#define fg_nn_mlp(...)       fg_nn_mlp(FG_HERE, __VA_ARGS__)
#define fg_nn_heads(...)     fg_nn_heads(FG_HERE, __VA_ARGS__)
#define fg_nn_merge(...)     fg_nn_merge(FG_HERE, __VA_ARGS__)
#define fg_nn_block(...)     fg_nn_block(FG_HERE, __VA_ARGS__)
#define fg_nn_lm(...)        fg_nn_lm(FG_HERE, __VA_ARGS__)
#define fg_nn_loss(...)      fg_nn_loss(FG_HERE, __VA_ARGS__)

/* ---- FoX and Transformer (Pro): one architecture, three settings (Lin et al. 2025) ----------- */

typedef enum { FG_GATE_FULL, FG_GATE_BIAS_ONLY, FG_GATE_FIXED, FG_GATE_NONE } fg_gate_kind;

/* Fields bear the names of config.json; zero means the official default where that is not zero. */
typedef struct {
    int64_t vocab_size, hidden_size, num_hidden_layers, num_heads;
    int64_t intermediate_size;           /* 0: from hidden_ratio */
    double  hidden_ratio;                /* 0: 4 */
    double  norm_eps;                    /* 0: 1e-6 */
    double  rope_base;                   /* 0: 500000 */
    double  initializer_range;           /* 0: 0.02 */
    fg_gate_kind fgate_type;
    double  decay_time_min, decay_time_max;    /* > 0: where bias_only and fixed gates start */
    bool    use_rope, use_k_shift, use_v_shift, qk_norm, qk_norm_share_param_across_head;
    bool    use_output_gate, use_output_norm, output_gate_silu, mlp_sigmoid, tie_word_embeddings;
    bool    recompute;                   /* halves of a block run again in the backward pass */
} fox_config;

FG_API fox_config fox_llama_config(int64_t vocab, int64_t width, int64_t layers, int64_t heads);
FG_API fox_config fox_pro_config(int64_t vocab, int64_t width, int64_t layers, int64_t heads);
FG_API fox_config transformer_pro_config(int64_t vocab, int64_t width, int64_t layers,
                                         int64_t heads);
FG_API fg_tensor (fox_block)(fg_loc at, fg_tensor x, const fox_config *c);    /* in this scope */
FG_API fg_tensor (fox_lm)(fg_loc at, fg_tensor tokens, const fox_config *c);   /* to [B,T,V] */
#define fox_block(...) fox_block(FG_HERE, __VA_ARGS__)
#define fox_lm(...)    fox_lm(FG_HERE, __VA_ARGS__)

/* ---- Transformer (LLaMA), also with a sliding window ----------------------------------------- */

typedef struct {
    int64_t vocab_size, hidden_size, num_hidden_layers, num_heads;
    int64_t num_kv_heads;                /* 0: num_heads */
    int64_t intermediate_size, window_size;    /* 0: from hidden_ratio; 0: all keys */
    double  hidden_ratio, norm_eps, rope_base, initializer_range;   /* as fox_config */
    bool    no_rope, mlp_sigmoid, tie_word_embeddings, recompute;
} transformer_config;

FG_API transformer_config transformer_llama_config(int64_t vocab, int64_t width, int64_t layers,
                                                   int64_t heads);
FG_API fg_tensor (transformer_block)(fg_loc at, fg_tensor x, const transformer_config *c);
FG_API fg_tensor (transformer_lm)(fg_loc at, fg_tensor tokens, const transformer_config *c);
#define transformer_block(...) transformer_block(FG_HERE, __VA_ARGS__)
#define transformer_lm(...)    transformer_lm(FG_HERE, __VA_ARGS__)

/* ---- HGRN2 (Qin et al. 2024) ----------------------------------------------------------------- */

/* What becomes of the parameter model.lower_bounds [layers,width]: APPLIED bounds the forget gates
 * from below, as in HGRN2's paper; STORED keeps it without using it, as the code of the FoX release
 * does, so that its checkpoints give its numbers; NO_BOUNDS has no such parameter. */
typedef enum { HGRN2_BOUNDS_APPLIED, HGRN2_BOUNDS_STORED, HGRN2_NO_BOUNDS } hgrn2_bounds;
typedef struct {
    int64_t vocab_size, hidden_size, num_hidden_layers;
    int64_t num_heads, expand_ratio;     /* 0: hidden_size / expand_ratio; 0: 128 keys a head */
    int64_t intermediate_size;           /* 0: from hidden_ratio */
    double  hidden_ratio, norm_eps, initializer_range;              /* as fox_config */
    hgrn2_bounds lower_bound;
    bool    tie_word_embeddings, recompute;
} hgrn2_config;

FG_API hgrn2_config hgrn2_lm_config(int64_t vocab, int64_t width, int64_t layers, int64_t expand);
FG_API fg_tensor (hgrn2_block)(fg_loc at, fg_tensor x, const hgrn2_config *c);   /* no bounds */
FG_API fg_tensor (hgrn2_lm)(fg_loc at, fg_tensor tokens, const hgrn2_config *c);  /* to [B,T,V] */
#define hgrn2_block(...) hgrn2_block(FG_HERE, __VA_ARGS__)
#define hgrn2_lm(...)    hgrn2_lm(FG_HERE, __VA_ARGS__)

/* ---- DeltaNet (Yang et al. 2024) ------------------------------------------------------------- */

typedef struct {
    int64_t vocab_size, hidden_size, num_hidden_layers, num_heads;
    int64_t conv_size, intermediate_size;    /* 0: 4; 0: from hidden_ratio */
    double  hidden_ratio, norm_eps, initializer_range;              /* as fox_config */
    bool    tie_word_embeddings, recompute;
} delta_net_config;

FG_API delta_net_config delta_net_lm_config(int64_t vocab, int64_t width, int64_t layers,
                                            int64_t heads);
FG_API fg_tensor (delta_net_block)(fg_loc at, fg_tensor x, const delta_net_config *c);
FG_API fg_tensor (delta_net_lm)(fg_loc at, fg_tensor tokens, const delta_net_config *c);
#define delta_net_block(...) delta_net_block(FG_HERE, __VA_ARGS__)
#define delta_net_lm(...)    delta_net_lm(FG_HERE, __VA_ARGS__)

/* ---- Mamba-2 (Dao and Gu 2024) --------------------------------------------------------------- */

/* Fields bear the names of config.json; zero means the default written beside.
 * num_heads * head_dim must be expand * width. */
typedef struct {
    int64_t vocab_size, hidden_size, num_hidden_layers, num_heads;
    int64_t head_dim, state_size, expand, conv_kernel, n_groups;    /* 0: 64, 64, 2, 4, 1 */
    double  layer_norm_epsilon, initializer_range;      /* 0: 1e-5, 0.1 (of the embedding) */
    double  time_step_min, time_step_max, time_step_floor;  /* first dt; 0: 0.001, 0.1, 1e-4 */
    double  time_step_low, time_step_high;              /* limits of dt; high 0: none */
    bool    no_conv_bias, tie_word_embeddings, recompute;
} mamba2_config;

/* The paper's model: expand 2, head_dim 2 width / heads, state_size 128, one group. */
FG_API mamba2_config mamba2_lm_config(int64_t vocab, int64_t width, int64_t layers, int64_t heads);
/* c with defaults in place of zeros. */
FG_API mamba2_config mamba2_defaults(const mamba2_config *c);
FG_API fg_tensor (mamba2_block)(fg_loc at, fg_tensor x, const mamba2_config *c);
FG_API fg_tensor (mamba2_lm)(fg_loc at, fg_tensor tokens, const mamba2_config *c); /* to [B,T,V] */
#define mamba2_block(...) mamba2_block(FG_HERE, __VA_ARGS__)
#define mamba2_lm(...)    mamba2_lm(FG_HERE, __VA_ARGS__)

/* ---- config.json ----------------------------------------------------------------------------- */

/* Sets every field of the model's config.json as a fact of g; the *_lm builders begin with it. */
FG_API void fox_config_record(fg_graph *g, const fox_config *c);
FG_API void transformer_config_record(fg_graph *g, const transformer_config *c);
FG_API void hgrn2_config_record(fg_graph *g, const hgrn2_config *c);
FG_API void delta_net_config_record(fg_graph *g, const delta_net_config *c);
FG_API void mamba2_config_record(fg_graph *g, const mamba2_config *c);

/* ---- catalog: the paper's models by name ----------------------------------------------------- */

/* "fox-pro-760m", "transformer-llama-125m", ...; lr and tokens are the paper's for the first budget
 * of the size. */
typedef struct { const char *name, *family; double lr; int64_t tokens, context, batch; } fg_preset;
FG_API int              fg_preset_count(void);
FG_API const fg_preset *fg_preset_at(int i);
FG_API const fg_preset *fg_preset_find(const char *name);                /* NULL if none */
FG_API fg_tensor      (fg_preset_build)(fg_loc at, const char *name, fg_tensor tokens);
#define fg_preset_build(...) fg_preset_build(FG_HERE, __VA_ARGS__)

#ifdef __cplusplus
}
#endif
#endif
