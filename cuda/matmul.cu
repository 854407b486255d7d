/* matmul.cu - products of matrices, one for each index of the leading axes, through cuBLASLt.
 *
 *     y = op(a) op(b) over the last two axes, where op transposes if asked
 *
 * op(a): [...,M,K]   op(b): [...,K,N]   y: [...,M,N].  Rows of all three may be pitched: one
 * batched product, whose matrices lie as many rows apart as they have. */
#include "gemm.cuh"

static const char *unfit(const fg_infer *c)
{
    return fg_gemm_unfit(c->in_type[0], c->in_type[1], c->out_type[0]);
}

static size_t scratch(const fg_infer *) { return FG_GEMM_WORK; }

static void launch(const fg_exec *e, cudaStream_t stream)
{
    const struct fg_attr_matmul *t = (const struct fg_attr_matmul *)e->attr;
    const fg_shape *a = &e->in_shape[0], *b = &e->in_shape[1];
    const int row = a->rank - 2, column = a->rank - 1;
    const int64_t K = a->dim[t->ta ? row : column];
    fg_gemm_call g = fg_gemm_of(a->dim[t->ta ? column : row], b->dim[t->tb ? row : column], K,
                                t->ta, t->tb);
    for (int i = 0; i < row; i++) g.batch *= a->dim[i];
    g.a = e->in[0], g.b = e->in[1], g.y = e->out[0], g.work = e->scratch;
    g.type = e->in_type[0], g.y_type = e->out_type[0];
    g.pitch_a = fg_pitch_of(&e->in_rows[0], a->dim[column]);
    g.pitch_b = fg_pitch_of(&e->in_rows[1], b->dim[column]);
    g.pitch_y = fg_pitch_of(&e->out_rows[0], g.N);
    g.step_a = a->dim[row] * g.pitch_a;
    g.step_b = b->dim[row] * g.pitch_b;
    g.step_y = g.M * g.pitch_y;
    fg_gemm(&g, stream);
}

FG_KERNEL(matmul) = {
    .launch = launch, .unfit = unfit, .scratch = scratch, .pitched_in = 1u << 0 | 1u << 1,
    .pitched_out = 1u << 0,
};
