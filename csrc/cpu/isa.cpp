// The instruction set to use: the best one this machine has, unless set_isa names another.
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "low_rank.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lora_kernels {
namespace portable {
extern const LowRankKernels low_rank;
}
#if defined(__x86_64__)
namespace avx2 {
extern const LowRankKernels low_rank;
}
namespace avx512 {
extern const LowRankKernels low_rank;
}
namespace avx512bf16 {
extern const LowRankKernels low_rank;
}
namespace amx {
extern const LowRankKernels low_rank;
}
#endif

namespace {

#if defined(__x86_64__)
// Tile registers are the one state that Linux hands out on request only.
bool request_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_tiles() {
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
}
#endif

// What this machine can run, the best last.
std::vector<const LowRankKernels*> detect() {
  std::vector<const LowRankKernels*> found{&portable::low_rank};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::low_rank);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    found.push_back(&avx512::low_rank);
    if (__builtin_cpu_supports("avx512bf16")) {
      found.push_back(&avx512bf16::low_rank);
      if (has_tiles() && request_tiles()) found.push_back(&amx::low_rank);
    }
  }
#endif
  return found;
}

const std::vector<const LowRankKernels*>& available() {
  static const std::vector<const LowRankKernels*> found = detect();
  return found;
}

const LowRankKernels* chosen = nullptr;

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const LowRankKernels* kernels : available()) names.push_back(kernels->name);
  return names;
}

std::string get_isa() { return low_rank_kernels().name; }

void set_isa(std::string name) {
  for (const LowRankKernels* kernels : available())
    if (name == kernels->name) {
      chosen = kernels;
      return;
    }
  STD_TORCH_CHECK(false, "this machine has no instruction set called ", name);
}

}  // namespace

const LowRankKernels& low_rank_kernels() {
  if (!chosen) chosen = available().back();
  return *chosen;
}

}  // namespace lora_kernels

STABLE_TORCH_LIBRARY(lora_kernels_C, m) {
  m.def("isas() -> str[]");
  m.def("get_isa() -> str");
  m.def("set_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_C, CompositeExplicitAutograd, m) {
  m.impl("isas", TORCH_BOX(&lora_kernels::isas));
  m.impl("get_isa", TORCH_BOX(&lora_kernels::get_isa));
  m.impl("set_isa", TORCH_BOX(&lora_kernels::set_isa));
}
