/* ssd_scan_grad.cu - gradient of the state space scan: ops/ssd_scan_grad.c on a GPU.
 *
 * In chunks of 64, with S the state that enters a chunk, R the gradient of the one that leaves it,
 * L_ij, keep, left as in ssd.cuh, e_ij = gy_i.x_j, q_ij = e_ij L_ij dt_j, z_ij = q_ij (c_i.b_j):
 *
 *     gu_j  = sum_(i>=j) (c_i.b_j) L_ij gy_i + left_j R b_j,      gx_j = dt_j gu_j + d gy_j
 *     gc_i  = sum_heads sum_(j<=i) q_ij b_j + keep_i S^T gy_i
 *     gb_j  = sum_heads sum_(i>=j) q_ij c_i + dt_j left_j R^T x_j
 *     gl_t  = sum_(j<t<=i) z_ij + sum_(i>=t) keep_i gy_i^T S c_i
 *             + sum_(j<t) dt_j left_j x_j^T R b_j + whole <R,S>
 *     gdt_t = gu_t.x_t + a gl_t,   ga = sum dt_t gl_t,   gd = sum gy_t.x_t
 *
 * What crosses t is a running sum of column sums less row sums of z, both from the same registers.
 * For bf16, P = 64 and N = 64 or 128: S and R of every chunk are made first (ssd.cuh), then a block
 * per chunk walks some heads with q, gb and gc summed over them in registers, on Hopper in
 * ssd_scan_grad_sm90.cu.  For all others one
 * block per some heads of a sequence walks the chunks in f32, with its tiles in scratch.
 * Bytes of the first: x and gy twice, gx once, states and their gradients, 2 N/R of x's size, out
 * and in. */
#include "ssd_scan_grad.cuh"

enum { GY, GEND, X = FG_SSD_BACK, DT, A, B_IN, C_IN, D, STATE, FIRST };
enum { GX, GDT, GA, GB, GC, GD, GSTATE };

/* Chosen on an H100 80GB HBM3, 2026-11-26: 0.50 ms on wgmma for 16384 tokens, 48 heads of 64,
 * N = 128. */
#define BLOCKS 512                               /* of the chunks' kernel, about */
#define BLOCKS_SM90 132                          /* at least, where there are as many heads */
#define TASKS  128                               /* blocks of the plain way, about */

/* ---- on tensor cores ------------------------------------------------------------------------ */

#define THREADS (32 * WARPS)

template <int N> struct tile {
    alignas(128) bf16 x[CHUNK * 64];
    alignas(128) bf16 gy[CHUNK * 64];
    alignas(128) bf16 state[64 * N];
    alignas(128) bf16 pull[64 * N];
    alignas(16) float2 sum[CHUNK];
    alignas(16) float dt[CHUNK], tail[CHUNK], keep[CHUNK], left[CHUNK];
};
template <int N> struct shared {
    tile<N> tiles[2];
    alignas(128) bf16 b[CHUNK * N];
    alignas(128) bf16 c[CHUNK * N];
    alignas(128) bf16 w[CHUNK * CHUNK];
    alignas(16) int32_t segment[CHUNK];
    totals t;
};

/* A warp's part of the chunk: 16 rows; 16 columns of 64, or a quarter of the columns of N. */
struct lot { int row, quarter, g, c; };

template <int N> struct kept {                   /* over heads, in registers */
    float score[2][4], q[2][4];                  /* c_i.b_j and sums of q_ij; rows i, columns j */
    float gb[N / 32][4], gc[N / 32][4];
};

template <int N>
static __device__ __forceinline__ void load_head(const chunks &k, tile<N> *m, int b, int chunk,
                                                 int h)
{
    const int t0 = chunk * CHUNK, real = (int)k.z.T - t0;
    const int64_t row = b * k.z.H + h, at = row * k.d.padded + t0, token = b * k.z.T + t0;
    const int64_t state = (row * k.d.chunks + chunk) * 64 * N;
    fg_tile_load<64, CHUNK, THREADS>(m->x, k.x + token * k.x_row + h * 64, k.x_row, real);
    fg_tile_load<64, CHUNK, THREADS>(m->gy, k.gy + token * k.gy_row + h * 64, k.gy_row, real);
    const uint32_t to_state = fg_shared(m->state + 8 * threadIdx.x);
    const uint32_t to_pull = fg_shared(m->pull + 8 * threadIdx.x);
#pragma unroll
    for (int n = 0; n < N / 64; n++) {
        const int64_t own = state + 8 * threadIdx.x + n * 8 * THREADS;
        fg_copy_async(to_state + n * 16 * THREADS, k.states + own, true);
        fg_copy_async(to_pull + n * 16 * THREADS, k.pulls + own, true);
    }
    const int i = threadIdx.x % 16 * 4;
    switch (threadIdx.x / 16) {
    case 0: fg_copy_async(fg_shared(&m->sum[i]), k.d.sum + at + i, true); break;
    case 1: fg_copy_async(fg_shared(&m->sum[i + 2]), k.d.sum + at + i + 2, true); break;
    case 2: fg_copy_async(fg_shared(&m->dt[i]), k.d.dt + at + i, true); break;
    case 3: fg_copy_async(fg_shared(&m->tail[i]), k.d.tail + at + i, true); break;
    case 4: fg_copy_async(fg_shared(&m->keep[i]), k.d.keep + at + i, true); break;
    case 5: fg_copy_async(fg_shared(&m->left[i]), k.d.left + at + i, true); break;
    }
}

