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
 * Sums over heads, q, gb and gc, stay in registers.  The next head's tiles are on their way while
 * one is worked on: rows by all threads, states, which lie in memory as they are needed here, by the
 * copy engine.  Tiles lie in shared memory as wgmma.cuh says. */
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
/* Sums of one head over the chunk; see `totals`. */
struct sums_of_head {
    alignas(16) float row[4][CHUNK];             /* of each warp */
    float column[CHUNK], u[CHUNK], w[CHUNK], gu[CHUNK], gy[CHUNK], both[4];
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
    sums_of_head t[2];
    alignas(16) int32_t segment[CHUNK];
    alignas(8) uint64_t full[2];                 /* barriers: the states of heads[i] are there */
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

static __device__ __forceinline__ void bulk_load(const void *to, const void *from, int bytes,
                                                 uint32_t bar)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];"
                 :: "r"(fg_shared(to)), "l"(from), "r"(bytes), "r"(bar) : "memory");
}

/* A thread's share of what heads need; pointers are those of the head that is loaded next. */
struct loader {
    const bf16 *x, *gy, *other;                  /* rows r and r + 32 */
    int64_t x_next, gy_next, other_next;         /* elements between the two */
    const bf16 *state, *pull;
    int64_t state_step;
    const char *vector;
    int64_t vector_step;                         /* bytes */
    uint32_t to, vector_to;                      /* offsets */
    int vector_bytes;
    bool real[2], other_real[2];
};

/* Which vector a thread copies: 16 bytes, or 4, of one. */
static __device__ __forceinline__ void set_vector(const chunks &k, const spot &o, loader *l)
{
    const int i = threadIdx.x % 16 * 4, other = o.chunk ^ 1;
    const int64_t row = (int64_t)o.b * k.z.H + o.h0, at = row * k.d.padded + o.t0;
    const int64_t there = row * k.d.padded + other * CHUNK;
    const vectors *none = nullptr;
    const auto set = [&](const void *from, int64_t step, const void *to, int bytes) {
        l->vector = (const char *)from, l->vector_step = step;
        l->vector_to = (uint32_t)(uintptr_t)to, l->vector_bytes = bytes;
    };
    set(nullptr, 0, none, 0);
    const int64_t step = k.d.padded * 4, chunk_step = k.d.chunks * 4;
    switch (threadIdx.x / 16) {
    case 0: set(k.d.sum + at + i, 2 * step, &none->sum[i], 16); break;
    case 1: set(k.d.sum + at + i + 2, 2 * step, &none->sum[i + 2], 16); break;
    case 2: set(k.d.dt + at + i, step, &none->dt[i], 16); break;
    case 3: set(k.d.tail + at + i, step, &none->tail[i], 16); break;
    case 4: set(k.d.keep + at + i, step, &none->keep[i], 16); break;
    case 5: set(k.d.left + at + i, step, &none->left[i], 16); break;
    case 6: set((o.late ? k.d.push : k.d.keep) + there + i, step, &none->weight[i], 16); break;
    case 7: if (i == 0) set(k.d.whole + row * k.d.chunks + o.chunk, chunk_step, &none->whole, 4);
            break;
    case 8: if (i == 0) set(k.d.whole + row * k.d.chunks + other, chunk_step, &none->other_whole, 4);
            break;
    case 9: if (i == 0) set(k.rate + o.h0, 4, &none->rate, 4); break;
    case 10: if (i == 0 && k.skip) set(k.skip + o.h0, 4, &none->skip, 4); break;
    }
}

template <int N>
static __device__ __forceinline__ loader loader_of(const chunks &k, const spot &o)
{
    const int r = threadIdx.x / 8, c = threadIdx.x % 8, other = o.chunk ^ 1;
    const int other_real = (int)k.z.T - other * CHUNK;
    const int64_t own = o.b * k.z.T + (r < o.real ? o.t0 + r : 0);
    const int64_t token = o.b * k.z.T + (r < other_real ? other * CHUNK + r : 0);
    const int64_t row = (int64_t)o.b * k.z.H + o.h0, each = 64 * N;
    const int64_t state = (row * (k.d.chunks / 2) + o.chunk / 2) * each;
    loader l;
    l.x = k.x + own * k.x_row + o.h0 * 64 + 8 * c, l.x_next = 32 * k.x_row;
    l.gy = k.gy + own * k.gy_row + o.h0 * 64 + 8 * c, l.gy_next = 32 * k.gy_row;
    l.other = (o.late ? k.x + token * k.x_row : k.gy + token * k.gy_row) + o.h0 * 64 + 8 * c;
    l.other_next = o.late ? l.x_next : l.gy_next;
    l.state = k.states + state, l.pull = k.pulls + state;
    l.state_step = k.d.chunks / 2 * each;
    l.to = fg_swizzle<64>(r, c);
    l.real[0] = r < o.real, l.real[1] = r + 32 < o.real;
    l.other_real[0] = r < other_real, l.other_real[1] = r + 32 < other_real;
    set_vector(k, o, &l);
    return l;
}

