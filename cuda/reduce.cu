/* reduce.cu - ops/reduce.c on a GPU: sums down to smaller shapes, their adjoint, sums, means and
 * maxima of rows, running sums.
 *
 * A sum goes axis by axis, the longest first: [K,S,N] -> [K,ceil(S/length),N] -> ... -> [K,N], each
 * pass one kernel.  Where N = 1, a team of threads adds a stretch of a row; else threads stand side
 * by side along N and walk down S.  The lengths depend on the shape alone, and so do the bits.
 * Bytes: x once; partial sums are at most a few percent of x. */
#include "rows.cuh"

#define SUM_THREADS 256
#define FEW_BLOCKS  1056                         /* eight for every multiprocessor of an H100 */
#define DOWN_BLOCKS 264                          /* of whole rows; more leave more partial sums */

/* ---- sums ----------------------------------------------------------------------------------- */

struct pass { int64_t K, S, N, length; };
struct sum_plan {
    int n;
    pass pass[2 * FG_MAX_RANK];
    size_t even, odd;                            /* bytes of what even and odd passes leave */
};

static __host__ __device__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t pieces_of(const pass *p) { return (p->S + p->length - 1) / p->length; }

/* Threads side by side along N, each with `width` columns; `below` of them under each other.  Many
 * rows: whole rows of x together; few: narrow blocks, more of them. */
static int width_of(const pass *p) { return p->N % 8 == 0 ? 8 : 1; }
static int side_of(const pass *p)
{
    const int64_t across = p->N / width_of(p), most = p->S < 1024 ? 4 : SUM_THREADS;
    return (int)least(across, most);
}
static int below_of(const pass *p) { return SUM_THREADS / side_of(p); }

static int64_t length_of(const pass *p)
{
    int64_t pieces = 1;
    if (p->N == 1) {
        if (p->K < FEW_BLOCKS) pieces = least(FEW_BLOCKS / p->K, (p->S + 8191) / 8192);
    } else if (p->S >= 1024) {
        const int64_t per = side_of(p) * width_of(p), blocks = p->K * ((p->N + per - 1) / per);
        pieces = least(DOWN_BLOCKS / greatest(blocks, 1), p->S / (below_of(p) * 8));
    }
    pieces = greatest(1, pieces);
    return (p->S + pieces - 1) / pieces;
}

/* x's axes from the last on: extents, and which of them y lacks; neighbours of a kind merged. */
static int axes_of(const fg_shape *x, const fg_shape *y, int64_t *dim, bool *summed)
{
    int rank = 0;
    for (int i = 1; i <= x->rank; i++) {
        const int64_t n = x->dim[x->rank - i], kept = i <= y->rank ? y->dim[y->rank - i] : 1;
        if (n == 1) continue;
        const bool gone = kept == 1;
        if (rank > 0 && summed[rank - 1] == gone) {
            dim[rank - 1] *= n;
        } else {
            dim[rank] = n;
            summed[rank++] = gone;
        }
    }
    return rank;
}

static sum_plan plan_of(const fg_shape *x, const fg_shape *y)
{
    int64_t dim[FG_MAX_RANK];
    bool summed[FG_MAX_RANK];
    const int rank = axes_of(x, y, dim, summed);
    sum_plan p = {};
    for (;;) {
        int axis = -1;
        for (int i = 0; i < rank; i++)
            if (summed[i] && dim[i] > 1 && (axis < 0 || dim[i] > dim[axis])) axis = i;
        if (axis < 0 && p.n > 0) break;
        pass s = { 1, axis < 0 ? 1 : dim[axis], 1, 1 };          /* nothing to sum: a copy */
        for (int i = 0; i < rank; i++) {
            if (i < axis || axis < 0) s.N *= dim[i];
            if (i > axis && axis >= 0) s.K *= dim[i];
        }
        s.length = length_of(&s);
        if (axis >= 0) dim[axis] = pieces_of(&s);
        size_t *bytes = p.n % 2 ? &p.odd : &p.even;
        const size_t left = ((size_t)(s.K * pieces_of(&s) * s.N) * sizeof(float) + 255) / 256 * 256;
        if (left > *bytes) *bytes = left;
        p.pass[p.n++] = s;
    }
    return p;
}

