/* table.c - ops.def turned into the table that the rest of the library indexes. */
#include "ops.h"

#define FG_OP(name, ins, outs, attrs, formula) extern const fg_op_code fg_code_##name;
#include "ops.def"
#undef FG_OP

#define FG_ATTR(type, field) { #field, #type, sizeof(type), _Alignof(type) },
#define FG_NONE
#define FG_OP(name, ins, outs, attrs, formula) \
    static const fg_attr_field fields_##name[] = { attrs { NULL, NULL, 0, 0 } };
#include "ops.def"
#undef FG_OP
#undef FG_NONE
#undef FG_ATTR

const fg_op fg_op_table[FG_OP_COUNT] = {
#define FG_OP(name, ins, outs, attrs, formula) \
    { #name, ins, outs, formula, sizeof(struct fg_attr_##name), fields_##name, &fg_code_##name },
#include "ops.def"
#undef FG_OP
};

/* Attributes as text, each led by ", ". */
#define FG_ATTR(type, field) ", " #type " " #field
#define FG_NONE
#define FG_OP(name, ins, outs, attrs, formula) "" attrs,
static const char *const attributes[FG_OP_COUNT] = {
#include "ops.def"
};
#undef FG_OP
#undef FG_NONE
#undef FG_ATTR

int fg_op_count(void)
{
    return FG_OP_COUNT;
}

bool fg_op_at(int i, fg_op_info *out)
{
    if (i < 0 || i >= FG_OP_COUNT) return false;
    const fg_op *op = &fg_op_table[i];
    *out = (fg_op_info){ .name = op->name, .inputs = op->ins, .outputs = op->outs,
                         .attributes = attributes[i] + (attributes[i][0] ? 2 : 0),
                         .formula = op->formula };
    if (op->code) {
        out->kernel = op->code->cpu != NULL || op->code->memory == FG_VIEW;
        out->definition = op->code->decompose != NULL;
        out->differentiable = !op->code->no_grad && (op->code->vjp || op->code->decompose);
    }
    return true;
}

fg_tensor fg_op_example(fg_graph *g, int i, int k)
{
    const fg_tensor none = { 0 };
    if (!g || i < 0 || i >= FG_OP_COUNT || k < 0) return none;
    const fg_op_code *code = fg_op_table[i].code;
    return code && code->example ? code->example(g, k) : none;
}
