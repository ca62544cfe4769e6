// The `low_rank` ops on the host executor.
#include "device.h"
#include "lora_kernels/low_rank_launch.h"
#include "tensors.h"

namespace lora_kernels {
namespace {

using Object = const py::object&;

void lora_plan(Object table, Object ids, Object indptr, int adapters, Object order) {
  HostDevice device;
  OptionalArray bounds = optional_of(indptr), of = optional_of(order);
  write_plan(device, array_of(table), adapters, array_of(ids), bounds, of);
}

py::object lora_shrink(Object x, Object A, Object ids, Object indptr, Object plan, Object ranks, int pairs) {
  HostDevice device;
  Rows rows(x);
  OptionalArray i = optional_of(ids), p = optional_of(indptr), t = optional_of(plan), r = optional_of(ranks);
  Sources sources(arrays_of(A), 0);
  py::object v = empty({sources.slices, pairs, sources.factors.rank}, Element::f32);
  low_rank_shrink(device, static_cast<float*>(array_of(v).data), rows.matrix, sources, {i, p, t}, r, pairs);
  return v;
}

void lora_expand(Object y, Object v, Object B, Object ids, Object indptr, Object plan, Object scaling, Object ranks,
                 Object weights, double scale) {
  HostDevice device;
  Rows rows(y);
  py::object dense = v.attr("contiguous")();
  Array from = array_of(dense);
  OptionalArray i = optional_of(ids), p = optional_of(indptr), t = optional_of(plan);
  OptionalArray s = optional_of(scaling), r = optional_of(ranks), w = optional_of(weights);
  low_rank_expand(device, rows.matrix, static_cast<const float*>(from.data), int(from.sizes[1]), arrays_of(B),
                  {i, p, t}, {s, r, w, float(scale)});
  rows.copy_back(y);
}

void lora_add(Object y, Object x, Object A, Object B, Object ids, Object indptr, Object plan, Object scaling,
              Object ranks, Object weights, double scale) {
  HostDevice device;
  Rows to(y), from(x);
  OptionalArray i = optional_of(ids), p = optional_of(indptr), t = optional_of(plan);
  OptionalArray s = optional_of(scaling), r = optional_of(ranks), w = optional_of(weights);
  low_rank_add(device, to.matrix, from.matrix, arrays_of(A), arrays_of(B), {i, p, t}, {s, r, w, float(scale)});
  to.copy_back(y);
}

}  // namespace

void bind_low_rank(py::module_& module) {
  module.def("lora_plan_", &lora_plan, py::arg("table"), py::arg("ids"), py::arg("indptr"), py::arg("adapters"),
             py::arg("order") = py::none());
  module.def("lora_shrink", &lora_shrink);
  module.def("lora_expand_", &lora_expand);
  module.def("lora_add_", &lora_add);
  module.def("set_clusters", [](bool wanted) { clusters_wanted = wanted; });
}

}  // namespace lora_kernels
