// The launches of the `low_rank` ops, the same for a GPU and for the host executor.
//
// A Device has launch(grid, block, shared bytes, kernel, arguments...) and launch_clusters(blocks, the same), which is
// called where clusters() says so; floats(count), memory that lasts until the op has run; zero(pointer, bytes); and
// processors() and shared_limit(), the bytes of shared memory a block may have.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "array.h"
#include "low_rank.cuh"
#include "low_rank_cluster.cuh"

namespace lora_kernels {

// The factors of the slices, [L, rank, width], or of the adapters of a list, [rank, width]; rank_axis counts from
// there.
struct Sources {
  Factors factors;
  Element type;
  int slices, adapters, width = 0;  // width: of all slices

  Sources(const std::vector<Array>& from, int rank_axis) {
    require(!from.empty() && from.size() <= kMostMatrices, "more factors than a kernel takes");
    factors.listed = from[0].dims == 2;
    factors.rank = 0;
    type = from[0].type;
    slices = factors.listed ? 1 : int(from.size());
    adapters = factors.listed ? int(from.size()) : int(from[0].sizes[0]);
    int64_t vector = 16 / bytes_of(type);
    for (size_t i = 0; i < from.size(); ++i) {
      const Array& f = from[i];
      require(f.dims == (factors.listed ? 2 : 3) && f.type == type, "factors differ");
      int rank_dim = f.dims - 2 + rank_axis, width_dim = f.dims - 1 - rank_axis;
      Factor& to = factors.of[i];
      to = {f.data,
            factors.listed ? 0 : f.strides[0],
            f.strides[rank_dim],
            f.strides[width_dim],
            int(f.sizes[rank_dim]),
            int(f.sizes[width_dim]),
            false};
      if (to.rank == 1 && rank_axis) to.rank_stride = 1;
      require(!factors.listed || !rank_axis || to.width == factors.of[0].width, "factors differ");
      int64_t row = rank_axis ? to.width_stride : to.rank_stride, unit = rank_axis ? to.rank_stride : to.width_stride;
      bool one_row = (rank_axis ? to.width : to.rank) == 1, one_adapter = factors.listed || f.sizes[0] == 1;
      to.wide = unit == 1 && (one_row || row % vector == 0) && (one_adapter || to.adapter_stride % vector == 0) &&
                reinterpret_cast<uintptr_t>(f.data) % 16 == 0;
      factors.rank = std::max(factors.rank, to.rank);
      if (!factors.listed || i == 0) width += to.width;
    }
  }
};

template <class T>
PerAdapter<T> per_adapter(const Array* values) {
  if (!values) return {nullptr, 0, 0};
  return {static_cast<const T*>(values->data), values->dims == 2 ? values->strides[0] : 0,
          values->strides[values->dims - 1]};
}

inline Integers integers(const Array& from) {
  require(from.type == Element::i32 || from.type == Element::i64, "ids are integers");
  bool matrix = from.dims == 2;
  int columns = matrix ? int(from.sizes[1]) : 1;
  return {from.data, from.type == Element::i64, std::max(columns, 1), from.dims ? from.strides[0] : 0,
          matrix ? from.strides[1] : 0};
}

// Which adapter each pair uses: ids, by pair or by segment, or a plan; or none, and all use adapter 0.
struct Routing {
  const Array *ids, *indptr, *plan;

