/* view_check.c - do options fit a view?  And times of a run for a view that has none. */
#include <inttypes.h>
#include "view.h"

fg_status fg_view_check(const fg_view *v, const fg_view_options *o, char message[400])
{
    message[0] = 0;
    if (o->focus && fg__view_find_box(v, o->focus) < 0)
        snprintf(message, 400, "no scope '%.200s' in this graph", o->focus);
    else if (o->memory && !v->planned)
        snprintf(message, 400, "this graph has no memory plan");
    else if (o->heat == FG_HEAT_TIME && !v->timed)
        snprintf(message, 400, "this graph has no times: they come from a run or --profile");
    else if ((o->heat == FG_HEAT_ABSMAX || o->heat == FG_HEAT_GRADNORM) && !v->seen)
        snprintf(message, 400, "this graph has no statistics of values");
    return message[0] ? FG_ERR_USAGE : FG_OK;
}

fg_status fg_view_take_times(fg_view *v, const fg_view *run, char message[400])
{
    message[0] = 0;
    if (!run->timed) snprintf(message, 400, "no node has a time");
    else if (run->n_nodes != v->n_nodes)
        snprintf(message, 400, "it has %d nodes, this graph %d", (int)run->n_nodes,
                 (int)v->n_nodes);
    for (int32_t k = 0; k < v->n_nodes && !message[0]; k++)
        if (strcmp(v->node[k].op, run->node[k].op) || v->node[k].pass != run->node[k].pass)
            snprintf(message, 400, "node %" PRId64 " is %.80s there and %.80s here",
                     run->node[k].id, run->node[k].op, v->node[k].op);
    if (message[0]) return FG_ERR_USAGE;
    for (int32_t k = 0; k < v->n_nodes; k++) v->node[k].time = run->node[k].time;
    v->timed = true;
    return FG_OK;
}
