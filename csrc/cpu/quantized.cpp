// The `quantized` ops on the CPU: reference/quantized.py says what they compute.
//
// A product of many rows is torch's, over panels that `dequantize_` unpacks (ops/_quantized_panels.py).
#include "quantized.h"

#include <torch/csrc/stable/library.h>

#include "column_values.h"
#include "low_rank_schedule.h"
#include "new_tensor.h"
#include "quantized_linear.h"

namespace lora_kernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kColumns = 96;       // of y in a task
constexpr int64_t kGradColumns = 128;  // of dx in a task: a line of codes
constexpr int64_t kFewRows = 48;
constexpr int64_t kColumnsOfFew = 512;
constexpr int64_t kRowsOfTask = 8;  // of x, packed

inline thread_local Buffer packed_rows, sums_of_groups;

// A packed weight, checked: what a kernel reads of it lies in bounds.
struct Weight : Codes {
  // in_features: K, or -1: as many as there are codes and scales for.
  Weight(const View& codes, const View& scales_, const View* offsets_, const View* table_, int64_t group_,
         int64_t in_features) {
    wide = codes.type == ScalarType::Char;
    STD_TORCH_CHECK((wide || codes.type == ScalarType::Byte) && wide == !table_, "codes");
    STD_TORCH_CHECK(codes.on_cpu && codes.dims == 2 && scales_.dims == 2 && group_ > 0, "codes");
    N = codes.sizes[0], group = group_, groups = scales_.sizes[1];
    K = std::min(codes.sizes[1] * (wide ? 1 : 2), groups * group);
    if (in_features >= 0) {
      STD_TORCH_CHECK(in_features <= K && codes.sizes[1] == (wide ? in_features : divide_up(in_features, 2)) &&
                          groups == divide_up(in_features, group),
                      "codes do not fit");
      K = in_features;
    }
    STD_TORCH_CHECK(codes.is_contiguous(), "codes do not lie in rows");
    data = static_cast<const uint8_t*>(codes.data), stride = codes.sizes[1];
    for (const View* t : {&scales_, offsets_})
      if (t)
        STD_TORCH_CHECK(t->on_cpu && t->type == ScalarType::Float && t->dims == 2 && t->sizes[0] == N &&
                            t->sizes[1] == groups && t->is_contiguous(),
                        "scales do not fit");
    scales = static_cast<const float*>(scales_.data);
    offsets = offsets_ ? static_cast<const float*>(offsets_->data) : nullptr;
    if (table_)
      STD_TORCH_CHECK(
          table_->on_cpu && table_->type == ScalarType::Float && table_->is_contiguous() && table_->numel() == 16,
          "table");
    table = table_ ? static_cast<const float*>(table_->data) : nullptr;
  }
};

int64_t rows_of(const View& t) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dims; ++d) rows *= t.sizes[d];
  return rows;
}

int64_t last_size(const View& t) {
  STD_TORCH_CHECK(t.dims > 0, "a scalar");
  return t.sizes[t.dims - 1];
}

}  // namespace

void dequantize(const View& out_, const View& codes, const View& scales, const View* offsets, const View* table,
                int64_t group, int64_t row, int64_t column) {
  STD_TORCH_CHECK(out_.dims == 2, "out");
  Weight w(codes, scales, offsets, table, group, -1);
  Output out(out_);
  STD_TORCH_CHECK(row >= 0 && column >= 0 && row + out.rows <= w.N && column + out.columns <= w.K, "out does not fit");
  int64_t threads = torch::stable::get_num_threads(), size = element_size(out.dtype);
  int64_t rows = std::max<int64_t>(divide_up(out.rows, threads * 4), 1);
  for_each_task(divide_up(out.rows, rows), out.rows * out.columns * size >= kWorthThreads, [&](int64_t task) {
    int64_t first = task * rows, count = std::min(rows, out.rows - first);
    low_rank_kernels().quantized->decode(w, row + first, count, column, out.columns,
                                         static_cast<char*>(out.data) + first * out.stride * size, out.dtype,
                                         out.stride);
  });
  out.finish();
}

bool quantized_prefers_panels(const View& x, const View& codes, const View& scales, const View* offsets,
                              const View* table, int64_t group) {
  Weight w(codes, scales, offsets, table, group, last_size(x));
  return rows_of(x) > low_rank_kernels().quantized->forward.most_rows(w, dtype_of(x));
}

