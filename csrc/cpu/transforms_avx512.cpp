// `transforms` and `spectral` with AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#endif

#define LK_ISA avx512
#define LK_WIDTH 16
#include "transforms_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
