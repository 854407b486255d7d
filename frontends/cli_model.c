/* cli_model.c - from MODEL and the options to a model, its recipe and settings, graphs and
 * weights.
 *
 * A value comes from the last of these that has one: defaults, the preset, model.c's fg_configure,
 * the run's own config.json, --config, then --set and the short forms (--steps, --data, ...) in
 * their order. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "cli.h"

const char *cli_origin_name(cli_origin o)
{
    static const char *const name[CLI_FROM_COUNT] = {
        "default", "preset", "model", "run", "--config", "command line"
    };
    return name[o];
}

/* ---- recipe and settings --------------------------------------------------------------------- */

static const char *next_recipe_key(const void *of, int i)
{
    (void)of;
    return fg_recipe_key(i);
}

static int recipe_index(const char *key)
{
    const char *name;
    for (int i = 0; i < CLI_MAX_KEYS && (name = fg_recipe_key(i)); i++)
        if (!strcmp(name, key)) return i;
    return -1;
}

/* One key=value for the recipe if it has that key, else for the model. */
static int apply(const cli *c, cli_model *m, const char *key, const char *value, cli_origin origin)
{
    char message[200] = "";
    const int k = recipe_index(key);
    if (k >= 0) {
        if (fg_recipe_set(&m->recipe, key, value, message))
            return cli_fail(c, CLI_USAGE, "%s", message);
        m->recipe_origin[k] = origin;
        return CLI_OK;
    }
    int i = 0;
    while (i < m->model.n_settings && strcmp(m->settings[i].key, key)) i++;
    if (i == CLI_MAX_SETTINGS)
        return cli_fail(c, CLI_USAGE, "there are more than %d settings", CLI_MAX_SETTINGS);
    char *own_key = strdup(key), *own_value = strdup(value);
    if (!own_key || !own_value) {
        free(own_key);
        free(own_value);
        return cli_fail(c, CLI_DEVICE, "out of memory");
    }
    if (i < m->model.n_settings) {
        free((char *)m->settings[i].key);
        free((char *)m->settings[i].value);
    } else {
        m->model.n_settings++;
    }
    m->settings[i] = (fg_setting){ own_key, own_value };
    m->setting_origin[i] = origin;
    return CLI_OK;
}

/* "key=value" of --set. */
static int apply_set(const cli *c, cli_model *m, const char *text)
{
    char key[128];
    const char *equals = strchr(text, '=');
    const size_t length = equals ? (size_t)(equals - text) : 0;
    if (!length || length >= sizeof key)
        return cli_fail(c, CLI_USAGE, "--set takes KEY=VALUE, not '%s'", text);
    memcpy(key, text, length);
    key[length] = 0;
    return apply(c, m, key, equals + 1, CLI_FROM_USER);
}

/* One member of a JSON object of keys and values. */
static int apply_json(const cli *c, cli_model *m, const char *file, const char *key,
                      const json_t *value, cli_origin origin)
{
    char number[64];
    const char *text = number;
    if (json_is_string(value)) text = json_string_value(value);
    else if (json_is_integer(value))
        snprintf(number, sizeof number, "%lld", (long long)json_integer_value(value));
    else if (json_is_real(value)) snprintf(number, sizeof number, "%.17g", json_real_value(value));
    else if (json_is_boolean(value)) snprintf(number, sizeof number, "%d", json_is_true(value));
    else
        return cli_fail(c, CLI_USAGE,
                        "%s: the value of '%s' must be a number, a string, true or false", file,
                        key);
    return apply(c, m, key, text, origin);
}

static int apply_file(const cli *c, cli_model *m, const char *file, const char *member,
                      cli_origin origin)
{
    json_error_t error;
    const char *key;
    json_t *value;
    int status = CLI_OK;
    if (access(file, R_OK))
        return cli_fail(c, CLI_FILE, "%s cannot be read: %s", file, strerror(errno));
    json_t *root = json_load_file(file, JSON_REJECT_DUPLICATES, &error);
    if (!root) return cli_fail(c, CLI_FILE, "%s:%d: %s", file, error.line, error.text);
    json_t *object = member ? json_object_get(root, member) : root;
    if (!member && !json_is_object(root))
        status = cli_fail(c, CLI_FILE, "%s must hold one JSON object", file);
    json_object_foreach(object, key, value)
        if (!status) status = apply_json(c, m, file, key, value, origin);
    json_decref(root);
    return status;
}

