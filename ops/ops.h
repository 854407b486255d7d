/* ops.h - ops.def turned into ids and attribute structs; what an op page and a kernel include. */
#ifndef FG_OPS_H
#define FG_OPS_H
#include "op.h"
#include "fox_ops.h"
#ifdef __cplusplus
extern "C" {
#endif

#define FG_ATTR(type, field) type field;
#define FG_NONE              char none_;
#define FG_OP(name, ins, outs, attrs, formula) struct fg_attr_##name { attrs };
#include "ops.def"
#undef FG_OP
#undef FG_NONE
#undef FG_ATTR

enum {
#define FG_OP(name, ins, outs, attrs, formula) FG_OP_##name,
#include "ops.def"
#undef FG_OP
    FG_OP_COUNT
};
extern const fg_op fg_op_table[FG_OP_COUNT];

/* Makes a node: FG_APPLY(rms_norm, at, ((const fg_tensor[]){ x, w }), eps, groups) ties the op to
 * its own attribute struct, so a wrong attribute does not compile.  Without attributes: 0. */
#define FG_APPLY(op, at, in, ...) \
    fg__apply(&fg_op_table[FG_OP_##op], at, NULL, (int)(sizeof(in) / sizeof((in)[0])), in, \
              &(struct fg_attr_##op){ __VA_ARGS__ })

#ifdef __cplusplus
}
#endif
#endif
