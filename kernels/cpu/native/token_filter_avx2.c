#define NYBBLE_LEVEL(name) name##_avx2
#include "token_filter.inc"
