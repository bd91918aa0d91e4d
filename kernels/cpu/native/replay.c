/* The operation replay: others, one after the other. */

#include "nybble_cpu.h"

int nybble_replay(nybble_pool *pool, const struct nybble_replay *arguments)
{
    for (int64_t i = 0; i < arguments->num_calls; i++) {
        const struct nybble_call call = arguments->calls[i];
        const int status = call.operation(pool, call.arguments);
        if (status != NYBBLE_OK)
            return status;
    }
    return NYBBLE_OK;
}
