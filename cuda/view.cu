/* view.cu - permute, slice and its gradient, concat: ops/view.c on a GPU.  (reshape is a view.)
 *
 * Bytes: every element once in and once out.  slice, slice_grad and concat are one kernel: y's rows
 * are pieces of two sources, or 0.  A permutation that keeps the last axis copies runs; any other
 * goes through square tiles in shared memory, so that both sides are read and written in rows. */
#include "elementwise.cuh"

static int64_t inside(const fg_shape *s, int axis)
{
    int64_t n = 1;
    for (int i = axis + 1; i < s->rank; i++) n *= s->dim[i];
    return n;
}

/* ---- rows made of pieces -------------------------------------------------------------------- */

/* Columns [from, to) of y's row r are elements r * pitch + start ... of a source. */
struct piece {
    fg_source source;
    int64_t from, to, pitch, start;
};
struct pieces {
    piece p[2];
    fg_divisor width;                            /* of y's rows */
};

/* Where y's element i comes from; false: nowhere, it is 0. */
static __device__ __forceinline__ bool come_from(const pieces &all, int64_t i, fg_in *x,
                                                 int64_t *at)
{
    const int64_t row = fg_divide(i, all.width), column = i - row * all.width.d;
    const piece &p = all.p[0], &q = all.p[1];
    if (column >= p.from && column < p.to) {
        *x = p.source.x;
        *at = p.source.place.at(row * p.pitch + p.start + column - p.from);
        return true;
    }
    if (column >= q.from && column < q.to) {
        *x = q.source.x;
        *at = q.source.place.at(row * q.pitch + q.start + column - q.from);
        return true;
    }
    return false;
}

/* V: divides every bound and pitch. */
template <int V>
static __global__ void __launch_bounds__(FG_MAP_THREADS)
copy_pieces(pieces all, fg_target y, int64_t n)
{
    const int64_t i = V * ((int64_t)blockIdx.x * FG_MAP_THREADS + threadIdx.x);
    if (i >= n) return;
    fg_in x = { nullptr, false };
    fg_some<V> some;
    some.clear();
    int64_t j;
    if (come_from(all, i, &x, &j)) some.load(x, j);
    float v[V];
    some.floats(x, v);
    fg_store_some<V>(y.y, y.place.at(i), v);
}

static void launch_pieces(const fg_exec *e, cudaStream_t stream, const pieces &all)
{
    const int64_t n = fg_count_of(&e->out_shape[0]);
    const fg_target y = fg_target_of(e, 0);
    bool eights = fg_in_eights(&e->out_rows[0]) && all.width.d % 8 == 0;
    for (int k = 0; k < 2; k++) {
        const piece *p = &all.p[k];
        if (p->from == p->to) continue;
        eights = eights && p->from % 8 == 0 && p->to % 8 == 0 && p->pitch % 8 == 0
                 && p->start % 8 == 0 && fg_in_eights(&e->in_rows[k]);
    }
    constexpr int threads = FG_MAP_THREADS;
    if (!eights) copy_pieces<1><<<fg_blocks(n, threads), threads, 0, stream>>>(all, y, n);
    else if (y.y.narrow)
        copy_pieces<8><<<fg_blocks(n, 8 * threads), threads, 0, stream>>>(all, y, n);
    else copy_pieces<4><<<fg_blocks(n, 4 * threads), threads, 0, stream>>>(all, y, n);
}

static void slice_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_slice *a = (const struct fg_attr_slice *)e->attr;
    const fg_shape *x = &e->in_shape[0];
    const int64_t step = inside(x, a->axis), n = (a->stop - a->start) * step;
    pieces all = {};
    all.p[0] = { fg_source_of(e, 0), 0, n, x->dim[a->axis] * step, a->start * step };
    all.width = fg_divisor_of(n, fg_count_of(&e->out_shape[0]));
    launch_pieces(e, stream, all);
}
FG_KERNEL(slice) = { .launch = slice_launch, .pitched_in = 1, .pitched_out = 1 };

static void slice_grad_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_slice_grad *a = (const struct fg_attr_slice_grad *)e->attr;
    const fg_shape *gy = &e->in_shape[0];
    const int64_t step = inside(gy, a->axis), n = gy->dim[a->axis] * step;
    pieces all = {};
    all.p[0] = { fg_source_of(e, 0), a->start * step, a->start * step + n, n, 0 };
    all.width = fg_divisor_of(a->extent * step, fg_count_of(&e->out_shape[0]));
    launch_pieces(e, stream, all);
}
FG_KERNEL(slice_grad) = { .launch = slice_grad_launch, .pitched_in = 1, .pitched_out = 1 };

