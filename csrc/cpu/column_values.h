// One number a column, such as a bias.
#pragma once

#include "low_rank_arguments.h"

namespace lora_kernels {

// [columns] as floats, null where none is given.
struct ColumnValues {
  std::vector<float> converted;
  std::optional<Compact> given;
  const float* data = nullptr;

  ColumnValues(const View* t, int64_t columns) {
    if (!t) return;
    given.emplace(*t);
    STD_TORCH_CHECK(given->on_cpu && given->dims == 1 && given->sizes[0] == columns, "values of columns");
    data = static_cast<const float*>(given->data);
    if (given->type == ScalarType::Float) return;
    converted.resize(columns);
    low_rank_kernels().transpose({given->data, dtype_of(*given), columns, nullptr, 1}, 1, columns, converted.data(), 1);
    data = converted.data();
  }
  const float* from(int64_t column) const { return data ? data + column : nullptr; }
};

}  // namespace lora_kernels
