/* rng.c - Philox4x32-10 and what is made of it.  Source: see rng.h. */
#include <math.h>
#include "rng.h"

uint64_t fg__hash(const char *text)
{
    uint64_t h = 1469598103934665603ULL;
    for (; *text; text++) h = (h ^ (unsigned char)*text) * 1099511628211ULL;
    h = (h ^ (h >> 33)) * 0xff51afd7ed558ccdULL;
    h = (h ^ (h >> 33)) * 0xc4ceb9fe1a85ec53ULL;
    return h ^ (h >> 33);
}

uint64_t fg__random_key(uint64_t seed, const char *name)
{
    return fg__hash(name) + seed * 0x9e3779b97f4a7c15ULL;
}

void fg__random_bits(uint64_t key, uint64_t index, uint32_t out[4])
{
    uint32_t c[4] = { (uint32_t)index, (uint32_t)(index >> 32), 0, 0 };
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = (uint64_t)0xD2511F53u * c[0], p1 = (uint64_t)0xCD9E8D57u * c[2];
        const uint32_t n0 = (uint32_t)(p1 >> 32) ^ c[1] ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c[3] ^ k1;
        c[0] = n0; c[1] = (uint32_t)p1; c[2] = n2; c[3] = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < 4; i++) out[i] = c[i];
}

static double unit(uint32_t hi, uint32_t lo)
{
    return (double)((((uint64_t)hi << 32) | lo) >> 11) / 9007199254740992.0;
}

double fg__random_uniform(uint64_t key, uint64_t index)
{
    uint32_t b[4];
    fg__random_bits(key, index, b);
    return unit(b[0], b[1]);
}

/* Box and Muller 1958, twice: the radius of the 32-bit u1 = (b + 1/2) / 2^32, at most 6.8, and an
 * angle of 32 bits give two numbers each. */
void fg__random_normals(uint64_t key, uint64_t block, float out[4])
{
    uint32_t b[4];
    fg__random_bits(key, block, b);
    for (int i = 0; i < 4; i += 2) {
        const float r = sqrtf(-2 * logf(((float)b[i] + 0.5f) * 0x1p-32f));
        const float angle = (float)(int32_t)b[i + 1] * (3.14159265358979f * 0x1p-31f);
        out[i] = r * cosf(angle);
        out[i + 1] = r * sinf(angle);
    }
}
