// The ops of a linear layer with one LoRA adapter in training: reference/lora_linear.py says what they compute.
//
// The forward goes by rows. What comes after goes by columns, so that each sum over rows stays with one thread, and
// each block of dy and of x is read from memory once for all that is made of it.
#include "lora_linear.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "column_values.h"
#include "low_rank_schedule.h"
#include "new_tensor.h"

namespace lora_kernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kRows = 64;             // of a block that stays in a cache
constexpr int64_t kColumns = 512;         // of a task, at most
constexpr int64_t kDroppedColumns = 256;  // the same where dropout makes a copy and a mask of each block
constexpr int64_t kTileColumns = 64;
constexpr int64_t kMostLanes = 16;  // of a vector

inline thread_local Buffer tile_of_rows, tile_of_sums, tile_of_masks, transposed, sums_of_rows;

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

struct OptionalDropout {
  Dropout dropout{};
  bool given = false;

  OptionalDropout(const View* seed, double p, int64_t columns) {
    if (!seed) return;
    STD_TORCH_CHECK(seed->on_cpu && seed->type == ScalarType::Long && seed->numel() == 1, "seed");
    STD_TORCH_CHECK(p >= 0 && p <= 1, "p");
    given = true;
    dropout.key = uint64_t(*static_cast<const int64_t*>(seed->data));
    dropout.threshold = uint32_t(std::nearbyint(p * 65536));
    dropout.blocks = divide_up(columns, 8);
  }
};

// v [rows, rank] in fp32, as it lies in memory.
struct Small {
  Compact compact;

  Small(const View& v, int64_t rows, int64_t rank) : compact(v) {
    STD_TORCH_CHECK(compact.on_cpu && compact.type == ScalarType::Float && compact.dims == 2 &&
                        compact.sizes[0] == rows && compact.sizes[1] == rank,
                    "v does not fit");
  }
  const float* data() const { return static_cast<const float*>(compact.data); }
};

View floats_at(float* data, const int64_t* sizes, const int64_t* strides, int64_t dims) {
  View view;
  view.data = data, view.sizes = sizes, view.strides = strides, view.dims = dims;
  view.type = ScalarType::Float, view.on_cpu = true;
  return view;
}

// Room for a result of `count` floats.
float* result(const View& t, int64_t count) {
  STD_TORCH_CHECK(t.on_cpu && t.type == ScalarType::Float && t.numel() == count && t.is_contiguous(), "a result");
  return static_cast<float*>(t.data);
}

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
int64_t columns_of_task(int64_t columns, int64_t most = kColumns) {
  int64_t each = std::max<int64_t>(divide_up(columns, torch::stable::get_num_threads()), 1);
  return std::max<int64_t>(divide_up(divide_up(each, divide_up(each, most)), 32) * 32, 32);
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

// A block of x, dropped where there is dropout: then it lies in the thread's own memory.
Rows input(const Matrix& x, const OptionalDropout& dropout, int64_t row, int rows, int64_t begin, int64_t end,
           uint16_t* mask = nullptr) {
  Rows block = block_of(x, row, begin);
  if (!dropout.given) return block;
  void* kept = tile_of_rows.get(size_t(rows * (end - begin) * element_size(x.dtype)));
  low_rank_kernels().drop(block, rows, begin, end, dropout.dropout, row, kept, end - begin, mask, end - begin);
  return {kept, x.dtype, end - begin, nullptr, 1};
}

// v = x̃ Aᵀ of `count` rows.
void make_v(const Matrix& x, const OneFactor& A, const OptionalDropout& dropout, int64_t first, int count, float* v) {
  int64_t K = x.columns, R = A.rank(), step = dropout.given ? kRows : count;
  if (!K) std::memset(v, 0, count * R * sizeof(float));
  for (int64_t begin = 0; begin < K; begin += kPart) {
    int64_t stop = std::min(begin + kPart, K);
    for (int64_t row = 0; row < count; row += step) {
      int rows = int(std::min(step, count - row));
      low_rank_kernels().shrink(input(x, dropout, first + row, rows, begin, stop), rows, A.from(begin), 0, stop - begin,
                                begin > 0, v + row * R, R, scratch());
    }
  }
}

}  // namespace

