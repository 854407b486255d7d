/* ssd_scan_grad_sm90.cu - the chunks of ssd_scan_grad on Hopper's wgmma.
 *
 * A block has a chunk of 64 tokens and walks some heads; ssd_scan_grad.cu has the formulas.  S and
 * R come for two chunks, the pair: S enters its first half, R belongs to what leaves its second.
 * The other half's own is made here, from the other half's rows:
 *
 *     first half    R <- whole R + sum_i gy_i keep_i c_i^T        i, j: tokens of the other half
 *     second half   S <- whole S + sum_j x_j push_j b_j^T
 *
 * One warpgroup has the pairs, with tokens j as rows and i as columns, so that W^T is an operand in
 * registers:
 *     E^T = x gy^T,   q += E^T L^T dt,   gu = W^T gy + part,   W_ij = (c_i.b_j) L_ij
 * and the other has the states:
 *     part = left b R^T,   gb += push x R,   gc += keep gy S
 * Sums over heads, q, gb and gc, stay in registers.  Of two warps more one loads the next head by
 * the copy engine, the other makes gdt, ga and gd of the last one.  Tiles lie in shared memory as
 * wgmma.cuh says. */
#include "ssd_scan_grad.cuh"
#include "ssd_sm90.cuh"

#define THREADS 384
#define WALKERS 320                              /* all but two warps, which do nothing */

