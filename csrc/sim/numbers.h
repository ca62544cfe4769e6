// CUDA's small vectors and 16-bit numbers, as the toolkit's headers name them.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }

namespace simt {

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace simt

inline float __uint_as_float(unsigned bits) { return simt::same_bits<float>(bits); }
inline unsigned __float_as_uint(float v) { return simt::same_bits<unsigned>(v); }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }

inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(unsigned(v.bits) << 16); }

// To the nearest, ties to even; every NaN becomes 0x7fff, as on the GPU.
inline __nv_bfloat16 __float2bfloat16(float v) {
  const unsigned u = __float_as_uint(v);
  const unsigned rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return {uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded)};
}

inline float __half2float(__half v) {
  const unsigned magnitude = v.bits & 0x7fff;
  // The exponents' biases differ by 112; the product is exact, of subnormal numbers too.
  const unsigned finite = __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f);
  const unsigned other = magnitude << 13 | 0x7f800000;
  return __uint_as_float((magnitude < 0x7c00 ? finite : other) | unsigned(v.bits & 0x8000) << 16);
}

// To the nearest, ties to even; every NaN becomes 0x7fff, as on the GPU.
inline __half __float2half(float v) {
  const unsigned u = __float_as_uint(v), magnitude = u & 0x7fffffff, sign = u >> 16 & 0x8000;
  if (magnitude > 0x7f800000) return {0x7fff};
  if (magnitude >= 0x47800000) return {uint16_t(sign | 0x7c00)};
  // Added to 0.5, whose last bit is worth as much as a subnormal half's, the number is rounded by the addition.
  if (magnitude < 0x38800000)
    return {uint16_t(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000))};
  return {uint16_t(sign | (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13)};
}

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
