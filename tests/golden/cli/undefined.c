/* undefined.c - calls a function that nobody defines. */
#include <fox_graph.h>
fg_tensor no_such_layer(fg_tensor x);

fg_tensor fg_model(fg_tensor tokens)
{
    return no_such_layer(tokens);
}
