/* ssd_scan_grad.cuh - what ssd_scan_grad.cu and ssd_scan_grad_sm90.cu share. */
#ifndef FG_SSD_SCAN_GRAD_CUH
#define FG_SSD_SCAN_GRAD_CUH
#include "ssd.cuh"

#define CHUNK 64
#define HEADS_SM90 64                            /* of a block on wgmma, at most */

/* Parts of sums: gb, gc: [parts][B,T,G,N]; ga, gd, gbias: [B*chunks][H]. */
struct sums { float *gb, *gc; double *ga, *gd, *gbias; int64_t parts; };

static inline sums sums_cut(void *base, size_t *used, const fg_ssd &z, int64_t chunks,
                            int64_t parts)
{
    sums s;
    const int64_t n = parts * z.B * z.T * z.G * z.N;
    s.parts = parts;
    s.gb = (float *)fg_ssd_cut(base, used, n, sizeof(float));
    s.gc = (float *)fg_ssd_cut(base, used, n, sizeof(float));
    s.ga = (double *)fg_ssd_cut(base, used, z.B * chunks * z.H, sizeof(double));
    s.gd = (double *)fg_ssd_cut(base, used, z.B * chunks * z.H, sizeof(double));
    s.gbias = (double *)fg_ssd_cut(base, used, z.B * chunks * z.H, sizeof(double));
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
static __device__ __forceinline__ double warp_sum(double x)
{
#pragma unroll
    for (int k = 16; k > 0; k /= 2) x += __shfl_xor_sync(~0u, x, k);
    return x;
}

/* Where gradients of one head and chunk go: that of its first token's dt to gdt[at], others `row`
 * elements apart.  bias: its dt is softplus(dt + bias). */
struct settled { fg_out gdt; int64_t at, row; double *ga, *gd, *gbias; bool bias; };

/* gdt, ga, gd and gbias by one warp; a lane has two tokens.  crossing: column sums less row sums of
 * z, if they are not those of m. */
static __device__ __noinline__ void settle(const totals &m, const double *crossing, const float *dt,
                                           const int32_t *segment, float rate, float whole,
                                           int64_t real, const settled &to)
{
    const int lane = threadIdx.x % 32;
    double gl, step[2], u[2], both = 0, a = 0, d = 0, bias = 0;
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const int t = 2 * lane + e;
        const double z = crossing ? crossing[t]
                                  : (double)part_sum(m.column, t) - (double)part_sum(m.row, t);
        u[e] = part_sum(m.u, t);
        step[e] = z + (double)dt[t] * part_sum(m.w, t) - u[e];
    }
#pragma unroll
    for (int k = 0; k < WARPS; k++) both += m.both[k];
    gl = fg_warp_prefix(step[0] + step[1]) - (step[0] + step[1]) + warp_sum(u[0] + u[1])
        + whole * both;
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const int t = 2 * lane + e;
        const bool counts = t < real && segment[t] >= 0;
        float g = counts ? (float)(rate * gl + part_sum(m.gu, t)) : 0.0f;
        if (to.bias) g *= fg_step_slope(dt[t]);
        if (t < real) to.gdt.put(to.at + t * to.row, g);
        bias += g;
        a += counts ? dt[t] * gl : 0.0;
        d += counts ? part_sum(m.gy, t) : 0.0f;
        gl += step[e];
    }
    a = warp_sum(a);
    d = warp_sum(d);
    bias = warp_sum(bias);
    if (lane == 0) *to.ga = a, *to.gd = d, *to.gbias = bias;
}

struct chunks {
    fg_ssd z;
    fg_decays d;
    sums s;
    const bf16 *x, *gy, *b, *c;
    const bf16 *states, *pulls;                  /* S and R around every `each` chunks */
    int each;
    const float *skip;
    bf16 *gx;
    fg_out gdt, gb, gc;
    int64_t x_row, gy_row, b_row, c_row, gx_row, gdt_row, gb_row, gc_row;
    bool bias;                                   /* dt is softplus(dt + bias) */
};

/* On wgmma, for bf16, P = 64, N = 64 or 128, with S and R around every two chunks; whether this
 * device and this build have it. */
void fg_ssd_scan_grad_sm90(const chunks &k, cudaStream_t stream);
bool fg_ssd_scan_grad_has_sm90();
#endif
