/* cli_load.c - from a model file to its functions: compiler, cache, dlopen, ABI stamp.
 *
 * A C file is compiled once and kept as CACHE/NAME-KEY.so.  KEY is a hash of the preprocessed text
 * (the source, every header it includes, the compiler's predefined macros with its version), the
 * command line and the compiler's own file, so a hit can never be stale.  A new file is written
 * under a name of its own and renamed, so any number of runs may compile the same model at once. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "cli.h"

extern char **environ;

enum { WORDS = 256 };

/* A command line: words that live in a buffer of their own. */
typedef struct { int n; char *word[WORDS + 1]; } command_line;

static void add_word(command_line *l, const char *text, size_t length)
{
    char *word = l->n < WORDS ? strndup(text, length) : NULL;
    if (word) l->word[l->n++] = word;
}

static void add(command_line *l, const char *text)
{
    add_word(l, text, strlen(text));
}

/* Adds the words of a text like FOX_CFLAGS, split at blanks. */
static void add_all(command_line *l, const char *text)
{
    while (text && *text) {
        text += strspn(text, " \t\n");
        size_t length = strcspn(text, " \t\n");
        if (length) add_word(l, text, length);
        text += length;
    }
}

static void free_words(command_line *l)
{
    for (int i = 0; i < l->n; i++) free(l->word[i]);
    l->n = 0;
}

/* ---- hash ------------------------------------------------------------------------------------ */

/* Two FNV-1a sums with different starts: 128 bits. */
typedef struct { uint64_t a, b; } hash;

static void hash_bytes(hash *h, const void *data, size_t n)
{
    const unsigned char *p = data;
    for (size_t i = 0; i < n; i++) {
        h->a = (h->a ^ p[i]) * 0x100000001b3u;
        h->b = (h->b ^ p[i] ^ (h->b >> 29)) * 0x9e3779b97f4a7c15u;
    }
}

static void hash_text(hash *h, const char *text)
{
    hash_bytes(h, text, strlen(text) + 1);
}

/* The file behind a compiler's name, its size and age: an upgrade in place changes the key. */
static void hash_program(hash *h, const char *name)
{
    char path[1024];
    struct stat st;
    const char *list = strchr(name, '/') ? NULL : getenv("PATH");
    snprintf(path, sizeof path, "%s", name);
    while (list && *list) {
        int length = (int)strcspn(list, ":");
        snprintf(path, sizeof path, "%.*s/%s", length, list, name);
        if (!access(path, X_OK)) break;
        list += length + (list[length] == ':');
    }
    hash_text(h, path);
    if (stat(path, &st)) return;
    hash_bytes(h, &st.st_size, sizeof st.st_size);
    hash_bytes(h, &st.st_mtime, sizeof st.st_mtime);
}

/* ---- processes ------------------------------------------------------------------------------- */

/* Runs a program to its end.  h: gets its standard output; else output and diagnostics pass
 * through. */
