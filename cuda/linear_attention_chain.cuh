/* linear_attention_chain.cuh - the kernels that carry the state of linear attention from chunk to
 * chunk (linear_attention_step.cuh).  A block of threads has 64 columns of one head; the blocks of
 * a head read the same Q, K, W, A from L2.  The chain falls in segments that run at once: first
 * what each makes of S = 0 (and, with W, of S = 1), then all, each from the state that those before
 * it add up to. */
#ifndef FG_LINEAR_ATTENTION_CHAIN_CUH
#define FG_LINEAR_ATTENTION_CHAIN_CUH
#include "linear_attention_step.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
/* S = diag(through) S + what a segment adds, for segments from first on to last, step by step, of
 * a chain whose decays are known. */
static __device__ __forceinline__ void la_pass(float S[16][4], const la_chain &c, int64_t bh,
                                               int64_t first, int64_t count, int64_t step)
{
    const int64_t heads = c.z.B * c.z.H;
    const float *add = c.ends + (first * heads + bh) * LA_WIDTH * LA_WIDTH + la_state_at();
    const float *through = c.through + (first * heads + bh) * LA_WIDTH + threadIdx.x % 4 * 2;
#pragma unroll 1
    for (; count > 0; count--) {
#pragma unroll
        for (int j = 0; j < 16; j++) {
            const float2 decay = *(const float2 *)(through + 8 * j);
#pragma unroll
            for (int i = 0; i < 4; i++)
                S[j][i] = fmaf(S[j][i], i % 2 ? decay.y : decay.x,
                               add[(8 * j + i % 2) * LA_WIDTH + i / 2 * 8]);
        }
        add += step * heads * LA_WIDTH * LA_WIDTH;
        through += step * heads * LA_WIDTH;
    }
}

/* Byte offset, in what passes through a segment, of keys k, k + 1 of row v of P^T. */
#define LA_THROUGH (LA_WIDTH * LA_WIDTH)         /* bf16; behind P^T the rest of its rounding */
static __device__ __forceinline__ uint32_t la_through_at(int v, int k)
{
    return (uint32_t)(k / 64 * (2 * LA_PANEL)) + fg_swizzle<64>(v, k % 64 / 8) + k % 8 * 2;
}

/* S = P S + what a segment adds, for the first segments of a chain of the delta rule.  P and S are
 * split in two bf16 each, so that next to nothing is lost.  P goes through where the last chunk of
 * all stages will be. */
static __device__ __forceinline__ void la_pass(float (&S)[16][4], const la_chain &c,
                                               la_shared<true> *sm, int64_t bh, int64_t count)
{
    const int64_t heads = c.z.B * c.z.H;
    const uint32_t P = fg_shared(&sm->stage[LA_STAGES - 1]);
    const uint32_t rest = fg_shared(&sm->late[LA_STAGES - 1]);
#pragma unroll 1
    for (int64_t n = 0; n < count; n++) {
        const bf16 *from = (const bf16 *)c.through + (n * heads + bh) * 2 * LA_THROUGH
                           + threadIdx.x * 8;
        for (int i = 0; i < LA_THROUGH; i += 128 * 8) {
            fg_copy_async(P + (threadIdx.x * 8 + i) * 2, from + i, true);
            fg_copy_async(rest + (threadIdx.x * 8 + i) * 2, from + LA_THROUGH + i, true);
        }
        fg_copy_commit();
        uint32_t high[8][4], low[8][4];
#pragma unroll
        for (int k = 0; k < 8; k++) {
            la_operand(high[k], S[2 * k], S[2 * k + 1]);
#pragma unroll
            for (int i = 0; i < 4; i++)
                low[k][i] = la_rest(&S[2 * k + i / 2][i % 2 * 2], high[k][i]);
        }
        la_state_in(S, c.ends + (n * heads + bh) * LA_WIDTH * LA_WIDTH, 1);
        fg_copy_wait<0>();
        proxy_fence();
        asm volatile("bar.sync 3, 128;" ::: "memory");
        pin(S), pin(high), pin(low);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < 8; k++) {
            product(S, high[k], matrix_at(P + k * 2048, 2 * LA_PANEL));
            product(S, low[k], matrix_at(P + k * 2048, 2 * LA_PANEL));
            product(S, high[k], matrix_at(rest + k * 2048, 2 * LA_PANEL));
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin(S), pin(high), pin(low);
        asm volatile("bar.sync 3, 128;" ::: "memory");
    }
}

