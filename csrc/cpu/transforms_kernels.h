// The `transforms` and `spectral` kernels as one vector source; a translation unit for each instruction set includes it
// after choosing its target (see vec.h).
#pragma once

#include "low_rank_kernels.h"
#include "transforms.h"

namespace lora_kernels::LK_ISA {
namespace {

LK_INLINE vf at(const float* tile, int64_t place) { return load(tile + place * W); }
LK_INLINE void put(float* tile, int64_t place, vf v) { store(tile + place * W, v); }

void load_tile(const Rows& x, int m, int64_t columns, const Order& order, float* tile) {
  with_type(x.dtype, [&](auto p) LK_LAMBDA {
    typedef typename element<decltype(p)>::type X;
    for (int64_t c = 0; c < columns; c += W) {
      int live = columns - c < W ? int(columns - c) : W;
      vf v[W];
      for (int i = 0; i < W; ++i) {
        if (i >= m)
          v[i] = vf{};
        else if (live == W)
          v[i] = load(row_of<X>(x, i) + c);
        else
          v[i] = load_n(row_of<X>(x, i) + c, live);
      }
      interleave(v);
      for (int i = 0; i < live; ++i) put(tile, order.place(c + i, columns), v[i]);
    }
  });
  for (int64_t c = 0; order.shift && c < columns; ++c) put(tile, 2 * c + 1 - order.flip, vf{});
}

void store_tile(const float* tile, int m, int64_t columns, const Order& order, const Rows& out, const Rows* add) {
  with_type(out.dtype, [&](auto p) LK_LAMBDA {
    typedef typename element<decltype(p)>::type Y;
    for (int64_t c = 0; c < columns; c += W) {
      int live = columns - c < W ? int(columns - c) : W;
      vf v[W];
      for (int i = 0; i < W; ++i) v[i] = i < live ? at(tile, order.place(c + i, columns)) : vf{};
      deinterleave(v);
      for (int i = 0; i < m; ++i) {
        Y* to = (Y*)row_of<Y>(out, i) + c;
        if (live == W) {
          if (add) v[i] = v[i] + load(row_of<Y>(*add, i) + c);
          store(to, v[i]);
        } else {
          if (add) v[i] = v[i] + load_n(row_of<Y>(*add, i) + c, live);
          store_n(to, v[i], live);
        }
      }
    }
  });
}

// Butterflies of 2 * HALF neighbours among v[0 .. R).
template <int R>
LK_INLINE void sylvester(vf (&v)[R]) {
#pragma GCC unroll 4
  for (int half = 1; half < R; half *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      if (i & half) continue;
      vf a = v[i], b = v[i + half];
      v[i] = a + b;
      v[i + half] = a - b;
    }
  }
}

// H_R along the first axis of [R, step], read by `in` and written by `out`, which take a place.
template <int R, class In, class Out>
LK_INLINE void sylvester_pass(int64_t step, const In& in, const Out& out) {
  for (int64_t j = 0; j < step; ++j) {
    vf v[R];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) v[i] = in(i * step + j);
    sylvester(v);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) out(i * step + j, v[i]);
  }
}

constexpr int kRadix = W == 16 ? 16 : 8;

// H of up to kRadix numbers.
template <class In, class Out>
LK_INLINE void sylvester_few(int64_t length, const In& in, const Out& out) {
  switch (length) {
    case 1:
      return sylvester_pass<1>(1, in, out);
    case 2:
      return sylvester_pass<2>(1, in, out);
    case 4:
      return sylvester_pass<4>(1, in, out);
    case 8:
      return sylvester_pass<8>(1, in, out);
    default:
      return sylvester_pass<kRadix>(1, in, out);
  }
}

// H of a power of two of vectors from `place` on, largest steps first, so that what follows stays in nearer caches;
// `out` takes the last pass.
template <class Out>
void sylvester_all(float* tile, int64_t place, int64_t length, const Out& out) {
  auto in = [&](int64_t i) LK_LAMBDA { return at(tile, place + i); };
  if (length <= kRadix) return sylvester_few(length, in, [&](int64_t i, vf v) LK_LAMBDA { out(place + i, v); });
  int64_t step = length / kRadix;
  sylvester_pass<kRadix>(step, in, [&](int64_t i, vf v) LK_LAMBDA { put(tile, place + i, v); });
  for (int64_t i = 0; i < kRadix; ++i) sylvester_all(tile, place + i * step, step, out);
}

