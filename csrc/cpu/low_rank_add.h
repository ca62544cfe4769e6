// y += s (x Aᵀ) Bᵀ on the CPU, as the dispatcher and the call straight from Python share it.
#pragma once

#include "low_rank_arguments.h"

namespace lora_kernels {

// The arguments of `lora_add_`, in its order; nullptr where one is None.
void low_rank_add(const View& y, const View& x, Views A, Views B, const View* ids, const View* indptr, const View* plan,
                  const View* scaling, const View* ranks, const View* weights, double scale);

}  // namespace lora_kernels
