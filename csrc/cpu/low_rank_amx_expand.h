// y += v Bᵀ on AMX tiles. Included by low_rank_amx.cpp.
#pragma once

#include "low_rank_amx_factors.h"

namespace lora_kernels::amx {
namespace {

// y[0:16) += sum, rounded once, of which `live` columns exist.
LK_INLINE void add_to(bf16* y, vf sum, int live) {
  __mmask16 mask = __mmask16((1u << live) - 1);
  vf before = widen_bf16(_mm256_maskz_loadu_epi16(mask, y));
  _mm256_mask_storeu_epi16(y, mask, round_bf16(before + sum));
}

// Runs of units of G floats, one of each of COLS rows in turn, back to rows: deinterleave of more than single floats.
template <int COLS, int G>
LK_INLINE void separate(vf (&v)[COLS * G]) {
  constexpr int N = COLS * G, WORDS = G < 2 ? 1 : G / 2;  // words of 64 bits in a unit
  auto word = [](int w, int odd) { return (2 * (w / WORDS) + odd) * WORDS + w % WORDS; };
  const __m512i even =
      _mm512_set_epi64(word(7, 0), word(6, 0), word(5, 0), word(4, 0), word(3, 0), word(2, 0), word(1, 0), word(0, 0));
  const __m512i odd =
      _mm512_set_epi64(word(7, 1), word(6, 1), word(5, 1), word(4, 1), word(3, 1), word(2, 1), word(1, 1), word(0, 1));
#pragma GCC unroll 4
  for (int step = 1; step < COLS; step *= 2) {
    vf t[N];
#pragma GCC unroll 16
    for (int i = 0; i < N / 2; ++i) {
      t[i] = (vf)_mm512_permutex2var_epi64((__m512i)v[2 * i], even, (__m512i)v[2 * i + 1]);
      t[i + N / 2] = (vf)_mm512_permutex2var_epi64((__m512i)v[2 * i], odd, (__m512i)v[2 * i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) v[i] = t[i];
  }
}

// The sums [16][COLS][G] of a tile onto 16 · G columns of each of m rows of y, of which `live` exist.
template <int COLS, int G>
LK_INLINE void add_columns(const float* c, bf16* const* y, int m, int64_t n, int live) {
  vf v[COLS * G];
#pragma GCC unroll 16
  for (int i = 0; i < COLS * G; ++i) v[i] = load(c + i * 16);
  if (G > 1)
    separate<COLS, G>(v);
  else
    deinterleave(v);
#pragma GCC unroll 16
  for (int i = 0; i < COLS; ++i) {
    if (i >= m) break;
#pragma GCC unroll 8
    for (int e = 0; e < G; ++e)
      if (live > e * 16) add_to(y[i] + n + e * 16, v[i * G + e], live - e * 16 < 16 ? live - e * 16 : 16);
  }
}

template <int VECTORS>
LK_INLINE bool any_nan(const float* c) {
  vf sum[4] = {};
#pragma GCC unroll 16
  for (int i = 0; i < VECTORS; ++i) sum[i % 4] += load(c + i * 16);
  vf all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  return _mm512_cmp_ps_mask((__m512)all, (__m512)all, _CMP_UNORD_Q) != 0;
}

LK_INLINE int steps_of(int rank) { return (rank + DEPTH - 1) / DEPTH; }

// What cutting x to bf16 leaves; nothing of an infinity.
LK_INLINE vf rest_of(vf x) {
  vu head = (vu)x & 0xffff0000;
  __mmask16 finite = _mm512_cmpneq_epu32_mask((__m512i)(head & 0x7fffffff), _mm512_set1_epi32(0x7f800000));
  return (vf)_mm512_maskz_sub_ps(finite, (__m512)x, (__m512)(vf)head);
}

// One row of v, 32 of its ranks, as the two tiles' rows that add up to it.
LK_INLINE void load_v(const float* p, int count, __m512i (&out)[2]) {
  vf low = count >= W ? load(p) : load_n(p, count < 0 ? 0 : count);
  vf high = count >= DEPTH ? load(p + W) : count > W ? load_n(p + W, count - W) : vf{};
  out[0] = _mm512_permutex2var_epi16((__m512i)low, high_halves(), (__m512i)high);
  out[1] = _mm512_permutex2var_epi16((__m512i)rest_of(low), high_halves(), (__m512i)rest_of(high));
}

// yᵀ += B vᵀ for at most COLS rows, 16 · G columns of y a tile.
//
// G > 1: the ranks of G columns fill a row of a tile, so B is read as [N / G, 32] and vᵀ stands G times on the
// diagonal. A batch of tiles of B is copied before the first is used, and a batch of sums stored before the first is
// read: loads that follow their stores too closely would wait for them.
template <int COLS, int G, class T>
LK_INLINE void expand_few(const Rows& y, int m, const float* v, int64_t v_stride, const Factor& B, int64_t begin,
                          int64_t end, char* scratch) {
  constexpr int PARTS = parts<T>(2), WIDTH = COLS * G, COLUMNS = 16 * G, BATCH = 8;
  constexpr int64_t v_bytes = 4 * WIDTH;
  const int steps = G > 1 ? 1 : steps_of(B.rank), block = steps * PARTS * TILE;
  const int64_t b_stride = G > 1 ? DEPTH : B.stride;
  bf16* vt = (bf16*)scratch;                    // [steps][2][16 pairs][WIDTH][2]
  float* c = (float*)(vt + 2 * kMaxRank * 16);  // [BATCH][16][WIDTH]
  bf16* bt = (bf16*)(c + BATCH * 16 * WIDTH);   // [BATCH][steps][PARTS] tiles of B
  for (int s = 0; s < steps; ++s) {
    alignas(64) bf16 part[2][WIDTH][DEPTH] = {};
    for (int i = 0; i < m; ++i) {
      __m512i halves[2];
      load_v(v + i * v_stride + s * DEPTH, B.rank - s * DEPTH, halves);
      for (int k = 0; k < 2; ++k)
        for (int e = 0; e < G; ++e) memcpy(part[k][i * G + e] + e * (DEPTH / G), &halves[k], 64 / G);
    }
    for (int k = 0; k < 2; ++k) {
      vi rows[WIDTH];
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH; ++i) rows[i] = (vi)_mm512_load_si512(part[k][i]);
      interleave(rows);
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH; ++i) _mm512_store_si512(vt + ((s * 2 + k) * WIDTH + i) * DEPTH, (__m512i)rows[i]);
    }
  }
  bf16* rows[COLS];
  for (int i = 0; i < m; ++i) rows[i] = (bf16*)row_of<bf16>(y, i);
  tiles::Config config;
  for (int t = 0; t < 4; ++t) config.set(t, 16, v_bytes);
  for (int t = 4; t < 6; ++t) config.set(t, 16, 64);
  for (int t = 6; t < 8; ++t) config.set(t, 16, v_bytes);
  config.load();
  auto load_v_tiles = [&](int s) LK_LAMBDA {
    tiles::load<6>(vt + 2 * s * WIDTH * DEPTH, v_bytes);
    tiles::load<7>(vt + (2 * s + 1) * WIDTH * DEPTH, v_bytes);
  };
  if (steps == 1) load_v_tiles(0);
  const bool as_it_lies = PARTS == 1 && (G > 1 || B.rank % DEPTH == 0);
  for (int64_t n = begin; n < end; n += BATCH * COLUMNS) {
    const T* b = (const T*)B.data + n * B.stride;
    int64_t left = end - n < BATCH * COLUMNS ? end - n : BATCH * COLUMNS;
    int count = int((left + COLUMNS - 1) / COLUMNS), copied_from = as_it_lies ? int(left / COLUMNS) : 0;
    for (int t = copied_from; t < count; ++t) {
      int columns = left - t * COLUMNS < COLUMNS ? int(left - t * COLUMNS) : COLUMNS;
      for (int s = 0; s < steps; ++s)
        copy_tile<PARTS>(b + t * 16 * b_stride + s * DEPTH, b_stride, columns / G, G > 1 ? DEPTH : B.rank - s * DEPTH,
                         bt + t * block + s * PARTS * TILE);
    }
    auto fill = [&](int t, auto tile) LK_LAMBDA {
      constexpr int C = decltype(tile)::value;
      tiles::zero<C>();
      for (int s = 0; s < steps; ++s) {
        if (steps > 1) load_v_tiles(s);
        const bf16* copy = bt + t * block + s * PARTS * TILE;
        if (t < copied_from) {
          const bf16* lies = (const bf16*)(const void*)b + t * 16 * b_stride + s * DEPTH;
          if (n + (t + BATCH) * COLUMNS < end)
#pragma GCC unroll 16
            for (int r = 0; r < 16; ++r) __builtin_prefetch(lies + (BATCH * 16 + r) * b_stride);
          tiles::load<4>(lies, b_stride * 2);
        } else {
          tiles::load<4>(copy, 64);
        }
        tiles::dot<C, 4, 6>();
        tiles::dot<C, 4, 7>();
        if (PARTS > 1) {
          tiles::load<5>(copy + TILE, 64);
          tiles::dot<C, 5, 6>();
        }
      }
    };
    auto drain = [&](int t, auto tile) LK_LAMBDA { tiles::store<decltype(tile)::value>(c + t * 16 * WIDTH, v_bytes); };
    int t = 0;
    for (; t + 4 <= count; t += 4) {
      fill(t, number<0>{});
      fill(t + 1, number<1>{});
      fill(t + 2, number<2>{});
      fill(t + 3, number<3>{});
      drain(t, number<0>{});
      drain(t + 1, number<1>{});
      drain(t + 2, number<2>{});
      drain(t + 3, number<3>{});
    }
    for (; t < count; ++t) {
      fill(t, number<0>{});
      drain(t, number<0>{});
    }
    bool spoilt = false;
    for (t = 0; t < count; ++t) {
      int64_t first = n + t * COLUMNS, live = left - t * COLUMNS < COLUMNS ? left - t * COLUMNS : COLUMNS;
      if (G > 1 && any_nan<WIDTH>(c + t * 16 * WIDTH)) {
        expand_few<COLS, 1, T>(y, m, v, v_stride, B, first, first + live, scratch + kScratch / 2);
        spoilt = true;
      } else {
        add_columns<COLS, G>(c + t * 16 * WIDTH, rows, m, first, int(live));
      }
    }
    if (spoilt) {
      config.load();
      load_v_tiles(0);
    }
  }
}

// 32 columns of y and their sums, the even ones and then the odd ones, rounded once.
LK_INLINE __m512i sum_of(vu before, const float* c) {
  const __m512i in_order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                            21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  vf even = (vf)(before << 16) + load(c);
  vf odd = (vf)(before & 0xffff0000) + load(c + 16);
  return _mm512_permutexvar_epi16(in_order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
}

// Tiles C (even columns) and C + 1 (odd ones) onto `count` rows by 32 columns of y, of which `live` exist. y is read
// before the tiles are stored: a load behind a store to the same offset in a page would wait for it.
template <int C, bool WHOLE>
LK_INLINE void add_tiles_as(float* c, bf16* const* rows, int count, int64_t n, __mmask32 live) {
  vu before[16];
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k)
    if (WHOLE || k < count)
      before[k] = (vu)(WHOLE ? _mm512_loadu_si512(rows[k] + n) : _mm512_maskz_loadu_epi16(live, rows[k] + n));
  tiles::store<C>(c, 128);
  tiles::store<C + 1>(c + 16, 128);
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) {
    if (!WHOLE && k >= count) break;
    __m512i after = sum_of(before[k], c + k * 32);
    if (WHOLE)
      _mm512_storeu_si512(rows[k] + n, after);
    else
      _mm512_mask_storeu_epi16(rows[k] + n, live, after);
  }
}

template <int C>
LK_INLINE void add_tiles(float* c, bf16* const* rows, int count, int64_t n, int live) {
  if (count == 16 && live == 32)
    add_tiles_as<C, true>(c, rows, count, n, 0);
  else
    add_tiles_as<C, false>(c, rows, count, n, __mmask32((1ull << live) - 1));
}

// Tiles C and C + 1: 16 rows of v by 32 columns; `fresh`: B's tiles are not in place yet.
template <int C, int PARTS, class F>
LK_INLINE void expand_many_tiles(const bf16* vt, int steps, bool fresh, const F& load_b) {
  auto dots = [&](int tile) LK_LAMBDA {
    tiles::load<4 + C / 2>(vt + tile * TILE, 64);
    tiles::dot<C, 4 + C / 2, 6>();
    tiles::dot<C + 1, 4 + C / 2, 7>();
  };
  tiles::zero<C>();
  tiles::zero<C + 1>();
  for (int s = 0; s < steps; ++s) {
    if (fresh) load_b(s, 0);
    dots(s * 2);
    dots(s * 2 + 1);
    if (PARTS > 1) {
      load_b(s, 1);
      dots(s * 2);
    }
  }
}

// One step of expand_whole. The three are independent and each would leave the others' units idle, so they are mixed by
// hand: the tiles of the block before go to `stored`, they are filled for the block of B's tiles `b` (FILL), and the
// sums `c` of the block before that go onto y at column n (ADD).
template <int PARTS, bool FILL, bool ADD>
LK_INLINE void expand_step(float* stored, const bf16* v, int64_t v_half, const bf16* b, const float* c,
                           bf16* const* rows, int64_t n) {
  auto add = [&](int k) LK_LAMBDA {
    if (!ADD) return;
#pragma GCC unroll 2
    for (int i = k; i < k + 2; ++i) {
      vu before = (vu)_mm512_loadu_si512(rows[i] + n);
      _mm512_storeu_si512(rows[i] + n, sum_of(before, c + i * 32));
    }
  };
  const bf16* odd = b + PARTS * TILE;
  auto take = [&](auto tile) LK_LAMBDA {
    constexpr int C = decltype(tile)::value;
    tiles::store<C>(stored + C / 2 * 16 * 32 + C % 2 * 16, 128);
    if (FILL) tiles::zero<C>();
  };
  take(number<0>{});
  add(0);
  if (FILL) tiles::load<6>(b, 64);
  if (FILL) tiles::load<4>(v, 64);
  add(2);
  if (FILL) tiles::dot<0, 4, 6>();
  take(number<1>{});
  add(4);
  if (FILL) tiles::load<7>(odd, 64);
  if (FILL) tiles::dot<1, 4, 7>();
  add(6);
  take(number<2>{});
  add(8);
  if (FILL) tiles::load<5>(v + v_half, 64);
  if (FILL) tiles::dot<2, 5, 6>();
  add(10);
  take(number<3>{});
  add(12);
  if (FILL) tiles::dot<3, 5, 7>();
  add(14);
  if (FILL) tiles::load<4>(v + TILE, 64);
  if (FILL) tiles::dot<0, 4, 6>();
  add(16);
  if (FILL) tiles::dot<1, 4, 7>();
  add(18);
  if (FILL) tiles::load<5>(v + v_half + TILE, 64);
  add(20);
  if (FILL) tiles::dot<2, 5, 6>();
  add(22);
  if (FILL) tiles::dot<3, 5, 7>();
  add(24);
  if (FILL && PARTS > 1) {
    tiles::load<6>(b + TILE, 64);
    tiles::load<4>(v, 64);
    tiles::dot<0, 4, 6>();
  }
  add(26);
  if (FILL && PARTS > 1) {
    tiles::load<7>(odd + TILE, 64);
    tiles::dot<1, 4, 7>();
  }
  add(28);
  if (FILL && PARTS > 1) {
    tiles::load<5>(v + v_half, 64);
    tiles::dot<2, 5, 6>();
  }
  add(30);
  if (FILL && PARTS > 1) tiles::dot<3, 5, 7>();
}

// y += v Bᵀ for 32 rows, blocks of 32 columns and ranks up to 32: the sums of expand_many_tiles in the same order.
// c holds two blocks, b the columns' tiles: even and odd ones of PARTS each.
template <int PARTS>
LK_INLINE void expand_whole(float* c, const bf16* v, int64_t v_half, const bf16* b, bf16* const* rows, int64_t n,
                            int64_t blocks) {
  constexpr int SUMS = 32 * 32;
  constexpr int64_t B_BLOCK = 2 * PARTS * TILE;
  // The first store is of nothing, and overwritten before it is read.
  expand_step<PARTS, true, false>(c + SUMS, v, v_half, b, c, rows, n);
  for (int64_t i = 1; i < blocks; ++i) {
    float *now = c + (i - 1) % 2 * SUMS, *before = c + i % 2 * SUMS;
    if (i == 1)
      expand_step<PARTS, true, false>(now, v, v_half, b + B_BLOCK, before, rows, n);
    else
      expand_step<PARTS, true, true>(now, v, v_half, b + i * B_BLOCK, before, rows, n + (i - 2) * 32);
  }
  float *now = c + (blocks - 1) % 2 * SUMS, *before = c + blocks % 2 * SUMS;
  if (blocks > 1)
    expand_step<PARTS, false, true>(now, v, v_half, b, before, rows, n + (blocks - 2) * 32);
  else
    expand_step<PARTS, false, false>(now, v, v_half, b, before, rows, n);
#pragma GCC unroll 4
  for (int k = 0; k < 32; ++k) {
    bf16* y = rows[k] + n + (blocks - 1) * 32;
    _mm512_storeu_si512(y, sum_of((vu)_mm512_loadu_si512(y), now + k * 32));
  }
}

// y += v Bᵀ for many rows: B interleaved once, then 32 rows by 32 columns at a time.
template <class T>
LK_INLINE void expand_many(const Rows& y, int m, const float* v, int64_t v_stride, const Factor& B, int64_t begin,
                           int64_t end, char* scratch) {
  constexpr int PARTS = parts<T>(2), BLOCK = 32;
  int steps = steps_of(B.rank);
  int block = steps * PARTS * TILE;             // of B, for 16 columns
  int64_t v_half = steps * 2 * TILE;            // of v, for 16 rows
  bf16* vt = (bf16*)scratch;                    // [2][steps][2] tiles
  float* c = (float*)(vt + 4 * kMaxRank * 16);  // [2][32][32]
  bf16* bt = (bf16*)(c + 2 * BLOCK * BLOCK);    // [columns / 32][even, odd][steps][PARTS] tiles
  int64_t room = (int64_t)(kScratch - ((char*)bt - scratch)) / (block * 2) * 16 / BLOCK * BLOCK;
  tiles::Config config;
  int depth = B.rank <= 16 ? 16 : DEPTH;  // tiles 4 and 5 hold v, 6 and 7 B
  for (int t = 0; t < 8; ++t) config.set(t, t < 6 ? 16 : depth / 2, t == 4 || t == 5 ? depth * 2 : 64);
  config.load();
  for (int64_t n0 = begin; n0 < end; n0 += room) {
    int64_t n1 = end - n0 < room ? end : n0 + room;
    for (int64_t n = n0; n < n1; n += BLOCK) {
      const T* columns = (const T*)B.data + n * B.stride;
      bf16* out = bt + (n - n0) / 16 * block;
      int live = n1 - n < BLOCK ? int(n1 - n) : BLOCK;
      if (B.rank <= 16) {
        interleave_two_tiles<PARTS>(columns, B.stride, live, B.rank, out, out + block);
        continue;
      }
      for (int odd = 0; odd < 2; ++odd)
        for (int s = 0; s < steps; ++s)
          interleave_tile<PARTS>(columns + odd * B.stride + s * DEPTH, 2 * B.stride, (live - odd + 1) / 2,
                                 B.rank - s * DEPTH, out + odd * block + s * PARTS * TILE);
    }
    for (int i = 0; i < m; i += BLOCK) {
      int count = m - i < BLOCK ? m - i : BLOCK;
      bool two = count > 16;
      for (int k = 0; k < BLOCK; ++k)
        for (int s = 0; s < steps; ++s) {
          __m512i halves[2] = {};
          if (k < count) load_v(v + (i + k) * v_stride + s * DEPTH, B.rank - s * DEPTH, halves);
          bf16* out = vt + k / 16 * v_half + s * 2 * TILE + k % 16 * DEPTH;
          _mm512_store_si512(out, halves[0]);
          _mm512_store_si512(out + TILE, halves[1]);
        }
      bf16* rows[BLOCK];
      for (int k = 0; k < count; ++k) rows[k] = (bf16*)row_of<bf16>(y, i + k);
      const bf16 *even = nullptr, *odd = nullptr;
      auto load_b = [&](int s, int part) LK_LAMBDA {
        tiles::load<6>(even + (s * PARTS + part) * TILE, 64);
        tiles::load<7>(odd + (s * PARTS + part) * TILE, 64);
      };
      // The dot products of 16 rows; `fresh`: B's tiles are not in place yet.
      auto upper = [&](bool fresh) LK_LAMBDA { expand_many_tiles<0, PARTS>(vt, steps, fresh, load_b); };
      auto lower = [&](bool fresh) LK_LAMBDA { expand_many_tiles<2, PARTS>(vt + v_half, steps, fresh, load_b); };
      auto move_to = [&](int64_t n) LK_LAMBDA {
        even = bt + (n - n0) / 16 * block;
        odd = even + block;
      };
      int64_t first = n0;
      if (steps == 1 && count == BLOCK && n1 - n0 >= BLOCK) {
        expand_whole<PARTS>(c, vt, v_half, bt, rows, n0, (n1 - n0) / BLOCK);
        first += (n1 - n0) / BLOCK * BLOCK;
        if (first == n1) continue;
      }
      // The tiles of one half are filled while those of the other are added to y.
      bool whole_b = steps == 1 && PARTS == 1;
      move_to(first);
      upper(true);
      for (int64_t n = first; n < n1; n += BLOCK) {
        int live = n1 - n < BLOCK ? int(n1 - n) : BLOCK;
        if (two) lower(!whole_b);
        add_tiles<0>(c, rows, two ? 16 : count, n, live);
        if (n + BLOCK < n1) {
          move_to(n + BLOCK);
          upper(true);
        }
        if (two) add_tiles<2>(c + 16 * BLOCK, rows + 16, count - 16, n, live);
      }
    }
  }
}

// At most 16 / G rows at a time; with several such passes B comes from the nearest cache but for the first.
template <int G, class T>
void expand_passes(const Rows& y, int m, const float* v, int64_t v_stride, const Factor& B, int64_t begin, int64_t end,
                   char* scratch) {
  constexpr int COLS = 16 / G, COLUMNS = 1024;
  for (int64_t n = begin; n < end; n += COLUMNS)
    for (int i = 0; i < m; i += COLS) {
      Rows rows = y;
      if (rows.index)
        rows.index += i;
      else
        rows.data = (bf16*)rows.data + i * y.stride;
      int count = m - i < COLS ? m - i : COLS;
      int64_t stop = end - n < COLUMNS ? end : n + COLUMNS;
      const float* part = v + i * v_stride;
      switch (power_of_two(count)) {
        case 1:
          expand_few<1, G, T>(rows, count, part, v_stride, B, n, stop, scratch);
          break;
        case 2:
          expand_few<2, G, T>(rows, count, part, v_stride, B, n, stop, scratch);
          break;
        case 4:
          expand_few < COLS<4 ? COLS : 4, G, T>(rows, count, part, v_stride, B, n, stop, scratch);
          break;
        case 8:
          expand_few < COLS<8 ? COLS : 8, G, T>(rows, count, part, v_stride, B, n, stop, scratch);
          break;
        default:
          expand_few<COLS, G, T>(rows, count, part, v_stride, B, n, stop, scratch);
      }
    }
}

template <class T>
void expand_tiles(const Rows& y, int m, const float* v, int64_t v_stride, const Factor& B, int64_t begin, int64_t end,
                  char* scratch) {
  // Columns of B whose ranks fill a row of a tile, where they lie side by side.
  int together = B.stride == B.rank && B.rank >= 4 && B.rank < DEPTH && DEPTH % B.rank == 0 ? DEPTH / B.rank : 1;
  if (m > 16) {
    expand_many<T>(y, m, v, v_stride, B, begin, end, scratch);
  } else {
    int64_t whole = begin + (end - begin) / together * together;
    if (together == 2)
      expand_passes<2, T>(y, m, v, v_stride, B, begin, whole, scratch);
    else if (together == 4)
      expand_passes<4, T>(y, m, v, v_stride, B, begin, whole, scratch);
    else if (together == 8)
      expand_passes<8, T>(y, m, v, v_stride, B, begin, whole, scratch);
    else
      whole = begin;
    if (whole < end) expand_passes<1, T>(y, m, v, v_stride, B, whole, end, scratch);
  }
  tiles::release();
}

void expand(const Rows& y, int m, const float* v, int64_t v_stride, const Factor& B, int64_t begin, int64_t end,
            void* scratch) {
  if (y.dtype != DType::bf16 || B.rank_stride != 1 || B.dtype == DType::f16)
    expand_vectors(y, m, v, v_stride, B, begin, end, scratch);
  else
    (B.dtype == DType::bf16 ? expand_tiles<bf16> : expand_tiles<float>)(y, m, v, v_stride, B, begin, end,
                                                                        (char*)scratch);
}

}  // namespace
}  // namespace lora_kernels::amx
