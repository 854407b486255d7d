/* wgmma.cuh - Hopper's matrix products of a warpgroup, and barriers in shared memory.
 *
 * Matrices in shared memory: panels of 64 columns of bf16, a row 128 bytes, chunk c of 16 bytes of
 * row r at c ^ r % 8; panels are 1024-byte aligned.  Source of shapes, layouts and descriptors: PTX
 * ISA, "Asynchronous warpgroup level matrix instructions". */
#ifndef FG_WGMMA_CUH
#define FG_WGMMA_CUH
#include <stdint.h>
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

static __device__ __forceinline__ void barrier_init(uint32_t bar, int count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(bar), "r"(count) : "memory");
}
static __device__ __forceinline__ void barrier_arrive(uint32_t bar)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(bar) : "memory");
}
static __device__ __forceinline__ void barrier_wait(uint32_t bar, int phase)
{
    asm volatile("{\n .reg .pred p;\n again:\n"
                 " mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 " @p bra done;\n bra again;\n done:\n}" :: "r"(bar), "r"(phase) : "memory");
}
static __device__ __forceinline__ bool barrier_passed(uint32_t bar, int phase)
{
    int passed;
    asm volatile("{\n .reg .pred p;\n"
                 " mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 " selp.s32 %0, 1, 0, p;\n}" : "=r"(passed) : "r"(bar), "r"(phase) : "memory");
    return passed;
}
/* What this thread wrote, or knows to be written, to shared memory is there for wgmma. */
static __device__ __forceinline__ void proxy_fence()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

static __device__ __forceinline__ float shared_float(uint32_t at)
{
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
    return x;
}
static __device__ __forceinline__ double shared_double(uint32_t at)
{
    double x;
    asm volatile("ld.shared.f64 %0, [%1];" : "=d"(x) : "r"(at) : "memory");
    return x;
}

/* Four 8 x 8 matrices to shared memory: lane l gives the address of row l % 8 of matrix l / 8. */
static __device__ __forceinline__ void store_matrices(uint32_t at, uint32_t v0, uint32_t v1,
                                                      uint32_t v2, uint32_t v3)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
                 :: "r"(at), "r"(v0), "r"(v1), "r"(v2), "r"(v3) : "memory");
}

/* Descriptor: address; bytes from 64 columns to the next 64, where its 16 of the product are rows;
 * 1024 bytes from 8 rows to the next. */
static __device__ __forceinline__ uint64_t matrix_at(uint32_t at, uint32_t panel)
{
    return (uint64_t)((at & 0x3ffff) >> 4) | (uint64_t)(panel >> 4) << 16
         | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
static __device__ __forceinline__ void wgmma_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
static __device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING> static __device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
}
template <int REGISTERS> static __device__ __forceinline__ void registers_up()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS));
}
template <int REGISTERS> static __device__ __forceinline__ void registers_down()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(REGISTERS));
}

/* The compiler must not move uses of x to before here. */
template <int N> static __device__ __forceinline__ void pin(float (&x)[N][4])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3]) :: "memory");
}
template <int N> static __device__ __forceinline__ void pin(uint32_t (&x)[N][4])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+r"(x[i][0]), "+r"(x[i][1]), "+r"(x[i][2]), "+r"(x[i][3]) :: "memory");
}

#define F4(d, i)  "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define F32(d, i) F4(d, i), F4(d, i + 1), F4(d, i + 2), F4(d, i + 3), F4(d, i + 4), F4(d, i + 5), \
    F4(d, i + 6), F4(d, i + 7)
#define N32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22," \
    "%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define N64 N32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50," \
    "%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

/* d = a b^T, or d += a b^T: 64 x 128 over 16; both matrices in shared memory, their 16 in a row.
 * d[n][0..3]: columns 8 n + 2 (lane % 4) + {0,1} of row lane / 4, then of row lane / 4 + 8, of the
 * warp's 16. */
static __device__ __forceinline__ void product(float (&d)[16][4], uint64_t a, uint64_t b, int add)
{
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" N64 "}, %64, %65, p, "
                 "1, 1, 0, 0;\n}"
                 : F32(d, 0), F32(d, 8) : "l"(a), "l"(b), "r"(add));
}
/* a 64 x 64 part over 16 of both */
static __device__ __forceinline__ void product(float (&d)[8][4], uint64_t a, uint64_t b, int add)
{
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" N32 "}, %32, %33, p, "
                 "1, 1, 0, 0;\n}"
                 : F32(d, 0) : "l"(a), "l"(b), "r"(add));
}
/* The same of a b: b with its 16 as rows; of a^T b where A_ROWS: a too. */
template <bool A_ROWS = false>
static __device__ __forceinline__ void product_rows(float (&d)[8][4], uint64_t a, uint64_t b,
                                                    int add)
{
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" N32 "}, %32, %33, p, "
                 "1, 1, %35, 1;\n}"
                 : F32(d, 0) : "l"(a), "l"(b), "r"(add), "n"(A_ROWS));
}
static __device__ __forceinline__ void product_rows(float (&d)[16][4], uint64_t a, uint64_t b,
                                                    int add)
{
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" N64 "}, %64, %65, p, "
                 "1, 1, 0, 1;\n}"
                 : F32(d, 0), F32(d, 8) : "l"(a), "l"(b), "r"(add));
}
/* d += a b^T: a in registers */
static __device__ __forceinline__ void product_turned(float (&d)[8][4], const uint32_t *a,
                                                      uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" N32 "}, "
                 "{%32,%33,%34,%35}, %36, 1, 1, 1, 0;\n"
                 : F32(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
/* d += a b: a in registers, b in shared memory with its 16 as rows */
static __device__ __forceinline__ void product(float (&d)[8][4], const uint32_t *a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" N32 "}, "
                 "{%32,%33,%34,%35}, %36, 1, 1, 1, 1;\n"
                 : F32(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
static __device__ __forceinline__ void product(float (&d)[16][4], const uint32_t *a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" N64 "}, "
                 "{%64,%65,%66,%67}, %68, 1, 1, 1, 1;\n"
                 : F32(d, 0), F32(d, 8) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#endif
#endif
