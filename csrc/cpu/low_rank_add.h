// y += s (x Aᵀ) Bᵀ on the CPU, as the dispatcher and the call straight from Python share it.
#pragma once

#include "low_rank_arguments.h"

namespace lora_kernels {

// The arguments of `lora_add_`, in its order; nullptr where one is None.
void low_rank_add(const View& y, const View& x, Views A, Views B, const View* ids, const View* indptr, const View* plan,
                  const View* scaling, const View* ranks, const View* weights, double scale);

// Whether `low_rank_linear` has a base product for these that is faster than torch's.
bool takes_linear(const View& x, const View& W, const View* bias);

// y = x Wᵀ + bias, rounded, and y += s (x Aᵀ) Bᵀ as `low_rank_add` does it, while each thread still has the columns of
// y that it has just made at hand. y [..., N] is new; W [N, K] and bias [N] as `takes_linear` accepts them.
void low_rank_linear(const View& y, const View& x, const View& W, const View* bias, Views A, Views B, const View* plan,
                     const View* scaling, double scale);

}  // namespace lora_kernels
