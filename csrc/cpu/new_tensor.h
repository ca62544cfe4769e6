// New tensors on the CPU. Torch's stable `new_empty` looks its op up by name, which a step of small kernels feels.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

namespace lora_kernels {

// Contiguous, uninitialised: fp32 unless it is to be of the dtype of `like`.
inline torch::stable::Tensor new_tensor(const std::vector<int64_t>& sizes,
                                        const torch::stable::Tensor* like = nullptr) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  int32_t dtype = aoti_torch_dtype_float32();
  if (like) STD_TORCH_CHECK(aoti_torch_get_dtype(like->get(), &dtype) == AOTI_TORCH_SUCCESS, "dtype");
  AtenTensorHandle made;
  STD_TORCH_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                           aoti_torch_device_type_cpu(), 0, &made) == AOTI_TORCH_SUCCESS,
                  "out of memory");
  return torch::stable::Tensor(made);
}

}  // namespace lora_kernels
