/* forget_attention_grad_plain.cu - forget_attention_grad in f32, for any D up to 256.
 *
 * Two kernels, one per tile of keys and one per tile of queries, with the formulas that
 * forget_attention_grad.cu gives and sums over rows that are exact. */
#include "forget_attention_grad.cuh"

static constexpr int SIDE = 32;          /* queries and keys of a tile, 8 threads to a row */

/* Rows of the four operands in shared memory, D up to W, each row 4 floats longer. */
template <int W> struct operands {
    float q[SIDE][W + 4], go[SIDE][W + 4], k[SIDE][W + 4], v[SIDE][W + 4];
    float p[SIDE][SIDE + 1], ds[SIDE][SIDE + 1];           /* [key][query] */
};

/* Rows t0 ... of a head; rows past the end, or unseen, are 0. */
template <int W>
static __device__ __forceinline__ void plain_load(const args &a, const void *x, int64_t pitch,
                                                  int64_t b, int64_t t0, int64_t h, const int *low,
                                                  float (&to)[SIDE][W + 4])
{
    const fg_in in = { x, a.narrow };
    for (int e = (int)threadIdx.x; e < SIDE * W; e += 256) {
        const int64_t r = e / W, d = e % W, t = t0 + r;
        const bool there = t < a.N && d < a.D && !(low && low[b * a.np + t] == UNSEEN);
        to[r][d] = there ? in[(b * a.N + t) * pitch + h * a.D + d] : 0;
    }
}

static __device__ __forceinline__ float dot4(float4 x, float4 y, float sum)
{
    return fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, sum))));
}

/* p and ds of a tile; thread x has key x / 8 and queries x % 8, + 8, ...  Both kernels call it, so
 * both sum the same ds. */
template <int W>
static __device__ __forceinline__ void plain_tile(const args &a, operands<W> &m, int64_t b,
                                                  int64_t h, int64_t i0, int64_t j0)
{
    const int key = (int)threadIdx.x / 8, lane = (int)threadIdx.x % 8;
    const int64_t head = b * a.H + h, j = j0 + key;
    float z[4] = {}, dp[4] = {};
    for (int d = 0; d < W; d += 4) {
        const float4 k = *(const float4 *)&m.k[key][d], v = *(const float4 *)&m.v[key][d];
#pragma unroll
        for (int u = 0; u < 4; u++) {
            z[u] = dot4(k, *(const float4 *)&m.q[lane + 8 * u][d], z[u]);
            dp[u] = dot4(v, *(const float4 *)&m.go[lane + 8 * u][d], dp[u]);
        }
    }
    float between = 0, ell = 0;
    if (a.gates.block) {
        const fg_gate_block *block = a.gates.block + head * a.gates.blocks;
        between = (float)(block[i0 / FG_GATE_BLOCK].base - block[j0 / FG_GATE_BLOCK].base);
        ell = a.gates.ell[head * a.np + j];
    }
#pragma unroll
    for (int u = 0; u < 4; u++) {
        const int64_t i = i0 + lane + 8 * u;
        float p = 0, ds = 0;
        if (i < a.N && j <= i && j >= a.low[b * a.np + i]) {
            p = exp2f(fmaf(z[u], a.scale2, between - a.level[head * a.np + i]) - ell);
            ds = p * (dp[u] - a.delta[head * a.np + i]);
        }
        m.p[key][lane + 8 * u] = p;
        m.ds[key][lane + 8 * u] = ds;
    }
}

/* sum[u] += over the tile of x[r][e] y[e][d], d = 4 (thread % 8) + 32 u, r = thread / 8; turned: of
 * x[e][r]. */
template <int W, bool TURNED>
static __device__ __forceinline__ void plain_product(const float (&x)[SIDE][SIDE + 1],
                                                     const float (&y)[SIDE][W + 4],
                                                     float4 (&sum)[W / 32])
{
    const int r = (int)threadIdx.x / 8, lane = (int)threadIdx.x % 8;
    for (int e = 0; e < SIDE; e++) {
        const float w = TURNED ? x[e][r] : x[r][e];
#pragma unroll
        for (int u = 0; u < W / 32; u++) {
            const float4 t = *(const float4 *)&y[e][4 * lane + 32 * u];
            sum[u].x = fmaf(w, t.x, sum[u].x), sum[u].y = fmaf(w, t.y, sum[u].y);
            sum[u].z = fmaf(w, t.z, sum[u].z), sum[u].w = fmaf(w, t.w, sum[u].w);
        }
    }
}

template <int W>
static __device__ __forceinline__ void plain_store(const args &a, void *out, int64_t pitch,
                                                   int64_t b, int64_t t, int64_t h, float scale,
                                                   const float4 (&sum)[W / 32])
{
    const fg_out to = { out, a.narrow };
    if (t >= a.N) return;
#pragma unroll
    for (int u = 0; u < W / 32; u++) {
        const float x[4] = { sum[u].x, sum[u].y, sum[u].z, sum[u].w };
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int64_t d = (int)threadIdx.x % 8 * 4 + 32 * u + e;
            if (d < a.D) to.put((b * a.N + t) * pitch + h * a.D + d, x[e] * scale);
        }
    }
}

