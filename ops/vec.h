/* vec.h - vectors of fg_real for CPU kernels: load, store, fused multiply-add, exp, log, sums.
 *
 * gcc's and clang's vector extensions, so + - * / work on fg_vec directly.  The library is compiled
 * with -ffp-contract=off: a multiply-add is fused exactly where fg_vfma says so, and gcc and clang
 * builds give the same bits.  A loop's tail goes through the same vector code on padded lanes
 * (fg_vload_n, fg_vstore_n), so a value does not depend on where in a row it stands.
 *
 * float: exp and log are polynomials after Cephes (S. Moshier), within 2 ulp on normal results.
 * double (the build for gradient checks): the C library's, lane by lane. */
#ifndef FG_VEC_H
#define FG_VEC_H
#include <math.h>
#include <string.h>
#include "op.h"

#if defined(__AVX__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FG_VEC_BYTES 64
#else
#define FG_VEC_BYTES 32
#endif
#define FG_LANES ((int64_t)(FG_VEC_BYTES / sizeof(fg_real)))

typedef fg_real fg_vec __attribute__((vector_size(FG_VEC_BYTES)));
typedef fg_real fg_vec_any
    __attribute__((vector_size(FG_VEC_BYTES), aligned(sizeof(fg_real)), may_alias));
#ifdef FG_DOUBLE
typedef int64_t fg_vint __attribute__((vector_size(FG_VEC_BYTES)));
#else
typedef int32_t fg_vint __attribute__((vector_size(FG_VEC_BYTES)));
#endif

static inline fg_vec fg_vload(const fg_real *p) { return *(const fg_vec_any *)p; }
static inline void fg_vstore(fg_real *p, fg_vec v) { *(fg_vec_any *)p = v; }
static inline fg_vec fg_vset(fg_real x) { return x - (fg_vec){ 0 }; }   /* x - 0 costs nothing */

/* The first n lanes, 0 <= n < FG_LANES: a load leaves 0 in the others, nothing past n is touched */
#if defined(__AVX512F__) && defined(FG_DOUBLE)
#define FG_MASK(n) ((__mmask8)((1u << (n)) - 1))
static inline fg_vec fg_vload_n(const fg_real *p, int64_t n)
{
    return (fg_vec)_mm512_maskz_loadu_pd(FG_MASK(n), p);
}
static inline void fg_vstore_n(fg_real *p, fg_vec v, int64_t n)
{
    _mm512_mask_storeu_pd(p, FG_MASK(n), (__m512d)v);
}
#elif defined(__AVX512F__)
#define FG_MASK(n) ((__mmask16)((1u << (n)) - 1))
static inline fg_vec fg_vload_n(const fg_real *p, int64_t n)
{
    return (fg_vec)_mm512_maskz_loadu_ps(FG_MASK(n), p);
}
static inline void fg_vstore_n(fg_real *p, fg_vec v, int64_t n)
{
    _mm512_mask_storeu_ps(p, FG_MASK(n), (__m512)v);
}
#elif defined(__AVX__) && defined(FG_DOUBLE)
static inline __m256i fg__mask(int64_t n)
{
    return (__m256i)((fg_vint){ 0, 1, 2, 3 } < (fg_vint){ 0 } + n);
}
static inline fg_vec fg_vload_n(const fg_real *p, int64_t n)
{
    return (fg_vec)_mm256_maskload_pd(p, fg__mask(n));
}
static inline void fg_vstore_n(fg_real *p, fg_vec v, int64_t n)
{
    _mm256_maskstore_pd(p, fg__mask(n), (__m256d)v);
}
#elif defined(__AVX__)
static inline __m256i fg__mask(int64_t n)
{
    return (__m256i)((fg_vint){ 0, 1, 2, 3, 4, 5, 6, 7 } < (fg_vint){ 0 } + (int32_t)n);
}
static inline fg_vec fg_vload_n(const fg_real *p, int64_t n)
{
    return (fg_vec)_mm256_maskload_ps(p, fg__mask(n));
}
static inline void fg_vstore_n(fg_real *p, fg_vec v, int64_t n)
{
    _mm256_maskstore_ps(p, fg__mask(n), (__m256)v);
}
#else
static inline fg_vec fg_vload_n(const fg_real *p, int64_t n)
{
    fg_vec v = { 0 };
    memcpy(&v, p, (size_t)n * sizeof *p);
    return v;
}
static inline void fg_vstore_n(fg_real *p, fg_vec v, int64_t n)
{
    memcpy(p, &v, (size_t)n * sizeof *p);
}
#endif

