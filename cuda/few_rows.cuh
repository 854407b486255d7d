/* few_rows.cuh - y = x m^T + b for few rows of x: what linear.cu takes where it fits. */
#ifndef FG_FEW_ROWS_CUH
#define FG_FEW_ROWS_CUH
#include "kernel.cuh"

/* linear's inputs x [...,N], m [M,N], b; true if it was enqueued, false if it does not fit. */
bool fg_few_linear(const fg_exec *e, cudaStream_t stream);
#endif
