/* ssd_scan.c - the state space scan of Mamba-2: a linear recurrence with a scalar decay per head.
 *
 *     S_t = e^(dt_t a) S_(t-1) + dt_t x_t b_t^T        [P,N], for each head
 *     y_t = S_t c_t + d x_t,   end = S_(T-1)
 *
 * x, y: [B,T,H,P]   dt: [B,T,H], > 0   a: [H], < 0   b, c: [B,T,G,N], head h reads group h / (H/G)
 * d: [H] or absent   state, end: f32[B,H,P,N], state is S_(-1), 0 if absent
 * first: i32[B,T]   past: i32[1].  Row t stands at position p = past + t.  Where first_t (0 if
 * absent, but past is given) reaches p, a document begins: S_(t-1) counts as 0.  first_t > p marks
 * padding: the row gives 0 and leaves a state of 0.  Other rows continue the row before, and so do
 * all where first and past are absent.
 * The kernel works in chunks (ssd_tile.h): with a_t = e^(dt_t a), L_ij = a_(j+1) ... a_i and j in
 * i's own chunk, which S enters,
 *     y_i = sum_(j<=i) (c_i.b_j) L_ij dt_j x_j + (a_start ... a_i) S c_i + d x_i
 * and goes token by token where there are few.  Reads x, dt, b, c and writes y once.
 * Source: Dao and Gu 2024, "Transformers are SSMs" (arXiv 2405.21060), sections 6 and 7. */
#include <omp.h>
#include "ssd_tile.h"

enum { FEW = 16 };                       /* tokens up to which the recurrence is followed */
enum { X, DT, A, B_IN, C_IN, D, STATE, FIRST, PAST };

fg_tensor (fg_ssd_scan)(fg_loc at, fg_tensor x, fg_tensor dt, fg_tensor a, fg_tensor b, fg_tensor c,
                        fg_tensor d, fg_tensor state)
{
    fg_tensor in[] = { x, dt, a, b, c, d, state, { 0 }, { 0 } };
    return fg__ssd_build(at, &fg_op_table[FG_OP_ssd_scan], 9, in);
}

/* ---- token by token ------------------------------------------------------------------------- */

static inline fg_vec load(const fg_real *p, int64_t n)
{
    return n < FG_LANES ? fg_vload_n(p, n) : fg_vload(p);
}

/* s = decay s + in b, returns s . c */
static inline fg_real step_row(fg_real *s, fg_real decay, fg_real in, const fg_real *b,
                               const fg_real *c, int64_t N)
{
    const fg_vec a = fg_vset(decay), u = fg_vset(in);
    fg_vec sum = { 0 };
    for (int64_t i = 0; i < N; i += FG_LANES) {
        const int64_t n = fg__least(FG_LANES, N - i);
        const fg_vec v = fg_vfma(u, load(b + i, n), a * load(s + i, n));
        if (n < FG_LANES) fg_vstore_n(s + i, v, n);
        else fg_vstore(s + i, v);
        sum = fg_vfma(v, load(c + i, n), sum);
    }
    return fg_vsum(sum);
}

static void step_head(const fg__ssd *z, int64_t b, int64_t h, const fg_real *state, fg_real *y,
                      fg_real *end)
{
    const int64_t P = z->P, N = z->N, g = h / (z->H / z->G);
    fg_real *s = end + (b * z->H + h) * P * N;
    if (state) memcpy(s, state + (b * z->H + h) * P * N, (size_t)(P * N) * sizeof *s);
    else memset(s, 0, (size_t)(P * N) * sizeof *s);
    for (int64_t t = 0; t < z->T; t++) {
        const int64_t row = b * z->T + t, at = (row * z->H + h) * P, group = (row * z->G + g) * N;
        const int64_t low = fg__ssd_low(z, b, t), p = z->past + t;
        const fg_real dt = z->dt[row * z->H + h], decay = fg_exp1(dt * z->a[h]);
        if (low >= p) memset(s, 0, (size_t)(P * N) * sizeof *s);
        for (int64_t i = 0; i < P; i++) {
            const fg_real x = z->x[at + i];
            if (low > p) y[at + i] = 0;
            else y[at + i] = step_row(s + i * N, decay, dt * x, z->b + group, z->c + group, N)
                + (z->d ? z->d[h] * x : 0);
        }
    }
}

/* ---- in chunks ------------------------------------------------------------------------------ */

typedef struct { fg_real *scores, *turned, *x, *y, *scaled, *w, *update, *s; } buffers;

