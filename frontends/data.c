/* data.c - files of tokens, their held-out part, and batches in an order that is a pure function of
 * one integer.
 *
 * Training: window number p (counted over the whole run) is window perm_e(p mod W) of epoch e = p /
 * W. perm_e is a four-round Feistel network on ceil(log2 W) bits, walked until it lands below W: a
 * random order without a table.  Epoch e cuts the text at an offset of its own below the context
 * length. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include "training.h"

enum { BIN_HEADER = 1024, BIN_MAGIC = 20240520, BIN_VERSION = 1 };

typedef struct { unsigned char *bytes; size_t size; } map;
typedef struct { const unsigned char *bytes; int width; int64_t count; } part;

struct fg_data {
    map      file[2];                    /* training, held out; the second may be empty */
    part     part[2];
    int64_t  context, windows[2];
    uint64_t seed, hash;
    int32_t  bos;
};

static fg_status map_file(map *m, const char *path, char message[FG_MESSAGE])
{
    struct stat st;
    fg_status s = FG_OK;
    const int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        return fg__say(message, FG_ERR_IO, "%s: %s", path, strerror(errno));
    if (fstat(fd, &st) != 0)
        s = fg__say(message, FG_ERR_IO, "%s: %s", path, strerror(errno));
    else if (!S_ISREG(st.st_mode))
        s = fg__say(message, FG_ERR_IO, "%s: not a regular file", path);
    else if (st.st_size == 0)
        s = fg__say(message, FG_ERR_FORMAT, "%s: the file is empty", path);
    if (s == FG_OK) {
        void *at = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (at == MAP_FAILED)
            s = fg__say(message, FG_ERR_IO, "%s: %s", path, strerror(errno));
        else
            *m = (map){ at, (size_t)st.st_size };
    }
    close(fd);
    return s;
}

