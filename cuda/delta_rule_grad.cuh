/* delta_rule_grad.cuh - the gradient of the delta rule in chunks, of what prepare of delta_rule.cuh
 * has written: the chain both ways, then `join`, which needs no chunk but its own. */
#ifndef FG_DELTA_RULE_GRAD_CUH
#define FG_DELTA_RULE_GRAD_CUH
#include "delta_rule.cuh"

struct way_back {
    operands s;
    bf16 *e, *gu;                                /* [B,H,chunks*64,128] */
    bf16 *S, *R;                                 /* [B,H,chunks,128,128] */
};

/* All but what prepare writes. */
static way_back cut_way_back(char *base, size_t *used, const la_task &z)
{
    const size_t tiles = (size_t)(z.B * z.H * z.chunks);
    way_back w = {};
    w.e = (bf16 *)la_cut(base, used, tiles * LA_ROWS * LA_WIDTH * sizeof(bf16));
    w.gu = (bf16 *)la_cut(base, used, tiles * LA_ROWS * LA_WIDTH * sizeof(bf16));
    w.S = (bf16 *)la_cut(base, used, tiles * LA_WIDTH * LA_WIDTH * sizeof(bf16));
    w.R = (bf16 *)la_cut(base, used, tiles * LA_WIDTH * LA_WIDTH * sizeof(bf16));
    return w;
}

struct gradients {                               /* rows as those of inputs */
    bf16 *q, *k, *v;
    int64_t q_row, k_row, v_row;
    fg_out beta;
};

/* Matrices in panels of 64 columns (wgmma.cuh). */
struct alignas(1024) joined {
    bf16 k[LA_ROWS * LA_WIDTH], q[LA_ROWS * LA_WIDTH], go[LA_ROWS * LA_WIDTH];
    bf16 e[LA_ROWS * LA_WIDTH], g[LA_ROWS * LA_WIDTH];       /* g: gu, then ge */
    bf16 S[LA_WIDTH * LA_WIDTH], R[LA_WIDTH * LA_WIDTH];     /* [value][key] */
    bf16 M[LA_ROWS * LA_ROWS];                               /* diag(beta) M */
    bf16 P[LA_ROWS * LA_ROWS], X[LA_ROWS * LA_ROWS];         /* scale P, -X */
    float beta[LA_ROWS], part[2][LA_ROWS], along[2][2][LA_ROWS];
    int start[LA_ROWS];
    uint32_t marks[2];
    uint64_t come[3];                            /* barriers: what is needed first, next, last */
};
/* For the copy engine. */
struct join_maps { CUtensorMap k, q, go, e, gu, M, S, R; };

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
struct place { int64_t tile, token; int chunks, chunk, b, h, n; };
static __device__ __forceinline__ place place_of(const la_task &z, int tile)
{
    place p;
    const int chunks = (int)z.chunks, heads = (int)z.H, bh = tile / chunks;
    p.tile = tile, p.chunks = chunks, p.chunk = tile - bh * chunks;
    p.b = bh / heads, p.h = bh - p.b * heads;
    p.token = p.b * z.T + (int64_t)p.chunk * LA_ROWS;
    p.n = la_rows(z, p.chunk);
    return p;
}

/* By one thread. */
template <bool UNIT>
static __device__ __forceinline__ void load_all(joined *sm, const place &p, const float *beta,
                                                const join_maps &m)
{
    const la_rows_of own = {}, mixed = { nullptr, 0, LA_WIDTH, 0 };
    const la_span s = { p.tile / p.chunks, p.b, p.h };
    const uint32_t first = fg_shared(sm->come), next = first + 8, last = first + 16;
    fg_expect(first, 3 * LA_PANEL + LA_ROWS * (int)sizeof(float));
    la_box<LA_WIDTH>(sm->g, &m.gu, own, s, p.chunk, 0, first);
    la_box<LA_ROWS>(sm->M, &m.M, own, s, p.chunk, 0, first);
    fg_bulk_load(fg_shared(sm->beta), beta + p.tile * LA_ROWS, LA_ROWS * sizeof(float), first);
    fg_expect(next, 4 * LA_PANEL);
    la_box<LA_WIDTH>(sm->e, &m.e, own, s, p.chunk, 0, next);
    la_box<LA_WIDTH>(sm->go, &m.go, mixed, s, p.chunk, 0, next);
    fg_expect(last, 12 * LA_PANEL);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        fg_box_load(fg_shared(sm->S) + 2 * i * LA_PANEL, &m.S, 64 * i, 0, 0, (int)p.tile, last);
        fg_box_load(fg_shared(sm->R) + 2 * i * LA_PANEL, &m.R, 64 * i, 0, 0, (int)p.tile, last);
    }
    la_box<LA_WIDTH>(sm->k, &m.k, UNIT ? own : mixed, s, p.chunk, 0, last);
    la_box<LA_WIDTH>(sm->q, &m.q, UNIT ? own : mixed, s, p.chunk, 0, last);
}

