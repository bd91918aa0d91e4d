#define NYBBLE_LEVEL(name) name##_portable
#include "attention.inc"