void lora_down(const View& x_, const View& A_, const View* seed, double p, const View& v_) {
  Matrix x(x_);
  OneFactor A(A_, 0);
  STD_TORCH_CHECK(A.width() == x.columns, "A does not fit x");
  STD_TORCH_CHECK(A.table[0].dtype == x.dtype || A.table[0].dtype == DType::f32, "factor dtype");
  OptionalDropout dropout(seed, p, x.columns);
  int64_t M = x.rows, R = A.rank();
  float* v = result(v_, M * R);
  for_each_range(M, rows_of_task(M), worth_threads(M, x.columns, R),
                 [&](int64_t first, int64_t end) { make_v(x, A, dropout, first, int(end - first), v + first * R); });
}

void lora_forward(const View& y_, const View& x_, const View& A_, const View& B_, const View* column_scale,
                  const View* other_, const View* other_scale, const View* bias, const View* seed, double p,
                  double scale, const View& v_) {
  const LowRankKernels& kernels = low_rank_kernels();
  Output y(y_);
  Matrix x(x_);
  OneFactor A(A_, 0), B(B_, 1);
  int64_t M = x.rows, K = x.columns, N = y.columns, R = A.rank();
  STD_TORCH_CHECK(A.width() == K && B.width() == N && B.rank() == R && y.rows == M, "shapes differ");
  STD_TORCH_CHECK(y.dtype == x.dtype || y.dtype == DType::f32, "y dtype");
  STD_TORCH_CHECK(A.table[0].dtype == x.dtype || A.table[0].dtype == DType::f32, "factor dtype");
  std::optional<Matrix> other;
  if (other_) {
    other.emplace(*other_);
    STD_TORCH_CHECK(other->rows == M && other->columns == N && other->dtype == y.dtype, "other");
  }
  ColumnValues c(column_scale, N), e(other_scale, N), b(bias, N);
  OptionalDropout dropout(seed, p, K);
  bool plain = !other && !c.data && !b.data;
  float* v = result(v_, M * R);
  for_each_range(M, rows_of_task(M), worth_threads(M, K + N, R), [&](int64_t first, int64_t end) {
    int count = int(end - first);
    float* of_rows = v + first * R;
    make_v(x, A, dropout, first, count, of_rows);
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
}

void lora_out_grads(const View& dy_, const View& v_, const View& B_, const View* y_, const View* bias,
                    const View* column_scale, double scale, bool need_v, bool need_B, const View& dv_, const View& dB_,
                    const View& dz_, const View& t_) {
  const LowRankKernels& kernels = low_rank_kernels();
  Matrix dy(dy_);
  OneFactor B(B_, 1);
  int64_t M = dy.rows, N = dy.columns, R = B.rank();
  STD_TORCH_CHECK(B.width() == N, "B does not fit dy");
  Small v(v_, M, R);
  std::optional<Matrix> y;
  if (y_) {
    y.emplace(*y_);
    STD_TORCH_CHECK(y->rows == M && y->columns == N && y->dtype == dy.dtype, "y does not fit dy");
  }
  ColumnValues c(column_scale, N), b(bias, N);
  int64_t width = columns_of_task(N), tasks = divide_up(N, width);
  float* dv = result(dv_, need_v ? M * R : 0);
  float* dB = result(dB_, need_B ? N * R : 0);
  float* t = result(t_, y ? N : 0);
  std::optional<Matrix> scaled;
  if (c.data) {
    STD_TORCH_CHECK(dz_.numel() == M * N && dz_.type == dy_.type && dz_.is_contiguous(), "dz");
    scaled.emplace(dz_);
  }
  if (y) std::fill_n(t, N, 0.0f);
  if (need_v && !tasks) std::fill_n(dv, M * R, 0.0f);
  std::vector<float> scales(kRows, float(scale));
  // The sums over each task's columns, added in order afterwards.
  float* parts = need_v && tasks > 1 ? floats(local_rows, tasks * M * R) : nullptr;
  for_each_range(N, width, worth_threads(M, N, R), [&](int64_t begin, int64_t end) {
    int64_t columns = end - begin;
    float* of_task = parts ? parts + begin / width * M * R : need_v ? dv : nullptr;
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
                             y ? block_of(*y, row, begin) : Rows{}, b.from(begin), y ? t + begin : nullptr);
      if (need_v) kernels.shrink(block, rows, factor, 0, columns, false, of_task + row * R, R, scratch());
      if (need_B)
        kernels.outer({const_cast<float*>(v.data() + row * R), DType::f32, R, nullptr, 1}, R, block, 0, columns, rows,
                      scales.data(), row > 0, row + rows < M, sums, columns, scratch());
    }
    if (need_B && M)
      kernels.transpose({sums, DType::f32, columns, nullptr, 1}, R, columns, dB + begin * R, R);
    else if (need_B)
      std::memset(dB + begin * R, 0, columns * R * sizeof(float));
  });
  if (parts && M) {
    std::memcpy(dv, parts, M * R * sizeof(float));
    for (int64_t task = 1; task < tasks; ++task) {
      const float* part = parts + task * M * R;
      for (int64_t i = 0; i < M * R; ++i) dv[i] += part[i];
    }
  }
}

