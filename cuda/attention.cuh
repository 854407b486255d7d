/* attention.cuh - what forget_attention.cu and its gradient share: gates, masks, matrix fragments.
 *
 * Gates.  With C_t = log2(e) (log_f_1 + ... + log_f_t) the bias of query i and key j is C_i - C_j.
 * Sums over a whole sequence would lose it to cancellation, so positions fall in blocks of 128, and
 *     ell_t   = C_t - C_(first position of t's block)       f32
 *     base_b  = C_(first position of block b)               f64, base_0 = 0
 *     C_i - C_j = ell_i + (base_I - base_J) - ell_j
 * All are in units of log2.  What hides keys (documents, windows) hides what lies before them too,
 * so no sum ever crosses a border.  log_f is clamped at -100 nats; a gate that is NaN or +inf is
 * taken as -100 and marked in `bad`: queries that see beyond it get NaN (fg_gate_bad), others
 * nothing of it.  Positions behind the last query may hold anything. */
#ifndef FG_ATTENTION_CUH
#define FG_ATTENTION_CUH
#include "kernel.cuh"

#define FG_GATE_BLOCK 128
#define FG_LOG2_E 1.4426950408889634
#define FG_LN_2 0.69314718055994531

struct fg_gate_block {
    double base;
    int32_t bad_before;                          /* last bad position before the block; -1: none */
    uint32_t bad[FG_GATE_BLOCK / 32];            /* bit t % 32 of word t / 32: position t is bad */
};

/* ell: [B,H,padded]; block: [B,H,blocks]; padded = blocks * 128. */
struct fg_gates {
    float *ell;
    fg_gate_block *block;
    int64_t blocks, padded;
};

/* Cuts the tables for log_f: [B,N,H] off scratch (256-byte aligned); *bytes becomes their size. */
static inline fg_gates fg_gates_cut(void *scratch, int64_t B, int64_t N, int64_t H, size_t *bytes)
{
    fg_gates g;
    g.blocks = (N + FG_GATE_BLOCK - 1) / FG_GATE_BLOCK;
    g.padded = g.blocks * FG_GATE_BLOCK;
    const size_t ell = (size_t)(B * H * g.padded) * sizeof(float);   /* a multiple of 512 */
    const size_t block = (size_t)(B * H * g.blocks) * sizeof(fg_gate_block);
    g.ell = (float *)scratch;
    g.block = scratch ? (fg_gate_block *)((char *)scratch + ell) : nullptr;
    *bytes = (ell + block + 255) / 256 * 256;
    return g;
}

/* A gate as it is summed, in nats. */
static __device__ __forceinline__ bool fg_gate_is_bad(float log_f) { return !(log_f < 3e38f); }
static __device__ __forceinline__ float fg_gate_clamp(float log_f)
{
    return log_f > -100.0f && log_f < 3e38f ? log_f : -100.0f;
}

static __device__ __forceinline__ double fg_warp_prefix(double x)    /* inclusive */
{
#pragma unroll
    for (int k = 1; k < 32; k *= 2) {
        const double y = __shfl_up_sync(~0u, x, k);
        if ((int)threadIdx.x % 32 >= k) x += y;
    }
    return x;
}

/* One thread block per block of positions and sequence; a warp per head.  base holds the step to
 * the next block until fg_gate_bases sums it up. */
static __global__ void __launch_bounds__(256)
fg_gate_blocks(const float *log_f, int64_t pitch, int64_t N, int64_t H, fg_gates g, double unit)
{
    const int lane = threadIdx.x % 32;
    const int64_t b = blockIdx.x / g.blocks, at = blockIdx.x % g.blocks, i0 = at * FG_GATE_BLOCK;
    const float *f = log_f + (b * N + i0) * pitch;
    for (int64_t h = threadIdx.x / 32; h < H; h += blockDim.x / 32) {
        const int64_t row = b * H + h;
        fg_gate_block *block = g.block + row * g.blocks + at;
        double sum = 0;
#pragma unroll
        for (int k = 0; k < FG_GATE_BLOCK / 32; k++) {
            const int t = 32 * k + lane;
            const float x = i0 + t < N ? f[t * pitch + h] : 0.0f;
            const uint32_t bad = __ballot_sync(~0u, fg_gate_is_bad(x));
            const double y = t ? (double)fg_gate_clamp(x) * FG_LOG2_E : 0;
            const double c = sum + fg_warp_prefix(y);
            g.ell[row * g.padded + i0 + t] = (float)(c * unit);
            sum = __shfl_sync(~0u, c, 31);
            if (lane == 0) block->bad[k] = bad;
        }
        if (lane == 0) {
            const bool more = i0 + FG_GATE_BLOCK < N;
            const float x = more ? f[FG_GATE_BLOCK * pitch + h] : 0.0f;
            block->base = sum + (double)fg_gate_clamp(x) * FG_LOG2_E;
        }
    }
}

