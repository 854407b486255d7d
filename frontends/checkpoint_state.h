/* checkpoint_state.h - state.json of a checkpoint. */
#ifndef FG_CHECKPOINT_STATE_H
#define FG_CHECKPOINT_STATE_H
#include "fox_train.h"

/* Whether the counters agree with each other. */
fg_status fg__state_check(const fg_train_state *t, const char *path, char message[400]);
/* optimizer: whether the checkpoint has moments. */
fg_status fg__state_write(const char *path, const fg_train_state *t, bool optimizer,
                          char message[400]);
fg_status fg__state_read(const char *path, fg_train_state *t, bool *optimizer, char message[400]);

#endif
