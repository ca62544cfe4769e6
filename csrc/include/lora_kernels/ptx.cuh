// Every instruction that is written as PTX, with its meaning on the host beside it. No other file has inline assembly.
//
// Source: PTX ISA, sections cp.async, ldmatrix, barrier.cluster, mapa and mma.sync, whose fragment layouts the host
// follows.
#pragma once

#include <stdint.h>

namespace lora_kernels {

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// v, of which the compiler forgets what it was computed from.
__device__ __forceinline__ uint32_t computed_anew(uint32_t v) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(v));
#endif
  return v;
}

// Copies 16 bytes, of which those from `bytes` on are zero instead, into shared memory; both addresses a multiple
// of 16.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes = 16) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
#else
  simt::copy_async(shared, global, bytes);
#endif
}

// Ends the group of this thread's copies.
__device__ __forceinline__ void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::commit_copies();
#endif
}

// Until all but the latest N groups of this thread have arrived.
template <int N>
__device__ __forceinline__ void wait_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  simt::wait_copies(N);
#endif
}

// Clusters. Before sm_90 a block is a cluster of its own.

// The block's place in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
#ifndef __CUDACC__
  return simt::launched.cluster_rank;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// Until all threads of all blocks of the cluster are here or have returned; what they wrote before can be read.
#ifdef __CUDACC__
__device__ __forceinline__ void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
#else
inline void cluster_barrier(simt::Place place = simt::Place::here()) { simt::sync_cluster({"cluster_barrier", place}); }
#endif

// The address of the same place in the shared memory of the cluster's block `rank`, which must not end before it is
// read.
template <class T>
__device__ __forceinline__ const T* in_block(const T* shared, uint32_t rank) {
#ifndef __CUDACC__
  return static_cast<const T*>(simt::in_block(shared, rank));
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
  return reinterpret_cast<const T*>(address);
#else
  return shared;
#endif
}

#ifndef __CUDACC__
namespace host {

// Lane 8 i + j brings a row, eight elements, of matrix i; every lane gets from each matrix the elements that
// place(lane, 0) and place(lane, 1) count, row by row.
template <class Place>
void load_matrices(const char* name, uint32_t (&d)[4], const void* row, Place place) {
  struct Operands {
    const uint16_t* row;
    uint32_t* d;
  };
  simt::check_shared(row, 16, name);
  Operands mine{static_cast<const uint16_t*>(row), d};
  simt::collective({name, {}}, ~0u, mine, [=](auto lanes) {
    lanes.each([=](Operands& o, unsigned lane) {
      for (unsigned i = 0; i < 4; ++i) {
        const auto element = [=](int n) { return uint32_t(lanes[8 * i + n / 8].row[n % 8]); };
        o.d[i] = element(place(lane, 0)) | element(place(lane, 1)) << 16;
      }
    });
  });
}

}  // namespace host
#endif

// Four 8x8 matrices of 16-bit elements: lane 8 i + j gives the address of row j of matrix i (16 bytes), and gets from
// matrix i elements 2 (lane % 4) and 2 (lane % 4) + 1 of row lane / 4 as d[i].
__device__ __forceinline__ void load_matrices(uint32_t (&d)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
#else
  host::load_matrices("ldmatrix", d, row, [](int lane, int e) { return lane / 4 * 8 + 2 * (lane % 4) + e; });
#endif
}

// The same of the transposed matrices: rows 2 (lane % 4) and 2 (lane % 4) + 1 of column lane / 4.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&d)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
#else
  host::load_matrices("ldmatrix.trans", d, row, [](int lane, int e) { return (2 * (lane % 4) + e) * 8 + lane / 4; });
#endif
}

#ifndef __CUDACC__
namespace host {

// d += a b for the whole warp. A register of a and b holds elements k, k + 1, .. of a row or column: unpack(register,
// elements) writes them. K is 8 registers of a row.
template <int K, class Unpack>
void multiply(const char* name, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Unpack unpack) {
  struct Operands {
    const uint32_t *a, *b;
    float* d;
  };
  constexpr int elements = K / 8;
  Operands mine{a, b, d};
  simt::collective({name, {}}, ~0u, mine, [=](auto lanes) {
    float rows[16][K], columns[8][K], product[16][8];
    lanes.each([&](Operands& o, int lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) unpack(o.a[i], &rows[g + i % 2 * 8][t * elements + i / 2 * (K / 2)]);
      for (int i = 0; i < 2; ++i) unpack(o.b[i], &columns[g][t * elements + i * (K / 2)]);
      for (int i = 0; i < 4; ++i) product[g + i / 2 * 8][2 * t + i % 2] = o.d[i];
    });
    float across[K][8];
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) across[k][n] = columns[n][k];
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < K; ++k)
        for (int n = 0; n < 8; ++n) product[m][n] += rows[m][k] * across[k][n];
    lanes.each([&](Operands& o, int lane) {
      for (int i = 0; i < 4; ++i) o.d[i] = product[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
    });
  });
}

}  // namespace host
#endif

// d [16, 8] += a [16, 16] b [16, 8] of bf16; with g = lane / 4 and t = lane % 4 a lane holds, in pairs of columns,
// a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); b: rows 2t and 2t + 8 of column g; d: (g, 2t), (g, 2t + 1),
// (g + 8, 2t), (g + 8, 2t + 1).
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  host::multiply<16>("mma bf16", d, a, b, [](uint32_t pair, float* element) {
    element[0] = __uint_as_float(pair << 16);
    element[1] = __uint_as_float(pair & 0xffff0000u);
  });
#endif
}

// The same of fp16.
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  host::multiply<16>("mma f16", d, a, b, [](uint32_t pair, float* element) {
    element[0] = __half2float({uint16_t(pair)});
    element[1] = __half2float({uint16_t(pair >> 16)});
  });
#endif
}

// d [16, 8] += a [16, 8] b [8, 8] of tf32, fp32 numbers of which the first 10 bits of the mantissa count; a lane holds
// a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b: rows t and t + 4 of column g; d as above.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  host::multiply<8>("mma tf32", d, a, b,
                    [](uint32_t number, float* element) { element[0] = __uint_as_float(number & 0xffffe000u); });
#endif
}

// The nearest tf32, ties away from zero, as the fp32 number it is.
__device__ __forceinline__ float nearest_tf32(float v) {
#ifdef __CUDACC__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return __uint_as_float(bits);
#else
  return fabsf(v) < INFINITY ? __uint_as_float((__float_as_uint(v) + 0x1000) & 0xffffe000) : v;
#endif
}

}  // namespace lora_kernels
