/* ssd_scan_grad_sm90.cu - the chunks of ssd_scan_grad on Hopper's wgmma.
 *
 * A block has a chunk of 64 tokens and walks some heads; ssd_scan_grad.cu has the formulas.  S and R
 * come for two chunks, the pair: S enters its first half, R belongs to what leaves its second.  The
 * other half's own is made here, from the other half's rows:
 *
 *     first half    R <- whole R + sum_i gy_i keep_i c_i^T        i, j: tokens of the other half
 *     second half   S <- whole S + sum_j x_j push_j b_j^T
 *
 * One warpgroup has the pairs, with tokens j as rows and i as columns, so that W^T is an operand in
 * registers:
 *     E^T = x gy^T,   q += E^T L^T dt,   gu = W^T gy + part,   W_ij = (c_i.b_j) L_ij
 * and the other has the states:
 *     part = left b R^T,   gb += push x R,   gc += keep gy S
 * Sums over heads, q, gb and gc, stay in registers.  The next head's tiles are on their way while
 * one is worked on.  Tiles lie in shared memory as wgmma.cuh says. */
#include "ssd_scan_grad.cuh"
#include "wgmma.cuh"

#define THREADS 256
#define BLOCKS  132                              /* at least, where there are as many heads */
#define PANEL   (64 * 64)                        /* elements */
#define PANEL_BYTES (PANEL * 2)

template <int N> struct head {
    alignas(1024) bf16 x[PANEL];
    bf16 gy[PANEL], other[PANEL];                /* other: the other half's gy, or x */
    bf16 state[N / 64 * PANEL], pull[N / 64 * PANEL];
};
struct vectors {
    alignas(16) float2 sum[CHUNK];
    float dt[CHUNK], tail[CHUNK], keep[CHUNK], left[CHUNK];
    float weight[CHUNK];                         /* keep, or push, of the other half */
    float whole, other_whole, skip, rate;
};
template <int N> struct memory {
    head<N> heads[2];
    bf16 b[N / 64 * PANEL], c[N / 64 * PANEL];
    bf16 other[N / 64 * PANEL];                  /* the other half's c, or b */
    float4 part[8 * 128];
    vectors v[3];
    totals t[2];
    int32_t segment[CHUNK];
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* a 64 x 64 part over 16 of both */
static __device__ __forceinline__ void product(float (&d)[8][4], uint64_t a, uint64_t b, int add)
{
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" N32 "}, %32, %33, p, "
                 "1, 1, 0, 0;\n}"
                 : F32(d, 0) : "l"(a), "l"(b), "r"(add));
}

template <int ID, int COUNT> static __device__ __forceinline__ void barrier_sync()
{
    asm volatile("bar.sync %0, %1;" :: "n"(ID), "n"(COUNT) : "memory");
}
template <int ID, int COUNT> static __device__ __forceinline__ void barrier_pass()
{
    asm volatile("bar.arrive %0, %1;" :: "n"(ID), "n"(COUNT) : "memory");
}
enum { STATES_ONLY = 1, PART_READY };

static __device__ __forceinline__ void copy4(const void *to, const void *from)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(fg_shared(to)), "l"(from)
                 : "memory");
}

/* A block's place. */
struct spot { int b, g, chunk, t0, real, part, h0, h1; bool late; };

/* 64 rows of N columns in panels. */
template <int N>
static __device__ __forceinline__ void panels_load(bf16 *to, const bf16 *from, int64_t row,
                                                   int real)
{
#pragma unroll
    for (int n = 0; n < N / 64; n++)
        fg_tile_load<64, 64, THREADS>(to + n * PANEL, from + 64 * n, row, real);
}