template <int W> static __global__ void __launch_bounds__(256) plain_keys(const args a)
{
    extern __shared__ __align__(1024) char memory[];
    operands<W> &m = *(operands<W> *)memory;
    const int64_t j0 = (int64_t)blockIdx.x * SIDE, kv = blockIdx.y, b = blockIdx.z;
    const int64_t group = a.H / a.Hkv, j = j0 + threadIdx.x / 8;
    const int tile = (int)(j0 / a.keys);
    const int last = a.plain ? a.n_q - 1 : a.last[b * a.n_k + tile];
    float4 gk[W / 32] = {}, gv[W / 32] = {};
    plain_load<W>(a, a.k, a.k_row, b, j0, kv, nullptr, m.k);
    plain_load<W>(a, a.v, a.v_row, b, j0, kv, nullptr, m.v);
    for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
        double column = 0;
        for (int64_t i0 = j0; i0 < a.N && i0 / ROWS <= last; i0 += SIDE) {
            if (a.span[b * a.n_q + i0 / ROWS].x > tile) continue;
            __syncthreads();
            plain_load<W>(a, a.q, a.q_row, b, i0, h, nullptr, m.q);
            plain_load<W>(a, a.go, a.H * a.D, b, i0, h, a.low, m.go);
            __syncthreads();
            plain_tile<W>(a, m, b, h, i0, j0);
            __syncthreads();
            plain_product<W, false>(m.p, m.go, gv);
            plain_product<W, false>(m.ds, m.q, gk);
            float sum = 0;
#pragma unroll
            for (int u = 0; u < 4; u++) sum += m.ds[threadIdx.x / 8][threadIdx.x % 8 + 8 * u];
            column += (double)fg_warp_sum<8>(sum);
        }
        if (threadIdx.x % 8 == 0) a.column[(b * a.H + h) * a.np + j] = (float)column;
    }
    plain_store<W>(a, a.gk, a.gk_row, b, j, kv, a.scale, gk);
    plain_store<W>(a, a.gv, a.gv_row, b, j, kv, 1, gv);
}

template <int W> static __global__ void __launch_bounds__(256) plain_queries(const args a)
{
    extern __shared__ __align__(1024) char memory[];
    operands<W> &m = *(operands<W> *)memory;
    const int64_t i0 = ((int64_t)gridDim.x - 1 - blockIdx.x) * SIDE, h = blockIdx.y, b = blockIdx.z;
    const int64_t kv = h / (a.H / a.Hkv), i = i0 + threadIdx.x / 8;
    const int lowest = a.span[b * a.n_q + i0 / ROWS].x;
    float4 gq[W / 32] = {};
    double row = 0;
    plain_load<W>(a, a.q, a.q_row, b, i0, h, nullptr, m.q);
    plain_load<W>(a, a.go, a.H * a.D, b, i0, h, a.low, m.go);
    for (int64_t j0 = i0; j0 >= 0 && j0 / a.keys >= lowest; j0 -= SIDE) {
        __syncthreads();
        plain_load<W>(a, a.k, a.k_row, b, j0, kv, nullptr, m.k);
        plain_load<W>(a, a.v, a.v_row, b, j0, kv, nullptr, m.v);
        __syncthreads();
        plain_tile<W>(a, m, b, h, i0, j0);
        __syncthreads();
        plain_product<W, true>(m.ds, m.k, gq);
        float sum = 0;
#pragma unroll
        for (int u = 0; u < 4; u++) sum += m.ds[threadIdx.x % 8 + 8 * u][threadIdx.x / 8];
        row += (double)fg_warp_sum<8>(sum);
    }
    if (threadIdx.x % 8 == 0) a.rows[(b * a.H + h) * a.np + i] = (float)row;
    plain_store<W>(a, a.gq, a.gq_row, b, i, h, a.scale, gq);
}

template <int W> static void run(const args &a, cudaStream_t stream)
{
    const int bytes = (int)sizeof(operands<W>);
    const unsigned n = fg_blocks(a.N, SIDE), B = (unsigned)a.B;
    cudaFuncSetAttribute(plain_keys<W>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    cudaFuncSetAttribute(plain_queries<W>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    plain_keys<W><<<dim3(n, (unsigned)a.Hkv, B), 256, bytes, stream>>>(a);
    plain_queries<W><<<dim3(n, (unsigned)a.H, B), 256, bytes, stream>>>(a);
}

void fg_forget_attention_grad_plain(const args &a, cudaStream_t stream)
{
    if (a.D <= 64) run<64>(a, stream);
    else if (a.D <= 128) run<128>(a, stream);
    else run<256>(a, stream);
}