/* Options that are recipe keys under another name. */
static const char *key_of(int option)
{
    switch (option) {
    case OPT_data:      return "data";
    case OPT_eval_data: return "eval_data";
    case OPT_steps:     return "steps";
    case OPT_tokens:    return "tokens";
    case OPT_seed:      return "seed";
    default:            return NULL;
    }
}

static int apply_options(const cli *c, cli_model *m)
{
    int status = CLI_OK;
    const char *file;
    for (int i = 0; !status && (file = cli_nth(c, OPT_config, i)); i++)
        status = apply_file(c, m, file, NULL, CLI_FROM_CONFIG);
    for (int i = 0; !status && i < c->n_given; i++) {
        const char *key = key_of(c->given[i].option);
        if (key) status = apply(c, m, key, c->given[i].value, CLI_FROM_USER);
        else if (c->given[i].option == OPT_set) status = apply_set(c, m, c->given[i].value);
    }
    return status;
}

static void apply_preset(cli_model *m, const fg_preset *p)
{
    static const char *const keys[] = { "lr", "tokens", "context", "batch", "micro_batch" };
    if (p->lr > 0) m->recipe.lr = p->lr;
    if (p->tokens > 0) m->recipe.tokens = p->tokens;
    if (p->context > 0) m->recipe.context = p->context;
    if (p->batch > 0) m->recipe.batch = p->batch;
    m->recipe.micro_batch = 1;           /* the paper's batch of half a million tokens in parts */
    for (int i = 0; i < 5; i++) {
        int k = recipe_index(keys[i]);
        if (k >= 0) m->recipe_origin[k] = CLI_FROM_PRESET;
    }
}

/* What fg_configure changed is the model's; what it left stays a default. */
static void apply_configure(cli_model *m)
{
    const fg_recipe before = m->recipe;
    char a[1200], b[1200];
    const char *key;
    if (!m->code.configure) return;
    m->code.configure(&m->recipe);
    m->recipe.data[sizeof m->recipe.data - 1] = 0;
    m->recipe.eval_data[sizeof m->recipe.eval_data - 1] = 0;
    for (int i = 0; i < CLI_MAX_KEYS && (key = fg_recipe_key(i)); i++) {
        fg_recipe_get(&before, key, a, sizeof a);
        fg_recipe_get(&m->recipe, key, b, sizeof b);
        if (strcmp(a, b)) m->recipe_origin[i] = CLI_FROM_MODEL;
    }
}

/* ---- finding the model ----------------------------------------------------------------------- */

static fg_tensor build_code(void *self, fg_tensor tokens)
{
    return ((cli_model *)self)->code.model(tokens);
}

static fg_tensor code_loss(void *self, fg_graph *g, const fg_recipe *r)
{
    return ((cli_model *)self)->code.loss(g, r);
}

static fg_status code_feed(void *self, fg_plan *p, const fg_graph *g, const fg_recipe *r,
                           int64_t batch, bool eval)
{
    return ((cli_model *)self)->code.feed(p, g, r, batch, eval);
}

static fg_tensor build_preset(void *self, fg_tensor tokens)
{
    return fg_preset_build(((cli_model *)self)->path, tokens);
}

static fg_tensor build_config(void *self, fg_tensor tokens)
{
    return fg_config_build(&((cli_model *)self)->config, tokens);
}

static char *join(const char *folder, const char *name)
{
    const size_t size = strlen(folder) + strlen(name) + 2;
    char *path = malloc(size);
    if (path) snprintf(path, size, "%s/%s", folder, name);
    return path;
}

/* FOLDER/NAME if there is such a file, else NULL. */
static char *existing(const char *folder, const char *name)
{
    char *path = join(folder, name);
    if (path && !access(path, F_OK)) return path;
    free(path);
    return NULL;
}

static bool ends(const char *text, const char *tail)
{
    const size_t n = strlen(text), m = strlen(tail);
    return n > m && !strcmp(text + n - m, tail);
}