static uint32_t u32_at(const unsigned char *b)
{
    return (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}

static inline int32_t token_at(const part *p, int64_t i)
{
    return p->width == 1 ? p->bytes[i] : p->bytes[2 * i] | p->bytes[2 * i + 1] << 8;
}

/* What the file's name and first bytes say it is. */
static fg_status understand(const map *m, const char *path, part *p, char message[FG_MESSAGE])
{
    const size_t n = strlen(path);
    if (n < 4 || strcmp(path + n - 4, ".bin")) {
        *p = (part){ m->bytes, 1, (int64_t)m->size };
        return FG_OK;
    }
    if (m->size >= BIN_HEADER && u32_at(m->bytes) == BIN_MAGIC) {
        const uint32_t version = u32_at(m->bytes + 4), count = u32_at(m->bytes + 8);
        if (version != BIN_VERSION)
            return fg__say(message, FG_ERR_FORMAT,
                           "%s: header version %" PRIu32 ", only %d is known", path, version,
                           BIN_VERSION);
        if (m->size != BIN_HEADER + 2 * (size_t)count)
            return fg__say(message, FG_ERR_FORMAT, "%s: the header promises %" PRIu32 " tokens, "
                           "the file has room for %zu", path, count, (m->size - BIN_HEADER) / 2);
        *p = (part){ m->bytes + BIN_HEADER, 2, count };
        return FG_OK;
    }
    if (m->size % 2)
        return fg__say(message, FG_ERR_FORMAT, "%s: %zu bytes are no whole number of u16 tokens",
                       path, m->size);
    *p = (part){ m->bytes, 2, (int64_t)(m->size / 2) };
    return FG_OK;
}

/* Every token below vocab; a hash of all of them on the way. */
static fg_status check_tokens(const map *m, const part *p, const char *path, int64_t vocab,
                              uint64_t *hash, char message[FG_MESSAGE])
{
    uint64_t h = fg__draw(*hash, (uint64_t)p->count, (uint64_t)p->width);
    for (int64_t i = 0; i < p->count; i++) {
        const int32_t token = token_at(p, i);
        if (token >= vocab)
            return fg__say(message, FG_ERR_FORMAT, "%s: token %" PRId32 " at byte %td is not below "
                           "the vocabulary's size %" PRId64, path, token,
                           p->bytes + i * p->width - m->bytes, vocab);
        h = (h ^ (uint64_t)token) * 0x100000001b3u;
        h ^= h >> 29;
    }
    *hash = h;
    return FG_OK;
}

static fg_status open_part(fg_data *d, int i, const char *path, int64_t vocab,
                           char message[FG_MESSAGE])
{
    fg_status s = map_file(&d->file[i], path, message);
    if (s == FG_OK)
        s = understand(&d->file[i], path, &d->part[i], message);
    if (s == FG_OK)
        s = check_tokens(&d->file[i], &d->part[i], path, vocab, &d->hash, message);
    return s;
}

/* Takes the last share of the training part away as the held-out part. */
static void hold_out(fg_data *d, double share)
{
    part *all = &d->part[0];
    const int64_t held = (int64_t)((double)all->count * share);
    d->part[1] = (part){ all->bytes + (all->count - held) * all->width, all->width, held };
    all->count -= held;
    d->hash = fg__draw(d->hash, (uint64_t)held, 1);
}

static fg_status count_windows(fg_data *d, const fg_recipe *r, char message[FG_MESSAGE])
{
    const int64_t T = d->context, n = d->part[0].count, held = d->part[1].count;
    const bool cut = !r->eval_data[0] && r->eval_fraction > 0;

    if (n < T)
        return fg__say(message, FG_ERR_FORMAT,
                       "%s: %" PRId64 " tokens to train on are fewer than the "
                       "context of %" PRId64 "%s",
                       r->data, n, T,
                       cut && n + held >= T ? "; lower context or eval_fraction"
                                            : "; lower context");
    if (held < T && (cut || r->eval_data[0]))
        return fg__say(message, FG_ERR_FORMAT,
                       "%s: %" PRId64 " held-out tokens are fewer than the "
                       "context of %" PRId64 "; %s",
                       cut ? r->data : r->eval_data, held, T,
                       cut ? "lower context, or raise eval_fraction or set it to 0"
                           : "lower context");
    d->windows[0] = (n - T + 1) / T > 0 ? (n - T + 1) / T : 1;
    d->windows[1] = held / T;
    return FG_OK;
}

fg_status fg_data_open(fg_data **out, const fg_recipe *r, int64_t vocab, char message[FG_MESSAGE])
{
    fg_data *d = calloc(1, sizeof *d);
    fg_status s;

    *out = NULL;
    if (!d)
        return fg__say(message, FG_ERR_MEMORY, "%s", fg_status_text(FG_ERR_MEMORY));
    d->context = r->context;
    d->seed = (uint64_t)r->seed;
    d->bos = (int32_t)r->bos;
    if (!r->data[0])
        s = fg__say(message, FG_ERR_USAGE,
                    "no training data: give a file of text with --data, or set data");
    else if (r->context < 1)
        s = fg__say(message, FG_ERR_USAGE, "context must be at least 1, it is %" PRId64,
                    r->context);
    else if (vocab < 1)
        s = fg__say(message, FG_ERR_USAGE,
                    "the vocabulary must hold at least 1 token, not %" PRId64, vocab);
    else if (r->vocab > vocab)
        s = fg__say(message, FG_ERR_USAGE,
                    "vocab is %" PRId64 ", the model knows only %" PRId64 " tokens", r->vocab,
                    vocab);
    else if (r->bos < 0 || r->bos >= vocab)
        s = fg__say(message, FG_ERR_USAGE,
                    "bos %" PRId64 " must be below the vocabulary's size %" PRId64, r->bos, vocab);
    else
        s = open_part(d, 0, r->data, r->vocab ? r->vocab : vocab, message);
    if (s == FG_OK && r->eval_data[0])
        s = open_part(d, 1, r->eval_data, r->vocab ? r->vocab : vocab, message);
    else if (s == FG_OK)
        hold_out(d, r->eval_fraction);
    if (s == FG_OK)
        s = count_windows(d, r, message);
    if (s != FG_OK) {
        fg_data_close(d);
        return s;
    }
    *out = d;
    return fg__say(message, FG_OK, "%s", "");
}

void fg_data_close(fg_data *d)
{
    if (!d)
        return;
    for (int i = 0; i < 2; i++)
        if (d->file[i].bytes)
            munmap(d->file[i].bytes, d->file[i].size);
    free(d);
}

int64_t fg_data_tokens(const fg_data *d, bool eval)
{
    return d->part[eval].count;
}

int64_t fg_data_windows(const fg_data *d, bool eval)
{
    return d->windows[eval];
}

int64_t fg_data_context(const fg_data *d)
{
    return d->context;
}

int32_t fg_data_token(const fg_data *d, bool eval, int64_t i)
{
    return token_at(&d->part[eval], i);
}

uint64_t fg_data_hash(const fg_data *d)
{
    return d->hash;
}

bool fg_data_is_text(const fg_data *d)
{
    return d->part[0].width == 1 && (!d->part[1].count || d->part[1].width == 1);
}

/* The i-th of n in epoch e's order. */
static int64_t permuted(const fg_data *d, int64_t epoch, int64_t i, int64_t n)
{
    const uint64_t key = fg__draw(d->seed, (uint64_t)epoch, 2);
    int half = 1;
    while (half < 31 && (int64_t)1 << 2 * half < n)
        half++;
    const uint64_t mask = ((uint64_t)1 << half) - 1;

    do {
        uint64_t left = (uint64_t)i >> half, right = (uint64_t)i & mask;
        for (uint64_t round = 0; round < 4; round++) {
            const uint64_t mixed = left ^ (fg__draw(key, right, round) & mask);
            left = right;
            right = mixed;
        }
        i = (int64_t)(left << half | right);
    } while (i >= n);
    return i;
}

static void window(const fg_data *d, bool eval, int64_t start, int32_t *tokens, int32_t *labels)
{
    for (int64_t t = 0; t < d->context; t++)
        labels[t] = token_at(&d->part[eval], start + t);
    tokens[0] = d->bos;
    memcpy(tokens + 1, labels, (size_t)(d->context - 1) * sizeof *tokens);
}

void fg_data_train_batch(const fg_data *d, int64_t position, int64_t n, int32_t *tokens,
                         int32_t *labels)
{
    const int64_t T = d->context, W = d->windows[0];
    const int64_t spare = d->part[0].count - W * T;
    const uint64_t offsets = (uint64_t)(spare < T ? spare : T - 1) + 1;

    for (int64_t i = 0; i < n; i++) {
        const int64_t epoch = (position + i) / W;
        const int64_t offset = (int64_t)(fg__draw(d->seed, (uint64_t)epoch, 3) % offsets);
        const int64_t k = permuted(d, epoch, (position + i) % W, W);
        window(d, false, offset + k * T, tokens + i * T, labels + i * T);
    }
}

int64_t fg_data_eval_windows(const fg_data *d, const fg_recipe *r)
{
    const int64_t all = d->windows[1], micro = r->micro_batch ? r->micro_batch : r->batch;
    return r->eval_batches && r->eval_batches < (all + micro - 1) / micro ? r->eval_batches * micro
                                                                          : all;
}

void fg_data_eval_batch(const fg_data *d, int64_t total, int64_t first, int64_t n, int32_t *tokens,
                        int32_t *labels)
{
    const int64_t T = d->context, W = d->windows[1];
    for (int64_t i = 0; i < n; i++, tokens += T, labels += T) {
        const int64_t j = first + i;
        if (j < total)
            window(d, true, j * (W / total) * T + j * (W % total) / total * T, tokens, labels);
        else
            for (int64_t t = 0; t < T; t++) {
                tokens[t] = d->bos;
                labels[t] = -100;
            }
    }
}
