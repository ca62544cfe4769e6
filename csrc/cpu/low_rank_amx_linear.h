// y = x Wᵀ + bias on AMX tiles, for the base layer under the adapters. Included by low_rank_amx.cpp.
//
// Torch's own product reorders W at each call; here few rows meet W as it lies, and for many rows a panel of it is
// interleaved where the tiles want it next. As in the other kernels both forms do the same sums in the same order.
#pragma once

#include "low_rank_amx_shrink.h"

namespace lora_kernels::amx {
namespace {

constexpr int PANEL = 32;  // rows of W, columns of y

// 32 sums of a row and the bias, rounded once.
struct Bias {
  vf low{}, high{};

  LK_INLINE Bias(const bf16* bias, int columns) {
    if (!bias) return;
    __mmask32 mask = columns < PANEL ? __mmask32(0xffff) : __mmask32(-1);
    __m512i v = _mm512_maskz_loadu_epi16(mask, bias);
    low = widen_bf16(_mm512_castsi512_si256(v));
    high = widen_bf16(_mm512_extracti64x4_epi64(v, 1));
  }
  LK_INLINE void store(vf first, vf second, int columns, bf16* out) const {
    __m512i v = (__m512i)_mm512_cvtne2ps_pbh((__m512)(second + high), (__m512)(first + low));
    if (columns == PANEL)
      _mm512_storeu_si512(out, v);
    else
      _mm256_storeu_si256((__m256i*)out, _mm512_castsi512_si256(v));
  }
};

// At most 16 rows: yᵀ = W xᵀ, 32 or 16 rows of W at a time.
template <int COLS>
void linear_few(const Rows& x, int m, const Factor& W, int64_t K, const bf16* bias, const Rows& y, int64_t begin,
                int64_t end, char* scratch) {
  constexpr int BYTES = 4 * COLS;
  bf16* xt = (bf16*)scratch;
  float* c = (float*)(xt + K * COLS);  // [32][COLS]
  interleave_rows<COLS>(x, m, 0, int(K), xt);
  tiles::Config config;
  for (int t = 0; t < 2; ++t) config.set(t, 16, BYTES);
  for (int t = 2; t < 4; ++t) config.set(t, 16, 64);
  config.set(4, 16, BYTES);
  config.load();
  const __m512i column = _mm512_mullo_epi32(_mm512_set1_epi32(COLS),
                                            _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  for (int64_t n = begin; n < end; n += PANEL) {
    int columns = end - n < PANEL ? 16 : PANEL;
    const bf16* w = (const bf16*)W.data + n * W.rank_stride;
    tiles::zero<0>();
    tiles::zero<1>();
    for (int64_t k = 0; k < K; k += DEPTH) {
      tiles::load<4>(xt + k * COLS, BYTES);
      tiles::load<2>(w + k, W.rank_stride * 2);
      tiles::dot<0, 2, 4>();
      if (columns == PANEL) {
        tiles::load<3>(w + 16 * W.rank_stride + k, W.rank_stride * 2);
        tiles::dot<1, 3, 4>();
      }
    }
    tiles::store<0>(c, BYTES);
    tiles::store<1>(c + 16 * COLS, BYTES);
    Bias b(bias ? bias + n : nullptr, columns);
    for (int i = 0; i < m; ++i)
      b.store((vf)_mm512_i32gather_ps(column, c + i, 4), (vf)_mm512_i32gather_ps(column, c + 16 * COLS + i, 4), columns,
              (bf16*)row_of<bf16>(y, i) + n);
  }
}

// Rows [i, i + count) of y, at most 32, by a panel.
template <bool TWO>
LK_INLINE void linear_block(const bf16* x, int64_t x_stride, const bf16* panel, int64_t K, float* c) {
  tiles::zero<0>();
  tiles::zero<1>();
  if (TWO) tiles::zero<2>();
  if (TWO) tiles::zero<3>();
  for (int64_t k = 0; k < K; k += DEPTH) {
    tiles::load<6>(panel + k * PANEL, 64);
    tiles::stream<4>(x + k, x_stride * 2);
    tiles::dot<0, 4, 6>();
    tiles::load<7>(panel + k * PANEL + TILE, 64);
    tiles::dot<1, 4, 7>();
    if (TWO) {
      tiles::stream<5>(x + 16 * x_stride + k, x_stride * 2);
      tiles::dot<2, 5, 6>();
      tiles::dot<3, 5, 7>();
    }
  }
  tiles::store<0>(c, 128);
  tiles::store<1>(c + 16, 128);
  if (TWO) tiles::store<2>(c + 16 * PANEL, 128);
  if (TWO) tiles::store<3>(c + 16 * PANEL + 16, 128);
}

void linear_many(const Rows& x, int m, const Factor& W, int64_t K, const bf16* bias, const Rows& y, int64_t begin,
                 int64_t end, char* scratch) {
  float* c = (float*)scratch;                // [32][32]
  bf16* panel = (bf16*)(c + PANEL * PANEL);  // [K / 32][2] tiles
  auto configure = [&](int upper, int lower) LK_LAMBDA {
    tiles::Config config;
    for (int t = 0; t < 8; ++t) config.set(t, t == 6 || t == 7 ? 16 : t == 2 || t == 3 || t == 5 ? lower : upper, 64);
    config.load();
  };
  int tail = m % PANEL;
  configure(16, 16);
  for (int64_t n = begin; n < end; n += PANEL) {
    int columns = end - n < PANEL ? 16 : PANEL;
    const bf16* w = (const bf16*)W.data + n * W.rank_stride;
    for (int64_t k = 0; k < K; k += DEPTH) {
      interleave_tile<1>(w + k, W.rank_stride, 16, DEPTH, panel + k * PANEL);
      interleave_tile<1>(w + 16 * W.rank_stride + k, W.rank_stride, columns - 16, DEPTH, panel + k * PANEL + TILE);
    }
    Bias b(bias ? bias + n : nullptr, columns);
    auto store = [&](int i, int count) LK_LAMBDA {
      for (int r = 0; r < count; ++r)
        b.store(load(c + r * PANEL), load(c + r * PANEL + 16), columns, (bf16*)row_of<bf16>(y, i + r) + n);
    };
    int i = 0;
    for (; i + PANEL <= m; i += PANEL) {
      linear_block<true>(row_of<bf16>(x, i), x.stride, panel, K, c);
      store(i, PANEL);
    }
    if (!tail) continue;
    if (tail > 16) {
      configure(16, tail - 16);
      linear_block<true>(row_of<bf16>(x, i), x.stride, panel, K, c);
    } else {
      configure(tail, 16);
      linear_block<false>(row_of<bf16>(x, i), x.stride, panel, K, c);
    }
    store(i, tail);
    configure(16, 16);
  }
}

void linear(const Rows& x, int m, const Factor& W, int64_t K, const void* bias, const Rows& y, int64_t begin,
            int64_t end, void* scratch) {
  auto form = m > 16  ? linear_many
              : m > 8 ? linear_few<16>
              : m > 4 ? linear_few<8>
              : m > 2 ? linear_few<4>
              : m > 1 ? linear_few<2>
                      : linear_few<1>;
  form(x, m, W, K, (const bf16*)bias, y, begin, end, (char*)scratch);
  tiles::release();
}

}  // namespace
}  // namespace lora_kernels::amx
