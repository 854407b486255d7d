/* empty.c - has the stamp, but no model. */
#include <fox_graph.h>
