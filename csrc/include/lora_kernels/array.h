// A tensor as launch code sees it, whether it came from torch or from the host executor, and what all launch code
// needs.
#pragma once

#include <stdint.h>

#include <stdexcept>

#include "device.cuh"

namespace lora_kernels {

enum class Element { f32, bf16, f16, i16, i32, i64 };

inline int64_t bytes_of(Element type) {
  if (type == Element::i64) return 8;
  return type == Element::f32 || type == Element::i32 ? 4 : 2;
}

inline void require(bool right, const char* what) {
  if (!right) throw std::runtime_error(what);
}

inline int divide_up(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// Calls f with a value of the type that is meant.
template <class F>
void with_type(Element type, F f) {
  switch (type) {
    case Element::f32:
      return f(float{});
    case Element::bf16:
      return f(bf16{});
    case Element::f16:
      return f(f16{});
    default:
      throw std::runtime_error("unsupported dtype");
  }
}

// Borrowed memory with sizes and strides in elements.
struct Array {
  static constexpr int kMostDims = 8;

  void* data = nullptr;
  Element type = Element::f32;
  int dims = 0;
  int64_t sizes[kMostDims] = {}, strides[kMostDims] = {};

  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < dims; ++d) n *= sizes[d];
    return n;
  }
};

// The array of an argument that may be None, for a parameter that is a pointer.
class OptionalArray {
public:
  OptionalArray() = default;
  explicit OptionalArray(const Array& array) : array_(array), given_(true) {}
  operator const Array*() const { return given_ ? &array_ : nullptr; }

private:
  Array array_;
  bool given_ = false;
};

// An array [..., columns] as a matrix.
struct Matrix {
  void* data;
  Element type;
  int64_t rows, columns, row_stride, column_stride;

  // Whether 16 bytes of a row, from a column that is a multiple of them, can be read at once.
  bool wide() const {
    return column_stride == 1 && row_stride * bytes_of(type) % 16 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
};

// Whether all leading axes of `from` are one axis of a single stride; then it is described in `to`.
inline bool as_matrix(const Array& from, Matrix& to) {
  int last = from.dims - 1;
  to = {from.data, from.type, 1, from.sizes[last], 0, from.strides[last]};
  for (int d = 0; d < last; ++d) to.rows *= from.sizes[d];
  int64_t next = -1;
  for (int d = last - 1; d >= 0; --d) {
    if (from.sizes[d] == 1) continue;
    if (next < 0)
      to.row_stride = from.strides[d];
    else if (from.strides[d] != next)
      return from.numel() == 0;
    next = from.strides[d] * from.sizes[d];
  }
  if (to.columns <= 1) to.column_stride = 1;
  return true;
}

inline Matrix rows_of(const Array& array) {
  Matrix matrix;
  require(array.dims >= 1 && as_matrix(array, matrix), "rows without a stride");
  return matrix;
}

}  // namespace lora_kernels
