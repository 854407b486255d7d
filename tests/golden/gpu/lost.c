/* lost.c - a model whose device fails while it trains: a second after the graph is built, a thread
 * launches a kernel that traps, in the context that the training uses. */
#include <dlfcn.h>
#include <fox_graph.h>
#include <pthread.h>
#include <time.h>

static const char program[] = ".version 7.0\n.target sm_80\n.address_size 64\n"
                              ".visible .entry end_of_it() { trap; }\n";

static void *spoil(void *unused)
{
    void *cuda = dlopen("libcuda.so.1", RTLD_NOW), *context, *module, *function;
    int (*retain)(void **, int), (*use)(void *), (*load)(void **, const void *),
        (*find)(void **, void *, const char *),
        (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                  void *, void **, void **);
    *(void **)&retain = dlsym(cuda, "cuDevicePrimaryCtxRetain");
    *(void **)&use = dlsym(cuda, "cuCtxSetCurrent");
    *(void **)&load = dlsym(cuda, "cuModuleLoadData");
    *(void **)&find = dlsym(cuda, "cuModuleGetFunction");
    *(void **)&launch = dlsym(cuda, "cuLaunchKernel");
    nanosleep(&(struct timespec){ 3, 0 }, NULL);
    if (!retain(&context, 0) && !use(context) && !load(&module, program) &&
        !find(&function, module, "end_of_it"))
        launch(function, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL);
    return unused;
}

fg_tensor fg_model(fg_tensor x)
{
    static pthread_t thread;
    const int64_t width = fg_setting_int(x.graph, "width", 64);
    const int64_t layers = fg_setting_int(x.graph, "layers", 2);
    const fox_config c = fox_pro_config(256, width, layers, fg_setting_int(x.graph, "heads", 2));
    if (!thread) pthread_create(&thread, NULL, spoil, NULL);
    return fox_lm(x, &c);
}