/* scores are shared, the others are a thread's own */
static buffers cut_own(const fg__ssd *z, fg_real *scores, char *base, size_t *used)
{
    buffers m = { .scores = scores };
    m.turned = fg__cut(base, used, z->N * FG_CHUNK_ROW, sizeof(fg_real));
    m.x = fg__cut(base, used, FG_CHUNK * z->Pp, sizeof(fg_real));
    m.y = fg__cut(base, used, FG_CHUNK * z->Pp, sizeof(fg_real));
    m.scaled = fg__cut(base, used, FG_CHUNK * z->Pp, sizeof(fg_real));
    m.w = fg__cut(base, used, FG_CHUNK * FG_CHUNK_ROW, sizeof(fg_real));
    m.update = fg__cut(base, used, z->N * z->Pp, sizeof(fg_real));
    m.s = fg__cut(base, used, z->N * z->Pp, sizeof(fg_real));
    return m;
}

static size_t shared_bytes(const fg__ssd *z)
{
    size_t used = 0;
    fg__cut(NULL, &used, z->B * z->chunks * z->G * FG_CHUNK * FG_CHUNK_ROW, sizeof(fg_real));
    return used;
}

static size_t scratch(const fg_infer *c, int threads)
{
    const fg__ssd z = fg__ssd_of(&c->in[X], &c->in[B_IN]);
    size_t own = 0;
    if (z.T <= FEW) return 0;
    cut_own(&z, NULL, NULL, &own);
    return shared_bytes(&z) + own * (size_t)threads;
}

/* w[j][i] = (b_j.c_i) L_ij dt_j */
static void weigh(const fg__decay *k, const fg_real *scores, fg_real *w)
{
    fg_real decay[FG_CHUNK] = { 0 };
    for (int64_t j = k->n - 1; j >= 0; j--) {
        const fg_vec dt = fg_vset(k->dt[j]);
        const int64_t from = j / FG_LANES * FG_LANES;
        fg_real *to = w + j * FG_CHUNK_ROW;
        fg__decay_row(k, j, decay);
        memset(to, 0, (size_t)from * sizeof *to);
        for (int64_t i = from; i < k->n; i += FG_LANES) {
            const fg_vec d = fg_vload(decay + i);
            const fg_vec v = fg_vload(scores + j * FG_CHUNK_ROW + i) * d * dt;
            fg_vstore(to + i, fg_vselect((fg_vint)(d == fg_vset(0)), fg_vset(0), v));
        }
    }
}

/* y of one piece; m->s goes from the state that enters it to the one that leaves it. */
static void run_piece(const fg__ssd *z, int64_t b, int64_t h, const fg__piece *k, buffers *m,
                      fg_real *y)
{
    const int64_t g = h / (z->H / z->G), row0 = b * z->T + k->t0, at = k->t0 % FG_CHUNK;
    const int64_t groups = z->G * z->N, start = row0 * groups + g * z->N;
    const int64_t tile = (b * z->chunks + k->t0 / FG_CHUNK) * z->G + g;
    fg__decay w;
    fg__decay_fill(z, b, h, k, &w);
    fg__ssd_rows(z->x, z->H, h, z->P, z->Pp, row0, w.n, m->x);
    weigh(&w, m->scores + (tile * FG_CHUNK + at) * FG_CHUNK_ROW + at, m->w);
    const fg__product from_state = { .r1 = w.n, .n1 = z->Pp, .k1 = z->N, .a = z->c + start,
        .a_row = groups, .a_col = 1, .b = m->s, .b_row = z->Pp, .c = m->y, .c_row = z->Pp };
    fg__multiply(&from_state);
    for (int64_t i = 0; i < w.n; i++)
        for (int64_t p = 0; p < z->Pp; p += FG_LANES) {
            fg_real *to = m->y + i * z->Pp + p;
            const fg_vec skip = fg_vset(z->d ? z->d[h] : 0) * fg_vload(m->x + i * z->Pp + p);
            fg_vstore(to, fg_vfma(fg_vload(to), fg_vset(w.keep[i]), skip));
        }
    const fg__product inside = { .r1 = w.n, .n1 = z->Pp, .k1 = w.n, .part = FG_K_UP_TO_R,
        .a = m->w, .a_row = 1, .a_col = FG_CHUNK_ROW, .b = m->x, .b_row = z->Pp, .c = m->y,
        .c_row = z->Pp, .add = true };
    fg__multiply(&inside);
    for (int64_t i = 0; i < w.n; i++)
        memcpy(y + ((row0 + i) * z->H + h) * z->P, m->y + i * z->Pp, (size_t)z->P * sizeof *y);
    fg__ssd_advance(z, &w, z->b + start, m->x, m->scaled, m->update, m->s);
}