  int pairs(int64_t rows) const { return int(ids && !indptr ? ids->numel() : rows); }
};

template <class Device>
void write_plan(Device& device, const Array& table, int adapters, const Array& ids, const Array* indptr,
                const Array* order) {
  constexpr int kPlanThreads = 256;
  PlanArguments p = {};
  p.table = static_cast<int32_t*>(table.data);
  p.ids = integers(ids);
  p.segments = int(ids.numel());
  p.segmented = indptr, p.ordered = order;
  if (indptr) p.bounds = integers(*indptr);
  if (order) p.order = integers(*order);
  p.adapters = adapters;
  p.pairs = int(order ? order->numel() : indptr ? table.numel() - adapters - 3 : ids.numel());
  device.launch(dim3(std::max(adapters, 1)), dim3(kPlanThreads), kPlanThreads / 32 * sizeof(int),
                plan_kernel<kPlanThreads>, p);
}

// The plan of all pairs; ids take a kernel, and memory, of their own.
template <class Device>
Plan plan_of(Device& device, const Routing& routing, int pairs, int adapters) {
  if (routing.plan) return {static_cast<const int32_t*>(routing.plan->data), pairs, adapters};
  if (!routing.ids) return {nullptr, pairs, adapters};
  int64_t size = 3 + adapters + int64_t(pairs);
  Array table{device.floats(size), Element::i32, 1, {size}, {1}};
  write_plan(device, table, adapters, *routing.ids, routing.indptr, nullptr);
  return {static_cast<int32_t*>(table.data), pairs, adapters};
}

// out[m, n] (+)= Σ_c parts[c * part + m * part_row + n].
template <bool ADD, class Device>
void sum_parts(Device& device, const Matrix& out, const float* parts, int64_t part, int64_t part_row, int count) {
  if (out.rows * out.columns == 0) return;
  SumArguments p{out.data, out.row_stride, out.column_stride, parts, part, part_row, int(out.columns), count};
  with_type(out.type, [&](auto y) {
    constexpr int kMost = 65535;
    for (int64_t done = 0; done < out.rows; done += kMost) {
      int rows = int(std::min<int64_t>(kMost, out.rows - done));
      p.out = static_cast<decltype(y)*>(out.data) + done * out.row_stride;
      p.parts = parts + done * part_row;
      device.launch(dim3(divide_up(out.columns, kThreads), rows), dim3(kThreads), 0, sum_kernel<decltype(y), ADD>, p);
    }
  });
}

// How K is cut, which decides a row's bits.
struct Chunks {
  int size, count;