/* One warp per sequence and head. */
static __global__ void __launch_bounds__(32) fg_gate_bases(fg_gates g)
{
    const int lane = threadIdx.x;
    fg_gate_block *block = g.block + (int64_t)blockIdx.x * g.blocks;
    double sum = 0;
    int last = -1;
    for (int64_t c = 0; c < g.blocks; c += 32) {
        const int64_t i = c + lane;
        const bool in = i < g.blocks;
        const double step = in ? block[i].base : 0;
        int bad = -1;
#pragma unroll
        for (int k = 0; k < FG_GATE_BLOCK / 32; k++) {
            const uint32_t w = in ? block[i].bad[k] : 0;
            if (w) bad = (int)(i * FG_GATE_BLOCK) + 32 * k + 31 - __clz((int)w);
        }
        const double to = sum + fg_warp_prefix(step);
#pragma unroll
        for (int k = 1; k < 32; k *= 2) {
            const int y = __shfl_up_sync(~0u, bad, k);
            if (lane >= k) bad = max(bad, y);
        }
        bad = max(bad, last);
        const double from = __shfl_up_sync(~0u, to, 1);
        const int before = __shfl_up_sync(~0u, bad, 1);
        if (in) {
            block[i].base = lane ? from : sum;
            block[i].bad_before = lane ? before : last;
        }
        sum = __shfl_sync(~0u, to, 31);
        last = __shfl_sync(~0u, bad, 31);
    }
}

/* log_f: f32[B,N,H], pitch elements from token to token.  ell is multiplied by `unit`. */
static inline void fg_gates_scan(const float *log_f, int64_t pitch, int64_t B, int64_t N, int64_t H,
                                 const fg_gates *g, cudaStream_t stream, double unit = 1)
{
    fg_gate_blocks<<<(unsigned)(B * g->blocks), 256, 0, stream>>>(log_f, pitch, N, H, *g, unit);
    fg_gate_bases<<<(unsigned)(B * H), 32, 0, stream>>>(*g);
}

/* True if a bad gate lies among positions low + 1 .. i, so that query i, whose first key is low,
 * is NaN.  block: the table of the sequence and head. */
static __device__ __forceinline__ bool fg_gate_bad(const fg_gate_block *block, int low, int i)
{
    const fg_gate_block *at = block + i / FG_GATE_BLOCK;
    const int i0 = i / FG_GATE_BLOCK * FG_GATE_BLOCK;
    bool bad = at->bad_before > low;
#pragma unroll
    for (int k = 0; k < FG_GATE_BLOCK / 32; k++) {
        const int from = max(low + 1 - i0 - 32 * k, 0), to = i - i0 - 32 * k;   /* bits [from,to] */
        if (from > 31 || to < from) continue;
        const uint32_t mask = (~0u << from) & (~0u >> (31 - min(to, 31)));
        bad |= (at->bad[k] & mask) != 0;
    }
    return bad;
}

/* ---- fragments: mma.m16n8k16, bf16 in, f32 sums (PTX ISA, "Matrix fragments for mma.m16n8k16") --
 *
 * A thread with g = lane / 4, c = 2 (lane % 4) holds of a 16 x 16 matrix A, packed in pairs, the
 * columns c, c+1 of rows g and g+8, then c+8, c+9 of both; of a 16 x 8 matrix B the rows c, c+1,
 * then c+8, c+9 of column g; of the 16 x 8 sums the columns c, c+1 of row g, then of row g+8. */

static __device__ __forceinline__ void fg_mma(float *d, const uint32_t *a, uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ uint32_t fg_shared(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}
/* Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8. */
static __device__ __forceinline__ void fg_ldmatrix(uint32_t *r, uint32_t at)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
static __device__ __forceinline__ void fg_ldmatrix_trans(uint32_t *r, uint32_t at)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

/* 16 bytes from global to shared memory, zeros instead unless `real`. */
static __device__ __forceinline__ void fg_copy_async(uint32_t to, const void *from, bool real)
{
    const int bytes = real ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(to), "l"(from), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void fg_copy_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}
/* Until at most PENDING groups are under way. */
template <int PENDING> static __device__ __forceinline__ void fg_copy_wait()
{
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}

/* Byte offset of 16-byte chunk c of row r in a matrix of WIDTH bf16 a row, a multiple of 32: eight
 * rows of one chunk, as ldmatrix reads them, lie in all 32 banks. */
template <int WIDTH> static __device__ __forceinline__ uint32_t fg_swizzle(int r, int c)
{
    static_assert(WIDTH % 32 == 0, "");
    const int turned = WIDTH % 64 == 0 ? c ^ (r & 7) : c ^ ((r >> 1) & 3);
    return (uint32_t)(r * WIDTH * 2 + turned * 16);
}

/* 2^x to 2 ulp, subnormal results 0; 2^-inf = 0. */
static __device__ __forceinline__ float fg_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float2 shared_float2(unsigned at)
{
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at) : "memory");
    return x;
}

#endif
