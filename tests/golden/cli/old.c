/* old.c - bears the stamp of another version. */
#include <stdint.h>
extern const uint32_t fg_model_abi;
const uint32_t fg_model_abi = 4711;
int fg_model(void);
int fg_model(void)
{
    return 1;
}
