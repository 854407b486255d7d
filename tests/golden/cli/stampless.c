/* stampless.c - does not include fox_graph.h. */
int fg_model(void);
int fg_model(void)
{
    return 1;
}
