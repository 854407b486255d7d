/* ssd_scan.cu - the state space scan: ops/ssd_scan.c on a GPU.
 *
 *     S_t = e^(dt_t a) S_(t-1) + dt_t x_t b_t^T,   y_t = S_t c_t + d x_t,   end = the last S
 *
 * Two ways.  Token by token, any shape and dtype: a warp per row p of a head's state, its columns
 * in registers; for decoding, f32, and shapes that the other does not take.  In chunks of 128, for
 * bf16, P = 64, N = 64 or 128, on tensor cores:
 *
 *     decays (ssd.cuh), the states that enter every chunk (ssd.cuh), then for each chunk and some
 *     heads  y_i = sum_(j<=i) (c_i.b_j) e^(sum_i - sum_j) dt_j x_j + keep_i S c_i + d x_i,
 *     with the scores c_i.b_j in registers, once for all heads of the block; on Hopper in
 *     ssd_scan_sm90.cu.
 *
 * Bytes of the chunks: x twice, y, and the states, N/R of x's size, written and read. */
#include "ssd.cuh"

enum { X = FG_SSD_X, DT, A, B_IN, C_IN, D, STATE, FIRST, PAST };

/* Chosen on an H100 80GB HBM3, 2026-11-26: 0.27 ms on wgmma and 0.34 ms by the chunks below, for
 * 16384 tokens, 48 heads of 64, N = 128. */
#define CHUNK  128
#define BLOCKS 512                               /* of the last kernel, about */
#define BLOCKS_SM90 120                          /* at least, where there are as many heads */

/* ---- token by token ------------------------------------------------------------------------- */

struct rows_of { fg_in x; int64_t pitch; };      /* [B*T, n] */

struct recurrence {
    fg_ssd z;
    rows_of x, b, c;
    fg_in dt, a, d;                              /* d.p NULL: absent */
    const float *state;
    fg_out y;
    float *end;
};

/* E * 32 columns at most; a block has eight rows of one head. */
template <int E>
static __global__ void __launch_bounds__(256, 1) follow(recurrence k)
{
    const fg_ssd &z = k.z;
    const int lane = threadIdx.x % 32;
    const int64_t parts = (z.P + 7) / 8, row = blockIdx.x / parts, b = row / z.H, h = row % z.H;
    const int64_t p = blockIdx.x % parts * 8 + threadIdx.x / 32, g = h / (z.H / z.G);
    if (p >= z.P) return;
    const float rate = k.a[h], skip = k.d.p ? k.d[h] : 0.0f;
    const int64_t past = z.past ? *z.past : 0, at = (row * z.P + p) * z.N;
    float s[E];
#pragma unroll
    for (int e = 0; e < E; e++) {
        const int n = lane + 32 * e;
        s[e] = k.state && n < z.N ? k.state[at + n] : 0.0f;
    }
    for (int64_t t = 0; t < z.T; t++) {
        const int64_t token = b * z.T + t, low = fg_ssd_low(z, b, t);
        const float dt = k.dt[token * z.H + h], x = k.x.x[token * k.x.pitch + h * z.P + p];
        const float decay = expf(dt * rate), in = dt * x;
        const bool fresh = low >= past + t, pad = low > past + t;
        float sum = 0;
#pragma unroll
        for (int e = 0; e < E; e++) {
            const int n = lane + 32 * e;
            if (n >= z.N) continue;
            const float u = in * k.b.x[token * k.b.pitch + g * z.N + n];
            s[e] = pad ? 0.0f : fresh ? u : fmaf(decay, s[e], u);
            sum = fmaf(s[e], k.c.x[token * k.c.pitch + g * z.N + n], sum);
        }
        sum = fg_warp_sum(sum);
        if (lane == 0) k.y.put((token * z.H + h) * z.P + p, pad ? 0.0f : sum + skip * x);
    }
#pragma unroll
    for (int e = 0; e < E; e++) {
        const int n = lane + 32 * e;
        if (n < z.N) k.end[at + n] = s[e];
    }
}

static rows_of rows_at(const fg_exec *e, int i, int64_t n)
{
    return { fg_input_of(e, i), fg_pitch_of(&e->in_rows[i], n) };
}

static void follow_launch(const fg_exec *e, const fg_ssd &z, cudaStream_t stream)
{
    const recurrence k = { z, rows_at(e, X, z.H * z.P), rows_at(e, B_IN, z.G * z.N),
                           rows_at(e, C_IN, z.G * z.N), fg_input_of(e, DT), fg_input_of(e, A),
                           fg_input_of(e, D), (const float *)e->in[STATE], fg_output_of(e, 0),
                           (float *)e->out[1] };
    const unsigned blocks = (unsigned)(z.B * z.H * ((z.P + 7) / 8));
    if (z.N <= 32) follow<1><<<blocks, 256, 0, stream>>>(k);
    else if (z.N <= 128) follow<4><<<blocks, 256, 0, stream>>>(k);
    else follow<8><<<blocks, 256, 0, stream>>>(k);
}

