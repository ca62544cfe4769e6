#include "tensors.h"

#include <pybind11/stl.h>

#include <string>

namespace lora_kernels {

namespace {

const char* const names[] = {"float32", "bfloat16", "float16", "int16", "int32", "int64"};  // as Element has them

}  // namespace

void check_type(const Array& array, Element expected) {
  if (array.type != expected)
    throw py::type_error(std::string("expected a tensor of ") + names[int(expected)] + ", got " +
                         names[int(array.type)]);
}

Array array_of(py::handle tensor) {
  if (tensor.attr("device").attr("type").cast<std::string>() != "cpu") throw py::type_error("expected a CPU tensor");
  Array array;
  array.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  const auto sizes = tensor.attr("shape").cast<std::vector<int64_t>>();
  const auto strides = tensor.attr("stride")().cast<std::vector<int64_t>>();
  if (sizes.size() > Array::kMostDims) throw py::value_error("expected at most 8 dimensions");
  array.dims = int(sizes.size());
  std::copy(sizes.begin(), sizes.end(), array.sizes);
  std::copy(strides.begin(), strides.end(), array.strides);
  const auto name = py::str(tensor.attr("dtype")).cast<std::string>();  // "torch.float32"
  for (int i = 0; i < int(std::size(names)); ++i)
    if (name == std::string("torch.") + names[i]) {
      array.type = Element(i);
      return array;
    }
  throw py::type_error("no kernel takes tensors of " + name);
}

std::vector<Array> arrays_of(py::handle tensors) {
  std::vector<Array> arrays;
  for (py::handle tensor : tensors) arrays.push_back(array_of(tensor));
  return arrays;
}

OptionalArray optional_of(py::handle tensor) {
  return tensor.is_none() ? OptionalArray() : OptionalArray(array_of(tensor));
}

py::object empty(const std::vector<int64_t>& sizes, Element type) {
  const auto torch = py::module_::import("torch");
  return torch.attr("empty")(py::tuple(py::cast(sizes)), py::arg("dtype") = torch.attr(names[int(type)]));
}

}  // namespace lora_kernels
