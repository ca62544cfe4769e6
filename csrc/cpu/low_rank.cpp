// The `low_rank` ops on the CPU: what may be read is checked before anything is written, the rows of one adapter are
// brought together so that its factors are read once, and the work is cut into tasks for torch's threads.
//
// Messages are short: lora_kernels/ops/_check.py words a refusal for users.
#include "low_rank.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <vector>

namespace lora_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, "unsupported dtype");
  }
}

int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// torch's contiguous(), without its call where there is nothing to do.
Tensor compact(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// A thread's own memory, kept from call to call.
struct Buffer {
  char* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
  char* get(size_t bytes) {
    if (bytes > size) {
      std::free(data);
      size = (bytes + 4095) / 4096 * 4096;
      data = static_cast<char*>(std::aligned_alloc(4096, size));
      if (!data) {
        size = 0;
        throw std::bad_alloc();
      }
    }
    return data;
  }
};
thread_local Buffer kernel_scratch, local_rows, column_block;

void* scratch() { return kernel_scratch.get(kScratch); }
float* floats(Buffer& buffer, int64_t count) { return reinterpret_cast<float*>(buffer.get(count * sizeof(float))); }

// A tensor [..., columns] as rows with contiguous columns; copied if it does not lie so.
struct Matrix {
  DType dtype;
  int64_t rows = 1, columns, stride;
  void* data;
  OptionalTensor copy;

  explicit Matrix(const Tensor& t) : dtype(dtype_of(t)) {
    STD_TORCH_CHECK(t.is_cpu(), "not on the CPU");
    if (lies_in_rows(t)) {
      data = t.data_ptr();
    } else {
      copy = torch::stable::contiguous(t);
      lies_in_rows(*copy);
      data = copy->data_ptr();
    }
  }

  bool lies_in_rows(const Tensor& t) {
    auto sizes = t.sizes(), strides = t.strides();
    int64_t last = int64_t(sizes.size()) - 1;
    STD_TORCH_CHECK(last >= 0, "a scalar has no rows");
    columns = stride = sizes[last];
    rows = 1;
    for (int64_t d = 0; d < last; ++d) rows *= sizes[d];
    if (rows * columns == 0) return true;
    if (columns > 1 && strides[last] != 1) return false;
    bool first = true;
    int64_t expected = 0;
    for (int64_t d = last - 1; d >= 0; --d) {
      if (sizes[d] == 1) continue;
      if (first)
        stride = strides[d];
      else if (strides[d] != expected)
        return false;
      first = false;
      expected = strides[d] * sizes[d];
    }
    return true;
  }

  Rows view(int64_t column, const int32_t* index, int divisor) const {
    return {static_cast<char*>(data) + column * element_size(dtype), dtype, stride, index, divisor};
  }
};

// A matrix the op writes: no two elements at one address, and copied back if it had to be copied.
struct Output : Matrix {
  const Tensor& original;
  explicit Output(const Tensor& t) : Matrix(t), original(t) {
    auto sizes = t.sizes(), strides = t.strides();
    for (size_t d = 0; d < sizes.size(); ++d) STD_TORCH_CHECK(sizes[d] < 2 || strides[d] != 0, "y is expanded");
  }
  void finish() {
    if (!copy) return;
    Tensor to = original;
    torch::stable::copy_(to, *copy);
  }
};

// The factors of S slices of L adapters, each seen as [rank, width].
struct Factors {
  std::vector<Factor> table;    // [S, L]
  std::vector<int64_t> widths;  // of each slice
  std::vector<Tensor> copies;
  int64_t slices = 1, adapters = 0, padded_rank = 0, total = 0;
  bool stacked;

  // rank_dim: 0 for A ([rank, K]), 1 for B ([N, rank]), counted in the matrix of one adapter.
  Factors(const std::vector<Tensor>& tensors, int rank_dim) {
    STD_TORCH_CHECK(!tensors.empty(), "no factors");
    stacked = tensors[0].dim() == 3;
    slices = stacked ? tensors.size() : 1;
    adapters = stacked ? tensors[0].size(0) : tensors.size();
    DType dtype = dtype_of(tensors[0]);
    table.reserve(slices * adapters);
    copies.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Tensor* t = &tensors[i];
      auto sizes = t->sizes(), strides = t->strides();
      STD_TORCH_CHECK(t->is_cpu() && sizes.size() == (stacked ? 3 : 2) && dtype_of(*t) == dtype, "factors differ");
      size_t first = sizes.size() - 2;
      int64_t rank = sizes[first + rank_dim], width = sizes[first + 1 - rank_dim];
      if (rank > 1 && width > 1 && strides[first] != 1 && strides[first + 1] != 1) {
        copies.push_back(torch::stable::contiguous(*t));
        t = &copies.back();
        strides = t->strides();
      }
      Factor factor{t->data_ptr(), dtype, int(rank), strides[first + rank_dim], strides[first + 1 - rank_dim]};
      if (rank <= 1) factor.rank_stride = factor.stride == 1 ? width : 1;
      if (width <= 1) factor.stride = factor.rank_stride == 1 ? rank : 1;
      STD_TORCH_CHECK(rank <= kMaxRank, "rank over ", kMaxRank);
      if (stacked) {
        STD_TORCH_CHECK(sizes[0] == adapters && (i == 0 || rank == padded_rank), "factors differ");
        for (int64_t l = 0; l < adapters; ++l) {
          table.push_back(factor);
          factor.data = static_cast<const char*>(factor.data) + strides[0] * element_size(dtype);
        }
      } else {
        STD_TORCH_CHECK(i == 0 || width == widths[0], "factors differ");
        table.push_back(factor);
      }
      if (stacked || i == 0) {
        widths.push_back(width);
        total += width;
      }
      padded_rank = std::max(padded_rank, rank);
    }
  }

  const Factor& at(int64_t slice, int64_t adapter) const { return table[slice * adapters + adapter]; }

  void set_ranks(const OptionalTensor& ranks) {
    if (!ranks) return;
    STD_TORCH_CHECK(ranks->scalar_type() == ScalarType::Int && ranks->is_cpu(), "ranks");
    Tensor t = compact(*ranks);
    bool per_slice = t.dim() == 2;
    STD_TORCH_CHECK(per_slice ? t.size(0) == slices && t.size(1) == adapters : t.dim() == 1 && t.size(0) == adapters,
                    "ranks");
    const int32_t* live = static_cast<const int32_t*>(t.data_ptr());
    for (int64_t i = 0; i < slices * adapters; ++i) {
      int32_t rank = live[per_slice ? i : i % adapters];
      STD_TORCH_CHECK(rank >= 0 && rank <= padded_rank, "ranks");
      table[i].rank = std::min(table[i].rank, int(rank));
    }
  }
};

