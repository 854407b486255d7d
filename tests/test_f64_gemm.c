/* test_f64_gemm.c - the tests of matrix products on the double build, which has loops alone. */
#include "test_gemm.c"