template <int N> struct head {
    alignas(1024) bf16 x[PANEL];
    bf16 gy[PANEL], other[PANEL];                /* other: the other half's gy, or x */
    bf16 state[N / 64 * PANEL], pull[N / 64 * PANEL];
};
/* Sums of one head over the chunk; see `totals`. */
struct sums_of_head {
    alignas(16) float row[4][CHUNK];             /* of each warp */
    float column[CHUNK], u[CHUNK], w[CHUNK], gu[CHUNK], gy[CHUNK], both[4];
};
struct vectors {
    alignas(16) float2 sum[CHUNK];
    float dt[CHUNK], tail[CHUNK], keep[CHUNK], left[CHUNK];
    float weight[CHUNK];                         /* keep, or push, of the other half */
};
/* Numbers of each head of the block. */
struct scalars {
    float whole[HEADS_SM90], other_whole[HEADS_SM90], skip[HEADS_SM90], rate[HEADS_SM90];
};
struct maps { CUtensorMap x, gy; };
template <int N> struct memory {
    head<N> heads[2];
    bf16 b[N / 64 * PANEL], c[N / 64 * PANEL];
    bf16 other[N / 64 * PANEL];                  /* the other half's c, or b */
    float4 part[8 * 128];
    alignas(16) vectors v[3];
    scalars n;
    sums_of_head t[2];
    alignas(16) int32_t segment[CHUNK];
    alignas(8) uint64_t full[2];                 /* barriers: heads[i] and its vectors are there */
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

enum { STATES_ONLY = 1, PART_READY, NEXT, LAST };
/* A block's place. */
struct spot { int b, g, chunk, t0, real, part, h0, h1; bool late; };

/* What the copy engine brings for a head; one thread. */
template <int N>
static __device__ __forceinline__ void load_head(const chunks &k, const maps *maps, const spot &o,
                                                 memory<N> *m, int h)
{
    const int i = h - o.h0, other = (o.chunk ^ 1) * CHUNK;
    head<N> *to = &m->heads[i % 2];
    vectors *v = &m->v[i % 3];
    const uint32_t bar = fg_shared(&m->full[i % 2]);
    const int64_t row = (int64_t)o.b * k.z.H + h, at = row * k.d.padded + o.t0;
    const int64_t state = (row * (k.d.chunks / 2) + o.chunk / 2) * 64 * N;
    const float *weight = (o.late ? k.d.push : k.d.keep) + row * k.d.padded + other;
    fg_expect(bar, 3 * PANEL_BYTES + 2 * N * 128 + (int)sizeof *v);
    fg_box_load(fg_shared(to->x), &maps->x, 0, h, o.t0, o.b, bar);
    fg_box_load(fg_shared(to->gy), &maps->gy, 0, h, o.t0, o.b, bar);
    fg_box_load(fg_shared(to->other), o.late ? &maps->x : &maps->gy, 0, h, other, o.b, bar);
    fg_bulk_load(fg_shared(to->state), k.states + state, N * 128, bar);
    fg_bulk_load(fg_shared(to->pull), k.pulls + state, N * 128, bar);
    fg_bulk_load(fg_shared(v->sum), k.d.sum + at, sizeof v->sum, bar);
    fg_bulk_load(fg_shared(v->dt), k.d.dt + at, sizeof v->dt, bar);
    fg_bulk_load(fg_shared(v->tail), k.d.tail + at, sizeof v->tail, bar);
    fg_bulk_load(fg_shared(v->keep), k.d.keep + at, sizeof v->keep, bar);
    fg_bulk_load(fg_shared(v->left), k.d.left + at, sizeof v->left, bar);
    fg_bulk_load(fg_shared(v->weight), weight, sizeof v->weight, bar);
}

/* A thread's rows r and r + 8, summed over the four threads that share them. */
static __device__ __forceinline__ void put_rows(float *to, int r, const float *x)
{
    const float low = quad_sum(x[0]), high = quad_sum(x[1]);
    if (threadIdx.x % 4 == 0) to[r] = low, to[r + 8] = high;
}
/* Two lanes share x[0 .. 2 HALF): each gets the sums of one half. */
template <int HALF> static __device__ __forceinline__ void halve(float *x)
{
    const bool up = threadIdx.x & (2 * HALF);
#pragma unroll
    for (int k = 0; k < HALF; k++) {
        const float away = up ? x[k] : x[k + HALF], own = up ? x[k + HALF] : x[k];
        x[k] = own + __shfl_xor_sync(~0u, away, 2 * HALF);
    }
}
/* x[2n + e], the columns 8n + 2(lane % 4) + e of a warp's rows, summed over the rows. */
static __device__ __forceinline__ void put_columns(float *to, float *x)
{
    const int lane = threadIdx.x % 32, n = (lane & 16) / 4 + (lane & 8) / 4 + (lane & 4) / 4;
    halve<8>(x);
    halve<4>(x);
    halve<2>(x);
    *(float2 *)&to[8 * n + 2 * (lane % 4)] = make_float2(x[0], x[1]);
}

/* ---- pairs ---------------------------------------------------------------------------------- */

/* What a head's pairs are summed over heads to: q of the warp's 16 rows and all columns, and of
 * its tile on the diagonal, `near`. */
struct pair_sums { float far[8][4], near[2][4]; };
struct weighed { float row[16], column[2]; };

/* The warp's own 16 x 16 tile on the diagonal; row: the sums of its columns. */
static __device__ __forceinline__ void weigh_near(const vectors &v, const int32_t *segment,
                                                  const float (&e)[2][4],
                                                  const float (&score)[2][4], float (&q)[2][4],
                                                  uint32_t *w, float *row, float *column,
                                                  float *diagonal)
{
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16, c = 2 * (lane % 4);
    const int r = first + lane / 4;
    const float dt[2] = { v.dt[r], v.dt[r + 8] };
    const float2 own[2] = { v.sum[r], v.sum[r + 8] };
    const int seg[2] = { segment[r], segment[r + 8] };
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const int i = first + 8 * n + c;
        const float4 s = *(const float4 *)(v.sum + i);
        const int2 segs = *(const int2 *)(segment + i);
        row[2 * n] = row[2 * n + 1] = 0;
#pragma unroll
        for (int low = 0; low < 2; low++) {
            const int j = r + 8 * low;
            const float x = fg_exp2(fg_two_diff(make_float2(s.x, s.y), own[low]));
            const float y = fg_exp2(fg_two_diff(make_float2(s.z, s.w), own[low]));
            const float d[2] = { j <= i && segs.x == seg[low] ? x : 0.0f,
                                 j <= i + 1 && segs.y == seg[low] ? y : 0.0f };
            float out[2];
#pragma unroll
            for (int u = 0; u < 2; u++) {
                const float mine = e[n][2 * low + u], weight = mine * d[u] * dt[low];
                out[u] = score[n][2 * low + u] * d[u];
                q[n][2 * low + u] += weight;
                if (j == i + u) diagonal[j] = mine;
                const float cross = j < i + u ? score[n][2 * low + u] * weight : 0;
                row[2 * n + u] += cross;
                column[low] += cross;
            }
            w[2 * n + low] = fg_pack2(out[0], out[1]);
        }
    }
}

