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
 * per chunk walks some heads with q, gb and gc summed over them in registers.  For all others one
 * block per some heads of a sequence walks the chunks in f32, with its tiles in scratch.
 * Bytes of the first: x and gy twice, gx once, states and their gradients, 2 N/R of x's size, out
 * and in. */
#include "ssd.cuh"

enum { GY, GEND, X, DT, A, B_IN, C_IN, D, STATE, FIRST };
enum { GX, GDT, GA, GB, GC, GD, GSTATE };

#define CHUNK  64
#define BLOCKS 512                               /* of the chunks' kernel, about */
#define TASKS  16                                /* of a group in the plain way, at most */

/* Parts of sums: gb, gc: [parts][B,T,G,N]; ga, gd: [B*chunks][H]. */
struct sums { float *gb, *gc, *ga, *gd; int64_t parts; };

static sums sums_cut(void *base, size_t *used, const fg_ssd &z, int64_t chunks, int64_t parts)
{
    sums s;
    const int64_t n = parts * z.B * z.T * z.G * z.N;
    s.parts = parts;
    s.gb = (float *)fg_ssd_cut(base, used, n, sizeof(float));
    s.gc = (float *)fg_ssd_cut(base, used, n, sizeof(float));
    s.ga = (float *)fg_ssd_cut(base, used, z.B * chunks * z.H, sizeof(float));
    s.gd = (float *)fg_ssd_cut(base, used, z.B * chunks * z.H, sizeof(float));
    return s;
}

/* Sums of one head over a chunk, in shared memory; up to four parts each. */
struct totals {
    float row[2][CHUNK], column[4][CHUNK];       /* of z below the diagonal */
    float u[2][CHUNK], w[2][CHUNK];              /* keep_i gy_i^T S c_i, left_j x_j^T R b_j */
    float gu[2][CHUNK], gy[2][CHUNK];            /* gu_j.x_j, gy_j.x_j */
    float both[8];                               /* <R,S> */
};

static __device__ __forceinline__ float before(float x)      /* sum over lower lanes */
{
    float y = x;
#pragma unroll
    for (int k = 1; k < 32; k *= 2) {
        const float v = __shfl_up_sync(~0u, y, k);
        if ((int)threadIdx.x % 32 >= k) y += v;
    }
    return y - x;
}

/* gdt, ga and gd of one head and chunk by one warp; a lane has two tokens. */
static __device__ __forceinline__ void settle(const totals &m, const float *dt,
                                              const int32_t *segment, float rate, float whole,
                                              int64_t real, float *gdt, int64_t row, float *ga,
                                              float *gd)
{
    const int lane = threadIdx.x % 32;
    float cross[2], u[2], w[2], both = 0, a = 0, d = 0;
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const int t = 2 * lane + e;
        float column = 0;
#pragma unroll
        for (int k = 0; k < 4; k++) column += m.column[k][t];
        cross[e] = column - (m.row[0][t] + m.row[1][t]);
        u[e] = m.u[0][t] + m.u[1][t];
        w[e] = dt[t] * (m.w[0][t] + m.w[1][t]);
    }
#pragma unroll
    for (int k = 0; k < 8; k++) both += m.both[k];
    const float crossed = before(cross[0] + cross[1]), pushed = before(w[0] + w[1]);
    const float all = fg_warp_sum(u[0] + u[1]), pulled = all - before(u[0] + u[1]);
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const int t = 2 * lane + e;
        const float gl = (e ? crossed + cross[0] : crossed) + (e ? pulled - u[0] : pulled)
            + (e ? pushed + w[0] : pushed) + whole * both;
        const bool counts = t < real && segment[t] >= 0;
        if (t < real) gdt[t * row] = counts ? fmaf(rate, gl, m.gu[0][t] + m.gu[1][t]) : 0.0f;
        a += counts ? dt[t] * gl : 0.0f;
        d += counts ? m.gy[0][t] + m.gy[1][t] : 0.0f;
    }
    a = fg_warp_sum(a);
    d = fg_warp_sum(d);
    if (lane == 0) *ga = a, *gd = d;
}

/* ---- on tensor cores ------------------------------------------------------------------------ */

struct chunks {
    fg_ssd z;
    fg_decays d;
    sums s;
    const bf16 *x, *gy, *b, *c, *states, *pulls; /* pulls: R */
    const float *skip, *rate;
    bf16 *gx;
    float *gdt;
    fg_out gb, gc;
    int64_t x_row, gy_row, b_row, c_row;
};