static __device__ __forceinline__ float quad_sum(float x)
{
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
static __device__ __forceinline__ float group_sum(float x)
{
    x += __shfl_xor_sync(~0u, x, 4);
    x += __shfl_xor_sync(~0u, x, 8);
    return x + __shfl_xor_sync(~0u, x, 16);
}
/* Rows g and g + 8 of a lot, summed over its columns. */
static __device__ __forceinline__ void put_rows(const lot &l, float (*to)[CHUNK], float low,
                                                float high)
{
    low = quad_sum(low);
    high = quad_sum(high);
    if (l.c == 0) to[l.quarter][l.row + l.g] = low, to[l.quarter][l.row + l.g + 8] = high;
}

/* Decays of the pairs (i, j) and (i, j + 1) of a lot's tile; near: it lies on the diagonal. */
template <int N>
static __device__ __forceinline__ float2 decay_of(const shared<N> *m, const tile<N> *h, bool near,
                                                  int i, int j, float2 own, int seg, float from)
{
    if (!near) {
        const float2 tail = *(const float2 *)(h->tail + j);
        return make_float2(tail.x * from, tail.y * from);
    }
    const float4 s = *(const float4 *)(h->sum + j);
    const int2 segs = *(const int2 *)(m->segment + j);
    const float u = fg_exp2(fg_two_diff(own, make_float2(s.x, s.y)));
    const float v = fg_exp2(fg_two_diff(own, make_float2(s.z, s.w)));
    return make_float2(j <= i && segs.x == seg ? u : 0.0f, j < i && segs.y == seg ? v : 0.0f);
}

/* q and its sums of z; (c_i.b_j) L_ij to shared memory. */
template <int N>
static __device__ __forceinline__ void pairs(shared<N> *m, const tile<N> *h, const lot &l,
                                             kept<N> *k)
{
    const int i0 = l.row + l.g, j0 = 16 * l.quarter, last = j0 + 15;
    float e[2][4] = {}, row[2] = { 0 };
    const bool near = l.row == j0, seen = j0 <= l.row;
    const uint32_t x = fg_shared(h->x), gy = fg_shared(h->gy);
#pragma unroll
    for (int p = 0; p < 4; p++) {
        if (!seen) continue;
        uint32_t a[4], v[4];
        fg_a<64>(a, gy, l.row, 16 * p);
        fg_b_trans<64>(v, x, 16 * p, j0);
        fg_mma(e[0], a, v[0], v[1]);
        fg_mma(e[1], a, v[2], v[3]);
    }
    float2 own[2];
    float from[2];
    int seg[2];
#pragma unroll
    for (int low = 0; low < 2; low++) {
        own[low] = h->sum[i0 + 8 * low];
        seg[low] = m->segment[i0 + 8 * low];
        from[low] = seg[low] == m->segment[last] ? fg_exp2(fg_two_diff(own[low], h->sum[last]))
                                                 : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const int j = j0 + 8 * n + l.c;
        const float2 dt = *(const float2 *)(h->dt + j);
        float column[2] = { 0 };
#pragma unroll
        for (int low = 0; low < 2; low++) {
            if (!seen) continue;
            const int i = i0 + 8 * low;
            const float2 d = decay_of<N>(m, h, near, i, j, own[low], seg[low], from[low]);
            const float s0 = k->score[n][2 * low], s1 = k->score[n][2 * low + 1];
            const float q0 = e[n][2 * low] * d.x * dt.x, q1 = e[n][2 * low + 1] * d.y * dt.y;
            const float z0 = j < i ? s0 * q0 : 0.0f, z1 = j + 1 < i ? s1 * q1 : 0.0f;
            k->q[n][2 * low] += q0;
            k->q[n][2 * low + 1] += q1;
            row[low] += z0 + z1;
            column[0] += z0;
            column[1] += z1;
            *(uint32_t *)((char *)m->w + fg_swizzle<64>(i, j / 8) + 2 * l.c)
                = fg_pack2(s0 * d.x, s1 * d.y);
        }
        column[0] = group_sum(column[0]);
        column[1] = group_sum(column[1]);
        if (l.g == 0) *(float2 *)&m->t.column[l.row / 16][j] = make_float2(column[0], column[1]);
    }
    put_rows(l, m->t.row, row[0], row[1]);
}

/* gc += keep_i S^T gy_i, and what that says of the decays. */
template <int N>
static __device__ __forceinline__ void from_state(shared<N> *m, const tile<N> *h, const lot &l,
                                                  kept<N> *k)
{
    const int i = l.row + l.g;
    const float keep[2] = { h->keep[i], h->keep[i + 8] };
    const uint32_t state = fg_shared(h->state), gy = fg_shared(h->gy);
    float u[2] = { 0 };
#pragma unroll
    for (int n = 0; n < N / 64; n++) {
        const int n0 = N / 4 * l.quarter + 16 * n;
        float sum[2][4] = {};
#pragma unroll
        for (int p = 0; p < 4; p++) {
            uint32_t a[4], v[4];
            fg_a<64>(a, gy, l.row, 16 * p);
            fg_b<64>(v, state + n0 / 64 * 64 * 128, 16 * p, n0 % 64);
            fg_mma(sum[0], a, v[0], v[1]);
            fg_mma(sum[1], a, v[2], v[3]);
        }
#pragma unroll
        for (int part = 0; part < 2; part++)
#pragma unroll
            for (int low = 0; low < 2; low++) {
                const float2 c = fg_pair<N>(m->c, i + 8 * low, n0 + 8 * part + l.c);
                const float v0 = keep[low] * sum[part][2 * low];
                const float v1 = keep[low] * sum[part][2 * low + 1];
                u[low] = fmaf(v0, c.x, fmaf(v1, c.y, u[low]));
                k->gc[2 * n + part][2 * low] += v0;
                k->gc[2 * n + part][2 * low + 1] += v1;
            }
    }
    put_rows(l, m->t.u, u[0], u[1]);
}

/* gu = left_j R b_j and what it says of the decays; gb += dt_j left_j R^T x_j; <R,S>. */
template <int N>
static __device__ __forceinline__ void to_state(shared<N> *m, const tile<N> *h, const lot &l,
                                                float (*gu)[4], kept<N> *k)
{
    const int j = l.row + l.g;
    const uint32_t pull = fg_shared(h->pull), b = fg_shared(m->b), x = fg_shared(h->x);
    const float left[2] = { h->left[j], h->left[j + 8] };
    const float push[2] = { left[0] * h->dt[j], left[1] * h->dt[j + 8] };
    float w[2] = { 0 }, both = 0;
#pragma unroll
    for (int n = 0; n < N / 16; n++) {
        uint32_t a[4], v[4];
        fg_a<N>(a, b, l.row, 16 * n);
        fg_b_trans<64>(v, pull + n / 4 * 64 * 128, n % 4 * 16, 16 * l.quarter);
        fg_mma(gu[0], a, v[0], v[1]);
        fg_mma(gu[1], a, v[2], v[3]);
    }
#pragma unroll
    for (int p = 0; p < 2; p++)
#pragma unroll
        for (int low = 0; low < 2; low++) {
            const float2 v = fg_pair<64>(h->x, j + 8 * low, 16 * l.quarter + 8 * p + l.c);
            gu[p][2 * low] *= left[low];
            gu[p][2 * low + 1] *= left[low];
            w[low] = fmaf(gu[p][2 * low], v.x, fmaf(gu[p][2 * low + 1], v.y, w[low]));
        }
    put_rows(l, m->t.w, w[0], w[1]);
#pragma unroll
    for (int p = 0; p < 4; p++) {
        uint32_t a[4];
        fg_a<64>(a, x, l.row, 16 * p);
        a[0] = fg_scale2(a[0], push[0], push[0]);
        a[1] = fg_scale2(a[1], push[1], push[1]);
        a[2] = fg_scale2(a[2], push[0], push[0]);
        a[3] = fg_scale2(a[3], push[1], push[1]);
#pragma unroll
        for (int n = 0; n < N / 64; n++) {
            uint32_t v[4];
            const int at = N / 4 * l.quarter + 16 * n;
            fg_b<64>(v, pull + at / 64 * 64 * 128, 16 * p, at % 64);
            fg_mma(k->gb[2 * n], a, v[0], v[1]);
            fg_mma(k->gb[2 * n + 1], a, v[2], v[3]);
        }
    }
#pragma unroll 1
    for (int i = 0; i < 64 * N / 8 / THREADS; i++) {
        float s[8], r[8];
        fg_unpack(((const uint4 *)h->state)[threadIdx.x + i * THREADS], s);
        fg_unpack(((const uint4 *)h->pull)[threadIdx.x + i * THREADS], r);
#pragma unroll
        for (int e = 0; e < 8; e++) both = fmaf(s[e], r[e], both);
    }
    both = fg_warp_sum(both);
    if (threadIdx.x % 32 == 0) m->t.both[threadIdx.x / 32] = both;
}

/* gu += sum_(i>=j) w_ij gy_i; gx. */
template <int N>
static __device__ __forceinline__ void finish(const chunks &k, shared<N> *m, const tile<N> *h,
                                              const lot &l, float (*gu)[4], int b, int t0,
                                              int head)
{
    const int j = l.row + l.g;
    const uint32_t w = fg_shared(m->w), gy = fg_shared(h->gy);
    const float skip = k.skip ? k.skip[head] : 0.0f;
    float on_x[2] = { 0 }, on_y[2] = { 0 };
#pragma unroll
    for (int i = 0; i < CHUNK; i += 16) {
        if (i < l.row) continue;
        uint32_t a[4], v[4];
        fg_a_trans<64>(a, w, l.row, i);
        fg_b<64>(v, gy, i, 16 * l.quarter);
        fg_mma(gu[0], a, v[0], v[1]);
        fg_mma(gu[1], a, v[2], v[3]);
    }
    uint32_t out[4];
#pragma unroll
    for (int low = 0; low < 2; low++) {
        const int r = j + 8 * low;
        const bool pad = m->segment[r] < 0;
        const float dt = h->dt[r];
#pragma unroll
        for (int p = 0; p < 2; p++) {
            const float2 x = fg_pair<64>(h->x, r, 16 * l.quarter + 8 * p + l.c);
            const float2 y = fg_pair<64>(h->gy, r, 16 * l.quarter + 8 * p + l.c);
            const float u = gu[p][2 * low], v = gu[p][2 * low + 1];
            on_x[low] = fmaf(u, x.x, fmaf(v, x.y, on_x[low]));
            on_y[low] = fmaf(y.x, x.x, fmaf(y.y, x.y, on_y[low]));
            const uint32_t g = fg_pack2(fmaf(dt, u, skip * y.x), fmaf(dt, v, skip * y.y));
            out[2 * low + p] = pad ? 0u : g;
        }
    }
    fg_quad_turn(out);
    const int own = t0 + j + l.c / 4 * 8, column = 16 * l.quarter + l.c % 4 * 4;
    if (own < k.z.T)
        fg_store4(k.gx + (b * k.z.T + own) * k.gx_row + head * 64 + column, out);
    put_rows(l, m->t.gu, on_x[0], on_x[1]);
    put_rows(l, m->t.gy, on_y[0], on_y[1]);
}

/* gb and gc: what q, summed over heads, adds; then out. */
template <int N>
static __device__ __forceinline__ void close(const chunks &k, shared<N> *m, const lot &l,
                                             kept<N> *r, int b, int t0, int g, int part)
{
    const uint32_t q = fg_shared(m->w), bs = fg_shared(m->b), cs = fg_shared(m->c);
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int low = 0; low < 2; low++)
            *(uint32_t *)((char *)m->w + fg_swizzle<64>(l.row + l.g + 8 * low, 2 * l.quarter + n)
                          + 2 * l.c) = fg_pack2(r->q[n][2 * low], r->q[n][2 * low + 1]);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < CHUNK; i += 16) {
        uint32_t a[4], at[4];
        const bool old = i <= l.row, late = i >= l.row;
        if (old) fg_a<64>(a, q, l.row, i);
        if (late) fg_a_trans<64>(at, q, l.row, i);
#pragma unroll
        for (int n = 0; n < N / 64; n++) {
            uint32_t v[4];
            if (old) {
                fg_b<N>(v, bs, i, N / 4 * l.quarter + 16 * n);
                fg_mma(r->gc[2 * n], a, v[0], v[1]);
                fg_mma(r->gc[2 * n + 1], a, v[2], v[3]);
            }
            if (late) {
                fg_b<N>(v, cs, i, N / 4 * l.quarter + 16 * n);
                fg_mma(r->gb[2 * n], at, v[0], v[1]);
                fg_mma(r->gb[2 * n + 1], at, v[2], v[3]);
            }
        }
    }
    const int64_t all = k.z.B * k.z.T * k.z.G * N;
