#define NYBBLE_LEVEL(name) name##_portable
#include "activations.inc"
