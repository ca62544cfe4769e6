// Fragments of tensor-core products: how rows of global memory become operands, and products at fp32's precision.
//
// A product sums over k in any order, so a lane takes eight neighbours of its row at once, in 16-byte loads, and gives
// them to the instruction in the places that its fragment layout calls others, the same ones for both operands.
#pragma once

#include "device.cuh"

namespace lora_kernels {

// Eight neighbours of a row.
template <class T>
struct alignas(16) Eight {
  T value[8];

  // Two of 16 bits, as a register.
  __device__ __forceinline__ uint32_t pair(int i) const {
    uint32_t bits;
    memcpy(&bits, value + 2 * i, 4);
    return bits;
  }
};

// The elements of a row from `at` on, in 16-byte loads.
template <class T>
__device__ __forceinline__ Eight<T> load_eight(const T* at) {
  uint4 words[sizeof(T) / 2];
  for (int i = 0; i < int(sizeof(T) / 2); ++i) words[i] = __ldg(reinterpret_cast<const uint4*>(at) + i);
  Eight<T> out;
  memcpy(&out, words, sizeof out);
  return out;
}

// Those of any stride, of which `live` count and are read; others are 0.
template <class T>
__device__ __forceinline__ Eight<T> load_eight(const T* at, int64_t stride, int live) {
  Eight<T> out;
  for (int i = 0; i < 8; ++i) out.value[i] = i < live ? at[i * stride] : rounded<T>(0.f);
  return out;
}

// Each v as two tf32 numbers: what is lost is below fp32's own rounding.
template <int N>
__device__ __forceinline__ void split(const float (&v)[N], uint32_t (&high)[N], uint32_t (&low)[N]) {
  for (int i = 0; i < N; ++i) {
    float h = nearest_tf32(v[i]);
    high[i] = __float_as_uint(h);
    low[i] = __float_as_uint(fabsf(v[i]) < INFINITY ? nearest_tf32(v[i] - h) : 0.f);
  }
}

// acc [16, 8] += a [16, 8] b [8, 8] at fp32's precision. An infinite operand may give NaN, 0 or its opposite times the
// part of the other that is low.
__device__ __forceinline__ void mma_fp32(float (&acc)[4], const uint32_t (&a_high)[4], const uint32_t (&a_low)[4],
                                         const float (&b)[2]) {
  uint32_t b_high[2], b_low[2];
  split(b, b_high, b_low);
  mma_tf32(acc, a_low, b_high);
  mma_tf32(acc, a_high, b_low);
  mma_tf32(acc, a_high, b_high);
}

__device__ __forceinline__ void mma_16(bf16, float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_bf16(acc, a, b);
}
__device__ __forceinline__ void mma_16(f16, float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_f16(acc, a, b);
}

// acc[i] [16, 8] += the product over 32 neighbours in k, of which a lane holds eight: of rows g and g + 8 of a, and of
// row g of b[i], for i below `count`. Both of one 16-bit type, or a in fp32 and the product at fp32's precision.
template <class T, class X, int N, int M>
__device__ __forceinline__ void multiply(float (&acc)[M][4], const Eight<T>& a, const Eight<T>& a8,
                                         const Eight<X> (&b)[N], int count) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      uint32_t left[4] = {a.pair(j), a8.pair(j), a.pair(j + 1), a8.pair(j + 1)};
#pragma unroll
      for (int i = 0; i < N; ++i) {
        uint32_t right[2] = {b[i].pair(j), b[i].pair(j + 1)};
        if (i < count) mma_16(T{}, acc[i], left, right);
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      float left[4] = {a.value[j], a8.value[j], a.value[j + 1], a8.value[j + 1]};
      uint32_t high[4], low[4];
      split(left, high, low);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float right[2] = {to_float(b[i].value[j]), to_float(b[i].value[j + 1])};
        if (i >= count) continue;
        if constexpr (sizeof(X) == 4) {
          mma_fp32(acc[i], high, low, right);
        } else {  // which tf32 holds exactly
          uint32_t exact[2] = {__float_as_uint(right[0]), __float_as_uint(right[1])};
          mma_tf32(acc[i], low, exact);
          mma_tf32(acc[i], high, exact);
        }
      }
    }
  }
}

// Fragments of v, fp32 in shared memory, that meet 32 bytes of a row of B: of 16 ranks where T has 16 bits, else of 8.
// multiply: acc [16, 8] += a v. PARTS: how many bf16 numbers v is taken apart into where T is bf16, 8 bits each.
template <class T, int PARTS>
struct OfRanks;

template <int PARTS>
struct OfRanks<bf16, PARTS> {
  uint32_t parts[PARTS][2];

  __device__ __forceinline__ OfRanks(const float* v, int t) {
    for (int half = 0; half < 2; ++half) {
      float rest[2] = {v[8 * half + 2 * t], v[8 * half + 2 * t + 1]};
      for (int i = 0; i < PARTS; ++i) {
        bf16 pair[2] = {rounded<bf16>(rest[0]), rounded<bf16>(rest[1])};
        memcpy(&parts[i][half], pair, 4);
        for (int j = 0; j < 2; ++j) rest[j] = fabsf(rest[j]) < INFINITY ? rest[j] - to_float(pair[j]) : 0.f;
      }
    }
  }
  __device__ __forceinline__ void multiply(float (&acc)[4], const uint32_t (&a)[4]) const {
    for (int i = PARTS - 1; i >= 0; --i) mma_bf16(acc, a, parts[i]);
  }
};

// As tf32, which holds an fp16 number exactly: of a register's two, one is k = t to the instruction, one k = t + 4.
template <int PARTS>
struct OfRanks<f16, PARTS> {
  float v[4];

  __device__ __forceinline__ OfRanks(const float* from, int t)
      : v{from[2 * t], from[2 * t + 1], from[8 + 2 * t], from[9 + 2 * t]} {}
  __device__ __forceinline__ void multiply(float (&acc)[4], const uint32_t (&a)[4]) const {
    for (int half = 0; half < 2; ++half) {
      f16 row[2], row8[2];
      memcpy(row, &a[2 * half], 4);
      memcpy(row8, &a[2 * half + 1], 4);
      uint32_t left[4] = {__float_as_uint(to_float(row[0])), __float_as_uint(to_float(row8[0])),
                          __float_as_uint(to_float(row[1])), __float_as_uint(to_float(row8[1]))};
      float pair[2] = {v[2 * half], v[2 * half + 1]};
      uint32_t high[2], low[2];
      split(pair, high, low);
      mma_tf32(acc, left, low);
      mma_tf32(acc, left, high);
    }
  }
};

template <int PARTS>
struct OfRanks<float, PARTS> {
  float v[2];

  __device__ __forceinline__ OfRanks(const float* from, int t) : v{from[t], from[t + 4]} {}
  __device__ __forceinline__ void multiply(float (&acc)[4], const uint32_t (&a)[4]) const {
    float left[4];
    memcpy(left, a, sizeof left);
    uint32_t high[4], low[4];
    split(left, high, low);
    mma_fp32(acc, high, low, v);
  }
};

}  // namespace lora_kernels