/* From the first chunk of the segment to its last: the warpgroup that carries the state, */
template <bool DELTA, la_purpose FOR>
static __device__ __forceinline__ void la_carry(const la_chain &c, la_shared<DELTA> *sm)
{
    const la_span s = la_own_span(c);
    const int64_t size = LA_WIDTH * LA_WIDTH;
    const int chunks = (int)(s.to - s.from);
    float S[16][4];
    float keep = DELTA ? la_keep(c, s.b, s.from) : 1;
    la_state_in(S, la_carried(c.z, s.b) ? c.z.state + s.bh * size : nullptr, 1);
    if constexpr (DELTA) la_pass(S, c, sm, s.bh, s.segment);
    else la_pass(S, c, s.bh, 0, s.segment, 1);
    __syncthreads();
    for (int i = 0; i < chunks; i++) {
        const float next = DELTA ? la_keep(c, s.b, s.from + i + 1) : 1;
        la_step<DELTA, FOR>(S, &sm->stage[i % LA_STAGES], sm->S, sm->u, keep, true);
        keep = next;
        __syncthreads();
    }
    if (c.to && s.segment == c.segments - 1) la_state_out(S, c.to + s.bh * size, 1);
}
/* and those who write o or, LA_KEEP, the states, and e of the delta rule or, back, gu. */
template <bool DELTA, la_purpose FOR>
static __device__ __forceinline__ void la_write(const la_chain &c, const la_maps &m,
                                                la_shared<DELTA> *sm, bool back)
{
    const la_span s = la_own_span(c);
    const int chunks = (int)(s.to - s.from);
    const bool one = threadIdx.x % 128 == 0;
    __syncthreads();
    for (int i = 0; i < chunks; i++) {
        const int64_t chunk = back ? s.to - 1 - i : s.from + i;
        if (FOR == LA_OUT) {
            la_make_out<DELTA>(&sm->late[i % LA_STAGES], sm, c.z.scale);
        } else {
            la_await(LA_STATE_THERE);
            if (one) la_store_state(sm->S, m, s.bh * c.z.chunks + chunk);
            la_await(LA_ROWS_THERE);
        }
        if (one) {
            if (c.o.p) la_store_rows(sm->u, m, c.o, s, chunk);
            fg_boxes_read();
        }
        __syncthreads();
    }
}
/* The last threads fetch chunk after chunk; late: q and A too, or NULL.  BY: how many threads. */
template <bool DELTA, int BY>
static __device__ __forceinline__ void la_supply(const la_chain &c, const la_maps &m,
                                                 la_stage<DELTA> *stage, la_late *late,
                                                 uint64_t *come, bool back)
{
    const la_span s = la_own_span(c);
    const int chunks = (int)(s.to - s.from);
    const bool one = threadIdx.x % BY == 0;
    if (one) {
        for (int i = 0; i < LA_STAGES; i++) barrier_init(fg_shared(come + i), 1);
        fg_barriers_ready();
    }
    asm volatile("bar.sync 4, %0;" :: "n"(BY) : "memory");
    for (int j = 0; j < chunks + LA_STAGES - 1; j++) {
        const int at = j % LA_STAGES, i = j - (LA_STAGES - 2);
        if (j < chunks && one)
            la_fetch<DELTA>(c, m, s, back ? s.to - 1 - j : s.from + j, &stage[at],
                            late ? &late[at] : nullptr, fg_shared(come + at));
        if (i < 0) continue;
        if (i < chunks) barrier_wait(fg_shared(come + i % LA_STAGES), i / LA_STAGES % 2);
        if (DELTA && c.flags && i < chunks) {
            const uint8_t *flags = c.flags + (s.b * c.z.chunks + (back ? s.to - 1 - i : s.from + i))
                                   * LA_ROWS;
            la_hide(stage[i % LA_STAGES].k, flags, LA_PASSES);
            if (late) la_hide(late[i % LA_STAGES].q, flags, LA_REACHED);
            proxy_fence();
        }
        __syncthreads();                         /* what the next step needs is there */
    }
}

