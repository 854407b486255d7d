/* ssd_scan_sm90.cu - the chunks of ssd_scan on Hopper's wgmma.
 *
 * A block has a chunk of 128 tokens and walks some heads; ssd_scan.cu has the formulas.  Each of
 * two warpgroups has 64 tokens,
 *
 *     y = keep (c S^T) + W x + d x,    W_ij = (c_i.b_j) e^(sum_i - sum_j) dt_j
 *
 * with its scores in registers and W as an operand in registers; the second one has the 64 tokens
 * before its own as sources too.  One warp more loads, by the copy engine, some heads ahead. */
#include "ssd_sm90.cuh"

#define CHUNK   128
#define STAGES  3
#define THREADS 288

template <int N> struct head {
    alignas(1024) bf16 x[2 * PANEL];             /* 128 rows */
    bf16 state[N / 64 * PANEL];
    float2 sum[CHUNK];
    float dt[CHUNK], tail[CHUNK], keep[CHUNK];
};
template <int N> struct memory {
    alignas(1024) bf16 b[2][N / 64 * PANEL], c[2][N / 64 * PANEL];     /* 64 tokens each */
    head<N> heads[STAGES];
    alignas(16) int32_t segment[CHUNK];
    alignas(8) uint64_t full[STAGES], empty[STAGES];
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* A block's place. */
struct spot { int b, g, chunk, t0, real, h0, h1; };

template <int N>
static __device__ __forceinline__ void load_heads(const fg_ssd_chunks &k, const CUtensorMap *x,
                                                  const spot &o, memory<N> *m)
{
    int stage = 0, phase = 1;
#pragma unroll 1
    for (int h = o.h0; h < o.h1; h++) {
        head<N> *to = &m->heads[stage];
        const uint32_t bar = fg_shared(&m->full[stage]);
        const int64_t row = (int64_t)o.b * k.z.H + h, at = row * k.d.padded + o.t0;
        const int64_t state = (row * k.d.chunks + o.chunk) * 64 * N;
        barrier_wait(fg_shared(&m->empty[stage]), phase);
        fg_expect(bar, 2 * PANEL_BYTES + N * 128 + CHUNK * (8 + 3 * 4));
        fg_box_load(fg_shared(to->x), x, 0, h, o.t0, o.b, bar);
        fg_bulk_load(fg_shared(to->state), k.states + state, N * 128, bar);
        fg_bulk_load(fg_shared(to->sum), k.d.sum + at, sizeof to->sum, bar);
        fg_bulk_load(fg_shared(to->dt), k.d.dt + at, sizeof to->dt, bar);
        fg_bulk_load(fg_shared(to->tail), k.d.tail + at, sizeof to->tail, bar);
        fg_bulk_load(fg_shared(to->keep), k.d.keep + at, sizeof to->keep, bar);
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
}

/* What a thread knows of its rows, tokens r and r + 8 of the chunk. */
struct rows { int r, segment[2]; float2 sum[2]; };

/* Weights of 16 sources, from token j0 on, that end before the targets do. */
template <int N>
static __device__ __forceinline__ void weigh_far(const head<N> *m, const int32_t *segment,
                                                 const rows &own, int j0, const float (*score)[4],
                                                 uint32_t *w)
{
    const int c = 2 * (threadIdx.x % 4), last_segment = segment[j0 + 15];
    const float2 last = m->sum[j0 + 15];
    float from[2];
#pragma unroll
    for (int low = 0; low < 2; low++) {
        const float x = fg_exp2(fg_two_diff(own.sum[low], last));
        from[low] = own.segment[low] == last_segment ? x : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const float2 dt = *(const float2 *)(m->dt + j0 + 8 * n + c);
        const float2 tail = *(const float2 *)(m->tail + j0 + 8 * n + c);
        const float u = dt.x * tail.x, v = dt.y * tail.y;
#pragma unroll
        for (int low = 0; low < 2; low++)
            w[2 * n + low] = fg_pack2(score[n][2 * low] * (u * from[low]),
                                      score[n][2 * low + 1] * (v * from[low]));
    }
}

/* The same of the 16 x 16 tile on the diagonal. */
template <int N>
static __device__ __forceinline__ void weigh_near(const head<N> *m, const int32_t *segment,
                                                  const rows &own, const float (&score)[2][4],
                                                  uint32_t *w)
{
    const int c = 2 * (threadIdx.x % 4), j0 = own.r & ~15;
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const int j = j0 + 8 * n + c;
        const float4 s = *(const float4 *)(m->sum + j);
        const float2 dt = *(const float2 *)(m->dt + j);
        const int2 segs = *(const int2 *)(segment + j);
#pragma unroll
        for (int low = 0; low < 2; low++) {
            const int i = own.r + 8 * low, seg = own.segment[low];
            const float x = fg_exp2(fg_two_diff(own.sum[low], make_float2(s.x, s.y)));
            const float y = fg_exp2(fg_two_diff(own.sum[low], make_float2(s.z, s.w)));
            const float u = j <= i && segs.x == seg ? score[n][2 * low] * x * dt.x : 0.0f;
            const float v = j < i && segs.y == seg ? score[n][2 * low + 1] * y * dt.y : 0.0f;
            w[2 * n + low] = fg_pack2(u, v);
        }
    }
}

/* Scores of 64 targets and the 64 sources of one half. */
template <int N>
static __device__ __forceinline__ void scores(const bf16 *c, const bf16 *b, float (&score)[8][4])
{
    const uint64_t cs = matrix_at(fg_shared(c), 0), bs = matrix_at(fg_shared(b), 0);
    pin(score);
    wgmma_begin();
#pragma unroll
    for (int n = 0; n < N / 16; n++) {
        const int at = n / 4 * PANEL_BYTES + n % 4 * 32;
        product(score, behind(cs, at), behind(bs, at), n);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(score);
}

static __device__ __forceinline__ void put_y(const fg_ssd_chunks &k, const spot &o, const rows &own,
                                             const bf16 *x, int h, const float (&y)[8][4])
{
    const float skip = k.skip ? k.skip[h] : 0.0f;
    uint32_t xs[4][4];
    rows_of_tile(xs, x, own.r / 16 * 16);
#pragma unroll
    for (int low = 0; low < 2; low++) {
        const int i = own.r + 8 * low;
        bf16 *to = k.y + ((o.b * k.z.T + o.t0 + i) * k.z.H + h) * 64 + threadIdx.x % 4 * 8;
#pragma unroll
        for (int n = 0; n < 8; n += 4) {
            uint32_t out[4];
#pragma unroll
            for (int p = 0; p < 4; p++) {
                const float2 v = pair_of(xs, n + p, low);
                const float u = fmaf(skip, v.x, y[n + p][2 * low]);
                const float w = fmaf(skip, v.y, y[n + p][2 * low + 1]);
                out[p] = own.segment[low] < 0 ? 0u : fg_pack2(u, w);
            }
            fg_quad_turn(out);
            if (i < o.real) fg_store4(to + 8 * n, out);
        }
    }
}

/* HALF: of the chunk, the warpgroup's. */
template <int N, int HALF>
static __device__ __forceinline__ void walk_heads(const fg_ssd_chunks &k, const spot &o,
                                                  memory<N> *m)
{
    const int warp = threadIdx.x / 32 % 4;
    const uint64_t c = matrix_at(fg_shared(m->c[HALF]), 0);
    float score[8][4] = {}, before[HALF ? 8 : 1][4] = {}, near[2][4];
    scores<N>(m->c[HALF], m->b[HALF], score);
    if constexpr (HALF) scores<N>(m->c[1], m->b[0], before);
    pick_near(warp, score, near);
    rows own;
    own.r = 64 * HALF + 16 * warp + threadIdx.x % 32 / 4;
    own.segment[0] = m->segment[own.r], own.segment[1] = m->segment[own.r + 8];
    int stage = 0, phase = 0;
#pragma unroll 1
    for (int h = o.h0; h < o.h1; h++) {
        const head<N> *tile = &m->heads[stage];
        const uint64_t x = matrix_at(fg_shared(tile->x), 0);
        const uint64_t state = matrix_at(fg_shared(tile->state), 0);
        float y[8][4] = {};
        uint32_t w[4][4], v[HALF ? 4 : 1][4], mine[4];
        pin(y);
        barrier_wait(fg_shared(&m->full[stage]), phase);
        wgmma_begin();
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            const int at = n / 4 * PANEL_BYTES + n % 4 * 32;
            product(y, behind(c, at), behind(state, at), n);
        }
        wgmma_commit();
        own.sum[0] = tile->sum[own.r], own.sum[1] = tile->sum[own.r + 8];
        weigh_near<N>(tile, m->segment, own, near, mine);
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) w[j][e] = j == warp ? mine[e] : 0;
            if (j < 3 && j < warp)
                weigh_far<N>(tile, m->segment, own, 64 * HALF + 16 * j, score + 2 * j, w[j]);
            if constexpr (HALF) weigh_far<N>(tile, m->segment, own, 16 * j, before + 2 * j, v[j]);
        }
        const float keep[2] = { tile->keep[own.r], tile->keep[own.r + 8] };
        wgmma_wait<0>();
        pin(y);
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) y[n][e] *= keep[e / 2];
        pin(y), pin(w), pin(v);
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) product(y, w[j], behind(x, HALF * PANEL_BYTES + 2048 * j));
        if constexpr (HALF)
