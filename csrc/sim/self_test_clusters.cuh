// Kernels that show what the host executor does with clusters of blocks.
#pragma once

#include "lora_kernels/device.cuh"

namespace lora_kernels::self_test {

// y [blocks, blockDim]: each block's place in its cluster.
__global__ void ranks(int* y) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  y[block * blockDim.x + threadIdx.x] = static_cast<int>(cluster_rank());
}

// y[rank, i] = sum_rank x[rank, n - 1 - i] in each cluster of `cluster` blocks; x and y [blocks, n], and a thread more
// than n returns before the others meet.
template <bool FIRST, bool LAST>
__global__ void cluster_sum(const float* x, float* y, unsigned cluster, unsigned n) {
  LORA_KERNELS_SHARED(memory);
  auto* turned = reinterpret_cast<float*>(memory);  // [n]
  auto* part = turned + n;                          // [n]
  const unsigned i = threadIdx.x, at = blockIdx.x * n + i;
  if (i >= n) return;
  turned[i] = x[at];
  __syncthreads();
  part[i] = turned[n - 1 - i];
  FIRST ? cluster_barrier() : __syncthreads();
  float sum = 0;
  for (unsigned rank = 0; rank < cluster; ++rank) sum += in_block(part, rank)[i];
  y[at] = sum;
  if (LAST) cluster_barrier();
}

// order[came] = block, `steps` times by each block.
__global__ void cluster_order(int* order, int* came, int steps) {
  for (int step = 0; step < steps; ++step) {
    if (threadIdx.x == 0) order[atomicAdd(came, 1)] = static_cast<int>(blockIdx.x);
    __syncthreads();
  }
}

// y[i] = what block 1's shared memory holds, if block 1 has not ended.
__global__ void read_late(float* y) {
  LORA_KERNELS_SHARED(memory);
  auto* part = reinterpret_cast<float*>(memory);
  part[threadIdx.x] = 1;
  const float* other = in_block(part, 1);
  cluster_barrier();
  if (cluster_rank() == 1) return;
  for (int i = 0; i < 50; ++i) __syncthreads();
  y[threadIdx.x] = other[threadIdx.x];
}

enum ClusterFault {
  block_and_cluster,
  two_cluster_barriers,
  lanes_and_cluster,
  rank_outside,
  address_outside,
  ended_block,
  copy_to_another,
};

// One way for a cluster of two blocks to be wrong.
__global__ void cluster_faulty(int fault, float* y) {
  LORA_KERNELS_SHARED(memory);
  const unsigned i = threadIdx.x, rank = cluster_rank();
  switch (fault) {
    case block_and_cluster:
      if (rank == 1 && i >= 32)
        __syncthreads();
      else
        cluster_barrier();
      break;
    case two_cluster_barriers:
      if (rank)
        cluster_barrier();
      else
        cluster_barrier();
      break;
    case lanes_and_cluster:
      if (i % 32 < 16)
        __syncwarp();
      else
        cluster_barrier();
      break;
    case rank_outside:
      in_block(memory, 2);
      break;
    case address_outside:
      in_block(y, 0);
      break;
    case ended_block:
      if (rank == 0) return;
      cluster_barrier();
      y[i] = in_block(memory, 0)[i];
      break;
    case copy_to_another:
      copy_async(const_cast<unsigned char*>(in_block(memory, 1 - rank)), y);
      break;
  }
}

}  // namespace lora_kernels::self_test
