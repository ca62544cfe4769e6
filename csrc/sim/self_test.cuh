// Kernels that show what the host executor does, and what it reports.
#pragma once

#include <type_traits>

#include "lora_kernels/device.cuh"

namespace lora_kernels::self_test {

// y[i] = x[blockDim - 1 - i] of each block's part.
__global__ void reverse(const float* x, float* y) {
  LORA_KERNELS_SHARED(memory);
  auto* part = reinterpret_cast<float*>(memory);  // [blockDim]
  const unsigned i = threadIdx.x, first = blockIdx.x * blockDim.x;
  part[i] = x[first + i];
  __syncthreads();
  y[first + i] = part[blockDim.x - 1 - i];
}

// y[i] = sum_step x[step, (i + 32) % blockDim]; one buffer for all steps, so that two barriers are needed in each.
template <bool BARRIER>
__global__ void relay(const float* x, float* y, int steps) {
  LORA_KERNELS_SHARED(memory);
  auto* row = reinterpret_cast<float*>(memory);  // [blockDim]
  float sum = 0;
  for (int step = 0; step < steps; ++step) {
    row[threadIdx.x] = x[step * blockDim.x + threadIdx.x];
    __syncthreads();
    sum += row[(threadIdx.x + 32) % blockDim.x];
    if (BARRIER) __syncthreads();
    __syncwarp();
  }
  y[threadIdx.x] = sum;
}

// y[i] of the shuffle `kind` among the lanes in `mask`; the others keep x[i].
__global__ void shuffle(int kind, unsigned mask, const int64_t* x, int64_t* y, int argument, int width) {
  const unsigned lane = threadIdx.x;
  int64_t v = x[lane];
  if (mask >> lane & 1) {
    if (kind == 0) v = __shfl_sync(mask, v, argument, width);
    if (kind == 1) v = __shfl_up_sync(mask, v, argument, width);
    if (kind == 2) v = __shfl_down_sync(mask, v, argument, width);
    if (kind == 3) v = __shfl_xor_sync(mask, v, argument, width);
  }
  y[lane] = v;
}

// y [8, 32]: what the lanes in `mask` learn of each other's x; others write nothing.
__global__ void votes(unsigned mask, const int* x, int* y) {
  const unsigned lane = threadIdx.x;
  if (!(mask >> lane & 1)) return;
  const int v = x[lane];
  y[lane] = static_cast<int>(__ballot_sync(mask, v > 0));
  y[32 + lane] = __any_sync(mask, v > 1);
  y[64 + lane] = __all_sync(mask, v > -1);
  y[96 + lane] = static_cast<int>(__match_any_sync(mask, v));
  y[128 + lane] = __reduce_add_sync(mask, v);
  y[160 + lane] = __reduce_max_sync(mask, v);
  y[192 + lane] = __reduce_min_sync(mask, v);
}

// y[i] = the sum of x over the half of the warp that i is in, times the sum over the whole. The second half takes one
// more step, which the first does not wait for.
__global__ void halves(const int* x, int* y) {
  const unsigned lane = threadIdx.x, mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  int sum = x[lane];
  for (int d = 8; d; d /= 2) sum += __shfl_xor_sync(mask, sum, d);
  if (lane >= 16) __syncwarp(mask);
  y[lane] = sum * (sum + __shfl_xor_sync(~0u, sum, 16));
}

// y [3, blockDim]: how many x of the block are > 0; whether one is; whether all are.
__global__ void block_votes(const int* x, int* y) {
  const int v = x[threadIdx.x] > 0, n = static_cast<int>(blockDim.x), i = static_cast<int>(threadIdx.x);
  y[i] = __syncthreads_count(v);
  y[n + i] = __syncthreads_or(v);
  y[2 * n + i] = __syncthreads_and(v);
}

// counts[x] += 1; sums[0] += x; the extremes of x; the order in which threads came.
__global__ void atomics(const int* x, int n, int* counts, float* sum, int* extremes, int* order, int* came) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  atomicAdd(counts + x[i], 1);
  atomicAdd(sum, static_cast<float>(x[i]));
  atomicMin(extremes, x[i]);
  atomicMax(extremes + 1, x[i]);
  order[atomicAdd(came, 1)] = i;
}

