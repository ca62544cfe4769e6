// The `low_rank` ops on GPUs: torch's tensors to the launch code and back.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <vector>

#include "launch.h"
#include "lora_kernels/low_rank_launch.h"
#include "tensors.h"

namespace lora_kernels {
namespace {

// Whether lora_add_ may take one launch with clusters instead of two; not measured yet, so it is for those who ask.
std::atomic<bool> clusters_wanted{false};

void set_clusters(bool wanted) { clusters_wanted = wanted; }

// The device of a tensor, and its memory.
class Gpu : public Stream {
public:
  explicit Gpu(const Tensor& like) : Stream(like), like_(like) {}

  int processors() const { return attribute(cudaDevAttrMultiProcessorCount); }
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
