/* ssd_sm90.cuh - what the kernels of the state space scan on Hopper's wgmma share. */
#ifndef FG_SSD_SM90_CUH
#define FG_SSD_SM90_CUH
#include "ssd.cuh"
#include "tensor_map.cuh"

#define PANEL (64 * 64)                          /* elements of 64 columns of 64 rows */
#define PANEL_BYTES (PANEL * 2)

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <int ID, int COUNT> static __device__ __forceinline__ void barrier_sync()
{
    asm volatile("bar.sync %0, %1;" :: "n"(ID), "n"(COUNT) : "memory");
}
template <int ID, int COUNT> static __device__ __forceinline__ void barrier_pass()
{
    asm volatile("bar.arrive %0, %1;" :: "n"(ID), "n"(COUNT) : "memory");
}

/* A matrix `bytes` behind the one of the descriptor. */
static __device__ __forceinline__ uint64_t behind(uint64_t matrix, int bytes)
{
    return matrix + (uint64_t)(bytes >> 4);
}

/* 64 rows of N columns in panels, by the first 256 threads. */
template <int N>
static __device__ __forceinline__ void panels_load(bf16 *to, const bf16 *from, int64_t row,
                                                   int real)
{
#pragma unroll
    for (int n = 0; n < N / 64; n++)
        if (threadIdx.x < 256)
            fg_tile_load<64, 64, 256>(to + n * PANEL, from + 64 * n, row, real);
}

/* Fragments of 64 columns of a warp's 16 rows. */
static __device__ __forceinline__ void rows_of_tile(uint32_t (*a)[4], const bf16 *m, int r)
{
#pragma unroll
    for (int k = 0; k < 4; k++) fg_a<64>(a[k], fg_shared(m), r, 16 * k);
}

/* A warp's 16 rows of a tile, from row r on. */
static __device__ __forceinline__ void put_tile(bf16 *m, int r, const float (&x)[8][4])
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < 8; n += 2)
        store_matrices(fg_shared(m) + fg_swizzle<64>(r + lane % 16, n + lane / 16),
                       fg_pack2(x[n][0], x[n][1]), fg_pack2(x[n][2], x[n][3]),
                       fg_pack2(x[n + 1][0], x[n + 1][1]), fg_pack2(x[n + 1][2], x[n + 1][3]));
}

/* Columns 8n + 2(lane % 4), + 1 of row lane / 4, or that + 8, of such fragments. */
static __device__ __forceinline__ float2 pair_of(const uint32_t (&a)[4][4], int n, int low)
{
    const uint32_t u = a[n / 2][n % 2 * 2 + low];
    return make_float2(__uint_as_float(u << 16), __uint_as_float(u & 0xffff0000u));
}

/* x[own], of four; own: the warp, the same for all its threads. */
static __device__ __forceinline__ float pick(int own, float x0, float x1, float x2, float x3)
{
    const float low = own & 1 ? x1 : x0, high = own & 1 ? x3 : x2;
    return own & 2 ? high : low;
}
static __device__ __forceinline__ void pick_near(int own, const float (&x)[8][4],
                                                 float (&near)[2][4])
{
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            near[n][e] = pick(own, x[n][e], x[n + 2][e], x[n + 4][e], x[n + 6][e]);
}

static __device__ __forceinline__ float quad_sum(float x)
{
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
#endif
#endif
