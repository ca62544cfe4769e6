// `low_rank` on AMX tiles, for bf16 rows and bf16 or fp32 factors as LoRA stores them; the rest is AVX-512's.
//
// Two forms of each kernel, for few rows and for many, do the same sums in the same order, since a tile's dot product
// does not change when its operands change places:
//   few (at most 16 rows):  the factor is read as it lies and the few rows are interleaved;
//   many:                   the factor is interleaved once and the rows are read as they lie.
// An fp32 value goes in as a sum of bf16 parts: three for a factor of the shrink (all its 24 bits), two in the expand,
// whose result is rounded to bf16's 8.
#if defined(__x86_64__)
#include <stdint.h>
#include <string.h>

#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")
#endif

#define LK_ISA amx
#define LK_WIDTH 16
#include "low_rank_kernels.h"
#include "tiles.h"

namespace lora_kernels::amx {
namespace {

constexpr int DEPTH = 32;  // k of one tile
constexpr int TILE = 512;  // bf16 elements of one tile

LK_INLINE vf widen_bf16(__m256i h) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16); }
LK_INLINE __m256i round_bf16(vf x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }

// x as a sum of PARTS bf16 values, the largest first; an infinity is all in the first.
template <int PARTS>
LK_INLINE void split(vf x, __m256i (&part)[PARTS]) {
#pragma GCC unroll 3
  for (int i = 0; i < PARTS; ++i) {
    part[i] = round_bf16(x);
    __mmask16 finite = __mmask16(~_mm512_fpclass_ps_mask((__m512)widen_bf16(part[i]), 0x18));
    x = (vf)_mm512_maskz_sub_ps(finite, (__m512)x, (__m512)widen_bf16(part[i]));
  }
}

LK_INLINE __m512i load_pairs(const bf16* p, int count) {
  if (count >= DEPTH) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi16(count <= 0 ? 0 : __mmask32((1ull << count) - 1), p);
}

// 32 elements of a factor row as PARTS vectors of bf16, zeros past `count`.
template <int PARTS>
LK_INLINE void load_parts(const bf16* p, int count, __m512i (&out)[PARTS]) {
  out[0] = load_pairs(p, count);
}
template <int PARTS>
LK_INLINE void load_parts(const float* p, int count, __m512i (&out)[PARTS]) {
  vf low = count >= W ? load(p) : load_n(p, count < 0 ? 0 : count);
  vf high = count >= DEPTH ? load(p + W) : count > W ? load_n(p + W, count - W) : vf{};
  __m256i l[PARTS], h[PARTS];
  split(low, l);
  split(high, h);
#pragma GCC unroll 3
  for (int i = 0; i < PARTS; ++i) out[i] = _mm512_inserti64x4(_mm512_castsi256_si512(l[i]), h[i], 1);
}

