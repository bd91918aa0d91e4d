#define NYBBLE_LEVEL(name) name##_portable
#include "rms_norm.inc"
