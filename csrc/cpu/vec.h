// Vectors of LK_WIDTH floats, from compiler vector types: one source for every instruction set.
// Each translation unit that includes this picks its set with a target pragma and defines LK_ISA and LK_WIDTH.
// Nothing here may call a template of the standard library: the linker could then keep a copy that another set can't
// run.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "low_rank.h"

namespace lora_kernels::LK_ISA {
namespace {

constexpr int W = LK_WIDTH;

typedef float vf __attribute__((vector_size(4 * LK_WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * LK_WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * LK_WIDTH)));
typedef uint16_t vh __attribute__((vector_size(2 * LK_WIDTH)));

#define LK_INLINE inline __attribute__((always_inline))
#define LK_LAMBDA __attribute__((always_inline))

// The element type behind a pointer to const.
template <class T>
struct element;
template <class T>
struct element<const T*> {
  typedef T type;
};

LK_INLINE vf broadcast(float s) {
#if LK_WIDTH == 16
  return (vf)_mm512_set1_ps(s);
#elif LK_WIDTH == 8
  return (vf)_mm256_set1_ps(s);
#else
  return s - vf{};  // s + 0 would lose the sign of -0
#endif
}

LK_INLINE vf fma(vf a, vf b, vf c) {
#if LK_WIDTH == 16
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LK_WIDTH == 8
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Scalars. bf16 and fp16 are held as their bits.
LK_INLINE float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

LK_INLINE float to_float(float x) { return x; }
LK_INLINE float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
LK_INLINE float to_float(f16 x) {
#if LK_WIDTH >= 8
  return _cvtsh_ss(x.bits);
#else
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return bits_to_float(sign | ((rest << 13) + 0x38000000));
  float subnormal = float(rest) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
#endif
}

// Compilers take these conversions apart into several instructions.
LK_INLINE vu widened(vh h) {
#if LK_WIDTH == 16
  return (vu)_mm512_cvtepu16_epi32((__m256i)h);
#elif LK_WIDTH == 8
  return (vu)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, vu);
#endif
}
// Half words that are all ones or zero, as words.
LK_INLINE vu load_mask(const uint16_t* p) {
  vh h;
  memcpy(&h, p, sizeof h);
#if LK_WIDTH == 16
  return (vu)_mm512_cvtepi16_epi32((__m256i)h);
#elif LK_WIDTH == 8
  return (vu)_mm256_cvtepi16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, vu) * 0x10001;
#endif
}
LK_INLINE vh narrowed(vu u) {
#if LK_WIDTH == 16
  return (vh)_mm512_cvtepi32_epi16((__m512i)u);
#else
  return __builtin_convertvector(u, vh);
#endif
}

// Asks for what lies `ahead` elements further, which may be past the end of everything.
template <class T>
LK_INLINE void prefetch(const T* p, int64_t ahead) {
  __builtin_prefetch((const void*)((uintptr_t)p + uintptr_t(ahead) * sizeof(T)));
}

// W contiguous elements as floats.
LK_INLINE vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
LK_INLINE vf load(const bf16* p) {
  vh h;
  memcpy(&h, p, sizeof h);
  return (vf)(widened(h) << 16);
}
LK_INLINE vf load(const f16* p) {
#if LK_WIDTH == 16
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif LK_WIDTH == 8
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  float t[W];
  for (int i = 0; i < W; ++i) t[i] = to_float(p[i]);
  return load(t);
#endif
}

// The first n < W elements, zeros after them; reads nothing past them.
template <class T>
LK_INLINE vf load_n(const T* p, int n) {
  T t[W] = {};
  memcpy(t, p, n * sizeof(T));
  return load(t);
}

// Round to nearest even, NaN kept.
LK_INLINE vh to_bf16(vf x) {
#if defined(LK_ROUNDS_BF16)
  return (vh)_mm512_cvtneps_pbh((__m512)x);  // subnormals to zero
#else
  vu u = (vu)x;
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vu nan = (u >> 16) | 0x40;
  vi is_nan = x != x;
  return narrowed((vu)((is_nan & (vi)nan) | (~is_nan & (vi)rounded)));
#endif
}

LK_INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof x); }
LK_INLINE void store(bf16* p, vf x) {
  vh h = to_bf16(x);
  memcpy(p, &h, sizeof h);
}
LK_INLINE void store(f16* p, vf x) {
#if LK_WIDTH == 16
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif LK_WIDTH == 8
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; ++i) {
    uint32_t u;
    float f = x[i];
    memcpy(&u, &f, 4);
    uint32_t sign = (u >> 16) & 0x8000;
    u &= 0x7fffffff;
    uint32_t h;
    if (u > 0x7f800000) {
      h = 0x7e00 | ((u >> 13) & 0x3ff);  // NaN
    } else if (u >= 0x477ff000) {
      h = 0x7c00;  // 65520 and above round to infinity
    } else if (u >= 0x38800000) {
      h = (u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13;
    } else {
      // Adding 0.5 makes the float unit round to a multiple of 2^-24, the subnormal step.
      float shifted = bits_to_float(u) + 0.5f;
      memcpy(&h, &shifted, 4);
      h -= 0x3f000000;
    }
    p[i].bits = uint16_t(sign | h);
  }
#endif
}

