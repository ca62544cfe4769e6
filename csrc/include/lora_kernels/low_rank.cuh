// y += s (x Aᵀ) Bᵀ for the rows of many adapters: a shrink, v = x Aᵀ, and an expand, y += s v Bᵀ.
//
// The rank is the tensor cores' side of 16 in the shrink, and B's columns are in the expand, so that a few rows of one
// adapter fill their side of 8. Both read an adapter's factors once for all rows of a tile.
//
// K is summed in chunks, and each chunk by four warps, all in an order that K alone decides: a row's bits depend on
// nothing else in the batch. Blocks that share K leave a plane of sums each, which the expand adds up in order.
#pragma once

#include "fragments.cuh"
#include "grouped.cuh"

namespace lora_kernels {

constexpr int kMostMatrices = 64;  // slices, or adapters of a list
constexpr int kThreads = 128, kWarps = 4;
constexpr int kRankBlock = 16;    // ranks of a shrink's block
constexpr int kStep = 32;         // of k, in a warp
constexpr int kWarpColumns = 64;  // of an expand's warp
constexpr int kExpandRows = 16;   // of an expand at a time

// A or B of one slice, or of one adapter of a list: [adapter, rank, width].
struct Factor {
  const void* data;
  int64_t adapter_stride, rank_stride, width_stride;
  int rank, width;
  bool wide;  // 16 bytes can be read at once, of A along K, of B along the ranks
};

struct Factors {
  Factor of[kMostMatrices];
  bool listed;
  int rank;  // the padded one, R

  __device__ __forceinline__ const Factor& at(int slice, int adapter) const { return of[listed ? adapter : slice]; }
  template <class T>
  __device__ __forceinline__ const T* data(const Factor& factor, int adapter) const {
    return static_cast<const T*>(factor.data) + (listed ? 0 : adapter * factor.adapter_stride);
  }
};

// Of a slice and an adapter: values [S, L] of any strides, or none.
template <class T>
struct PerAdapter {
  const T* data;
  int64_t slice_stride, adapter_stride;

  __device__ __forceinline__ T at(int slice, int adapter, T otherwise) const {
    return data ? data[slice * slice_stride + adapter * adapter_stride] : otherwise;
  }
};

// The live rank of a slice of an adapter.
__device__ __forceinline__ int live_rank(const PerAdapter<int32_t>& ranks, const Factor& factor, int rank, int slice,
                                         int adapter) {
  int whole = min(factor.rank, rank);
  return max(0, min(whole, ranks.at(slice, adapter, whole)));
}

struct ShrinkArguments {
  float* parts;  // [planes, S, P, R]
  const void* x;
  int64_t x_row, x_column;
  bool x_wide;
  Factors A;
  bool packed;  // all slices in one stack, each at the live ranks of those before it
  PerAdapter<int32_t> ranks;
  Plan plan;
  int per_row, K, slices;
  int chunk, chunks;  // of K, those of one block
};

// The products of a warp's share of K, begin to end: acc[i] += of 16 ranks, g and g + 8 of a lane, and of 8 rows.
// GROUPS: how many eights of rows there are at most; with one there are registers for several steps' loads.
template <int GROUPS, bool WIDE, class X, class T, int ROWS>
__device__ __forceinline__ void shrink_share(float (&acc)[ROWS][4], const T* a, const T* a8, int64_t a_stride,
                                             const X* const (&x)[ROWS], int64_t x_stride, int groups, int begin,
                                             int end, int K) {
  int first = threadIdx.x % 4 * 8;
#pragma unroll(GROUPS > 1 ? 1 : sizeof(X) + sizeof(T) < 8 ? 4 : 2)
  for (int step = begin; step < end; step += kStep) {
    int k = step + first, live = K - k;
    Eight<T> left = WIDE ? load_eight(a + k) : load_eight(a + k * a_stride, a_stride, live);
    Eight<T> left8 = WIDE ? load_eight(a8 + k) : load_eight(a8 + k * a_stride, a_stride, live);
    Eight<X> right[GROUPS];
#pragma unroll
    for (int i = 0; i < GROUPS; ++i)
      if (i < groups) right[i] = WIDE ? load_eight(x[i] + k) : load_eight(x[i] + k * x_stride, x_stride, live);
    multiply(acc, left, left8, right, groups);
  }
}

// Eights of rows in a shrink's tile: as many as there are registers for.
template <class X, class T>
constexpr int kShrinkRows = 32 / (sizeof(X) * sizeof(T));

// What a thread reads in a shrink: rows g and g + 8 of 16 ranks, and row g of each eight of a tile's. A row or rank
// that is none is another one over again: its sums go nowhere.
template <class X, class T>
struct ShrinkRows {
  static constexpr int kRows = kShrinkRows<X, T>;
  const Factor& factor;
  const T *a, *a8;
  const X* x[kRows];
  int groups;

