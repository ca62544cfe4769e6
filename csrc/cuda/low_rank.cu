// The `low_rank` ops on GPUs: torch's tensors to the launch code and back.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <optional>
#include <vector>

#include "launch.h"
#include "lora_kernels/low_rank_launch.h"

namespace lora_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Element element_of(ScalarType type) {
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
      throw std::invalid_argument("unsupported dtype");
  }
}

Array array_of(const Tensor& t) {
  Array array;
  array.data = t.data_ptr();
  array.type = element_of(t.scalar_type());
  array.dims = int(t.dim());
  require(array.dims <= Array::kMostDims, "more dimensions than a kernel takes");
  for (int d = 0; d < array.dims; ++d) array.sizes[d] = t.size(d), array.strides[d] = t.stride(d);
  return array;
}

std::vector<Array> arrays_of(const std::vector<Tensor>& tensors) {
  std::vector<Array> arrays;
  for (const Tensor& t : tensors) arrays.push_back(array_of(t));
  return arrays;
}

OptionalArray optional_of(const OptionalTensor& t) { return t ? OptionalArray(array_of(*t)) : OptionalArray(); }

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

// Whether lora_add_ may take one launch with clusters instead of two; not measured yet, so it is for those who ask.
std::atomic<bool> clusters_wanted{false};

void set_clusters(bool wanted) { clusters_wanted = wanted; }

// The device of a tensor, and its memory.
class Gpu : public Stream {
public:
  explicit Gpu(const Tensor& like) : Stream(like), like_(like) {}

  int processors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  int shared_limit() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
  bool clusters() const { return clusters_wanted && attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }
  float* floats(int64_t count) {
    memory_.push_back(torch::stable::new_empty(like_, {count}, ScalarType::Float));
    return static_cast<float*>(memory_.back().data_ptr());
  }

private:
  Tensor like_;
  std::vector<Tensor> memory_;
};

void lora_plan(Tensor table, Tensor ids, OptionalTensor indptr, int64_t adapters, OptionalTensor order) {
  Gpu device(table);
  OptionalArray bounds = optional_of(indptr), of = optional_of(order);
  write_plan(device, array_of(table), int(adapters), array_of(ids), bounds, of);
}

Tensor lora_shrink(Tensor x, std::vector<Tensor> A, OptionalTensor ids, OptionalTensor indptr, OptionalTensor plan,
                   OptionalTensor ranks, int64_t pairs) {
  Gpu device(x);
  Rows rows(x);
  OptionalArray i = optional_of(ids), p = optional_of(indptr), t = optional_of(plan), r = optional_of(ranks);
  Sources sources(arrays_of(A), 0);
  Tensor v = torch::stable::new_empty(x, {sources.slices, pairs, sources.factors.rank}, ScalarType::Float);
  low_rank_shrink(device, static_cast<float*>(v.data_ptr()), rows.matrix, sources, {i, p, t}, r, int(pairs));
  return v;
}

void lora_expand(Tensor y, Tensor v, std::vector<Tensor> B, OptionalTensor ids, OptionalTensor indptr,
                 OptionalTensor plan, OptionalTensor scaling, OptionalTensor ranks, OptionalTensor weights,
                 double scale) {
  Gpu device(y);
  Rows rows(y);
  Tensor dense = torch::stable::contiguous(v);
  OptionalArray i = optional_of(ids), p = optional_of(indptr), t = optional_of(plan);
  OptionalArray s = optional_of(scaling), r = optional_of(ranks), w = optional_of(weights);
  low_rank_expand(device, rows.matrix, static_cast<const float*>(dense.data_ptr()), int(v.size(1)), arrays_of(B),
                  {i, p, t}, {s, r, w, float(scale)});
  rows.copy_back(y);
}

void lora_add(Tensor y, Tensor x, std::vector<Tensor> A, std::vector<Tensor> B, OptionalTensor ids,
              OptionalTensor indptr, OptionalTensor plan, OptionalTensor scaling, OptionalTensor ranks,
              OptionalTensor weights, double scale) {
  Gpu device(x);
  Rows to(y), from(x);
  OptionalArray i = optional_of(ids), p = optional_of(indptr), t = optional_of(plan);
  OptionalArray s = optional_of(scaling), r = optional_of(ranks), w = optional_of(weights);
  low_rank_add(device, to.matrix, from.matrix, arrays_of(A), arrays_of(B), {i, p, t}, {s, r, w, float(scale)});
  to.copy_back(y);
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(lora_kernels_C, m) { m.def("set_clusters(bool wanted) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_C, CompositeExplicitAutograd, m) {
  m.impl("set_clusters", TORCH_BOX(&lora_kernels::set_clusters));
}

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_C, CUDA, m) {
  m.impl("lora_plan_", TORCH_BOX(&lora_kernels::lora_plan));
  m.impl("lora_shrink", TORCH_BOX(&lora_kernels::lora_shrink));
  m.impl("lora_expand_", TORCH_BOX(&lora_kernels::lora_expand));
  m.impl("lora_add_", TORCH_BOX(&lora_kernels::lora_add));
}
