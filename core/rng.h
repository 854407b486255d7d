/* rng.h - random numbers from counters: number i of a key is a function of both alone, so any part
 * of a parameter can be made in any order on any number of threads.
 * Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3",
 * Philox4x32-10. */
#ifndef FG_RNG_H
#define FG_RNG_H
#include <stdint.h>

uint64_t fg__hash(const char *text);                             /* FNV-1a, 64 bits, finalised */
uint64_t fg__random_key(uint64_t seed, const char *name);
void     fg__random_bits(uint64_t key, uint64_t index, uint32_t out[4]);
double   fg__random_uniform(uint64_t key, uint64_t index);       /* [0, 1) */
/* Numbers 4 block .. 4 block + 3, of mean 0 and deviation 1. */
void     fg__random_normals(uint64_t key, uint64_t block, float out[4]);
#endif
