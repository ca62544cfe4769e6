// The kernels that a LoRA layer in training has besides those of `low_rank`: dropout from a seed, and what is done to
// the columns of y and dy. Included by each instruction set's translation unit.
#pragma once

#include "low_rank_kernels.h"

namespace lora_kernels::LK_ISA {
namespace {

// Lanes of 64 bits; Philox keeps a word in the low half of each, and what is above it means nothing.
constexpr int Q = W / 2;
typedef uint64_t vq __attribute__((vector_size(4 * LK_WIDTH)));
typedef uint16_t v2h __attribute__((vector_size(4 * LK_WIDTH)));

LK_INLINE vq broadcast(uint64_t x) { return vq{} + x; }

// The products of the lanes' low halves.
LK_INLINE vq multiply(vq a, vq b) {
#if LK_WIDTH == 16
  return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif LK_WIDTH == 8
  return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// Lanes of 64 bits of two vectors in turn, from half `at` of each.
template <int at, int... I>
LK_INLINE vi words_in_turn(vi a, vi b, indices<I...>) {
  return pick(a, b, indices<(at + I / 4 * 2 + I % 2 + I / 2 % 2 * W)...>{});
}

template <bool first, class A, class B>
struct select {
  typedef A type;
};
template <class A, class B>
struct select<false, A, B> {
  typedef B type;
};

// The 8 half words that Philox-4x32-7 makes of each of Q counters, lane by lane: reference/dropout.py says how.
LK_INLINE void philox(vq counter, uint64_t key, uint16_t (&out)[8 * Q]) {
  const vq m0 = broadcast(uint64_t(0xD2511F53)), m1 = broadcast(uint64_t(0xCD9E8D57));
  vq c0 = counter, c1 = counter >> 32, c2{}, c3{};
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma GCC unroll 7
  for (int round = 0; round < 7; ++round) {
    vq p0 = multiply(m0, c0), p1 = multiply(m1, c2);
    c0 = (p1 >> 32) ^ c1 ^ broadcast(uint64_t(k0));
    c2 = (p0 >> 32) ^ c3 ^ broadcast(uint64_t(k1));
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  vi first = (vi)((c0 & 0xffffffff) | c1 << 32), second = (vi)((c2 & 0xffffffff) | c3 << 32);
  typename make_indices<W>::type lanes;
  vi low = words_in_turn<0>(first, second, lanes), high = words_in_turn<W / 2>(first, second, lanes);
  memcpy(out, &low, sizeof low);
  memcpy(out + 2 * W, &high, sizeof high);
}

// The counters of row `row` from column `column` on, which is a multiple of 8.
LK_INLINE vq counters(const Dropout& dropout, int64_t row, int64_t column) {
  vq lanes;
  for (int q = 0; q < Q; ++q) lanes[q] = uint64_t(q);
  return lanes + (uint64_t(row) * uint64_t(dropout.blocks) + uint64_t(column / 8));
}

// All ones where a half word is at least t, zero elsewhere.
LK_INLINE void compare(uint16_t (&halves)[8 * Q], uint32_t t) {
  constexpr int LANES = sizeof(v2h) / sizeof(uint16_t);
#pragma GCC unroll 4
  for (int i = 0; i < 8 * Q; i += LANES) {
    v2h h;
    memcpy(&h, halves + i, sizeof h);
    h = (v2h)(h >= uint16_t(t));
    memcpy(halves + i, &h, sizeof h);
  }
}

// Keeps of 8 * Q elements those whose half word is all ones: zeros for the others.
template <class T>
LK_INLINE void keep_all(const T* x, const uint16_t* mask, T* out) {
  typedef typename select<sizeof(T) == 2, v2h, vu>::type V;
  constexpr int LANES = sizeof(V) / sizeof(T);
#pragma GCC unroll 4
  for (int i = 0; i < 8 * Q; i += LANES) {
    V v, kept;
    memcpy(&v, x + i, sizeof v);
    if constexpr (sizeof(T) == 2)
      memcpy(&kept, mask + i, sizeof kept);
    else
      kept = load_mask(mask + i);
    v &= kept;
    memcpy((void*)(out + i), &v, sizeof v);
  }
}

template <class T>
void drop_as(const Rows& x, int m, int64_t begin, int64_t end, const Dropout& dropout, int64_t first, T* out,
             int64_t out_stride, uint16_t* mask, int64_t mask_stride) {
  for (int i = 0; i < m; ++i) {
    const T* row = (const T*)x.data + i * x.stride;
    vq counter = counters(dropout, first + i, begin);
    for (int64_t k = 0; k < end - begin; k += 8 * Q, counter += Q) {
      uint16_t halves[8 * Q] = {};
      int count = end - begin - k < 8 * Q ? int(end - begin - k) : 8 * Q;
      if (dropout.threshold <= 0xffff) {
        philox(counter, dropout.key, halves);
        compare(halves, dropout.threshold);
      }
      if (mask) memcpy(mask + i * mask_stride + k, halves, count * sizeof(uint16_t));
      if (!out) continue;
      T* to = out + i * out_stride + k;
      for (int line = 0; line < 8 * Q; line += int(64 / sizeof(T))) prefetch(row + k + line, m * x.stride);
      if (count == 8 * Q)
        keep_all(row + k, halves, to);
      else
        for (int j = 0; j < count; ++j) to[j] = halves[j] ? row[k + j] : T{};
    }
  }
}

void drop(const Rows& x, int m, int64_t begin, int64_t end, const Dropout& dropout, int64_t first, void* out,
          int64_t out_stride, uint16_t* mask, int64_t mask_stride) {
  with_type(x.dtype, [&](auto xp) LK_LAMBDA {
    typedef typename element<decltype(xp)>::type X;
    drop_as<X>(x, m, begin, end, dropout, first, (X*)out, out_stride, mask, mask_stride);
  });
}

template <class Y>
void combine_as(const Rows& y, int m, int64_t columns, const float* add, int64_t add_stride, const Columns& of) {
  for (int i = 0; i < m; ++i) {
    Y* row = (Y*)y.data + i * y.stride;
    const Y* other = of.other.data ? (const Y*)of.other.data + i * of.other.stride : nullptr;
    const float* term = add + i * add_stride;
    auto step = [&](int64_t n, int live) LK_LAMBDA {
      auto floats = [&](const float* p) LK_LAMBDA { return live == W ? load(p + n) : load_n(p + n, live); };
      vf sum = live == W ? load(row + n) : load_n(row + n, live);
      if (of.scale) sum = sum * floats(of.scale);
      if (other) {
        vf z = live == W ? load(other + n) : load_n(other + n, live);
        sum = of.other_scale ? fma(z, floats(of.other_scale), sum) : sum + z;
      }
      sum = sum + floats(term);
      if (of.bias) sum = sum + floats(of.bias);
      live == W ? store(row + n, sum) : store_n(row + n, sum, live);
    };
    int64_t n = 0;
    for (; n + W <= columns; n += W) step(n, W);
    if (n < columns) step(n, int(columns - n));
  }
}

void combine(const Rows& y, int m, int64_t columns, const float* add, int64_t add_stride, const Columns& of) {
  with_type(y.dtype, [&](auto yp) LK_LAMBDA {
    typedef typename element<decltype(yp)>::type Y;
    combine_as<Y>(y, m, columns, add, add_stride, of);
  });
}

// N vectors of columns from n on; `live` of the last one.
template <int N, class Y>
LK_INLINE void column_grads_block(const Rows& dy, int m, int64_t n, int live, const float* scale, const Rows& dz,
                                  const Rows& y, const float* bias, float* t) {
  auto floats = [&](const float* p, int j)
                    LK_LAMBDA { return live == W ? load(p + n + j * W) : load_n(p + n + j * W, live); };
  vf c[N] = {}, b[N] = {}, sum[N] = {};
#pragma GCC unroll 2
  for (int j = 0; j < N; ++j) {
    if (scale) c[j] = floats(scale, j);
    if (bias) b[j] = floats(bias, j);
  }
  for (int i = 0; i < m; ++i) {
    const Y* in = (const Y*)dy.data + i * dy.stride + n;
    const Y* of = t ? (const Y*)y.data + i * y.stride + n : nullptr;
    Y* out = scale ? (Y*)dz.data + i * dz.stride + n : nullptr;
    if (t) prefetch(of, m * y.stride);
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) {
      auto elements = [&](const Y* p) LK_LAMBDA { return live == W ? load(p + j * W) : load_n(p + j * W, live); };
      vf g = elements(in);
      if (scale) live == W ? store(out + j * W, g * c[j]) : store_n(out + j * W, g * c[j], live);
      if (t) sum[j] = fma(g, elements(of) - b[j], sum[j]);
    }
  }
  if (!t) return;
#pragma GCC unroll 2
  for (int j = 0; j < N; ++j) {
    vf total = floats(t, j) + sum[j];
    float* p = t + n + j * W;
    live == W ? store(p, total) : store_n(p, total, live);
  }
}

template <class Y>
void column_grads_as(const Rows& dy, int m, int64_t columns, const float* scale, const Rows& dz, const Rows& y,
                     const float* bias, float* t) {
  int64_t n = 0;
  for (; n + 2 * W <= columns; n += 2 * W) column_grads_block<2, Y>(dy, m, n, W, scale, dz, y, bias, t);
  for (; n < columns; n += W) {
    int live = columns - n < W ? int(columns - n) : W;
    column_grads_block<1, Y>(dy, m, n, live, scale, dz, y, bias, t);
  }
}

void column_grads(const Rows& dy, int m, int64_t columns, const float* scale, const Rows& dz, const Rows& y,
                  const float* bias, float* t) {
  with_type(dy.dtype, [&](auto yp) LK_LAMBDA {
    typedef typename element<decltype(yp)>::type Y;
    column_grads_as<Y>(dy, m, columns, scale, dz, y, bias, t);
  });
}

template <class T>
void transpose_as(const T* in, int64_t in_stride, int64_t rows, int64_t columns, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; r += W) {
    int height = rows - r < W ? int(rows - r) : W;
    for (int64_t c = 0; c < columns; c += W) {
      int width = columns - c < W ? int(columns - c) : W;
      vf v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const T* p = in + (r + i) * in_stride + c;
        v[i] = i >= height ? vf{} : width == W ? load(p) : load_n(p, width);
      }
      interleave(v);
      for (int i = 0; i < width; ++i) {
        float* p = out + (c + i) * out_stride + r;
        height == W ? store(p, v[i]) : store_n(p, v[i], height);
      }
    }
  }
}

void transpose(const Rows& in, int64_t rows, int64_t columns, float* out, int64_t out_stride) {
  with_type(in.dtype, [&](auto p) LK_LAMBDA {
    typedef typename element<decltype(p)>::type T;
    transpose_as((const T*)in.data, in.stride, rows, columns, out, out_stride);
  });
}

}  // namespace
}  // namespace lora_kernels::LK_ISA
