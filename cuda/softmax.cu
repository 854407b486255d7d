/* softmax.cu - ops/softmax.c on a GPU: softmax and ln-sum-exp of rows, the causal mask of attention
 * scores.
 *
 * Bytes: every tensor once.  A row of up to about 16000 elements stays in registers; a longer one
 * is read a second time, mostly from the second-level cache.  A row of -inf alone gives
 * softmax 0 and log_sum_exp -inf; NaN goes through. */
#include "rows.cuh"

/* ---- softmax -------------------------------------------------------------------------------- */

/* Teams of T, K eights a thread. */
template <int T, int K>
static __global__ void __launch_bounds__(fg_team_block<T>)
softmax_rows(fg_in x, fg_out y, int64_t rows, int64_t n)
{
    const int64_t row = (int64_t)blockIdx.x * fg_team_rows<T> + threadIdx.x / T;
    const fg_row r = fg_row_at(row * n, row < rows ? row * n + n : row * n);
    const int lane = threadIdx.x % T;
    fg_raw8 raw[K];
    fg_vec8 v[K];
#pragma unroll
    for (int k = 0; k < K; k++) raw[k] = fg_load_row8(x, r, lane + k * T, -INFINITY);
    float m = -INFINITY, sum = 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
        v[k] = fg_floats(x, raw[k]);
#pragma unroll
        for (int j = 0; j < 8; j++) m = fmaxf(m, v[k][j]);
    }
    const float center = fg_center(fg_team_max<T>(m));
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int j = 0; j < 8; j++) {
            v[k][j] = expf(v[k][j] - center);
            sum += v[k][j];
        }
    sum = fg_team_sum<T>(sum);
    const float share = sum == 0 ? 0 : 1 / sum;
#pragma unroll
    for (int k = 0; k < K; k++) {
#pragma unroll
        for (int j = 0; j < 8; j++) v[k][j] *= share;
        fg_store_row8(y, r, lane + k * T, v[k]);
    }
}

template <int T>
static __global__ void __launch_bounds__(T)
softmax_long_rows(fg_in x, fg_out y, int64_t n)
{
    const int64_t row = blockIdx.x;
    const fg_row r = fg_row_at(row * n, row * n + n);
    const fg_exp_sum all = fg_row_exp_sum<T>(x, r);
    const float center = fg_center(all.m), share = all.s == 0 ? 0 : 1 / all.s;
    for (int64_t k = threadIdx.x; k < r.eights; k += T) {
        fg_vec8 v = fg_floats(x, fg_load_row8(x, r, k, -INFINITY));
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = expf(v[j] - center) * share;
        fg_store_row8(y, r, k, v);
    }
}

/* Teams and eights a thread by the eights that a row may touch. */
#define BY_LENGTH(n, kernel, long_launch, rows, ...)                                             \
    do {                                                                                         \
        const int64_t eights = (n) % 8 ? ((n) + 7) / 8 + 1 : (n) / 8;                            \
        if (eights <= 8)                                                                         \
            kernel<8, 1><<<fg_blocks(rows, fg_team_rows<8>), fg_team_block<8>, 0, stream>>>(     \
                __VA_ARGS__);                                                                    \
        else if (eights <= 32)                                                                   \
            kernel<32, 1><<<fg_blocks(rows, fg_team_rows<32>), fg_team_block<32>, 0, stream>>>(  \
                __VA_ARGS__);                                                                    \
        else if (eights <= 64)                                                                   \
            kernel<32, 2><<<fg_blocks(rows, fg_team_rows<32>), fg_team_block<32>, 0, stream>>>(  \
                __VA_ARGS__);                                                                    \
        else if (eights <= 128)                                                                  \
            kernel<32, 4><<<fg_blocks(rows, fg_team_rows<32>), fg_team_block<32>, 0, stream>>>(  \
                __VA_ARGS__);                                                                    \
        else if (eights <= 256)                                                                  \
            kernel<128, 2><<<(unsigned)(rows), 128, 0, stream>>>(__VA_ARGS__);                   \
        else if (eights <= 512)                                                                  \
            kernel<128, 4><<<(unsigned)(rows), 128, 0, stream>>>(__VA_ARGS__);                   \
        else if (eights <= 1024)                                                                 \
            kernel<512, 2><<<(unsigned)(rows), 512, 0, stream>>>(__VA_ARGS__);                   \
        else if (eights <= 2048)                                                                 \
            kernel<512, 4><<<(unsigned)(rows), 512, 0, stream>>>(__VA_ARGS__);                   \
        else long_launch;                                                                        \
    } while (0)

