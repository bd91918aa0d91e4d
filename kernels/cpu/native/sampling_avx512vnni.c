#define NYBBLE_LEVEL(name) name##_avx512vnni
#include "sampling.inc"
