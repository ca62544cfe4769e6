// What a transform needs beside its rows, made once for each length.
#pragma once

#include <vector>

#include "transforms.h"
#include "view.h"

namespace lora_kernels {

// The Fourier transform of rows of a length, kept as long as the process lives.
const Fourier& fourier_of(int64_t length);

// A Hadamard matrix, with its bases' signs as ops/transforms.py gives them.
struct HadamardOf : Hadamard {
  std::vector<Base> held;
  HadamardOf(int64_t length, const View* signs, const std::vector<int64_t>& orders);
};

}  // namespace lora_kernels
