/* ssd_scan_grad.c - gradient of ssd_scan, chunk by chunk from the last to the first.
 *
 * With R the gradient of the state that leaves a piece of n tokens, S the state that enters it,
 * l_t = dt_t a, keep_i = e^(l_start + ... + l_i), left_j = e^(l_(j+1) + ... + l_end), L_ij as in
 * ssd_scan.c, e_ij = gy_i.x_j, q_ij = e_ij L_ij dt_j, z_ij = q_ij (c_i.b_j), w_j = left_j x_j^T R
 * b_j:
 *
 *     gx_j  = sum_(i>=j) (c_i.b_j) L_ij dt_j gy_i + dt_j left_j R b_j + d gy_j
 *     gc_i  = sum_heads sum_(j<=i) q_ij b_j + keep_i S^T gy_i
 *     gb_j  = sum_heads sum_(i>=j) q_ij c_i + dt_j left_j R^T x_j
 *     gl_t  = sum_(j<t<=i) z_ij + sum_(i>=t) keep_i gy_i^T S c_i + sum_(j<t) dt_j w_j
 *             + keep_end <R,S>
 *     gdt_t = sum_(i>=t) z_it / dt_t + w_t + a gl_t,   ga = sum dt_t gl_t,   gd = sum gy_t.x_t
 *     R of the piece before = keep_end R + sum_i keep_i gy_i c_i^T
 *
 * gl_t sums what crosses t, each term once: no sums are subtracted, so gates that forget quickly
 * keep an exact gradient.  S is computed again from the inputs, one state per chunk and head.
 * A task is some heads of a group; it adds their gb and gc in order, then the tasks are added.
 * Source: Dao and Gu 2024 (arXiv 2405.21060); the gate's sums as in the official kernels. */
#include <omp.h>
#include "ssd_tile.h"

enum { TASKS = 8 };                      /* of a group, at most */
enum { GY, GEND, X, DT, A, B_IN, C_IN, D, STATE, FIRST };

/* ---- memory --------------------------------------------------------------------------------- */

typedef struct {
    fg__ssd z;
    const fg_real *gy, *gend, *state;
    fg_real *gx, *gdt, *gstate;
    fg_real *scores;
    fg_real *gb, *gc;                    /* [tasks of a group][B,T,G,N] */
    double *ga, *gd;                     /* [B,H] */
    int64_t tasks;                       /* of a group */
} job;

/* A thread's own: the states that enter the chunks of a head, and tiles. */
typedef struct {
    fg_real *states, *turned, *x, *gy, *b, *c, *gx, *gb, *gc, *scaled;
    fg_real *w, *e;                      /* [j][i]: weights; gy_i.x_j, then q */
    fg_real *gy_turned;                  /* [p][i] */
    fg_real *s, *s_turned, *r, *r_turned, *update;     /* [n][p], [p][n] */
} buffers;

static void cut_shared(job *k, char *base, size_t *used)
{
    const fg__ssd *z = &k->z;
    const int64_t groups = z->B * z->T * z->G * z->N;
    k->tasks = fg__least(TASKS, z->H / z->G);
    k->scores = fg__cut(base, used, z->B * z->chunks * z->G * FG_CHUNK * FG_CHUNK_ROW,
                        sizeof(fg_real));
    k->gb = fg__cut(base, used, k->tasks * groups, sizeof(fg_real));
    k->gc = fg__cut(base, used, k->tasks * groups, sizeof(fg_real));
    k->ga = fg__cut(base, used, z->B * z->H, sizeof(double));
    k->gd = fg__cut(base, used, z->B * z->H, sizeof(double));
}

