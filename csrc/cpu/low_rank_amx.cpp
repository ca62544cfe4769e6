// `low_rank` on AMX tiles, for bf16 rows and bf16 or fp32 factors as LoRA stores them; the rest is AVX-512's.
//
// Two forms of each kernel, for few rows and for many, do the same sums in the same order, since a tile's dot product
// does not change when its operands change places:
//   few (at most 16 rows):  the factor is read as it lies and the few rows are interleaved;
//   many:                   the factor is interleaved once and the rows are read as they lie.
// An fp32 value goes in as a sum of bf16 parts: three for a factor of the shrink (all its 24 bits), two in the expand,
// whose result is rounded to bf16's 8.
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

#define LK_ISA amx
#define LK_WIDTH 16
#define LK_TILES
#include "lora_linear_kernels.h"
#include "low_rank_amx_expand.h"
#include "low_rank_amx_linear.h"
#include "low_rank_amx_shrink.h"
#include "quantized_dot_avx512bf16.h"

namespace lora_kernels::avx512 {
extern const TransformKernels transforms;
}
namespace lora_kernels::amx {
extern const LowRankKernels low_rank{"amx",         shrink, expand,          expand_kept,
                                     outer_vectors, drop,   combine,         column_grads,
                                     transpose,     linear, &quantized_dots, &avx512::transforms};
}  // namespace lora_kernels::amx
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