/* 16 columns behind that tile, from column 8n on, by way of the tile's last token. */
static __device__ __forceinline__ void weigh_far(const vectors &v, const int32_t *segment, int n,
                                                 const float (&e)[8][4],
                                                 const float (&score)[8][4], float (&q)[8][4],
                                                 uint32_t *w, float *row, float *column)
{
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16, c = 2 * (lane % 4);
    const int r = first + lane / 4, last_segment = segment[first + 15];
    const float2 last = v.sum[first + 15];
    const float tail[2] = { v.tail[r], v.tail[r + 8] };
    const float step[2] = { tail[0] * v.dt[r], tail[1] * v.dt[r + 8] };
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const int i = 8 * (n + k) + c;
        const float4 s = *(const float4 *)(v.sum + i);
        const int2 segs = *(const int2 *)(segment + i);
        const float x = fg_exp2(fg_two_diff(make_float2(s.x, s.y), last));
        const float y = fg_exp2(fg_two_diff(make_float2(s.z, s.w), last));
        const float d[2] = { segs.x == last_segment ? x : 0.0f,
                             segs.y == last_segment ? y : 0.0f };
        row[2 * k] = row[2 * k + 1] = 0;
#pragma unroll
        for (int low = 0; low < 2; low++) {
            float out[2];
#pragma unroll
            for (int u = 0; u < 2; u++) {
                const float g = score[n + k][2 * low + u];
                const float weight = e[n + k][2 * low + u] * (step[low] * d[u]);
                out[u] = g * (tail[low] * d[u]);
                q[n + k][2 * low + u] += weight;
                row[2 * k + u] = fmaf(g, weight, row[2 * k + u]);
                column[low] = fmaf(g, weight, column[low]);
            }
            w[2 * k + low] = fg_pack2(out[0], out[1]);
        }
    }
}

/* q and the sums of z; W^T in fragments; the diagonal of E. */
static __device__ __forceinline__ void weigh(const vectors &v, const int32_t *segment,
                                             const float (&e)[8][4], const float (&score)[8][4],
                                             const float (&score_near)[2][4], pair_sums *q,
                                             uint32_t (&w)[4][4], weighed &z, float *diagonal)
{
    const int warp = threadIdx.x / 32;
    float near[2][4], row[4];
    uint32_t own[4];
    pick_near(warp, e, near);
    weigh_near(v, segment, near, score_near, q->near, own, row, z.column, diagonal);
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int u = 0; u < 4; u++) {
            w[k][u] = k == warp ? own[u] : 0;
            z.row[4 * k + u] = k == warp ? row[u] : 0;
        }
        if (k > 0 && k > warp)
            weigh_far(v, segment, 2 * k, e, score, q->far, w[k], z.row + 4 * k, z.column);
    }
}

/* gx and what gu says of x. */
static __device__ __forceinline__ void put_gx(const chunks &k, const spot &o, const vectors &v,
                                              const bf16 *x, const bf16 *gy,
                                              const int32_t *segment, int h, float skip,
                                              const float (*gu)[4], float *on_x)
{
    const int lane = threadIdx.x % 32, r = threadIdx.x / 32 * 16 + lane / 4;
    uint32_t xs[4][4], ys[4][4];
    rows_of_tile(xs, x, r - lane / 4);
    rows_of_tile(ys, gy, r - lane / 4);
#pragma unroll
    for (int low = 0; low < 2; low++) {
        const int j = r + 8 * low;
        const float dt = v.dt[j];
        const bool pad = segment[j] < 0;
        bf16 *to = k.gx + (o.b * k.z.T + o.t0 + j) * k.gx_row + h * 64 + 8 * (lane % 4);
#pragma unroll
        for (int n = 0; n < 8; n += 4) {
            uint32_t out[4];
#pragma unroll
            for (int p = 0; p < 4; p++) {
                const float2 a = pair_of(xs, n + p, low), y = pair_of(ys, n + p, low);
                const float u = gu[n + p][2 * low], w = gu[n + p][2 * low + 1];
                on_x[low] = fmaf(u, a.x, fmaf(w, a.y, on_x[low]));
                const uint32_t g = fg_pack2(fmaf(dt, u, skip * y.x), fmaf(dt, w, skip * y.y));
                out[p] = pad ? 0u : g;
            }
            fg_quad_turn(out);
            if (j < o.real) fg_store4(to + 8 * n, out);
        }
    }
}