template <int N>
static __device__ __forceinline__ void load_head(const chunks &k, const spot &o, memory<N> *m,
                                                 int h)
{
    head<N> *to = &m->heads[(h - o.h0) % 2];
    vectors *v = &m->v[(h - o.h0) % 3];
    const int other = o.chunk ^ 1, other_real = (int)k.z.T - other * CHUNK;
    const int64_t row = (int64_t)o.b * k.z.H + h, at = row * k.d.padded + o.t0;
    const int64_t own_token = o.b * k.z.T + (o.real > 0 ? o.t0 : 0);
    const int64_t token = o.b * k.z.T + (other_real > 0 ? other * CHUNK : 0);
    const int64_t state = (row * (k.d.chunks / 2) + o.chunk / 2) * 64 * N;
    fg_tile_load<64, 64, THREADS>(to->x, k.x + own_token * k.x_row + h * 64, k.x_row, o.real);
    fg_tile_load<64, 64, THREADS>(to->gy, k.gy + own_token * k.gy_row + h * 64, k.gy_row, o.real);
    const bf16 *from = o.late ? k.x + token * k.x_row : k.gy + token * k.gy_row;
    fg_tile_load<64, 64, THREADS>(to->other, from + h * 64, o.late ? k.x_row : k.gy_row,
                                  other_real);
    panels_load<N>(to->state, k.states + state, N, 64);
    panels_load<N>(to->pull, k.pulls + state, N, 64);
    const int i = threadIdx.x % 16 * 4;
    const float *weight = (o.late ? k.d.push : k.d.keep) + row * k.d.padded + other * CHUNK;
    switch (threadIdx.x / 16) {
    case 0: fg_copy_async(fg_shared(&v->sum[i]), k.d.sum + at + i, true); break;
    case 1: fg_copy_async(fg_shared(&v->sum[i + 2]), k.d.sum + at + i + 2, true); break;
    case 2: fg_copy_async(fg_shared(&v->dt[i]), k.d.dt + at + i, true); break;
    case 3: fg_copy_async(fg_shared(&v->tail[i]), k.d.tail + at + i, true); break;
    case 4: fg_copy_async(fg_shared(&v->keep[i]), k.d.keep + at + i, true); break;
    case 5: fg_copy_async(fg_shared(&v->left[i]), k.d.left + at + i, true); break;
    case 6: fg_copy_async(fg_shared(&v->weight[i]), weight + i, true); break;
    case 8: if (i == 0) copy4(&v->whole, k.d.whole + row * k.d.chunks + o.chunk); break;
    case 10: if (i == 0) copy4(&v->other_whole, k.d.whole + row * k.d.chunks + other); break;
    case 12: if (i == 0) copy4(&v->rate, k.rate + h); break;
    case 14: if (i == 0 && k.skip) copy4(&v->skip, k.skip + h);
             else if (i == 0) v->skip = 0;
    }
}

static __device__ __forceinline__ float quad_sum(float x)
{
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
/* A thread's rows r and r + 8, summed over the four threads that share them. */
static __device__ __forceinline__ void put_rows(float *to, int r, const float *x)
{
    const float low = quad_sum(x[0]), high = quad_sum(x[1]);
    if (threadIdx.x % 4 == 0) to[r] = low, to[r + 8] = high;
}
/* x[2n + e], the columns 8n + 2(lane % 4) + e of a warp's rows, summed over the rows. */
static __device__ __forceinline__ void put_columns(float *to, float *x)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 8; half >= 2; half /= 2) {
        const bool up = lane & 2 * half;
#pragma unroll
        for (int k = 0; k < half; k++) {
            const float away = up ? x[k] : x[k + half], own = up ? x[k + half] : x[k];
            x[k] = own + __shfl_xor_sync(~0u, away, 2 * half);
        }
    }
    const int n = (lane & 16) / 4 + (lane & 8) / 4 + (lane & 4) / 4;
    *(float2 *)&to[8 * n + 2 * (lane % 4)] = make_float2(x[0], x[1]);
}

/* Fragments of 64 columns of a warp's 16 rows. */
static __device__ __forceinline__ void rows_of_tile(uint32_t (*a)[4], const bf16 *m, int r)
{
#pragma unroll
    for (int k = 0; k < 4; k++) fg_a<64>(a[k], fg_shared(m), r, 16 * k);
}

/* ---- pairs ---------------------------------------------------------------------------------- */

struct weighed { float row[16], column[2]; };