// s of every slice and adapter.
struct Scales {
  float scale;
  OptionalTensor scaling;
  const float* values = nullptr;
  bool per_slice = false;
  int64_t adapters;
  Scales(const OptionalTensor& given, double scale_, int64_t slices, int64_t adapters_)
      : scale(float(scale_)), adapters(adapters_) {
    if (!given) return;
    STD_TORCH_CHECK(given->scalar_type() == ScalarType::Float && given->is_cpu(), "scaling");
    scaling = compact(*given);
    auto sizes = scaling->sizes();
    per_slice = sizes.size() == 2;
    STD_TORCH_CHECK(per_slice ? sizes[0] == slices && sizes[1] == adapters : sizes.size() == 1 && sizes[0] == adapters,
                    "scaling");
    values = static_cast<const float*>(scaling->data_ptr());
  }
  float at(int64_t slice, int64_t adapter) const {
    return values ? scale * values[per_slice ? slice * adapters + adapter : adapter] : scale;
  }
};

// A run of pairs of one adapter; pairs == nullptr: the rows from `first` on.
struct Group {
  int64_t adapter;
  const int32_t* pairs;
  int64_t first, count;
};

template <class T>
void read_ids(const Tensor& ids, const OptionalTensor& indptr, int64_t rows, int64_t adapters,
              std::vector<int32_t>& out) {
  const T* p = static_cast<const T*>(ids.data_ptr());
  int64_t count = ids.numel();
  for (int64_t i = 0; i < count; ++i) STD_TORCH_CHECK(p[i] >= -1 && p[i] < adapters, "id out of range");
  if (!indptr) {
    out.assign(p, p + count);
    return;
  }
  const T* bounds = static_cast<const T*>(indptr->data_ptr());
  STD_TORCH_CHECK(bounds[0] == 0, "seg_indptr");
  for (int64_t i = 0; i < count; ++i) STD_TORCH_CHECK(bounds[i] <= bounds[i + 1], "seg_indptr");
  STD_TORCH_CHECK(bounds[count] <= rows, "seg_indptr");
  out.assign(rows, -1);
  for (int64_t i = 0; i < count; ++i) std::fill(out.begin() + bounds[i], out.begin() + bounds[i + 1], int32_t(p[i]));
}

