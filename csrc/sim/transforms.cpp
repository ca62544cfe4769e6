#include <pybind11/stl.h>

#include "device.h"
#include "lora_kernels/transforms_launch.h"
#include "tensors.h"

namespace lora_kernels {

namespace {

namespace py = pybind11;

py::object hadamard_of(py::object x, py::object signs, std::vector<int64_t> orders, double scale, bool transpose) {
  HostDevice device;
  auto sizes = x.attr("shape").cast<std::vector<int64_t>>();
  py::object rows = x.attr("reshape")(-1, sizes.back());
  Array in = array_of(rows);
  py::object y = empty(sizes, in.type);
  if (!in.numel()) return y;
  OptionalArray bits = optional_of(signs);
  const Array* words = bits;
  hadamard(device, rows_of(in), array_of(y).data, words ? elements<int32_t>(*words) : nullptr, orders, scale,
           transpose);
  return y;
}

// [pass][value][lane]: where the first warp's lanes find the values of their tasks in shared memory, in bytes.
std::vector<std::vector<std::vector<uint32_t>>> hadamard_places(int64_t length, std::vector<int64_t> orders) {
  const HadamardPasses plan(uint32_t(length / 2), orders.data(), int(orders.size()), false);
  Hadamard a{};
  a.pad = plan.pad;
  std::vector<std::vector<std::vector<uint32_t>>> places;
  for (const Pass* pass = plan.passes; pass < plan.passes + plan.count; ++pass) {
    auto& values = places.emplace_back(pass->radix);
    for (uint32_t i = 0; i < pass->radix; ++i)
      for (uint32_t lane = 0; lane < 32; ++lane) values[i].push_back(a.place_of(pass->pair_of(lane)) + i * pass->step);
  }
  return places;
}

}  // namespace

void bind_transforms(py::module_& m) {
  m.def("hadamard", &hadamard_of);
  m.def("hadamard_places", &hadamard_places);
}

}  // namespace lora_kernels
