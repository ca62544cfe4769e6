// Products of bf16 rows and 4-bit codes by AVX-512's dot products of bf16 pairs, the codes looked up in registers.
//
// A dword of a row of W holds 8 codes. Shifted by 4 j it has code j in the low bits of its low half and code 4 + j in
// those of its high half, and a lookup of half words reads no more than these: a pair of bf16. x is reordered to meet
// it. The table is exact in bf16 or close (see Lut), the scales stay fp32 and apply to the sums of each group.
//
//   few rows:   lanes run along a row of W, 128 numbers at a time;
//   more rows:  16 dwords of 16 rows of W are transposed and looked up once for all rows of x, so that lanes are
//               columns of y and a group's scales a vector.
#pragma once

#include "quantized_kernels.h"

namespace lora_kernels::LK_ISA {
namespace {

constexpr int CODES_CHUNK = 128;        // numbers of a row of W that are looked up together
constexpr int ROWS_AT_ONCE = 12;        // rows of x whose sums fit the registers
constexpr int FEW = 2;                  // rows of x
constexpr int STEPS = CODES_CHUNK / 2;  // pairs of them
constexpr int TILE_COLUMNS = 2 * W;     // columns of y
constexpr int64_t kMostGroups = 4096;
#if defined(LK_TILES)
constexpr int64_t kMostRows = 32;  // torch multiplies more of them by tiles
#else
constexpr int64_t kMostRows = 512;
#endif

// 16 numbers as bf16 times a factor that makes their rounding small, with 2 copies for lookups by 5 bits.
struct Lut {
  __m512i values;
  float unit;  // a number is its value times this

  explicit Lut(const float* table) {
    float best = -1;
    uint16_t kept[16] = {};
    for (int step = 0; step < 16; ++step) {
      float factor = 1 + step / 16.0f, error = 0;
      __m512 exact = _mm512_mul_ps(_mm512_loadu_ps(table), _mm512_set1_ps(factor));
      __m256i narrow = (__m256i)_mm512_cvtneps_pbh(exact);
      __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
      __m512 off = _mm512_div_ps(_mm512_sub_ps(wide, exact), _mm512_set1_ps(factor));
      error = _mm512_reduce_add_ps(_mm512_mul_ps(off, off));
      if (best < 0 || error < best) {
        best = error, unit = 1 / factor;
        memcpy(kept, &narrow, sizeof kept);
      }
      if (best == 0) break;
    }
    values = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)kept));
  }
  template <int J>
  LK_INLINE __m512bh at(__m512i codes) const {
    return (__m512bh)_mm512_permutexvar_epi16(J ? _mm512_srli_epi32(codes, 4 * J) : codes, values);
  }
};

LK_INLINE int64_t chunks_of(const Codes& w) { return (w.K + CODES_CHUNK - 1) / CODES_CHUNK; }

// A group that is the whole row may end anywhere; others meet the chunks' ends.
LK_INLINE int64_t whole_group(const Codes& w) { return w.group >= w.K ? chunks_of(w) * CODES_CHUNK : w.group; }

bool takes_dot(const Codes& w, DType dtype) {
  int64_t g = whole_group(w);
  return dtype == DType::bf16 && !w.wide && w.K > 0 && g % 8 == 0 && (g % CODES_CHUNK == 0 || CODES_CHUNK % g == 0) &&
         w.groups <= kMostGroups;
}

int64_t most_rows(const Codes& w, DType dtype) {
  return takes_dot(w, dtype) ? kMostRows : most_rows_of_decoded(w, dtype);
}

int64_t packed_bytes(const Codes& w, DType dtype, int m) {
  return takes_dot(w, dtype) ? chunks_of(w) * m * CODES_CHUNK * 2 : 0;
}

// The bytes of codes left of a chunk, at most 64.
LK_INLINE __mmask64 bytes_left(const Codes& w, int64_t chunk) {
  int64_t left = (w.K + 1) / 2 - chunk * (CODES_CHUNK / 2);
  return left >= 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
}

