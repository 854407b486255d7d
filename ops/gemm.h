/* gemm.h - matrix products for CPU kernels, row-major: c = alpha op(a) op(b) + beta c.
 *
 * op(a) is m x k, op(b) k x n, c m x n; lda, ldb, ldc are row pitches in elements.
 * float: oneDNN's dnnl_sgemm; double (the build for gradient checks): loops.
 * The split into tasks depends on the shape alone, so any number of threads gives the same bits. */
#ifndef FG_GEMM_H
#define FG_GEMM_H
#include "op.h"

void fg__gemm(bool ta, bool tb, int64_t m, int64_t n, int64_t k, fg_real alpha,
              const fg_real *a, int64_t lda, const fg_real *b, int64_t ldb,
              fg_real beta, fg_real *c, int64_t ldc, int threads);

/* The same with bias[j] added to column j while it is still in the cache; bias may be NULL. */
void fg__gemm_bias(bool ta, bool tb, int64_t m, int64_t n, int64_t k, fg_real alpha,
                   const fg_real *a, int64_t lda, const fg_real *b, int64_t ldb,
                   fg_real beta, fg_real *c, int64_t ldc, const fg_real *bias, int threads);

/* fg__gemm on the calling thread alone: for use inside a parallel region. */
void fg__gemm_serial(bool ta, bool tb, int64_t m, int64_t n, int64_t k, fg_real alpha,
                     const fg_real *a, int64_t lda, const fg_real *b, int64_t ldb,
                     fg_real beta, fg_real *c, int64_t ldc);
#endif
