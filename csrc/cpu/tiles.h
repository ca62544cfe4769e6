// AMX tiles: C[16 x 16] fp32 += A[16 x 32] · B[32 x 16] bf16, B held as 16 rows of pairs [k / 2][n][k % 2].
// Written as assembly with a memory clobber, which the compilers' own intrinsics lack.
#pragma once

#include <stdint.h>
#include <string.h>

namespace lora_kernels::tiles {

#define LK_TILE_LOAD(tile, p, bytes) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"((const void*)(p)), "r"((int64_t)(bytes)) : "memory")
#define LK_TILE_STORE(tile, p, bytes) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"((void*)(p)), "r"((int64_t)(bytes)) : "memory")
#define LK_TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::: "memory")
#define LK_TILE_DOT(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory")

struct alignas(64) Config {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  __attribute__((always_inline)) void set(int tile, int rows_, int bytes_) {
    rows[tile] = uint8_t(rows_);
    bytes[tile] = uint16_t(bytes_);
  }
  __attribute__((always_inline)) void load() const { __asm__ volatile("ldtilecfg %0" ::"m"(*this) : "memory"); }
};

__attribute__((always_inline)) inline void release() { __asm__ volatile("tilerelease" ::: "memory"); }

}  // namespace lora_kernels::tiles
