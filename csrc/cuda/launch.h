// What the launch code of every family shares: the device, torch's current stream on it, a launch that is checked.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

// Weak, for a torch without CUDA lacks it and must load the extension all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace lora_kernels {

inline void check_cuda(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, cudaGetErrorString(error)); }

// The current stream of a tensor's device, which is the current device for as long as this lives.
class Stream {
public:
  explicit Stream(const torch::stable::Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // An attribute of the device, such as cudaDevAttrMaxSharedMemoryPerBlockOptin.
  int attribute(cudaDeviceAttr name) const {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, name, device_));
    return value;
  }

  int shared_limit() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

  // kernel<<<grid, block, shared>>>(args...) with `shared` bytes of dynamic shared memory, also more than the default.
  template <class... P, class... A>
  void launch(dim3 grid, dim3 block, size_t shared, void (*kernel)(P...), A... args) const {
    ask_for_shared(kernel, shared);
    kernel<<<grid, block, shared, stream_>>>(static_cast<P>(args)...);
    check_cuda(cudaGetLastError());
  }

  // The same in clusters of so many blocks along x, which need sm_90.
  template <class... P, class... A>
  void launch_clusters(unsigned cluster, dim3 grid, dim3 block, size_t shared, void (*kernel)(P...), A... args) const {
    ask_for_shared(kernel, shared);
    cudaLaunchAttribute size{};
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = cluster;
    size.val.clusterDim.y = size.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream_;
    config.attrs = &size;
    config.numAttrs = 1;
    check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...));
    check_cuda(cudaGetLastError());
  }

  void zero(void* at, size_t bytes) const {
    if (bytes) check_cuda(cudaMemsetAsync(at, 0, bytes, stream_));
  }

private:
  template <class Kernel>
  void ask_for_shared(Kernel* kernel, size_t shared) const {
    constexpr size_t kWithoutAsking = 48 << 10;
    if (shared > kWithoutAsking)  // for all a block may have, so that threads agree on it
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit()));
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace lora_kernels