static size_t scratch(const fg_infer *c)
{
    const sum_plan p = plan_of(&c->in[0], &c->out[0]);
    return p.n > 1 ? p.even + p.odd : 0;
}

/* y_(k,piece) = sum over the piece of row k; teams of T. */
template <int T>
static __global__ void __launch_bounds__(fg_team_block<T>)
sum_rows(fg_in x, fg_out y, int64_t count, int64_t S, int64_t length, fg_divisor pieces,
         float factor)
{
    constexpr int U = T < 32 ? 1 : 4;
    const int64_t o = (int64_t)blockIdx.x * fg_team_rows<T> + threadIdx.x / T;
    const int64_t k = fg_divide(o, pieces), from = (o - k * pieces.d) * length;
    const int64_t to = from + length < S ? from + length : S;
    const fg_row r = fg_row_at(k * S + from, o < count ? k * S + to : k * S + from);
    const int lane = threadIdx.x % T;
    float sum[4] = { 0 };
    for (int64_t i = lane; i < r.eights; i += U * T) {
        fg_raw8 raw[U];
#pragma unroll
        for (int u = 0; u < U; u++)
            if (i + u * T < r.eights) raw[u] = fg_load_row8(x, r, i + u * T, 0);
#pragma unroll
        for (int u = 0; u < U; u++) {
            if (i + u * T >= r.eights) continue;
            const fg_vec8 v = fg_floats(x, raw[u]);
            sum[u] += ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
        }
    }
    const float all = fg_team_sum<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    if (lane == 0 && o < count) y.put(o, all * factor);
}

/* y_(k,piece,n) = sum over the piece of S; V columns a thread. */
template <int V>
static __global__ void __launch_bounds__(SUM_THREADS)
sum_down(fg_in x, fg_out y, pass p, int64_t pieces, int64_t strips, int side, float factor)
{
    constexpr int U = 8;
    __shared__ float part[SUM_THREADS * V];
    const int column = threadIdx.x % side, row = threadIdx.x / side, below = blockDim.x / side;
    const int64_t strip = blockIdx.x % strips, o = blockIdx.x / strips;          /* o: k, piece */
    const int64_t k = o / pieces, from = (o - k * pieces) * p.length;
    const int64_t to = from + p.length < p.S ? from + p.length : p.S;
    const int64_t n = (strip * side + column) * V;
    float sum[V] = { 0 };
    if (n < p.N) {
        const int64_t step = below * p.N;
        int64_t i = (k * p.S + from + row) * p.N + n;
        for (int64_t s = from + row; s < to; s += U * below, i += U * step) {
            fg_raw8 raw[U];
            float one[U];
#pragma unroll
            for (int u = 0; u < U; u++) {
                if (s + u * below >= to) continue;
                if (V == 8) raw[u] = fg_load_raw8(x, i + u * step);
                else one[u] = x[i + u * step];
            }
#pragma unroll
            for (int u = 0; u < U; u++) {
                if (s + u * below >= to) continue;
                if constexpr (V == 8) {
                    const fg_vec8 v = fg_floats(x, raw[u]);
#pragma unroll
                    for (int j = 0; j < V; j++) sum[j] += v[j];
                } else {
                    sum[0] += one[u];
                }
            }
        }
    }
#pragma unroll
    for (int j = 0; j < V; j++) part[(row * side + column) * V + j] = sum[j];
    __syncthreads();
    for (int c = threadIdx.x; c < side * V; c += blockDim.x) {
        float all = part[c];
        for (int j = 1; j < below; j++) all += part[j * side * V + c];
        const int64_t m = strip * side * V + c;
        if (m < p.N) y.put(o * p.N + m, all * factor);
    }
}

template <int T>
static void launch_rows(fg_in x, fg_out y, const pass *p, float factor, cudaStream_t stream)
{
    const int64_t pieces = pieces_of(p), count = p->K * pieces;
    sum_rows<T><<<fg_blocks(count, fg_team_rows<T>), fg_team_block<T>, 0, stream>>>(
        x, y, count, p->S, p->length, fg_divisor_of(pieces, count + fg_team_rows<T>), factor);
}