/* One tile of 8 columns: d becomes the decays of rows r, r + 8 and columns i, i + 1. */
static __device__ __forceinline__ void decays_of(const vectors &v, const int32_t *segment,
                                                 bool near, int r, int i, const float *tail,
                                                 const int *seg, float2 last, int last_seg,
                                                 float (*d)[2])
{
    const float4 s = *(const float4 *)(v.sum + i);
    const int2 segs = *(const int2 *)(segment + i);
    const float2 s0 = make_float2(s.x, s.y), s1 = make_float2(s.z, s.w);
    if (!near) {
        const float u = segs.x == last_seg ? fg_exp2(fg_two_diff(s0, last)) : 0.0f;
        const float w = segs.y == last_seg ? fg_exp2(fg_two_diff(s1, last)) : 0.0f;
#pragma unroll
        for (int low = 0; low < 2; low++) d[low][0] = tail[low] * u, d[low][1] = tail[low] * w;
        return;
    }
#pragma unroll
    for (int low = 0; low < 2; low++) {
        const int j = r + 8 * low;
        const float2 own = v.sum[j];
        const float u = fg_exp2(fg_two_diff(s0, own)), w = fg_exp2(fg_two_diff(s1, own));
        d[low][0] = j <= i && segs.x == seg[low] ? u : 0.0f;
        d[low][1] = j <= i + 1 && segs.y == seg[low] ? w : 0.0f;
    }
}

/* q and the sums of z; W^T in fragments; the diagonal of E. */
static __device__ __forceinline__ void weigh(const vectors &v, const int32_t *segment,
                                             const float (*e)[4], const float (*score)[4],
                                             float (*q)[4], uint32_t (*w)[4], weighed *z,
                                             float *diagonal)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = 16 * warp + lane / 4;
    const int c = 2 * (lane % 4);
    const float dt[2] = { v.dt[r], v.dt[r + 8] }, tail[2] = { v.tail[r], v.tail[r + 8] };
    const int seg[2] = { segment[r], segment[r + 8] }, last_seg = segment[16 * warp + 15];
    const float2 last = v.sum[16 * warp + 15];
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const int i = 8 * n + c;
        z->row[2 * n] = z->row[2 * n + 1] = 0;
        w[n / 2][n % 2 * 2] = w[n / 2][n % 2 * 2 + 1] = 0;
        if (n / 2 < warp) continue;
        float d[2][2];
        const bool near = n / 2 == warp;
        decays_of(v, segment, near, r, i, tail, seg, last, last_seg, d);
#pragma unroll
        for (int low = 0; low < 2; low++) {
            float out[2];
#pragma unroll
            for (int u = 0; u < 2; u++) {
                const float s = score[n][2 * low + u], mine = e[n][2 * low + u];
                const float weight = mine * d[low][u] * dt[low];
                out[u] = s * d[low][u];
                q[n][2 * low + u] += weight;
                float cross = s * weight;
                if (near && r + 8 * low >= i + u) cross = 0;
                if (near && r + 8 * low == i + u) diagonal[i + u] = mine;
                z->row[2 * n + u] += cross;
                z->column[low] += cross;
            }
            w[n / 2][n % 2 * 2 + low] = fg_pack2(out[0], out[1]);
        }
    }
}

