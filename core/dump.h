/* dump.h - what the two forms of a dump share; core/ only. */
#ifndef FG_DUMP_H
#define FG_DUMP_H
#include "plan.h"

const char *fg__attr_text(const fg_attr_field *f, const void *at, char *buf, size_t size);
const char *fg__pass_name(fg_pass p);    /* "forward", "backward", "update" */
#endif