/* Tile i: the states by one thread. */
template <int N>
static __device__ __forceinline__ void load_head(loader &l, memory<N> *m, int i)
{
    head<N> *to = &m->heads[i % 2];
    const uint32_t x = fg_shared(to->x) + l.to, v = fg_shared(&m->v[i % 3]) + l.vector_to;
    const uint32_t bar = fg_shared(&m->full[i % 2]);
    if (threadIdx.x == 96) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                     :: "r"(bar), "r"(2 * N * 128) : "memory");
        bulk_load(to->state, l.state, N * 128, bar);
        bulk_load(to->pull, l.pull, N * 128, bar);
    }
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const uint32_t at = x + 4096 * k;
        fg_copy_async(at, l.real[k] ? l.x + k * l.x_next : l.x, l.real[k]);
        fg_copy_async(at + PANEL_BYTES, l.real[k] ? l.gy + k * l.gy_next : l.gy, l.real[k]);
        fg_copy_async(at + 2 * PANEL_BYTES, l.other_real[k] ? l.other + k * l.other_next : l.other,
                      l.other_real[k]);
    }
    if (l.vector_bytes == 16) fg_copy_async(v, l.vector, true);
    else if (l.vector_bytes == 4)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(v), "l"(l.vector)
                     : "memory");
    l.x += 64, l.gy += 64, l.other += 64;
    l.state += l.state_step, l.pull += l.state_step;
    l.vector += l.vector_step;
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

/* gdt, ga and gd of a head by one warp; a lane has two tokens.  gl in one running sum. */
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
    const float gl = before(x + y) + fg_warp_sum(u.x + u.y) + v.whole * both, next = gl + x;
    const int2 segment = *(const int2 *)(m->segment + t);
    const bool one = t < o.real && segment.x >= 0, other = t + 1 < o.real && segment.y >= 0;
    float *to = k.gdt + (o.b * k.z.T + o.t0 + t) * k.z.H + h;
    if (t < o.real) to[0] = one ? fmaf(v.rate, gl, gu.x) : 0.0f;
    if (t + 1 < o.real) to[k.z.H] = other ? fmaf(v.rate, next, gu.y) : 0.0f;
    const float a = fg_warp_sum((one ? dt.x * gl : 0) + (other ? dt.y * next : 0));
    const float d = fg_warp_sum((one ? gy.x : 0) + (other ? gy.y : 0));
    const int64_t at = ((int64_t)o.b * k.d.chunks + o.chunk) * k.z.H + h;
    if (t == 0) k.s.ga[at] = a, k.s.gd[at] = d;
}

template <int N>
static __device__ __forceinline__ void pairs_of_head(const chunks &k, const spot &o, memory<N> *m,
                                                     int h, const float (&score)[8][4],
                                                     float (&q)[8][4])
{
    const head<N> *tile = &m->heads[(h - o.h0) % 2];
    const vectors &v = m->v[(h - o.h0) % 3];
    sums_of_head *t = &m->t[(h - o.h0) % 2];
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
    weigh(v, m->segment, e, score, q, w, &z, t->gy);
    if (warp == 3 && h > o.h0) settle_head<N>(k, o, m, h - 1);   /* it has least to weigh */
    __syncwarp();
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int u = 0; u < 4; u++) e[n][u] = 0;
    pin(e);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < 4; i++) product(e, w[i], matrix_at(gy + 2048 * i, 0));
    wgmma_commit();
    put_rows(t->column, r, z.column);
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
    put_rows(t->gu, r, on_x);
}

/* ---- states --------------------------------------------------------------------------------- */