template <class T>
LK_INLINE void store_n(T* p, vf x, int n) {
  T t[W];
  store(t, x);
  memcpy(p, t, n * sizeof(T));
}

#if LK_WIDTH == 16
template <>
LK_INLINE vf load_n(const float* p, int n) {
  return (vf)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
template <>
LK_INLINE vf load_n(const bf16* p, int n) {
  __m256i h = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
}
#endif

template <int... I>
struct indices {};
template <int N, int... I>
struct make_indices : make_indices<N - 1, N - 1, I...> {};
template <int... I>
struct make_indices<0, I...> {
  typedef indices<I...> type;
};

// One vector out of the lanes of two.
template <class V, int... I>
LK_INLINE V pick(V a, V b, indices<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, vi{I...});
#endif
}
template <class V, int... I>
LK_INLINE V interleave_low(V a, V b, indices<I...>) {
  return pick(a, b, indices<(I / 2 + (I % 2) * W)...>{});
}
template <class V, int... I>
LK_INLINE V interleave_high(V a, V b, indices<I...>) {
  return pick(a, b, indices<(W / 2 + I / 2 + (I % 2) * W)...>{});
}
template <class V, int... I>
LK_INLINE V evens(V a, V b, indices<I...>) {
  return pick(a, b, indices<(2 * I)...>{});
}
template <class V, int... I>
LK_INLINE V odds(V a, V b, indices<I...>) {
  return pick(a, b, indices<(2 * I + 1)...>{});
}

// Of each group of 2 * HALF lanes of a, then of b, its first half or its second.
template <int HALF, class V, int... I>
LK_INLINE V first_halves(V a, V b, indices<I...>) {
  return pick(a, b, indices<(I / HALF * 2 * HALF + I % HALF)...>{});
}
template <int HALF, class V, int... I>
LK_INLINE V second_halves(V a, V b, indices<I...>) {
  return pick(a, b, indices<(I / HALF * 2 * HALF + I % HALF + HALF)...>{});
}

constexpr int reversed_bits(int i, int n) { return n == 1 ? 0 : i % 2 * n / 2 + reversed_bits(i / 2, n / 2); }

// One level of `reduce_all`, and the levels after it.
template <int HALF, int N, class L>
LK_INLINE vf reduce_level(const vf (&v)[N], L lanes) {
  if constexpr (HALF == 0) {
    return v[0];
  } else if constexpr (N == 1) {
    vf sum[1] = {first_halves<HALF>(v[0], v[0], lanes) + second_halves<HALF>(v[0], v[0], lanes)};
    return reduce_level<HALF / 2>(sum, lanes);
  } else {
    vf sums[N / 2];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i)
      sums[i] = first_halves<HALF>(v[i], v[i + N / 2], lanes) + second_halves<HALF>(v[i], v[i + N / 2], lanes);
    return reduce_level<HALF / 2>(sums, lanes);
  }
}

// The sums of the lanes of N vectors, halves first: of v[reversed_bits(i, N)] in lane i. N a power of two, at most W.
template <int N>
LK_INLINE vf reduce_all(const vf (&v)[N]) {
  return reduce_level<W / 2>(v, typename make_indices<W>::type{});
}

// N rows of W lanes to one run of W * N lanes, lane-major: out[lane * N + row]. N a power of two; N = W transposes.
template <int N, class V>
LK_INLINE void interleave(V (&v)[N]) {
  typename make_indices<W>::type lanes;
#pragma GCC unroll 4
  for (int step = 1; step < N; step *= 2) {
    V t[N];
#pragma GCC unroll 16
    for (int i = 0; i < N / 2; ++i) {
      t[2 * i] = interleave_low(v[i], v[i + N / 2], lanes);
      t[2 * i + 1] = interleave_high(v[i], v[i + N / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) v[i] = t[i];
  }
}

// The inverse: lane-major runs back to N rows.
template <int N, class V>
LK_INLINE void deinterleave(V (&v)[N]) {
  typename make_indices<W>::type lanes;
#pragma GCC unroll 4
  for (int step = 1; step < N; step *= 2) {
    V t[N];
#pragma GCC unroll 16
    for (int i = 0; i < N / 2; ++i) {
      t[i] = evens(v[2 * i], v[2 * i + 1], lanes);
      t[i + N / 2] = odds(v[2 * i], v[2 * i + 1], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) v[i] = t[i];
  }
}

}  // namespace
}  // namespace lora_kernels::LK_ISA