  explicit Chunks(int K) : size(256) {
    if (K > 4096)
      for (size = 512; size * 32 < K;) size *= 2;
    count = std::max(divide_up(K, size), 1);
  }
};

struct Parts {
  float* data;
  int planes;
};

inline ShrinkArguments shrink_arguments(const Matrix& x, const Sources& A, int packed, const Array* ranks,
                                        const Plan& plan) {
  ShrinkArguments p;
  p.parts = nullptr;
  p.A = A.factors;
  p.A.rank /= packed;
  p.slices = packed > 1 ? packed : A.slices;
  p.x = x.data, p.x_row = x.row_stride, p.x_column = x.column_stride, p.x_wide = x.wide();
  p.packed = packed > 1;
  p.ranks = per_adapter<int32_t>(ranks);
  p.plan = plan;
  p.per_row = std::max<int>(int(plan.pairs / std::max<int64_t>(x.rows, 1)), 1);
  p.K = int(x.columns);
  Chunks chunks(p.K);
  p.chunk = chunks.size, p.chunks = chunks.count;
  return p;
}

// v = x Aᵀ as planes [planes, S, P, R] to be added in order. Past live ranks and for pairs without an adapter they hold
// nothing in particular, or zero where `whole` is given, in which a single plane is then made.
template <class Device>
Parts shrink(Device& device, const Matrix& x, const Sources& A, int packed, const Array* ranks, const Plan& plan,
             float* whole) {
  ShrinkArguments p = shrink_arguments(x, A, packed, ranks, plan);
  int blocks = p.slices * divide_up(p.A.rank, kRankBlock);
  int64_t plane = int64_t(p.slices) * plan.pairs * p.A.rank;
  // Blocks share K while there are few of them, or little to add up; a row's bits are the same.
  constexpr int64_t kLittle = 32768, kMost = 16 << 20;
  bool few = int64_t(blocks) * plan.tiles(8 * kShrinkRows<bf16, bf16>) < 2 * device.processors();
  bool shared = plane <= kLittle || (few && plane * p.chunks <= kMost);
  Parts parts{whole, shared ? p.chunks : 1};
  if (!whole || parts.planes > 1) parts.data = device.floats(parts.planes * plane);
  p.parts = parts.data;
  if (whole) device.zero(p.parts, parts.planes * plane * sizeof(float));
  if (shared) p.chunks = 1;
  if (plane == 0 || plan.adapters == 0) return parts;
  with_type(x.type, [&](auto x_value) {
    using X = decltype(x_value);
    auto run = [&](auto kernel, int rows) {
      dim3 grid(plan.tiles(8 * rows), blocks, parts.planes);
      device.launch(grid, dim3(kThreads), rows * kWarps * kThreads * sizeof(float), kernel, p);
    };
    if (A.type == Element::f32)
      run(shrink_kernel<X, float>, kShrinkRows<X, float>);
    else if constexpr (sizeof(X) == 2) {
      require(x.type == A.type, "x and A differ");
      run(shrink_kernel<X, X>, kShrinkRows<X, X>);
    } else {
      require(false, "fp32 rows of 16-bit factors");
    }
  });
  return parts;
}

// What scales an expand.
struct Scales {
  const Array *scaling, *ranks, *weights;
  float scale;
};

// The shared memory of an expand's block of `warps` warps.
inline int expand_shared(int warps, int rank, int64_t element) {
  int padded = divide_up(rank, 16) * 16;
  return expand_b_bytes(warps * kWarpColumns, padded, int(element)) + kExpandRows * expand_v_stride(padded) * 4;
}

inline ExpandArguments expand_arguments(const Matrix& y, Parts v, const Sources& B, const Plan& plan,
                                        const Scales& scales, int per_row) {
  ExpandArguments p;
  p.y = y.data, p.y_row = y.row_stride, p.y_column = y.column_stride, p.y_wide = y.wide();
  p.parts = v.data, p.planes = v.planes;
  p.B = B.factors;
  p.ranks = per_adapter<int32_t>(scales.ranks), p.scaling = per_adapter<float>(scales.scaling);
  p.weights = nullptr, p.weights_row = p.weights_column = 0;
  if (scales.weights) {
    p.weights = static_cast<const float*>(scales.weights->data);
    p.weights_row = scales.weights->strides[0], p.weights_column = scales.weights->strides[1];
  }
  p.scale = scales.scale, p.plan = plan, p.per_row = per_row, p.slices = B.slices, p.tile = 64;
  return p;
}

// y += s · w · v Bᵀ, each slice into its own columns; y has a row for each pair, of which `per_row` share a row of
// weights.
template <class Device>
void expand_pairs(Device& device, const Matrix& y, Parts v, const Sources& B, const Plan& plan, const Scales& scales,
                  int per_row) {
  ExpandArguments p = expand_arguments(y, v, B, plan, scales, per_row);
  int tiles = plan.tiles(p.tile), warps = 2 * kWarps, blocks = 0;
  do {
    require(warps > 1, "a rank that outgrows shared memory");
    warps /= 2, blocks = 0;
    for (int s = 0; s < B.slices; ++s) blocks += divide_up(B.factors.of[s].width, warps * kWarpColumns);
  } while (expand_shared(warps, B.factors.rank, bytes_of(B.type)) > device.shared_limit() ||
           (warps > 1 && int64_t(blocks) * tiles < device.processors()));
  int shared = expand_shared(warps, B.factors.rank, bytes_of(B.type));
  auto run = [&](auto kernel) { device.launch(dim3(tiles, blocks), dim3(32 * warps), shared, kernel, p); };
  with_type(B.type, [&](auto b) {
    with_type(y.type, [&](auto to) {
      using T = decltype(b);
      using Y = decltype(to);
      if constexpr (sizeof(T) == 4 || sizeof(Y) == 4 || std::is_same_v<T, Y>)
        run(expand_kernel<T, Y>);
      else
        require(false, "y and B differ");
    });
  });
}

// Numbers of v's planes that an expand's blocks add up, each for itself, before it pays to do it once in a kernel.
constexpr int64_t kAddedMost = 4 << 20;

// The same, with the pairs of a row summed and rounded into y once.
template <class Device>
void expand(Device& device, const Matrix& y, Parts v, const Sources& B, const Plan& plan, const Scales& scales) {
  if (y.rows * y.columns == 0 || plan.pairs == 0 || plan.adapters == 0 || B.factors.rank == 0) return;
  int64_t plane = int64_t(B.slices) * plan.pairs * B.factors.rank;
  if (v.planes > 1 && plane * v.planes * divide_up(B.width, kWarps * kWarpColumns) > kAddedMost) {
    Matrix sum{device.floats(plane), Element::f32, 1, plane, plane, 1};
    sum_parts<false>(device, sum, v.data, plane, plane, v.planes);
    v = {static_cast<float*>(sum.data), 1};
  }
  int per_row = std::max<int>(int(plan.pairs / y.rows), 1);
  if (per_row == 1) return expand_pairs(device, y, v, B, plan, scales, 1);
  int64_t count = int64_t(plan.pairs) * y.columns;
  Matrix delta{device.floats(count), Element::f32, plan.pairs, y.columns, y.columns, 1};
  device.zero(delta.data, count * sizeof(float));
  expand_pairs(device, delta, v, B, plan, scales, per_row);
  sum_parts<true>(device, y, static_cast<const float*>(delta.data), y.columns, per_row * y.columns, per_row);
}

// Adds all in one launch, where the device has clusters, a block has room for a tile, and all is of one 16-bit type.
template <class Device>
bool added_by_clusters(Device& device, const Matrix& y, const Matrix& x, const Sources& A, const Sources& B, int packed,
                       const Plan& plan, const Scales& scales) {
  if (!device.clusters() || scales.weights || y.type != x.type || B.type != x.type || x.type == Element::f32)
    return false;
  ShrinkArguments p = shrink_arguments(x, A, packed, scales.ranks, plan);
  ExpandArguments q = expand_arguments(y, {nullptr, 0}, B, plan, scales, 1);
  constexpr int kTile = 8 * kShrinkRows<bf16, bf16>;
  int shared = ClusterMemory(B.factors.rank, kTile, p.chunks, 2).end;
  if (plan.pairs == 0 || B.factors.rank == 0 || shared > device.shared_limit()) return false;
  with_type(x.type, [&](auto value) {
    using T = decltype(value);
    if constexpr (sizeof(T) == 2)
      device.launch_clusters(kCluster, dim3(plan.tiles(kTile) * kCluster, B.slices), dim3(kThreads), shared,
                             add_kernel<T, T, T>, p, q);
  });
  return true;
}

template <class Device>
void low_rank_add(Device& device, const Matrix& y, const Matrix& x, const std::vector<Array>& A,
                  const std::vector<Array>& B, const Routing& routing, const Scales& scales) {
  Sources a(A, 0), b(B, 1);
  int packed = A.size() == 1 && B.size() > 1 && A[0].dims == 3 ? int(B.size()) : 1;
  int pairs = scales.weights ? int(scales.weights->numel()) : routing.pairs(x.rows);
  if (y.rows * y.columns == 0 || a.adapters == 0) return;
  Plan plan = plan_of(device, routing, pairs, a.adapters);
  if (added_by_clusters(device, y, x, a, b, packed, plan, scales)) return;
  expand(device, y, shrink(device, x, a, packed, scales.ranks, plan, nullptr), b, plan, scales);
}

// v [S, P, R] = x Aᵀ, zero past the live rank and where there is no adapter.
template <class Device>
void low_rank_shrink(Device& device, float* v, const Matrix& x, const Sources& A, const Routing& routing,
                     const Array* ranks, int pairs) {
  Plan plan = plan_of(device, routing, pairs, A.adapters);
  Parts parts = shrink(device, x, A, 1, ranks, plan, v);
  int64_t plane = int64_t(A.slices) * pairs * A.factors.rank;
  if (parts.planes > 1)
    sum_parts<false>(device, {v, Element::f32, 1, plane, plane, 1}, parts.data, plane, plane, parts.planes);
}

// y += s · w · v Bᵀ of a contiguous v [S, P, R].
template <class Device>
void low_rank_expand(Device& device, const Matrix& y, const float* v, int pairs, const std::vector<Array>& B,
                     const Routing& routing, const Scales& scales) {
  Sources b(B, 1);
  if (y.rows * y.columns == 0 || b.adapters == 0) return;
  Plan plan = plan_of(device, routing, pairs, b.adapters);
  expand(device, y, {const_cast<float*>(v), 1}, b, plan, scales);
}

}  // namespace lora_kernels
