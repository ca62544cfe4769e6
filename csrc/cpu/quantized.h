// What the `quantized` kernels of an instruction set offer to the ops. Plain types only: see vec.h.
#pragma once

#include "low_rank.h"

namespace lora_kernels {

// A packed weight [N, K]: reference/quantized.py says what its numbers are.
struct Codes {
  const uint8_t* data;
  int64_t stride;  // bytes a row
  bool wide;       // int8 and no table, else two codes in a byte
  const float* scales;
  const float* offsets;  // or null
  int64_t groups;        // of a row
  int64_t group;
  const float* table;  // [16], or null
  int64_t N, K;
};

// The rows of x or dy as a product reads them: reordered in memory of the caller's, or as they are.
struct PackedRows {
  Rows rows;
  int m;
  char* data;   // `packed_bytes` bytes
  float* sums;  // of x's groups, [m, groups], where there are offsets
};

// x Wᵀ or dy W for few rows: a sum over all of `in`, for columns of y or of dx.
struct QuantizedProduct {
  // Up to how many rows this is faster than torch's product with what `decode` makes.
  int64_t (*most_rows)(const Codes& w, DType dtype);
  int64_t (*packed_bytes)(const Codes& w, DType dtype, int m);
  // Reorders rows [first, first + count).
  void (*pack)(const Codes& w, const PackedRows& x, int first, int count);
  // out[i, n - begin] of the product, for all rows and n in [begin, end); begin a multiple of 32.
  void (*run)(const Codes& w, const PackedRows& x, int64_t begin, int64_t end, float* out, int64_t out_stride,
              void* scratch);
};

struct QuantizedKernels {
  // out[i, j] = W[row + i, column + j], rounded once.
  void (*decode)(const Codes& w, int64_t row, int64_t rows, int64_t column, int64_t columns, void* out, DType dtype,
                 int64_t out_stride);
  QuantizedProduct forward;   // x Wᵀ
  QuantizedProduct backward;  // dy W
  // y = sum + bias, rounded once; bias may be null.
  void (*round)(const float* sum, int64_t sum_stride, const float* bias, const Rows& y, int m, int64_t columns);
};

}  // namespace lora_kernels
