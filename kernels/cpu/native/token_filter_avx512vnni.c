#define NYBBLE_LEVEL(name) name##_avx512vnni
#include "token_filter.inc"