static int run(command_line *l, hash *h)
{
    int ends[2] = { -1, -1 }, status = -1;
    pid_t child;
    posix_spawn_file_actions_t files;
    l->word[l->n] = NULL;
    if (h && pipe(ends)) return -1;
    posix_spawn_file_actions_init(&files);
    if (h) {
        posix_spawn_file_actions_adddup2(&files, ends[1], STDOUT_FILENO);
        posix_spawn_file_actions_addclose(&files, ends[0]);
        posix_spawn_file_actions_addclose(&files, ends[1]);
        posix_spawn_file_actions_addopen(&files, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
    } else {
        posix_spawn_file_actions_adddup2(&files, STDERR_FILENO, STDOUT_FILENO);
    }
    int failed = posix_spawnp(&child, l->word[0], &files, NULL, l->word, environ);
    posix_spawn_file_actions_destroy(&files);
    if (h) {
        char buffer[8192];
        ssize_t n;
        close(ends[1]);
        while ((n = read(ends[0], buffer, sizeof buffer)) > 0 || (n < 0 && errno == EINTR))
            if (n > 0) hash_bytes(h, buffer, (size_t)n);
        close(ends[0]);
    }
    if (failed) return 127;
    while (waitpid(child, &status, 0) < 0) if (errno != EINTR) return -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

/* ---- folders --------------------------------------------------------------------------------- */

/* The folder of the running program. */
static bool program_folder(char *buffer, size_t size)
{
    ssize_t n = readlink("/proc/self/exe", buffer, size - 1);
    if (n <= 0) return false;
    buffer[n] = 0;
    char *slash = strrchr(buffer, '/');
    if (!slash) return false;
    *slash = 0;
    return true;
}

/* The folder of fox_graph.h: FOX_INCLUDE, ../include/fox-graph (installed; from libexec one
 * higher) or include (build tree). */
static int find_include(const cli *c, char *buffer, size_t size)
{
    static const char *const places[] = { "/../include/fox-graph", "/../../include/fox-graph",
                                          "/include" };
    const char *given = getenv("FOX_INCLUDE");
    char folder[1024], header[2200];
    if (given && *given) {
        snprintf(buffer, size, "%s", given);
        snprintf(header, sizeof header, "%s/fox_graph.h", buffer);
        if (!access(header, R_OK)) return CLI_OK;
        return cli_fail(c, CLI_COMPILE, "FOX_INCLUDE is %s, which has no fox_graph.h", given);
    }
    for (size_t i = 0;
         i < sizeof places / sizeof places[0] && program_folder(folder, sizeof folder); i++) {
        snprintf(buffer, size, "%s%s", folder, places[i]);
        snprintf(header, sizeof header, "%s/fox_graph.h", buffer);
        if (!access(header, R_OK)) return CLI_OK;
    }
    return cli_fail(c, CLI_COMPILE,
                    "fox_graph.h is not near the program; set FOX_INCLUDE to its folder");
}

static bool make_folders(char *path)
{
    for (char *p = path + 1; *p; p++) {
        if (*p != '/') continue;
        *p = 0;
        bool failed = mkdir(path, 0700) && errno != EEXIST;
        *p = '/';
        if (failed) return false;
    }
    return !mkdir(path, 0700) || errno == EEXIST;
}

/* Where compiled models are kept.  What lies there is run, so nobody else may write to it. */
static int find_cache(const cli *c, char *buffer, size_t size)
{
    const char *own = getenv("FOX_CACHE_DIR"), *xdg = getenv("XDG_CACHE_HOME"),
               *home = getenv("HOME");
    struct stat st;
    if (own && *own) snprintf(buffer, size, "%s", own);
    else if (xdg && xdg[0] == '/') snprintf(buffer, size, "%s/fox-graph", xdg);
    else if (home && *home) snprintf(buffer, size, "%s/.cache/fox-graph", home);
    else return cli_fail(c, CLI_FILE, "there is no folder for compiled models: set FOX_CACHE_DIR");
    if (!make_folders(buffer) || stat(buffer, &st))
        return cli_fail(c, CLI_FILE, "the folder for compiled models cannot be made: %s: %s",
                        buffer, strerror(errno));
    if (st.st_uid != geteuid() || st.st_mode & 022)
        return cli_fail(c, CLI_FILE, "the folder for compiled models must belong to you alone: %s",
                        buffer);
    return CLI_OK;
}

/* ---- compiling ------------------------------------------------------------------------------- */

/* The compiler with all flags, for preprocessing (output NULL) or compiling to output. */
static void compiler_line(command_line *l, const char *include, const char *path,
                          const char *output)
{
    const char *cc = getenv("FOX_CC");
    char text[2200];
    l->n = 0;
    add_all(l, cc && *cc ? cc : "cc");
    if (!l->n) add(l, "cc");
    if (!output) {
        add(l, "-E");
        add(l, "-dD");
    }
    add(l, "-std=gnu11");
    add(l, "-O2");
    add(l, "-g");
    add(l, "-Wall");
    add(l, "-fPIC");
    snprintf(text, sizeof text, "-I%s", include);
    add(l, text);
    add_all(l, getenv("FOX_CFLAGS"));
    if (output) {
        add(l, "-shared");
        add(l, "-Wl,-Bsymbolic");        /* a copy of fox.c means its own functions */
        add(l, "-o");
        add(l, output);
    }
    snprintf(text, sizeof text, "%s%s", path[0] == '-' ? "./" : "", path);
    add(l, text);
    if (output) add(l, "-lm");
}

static void print_line(const command_line *l)
{
    fprintf(stderr, "%s", l->word[0]);
    for (int i = 1; i < l->n; i++) fprintf(stderr, " %s", l->word[i]);
    fputc('\n', stderr);
}

/* CACHE/NAME-KEY without ".so". */
static int cache_name(const cli *c, const char *include, const char *path, char *buffer,
                      size_t size)
{
    char folder[1024];
    hash h = { 0xcbf29ce484222325u, 0x84222325cbf29ce4u };
    int status = find_cache(c, folder, sizeof folder);
    if (status) return status;
    command_line line;
    compiler_line(&line, include, path, NULL);
    hash_program(&h, line.word[0]);
    for (int i = 0; i < line.n; i++) hash_text(&h, line.word[i]);
    hash_text(&h, fg_version());
    run(&line, &h); /* a failure shows again, with its diagnostics, when the file is compiled */
    free_words(&line);
    const char *name = strrchr(path, '/');
    name = name ? name + 1 : path;
    snprintf(buffer, size, "%s/%.*s-%016" PRIx64 "%016" PRIx64, folder, (int)strcspn(name, "."),
             name, h.a, h.b);
    return CLI_OK;
}

static int compile(const cli *c, const char *include, const char *path, const char *so)
{
    char temporary[2300];
    command_line line;
    snprintf(temporary, sizeof temporary, "%s.%ld.tmp", so, (long)getpid());
    compiler_line(&line, include, path, temporary);
    if (cli_has(c, OPT_print_cc)) print_line(&line);
    const double start = cli_now();
    fflush(stdout);
    int failed = run(&line, NULL), status = CLI_OK;
    if (failed == 127 && access(temporary, F_OK))
        status = cli_fail(c, CLI_COMPILE, "the compiler %s cannot be run; set FOX_CC",
                          line.word[0]);
    else if (failed)
        status = cli_fail(c, CLI_COMPILE, "%s did not compile", path);
    else if (rename(temporary, so))
        status = cli_fail(c, CLI_FILE, "%s cannot be written: %s", so, strerror(errno));
    else
        cli_more(c, "compiled %s in %.2f s to %s", path, cli_now() - start, so);
    if (status) unlink(temporary);
    free_words(&line);
    return status;
}

/* Copies the compiled model to the working folder. */
static int keep(const cli *c, const char *so, const char *path)
{
    char name[512], buffer[65536];
    const char *base = strrchr(path, '/');
    base = base ? base + 1 : path;
    snprintf(name, sizeof name, "%.*s.so", (int)strcspn(base, "."), base);
    FILE *from = fopen(so, "rb"), *to = from ? fopen(name, "wb") : NULL;
    bool good = from && to;
    for (size_t n; good && (n = fread(buffer, 1, sizeof buffer, from)) > 0;)
        good = fwrite(buffer, 1, n, to) == n;
    if (from) good = !ferror(from) && good && !fclose(from);
    if (to) good = !fclose(to) && good;
    if (!good)
        return cli_fail(c, CLI_FILE, "the compiled model cannot be copied to %s: %s", name,
                        strerror(errno));
    cli_note(c, "kept %s", name);
    return CLI_OK;
}

/* ---- loading --------------------------------------------------------------------------------- */

/* A symbol as a function pointer, which C does not let one cast to. */
static void symbol(void *handle, const char *name, void *function)
{
    void *address = dlsym(handle, name);
    memcpy(function, &address, sizeof address);
}

/* What dlopen says, without the cache's path in front: "undefined symbol: fg_modle". */
static int load_error(const cli *c, const char *path)
{
    const char *text = dlerror(), *colon = text ? strstr(text, ": ") : NULL;
    if (!text) text = "unknown reason";
    return cli_fail(c, CLI_COMPILE, "%s cannot be loaded: %s", path, colon ? colon + 2 : text);
}

static int find_symbols(const cli *c, const char *path, cli_code *code)
{
    const uint32_t *abi = dlsym(code->handle, "fg_model_abi");
    if (!abi)
        return cli_fail(c, CLI_COMPILE,
                        "%s has no version stamp: a model file includes <fox_graph.h>", path);
    if (*abi != FG_ABI)
        return cli_fail(c, CLI_COMPILE,
                        "%s was compiled for ABI %u, this is ABI %u: compile it again", path,
                        (unsigned)*abi, (unsigned)FG_ABI);
    symbol(code->handle, "fg_model", &code->model);
    symbol(code->handle, "fg_loss", &code->loss);
    symbol(code->handle, "fg_feed", &code->feed);
    symbol(code->handle, "fg_configure", &code->configure);
    if (!code->model && !code->loss)
        return cli_fail(c, CLI_COMPILE, "%s defines neither fg_model nor fg_loss", path);
    if (code->model && code->loss)
        return cli_fail(c, CLI_COMPILE,
                        "%s defines both fg_model and fg_loss; a model has one of them", path);
    if (code->loss && !code->feed)
        return cli_fail(c, CLI_COMPILE,
                        "%s defines fg_loss without fg_feed, which fills its inputs", path);
    return CLI_OK;
}

static int open_library(const cli *c, const char *so, const char *path, cli_code *code)
{
    char text[2300];
    snprintf(text, sizeof text, "%s%s", strchr(so, '/') ? "" : "./", so);
    code->handle = dlopen(text, RTLD_NOW | RTLD_LOCAL);
    return code->handle ? find_symbols(c, path, code) : load_error(c, path);
}

int cli_load(const cli *c, const char *path, cli_code *code)
{
    char include[2100], name[2100], so[2200];
    const size_t length = strlen(path);
    *code = (cli_code){ 0 };
    if (access(path, R_OK))
        return cli_fail(c, CLI_FILE, "%s cannot be read: %s", path, strerror(errno));
    if (length > 3 && !strcmp(path + length - 3, ".so")) return open_library(c, path, path, code);
    int status = find_include(c, include, sizeof include);
    if (!status) status = cache_name(c, include, path, name, sizeof name);
    if (status) return status;
    snprintf(so, sizeof so, "%s.so", name);
    if (!access(so, R_OK)) {
        cli_more(c, "using %s", so);
        if (cli_has(c, OPT_print_cc)) {
            command_line line;
            compiler_line(&line, include, path, so);
            print_line(&line);
            free_words(&line);
        }
    } else {
        status = compile(c, include, path, so);
    }
    if (!status) status = open_library(c, so, path, code);
    if (!status && cli_has(c, OPT_keep)) status = keep(c, so, path);
    return status;
}

void cli_unload(cli_code *code)
{
    if (code->handle) dlclose(code->handle);
    *code = (cli_code){ 0 };
}
