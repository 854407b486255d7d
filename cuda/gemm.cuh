/* gemm.cuh - matrix products through cuBLASLt: one call, row-major matrices of any row pitch.
 *
 *     y = alpha op(a) op(b) + beta y + bias,    op transposes where asked
 *
 * op(a): [M,K]   op(b): [K,N]   y: [M,N]   bias: [N], added to every row.
 * a and b are both bf16, or both f32; sums are f32 (true f32, never tf32).
 *
 * Extents.  Where all rows begin at multiples of 16 bytes, what an extent over 512 has beyond a
 * multiple of 8 is a small product of its own: cuBLASLt is slow with the odd extent.
 * Rounding.  A y of bf16 is rounded once, but for two cases in which cuBLASLt was seen to round the
 * product before it adds: beta != 0 (and so a K that is cut), and a bias where N or K is no
 * multiple of 8.
 * Choice of the algorithm.  A shape's first call outside of a capture takes up to 8 candidates of
 * the library's heuristic, runs each on the real operands, keeps the best until the last
 * fg_gemm_close, and waits for the stream; later calls enqueue and nothing else.  A call with
 * beta != 0 cannot be repeated, so it uses what a call with beta = 0 found.  A call during a
 * capture never measures.  Where nothing was measured the heuristic's first candidate runs.
 * Bits.  A candidate that gives other bits from run to run is dropped.  Among those that give the
 * bits of the heuristic's first candidate (checked on the operands, and only with the same split
 * of K) the fastest is taken, so noise in the measurement does not change results from process to
 * process; one with other bits is taken only if it splits K and is faster by more than a tenth. */
#ifndef FG_GEMM_CUH
#define FG_GEMM_CUH
#include "kernel.cuh"

#define FG_GEMM_WORK ((size_t)32 << 20)        /* bytes of scratch a product may use */

typedef struct fg_gemm_call {
    int64_t M, N, K;
    bool ta, tb;
    const void *a, *b;
    void *y;
    int64_t pitch_a, pitch_b, pitch_y;         /* elements from row to row, as they are stored */
    fg_dtype type, y_type;                     /* of a and b; of y: f32, or bf16 like a and b */
    float alpha, beta;
    const void *bias;                          /* of y's type; NULL: none */
    int64_t batch, step_a, step_b, step_y;     /* products of equal shape; elements between them */
    void *work;                                /* FG_GEMM_WORK bytes, 256-byte aligned */
} fg_gemm_call;

/* Once per backend, with its device current.  FG_ERR_DEVICE: cuBLASLt does not start. */
fg_status fg_gemm_open(void);
void      fg_gemm_close(void);
/* Enqueues one product.  Where cuBLASLt refuses, y becomes NaN and fg_gemm_failure tells why. */
void      fg_gemm(const fg_gemm_call *g, cudaStream_t stream);
/* What the first refused product since the last call was told, or NULL; clears it. */
const char *fg_gemm_failure(void);

/* y = x in y's dtype, n elements of contiguous, 16-byte aligned memory. */
void fg_convert(const fg_in &x, const fg_out &y, int64_t n, cudaStream_t stream);

/* A product of contiguous matrices a [M,K] and b [K,N], alpha = 1, beta = 0: the usual start. */
static inline fg_gemm_call fg_gemm_of(int64_t M, int64_t N, int64_t K, bool ta, bool tb)
{
    fg_gemm_call g = {};
    g.M = M, g.N = N, g.K = K, g.ta = ta, g.tb = tb;
    g.pitch_a = ta ? M : K, g.pitch_b = tb ? K : N, g.pitch_y = N;
    g.alpha = 1, g.batch = 1;
    return g;
}

/* Why a product of these types is none of cuBLASLt's, or NULL. */
static inline const char *fg_gemm_unfit(fg_dtype a, fg_dtype b, fg_dtype y)
{
    if (a != b) return "the factors are of two dtypes; cuBLASLt takes f32 by f32 or bf16 by bf16";
    if (a == FG_F32 && y == FG_BF16) return "cuBLASLt cannot round a product of f32 to bf16";
    return nullptr;
}
#endif
