/* embedding.cu - rows of a table, and the table's gradient: ops/embedding.c on a GPU.
 *
 *     y_t = w_(tokens_t)          gw_c = sum over t with tokens_t = c of gy_t
 *
 * A token outside [0,V) gives a row of NaN and no gradient.
 * The gradient sorts the positions by token (a radix sort, so in order of t) and adds up every row
 * of gw in that order; where a token fills a whole chunk of CHUNK places, the chunk was added up
 * before, so a token that is everywhere costs no more than others.  Bytes: gy and gw once. */
#include <cub/device/device_radix_sort.cuh>
#include "elementwise.cuh"

#define THREADS 256
#define CHUNK   64

/* ---- embedding ------------------------------------------------------------------------------ */

template <int V>
static __global__ void __launch_bounds__(THREADS)
pick_rows(const int32_t *tokens, fg_in w, fg_out y, fg_divisor D, int64_t vocab, int64_t n)
{
    constexpr int U = 2;
    const int64_t first = (int64_t)blockIdx.x * THREADS * U + threadIdx.x;
    fg_raw8 raw[U];
    float one[U];
    bool there[U];
#pragma unroll
    for (int u = 0; u < U; u++) {
        const int64_t i = V * (first + u * THREADS);
        there[u] = false;
        if (i >= n) continue;
        const int64_t t = fg_divide(i, D), c = tokens[t];
        there[u] = c >= 0 && c < vocab;
        if (!there[u]) continue;
        if (V == 8) raw[u] = fg_load_raw8(w, c * D.d + i - t * D.d);
        else one[u] = w[c * D.d + i - t * D.d];
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
        const int64_t i = V * (first + u * THREADS);
        if (i >= n) continue;
        if constexpr (V == 8) {
            fg_vec8 v;
            if (there[u]) v = fg_floats(w, raw[u]);
            else
#pragma unroll
                for (int j = 0; j < 8; j++) v[j] = NAN;
            fg_store8(y, i, v);
        } else {
            y.put(i, there[u] ? one[u] : NAN);
        }
    }
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const int64_t n = fg_count_of(&e->out_shape[0]), D = e->in_shape[1].dim[1];
    const int64_t vocab = e->in_shape[1].dim[0];
    const int32_t *tokens = (const int32_t *)e->in[0];
    const fg_in w = fg_input_of(e, 1);
    const fg_out y = fg_output_of(e, 0);
    const fg_divisor d = fg_divisor_of(D, n);
    if (D % 8 == 0)
        pick_rows<8><<<fg_blocks(n, 16 * THREADS), THREADS, 0, stream>>>(tokens, w, y, d, vocab, n);
    else
        pick_rows<1><<<fg_blocks(n, 2 * THREADS), THREADS, 0, stream>>>(tokens, w, y, d, vocab, n);
}
FG_KERNEL(embedding) = { .launch = launch };

/* ---- embedding_grad ------------------------------------------------------------------------- */

/* Parts of the scratch; token c's places in sorted order are [begin[c], end[c]). */
struct layout {
    int64_t T, D, vocab;
    size_t sort_bytes, bytes;
    uint32_t *key, *token;                       /* before and after sorting; outside [0,V): V */
    int32_t *at, *place;
    int32_t *begin, *end;
    float *sums;                                 /* [T / CHUNK, D] */
    void *sort;
};

static int bits_of(int64_t n)
{
    int b = 1;
    while (b < 32 && n >> b) b++;
    return b;
}

static cudaError_t sort(void *temp, size_t *bytes, const layout *l, cudaStream_t stream)
{
    return cub::DeviceRadixSort::SortPairs(temp, *bytes, l->key, l->token, l->at, l->place,
                                           (int)l->T, 0, bits_of(l->vocab), stream);
}

static char *take(char *base, size_t *used, size_t bytes)
{
    char *p = base + *used;
    *used += (bytes + 255) / 256 * 256;
    return p;
}

static layout layout_of(int64_t T, int64_t D, int64_t vocab, void *base)
{
    layout l = {};
    char *b = (char *)base;
    size_t used = 0;
    l.T = T, l.D = D, l.vocab = vocab;
    sort(nullptr, &l.sort_bytes, &l, nullptr);
    l.key = (uint32_t *)take(b, &used, (size_t)T * 4);
    l.token = (uint32_t *)take(b, &used, (size_t)T * 4);
    l.at = (int32_t *)take(b, &used, (size_t)T * 4);
    l.place = (int32_t *)take(b, &used, (size_t)T * 4);
    l.begin = (int32_t *)take(b, &used, (size_t)vocab * 4);
    l.end = (int32_t *)take(b, &used, (size_t)vocab * 4);
    l.sums = (float *)take(b, &used, (size_t)(T / CHUNK * D) * 4);
    l.sort = take(b, &used, l.sort_bytes);
    l.bytes = used;
    return l;
}

static size_t grad_scratch(const fg_infer *c)
{
    const struct fg_attr_embedding_grad *a = (const struct fg_attr_embedding_grad *)c->attr;
    return layout_of(fg_count_of(&c->in[1]), fg_last_of(&c->in[0]), a->vocab, nullptr).bytes;
}

static __global__ void __launch_bounds__(THREADS) list_tokens(layout l, const int32_t *tokens)
{
    const int64_t t = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (t < l.vocab) l.begin[t] = l.end[t] = 0;
    if (t >= l.T) return;
    const int32_t c = tokens[t];
    l.key[t] = c >= 0 && c < l.vocab ? (uint32_t)c : (uint32_t)l.vocab;
    l.at[t] = (int32_t)t;
}

