// The `quantized` kernels as one vector source; a translation unit for each instruction set includes it after choosing
// its target (see vec.h).
#pragma once

#include "low_rank_kernels.h"
#include "quantized.h"

namespace lora_kernels::LK_ISA {
namespace {

typedef uint8_t vb __attribute__((vector_size(LK_WIDTH)));
typedef int8_t vsb __attribute__((vector_size(LK_WIDTH)));

// Keeps a product from being contracted with the sum that follows, for each is rounded.
LK_INLINE vf rounded(vf x) {
#if defined(__x86_64__) && LK_WIDTH == 16
  __asm__("" : "+v"(x));
#elif defined(__x86_64__)
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#else
  volatile vf kept = x;
  x = kept;
#endif
  return x;
}

// A table of 16 floats, looked up by the low four bits of each lane.
struct Table {
#if LK_WIDTH == 16
  __m512 all;
  explicit LK_INLINE Table(const float* p) : all(_mm512_loadu_ps(p)) {}
  LK_INLINE vf operator()(vu code) const { return (vf)_mm512_permutexvar_ps((__m512i)code, all); }
#elif LK_WIDTH == 8
  __m256 low, high;
  explicit LK_INLINE Table(const float* p) : low(_mm256_loadu_ps(p)), high(_mm256_loadu_ps(p + 8)) {}
  LK_INLINE vf operator()(vu code) const {
    __m256i at = (__m256i)code;
    return (vf)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at),
                                _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
  }
#else
  const float* values;
  explicit LK_INLINE Table(const float* p) : values(p) {}
  LK_INLINE vf operator()(vu code) const {
    vf v;
    for (int i = 0; i < W; ++i) v[i] = values[code[i] & 15];
    return v;
  }
#endif
};

LK_INLINE vu load_bytes(const uint8_t* p) {
#if LK_WIDTH == 16
  return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif LK_WIDTH == 8
  return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  vb b;
  memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, vu);
#endif
}

LK_INLINE vf load_int8(const uint8_t* p) {
#if LK_WIDTH == 16
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif LK_WIDTH == 8
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  vsb b;
  memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, vf);
#endif
}

LK_INLINE float one_value(const Codes& w, const uint8_t* row, int64_t k) {
  return w.wide ? float(int8_t(row[k])) : w.table[k % 2 ? row[k / 2] & 15 : row[k / 2] >> 4];
}

// Columns [begin, end) of a row, all of one group; OFFSET: there are offsets.
template <bool OFFSET, class T>
LK_INLINE void decode_run(const Codes& w, const uint8_t* row, int64_t begin, int64_t end, float scale, float offset,
                          T* out) {
  vf s = broadcast(scale), o = broadcast(offset);
  auto put = [&](T* to, vf value) LK_LAMBDA {
    vf product = value * s;
    if (OFFSET) product = rounded(product) + o;
    store(to, product);
  };
  auto put_one = [&](int64_t k) LK_LAMBDA {
    vf value{};
    value[0] = one_value(w, row, k);
    vf product = value * s;
    if (OFFSET) product = rounded(product) + o;
    store_n(out + k - begin, product, 1);
  };
  int64_t k = begin;
  if (w.wide) {
    for (; k + W <= end; k += W) put(out + k - begin, load_int8(row + k));
  } else {
    Table table(w.table);
    if (k % 2 && k < end) put_one(k++);
    for (; k + 2 * W <= end; k += 2 * W) {
      vu bytes = load_bytes(row + k / 2);
      vf v[2] = {table(bytes >> 4), table(bytes & 15)};
      interleave(v);
      put(out + k - begin, v[0]);
      put(out + k - begin + W, v[1]);
    }
  }
  for (; k < end; ++k) put_one(k);
}

template <bool OFFSET, class T>
LK_INLINE void decode_row(const Codes& w, int64_t n, int64_t column, int64_t columns, T* out) {
  const uint8_t* row = w.data + n * w.stride;
  const float *scales = w.scales + n * w.groups, *offsets = OFFSET ? w.offsets + n * w.groups : nullptr;
  int64_t end = column + columns;
  for (int64_t k = column; k < end;) {
    int64_t g = k / w.group, stop = (g + 1) * w.group < end ? (g + 1) * w.group : end;
    decode_run<OFFSET>(w, row, k, stop, scales[g], OFFSET ? offsets[g] : 0, out + k - column);
    k = stop;
  }
}

void decode(const Codes& w, int64_t row, int64_t rows, int64_t column, int64_t columns, void* out, DType dtype,
            int64_t out_stride) {
  with_type(dtype, [&](auto p) LK_LAMBDA {
    typedef typename element<decltype(p)>::type T;
    for (int64_t i = 0; i < rows; ++i) {
      T* to = (T*)out + i * out_stride;
      w.offsets ? decode_row<true>(w, row + i, column, columns, to)
                : decode_row<false>(w, row + i, column, columns, to);
    }
  });
}

int64_t most_rows_of_decoded(const Codes&, DType dtype) { return dtype == DType::f32 ? 64 : 16; }
int64_t none_packed(const Codes&, DType, int) { return 0; }
void pack_none(const Codes&, const PackedRows&, int, int) {}

// Rows of W decoded to floats, as many as stay in the first cache with those of x, and their dot products with x.
void product_of_decoded(const Codes& w, const PackedRows& x, int64_t begin, int64_t end, float* out, int64_t out_stride,
                        void* scratch) {
  constexpr int ROWS_OF_W = 4;
  float* tile = (float*)scratch;
  char* rest = (char*)(tile + ROWS_OF_W * kPart);
  for (int i = 0; w.K == 0 && i < x.m; ++i) memset(out + i * out_stride, 0, (end - begin) * sizeof(float));
  for (int64_t n = begin; n < end; n += ROWS_OF_W) {
    int rows = int(end - n < ROWS_OF_W ? end - n : ROWS_OF_W);
    for (int64_t k = 0; k < w.K; k += kPart) {
      int64_t stop = k + kPart < w.K ? k + kPart : w.K;
      decode(w, n, rows, k, stop - k, tile, DType::f32, kPart);
      Factor factor{tile - k, DType::f32, rows, kPart, 1};
      shrink_vectors(x.rows, x.m, factor, k, stop, k > 0, out + n - begin, out_stride, rest);
    }
  }
}

void round_sums(const float* sum, int64_t sum_stride, const float* bias, const Rows& y, int m, int64_t columns) {
  with_type(y.dtype, [&](auto p) LK_LAMBDA {
    typedef typename element<decltype(p)>::type Y;
    for (int i = 0; i < m; ++i) {
      Y* to = (Y*)row_of<Y>(y, i);
      const float* from = sum + i * sum_stride;
      for (int64_t n = 0; n < columns; n += W) {
        int live = columns - n < W ? int(columns - n) : W;
        vf v = live == W ? load(from + n) : load_n(from + n, live);
        if (bias) v = v + (live == W ? load(bias + n) : load_n(bias + n, live));
        live == W ? store(to + n, v) : store_n(to + n, v, live);
      }
    }
  });
}

int64_t no_rows(const Codes&, DType) { return 0; }

const QuantizedKernels quantized_vectors{
    decode, {most_rows_of_decoded, none_packed, pack_none, product_of_decoded}, {no_rows}, round_sums};

}  // namespace
}  // namespace lora_kernels::LK_ISA
