// What the `transforms` and `spectral` kernels of an instruction set offer to the ops. Plain types only: see vec.h.
//
// A tile is as many rows of a matrix as a vector has lanes, transposed: vector c holds column c of each row. So a
// transform along the rows is scalar code over vectors, with no shuffles, for any length; rows that a tile lacks are
// zeros.
#pragma once

#include "low_rank.h"

namespace lora_kernels {

// Where column c of a row stands in a tile.
struct Order {
  bool evens_then_odds = false;  // 0, 2, 4, ..., 5, 3, 1
  int shift = 0;                 // 1: complex numbers
  int flip = 0;                  // 1: imaginary parts first

  __attribute__((always_inline)) int64_t place(int64_t c, int64_t columns) const {
    int64_t at = !evens_then_odds ? c : c % 2 ? columns - 1 - c / 2 : c / 2;
    return (at << shift) ^ flip;
  }
};

// A tile and memory for another one; what a kernel makes is in `now`.
struct Tile {
  float* now;
  float* other;
};

// H = H_1 ⊗ H_2 ⊗ ... ⊗ H_power, as reference/transforms.py has it.
struct Hadamard {
  struct Base {
    int64_t order;
    const float* entries;  // [order, order], ±1
  };
  const Base* bases;
  int count;
  int64_t power, length;
};

// The Fourier transform of rows of real numbers: of even length as complex numbers, two each.
struct Fourier {
  int64_t length;
  int64_t complex_length;  // length / 2, or an odd length itself
  int passes;
  int radix[40];
  const float* twiddles;  // (cos, -sin), pass by pass: of butterfly p its radix - 1 factors
  const float* roots;     // (cos, sin) of 2π j / radix for the passes of larger radices, one after the other
  const float* halves;    // (cos, sin) of 2π k / length, for k <= length / 4
  const float* quarters;  // (cos, sin) of π k / 2 length, for k <= length / 2
};

enum class Form { fourier, cosine, hartley };

// Entries of a sparse matrix, row by row (reference/spectral.py).
struct Sparse {
  int64_t rows, count;
  const int32_t* starts;   // [rows + 1]
  const int32_t* columns;  // [count]
  const int32_t* row_of;   // [count], for `products`
};

struct TransformKernels {
  int lanes;
  // Rows of x, and zeros after m of them.
  void (*load)(const Rows& x, int m, int64_t columns, const Order& order, float* tile);
  // out = tile + add, where there is one, of the same dtype; rounded once.
  void (*store)(const float* tile, int m, int64_t columns, const Order& order, const Rows& out, const Rows* add);
  // scale · H, or its transpose. scratch: four vectors for each row of the largest base.
  void (*hadamard)(float* tile, const Hadamard& H, bool transpose, float scale, void* scratch);
  // The same of rows one by one, x to y in one dtype, where H's power of two is at least the lanes; room: one row.
  void (*hadamard_rows)(const Rows& x, const Rows& y, int m, const Hadamard& H, bool transpose, float scale,
                        float* room, void* scratch);
  // D T of rows that lie in `order_in_of`, and (D T)ᵀ, whose rows come in `order_out_of` (reference/transforms.py).
  // scratch: two vectors for each number of the largest radix.
  void (*trigonometric)(Tile& tile, const Fourier& fourier, Form form, float first, float rest, void* scratch);
  void (*transposed)(Tile& tile, const Fourier& fourier, Form form, float first, float rest, void* scratch);
  // One level on the first `length` numbers.
  void (*haar)(Tile& tile, int64_t length, bool transpose);
  // out[r] = Σ weights[e] in[columns[e]] over the entries of each row.
  void (*multiply)(const Sparse& sparse, const float* weights, const float* in, float* out);
  // The same with a weight a lane: ± weights[c], a tile's vectors, for the coefficient c of the entry or its negative.
  void (*multiply_each)(const Sparse& sparse, const int32_t* coefficients, const float* weights, const float* in,
                        float* out);
  // `count` vectors of a tile, lane i times scales[i]; zeros, whatever they were, where that is zero.
  void (*scale_lanes)(float* tile, int64_t count, const float* scales);
  // sums[e] += Σ rows[r of e] columns[column of e] over the lanes.
  void (*products)(const Sparse& sparse, const float* rows, const float* columns, float* sums);
};

inline Order order_in_of(const Fourier& f, Form form) { return {form == Form::cosine, int(f.length % 2), 0}; }
inline Order order_out_of(const Fourier& f, Form form) { return {form == Form::cosine, int(f.length % 2), 1}; }

}  // namespace lora_kernels
