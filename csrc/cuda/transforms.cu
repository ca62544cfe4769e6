// The `transforms` ops on NVIDIA GPUs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "launch.h"
#include "lora_kernels/transforms_launch.h"

namespace lora_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// x as [rows, N]; a copy where its leading axes are not evenly spaced.
Tensor rows_of(const Tensor& x) {
  int64_t N = x.size(-1);
  return torch::stable::reshape(x, {x.numel() / N, N});
}

Tensor hadamard(const Tensor& x, std::optional<Tensor> signs, std::vector<int64_t> orders, double scale,
                bool transpose) {
  Stream stream(x);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  Tensor y = torch::stable::new_empty(x, sizes);
  if (!y.numel()) return y;
  int64_t N = sizes.back(), power = N;
  for (int64_t order : orders) {
    STD_TORCH_CHECK(order > 1 && power % order == 0, "orders");
    power /= order;
  }
  STD_TORCH_CHECK(power % 2 == 0 && !(power & (power - 1)), "orders");
  STD_TORCH_CHECK(orders.empty() || (signs && signs->is_cuda() && signs->scalar_type() == ScalarType::Int), "signs");
  HadamardPasses plan(uint32_t(N / 2), orders.data(), int(orders.size()), transpose);
  STD_TORCH_CHECK(plan.fit, "orders");
  STD_TORCH_CHECK(plan.bytes(1) <= size_t(stream.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)), "row too long");
  Tensor rows = rows_of(x);
  Hadamard a{};
  a.x = rows.const_data_ptr(), a.y = y.mutable_data_ptr();
  a.signs = signs ? static_cast<const uint32_t*>(signs->const_data_ptr()) : nullptr;
  a.rows = rows.size(0), a.row_stride = rows.stride(0), a.stride = rows.stride(1);
  a.scale = float(scale), a.transpose = transpose;
  auto start = [&](auto zero) {
    using T = decltype(zero);
    a.paired = pairs_aligned<T>(a);
    launch_hadamard<T>(stream, a, N, plan);
  };
  switch (x.scalar_type()) {
    case ScalarType::Float:
      start(float{});
      break;
    case ScalarType::BFloat16:
      start(bf16{});
      break;
    case ScalarType::Half:
      start(f16{});
      break;
    default:
      STD_TORCH_CHECK(false, "x dtype");
  }
  return y;
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_C, CUDA, m) { m.impl("hadamard", TORCH_BOX(&lora_kernels::hadamard)); }
