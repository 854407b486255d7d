/* fox_ops.h - one function per op.  Every function returns a tensor that has failed (and records
 * why in the graph) when its arguments do not fit; failed inputs pass through silently.
 *
 * Letters: B batch, T positions, H heads, D width or head width, V vocabulary, "..." leading axes.
 * Formulas of all ops, gradients included: docs/ops.md or `fox-graph ops`. */
#ifndef FOX_OPS_H
#define FOX_OPS_H
#include "fox_core.h"
#ifdef __cplusplus
extern "C" {
#endif

/* ---- elementwise ---------------------------------------------------------------------------- */

FG_API fg_tensor (fg_neg)(fg_loc at, fg_tensor x);
FG_API fg_tensor (fg_exp)(fg_loc at, fg_tensor x);
FG_API fg_tensor (fg_log)(fg_loc at, fg_tensor x);
FG_API fg_tensor (fg_sqrt)(fg_loc at, fg_tensor x);
FG_API fg_tensor (fg_rsqrt)(fg_loc at, fg_tensor x);
FG_API fg_tensor (fg_sigmoid)(fg_loc at, fg_tensor x);
FG_API fg_tensor (fg_log_sigmoid)(fg_loc at, fg_tensor x);
FG_API fg_tensor (fg_softplus)(fg_loc at, fg_tensor x);
FG_API fg_tensor (fg_silu)(fg_loc at, fg_tensor x);
FG_API fg_tensor (fg_tanh)(fg_loc at, fg_tensor x);
FG_API fg_tensor (fg_relu)(fg_loc at, fg_tensor x);
FG_API fg_tensor (fg_scale)(fg_loc at, fg_tensor x, double s, double b);          /* s x + b */
FG_API fg_tensor (fg_cast)(fg_loc at, fg_tensor x, fg_dtype to);
FG_API fg_tensor (fg_fill)(fg_loc at, fg_graph *g, fg_shape s, double value);     /* f32 */

/* a and b broadcast: aligned at the last axis, extents equal or 1. */
FG_API fg_tensor (fg_add)(fg_loc at, fg_tensor a, fg_tensor b);
FG_API fg_tensor (fg_sub)(fg_loc at, fg_tensor a, fg_tensor b);
FG_API fg_tensor (fg_mul)(fg_loc at, fg_tensor a, fg_tensor b);
FG_API fg_tensor (fg_div)(fg_loc at, fg_tensor a, fg_tensor b);
FG_API fg_tensor (fg_max)(fg_loc at, fg_tensor a, fg_tensor b);

/* ---- sums and views ------------------------------------------------------------------------- */

FG_API fg_tensor (fg_sum_to)(fg_loc at, fg_tensor x, fg_shape to);
FG_API fg_tensor (fg_sum)(fg_loc at, fg_tensor x);                    /* of all elements, rank 0 */
FG_API fg_tensor (fg_mean)(fg_loc at, fg_tensor x);                   /* of all elements, rank 0 */
FG_API fg_tensor (fg_broadcast_to)(fg_loc at, fg_tensor x, fg_shape to);
FG_API fg_tensor (fg_row_sum)(fg_loc at, fg_tensor x);                /* [...,D] -> [...,1] */
FG_API fg_tensor (fg_row_mean)(fg_loc at, fg_tensor x);
FG_API fg_tensor (fg_row_max)(fg_loc at, fg_tensor x);
FG_API fg_tensor (fg_cumsum)(fg_loc at, fg_tensor x, int axis, bool reverse);

FG_API fg_tensor (fg_reshape)(fg_loc at, fg_tensor x, fg_shape to);   /* costs nothing */
FG_API fg_tensor (fg_permute)(fg_loc at, fg_tensor x, fg_shape order);   /* FG_DIMS(0, 2, 1, 3) */
FG_API fg_tensor (fg_slice)(fg_loc at, fg_tensor x, int axis, int64_t start, int64_t stop);
FG_API fg_tensor (fg_concat)(fg_loc at, fg_tensor a, fg_tensor b, int axis);

FG_API fg_tensor (fg_softmax)(fg_loc at, fg_tensor x);                /* over the last axis */
FG_API fg_tensor (fg_log_sum_exp)(fg_loc at, fg_tensor x);            /* [...,D] -> [...,1] */

/* ---- products and tables -------------------------------------------------------------------- */

/* y = x w^T + b.  x: [...,N], w: [M,N], b: [M] or absent ({0}), y: [...,M]. */
FG_API fg_tensor (fg_linear)(fg_loc at, fg_tensor x, fg_tensor w, fg_tensor b);
/* y = op(a) op(b) over the last two axes, where op transposes if asked; leading axes equal. */
FG_API fg_tensor (fg_matmul)(fg_loc at, fg_tensor a, fg_tensor b, bool ta, bool tb);
/* tokens: i32[...], w: [V,D], y: [...,D].  A token outside [0,V) gives a row of NaN. */
FG_API fg_tensor (fg_embedding)(fg_loc at, fg_tensor tokens, fg_tensor w);
/* Loss of every position, natural log; label -100: 0, any other outside [0,V): NaN.
 * logits: [...,V], labels: i32[...], loss: f32[...]; fg_result(loss, 1) is lse: f32[...], the
 * natural log of the softmax's denominator.  Where logits come straight from fg_linear without bias
 * and go nowhere else, they are never stored whole. */
FG_API fg_tensor (fg_cross_entropy)(fg_loc at, fg_tensor logits, fg_tensor labels);

/* ---- norms and gates ------------------------------------------------------------------------ */

/* y = x rstd w, rstd = 1/sqrt(mean(x^2) + eps); the last axis D falls in `groups` groups, each with
 * its own mean.  w: [D], or [D/groups] shared by the groups. */
FG_API fg_tensor (fg_rms_norm)(fg_loc at, fg_tensor x, fg_tensor w, double eps, int64_t groups);
/* y = rms_norm(x, w) * sigmoid(g).  g: as x. */
FG_API fg_tensor (fg_gated_norm)(fg_loc at, fg_tensor x, fg_tensor w, fg_tensor g, double eps,
                                 int64_t groups);
/* y = rms_norm(x * silu(g), w).  g: as x. */
FG_API fg_tensor (fg_norm_of_gated)(fg_loc at, fg_tensor x, fg_tensor w, fg_tensor g, double eps,
                                    int64_t groups);
/* f = low + (1 - low) sigmoid(z): returns k = 1 - f; fg_result(k, 1) is log_f = ln f, f32, natural.
 * z: [...,D];  low: D numbers in [0, 1), [D] or [1,D]; absent: 0. */
FG_API fg_tensor (fg_forget_gate)(fg_loc at, fg_tensor z, fg_tensor low);
/* y = x rstd, rstd = 1/sqrt(sum(x^2) + eps) over the last axis. */
FG_API fg_tensor (fg_l2_norm)(fg_loc at, fg_tensor x, double eps);
/* x = [g | p], halves of the last axis: y = act(g) * p. */
typedef enum { FG_ACT_SILU, FG_ACT_SIGMOID } fg_act;
FG_API fg_tensor (fg_swiglu)(fg_loc at, fg_tensor x, fg_act act);

/* ---- ops that mix positions; padding, documents and caches come from fg_sequence ------------ */

/* Rotary positions, pairs (i, i + D/2).  x: [B,T,H,D], D even. */
FG_API fg_tensor (fg_rope)(fg_loc at, fg_tensor x, double base);
/* y_t = a_t x_(t-1) + (1 - a_t) x_t, 0 before the first.  x: [B,T,H,D], a: [B,T,H] in (0,1). */
FG_API fg_tensor (fg_shift_mix)(fg_loc at, fg_tensor x, fg_tensor a);
/* Short causal convolution of every channel: u_t = bias + sum_(k<W) w_(W-1-k) x_(t-k), y = u, or
 * silu(u) if asked.  x: [B,T,C]; w: [C,W] or [C,1,W], 1 <= W <= 8; bias: [C] or absent ({0}). */
FG_API fg_tensor (fg_causal_conv)(fg_loc at, fg_tensor x, fg_tensor w, fg_tensor bias, bool silu);
/* Mamba-2's state space scan (Dao and Gu 2024, arXiv 2405.21060), for each head:
 * S_t = e^(dt_t a) S_(t-1) + dt_t x_t b_t^T, y_t = S_t c_t + d x_t.  x: [B,T,H,P]; dt: [B,T,H],
 * after softplus; a: [H], < 0; b, c: [B,T,G,N], G divides H; d: [H] or absent ({0}); state:
 * f32[B,H,P,N], S before row 0, or absent: 0.  y: [B,T,H,P]; fg_result(y, 1) is the last S.
 * Caches (past) hold the state themselves. */
FG_API fg_tensor (fg_ssd_scan)(fg_loc at, fg_tensor x, fg_tensor dt, fg_tensor a, fg_tensor b,
                               fg_tensor c, fg_tensor d, fg_tensor state);
/* The same with what Mamba-2 makes of its parameters: softplus(dt + bias) for dt, -e^a_log for a.
 * bias, a_log: [H]. */
FG_API fg_tensor (fg_mamba2_scan)(fg_loc at, fg_tensor x, fg_tensor dt, fg_tensor bias,
                                  fg_tensor a_log, fg_tensor b, fg_tensor c, fg_tensor d,
                                  fg_tensor state);
/* Causal softmax attention with a forget gate (Lin et al. 2025, arXiv 2503.02130, eq. 4-6).
 * q: [B,T,H,D]; k, v: [B,T,Hkv,D], H a multiple of Hkv; log_f: f32[B,T,H], natural log of the gate,
 * <= 0, or absent ({0}): no gate.  window: keys that a query sees, itself included; 0: all.
 * o: [B,T,H,D]; fg_result(o, 1) is lse: f32[B,T,H], natural log of the softmax's denominator. */
FG_API fg_tensor (fg_forget_attention)(fg_loc at, fg_tensor q, fg_tensor k, fg_tensor v,
                                       fg_tensor log_f, double scale, int64_t window);

/* Linear attention with a decay for every key channel (Yang et al. 2024, arXiv 2312.06635, eq. 3):
 *     S_t = diag(e^(log_a_t)) S_(t-1) + k_t v_t^T,   o_t = scale S_t^T q_t
 * q, k: [B,T,H,K]; v: [B,T,H,V]; log_a: f32[B,T,H,K], natural log of the decay, <= 0.
 * state: f32[B,H,K,V], S before the first row; {0}: zeros (with caches always {0}: they hold it).
 * o: [B,T,H,V]; fg_result(o, 1) is S after the last row: f32[B,H,K,V]. */
FG_API fg_tensor (fg_gated_linear_attention)(fg_loc at, fg_tensor q, fg_tensor k, fg_tensor v,
                                             fg_tensor log_a, double scale, fg_tensor state);

/* The recurrence of HGRN2 (Qin et al. 2024, arXiv 2404.07904, section 3):
 *     f = low + (1 - low) sigmoid(z),   gated linear attention of silu(q), 1 - f, v with decay f
 * q, z: [B,T,H,K]; low: H*K numbers in [0, 1), absent: 0; all else as above. */
FG_API fg_tensor (fg_hgrn2_scan)(fg_loc at, fg_tensor q, fg_tensor z, fg_tensor v, fg_tensor low,
                                 double scale, fg_tensor state);

/* The delta rule of DeltaNet (Yang et al. 2024, arXiv 2406.06484, eq. 2):
 *     S_t = S_(t-1) + beta_t k_t (v_t - S_(t-1)^T k_t)^T,   o_t = scale S_t^T q_t
 * beta: [B,T,H]; all else as above.  It is stable for beta |k|^2 in [0,2]: give k length 1. */
FG_API fg_tensor (fg_delta_rule)(fg_loc at, fg_tensor q, fg_tensor k, fg_tensor v, fg_tensor beta,
                                 double scale, fg_tensor state);
/* The same, of q and k scaled to length 1: x / sqrt(sum(x^2) + eps) over the last axis. */
FG_API fg_tensor (fg_unit_delta_rule)(fg_loc at, fg_tensor q, fg_tensor k, fg_tensor v,
                                      fg_tensor beta, double scale, double eps, fg_tensor state);

/* ---- the list of all ops --------------------------------------------------------------------- */

/* inputs and outputs are names between blanks ("?" after an optional one), attributes are
 * "type name, ...". */
typedef struct {
    const char *name, *inputs, *outputs, *attributes, *formula;
    bool kernel;                         /* computed by a kernel of its own on the CPU */
    bool definition;                     /* can be written in smaller ops */
    bool differentiable;
} fg_op_info;
FG_API int         fg_op_count(void);
FG_API bool        fg_op_at(int i, fg_op_info *out);
/* The k-th small test case of op i, on random parameters of g; {0} past the last. */
FG_API fg_tensor   fg_op_example(fg_graph *g, int i, int k);

#define fg_neg(...)          fg_neg(FG_HERE, __VA_ARGS__)
#define fg_exp(...)          fg_exp(FG_HERE, __VA_ARGS__)
#define fg_log(...)          fg_log(FG_HERE, __VA_ARGS__)
#define fg_sqrt(...)         fg_sqrt(FG_HERE, __VA_ARGS__)
#define fg_rsqrt(...)        fg_rsqrt(FG_HERE, __VA_ARGS__)
#define fg_sigmoid(...)      fg_sigmoid(FG_HERE, __VA_ARGS__)
#define fg_log_sigmoid(...)  fg_log_sigmoid(FG_HERE, __VA_ARGS__)
#define fg_softplus(...)     fg_softplus(FG_HERE, __VA_ARGS__)
#define fg_silu(...)         fg_silu(FG_HERE, __VA_ARGS__)
#define fg_tanh(...)         fg_tanh(FG_HERE, __VA_ARGS__)
#define fg_relu(...)         fg_relu(FG_HERE, __VA_ARGS__)
#define fg_scale(...)        fg_scale(FG_HERE, __VA_ARGS__)
#define fg_cast(...)         fg_cast(FG_HERE, __VA_ARGS__)
#define fg_fill(...)         fg_fill(FG_HERE, __VA_ARGS__)
#define fg_add(...)          fg_add(FG_HERE, __VA_ARGS__)
#define fg_sub(...)          fg_sub(FG_HERE, __VA_ARGS__)
#define fg_mul(...)          fg_mul(FG_HERE, __VA_ARGS__)
#define fg_div(...)          fg_div(FG_HERE, __VA_ARGS__)
#define fg_max(...)          fg_max(FG_HERE, __VA_ARGS__)
#define fg_sum_to(...)       fg_sum_to(FG_HERE, __VA_ARGS__)
#define fg_sum(...)          fg_sum(FG_HERE, __VA_ARGS__)
#define fg_mean(...)         fg_mean(FG_HERE, __VA_ARGS__)
#define fg_broadcast_to(...) fg_broadcast_to(FG_HERE, __VA_ARGS__)
#define fg_row_sum(...)      fg_row_sum(FG_HERE, __VA_ARGS__)
#define fg_row_mean(...)     fg_row_mean(FG_HERE, __VA_ARGS__)
#define fg_row_max(...)      fg_row_max(FG_HERE, __VA_ARGS__)
#define fg_cumsum(...)       fg_cumsum(FG_HERE, __VA_ARGS__)
#define fg_reshape(...)      fg_reshape(FG_HERE, __VA_ARGS__)
#define fg_permute(...)      fg_permute(FG_HERE, __VA_ARGS__)
#define fg_slice(...)        fg_slice(FG_HERE, __VA_ARGS__)
#define fg_concat(...)       fg_concat(FG_HERE, __VA_ARGS__)
#define fg_softmax(...)      fg_softmax(FG_HERE, __VA_ARGS__)
#define fg_log_sum_exp(...)  fg_log_sum_exp(FG_HERE, __VA_ARGS__)
#define fg_linear(...)       fg_linear(FG_HERE, __VA_ARGS__)
#define fg_matmul(...)       fg_matmul(FG_HERE, __VA_ARGS__)
#define fg_embedding(...)    fg_embedding(FG_HERE, __VA_ARGS__)
#define fg_cross_entropy(...) fg_cross_entropy(FG_HERE, __VA_ARGS__)
#define fg_rms_norm(...)     fg_rms_norm(FG_HERE, __VA_ARGS__)
#define fg_gated_norm(...)   fg_gated_norm(FG_HERE, __VA_ARGS__)
#define fg_norm_of_gated(...) fg_norm_of_gated(FG_HERE, __VA_ARGS__)
#define fg_forget_gate(...)  fg_forget_gate(FG_HERE, __VA_ARGS__)
#define fg_l2_norm(...)      fg_l2_norm(FG_HERE, __VA_ARGS__)
#define fg_swiglu(...)       fg_swiglu(FG_HERE, __VA_ARGS__)
#define fg_rope(...)         fg_rope(FG_HERE, __VA_ARGS__)
#define fg_shift_mix(...)    fg_shift_mix(FG_HERE, __VA_ARGS__)
#define fg_causal_conv(...)  fg_causal_conv(FG_HERE, __VA_ARGS__)
#define fg_ssd_scan(...)     fg_ssd_scan(FG_HERE, __VA_ARGS__)
#define fg_mamba2_scan(...)  fg_mamba2_scan(FG_HERE, __VA_ARGS__)
#define fg_forget_attention(...) fg_forget_attention(FG_HERE, __VA_ARGS__)
#define fg_gated_linear_attention(...) fg_gated_linear_attention(FG_HERE, __VA_ARGS__)
#define fg_hgrn2_scan(...)   fg_hgrn2_scan(FG_HERE, __VA_ARGS__)
#define fg_delta_rule(...)   fg_delta_rule(FG_HERE, __VA_ARGS__)
#define fg_unit_delta_rule(...) fg_unit_delta_rule(FG_HERE, __VA_ARGS__)

#ifdef __cplusplus
}
#endif
#endif