/* ---- in chunks ------------------------------------------------------------------------------ */

typedef fg_ssd_chunks chunks;

template <int N> struct tile {
    alignas(128) bf16 x[CHUNK * 64];
    alignas(128) bf16 state[64 * N];
    alignas(16) float2 sum[CHUNK];
    alignas(16) float dt[CHUNK], tail[CHUNK];
};

template <int N>
static __device__ __forceinline__ void load_head(const chunks &k, tile<N> *m, int b, int chunk,
                                                 int h)
{
    const int t0 = chunk * CHUNK;
    const int64_t row = b * k.z.H + h, at = row * k.d.padded + t0;
    fg_tile_load<64, CHUNK, 256>(m->x, k.x + (b * k.z.T + t0) * k.x_row + h * 64, k.x_row,
                                 (int)k.z.T - t0);
    const bf16 *state = k.states + (row * k.d.chunks + chunk) * 64 * N;
    for (int n = threadIdx.x; n < 64 * N / 8; n += 256)
        fg_copy_async(fg_shared(m->state + 8 * n), state + 8 * n, true);
    const int i = threadIdx.x % 64 * 4;
    switch (threadIdx.x / 64) {                  /* two warps each */
    case 0: fg_copy_async(fg_shared((float *)m->sum + i), (const float *)(k.d.sum + at) + i, true);
            break;
    case 1: if (i < CHUNK) fg_copy_async(fg_shared(m->dt + i), k.d.dt + at + i, true);
            break;
    case 2: if (i < CHUNK) fg_copy_async(fg_shared(m->tail + i), k.d.tail + at + i, true);
    }
}

/* A fragment of scores, decays and steps: targets r and r + 8, sources j0 .. j0 + 16 of an earlier
 * block; from[low]: from that block's last token to the target. */
static __device__ __forceinline__ void weigh_far(uint32_t *a, const float (*score)[4],
                                                 const float *dt, const float *tail, int j0, int c,
                                                 const float *from)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float2 step = *(const float2 *)(dt + j0 + 8 * half + c);
        const float2 far = *(const float2 *)(tail + j0 + 8 * half + c);
        const float u = step.x * far.x, v = step.y * far.y;
#pragma unroll
        for (int low = 0; low < 2; low++)
            a[2 * half + low] = fg_pack2(score[half][2 * low] * (u * from[low]),
                                         score[half][2 * low + 1] * (v * from[low]));
    }
}

/* The same on the diagonal. */
static __device__ __forceinline__ void weigh(uint32_t *a, const float (*score)[4],
                                             const float2 *sum, const float *dt,
                                             const int32_t *segment, int r, int j0, int c,
                                             const float2 *own, const int *seg)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int j = j0 + 8 * half + c;
        const float4 s = *(const float4 *)(sum + j);
        const float2 step = *(const float2 *)(dt + j);
        const int2 segs = *(const int2 *)(segment + j);
#pragma unroll
        for (int low = 0; low < 2; low++) {
            const int i = r + 8 * low;
            const float u = fg_exp2(fg_two_diff(own[low], make_float2(s.x, s.y)));
            const float v = fg_exp2(fg_two_diff(own[low], make_float2(s.z, s.w)));
            const bool sees = j <= i && segs.x == seg[low], also = j < i && segs.y == seg[low];
            a[2 * half + low] = fg_pack2(sees ? score[half][2 * low] * u * step.x : 0.0f,
                                         also ? score[half][2 * low + 1] * v * step.y : 0.0f);
        }
    }
}

/* y of this warp's 16 rows of one head. */
template <int N>
static __device__ __forceinline__ void run_head(const chunks &k, const tile<N> *m,
                                                const int32_t *segment, int b, int chunk, int h,
                                                const uint32_t (*q)[4], const float (*score)[4])
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = 2 * (lane % 4);
    const int r = 16 * warp + g;
    const int t0 = chunk * CHUNK;
    const int64_t at = (b * k.z.H + h) * k.d.padded + t0;
    const float keep[2] = { k.d.keep[at + r], k.d.keep[at + r + 8] };
    const float2 own[2] = { m->sum[r], m->sum[r + 8] };
    const int seg[2] = { segment[r], segment[r + 8] };
    const uint32_t x = fg_shared(m->x), state = fg_shared(m->state);
    float y[8][4] = {};
#pragma unroll
    for (int n = 0; n < N / 16; n++)