static void softmax_launch(const fg_exec *e, cudaStream_t stream)
{
    const int64_t n = fg_last_of(&e->in_shape[0]), rows = fg_count_of(&e->in_shape[0]) / n;
    const fg_in x = fg_input_of(e, 0);
    const fg_out y = fg_output_of(e, 0);
    BY_LENGTH(n, softmax_rows,
              (softmax_long_rows<1024><<<(unsigned)rows, 1024, 0, stream>>>(x, y, n)), rows, x, y,
              rows, n);
}
FG_KERNEL(softmax) = { .launch = softmax_launch };

/* ---- softmax_grad: gx = y (gy - sum_k gy_k y_k) --------------------------------------------- */

template <int T, int K>
static __global__ void __launch_bounds__(fg_team_block<T>)
softmax_grad_rows(fg_in gy, fg_in y, fg_out gx, int64_t rows, int64_t n)
{
    const int64_t row = (int64_t)blockIdx.x * fg_team_rows<T> + threadIdx.x / T;
    const fg_row r = fg_row_at(row * n, row < rows ? row * n + n : row * n);
    const int lane = threadIdx.x % T;
    fg_raw8 a[K], b[K];
#pragma unroll
    for (int k = 0; k < K; k++) {
        a[k] = fg_load_row8(gy, r, lane + k * T, 0);
        b[k] = fg_load_row8(y, r, lane + k * T, 0);
    }
    float dot = 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
        const fg_vec8 g = fg_floats(gy, a[k]), p = fg_floats(y, b[k]);
#pragma unroll
        for (int j = 0; j < 8; j++) dot = fmaf(g[j], p[j], dot);
    }
    dot = fg_team_sum<T>(dot);
#pragma unroll
    for (int k = 0; k < K; k++) {
        const fg_vec8 g = fg_floats(gy, a[k]);
        fg_vec8 p = fg_floats(y, b[k]);
#pragma unroll
        for (int j = 0; j < 8; j++) p[j] *= g[j] - dot;
        fg_store_row8(gx, r, lane + k * T, p);
    }
}

template <int T>
static __global__ void __launch_bounds__(T)
softmax_grad_long_rows(fg_in gy, fg_in y, fg_out gx, int64_t n)
{
    const int64_t row = blockIdx.x;
    const fg_row r = fg_row_at(row * n, row * n + n);
    float dot = 0;
    for (int64_t k = threadIdx.x; k < r.eights; k += T) {
        const fg_raw8 a = fg_load_row8(gy, r, k, 0), b = fg_load_row8(y, r, k, 0);
        const fg_vec8 g = fg_floats(gy, a), p = fg_floats(y, b);
#pragma unroll
        for (int j = 0; j < 8; j++) dot = fmaf(g[j], p[j], dot);
    }
    dot = fg_team_sum<T>(dot);
    for (int64_t k = threadIdx.x; k < r.eights; k += T) {
        const fg_raw8 a = fg_load_row8(gy, r, k, 0), b = fg_load_row8(y, r, k, 0);
        const fg_vec8 g = fg_floats(gy, a);
        fg_vec8 p = fg_floats(y, b);
#pragma unroll
        for (int j = 0; j < 8; j++) p[j] *= g[j] - dot;
        fg_store_row8(gx, r, k, p);
    }
}

static void softmax_grad_launch(const fg_exec *e, cudaStream_t stream)
{
    const int64_t n = fg_last_of(&e->in_shape[0]), rows = fg_count_of(&e->in_shape[0]) / n;
    const fg_in gy = fg_input_of(e, 0), y = fg_input_of(e, 1);
    const fg_out gx = fg_output_of(e, 0);
    BY_LENGTH(n, softmax_grad_rows,
              (softmax_grad_long_rows<1024><<<(unsigned)rows, 1024, 0, stream>>>(gy, y, gx, n)),
              rows, gy, y, gx, rows, n);
}
FG_KERNEL(softmax_grad) = { .launch = softmax_grad_launch };

/* ---- log_sum_exp ---------------------------------------------------------------------------- */

template <int T>
static __global__ void __launch_bounds__(fg_team_block<T>)
log_sum_exp_rows(fg_in x, fg_out y, int64_t rows, int64_t n)
{
    const int64_t row = (int64_t)blockIdx.x * fg_team_rows<T> + threadIdx.x / T;
    const fg_row r = fg_row_at(row * n, row < rows ? row * n + n : row * n);
    const fg_exp_sum all = fg_row_exp_sum<T>(x, r);
    if (threadIdx.x % T == 0 && row < rows) y.put(row, fg_log_of(all));
}