template <int HALF, int... I>
LK_INLINE vf lanes_level(vf v, indices<I...> all) {
  if constexpr (HALF == W) {
    return v;
  } else {
    constexpr vf sign = {(I & HALF ? -1.0f : 1.0f)...};
    return lanes_level<2 * HALF>(fma(v, sign, pick(v, v, indices<(I ^ HALF)...>{})), all);
  }
}
// H of the lanes of a vector.
LK_INLINE vf sylvester_lanes(vf v) { return lanes_level<1>(v, typename make_indices<W>::type{}); }

// to[r, j] = Σ H[r, k] from[k, j] for R rows from `row` on and B columns.
template <int R, int B>
LK_INLINE void base_block(const float* H, int64_t row_step, int64_t step, int64_t order, const float* from, float* to,
                          int64_t row, int64_t inner) {
  vf acc[R][B] = {};
  const float* h = H + row * row_step;
  for (int64_t k = 0; k < order; ++k) {
    vf in[B];
#pragma GCC unroll 4
    for (int j = 0; j < B; ++j) in[j] = at(from, k * B + j);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      vf sign = broadcast(h[r * row_step + k * step]);
#pragma GCC unroll 4
      for (int j = 0; j < B; ++j) acc[r][j] = fma(sign, in[j], acc[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < B; ++j) put(to, (row + r) * inner + j, acc[r][j]);
}

template <int B>
LK_INLINE void base_columns(const Hadamard::Base& base, bool transpose, float* tile, int64_t inner, float* copy) {
  constexpr int R = W == 16 ? 6 : 3;
  int64_t K = base.order, row_step = transpose ? 1 : K, step = transpose ? K : 1;
  for (int64_t k = 0; k < K; ++k)
    for (int j = 0; j < B; ++j) put(copy, k * B + j, at(tile, k * inner + j));
  int64_t row = 0;
  for (; row + R <= K; row += R) base_block<R, B>(base.entries, row_step, step, K, copy, tile, row, inner);
  for (; row < K; ++row) base_block<1, B>(base.entries, row_step, step, K, copy, tile, row, inner);
}

// The bases along their axes of [.., order, .., power] vectors; inner: how many a number of H's has after the bases.
void hadamard_bases(float* tile, const Hadamard& H, int64_t inner, bool transpose, void* scratch) {
  int64_t length = inner;
  for (int b = 0; b < H.count; ++b) length *= H.bases[b].order;
  int64_t step = length;
  for (int b = 0; b < H.count; ++b) {
    int64_t order = H.bases[b].order;
    step /= order;
    for (int64_t first = 0; first < length; first += order * step) {
      int64_t j = first;
      for (; j + 4 <= first + step; j += 4) base_columns<4>(H.bases[b], transpose, tile + j * W, step, (float*)scratch);
      for (; j < first + step; ++j) base_columns<1>(H.bases[b], transpose, tile + j * W, step, (float*)scratch);
    }
  }
}

void hadamard_tile(float* tile, const Hadamard& H, bool transpose, float scale, void* scratch) {
  hadamard_bases(tile, H, H.power, transpose, scratch);
  for (int64_t i = 0; i < H.length; i += H.power)
    sylvester_all(tile, i, H.power, [&](int64_t place, vf v) LK_LAMBDA { put(tile, place, v * scale); });
}

void hadamard_rows(const Rows& x, const Rows& y, int m, const Hadamard& H, bool transpose, float scale, float* room,
                   void* scratch) {
  int64_t vectors = H.length / W, power = H.power / W;
  with_type(x.dtype, [&](auto p) LK_LAMBDA {
    typedef typename element<decltype(p)>::type X;
    for (int i = 0; i < m; ++i) {
      const X* from = row_of<X>(x, i);
      X* to = (X*)row_of<X>(y, i);
      auto in = [&](int64_t place) LK_LAMBDA {
        prefetch(from + place * W, x.stride);
        return sylvester_lanes(load(from + place * W));
      };
      auto out = [&](int64_t place, vf v) LK_LAMBDA { store(to + place * W, v * scale); };
      if (H.count || power <= kRadix) {
        if (!H.count) {
          sylvester_few(power, in, out);
          continue;
        }
        for (int64_t place = 0; place < vectors; ++place) put(room, place, in(place));
        hadamard_bases(room, H, power, transpose, scratch);
        for (int64_t place = 0; place < vectors; place += power) sylvester_all(room, place, power, out);
      } else {
        int64_t step = power / kRadix;
        sylvester_pass<kRadix>(step, in, [&](int64_t place, vf v) LK_LAMBDA { put(room, place, v); });
        for (int64_t block = 0; block < kRadix; ++block) sylvester_all(room, block * step, step, out);
      }
    }
  });
}

struct Complex {
  vf re, im;
};
LK_INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
LK_INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
LK_INLINE Complex times_minus_i(Complex a) { return {a.im, -a.re}; }
// a (c + i s)
LK_INLINE Complex turned(Complex a, vf c, vf s) { return {fma(a.re, c, -(a.im * s)), fma(a.re, s, a.im * c)}; }
LK_INLINE Complex complex_at(const float* tile, int64_t place) {
  return {at(tile, 2 * place), at(tile, 2 * place + 1)};
}
LK_INLINE void put(float* tile, int64_t place, Complex z) {
  put(tile, 2 * place, z.re);
  put(tile, 2 * place + 1, z.im);
}

// The Fourier transform of P numbers; of an odd P with `roots`, (cos, sin) of 2π j / P.
template <int P>
LK_INLINE void butterfly(Complex (&a)[P], const float* roots) {
  if constexpr (P == 2) {
    Complex b = a[1];
    a[1] = a[0] - b, a[0] = a[0] + b;
  } else if constexpr (P == 4) {
    Complex s = a[0] + a[2], d = a[0] - a[2], t = a[1] + a[3], e = times_minus_i(a[1] - a[3]);
    a[0] = s + t, a[1] = d + e, a[2] = s - t, a[3] = d - e;
  } else if constexpr (P == 8) {
    Complex even[4] = {a[0] + a[4], a[1] + a[5], a[2] + a[6], a[3] + a[7]};
    Complex odd[4] = {a[0] - a[4], a[1] - a[5], a[2] - a[6], a[3] - a[7]};
    constexpr float h = 0.70710678118654752440f;
    odd[1] = {(odd[1].re + odd[1].im) * h, (odd[1].im - odd[1].re) * h};
    odd[2] = times_minus_i(odd[2]);
    odd[3] = {(odd[3].im - odd[3].re) * h, (odd[3].re + odd[3].im) * -h};
    butterfly<4>(even, roots);
    butterfly<4>(odd, roots);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) a[2 * i] = even[i], a[2 * i + 1] = odd[i];
  } else {
    constexpr int H = (P - 1) / 2;
    Complex sums[H], differences[H], first = a[0];
#pragma GCC unroll 8
    for (int j = 0; j < H; ++j) {
      sums[j] = a[j + 1] + a[P - 1 - j];
      differences[j] = a[j + 1] - a[P - 1 - j];
      a[0] = a[0] + sums[j];
    }
#pragma GCC unroll 8
    for (int k = 1; k <= H; ++k) {
      Complex s = first, d = {};
#pragma GCC unroll 8
      for (int j = 0; j < H; ++j) {
        int at = k * (j + 1) % P;
        vf cos = broadcast(roots[2 * at]), sin = broadcast(roots[2 * at + 1]);
        s = {fma(sums[j].re, cos, s.re), fma(sums[j].im, cos, s.im)};
        d = {fma(differences[j].im, sin, d.re), fma(-differences[j].re, sin, d.im)};
      }
      a[k] = s + d, a[P - k] = s - d;
    }
  }
}

// One pass of Stockham's transform: `groups` butterflies, the numbers of each `stride * groups` apart, `stride` of them
// side by side with the same twiddles.
template <int P>
void pass(const float* in, float* out, int64_t groups, int64_t stride, const float* twiddles, const float* roots) {
  for (int64_t p = 0; p < groups; ++p) {
    const float* w = twiddles + p * 2 * (P - 1);
    for (int64_t q = 0; q < stride; ++q) {
      Complex a[P];
#pragma GCC unroll 16
      for (int j = 0; j < P; ++j) a[j] = complex_at(in, q + stride * (p + groups * j));
      butterfly<P>(a, roots);
      put(out, q + stride * P * p, a[0]);
#pragma GCC unroll 16
      for (int j = 1; j < P; ++j)
        put(out, q + stride * (P * p + j), p ? turned(a[j], broadcast(w[2 * j - 2]), broadcast(w[2 * j - 1])) : a[j]);
    }
  }
}

// The same for any odd radix, its numbers in scratch.
void long_pass(int64_t P, const float* in, float* out, int64_t groups, int64_t stride, const float* twiddles,
               const float* roots, void* scratch) {
  int64_t H = (P - 1) / 2;
  float *sums = (float*)scratch, *differences = sums + 2 * H * W;
  for (int64_t p = 0; p < groups; ++p) {
    const float* w = twiddles + p * 2 * (P - 1);
    auto finish = [&](int64_t q, int64_t k, Complex z) LK_LAMBDA {
      if (p) z = turned(z, broadcast(w[2 * k - 2]), broadcast(w[2 * k - 1]));
      put(out, q + stride * (P * p + k), z);
    };
    for (int64_t q = 0; q < stride; ++q) {
      Complex first = complex_at(in, q + stride * p), total = first;
      for (int64_t j = 0; j < H; ++j) {
        Complex a = complex_at(in, q + stride * (p + groups * (j + 1)));
        Complex b = complex_at(in, q + stride * (p + groups * (P - 1 - j)));
        put(sums, j, a + b);
        put(differences, j, a - b);
        total = total + (a + b);
      }
      put(out, q + stride * P * p, total);
      for (int64_t k = 1; k <= H; ++k) {
        Complex s = first, d = {};
        for (int64_t j = 0, at = k; j < H; ++j, at = at + k < P ? at + k : at + k - P) {
          vf cos = broadcast(roots[2 * at]), sin = broadcast(roots[2 * at + 1]);
          Complex a = complex_at(sums, j), b = complex_at(differences, j);
          s = {fma(a.re, cos, s.re), fma(a.im, cos, s.im)};
          d = {fma(b.im, sin, d.re), fma(-b.re, sin, d.im)};
        }
        finish(q, k, s + d);
        finish(q, P - k, s - d);
      }
    }
  }
}

void complex_fourier(Tile& tile, const Fourier& f, void* scratch) {
  const float *twiddles = f.twiddles, *roots = f.roots;
  int64_t left = f.complex_length, stride = 1;
  for (int i = 0; i < f.passes; ++i) {
    int P = f.radix[i];
    left /= P;
    switch (P) {
      case 2:
        pass<2>(tile.now, tile.other, left, stride, twiddles, nullptr);
        break;
      case 3:
        pass<3>(tile.now, tile.other, left, stride, twiddles, roots);
        break;
      case 4:
        pass<4>(tile.now, tile.other, left, stride, twiddles, nullptr);
        break;
      case 5:
        pass<5>(tile.now, tile.other, left, stride, twiddles, roots);
        break;
      case 7:
        pass<7>(tile.now, tile.other, left, stride, twiddles, roots);
        break;
      case 8:
        pass<8>(tile.now, tile.other, left, stride, twiddles, nullptr);
        break;
      default:
        long_pass(P, tile.now, tile.other, left, stride, twiddles, roots, scratch);
    }
    float* made = tile.other;
    tile.other = tile.now, tile.now = made;
    twiddles += left * 2 * (P - 1);
    stride *= P;
    if (P % 2) roots += 2 * P;
  }
}

// A form's numbers k and N - k of a row's cosine and sine k, each times `rest`, and back.
template <Form FORM>
LK_INLINE void to_form(const Fourier& f, int64_t k, vf cosine, vf sine, float rest, float* out) {
  int64_t other = f.length - k;
  if constexpr (FORM == Form::fourier) {
    put(out, k, cosine * rest);
    put(out, other, sine * rest);
  } else if constexpr (FORM == Form::hartley) {
    put(out, k, (cosine + sine) * rest);
    put(out, other, (cosine - sine) * rest);
  } else {
    vf c = broadcast(f.quarters[2 * k] * rest), s = broadcast(f.quarters[2 * k + 1] * rest);
    put(out, k, fma(cosine, c, -(sine * s)));
    put(out, other, fma(cosine, s, sine * c));
  }
}

template <Form FORM>
LK_INLINE Complex from_form(const Fourier& f, int64_t k, float rest, const float* in) {
  vf a = at(in, k), b = at(in, f.length - k);
  if constexpr (FORM == Form::fourier) {
    return {a * rest, b * rest};
  } else if constexpr (FORM == Form::hartley) {
    return {(a + b) * rest, (a - b) * rest};
  } else {
    vf c = broadcast(f.quarters[2 * k] * rest), s = broadcast(f.quarters[2 * k + 1] * rest);
    return {fma(a, c, b * s), fma(b, c, -(a * s))};
  }
}

constexpr float kRootOfHalf = 0.70710678118654752440f;

template <Form FORM>
void trigonometric_form(Tile& tile, const Fourier& f, float first, float rest) {
  int64_t N = f.length, n = f.complex_length;
  const float* in = tile.now;
  float* out = tile.other;
  Complex z = complex_at(in, 0);
  if (N % 2) {
    put(out, 0, z.re * first);
    for (int64_t k = 1; k <= N / 2; ++k) {
      Complex z = complex_at(in, k);
      to_form<FORM>(f, k, z.re, -z.im, rest, out);
    }
  } else {
    put(out, 0, (z.re + z.im) * first);
    put(out, n, (z.re - z.im) * (FORM == Form::cosine ? rest * kRootOfHalf : rest));
    for (int64_t k = 1; 2 * k < n; ++k) {
      Complex a = complex_at(in, k), b = complex_at(in, n - k);
      vf even_re = a.re + b.re, even_im = a.im - b.im, odd_re = a.im + b.im, odd_im = b.re - a.re;
      vf c = broadcast(f.halves[2 * k]), s = broadcast(f.halves[2 * k + 1]);
      vf re = fma(odd_re, c, odd_im * s), im = fma(odd_im, c, -(odd_re * s));
      to_form<FORM>(f, k, even_re + re, -(even_im + im), rest / 2, out);
      to_form<FORM>(f, n - k, even_re - re, even_im - im, rest / 2, out);
    }
    if (n % 2 == 0 && n > 1) {
      Complex z = complex_at(in, n / 2);
      to_form<FORM>(f, n / 2, z.re, z.im, rest, out);
    }
  }
  tile.other = tile.now, tile.now = out;
}

// What is put in place of a number of the complex transform, whose conjugate gives the inverse: (im, re).
LK_INLINE void put_flipped(float* tile, int64_t place, vf re, vf im) { put(tile, place, Complex{im, re}); }

template <Form FORM>
void transposed_form(Tile& tile, const Fourier& f, float first, float rest) {
  int64_t N = f.length, n = f.complex_length;
  const float* in = tile.now;
  float* out = tile.other;
  vf zero = at(in, 0) * first;
  if (N % 2) {
    put_flipped(out, 0, zero, vf{});
    for (int64_t k = 1; k <= N / 2; ++k) {
      Complex z = from_form<FORM>(f, k, rest, in);
      put_flipped(out, k, z.re, -z.im);
      put_flipped(out, N - k, vf{}, vf{});
    }
  } else {
    vf middle = at(in, n) * (FORM == Form::cosine ? rest * kRootOfHalf : rest);
    put_flipped(out, 0, zero + middle, zero - middle);
    for (int64_t k = 1; 2 * k < n; ++k) {
      Complex a = from_form<FORM>(f, k, rest / 2, in), b = from_form<FORM>(f, n - k, rest / 2, in);
      vf even_re = a.re + b.re, even_im = b.im - a.im, re = a.re - b.re, im = -(a.im + b.im);
      vf c = broadcast(f.halves[2 * k]), s = broadcast(f.halves[2 * k + 1]);
      vf odd_re = fma(re, c, -(im * s)), odd_im = fma(re, s, im * c);
      put_flipped(out, k, even_re - odd_im, even_im + odd_re);
      put_flipped(out, n - k, even_re + odd_im, odd_re - even_im);
    }
    if (n % 2 == 0 && n > 1) {
      Complex z = from_form<FORM>(f, n / 2, rest, in);
      put_flipped(out, n / 2, z.re, z.im);
    }
  }
  tile.other = tile.now, tile.now = out;
}

void trigonometric_tile(Tile& tile, const Fourier& f, Form form, float first, float rest, void* scratch) {
  complex_fourier(tile, f, scratch);
  switch (form) {
    case Form::fourier:
      return trigonometric_form<Form::fourier>(tile, f, first, rest);
    case Form::cosine:
      return trigonometric_form<Form::cosine>(tile, f, first, rest);
    case Form::hartley:
      return trigonometric_form<Form::hartley>(tile, f, first, rest);
  }
}

void transposed_tile(Tile& tile, const Fourier& f, Form form, float first, float rest, void* scratch) {
  switch (form) {
    case Form::fourier:
      transposed_form<Form::fourier>(tile, f, first, rest);
      break;
    case Form::cosine:
      transposed_form<Form::cosine>(tile, f, first, rest);
      break;
    case Form::hartley:
      transposed_form<Form::hartley>(tile, f, first, rest);
  }
  complex_fourier(tile, f, scratch);
}

void haar_tile(Tile& tile, int64_t N, bool transpose) {
  float *t = tile.now, *copy = tile.other;
  int64_t half = N / 2, rest = N - half;
  if (transpose) {
    memcpy(copy, t, rest * W * sizeof(float));
    for (int64_t j = 0; j < half; ++j) {
      vf a = at(copy, j), b = at(t, rest + j);
      put(t, 2 * j, (a + b) * kRootOfHalf);
      put(t, 2 * j + 1, (a - b) * kRootOfHalf);
    }
    if (N % 2) put(t, N - 1, at(copy, half));
  } else {
    for (int64_t j = 0; j < half; ++j) {
      vf a = at(t, 2 * j), b = at(t, 2 * j + 1);
      put(t, j, (a + b) * kRootOfHalf);
      put(copy, j, (a - b) * kRootOfHalf);
    }
    if (N % 2) put(t, half, at(t, N - 1));
    memcpy(t + rest * W, copy, half * W * sizeof(float));
  }
}

void multiply_sparse(const Sparse& sparse, const float* weights, const float* in, float* out) {
  for (int64_t r = 0; r < sparse.rows; ++r) {
    int64_t e = sparse.starts[r], end = sparse.starts[r + 1];
    vf sums[4] = {};
    auto add = [&](int64_t i, vf& sum) LK_LAMBDA { sum = fma(broadcast(weights[i]), at(in, sparse.columns[i]), sum); };
    for (; e + 4 <= end; e += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) add(e + i, sums[i]);
    for (; e < end; ++e) add(e, sums[0]);
    put(out, r, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}

void multiply_each_lane(const Sparse& sparse, const int32_t* coefficients, const float* weights, const float* in,
                        float* out) {
  for (int64_t r = 0; r < sparse.rows; ++r) {
    vf sum = {};
    for (int64_t e = sparse.starts[r]; e < sparse.starts[r + 1]; ++e) {
      int32_t c = coefficients[e];
      vf weight = c < 0 ? -at(weights, ~c) : at(weights, c);
      sum = fma(weight, at(in, sparse.columns[e]), sum);
    }
    put(out, r, sum);
  }
}

void scale_each_lane(float* tile, int64_t count, const float* scales) {
  vf scale = load(scales);
  vi live = scale != vf{};
  for (int64_t i = 0; i < count; ++i) put(tile, i, (vf)((vi)(at(tile, i) * scale) & live));
}

void products_of_entries(const Sparse& sparse, const float* rows, const float* columns, float* sums) {
  for (int64_t e = 0; e < sparse.count; e += W) {
    int live = sparse.count - e < W ? int(sparse.count - e) : W;
    auto product = [&](int64_t i) LK_LAMBDA { return at(rows, sparse.row_of[i]) * at(columns, sparse.columns[i]); };
    vf v[W] = {};
    if (live == W) {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[reversed_bits(i, W)] = product(e + i);
      store(sums + e, load((const float*)sums + e) + reduce_all(v));
    } else {
      for (int i = 0; i < live; ++i) v[reversed_bits(i, W)] = product(e + i);
      store_n(sums + e, load_n((const float*)sums + e, live) + reduce_all(v), live);
    }
  }
}

}  // namespace

extern const TransformKernels transforms{
    W,
    load_tile,
    store_tile,
    hadamard_tile,
    hadamard_rows,
    trigonometric_tile,
    transposed_tile,
    haar_tile,
    multiply_sparse,
    multiply_each_lane,
    scale_each_lane,
    products_of_entries,
};

}  // namespace lora_kernels::LK_ISA
