// `low_rank` with AVX-512 and its bf16 instructions, for rounding; its sums are those of AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")
#endif

#define LK_ISA avx512bf16
#define LK_WIDTH 16
#define LK_ROUNDS_BF16
#include "lora_linear_kernels.h"
#include "quantized_dot_avx512bf16.h"

namespace lora_kernels::avx512 {
extern const TransformKernels transforms;
}
namespace lora_kernels::avx512bf16 {
extern const LowRankKernels low_rank{"avx512bf16",  shrink_vectors, expand_vectors,  expand_kept,
                                     outer_vectors, drop,           combine,         column_grads,
                                     transpose,     nullptr,        &quantized_dots, &avx512::transforms};
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