static __device__ __forceinline__ float quad_sum(float x)
{
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
static __device__ __forceinline__ void take_pairs(uint32_t (&a)[16], bf16 *x)
{
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            a[2 * j + i] = *la_pair<64>(x, own_row() + 8 * i, 8 * j + own_column());
}
static __device__ __forceinline__ void put_half(bf16 *to, int64_t row, int n,
                                                const float (&x)[8][4])
{
    const int r = own_row();
    to += r * row + own_column();
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (r + 8 * i < n)
                *(uint32_t *)(to + 8 * i * row + 8 * j) = fg_pack2(x[j][2 * i], x[j][2 * i + 1]);
}

/* d = x M for 64 keys */
static __device__ __forceinline__ void by_state(float (&d)[8][4], const bf16 *x, const bf16 *M)
{
#pragma unroll
    for (int k = 0; k < 8; k++)
        product_rows<false>(d, matrix_at(fg_shared(x) + k / 4 * LA_PANEL + k % 4 * 32, 16),
                            matrix_at(fg_shared(M) + k * 2048, 2 * LA_PANEL), k);
}

/* sign x y^T, columns times factor[s], where s <= t - gap and both are of one document. */
static __device__ __forceinline__ void pair_block(const joined *sm, const bf16 *x, const bf16 *y,
                                                  int gap, const float *factor, float sign,
                                                  bf16 *to)
{
    float d[8][4];
    wgmma_begin();
    by_columns(d, x, y);
    wgmma_commit();
    wgmma_wait<0>();
    pin(d);
    mask_pairs(d, sm->start, gap);
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            d[j][i] *= factor ? sign * factor[8 * j + own_column() + i % 2] : sign;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        uint32_t a[4];
        la_operand(a, d[2 * k], d[2 * k + 1]);
        la_share<64>(a, to, threadIdx.x % 128 / 32 * 16, 16 * k);
    }
    proxy_fence();
}

/* The products y.e of 64 columns, to part.  y = ge / beta, but where beta is almost 0: the
 * difference would cancel where keys are alike. */
#define ALMOST (1 / 64.0f)
template <bool SMALL>
static __device__ __forceinline__ void errors(joined *sm, const float (&ge)[8][4],
                                              const float (&Nge)[8][4], const bf16 *gu)
{
    const int half = threadIdx.x / 128;
    uint32_t e[16];
    take_pairs(e, sm->e + half * (LA_PANEL / 2));
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = own_row() + 8 * i;
        const float beta = sm->beta[r], over = fabsf(beta) > ALMOST ? 1 / beta : 0;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const uint32_t v = e[2 * j + i];
            float y = over * ge[j][2 * i], z = over * ge[j][2 * i + 1];
            if (SMALL && over == 0) {
                const uint32_t u = *(const uint32_t *)(gu + r * LA_WIDTH + half * 64 + 8 * j
                                                       + own_column());
                y = la_low_half(u) - Nge[j][2 * i];
                z = la_high_half(u) - Nge[j][2 * i + 1];
            }
            sum = fmaf(y, la_low_half(v), sum);
            sum = fmaf(z, la_high_half(v), sum);
        }
        sum = quad_sum(sum);
        if (threadIdx.x % 4 == 0) sm->part[half][r] = sum;
    }
}

/* What 64 columns add to the products x.g of the rows, to `to`. */
static __device__ __forceinline__ void along_rows(const uint32_t (&x)[16], const float (&g)[8][4],
                                                  float *to)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            sum = fmaf(la_low_half(x[2 * j + i]), g[j][2 * i], sum);
            sum = fmaf(la_high_half(x[2 * j + i]), g[j][2 * i + 1], sum);
        }
        sum = quad_sum(sum);
        if (threadIdx.x % 4 == 0) to[own_row() + 8 * i] = sum;
    }
}
/* g = by (g - x (x.g)): from the gradient by rows of unit length to that by what was scaled. */
static __device__ __forceinline__ void unscale(const uint32_t (&x)[16], float (&g)[8][4],
                                               const float along[2][LA_ROWS], const float *by,
                                               int n)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int t = own_row() + 8 * i;
        const float sum = along[0][t] + along[1][t], scale = t < n ? by[t] : 0;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            g[j][2 * i] = scale * fmaf(-sum, la_low_half(x[2 * j + i]), g[j][2 * i]);
            g[j][2 * i + 1] = scale * fmaf(-sum, la_high_half(x[2 * j + i]), g[j][2 * i + 1]);
        }
    }
}