static buffers cut_own(const fg__ssd *z, char *base, size_t *used)
{
    const int64_t xs = FG_CHUNK * z->Pp, bs = FG_CHUNK * z->Np, tile = FG_CHUNK * FG_CHUNK_ROW;
    const int64_t state = z->N * z->Pp, turned = z->P * z->Np;
    buffers m;
    struct { fg_real **to; int64_t n; } all[] = {
        { &m.states, z->chunks * state }, { &m.turned, z->N * FG_CHUNK_ROW }, { &m.x, xs },
        { &m.gy, xs }, { &m.b, bs }, { &m.c, bs }, { &m.gx, xs }, { &m.gb, bs }, { &m.gc, bs },
        { &m.scaled, xs }, { &m.w, tile }, { &m.e, tile }, { &m.gy_turned, z->P * FG_CHUNK_ROW },
        { &m.s, state }, { &m.s_turned, turned }, { &m.r, state }, { &m.r_turned, turned },
        { &m.update, state },
    };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        *all[i].to = fg__cut(base, used, all[i].n, sizeof(fg_real));
    return m;
}

static size_t scratch(const fg_infer *c, int threads)
{
    job k = { .z = fg__ssd_of(&c->in[X], &c->in[B_IN]) };
    size_t shared = 0, own = 0;
    cut_shared(&k, NULL, &shared);
    cut_own(&k.z, NULL, &own);
    return shared + own * (size_t)threads;
}

/* ---- one piece of one head ------------------------------------------------------------------ */

typedef struct {
    int64_t b, h, g;
    fg__piece piece;
    fg__decay k;
    bool enters, leaves;                 /* S and R are not 0 */
    double gl[FG_CHUNK + 1], gdt[FG_CHUNK], ga, gd;
} work;

static fg_real dot(const fg_real *a, const fg_real *b, int64_t n)     /* n: whole vectors */
{
    fg_vec sum = { 0 };
    for (int64_t i = 0; i < n; i += FG_LANES) sum = fg_vfma(fg_vload(a + i), fg_vload(b + i), sum);
    return fg_vsum(sum);
}
static void scale_row(fg_real *x, fg_real s, int64_t n)
{
    for (int64_t i = 0; i < n; i += FG_LANES) fg_vstore(x + i, fg_vload(x + i) * fg_vset(s));
}
/* to = s x + t, t NULL: 0 */
static void put_row(fg_real *to, fg_real s, const fg_real *x, const fg_real *t, int64_t n)
{
    for (int64_t i = 0; i < n; i += FG_LANES)
        fg_vstore(to + i, fg_vfma(fg_vset(s), fg_vload(x + i), t ? fg_vload(t + i) : fg_vset(0)));
}

static void load_piece(const job *j, work *w, buffers *m)
{
    const fg__ssd *z = &j->z;
    const int64_t row0 = w->b * z->T + w->piece.t0;
    fg__decay_fill(z, w->b, w->h, &w->piece, &w->k);
    const int64_t n = w->k.n;
    fg__ssd_rows(z->x, z->H, w->h, z->P, z->Pp, row0, n, m->x);
    if (j->gy) fg__ssd_rows(j->gy, z->H, w->h, z->P, z->Pp, row0, n, m->gy);
    else memset(m->gy, 0, (size_t)(n * z->Pp) * sizeof *m->gy);
    fg__ssd_rows(z->b, z->G, w->g, z->N, z->Np, row0, n, m->b);
    fg__ssd_rows(z->c, z->G, w->g, z->N, z->Np, row0, n, m->c);
    fg__ssd_turn(m->gy, z->Pp, n, z->P, fg__round_up(n, FG_LANES), m->gy_turned, FG_CHUNK_ROW);
    for (int64_t t = 0; t <= FG_CHUNK; t++) w->gl[t] = 0;
}

