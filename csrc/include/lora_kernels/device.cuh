// What device code stands on, the same for nvcc and for the host executor (sim/simt.h), which needs no CUDA at all.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
// A block's dynamic shared memory, the only kind device code uses here.
#define LORA_KERNELS_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "sim/simt.h"
#endif

#include "ptx.cuh"

namespace lora_kernels {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(f16 v) { return __half2float(v); }

// The nearest T, ties to even.
template <class T>
__device__ __forceinline__ T rounded(float v);
template <>
__device__ __forceinline__ float rounded<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ bf16 rounded<bf16>(float v) {
  return __float2bfloat16(v);
}
template <>
__device__ __forceinline__ f16 rounded<f16>(float v) {
  return __float2half(v);
}

}  // namespace lora_kernels
