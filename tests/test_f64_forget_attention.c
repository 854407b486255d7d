/* test_f64_forget_attention.c - the tests of test_forget_attention.c in double, where an error that
 * rounding would hide in float cannot hide. */
#include "test_forget_attention.c"
