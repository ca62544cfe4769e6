// The `quantized` ops, as the dispatcher and the call straight from Python share them: reference/quantized.py says what
// they compute.
#pragma once

#include "low_rank_arguments.h"

namespace lora_kernels {

void dequantize(const View& out, const View& codes, const View& scales, const View* offsets, const View* table,
                int64_t group, int64_t row, int64_t column);

// Whether many rows of x are better taken by torch's products over panels.
bool quantized_prefers_panels(const View& x, const View& codes, const View& scales, const View* offsets,
                              const View* table, int64_t group);

// y is new, of x's dtype. B: none, no adapter; v: given, or made of x and A.
void quantized_linear(const View& y, const View& x, const View& codes, const View& scales, const View* offsets,
                      const View* table, int64_t group, const View* bias, const View* v, Views A, Views B,
                      const View* ids, const View* indptr, const View* plan, const View* scaling, const View* ranks,
                      const View* weights, double scale);

// The same of a product with W.
bool quantized_grad_prefers_panels(const View& dy, const View& codes, const View& scales, const View* offsets,
                                   const View* table, int64_t group, int64_t in_features);

// dx is new, of dy's dtype; v and A both null, or neither.
void quantized_linear_grad(const View& dx, const View& dy, const View& codes, const View& scales, const View* offsets,
                           const View* table, int64_t group, const View* v, const View* A, double scale);

}  // namespace lora_kernels
