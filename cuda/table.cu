/* table.cu - the kernels of ops.def by name; an op whose file defines no record has none. */
#include <string.h>
#include "kernel.cuh"

#define FG_OP(name, ins, outs, attrs, formula) \
    extern "C" __attribute__((weak)) const fg_kernel fg_kernel_##name;
#include "ops.def"
#undef FG_OP

const fg_kernel *fg_kernel_of(const char *op)
{
#define FG_OP(name, ins, outs, attrs, formula) \
    if (!strcmp(op, #name)) return &fg_kernel_##name;
#include "ops.def"
#undef FG_OP
    return NULL;
}