#pragma unroll
        for (int p = 0; p < 4; p++) {
            uint32_t s[4];
            fg_b_trans<64>(s, state + n / 4 * 64 * 128, n % 4 * 16, 16 * p);
            fg_mma(y[2 * p], q[n], s[0], s[1]);
            fg_mma(y[2 * p + 1], q[n], s[2], s[3]);
        }
#pragma unroll
    for (int p = 0; p < 8; p++)
#pragma unroll
        for (int e = 0; e < 4; e++) y[p][e] *= keep[e / 2];
#pragma unroll
    for (int j = 0; j < CHUNK / 16; j++) {
        if (j > warp) continue;
        uint32_t a[4];
        if (j == warp) {
            weigh(a, score + 2 * j, m->sum, m->dt, segment, r, 16 * j, c, own, seg);
        } else {
            const float2 last = m->sum[16 * j + 15];
            const int in = segment[16 * j + 15];
            const float from[2] = { seg[0] == in ? fg_exp2(fg_two_diff(own[0], last)) : 0.0f,
                                    seg[1] == in ? fg_exp2(fg_two_diff(own[1], last)) : 0.0f };
            weigh_far(a, score + 2 * j, m->dt, m->tail, 16 * j, c, from);
        }
#pragma unroll
        for (int p = 0; p < 4; p++) {
            uint32_t v[4];
            fg_b<64>(v, x, 16 * j, 16 * p);
            fg_mma(y[2 * p], a, v[0], v[1]);
            fg_mma(y[2 * p + 1], a, v[2], v[3]);
        }
    }
    const float skip = k.skip ? k.skip[h] : 0.0f;
#pragma unroll
    for (int low = 0; low < 2; low++) {
        const int i = r + 8 * low;
        bf16 *to = k.y + ((b * k.z.T + t0 + i) * k.z.H + h) * 64 + 8 * (lane % 4);
#pragma unroll
        for (int n = 0; n < 8; n += 4) {
            uint32_t out[4];
#pragma unroll
            for (int p = 0; p < 4; p++) {
                const float2 v = fg_pair<64>(m->x, i, 8 * (n + p) + c);
                const float u = fmaf(skip, v.x, y[n + p][2 * low]);
                const float w = fmaf(skip, v.y, y[n + p][2 * low + 1]);
                out[p] = seg[low] < 0 ? 0u : fg_pack2(u, w);
            }
            fg_quad_turn(out);
            if (t0 + i < k.z.T) fg_store4(to + 8 * n, out);
        }
    }
}

/* A block is a chunk and some heads of a group; a warp has 16 tokens. */
template <int N>
static __global__ void __launch_bounds__(256, 1) run_chunks(chunks k)
{
    extern __shared__ __align__(128) char memory[];
    tile<N> *tiles = (tile<N> *)memory;
    int32_t *segment = (int32_t *)(tiles + 2);
    const int warp = threadIdx.x / 32;
    const int parts = (int)k.parts, G = (int)k.z.G, count = (int)k.d.chunks, M = (int)k.z.H / G;
    const int part = blockIdx.x % parts, rest = blockIdx.x / parts, g = rest % G;
    const int chunk = rest / G % count, b = rest / G / count, t0 = chunk * CHUNK;
    const int h0 = g * M + M * part / parts, h1 = g * M + M * (part + 1) / parts;
    const int real = (int)k.z.T - t0;
    if ((int)threadIdx.x < CHUNK) segment[threadIdx.x] = k.d.segment[b * k.d.padded + t0
                                                                     + threadIdx.x];
    uint32_t q[N / 16][4];
    float score[CHUNK / 8][4] = {};
    /* the scores, with b and c where the tiles of heads will be */
    bf16 *bs = (bf16 *)memory, *cs = bs + CHUNK * N;
    const int64_t at = b * k.z.T + t0;
    fg_tile_load<N, CHUNK, 256>(bs, k.b + at * k.b_row + g * N, k.b_row, real);
    fg_tile_load<N, CHUNK, 256>(cs, k.c + at * k.c_row + g * N, k.c_row, real);
    fg_copy_commit();
    fg_copy_wait<0>();
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N / 16; n++) fg_a<N>(q[n], fg_shared(cs), 16 * warp, 16 * n);
#pragma unroll
    for (int j = 0; j < CHUNK / 16; j++) {
        if (j > warp) continue;
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            uint32_t v[4];
            fg_b_trans<N>(v, fg_shared(bs), 16 * n, 16 * j);
            fg_mma(score[2 * j], q[n], v[0], v[1]);
            fg_mma(score[2 * j + 1], q[n], v[2], v[3]);
        }
    }
    __syncthreads();
    load_head<N>(k, &tiles[0], b, chunk, h0);
    fg_copy_commit();
    for (int h = h0; h < h1; h++) {
        const int stage = (h - h0) % 2;
        if (h + 1 < h1) load_head<N>(k, &tiles[1 - stage], b, chunk, h + 1);
        fg_copy_commit();
        fg_copy_wait<1>();
        __syncthreads();
        run_head<N>(k, &tiles[stage], segment, b, chunk, h, q, score);
        __syncthreads();
    }
}