/* gx and what gu says of x. */
static __device__ __forceinline__ void put_gx(const chunks &k, const spot &o, const vectors &v,
                                              const bf16 *x, const bf16 *gy,
                                              const int32_t *segment, int h,
                                              const float (*gu)[4], float *on_x)
{
    const int lane = threadIdx.x % 32, r = threadIdx.x / 32 * 16 + lane / 4, c = 2 * (lane % 4);
#pragma unroll
    for (int low = 0; low < 2; low++) {
        const int j = r + 8 * low;
        const float dt = v.dt[j], skip = v.skip;
        const bool pad = segment[j] < 0;
        bf16 *to = k.gx + (o.b * k.z.T + o.t0 + j) * k.gx_row + h * 64 + 8 * (lane % 4);
#pragma unroll
        for (int n = 0; n < 8; n += 4) {
            uint32_t out[4];
#pragma unroll
            for (int p = 0; p < 4; p++) {
                const float2 a = fg_pair<64>(x, j, 8 * (n + p) + c);
                const float2 y = fg_pair<64>(gy, j, 8 * (n + p) + c);
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

template <int N>
static __device__ __forceinline__ void pairs_of_head(const chunks &k, const spot &o, memory<N> *m,
                                                     int h, const float (&score)[8][4],
                                                     float (&q)[8][4])
{
    const head<N> *tile = &m->heads[(h - o.h0) % 2];
    const vectors &v = m->v[(h - o.h0) % 3];
    totals *t = &m->t[(h - o.h0) % 2];
    const int warp = threadIdx.x / 32, r = 16 * warp + threadIdx.x % 32 / 4;
    const uint32_t x = fg_shared(tile->x), gy = fg_shared(tile->gy);
    float e[8][4] = {}, on_x[2] = { 0 };
    uint32_t w[4][4];
    weighed z = {};
    pin(e);
    wgmma_begin();
#pragma unroll
    for (int p = 0; p < 4; p++) product(e, matrix_at(x + 32 * p, 0), matrix_at(gy + 32 * p, 0), p);
    wgmma_commit();
    wgmma_wait<0>();
    pin(e);
    weigh(v, m->segment, e, score, q, w, &z, t->gy[0]);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int u = 0; u < 4; u++) e[n][u] = 0;
    pin(e);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < 4; i++) product(e, w[i], matrix_at(gy + 2048 * i, 0));
    wgmma_commit();
    put_rows(t->column[0], r, z.column);
    put_columns(t->row[warp], z.row);
    wgmma_wait<0>();
    pin(e), pin(w);
    barrier_sync<PART_READY, THREADS>();
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const float4 u = m->part[n * 128 + threadIdx.x];
        e[n][0] += u.x, e[n][1] += u.y, e[n][2] += u.z, e[n][3] += u.w;
    }
    put_gx(k, o, v, tile->x, tile->gy, m->segment, h, e, on_x);
    put_rows(t->gu[0], r, on_x);
}

/* ---- states --------------------------------------------------------------------------------- */

/* The half's own S or R, in place of the pair's; and <R,S>. */
template <int N>
static __device__ __forceinline__ void other_half(const spot &o, memory<N> *m, head<N> *tile,
                                                  const vectors &v, totals *t)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, c = 2 * (lane % 4);
    const int r = 16 * warp + lane / 4;
    bf16 *mine = o.late ? tile->state : tile->pull, *its = o.late ? tile->pull : tile->state;
    uint32_t a[4][4];
    float both = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        fg_a_trans<64>(a[j], fg_shared(tile->other), 16 * warp, 16 * j);
        const float2 w0 = *(const float2 *)&v.weight[16 * j + c];
        const float2 w1 = *(const float2 *)&v.weight[16 * j + 8 + c];
        a[j][0] = fg_scale2(a[j][0], w0.x, w0.y);
        a[j][1] = fg_scale2(a[j][1], w0.x, w0.y);
        a[j][2] = fg_scale2(a[j][2], w1.x, w1.y);
        a[j][3] = fg_scale2(a[j][3], w1.x, w1.y);
    }
#pragma unroll
    for (int panel = 0; panel < N / 64; panel++) {
        float sum[8][4];
        const uint32_t y = fg_shared(m->other + panel * PANEL);
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int low = 0; low < 2; low++) {
                const float2 s = fg_pair<64>(mine + panel * PANEL, r + 8 * low, 8 * n + c);
                sum[n][2 * low] = v.other_whole * s.x;
                sum[n][2 * low + 1] = v.other_whole * s.y;
            }
        pin(sum);
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) product(sum, a[j], matrix_at(y + 2048 * j, 0));
        wgmma_commit();
        wgmma_wait<0>();
        pin(sum);
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int low = 0; low < 2; low++) {
                const float2 s = fg_pair<64>(its + panel * PANEL, r + 8 * low, 8 * n + c);
                both = fmaf(sum[n][2 * low], s.x, fmaf(sum[n][2 * low + 1], s.y, both));
                *(uint32_t *)((char *)(mine + panel * PANEL) + fg_swizzle<64>(r + 8 * low, n)
                              + 2 * c) = fg_pack2(sum[n][2 * low], sum[n][2 * low + 1]);
            }
    }
    both = fg_warp_sum(both);
    if (lane == 0) t->both[warp] = both;
}

/* The part of gu that comes through the state; it is in `sum` when the first group is done. */
template <int N>
static __device__ __forceinline__ void put_part(memory<N> *m, const head<N> *tile,
                                                const vectors &v, float (&sum)[8][4], totals *t)
{
    const int lane = threadIdx.x % 32, own = threadIdx.x % 128, c = 2 * (lane % 4);
    const int r = own / 32 * 16 + lane / 4;
    const float left[2] = { v.left[r], v.left[r + 8] };
    float w[2] = { 0 };
#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
        for (int low = 0; low < 2; low++) {
            const float2 x = fg_pair<64>(tile->x, r + 8 * low, 8 * n + c);
            sum[n][2 * low] *= left[low];
            sum[n][2 * low + 1] *= left[low];
            w[low] = fmaf(sum[n][2 * low], x.x, fmaf(sum[n][2 * low + 1], x.y, w[low]));
        }
        m->part[n * 128 + own] = make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
    }
    barrier_pass<PART_READY, THREADS>();
    put_rows(t->w[0], r, w);
}