static void launch_pass(fg_in x, fg_out y, const pass *p, float factor, cudaStream_t stream)
{
    if (p->N == 1) {
        if (p->length <= 64) launch_rows<8>(x, y, p, factor, stream);
        else if (p->length <= 2048) launch_rows<32>(x, y, p, factor, stream);
        else launch_rows<256>(x, y, p, factor, stream);
        return;
    }
    const int side = side_of(p), width = width_of(p);
    const int64_t pieces = pieces_of(p), strips = (p->N + side * width - 1) / (side * width);
    const unsigned blocks = (unsigned)(p->K * pieces * strips);
    const int threads = side * below_of(p);
    if (width == 8)
        sum_down<8><<<blocks, threads, 0, stream>>>(x, y, *p, pieces, strips, side, factor);
    else
        sum_down<1><<<blocks, threads, 0, stream>>>(x, y, *p, pieces, strips, side, factor);
}

static void sum_all(const fg_exec *e, cudaStream_t stream, float factor)
{
    const sum_plan p = plan_of(&e->in_shape[0], &e->out_shape[0]);
    fg_in x = fg_input_of(e, 0);
    for (int i = 0; i < p.n; i++) {
        const bool last = i == p.n - 1;
        fg_out y = fg_output_of(e, 0);
        if (!last) y = { (char *)e->scratch + (i % 2 ? p.even : 0), false };
        launch_pass(x, y, &p.pass[i], last ? factor : 1.0f, stream);
        x = { y.p, y.narrow };
    }
}

static void sum_launch(const fg_exec *e, cudaStream_t stream) { sum_all(e, stream, 1.0f); }

static void mean_launch(const fg_exec *e, cudaStream_t stream)
{
    sum_all(e, stream, (float)(1.0 / (double)fg_last_of(&e->in_shape[0])));
}
FG_KERNEL(sum_to) = { .launch = sum_launch, .scratch = scratch };
FG_KERNEL(row_sum) = { .launch = sum_launch, .scratch = scratch };
FG_KERNEL(row_mean) = { .launch = mean_launch, .scratch = scratch };

/* ---- broadcast_to --------------------------------------------------------------------------- */

struct same {
    __device__ __forceinline__ float operator()(const float *in) const { return in[0]; }
};

static void broadcast_launch(const fg_exec *e, cudaStream_t stream)
{
    const fg_shape *in[] = { &e->in_shape[0] };
    fg_map_broadcast<same, 1>(e, stream, in, same());
}
FG_KERNEL(broadcast_to) = { .launch = broadcast_launch, .pitched_in = 1, .pitched_out = 1 };

/* ---- row_max: NaN if any element is --------------------------------------------------------- */

static __device__ __forceinline__ float greater(float a, float b)
{
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}
template <int T> static __device__ __forceinline__ float team_greatest(float x)
{
#pragma unroll
    for (int k = (T < 32 ? T : 32) / 2; k > 0; k /= 2) x = greater(x, __shfl_xor_sync(~0u, x, k));
    if constexpr (T > 32) {
        __shared__ float part[T / 32];
        if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
        __syncthreads();
        for (int i = 0; i < T / 32; i++) x = greater(x, part[i]);
        __syncthreads();
    }
    return x;
}
template <int T>
static __device__ __forceinline__ float row_greatest(const fg_in &x, const fg_row &r)
{
    constexpr int U = 4;
    float m = -INFINITY;
    for (int64_t i = threadIdx.x % T; i < r.eights; i += U * T) {
        fg_raw8 raw[U];
#pragma unroll
        for (int u = 0; u < U; u++)
            if (i + u * T < r.eights) raw[u] = fg_load_row8(x, r, i + u * T, -INFINITY);
#pragma unroll
        for (int u = 0; u < U; u++) {
            if (i + u * T >= r.eights) continue;
            const fg_vec8 v = fg_floats(x, raw[u]);
#pragma unroll
            for (int j = 0; j < 8; j++) m = greater(m, v[j]);
        }
    }
    return team_greatest<T>(m);
}