// Ids of the pairs, from either form; checked. The vector is the thread's, valid until the next call.
const std::vector<int32_t>& pair_ids(const Tensor& given, OptionalTensor indptr, int64_t rows, int64_t adapters) {
  thread_local std::vector<int32_t> out;
  STD_TORCH_CHECK(given.is_cpu() && (given.dim() == 1 || (given.dim() == 2 && !indptr)), "ids");
  Tensor ids = compact(given);
  if (indptr) {
    STD_TORCH_CHECK(indptr->is_cpu() && indptr->dim() == 1 && indptr->numel() == ids.numel() + 1 &&
                        indptr->scalar_type() == ids.scalar_type(),
                    "seg_indptr");
    indptr = compact(*indptr);
  } else {
    STD_TORCH_CHECK(rows < 0 || ids.size(0) == rows, "ids");
  }
  auto dtype = ids.scalar_type();
  if (dtype == ScalarType::Int)
    read_ids<int32_t>(ids, indptr, rows, adapters, out);
  else if (dtype == ScalarType::Long)
    read_ids<int64_t>(ids, indptr, rows, adapters, out);
  else
    STD_TORCH_CHECK(false, "ids");
  return out;
}

// Pairs sorted by adapter into order, their runs into bounds [L + 1].
void sort_pairs(const std::vector<int32_t>& ids, int64_t adapters, int32_t* bounds, int32_t* order) {
  std::fill(bounds, bounds + adapters + 1, 0);
  for (int32_t id : ids)
    if (id >= 0) ++bounds[id + 1];
  for (int64_t l = 0; l < adapters; ++l) bounds[l + 1] += bounds[l];
  // bounds[l] walks to the end of run l while it fills, then every bound moves back by one run.
  for (size_t i = 0; i < ids.size(); ++i)
    if (ids[i] >= 0) order[bounds[ids[i]]++] = int32_t(i);
  for (int64_t l = adapters; l > 0; --l) bounds[l] = bounds[l - 1];
  bounds[0] = 0;
}

// Which pairs use which adapter.
struct Routing {
  std::vector<int32_t> storage;
  std::vector<Group> groups;
  int64_t pairs;    // P
  int divisor = 1;  // k

  Routing(const OptionalTensor& ids, const OptionalTensor& indptr, const OptionalTensor& plan, int64_t rows,
          int64_t adapters, int64_t weights_per_row) {
    STD_TORCH_CHECK(rows < (int64_t(1) << 31), "too many rows");
    pairs = rows;
    if (!ids && !plan) {
      STD_TORCH_CHECK(adapters >= 1 || rows == 0, "no adapter");
      if (rows > 0) groups.push_back({0, nullptr, 0, rows});
      return;
    }
    const int32_t *bounds, *order;
    if (plan) {
      STD_TORCH_CHECK(plan->scalar_type() == ScalarType::Int && plan->is_cpu() && plan->is_contiguous(), "plan");
      const int32_t* table = static_cast<const int32_t*>(plan->data_ptr());
      int64_t capacity = plan->numel() - adapters - 3;
      STD_TORCH_CHECK(capacity >= 0 && table[1] == adapters, "plan of other adapters");
      bounds = table + 2;
      order = bounds + adapters + 1;
      pairs = rows * std::max<int64_t>(weights_per_row, 1);
      STD_TORCH_CHECK(table[0] == pairs && bounds[0] == 0 && bounds[adapters] <= capacity, "plan of other rows");
      for (int64_t l = 0; l < adapters; ++l) STD_TORCH_CHECK(bounds[l] <= bounds[l + 1], "plan");
      for (int64_t i = 0; i < bounds[adapters]; ++i) STD_TORCH_CHECK(order[i] >= 0 && order[i] < pairs, "plan");
    } else {
      const std::vector<int32_t>& of_pair = pair_ids(*ids, indptr, rows, adapters);
      pairs = of_pair.size();
      storage.resize(adapters + 1 + of_pair.size());
      sort_pairs(of_pair, adapters, storage.data(), storage.data() + adapters + 1);
      bounds = storage.data();
      order = bounds + adapters + 1;
    }
    divisor = rows ? int(pairs / rows) : 1;
    for (int64_t l = 0; l < adapters; ++l)
      if (bounds[l + 1] > bounds[l]) groups.push_back({l, order + bounds[l], 0, bounds[l + 1] - bounds[l]});
  }
};

