/* embedding.cu - rows of a table, and the table's gradient: ops/embedding.c on a GPU.
 *
 *     y_t = w_(tokens_t)          gw_c = sum over t with tokens_t = c of gy_t
 *
 * A token outside [0,V) gives a row of NaN and no gradient.
 * The gradient sorts the positions by token, in order of t, and adds up every row of gw in that
 * order; where a token fills a whole chunk of CHUNK places, the chunk was added up before, so a
 * token that is everywhere costs no more than others.  Bytes: gy and gw once; every block of SHARE
 * tokens reads all of `tokens` twice, from cache. */
#include "elementwise.cuh"

#define THREADS 256
#define LISTERS 512                              /* threads that sort */
#define SHARE   256                              /* tokens that a block of them looks for */
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
    size_t bytes;
    int32_t *token, *place;                      /* sorted: token, -1 outside [0,V); position */
    int32_t *begin, *end;
    float *sums;                                 /* [T / CHUNK, D] */
};

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
    l.T = T, l.D = D, l.vocab = vocab;
    l.token = (int32_t *)take(b, &l.bytes, (size_t)T * 4);
    l.place = (int32_t *)take(b, &l.bytes, (size_t)T * 4);
    l.begin = (int32_t *)take(b, &l.bytes, (size_t)vocab * 4);
    l.end = (int32_t *)take(b, &l.bytes, (size_t)vocab * 4);
    l.sums = (float *)take(b, &l.bytes, (size_t)(T / CHUNK * D) * 4);
    return l;
}

static size_t grad_scratch(const fg_infer *c)
{
    const struct fg_attr_embedding_grad *a = (const struct fg_attr_embedding_grad *)c->attr;
    return layout_of(fg_count_of(&c->in[1]), fg_last_of(&c->in[0]), a->vocab, nullptr).bytes;
}

/* f(t, c) for a warp's positions t and their tokens c, 32 at once and in order; c = -1 outside. */
template <class F>
static __device__ __forceinline__ void each_token(const layout &l, const int32_t *tokens, F f)
{
    constexpr int U = 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, T = (int)l.T;
    const int share = (int)((l.T + LISTERS - 1) / LISTERS * 32);
    const int64_t from = (int64_t)warp * share;
    for (int i = 0; i < share; i += 32 * U) {
        int32_t c[U];
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int64_t t = from + i + 32 * u + lane;
            c[u] = i + 32 * u < share && t < T ? tokens[t] : -1;
        }
#pragma unroll
        for (int u = 0; u < U; u++)
            f((int)from + i + 32 * u + lane, c[u] >= 0 && c[u] < l.vocab ? c[u] : -1);
    }
}

/* The sum of x over threads before this one; all: over the block. */
static __device__ int sum_before(int x, int *all)
{
    __shared__ int part[LISTERS / 32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int sum = x, before = 0, total = 0;
#pragma unroll
    for (int k = 1; k < 32; k *= 2) {
        const int y = __shfl_up_sync(~0u, sum, k);
        if (lane >= k) sum += y;
    }
    __syncthreads();
    if (lane == 31) part[warp] = sum;
    __syncthreads();
    for (int i = 0; i < LISTERS / 32; i++) {
        if (i < warp) before += part[i];
        total += part[i];
    }
    *all = total;
    return before + sum - x;
}

/* A block finds the positions of its SHARE tokens: every warp counts them in its part of all
 * positions, so that it knows where its own ones begin. */
static __global__ void __launch_bounds__(LISTERS) sort_tokens(layout l, const int32_t *tokens)
{
    __shared__ int next[LISTERS / 32][SHARE], start[SHARE];
    const int warp = threadIdx.x / 32, mine = threadIdx.x, first = blockIdx.x * SHARE;
    const unsigned before_me = (1u << threadIdx.x % 32) - 1;             /* lanes */
    int lower = 0, sum = 0, before, all;
    for (int i = mine; i < LISTERS / 32 * SHARE; i += LISTERS) next[i / SHARE][i % SHARE] = 0;
    __syncthreads();
    each_token(l, tokens, [&](int, int c) {
        const bool here = c >= first && c - first < SHARE;
        const unsigned among = __ballot_sync(~0u, here);
        lower += c >= 0 && c < first;
        if (here) {
            const unsigned same = __match_any_sync(among, c);
            if (!(same & before_me)) next[warp][c - first] += __popc(same);
        }
        __syncwarp();
    });
    sum_before(lower, &before);
    if (mine < SHARE)
        for (int i = 0; i < LISTERS / 32; i++) {
            const int n = next[i][mine];
            next[i][mine] = sum;
            sum += n;
        }
    const int begin = before + sum_before(sum, &all);
    if (mine < SHARE) start[mine] = begin;
    if (mine < SHARE && (int64_t)first + mine < l.vocab)
        l.begin[first + mine] = begin, l.end[first + mine] = begin + sum;
    __syncthreads();
    each_token(l, tokens, [&](int t, int c) {
        const bool here = c >= first && c - first < SHARE;
        const unsigned among = __ballot_sync(~0u, here);
        if (here) {
            const unsigned same = __match_any_sync(among, c);
            const int to = start[c - first] + next[warp][c - first] + __popc(same & before_me);
            l.token[to] = c, l.place[to] = t;
            __syncwarp(among);
            if (!(same & before_me)) next[warp][c - first] += __popc(same);
        }
        __syncwarp();
    });
    if (blockIdx.x == gridDim.x - 1)
        for (int64_t k = before + all + mine; k < l.T; k += LISTERS) l.token[k] = -1;
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
    if (l.token[from] != l.token[from + CHUNK - 1] || l.token[from] < 0) return;
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
    if (l.vocab == 0) return;
    sort_tokens<<<fg_blocks(l.vocab, SHARE), LISTERS, 0, stream>>>(l, (const int32_t *)e->in[1]);
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