template <int N> struct tile {
    alignas(128) bf16 x[CHUNK * 64];
    alignas(128) bf16 gy[CHUNK * 64];
    alignas(128) bf16 state[64 * N];
    alignas(128) bf16 pull[64 * N];
    alignas(16) float2 sum[CHUNK];
    alignas(16) float dt[CHUNK], keep[CHUNK], left[CHUNK];
};
template <int N> struct shared {
    tile<N> tiles[2];
    alignas(128) bf16 b[CHUNK * N];
    alignas(128) bf16 c[CHUNK * N];
    alignas(128) bf16 w[CHUNK * CHUNK];
    alignas(16) int32_t segment[CHUNK];
    totals t;
};

/* A warp's part of the chunk: 16 rows; 32 columns of 64, or half the columns of N. */
struct lot { int row, half, g, c; };

template <int N> struct kept {                   /* over heads, in registers */
    float score[4][4], q[4][4];                  /* c_i.b_j and sums of q_ij; rows i, columns j */
    float gb[N / 16][4], gc[N / 16][4];
};

template <int N>
static __device__ __forceinline__ void load_head(const chunks &k, tile<N> *m, int64_t b,
                                                 int64_t chunk, int64_t h)
{
    const int64_t t0 = chunk * CHUNK, row = b * k.z.H + h, at = row * k.d.padded + t0;
    const int64_t token = b * k.z.T + t0, real = k.z.T - t0;
    const int64_t state = (row * k.d.chunks + chunk) * 64 * N;
    fg_tile_load<64, 256>(m->x, k.x + token * k.x_row + h * 64, k.x_row, CHUNK, real);
    fg_tile_load<64, 256>(m->gy, k.gy + token * k.gy_row + h * 64, k.gy_row, CHUNK, real);
    fg_tile_load<N, 256>(m->state, k.states + state, N, 64, 64);
    fg_tile_load<N, 256>(m->pull, k.pulls + state, N, 64, 64);
    fg_floats_load<256>((float *)m->sum, (const float *)(k.d.sum + at), 2 * CHUNK);
    fg_floats_load<256>(m->dt, k.d.dt + at, CHUNK);
    fg_floats_load<256>(m->keep, k.d.keep + at, CHUNK);
    fg_floats_load<256>(m->left, k.d.left + at, CHUNK);
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
static __device__ __forceinline__ void put_rows(const lot &l, float *to, float low, float high)
{
    low = quad_sum(low);
    high = quad_sum(high);
    if (l.c == 0) to[l.row + l.g] = low, to[l.row + l.g + 8] = high;
}

/* q and its sums of z; (c_i.b_j) L_ij to shared memory.  a: gy's fragments of the rows. */
template <int N>
static __device__ __forceinline__ void pairs(shared<N> *m, const tile<N> *h, const lot &l,
                                             const uint32_t (*a)[4], kept<N> *k)
{
    float e[4][4] = {}, row[2] = { 0 };
    const uint32_t x = fg_shared(h->x);
    const bool seen = 32 * l.half <= l.row + 15;
#pragma unroll
    for (int p = 0; p < 4; p++)
#pragma unroll
        for (int n = 0; n < 2; n++) {
            if (!seen) continue;
            uint32_t v[4];
            fg_b_trans<64>(v, x, 16 * p, 32 * l.half + 16 * n);
            fg_mma(e[2 * n], a[p], v[0], v[1]);
            fg_mma(e[2 * n + 1], a[p], v[2], v[3]);
        }
    const int i0 = l.row + l.g;
    const float2 own[2] = { h->sum[i0], h->sum[i0 + 8] };
    const int seg[2] = { m->segment[i0], m->segment[i0 + 8] };
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const int j = 32 * l.half + 8 * n + l.c;
        const float4 s = *(const float4 *)(h->sum + j);
        const float2 dt = *(const float2 *)(h->dt + j);
        const int2 segs = *(const int2 *)(m->segment + j);
        float column[2] = { 0 };
#pragma unroll
        for (int low = 0; low < 2; low++) {
            const int i = i0 + 8 * low;
            const float u = fg_exp2(fg_two_diff(own[low], make_float2(s.x, s.y)));
            const float v = fg_exp2(fg_two_diff(own[low], make_float2(s.z, s.w)));
            const bool sees = j <= i && segs.x == seg[low], also = j < i && segs.y == seg[low];
            const float s0 = k->score[n][2 * low], s1 = k->score[n][2 * low + 1];
            const float q0 = sees ? e[n][2 * low] * u * dt.x : 0.0f;
            const float q1 = also ? e[n][2 * low + 1] * v * dt.y : 0.0f;
            const float z0 = j < i && sees ? s0 * q0 : 0.0f;
            const float z1 = j + 1 < i && also ? s1 * q1 : 0.0f;
            k->q[n][2 * low] += q0;
            k->q[n][2 * low + 1] += q1;
            row[low] += z0 + z1;
            column[0] += z0;
            column[1] += z1;
            *(uint32_t *)((char *)m->w + fg_swizzle<64>(i, j / 8) + 2 * l.c)
                = fg_pack2(sees ? s0 * u : 0.0f, also ? s1 * v : 0.0f);
        }
        column[0] = group_sum(column[0]);
        column[1] = group_sum(column[1]);
        if (l.g == 0) *(float2 *)&m->t.column[l.row / 16][j] = make_float2(column[0], column[1]);
    }
    put_rows(l, m->t.row[l.half], row[0], row[1]);
}

