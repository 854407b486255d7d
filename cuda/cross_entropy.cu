/* cross_entropy.cu - ops/cross_entropy.c on a GPU: the loss of every position from logits, and its
 * gradient.
 *
 *     lse_t = ln sum_c e^(x_(t,c))      loss_t = lse_t - x_(t,label_t)
 *     gx_(t,c) = gloss_t (e^(x_(t,c) - lse_t) - [c = label_t])
 *
 * Bytes: the loss reads x once whatever V is: the sum is rescaled when a greater logit comes.  The
 * gradient reads x and writes gx once.  Label -100 gives 0, any other outside [0,V) NaN. */
#include "rows.cuh"

#define NO_LABEL (-100)

template <int T>
static __global__ void __launch_bounds__(fg_team_block<T>)
losses(fg_in x, const int32_t *labels, fg_out loss, fg_out lse, int64_t rows, int64_t V)
{
    const int64_t t = (int64_t)blockIdx.x * fg_team_rows<T> + threadIdx.x / T;
    const fg_row r = fg_row_at(t * V, t < rows ? t * V + V : t * V);
    const fg_exp_sum all = fg_row_exp_sum<T>(x, r);
    if (threadIdx.x % T || t >= rows) return;
    const int64_t label = labels[t];
    const float l = fg_center(all.m) + logf(all.s);
    lse.put(t, l);
    loss.put(t, label == NO_LABEL ? 0 : label >= 0 && label < V ? l - x[r.from + label] : NAN);
}

static void loss_launch(const fg_exec *e, cudaStream_t stream)
{
    const int64_t V = fg_last_of(&e->in_shape[0]), rows = fg_count_of(&e->in_shape[0]) / V;
    const fg_in x = fg_input_of(e, 0);
    const int32_t *labels = (const int32_t *)e->in[1];
    const fg_out loss = fg_output_of(e, 0), lse = fg_output_of(e, 1);
    if (V <= 64)
        losses<8><<<fg_blocks(rows, fg_team_rows<8>), fg_team_block<8>, 0, stream>>>(
            x, labels, loss, lse, rows, V);
    else if (V <= 2048)
        losses<32><<<fg_blocks(rows, fg_team_rows<32>), fg_team_block<32>, 0, stream>>>(
            x, labels, loss, lse, rows, V);
    else if (rows < 132)                         /* an H100 has more processors than that */
        losses<1024><<<(unsigned)rows, 1024, 0, stream>>>(x, labels, loss, lse, rows, V);
    else
        losses<256><<<(unsigned)rows, 256, 0, stream>>>(x, labels, loss, lse, rows, V);
}
FG_KERNEL(cross_entropy) = { .launch = loss_launch };

/* ---- gradient ------------------------------------------------------------------------------- */

/* Four eights a thread; a row takes `parts` teams. */
#define AT_ONCE 4

template <int T>
static __global__ void __launch_bounds__(fg_team_block<T>)
gradients(fg_in gloss, fg_in x, const int32_t *labels, fg_in lse, fg_out gx, int64_t rows,
          int64_t V, unsigned parts)
{
    const int64_t t = (int64_t)(blockIdx.x / parts) * fg_team_rows<T> + threadIdx.x / T;
    if (t >= rows) return;
    const fg_row r = fg_row_at(t * V, t * V + V);
    const int64_t first = (int64_t)(blockIdx.x % parts) * T * AT_ONCE + threadIdx.x % T;
    const int64_t label = labels[t];
    const bool none = label == NO_LABEL, valid = label >= 0 && label < V;
    const float g = none ? 0 : valid ? gloss[t] : NAN, l = lse[t];
    fg_raw8 raw[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++)
        if (first + u * T < r.eights) raw[u] = fg_load_row8(x, r, first + u * T, 0);
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
        const int64_t k = first + u * T;
        if (k >= r.eights) continue;
        fg_vec8 v = fg_floats(x, raw[u]);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = none ? 0 : g * expf(v[j] - l);
        const int64_t at = r.from + label - 8 * (r.first + k);       /* the label's place in v */
        if (valid && at >= 0 && at < 8)
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] -= j == (int)at ? g : 0;
        fg_store_row8(gx, r, k, v);
    }
}

static void gradient_launch(const fg_exec *e, cudaStream_t stream)
{
    const int64_t V = fg_last_of(&e->in_shape[1]), rows = fg_count_of(&e->in_shape[1]) / V;
    const int64_t eights = (V + 7) / 8 + 1;
    const fg_in gloss = fg_input_of(e, 0), x = fg_input_of(e, 1), lse = fg_input_of(e, 3);
    const int32_t *labels = (const int32_t *)e->in[2];
    const fg_out gx = fg_output_of(e, 0);
    const unsigned few = fg_blocks(eights, 32 * AT_ONCE), many = fg_blocks(eights, 256 * AT_ONCE);
    if (V <= 2048)
        gradients<32><<<fg_blocks(rows, fg_team_rows<32>) * few, fg_team_block<32>, 0, stream>>>(
            gloss, x, labels, lse, gx, rows, V, few);
    else
        gradients<256><<<(unsigned)rows * many, 256, 0, stream>>>(gloss, x, labels, lse, gx, rows,
                                                                  V, many);
}
FG_KERNEL(cross_entropy_grad) = { .launch = gradient_launch };