/* Input k alone, to where it belongs. */
static void join_one(const fg_exec *e, int k, int64_t n, int64_t line, void *to,
                     cudaStream_t stream)
{
    const fg_rows rows = { n, fg_pitch_of(&e->out_rows[0], line) };
    fg_exec part = *e;
    part.in_shape += k, part.in_type += k, part.in_rows += k, part.in[0] = e->in[k];
    part.out_shape = part.in_shape, part.out_rows = &rows, part.out[0] = to;
    pieces all = {};
    all.p[0] = { fg_source_of(&part, 0), 0, n, n, 0 };
    all.width = fg_divisor_of(n, fg_count_of(part.out_shape));
    launch_pieces(&part, stream, all);
}

/* An input that was made in its place stays there. */
static void concat_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_concat *at = (const struct fg_attr_concat *)e->attr;
    const fg_shape *a = &e->in_shape[0], *b = &e->in_shape[1];
    const int64_t na = a->dim[at->axis] * inside(a, at->axis);
    const int64_t nb = b->dim[at->axis] * inside(b, at->axis);
    char *to = (char *)e->out[0], *behind = to + na * (e->out_type[0] == FG_BF16 ? 2 : 4);
    if (e->in[0] == to || e->in[1] == behind) {
        if (e->in[0] != to) join_one(e, 0, na, na + nb, to, stream);
        if (e->in[1] != behind) join_one(e, 1, nb, na + nb, behind, stream);
        return;
    }
    pieces all = {};
    all.p[0] = { fg_source_of(e, 0), 0, na, na, 0 };
    all.p[1] = { fg_source_of(e, 1), na, na + nb, nb, 0 };
    all.width = fg_divisor_of(na + nb, fg_count_of(&e->out_shape[0]));
    launch_pieces(e, stream, all);
}
FG_KERNEL(concat) = { .launch = concat_launch, .pitched_in = 3, .pitched_out = 1 };

/* ---- permute -------------------------------------------------------------------------------- */

#define SIDE 64                                  /* of a tile */
#define TILE_THREADS 256

/* y's axes, outermost first, axes that stay neighbours merged.  move: elements of x, pitch: of y,
 * between neighbours along an axis. */
struct layout {
    int rank;
    fg_divisor dim[FG_MAX_RANK];
    int64_t move[FG_MAX_RANK], pitch[FG_MAX_RANK];
};

static layout layout_of(const fg_shape *x, const fg_shape *order)
{
    layout l = {};
    int64_t stride[FG_MAX_RANK], s = 1;
    for (int i = x->rank - 1; i >= 0; i--) {
        stride[i] = s;
        s *= x->dim[i];
    }
    for (int i = 0; i < x->rank; i++) {
        const int64_t axis = order->dim[i], n = x->dim[axis];
        if (n == 1) continue;
        if (l.rank > 0 && l.move[l.rank - 1] == n * stride[axis]) l.dim[l.rank - 1].d *= n;
        else l.dim[l.rank++].d = n;
        l.move[l.rank - 1] = stride[axis];
    }
    if (l.rank == 0) {
        l.dim[0].d = l.move[0] = 1;
        l.rank = 1;
    }
    int64_t pitch = 1;
    for (int i = l.rank - 1; i >= 0; i--) {
        l.pitch[i] = pitch;
        pitch *= l.dim[i].d;
        l.dim[i] = fg_divisor_of(l.dim[i].d, fg_count_of(x));
    }
    return l;
}

/* Axes in x's order: reads go straight through x, so that all runs of a row are read together. */
static layout by_x(const layout &l)
{
    layout r = {};
    for (int64_t below = INT64_MAX; r.rank < l.rank; below = r.move[r.rank - 1]) {
        int next = -1;
        for (int i = 0; i < l.rank; i++)
            if (l.move[i] < below && (next < 0 || l.move[i] > l.move[next])) next = i;
        r.dim[r.rank] = l.dim[next];
        r.pitch[r.rank] = l.pitch[next];
        r.move[r.rank++] = l.move[next];
    }
    return r;
}

/* The last axis of y is x's: runs of a multiple of V; l in x's order. */
template <int V>
static __global__ void __launch_bounds__(FG_MAP_THREADS)
permute_runs(layout l, fg_in x, fg_out y, int64_t n)
{
    const int64_t i = V * ((int64_t)blockIdx.x * FG_MAP_THREADS + threadIdx.x);
    if (i >= n) return;
    fg_some<V> some;
    some.load(x, i);
    int64_t rest = i, to = 0;
#pragma unroll
    for (int a = FG_MAX_RANK - 1; a >= 0; a--) {
        if (a >= l.rank) continue;
        const int64_t q = a > 0 ? fg_divide(rest, l.dim[a]) : 0;
        to += (rest - q * l.dim[a].d) * l.pitch[a];
        rest = q;
    }
    float v[V];
    some.floats(x, v);
    fg_store_some<V>(y, to, v);
}

