// The `transforms` ops on the CPU: reference/transforms.py says what they compute.
#include <torch/csrc/stable/library.h>

#include <string>

#include "transform_tiles.h"

namespace lora_kernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor by_tiles(const Tensor& x_, bool transpose, const Transform& transform) {
  View view(x_);
  Tensor out = new_tensor(std::vector<int64_t>(view.sizes, view.sizes + view.dims), &x_);
  if (!view.numel()) return out;
  Matrix x(view);
  View out_view(out);
  Matrix y(out_view);
  int lanes = transform_kernels().lanes;
  for_each_task(divide_up(x.rows, lanes), x.rows * x.columns * 8 >= kWorthThreads, [&](int64_t task) {
    Room room(transform.vectors(), 0, transform.scratch());
    int64_t first = task * lanes;
    int m = int(std::min<int64_t>(lanes, x.rows - first));
    transform.whole(rows_from(x, first), rows_from(y, first), m, transpose, room.x, room.scratch);
  });
  return out;
}

int64_t length_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() > 0, "a scalar has no rows");
  return x.size(-1);
}

Tensor hadamard(Tensor x, OptionalTensor signs, std::vector<int64_t> orders, double scale, bool transpose) {
  int64_t N = length_of(x);
  if (!N) return by_tiles(x, transpose, Transform::none(0));
  OptionalView view(signs);
  HadamardOf H(N, view, orders);
  return by_tiles(x, transpose, Transform::hadamard(H, float(scale)));
}

Tensor trigonometric(Tensor x, std::string form, double first, double rest, bool transpose) {
  int64_t N = length_of(x);
  if (!N) return by_tiles(x, transpose, Transform::none(0));
  return by_tiles(x, transpose, Transform::trigonometric(N, form_of(form), float(first), float(rest)));
}

Tensor haar(Tensor x, int64_t levels, bool transpose) {
  return by_tiles(x, transpose, Transform::haar(length_of(x), levels));
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_C, CPU, m) {
  m.impl("hadamard", TORCH_BOX(&lora_kernels::hadamard));
  m.impl("trigonometric", TORCH_BOX(&lora_kernels::trigonometric));
  m.impl("haar", TORCH_BOX(&lora_kernels::haar));
}