template <int N>
static __device__ __forceinline__ void states_of_head(const spot &o, memory<N> *m, int h,
                                                      float (&gb)[N / 8][4], float (&gc)[N / 8][4])
{
    head<N> *tile = &m->heads[(h - o.h0) % 2];
    const vectors &v = m->v[(h - o.h0) % 3];
    totals *t = &m->t[(h - o.h0) % 2];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, c = 2 * (lane % 4);
    const int r = 16 * warp + lane / 4;
    const uint32_t b = fg_shared(m->b), pull = fg_shared(tile->pull);
    const uint32_t state = fg_shared(tile->state);
    const float push[2] = { v.left[r] * v.dt[r], v.left[r + 8] * v.dt[r + 8] };
    const float keep[2] = { v.keep[r], v.keep[r + 8] };
    float sum[8][4] = {}, on_c[2] = { 0 };
    uint32_t a[4][4];
    other_half<N>(o, m, tile, v, t);
    proxy_fence();
    barrier_sync<STATES_ONLY, 128>();
    rows_of_tile(a, tile->x, 16 * warp);
#pragma unroll
    for (int p = 0; p < 4; p++)
#pragma unroll
        for (int e = 0; e < 4; e++) a[p][e] = fg_scale2(a[p][e], push[e % 2], push[e % 2]);
    pin(sum), pin(gb), pin(a);
    wgmma_begin();
#pragma unroll
    for (int n = 0; n < N / 16; n++) {
        const uint32_t at = n / 4 * PANEL_BYTES + n % 4 * 32;
        product(sum, matrix_at(b + at, 0), matrix_at(pull + at, 0), n);
    }
    wgmma_commit();
#pragma unroll
    for (int p = 0; p < 4; p++) product(gb, a[p], matrix_at(pull + 2048 * p, PANEL_BYTES));
    wgmma_commit();
    wgmma_wait<1>();
    pin(sum);
    put_part<N>(m, tile, v, sum, t);
    wgmma_wait<0>();
    pin(gb), pin(a);
    rows_of_tile(a, tile->gy, 16 * warp);
#pragma unroll
    for (int panel = 0; panel < N / 64; panel++) {
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) sum[n][e] = 0;
        pin(sum), pin(a);
        wgmma_begin();
#pragma unroll
        for (int p = 0; p < 4; p++)
            product(sum, a[p], matrix_at(state + panel * PANEL_BYTES + 2048 * p, 0));
        wgmma_commit();
        wgmma_wait<0>();
        pin(sum);
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int low = 0; low < 2; low++) {
                const float2 y = fg_pair<64>(m->c + panel * PANEL, r + 8 * low, 8 * n + c);
                const float v0 = keep[low] * sum[n][2 * low];
                const float v1 = keep[low] * sum[n][2 * low + 1];
                on_c[low] = fmaf(v0, y.x, fmaf(v1, y.y, on_c[low]));
                gc[8 * panel + n][2 * low] += v0;
                gc[8 * panel + n][2 * low + 1] += v1;
            }
    }
    put_rows(t->u[0], r, on_c);
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

/* q to shared memory, where the parts of gu were. */
static __device__ __forceinline__ void put_q(bf16 *to, const float (*q)[4])
{
    const int lane = threadIdx.x % 32, r = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int low = 0; low < 2; low++)
            *(uint32_t *)((char *)to + fg_swizzle<64>(r + 8 * low, n) + 4 * (lane % 4))
                = fg_pack2(q[n][2 * low], q[n][2 * low + 1]);
}

/* Both warpgroups, before each head: its tiles are there, the next one's on their way. */
template <int N>
static __device__ __forceinline__ void next_head(const chunks &k, const spot &o, memory<N> *m,
                                                 int h)
{
    fg_copy_wait<0>();
    proxy_fence();
    __syncthreads();
    if (h + 1 < o.h1) load_head<N>(k, o, m, h + 1);
    fg_copy_commit();
}

