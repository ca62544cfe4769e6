// The `low_rank` kernels as one vector source; a translation unit for each instruction set includes it after choosing
// its target (see vec.h). Each sum runs in one order whatever the number of rows, so a row does not feel its batch.
#pragma once

#include "vec.h"

namespace lora_kernels::LK_ISA {
namespace {

// Registers: accumulators are ROWS x 4 vectors.
constexpr int ROWS = W == 16 ? 4 : 2;

template <class T>
LK_INLINE const T* row_of(const Rows& rows, int64_t i) {
  return (const T*)rows.data + rows.row(i) * rows.stride;
}

// Call f with a null pointer of the element type.
template <class F>
LK_INLINE void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f((const float*)nullptr);
    case DType::bf16:
      return f((const bf16*)nullptr);
    case DType::f16:
      return f((const f16*)nullptr);
  }
}

// One step of a dot product: acc += x · a over STEP elements.
template <class X, class A>
struct Dot {
  static constexpr int STEP = W;
  typedef vf In;
  static LK_INLINE vf load_x(const X* p) { return load(p); }
  static LK_INLINE vf load_a(const A* p) { return load(p); }
  static LK_INLINE vf step(vf acc, vf x, vf a) { return fma(x, a, acc); }
};

// Pairs of bf16: the even elements, then the odd ones, without widening loads.
template <>
struct Dot<bf16, bf16> {
  static constexpr int STEP = 2 * W;
  typedef vu In;
  static LK_INLINE vu load_x(const bf16* p) {
    vu v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static LK_INLINE vu load_a(const bf16* p) { return load_x(p); }
  static LK_INLINE vf step(vf acc, vu x, vu a) {
    acc = fma((vf)(x << 16), (vf)(a << 16), acc);
    return fma((vf)(x & 0xffff0000), (vf)(a & 0xffff0000), acc);
  }
};

// M rows of x against N contiguous rows of A.
template <int M, int N, class X, class A>
LK_INLINE void dot_block(const X* const* x, const A* a, int64_t a_stride, int64_t length, bool add, float* v,
                         int64_t v_stride) {
  typedef Dot<X, A> D;
  vf acc[M][N] = {};
  auto step = [&](const X* const* xs, int64_t at, const A* as, int64_t stride) LK_LAMBDA {
    typename D::In xv[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) xv[i] = D::load_x(xs[i] + at);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      typename D::In av = D::load_a(as + j * stride);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) acc[i][j] = D::step(acc[i][j], xv[i], av);
    }
  };
  int64_t k = 0;
  for (; k + D::STEP <= length; k += D::STEP) step(x, k, a + k, a_stride);
  if (k < length) {
    int rest = int(length - k);
    X xt[M][D::STEP] = {};
    A at[N][D::STEP] = {};
    const X* xp[M];
    for (int i = 0; i < M; ++i) {
      memcpy(xt[i], x[i] + k, rest * sizeof(X));
      xp[i] = xt[i];
    }
    for (int j = 0; j < N; ++j) memcpy(at[j], a + j * a_stride + k, rest * sizeof(A));
    step(xp, 0, at[0], D::STEP);
  }
  constexpr int GROUP = M * N < W ? M * N : W;
#pragma GCC unroll 8
  for (int first = 0; first < M * N; first += GROUP) {
    vf group[GROUP];
#pragma GCC unroll 16
    for (int i = 0; i < GROUP; ++i) group[reversed_bits(i, GROUP)] = acc[(first + i) / N][(first + i) % N];
    float sums[W];
    store(sums, reduce_all(group));
#pragma GCC unroll 16
    for (int i = 0; i < GROUP; ++i) {
      float* out = v + (first + i) / N * v_stride + (first + i) % N;
      *out = add ? *out + sums[i] : sums[i];
    }
  }
}

template <int M, class X, class A>
LK_INLINE void dot_rows(const X* const* x, const Factor& factor, int64_t begin, int64_t length, bool add, float* v,
                        int64_t v_stride) {
  const A* a = (const A*)factor.data + begin;
  int j = 0;
  for (; j + 4 <= factor.rank; j += 4)
    dot_block<M, 4>(x, a + j * factor.rank_stride, factor.rank_stride, length, add, v + j, v_stride);
  for (; j < factor.rank; ++j)
    dot_block<M, 1>(x, a + j * factor.rank_stride, factor.rank_stride, length, add, v + j, v_stride);
}

