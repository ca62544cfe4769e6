// A tensor as the ops read it, whichever way it came in: by torch's dispatcher, or straight from Python by DLPack.
#pragma once

#include <stdint.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace lora_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Thrown where a tensor that came by DLPack would have to be copied first: the dispatcher takes such a call.
struct NeedsDispatcher {};

// Borrowed: the tensor outlives it.
struct View {
  void* data;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dims;
  ScalarType type;
  bool on_cpu;
  const Tensor* tensor = nullptr;  // of the dispatcher

  View() = default;
  explicit View(const Tensor& t)
      : data(t.data_ptr()),
        sizes(t.sizes().data()),
        strides(t.strides().data()),
        dims(t.dim()),
        type(t.scalar_type()),
        on_cpu(t.is_cpu()),
        tensor(&t) {}

  int64_t numel() const {
    int64_t n = 1;
    for (int64_t d = 0; d < dims; ++d) n *= sizes[d];
    return n;
  }

  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t d = dims - 1; d >= 0; --d) {
      if (sizes[d] != 1 && strides[d] != expected) return numel() == 0;
      expected *= sizes[d];
    }
    return true;
  }

  Tensor contiguous() const {
    if (!tensor) throw NeedsDispatcher();
    return torch::stable::contiguous(*tensor);
  }
};

// The view of an argument that may be None, for a parameter that is a pointer.
struct OptionalView {
  View view{};
  bool given = false;

  OptionalView() = default;
  explicit OptionalView(const View& v) : view(v), given(true) {}
  explicit OptionalView(const std::optional<Tensor>& t) : given(t.has_value()) {
    if (t) view = View(*t);
  }
  operator const View*() const { return given ? &view : nullptr; }
};

// A view of contiguous elements: the one given, or of a copy.
struct Compact : View {
  std::optional<Tensor> copy;

  explicit Compact(const View& view) : View(view) {
    if (view.is_contiguous()) return;
    copy = view.contiguous();
    static_cast<View&>(*this) = View(*copy);
  }
};

}  // namespace lora_kernels
