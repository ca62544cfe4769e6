// What the `low_rank` kernels of an instruction set offer to the ops. Plain types only: see vec.h.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace lora_kernels {

enum class DType { f32, bf16, f16 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Rows of a matrix with contiguous columns: row i is at data + (index ? index[i] / divisor : i) * stride elements.
struct Rows {
  void* data;
  DType dtype;
  int64_t stride;
  const int32_t* index;
  int divisor;

  __attribute__((always_inline)) int64_t row(int64_t i) const { return index ? index[i] / divisor : i; }
};

// A factor as [rank, width]: element (r, k) is at data + r * rank_stride + k * stride elements; one stride is 1.
struct Factor {
  const void* data;
  DType dtype;
  int rank;
  int64_t rank_stride;
  int64_t stride;
};

// Sums over K are made of parts this long, each summed on its own and then added in order, so that the parts can go to
// different threads without changing a bit.
constexpr int64_t kPart = 1024;

constexpr int kMaxRank = 512;

// Bytes of scratch a kernel call may use.
constexpr size_t kScratch = 1 << 20;

// Dropout from a seed (reference/dropout.py): an element is kept where its half word is at least the threshold.
struct Dropout {
  uint64_t key;
  uint32_t threshold;
  int64_t blocks;  // counters a row
};

// What becomes of the columns of y, from the same one on: y * scale + other * other_scale + bias, each where it is not
// null.
struct Columns {
  const float* scale = nullptr;
  Rows other{};
  const float* other_scale = nullptr;
  const float* bias = nullptr;
};

struct QuantizedKernels;
struct TransformKernels;

// Kernels. m rows; x, y, v, u, w as the ops name them; scratch is 64-byte aligned and the thread's own.
struct LowRankKernels {
  const char* name;
  // v[i, j] (+)= Σ x[i, k] A[j, k] over k in [begin, end), at most kPart of them; i < m, j < A.rank.
  void (*shrink)(const Rows& x, int m, const Factor& A, int64_t begin, int64_t end, bool add, float* v,
                 int64_t v_stride, void* scratch);
  // y[i, n] += Σ v[i, j] B[j, n] over j < B.rank, for n in [begin, end), rounded once.
  void (*expand)(const Rows& y, int m, const float* v, int64_t v_stride, const Factor& B, int64_t begin, int64_t end,
                 void* scratch);
  // `expand` where the mask, of column `begin` on and with room for a vector after the last row, is all ones.
  void (*expand_kept)(const Rows& y, int m, const float* v, int64_t v_stride, const Factor& B, int64_t begin,
                      int64_t end, const uint16_t* mask, int64_t mask_stride, void* scratch);
  // out[p, q] (+)= Σ s[i] u[i, p] w[i, q] over i < m, for p in [0, P) and q in [begin, end). more: as many rows of w
  // after these are needed next.
  void (*outer)(const Rows& u, int64_t P, const Rows& w, int64_t begin, int64_t end, int m, const float* s, bool add,
                bool more, float* out, int64_t out_stride, void* scratch);
  // out[i, k - begin] = x[i, k - begin] or 0, in x's dtype, of rows first + i and columns k in [begin, end); begin a
  // multiple of 8; in place too. mask[i, k - begin]: all ones where it is kept, zero elsewhere. Either may be null.
  void (*drop)(const Rows& x, int m, int64_t begin, int64_t end, const Dropout& dropout, int64_t first, void* out,
               int64_t out_stride, uint16_t* mask, int64_t mask_stride);
  // y = what `of` says of y, plus add, rounded once.
  void (*combine)(const Rows& y, int m, int64_t columns, const float* add, int64_t add_stride, const Columns& of);
  // dz[i, n] = scale[n] dy[i, n] where there is a scale; t[n] += Σ dy[i, n] (y[i, n] - bias[n]) where there is a t. dy,
  // dz and y are of one dtype.
  void (*column_grads)(const Rows& dy, int m, int64_t columns, const float* scale, const Rows& dz, const Rows& y,
                       const float* bias, float* t);
  // out[c, r] = in[r, c].
  void (*transpose)(const Rows& in, int64_t rows, int64_t columns, float* out, int64_t out_stride);
  // y[i, n] = Σ x[i, k] W[n, k] + bias[n] over k < K, for n in [begin, end), rounded once. bf16, W's rows contiguous, K
  // a multiple of 32, W's rows and begin and end of 16; nullptr where nothing here is faster than torch's own product.
  void (*linear)(const Rows& x, int m, const Factor& W, int64_t K, const void* bias, const Rows& y, int64_t begin,
                 int64_t end, void* scratch);
  const QuantizedKernels* quantized;
  const TransformKernels* transforms;
};

// The kernels of the best instruction set this machine has, or of the one set_isa named.
const LowRankKernels& low_rank_kernels();

}  // namespace lora_kernels