/* ge of 64 columns by each of the first two warpgroups, in the place of gu. */
static __device__ __forceinline__ void solve_back(joined *sm, float (&ge)[8][4])
{
    const int half = threadIdx.x / 128;
    bf16 *g = sm->g + half * (LA_PANEL / 2);
    wgmma_begin();
    by_rows<true>(ge, sm->M, g, false);
    wgmma_commit();
    wgmma_wait<0>();
    pin(ge);
    asm volatile("bar.sync %0, 128;" :: "r"(1 + half) : "memory");
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            *la_pair<64>(g, own_row() + 8 * i, 8 * j + own_column()) =
                fg_pack2(ge[j][2 * i], ge[j][2 * i + 1]);
    proxy_fence();
}

/* gq of 64 keys by each of the first two warpgroups, gk by each of the others. */
static __device__ __forceinline__ void query_half(const joined *sm, int half, float scale,
                                                  float (&g)[8][4])
{
    wgmma_begin();
    by_state(g, sm->go, sm->S + half * LA_PANEL);
    wgmma_commit();
    wgmma_wait<0>();
    pin(g);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const bool reached = sm->start[own_row() + 8 * i] == -1;
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int c = 2 * i; c < 2 * i + 2; c++) g[j][c] = reached ? scale * g[j][c] : 0;
    }
    pin(g);
    wgmma_begin();
    by_rows<false>(g, sm->P, sm->k + half * (LA_PANEL / 2), true);
    wgmma_commit();
    wgmma_wait<0>();
    pin(g);
}
static __device__ __forceinline__ void key_half(const joined *sm, int half, int n, float scale,
                                                float (&g)[8][4])
{
    float r[8][4];
    wgmma_begin();
    by_state(g, sm->g, sm->S + half * LA_PANEL);
    by_state(r, sm->e, sm->R + half * LA_PANEL);
    wgmma_commit();
    wgmma_wait<0>();
    pin(g), pin(r);
    const int last = sm->start[n - 1];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int t = own_row() + 8 * i;
        const bool reached = sm->start[t] == -1, passes = la_passes(t, n, last);
        const float by = scale * sm->beta[t];
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int c = 2 * i; c < 2 * i + 2; c++)
                g[j][c] = (passes ? by * r[j][c] : 0) - (reached ? g[j][c] : 0);
    }
    pin(g);
    const bf16 *k = sm->k + half * (LA_PANEL / 2);
    wgmma_begin();
    by_rows<true>(g, sm->P, sm->q + half * (LA_PANEL / 2), true);
    by_rows<false>(g, sm->X, k, true);
    by_rows<true>(g, sm->X, k, true);
    wgmma_commit();
    wgmma_wait<0>();
    pin(g);
}

/* The same where a beta is almost 0: N^T ge is needed, and N stands where P will. */
static __device__ __forceinline__ void small_errors(joined *sm, const float (&ge)[8][4],
                                                    const bf16 *gu, int phase)
{
    const int group = threadIdx.x / 128;
    barrier_wait(fg_shared(sm->come + 2), phase);
    if (group == 2) pair_block(sm, sm->k, sm->k, 1, nullptr, 1, sm->P);
    __syncthreads();
    if (group < 2) {
        float Nge[8][4];
        wgmma_begin();
        by_rows<true>(Nge, sm->P, sm->g + group * (LA_PANEL / 2), false);
        wgmma_commit();
        wgmma_wait<0>();
        pin(Nge);
        errors<true>(sm, ge, Nge, gu);
    }
    __syncthreads();
}

/* gv, gbeta, and P and X for the rest */
static __device__ __forceinline__ void join_pairs(joined *sm, const la_task &z, const place &p,
                                                  const bf16 *gu, const gradients &to,
                                                  int phase)
{
    const int group = threadIdx.x / 128;
    float ge[8][4];
    barrier_wait(fg_shared(sm->come), phase);
    const bool small = threadIdx.x < p.n && !(fabsf(sm->beta[threadIdx.x]) > ALMOST);
    if (group < 2) {
        solve_back(sm, ge);
        put_half(to.v + p.token * to.v_row + p.h * LA_WIDTH + group * 64, to.v_row, p.n, ge);
    }
    barrier_wait(fg_shared(sm->come + 1), phase);
    if (__syncthreads_or(small)) small_errors(sm, ge, gu, phase);
    else if (group < 2) errors<false>(sm, ge, ge, gu);
    if (group == 2) pair_block(sm, sm->go, sm->e, 0, sm->beta, z.scale, sm->P);
    if (group == 3) pair_block(sm, sm->g, sm->e, 1, sm->beta, -1, sm->X);
    barrier_wait(fg_shared(sm->come + 2), phase);
    __syncthreads();
    if (threadIdx.x < p.n)
        to.beta.put((p.token + threadIdx.x) * z.H + p.h,
                    sm->part[0][threadIdx.x] + sm->part[1][threadIdx.x]);
}