template <int N>
static __device__ __forceinline__ void settle_head(const chunks &k, const spot &o, memory<N> *m,
                                                   int h)
{
    const vectors &v = m->v[(h - o.h0) % 3];
    const int64_t at = ((int64_t)o.b * k.d.chunks + o.chunk) * k.z.H + h;
    settle(m->t[(h - o.h0) % 2], v.dt, m->segment, v.rate, v.whole, o.real,
           k.gdt + (o.b * k.z.T + o.t0) * k.z.H + h, k.z.H, k.s.ga + at, k.s.gd + at);
}

template <int N>
static __device__ __forceinline__ void pairs_walk(const chunks &k, const spot &o, memory<N> *m)
{
    const uint32_t b = fg_shared(m->b), c = fg_shared(m->c);
    float score[8][4] = {}, q[8][4] = {};
    for (int h = o.h0; h < o.h1; h++) {
        next_head<N>(k, o, m, h);
        if (h == o.h0) {
            pin(score);
            wgmma_begin();
#pragma unroll
            for (int n = 0; n < N / 16; n++) {
                const uint32_t at = n / 4 * PANEL_BYTES + n % 4 * 32;
                product(score, matrix_at(b + at, 0), matrix_at(c + at, 0), n);
            }
            wgmma_commit();
            wgmma_wait<0>();
            pin(score);
        } else if (threadIdx.x / 32 == 3) {
            settle_head<N>(k, o, m, h - 1);
        }
        __syncwarp();
        pairs_of_head<N>(k, o, m, h, score, q);
    }
    __syncthreads();
    if (threadIdx.x / 32 == 3) settle_head<N>(k, o, m, o.h1 - 1);
    put_q((bf16 *)m->part, q);
    __syncthreads();
}

template <int N>
static __device__ __forceinline__ void states_walk(const chunks &k, const spot &o, memory<N> *m)
{
    float gb[N / 8][4] = {}, gc[N / 8][4] = {};
    for (int h = o.h0; h < o.h1; h++) {
        next_head<N>(k, o, m, h);
        states_of_head<N>(o, m, h, gb, gc);
    }
    __syncthreads();
    __syncthreads();
    add_pairs<N>(m, (const bf16 *)m->part, gb, gc);
    put_sums<N>(k, o, k.gb, k.gb_row, k.s.gb, gb);
    put_sums<N>(k, o, k.gc, k.gc_row, k.s.gc, gc);
}

template <int N>
static __device__ __forceinline__ void open(const chunks &k, const spot &o, memory<N> *m)
{
    const int other = o.chunk ^ 1, other_real = (int)k.z.T - other * CHUNK;
    const int64_t own_token = o.b * k.z.T + (o.real > 0 ? o.t0 : 0);
    const int64_t token = o.b * k.z.T + (other_real > 0 ? other * CHUNK : 0);
    float *t = (float *)m->t;
    panels_load<N>(m->b, k.b + own_token * k.b_row + o.g * N, k.b_row, o.real);
    panels_load<N>(m->c, k.c + own_token * k.c_row + o.g * N, k.c_row, o.real);
    const bf16 *from = o.late ? k.b + token * k.b_row : k.c + token * k.c_row;
    panels_load<N>(m->other, from + o.g * N, o.late ? k.b_row : k.c_row, other_real);
    for (int i = threadIdx.x; i < (int)(sizeof m->t / 4); i += THREADS) t[i] = 0;
    if (threadIdx.x < CHUNK)
        m->segment[threadIdx.x] = k.d.segment[o.b * k.d.padded + o.t0 + threadIdx.x];
    load_head<N>(k, o, m, o.h0);
    fg_copy_commit();
}
#endif

/* A block is a chunk and some heads of a group; both halves of a pair run at about the same time. */
template <int N> static __global__ void __launch_bounds__(THREADS, 1) run_chunks(chunks k)
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
    open<N>(k, o, m);
    if (threadIdx.x < 128) pairs_walk<N>(k, o, m);
    else states_walk<N>(k, o, m);
#endif
}

template <int N> static void run(const chunks &k, cudaStream_t stream)
{
    const int bytes = (int)sizeof(memory<N>);
    cudaFuncSetAttribute(run_chunks<N>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    const unsigned blocks = (unsigned)(k.z.B * k.d.chunks * k.z.G * k.s.parts);
    run_chunks<N><<<blocks, THREADS, bytes, stream>>>(k);
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
    return f.binaryVersion == 90 && f.ptxVersion == 90;
}
