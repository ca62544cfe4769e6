// The `spectral` ops on the CPU: reference/spectral.py says what they compute.
//
// A tile of rows is transformed, multiplied by the sparse spectrum and transformed back before the next one is read, so
// nothing but x and y is as long as the batch.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <string>
#include <tuple>

#include "column_values.h"
#include "transform_tiles.h"

namespace lora_kernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

// T₁ and T₂ of a kind, and its own factor.
struct Kind {
  std::optional<HadamardOf> H;
  Transform of_x = Transform::none(0), of_y = Transform::none(0);
  double factor = 1;

  Kind(const std::string& kind, const OptionalTensor& signs, const std::vector<int64_t>& orders, int64_t N, int64_t K)
      : of_x(Transform::none(K)), of_y(Transform::none(N)) {
    if (kind == "wht") {
      if (K == 0) return;
      OptionalView view(signs);
      H.emplace(K, view, orders);
      of_x = Transform::hadamard(*H, float(1 / std::sqrt(double(K))));
    } else if (kind == "haar") {
      of_x = Transform::haar(K + K % 2, 1), of_y = Transform::haar(N + N % 2, 1);
    } else if (kind == "dct") {
      of_x = cosine(K), of_y = cosine(N);
    } else if (kind == "hartley" || kind == "fourier") {
      factor = 1 / double(std::max<int64_t>(N * K, 1));
      if (kind == "hartley") factor = std::sqrt(factor);
      of_x = trigonometric(K, form_of(kind)), of_y = trigonometric(N, form_of(kind));
    } else {
      STD_TORCH_CHECK(kind == "identity", "kind");
    }
  }
  Kind(const Kind&) = delete;

  int64_t scratch() const { return std::max(of_x.scratch(), of_y.scratch()); }

private:
  static Transform trigonometric(int64_t n, Form form) {
    return n ? Transform::trigonometric(n, form, 1, 1) : Transform::none(0);
  }
  static Transform cosine(int64_t n) {
    if (!n) return Transform::none(0);
    return Transform::trigonometric(n, Form::cosine, float(1 / std::sqrt(double(n))), float(std::sqrt(2 / double(n))));
  }
};

// `by_row` taken apart and checked.
struct Entries : Sparse {
  const int32_t* coefficients;
  std::vector<int32_t> rows_of_entries;

  Entries(const Tensor& by_row_, int64_t rows_, int64_t columns_, int64_t n) {
    View by_row(by_row_);
    STD_TORCH_CHECK(by_row.on_cpu && by_row.type == ScalarType::Int && by_row.dims == 1 && by_row.is_contiguous() &&
                        by_row.sizes[0] > rows_ && (by_row.sizes[0] - rows_ - 1) % 2 == 0,
                    "the plan does not fit");
    rows = rows_, count = (by_row.sizes[0] - rows - 1) / 2;
    starts = static_cast<const int32_t*>(by_row.data);
    columns = starts + rows + 1, coefficients = columns + count;
    STD_TORCH_CHECK(starts[0] == 0 && starts[rows] == count, "the plan does not fit");
    for (int64_t r = 0; r < rows; ++r) STD_TORCH_CHECK(starts[r] <= starts[r + 1], "the plan does not fit");
    for (int64_t e = 0; e < count; ++e) {
      int64_t c = coefficients[e];
      STD_TORCH_CHECK(columns[e] >= 0 && columns[e] < columns_ && (c < 0 ? ~c : c) < n, "the plan does not fit");
    }
  }

  void find_rows() {
    rows_of_entries.resize(count);
    for (int64_t r = 0; r < rows; ++r)
      std::fill(rows_of_entries.begin() + starts[r], rows_of_entries.begin() + starts[r + 1], int32_t(r));
    row_of = rows_of_entries.data();
  }

  // What stands at each entry.
  std::vector<float> weights(const float* values, double scale) const {
    std::vector<float> w(count);
    for (int64_t e = 0; e < count; ++e) {
      int32_t c = coefficients[e];
      w[e] = float(scale) * (c < 0 ? -values[~c] : values[c]);
    }
    return w;
  }
};

