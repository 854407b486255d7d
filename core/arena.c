/* arena.c - the memory of a graph's names, attributes and texts, freed with the graph. */
#include <stdlib.h>
#include <string.h>
#include "graph.h"

void fg__out_of_memory(fg_graph *g)
{
    if (!g->status) g->status = FG_ERR_MEMORY;
}

void *fg__alloc(fg_graph *g, size_t size)
{
    if (size > SIZE_MAX / 2) { fg__out_of_memory(g); return NULL; }
    size = (size + 63) & ~(size_t)63;
    fg_block *b = g->arena;
    if (!b || b->used + size > b->size) {
        const size_t room = size > 16384 ? size : 16384;
        b = malloc(sizeof *b + 64 + room);
        if (!b) { fg__out_of_memory(g); return NULL; }
        *b = (fg_block){ g->arena, 0, room };
        g->arena = b;
    }
    char *base = (char *)(((uintptr_t)(b + 1) + 63) & ~(uintptr_t)63);
    void *p = base + b->used;
    b->used += size;
    return memset(p, 0, size);
}

char *fg__strdup(fg_graph *g, const char *s)
{
    const size_t n = strlen(s) + 1;
    char *p = fg__alloc(g, n);
    return p ? memcpy(p, s, n) : NULL;
}

bool fg__grow(void **array, uint32_t *cap, uint32_t n, size_t size)
{
    if (n < *cap) return true;
    if (n >= UINT32_MAX / 2) return false;
    const uint32_t want = *cap ? *cap * 2 : 64;
    void *p = realloc(*array, want * size);
    if (!p) return false;
    *array = p;
    *cap = want;
    return true;
}