namespace {

// What adapters add to y: s v Bᵀ, with v = x Aᵀ or given [S, P, R].
class Adapters {
public:
  Adapters(const Matrix& x, Matrix& y, const View* v, Views A_, Views B_, const View* ids, const View* indptr,
           const View* plan, const View* scaling, const View* ranks, const View* weights, double scale,
           int rank_dim_of_B = 1)
      : B(B_, rank_dim_of_B),
        per_pair(weights, y.rows),
        routing(ids, indptr, plan, y.rows, B.adapters, per_pair.per_row()),
        scales(scaling, scale, B.slices, B.adapters),
        op{routing, B.slices, B.padded_rank} {
    STD_TORCH_CHECK(B.total == y.columns, "B does not fit y");
    STD_TORCH_CHECK(!(ids && ids->dims == 2) || weights, "a mixture needs weights");
    STD_TORCH_CHECK(!weights || weights->numel() == routing.pairs, "weights");
    if (v) {
      STD_TORCH_CHECK(v->type == ScalarType::Float && v->on_cpu && v->dims == 3 && v->sizes[0] == B.slices &&
                          v->sizes[1] == routing.pairs && v->sizes[2] == B.padded_rank,
                      "v does not fit");
      compact.emplace(*v);
      given.emplace(*compact);
      given->stride = B.padded_rank;
      op.v_in = &*given;
    } else {
      A.emplace(A_, 0, kMaxRank * int64_t(B_.count));
      if (A->slices == 1 && B.slices > 1) A->split(B.slices, ranks);
      STD_TORCH_CHECK(A->stacked == B.stacked && A->slices == B.slices && A->adapters == B.adapters, "A and B differ");
      for (size_t i = 0; i < A->table.size(); ++i)
        STD_TORCH_CHECK(A->table[i].rank == B.table[i].rank && A->table[i].dtype == B.table[i].dtype, "A and B differ");
      for (int64_t width : A->widths) STD_TORCH_CHECK(width == x.columns, "A does not fit x");
      STD_TORCH_CHECK(A->table.empty() || A->table[0].dtype == x.dtype || A->table[0].dtype == DType::f32, "A");
      A->set_ranks(ranks);
      op.x = &x, op.A = &*A;
    }
    B.set_ranks(ranks);
    op.y = &y, op.B = &B, op.scales = &scales, op.weights = per_pair.values;
    runs = op.runs();
  }

  // Makes v of all rows, in memory of this thread that the next op may take.
  void make() { v = op.shrink_all(runs); }

