// Torch's tensors as launch code sees them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "lora_kernels/array.h"

namespace lora_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Element::f32;
    case ScalarType::BFloat16:
      return Element::bf16;
    case ScalarType::Half:
      return Element::f16;
    case ScalarType::Int:
      return Element::i32;
    case ScalarType::Long:
      return Element::i64;
    default:
      throw std::runtime_error("unsupported dtype");
  }
}

inline Array array_of(const Tensor& t) {
  Array array;
  array.data = t.data_ptr();
  array.type = element_of(t.scalar_type());
  array.dims = int(t.dim());
  require(array.dims <= Array::kMostDims, "more dimensions than a kernel takes");
  for (int d = 0; d < array.dims; ++d) array.sizes[d] = t.size(d), array.strides[d] = t.stride(d);
  return array;
}

inline std::vector<Array> arrays_of(const std::vector<Tensor>& tensors) {
  std::vector<Array> arrays;
  for (const Tensor& t : tensors) arrays.push_back(array_of(t));
  return arrays;
}

inline OptionalArray optional_of(const OptionalTensor& t) { return t ? OptionalArray(array_of(*t)) : OptionalArray(); }

// A tensor as rows of one stride: as it lies, or a copy.
struct Rows {
  std::optional<Tensor> copy;
  Matrix matrix;

  explicit Rows(const Tensor& t) {
    if (as_matrix(array_of(t), matrix)) return;
    copy = torch::stable::contiguous(t);
    matrix = rows_of(array_of(*copy));
  }
  void copy_back(Tensor to) {
    if (copy) torch::stable::copy_(to, *copy);
  }
};

}  // namespace lora_kernels
