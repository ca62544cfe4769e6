// Factors of `low_rank` as AMX tiles: an fp32 value goes in as a sum of bf16 parts. Included by low_rank_amx.cpp.
#pragma once

#include "low_rank_kernels.h"
#include "tiles.h"

namespace lora_kernels::amx {
namespace {

constexpr int DEPTH = 32;  // k of one tile
constexpr int TILE = 512;  // bf16 elements of one tile

LK_INLINE vf widen_bf16(__m256i h) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16); }
LK_INLINE __m256i round_bf16(vf x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }

LK_INLINE __m512i load_pairs(const bf16* p, int count) {
  if (count >= DEPTH) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi16(count <= 0 ? 0 : __mmask32((1ull << count) - 1), p);
}

// 32 elements of a factor row as PARTS vectors of bf16, zeros past `count`.
template <int PARTS>
LK_INLINE void load_parts(const bf16* p, int count, __m512i (&out)[PARTS]) {
  out[0] = load_pairs(p, count);
}
// Picks the bf16 a float is cut to, out of two vectors.
LK_INLINE __m512i high_halves() {
  return _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19,
                          17, 15, 13, 11, 9, 7, 5, 3, 1);
}

// An fp32 value is cut, not rounded, so that three parts hold all its bits; a part of an infinity would be a NaN.
template <int PARTS>
LK_INLINE void cut(vf low, vf high, __m512i (&out)[PARTS]) {
#pragma GCC unroll 3
  for (int i = 0; i < PARTS; ++i) {
    out[i] = _mm512_permutex2var_epi16((__m512i)low, high_halves(), (__m512i)high);
    low -= (vf)((vu)low & 0xffff0000);
    high -= (vf)((vu)high & 0xffff0000);
  }
}
template <int PARTS>
LK_INLINE void load_parts(const float* p, int count, __m512i (&out)[PARTS]) {
  vf low = count >= W ? load(p) : load_n(p, count < 0 ? 0 : count);
  vf high = count >= DEPTH ? load(p + W) : count > W ? load_n(p + W, count - W) : vf{};
  cut(low, high, out);
}

// 16 elements of each of two rows, zeros past `count`; no second row where `rows` is 1.
template <int PARTS>
LK_INLINE void load_two(const bf16* p, int64_t stride, int rows, int count, __m512i (&out)[PARTS]) {
  if (count == 16 && stride == 16 && rows > 1) {
    out[0] = _mm512_loadu_si512(p);
    return;
  }
  __mmask16 mask = __mmask16((1u << count) - 1);
  __m256i second = rows > 1 ? _mm256_maskz_loadu_epi16(mask, p + stride) : _mm256_setzero_si256();
  out[0] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi16(mask, p)), second, 1);
}
template <int PARTS>
LK_INLINE void load_two(const float* p, int64_t stride, int rows, int count, __m512i (&out)[PARTS]) {
  cut(load_n(p, count), rows > 1 ? load_n(p + stride, count) : vf{}, out);
}

// Rows [0, 16) x 32 of a factor, zeros past `rows` and `count`, to PARTS tiles TILE apart: as they lie ...
template <int PARTS, class T>
LK_INLINE void copy_tile(const T* p, int64_t stride, int rows, int count, bf16* out) {
  auto copy = [&](int i, int columns) LK_LAMBDA {
    __m512i v[PARTS];
    load_parts(p + i * stride, columns, v);
#pragma GCC unroll 3
    for (int part = 0; part < PARTS; ++part) _mm512_store_si512(out + part * TILE + i * DEPTH, v[part]);
  };
  if (rows == 16 && count >= DEPTH) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) copy(i, DEPTH);
    return;
  }
  for (int i = 0; i < rows; ++i) copy(i, count);
  for (int part = 0; part < PARTS; ++part) memset(out + part * TILE + rows * DEPTH, 0, (16 - rows) * 64);
}

// ... or interleaved, as the second operand of a dot product wants them.
template <int PARTS, class T>
LK_INLINE void interleave_tile(const T* p, int64_t stride, int rows, int count, bf16* out) {
  vi v[PARTS][16];
  for (int i = 0; i < 16; ++i) {
    __m512i part[PARTS] = {};
    if (i < rows) load_parts(p + i * stride, count, part);
#pragma GCC unroll 3
    for (int k = 0; k < PARTS; ++k) v[k][i] = (vi)part[k];
  }
#pragma GCC unroll 3
  for (int k = 0; k < PARTS; ++k) {
    interleave(v[k]);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(out + k * TILE + i * DEPTH, (__m512i)v[k][i]);
  }
}

// 32 rows x 16 of a factor interleaved, the even and the odd rows in tiles of their own of which half is used.
template <int PARTS, class T>
LK_INLINE void interleave_two_tiles(const T* p, int64_t stride, int rows, int count, bf16* even, bf16* odd) {
  vi v[PARTS][16];
  for (int i = 0; i < 16; ++i) {
    __m512i part[PARTS] = {};
    if (2 * i < rows) load_two(p + 2 * i * stride, stride, rows - 2 * i, count, part);
#pragma GCC unroll 3
    for (int k = 0; k < PARTS; ++k) v[k][i] = (vi)part[k];
  }
#pragma GCC unroll 3
  for (int k = 0; k < PARTS; ++k) {
    interleave(v[k]);
    for (int i = 0; i < 8; ++i) {
      _mm512_store_si512(even + k * TILE + i * DEPTH, (__m512i)v[k][i]);
      _mm512_store_si512(odd + k * TILE + i * DEPTH, (__m512i)v[k][i + 8]);
    }
  }
}

template <int N>
struct number {
  static constexpr int value = N;
};

template <class T>
constexpr int parts(int of_float) {
  return sizeof(T) == 4 ? of_float : 1;
}

LK_INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }

LK_INLINE int power_of_two(int m) {
  int p = 1;
  while (p < m) p *= 2;
  return p;
}

}  // namespace
}  // namespace lora_kernels::amx