void pack(const Codes& w, const PackedRows& packed, int first, int count) {
  if (!takes_dot(w, packed.rows.dtype)) return;
  // Of 8 numbers in a row of codes, in the order of the low halves' codes and the high halves' in turn.
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 10, 11, 0, 1, 8, 9, 6, 7, 14, 15, 4, 5, 12, 13));
  const __m512i stride4 = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const __m512i next2 = _mm512_add_epi32(stride4, _mm512_set1_epi32(2));
  int64_t chunks = chunks_of(w);
  for (int i = first; i < first + count; ++i) {
    const bf16* row = row_of<bf16>(packed.rows, i);
    for (int64_t c = 0; c < chunks; ++c) {
      __m512i v[4];
      for (int j = 0; j < 4; ++j) {
        int64_t left = w.K - c * CODES_CHUNK - 32 * j;
        __mmask32 live = left >= 32 ? ~__mmask32(0) : left > 0 ? (__mmask32(1) << left) - 1 : 0;
        v[j] = _mm512_shuffle_epi8(_mm512_maskz_loadu_epi16(live, row + c * CODES_CHUNK + 32 * j), order);
      }
      char* to = packed.data + (c * packed.m + i) * (CODES_CHUNK * 2);
      if (packed.m <= FEW) {  // dword 4 d + j to 16 j + d
        __m512i a = _mm512_permutex2var_epi32(v[0], stride4, v[1]), b = _mm512_permutex2var_epi32(v[0], next2, v[1]);
        __m512i d = _mm512_permutex2var_epi32(v[2], stride4, v[3]), e = _mm512_permutex2var_epi32(v[2], next2, v[3]);
        v[0] = _mm512_shuffle_i64x2(a, d, 0x44);
        v[1] = _mm512_shuffle_i64x2(a, d, 0xee);
        v[2] = _mm512_shuffle_i64x2(b, e, 0x44);
        v[3] = _mm512_shuffle_i64x2(b, e, 0xee);
      }
      for (int j = 0; j < 4; ++j) _mm512_storeu_si512(to + 64 * j, v[j]);
    }
    if (!w.offsets) continue;
    for (int64_t g = 0; g < w.groups; ++g) {
      int64_t begin = g * w.group, end = begin + w.group < w.K ? begin + w.group : w.K;
      vf sum{};
      int64_t k = begin;
      for (; k + W <= end; k += W) sum = sum + load(row + k);
      if (k < end) sum = sum + load_n(row + k, int(end - k));
      packed.sums[i * w.groups + g] = _mm512_reduce_add_ps((__m512)sum);
    }
  }
}

// M rows of x and NR of W.
template <int M, int NR>
LK_INLINE void few_block(const Codes& w, const Lut& lut, const char* x, int64_t n, float* out, int64_t out_stride) {
  int64_t chunks = chunks_of(w), g = whole_group(w), per = g < CODES_CHUNK ? CODES_CHUNK / g : 1,
          span = g < CODES_CHUNK ? 1 : g / CODES_CHUNK;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i of_lane = _mm512_srli_epi32(lanes, __builtin_ctzll(g < CODES_CHUNK ? g / 8 : 16));
  __m512 total[NR][M] = {};
  for (int64_t c = 0; c < chunks; ++c) {
    __mmask64 bytes = bytes_left(w, c);
    int64_t first = c / span * per;
    __mmask16 scales_left = __mmask16((1u << (first + per < w.groups ? per : w.groups - first)) - 1);
    const char* xc = x + c * M * (CODES_CHUNK * 2);
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r) {
      const uint8_t* row = w.data + (n + r) * w.stride + c * (CODES_CHUNK / 2);
      __m512i codes = c + 1 < chunks ? _mm512_loadu_si512(row) : _mm512_maskz_loadu_epi8(bytes, row);
      prefetch(row, NR * w.stride);  // what the next rows need here, since these are short
      __m512bh v[4] = {lut.at<0>(codes), lut.at<1>(codes), lut.at<2>(codes), lut.at<3>(codes)};
      const float* scales = w.scales + (n + r) * w.groups + first;
      prefetch(scales, NR * w.groups);
      __m512 s = _mm512_permutexvar_ps(of_lane, _mm512_maskz_loadu_ps(scales_left, scales));
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        __m512 acc = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
          acc = _mm512_dpbf16_ps(acc, v[j], (__m512bh)_mm512_loadu_si512(xc + (m * 4 + j) * 64));
        total[r][m] = _mm512_fmadd_ps(acc, s, total[r][m]);
      }
    }
  }
  for (int r = 0; r < NR; ++r)
    for (int m = 0; m < M; ++m) out[m * out_stride + r] = _mm512_reduce_add_ps(total[r][m]) * lut.unit;
}

