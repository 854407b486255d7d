/* forget_attention_grad.cuh - what the files of forget_attention_grad share: arguments, turns. */
#ifndef FG_FORGET_ATTENTION_GRAD_CUH
#define FG_FORGET_ATTENTION_GRAD_CUH
#include "attention.cuh"

static constexpr int SOME = 16;          /* queries whose ds is summed up in one */
static constexpr float LOG_F_MIN = -100; /* below it the gate's gradient is 0 */
static constexpr int UNSEEN = INT32_MAX; /* the lowest key of a row that sees none */
static constexpr int ROWS = 64;          /* queries of a tile, but for wgmma and D <= 64: 128 */

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
                                            SOME queries: [B,H,n_q tile / SOME] */
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

/* Which tile of keys a block of threads works on, and the tiles of queries that see it.
 *
 * The tiles of a head are given out from the last to the first, add to gq in that order, and walk
 * from the diagonal down.  So whoever waits for a turn waits for a tile that was given out before:
 * no deadlock; and those that begin together meet a tile of queries one step after the other. */
struct walk {
    int b, h, h_end, j, i, last;         /* i: a tile of queries of head h, last the last one */

    /* i itself or the next tile of queries that sees a key */
    __device__ int from(const args &a, int i) const
    {
        if (!a.plain)
            while (i <= last && a.span[(int64_t)b * a.n_q + i].x > j) i++;
        return i;
    }
    __device__ void begin(const args &a, int given)
    {
        const int head = given / a.n_k, Hkv = (int)a.Hkv, size = (int)a.H / Hkv;
        b = head / Hkv, h = head % Hkv * size, h_end = h + size;
        j = a.n_k - 1 - given % a.n_k;
        last = a.plain ? a.n_q - 1 : a.last[(int64_t)b * a.n_k + j];
        i = from(a, j * a.keys / a.tile);
    }
    __device__ bool more() const { return i <= last; }
    __device__ void advance(const args &a)
    {
        i = from(a, i + 1);
        if (i > last && h + 1 < h_end) i = from(a, j * a.keys / a.tile), h++;
    }
    __device__ int64_t tile(const args &a) const { return (b * a.H + h) * a.n_q + i; }
    /* Tiles of keys that add to this tile of queries before. */
    __device__ int rank(const args &a) const
    {
        return min(((i + 1) * a.tile - 1) / a.keys, a.n_k - 1) - j;
    }
    __device__ bool masked(const args &a) const
    {
        return i * a.tile < (j + 1) * a.keys - 1
            || (!a.plain && a.span[(int64_t)b * a.n_q + i].y > j * a.keys);
    }
};

static __device__ __forceinline__ void copy8(unsigned to, const void *from)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" :: "r"(to), "l"(from) : "memory");
}

/* The tiles on wgmma, for bf16 and D <= 128; whether this device and this build have it. */
void fg_forget_attention_grad_sm90(const args &a, cudaStream_t stream);
bool fg_forget_attention_grad_has_sm90();
/* Everything but the gates' gradient in f32, for any D up to 256. */
void fg_forget_attention_grad_plain(const args &a, cudaStream_t stream);
#endif