Tensor spectral_linear(Tensor x_, Tensor values, Tensor by_row, OptionalTensor y_, OptionalTensor signs,
                       std::vector<int64_t> orders, std::string kind_, int64_t N, double scale) {
  View x_view(x_);
  Matrix x(x_view);
  Kind kind(kind_, signs, orders, N, x.columns);
  View values_view(values);
  ColumnValues numbers(&values_view, values.numel());
  Entries entries(by_row, kind.of_y.length, kind.of_x.length, values.numel());
  std::vector<int64_t> sizes(x_view.sizes, x_view.sizes + x_view.dims);
  sizes.back() = N;
  Tensor out_ = new_tensor(sizes, y_ ? &*y_ : &x_);
  std::optional<Matrix> y;
  if (y_) {
    View y_view(*y_);
    y.emplace(y_view);
    STD_TORCH_CHECK(y->columns == N && y_view.numel() == x.rows * N, "y does not fit");
  }
  View out_view(out_);
  Matrix out(out_view);
  std::vector<float> weights = entries.weights(numbers.data, scale * kind.factor);
  const TransformKernels& kernels = transform_kernels();
  int lanes = kernels.lanes;
  if (N)
    for_each_task(divide_up(x.rows, lanes), x.rows * (x.columns + N) * 4 >= kWorthThreads, [&](int64_t task) {
      Room room(kind.of_x.vectors(), kind.of_y.vectors(), kind.scratch());
      int64_t first = task * lanes;
      int m = int(std::min<int64_t>(lanes, x.rows - first));
      kind.of_x.forward(rows_from(x, first), m, x.columns, room.x, room.scratch);
      kernels.multiply(entries, weights.data(), room.x.now, room.y.now);
      Rows add = y ? rows_from(*y, first) : Rows{};
      kind.of_y.backward(room.y, rows_from(out, first), y ? &add : nullptr, m, N, room.scratch);
    });
  return out_;
}

void spectral_add_(Tensor y_, Tensor x_, Tensor values_, Tensor by_row, Tensor ids_, OptionalTensor scaling_,
                   OptionalTensor signs, std::vector<int64_t> orders, std::string kind_, double scale) {
  View x_view(x_), y_view(y_), values_view(values_), ids_view(ids_);
  Matrix x(x_view), values(values_view);
  Output y(y_view);
  int64_t N = y.columns, adapters = values.rows, n = values.columns;
  STD_TORCH_CHECK(values_view.dims == 2 && y_view.dims == x_view.dims && y.rows == x.rows, "y does not fit x");
  STD_TORCH_CHECK(ids_view.on_cpu && ids_view.dims == 1 && ids_view.numel() == x.rows, "ids");
  bool wide = ids_view.type == ScalarType::Long;
  STD_TORCH_CHECK(wide || ids_view.type == ScalarType::Int, "ids");
  OptionalView scaling_view(scaling_);
  ColumnValues scaling(scaling_view, adapters);
  std::vector<float> scales(x.rows);
  std::vector<int32_t> rows_of_values(x.rows);
  Kind kind(kind_, signs, orders, N, x.columns);
  for (int64_t i = 0; i < x.rows; ++i) {
    int64_t at = i * ids_view.strides[0];
    int64_t id = wide ? static_cast<const int64_t*>(ids_view.data)[at] : static_cast<const int32_t*>(ids_view.data)[at];
    STD_TORCH_CHECK(id >= -1 && id < adapters, "id");
    rows_of_values[i] = int32_t(std::max<int64_t>(id, 0));
    scales[i] = id < 0 ? 0 : float(scale * kind.factor) * (scaling.data ? scaling.data[id] : 1);
  }
  Entries entries(by_row, kind.of_y.length, kind.of_x.length, n);
  if (!adapters || !N) return;
  const TransformKernels& kernels = transform_kernels();
  int lanes = kernels.lanes;
  for_each_task(divide_up(x.rows, lanes), x.rows * (x.columns + N + n) * 4 >= kWorthThreads, [&](int64_t task) {
    Room room(kind.of_x.vectors(), kind.of_y.vectors(), kind.scratch() + n + 1);
    int64_t first = task * lanes;
    int m = int(std::min<int64_t>(lanes, x.rows - first));
    float* weights = static_cast<float*>(room.scratch) + kind.scratch() * lanes;
    float* lane_scales = weights + n * lanes;
    std::fill(lane_scales, lane_scales + lanes, 0.0f);
    std::copy(scales.begin() + first, scales.begin() + first + m, lane_scales);
    kernels.load(values.view(0, &rows_of_values[first], 1), m, n, Order{}, weights);
    kernels.scale_lanes(weights, n, lane_scales);
    kind.of_x.forward(rows_from(x, first), m, x.columns, room.x, room.scratch);
    kernels.multiply_each(entries, entries.coefficients, weights, room.x.now, room.y.now);
    Rows out = rows_from(y, first);
    kind.of_y.backward(room.y, out, &out, m, N, room.scratch);
  });
  y.finish();
}

