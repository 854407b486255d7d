/* cache.cu - ops/cache.c on a GPU: rows appended to a state while decoding, and the last ones.
 *
 * Bytes: x in and out once.  past is read on the device, so a captured launch serves every step. */
#include "elementwise.cuh"

/* Rows t of x go to row past + t of a [B,C,row] tensor; past NULL: to row t. */
struct rows_of { fg_divisor row, T; int64_t C; const int32_t *past; };

template <int V>
static __global__ void __launch_bounds__(256)
write_rows(rows_of k, fg_source x, fg_out cache, int64_t n)
{
    const int64_t i = V * ((int64_t)blockIdx.x * 256 + threadIdx.x);
    if (i >= n) return;
    const int64_t q = fg_divide(i, k.row), b = fg_divide(q, k.T), t = q - b * k.T.d;
    const int64_t to = t + *k.past;
    if (to < 0 || to >= k.C) return;                     /* does not fit: dropped */
    const int64_t j = (b * k.C + to) * k.row.d + i - q * k.row.d;
    if (V == 8) fg_store8(cache, j, fg_load8(x.x, x.place.at(i)));
    else cache.put(j, x.x[x.place.at(i)]);
}

static void write_launch(const fg_exec *e, cudaStream_t stream)
{
    const fg_shape *x = &e->in_shape[1];
    const int64_t n = fg_count_of(x), row = n / x->dim[0] / x->dim[1];
    const rows_of k = { fg_divisor_of(row, n), fg_divisor_of(x->dim[1], n),
                        e->in_shape[0].dim[1], (const int32_t *)e->in[2] };
    const fg_source from = fg_source_of(e, 1);
    const fg_out to = fg_output_of(e, 0);
    if (row % 8 == 0 && fg_in_eights(&e->in_rows[1]))
        write_rows<8><<<fg_blocks(n, 8 * 256), 256, 0, stream>>>(k, from, to, n);
    else
        write_rows<1><<<fg_blocks(n, 256), 256, 0, stream>>>(k, from, to, n);
}
FG_KERNEL(cache_write) = { .launch = write_launch, .pitched_in = 2 };

static __global__ void __launch_bounds__(256)
keep_last(fg_source x, fg_out last, fg_divisor row, int64_t T, int64_t n)
{
    const int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= n) return;
    const int64_t b = fg_divide(i, row);
    last.put(i, x.x[x.place.at((b * T + T - 1) * row.d + i - b * row.d)]);
}

static void last_launch(const fg_exec *e, cudaStream_t stream)
{
    const fg_shape *x = &e->in_shape[1];
    const int64_t n = fg_count_of(&e->in_shape[0]);
    keep_last<<<fg_blocks(n, 256), 256, 0, stream>>>(fg_source_of(e, 1), fg_output_of(e, 0),
                                                     fg_divisor_of(n / x->dim[0], n), x->dim[1], n);
}
FG_KERNEL(cache_last) = { .launch = last_launch, .pitched_in = 2 };

/* A thread moves its column up by T rows, in order: it reads nothing that it has overwritten. */
static __global__ void __launch_bounds__(256)
keep_rows(fg_source x, fg_in old, fg_out rows, fg_divisor row, int64_t K, int64_t T, int64_t n)
{
    const int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= n) return;
    const int64_t b = fg_divide(i, row), c = i - b * row.d;
    for (int64_t k = 0; k < K; k++) {
        const int64_t from = k + T - K;                  /* of x; below 0: of the rows before */
        const float v = from < 0 ? old[(b * K + k + T) * row.d + c]
                                 : x.x[x.place.at((b * T + from) * row.d + c)];
        rows.put((b * K + k) * row.d + c, v);
    }
}

static void rows_launch(const fg_exec *e, cudaStream_t stream)
{
    const fg_shape *s = &e->in_shape[0];
    const int64_t row = fg_count_of(s) / s->dim[0] / s->dim[1], n = s->dim[0] * row;
    keep_rows<<<fg_blocks(n, 256), 256, 0, stream>>>(
        fg_source_of(e, 1), fg_input_of(e, 0), fg_output_of(e, 0), fg_divisor_of(row, n), s->dim[1],
        e->in_shape[1].dim[1], n);
}
FG_KERNEL(cache_rows) = { .launch = rows_launch, .pitched_in = 2 };
