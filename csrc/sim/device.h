// The device that launch code runs on here.
#pragma once

#include <string.h>

#include <vector>

#include "lora_kernels/device.cuh"

namespace lora_kernels {

inline bool clusters_wanted = false;

class HostDevice {
public:
  int processors() const { return 4; }
  int shared_limit() const { return 227 << 10; }
  bool clusters() const { return clusters_wanted; }

  template <class... P, class... A>
  void launch(dim3 grid, dim3 block, size_t shared, void (*kernel)(P...), A... args) {
    simt::launch(grid, block, shared, kernel, args...);
  }
  template <class... P, class... A>
  void launch_clusters(unsigned cluster, dim3 grid, dim3 block, size_t shared, void (*kernel)(P...), A... args) {
    simt::launch_clusters(cluster, grid, block, shared, kernel, args...);
  }
  // NaN, as uninitialised memory is in tests.
  float* floats(int64_t count) {
    memory_.emplace_back(count, NAN);
    return memory_.back().data();
  }
  void zero(void* at, size_t bytes) { memset(at, 0, bytes); }

private:
  std::vector<std::vector<float>> memory_;
};

}  // namespace lora_kernels
