/* ssd_scan_grad.cuh - what ssd_scan_grad.cu and ssd_scan_grad_sm90.cu share. */
#ifndef FG_SSD_SCAN_GRAD_CUH
#define FG_SSD_SCAN_GRAD_CUH
#include "ssd.cuh"

#define CHUNK 64
#define HEADS_SM90 64                            /* of a block on wgmma, at most */

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

/* Sums of one head over a chunk, in shared memory, in parts. */
#define PARTS 4
#define WARPS 16
struct totals {
    float row[PARTS][CHUNK], column[PARTS][CHUNK];     /* of z off the diagonal */
    float u[PARTS][CHUNK], w[PARTS][CHUNK];      /* keep_i gy_i^T S c_i, left_j x_j^T R b_j */
    float gu[PARTS][CHUNK], gy[PARTS][CHUNK];    /* gu_j.x_j, gy_j.x_j */
    float both[WARPS];                           /* <R,S> */
};

static __device__ __forceinline__ float part_sum(const float (*x)[CHUNK], int t)
{
    float sum = x[0][t];
#pragma unroll
    for (int k = 1; k < PARTS; k++) sum += x[k][t];
    return sum;
}

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
static __device__ __noinline__ void settle(const totals &m, const float *dt,
                                           const int32_t *segment, float rate, float whole,
                                           int64_t real, float *gdt, int64_t row, float *ga,
                                           float *gd)
{
    const int lane = threadIdx.x % 32;
    float cross[2], u[2], w[2], both = 0, a = 0, d = 0;
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const int t = 2 * lane + e;
        cross[e] = part_sum(m.column, t) - part_sum(m.row, t);
        u[e] = part_sum(m.u, t);
        w[e] = dt[t] * part_sum(m.w, t);
    }
#pragma unroll
    for (int k = 0; k < WARPS; k++) both += m.both[k];
    const float crossed = before(cross[0] + cross[1]), pushed = before(w[0] + w[1]);
    const float all = fg_warp_sum(u[0] + u[1]), pulled = all - before(u[0] + u[1]);
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const int t = 2 * lane + e;
        const float gl = (e ? crossed + cross[0] : crossed) + (e ? pulled - u[0] : pulled)
            + (e ? pushed + w[0] : pushed) + whole * both;
        const bool counts = t < real && segment[t] >= 0;
        if (t < real) gdt[t * row] = counts ? fmaf(rate, gl, part_sum(m.gu, t)) : 0.0f;
        a += counts ? dt[t] * gl : 0.0f;
        d += counts ? part_sum(m.gy, t) : 0.0f;
    }
    a = fg_warp_sum(a);
    d = fg_warp_sum(d);
    if (lane == 0) *ga = a, *gd = d;
}

struct chunks {
    fg_ssd z;
    fg_decays d;
    sums s;
    const bf16 *x, *gy, *b, *c;
    const bf16 *states, *pulls;                  /* S and R around every `each` chunks */
    int each;
    const float *skip, *rate;
    bf16 *gx;
    float *gdt;
    fg_out gb, gc;
    int64_t x_row, gy_row, b_row, c_row, gx_row, gb_row, gc_row;
};

/* On wgmma, for bf16, P = 64, N = 64 or 128, with S and R around every two chunks; whether this
 * device and this build have it. */
void fg_ssd_scan_grad_sm90(const chunks &k, cudaStream_t stream);
bool fg_ssd_scan_grad_has_sm90();
#endif