template <int N> static void run_chunks_launch(const chunks &k, cudaStream_t stream)
{
    const int tiles = 2 * (int)sizeof(tile<N>), scores = 2 * CHUNK * N * (int)sizeof(bf16);
    const int bytes = (tiles > scores ? tiles : scores) + CHUNK * (int)sizeof(int32_t);
    cudaFuncSetAttribute(run_chunks<N>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    const unsigned blocks = (unsigned)(k.z.B * k.d.chunks * k.z.G * k.parts);
    run_chunks<N><<<blocks, 256, bytes, stream>>>(k);
}

static bf16 *cut(const fg_ssd &z, bool kept, void *base, size_t *used, fg_decays *d)
{
    *d = fg_decays_cut(base, used, z, CHUNK, 1);
    if (kept) return nullptr;
    return (bf16 *)fg_ssd_cut(base, used, z.B * z.H * d->chunks * z.P * z.N, sizeof(bf16));
}

static fg_ssd task_of(const fg_exec *e)
{
    fg_ssd z = fg_ssd_of(&e->in_shape[X], &e->in_shape[B_IN]);
    z.first = (const int32_t *)e->in[FIRST];
    z.past = (const int32_t *)e->in[PAST];
    z.resets = z.first || z.past;
    return z;
}

void fg_ssd_forward(const fg_exec *e, const fg_ssd_steps &steps, bf16 *kept, cudaStream_t stream)
{
    const fg_ssd z = task_of(e);
    chunks k = {};
    size_t used = 0;
    bf16 *own = cut(z, kept, e->scratch, &used, &k.d), *states = kept ? kept : own;
    k.z = z;
    k.x = (const bf16 *)e->in[X], k.b = (const bf16 *)e->in[B_IN], k.c = (const bf16 *)e->in[C_IN];
    k.x_row = fg_pitch_of(&e->in_rows[X], z.H * z.P);
    k.b_row = fg_pitch_of(&e->in_rows[B_IN], z.G * z.N);
    k.c_row = fg_pitch_of(&e->in_rows[C_IN], z.G * z.N);
    k.skip = (const float *)e->in[D];
    k.states = states;
    k.y = (bf16 *)e->out[0];
    const bool sm90 = fg_ssd_scan_has_sm90();
    k.parts = fg_ssd_parts(z, k.d.chunks, sm90 ? BLOCKS_SM90 : BLOCKS);
    fg_decays_launch<CHUNK>(z, steps, k.d, stream);
    const fg_states s = { k.x, k.b, k.x_row, k.b_row, k.d.push, (const float *)e->in[STATE],
                          (float *)e->out[1], states, 1, false };
    fg_states_launch<CHUNK>(z, k.d, { { s, s } }, 1, stream);
    if (sm90) fg_ssd_scan_sm90(k, stream);
    else if (z.N == 128) run_chunks_launch<128>(k, stream);
    else run_chunks_launch<64>(k, stream);
}

size_t fg_ssd_forward_scratch(const fg_infer *c, bool kept)
{
    fg_decays d;
    size_t used = 0;
    cut(fg_ssd_of(&c->in[X], &c->in[B_IN]), kept, NULL, &used, &d);
    return used;
}

/* ---- which ---------------------------------------------------------------------------------- */

static bool in_chunks(const fg_infer *c)
{
    return fg_ssd_fits(c, X) && c->out_type[0] == FG_BF16 && c->in_type[DT] == FG_F32;
}

static fg_infer infer_of(const fg_exec *e)
{
    fg_infer c = {};
    for (int i = 0; i < e->n_in; i++) {
        c.given[i] = e->in[i] != NULL;
        c.in[i] = e->in_shape[i];
        c.in_type[i] = e->in_type[i];
    }
    c.out_type[0] = e->out_type[0];
    return c;
}

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const fg_infer c = infer_of(e);
    if (in_chunks(&c)) fg_ssd_forward(e, fg_steps_of(e, X, 0), nullptr, stream);
    else follow_launch(e, task_of(e), stream);
}

static size_t scratch(const fg_infer *c)
{
    return in_chunks(c) ? fg_ssd_forward_scratch(c, false) : 0;
}

static const char *unfit(const fg_infer *c)
{
    return c->in[B_IN].dim[3] > 256 ? "the state has more than 256 columns" : NULL;
}

FG_KERNEL(ssd_scan) = { .launch = launch, .unfit = unfit, .scratch = scratch,
                        .pitched_in = 1u << X | 1u << B_IN | 1u << C_IN };