/* From the last chunk of the segment to its first. */
template <bool DELTA>
static __device__ __forceinline__ void la_carry_back(const la_chain &c, la_shared<DELTA> *sm)
{
    const la_span s = la_own_span(c);
    const int64_t size = LA_WIDTH * LA_WIDTH;
    const int chunks = (int)(s.to - s.from);
    float R[16][4];
    float keep = DELTA ? la_keep(c, s.b, s.to - 1) : 1;
    la_state_in(R, c.from ? c.from + s.bh * size : nullptr, 1 / c.z.scale);
    if (!DELTA) la_pass(R, c, s.bh, c.segments - 1, c.segments - 1 - s.segment, -1);
    __syncthreads();
    for (int i = 0; i < chunks; i++) {
        const int at = i % LA_STAGES;
        const float before = DELTA ? la_keep(c, s.b, s.to - 2 - i) : 1;
        la_step_back<DELTA>(R, &sm->stage[at], &sm->late[at], sm->S, sm->u, keep, c.z.scale);
        keep = before;
        __syncthreads();
    }
    if (s.segment > 0) return;
    if (!la_carried(c.z, s.b)) la_zero<16>(R);
    la_state_out(R, c.to + s.bh * size, c.z.scale);
}
#endif

/* Registers of a thread of the three warpgroups: 384 have 168 each. */
#define LA_CARRIES registers_up<240>()
#define LA_WRITES  registers_down<136>()
#define LA_FETCHES registers_down<128>()

template <bool DELTA>
static __global__ void __launch_bounds__(LA_THREADS, 1)
la_forward(const __grid_constant__ la_chain c, const __grid_constant__ la_maps m)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) char memory[];
    la_shared<DELTA> *sm = (la_shared<DELTA> *)memory;
    if (la_is_chain()) {
        LA_CARRIES;
        la_carry<DELTA, LA_OUT>(c, sm);
    } else if (la_is_writer()) {
        LA_WRITES;
        la_write<DELTA, LA_OUT>(c, m, sm, false);
    } else {
        LA_FETCHES;
        la_supply<DELTA, 128>(c, m, sm->stage, sm->late, sm->come, false);
    }
#endif
}
/* The two ways of the gradient do not need each other: half the blocks go forth, half back. */
template <bool DELTA>
static __global__ void __launch_bounds__(LA_THREADS, 1)
la_both_ways(const __grid_constant__ la_chain forth, const __grid_constant__ la_chain back,
             const __grid_constant__ la_maps to_forth, const __grid_constant__ la_maps to_back)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) char memory[];
    la_shared<DELTA> *sm = (la_shared<DELTA> *)memory;
    if (la_is_chain()) {
        LA_CARRIES;
        if (blockIdx.z) la_carry<DELTA, LA_KEEP>(forth, sm);
        else la_carry_back<DELTA>(back, sm);
    } else if (la_is_writer()) {
        LA_WRITES;
        la_write<DELTA, LA_KEEP>(blockIdx.z ? forth : back, blockIdx.z ? to_forth : to_back, sm,
                                 !blockIdx.z);
    } else {
        LA_FETCHES;
        if (blockIdx.z) la_supply<DELTA, 128>(forth, to_forth, sm->stage, nullptr, sm->come,
                                                false);
        else la_supply<DELTA, 128>(back, to_back, sm->stage, sm->late, sm->come, true);
    }
#endif
}

/* ---- segments: what each adds to a state of 0 ------------------------------------------------ */

/* Of the delta rule two warpgroups carry, what a segment adds to 0 and what it makes of 1; of the
 * others there are two blocks, forth and back. */