template <bool UNIT>
static __device__ __forceinline__ void join_tiles(joined *sm, const la_task &z, const way_back &w,
                                                  const gradients &to, const join_maps &m)
{
    const int tiles = (int)(z.B * z.H * z.chunks);
    const int group = threadIdx.x / 128, half = group % 2, key = group / 2;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 3; i++) barrier_init(fg_shared(sm->come + i), 1);
        fg_barriers_ready();
        load_all<UNIT>(sm, place_of(z, blockIdx.x), w.s.beta, m);
    }
    int phase = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, phase ^= 1) {
        const place p = place_of(z, tile);
        float g[8][4];
        uint32_t own[16];
        la_starts(z, p.b, p.chunk, sm->start, sm->marks);
        join_pairs(sm, z, p, w.gu + p.tile * LA_ROWS * LA_WIDTH, to, phase);
        if (key) key_half(sm, half, p.n, z.scale, g);
        else query_half(sm, half, z.scale, g);
        if (UNIT) {
            take_pairs(own, (key ? sm->k : sm->q) + half * (LA_PANEL / 2));
            along_rows(own, g, sm->along[key][half]);
        }
        __syncthreads();
        if (threadIdx.x == 0 && tile + (int)gridDim.x < tiles)
            load_all<UNIT>(sm, place_of(z, tile + (int)gridDim.x), w.s.beta, m);
        if (UNIT)
            unscale(own, g, sm->along[key], (key ? w.s.k_scale : w.s.q_scale) + p.tile * LA_ROWS,
                    p.n);
        const int64_t row = key ? to.k_row : to.q_row;
        put_half((key ? to.k : to.q) + p.token * row + p.h * LA_WIDTH + half * 64, row, p.n, g);
    }
}
#endif

/* A block takes chunk after chunk. */
template <bool UNIT>
static __global__ void __launch_bounds__(512, 1)
join(const __grid_constant__ la_task z, const __grid_constant__ way_back w,
     const __grid_constant__ gradients to, const __grid_constant__ join_maps m)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) char memory[];
    join_tiles<UNIT>((joined *)memory, z, w, to, m);
#endif
}

static join_maps join_maps_of(const la_task &z, const la_chain &back, const way_back &w)
{
    const fg_encode encode = fg_encoder();
    const la_rows_of e = { w.e, 0, 0, LA_WIDTH }, gu = { w.gu, 0, 0, LA_WIDTH };
    const la_rows_of M = { w.s.M, 0, 0, LA_ROWS };
    return { la_map_of(encode, z, back.k, LA_WIDTH), la_map_of(encode, z, back.q, LA_WIDTH),
             la_map_of(encode, z, back.u, LA_WIDTH),
             la_map_of(encode, z, e, LA_WIDTH), la_map_of(encode, z, gu, LA_WIDTH),
             la_map_of(encode, z, M, LA_ROWS),
             la_states_map(encode, z, w.S, LA_WIDTH), la_states_map(encode, z, w.R, LA_WIDTH) };
}

/* Of what prepare has written.  last: gradient of the last state, or NULL; to_first: of the
 * first. */
template <bool UNIT>
static void launch_backward(const la_task &z, const inputs &x, const bf16 *go, const float *last,
                            const way_back &w, const gradients &to, float *to_first,
                            cudaStream_t stream)
{
    const int64_t own = z.chunks * LA_ROWS * LA_WIDTH, row = z.H * LA_WIDTH;
    const int bytes = (int)sizeof(joined);
    la_chain forth = chain_of(z, w.s, x), back = forth;
    forth.kept = w.S;
    forth.o = { w.e, z.H * own, own, LA_WIDTH };
    back.kept = w.R;
    back.u = { go, z.T * row, LA_WIDTH, row };
    back.o = { w.gu, z.H * own, own, LA_WIDTH };
    back.from = last, back.to = to_first;
    la_run_both_ways<true>(forth, back, stream);
    cudaFuncSetAttribute(join<UNIT>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    const int64_t tiles = z.B * z.H * z.chunks, most = fg_processors();
    join<UNIT><<<(unsigned)(tiles < most ? tiles : most), 512, bytes, stream>>>(
        z, w, to, join_maps_of(z, back, w));
}
#endif
