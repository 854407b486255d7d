/* cmd_ops.c - fox-graph ops: the list of ops as text, JSON, or the page docs/ops.md. */
#include <string.h>
#include "cli.h"

static const char *next_op(const void *of, int i)
{
    fg_op_info op;
    (void)of;
    return fg_op_at(i, &op) ? op.name : NULL;
}

/* "x w" as "x, w". */
static void print_names(const char *names)
{
    for (; *names; names++) fputs(*names == ' ' ? ", " : (char[]){ *names, 0 }, stdout);
}

static void print_text(const fg_op_info *op)
{
    printf("%s(", op->name);
    print_names(op->inputs);
    printf(") -> ");
    print_names(op->outputs);
    if (op->attributes[0]) printf("   [%s]", op->attributes);
    printf("%s\n    %s\n", op->differentiable ? "" : "   no gradient", op->formula);
}

/* Formulas hold characters that mean something in a table of Markdown. */
static void print_escaped(const char *text)
{
    for (; *text; text++) fputs(*text == '|' ? "\\|" : (char[]){ *text, 0 }, stdout);
}

static void print_markdown(void)
{
    fg_op_info op;
    printf("# Ops\n\nEvery op of the library: what it reads, what it makes, its attributes and its "
           "formula.\n"
           "A `?` marks an input that may be absent. Made by `fox-graph ops --markdown` from "
           "`ops/ops.def`.\n\n"
           "| op | inputs | outputs | attributes | formula | kernel | definition | gradient |\n"
           "| --- | --- | --- | --- | --- | --- | --- | --- |\n");
    for (int i = 0; fg_op_at(i, &op); i++) {
        printf("| `%s` | ", op.name);
        print_names(op.inputs);
        printf(" | ");
        print_names(op.outputs);
        printf(" | %s | `", op.attributes);
        print_escaped(op.formula);
        printf("` | %s | %s | %s |\n", op.kernel ? "yes" : "", op.definition ? "yes" : "",
               op.differentiable ? "yes" : "");
    }
}

static json_t *words(const char *names)
{
    json_t *list = json_array();
    while (*names) {
        size_t length = strcspn(names, " ");
        json_array_append_new(list, json_stringn(names, length));
        names += length + (names[length] == ' ');
    }
    return list;
}

static json_t *as_json(const fg_op_info *op)
{
    return json_pack("{s:s, s:o, s:o, s:s, s:s, s:b, s:b, s:b}",
                     "name", op->name,
                     "inputs", words(op->inputs),
                     "outputs", words(op->outputs),
                     "attributes", op->attributes,
                     "formula", op->formula,
                     "kernel", (int)op->kernel,
                     "definition", (int)op->definition,
                     "differentiable", (int)op->differentiable);
}

static bool wanted(const cli *c, const char *name)
{
    for (int i = 0; i < c->n_args; i++) if (!strcmp(c->args[i], name)) return true;
    return c->n_args == 0;
}

/* Every OP of the command line is one. */
static int check_names(const cli *c)
{
    for (int i = 0; i < c->n_args; i++) {
        const char *name;
        int k = 0;
        while ((name = next_op(NULL, k)) && strcmp(name, c->args[i])) k++;
        if (name) continue;
        const char *near = cli_nearest(c->args[i], next_op, NULL);
        if (near) return cli_fail(c, CLI_USAGE, "no op '%s', did you mean %s?", c->args[i], near);
        return cli_fail(c, CLI_USAGE, "no op '%s'; fox-graph ops lists them", c->args[i]);
    }
    return CLI_OK;
}

int cmd_ops(const cli *c)
{
    fg_op_info op;
    int status = check_names(c);
    if (status) return status;
    if (cli_has(c, OPT_markdown)) {
        print_markdown();
        return CLI_OK;
    }
    json_t *list = c->json ? json_array() : NULL;
    for (int i = 0; fg_op_at(i, &op); i++) {
        if (!wanted(c, op.name)) continue;
        if (c->json) json_array_append_new(list, as_json(&op));
        else print_text(&op);
    }
    return c->json ? cli_print_json(c, list) : CLI_OK;
}
