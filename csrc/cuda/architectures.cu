// What the CUDA kernels are compiled for, as setup.py was told.
#include <torch/csrc/stable/library.h>

#include <sstream>
#include <string>
#include <vector>

#define LORA_KERNELS_QUOTED(text) #text
#define LORA_KERNELS_EXPANDED(text) LORA_KERNELS_QUOTED(text)

namespace {

// "sm_90", ...: machine code; "compute_100": PTX, which the driver compiles for newer GPUs.
std::vector<std::string> cuda_architectures() {
  std::istringstream all(LORA_KERNELS_EXPANDED(LORA_KERNELS_ARCHITECTURES));
  std::vector<std::string> names;
  for (std::string name; std::getline(all, name, ':');) names.push_back(name);
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lora_kernels_C, m) { m.def("cuda_architectures() -> str[]"); }

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_C, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
}
