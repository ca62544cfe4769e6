// y += s (x Aᵀ) Bᵀ in one launch, on GPUs with clusters: a cluster of blocks makes the v of a tile, each block the
// chunks of K that are its own, and then reads all of them in each other's shared memory and adds up its own columns of
// y.
//
// Chunks, their sums and the order in which they are added are those of the two launches, and so are a row's bits.
#pragma once

#include "low_rank.cuh"

namespace lora_kernels {

constexpr int kCluster = 8;  // blocks, the most that every such GPU takes
constexpr int kClusterColumns = kWarps * kWarpColumns;

// Where what a block holds in shared memory begins, in bytes.
struct ClusterMemory {
  int padded, chunks_each;  // ranks, a multiple of 16; chunks of a block
  int parts, b, v, end;     // after the sums of a chunk: [chunks, rows, ranks]; B; v [rows, ranks]

  __host__ __device__ ClusterMemory(int rank, int rows, int chunks, int element)
      : padded((rank + 15) / 16 * 16), chunks_each((chunks + kCluster - 1) / kCluster) {
    parts = rows / 8 * kWarps * kThreads * 4;
    b = parts + chunks_each * rows * padded * 4;
    v = b + expand_b_bytes(kClusterColumns, padded, element);
    end = v + rows * expand_v_stride(padded) * 4;
  }
};

// Grid: (tiles x kCluster, slices).
template <class X, class T, class Y>
__global__ void __launch_bounds__(kThreads, 1)
    add_kernel(const __grid_constant__ ShrinkArguments p, const __grid_constant__ ExpandArguments q) {
  LORA_KERNELS_SHARED(memory);
  using Rows = ShrinkRows<X, T>;
  constexpr int kTile = 8 * Rows::kRows;
  Tile tile = find_tile(p.plan, blockIdx.x / kCluster, kTile);
  if (tile.count <= 0) return;  // as do all blocks of the cluster
  int slice = blockIdx.y;
  const Factor &A = p.A.at(p.packed ? 0 : slice, tile.adapter), &B = q.B.at(slice, tile.adapter);
  int rank = live_rank(p.ranks, B, q.B.rank, slice, tile.adapter);
  if (rank == 0) return;

  const int me = cluster_rank(), chunks = p.chunks;
  const ClusterMemory at(q.B.rank, kTile, chunks, sizeof(T));
  float* sums = reinterpret_cast<float*>(memory);
  float* parts = reinterpret_cast<float*>(memory + at.parts);
  float* v = reinterpret_cast<float*>(memory + at.v);
  const int pitch = at.padded * sizeof(T), v_stride = expand_v_stride(at.padded);

  // The first columns of B are on their way while x meets A.
  int before = 0;
  for (int s = 0; s < slice; ++s) before += q.B.at(s, 0).width;
  auto load = [&](int first) {
    const T* b = q.B.template data<T>(B, tile.adapter) + first * B.width_stride;
    load_b(memory + at.b, pitch, b, B, rank, kClusterColumns, B.width - first);
  };
  int first = me * kClusterColumns;
  if (first < B.width) load(first);

  for (int first_rank = 0; first_rank < rank; first_rank += kRankBlock) {
    Rows rows(p, tile, A, slice, rank, first_rank);
    for (int chunk = me, slot = 0; chunk < chunks; chunk += kCluster, ++slot) {
      float sum[Rows::kRows] = {};
      rows.add_chunk(sum, p, chunk, sums);
#pragma unroll
      for (int i = 0; i < Rows::kRows; ++i)
        parts[(slot * kTile + 8 * i + Rows::row()) * at.padded + first_rank + Rows::rank()] = sum[i];
      __syncthreads();
    }
  }
  cluster_barrier();

  float scale = q.scale * q.scaling.at(slice, tile.adapter, 1.f);
  for (int i = threadIdx.x; i < kTile * at.padded; i += kThreads) {
    int row = i / at.padded, r = i % at.padded;
    float sum = 0.f;
    if (row < tile.count && r < rank) {
      for (int chunk = 0; chunk < chunks; ++chunk)
        sum += *in_block(parts + (chunk / kCluster * kTile + row) * at.padded + r, chunk % kCluster);
      int pair = pair_at(q.plan, tile.start + row);
      sum = pair < 0 ? 0.f : scaled(q, sum, scale, pair);
    }
    v[row * v_stride + r] = sum;
  }
  for (; first < B.width; first += kCluster * kClusterColumns) {
    wait_copies<0>();
    __syncthreads();
    for (int done = 0; done < tile.count; done += kExpandRows)
      expand_rows<T, Y>(q, tile, done, v + done * v_stride, v_stride, memory + at.b, pitch, rank,
                        {slice, first, before}, B.width);
    __syncthreads();
    if (first + kCluster * kClusterColumns < B.width) load(first + kCluster * kClusterColumns);
  }
  cluster_barrier();  // the others may still read what is here
}

}  // namespace lora_kernels