// Row indices of a run within a group, for Rows.
const int32_t* index_of(const Group& group) { return group.pairs ? group.pairs + group.first : nullptr; }
int64_t offset_of(const Group& group) { return group.pairs ? 0 : group.first; }
int64_t pair_of(const Group& group, int64_t i) { return group.pairs ? group.pairs[group.first + i] : group.first + i; }

Rows rows_of(const Matrix& matrix, const Group& group, int64_t column, int divisor) {
  Rows rows = matrix.view(column, index_of(group), divisor);
  rows.data = static_cast<char*>(rows.data) + offset_of(group) * matrix.stride * element_size(matrix.dtype);
  return rows;
}

// Call f(task) for every task, on torch's threads where the work repays waking them.
template <class F>
void for_each_task(int64_t tasks, bool parallel, const F& f) {
  int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  if (!parallel || threads < 2) {
    for (int64_t task = 0; task < tasks; ++task) f(task);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) f(task);
  });
}

// Below this many bytes of factors and rows one thread is done before a second one has woken up.
constexpr int64_t kWorthThreads = 160 << 10;

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// y += s · w · (x Aᵀ) Bᵀ, or one half of it: v comes from x and A or is given, and goes to y and B or is the result.
struct LowRank {
  const Routing& routing;
  int64_t slices, rank;  // padded
  const LowRankKernels& kernels = low_rank_kernels();
  const Matrix* x = nullptr;  // shrink from
  const Factors* A = nullptr;
  const Matrix* v_in = nullptr;  // or given [S * P, R]
  Matrix* y = nullptr;           // expand to
  const Factors* B = nullptr;
  float* v_out = nullptr;  // or the result [S, P, R]
  const Scales* scales = nullptr;
  const float* weights = nullptr;

  int live_rank(int64_t s, int64_t l) const {
    int live = int(rank);
    if (A) live = std::min(live, A->at(s, l).rank);
    if (B) live = std::min(live, B->at(s, l).rank);
    return live;
  }

  // Parts [part, part_end) of v = x Aᵀ, or the given v, for a run of pairs: [count, R].
  void make_v(const Group& run, int64_t s, int64_t part, int64_t part_end, float* v) const {
    int live = live_rank(s, run.adapter);
    if (A) {
      Factor a = A->at(s, run.adapter);
      a.rank = live;
      Rows rows = rows_of(*x, run, 0, routing.divisor);
      for (int64_t p = part; p < part_end; ++p)
        kernels.shrink(rows, int(run.count), a, p * kPart, std::min((p + 1) * kPart, x->columns), p > part, v, rank,
                       scratch());
    } else {
      const float* data = static_cast<const float*>(v_in->data) + s * routing.pairs * v_in->stride;
      for (int64_t i = 0; i < run.count; ++i)
        std::memcpy(v + i * rank, data + pair_of(run, i) * v_in->stride, live * sizeof(float));
    }
  }

  void scale_v(const Group& run, int64_t s, float* v) const {
    if (!B) return;
    int live = live_rank(s, run.adapter);
    float scale = scales->at(s, run.adapter);
    if (scale == 1.0f && !weights) return;
    for (int64_t i = 0; i < run.count; ++i) {
      float factor = weights ? scale * weights[pair_of(run, i)] : scale;
      for (int r = 0; r < live; ++r) v[i * rank + r] *= factor;
    }
  }