static void run_head(const fg__ssd *z, int64_t b, int64_t h, const fg_real *state, buffers *m,
                     fg_real *y, fg_real *end)
{
    const int64_t at = (b * z->H + h) * z->P * z->N;
    fg__ssd_enter(z, state ? state + at : NULL, m->s);
    for (int64_t t = 0; t < z->T; ) {
        const fg__piece k = fg__piece_at(z, b, t);
        if (k.fresh) memset(m->s, 0, (size_t)(z->N * z->Pp) * sizeof *m->s);
        if (!k.pad) run_piece(z, b, h, &k, m, y);
        for (; k.pad && t < k.t1; t++)
            memset(y + ((b * z->T + t) * z->H + h) * z->P, 0, (size_t)z->P * sizeof *y);
        t = k.t1;
    }
    fg__ssd_leave(z, m->s, end + at);
}

static void run_chunks(const fg__ssd *z, char *base, const fg_real *state, fg_real *y, fg_real *end,
                       int threads)
{
    const size_t shared = shared_bytes(z);
    size_t own = 0;
    cut_own(z, NULL, NULL, &own);
#pragma omp parallel num_threads(threads)
    {
        size_t used = shared + own * (size_t)omp_get_thread_num();
        buffers m = cut_own(z, (fg_real *)base, base, &used);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < z->B * z->chunks * z->G; i++)
            fg__ssd_scores(z, i, m.scores, m.turned);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < z->B * z->H; i++)
            run_head(z, i / z->H, i % z->H, state, &m, y, end);
    }
}

static void cpu(const fg_exec *e)
{
    fg__ssd z = fg__ssd_of(&e->in_shape[X], &e->in_shape[B_IN]);
    const int threads = fg__threads(e, z.B * z.T * z.H * z.P * (1 + z.N / 16));
    z.x = e->in[X], z.dt = e->in[DT], z.a = e->in[A], z.d = e->in[D];
    z.b = e->in[B_IN], z.c = e->in[C_IN], z.first = e->in[FIRST];
    z.resets = e->in[FIRST] || e->in[PAST];
    z.past = e->in[PAST] ? *(const int32_t *)e->in[PAST] : 0;
    if (z.T > FEW) {
        run_chunks(&z, e->scratch, e->in[STATE], e->out[0], e->out[1], threads);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < z.B * z.H; i++)
        step_head(&z, i / z.H, i % z.H, e->in[STATE], e->out[0], e->out[1]);
}

/* ---- gradient and definition ---------------------------------------------------------------- */

/* ssd_scan_grad.c has the formulas. */
static void vjp(fg_vjp *v)
{
    const fg_tensor none = { 0 };
    fg__ssd_vjp(v, &fg_op_table[FG_OP_ssd_scan_grad], 10, none, none);
}

/* What the recurrence reads, [B,T,...] cut in heads of groups: M = H / G heads in a group. */
typedef struct {
    int64_t B, T, G, M, P, N;
    fg_tensor x, u, decay, b, c, d;      /* u = dt x */
    fg_tensor low, p;                    /* positions + 1; absent if nothing ever begins anew */
} steps;

static fg_tensor at_step(const steps *k, fg_tensor x, int64_t t, int64_t M, int64_t P, int64_t N)
{
    const fg_tensor row = fg_slice(x, 1, t, t + 1);
    return fg_reshape(row, FG_DIMS(fg_dim(x, 0), M ? k->G : 1, M ? M : 1, P, N));
}

static steps open_steps(const fg_tensor *in)
{
    fg_graph *g = in[0].graph;
    const fg_tensor x = fg_cast(in[0], FG_F32), dt = fg_cast(in[1], FG_F32);
    steps k = { .B = fg_dim(x, 0), .T = fg_dim(x, 1), .G = fg_dim(in[3], 2), .P = fg_dim(x, 3),
                .N = fg_dim(in[3], 3), .x = x };
    k.M = fg_dim(x, 2) / k.G;
    const fg_tensor rate = fg_mul(dt, in[2]);
    const fg_tensor wide = fg_reshape(dt, FG_DIMS(k.B, k.T, k.G * k.M, 1));
    k.decay = fg_exp(rate);
    k.u = fg_mul(x, wide);
    k.b = fg_cast(in[3], FG_F32);
    k.c = fg_cast(in[4], FG_F32);
    if (!fg_absent(in[5])) k.d = fg_reshape(in[5], FG_DIMS(1, k.G, k.M, 1, 1));
    if (fg_absent(in[7]) && fg_absent(in[8])) return k;
    k.p = fg_fill(g, FG_DIMS(1, k.T), 1);
    k.p = fg_cumsum(k.p, 1, false);
    if (!fg_absent(in[8])) {
        fg_tensor past = fg_cast(in[8], FG_F32);
        past = fg_reshape(past, FG_DIMS(1, 1));
        k.p = fg_add(k.p, past);
    }
    k.low = fg_absent(in[7]) ? fg_fill(g, FG_DIMS(1, k.T), 0) : fg_cast(in[7], FG_F32);
    return k;
}