/* gdt, ga, gd and gbias of a head by one warp; a lane has two tokens.  gl in one running sum. */
template <int N>
static __device__ __forceinline__ void settle_head(const chunks &k, const spot &o,
                                                   const memory<N> *m, int h)
{
    const sums_of_head &s = m->t[(h - o.h0) % 2];
    const vectors &v = m->v[(h - o.h0) % 3];
    const int t = 2 * (threadIdx.x % 32);
    const auto two = [&](const float *x) { return *(const float2 *)(x + t); };
    const float2 dt = two(v.dt), column = two(s.column), u = two(s.u), w = two(s.w);
    const float2 gu = two(s.gu), gy = two(s.gy);
    float2 row = two(s.row[0]);
#pragma unroll
    for (int i = 1; i < 4; i++) row.x += two(s.row[i]).x, row.y += two(s.row[i]).y;
    const float x = column.x - row.x + dt.x * w.x - u.x;
    const float y = column.y - row.y + dt.y * w.y - u.y;
    const float both = (s.both[0] + s.both[1]) + (s.both[2] + s.both[3]);
    const float all = fg_warp_sum(u.x + u.y) + m->n.whole[h - o.h0] * both;
    const float gl = before(x + y) + all, next = gl + x;
    const int2 segment = *(const int2 *)(m->segment + t);
    const bool one = t < o.real && segment.x >= 0, other = t + 1 < o.real && segment.y >= 0;
    const float rate = m->n.rate[h - o.h0];
    float g = one ? fmaf(rate, gl, gu.x) : 0.0f, also = other ? fmaf(rate, next, gu.y) : 0.0f;
    if (k.bias) g *= fg_step_slope(dt.x), also *= fg_step_slope(dt.y);
    const int64_t to = (o.b * k.z.T + o.t0 + t) * k.gdt_row + h;
    if (t < o.real) k.gdt.put(to, g);
    if (t + 1 < o.real) k.gdt.put(to + k.gdt_row, also);
    const float a = fg_warp_sum((one ? dt.x * gl : 0) + (other ? dt.y * next : 0));
    const float d = fg_warp_sum((one ? gy.x : 0) + (other ? gy.y : 0));
    const float bias = fg_warp_sum(g + also);
    const int64_t at = ((int64_t)o.b * k.d.chunks + o.chunk) * k.z.H + h;
    if (t == 0) k.s.ga[at] = a, k.s.gd[at] = d, k.s.gbias[at] = bias;
}

template <int N>
static __device__ __forceinline__ void pairs_of_head(const chunks &k, const spot &o, memory<N> *m,
                                                     int h, const float (&score)[8][4],
                                                     const float (&score_near)[2][4],
                                                     pair_sums *q)
{
    const head<N> *tile = &m->heads[(h - o.h0) % 2];
    const vectors &v = m->v[(h - o.h0) % 3];
    sums_of_head *t = &m->t[(h - o.h0) % 2];
    const int warp = threadIdx.x / 32, r = 16 * warp + threadIdx.x % 32 / 4;
    const uint64_t x = matrix_at(fg_shared(tile->x), 0), gy = matrix_at(fg_shared(tile->gy), 0);
    float e[8][4] = {}, on_x[2] = { 0 };
    uint32_t w[4][4];
    weighed z = {};
    pin(e);
    wgmma_begin();
#pragma unroll
    for (int p = 0; p < 4; p++) product(e, behind(x, 32 * p), behind(gy, 32 * p), p);
    wgmma_commit();
    wgmma_wait<0>();
    pin(e);
    weigh(v, m->segment, e, score, score_near, q, w, z, t->gy);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int u = 0; u < 4; u++) e[n][u] = 0;
    pin(e), pin(w);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < 4; i++) product(e, w[i], behind(gy, 2048 * i));
    wgmma_commit();
    put_rows(t->column, r, z.column);
    put_columns(t->row[warp], z.row);
    wgmma_wait<0>();
    pin(e), pin(w);
    const float left[2] = { v.left[r], v.left[r + 8] };
    barrier_sync<PART_READY, 256>();
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const float4 u = m->part[n * 128 + threadIdx.x];
        e[n][0] = fmaf(left[0], u.x, e[n][0]), e[n][1] = fmaf(left[0], u.y, e[n][1]);
        e[n][2] = fmaf(left[1], u.z, e[n][2]), e[n][3] = fmaf(left[1], u.w, e[n][3]);
    }
    put_gx(k, o, v, tile->x, tile->gy, m->segment, h, m->n.skip[h - o.h0], e, on_x);
    put_rows(t->gu, r, on_x);
}

