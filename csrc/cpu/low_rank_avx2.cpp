// `low_rank` with AVX2, FMA and F16C.
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
#include "lora_linear_kernels.h"
#include "quantized_kernels.h"

namespace lora_kernels::avx2 {
extern const TransformKernels transforms;
extern const LowRankKernels low_rank{
    "avx2",  shrink_vectors, expand_vectors, expand_kept, outer_vectors,      drop,
    combine, column_grads,   transpose,      nullptr,     &quantized_vectors, &avx2::transforms};
}  // namespace lora_kernels::avx2
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
