/* forget_attention_grad.cuh - what both files of forget_attention_grad share: arguments, turns. */
#ifndef FG_FORGET_ATTENTION_GRAD_CUH
#define FG_FORGET_ATTENTION_GRAD_CUH
#include "attention.cuh"

static constexpr int ROWS = 64;          /* queries whose ds is summed up in one */
static constexpr float LOG_F_MIN = -100; /* below it the gate's gradient is 0 */
static constexpr int UNSEEN = INT32_MAX; /* the lowest key of a row that sees none */

/* What does not depend on the tile sizes.  Per-token arrays are [B,H,np], np a multiple of 128. */
struct args {
    const void *q, *k, *v, *go, *o;
    void *gq, *gk, *gv;
    float *glog_f;
    const float *log_f, *lse, *glse;
    const int *first;
    int64_t q_row, k_row, v_row, f_row, gq_row, gk_row, gv_row, gf_row;   /* elements per token */
    int64_t B, N, H, Hkv, D, np, window;
    float scale, scale2;                 /* scale2 = scale log2(e) */
    int tile, n_q, keys, n_k;            /* queries of a tile, their tiles; keys of a tile, ... */
    bool narrow, plain, sm90;            /* bf16; neither first nor window; wgmma */
    fg_gates gates;                      /* NULLs: no gate */
    float *column, *rows;                /* rows: sums over keys, or over keys and
                                            64 queries: [B,H,n_q tile / 64] */
    float *level, *delta;                /* L_i - ell_i, delta_i */
    int *low, *last, *turn, *next;       /* low: [B,np], last: [B,n_k], turn: [B,H,n_q] */
    int4 *span;                          /* [B,n_q]: lowest tile of keys, highest low, padding? */
    float4 *sum_q;                       /* gq / scale in f32, as the fragments lie */
};

static __device__ __forceinline__ int turn_now(const int *turn)
{
    int x;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(turn) : "memory");
    return x;
}
static __device__ __forceinline__ void turn_set(int *turn, int x)
{
    asm volatile("st.release.gpu.global.s32 [%0], %1;" :: "l"(turn), "r"(x) : "memory");
}

/* The next tile of queries that sees keys of tile j: i itself or a later one. */
static __device__ __forceinline__ int seen_from(const args &a, int64_t b, int i, int last, int j)
{
    if (!a.plain)
        while (i <= last && a.span[b * a.n_q + i].x > j) i++;
    return i;
}

static __device__ __forceinline__ void copy8(unsigned to, const void *from)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" :: "r"(to), "l"(from) : "memory");
}

static __device__ __forceinline__ float2 shared_float2(unsigned at)
{
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at) : "memory");
    return x;
}

/* The tiles on wgmma, for bf16 and D <= 128; whether this device and this build have it. */
void fg_forget_attention_grad_sm90(const args &a, cudaStream_t stream);
bool fg_forget_attention_grad_has_sm90();
#endif
