// Torch's tensors as Python hands them over, read by their attributes: no header of torch's takes part.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "lora_kernels/array.h"

namespace lora_kernels {

namespace py = pybind11;

// Borrowed: the tensor outlives it.
Array array_of(py::handle tensor);
std::vector<Array> arrays_of(py::handle tensors);

// A tensor as rows of one stride: as it lies, or a copy.
struct Rows {
  py::object tensor;
  Matrix matrix;
  bool copied = false;

  explicit Rows(const py::object& t) : tensor(t) {
    if (as_matrix(array_of(tensor), matrix)) return;
    copied = true;
    tensor = t.attr("contiguous")();
    matrix = rows_of(array_of(tensor));
  }
  void copy_back(const py::object& to) {
    if (copied) to.attr("copy_")(tensor);
  }
};

// Of an argument that may be None.
OptionalArray optional_of(py::handle tensor);

// A new tensor on the CPU.
py::object empty(const std::vector<int64_t>& sizes, Element type);

void check_type(const Array& array, Element expected);

template <class T>
constexpr Element element_of();
template <>
constexpr Element element_of<float>() {
  return Element::f32;
}
template <>
constexpr Element element_of<__half>() {
  return Element::f16;
}
template <>
constexpr Element element_of<__nv_bfloat16>() {
  return Element::bf16;
}
template <>
constexpr Element element_of<int64_t>() {
  return Element::i64;
}
template <>
constexpr Element element_of<int32_t>() {
  return Element::i32;
}
template <>
constexpr Element element_of<int16_t>() {
  return Element::i16;
}

// The elements, which must be T.
template <class T>
T* elements(const Array& array) {
  check_type(array, element_of<T>());
  return static_cast<T*>(array.data);
}

}  // namespace lora_kernels