template <int T>
static __global__ void __launch_bounds__(fg_team_block<T>)
row_max(fg_in x, fg_out y, int64_t rows, int64_t n)
{
    const int64_t k = (int64_t)blockIdx.x * fg_team_rows<T> + threadIdx.x / T;
    const float m = row_greatest<T>(x, fg_row_at(k * n, k < rows ? k * n + n : k * n));
    if (threadIdx.x % T == 0 && k < rows) y.put(k, m);
}

/* gx = gy at the first that is the greatest, or NaN.  A warp a row. */
static __global__ void __launch_bounds__(fg_team_block<32>)
row_max_grad(fg_in gy, fg_in x, fg_out gx, int64_t rows, int64_t n)
{
    const int64_t k = (int64_t)blockIdx.x * fg_team_rows<32> + threadIdx.x / 32;
    const fg_row r = fg_row_at(k * n, k < rows ? k * n + n : k * n);
    const float m = row_greatest<32>(x, r), g = k < rows ? gy[k] : 0;
    const int lane = threadIdx.x % 32;
    bool found = false;                          /* in an eight before */
    for (int64_t i0 = 0; i0 < r.eights; i0 += 32) {
        fg_vec8 v = fg_floats(x, fg_load_row8(x, r, i0 + lane, -INFINITY));
        const int64_t at = 8 * (r.first + i0 + lane);
        int first = 8;
#pragma unroll
        for (int j = 7; j >= 0; j--)
            if (at + j >= r.from && at + j < r.to && (v[j] == m || v[j] != v[j])) first = j;
        const unsigned hits = __ballot_sync(~0u, first < 8);
        const bool before = (hits & ((1u << lane) - 1)) != 0;
        const bool here = !found && !before && first < 8;
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = here && j == first ? g : 0;
        fg_store_row8(gx, r, i0 + lane, v);
        found = found || hits != 0;
    }
}

static void max_launch(const fg_exec *e, cudaStream_t stream)
{
    const int64_t n = fg_last_of(&e->in_shape[0]), rows = fg_count_of(&e->in_shape[0]) / n;
    const fg_in x = fg_input_of(e, 0);
    const fg_out y = fg_output_of(e, 0);
    if (n <= 4096)
        row_max<32><<<fg_blocks(rows, fg_team_rows<32>), fg_team_block<32>, 0, stream>>>(x, y, rows,
                                                                                        n);
    else
        row_max<256><<<(unsigned)rows, 256, 0, stream>>>(x, y, rows, n);
}
static void max_grad_launch(const fg_exec *e, cudaStream_t stream)
{
    const int64_t n = fg_last_of(&e->in_shape[1]), rows = fg_count_of(&e->in_shape[1]) / n;
    row_max_grad<<<fg_blocks(rows, fg_team_rows<32>), fg_team_block<32>, 0, stream>>>(
        fg_input_of(e, 0), fg_input_of(e, 1), fg_output_of(e, 0), rows, n);
}
FG_KERNEL(row_max) = { .launch = max_launch };
FG_KERNEL(row_max_grad) = { .launch = max_grad_launch };

/* ---- cumsum: [outer, T, inner] along T, in double as gates are summed over long T ------------ */

/* T in chunks: the sum of each, the sums before each, then every element.  A thread has one column
 * of one chunk. */
struct running { int64_t outer, T, inner, length, chunks; bool reverse; };

static running running_of(const fg_shape *s, const struct fg_attr_cumsum *a)
{
    running c = { .outer = 1, .T = s->dim[a->axis], .inner = 1, .length = 64, .chunks = 1,
                  .reverse = a->reverse };
    for (int i = 0; i < a->axis; i++) c.outer *= s->dim[i];
    for (int i = a->axis + 1; i < s->rank; i++) c.inner *= s->dim[i];
    while (c.length * c.length * 4 < c.T) c.length *= 2;
    c.chunks = (c.T + c.length - 1) / c.length;
    return c;
}
static size_t cumsum_scratch(const fg_infer *i)
{
    const running c = running_of(&i->in[0], (const struct fg_attr_cumsum *)i->attr);
    return c.chunks > 1 ? (size_t)(c.outer * c.chunks * c.inner) * sizeof(double) : 0;
}

