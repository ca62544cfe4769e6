// The ops of a linear layer with one LoRA adapter in training: reference/lora_linear.py says what they compute.
//
// The forward goes by rows. What comes after goes by columns, so that each sum over rows stays with one thread, and
// each block of dy and of x is read from memory once for all that is made of it.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "low_rank_schedule.h"

namespace lora_kernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kRows = 64;      // of a block that stays in a cache
constexpr int64_t kColumns = 512;  // of a task, at most
constexpr int64_t kTileColumns = 64;

inline thread_local Buffer tile_of_rows, tile_of_sums, transposed;

Tensor new_floats(const Tensor& like, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(like, {rows, columns}, ScalarType::Float);
}
Tensor nothing(const Tensor& like, ScalarType type = ScalarType::Float) {
  return torch::stable::new_empty(like, {0}, type);
}
float* data_of(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// One factor, copied where neither of its strides is 1.
struct OneFactor : Factors {
  OneFactor(const View& t, int rank_dim) : Factors({&t, 1}, rank_dim) { STD_TORCH_CHECK(t.dims == 2, "factor"); }
  int64_t rank() const { return padded_rank; }
  int64_t width() const { return widths[0]; }
  // From column `begin` on.
  Factor from(int64_t begin) const {
    Factor factor = table[0];
    factor.data = static_cast<const char*>(factor.data) + begin * factor.stride * element_size(factor.dtype);
    return factor;
  }
};

// [columns] as floats, null where none is given.
struct ColumnValues {
  std::vector<float> converted;
  std::optional<Compact> given;
  const float* data = nullptr;

  ColumnValues(const OptionalTensor& t, int64_t columns) {
    if (!t) return;
    given.emplace(View(*t));
    STD_TORCH_CHECK(given->on_cpu && given->dims == 1 && given->sizes[0] == columns, "values of columns");
    data = static_cast<const float*>(given->data);
    if (given->type == ScalarType::Float) return;
    converted.resize(columns);
    low_rank_kernels().transpose({given->data, dtype_of(*given), columns, nullptr, 1}, 1, columns, converted.data(), 1);
    data = converted.data();
  }
  const float* from(int64_t column) const { return data ? data + column : nullptr; }
};

struct OptionalDropout {
  Dropout dropout{};
  bool given = false;

  OptionalDropout(const OptionalTensor& seed, double p, int64_t columns) {
    if (!seed) return;
    STD_TORCH_CHECK(seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "seed");
    STD_TORCH_CHECK(p >= 0 && p <= 1, "p");
    given = true;
    dropout.key = uint64_t(*static_cast<const int64_t*>(seed->data_ptr()));
    dropout.threshold = uint32_t(std::nearbyint(p * 65536));
    dropout.blocks = divide_up(columns, 8);
  }
};

// v [rows, rank] in fp32, as it lies in memory.
struct Small {
  Compact compact;

  Small(const Tensor& v, int64_t rows, int64_t rank) : compact(View(v)) {
    STD_TORCH_CHECK(compact.on_cpu && compact.type == ScalarType::Float && compact.dims == 2 &&
                        compact.sizes[0] == rows && compact.sizes[1] == rank,
                    "v does not fit");
  }
  const float* data() const { return static_cast<const float*>(compact.data); }
};

// Block `row`, `column` of a matrix.
Rows block_of(const Matrix& matrix, int64_t row, int64_t column) {
  Rows rows = matrix.view(column, nullptr, 1);
  rows.data = static_cast<char*>(rows.data) + row * matrix.stride * element_size(matrix.dtype);
  return rows;
}

bool worth_threads(int64_t rows, int64_t columns, int64_t rank) {
  return rows * columns * 2 + rank * columns * 4 >= kWorthThreads;
}

// Columns of a task: some for every thread, whole vectors and whole counters of dropout.
int64_t columns_of_task(int64_t columns) {
  int64_t each = std::max<int64_t>(divide_up(columns, torch::stable::get_num_threads()), 1);
  return std::max<int64_t>(divide_up(divide_up(each, divide_up(each, kColumns)), 32) * 32, 32);
}

// Rows of a task: some for every thread.
int64_t rows_of_task(int64_t rows) {
  int64_t each = std::max<int64_t>(divide_up(rows, torch::stable::get_num_threads()), 1);
  return std::max<int64_t>(divide_up(divide_up(each, divide_up(each, 4 * kRows)), 16) * 16, 16);
}

// Call f(first, end) for each task of `size` out of `count`.
template <class F>
void for_each_range(int64_t count, int64_t size, bool parallel, const F& f) {
  for_each_task(divide_up(count, size), parallel,
                [&](int64_t task) { f(task * size, std::min(count, (task + 1) * size)); });
}

// x, dropped where there is dropout: what `drop` makes of a block lies in the thread's own memory.
struct Input {
  const Matrix& x;
  const OptionalDropout& dropout;
  const LowRankKernels& kernels;

  Rows block(int64_t row, int rows, int64_t begin, int64_t end) const {
    Rows block = block_of(x, row, begin);
    if (!dropout.given) return block;
    void* kept = tile_of_rows.get(size_t(rows * (end - begin) * element_size(x.dtype)));
    kernels.drop(block, rows, begin, end, dropout.dropout, row, kept, end - begin);
    return {kept, x.dtype, end - begin, nullptr, 1};
  }
};

Tensor lora_forward(const Tensor& y_, const Tensor& x_, const Tensor& A_, const Tensor& B_, OptionalTensor column_scale,
                    OptionalTensor other_, OptionalTensor other_scale, OptionalTensor bias, OptionalTensor seed,
                    double p, double scale) {
  const LowRankKernels& kernels = low_rank_kernels();
  Output y{View(y_)};
  Matrix x{View(x_)};
  OneFactor A(View(A_), 0), B(View(B_), 1);
  int64_t M = x.rows, K = x.columns, N = y.columns, R = A.rank();
  STD_TORCH_CHECK(A.width() == K && B.width() == N && B.rank() == R && y.rows == M, "shapes differ");
  STD_TORCH_CHECK(y.dtype == x.dtype || y.dtype == DType::f32, "y dtype");
  STD_TORCH_CHECK(A.table[0].dtype == x.dtype || A.table[0].dtype == DType::f32, "factor dtype");
  std::optional<Matrix> other;
  if (other_) {
    other.emplace(View(*other_));
    STD_TORCH_CHECK(other->rows == M && other->columns == N && other->dtype == y.dtype, "other");
  }
  ColumnValues c(column_scale, N), e(other_scale, N), b(bias, N);
  OptionalDropout dropout(seed, p, K);
  Input input{x, dropout, kernels};
  bool plain = !other && !c.data && !b.data;
  Tensor v_out = new_floats(x_, M, R);
  float* v = data_of(v_out);
  for_each_range(M, rows_of_task(M), worth_threads(M, K + N, R), [&](int64_t first, int64_t end) {
    int count = int(end - first);
    float* of_rows = v + first * R;
    if (!K) std::memset(of_rows, 0, count * R * sizeof(float));
    for (int64_t begin = 0; begin < K; begin += kPart) {
      int64_t stop = std::min(begin + kPart, K), step = dropout.given ? kRows : count;
      for (int64_t row = 0; row < count; row += step) {
        int rows = int(std::min(step, count - row));
        kernels.shrink(input.block(first + row, rows, begin, stop), rows, A.from(begin), 0, stop - begin, begin > 0,
                       of_rows + row * R, R, scratch());
      }
    }
    float* scaled = floats(local_rows, count * R);
    for (int64_t i = 0; i < count * R; ++i) scaled[i] = float(scale) * of_rows[i];
    if (plain) {
      kernels.expand(block_of(y, first, 0), count, scaled, R, B.table[0], 0, N, scratch());
      return;
    }
    float* sums = floats(tile_of_sums, kRows * kTileColumns);
    for (int64_t row = 0; row < count; row += kRows) {
      int rows = int(std::min<int64_t>(kRows, count - row));
      for (int64_t n = 0; n < N; n += kTileColumns) {
        int64_t columns = std::min(kTileColumns, N - n);
        std::memset(sums, 0, rows * kTileColumns * sizeof(float));
        Rows tile{sums, DType::f32, kTileColumns, nullptr, 1};
        kernels.expand(tile, rows, scaled + row * R, R, B.from(n), 0, columns, scratch());
        Columns of{c.from(n), other ? block_of(*other, first + row, n) : Rows{}, e.from(n), b.from(n)};
        kernels.combine(block_of(y, first + row, n), rows, columns, sums, kTileColumns, of);
      }
    }
  });
  y.finish();
  return v_out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_out_grads(const Tensor& dy_, const Tensor& v_, const Tensor& B_,
                                                          OptionalTensor y_, OptionalTensor bias,
                                                          OptionalTensor column_scale, double scale, bool need_v,
                                                          bool need_B) {
  const LowRankKernels& kernels = low_rank_kernels();
  Matrix dy{View(dy_)};
  OneFactor B(View(B_), 1);
  int64_t M = dy.rows, N = dy.columns, R = B.rank();
  STD_TORCH_CHECK(B.width() == N, "B does not fit dy");
  Small v(v_, M, R);
  std::optional<Matrix> y;
  if (y_) {
    y.emplace(View(*y_));
    STD_TORCH_CHECK(y->rows == M && y->columns == N && y->dtype == dy.dtype, "y does not fit dy");
  }
  ColumnValues c(column_scale, N), b(bias, N);
  int64_t width = columns_of_task(N), tasks = divide_up(N, width);
  Tensor dv = need_v ? new_floats(v_, M, R) : nothing(v_), dB = need_B ? new_floats(v_, N, R) : nothing(v_);
  Tensor dz = column_scale ? torch::stable::new_empty(dy_, dy_.sizes()) : nothing(dy_, dy_.scalar_type());
  Tensor t = y ? torch::stable::new_empty(v_, {N}, ScalarType::Float) : nothing(v_);
  if (t.numel()) std::memset(t.data_ptr(), 0, N * sizeof(float));
  if (need_v && !tasks && M) std::memset(dv.data_ptr(), 0, M * R * sizeof(float));
  std::vector<float> scales(kRows, float(scale));
  // The sums over each task's columns, added in order afterwards.
  float* parts = need_v && tasks > 1 ? floats(local_rows, tasks * M * R) : nullptr;
  std::optional<Matrix> scaled;
  if (c.data) scaled.emplace(View(dz));
  for_each_range(N, width, worth_threads(M, N, R), [&](int64_t begin, int64_t end) {
    int64_t columns = end - begin;
    float* of_task = parts ? parts + begin / width * M * R : need_v ? data_of(dv) : nullptr;
    // B with its columns side by side, and dB the other way round.
    float* turned = floats(transposed, 2 * R * columns);
    float* sums = turned + R * columns;
    Factor factor = B.from(begin);
    if (need_v && factor.stride != 1) {
      kernels.transpose({const_cast<void*>(factor.data), factor.dtype, factor.stride, nullptr, 1}, columns, R, turned,
                        columns);
      factor = {turned, DType::f32, int(R), columns, 1};
    }
    for (int64_t row = 0; row < M; row += kRows) {
      int rows = int(std::min(kRows, M - row));
      Rows block = block_of(dy, row, begin);
      if (c.data || y)
        kernels.column_grads(block, rows, columns, c.from(begin), scaled ? block_of(*scaled, row, begin) : Rows{},
                             y ? block_of(*y, row, begin) : Rows{}, b.from(begin), y ? data_of(t) + begin : nullptr);
      if (need_v) kernels.shrink(block, rows, factor, 0, columns, false, of_task + row * R, R, scratch());
      if (need_B)
        kernels.outer({const_cast<float*>(v.data() + row * R), DType::f32, R, nullptr, 1}, R, block, 0, columns, rows,
                      scales.data(), row > 0, sums, columns, scratch());
    }
    if (need_B && M)
      kernels.transpose({sums, DType::f32, columns, nullptr, 1}, R, columns, data_of(dB) + begin * R, R);
    else if (need_B)
      std::memset(data_of(dB) + begin * R, 0, columns * R * sizeof(float));
  });
  if (parts && M) {
    float* sum = data_of(dv);
    std::memcpy(sum, parts, M * R * sizeof(float));
    for (int64_t task = 1; task < tasks; ++task) {
      const float* part = parts + task * M * R;
      for (int64_t i = 0; i < M * R; ++i) sum[i] += part[i];
    }
  }
  return {dv, dB, dz, t};
}

Tensor lora_in_grads(const Tensor& dx_, const Tensor& dv_, OptionalTensor x_, const Tensor& A_, OptionalTensor seed,
                     double p, double scale) {
  const LowRankKernels& kernels = low_rank_kernels();
  OneFactor A(View(A_), 0);
  int64_t K = A.width(), R = A.rank(), M = dv_.size(0);
  Small dv(dv_, M, R);
  std::optional<Output> dx;
  if (dx_.numel()) {
    dx.emplace(View(dx_));
    STD_TORCH_CHECK(dx->rows == M && dx->columns == K, "dx does not fit");
  }
  std::optional<Matrix> x;
  if (x_) {
    x.emplace(View(*x_));
    STD_TORCH_CHECK(x->rows == M && x->columns == K, "x does not fit");
  }
  OptionalDropout dropout(seed, p, K);
  Tensor dA = x ? new_floats(dv_, R, K) : nothing(dv_);
  const float* unscaled = dv.data();
  float* scaled = floats(local_rows, M * R);
  for (int64_t i = 0; i < M * R; ++i) scaled[i] = float(scale) * unscaled[i];
  if (dA.numel() && !M) std::memset(dA.data_ptr(), 0, R * K * sizeof(float));
  std::vector<float> ones(kRows, 1.0f);
  for_each_range(K, columns_of_task(K), worth_threads(M, K, R), [&](int64_t begin, int64_t end) {
    int64_t columns = end - begin;
    for (int64_t row = 0; row < M; row += kRows) {
      int rows = int(std::min(kRows, M - row));
      float* of_rows = scaled + row * R;
      if (x)
        kernels.outer({of_rows, DType::f32, R, nullptr, 1}, R, Input{*x, dropout, kernels}.block(row, rows, begin, end),
                      0, columns, rows, ones.data(), row > 0, data_of(dA) + begin, K, scratch());
      if (!dx) continue;
      Rows out = block_of(*dx, row, begin);
      if (!dropout.given) {
        kernels.expand(out, rows, of_rows, R, A.from(begin), 0, columns, scratch());
        continue;
      }
      float* sums = floats(tile_of_sums, kRows * kTileColumns);
      for (int64_t k = begin; k < end; k += kTileColumns) {
        int64_t stop = std::min(k + kTileColumns, end);
        std::memset(sums, 0, rows * kTileColumns * sizeof(float));
        Rows tile{sums, DType::f32, kTileColumns, nullptr, 1};
        kernels.expand(tile, rows, of_rows, R, A.from(k), 0, stop - k, scratch());
        kernels.add_dropped(block_of(*dx, row, k), rows, k, stop, sums, kTileColumns, dropout.dropout, row);
      }
    }
  });
  if (dx) dx->finish();
  return dA;
}

Tensor lora_dropout(const Tensor& x_, const Tensor& seed, double p) {
  Matrix x{View(x_)};
  OptionalDropout dropout(seed, p, x.columns);
  Tensor out = torch::stable::new_empty(x_, x_.sizes());
  Matrix kept{View(out)};
  for_each_range(x.rows, rows_of_task(x.rows), worth_threads(x.rows, x.columns, 0), [&](int64_t first, int64_t end) {
    low_rank_kernels().drop(block_of(x, first, 0), int(end - first), 0, x.columns, dropout.dropout, first,
                            block_of(kept, first, 0).data, x.columns);
  });
  return out;
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("lora_forward_", TORCH_BOX(&lora_kernels::lora_forward));
  m.impl("lora_out_grads", TORCH_BOX(&lora_kernels::lora_out_grads));
  m.impl("lora_in_grads_", TORCH_BOX(&lora_kernels::lora_in_grads));
  m.impl("lora_dropout", TORCH_BOX(&lora_kernels::lora_dropout));
}
