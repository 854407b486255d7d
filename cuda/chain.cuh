/* chain.cuh - kernels so short that the time between two of them counts: a kernel of a chain is
 * launched while the one in front still runs (programmatic dependent launch, compute capability 9).
 *
 * Such a kernel calls fg_chain_next() at once, so that the next may come, and fg_chain_wait()
 * before it reads or writes anything that a launch in front writes or reads.  Every thread waits:
 * then the end of a kernel means that all in front of it have ended too, and a wait for the last
 * is a wait for all.  Only what no launch in front writes may be read before the wait. */
#ifndef FG_CHAIN_CUH
#define FG_CHAIN_CUH
#include "kernel.cuh"

static __device__ __forceinline__ void fg_chain_next()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
static __device__ __forceinline__ void fg_chain_wait()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Of the current device: 80, 90, ... */
static inline int fg_capability()
{
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return 10 * major + minor;
}

/* kernel(args...) as a part of a chain, in clusters of that many blocks. */
template <class... P, class... A>
static void fg_chain_launch(void (*kernel)(P...), unsigned blocks, unsigned threads, size_t shared,
                            unsigned cluster, cudaStream_t stream, A... args)
{
    cudaLaunchAttribute attr[2];
    cudaLaunchConfig_t c = {};
    c.gridDim = dim3(blocks), c.blockDim = dim3(threads);
    c.dynamicSmemBytes = shared, c.stream = stream, c.attrs = attr;
    if (fg_capability() >= 90) {
        attr[c.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attr[c.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attr[c.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attr[c.numAttrs].val.clusterDim.x = cluster;
        attr[c.numAttrs].val.clusterDim.y = attr[c.numAttrs].val.clusterDim.z = 1;
        c.numAttrs++;
    }
    cudaLaunchKernelEx(&c, kernel, P(args)...);
}
#endif