/* e_ij = gy_i.x_j becomes q_ij, w_ij = (c_i.b_j) L_ij dt_j; gdt_j and gl_t get the pairs' part. */
static void pairs(const fg__ssd *z, const fg_real *scores, work *w, buffers *m)
{
    const int64_t n = w->k.n;
    fg_real decay[FG_CHUNK] = { 0 }, across[FG_CHUNK] = { 0 };
    const fg__product p = { .r1 = n, .n1 = fg__round_up(n, FG_LANES), .k1 = z->P,
        .part = FG_R_UP_TO_N, .a = m->x, .a_row = z->Pp, .a_col = 1, .b = m->gy_turned,
        .b_row = FG_CHUNK_ROW, .c = m->e, .c_row = FG_CHUNK_ROW };
    fg__multiply(&p);
    for (int64_t j = n - 1; j >= 0; j--) {
        const fg_vec dt = fg_vset(w->k.dt[j]), zero = fg_vset(0);
        const int64_t from = j / FG_LANES * FG_LANES, row = j * FG_CHUNK_ROW;
        fg_vec sum = { 0 };
        fg__decay_row(&w->k, j, decay);
        memset(m->w + row, 0, (size_t)from * sizeof *m->w);
        memset(m->e + row, 0, (size_t)from * sizeof *m->e);
        for (int64_t i = from; i < n; i += FG_LANES) {
            const fg_vec d = fg_vload(decay + i);
            const fg_vint none = (fg_vint)(d == zero);
            const fg_vec q = fg_vselect(none, zero, fg_vload(m->e + row + i) * d);
            const fg_vec s = fg_vselect(none, zero, fg_vload(scores + row + i));
            fg_vstore(m->w + row + i, s * d * dt);
            fg_vstore(m->e + row + i, q * dt);
            sum = sum + s * q;
        }
        w->gdt[j] = (double)fg_vsum(sum);
    }
    /* across_i = sum of z_ij over j < t: w e / (L dt), so (c.b) q */
    for (int64_t t = 1; t < n; t++) {
        const int64_t row = (t - 1) * FG_CHUNK_ROW;
        fg_vec sum = { 0 };
        for (int64_t i = t / FG_LANES * FG_LANES; i < n; i += FG_LANES) {
            const fg_vec q = fg_vload(m->e + row + i);
            const fg_vint none = (fg_vint)(q == fg_vset(0));
            const fg_vec s = fg_vselect(none, fg_vset(0), fg_vload(scores + row + i));
            const fg_vec at = fg_vload(across + i) + s * q;
            fg_vstore(across + i, at);
        }
        for (int64_t i = t / FG_LANES * FG_LANES; i < t; i++) across[i] = 0;
        for (int64_t i = t / FG_LANES * FG_LANES; i < n; i += FG_LANES)
            sum = sum + fg_vload(across + i);
        w->gl[t] = (double)fg_vsum(sum);
    }
}

/* gx, its part through the state that leaves, and what that says about dt and decays. */
static void grad_x(const fg__ssd *z, work *w, buffers *m)
{
    const int64_t n = w->k.n;
    double before = 0;
    if (w->leaves) {
        const fg__product p = { .r1 = n, .n1 = z->Pp, .k1 = z->N, .a = m->b, .a_row = z->Np,
            .a_col = 1, .b = m->r, .b_row = z->Pp, .c = m->gx, .c_row = z->Pp };
        fg__multiply(&p);
    } else memset(m->gx, 0, (size_t)(n * z->Pp) * sizeof *m->gx);
    for (int64_t j = 0; j < n; j++) {
        fg_real *gx = m->gx + j * z->Pp, *gy = m->gy + j * z->Pp, *x = m->x + j * z->Pp;
        const double wj = w->leaves ? (double)(w->k.left[j] * dot(x, gx, z->Pp)) : 0;
        scale_row(gx, w->k.dt[j] * w->k.left[j], z->Pp);
        w->gdt[j] += wj;
        w->gl[j] += before;
        before += (double)w->k.dt[j] * wj;
        if (z->d) put_row(gx, z->d[w->h], gy, gx, z->Pp);
        w->gd += (double)dot(gy, x, z->Pp);
    }
    const fg__product inside = { .r1 = n, .n1 = z->Pp, .k1 = n, .part = FG_K_FROM_R, .a = m->w,
        .a_row = FG_CHUNK_ROW, .a_col = 1, .b = m->gy, .b_row = z->Pp, .c = m->gx, .c_row = z->Pp,
        .add = true };
    fg__multiply(&inside);
}