template <bool DELTA> constexpr int la_end_carriers = DELTA ? 2 : 1;
template <bool DELTA> constexpr int la_end_fetchers = DELTA ? 128 : 64;
template <bool DELTA>
constexpr int la_end_threads = 128 * la_end_carriers<DELTA> + la_end_fetchers<DELTA>;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
/* S^T of a segment that began with 1, in two bf16, as wgmma reads it. */
static __device__ __forceinline__ void la_through_out(const float (&S)[16][4], bf16 *to)
{
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
    const int v = blockIdx.x * LA_COLUMNS + la_own_values() + g;
#pragma unroll
    for (int j = 0; j < 16; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t at = la_through_at(v + 8 * i, 8 * j + c) / 2;
            const uint32_t high = fg_pack2(S[j][2 * i], S[j][2 * i + 1]);
            *(uint32_t *)(to + at) = high;
            *(uint32_t *)(to + LA_THROUGH + at) = la_rest(&S[j][2 * i], high);
        }
}

/* Of the way back, k and u are q and go. */
template <bool DELTA>
static __device__ __forceinline__ void la_carry_end(const la_chain &c, la_stage<DELTA> *stage)
{
    const la_span s = la_own_span(c);
    const int64_t at = s.segment * c.z.B * c.z.H + s.bh;
    const int chunks = (int)(s.to - s.from);
    const bool unit = threadIdx.x >= 128;
    float S[16][4];
    float keep = DELTA ? la_keep(c, s.b, s.from) : 1;
    la_start(S, unit);
    __syncthreads();
    for (int i = 0; i < chunks; i++) {
        const float next = DELTA ? la_keep(c, s.b, s.from + i + 1) : 1;
        la_step<DELTA, LA_END>(S, &stage[i % LA_STAGES], nullptr, nullptr, keep, !unit);
        keep = next;
        __syncthreads();
    }
    if (!unit) la_state_out(S, c.ends + at * LA_WIDTH * LA_WIDTH, 1);
    else la_through_out(S, (bf16 *)c.through + at * 2 * LA_THROUGH);
    if (DELTA || blockIdx.x) return;
    const float *decay = c.decay + (s.bh * c.z.chunks + s.from) * LA_WIDTH + threadIdx.x;
    float all = 1;
    for (int i = 0; i < chunks; i++) all *= decay[i * LA_WIDTH];
    c.through[at * LA_WIDTH + threadIdx.x] = all;
}
#endif

/* The first segment of all is not needed back, the last not forth. */
template <bool DELTA>
static __global__ void __launch_bounds__(la_end_threads<DELTA>, DELTA ? 1 : 2)
la_ends(const __grid_constant__ la_chain forth, const __grid_constant__ la_chain back,
        const __grid_constant__ la_maps to_forth, const __grid_constant__ la_maps to_back)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) char memory[];
    la_stage<DELTA> *stage = (la_stage<DELTA> *)memory;
    const int64_t segment = la_own_span(forth).segment;
    if (blockIdx.z ? segment == 0 : segment == forth.segments - 1) return;
    if (threadIdx.x < 128 * la_end_carriers<DELTA>)
        la_carry_end<DELTA>(blockIdx.z ? back : forth, stage);
    else
        la_supply<DELTA, la_end_fetchers<DELTA>>(blockIdx.z ? back : forth,
                                                 blockIdx.z ? to_back : to_forth, stage, nullptr,
                                                 (uint64_t *)(stage + LA_STAGES), blockIdx.z);
#endif
}

static inline CUtensorMap la_map_of(fg_encode encode, const la_task &z, const la_rows_of &x,
                                    int width)
{
    if (!x.p) return CUtensorMap{};
    if (x.head == LA_WIDTH) return fg_map_of(encode, x.p, z.B, z.T, z.H, width, x.row, LA_ROWS);
    return fg_map_of(encode, x.p, z.B * z.H, z.chunks * LA_ROWS, 1, width, x.row, LA_ROWS);
}
/* of states [B,H,chunks,128,128], in boxes of that many rows */
static inline CUtensorMap la_states_map(fg_encode encode, const la_task &z, const bf16 *S, int rows)
{
    if (!S) return CUtensorMap{};
    return fg_map_of(encode, S, z.B * z.H * z.chunks, LA_WIDTH, 1, LA_WIDTH, LA_WIDTH, rows);
}
static inline la_maps la_maps_of(const la_chain &c)
{
    const fg_encode encode = fg_encoder();
    const la_rows_of A = { c.A, 0, 0, LA_ROWS }, o = { c.o.p, c.o.batch, c.o.head, c.o.row };
    return { la_map_of(encode, c.z, c.k, LA_WIDTH), la_map_of(encode, c.z, c.w, LA_WIDTH),
             la_map_of(encode, c.z, c.u, LA_WIDTH), la_map_of(encode, c.z, c.q, LA_WIDTH),
             la_map_of(encode, c.z, A, LA_ROWS), la_map_of(encode, c.z, o, LA_WIDTH),
             la_states_map(encode, c.z, c.kept, LA_COLUMNS) };
}

