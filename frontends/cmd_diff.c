/* cmd_diff.c - stub. */
#include "cli_view.h"
int cmd_diff(const cli *c) { (void)c; return 0; }