  // Columns [begin, end) of slice s of y, or the rows of v_out.
  void use_v(const Group& run, int64_t s, const float* v, int64_t begin, int64_t end) const {
    int live = live_rank(s, run.adapter);
    if (!live) return;
    if (B) {
      Factor b = B->at(s, run.adapter);
      b.rank = live;
      kernels.expand(rows_of(*y, run, first_column(s), 1), int(run.count), v, rank, b, begin, end, scratch());
    } else {
      float* out = v_out + s * routing.pairs * rank;
      for (int64_t i = 0; i < run.count; ++i)
        std::memcpy(out + pair_of(run, i) * rank, v + i * rank, live * sizeof(float));
    }
  }

  int64_t first_column(int64_t s) const {
    int64_t column = 0;
    for (int64_t i = 0; i < s; ++i) column += B->widths[i];
    return column;
  }

  int64_t parts() const { return A ? std::max<int64_t>(divide_up(x->columns, kPart), 1) : 1; }

  int64_t bytes(const std::vector<Group>& groups) const {
    int64_t sum = 0, size = A ? element_size(A->table[0].dtype) : B ? element_size(B->table[0].dtype) : 4;
    int64_t in = A ? x->columns : 0, out = B ? y->columns : 0;
    for (const Group& g : groups) sum += (slices * in + out) * rank * size + g.count * (in + 2 * out) * 2;
    return sum;
  }

  // Runs short enough for all threads to have one, of at least 64 rows, so that factors are read few times.
  std::vector<Group> runs() const {
    int64_t total = 0, threads = torch::stable::get_num_threads();
    for (const Group& g : routing.groups) total += g.count;
    int64_t longest = std::max<int64_t>(64, divide_up(divide_up(total, threads), 16) * 16);
    if (longest > 512) longest = divide_up(divide_up(total, divide_up(total, 512 * threads) * threads), 16) * 16;
    std::vector<Group> out;
    for (const Group& g : routing.groups) {
      int64_t pieces = divide_up(g.count, longest), length = divide_up(divide_up(g.count, pieces), 16) * 16;
      for (int64_t first = 0; first < g.count; first += length)
        out.push_back({g.adapter, g.pairs, first, std::min(length, g.count - first)});
    }
    return out;
  }

  void run() const {
    if (routing.groups.empty()) return;
    bool parallel = bytes(routing.groups) >= kWorthThreads;
    if (routing.divisor > 1 && B) {
      mix(parallel);
      return;
    }
    const std::vector<Group> cut = parallel ? runs() : std::vector<Group>();
    const std::vector<Group>& tasks = parallel ? cut : routing.groups;
    if (parallel && int64_t(tasks.size()) < int64_t(torch::stable::get_num_threads())) {
      split(tasks);
      return;
    }
    for_each_task(tasks.size(), parallel, [&](int64_t task) {
      const Group& run = tasks[task];
      float* v = floats(local_rows, run.count * rank);
      for (int64_t s = 0; s < slices; ++s) {
        if (!live_rank(s, run.adapter)) continue;
        make_v(run, s, 0, parts(), v);
        scale_v(run, s, v);
        use_v(run, s, v, 0, B ? B->widths[s] : 0);
      }
    });
  }

  // Fewer runs than threads: parts of K first, then columns of N.
  void split(const std::vector<Group>& runs) const {
    int64_t count = 0, planes = parts();
    std::vector<int64_t> start;
    for (const Group& run : runs) {
      start.push_back(count);
      count += run.count;
    }
    int64_t plane = slices * count * rank;
    float* v = floats(local_rows, planes * plane);
    auto at = [&](int64_t part, int64_t s, int64_t i) { return v + part * plane + (s * count + start[i]) * rank; };
    int64_t n = runs.size();
    for_each_task(n * slices * planes, A != nullptr, [&](int64_t task) {
      int64_t part = task % planes, s = task / planes % slices, i = task / planes / slices;
      if (live_rank(s, runs[i].adapter)) make_v(runs[i], s, part, part + 1, at(part, s, i));
    });
    for (int64_t i = 0; i < n; ++i)
      for (int64_t s = 0; s < slices; ++s) {
        int live = live_rank(s, runs[i].adapter);
        for (int64_t part = 1; part < planes; ++part)
          for (int64_t row = 0; row < runs[i].count; ++row)
            for (int r = 0; r < live; ++r) at(0, s, i)[row * rank + r] += at(part, s, i)[row * rank + r];
        scale_v(runs[i], s, at(0, s, i));
      }
    int64_t width =
        B ? std::max<int64_t>(divide_up(divide_up(B->total, torch::stable::get_num_threads()), 64) * 64, 128) : 1;
    int64_t widest = B ? *std::max_element(B->widths.begin(), B->widths.end()) : 1, chunks = divide_up(widest, width);
    for_each_task(n * slices * chunks, B != nullptr, [&](int64_t task) {
      int64_t chunk = task % chunks, s = task / chunks % slices, i = task / chunks / slices;
      int64_t end = B ? std::min(B->widths[s], (chunk + 1) * width) : 0;
      if (!B || chunk * width < end) use_v(runs[i], s, at(0, s, i), chunk * width, end);
    });
  }