/* Axis q is y's last, axis p the one along which x is contiguous; the others are in a layout. */
struct tiling { int64_t p, q, p_pitch, q_move, p_tiles, q_tiles; };

/* V = 8: both sides in eights. */
template <int V>
static __global__ void __launch_bounds__(TILE_THREADS)
permute_tiles(layout others, tiling t, fg_in x, fg_out y)
{
    __shared__ float tile[SIDE][SIDE + 1];
    int64_t rest = blockIdx.x, from = 0, to = 0;
    const int64_t q0 = rest % t.q_tiles * SIDE;
    rest /= t.q_tiles;
    const int64_t p0 = rest % t.p_tiles * SIDE;
    rest /= t.p_tiles;
    for (int a = others.rank - 1; a >= 0; a--) {
        const int64_t index = rest % others.dim[a].d;
        rest /= others.dim[a].d;
        from += index * others.move[a];
        to += index * others.pitch[a];
    }
    constexpr int ACROSS = SIDE / V, STEPS = SIDE * ACROSS / TILE_THREADS;
    const int i = threadIdx.x % ACROSS * V, j0 = threadIdx.x / ACROSS;
    fg_some<V> some[STEPS];
    float v[V];
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        const int j = j0 + s * (TILE_THREADS / ACROSS);
        if (q0 + j < t.q && p0 + i < t.p) some[s].load(x, from + (q0 + j) * t.q_move + p0 + i);
    }
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        some[s].floats(x, v);
#pragma unroll
        for (int k = 0; k < V; k++) tile[j0 + s * (TILE_THREADS / ACROSS)][i + k] = v[k];
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        const int j = j0 + s * (TILE_THREADS / ACROSS);
        if (p0 + j >= t.p || q0 + i >= t.q) continue;
#pragma unroll
        for (int k = 0; k < V; k++) v[k] = tile[i + k][j];
        fg_store_some<V>(y, to + (p0 + j) * t.p_pitch + q0 + i, v);
    }
}

static void launch_tiles(const fg_exec *e, cudaStream_t stream, const layout &l)
{
    const int q = l.rank - 1;
    int p = 0;
    for (int i = 1; i < q; i++)
        if (l.move[i] < l.move[p]) p = i;
    layout others = {};
    int64_t blocks = 1;
    for (int i = 0; i < q; i++) {
        if (i == p) continue;
        const int k = others.rank++;
        others.dim[k] = l.dim[i];
        others.move[k] = l.move[i];
        others.pitch[k] = l.pitch[i];
        blocks *= l.dim[i].d;
    }
    tiling t = { .p = l.dim[p].d, .q = l.dim[q].d, .p_pitch = l.pitch[p], .q_move = l.move[q],
                 .p_tiles = 0, .q_tiles = 0 };
    t.p_tiles = (t.p + SIDE - 1) / SIDE;
    t.q_tiles = (t.q + SIDE - 1) / SIDE;
    blocks *= t.p_tiles * t.q_tiles;
    bool eights = t.p % 8 == 0 && t.q % 8 == 0 && t.q_move % 8 == 0 && t.p_pitch % 8 == 0;
    for (int i = 0; i < others.rank; i++)
        eights = eights && others.move[i] % 8 == 0 && others.pitch[i] % 8 == 0;
    const fg_in x = fg_input_of(e, 0);
    const fg_out y = fg_output_of(e, 0);
    if (eights) permute_tiles<8><<<(unsigned)blocks, TILE_THREADS, 0, stream>>>(others, t, x, y);
    else permute_tiles<1><<<(unsigned)blocks, TILE_THREADS, 0, stream>>>(others, t, x, y);
}

static void permute_launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_permute *a = (const struct fg_attr_permute *)e->attr;
    const layout l = layout_of(&e->in_shape[0], &a->order);
    const int64_t n = fg_count_of(&e->in_shape[0]);
    const fg_in x = fg_input_of(e, 0);
    const fg_out y = fg_output_of(e, 0);
    if (l.move[l.rank - 1] != 1) {
        launch_tiles(e, stream, l);
        return;
    }
    constexpr int threads = FG_MAP_THREADS;
    const layout r = by_x(l);
    if (l.dim[l.rank - 1].d % 8)
        permute_runs<1><<<fg_blocks(n, threads), threads, 0, stream>>>(r, x, y, n);
    else if (y.narrow)
        permute_runs<8><<<fg_blocks(n, 8 * threads), threads, 0, stream>>>(r, x, y, n);
    else
        permute_runs<4><<<fg_blocks(n, 4 * threads), threads, 0, stream>>>(r, x, y, n);
}
FG_KERNEL(permute) = { .launch = permute_launch };