#pragma unroll
    for (int low = 0; low < 2; low++) {
        const int64_t t = t0 + l.row + l.g + 8 * low;
        if (t >= k.z.T) continue;
        const int64_t from = g * N + N / 4 * l.quarter + l.c, token = b * k.z.T + t;
        const int64_t at = token * k.z.G * N + from;
#pragma unroll
        for (int n = 0; n < N / 32; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float vb = r->gb[n][2 * low + e], vc = r->gc[n][2 * low + e];
                if (k.s.parts == 1) {
                    k.gb.put(token * k.gb_row + from + 8 * n + e, vb);
                    k.gc.put(token * k.gc_row + from + 8 * n + e, vc);
                } else {
                    k.s.gb[part * all + at + 8 * n + e] = vb;
                    k.s.gc[part * all + at + 8 * n + e] = vc;
                }
            }
    }
}

/* A block is a chunk and some heads of a group.  Warps of one scheduler have tiles of all distances
 * from the diagonal. */
template <int N>
static __global__ void __launch_bounds__(THREADS, 1)
run_chunks(const __grid_constant__ chunks k)
{
    extern __shared__ __align__(128) char memory[];
    shared<N> *m = (shared<N> *)memory;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const lot l = { warp / 4 * 16, warp % 4 ^ warp / 4, lane / 4, 2 * (lane % 4) };
    const int parts = (int)k.s.parts, G = (int)k.z.G, chunks = (int)k.d.chunks, H = (int)k.z.H;
    const int part = blockIdx.x % parts, rest = blockIdx.x / parts, g = rest % G;
    const int chunk = rest / G % chunks, b = rest / G / chunks, t0 = chunk * CHUNK, M = H / G;
    const int h0 = g * M + M * part / parts, h1 = g * M + M * (part + 1) / parts;
    const int real = (int)k.z.T - t0;
    const int64_t token = b * k.z.T + t0;
    kept<N> r = {};
    fg_tile_load<N, CHUNK, THREADS>(m->b, k.b + token * k.b_row + g * N, k.b_row, real);
    fg_tile_load<N, CHUNK, THREADS>(m->c, k.c + token * k.c_row + g * N, k.c_row, real);
    if (threadIdx.x < CHUNK)
        m->segment[threadIdx.x] = k.d.segment[b * k.d.padded + t0 + threadIdx.x];
    load_head<N>(k, &m->tiles[0], b, chunk, h0);
    fg_copy_commit();
    fg_copy_wait<0>();
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N / 16; n++) {
        uint32_t a[4], v[4];
        fg_a<N>(a, fg_shared(m->c), l.row, 16 * n);
        fg_b_trans<N>(v, fg_shared(m->b), 16 * n, 16 * l.quarter);
        fg_mma(r.score[0], a, v[0], v[1]);
        fg_mma(r.score[1], a, v[2], v[3]);
    }
    for (int h = h0; h < h1; h++) {
        const int stage = (h - h0) % 2;
        const tile<N> *own = &m->tiles[stage];
        fg_copy_wait<0>();
        __syncthreads();
        if (h + 1 < h1) load_head<N>(k, &m->tiles[1 - stage], b, chunk, h + 1);
        fg_copy_commit();
        float gu[2][4] = {};
        pairs<N>(m, own, l, &r);
        from_state<N>(m, own, l, &r);
        to_state<N>(m, own, l, gu, &r);
        __syncthreads();
        finish<N>(k, m, own, l, gu, b, t0, h);
        __syncthreads();
        if (warp == h % WARPS) {
            const int at = (b * chunks + chunk) * H + h;
            settle(m->t, nullptr, own->dt, m->segment, k.d.rate[h],
                   k.d.whole[((int64_t)b * H + h) * chunks + chunk], real,
                   { k.gdt, token * k.gdt_row + h, k.gdt_row, k.s.ga + at, k.s.gd + at,
                     k.s.gbias + at, k.bias });
        }
    }
    __syncthreads();
    close<N>(k, m, l, &r, b, t0, g, part);
}