static int open_code(const cli *c, cli_model *m, const char *path)
{
    int status = cli_load(c, path, &m->code);
    if (status) return status;
    if (ends(path, ".c") && !m->source) m->source = strdup(path);
    if (m->code.model) {
        m->model.build = build_code;
    } else {
        m->model.loss = code_loss;
        m->model.feed = code_feed;
    }
    apply_configure(m);
    return CLI_OK;
}

static const char *next_preset(const void *of, int i)
{
    (void)of;
    return i < fg_preset_count() ? fg_preset_at(i)->name : NULL;
}

static int open_preset(const cli *c, cli_model *m)
{
    const fg_preset *p = fg_preset_find(m->path);
    if (p) {
        m->model.build = build_preset;
        apply_preset(m, p);
        return CLI_OK;
    }
    if (strchr(m->path, '/') || strchr(m->path, '.'))
        return cli_fail(c, CLI_FILE, "%s cannot be read: %s", m->path, strerror(ENOENT));
    const char *near = cli_nearest(m->path, next_preset, NULL);
    if (near)
        return cli_fail(c, CLI_FILE, "there is no file and no preset '%s', did you mean %s?",
                        m->path, near);
    return cli_fail(c, CLI_FILE,
                    "there is no file and no preset '%s'; fox-graph info --help lists the presets",
                    m->path);
}

/* A checkpoint: weights, and what they belong to: the model's source, or else config.json. */
static int open_checkpoint(const cli *c, cli_model *m, const char *source_folder)
{
    char message[400] = "";
    m->weights = existing(m->folder, "model.safetensors");
    if (!m->weights) return cli_fail(c, CLI_FILE, "%s holds no model.safetensors", m->folder);
    m->source = existing(m->folder, "model.c");
    if (!m->source && source_folder) m->source = existing(source_folder, "model.c");
    if (m->source) return open_code(c, m, m->source);
    char *config = join(m->folder, "config.json");
    if (!config) return cli_fail(c, CLI_DEVICE, "out of memory");
    fg_status s = fg_config_read(config, &m->config, message);
    if (!s) s = fg_config_fit(&m->config, m->weights, message);
    free(config);
    if (s) return cli_fail(c, cli_exit_of(s), "%s", message);
    m->model.build = build_config;
    return CLI_OK;
}

/* A run folder has config.json (recipe and settings) and ckpt/; a checkpoint has
 * model.safetensors. */
static int open_folder(const cli *c, cli_model *m)
{
    char newest[1024] = "", message[400] = "";
    char *checkpoints = existing(m->path, "ckpt");
    if (!checkpoints) {
        m->folder = strdup(m->path);
        return m->folder ? open_checkpoint(c, m, NULL) : cli_fail(c, CLI_DEVICE, "out of memory");
    }
    fg_status s = fg_checkpoint_find_newest(checkpoints, newest, message);
    free(checkpoints);
    if (s) return cli_fail(c, cli_exit_of(s), "%s", message);
    if (!newest[0])
        return cli_fail(c, CLI_FILE, "%s is a run without a finished checkpoint", m->path);
    m->folder = strdup(newest);
    int status = m->folder ? open_checkpoint(c, m, m->path)
                           : cli_fail(c, CLI_DEVICE, "out of memory");
    char *config = status ? NULL : existing(m->path, "config.json");
    if (config) status = apply_file(c, m, config, "recipe", CLI_FROM_RUN);
    if (config && !status) status = apply_file(c, m, config, "settings", CLI_FROM_RUN);
    free(config);
    return status;
}

int cli_open(const cli *c, const char *path, cli_model *m)
{
    struct stat st;
    int status;
    *m = (cli_model){ .recipe = fg_recipe_default() };
    m->path = strdup(path);
    if (!m->path) return cli_fail(c, CLI_DEVICE, "out of memory");
    m->model.name = m->path;
    m->model.self = m;
    m->model.settings = m->settings;
    if (stat(path, &st)) status = open_preset(c, m);
    else if (S_ISDIR(st.st_mode)) status = open_folder(c, m);
    else if (ends(path, ".c") || ends(path, ".so")) status = open_code(c, m, path);
    else
        status = cli_fail(c, CLI_FILE, "%s is neither a .c file, a .so, a folder nor a preset",
                          path);
    return status ? status : apply_options(c, m);
}

