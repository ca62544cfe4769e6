// From a transform's arguments to its launch, without torch or CUDA's runtime: the .cu file and the host executor share
// it. A Device has launch(grid, block, shared bytes, kernel, arguments...) and shared_limit(), the bytes of shared
// memory a block may have.
#pragma once

#include <vector>

#include "array.h"
#include "transforms.cuh"

namespace lora_kernels {

inline Divisor divisor(uint32_t value) {
  return {value, value > 1 ? uint32_t(((uint64_t(1) << 32) + value - 1) / value) : 0};
}

// The passes of H over a row, in an order in which the first reads x and the last writes y in runs of neighbours.
struct HadamardPasses {
  Pass passes[kMostPasses];
  int count = 0;
  bool fit = true;        // false where there are more than kMostPasses, or a base has more outputs than a block holds
  uint32_t widest = 8;    // radix in registers, at least 8
  uint32_t any_base = 0;  // the largest base that is not held in registers
  uint32_t pad;           // see Hadamard

  // The bytes of shared memory that some rows take.
  size_t bytes(uint32_t rows) const { return (rows * pairs_ + (rows * pairs_ >> pad)) * size_t(8); }

  HadamardPasses(uint32_t pairs, const int64_t* orders, int bases, bool transpose) : pairs_(pairs) {
    uint32_t stride = pairs, signs = 0;
    for (int i = 0; i < bases; ++i) stride /= uint32_t(orders[i]);
    pad = stride >= 16 ? 4 : stride == 8 ? 3 : stride == 4 ? 2 : kNoPad;
    stride = pairs;
    for (int i = 0; i < bases; ++i) {
      uint32_t order = uint32_t(orders[i]), words = order * ((order + 31) / 32);
      stride /= order;
      add(order, stride, transpose ? signs + words : signs);
      signs += 2 * words;
    }
    add_powers(stride, bases ? 2 : 3);
    set_end(0);
    if (count > 1 || passes[0].radix > 1) set_end(count - 1);
  }

private:
  uint32_t pairs_;
  static constexpr uint32_t kNoPad = 31;
  static constexpr uint32_t kRun = 8;  // pairs: 32 bytes of 16-bit numbers, the least that memory moves

  static bool in_registers(uint32_t radix) {
    return radix == 12 || radix == 20 || radix == 28 || (radix <= 32 && !(radix & (radix - 1)));
  }

  Pass pass(uint32_t radix, uint32_t stride, uint32_t signs) const {
    return {radix, divisor(stride), divisor(pairs_ / radix), (stride + (stride >> pad)) * 8, signs};
  }

  void insert(int at, Pass pass) {
    fit = fit && count < kMostPasses;
    if (!fit) return;
    for (int i = count++; i > at; --i) passes[i] = passes[i - 1];
    passes[at] = pass;
  }

  void add(uint32_t radix, uint32_t stride, uint32_t signs = 0) {
    if (!in_registers(radix)) any_base = max(any_base, radix);
    fit = fit && radix <= kMostThreads / 32 * kOutputs;
    if (in_registers(radix)) widest = max(widest, radix);
    insert(count, pass(radix, stride, signs));
  }

  // Sylvester's matrix of order `size`, in `parts` passes of radix up to 32, in more where they are too few; the last
  // has a stride of 1.
  void add_powers(uint32_t size, int parts) {
    int bits = 0;
    while (size >> (bits + 1)) ++bits;
    while (5 * parts - 1 < bits) ++parts;
    int low = min(bits, 4);
    for (int end = bits; end > low;) {
      int take = (end - low + parts - 2) / (parts - 1);
      end -= take, --parts;
      add(1u << take, 1u << end);
    }
    if (low) add(1u << low, 1);
  }

  // Puts a pass of runs at one end of the list, or, where there is none, one that only moves.
  void set_end(int end) {
    for (int i = end ? 1 : 0; i < count; ++i)
      if (in_registers(passes[i].radix) && passes[i].stride.value >= kRun) {
        Pass run = passes[i];
        passes[i] = passes[end];
        passes[end] = run;
        return;
      }
    insert(end ? count : 0, pass(1, 1, 0));
  }
};

inline uint32_t chunks_of(uint32_t order) { return (order + kOutputs - 1) / kOutputs; }

// y = scale · H x for rows x of N numbers and contiguous rows y of the same type. `signs` are null where there is no
// base.
template <class Device>
void hadamard(Device& device, const Matrix& x, void* y, const void* signs, const std::vector<int64_t>& orders,
              double scale, bool transpose) {
  constexpr uint32_t kPairs = 2048;  // of a block, at least, where rows are short: 16 KB of shared memory
  int64_t power = x.columns;
  for (int64_t order : orders) {
    require(order > 1 && power % order == 0, "orders");
    power /= order;
  }
  require(power > 0 && power % 2 == 0 && !(power & (power - 1)), "orders");
  HadamardPasses plan(uint32_t(x.columns / 2), orders.data(), int(orders.size()), transpose);
  require(plan.fit, "orders");
  require(plan.bytes(1) <= size_t(device.shared_limit()), "row too long");

  Hadamard a{};
  a.x = x.data, a.y = y, a.signs = static_cast<const uint32_t*>(signs);
  a.rows = x.rows, a.row_stride = x.row_stride, a.stride = x.column_stride;
  a.scale = float(scale), a.transpose = transpose;
  a.pairs = uint32_t(x.columns / 2);
  a.pad = plan.pad;
  a.rows_each = max(1u, kPairs / a.pairs);
  a.count = plan.count;
  for (int i = 0; i < plan.count; ++i) a.passes[i] = plan.passes[i];
  uint32_t tasks = a.pairs * a.rows_each / plan.widest;
  if (plan.any_base) tasks = a.pairs * a.rows_each / plan.any_base / kColumns * chunks_of(plan.any_base) * 32;
  uint32_t threads = max(128u, max(chunks_of(plan.any_base) * 32, (tasks + 31) / 32 * 32));
  auto start = [&](auto kernel) {
    dim3 grid(uint32_t((a.rows + a.rows_each - 1) / a.rows_each));
    device.launch(grid, min(threads, uint32_t(kMostThreads)), plan.bytes(a.rows_each), kernel, a);
  };
  with_type(x.type, [&](auto value) {
    using T = decltype(value);
    a.paired = a.stride == 1 && (a.row_stride % 2 == 0 || a.rows == 1) &&
               reinterpret_cast<uintptr_t>(a.x) % (2 * sizeof(T)) == 0;
    if (plan.any_base)
      start(hadamard_kernel<T, kAnyBase>);
    else if (plan.widest <= 16)
      start(hadamard_kernel<T, 16>);
    else if (plan.widest == 20)
      start(hadamard_kernel<T, 20>);
    else if (plan.widest == 28)
      start(hadamard_kernel<T, 28>);
    else
      start(hadamard_kernel<T, 32>);
  });
}

}  // namespace lora_kernels