// Rows [0, 16) x 32 of a factor, zeros past `rows` and `count`, to PARTS tiles TILE apart: as they lie ...
template <int PARTS, class T>
LK_INLINE void copy_tile(const T* p, int64_t stride, int rows, int count, bf16* out) {
  for (int i = 0; i < 16; ++i) {
    __m512i v[PARTS] = {};
    if (i < rows) load_parts(p + i * stride, count, v);
#pragma GCC unroll 3
    for (int part = 0; part < PARTS; ++part) _mm512_store_si512(out + part * TILE + i * DEPTH, v[part]);
  }
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

// COLS rows of x, interleaved: x[row][k] to out[(k / 2) * COLS * 2 + row * 2 + k % 2]; zeros past m and length.
template <int COLS>
LK_INLINE void interleave_rows(const Rows& x, int m, int64_t begin, int length, bf16* out) {
  const bf16* rows[COLS];
  for (int i = 0; i < m; ++i) rows[i] = row_of<bf16>(x, i) + begin;
  for (int k = 0; k < length; k += DEPTH) {
    vi v[COLS];
#pragma GCC unroll 16
    for (int i = 0; i < COLS; ++i) v[i] = i < m ? (vi)load_pairs(rows[i] + k, length - k) : vi{};
    interleave(v);
#pragma GCC unroll 16
    for (int i = 0; i < COLS; ++i) _mm512_store_si512(out + k * COLS + i * DEPTH, (__m512i)v[i]);
  }
}

LK_INLINE void add_or_set(float* p, float value, bool add) { *p = add ? *p + value : value; }

// vᵀ = A xᵀ for at most 16 rows.
template <class T>
void shrink_few(const Rows& x, int m, const Factor& A, int64_t begin, int64_t end, bool add, float* v, int64_t v_stride,
                char* scratch) {
  constexpr int PARTS = parts<T>(3);
  int length = int(end - begin), cols = power_of_two(m), padded = round_up(length, DEPTH);
  bf16* xt = (bf16*)scratch;
  bf16* tile = xt + kPart * 16;
  float* c = (float*)(tile + 3 * TILE);
  switch (cols) {
    case 1: interleave_rows<1>(x, m, begin, length, xt); break;
    case 2: interleave_rows<2>(x, m, begin, length, xt); break;
    case 4: interleave_rows<4>(x, m, begin, length, xt); break;
    case 8: interleave_rows<8>(x, m, begin, length, xt); break;
    default: interleave_rows<16>(x, m, begin, length, xt);
  }
  int64_t bytes = 4 * cols;
  int configured = 0;
  for (int j = 0; j < A.rank; j += 16) {
    int ranks = A.rank - j < 16 ? A.rank - j : 16;
    if (ranks != configured) {
      tiles::Config config;
      config.set(0, ranks, int(bytes));
      for (int t = 1; t < 4; ++t) config.set(t, ranks, 64);
      for (int t = 4; t < 6; ++t) config.set(t, 16, int(bytes));
      config.load();
      configured = ranks;
    }
    const T* a = (const T*)A.data + j * A.rank_stride + begin;
    LK_TILE_ZERO(0);
    for (int k = 0; k < padded; k += DEPTH) {
      LK_TILE_LOAD(4, xt + k * cols, bytes);
      if (PARTS == 1 && k + DEPTH <= length) {
        LK_TILE_LOAD(1, a + k, A.rank_stride * 2);
        LK_TILE_DOT(0, 1, 4);
        continue;
      }
      copy_tile<PARTS>(a + k, A.rank_stride, ranks, length - k, tile);
      LK_TILE_LOAD(1, tile, 64);
      LK_TILE_DOT(0, 1, 4);
      if (PARTS > 1) {
        LK_TILE_LOAD(2, tile + TILE, 64);
        LK_TILE_DOT(0, 2, 4);
        LK_TILE_LOAD(3, tile + 2 * TILE, 64);
        LK_TILE_DOT(0, 3, 4);
      }
    }
    LK_TILE_STORE(0, c, bytes);
    for (int r = 0; r < ranks; ++r)
      for (int i = 0; i < m; ++i) add_or_set(v + i * v_stride + j + r, c[r * cols + i], add);
  }
}

LK_INLINE bool evenly_spaced(const Rows& x, int first, int count) {
  if (!x.index) return true;
  for (int i = 1; i < count; ++i)
    if (x.row(first + i) != x.row(first) + i) return false;
  return true;
}

// v = x Aᵀ for many rows: 64 at a time against 16 ranks.
template <class T>
void shrink_many(const Rows& x, int m, const Factor& A, int64_t begin, int64_t end, bool add, float* v,
                 int64_t v_stride, char* scratch) {
  constexpr int PARTS = parts<T>(3), BLOCK = 64;
  int length = int(end - begin), padded = round_up(length, DEPTH), steps = padded / DEPTH;
  bf16* at = (bf16*)scratch;                // [steps][PARTS] tiles
  bf16* copy = at + 3 * kPart * 16;         // [BLOCK, padded]
  float* c = (float*)(copy + BLOCK * kPart);  // [BLOCK, 16]
  tiles::Config config;
  for (int t = 0; t < 8; ++t) config.set(t, 16, 64);
  config.load();
  for (int j = 0; j < A.rank; j += 16) {
    int ranks = A.rank - j < 16 ? A.rank - j : 16;
    const T* a = (const T*)A.data + j * A.rank_stride + begin;
    for (int s = 0; s < steps; ++s)
      interleave_tile<PARTS>(a + s * DEPTH, A.rank_stride, ranks, length - s * DEPTH, at + s * PARTS * TILE);
    for (int i = 0; i < m; i += BLOCK) {
      int rows = m - i < BLOCK ? m - i : BLOCK;
      const bf16* p = row_of<bf16>(x, i) + begin;
      int64_t stride = x.stride;
      if (rows < BLOCK || padded != length || !evenly_spaced(x, i, rows)) {
        for (int k = 0; k < round_up(rows, 16); ++k) {
          bf16* to = copy + k * padded;
          if (k < rows) {
            memcpy(to, row_of<bf16>(x, i + k) + begin, length * 2);
            memset(to + length, 0, (padded - length) * 2);
          } else {
            memset(to, 0, padded * 2);
          }
        }
        p = copy;
        stride = padded;
      }
      int blocks = (rows + 15) / 16;
      LK_TILE_ZERO(0);
      LK_TILE_ZERO(1);
      LK_TILE_ZERO(2);
      LK_TILE_ZERO(3);
      for (int s = 0; s < steps; ++s) {
        const bf16* tile = at + s * PARTS * TILE;
        const bf16* q = p + s * DEPTH;
        for (int part = 0; part < PARTS; ++part) {
          LK_TILE_LOAD(4, tile + part * TILE, 64);
          LK_TILE_LOAD(5, q, stride * 2);
          LK_TILE_DOT(0, 5, 4);
          if (blocks > 1) {
            LK_TILE_LOAD(6, q + 16 * stride, stride * 2);
            LK_TILE_DOT(1, 6, 4);
          }
          if (blocks > 2) {
            LK_TILE_LOAD(7, q + 32 * stride, stride * 2);
            LK_TILE_DOT(2, 7, 4);
          }
          if (blocks > 3) {
            LK_TILE_LOAD(5, q + 48 * stride, stride * 2);
            LK_TILE_DOT(3, 5, 4);
          }
        }
      }
      LK_TILE_STORE(0, c, 64);
      LK_TILE_STORE(1, c + 256, 64);
      LK_TILE_STORE(2, c + 512, 64);
      LK_TILE_STORE(3, c + 768, 64);
      __mmask16 live = __mmask16((1u << ranks) - 1);
      for (int k = 0; k < rows; ++k) {
        float* out = v + (i + k) * v_stride + j;
        __m512 sum = _mm512_load_ps(c + k * 16);
        if (add) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(live, out), sum);
        _mm512_mask_storeu_ps(out, live, sum);
      }
    }
  }
}

