/* binary.cu - ops/binary.c on a GPU: elementwise functions of tensors of shapes that broadcast.
 *
 * Bytes: every input and the output once; what broadcasts comes from cache.  Equal shapes take the
 * flat path, a bias row or a [...,1] column costs one division for eight elements. */
#include "elementwise.cuh"

template <class F, int N> static void launch(const fg_exec *e, cudaStream_t stream)
{
    const fg_shape *in[N];
    for (int k = 0; k < N; k++) in[k] = &e->in_shape[k];
    fg_map_broadcast<F, N>(e, stream, in, F());
}

#define FORMULA(name, ...)                                                              \
    struct name##_of {                                                                  \
        __device__ __forceinline__ float operator()(const float *in) const              \
        {                                                                               \
            const float a = in[0], b = in[1];                                           \
            return __VA_ARGS__;                                                         \
        }                                                                               \
    };                                                                                  \
    FG_KERNEL(name) = { .launch = launch<name##_of, 2>, .pitched_in = 3, .pitched_out = 1 };
FORMULA(add, a + b)
FORMULA(sub, a - b)
FORMULA(mul, a * b)
FORMULA(div, a / b)
FORMULA(max, a >= b ? a : b)

struct where_ge_of {
    __device__ __forceinline__ float operator()(const float *in) const
    {
        return in[0] >= in[1] ? in[2] : 0;
    }
};
FG_KERNEL(where_ge) = { .launch = launch<where_ge_of, 3>, .pitched_in = 7, .pitched_out = 1 };