// m rows of x, at most M of them.
template <int M>
void few_rows(int m, const Codes& w, const Lut& lut, const char* x, int64_t begin, int64_t end, float* out,
              int64_t out_stride) {
  if constexpr (M > 1)
    if (m < M) return few_rows<M - 1>(m, w, lut, x, begin, end, out, out_stride);
  constexpr int NR = M == 1 ? 4 : 2;
  int64_t n = begin;
  for (; n + NR <= end; n += NR) few_block<M, NR>(w, lut, x, n, out + n - begin, out_stride);
  for (; n < end; ++n) few_block<M, 1>(w, lut, x, n, out + n - begin, out_stride);
}

// The pairs of 16 rows of W and a chunk: tile[64 steps, TILE_COLUMNS] dwords, these rows' 16 of them.
LK_INLINE void look_up(const Codes& w, const Lut& lut, int64_t n, int64_t last, int64_t c, __mmask64 bytes,
                       uint32_t* tile) {
  vi v[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const uint8_t* row = w.data + (n + i < last ? n + i : last) * w.stride + c * (CODES_CHUNK / 2);
    prefetch(row, TILE_COLUMNS * w.stride);
    v[i] = (vi)(~bytes ? _mm512_maskz_loadu_epi8(bytes, row) : _mm512_loadu_si512(row));
  }
  interleave(v);
#pragma GCC unroll 16
  for (int d = 0; d < 16; ++d) {
    __m512i codes = (__m512i)v[d];
    uint32_t* to = tile + 4 * d * TILE_COLUMNS;
    _mm512_store_si512(to, (__m512i)lut.at<0>(codes));
    _mm512_store_si512(to + TILE_COLUMNS, (__m512i)lut.at<1>(codes));
    _mm512_store_si512(to + 2 * TILE_COLUMNS, (__m512i)lut.at<2>(codes));
    _mm512_store_si512(to + 3 * TILE_COLUMNS, (__m512i)lut.at<3>(codes));
  }
}

// out[i, 0:TILE_COLUMNS) += scales ∘ Σ over `steps` pairs, for M rows of x.
template <int M>
LK_INLINE void tile_rows(const uint32_t* x, const uint32_t* tile, int64_t steps, const float* scales, float* out,
                         int64_t out_stride, const __mmask16* live) {
  __m512 acc[M][2] = {};
  for (int64_t s = 0; s < steps; ++s) {
    __m512bh w0 = (__m512bh)_mm512_load_si512(tile + s * TILE_COLUMNS),
             w1 = (__m512bh)_mm512_load_si512(tile + s * TILE_COLUMNS + W);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      __m512bh pair = (__m512bh)_mm512_set1_epi32(int(x[i * (CODES_CHUNK / 2) + s]));
      acc[i][0] = _mm512_dpbf16_ps(acc[i][0], w0, pair);
      acc[i][1] = _mm512_dpbf16_ps(acc[i][1], w1, pair);
    }
  }
  __m512 s0 = _mm512_load_ps(scales), s1 = _mm512_load_ps(scales + W);
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
    float* o = out + i * out_stride;
    _mm512_mask_storeu_ps(o, live[0], _mm512_fmadd_ps(acc[i][0], s0, _mm512_maskz_loadu_ps(live[0], o)));
    _mm512_mask_storeu_ps(o + W, live[1], _mm512_fmadd_ps(acc[i][1], s1, _mm512_maskz_loadu_ps(live[1], o + W)));
  }
}