static __global__ void __launch_bounds__(THREADS) find_runs(layout l)
{
    const int64_t k = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (k >= l.T || l.token[k] == l.vocab) return;
    const uint32_t c = l.token[k];
    if (k == 0 || l.token[k - 1] != c) l.begin[c] = (int32_t)k;
    if (k == l.T - 1 || l.token[k + 1] != c) l.end[c] = (int32_t)k + 1;
}

/* sum += rows [from, to) of the sorted order, V columns from `column`, in order. */
template <int V>
static __device__ __forceinline__ void add_rows(const layout &l, const fg_in &gy, int64_t from,
                                                int64_t to, int64_t column, float *sum)
{
    constexpr int U = 8;
    for (int64_t k = from; k < to; k += U) {
        fg_some<V> some[U];
#pragma unroll
        for (int u = 0; u < U; u++)
            if (k + u < to) some[u].load(gy, l.place[k + u] * l.D + column);
#pragma unroll
        for (int u = 0; u < U; u++) {
            if (k + u >= to) continue;
            float v[V];
            some[u].floats(gy, v);
#pragma unroll
            for (int j = 0; j < V; j++) sum[j] += v[j];
        }
    }
}
/* sum += the sums of chunks [from, to). */
template <int V>
static __device__ __forceinline__ void add_chunks(const layout &l, int64_t from, int64_t to,
                                                  int64_t column, float *sum)
{
    const fg_in sums = { l.sums, false };
    constexpr int U = 8;
    for (int64_t k = from; k < to; k += U) {
        fg_some<V> some[U];
#pragma unroll
        for (int u = 0; u < U; u++)
            if (k + u < to) some[u].load(sums, (k + u) * l.D + column);
#pragma unroll
        for (int u = 0; u < U; u++) {
            if (k + u >= to) continue;
            float v[V];
            some[u].floats(sums, v);
#pragma unroll
            for (int j = 0; j < V; j++) sum[j] += v[j];
        }
    }
}

template <int V>
static __global__ void __launch_bounds__(THREADS) sum_chunks(layout l, fg_in gy, fg_divisor width)
{
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= l.T / CHUNK * width.d) return;
    const int64_t chunk = fg_divide(i, width), column = V * (i - chunk * width.d);
    const int64_t from = chunk * CHUNK;
    if (l.token[from] != l.token[from + CHUNK - 1] || l.token[from] == l.vocab) return;
    float sum[V] = { 0 };
    add_rows<V>(l, gy, from, from + CHUNK, column, sum);
    fg_store_some<V>(fg_out{ l.sums, false }, chunk * l.D + column, sum);
}

template <int V>
static __global__ void __launch_bounds__(THREADS)
sum_tokens(layout l, fg_in gy, fg_out gw, fg_divisor width)
{
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= l.vocab * width.d) return;
    const int64_t c = fg_divide(i, width), column = V * (i - c * width.d);
    const int64_t from = l.begin[c], to = l.end[c];
    const int64_t low = (from + CHUNK - 1) / CHUNK, high = to / CHUNK;   /* its whole chunks */
    float sum[V] = { 0 };
    if (low >= high) {
        add_rows<V>(l, gy, from, to, column, sum);
    } else {
        add_rows<V>(l, gy, from, low * CHUNK, column, sum);
        add_chunks<V>(l, low, high, column, sum);
        add_rows<V>(l, gy, high * CHUNK, to, column, sum);
    }
    fg_store_some<V>(gw, c * l.D + column, sum);
}

template <int V> static void launch_sums(const fg_exec *e, const layout &l, cudaStream_t stream)
{
    const fg_in gy = fg_input_of(e, 0);
    const int64_t chunks = l.T / CHUNK, most = (l.vocab + chunks) * l.D;
    const fg_divisor width = fg_divisor_of(l.D / V, most);
    if (chunks > 0)
        sum_chunks<V><<<fg_blocks(chunks * width.d, THREADS), THREADS, 0, stream>>>(l, gy, width);
    sum_tokens<V><<<fg_blocks(l.vocab * width.d, THREADS), THREADS, 0, stream>>>(
        l, gy, fg_output_of(e, 0), width);
}

static void grad_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_embedding_grad *a = (const struct fg_attr_embedding_grad *)e->attr;
    const layout l = layout_of(fg_count_of(&e->in_shape[1]), fg_last_of(&e->in_shape[0]), a->vocab,
                               e->scratch);
    const int64_t most = l.T > l.vocab ? l.T : l.vocab;
    size_t bytes = l.sort_bytes;
    if (l.vocab == 0) return;
    list_tokens<<<fg_blocks(most, THREADS), THREADS, 0, stream>>>(l, (const int32_t *)e->in[1]);
    sort(l.sort, &bytes, &l, stream);
    find_runs<<<fg_blocks(l.T, THREADS), THREADS, 0, stream>>>(l);
    if (l.D % 8 == 0 && e->out_type[0] == FG_BF16) launch_sums<8>(e, l, stream);
    else if (l.D % 4 == 0) launch_sums<4>(e, l, stream);
    else launch_sums<1>(e, l, stream);
}

static const char *grad_unfit(const fg_infer *c)
{
    const struct fg_attr_embedding_grad *a = (const struct fg_attr_embedding_grad *)c->attr;
    return fg_count_of(&c->in[1]) > INT32_MAX || a->vocab > INT32_MAX
           ? "positions and tokens are sorted as 32-bit numbers" : nullptr;
}
FG_KERNEL(embedding_grad) = { .launch = grad_launch, .unfit = grad_unfit, .scratch = grad_scratch };