  __device__ __forceinline__ ShrinkRows(const ShrinkArguments& p, const Tile& tile, const Factor& factor, int slice,
                                        int rank, int first_rank)
      : factor(factor), groups((tile.count + 7) / 8) {
    int g = threadIdx.x % 32 / 4;
    const T* from = p.A.template data<T>(factor, tile.adapter);
    if (p.packed) from += slice * rank * factor.rank_stride;
    a = from + min(first_rank + g, rank - 1) * factor.rank_stride;
    a8 = from + min(first_rank + g + 8, rank - 1) * factor.rank_stride;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      int pair = max(0, pair_at(p.plan, tile.start + min(8 * i + g, tile.count - 1)));
      x[i] = static_cast<const X*>(p.x) + pair / p.per_row * p.x_row;
    }
  }

  // v[i] += the sum over one chunk of K, in a fixed order, of rank first_rank + rank() and row 8 i + row() of the tile.
  // `sums`: [kWarps, kRows, 4, 32] in shared memory, which nobody may be reading.
  __device__ __forceinline__ void add_chunk(float (&v)[kRows], const ShrinkArguments& p, int chunk, float* sums) const {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, share = p.chunk / kWarps;
    float acc[kRows][4] = {};
    int begin = chunk * p.chunk + warp * share, end = min(begin + share, p.K);
    bool wide = p.x_wide && factor.wide && begin + share <= p.K;
    if (wide && groups == 1)
      shrink_share<1, true>(acc, a, a8, 1, x, 1, groups, begin, end, p.K);
    else if (wide)
      shrink_share<kRows, true>(acc, a, a8, 1, x, 1, groups, begin, end, p.K);
    else
      shrink_share<kRows, false>(acc, a, a8, factor.width_stride, x, p.x_column, groups, begin, end, p.K);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < 4; ++j) sums[((warp * kRows + i) * 4 + j) * 32 + lane] = acc[i][j];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float sum = sums[i * kThreads + threadIdx.x];
      for (int w = 1; w < kWarps; ++w) sum += sums[(w * kRows + i) * kThreads + threadIdx.x];
      v[i] += sum;
    }
  }

  // As the fragments lie: thread 32 j + lane gets the lane's element j.
  static __device__ __forceinline__ int rank() { return threadIdx.x % 32 / 4 + threadIdx.x / 64 * 8; }
  static __device__ __forceinline__ int row() { return threadIdx.x % 4 * 2 + threadIdx.x / 32 % 2; }
};

// Grid: (tiles, slices x blocks of ranks, planes). A block makes v of 16 ranks and a tile's pairs.
template <class X, class T>
__global__ void __launch_bounds__(kThreads, 2) shrink_kernel(const __grid_constant__ ShrinkArguments p) {
  LORA_KERNELS_SHARED(memory);
  using Rows = ShrinkRows<X, T>;
  Tile tile = find_tile(p.plan, blockIdx.x, 8 * Rows::kRows);
  if (tile.count <= 0) return;
  int rank_blocks = (p.A.rank + kRankBlock - 1) / kRankBlock;
  int slice = blockIdx.y / rank_blocks, first_rank = blockIdx.y % rank_blocks * kRankBlock;
  const Factor& factor = p.A.at(p.packed ? 0 : slice, tile.adapter);
  int rank = live_rank(p.ranks, factor, p.A.rank, slice, tile.adapter);
  if (first_rank >= rank) return;

  Rows rows(p, tile, factor, slice, rank, first_rank);
  float v[Rows::kRows] = {};
  for (int c = 0; c < p.chunks; ++c) {
    if (c) __syncthreads();
    rows.add_chunk(v, p, blockIdx.z * p.chunks + c, reinterpret_cast<float*>(memory));
  }

  int r = first_rank + Rows::rank();
  if (r >= rank) return;
#pragma unroll
  for (int i = 0; i < Rows::kRows; ++i) {
    int place = 8 * i + Rows::row(), pair = place < tile.count ? pair_at(p.plan, tile.start + place) : -1;
    if (pair < 0) continue;
    int64_t plane = int64_t(blockIdx.z) * p.slices + slice;
    p.parts[(plane * p.plan.pairs + pair) * p.A.rank + r] = v[i];
  }
}

struct ExpandArguments {
  void* y;
  int64_t y_row, y_column;
  bool y_wide;
  const float* parts;  // [planes, slices, P, R]
  int planes;
  Factors B;
  PerAdapter<int32_t> ranks;
  PerAdapter<float> scaling;
  const float* weights;  // [M, per_row]
  int64_t weights_row, weights_column;
  float scale;
  Plan plan;
  int per_row, slices, tile;  // pairs of a row of weights; slices; pairs of a tile
};