template <int N> static void run_chunks_launch(const chunks &k, cudaStream_t stream)
{
    const int bytes = (int)sizeof(shared<N>);
    cudaFuncSetAttribute(run_chunks<N>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    const unsigned blocks = (unsigned)(k.z.B * k.d.chunks * k.z.G * k.s.parts);
    run_chunks<N><<<blocks, THREADS, bytes, stream>>>(k);
}

/* ---- any shape and dtype, in f32 ------------------------------------------------------------- */

struct rows_of { fg_in x; int64_t pitch; };      /* [B*T, n]; x.p NULL: 0 */
static __device__ __forceinline__ float get(const rows_of &r, int64_t row, int64_t i)
{
    return r.x.p ? r.x[row * r.pitch + i] : 0.0f;
}

struct plain {
    fg_ssd z;
    fg_decays d;
    sums s;
    rows_of x, gy, b, c;
    fg_in a, skip;
    const float *state, *gend;
    fg_out gx;
    int64_t gx_row;
    float *gdt, *gstate;
    float *own;                                  /* scratch, `each` floats a block */
    int64_t each;
};

/* A block's own memory: states [chunks][P][N]; s, r [P][N]; of pairs w, q, z [i][j] and q turned;
 * and with a column per token x, gy, gu, part [P][64], b, c, inter [N][64]. */
static int64_t plain_floats(const fg_ssd &z, int64_t chunks)
{
    return (chunks + 2) * z.P * z.N + 4 * CHUNK * CHUNK + CHUNK * (4 * z.P + 3 * z.N);
}
struct work {
    float *states, *s, *r, *w, *q, *z, *turned, *x, *gy, *gu, *part, *b, *c, *inter;
};
static __device__ __forceinline__ work work_of(float *own, const fg_ssd &z, int64_t chunks)
{
    work m;
    m.states = own;
    m.s = m.states + chunks * z.P * z.N, m.r = m.s + z.P * z.N;
    m.w = m.r + z.P * z.N, m.q = m.w + CHUNK * CHUNK, m.z = m.q + CHUNK * CHUNK;
    m.turned = m.z + CHUNK * CHUNK;
    m.x = m.turned + CHUNK * CHUNK, m.gy = m.x + CHUNK * z.P, m.gu = m.gy + CHUNK * z.P;
    m.part = m.gu + CHUNK * z.P;
    m.b = m.part + CHUNK * z.P, m.c = m.b + CHUNK * z.N, m.inter = m.c + CHUNK * z.N;
    return m;
}

/* A chunk of one head, as the kernels below see it. */
struct view { int64_t b, h, g, chunk, token, at; int real; };

/* to[i][t] = row token + t of r, column first + i; 0 behind the last token. */
static __device__ __forceinline__ void turn(const view &v, const rows_of &r, int64_t first,
                                            int64_t n, float *to)
{
    for (int64_t i = threadIdx.x; i < n * CHUNK; i += blockDim.x) {
        const int64_t t = i / n, k = i % n;
        to[k * CHUNK + t] = t < v.real ? get(r, v.token + t, first + k) : 0.0f;
    }
}

/* s = whole s + sum_j weight_j u_jp v_jn */
static __device__ __forceinline__ void advance(const plain &k, const view &v, const rows_of &u,
                                               const rows_of &y, const float *weight, float *s)
{
    const float whole = k.d.whole[(v.b * k.z.H + v.h) * k.d.chunks + v.chunk];
    for (int64_t i = threadIdx.x; i < k.z.P * k.z.N; i += blockDim.x) {
        const int64_t p = i / k.z.N, n = i % k.z.N;
        float sum = 0;
        for (int j = 0; j < v.real; j++)
            sum = fmaf(weight[v.at + j] * get(u, v.token + j, v.h * k.z.P + p),
                       get(y, v.token + j, v.g * k.z.N + n), sum);
        s[i] = fmaf(whole, s[i], sum);
    }
    __syncthreads();
}

static __device__ __forceinline__ void plain_pairs(const plain &k, const view &v,
                                                   const int32_t *segment, const work &m)
{
    for (int n = threadIdx.x; n < CHUNK * CHUNK; n += blockDim.x) {
        const int i = n / CHUNK, j = n % CHUNK;
        float w = 0, q = 0, z = 0;
        if (j <= i && i < v.real && segment[i] == segment[j]) {
            float e = 0, score = 0;
            for (int64_t p = 0; p < k.z.P; p++)
                e = fmaf(m.gy[p * CHUNK + i], m.x[p * CHUNK + j], e);
            for (int64_t c = 0; c < k.z.N; c++)
                score = fmaf(m.c[c * CHUNK + i], m.b[c * CHUNK + j], score);
            const float d = exp2f(fg_two_diff(k.d.sum[v.at + i], k.d.sum[v.at + j]));
            w = score * d;
            q = e * d * k.d.dt[v.at + j];
            z = j < i ? q * score : 0;
        }
        m.w[n] = w;
        m.q[n] = q;
        m.z[n] = z;
        m.turned[j * CHUNK + i] = q;
    }
    __syncthreads();
}

/* gu and its part through the state; gb, gc added to this task's sums. */
static __device__ __forceinline__ void plain_products(const plain &k, const view &v, const work &m,
                                                      float *gb, float *gc)
{
    const int64_t P = k.z.P, N = k.z.N;
    for (int64_t i = threadIdx.x; i < P * CHUNK; i += blockDim.x) {
        const int64_t p = i / CHUNK, j = i % CHUNK;
        float sum = 0, pairs = 0;
        for (int64_t n = 0; n < N; n++) sum = fmaf(m.r[p * N + n], m.b[n * CHUNK + j], sum);
        for (int t = 0; t < v.real; t++)
            pairs = fmaf(m.w[t * CHUNK + j], m.gy[p * CHUNK + t], pairs);
        m.part[i] = k.d.left[v.at + j] * sum;
        m.gu[i] = pairs + m.part[i];
    }
    for (int64_t i = threadIdx.x; i < N * CHUNK; i += blockDim.x) {
        const int64_t n = i / CHUNK, t = i % CHUNK, to = ((v.token + t) * k.z.G + v.g) * N + n;
        float back = 0, on = 0, c = 0, b = 0;
        for (int64_t p = 0; p < P; p++) {
            back = fmaf(m.s[p * N + n], m.gy[p * CHUNK + t], back);
            on = fmaf(m.r[p * N + n], m.x[p * CHUNK + t], on);
        }
        for (int j = 0; j < v.real; j++) {
            c = fmaf(m.turned[j * CHUNK + t], m.b[n * CHUNK + j], c);
            b = fmaf(m.q[j * CHUNK + t], m.c[n * CHUNK + j], b);
        }
        m.inter[i] = k.d.keep[v.at + t] * back;
        if (t >= v.real) continue;
        gc[to] += c + m.inter[i];
        gb[to] += fmaf(k.d.push[v.at + t], on, b);
    }
    __syncthreads();
}

/* gx; and a thread per token and two sums. */
static __device__ __noinline__ void plain_totals(const plain &k, const view &v,
                                                 const int32_t *segment, const work &m, totals *t,
                                                 double *crossing)
{
    const int64_t P = k.z.P, N = k.z.N;
    const int i = threadIdx.x % CHUNK;
    const float skip = k.skip.p ? k.skip[v.h] : 0.0f;
    float one = 0, two = 0, both = 0;
    double cross = 0;
    switch (threadIdx.x / CHUNK) {
    case 0:                      /* in f32 their errors, shared by all that follows, make ga's */
#pragma unroll 1
        for (int j = 0; j < CHUNK; j++) cross += (double)m.z[j * CHUNK + i] - m.z[i * CHUNK + j];
        crossing[i] = cross;
        break;
    case 1:
        for (int64_t n = 0; n < N; n++) one = fmaf(m.inter[n * CHUNK + i], m.c[n * CHUNK + i], one);
        t->u[0][i] = one;
        break;
    case 2:
        for (int64_t p = 0; p < P; p++) {
            one = fmaf(m.part[p * CHUNK + i], m.x[p * CHUNK + i], one);
            two = fmaf(m.gu[p * CHUNK + i], m.x[p * CHUNK + i], two);
        }
        t->w[0][i] = one, t->gu[0][i] = two;
        break;
    case 3:
        for (int64_t p = 0; p < P; p++) one = fmaf(m.gy[p * CHUNK + i], m.x[p * CHUNK + i], one);
        t->gy[0][i] = one;
        for (int n = 1; n < PARTS; n++) {
            t->u[n][i] = t->w[n][i] = t->gu[n][i] = t->gy[n][i] = 0;
        }
    }
    for (int64_t n = threadIdx.x; n < v.real * P; n += blockDim.x) {
        const int64_t j = n / P, p = n % P;
        const float g = fmaf(k.d.dt[v.at + j], m.gu[p * CHUNK + j], skip * m.gy[p * CHUNK + j]);
        k.gx.put((v.token + j) * k.gx_row + v.h * P + p, segment[j] < 0 ? 0.0f : g);
    }
    for (int64_t n = threadIdx.x; n < P * N; n += blockDim.x) both = fmaf(m.s[n], m.r[n], both);
    both = fg_warp_sum(both);
    if (threadIdx.x % 32 == 0) t->both[threadIdx.x / 32] = both;
    __syncthreads();
}

static __device__ __forceinline__ void plain_head(const plain &k, view v, const work &m, float *gb,
                                                  float *gc)
{
    __shared__ totals t;
    __shared__ double crossing[CHUNK];
    const fg_ssd &z = k.z;
    const int64_t size = z.P * z.N, row = v.b * z.H + v.h;
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
        m.s[i] = k.state ? k.state[row * size + i] : 0.0f;
        m.r[i] = k.gend ? k.gend[row * size + i] : 0.0f;
    }
    __syncthreads();
    for (int64_t n = 0; n < 2 * k.d.chunks; n++) {           /* there, and back again */
        const bool back = n >= k.d.chunks;
        v.chunk = back ? 2 * k.d.chunks - 1 - n : n;
        v.token = v.b * z.T + v.chunk * CHUNK;
        v.at = row * k.d.padded + v.chunk * CHUNK;
        v.real = (int)min((int64_t)CHUNK, z.T - v.chunk * CHUNK);
        float *states = m.states + v.chunk * size;
        for (int64_t i = threadIdx.x; i < size; i += blockDim.x)
            *(back ? m.s + i : states + i) = back ? states[i] : m.s[i];
        __syncthreads();
        if (!back) {
            advance(k, v, k.x, k.b, k.d.push, m.s);
            continue;
        }
        const int32_t *segment = k.d.segment + v.b * k.d.padded + v.chunk * CHUNK;
        turn(v, k.x, v.h * z.P, z.P, m.x);
        turn(v, k.gy, v.h * z.P, z.P, m.gy);
        turn(v, k.b, v.g * z.N, z.N, m.b);
        turn(v, k.c, v.g * z.N, z.N, m.c);
        __syncthreads();
        plain_pairs(k, v, segment, m);
        plain_products(k, v, m, gb, gc);
        plain_totals(k, v, segment, m, &t, crossing);
        const int64_t at = (v.b * k.d.chunks + v.chunk) * z.H + v.h;
        if (threadIdx.x < 32)
            settle(t, crossing, k.d.dt + v.at, segment, k.a[v.h],
                   k.d.whole[row * k.d.chunks + v.chunk], v.real,
                   { { k.gdt, false }, v.token * z.H + v.h, z.H, k.s.ga + at, k.s.gd + at,
                     k.s.gbias + at, false });
        advance(k, v, k.gy, k.c, k.d.keep, m.r);
    }
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) k.gstate[row * size + i] = m.r[i];
    __syncthreads();
}

