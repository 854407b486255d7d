/* syntax.c - does not compile. */
#include <fox_graph.h>

fg_tensor fg_model(fg_tensor tokens)
{
    return fg_sigmoyd(tokens) +;
}