/* ---- states --------------------------------------------------------------------------------- */

/* The half's own S or R, in place of the pair's; and <R,S>. */
template <int N>
static __device__ __forceinline__ void other_half(const spot &o, memory<N> *m, head<N> *tile,
                                                  const vectors &v, float whole, sums_of_head *t)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    bf16 *mine = o.late ? tile->state : tile->pull, *its = o.late ? tile->pull : tile->state;
    uint32_t a[4][4];
    float both = 0;
    fg_weigh_rows<64>(a, tile->other, v.weight, 16 * warp);
    float sum[N / 64][8][4];
    uint32_t old[4][4];
#pragma unroll
    for (int n = 0; n < N / 64; n++) {
        const uint64_t y = matrix_at(fg_shared(m->other + n * PANEL), 0);
        rows_of_tile(old, mine + n * PANEL, 16 * warp);
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int low = 0; low < 2; low++) {
                const float2 s = pair_of(old, i, low);
                sum[n][i][2 * low] = whole * s.x;
                sum[n][i][2 * low + 1] = whole * s.y;
            }
        pin(sum[n]);
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) product(sum[n], a[j], behind(y, 2048 * j));
        wgmma_commit();
    }
#pragma unroll
    for (int n = 0; n < N / 64; n++) {
        rows_of_tile(old, its + n * PANEL, 16 * warp);
        if (n + 1 < N / 64) wgmma_wait<1>();
        else wgmma_wait<0>();
        pin(sum[n]);
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int low = 0; low < 2; low++) {
                const float2 s = pair_of(old, i, low);
                both = fmaf(sum[n][i][2 * low], s.x, fmaf(sum[n][i][2 * low + 1], s.y, both));
            }
        put_tile(mine + n * PANEL, 16 * warp, sum[n]);
    }
    pin(a);
    both = fg_warp_sum(both);
    if (lane == 0) t->both[warp] = both;
}

/* The part of gu that comes through the state, but for the factor left, and what it says of it. */
template <int N>
static __device__ __forceinline__ void put_part(memory<N> *m, const bf16 *x, const vectors &v,
                                                float (&sum)[8][4],
                                                sums_of_head *t)
{
    const int own = threadIdx.x % 128, r = own / 32 * 16 + own % 32 / 4;
    const float left[2] = { v.left[r], v.left[r + 8] };
    float w[2] = { 0 };
    uint32_t xs[4][4];
    rows_of_tile(xs, x, own / 32 * 16);
#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
        for (int low = 0; low < 2; low++) {
            const float2 x = pair_of(xs, n, low);
            w[low] = fmaf(sum[n][2 * low], x.x, fmaf(sum[n][2 * low + 1], x.y, w[low]));
        }
        m->part[n * 128 + own] = make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
    }
    barrier_pass<PART_READY, 256>();
    w[0] *= left[0], w[1] *= left[1];
    put_rows(t->w, r, w);
}

/* gc += keep v of 64 columns; on_c += v.c. */
static __device__ __forceinline__ void add_to_c(const float (&v)[8][4], const bf16 *c,
                                                const float *keep, float (*gc)[4], float *on_c)
{
    uint32_t cs[4][4];
    rows_of_tile(cs, c, threadIdx.x / 32 % 4 * 16);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int low = 0; low < 2; low++) {
            const float2 y = pair_of(cs, n, low);
            const float v0 = v[n][2 * low], v1 = v[n][2 * low + 1];
            on_c[low] = fmaf(v0, y.x, fmaf(v1, y.y, on_c[low]));
            gc[n][2 * low] = fmaf(keep[low], v0, gc[n][2 * low]);
            gc[n][2 * low + 1] = fmaf(keep[low], v1, gc[n][2 * low + 1]);
        }
}