/* gb and gc of this head alone. */
static void grad_bc(const fg__ssd *z, work *w, buffers *m)
{
    const int64_t n = w->k.n;
    double after = 0;
    fg__product p = { .r1 = n, .n1 = z->Np, .k1 = z->P, .a_row = z->Pp, .a_col = 1, .b_row = z->Np,
        .c_row = z->Np };
    if (w->enters) {
        p.a = m->gy, p.b = m->s_turned, p.c = m->gc;
        fg__multiply(&p);
        for (int64_t i = n - 1; i >= 0; i--) {
            scale_row(m->gc + i * z->Np, w->k.keep[i], z->Np);
            after += (double)dot(m->gc + i * z->Np, m->c + i * z->Np, z->Np);
            w->gl[i] += after;
        }
    }
    if (w->leaves) {
        p.a = m->x, p.b = m->r_turned, p.c = m->gb;
        fg__multiply(&p);
        for (int64_t j = 0; j < n; j++)
            scale_row(m->gb + j * z->Np, w->k.left[j] * w->k.dt[j], z->Np);
    }
    const fg__product c = { .r1 = n, .n1 = z->Np, .k1 = n, .part = FG_K_UP_TO_R, .a = m->e,
        .a_row = 1, .a_col = FG_CHUNK_ROW, .b = m->b, .b_row = z->Np, .c = m->gc, .c_row = z->Np,
        .add = w->enters };
    const fg__product b = { .r1 = n, .n1 = z->Np, .k1 = n, .part = FG_K_FROM_R, .a = m->e,
        .a_row = FG_CHUNK_ROW, .a_col = 1, .b = m->c, .b_row = z->Np, .c = m->gb, .c_row = z->Np,
        .add = w->leaves };
    fg__multiply(&c);
    fg__multiply(&b);
}

/* R of the piece before: whole R + sum_i keep_i gy_i c_i^T. */
static void pull_state(const fg__ssd *z, const work *w, buffers *m)
{
    for (int64_t i = 0; i < w->k.n; i++)
        put_row(m->scaled + i * z->Pp, w->k.keep[i], m->gy + i * z->Pp, NULL, z->Pp);
    const fg__product p = { .r1 = z->N, .n1 = z->Pp, .k1 = w->k.n, .a = m->c, .a_row = 1,
        .a_col = z->Np, .b = m->scaled, .b_row = z->Pp, .c = m->update, .c_row = z->Pp };
    fg__multiply(&p);
    put_row(m->r, w->k.whole, m->r, m->update, z->N * z->Pp);
}

static void store_piece(const job *j, work *w, const buffers *m, int64_t task)
{
    const fg__ssd *z = &j->z;
    const int64_t row0 = w->b * z->T + w->piece.t0, all = z->B * z->T * z->G * z->N;
    const double a = (double)z->a[w->h];
    for (int64_t t = 0; t < w->k.n; t++) {
        const int64_t row = row0 + t, at = task * all + (row * z->G + w->g) * z->N;
        memcpy(j->gx + (row * z->H + w->h) * z->P, m->gx + t * z->Pp,
               (size_t)z->P * sizeof *j->gx);
        j->gdt[row * z->H + w->h] = (fg_real)(w->gdt[t] + a * w->gl[t]);
        w->ga += (double)w->k.dt[t] * w->gl[t];
        for (int64_t i = 0; i < z->N; i++) {
            j->gb[at + i] += m->gb[t * z->Np + i];
            j->gc[at + i] += m->gc[t * z->Np + i];
        }
    }
}