void shrink(const Rows& x, int m, const Factor& A, int64_t begin, int64_t end, bool add, float* v, int64_t v_stride,
            void* scratch) {
  if (x.dtype != DType::bf16 || A.stride != 1 || A.dtype == DType::f16) {
    shrink_vectors(x, m, A, begin, end, add, v, v_stride, scratch);
    return;
  }
  bool few = m <= 16;
  if (A.dtype == DType::bf16)
    (few ? shrink_few<bf16> : shrink_many<bf16>)(x, m, A, begin, end, add, v, v_stride, (char*)scratch);
  else
    (few ? shrink_few<float> : shrink_many<float>)(x, m, A, begin, end, add, v, v_stride, (char*)scratch);
  tiles::release();
}

// y[0:16) += sum, rounded once, of which `live` columns exist.
LK_INLINE void add_to(bf16* y, vf sum, int live) {
  __mmask16 mask = __mmask16((1u << live) - 1);
  vf before = widen_bf16(_mm256_maskz_loadu_epi16(mask, y));
  _mm256_mask_storeu_epi16(y, mask, round_bf16(before + sum));
}

// c[n][COLS] for 16 n, transposed onto the rows of y.
template <int COLS>
LK_INLINE void add_columns(const float* c, bf16* const* y, int m, int64_t n, int live) {
  vf v[COLS];
#pragma GCC unroll 16
  for (int i = 0; i < COLS; ++i) v[i] = load(c + i * 16);
  deinterleave(v);
#pragma GCC unroll 16
  for (int i = 0; i < COLS; ++i)
    if (i < m) add_to(y[i] + n, v[i], live);
}