template <int N>
static __device__ __forceinline__ void states_of_head(const spot &o, memory<N> *m, int h,
                                                      float (&gb)[N / 8][4], float (&gc)[N / 8][4])
{
    head<N> *tile = &m->heads[(h - o.h0) % 2];
    const vectors &v = m->v[(h - o.h0) % 3];
    sums_of_head *t = &m->t[(h - o.h0) % 2];
    const int warp = threadIdx.x / 32 % 4, r = 16 * warp + threadIdx.x % 32 / 4;
    const uint64_t b = matrix_at(fg_shared(m->b), 0), pull = matrix_at(fg_shared(tile->pull), 0);
    const uint64_t wide = matrix_at(fg_shared(tile->pull), PANEL_BYTES);
    const uint64_t state = matrix_at(fg_shared(tile->state), 0);
    const uint64_t gy = matrix_at(fg_shared(tile->gy), 0);
    const float push[2] = { v.left[r] * v.dt[r], v.left[r + 8] * v.dt[r + 8] };
    const float keep[2] = { v.keep[r], v.keep[r + 8] };
    float sum[8][4] = {}, back[8][4] = {}, on_c[2] = { 0 };
    uint32_t a[4][4];
    other_half<N>(o, m, tile, v, m->n.other_whole[h - o.h0], t);
    proxy_fence();
    barrier_sync<STATES_ONLY, 128>();
    rows_of_tile(a, tile->x, 16 * warp);
#pragma unroll
    for (int p = 0; p < 4; p++)
#pragma unroll
        for (int e = 0; e < 4; e++) a[p][e] = fg_scale2(a[p][e], push[e % 2], push[e % 2]);
    pin(sum), pin(back), pin(gb), pin(a);
    wgmma_begin();
#pragma unroll
    for (int n = 0; n < N / 16; n++) {
        const int at = n / 4 * PANEL_BYTES + n % 4 * 32;
        product(sum, behind(b, at), behind(pull, at), n);
    }
    wgmma_commit();
#pragma unroll
    for (int p = 0; p < 4; p++)
        product_rows(back, behind(gy, 32 * p), behind(state, 2048 * p), p);
    wgmma_commit();
#pragma unroll
    for (int p = 0; p < 4; p++) product(gb, a[p], behind(wide, 2048 * p));
    wgmma_commit();
    wgmma_wait<2>();
    pin(sum);
    put_part<N>(m, tile->x, v, sum, t);
    if (N > 64) {
        pin(sum);
        wgmma_begin();
#pragma unroll
        for (int p = 0; p < 4; p++)
            product_rows(sum, behind(gy, 32 * p), behind(state, PANEL_BYTES + 2048 * p), p);
        wgmma_commit();
        wgmma_wait<2>();
    } else {
        wgmma_wait<1>();
    }
    pin(back);
    add_to_c(back, m->c, keep, gc, on_c);
    wgmma_wait<0>();
    pin(gb), pin(a), pin(sum);
    if (N > 64) add_to_c(sum, m->c + PANEL, keep, gc + 8, on_c);
    on_c[0] *= keep[0], on_c[1] *= keep[1];
    put_rows(t->u, r, on_c);
}

/* ---- sums over heads ------------------------------------------------------------------------ */

/* What q, summed over heads and in shared memory as rows j, adds to gb and gc. */
template <int N>
static __device__ __forceinline__ void add_pairs(memory<N> *m, const bf16 *q,
                                                 float (&gb)[N / 8][4], float (&gc)[N / 8][4])
{
    const int warp = threadIdx.x / 32 % 4;
    const uint32_t b = fg_shared(m->b), c = fg_shared(m->c);
    uint32_t a[4][4], turned[4][4];
    rows_of_tile(a, q, 16 * warp);
#pragma unroll
    for (int j = 0; j < 4; j++) fg_a_trans<64>(turned[j], fg_shared(q), 16 * warp, 16 * j);
    pin(gb), pin(gc), pin(a), pin(turned);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        product(gb, a[i], matrix_at(c + 2048 * i, PANEL_BYTES));
        product(gc, turned[i], matrix_at(b + 2048 * i, PANEL_BYTES));
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(gb), pin(gc);
}

