// lora_kernels._sim: the CUDA kernels on the host executor. Built for tests by sim/build.py, never shipped.
#include <pybind11/pybind11.h>

#include "executor.h"

namespace lora_kernels {

// A build may leave families out.
#define LORA_KERNELS_FAMILIES(DO) DO(self_test) DO(low_rank) DO(transforms)

#define LORA_KERNELS_DECLARE(family) __attribute__((weak)) void bind_##family(pybind11::module_&);
LORA_KERNELS_FAMILIES(LORA_KERNELS_DECLARE)

}  // namespace lora_kernels

PYBIND11_MODULE(_sim, m) {
  m.def("set_seed", &simt::set_seed, "The order in which threads run from now on; 0: in turn.");
  m.def("seed", &simt::seed);
#define LORA_KERNELS_BIND(family) \
  if (lora_kernels::bind_##family) lora_kernels::bind_##family(m);
  LORA_KERNELS_FAMILIES(LORA_KERNELS_BIND)
}
