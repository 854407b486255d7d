/* view_html.c - stub. */
#include "view.h"
fg_status fg_view_html(const fg_view *v, const fg_view_options *o, fg_put put, void *to){ return fg_view_svg(v,o,put,to);}
