/* elementwise.cuh - how elementwise kernels walk over tensors: flat, over shapes that broadcast,
 * and over columns of wider matrices.
 *
 * A thread takes 4 or 8 neighbouring elements with 16-byte accesses; where rows do not divide so,
 * one at a time.  More a thread gains nothing on an H100: full occupancy hides the latency.  A
 * thread reads its elements before it writes any, and no others: an output may lie in an input's
 * memory. */
#ifndef FG_ELEMENTWISE_CUH
#define FG_ELEMENTWISE_CUH
#include "kernel.cuh"

#define FG_MAP_THREADS 256

/* ---- division by a number known at launch --------------------------------------------------- */

/* i / d = i m / 2^64, or i few / 2^32 / 2^shift where every i is below 2^31: m and few are the
 * quotients of those powers by d, rounded up; 0 where the other one serves.  Exact while i d is
 * below 2^64. */
struct fg_divisor {
    int64_t d;
    uint64_t m;
    uint32_t few;
    int shift;
};
/* Dividends are below `most`. */
static inline fg_divisor fg_divisor_of(int64_t d, int64_t most)
{
    fg_divisor r = { d > 1 ? d : 1, 0, 0, 0 };
    if (d <= 1) return r;
    if (most > INT32_MAX || d > INT32_MAX) {
        r.m = ~(uint64_t)0 / (uint64_t)d + 1;
        return r;
    }
    while ((int64_t)2 << r.shift < d) r.shift++;
    r.few = (uint32_t)(((uint64_t)1 << (32 + r.shift)) / (uint64_t)d + 1);
    return r;
}
static __device__ __forceinline__ int64_t fg_divide(int64_t i, const fg_divisor &d)
{
    if (d.few) return __umulhi((unsigned)i, d.few) >> d.shift;
    return d.m ? (int64_t)__umul64hi((uint64_t)i, d.m) : i;
}
/* The same where `most` is below 2^31. */
static __device__ __forceinline__ int fg_divide_few(unsigned i, const fg_divisor &d)
{
    return (int)(d.few ? __umulhi(i, d.few) >> d.shift : i);
}

/* ---- a tensor and where its elements lie ---------------------------------------------------- */

struct fg_place {
    fg_divisor width;
    int64_t skip;                                /* elements between rows; 0: contiguous */
    __device__ __forceinline__ int64_t at(int64_t i) const
    {
        return skip ? i + fg_divide(i, width) * skip : i;
    }
};
struct fg_source { fg_in x; fg_place place; };
struct fg_target { fg_out y; fg_place place; };

static inline fg_place fg_place_of(const fg_rows *r, int64_t count)
{
    if (!fg_is_pitched(r)) return { fg_divisor_of(1, 1), 0 };
    return { fg_divisor_of(r->width, count), r->pitch - r->width };
}
static inline fg_source fg_source_of(const fg_exec *e, int i)
{
    return { fg_input_of(e, i), fg_place_of(&e->in_rows[i], fg_count_of(&e->in_shape[i])) };
}
static inline fg_target fg_target_of(const fg_exec *e, int o)
{
    return { fg_output_of(e, o), fg_place_of(&e->out_rows[o], fg_count_of(&e->out_shape[o])) };
}
/* The same for kernels that know row and column of a [..., C] tensor: no division where its rows
 * are the matrix's. */
struct fg_matrix {
    fg_place place;
    int64_t C, pitch;                            /* pitch 0: other rows */
    __device__ __forceinline__ int64_t at(int64_t row, int64_t column) const
    {
        return pitch ? row * pitch + column : place.at(row * C + column);
    }
};
static inline fg_matrix fg_matrix_of(const fg_rows *r, int64_t C, int64_t count)
{
    const bool other = fg_is_pitched(r) && r->width != C;
    return { fg_place_of(r, count), C, other ? 0 : fg_pitch_of(r, C) };
}

/* Eights of elements never straddle two rows. */
static inline bool fg_in_eights(const fg_rows *r) { return !fg_is_pitched(r) || r->width % 8 == 0; }

/* ---- several elements: loaded first, turned to float later, so that loads do not wait -------- */

struct fg_raw8 { uint4 a, b; };

static __device__ __forceinline__ fg_raw8 fg_load_raw8(const fg_in &x, int64_t i)
{
    fg_raw8 r;
    if (x.narrow) {
        r.a = *(const uint4 *)((const bf16 *)x.p + i);
        r.b = make_uint4(0, 0, 0, 0);
    } else {
        const uint4 *q = (const uint4 *)((const float *)x.p + i);
        r.a = q[0];
        r.b = q[1];
    }
    return r;
}
static __device__ __forceinline__ fg_vec8 fg_floats(const fg_in &x, const fg_raw8 &r)
{
    fg_vec8 v;
    if (x.narrow) fg_unpack(r.a, v.v);
    else {
        *(uint4 *)v.v = r.a;
        *(uint4 *)(v.v + 4) = r.b;
    }
    return v;
}