static __global__ void __launch_bounds__(THREADS, 1)
run_plain(const __grid_constant__ plain k)
{
    const fg_ssd &z = k.z;
    const int64_t task = blockIdx.x % k.s.parts, g = blockIdx.x / k.s.parts % z.G;
    const int64_t b = blockIdx.x / k.s.parts / z.G, M = z.H / z.G;
    const int64_t all = z.B * z.T * z.G * z.N;
    float *gb = k.s.gb + task * all, *gc = k.s.gc + task * all;
    const work m = work_of(k.own + blockIdx.x * k.each, z, k.d.chunks);
    for (int64_t i = threadIdx.x; i < z.T * z.N; i += blockDim.x) {
        const int64_t at = ((b * z.T + i / z.N) * z.G + g) * z.N + i % z.N;
        gb[at] = gc[at] = 0;
    }
    __syncthreads();
    for (int64_t h = g * M + M * task / k.s.parts; h < g * M + M * (task + 1) / k.s.parts; h++)
        plain_head(k, { b, h, g, 0, 0, 0, 0 }, m, gb, gc);
}

/* ---- sums of parts, in order ----------------------------------------------------------------- */

/* to: rows of n elements. */
static __global__ void __launch_bounds__(256)
add_parts(const float *parts, int64_t n_parts, int64_t all, int64_t n, int64_t row, fg_out to)
{
    const int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    float sum = 0;
    if (i >= all) return;
    for (int64_t k = 0; k < n_parts; k++) sum += parts[k * all + i];
    to.put(i / n * row + i % n, sum);
}
/* A warp per head.  With gbias, a is -e^a_log, and ga the gradient of a_log. */
static __global__ void __launch_bounds__(32)
add_chunks(sums s, int64_t rows, int64_t H, const float *rate, fg_out ga, fg_out gd, fg_out gbias)
{
    const int64_t h = blockIdx.x;
    double a = 0, d = 0, bias = 0;
    for (int64_t i = threadIdx.x; i < rows; i += 32)
        a += s.ga[i * H + h], d += s.gd[i * H + h], bias += s.gbias[i * H + h];
    a = warp_sum(a);
    d = warp_sum(d);
    bias = warp_sum(bias);
    if (threadIdx.x > 0) return;
    ga.put(h, (float)(gbias.p ? a * rate[h] : a));
    gd.put(h, (float)d);
    if (gbias.p) gbias.put(h, (float)bias);
}