void cli_close(cli_model *m)
{
    for (int i = 0; i < m->model.n_settings; i++) {
        free((char *)m->settings[i].key);
        free((char *)m->settings[i].value);
    }
    cli_unload(&m->code);
    free(m->path);
    free(m->source);
    free(m->folder);
    free(m->weights);
    *m = (cli_model){ 0 };
}

/* ---- graphs, device, weights ----------------------------------------------------------------- */

static const char *next_setting(const void *of, int i)
{
    return fg_graph_asked_setting(of, i);
}

int cli_check_settings(const cli *c, const fg_graph *g)
{
    int status = CLI_OK;
    const char *key;
    for (int i = 0; (key = fg_graph_unused_setting(g, i)); i++) {
        const char *near = cli_nearest(key, next_setting, g);
        if (!near) near = cli_nearest(key, next_recipe_key, NULL);
        if (near)
            status = cli_fail(c, CLI_USAGE, "nobody reads '%s', did you mean '%s'?", key, near);
        else
            status = cli_fail(c, CLI_USAGE,
                              "nobody reads '%s': neither the recipe nor the model has such a key",
                              key);
    }
    return status;
}

int cli_check_graph(const cli *c, const fg_graph *g, const char *what)
{
    if (!g) return cli_fail(c, CLI_DEVICE, "out of memory");
    const fg_status s = fg_graph_status(g);
    const int n = fg_graph_errors(g);
    if (!s) return CLI_OK;
    fflush(stdout);
    for (int i = 0; i < n; i++) {
        const char *text = fg_graph_error(g, i);
        const size_t length = strlen(text);
        fprintf(stderr, "%s%s", text, length && text[length - 1] == '\n' ? "" : "\n");
    }
    if (!n) fprintf(stderr, "%s\n", fg_graph_message(g));
    return cli_fail(c, cli_exit_of(s), n == 1 || !n ? "the %s has 1 error" : "the %s has %d errors",
                    what, n);
}

static fg_graph *checked(const cli *c, fg_graph *g, const char *what, int *status)
{
    *status = cli_check_graph(c, g, what);
    if (!*status) *status = cli_check_settings(c, g);
    if (!*status) return g;
    fg_graph_free(g);
    return NULL;
}

fg_graph *cli_forward(const cli *c, const cli_model *m, int64_t batch, int64_t context, int *status)
{
    if (!m->model.build) return cli_loss(c, m, batch, context, status);
    return checked(c, fg_model_forward(&m->model, &m->recipe, batch, context), "forward graph",
                   status);
}

fg_graph *cli_loss(const cli *c, const cli_model *m, int64_t batch, int64_t context, int *status)
{
    return checked(c, fg_model_loss(&m->model, &m->recipe, batch, context), "loss graph", status);
}

int cli_check_trained(const cli *c, const cli_model *m, const fg_graph *g)
{
    fg_param_info p;
    for (int i = 0; fg_param_at(g, i, &p); i++) if (!p.init.frozen) return CLI_OK;
    return cli_fail(c, CLI_GRAPH, "%s has no parameter to train", m->path);
}

fg_graph *cli_training(const cli *c, const cli_model *m, fg_graph **update, int *status)
{
    char message[FG_MESSAGE] = "";
    *update = NULL;
    if (fg_recipe_check(&m->recipe, message)) {
        *status = cli_fail(c, CLI_USAGE, "%s", message);
        return NULL;
    }
    fg_graph *g = checked(c, fg_model_training(&m->model, &m->recipe, update), "training graph",
                          status);
    if (g && *update) *status = cli_check_graph(c, *update, "update graph");
    if (g && !*status) *status = cli_check_trained(c, m, g);
    if (*status) {
        fg_graph_free(*update);
        *update = NULL;
        fg_graph_free(g);
        return NULL;
    }
    return g;
}

int64_t cli_vocab(const cli_model *m)
{
    if (m->recipe.vocab > 0 || !m->model.build) return m->recipe.vocab;
    fg_graph *g = fg_model_forward(&m->model, &m->recipe, 1, m->recipe.context);
    const int64_t vocab = fg_dim(fg_find(g, "logits"), -1);
    fg_graph_free(g);
    return vocab;
}

