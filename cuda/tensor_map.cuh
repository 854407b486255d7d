/* tensor_map.cuh - Hopper's copy engine: boxes of matrices to shared memory, in wgmma's layout.
 *
 * A map sees a bf16 tensor [B,T,heads,D] whose tokens are `pitch` elements apart; a box is 64
 * columns of some tokens of one head, tokens behind the last being 0.  Source: CUDA driver API,
 * "Tensor Map Object Management"; PTX ISA, "cp.async.bulk.tensor". */
#ifndef FG_TENSOR_MAP_CUH
#define FG_TENSOR_MAP_CUH
#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>

typedef CUresult (*fg_encode)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                              const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                              const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* The driver's function, found at run time so that nothing links to the driver; NULL: too old. */
static inline fg_encode fg_encoder()
{
    void *f = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault,
                                         &found) != cudaSuccess
        || found != cudaDriverEntryPointSuccess) return nullptr;
    return (fg_encode)f;
}

static inline CUtensorMap fg_map_of(fg_encode encode, const void *x, int64_t B, int64_t T,
                                    int64_t heads, int64_t D, int64_t pitch, int tokens)
{
    CUtensorMap m;
    const cuuint64_t size[4] = { (cuuint64_t)D, (cuuint64_t)heads, (cuuint64_t)T, (cuuint64_t)B };
    const cuuint64_t bytes[3] = { (cuuint64_t)D * 2, (cuuint64_t)pitch * 2,
                                  (cuuint64_t)(T * pitch) * 2 };
    const cuuint32_t box[4] = { 64, 1, (cuuint32_t)tokens, 1 }, each[4] = { 1, 1, 1, 1 };
    encode(&m, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, (void *)(uintptr_t)x, size, bytes, box, each,
           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return m;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
/* The barrier's phase ends when so many bytes have come. */
static __device__ __forceinline__ void fg_expect(uint32_t bar, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(bar), "r"(bytes) : "memory");
}
/* 64 columns, from column d on, of tokens t ... of a head. */
static __device__ __forceinline__ void fg_box_load(uint32_t to, const CUtensorMap *map, int d,
                                                   int head, int t, int b, uint32_t bar)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6];"
                 :: "r"(to), "l"(map), "r"(d), "r"(head), "r"(t), "r"(b), "r"(bar) : "memory");
}
/* Such a box from shared memory; of what lies behind the last token nothing is written. */
static __device__ __forceinline__ void fg_box_store(const CUtensorMap *map, int d, int head, int t,
                                                    int b, uint32_t from)
{
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group "
                 "[%0, {%1, %2, %3, %4}], [%5];"
                 :: "l"(map), "r"(d), "r"(head), "r"(t), "r"(b), "r"(from) : "memory");
}
/* What this thread stored has been read from shared memory. */
static __device__ __forceinline__ void fg_boxes_read()
{
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}
static __device__ __forceinline__ void fg_bulk_load(uint32_t to, const void *from, int bytes,
                                                    uint32_t bar)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];"
                 :: "r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
}
static __device__ __forceinline__ void fg_barriers_ready()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
#endif
#endif