void lora_in_grads(const View& dx_, const View& dv_, const View* x_, const View& A_, const View* seed, double p,
                   double scale, const View& dA_) {
  const LowRankKernels& kernels = low_rank_kernels();
  OneFactor A(A_, 0);
  STD_TORCH_CHECK(dv_.dims == 2, "dv");
  int64_t K = A.width(), R = A.rank(), M = dv_.sizes[0];
  Small dv(dv_, M, R);
  std::optional<Output> dx;
  if (dx_.numel()) {
    dx.emplace(dx_);
    STD_TORCH_CHECK(dx->rows == M && dx->columns == K, "dx does not fit");
  }
  std::optional<Matrix> x;
  if (x_) {
    x.emplace(*x_);
    STD_TORCH_CHECK(x->rows == M && x->columns == K, "x does not fit");
  }
  OptionalDropout dropout(seed, p, K);
  float* dA = result(dA_, x ? R * K : 0);
  const float* unscaled = dv.data();
  float* scaled = floats(local_rows, M * R);
  for (int64_t i = 0; i < M * R; ++i) scaled[i] = float(scale) * unscaled[i];
  if (x && !M) std::fill_n(dA, R * K, 0.0f);
  std::vector<float> ones(kRows, 1.0f);
  int64_t width = columns_of_task(K, dropout.given ? kDroppedColumns : kColumns);
  for_each_range(K, width, worth_threads(M, K, R), [&](int64_t begin, int64_t end) {
    int64_t columns = end - begin;
    uint16_t* mask = nullptr;
    if (dropout.given && dx) {
      size_t count = kRows * columns + kMostLanes;
      mask = reinterpret_cast<uint16_t*>(tile_of_masks.get(count * sizeof(uint16_t)));
    }
    for (int64_t row = 0; row < M; row += kRows) {
      int rows = int(std::min(kRows, M - row));
      float* of_rows = scaled + row * R;
      bool more = !dropout.given && row + rows < M;
      if (x)
        kernels.outer({of_rows, DType::f32, R, nullptr, 1}, R, input(*x, dropout, row, rows, begin, end, mask), 0,
                      columns, rows, ones.data(), row > 0, more, dA + begin, K, scratch());
      else if (mask)
        kernels.drop({}, rows, begin, end, dropout.dropout, row, nullptr, 0, mask, columns);
      if (!dx) continue;
      Rows out = block_of(*dx, row, begin);
      if (mask)
        kernels.expand_kept(out, rows, of_rows, R, A.from(begin), 0, columns, mask, columns, scratch());
      else
        kernels.expand(out, rows, of_rows, R, A.from(begin), 0, columns, scratch());
    }
  });
  if (dx) dx->finish();
}

