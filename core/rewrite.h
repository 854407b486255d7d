/* rewrite.h - replacing nodes of a lowered graph by others: for core/lower.c and ops/fuse.c.
 *
 * A rule looks at a node, builds what shall stand in its place with ordinary builders, and says
 * so.  The graph is in running order; what is put in a node's slot runs when that node would have,
 * other new nodes run just before the first that reads them.  Nodes that nothing reads any more
 * are dropped by the next pass of the lowering. */
#ifndef FG_REWRITE_H
#define FG_REWRITE_H
#include "graph.h"

typedef struct fg_rewrite {
    fg_graph *g;
    uint32_t  n_nodes;                   /* nodes that were there before the first rule */
    uint32_t *now, *uses, cap; /* per value: what stands in its place, or itself; readers */
} fg_rewrite;

bool     fg__rewrite_open(fg_rewrite *r, fg_graph *g);     /* false: out of memory */
/* Puts the replacements into all nodes and outputs. */
void     fg__rewrite_close(fg_rewrite *r);
uint32_t fg__now(const fg_rewrite *r, uint32_t v);         /* what stands in v's place */
uint32_t fg__uses(const fg_rewrite *r, uint32_t v);        /* reading inputs and outputs of v */
/* Does v depend on what node k makes?  True, too, if out of memory. */
bool     fg__depends(const fg_rewrite *r, uint32_t v, uint32_t k);
static inline fg_tensor fg__now_tensor(const fg_rewrite *r, uint32_t v)
{
    return v ? (fg_tensor){ r->g, fg__now(r, v) } : (fg_tensor){ 0 };
}
/* What is built between the two belongs to node k: scope, pass, pair and place in the source. */
uint32_t fg__build_as(fg_rewrite *r, uint32_t k);          /* returns what fg__built wants */
void     fg__built(fg_rewrite *r, uint32_t k, uint32_t first);
/* The node that made t takes the slot of node k. */
void     fg__take_slot(fg_rewrite *r, uint32_t k, fg_tensor t);
void     fg__instead(fg_rewrite *r, uint32_t old, fg_tensor t);   /* readers of old read t */
/* Node k, whose results nothing needs any more, reads nothing any more. */
void     fg__unread(fg_rewrite *r, uint32_t k);
/* Node k overwrites something that another node overwrites from now on: it is not to run. */
void     fg__drop(fg_rewrite *r, uint32_t k);
#endif
