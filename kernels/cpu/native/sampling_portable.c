#define NYBBLE_LEVEL(name) name##_portable
#include "sampling.inc"