static void log_sum_exp_launch(const fg_exec *e, cudaStream_t stream)
{
    const int64_t n = fg_last_of(&e->in_shape[0]), rows = fg_count_of(&e->in_shape[0]) / n;
    const fg_in x = fg_input_of(e, 0);
    const fg_out y = fg_output_of(e, 0);
    if (n <= 64)
        log_sum_exp_rows<8><<<fg_blocks(rows, fg_team_rows<8>), fg_team_block<8>, 0, stream>>>(
            x, y, rows, n);
    else if (n <= 2048)
        log_sum_exp_rows<32><<<fg_blocks(rows, fg_team_rows<32>), fg_team_block<32>, 0, stream>>>(
            x, y, rows, n);
    else if (n <= 8192)
        log_sum_exp_rows<128><<<(unsigned)rows, 128, 0, stream>>>(x, y, rows, n);
    else
        log_sum_exp_rows<256><<<(unsigned)rows, 256, 0, stream>>>(x, y, rows, n);
}
FG_KERNEL(log_sum_exp) = { .launch = log_sum_exp_launch };

struct log_sum_exp_grad_of {
    __device__ __forceinline__ float operator()(const float *in) const
    {
        return in[0] * expf(in[1] - (in[2] == -INFINITY ? 0 : in[2]));
    }
};
static void log_sum_exp_grad_launch(const fg_exec *e, cudaStream_t stream)
{
    const int64_t n = fg_last_of(&e->in_shape[1]), rows = fg_count_of(&e->in_shape[1]) / n;
    const fg_shape whole = { 2, { rows, n } }, column = { 2, { rows, 1 } };
    const fg_shape *in[] = { &column, &whole, &column };
    fg_exec as_matrix = *e;
    as_matrix.out_shape = &whole;
    fg_map_broadcast<log_sum_exp_grad_of, 3>(&as_matrix, stream, in, log_sum_exp_grad_of());
}
FG_KERNEL(log_sum_exp_grad) = { .launch = log_sum_exp_grad_launch };

/* ---- attention_mask ------------------------------------------------------------------------- */

struct mask {
    const int32_t *first, *past;
    fg_divisor H, M, N;
    int64_t window;
    /* The keys that the query of row r sees: [*low, *high). */
    __device__ void sees(int64_t r, int64_t *low, int64_t *high) const
    {
        const int64_t q = fg_divide(r, M), i = r - q * M.d, p = i + (past ? *past : 0);
        *low = first ? first[fg_divide(q, H) * M.d + i] : 0;
        *high = p + 1 < N.d ? p + 1 : N.d;
        if (window > 0 && p - window + 1 > *low) *low = p - window + 1;
    }
};

template <int V>
static __global__ void __launch_bounds__(256)
mask_scores(mask k, fg_in s, fg_out y, int64_t n)
{
    const int64_t i = V * ((int64_t)blockIdx.x * 256 + threadIdx.x);
    if (i >= n) return;
    const int64_t r = fg_divide(i, k.N), column = i - r * k.N.d;
    int64_t low, high;
    k.sees(r, &low, &high);
    if constexpr (V == 1) {
        y.put(i, column >= low && column < high ? s[i] : -INFINITY);
    } else {
        fg_vec8 v;
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = -INFINITY;
        if (column + 8 > low && column < high) v = fg_load8(s, i);
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (column + j < low || column + j >= high) v[j] = -INFINITY;
        fg_store8(y, i, v);
    }
}

static void mask_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_attention_mask *a = (const struct fg_attr_attention_mask *)e->attr;
    const fg_shape *s = &e->in_shape[0];
    const int64_t n = fg_count_of(s);
    const mask k = { (const int32_t *)e->in[1], (const int32_t *)e->in[2],
                     fg_divisor_of(s->dim[1], n), fg_divisor_of(s->dim[2], n),
                     fg_divisor_of(s->dim[3], n), a->window };
    const fg_in x = fg_input_of(e, 0);
    const fg_out y = fg_output_of(e, 0);
    if (s->dim[3] % 8 == 0) mask_scores<8><<<fg_blocks(n, 8 * 256), 256, 0, stream>>>(k, x, y, n);
    else mask_scores<1><<<fg_blocks(n, 256), 256, 0, stream>>>(k, x, y, n);
}
FG_KERNEL(attention_mask) = { .launch = mask_launch };
