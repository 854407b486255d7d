/* width.h - a header beside the model file, found from there. */
#define WIDTH 8
