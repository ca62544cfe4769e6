// What kernels over the rows of several adapters share: the plan that groups the rows, and tiles of it.
//
// A plan lists the pairs of a row and an adapter sorted by adapter: int32 {P, L, the L + 1 offsets of the adapters'
// runs, the pairs}. A tile is up to `size` pairs of one adapter, so there are no padding rows and an adapter's factors
// are read once a tile. A grid has as many tiles as a batch of its length can need at most; the blocks of the others
// leave after a look at the plan. Nothing is read back on the host, so a captured graph serves any ids.
#pragma once

#include "device.cuh"

namespace lora_kernels {

// The plan of `pairs` pairs of `adapters` adapters; without a table every pair is of adapter 0.
struct Plan {
  const int32_t* table;
  int pairs, adapters;

  // The most tiles of `size` pairs that any plan of this length has.
  int tiles(int size) const {
    if (!table) return (pairs + size - 1) / size;
    int used = adapters < pairs ? adapters : pairs;
    return pairs / size + used < pairs ? pairs / size + used : pairs;
  }
};

// Pairs of one adapter, by the places they have in the plan; none where count is 0.
struct Tile {
  int adapter, start, count;
};

// Tile number `index` of a plan; the whole warp calls, and every lane gets it.
__device__ __forceinline__ Tile find_tile(const Plan& plan, int index, int size) {
  if (!plan.table) {
    int start = index * size;
    return {0, start, min(size, plan.pairs - start)};
  }
  Tile none{0, 0, 0};
  if (plan.table[1] != plan.adapters) return none;  // a plan of other adapters has none of these
  int lane = threadIdx.x % 32, before = 0;
  for (int first = 0; first < plan.adapters; first += 32) {
    int adapter = first + lane, start = 0, count = 0;
    if (adapter < plan.adapters) {
      start = plan.table[2 + adapter];
      count = plan.table[3 + adapter] - start;
    }
    int tiles = (count + size - 1) / size, until = tiles;
    for (int step = 1; step < 32; step *= 2) {
      int other = __shfl_up_sync(0xffffffff, until, step);
      if (lane >= step) until += other;
    }
    int place = index - before - (until - tiles);
    unsigned found = __ballot_sync(0xffffffff, place >= 0 && place < tiles);
    before += __shfl_sync(0xffffffff, until, 31);
    if (!found) continue;
    int owner = __ffs(found) - 1;
    start = __shfl_sync(0xffffffff, start + place * size, owner);
    count = __shfl_sync(0xffffffff, min(size, count - place * size), owner);
    return {first + owner, start, count};
  }
  return none;
}

// The pair at a place of the plan, -1 where there is none such.
__device__ __forceinline__ int pair_at(const Plan& plan, int place) {
  if (!plan.table) return place;
  int pair = plan.table[3 + plan.adapters + place];
  return pair >= 0 && pair < plan.pairs ? pair : -1;
}

// Integers int32 or int64 of any strides, [M] or [M, columns].
struct Integers {
  const void* data;
  bool wide;
  int columns;
  int64_t row_stride, column_stride;

  __device__ __forceinline__ int64_t at(int i) const {
    int64_t offset = i / columns * row_stride + i % columns * column_stride;
    return wide ? static_cast<const int64_t*>(data)[offset] : static_cast<const int32_t*>(data)[offset];
  }
};

// What a plan is made of: the id of each pair, or of each segment bounds[i] to bounds[i + 1]; with an order, the ids or
// segments are of the pairs order[0], order[1], ...
struct PlanArguments {
  int32_t* table;
  Integers ids, bounds, order;
  bool segmented, ordered;
  int pairs, segments, adapters;
};

// The id at a position, -1 where there is none.
__device__ __forceinline__ int64_t id_at(const PlanArguments& p, int position) {
  if (position >= p.pairs) return -1;
  if (!p.segmented) return p.ids.at(position);
  int low = 0, high = p.segments + 1;  // how many bounds lie at or before it
  while (low < high) {
    int middle = (low + high) / 2;
    if (p.bounds.at(middle) <= position)
      low = middle + 1;
    else
      high = middle;
  }
  return low >= 1 && low <= p.segments ? p.ids.at(low - 1) : -1;
}

// A block an adapter: counts the pairs of the adapters before it, then lists its own in order.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) plan_kernel(const PlanArguments p) {
  LORA_KERNELS_SHARED(memory);
  int* counts = reinterpret_cast<int*>(memory);  // of each warp
  constexpr int kWarps = THREADS / 32;
  int mine = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t* pairs = p.table + 3 + p.adapters;

  int lower = 0;
  for (int i = threadIdx.x; i < p.pairs; i += THREADS) {
    int64_t id = id_at(p, i);
    lower += id >= 0 && id < mine;
  }
  for (int step = 16; step; step /= 2) lower += __shfl_xor_sync(0xffffffff, lower, step);
  if (lane == 0) counts[warp] = lower;
  __syncthreads();
  int start = 0;
  for (int w = 0; w < kWarps; ++w) start += counts[w];
  __syncthreads();

  int stop = start;
  for (int first = 0; first < p.pairs; first += THREADS) {
    int i = first + threadIdx.x;
    bool is_mine = mine < p.adapters && id_at(p, i) == mine;
    unsigned votes = __ballot_sync(0xffffffff, is_mine);
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    int place = stop + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) place += counts[w];
      stop += counts[w];
    }
    if (is_mine) pairs[place] = p.ordered ? static_cast<int32_t>(p.order.at(i)) : i;
    __syncthreads();
  }

  if (threadIdx.x) return;
  if (mine < p.adapters) p.table[2 + mine] = start;
  if (mine + 1 >= p.adapters) {
    p.table[0] = p.segmented && !p.ordered ? static_cast<int32_t>(p.bounds.at(p.segments)) : p.pairs;
    p.table[1] = p.adapters;
    p.table[2 + p.adapters] = stop;
  }
}

}  // namespace lora_kernels
