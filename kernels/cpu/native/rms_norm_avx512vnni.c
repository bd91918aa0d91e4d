#define NYBBLE_LEVEL(name) name##_avx512vnni
#include "rms_norm.inc"
