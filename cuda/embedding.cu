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
#define CHUNK   64                               /* sorted places added up on their own */
#define ROWS    4                                /* tokens a thread; H100: 8 and 16 are no faster */

/* ---- embedding ------------------------------------------------------------------------------ */

template <int V>
static __global__ void __launch_bounds__(THREADS)
pick_rows(const int32_t *tokens, fg_in w, fg_out y, fg_divisor D, int64_t vocab, int64_t n)
{
    const int64_t i = V * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
    if (i >= n) return;
    const int64_t t = fg_divide(i, D), c = tokens[t];
    float v[V];
    if (c >= 0 && c < vocab) {
        fg_some<V> some;
        some.load(w, c * D.d + i - t * D.d);
        some.floats(w, v);
    } else {
#pragma unroll
        for (int j = 0; j < V; j++) v[j] = NAN;
    }
    fg_store_some<V>(y, i, v);
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const int64_t n = fg_count_of(&e->out_shape[0]), D = e->in_shape[1].dim[1];
    const int64_t vocab = e->in_shape[1].dim[0];
    const int32_t *tokens = (const int32_t *)e->in[0];
    const fg_in w = fg_input_of(e, 1);
    const fg_out y = fg_output_of(e, 0);
    const fg_divisor d = fg_divisor_of(D, n);
    if (D % 8)
        pick_rows<1><<<fg_blocks(n, THREADS), THREADS, 0, stream>>>(tokens, w, y, d, vocab, n);
    else if (y.narrow)
        pick_rows<8><<<fg_blocks(n, 8 * THREADS), THREADS, 0, stream>>>(tokens, w, y, d, vocab, n);
    else
        pick_rows<4><<<fg_blocks(n, 4 * THREADS), THREADS, 0, stream>>>(tokens, w, y, d, vocab, n);
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

/* sum += rows [from, to) of x in order, V columns from `column`; place NULL: rows as they lie. */
template <int V>
static __device__ __forceinline__ void add_rows(const fg_in &x, const int32_t *place, int64_t from,
                                                int64_t to, int64_t D, int64_t column, float *sum)
{
    constexpr int U = 4;
    for (int64_t k = from; k < to; k += U) {
        fg_some<V> some[U];
#pragma unroll
        for (int u = 0; u < U; u++)
            if (k + u < to) some[u].load(x, (place ? place[k + u] : k + u) * D + column);
#pragma unroll
        for (int u = 0; u < U; u++) {
            if (k + u >= to) continue;
            float v[V];
            some[u].floats(x, v);
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
    add_rows<V>(gy, l.place, from, from + CHUNK, l.D, column, sum);
    fg_store_some<V>(fg_out{ l.sums, false }, chunk * l.D + column, sum);
}

/* Most tokens do not occur: a thread takes V columns of ROWS of them, so that their zeros do not
 * wait for one load after the other. */
template <int V>
static __global__ void __launch_bounds__(THREADS, V == 8 ? 4 : 5)
sum_tokens(layout l, fg_in gy, fg_out gw, fg_divisor width)
{
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    const int64_t q = fg_divide(i, width), c0 = q * ROWS, column = V * (i - q * width.d);
    if (c0 >= l.vocab) return;
    const float zeros[V] = { 0 };
    unsigned there = 0;                          /* bit r: token c0 + r occurs */
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (c0 + r < l.vocab && l.begin[c0 + r] < l.end[c0 + r]) there |= 1u << r;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (c0 + r < l.vocab && !(there >> r & 1))
            fg_store_some<V>(gw, (c0 + r) * l.D + column, zeros);
    for (; there; there &= there - 1) {
        const int64_t c = c0 + __ffs((int)there) - 1, from = l.begin[c], to = l.end[c];
        const int64_t low = (from + CHUNK - 1) / CHUNK, high = to / CHUNK;   /* its whole chunks */
        float sum[V] = { 0 };
        const bool chunks = low < high;
#pragma unroll 1
        for (int part = 0; part < (chunks ? 3 : 1); part++) {
            const int64_t start = part == 0 ? from : part == 1 ? low : high * CHUNK;
            const int64_t stop = part == 0 && chunks ? low * CHUNK : part == 1 ? high : to;
            add_rows<V>(part == 1 ? fg_in{ l.sums, false } : gy, part == 1 ? nullptr : l.place,
                        start, stop, l.D, column, sum);
        }
        fg_store_some<V>(gw, c * l.D + column, sum);
    }
}

template <int V> static void launch_sums(const fg_exec *e, const layout &l, cudaStream_t stream)
{
    const fg_in gy = fg_input_of(e, 0);
    const int64_t chunks = l.T / CHUNK, most = (l.vocab + chunks + 8) * l.D;
    const fg_divisor width = fg_divisor_of(l.D / V, most);
    if (chunks > 0)
        sum_chunks<V><<<fg_blocks(chunks * width.d, THREADS), THREADS, 0, stream>>>(l, gy, width);
    const int64_t groups = (l.vocab + ROWS - 1) / ROWS;
    sum_tokens<V><<<fg_blocks(groups * width.d, THREADS), THREADS, 0, stream>>>(
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
