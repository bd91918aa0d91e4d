/* What the library was built from, so that the loader notices one that is older than the sources beside it. */

#include "nybble_cpu.h"

const char *nybble_sources_digest(void) { return NYBBLE_SOURCES_DIGEST; }