static void run_piece(const job *j, work *w, buffers *m, int64_t task)
{
    const fg__ssd *z = &j->z;
    const int64_t at = w->piece.t0 % FG_CHUNK;
    const int64_t tile = (w->b * z->chunks + w->piece.t0 / FG_CHUNK) * z->G + w->g;
    load_piece(j, w, m);
    pairs(z, j->scores + (tile * FG_CHUNK + at) * FG_CHUNK_ROW + at, w, m);
    if (w->enters) fg__ssd_turn(m->s, z->Pp, z->N, z->P, z->Np, m->s_turned, z->Np);
    if (w->leaves) fg__ssd_turn(m->r, z->Pp, z->N, z->P, z->Np, m->r_turned, z->Np);
    grad_x(z, w, m);
    grad_bc(z, w, m);
    if (w->enters && w->leaves) {
        const double both = (double)w->k.whole * (double)dot(m->r, m->s, z->N * z->Pp);
        for (int64_t t = 0; t < w->k.n; t++) w->gl[t] += both;
    }
    store_piece(j, w, m, task);
    pull_state(z, w, m);
}

/* ---- one head ------------------------------------------------------------------------------- */

/* The states that enter every chunk; m->s holds the last. */
static void forward(const job *j, int64_t b, int64_t h, buffers *m)
{
    const fg__ssd *z = &j->z;
    const int64_t size = z->N * z->Pp, g = h / (z->H / z->G);
    fg__decay w;
    fg__ssd_enter(z, j->state ? j->state + (b * z->H + h) * z->P * z->N : NULL, m->s);
    for (int64_t t = 0; t < z->T; ) {
        const fg__piece k = fg__piece_at(z, b, t);
        const int64_t row = b * z->T + t;
        if (k.fresh) memset(m->s, 0, (size_t)size * sizeof *m->s);
        if (t % FG_CHUNK == 0)
            memcpy(m->states + t / FG_CHUNK * size, m->s, (size_t)size * sizeof *m->s);
        if (!k.pad) {
            fg__decay_fill(z, b, h, &k, &w);
            fg__ssd_rows(z->x, z->H, h, z->P, z->Pp, row, w.n, m->x);
            fg__ssd_advance(z, &w, z->b + (row * z->G + g) * z->N, m->x, m->scaled, m->update,
                            m->s);
        }
        t = k.t1;
    }
}

static void no_gradient(const job *j, const work *w)
{
    const fg__ssd *z = &j->z;
    for (int64_t t = w->piece.t0; t < w->piece.t1; t++) {
        const int64_t row = (w->b * z->T + t) * z->H + w->h;
        memset(j->gx + row * z->P, 0, (size_t)z->P * sizeof *j->gx);
        j->gdt[row] = 0;
    }
}

/* Pieces of a chunk are found from the front and run from the back. */
static void run_chunk(const job *j, work *w, int64_t chunk, buffers *m, int64_t task)
{
    const fg__ssd *z = &j->z;
    const int64_t size = z->N * z->Pp, end = fg__least((chunk + 1) * FG_CHUNK, z->T);
    fg__piece pieces[FG_CHUNK];
    int n = 0;
    for (int64_t t = chunk * FG_CHUNK; t < end; t = pieces[n++].t1)
        pieces[n] = fg__piece_at(z, w->b, t);
    while (n-- > 0) {
        w->piece = pieces[n];
        w->enters = n == 0 && !w->piece.fresh;
        if (w->enters) memcpy(m->s, m->states + chunk * size, (size_t)size * sizeof *m->s);
        if (w->piece.pad) no_gradient(j, w);
        else run_piece(j, w, m, task);
        w->leaves = !w->piece.fresh;
        if (w->piece.fresh) memset(m->r, 0, (size_t)size * sizeof *m->r);
    }
}

static void run_head(const job *j, int64_t b, int64_t h, int64_t task, buffers *m)
{
    const fg__ssd *z = &j->z;
    const int64_t at = (b * z->H + h) * z->P * z->N;
    work w = { .b = b, .h = h, .g = h / (z->H / z->G), .leaves = j->gend != NULL };
    forward(j, b, h, m);
    fg__ssd_enter(z, j->gend ? j->gend + at : NULL, m->r);
    for (int64_t chunk = z->chunks - 1; chunk >= 0; chunk--) run_chunk(j, &w, chunk, m, task);
    fg__ssd_leave(z, m->r, j->gstate + at);
    j->ga[b * z->H + h] = w.ga;
    j->gd[b * z->H + h] = w.gd;
}

