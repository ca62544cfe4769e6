// AMX tiles: C[16 x 16] fp32 += A[16 x 32] · B[32 x 16] bf16, B held as 16 rows of pairs [k / 2][n][k % 2].
// Written as assembly with a memory clobber, which the compilers' own intrinsics lack.
#pragma once

#include <stdint.h>
#include <string.h>

namespace lora_kernels::tiles {

#define LK_TILES __attribute__((always_inline)) inline

template <int T>
LK_TILES void load(const void* p, int64_t bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(bytes), "i"(T) : "memory");
}
template <int T>
LK_TILES void stream(const void* p, int64_t bytes) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(bytes), "i"(T) : "memory");
}
template <int T>
LK_TILES void store(void* p, int64_t bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(bytes), "i"(T) : "memory");
}
template <int T>
LK_TILES void zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T) : "memory");
}
template <int C, int A, int B>
LK_TILES void dot() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B) : "memory");
}
LK_TILES void release() { __asm__ volatile("tilerelease" ::: "memory"); }

struct alignas(64) Config {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  LK_TILES void set(int tile, int rows_, int bytes_) {
    rows[tile] = uint8_t(rows_);
    bytes[tile] = uint16_t(bytes_);
  }
  LK_TILES void load() const { __asm__ volatile("ldtilecfg %0" ::"m"(*this) : "memory"); }
};

}  // namespace lora_kernels::tiles