template <int N>
static __device__ __forceinline__ void put_sums(const chunks &k, const spot &o, const fg_out &to,
                                                int64_t row, float *parts,
                                                const float (&sum)[N / 8][4])
{
    const int lane = threadIdx.x % 32, r = threadIdx.x / 32 % 4 * 16 + lane / 4;
    const int64_t all = k.z.B * k.z.T * k.z.G * N;
#pragma unroll
    for (int low = 0; low < 2; low++) {
        const int64_t token = o.b * k.z.T + o.t0 + r + 8 * low;
        if (r + 8 * low >= o.real) continue;
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
            const float2 v = make_float2(sum[n][2 * low], sum[n][2 * low + 1]);
            const int64_t at = o.g * N + 8 * n + 2 * (lane % 4);
            if (k.s.parts > 1)
                *(float2 *)(parts + o.part * all + token * k.z.G * N + at) = v;
            else if (to.narrow)
                *(uint32_t *)((bf16 *)to.p + token * row + at) = fg_pack2(v.x, v.y);
            else *(float2 *)((float *)to.p + token * row + at) = v;
        }
    }
}

/* ---- blocks --------------------------------------------------------------------------------- */

/* Everybody, before each head: nobody is at the one before.  The two warpgroups wait for its
 * tiles. */
template <int N>
static __device__ __forceinline__ void next_head(const spot &o, memory<N> *m, int h)
{
    const int i = h - o.h0;
    proxy_fence();                       /* what was changed of a tile was so before the next */
    barrier_sync<NEXT, WALKERS>();
    barrier_wait(fg_shared(&m->full[i % 2]), i / 2 % 2);
}

template <int N>
static __device__ __forceinline__ void pairs_walk(const chunks &k, const spot &o, memory<N> *m)
{
    const uint64_t b = matrix_at(fg_shared(m->b), 0), c = matrix_at(fg_shared(m->c), 0);
    const int warp = threadIdx.x / 32;
    float score[8][4] = {}, score_near[2][4];
    pair_sums q = {};
    pin(score);
    wgmma_begin();
#pragma unroll
    for (int n = 0; n < N / 16; n++) {
        const int at = n / 4 * PANEL_BYTES + n % 4 * 32;
        product(score, behind(b, at), behind(c, at), n);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(score);
    pick_near(warp, score, score_near);
#pragma unroll 1
    for (int h = o.h0; h < o.h1; h++) {
        next_head<N>(o, m, h);
        pairs_of_head<N>(k, o, m, h, score, score_near, &q);
    }
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) if (n / 2 == warp) q.far[n][e] = q.near[n % 2][e];
    barrier_sync<NEXT, WALKERS>();
    put_tile((bf16 *)m->part, 16 * warp, q.far);      /* where the parts of gu were */
    barrier_sync<LAST, 256>();
}

template <int N>
static __device__ __forceinline__ void states_walk(const chunks &k, const spot &o, memory<N> *m)
{
    float gb[N / 8][4] = {}, gc[N / 8][4] = {};
#pragma unroll 1
    for (int h = o.h0; h < o.h1; h++) {
        next_head<N>(o, m, h);
        states_of_head<N>(o, m, h, gb, gc);
    }
    barrier_sync<NEXT, WALKERS>();
    barrier_sync<LAST, 256>();
    add_pairs<N>(m, (const bf16 *)m->part, gb, gc);
    put_sums<N>(k, o, k.gb, k.gb_row, k.s.gb, gb);
    put_sums<N>(k, o, k.gc, k.gc_row, k.s.gc, gc);
}

/* One warp loads each next head, another settles each last one. */
template <int N>
static __device__ __forceinline__ void help(const chunks &k, const spot &o, const maps *maps,
                                            memory<N> *m)
{
    const int warp = threadIdx.x / 32 - 8;
    if (warp > 1) return;
#pragma unroll 1
    for (int h = o.h0; h <= o.h1; h++) {
        barrier_sync<NEXT, WALKERS>();
        if (warp == 1 && h > o.h0) settle_head<N>(k, o, m, h - 1);
        if (warp == 0 && h + 1 < o.h1 && threadIdx.x % 32 == 0) load_head<N>(k, maps, o, m, h + 1);
        __syncwarp();
    }
}