// `rows` rows of x, at most M of them.
template <int M>
LK_INLINE void tile_block(int rows, const uint32_t* x, const uint32_t* tile, int64_t steps, const float* scales,
                          float* out, int64_t out_stride, const __mmask16* live) {
  if constexpr (M > 1)
    if (rows < M) return tile_block<M - 1>(rows, x, tile, steps, scales, out, out_stride, live);
  tile_rows<M>(x, tile, steps, scales, out, out_stride, live);
}

void many_rows(const Codes& w, const Lut& lut, const PackedRows& packed, int64_t begin, int64_t end, float* out,
               int64_t out_stride, void* scratch) {
  int64_t chunks = chunks_of(w), g = whole_group(w), run = (g < CODES_CHUNK ? g : CODES_CHUNK) / 2;
  uint32_t* tile = (uint32_t*)scratch;
  float* scales = (float*)(tile + STEPS * TILE_COLUMNS);  // [groups, TILE_COLUMNS]
  for (int i = 0; i < packed.m; ++i) memset(out + i * out_stride, 0, (end - begin) * sizeof(float));
  for (int64_t n = begin; n < end; n += TILE_COLUMNS) {
    int64_t last = end - 1, left = end - n;
    __mmask16 live[2] = {__mmask16(left >= W ? 0xffff : (1u << left) - 1), __mmask16(left >= TILE_COLUMNS ? 0xffff
                                                                                     : left > W ? (1u << (left - W)) - 1
                                                                                                : 0)};
    for (int half = 0; half < 2; ++half)
      for (int64_t first = 0; first < w.groups; first += W) {
        int count = w.groups - first < W ? int(w.groups - first) : W;
        vf v[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          int64_t r = n + half * W + i;
          v[i] = (vf)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1),
                                           w.scales + (r < last ? r : last) * w.groups + first);
        }
        interleave(v);
        for (int i = 0; i < count; ++i) store(scales + (first + i) * TILE_COLUMNS + half * W, v[i] * lut.unit);
      }
    for (int64_t c = 0; c < chunks; ++c) {
      __mmask64 bytes = bytes_left(w, c);
      // The next tile's scales, all of them in as many steps as there are chunks.
      int64_t share = TILE_COLUMNS * w.groups / chunks;
      for (int64_t i = 0; i < share; i += 16) prefetch(w.scales, (n + TILE_COLUMNS) * w.groups + c * share + i);
      look_up(w, lut, n, last, c, bytes, tile);
      look_up(w, lut, n + W, last, c, bytes, tile + W);
      const uint32_t* x = (const uint32_t*)packed.data + c * packed.m * STEPS;
      for (int i = 0; i < packed.m; i += ROWS_AT_ONCE) {
        for (int64_t first = 0; first < STEPS; first += run) {
          int64_t group = (c * CODES_CHUNK + 2 * first) / g;
          if (group >= w.groups) break;
          tile_block<ROWS_AT_ONCE>(packed.m - i, x + i * STEPS + first, tile + first * TILE_COLUMNS, run,
                                   scales + group * TILE_COLUMNS, out + i * out_stride + n - begin, out_stride, live);
        }
      }
    }
  }
}