  // Columns [begin, end) on top of `sum`, all rows.
  void add(float* sum, int64_t sum_stride, int64_t begin, int64_t end) const {
    int64_t first = 0;
    for (int64_t s = 0; s < B.slices; first += B.widths[s++]) {
      int64_t from = std::max(begin, first), to = std::min(end, first + B.widths[s]);
      if (from >= to) continue;
      for (size_t i = 0; i < runs.size(); ++i) {
        Factor b = B.at(s, runs[i].adapter);
        b.rank = op.live_rank(s, runs[i].adapter);
        if (!b.rank) continue;
        b.data = static_cast<const char*>(b.data) + (from - first) * b.stride * element_size(b.dtype);
        Rows rows{sum + offset_of(runs[i]) * sum_stride + from - begin, DType::f32, sum_stride, index_of(runs[i]),
                  routing.divisor};
        op.kernels.expand(rows, int(runs[i].count), v.at(s, i), v.rank, b, 0, to - from, scratch());
      }
    }
  }

private:
  Factors B;
  std::optional<Factors> A;
  std::optional<Compact> compact;
  std::optional<Matrix> given;
  Weights per_pair;
  Routing routing;
  Scales scales;
  LowRank op;
  std::vector<Group> runs;
  LowRank::Shrunk v{};
};

// Columns of a task, a multiple of 32, so that the threads have the same to do; the more the better.
int64_t columns_of_task(int64_t columns, int64_t most) {
  int64_t threads = torch::stable::get_num_threads(), best = 32, least = columns * 32;
  for (int64_t width = 32; width <= most; width += 32) {
    int64_t longest = divide_up(divide_up(columns, width), threads) * width;
    if (longest <= least) best = width, least = longest;
  }
  return best;
}

// y = x Wᵀ or dx = dy W, with what adapters and a bias add, at most `widest` columns at a time.
void run(const Weight& w, const QuantizedProduct& product, const Matrix& x, const Output& y, int64_t widest,
         const float* bias, std::optional<Adapters>& adapters) {
  if (!y.rows || !y.columns) return;
  if (adapters) adapters->make();
  int m = int(x.rows);
  PackedRows packed{x.view(0, nullptr, 1), m,
                    packed_rows.get(std::max<int64_t>(product.packed_bytes(w, x.dtype, m), 1)),
                    w.offsets ? floats(sums_of_groups, m * w.groups) : nullptr};
  for_each_task(divide_up(m, kRowsOfTask), m * x.columns * 2 >= kWorthThreads, [&](int64_t task) {
    int first = int(task * kRowsOfTask);
    product.pack(w, packed, first, std::min<int>(kRowsOfTask, m - first));
  });
  // Few rows are read from memory as they are multiplied, each task ahead of itself.
  int64_t width = columns_of_task(y.columns, m <= kFewRows ? kColumnsOfFew : widest);
  for_each_task(divide_up(y.columns, width), w.N * w.stride + m * x.columns * 2 >= kWorthThreads, [&](int64_t task) {
    int64_t begin = task * width, end = std::min(begin + width, y.columns);
    float* sum = floats(column_block, m * width);
    product.run(w, packed, begin, end, sum, width, scratch());
    if (adapters) adapters->add(sum, width, begin, end);
    low_rank_kernels().quantized->round(sum, width, bias ? bias + begin : nullptr, y.view(begin, nullptr, 1), m,
                                        end - begin);
  });
}

}  // namespace

void quantized_linear(const View& y_, const View& x_, const View& codes, const View& scales, const View* offsets,
                      const View* table, int64_t group, const View* bias_, const View* v, Views A, Views B,
                      const View* ids, const View* indptr, const View* plan, const View* scaling, const View* ranks,
                      const View* weights, double scale) {
  Weight w(codes, scales, offsets, table, group, last_size(x_));
  Matrix x(x_);
  Output y(y_);
  STD_TORCH_CHECK(y.columns == w.N && y.rows == x.rows && y.dtype == x.dtype, "y does not fit");
  ColumnValues bias(bias_, w.N);
  std::optional<Adapters> adapters;
  if (B.count) adapters.emplace(x, y, v, A, B, ids, indptr, plan, scaling, ranks, weights, scale);
  run(w, low_rank_kernels().quantized->forward, x, y, kColumns, bias.data, adapters);
  y.finish();
}

bool quantized_grad_prefers_panels(const View& dy, const View& codes, const View& scales, const View* offsets,
                                   const View* table, int64_t group, int64_t in_features) {
  Weight w(codes, scales, offsets, table, group, in_features);
  STD_TORCH_CHECK(last_size(dy) == w.N, "dy does not fit");
  return rows_of(dy) > low_rank_kernels().quantized->backward.most_rows(w, dtype_of(dy));
}

void quantized_linear_grad(const View& dx_, const View& dy_, const View& codes, const View& scales, const View* offsets,
                           const View* table, int64_t group, const View* v, const View* A, double scale) {
  Weight w(codes, scales, offsets, table, group, last_size(dx_));
  Matrix dy(dy_);
  Output dx(dx_);
  STD_TORCH_CHECK(dx.columns == w.K && dy.columns == w.N && dx.rows == dy.rows && dx.dtype == dy.dtype,
                  "dx does not fit");
  const QuantizedProduct& product = low_rank_kernels().quantized->backward;
  STD_TORCH_CHECK(dy.rows <= product.most_rows(w, dy.dtype), "too many rows");
  std::optional<Adapters> adapters;
  View stack;
  int64_t sizes[3], strides[3];
  if (v && A) {  // v [M, R] is of one slice, and A the factor whose columns are dx's
    STD_TORCH_CHECK(v->dims == 2 && A->dims == 2, "v or A");
    stack = *v;
    for (int d = 0; d < 3; ++d) sizes[d] = d ? v->sizes[d - 1] : 1, strides[d] = d ? v->strides[d - 1] : v->numel();
    stack.sizes = sizes, stack.strides = strides, stack.dims = 3;
    adapters.emplace(dy, dx, &stack, Views{nullptr, 0}, Views{A, 1}, nullptr, nullptr, nullptr, nullptr, nullptr,
                     nullptr, scale, 0);
  }
  run(w, product, dy, dx, kGradColumns, nullptr, adapters);
  dx.finish();
}

