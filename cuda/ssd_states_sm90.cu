/* ssd_states_sm90.cu - the states between chunks of ssd.cuh on Hopper's wgmma.
 *
 * A block has a head and 64 columns of its state, in registers, and walks all tokens, 64 a step, in
 * either direction: state = whole state + u^T weight v.  One warpgroup multiplies and stores
 * states, another weighs the rows of u in shared memory, some steps ahead, and the copy engine is
 * ahead of that. */
#include <stddef.h>
#include "ssd_sm90.cuh"

#define STEP    64                               /* tokens */
#define STAGES  11                               /* at most */
#define THREADS 288                              /* two warpgroups, and a warp that loads */

struct slot {
    alignas(1024) bf16 u[STEP * 64], v[STEP * 64];
    alignas(1024) float weight[STEP];
    float decay;                                 /* of the state before it is added to */
};
struct memory {
    alignas(1024) bf16 out[2][64 * 64];
    uint64_t full[STAGES], weighed[STAGES], empty[STAGES];
    slot slots[1];                               /* as many as there is room for */
};
static size_t bytes_of(int stages)
{
    return offsetof(memory, slots) + (size_t)stages * sizeof(slot);
}
struct maps { CUtensorMap u[2], v[2]; };

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
/* What a block walks: steps from `from` on, by +1 or -1. */
struct place { int b, h, g, n0, steps, from, by, stages; };

/* Decay of step i, 1 inside a chunk of STEPS. */
template <int STEPS>
static __device__ __forceinline__ float decay_of(const place &o, const float *whole, int i)
{
    if (i >= o.steps) return 0;
    return STEPS == 1 || i % STEPS == 0 ? whole[(o.from + i * o.by) / STEPS] : 1.0f;
}

/* One warp; its lanes have the decays of 32 steps, and those of 32 more on their way. */
template <int STEPS>
static __device__ __forceinline__ void load_all(memory *m, const CUtensorMap *u,
                                                const CUtensorMap *v, const place &o,
                                                const float *weight, const float *whole)
{
    const int lane = threadIdx.x % 32;
    int stage = 0, phase = 1;
    float decay = 0, later = decay_of<STEPS>(o, whole, lane);
#pragma unroll 1
    for (int i = 0; i < o.steps; i++) {
        if (i % 32 == 0) decay = later, later = decay_of<STEPS>(o, whole, i + 32 + lane);
        const float own = __shfl_sync(~0u, decay, i % 32);
        if (lane == 0) {
            slot *to = &m->slots[stage];
            const uint32_t bar = fg_shared(&m->full[stage]);
            const int t = (o.from + i * o.by) * STEP;
            barrier_wait(fg_shared(&m->empty[stage]), phase);
            to->decay = own;
            fg_expect(bar, 2 * STEP * 128 + STEP * 4);
            fg_box_load(fg_shared(to->u), u, 0, o.h, t, o.b, bar);
            fg_box_load(fg_shared(to->v), v, o.n0, o.g, t, o.b, bar);
            fg_bulk_load(fg_shared(to->weight), weight + t, STEP * 4, bar);
        }
        __syncwarp();
        if (++stage == o.stages) stage = 0, phase ^= 1;
    }
}

static __device__ __forceinline__ void walkers_sync()
{
    asm volatile("bar.sync 1, 128;" ::: "memory");
}

/* sum += u^T v over 64 tokens, which are rows of both. */
static __device__ __forceinline__ void add_step(float (&sum)[8][4], const slot *m)
{
    const uint64_t u = matrix_at(fg_shared(m->u), 0), v = matrix_at(fg_shared(m->v), 0);
    pin(sum);
    wgmma_begin();
#pragma unroll
    for (int j = 0; j < STEP / 16; j++)
        product_rows<true>(sum, behind(u, 2048 * j), behind(v, 2048 * j), 1);
    wgmma_commit();
}

/* A state to shared memory, and from there by the copy engine.  `out` was last used two states ago:
 * then came a barrier, before which that copy had been read. */
static __device__ __forceinline__ void keep(bf16 *out, bf16 *to, const uint32_t (*state)[4])
{
    const int lane = threadIdx.x % 32, r = threadIdx.x / 32 * 16 + lane % 16;
#pragma unroll
    for (int n = 0; n < 4; n++)
        store_matrices(fg_shared(out) + fg_swizzle<64>(r, 2 * n + lane / 16), state[n][0],
                       state[n][1], state[n][2], state[n][3]);
    proxy_fence();
    if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    walkers_sync();
    if (threadIdx.x == 0)
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
                     "cp.async.bulk.commit_group;"
                     :: "l"(to), "r"(fg_shared(out)), "r"(64 * 128) : "memory");
}

/* Rows of u by their weights, in place; the second warpgroup. */
static __device__ __forceinline__ void weigh_all(memory *m, const place &o)
{
    const int own = threadIdx.x % 128;
    int stage = 0, phase = 0;
#pragma unroll 1
    for (int i = 0; i < o.steps; i++) {
        slot *tile = &m->slots[stage];
        barrier_wait(fg_shared(&m->full[stage]), phase);
        uint4 *u = (uint4 *)tile->u + own;
        uint4 x[4];
        float w[4];
#pragma unroll
        for (int k = 0; k < 4; k++) x[k] = u[128 * k], w[k] = tile->weight[own / 8 + 16 * k];
#pragma unroll
        for (int k = 0; k < 4; k++)
            u[128 * k] = make_uint4(fg_scale2(x[k].x, w[k], w[k]), fg_scale2(x[k].y, w[k], w[k]),
                                    fg_scale2(x[k].z, w[k], w[k]), fg_scale2(x[k].w, w[k], w[k]));
        proxy_fence();
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(fg_shared(&m->weighed[stage]));
        if (++stage == o.stages) stage = 0, phase ^= 1;
    }
}