void lora_linear_grads(const View& dx, const View& dy, const View& v, const View* x, const View& A, const View& B,
                       const View* seed, double p, double scale, const View& dA, const View& dB) {
  STD_TORCH_CHECK(v.dims == 2, "v does not fit");
  bool need_v = x || dx.numel(), need_B = dB.numel();
  int64_t M = v.sizes[0], R = v.sizes[1], none = 0, one = 1, strides[] = {R, 1};
  View nothing = floats_at(nullptr, &none, &one, 1);
  View dv = need_v ? floats_at(floats(sums_of_rows, M * R), v.sizes, strides, 2) : nothing;
  lora_out_grads(dy, v, B, nullptr, nullptr, nullptr, scale, need_v, need_B, dv, dB, nothing, nothing);
  if (need_v) lora_in_grads(dx, dv, x, A, seed, p, scale, dA);
}

namespace {

// ‖w + scale · Σ_r b[r] A[r]‖² of one row of K elements, as it stands.
float norm_sq_of_sum(const Rows& w, int64_t K, const float* b, float scale, const OneFactor& A) {
  const LowRankKernels& kernels = low_rank_kernels();
  int64_t R = A.rank();
  float* row = floats(tile_of_rows, K + R);
  float* scaled = row + K;
  kernels.transpose(w, 1, K, row, 1);
  for (int64_t r = 0; r < R; ++r) scaled[r] = scale * b[r];
  kernels.expand({row, DType::f32, K, nullptr, 1}, 1, scaled, R, A.table[0], 0, K, scratch());
  double sum = 0;
  for (int64_t k = 0; k < K; ++k) sum += double(row[k]) * row[k];
  return float(sum);
}

}  // namespace

void lora_weight_norm(const View& weight, const View& A_, const View& B_, const View& weight_norm_sq, double scale_,
                      const View& norms) {
  constexpr float kCancelled = 0.1f;  // reference/lora_linear.py
  const LowRankKernels& kernels = low_rank_kernels();
  Matrix W(weight), rows_of_A(A_), rows_of_B(B_);
  OneFactor A(A_, 0);
  int64_t N = W.rows, K = W.columns, R = A.rank();
  STD_TORCH_CHECK(A.width() == K && rows_of_B.rows == N && rows_of_B.columns == R, "shapes differ");
  ColumnValues given(&weight_norm_sq, N);
  float scale = float(scale_);
  // s A Aᵀ
  float* products_of_A = floats(tile_of_sums, R * R);
  std::fill_n(products_of_A, R * R, 0.0f);
  for (int64_t k = 0; k < K; k += kPart)
    kernels.shrink(rows_of_A.view(k, nullptr, 1), int(R), A.from(k), 0, std::min(kPart, K - k), k > 0, products_of_A, R,
                   scratch());
  for (int64_t i = 0; i < R * R; ++i) products_of_A[i] *= scale;
  Factor among_A{products_of_A, DType::f32, int(R), R, 1};
  float* out = result(norms, N);
  for_each_range(N, rows_of_task(N), worth_threads(N, K, R), [&](int64_t first, int64_t end) {
    int count = int(end - first);
    float* products = floats(local_rows, 2 * count * R);  // with A: 2 W Aᵀ + s B A Aᵀ
    float* b = products + count * R;
    std::fill_n(products, count * R, 0.0f);
    for (int64_t k = 0; k < K; k += kPart)
      kernels.shrink(block_of(W, first, k), count, A.from(k), 0, std::min(kPart, K - k), k > 0, products, R, scratch());
    for (int i = 0; i < count; ++i) kernels.transpose(block_of(rows_of_B, first + i, 0), 1, R, b + i * R, 1);
    for (int64_t i = 0; i < count * R; ++i) products[i] *= 2;
    kernels.expand({products, DType::f32, R, nullptr, 1}, count, b, R, among_A, 0, R, scratch());
    for (int i = 0; i < count; ++i) {
      float before = given.data[first + i], sum = 0;
      for (int64_t r = 0; r < R; ++r) sum += products[i * R + r] * b[i * R + r];
      float square = before + scale * sum;
      if (square < kCancelled * before) square = norm_sq_of_sum(block_of(W, first + i, 0), K, b + i * R, scale, A);
      out[first + i] = std::sqrt(std::max(square, 0.0f));
    }
  });
}