namespace {

// The same as the dispatcher calls them.
void of_tensors_dequantize(const Tensor& out, const Tensor& codes, const Tensor& scales, OptionalTensor offsets,
                           OptionalTensor table, int64_t group, int64_t row, int64_t column) {
  dequantize(View(out), View(codes), View(scales), OptionalView(offsets), OptionalView(table), group, row, column);
}

bool of_tensors_prefers(const Tensor& x, const Tensor& codes, const Tensor& scales, OptionalTensor offsets,
                        OptionalTensor table, int64_t group) {
  return quantized_prefers_panels(View(x), View(codes), View(scales), OptionalView(offsets), OptionalView(table),
                                  group);
}

Tensor of_tensors_linear(const Tensor& x, const Tensor& codes, const Tensor& scales, OptionalTensor offsets,
                         OptionalTensor table, int64_t group, OptionalTensor bias, OptionalTensor v,
                         std::vector<Tensor> B, OptionalTensor ids, OptionalTensor indptr, OptionalTensor plan,
                         OptionalTensor scaling, OptionalTensor ranks, OptionalTensor weights, double scale) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  STD_TORCH_CHECK(!sizes.empty() && codes.dim() == 2, "x or codes");
  sizes.back() = codes.size(0);
  Tensor y = new_tensor(sizes, &x);
  std::vector<View> b(B.begin(), B.end());
  quantized_linear(View(y), View(x), View(codes), View(scales), OptionalView(offsets), OptionalView(table), group,
                   OptionalView(bias), OptionalView(v), {nullptr, 0}, {b.data(), b.size()}, OptionalView(ids),
                   OptionalView(indptr), OptionalView(plan), OptionalView(scaling), OptionalView(ranks),
                   OptionalView(weights), scale);
  return y;
}

bool of_tensors_grad_prefers(const Tensor& dy, const Tensor& codes, const Tensor& scales, OptionalTensor offsets,
                             OptionalTensor table, int64_t group, int64_t in_features) {
  return quantized_grad_prefers_panels(View(dy), View(codes), View(scales), OptionalView(offsets), OptionalView(table),
                                       group, in_features);
}

Tensor of_tensors_linear_grad(const Tensor& dy, const Tensor& codes, const Tensor& scales, OptionalTensor offsets,
                              OptionalTensor table, int64_t group, int64_t in_features, OptionalTensor v,
                              OptionalTensor A, double scale) {
  std::vector<int64_t> sizes(dy.sizes().begin(), dy.sizes().end());
  STD_TORCH_CHECK(!sizes.empty() && in_features >= 0, "dy or K");
  sizes.back() = in_features;
  Tensor dx = new_tensor(sizes, &dy);
  quantized_linear_grad(View(dx), View(dy), View(codes), View(scales), OptionalView(offsets), OptionalView(table),
                        group, OptionalView(v), OptionalView(A), scale);
  return dx;
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("dequantize_", TORCH_BOX(&lora_kernels::of_tensors_dequantize));
}

STABLE_TORCH_LIBRARY_FRAGMENT(lora_kernels_C, m) {
  m.def(
      "quantized_prefers_panels(Tensor x, Tensor codes, Tensor scales, Tensor? offsets, Tensor? table, int group) -> "
      "bool");
  m.def(
      "quantized_grad_prefers_panels(Tensor dy, Tensor codes, Tensor scales, Tensor? offsets, Tensor? table, int "
      "group, int in_features) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_C, CPU, m) {
  m.impl("quantized_prefers_panels", TORCH_BOX(&lora_kernels::of_tensors_prefers));
  m.impl("quantized_grad_prefers_panels", TORCH_BOX(&lora_kernels::of_tensors_grad_prefers));
  m.impl("quantized_linear_grad", TORCH_BOX(&lora_kernels::of_tensors_linear_grad));
  m.impl("quantized_linear", TORCH_BOX(&lora_kernels::of_tensors_linear));
}
