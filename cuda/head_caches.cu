/* head_caches.cu - ops/head_caches.c on a GPU: what a new token leaves behind in all heads.
 *
 * A warp per sequence and head; a thread has every 32nd channel.  Bytes: k and v, the rows kept and
 * the rows of the caches once. */
#include "chain.cuh"
#include "elementwise.cuh"

enum { THREADS = 64, MOST = 8 };                 /* channels of a thread */

struct token {
    fg_out k_cache, v_cache, f_cache, k_last, v_last;
    fg_source k, v, ka, va, f;
    fg_in fb, w;
    const int32_t *first, *past;
    int B, C, H, D, w_step;                      /* w of head h begins at h * w_step */
    float eps;
};

enum place { PAD, START, INSIDE };

static __device__ __forceinline__ fg_in as_in(const fg_out &x) { return { x.p, x.narrow }; }
static __device__ __forceinline__ float sigmoid(float x) { return 1 / (1 + expf(-x)); }

/* x of this token, shifted; what is before START counts as 0.  last becomes x. */
template <int E>
static __device__ __forceinline__ void shift(float (&y)[E], const fg_source &x, const fg_source &a,
                                             const fg_out &last, place is, int64_t head, int D)
{
    const float g = sigmoid(a.x[a.place.at(head)]);
#pragma unroll
    for (int j = 0; j < E; j++) {
        const int d = threadIdx.x % 32 + 32 * j;
        if (d >= D) { y[j] = 0; continue; }
        const int64_t i = head * D + d;
        const float now = x.x[x.place.at(i)], before = is == INSIDE ? as_in(last)[i] : 0;
        const float keep = is == PAD ? 0 : (1 - g) * now;
        y[j] = is == INSIDE ? fmaf(g, before, keep) : keep;
        last.put(i, now);
    }
}

template <int E>
static __global__ void __launch_bounds__(THREADS) head_caches(const __grid_constant__ token k)
{
    const int lane = threadIdx.x % 32;
    const int64_t head = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    fg_chain_next();
    fg_chain_wait();
    if (head >= (int64_t)k.B * k.H) return;
    const int64_t b = head / k.H, h = head % k.H, past = *k.past;
    const int64_t low = k.first && k.first[b] > 0 ? k.first[b] : 0;
    const place is = low > past ? PAD : low == past ? START : INSIDE;
    float kd[E], vd[E], squares = 0;
    shift<E>(kd, k.k, k.ka, k.k_last, is, head, k.D);
    shift<E>(vd, k.v, k.va, k.v_last, is, head, k.D);
#pragma unroll
    for (int j = 0; j < E; j++) squares = fmaf(kd[j], kd[j], squares);
    const float rstd = rsqrtf(fg_warp_sum(squares) / k.D + k.eps);
    if (past < 0 || past >= k.C) return;                 /* does not fit: dropped */
    const int64_t row = (b * k.C + past) * k.H + h;
#pragma unroll
    for (int j = 0; j < E; j++) {
        const int d = lane + 32 * j;
        if (d >= k.D) continue;
        k.k_cache.put(row * k.D + d, kd[j] * rstd * k.w[h * k.w_step + d]);
        k.v_cache.put(row * k.D + d, vd[j]);
    }
    if (lane) return;
    const float f = k.f.x[k.f.place.at(head)] + k.fb[h];
    k.f_cache.put(row, fminf(f, 0) - log1pf(expf(-fabsf(f))));
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    enum { K_CACHE, V_CACHE, F_CACHE, K_LAST, V_LAST, K, V, KA, VA, F, FB, W, FIRST, PAST };
    const int64_t *s = e->in_shape[K_CACHE].dim;
    token k = {};
    k.k_cache = fg_output_of(e, K_CACHE), k.v_cache = fg_output_of(e, V_CACHE);
    k.f_cache = fg_output_of(e, F_CACHE);
    k.k_last = fg_output_of(e, K_LAST), k.v_last = fg_output_of(e, V_LAST);
    k.k = fg_source_of(e, K), k.v = fg_source_of(e, V), k.f = fg_source_of(e, F);
    k.ka = fg_source_of(e, KA), k.va = fg_source_of(e, VA);
    k.fb = fg_input_of(e, FB), k.w = fg_input_of(e, W);
    k.first = (const int32_t *)e->in[FIRST], k.past = (const int32_t *)e->in[PAST];
    k.B = (int)s[0], k.C = (int)s[1], k.H = (int)s[2], k.D = (int)s[3];
    k.w_step = e->in_shape[W].dim[0] == s[3] ? 0 : k.D;
    k.eps = (float)((const struct fg_attr_head_caches *)e->attr)->eps;
    const unsigned blocks = fg_blocks((int64_t)k.B * k.H, THREADS / 32);
    if (k.D <= 64) fg_chain_launch(head_caches<2>, blocks, THREADS, 0, 1, stream, k);
    else if (k.D <= 128) fg_chain_launch(head_caches<4>, blocks, THREADS, 0, 1, stream, k);
    else fg_chain_launch(head_caches<MOST>, blocks, THREADS, 0, 1, stream, k);
}

static const char *unfit(const fg_infer *c)
{
    const int64_t *s = c->in[0].dim;
    if (s[3] > 32 * MOST) return "heads wider than 256";
    return s[0] * s[1] > 1 << 30 || s[2] > 65536 ? "too many positions" : nullptr;
}

FG_KERNEL(head_caches) = { .launch = launch, .unfit = unfit, .pitched_in = 0x3e0 };