static int check_device(const cli *c, const char *device)
{
    const char *precision = cli_text(c, OPT_precision);
    const bool cuda = device && !strncmp(device, "cuda", 4) &&
                      (!device[4] || (device[4] == ':' && device[5] &&
                                      strspn(device + 5, "0123456789") == strlen(device + 5)));
    if (device && strcmp(device, "cpu") && !cuda)
        return cli_fail(c, CLI_USAGE, "the device is cpu, cuda or cuda:N, not '%s'", device);
    if (precision && strcmp(precision, "f32") && strcmp(precision, "bf16"))
        return cli_fail(c, CLI_USAGE, "the precision is f32 or bf16, not '%s'", precision);
    if (precision && precision[0] == 'b' && device && !cuda)
        return cli_fail(c, CLI_USAGE, "the cpu computes in f32; bf16 needs a CUDA device");
    return CLI_OK;
}

/* The first GPU where there is one, else the CPU; the twin in double knows the CPU alone. */
static fg_backend *open_best(int threads)
{
    fg_backend *b = CLI_DOUBLE ? NULL : fg_backend_open("cuda", threads);
    if (b && !fg_backend_status(b)) return b;
    fg_backend_close(b);
    return fg_backend_open("cpu", threads);
}

void cli_precision(const cli *c, fg_store *s, const fg_backend *b)
{
    const char *precision = cli_text(c, OPT_precision);
    const bool gpu = strcmp(fg_backend_name(b), "cpu") != 0;
    fg_store_precision(s, gpu && !(precision && precision[0] == 'f') ? FG_BF16 : FG_F32);
}

fg_backend *cli_backend(const cli *c, int *status)
{
    const char *device = cli_text(c, OPT_device), *omp = getenv("OMP_NUM_THREADS");
    int64_t threads = omp ? atoi(omp) : 0;
    if (threads < 0 || threads > 4096) threads = 0;
    if (!device) device = getenv("FOX_DEVICE");
    if (device && !*device) device = NULL;
    *status = cli_int(c, OPT_threads, 1, 4096, &threads) ? check_device(c, device) : CLI_USAGE;
    if (*status) return NULL;
    fg_backend *b = device ? fg_backend_open(device, (int)threads) : open_best((int)threads);
    if (b && !fg_backend_status(b)) return b;
    *status = cli_fail(c, CLI_DEVICE, "%s: %s", device ? device : "cpu",
                       b ? fg_backend_message(b) : "out of memory");
    fg_backend_close(b);
    return NULL;
}

/* Every parameter of g must be in the weights, in its shape. */
static int check_weights(const cli *c, const cli_model *m, const fg_store *s, const fg_graph *g)
{
    fg_param_info p;
    fg_store_entry e;
    char a[128], b[128];
    for (int i = 0; fg_param_at(g, i, &p); i++) {
        if (!fg_store_find(s, p.name, &e))
            return cli_fail(c, CLI_FILE, "%s has no %s, which the model needs", m->weights, p.name);
        if (!fg_shape_equal(e.shape, p.shape))
            return cli_fail(c, CLI_FILE, "%s: %s is %s in the file and %s in the model", m->weights,
                            p.name, cli_shape(a, e.shape), cli_shape(b, p.shape));
    }
    return CLI_OK;
}

fg_store *cli_store(const cli *c, const cli_model *m, fg_backend *b, const fg_graph *g, int *status)
{
    fg_store *s = fg_store_new(b);
    fg_status e = s ? FG_OK : FG_ERR_MEMORY;
    const char *precision = cli_text(c, OPT_precision);
    cli_precision(c, s, b);
    *status = CLI_OK;
    if (precision && precision[0] == 'b' && !strcmp(fg_backend_name(b), "cpu"))
        *status = cli_fail(c, CLI_USAGE, "the cpu computes in f32; bf16 needs a CUDA device");
    if (*status) { fg_store_free(s); return NULL; }
    if (!e && m->weights) e = fg_store_load(s, m->weights, "");
    if (!e && m->weights) *status = check_weights(c, m, s, g);
    if (!e && !*status) e = fg_store_init(s, g, (uint64_t)m->recipe.seed);
    if (e) *status = cli_fail(c, cli_exit_of(e), "%s", s ? fg_store_message(s) : "out of memory");
    if (!*status) return s;
    fg_store_free(s);
    return NULL;
}