/* ---- which ----------------------------------------------------------------------------------- */

static bool in_chunks(const fg_infer *c)
{
    return fg_ssd_fits(c, X) && c->given[GY] && c->in_type[GY] == FG_BF16
           && c->out_type[GX] == FG_BF16 && c->in_type[DT] == FG_F32;
}

struct layout { bool sm90; fg_decays d; sums s; bf16 *states, *pulls; float *own; };

/* kept: states of the forward pass are there. */
static layout cut(const fg_ssd &z, bool tensor, bool kept, void *base, size_t *used)
{
    layout m = {};
    m.sm90 = tensor && fg_ssd_scan_grad_has_sm90();
    const int each = m.sm90 ? 2 : 1;
    m.d = fg_decays_cut(base, used, z, CHUNK, each);
    int64_t parts = !tensor ? fg_ssd_parts(z, 1, TASKS)
                            : fg_ssd_parts(z, m.d.chunks, m.sm90 ? BLOCKS_SM90 : BLOCKS);
    const int64_t least = (z.H / z.G + HEADS_SM90 - 1) / HEADS_SM90;
    if (m.sm90 && parts < least) parts = least;
    m.s = sums_cut(base, used, z, m.d.chunks, parts);
    const int64_t states = z.B * z.H * (m.d.chunks / each) * z.P * z.N;
    if (tensor) {
        if (!kept || !m.sm90) m.states = (bf16 *)fg_ssd_cut(base, used, states, sizeof(bf16));
        m.pulls = (bf16 *)fg_ssd_cut(base, used, states, sizeof(bf16));
    } else {
        m.own = (float *)fg_ssd_cut(base, used, z.B * z.G * parts * plain_floats(z, m.d.chunks),
                                    sizeof(float));
    }
    return m;
}