/* V elements of a tensor: loaded first, turned to float later; WIDE: perhaps f32. */
template <int V, bool WIDE = true> struct fg_some {
    fg_raw8 raw;
    __device__ __forceinline__ void clear()
    {
        raw = { make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0) };
    }
    __device__ __forceinline__ void load(const fg_in &x, int64_t i) { raw = fg_load_raw8(x, i); }
    __device__ __forceinline__ void floats(const fg_in &x, float *v) const
    {
        const fg_vec8 f = fg_floats(x, raw);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = f[j];
    }
};
template <> struct fg_some<8, false> {
    uint4 raw;
    __device__ __forceinline__ void clear() { raw = make_uint4(0, 0, 0, 0); }
    __device__ __forceinline__ void load(const fg_in &x, int64_t i)
    {
        raw = *(const uint4 *)((const bf16 *)x.p + i);
    }
    __device__ __forceinline__ void floats(const fg_in &, float *v) const { fg_unpack(raw, v); }
};
template <> struct fg_some<4, true> {
    uint4 raw;
    __device__ __forceinline__ void clear() { raw = make_uint4(0, 0, 0, 0); }
    __device__ __forceinline__ void load(const fg_in &x, int64_t i)
    {
        if (x.narrow) {
            const uint2 u = *(const uint2 *)((const bf16 *)x.p + i);
            raw = make_uint4(u.x, u.y, 0, 0);
        } else {
            raw = *(const uint4 *)((const float *)x.p + i);
        }
    }
    __device__ __forceinline__ void floats(const fg_in &x, float *v) const
    {
        const unsigned w[4] = { raw.x, raw.y, raw.z, raw.w };
#pragma unroll
        for (int j = 0; j < 4; j++)
            v[j] = __uint_as_float(!x.narrow ? w[j] : j % 2 ? w[j / 2] & 0xffff0000u
                                                           : w[j / 2] << 16);
    }
};
template <> struct fg_some<1, true> {
    float one;
    __device__ __forceinline__ void clear() { one = 0; }
    __device__ __forceinline__ void load(const fg_in &x, int64_t i) { one = x[i]; }
    __device__ __forceinline__ void floats(const fg_in &, float *v) const { v[0] = one; }
};
template <int V>
static __device__ __forceinline__ void fg_store_some(const fg_out &y, int64_t i, const float *v)
{
    if constexpr (V == 8) {
        fg_vec8 f;
#pragma unroll
        for (int j = 0; j < 8; j++) f[j] = v[j];
        fg_store8(y, i, f);
    } else if constexpr (V == 4) {
        if (y.narrow) *(uint2 *)((bf16 *)y.p + i) = make_uint2(fg_pack2(v[0], v[1]),
                                                              fg_pack2(v[2], v[3]));
        else *(float4 *)((float *)y.p + i) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
        y.put(i, v[0]);
    }
}

/* ---- many tensors in one launch ------------------------------------------------------------- */

/* Which of list.of[0 .. count-1] block b belongs to: the last whose `first` block is not behind. */
template <class LIST> static __device__ __forceinline__ int fg_item_at(const LIST &list, unsigned b)
{
    int k = 0, end = list.count;
    while (end - k > 1) {
        const int middle = (k + end) / 2;
        if (b >= list.of[middle].first) k = middle;
        else end = middle;
    }
    return k;
}

/* ---- y_i = f(inputs at i): inputs of y's shape ---------------------------------------------- */

/* V is 8 where y is bf16 and 4 where it is f32: a warp then writes whole sectors side by side. */
template <int N> struct fg_sources { fg_source in[N]; };

template <class F, int N>
static __device__ __forceinline__ void fg_map_one(const F &f, const fg_sources<N> &s,
                                                  const fg_target &y, int64_t i)
{
    float v[N];
#pragma unroll
    for (int k = 0; k < N; k++) v[k] = s.in[k].x[s.in[k].place.at(i)];
    y.y.put(y.place.at(i), f(v));
}

/* f of V elements at once; x_(k,j): input k, element j. */
template <int V, class F, int N>
static __device__ __forceinline__ void fg_apply(const F &f, const float (*x)[V], float *y)
{
#pragma unroll
    for (int j = 0; j < V; j++) {
        float v[N];
#pragma unroll
        for (int k = 0; k < N; k++) v[k] = x[k][j];
        y[j] = f(v);
    }
}