void product(const Codes& w, const PackedRows& packed, int64_t begin, int64_t end, float* out, int64_t out_stride,
             void* scratch) {
  if (!takes_dot(w, packed.rows.dtype)) {
    product_of_decoded(w, packed, begin, end, out, out_stride, scratch);
    return;
  }
  Lut lut(w.table);
  if (packed.m <= FEW)
    few_rows<FEW>(packed.m, w, lut, packed.data, begin, end, out, out_stride);
  else
    many_rows(w, lut, packed, begin, end, out, out_stride, scratch);
  if (!w.offsets) return;
  char* rest = (char*)scratch;
  Rows sums{packed.sums, DType::f32, w.groups, nullptr, 1};
  for (int64_t k = 0; k < w.groups; k += kPart) {
    int64_t stop = k + kPart < w.groups ? k + kPart : w.groups;
    Factor factor{w.offsets + begin * w.groups, DType::f32, int(end - begin), w.groups, 1};
    shrink_vectors(sums, packed.m, factor, k, stop, true, out, out_stride, rest);
  }
}

// dy W: lanes are columns of dx, even ones and odd ones apart, and pairs are of two rows of W, each number rounded to
// bf16 with its scale.

constexpr int64_t kGradColumns = 128;

bool takes_grad(const Codes& w, DType dtype) {
  return dtype == DType::bf16 && w.N > 0 && (w.group % TILE_COLUMNS == 0 || w.group >= w.K);
}

int64_t most_rows_of_grad(const Codes& w, DType dtype) { return takes_grad(w, dtype) ? kMostRows : 0; }

int64_t packed_grad_bytes(const Codes& w, DType, int m) {
  return (w.N + CODES_CHUNK - 1) / CODES_CHUNK * m * CODES_CHUNK * 2;
}

void pack_grad(const Codes& w, const PackedRows& packed, int first, int count) {
  for (int i = first; i < first + count; ++i) {
    const bf16* row = row_of<bf16>(packed.rows, i);
    for (int64_t n = 0; n < w.N; n += CODES_CHUNK) {
      char* to = packed.data + (n * packed.m + i * CODES_CHUNK) * 2;
      int64_t live = w.N - n < CODES_CHUNK ? w.N - n : CODES_CHUNK;
      memcpy(to, row + n, live * 2);
      memset(to + live * 2, 0, (CODES_CHUNK - live) * 2);
    }
  }
}

// Numbers k to k + 32 of a row of W, even ones and odd ones, as far as the masks say.
struct GradTile {
  int64_t at, group;
  __mmask32 live;
  __mmask16 pairs;

  GradTile() = default;
  GradTile(const Codes& w, int64_t k) : at(w.wide ? k : k / 2), group(k / w.group) {
    int64_t left = w.K - k < TILE_COLUMNS ? w.K - k : TILE_COLUMNS;
    live = __mmask32((uint64_t(1) << left) - 1);
    pairs = __mmask16((1u << (left + 1) / 2) - 1);
  }