  // Several adapters a row: every pair's v first, then the columns of y in fp32, adapter by adapter, rounded once.
  void mix(bool parallel) const {
    constexpr int64_t kColumns = 64;
    std::vector<Group> tasks = runs();
    float* v = floats(local_rows, slices * routing.pairs * rank);
    std::vector<int64_t> start(1, 0);
    for (const Group& run : tasks) start.push_back(start.back() + run.count);
    auto at = [&](int64_t s, int64_t i) { return v + (s * routing.pairs + start[i]) * rank; };
    for_each_task(tasks.size() * slices, parallel, [&](int64_t task) {
      int64_t s = task % slices, i = task / slices;
      if (!live_rank(s, tasks[i].adapter)) return;
      make_v(tasks[i], s, 0, parts(), at(s, i));
      scale_v(tasks[i], s, at(s, i));
    });
    std::vector<std::pair<int64_t, int64_t>> blocks;  // (slice, first column in it)
    for (int64_t s = 0; s < slices; ++s)
      for (int64_t n = 0; n < B->widths[s]; n += kColumns) blocks.push_back({s, n});
    for_each_task(blocks.size(), parallel, [&](int64_t task) {
      auto [s, n] = blocks[task];
      int64_t columns = std::min(kColumns, B->widths[s] - n);
      float* sum = floats(column_block, y->rows * kColumns);
      convert(*y, first_column(s) + n, columns, sum, true);
      for (size_t i = 0; i < tasks.size(); ++i) {
        Factor b = B->at(s, tasks[i].adapter);
        b.rank = live_rank(s, tasks[i].adapter);
        if (!b.rank) continue;
        b.data = static_cast<const char*>(b.data) + n * b.stride * element_size(b.dtype);
        Rows rows{sum + offset_of(tasks[i]) * kColumns, DType::f32, kColumns, index_of(tasks[i]), routing.divisor};
        kernels.expand(rows, int(tasks[i].count), at(s, i), rank, b, 0, columns, scratch());
      }
      convert(*y, first_column(s) + n, columns, sum, false);
    });
  }

  // Columns of y to floats [rows, 64] or back.
  static void convert(const Matrix& y, int64_t column, int64_t columns, float* out, bool from_y) {
    // Plain loops: a mixture is bound by its factors, not by this.
    for (int64_t i = 0; i < y.rows; ++i) {
      char* row = static_cast<char*>(y.data) + (i * y.stride + column) * element_size(y.dtype);
      float* wide = out + i * 64;
      for (int64_t n = 0; n < columns; ++n) {
        switch (y.dtype) {
          case DType::f32:
            move(reinterpret_cast<float*>(row)[n], wide[n], from_y);
            break;
          case DType::bf16:
            move(reinterpret_cast<torch::headeronly::BFloat16*>(row)[n], wide[n], from_y);
            break;
          case DType::f16:
            move(reinterpret_cast<torch::headeronly::Half*>(row)[n], wide[n], from_y);
            break;
        }
      }
    }
  }
  template <class T>
  static void move(T& narrow, float& wide, bool from_y) {
    if (from_y)
      wide = static_cast<float>(narrow);
    else
      narrow = static_cast<T>(wide);
  }
};

// Weights [M, k] fp32, contiguous.
OptionalTensor checked_weights(const OptionalTensor& weights, int64_t rows) {
  if (!weights) return std::nullopt;
  STD_TORCH_CHECK(weights->is_cpu() && weights->scalar_type() == ScalarType::Float && weights->dim() == 2 &&
                      weights->size(0) == rows,
                  "weights");
  return compact(*weights);
}

