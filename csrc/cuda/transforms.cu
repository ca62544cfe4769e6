// The `transforms` ops on NVIDIA GPUs.
#include <torch/csrc/stable/library.h>

#include "launch.h"
#include "lora_kernels/transforms_launch.h"
#include "tensors.h"

namespace lora_kernels {
namespace {

Tensor hadamard_of(Tensor x, OptionalTensor signs, std::vector<int64_t> orders, double scale, bool transpose) {
  Stream device(x);
  Tensor y = torch::stable::new_empty(x, std::vector<int64_t>(x.sizes().begin(), x.sizes().end()));
  if (!y.numel()) return y;
  require(orders.empty() || (signs && signs->is_cuda() && signs->scalar_type() == ScalarType::Int), "signs");
  Tensor rows = torch::stable::reshape(x, {x.numel() / x.size(-1), x.size(-1)});
  hadamard(device, rows_of(array_of(rows)), y.data_ptr(), signs ? signs->data_ptr() : nullptr, orders, scale,
           transpose);
  return y;
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_C, CUDA, m) { m.impl("hadamard", TORCH_BOX(&lora_kernels::hadamard_of)); }