static fg_ssd task_of(const fg_exec *e)
{
    fg_ssd z = fg_ssd_of(&e->in_shape[X], &e->in_shape[B_IN]);
    z.first = (const int32_t *)e->in[FIRST];
    z.resets = z.first != NULL;
    return z;
}

static void chunks_launch(const fg_exec *e, const fg_ssd &z, const layout &m, bool bias,
                          const bf16 *kept, cudaStream_t stream)
{
    chunks k = {};
    k.z = z, k.d = m.d, k.s = m.s, k.states = m.states ? m.states : kept, k.pulls = m.pulls;
    k.x = (const bf16 *)e->in[X], k.gy = (const bf16 *)e->in[GY];
    k.b = (const bf16 *)e->in[B_IN], k.c = (const bf16 *)e->in[C_IN];
    k.x_row = fg_pitch_of(&e->in_rows[X], z.H * z.P);
    k.gy_row = fg_pitch_of(&e->in_rows[GY], z.H * z.P);
    k.b_row = fg_pitch_of(&e->in_rows[B_IN], z.G * z.N);
    k.c_row = fg_pitch_of(&e->in_rows[C_IN], z.G * z.N);
    k.skip = (const float *)e->in[D], k.bias = bias;
    k.gx = (bf16 *)e->out[GX], k.gdt = fg_output_of(e, GDT);
    k.gb = fg_output_of(e, GB), k.gc = fg_output_of(e, GC);
    k.gx_row = fg_pitch_of(&e->out_rows[GX], z.H * z.P);
    k.gdt_row = fg_pitch_of(&e->out_rows[GDT], z.H);
    k.gb_row = fg_pitch_of(&e->out_rows[GB], z.G * z.N);
    k.gc_row = fg_pitch_of(&e->out_rows[GC], z.G * z.N);
    k.each = m.sm90 ? 2 : 1;
    const fg_states back = { k.gy, k.c, k.gy_row, k.c_row, m.d.keep, (const float *)e->in[GEND],
                             (float *)e->out[GSTATE], m.pulls, k.each, true };
    const fg_states on = { k.x, k.b, k.x_row, k.b_row, m.d.push, (const float *)e->in[STATE], NULL,
                           m.states, k.each, false };
    fg_states_launch<CHUNK>(z, m.d, { { back, on } }, m.states ? 2 : 1, stream);
    if (m.sm90) fg_ssd_scan_grad_sm90(k, stream);
    else if (z.N == 128) run_chunks_launch<128>(k, stream);
    else run_chunks_launch<64>(k, stream);
}

