// `transforms` and `spectral` with AVX2.
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define LK_ISA avx2
#define LK_WIDTH 8
#include "transforms_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