/* The recurrence, a token at a time. */
static void decompose(const fg_tensor *in, const void *attr, fg_tensor *out)
{
    const steps k = open_steps(in);
    fg_tensor s = fg_fill(in[0].graph, FG_DIMS(k.B, k.G, k.M, k.P, k.N), 0), all = { 0 };
    (void)attr;
    if (!fg_absent(in[6])) s = fg_reshape(in[6], FG_DIMS(k.B, k.G, k.M, k.P, k.N));
    for (int64_t t = 0; t < k.T; t++) {
        const fg_tensor u = at_step(&k, k.u, t, k.M, k.P, 1), b = at_step(&k, k.b, t, 1, 1, k.N);
        const fg_tensor c = at_step(&k, k.c, t, 1, 1, k.N), a = at_step(&k, k.decay, t, k.M, 1, 1);
        const fg_tensor low = fg_absent(k.p) ? k.p : at_step(&k, k.low, t, 0, 1, 1);
        const fg_tensor p = fg_absent(k.p) ? k.p : at_step(&k, k.p, t, 0, 1, 1);
        if (!fg_absent(p)) {
            const fg_tensor inside = fg_scale(low, 1, 2);
            s = fg__where_ge(FG_HERE, p, inside, s);
        }
        const fg_tensor old = fg_mul(s, a), fresh = fg_mul(u, b);
        s = fg_add(old, fresh);
        const fg_tensor seen = fg_mul(s, c);
        fg_tensor y = fg_row_sum(seen);
        if (!fg_absent(k.d)) {
            const fg_tensor x = at_step(&k, k.x, t, k.M, k.P, 1), skip = fg_mul(x, k.d);
            y = fg_add(y, skip);
        }
        if (!fg_absent(p)) {
            const fg_tensor own = fg_scale(low, 1, 1);
            y = fg__where_ge(FG_HERE, p, own, y);
            s = fg__where_ge(FG_HERE, p, own, s);
        }
        y = fg_reshape(y, FG_DIMS(k.B, 1, k.G * k.M, k.P));
        all = t ? fg_concat(all, y, 1) : y;
    }
    out[0] = fg_cast(all, fg_dtype_of(in[0]));
    out[1] = fg_reshape(s, FG_DIMS(k.B, k.G * k.M, k.P, k.N));
}

static fg_tensor example(fg_graph *g, int i)
{
    static const struct { int64_t B, T, H, P, G, N; bool d, state, documents; } cases[] = {
        { 1, 5, 2, 3, 1, 2, true, false, false },
        { 2, 3, 4, 5, 2, 7, false, true, false },
        { 2, 20, 2, 3, 1, 5, true, false, true },        /* documents, padding, in chunks */
        { 1, 67, 3, 2, 1, 3, true, true, false },        /* more than a chunk */
        { 2, 20, 2, 17, 2, 9, false, true, true },
        { 1, 1, 1, 1, 1, 1, true, true, false },
    };
    if (i >= (int)(sizeof cases / sizeof cases[0])) return (fg_tensor){ 0 };
    const int64_t B = cases[i].B, T = cases[i].T, H = cases[i].H, P = cases[i].P, N = cases[i].N;
    const fg_tensor x = fg_random(g, B, T, H, P);
    const fg_tensor raw = fg_random(g, B, T, H);
    const fg_tensor rate = fg_random(g, H);
    const fg_tensor b = fg_random(g, B, T, cases[i].G, N);
    const fg_tensor c = fg_random(g, B, T, cases[i].G, N);
    const fg_tensor d = cases[i].d ? fg_random(g, H) : (fg_tensor){ 0 };
    const fg_tensor state = cases[i].state ? fg_random(g, B, H, P, N) : (fg_tensor){ 0 };
    if (cases[i].documents) fg__ssd_documents(g);
    const fg_tensor dt = fg_softplus(raw), e = fg_exp(rate), a = fg_neg(e);
    return fg_ssd_scan(x, dt, a, b, c, d, state);
}

const fg_op_code fg_code_ssd_scan = {
    .infer = fg__ssd_infer, .cpu = cpu, .vjp = vjp, .decompose = decompose, .cost = fg__ssd_cost,
    .example = example, .scratch = scratch,
    .bf16 = { .narrow_in = 1u << X | 1u << B_IN | 1u << C_IN, .narrow_out = 1, .wide_out = 2,
              .wide_in = 1u << DT | 1u << A | 1u << D | 1u << STATE },
};