/* The half's own S or R, in place of the pair's; and <R,S>. */
template <int N>
static __device__ __forceinline__ void other_half(const spot &o, memory<N> *m, head<N> *tile,
                                                  const vectors &v, sums_of_head *t)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, c = 2 * (lane % 4);
    const int r = 16 * warp + lane / 4;
    bf16 *mine = o.late ? tile->state : tile->pull, *its = o.late ? tile->pull : tile->state;
    uint32_t a[4][4];
    float both = 0;
    fg_weigh_rows<64>(a, tile->other, v.weight, 16 * warp);
#pragma unroll 1
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
                                                const vectors &v, float (&sum)[8][4],
                                                sums_of_head *t)
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
    put_rows(t->w, r, w);
}

template <int N>
static __device__ __forceinline__ void states_of_head(const spot &o, memory<N> *m, int h,
                                                      float (&gb)[N / 8][4], float (&gc)[N / 8][4])
{
    head<N> *tile = &m->heads[(h - o.h0) % 2];
    const vectors &v = m->v[(h - o.h0) % 3];
    sums_of_head *t = &m->t[(h - o.h0) % 2];
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
static __device__ __forceinline__ void next_head(const spot &o, memory<N> *m, loader &l, int h)
{
    const int i = h - o.h0;
    fg_copy_wait<0>();
    proxy_fence();
    __syncthreads();
    if (h + 1 < o.h1) load_head<N>(l, m, i + 1);
    fg_copy_commit();
    barrier_wait(fg_shared(&m->full[i % 2]), i / 2 % 2);
}

template <int N>
static __device__ __forceinline__ void pairs_walk(const chunks &k, const spot &o, memory<N> *m,
                                                  loader &l)
{
    const uint32_t b = fg_shared(m->b), c = fg_shared(m->c);
    float score[8][4] = {}, q[8][4] = {};
    fg_copy_wait<0>();
    proxy_fence();
    __syncthreads();
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
    for (int h = o.h0; h < o.h1; h++) {
        next_head<N>(o, m, l, h);
        pairs_of_head<N>(k, o, m, h, score, q);
    }
    __syncthreads();
    if (threadIdx.x / 32 == 3) settle_head<N>(k, o, m, o.h1 - 1);
    put_q((bf16 *)m->part, q);
    __syncthreads();
}

template <int N>
static __device__ __forceinline__ void states_walk(const chunks &k, const spot &o, memory<N> *m,
                                                   loader &l)
{
    float gb[N / 8][4] = {}, gc[N / 8][4] = {};
    fg_copy_wait<0>();
    proxy_fence();
    __syncthreads();
    for (int h = o.h0; h < o.h1; h++) {
        next_head<N>(o, m, l, h);
        states_of_head<N>(o, m, h, gb, gc);
    }
    __syncthreads();
    __syncthreads();
    add_pairs<N>(m, (const bf16 *)m->part, gb, gc);
    put_sums<N>(k, o, k.gb, k.gb_row, k.s.gb, gb);
    put_sums<N>(k, o, k.gc, k.gc_row, k.s.gc, gc);
}

template <int N>
static __device__ __forceinline__ loader open(const chunks &k, const spot &o, memory<N> *m)
{
    const int other = o.chunk ^ 1, other_real = (int)k.z.T - other * CHUNK;
    const int64_t own_token = o.b * k.z.T + (o.real > 0 ? o.t0 : 0);
    const int64_t token = o.b * k.z.T + (other_real > 0 ? other * CHUNK : 0);
    if (threadIdx.x < 2) barrier_init(fg_shared(&m->full[threadIdx.x]), 1);
    if (threadIdx.x < 3 && !k.skip) m->v[threadIdx.x].skip = 0;
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
    panels_load<N>(m->b, k.b + own_token * k.b_row + o.g * N, k.b_row, o.real);
    panels_load<N>(m->c, k.c + own_token * k.c_row + o.g * N, k.c_row, o.real);
    const bf16 *from = o.late ? k.b + token * k.b_row : k.c + token * k.c_row;
    panels_load<N>(m->other, from + o.g * N, o.late ? k.b_row : k.c_row, other_real);
    if (threadIdx.x < CHUNK)
        m->segment[threadIdx.x] = k.d.segment[o.b * k.d.padded + o.t0 + threadIdx.x];
    loader l = loader_of<N>(k, o);
    load_head<N>(l, m, 0);
    fg_copy_commit();
    return l;
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
    loader l = open<N>(k, o, m);
    if (threadIdx.x < 128) pairs_walk<N>(k, o, m, l);
    else states_walk<N>(k, o, m, l);
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
