// `low_rank` with AVX-512 (F, BW, VL, DQ).
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
#include "lora_linear_kernels.h"
#include "quantized_kernels.h"

namespace lora_kernels::avx512 {
extern const TransformKernels transforms;
extern const LowRankKernels low_rank{
    "avx512", shrink_vectors, expand_vectors, expand_kept, outer_vectors,      drop,
    combine,  column_grads,   transpose,      nullptr,     &quantized_vectors, &avx512::transforms};
}  // namespace lora_kernels::avx512
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
