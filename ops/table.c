/* table.c - ops.def turned into the table that the rest of the library indexes. */
#include "ops.h"

#define FG_OP(name, ins, outs, attrs, formula) extern const fg_op_code fg_code_##name __attribute__((weak));
#include "ops.def"
#undef FG_OP

#define FG_ATTR(type, field) { #field, #type, sizeof(type), _Alignof(type) },
#define FG_NONE
#define FG_OP(name, ins, outs, attrs, formula) \
    static const fg_attr_field fields_##name[] = { attrs { NULL, NULL, 0, 0 } };
#include "ops.def"
#undef FG_OP

const fg_op fg_op_table[FG_OP_COUNT] = {
#define FG_OP(name, ins, outs, attrs, formula) \
    { #name, ins, outs, formula, sizeof(struct fg_attr_##name), fields_##name, &fg_code_##name },
#include "ops.def"
#undef FG_OP
};