/* Walks one chunk; the values go to y if it is there, the chunk's sum is returned. */
static __device__ double walk_chunk(const running &c, fg_in x, fg_out y, int64_t outer,
                                    int64_t chunk, int64_t column, double sum)
{
    constexpr int U = 8;
    const int64_t t0 = chunk * c.length, t1 = t0 + c.length < c.T ? t0 + c.length : c.T;
    const int64_t step = c.reverse ? -c.inner : c.inner;
    int64_t at = (outer * c.T + (c.reverse ? c.T - 1 - t0 : t0)) * c.inner + column;
    for (int64_t t = t0; t < t1; t += U) {
        float v[U];
#pragma unroll
        for (int u = 0; u < U; u++) v[u] = t + u < t1 ? x[at + u * step] : 0;
#pragma unroll
        for (int u = 0; u < U; u++) {
            sum += (double)v[u];
            if (y.p && t + u < t1) y.put(at + u * step, (float)sum);
        }
        at += U * step;
    }
    return sum;
}

static __global__ void __launch_bounds__(256)
chunk_sums(running c, fg_in x, double *sums)
{
    const int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= c.outer * c.chunks * c.inner) return;
    const int64_t column = i % c.inner, chunk = i / c.inner % c.chunks;
    sums[i] = walk_chunk(c, x, {}, i / c.inner / c.chunks, chunk, column, 0.0);
}
/* A warp a column: a lane adds up its stretch of chunks, then those before it. */
static __global__ void __launch_bounds__(128) sums_before(running c, double *sums)
{
    const int64_t i = (int64_t)blockIdx.x * 4 + threadIdx.x / 32, per = (c.chunks + 31) / 32;
    if (i >= c.outer * c.inner) return;
    const int lane = threadIdx.x % 32;
    double *s = sums + i / c.inner * c.chunks * c.inner + i % c.inner, sum = 0;
    const int64_t from = lane * per, to = least(from + per, c.chunks);
    for (int64_t k = from; k < to; k++) sum += s[k * c.inner];
    double all = sum;
    for (int d = 1; d < 32; d *= 2) {
        const double more = __shfl_up_sync(~0u, all, d);
        if (lane >= d) all += more;
    }
    double before = __shfl_up_sync(~0u, all, 1);         /* not all - sum: sums may be infinite */
    if (lane == 0) before = 0;
    for (int64_t k = from; k < to; k++) {
        const double own = s[k * c.inner];
        s[k * c.inner] = before;
        before += own;
    }
}
static __global__ void __launch_bounds__(256)
running_sums(running c, fg_in x, fg_out y, const double *sums)
{
    const int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= c.outer * c.chunks * c.inner) return;
    const int64_t column = i % c.inner, chunk = i / c.inner % c.chunks;
    walk_chunk(c, x, y, i / c.inner / c.chunks, chunk, column, sums ? sums[i] : 0.0);
}

static void cumsum_launch(const fg_exec *e, cudaStream_t stream)
{
    const running c = running_of(&e->in_shape[0], (const struct fg_attr_cumsum *)e->attr);
    const int64_t columns = c.outer * c.inner;
    const fg_in x = fg_input_of(e, 0);
    const fg_out y = fg_output_of(e, 0);
    double *sums = c.chunks > 1 ? (double *)e->scratch : nullptr;
    const unsigned blocks = fg_blocks(columns * c.chunks, 256);
    if (sums) {
        chunk_sums<<<blocks, 256, 0, stream>>>(c, x, sums);
        sums_before<<<fg_blocks(columns, 4), 128, 0, stream>>>(c, sums);
    }
    running_sums<<<blocks, 256, 0, stream>>>(c, x, y, sums);
}
FG_KERNEL(cumsum) = { .launch = cumsum_launch, .scratch = cumsum_scratch };