// yᵀ += B vᵀ for at most 16 rows: 16 columns of y at a time.
template <int COLS, class T>
LK_INLINE void expand_few(const Rows& y, int m, const float* v, int64_t v_stride, const Factor& B, int64_t begin,
                          int64_t end, char* scratch) {
  constexpr int PARTS = parts<T>(2);
  int steps = (B.rank + DEPTH - 1) / DEPTH;
  int pairs = steps > 1 ? 16 : (B.rank + 1) / 2;
  bf16* vt = (bf16*)scratch;                    // [steps][2 parts][16 pairs][COLS][2]
  bf16* tile = vt + 2 * kMaxRank * 16;          // [4 columns of tiles][2 parts]
  float* c = (float*)(tile + 8 * TILE);         // [4][16, COLS]
  for (int s = 0; s < steps; ++s) {
    vi part[2][COLS];
    for (int i = 0; i < COLS; ++i) {
      __m512i halves[2] = {};
      if (i < m) load_parts(v + i * v_stride + s * DEPTH, B.rank - s * DEPTH, halves);
      part[0][i] = (vi)halves[0];
      part[1][i] = (vi)halves[1];
    }
    for (int k = 0; k < 2; ++k) {
      interleave(part[k]);
      for (int i = 0; i < COLS; ++i)
        _mm512_store_si512(vt + ((s * 2 + k) * COLS + i) * DEPTH, (__m512i)part[k][i]);
    }
  }
  bf16* rows[COLS];
  for (int i = 0; i < m; ++i) rows[i] = (bf16*)row_of<bf16>(y, i);
  tiles::Config config;
  for (int t = 0; t < 4; ++t) config.set(t, 16, 4 * COLS);
  for (int t = 4; t < 6; ++t) config.set(t, 16, 4 * pairs);
  for (int t = 6; t < 8; ++t) config.set(t, pairs, 4 * COLS);
  config.load();
  bool whole = PARTS == 1 && B.rank % 2 == 0;
  if (steps == 1) {
    LK_TILE_LOAD(6, vt, 4 * COLS);
    LK_TILE_LOAD(7, vt + COLS * DEPTH, 4 * COLS);
  }
  for (int64_t n = begin; n < end; n += 16) {
    int live = end - n < 16 ? int(end - n) : 16;
    LK_TILE_ZERO(0);
    for (int s = 0; s < steps; ++s) {
      const T* b = (const T*)B.data + n * B.stride + s * DEPTH;
      int depth = B.rank - s * DEPTH;
      if (steps > 1) {
        LK_TILE_LOAD(6, vt + 2 * s * COLS * DEPTH, 4 * COLS);
        LK_TILE_LOAD(7, vt + (2 * s + 1) * COLS * DEPTH, 4 * COLS);
      }
      if (whole && live == 16 && (steps == 1 || depth >= DEPTH)) {
        LK_TILE_LOAD(4, b, B.stride * 2);
      } else {
        copy_tile<PARTS>(b, B.stride, live, depth, tile);
        LK_TILE_LOAD(4, tile, 64);
      }
      LK_TILE_DOT(0, 4, 6);
      LK_TILE_DOT(0, 4, 7);
      if (PARTS > 1) {
        LK_TILE_LOAD(5, tile + TILE, 64);
        LK_TILE_DOT(0, 5, 6);
      }
    }
    LK_TILE_STORE(0, c, 4 * COLS);
    add_columns<COLS>(c, rows, m, n, live);
  }
}