/* gc += keep_i S^T gy_i, and what that says of the decays. */
template <int N>
static __device__ __forceinline__ void from_state(shared<N> *m, const tile<N> *h, const lot &l,
                                                  const uint32_t (*a)[4], kept<N> *k)
{
    const int i = l.row + l.g;
    const float keep[2] = { h->keep[i], h->keep[i + 8] };
    const uint32_t state = fg_shared(h->state);
    float u[2] = { 0 };
#pragma unroll
    for (int n = 0; n < N / 32; n++) {
        const int n0 = N / 2 * l.half + 16 * n;
        float sum[2][4] = {};
#pragma unroll
        for (int p = 0; p < 4; p++) {
            uint32_t v[4];
            fg_b<N>(v, state, 16 * p, n0);
            fg_mma(sum[0], a[p], v[0], v[1]);
            fg_mma(sum[1], a[p], v[2], v[3]);
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
    put_rows(l, m->t.u[l.half], u[0], u[1]);
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
        uint32_t a[4];
        fg_a<N>(a, b, l.row, 16 * n);
#pragma unroll
        for (int p = 0; p < 2; p++) {
            uint32_t v[4];
            fg_b_trans<N>(v, pull, 16 * n, 32 * l.half + 16 * p);
            fg_mma(gu[2 * p], a, v[0], v[1]);
            fg_mma(gu[2 * p + 1], a, v[2], v[3]);
        }
    }
#pragma unroll
    for (int p = 0; p < 4; p++)
#pragma unroll
        for (int low = 0; low < 2; low++) {
            const float2 v = fg_pair<64>(h->x, j + 8 * low, 32 * l.half + 8 * p + l.c);
            gu[p][2 * low] *= left[low];
            gu[p][2 * low + 1] *= left[low];
            w[low] = fmaf(gu[p][2 * low], v.x, fmaf(gu[p][2 * low + 1], v.y, w[low]));
        }
    put_rows(l, m->t.w[l.half], w[0], w[1]);
#pragma unroll
    for (int p = 0; p < 4; p++) {
        uint32_t a[4];
        fg_a<64>(a, x, l.row, 16 * p);
        a[0] = fg_scale2(a[0], push[0], push[0]);
        a[1] = fg_scale2(a[1], push[1], push[1]);
        a[2] = fg_scale2(a[2], push[0], push[0]);
        a[3] = fg_scale2(a[3], push[1], push[1]);
#pragma unroll
        for (int n = 0; n < N / 32; n++) {
            uint32_t v[4];
            fg_b<N>(v, pull, 16 * p, N / 2 * l.half + 16 * n);
            fg_mma(k->gb[2 * n], a, v[0], v[1]);
            fg_mma(k->gb[2 * n + 1], a, v[2], v[3]);
        }
    }
#pragma unroll
    for (int i = threadIdx.x; i < 64 * N / 8; i += 256) {
        float s[8], r[8];
        fg_unpack(((const uint4 *)h->state)[i], s);
        fg_unpack(((const uint4 *)h->pull)[i], r);
#pragma unroll
        for (int e = 0; e < 8; e++) both = fmaf(s[e], r[e], both);
    }
    both = fg_warp_sum(both);
    if (threadIdx.x % 32 == 0) m->t.both[threadIdx.x / 32] = both;
}

/* gu += sum_(i>=j) w_ij gy_i; gx. */
template <int N>
static __device__ __forceinline__ void finish(const chunks &k, shared<N> *m, const tile<N> *h,
                                              const lot &l, float (*gu)[4], int64_t b, int64_t t0,
                                              int64_t head)
{
    const int j = l.row + l.g;
    const uint32_t w = fg_shared(m->w), gy = fg_shared(h->gy);
    const float skip = k.skip ? k.skip[head] : 0.0f;
    float on_x[2] = { 0 }, on_y[2] = { 0 };
#pragma unroll
    for (int i = 0; i < CHUNK; i += 16) {
        if (i < l.row) continue;
        uint32_t a[4];
        fg_a_trans<64>(a, w, l.row, i);
#pragma unroll
        for (int p = 0; p < 2; p++) {
            uint32_t v[4];
            fg_b<64>(v, gy, i, 32 * l.half + 16 * p);
            fg_mma(gu[2 * p], a, v[0], v[1]);
            fg_mma(gu[2 * p + 1], a, v[2], v[3]);
        }
    }
#pragma unroll
    for (int low = 0; low < 2; low++) {
        const int r = j + 8 * low;
        const bool pad = m->segment[r] < 0;
        bf16 *to = k.gx + ((b * k.z.T + t0 + r) * k.z.H + head) * 64 + 32 * l.half + l.c;
#pragma unroll
        for (int p = 0; p < 4; p++) {
            const float2 x = fg_pair<64>(h->x, r, 32 * l.half + 8 * p + l.c);
            const float2 y = fg_pair<64>(h->gy, r, 32 * l.half + 8 * p + l.c);
            const float u = gu[p][2 * low], v = gu[p][2 * low + 1];
            on_x[low] = fmaf(u, x.x, fmaf(v, x.y, on_x[low]));
            on_y[low] = fmaf(y.x, x.x, fmaf(y.y, x.y, on_y[low]));
            const float dt = h->dt[r];
            const uint32_t g = fg_pack2(fmaf(dt, u, skip * y.x), fmaf(dt, v, skip * y.y));
            if (t0 + r < k.z.T) *(uint32_t *)(to + 8 * p) = pad ? 0u : g;
        }
    }
    put_rows(l, m->t.gu[l.half], on_x[0], on_x[1]);
    put_rows(l, m->t.gy[l.half], on_y[0], on_y[1]);
}

/* gb and gc: what q, summed over heads, adds; then out. */
template <int N>
static __device__ __forceinline__ void close(const chunks &k, shared<N> *m, const lot &l,
                                             kept<N> *r, int64_t b, int64_t t0, int64_t g,
                                             int64_t part)
{
    const uint32_t q = fg_shared(m->w), bs = fg_shared(m->b), cs = fg_shared(m->c);
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
        for (int low = 0; low < 2; low++)
            *(uint32_t *)((char *)m->w + fg_swizzle<64>(l.row + l.g + 8 * low, 4 * l.half + n)
                          + 2 * l.c) = fg_pack2(r->q[n][2 * low], r->q[n][2 * low + 1]);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < CHUNK; i += 16) {
        uint32_t a[4], at[4];
        const bool old = i <= l.row, late = i >= l.row;
        if (old) fg_a<64>(a, q, l.row, i);
        if (late) fg_a_trans<64>(at, q, l.row, i);
#pragma unroll
        for (int n = 0; n < N / 32; n++) {
            uint32_t v[4];
            if (old) {
                fg_b<N>(v, bs, i, N / 2 * l.half + 16 * n);
                fg_mma(r->gc[2 * n], a, v[0], v[1]);
                fg_mma(r->gc[2 * n + 1], a, v[2], v[3]);
            }
            if (late) {
                fg_b<N>(v, cs, i, N / 2 * l.half + 16 * n);
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
        const int64_t at = ((b * k.z.T + t) * k.z.G + g) * N + N / 2 * l.half + l.c;
#pragma unroll
        for (int n = 0; n < N / 16; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float vb = r->gb[n][2 * low + e], vc = r->gc[n][2 * low + e];
                if (k.s.parts == 1) {
                    k.gb.put(at + 8 * n + e, vb);
                    k.gc.put(at + 8 * n + e, vc);
                } else {
                    k.s.gb[part * all + at + 8 * n + e] = vb;
                    k.s.gc[part * all + at + 8 * n + e] = vc;
                }
            }
    }
}

/* A block is a chunk and some heads of a group. */
template <int N>
static __global__ void __launch_bounds__(256, 1) run_chunks(chunks k)
{
    extern __shared__ __align__(128) char memory[];
    shared<N> *m = (shared<N> *)memory;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const lot l = { warp / 2 * 16, warp % 2, lane / 4, 2 * (lane % 4) };
    int64_t i = blockIdx.x;
    const int64_t part = i % k.s.parts, g = (i /= k.s.parts) % k.z.G;
    const int64_t chunk = (i /= k.z.G) % k.d.chunks, b = i / k.d.chunks, t0 = chunk * CHUNK;
    const int64_t M = k.z.H / k.z.G, real = k.z.T - t0, token = b * k.z.T + t0;
    const int64_t h0 = g * M + M * part / k.s.parts, h1 = g * M + M * (part + 1) / k.s.parts;
    kept<N> r = {};
    fg_tile_load<N, 256>(m->b, k.b + token * k.b_row + g * N, k.b_row, CHUNK, real);
    fg_tile_load<N, 256>(m->c, k.c + token * k.c_row + g * N, k.c_row, CHUNK, real);
    if (threadIdx.x < CHUNK) m->segment[threadIdx.x] = k.d.segment[b * k.d.padded + t0
                                                                  + threadIdx.x];
    load_head<N>(k, &m->tiles[0], b, chunk, h0);
    fg_copy_commit();
    fg_copy_wait<0>();
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N / 16; n++) {
        uint32_t a[4];
        fg_a<N>(a, fg_shared(m->c), l.row, 16 * n);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            uint32_t v[4];
            fg_b_trans<N>(v, fg_shared(m->b), 16 * n, 32 * l.half + 16 * j);
            fg_mma(r.score[2 * j], a, v[0], v[1]);
            fg_mma(r.score[2 * j + 1], a, v[2], v[3]);
        }
    }
    for (int64_t h = h0; h < h1; h++) {
        const int stage = (int)((h - h0) % 2);
        const tile<N> *own = &m->tiles[stage];
        fg_copy_wait<0>();
        __syncthreads();
        if (h + 1 < h1) load_head<N>(k, &m->tiles[1 - stage], b, chunk, h + 1);
        fg_copy_commit();
        uint32_t a[4][4];
        float gu[4][4] = {};
#pragma unroll
        for (int p = 0; p < 4; p++) fg_a<64>(a[p], fg_shared(own->gy), l.row, 16 * p);
        pairs<N>(m, own, l, a, &r);
        from_state<N>(m, own, l, a, &r);
        to_state<N>(m, own, l, gu, &r);
        __syncthreads();
        finish<N>(k, m, own, l, gu, b, t0, h);
        __syncthreads();
        if (warp == (int)(h % 8)) {
            const int64_t at = (b * k.d.chunks + chunk) * k.z.H + h;
            settle(m->t, own->dt, m->segment, k.rate[h],
                   k.d.whole[(b * k.z.H + h) * k.d.chunks + chunk], real,
                   k.gdt + token * k.z.H + h, k.z.H, k.s.ga + at, k.s.gd + at);
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
    run_chunks<N><<<blocks, 256, bytes, stream>>>(k);
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
    float *gdt, *gstate;
    float *own;                                  /* scratch, `each` floats a block */
    int64_t each;
};

/* A block's own memory: states [chunks][P][N], s, r [P][N], w, q, z [64][64], gu, part [64][P],
 * inter [64][N]. */
static int64_t plain_floats(const fg_ssd &z, int64_t chunks)
{
    return (chunks + 2) * z.P * z.N + 3 * CHUNK * CHUNK + 2 * CHUNK * z.P + CHUNK * z.N;
}
struct work { float *states, *s, *r, *w, *q, *z, *gu, *part, *inter; };

/* A chunk of one head, as the kernels below see it. */
struct view { int64_t b, h, g, chunk, token, at; int real; };

/* s = whole s + sum_j weight_j u_jp v_jn */
static __device__ __forceinline__ void advance(const plain &k, const view &v, const rows_of &u, const rows_of &y,
                               const float *weight, float *s)
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

static __device__ __forceinline__ void plain_pairs(const plain &k, const view &v, const int32_t *segment,
                                   const work &m)
{
    for (int i0 = threadIdx.x; i0 < CHUNK * CHUNK; i0 += blockDim.x) {
        const int i = i0 / CHUNK, j = i0 % CHUNK;
        float w = 0, q = 0, z = 0;
        if (j <= i && i < v.real && segment[i] == segment[j]) {
            float e = 0, score = 0;
            for (int64_t p = 0; p < k.z.P; p++)
                e = fmaf(get(k.gy, v.token + i, v.h * k.z.P + p),
                         get(k.x, v.token + j, v.h * k.z.P + p), e);
            for (int64_t n = 0; n < k.z.N; n++)
                score = fmaf(get(k.c, v.token + i, v.g * k.z.N + n),
                             get(k.b, v.token + j, v.g * k.z.N + n), score);
            const float d = exp2f(fg_two_diff(k.d.sum[v.at + i], k.d.sum[v.at + j]));
            w = score * d;
            q = e * d * k.d.dt[v.at + j];
            z = j < i ? q * score : 0;
        }
        m.w[i0] = w;
        m.q[i0] = q;
        m.z[i0] = z;
    }
    __syncthreads();
}

/* gu and its part through the state; gb, gc added to this task's sums. */
static __device__ __forceinline__ void plain_products(const plain &k, const view &v, const work &m, float *gb,
                                      float *gc)
{
    const int64_t P = k.z.P, N = k.z.N;
    for (int64_t i = threadIdx.x; i < v.real * P; i += blockDim.x) {
        const int64_t j = i / P, p = i % P;
        float sum = 0, pairs = 0;
        for (int64_t n = 0; n < N; n++)
            sum = fmaf(m.r[p * N + n], get(k.b, v.token + j, v.g * N + n), sum);
        for (int64_t t = j; t < v.real; t++)
            pairs = fmaf(m.w[t * CHUNK + j], get(k.gy, v.token + t, v.h * P + p), pairs);
        m.part[i] = k.d.left[v.at + j] * sum;
        m.gu[i] = pairs + m.part[i];
    }
    for (int64_t i = threadIdx.x; i < v.real * N; i += blockDim.x) {
        const int64_t t = i / N, n = i % N, to = ((v.token + t) * k.z.G + v.g) * N + n;
        float back = 0, on = 0, c = 0, b = 0;
        for (int64_t p = 0; p < P; p++) {
            back = fmaf(m.s[p * N + n], get(k.gy, v.token + t, v.h * P + p), back);
            on = fmaf(m.r[p * N + n], get(k.x, v.token + t, v.h * P + p), on);
        }
        for (int64_t j = 0; j <= t; j++)
            c = fmaf(m.q[t * CHUNK + j], get(k.b, v.token + j, v.g * N + n), c);
        for (int64_t j = t; j < v.real; j++)
            b = fmaf(m.q[j * CHUNK + t], get(k.c, v.token + j, v.g * N + n), b);
        m.inter[i] = k.d.keep[v.at + t] * back;
        gc[to] += c + m.inter[i];
        gb[to] += fmaf(k.d.push[v.at + t], on, b);
    }
    __syncthreads();
}

/* A warp per token. */
static __device__ __forceinline__ void plain_totals(const plain &k, const view &v, const int32_t *segment,
                                    const work &m, totals *t)
{
    const int lane = threadIdx.x % 32;
    const int64_t P = k.z.P, N = k.z.N;
    const float skip = k.skip.p ? k.skip[v.h] : 0.0f;
    for (int i = threadIdx.x / 32; i < CHUNK; i += blockDim.x / 32) {
        float row = 0, column = 0, u = 0, w = 0, gu = 0, gy = 0;
        for (int j = lane; j < CHUNK; j += 32) {
            row += m.z[i * CHUNK + j];
            column += m.z[j * CHUNK + i];
        }
        for (int64_t n = lane; n < N && i < v.real; n += 32)
            u = fmaf(m.inter[i * N + n], get(k.c, v.token + i, v.g * N + n), u);
        for (int64_t p = lane; p < P && i < v.real; p += 32) {
            const float x = get(k.x, v.token + i, v.h * P + p);
            const float y = get(k.gy, v.token + i, v.h * P + p), g = m.gu[i * P + p];
            w = fmaf(m.part[i * P + p], x, w);
            gu = fmaf(g, x, gu);
            gy = fmaf(y, x, gy);
            k.gx.put(((v.token + i) * k.z.H + v.h) * P + p,
                     segment[i] < 0 ? 0.0f : fmaf(k.d.dt[v.at + i], g, skip * y));
        }
        row = fg_warp_sum(row), column = fg_warp_sum(column), u = fg_warp_sum(u);
        w = fg_warp_sum(w), gu = fg_warp_sum(gu), gy = fg_warp_sum(gy);
        if (lane) continue;
        t->row[0][i] = row, t->column[0][i] = column, t->u[0][i] = u, t->w[0][i] = w;
        t->gu[0][i] = gu, t->gy[0][i] = gy;
        t->row[1][i] = t->u[1][i] = t->w[1][i] = t->gu[1][i] = t->gy[1][i] = 0;
        t->column[1][i] = t->column[2][i] = t->column[3][i] = 0;
    }
    float both = 0;
    for (int64_t i = threadIdx.x; i < P * N; i += blockDim.x) both = fmaf(m.s[i], m.r[i], both);
    both = fg_warp_sum(both);
    if (lane == 0) t->both[threadIdx.x / 32] = both;
    __syncthreads();
}

static __device__ __forceinline__ void plain_head(const plain &k, view v, const work &m, float *gb, float *gc)
{
    __shared__ totals t;
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
        plain_pairs(k, v, segment, m);
        plain_products(k, v, m, gb, gc);
        plain_totals(k, v, segment, m, &t);
        const int64_t at = (v.b * k.d.chunks + v.chunk) * z.H + v.h;
        if (threadIdx.x < 32)
            settle(t, k.d.dt + v.at, segment, k.a[v.h], k.d.whole[row * k.d.chunks + v.chunk],
                   v.real, k.gdt + v.token * z.H + v.h, z.H, k.s.ga + at, k.s.gd + at);
        advance(k, v, k.gy, k.c, k.d.keep, m.r);
    }
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) k.gstate[row * size + i] = m.r[i];
    __syncthreads();
}

