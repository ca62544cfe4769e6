// v = x Aᵀ on AMX tiles. Included by low_rank_amx.cpp.
#pragma once

#include "low_rank_amx_factors.h"

namespace lora_kernels::amx {
namespace {

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
    case 1:
      interleave_rows<1>(x, m, begin, length, xt);
      break;
    case 2:
      interleave_rows<2>(x, m, begin, length, xt);
      break;
    case 4:
      interleave_rows<4>(x, m, begin, length, xt);
      break;
    case 8:
      interleave_rows<8>(x, m, begin, length, xt);
      break;
    default:
      interleave_rows<16>(x, m, begin, length, xt);
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
    tiles::zero<0>();
    for (int k = 0; k < padded; k += DEPTH) {
      tiles::load<4>(xt + k * cols, bytes);
      if (PARTS == 1 && k + DEPTH <= length) {
        tiles::load<1>(a + k, A.rank_stride * 2);
        tiles::dot<0, 1, 4>();
        continue;
      }
      copy_tile<PARTS>(a + k, A.rank_stride, ranks, length - k, tile);
      tiles::load<1>(tile, 64);
      tiles::dot<0, 1, 4>();
      if (PARTS > 1) {
        tiles::load<2>(tile + TILE, 64);
        tiles::dot<0, 2, 4>();
        tiles::load<3>(tile + 2 * TILE, 64);
        tiles::dot<0, 3, 4>();
      }
    }
    tiles::store<0>(c, bytes);
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
  bf16* at = (bf16*)scratch;                  // [steps][PARTS] tiles
  bf16* copy = at + 3 * kPart * 16;           // [BLOCK, padded]
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
      tiles::zero<0>();
      tiles::zero<1>();
      tiles::zero<2>();
      tiles::zero<3>();
      for (int s = 0; s < steps; ++s) {
        const bf16* tile = at + s * PARTS * TILE;
        const bf16* q = p + s * DEPTH;
        for (int part = 0; part < PARTS; ++part) {
          tiles::load<4>(tile + part * TILE, 64);
          tiles::load<5>(q, stride * 2);
          tiles::dot<0, 5, 4>();
          if (blocks > 1) {
            tiles::load<6>(q + 16 * stride, stride * 2);
            tiles::dot<1, 6, 4>();
          }
          if (blocks > 2) {
            tiles::load<7>(q + 32 * stride, stride * 2);
            tiles::dot<2, 7, 4>();
          }
          if (blocks > 3) {
            tiles::load<5>(q + 48 * stride, stride * 2);
            tiles::dot<3, 5, 4>();
          }
        }
      }
      tiles::store<0>(c, 64);
      tiles::store<1>(c + 256, 64);
      tiles::store<2>(c + 512, 64);
      tiles::store<3>(c + 768, 64);
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

}  // namespace
}  // namespace lora_kernels::amx