#pragma unroll
            for (int j = 0; j < 4; j++) product(y, v[j], behind(x, 2048 * j));
        wgmma_commit();
        wgmma_wait<0>();
        pin(y), pin(w), pin(v);
        put_y(k, o, own, tile->x, h, y);
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(fg_shared(&m->empty[stage]));
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
}
#endif

/* A block is a chunk and some heads of a group. */
template <int N>
static __global__ void __launch_bounds__(THREADS, 1)
run_chunks(const __grid_constant__ fg_ssd_chunks k, const __grid_constant__ CUtensorMap x)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) char bytes[];
    memory<N> *m = (memory<N> *)bytes;
    const int parts = (int)k.parts, G = (int)k.z.G, count = (int)k.d.chunks, M = (int)k.z.H / G;
    const int part = blockIdx.x % parts, rest = blockIdx.x / parts;
    spot o;
    o.g = rest % G, o.chunk = rest / G % count, o.b = rest / G / count, o.t0 = o.chunk * CHUNK;
    o.real = (int)k.z.T - o.t0;
    o.h0 = o.g * M + M * part / parts, o.h1 = o.g * M + M * (part + 1) / parts;
    if (threadIdx.x == 256) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(fg_shared(&m->full[i]), 1);
            barrier_init(fg_shared(&m->empty[i]), 8);
        }
        fg_barriers_ready();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int64_t token = o.b * k.z.T + (64 * half < o.real ? o.t0 + 64 * half : 0);
        panels_load<N>(m->b[half], k.b + token * k.b_row + o.g * N, k.b_row, o.real - 64 * half);
        panels_load<N>(m->c[half], k.c + token * k.c_row + o.g * N, k.c_row, o.real - 64 * half);
    }
    if (threadIdx.x < CHUNK)
        m->segment[threadIdx.x] = k.d.segment[o.b * k.d.padded + o.t0 + threadIdx.x];
    fg_copy_commit();
    fg_copy_wait<0>();
    proxy_fence();
    __syncthreads();
    if (threadIdx.x < 128) walk_heads<N, 0>(k, o, m);
    else if (threadIdx.x < 256) walk_heads<N, 1>(k, o, m);
    else if (threadIdx.x == 256) load_heads<N>(k, &x, o, m);
#endif
}

template <int N> static void run(const fg_ssd_chunks &k, cudaStream_t stream)
{
    const fg_ssd &z = k.z;
    const CUtensorMap x = fg_map_of(fg_encoder(), k.x, z.B, z.T, z.H, 64, k.x_row, CHUNK);
    const int bytes = (int)sizeof(memory<N>);
    cudaFuncSetAttribute(run_chunks<N>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    const unsigned blocks = (unsigned)(z.B * k.d.chunks * z.G * k.parts);
    run_chunks<N><<<blocks, THREADS, bytes, stream>>>(k, x);
}

void fg_ssd_scan_sm90(const fg_ssd_chunks &k, cudaStream_t stream)
{
    if (k.z.N == 128) run<128>(k, stream);
    else run<64>(k, stream);
}

bool fg_ssd_scan_has_sm90()
{
    cudaFuncAttributes f;
    if (cudaFuncGetAttributes(&f, run_chunks<128>) != cudaSuccess) {
        cudaGetLastError();              /* no error of the caller's */
        return false;
    }
    return f.binaryVersion == 90 && f.ptxVersion == 90 && fg_encoder();
}
