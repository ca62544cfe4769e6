// The ops of a linear layer with one LoRA adapter in training, as the dispatcher and the call straight from Python
// share them: reference/lora_linear.py says what they compute. Results come last, contiguous and of the right size;
// what is not needed has no elements.
#pragma once

#include "view.h"

namespace lora_kernels {

void lora_down(const View& x, const View& A, const View* seed, double p, const View& v);

void lora_forward(const View& y, const View& x, const View& A, const View& B, const View* column_scale,
                  const View* other, const View* other_scale, const View* bias, const View* seed, double p,
                  double scale, const View& v);

void lora_out_grads(const View& dy, const View& v, const View& B, const View* y, const View* bias,
                    const View* column_scale, double scale, bool need_v, bool need_B, const View& dv, const View& dB,
                    const View& dz, const View& t);

void lora_in_grads(const View& dx, const View& dv, const View* x, const View& A, const View* seed, double p,
                   double scale, const View& dA);

// Both, with dv in between; dB and dA without elements where they are not needed.
void lora_linear_grads(const View& dx, const View& dy, const View& v, const View* x, const View& A, const View& B,
                       const View* seed, double p, double scale, const View& dA, const View& dB);

void lora_weight_norm(const View& weight, const View& A, const View& B, const View& weight_norm_sq, double scale,
                      const View& norms);

void lora_dropout(const View& x, const View& seed, double p, const View& out);

}  // namespace lora_kernels
