/* shift.cuh - what shift_mix.cu and shift_norm.cu share: where a row stands in its document. */
#ifndef FG_SHIFT_CUH
#define FG_SHIFT_CUH
#include "rows.cuh"

/* What row t of a sequence is, `row` of all: PAD gives 0, START has nothing before it. */
enum fg_shift_row { PAD, START, INSIDE };
static __device__ __forceinline__ fg_shift_row fg_shift_place(const int32_t *first, int64_t past,
                                                              int64_t row, int64_t t)
{
    const int64_t low = first && first[row] > 0 ? first[row] : 0, p = past + t;
    return low > p ? PAD : low == p ? START : INSIDE;
}
#endif