static __global__ void __launch_bounds__(256, 1) run_plain(plain k)
{
    const fg_ssd &z = k.z;
    const int64_t task = blockIdx.x % k.s.parts, g = blockIdx.x / k.s.parts % z.G;
    const int64_t b = blockIdx.x / k.s.parts / z.G, M = z.H / z.G, size = z.P * z.N;
    const int64_t all = z.B * z.T * z.G * z.N;
    float *own = k.own + blockIdx.x * k.each, *gb = k.s.gb + task * all, *gc = k.s.gc + task * all;
    work m;
    m.states = own;
    m.s = m.states + k.d.chunks * size, m.r = m.s + size;
    m.w = m.r + size, m.q = m.w + CHUNK * CHUNK, m.z = m.q + CHUNK * CHUNK;
    m.gu = m.z + CHUNK * CHUNK, m.part = m.gu + CHUNK * z.P, m.inter = m.part + CHUNK * z.P;
    for (int64_t i = threadIdx.x; i < z.T * z.N; i += blockDim.x) {
        const int64_t at = ((b * z.T + i / z.N) * z.G + g) * z.N + i % z.N;
        gb[at] = gc[at] = 0;
    }
    __syncthreads();
    for (int64_t h = g * M + M * task / k.s.parts; h < g * M + M * (task + 1) / k.s.parts; h++)
        plain_head(k, { b, h, g, 0, 0, 0, 0 }, m, gb, gc);
}