// A with contiguous rows (A as LoRA stores it): dot products.
template <class X, class A>
void shrink_dot(const Rows& x, int m, const Factor& factor, int64_t begin, int64_t end, bool add, float* v,
                int64_t v_stride) {
  int64_t length = end - begin;
  int i = 0;
  const X* rows[ROWS];
  for (; i + ROWS <= m; i += ROWS) {
    for (int k = 0; k < ROWS; ++k) rows[k] = row_of<X>(x, i + k) + begin;
    dot_rows<ROWS, X, A>(rows, factor, begin, length, add, v + i * v_stride, v_stride);
  }
  for (; i < m; ++i) {
    rows[0] = row_of<X>(x, i) + begin;
    dot_rows<1, X, A>(rows, factor, begin, length, add, v + i * v_stride, v_stride);
  }
}

// ROWS rows of a matrix widened to floats, in scratch.
template <class X>
LK_INLINE void widen(const X* p, int64_t length, float* out) {
  int64_t k = 0;
  for (; k + W <= length; k += W) store(out + k, load(p + k));
  if (k < length) store_n(out + k, load_n(p + k, int(length - k)), int(length - k));
}

// out[i, 0:W) (+)= Σ_k x[i, k] a[k, 0:W) for M rows, `live` of the W columns.
template <int M, class A>
LK_INLINE void axpy_block(const float* x, int64_t x_stride, const A* a, int64_t a_stride, int64_t length, int live,
                          bool add, float* v, int64_t v_stride) {
  vf acc[M] = {};
  for (int64_t k = 0; k < length; ++k) {
    vf av = live == W ? load(a + k * a_stride) : load_n(a + k * a_stride, live);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) acc[i] = fma(broadcast(x[i * x_stride + k]), av, acc[i]);
  }
  for (int i = 0; i < M; ++i) {
    float* out = v + i * v_stride;
    vf before = add ? (live == W ? load(out) : load_n(out, live)) : vf{};
    vf sum = add ? before + acc[i] : acc[i];
    live == W ? store(out, sum) : store_n(out, sum, live);
  }
}

// A with contiguous ranks (a transposed factor, as gradients use them).
template <class X, class A>
void shrink_axpy(const Rows& x, int m, const Factor& factor, int64_t begin, int64_t end, bool add, float* v,
                 int64_t v_stride, void* scratch) {
  constexpr int M = 8;
  int64_t length = end - begin;
  float* wide = (float*)scratch;
  for (int i = 0; i < m; i += M) {
    int rows = m - i < M ? m - i : M;
    for (int k = 0; k < rows; ++k) widen(row_of<X>(x, i + k) + begin, length, wide + k * kPart);
    for (int j = 0; j < factor.rank; j += W) {
      int live = factor.rank - j < W ? factor.rank - j : W;
      const A* a = (const A*)factor.data + begin * factor.stride + j;
      float* out = v + i * v_stride + j;
      if (rows == M) {
        axpy_block<M>(wide, kPart, a, factor.stride, length, live, add, out, v_stride);
      } else {
        for (int k = 0; k < rows; ++k)
          axpy_block<1>(wide + k * kPart, kPart, a, factor.stride, length, live, add, out + k * v_stride, v_stride);
      }
    }
  }
}

void shrink_vectors(const Rows& x, int m, const Factor& A, int64_t begin, int64_t end, bool add, float* v,
                    int64_t v_stride, void* scratch) {
  with_type(x.dtype, [&](auto xp) LK_LAMBDA {
    with_type(A.dtype, [&](auto ap) LK_LAMBDA {
      typedef typename element<decltype(xp)>::type X;
      typedef typename element<decltype(ap)>::type T;
      if (A.stride == 1)
        shrink_dot<X, T>(x, m, A, begin, end, add, v, v_stride);
      else
        shrink_axpy<X, T>(x, m, A, begin, end, add, v, v_stride, scratch);
    });
  });
}

// What a product is added to: everywhere, or where the mask is all ones (of whole vectors, though the last may be cut).
struct Everywhere {
  LK_INLINE Everywhere from(int64_t, int64_t) const { return {}; }
  LK_INLINE vf operator()(vf sum, int64_t, int64_t) const { return sum; }
};
struct Kept {
  const uint16_t* mask;
  int64_t stride;
  LK_INLINE Kept from(int64_t row, int64_t column) const { return {mask + row * stride + column, stride}; }
  LK_INLINE vf operator()(vf sum, int64_t row, int64_t column) const {
    return (vf)((vu)sum & load_mask(mask + row * stride + column));
  }
};

