// The arguments of the `low_rank` ops, checked: what a kernel may read lies in bounds once these are made.
//
// Messages are short: lora_kernels/ops/_check.py words a refusal for users.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "low_rank.h"
#include "view.h"

namespace lora_kernels {

inline DType dtype_of(const View& t) {
  switch (t.type) {
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

inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Several views, such as the factors of all slices or adapters.
struct Views {
  const View* data;
  size_t count;
};

// A tensor [..., columns] as rows with contiguous columns; copied if it does not lie so.
struct Matrix {
  DType dtype;
  int64_t rows = 1, columns, stride;
  void* data;
  std::optional<Tensor> copy;

  explicit Matrix(const View& t) : dtype(dtype_of(t)), data(t.data) {
    STD_TORCH_CHECK(t.on_cpu, "not on the CPU");
    if (lies_in_rows(t)) return;
    copy = t.contiguous();
    View copied(*copy);
    lies_in_rows(copied);
    data = copied.data;
  }

  bool lies_in_rows(const View& t) {
    int64_t last = t.dims - 1;
    STD_TORCH_CHECK(last >= 0, "a scalar has no rows");
    columns = stride = t.sizes[last];
    rows = 1;
    for (int64_t d = 0; d < last; ++d) rows *= t.sizes[d];
    if (rows * columns == 0) return true;
    if (columns > 1 && t.strides[last] != 1) return false;
    bool first = true;
    int64_t expected = 0;
    for (int64_t d = last - 1; d >= 0; --d) {
      if (t.sizes[d] == 1) continue;
      if (first)
        stride = t.strides[d];
      else if (t.strides[d] != expected)
        return false;
      first = false;
      expected = t.strides[d] * t.sizes[d];
    }
    return true;
  }

  Rows view(int64_t column, const int32_t* index, int divisor) const {
    return {static_cast<char*>(data) + column * element_size(dtype), dtype, stride, index, divisor};
  }
};

// A matrix the op writes: no two elements at one address, and copied back if it had to be copied.
struct Output : Matrix {
  const Tensor* original;

  explicit Output(const View& t) : Matrix(t), original(t.tensor) {
    for (int64_t d = 0; d < t.dims; ++d) STD_TORCH_CHECK(t.sizes[d] < 2 || t.strides[d] != 0, "y is expanded");
  }
  void finish() {
    if (!copy) return;
    Tensor to = *original;
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
  Factors(Views views, int rank_dim, int64_t most = kMaxRank) {
    STD_TORCH_CHECK(views.count > 0, "no factors");
    stacked = views.data[0].dims == 3;
    slices = stacked ? views.count : 1;
    adapters = stacked ? views.data[0].sizes[0] : views.count;
    DType dtype = dtype_of(views.data[0]);
    table.reserve(slices * adapters);
    for (size_t i = 0; i < views.count; ++i) {
      View t = views.data[i];
      STD_TORCH_CHECK(t.on_cpu && t.dims == (stacked ? 3 : 2) && dtype_of(t) == dtype, "factors differ");
      int64_t first = t.dims - 2;
      int64_t rank = t.sizes[first + rank_dim], width = t.sizes[first + 1 - rank_dim];
      if (rank > 1 && width > 1 && t.strides[first] != 1 && t.strides[first + 1] != 1) {
        copies.reserve(views.count);
        copies.push_back(t.contiguous());
        t = View(copies.back());
      }
      Factor factor{t.data, dtype, int(rank), t.strides[first + rank_dim], t.strides[first + 1 - rank_dim]};
      if (rank <= 1) factor.rank_stride = factor.stride == 1 ? width : 1;
      if (width <= 1) factor.stride = factor.rank_stride == 1 ? rank : 1;
      STD_TORCH_CHECK(rank <= most, "rank over ", most);
      if (stacked) {
        STD_TORCH_CHECK(t.sizes[0] == adapters && (i == 0 || rank == padded_rank), "factors differ");
        for (int64_t l = 0; l < adapters; ++l) {
          table.push_back(factor);
          factor.data = static_cast<const char*>(factor.data) + t.strides[0] * element_size(dtype);
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

  // Makes one stack the `count` slices that lie in it one after the other, each as high as its adapter's rank.
  void split(int64_t count, const View* ranks) {
    STD_TORCH_CHECK(stacked && slices == 1 && padded_rank % count == 0 && (!ranks || ranks->dims == 1), "packed A");
    padded_rank /= count;
    for (Factor& factor : table) factor.rank = int(padded_rank);
    set_ranks(ranks);
    std::vector<Factor> whole(std::move(table));
    table.clear();
    for (int64_t s = 0; s < count; ++s)
      for (Factor factor : whole) {
        int64_t offset = s * factor.rank * factor.rank_stride * element_size(factor.dtype);
        factor.data = static_cast<const char*>(factor.data) + offset;
        factor.rank = int(padded_rank);
        table.push_back(factor);
      }
    slices = count;
    int64_t width = widths[0];
    widths.assign(count, width);
  }

  const Factor& at(int64_t slice, int64_t adapter) const { return table[slice * adapters + adapter]; }

  void set_ranks(const View* ranks) {
    if (!ranks) return;
    STD_TORCH_CHECK(ranks->type == ScalarType::Int && ranks->on_cpu, "ranks");
    Compact t(*ranks);
    bool per_slice = t.dims == 2;
    STD_TORCH_CHECK(per_slice ? t.sizes[0] == slices && t.sizes[1] == adapters : t.dims == 1 && t.sizes[0] == adapters,
                    "ranks");
    const int32_t* live = static_cast<const int32_t*>(t.data);
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
  std::optional<Compact> scaling;
  const float* values = nullptr;
  bool per_slice = false;
  int64_t adapters;

  Scales(const View* given, double scale_, int64_t slices, int64_t adapters_)
      : scale(float(scale_)), adapters(adapters_) {
    if (!given) return;
    STD_TORCH_CHECK(given->type == ScalarType::Float && given->on_cpu, "scaling");
    scaling.emplace(*given);
    per_slice = scaling->dims == 2;
    const int64_t* sizes = scaling->sizes;
    STD_TORCH_CHECK(per_slice ? sizes[0] == slices && sizes[1] == adapters : scaling->dims == 1 && sizes[0] == adapters,
                    "scaling");
    values = static_cast<const float*>(scaling->data);
  }
  float at(int64_t slice, int64_t adapter) const {
    return values ? scale * values[per_slice ? slice * adapters + adapter : adapter] : scale;
  }
};

// Weights [M, k] of a mixture.
struct Weights {
  std::optional<Compact> given;
  const float* values = nullptr;

  Weights(const View* weights, int64_t rows) {
    if (!weights) return;
    STD_TORCH_CHECK(
        weights->on_cpu && weights->type == ScalarType::Float && weights->dims == 2 && weights->sizes[0] == rows,
        "weights");
    given.emplace(*weights);
    values = static_cast<const float*>(given->data);
  }
  int64_t per_row() const { return given ? given->sizes[1] : 1; }
};

// A run of pairs of one adapter; pairs == nullptr: the rows from `first` on.
struct Group {
  int64_t adapter;
  const int32_t* pairs;
  int64_t first, count;
};

template <class T>
void read_ids(const View& ids, const View* indptr, int64_t rows, int64_t adapters, std::vector<int32_t>& out) {
  const T* p = static_cast<const T*>(ids.data);
  int64_t count = ids.numel();
  for (int64_t i = 0; i < count; ++i) STD_TORCH_CHECK(p[i] >= -1 && p[i] < adapters, "id out of range");
  if (!indptr) {
    out.assign(p, p + count);
    return;
  }
  const T* bounds = static_cast<const T*>(indptr->data);
  STD_TORCH_CHECK(bounds[0] == 0, "seg_indptr");
  for (int64_t i = 0; i < count; ++i) STD_TORCH_CHECK(bounds[i] <= bounds[i + 1], "seg_indptr");
  STD_TORCH_CHECK(bounds[count] <= rows, "seg_indptr");
  out.assign(rows, -1);
  for (int64_t i = 0; i < count; ++i) std::fill(out.begin() + bounds[i], out.begin() + bounds[i + 1], int32_t(p[i]));
}

// Ids of the pairs, from either form; checked. The vector is the thread's, valid until the next call.
inline const std::vector<int32_t>& pair_ids(const View& given, const View* given_indptr, int64_t rows,
                                            int64_t adapters) {
  thread_local std::vector<int32_t> out;
  STD_TORCH_CHECK(given.on_cpu && (given.dims == 1 || (given.dims == 2 && !given_indptr)), "ids");
  Compact ids(given);
  std::optional<Compact> indptr;
  if (given_indptr) {
    STD_TORCH_CHECK(given_indptr->on_cpu && given_indptr->dims == 1 && given_indptr->numel() == ids.numel() + 1 &&
                        given_indptr->type == ids.type,
                    "seg_indptr");
    indptr.emplace(*given_indptr);
  } else {
    STD_TORCH_CHECK(rows < 0 || ids.sizes[0] == rows, "ids");
  }
  const View* bounds = indptr ? &*indptr : nullptr;
  if (ids.type == ScalarType::Int)
    read_ids<int32_t>(ids, bounds, rows, adapters, out);
  else if (ids.type == ScalarType::Long)
    read_ids<int64_t>(ids, bounds, rows, adapters, out);
  else
    STD_TORCH_CHECK(false, "ids");
  return out;
}

// Pairs sorted by adapter into order, their runs into bounds [L + 1]; ids[i] is of pair `pairs[i]`, or of pair i.
inline void sort_pairs(const std::vector<int32_t>& ids, int64_t adapters, int32_t* bounds, int32_t* order,
                       const int32_t* pairs = nullptr) {
  std::fill(bounds, bounds + adapters + 1, 0);
  for (int32_t id : ids)
    if (id >= 0) ++bounds[id + 1];
  for (int64_t l = 0; l < adapters; ++l) bounds[l + 1] += bounds[l];
  // bounds[l] walks to the end of run l while it fills, then every bound moves back by one run.
  for (size_t i = 0; i < ids.size(); ++i)
    if (ids[i] >= 0) order[bounds[ids[i]]++] = pairs ? pairs[i] : int32_t(i);
  for (int64_t l = adapters; l > 0; --l) bounds[l] = bounds[l - 1];
  bounds[0] = 0;
}

// Which pairs use which adapter.
struct Routing {
  std::vector<int32_t> storage;
  std::vector<Group> groups;
  int64_t pairs;    // P
  int divisor = 1;  // k

  Routing(const View* ids, const View* indptr, const View* plan, int64_t rows, int64_t adapters,
          int64_t weights_per_row) {
    STD_TORCH_CHECK(rows < (int64_t(1) << 31), "too many rows");
    pairs = rows;
    if (!ids && !plan) {
      STD_TORCH_CHECK(adapters >= 1 || rows == 0, "no adapter");
      if (rows > 0) groups.push_back({0, nullptr, 0, rows});
      return;
    }
    const int32_t *bounds, *order;
    if (plan) {
      STD_TORCH_CHECK(plan->type == ScalarType::Int && plan->on_cpu && plan->is_contiguous(), "plan");
      const int32_t* table = static_cast<const int32_t*>(plan->data);
      int64_t capacity = plan->numel() - adapters - 3;
      STD_TORCH_CHECK(capacity >= 0 && table[1] == adapters, "plan of other adapters");
      bounds = table + 2;
      order = bounds + adapters + 1;
      pairs = rows * std::max<int64_t>(weights_per_row, 1);
      STD_TORCH_CHECK(table[0] == pairs || (table[0] < pairs && weights_per_row <= 1), "plan of other rows");
      STD_TORCH_CHECK(bounds[0] == 0 && bounds[adapters] <= capacity, "plan");
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

}  // namespace lora_kernels
