#include <pybind11/stl.h>

#include "lora_kernels/transforms_launch.h"
#include "tensors.h"

namespace lora_kernels {

namespace {

namespace py = pybind11;

struct Launcher {
  template <class... A>
  void launch(A... args) const {
    simt::launch(args...);
  }
};

py::object hadamard(py::object x, py::object signs, std::vector<int64_t> orders, double scale, bool transpose) {
  const int64_t length = x.attr("shape").attr("__getitem__")(-1).cast<int64_t>();
  const py::object rows = x.attr("reshape")(-1, length);
  const Array in = array_of(rows);
  const auto sizes = x.attr("shape").cast<std::vector<int64_t>>();
  const py::object y = empty(sizes, in.type);
  const OptionalArray bits = optional_of(signs);
  HadamardPasses plan(uint32_t(length / 2), orders.data(), int(orders.size()), transpose);
  if (!plan.fit) throw py::value_error("too many bases");
  Hadamard a{};
  a.x = in.data;
  a.y = array_of(y).data;
  if (const Array* words = bits) a.signs = reinterpret_cast<const uint32_t*>(elements<int32_t>(*words));
  a.rows = in.sizes[0], a.row_stride = in.strides[0], a.stride = in.strides[1];
  a.scale = float(scale), a.transpose = transpose;
  auto start = [&](auto zero) {
    using T = decltype(zero);
    a.paired = pairs_aligned<T>(a);
    if (a.rows) launch_hadamard<T>(Launcher{}, a, length, plan);
  };
  if (in.type == Element::f32)
    start(float{});
  else if (in.type == Element::bf16)
    start(bf16{});
  else
    start(f16{});
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
  m.def("hadamard", &hadamard);
  m.def("hadamard_places", &hadamard_places);
}

}  // namespace lora_kernels