// y += v Bᵀ for many rows: B interleaved once, then 16 rows by 32 columns at a time.
template <class T>
void expand_many(const Rows& y, int m, const float* v, int64_t v_stride, const Factor& B, int64_t begin, int64_t end,
                 char* scratch) {
  constexpr int PARTS = parts<T>(2), COLUMNS = 32;
  int steps = (B.rank + DEPTH - 1) / DEPTH;
  bf16* vt = (bf16*)scratch;                    // [steps][2 parts] tiles of 16 rows
  float* c = (float*)(vt + 2 * kMaxRank * 16);  // [2][16, 32]
  bf16* bt = (bf16*)(c + 2 * 16 * COLUMNS);     // [column of tiles][steps][PARTS] tiles
  int64_t room = (int64_t)(kScratch - ((char*)bt - scratch)) / (steps * PARTS * TILE * 2) * 16 / COLUMNS * COLUMNS;
  tiles::Config config;
  for (int t = 0; t < 8; ++t) config.set(t, 16, 64);
  config.load();
  for (int64_t n0 = begin; n0 < end; n0 += room) {
    int64_t n1 = end - n0 < room ? end : n0 + room;
    for (int64_t n = n0; n < n1; n += 16)
      for (int s = 0; s < steps; ++s)
        interleave_tile<PARTS>((const T*)B.data + n * B.stride + s * DEPTH, B.stride, n1 - n < 16 ? int(n1 - n) : 16,
                               B.rank - s * DEPTH, bt + ((n - n0) / 16 * steps + s) * PARTS * TILE);
    for (int i = 0; i < m; i += 16) {
      int rows = m - i < 16 ? m - i : 16;
      for (int s = 0; s < steps; ++s)
        copy_tile<2>(v + i * v_stride + s * DEPTH, v_stride, rows, B.rank - s * DEPTH, vt + s * 2 * TILE);
      bf16* y_rows[16];
      for (int k = 0; k < rows; ++k) y_rows[k] = (bf16*)row_of<bf16>(y, i + k);
      for (int64_t n = n0; n < n1; n += COLUMNS) {
        const bf16* left = bt + (n - n0) / 16 * steps * PARTS * TILE;
        const bf16* right = n + 16 < n1 ? left + steps * PARTS * TILE : left;
        LK_TILE_ZERO(0);
        LK_TILE_ZERO(1);
        for (int s = 0; s < steps; ++s) {
          LK_TILE_LOAD(2, vt + s * 2 * TILE, 64);
          LK_TILE_LOAD(3, vt + (s * 2 + 1) * TILE, 64);
          LK_TILE_LOAD(4, left + s * PARTS * TILE, 64);
          LK_TILE_LOAD(5, right + s * PARTS * TILE, 64);
          LK_TILE_DOT(0, 2, 4);
          LK_TILE_DOT(1, 2, 5);
          LK_TILE_DOT(0, 3, 4);
          LK_TILE_DOT(1, 3, 5);
          if (PARTS > 1) {
            LK_TILE_LOAD(6, left + (s * PARTS + 1) * TILE, 64);
            LK_TILE_LOAD(7, right + (s * PARTS + 1) * TILE, 64);
            LK_TILE_DOT(0, 2, 6);
            LK_TILE_DOT(1, 2, 7);
          }
        }
        LK_TILE_STORE(0, c, 128);
        LK_TILE_STORE(1, c + 16, 128);
        int live = n1 - n < COLUMNS ? int(n1 - n) : COLUMNS;
        if (live == COLUMNS) {
          for (int k = 0; k < rows; ++k) {
            __m512i before = _mm512_loadu_si512(y_rows[k] + n);
            vf low = widen_bf16(_mm512_castsi512_si256(before)) + load(c + k * 32);
            vf high = widen_bf16(_mm512_extracti64x4_epi64(before, 1)) + load(c + k * 32 + 16);
            _mm512_storeu_si512(y_rows[k] + n, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
          }
        } else {
          for (int k = 0; k < rows; ++k) {
            add_to(y_rows[k] + n, load(c + k * 32), live < 16 ? live : 16);
            if (live > 16) add_to(y_rows[k] + n + 16, load(c + k * 32 + 16), live - 16);
          }
        }
      }
    }
  }
}

template <class T>
void expand_tiles(const Rows& y, int m, const float* v, int64_t v_stride, const Factor& B, int64_t begin, int64_t end,
                  char* scratch) {
  switch (m > 16 ? 0 : power_of_two(m)) {
    case 0: expand_many<T>(y, m, v, v_stride, B, begin, end, scratch); break;
    case 1: expand_few<1, T>(y, m, v, v_stride, B, begin, end, scratch); break;
    case 2: expand_few<2, T>(y, m, v, v_stride, B, begin, end, scratch); break;
    case 4: expand_few<4, T>(y, m, v, v_stride, B, begin, end, scratch); break;
    case 8: expand_few<8, T>(y, m, v, v_stride, B, begin, end, scratch); break;
    default: expand_few<16, T>(y, m, v, v_stride, B, begin, end, scratch);
  }
  tiles::release();
}

void expand(const Rows& y, int m, const float* v, int64_t v_stride, const Factor& B, int64_t begin, int64_t end,
            void* scratch) {
  if (y.dtype != DType::bf16 || B.rank_stride != 1 || B.dtype == DType::f16)
    expand_vectors(y, m, v, v_stride, B, begin, end, scratch);
  else if (B.dtype == DType::bf16)
    expand_tiles<bf16>(y, m, v, v_stride, B, begin, end, (char*)scratch);
  else
    expand_tiles<float>(y, m, v, v_stride, B, begin, end, (char*)scratch);
}

}  // namespace

extern const LowRankKernels low_rank{"amx", shrink, expand, outer_vectors};
}  // namespace lora_kernels::amx
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