/* The ends of a chain, or of one forth and one back. */
template <bool DELTA>
static void la_run_ends(const la_chain &forth, const la_chain *back, cudaStream_t stream)
{
    la_chain other = back ? *back : forth;
    const int64_t heads = forth.z.B * forth.z.H;
    const int bytes = (int)(sizeof(la_stage<DELTA>) + sizeof(uint64_t)) * LA_STAGES;
    const dim3 grid(LA_WIDTH / LA_COLUMNS, (unsigned)(heads * forth.segments), back ? 2 : 1);
    other.k = other.q;
    cudaFuncSetAttribute(la_ends<DELTA>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    la_ends<DELTA><<<grid, la_end_threads<DELTA>, bytes, stream>>>(
        forth, other, la_maps_of(forth), la_maps_of(other));
}

/* As many segments as give every multiprocessor a block, if they are not too short to pay. */
static inline int64_t la_segments(const la_task &z)
{
    const int64_t wanted = fg_processors() / (z.B * z.H * (LA_WIDTH / LA_COLUMNS));
    const int64_t most = z.chunks / 8;
    return wanted < 1 || most < 1 ? 1 : wanted < most ? wanted : most;
}
/* Segments of a chain; ends NULL: one. */
static inline void la_cut_up(la_chain *c, const la_task &z, float *ends, float *through)
{
    c->segments = ends ? la_segments(z) : 1;
    c->per = (z.chunks + c->segments - 1) / c->segments;
    c->segments = (z.chunks + c->per - 1) / c->per;
    c->ends = ends, c->through = through;
}

template <bool DELTA> static void la_run_forward(const la_chain &c, cudaStream_t stream)
{
    const int bytes = (int)sizeof(la_shared<DELTA>);
    const dim3 grid(LA_WIDTH / LA_COLUMNS, (unsigned)(c.z.B * c.z.H * c.segments));
    if (c.segments > 1) la_run_ends<DELTA>(c, nullptr, stream);
    cudaFuncSetAttribute(la_forward<DELTA>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    la_forward<DELTA><<<grid, LA_THREADS, bytes, stream>>>(c, la_maps_of(c));
}
/* Of the delta rule in one segment: three ends more would cost what the chain gains. */
template <bool DELTA>
static void la_run_both_ways(const la_chain &forth, const la_chain &back, cudaStream_t stream)
{
    const int bytes = (int)sizeof(la_shared<DELTA>);
    const dim3 grid(LA_WIDTH / LA_COLUMNS, (unsigned)(forth.z.B * forth.z.H * forth.segments), 2);
    if constexpr (!DELTA) if (forth.segments > 1) la_run_ends<DELTA>(forth, &back, stream);
    cudaFuncSetAttribute(la_both_ways<DELTA>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    la_both_ways<DELTA><<<grid, LA_THREADS, bytes, stream>>>(forth, back, la_maps_of(forth),
                                                               la_maps_of(back));
}

/* Cuts bytes off scratch, 256-byte aligned; base NULL: only counts. */
static inline void *la_cut(char *base, size_t *used, size_t bytes)
{
    void *p = base ? base + *used : nullptr;
    *used += (bytes + 255) / 256 * 256;
    return p;
}
/* Room for ends, of the way back too, and for what passes through: decays, or matrices. */
static inline void la_cut_ends(char *base, size_t *used, const la_task &z, bool back, bool matrices,
                               float **ends, float **through)
{
    const int64_t segments = la_segments(z);
    const size_t row = (size_t)(segments * z.B * z.H) * LA_WIDTH * sizeof(float);
    for (int i = 0; i <= back; i++) ends[i] = (float *)la_cut(base, used, row * LA_WIDTH);
    *through = (float *)la_cut(base, used, matrices ? row * LA_WIDTH : row);
}
#endif