/* ---- sums of parts, in order ----------------------------------------------------------------- */

static __global__ void __launch_bounds__(256)
add_parts(sums s, fg_out gb, fg_out gc, int64_t n)
{
    const int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    float b = 0, c = 0;
    if (i >= n) return;
    for (int64_t k = 0; k < s.parts; k++) b += s.gb[k * n + i], c += s.gc[k * n + i];
    gb.put(i, b);
    gc.put(i, c);
}
static __global__ void __launch_bounds__(256)
add_chunks(sums s, int64_t rows, int64_t H, fg_out ga, fg_out gd)
{
    const int64_t h = blockIdx.x;
    float a = 0, d = 0;
    for (int64_t i = threadIdx.x; i < rows; i += 256) a += s.ga[i * H + h], d += s.gd[i * H + h];
    a = fg_block_sum<256>(a);
    d = fg_block_sum<256>(d);
    if (threadIdx.x == 0) ga.put(h, a), gd.put(h, d);
}

/* ---- which ----------------------------------------------------------------------------------- */

static bool in_chunks(const fg_infer *c)
{
    return c->in[X].dim[1] > 16 && fg_ssd_fits(c, X, B_IN) && c->given[GY]
           && c->in_type[GY] == FG_BF16 && c->out_type[GX] == FG_BF16
           && c->in_type[DT] == FG_F32 && c->in_type[A] == FG_F32
           && (!c->given[D] || c->in_type[D] == FG_F32);
}