// y[i, n] += Σ_j v[i, j] b[j, n] for M rows and N vectors of columns.
template <int M, int N, class Where, class Y, class T>
LK_INLINE void expand_block(Y* const* y, const float* v, int64_t v_stride, const T* b, int64_t b_stride, int rank,
                            int last, Where where) {
  vf acc[M][N] = {};
  for (int j = 0; j < rank; ++j) {
    vf bv[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const T* p = b + j * b_stride + n * W;
      bv[n] = n + 1 < N || last == W ? load(p) : load_n(p, last);
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      vf s = broadcast(v[i * v_stride + j]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[i][n] = fma(s, bv[n], acc[i][n]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      Y* p = y[i] + n * W;
      vf sum = where(acc[i][n], i, n * W);
      if (n + 1 < N || last == W)
        store(p, load(p) + sum);
      else
        store_n(p, load_n(p, last) + sum, last);
    }
}

// B with contiguous columns: [rank, N] rows of b, columns [0, count) of y's rows starting at `begin`.
template <class Y, class T, class Where>
LK_INLINE void expand_columns(const Rows& y, int m, const float* v, int64_t v_stride, const T* b, int64_t b_stride,
                              int rank, int64_t begin, int64_t count, Where where) {
  Y* rows[ROWS];
  for (int i = 0; i < m; i += ROWS) {
    int live = m - i < ROWS ? m - i : ROWS;
    const float* vi = v + i * v_stride;
    for (int64_t n = 0; n < count;) {
      for (int k = 0; k < live; ++k) rows[k] = (Y*)row_of<Y>(y, i + k) + begin + n;
      int64_t left = count - n;
      if (W == 16 && live == ROWS && left >= 4 * W) {
        expand_block<ROWS, 4>(rows, vi, v_stride, b + n, b_stride, rank, W, where.from(i, n));
        n += 4 * W;
        continue;
      }
      if (live == ROWS && left >= 2 * W) {
        expand_block<ROWS, 2>(rows, vi, v_stride, b + n, b_stride, rank, W, where.from(i, n));
        n += 2 * W;
        continue;
      }
      int last = left < W ? int(left) : W;
      if (live == ROWS)
        expand_block<ROWS, 1>(rows, vi, v_stride, b + n, b_stride, rank, last, where.from(i, n));
      else
        for (int k = 0; k < live; ++k)
          expand_block<1, 1>(rows + k, vi + k * v_stride, v_stride, b + n, b_stride, rank, last, where.from(i + k, n));
      n += W;
    }
  }
}

// b[n, j] for n < columns (at most W) and j < rank to t[j * stride + n], floats.
template <class T>
LK_INLINE void transpose_to_floats(const T* b, int64_t b_stride, int columns, int rank, float* t, int64_t stride) {
  for (int j = 0; j < rank; j += W) {
    int live = rank - j < W ? rank - j : W;
    vf v[W];
    for (int n = 0; n < W; ++n) {
      const T* p = b + n * b_stride + j;
      v[n] = n >= columns ? vf{} : live == W ? load(p) : load_n(p, live);
    }
    interleave(v);
    for (int k = 0; k < live; ++k) store(t + (j + k) * stride, v[k]);
  }
}

template <class Y, class T, class Where>
void expand_as(const Rows& y, int m, const float* v, int64_t v_stride, const Factor& factor, int64_t begin, int64_t end,
               Where where, void* scratch) {
  const T* b = (const T*)factor.data;
  if (factor.stride == 1) {
    expand_columns<Y>(y, m, v, v_stride, b + begin, factor.rank_stride, factor.rank, begin, end - begin, where);
    return;
  }
  constexpr int64_t COLUMNS = 128;
  float* t = (float*)scratch;
  for (int64_t n = begin; n < end; n += COLUMNS) {
    int64_t count = end - n < COLUMNS ? end - n : COLUMNS;
    for (int64_t c = 0; c < count; c += W) {
      int columns = count - c < W ? int(count - c) : W;
      transpose_to_floats(b + (n + c) * factor.stride, factor.stride, columns, factor.rank, t + c, COLUMNS);
    }
    expand_columns<Y>(y, m, v, v_stride, t, COLUMNS, factor.rank, n, count, where.from(0, n - begin));
  }
}

template <class Where>
LK_INLINE void expand_where(const Rows& y, int m, const float* v, int64_t v_stride, const Factor& B, int64_t begin,
                            int64_t end, Where where, void* scratch) {
  with_type(y.dtype, [&](auto yp) LK_LAMBDA {
    with_type(B.dtype, [&](auto bp) LK_LAMBDA {
      typedef typename element<decltype(yp)>::type Y;
      typedef typename element<decltype(bp)>::type T;
      expand_as<Y, T>(y, m, v, v_stride, B, begin, end, where, scratch);
    });
  });
}

void expand_vectors(const Rows& y, int m, const float* v, int64_t v_stride, const Factor& B, int64_t begin, int64_t end,
                    void* scratch) {
  expand_where(y, m, v, v_stride, B, begin, end, Everywhere(), scratch);
}

void expand_kept(const Rows& y, int m, const float* v, int64_t v_stride, const Factor& B, int64_t begin, int64_t end,
                 const uint16_t* mask, int64_t mask_stride, void* scratch) {
  expand_where(y, m, v, v_stride, B, begin, end, Kept{mask, mask_stride}, scratch);
}

// Rows of `outer` held in registers, twice as many vectors.
constexpr int OUTER = W == 16 ? 8 : 4;

// out[p, 0:N * W) of P rows (+)= Σ_i u[i, p] w[i, 0:N * W) over m rows; `last` columns of the last vector. AHEAD: and
// the m rows after these are fetched, of 1 << shift calls the `share`-th fetching its part of them.
template <int P, int N, bool AHEAD, class T>
LK_INLINE void outer_block(const float* u, int64_t u_stride, const Rows& w, int64_t first, int64_t q, int m, int last,
                           bool add, float* out, int64_t out_stride, int share, int shift) {
  vf acc[P][N] = {};
  for (int i = 0; i < m; ++i) {
    const T* row = row_of<T>(w, first + i) + q;
    if (AHEAD) prefetch((const T*)w.data + q, (first + m + ((share * m + i) >> shift)) * w.stride);
    vf wv[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) wv[n] = last == W ? load(row + n * W) : load_n(row, last);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      vf s = broadcast(u[i * u_stride + p]);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) acc[p][n] = fma(s, wv[n], acc[p][n]);
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      float* o = out + p * out_stride + n * W;
      vf sum = acc[p][n];
      if (add) sum = sum + (last == W ? load(o) : load_n(o, last));
      last == W ? store(o, sum) : store_n(o, sum, last);
    }
}

// `count` rows of `out`, as many vectors wide.
template <int N, class T>
LK_INLINE void outer_rows(const float* u, int64_t u_stride, int64_t count, const Rows& w, int64_t first, int64_t q,
                          int m, int last, bool add, bool ahead, float* out, int64_t out_stride) {
  int64_t p = 0;
  if (ahead) {
    int shift = count >= 4 * OUTER ? 2 : count >= 2 * OUTER;
    for (; p + OUTER <= count && p < OUTER << shift; p += OUTER)
      outer_block<OUTER, N, true, T>(u + p, u_stride, w, first, q, m, last, add, out + p * out_stride, out_stride,
                                     int(p / OUTER), shift);
  }
  for (; p + OUTER <= count; p += OUTER)
    outer_block<OUTER, N, false, T>(u + p, u_stride, w, first, q, m, last, add, out + p * out_stride, out_stride, 0, 0);
  for (; p < count; ++p)
    outer_block<1, N, false, T>(u + p, u_stride, w, first, q, m, last, add, out + p * out_stride, out_stride, 0, 0);
}

template <class U, class T>
void outer_as(const Rows& u, int64_t P, const Rows& w, int64_t begin, int64_t end, int m, const float* s, bool add,
              bool more, float* out, int64_t out_stride, void* scratch) {
  constexpr int BLOCK = 64, COLUMNS = 512;
  float* wide = (float*)scratch;  // [BLOCK, COLUMNS]: s · u
  for (int first = 0; first < m; first += BLOCK) {
    int rows = m - first < BLOCK ? m - first : BLOCK;
    bool ahead = !w.index && (more || first + rows < m);
    for (int64_t p0 = 0; p0 < P; p0 += COLUMNS) {
      int64_t count = P - p0 < COLUMNS ? P - p0 : COLUMNS;
      for (int i = 0; i < rows; ++i) {
        float* row = wide + i * COLUMNS;
        widen(row_of<U>(u, first + i) + p0, count, row);
        for (int64_t p = 0; p < count; ++p) row[p] *= s[first + i];
      }
      bool on = add || first > 0;
      float* o = out + p0 * out_stride;
      int64_t q = begin;
      for (; q + 2 * W <= end; q += 2 * W)
        outer_rows<2, T>(wide, COLUMNS, count, w, first, q, rows, W, on, ahead, o + q, out_stride);
      for (; q < end; q += W)
        outer_rows<1, T>(wide, COLUMNS, count, w, first, q, rows, end - q < W ? int(end - q) : W, on, ahead, o + q,
                         out_stride);
    }
  }
}

void outer_vectors(const Rows& u, int64_t P, const Rows& w, int64_t begin, int64_t end, int m, const float* s, bool add,
                   bool more, float* out, int64_t out_stride, void* scratch) {
  with_type(u.dtype, [&](auto up) LK_LAMBDA {
    with_type(w.dtype, [&](auto wp) LK_LAMBDA {
      typedef typename element<decltype(up)>::type U;
      typedef typename element<decltype(wp)>::type T;
      outer_as<U, T>(u, P, w, begin, end, m, s, add, more, out, out_stride, scratch);
    });
  });
}

}  // namespace
}  // namespace lora_kernels::LK_ISA