// Rows of a batch that share a sum: as few sums as keep the threads busy, and the same ones each time.
int64_t tiles_a_task(int64_t tiles) {
  return std::max<int64_t>(divide_up(tiles, 4 * int64_t(torch::stable::get_num_threads())), 1);
}

std::tuple<Tensor, Tensor> spectral_linear_grads(Tensor dy_, Tensor x_, Tensor values, Tensor by_row, Tensor by_column,
                                                 OptionalTensor signs, std::vector<int64_t> orders, std::string kind_,
                                                 double scale, bool needs_dx, bool needs_dvalues) {
  View dy_view(dy_), x_view(x_);
  Matrix dy(dy_view), x(x_view);
  int64_t N = dy.columns, K = x.columns;
  STD_TORCH_CHECK(dy_view.numel() == x.rows * N, "dy does not fit x");
  Kind kind(kind_, signs, orders, N, K);
  View values_view(values);
  int64_t n = values.numel(), rows = x.rows;
  ColumnValues numbers(&values_view, n);
  Entries entries(by_row, kind.of_y.length, kind.of_x.length, n);
  Entries transposed(by_column, kind.of_x.length, kind.of_y.length, n);
  scale *= kind.factor;
  std::vector<float> weights = needs_dx ? transposed.weights(numbers.data, scale) : std::vector<float>();
  std::vector<int64_t> sizes(x_view.sizes, x_view.sizes + x_view.dims);
  Tensor dx_ = new_tensor(needs_dx ? sizes : std::vector<int64_t>{0}, &x_);
  Tensor dvalues_ = new_tensor({needs_dvalues ? n : 0});
  View dx_view(dx_), dvalues_view(dvalues_);
  Matrix dx(dx_view);
  const TransformKernels& kernels = transform_kernels();
  int lanes = kernels.lanes;
  int64_t tiles = divide_up(rows, lanes), each = tiles_a_task(tiles), tasks = divide_up(tiles, each);
  if (needs_dvalues) entries.find_rows();
  std::vector<float> sums(needs_dvalues ? tasks * entries.count : 0);
  if (needs_dx || needs_dvalues)
    for_each_task(tasks, rows * (K + N) * 4 >= kWorthThreads, [&](int64_t task) {
      Room room(kind.of_x.vectors(), kind.of_y.vectors(), kind.scratch());
      for (int64_t tile = task * each; tile < std::min((task + 1) * each, tiles); ++tile) {
        int64_t first = tile * lanes;
        int m = int(std::min<int64_t>(lanes, rows - first));
        kind.of_y.forward(rows_from(dy, first), m, N, room.y, room.scratch);
        if (needs_dvalues) {
          kind.of_x.forward(rows_from(x, first), m, K, room.x, room.scratch);
          kernels.products(entries, room.y.now, room.x.now, sums.data() + task * entries.count);
        }
        if (needs_dx && K) {
          kernels.multiply(transposed, weights.data(), room.y.now, room.x.now);
          kind.of_x.backward(room.x, rows_from(dx, first), nullptr, m, K, room.scratch);
        }
      }
    });
  if (needs_dvalues) {
    float* dvalues = static_cast<float*>(dvalues_view.data);
    std::fill(dvalues, dvalues + n, 0.0f);
    for (int64_t e = 0; e < entries.count; ++e) {
      float sum = 0;
      for (int64_t task = 0; task < tasks; ++task) sum += sums[task * entries.count + e];
      int32_t c = entries.coefficients[e];
      dvalues[c < 0 ? ~c : c] += float(scale) * (c < 0 ? -sum : sum);
    }
  }
  return {dx_, dvalues_};
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_C, CPU, m) {
  m.impl("spectral_linear", TORCH_BOX(&lora_kernels::spectral_linear));
  m.impl("spectral_add_", TORCH_BOX(&lora_kernels::spectral_add_));
  m.impl("spectral_linear_grads", TORCH_BOX(&lora_kernels::spectral_linear_grads));
}