  template <bool WIDE, bool OFFSETS>
  LK_INLINE void values(const Codes& w, const Table& table, int64_t n, vf (&v)[2]) const {
    const uint8_t* row = w.data + n * w.stride + at;
    if (WIDE) {
      __m256i bytes = _mm256_maskz_loadu_epi8(live, row);
      v[0] = (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
      v[1] = (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
      deinterleave(v);
    } else {
      vu bytes = (vu)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(pairs, row));
      v[0] = table(bytes >> 4);
      v[1] = table(bytes);
    }
    vf s = broadcast(w.scales[n * w.groups + group]);
    v[0] = v[0] * s, v[1] = v[1] * s;
    if (OFFSETS) {
      vf o = broadcast(w.offsets[n * w.groups + group]);
      v[0] = rounded(v[0]) + o, v[1] = rounded(v[1]) + o;
    }
  }
};

// The pairs of CODES_CHUNK rows of W from n on: tile[tiles, STEPS, 32].
template <bool WIDE, bool OFFSETS>
void look_up_pairs(const Codes& w, const Table& table, const GradTile* tiles, int count, int64_t n, __m512i in_turn,
                   uint32_t* tile) {
  for (int s = 0; s < STEPS && n + 2 * s < w.N; ++s) {
    int64_t a = n + 2 * s, b = a + 1 < w.N ? a + 1 : a;
    for (int i = 0; i < 2; ++i) {
      prefetch(w.data + tiles[0].at, (n + CODES_CHUNK + 2 * s + i) * w.stride);
      prefetch(w.scales + tiles[0].group, (n + CODES_CHUNK + 2 * s + i) * w.groups);
    }
    for (int t = 0; t < count; ++t) {
      vf u[2], v[2];
      tiles[t].values<WIDE, OFFSETS>(w, table, a, u);
      tiles[t].values<WIDE, OFFSETS>(w, table, b, v);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
        _mm512_store_si512(tile + (t * STEPS + s) * TILE_COLUMNS + i * W,
                           _mm512_permutexvar_epi16(in_turn, (__m512i)_mm512_cvtne2ps_pbh((__m512)v[i], (__m512)u[i])));
    }
  }
}

void grad_product(const Codes& w, const PackedRows& packed, int64_t begin, int64_t end, float* out, int64_t out_stride,
                  void* scratch) {
  uint32_t* tile = (uint32_t*)scratch;  // [columns / 32, STEPS, 32] pairs
  float* ones = (float*)(tile + kGradColumns * STEPS);
  float* sums = ones + TILE_COLUMNS;  // as the lanes have them
  for (int i = 0; i < TILE_COLUMNS; ++i) ones[i] = 1;
  const __mmask16 live[2] = {0xffff, 0xffff};
  uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = uint16_t(i / 2 + i % 2 * 16);
  const __m512i in_turn = _mm512_loadu_si512(order);
  const float nothing[16] = {};
  const Table table(w.table ? w.table : nothing);
  auto look_up = w.wide ? (w.offsets ? look_up_pairs<true, true> : look_up_pairs<true, false>)
                        : (w.offsets ? look_up_pairs<false, true> : look_up_pairs<false, false>);
  for (int64_t first = begin; first < end; first += kGradColumns) {
    int64_t columns = end - first < kGradColumns ? end - first : kGradColumns;
    int tiles = int((columns + TILE_COLUMNS - 1) / TILE_COLUMNS);
    GradTile of_tile[kGradColumns / TILE_COLUMNS];
    for (int t = 0; t < tiles; ++t) of_tile[t] = GradTile(w, first + t * TILE_COLUMNS);
    memset(sums, 0, packed.m * kGradColumns * sizeof(float));
    for (int64_t n = 0; n < w.N; n += CODES_CHUNK) {
      look_up(w, table, of_tile, tiles, n, in_turn, tile);
      const uint32_t* y = (const uint32_t*)(packed.data + n * packed.m * 2);
      int64_t steps = w.N - n < CODES_CHUNK ? (w.N - n + 1) / 2 : STEPS;
      for (int i = 0; i < packed.m; i += ROWS_AT_ONCE)
        for (int t = 0; t < tiles; ++t)
          tile_block<ROWS_AT_ONCE>(packed.m - i, y + i * STEPS, tile + t * STEPS * TILE_COLUMNS, steps, ones,
                                   sums + i * kGradColumns + t * TILE_COLUMNS, kGradColumns, live);
    }
    for (int i = 0; i < packed.m; ++i)
      for (int64_t k = 0; k < columns; k += TILE_COLUMNS) {
        float* from = sums + i * kGradColumns + k;
        vf v[2] = {load(from), load(from + W)};
        interleave(v);
        int64_t left = columns - k < TILE_COLUMNS ? columns - k : TILE_COLUMNS;
        store(from, v[0]), store(from + W, v[1]);
        memcpy(out + i * out_stride + first - begin + k, from, left * sizeof(float));
      }
  }
}

const QuantizedKernels quantized_dots{decode,
                                      {most_rows, packed_bytes, pack, product},
                                      {most_rows_of_grad, packed_grad_bytes, pack_grad, grad_product},
                                      round_sums};

}  // namespace
}  // namespace lora_kernels::LK_ISA