void lora_dropout(const View& x_, const View& seed, double p, const View& out) {
  Matrix x(x_);
  OptionalDropout dropout(&seed, p, x.columns);
  STD_TORCH_CHECK(out.numel() == x.rows * x.columns && out.type == x_.type && out.is_contiguous(), "a result");
  Matrix kept(out);
  for_each_range(x.rows, rows_of_task(x.rows), worth_threads(x.rows, x.columns, 0), [&](int64_t first, int64_t end) {
    low_rank_kernels().drop(block_of(x, first, 0), int(end - first), 0, x.columns, dropout.dropout, first,
                            static_cast<char*>(kept.data) + first * x.columns * element_size(x.dtype), x.columns,
                            nullptr, 0);
  });
}

namespace {

// The same as the dispatcher calls them.
int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
  return rows;
}
std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

Tensor forward(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, OptionalTensor column_scale,
               OptionalTensor other, OptionalTensor other_scale, OptionalTensor bias, OptionalTensor seed, double p,
               double scale) {
  Tensor v = new_tensor({rows_of(x), A.size(0)});
  lora_forward(View(y), View(x), View(A), View(B), OptionalView(column_scale), OptionalView(other),
               OptionalView(other_scale), OptionalView(bias), OptionalView(seed), p, scale, View(v));
  return v;
}

Tensor down(const Tensor& x, const Tensor& A, OptionalTensor seed, double p) {
  Tensor v = new_tensor({rows_of(x), A.size(0)});
  lora_down(View(x), View(A), OptionalView(seed), p, View(v));
  return v;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> out_grads(const Tensor& dy, const Tensor& v, const Tensor& B,
                                                     OptionalTensor y, OptionalTensor bias, OptionalTensor column_scale,
                                                     double scale, bool need_v, bool need_B) {
  Tensor dv = new_tensor(need_v ? sizes_of(v) : std::vector<int64_t>{0});
  Tensor dB = new_tensor(need_B ? sizes_of(B) : std::vector<int64_t>{0});
  Tensor dz = new_tensor(column_scale ? sizes_of(dy) : std::vector<int64_t>{0}, &dy);
  Tensor t = new_tensor({y ? B.size(0) : 0});
  lora_out_grads(View(dy), View(v), View(B), OptionalView(y), OptionalView(bias), OptionalView(column_scale), scale,
                 need_v, need_B, View(dv), View(dB), View(dz), View(t));
  return {dv, dB, dz, t};
}

Tensor in_grads(const Tensor& dx, const Tensor& dv, OptionalTensor x, const Tensor& A, OptionalTensor seed, double p,
                double scale) {
  Tensor dA = new_tensor(x ? sizes_of(A) : std::vector<int64_t>{0});
  lora_in_grads(View(dx), View(dv), OptionalView(x), View(A), OptionalView(seed), p, scale, View(dA));
  return dA;
}

Tensor weight_norm(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& weight_norm_sq, double scale) {
  Tensor norms = new_tensor({weight.size(0)});
  lora_weight_norm(View(weight), View(A), View(B), View(weight_norm_sq), scale, View(norms));
  return norms;
}

Tensor dropout(const Tensor& x, const Tensor& seed, double p) {
  Tensor out = new_tensor(sizes_of(x), &x);
  lora_dropout(View(x), View(seed), p, View(out));
  return out;
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("lora_forward_", TORCH_BOX(&lora_kernels::forward));
  m.impl("lora_down", TORCH_BOX(&lora_kernels::down));
  m.impl("lora_out_grads", TORCH_BOX(&lora_kernels::out_grads));
  m.impl("lora_in_grads_", TORCH_BOX(&lora_kernels::in_grads));
  m.impl("lora_weight_norm", TORCH_BOX(&lora_kernels::weight_norm));
  m.impl("lora_dropout", TORCH_BOX(&lora_kernels::dropout));
}