template <int V, class F, int N>
static __global__ void __launch_bounds__(FG_MAP_THREADS)
fg_map_some(F f, fg_sources<N> s, fg_target y, int64_t n)
{
    const int64_t i = V * ((int64_t)blockIdx.x * FG_MAP_THREADS + threadIdx.x);
    if (i + V > n) {
        for (int64_t j = i; j < n; j++) fg_map_one<F, N>(f, s, y, j);
        return;
    }
    fg_some<V> some[N];
    float x[N][V], r[V];
#pragma unroll
    for (int k = 0; k < N; k++) some[k].load(s.in[k].x, s.in[k].place.at(i));
#pragma unroll
    for (int k = 0; k < N; k++) some[k].floats(s.in[k].x, x[k]);
    fg_apply<V, F, N>(f, x, r);
    fg_store_some<V>(y.y, y.place.at(i), r);
}

/* The inputs of e are the first N. */
template <class F, int N>
static void fg_map(const fg_exec *e, cudaStream_t stream, F f)
{
    constexpr int threads = FG_MAP_THREADS;
    const int64_t n = fg_count_of(&e->out_shape[0]);
    fg_sources<N> s = {};
    bool eights = fg_in_eights(&e->out_rows[0]);
    for (int k = 0; k < N; k++) {
        s.in[k] = fg_source_of(e, k);
        eights = eights && fg_in_eights(&e->in_rows[k]);
    }
    const fg_target y = fg_target_of(e, 0);
    if (!eights) fg_map_some<1, F, N><<<fg_blocks(n, threads), threads, 0, stream>>>(f, s, y, n);
    else if (y.y.narrow)
        fg_map_some<8, F, N><<<fg_blocks(n, 8 * threads), threads, 0, stream>>>(f, s, y, n);
    else
        fg_map_some<4, F, N><<<fg_blocks(n, 4 * threads), threads, 0, stream>>>(f, s, y, n);
}

/* ---- the same over shapes that broadcast ---------------------------------------------------- */

/* y's axes, neighbours merged where every input walks them as one, outermost first, and how far
 * each input moves along each; along the last one an input moves by 1 or stands still. */
template <int N> struct fg_walk {
    int rank;
    fg_divisor dim[FG_MAX_RANK];
    int64_t move[N][FG_MAX_RANK];
};

/* Adds an axis inside those of w, or makes the innermost one longer. */
template <int N> static void fg_walk_axis(fg_walk<N> *w, int64_t extent, const int64_t *move)
{
    bool one = w->rank > 0;
    for (int k = 0; k < N; k++) one = one && w->move[k][w->rank - 1] == move[k] * extent;
    if (!one) w->dim[w->rank++].d = 1;
    w->dim[w->rank - 1].d *= extent;
    for (int k = 0; k < N; k++) w->move[k][w->rank - 1] = move[k];
}

/* Shapes are aligned at the last axis. */
template <int N> static fg_walk<N> fg_walk_of(const fg_shape *y, const fg_shape *const *in)
{
    fg_walk<N> w = {};
    int64_t left[N];                             /* elements of input k inside axis i */
    for (int k = 0; k < N; k++) left[k] = fg_count_of(in[k]);
    for (int i = y->rank; i >= 1; i--) {
        int64_t move[N];
        for (int k = 0; k < N; k++) {
            const int64_t n = i <= in[k]->rank ? in[k]->dim[in[k]->rank - i] : 1;
            left[k] /= n;
            move[k] = n == 1 ? 0 : left[k];
        }
        if (y->dim[y->rank - i] != 1) fg_walk_axis<N>(&w, y->dim[y->rank - i], move);
    }
    if (w.rank == 0) w.dim[w.rank++].d = 1;
    for (int i = 0; i < w.rank; i++) w.dim[i] = fg_divisor_of(w.dim[i].d, fg_count_of(y));
    return w;
}

/* Where input k stands at y's element i, for every k. */
template <int N>
static __device__ __forceinline__ void fg_walk_to(const fg_walk<N> &w, int64_t i, int64_t *at)
{
#pragma unroll
    for (int k = 0; k < N; k++) at[k] = 0;
#pragma unroll
    for (int a = FG_MAX_RANK - 1; a >= 0; a--) {
        if (a >= w.rank) continue;
        const int64_t q = a > 0 ? fg_divide(i, w.dim[a]) : 0, index = i - q * w.dim[a].d;
#pragma unroll
        for (int k = 0; k < N; k++) at[k] += index * w.move[k][a];
        i = q;
    }
}