// Bytes of shared memory for B and for v, of ranks that are a multiple of 16; each eight columns of B end in 16 bytes
// of nothing, so that the same 16 bytes of columns 0, 8, ..., 56 lie in different banks.
__host__ __device__ __forceinline__ int expand_b_bytes(int columns, int ranks, int element) {
  return columns * (ranks * element + 2);
}
__host__ __device__ __forceinline__ int expand_v_stride(int ranks) { return ranks + 8; }

// B of a block's columns, as far as the live rank, into shared memory; zero in the rest of its last 32 bytes.
template <class T>
__device__ __forceinline__ void load_b(unsigned char* to, int pitch, const T* b, const Factor& factor, int rank,
                                       int columns, int live_columns) {
  constexpr int kEach = 16 / sizeof(T);
  int units = (rank + 2 * kEach - 1) / (2 * kEach) * 2;
  if (factor.wide) {
    for (int i = threadIdx.x; i < columns * units; i += blockDim.x) {
      int n = i / units, r = i % units * kEach, live = n < live_columns ? max(0, min(kEach, rank - r)) : 0;
      const T* from = live ? b + n * factor.width_stride + r : b;
      copy_async(to + n * pitch + n / 8 * 16 + r * sizeof(T), from, live * sizeof(T));
    }
  } else {
    int ranks = units * kEach;
    bool by_rank = factor.rank_stride == 1;
    for (int i = threadIdx.x; i < columns * ranks; i += blockDim.x) {
      int n = by_rank ? i / ranks : i % columns, r = by_rank ? i % ranks : i / columns;
      bool live = n < live_columns && r < rank;
      T value = live ? b[n * factor.width_stride + r * factor.rank_stride] : rounded<T>(0.f);
      *reinterpret_cast<T*>(to + n * pitch + n / 8 * 16 + r * sizeof(T)) = value;
    }
  }
  commit_copies();
}

// y[0 to live] += sum, of eight columns; `wide`: 16 bytes at a time.
template <class Y>
__device__ __forceinline__ void add_eight(Y* y, int64_t stride, bool wide, int live, const float (&sum)[8]) {
  if (wide && live >= 8) {
    uint4 words[sizeof(Y) / 2];
    for (int i = 0; i < int(sizeof(Y) / 2); ++i) words[i] = reinterpret_cast<const uint4*>(y)[i];
    Eight<Y> old;
    memcpy(&old, words, sizeof old);
    for (int i = 0; i < 8; ++i) old.value[i] = rounded<Y>(to_float(old.value[i]) + sum[i]);
    memcpy(words, &old, sizeof old);
    for (int i = 0; i < int(sizeof(Y) / 2); ++i) reinterpret_cast<uint4*>(y)[i] = words[i];
  } else {
    for (int i = 0; i < 8; ++i)
      if (i < live) y[i * stride] = rounded<Y>(to_float(y[i * stride]) + sum[i]);
  }
}

// What a block of an expand works on: columns `first` on of a slice, which begins at column `before` of y.
struct Columns {
  int slice, first, before;
};

__device__ __forceinline__ Columns columns_of(const ExpandArguments& p, int block, int columns) {
  int slice = 0, before = 0;
  for (; slice + 1 < p.slices; ++slice) {
    int width = p.B.at(slice, 0).width, blocks = (width + columns - 1) / columns;
    if (block < blocks) break;
    block -= blocks;
    before += width;
  }
  return {slice, block * columns, before};
}

// v times s and the pair's weight.
__device__ __forceinline__ float scaled(const ExpandArguments& p, float v, float scale, int pair) {
  v *= scale;
  if (p.weights) v *= p.weights[pair / p.per_row * p.weights_row + pair % p.per_row * p.weights_column];
  return v;
}

// y += v Bᵀ of 16 pairs of a tile, those from `done` on. v: [16, v_stride], scaled, and b, as load_b leaves it, in
// shared memory. A warp has 64 columns, of which lanes 4 g to 4 g + 3 get 8 g to 8 g + 7: row r of the instruction's
// i-th 16 rows is column 8 (r % 8) + 2 i + r / 8.
template <class T, class Y>
__device__ __forceinline__ void expand_rows(const ExpandArguments& p, const Tile& tile, int done, const float* v,
                                            int v_stride, const unsigned char* b, int pitch, int rank,
                                            const Columns& at, int width) {
  constexpr int kTiles = kWarpColumns / 16, kGroups = kExpandRows / 8, kRanks = 32 / sizeof(T);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  int own = 8 * (lane % 8) + lane / 8 % 2;  // the column whose 16 bytes this lane points at
  b += (warp * kWarpColumns + own) * pitch + own / 8 * 16 + warp * kWarpColumns / 8 * 16 + lane / 16 * 16;
  int steps = (rank + kRanks - 1) / kRanks;
  float acc[kGroups][kTiles][4] = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    using Ranks = OfRanks<T, sizeof(Y) == 2 ? 2 : 3>;
    const float* v_at = v + g * v_stride + step * kRanks;
    Ranks ranks[kGroups] = {Ranks(v_at, t), Ranks(v_at + 8 * v_stride, t)};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      uint32_t a[4];
      load_matrices(a, b + 2 * i * pitch + step * 32);
      for (int n = 0; n < kGroups; ++n) ranks[n].multiply(acc[n][i], a);
    }
  }

  int column = at.first + warp * kWarpColumns + 8 * g;
  bool wide = p.y_wide && at.before * sizeof(Y) % 16 == 0;
