#define NYBBLE_LEVEL(name) name##_portable
#include "token_filter.inc"