/* The last axis is a multiple of V. */
template <int V, class F, int N>
static __global__ void __launch_bounds__(FG_MAP_THREADS)
fg_walk_some(F f, fg_walk<N> w, fg_sources<N> s, fg_target y, int64_t n)
{
    const int64_t i = V * ((int64_t)blockIdx.x * FG_MAP_THREADS + threadIdx.x);
    if (i >= n) return;
    const int last = w.rank - 1;
    fg_some<V> some[N];
    float still[N], x[N][V], r[V];
    int64_t at[N];
    fg_walk_to<N>(w, i, at);
#pragma unroll
    for (int k = 0; k < N; k++) {
        const int64_t j = s.in[k].place.at(at[k]);
        if (w.move[k][last]) some[k].load(s.in[k].x, j);
        else still[k] = s.in[k].x[j];
    }
#pragma unroll
    for (int k = 0; k < N; k++) {
        if (w.move[k][last]) some[k].floats(s.in[k].x, x[k]);
        else
#pragma unroll
            for (int j = 0; j < V; j++) x[k][j] = still[k];
    }
    fg_apply<V, F, N>(f, x, r);
    fg_store_some<V>(y.y, y.place.at(i), r);
}

/* The last axis is any: what has y's shape is read in eights all the same, what broadcasts one by
 * one, mostly from cache.  whole: bit k, input k has y's shape. */
template <class F, int N>
static __global__ void __launch_bounds__(FG_MAP_THREADS)
fg_walk_odd(F f, fg_walk<N> w, fg_sources<N> s, unsigned whole, fg_target y, int64_t n)
{
    const int64_t i = 8 * ((int64_t)blockIdx.x * FG_MAP_THREADS + threadIdx.x);
    const int count = n - i < 8 ? (int)(n - i) : 8, last = w.rank - 1;
    if (count <= 0) return;
    if (count < 8) whole = 0;
    fg_some<8> some[N];
    float x[N][8], r[8];
    int64_t at[N], left = 0;                     /* in this row of the last axis */
#pragma unroll
    for (int k = 0; k < N; k++)
        if (whole >> k & 1) some[k].load(s.in[k].x, s.in[k].place.at(i));
#pragma unroll
    for (int j = 0; j < 8; j++) {
        if (left == 0) {
            fg_walk_to<N>(w, i + j, at);
            left = w.dim[last].d - (i + j - fg_divide(i + j, w.dim[last]) * w.dim[last].d);
        }
#pragma unroll
        for (int k = 0; k < N; k++) {
            if (!(whole >> k & 1) && j < count) x[k][j] = s.in[k].x[s.in[k].place.at(at[k])];
            at[k] += w.move[k][last];
        }
        left--;
    }
#pragma unroll
    for (int k = 0; k < N; k++)
        if (whole >> k & 1) some[k].floats(s.in[k].x, x[k]);
    fg_apply<8, F, N>(f, x, r);
    if (count == 8) fg_store_some<8>(y.y, y.place.at(i), r);
    else
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (j < count) y.y.put(y.place.at(i + j), r[j]);
}

/* y of shape e->out_shape[0], input k seen as of shape in[k], which broadcasts to y's. */
template <class F, int N>
static void fg_map_broadcast(const fg_exec *e, cudaStream_t stream, const fg_shape *const *in, F f)
{
    const fg_walk<N> w = fg_walk_of<N>(&e->out_shape[0], in);
    bool flat = w.rank == 1, eights = fg_in_eights(&e->out_rows[0]);
    for (int k = 0; k < N; k++) flat = flat && w.move[k][0] == 1;
    if (flat) {
        fg_map<F, N>(e, stream, f);
        return;
    }
    fg_sources<N> s = {};
    unsigned whole = 0;
    const int64_t n = fg_count_of(&e->out_shape[0]);
    for (int k = 0; k < N; k++) {
        s.in[k] = fg_source_of(e, k);
        eights = eights && fg_in_eights(&e->in_rows[k]);
        if (fg_count_of(in[k]) == n) whole |= 1u << k;
    }
    const fg_target y = fg_target_of(e, 0);
    constexpr int threads = FG_MAP_THREADS;
    if (!eights)
        fg_walk_some<1, F, N><<<fg_blocks(n, threads), threads, 0, stream>>>(f, w, s, y, n);
    else if (w.dim[w.rank - 1].d % 8)
        fg_walk_odd<F, N><<<fg_blocks(n, 8 * threads), threads, 0, stream>>>(f, w, s, whole, y, n);
    else if (y.y.narrow)
        fg_walk_some<8, F, N><<<fg_blocks(n, 8 * threads), threads, 0, stream>>>(f, w, s, y, n);
    else
        fg_walk_some<4, F, N><<<fg_blocks(n, 4 * threads), threads, 0, stream>>>(f, w, s, y, n);
}
#endif