template <int N>
static __device__ __forceinline__ void open(const chunks &k, const maps *maps, const spot &o,
                                            memory<N> *m)
{
    const int other = o.chunk ^ 1, other_real = (int)k.z.T - other * CHUNK;
    const int64_t own_token = o.b * k.z.T + (o.real > 0 ? o.t0 : 0);
    const int64_t token = o.b * k.z.T + (other_real > 0 ? other * CHUNK : 0);
    if (threadIdx.x == 256) {
        barrier_init(fg_shared(&m->full[0]), 1);
        barrier_init(fg_shared(&m->full[1]), 1);
        fg_barriers_ready();
        load_head<N>(k, maps, o, m, o.h0);
    }
    panels_load<N>(m->b, k.b + own_token * k.b_row + o.g * N, k.b_row, o.real);
    panels_load<N>(m->c, k.c + own_token * k.c_row + o.g * N, k.c_row, o.real);
    const bf16 *from = o.late ? k.b + token * k.b_row : k.c + token * k.c_row;
    panels_load<N>(m->other, from + o.g * N, o.late ? k.b_row : k.c_row, other_real);
    fg_copy_commit();
    if (threadIdx.x < CHUNK)
        m->segment[threadIdx.x] = k.d.segment[o.b * k.d.padded + o.t0 + threadIdx.x];
    for (int i = threadIdx.x; i < o.h1 - o.h0; i += THREADS) {
        const int64_t h = o.h0 + i, row = (o.b * k.z.H + h) * k.d.chunks;
        m->n.whole[i] = k.d.whole[row + o.chunk];
        m->n.other_whole[i] = k.d.whole[row + other];
        m->n.skip[i] = k.skip ? k.skip[h] : 0.0f;
        m->n.rate[i] = k.d.rate[h];
    }
    fg_copy_wait<0>();
    proxy_fence();
    __syncthreads();
}
#endif

/* A block is a chunk and some heads of a group; both halves of a pair run at about the same
 * time. */
template <int N> static __global__ void __launch_bounds__(THREADS, 1)
run_chunks(const __grid_constant__ chunks k, const __grid_constant__ maps maps)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) char bytes[];
    memory<N> *m = (memory<N> *)bytes;
    const int parts = (int)k.s.parts, G = (int)k.z.G, chunks = (int)k.d.chunks, M = (int)k.z.H / G;
    const int half = blockIdx.x % 2, unit = blockIdx.x / 2;
    spot o;
    o.part = unit % parts, o.g = unit / parts % G;
    o.chunk = unit / parts / G % (chunks / 2) * 2 + half, o.b = unit / parts / G / (chunks / 2);
    o.t0 = o.chunk * CHUNK, o.real = (int)k.z.T - o.t0, o.late = half;
    o.h0 = o.g * M + M * o.part / parts, o.h1 = o.g * M + M * (o.part + 1) / parts;
    open<N>(k, &maps, o, m);
    if (threadIdx.x < 128) {
        registers_up<208>();
        pairs_walk<N>(k, o, m);
    } else if (threadIdx.x < 256) {
        registers_up<256>();
        states_walk<N>(k, o, m);
    } else {
        registers_down<40>();
        help<N>(k, o, &maps, m);
    }
#endif
}

template <int N> static void run(const chunks &k, cudaStream_t stream)
{
    const fg_encode encode = fg_encoder();
    const fg_ssd &z = k.z;
    const maps m = { fg_map_of(encode, k.x, z.B, z.T, z.H, 64, k.x_row, CHUNK),
                     fg_map_of(encode, k.gy, z.B, z.T, z.H, 64, k.gy_row, CHUNK) };
    const int bytes = (int)sizeof(memory<N>);
    cudaFuncSetAttribute(run_chunks<N>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    const unsigned blocks = (unsigned)(z.B * k.d.chunks * z.G * k.s.parts);
    run_chunks<N><<<blocks, THREADS, bytes, stream>>>(k, m);
}

void fg_ssd_scan_grad_sm90(const chunks &k, cudaStream_t stream)
{
    if (k.z.N == 128) run<128>(k, stream);
    else run<64>(k, stream);
}

bool fg_ssd_scan_grad_has_sm90()
{
    cudaFuncAttributes f;
    if (cudaFuncGetAttributes(&f, run_chunks<128>) != cudaSuccess) {
        cudaGetLastError();              /* no error of the caller's */
        return false;
    }
    return f.binaryVersion == 90 && f.ptxVersion == 90 && fg_encoder() && fg_states_have_sm90();
}