/* a * b + c, rounded once where the machine can. */
static inline fg_vec fg_vfma(fg_vec a, fg_vec b, fg_vec c)
{
#if defined(__AVX512F__) && defined(FG_DOUBLE)
    return (fg_vec)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX512F__)
    return (fg_vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(FG_DOUBLE)
    return (fg_vec)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__FMA__)
    return (fg_vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

/* mask is all ones (-1) or 0 in each lane, as comparisons of vectors give. */
static inline fg_vec fg_vselect(fg_vint mask, fg_vec a, fg_vec b)
{
#if defined(__AVX__) && !defined(__AVX512F__) && defined(FG_DOUBLE)
    return (fg_vec)_mm256_blendv_pd((__m256d)b, (__m256d)a, (__m256d)mask);
#elif defined(__AVX__) && !defined(__AVX512F__)
    return (fg_vec)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)mask);
#else
    return (fg_vec)(((fg_vint)a & mask) | ((fg_vint)b & ~mask));
#endif
}
/* a > b ? a : b and a < b ? a : b, so b where either is NaN. */
static inline fg_vec fg_vmax(fg_vec a, fg_vec b)
{
#if defined(__AVX__) && !defined(__AVX512F__) && defined(FG_DOUBLE)
    return (fg_vec)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(__AVX__) && !defined(__AVX512F__)
    return (fg_vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return fg_vselect((fg_vint)(a > b), a, b);
#endif
}
static inline fg_vec fg_vmin(fg_vec a, fg_vec b)
{
#if defined(__AVX__) && !defined(__AVX512F__) && defined(FG_DOUBLE)
    return (fg_vec)_mm256_min_pd((__m256d)a, (__m256d)b);
#elif defined(__AVX__) && !defined(__AVX512F__)
    return (fg_vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return fg_vselect((fg_vint)(a < b), a, b);
#endif
}
static inline fg_vec fg_vabs(fg_vec x) { return fg_vmax(x, -x); }
static inline fg_vec fg_vsqrt(fg_vec v)
{
#if defined(__AVX512F__) && defined(FG_DOUBLE)
    return (fg_vec)_mm512_sqrt_pd((__m512d)v);
#elif defined(__AVX512F__)
    return (fg_vec)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX__) && defined(FG_DOUBLE)
    return (fg_vec)_mm256_sqrt_pd((__m256d)v);
#elif defined(__AVX__)
    return (fg_vec)_mm256_sqrt_ps((__m256)v);
#else
    fg_real a[FG_VEC_BYTES / sizeof(fg_real)];
    memcpy(a, &v, sizeof a);
    for (int64_t i = 0; i < FG_LANES; i++) a[i] = (fg_real)sqrt(a[i]);
    memcpy(&v, a, sizeof a);
    return v;
#endif
}

/* Sum and greatest of the lanes, always in the same tree order: lane i takes lane i + half. */
#if defined(__AVX__) && defined(FG_DOUBLE)
static inline fg_real fg_vsum(fg_vec v)
{
#if defined(__AVX512F__)
    const __m256d w = _mm256_add_pd(_mm512_castpd512_pd256((__m512d)v),
                                    _mm512_extractf64x4_pd((__m512d)v, 1));
#else
    const __m256d w = (__m256d)v;
#endif
    const __m128d a = _mm_add_pd(_mm256_castpd256_pd128(w), _mm256_extractf128_pd(w, 1));
    return _mm_cvtsd_f64(_mm_add_sd(a, _mm_unpackhi_pd(a, a)));
}
#elif defined(__AVX__)
static inline fg_real fg_vsum(fg_vec v)
{
#if defined(__AVX512F__)
    const __m512d both = (__m512d)v;
    const __m256 w = _mm256_add_ps(_mm512_castps512_ps256((__m512)v),
                                   _mm256_castpd_ps(_mm512_extractf64x4_pd(both, 1)));
#else
    const __m256 w = (__m256)v;
#endif
    const __m128 a = _mm_add_ps(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));
    const __m128 c = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
#else
static inline fg_real fg_vsum(fg_vec v)
{
    fg_real a[FG_VEC_BYTES / sizeof(fg_real)];
    memcpy(a, &v, sizeof a);
    for (int64_t half = FG_LANES / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; i++) a[i] += a[i + half];
    return a[0];
}
#endif
static inline fg_real fg_vgreatest(fg_vec v)
{
    fg_real a[FG_VEC_BYTES / sizeof(fg_real)];
    memcpy(a, &v, sizeof a);
    for (int64_t i = 1; i < FG_LANES; i++) a[0] = a[i] > a[0] ? a[i] : a[0];
    return a[0];
}

#ifdef FG_DOUBLE
#define FG_VEC_LANEWISE(name, expr)                                                \
    static inline fg_vec name(fg_vec v)                                            \
    {                                                                              \
        fg_real a[FG_VEC_BYTES / sizeof(fg_real)];                                 \
        memcpy(a, &v, sizeof a);                                                   \
        for (int64_t i = 0; i < FG_LANES; i++) { const fg_real x = a[i]; a[i] = (expr); } \
        memcpy(&v, a, sizeof a);                                                   \
        return v;                                                                  \
    }
FG_VEC_LANEWISE(fg_vexp, exp(x))
FG_VEC_LANEWISE(fg_vlog, log(x))
FG_VEC_LANEWISE(fg_vlog1p, log1p(x))
FG_VEC_LANEWISE(fg_vtanh, tanh(x))
#else
static inline fg_vec fg_vexp(fg_vec x)
{
    const fg_vint nan = (fg_vint)(x != x), under = (fg_vint)(x < fg_vset(-103.97208f));
    const fg_vint over = (fg_vint)(x > fg_vset(88.72283f));
    const fg_vec in = x;
    x = fg_vmin(fg_vmax(x, fg_vset(-104)), fg_vset(89));
    const fg_vec magic = fg_vset(12582912.0f);                 /* 1.5 * 2^23 rounds to an integer */
    const fg_vec n = fg_vfma(x, fg_vset(1.44269504088896341f), magic) - magic;
    fg_vec r = fg_vfma(n, fg_vset(-0.693359375f), x);
    r = fg_vfma(n, fg_vset(2.12194440e-4f), r);
    fg_vec p = fg_vset(1.9875691500e-4f);
    p = fg_vfma(p, r, fg_vset(1.3981999507e-3f));
    p = fg_vfma(p, r, fg_vset(8.3334519073e-3f));
    p = fg_vfma(p, r, fg_vset(4.1665795894e-2f));
    p = fg_vfma(p, r, fg_vset(1.6666665459e-1f));
    p = fg_vfma(p, r, fg_vset(5.0000001201e-1f));
    p = fg_vfma(p, r * r, r) + 1;
    /* 2^k in two steps, so that subnormal results are rounded once. */
    const fg_vint k = __builtin_convertvector(n, fg_vint), k1 = k >> 1, k2 = k - k1;
    p = p * (fg_vec)((k1 + 127) << 23) * (fg_vec)((k2 + 127) << 23);
    p = fg_vselect(under, fg_vset(0), p);
    p = fg_vselect(over, fg_vset(INFINITY), p);
    return fg_vselect(nan, in, p);
}

/* ln(1 + m) + e ln 2 for 1 + m in [sqrt(1/2), sqrt(2)]. */
static inline fg_vec fg__vlog_sum(fg_vec m, fg_vec e)
{
    const fg_vec z = m * m;
    fg_vec p = fg_vset(7.0376836292e-2f);
    p = fg_vfma(p, m, fg_vset(-1.1514610310e-1f));
    p = fg_vfma(p, m, fg_vset(1.1676998740e-1f));
    p = fg_vfma(p, m, fg_vset(-1.2420140846e-1f));
    p = fg_vfma(p, m, fg_vset(1.4249322787e-1f));
    p = fg_vfma(p, m, fg_vset(-1.6668057665e-1f));
    p = fg_vfma(p, m, fg_vset(2.0000714765e-1f));
    p = fg_vfma(p, m, fg_vset(-2.4999993993e-1f));
    p = fg_vfma(p, m, fg_vset(3.3333331174e-1f));
    fg_vec y = p * m * z;
    y = fg_vfma(e, fg_vset(-2.12194440e-4f), y);
    y = fg_vfma(z, fg_vset(-0.5f), y);
    return fg_vfma(e, fg_vset(0.693359375f), m + y);
}

/* 0 gives -inf, below 0 NaN. */
static inline fg_vec fg_vlog(fg_vec x)
{
    const fg_vint zero = (fg_vint)(x == fg_vset(0)), same = (fg_vint)(x == fg_vset(INFINITY));
    const fg_vint bad = (fg_vint)(x < fg_vset(0)) | (fg_vint)(x != x);
    const fg_vint tiny = (fg_vint)(x < fg_vset(1.17549435e-38f));
    const fg_vint bits = (fg_vint)fg_vselect(tiny, x * 8388608.0f, x);
    fg_vec e = __builtin_convertvector(((bits >> 23) & 255) - 126, fg_vec);
    e = e - fg_vselect(tiny, fg_vset(23), fg_vset(0));
    fg_vec m = (fg_vec)((bits & 0x007fffff) | 0x3f000000);           /* in [1/2, 1) */
    const fg_vint low = (fg_vint)(m < fg_vset(0.707106781186547524f));
    e = e - fg_vselect(low, fg_vset(1), fg_vset(0));
    m = m + fg_vselect(low, m, fg_vset(0)) - 1;
    fg_vec y = fg__vlog_sum(m, e);
    y = fg_vselect(same, x, y);
    y = fg_vselect(zero, fg_vset(-INFINITY), y);
    return fg_vselect(bad, fg_vset(NAN), y);
}

/* ln(1 + x), 0 <= x <= 1, without rounding 1 + x: above sqrt(2) - 1 as ln 2 + ln(1 + (x-1)/2). */
static inline fg_vec fg_vlog1p(fg_vec x)
{
    const fg_vint high = (fg_vint)(x > fg_vset(0.414213562373095049f));
    const fg_vec m = fg_vselect(high, (x - 1) * 0.5f, x);
    return fg__vlog_sum(m, fg_vselect(high, fg_vset(1), fg_vset(0)));
}

/* Below 5/8 an odd polynomial (Cephes), above 1 - 2 / (e^(2|x|) + 1). */
static inline fg_vec fg_vtanh(fg_vec x)
{
    const fg_vec u = fg_vabs(x), z = x * x;
    const fg_vec far = 1 - 2 / (fg_vexp(u + u) + 1);
    fg_vec p = fg_vset(-5.70498872745e-3f);
    p = fg_vfma(p, z, fg_vset(2.06390887954e-2f));
    p = fg_vfma(p, z, fg_vset(-5.37397155531e-2f));
    p = fg_vfma(p, z, fg_vset(1.33314422036e-1f));
    p = fg_vfma(p, z, fg_vset(-3.33332819422e-1f));
    const fg_vec near = fg_vfma(p * z, x, x);
    const fg_vec y = fg_vselect((fg_vint)(x < fg_vset(0)), -far, far);
    return fg_vselect((fg_vint)(u < fg_vset(0.625f)), near, y);
}
#endif

/* Stable on both sides: e = exp(-|x|) never overflows. */
static inline fg_vec fg_vsigmoid(fg_vec x)
{
    const fg_vec e = fg_vexp(-fg_vabs(x)), s = 1 / (1 + e);
    return fg_vselect((fg_vint)(x < fg_vset(0)), e * s, s);
}
static inline fg_vec fg_vlog_sigmoid(fg_vec x)
{
    return fg_vmin(x, fg_vset(0)) - fg_vlog1p(fg_vexp(-fg_vabs(x)));
}

/* The same functions of one number, bit for bit. */
static inline fg_real fg_exp1(fg_real x) { return fg_vexp(fg_vset(x))[0]; }
static inline fg_real fg_log1(fg_real x) { return fg_vlog(fg_vset(x))[0]; }
static inline fg_real fg_sigmoid1(fg_real x) { return fg_vsigmoid(fg_vset(x))[0]; }
#endif