#pragma unroll
  for (int n = 0; n < kGroups; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      int place = done + 8 * n + 2 * t + j, pair = place < tile.count ? pair_at(p.plan, tile.start + place) : -1;
      if (pair < 0) continue;
      float sum[8];
      for (int i = 0; i < 8; ++i) sum[i] = acc[n][i / 2][2 * (i % 2) + j];
      Y* y = static_cast<Y*>(p.y) + pair * p.y_row + (at.before + column) * p.y_column;
      add_eight(y, p.y_column, wide, width - column, sum);
    }
}

// Grid: (tiles, blocks of columns of all slices).
template <class T, class Y>
__global__ void __launch_bounds__(kThreads, 3) expand_kernel(const __grid_constant__ ExpandArguments p) {
  LORA_KERNELS_SHARED(memory);
  Tile tile = find_tile(p.plan, blockIdx.x, p.tile);
  if (tile.count <= 0) return;
  int columns = blockDim.x / 32 * kWarpColumns;
  Columns at = columns_of(p, blockIdx.y, columns);
  const Factor& factor = p.B.at(at.slice, tile.adapter);
  int rank = live_rank(p.ranks, factor, p.B.rank, at.slice, tile.adapter);
  if (rank == 0) return;

  int padded = (p.B.rank + 15) / 16 * 16, pitch = padded * sizeof(T), v_stride = expand_v_stride(padded);
  float* v = reinterpret_cast<float*>(memory + expand_b_bytes(columns, padded, sizeof(T)));
  const T* b = p.B.template data<T>(factor, tile.adapter) + at.first * factor.width_stride;
  load_b(memory, pitch, b, factor, rank, columns, factor.width - at.first);

  int used = (rank * int(sizeof(T)) + 31) / 32 * 32 / int(sizeof(T));
  float scale = p.scale * p.scaling.at(at.slice, tile.adapter, 1.f);
  for (int done = 0; done < tile.count; done += kExpandRows) {
    if (done) __syncthreads();
    for (int i = threadIdx.x; i < kExpandRows * used; i += blockDim.x) {
      int row = i / used, r = i % used, place = done + row;
      int pair = place < tile.count && r < rank ? pair_at(p.plan, tile.start + place) : -1;
      float sum = 0.f;
      if (pair >= 0) {
        int64_t plane = int64_t(p.slices) * p.plan.pairs * p.B.rank;
        const float* part = p.parts + (int64_t(at.slice) * p.plan.pairs + pair) * p.B.rank + r;
        sum = *part;
#pragma unroll 8
        for (int c = 1; c < p.planes; ++c) sum += part[c * plane];
        sum = scaled(p, sum, scale, pair);
      }
      v[row * v_stride + r] = sum;
    }
    wait_copies<0>();
    __syncthreads();
    expand_rows<T, Y>(p, tile, done, v, v_stride, memory, pitch, rank, at, factor.width);
  }
}

struct SumArguments {
  void* out;
  int64_t out_row, out_column;
  const float* parts;
  int64_t part, part_row;
  int columns, count;
};

// out[m, n] = (its old value, or 0) + parts[0, m, n] + parts[1, m, n] + ..., in this order, rounded once.
template <class Y, bool ADD>
__global__ void __launch_bounds__(kThreads) sum_kernel(const SumArguments p) {
  int n = blockIdx.x * blockDim.x + threadIdx.x;
  int64_t m = blockIdx.y;
  if (n >= p.columns) return;
  const float* at = p.parts + m * p.part_row + n;
  float sum = at[0];
#pragma unroll 8
  for (int c = 1; c < p.count; ++c) sum += at[c * p.part];
  Y* out = static_cast<Y*>(p.out) + m * p.out_row + n * p.out_column;
  if (!ADD)
    *out = rounded<Y>(sum);
  else if (sum != 0.f)  // -0 stays what it is
    *out = rounded<Y>(to_float(*out) + sum);
}

}  // namespace lora_kernels