void check_mixture(const Routing& routing, const OptionalTensor& ids, const OptionalTensor& weights) {
  bool mixture = ids && ids->dim() == 2;
  STD_TORCH_CHECK(!mixture || weights, "a mixture needs weights");
  STD_TORCH_CHECK(!weights || weights->numel() == routing.pairs, "weights");
}

const float* data_or_null(const OptionalTensor& t) { return t ? static_cast<const float*>(t->data_ptr()) : nullptr; }

int64_t per_row(const OptionalTensor& weights) { return weights ? weights->size(1) : 1; }

void check_same_form(const Factors& A, const Factors& B) {
  STD_TORCH_CHECK(A.stacked == B.stacked && A.slices == B.slices && A.adapters == B.adapters &&
                      (A.table.empty() || A.table[0].dtype == B.table[0].dtype),
                  "A and B differ");
  for (size_t i = 0; i < A.table.size(); ++i)
    STD_TORCH_CHECK(A.table[i].rank == B.table[i].rank, "A and B differ in rank");
}

void lora_add(const Tensor& y, const Tensor& x, std::vector<Tensor> A, std::vector<Tensor> B, OptionalTensor ids,
              OptionalTensor indptr, OptionalTensor plan, OptionalTensor scaling, OptionalTensor ranks,
              OptionalTensor weights, double scale) {
  Matrix in(x);
  Output out(y);
  Factors a(A, 0), b(B, 1);
  check_same_form(a, b);
  for (int64_t width : a.widths) STD_TORCH_CHECK(width == in.columns, "A does not fit x");
  STD_TORCH_CHECK(b.total == out.columns && out.rows == in.rows, "y does not fit");
  STD_TORCH_CHECK(in.dtype == out.dtype || out.dtype == DType::f32, "y dtype");
  STD_TORCH_CHECK(a.table.empty() || a.table[0].dtype == in.dtype || a.table[0].dtype == DType::f32, "factor dtype");
  a.set_ranks(ranks);
  weights = checked_weights(weights, in.rows);
  Routing routing(ids, indptr, plan, in.rows, a.adapters, per_row(weights));
  check_mixture(routing, ids, weights);
  Scales scales(scaling, scale, a.slices, a.adapters);
  LowRank op{routing, a.slices, a.padded_rank};
  op.x = &in, op.A = &a, op.y = &out, op.B = &b, op.scales = &scales, op.weights = data_or_null(weights);
  op.run();
  out.finish();
}

Tensor lora_shrink(const Tensor& x, std::vector<Tensor> A, OptionalTensor ids, OptionalTensor indptr,
                   OptionalTensor plan, OptionalTensor ranks, int64_t pairs) {
  Matrix in(x);
  Factors a(A, 0);
  for (int64_t width : a.widths) STD_TORCH_CHECK(width == in.columns, "A does not fit x");
  a.set_ranks(ranks);
  int64_t k = in.rows ? pairs / in.rows : 1;
  Routing routing(ids, indptr, plan, in.rows, a.adapters, k);
  STD_TORCH_CHECK(routing.pairs == pairs, "pairs");
  Tensor v = torch::stable::new_empty(x, {a.slices, pairs, a.padded_rank}, ScalarType::Float);
  if (v.numel()) std::memset(v.data_ptr(), 0, v.numel() * sizeof(float));
  LowRank op{routing, a.slices, a.padded_rank};
  op.x = &in, op.A = &a, op.v_out = static_cast<float*>(v.data_ptr());
  op.run();
  return v;
}

void lora_expand(const Tensor& y, const Tensor& v, std::vector<Tensor> B, OptionalTensor ids, OptionalTensor indptr,
                 OptionalTensor plan, OptionalTensor scaling, OptionalTensor ranks, OptionalTensor weights,
                 double scale) {
  Output out(y);
  Factors b(B, 1);
  STD_TORCH_CHECK(v.scalar_type() == ScalarType::Float, "v dtype");
  STD_TORCH_CHECK(v.dim() == 3 && v.size(0) == b.slices && v.size(2) == b.padded_rank, "v does not fit B");
  Matrix in(compact(v));
  in.stride = b.padded_rank;
  STD_TORCH_CHECK(b.total == out.columns, "y does not fit");
  b.set_ranks(ranks);
  weights = checked_weights(weights, out.rows);
  Routing routing(ids, indptr, plan, out.rows, b.adapters, per_row(weights));
  check_mixture(routing, ids, weights);
  STD_TORCH_CHECK(routing.pairs == v.size(1), "v does not fit y");
  Scales scales(scaling, scale, b.slices, b.adapters);
  LowRank op{routing, b.slices, b.padded_rank};
  op.v_in = &in, op.y = &out, op.B = &b, op.scales = &scales, op.weights = data_or_null(weights);
  op.run();
  out.finish();
}