// total[0] += x[i], by threads that take turns with a lock.
__global__ void locked_sum(const int* x, int* total, int* lock) {
  for (bool done = false; !done;) {
    if (atomicCAS(lock, 0, 1) == 0) {
      total[0] += x[threadIdx.x];
      __threadfence();
      atomicExch(lock, 0);
      done = true;
    }
  }
}

// y = x [steps, blockDim, 4], each thread's four of a step read by its neighbour, through two buffers filled a step
// ahead; the last `missing` of each four are zero.
template <bool WAIT, bool BARRIER>
__global__ void staged(const float* x, float* y, int steps, int missing) {
  LORA_KERNELS_SHARED(memory);
  auto* buffers = reinterpret_cast<float4*>(memory);  // [2, blockDim]
  const unsigned n = blockDim.x, i = threadIdx.x;
  const auto fetch = [=](int step) {
    copy_async(buffers + step % 2 * n + i, x + (step * n + i) * 4, 16 - 4 * missing);
  };
  fetch(0);
  commit_copies();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) fetch(step + 1);
    commit_copies();
    if (WAIT) wait_copies<1>();
    __syncthreads();
    const unsigned other = (i + 1) % n;
    reinterpret_cast<float4*>(y)[step * n + other] = buffers[step % 2 * n + other];
    __syncwarp();
    if (BARRIER) __syncthreads();
  }
}

// d [32, 4] += what a warp's registers a [32, 4], b [32, 2] are to the instruction for T.
template <class T>
__global__ void multiply(const int* a, const int* b, float* d) {
  const unsigned lane = threadIdx.x;
  uint32_t ra[4], rb[2];
  float rd[4];
  for (int i = 0; i < 4; ++i) ra[i] = static_cast<uint32_t>(a[lane * 4 + i]), rd[i] = d[lane * 4 + i];
  for (int i = 0; i < 2; ++i) rb[i] = static_cast<uint32_t>(b[lane * 2 + i]);
  if constexpr (std::is_same_v<T, float>)
    mma_tf32(rd, ra, rb);
  else if constexpr (std::is_same_v<T, bf16>)
    mma_bf16(rd, ra, rb);
  else
    mma_f16(rd, ra, rb);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = rd[i];
}

// d [32, 4]: the registers that hold x [32, 8], four matrices of 16-bit elements.
template <bool TRANSPOSED>
__global__ void fragments(const int16_t* x, int* d) {
  LORA_KERNELS_SHARED(memory);
  const unsigned lane = threadIdx.x;
  copy_async(memory + lane * 16, x + lane * 8);
  commit_copies();
  wait_copies<0>();
  __syncwarp();
  uint32_t rd[4];
  TRANSPOSED ? load_matrices_transposed(rd, memory + lane * 16) : load_matrices(rd, memory + lane * 16);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = static_cast<int>(rd[i]);
}

// y [M, N] = x [M, K] w [N, K]^T in bf16, a warp for each 16 x 8 of y; K a multiple of 16, M and N of the tile.
__global__ void matmul(const bf16* x, const bf16* w, float* y, int N, int K) {
  LORA_KERNELS_SHARED(memory);
  auto* xs = reinterpret_cast<bf16*>(memory);  // [16, 24]: rows are apart by more than they hold, as banks want it
  auto* ws = xs + 16 * 24;                     // [8, 24]
  const int lane = static_cast<int>(threadIdx.x), m = static_cast<int>(blockIdx.x) * 16,
            n = static_cast<int>(blockIdx.y) * 8;
  float acc[4] = {0, 0, 0, 0};
  for (int k = 0; k < K; k += 16) {
    copy_async(xs + lane / 2 * 24 + lane % 2 * 8, x + (m + lane / 2) * K + k + lane % 2 * 8);
    if (lane < 16) copy_async(ws + lane / 2 * 24 + lane % 2 * 8, w + (n + lane / 2) * K + k + lane % 2 * 8);
    commit_copies();
    wait_copies<0>();
    __syncwarp();
    uint32_t a[4], b[4];
    load_matrices(a, xs + lane % 16 * 24 + lane / 16 * 8);
    load_matrices(b, ws + lane % 8 * 24 + lane / 8 % 2 * 8);
    mma_bf16(acc, a, {b[0], b[1]});
    __syncwarp();
  }
  const int row = m + lane / 4, column = n + 2 * (lane % 4);
  for (int i = 0; i < 4; ++i) y[(row + i / 2 * 8) * N + column + i % 2] = acc[i];
}