struct layout { fg_decays d; sums s; bf16 *states, *pulls; float *own; };

static layout cut(const fg_ssd &z, bool tensor, void *base, size_t *used)
{
    layout m = {};
    m.d = fg_decays_cut(base, used, z, CHUNK);
    const int64_t each = z.B * m.d.chunks * z.G, M = z.H / z.G;
    int64_t parts = tensor ? (BLOCKS + each - 1) / each : TASKS;
    parts = parts < M ? parts : M;
    m.s = sums_cut(base, used, z, m.d.chunks, parts);
    const int64_t states = z.B * z.H * m.d.chunks * z.P * z.N;
    if (tensor) {
        m.states = (bf16 *)fg_ssd_cut(base, used, states, sizeof(bf16));
        m.pulls = (bf16 *)fg_ssd_cut(base, used, states, sizeof(bf16));
    } else {
        m.own = (float *)fg_ssd_cut(base, used, z.B * z.G * parts * plain_floats(z, m.d.chunks),
                                    sizeof(float));
    }
    return m;
}

static void chunks_launch(const fg_exec *e, const fg_ssd &z, const layout &m, cudaStream_t stream)
{
    chunks k = {};
    k.z = z, k.d = m.d, k.s = m.s, k.states = m.states, k.pulls = m.pulls;
    k.x = (const bf16 *)e->in[X], k.gy = (const bf16 *)e->in[GY];
    k.b = (const bf16 *)e->in[B_IN], k.c = (const bf16 *)e->in[C_IN];
    k.x_row = fg_pitch_of(&e->in_rows[X], z.H * z.P);
    k.gy_row = fg_pitch_of(&e->in_rows[GY], z.H * z.P);
    k.b_row = fg_pitch_of(&e->in_rows[B_IN], z.G * z.N);
    k.c_row = fg_pitch_of(&e->in_rows[C_IN], z.G * z.N);
    k.skip = (const float *)e->in[D], k.rate = (const float *)e->in[A];
    k.gx = (bf16 *)e->out[GX], k.gdt = (float *)e->out[GDT];
    k.gb = fg_output_of(e, GB), k.gc = fg_output_of(e, GC);
    fg_states_launch<CHUNK>(z, m.d, { k.x, k.b, k.x_row, k.b_row, m.d.push,
                                      (const float *)e->in[STATE], NULL, m.states, false }, stream);
    fg_states_launch<CHUNK>(z, m.d, { k.gy, k.c, k.gy_row, k.c_row, m.d.keep,
                                      (const float *)e->in[GEND], (float *)e->out[GSTATE],
                                      m.pulls, true }, stream);
    if (z.N == 128) run_chunks_launch<128>(k, stream);
    else run_chunks_launch<64>(k, stream);
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
                      fg_output_of(e, GX), (float *)e->out[GDT], (float *)e->out[GSTATE], m.own,
                      plain_floats(z, m.d.chunks) };
    run_plain<<<(unsigned)(z.B * z.G * m.s.parts), 256, 0, stream>>>(k);
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    fg_ssd z = fg_ssd_of(&e->in_shape[X], &e->in_shape[B_IN]);
    fg_infer c = {};
    for (int i = 0; i < e->n_in; i++) {
        c.given[i] = e->in[i] != NULL;
        c.in[i] = e->in_shape[i];
        c.in_type[i] = e->in_type[i];
    }
    c.out_type[GX] = e->out_type[GX];
    z.first = (const int32_t *)e->in[FIRST];
    z.resets = z.first != NULL;
    const bool tensor = in_chunks(&c);
    size_t used = 0;
    const layout m = cut(z, tensor, e->scratch, &used);
    fg_decays_fill<CHUNK><<<(unsigned)(z.B * m.d.chunks), 256, 0, stream>>>(
        z, (const float *)e->in[DT], (const float *)e->in[A], m.d);
    if (tensor) chunks_launch(e, z, m, stream);
    else plain_launch(e, z, m, stream);
    const int64_t n = z.B * z.T * z.G * z.N;
    if (!tensor || m.s.parts > 1)
        add_parts<<<fg_blocks(n, 256), 256, 0, stream>>>(m.s, fg_output_of(e, GB),
                                                         fg_output_of(e, GC), n);
    add_chunks<<<(unsigned)z.H, 256, 0, stream>>>(m.s, z.B * m.d.chunks, z.H, fg_output_of(e, GA),
                                                  fg_output_of(e, GD));
}

static size_t scratch(const fg_infer *c)
{
    size_t used = 0;
    cut(fg_ssd_of(&c->in[X], &c->in[B_IN]), in_chunks(c), NULL, &used);
    return used;
}

static const char *unfit(const fg_infer *c)
{
    const bool wide = c->in_type[DT] == FG_F32 && c->in_type[A] == FG_F32;
    return wide && c->out_type[GDT] == FG_F32 ? NULL : "dt and a must be f32";
}

FG_KERNEL(ssd_scan_grad) = { .launch = launch, .unfit = unfit, .scratch = scratch,
                             .pitched_in = 1u << GY | 1u << X | 1u << B_IN | 1u << C_IN };
