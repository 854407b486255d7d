/* ssd_states_sm90.cu - the states between chunks of ssd.cuh on Hopper's wgmma.
 *
 * A block has a head and 64 columns of its state, in registers, and walks all tokens, 64 a step, in
 * either direction: state = whole state + u^T weight v.  A step's fragments of u^T weight are made
 * while the step before is multiplied; the copy engine is some steps ahead. */
#include "ssd.cuh"
#include "tensor_map.cuh"

#define STEP    64                               /* tokens */
#define STAGES  5
#define THREADS 160                              /* four warps, and one that loads */

struct slot {
    alignas(1024) bf16 u[STEP * 64], v[STEP * 64];
    alignas(1024) float weight[STEP];
};
struct memory {
    slot slots[STAGES];
    alignas(1024) bf16 out[2][64 * 64];
    uint64_t full[STAGES], empty[STAGES];
};
struct maps { CUtensorMap u[2], v[2]; };

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
/* What a block walks: steps from `from` on, by +1 or -1. */
struct place { int b, h, g, n0, steps, from, by; };

static __device__ __forceinline__ void load_all(memory *m, const CUtensorMap *u,
                                                const CUtensorMap *v, const place &o,
                                                const float *weight)
{
    int stage = 0, phase = 1;
#pragma unroll 1
    for (int i = 0; i < o.steps; i++) {
        slot *to = &m->slots[stage];
        const uint32_t bar = fg_shared(&m->full[stage]);
        const int t = (o.from + i * o.by) * STEP;
        barrier_wait(fg_shared(&m->empty[stage]), phase);
        fg_expect(bar, 2 * STEP * 128 + STEP * 4);
        fg_box_load(fg_shared(to->u), u, 0, o.h, t, o.b, bar);
        fg_box_load(fg_shared(to->v), v, o.n0, o.g, t, o.b, bar);
        fg_bulk_load(fg_shared(to->weight), weight + t, STEP * 4, bar);
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
}

static __device__ __forceinline__ void store_matrices(uint32_t at, const uint32_t *v)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
                 :: "r"(at), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}
static __device__ __forceinline__ void walkers_sync()
{
    asm volatile("bar.sync 1, 128;" ::: "memory");
}

/* The state, through shared memory, by the copy engine.  `out` was last used two states ago: then
 * came a barrier, before which that copy had been read. */
static __device__ __forceinline__ void keep(bf16 *out, bf16 *to, const float (*sum)[4])
{
    const int lane = threadIdx.x % 32, r = threadIdx.x / 32 * 16 + lane % 16;
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
        const uint32_t v[4] = { fg_pack2(sum[n][0], sum[n][1]), fg_pack2(sum[n][2], sum[n][3]),
                                fg_pack2(sum[n + 1][0], sum[n + 1][1]),
                                fg_pack2(sum[n + 1][2], sum[n + 1][3]) };
        store_matrices(fg_shared(out) + fg_swizzle<64>(r, n + lane / 16), v);
    }
    proxy_fence();
    if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    walkers_sync();
    if (threadIdx.x == 0)
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
                     "cp.async.bulk.commit_group;"
                     :: "l"(to), "r"(fg_shared(out)), "r"(64 * 128) : "memory");
}

/* The sums over all steps.  STEPS: of a chunk. */
template <int STEPS>
static __device__ __forceinline__ void walk_all(memory *m, const place &o, const float *whole,
                                                bf16 *kept, int64_t size, float (&sum)[8][4])
{
    const int p = threadIdx.x / 32 * 16;
    uint32_t a[4][4], next[4][4];
    float decay = whole[o.from / STEPS], later = whole[(o.from + o.by * (o.steps > 1)) / STEPS];
    int stage = 0, phase = 0;
    barrier_wait(fg_shared(&m->full[0]), 0);
    fg_weigh_rows<STEP>(a, m->slots[0].u, m->slots[0].weight, p);
#pragma unroll 1
    for (int i = 0, at = o.from; i < o.steps; i++, at += o.by) {
        const int following = stage + 1 < STAGES ? stage + 1 : 0;
        if (i % 2 == 0) keep(m->out[i / 2 % 2], kept + at / 2 * size, sum);
        if (STEPS == 1 || i % 2 == 0)
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) sum[n][e] *= decay;
        fg_states_add<STEP>(a, m->slots[stage].v, sum);
        decay = later;
        if (i + 2 < o.steps) later = whole[(at + 2 * o.by) / STEPS];
        if (i + 1 < o.steps) {
            barrier_wait(fg_shared(&m->full[following]), following ? phase : phase ^ 1);
            fg_weigh_rows<STEP>(next, m->slots[following].u, m->slots[following].weight, p);
        }
        fg_states_done<STEP>(a, sum);
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(fg_shared(&m->empty[stage]));
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) a[j][e] = next[j][e];
        stage = following;
        phase ^= !following;
    }
    if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
#endif

/* STEPS: of a chunk.  A state is kept for every two steps. */
template <int STEPS>
static __global__ void __launch_bounds__(THREADS, 2)
walk(fg_ssd z, fg_decays d, fg_both_states both, const __grid_constant__ maps maps)
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
    o.from = s.back ? o.steps - 1 : 0, o.by = s.back ? -1 : 1;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(fg_shared(&m->full[i]), 1);
            barrier_init(fg_shared(&m->empty[i]), 4);
        }
        fg_barriers_ready();
    }
    __syncthreads();
    if (threadIdx.x >= 128) {
        if (threadIdx.x == 128)
            load_all(m, &maps.u[way], &maps.v[way], o, s.weight + row * d.padded);
        return;
    }
    float sum[8][4] = {};
    if (s.from)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                sum[n][e] = s.from[row * size + o.n0 + fg_state_at(p, n, e, z.N)];
    walk_all<STEPS>(m, o, d.whole + row * d.chunks,
                    s.kept + row * (o.steps / 2) * size + o.n0 * 64, size, sum);
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
    cudaFuncSetAttribute(walk<STEPS>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         (int)sizeof(memory));
    walk<STEPS><<<blocks, THREADS, sizeof(memory), stream>>>(z, d, s, m);
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