/* The sums over all steps. */
template <int STEPS>
static __device__ __forceinline__ void walk_all(memory *m, const place &o, bf16 *kept, int64_t size,
                                                float (&sum)[8][4])
{
    int stage = 0, phase = 0;
#pragma unroll 1
    for (int i = 0, at = o.from; i < o.steps; i++, at += o.by) {
        uint32_t state[4][4];
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int k = 0; k < 4; k++)
                state[n][k] = fg_pack2(sum[2 * n + k / 2][k % 2 * 2],
                                       sum[2 * n + k / 2][k % 2 * 2 + 1]);
        barrier_wait(fg_shared(&m->weighed[stage]), phase);
        const float decay = m->slots[stage].decay;
        if (STEPS == 1 || i % STEPS == 0)
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) sum[n][e] *= decay;
        add_step(sum, &m->slots[stage]);
        if (i % 2 == 0) keep(m->out[i / 2 % 2], kept + at / 2 * size, state);
        wgmma_wait<0>();
        pin(sum);
        if (threadIdx.x % 32 == 0) barrier_arrive(fg_shared(&m->empty[stage]));
        if (++stage == o.stages) stage = 0, phase ^= 1;
    }
    if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
#endif

/* STEPS: of a chunk.  A state is kept for every two steps. */
template <int STEPS>
static __global__ void __launch_bounds__(THREADS, 2)
walk(fg_ssd z, fg_decays d, fg_both_states both, int stages, const __grid_constant__ maps maps)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) char bytes[];
    memory *m = (memory *)bytes;
    const int way = blockIdx.y, parts = (int)z.N / 64, row = blockIdx.x / parts;
    const fg_states s = both.s[way];
    const int p = threadIdx.x / 32 * 16;
    const int64_t size = 64 * z.N;
    place o;
    o.b = row / (int)z.H, o.h = row % (int)z.H, o.g = o.h / (int)(z.H / z.G);
    o.n0 = blockIdx.x % parts * 64, o.steps = (int)(d.padded / STEP);
    o.from = s.back ? o.steps - 1 : 0, o.by = s.back ? -1 : 1, o.stages = stages;
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; i++) {
            barrier_init(fg_shared(&m->full[i]), 1);
            barrier_init(fg_shared(&m->weighed[i]), 4);
            barrier_init(fg_shared(&m->empty[i]), 4);
        }
        fg_barriers_ready();
    }
    __syncthreads();
    if (threadIdx.x >= 128) {
        if (threadIdx.x < 256) weigh_all(m, o);
        else
            load_all<STEPS>(m, &maps.u[way], &maps.v[way], o, s.weight + row * d.padded,
                            d.whole + row * d.chunks);
        return;
    }
    float sum[8][4] = {};
    if (s.from)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                sum[n][e] = s.from[row * size + o.n0 + fg_state_at(p, n, e, z.N)];
    walk_all<STEPS>(m, o, s.kept + row * (o.steps / 2) * size + o.n0 * 64, size, sum);
    if (!s.to) return;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            s.to[row * size + o.n0 + fg_state_at(p, n, e, z.N)] = sum[n][e];
#endif
}

template <int STEPS>
static void run(const fg_ssd &z, const fg_decays &d, const fg_both_states &s, int directions,
                cudaStream_t stream)
{
    const fg_encode encode = fg_encoder();
    maps m;
    for (int i = 0; i < 2; i++) {
        m.u[i] = fg_map_of(encode, s.s[i].u, z.B, z.T, z.H, 64, s.s[i].u_row, STEP);
        m.v[i] = fg_map_of(encode, s.s[i].v, z.B, z.T, z.G, z.N, s.s[i].v_row, STEP);
    }
    const dim3 blocks((unsigned)(z.B * z.H * z.N / 64), (unsigned)directions);
    const int stages = (int)(blocks.x * blocks.y) > fg_processors() ? STAGES / 2 : STAGES;
    const size_t bytes = bytes_of(stages);       /* two blocks a multiprocessor, or one */
    cudaFuncSetAttribute(walk<STEPS>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    walk<STEPS><<<blocks, THREADS, bytes, stream>>>(z, d, s, stages, m);
}

void fg_states_sm90(const fg_ssd &z, const fg_decays &d, const fg_both_states &s, int directions,
                    cudaStream_t stream)
{
    if (d.padded / d.chunks == STEP) run<1>(z, d, s, directions, stream);
    else run<2>(z, d, s, directions, stream);
}

bool fg_states_have_sm90()
{
    cudaFuncAttributes f;
    if (cudaFuncGetAttributes(&f, walk<1>) != cudaSuccess) {
        cudaGetLastError();              /* no error of the caller's */
        return false;
    }
    return f.binaryVersion == 90 && f.ptxVersion == 90 && fg_encoder();
}