/* The sums of parts: gb and gc, if there are several or they are not in place; those of heads. */
static void add_up(const fg_exec *e, const fg_ssd &z, const layout &m, bool apart,
                   const fg_out &gbias, cudaStream_t stream)
{
    const int64_t n = z.G * z.N, all = z.B * z.T * n;
    for (int c = 0; c < 2 && (apart || m.s.parts > 1); c++) {
        const int64_t row = fg_pitch_of(&e->out_rows[GB + c], n);
        add_parts<<<fg_blocks(all, 256), 256, 0, stream>>>(c ? m.s.gc : m.s.gb, m.s.parts, all, n,
                                                           row, fg_output_of(e, GB + c));
    }
    add_chunks<<<(unsigned)z.H, 32, 0, stream>>>(m.s, z.B * m.d.chunks, z.H, m.d.rate,
                                                 fg_output_of(e, GA), fg_output_of(e, GD), gbias);
}

void fg_ssd_backward(const fg_exec *e, const fg_ssd_steps &steps, const bf16 *kept,
                     const fg_out &gbias, cudaStream_t stream)
{
    const fg_ssd z = task_of(e);
    size_t used = 0;
    const layout m = cut(z, true, kept, e->scratch, &used);
    fg_decays_launch<CHUNK>(z, steps, m.d, stream);
    chunks_launch(e, z, m, steps.bias, kept, stream);
    add_up(e, z, m, false, gbias, stream);
}

size_t fg_ssd_backward_scratch(const fg_infer *c, bool kept)
{
    size_t used = 0;
    cut(fg_ssd_of(&c->in[X], &c->in[B_IN]), true, kept, NULL, &used);
    return used;
}

static rows_of rows_at(const fg_exec *e, int i, int64_t n)
{
    return { fg_input_of(e, i), e->in[i] ? fg_pitch_of(&e->in_rows[i], n) : n };
}

static void plain_launch(const fg_exec *e, const fg_ssd &z, const layout &m, cudaStream_t stream)
{
    const plain k = { z, m.d, m.s, rows_at(e, X, z.H * z.P), rows_at(e, GY, z.H * z.P),
                      rows_at(e, B_IN, z.G * z.N), rows_at(e, C_IN, z.G * z.N), fg_input_of(e, A),
                      fg_input_of(e, D), (const float *)e->in[STATE], (const float *)e->in[GEND],
                      fg_output_of(e, GX), fg_pitch_of(&e->out_rows[GX], z.H * z.P),
                      (float *)e->out[GDT], (float *)e->out[GSTATE], m.own,
                      plain_floats(z, m.d.chunks) };
    run_plain<<<(unsigned)(z.B * z.G * m.s.parts), THREADS, 0, stream>>>(k);
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    fg_infer c = {};
    for (int i = 0; i < e->n_in; i++) {
        c.given[i] = e->in[i] != NULL;
        c.in[i] = e->in_shape[i];
        c.in_type[i] = e->in_type[i];
    }
    c.out_type[GX] = e->out_type[GX];
    const fg_ssd_steps steps = fg_steps_of(e, X, 0);
    if (in_chunks(&c)) {
        fg_ssd_backward(e, steps, nullptr, {}, stream);
        return;
    }
    const fg_ssd z = task_of(e);
    size_t used = 0;
    const layout m = cut(z, false, false, e->scratch, &used);
    fg_decays_launch<CHUNK>(z, steps, m.d, stream);
    plain_launch(e, z, m, stream);
    add_up(e, z, m, true, {}, stream);
}

static size_t scratch(const fg_infer *c)
{
    size_t used = 0;
    cut(fg_ssd_of(&c->in[X], &c->in[B_IN]), in_chunks(c), false, NULL, &used);
    return used;
}

static const char *unfit(const fg_infer *c)
{
    const bool wide = c->in_type[DT] == FG_F32 && c->in_type[A] == FG_F32;
    return wide && c->out_type[GDT] == FG_F32 ? NULL : "dt and a must be f32";
}

FG_KERNEL(ssd_scan_grad) = { .launch = launch, .unfit = unfit, .scratch = scratch,
                             .pitched_in = 1u << GY | 1u << X | 1u << B_IN | 1u << C_IN,
                             .pitched_out = 1u << GX | 1u << GB | 1u << GC };