// y = the numbers of x in another type.
template <class To, class From>
__global__ void convert(const From* x, To* y, int64_t n) {
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    y[i] = rounded<To>(to_float(x[i]));
}

// y = shared memory that nobody wrote.
__global__ void unwritten(float* y) {
  LORA_KERNELS_SHARED(memory);
  y[threadIdx.x] = reinterpret_cast<float*>(memory)[threadIdx.x];
}

// Writes one byte of shared memory.
__global__ void write_shared(int at) {
  LORA_KERNELS_SHARED(memory);
  if (blockIdx.x == 1 && threadIdx.x == 0) memory[at] = 1;
}

// y[i] = i, i < n, which is more than y has where the test is of what finds that.
__global__ void count(float* y, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) y[i] = static_cast<float>(i);
}

enum Fault {
  circle,
  wrong_mask,
  lane_outside,
  two_collectives,
  two_masks,
  collective_and_barrier,
  two_barriers,
  after_return,
  return_from_a_collective,
  unaligned_copy,
  copy_outside,
  unaligned_rows,
  bad_width,
};

// One way to be wrong; y is written by those that get that far.
__global__ void faulty(int fault, float* y) {
  LORA_KERNELS_SHARED(memory);
  const unsigned i = threadIdx.x, lane = i % 32;
  uint32_t d[4];
  switch (fault) {
    case circle:  // each of three lanes waits for the next
      if (lane < 3) __syncwarp(lane == 2 ? 5 : 3u << lane);
      if (i < 32) __syncthreads();
      break;
    case wrong_mask:
      __shfl_sync(0x0000ffffu, 1, 0);
      break;
    case lane_outside:
      if (lane < 16) __shfl_sync(0x0000ffffu, 1, 16);
      break;
    case two_collectives:
      lane < 16 ? __shfl_xor_sync(~0u, 1, 1) : __any_sync(~0u, 1);
      break;
    case two_masks:
      __syncwarp(lane < 31 ? ~0u : 0xfffffffeu);
      break;
    case collective_and_barrier:
      if (lane < 16)
        __syncwarp();
      else
        __syncthreads();
      break;
    case two_barriers:
      if (i < 32)
        __syncthreads();
      else
        __syncthreads();
      break;
    case after_return:
      if (lane == 3) return;
      __syncwarp();
      break;
    case return_from_a_collective:
      if (lane != 3) __syncwarp();
      break;
    case unaligned_copy:
      copy_async(memory, y + 1);
      break;
    case copy_outside:
      copy_async(memory + 16 * i, y);
      break;
    case unaligned_rows:
      load_matrices(d, memory + 8 * lane);
      break;
    case bad_width:
      __shfl_sync(~0u, 1, 0, 12);
      break;
  }
  y[i] = 1;
}

// For measurements: `steps` meetings of a warp.
__global__ void meet(int steps) {
  for (int i = 0; i < steps; ++i) __syncwarp();
}

// For measurements: `steps` products of a warp.
__global__ void multiply_much(float* y, int steps) {
  float d[4] = {0, 0, 0, 0};
  const uint32_t a[4] = {0x3f803f80u, 0, 0x3f80u, 0}, b[2] = {0x3f803f80u, 0x3f80u};
  for (int i = 0; i < steps; ++i) mma_bf16(d, a, b);
  y[blockIdx.x * blockDim.x + threadIdx.x] = d[0];
}

}  // namespace lora_kernels::self_test