/* A task's heads, in order; its part of gb and gc starts at 0. */
static void run_task(const job *j, int64_t i, buffers *m)
{
    const fg__ssd *z = &j->z;
    const int64_t task = i % j->tasks, g = i / j->tasks % z->G, b = i / j->tasks / z->G;
    const int64_t M = z->H / z->G, all = z->B * z->T * z->G * z->N;
    for (int64_t t = 0; t < z->T; t++) {
        const int64_t at = task * all + ((b * z->T + t) * z->G + g) * z->N;
        memset(j->gb + at, 0, (size_t)z->N * sizeof *j->gb);
        memset(j->gc + at, 0, (size_t)z->N * sizeof *j->gc);
    }
    for (int64_t h = M * task / j->tasks; h < M * (task + 1) / j->tasks; h++)
        run_head(j, b, g * M + h, task, m);
}

static void add_tasks(const job *j, int64_t start, int64_t end, fg_real *gb, fg_real *gc)
{
    const int64_t all = j->z.B * j->z.T * j->z.G * j->z.N;
    for (int64_t i = start; i < end; i++) {
        fg_real b = 0, c = 0;
        for (int64_t k = 0; k < j->tasks; k++) b += j->gb[k * all + i], c += j->gc[k * all + i];
        gb[i] = b;
        gc[i] = c;
    }
}

static void add_batch(const job *j, const double *from, fg_real *to)
{
    for (int64_t h = 0; h < j->z.H; h++) {
        double sum = 0;
        for (int64_t b = 0; b < j->z.B; b++) sum += from[b * j->z.H + h];
        to[h] = (fg_real)sum;
    }
}

static void cpu(const fg_exec *e)
{
    job j = { .z = fg__ssd_of(&e->in_shape[X], &e->in_shape[B_IN]), .gy = e->in[GY],
              .gend = e->in[GEND], .state = e->in[STATE], .gx = e->out[0], .gdt = e->out[1],
              .gstate = e->out[6] };
    fg__ssd *z = &j.z;
    size_t shared = 0, own = 0;
    z->x = e->in[X], z->dt = e->in[DT], z->a = e->in[A], z->b = e->in[B_IN], z->c = e->in[C_IN];
    z->d = e->in[D], z->first = e->in[FIRST], z->resets = e->in[FIRST] != NULL;
    cut_shared(&j, e->scratch, &shared);
    cut_own(z, NULL, &own);
    const int threads = fg__threads(e, z->B * z->T * z->H * z->P * (1 + z->N / 16));
    const int64_t all = z->B * z->T * z->G * z->N, part = 4096;
#pragma omp parallel num_threads(threads)
    {
        size_t used = shared + own * (size_t)omp_get_thread_num();
        buffers m = cut_own(z, e->scratch, &used);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < z->B * z->chunks * z->G; i++)
            fg__ssd_scores(z, i, j.scores, m.turned);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < z->B * z->G * j.tasks; i++) run_task(&j, i, &m);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < (all + part - 1) / part; i++)
            add_tasks(&j, i * part, fg__least(all, (i + 1) * part), e->out[3], e->out[4]);
    }
    add_batch(&j, j.ga, e->out[2]);
    add_batch(&j, j.gd, e->out[5]);
}

const fg_op_code fg_code_ssd_scan_grad = {
    .infer = fg__ssd_grad_infer, .cpu = cpu, .cost = fg__ssd_grad_cost, .scratch = scratch,
    .bf16 = { .narrow_in = 1u << GY | 1u << X | 1u << B_IN | 1u << C_IN,
              .wide_in = 1u << GEND | 1u << DT | 1u << A | 1u << D | 1u << STATE,
              .narrow_out = 1u << 0 | 1u << 3 | 1u << 4,
              .wide_out = 1u << 1 | 1u << 2 | 1u << 5 | 1u << 6 },
};