Tensor lora_outer(const Tensor& u, const Tensor& w, int64_t adapters, OptionalTensor ids, OptionalTensor indptr,
                  OptionalTensor plan, OptionalTensor scaling, OptionalTensor weights, double scale, int64_t pairs) {
  Matrix left(u), right(w);
  int64_t rows = std::min(left.rows, right.rows);
  weights = checked_weights(weights, rows);
  Routing routing(ids, indptr, plan, rows, adapters, rows ? pairs / rows : 1);
  STD_TORCH_CHECK(routing.pairs == pairs && (left.rows == pairs || left.rows == rows) &&
                      (right.rows == pairs || right.rows == rows) && (!weights || weights->numel() == pairs),
                  "pairs");
  Scales scales(scaling, scale, 1, adapters);
  int64_t P = left.columns, Q = right.columns;
  Tensor out = torch::stable::new_empty(u, {adapters, P, Q}, ScalarType::Float);
  float* data = static_cast<float*>(out.data_ptr());
  if (out.numel()) std::memset(data, 0, out.numel() * sizeof(float));
  const float* weight = data_or_null(weights);
  const LowRankKernels& kernels = low_rank_kernels();
  int64_t width = std::max<int64_t>(divide_up(divide_up(Q, 2 * torch::stable::get_num_threads()), 64) * 64, 64);
  int64_t chunks = divide_up(Q, width), groups = routing.groups.size();
  bool parallel = pairs * (P + Q) * 4 >= kWorthThreads;
  for_each_task(groups * chunks, parallel, [&](int64_t task) {
    const Group& group = routing.groups[task / chunks];
    int64_t begin = task % chunks * width, end = std::min(Q, begin + width);
    float* s = floats(local_rows, group.count);
    for (int64_t i = 0; i < group.count; ++i)
      s[i] = scales.at(0, group.adapter) * (weight ? weight[pair_of(group, i)] : 1.0f);
    kernels.outer(rows_of(left, group, 0, left.rows ? int(pairs / left.rows) : 1), P,
                  rows_of(right, group, 0, right.rows ? int(pairs / right.rows) : 1), begin, end, int(group.count), s,
                  data + group.adapter * P * Q, Q, scratch());
  });
  return out;
}

void lora_plan(const Tensor& table, const Tensor& ids, OptionalTensor indptr, int64_t adapters) {
  STD_TORCH_CHECK(table.is_cpu() && table.scalar_type() == ScalarType::Int && table.is_contiguous(), "table");
  int64_t capacity = table.numel() - adapters - 3;
  const std::vector<int32_t>& of_pair = pair_ids(ids, indptr, indptr ? capacity : -1, adapters);
  STD_TORCH_CHECK(indptr || int64_t(of_pair.size()) <= capacity, "the plan has too little room");
  int32_t* p = static_cast<int32_t*>(table.data_ptr());
  int64_t pairs = of_pair.size();
  if (indptr) {
    Tensor bounds = compact(*indptr);
    pairs = bounds.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(bounds.data_ptr())[ids.numel()]
                                                    : static_cast<const int64_t*>(bounds.data_ptr())[ids.numel()];
  }
  p[0] = int32_t(pairs);
  p[1] = int32_t(adapters);
  sort_pairs(of_pair, adapters, p + 2, p + 3 + adapters);
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("lora_add_", TORCH_BOX(&lora_kernels::lora_add));
  m.impl("lora_shrink", TORCH_BOX(&lora_kernels::lora_shrink));
  m.impl("lora_expand_", TORCH_BOX(&lora_kernels::lora_expand));
  m.impl("lora_outer", TORCH_BOX(&lora_kernels::lora_outer));
  m.impl("lora_plan_", TORCH_BOX(&lora_kernels::lora_plan));
}
